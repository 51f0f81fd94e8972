/* Makes the files of tests/vdb/files, which every later version must open: make_released FOLDER VERSION. Compiled with the
 * vdb.h of the version whose files they are; -DVALUES for one that knows of values. tests/vdb/test_released.py says what
 * is in them. */
#include <stdio.h>
#include <string.h>
#include "vdb.h"

enum { rows = 40, dimensions = 5 };

static int make(const char *folder, const char *version, vdb_storage storage, vdb_index index, const char *name) {
  vdb_options options = vdb_default_options();
  vdb_database *db;
  char path[4096];
  options.storage = storage;
  options.index = index;
  options.links = 4;
  options.build_effort = 20;
  if (vdb_new(dimensions, VDB_METRIC_EUCLIDEAN, &options, &db)) return 1;
  for (int i = 0; i < rows; i++) {
    float vector[dimensions];
    char id[16], text[16];
    vdb_record record;
    memset(&record, 0, sizeof record);
    snprintf(id, sizeof id, "row %d", i);
    snprintf(text, sizeof text, "m%d", i);
    for (int j = 0; j < dimensions; j++) vector[j] = (float)((i * 7 + j * j * 3) % 11 - 5) / 4.0f;
    if (i % 3) record.id = id;
    if (i % 4 == 1) record.metadata = text, record.metadata_size = strlen(text);
#ifdef VALUES
    vdb_value values[5] = {{"i", VDB_VALUE_INT, i, 0, NULL, 0},
                           {"half", VDB_VALUE_FLOAT, 0, i / 2.0, NULL, 0},
                           {"name", VDB_VALUE_TEXT, 0, 0, text, strlen(text)},
                           {"even", VDB_VALUE_BOOL, i % 2 == 0, 0, NULL, 0},
                           {"none", VDB_VALUE_NONE, 0, 0, NULL, 0}};
    if (i % 4 == 2) record.values = values, record.value_count = 5;
#endif
    if (vdb_add(db, vector, 1, &record, VDB_ADD_UNIQUE, NULL)) return 1;
  }
  for (int i = 4; i < rows; i += 5)
    if (vdb_remove_index(db, (uint64_t)i)) return 1;
  snprintf(path, sizeof path, "%s/%s-%s.vdb", folder, version, name);
  vdb_error error = vdb_save(db, path);
  vdb_destroy(db);
  return error != VDB_OK;
}

int main(int count, char **arguments) {
  if (count != 3) return 2;
  const char *folder = arguments[1], *version = arguments[2];
  return make(folder, version, VDB_STORAGE_F32, VDB_INDEX_FLAT, "f32-flat") ||
         make(folder, version, VDB_STORAGE_F32_I8, VDB_INDEX_HNSW, "f32_i8-hnsw") ||
         make(folder, version, VDB_STORAGE_F16, VDB_INDEX_HNSW, "f16-hnsw") ||
         make(folder, version, VDB_STORAGE_BF16, VDB_INDEX_FLAT, "bf16-flat") ||
         make(folder, version, VDB_STORAGE_I8, VDB_INDEX_FLAT, "i8-flat");
}
