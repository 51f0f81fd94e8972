/* Exact search against an oracle in double precision: every kernel set, metric, storage, number of threads and of
 * queries, with removed rows, filters, equal rows, zero vectors and numbers near the ends of float. */
#include "check.h"
#include "vdb.h"

static double oracle_distance(const float *q, const float *x, size_t dimensions, vdb_metric metric) {
  double lanes[3][16] = {{0}};
  for (size_t j = 0; j < dimensions; j++) {
    double a = q[j], b = x[j];
    volatile double product = metric == VDB_METRIC_EUCLIDEAN ? (a - b) * (a - b) : a * b; /* rounded, then added */
    lanes[0][j % 16] += product;
    lanes[1][j % 16] += b * b;
    lanes[2][j % 16] += a * a;
  }
  for (size_t half = 8; half; half /= 2)
    for (size_t i = 0; i < half; i++)
      for (size_t sum = 0; sum < 3; sum++) lanes[sum][i] += lanes[sum][i + half];
  double dot = lanes[0][0], row = lanes[1][0], query = lanes[2][0];
  if (metric == VDB_METRIC_EUCLIDEAN) return (float)sqrt(dot);
  if (metric == VDB_METRIC_DOT_PRODUCT) return (float)-dot;
  if (row == 0.0 || query == 0.0) return 1.0;
  double cosine = dot / (sqrt(query) * sqrt(row));
  return (float)(1.0 - (cosine > 1.0 ? 1.0 : cosine < -1.0 ? -1.0 : cosine));
}

typedef struct {
  float distance;
  uint64_t row;
} pair;

static int by_distance(const void *a, const void *b) {
  const pair *x = (const pair *)a, *y = (const pair *)b;
  if (x->distance != y->distance) return x->distance < y->distance ? -1 : 1;
  return x->row < y->row ? -1 : x->row > y->row;
}

static int every_third(uint64_t index, void *context) { return index % 3 == *(uint64_t *)context; }

/* All rows up to the distance of one of them, and up to just less; and the nearest of those. */
static void check_within(vdb_database *db, const float *query, const pair *all, size_t passing,
                         vdb_query_options options) {
  vdb_answer *answer;
  for (int less = 0; less < 2; less++) {
    float radius = all[passing / 3].distance;
    if (less) radius = nextafterf(radius, -INFINITY);
    size_t expected = 0, asked = options.k;
    while (expected < passing && all[expected].distance <= radius) expected++;
    for (int limited = 0; limited < 2; limited++) {
      options.k = limited ? asked : 0;
      size_t wanted = limited && expected > asked ? asked : expected;
      CHECK(vdb_query_within(db, query, 1, radius, &options, &answer) == VDB_OK && answer->counts[0] == wanted);
      for (size_t i = 0; i < wanted; i++)
        CHECK(answer->distances[i] == all[i].distance && answer->indices[i] == all[i].row);
      for (size_t i = wanted; i < answer->k; i++) CHECK(answer->indices[i] == VDB_NO_INDEX);
      vdb_free_answer(answer);
    }
    options.k = asked;
  }
}

static void check_answers(vdb_database *db, const float *queries, size_t count, vdb_query_options options) {
  vdb_information information;
  vdb_answer *answer;
  CHECK(vdb_info(db, &information) == VDB_OK);
  CHECK(vdb_query(db, queries, count, &options, &answer) == VDB_OK);
  size_t dimensions = information.dimensions;
  float *vector = (float *)malloc(dimensions * sizeof(float));
  pair *all = (pair *)malloc((information.slots + 1) * sizeof(pair));
  for (size_t q = 0; q < count; q++) {
    size_t passing = 0;
    for (size_t row = 0; row < information.slots; row++) {
      if (vdb_read_vector(db, row, vector) != VDB_OK) continue;
      if (options.bitset && (row / 64 >= options.bitset_words || !(options.bitset[row / 64] >> row % 64 & 1))) continue;
      if (options.filter && !options.filter(row, options.filter_context)) continue;
      all[passing].distance = (float)oracle_distance(queries + q * dimensions, vector, dimensions, information.metric);
      all[passing++].row = row;
    }
    qsort(all, passing, sizeof(pair), by_distance);
    size_t expected = options.k < passing ? options.k : passing;
    CHECK(answer->counts[q] == expected);
    for (size_t i = 0; i < answer->k; i++) {
      size_t cell = q * answer->k + i;
      if (i < expected) {
        CHECK(answer->distances[cell] == all[i].distance);
        CHECK(answer->indices[cell] == all[i].row);
      } else {
        CHECK(answer->indices[cell] == VDB_NO_INDEX && answer->distances[cell] > 3.0e38f);
      }
    }
    if (passing && q < 3) check_within(db, queries + q * dimensions, all, passing, options);
  }
  free(all);
  free(vector);
  vdb_free_answer(answer);
}

/* kind 0: plain; 1: many equal rows and zero vectors; 2: magnitudes over the whole of float; 3: far from the origin;
 * 4: all of the magnitude `common`, so that distances leave float together and tie. */
static void make_vector(float *vector, size_t dimensions, int kind, vdb_storage storage, float common) {
  static const float few[4] = {-1.0f, 0.0f, 0.5f, 1.0f};
  float scale = kind == 4 ? common : 1.0f;
  int narrow = storage == VDB_STORAGE_F16;
  if (kind == 2) scale = (float)pow(2.0, (double)random_below(narrow ? 20 : 240) - (narrow ? 10.0 : 120.0));
  int zero = kind == 1 && random_below(8) == 0;
  for (size_t j = 0; j < dimensions; j++) {
    vector[j] = scale * random_float();
    if (kind == 1) vector[j] = zero ? 0.0f : few[(j == 0 ? random_below(4) : j) % 4];
    if (kind == 3) vector[j] = 100.0f + random_float() / 64.0f;
  }
}

static void check_case(vdb_metric metric, vdb_storage storage, size_t dimensions, size_t count, int kind, uint32_t threads) {
  vdb_options options = vdb_default_options();
  vdb_database *db;
  uint64_t remainder = 1, bitset[64];
  size_t queries = 1 + random_below(40);
  options.storage = storage;
  options.threads = threads;
  CHECK(vdb_new(dimensions, metric, &options, &db) == VDB_OK);
  float *vectors = (float *)malloc((count + queries) * dimensions * sizeof(float));
  float rows_scale = (float)pow(2.0, (double)random_below(140) - 70.0);
  float query_scale = (float)pow(2.0, (double)random_below(275) - 149.0);
  if (storage == VDB_STORAGE_F16) rows_scale = 1.0f;
  for (size_t i = 0; i < count + queries; i++)
    make_vector(vectors + i * dimensions, dimensions, kind, storage, i < count ? rows_scale : query_scale);
  float *asked = vectors + count * dimensions;
  if (count && kind != 4) memcpy(asked, vectors, dimensions * sizeof(float)); /* one query is a row */
  CHECK(vdb_add(db, vectors, count / 2, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  CHECK(vdb_add(db, vectors + count / 2 * dimensions, count - count / 2, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  vdb_query_options query = vdb_default_query_options(1 + random_below(12));
  check_answers(db, asked, queries, query);
  check_answers(db, asked, 1, query);
  for (size_t i = 0; i < count / 5; i++) vdb_remove_index(db, random_below(count));
  check_answers(db, asked, queries, query);
  query.filter = every_third;
  query.filter_context = &remainder;
  check_answers(db, asked, queries < 6 ? queries : 6, query);
  query.filter = NULL;
  uint64_t sparse = random_below(2) ? UINT64_MAX : 0; /* nearly all pass, or few */
  for (size_t i = 0; i < 64; i++) bitset[i] = random_bits() & (random_bits() | sparse) & (random_bits() | sparse);
  query.bitset = bitset;
  query.bitset_words = random_below(64);
  check_answers(db, asked, queries, query);
  query.bitset = NULL;
  query.k = count + 3;
  check_answers(db, asked, queries < 6 ? queries : 6, query);
  CHECK(vdb_compact(db) == VDB_OK);
  check_answers(db, asked, 5 < queries ? 5 : queries, query);
  free(vectors);
  vdb_destroy(db);
}

/* Dot products that float cannot hold are answered as 0 or infinity, and then the lower index wins. */
static void check_ties(vdb_storage storage, float rows_scale, float query_scale) {
  enum { rows = 300, queries = 20, dimensions = 16 };
  static float vectors[(rows + queries) * dimensions];
  vdb_options options = vdb_default_options();
  vdb_database *db;
  options.storage = storage;
  CHECK(vdb_new(dimensions, VDB_METRIC_DOT_PRODUCT, &options, &db) == VDB_OK);
  for (size_t i = 0; i < (rows + queries) * dimensions; i++)
    vectors[i] = random_float() * (i < rows * dimensions ? rows_scale : query_scale);
  CHECK(vdb_add(db, vectors, rows, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  check_answers(db, vectors + rows * dimensions, queries, vdb_default_query_options(10));
  check_answers(db, vectors + rows * dimensions, 1, vdb_default_query_options(10));
  vdb_destroy(db);
  float falling[3] = {3e10f, 2e10f, 1e10f}, asked = -3e38f;
  CHECK(vdb_new(1, VDB_METRIC_DOT_PRODUCT, &options, &db) == VDB_OK);
  CHECK(vdb_add(db, falling, 3, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  for (size_t k = 1; k <= 3; k++) check_answers(db, &asked, 1, vdb_default_query_options(k));
  vdb_destroy(db);
}

/* Differences of floats need more digits than a float has. */
static void check_differences(void) {
  float left[2] = {-1.0f, -1.0f}, right[2] = {16777216.0f, 16777216.0f};
  CHECK(vdb_euclidean_distance(left, right, 2) == (float)(16777217.0 * sqrt(2.0)));
  for (size_t round = 0; round < 2000; round++) {
    float a[128], b[128];
    double sum = 0.0;
    for (size_t j = 0; j < 128; j++) {
      a[j] = random_float(), b[j] = random_float();
      sum += ((double)a[j] - b[j]) * ((double)a[j] - b[j]);
    }
    double distance = sqrt(sum), got = vdb_euclidean_distance(a, b, 128);
    CHECK(fabs(got - distance) <= distance * 0.50001 / 8388608.0); /* half an ulp */
  }
}

int main(int argc, char **argv) {
  static const char *const names[] = {"plain", "avx2", "avx512", "amx", "neon"};
  size_t rounds = argc > 1 ? (size_t)atoi(argv[1]) : 40, sets = 0;
  for (size_t set = 0; set < 5; set++) {
    if (vdb_set_kernels(names[set]) != VDB_OK) continue;
    sets++;
    check_differences();
    for (int storage = 0; storage < 5; storage += 4) { /* f32 and f32 with codes */
      check_ties((vdb_storage)storage, 1e-17f, 1e-30f);
      check_ties((vdb_storage)storage, 1e-10f, 1e-38f);
      check_ties((vdb_storage)storage, 1e10f, 3e38f);
    }
    for (size_t round = 0; round < rounds; round++) {
      random_state = 1000 + round; /* the same cases for every kernel set */
      vdb_metric metric = (vdb_metric)random_below(3);
      vdb_storage storage = (vdb_storage)random_below(5);
      size_t dimensions = random_below(4) ? 1 + random_below(200) : 1 + random_below(1100);
      size_t count = random_below(3) ? random_below(600) : random_below(3000);
      if (count * dimensions > 300000) count = 300000 / dimensions;
      check_case(metric, storage, dimensions, count, (int)random_below(5), 1 + (uint32_t)random_below(3));
    }
    printf("%s ", names[set]);
  }
  CHECK(sets >= 1);
  CHECK(vdb_set_kernels("none such") == VDB_ERROR_NOT_FOUND);
  CHECK(vdb_set_kernels(NULL) == VDB_OK);
  puts("exact search equals the oracle");
  return 0;
}
