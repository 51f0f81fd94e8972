/* Many readers beside one writer, for the thread sanitizer: answers are always true of some moment. */
#ifndef VDB_MULTITHREADED
#define VDB_MULTITHREADED
#endif
#define _DEFAULT_SOURCE /* usleep */
#include "check.h"
#include "vdb.h"

#include <unistd.h>

enum { dimensions = 16, readers = 3, steps = 400 };

typedef struct {
  vdb_database *db;
  int stop;
} shared;

/* Every row is (key, key, ...), so an answer can be checked without knowing what is there. */
static void *read_rows(void *argument) {
  shared *state = (shared *)argument;
  float query[8 * dimensions];
  unsigned turn = 0;
  while (!__atomic_load_n(&state->stop, __ATOMIC_ACQUIRE)) {
    vdb_query_options options = vdb_default_query_options(5);
    vdb_answer *answer;
    for (size_t j = 0; j < 8 * dimensions; j++) query[j] = (float)(turn % 50);
    options.with_ids = options.with_metadata = 1;
    options.exact = turn % 2;
    CHECK(vdb_query(state->db, query, turn % 3 ? 1 : 8, &options, &answer) == VDB_OK);
    for (size_t i = 0; i < answer->counts[0]; i++) {
      CHECK(answer->ids[i] && answer->metadata_sizes[i] == sizeof(int));
      int key;
      memcpy(&key, answer->metadata[i], sizeof key);
      CHECK(atoi(answer->ids[i]) == key);
      CHECK(fabsf(answer->distances[i] - 4.0f * fabsf((float)key - query[0])) < 1e-3f);
    }
    vdb_free_answer(answer);
    turn++;
  }
  return NULL;
}

static void check_index(vdb_index index, const char *path) {
  vdb_options options = vdb_default_options();
  shared state = {NULL, 0};
  pthread_t threads[readers];
  options.index = index;
  options.threads = 2;
  options.links = 8;
  options.build_effort = 40;
  options.storage = VDB_STORAGE_F32_I8;
  CHECK(vdb_new(dimensions, VDB_METRIC_EUCLIDEAN, &options, &state.db) == VDB_OK);
  for (int i = 0; i < readers; i++) CHECK(pthread_create(&threads[i], NULL, read_rows, &state) == 0);
  for (int step = 0; step < steps; step++) {
    float vectors[20][dimensions];
    char ids[20][16];
    int keys[20];
    vdb_record records[20] = {{0}};
    for (int i = 0; i < 20; i++) {
      keys[i] = (step * 20 + i) % 1000;
      for (size_t j = 0; j < dimensions; j++) vectors[i][j] = (float)keys[i];
      snprintf(ids[i], sizeof ids[i], "%d", keys[i]);
      records[i].id = ids[i];
      records[i].metadata = &keys[i];
      records[i].metadata_size = sizeof(int);
    }
    CHECK(vdb_add(state.db, vectors[0], 20, records, VDB_ADD_REPLACE, NULL) == VDB_OK);
    if (step % 7 == 0) vdb_remove_id(state.db, ids[3], NULL);
    if (step % 50 == 49) CHECK(vdb_compact(state.db) == VDB_OK);
    if (step % 100 == 99) CHECK(vdb_save(state.db, path) == VDB_OK);
    if (step % 120 == 119) CHECK(vdb_set_threads(state.db, 1 + (uint32_t)step % 3) == VDB_OK);
  }
  __atomic_store_n(&state.stop, 1, __ATOMIC_RELEASE);
  for (int i = 0; i < readers; i++) pthread_join(threads[i], NULL);
  vdb_destroy(state.db);
  CHECK(unlink(path) == 0);
}

typedef struct {
  vdb_database *db;
  size_t answered;
  int stop;
} watch;

static void *keep_asking(void *argument) {
  watch *state = (watch *)argument;
  float query[dimensions] = {0};
  vdb_query_options options = vdb_default_query_options(1);
  vdb_answer *answer;
  while (!__atomic_load_n(&state->stop, __ATOMIC_ACQUIRE)) {
    CHECK(vdb_query(state->db, query, 1, &options, &answer) == VDB_OK);
    vdb_free_answer(answer);
    __atomic_add_fetch(&state->answered, 1, __ATOMIC_ACQ_REL);
  }
  return NULL;
}

/* A large addition to a graph lets searches in between. */
static void check_searching_while_adding(void) {
  enum { rows = 4000 };
  static float vectors[rows][dimensions];
  vdb_options options = vdb_default_options();
  watch state = {NULL, 0, 0};
  pthread_t thread;
  options.index = VDB_INDEX_HNSW;
  options.threads = 2;
  CHECK(vdb_new(dimensions, VDB_METRIC_COSINE, &options, &state.db) == VDB_OK);
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < dimensions; j++) vectors[i][j] = random_float();
  CHECK(vdb_add(state.db, vectors[0], 10, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  CHECK(pthread_create(&thread, NULL, keep_asking, &state) == 0);
  while (!__atomic_load_n(&state.answered, __ATOMIC_ACQUIRE)) usleep(1000);
  size_t before = __atomic_load_n(&state.answered, __ATOMIC_ACQUIRE);
  CHECK(vdb_add(state.db, vectors[0], rows, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  size_t during = __atomic_load_n(&state.answered, __ATOMIC_ACQUIRE) - before;
  __atomic_store_n(&state.stop, 1, __ATOMIC_RELEASE);
  pthread_join(thread, NULL);
  CHECK(during > 20);
  vdb_destroy(state.db);
}

int main(int argc, char **argv) {
  const char *path = argc > 1 ? argv[1] : "threads.vdb";
  check_index(VDB_INDEX_FLAT, path);
  check_index(VDB_INDEX_HNSW, path);
  check_searching_while_adding();
  puts("readers beside a writer");
  return 0;
}
