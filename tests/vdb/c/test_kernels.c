/* Every kernel set of this machine against plain sums in double, on random shapes: all elements, odd sizes, magnitudes
 * up to 2^50 and down to 2^-50, cancellation. Memory is exactly as long as the contract says, so that the address
 * sanitizer sees what reads further. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* posix_memalign */
#endif
#define VDB_IMPLEMENTATION
#include "vdb.h"

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);      \
      fprintf(stderr, __VA_ARGS__);                                        \
      fputc('\n', stderr);                                                 \
      exit(1);                                                             \
    }                                                                      \
  } while (0)

static const char *const set_names[] = {"plain", "avx2", "avx512", "amx", "neon"};
static const char *const element_names[] = {"f32", "f16", "bf16", "i8"};
static const vdb_kernel_set *sets[5];
static int set_count;

static uint64_t random_state = 88172645463325252u;
static uint32_t random_bits(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)(random_state >> 16);
}
static size_t random_below(size_t n) { return random_bits() % n; }
static float random_unit(void) { return (float)((double)random_bits() / 2147483648.0 - 1.0); }

static void *allocate(size_t bytes) {
  void *p = NULL;
  CHECK(posix_memalign(&p, 64, bytes ? bytes : 1) == 0, "out of memory");
  return p;
}

/* -ffast-math takes subnormal products for zero: there, smaller exponents. */
#ifdef __FAST_MATH__
#define EXPONENTS 20
#else
#define EXPONENTS 50
#endif

static int random_exponent(void) {
  return random_below(2) ? 0 : (int)random_below(2 * EXPONENTS + 1) - EXPONENTS;
}

/* How the numbers of a vector are spread. */
enum { EVEN, ONE_SIGN, WIDE, SPARSE, KINDS };

static void fill(float *values, size_t count, int kind, int exponent) {
  for (size_t j = 0; j < count; j++) {
    float value = random_unit();
    if (kind == ONE_SIGN) value = fabsf(value) * 0.1f + 0.9f;
    if (kind == WIDE) value = ldexpf(value, -(int)random_below(30));
    if (kind == SPARSE && random_below(8)) value = 0.0f;
    values[j] = ldexpf(value, exponent);
  }
  values[count / 2] = ldexpf(random_below(2) ? 1.0f : -1.0f, exponent); /* no norm below 2^-60 */
}

typedef struct {
  vdb_element element;
  size_t count, dimensions;
  float **queries; /* [queries], padded */
  size_t query_count;
  unsigned char *rows; /* 64 bytes of NaN follow */
  double *values;      /* [count][dimensions] of the rows, as kept */
  const void **pointers;
} problem;

static size_t size_of(vdb_element element) { return element == VDB_F32 ? 4 : element == VDB_I8 ? 1 : 2; }

static double value_of(vdb_element element, const void *p) {
  uint16_t half;
  float single;
  if (element == VDB_I8) return *(const int8_t *)p;
  if (element == VDB_F32) return memcpy(&single, p, 4), (double)single;
  memcpy(&half, p, 2);
  return element == VDB_F16 ? (double)vdb_from_f16(half) : (double)vdb_from_bf16(half);
}

static problem make_problem(vdb_element element, size_t count, size_t dimensions, size_t queries) {
  problem p = {element, count, dimensions, NULL, queries, NULL, NULL, NULL};
  size_t padded = vdb_round_up(dimensions, VDB_PAD), size = size_of(element);
  float *row = (float *)allocate(dimensions * sizeof(float));
  p.queries = (float **)allocate(queries * sizeof(float *));
  for (size_t q = 0; q < queries; q++) {
    p.queries[q] = (float *)allocate(padded * sizeof(float));
    memset(p.queries[q], 0, padded * sizeof(float));
    fill(p.queries[q], dimensions, (int)random_below(KINDS), random_exponent());
  }
  p.rows = (unsigned char *)allocate(count * dimensions * size + VDB_ALIGNMENT);
  p.values = (double *)allocate(count * dimensions * sizeof(double));
  p.pointers = (const void **)allocate(count * sizeof(void *));
  memset(p.rows, 0xff, count * dimensions * size + VDB_ALIGNMENT);
  for (size_t r = 0; r < count; r++) {
    unsigned char *to = p.rows + r * dimensions * size;
    int exponent = random_exponent();
    fill(row, dimensions, (int)random_below(KINDS), element == VDB_F16 ? exponent / 8 : exponent);
    if (element != VDB_I8 && element != VDB_F16 && random_below(4) == 0) { /* all but orthogonal to a query */
      const float *q = p.queries[random_below(queries)];
      for (size_t j = 0; j + 1 < dimensions; j += 2) {
        float ratio = q[j + 1] != 0.0f ? q[j] / q[j + 1] : 0.0f;
        if (fabsf(ratio) < 1000.0f) row[j + 1] = -row[j] * ratio;
      }
    }
    if (element == VDB_F32) memcpy(to, row, dimensions * 4);
    if (element == VDB_I8) vdb_to_i8(row, dimensions, (int8_t *)to);
    for (size_t j = 0; j < dimensions && size == 2; j++) {
      uint16_t half = element == VDB_F16 ? vdb_to_f16(row[j]) : vdb_to_bf16(row[j]);
      memcpy(to + 2 * j, &half, 2);
    }
    for (size_t j = 0; j < dimensions; j++) p.values[r * dimensions + j] = value_of(element, to + j * size);
    p.pointers[r] = to;
  }
  free(row);
  return p;
}

static void free_problem(problem *p) {
  for (size_t q = 0; q < p->query_count; q++) free(p->queries[q]);
  free(p->queries);
  free(p->rows);
  free(p->values);
  free((void *)p->pointers);
}

static double dot_of(const float *q, const double *x, size_t n) {
  double sum = 0.0;
  for (size_t j = 0; j < n; j++) sum += (double)q[j] * x[j];
  return sum;
}

static double square_of(const float *q, const double *x, size_t n) {
  double sum = 0.0;
  for (size_t j = 0; j < n; j++) sum += ((double)q[j] - x[j]) * ((double)q[j] - x[j]);
  return sum;
}

static double norm_of(const double *x, size_t n) {
  double sum = 0.0;
  for (size_t j = 0; j < n; j++) sum += x[j] * x[j];
  return sqrt(sum);
}

static double norm_of_query(const float *q, size_t n) {
  double sum = 0.0;
  for (size_t j = 0; j < n; j++) sum += (double)q[j] * (double)q[j];
  return sqrt(sum);
}

static void test_scans(const vdb_kernel_set *set, problem *p) {
  const float *q = p->queries[0];
  float *out = (float *)allocate(p->count * sizeof(float));
  for (int squares = 0; squares < 2; squares++) {
    (squares ? set->squares : set->dots)[p->element](q, p->pointers, p->count, p->dimensions, out);
    for (size_t r = 0; r < p->count; r++) {
      const double *x = p->values + r * p->dimensions;
      double exact = squares ? square_of(q, x, p->dimensions) : dot_of(q, x, p->dimensions);
      double bound = (double)vdb_rounding(p->dimensions) *
                     (squares ? exact : norm_of_query(q, p->dimensions) * norm_of(x, p->dimensions));
      CHECK(fabs((double)out[r] - exact) <= bound, "%s %s squares %d dims %zu row %zu: %g, exact %g, bound %g", set->name,
            element_names[p->element], squares, p->dimensions, r, (double)out[r], exact, bound);
    }
  }
  free(out);
}

static void test_codes_scan(const vdb_kernel_set *set, problem *p, int extreme) {
  size_t padded = vdb_round_up(p->dimensions, VDB_PAD);
  int8_t *high = (int8_t *)allocate(padded), *low = (int8_t *)allocate(padded);
  float *out = (float *)allocate(p->count * sizeof(float));
  vdb_probe probe = {p->queries[0], high, low, 0.75f, 0.75f / 256.0f, 0, 0};
  memset(high, 0, padded);
  memset(low, 0, padded);
  for (size_t j = 0; j < p->dimensions; j++) {
    probe.high_sum += high[j] = (int8_t)(extreme ? 127 * extreme : (int)random_below(255) - 127);
    probe.low_sum += low[j] = (int8_t)(extreme ? 127 : (int)random_below(255) - 127);
  }
  set->dots_i8(&probe, p->pointers, p->count, p->dimensions, out);
  for (size_t r = 0; r < p->count; r++) {
    int64_t a = 0, b = 0;
    for (size_t j = 0; j < p->dimensions; j++) {
      a += high[j] * (int64_t)p->values[r * p->dimensions + j];
      b += low[j] * (int64_t)p->values[r * p->dimensions + j];
    }
    double exact = 0.75 * (double)a + 0.75 / 256.0 * (double)b;
    double bound = (0.75 * fabs((double)a) + 0.75 / 256.0 * fabs((double)b)) * 2.5e-7;
    CHECK(fabs((double)out[r] - exact) <= bound, "%s dims %zu row %zu: %.9g, exact %.9g", set->name, p->dimensions, r,
          (double)out[r], exact);
  }
  free(high);
  free(low);
  free(out);
}

static void test_tile(const vdb_kernel_set *set, problem *p) {
  const size_t width = vdb_round_up(p->query_count, 16), n = p->dimensions;
  const size_t panel_bytes = set->panel_bytes(p->element, width, n), scratch_bytes = vdb_tile_scratch(n);
  const size_t score_bytes = p->count * width * sizeof(float);
  vdb_panel panel = {p->query_count, width, -1.0f, (float *)allocate(width * sizeof(float)), NULL};
  unsigned char *data = (unsigned char *)allocate(panel_bytes + 64), *scores = (unsigned char *)allocate(score_bytes + 64);
  unsigned char *scratch = (unsigned char *)allocate(scratch_bytes + 64);
  memset(data, 0xff, panel_bytes + 64);
  memset(scores, 0xff, score_bytes + 64);
  memset(scratch, 0xff, scratch_bytes + 64);
  panel.data = data;
  set->pack(p->element, (const float *const *)p->queries, n, &panel);
  set->tile(p->element, &panel, p->rows, p->count, n, (float *)(void *)scores, scratch);
  for (size_t i = 0; i < 64; i++) {
    CHECK(data[panel_bytes + i] == 0xff && scores[score_bytes + i] == 0xff && scratch[scratch_bytes + i] == 0xff,
          "%s %s count %zu dims %zu width %zu wrote past its memory", set->name, element_names[p->element], p->count, n,
          width);
  }
  CHECK(panel.relative >= 0.0f && panel.relative < 1.0e-3f + 3.0f * vdb_rounding(n), "%s: relative %g", set->name,
        (double)panel.relative);
  for (size_t q = 0; q < width; q++) {
    double size = q < p->query_count ? norm_of_query(p->queries[q], n) : 0.0;
    CHECK(q < p->query_count ? (double)panel.missing[q] <= size * (n < 64 ? 1.0 : 0.3) : panel.missing[q] == 0.0f,
          "%s missing[%zu] = %g of %g", set->name, q, (double)panel.missing[q], size);
    for (size_t r = 0; r < p->count && q < p->query_count; r++) {
      const double *x = p->values + r * n;
      double exact = dot_of(p->queries[q], x, n), score = (double)((float *)(void *)scores)[r * width + q];
      double bound = ((double)panel.relative * size + (double)panel.missing[q]) * norm_of(x, n);
      CHECK(fabs(score - exact) <= bound, "%s %s count %zu dims %zu row %zu query %zu: %g, exact %g, bound %g", set->name,
            element_names[p->element], p->count, n, r, q, score, exact, bound);
    }
  }
  free(panel.missing);
  free(data);
  free(scores);
  free(scratch);
}

static void test_exact(size_t n, int exponent) {
  float *q = (float *)allocate(vdb_round_up(n, VDB_PAD) * sizeof(float)), *x = (float *)allocate(n * sizeof(float) + 64);
  memset(q, 0, vdb_round_up(n, VDB_PAD) * sizeof(float));
  fill(q, n, (int)random_below(KINDS), exponent);
  fill(x, n, (int)random_below(KINDS), random_below(2) ? exponent : 0);
  memset(x + n, 0xff, 64);
  for (int squares = 0; squares < 2; squares++) {
    double lanes[2][16] = {{0.0}}, sums[2], expected[2];
    for (size_t j = 0; j < n; j++) {
      double difference = (double)q[j] - (double)x[j];
      volatile double product = squares ? difference * difference : (double)q[j] * (double)x[j]; /* rounded, then added */
      lanes[0][j % 16] += product;
      if (!squares) lanes[1][j % 16] += (double)x[j] * (double)x[j];
    }
    for (int s = 0; s < 2; s++) {
      for (int half = 8; half; half /= 2) {
        for (int l = 0; l < half; l++) lanes[s][l] += lanes[s][l + half];
        vdb_keep_order(lanes[s]);
      }
      expected[s] = lanes[s][0];
    }
    for (int s = 0; s < set_count; s++) {
      sets[s]->exact(q, x, n, squares, sums);
      CHECK(sums[0] == expected[0] && sums[1] == expected[1], "%s dims %zu squares %d: %a %a, expected %a %a",
            sets[s]->name, n, squares, sums[0], sums[1], expected[0], expected[1]);
    }
  }
  free(q);
  free(x);
}

static void test_decode(const vdb_kernel_set *set, problem *p) {
  float *out = (float *)allocate((p->dimensions + 1) * sizeof(float)), scale = 0.37f;
  for (size_t r = 0; r < p->count; r++) {
    out[p->dimensions] = 5.0f;
    set->decode(p->element, p->pointers[r], scale, p->dimensions, out);
    CHECK(out[p->dimensions] == 5.0f, "%s wrote too far", set->name);
    for (size_t j = 0; j < p->dimensions; j++) {
      float expected = (float)p->values[r * p->dimensions + j];
      if (p->element == VDB_I8) expected *= scale;
      CHECK(out[j] == expected, "%s %s dims %zu at %zu: %g, expected %g", set->name, element_names[p->element],
            p->dimensions, j, (double)out[j], (double)expected);
    }
  }
  free(out);
}

static float term(const float *values, size_t i) { return values[i]; }

static void test_gates(const vdb_kernel_set *set, size_t count, size_t width) {
  float *scores = (float *)allocate(count * width * sizeof(float)), *terms = (float *)allocate(3 * width * sizeof(float));
  float *column = (float *)allocate(count * sizeof(float)), *upper = (float *)allocate(count * sizeof(float));
  vdb_hit *hits = (vdb_hit *)allocate(count * width * sizeof(vdb_hit));
  char *found = (char *)allocate(count * width);
  vdb_row_terms rows;
  vdb_query_terms queries = {terms, terms + width, terms + 2 * width};
  const double rare = random_below(2) ? 0.5 : 1.9;
  size_t hit_count;
  memset(&rows, 0, sizeof rows);
  memset(found, 0, count * width);
  for (size_t i = 0; i < count * width; i++) scores[i] = random_unit();
  for (size_t i = 0; i < 2 * width; i++) terms[i] = random_unit() * 0.25f;
  for (size_t i = 0; i < width; i++) terms[2 * width + i] = i % 5 == 4 ? INFINITY : (float)rare;
  for (size_t r = 0; r < count; r++) {
    rows.alpha[r] = 1.0f + 0.25f * random_unit();
    rows.beta[r] = 0.25f * random_unit();
    rows.rho[r] = random_unit();
    rows.residual[r] = random_unit();
  }
#ifndef __FAST_MATH__
  scores[random_below(count * width)] = NAN;
  rows.beta[random_below(count)] = INFINITY;
#endif
  hit_count = set->gate_tile(scores, width, &rows, count, &queries, hits);
  for (size_t i = 0; i < hit_count; i++) {
    CHECK(hits[i].row < count && hits[i].query < width, "%s: hit %u %u", set->name, hits[i].row, hits[i].query);
    CHECK(!found[hits[i].row * width + hits[i].query]++, "%s: twice", set->name);
  }
  for (size_t q = 0; q < width; q++) {
    float threshold = term(queries.threshold, q);
    int any = 0, any_sure = 0;
    for (size_t r = 0; r < count; r++) column[r] = scores[r * width + q];
    int reached = set->gate(column, &rows, count, term(queries.gamma, q), term(queries.delta, q), threshold, upper);
    for (size_t r = 0; r < count; r++) {
      double expected = (double)rows.alpha[r] * (double)column[r] + (double)rows.beta[r] +
                        (double)rows.rho[r] * (double)term(queries.gamma, q) +
                        (double)rows.residual[r] * (double)term(queries.delta, q);
      double low = expected - 1.0e-6, high = expected + 1.0e-6;
      int hit = found[r * width + q];
#ifndef __FAST_MATH__
      if (isnan(expected)) {
        CHECK(hit && isnan(upper[r]), "%s: NaN must count", set->name);
        any = any_sure = 1;
        continue;
      }
#endif
      CHECK((double)upper[r] == expected || ((double)upper[r] >= low && (double)upper[r] <= high),
            "%s: upper %g, expected %g", set->name, (double)upper[r], expected);
      if (low > (double)threshold) {
        CHECK(hit, "%s: missed %zu %zu", set->name, r, q);
        any_sure = 1;
      }
      if (high < (double)threshold) CHECK(!hit, "%s: wrong hit %zu %zu", set->name, r, q);
      any |= !(high < (double)threshold);
    }
    CHECK(any_sure ? reached : any || !reached, "%s: gate says %d", set->name, reached);
  }
  free(scores);
  free(terms);
  free(column);
  free(upper);
  free(hits);
  free(found);
}

static void test_checksums(const vdb_kernel_set *set) {
  static unsigned char bytes[200000];
  CHECK(set->crc32c(0, "123456789", 9) == 0xe3069283u, "%s", set->name);
  CHECK(set->crc32c(0, "", 0) == 0, "%s", set->name);
  memset(bytes, 0, 32);
  CHECK(set->crc32c(0, bytes, 32) == 0x8a9136aau, "%s", set->name);
  memset(bytes, 0xff, 32);
  CHECK(set->crc32c(0, bytes, 32) == 0x62a8ab43u, "%s", set->name);
  for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)random_bits();
  for (int i = 0; i < 30; i++) {
    size_t start = random_below(1000), size = random_below(sizeof bytes - 1000), first = random_below(size + 1);
    uint32_t expected = vdb_plain_set()->crc32c(0, bytes + start, size);
    CHECK(set->crc32c(0, bytes + start, size) == expected, "%s size %zu", set->name, size);
    CHECK(set->crc32c(set->crc32c(0, bytes + start, first), bytes + start + first, size - first) == expected, "%s",
          set->name);
  }
}

static void test_random_problem(size_t dimensions) {
  for (int e = 0; e < 4; e++) {
    problem p = make_problem((vdb_element)e, 1 + random_below(VDB_TILE_ROWS), dimensions,
                             1 + random_below(random_below(4) ? 40 : VDB_TILE_QUERIES));
    for (int s = 0; s < set_count; s++) {
      if (e == VDB_I8) {
        test_codes_scan(sets[s], &p, 0);
      } else {
        test_scans(sets[s], &p);
      }
      test_tile(sets[s], &p);
      test_decode(sets[s], &p);
    }
    free_problem(&p);
  }
}

/* Sums of codes at their greatest fit into 32 bits. */
static void test_greatest_codes(void) {
  problem p = make_problem(VDB_I8, 5, VDB_MAX_DIMENSIONS, 1);
  for (int sign = -1; sign <= 1; sign += 2) {
    for (size_t i = 0; i < p.count * p.dimensions; i++) {
      ((int8_t *)p.rows)[i] = (int8_t)(127 * sign);
      p.values[i] = 127.0 * sign;
    }
    for (size_t j = 0; j < p.dimensions; j++) p.queries[0][j] = 1.0f;
    for (int s = 0; s < set_count; s++) {
      test_codes_scan(sets[s], &p, 1);
      test_codes_scan(sets[s], &p, -1);
      test_tile(sets[s], &p);
    }
  }
  free_problem(&p);
}

static void test_choice(void) {
  CHECK(vdb_kernels_named("none") == NULL, "a set that is none");
  CHECK(vdb_kernels_named("plain") == vdb_plain_set(), "plain is always there");
  CHECK(vdb_active() != NULL && vdb_active() == vdb_active(), "a set is chosen");
  vdb_choose(vdb_plain_set());
  CHECK(vdb_active() == vdb_plain_set(), "the chosen one is active");
  vdb_choose(NULL);
  CHECK(vdb_active() == sets[set_count - 1], "null: the best");
}

int main(int argc, char **argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 60;
  for (int i = 0; i < 5; i++) {
    sets[set_count] = vdb_kernels_named(set_names[i]);
    if (!sets[set_count]) continue;
    CHECK(!strcmp(sets[set_count]->name, set_names[i]), "name");
    set_count++;
  }
  test_choice();
  test_greatest_codes();
  for (int s = 0; s < set_count; s++) {
    test_checksums(sets[s]);
    for (int i = 0; i < rounds; i++) test_gates(sets[s], 1 + random_below(VDB_TILE_ROWS), 16 * (1 + random_below(8)));
  }
  for (size_t n = 1; n <= 130; n++) {
    test_exact(n, 0);
    if (n < 70 || n % 16 < 2) test_random_problem(n);
  }
  for (int i = 0; i < rounds; i++) {
    test_exact(1 + random_below(2048), random_exponent());
    test_random_problem(1 + random_below(2048));
  }
  for (int s = 0; s < set_count; s++) printf("%s ", sets[s]->name);
  printf("ok\n");
  return 0;
}
