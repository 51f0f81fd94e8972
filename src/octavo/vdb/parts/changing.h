/* --- adding --- */
typedef struct {
  vdb_database *db;
  const float *vectors;
  const uint32_t *rows;
  float *decoded; /* [tasks][padded] */
  size_t count, per_task;
  vdb_watch *watch; /* NULL for none */
} vdb_store_job;

#define VDB_STORED_UNASKED 64u /* rows between two questions whether to go on */

static inline void vdb_store_task(void *context, size_t task) {
  vdb_store_job *job = (vdb_store_job *)context;
  size_t end = vdb_min(job->count, (task + 1) * job->per_task), dimensions = job->db->dimensions;
  for (size_t i = task * job->per_task; i < end; i++) {
    if (job->watch && i % VDB_STORED_UNASKED == 0 && vdb_watch_stops(job->watch, 0, job->count)) return;
    vdb_store_vector(job->db, job->rows[i], job->vectors + i * dimensions);
    vdb_describe_row(job->db, job->rows[i], job->decoded + task * vdb_padded(dimensions));
  }
}

static inline vdb_error vdb_store_rows(vdb_database *db, const float *vectors, const uint32_t *rows, size_t count,
                                       vdb_watch *watch) {
  vdb_store_job job = {db, vectors, rows, NULL, count, vdb_max(1, (count + 63) / 64), count < 1024 ? NULL : watch};
  if (count * db->dimensions < 65536) job.per_task = count;
  size_t tasks = (count + job.per_task - 1) / job.per_task;
  job.decoded = (float *)vdb_aligned_alloc(tasks * vdb_padded(db->dimensions) * sizeof(float));
  if (!job.decoded) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_parallel(db, tasks, vdb_store_task, &job);
  vdb_aligned_free(job.decoded);
  return watch && watch->stopped ? VDB_ERROR_INTERRUPTED : VDB_OK;
}

/* A row leaves: it is not found any more, its id neither. */
VDB_LIGHT void vdb_drop_row(vdb_database *db, size_t row) {
  vdb_rows_change(db);
  vdb_mark_part(db, row);
  vdb_drop_record(db, row);
  db->live[row >> 6] &= ~((uint64_t)1 << (row & 63));
  db->count--;
  if (db->options.index == VDB_INDEX_FLAT) vdb_free_row(db, row);
  else (void)vdb_graph_removed(db, row); /* want of memory only puts the sweep off */
}

/* The id of a new row: asked for several times, measured once. */
typedef struct {
  size_t size;
  uint64_t hash;
} vdb_name;

static inline vdb_name vdb_name_of(const vdb_record *record) {
  vdb_name name = {record->id ? strlen(record->id) : 0, 0};
  if (name.size && name.size <= VDB_MAX_ID) name.hash = vdb_hash(record->id, name.size);
  return name;
}

/* Whether an id is twice in a call, or there already. Counts those that are. */
VDB_LIGHT vdb_error vdb_check_new_names(const vdb_database *db, size_t count, const vdb_record *records,
                                            const vdb_name *names, vdb_add_mode mode, size_t ids, size_t *known) {
  size_t size = 16;
  vdb_error error = VDB_OK;
  while (size < 2 * ids) size *= 2;
  uint32_t *seen = (uint32_t *)VDB_MALLOC(size * sizeof(uint32_t));
  if (!seen) return VDB_ERROR_OUT_OF_MEMORY;
  memset(seen, 0xff, size * sizeof(uint32_t));
  for (size_t i = 0; i < count && !error; i++) {
    size_t length = names[i].size, at = 0;
    if (!length) continue;
    if (vdb_table_seek(db, records[i].id, length, names[i].hash, &at) != VDB_NO_ROW) {
      if (mode == VDB_ADD_UNIQUE) error = VDB_ERROR_DUPLICATE_ID;
      ++*known;
    }
    size_t place = (size_t)names[i].hash & (size - 1);
    for (; seen[place] != VDB_NO_ROW && !error; place = (place + 1) & (size - 1))
      if (names[seen[place]].hash == names[i].hash && strcmp(records[seen[place]].id, records[i].id) == 0)
        error = VDB_ERROR_DUPLICATE_ID;
    seen[place] = (uint32_t)i;
  }
  VDB_FREE(seen);
  return error;
}

VDB_LIGHT int vdb_valid_metadata(const vdb_record *record) {
  if (record->value_count && record->metadata_size) return 0;
  if (record->metadata_size && !record->metadata) return 0;
  return vdb_metadata_size(record) <= INT32_MAX;
}

/* Whether records may be added: sizes, ids twice in the call, ids there already. Counts ids, and those known. */
VDB_LIGHT vdb_error vdb_check_new_records(const vdb_database *db, size_t count, const vdb_record *records,
                                              vdb_name *names, vdb_add_mode mode, size_t *ids, size_t *known) {
  *ids = *known = 0;
  for (size_t i = 0; records && i < count; i++) {
    names[i] = vdb_name_of(&records[i]);
    if (names[i].size > VDB_MAX_ID || !vdb_valid_metadata(&records[i])) return VDB_ERROR_INVALID_ARGUMENT;
    *ids += names[i].size != 0;
  }
  if (mode == VDB_ADD_ANY || !*ids) return VDB_OK;
  return vdb_check_new_names(db, count, records, names, mode, *ids, known);
}

/* Takes rows for `count` vectors: free ones first, the last freed first, then new ones. */
static inline void vdb_take_rows(vdb_database *db, size_t count, uint32_t *rows) {
  for (size_t i = 0; i < count; i++) {
    rows[i] = db->free_count ? db->free_rows[--db->free_count] : (uint32_t)db->slots++;
    vdb_mark_whole(db, rows[i]);
  }
  db->changes.free_kept = vdb_min(db->changes.free_kept, db->free_count);
}

/* As if vdb_take_rows had not been called; the rows hold nothing that is found. */
static inline void vdb_return_rows(vdb_database *db, size_t count, const uint32_t *rows, size_t old_slots) {
  db->slots = old_slots;
  for (size_t i = count; i-- > 0;)
    if (rows[i] < old_slots) vdb_free_row(db, rows[i]);
}

/* Drops the rows of the ids that a call replaces, but for those just added: their copies of the ids are asked for, since
 * the caller's may be what vdb_get_vector gave for a row that is dropped. */
static inline void vdb_drop_replaced(vdb_database *db, const uint32_t *rows, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const char *id;
    const unsigned char *metadata;
    size_t length, size, place = 0;
    uint32_t row;
    vdb_record_at(db, rows[i], &id, &length, &metadata, &size);
    while (length && (row = vdb_table_next(db, id, length, &place)) != VDB_NO_ROW)
      if (row != rows[i]) vdb_drop_row(db, row);
  }
}

/* Stores rows that have their place; they are not live yet. */
VDB_LIGHT vdb_error vdb_fill_rows(vdb_database *db, const float *vectors, const vdb_record *records,
                                      const vdb_name *names, const uint32_t *rows, size_t count, vdb_watch *watch) {
  vdb_error error = vdb_store_rows(db, vectors, rows, count, watch);
  size_t done = 0;
  while (records && done < count && !error) {
    error = vdb_put_record(db, rows[done], &records[done], names[done].size, names[done].hash);
    if (!error) done++;
  }
  if (error)
    for (size_t i = 0; i < done; i++) vdb_drop_record(db, rows[i]);
  else
    vdb_clear_after(db, db->slots - 1);
  return error;
}

/* Under the writer's lock. `rows` [count] is filled; `names` is room for as many. */
VDB_LIGHT vdb_error vdb_add_named(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                                      vdb_name *names, vdb_add_mode mode, vdb_watch *watch, uint32_t *rows) {
  size_t ids, known, old_slots;
  vdb_error error = vdb_check_new_records(db, count, records, names, mode, &ids, &known);
  if (error) return error;
  if (db->options.index == VDB_INDEX_HNSW) (void)vdb_graph_removed(db, 0); /* what an interrupted call has left */
  size_t reused = vdb_min(count, db->free_count);
  old_slots = db->slots;
  if (count - reused > VDB_MAX_ROWS - db->slots) return VDB_ERROR_FULL;
  error = vdb_make_room(db, db->slots + count - reused);
  if (!error && ids) error = vdb_table_room(db, ids);
  if (error) return error;
  vdb_take_rows(db, count, rows);
  error = vdb_fill_rows(db, vectors, records, names, rows, count, watch);
  if (error) {
    vdb_return_rows(db, count, rows, old_slots);
    return error;
  }
  if (db->options.index == VDB_INDEX_HNSW) error = vdb_graph_insert(db, rows, count, watch);
  else vdb_make_live(db, rows, count);
  if (error) {
    for (size_t i = 0; i < count && db->records.records; i++) vdb_drop_record(db, rows[i]);
    return error;
  }
  if (known && mode == VDB_ADD_REPLACE) vdb_drop_replaced(db, rows, count);
  return VDB_OK;
}

VDB_LIGHT vdb_error vdb_add_rows(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                                     vdb_add_mode mode, vdb_watch *watch, uint32_t *rows) {
  vdb_name few[16], *names = few;
  if (records && count > 16 && !(names = (vdb_name *)VDB_MALLOC(count * sizeof(vdb_name))))
    return VDB_ERROR_OUT_OF_MEMORY;
  vdb_error error = vdb_add_named(db, vectors, count, records, names, mode, watch, rows);
  if (names != few) VDB_FREE(names);
  return error;
}

VDB_LIGHT int vdb_storable(const vdb_database *db, const float *vectors, size_t count) {
  if (!vdb_all_finite(vectors, count)) return 0;
  float limit = db->options.storage == VDB_STORAGE_F16 ? 65519.996f : vdb_from_bits(0x7f7f7fffu); /* rounds to finite */
  if (db->options.storage != VDB_STORAGE_F16 && db->options.storage != VDB_STORAGE_BF16) return 1;
  for (size_t i = 0; i < count; i++)
    if (fabsf(vectors[i]) > limit) return 0;
  return 1;
}

VDB_API vdb_error vdb_add_watched(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                                  vdb_add_mode mode, uint64_t *indices,
                                  int (*go_on)(size_t done, size_t count, void *context), void *context) {
  vdb_watch watch;
  vdb_watch_make(&watch, go_on, context);
  if (!db || (!vectors && count)) return VDB_ERROR_NULL_POINTER;
  if ((unsigned)mode > 2) return VDB_ERROR_INVALID_ARGUMENT;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!count) return VDB_OK;
  if (count > VDB_MAX_ROWS) return VDB_ERROR_FULL;
  if (!vdb_storable(db, vectors, count * db->dimensions)) return VDB_ERROR_NOT_FINITE;
  uint32_t few[16], *rows = count <= 16 ? few : (uint32_t *)VDB_MALLOC(count * sizeof(uint32_t));
  if (!rows) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_add_rows(db, vectors, count, records, mode, go_on ? &watch : NULL, rows);
  vdb_leave_write(&db->lock);
  for (size_t i = 0; i < count && !error && indices; i++) indices[i] = rows[i];
  if (rows != few) VDB_FREE(rows);
  return error;
}

VDB_API vdb_error vdb_add(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                          vdb_add_mode mode, uint64_t *indices) {
  return vdb_add_watched(db, vectors, count, records, mode, indices, NULL, NULL);
}

VDB_API vdb_error vdb_reserve(vdb_database *db, size_t count) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = count > VDB_MAX_ROWS - db->slots ? VDB_ERROR_FULL : vdb_make_room(db, db->slots + count);
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_add_vector(vdb_database *db, const float *data, const char *id, void *metadata) {
  vdb_record record = {id, NULL, 0, NULL, 0};
  uint32_t row;
  if (!db || !data) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!vdb_storable(db, data, db->dimensions)) return VDB_ERROR_NOT_FINITE;
  vdb_enter_write(&db->lock);
  vdb_error error = VDB_OK;
  if (metadata && !db->records.borrowed) {
    error = vdb_make_room(db, db->slots + 1);
    if (!error && !vdb_grow((void **)&db->records.borrowed, 0, db->capacity, sizeof(void *)))
      error = VDB_ERROR_OUT_OF_MEMORY;
  }
  if (!error) error = vdb_add_rows(db, data, 1, &record, VDB_ADD_ANY, NULL, &row);
  if (!error && metadata) db->records.borrowed[row] = metadata;
  vdb_leave_write(&db->lock);
  return error;
}

/* --- single rows --- */
VDB_API vdb_error vdb_find(const vdb_database *db, const char *id, uint64_t *index) {
  if (!db || !id || !index) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  uint32_t row = vdb_lowest_row(db, id, strlen(id));
  vdb_leave_read(vdb_lock_of(db));
  if (row == VDB_NO_ROW || !*id) return VDB_ERROR_NOT_FOUND;
  *index = row;
  return VDB_OK;
}

static inline int vdb_is_row(const vdb_database *db, uint64_t index) {
  return index < db->slots && vdb_is_live(db, (size_t)index);
}

VDB_API vdb_error vdb_read_vector(const vdb_database *db, uint64_t index, float *vector) {
  vdb_error error = VDB_ERROR_INVALID_INDEX;
  if (!db || !vector) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  if (vdb_is_row(db, index)) {
    vdb_decode_row(db, (size_t)index, vector);
    error = VDB_OK;
  }
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

VDB_API vdb_error vdb_read_record(const vdb_database *db, uint64_t index, vdb_record *out) {
  vdb_error error = VDB_ERROR_INVALID_INDEX;
  if (!db || !out) return VDB_ERROR_NULL_POINTER;
  memset(out, 0, sizeof *out);
  vdb_enter_read(vdb_lock_of(db));
  if (vdb_is_row(db, index)) {
    const char *id;
    const unsigned char *metadata;
    size_t id_size, metadata_size;
    error = VDB_OK;
    if (vdb_record_at(db, (size_t)index, &id, &id_size, &metadata, &metadata_size)) {
      char *copy = (char *)VDB_MALLOC(id_size + 1 + metadata_size);
      if (copy) {
        if (id) memcpy(copy, id, id_size);
        copy[id_size] = 0;
        memcpy(copy + id_size + 1, metadata, metadata_size);
        out->id = copy;
        out->metadata = copy + id_size + 1;
        out->metadata_size = metadata_size;
        if (vdb_has_values(db, (size_t)index)) {
          long values = vdb_count_values(metadata, metadata_size); /* -1 in a damaged mapped file */
          out->value_count = values > 0 ? (size_t)values : 0;
          if (values < 0) out->metadata_size = 0;
        }
      } else {
        error = VDB_ERROR_OUT_OF_MEMORY;
      }
    }
  }
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

VDB_API void vdb_free_record(vdb_record *record) {
  if (!record) return;
  VDB_FREE((void *)(uintptr_t)record->id);
  memset(record, 0, sizeof *record);
}

/* Under the writer's lock. */
VDB_RARE vdb_error vdb_change_metadata(vdb_database *db, size_t row, const vdb_record *record) {
  const char *id;
  const unsigned char *metadata;
  size_t id_size, metadata_size;
  vdb_record_at(db, row, &id, &id_size, &metadata, &metadata_size);
  unsigned char *old = db->records.records ? db->records.records[row] : NULL;
  if (old) db->records.records[row] = NULL;
  vdb_error error = vdb_make_record(db, row, id, id ? id_size : 0, record);
  if (error && old) db->records.records[row] = old;
  if (error) return error;
  if (old) vdb_discard_record(db, old);
  vdb_mark_whole(db, row);
  vdb_columns_touch(&db->columns, row);
  return VDB_OK;
}

VDB_API vdb_error vdb_set_metadata(vdb_database *db, uint64_t index, const vdb_record *record) {
  if (!db || !record) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!vdb_valid_metadata(record)) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? vdb_change_metadata(db, (size_t)index, record) : VDB_ERROR_INVALID_INDEX;
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_set_metadata_of(vdb_database *db, const char *id, const vdb_record *record) {
  if (!db || !id || !record) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!vdb_valid_metadata(record)) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_enter_write(&db->lock);
  uint32_t row = vdb_lowest_row(db, id, strlen(id));
  vdb_error error = row == VDB_NO_ROW ? VDB_ERROR_NOT_FOUND : vdb_change_metadata(db, row, record);
  vdb_leave_write(&db->lock);
  return error;
}

/* What is known of the row may be wrong from now on. Other threads that search see the old norm or none: both are right
 * as long as nobody writes. */
static inline float *vdb_lend_vector(const vdb_database *db, size_t row) {
  float unknown = -1.0f;
  if (vdb_element_of(db->options.storage) != VDB_F32) return NULL;
  if (!db->read_only) __atomic_store_n(&((vdb_database *)(uintptr_t)db)->changes.lent, 1, __ATOMIC_RELAXED);
  if (!db->mapping.base) vdb_rows_change(db);
  if (!db->mapping.base)
    __atomic_store(&vdb_block_of(db, row)->norms[vdb_row_in_block(db, row)], &unknown, __ATOMIC_RELAXED);
  return (float *)(uintptr_t)vdb_vector_at(db, row);
}

VDB_API vdb_error vdb_refresh_vector(vdb_database *db, size_t index) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  if (!error && vdb_element_of(db->options.storage) == VDB_F32) {
    if (vdb_all_finite((const float *)vdb_vector_at(db, index), db->dimensions)) vdb_describe_row(db, index, NULL), vdb_mark_whole(db, index), vdb_rows_change(db);
    else error = VDB_ERROR_NOT_FINITE;
  }
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_get_vector(const vdb_database *db, size_t index, float **data, char **id, void **metadata) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  if (!error) {
    const char *text;
    const unsigned char *bytes;
    size_t id_size, size;
    vdb_record_at(db, index, &text, &id_size, &bytes, &size);
    if (data) *data = vdb_lend_vector(db, index);
    if (id) *id = (char *)(uintptr_t)text;
    if (id) __atomic_store_n(&((vdb_database *)(uintptr_t)db)->records.lent, 1, __ATOMIC_RELAXED);
    if (metadata) *metadata = db->records.borrowed ? db->records.borrowed[index] : NULL;
  }
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

/* --- removing --- */
VDB_API vdb_error vdb_remove_index(vdb_database *db, uint64_t index) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  if (!error) vdb_drop_row(db, (size_t)index);
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_remove_id(vdb_database *db, const char *id, size_t *removed) {
  size_t count = 0, place = 0;
  uint32_t row;
  if (!db || !id) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  size_t size = strlen(id);
  row = vdb_table_next(db, id, size, &place);
  if (row != VDB_NO_ROW) { /* `id` may be the row's own, as vdb_get_vector gave it: held until all are gone */
    vdb_hold held = vdb_hold_record(db, row);
    for (id = held.id; row != VDB_NO_ROW; row = vdb_table_next(db, id, size, &place), count++) vdb_drop_row(db, row);
    vdb_hold_end(&held);
  }
  vdb_leave_write(&db->lock);
  if (removed) *removed = count;
  return count ? VDB_OK : VDB_ERROR_NOT_FOUND;
}

VDB_LIGHT void vdb_move_row(vdb_database *db, size_t from, size_t to) {
  const vdb_block *source = vdb_block_of(db, from), *target = vdb_block_of(db, to);
  size_t a = vdb_row_in_block(db, from), b = vdb_row_in_block(db, to);
  size_t bytes = db->dimensions * vdb_element_size(db->options.storage);
  memmove(target->vectors + b * bytes, source->vectors + a * bytes, bytes);
  target->norms[b] = source->norms[a];
  if (target->scales) target->scales[b] = source->scales[a];
  if (target->residuals) {
    target->residuals[b] = source->residuals[a];
    memmove(target->codes + b * db->dimensions, source->codes + a * db->dimensions, db->dimensions);
  }
  if (target->links) memmove(vdb_links_at(db, to), vdb_links_at(db, from), vdb_link_stride(db) * sizeof(uint32_t));
  if (db->records.records) db->records.records[to] = db->records.records[from];
  if (db->records.borrowed) db->records.borrowed[to] = db->records.borrowed[from];
}

/* Gives a file's text back if some of it is dead. */
VDB_RARE vdb_error vdb_repack_records(vdb_database *db) {
  if (!db->records.loaded || !db->records.loaded->dead) return VDB_OK;
  return vdb_leave_text(db, SIZE_MAX) ? VDB_OK : VDB_ERROR_OUT_OF_MEMORY;
}

/* Moves live rows down over the others. `new_of_old` [slots] is filled. */
VDB_LIGHT void vdb_move_rows(vdb_database *db, uint32_t *new_of_old) {
  size_t next = 0, old_slots = db->slots;
  vdb_mark_all(db); /* rows have new numbers */
  for (size_t row = 0; row < old_slots; row++) {
    new_of_old[row] = VDB_NO_ROW;
    if (!vdb_is_live(db, row)) continue;
    if (row != next) vdb_move_row(db, row, next);
    new_of_old[row] = (uint32_t)next++;
  }
  for (size_t row = next; row < old_slots; row++) {
    if (db->records.records) db->records.records[row] = NULL;
    if (db->records.borrowed) db->records.borrowed[row] = NULL;
  }
  memset(db->live, 0, vdb_round_up(old_slots, 64) / 8);
  for (size_t row = 0; row < next; row++) db->live[row >> 6] |= (uint64_t)1 << (row & 63);
  db->slots = next;
  db->free_count = 0;
  vdb_columns_release(&db->columns); /* rows have new numbers */
  while (db->block_count > (next + vdb_block_rows(db) - 1) >> db->block_shift)
    vdb_drop_last_block(db);
  if (next) vdb_clear_after(db, next - 1);
  for (size_t i = 0; i < db->records.table_size; i++)
    if (db->records.table[i] < VDB_GONE) db->records.table[i] = new_of_old[db->records.table[i]];
}

/* Under the writer's lock. */
VDB_RARE vdb_error vdb_compact_rows(vdb_database *db) {
  if (db->count == db->slots) return vdb_repack_records(db);
  uint32_t *new_of_old = (uint32_t *)VDB_MALLOC(db->slots * sizeof(uint32_t));
  if (!new_of_old) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_error error = db->options.index == VDB_INDEX_HNSW ? vdb_graph_sweep(db) : VDB_OK;
  if (!error) error = vdb_repack_records(db);
  if (!error) {
    size_t old_slots = db->slots;
    vdb_move_rows(db, new_of_old);
    if (db->options.index == VDB_INDEX_HNSW) vdb_graph_renumber(db, new_of_old, old_slots);
  }
  VDB_FREE(new_of_old);
  return error;
}

VDB_API vdb_error vdb_compact(vdb_database *db) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_compact_rows(db);
  vdb_leave_write(&db->lock);
  return error;
}

/* Moves what comes after `row`, which is gone, down by one, places of removed rows too. `new_of_old` [slots] is filled. */
VDB_LIGHT void vdb_close_gap(vdb_database *db, size_t row, uint32_t *new_of_old) {
  vdb_records *records = &db->records;
  size_t last = db->slots - 1, kept = 0;
  vdb_mark_all(db); /* rows have new numbers */
  for (size_t i = 0; i <= last; i++) new_of_old[i] = i == row ? VDB_NO_ROW : (uint32_t)(i - (i > row));
  for (size_t i = row; i < last; i++) {
    uint64_t bit = (uint64_t)1 << (i & 63);
    vdb_move_row(db, i + 1, i);
    db->live[i >> 6] = (db->live[i >> 6] & ~bit) | (vdb_is_live(db, i + 1) ? bit : 0);
  }
  db->live[last >> 6] &= ~((uint64_t)1 << (last & 63));
  if (records->records) records->records[last] = NULL;
  if (records->borrowed) records->borrowed[last] = NULL;
  if (records->loaded && records->loaded->moved > row) records->loaded->moved--;
  for (size_t i = 0; i < records->table_size; i++)
    if (records->table[i] < VDB_GONE) records->table[i] = new_of_old[records->table[i]];
  for (size_t i = 0; i < db->free_count; i++)
    if (db->free_rows[i] != row) db->free_rows[kept++] = new_of_old[db->free_rows[i]];
  db->free_count = kept;
  db->slots = last;
  vdb_columns_release(&db->columns); /* rows have new numbers */
  if (last) vdb_clear_after(db, last - 1);
}

VDB_API vdb_error vdb_remove_vector(vdb_database *db, size_t index) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  size_t slots = db->slots;
  uint32_t *new_of_old = error ? NULL : (uint32_t *)VDB_MALLOC(slots * sizeof(uint32_t));
  if (!error && !new_of_old) error = VDB_ERROR_OUT_OF_MEMORY;
  if (!error) {
    vdb_drop_row(db, index);
    if (db->options.index == VDB_INDEX_HNSW) error = vdb_graph_sweep(db); /* nobody links to it any more */
  }
  if (!error) {
    vdb_close_gap(db, index, new_of_old);
    if (db->options.index == VDB_INDEX_HNSW) vdb_graph_renumber(db, new_of_old, slots);
  }
  VDB_FREE(new_of_old);
  vdb_leave_write(&db->lock);
  return error;
}

