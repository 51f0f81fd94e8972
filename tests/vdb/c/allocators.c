/* One or two functions of an allocator are enough: -DOWN_MALLOC, -DOWN_FREE. With both, memory is marked, so that what
 * one allocator gave is never given to the other. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t taken, given;

static void *own_malloc(size_t size) {
  taken++;
#ifdef OWN_FREE
  unsigned char *memory = (unsigned char *)malloc(size + 16);
  if (!memory) return NULL;
  memcpy(memory, "octavo's memory", 16);
  return memory + 16;
#else
  return malloc(size);
#endif
}

static void own_free(void *pointer) {
  if (!pointer) return;
  given++;
#ifdef OWN_MALLOC
  unsigned char *memory = (unsigned char *)pointer - 16;
  if (memcmp(memory, "octavo's memory", 16) != 0) abort();
  free(memory);
#else
  free(pointer);
#endif
}

#ifdef OWN_MALLOC
#define VDB_MALLOC own_malloc
#endif
#ifdef OWN_FREE
#define VDB_FREE own_free
#endif
#include "vdb.h"

int main(void) {
  enum { dimensions = 8, rows = 3000 };
  float vector[dimensions];
  vdb_database *db = vdb_create(dimensions, VDB_METRIC_EUCLIDEAN);
  if (!db) return 1;
  for (int i = 0; i < rows; i++) {
    char id[16];
    snprintf(id, sizeof id, "row %d", i);
    for (int j = 0; j < dimensions; j++) vector[j] = (float)(i + j);
    if (vdb_add_vector(db, vector, id, id) != VDB_OK) return 2;
  }
  vdb_result_set *set = vdb_search(db, vector, 5);
  if (!set || strcmp(set->results[0].id, "row 2999") != 0) return 3;
  vdb_free_result_set(set);
  vdb_destroy(db);
#ifdef OWN_MALLOC
  if (!taken) return 4;
#else
  (void)own_malloc;
#endif
#ifdef OWN_FREE
  if (!given) return 5;
#else
  (void)own_free;
#endif
#if defined(OWN_MALLOC) && defined(OWN_FREE)
  if (taken != given) return 6;
#endif
  return 0;
}
