/* --- what lies on disk ---
 *
 * Vectors of a mapped file, and those of a database whose vectors are kept on disk (vdb_keep_on_disk), are pages that
 * the system reads when they are needed and counts as this process's memory from then on. vdb_set_resident bounds how
 * many: what may have come in is added up, and at the bound all of it is given back to the system, which still has it
 * in its cache. Codes that are read by every search stay, if the bound has room for them, and the few vectors whose
 * distances are then measured are read, not mapped.
 */
VDB_RARE void vdb_let_go(const vdb_database *db);

/* Before `bytes` of what lies on disk are read. */
VDB_INLINE void vdb_touch(const vdb_database *db, size_t bytes) {
  vdb_paging *paging = &((vdb_database *)(uintptr_t)db)->paging;
  if (paging->limit && __atomic_add_fetch(&paging->touched, bytes, __ATOMIC_RELAXED) > paging->limit) vdb_let_go(db);
}

#ifndef _WIN32
/* Pages between two addresses, if there are enough of them to be worth a call. */
VDB_RARE void vdb_give_back(unsigned char *begin, unsigned char *end) {
  uintptr_t page = 4096, from = ((uintptr_t)begin + page - 1) & ~(page - 1), to = (uintptr_t)end & ~(page - 1);
  if (from + 64 * page <= to) (void)vdb_sys_madvise((void *)from, to - from, 4); /* DONTNEED */
}

/* A mapped array, but for rows that the journal has written over: their pages are no longer the file's. */
VDB_RARE void vdb_give_back_array(const vdb_mapping *mapping, unsigned char *array, size_t row_bytes) {
  size_t words = (mapping->slots + 63) / 64, begin = 0;
  for (size_t word = 0; array && word <= words; word++) {
    if (word < words && !(mapping->own && mapping->own[word])) continue;
    size_t end = vdb_min(64 * word, mapping->slots);
    if (begin < end) vdb_give_back(array + begin * row_bytes, array + end * row_bytes);
    begin = 64 * (word + 1);
  }
}

/* Gives back what has come in. Whoever reads it at the moment reads it anew. */
VDB_RARE void vdb_let_go(const vdb_database *db) {
  vdb_paging *paging = &((vdb_database *)(uintptr_t)db)->paging;
  const vdb_mapping *mapping = &db->mapping;
  if (__atomic_exchange_n(&paging->touched, (size_t)0, __ATOMIC_RELAXED) <= paging->limit) return;
  for (size_t i = 0; i < db->block_count; i++)
    if (db->blocks[i].spilled) {
      unsigned char *begin = (unsigned char *)db->blocks[i].spilled;
      vdb_give_back(begin, begin + db->blocks[i].spilled_bytes);
    }
  for (size_t i = 0; mapping->base && i < VDB_MAPPED_ARRAYS; i++)
    if (paging->scans || (i == 0 && db->options.storage == VDB_STORAGE_F32_I8))
      vdb_give_back_array(mapping, mapping->arrays[i], mapping->row_bytes[i]);
  if (!mapping->offsets) return;
  unsigned char *offsets = (unsigned char *)(uintptr_t)mapping->offsets, *text = (unsigned char *)(uintptr_t)mapping->text;
  vdb_give_back(offsets, offsets + mapping->slots * sizeof(uint64_t));
  vdb_give_back(text, text + mapping->text_size);
}

/* `bytes` more of the file without a name, mapped; NULL with errno on failure. */
VDB_RARE void *vdb_spill(vdb_paging *paging, size_t bytes) {
#if defined(__linux__)
  int failed = vdb_sys_posix_fallocate(paging->file, (long)paging->size, (long)bytes); /* a full disk is an error here */
  if (failed) errno = failed;
#else
  int failed = vdb_sys_ftruncate(paging->file, (int64_t)(paging->size + bytes));
#endif
  if (failed) return NULL;
  void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, paging->file, (int64_t)paging->size);
  if (base == MAP_FAILED) return NULL;
  paging->size += bytes;
  return base;
}

/* Of the last block whose vectors begin a mapping. */
VDB_RARE void vdb_unspill(vdb_paging *paging, vdb_block *block) {
  if (!block->spilled) return;
  (void)munmap(block->spilled, block->spilled_bytes);
  paging->size -= block->spilled_bytes;
  if (vdb_sys_ftruncate(paging->file, (long)paging->size)) paging->size += block->spilled_bytes; /* the place stays unused */
}

/* An open file without a name in a folder; -1 with errno on failure. */
VDB_RARE int vdb_nameless_file(const char *folder) {
  static unsigned counter;
  size_t size = strlen(folder);
  int file = -1;
  char *name = (char *)VDB_MALLOC(size + 64);
  if (!name) return errno = ENOMEM, -1;
  memcpy(name, folder, size);
  for (int attempt = 0; attempt < 100 && file < 0; attempt++) {
    unsigned number = __atomic_fetch_add(&counter, 1u, __ATOMIC_RELAXED);
    snprintf(name + size, 64, "/.vdb-vectors-%ld-%u", (long)vdb_sys_getpid(), number);
    file = open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (file < 0 && errno != EEXIST) break;
  }
  if (file >= 0) {
    fcntl(file, F_SETFD, FD_CLOEXEC);
    vdb_sys_unlink(name);
  }
  int number = errno;
  VDB_FREE(name);
  errno = number;
  return file;
}
#else
VDB_RARE void vdb_let_go(const vdb_database *db) { (void)db; }
VDB_RARE void *vdb_spill(vdb_paging *paging, size_t bytes) { return (void)paging, (void)bytes, (void *)NULL; }
VDB_RARE void vdb_unspill(vdb_paging *paging, vdb_block *block) { (void)paging, (void)block; }
VDB_RARE int vdb_nameless_file(const char *folder) { return (void)folder, errno = EINVAL, -1; }
#endif

/* The vector of a row, read into `room` [dimensions] where it lies on disk and is seldom read: what is around it stays there. */
VDB_LIGHT const float *vdb_fetch_vector(const vdb_database *db, size_t row, float *room) {
  const vdb_block *block = vdb_block_of(db, row);
  const unsigned char *vector = (const unsigned char *)vdb_vector_at(db, row), *base = db->mapping.base;
  size_t bytes = db->dimensions * sizeof(float), done = 0, at = (size_t)(vector - block->vectors) + block->place;
  int changed = db->mapping.own && row < db->mapping.slots && (db->mapping.own[row >> 6] >> (row & 63) & 1u);
  int mapped = base && vector >= base && vector < base + db->mapping.size && !changed;
  if (mapped) at = (size_t)(vector - base);
  if (db->options.storage != VDB_STORAGE_F32_I8 || !(mapped || db->paging.on_disk)) {
    vdb_touch(db, VDB_FAULT_BYTES);
    return (const float *)(const void *)vector;
  }
  while (done < bytes) {
    long got = vdb_sys_pread(db->paging.file, (unsigned char *)room + done, bytes - done, (int64_t)(at + done));
    if (got <= 0 && !(got < 0 && errno == EINTR)) return (const float *)(const void *)vector; /* as it would be without */
    done += got > 0 ? (size_t)got : 0;
  }
  return room;
}

/* Bytes of what every search reads in a mapped file: it should stay. */
VDB_RARE size_t vdb_always_read(const vdb_database *db) {
  const vdb_mapping *mapping = &db->mapping;
  size_t bytes = db->graph.towers_size * sizeof(uint32_t);
  for (size_t i = 0; i < VDB_MAPPED_ARRAYS; i++)
    if (mapping->arrays[i] && (i || db->options.storage != VDB_STORAGE_F32_I8)) bytes += mapping->slots * mapping->row_bytes[i];
  return mapping->base ? bytes : 0;
}

/* `bytes` of what lies on disk may stay in memory; 0: as many as the system likes. */
VDB_RARE void vdb_page_within(vdb_database *db, size_t bytes) {
  vdb_paging *paging = &db->paging;
  size_t always = vdb_always_read(db), least = 4 * VDB_FAULT_BYTES;
  paging->scans = db->mapping.base ? always + least > bytes : db->options.storage != VDB_STORAGE_F32_I8;
  paging->limit = !bytes ? 0 : db->mapping.base && !paging->scans ? bytes - always : vdb_max(bytes, least);
  paging->touched = paging->limit; /* what came in before counts too: the next read gives it back */
}

