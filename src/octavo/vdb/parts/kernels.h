/* ------------------------------------------------------------------------------------------------------------------
 * 4 Kernels
 *
 * A kernel set is a table of functions for one kind of machine. Rows are given by pointer, so that the same functions
 * serve a scan (consecutive rows), a graph (neighbours) and a filtered scan. A query is padded with zeros to a multiple
 * of VDB_PAD elements, and VDB_ALIGNMENT bytes are readable after every array of rows: kernels may read past a row;
 * what they find there is finite and meets a zero.
 *
 * Scores are approximate: they decide what is looked at, never what is answered.
 *     |score - exact| <= vdb_rounding(dimensions) * |query| * |row|          dots
 *     |score - exact| <= vdb_rounding(dimensions) * exact                    squares
 */
#define VDB_PAD 64u
#define VDB_TILE_ROWS 32u     /* rows of one tile call, at most */
#define VDB_TILE_QUERIES 128u /* queries of one panel, at most */

/* How the numbers of a row are kept. */
typedef enum { VDB_F32 = 0, VDB_F16 = 1, VDB_BF16 = 2, VDB_I8 = 3 } vdb_element;

/* A query for the scans: `values` for float rows, and for i8 rows its codes in two parts,
 * values ~ high_scale * high + low_scale * low, exact to 2^-14 of the greatest magnitude. */
typedef struct {
  const float *values;      /* [padded] */
  const int8_t *high, *low; /* [padded], -127..127; NULL unless rows are i8 */
  float high_scale, low_scale;
  int32_t high_sum, low_sum; /* sums of the codes, for instructions that want an unsigned operand */
} vdb_probe;

/* Queries packed for tiles, in the order that the kernel set likes best. `width` is `queries` rounded up to 16.
 * |score - exact| <= (relative * |query| + missing[q]) * |row|: `missing` is the norm of what the packing dropped. */
typedef struct {
  size_t queries, width;
  float relative;
  float *missing; /* [width] */
  void *data;     /* aligned; the kernel set's own layout */
} vdb_panel;

/* Per row of a tile: upper bound = alpha * score + beta + rho * gamma[query] + residual * delta[query]. */
typedef struct {
  float alpha[VDB_TILE_ROWS], beta[VDB_TILE_ROWS], rho[VDB_TILE_ROWS], residual[VDB_TILE_ROWS];
} vdb_row_terms;

/* Per query of a panel; the arrays are 16-float aligned and `width` long. Unused places have threshold infinity. */
typedef struct {
  const float *gamma, *delta, *threshold;
} vdb_query_terms;

typedef struct {
  uint32_t row, query; /* within the tile and the panel */
  float upper;
} vdb_hit;

typedef struct {
  const char *name;
  /* out[i] = dot product of query and rows[i], or the sum of squared differences; for f32, f16 and bf16 rows. */
  void (*dots[3])(const float *query, const void *const *rows, size_t count, size_t dimensions, float *out);
  void (*squares[3])(const float *query, const void *const *rows, size_t count, size_t dimensions, float *out);
  /* out[i] = high_scale * <high, rows[i]> + low_scale * <low, rows[i]>, the products exact integers. */
  void (*dots_i8)(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions, float *out);
  /* Upper bounds of `count` <= VDB_TILE_ROWS rows for one query; not 0 if any reaches (is not below) the threshold. */
  int (*gate)(const float *scores, const vdb_row_terms *rows, size_t count, float gamma, float delta, float threshold,
              float *upper);
  /* Tiles: scores [count][panel width] of `count` <= VDB_TILE_ROWS consecutive rows. `scratch` has
   * vdb_tile_scratch(dimensions) bytes, 64-byte aligned. */
  size_t (*panel_bytes)(vdb_element element, size_t width, size_t dimensions);
  void (*pack)(vdb_element element, const float *const *queries, size_t dimensions, vdb_panel *panel);
  void (*tile)(vdb_element element, const vdb_panel *panel, const void *rows, size_t count, size_t dimensions,
               float *scores, void *scratch);
  /* The (row, query) pairs whose upper bound is not below the query's threshold; `hits` has room for all. */
  size_t (*gate_tile)(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                      const vdb_query_terms *queries, vdb_hit *hits);
  /* sums[0] = dot product (squares == 0) or sum of squared differences; sums[1] = sum of row[j]^2, which nobody wants
   * of squares: 0. All in double, the differences too, every square rounded before it is added, in the one order that
   * every kernel set keeps: 16 lanes, j modulo 16, then halves added to halves. Rows: f32, unpadded. */
  void (*exact)(const float *query, const float *row, size_t dimensions, int squares, double sums[2]);
  void (*decode)(vdb_element element, const void *row, float scale, size_t dimensions, float *out);
  uint32_t (*crc32c)(uint32_t crc, const void *bytes, size_t size);
  /* Which of 64 ints are of this tag and from low to high. */
  uint64_t (*between)(const uint64_t *values, const uint8_t *tags, uint8_t tag, int64_t low, int64_t high);
  /* How many bits two bitsets have in common. */
  size_t (*count)(const uint64_t *a, const uint64_t *b, size_t words);
} vdb_kernel_set;

VDB_INLINE float vdb_rounding(size_t dimensions) { return ((float)dimensions + 16.0f) * 6.0e-8f; }
VDB_INLINE size_t vdb_tile_scratch(size_t dimensions) {
  return VDB_TILE_ROWS * vdb_round_up(dimensions, VDB_PAD) * sizeof(float) + 4096;
}


/* --- what the sets share ---
 *
 * Loops over a constant number of rows or vectors must be unrolled, or their sums live in memory. */
#if defined(__clang__)
#define VDB_UNROLL _Pragma("clang loop unroll(full)")
#else
#define VDB_UNROLL _Pragma("GCC unroll 16")
#endif

/* Element j of a row, codes as they are. */
VDB_INLINE float vdb_number_at(vdb_element element, const void *row, size_t j) {
  if (element == VDB_F16) return vdb_from_f16(((const uint16_t *)row)[j]);
  if (element == VDB_BF16) return vdb_from_bf16(((const uint16_t *)row)[j]);
  if (element == VDB_I8) return (float)((const int8_t *)row)[j];
  return ((const float *)row)[j];
}

VDB_INLINE size_t vdb_bytes_of(vdb_element element) { return element == VDB_F32 ? 4 : element == VDB_I8 ? 1 : 2; }

/* Scans fetch what they read two steps of four rows later: rows of a kilobyte are too short for the processor to
 * see a stream. The last rows fetch themselves. */
VDB_INLINE void vdb_fetch(const void *row, size_t bytes) { __builtin_prefetch((const char *)row + bytes); }

/* Under -ffast-math the compiler may add in another order, but not what it cannot look through. */
VDB_INLINE void vdb_keep_order(double *lanes) { __asm__ volatile("" : : "r"(lanes) : "memory"); }

/* Rounds a product before it is added: unlike the product of two floats, the square of a difference has more digits
 * than a double, and the compiler fuses the two operations where the machine can, which rounds once. */
#if defined(__x86_64__)
#define VDB_ROUNDED(product) __asm__("" : "+x"(product))
#elif defined(__aarch64__)
#define VDB_ROUNDED(product) __asm__("" : "+w"(product))
#else
#define VDB_ROUNDED(product) __asm__("" : "+m"(product))
#endif

/* Appends a hit per set bit of `reached`: bit i is query q + i of row r, with the bound upper[i]. */
static inline size_t vdb_collect(unsigned reached, const float *upper, size_t r, size_t q, vdb_hit *hits,
                                 size_t found) {
  for (; reached; reached &= reached - 1) {
    unsigned lane = (unsigned)__builtin_ctz(reached);
    vdb_hit hit = {(uint32_t)r, (uint32_t)q + lane, upper[lane]};
    hits[found++] = hit;
  }
  return found;
}

/* Packed queries stand 16 abreast: [width / 16][dimensions][16], so that one step of a tile reads one vector per 16
 * queries and spreads one number of each row over it. This is the panel of every set that multiplies floats; rows of
 * another element, codes too, are decoded first, and f32 is copied: a tile that reads eight rows number by number would
 * wait for memory. */
static inline size_t vdb_panel_bytes_floats(vdb_element element, size_t width, size_t dimensions) {
  (void)element;
  return width * dimensions * sizeof(float);
}

VDB_ONCE void vdb_pack_floats(vdb_element element, const float *const *queries, size_t dimensions,
                                   vdb_panel *panel) {
  float *data = (float *)panel->data;
  (void)element;
  panel->relative = vdb_rounding(dimensions);
  for (size_t q = 0; q < panel->width; q++) {
    float *column = data + q / 16 * dimensions * 16 + q % 16;
    panel->missing[q] = 0.0f;
    for (size_t j = 0; j < dimensions; j++) column[j * 16] = q < panel->queries ? queries[q][j] : 0.0f;
  }
}

/* Panels of codes: a scale per query, then [width / 16][padded / 4][16][4] codes, then room for the codes of one query.
 * One byte per number is enough: what it drops is `missing`, and a second one would double the work of the tile to
 * spare few exact distances. `flip` is xored into the codes where the instruction wants the queries unsigned. */
static inline size_t vdb_panel_bytes_codes(size_t width, size_t dimensions) {
  size_t padded = vdb_round_up(dimensions, VDB_PAD);
  return width * sizeof(float) + width * padded + padded;
}

VDB_ONCE void vdb_pack_codes(const float *const *queries, size_t dimensions, uint8_t flip, vdb_panel *panel) {
  size_t padded = vdb_round_up(dimensions, VDB_PAD);
  float *scales = (float *)panel->data;
  uint8_t *data = (uint8_t *)(scales + panel->width);
  int8_t *codes = (int8_t *)(data + panel->width * padded);
  memset(data, 0, panel->width * padded);
  panel->relative = vdb_rounding(dimensions);
  for (size_t q = 0; q < panel->width; q++) {
    uint8_t *column = data + q / 16 * padded * 16 + q % 16 * 4;
    double dropped = 0.0;
    scales[q] = panel->missing[q] = 0.0f;
    if (q >= panel->queries) continue;
    scales[q] = vdb_to_i8(queries[q], dimensions, codes);
    for (size_t j = 0; j < dimensions; j++) {
      double residual = (double)queries[q][j] - (double)scales[q] * (double)codes[j];
      dropped += residual * residual;
      column[j / 4 * 64 + j % 4] = (uint8_t)((uint8_t)codes[j] ^ flip);
    }
    panel->missing[q] = (float)(sqrt(dropped) * 1.000001); /* not less, for all the rounding */
  }
}

/* --- crc32c: the Castagnoli polynomial, bits reflected ---
 *
 * Without an instruction: eight bytes a step through eight tables, made once. */
VDB_LIGHT const uint32_t (*vdb_crc_tables(void))[256] {
  static uint32_t tables[8][256];
  static int state; /* 0: none, 1: being made, 2: ready */
  int none = 0;
  if (__atomic_load_n(&state, __ATOMIC_ACQUIRE) == 2) return (const uint32_t(*)[256])tables;
  if (__atomic_compare_exchange_n(&state, &none, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
    for (uint32_t byte = 0; byte < 256; byte++) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1u ? 0x82f63b78u : 0u);
      tables[0][byte] = crc;
    }
    for (int t = 1; t < 8; t++)
      for (uint32_t byte = 0; byte < 256; byte++)
        tables[t][byte] = tables[t - 1][byte] >> 8 ^ tables[0][tables[t - 1][byte] & 255u];
    __atomic_store_n(&state, 2, __ATOMIC_RELEASE);
  }
  while (__atomic_load_n(&state, __ATOMIC_ACQUIRE) != 2) continue;
  return (const uint32_t(*)[256])tables;
}

static inline uint32_t vdb_crc32c_plain(uint32_t crc, const void *bytes, size_t size) {
  const uint32_t(*t)[256] = vdb_crc_tables();
  const unsigned char *p = (const unsigned char *)bytes;
  crc = ~crc;
  for (; size >= 8; size -= 8, p += 8) {
    uint32_t low, high;
    memcpy(&low, p, 4);
    memcpy(&high, p + 4, 4);
    low ^= crc;
    crc = t[7][low & 255u] ^ t[6][low >> 8 & 255u] ^ t[5][low >> 16 & 255u] ^ t[4][low >> 24] ^ t[3][high & 255u] ^
          t[2][high >> 8 & 255u] ^ t[1][high >> 16 & 255u] ^ t[0][high >> 24];
  }
  for (; size; size--, p++) crc = crc >> 8 ^ t[0][(crc ^ *p) & 255u];
  return ~crc;
}

/* a * b modulo the polynomial; the highest bit is x^0. */
VDB_ONCE uint32_t vdb_crc_multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int bit = 0; bit < 32; bit++) {
    product ^= (uint32_t)-(int32_t)(a >> 31) & b;
    a <<= 1;
    b = b >> 1 ^ ((uint32_t)-(int32_t)(b & 1u) & 0x82f63b78u);
  }
  return product;
}

/* With an instruction: it takes three cycles but a new one may start in each, so three stretches are read side by side.
 * The first two are then moved past what follows them: x^(8 n) modulo the polynomial for n bytes. */
#if defined(VDB_X86)
#if defined(__clang__) && __clang_major__ >= 14 /* where it is a feature of its own */
#define VDB_CRC_TARGET VDB_TARGET("sse4.2,crc32")
#else
#define VDB_CRC_TARGET VDB_TARGET("sse4.2")
#endif
VDB_INLINE VDB_CRC_TARGET uint32_t vdb_crc_word(uint32_t crc, uint64_t word) {
  return (uint32_t)_mm_crc32_u64(crc, word);
}
VDB_INLINE VDB_CRC_TARGET uint32_t vdb_crc_byte(uint32_t crc, uint8_t byte) { return _mm_crc32_u8(crc, byte); }
#elif defined(VDB_ARM) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define VDB_CRC_TARGET
VDB_INLINE uint32_t vdb_crc_word(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
VDB_INLINE uint32_t vdb_crc_byte(uint32_t crc, uint8_t byte) { return __crc32cb(crc, byte); }
#endif

#ifdef VDB_CRC_TARGET
#define VDB_CRC_STRETCH 8192u
#define VDB_CRC_PAST_ONE 0x28461564u /* x^(8 * 8192) */
#define VDB_CRC_PAST_TWO 0xbf455269u /* x^(8 * 16384) */

VDB_CRC_TARGET static inline uint32_t vdb_crc32c_instruction(uint32_t crc, const void *bytes, size_t size) {
  const unsigned char *p = (const unsigned char *)bytes;
  uint64_t word[3];
  crc = ~crc;
  for (; size >= 3 * VDB_CRC_STRETCH; size -= 3 * VDB_CRC_STRETCH, p += 3 * VDB_CRC_STRETCH) {
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < VDB_CRC_STRETCH; i += 8) {
      memcpy(&word[0], p + i, 8);
      memcpy(&word[1], p + VDB_CRC_STRETCH + i, 8);
      memcpy(&word[2], p + 2 * VDB_CRC_STRETCH + i, 8);
      crc = vdb_crc_word(crc, word[0]);
      second = vdb_crc_word(second, word[1]);
      third = vdb_crc_word(third, word[2]);
    }
    crc = vdb_crc_multiply(crc, VDB_CRC_PAST_TWO) ^ vdb_crc_multiply(second, VDB_CRC_PAST_ONE) ^ third;
  }
  for (; size >= 8; size -= 8, p += 8) {
    memcpy(&word[0], p, 8);
    crc = vdb_crc_word(crc, word[0]);
  }
  for (; size; size--, p++) crc = vdb_crc_byte(crc, *p);
  return ~crc;
}
#endif

