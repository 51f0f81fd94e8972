/* --- avx512 ---
 *
 * 16 floats or 64 codes a step, four rows side by side, masks for what is left over: only the products of codes read
 * past a row. Codes meet in VNNI's u8 x i8 products, where 128 is added to one side and taken off again by the sum of
 * the other. 16-bit floats are widened: products of BF16 instructions would need a rounded query. */
#define VDB_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"

VDB_INLINE VDB_TARGET(VDB_AVX512) __mmask16 vdb_first_avx512(size_t count) {
  return (__mmask16)(count < 16 ? (1u << count) - 1u : 0xffffu);
}

VDB_INLINE VDB_TARGET(VDB_AVX512) __m512 vdb_load_avx512(vdb_element element, const void *row, size_t j,
                                                         __mmask16 mask) {
  if (element == VDB_F16) return _mm512_maskz_cvtph_ps(mask, _mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + j));
  if (element == VDB_BF16) {
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + j);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  if (element == VDB_I8) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, (const int8_t *)row + j)));
  }
  return _mm512_maskz_loadu_ps(mask, (const float *)row + j);
}

VDB_INLINE VDB_TARGET(VDB_AVX512) __m512 vdb_step_avx512(int squares, __m512 sum, __m512 q, __m512 x) {
  __m512 difference = _mm512_sub_ps(q, x);
  return squares ? _mm512_fmadd_ps(difference, difference, sum) : _mm512_fmadd_ps(q, x, sum);
}

/* The sums over the lanes of four vectors. */
VDB_INLINE VDB_TARGET(VDB_AVX512) __m128 vdb_fold_avx512(const __m512 *sums) {
  __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
  __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX512) __m128i vdb_fold_i32_avx512(const __m512i *sums) {
  __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
  __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_scan_avx512(vdb_element element, int squares, const float *query,
                                                       const void *const *rows, size_t count, size_t dimensions,
                                                       float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const void *row[4], *next[4];
    __m512 sums[4];
    size_t j = 0;
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      sums[r] = _mm512_setzero_ps();
    }
    for (; j + 16 <= dimensions; j += 16) {
      __m512 q = _mm512_loadu_ps(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j * vdb_bytes_of(element));
        sums[r] = vdb_step_avx512(squares, sums[r], q, vdb_load_avx512(element, row[r], j, 0xffff));
      }
    }
    if (j < dimensions) {
      __mmask16 rest = vdb_first_avx512(dimensions - j);
      __m512 q = _mm512_maskz_loadu_ps(rest, query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++)
        sums[r] = vdb_step_avx512(squares, sums[r], q, vdb_load_avx512(element, row[r], j, rest));
    }
    _mm_mask_storeu_ps(out + i, (__mmask8)(vdb_first_avx512(count - i) & 15), vdb_fold_avx512(sums));
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_f32_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F32, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_f16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_bf16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_BF16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_squares_f32_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F32, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_squares_f16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F16, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_squares_bf16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_BF16, 1, q, rows, n, dims, out);
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_i8_avx512(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                      float *out) {
  const __m512i flip = _mm512_set1_epi8((char)-128);
  const __m128i high_excess = _mm_set1_epi32(128 * query->high_sum), low_excess = _mm_set1_epi32(128 * query->low_sum);
  for (size_t i = 0; i < count; i += 4) {
    const int8_t *row[4], *next[4];
    __m512i high[4], low[4];
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = (const int8_t *)rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = (const int8_t *)rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      high[r] = low[r] = _mm512_setzero_si512();
    }
    for (size_t j = 0; j < dimensions; j += 64) {
      __m512i q_high = _mm512_loadu_si512(query->high + j), q_low = _mm512_loadu_si512(query->low + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j);
        __m512i x = _mm512_xor_si512(_mm512_loadu_si512(row[r] + j), flip); /* past the row it meets a zero */
        high[r] = _mm512_dpbusd_epi32(high[r], x, q_high);
        low[r] = _mm512_dpbusd_epi32(low[r], x, q_low);
      }
    }
    __m128 a = _mm_cvtepi32_ps(_mm_sub_epi32(vdb_fold_i32_avx512(high), high_excess));
    __m128 b = _mm_cvtepi32_ps(_mm_sub_epi32(vdb_fold_i32_avx512(low), low_excess));
    __m128 sum = _mm_fmadd_ps(_mm_set1_ps(query->high_scale), a, _mm_mul_ps(_mm_set1_ps(query->low_scale), b));
    _mm_mask_storeu_ps(out + i, (__mmask8)(vdb_first_avx512(count - i) & 15), sum);
  }
}

VDB_TARGET(VDB_AVX512)
static inline int vdb_gate_avx512(const float *scores, const vdb_row_terms *rows, size_t count, float gamma,
                                  float delta, float threshold, float *upper) {
  unsigned any = 0;
  for (size_t i = 0; i < count; i += 16) {
    __mmask16 mask = vdb_first_avx512(count - i);
    __m512 sum = _mm512_maskz_loadu_ps(mask, rows->beta + i);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows->rho + i), _mm512_set1_ps(gamma), sum);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows->residual + i), _mm512_set1_ps(delta), sum);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows->alpha + i), _mm512_maskz_loadu_ps(mask, scores + i), sum);
    _mm512_mask_storeu_ps(upper + i, mask, sum);
    any |= _mm512_mask_cmp_ps_mask(mask, sum, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
  }
  return any != 0;
}

VDB_TARGET(VDB_AVX512)
static inline size_t vdb_gate_tile_avx512(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                                          const vdb_query_terms *queries, vdb_hit *hits) {
  size_t found = 0;
  for (size_t r = 0; r < count; r++) {
    __m512 alpha = _mm512_set1_ps(rows->alpha[r]), beta = _mm512_set1_ps(rows->beta[r]);
    __m512 rho = _mm512_set1_ps(rows->rho[r]), residual = _mm512_set1_ps(rows->residual[r]);
    for (size_t q = 0; q < width; q += 16) {
      __m512 sum = _mm512_fmadd_ps(rho, _mm512_loadu_ps(queries->gamma + q), beta);
      sum = _mm512_fmadd_ps(residual, _mm512_loadu_ps(queries->delta + q), sum);
      sum = _mm512_fmadd_ps(alpha, _mm512_loadu_ps(scores + r * width + q), sum);
      unsigned reached = _mm512_cmp_ps_mask(sum, _mm512_loadu_ps(queries->threshold + q), _CMP_NLT_UQ);
      if (__builtin_expect(reached != 0, 0)) {
        float upper[16];
        _mm512_storeu_ps(upper, sum);
        found = vdb_collect(reached, upper, r, q, hits, found);
      }
    }
  }
  return found;
}

VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_decode_as_avx512(vdb_element element, const void *row, float scale,
                                                            size_t dimensions, float *out) {
  for (size_t j = 0; j < dimensions; j += 16) {
    __mmask16 mask = vdb_first_avx512(dimensions - j);
    __m512 x = vdb_load_avx512(element, row, j, mask);
    _mm512_mask_storeu_ps(out + j, mask, element == VDB_I8 ? _mm512_mul_ps(x, _mm512_set1_ps(scale)) : x);
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_decode_avx512(vdb_element element, const void *row, float scale, size_t dimensions, float *out) {
  if (element == VDB_F32) vdb_decode_as_avx512(VDB_F32, row, scale, dimensions, out);
  if (element == VDB_F16) vdb_decode_as_avx512(VDB_F16, row, scale, dimensions, out);
  if (element == VDB_BF16) vdb_decode_as_avx512(VDB_BF16, row, scale, dimensions, out);
  if (element == VDB_I8) vdb_decode_as_avx512(VDB_I8, row, scale, dimensions, out);
}

VDB_INLINE VDB_TARGET(VDB_AVX512) double vdb_fold_f64_avx512(__m512d low, __m512d high) {
  __m512d eight = _mm512_add_pd(low, high);
  __asm__("" : "+v"(eight)); /* against -ffast-math, as in vdb_keep_order */
  __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  __asm__("" : "+v"(four));
  __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  __asm__("" : "+v"(two));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

/* Half a step of exact: 8 of the 16 lanes. */
VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_exact_step_avx512(__m256 q, __m256 x, int squares, __m512d *products,
                                                             __m512d *norms) {
  __m512d wide = _mm512_cvtps_pd(x), factor = _mm512_cvtps_pd(q);
  if (squares) {
    factor = _mm512_sub_pd(factor, wide);
    __m512d square = _mm512_mul_pd(factor, factor);
    VDB_ROUNDED(square);
    *products = _mm512_add_pd(square, *products);
    VDB_ROUNDED(*products); /* the fold adds in its own order */
  } else {
    *products = _mm512_fmadd_pd(factor, wide, *products);
    *norms = _mm512_fmadd_pd(wide, wide, *norms);
  }
}

VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_exact_as_avx512(const float *query, const float *row, size_t dimensions,
                                                           int squares, double sums[2]) {
  __m512d products[2], norms[2];
  size_t j = 0;
  products[0] = products[1] = norms[0] = norms[1] = _mm512_setzero_pd();
  for (; j + 16 <= dimensions; j += 16) {
    VDB_UNROLL for (int v = 0; v < 2; v++) {
      __m256 q = _mm256_loadu_ps(query + j + 8 * v), x = _mm256_loadu_ps(row + j + 8 * v);
      vdb_exact_step_avx512(q, x, squares, &products[v], &norms[v]);
    }
  }
  if (j < dimensions) {
    VDB_UNROLL for (int v = 0; v < 2; v++) {
      __mmask8 rest = (__mmask8)(vdb_first_avx512(dimensions - j) >> 8 * v);
      __m256 q = _mm256_maskz_loadu_ps(rest, query + j + 8 * v), x = _mm256_maskz_loadu_ps(rest, row + j + 8 * v);
      vdb_exact_step_avx512(q, x, squares, &products[v], &norms[v]);
    }
  }
  sums[0] = vdb_fold_f64_avx512(products[0], products[1]);
  sums[1] = vdb_fold_f64_avx512(norms[0], norms[1]);
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_exact_avx512(const float *query, const float *row, size_t dimensions, int squares,
                                    double sums[2]) {
  if (squares) {
    vdb_exact_as_avx512(query, row, dimensions, 1, sums);
  } else {
    vdb_exact_as_avx512(query, row, dimensions, 0, sums);
  }
}

/* Scores of rows first to first + 7, clipped to `count`, with 16 * vectors queries: 24 sums in registers, and each
 * number of a row spread over a register once for all of them. */
VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_tile_f32_block_avx512(int vectors, const float *queries, const float *rows,
                                                                 size_t first, size_t count, size_t dimensions,
                                                                 float *scores, size_t width) {
  const float *row[8];
  __m512 sums[8][3];
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_ps();
  }
  for (size_t j = 0; j < dimensions; j++) {
    __m512 q[3];
    VDB_UNROLL for (int v = 0; v < vectors; v++) q[v] = _mm512_loadu_ps(queries + ((size_t)v * dimensions + j) * 16);
    VDB_UNROLL for (int r = 0; r < 8; r++) {
      __m512 x = _mm512_set1_ps(row[r][j]);
      VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_fmadd_ps(x, q[v], sums[r][v]);
    }
  }
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    if (first + (size_t)r >= count) break;
    float *to = scores + (first + (size_t)r) * width;
    VDB_UNROLL for (int v = 0; v < vectors; v++) _mm512_storeu_ps(to + 16 * v, sums[r][v]);
  }
}

static inline size_t vdb_panel_bytes_avx512(vdb_element element, size_t width, size_t dimensions) {
  return element == VDB_I8 ? vdb_panel_bytes_codes(width, dimensions)
                           : vdb_panel_bytes_floats(element, width, dimensions);
}

static inline void vdb_pack_avx512(vdb_element element, const float *const *queries, size_t dimensions,
                                   vdb_panel *panel) {
  if (element == VDB_I8) {
    vdb_pack_codes(queries, dimensions, 0x80, panel);
  } else {
    vdb_pack_floats(element, queries, dimensions, panel);
  }
}

/* The same for codes, four numbers a step. The queries' are 128 too great: `excess` is 128 times the sum of a row. */
VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_tile_i8_block_avx512(int vectors, const uint8_t *queries,
                                                                const float *scales, const int8_t *rows,
                                                                const int32_t *excess, size_t first, size_t count,
                                                                size_t dimensions, float *scores, size_t width) {
  const size_t padded = vdb_round_up(dimensions, VDB_PAD);
  const int8_t *row[8];
  __m512i sums[8][3];
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_si512();
  }
  for (size_t j = 0; j < dimensions; j += 4) {
    __m512i q[3];
    VDB_UNROLL for (int v = 0; v < vectors; v++) q[v] = _mm512_loadu_si512(queries + ((size_t)v * padded + j) * 16);
    VDB_UNROLL for (int r = 0; r < 8; r++) {
      int32_t four;
      memcpy(&four, row[r] + j, sizeof four); /* past the row it meets a zero */
      __m512i x = _mm512_set1_epi32(four);
      VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], q[v], x);
    }
  }
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    if (first + (size_t)r >= count) break;
    float *to = scores + (first + (size_t)r) * width;
    VDB_UNROLL for (int v = 0; v < vectors; v++) {
      __m512i sum = _mm512_sub_epi32(sums[r][v], _mm512_set1_epi32(excess[first + (size_t)r]));
      _mm512_storeu_ps(to + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scales + 16 * v)));
    }
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_tile_i8_avx512(const vdb_panel *panel, const int8_t *rows, size_t count, size_t dimensions,
                                      float *scores) {
  const size_t padded = vdb_round_up(dimensions, VDB_PAD), width = panel->width;
  const float *scales = (const float *)panel->data;
  const uint8_t *data = (const uint8_t *)(scales + width);
  int32_t excess[VDB_TILE_ROWS];
  for (size_t r = 0; r < count; r++) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t j = 0; j < dimensions; j += 64) {
      __mmask64 mask = ~(__mmask64)0 >> (64 - vdb_min(dimensions - j, 64));
      __m512i x = _mm512_maskz_loadu_epi8(mask, rows + r * dimensions + j);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char)-128), x); /* to it, -128 is 128 */
    }
    excess[r] = _mm512_reduce_add_epi32(sum);
  }
  for (size_t q = 0, vectors; q < width; q += 16 * vectors) {
    const uint8_t *queries = data + q * padded;
    vectors = vdb_min((width - q) / 16, 3);
    for (size_t r = 0; r < count; r += 8) {
      if (vectors == 3) {
        vdb_tile_i8_block_avx512(3, queries, scales + q, rows, excess, r, count, dimensions, scores + q, width);
      } else if (vectors == 2) {
        vdb_tile_i8_block_avx512(2, queries, scales + q, rows, excess, r, count, dimensions, scores + q, width);
      } else {
        vdb_tile_i8_block_avx512(1, queries, scales + q, rows, excess, r, count, dimensions, scores + q, width);
      }
    }
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_tile_avx512(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                   size_t dimensions, float *scores, void *scratch) {
  const size_t width = panel->width;
  float *floats = (float *)scratch;
  if (element == VDB_I8) {
    vdb_tile_i8_avx512(panel, (const int8_t *)rows, count, dimensions, scores);
    return;
  }
  vdb_decode_avx512(element, rows, 1.0f, count * dimensions, floats);
  for (size_t q = 0, vectors; q < width; q += 16 * vectors) {
    const float *queries = (const float *)panel->data + q * dimensions;
    vectors = vdb_min((width - q) / 16, 3);
    for (size_t r = 0; r < count; r += 8) {
      if (vectors == 3) {
        vdb_tile_f32_block_avx512(3, queries, floats, r, count, dimensions, scores + q, width);
      } else if (vectors == 2) {
        vdb_tile_f32_block_avx512(2, queries, floats, r, count, dimensions, scores + q, width);
      } else {
        vdb_tile_f32_block_avx512(1, queries, floats, r, count, dimensions, scores + q, width);
      }
    }
  }
}

VDB_TARGET(VDB_AVX512)
static inline uint64_t vdb_between_avx512(const uint64_t *values, const uint8_t *tags, uint8_t tag, int64_t low,
                                          int64_t high) {
  __m512i least = _mm512_set1_epi64(low), most = _mm512_set1_epi64(high);
  uint64_t word = 0;
  VDB_UNROLL for (int i = 0; i < 8; i++) {
    __m512i some = _mm512_loadu_si512(values + 8 * i);
    uint64_t passes = _mm512_mask_cmple_epi64_mask(_mm512_cmpge_epi64_mask(some, least), some, most);
    word |= passes << (8 * i);
  }
  return word & _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(tags), _mm512_set1_epi8((char)tag));
}

static inline const vdb_kernel_set *vdb_avx512_set(void) {
  static const vdb_kernel_set set = {
      "avx512",
      {vdb_dots_f32_avx512, vdb_dots_f16_avx512, vdb_dots_bf16_avx512},
      {vdb_squares_f32_avx512, vdb_squares_f16_avx512, vdb_squares_bf16_avx512},
      vdb_dots_i8_avx512,
      vdb_gate_avx512,
      vdb_panel_bytes_avx512,
      vdb_pack_avx512,
      vdb_tile_avx512,
      vdb_gate_tile_avx512,
      vdb_exact_avx512,
      vdb_decode_avx512,
      vdb_crc32c_instruction,
      vdb_between_avx512,
      vdb_count_instruction,
  };
  return &set;
}

