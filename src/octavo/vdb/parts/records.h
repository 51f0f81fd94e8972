/* --- records --- */
#define VDB_CHUNK_BYTES ((size_t)1 << 16)
#define VDB_MAX_ID ((size_t)1 << 20)

VDB_ONCE uint64_t vdb_hash(const char *id, size_t size) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)id[i]) * 0x100000001b3u;
  return hash ^ hash >> 32;
}

static inline size_t vdb_record_bytes(size_t id_size, size_t metadata_size) {
  return vdb_round_up(2 * sizeof(uint32_t) + id_size + 1 + metadata_size, 8);
}

/* What the journal of a mapped file says of a row's record: NULL for nothing, VDB_NO_RECORD for none. */
static inline unsigned char *vdb_journal_record_of(const vdb_mapping *mapping, size_t row) {
  unsigned char **page = row / VDB_RECORD_PAGE < mapping->pages ? mapping->records[row / VDB_RECORD_PAGE] : NULL;
  return page ? page[row % VDB_RECORD_PAGE] : NULL;
}

/* The record of a row, or NULL. In a mapped file nothing is believed before it is checked. */
VDB_ONCE const unsigned char *vdb_record_of(const vdb_database *db, size_t row) {
  if (!db->mapping.base) return db->records.records ? db->records.records[row] : NULL;
  const vdb_mapping *mapping = &db->mapping;
  const unsigned char *newer = vdb_journal_record_of(mapping, row);
  if (newer) return newer == VDB_NO_RECORD ? NULL : newer;
  if (!mapping->offsets || row >= mapping->slots) return NULL;
  vdb_touch(db, VDB_FAULT_BYTES);
  if (!mapping->offsets[row]) return NULL;
  uint64_t place = mapping->offsets[row] - 1;
  uint32_t sizes[2];
  if (place % 8 || place > mapping->text_size || mapping->text_size - place < sizeof sizes + 1) return NULL;
  memcpy(sizes, mapping->text + place, sizeof sizes);
  sizes[1] &= ~VDB_VALUES_BIT;
  uint64_t room = mapping->text_size - place - sizeof sizes - 1;
  if (sizes[0] > room || sizes[1] > room - sizes[0]) return NULL;
  return mapping->text[place + sizeof sizes + sizes[0]] == 0 ? mapping->text + place : NULL;
}

/* 0 if the row has no record. `*id` is NULL when it has none. */
VDB_ONCE int vdb_record_at(const vdb_database *db, size_t row, const char **id, size_t *id_size,
                                const unsigned char **metadata, size_t *metadata_size) {
  const unsigned char *record = vdb_record_of(db, row);
  uint32_t sizes[2] = {0, 0};
  if (record) memcpy(sizes, record, sizeof sizes);
  *id = sizes[0] ? (const char *)record + sizeof sizes : NULL;
  *id_size = sizes[0];
  *metadata = record ? record + sizeof sizes + sizes[0] + 1 : NULL;
  *metadata_size = sizes[1] & ~VDB_VALUES_BIT;
  return record != NULL;
}

/* Not 0 if the metadata of a row is values. */
VDB_ONCE int vdb_has_values(const vdb_database *db, size_t row) {
  const unsigned char *record = vdb_record_of(db, row);
  uint32_t sizes[2] = {0, 0};
  if (record) memcpy(sizes, record, sizeof sizes);
  return (sizes[1] & VDB_VALUES_BIT) != 0;
}

/* Whether a record lies in the text of a file. */
VDB_INLINE int vdb_is_loaded(const vdb_records *records, const unsigned char *record) {
  if (!records->loaded) return 0;
  uintptr_t place = (uintptr_t)record - (uintptr_t)(records->loaded + 1); /* wraps if it lies before */
  return place < records->loaded->size;
}

VDB_INLINE vdb_record_head *vdb_head_of(const unsigned char *record) {
  return (vdb_record_head *)(void *)(uintptr_t)(record - sizeof(vdb_record_head));
}

/* Memory for a record, with one user. Allocators keep about as much as the head beside each. */
VDB_LIGHT unsigned char *vdb_record_make(vdb_records *records, size_t bytes) {
  vdb_record_head *head = (vdb_record_head *)VDB_MALLOC(sizeof(vdb_record_head) + bytes);
  if (!head) return NULL;
  head->users = 1;
  head->unused = 0;
  records->bytes += bytes + 2 * sizeof(vdb_record_head);
  return (unsigned char *)(head + 1);
}

/* One user less of a record that is not a file's. */
static inline void vdb_record_leave(unsigned char *record) {
  vdb_record_head *head = vdb_head_of(record);
  if (__atomic_sub_fetch(&head->users, 1u, __ATOMIC_ACQ_REL) == 0) VDB_FREE(head);
}

VDB_LIGHT void vdb_loaded_leave(vdb_loaded *loaded) {
  if (loaded && __atomic_sub_fetch(&loaded->users, 1u, __ATOMIC_ACQ_REL) == 0) VDB_FREE(loaded);
}

/* What keeps the id of a row where it is, whatever becomes of the row. */
typedef struct {
  const char *id;        /* NULL if the row has none */
  unsigned char *record; /* NULL if it lies in `loaded`, or in a mapped file */
  vdb_loaded *loaded;
} vdb_hold;

VDB_LIGHT vdb_hold vdb_hold_record(const vdb_database *db, size_t row) {
  vdb_hold hold = {NULL, NULL, NULL};
  const unsigned char *metadata;
  size_t id_size, size;
  vdb_record_at(db, row, &hold.id, &id_size, &metadata, &size);
  if (!hold.id || db->mapping.base) return hold;
  if (vdb_is_loaded(&db->records, db->records.records[row])) hold.loaded = db->records.loaded;
  else hold.record = db->records.records[row];
  __atomic_add_fetch(hold.loaded ? &hold.loaded->users : &vdb_head_of(hold.record)->users, 1u, __ATOMIC_RELAXED);
  return hold;
}

VDB_LIGHT void vdb_hold_end(const vdb_hold *hold) {
  if (hold->record) vdb_record_leave(hold->record);
  vdb_loaded_leave(hold->loaded);
}

static inline size_t vdb_bytes_of_record(const unsigned char *record) {
  uint32_t sizes[2];
  memcpy(sizes, record, sizeof sizes);
  return vdb_record_bytes(sizes[0], sizes[1] & ~VDB_VALUES_BIT);
}

/* Moves records out of the text of a file, about `budget` bytes of them, and gives the text back when none is left. 0
 * for want of memory: what was moved is moved, and the rest is where it was. */
VDB_LIGHT int vdb_leave_text(vdb_database *db, size_t budget) {
  vdb_records *records = &db->records;
  vdb_loaded *loaded = records->loaded;
  for (size_t spent = 0; loaded->moved < db->slots && spent < budget; loaded->moved++, spent += sizeof(void *)) {
    unsigned char *record = records->records[loaded->moved], *own;
    if (!record || !vdb_is_loaded(records, record)) continue;
    size_t bytes = vdb_bytes_of_record(record);
    if (!(own = vdb_record_make(records, bytes))) return 0;
    memcpy(own, record, bytes);
    records->records[loaded->moved] = own;
    loaded->dead += bytes;
    spent += bytes;
  }
  if (loaded->moved < db->slots) return 1;
  records->loaded = NULL;
  vdb_loaded_leave(loaded);
  return 1;
}

/* A row's record has no row any more. Once half of a file's text is dead the rest moves out of it, a little with each
 * row that goes, so that no call takes long for it. */
VDB_LIGHT void vdb_discard_record(vdb_database *db, unsigned char *record) {
  vdb_records *records = &db->records;
  size_t bytes = vdb_bytes_of_record(record);
  if (!vdb_is_loaded(records, record)) {
    records->bytes -= bytes + 2 * sizeof(vdb_record_head);
    vdb_record_leave(record);
  } else {
    records->loaded->dead += bytes;
  }
  if (records->loaded && records->loaded->dead > records->loaded->size / 2 &&
      !__atomic_load_n(&records->lent, __ATOMIC_RELAXED))
    (void)vdb_leave_text(db, 4 * bytes + 4096);
}

VDB_LIGHT void vdb_release_records(vdb_database *db) {
  vdb_records *records = &db->records;
  for (size_t row = 0; records->records && row < db->capacity; row++) {
    unsigned char *record = records->records[row];
    if (record && !vdb_is_loaded(records, record)) vdb_record_leave(record);
  }
  vdb_loaded_leave(records->loaded);
  VDB_FREE(records->records);
  VDB_FREE(records->borrowed);
}

/* What the journal of a mapped file has in memory. */
VDB_RARE void vdb_release_journal(vdb_database *db) {
  vdb_mapping *mapping = &db->mapping;
  for (size_t i = 0; i < mapping->pages; i++) {
    unsigned char **page = mapping->records[i];
    for (size_t j = 0; page && j < VDB_RECORD_PAGE; j++)
      if (page[j] && page[j] != VDB_NO_RECORD) vdb_record_leave(page[j]);
    VDB_FREE(page);
  }
  VDB_FREE(mapping->records);
  VDB_FREE(mapping->ids);
  VDB_FREE(mapping->own);
}

VDB_RARE size_t vdb_journal_bytes(const vdb_mapping *mapping) {
  size_t bytes = mapping->pages * sizeof *mapping->records + mapping->id_count * sizeof *mapping->ids;
  if (mapping->own) bytes += mapping->slots / 8;
  for (size_t i = 0; i < mapping->pages; i++) bytes += mapping->records[i] ? VDB_RECORD_PAGE * sizeof(void *) : 0;
  return bytes;
}

static inline void vdb_table_enter(vdb_records *records, size_t row, uint64_t hash) {
  size_t mask = records->table_size - 1, place = (size_t)hash & mask;
  while (records->table[place] < VDB_GONE) place = (place + 1) & mask;
  if (records->table[place] == VDB_NO_ROW) records->table_used++;
  records->table[place] = (uint32_t)row;
}

/* A table for the rows there are and `more` ids to come, less than half full and without gone places; `table` of `records`
 * becomes it, and what was there is left alone. */
VDB_LIGHT vdb_error vdb_make_table(const vdb_database *db, vdb_records *records, size_t more) {
  size_t ids = more, size = 16, id_size, metadata_size;
  const char *id;
  const unsigned char *metadata;
  for (size_t row = 0; row < db->slots; row++)
    ids += vdb_is_live(db, row) && vdb_record_at(db, row, &id, &id_size, &metadata, &metadata_size) && id;
  while (size < 2 * ids) size *= 2;
  uint32_t *table = (uint32_t *)VDB_MALLOC(size * sizeof(uint32_t));
  if (!table) return VDB_ERROR_OUT_OF_MEMORY;
  memset(table, 0xff, size * sizeof(uint32_t));
  records->table = table;
  records->table_size = size;
  records->table_used = 0;
  for (size_t row = 0; row < db->slots; row++)
    if (vdb_is_live(db, row) && vdb_record_at(db, row, &id, &id_size, &metadata, &metadata_size) && id)
      vdb_table_enter(records, row, vdb_hash(id, id_size));
  return VDB_OK;
}

VDB_RARE vdb_error vdb_rebuild_table(vdb_database *db, size_t more) {
  uint32_t *old = db->records.table;
  vdb_error error = vdb_make_table(db, &db->records, more);
  if (!error) VDB_FREE(old);
  return error;
}

static inline int vdb_has_id(const vdb_database *db, size_t row, const char *id, size_t size) {
  const char *own;
  const unsigned char *metadata;
  size_t own_size, metadata_size;
  return vdb_is_live(db, row) && vdb_record_at(db, row, &own, &own_size, &metadata, &metadata_size) && own_size == size &&
         memcmp(own, id, size) == 0;
}

/* The same of rows whose record the journal of a mapped file brought; `*place` starts at the size of the table. */
VDB_LIGHT uint32_t vdb_journal_seek(const vdb_database *db, const char *id, size_t size, uint64_t hash, size_t *place) {
  const vdb_mapping *mapping = &db->mapping;
  size_t low = 0, high = mapping->id_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (mapping->ids[middle].hash < hash) low = middle + 1;
    else high = middle;
  }
  for (;;) {
    size_t next = low + (*place - db->records.table_size);
    if (next >= mapping->id_count || mapping->ids[next].hash != hash) return VDB_NO_ROW;
    ++*place;
    if (vdb_has_id(db, mapping->ids[next].row, id, size)) return (uint32_t)mapping->ids[next].row;
  }
}

/* Rows with this id, one a call, in table order; `*place` starts at 0. VDB_NO_ROW when there are no more. Rows of equal
 * id lie one after the other in the table, so thousands of one id make that id slow, and no other. */
VDB_ONCE uint32_t vdb_table_seek(const vdb_database *db, const char *id, size_t size, uint64_t hash,
                                      size_t *place) {
  const vdb_records *records = &db->records;
  if (!size) return VDB_NO_ROW;
  size_t mask = records->table_size - 1, start = (size_t)hash;
  while (*place < records->table_size) {
    uint32_t row = records->table[(start + (*place)++) & mask];
    if (row == VDB_NO_ROW) *place = records->table_size;
    else if (row < VDB_GONE && row < db->slots && !vdb_journal_record_of(&db->mapping, row) && vdb_has_id(db, row, id, size))
      return row;
  }
  return db->mapping.id_count ? vdb_journal_seek(db, id, size, hash, place) : VDB_NO_ROW;
}

VDB_ONCE uint32_t vdb_table_next(const vdb_database *db, const char *id, size_t size, size_t *place) {
  return vdb_table_seek(db, id, size, db->records.table_size || db->mapping.id_count ? vdb_hash(id, size) : 0, place);
}

VDB_LIGHT uint32_t vdb_lowest_row(const vdb_database *db, const char *id, size_t size) {
  uint32_t lowest = VDB_NO_ROW, row;
  for (size_t place = 0; (row = vdb_table_next(db, id, size, &place)) != VDB_NO_ROW;)
    if (row < lowest) lowest = row;
  return lowest;
}

/* Room in the table for `ids` more. */
VDB_ONCE vdb_error vdb_table_room(vdb_database *db, size_t ids) {
  if (2 * (db->records.table_used + ids) <= db->records.table_size) return VDB_OK;
  return vdb_rebuild_table(db, vdb_max(ids, db->records.table_used / 2));
}

/* The bytes of a record's metadata, values or not. */
static inline size_t vdb_metadata_size(const vdb_record *record) {
  return record->value_count ? vdb_values_size(record->values, record->value_count) : record->metadata_size;
}

/* Room for every row's record. */
static inline int vdb_records_room(vdb_database *db) {
  return db->records.records || vdb_grow((void **)&db->records.records, 0, db->capacity, sizeof(unsigned char *));
}

/* Makes the record of a row, which has none yet. */
VDB_LIGHT vdb_error vdb_make_record(vdb_database *db, size_t row, const char *id, size_t id_size,
                                        const vdb_record *given) {
  size_t metadata_size = vdb_metadata_size(given);
  uint32_t sizes[2] = {(uint32_t)id_size, (uint32_t)metadata_size | (given->value_count ? VDB_VALUES_BIT : 0)};
  if (!id_size && !metadata_size) return VDB_OK;
  if (!vdb_records_room(db)) return VDB_ERROR_OUT_OF_MEMORY;
  unsigned char *record = vdb_record_make(&db->records, vdb_record_bytes(id_size, metadata_size));
  if (!record) return VDB_ERROR_OUT_OF_MEMORY;
  memcpy(record, sizes, sizeof sizes);
  unsigned char *metadata = record + sizeof sizes + id_size + 1;
  if (id_size) memcpy(record + sizeof sizes, id, id_size);
  metadata[-1] = 0;
  if (given->value_count) vdb_write_values(given->values, given->value_count, metadata);
  else if (metadata_size) memcpy(metadata, given->metadata, metadata_size);
  db->records.records[row] = record;
  vdb_columns_touch(&db->columns, row);
  return VDB_OK;
}

/* Copies id and metadata and enters the id into the table, where there must be room. */
static inline vdb_error vdb_put_record(vdb_database *db, size_t row, const vdb_record *given, size_t id_size,
                                       uint64_t hash) {
  vdb_error error = vdb_make_record(db, row, given->id, id_size, given);
  if (!error && id_size) vdb_table_enter(&db->records, row, hash);
  return error;
}

VDB_LIGHT void vdb_drop_record(vdb_database *db, size_t row) {
  vdb_records *records = &db->records;
  const char *id;
  const unsigned char *metadata;
  size_t id_size, metadata_size;
  if (records->borrowed) records->borrowed[row] = NULL;
  if (!vdb_record_at(db, row, &id, &id_size, &metadata, &metadata_size)) return;
  if (id) {
    size_t mask = records->table_size - 1, place = (size_t)vdb_hash(id, id_size) & mask;
    while (records->table[place] != (uint32_t)row) place = (place + 1) & mask;
    records->table[place] = VDB_GONE;
  }
  unsigned char *record = records->records[row];
  records->records[row] = NULL;
  vdb_columns_touch(&db->columns, row);
  vdb_discard_record(db, record);
}

