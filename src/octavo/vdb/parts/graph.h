/* ------------------------------------------------------------------------------------------------------------------
 * 8 HNSW
 *
 * Malkov and Yashunin's graph (arXiv 1603.09320). Every row links to some of its neighbours; from any row a search
 * walks to ever nearer ones and reads a few thousand rows of millions. A row also stands on each higher level with a
 * chance of 1 in `links`, where links are long; a search begins at `entry` on the highest level and comes down.
 *
 *     block.links   [rows][1 + 2 links]  lowest level: how many, then neighbours
 *     towers        of a row that stands higher: its levels, then [levels][1 + links] likewise; tower_of says where
 *
 * A row's level follows from its number alone. Removed rows stay as way points, and are not answered, until a fifth of
 * the graph is dead; then a sweep links their neighbours past them and frees their numbers.
 *
 * Keys order rows as distances do and are cheaper: squared distance, -dot, -cosine, from the codes where there are any.
 * Whatever is answered has its exact distance. Keys decide what is looked at, so a search may miss a row; but it falls
 * back to the scan of section 7 when it found fewer than k, and when the scan is less work.
 *
 * Building is parallel and yet always the same. Rows are inserted in batches. First every row of a batch, in parallel,
 * searches the graph as it was before the batch, compares itself with the rows of the batch before it, and writes its
 * own links, which nobody sees yet. Then the links back to it are sorted by target and added, in parallel by target. So
 * no row is locked and no order is left to chance.
 *
 * Links of a mapped file are not trusted: a neighbour that is no row is passed over, a tower not inside `towers`
 * is none, and since every walk marks what it has seen, or only moves to a smaller key, it ends.
 */
#define VDB_TOP_LEVEL 15u
#define VDB_BATCH 512u       /* rows inserted at once, at most */
#define VDB_BATCH_LINKED 2u  /* levels that the rows of a batch have between them, at most: times VDB_BATCH */
#define VDB_WALKERS 64u      /* kept for the next search */
#define VDB_CHOICE 32u       /* candidates that vdb_choose_links takes at a time */

/* A row met on a walk. */
typedef struct {
  float key;
  uint32_t row, expanded; /* expanded: its neighbours have been looked at */
} vdb_near;

/* What one walk needs; one allocation. */
typedef struct {
  size_t rows, room;     /* lengths of `visited` and `pool` */
  uint16_t *visited;     /* [rows] `epoch` where the walk has been */
  vdb_near *pool;        /* [room] nearest first */
  uint32_t *fresh;       /* [gather] neighbours not seen before, */
  const void **pointers; /* their vectors or codes, */
  float *keys;           /* and keys; gather = max(2 links, VDB_PAD) */
  float *values;         /* [padded] a row as a query */
  float *decoded;        /* [padded] */
  int8_t *codes;         /* [2][padded] a row's codes as a query; the second part is zero */
  uint16_t epoch;
} vdb_walker;

/* Kept between calls, so that searches allocate nothing and an insertion cannot run out of memory half-way. */
typedef struct vdb_workshop {
  vdb_walker *spare[VDB_WALKERS]; /* taken and given back by atomic exchange */
  size_t rows;                    /* length of tower_of */
  size_t unchecked;               /* rows inserted since vdb_connect */
  uint64_t *reverse;              /* [VDB_BATCH * VDB_BATCH_LINKED * links] of one batch, see vdb_reverse */
} vdb_workshop;

/* --- links --- */

/* splitmix64 of the row number. Level l or higher has a share of links^-l. */
VDB_ONCE uint32_t vdb_level_of(size_t row, uint32_t links) {
  uint64_t hash = ((uint64_t)row + 1) * 0x9e3779b97f4a7c15u, share = UINT64_MAX / links;
  uint32_t level = 0;
  hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ hash >> 27) * 0x94d049bb133111ebu;
  hash ^= hash >> 31;
  for (; level < VDB_TOP_LEVEL && hash < share; level++) share /= links;
  return level;
}

static inline size_t vdb_tower_size(uint32_t levels, size_t links) { return 1 + levels * (1 + links); }

/* The highest level that a row stands on. */
static inline uint32_t vdb_levels_at(const vdb_database *db, size_t row) {
  const vdb_graph *graph = &db->graph;
  size_t place = graph->tower_of ? graph->tower_of[row] : 0;
  if (!place || place >= graph->towers_size) return 0;
  uint32_t levels = graph->towers[place];
  if (levels > VDB_TOP_LEVEL || vdb_tower_size(levels, db->options.links) > graph->towers_size - place) return 0;
  return levels;
}

/* How many neighbours, then neighbours, of a row on a level; NULL if it does not stand there. */
static inline uint32_t *vdb_links_of(const vdb_database *db, size_t row, uint32_t level) {
  if (!level) return vdb_links_at(db, row);
  if (level > vdb_levels_at(db, row)) return NULL;
  return db->graph.towers + db->graph.tower_of[row] + vdb_tower_size(level - 1, db->options.links);
}

VDB_INLINE size_t vdb_most_links(const vdb_database *db, uint32_t level) {
  return level ? db->options.links : 2 * (size_t)db->options.links;
}

/* How many of a list may be read: a damaged file can say anything. */
VDB_INLINE size_t vdb_link_count(const vdb_database *db, const uint32_t *links, uint32_t level) {
  return links ? vdb_min(links[0], vdb_most_links(db, level)) : 0;
}

/* --- memory --- */
VDB_RARE vdb_walker *vdb_make_walker(const vdb_database *db, size_t rows, size_t room) {
  size_t padded = vdb_padded(db->dimensions), gather = vdb_max(2 * (size_t)db->options.links, VDB_PAD);
  size_t head = vdb_round_up(sizeof(vdb_walker), VDB_ALIGNMENT), floats = 2 * padded * sizeof(float);
  size_t gathered = vdb_round_up(gather * (sizeof(void *) + sizeof(uint32_t) + sizeof(float)), VDB_ALIGNMENT);
  size_t pool = vdb_round_up(room * sizeof(vdb_near), VDB_ALIGNMENT), tags = rows * sizeof(uint16_t);
  unsigned char *place = (unsigned char *)vdb_aligned_alloc(head + floats + 2 * padded + gathered + pool + tags);
  vdb_walker *walker = (vdb_walker *)(void *)place;
  if (!walker) return NULL;
  memset(place, 0, head + floats + 2 * padded);
  walker->rows = rows;
  walker->room = room;
  walker->values = (float *)(void *)(place += head);
  walker->decoded = walker->values + padded;
  walker->codes = (int8_t *)(place += floats);
  walker->pointers = (const void **)(void *)(place += 2 * padded);
  walker->fresh = (uint32_t *)(walker->pointers + gather);
  walker->keys = (float *)(walker->fresh + gather);
  walker->pool = (vdb_near *)(void *)(place += gathered);
  walker->visited = (uint16_t *)(void *)(place + pool);
  memset(walker->visited, 0, tags);
  return walker;
}

/* The workshop of a database, made when first asked for; several readers may ask at once. */
VDB_ONCE vdb_workshop *vdb_workshop_of(const vdb_database *db) {
  vdb_workshop **place = (vdb_workshop **)(uintptr_t)&db->graph.workshop, *none = NULL;
  vdb_workshop *workshop = __atomic_load_n(place, __ATOMIC_ACQUIRE);
  if (workshop) return workshop;
  workshop = (vdb_workshop *)VDB_MALLOC(sizeof *workshop);
  if (!workshop) return NULL;
  memset(workshop, 0, sizeof *workshop);
  if (__atomic_compare_exchange_n(place, &none, workshop, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return workshop;
  VDB_FREE(workshop);
  return none;
}

VDB_ONCE void vdb_give_walker(const vdb_database *db, vdb_walker *walker) {
  vdb_workshop *workshop = vdb_workshop_of(db);
  for (size_t i = 0; walker && i < VDB_WALKERS; i++) {
    vdb_walker *none = NULL;
    if (__atomic_compare_exchange_n(&workshop->spare[i], &none, walker, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
  }
  vdb_aligned_free(walker);
}

/* A walker with room for `room` candidates; NULL if memory is short. */
VDB_ONCE vdb_walker *vdb_take_walker(const vdb_database *db, size_t room) {
  vdb_workshop *workshop = vdb_workshop_of(db);
  vdb_walker *walker = NULL;
  for (size_t i = 0; workshop && !walker && i < VDB_WALKERS; i++)
    if (__atomic_load_n(&workshop->spare[i], __ATOMIC_RELAXED))
      walker = __atomic_exchange_n(&workshop->spare[i], (vdb_walker *)NULL, __ATOMIC_ACQ_REL);
  if (!workshop || (walker && walker->rows >= db->slots && walker->room >= room)) return walker;
  size_t rows = vdb_max(db->slots, db->capacity);
  vdb_walker *larger = vdb_make_walker(db, vdb_max(rows, walker ? walker->rows : 0),
                                       vdb_max(room, walker ? walker->room : db->options.build_effort));
  if (!larger)
    vdb_give_walker(db, walker);
  else
    vdb_aligned_free(walker);
  return larger;
}

static inline void vdb_start_walk(vdb_walker *walker) {
  if (++walker->epoch) return;
  memset(walker->visited, 0, walker->rows * sizeof(uint16_t));
  walker->epoch = 1;
}

/* Candidates that insertion handles at once: of a search, or all that want to be neighbours of one row. */
static inline size_t vdb_build_room(const vdb_database *db) {
  return vdb_max(db->options.build_effort, 2 * (size_t)db->options.links + VDB_BATCH) + 1;
}

/* Room for towers of rows below `rows` that have none yet. */
VDB_LIGHT vdb_error vdb_make_towers(vdb_database *db, size_t rows) {
  vdb_graph *graph = &db->graph;
  size_t wanted = vdb_max(1, graph->towers_size), links = db->options.links;
  for (size_t row = 0; row < rows; row++) {
    uint32_t levels = graph->tower_of[row] ? 0 : vdb_level_of(row, (uint32_t)links);
    if (levels) wanted += vdb_tower_size(levels, links);
  }
  if (wanted > UINT32_MAX) wanted = UINT32_MAX; /* rows that find no place there stand on the lowest level only */
  if (wanted <= graph->towers_capacity) return VDB_OK;
  if (!vdb_grow((void **)&graph->towers, graph->towers_capacity, wanted, sizeof(uint32_t)))
    return VDB_ERROR_OUT_OF_MEMORY;
  graph->towers_capacity = wanted;
  graph->towers_size = vdb_max(1, graph->towers_size);
  return VDB_OK;
}

/* After it, inserting rows below `rows` cannot fail for want of memory. */
VDB_RARE vdb_error vdb_graph_make_room(vdb_database *db, size_t rows) {
  vdb_workshop *workshop = vdb_workshop_of(db);
  if (!workshop) return VDB_ERROR_OUT_OF_MEMORY;
  if (!workshop->rows && db->graph.tower_of) workshop->rows = db->slots; /* read from a file */
  size_t old = workshop->rows, room = vdb_build_room(db);
  if (rows > old) {
    size_t grown = vdb_min(vdb_max(rows, vdb_max(64, old + old / 2)), VDB_MAX_ROWS);
    if (!vdb_grow((void **)&db->graph.tower_of, old, grown, sizeof(uint32_t))) return VDB_ERROR_OUT_OF_MEMORY;
    workshop->rows = grown;
  }
  if (rows > old || !db->graph.towers_capacity) {
    vdb_error error = vdb_make_towers(db, workshop->rows);
    if (error) {
      workshop->rows = old; /* the next attempt must look again */
      return error;
    }
  }
  if (!workshop->reverse)
    workshop->reverse = (uint64_t *)VDB_MALLOC(sizeof(uint64_t) * VDB_BATCH * VDB_BATCH_LINKED * db->options.links);
  if (!workshop->reverse) return VDB_ERROR_OUT_OF_MEMORY;
  for (size_t i = 0; i < vdb_min(vdb_thread_count(db), VDB_WALKERS); i++) {
    vdb_walker *old_walker = workshop->spare[i];
    if (old_walker && old_walker->rows >= rows && old_walker->room >= room) continue;
    vdb_walker *walker = vdb_make_walker(db, vdb_max(workshop->rows, db->capacity), room);
    if (!walker) return VDB_ERROR_OUT_OF_MEMORY;
    workshop->spare[i] = walker;
    vdb_aligned_free(old_walker);
  }
  return VDB_OK;
}

VDB_RARE void vdb_graph_release(vdb_database *db) {
  vdb_workshop *workshop = db->graph.workshop;
  if (!db->mapping.base || db->mapping.own_towers) { /* otherwise they lie in the file */
    VDB_FREE(db->graph.tower_of);
    VDB_FREE(db->graph.towers);
  }
  for (size_t i = 0; workshop && i < VDB_WALKERS; i++) vdb_aligned_free(workshop->spare[i]);
  if (workshop) VDB_FREE(workshop->reverse);
  VDB_FREE(workshop);
  memset(&db->graph, 0, sizeof db->graph);
  db->graph.entry = VDB_NO_ROW;
}

/* Memory of the towers; what walks use is not counted. */
VDB_RARE size_t vdb_graph_bytes(const vdb_database *db) {
  size_t rows = db->graph.workshop ? vdb_max(db->graph.workshop->rows, db->slots) : db->slots;
  return db->graph.tower_of ? (rows + db->graph.towers_capacity) * sizeof(uint32_t) : 0;
}

/* --- keys --- */

/* A query for keys. For cosine it has the norm 1. */
typedef struct {
  vdb_probe probe;
  const float *values; /* as in probe; NULL if the query is the row `row` */
  uint32_t row;
  float offset;        /* Euclidean by codes: the query's squared norm */
  int codes;           /* by codes */
  int wild;            /* the query is a row whose norm is outside the normal range */
} vdb_aim;

VDB_ONCE vdb_aim vdb_aim_at_question(const vdb_database *db, const vdb_question *question, int codes) {
  vdb_aim aim;
  aim.probe = question->probe;
  aim.values = question->probe.values;
  aim.row = VDB_NO_ROW;
  aim.codes = codes;
  aim.wild = 0;
  aim.offset = db->metric == VDB_METRIC_EUCLIDEAN ? (float)question->square : 0.0f;
  aim.probe.low_scale = 0.0f; /* one part is as fine as the rows' own codes */
  return aim;
}

/* A row as the query. What it points at is in the walker, until the next. */
VDB_ONCE vdb_aim vdb_aim_at_row(const vdb_database *db, uint32_t row, int codes, vdb_walker *walker) {
  size_t dimensions = db->dimensions;
  float norm = vdb_norm_at(db, row);
  float factor = db->metric == VDB_METRIC_COSINE && norm > 0.0f ? 1.0f / norm : 1.0f;
  vdb_aim aim;
  memset(&aim, 0, sizeof aim);
  aim.row = row;
  aim.wild = norm < 0.0f;
  aim.codes = codes;
  aim.offset = db->metric == VDB_METRIC_EUCLIDEAN ? norm * norm : 0.0f;
  if (aim.codes) {
    memcpy(walker->codes, vdb_codes_at(db, row), dimensions);
    for (size_t j = 0; j < dimensions; j++) aim.probe.high_sum += walker->codes[j];
    aim.probe.high = walker->codes;
    aim.probe.low = walker->codes + vdb_padded(dimensions);
    aim.probe.high_scale = vdb_scale_at(db, row) * factor;
    return aim;
  }
  vdb_decode_row(db, row, walker->values);
  if (db->metric == VDB_METRIC_COSINE)
    for (size_t j = 0; j < dimensions; j++) walker->values[j] *= factor;
  aim.probe.values = walker->values;
  return aim;
}

/* The key in double, for rows that a float's range does not bear. Slow, and rare. */
VDB_ONCE float vdb_wild_key(const vdb_database *db, const vdb_aim *aim, uint32_t row, vdb_walker *walker) {
  double dot = 0.0, squares = 0.0, query_square = 0.0, row_square = 0.0, key;
  if (!aim->values) vdb_decode_row(db, aim->row, walker->values);
  vdb_decode_row(db, row, walker->decoded);
  for (size_t j = 0; j < db->dimensions; j++) {
    double q = aim->values ? (double)aim->values[j] : (double)walker->values[j], x = (double)walker->decoded[j];
    dot += q * x;
    squares += (q - x) * (q - x);
    query_square += q * q;
    row_square += x * x;
  }
  key = db->metric == VDB_METRIC_EUCLIDEAN ? squares : -dot;
  if (db->metric == VDB_METRIC_COSINE) key = row_square > 0.0 && query_square > 0.0 ? -dot / sqrt(row_square) : 0.0;
  if (db->metric == VDB_METRIC_COSINE && !aim->values && query_square > 0.0) key /= sqrt(query_square);
  if (!aim->values && !aim->codes) { /* put the query back as it was */
    vdb_aim again = vdb_aim_at_row(db, aim->row, 0, walker);
    (void)again;
  }
  return key > 3.0e38 ? 3.0e38f : key < -3.0e38 ? -3.0e38f : (float)key;
}

/* keys[i] of rows[i]; all rows are below db->slots, and count is at most the walker's gather. */
VDB_ONCE void vdb_find_keys(const vdb_database *db, const vdb_aim *aim, const uint32_t *rows, size_t count,
                                 vdb_walker *walker, float *keys) {
  const vdb_kernel_set *kernels = vdb_active();
  vdb_element element = vdb_element_of(db->options.storage);
  vdb_metric metric = db->metric;
  if (db->paging.scans || !aim->codes) vdb_touch(db, count * VDB_FAULT_BYTES);
  for (size_t i = 0; i < count; i++)
    walker->pointers[i] = aim->codes ? (const void *)vdb_codes_at(db, rows[i]) : vdb_vector_at(db, rows[i]);
  if (aim->codes)
    kernels->dots_i8(&aim->probe, walker->pointers, count, db->dimensions, keys);
  else if (metric == VDB_METRIC_EUCLIDEAN)
    kernels->squares[element](aim->probe.values, walker->pointers, count, db->dimensions, keys);
  else
    kernels->dots[element](aim->probe.values, walker->pointers, count, db->dimensions, keys);
  for (size_t i = 0; i < count; i++) {
    const vdb_block *block = vdb_block_of(db, rows[i]);
    size_t place = vdb_row_in_block(db, rows[i]);
    float norm = block->norms[place], dot = aim->codes ? keys[i] * block->scales[place] : keys[i];
    if (aim->wild || norm < 0.0f)
      keys[i] = vdb_wild_key(db, aim, rows[i], walker);
    else if (metric == VDB_METRIC_COSINE)
      keys[i] = norm > 0.0f ? -dot / norm : 0.0f;
    else if (metric == VDB_METRIC_DOT_PRODUCT)
      keys[i] = -dot;
    else if (aim->codes)
      keys[i] = aim->offset + norm * norm - 2.0f * dot;
  }
}

static inline float vdb_key_at(const vdb_database *db, const vdb_aim *aim, uint32_t row, vdb_walker *walker) {
  float key;
  vdb_find_keys(db, aim, &row, 1, walker, &key);
  return key;
}

/* Whether codes are too coarse to tell the rows of a sorted pool apart, as when all rows are far from the origin and
 * near each other: `plain` aims at the same query by the vectors, and the nearest few say how wrong keys are. */
VDB_ONCE int vdb_codes_blur(const vdb_database *db, const vdb_aim *plain, const vdb_near *pool, size_t count,
                                 vdb_walker *walker) {
  uint32_t rows[4] = {0, 0, 0, 0};
  float keys[4], error = 0.0f;
  size_t some = vdb_min(count, 4);
  for (size_t i = 0; i < some; i++) rows[i] = pool[i].row;
  vdb_find_keys(db, plain, rows, some, walker, keys);
  for (size_t i = 0; i < some; i++) error = fabsf(keys[i] - pool[i].key) > error ? fabsf(keys[i] - pool[i].key) : error;
  return count > 1 && error * 8.0f > pool[count - 1].key - pool[0].key;
}

VDB_ONCE int vdb_row_blurs(const vdb_database *db, const vdb_aim *aim, size_t count, vdb_walker *walker) {
  if (!aim->codes || db->options.storage != VDB_STORAGE_F32_I8) return 0;
  vdb_aim plain = vdb_aim_at_row(db, aim->row, 0, walker);
  return vdb_codes_blur(db, &plain, walker->pool, count, walker);
}

/* Asks for what vdb_find_keys will read. */
VDB_INLINE void vdb_prefetch_near(const vdb_database *db, const vdb_aim *aim, size_t row) {
  const vdb_block *block = vdb_block_of(db, row);
  size_t place = vdb_row_in_block(db, row);
  size_t bytes = db->dimensions * (aim->codes ? 1 : vdb_element_size(db->options.storage));
  const char *from = (aim->codes ? (const char *)block->codes : (const char *)block->vectors) + place * bytes;
  if (aim->codes || db->metric == VDB_METRIC_COSINE) __builtin_prefetch(block->norms + place);
  if (aim->codes) __builtin_prefetch(block->scales + place);
  if (bytes > 1024) bytes = 1024; /* the machine itself sees where the rest is */
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* --- walking --- */

/* Enters a row into a sorted pool of at most `most`; returns its place, `most` if it is too far. */
static inline size_t vdb_pool_enter(vdb_near *pool, size_t *count, size_t most, float key, uint32_t row) {
  size_t low = 0, high = *count;
  if (high == most && !(key < pool[most - 1].key)) return most;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (pool[middle].key < key) low = middle + 1;
    else high = middle;
  }
  if (low == most) return most; /* only a key that is not a number gets here */
  memmove(pool + low + 1, pool + low, ((*count < most ? *count : most - 1) - low) * sizeof *pool);
  pool[low].key = key;
  pool[low].row = row;
  pool[low].expanded = 0;
  if (*count < most) ++*count;
  return low;
}

/* Neighbours of a row on a level into walker->fresh: all, or those that the walk has not met. */
static inline size_t vdb_gather(const vdb_database *db, const vdb_aim *aim, uint32_t row, uint32_t level, int unmet,
                                vdb_walker *walker) {
  const uint32_t *links = vdb_links_of(db, row, level);
  size_t count = vdb_link_count(db, links, level), kept = 0;
  for (size_t i = 1; i <= count; i++) {
    uint32_t other = links[i];
    if (other >= db->slots) continue;
    walker->fresh[kept] = other;
    kept += (size_t)(!unmet | (walker->visited[other] != walker->epoch)); /* no branch: it could not be foreseen */
    if (unmet) walker->visited[other] = walker->epoch;
  }
  for (size_t i = 0; i < kept; i++) vdb_prefetch_near(db, aim, walker->fresh[i]);
  return kept;
}

/* From `at` to ever nearer rows of one level, until none is nearer. */
static inline vdb_near vdb_descend(const vdb_database *db, const vdb_aim *aim, vdb_near at, uint32_t level,
                                   vdb_walker *walker) {
  for (;;) {
    uint32_t before = at.row;
    size_t count = vdb_gather(db, aim, before, level, 0, walker);
    vdb_find_keys(db, aim, walker->fresh, count, walker, walker->keys);
    for (size_t i = 0; i < count; i++)
      if (walker->keys[i] < at.key) at.key = walker->keys[i], at.row = walker->fresh[i];
    if (at.row == before) return at;
  }
}

/* The `effort` nearest rows of one level that are found from `start`, into walker->pool. */
static inline size_t vdb_walk(const vdb_database *db, const vdb_aim *aim, vdb_near start, uint32_t level, size_t effort,
                              vdb_walker *walker) {
  vdb_near *pool = walker->pool;
  size_t count = 1, place = 0;
  vdb_start_walk(walker);
  walker->visited[start.row] = walker->epoch;
  pool[0] = start;
  pool[0].expanded = 0;
  while (place < count) {
    if (pool[place].expanded) {
      place++;
      continue;
    }
    pool[place].expanded = 1;
    size_t fresh = vdb_gather(db, aim, pool[place].row, level, 1, walker), nearest = effort, next = place + 1;
    while (next < count && pool[next].expanded) next++;
    if (next < count && !level) __builtin_prefetch(vdb_links_at(db, pool[next].row));
    vdb_find_keys(db, aim, walker->fresh, fresh, walker, walker->keys);
    for (size_t i = 0; i < fresh; i++) {
      if (count == effort && !(walker->keys[i] < pool[count - 1].key)) continue;
      nearest = vdb_min(nearest, vdb_pool_enter(pool, &count, effort, walker->keys[i], walker->fresh[i]));
    }
    place = nearest <= place ? nearest : place + 1;
  }
  return count;
}

/* From the entry down to `level`. */
VDB_ONCE vdb_near vdb_approach(const vdb_database *db, const vdb_aim *aim, uint32_t level, vdb_walker *walker) {
  vdb_near at = {0.0f, db->graph.entry, 0};
  at.key = vdb_key_at(db, aim, at.row, walker);
  for (uint32_t l = vdb_min(db->graph.top, VDB_TOP_LEVEL); l > level; l--) at = vdb_descend(db, aim, at, l, walker);
  return at;
}

