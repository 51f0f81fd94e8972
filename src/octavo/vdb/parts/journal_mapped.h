/* --- the journal of a mapped file ---
 *
 * The file is mapped privately, so that what the journal says of its rows can be written over them: the system copies
 * the pages that are written to, and no others. Rows that are new have blocks in memory, with what shared the last
 * block with them; towers are copied, for new ones must lie behind them; records lie in pages of pointers beside the
 * file's.
 */

/* What a row's record is now; VDB_NO_RECORD for none. 0 for want of memory. */
VDB_RARE int vdb_put_journal_record(vdb_database *db, size_t row, unsigned char *record) {
  unsigned char ***pages = db->mapping.records, **page = pages[row / VDB_RECORD_PAGE];
  if (!page) {
    if (!vdb_grow((void **)&page, 0, VDB_RECORD_PAGE, sizeof *page)) return 0;
    pages[row / VDB_RECORD_PAGE] = page;
  }
  unsigned char *old = page[row % VDB_RECORD_PAGE];
  if (old && old != VDB_NO_RECORD) {
    db->records.bytes -= vdb_bytes_of_record(old) + 2 * sizeof(vdb_record_head);
    vdb_record_leave(old);
  }
  page[row % VDB_RECORD_PAGE] = record;
  return 1;
}

/* Before the first batch: room for what it may change. */
VDB_RARE int vdb_journal_begins(vdb_database *db) {
  vdb_mapping *mapping = &db->mapping;
  vdb_graph *graph = &db->graph;
  uint32_t *copies[2] = {NULL, NULL};
  size_t pages = db->capacity / VDB_RECORD_PAGE + 1, towers = vdb_max(1, graph->towers_size), rows = db->capacity + 1;
  if (!vdb_grow((void **)&mapping->records, 0, pages, sizeof *mapping->records)) return 0;
  mapping->pages = pages;
  if (!vdb_grow((void **)&mapping->own, 0, db->capacity / 64 + 1, sizeof(uint64_t))) return 0;
  if (db->options.index != VDB_INDEX_HNSW) return 1;
  if (!vdb_grow((void **)&copies[0], 0, rows, sizeof(uint32_t)) ||
      !vdb_grow((void **)&copies[1], 0, towers, sizeof(uint32_t)) || !vdb_workshop_of(db)) {
    VDB_FREE(copies[0]);
    VDB_FREE(copies[1]);
    return 0;
  }
  if (graph->tower_of) memcpy(copies[0], graph->tower_of, db->slots * sizeof(uint32_t));
  if (graph->towers) memcpy(copies[1], graph->towers, graph->towers_size * sizeof(uint32_t));
  graph->tower_of = copies[0];
  graph->towers = copies[1];
  graph->towers_size = graph->towers_capacity = towers;
  mapping->own_towers = 1;
  return 1;
}

/* The last block, if the file ends inside it, moves to memory. */
VDB_RARE vdb_error vdb_leave_last_block(const vdb_header *header, vdb_database *db) {
  size_t rows = vdb_row_in_block(db, db->slots);
  if (!rows || db->slots != db->mapping.slots) return VDB_OK;
  vdb_block last = db->blocks[--db->block_count];
  vdb_error error = vdb_make_blocks(db, db->slots);
  for (int part = 0; part <= VDB_LINKS && !error; part++) {
    size_t size = vdb_part_row(header, part);
    if (size) memcpy(vdb_block_array(&db->blocks[db->block_count - 1], part), vdb_block_array(&last, part), rows * size);
  }
  return error;
}

/* Room for indices below `slots` in a mapped database. */
VDB_RARE vdb_error vdb_mapped_room(const vdb_header *header, vdb_database *db, size_t slots) {
  vdb_mapping *mapping = &db->mapping;
  if (!mapping->pages && !vdb_journal_begins(db)) return VDB_ERROR_OUT_OF_MEMORY;
  if (slots <= db->slots) return VDB_OK;
  if (slots > db->capacity) {
    size_t old = db->capacity, capacity = vdb_round_up(vdb_max(slots, old + old / 2), 64);
    size_t pages = capacity / VDB_RECORD_PAGE + 1;
    if (!vdb_grow((void **)&mapping->records, mapping->pages, pages, sizeof *mapping->records)) return VDB_ERROR_OUT_OF_MEMORY;
    mapping->pages = pages;
    if (!vdb_grow((void **)&db->live, old / 64, capacity / 64, sizeof(uint64_t)) ||
        (mapping->own_towers && !vdb_grow((void **)&db->graph.tower_of, old + 1, capacity + 1, sizeof(uint32_t))))
      return VDB_ERROR_OUT_OF_MEMORY;
    db->capacity = capacity;
  }
  vdb_error error = vdb_leave_last_block(header, db);
  return error ? error : vdb_make_blocks(db, slots);
}

static inline int vdb_by_id_hash(const void *a, const void *b) {
  const vdb_journal_id *x = (const vdb_journal_id *)a, *y = (const vdb_journal_id *)b;
  return x->hash != y->hash ? (x->hash < y->hash ? -1 : 1) : x->row < y->row ? -1 : x->row > y->row;
}

/* The ids of records that the journal brought, into `out` if there is one. Returns how many. */
VDB_LIGHT size_t vdb_list_journal_ids(const vdb_database *db, vdb_journal_id *out) {
  size_t found = 0, id_size, metadata_size;
  const char *id;
  const unsigned char *metadata;
  for (size_t row = 0; row < db->slots; row++) {
    if (!db->mapping.records[row / VDB_RECORD_PAGE]) row |= VDB_RECORD_PAGE - 1;
    else if (vdb_journal_record_of(&db->mapping, row) && vdb_is_live(db, row) &&
             vdb_record_at(db, row, &id, &id_size, &metadata, &metadata_size) && id) {
      if (out) out[found].row = row, out[found].hash = vdb_hash(id, id_size);
      found++;
    }
  }
  return found;
}

/* When all batches are read. */
VDB_RARE vdb_error vdb_journal_ends(vdb_reader *reader, const vdb_header *header, vdb_database *db) {
  vdb_mapping *mapping = &db->mapping;
  mapping->id_count = vdb_list_journal_ids(db, NULL);
  if (!vdb_grow((void **)&mapping->ids, 0, mapping->id_count + 1, sizeof *mapping->ids)) {
    mapping->id_count = 0;
    return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "journal", "no memory for its ids", 0);
  }
  vdb_list_journal_ids(db, mapping->ids);
  qsort(mapping->ids, mapping->id_count, sizeof *mapping->ids, vdb_by_id_hash);
  if (db->slots > mapping->slots) vdb_clear_after(db, db->slots - 1);
  if (header->index == VDB_INDEX_HNSW)
    db->graph.top = db->graph.entry == VDB_NO_ROW ? 0 : vdb_levels_at(db, db->graph.entry);
  return vdb_check_live(reader, header, db);
}

