/* --- reading --- */
/* A file, or a saved database that lies in memory. */
typedef struct {
  int file;
  const unsigned char *memory; /* NULL for a file */
} vdb_source;

typedef struct {
  vdb_source source;
  uint64_t size, position; /* position: of the first format's next read */
  unsigned char *buffer;   /* [VDB_PIECE] */
  size_t begin, end;       /* the buffer's unread bytes */
  char *message;
  size_t message_size;
  vdb_watch *watch; /* NULL for none */
  size_t done;      /* bytes of sections that are read; counted atomically */
} vdb_reader;

/* Says what is wrong. */
VDB_RARE vdb_error vdb_fault(vdb_reader *reader, vdb_error error, const char *where, const char *what,
                             uint64_t at) {
  int number = error == VDB_ERROR_IO ? errno : error == VDB_ERROR_OUT_OF_MEMORY ? ENOMEM : EINVAL;
  if (reader->message && reader->message_size) {
    if (error == VDB_ERROR_IO)
      snprintf(reader->message, reader->message_size, "%s: %s: %s", where, what, strerror(number));
    else
      snprintf(reader->message, reader->message_size, "%s: %s (byte %llu)", where, what, (unsigned long long)at);
  }
  errno = number;
  return error;
}

VDB_RARE vdb_error vdb_fault_inside(vdb_reader *reader, const vdb_header *header, int part, const char *what,
                                    uint64_t place) {
  return vdb_fault(reader, VDB_ERROR_CORRUPT, vdb_part_name(part), what, header->section[part].offset + place);
}

#define VDB_FILE_ENDS (-1)
#define VDB_STOPPED (-2)

/* 0, errno, or VDB_FILE_ENDS. */
VDB_LIGHT int vdb_read_bytes(vdb_source source, void *to, size_t size, uint64_t at) {
  unsigned char *bytes = (unsigned char *)to;
  if (source.memory) { /* readers stay below its size, as they do in a file */
    memcpy(bytes, source.memory + at, size);
    return 0;
  }
  while (size) {
    long got = vdb_sys_pread(source.file, bytes, size, (int64_t)at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return got < 0 ? errno : VDB_FILE_ENDS;
    bytes += got;
    size -= (size_t)got;
    at += (uint64_t)got;
  }
  return 0;
}

VDB_RARE int vdb_identify_journal(vdb_source source, uint64_t size, vdb_identity *out);

VDB_RARE int vdb_identify(int file, uint64_t size, vdb_identity *out) {
  vdb_header header; /* its own checksum left out: with it, every header would have the same */
  size_t most = sizeof header - sizeof header.crc, have = size < most ? (size_t)size : most;
  vdb_source source = {file, NULL};
  memset(&header, 0, sizeof header);
  int failed = vdb_read_bytes(source, &header, have, 0);
  out->size = out->base = size;
  out->crc = out->chain = vdb_crc32c(0, &header, have);
  if (!failed && have == most && memcmp(header.magic, VDB_MAGIC, sizeof header.magic) == 0 && header.file_size < size) {
    out->size = out->base = header.file_size;
    failed = vdb_identify_journal(source, size, out);
  }
  return failed == VDB_FILE_ENDS ? 0 : failed; /* somebody is writing it: it is none that we know */
}

VDB_RARE vdb_error vdb_read_fault(vdb_reader *reader, int failed, const char *where, uint64_t at) {
  if (failed == VDB_STOPPED) return VDB_ERROR_INTERRUPTED;
  if (failed == VDB_FILE_ENDS) return vdb_fault(reader, VDB_ERROR_CORRUPT, where, "the file ends too early", at);
  errno = failed;
  return failed ? vdb_fault(reader, VDB_ERROR_IO, where, "cannot be read", at) : VDB_OK;
}

/* The checksum of two runs of bytes, one after the other, from theirs: crc * x^(8 size) + next. */
VDB_RARE uint32_t vdb_crc_append(uint32_t crc, uint32_t next, uint64_t size) {
  uint32_t power = (uint32_t)1 << 23; /* x^8, then its squares */
  for (; size; size >>= 1) {
    if (size & 1) crc = vdb_crc_multiply(power, crc);
    power = vdb_crc_multiply(power, power);
  }
  return crc ^ next;
}

/* The bits of the exponent in every float of a word of vectors; 0 for what is no floats, or looked at later. */
VDB_RARE uint64_t vdb_part_exponents(const vdb_header *header, int part) {
  if (part != VDB_VECTORS || header->storage == VDB_STORAGE_I8) return 0;
  return header->storage == VDB_STORAGE_F16    ? 0x7c007c007c007c00u
         : header->storage == VDB_STORAGE_BF16 ? 0x7f807f807f807f80u
                                               : 0x7f8000007f800000u;
}

typedef uint64_t vdb_words __attribute__((vector_size(64)));

/* Not 0 if no float has all bits of its exponent set. Adding the lowest of them to a full exponent carries into the
 * sign's place and no further, so a word is looked at as a whole. */
VDB_ONCE __attribute__((hot)) int vdb_words_finite(const unsigned char *bytes, size_t size, uint64_t exponents) {
  uint64_t step = exponents & ~(exponents << 1), signs = exponents + step, any = 0;
  vdb_words words, found;
  memset(&found, 0, sizeof found);
  for (; size >= sizeof words; bytes += sizeof words, size -= sizeof words) {
    memcpy(&words, bytes, sizeof words);
    found |= (words & exponents) + step;
  }
  memset(&words, 0, sizeof words);
  memcpy(&words, bytes, size);
  found |= (words & exponents) + step;
  for (int i = 0; i < 8; i++) any |= found[i];
  return !(any & signs);
}

/* A section is read in runs, in parallel: a block's array, or a piece of what is not in blocks. */
typedef struct {
  uint32_t crc;
  int failed;
  int wild; /* a number is not finite */
} vdb_run;

typedef struct {
  vdb_source source;
  int part;
  const vdb_database *db;
  unsigned char *to;  /* NULL: into the blocks */
  uint64_t offset, size, exponents;
  size_t run_bytes;
  vdb_run *runs;
  vdb_reader *reader;
} vdb_reading;

/* Reads one run in pieces; each is summed and looked at while it is in the cache. */
static inline __attribute__((hot)) void vdb_read_run(void *context, size_t task) {
  vdb_reading *job = (vdb_reading *)context;
  vdb_run *run = &job->runs[task];
  uint64_t start = (uint64_t)task * job->run_bytes, left = job->size - start;
  size_t size = left < job->run_bytes ? (size_t)left : job->run_bytes;
  unsigned char *bytes = job->to ? job->to + start : vdb_block_array(&job->db->blocks[task], job->part);
  memset(run, 0, sizeof *run);
  for (size_t at = 0; at < size && !run->failed; at += VDB_PIECE) {
    size_t piece = vdb_min(VDB_PIECE, size - at);
    run->failed = vdb_read_bytes(job->source, bytes + at, piece, job->offset + start + at);
    if (run->failed) return;
    if (job->reader->watch) {
      size_t done = __atomic_add_fetch(&job->reader->done, piece, __ATOMIC_RELAXED);
      if (vdb_watch_stops(job->reader->watch, done, (size_t)job->reader->size)) run->failed = VDB_STOPPED;
    }
    run->crc = vdb_crc32c(run->crc, bytes + at, piece);
    if (job->exponents && !run->wild) run->wild = !vdb_words_finite(bytes + at, piece, job->exponents);
  }
}

/* What the runs found. The zeros after the section are read here; vdb_check_header has bounded them. */
VDB_LIGHT vdb_error vdb_finish_part(vdb_reader *reader, const vdb_header *header, const vdb_reading *job,
                                   size_t runs) {
  const vdb_section *section = &header->section[job->part];
  uint64_t end = section->offset + section->size;
  size_t zeros = (size_t)(vdb_next_place(end, job->part) - end), wild = runs;
  uint32_t crc = 0;
  for (size_t i = 0; i < runs; i++) {
    uint64_t start = (uint64_t)i * job->run_bytes, left = job->size - start;
    if (job->runs[i].failed)
      return vdb_read_fault(reader, job->runs[i].failed, vdb_part_name(job->part), section->offset + start);
    crc = vdb_crc_append(crc, job->runs[i].crc, left < job->run_bytes ? left : job->run_bytes);
    if (job->runs[i].wild && wild == runs) wild = i;
  }
  int failed = vdb_read_bytes(reader->source, reader->buffer, zeros, end);
  if (failed) return vdb_read_fault(reader, failed, vdb_part_name(job->part), end);
  if (vdb_crc32c(crc, reader->buffer, zeros) != section->crc)
    return vdb_fault_inside(reader, header, job->part, "the checksum differs in the section that begins here", 0);
  for (size_t i = 0; i < zeros; i++)
    if (reader->buffer[i]) return vdb_fault_inside(reader, header, job->part, "not 0 after the end", section->size + i);
  if (wild == runs) return VDB_OK;
  return vdb_fault(reader, VDB_ERROR_NOT_FINITE, vdb_part_name(job->part), "NaN or infinity in the rows from here",
                   section->offset + (uint64_t)wild * job->run_bytes);
}

/* The size that a section must have; for those that vary, the size it has if that is possible. UINT64_MAX if not. */
VDB_RARE uint64_t vdb_right_size(const vdb_header *header, int part) {
  uint64_t size = header->section[part].size, slots = header->slots;
  int graph = header->index == VDB_INDEX_HNSW, records = header->section[VDB_OFFSETS].size != 0;
  if (part <= VDB_LINKS) return slots * vdb_part_row(header, part);
  if (part == VDB_LIVE) return (slots + 63) / 64 * 8;
  if (part == VDB_FREE_ROWS) return size % 4 == 0 && size / 4 <= slots - header->count ? size : UINT64_MAX;
  if (part == VDB_TOWER_OF) return graph ? slots * 4 : 0;
  if (part == VDB_TOWERS)
    return !graph ? 0 : size >= 4 && size % 4 == 0 && size / 4 <= UINT32_MAX ? size : UINT64_MAX;
  if (part == VDB_OFFSETS) return records ? slots * 8 : 0;
  if (!records) return 0;
  if (part == VDB_TEXT) return size >= 16 && size % 8 == 0 ? size : UINT64_MAX;
  return size % 4 == 0 && (size & (size - 1)) == 0 && size / 4 <= 4 * (uint64_t)VDB_NO_ROW ? size : UINT64_MAX;
}

VDB_RARE const char *vdb_wrong_setting(const vdb_header *header) {
  uint32_t entry = header->entry;
  if (!header->dimensions || header->dimensions > VDB_MAX_DIMENSIONS) return "impossible dimensions";
  if (header->metric > VDB_METRIC_DOT_PRODUCT) return "an unknown metric";
  if (header->storage > VDB_STORAGE_F32_I8) return "an unknown storage";
  if (header->index > VDB_INDEX_HNSW) return "an unknown index";
  if (header->links < 2 || header->links > 128) return "impossible links";
  if (!header->build_effort || header->build_effort > 4096) return "impossible build effort";
  if (header->slots > VDB_MAX_ROWS || header->count > header->slots) return "impossible number of rows";
  if (entry != VDB_NO_ROW && (entry >= header->slots || header->index == VDB_INDEX_FLAT)) return "impossible entry";
  if (header->top > VDB_TOP_LEVEL || (entry == VDB_NO_ROW && header->top)) return "impossible top";
  if (header->unchecked > (header->index == VDB_INDEX_HNSW ? header->slots : 0)) return "impossible unchecked rows";
  if (header->sections != VDB_SECTIONS) return "impossible number of sections";
  return NULL;
}

/* All that can be said of a file of reader->size bytes by its header alone. */
VDB_LIGHT vdb_error vdb_check_header(vdb_reader *reader, const vdb_header *header) {
  if (header->version != 2 && header->version != 3) return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "an unknown version", 8);
  if (header->header_size != sizeof *header || header->crc != vdb_crc32c(0, header, sizeof *header - 4))
    return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "the checksum differs", sizeof *header - 4);
  if (header->file_size > reader->size)
    return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "the file is not as long as it says", 16);
  const char *wrong = vdb_wrong_setting(header);
  for (size_t i = 0; i < sizeof header->unused; i++)
    if (header->unused[i]) wrong = "unused bytes are not 0";
  if (wrong) return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", wrong, 24);
  uint64_t place = sizeof *header;
  if (header->file_size < place) return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "an impossible size of the file", 16);
  for (int part = 0; part < VDB_SECTIONS; part++) {
    const vdb_section *section = &header->section[part];
    if (section->kind != (uint32_t)part + 1 || section->offset != place || section->size > header->file_size - place ||
        section->size != vdb_right_size(header, part))
      return vdb_fault(reader, VDB_ERROR_CORRUPT, vdb_part_name(part), "impossible place or size",
                       80 + 24 * (uint64_t)part);
    place = vdb_next_place(place + section->size, part);
    if (place > header->file_size) return vdb_fault_inside(reader, header, part, "reaches past the end of the file", 0);
  }
  if (place != header->file_size) return vdb_fault(reader, VDB_ERROR_CORRUPT, "file", "bytes after the end", place);
  return VDB_OK;
}

VDB_RARE vdb_options vdb_header_options(const vdb_header *header, uint32_t threads) {
  vdb_options options = vdb_default_options();
  options.storage = (vdb_storage)header->storage;
  options.index = (vdb_index)header->index;
  options.links = header->links;
  options.build_effort = header->build_effort;
  options.threads = threads;
  return options;
}

/* --- contents, once the checksums are right: a file may have been made to harm --- */
VDB_INLINE int vdb_bit(const uint64_t *bits, size_t i) { return (int)(bits[i >> 6] >> (i & 63) & 1u); }

/* Sets a bit; not 0 if it was set before. */
VDB_INLINE int vdb_set_bit(uint64_t *bits, size_t i) {
  int before = vdb_bit(bits, i);
  bits[i >> 6] |= (uint64_t)1 << (i & 63);
  return before;
}

VDB_LIGHT vdb_error vdb_check_live(vdb_reader *reader, const vdb_header *header, const vdb_database *db) {
  size_t words = (db->slots + 63) / 64, live = vdb_active()->count(db->live, db->live, words);
  if (db->slots % 64 && db->live[words - 1] >> (db->slots % 64))
    return vdb_fault_inside(reader, header, VDB_LIVE, "a row past the last one", 8 * (words - 1));
  if (live == db->count) return VDB_OK;
  return vdb_fault_inside(reader, header, VDB_LIVE, "not as many rows as the header says", 0);
}

/* Comparisons of bits: they order floats that are not negative, and hold under -ffast-math. */
VDB_ONCE vdb_error vdb_check_numbers(vdb_reader *reader, const vdb_header *header, const vdb_database *db) {
  uint32_t least = vdb_bits((float)VDB_SMALL), most = vdb_bits((float)VDB_GREAT), infinity = 0x7f800000u;
  for (size_t row = 0; row < db->slots; row++) {
    const vdb_block *block = vdb_block_of(db, row);
    size_t place = vdb_row_in_block(db, row);
    uint32_t norm = vdb_bits(block->norms[place]);
    if (norm && norm != vdb_bits(-1.0f) && (norm < least || norm > most))
      return vdb_fault_inside(reader, header, VDB_NORMS, "an impossible norm", 4 * row);
    if (block->scales && vdb_bits(block->scales[place]) >= infinity)
      return vdb_fault_inside(reader, header, VDB_SCALES, "an impossible scale", 4 * row);
    if (block->residuals && vdb_bits(block->residuals[place]) > infinity)
      return vdb_fault_inside(reader, header, VDB_RESIDUALS, "an impossible residual", 4 * row);
  }
  return VDB_OK;
}

/* `seen` [slots] bits, zero before. */
VDB_LIGHT vdb_error vdb_check_free(vdb_reader *reader, const vdb_header *header, const vdb_database *db,
                                  uint64_t *seen) {
  for (size_t i = 0; i < db->free_count; i++) {
    uint32_t row = db->free_rows[i];
    if (row >= db->slots || vdb_is_live(db, row) || vdb_set_bit(seen, row))
      return vdb_fault_inside(reader, header, VDB_FREE_ROWS, "a row that is not free", 4 * i);
  }
  return VDB_OK;
}

VDB_ONCE vdb_error vdb_check_links(vdb_reader *reader, const vdb_header *header, const vdb_database *db) {
  size_t stride = vdb_link_stride(db);
  for (size_t row = 0; row < db->slots; row++) {
    const uint32_t *links = vdb_links_at(db, row);
    uint32_t wrong = *links >= stride;
    for (size_t i = 1; i < stride; i++) wrong |= (uint32_t)(links[i] >= db->slots); /* unused ones are 0 */
    if (wrong) return vdb_fault_inside(reader, header, VDB_LINKS, "impossible links of a row", 4 * row * stride);
  }
  return VDB_OK;
}

/* Links of one tower; a link on a level is to a row that is on that level. */
VDB_LIGHT int vdb_wrong_tower(const vdb_database *db, size_t row) {
  for (uint32_t level = 1; level <= vdb_levels_at(db, row); level++) {
    const uint32_t *links = vdb_links_of(db, row, level);
    if (links[0] > db->options.links) return 1;
    for (size_t i = 1; i <= links[0]; i++)
      if (links[i] >= db->slots || vdb_levels_at(db, links[i]) < level) return 1;
  }
  return 0;
}

/* Towers come in the order of rows and fill their section, so none overlaps another. */
VDB_LIGHT vdb_error vdb_check_towers(vdb_reader *reader, const vdb_header *header, const vdb_database *db) {
  const vdb_graph *graph = &db->graph;
  size_t next = 1;
  for (size_t row = 0; row < db->slots; row++) {
    size_t words = vdb_tower_words(db, row);
    if (graph->tower_of[row] && (graph->tower_of[row] != next || !words))
      return vdb_fault_inside(reader, header, VDB_TOWER_OF, "an impossible tower", 4 * row);
    next += words;
  }
  if (next != graph->towers_size || graph->towers[0])
    return vdb_fault_inside(reader, header, VDB_TOWERS, "not what the rows have", 0);
  for (size_t row = 0; row < db->slots; row++)
    if (vdb_wrong_tower(db, row))
      return vdb_fault_inside(reader, header, VDB_TOWERS, "impossible links", 4 * (uint64_t)graph->tower_of[row]);
  if (graph->entry != VDB_NO_ROW && vdb_levels_at(db, graph->entry) != graph->top)
    return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "the entry is not on the top level", 64);
  return VDB_OK;
}

/* Records come in the order of rows and fill the text. Fills records.records; `*ids` becomes how many have an id. */
VDB_LIGHT vdb_error vdb_check_records(vdb_reader *reader, const vdb_header *header, vdb_database *db,
                                     const uint64_t *offsets, size_t *ids, size_t *valued) {
  size_t next = 0, size = db->records.loaded->size;
  unsigned char *text = (unsigned char *)(db->records.loaded + 1);
  *ids = *valued = 0;
  for (size_t row = 0; row < db->slots; row++) {
    uint32_t sizes[2];
    if (!offsets[row]) continue;
    if (offsets[row] - 1 != next || !vdb_is_live(db, row) || size - next < 16)
      return vdb_fault_inside(reader, header, VDB_OFFSETS, "an impossible offset", 8 * row);
    unsigned char *record = text + next;
    memcpy(sizes, record, sizeof sizes);
    uint32_t has_values = header->version == 3 ? sizes[1] & VDB_VALUES_BIT : 0;
    sizes[1] ^= has_values;
    uint64_t bytes = ((uint64_t)sizes[0] + sizes[1] + 9 + 7) / 8 * 8;
    if (sizes[0] > VDB_MAX_ID || sizes[1] > INT32_MAX || sizes[0] + sizes[1] == 0 || bytes > size - next ||
        memchr(record + 8, 0, sizes[0]) || record[8 + sizes[0]])
      return vdb_fault_inside(reader, header, VDB_TEXT, "an impossible record", next);
    if (has_values && vdb_count_values(record + 9 + sizes[0], sizes[1]) < 1)
      return vdb_fault_inside(reader, header, VDB_TEXT, "impossible values", next);
    db->records.records[row] = record;
    *ids += sizes[0] != 0;
    *valued += has_values != 0;
    next += (size_t)bytes;
  }
  return next == size ? VDB_OK : vdb_fault_inside(reader, header, VDB_TEXT, "bytes after the last record", next);
}

/* Every row with an id is in the table once, and no empty place lies between where its search begins and where it is.
 * Linear, however the ids collide. `seen` [slots] bits, zero before. */
VDB_LIGHT vdb_error vdb_check_table(vdb_reader *reader, const vdb_header *header, vdb_database *db, size_t ids,
                                   uint64_t *seen) {
  vdb_records *records = &db->records;
  size_t size = records->table_size, mask = size - 1, empty = size, found = 0, id_size, metadata_size;
  const char *id;
  const unsigned char *metadata;
  for (size_t i = 0; i < size && empty == size; i++)
    if (records->table[i] == VDB_NO_ROW) empty = i;
  if (empty == size && (size || ids)) return vdb_fault_inside(reader, header, VDB_TABLE, "no empty place", 0);
  size_t first = empty;
  for (size_t step = 1; step < size; step++) {
    size_t place = (first + step) & mask;
    uint32_t row = records->table[place];
    if (row == VDB_NO_ROW) {
      empty = place;
      continue;
    }
    records->table_used++;
    if (row == VDB_GONE) continue;
    if (row >= db->slots || !vdb_is_live(db, row) ||
        !vdb_record_at(db, row, &id, &id_size, &metadata, &metadata_size) || !id || vdb_set_bit(seen, row) ||
        ((place - (size_t)vdb_hash(id, id_size)) & mask) >= ((place - empty) & mask))
      return vdb_fault_inside(reader, header, VDB_TABLE, "an impossible entry", 4 * place);
    found++;
  }
  return found == ids ? VDB_OK : vdb_fault_inside(reader, header, VDB_TABLE, "ids are missing", 0);
}

VDB_RARE vdb_error vdb_check_contents(vdb_reader *reader, const vdb_header *header, vdb_database *db,
                                      const uint64_t *offsets) {
  size_t ids = 0, valued = 0, words = (db->slots + 63) / 64;
  uint64_t *seen = (uint64_t *)VDB_MALLOC(words * sizeof *seen + 1);
  if (!seen) return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "file", "no memory for its checks", 0);
  memset(seen, 0, words * sizeof *seen);
  vdb_error error = vdb_check_live(reader, header, db);
  if (!error) error = vdb_check_numbers(reader, header, db);
  if (!error) error = vdb_check_free(reader, header, db, seen);
  if (!error && header->index == VDB_INDEX_HNSW) error = vdb_check_links(reader, header, db);
  if (!error && header->index == VDB_INDEX_HNSW) error = vdb_check_towers(reader, header, db);
  if (!error && offsets) error = vdb_check_records(reader, header, db, offsets, &ids, &valued);
  if (!error && header->version == 3 && !valued)
    error = vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "version 3, and no row has values", 8);
  memset(seen, 0, words * sizeof *seen);
  if (!error && offsets) error = vdb_check_table(reader, header, db, ids, seen);
  VDB_FREE(seen);
  return error;
}

/* --- format 2, into memory --- */

/* Memory for what vdb_make_room does not know of: towers, text, table, and the offsets, which only loading needs. */
VDB_RARE int vdb_make_variable_room(const vdb_header *header, vdb_database *db, uint64_t **offsets) {
  size_t towers = (size_t)header->section[VDB_TOWERS].size / sizeof(uint32_t);
  size_t text = (size_t)header->section[VDB_TEXT].size, table = (size_t)header->section[VDB_TABLE].size;
  vdb_graph *graph = &db->graph;
  vdb_records *records = &db->records;
  if (towers > graph->towers_capacity) {
    if (!vdb_grow((void **)&graph->towers, graph->towers_capacity, towers, sizeof(uint32_t))) return 0;
    graph->towers_capacity = towers;
  }
  graph->towers_size = towers;
  db->free_capacity = (size_t)header->section[VDB_FREE_ROWS].size / sizeof(uint32_t);
  if (db->free_capacity && !vdb_grow((void **)&db->free_rows, 0, db->free_capacity, sizeof(uint32_t))) return 0;
  if (!header->section[VDB_OFFSETS].size) return 1;
  *offsets = (uint64_t *)VDB_MALLOC((size_t)header->section[VDB_OFFSETS].size);
  vdb_loaded *loaded = records->loaded = (vdb_loaded *)VDB_MALLOC(sizeof(vdb_loaded) + text);
  if (loaded) {
    memset(loaded, 0, sizeof *loaded);
    loaded->size = text;
    loaded->users = 1;
  }
  if (table) records->table = (uint32_t *)VDB_MALLOC(table);
  records->table_size = records->table ? table / sizeof(uint32_t) : 0;
  return *offsets && loaded && (records->table || !table) &&
         vdb_grow((void **)&records->records, 0, db->capacity, sizeof(unsigned char *));
}

VDB_LIGHT vdb_error vdb_read_part(vdb_reader *reader, const vdb_header *header, const vdb_database *db, int part,
                                 uint64_t *offsets) {
  vdb_reading job;
  void *to = part == VDB_LIVE        ? (void *)db->live
             : part == VDB_FREE_ROWS ? (void *)db->free_rows
             : part == VDB_TOWER_OF  ? (void *)db->graph.tower_of
             : part == VDB_TOWERS    ? (void *)db->graph.towers
             : part == VDB_OFFSETS   ? (void *)offsets
             : part == VDB_TABLE     ? (void *)db->records.table
                                     : NULL;
  if (part == VDB_TEXT && db->records.loaded) to = db->records.loaded + 1;
  job.source = reader->source;
  job.reader = reader;
  job.part = part;
  job.db = db;
  job.to = (unsigned char *)to;
  job.offset = header->section[part].offset;
  job.size = header->section[part].size;
  job.exponents = vdb_part_exponents(header, part);
  job.run_bytes = part > VDB_LINKS ? VDB_PIECE : vdb_block_rows(db) * vdb_part_row(header, part);
  size_t runs = job.size ? (size_t)((job.size + job.run_bytes - 1) / job.run_bytes) : 0;
  job.runs = (vdb_run *)VDB_MALLOC((runs + 1) * sizeof *job.runs);
  if (!job.runs) return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "file", "no memory to read it", 0);
  vdb_parallel(db, runs, vdb_read_run, &job);
  vdb_error error = vdb_finish_part(reader, header, &job, runs);
  VDB_FREE(job.runs);
  return error;
}

VDB_RARE vdb_error vdb_read_journal(vdb_reader *reader, const vdb_header *header, vdb_database *db);

VDB_LIGHT vdb_error vdb_read_second(vdb_reader *reader, const vdb_header *header, vdb_database *db) {
  uint64_t *offsets = NULL;
  vdb_error error = vdb_make_room(db, (size_t)header->slots);
  if (error || !vdb_make_variable_room(header, db, &offsets)) {
    VDB_FREE(offsets);
    return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "file", "no memory for its rows", 0);
  }
  db->slots = (size_t)header->slots;
  db->count = (size_t)header->count;
  db->free_count = (size_t)header->section[VDB_FREE_ROWS].size / sizeof(uint32_t);
  db->graph.entry = header->entry;
  db->graph.top = header->top;
  for (int part = 0; part < VDB_SECTIONS && !error; part++) error = vdb_read_part(reader, header, db, part, offsets);
  if (!error) error = vdb_check_contents(reader, header, db, offsets);
  if (!error && header->index == VDB_INDEX_HNSW) {
    db->graph.workshop->unchecked = header->unchecked;
  }
  if (!error) error = vdb_read_journal(reader, header, db);
  if (!error && header->index == VDB_INDEX_HNSW) {
    if (vdb_make_towers(db, db->graph.workshop->rows))
      error = vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "towers", "no memory for them", 0);
  }
  for (size_t i = 0; i << db->block_shift < db->slots; i++)
    vdb_clear_after(db, (i << db->block_shift) + vdb_rows_of_block(db, i) - 1);
  for (size_t row = 0; row < db->slots && !error && vdb_element_of(db->options.storage) == VDB_F32; row++)
    if (vdb_norm_at(db, row) < 0.0f) vdb_describe_row(db, row, NULL); /* it was lent when it was saved */
  VDB_FREE(offsets);
  return error;
}

/* --- format 2, mapped --- */
static inline void *vdb_mapped_part(const vdb_header *header, const vdb_database *db, int part) {
  return header->section[part].size ? (void *)(db->mapping.base + header->section[part].offset) : NULL;
}

static inline void vdb_map_block(const vdb_header *header, vdb_database *db, size_t i) {
  unsigned char *array[VDB_LINKS + 1];
  for (int part = 0; part <= VDB_LINKS; part++) {
    unsigned char *base = (unsigned char *)vdb_mapped_part(header, db, part);
    array[part] = base ? base + (i << db->block_shift) * vdb_part_row(header, part) : NULL;
  }
  vdb_block *block = &db->blocks[i];
  block->vectors = array[VDB_VECTORS];
  block->codes = (int8_t *)(header->storage == VDB_STORAGE_I8 ? array[VDB_VECTORS] : array[VDB_CODES]);
  block->norms = (float *)(void *)array[VDB_NORMS];
  block->scales = (float *)(void *)array[VDB_SCALES];
  block->residuals = (float *)(void *)array[VDB_RESIDUALS];
  block->links = (uint32_t *)(void *)array[VDB_LINKS];
}

/* Only the bitset of live rows and the free ones are copied: they are small, and the number of rows gets checked. */
VDB_ONCE vdb_error vdb_map_second(vdb_reader *reader, const vdb_header *header, int journal, vdb_database *db) {
  size_t words = ((size_t)header->slots + 63) / 64, shift = db->block_shift;
  size_t free_bytes = (size_t)header->section[VDB_FREE_ROWS].size;
  size_t blocks = ((size_t)header->slots + ((size_t)1 << shift) - 1) >> shift;
  void *base = vdb_map_file(reader->source.file, (size_t)header->file_size, journal);
  if (!base) return vdb_fault(reader, VDB_ERROR_IO, "file", "cannot be mapped", 0);
  db->paging.file = reader->source.file; /* vectors are read from it when few may be resident */
  db->paging.has_file = 1;
  db->mapping.base = (unsigned char *)base;
  db->mapping.size = (size_t)header->file_size; /* what comes behind may be cut off, and is read */
  db->mapping.slots = (size_t)header->slots;
  db->read_only = 1;
  if (!vdb_grow((void **)&db->blocks, 0, blocks + 1, sizeof(vdb_block)) ||
      !vdb_grow((void **)&db->live, 0, words + 1, sizeof(uint64_t)) ||
      !vdb_grow((void **)&db->free_rows, 0, free_bytes + 1, 1))
    return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "file", "no memory for a view of it", 0);
  db->block_count = db->block_capacity = blocks;
  db->slots = (size_t)header->slots;
  db->count = (size_t)header->count;
  db->capacity = words * 64;
  for (size_t i = 0; i < blocks; i++) vdb_map_block(header, db, i);
  for (int part = 0; part <= VDB_LINKS; part++) {
    db->mapping.arrays[part] = (unsigned char *)vdb_mapped_part(header, db, part);
    db->mapping.row_bytes[part] = vdb_part_row(header, part);
  }
  memcpy(db->live, db->mapping.base + header->section[VDB_LIVE].offset, words * sizeof(uint64_t));
  memcpy(db->free_rows, db->mapping.base + header->section[VDB_FREE_ROWS].offset, free_bytes);
  db->free_count = db->free_capacity = free_bytes / sizeof(uint32_t);
  db->graph.entry = header->entry;
  db->graph.top = header->top;
  if (header->unchecked) {
    vdb_workshop *workshop = vdb_workshop_of(db);
    if (workshop) workshop->unchecked = header->unchecked; /* for vdb_save */
  }
  db->graph.tower_of = (uint32_t *)vdb_mapped_part(header, db, VDB_TOWER_OF);
  db->graph.towers = (uint32_t *)vdb_mapped_part(header, db, VDB_TOWERS);
  db->graph.towers_size = db->graph.towers_capacity = (size_t)header->section[VDB_TOWERS].size / sizeof(uint32_t);
  db->records.table = (uint32_t *)vdb_mapped_part(header, db, VDB_TABLE);
  db->records.table_size = (size_t)header->section[VDB_TABLE].size / sizeof(uint32_t);
  db->records.table_used = db->records.table_size; /* counting would mean reading */
  db->mapping.offsets = (const uint64_t *)vdb_mapped_part(header, db, VDB_OFFSETS);
  db->mapping.text = (const unsigned char *)vdb_mapped_part(header, db, VDB_TEXT);
  db->mapping.text_size = (size_t)header->section[VDB_TEXT].size;
  if (!journal) return vdb_check_live(reader, header, db);
  vdb_error error = vdb_read_journal(reader, header, db);
  vdb_protect_file(base, db->mapping.size); /* nobody writes to the file's pages from here on */
  return error;
}

/* --- the first format ---
 *
 * u32 magic; u64 dimensions at 4; u64 count at 12; i32 metric at 20; then count times { f32 [dimensions], u32 id bytes,
 * id without NUL }; no id where there are 0 bytes.
 */

/* The next `size` bytes, by way of the buffer. */
VDB_LIGHT vdb_error vdb_take(vdb_reader *reader, void *to, size_t size, const char *where) {
  unsigned char *out = (unsigned char *)to;
  while (size) {
    size_t have = vdb_min(size, reader->end - reader->begin);
    if (have) memcpy(out, reader->buffer + reader->begin, have);
    reader->begin += have;
    out += have;
    size -= have;
    if (!size) break;
    uint64_t left = reader->size - reader->position;
    if (size > left) return vdb_fault(reader, VDB_ERROR_CORRUPT, where, "the file ends too early", reader->size);
    reader->begin = 0;
    reader->end = left < VDB_PIECE ? (size_t)left : VDB_PIECE;
    int failed = vdb_read_bytes(reader->source, reader->buffer, reader->end, reader->position);
    if (failed) return vdb_read_fault(reader, failed, where, reader->position);
    reader->position += reader->end;
  }
  return VDB_OK;
}

VDB_INLINE uint64_t vdb_taken(const vdb_reader *reader) { return reader->position - (reader->end - reader->begin); }

/* Reads the next row. `room` is for one vector or one id, whichever is longer. */
VDB_RARE vdb_error vdb_read_first_row(vdb_reader *reader, vdb_database *db, unsigned char *room) {
  size_t row = db->slots;
  float *vector = (float *)(void *)(db->blocks[row >> db->block_shift].vectors +
                                    vdb_row_in_block(db, row) * db->dimensions * sizeof(float));
  uint64_t start = vdb_taken(reader);
  uint32_t id_size = 0;
  vdb_error error = vdb_take(reader, vector, db->dimensions * sizeof(float), "vector");
  if (!error && !vdb_all_finite(vector, db->dimensions))
    error = vdb_fault(reader, VDB_ERROR_NOT_FINITE, "vector", "NaN or infinity in the one that begins here", start);
  if (!error) error = vdb_take(reader, &id_size, sizeof id_size, "id");
  if (!error && id_size > VDB_MAX_ID)
    error = vdb_fault(reader, VDB_ERROR_CORRUPT, "id", "longer than 2^20 bytes", vdb_taken(reader) - 4);
  if (!error) error = vdb_take(reader, room, id_size, "id");
  if (!error && memchr(room, 0, id_size))
    error = vdb_fault(reader, VDB_ERROR_CORRUPT, "id", "a 0 inside", vdb_taken(reader) - id_size);
  if (error) return error;
  if (id_size) error = vdb_table_room(db, 1);
  uint64_t hash = vdb_hash((const char *)room, id_size);
  vdb_record record = {(const char *)room, NULL, 0, NULL, 0};
  if (!error) error = vdb_put_record(db, row, &record, id_size, hash);
  if (error) return vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "id", "no memory for it", vdb_taken(reader));
  vdb_clear_after(db, row);
  vdb_describe_row(db, row, (float *)(void *)room);
  db->live[row >> 6] |= (uint64_t)1 << (row & 63);
  db->slots++;
  db->count++;
  return VDB_OK;
}

VDB_LIGHT vdb_error vdb_read_first(vdb_reader *reader, uint32_t threads, vdb_database **out) {
  unsigned char head[VDB_FIRST_HEADER];
  uint64_t dimensions, count;
  int32_t metric;
  vdb_options options = vdb_default_options();
  vdb_error error = vdb_take(reader, head, sizeof head, "header");
  if (error) return error;
  memcpy(&dimensions, head + 4, 8);
  memcpy(&count, head + 12, 8);
  memcpy(&metric, head + 20, 4);
  if (!dimensions || dimensions > VDB_MAX_DIMENSIONS)
    return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "impossible dimensions", 4);
  if (metric < 0 || metric > 2) return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "an unknown metric", 20);
  if (count > (reader->size - sizeof head) / (4 * dimensions + 4) || count > VDB_MAX_ROWS)
    return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "more rows than the file has room for", 12);
  options.threads = threads;
  unsigned char *room = (unsigned char *)vdb_aligned_alloc(VDB_MAX_ID);
  if (room) error = vdb_allocate((size_t)dimensions, (vdb_metric)metric, &options, out);
  if (!room || error || vdb_make_room(*out, (size_t)count))
    error = vdb_fault(reader, VDB_ERROR_OUT_OF_MEMORY, "file", "no memory for its rows", 0);
  for (uint64_t row = 0; row < count && !error; row++) error = vdb_read_first_row(reader, *out, room);
  if (!error && vdb_taken(reader) != reader->size)
    error = vdb_fault(reader, VDB_ERROR_CORRUPT, "file", "bytes after the last row", vdb_taken(reader));
  vdb_aligned_free(room);
  return error;
}

/* --- either format --- */
VDB_RARE vdb_error vdb_read_either(vdb_reader *reader, vdb_open_mode mode, uint32_t threads, vdb_database **out) {
  vdb_header header;
  uint32_t first_magic = VDB_FIRST_MAGIC;
  size_t size = reader->size < sizeof header ? (size_t)reader->size : sizeof header;
  vdb_error error = vdb_read_fault(reader, vdb_read_bytes(reader->source, &header, size, 0), "header", 0);
  if (error) return error;
  if (size >= VDB_FIRST_HEADER && memcmp(&header, &first_magic, sizeof first_magic) == 0) {
    if (mode == VDB_OPEN_MAP)
      return vdb_fault(reader, VDB_ERROR_INVALID_ARGUMENT, "file", "the first format cannot be mapped, only read", 0);
    return vdb_read_first(reader, threads, out);
  }
  if (size < 8 || memcmp(header.magic, VDB_MAGIC, sizeof header.magic) != 0)
    return vdb_fault(reader, VDB_ERROR_CORRUPT, "file", "not a database file", 0);
  if (size < sizeof header) return vdb_fault(reader, VDB_ERROR_CORRUPT, "header", "the file ends too early", size);
  error = vdb_check_header(reader, &header);
  if (error) return error;
  vdb_options options = vdb_header_options(&header, threads);
  error = vdb_allocate(header.dimensions, (vdb_metric)header.metric, &options, out);
  if (error) return vdb_fault(reader, error, "file", "no memory for its rows", 0);
  if (mode == VDB_OPEN_MAP) return vdb_map_second(reader, &header, header.file_size < reader->size, *out);
  return vdb_read_second(reader, &header, *out);
}

VDB_RARE vdb_error vdb_read_file(const char *path, vdb_open_mode mode, uint32_t threads, vdb_watch *watch,
                                 vdb_database **out, char *message, size_t message_size) {
  vdb_reader reader;
  memset(&reader, 0, sizeof reader);
  *out = NULL;
  if (message && message_size) message[0] = 0;
  reader.message = message;
  reader.message_size = message_size;
  reader.watch = watch;
  reader.source.file = vdb_open_file(path, &reader.size);
  if (reader.source.file < 0) return vdb_fault(&reader, VDB_ERROR_IO, "file", "cannot be opened", 0);
  reader.buffer = (unsigned char *)vdb_aligned_alloc(VDB_PIECE);
  vdb_error error = reader.buffer ? vdb_read_either(&reader, mode, threads, out)
                                  : vdb_fault(&reader, VDB_ERROR_OUT_OF_MEMORY, "file", "no memory to read it", 0);
  if (!error && vdb_identify(reader.source.file, reader.size, &(*out)->identity)) (*out)->identity.size = 0;
  if (!error && !(*out)->read_only && (*out)->identity.base) vdb_changes_begin(*out);
  int number = errno;
  vdb_aligned_free(reader.buffer);
  if (!*out || !(*out)->paging.has_file) vdb_sys_close(reader.source.file);
  if (error) {
    vdb_release(*out);
    *out = NULL;
  }
  errno = number;
  return error;
}

/* The same from memory. */
VDB_RARE vdb_error vdb_read_memory(const void *bytes, size_t size, uint32_t threads, vdb_database **out) {
  vdb_reader reader;
  memset(&reader, 0, sizeof reader);
  *out = NULL;
  reader.source.memory = (const unsigned char *)bytes;
  reader.size = size;
  reader.buffer = (unsigned char *)vdb_aligned_alloc(VDB_PIECE);
  vdb_error error = reader.buffer ? vdb_read_either(&reader, VDB_OPEN_READ, threads, out) : VDB_ERROR_OUT_OF_MEMORY;
  vdb_aligned_free(reader.buffer);
  if (error) {
    vdb_release(*out);
    *out = NULL;
  }
  return error;
}

