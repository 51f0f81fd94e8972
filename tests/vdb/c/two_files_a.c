/* A program of two files: this one only declares. */
#define VDB_DECLARATIONS_ONLY
#include "vdb.h"

int main(void) {
  float vector[2] = {1.0f, 0.0f};
  vdb_database *db = vdb_create(2, VDB_METRIC_COSINE);
  if (!db || vdb_add_vector(db, vector, "one", 0) != VDB_OK) return 1;
  vdb_result_set *set = vdb_search(db, vector, 1);
  int wrong = !set || set->count != 1 || set->results[0].distance != 0.0f;
  vdb_free_result_set(set);
  vdb_destroy(db);
  return wrong;
}
