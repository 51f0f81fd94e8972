/* The graph: recall against the exact search, the same graph for every number of threads, removal, filters, and
 * databases that are degenerate or damaged. */
#include "check.h"
#include "vdb.h"

#ifndef ROWS
#define ROWS 4000
#endif
#define QUERIES 50

static uint64_t state = 1;

static float uniform(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (float)(state >> 40) / 16777216.0f - 0.5f;
}

/* Rows in clusters, of different norms: [count][dimensions]. */
static float *random_rows(size_t count, size_t dimensions, uint64_t seed) {
  float *rows = (float *)malloc(count * dimensions * sizeof(float)), centres[16][256];
  state = seed;
  for (size_t c = 0; c < 16; c++)
    for (size_t j = 0; j < dimensions; j++) centres[c][j] = uniform() * 2.0f;
  for (size_t i = 0; i < count; i++) {
    size_t cluster = (size_t)((uniform() + 0.5f) * 16.0f) & 15u;
    for (size_t j = 0; j < dimensions; j++) rows[i * dimensions + j] = centres[cluster][j] + uniform();
  }
  return rows;
}

static vdb_database *make(size_t dimensions, vdb_metric metric, vdb_storage storage, uint32_t threads) {
  vdb_options options = vdb_default_options();
  vdb_database *db;
  options.storage = storage;
  options.index = VDB_INDEX_HNSW;
  options.threads = threads;
  options.build_effort = 100;
  CHECK(vdb_new(dimensions, metric, &options, &db) == VDB_OK);
  return db;
}

static vdb_database *filled(const float *rows, size_t count, size_t dimensions, vdb_metric metric, vdb_storage storage,
                            uint32_t threads) {
  vdb_database *db = make(dimensions, metric, storage, threads);
  CHECK(vdb_add(db, rows, count, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  return db;
}

/* Share of the exact answer's distances that the graph's answer reaches. Checks the answer's form, too. */
static double recall(const vdb_database *db, const float *queries, size_t dimensions, vdb_query_options options) {
  size_t hits = 0, all = 0;
  for (size_t q = 0; q < QUERIES; q++) {
    vdb_answer *found, *exact;
    options.exact = 0;
    CHECK(vdb_query(db, queries + q * dimensions, 1, &options, &found) == VDB_OK);
    options.exact = 1;
    CHECK(vdb_query(db, queries + q * dimensions, 1, &options, &exact) == VDB_OK);
    CHECK(found->counts[0] == exact->counts[0]);
    for (size_t i = 0; i < exact->counts[0]; i++) {
      CHECK(found->indices[i] < db->slots && vdb_passes(db, &options, (size_t)found->indices[i]));
      CHECK(!i || found->distances[i - 1] < found->distances[i] ||
            (found->distances[i - 1] == found->distances[i] && found->indices[i - 1] < found->indices[i]));
      CHECK(found->distances[i] >= exact->distances[i]);
      hits += found->distances[i] <= exact->distances[exact->counts[0] - 1];
      all++;
    }
    vdb_free_answer(found);
    vdb_free_answer(exact);
  }
  return all ? (double)hits / (double)all : 1.0;
}

static size_t unreachable(const vdb_database *db) {
  uint32_t *queue = (uint32_t *)malloc((db->slots + 1) * sizeof *queue);
  vdb_walker *walker = vdb_take_walker(db, 1);
  size_t count = 0;
  vdb_start_walk(walker);
  if (db->graph.entry != VDB_NO_ROW) vdb_flood(db, db->graph.entry, queue, walker);
  for (size_t row = 0; row < db->slots; row++) count += vdb_is_live(db, row) && walker->visited[row] != walker->epoch;
  vdb_give_walker(db, walker);
  free(queue);
  return count;
}

/* No link leads to a row that is not there or to itself, and none is there twice. */
static void check_links(const vdb_database *db, int dead_allowed) {
  for (size_t row = 0; row < db->slots; row++) {
    if (!vdb_is_live(db, row)) continue;
    CHECK(vdb_levels_at(db, row) <= db->graph.top);
    for (uint32_t level = 0; level <= vdb_levels_at(db, row); level++) {
      const uint32_t *links = vdb_links_of(db, row, level);
      CHECK(links[0] <= vdb_most_links(db, level));
      for (size_t i = 1; i <= links[0]; i++) {
        CHECK(links[i] < db->slots && links[i] != row && (dead_allowed || vdb_is_live(db, links[i])));
        CHECK(vdb_levels_at(db, links[i]) >= level);
        for (size_t j = 1; j < i; j++) CHECK(links[j] != links[i]);
      }
    }
  }
}

static void same_graph(const vdb_database *a, const vdb_database *b) {
  CHECK(a->slots == b->slots && a->graph.entry == b->graph.entry && a->graph.top == b->graph.top);
  for (size_t row = 0; row < a->slots; row++) {
    CHECK(vdb_levels_at(a, row) == vdb_levels_at(b, row) && vdb_is_live(a, row) == vdb_is_live(b, row));
    for (uint32_t level = 0; vdb_is_live(a, row) && level <= vdb_levels_at(a, row); level++) {
      const uint32_t *x = vdb_links_of(a, row, level), *y = vdb_links_of(b, row, level);
      CHECK(x[0] == y[0] && memcmp(x, y, (1 + x[0]) * sizeof *x) == 0);
    }
  }
}

static void test_recall(void) {
  const size_t dimensions[] = {48, 64};
  for (size_t d = 0; d < 2; d++) {
    float *rows = random_rows(ROWS + QUERIES, dimensions[d], 7);
    for (int metric = 0; metric < 3; metric++) {
      for (int storage = 0; storage < 5; storage++) {
        vdb_database *db = filled(rows, ROWS, dimensions[d], (vdb_metric)metric, (vdb_storage)storage, 2);
        vdb_query_options options = vdb_default_query_options(10);
        options.effort = 100;
        double share = recall(db, rows + ROWS * dimensions[d], dimensions[d], options);
        printf("recall %zu dimensions, metric %d, storage %d: %.4f, unreachable %zu\n", dimensions[d], metric, storage,
               share, unreachable(db));
        CHECK(share > 0.95);
        CHECK(unreachable(db) == 0);
        check_links(db, 0);
        vdb_destroy(db);
      }
    }
    free(rows);
  }
}

static void test_threads(void) {
  float *rows = random_rows(ROWS, 32, 8);
  vdb_database *one = filled(rows, ROWS, 32, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32_I8, 1), *more[3];
  for (uint32_t i = 0; i < 3; i++) {
    more[i] = filled(rows, ROWS, 32, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32_I8, i + 2);
    same_graph(one, more[i]);
  }
  for (uint64_t row = 0; row < ROWS; row += 3) CHECK(vdb_remove_index(one, row) == VDB_OK);
  CHECK(one->free_count > 0);
  for (uint32_t i = 0; i < 3; i++) {
    for (uint64_t row = 0; row < ROWS; row += 3) CHECK(vdb_remove_index(more[i], row) == VDB_OK);
    same_graph(one, more[i]);
    vdb_destroy(more[i]);
  }
  vdb_destroy(one);
  free(rows);
}

static void test_removal(void) {
  const size_t d = 32;
  float *rows = random_rows(2 * ROWS + QUERIES, d, 9), *queries = rows + 2 * ROWS * d;
  vdb_database *db = filled(rows, ROWS, d, VDB_METRIC_COSINE, VDB_STORAGE_F32, 2);
  vdb_query_options options = vdb_default_query_options(10);
  options.effort = 100;
  for (size_t round = 0; round < 3; round++) {
    for (size_t i = 0; i < ROWS / 2; i++) { /* every second row, then reused */
      uint64_t row = (2 * i + round) % ROWS;
      if (vdb_is_live(db, row)) CHECK(vdb_remove_index(db, row) == VDB_OK);
    }
    check_links(db, 1);
    CHECK(recall(db, queries, d, options) > 0.95);
    CHECK(vdb_graph_sweep(db) == VDB_OK);
    check_links(db, 0);
    CHECK(db->slots - db->free_count == db->count && unreachable(db) == 0);
    CHECK(recall(db, queries, d, options) > 0.95);
    CHECK(vdb_add(db, rows + ROWS * d, ROWS - db->count, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
    CHECK(db->count == ROWS && db->slots == ROWS && db->free_count == 0);
    check_links(db, 0);
    CHECK(recall(db, queries, d, options) > 0.95);
  }
  for (uint64_t row = 0; row < ROWS; row += 4) CHECK(vdb_remove_index(db, row) == VDB_OK);
  CHECK(vdb_compact(db) == VDB_OK && db->slots == db->count);
  check_links(db, 0);
  CHECK(unreachable(db) == 0 && recall(db, queries, d, options) > 0.95);
  CHECK(vdb_add(db, rows, ROWS, NULL, VDB_ADD_ANY, NULL) == VDB_OK); /* duplicates of most */
  check_links(db, 0);
  CHECK(recall(db, queries, d, options) > 0.95);
  for (uint64_t row = db->slots; row-- > 0;) CHECK(vdb_remove_index(db, row) == VDB_OK);
  CHECK(db->count == 0 && db->graph.entry == VDB_NO_ROW);
  CHECK(vdb_add(db, rows, 300, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  CHECK(unreachable(db) == 0);
  vdb_destroy(db);
  free(rows);
}

/* A whole cluster, in the order of rows, goes. */
static void test_cluster_removed(void) {
  const size_t d = 16;
  float *rows = random_rows(ROWS + QUERIES, d, 10);
  for (size_t i = 0; i < ROWS; i++) rows[i * d] += 20.0f * (float)(i * 8 / ROWS);
  vdb_database *db = filled(rows, ROWS, d, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32, 2);
  vdb_query_options options = vdb_default_query_options(10);
  CHECK(unreachable(db) == 0);
  for (uint64_t row = ROWS / 4; row < ROWS * 3 / 4; row++) CHECK(vdb_remove_index(db, row) == VDB_OK);
  CHECK(vdb_graph_sweep(db) == VDB_OK && unreachable(db) == 0);
  check_links(db, 0);
  CHECK(recall(db, rows, d, options) > 0.95);
  CHECK(recall(db, rows + (ROWS - QUERIES) * d, d, options) > 0.95);
  vdb_destroy(db);
  free(rows);
}

static int every(uint64_t index, void *context) { return index % *(const uint64_t *)context == 0; }

static void test_filters(void) {
  const size_t d = 32;
  const uint64_t steps[] = {100, 10, 2, 1, 1000000007};
  float *rows = random_rows(ROWS + QUERIES, d, 11), *queries = rows + ROWS * d;
  vdb_database *db = filled(rows, ROWS, d, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32_I8, 1);
  uint64_t bits[ROWS / 64 + 1];
  for (size_t s = 0; s < 5; s++) {
    uint64_t step = steps[s];
    vdb_query_options options = vdb_default_query_options(10);
    options.filter = every;
    options.filter_context = &step;
    CHECK(recall(db, queries, d, options) > 0.93);
    memset(bits, 0, sizeof bits);
    for (size_t i = 0; i < ROWS; i++) bits[i / 64] |= (uint64_t)(i % step == 0) << (i % 64);
    options.bitset = bits;
    options.bitset_words = ROWS / 64 + 1;
    CHECK(recall(db, queries, d, options) > 0.93);
    options.filter = NULL;
    CHECK(recall(db, queries, d, options) > 0.93);
    for (size_t i = 0; i <= ROWS / 64; i++) bits[i] = ~bits[i]; /* 99%, 90%, 50%, none */
    CHECK(recall(db, queries, d, options) > 0.93);
    options.bitset_words = 5; /* rows past the end are out */
    CHECK(recall(db, queries, d, options) > 0.93);
    options.bitset_words = 0;
    CHECK(recall(db, queries, d, options) == 1.0);
  }
  vdb_query_options all = vdb_default_query_options(ROWS + 5);
  CHECK(recall(db, queries, d, all) == 1.0);
  vdb_destroy(db);
  free(rows);
}

/* A walk over rows that pass finds most of the nearest; where they all are far from the query it says so. */
static void test_bridged(void) {
  const size_t d = 32, effort = 80, k = 10;
  float *rows = random_rows(ROWS + QUERIES, d, 15);
  vdb_database *db = filled(rows, ROWS, d, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32_I8, 1);
  vdb_query_options options = vdb_default_query_options(k), exactly = options;
  vdb_walker *walker = vdb_take_walker(db, effort + 1);
  unsigned char *memory = (unsigned char *)vdb_aligned_alloc(vdb_question_bytes(db) + VDB_ALIGNMENT);
  uint64_t bits[ROWS / 64 + 1];
  options.bitset = exactly.bitset = bits;
  options.bitset_words = exactly.bitset_words = ROWS / 64 + 1;
  exactly.exact = 1;
  for (size_t step = 3; step <= 10; step += 7) {
    size_t hits = 0, given_up = 0;
    memset(bits, 0, sizeof bits);
    for (size_t i = 0; i < ROWS; i += step) bits[i / 64] |= (uint64_t)1 << i % 64;
    for (size_t q = 0; q < QUERIES; q++) {
      const float *query = rows + (ROWS + q) * d;
      vdb_question question;
      vdb_answer *exact;
      vdb_ask(db, query, memory, &question);
      vdb_aim aim = vdb_aim_at_question(db, &question, 1);
      vdb_near start = vdb_approach(db, &aim, 0, walker);
      size_t count = vdb_walk_passing(db, &aim, &options, start, 1.0 / (double)step, effort, walker);
      given_up += count == 0;
      CHECK(vdb_query(db, query, 1, &exactly, &exact) == VDB_OK);
      for (size_t i = 0; i < count; i++) {
        uint32_t row = walker->pool[i].row;
        CHECK(row == start.row || row % step == 0);
        for (size_t j = 0; j < exact->counts[0]; j++) hits += exact->indices[j] == row;
      }
      vdb_free_answer(exact);
    }
    printf("bridged, one row in %zu: %.3f\n", step, (double)hits / (double)(QUERIES * k));
    CHECK((double)hits > 0.93 * (double)((QUERIES - given_up) * k) && given_up < QUERIES / 10);
  }
  vdb_give_walker(db, walker);
  vdb_destroy(db);
  for (size_t i = 0; i < ROWS; i++) rows[i * d] += 100.0f * (float)(i * 8 / ROWS);
  db = filled(rows, ROWS, d, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32_I8, 1);
  walker = vdb_take_walker(db, effort + 1);
  memset(bits, 0, sizeof bits);
  for (size_t i = ROWS / 8 * 7 + 8; i < ROWS; i++) bits[i / 64] |= (uint64_t)1 << i % 64;
  vdb_question question;
  vdb_ask(db, rows, memory, &question);
  vdb_aim aim = vdb_aim_at_question(db, &question, 1);
  CHECK(vdb_walk_passing(db, &aim, &options, vdb_approach(db, &aim, 0, walker), 0.125, effort, walker) < effort);
  options.effort = 4; /* few enough for a walk among so few rows */
  CHECK(recall(db, rows, d, options) == 1.0);
  vdb_give_walker(db, walker);
  vdb_aligned_free(memory);
  vdb_destroy(db);
  free(rows);
}

static void test_degenerate(void) {
  const size_t d = 8;
  float *rows = (float *)calloc(ROWS * d, sizeof(float)), query[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float queries[QUERIES * 8];
  for (size_t i = 0; i < QUERIES; i++) memcpy(queries + i * d, query, sizeof query);
  for (int kind = 0; kind < 4; kind++) { /* zeros; all rows equal; a few different rows; of every magnitude */
    for (size_t i = 0; i < ROWS * d && kind; i++)
      rows[i] = kind == 1 ? 1.5f : kind == 2 ? (float)((i / d * 7919) % 5 * (i % d)) : ldexpf(uniform(), (int)(i / d % 230) - 115);
    for (int metric = 0; metric < 3; metric++) {
      for (int storage = 0; storage < 5; storage++) {
        if (kind == 3 && storage != VDB_STORAGE_F32 && storage != VDB_STORAGE_F32_I8) continue;
        vdb_database *db = make(d, (vdb_metric)metric, (vdb_storage)storage, 2);
        vdb_query_options options = vdb_default_query_options(5);
        CHECK(recall(db, queries, d, options) == 1.0); /* empty */
        CHECK(vdb_add(db, rows, 1, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
        CHECK(recall(db, queries, d, options) == 1.0);
        CHECK(vdb_add(db, rows + d, ROWS - 1, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
        check_links(db, 0);
        CHECK(unreachable(db) == 0);
        double share = recall(db, queries, d, options);
        if (kind == 1 || kind == 2 || share < 0.9) printf("degenerate %d metric %d storage %d: %.3f\n", kind, metric, storage, share);
        CHECK(kind > 1 || share == 1.0);
        vdb_destroy(db);
      }
    }
  }
  free(rows);
}

/* Rows one at a time make a graph as good. */
static void test_single(void) {
  const size_t d = 24;
  float *rows = random_rows(ROWS + QUERIES, d, 12);
  vdb_database *db = make(d, VDB_METRIC_COSINE, VDB_STORAGE_F32_I8, 2);
  vdb_query_options options = vdb_default_query_options(10);
  for (size_t i = 0; i < ROWS; i++) CHECK(vdb_add(db, rows + i * d, 1, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  check_links(db, 0);
  printf("single: unreachable %zu\n", unreachable(db));
  CHECK(recall(db, rows + ROWS * d, d, options) > 0.95);
  vdb_destroy(db);
  free(rows);
}

/* Says stop when that many rows are in. */
static int patient(size_t done, size_t count, void *context) {
  CHECK(done <= count);
  return done < *(size_t *)context;
}

/* A stopped insertion has added nothing, and what comes later finds its place. */
static void test_stopped(void) {
  const size_t d = 24;
  float *rows = random_rows(2 * ROWS + QUERIES, d, 15), *queries = rows + 2 * ROWS * d;
  vdb_record *records = (vdb_record *)calloc(2 * ROWS, sizeof(vdb_record));
  vdb_query_options options = vdb_default_query_options(10);
  for (size_t i = 0; i < 2 * ROWS; i++) records[i].id = i == 1700 ? "late" : NULL, records[i].metadata = "m", records[i].metadata_size = 1;
  for (uint32_t threads = 1; threads <= 3; threads += 2) {
    vdb_database *db = make(d, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32, threads);
    for (size_t turn = 0; turn < 5; turn++) {
      size_t left = turn * 256; /* batches have 512 rows */
      vdb_error error = vdb_add_watched(db, rows, ROWS, records, VDB_ADD_UNIQUE, NULL, patient, &left);
      CHECK(error == VDB_ERROR_INTERRUPTED && vdb_count(db) == 0);
      check_links(db, 0);
    }
    CHECK(db->slots <= 3 * ROWS); /* places are used again */
    CHECK(vdb_add(db, rows, ROWS, records, VDB_ADD_UNIQUE, NULL) == VDB_OK && vdb_count(db) == ROWS);
    for (size_t turn = 0; turn < 5; turn++) {
      size_t left = turn * 256; /* batches have 512 rows */
      uint64_t found;
      CHECK(vdb_add_watched(db, rows + ROWS * d, ROWS, records + ROWS, VDB_ADD_REPLACE, NULL, patient, &left) ==
            VDB_ERROR_INTERRUPTED);
      CHECK(vdb_count(db) == ROWS && vdb_find(db, "late", &found) == (ROWS > 1700 ? VDB_OK : VDB_ERROR_NOT_FOUND));
      CHECK(unreachable(db) == 0 && recall(db, queries, d, options) > 0.95);
    }
    CHECK(vdb_add(db, rows + ROWS * d, ROWS, records + ROWS, VDB_ADD_REPLACE, NULL) == VDB_OK);
    check_links(db, 1);
    CHECK(vdb_count(db) == 2 * ROWS && unreachable(db) == 0 && recall(db, queries, d, options) > 0.95);
    CHECK(vdb_compact(db) == VDB_OK && unreachable(db) == 0 && recall(db, queries, d, options) > 0.95);
    vdb_destroy(db);
  }
  free(records);
  free(rows);
}

/* Rows taken out of the middle: later ones move down, and the graph with them. */
static void test_gaps(void) {
  const size_t d = 24;
  float *rows = random_rows(ROWS + QUERIES, d, 16), vector[24];
  vdb_database *db = filled(rows, ROWS, d, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32_I8, 2);
  vdb_query_options options = vdb_default_query_options(10);
  size_t *from = (size_t *)malloc(ROWS * sizeof(size_t)), slots = ROWS; /* the row that each place had first */
  char *live = (char *)malloc(ROWS);
  for (size_t i = 0; i < ROWS; i++) from[i] = i, live[i] = 1;
  for (size_t turn = 0; turn < 60; turn++) {
    size_t gone = (size_t)fabsf(uniform() * 1.0e6f) % slots;
    if (!live[gone]) continue;
    if (turn % 2) {
      CHECK(vdb_remove_index(db, gone) == VDB_OK);
      live[gone] = 0;
      continue;
    }
    CHECK(vdb_remove_vector(db, gone) == VDB_OK);
    slots--;
    memmove(from + gone, from + gone + 1, (slots - gone) * sizeof *from);
    memmove(live + gone, live + gone + 1, slots - gone);
    check_links(db, 0);
  }
  CHECK(db->slots == slots);
  for (size_t i = 0; i < slots; i++) {
    CHECK(vdb_read_vector(db, i, vector) == (live[i] ? VDB_OK : VDB_ERROR_INVALID_INDEX));
    if (live[i]) CHECK(memcmp(vector, rows + from[i] * d, sizeof vector) == 0);
  }
  CHECK(unreachable(db) == 0 && recall(db, rows + ROWS * d, d, options) > 0.95);
  CHECK(vdb_add(db, rows, 100, NULL, VDB_ADD_ANY, NULL) == VDB_OK && recall(db, rows + ROWS * d, d, options) > 0.95);
  vdb_destroy(db);
  free(from);
  free(live);
  free(rows);
}

/* Many questions on several threads: the answers of one. */
static void test_batch(void) {
  const size_t d = 40;
  float *rows = random_rows(ROWS + 300, d, 14), *queries = rows + ROWS * d;
  vdb_database *db = filled(rows, ROWS, d, VDB_METRIC_EUCLIDEAN, VDB_STORAGE_F32_I8, 4);
  uint64_t step = 3;
  vdb_query_options options = vdb_default_query_options(10);
  for (int filtered = 0; filtered < 2; filtered++) {
    vdb_answer *one, *more;
    if (filtered) options.filter = every, options.filter_context = &step;
    CHECK(vdb_set_threads(db, 4) == VDB_OK && vdb_query(db, queries, 300, &options, &more) == VDB_OK);
    CHECK(vdb_set_threads(db, 1) == VDB_OK && vdb_query(db, queries, 300, &options, &one) == VDB_OK);
    CHECK(memcmp(one->indices, more->indices, 3000 * sizeof(uint64_t)) == 0);
    CHECK(memcmp(one->distances, more->distances, 3000 * sizeof(float)) == 0);
    vdb_free_answer(one);
    vdb_free_answer(more);
  }
  vdb_destroy(db);
  free(rows);
}

/* Whatever the links say, a search ends and answers rows. */
static void test_damaged(void) {
  const size_t d = 16;
  float *rows = random_rows(ROWS + QUERIES, d, 13), *queries = rows + ROWS * d;
  vdb_database *db = filled(rows, ROWS, d, VDB_METRIC_COSINE, VDB_STORAGE_F32_I8, 1);
  vdb_graph kept = db->graph;
  for (int kind = 0; kind < 6; kind++) {
    for (size_t i = 0; i < ROWS && kind < 3; i++)
      for (size_t j = 0; j < vdb_link_stride(db); j++) {
        uint32_t noise = (uint32_t)(uniform() * 4.0e9f);
        vdb_links_at(db, i)[j] = kind == 0 ? noise : kind == 1 ? noise % (ROWS + 100) : 0xffffffffu;
      }
    for (size_t i = 1; i < db->graph.towers_size && kind == 3; i++) db->graph.towers[i] = (uint32_t)(uniform() * 4.0e9f) % (ROWS + 9);
    for (size_t i = 0; i < ROWS && kind == 4; i++) db->graph.tower_of[i] = (uint32_t)(uniform() * 4.0e9f) % (uint32_t)(kept.towers_size + 50);
    if (kind == 5) db->graph.entry = ROWS - 1, db->graph.top = 0xfffffff0u;
    vdb_query_options options = vdb_default_query_options(10);
    for (size_t q = 0; q < QUERIES; q++) {
      vdb_answer *found;
      CHECK(vdb_query(db, queries + q * d, 1, &options, &found) == VDB_OK);
      CHECK(found->counts[0] == 10);
      vdb_free_answer(found);
    }
  }
  vdb_destroy(db);
  free(rows);
}

int main(int count, char **names) {
  (void)names;
  if (count < 2) test_recall();
  test_threads();
  test_removal();
  test_cluster_removed();
  test_filters();
  test_bridged();
  test_degenerate();
  test_single();
  test_stopped();
  test_gaps();
  test_batch();
  test_damaged();
  printf("ok\n");
  return 0;
}
