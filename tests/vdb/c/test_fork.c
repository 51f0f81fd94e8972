/* Children of fork() whose threads all search at once: the pool of the parent must become the child's own exactly once.
 * test_fork [children] */
#define _DEFAULT_SOURCE /* pthread_barrier_t, alarm */
#include "check.h"
#include "vdb.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { dimensions = 64, rows = 4096, most_threads = 8 };

static vdb_database *db;
static float queries[most_threads][dimensions];
static uint64_t expected[most_threads][3];
static pthread_barrier_t start;

static int search(size_t i) {
  vdb_query_options options = vdb_default_query_options(3);
  vdb_answer *answer;
  if (vdb_query(db, queries[i], 1, &options, &answer) != VDB_OK) return 0;
  int right = memcmp(answer->indices, expected[i], sizeof expected[i]) == 0;
  vdb_free_answer(answer);
  return right;
}

static void *searcher(void *argument) {
  size_t i = (size_t)argument;
  int right = 1;
  pthread_barrier_wait(&start);
  for (int turn = 0; turn < 3; turn++) right &= search(i);
  return right ? argument : (void *)most_threads;
}

static int child(size_t threads) {
  pthread_t thread[most_threads];
  int right = 1;
  alarm(5); /* a child that hangs is killed, and counts */
  pthread_barrier_init(&start, NULL, (unsigned)threads);
  for (size_t i = 0; i < threads; i++) CHECK(pthread_create(&thread[i], NULL, searcher, (void *)i) == 0);
  for (size_t i = 0; i < threads; i++) {
    void *got;
    pthread_join(thread[i], &got);
    right &= got == (void *)i;
  }
  vdb_destroy(db);
  return right ? 0 : 1;
}

int main(int argc, char **argv) {
  size_t children = argc > 1 ? (size_t)atoi(argv[1]) : 12000, wrong = 0, hung = 0, crashed = 0;
  vdb_options options = vdb_default_options();
  options.threads = 4;
  CHECK(vdb_new(dimensions, VDB_METRIC_EUCLIDEAN, &options, &db) == VDB_OK);
  float *vectors = (float *)malloc(sizeof(float) * rows * dimensions);
  for (size_t i = 0; i < rows * dimensions; i++) vectors[i] = random_float();
  CHECK(vdb_add(db, vectors, rows, NULL, VDB_ADD_ANY, NULL) == VDB_OK);
  for (size_t i = 0; i < most_threads; i++) {
    memcpy(queries[i], vectors + 100 * i * dimensions, sizeof queries[i]);
    vdb_query_options three = vdb_default_query_options(3);
    vdb_answer *answer;
    CHECK(vdb_query(db, queries[i], 1, &three, &answer) == VDB_OK); /* the parent's pool is running now */
    memcpy(expected[i], answer->indices, sizeof expected[i]);
    vdb_free_answer(answer);
  }
  for (size_t i = 0; i < children; i++) {
    pid_t process = fork();
    CHECK(process >= 0);
    if (!process) _exit(child(2 + i % (most_threads - 1)));
    int status;
    CHECK(waitpid(process, &status, 0) == process);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) hung++;
    else if (WIFSIGNALED(status)) crashed++;
    else wrong += WEXITSTATUS(status) != 0;
  }
  for (size_t i = 0; i < most_threads; i++) CHECK(search(i));
  vdb_destroy(db);
  free(vectors);
  printf("%zu children: %zu wrong, %zu hung, %zu crashed\n", children, wrong, hung, crashed);
  return wrong || hung || crashed;
}
