/* ------------------------------------------------------------------------------------------------------------------
 * 6 Rows
 *
 * Rows live in blocks that never move: index i is row i % block_rows of block i / block_rows. Blocks made at once share
 * an allocation; those of a mapped file point into it. A removed row keeps its place until it is used again (flat: at
 * once; HNSW: after a sweep); `live` says which indices are rows.
 */
#define VDB_NO_ROW 0xffffffffu
#define VDB_SMALL 8.67361737988403547e-19 /* 2^-60 */
#define VDB_GREAT 1.15292150460684698e18  /* 2^60 */

typedef struct {
  unsigned char *vectors; /* [block_rows][dimensions] elements */
  int8_t *codes;          /* [block_rows][dimensions]; I8: the vectors themselves; otherwise NULL but for F32_I8 */
  float *norms;           /* [block_rows] the norm; -1 where it is outside 2^-60..2^60 and not 0, or not known */
  float *scales;          /* [block_rows] of the codes; NULL without codes */
  float *residuals;       /* [block_rows] at least |vector - scale * codes|; NULL unless F32_I8 */
  uint32_t *links;        /* HNSW: [block_rows][1 + 2 * options.links]: how many, then neighbours on the lowest level */
  void *memory;           /* the allocation that begins here, NULL if the block lies inside another's or in a file */
  size_t bytes;           /* of memory */
  void *spilled;          /* the same of vectors that are kept on disk: what is mapped from here on */
  size_t spilled_bytes;
  size_t place;           /* of such vectors in their file */
} vdb_block;

/* Of the levels above the lowest: tower_of[i] is where row i's begin in `towers` (0: none): the number of levels, then
 * for each level, from 1 up, how many links and options.links places. */
typedef struct {
  uint32_t entry; /* where searches begin; VDB_NO_ROW when there is none */
  uint32_t top;   /* the entry's level */
  uint32_t *tower_of;
  uint32_t *towers;
  size_t towers_size, towers_capacity; /* in uint32_t; place 0 is not used */
  struct vdb_workshop *workshop;       /* what walks and insertion need; NULL until the first of them */
} vdb_graph;

/* Ids and metadata: per row one record, { u32 id bytes, u32 metadata bytes, id, NUL, metadata }, 8-byte aligned. Each
 * is an allocation of its own, so that what a removed or replaced row had is given back at once, and nobody else's id
 * moves; those that a file brought lie together in its text, which goes when most of it is dead. The id table is open
 * addressing by vdb_hash over rows with an id. */
typedef struct {
  uint32_t users; /* the database, while a row has it, and result sets; counted atomically */
  uint32_t unused;
} vdb_record_head; /* before a record; one of a file has none */

typedef struct {
  size_t size, dead, moved; /* bytes; dead: of removed rows; moved: below this row no record is in here any more */
  uint32_t users;           /* the database and result sets; counted atomically */
  uint32_t unused;
} vdb_loaded; /* the text of a file that was read follows */

typedef struct {
  unsigned char **records; /* [row capacity]; NULL while no row has an id or metadata, and in a mapped database */
  void **borrowed;         /* [row capacity] of vdb_add_vector's metadata; NULL while none was given */
  vdb_loaded *loaded;      /* NULL if no file was read, or all of its records are gone */
  size_t bytes;            /* of records that are not in it */
  int lent;                /* an id was pointed at (vdb_get_vector): loaded ones stay where they are; set atomically */
  uint32_t *table;         /* [table_size], a power of two; VDB_NO_ROW: empty, VDB_GONE: removed */
  size_t table_size, table_used;
} vdb_records;

#define VDB_GONE 0xfffffffeu
#define VDB_MAX_ROWS 0xfffffffeu

/* An id that a mapped file's journal brought. */
typedef struct {
  uint64_t hash;
  size_t row;
} vdb_journal_id;

/* What a mapped file gives instead of vdb_records.records; offsets are checked whenever they are used. What its journal
 * says of a row's record lies beside it; the rest of the journal is written over private copies of the file's pages. */
typedef struct {
  unsigned char *base;
  size_t size;
  size_t slots;              /* of the file without its journal */
  unsigned char *arrays[6];  /* of these rows, in the order of vdb_block; NULL for those that there are not */
  size_t row_bytes[6];
  const uint64_t *offsets;   /* [slots] 1 + place in `text`, 0 for none; NULL without records */
  const unsigned char *text;
  size_t text_size;
  unsigned char ***records;  /* [pages] of [VDB_RECORD_PAGE]: the record, VDB_NO_RECORD, or NULL: as in the file. A page
                                may be NULL: all of it is as in the file */
  size_t pages;              /* 0 without a journal */
  vdb_journal_id *ids;       /* [id_count] of these records, by hash */
  size_t id_count;
  uint64_t *own;             /* [slots / 64, rounded up] bits of rows that the journal has changed */
  int own_towers;            /* the graph's towers are copies */
} vdb_mapping;

#define VDB_MAPPED_ARRAYS 6 /* arrays of a block */
#define VDB_RECORD_PAGE 1024u
#define VDB_NO_RECORD ((unsigned char *)(uintptr_t)1)

/* Which file a database is: its length and the checksum of its first bytes, which hold the checksums of the rest; and
 * the same of its journal. */
typedef struct {
  uint64_t size, base; /* with and without the journal; size 0: none */
  uint32_t crc, chain; /* of the header; of the journal's last end mark, or the header's again */
} vdb_identity;

/* What has changed since the file was read or written. */
typedef struct {
  uint64_t *whole, *part; /* [words] bits of rows: all of it; whether it is there, and its links */
  size_t words;           /* 0 for a database without a file */
  size_t free_kept;       /* the first free_rows that are as they were */
  int unknown;            /* not all changes are noted: a whole file must be written; set atomically */
  int lent;               /* the same, for ever: a vector was lent, and who has it may write to it; set atomically */
} vdb_changes;

#define VDB_FAULT_BYTES ((size_t)1 << 18) /* that one read of a mapped row may bring in: Linux maps what is around it, too */

/* What lies on disk, and how much of it may be in memory. */
typedef struct {
  size_t limit, touched; /* bytes that may come in before all is given back, 0 for any; that may have come in: atomically */
  int scans;             /* what scans and walks read counts, too */
  int on_disk;           /* vectors are kept in `file` */
  int has_file, file;    /* that, or the mapped file, open */
  size_t size;           /* of the file that vectors are kept in */
} vdb_paging;

#define VDB_KEPT_FILTERS 8

/* What a condition that was asked for was made into, until a record changes. */
typedef struct {
  unsigned char *key; /* [key_size] the condition, written out; NULL for none */
  size_t key_size;
  struct vdb_passing *passing; /* NULL if rows were asked one by one */
  size_t words;                /* of its bitset */
  uint64_t asked; /* when last */
} vdb_kept_filter;

/* Columns of values, read by searches. */
typedef struct {
  vdb_kept_filter kept[VDB_KEPT_FILTERS];
  uint64_t searches;
  struct vdb_column *columns; /* [count] */
  size_t count, capacity;
  uint64_t *touched; /* [rows / 64] rows whose record has changed since they were read */
  size_t rows;       /* columns know of the rows below */
  int any_touched;
  size_t lent; /* searches that read columns without the mutex: none may be forgotten */
#ifdef VDB_MULTITHREADED
  pthread_mutex_t mutex; /* of who reads and makes them, under a reader's lock */
#endif
} vdb_columns;

struct vdb_database {
  size_t dimensions, count;
  vdb_metric metric;
  vdb_options options;
  size_t threads;       /* options.threads, or the number of cores */
  size_t slots;         /* rows that were ever placed: every index is below */
  size_t state;         /* grows whenever rows come, go, or may have other vectors; atomically */
  size_t capacity;      /* rows that blocks and the arrays per row have room for */
  unsigned block_shift; /* block_rows = 1 << block_shift */
  vdb_block *blocks;
  size_t block_count, block_capacity;
  uint64_t *live;       /* [capacity / 64] */
  uint32_t *free_rows;  /* [free_count] indices ready to be used again, the last one first */
  size_t free_count, free_capacity;
  vdb_graph graph;
  vdb_records records;
  vdb_columns columns;
  vdb_mapping mapping;
  vdb_paging paging;
  int read_only;         /* a view of a mapped file */
  vdb_identity identity; /* of the file that was read or written last; written under the writer's mutex */
  vdb_changes changes;
  vdb_lock lock;
  vdb_pool *pool;
};

VDB_INLINE size_t vdb_element_size(vdb_storage storage) {
  return storage == VDB_STORAGE_I8 ? 1 : storage == VDB_STORAGE_F16 || storage == VDB_STORAGE_BF16 ? 2 : 4;
}
VDB_INLINE vdb_element vdb_element_of(vdb_storage storage) {
  return storage == VDB_STORAGE_F32_I8 ? VDB_F32 : (vdb_element)storage;
}
VDB_INLINE size_t vdb_block_rows(const vdb_database *db) { return (size_t)1 << db->block_shift; }
VDB_INLINE const vdb_block *vdb_block_of(const vdb_database *db, size_t row) {
  return &db->blocks[row >> db->block_shift];
}
VDB_INLINE size_t vdb_row_in_block(const vdb_database *db, size_t row) { return row & (vdb_block_rows(db) - 1); }
VDB_INLINE const void *vdb_vector_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->vectors +
         vdb_row_in_block(db, row) * db->dimensions * vdb_element_size(db->options.storage);
}
VDB_INLINE const int8_t *vdb_codes_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->codes + vdb_row_in_block(db, row) * db->dimensions;
}
VDB_INLINE float vdb_norm_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->norms[vdb_row_in_block(db, row)];
}
VDB_INLINE float vdb_scale_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->scales[vdb_row_in_block(db, row)];
}
VDB_INLINE size_t vdb_link_stride(const vdb_database *db) { return 1 + 2 * (size_t)db->options.links; }
VDB_INLINE uint32_t *vdb_links_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->links + vdb_row_in_block(db, row) * vdb_link_stride(db);
}
VDB_INLINE int vdb_is_live(const vdb_database *db, size_t row) {
  return (int)(db->live[row >> 6] >> (row & 63) & 1u);
}

/* --- sizes of a block --- */
typedef struct {
  size_t vectors, codes, norms, scales, residuals, links, total; /* where each array begins, in bytes */
} vdb_block_layout;

VDB_INLINE int vdb_has_codes(vdb_storage storage) {
  return storage == VDB_STORAGE_I8 || storage == VDB_STORAGE_F32_I8;
}

/* Bytes of a block's vectors, and what scans may read behind them. */
VDB_RARE size_t vdb_vectors_of_block(const vdb_database *db) {
  return vdb_block_rows(db) * db->dimensions * vdb_element_size(db->options.storage) + VDB_ALIGNMENT;
}

VDB_RARE vdb_block_layout vdb_layout_of(const vdb_database *db) {
  size_t rows = vdb_block_rows(db), place = 0;
  vdb_block_layout layout;
  memset(&layout, 0, sizeof layout);
  layout.vectors = place;
  if (!db->paging.on_disk) place += vdb_round_up(vdb_vectors_of_block(db), VDB_ALIGNMENT);
  layout.codes = place;
  if (db->options.storage == VDB_STORAGE_F32_I8)
    place += vdb_round_up(rows * db->dimensions + VDB_ALIGNMENT, VDB_ALIGNMENT);
  layout.norms = place;
  place += rows * sizeof(float);
  layout.scales = place;
  if (vdb_has_codes(db->options.storage)) place += rows * sizeof(float);
  layout.residuals = place;
  if (db->options.storage == VDB_STORAGE_F32_I8) place += rows * sizeof(float);
  layout.links = place;
  if (db->options.index == VDB_INDEX_HNSW) place += rows * vdb_link_stride(db) * sizeof(uint32_t);
  layout.total = vdb_round_up(place, VDB_ALIGNMENT);
  return layout;
}

VDB_ONCE void vdb_point_block(const vdb_database *db, const vdb_block_layout *layout, unsigned char *base,
                              unsigned char *vectors, vdb_block *block) {
  block->vectors = vectors ? vectors : base + layout->vectors;
  block->codes = db->options.storage == VDB_STORAGE_F32_I8 ? (int8_t *)(base + layout->codes)
                 : db->options.storage == VDB_STORAGE_I8   ? (int8_t *)block->vectors
                                                           : NULL;
  block->norms = (float *)(void *)(base + layout->norms);
  block->scales = vdb_has_codes(db->options.storage) ? (float *)(void *)(base + layout->scales) : NULL;
  block->residuals = db->options.storage == VDB_STORAGE_F32_I8 ? (float *)(void *)(base + layout->residuals) : NULL;
  block->links = db->options.index == VDB_INDEX_HNSW ? (uint32_t *)(void *)(base + layout->links) : NULL;
}

/* Scans read up to VDB_ALIGNMENT bytes past a row; after the last one there must be finite numbers, too. */
static inline void vdb_clear_after(vdb_database *db, size_t row) {
  vdb_block *block = &db->blocks[row >> db->block_shift];
  size_t end = (vdb_row_in_block(db, row) + 1) * db->dimensions;
  memset(block->vectors + end * vdb_element_size(db->options.storage), 0, VDB_ALIGNMENT);
  if (db->options.storage == VDB_STORAGE_F32_I8) memset(block->codes + end, 0, VDB_ALIGNMENT);
}

/* --- room --- */
VDB_RARE vdb_error vdb_graph_make_room(vdb_database *db, size_t rows);
static inline vdb_error vdb_graph_removed(vdb_database *db, size_t row);
VDB_RARE void vdb_graph_release(vdb_database *db);
VDB_RARE size_t vdb_graph_bytes(const vdb_database *db);
VDB_RARE void vdb_changes_make_room(vdb_database *db);
VDB_RARE void *vdb_spill(vdb_paging *paging, size_t bytes);
VDB_INLINE void vdb_touch(const vdb_database *db, size_t bytes);

/* `*array` with room for `count` items; the old content stays, what is new is zero. */
VDB_LIGHT int vdb_grow(void **array, size_t old_count, size_t count, size_t item) {
  if (count > SIZE_MAX / item) return 0;
#ifdef VDB_REALLOC
  unsigned char *grown = (unsigned char *)VDB_REALLOC(*array, count * item);
  if (!grown) return 0;
#else
  unsigned char *grown = (unsigned char *)VDB_MALLOC(count * item);
  if (!grown) return 0;
  if (old_count) memcpy(grown, *array, old_count * item);
  VDB_FREE(*array);
#endif
  memset(grown + old_count * item, 0, (count - old_count) * item);
  *array = grown;
  return 1;
}

#define VDB_SLAB_BYTES ((size_t)32 << 20) /* of blocks that are allocated together, at most */

VDB_LIGHT vdb_error vdb_make_blocks(vdb_database *db, size_t rows) {
  size_t blocks = (rows + vdb_block_rows(db) - 1) >> db->block_shift;
  if (blocks <= db->block_count) return VDB_OK;
  if (blocks > db->block_capacity) {
    size_t capacity = vdb_max(blocks, 2 * db->block_capacity);
    if (!vdb_grow((void **)&db->blocks, db->block_capacity, capacity, sizeof(vdb_block)))
      return VDB_ERROR_OUT_OF_MEMORY;
    db->block_capacity = capacity;
  }
  vdb_block_layout layout = vdb_layout_of(db);
  size_t apart = db->paging.on_disk ? vdb_round_up(vdb_vectors_of_block(db), 4096) : 0; /* whole pages */
  while (db->block_count < blocks) {
    size_t count = vdb_max(1, vdb_min(blocks - db->block_count, VDB_SLAB_BYTES / (layout.total + apart)));
    unsigned char *memory = (unsigned char *)vdb_aligned_alloc(count * layout.total);
    if (!memory) return VDB_ERROR_OUT_OF_MEMORY; /* the blocks made so far are kept for the next attempt */
    size_t place = db->paging.size;
    unsigned char *vectors = apart ? (unsigned char *)vdb_spill(&db->paging, count * apart) : NULL;
    if (apart && !vectors) return vdb_aligned_free(memory), VDB_ERROR_IO;
    vdb_advise_huge(memory, count * layout.total);
    for (size_t i = 0; i < count; i++) {
      vdb_block *block = &db->blocks[db->block_count++];
      block->memory = i ? NULL : memory;
      block->bytes = i ? 0 : count * layout.total;
      block->spilled = i ? NULL : vectors;
      block->spilled_bytes = i ? 0 : count * apart;
      block->place = place + i * apart;
      vdb_point_block(db, &layout, memory + i * layout.total, vectors ? vectors + i * apart : NULL, block);
      vdb_clear_after(db, (db->block_count << db->block_shift) - 1);
    }
  }
  return VDB_OK;
}

/* Room for indices below `rows`. */
VDB_RARE vdb_error vdb_make_room(vdb_database *db, size_t rows) {
  if (rows > VDB_MAX_ROWS) return VDB_ERROR_FULL;
  if (rows > db->capacity) {
    size_t old = db->capacity, capacity = vdb_round_up(vdb_max(rows, vdb_max(64, old + old / 2)), 64);
    if (!vdb_grow((void **)&db->live, old / 64, capacity / 64, sizeof(uint64_t)) ||
        (db->records.records &&
         !vdb_grow((void **)&db->records.records, old, capacity, sizeof(unsigned char *))) ||
        (db->records.borrowed && !vdb_grow((void **)&db->records.borrowed, old, capacity, sizeof(void *))))
      return VDB_ERROR_OUT_OF_MEMORY;
    db->capacity = capacity;
    vdb_changes_make_room(db);
  }
  vdb_error error = vdb_make_blocks(db, rows);
  if (!error && db->options.index == VDB_INDEX_HNSW) error = vdb_graph_make_room(db, rows);
  return error;
}

static inline size_t vdb_thread_count(const vdb_database *db) { return db->threads; }

/* Runs tasks 0 to tasks - 1, in any order and on any thread; all are done on return. */
VDB_ONCE void vdb_parallel(const vdb_database *db, size_t tasks, vdb_task run, void *context) {
  size_t threads = vdb_min(vdb_thread_count(db), tasks);
  if (threads > 1 && vdb_pool_run(db->pool, vdb_thread_count(db) - 1, tasks, run, context)) return;
  for (size_t task = 0; task < tasks; task++) run(context, task);
}

/* What was copied of rows is not what they are any more. */
static inline void vdb_rows_change(const vdb_database *db) {
  (void)__atomic_add_fetch(&((vdb_database *)(uintptr_t)db)->state, (size_t)1, __ATOMIC_RELAXED);
}

/* Rows that are stored and described can be found from here on. */
static inline void vdb_make_live(vdb_database *db, const uint32_t *rows, size_t count) {
  vdb_rows_change(db);
  for (size_t i = 0; i < count; i++) db->live[rows[i] >> 6] |= (uint64_t)1 << (rows[i] & 63);
  db->count += count;
}

/* A row's place may be used again. Where there is no memory to note that, it is lost until vdb_compact. */
VDB_LIGHT void vdb_free_row(vdb_database *db, size_t row) {
  if (db->free_count == db->free_capacity) {
    size_t capacity = vdb_max(64, 2 * db->free_capacity);
    if (!vdb_grow((void **)&db->free_rows, db->free_capacity, capacity, sizeof(uint32_t))) return;
    db->free_capacity = capacity;
  }
  db->free_rows[db->free_count++] = (uint32_t)row;
}

/* Noted by writers, for the next search that asks for values. */
static inline void vdb_columns_touch(vdb_columns *columns, size_t row) {
  if (row >= columns->rows) return;
  columns->touched[row >> 6] |= (uint64_t)1 << (row & 63);
  columns->any_touched = 1;
}

/* --- one row --- */
VDB_ONCE void vdb_store_vector(vdb_database *db, size_t row, const float *vector) {
  vdb_block *block = &db->blocks[row >> db->block_shift];
  size_t place = vdb_row_in_block(db, row), dimensions = db->dimensions;
  unsigned char *out = block->vectors + place * dimensions * vdb_element_size(db->options.storage);
  uint16_t *halves = (uint16_t *)(void *)out;
  vdb_touch(db, dimensions * vdb_element_size(db->options.storage));
  switch (db->options.storage) {
    case VDB_STORAGE_F32:
    case VDB_STORAGE_F32_I8: memcpy(out, vector, dimensions * sizeof(float)); break;
    case VDB_STORAGE_F16:
      for (size_t j = 0; j < dimensions; j++) halves[j] = vdb_to_f16(vector[j]);
      break;
    case VDB_STORAGE_BF16:
      for (size_t j = 0; j < dimensions; j++) halves[j] = vdb_to_bf16(vector[j]);
      break;
    case VDB_STORAGE_I8: block->scales[place] = vdb_to_i8(vector, dimensions, (int8_t *)out); break;
  }
}

VDB_ONCE void vdb_decode_row(const vdb_database *db, size_t row, float *out) {
  vdb_touch(db, VDB_FAULT_BYTES);
  float scale = db->options.storage == VDB_STORAGE_I8 ? vdb_scale_at(db, row) : 1.0f;
  vdb_active()->decode(vdb_element_of(db->options.storage), vdb_vector_at(db, row), scale, db->dimensions, out);
}

/* Norm, codes and what the codes miss, from the stored vector; `decoded` is room for one vector. */
VDB_ONCE void vdb_describe_row(vdb_database *db, size_t row, float *decoded) {
  vdb_block *block = &db->blocks[row >> db->block_shift];
  size_t place = vdb_row_in_block(db, row), dimensions = db->dimensions;
  const float *vector = (const float *)vdb_vector_at(db, row);
  if (vdb_element_of(db->options.storage) != VDB_F32) {
    vdb_decode_row(db, row, decoded);
    vector = decoded;
  }
  double sums[2];
  vdb_active()->exact(vector, vector, dimensions, 0, sums);
  double norm = sqrt(sums[1]);
  block->norms[place] = norm == 0.0 || (norm > VDB_SMALL && norm < VDB_GREAT) ? (float)norm : -1.0f;
  if (db->options.storage != VDB_STORAGE_F32_I8) return;
  int8_t *codes = block->codes + place * dimensions;
  float scale = block->scales[place] = vdb_to_i8(vector, dimensions, codes);
  double missed = 0.0;
  for (size_t j = 0; j < dimensions; j++) {
    double difference = (double)vector[j] - (double)scale * (double)codes[j];
    missed += difference * difference;
  }
  block->residuals[place] = block->norms[place] < 0.0f ? 0.0f : (float)(sqrt(missed) * 1.000001);
}

