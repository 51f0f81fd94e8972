/* --- the whole --- */
VDB_RARE int vdb_valid_options(size_t dimensions, vdb_metric metric, const vdb_options *options) {
  return dimensions >= 1 && dimensions <= VDB_MAX_DIMENSIONS && (unsigned)metric <= 2 &&
         (unsigned)options->storage <= 4 && (unsigned)options->index <= 1 && options->links >= 2 &&
         options->links <= 128 && options->build_effort >= 1 && options->build_effort <= 4096 &&
         options->threads <= 256;
}

/* Blocks of about a quarter of a megabyte, and at least 64 rows: the last one is rarely full. */
VDB_RARE unsigned vdb_block_shift_for(size_t dimensions, vdb_storage storage) {
  size_t row = dimensions * (vdb_element_size(storage) + (storage == VDB_STORAGE_F32_I8));
  unsigned shift = 6;
  while (shift < 16 && (row << (shift + 1)) <= ((size_t)1 << 18)) shift++;
  return shift;
}

VDB_RARE void vdb_drop_last_block(vdb_database *db) {
  vdb_block *block = &db->blocks[--db->block_count];
  vdb_aligned_free(block->memory);
  vdb_unspill(&db->paging, block);
}

static inline void vdb_unmap_file(void *base, size_t size);

VDB_RARE void vdb_release(vdb_database *db) {
  if (!db) return;
  while (db->block_count) vdb_drop_last_block(db);
  if (db->paging.has_file) vdb_sys_close(db->paging.file);
  vdb_graph_release(db);
  if (db->mapping.base) vdb_unmap_file(db->mapping.base, db->mapping.size); /* the table lies in the file */
  else VDB_FREE(db->records.table);
  vdb_release_records(db);
  vdb_release_journal(db);
  vdb_columns_release(&db->columns);
  vdb_columns_destroy(&db->columns);
  VDB_FREE(db->blocks);
  VDB_FREE(db->live);
  VDB_FREE(db->free_rows);
  vdb_changes_release(db);
  if (db->pool) vdb_pool_stop(db->pool);
  VDB_FREE(db->pool);
  vdb_lock_destroy(&db->lock);
  VDB_FREE(db);
}

VDB_RARE vdb_error vdb_allocate(size_t dimensions, vdb_metric metric, const vdb_options *options,
                                vdb_database **out) {
  vdb_database *db = (vdb_database *)VDB_MALLOC(sizeof(vdb_database));
  if (!db) return VDB_ERROR_OUT_OF_MEMORY;
  memset(db, 0, sizeof *db);
  db->pool = (vdb_pool *)VDB_MALLOC(sizeof(vdb_pool));
  int locks = db->pool ? vdb_lock_make(&db->lock) : 0;
  if (!locks || !vdb_columns_make(&db->columns)) {
    if (locks) vdb_lock_destroy(&db->lock);
    VDB_FREE(db->pool);
    VDB_FREE(db);
    return VDB_ERROR_OUT_OF_MEMORY;
  }
  vdb_pool_reset(db->pool);
  db->dimensions = dimensions;
  db->metric = metric;
  db->options = *options;
  db->threads = options->threads ? options->threads : vdb_cores();
  db->block_shift = vdb_block_shift_for(dimensions, options->storage);
  db->graph.entry = VDB_NO_ROW;
  *out = db;
  return VDB_OK;
}

