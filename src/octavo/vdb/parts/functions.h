/* ------------------------------------------------------------------------------------------------------------------
 * 10 Functions
 */
VDB_API const char *vdb_error_text(vdb_error error) {
  switch (error) {
    case VDB_OK: return "no error";
    case VDB_ERROR_NULL_POINTER: return "a pointer that must not be NULL is NULL";
    case VDB_ERROR_INVALID_DIMENSIONS: return "dimensions must be 1 to 65536";
    case VDB_ERROR_OUT_OF_MEMORY: return "out of memory";
    case VDB_ERROR_NOT_FOUND: return "not found";
    case VDB_ERROR_INVALID_INDEX: return "no row has this index";
    case VDB_ERROR_THREAD_FAILURE: return "a thread or lock could not be made";
    case VDB_ERROR_NOT_FINITE: return "a vector holds NaN, infinity, or a number too great for its storage";
    case VDB_ERROR_INVALID_ARGUMENT: return "an argument is outside its range";
    case VDB_ERROR_DUPLICATE_ID: return "the id is there already, or twice in one call";
    case VDB_ERROR_READ_ONLY: return "the database is a read-only view of a file";
    case VDB_ERROR_IO: return "the file could not be read or written";
    case VDB_ERROR_CORRUPT: return "not a database file, or damaged";
    case VDB_ERROR_FULL: return "more rows than a database can hold";
    case VDB_ERROR_NOT_REGULAR: return "the path names a folder, a pipe or a device, no regular file";
    case VDB_ERROR_LINKED: return "the file has other names (hard links), which a save would part from it";
    case VDB_ERROR_OWNER: return "the file is another user's or group's, and would not be after a save";
    case VDB_ERROR_FOLDER: return "the file's folder does not let a new file take its place";
    case VDB_ERROR_CHANGED: return "the file is not the one that the database was read from";
    case VDB_ERROR_INTERRUPTED: return "interrupted";
  }
  return "unknown error";
}

VDB_API vdb_options vdb_default_options(void) {
  vdb_options options = {VDB_STORAGE_F32, VDB_INDEX_FLAT, 16, 200, 0};
  return options;
}

VDB_API vdb_query_options vdb_default_query_options(size_t k) {
  vdb_query_options options;
  memset(&options, 0, sizeof options);
  options.k = k;
  return options;
}

VDB_API const char *vdb_kernels(void) { return vdb_active()->name; }

VDB_API vdb_error vdb_set_kernels(const char *name) {
  const vdb_kernel_set *kernels = name ? vdb_kernels_named(name) : NULL;
  if (name && !kernels) return VDB_ERROR_NOT_FOUND;
  vdb_choose(kernels);
  return VDB_OK;
}

/* --- the distances of two vectors --- */
VDB_ONCE float vdb_distance_of(const float *a, const float *b, size_t dimensions, vdb_metric metric) {
  double sums[2], square[2] = {0.0, 0.0};
  vdb_active()->exact(a, b, dimensions, metric == VDB_METRIC_EUCLIDEAN, sums);
  if (metric == VDB_METRIC_COSINE) vdb_active()->exact(a, a, dimensions, 0, square);
  return vdb_finish_distance(metric, sums, square[1]);
}

VDB_API float vdb_dot_product(const float *a, const float *b, size_t dimensions) {
  return -vdb_distance_of(a, b, dimensions, VDB_METRIC_DOT_PRODUCT);
}

VDB_API float vdb_magnitude(const float *a, size_t dimensions) {
  double sums[2];
  vdb_active()->exact(a, a, dimensions, 0, sums);
  return (float)sqrt(sums[1]);
}

VDB_API float vdb_cosine_similarity(const float *a, const float *b, size_t dimensions) {
  return 1.0f - vdb_distance_of(a, b, dimensions, VDB_METRIC_COSINE);
}

VDB_API float vdb_euclidean_distance(const float *a, const float *b, size_t dimensions) {
  return vdb_distance_of(a, b, dimensions, VDB_METRIC_EUCLIDEAN);
}

VDB_API float vdb_compute_distance(const float *a, const float *b, size_t dimensions, vdb_metric metric) {
  return (unsigned)metric <= 2 ? vdb_distance_of(a, b, dimensions, metric) : 0.0f;
}

/* --- making and asking about a database --- */
VDB_API vdb_error vdb_new(size_t dimensions, vdb_metric metric, const vdb_options *options, vdb_database **out) {
  vdb_options chosen = options ? *options : vdb_default_options();
  if (!out) return VDB_ERROR_NULL_POINTER;
  *out = NULL;
  if (dimensions < 1 || dimensions > VDB_MAX_DIMENSIONS) return VDB_ERROR_INVALID_DIMENSIONS;
  if (!vdb_valid_options(dimensions, metric, &chosen)) return VDB_ERROR_INVALID_ARGUMENT;
  return vdb_allocate(dimensions, metric, &chosen, out);
}

VDB_API vdb_database *vdb_create(size_t dimensions, vdb_metric metric) {
  vdb_database *db = NULL;
  vdb_new(dimensions, metric, NULL, &db);
  return db;
}

VDB_API void vdb_destroy(vdb_database *db) { vdb_release(db); }

/* Reading takes the lock although the database is const for the caller. */
VDB_INLINE vdb_lock *vdb_lock_of(const vdb_database *db) { return &((vdb_database *)(uintptr_t)db)->lock; }

VDB_API size_t vdb_count(const vdb_database *db) {
  if (!db) return 0;
  vdb_enter_read(vdb_lock_of(db));
  size_t count = db->count;
  vdb_leave_read(vdb_lock_of(db));
  return count;
}

VDB_API size_t vdb_dimensions(const vdb_database *db) { return db ? db->dimensions : 0; }

VDB_RARE size_t vdb_bytes_held(const vdb_database *db) {
  size_t bytes = sizeof *db + sizeof(vdb_pool) + db->block_capacity * sizeof(vdb_block) + db->capacity / 8;
  size_t columns = vdb_columns_bytes(&((vdb_database *)(uintptr_t)db)->columns);
  if (db->mapping.base && !db->mapping.pages) return db->mapping.size + columns;
  bytes += columns + db->mapping.size + vdb_journal_bytes(&db->mapping);
  bytes += db->free_capacity * sizeof(uint32_t);
  for (size_t i = 0; i < db->block_count; i++) bytes += db->blocks[i].bytes + db->blocks[i].spilled_bytes;
  if (!db->mapping.base) bytes += db->records.table_size * sizeof(uint32_t);
  if (db->records.records) bytes += db->capacity * sizeof(unsigned char *);
  if (db->records.borrowed) bytes += db->capacity * sizeof(void *);
  bytes += db->records.bytes;
  if (db->records.loaded) bytes += sizeof(vdb_loaded) + db->records.loaded->size;
  return bytes + (db->mapping.base && !db->mapping.own_towers ? 0 : vdb_graph_bytes(db));
}

VDB_API vdb_error vdb_info(const vdb_database *db, vdb_information *out) {
  if (!db || !out) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  memset(out, 0, sizeof *out);
  out->dimensions = db->dimensions;
  out->metric = db->metric;
  out->options = db->options;
  out->count = db->count;
  out->slots = db->slots;
  out->bytes = vdb_bytes_held(db);
  out->vector_bytes = db->count * db->dimensions *
                      (vdb_element_size(db->options.storage) + (db->options.storage == VDB_STORAGE_F32_I8));
  out->read_only = db->read_only;
  out->has_ids = db->records.table_used != 0 || db->mapping.id_count != 0;
  vdb_leave_read(vdb_lock_of(db));
  return VDB_OK;
}

VDB_API vdb_error vdb_keep_on_disk(vdb_database *db, const char *folder) {
  if (!db || !folder) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = db->block_count || db->paging.on_disk ? VDB_ERROR_INVALID_ARGUMENT : VDB_OK;
  int file = error ? -1 : vdb_nameless_file(folder);
  if (file >= 0) {
    db->paging.on_disk = db->paging.has_file = 1;
    db->paging.file = file;
  } else if (!error) {
    error = VDB_ERROR_IO;
  }
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_set_resident(vdb_database *db, size_t bytes) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  vdb_enter_write(&db->lock);
  vdb_error error = db->mapping.base || db->paging.on_disk ? VDB_OK : VDB_ERROR_INVALID_ARGUMENT;
  if (!error) vdb_page_within(db, bytes);
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_set_threads(vdb_database *db, uint32_t threads) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (threads > 256) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_enter_write(&db->lock);
  vdb_pool_stop(db->pool); /* no reader is inside: nobody uses it */
  vdb_pool_reset(db->pool);
  db->options.threads = threads;
  db->threads = threads ? threads : vdb_cores();
  vdb_leave_write(&db->lock);
  return VDB_OK;
}

