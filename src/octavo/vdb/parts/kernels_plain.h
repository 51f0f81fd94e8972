/* --- plain ---
 *
 * The compiler's own vectors of 16 bytes, which x86-64 and ARM have; elsewhere it makes scalars of them. Four rows are
 * read side by side, for one sum would wait for itself. On ARM this is NEON already. */
typedef float vdb_f32x4 __attribute__((vector_size(16)));
typedef double vdb_f64x2 __attribute__((vector_size(16)));
typedef int32_t vdb_i32x4 __attribute__((vector_size(16)));

VDB_INLINE vdb_f32x4 vdb_load_plain(const float *from) {
  vdb_f32x4 values;
  memcpy(&values, from, sizeof values);
  return values;
}

VDB_INLINE vdb_f32x4 vdb_spread_plain(float value) {
  vdb_f32x4 values = {value, value, value, value};
  return values;
}

VDB_INLINE vdb_f32x4 vdb_load_row_plain(vdb_element element, const void *row, size_t j) {
  if (element == VDB_F32) return vdb_load_plain((const float *)row + j);
#ifdef VDB_ARM
  if (element == VDB_F16) return (vdb_f32x4)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)row + j)));
#endif
  vdb_f32x4 values = {vdb_number_at(element, row, j), vdb_number_at(element, row, j + 1), vdb_number_at(element, row, j + 2),
                      vdb_number_at(element, row, j + 3)};
  return values;
}

/* The lower or upper half of four floats as doubles; of __builtin_convertvector gcc makes scalars. */
VDB_INLINE vdb_f64x2 vdb_widen_plain(vdb_f32x4 four, int upper) {
#if defined(VDB_X86)
  return (vdb_f64x2)_mm_cvtps_pd(upper ? _mm_movehl_ps((__m128)four, (__m128)four) : (__m128)four);
#elif defined(VDB_ARM)
  float32x4_t values = (float32x4_t)four;
  return (vdb_f64x2)vcvt_f64_f32(upper ? vget_high_f32(values) : vget_low_f32(values));
#else
  vdb_f64x2 two = {(double)four[2 * upper], (double)four[2 * upper + 1]};
  return two;
#endif
}

/* sum + a * b; a strict -std=c11 does not fuse by itself. */
VDB_INLINE vdb_f32x4 vdb_fused_plain(vdb_f32x4 sum, vdb_f32x4 a, vdb_f32x4 b) {
#ifdef VDB_ARM
  return (vdb_f32x4)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return sum + a * b;
#endif
}

VDB_INLINE void vdb_scan_plain(vdb_element element, int squares, const float *query, const void *const *rows,
                               size_t count, size_t dimensions, float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const void *row[4];
    vdb_f32x4 sums[4];
    size_t j = 0;
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = rows[vdb_min(i + (size_t)r, count - 1)];
      sums[r] = vdb_spread_plain(0.0f);
    }
    for (; j + 4 <= dimensions; j += 4) {
      vdb_f32x4 q = vdb_load_plain(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_f32x4 x = vdb_load_row_plain(element, row[r], j), difference = q - x;
        sums[r] = squares ? vdb_fused_plain(sums[r], difference, difference) : vdb_fused_plain(sums[r], q, x);
      }
    }
    for (size_t r = 0; r < 4 && i + r < count; r++) {
      float sum = (sums[r][0] + sums[r][2]) + (sums[r][1] + sums[r][3]);
      for (size_t k = j; k < dimensions; k++) {
        float x = vdb_number_at(element, row[r], k), difference = query[k] - x;
        sum += squares ? difference * difference : query[k] * x;
      }
      out[i + r] = sum;
    }
  }
}

static inline void vdb_dots_f32_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F32, 0, q, rows, n, dims, out);
}
static inline void vdb_dots_f16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F16, 0, q, rows, n, dims, out);
}
static inline void vdb_dots_bf16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_BF16, 0, q, rows, n, dims, out);
}
static inline void vdb_squares_f32_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F32, 1, q, rows, n, dims, out);
}
static inline void vdb_squares_f16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F16, 1, q, rows, n, dims, out);
}
static inline void vdb_squares_bf16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_BF16, 1, q, rows, n, dims, out);
}

static inline void vdb_dots_i8_plain(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                     float *out) {
  for (size_t i = 0; i < count; i++) {
    const int8_t *row = (const int8_t *)rows[i];
    int32_t high = 0, low = 0;
    for (size_t j = 0; j < dimensions; j++) {
      high += query->high[j] * row[j];
      low += query->low[j] * row[j];
    }
    out[i] = query->high_scale * (float)high + query->low_scale * (float)low;
  }
}

static inline int vdb_gate_plain(const float *scores, const vdb_row_terms *rows, size_t count, float gamma, float delta,
                                 float threshold, float *upper) {
  int any = 0;
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vdb_f32x4 sum = vdb_load_plain(rows->alpha + i) * vdb_load_plain(scores + i) + vdb_load_plain(rows->beta + i) +
                    vdb_load_plain(rows->rho + i) * vdb_spread_plain(gamma) +
                    vdb_load_plain(rows->residual + i) * vdb_spread_plain(delta);
    vdb_i32x4 below = sum < vdb_spread_plain(threshold);
    any |= !(below[0] & below[1] & below[2] & below[3]);
    memcpy(upper + i, &sum, sizeof sum);
  }
  for (; i < count; i++) {
    upper[i] = rows->alpha[i] * scores[i] + rows->beta[i] + rows->rho[i] * gamma + rows->residual[i] * delta;
    any |= !(upper[i] < threshold);
  }
  return any;
}

static inline size_t vdb_gate_tile_plain(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                                         const vdb_query_terms *queries, vdb_hit *hits) {
  size_t found = 0;
  for (size_t r = 0; r < count; r++) {
    vdb_f32x4 alpha = vdb_spread_plain(rows->alpha[r]), beta = vdb_spread_plain(rows->beta[r]);
    vdb_f32x4 rho = vdb_spread_plain(rows->rho[r]), residual = vdb_spread_plain(rows->residual[r]);
    for (size_t q = 0; q < width; q += 4) {
      vdb_f32x4 sum = alpha * vdb_load_plain(scores + r * width + q) + beta +
                      rho * vdb_load_plain(queries->gamma + q) + residual * vdb_load_plain(queries->delta + q);
      vdb_i32x4 below = sum < vdb_load_plain(queries->threshold + q);
      if (!(below[0] & below[1] & below[2] & below[3])) {
        unsigned reached = 15u ^ (((unsigned)below[0] & 1u) | ((unsigned)below[1] & 2u) | ((unsigned)below[2] & 4u) |
                                  ((unsigned)below[3] & 8u));
        found = vdb_collect(reached, (const float *)&sum, r, q, hits, found);
      }
    }
  }
  return found;
}

static inline void vdb_decode_plain(vdb_element element, const void *row, float scale, size_t dimensions, float *out) {
  if (element == VDB_F32) {
    memcpy(out, row, dimensions * sizeof(float));
  } else if (element == VDB_I8) {
    for (size_t j = 0; j < dimensions; j++) out[j] = scale * (float)((const int8_t *)row)[j];
  } else {
    for (size_t j = 0; j < dimensions; j++) out[j] = vdb_number_at(element, row, j);
  }
}

#ifdef VDB_ARM
#define VDB_PLAIN_ROWS 4 /* times 16 queries: sums that fit into 32 registers; */
#else
#define VDB_PLAIN_ROWS 2 /* into 16 */
#endif

/* Of rows first to first + VDB_PLAIN_ROWS - 1, clipped to `count`, with 16 queries. */
VDB_INLINE void vdb_tile_block_plain(const float *queries, const float *rows, size_t first, size_t count,
                                     size_t dimensions, float *scores, size_t width) {
  const float *row[VDB_PLAIN_ROWS];
  vdb_f32x4 sums[VDB_PLAIN_ROWS][4];
  VDB_UNROLL for (int r = 0; r < VDB_PLAIN_ROWS; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    VDB_UNROLL for (int v = 0; v < 4; v++) sums[r][v] = vdb_spread_plain(0.0f);
  }
  for (size_t j = 0; j < dimensions; j++) {
    vdb_f32x4 q[4];
    VDB_UNROLL for (int v = 0; v < 4; v++) q[v] = vdb_load_plain(queries + j * 16 + 4 * v);
    VDB_UNROLL for (int r = 0; r < VDB_PLAIN_ROWS; r++) {
      vdb_f32x4 x = vdb_spread_plain(row[r][j]);
      VDB_UNROLL for (int v = 0; v < 4; v++) sums[r][v] = vdb_fused_plain(sums[r][v], q[v], x);
    }
  }
  VDB_UNROLL for (int r = 0; r < VDB_PLAIN_ROWS; r++)
    if (first + (size_t)r < count) memcpy(scores + (first + (size_t)r) * width, sums[r], sizeof sums[r]);
}

static inline void vdb_tile_plain(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                  size_t dimensions, float *scores, void *scratch) {
  float *floats = (float *)scratch;
  vdb_decode_plain(element, rows, 1.0f, count * dimensions, floats);
  for (size_t q = 0; q < panel->width; q += 16)
    for (size_t r = 0; r < count; r += VDB_PLAIN_ROWS)
      vdb_tile_block_plain((const float *)panel->data + q * dimensions, floats, r, count, dimensions, scores + q,
                           panel->width);
}

VDB_INLINE void vdb_exact_as_plain(const float *query, const float *row, size_t dimensions, int squares,
                                   double sums[2]) {
  vdb_f64x2 products[8], norms[8];
  double lanes[2][16];
  size_t j = 0;
  memset(products, 0, sizeof products);
  memset(norms, 0, sizeof norms);
  for (; j + 16 <= dimensions; j += 16) {
    VDB_UNROLL for (int v = 0; v < 8; v++) {
      vdb_f32x4 q = vdb_load_plain(query + j + v / 2 * 4), x = vdb_load_plain(row + j + v / 2 * 4);
      vdb_f64x2 wide = vdb_widen_plain(x, v % 2), factor = vdb_widen_plain(q, v % 2);
      if (squares) factor -= wide;
      vdb_f64x2 product = factor * (squares ? factor : wide);
      if (squares) VDB_ROUNDED(product);
      products[v] += product;
      if (!squares) norms[v] += wide * wide;
    }
  }
  memcpy(lanes[0], products, sizeof products);
  memcpy(lanes[1], norms, sizeof norms);
  for (size_t l = 0; j < dimensions; j++, l++) {
    double q = query[j], x = row[j], product = squares ? (q - x) * (q - x) : q * x;
    VDB_ROUNDED(product);
    lanes[0][l] += product;
    if (!squares) lanes[1][l] += x * x;
  }
  for (int s = 0; s < 2; s++) {
    vdb_keep_order(lanes[s]);
    for (int half = 8; half; half /= 2) {
      for (int l = 0; l < half; l++) lanes[s][l] += lanes[s][l + half];
      vdb_keep_order(lanes[s]);
    }
    sums[s] = lanes[s][0];
  }
}

static inline void vdb_exact_plain(const float *query, const float *row, size_t dimensions, int squares,
                                   double sums[2]) {
  if (squares) {
    vdb_exact_as_plain(query, row, dimensions, 1, sums);
  } else {
    vdb_exact_as_plain(query, row, dimensions, 0, sums);
  }
}

static inline uint64_t vdb_between_plain(const uint64_t *values, const uint8_t *tags, uint8_t tag, int64_t low,
                                         int64_t high) {
  uint64_t word = 0;
  for (unsigned i = 0; i < 64; i++) {
    int64_t value = (int64_t)values[i];
    word |= (uint64_t)((tags[i] == tag) & (value >= low) & (value <= high)) << i;
  }
  return word;
}

static inline size_t vdb_count_plain(const uint64_t *a, const uint64_t *b, size_t words) {
  size_t count = 0;
  for (size_t i = 0; i < words; i++) count += (size_t)__builtin_popcountll(a[i] & b[i]);
  return count;
}

static inline const vdb_kernel_set *vdb_plain_set(void) {
  static const vdb_kernel_set set = {
      "plain",
      {vdb_dots_f32_plain, vdb_dots_f16_plain, vdb_dots_bf16_plain},
      {vdb_squares_f32_plain, vdb_squares_f16_plain, vdb_squares_bf16_plain},
      vdb_dots_i8_plain,
      vdb_gate_plain,
      vdb_panel_bytes_floats,
      vdb_pack_floats,
      vdb_tile_plain,
      vdb_gate_tile_plain,
      vdb_exact_plain,
      vdb_decode_plain,
      vdb_crc32c_plain,
      vdb_between_plain,
      vdb_count_plain,
  };
  return &set;
}

#ifdef VDB_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized" /* g++ says it of gcc's own intrinsics */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

VDB_TARGET("popcnt") static inline size_t vdb_count_instruction(const uint64_t *a, const uint64_t *b, size_t words) {
  size_t count = 0;
  for (size_t i = 0; i < words; i++) count += (size_t)__builtin_popcountll(a[i] & b[i]);
  return count;
}

