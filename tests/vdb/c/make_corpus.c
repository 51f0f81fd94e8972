/* Writes the fuzzer's first inputs into a folder: make_corpus FOLDER */
#include "files_case.h"

static const char *folder;

static void put(const char *name, unsigned char form, const whole_file *file) {
  char path[512];
  unsigned char *bytes = (unsigned char *)malloc(file->size + 1);
  bytes[0] = form;
  memcpy(bytes + 1, file->bytes, file->size);
  snprintf(path, sizeof path, "%s/%s", folder, name);
  write_whole(path, bytes, file->size + 1);
  free(bytes);
}

static void put_first(const char *name, uint64_t dimensions, uint64_t count, int32_t metric, uint32_t id_size) {
  unsigned char bytes[512] = {0};
  uint32_t magic = VDB_FIRST_MAGIC;
  size_t at = 24;
  memcpy(bytes, &magic, 4);
  memcpy(bytes + 4, &dimensions, 8);
  memcpy(bytes + 12, &count, 8);
  memcpy(bytes + 20, &metric, 4);
  for (int row = 0; row < 3; row++) {
    float vector[3] = {1.0f, (float)row, -2.0f};
    memcpy(bytes + at, vector, 12);
    memcpy(bytes + at + 12, &id_size, 4);
    memcpy(bytes + at + 16, "abcd", 4);
    at += 16 + (id_size < 4 ? id_size : 4);
  }
  whole_file file = {bytes, at};
  put(name, 4, &file);
}

int main(int count, char **arguments) {
  char name[64], path[512];
  CHECK(count == 2);
  folder = arguments[1];
  snprintf(path, sizeof path, "%s/scratch", folder);
  for (int i = 0; i < 20; i++) {
    database_case what = {(size_t)(1 + 2 * (i % 3)), (size_t)(i < 10 ? 12 : 70), (vdb_metric)(i % 3), (vdb_storage)(i % 5),
                          (vdb_index)(i / 5 % 2), i % 2, i / 2 % 2, i / 3 % 2};
    vdb_database *db = make_database(&what);
    CHECK(vdb_save(db, path) == VDB_OK);
    vdb_destroy(db);
    whole_file file = read_whole(path), compact = contract(&file);
    snprintf(name, sizeof name, "short-%02d", i);
    put(name, i % 3 ? 3 : 7, &compact);
    snprintf(name, sizeof name, "whole-%02d", i);
    if (i == 4 || i == 9) put(name, (unsigned char)(i == 9 ? 2 : 0), &file);
    free(file.bytes);
    free(compact.bytes);
  }
  remove(path);
  put_first("first-ids", 3, 3, 1, 4);
  put_first("first-none", 3, 3, 0, 0);
  put_first("first-long-id", 3, 3, 0, 0xffffffffu);
  put_first("first-wide", ((uint64_t)1 << 62) + 1, 1, 2, 0);
  return 0;
}
