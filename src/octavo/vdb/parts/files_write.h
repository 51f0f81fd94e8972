/* --- writing --- */
typedef struct {
  int file, failed; /* failed: errno of the first failure */
  unsigned char *buffer; /* [VDB_PIECE] */
  size_t used;
  uint64_t position; /* in the file, the buffer's bytes included */
  uint32_t crc;      /* of the section so far, the buffer's bytes not included */
  vdb_identity identity; /* of the file, once it is written */
  unsigned char *memory; /* in place of a file; NULL until something is written */
  size_t size, capacity; /* of memory */
  int to_memory;
} vdb_writer;

/* Memory grows by half, so that little is copied and little is left over. */
VDB_LIGHT void vdb_write_memory(vdb_writer *writer, const unsigned char *bytes, size_t size) {
  if (writer->failed) return;
  if (size > writer->capacity - writer->size) {
    size_t capacity = vdb_max(writer->size + size, writer->capacity + writer->capacity / 2);
    unsigned char *grown = (unsigned char *)VDB_MALLOC(capacity);
    if (!grown) {
      writer->failed = ENOMEM;
      return;
    }
    if (writer->size) memcpy(grown, writer->memory, writer->size);
    VDB_FREE(writer->memory);
    writer->memory = grown;
    writer->capacity = capacity;
  }
  memcpy(writer->memory + writer->size, bytes, size);
  writer->size += size;
}

VDB_LIGHT void vdb_write_all(vdb_writer *writer, const unsigned char *bytes, size_t size) {
  if (writer->to_memory) {
    vdb_write_memory(writer, bytes, size);
    return;
  }
  while (size && !writer->failed) {
    long written = vdb_sys_write(writer->file, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      writer->failed = written < 0 ? errno : ENOSPC;
      return;
    }
    bytes += written;
    size -= (size_t)written;
  }
}

VDB_RARE void vdb_flush(vdb_writer *writer) {
  writer->crc = vdb_crc32c(writer->crc, writer->buffer, writer->used);
  vdb_write_all(writer, writer->buffer, writer->used);
  writer->used = 0;
}

VDB_LIGHT void vdb_emit(vdb_writer *writer, const void *data, size_t size) {
  const unsigned char *bytes = (const unsigned char *)data;
  writer->position += size;
  while (size && !writer->failed) {
    size_t piece = vdb_min(size, VDB_PIECE - writer->used);
    if (piece == VDB_PIECE) { /* a whole piece needs no copy */
      writer->crc = vdb_crc32c(writer->crc, bytes, piece);
      vdb_write_all(writer, bytes, piece);
    } else {
      memcpy(writer->buffer + writer->used, bytes, piece);
      writer->used += piece;
      if (writer->used == VDB_PIECE) vdb_flush(writer);
    }
    bytes += piece;
    size -= piece;
  }
}

VDB_RARE void vdb_emit_zeros(vdb_writer *writer, uint64_t size) {
  static const unsigned char zeros[4096] = {0};
  for (; size > sizeof zeros; size -= sizeof zeros) vdb_emit(writer, zeros, sizeof zeros);
  vdb_emit(writer, zeros, (size_t)size);
}

/* A list of links and its unused places as zeros, so that what memory held before does not get into files. */
VDB_LIGHT void vdb_emit_links(vdb_writer *writer, const uint32_t *links, size_t places) {
  uint32_t count = *links <= places ? *links : 0;
  vdb_emit(writer, &count, sizeof count);
  vdb_emit(writer, links + 1, count * sizeof *links);
  vdb_emit_zeros(writer, (places - count) * sizeof *links);
}

VDB_LIGHT void vdb_emit_block(vdb_writer *writer, const vdb_database *db, int part, size_t block,
                             size_t row_bytes) {
  const vdb_block *from = &db->blocks[block];
  size_t rows = vdb_rows_of_block(db, block);
  vdb_touch(db, part == VDB_VECTORS || db->mapping.base ? rows * row_bytes : 0);
  if (part != VDB_LINKS) {
    vdb_emit(writer, vdb_block_array(from, part), rows * row_bytes);
    return;
  }
  for (size_t i = 0; i < rows; i++)
    vdb_emit_links(writer, from->links + i * vdb_link_stride(db), 2 * (size_t)db->options.links);
}

/* Towers move together as they are written, in the order of rows. */
VDB_LIGHT void vdb_emit_towers(vdb_writer *writer, const vdb_database *db, int part) {
  uint32_t next = 1, none = 0;
  size_t links = db->options.links;
  if (part == VDB_TOWERS) vdb_emit(writer, &none, sizeof none);
  for (size_t row = 0; row < db->slots; row++) {
    size_t words = vdb_tower_words(db, row);
    if (part == VDB_TOWER_OF) {
      vdb_emit(writer, words ? &next : &none, sizeof next);
      next += (uint32_t)words;
    } else if (words) {
      const uint32_t *tower = db->graph.towers + db->graph.tower_of[row];
      vdb_emit(writer, tower, sizeof *tower);
      for (size_t word = 1; word < words; word += 1 + links) vdb_emit_links(writer, tower + word, links);
    }
  }
}

typedef struct {
  const char *id;
  const unsigned char *metadata;
  size_t id_size, metadata_size, bytes; /* bytes: of the whole record, 0 for none */
  uint32_t bit;                         /* VDB_VALUES_BIT, or 0 */
} vdb_text;

VDB_LIGHT vdb_text vdb_text_of(const vdb_database *db, size_t row) {
  vdb_text text = {NULL, NULL, 0, 0, 0, 0};
  if (vdb_is_live(db, row) &&
      vdb_record_at(db, row, &text.id, &text.id_size, &text.metadata, &text.metadata_size)) {
    if (!text.id) text.id_size = 0;
    if (text.id_size || text.metadata_size) text.bytes = vdb_record_bytes(text.id_size, text.metadata_size);
    if (text.metadata_size && vdb_has_values(db, row)) text.bit = VDB_VALUES_BIT;
  }
  return text;
}

/* The offsets of records, or the records. */
VDB_LIGHT void vdb_emit_records(vdb_writer *writer, const vdb_database *db, int part) {
  uint64_t place = 0, none = 0;
  for (size_t row = 0; row < db->slots; row++) {
    vdb_text text = vdb_text_of(db, row);
    uint64_t offset = place + 1;
    uint32_t sizes[2] = {(uint32_t)text.id_size, (uint32_t)text.metadata_size | text.bit};
    place += text.bytes;
    if (part == VDB_OFFSETS) vdb_emit(writer, text.bytes ? &offset : &none, sizeof offset);
    if (part == VDB_OFFSETS || !text.bytes) continue;
    vdb_emit(writer, sizes, sizeof sizes);
    vdb_emit(writer, text.id, text.id_size);
    vdb_emit_zeros(writer, 1);
    vdb_emit(writer, text.metadata, text.metadata_size);
    vdb_emit_zeros(writer, text.bytes - 9 - text.id_size - text.metadata_size);
  }
}

/* 0 for no records, 2 for records, 3 if some hold values: the versions of the format that know of them. */
VDB_LIGHT int vdb_has_records(const vdb_database *db) {
  int found = 0;
  if (!db->records.records && !db->mapping.offsets && !db->mapping.pages) return 0;
  for (size_t row = 0; row < db->slots && found < 3; row++) {
    vdb_text text = vdb_text_of(db, row);
    if (text.bytes) found = text.bit ? 3 : 2;
  }
  return found;
}

/* The table of a mapped file knows nothing of its journal: a new one is made. */
VDB_RARE void vdb_emit_table(vdb_writer *writer, const vdb_database *db) {
  vdb_records made = db->records;
  if (db->mapping.pages && vdb_make_table(db, &made, 0)) {
    writer->failed = ENOMEM;
    return;
  }
  if (made.table_used) vdb_emit(writer, made.table, made.table_size * sizeof *made.table);
  if (db->mapping.pages) VDB_FREE(made.table);
}

VDB_RARE void vdb_emit_part(vdb_writer *writer, const vdb_database *db, const vdb_header *header, int part,
                            int has_records) {
  if (part <= VDB_LINKS) {
    size_t row_bytes = vdb_part_row(header, part);
    for (size_t block = 0; row_bytes && block << db->block_shift < db->slots; block++)
      vdb_emit_block(writer, db, part, block, row_bytes);
  } else if (part == VDB_LIVE) {
    vdb_emit(writer, db->live, (db->slots + 63) / 64 * sizeof *db->live);
  } else if (part == VDB_FREE_ROWS) {
    vdb_emit(writer, db->free_rows, db->free_count * sizeof *db->free_rows);
  } else if (part == VDB_TOWER_OF || part == VDB_TOWERS) {
    if (header->index == VDB_INDEX_HNSW) vdb_emit_towers(writer, db, part);
  } else if (has_records && part == VDB_TABLE) {
    vdb_emit_table(writer, db);
  } else if (has_records) {
    vdb_emit_records(writer, db, part);
  }
}

VDB_RARE void vdb_fill_header(const vdb_database *db, vdb_header *header) {
  memset(header, 0, sizeof *header);
  memcpy(header->magic, VDB_MAGIC, sizeof header->magic);
  header->version = 2;
  header->header_size = sizeof *header;
  header->dimensions = (uint32_t)db->dimensions;
  header->metric = (uint32_t)db->metric;
  header->storage = (uint32_t)db->options.storage;
  header->index = (uint32_t)db->options.index;
  header->links = db->options.links;
  header->build_effort = db->options.build_effort;
  header->count = db->count;
  header->slots = db->slots;
  header->entry = db->options.index == VDB_INDEX_HNSW ? db->graph.entry : VDB_NO_ROW;
  header->top = header->entry == VDB_NO_ROW ? 0 : db->graph.top;
  header->sections = VDB_SECTIONS;
  const vdb_workshop *workshop = __atomic_load_n(&db->graph.workshop, __ATOMIC_ACQUIRE); /* a reader may make it now */
  if (workshop) header->unchecked = (uint32_t)vdb_min(workshop->unchecked, db->slots);
}

/* Sections first, the header last, once their checksums are known: until then the file has no magic. */
VDB_RARE void vdb_write_sections(vdb_writer *writer, const vdb_database *db) {
  vdb_header header;
  int has_records = vdb_has_records(db);
  vdb_fill_header(db, &header);
  if (has_records == 3) header.version = 3;
  vdb_emit_zeros(writer, sizeof header);
  vdb_flush(writer);
  for (int part = 0; part < VDB_SECTIONS; part++) {
    vdb_section *section = &header.section[part];
    section->kind = (uint32_t)part + 1;
    section->offset = writer->position;
    writer->crc = 0;
    vdb_emit_part(writer, db, &header, part, has_records);
    section->size = writer->position - section->offset;
    vdb_emit_zeros(writer, vdb_next_place(writer->position, part) - writer->position);
    vdb_flush(writer);
    section->crc = writer->crc;
  }
  header.file_size = writer->position;
  header.crc = vdb_crc32c(0, &header, sizeof header - sizeof header.crc);
  writer->identity.size = writer->identity.base = header.file_size;
  writer->identity.crc = writer->identity.chain = header.crc;
  if (writer->to_memory) {
    if (!writer->failed) memcpy(writer->memory, &header, sizeof header);
    return;
  }
  if (!writer->failed && vdb_sys_lseek(writer->file, 0, SEEK_SET) != 0) writer->failed = errno;
  vdb_write_all(writer, (const unsigned char *)&header, sizeof header);
  while (!writer->failed && vdb_sys_fsync(writer->file))
    if (errno != EINTR) writer->failed = errno;
}

VDB_RARE int vdb_same_identity(const vdb_identity *a, const vdb_identity *b) {
  return a->size == b->size && a->crc == b->crc && a->chain == b->chain;
}

/* The identity of an open file. 0 or errno. */
VDB_RARE int vdb_identify(int file, uint64_t size, vdb_identity *out);

/* Whether what is at the path is what `mode` wants. 0, or errno with target->error set. */
VDB_RARE int vdb_check_target(const vdb_database *db, vdb_target *target, vdb_save_mode mode) {
  uint64_t size = 0;
  vdb_identity identity = {0, 0, 0, 0};
  int failed = 0, file;
  if (mode == VDB_SAVE_ANY) return 0;
  if (mode == VDB_SAVE_NEW)
    return vdb_is_there(target->path) ? vdb_target_failed(target, VDB_ERROR_CHANGED, EEXIST) : 0;
  file = vdb_open_file(target->path, &size);
  if (file < 0 && errno == ENOENT) return vdb_target_failed(target, VDB_ERROR_CHANGED, ENOENT);
  failed = file < 0 ? errno : vdb_identify(file, size, &identity);
  if (file >= 0) vdb_sys_close(file);
  if (failed) return vdb_target_failed(target, VDB_ERROR_IO, failed);
  int same = db->identity.size && vdb_same_identity(&identity, &db->identity);
  return same ? 0 : vdb_target_failed(target, VDB_ERROR_CHANGED, VDB_STALE);
}

/* Puts the finished file in place. */
VDB_RARE int vdb_replace(const vdb_database *db, vdb_target *target, vdb_save_mode mode) {
  target->error = VDB_ERROR_IO;
  int failed = vdb_check_target(db, target, mode);
  if (!failed) failed = vdb_put_in_place(target, mode);
  if (failed) vdb_sys_unlink(target->temporary); /* if it has its name still */
  return failed;
}

/* Writes a new file beside the old one and renames it. After a failure the old file is as it was; only if syncing the
 * folder fails is the new one there already. */
VDB_RARE vdb_error vdb_write_file(const vdb_database *db, const char *path, vdb_save_mode mode,
                                  vdb_identity *identity) {
  vdb_writer writer;
  vdb_target target;
  memset(&writer, 0, sizeof writer);
  memset(&target, 0, sizeof target);
  writer.buffer = (unsigned char *)vdb_aligned_alloc(VDB_PIECE + 3 * VDB_NAME_ROOM);
  if (!writer.buffer) {
    errno = ENOMEM;
    return VDB_ERROR_OUT_OF_MEMORY;
  }
  target.path = (char *)writer.buffer + VDB_PIECE;
  target.other = target.path + VDB_NAME_ROOM;
  target.temporary = target.other + VDB_NAME_ROOM;
  writer.failed = vdb_find_target(path, &target);
  if (!writer.failed) writer.failed = vdb_check_target(db, &target, mode);
  if (!writer.failed && (writer.file = vdb_create_new(&target)) < 0) {
    writer.failed = errno;
  } else if (!writer.failed) {
    vdb_write_sections(&writer, db);
    if (vdb_sys_close(writer.file) && !writer.failed) writer.failed = errno;
    if (writer.failed)
      vdb_sys_unlink(target.temporary);
    else
      writer.failed = vdb_replace(db, &target, mode);
  }
  vdb_aligned_free(writer.buffer);
  *identity = writer.identity;
  if (!writer.failed) return VDB_OK;
  errno = writer.failed;
  return target.error;
}

/* The same in memory. */
VDB_RARE vdb_error vdb_write_bytes(const vdb_database *db, unsigned char **out, size_t *size) {
  vdb_writer writer;
  memset(&writer, 0, sizeof writer);
  writer.to_memory = 1;
  writer.buffer = (unsigned char *)vdb_aligned_alloc(VDB_PIECE);
  if (!writer.buffer) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_write_sections(&writer, db);
  vdb_aligned_free(writer.buffer);
  if (writer.failed) {
    VDB_FREE(writer.memory);
    return VDB_ERROR_OUT_OF_MEMORY;
  }
  *out = writer.memory;
  *size = writer.size;
  return VDB_OK;
}

