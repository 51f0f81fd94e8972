/* Rows, ids and metadata: adding, replacing, removing, using places again, compacting; every refusal changes nothing. */
#include "check.h"
#include "vdb.h"

enum { dimensions = 24 };

static void fill(float *vector, float value) {
  for (size_t j = 0; j < dimensions; j++) vector[j] = value + (float)j;
}

static vdb_database *make(vdb_storage storage, vdb_index index) {
  vdb_options options = vdb_default_options();
  vdb_database *db;
  options.storage = storage;
  options.index = index;
  options.threads = 2;
  CHECK(vdb_new(dimensions, VDB_METRIC_EUCLIDEAN, &options, &db) == VDB_OK);
  return db;
}

static void check_ids(vdb_index index) {
  vdb_database *db = make(VDB_STORAGE_F32, index);
  float vectors[3][dimensions], read[dimensions];
  vdb_record records[3] = {{"a", "first", 5, NULL, 0}, {"b", NULL, 0, NULL, 0}, {NULL, "third", 5, NULL, 0}};
  uint64_t rows[3], found;
  for (int i = 0; i < 3; i++) fill(vectors[i], (float)i);
  CHECK(vdb_add(db, vectors[0], 3, records, VDB_ADD_UNIQUE, rows) == VDB_OK && vdb_count(db) == 3);
  CHECK(vdb_find(db, "b", &found) == VDB_OK && found == rows[1]);
  CHECK(vdb_find(db, "c", &found) == VDB_ERROR_NOT_FOUND && vdb_find(db, "", &found) == VDB_ERROR_NOT_FOUND);

  CHECK(vdb_add(db, vectors[0], 1, records, VDB_ADD_UNIQUE, NULL) == VDB_ERROR_DUPLICATE_ID);
  vdb_record twice[2] = {{"x", NULL, 0, NULL, 0}, {"x", NULL, 0, NULL, 0}};
  CHECK(vdb_add(db, vectors[0], 2, twice, VDB_ADD_REPLACE, NULL) == VDB_ERROR_DUPLICATE_ID);
  CHECK(vdb_find(db, "x", &found) == VDB_ERROR_NOT_FOUND && vdb_count(db) == 3);

  vdb_record read_back;
  CHECK(vdb_read_record(db, rows[0], &read_back) == VDB_OK);
  CHECK(strcmp(read_back.id, "a") == 0 && read_back.metadata_size == 5 && memcmp(read_back.metadata, "first", 5) == 0);
  vdb_free_record(&read_back);
  CHECK(vdb_read_record(db, rows[2], &read_back) == VDB_OK && read_back.metadata_size == 5);
  vdb_free_record(&read_back);

  vdb_record again = {"a", "new", 3, NULL, 0}; /* replaced: one row of that id, the new vector and metadata */
  CHECK(vdb_add(db, vectors[2], 1, &again, VDB_ADD_REPLACE, rows) == VDB_OK && vdb_count(db) == 3);
  CHECK(vdb_find(db, "a", &found) == VDB_OK && found == rows[0]);
  CHECK(vdb_read_vector(db, found, read) == VDB_OK && memcmp(read, vectors[2], sizeof read) == 0);

  size_t removed = 0;
  vdb_record same = {"b", NULL, 0, NULL, 0};
  CHECK(vdb_add(db, vectors[1], 1, &same, VDB_ADD_ANY, NULL) == VDB_OK && vdb_count(db) == 4);
  CHECK(vdb_remove_id(db, "b", &removed) == VDB_OK && removed == 2 && vdb_count(db) == 2);
  CHECK(vdb_remove_id(db, "b", &removed) == VDB_ERROR_NOT_FOUND && removed == 0);
  CHECK(vdb_remove_index(db, 99) == VDB_ERROR_INVALID_INDEX);
  CHECK(vdb_compact(db) == VDB_OK && vdb_count(db) == 2);
  vdb_information information;
  CHECK(vdb_info(db, &information) == VDB_OK && information.slots == 2 && information.count == 2);
  CHECK(vdb_find(db, "a", &found) == VDB_OK);
  CHECK(vdb_read_vector(db, found, read) == VDB_OK && memcmp(read, vectors[2], sizeof read) == 0);
  vdb_destroy(db);
}

/* Thousands of rows come, are replaced and go; a plain array knows what must be there. */
static void check_churn(vdb_index index) {
  enum { keys = 300 };
  static float value[keys];
  static int present[keys];
  vdb_database *db = make(VDB_STORAGE_F32_I8, index);
  memset(present, 0, sizeof present);
  size_t count = 0;
  for (int step = 0; step < 6000; step++) {
    char id[16];
    size_t key = random_below(keys);
    float vector[dimensions];
    snprintf(id, sizeof id, "key %d", (int)key);
    if (random_below(3)) {
      vdb_record record = {id, &key, sizeof key, NULL, 0};
      value[key] = random_float();
      fill(vector, value[key]);
      CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_REPLACE, NULL) == VDB_OK);
      count += !present[key];
      present[key] = 1;
    } else {
      CHECK(vdb_remove_id(db, id, NULL) == (present[key] ? VDB_OK : VDB_ERROR_NOT_FOUND));
      count -= (size_t)present[key];
      present[key] = 0;
    }
    if (step % 1000 == 999) CHECK(vdb_compact(db) == VDB_OK);
    CHECK(vdb_count(db) == count);
  }
  for (size_t key = 0; key < keys; key++) {
    char id[16];
    uint64_t row;
    float vector[dimensions], expected[dimensions];
    snprintf(id, sizeof id, "key %d", (int)key);
    CHECK(vdb_find(db, id, &row) == (present[key] ? VDB_OK : VDB_ERROR_NOT_FOUND));
    if (!present[key]) continue;
    vdb_record record;
    fill(expected, value[key]);
    CHECK(vdb_read_vector(db, row, vector) == VDB_OK && memcmp(vector, expected, sizeof vector) == 0);
    CHECK(vdb_read_record(db, row, &record) == VDB_OK && memcmp(record.metadata, &key, sizeof key) == 0);
    vdb_free_record(&record);
    vdb_query_options options = vdb_default_query_options(1);
    vdb_answer *answer;
    options.with_ids = 1;
    CHECK(vdb_query(db, expected, 1, &options, &answer) == VDB_OK);
    CHECK(answer->counts[0] == 1 && answer->distances[0] == 0.0f);
    vdb_free_answer(answer);
  }
  vdb_destroy(db);
}

static size_t bytes_held(const vdb_database *db) {
  vdb_information information;
  CHECK(vdb_info(db, &information) == VDB_OK);
  return information.bytes;
}

/* What replaced rows had is given back, without vdb_compact. */
static void check_replacing(vdb_index index) {
  static char metadata[9000];
  vdb_database *db = make(VDB_STORAGE_F32, index);
  float vector[dimensions];
  memset(metadata, 'm', sizeof metadata);
  fill(vector, 0.0f);
  vdb_record record = {"doc", metadata, 5000, NULL, 0};
  CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_REPLACE, NULL) == VDB_OK);
  size_t begin = bytes_held(db);
  for (int step = 0; step < 10000; step++) {
    record.metadata_size = step % 2 ? 5000 : random_below(sizeof metadata);
    CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_REPLACE, NULL) == VDB_OK);
  }
  CHECK(vdb_count(db) == 1 && bytes_held(db) <= begin + 16384);
  vdb_destroy(db);
}

/* The same for rows that came from a file, whose records lie together; `lent`: somebody points at their ids. */
static void check_replacing_loaded(const char *path, int lent) {
  enum { rows = 2000 };
  static char metadata[2000];
  vdb_database *db = make(VDB_STORAGE_F32, VDB_INDEX_FLAT);
  float vector[dimensions];
  char id[16], *kept = NULL;
  for (size_t i = 0; i < rows; i++) {
    vdb_record record = {id, metadata, 1000, NULL, 0};
    snprintf(id, sizeof id, "row %d", (int)i);
    fill(vector, (float)i);
    CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_REPLACE, NULL) == VDB_OK);
  }
  CHECK(vdb_save(db, path) == VDB_OK);
  vdb_destroy(db);
  CHECK(vdb_open(path, VDB_OPEN_READ, 2, &db) == VDB_OK);
  size_t begin = bytes_held(db), most = begin;
  if (lent) CHECK(vdb_get_vector(db, rows - 1, NULL, &kept, NULL) == VDB_OK);
  for (size_t step = 0; step < 10 * rows; step++) {
    size_t i = random_below(rows - 1);
    vdb_record record = {id, metadata, 900 + random_below(200), NULL, 0};
    snprintf(id, sizeof id, "row %d", (int)i);
    memset(metadata, (int)(i % 256), sizeof metadata);
    fill(vector, (float)i);
    if (i % 10 == 0) CHECK(vdb_remove_id(db, id, NULL) == VDB_OK);
    CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_REPLACE, NULL) == VDB_OK);
    if (bytes_held(db) > most) most = bytes_held(db);
  }
  CHECK(vdb_count(db) == rows);
  if (lent) CHECK(strcmp(kept, "row 1999") == 0);
  CHECK(most <= 2 * begin + begin / 2); /* all of the text, and all of the new records */
  CHECK(lent || bytes_held(db) <= begin + begin / 8);
  for (size_t i = 0; i < rows - 1; i++) {
    uint64_t row;
    vdb_record record;
    snprintf(id, sizeof id, "row %d", (int)i);
    CHECK(vdb_find(db, id, &row) == VDB_OK && vdb_read_record(db, row, &record) == VDB_OK);
    CHECK(strcmp(record.id, id) == 0 && record.metadata_size >= 900);
    CHECK(((const unsigned char *)record.metadata)[899] == i % 256 || ((const unsigned char *)record.metadata)[899] == 0);
    vdb_free_record(&record);
  }
  CHECK(vdb_compact(db) == VDB_OK && bytes_held(db) <= begin + begin / 8 && vdb_count(db) == rows);
  vdb_destroy(db);
  remove(path);
}

/* An id that the database itself gave may name what is removed or replaced. */
static void check_own_ids(void) {
  vdb_database *db = make(VDB_STORAGE_F32, VDB_INDEX_FLAT);
  float vector[dimensions];
  char *id;
  size_t removed;
  fill(vector, 1.0f);
  vdb_record record = {"the same", "m", 1, NULL, 0};
  for (int i = 0; i < 5; i++) CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_OK);
  CHECK(vdb_get_vector(db, 2, NULL, &id, NULL) == VDB_OK);
  record.id = id;
  CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_REPLACE, NULL) == VDB_OK && vdb_count(db) == 1);
  CHECK(vdb_add_vector(db, vector, "the same", NULL) == VDB_OK);
  uint64_t row;
  CHECK(vdb_find(db, "the same", &row) == VDB_OK && vdb_get_vector(db, (size_t)row, NULL, &id, NULL) == VDB_OK);
  CHECK(vdb_remove_id(db, id, &removed) == VDB_OK && removed == 2 && vdb_count(db) == 0);
  vdb_destroy(db);
}

static void check_refusals(void) {
  vdb_database *db = make(VDB_STORAGE_F16, VDB_INDEX_FLAT);
  float vector[dimensions];
  vdb_query_options options = vdb_default_query_options(3);
  vdb_answer *answer;
  static char long_id[(1 << 20) + 2];
  memset(long_id, 'x', sizeof long_id - 1);
  fill(vector, 0.0f);
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_OK && answer->counts[0] == 0); /* empty */
  vdb_free_answer(answer);
  vector[5] = NAN;
  CHECK(vdb_add(db, vector, 1, NULL, VDB_ADD_ANY, NULL) == VDB_ERROR_NOT_FINITE);
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_ERROR_NOT_FINITE && answer == NULL);
  vector[5] = -INFINITY;
  CHECK(vdb_add_vector(db, vector, "i", NULL) == VDB_ERROR_NOT_FINITE);
  CHECK(vdb_search(db, vector, 3) == NULL);
  vector[5] = 65520.0f; /* would round to infinity in f16 */
  CHECK(vdb_add(db, vector, 1, NULL, VDB_ADD_ANY, NULL) == VDB_ERROR_NOT_FINITE);
  vector[5] = 65519.0f;
  vdb_record record = {long_id, NULL, 0, NULL, 0};
  CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_ERROR_INVALID_ARGUMENT);
  CHECK(vdb_add(db, vector, 1, NULL, (vdb_add_mode)3, NULL) == VDB_ERROR_INVALID_ARGUMENT);
  CHECK(vdb_count(db) == 0);
  CHECK(vdb_add(db, vector, 1, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  options.k = 0;
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_ERROR_INVALID_ARGUMENT);
  CHECK(vdb_query(NULL, vector, 1, &options, &answer) == VDB_ERROR_NULL_POINTER);
  CHECK(vdb_set_threads(db, 257) == VDB_ERROR_INVALID_ARGUMENT && vdb_set_threads(db, 3) == VDB_OK);
  vdb_destroy(db);

  vdb_options wrong = vdb_default_options();
  CHECK(vdb_new(65537, VDB_METRIC_COSINE, NULL, &db) == VDB_ERROR_INVALID_DIMENSIONS);
  CHECK(vdb_new(4, (vdb_metric)3, NULL, &db) == VDB_ERROR_INVALID_ARGUMENT);
  wrong.links = 1;
  CHECK(vdb_new(4, VDB_METRIC_COSINE, &wrong, &db) == VDB_ERROR_INVALID_ARGUMENT && db == NULL);
  for (int error = -20; error <= 0; error++) CHECK(*vdb_error_text((vdb_error)error));
}

/* Flat: at most 16 bytes a vector beyond the vectors and codes, once there are many. */
static void check_memory(vdb_storage storage) {
  vdb_database *db = make(storage, VDB_INDEX_FLAT);
  enum { batch = 5000 };
  static float vectors[batch][dimensions];
  vdb_information information;
  for (int i = 0; i < 40; i++) {
    for (size_t row = 0; row < batch; row++) fill(vectors[row], (float)row);
    CHECK(vdb_add(db, vectors[0], batch, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  }
  CHECK(vdb_compact(db) == VDB_OK && vdb_info(db, &information) == VDB_OK);
  double beyond = (double)(information.bytes - information.vector_bytes) / (double)information.count;
  printf("storage %d: %.1f bytes a vector beyond vectors and codes\n", (int)storage, beyond);
  CHECK(beyond <= 24.0);
  vdb_destroy(db);
}

int main(void) {
  for (int index = 0; index < 2; index++) {
    check_ids((vdb_index)index);
    check_churn((vdb_index)index);
    check_replacing((vdb_index)index);
  }
  check_replacing_loaded("test_rows.vdb", 0);
  check_replacing_loaded("test_rows.vdb", 1);
  check_own_ids();
  check_refusals();
  for (int storage = 0; storage < 5; storage++) check_memory((vdb_storage)storage);
  puts("rows, ids and metadata");
  return 0;
}
