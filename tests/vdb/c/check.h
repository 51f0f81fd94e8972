/* What the C tests share: a check that prints where it failed and ends the program, and numbers from a seed. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);       \
      exit(1);                                                                      \
    }                                                                               \
  } while (0)

static uint64_t random_state = 88172645463325252u;

static inline uint64_t random_bits(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static inline size_t random_below(size_t limit) { return (size_t)(random_bits() % limit); }

/* Uniform in -1..1. */
static inline float random_float(void) { return (float)((double)(random_bits() >> 11) / 4503599627370496.0 - 1.0); }

#endif
