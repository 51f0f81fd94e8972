#ifdef VDB_CALM
#pragma GCC push_options
#pragma GCC optimize("O1")
#endif
/* --- what has changed since the file was read or written --- */
VDB_INLINE void vdb_mark_all(vdb_database *db) { __atomic_store_n(&db->changes.unknown, 1, __ATOMIC_RELAXED); }

/* Tasks that build links mark rows at once. */
VDB_ONCE void vdb_mark(vdb_database *db, uint64_t *bits, size_t row) {
  uint64_t bit = (uint64_t)1 << (row & 63);
  if (row >> 6 >= db->changes.words) vdb_mark_all(db);
  else if (!(__atomic_load_n(&bits[row >> 6], __ATOMIC_RELAXED) & bit))
    (void)__atomic_fetch_or(&bits[row >> 6], bit, __ATOMIC_RELAXED);
}

/* A row has a new vector or record. */
VDB_INLINE void vdb_mark_whole(vdb_database *db, size_t row) { vdb_mark(db, db->changes.whole, row); }

/* A row has gone, or has other links. */
VDB_INLINE void vdb_mark_part(vdb_database *db, size_t row) { vdb_mark(db, db->changes.part, row); }

/* Without memory the next save writes everything. */
VDB_RARE void vdb_changes_make_room(vdb_database *db) {
  vdb_changes *changes = &db->changes;
  size_t words = db->capacity / 64;
  if (!changes->words || words <= changes->words) return;
  if (!vdb_grow((void **)&changes->whole, changes->words, words, sizeof(uint64_t)) ||
      !vdb_grow((void **)&changes->part, changes->words, words, sizeof(uint64_t)))
    vdb_mark_all(db); /* one array longer than `words` says does no harm */
  else
    changes->words = words;
}

VDB_RARE void vdb_changes_release(vdb_database *db) {
  VDB_FREE(db->changes.whole);
  VDB_FREE(db->changes.part);
  db->changes.whole = db->changes.part = NULL;
  db->changes.words = 0;
}

/* The database is as its file from here on. */
VDB_RARE void vdb_changes_begin(vdb_database *db) {
  vdb_changes *changes = &db->changes;
  size_t words = vdb_max(1, db->capacity / 64);
  if (words != changes->words) vdb_changes_release(db);
  if (!changes->words && vdb_grow((void **)&changes->whole, 0, words, sizeof(uint64_t)) &&
      vdb_grow((void **)&changes->part, 0, words, sizeof(uint64_t)))
    changes->words = words;
  if (changes->words) {
    memset(changes->whole, 0, words * sizeof(uint64_t));
    memset(changes->part, 0, words * sizeof(uint64_t));
  }
  changes->free_kept = db->free_count;
  __atomic_store_n(&changes->unknown, changes->words == 0, __ATOMIC_RELAXED);
}

