/* ------------------------------------------------------------------------------------------------------------------
 * 3 Numbers
 *
 * 16-bit floats round to nearest, ties to even; what is too great for f16 is refused before it gets here.
 */
VDB_INLINE uint32_t vdb_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VDB_INLINE float vdb_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* By its bits, so that it holds under -ffast-math too. */
VDB_INLINE int vdb_is_finite(float value) { return (vdb_bits(value) & 0x7f800000u) != 0x7f800000u; }

VDB_ONCE int vdb_all_finite(const float *values, size_t count) {
  uint32_t found = 0;
  for (size_t i = 0; i < count; i++) found |= (uint32_t)((vdb_bits(values[i]) & 0x7f800000u) == 0x7f800000u);
  return !found;
}

VDB_INLINE uint16_t vdb_to_bf16(float value) {
  uint32_t bits = vdb_bits(value);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

VDB_INLINE float vdb_from_bf16(uint16_t half) { return vdb_from_bits((uint32_t)half << 16); }

static inline uint16_t vdb_to_f16(float value) {
  uint32_t bits = vdb_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 65536 and above */
  if (magnitude < 0x38800000u) {                                   /* subnormal: adding 0.5 aligns and rounds it */
    uint32_t aligned = vdb_bits(vdb_from_bits(magnitude) + 0.5f);
    return (uint16_t)(sign | (aligned - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float vdb_from_f16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x400u) return vdb_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  float subnormal = (float)magnitude * 5.9604644775390625e-8f; /* 2^-24 */
  return vdb_from_bits(sign | vdb_bits(subnormal));
}

/* Codes of one row: code = round(value / scale), scale = greatest magnitude / 127. Returns the scale. */
VDB_ONCE float vdb_to_i8(const float *values, size_t count, int8_t *codes) {
  float greatest = 0.0f;
  for (size_t j = 0; j < count; j++) greatest = fabsf(values[j]) > greatest ? fabsf(values[j]) : greatest;
  float scale = greatest / 127.0f;
  if (!(scale > 1.0e-37f)) { /* zero, or too small for its inverse */
    memset(codes, 0, count);
    return 0.0f;
  }
  float inverse = 1.0f / scale;
  for (size_t j = 0; j < count; j++) {
    float code = values[j] * inverse;
    int rounded = (int)(code + (code < 0.0f ? -0.5f : 0.5f));
    codes[j] = (int8_t)(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
  }
  return scale;
}

