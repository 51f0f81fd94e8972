#ifdef VDB_ARM
/* --- neon ---
 *
 * The plain set, which is NEON here, with codes and checksums by instruction where the compiler was told of it. */
VDB_INLINE int32x4_t vdb_step_i8_neon(int32x4_t sum, int8x16_t a, int8x16_t b) {
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(sum, a, b);
#else
  int16x8_t pairs = vmull_s8(vget_low_s8(a), vget_low_s8(b)); /* 2 * 127^2 is below 2^15 */
  return vpadalq_s16(sum, vmlal_s8(pairs, vget_high_s8(a), vget_high_s8(b)));
#endif
}

static inline void vdb_dots_i8_neon(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                    float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const int8_t *row[4];
    int32x4_t high[4], low[4];
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = (const int8_t *)rows[vdb_min(i + (size_t)r, count - 1)];
      high[r] = low[r] = vdupq_n_s32(0);
    }
    for (size_t j = 0; j < dimensions; j += 16) {
      int8x16_t q_high = vld1q_s8(query->high + j), q_low = vld1q_s8(query->low + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        int8x16_t x = vld1q_s8(row[r] + j); /* past the row it meets a zero */
        high[r] = vdb_step_i8_neon(high[r], x, q_high);
        low[r] = vdb_step_i8_neon(low[r], x, q_low);
      }
    }
    for (size_t r = 0; r < 4 && i + r < count; r++)
      out[i + r] = query->high_scale * (float)vaddvq_s32(high[r]) + query->low_scale * (float)vaddvq_s32(low[r]);
  }
}

static inline const vdb_kernel_set *vdb_neon_set(void) {
  static const vdb_kernel_set set = {
      "neon",
      {vdb_dots_f32_plain, vdb_dots_f16_plain, vdb_dots_bf16_plain},
      {vdb_squares_f32_plain, vdb_squares_f16_plain, vdb_squares_bf16_plain},
      vdb_dots_i8_neon,
      vdb_gate_plain,
      vdb_panel_bytes_floats,
      vdb_pack_floats,
      vdb_tile_plain,
      vdb_gate_tile_plain,
      vdb_exact_plain,
      vdb_decode_plain,
#ifdef VDB_CRC_TARGET
      vdb_crc32c_instruction,
#else
      vdb_crc32c_plain,
#endif
      vdb_between_plain,
      vdb_count_plain,
  };
  return &set;
}
#endif /* VDB_ARM */

