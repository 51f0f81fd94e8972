/* A program as written for version 0.1 of the header: its functions, types and behaviour. The expected values are those
 * of the plain formulas. */
#include "check.h"
#include "vdb.h"

#include <unistd.h>

static float naive_distance(const float *a, const float *b, size_t dimensions, vdb_metric metric) {
  double dot = 0.0, aa = 0.0, bb = 0.0, squares = 0.0;
  for (size_t j = 0; j < dimensions; j++) {
    dot += (double)a[j] * b[j];
    aa += (double)a[j] * a[j];
    bb += (double)b[j] * b[j];
    squares += ((double)a[j] - b[j]) * ((double)a[j] - b[j]);
  }
  if (metric == VDB_METRIC_EUCLIDEAN) return (float)sqrt(squares);
  if (metric == VDB_METRIC_DOT_PRODUCT) return (float)-dot;
  return aa == 0.0 || bb == 0.0 ? 1.0f : (float)(1.0 - dot / sqrt(aa * bb));
}

static void check_search(vdb_metric metric) {
  enum { dimensions = 37, rows = 200 };
  static float vectors[rows][dimensions];
  float query[dimensions] = {0};
  int tag[rows];
  vdb_database *db = vdb_create(dimensions, metric);
  CHECK(db && vdb_count(db) == 0 && vdb_dimensions(db) == dimensions);
  CHECK(vdb_search(db, query, 3) == NULL);
  for (size_t i = 0; i < rows; i++) {
    char id[16];
    snprintf(id, sizeof id, "row %d", (int)(i % 100)); /* equal ids are allowed */
    for (size_t j = 0; j < dimensions; j++) vectors[i][j] = random_float();
    CHECK(vdb_add_vector(db, vectors[i], i == 7 ? NULL : id, &tag[i]) == VDB_OK);
  }
  CHECK(vdb_count(db) == rows);
  for (size_t j = 0; j < dimensions; j++) query[j] = random_float();
  vdb_result_set *set = vdb_search(db, query, 1000); /* clamped */
  CHECK(set && set->count == rows);
  for (size_t i = 0; i < rows; i++) {
    const vdb_result *result = &set->results[i];
    float expected = naive_distance(query, vectors[result->index], dimensions, metric);
    CHECK(fabsf(result->distance - expected) <= 1e-5f * (1.0f + fabsf(expected)));
    CHECK(i == 0 || result->distance >= set->results[i - 1].distance);
    CHECK(result->metadata == &tag[result->index]);
    CHECK(fabsf(vdb_compute_distance(query, vectors[result->index], dimensions, metric) - expected) <= 1e-5f * (1 + fabsf(expected)));
    if (result->index == 7) CHECK(result->id == NULL);
    else CHECK(result->id && atoi(result->id + 4) == (int)(result->index % 100));
  }
  CHECK(vdb_remove_vector(db, 3) == VDB_OK); /* later indices shift; the result set still owns its ids */
  CHECK(strncmp(set->results[0].id ? set->results[0].id : "row ", "row ", 4) == 0);
  const vdb_result *there = &set->results[set->results[0].index == 3];
  const char *near_id = there->id;
  size_t near_index = there->index;
  vdb_free_result_set(set);
  CHECK(near_index == 7 ? !near_id : atoi(near_id + 4) == (int)(near_index % 100)); /* the id is the row's, not the set's */
  float *data;
  char *id;
  void *metadata;
  CHECK(vdb_get_vector(db, 3, &data, &id, &metadata) == VDB_OK);
  CHECK(memcmp(data, vectors[4], sizeof vectors[4]) == 0 && strcmp(id, "row 4") == 0 && metadata == &tag[4]);
  CHECK(vdb_get_vector(db, rows - 1, NULL, NULL, NULL) == VDB_ERROR_INVALID_INDEX);
  CHECK(vdb_remove_vector(db, rows - 1) == VDB_ERROR_INVALID_INDEX);
  CHECK(vdb_count(db) == rows - 1);
  vdb_destroy(db);
}

/* Vectors may be written through the pointer that vdb_get_vector gives; searches see what is there. */
static void check_writing(vdb_metric metric, vdb_storage storage, const char *path) {
  enum { dimensions = 19, rows = 700 };
  static float vectors[rows][dimensions];
  float query[dimensions], *data;
  vdb_options options = vdb_default_options();
  vdb_database *db;
  options.storage = storage;
  CHECK(vdb_new(dimensions, metric, &options, &db) == VDB_OK);
  for (size_t i = 0; i < rows; i++) {
    for (size_t j = 0; j < dimensions; j++) vectors[i][j] = random_float();
    CHECK(vdb_add_vector(db, vectors[i], NULL, NULL) == VDB_OK);
  }
  for (size_t j = 0; j < dimensions; j++) query[j] = random_float();
  for (size_t i = 3; i < rows; i += 5) {
    CHECK(vdb_get_vector(db, i, &data, NULL, NULL) == VDB_OK);
    for (size_t j = 0; j < dimensions; j++) data[j] = vectors[i][j] = random_float() * (i % 2 ? 3.0f : 0.01f);
  }
  for (int pass = 0; pass < 4; pass++) {
    float before = -INFINITY;
    vdb_result_set *set = vdb_search(db, query, 50);
    CHECK(set && set->count == 50);
    for (size_t i = 0; i < rows; i++) { /* none that is nearer is missing */
      size_t nearer = 0;
      for (size_t k = 0; k < 50; k++) nearer += set->results[k].index == i;
      CHECK(nearer || naive_distance(query, vectors[i], dimensions, metric) >= set->results[49].distance - 1e-4f);
    }
    for (size_t k = 0; k < 50; k++) {
      float expected = naive_distance(query, vectors[set->results[k].index], dimensions, metric);
      CHECK(fabsf(set->results[k].distance - expected) <= 1e-5f * (1.0f + fabsf(expected)));
      CHECK(set->results[k].distance >= before);
      before = set->results[k].distance;
    }
    vdb_free_result_set(set);
    if (pass == 0 || pass == 1) { /* saved and loaded as it is */
      CHECK(vdb_save(db, path) == VDB_OK);
      vdb_destroy(db);
      CHECK(vdb_open(path, pass ? VDB_OPEN_READ : VDB_OPEN_MAP, 2, &db) == VDB_OK);
    }
    for (size_t i = 3; i < rows && pass == 2; i += 5) CHECK(vdb_refresh_vector(db, i) == VDB_OK);
  }
  CHECK(vdb_refresh_vector(db, rows) == VDB_ERROR_INVALID_INDEX);
  CHECK(vdb_get_vector(db, 3, &data, NULL, NULL) == VDB_OK);
  data[0] = NAN;
  CHECK(vdb_refresh_vector(db, 3) == VDB_ERROR_NOT_FINITE);
  vdb_destroy(db);
  unlink(path);
}

static void write_original(const char *path, vdb_metric metric) {
  uint32_t magic = 0x56444230u, sizes[2] = {3, 0};
  uint64_t dimensions = 2, count = 2;
  int32_t number = (int32_t)metric;
  float rows[2][2] = {{1.0f, 0.0f}, {0.0f, 2.0f}};
  FILE *file = fopen(path, "wb");
  CHECK(file);
  fwrite(&magic, 4, 1, file);
  fwrite(&dimensions, 8, 1, file);
  fwrite(&count, 8, 1, file);
  fwrite(&number, 4, 1, file);
  for (int i = 0; i < 2; i++) {
    fwrite(rows[i], sizeof(float), 2, file);
    fwrite(&sizes[i], 4, 1, file);
    if (sizes[i]) fwrite("one", 1, sizes[i], file);
  }
  CHECK(fclose(file) == 0);
}

static void check_files(const char *path) {
  float query[2] = {0.0f, 1.0f};
  write_original(path, VDB_METRIC_EUCLIDEAN);
  vdb_database *db = vdb_load(path);
  CHECK(db && vdb_count(db) == 2 && vdb_dimensions(db) == 2);
  for (int pass = 0; pass < 2; pass++) { /* as loaded from the first format, then from ours */
    vdb_result_set *set = vdb_search(db, query, 2);
    CHECK(set && set->count == 2);
    CHECK(set->results[0].index == 1 && set->results[0].distance == 1.0f && set->results[0].id == NULL);
    CHECK(set->results[1].index == 0 && strcmp(set->results[1].id, "one") == 0);
    vdb_free_result_set(set);
    CHECK(vdb_save(db, path) == VDB_OK);
    vdb_destroy(db);
    db = vdb_load(path);
    CHECK(db);
  }
  vdb_destroy(db);
  CHECK(unlink(path) == 0);
  CHECK(vdb_load(path) == NULL);
  CHECK(vdb_load(NULL) == NULL);
}

int main(int argc, char **argv) {
  float huge[2] = {1e20f, 1e20f}, small[2] = {1e-20f, 1e-20f};
  float one[3] = {1.0f, 2.0f, 2.0f}, zero[3] = {0.0f, 0.0f, 0.0f};
  for (int metric = 0; metric < 3; metric++) check_search((vdb_metric)metric);
  for (int metric = 0; metric < 3; metric++) {
    check_writing((vdb_metric)metric, VDB_STORAGE_F32, argc > 1 ? argv[1] : "original.vdb");
    check_writing((vdb_metric)metric, VDB_STORAGE_F32_I8, argc > 1 ? argv[1] : "original.vdb");
  }
  check_files(argc > 1 ? argv[1] : "original.vdb");
  CHECK(vdb_magnitude(one, 3) == 3.0f && vdb_dot_product(one, one, 3) == 9.0f);
  CHECK(vdb_cosine_similarity(one, one, 3) == 1.0f && vdb_cosine_similarity(one, zero, 3) == 0.0f);
  CHECK(vdb_cosine_similarity(huge, small, 2) == 1.0f); /* squares that leave the range of float */
  CHECK(vdb_euclidean_distance(one, zero, 3) == 3.0f);
  CHECK(vdb_create(0, VDB_METRIC_COSINE) == NULL);
  CHECK(vdb_add_vector(NULL, one, "id", NULL) == VDB_ERROR_NULL_POINTER);
  CHECK(vdb_save(NULL, "x") == VDB_ERROR_NULL_POINTER && vdb_count(NULL) == 0 && vdb_dimensions(NULL) == 0);
  vdb_destroy(NULL);
  vdb_free_result_set(NULL);
  puts("the first version's programs behave as before");
  return 0;
}
