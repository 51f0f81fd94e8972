/* --- amx ---
 *
 * The avx512 set but for tiles, which matrix instructions multiply: 16 rows by 64 bytes with 64 bytes by 16 queries.
 * Rows are first laid out as such tiles, [step][part][32 rows][64 bytes], padded with zeros; so the unit reads whole
 * kilobytes, and rows of any length. Codes are multiplied as they are. Floats are split into two bf16, high and low,
 * and of the four products of parts all but low by low are taken. Queries are brought to magnitude 1 by a power of two
 * first, for the unit takes what is subnormal for zero. */
#define VDB_AMX VDB_AVX512 ",avx512bf16,amx-tile,amx-int8,amx-bf16"

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} vdb_tile_shape;

/* Numbers of a row in one step. */
VDB_INLINE size_t vdb_step_amx(vdb_element element) { return element == VDB_I8 ? 64 : 32; }

static inline size_t vdb_panel_bytes_amx(vdb_element element, size_t width, size_t dimensions) {
  if (element == VDB_I8) return vdb_panel_bytes_codes(width, dimensions);
  return width * sizeof(float) + width * vdb_round_up(dimensions, 32) * 2 * sizeof(uint16_t);
}

/* A scale per query, then [width / 16][step][high, low][16][16 queries][2]. */
VDB_ONCE void vdb_pack_halves(const float *const *queries, size_t dimensions, vdb_panel *panel) {
  const size_t padded = vdb_round_up(dimensions, 32);
  float *scales = (float *)panel->data;
  uint16_t *data = (uint16_t *)(scales + panel->width);
  memset(data, 0, panel->width * padded * 2 * sizeof(uint16_t));
  for (size_t q = 0; q < panel->width; q++) {
    uint16_t *column = data + q / 16 * padded * 32 + q % 16 * 2;
    uint32_t greatest = 0;
    scales[q] = panel->missing[q] = 0.0f;
    if (q >= panel->queries) continue;
    for (size_t j = 0; j < dimensions; j++) {
      uint32_t magnitude = vdb_bits(queries[q][j]) & 0x7fffffffu;
      greatest = magnitude > greatest ? magnitude : greatest;
    }
    uint32_t exponent = (uint32_t)vdb_min(vdb_max(greatest >> 23, 1), 253);
    float inverse = vdb_from_bits((254u - exponent) << 23);
    scales[q] = vdb_from_bits(exponent << 23);
    for (size_t j = 0; j < dimensions; j++) {
      float value = queries[q][j] * inverse;
      uint16_t high = vdb_to_bf16(value), *to = column + j / 32 * 1024 + j % 32 / 2 * 32 + j % 2;
      to[0] = high;
      to[512] = vdb_to_bf16(value - vdb_from_bf16(high));
    }
  }
}

/* With parts rounded to 8 bits, |low| <= 2^-8 |value| and 2^-17 |value| is lost. f32, f16: low * low and twice what is
 * lost make 2^-15; bf16 rows have no low part, and lose once. To that comes one rounding in f32 for each product, of
 * sums that are greater than |query| |row| by at most 2^-6. */
static inline void vdb_pack_amx(vdb_element element, const float *const *queries, size_t dimensions,
                                vdb_panel *panel) {
  if (element == VDB_I8) {
    vdb_pack_codes(queries, dimensions, 0, panel);
    return;
  }
  size_t products = element == VDB_BF16 ? 2 : 3;
  vdb_pack_halves(queries, dimensions, panel);
  panel->relative = (element == VDB_BF16 /* 2^-16, 2^-15 */ ? 1.52587890625e-5f : 3.0517578125e-5f) + vdb_rounding(products * dimensions) * 1.02f;
}

/* 32 floats of a row, the first `left` of them, as bf16. */
VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_split_amx(vdb_element element, const void *row, size_t j, size_t left,
                                                  uint8_t *high, uint8_t *low) {
  __m512 a = vdb_load_avx512(element, row, j, vdb_first_avx512(left));
  __m512 b = vdb_load_avx512(element, row, j + 16, vdb_first_avx512(left > 16 ? left - 16 : 0));
  __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  __m512i a_high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16);
  __m512i b_high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16);
  a = _mm512_sub_ps(a, _mm512_castsi512_ps(a_high));
  b = _mm512_sub_ps(b, _mm512_castsi512_ps(b_high));
  _mm512_storeu_si512(high, rounded);
  _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_arrange_floats_amx(vdb_element element, const uint8_t *row, size_t dimensions,
                                                           uint8_t *to) {
  for (size_t j = 0; j < dimensions; j += 32, to += 2 * 2048) vdb_split_amx(element, row, j, dimensions - j, to, to + 2048);
}

VDB_TARGET(VDB_AMX)
static inline void vdb_arrange_amx(vdb_element element, const uint8_t *row, size_t count, size_t dimensions, uint8_t *to) {
  const size_t step = vdb_step_amx(element), parts = element == VDB_F32 || element == VDB_F16 ? 2 : 1;
  const size_t bytes = dimensions * vdb_bytes_of(element), steps = (dimensions + step - 1) / step * parts;
  for (size_t r = 0; r < count; r++, row += bytes) {
    if (element == VDB_F32) vdb_arrange_floats_amx(VDB_F32, row, dimensions, to + r * 64);
    else if (element == VDB_F16) vdb_arrange_floats_amx(VDB_F16, row, dimensions, to + r * 64);
    else {
      uint8_t *place = to + r * 64;
      size_t at = 0;
      for (; at + 64 <= bytes; at += 64, place += 2048) _mm512_storeu_si512(place, _mm512_loadu_si512(row + at));
      if (at < bytes) _mm512_storeu_si512(place, _mm512_maskz_loadu_epi8(~(__mmask64)0 >> (64 - (bytes - at)), row + at));
    }
  }
  for (size_t r = count; r < VDB_TILE_ROWS; r++)
    for (size_t k = 0; k < steps; k++)
      _mm512_storeu_si512(to + (k * VDB_TILE_ROWS + r) * 64, _mm512_setzero_si512());
}

/* Products of 32 rows with 32 queries, whose panels begin at `left` and `right`. Tiles 0 to 3 are the sums, 4 and 5
 * rows, 6 and 7 queries. Meanwhile `lines` cache lines a step are fetched of the rows that probably come next. */
VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_multiply_i8_amx(const uint8_t *rows, const uint8_t *left, const uint8_t *right,
                                                        size_t steps, const uint8_t *next, size_t lines) {
  for (size_t k = 0; k < steps; k++, rows += 2048, left += 1024, right += 1024) {
    for (size_t i = 0; i < lines; i++, next += 64) _mm_prefetch((const char *)next, _MM_HINT_T1);
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, left, 64);
    _tile_loadd(7, right, 64);
    _tile_loadd(5, rows + 1024, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_multiply_bf16_amx(int parts, const uint8_t *rows, const uint8_t *left,
                                                          const uint8_t *right, size_t steps, const uint8_t *next,
                                                          size_t lines) {
  for (size_t k = 0; k < steps; k++, rows += parts * 2048, left += 2048, right += 2048) {
    for (size_t i = 0; i < lines; i++, next += 64) _mm_prefetch((const char *)next, _MM_HINT_T1);
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, left + 1024, 64); /* high by low */
    _tile_loadd(7, right + 1024, 64);
    _tile_loadd(5, rows + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, left, 64); /* high by high */
    _tile_loadd(7, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (parts == 1) continue;
    _tile_loadd(4, rows + 2048, 64); /* low by high */
    _tile_loadd(5, rows + 3072, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

VDB_TARGET(VDB_AMX)
static inline void vdb_tile_amx(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                size_t dimensions, float *scores, void *scratch) {
  const size_t width = panel->width, steps = (dimensions + vdb_step_amx(element) - 1) / vdb_step_amx(element);
  const size_t panel_bytes = steps * (element == VDB_I8 ? 1024 : 2048);
  const float *scales = (const float *)panel->data;
  const uint8_t *data = (const uint8_t *)(scales + width), *arranged = (const uint8_t *)scratch;
  const size_t blocks = (width + 31) / 32, bytes = VDB_TILE_ROWS * dimensions * vdb_bytes_of(element);
  const size_t lines = (bytes / 64 + blocks * steps - 1) / (blocks * steps);
  const uint8_t *next = (const uint8_t *)rows + bytes;
  float sums[32][128] __attribute__((aligned(64)));
  vdb_tile_shape shape;
  memset(&shape, 0, sizeof shape);
  shape.palette = 1;
  for (int t = 0; t < 8; t++) {
    shape.rows[t] = 16;
    shape.row_bytes[t] = 64;
  }
  vdb_arrange_amx(element, (const uint8_t *)rows, count, dimensions, (uint8_t *)scratch);
  __asm__ volatile("" : : "r"(&shape), "r"(scratch) : "memory"); /* written before the instructions below read them */
  _tile_loadconfig(&shape);
  for (size_t q = 0; q < width; q += 32) {
    const size_t vectors = width - q > 16 ? 2 : 1;
    const uint8_t *left = data + q / 16 * panel_bytes, *right = vectors == 2 ? left + panel_bytes : left;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (element == VDB_I8) {
      vdb_multiply_i8_amx(arranged, left, right, steps, next, lines);
    } else if (element == VDB_BF16) {
      vdb_multiply_bf16_amx(1, arranged, left, right, steps, next, lines);
    } else {
      vdb_multiply_bf16_amx(2, arranged, left, right, steps, next, lines);
    }
    next += steps * lines * 64;
    _tile_stored(0, &sums[0][q], sizeof sums[0]);
    _tile_stored(2, &sums[16][q], sizeof sums[0]);
    if (vectors == 1) break;
    _tile_stored(1, &sums[0][q + 16], sizeof sums[0]);
    _tile_stored(3, &sums[16][q + 16], sizeof sums[0]);
  }
  _tile_release();
  for (size_t r = 0; r < count; r++) {
    for (size_t q = 0; q < width; q += 16) {
      __m512 sum = _mm512_loadu_ps(&sums[r][q]);
      if (element == VDB_I8) sum = _mm512_cvtepi32_ps(_mm512_castps_si512(sum));
      _mm512_storeu_ps(scores + r * width + q, _mm512_mul_ps(sum, _mm512_loadu_ps(scales + q)));
    }
  }
}

static inline const vdb_kernel_set *vdb_amx_set(void) {
  static const vdb_kernel_set set = {
      "amx",
      {vdb_dots_f32_avx512, vdb_dots_f16_avx512, vdb_dots_bf16_avx512},
      {vdb_squares_f32_avx512, vdb_squares_f16_avx512, vdb_squares_bf16_avx512},
      vdb_dots_i8_avx512,
      vdb_gate_avx512,
      vdb_panel_bytes_amx,
      vdb_pack_amx,
      vdb_tile_amx,
      vdb_gate_tile_avx512,
      vdb_exact_avx512,
      vdb_decode_avx512,
      vdb_crc32c_instruction,
      vdb_between_avx512,
      vdb_count_instruction,
  };
  return &set;
}

