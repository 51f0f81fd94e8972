/* A program with functions of its own that are called like the system's, which declares first and implements later. */
#define VDB_DECLARATIONS_ONLY
#include "vdb.h"

static int calls;
static void link(void) { calls++; }
static void unlink(void) { calls++; }
static void read(void) { calls++; }
static void write(void) { calls++; }
static void close(void) { calls++; }
static void access(void) { calls++; }
static void pause(void) { calls++; }

#define VDB_IMPLEMENTATION
#include "vdb.h"

int main(int count, char **arguments) {
  float vector[2] = {1.0f, 0.0f};
  vdb_database *db = vdb_create(2, VDB_METRIC_COSINE);
  link(), unlink(), read(), write(), close(), access(), pause();
  if (count < 2 || !db || vdb_add_vector(db, vector, "one", 0) != VDB_OK || vdb_save(db, arguments[1]) != VDB_OK) return 1;
  vdb_destroy(db);
  db = vdb_load(arguments[1]);
  if (!db || vdb_count(db) != 1 || vdb_save_as(db, arguments[1], VDB_SAVE_SAME) != VDB_OK) return 2;
  vdb_destroy(db);
  return calls == 7 ? 0 : 3;
}
