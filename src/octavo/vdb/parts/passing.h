/* --- rows that pass a condition ---
 *
 * What a condition was made into: a bitset, how many live rows that is, and, where they are few and it is asked for
 * again, a copy of all that a scan reads of them, in one piece: their own places are so far apart that a scan of 1% of the
 * rows waits for memory five times a row. It never changes; those who search by it and the columns that keep it count
 * themselves as its users.
 */
#define VDB_PACKED_SHARE 16u /* kept copies have at most one row in so many of all, together */

typedef struct vdb_passing {
  size_t users;     /* counted atomically */
  size_t words;
  size_t count;     /* live rows that pass, of the state of the rows below; before a copy was thought of, at most so many */
  size_t state;     /* db->state when they were counted and copied */
  int tried;        /* whether there was a reason to copy them */
  uint32_t *packed; /* [count] ascending; NULL for no copy */
  vdb_block rows;   /* the copy: what scans read, and norms, scales and residuals; one allocation with `packed` */
  uint64_t *bits;   /* [words] behind this; those of rows that are gone mean nothing */
} vdb_passing;

/* Room for a bitset, with one user; NULL for want of memory. */
VDB_RARE vdb_passing *vdb_passing_make(size_t words) {
  vdb_passing *passing = (vdb_passing *)VDB_MALLOC(sizeof *passing + (words + 1) * sizeof(uint64_t));
  if (!passing) return NULL;
  memset(passing, 0, sizeof *passing);
  passing->users = 1;
  passing->words = words;
  passing->state = SIZE_MAX;
  passing->bits = (uint64_t *)(void *)(passing + 1);
  return passing;
}

static inline void vdb_passing_enter(vdb_passing *passing) { (void)__atomic_add_fetch(&passing->users, (size_t)1, __ATOMIC_RELAXED); }

static inline void vdb_passing_leave(vdb_passing *passing) {
  if (!passing || __atomic_sub_fetch(&passing->users, (size_t)1, __ATOMIC_ACQ_REL)) return;
  vdb_aligned_free(passing->rows.memory);
  VDB_FREE(passing);
}

/* Whether rows are as they were when those that pass were counted and copied. */
static inline int vdb_passing_holds(const vdb_database *db, const vdb_passing *passing) {
  return passing && passing->state == __atomic_load_n(&db->state, __ATOMIC_RELAXED);
}

/* Counts those that are there, unless it is known what they are `at_most`. */
VDB_ONCE void vdb_passing_count(const vdb_database *db, vdb_passing *passing, size_t at_most) {
  passing->state = __atomic_load_n(&db->state, __ATOMIC_RELAXED);
  passing->count = at_most < SIZE_MAX ? at_most : vdb_active()->count(passing->bits, db->live, passing->words);
}

VDB_RARE size_t vdb_passing_bytes(const vdb_passing *passing) {
  return passing ? sizeof *passing + passing->words * sizeof(uint64_t) + passing->rows.bytes : 0;
}

/* Copies what scans read of the rows that pass, which have been counted. Without memory there is no copy. */
VDB_ONCE void vdb_passing_pack(const vdb_database *db, vdb_passing *passing) {
  int codes = vdb_has_codes(db->options.storage), both = db->options.storage == VDB_STORAGE_F32_I8;
  size_t count = passing->count, stride = db->dimensions * (codes ? 1 : vdb_element_size(db->options.storage));
  size_t numbers = vdb_round_up(count * sizeof(float), VDB_ALIGNMENT), place = 0;
  size_t bytes = vdb_round_up(count * stride + VDB_ALIGNMENT, VDB_ALIGNMENT) + (size_t)(2 + codes + both) * numbers;
  unsigned char *memory = (unsigned char *)vdb_aligned_alloc(bytes);
  if (!memory) return;
  vdb_block *rows = &passing->rows;
  rows->memory = memory;
  rows->bytes = bytes;
  rows->vectors = memory;
  rows->codes = codes ? (int8_t *)memory : NULL;
  passing->packed = (uint32_t *)(void *)(memory + bytes - numbers);
  rows->norms = (float *)(void *)(memory + bytes - 2 * numbers);
  rows->scales = codes ? (float *)(void *)(memory + bytes - 3 * numbers) : NULL;
  rows->residuals = both ? (float *)(void *)(memory + bytes - 4 * numbers) : NULL;
  for (size_t word = 0; word < passing->words; word++) {
    for (uint64_t bits = passing->bits[word] & db->live[word]; bits; bits &= bits - 1, place++) {
      size_t row = (word << 6) + (size_t)__builtin_ctzll(bits), at = vdb_row_in_block(db, row);
      const vdb_block *block = vdb_block_of(db, row);
      memcpy(memory + place * stride, (codes ? (const unsigned char *)block->codes : block->vectors) + at * stride, stride);
      passing->packed[place] = (uint32_t)row;
      rows->norms[place] = block->norms[at];
      if (codes) rows->scales[place] = block->scales[at];
      if (both) rows->residuals[place] = block->residuals[at];
    }
  }
  memset(memory + count * stride, 0, VDB_ALIGNMENT); /* scans read past the last row */
}
