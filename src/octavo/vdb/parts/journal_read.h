
/* --- reading the journal --- */
typedef struct {
  const unsigned char *bytes;
  size_t size, place;
} vdb_cursor;

/* The next `size` bytes, NULL if there are not as many. */
static inline const unsigned char *vdb_cursor_take(vdb_cursor *cursor, uint64_t size) {
  if (size > cursor->size - cursor->place) return NULL;
  const unsigned char *taken = cursor->bytes + cursor->place;
  cursor->place += (size_t)size;
  return taken;
}

VDB_RARE uint32_t vdb_cursor_number(vdb_cursor *cursor, int *wrong) {
  uint32_t number = 0;
  const unsigned char *bytes = vdb_cursor_take(cursor, sizeof number);
  if (bytes) memcpy(&number, bytes, sizeof number);
  else *wrong = 1;
  return number;
}

/* Zeros to a multiple of `step`. */
VDB_RARE int vdb_cursor_round(vdb_cursor *cursor, size_t step) {
  size_t size = vdb_round_up(cursor->place, step) - cursor->place;
  const unsigned char *zeros = vdb_cursor_take(cursor, size);
  return zeros && vdb_all_zero(zeros, size);
}

/* A tower of `levels` for a row: the one it has, if it is as high or was; or a new one. 0 for want of memory. */
VDB_RARE int vdb_journal_tower(vdb_database *db, size_t row, uint32_t levels) {
  vdb_graph *graph = &db->graph;
  size_t links = db->options.links, size = vdb_tower_size(levels, links), end = graph->towers_size + size;
  size_t place = graph->tower_of[row];
  uint32_t *tower = place ? graph->towers + place : NULL;
  if (vdb_levels_at(db, row) == levels) return 1;
  vdb_leave_tower(db, row);
  if (!levels) return 1;
  if (tower && place < graph->towers_size && size <= graph->towers_size - place && tower[1] == levels) {
    tower[0] = levels;
    return 1;
  }
  if (end > UINT32_MAX) return 0;
  if (end > graph->towers_capacity) {
    if (!vdb_grow((void **)&graph->towers, graph->towers_capacity, end + end / 2, sizeof(uint32_t))) return 0;
    graph->towers_capacity = end + end / 2;
  }
  graph->tower_of[row] = (uint32_t)graph->towers_size;
  graph->towers_size = end;
  graph->towers[graph->tower_of[row]] = levels;
  return 1;
}

/* A row's links on all levels. They are checked when all is read. */
VDB_RARE vdb_error vdb_journal_links(vdb_cursor *cursor, vdb_database *db, size_t row) {
  size_t stride = vdb_link_stride(db) * sizeof(uint32_t), links = db->options.links;
  int wrong = 0;
  const unsigned char *bytes = vdb_cursor_take(cursor, stride);
  uint32_t levels = vdb_cursor_number(cursor, &wrong);
  if (!bytes || wrong || levels > VDB_TOP_LEVEL) return VDB_ERROR_CORRUPT;
  memcpy(vdb_links_at(db, row), bytes, stride);
  if (!vdb_journal_tower(db, row, levels)) return VDB_ERROR_OUT_OF_MEMORY;
  size_t size = (vdb_tower_size(levels, links) - 1) * sizeof(uint32_t);
  if (!(bytes = vdb_cursor_take(cursor, size))) return VDB_ERROR_CORRUPT;
  if (size) memcpy(vdb_links_of(db, row, 1), bytes, size);
  return VDB_OK;
}

/* The numbers and the vector of a row. */
VDB_RARE vdb_error vdb_journal_vector(vdb_cursor *cursor, const vdb_header *header, vdb_database *db, size_t row,
                                      const vdb_numbers *numbers) {
  vdb_block *block = &db->blocks[row >> db->block_shift];
  size_t place = vdb_row_in_block(db, row);
  for (int part = VDB_VECTORS; part <= VDB_CODES; part++) {
    size_t size = vdb_part_row(header, part);
    uint64_t exponents = vdb_part_exponents(header, part);
    const unsigned char *bytes = vdb_cursor_take(cursor, size);
    if (!bytes || (exponents && !vdb_words_finite(bytes, size, exponents))) return VDB_ERROR_CORRUPT;
    if (size) memcpy(vdb_block_array(block, part) + place * size, bytes, size);
  }
  block->norms[place] = numbers->norm;
  if (block->scales) block->scales[place] = numbers->scale;
  if (block->residuals) block->residuals[place] = numbers->residual;
  return VDB_OK;
}

/* A row's id and metadata; it has no record. */
VDB_RARE vdb_error vdb_journal_record(vdb_cursor *cursor, vdb_database *db, size_t row, const vdb_numbers *numbers) {
  uint32_t id_size = numbers->id_size, metadata_size = numbers->metadata_size & ~VDB_VALUES_BIT;
  int values = (numbers->metadata_size & VDB_VALUES_BIT) != 0;
  const unsigned char *bytes = vdb_cursor_take(cursor, (uint64_t)id_size + 1 + metadata_size);
  if (!bytes || id_size > VDB_MAX_ID || metadata_size > INT32_MAX || memchr(bytes, 0, id_size) || bytes[id_size] ||
      (values && vdb_count_values(bytes + id_size + 1, metadata_size) < 1))
    return VDB_ERROR_CORRUPT;
  if (!id_size && !metadata_size) return VDB_OK;
  if (!vdb_is_live(db, row)) return VDB_ERROR_CORRUPT;
  if (!db->mapping.base && ((id_size && vdb_table_room(db, 1)) || !vdb_records_room(db))) return VDB_ERROR_OUT_OF_MEMORY;
  unsigned char *record = vdb_record_make(&db->records, vdb_record_bytes(id_size, metadata_size));
  if (!record) return VDB_ERROR_OUT_OF_MEMORY;
  memcpy(record, &numbers->id_size, sizeof(uint32_t));
  memcpy(record + sizeof(uint32_t), &numbers->metadata_size, sizeof(uint32_t));
  memcpy(record + 2 * sizeof(uint32_t), bytes, (size_t)id_size + 1 + metadata_size);
  if (db->mapping.base) {
    if (vdb_put_journal_record(db, row, record)) return VDB_OK;
    vdb_record_leave(record);
    return VDB_ERROR_OUT_OF_MEMORY;
  }
  db->records.records[row] = record;
  if (id_size) vdb_table_enter(&db->records, row, vdb_hash((const char *)bytes, id_size));
  return VDB_OK;
}

/* One entry. Rows ascend, and those that are new come whole and without a gap: `*next` is the least that may come, and
 * `*fresh` the new one that must come. */
VDB_RARE vdb_error vdb_journal_entry(vdb_cursor *cursor, const vdb_header *header, vdb_database *db, size_t *next,
                                     size_t *fresh) {
  int wrong = 0;
  size_t row = vdb_cursor_number(cursor, &wrong);
  uint32_t flags = vdb_cursor_number(cursor, &wrong);
  int live = (flags & VDB_ENTRY_LIVE) != 0, whole = (flags & VDB_ENTRY_WHOLE) != 0;
  vdb_numbers numbers = {0.0f, 0.0f, 0.0f, 0, 0};
  if (wrong || flags > 3 || row < *next || row >= db->slots || (row >= *fresh && (row > *fresh || !whole)) ||
      (!whole && live && !vdb_is_live(db, row)))
    return VDB_ERROR_CORRUPT;
  *next = row + 1;
  *fresh += row == *fresh;
  if (whole || !live) {
    if (!db->mapping.base) vdb_drop_record(db, row);
    else if (!vdb_put_journal_record(db, row, VDB_NO_RECORD)) return VDB_ERROR_OUT_OF_MEMORY;
  }
  if (live) db->live[row >> 6] |= (uint64_t)1 << (row & 63);
  else db->live[row >> 6] &= ~((uint64_t)1 << (row & 63));
  vdb_error error = VDB_OK;
  if (whole) {
    const unsigned char *bytes = vdb_cursor_take(cursor, sizeof numbers);
    if (!bytes) return VDB_ERROR_CORRUPT;
    memcpy(&numbers, bytes, sizeof numbers);
  }
  if (row < db->mapping.slots) db->mapping.own[row >> 6] |= (uint64_t)1 << (row & 63);
  if (header->index == VDB_INDEX_HNSW) error = vdb_journal_links(cursor, db, row);
  if (whole && !error) error = vdb_journal_vector(cursor, header, db, row, &numbers);
  if (whole && !error) error = vdb_journal_record(cursor, db, row, &numbers);
  return error || vdb_cursor_round(cursor, 8) ? error : VDB_ERROR_CORRUPT;
}

/* What a batch says, `cursor` behind its head. */
VDB_RARE vdb_error vdb_journal_apply(vdb_cursor *cursor, const vdb_header *header, vdb_database *db,
                                     const vdb_batch *batch) {
  int wrong = 0, graph = header->index == VDB_INDEX_HNSW;
  size_t next = 0, fresh = db->slots, entries = vdb_cursor_number(cursor, &wrong);
  size_t freed = vdb_cursor_number(cursor, &wrong);
  const unsigned char *rows = vdb_cursor_take(cursor, (uint64_t)freed * sizeof(uint32_t));
  if (wrong || !rows || batch->free_kept > db->free_count || batch->slots < db->slots || batch->slots > VDB_MAX_ROWS ||
      batch->slots - db->slots > entries || entries > cursor->size / 8 || !vdb_cursor_round(cursor, 8))
    return VDB_ERROR_CORRUPT;
  if (graph ? batch->entry >= batch->slots && batch->entry != VDB_NO_ROW : batch->entry != VDB_NO_ROW)
    return VDB_ERROR_CORRUPT;
  if (batch->unchecked > (graph ? batch->slots : 0)) return VDB_ERROR_CORRUPT;
  size_t slots = (size_t)batch->slots;
  vdb_error error = db->mapping.base ? vdb_mapped_room(header, db, slots) : vdb_make_room(db, slots);
  if (error) return error;
  db->slots = slots;
  for (size_t i = 0; i < entries && !error; i++) error = vdb_journal_entry(cursor, header, db, &next, &fresh);
  if (!error && (fresh != db->slots || !vdb_cursor_round(cursor, sizeof *batch) || cursor->place != cursor->size))
    error = VDB_ERROR_CORRUPT;
  db->free_count = (size_t)batch->free_kept;
  for (size_t i = 0; i < freed && !error; i++) {
    uint32_t row;
    memcpy(&row, rows + i * sizeof row, sizeof row);
    vdb_free_row(db, row);
  }
  db->count = (size_t)batch->count;
  db->graph.entry = batch->entry;
  if (graph) db->graph.workshop->unchecked = batch->unchecked;
  return error;
}

/* The contents again, now that the journal has changed them. */
VDB_RARE vdb_error vdb_journal_check(vdb_reader *reader, const vdb_header *header, vdb_database *db) {
  uint64_t *seen = NULL;
  if (!vdb_grow((void **)&seen, 0, (db->slots + 63) / 64 + 1, sizeof *seen))
    return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "journal", "no memory for its checks", 0);
  vdb_error error = vdb_check_live(reader, header, db);
  if (!error) error = vdb_check_numbers(reader, header, db);
  if (!error) error = vdb_check_free(reader, header, db, seen);
  VDB_FREE(seen);
  if (error || header->index != VDB_INDEX_HNSW) return error;
  db->graph.top = db->graph.entry == VDB_NO_ROW ? 0 : vdb_levels_at(db, db->graph.entry);
  error = vdb_check_links(reader, header, db);
  for (size_t row = 0; row < db->slots && !error; row++)
    if (vdb_wrong_tower(db, row))
      error = vdb_fault(reader, VDB_ERROR_CORRUPT, "journal", "impossible links", header->file_size);
  return error;
}

/* One batch from the file. */
VDB_RARE vdb_error vdb_read_batch(vdb_reader *reader, const vdb_header *header, vdb_database *db,
                                  const vdb_batch *batch, const vdb_batch_end *end) {
  vdb_cursor cursor = {NULL, (size_t)batch->size, sizeof *batch};
  unsigned char *bytes = (unsigned char *)VDB_MALLOC(cursor.size);
  if (!bytes) return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "journal", "no memory to read it", batch->place);
  cursor.bytes = bytes;
  vdb_error error = vdb_read_fault(reader, vdb_read_bytes(reader->source, bytes, cursor.size, batch->place), "journal",
                                   batch->place);
  if (!error && vdb_crc32c(0, bytes, cursor.size) != end->content)
    error = vdb_fault(reader, VDB_ERROR_CORRUPT, "journal", "the checksum differs in the batch that begins here",
                      batch->place);
  if (!error) {
    error = vdb_journal_apply(&cursor, header, db, batch);
    if (error)
      (void)vdb_fault(reader, error, "journal",
                      error == VDB_ERROR_OUT_OF_MEMORY ? "no memory for its rows" : "impossible content",
                      batch->place + cursor.place);
  }
  VDB_FREE(bytes);
  return error;
}

VDB_RARE vdb_error vdb_read_journal(vdb_reader *reader, const vdb_header *header, vdb_database *db) {
  vdb_batch batch;
  vdb_batch_end end;
  uint64_t at = header->file_size;
  uint32_t previous = header->crc;
  int found = 1;
  vdb_error error = VDB_OK;
  while (at < reader->size && !error) {
    int failed = vdb_find_batch(reader->source, reader->size, at, previous, &batch, &end, &found);
    if (failed == VDB_DAMAGED)
      return vdb_fault(reader, VDB_ERROR_CORRUPT, "journal", "damaged, or bytes after the end of the file", at);
    error = failed == VDB_FILE_ENDS ? VDB_OK : vdb_read_fault(reader, failed, "journal", at); /* being written */
    if (failed || !found) break;
    error = vdb_read_batch(reader, header, db, &batch, &end);
    at += batch.size + sizeof end;
    previous = end.crc;
  }
  if (error) return error;
  if (db->mapping.base) return at > header->file_size ? vdb_journal_ends(reader, header, db) : vdb_check_live(reader, header, db);
  return at > header->file_size ? vdb_journal_check(reader, header, db) : VDB_OK;
}
