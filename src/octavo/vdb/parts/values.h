/* --- values: metadata with names ---
 *
 * One after the other, in the caller's order: u8 type, u8 bytes of the name, name, 0, then nothing (none), u8 (bool), i64
 * (int), f64 (float), or u32 bytes of the text, text, 0. A record that holds values instead of bytes says so in the
 * highest bit of its metadata's size.
 */
#define VDB_VALUES_BIT 0x80000000u

/* By its bits, so that it holds under -ffast-math too. */
VDB_INLINE int vdb_is_nan(double number) {
  uint64_t bits;
  memcpy(&bits, &number, 8);
  return bits << 1 > (uint64_t)0x7ff << 53;
}

/* The next value from `*place` on, which moves behind it. 0 at the end, and where the bytes make no sense. */
VDB_API int vdb_next_value(const void *values, size_t size, size_t *place, vdb_value *out) {
  const unsigned char *at = (const unsigned char *)values + *place;
  size_t left = *place < size ? size - *place : 0, bytes;
  if (left < 3 || left < (bytes = 3 + (size_t)at[1])) return 0;
  memset(out, 0, sizeof *out);
  out->type = (vdb_value_type)at[0];
  out->name = (const char *)at + 2;
  if (!at[1] || at[bytes - 1]) return 0;
  at += bytes;
  left -= bytes;
  *place += bytes;
  if (out->type == VDB_VALUE_NONE) return 1;
  if (out->type == VDB_VALUE_BOOL) {
    if (!left || *at > 1) return 0;
    out->integer = *at;
    *place += 1;
    return 1;
  }
  if (out->type == VDB_VALUE_INT || out->type == VDB_VALUE_FLOAT) {
    if (left < 8) return 0;
    memcpy(out->type == VDB_VALUE_INT ? (void *)&out->integer : (void *)&out->number, at, 8);
    *place += 8;
    return out->type == VDB_VALUE_INT || !vdb_is_nan(out->number);
  }
  uint32_t length;
  if (out->type != VDB_VALUE_TEXT || left < 5) return 0;
  memcpy(&length, at, 4);
  if (length > left - 5 || at[4 + (size_t)length]) return 0;
  out->text = (const char *)at + 4;
  out->text_size = length;
  *place += 5 + (size_t)length;
  return 1;
}

/* How many values there are, or -1 if the bytes are no values, or two have one name. */
VDB_LIGHT long vdb_count_values(const unsigned char *values, size_t size) {
  size_t place = 0, before;
  vdb_value value, other;
  long count = 0;
  while (place < size) {
    size_t from = place;
    if (!vdb_next_value(values, size, &place, &value) || strlen(value.name) != values[from + 1]) return -1;
    for (before = 0; before < from;)
      if (!vdb_next_value(values, size, &before, &other) || strcmp(other.name, value.name) == 0) return -1;
    count++;
  }
  return count;
}

/* Bytes that values take when they are kept; SIZE_MAX for such as cannot be. */
VDB_LIGHT size_t vdb_values_size(const vdb_value *values, size_t count) {
  size_t bytes = 0;
  if (!values && count) return SIZE_MAX;
  for (size_t i = 0; i < count; i++) {
    const vdb_value *value = &values[i];
    size_t name = value->name ? strlen(value->name) : 0;
    if (!name || name > 255) return SIZE_MAX;
    for (size_t j = 0; j < i; j++)
      if (strcmp(values[j].name, value->name) == 0) return SIZE_MAX;
    bytes += 3 + name;
    if (value->type == VDB_VALUE_BOOL) bytes += 1;
    else if (value->type == VDB_VALUE_INT || value->type == VDB_VALUE_FLOAT) bytes += 8;
    else if (value->type == VDB_VALUE_TEXT) bytes += 5;
    else if (value->type != VDB_VALUE_NONE) return SIZE_MAX;
    if (value->type == VDB_VALUE_FLOAT && vdb_is_nan(value->number)) return SIZE_MAX;
    if (value->type != VDB_VALUE_TEXT) continue;
    if (value->text_size > INT32_MAX || (value->text_size && !value->text)) return SIZE_MAX;
    bytes += value->text_size;
    if (bytes > INT32_MAX) return SIZE_MAX;
  }
  return bytes > INT32_MAX ? SIZE_MAX : bytes;
}

VDB_LIGHT void vdb_write_values(const vdb_value *values, size_t count, unsigned char *out) {
  for (size_t i = 0; i < count; i++) {
    const vdb_value *value = &values[i];
    size_t name = strlen(value->name);
    uint32_t length = (uint32_t)value->text_size;
    *out++ = (unsigned char)value->type;
    *out++ = (unsigned char)name;
    memcpy(out, value->name, name + 1);
    out += name + 1;
    if (value->type == VDB_VALUE_BOOL) *out++ = value->integer != 0;
    if (value->type == VDB_VALUE_INT) memcpy(out, &value->integer, 8), out += 8;
    if (value->type == VDB_VALUE_FLOAT) memcpy(out, &value->number, 8), out += 8;
    if (value->type != VDB_VALUE_TEXT) continue;
    memcpy(out, &length, 4);
    if (length) memcpy(out + 4, value->text, length);
    out[4 + (size_t)length] = 0;
    out += 5 + (size_t)length;
  }
}

