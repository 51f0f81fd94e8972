/* --- the journal: what has changed, behind the file's end ---
 *
 * A batch for each save of changes, at multiples of 64: a head, entries of rows, zeros to a multiple of 64, an end mark.
 * All but the end mark is synced before the end mark is written, which then is one write of 64 bytes inside a sector. So
 * a batch without an end mark was never finished, and is as if it were not there; everything else that does not match is
 * damage. A head knows the end mark before it, so that no batch can be taken from another file or left out.
 */
#define VDB_BATCH_MAGIC "VDBJ\r\n\x1a\n"
#define VDB_END_MAGIC "VDBE\r\n\x1a\n"
#define VDB_ENTRY_LIVE 1u  /* the row is there */
#define VDB_ENTRY_WHOLE 2u /* numbers, vector, codes and record follow */
#define VDB_JOURNAL_SPARE 65536u /* bytes of a journal beyond an eighth of the file, before all is written anew */

typedef struct {
  unsigned char magic[8];
  uint64_t place, size;             /* in the file; from there to the end mark */
  uint64_t slots, count, free_kept; /* after it; free_kept: of the free rows before it */
  uint32_t entry, unchecked;        /* after it, as in the header */
  uint32_t previous;                /* checksum of the end mark before, or of the header */
  uint32_t crc;                     /* of all bytes before it */
} vdb_batch;

typedef struct {
  unsigned char magic[8];
  uint64_t place, size; /* as in the head */
  uint32_t content;     /* checksum of these bytes */
  unsigned char unused[32];
  uint32_t crc; /* of all bytes before it */
} vdb_batch_end;

typedef struct {
  float norm, scale, residual; /* 0 for what this kind of database does not have */
  uint32_t id_size, metadata_size; /* as in a record */
} vdb_numbers;

typedef char vdb_batch_is_64_bytes[sizeof(vdb_batch) == 64 && sizeof(vdb_batch_end) == 64 ? 1 : -1];

#define VDB_DAMAGED (-3)

static inline int vdb_all_zero(const void *bytes, size_t size) {
  for (size_t i = 0; i < size; i++)
    if (((const unsigned char *)bytes)[i]) return 0;
  return 1;
}

/* The finished batch at `at`, of a file of `size` bytes. `*found` is 0 if there is none. 0, errno, VDB_FILE_ENDS or
 * VDB_DAMAGED. */
VDB_RARE int vdb_find_batch(vdb_source source, uint64_t size, uint64_t at, uint32_t previous, vdb_batch *head,
                            vdb_batch_end *end, int *found) {
  uint64_t left = size - at;
  size_t have = left < sizeof *head ? (size_t)left : sizeof *head;
  *found = 0;
  memset(head, 0, sizeof *head);
  int failed = vdb_read_bytes(source, head, have, at);
  if (failed || vdb_all_zero(head, have)) return failed;
  if (memcmp(head->magic, VDB_BATCH_MAGIC, vdb_min(have, sizeof head->magic)) != 0) return VDB_DAMAGED;
  if (have < sizeof *head) return 0;
  if (head->crc != vdb_crc32c(0, head, sizeof *head - 4) || head->place != at || head->previous != previous ||
      head->size < sizeof *head || head->size % sizeof *head)
    return VDB_DAMAGED;
  if (head->size > left || left - head->size < sizeof *end) return 0;
  failed = vdb_read_bytes(source, end, sizeof *end, at + head->size);
  if (failed) return failed;
  if (vdb_all_zero(end, sizeof *end)) return left - head->size == sizeof *end ? 0 : VDB_DAMAGED;
  if (memcmp(end->magic, VDB_END_MAGIC, sizeof end->magic) != 0 || end->place != at || end->size != head->size ||
      !vdb_all_zero(end->unused, sizeof end->unused) || end->crc != vdb_crc32c(0, end, sizeof *end - 4))
    return VDB_DAMAGED;
  *found = 1;
  return 0;
}

/* Moves the identity on over all finished batches, by heads and end marks. 0, errno or VDB_FILE_ENDS. */
VDB_RARE int vdb_identify_journal(vdb_source source, uint64_t size, vdb_identity *out) {
  vdb_batch head;
  vdb_batch_end end;
  int found = 1, failed = 0;
  while (out->size < size) {
    failed = vdb_find_batch(source, size, out->size, out->chain, &head, &end, &found);
    if (failed || !found) break;
    out->size += head.size + sizeof end;
    out->chain = end.crc;
  }
  if (failed != VDB_DAMAGED) return failed;
  out->size = size; /* no file that we know */
  out->chain = ~out->chain;
  return 0;
}
