/* --- avx2 ---
 *
 * The plan of avx512 with 8 floats or 32 codes. What lies past a row is read and then cleared, for there are no masked
 * loads of 16-bit numbers. */
#define VDB_AVX2 "avx2,fma,f16c"

/* All bits of the first `count` of 8 lanes. */
VDB_INLINE VDB_TARGET(VDB_AVX2) __m256 vdb_first_avx2(size_t count) {
  __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)vdb_min(count, 8)), lanes));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) __m256 vdb_load_avx2(vdb_element element, const void *row, size_t j) {
  if (element == VDB_F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + j)));
  if (element == VDB_BF16) {
    __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + j));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  if (element == VDB_I8) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)row + j))));
  }
  return _mm256_loadu_ps((const float *)row + j);
}

VDB_INLINE VDB_TARGET(VDB_AVX2) __m256 vdb_step_avx2(int squares, __m256 sum, __m256 q, __m256 x) {
  __m256 difference = _mm256_sub_ps(q, x);
  return squares ? _mm256_fmadd_ps(difference, difference, sum) : _mm256_fmadd_ps(q, x, sum);
}

/* The sums over the lanes of four vectors. */
VDB_INLINE VDB_TARGET(VDB_AVX2) __m128 vdb_fold_avx2(const __m256 *sums) {
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) __m128i vdb_fold_i32_avx2(const __m256i *sums) {
  __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_store_avx2(float *out, size_t left, __m128 four) {
  float values[4];
  _mm_storeu_ps(values, four);
  memcpy(out, values, vdb_min(left, 4) * sizeof(float));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_scan_avx2(vdb_element element, int squares, const float *query,
                                                   const void *const *rows, size_t count, size_t dimensions,
                                                   float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const void *row[4], *next[4];
    __m256 sums[4];
    size_t j = 0;
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      sums[r] = _mm256_setzero_ps();
    }
    for (; j + 8 <= dimensions; j += 8) {
      __m256 q = _mm256_loadu_ps(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j * vdb_bytes_of(element));
        sums[r] = vdb_step_avx2(squares, sums[r], q, vdb_load_avx2(element, row[r], j));
      }
    }
    if (j < dimensions) {
      __m256 rest = vdb_first_avx2(dimensions - j), q = _mm256_loadu_ps(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++)
        sums[r] = vdb_step_avx2(squares, sums[r], q, _mm256_and_ps(vdb_load_avx2(element, row[r], j), rest));
    }
    vdb_store_avx2(out + i, count - i, vdb_fold_avx2(sums));
  }
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_f32_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F32, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_f16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_bf16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_BF16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_squares_f32_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F32, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_squares_f16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F16, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_squares_bf16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_BF16, 1, q, rows, n, dims, out);
}

/* |x| * (q with the sign of x): pairs stay below 2^15, so that sums of 16 bits do not saturate. */
VDB_INLINE VDB_TARGET(VDB_AVX2) __m256i vdb_step_i8_avx2(__m256i sum, __m256i q, __m256i x) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(q, x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_i8_avx2(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                    float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const int8_t *row[4], *next[4];
    __m256i high[4], low[4];
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = (const int8_t *)rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = (const int8_t *)rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      high[r] = low[r] = _mm256_setzero_si256();
    }
    for (size_t j = 0; j < dimensions; j += 32) {
      __m256i q_high = _mm256_loadu_si256((const __m256i *)(query->high + j));
      __m256i q_low = _mm256_loadu_si256((const __m256i *)(query->low + j));
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j);
        __m256i x = _mm256_loadu_si256((const __m256i *)(row[r] + j)); /* past the row it meets a zero */
        high[r] = vdb_step_i8_avx2(high[r], q_high, x);
        low[r] = vdb_step_i8_avx2(low[r], q_low, x);
      }
    }
    __m128 a = _mm_mul_ps(_mm_set1_ps(query->high_scale), _mm_cvtepi32_ps(vdb_fold_i32_avx2(high)));
    __m128 b = _mm_mul_ps(_mm_set1_ps(query->low_scale), _mm_cvtepi32_ps(vdb_fold_i32_avx2(low)));
    vdb_store_avx2(out + i, count - i, _mm_add_ps(a, b));
  }
}

VDB_TARGET(VDB_AVX2)
static inline size_t vdb_gate_tile_avx2(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                                        const vdb_query_terms *queries, vdb_hit *hits) {
  size_t found = 0;
  for (size_t r = 0; r < count; r++) {
    __m256 alpha = _mm256_set1_ps(rows->alpha[r]), beta = _mm256_set1_ps(rows->beta[r]);
    __m256 rho = _mm256_set1_ps(rows->rho[r]), residual = _mm256_set1_ps(rows->residual[r]);
    for (size_t q = 0; q < width; q += 8) {
      __m256 sum = _mm256_fmadd_ps(rho, _mm256_loadu_ps(queries->gamma + q), beta);
      sum = _mm256_fmadd_ps(residual, _mm256_loadu_ps(queries->delta + q), sum);
      sum = _mm256_fmadd_ps(alpha, _mm256_loadu_ps(scores + r * width + q), sum);
      __m256 not_below = _mm256_cmp_ps(sum, _mm256_loadu_ps(queries->threshold + q), _CMP_NLT_UQ);
      unsigned reached = (unsigned)_mm256_movemask_ps(not_below);
      if (__builtin_expect(reached != 0, 0)) {
        float upper[8];
        _mm256_storeu_ps(upper, sum);
        found = vdb_collect(reached, upper, r, q, hits, found);
      }
    }
  }
  return found;
}

VDB_TARGET(VDB_AVX2)
static inline int vdb_gate_avx2(const float *scores, const vdb_row_terms *rows, size_t count, float gamma, float delta,
                                float threshold, float *upper) {
  int any = 0;
  for (size_t i = 0; i < count; i += 8) {
    __m256 first = vdb_first_avx2(count - i);
    __m256i mask = _mm256_castps_si256(first);
    __m256 sum = _mm256_loadu_ps(rows->beta + i);
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(rows->rho + i), _mm256_set1_ps(gamma), sum);
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(rows->residual + i), _mm256_set1_ps(delta), sum);
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(rows->alpha + i), _mm256_maskload_ps(scores + i, mask), sum);
    __m256 not_below = _mm256_cmp_ps(sum, _mm256_set1_ps(threshold), _CMP_NLT_UQ);
    _mm256_maskstore_ps(upper + i, mask, sum);
    any |= _mm256_movemask_ps(_mm256_and_ps(not_below, first));
  }
  return any;
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_decode_as_avx2(vdb_element element, const void *row, float scale,
                                                        size_t dimensions, float *out) {
  size_t j = 0;
  for (; j + 8 <= dimensions; j += 8) {
    __m256 x = vdb_load_avx2(element, row, j);
    _mm256_storeu_ps(out + j, element == VDB_I8 ? _mm256_mul_ps(x, _mm256_set1_ps(scale)) : x);
  }
  for (; j < dimensions; j++) {
    float x = vdb_number_at(element, row, j);
    out[j] = element == VDB_I8 ? scale * x : x;
  }
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_decode_avx2(vdb_element element, const void *row, float scale, size_t dimensions, float *out) {
  if (element == VDB_F32) vdb_decode_as_avx2(VDB_F32, row, scale, dimensions, out);
  if (element == VDB_F16) vdb_decode_as_avx2(VDB_F16, row, scale, dimensions, out);
  if (element == VDB_BF16) vdb_decode_as_avx2(VDB_BF16, row, scale, dimensions, out);
  if (element == VDB_I8) vdb_decode_as_avx2(VDB_I8, row, scale, dimensions, out);
}

/* Lanes 4 v to 4 v + 3 are in vector v. */
VDB_INLINE VDB_TARGET(VDB_AVX2) double vdb_fold_f64_avx2(const __m256d *v) {
  __m256d low = _mm256_add_pd(v[0], v[2]), high = _mm256_add_pd(v[1], v[3]);
  __asm__("" : "+x"(low), "+x"(high)); /* against -ffast-math, as in vdb_keep_order */
  __m256d four = _mm256_add_pd(low, high);
  __asm__("" : "+x"(four));
  __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  __asm__("" : "+x"(two));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

/* A quarter of a step of exact: 4 of the 16 lanes. */
VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_exact_step_avx2(__m128 q, __m128 x, int squares, __m256d *products,
                                                         __m256d *norms) {
  __m256d wide = _mm256_cvtps_pd(x), factor = _mm256_cvtps_pd(q);
  if (squares) {
    factor = _mm256_sub_pd(factor, wide);
    __m256d square = _mm256_mul_pd(factor, factor);
    VDB_ROUNDED(square);
    *products = _mm256_add_pd(square, *products);
    VDB_ROUNDED(*products); /* the fold adds in its own order */
  } else {
    *products = _mm256_fmadd_pd(factor, wide, *products);
    *norms = _mm256_fmadd_pd(wide, wide, *norms);
  }
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_exact_as_avx2(const float *query, const float *row, size_t dimensions,
                                                       int squares, double sums[2]) {
  __m256d products[4], norms[4];
  size_t j = 0;
  VDB_UNROLL for (int v = 0; v < 4; v++) products[v] = norms[v] = _mm256_setzero_pd();
  for (; j + 16 <= dimensions; j += 16) {
    VDB_UNROLL for (int v = 0; v < 4; v++)
      vdb_exact_step_avx2(_mm_loadu_ps(query + j + 4 * v), _mm_loadu_ps(row + j + 4 * v), squares, &products[v],
                          &norms[v]);
  }
  VDB_UNROLL for (int v = 0; v < 4; v++) {
    size_t at = j + 4 * (size_t)v, left = dimensions > at ? dimensions - at : 0;
    __m128i rest = _mm256_castsi256_si128(_mm256_castps_si256(vdb_first_avx2(left)));
    if (left)
      vdb_exact_step_avx2(_mm_maskload_ps(query + at, rest), _mm_maskload_ps(row + at, rest), squares, &products[v],
                          &norms[v]);
  }
  sums[0] = vdb_fold_f64_avx2(products);
  sums[1] = vdb_fold_f64_avx2(norms);
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_exact_avx2(const float *query, const float *row, size_t dimensions, int squares,
                                  double sums[2]) {
  if (squares) {
    vdb_exact_as_avx2(query, row, dimensions, 1, sums);
  } else {
    vdb_exact_as_avx2(query, row, dimensions, 0, sums);
  }
}

/* Scores of rows first to first + 3, clipped to `count`, with 16 queries. */
VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_tile_block_avx2(const float *queries, const float *rows, size_t first,
                                                         size_t count, size_t dimensions, float *scores, size_t width) {
  const float *row[4];
  __m256 sums[4][2];
  VDB_UNROLL for (int r = 0; r < 4; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  }
  for (size_t j = 0; j < dimensions; j++) {
    __m256 left = _mm256_loadu_ps(queries + j * 16), right = _mm256_loadu_ps(queries + j * 16 + 8);
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      __m256 x = _mm256_set1_ps(row[r][j]);
      sums[r][0] = _mm256_fmadd_ps(x, left, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(x, right, sums[r][1]);
    }
  }
  VDB_UNROLL for (int r = 0; r < 4; r++) {
    if (first + (size_t)r >= count) break;
    _mm256_storeu_ps(scores + (first + (size_t)r) * width, sums[r][0]);
    _mm256_storeu_ps(scores + (first + (size_t)r) * width + 8, sums[r][1]);
  }
}

/* Codes are decoded too: products of bytes would take as many instructions here as those of floats. */
VDB_TARGET(VDB_AVX2)
static inline void vdb_tile_avx2(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                 size_t dimensions, float *scores, void *scratch) {
  float *floats = (float *)scratch;
  vdb_decode_avx2(element, rows, 1.0f, count * dimensions, floats);
  for (size_t q = 0; q < panel->width; q += 16)
    for (size_t r = 0; r < count; r += 4)
      vdb_tile_block_avx2((const float *)panel->data + q * dimensions, floats, r, count, dimensions, scores + q,
                          panel->width);
}

static inline const vdb_kernel_set *vdb_avx2_set(void) {
  static const vdb_kernel_set set = {
      "avx2",
      {vdb_dots_f32_avx2, vdb_dots_f16_avx2, vdb_dots_bf16_avx2},
      {vdb_squares_f32_avx2, vdb_squares_f16_avx2, vdb_squares_bf16_avx2},
      vdb_dots_i8_avx2,
      vdb_gate_avx2,
      vdb_panel_bytes_floats,
      vdb_pack_floats,
      vdb_tile_avx2,
      vdb_gate_tile_avx2,
      vdb_exact_avx2,
      vdb_decode_avx2,
      vdb_crc32c_instruction,
      vdb_between_plain,
      vdb_count_instruction,
  };
  return &set;
}

