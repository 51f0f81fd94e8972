
/* --- writing the journal --- */

/* One row as it is. */
VDB_RARE void vdb_emit_entry(vdb_writer *writer, const vdb_database *db, const vdb_header *header, size_t row,
                             int whole) {
  const vdb_block *block = vdb_block_of(db, row);
  size_t place = vdb_row_in_block(db, row), links = db->options.links;
  vdb_text text = vdb_text_of(db, row);
  uint32_t start[2] = {(uint32_t)row, (vdb_is_live(db, row) ? VDB_ENTRY_LIVE : 0) | (whole ? VDB_ENTRY_WHOLE : 0)};
  vdb_numbers numbers = {0.0f, 0.0f, 0.0f, (uint32_t)text.id_size, (uint32_t)text.metadata_size | text.bit};
  vdb_emit(writer, start, sizeof start);
  if (whole) {
    numbers.norm = block->norms[place];
    if (block->scales) numbers.scale = block->scales[place];
    if (block->residuals) numbers.residual = block->residuals[place];
    vdb_emit(writer, &numbers, sizeof numbers);
  }
  if (header->index == VDB_INDEX_HNSW) {
    uint32_t levels = vdb_levels_at(db, row);
    vdb_emit_links(writer, vdb_links_at(db, row), 2 * links);
    vdb_emit(writer, &levels, sizeof levels);
    for (uint32_t level = 1; level <= levels; level++) vdb_emit_links(writer, vdb_links_of(db, row, level), links);
  }
  for (int part = VDB_VECTORS; part <= VDB_CODES && whole; part++) {
    size_t size = vdb_part_row(header, part);
    if (size) vdb_emit(writer, vdb_block_array(block, part) + place * size, size);
  }
  if (whole) {
    vdb_emit(writer, text.id, text.id_size);
    vdb_emit_zeros(writer, 1);
    vdb_emit(writer, text.metadata, text.metadata_size);
  }
  vdb_emit_zeros(writer, vdb_round_up((size_t)writer->position, 8) - (size_t)writer->position);
}

/* The batch that makes the file what the database is, into memory; 0 if it would be longer than `most`. */
VDB_LIGHT int vdb_make_batch(vdb_writer *writer, const vdb_database *db, size_t most) {
  const vdb_changes *changes = &db->changes;
  vdb_header header;
  vdb_batch batch;
  uint32_t counts[2] = {0, (uint32_t)(db->free_count - changes->free_kept)};
  vdb_fill_header(db, &header);
  memset(&batch, 0, sizeof batch);
  vdb_emit(writer, &batch, sizeof batch);
  vdb_emit(writer, counts, sizeof counts);
  if (counts[1] > most / sizeof(uint32_t)) return 0;
  vdb_emit(writer, db->free_rows + changes->free_kept, counts[1] * sizeof(uint32_t));
  vdb_emit_zeros(writer, vdb_round_up((size_t)writer->position, 8) - (size_t)writer->position);
  for (size_t word = 0; word << 6 < db->slots; word++) {
    for (uint64_t bits = changes->whole[word] | changes->part[word]; bits; bits &= bits - 1) {
      size_t row = (word << 6) + (size_t)__builtin_ctzll(bits);
      if (row >= db->slots) break;
      vdb_emit_entry(writer, db, &header, row, vdb_bit(changes->whole, row));
      counts[0]++;
      if (writer->position > most || writer->failed) return 0;
    }
  }
  vdb_emit_zeros(writer, vdb_round_up((size_t)writer->position, sizeof batch) - (size_t)writer->position);
  vdb_flush(writer);
  if (writer->failed) return 0;
  memcpy(batch.magic, VDB_BATCH_MAGIC, sizeof batch.magic);
  batch.place = db->identity.size;
  batch.size = writer->position;
  batch.slots = header.slots;
  batch.count = header.count;
  batch.free_kept = changes->free_kept;
  batch.entry = header.entry;
  batch.unchecked = header.unchecked;
  batch.previous = db->identity.chain;
  batch.crc = vdb_crc32c(0, &batch, sizeof batch - 4);
  memcpy(writer->memory, &batch, sizeof batch);
  memcpy(writer->memory + sizeof batch, counts, sizeof counts);
  return 1;
}

/* Nothing has changed since the file was read or written. */
VDB_LIGHT int vdb_is_unchanged(const vdb_database *db) {
  const vdb_changes *changes = &db->changes;
  if (changes->free_kept != db->free_count) return 0;
  for (size_t word = 0; word << 6 < db->slots; word++)
    if (changes->whole[word] | changes->part[word]) return 0;
  return 1;
}

#ifndef _WIN32
/* Whether the open file is, or is going to be, another's: 0, errno, or VDB_STALE. What an unfinished save has left goes. */
VDB_RARE int vdb_check_journal(const vdb_database *db, int file, const char *path) {
  struct stat status, named;
  struct flock lock;
  vdb_identity identity = {0, 0, 0, 0}, end = {0, 0, 0, 0};
  vdb_source source = {file, NULL};
  vdb_batch_end last;
  memset(&lock, 0, sizeof lock);
  lock.l_type = F_WRLCK; /* of the whole file; the system takes it back when the file is closed */
#if defined(__linux__)
  int asked = fcntl(file, 37 /* F_OFD_SETLK */, &lock);
#else
  int asked = fcntl(file, F_SETLK, &lock);
#endif
  if (asked && (errno == EAGAIN || errno == EACCES)) return VDB_STALE; /* another program is saving */
  if (asked || fstat(file, &status) || stat(path, &named)) return errno;
  if (named.st_ino != status.st_ino || named.st_dev != status.st_dev) return VDB_STALE;
  uint64_t size = (uint64_t)status.st_size;
  if (size < db->identity.size) return VDB_STALE;
  int failed = vdb_identify(file, sizeof(vdb_header), &identity); /* the header alone */
  if (failed || identity.crc != db->identity.crc) return failed ? failed : VDB_STALE;
  if (db->identity.size > db->identity.base) {
    failed = vdb_read_bytes(source, &last, sizeof last, db->identity.size - sizeof last);
    if (failed || last.crc != db->identity.chain) return failed > 0 ? failed : VDB_STALE;
  }
  if (size == db->identity.size) return 0;
  end = db->identity;
  failed = vdb_identify_journal(source, size, &end);
  if (failed || end.size != db->identity.size) return failed > 0 ? failed : VDB_STALE;
  return vdb_sys_ftruncate(file, (long)end.size) ? errno : 0;
}

VDB_RARE int vdb_sync(int file) {
  while (vdb_sys_fsync(file))
    if (errno != EINTR) return errno;
  return 0;
}

/* Appends a batch: all of it, synced, and then its end mark, synced. 0 or errno; then the file is as it was. */
VDB_RARE int vdb_append_batch(int file, vdb_writer *writer, vdb_identity *identity) {
  vdb_batch_end end;
  memset(&end, 0, sizeof end);
  memcpy(end.magic, VDB_END_MAGIC, sizeof end.magic);
  end.place = identity->size;
  end.size = writer->size;
  end.content = vdb_crc32c(0, writer->memory, writer->size);
  end.crc = vdb_crc32c(0, &end, sizeof end - 4);
  writer->file = file;
  writer->to_memory = 0;
  if (vdb_sys_lseek(file, (long)identity->size, SEEK_SET) < 0) return errno;
  vdb_write_all(writer, writer->memory, writer->size);
  if (!writer->failed) writer->failed = vdb_sync(file);
  if (!writer->failed) vdb_write_all(writer, (const unsigned char *)&end, sizeof end);
  if (!writer->failed) writer->failed = vdb_sync(file);
  if (writer->failed) {
    int ignored = vdb_sys_ftruncate(file, (long)identity->size); /* otherwise the next save does it */
    (void)ignored;
    return writer->failed;
  }
  identity->size += writer->size + sizeof end;
  identity->chain = end.crc;
  return 0;
}

/* Appends what has changed; `*identity` becomes the file's. VDB_ERROR_READ_ONLY if it must be written as a whole. */
VDB_RARE vdb_error vdb_write_changes(const vdb_database *db, const char *path, vdb_identity *identity) {
  vdb_writer writer;
  uint64_t journal = db->identity.size - db->identity.base, most = db->identity.base / 8 + VDB_JOURNAL_SPARE;
  if (!db->identity.size || !db->changes.words || journal >= most ||
      __atomic_load_n(&db->changes.unknown, __ATOMIC_RELAXED) || __atomic_load_n(&db->changes.lent, __ATOMIC_RELAXED))
    return VDB_ERROR_READ_ONLY;
  int file = open(path, O_RDWR | O_NONBLOCK);
  if (file < 0) return VDB_ERROR_READ_ONLY; /* what is wrong, a whole save will say */
  fcntl(file, F_SETFD, FD_CLOEXEC);
  *identity = db->identity;
  memset(&writer, 0, sizeof writer);
  int failed = vdb_check_journal(db, file, path);
  vdb_error error = failed == VDB_STALE ? VDB_ERROR_CHANGED : failed ? VDB_ERROR_READ_ONLY : VDB_OK;
  if (!error && !vdb_is_unchanged(db)) {
    writer.to_memory = 1;
    writer.buffer = (unsigned char *)vdb_aligned_alloc(VDB_PIECE);
    if (!writer.buffer || !vdb_make_batch(&writer, db, (size_t)(most - journal))) error = VDB_ERROR_READ_ONLY;
    if (!error && (failed = vdb_append_batch(file, &writer, identity)) != 0) error = VDB_ERROR_IO;
    vdb_aligned_free(writer.buffer);
    VDB_FREE(writer.memory);
  }
  vdb_sys_close(file);
  errno = failed;
  return error;
}
#else
VDB_RARE vdb_error vdb_write_changes(const vdb_database *db, const char *path, vdb_identity *identity) {
  (void)db, (void)path, (void)identity;
  return VDB_ERROR_READ_ONLY;
}
#endif

