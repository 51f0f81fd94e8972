#ifdef VDB_CALM
#pragma GCC push_options
#pragma GCC optimize("O1")
#endif
/* ------------------------------------------------------------------------------------------------------------------
 * 9 Files
 *
 * Format 2, little-endian, specified byte by byte in docs/formats.md:
 *
 *     header      4096 bytes: magic, settings, sizes, the table of sections, its own checksum
 *     vectors     [slots][dimensions] elements             at a multiple of 4096
 *     codes       [slots][dimensions] i8; only F32_I8      at a multiple of 4096
 *     norms       [slots] f32
 *     scales      [slots] f32; only I8 and F32_I8
 *     residuals   [slots] f32; only F32_I8
 *     links       [slots][1 + 2 links] u32; only HNSW      at a multiple of 4096
 *     live        [slots / 64, rounded up] u64
 *     free        indices to be used again, u32, the last one first
 *     tower_of    [slots] u32, place in towers; only HNSW
 *     towers      u32, in the order of rows, without gaps; only HNSW
 *     offsets     [slots] u64, 1 + place in text; none if no row has a record
 *     text        records, in the order of rows, without gaps
 *     table       the id table, u32
 *
 * All sections are always there, in this order, perhaps empty. Their places follow from their sizes, and most sizes
 * from the settings, so there is one right file for one database and little for a reader to believe. A section's
 * CRC-32C is over its bytes and the zeros up to the next one; there are at least 64, which kernels may read in a mapped
 * file.
 *
 * A reader takes nothing on trust: settings and places before memory is asked for (never more than the file's own size
 * asks for), checksums before contents, contents before the database is given out. A mapped file is checked as far as
 * it costs nothing, and everything read from it later is checked where it is used. Who shortens a file while it is
 * mapped kills the reader with SIGBUS; vdb_save never does, since it makes a new file.
 */
#define VDB_MAGIC "VDB2\r\n\x1a\n"
#define VDB_FIRST_MAGIC 0x56444230u
#define VDB_FIRST_HEADER 24u
#define VDB_PIECE ((size_t)1 << 19) /* bytes per read and write: much for the system, little for the cache */

typedef enum {
  VDB_VECTORS, VDB_CODES, VDB_NORMS, VDB_SCALES, VDB_RESIDUALS, VDB_LINKS, /* per row, in blocks */
  VDB_LIVE, VDB_FREE_ROWS, VDB_TOWER_OF, VDB_TOWERS, VDB_OFFSETS, VDB_TEXT, VDB_TABLE, VDB_SECTIONS
} vdb_part;

typedef struct {
  uint32_t kind; /* 1 + vdb_part */
  uint32_t crc;
  uint64_t offset, size;
} vdb_section;

typedef struct {
  unsigned char magic[8];
  uint32_t version, header_size;
  uint64_t file_size;
  uint32_t dimensions, metric, storage, index, links, build_effort;
  uint64_t count, slots;
  uint32_t entry, top;
  uint32_t sections, unchecked; /* unchecked: vdb_workshop.unchecked */
  vdb_section section[VDB_SECTIONS];
  unsigned char unused[4096 - 80 - VDB_SECTIONS * 24 - 4];
  uint32_t crc; /* of all bytes before it */
} vdb_header;

typedef char vdb_header_is_4096_bytes[sizeof(vdb_header) == 4096 ? 1 : -1];

static inline uint32_t vdb_crc32c(uint32_t crc, const void *bytes, size_t size) {
  return vdb_active()->crc32c(crc, bytes, size);
}

static inline const char *vdb_part_name(int part) {
  static const char *const names[] = {"vectors", "codes",    "norms",  "scales",  "residuals", "links", "live",
                                      "free",    "tower_of", "towers", "offsets", "text",      "table"};
  return names[part];
}

VDB_INLINE uint64_t vdb_part_alignment(int part) {
  return part == VDB_VECTORS || part == VDB_CODES || part == VDB_LINKS ? 4096 : VDB_ALIGNMENT;
}

/* Where the bytes after a section that ends at `end` begin: the next section, or the end of the file. */
VDB_INLINE uint64_t vdb_next_place(uint64_t end, int part) {
  uint64_t step = part + 1 < VDB_SECTIONS ? vdb_part_alignment(part + 1) : VDB_ALIGNMENT;
  return (end + VDB_ALIGNMENT + step - 1) / step * step;
}

/* Bytes per row of the arrays kept in blocks; 0 for an array that this kind of database does not have. */
static inline size_t vdb_part_row(const vdb_header *header, int part) {
  vdb_storage storage = (vdb_storage)header->storage;
  int both = storage == VDB_STORAGE_F32_I8;
  if (part == VDB_VECTORS) return header->dimensions * vdb_element_size(storage);
  if (part == VDB_CODES) return both ? header->dimensions : 0;
  if (part == VDB_NORMS) return sizeof(float);
  if (part == VDB_SCALES) return both || storage == VDB_STORAGE_I8 ? sizeof(float) : 0;
  if (part == VDB_RESIDUALS) return both ? sizeof(float) : 0;
  return header->index == VDB_INDEX_HNSW ? (1 + 2 * (size_t)header->links) * sizeof(uint32_t) : 0;
}

static inline unsigned char *vdb_block_array(const vdb_block *block, int part) {
  if (part == VDB_VECTORS) return block->vectors;
  if (part == VDB_CODES) return (unsigned char *)block->codes;
  if (part == VDB_NORMS) return (unsigned char *)block->norms;
  if (part == VDB_SCALES) return (unsigned char *)block->scales;
  if (part == VDB_RESIDUALS) return (unsigned char *)block->residuals;
  return (unsigned char *)block->links;
}

VDB_INLINE size_t vdb_rows_of_block(const vdb_database *db, size_t block) {
  return vdb_min(vdb_block_rows(db), db->slots - (block << db->block_shift));
}

/* Words of a row's tower; 0 if it has none or, in a damaged mapped file, one that does not fit. */
static inline size_t vdb_tower_words(const vdb_database *db, size_t row) {
  uint32_t levels = vdb_levels_at(db, row);
  return levels ? vdb_tower_size(levels, db->options.links) : 0;
}

