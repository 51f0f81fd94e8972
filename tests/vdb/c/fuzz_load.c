/* libFuzzer target: whatever a file holds, opening it, asking it and changing it does no harm; what was loaded can be
 * changed, saved, and is then a right file.
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -I. fuzz_load.c -o fuzz_load -lm
 * The first byte of an input says what the rest is: 0 a file as it is; 1 a file that gets right checksums; 2 also the
 * right length; 3 the short form of files_case.h. */
#define _GNU_SOURCE /* getpid, unlink */
#include <unistd.h>
#include "files_case.h"

static void try_file(const char *path, const char *copy, int change) {
  vdb_database *db = NULL;
  char message[128];
  vdb_error error = vdb_verify(path, message, sizeof message);
  CHECK(error == VDB_OK || message[0]);
  if (vdb_open(path, VDB_OPEN_MAP, 1, &db) == VDB_OK) {
    ask_everything(db);
    CHECK(vdb_remove_index(db, 0) == VDB_ERROR_READ_ONLY);
    if (change) vdb_save(db, copy);
  }
  vdb_destroy(db);
  asked = 0;
  vdb_error opened = vdb_open(path, VDB_OPEN_READ, 1, &db);
  CHECK(opened == error && (opened != VDB_OK) == (db == NULL));
  CHECK(asked < ((size_t)64 << 20)); /* inputs are below 64 KB; a block of 64 rows of 65536 dimensions is 20 MB */
  if (db) {
    ask_everything(db);
    if (change) {
      change_everything(db);
      CHECK(vdb_save(db, copy) == VDB_OK);
      error = vdb_verify(copy, message, sizeof message);
      if (error) fprintf(stderr, "%s\n", message);
      CHECK(error == VDB_OK);
    }
  }
  vdb_destroy(db);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static char path[64], copy[64];
  if (!path[0]) {
    snprintf(path, sizeof path, "/dev/shm/vdb-fuzz-%ld", (long)getpid());
    snprintf(copy, sizeof copy, "/dev/shm/vdb-fuzz-%ld.copy", (long)getpid());
  }
  if (size < 2 || size > 65536) return 0;
  int form = data[0] & 3, change = data[0] & 4;
  whole_file file = {NULL, size - 1};
  if (form == 3) {
    file = expand(data + 1, size - 1);
    if (!file.bytes) return 0;
  } else {
    file.bytes = (unsigned char *)malloc(size);
    memcpy(file.bytes, data + 1, size - 1);
    if (form) stamp(file.bytes, file.size, form == 2);
  }
  write_whole(path, file.bytes, file.size);
  free(file.bytes);
  try_file(path, copy, change);
  unlink(path);
  unlink(copy);
  return 0;
}
