/* vdb.h 2.0 - a vector database in one header.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * OVERVIEW
 *
 * A database holds rows. A row is a vector of `dimensions` floats, and may have an id (text) and metadata: bytes, or
 * values with names, which searches can filter by. Asked with a vector, the database answers with the k nearest rows:
 * exactly, by reading every row, or through an HNSW graph, by reading few. One file, C11 or C++11, gcc or clang, no
 * dependency but libm and, with -DVDB_MULTITHREADED, pthreads. POSIX systems; it is tested on Linux, and compiles for
 * macOS. For Windows (x86-64, clang) it compiles; it has not been run there, so nothing of it is tested:
 *
 *     #include "vdb.h"
 *
 *     vdb_database *db = vdb_create(384, VDB_METRIC_COSINE);
 *     vdb_add_vector(db, vector, "first", NULL);
 *     vdb_result_set *found = vdb_search(db, query, 5);       // nearest first; found->results[0].id, .distance
 *     vdb_free_result_set(found);
 *     vdb_save(db, "rows.vdb");
 *     vdb_destroy(db);
 *
 *     cc -std=c11 -O2 app.c -lm                               // or: cc -O2 -DVDB_MULTITHREADED app.c -lm -pthread
 *
 * Every function is `static inline`, so a program of one file needs nothing else. A program of several files defines
 * VDB_DECLARATIONS_ONLY before each #include but one, and VDB_IMPLEMENTATION before that one; where both are defined,
 * in one file, VDB_IMPLEMENTATION counts. The code takes a compiler some seconds at -O2, the declarations nothing:
 * while a program is being written, give the code a file of its own, or define VDB_PLAIN, which leaves out the kernels
 * for particular processors and takes two thirds of the time; answers are the same. The header is joined from parts by
 * topic, which Octavo's repository holds (src/octavo/vdb/parts); docs/tour.md says what is in which. VDB_MALLOC and
 * VDB_FREE replace the allocator; VDB_REALLOC is theirs too, and may be left out.
 *
 * MANUAL, in the order of the code
 *
 *   1 Declarations     what a program calls
 *   2 Platform         what is asked of the compiler and the operating system; memory
 *   3 Numbers          16-bit floats, exact distances, checksums
 *   4 Kernels          scans for plain C, AVX2, AVX-512 (VNNI, BF16), AMX and NEON, chosen when first used
 *   5 Threads          many readers or one writer; a pool made once
 *   6 Rows             blocks of vectors, codes and norms, on disk too; ids and metadata; columns of values, conditions
 *   7 Exact search     bounds, shortlists, exact distances
 *   8 HNSW             graph search, parallel insertion, removal
 *   9 Files            formats 2 and 3, their checks, the mapped view, the loader of the first format, the journal
 *  10 Functions        the declared ones, each a short use of the above
 *
 * DISTANCES, ascending: cosine 1 - cos(q, x), where a zero vector is at distance 1 from everything; Euclidean with the
 * root; dot product negated.
 *
 * FILTERS BY VALUE. A condition (vdb_condition) is a comparison of a named value with others, or all or any of several:
 *
 *     vdb_value year = {NULL, VDB_VALUE_INT, 2020, 0, NULL, 0};
 *     vdb_condition since = {VDB_AT_LEAST, "year", &year, NULL, 1};
 *     vdb_query_options options = vdb_default_query_options(10);
 *     options.where = &since;                                 // vdb_query(db, query, 1, &options, &answer)
 *
 * It becomes a bitset over all rows, once for a call however many questions it asks: scans skip what is not in it, a
 * graph answers with nothing else. The first search that asks for a name reads it from the records of all rows into a
 * column of 9 bytes a row, with the least and greatest value of every 1024 rows; later searches read again only what
 * has changed, and a condition that is asked again finds its bitset (the last 8 are kept) until a record changes.
 * A column of ints alone, or floats alone, is sorted when it has been asked for eight times since a row changed (4 bytes
 * a row): from then on a range that few rows are in is looked up. Columns are no part of the file; vdb_compact and vdb_remove_vector, which renumber rows, make them forgotten.
 *
 * CHANGES IN PLACE. vdb_save writes a whole file. vdb_save_changes appends what has changed since the database was
 * opened or saved to that file, so that one row more in a file of a gigabyte writes about a kilobyte. What is appended
 * is the file's journal: behind the file's end as its header says it (bytes 16 to 23), a batch for each save, each at
 * a multiple of 64, little-endian, with CRC-32C checksums:
 *
 *     head, 64 bytes  0 u8[8] "VDBJ" 0d 0a 1a 0a;  8 u64 its place in the file;  16 u64 n, bytes from there to the
 *                     end mark;  24 u64 slots;  32 u64 live rows;  40 u64 free rows that stay as they were;  48 u32
 *                     row where graph searches begin;  52 u32 rows inserted since all were made reachable;  56 u32
 *                     checksum of the end mark before, or of the header;  60 u32 checksum of bytes 0 to 59
 *     content         u32 e, number of entries; u32 f, number of rows that have become free; u32[f]; zeros to a
 *                     multiple of 8; e entries; zeros to a multiple of 64
 *     entry           u32 row; u32 flags (1: it is there, 2: it comes whole); if whole f32 norm, scale, residual, u32
 *                     bytes of id, u32 bytes of metadata (plus 2^31: values); HNSW: u32[1 + 2 links], u32 levels, for
 *                     each level u32[1 + links]; if whole vector, codes, id, 0, metadata; zeros to a multiple of 8
 *     end mark, 64    0 u8[8] "VDBE" 0d 0a 1a 0a;  8 u64 place of the head;  16 u64 n;  24 u32 checksum of the n
 *                     bytes;  28 zeros;  60 u32 checksum of bytes 0 to 59
 *
 * A batch is synced before its end mark is written, and the end mark is synced before vdb_save_changes returns. So a
 * process that is killed, or a machine that stops, leaves the file as it was or as it should be: a batch without an
 * end mark is as if it were not there, and the next save cuts it off. Everything else that does not match is damage,
 * and refused. The save takes a lock of the file (fcntl), and refuses with VDB_ERROR_CHANGED a file that another
 * program has changed or is changing. A whole file is written in place of a batch where that is as good: once the
 * journal is longer than an eighth of the file and 65,536 bytes, where rows have new numbers (vdb_compact,
 * vdb_remove_vector), where a vector was lent (vdb_get_vector), where the file may not be written to, and on Windows.
 * Readers before 2.0's journal refuse a file that has one; vdb_save writes one without.
 *
 * VDB_OPEN_MAP shows a file as its journal says it is. The journal is read, with its checksums; what it changes in
 * rows of the file lies in private copies of their pages, what it adds in memory. So such a view takes memory for its
 * journal, with a graph also 8.5 bytes a row or so for the upper levels, and never changes the file.
 *
 * MORE ROWS THAN MEMORY. With VDB_STORAGE_F32_I8 a search reads the codes of all rows, or of those that it walks by,
 * and then few vectors. vdb_keep_on_disk keeps the vectors of a database that is being made on disk and all else in
 * memory; opened with VDB_OPEN_MAP, vectors stay in the file. vdb_set_resident bounds how much of what lies on disk
 * counts as the process's memory: ten million rows of 256 numbers are 13 GB of file and 2.7 GB of memory.
 *
 * GUARANTEES
 *
 *   - Exact search returns the rows of smallest distance, ties by index. A distance is computed in double precision in
 *     one fixed order, differences too, and rounded once to float (too great ones to infinity, too small ones to 0);
 *     scans only decide, by rigorous bounds, which rows cannot be in the answer. So answers are the same, bit for bit,
 *     for every kernel, every number of threads, every batch size and for VDB_STORAGE_F32 and VDB_STORAGE_F32_I8.
 *   - HNSW answers do not depend on the number of threads, neither in building nor in searching; their distances are
 *     the exact ones. Fewer than k rows come back only if fewer than k are there to be found.
 *   - A vector with NaN or infinity is refused, as a row and as a query. Any finite float is allowed; none overflows.
 *   - A failed call changes nothing. A failed save leaves the old file. A file is checked before it is believed.
 *   - A save replaces the file in one step: it writes a new one beside it, syncs it and renames it. Symbolic links are
 *     followed, mode, owner and group are kept; access control lists and other attributes are not. Where that is not
 *     possible it is refused by name, and nothing is written in place: what is no regular file, a file with hard links,
 *     an owner that cannot be kept, a folder that takes no new file.
 *   - What removed and replaced rows had in ids and metadata is given back: dead bytes are never more than half of the
 *     text that a file brought (all of it, if vdb_get_vector or vdb_search pointed into it), without renumbering.
 *   - With VDB_MULTITHREADED any number of threads may read while one writes; calls wait for each other as needed.
 *     Answers own their memory. Pointers from vdb_get_vector are the exception: they live until the row is removed,
 *     replaced or moved by vdb_compact or vdb_remove_vector.
 *   - A child of fork() may go on with a database that no thread was inside of, from several threads at once.
 *
 * PROGRAMS WRITTEN FOR 0.1 compile and behave as before: ids live as long as their row, after vdb_free_result_set too,
 * and what is written through the pointer of vdb_get_vector counts. What cannot be as before:
 *
 *   - NaN and infinity are refused: they have no place in an order of distances. 0.1 lost neighbours of such rows.
 *   - Dimensions end at 65536, ids at 2^20 bytes.
 *   - Numbers other than the three metrics, and files that are damaged, are refused. 0.1 does not read what this saves.
 *   - A save to a pipe, a device, a hard link, or a file whose folder takes no other, is refused (0.1 wrote in place).
 *   - Distances differ in their last digits: 0.1 added in float.
 *   - Windows: 0.1 was built by any compiler; this needs gcc (which takes the plain kernels only) or clang.
 *   - C++: the code needs gcc or clang, and casts between pointers and numbers that -Wold-style-cast reports.
 */
#ifndef VDB_H
#define VDB_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------------------------
 * 1 Declarations
 */
#define VDB_VERSION_MAJOR 2
#define VDB_VERSION_MINOR 0
#define VDB_VERSION_PATCH 0

#define VDB_MAX_DIMENSIONS 65536u
#define VDB_NO_INDEX UINT64_MAX

#if defined(VDB_DECLARATIONS_ONLY) || defined(VDB_IMPLEMENTATION)
#define VDB_API /* also where the code comes with a later #include of the same file */
#else
#define VDB_API static inline
#endif

typedef enum {
  VDB_OK = 0,
  VDB_ERROR_NULL_POINTER = -1,
  VDB_ERROR_INVALID_DIMENSIONS = -2,
  VDB_ERROR_OUT_OF_MEMORY = -3,
  VDB_ERROR_NOT_FOUND = -4,
  VDB_ERROR_INVALID_INDEX = -5,
  VDB_ERROR_THREAD_FAILURE = -6,
  VDB_ERROR_NOT_FINITE = -7,       /* a vector holds NaN or infinity */
  VDB_ERROR_INVALID_ARGUMENT = -8, /* a setting outside its range, k = 0, a text that is too long */
  VDB_ERROR_DUPLICATE_ID = -9,
  VDB_ERROR_READ_ONLY = -10,       /* the database is a view of a mapped file */
  VDB_ERROR_IO = -11,              /* the operating system refused; errno says why */
  VDB_ERROR_CORRUPT = -12,         /* not a database file, or damaged */
  VDB_ERROR_FULL = -13,            /* 2^32 - 2 rows are the most */
  VDB_ERROR_NOT_REGULAR = -14,     /* the path names a folder, a pipe or a device; nothing was written */
  VDB_ERROR_LINKED = -15,          /* the file has other names (hard links), which a save would part from it */
  VDB_ERROR_OWNER = -16,           /* the file is another user's or group's, which this process may not give it */
  VDB_ERROR_FOLDER = -17,          /* the file's folder takes no new file, or does not let it be replaced; see errno */
  VDB_ERROR_CHANGED = -18,         /* the file is not the one that the database was read from (vdb_save_as) */
  VDB_ERROR_INTERRUPTED = -19      /* the caller's function said so (vdb_add_watched, vdb_open_watched) */
} vdb_error;

typedef enum { VDB_METRIC_COSINE = 0, VDB_METRIC_EUCLIDEAN = 1, VDB_METRIC_DOT_PRODUCT = 2 } vdb_metric;

/* How rows are kept. F32_I8 keeps f32 and, beside it, codes of a byte per dimension that are scanned first: a quarter
 * more memory, about three times the speed, the same answers. F16, BF16 and I8 keep only the rounded vector; distances
 * are those to the rounded vector. I8 has one scale per row: the greatest magnitude / 127. */
typedef enum {
  VDB_STORAGE_F32 = 0,
  VDB_STORAGE_F16 = 1,
  VDB_STORAGE_BF16 = 2,
  VDB_STORAGE_I8 = 3,
  VDB_STORAGE_F32_I8 = 4
} vdb_storage;

typedef enum { VDB_INDEX_FLAT = 0, VDB_INDEX_HNSW = 1 } vdb_index;

typedef struct vdb_database vdb_database;

typedef struct {
  vdb_storage storage;   /* VDB_STORAGE_F32 */
  vdb_index index;       /* VDB_INDEX_FLAT */
  uint32_t links;        /* HNSW's M, 2 to 128: links per row and level, twice as many on the lowest; 16 */
  uint32_t build_effort; /* HNSW's efConstruction, 1 to 4096: candidates looked at for a new row; 200 */
  uint32_t threads;      /* at most this many work on one call; 0 for every core; 1 without VDB_MULTITHREADED */
} vdb_options;

/* What to do with a row whose id is there already. */
typedef enum {
  VDB_ADD_UNIQUE = 0,  /* refuse the whole call with VDB_ERROR_DUPLICATE_ID */
  VDB_ADD_REPLACE = 1, /* take the place of every row of that id */
  VDB_ADD_ANY = 2      /* keep both */
} vdb_add_mode;

/* Metadata with names, which searches may ask for (vdb_condition). */
typedef enum {
  VDB_VALUE_NONE = 0,
  VDB_VALUE_BOOL = 1,
  VDB_VALUE_INT = 2,
  VDB_VALUE_FLOAT = 3, /* not NaN */
  VDB_VALUE_TEXT = 4
} vdb_value_type;

typedef struct {
  const char *name;   /* 1 to 255 bytes of UTF-8, each name once in a row */
  vdb_value_type type;
  int64_t integer;    /* of INT; 0 or 1 of BOOL */
  double number;      /* of FLOAT */
  const char *text;   /* of TEXT: `text_size` bytes of UTF-8, which may hold zeros */
  size_t text_size;
} vdb_value;

typedef struct {
  const char *id;        /* UTF-8, at most 2^20 bytes; NULL or "" for none */
  const void *metadata;  /* copied */
  size_t metadata_size;  /* at most 2^31 - 1 */
  const vdb_value *values; /* copied; a row has metadata, or values, or neither */
  size_t value_count;
} vdb_record;

/* Which rows a search may answer with, by their values. Ints and floats compare as the numbers they are; a bool is no
 * number, and NONE is equal to NONE only. A row without the name is not equal to anything: it passes NOT_IN alone. */
typedef enum {
  VDB_IS_IN = 0,    /* equal to one of `values` */
  VDB_NOT_IN = 1,   /* equal to none of them */
  VDB_LESS = 2,     /* than values[0], a number; so with the next three */
  VDB_AT_MOST = 3,
  VDB_GREATER = 4,
  VDB_AT_LEAST = 5,
  VDB_ALL_OF = 6,   /* every one of `parts` holds */
  VDB_ANY_OF = 7
} vdb_operator;

typedef struct vdb_condition {
  vdb_operator operation;
  const char *name;
  const vdb_value *values;           /* [count], whose names do not matter */
  const struct vdb_condition *parts; /* [count], nested at most 32 deep */
  size_t count;
} vdb_condition;

/* Which rows may be in the answer: by a bitset over indices (bit i of bitset[i / 64]; rows past the end are out), by
 * a function, by their values, or by all of these. The function is called from several threads and must not call the database. */
typedef struct {
  size_t k;
  int exact;              /* not 0: read every row although there is a graph */
  uint32_t effort;        /* HNSW's efSearch: candidates kept while searching, at least k; 0 for max(64, 2 k) */
  const uint64_t *bitset; /* NULL for none */
  size_t bitset_words;
  int (*filter)(uint64_t index, void *context); /* not 0 to keep a row; NULL for none */
  void *filter_context;
  int with_ids;           /* not 0: fill `ids` */
  int with_metadata;      /* not 0: fill `metadata`, `metadata_sizes` and `has_values` */
  const vdb_condition *where; /* by values; NULL for none. The first search that asks for a name reads it from all rows */
  const struct vdb_passing *passing; /* the library's own: NULL */
} vdb_query_options;

/* The answer to `queries` questions: arrays [queries][k], nearest first, where k is what was asked for, or the number
 * of rows if that is less (1 if there are none). Where a question has fewer than k rows the rest is VDB_NO_INDEX,
 * infinity and NULL. One block of memory, freed by vdb_free_answer. */
typedef struct {
  size_t queries, k;
  size_t *counts; /* [queries] rows found */
  uint64_t *indices;
  float *distances;
  const char **ids;       /* NULL unless asked for; a row without id has NULL */
  const void **metadata;  /* NULL unless asked for */
  size_t *metadata_sizes; /* NULL unless asked for */
  unsigned char *has_values; /* NULL unless metadata was asked for; not 0 where it is to be read by vdb_next_value */
} vdb_answer;

typedef struct {
  size_t dimensions;
  vdb_metric metric;
  vdb_options options;
  size_t count;           /* rows that can be found */
  size_t slots;           /* every index is below this */
  size_t bytes;           /* memory held, or the size of the mapped file */
  size_t vector_bytes;    /* of it, vectors and codes of the rows */
  int read_only;
  int has_ids;
} vdb_information;

/* --- the first version's functions; programs written for it compile and behave as before --- */
typedef struct {
  size_t index;
  float distance;
  char *id;        /* NULL for none; lives as long as the result set, and as long as the database has the row */
  void *metadata;  /* the pointer given to vdb_add_vector */
} vdb_result;

typedef struct {
  vdb_result *results; /* ascending distance */
  size_t count;
} vdb_result_set;

VDB_API vdb_database *vdb_create(size_t dimensions, vdb_metric metric);
VDB_API void vdb_destroy(vdb_database *db);
VDB_API size_t vdb_count(const vdb_database *db);
VDB_API size_t vdb_dimensions(const vdb_database *db);
/* Copies data and id, borrows metadata. Equal ids are allowed. */
VDB_API vdb_error vdb_add_vector(vdb_database *db, const float *data, const char *id, void *metadata);
/* Every output may be NULL. `*data` is NULL unless the storage keeps f32. Finite numbers may be written through it, while
 * nobody else is inside the database; therefore searches measure a row that was pointed at every time, which is right and
 * takes longer, until vdb_refresh_vector says that the writing is over. */
VDB_API vdb_error vdb_get_vector(const vdb_database *db, size_t index, float **data, char **id, void **metadata);
VDB_API vdb_error vdb_refresh_vector(vdb_database *db, size_t index);
/* Later indices, those of removed rows too, shift down by one. vdb_remove_index is the one that does not move others. */
VDB_API vdb_error vdb_remove_vector(vdb_database *db, size_t index);
/* NULL for an empty database, k = 0 and any error. */
VDB_API vdb_result_set *vdb_search(const vdb_database *db, const float *query, size_t k);
VDB_API void vdb_free_result_set(vdb_result_set *set);
/* Writes a new file beside the old one, which it replaces in one step. Symbolic links are followed; mode, owner and
 * group of the old file are kept. Refused by name: see VDB_ERROR_NOT_REGULAR to VDB_ERROR_FOLDER. */
VDB_API vdb_error vdb_save(const vdb_database *db, const char *path);
/* Loads both formats into memory. NULL on any error; vdb_open says which. */
VDB_API vdb_database *vdb_load(const char *path);
VDB_API float vdb_dot_product(const float *a, const float *b, size_t dimensions);
VDB_API float vdb_magnitude(const float *a, size_t dimensions);
VDB_API float vdb_cosine_similarity(const float *a, const float *b, size_t dimensions);
VDB_API float vdb_euclidean_distance(const float *a, const float *b, size_t dimensions);
VDB_API float vdb_compute_distance(const float *a, const float *b, size_t dimensions, vdb_metric metric);

/* --- this version's --- */
VDB_API const char *vdb_error_text(vdb_error error);
VDB_API vdb_options vdb_default_options(void);
VDB_API vdb_query_options vdb_default_query_options(size_t k);
/* `options` may be NULL. */
VDB_API vdb_error vdb_new(size_t dimensions, vdb_metric metric, const vdb_options *options, vdb_database **out);
VDB_API vdb_error vdb_info(const vdb_database *db, vdb_information *out);
/* Adds `count` rows, vectors [count][dimensions], or none of them. `records` [count] and `indices` [count] (out) may
 * be NULL. Indices of removed rows are used again. While many rows enter a graph, other threads may search; they
 * find all of the new rows, or none yet. */
VDB_API vdb_error vdb_add(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                          vdb_add_mode mode, uint64_t *indices);
/* As vdb_add; while many rows are stored and enter a graph, which may take long, `go_on` is asked now and then, on the
 * caller's thread, whether to go on: with how many of `count` are in the graph. If it answers 0 the call ends with VDB_ERROR_INTERRUPTED, and nothing was
 * added. It must not call the database. */
VDB_API vdb_error vdb_add_watched(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                                  vdb_add_mode mode, uint64_t *indices,
                                  int (*go_on)(size_t done, size_t count, void *context), void *context);
/* Memory for `count` more rows at once. */
VDB_API vdb_error vdb_reserve(vdb_database *db, size_t count);
/* The lowest index with this id. */
VDB_API vdb_error vdb_find(const vdb_database *db, const char *id, uint64_t *index);
/* Copies a row's vector [dimensions] as stored. */
VDB_API vdb_error vdb_read_vector(const vdb_database *db, uint64_t index, float *vector);
/* Copies id (with its NUL) and metadata into one new block, to be freed with vdb_free_record. Of a row with values,
 * `metadata` is what vdb_next_value reads, and `value_count` is not 0. */
VDB_API vdb_error vdb_read_record(const vdb_database *db, uint64_t index, vdb_record *out);
VDB_API void vdb_free_record(vdb_record *record);
/* The value at `*place`, 0 at first, which moves on to the next; 0 when there are no more. Texts and names end with a NUL. */
VDB_API int vdb_next_value(const void *values, size_t size, size_t *place, vdb_value *out);
/* Gives a row new metadata, or values, or none; its vector and id stay. Pointers to its id end. `record->id` is ignored. */
VDB_API vdb_error vdb_set_metadata(vdb_database *db, uint64_t index, const vdb_record *record);
/* The same for the lowest index with this id. */
VDB_API vdb_error vdb_set_metadata_of(vdb_database *db, const char *id, const vdb_record *record);
VDB_API vdb_error vdb_remove_index(vdb_database *db, uint64_t index);
/* Removes every row with this id. `removed` may be NULL. */
VDB_API vdb_error vdb_remove_id(vdb_database *db, const char *id, size_t *removed);
/* Removes every row that passes the options' bitset, function and condition, at least one of which must be given; the
 * other options do not matter. `removed` may be NULL. */
VDB_API vdb_error vdb_remove_where(vdb_database *db, const vdb_query_options *options, size_t *removed);
/* Gives the memory of removed rows back. Rows keep their order; indices become 0 to count - 1. */
VDB_API vdb_error vdb_compact(vdb_database *db);
/* Answers `count` questions, queries [count][dimensions]. */
VDB_API vdb_error vdb_query(const vdb_database *db, const float *queries, size_t count,
                            const vdb_query_options *options, vdb_answer **out);
/* The rows at most `radius` away, nearest first: all of them by an exact scan, though there be a graph, if options->k is
 * 0, and otherwise those of the k that vdb_query finds. The answer is as wide as the longest list. */
VDB_API vdb_error vdb_query_within(const vdb_database *db, const float *queries, size_t count, float radius,
                                   const vdb_query_options *options, vdb_answer **out);
VDB_API void vdb_free_answer(vdb_answer *answer);

typedef enum {
  VDB_OPEN_READ = 0,  /* into memory, every checksum verified */
  VDB_OPEN_MAP = 1    /* a read-only view; bounds are checked, checksums (but the journal's) only by vdb_verify */
} vdb_open_mode;

/* What may be at the path already. Against lost updates: who reads a file, changes the database and saves it again, asks
 * for VDB_SAVE_SAME, and holds a lock if nobody else's work should be in vain (flock(LOCK_EX) on the file, taken again
 * until the path still names the locked file: `octavo vdb` does so). */
typedef enum {
  VDB_SAVE_ANY = 0, /* anything, as vdb_save */
  VDB_SAVE_NEW = 1, /* nothing, or VDB_ERROR_CHANGED */
  VDB_SAVE_SAME = 2 /* what the database was opened from or saved to last, or VDB_ERROR_CHANGED */
} vdb_save_mode;

VDB_API vdb_error vdb_save_as(const vdb_database *db, const char *path, vdb_save_mode mode);
/* Saves to the file that the database was opened from or saved to last, or VDB_ERROR_CHANGED, as VDB_SAVE_SAME does; but
 * rows that have changed since are appended to the file, in its journal, at once or not at all. A whole file is written
 * where that is as good: once the journal is longer than an eighth of the file, after vdb_compact, vdb_remove_vector and
 * vdb_get_vector (whoever has the pointer may write to the vector), where the file may not be written to, and on Windows. */
VDB_API vdb_error vdb_save_changes(const vdb_database *db, const char *path);
/* Keeps the vectors of a database that has none yet in a file without a name in `folder`, and codes, norms and links in
 * memory: for more vectors than memory, with VDB_STORAGE_F32_I8, whose codes say which few vectors are read. vdb_save
 * makes a file of it as always. VDB_ERROR_IO if there can be no such file, and later from vdb_add if the disk is full.
 * After fork() parent and child have the same vectors: only one of them may change the database. Not on Windows. */
VDB_API vdb_error vdb_keep_on_disk(vdb_database *db, const char *folder);
/* About so many bytes of what lies on disk may stay in memory as this process's: vectors after vdb_keep_on_disk, or all of
 * a mapped file (VDB_OPEN_MAP). 0: as many as the system likes. Of a mapped file with codes, these stay if the bound has room
 * for them; under a lower bound every search reads them from the system's cache or the disk. What a caller reads through
 * pointers counts for nothing. On Windows there is no such bound. VDB_ERROR_INVALID_ARGUMENT if nothing lies on disk. */
VDB_API vdb_error vdb_set_resident(vdb_database *db, size_t bytes);
/* `threads` as in vdb_options. */
VDB_API vdb_error vdb_open(const char *path, vdb_open_mode mode, uint32_t threads, vdb_database **out);
/* As vdb_open; while a file is read into memory `go_on` is asked on the caller's thread, after about every half megabyte,
 * with how many of the file's bytes are read. If it answers 0 the call ends with VDB_ERROR_INTERRUPTED and no database. */
VDB_API vdb_error vdb_open_watched(const char *path, vdb_open_mode mode, uint32_t threads, vdb_database **out,
                                   int (*go_on)(size_t done, size_t count, void *context), void *context);
/* The bytes of the file that a save would write, in memory that vdb_free_bytes gives back; and a database from such. */
VDB_API vdb_error vdb_to_bytes(const vdb_database *db, void **bytes, size_t *size);
VDB_API void vdb_free_bytes(void *bytes);
VDB_API vdb_error vdb_from_bytes(const void *bytes, size_t size, uint32_t threads, vdb_database **out);
/* Reads a whole file of either format, and says in `message` (may be NULL) what is wrong with it. */
VDB_API vdb_error vdb_verify(const char *path, char *message, size_t message_size);
VDB_API vdb_error vdb_set_threads(vdb_database *db, uint32_t threads);
/* The kernels in use: "plain", "avx2", "avx512", "amx" or "neon". vdb_set_kernels sets them for the whole program
 * (NULL: the best there is) and must not run beside other calls; VDB_ERROR_NOT_FOUND if this machine lacks them. */
VDB_API const char *vdb_kernels(void);
VDB_API vdb_error vdb_set_kernels(const char *name);

#ifdef __cplusplus
}
#endif
#endif /* VDB_H */

#if (!defined(VDB_DECLARATIONS_ONLY) || defined(VDB_IMPLEMENTATION)) && !defined(VDB_IMPLEMENTED)
#define VDB_IMPLEMENTED

/* ------------------------------------------------------------------------------------------------------------------
 * 2 Platform
 *
 * gcc or clang on a little-endian POSIX system. The code is the common part of C11 and C++11. On Linux the functions of
 * unistd.h, and those that a strict -std=c11 hides, are declared here under names of our own: so a program may call
 * what is its own link, read or write.
 */
#if !defined(__GNUC__)
#error "vdb.h needs gcc or clang (vector extensions and per-function targets)"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "vdb.h needs a little-endian machine (its files are used in place)"
#endif

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#ifdef _WIN32
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <io.h>
#include <windows.h>
#else
#include <sys/mman.h>
#endif
#ifdef VDB_MULTITHREADED
#include <pthread.h>
#include <sched.h>
#endif
#if defined(VDB_PLAIN) || (defined(_WIN32) && !defined(__clang__)) /* gcc misaligns its stack there (gcc bug 54412) */
#elif defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define VDB_X86 1
#define VDB_TARGET(isa) __attribute__((target(isa)))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VDB_ARM 1
#endif

#if defined(__linux__) && defined(__LP64__)
#include <sys/syscall.h>
#ifdef __cplusplus
#define VDB_SYSTEM(returns, name, arguments) extern "C" returns vdb_sys_##name arguments __asm__(#name)
#else
#define VDB_SYSTEM(returns, name, arguments) extern returns vdb_sys_##name arguments __asm__(#name)
#endif
VDB_SYSTEM(int, posix_fallocate, (int, long, long));
VDB_SYSTEM(int, get_nprocs, (void));
VDB_SYSTEM(long, syscall, (long, ...));
#define VDB_HERE (-100) /* AT_FDCWD */
/* By number: in a program's own file even the name that the linker sees may be another function's. */
static inline int vdb_sys_close(int file) { return (int)vdb_sys_syscall(SYS_close, (long)file); }
static inline long vdb_sys_write(int file, const void *bytes, size_t size) {
  return vdb_sys_syscall(SYS_write, (long)file, bytes, size);
}
static inline long vdb_sys_pread(int file, void *bytes, size_t size, long at) {
  return vdb_sys_syscall(SYS_pread64, (long)file, bytes, size, at);
}
static inline long vdb_sys_lseek(int file, long at, int from) { return vdb_sys_syscall(SYS_lseek, (long)file, at, (long)from); }
static inline int vdb_sys_fsync(int file) { return (int)vdb_sys_syscall(SYS_fsync, (long)file); }
static inline int vdb_sys_ftruncate(int file, long size) { return (int)vdb_sys_syscall(SYS_ftruncate, (long)file, size); }
static inline int vdb_sys_unlink(const char *path) { return (int)vdb_sys_syscall(SYS_unlinkat, (long)VDB_HERE, path, 0L); }
static inline int vdb_sys_linkat(int from, const char *path, int to, const char *name, int flags) {
  return (int)vdb_sys_syscall(SYS_linkat, (long)from, path, (long)to, name, (long)flags);
}
static inline long vdb_sys_readlink(const char *path, char *to, size_t size) {
  return vdb_sys_syscall(SYS_readlinkat, (long)VDB_HERE, path, to, size);
}
static inline int vdb_sys_fchown(int file, unsigned user, unsigned group) {
  return (int)vdb_sys_syscall(SYS_fchown, (long)file, (long)(int)user, (long)(int)group);
}
static inline int vdb_sys_fchmod(int file, unsigned mode) { return (int)vdb_sys_syscall(SYS_fchmod, (long)file, (long)mode); }
static inline long vdb_sys_getpid(void) { return vdb_sys_syscall(SYS_getpid); }
static inline int vdb_sys_madvise(void *memory, size_t size, int advice) {
  return (int)vdb_sys_syscall(SYS_madvise, memory, size, (long)advice);
}
#elif defined(_WIN32)
#define vdb_sys_close _close
#define vdb_sys_fsync _commit
#define vdb_sys_unlink _unlink
static inline long vdb_sys_getpid(void) { return (long)GetCurrentProcessId(); }
static inline int64_t vdb_sys_lseek(int file, int64_t place, int from) { return _lseeki64(file, place, from); }
static inline long vdb_sys_write(int file, const void *bytes, size_t size) {
  return _write(file, bytes, (unsigned)(size < 1u << 30 ? size : 1u << 30));
}
static inline long vdb_sys_pread(int file, void *to, size_t size, int64_t at) {
  OVERLAPPED place;
  DWORD got = 0;
  memset(&place, 0, sizeof place);
  place.Offset = (DWORD)at;
  place.OffsetHigh = (DWORD)(at >> 32);
  if (ReadFile((HANDLE)_get_osfhandle(file), to, (DWORD)(size < 1u << 30 ? size : 1u << 30), &got, &place)) return (long)got;
  if (GetLastError() == ERROR_HANDLE_EOF) return 0;
  errno = EIO;
  return -1;
}
static inline int vdb_sys_get_nprocs(void) {
  SYSTEM_INFO system;
  GetSystemInfo(&system);
  return (int)system.dwNumberOfProcessors;
}
#else
#include <unistd.h>
#define vdb_sys_close close
#define vdb_sys_write write
#define vdb_sys_pread pread
#define vdb_sys_lseek lseek
#define vdb_sys_fsync fsync
#define vdb_sys_ftruncate ftruncate
#define vdb_sys_posix_fallocate posix_fallocate
#define vdb_sys_unlink unlink
#define vdb_sys_linkat linkat
#define vdb_sys_readlink readlink
#define vdb_sys_fchown fchown
#define vdb_sys_fchmod fchmod
#define vdb_sys_getpid getpid
#define vdb_sys_madvise madvise
#define vdb_sys_syscall syscall
#define VDB_HERE AT_FDCWD
static inline int vdb_sys_get_nprocs(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
#endif

#if !defined(VDB_MALLOC) && !defined(VDB_FREE) && !defined(VDB_REALLOC)
#define VDB_REALLOC realloc
#endif
#ifndef VDB_MALLOC
#define VDB_MALLOC malloc
#endif
#ifndef VDB_FREE
#define VDB_FREE free
#endif

#ifdef ESTALE
#define VDB_STALE ESTALE
#else
#define VDB_STALE EBUSY
#endif

#define VDB_INLINE static inline __attribute__((always_inline))
/* gcc spends most of its time on making code quick. What is no inner loop has one body, which is called; loops over rows
 * that wait for memory or files are compiled with less effort, and with none what seldom runs and does not loop. */
#if defined(__clang__)
#define VDB_EFFORT(level)
#else
#define VDB_EFFORT(level) __attribute__((optimize(level)))
#endif
#define VDB_ONCE static __attribute__((noinline, unused))
#define VDB_LIGHT static __attribute__((noinline, unused)) VDB_EFFORT("O1")
#define VDB_RARE static __attribute__((cold, noinline, unused)) VDB_EFFORT("O0")
/* gcc compiles what is neither kernel nor scan nor graph, but for what stores vectors, with less effort; not where nothing was
 * asked of it, or a small size. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__)
#define VDB_CALM
#endif
#define VDB_ALIGNMENT 64u /* of every array of rows; as many readable bytes follow each */

VDB_INLINE size_t vdb_min(size_t a, size_t b) { return a < b ? a : b; }
VDB_INLINE size_t vdb_max(size_t a, size_t b) { return a > b ? a : b; }
VDB_INLINE size_t vdb_round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

/* 64-byte aligned memory from VDB_MALLOC, the address that VDB_FREE needs kept just before it. Not cleared. */
VDB_ONCE void *vdb_aligned_alloc(size_t bytes) {
  if (bytes > SIZE_MAX - 2 * VDB_ALIGNMENT) return NULL;
  unsigned char *raw = (unsigned char *)VDB_MALLOC(bytes + 2 * VDB_ALIGNMENT);
  if (!raw) return NULL;
  uintptr_t address = ((uintptr_t)raw + sizeof(void *) + VDB_ALIGNMENT - 1) & ~(uintptr_t)(VDB_ALIGNMENT - 1);
  unsigned char *aligned = raw + (address - (uintptr_t)raw);
  memcpy(aligned - sizeof(void *), &raw, sizeof(void *));
  return aligned;
}

/* Huge pages for the inside of a large allocation, where the system has them: rows met on a walk over a graph lie
 * anywhere, and with small pages most of them would miss the TLB. */
static inline void vdb_advise_huge(void *memory, size_t bytes) {
#ifdef __linux__
  uintptr_t page = (uintptr_t)1 << 21, begin = ((uintptr_t)memory + page - 1) & ~(page - 1);
  uintptr_t end = ((uintptr_t)memory + bytes) & ~(page - 1);
  if (begin < end) (void)vdb_sys_madvise((unsigned char *)memory + (begin - (uintptr_t)memory), end - begin, 14); /* HUGEPAGE */
#else
  (void)memory, (void)bytes;
#endif
}

VDB_ONCE void vdb_aligned_free(void *pointer) {
  void *raw;
  if (!pointer) return;
  memcpy(&raw, (unsigned char *)pointer - sizeof(void *), sizeof(void *));
  VDB_FREE(raw);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3 Numbers
 *
 * 16-bit floats round to nearest, ties to even; what is too great for f16 is refused before it gets here.
 */
VDB_INLINE uint32_t vdb_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VDB_INLINE float vdb_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* By its bits, so that it holds under -ffast-math too. */
VDB_INLINE int vdb_is_finite(float value) { return (vdb_bits(value) & 0x7f800000u) != 0x7f800000u; }

VDB_ONCE int vdb_all_finite(const float *values, size_t count) {
  uint32_t found = 0;
  for (size_t i = 0; i < count; i++) found |= (uint32_t)((vdb_bits(values[i]) & 0x7f800000u) == 0x7f800000u);
  return !found;
}

VDB_INLINE uint16_t vdb_to_bf16(float value) {
  uint32_t bits = vdb_bits(value);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

VDB_INLINE float vdb_from_bf16(uint16_t half) { return vdb_from_bits((uint32_t)half << 16); }

static inline uint16_t vdb_to_f16(float value) {
  uint32_t bits = vdb_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 65536 and above */
  if (magnitude < 0x38800000u) {                                   /* subnormal: adding 0.5 aligns and rounds it */
    uint32_t aligned = vdb_bits(vdb_from_bits(magnitude) + 0.5f);
    return (uint16_t)(sign | (aligned - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float vdb_from_f16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x400u) return vdb_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  float subnormal = (float)magnitude * 5.9604644775390625e-8f; /* 2^-24 */
  return vdb_from_bits(sign | vdb_bits(subnormal));
}

/* Codes of one row: code = round(value / scale), scale = greatest magnitude / 127. Returns the scale. */
VDB_ONCE float vdb_to_i8(const float *values, size_t count, int8_t *codes) {
  float greatest = 0.0f;
  for (size_t j = 0; j < count; j++) greatest = fabsf(values[j]) > greatest ? fabsf(values[j]) : greatest;
  float scale = greatest / 127.0f;
  if (!(scale > 1.0e-37f)) { /* zero, or too small for its inverse */
    memset(codes, 0, count);
    return 0.0f;
  }
  float inverse = 1.0f / scale;
  for (size_t j = 0; j < count; j++) {
    float code = values[j] * inverse;
    int rounded = (int)(code + (code < 0.0f ? -0.5f : 0.5f));
    codes[j] = (int8_t)(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
  }
  return scale;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 4 Kernels
 *
 * A kernel set is a table of functions for one kind of machine. Rows are given by pointer, so that the same functions
 * serve a scan (consecutive rows), a graph (neighbours) and a filtered scan. A query is padded with zeros to a multiple
 * of VDB_PAD elements, and VDB_ALIGNMENT bytes are readable after every array of rows: kernels may read past a row;
 * what they find there is finite and meets a zero.
 *
 * Scores are approximate: they decide what is looked at, never what is answered.
 *     |score - exact| <= vdb_rounding(dimensions) * |query| * |row|          dots
 *     |score - exact| <= vdb_rounding(dimensions) * exact                    squares
 */
#define VDB_PAD 64u
#define VDB_TILE_ROWS 32u     /* rows of one tile call, at most */
#define VDB_TILE_QUERIES 128u /* queries of one panel, at most */

/* How the numbers of a row are kept. */
typedef enum { VDB_F32 = 0, VDB_F16 = 1, VDB_BF16 = 2, VDB_I8 = 3 } vdb_element;

/* A query for the scans: `values` for float rows, and for i8 rows its codes in two parts,
 * values ~ high_scale * high + low_scale * low, exact to 2^-14 of the greatest magnitude. */
typedef struct {
  const float *values;      /* [padded] */
  const int8_t *high, *low; /* [padded], -127..127; NULL unless rows are i8 */
  float high_scale, low_scale;
  int32_t high_sum, low_sum; /* sums of the codes, for instructions that want an unsigned operand */
} vdb_probe;

/* Queries packed for tiles, in the order that the kernel set likes best. `width` is `queries` rounded up to 16.
 * |score - exact| <= (relative * |query| + missing[q]) * |row|: `missing` is the norm of what the packing dropped. */
typedef struct {
  size_t queries, width;
  float relative;
  float *missing; /* [width] */
  void *data;     /* aligned; the kernel set's own layout */
} vdb_panel;

/* Per row of a tile: upper bound = alpha * score + beta + rho * gamma[query] + residual * delta[query]. */
typedef struct {
  float alpha[VDB_TILE_ROWS], beta[VDB_TILE_ROWS], rho[VDB_TILE_ROWS], residual[VDB_TILE_ROWS];
} vdb_row_terms;

/* Per query of a panel; the arrays are 16-float aligned and `width` long. Unused places have threshold infinity. */
typedef struct {
  const float *gamma, *delta, *threshold;
} vdb_query_terms;

typedef struct {
  uint32_t row, query; /* within the tile and the panel */
  float upper;
} vdb_hit;

typedef struct {
  const char *name;
  /* out[i] = dot product of query and rows[i], or the sum of squared differences; for f32, f16 and bf16 rows. */
  void (*dots[3])(const float *query, const void *const *rows, size_t count, size_t dimensions, float *out);
  void (*squares[3])(const float *query, const void *const *rows, size_t count, size_t dimensions, float *out);
  /* out[i] = high_scale * <high, rows[i]> + low_scale * <low, rows[i]>, the products exact integers. */
  void (*dots_i8)(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions, float *out);
  /* Upper bounds of `count` <= VDB_TILE_ROWS rows for one query; not 0 if any reaches (is not below) the threshold. */
  int (*gate)(const float *scores, const vdb_row_terms *rows, size_t count, float gamma, float delta, float threshold,
              float *upper);
  /* Tiles: scores [count][panel width] of `count` <= VDB_TILE_ROWS consecutive rows. `scratch` has
   * vdb_tile_scratch(dimensions) bytes, 64-byte aligned. */
  size_t (*panel_bytes)(vdb_element element, size_t width, size_t dimensions);
  void (*pack)(vdb_element element, const float *const *queries, size_t dimensions, vdb_panel *panel);
  void (*tile)(vdb_element element, const vdb_panel *panel, const void *rows, size_t count, size_t dimensions,
               float *scores, void *scratch);
  /* The (row, query) pairs whose upper bound is not below the query's threshold; `hits` has room for all. */
  size_t (*gate_tile)(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                      const vdb_query_terms *queries, vdb_hit *hits);
  /* sums[0] = dot product (squares == 0) or sum of squared differences; sums[1] = sum of row[j]^2, which nobody wants
   * of squares: 0. All in double, the differences too, every square rounded before it is added, in the one order that
   * every kernel set keeps: 16 lanes, j modulo 16, then halves added to halves. Rows: f32, unpadded. */
  void (*exact)(const float *query, const float *row, size_t dimensions, int squares, double sums[2]);
  void (*decode)(vdb_element element, const void *row, float scale, size_t dimensions, float *out);
  uint32_t (*crc32c)(uint32_t crc, const void *bytes, size_t size);
  /* Which of 64 ints are of this tag and from low to high. */
  uint64_t (*between)(const uint64_t *values, const uint8_t *tags, uint8_t tag, int64_t low, int64_t high);
  /* How many bits two bitsets have in common. */
  size_t (*count)(const uint64_t *a, const uint64_t *b, size_t words);
} vdb_kernel_set;

VDB_INLINE float vdb_rounding(size_t dimensions) { return ((float)dimensions + 16.0f) * 6.0e-8f; }
VDB_INLINE size_t vdb_tile_scratch(size_t dimensions) {
  return VDB_TILE_ROWS * vdb_round_up(dimensions, VDB_PAD) * sizeof(float) + 4096;
}


/* --- what the sets share ---
 *
 * Loops over a constant number of rows or vectors must be unrolled, or their sums live in memory. */
#if defined(__clang__)
#define VDB_UNROLL _Pragma("clang loop unroll(full)")
#else
#define VDB_UNROLL _Pragma("GCC unroll 16")
#endif

/* Element j of a row, codes as they are. */
VDB_INLINE float vdb_number_at(vdb_element element, const void *row, size_t j) {
  if (element == VDB_F16) return vdb_from_f16(((const uint16_t *)row)[j]);
  if (element == VDB_BF16) return vdb_from_bf16(((const uint16_t *)row)[j]);
  if (element == VDB_I8) return (float)((const int8_t *)row)[j];
  return ((const float *)row)[j];
}

VDB_INLINE size_t vdb_bytes_of(vdb_element element) { return element == VDB_F32 ? 4 : element == VDB_I8 ? 1 : 2; }

/* Scans fetch what they read two steps of four rows later: rows of a kilobyte are too short for the processor to
 * see a stream. The last rows fetch themselves. */
VDB_INLINE void vdb_fetch(const void *row, size_t bytes) { __builtin_prefetch((const char *)row + bytes); }

/* Under -ffast-math the compiler may add in another order, but not what it cannot look through. */
VDB_INLINE void vdb_keep_order(double *lanes) { __asm__ volatile("" : : "r"(lanes) : "memory"); }

/* Rounds a product before it is added: unlike the product of two floats, the square of a difference has more digits
 * than a double, and the compiler fuses the two operations where the machine can, which rounds once. */
#if defined(__x86_64__)
#define VDB_ROUNDED(product) __asm__("" : "+x"(product))
#elif defined(__aarch64__)
#define VDB_ROUNDED(product) __asm__("" : "+w"(product))
#else
#define VDB_ROUNDED(product) __asm__("" : "+m"(product))
#endif

/* Appends a hit per set bit of `reached`: bit i is query q + i of row r, with the bound upper[i]. */
static inline size_t vdb_collect(unsigned reached, const float *upper, size_t r, size_t q, vdb_hit *hits,
                                 size_t found) {
  for (; reached; reached &= reached - 1) {
    unsigned lane = (unsigned)__builtin_ctz(reached);
    vdb_hit hit = {(uint32_t)r, (uint32_t)q + lane, upper[lane]};
    hits[found++] = hit;
  }
  return found;
}

/* Packed queries stand 16 abreast: [width / 16][dimensions][16], so that one step of a tile reads one vector per 16
 * queries and spreads one number of each row over it. This is the panel of every set that multiplies floats; rows of
 * another element, codes too, are decoded first, and f32 is copied: a tile that reads eight rows number by number would
 * wait for memory. */
static inline size_t vdb_panel_bytes_floats(vdb_element element, size_t width, size_t dimensions) {
  (void)element;
  return width * dimensions * sizeof(float);
}

VDB_ONCE void vdb_pack_floats(vdb_element element, const float *const *queries, size_t dimensions,
                                   vdb_panel *panel) {
  float *data = (float *)panel->data;
  (void)element;
  panel->relative = vdb_rounding(dimensions);
  for (size_t q = 0; q < panel->width; q++) {
    float *column = data + q / 16 * dimensions * 16 + q % 16;
    panel->missing[q] = 0.0f;
    for (size_t j = 0; j < dimensions; j++) column[j * 16] = q < panel->queries ? queries[q][j] : 0.0f;
  }
}

/* Panels of codes: a scale per query, then [width / 16][padded / 4][16][4] codes, then room for the codes of one query.
 * One byte per number is enough: what it drops is `missing`, and a second one would double the work of the tile to
 * spare few exact distances. `flip` is xored into the codes where the instruction wants the queries unsigned. */
static inline size_t vdb_panel_bytes_codes(size_t width, size_t dimensions) {
  size_t padded = vdb_round_up(dimensions, VDB_PAD);
  return width * sizeof(float) + width * padded + padded;
}

VDB_ONCE void vdb_pack_codes(const float *const *queries, size_t dimensions, uint8_t flip, vdb_panel *panel) {
  size_t padded = vdb_round_up(dimensions, VDB_PAD);
  float *scales = (float *)panel->data;
  uint8_t *data = (uint8_t *)(scales + panel->width);
  int8_t *codes = (int8_t *)(data + panel->width * padded);
  memset(data, 0, panel->width * padded);
  panel->relative = vdb_rounding(dimensions);
  for (size_t q = 0; q < panel->width; q++) {
    uint8_t *column = data + q / 16 * padded * 16 + q % 16 * 4;
    double dropped = 0.0;
    scales[q] = panel->missing[q] = 0.0f;
    if (q >= panel->queries) continue;
    scales[q] = vdb_to_i8(queries[q], dimensions, codes);
    for (size_t j = 0; j < dimensions; j++) {
      double residual = (double)queries[q][j] - (double)scales[q] * (double)codes[j];
      dropped += residual * residual;
      column[j / 4 * 64 + j % 4] = (uint8_t)((uint8_t)codes[j] ^ flip);
    }
    panel->missing[q] = (float)(sqrt(dropped) * 1.000001); /* not less, for all the rounding */
  }
}

/* --- crc32c: the Castagnoli polynomial, bits reflected ---
 *
 * Without an instruction: eight bytes a step through eight tables, made once. */
VDB_LIGHT const uint32_t (*vdb_crc_tables(void))[256] {
  static uint32_t tables[8][256];
  static int state; /* 0: none, 1: being made, 2: ready */
  int none = 0;
  if (__atomic_load_n(&state, __ATOMIC_ACQUIRE) == 2) return (const uint32_t(*)[256])tables;
  if (__atomic_compare_exchange_n(&state, &none, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
    for (uint32_t byte = 0; byte < 256; byte++) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1u ? 0x82f63b78u : 0u);
      tables[0][byte] = crc;
    }
    for (int t = 1; t < 8; t++)
      for (uint32_t byte = 0; byte < 256; byte++)
        tables[t][byte] = tables[t - 1][byte] >> 8 ^ tables[0][tables[t - 1][byte] & 255u];
    __atomic_store_n(&state, 2, __ATOMIC_RELEASE);
  }
  while (__atomic_load_n(&state, __ATOMIC_ACQUIRE) != 2) continue;
  return (const uint32_t(*)[256])tables;
}

static inline uint32_t vdb_crc32c_plain(uint32_t crc, const void *bytes, size_t size) {
  const uint32_t(*t)[256] = vdb_crc_tables();
  const unsigned char *p = (const unsigned char *)bytes;
  crc = ~crc;
  for (; size >= 8; size -= 8, p += 8) {
    uint32_t low, high;
    memcpy(&low, p, 4);
    memcpy(&high, p + 4, 4);
    low ^= crc;
    crc = t[7][low & 255u] ^ t[6][low >> 8 & 255u] ^ t[5][low >> 16 & 255u] ^ t[4][low >> 24] ^ t[3][high & 255u] ^
          t[2][high >> 8 & 255u] ^ t[1][high >> 16 & 255u] ^ t[0][high >> 24];
  }
  for (; size; size--, p++) crc = crc >> 8 ^ t[0][(crc ^ *p) & 255u];
  return ~crc;
}

/* a * b modulo the polynomial; the highest bit is x^0. */
VDB_ONCE uint32_t vdb_crc_multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int bit = 0; bit < 32; bit++) {
    product ^= (uint32_t)-(int32_t)(a >> 31) & b;
    a <<= 1;
    b = b >> 1 ^ ((uint32_t)-(int32_t)(b & 1u) & 0x82f63b78u);
  }
  return product;
}

/* With an instruction: it takes three cycles but a new one may start in each, so three stretches are read side by side.
 * The first two are then moved past what follows them: x^(8 n) modulo the polynomial for n bytes. */
#if defined(VDB_X86)
#if defined(__clang__) && __clang_major__ >= 14 /* where it is a feature of its own */
#define VDB_CRC_TARGET VDB_TARGET("sse4.2,crc32")
#else
#define VDB_CRC_TARGET VDB_TARGET("sse4.2")
#endif
VDB_INLINE VDB_CRC_TARGET uint32_t vdb_crc_word(uint32_t crc, uint64_t word) {
  return (uint32_t)_mm_crc32_u64(crc, word);
}
VDB_INLINE VDB_CRC_TARGET uint32_t vdb_crc_byte(uint32_t crc, uint8_t byte) { return _mm_crc32_u8(crc, byte); }
#elif defined(VDB_ARM) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define VDB_CRC_TARGET
VDB_INLINE uint32_t vdb_crc_word(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
VDB_INLINE uint32_t vdb_crc_byte(uint32_t crc, uint8_t byte) { return __crc32cb(crc, byte); }
#endif

#ifdef VDB_CRC_TARGET
#define VDB_CRC_STRETCH 8192u
#define VDB_CRC_PAST_ONE 0x28461564u /* x^(8 * 8192) */
#define VDB_CRC_PAST_TWO 0xbf455269u /* x^(8 * 16384) */

VDB_CRC_TARGET static inline uint32_t vdb_crc32c_instruction(uint32_t crc, const void *bytes, size_t size) {
  const unsigned char *p = (const unsigned char *)bytes;
  uint64_t word[3];
  crc = ~crc;
  for (; size >= 3 * VDB_CRC_STRETCH; size -= 3 * VDB_CRC_STRETCH, p += 3 * VDB_CRC_STRETCH) {
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < VDB_CRC_STRETCH; i += 8) {
      memcpy(&word[0], p + i, 8);
      memcpy(&word[1], p + VDB_CRC_STRETCH + i, 8);
      memcpy(&word[2], p + 2 * VDB_CRC_STRETCH + i, 8);
      crc = vdb_crc_word(crc, word[0]);
      second = vdb_crc_word(second, word[1]);
      third = vdb_crc_word(third, word[2]);
    }
    crc = vdb_crc_multiply(crc, VDB_CRC_PAST_TWO) ^ vdb_crc_multiply(second, VDB_CRC_PAST_ONE) ^ third;
  }
  for (; size >= 8; size -= 8, p += 8) {
    memcpy(&word[0], p, 8);
    crc = vdb_crc_word(crc, word[0]);
  }
  for (; size; size--, p++) crc = vdb_crc_byte(crc, *p);
  return ~crc;
}
#endif

/* --- plain ---
 *
 * The compiler's own vectors of 16 bytes, which x86-64 and ARM have; elsewhere it makes scalars of them. Four rows are
 * read side by side, for one sum would wait for itself. On ARM this is NEON already. */
typedef float vdb_f32x4 __attribute__((vector_size(16)));
typedef double vdb_f64x2 __attribute__((vector_size(16)));
typedef int32_t vdb_i32x4 __attribute__((vector_size(16)));

VDB_INLINE vdb_f32x4 vdb_load_plain(const float *from) {
  vdb_f32x4 values;
  memcpy(&values, from, sizeof values);
  return values;
}

VDB_INLINE vdb_f32x4 vdb_spread_plain(float value) {
  vdb_f32x4 values = {value, value, value, value};
  return values;
}

VDB_INLINE vdb_f32x4 vdb_load_row_plain(vdb_element element, const void *row, size_t j) {
  if (element == VDB_F32) return vdb_load_plain((const float *)row + j);
#ifdef VDB_ARM
  if (element == VDB_F16) return (vdb_f32x4)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)row + j)));
#endif
  vdb_f32x4 values = {vdb_number_at(element, row, j), vdb_number_at(element, row, j + 1), vdb_number_at(element, row, j + 2),
                      vdb_number_at(element, row, j + 3)};
  return values;
}

/* The lower or upper half of four floats as doubles; of __builtin_convertvector gcc makes scalars. */
VDB_INLINE vdb_f64x2 vdb_widen_plain(vdb_f32x4 four, int upper) {
#if defined(VDB_X86)
  return (vdb_f64x2)_mm_cvtps_pd(upper ? _mm_movehl_ps((__m128)four, (__m128)four) : (__m128)four);
#elif defined(VDB_ARM)
  float32x4_t values = (float32x4_t)four;
  return (vdb_f64x2)vcvt_f64_f32(upper ? vget_high_f32(values) : vget_low_f32(values));
#else
  vdb_f64x2 two = {(double)four[2 * upper], (double)four[2 * upper + 1]};
  return two;
#endif
}

/* sum + a * b; a strict -std=c11 does not fuse by itself. */
VDB_INLINE vdb_f32x4 vdb_fused_plain(vdb_f32x4 sum, vdb_f32x4 a, vdb_f32x4 b) {
#ifdef VDB_ARM
  return (vdb_f32x4)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return sum + a * b;
#endif
}

VDB_INLINE void vdb_scan_plain(vdb_element element, int squares, const float *query, const void *const *rows,
                               size_t count, size_t dimensions, float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const void *row[4];
    vdb_f32x4 sums[4];
    size_t j = 0;
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = rows[vdb_min(i + (size_t)r, count - 1)];
      sums[r] = vdb_spread_plain(0.0f);
    }
    for (; j + 4 <= dimensions; j += 4) {
      vdb_f32x4 q = vdb_load_plain(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_f32x4 x = vdb_load_row_plain(element, row[r], j), difference = q - x;
        sums[r] = squares ? vdb_fused_plain(sums[r], difference, difference) : vdb_fused_plain(sums[r], q, x);
      }
    }
    for (size_t r = 0; r < 4 && i + r < count; r++) {
      float sum = (sums[r][0] + sums[r][2]) + (sums[r][1] + sums[r][3]);
      for (size_t k = j; k < dimensions; k++) {
        float x = vdb_number_at(element, row[r], k), difference = query[k] - x;
        sum += squares ? difference * difference : query[k] * x;
      }
      out[i + r] = sum;
    }
  }
}

static inline void vdb_dots_f32_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F32, 0, q, rows, n, dims, out);
}
static inline void vdb_dots_f16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F16, 0, q, rows, n, dims, out);
}
static inline void vdb_dots_bf16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_BF16, 0, q, rows, n, dims, out);
}
static inline void vdb_squares_f32_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F32, 1, q, rows, n, dims, out);
}
static inline void vdb_squares_f16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_F16, 1, q, rows, n, dims, out);
}
static inline void vdb_squares_bf16_plain(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_plain(VDB_BF16, 1, q, rows, n, dims, out);
}

static inline void vdb_dots_i8_plain(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                     float *out) {
  for (size_t i = 0; i < count; i++) {
    const int8_t *row = (const int8_t *)rows[i];
    int32_t high = 0, low = 0;
    for (size_t j = 0; j < dimensions; j++) {
      high += query->high[j] * row[j];
      low += query->low[j] * row[j];
    }
    out[i] = query->high_scale * (float)high + query->low_scale * (float)low;
  }
}

static inline int vdb_gate_plain(const float *scores, const vdb_row_terms *rows, size_t count, float gamma, float delta,
                                 float threshold, float *upper) {
  int any = 0;
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vdb_f32x4 sum = vdb_load_plain(rows->alpha + i) * vdb_load_plain(scores + i) + vdb_load_plain(rows->beta + i) +
                    vdb_load_plain(rows->rho + i) * vdb_spread_plain(gamma) +
                    vdb_load_plain(rows->residual + i) * vdb_spread_plain(delta);
    vdb_i32x4 below = sum < vdb_spread_plain(threshold);
    any |= !(below[0] & below[1] & below[2] & below[3]);
    memcpy(upper + i, &sum, sizeof sum);
  }
  for (; i < count; i++) {
    upper[i] = rows->alpha[i] * scores[i] + rows->beta[i] + rows->rho[i] * gamma + rows->residual[i] * delta;
    any |= !(upper[i] < threshold);
  }
  return any;
}

static inline size_t vdb_gate_tile_plain(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                                         const vdb_query_terms *queries, vdb_hit *hits) {
  size_t found = 0;
  for (size_t r = 0; r < count; r++) {
    vdb_f32x4 alpha = vdb_spread_plain(rows->alpha[r]), beta = vdb_spread_plain(rows->beta[r]);
    vdb_f32x4 rho = vdb_spread_plain(rows->rho[r]), residual = vdb_spread_plain(rows->residual[r]);
    for (size_t q = 0; q < width; q += 4) {
      vdb_f32x4 sum = alpha * vdb_load_plain(scores + r * width + q) + beta +
                      rho * vdb_load_plain(queries->gamma + q) + residual * vdb_load_plain(queries->delta + q);
      vdb_i32x4 below = sum < vdb_load_plain(queries->threshold + q);
      if (!(below[0] & below[1] & below[2] & below[3])) {
        unsigned reached = 15u ^ (((unsigned)below[0] & 1u) | ((unsigned)below[1] & 2u) | ((unsigned)below[2] & 4u) |
                                  ((unsigned)below[3] & 8u));
        found = vdb_collect(reached, (const float *)&sum, r, q, hits, found);
      }
    }
  }
  return found;
}

static inline void vdb_decode_plain(vdb_element element, const void *row, float scale, size_t dimensions, float *out) {
  if (element == VDB_F32) {
    memcpy(out, row, dimensions * sizeof(float));
  } else if (element == VDB_I8) {
    for (size_t j = 0; j < dimensions; j++) out[j] = scale * (float)((const int8_t *)row)[j];
  } else {
    for (size_t j = 0; j < dimensions; j++) out[j] = vdb_number_at(element, row, j);
  }
}

#ifdef VDB_ARM
#define VDB_PLAIN_ROWS 4 /* times 16 queries: sums that fit into 32 registers; */
#else
#define VDB_PLAIN_ROWS 2 /* into 16 */
#endif

/* Of rows first to first + VDB_PLAIN_ROWS - 1, clipped to `count`, with 16 queries. */
VDB_INLINE void vdb_tile_block_plain(const float *queries, const float *rows, size_t first, size_t count,
                                     size_t dimensions, float *scores, size_t width) {
  const float *row[VDB_PLAIN_ROWS];
  vdb_f32x4 sums[VDB_PLAIN_ROWS][4];
  VDB_UNROLL for (int r = 0; r < VDB_PLAIN_ROWS; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    VDB_UNROLL for (int v = 0; v < 4; v++) sums[r][v] = vdb_spread_plain(0.0f);
  }
  for (size_t j = 0; j < dimensions; j++) {
    vdb_f32x4 q[4];
    VDB_UNROLL for (int v = 0; v < 4; v++) q[v] = vdb_load_plain(queries + j * 16 + 4 * v);
    VDB_UNROLL for (int r = 0; r < VDB_PLAIN_ROWS; r++) {
      vdb_f32x4 x = vdb_spread_plain(row[r][j]);
      VDB_UNROLL for (int v = 0; v < 4; v++) sums[r][v] = vdb_fused_plain(sums[r][v], q[v], x);
    }
  }
  VDB_UNROLL for (int r = 0; r < VDB_PLAIN_ROWS; r++)
    if (first + (size_t)r < count) memcpy(scores + (first + (size_t)r) * width, sums[r], sizeof sums[r]);
}

static inline void vdb_tile_plain(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                  size_t dimensions, float *scores, void *scratch) {
  float *floats = (float *)scratch;
  vdb_decode_plain(element, rows, 1.0f, count * dimensions, floats);
  for (size_t q = 0; q < panel->width; q += 16)
    for (size_t r = 0; r < count; r += VDB_PLAIN_ROWS)
      vdb_tile_block_plain((const float *)panel->data + q * dimensions, floats, r, count, dimensions, scores + q,
                           panel->width);
}

VDB_INLINE void vdb_exact_as_plain(const float *query, const float *row, size_t dimensions, int squares,
                                   double sums[2]) {
  vdb_f64x2 products[8], norms[8];
  double lanes[2][16];
  size_t j = 0;
  memset(products, 0, sizeof products);
  memset(norms, 0, sizeof norms);
  for (; j + 16 <= dimensions; j += 16) {
    VDB_UNROLL for (int v = 0; v < 8; v++) {
      vdb_f32x4 q = vdb_load_plain(query + j + v / 2 * 4), x = vdb_load_plain(row + j + v / 2 * 4);
      vdb_f64x2 wide = vdb_widen_plain(x, v % 2), factor = vdb_widen_plain(q, v % 2);
      if (squares) factor -= wide;
      vdb_f64x2 product = factor * (squares ? factor : wide);
      if (squares) VDB_ROUNDED(product);
      products[v] += product;
      if (!squares) norms[v] += wide * wide;
    }
  }
  memcpy(lanes[0], products, sizeof products);
  memcpy(lanes[1], norms, sizeof norms);
  for (size_t l = 0; j < dimensions; j++, l++) {
    double q = query[j], x = row[j], product = squares ? (q - x) * (q - x) : q * x;
    VDB_ROUNDED(product);
    lanes[0][l] += product;
    if (!squares) lanes[1][l] += x * x;
  }
  for (int s = 0; s < 2; s++) {
    vdb_keep_order(lanes[s]);
    for (int half = 8; half; half /= 2) {
      for (int l = 0; l < half; l++) lanes[s][l] += lanes[s][l + half];
      vdb_keep_order(lanes[s]);
    }
    sums[s] = lanes[s][0];
  }
}

static inline void vdb_exact_plain(const float *query, const float *row, size_t dimensions, int squares,
                                   double sums[2]) {
  if (squares) {
    vdb_exact_as_plain(query, row, dimensions, 1, sums);
  } else {
    vdb_exact_as_plain(query, row, dimensions, 0, sums);
  }
}

static inline uint64_t vdb_between_plain(const uint64_t *values, const uint8_t *tags, uint8_t tag, int64_t low,
                                         int64_t high) {
  uint64_t word = 0;
  for (unsigned i = 0; i < 64; i++) {
    int64_t value = (int64_t)values[i];
    word |= (uint64_t)((tags[i] == tag) & (value >= low) & (value <= high)) << i;
  }
  return word;
}

static inline size_t vdb_count_plain(const uint64_t *a, const uint64_t *b, size_t words) {
  size_t count = 0;
  for (size_t i = 0; i < words; i++) count += (size_t)__builtin_popcountll(a[i] & b[i]);
  return count;
}

static inline const vdb_kernel_set *vdb_plain_set(void) {
  static const vdb_kernel_set set = {
      "plain",
      {vdb_dots_f32_plain, vdb_dots_f16_plain, vdb_dots_bf16_plain},
      {vdb_squares_f32_plain, vdb_squares_f16_plain, vdb_squares_bf16_plain},
      vdb_dots_i8_plain,
      vdb_gate_plain,
      vdb_panel_bytes_floats,
      vdb_pack_floats,
      vdb_tile_plain,
      vdb_gate_tile_plain,
      vdb_exact_plain,
      vdb_decode_plain,
      vdb_crc32c_plain,
      vdb_between_plain,
      vdb_count_plain,
  };
  return &set;
}

#ifdef VDB_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized" /* g++ says it of gcc's own intrinsics */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

VDB_TARGET("popcnt") static inline size_t vdb_count_instruction(const uint64_t *a, const uint64_t *b, size_t words) {
  size_t count = 0;
  for (size_t i = 0; i < words; i++) count += (size_t)__builtin_popcountll(a[i] & b[i]);
  return count;
}

/* --- avx512 ---
 *
 * 16 floats or 64 codes a step, four rows side by side, masks for what is left over: only the products of codes read
 * past a row. Codes meet in VNNI's u8 x i8 products, where 128 is added to one side and taken off again by the sum of
 * the other. 16-bit floats are widened: products of BF16 instructions would need a rounded query. */
#define VDB_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"

VDB_INLINE VDB_TARGET(VDB_AVX512) __mmask16 vdb_first_avx512(size_t count) {
  return (__mmask16)(count < 16 ? (1u << count) - 1u : 0xffffu);
}

VDB_INLINE VDB_TARGET(VDB_AVX512) __m512 vdb_load_avx512(vdb_element element, const void *row, size_t j,
                                                         __mmask16 mask) {
  if (element == VDB_F16) return _mm512_maskz_cvtph_ps(mask, _mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + j));
  if (element == VDB_BF16) {
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + j);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  if (element == VDB_I8) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, (const int8_t *)row + j)));
  }
  return _mm512_maskz_loadu_ps(mask, (const float *)row + j);
}

VDB_INLINE VDB_TARGET(VDB_AVX512) __m512 vdb_step_avx512(int squares, __m512 sum, __m512 q, __m512 x) {
  __m512 difference = _mm512_sub_ps(q, x);
  return squares ? _mm512_fmadd_ps(difference, difference, sum) : _mm512_fmadd_ps(q, x, sum);
}

/* The sums over the lanes of four vectors. */
VDB_INLINE VDB_TARGET(VDB_AVX512) __m128 vdb_fold_avx512(const __m512 *sums) {
  __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
  __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX512) __m128i vdb_fold_i32_avx512(const __m512i *sums) {
  __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
  __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_scan_avx512(vdb_element element, int squares, const float *query,
                                                       const void *const *rows, size_t count, size_t dimensions,
                                                       float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const void *row[4], *next[4];
    __m512 sums[4];
    size_t j = 0;
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      sums[r] = _mm512_setzero_ps();
    }
    for (; j + 16 <= dimensions; j += 16) {
      __m512 q = _mm512_loadu_ps(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j * vdb_bytes_of(element));
        sums[r] = vdb_step_avx512(squares, sums[r], q, vdb_load_avx512(element, row[r], j, 0xffff));
      }
    }
    if (j < dimensions) {
      __mmask16 rest = vdb_first_avx512(dimensions - j);
      __m512 q = _mm512_maskz_loadu_ps(rest, query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++)
        sums[r] = vdb_step_avx512(squares, sums[r], q, vdb_load_avx512(element, row[r], j, rest));
    }
    _mm_mask_storeu_ps(out + i, (__mmask8)(vdb_first_avx512(count - i) & 15), vdb_fold_avx512(sums));
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_f32_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F32, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_f16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_bf16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_BF16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_squares_f32_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F32, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_squares_f16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_F16, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX512)
static inline void vdb_squares_bf16_avx512(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx512(VDB_BF16, 1, q, rows, n, dims, out);
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_dots_i8_avx512(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                      float *out) {
  const __m512i flip = _mm512_set1_epi8((char)-128);
  const __m128i high_excess = _mm_set1_epi32(128 * query->high_sum), low_excess = _mm_set1_epi32(128 * query->low_sum);
  for (size_t i = 0; i < count; i += 4) {
    const int8_t *row[4], *next[4];
    __m512i high[4], low[4];
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = (const int8_t *)rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = (const int8_t *)rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      high[r] = low[r] = _mm512_setzero_si512();
    }
    for (size_t j = 0; j < dimensions; j += 64) {
      __m512i q_high = _mm512_loadu_si512(query->high + j), q_low = _mm512_loadu_si512(query->low + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j);
        __m512i x = _mm512_xor_si512(_mm512_loadu_si512(row[r] + j), flip); /* past the row it meets a zero */
        high[r] = _mm512_dpbusd_epi32(high[r], x, q_high);
        low[r] = _mm512_dpbusd_epi32(low[r], x, q_low);
      }
    }
    __m128 a = _mm_cvtepi32_ps(_mm_sub_epi32(vdb_fold_i32_avx512(high), high_excess));
    __m128 b = _mm_cvtepi32_ps(_mm_sub_epi32(vdb_fold_i32_avx512(low), low_excess));
    __m128 sum = _mm_fmadd_ps(_mm_set1_ps(query->high_scale), a, _mm_mul_ps(_mm_set1_ps(query->low_scale), b));
    _mm_mask_storeu_ps(out + i, (__mmask8)(vdb_first_avx512(count - i) & 15), sum);
  }
}

VDB_TARGET(VDB_AVX512)
static inline int vdb_gate_avx512(const float *scores, const vdb_row_terms *rows, size_t count, float gamma,
                                  float delta, float threshold, float *upper) {
  unsigned any = 0;
  for (size_t i = 0; i < count; i += 16) {
    __mmask16 mask = vdb_first_avx512(count - i);
    __m512 sum = _mm512_maskz_loadu_ps(mask, rows->beta + i);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows->rho + i), _mm512_set1_ps(gamma), sum);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows->residual + i), _mm512_set1_ps(delta), sum);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows->alpha + i), _mm512_maskz_loadu_ps(mask, scores + i), sum);
    _mm512_mask_storeu_ps(upper + i, mask, sum);
    any |= _mm512_mask_cmp_ps_mask(mask, sum, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
  }
  return any != 0;
}

VDB_TARGET(VDB_AVX512)
static inline size_t vdb_gate_tile_avx512(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                                          const vdb_query_terms *queries, vdb_hit *hits) {
  size_t found = 0;
  for (size_t r = 0; r < count; r++) {
    __m512 alpha = _mm512_set1_ps(rows->alpha[r]), beta = _mm512_set1_ps(rows->beta[r]);
    __m512 rho = _mm512_set1_ps(rows->rho[r]), residual = _mm512_set1_ps(rows->residual[r]);
    for (size_t q = 0; q < width; q += 16) {
      __m512 sum = _mm512_fmadd_ps(rho, _mm512_loadu_ps(queries->gamma + q), beta);
      sum = _mm512_fmadd_ps(residual, _mm512_loadu_ps(queries->delta + q), sum);
      sum = _mm512_fmadd_ps(alpha, _mm512_loadu_ps(scores + r * width + q), sum);
      unsigned reached = _mm512_cmp_ps_mask(sum, _mm512_loadu_ps(queries->threshold + q), _CMP_NLT_UQ);
      if (__builtin_expect(reached != 0, 0)) {
        float upper[16];
        _mm512_storeu_ps(upper, sum);
        found = vdb_collect(reached, upper, r, q, hits, found);
      }
    }
  }
  return found;
}

VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_decode_as_avx512(vdb_element element, const void *row, float scale,
                                                            size_t dimensions, float *out) {
  for (size_t j = 0; j < dimensions; j += 16) {
    __mmask16 mask = vdb_first_avx512(dimensions - j);
    __m512 x = vdb_load_avx512(element, row, j, mask);
    _mm512_mask_storeu_ps(out + j, mask, element == VDB_I8 ? _mm512_mul_ps(x, _mm512_set1_ps(scale)) : x);
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_decode_avx512(vdb_element element, const void *row, float scale, size_t dimensions, float *out) {
  if (element == VDB_F32) vdb_decode_as_avx512(VDB_F32, row, scale, dimensions, out);
  if (element == VDB_F16) vdb_decode_as_avx512(VDB_F16, row, scale, dimensions, out);
  if (element == VDB_BF16) vdb_decode_as_avx512(VDB_BF16, row, scale, dimensions, out);
  if (element == VDB_I8) vdb_decode_as_avx512(VDB_I8, row, scale, dimensions, out);
}

VDB_INLINE VDB_TARGET(VDB_AVX512) double vdb_fold_f64_avx512(__m512d low, __m512d high) {
  __m512d eight = _mm512_add_pd(low, high);
  __asm__("" : "+v"(eight)); /* against -ffast-math, as in vdb_keep_order */
  __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  __asm__("" : "+v"(four));
  __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  __asm__("" : "+v"(two));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

/* Half a step of exact: 8 of the 16 lanes. */
VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_exact_step_avx512(__m256 q, __m256 x, int squares, __m512d *products,
                                                             __m512d *norms) {
  __m512d wide = _mm512_cvtps_pd(x), factor = _mm512_cvtps_pd(q);
  if (squares) {
    factor = _mm512_sub_pd(factor, wide);
    __m512d square = _mm512_mul_pd(factor, factor);
    VDB_ROUNDED(square);
    *products = _mm512_add_pd(square, *products);
    VDB_ROUNDED(*products); /* the fold adds in its own order */
  } else {
    *products = _mm512_fmadd_pd(factor, wide, *products);
    *norms = _mm512_fmadd_pd(wide, wide, *norms);
  }
}

VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_exact_as_avx512(const float *query, const float *row, size_t dimensions,
                                                           int squares, double sums[2]) {
  __m512d products[2], norms[2];
  size_t j = 0;
  products[0] = products[1] = norms[0] = norms[1] = _mm512_setzero_pd();
  for (; j + 16 <= dimensions; j += 16) {
    VDB_UNROLL for (int v = 0; v < 2; v++) {
      __m256 q = _mm256_loadu_ps(query + j + 8 * v), x = _mm256_loadu_ps(row + j + 8 * v);
      vdb_exact_step_avx512(q, x, squares, &products[v], &norms[v]);
    }
  }
  if (j < dimensions) {
    VDB_UNROLL for (int v = 0; v < 2; v++) {
      __mmask8 rest = (__mmask8)(vdb_first_avx512(dimensions - j) >> 8 * v);
      __m256 q = _mm256_maskz_loadu_ps(rest, query + j + 8 * v), x = _mm256_maskz_loadu_ps(rest, row + j + 8 * v);
      vdb_exact_step_avx512(q, x, squares, &products[v], &norms[v]);
    }
  }
  sums[0] = vdb_fold_f64_avx512(products[0], products[1]);
  sums[1] = vdb_fold_f64_avx512(norms[0], norms[1]);
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_exact_avx512(const float *query, const float *row, size_t dimensions, int squares,
                                    double sums[2]) {
  if (squares) {
    vdb_exact_as_avx512(query, row, dimensions, 1, sums);
  } else {
    vdb_exact_as_avx512(query, row, dimensions, 0, sums);
  }
}

/* Scores of rows first to first + 7, clipped to `count`, with 16 * vectors queries: 24 sums in registers, and each
 * number of a row spread over a register once for all of them. */
VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_tile_f32_block_avx512(int vectors, const float *queries, const float *rows,
                                                                 size_t first, size_t count, size_t dimensions,
                                                                 float *scores, size_t width) {
  const float *row[8];
  __m512 sums[8][3];
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_ps();
  }
  for (size_t j = 0; j < dimensions; j++) {
    __m512 q[3];
    VDB_UNROLL for (int v = 0; v < vectors; v++) q[v] = _mm512_loadu_ps(queries + ((size_t)v * dimensions + j) * 16);
    VDB_UNROLL for (int r = 0; r < 8; r++) {
      __m512 x = _mm512_set1_ps(row[r][j]);
      VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_fmadd_ps(x, q[v], sums[r][v]);
    }
  }
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    if (first + (size_t)r >= count) break;
    float *to = scores + (first + (size_t)r) * width;
    VDB_UNROLL for (int v = 0; v < vectors; v++) _mm512_storeu_ps(to + 16 * v, sums[r][v]);
  }
}

static inline size_t vdb_panel_bytes_avx512(vdb_element element, size_t width, size_t dimensions) {
  return element == VDB_I8 ? vdb_panel_bytes_codes(width, dimensions)
                           : vdb_panel_bytes_floats(element, width, dimensions);
}

static inline void vdb_pack_avx512(vdb_element element, const float *const *queries, size_t dimensions,
                                   vdb_panel *panel) {
  if (element == VDB_I8) {
    vdb_pack_codes(queries, dimensions, 0x80, panel);
  } else {
    vdb_pack_floats(element, queries, dimensions, panel);
  }
}

/* The same for codes, four numbers a step. The queries' are 128 too great: `excess` is 128 times the sum of a row. */
VDB_INLINE VDB_TARGET(VDB_AVX512) void vdb_tile_i8_block_avx512(int vectors, const uint8_t *queries,
                                                                const float *scales, const int8_t *rows,
                                                                const int32_t *excess, size_t first, size_t count,
                                                                size_t dimensions, float *scores, size_t width) {
  const size_t padded = vdb_round_up(dimensions, VDB_PAD);
  const int8_t *row[8];
  __m512i sums[8][3];
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_si512();
  }
  for (size_t j = 0; j < dimensions; j += 4) {
    __m512i q[3];
    VDB_UNROLL for (int v = 0; v < vectors; v++) q[v] = _mm512_loadu_si512(queries + ((size_t)v * padded + j) * 16);
    VDB_UNROLL for (int r = 0; r < 8; r++) {
      int32_t four;
      memcpy(&four, row[r] + j, sizeof four); /* past the row it meets a zero */
      __m512i x = _mm512_set1_epi32(four);
      VDB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], q[v], x);
    }
  }
  VDB_UNROLL for (int r = 0; r < 8; r++) {
    if (first + (size_t)r >= count) break;
    float *to = scores + (first + (size_t)r) * width;
    VDB_UNROLL for (int v = 0; v < vectors; v++) {
      __m512i sum = _mm512_sub_epi32(sums[r][v], _mm512_set1_epi32(excess[first + (size_t)r]));
      _mm512_storeu_ps(to + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scales + 16 * v)));
    }
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_tile_i8_avx512(const vdb_panel *panel, const int8_t *rows, size_t count, size_t dimensions,
                                      float *scores) {
  const size_t padded = vdb_round_up(dimensions, VDB_PAD), width = panel->width;
  const float *scales = (const float *)panel->data;
  const uint8_t *data = (const uint8_t *)(scales + width);
  int32_t excess[VDB_TILE_ROWS];
  for (size_t r = 0; r < count; r++) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t j = 0; j < dimensions; j += 64) {
      __mmask64 mask = ~(__mmask64)0 >> (64 - vdb_min(dimensions - j, 64));
      __m512i x = _mm512_maskz_loadu_epi8(mask, rows + r * dimensions + j);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char)-128), x); /* to it, -128 is 128 */
    }
    excess[r] = _mm512_reduce_add_epi32(sum);
  }
  for (size_t q = 0, vectors; q < width; q += 16 * vectors) {
    const uint8_t *queries = data + q * padded;
    vectors = vdb_min((width - q) / 16, 3);
    for (size_t r = 0; r < count; r += 8) {
      if (vectors == 3) {
        vdb_tile_i8_block_avx512(3, queries, scales + q, rows, excess, r, count, dimensions, scores + q, width);
      } else if (vectors == 2) {
        vdb_tile_i8_block_avx512(2, queries, scales + q, rows, excess, r, count, dimensions, scores + q, width);
      } else {
        vdb_tile_i8_block_avx512(1, queries, scales + q, rows, excess, r, count, dimensions, scores + q, width);
      }
    }
  }
}

VDB_TARGET(VDB_AVX512)
static inline void vdb_tile_avx512(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                   size_t dimensions, float *scores, void *scratch) {
  const size_t width = panel->width;
  float *floats = (float *)scratch;
  if (element == VDB_I8) {
    vdb_tile_i8_avx512(panel, (const int8_t *)rows, count, dimensions, scores);
    return;
  }
  vdb_decode_avx512(element, rows, 1.0f, count * dimensions, floats);
  for (size_t q = 0, vectors; q < width; q += 16 * vectors) {
    const float *queries = (const float *)panel->data + q * dimensions;
    vectors = vdb_min((width - q) / 16, 3);
    for (size_t r = 0; r < count; r += 8) {
      if (vectors == 3) {
        vdb_tile_f32_block_avx512(3, queries, floats, r, count, dimensions, scores + q, width);
      } else if (vectors == 2) {
        vdb_tile_f32_block_avx512(2, queries, floats, r, count, dimensions, scores + q, width);
      } else {
        vdb_tile_f32_block_avx512(1, queries, floats, r, count, dimensions, scores + q, width);
      }
    }
  }
}

VDB_TARGET(VDB_AVX512)
static inline uint64_t vdb_between_avx512(const uint64_t *values, const uint8_t *tags, uint8_t tag, int64_t low,
                                          int64_t high) {
  __m512i least = _mm512_set1_epi64(low), most = _mm512_set1_epi64(high);
  uint64_t word = 0;
  VDB_UNROLL for (int i = 0; i < 8; i++) {
    __m512i some = _mm512_loadu_si512(values + 8 * i);
    uint64_t passes = _mm512_mask_cmple_epi64_mask(_mm512_cmpge_epi64_mask(some, least), some, most);
    word |= passes << (8 * i);
  }
  return word & _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(tags), _mm512_set1_epi8((char)tag));
}

static inline const vdb_kernel_set *vdb_avx512_set(void) {
  static const vdb_kernel_set set = {
      "avx512",
      {vdb_dots_f32_avx512, vdb_dots_f16_avx512, vdb_dots_bf16_avx512},
      {vdb_squares_f32_avx512, vdb_squares_f16_avx512, vdb_squares_bf16_avx512},
      vdb_dots_i8_avx512,
      vdb_gate_avx512,
      vdb_panel_bytes_avx512,
      vdb_pack_avx512,
      vdb_tile_avx512,
      vdb_gate_tile_avx512,
      vdb_exact_avx512,
      vdb_decode_avx512,
      vdb_crc32c_instruction,
      vdb_between_avx512,
      vdb_count_instruction,
  };
  return &set;
}

/* --- amx ---
 *
 * The avx512 set but for tiles, which matrix instructions multiply: 16 rows by 64 bytes with 64 bytes by 16 queries.
 * Rows are first laid out as such tiles, [step][part][32 rows][64 bytes], padded with zeros; so the unit reads whole
 * kilobytes, and rows of any length. Codes are multiplied as they are. Floats are split into two bf16, high and low,
 * and of the four products of parts all but low by low are taken. Queries are brought to magnitude 1 by a power of two
 * first, for the unit takes what is subnormal for zero. */
#define VDB_AMX VDB_AVX512 ",avx512bf16,amx-tile,amx-int8,amx-bf16"

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} vdb_tile_shape;

/* Numbers of a row in one step. */
VDB_INLINE size_t vdb_step_amx(vdb_element element) { return element == VDB_I8 ? 64 : 32; }

static inline size_t vdb_panel_bytes_amx(vdb_element element, size_t width, size_t dimensions) {
  if (element == VDB_I8) return vdb_panel_bytes_codes(width, dimensions);
  return width * sizeof(float) + width * vdb_round_up(dimensions, 32) * 2 * sizeof(uint16_t);
}

/* A scale per query, then [width / 16][step][high, low][16][16 queries][2]. */
VDB_ONCE void vdb_pack_halves(const float *const *queries, size_t dimensions, vdb_panel *panel) {
  const size_t padded = vdb_round_up(dimensions, 32);
  float *scales = (float *)panel->data;
  uint16_t *data = (uint16_t *)(scales + panel->width);
  memset(data, 0, panel->width * padded * 2 * sizeof(uint16_t));
  for (size_t q = 0; q < panel->width; q++) {
    uint16_t *column = data + q / 16 * padded * 32 + q % 16 * 2;
    uint32_t greatest = 0;
    scales[q] = panel->missing[q] = 0.0f;
    if (q >= panel->queries) continue;
    for (size_t j = 0; j < dimensions; j++) {
      uint32_t magnitude = vdb_bits(queries[q][j]) & 0x7fffffffu;
      greatest = magnitude > greatest ? magnitude : greatest;
    }
    uint32_t exponent = (uint32_t)vdb_min(vdb_max(greatest >> 23, 1), 253);
    float inverse = vdb_from_bits((254u - exponent) << 23);
    scales[q] = vdb_from_bits(exponent << 23);
    for (size_t j = 0; j < dimensions; j++) {
      float value = queries[q][j] * inverse;
      uint16_t high = vdb_to_bf16(value), *to = column + j / 32 * 1024 + j % 32 / 2 * 32 + j % 2;
      to[0] = high;
      to[512] = vdb_to_bf16(value - vdb_from_bf16(high));
    }
  }
}

/* With parts rounded to 8 bits, |low| <= 2^-8 |value| and 2^-17 |value| is lost. f32, f16: low * low and twice what is
 * lost make 2^-15; bf16 rows have no low part, and lose once. To that comes one rounding in f32 for each product, of
 * sums that are greater than |query| |row| by at most 2^-6. */
static inline void vdb_pack_amx(vdb_element element, const float *const *queries, size_t dimensions,
                                vdb_panel *panel) {
  if (element == VDB_I8) {
    vdb_pack_codes(queries, dimensions, 0, panel);
    return;
  }
  size_t products = element == VDB_BF16 ? 2 : 3;
  vdb_pack_halves(queries, dimensions, panel);
  panel->relative = (element == VDB_BF16 /* 2^-16, 2^-15 */ ? 1.52587890625e-5f : 3.0517578125e-5f) + vdb_rounding(products * dimensions) * 1.02f;
}

/* 32 floats of a row, the first `left` of them, as bf16. */
VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_split_amx(vdb_element element, const void *row, size_t j, size_t left,
                                                  uint8_t *high, uint8_t *low) {
  __m512 a = vdb_load_avx512(element, row, j, vdb_first_avx512(left));
  __m512 b = vdb_load_avx512(element, row, j + 16, vdb_first_avx512(left > 16 ? left - 16 : 0));
  __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  __m512i a_high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16);
  __m512i b_high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16);
  a = _mm512_sub_ps(a, _mm512_castsi512_ps(a_high));
  b = _mm512_sub_ps(b, _mm512_castsi512_ps(b_high));
  _mm512_storeu_si512(high, rounded);
  _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_arrange_floats_amx(vdb_element element, const uint8_t *row, size_t dimensions,
                                                           uint8_t *to) {
  for (size_t j = 0; j < dimensions; j += 32, to += 2 * 2048) vdb_split_amx(element, row, j, dimensions - j, to, to + 2048);
}

VDB_TARGET(VDB_AMX)
static inline void vdb_arrange_amx(vdb_element element, const uint8_t *row, size_t count, size_t dimensions, uint8_t *to) {
  const size_t step = vdb_step_amx(element), parts = element == VDB_F32 || element == VDB_F16 ? 2 : 1;
  const size_t bytes = dimensions * vdb_bytes_of(element), steps = (dimensions + step - 1) / step * parts;
  for (size_t r = 0; r < count; r++, row += bytes) {
    if (element == VDB_F32) vdb_arrange_floats_amx(VDB_F32, row, dimensions, to + r * 64);
    else if (element == VDB_F16) vdb_arrange_floats_amx(VDB_F16, row, dimensions, to + r * 64);
    else {
      uint8_t *place = to + r * 64;
      size_t at = 0;
      for (; at + 64 <= bytes; at += 64, place += 2048) _mm512_storeu_si512(place, _mm512_loadu_si512(row + at));
      if (at < bytes) _mm512_storeu_si512(place, _mm512_maskz_loadu_epi8(~(__mmask64)0 >> (64 - (bytes - at)), row + at));
    }
  }
  for (size_t r = count; r < VDB_TILE_ROWS; r++)
    for (size_t k = 0; k < steps; k++)
      _mm512_storeu_si512(to + (k * VDB_TILE_ROWS + r) * 64, _mm512_setzero_si512());
}

/* Products of 32 rows with 32 queries, whose panels begin at `left` and `right`. Tiles 0 to 3 are the sums, 4 and 5
 * rows, 6 and 7 queries. Meanwhile `lines` cache lines a step are fetched of the rows that probably come next. */
VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_multiply_i8_amx(const uint8_t *rows, const uint8_t *left, const uint8_t *right,
                                                        size_t steps, const uint8_t *next, size_t lines) {
  for (size_t k = 0; k < steps; k++, rows += 2048, left += 1024, right += 1024) {
    for (size_t i = 0; i < lines; i++, next += 64) _mm_prefetch((const char *)next, _MM_HINT_T1);
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, left, 64);
    _tile_loadd(7, right, 64);
    _tile_loadd(5, rows + 1024, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

VDB_INLINE VDB_TARGET(VDB_AMX) void vdb_multiply_bf16_amx(int parts, const uint8_t *rows, const uint8_t *left,
                                                          const uint8_t *right, size_t steps, const uint8_t *next,
                                                          size_t lines) {
  for (size_t k = 0; k < steps; k++, rows += parts * 2048, left += 2048, right += 2048) {
    for (size_t i = 0; i < lines; i++, next += 64) _mm_prefetch((const char *)next, _MM_HINT_T1);
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, left + 1024, 64); /* high by low */
    _tile_loadd(7, right + 1024, 64);
    _tile_loadd(5, rows + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, left, 64); /* high by high */
    _tile_loadd(7, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (parts == 1) continue;
    _tile_loadd(4, rows + 2048, 64); /* low by high */
    _tile_loadd(5, rows + 3072, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

VDB_TARGET(VDB_AMX)
static inline void vdb_tile_amx(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                size_t dimensions, float *scores, void *scratch) {
  const size_t width = panel->width, steps = (dimensions + vdb_step_amx(element) - 1) / vdb_step_amx(element);
  const size_t panel_bytes = steps * (element == VDB_I8 ? 1024 : 2048);
  const float *scales = (const float *)panel->data;
  const uint8_t *data = (const uint8_t *)(scales + width), *arranged = (const uint8_t *)scratch;
  const size_t blocks = (width + 31) / 32, bytes = VDB_TILE_ROWS * dimensions * vdb_bytes_of(element);
  const size_t lines = (bytes / 64 + blocks * steps - 1) / (blocks * steps);
  const uint8_t *next = (const uint8_t *)rows + bytes;
  float sums[32][128] __attribute__((aligned(64)));
  vdb_tile_shape shape;
  memset(&shape, 0, sizeof shape);
  shape.palette = 1;
  for (int t = 0; t < 8; t++) {
    shape.rows[t] = 16;
    shape.row_bytes[t] = 64;
  }
  vdb_arrange_amx(element, (const uint8_t *)rows, count, dimensions, (uint8_t *)scratch);
  __asm__ volatile("" : : "r"(&shape), "r"(scratch) : "memory"); /* written before the instructions below read them */
  _tile_loadconfig(&shape);
  for (size_t q = 0; q < width; q += 32) {
    const size_t vectors = width - q > 16 ? 2 : 1;
    const uint8_t *left = data + q / 16 * panel_bytes, *right = vectors == 2 ? left + panel_bytes : left;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (element == VDB_I8) {
      vdb_multiply_i8_amx(arranged, left, right, steps, next, lines);
    } else if (element == VDB_BF16) {
      vdb_multiply_bf16_amx(1, arranged, left, right, steps, next, lines);
    } else {
      vdb_multiply_bf16_amx(2, arranged, left, right, steps, next, lines);
    }
    next += steps * lines * 64;
    _tile_stored(0, &sums[0][q], sizeof sums[0]);
    _tile_stored(2, &sums[16][q], sizeof sums[0]);
    if (vectors == 1) break;
    _tile_stored(1, &sums[0][q + 16], sizeof sums[0]);
    _tile_stored(3, &sums[16][q + 16], sizeof sums[0]);
  }
  _tile_release();
  for (size_t r = 0; r < count; r++) {
    for (size_t q = 0; q < width; q += 16) {
      __m512 sum = _mm512_loadu_ps(&sums[r][q]);
      if (element == VDB_I8) sum = _mm512_cvtepi32_ps(_mm512_castps_si512(sum));
      _mm512_storeu_ps(scores + r * width + q, _mm512_mul_ps(sum, _mm512_loadu_ps(scales + q)));
    }
  }
}

static inline const vdb_kernel_set *vdb_amx_set(void) {
  static const vdb_kernel_set set = {
      "amx",
      {vdb_dots_f32_avx512, vdb_dots_f16_avx512, vdb_dots_bf16_avx512},
      {vdb_squares_f32_avx512, vdb_squares_f16_avx512, vdb_squares_bf16_avx512},
      vdb_dots_i8_avx512,
      vdb_gate_avx512,
      vdb_panel_bytes_amx,
      vdb_pack_amx,
      vdb_tile_amx,
      vdb_gate_tile_avx512,
      vdb_exact_avx512,
      vdb_decode_avx512,
      vdb_crc32c_instruction,
      vdb_between_avx512,
      vdb_count_instruction,
  };
  return &set;
}

/* --- avx2 ---
 *
 * The plan of avx512 with 8 floats or 32 codes. What lies past a row is read and then cleared, for there are no masked
 * loads of 16-bit numbers. */
#define VDB_AVX2 "avx2,fma,f16c"

/* All bits of the first `count` of 8 lanes. */
VDB_INLINE VDB_TARGET(VDB_AVX2) __m256 vdb_first_avx2(size_t count) {
  __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)vdb_min(count, 8)), lanes));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) __m256 vdb_load_avx2(vdb_element element, const void *row, size_t j) {
  if (element == VDB_F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + j)));
  if (element == VDB_BF16) {
    __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + j));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  if (element == VDB_I8) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)row + j))));
  }
  return _mm256_loadu_ps((const float *)row + j);
}

VDB_INLINE VDB_TARGET(VDB_AVX2) __m256 vdb_step_avx2(int squares, __m256 sum, __m256 q, __m256 x) {
  __m256 difference = _mm256_sub_ps(q, x);
  return squares ? _mm256_fmadd_ps(difference, difference, sum) : _mm256_fmadd_ps(q, x, sum);
}

/* The sums over the lanes of four vectors. */
VDB_INLINE VDB_TARGET(VDB_AVX2) __m128 vdb_fold_avx2(const __m256 *sums) {
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) __m128i vdb_fold_i32_avx2(const __m256i *sums) {
  __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_store_avx2(float *out, size_t left, __m128 four) {
  float values[4];
  _mm_storeu_ps(values, four);
  memcpy(out, values, vdb_min(left, 4) * sizeof(float));
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_scan_avx2(vdb_element element, int squares, const float *query,
                                                   const void *const *rows, size_t count, size_t dimensions,
                                                   float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const void *row[4], *next[4];
    __m256 sums[4];
    size_t j = 0;
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      sums[r] = _mm256_setzero_ps();
    }
    for (; j + 8 <= dimensions; j += 8) {
      __m256 q = _mm256_loadu_ps(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j * vdb_bytes_of(element));
        sums[r] = vdb_step_avx2(squares, sums[r], q, vdb_load_avx2(element, row[r], j));
      }
    }
    if (j < dimensions) {
      __m256 rest = vdb_first_avx2(dimensions - j), q = _mm256_loadu_ps(query + j);
      VDB_UNROLL for (int r = 0; r < 4; r++)
        sums[r] = vdb_step_avx2(squares, sums[r], q, _mm256_and_ps(vdb_load_avx2(element, row[r], j), rest));
    }
    vdb_store_avx2(out + i, count - i, vdb_fold_avx2(sums));
  }
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_f32_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F32, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_f16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_bf16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_BF16, 0, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_squares_f32_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F32, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_squares_f16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_F16, 1, q, rows, n, dims, out);
}
VDB_TARGET(VDB_AVX2)
static inline void vdb_squares_bf16_avx2(const float *q, const void *const *rows, size_t n, size_t dims, float *out) {
  vdb_scan_avx2(VDB_BF16, 1, q, rows, n, dims, out);
}

/* |x| * (q with the sign of x): pairs stay below 2^15, so that sums of 16 bits do not saturate. */
VDB_INLINE VDB_TARGET(VDB_AVX2) __m256i vdb_step_i8_avx2(__m256i sum, __m256i q, __m256i x) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(q, x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_dots_i8_avx2(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                    float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const int8_t *row[4], *next[4];
    __m256i high[4], low[4];
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = (const int8_t *)rows[vdb_min(i + (size_t)r, count - 1)];
      next[r] = (const int8_t *)rows[vdb_min(i + 8 + (size_t)r, count - 1)];
      high[r] = low[r] = _mm256_setzero_si256();
    }
    for (size_t j = 0; j < dimensions; j += 32) {
      __m256i q_high = _mm256_loadu_si256((const __m256i *)(query->high + j));
      __m256i q_low = _mm256_loadu_si256((const __m256i *)(query->low + j));
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        vdb_fetch(next[r], j);
        __m256i x = _mm256_loadu_si256((const __m256i *)(row[r] + j)); /* past the row it meets a zero */
        high[r] = vdb_step_i8_avx2(high[r], q_high, x);
        low[r] = vdb_step_i8_avx2(low[r], q_low, x);
      }
    }
    __m128 a = _mm_mul_ps(_mm_set1_ps(query->high_scale), _mm_cvtepi32_ps(vdb_fold_i32_avx2(high)));
    __m128 b = _mm_mul_ps(_mm_set1_ps(query->low_scale), _mm_cvtepi32_ps(vdb_fold_i32_avx2(low)));
    vdb_store_avx2(out + i, count - i, _mm_add_ps(a, b));
  }
}

VDB_TARGET(VDB_AVX2)
static inline size_t vdb_gate_tile_avx2(const float *scores, size_t width, const vdb_row_terms *rows, size_t count,
                                        const vdb_query_terms *queries, vdb_hit *hits) {
  size_t found = 0;
  for (size_t r = 0; r < count; r++) {
    __m256 alpha = _mm256_set1_ps(rows->alpha[r]), beta = _mm256_set1_ps(rows->beta[r]);
    __m256 rho = _mm256_set1_ps(rows->rho[r]), residual = _mm256_set1_ps(rows->residual[r]);
    for (size_t q = 0; q < width; q += 8) {
      __m256 sum = _mm256_fmadd_ps(rho, _mm256_loadu_ps(queries->gamma + q), beta);
      sum = _mm256_fmadd_ps(residual, _mm256_loadu_ps(queries->delta + q), sum);
      sum = _mm256_fmadd_ps(alpha, _mm256_loadu_ps(scores + r * width + q), sum);
      __m256 not_below = _mm256_cmp_ps(sum, _mm256_loadu_ps(queries->threshold + q), _CMP_NLT_UQ);
      unsigned reached = (unsigned)_mm256_movemask_ps(not_below);
      if (__builtin_expect(reached != 0, 0)) {
        float upper[8];
        _mm256_storeu_ps(upper, sum);
        found = vdb_collect(reached, upper, r, q, hits, found);
      }
    }
  }
  return found;
}

VDB_TARGET(VDB_AVX2)
static inline int vdb_gate_avx2(const float *scores, const vdb_row_terms *rows, size_t count, float gamma, float delta,
                                float threshold, float *upper) {
  int any = 0;
  for (size_t i = 0; i < count; i += 8) {
    __m256 first = vdb_first_avx2(count - i);
    __m256i mask = _mm256_castps_si256(first);
    __m256 sum = _mm256_loadu_ps(rows->beta + i);
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(rows->rho + i), _mm256_set1_ps(gamma), sum);
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(rows->residual + i), _mm256_set1_ps(delta), sum);
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(rows->alpha + i), _mm256_maskload_ps(scores + i, mask), sum);
    __m256 not_below = _mm256_cmp_ps(sum, _mm256_set1_ps(threshold), _CMP_NLT_UQ);
    _mm256_maskstore_ps(upper + i, mask, sum);
    any |= _mm256_movemask_ps(_mm256_and_ps(not_below, first));
  }
  return any;
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_decode_as_avx2(vdb_element element, const void *row, float scale,
                                                        size_t dimensions, float *out) {
  size_t j = 0;
  for (; j + 8 <= dimensions; j += 8) {
    __m256 x = vdb_load_avx2(element, row, j);
    _mm256_storeu_ps(out + j, element == VDB_I8 ? _mm256_mul_ps(x, _mm256_set1_ps(scale)) : x);
  }
  for (; j < dimensions; j++) {
    float x = vdb_number_at(element, row, j);
    out[j] = element == VDB_I8 ? scale * x : x;
  }
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_decode_avx2(vdb_element element, const void *row, float scale, size_t dimensions, float *out) {
  if (element == VDB_F32) vdb_decode_as_avx2(VDB_F32, row, scale, dimensions, out);
  if (element == VDB_F16) vdb_decode_as_avx2(VDB_F16, row, scale, dimensions, out);
  if (element == VDB_BF16) vdb_decode_as_avx2(VDB_BF16, row, scale, dimensions, out);
  if (element == VDB_I8) vdb_decode_as_avx2(VDB_I8, row, scale, dimensions, out);
}

/* Lanes 4 v to 4 v + 3 are in vector v. */
VDB_INLINE VDB_TARGET(VDB_AVX2) double vdb_fold_f64_avx2(const __m256d *v) {
  __m256d low = _mm256_add_pd(v[0], v[2]), high = _mm256_add_pd(v[1], v[3]);
  __asm__("" : "+x"(low), "+x"(high)); /* against -ffast-math, as in vdb_keep_order */
  __m256d four = _mm256_add_pd(low, high);
  __asm__("" : "+x"(four));
  __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  __asm__("" : "+x"(two));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

/* A quarter of a step of exact: 4 of the 16 lanes. */
VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_exact_step_avx2(__m128 q, __m128 x, int squares, __m256d *products,
                                                         __m256d *norms) {
  __m256d wide = _mm256_cvtps_pd(x), factor = _mm256_cvtps_pd(q);
  if (squares) {
    factor = _mm256_sub_pd(factor, wide);
    __m256d square = _mm256_mul_pd(factor, factor);
    VDB_ROUNDED(square);
    *products = _mm256_add_pd(square, *products);
    VDB_ROUNDED(*products); /* the fold adds in its own order */
  } else {
    *products = _mm256_fmadd_pd(factor, wide, *products);
    *norms = _mm256_fmadd_pd(wide, wide, *norms);
  }
}

VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_exact_as_avx2(const float *query, const float *row, size_t dimensions,
                                                       int squares, double sums[2]) {
  __m256d products[4], norms[4];
  size_t j = 0;
  VDB_UNROLL for (int v = 0; v < 4; v++) products[v] = norms[v] = _mm256_setzero_pd();
  for (; j + 16 <= dimensions; j += 16) {
    VDB_UNROLL for (int v = 0; v < 4; v++)
      vdb_exact_step_avx2(_mm_loadu_ps(query + j + 4 * v), _mm_loadu_ps(row + j + 4 * v), squares, &products[v],
                          &norms[v]);
  }
  VDB_UNROLL for (int v = 0; v < 4; v++) {
    size_t at = j + 4 * (size_t)v, left = dimensions > at ? dimensions - at : 0;
    __m128i rest = _mm256_castsi256_si128(_mm256_castps_si256(vdb_first_avx2(left)));
    if (left)
      vdb_exact_step_avx2(_mm_maskload_ps(query + at, rest), _mm_maskload_ps(row + at, rest), squares, &products[v],
                          &norms[v]);
  }
  sums[0] = vdb_fold_f64_avx2(products);
  sums[1] = vdb_fold_f64_avx2(norms);
}

VDB_TARGET(VDB_AVX2)
static inline void vdb_exact_avx2(const float *query, const float *row, size_t dimensions, int squares,
                                  double sums[2]) {
  if (squares) {
    vdb_exact_as_avx2(query, row, dimensions, 1, sums);
  } else {
    vdb_exact_as_avx2(query, row, dimensions, 0, sums);
  }
}

/* Scores of rows first to first + 3, clipped to `count`, with 16 queries. */
VDB_INLINE VDB_TARGET(VDB_AVX2) void vdb_tile_block_avx2(const float *queries, const float *rows, size_t first,
                                                         size_t count, size_t dimensions, float *scores, size_t width) {
  const float *row[4];
  __m256 sums[4][2];
  VDB_UNROLL for (int r = 0; r < 4; r++) {
    row[r] = rows + vdb_min(first + (size_t)r, count - 1) * dimensions;
    sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  }
  for (size_t j = 0; j < dimensions; j++) {
    __m256 left = _mm256_loadu_ps(queries + j * 16), right = _mm256_loadu_ps(queries + j * 16 + 8);
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      __m256 x = _mm256_set1_ps(row[r][j]);
      sums[r][0] = _mm256_fmadd_ps(x, left, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(x, right, sums[r][1]);
    }
  }
  VDB_UNROLL for (int r = 0; r < 4; r++) {
    if (first + (size_t)r >= count) break;
    _mm256_storeu_ps(scores + (first + (size_t)r) * width, sums[r][0]);
    _mm256_storeu_ps(scores + (first + (size_t)r) * width + 8, sums[r][1]);
  }
}

/* Codes are decoded too: products of bytes would take as many instructions here as those of floats. */
VDB_TARGET(VDB_AVX2)
static inline void vdb_tile_avx2(vdb_element element, const vdb_panel *panel, const void *rows, size_t count,
                                 size_t dimensions, float *scores, void *scratch) {
  float *floats = (float *)scratch;
  vdb_decode_avx2(element, rows, 1.0f, count * dimensions, floats);
  for (size_t q = 0; q < panel->width; q += 16)
    for (size_t r = 0; r < count; r += 4)
      vdb_tile_block_avx2((const float *)panel->data + q * dimensions, floats, r, count, dimensions, scores + q,
                          panel->width);
}

static inline const vdb_kernel_set *vdb_avx2_set(void) {
  static const vdb_kernel_set set = {
      "avx2",
      {vdb_dots_f32_avx2, vdb_dots_f16_avx2, vdb_dots_bf16_avx2},
      {vdb_squares_f32_avx2, vdb_squares_f16_avx2, vdb_squares_bf16_avx2},
      vdb_dots_i8_avx2,
      vdb_gate_avx2,
      vdb_panel_bytes_floats,
      vdb_pack_floats,
      vdb_tile_avx2,
      vdb_gate_tile_avx2,
      vdb_exact_avx2,
      vdb_decode_avx2,
      vdb_crc32c_instruction,
      vdb_between_plain,
      vdb_count_instruction,
  };
  return &set;
}

/* --- what this machine has ---
 *
 * The processor's word is not enough: the operating system must save the registers too. */
enum { VDB_HAS_AVX2 = 1, VDB_HAS_AVX512 = 2, VDB_HAS_AMX = 4 };

static inline unsigned vdb_features(void) {
  unsigned a, b, c, d, b7 = 0, c7 = 0, d7 = 0, saved, high, bf16 = 0, features = 0;
  const unsigned fma = 1u << 12, sse42 = 1u << 20, popcnt = 1u << 23, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  const unsigned wanted = fma | sse42 | popcnt | osxsave | avx | f16c;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
  if (a >= 1) {
    __get_cpuid_count(7, 1, &bf16, &b, &c, &d);
    bf16 &= 1u << 5;
  }
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & 0x6u) != 0x6u || !(b7 & 1u << 5)) return 0;
  features = VDB_HAS_AVX2;
  const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;
  if ((saved & 0xe6u) != 0xe6u || (b7 & f_dq_bw_vl) != f_dq_bw_vl || !(c7 & vnni)) return features;
  features |= VDB_HAS_AVX512;
  const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25; /* bf16, tile, int8 */
  if ((saved & 0x60000u) != 0x60000u || (d7 & amx) != amx || !bf16) return features;
#ifdef __linux__
  if (vdb_sys_syscall(158, 0x1023, 18) == 0) features |= VDB_HAS_AMX; /* arch_prctl: may this process use the tiles' data? */
#endif
  return features;
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif /* VDB_X86 */

#ifdef VDB_ARM
/* --- neon ---
 *
 * The plain set, which is NEON here, with codes and checksums by instruction where the compiler was told of it. */
VDB_INLINE int32x4_t vdb_step_i8_neon(int32x4_t sum, int8x16_t a, int8x16_t b) {
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(sum, a, b);
#else
  int16x8_t pairs = vmull_s8(vget_low_s8(a), vget_low_s8(b)); /* 2 * 127^2 is below 2^15 */
  return vpadalq_s16(sum, vmlal_s8(pairs, vget_high_s8(a), vget_high_s8(b)));
#endif
}

static inline void vdb_dots_i8_neon(const vdb_probe *query, const void *const *rows, size_t count, size_t dimensions,
                                    float *out) {
  for (size_t i = 0; i < count; i += 4) {
    const int8_t *row[4];
    int32x4_t high[4], low[4];
    VDB_UNROLL for (int r = 0; r < 4; r++) {
      row[r] = (const int8_t *)rows[vdb_min(i + (size_t)r, count - 1)];
      high[r] = low[r] = vdupq_n_s32(0);
    }
    for (size_t j = 0; j < dimensions; j += 16) {
      int8x16_t q_high = vld1q_s8(query->high + j), q_low = vld1q_s8(query->low + j);
      VDB_UNROLL for (int r = 0; r < 4; r++) {
        int8x16_t x = vld1q_s8(row[r] + j); /* past the row it meets a zero */
        high[r] = vdb_step_i8_neon(high[r], x, q_high);
        low[r] = vdb_step_i8_neon(low[r], x, q_low);
      }
    }
    for (size_t r = 0; r < 4 && i + r < count; r++)
      out[i + r] = query->high_scale * (float)vaddvq_s32(high[r]) + query->low_scale * (float)vaddvq_s32(low[r]);
  }
}

static inline const vdb_kernel_set *vdb_neon_set(void) {
  static const vdb_kernel_set set = {
      "neon",
      {vdb_dots_f32_plain, vdb_dots_f16_plain, vdb_dots_bf16_plain},
      {vdb_squares_f32_plain, vdb_squares_f16_plain, vdb_squares_bf16_plain},
      vdb_dots_i8_neon,
      vdb_gate_plain,
      vdb_panel_bytes_floats,
      vdb_pack_floats,
      vdb_tile_plain,
      vdb_gate_tile_plain,
      vdb_exact_plain,
      vdb_decode_plain,
#ifdef VDB_CRC_TARGET
      vdb_crc32c_instruction,
#else
      vdb_crc32c_plain,
#endif
      vdb_between_plain,
      vdb_count_plain,
  };
  return &set;
}
#endif /* VDB_ARM */

/* --- the choice --- */

/* Null if this machine, or this compilation, has no such set. */
static inline const vdb_kernel_set *vdb_kernels_named(const char *name) {
#if defined(VDB_X86)
  unsigned features = vdb_features();
  if (!strcmp(name, "amx")) return features & VDB_HAS_AMX ? vdb_amx_set() : NULL;
  if (!strcmp(name, "avx512")) return features & VDB_HAS_AVX512 ? vdb_avx512_set() : NULL;
  if (!strcmp(name, "avx2")) return features & VDB_HAS_AVX2 ? vdb_avx2_set() : NULL;
#elif defined(VDB_ARM)
  if (!strcmp(name, "neon")) return vdb_neon_set();
#endif
  return !strcmp(name, "plain") ? vdb_plain_set() : NULL;
}

static inline const vdb_kernel_set *vdb_best_kernels(void) {
  static const char *const best_first[] = {"amx", "avx512", "avx2", "neon", "plain"};
  const vdb_kernel_set *set = NULL;
  for (int i = 0; !set; i++) set = vdb_kernels_named(best_first[i]);
  return set;
}

/* The one variable of the program: the set in use, or null before the first use. */
static inline const vdb_kernel_set **vdb_chosen(void) {
  static const vdb_kernel_set *chosen;
  return &chosen;
}

static inline void vdb_choose(const vdb_kernel_set *set) { __atomic_store_n(vdb_chosen(), set, __ATOMIC_RELEASE); }

/* Threads that come here first together find the same. */
static inline const vdb_kernel_set *vdb_active(void) {
  const vdb_kernel_set *set = __atomic_load_n(vdb_chosen(), __ATOMIC_ACQUIRE);
  if (!set) {
    set = vdb_best_kernels();
    vdb_choose(set);
  }
  return set;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 5 Threads
 *
 * The lock lets many readers in or one writer; a waiting writer goes before new readers. It is made of mutexes and
 * conditions, since -std=c11 hides pthread_rwlock_t, and so that a writer at work for long can let readers in between
 * its steps. Without VDB_MULTITHREADED all of this is empty.
 *
 * The pool runs `tasks` calls of one function on its workers and on the caller. It is made at the first call that wants
 * it and serves one job at a time: who finds it busy works alone, since the cores are busy too. After a fork() the
 * first thread of the child that wants it makes it anew; the others wait for that.
 */
typedef void (*vdb_task)(void *context, size_t task);

#ifdef VDB_MULTITHREADED
typedef struct {
  pthread_mutex_t writer; /* held through a whole writing call */
  pthread_mutex_t mutex;  /* guards what follows, for a moment at a time */
  pthread_cond_t readable, writable;
  size_t readers;
  int writing; /* readers stay out */
} vdb_lock;

typedef struct {
  pthread_mutex_t mutex;
  pthread_cond_t work, done;
  pthread_t *threads;
  size_t thread_count;
  long process; /* whose threads these are; -p while a thread of process p, after a fork, makes the pool its own */
  int busy, stopping;
  vdb_task run;
  void *context;
  size_t tasks, next, unfinished; /* next is taken under the mutex: tasks are large */
} vdb_pool;
#else
typedef struct {
  char unused;
} vdb_lock;
typedef struct {
  char unused;
} vdb_pool;
#endif

#ifdef VDB_MULTITHREADED

static inline int vdb_lock_make(vdb_lock *lock) {
  memset(lock, 0, sizeof *lock);
  if (pthread_mutex_init(&lock->writer, NULL)) return 0;
  if (pthread_mutex_init(&lock->mutex, NULL)) {
    pthread_mutex_destroy(&lock->writer);
    return 0;
  }
  pthread_cond_init(&lock->readable, NULL);
  pthread_cond_init(&lock->writable, NULL);
  return 1;
}

static inline void vdb_lock_destroy(vdb_lock *lock) {
  pthread_cond_destroy(&lock->readable);
  pthread_cond_destroy(&lock->writable);
  pthread_mutex_destroy(&lock->mutex);
  pthread_mutex_destroy(&lock->writer);
}

static inline void vdb_enter_read(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  while (lock->writing) pthread_cond_wait(&lock->readable, &lock->mutex);
  lock->readers++;
  pthread_mutex_unlock(&lock->mutex);
}

static inline void vdb_leave_read(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  if (--lock->readers == 0 && lock->writing) pthread_cond_signal(&lock->writable);
  pthread_mutex_unlock(&lock->mutex);
}

/* For the writer: no new readers from here, and none left on return. */
static inline void vdb_keep_readers_out(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  lock->writing = 1;
  while (lock->readers) pthread_cond_wait(&lock->writable, &lock->mutex);
  pthread_mutex_unlock(&lock->mutex);
}

/* For the writer: readers may read what is there; other writers still wait. */
static inline void vdb_let_readers_in(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  lock->writing = 0;
  pthread_cond_broadcast(&lock->readable);
  pthread_mutex_unlock(&lock->mutex);
}

static inline void vdb_enter_write(vdb_lock *lock) {
  pthread_mutex_lock(&lock->writer);
  vdb_keep_readers_out(lock);
}

/* For a reader that must not see a writer's work half done. */
static inline void vdb_enter_still(vdb_lock *lock) {
  pthread_mutex_lock(&lock->writer);
  vdb_enter_read(lock);
}

static inline void vdb_leave_still(vdb_lock *lock) {
  vdb_leave_read(lock);
  pthread_mutex_unlock(&lock->writer);
}

static inline void vdb_leave_write(vdb_lock *lock) {
  vdb_let_readers_in(lock);
  pthread_mutex_unlock(&lock->writer);
}

/* Takes tasks until there are none. Called and left with the mutex held. */
static inline void vdb_pool_work(vdb_pool *pool) {
  while (pool->next < pool->tasks) {
    size_t task = pool->next++;
    vdb_task run = pool->run;
    void *context = pool->context;
    pthread_mutex_unlock(&pool->mutex);
    run(context, task);
    pthread_mutex_lock(&pool->mutex);
    if (--pool->unfinished == 0) pthread_cond_signal(&pool->done);
  }
}

static inline void *vdb_pool_worker(void *argument) {
  vdb_pool *pool = (vdb_pool *)argument;
  pthread_mutex_lock(&pool->mutex);
  while (!pool->stopping) {
    vdb_pool_work(pool);
    if (!pool->stopping) pthread_cond_wait(&pool->work, &pool->mutex);
  }
  pthread_mutex_unlock(&pool->mutex);
  return NULL;
}

VDB_LIGHT void vdb_pool_reset(vdb_pool *pool) {
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->work, NULL);
  pthread_cond_init(&pool->done, NULL);
  pool->threads = NULL;
  pool->thread_count = 0;
  pool->busy = pool->stopping = 0;
  pool->tasks = pool->next = pool->unfinished = 0;
  __atomic_store_n(&pool->process, (long)vdb_sys_getpid(), __ATOMIC_RELEASE);
}

/* In a child of fork() the pool is the parent's, whose threads are not here and whose mutex may be locked. One thread
 * makes it anew. A child that is forked meanwhile finds the number of another process, and begins again. */
VDB_LIGHT void vdb_pool_adopt(vdb_pool *pool) {
  long process = (long)vdb_sys_getpid(), found = __atomic_load_n(&pool->process, __ATOMIC_ACQUIRE);
  while (found != process) {
    if (found == -process) {
      sched_yield();
      found = __atomic_load_n(&pool->process, __ATOMIC_ACQUIRE);
    } else if (__atomic_compare_exchange_n(&pool->process, &found, -process, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
      VDB_FREE(pool->threads);
      vdb_pool_reset(pool);
      return;
    }
  }
}

/* Joins the workers; those of a parent process are not ours to join. */
VDB_LIGHT void vdb_pool_stop(vdb_pool *pool) {
  if (pool->process == (long)vdb_sys_getpid()) {
    pthread_mutex_lock(&pool->mutex);
    pool->stopping = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (size_t i = 0; i < pool->thread_count; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
  }
  VDB_FREE(pool->threads);
  pool->threads = NULL;
}

/* Starts the workers. Fewer than wanted, or none, is no failure: the caller works too. */
VDB_LIGHT void vdb_pool_start(vdb_pool *pool, size_t workers) {
  pool->threads = (pthread_t *)VDB_MALLOC(workers * sizeof(pthread_t));
  if (!pool->threads) return;
  while (pool->thread_count < workers &&
         pthread_create(&pool->threads[pool->thread_count], NULL, vdb_pool_worker, pool) == 0)
    pool->thread_count++;
}

/* 1 if the job was done by the pool, 0 if the pool was busy and nothing was done. */
VDB_ONCE int vdb_pool_run(vdb_pool *pool, size_t workers, size_t tasks, vdb_task run, void *context) {
  vdb_pool_adopt(pool);
  pthread_mutex_lock(&pool->mutex);
  if (pool->busy) {
    pthread_mutex_unlock(&pool->mutex);
    return 0;
  }
  pool->busy = 1;
  if (!pool->threads) vdb_pool_start(pool, workers);
  pool->run = run;
  pool->context = context;
  pool->next = 0;
  pool->tasks = pool->unfinished = tasks;
  pthread_cond_broadcast(&pool->work);
  vdb_pool_work(pool);
  while (pool->unfinished) pthread_cond_wait(&pool->done, &pool->mutex);
  pool->tasks = pool->next = 0;
  pool->busy = 0;
  pthread_mutex_unlock(&pool->mutex);
  return 1;
}

VDB_ONCE size_t vdb_cores(void) {
  long cores = vdb_sys_get_nprocs();
  return cores < 1 ? 1 : cores > 256 ? 256 : (size_t)cores;
}

#else

static inline int vdb_lock_make(vdb_lock *lock) { return (lock->unused = 0) == 0; }
static inline void vdb_lock_destroy(vdb_lock *lock) { (void)lock; }
static inline void vdb_enter_read(vdb_lock *lock) { (void)lock; }
static inline void vdb_leave_read(vdb_lock *lock) { (void)lock; }
static inline void vdb_keep_readers_out(vdb_lock *lock) { (void)lock; }
static inline void vdb_let_readers_in(vdb_lock *lock) { (void)lock; }
static inline void vdb_enter_write(vdb_lock *lock) { (void)lock; }
static inline void vdb_leave_write(vdb_lock *lock) { (void)lock; }
static inline void vdb_enter_still(vdb_lock *lock) { (void)lock; }
static inline void vdb_leave_still(vdb_lock *lock) { (void)lock; }
VDB_LIGHT void vdb_pool_reset(vdb_pool *pool) { pool->unused = 0; }
VDB_LIGHT void vdb_pool_stop(vdb_pool *pool) { (void)pool; }
VDB_ONCE size_t vdb_cores(void) { return 1; }

VDB_ONCE int vdb_pool_run(vdb_pool *pool, size_t workers, size_t tasks, vdb_task run, void *context) {
  (void)pool, (void)workers;
  for (size_t task = 0; task < tasks; task++) run(context, task);
  return 1;
}

#endif

/* Who may stop a long call; see vdb_add_watched and vdb_open_watched. */
typedef struct {
  int (*go_on)(size_t done, size_t count, void *context);
  void *context;
#ifdef VDB_MULTITHREADED
  pthread_t caller;
#endif
  int stopped; /* written by the caller's thread; read and written atomically */
} vdb_watch;

static inline void vdb_watch_make(vdb_watch *watch, int (*go_on)(size_t, size_t, void *), void *context) {
  memset(watch, 0, sizeof *watch);
  watch->go_on = go_on;
  watch->context = context;
#ifdef VDB_MULTITHREADED
  watch->caller = pthread_self();
#endif
}

/* Whether the call was stopped; on the caller's thread, asks. */
VDB_ONCE int vdb_watch_stops(vdb_watch *watch, size_t done, size_t count) {
  if (__atomic_load_n(&watch->stopped, __ATOMIC_RELAXED)) return 1;
#ifdef VDB_MULTITHREADED
  if (!pthread_equal(watch->caller, pthread_self())) return 0;
#endif
  if (watch->go_on(done, count, watch->context)) return 0;
  __atomic_store_n(&watch->stopped, 1, __ATOMIC_RELAXED);
  return 1;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 6 Rows
 *
 * Rows live in blocks that never move: index i is row i % block_rows of block i / block_rows. Blocks made at once share
 * an allocation; those of a mapped file point into it. A removed row keeps its place until it is used again (flat: at
 * once; HNSW: after a sweep); `live` says which indices are rows.
 */
#define VDB_NO_ROW 0xffffffffu
#define VDB_SMALL 8.67361737988403547e-19 /* 2^-60 */
#define VDB_GREAT 1.15292150460684698e18  /* 2^60 */

typedef struct {
  unsigned char *vectors; /* [block_rows][dimensions] elements */
  int8_t *codes;          /* [block_rows][dimensions]; I8: the vectors themselves; otherwise NULL but for F32_I8 */
  float *norms;           /* [block_rows] the norm; -1 where it is outside 2^-60..2^60 and not 0, or not known */
  float *scales;          /* [block_rows] of the codes; NULL without codes */
  float *residuals;       /* [block_rows] at least |vector - scale * codes|; NULL unless F32_I8 */
  uint32_t *links;        /* HNSW: [block_rows][1 + 2 * options.links]: how many, then neighbours on the lowest level */
  void *memory;           /* the allocation that begins here, NULL if the block lies inside another's or in a file */
  size_t bytes;           /* of memory */
  void *spilled;          /* the same of vectors that are kept on disk: what is mapped from here on */
  size_t spilled_bytes;
  size_t place;           /* of such vectors in their file */
} vdb_block;

/* Of the levels above the lowest: tower_of[i] is where row i's begin in `towers` (0: none): the number of levels, then
 * for each level, from 1 up, how many links and options.links places. */
typedef struct {
  uint32_t entry; /* where searches begin; VDB_NO_ROW when there is none */
  uint32_t top;   /* the entry's level */
  uint32_t *tower_of;
  uint32_t *towers;
  size_t towers_size, towers_capacity; /* in uint32_t; place 0 is not used */
  struct vdb_workshop *workshop;       /* what walks and insertion need; NULL until the first of them */
} vdb_graph;

/* Ids and metadata: per row one record, { u32 id bytes, u32 metadata bytes, id, NUL, metadata }, 8-byte aligned. Each
 * is an allocation of its own, so that what a removed or replaced row had is given back at once, and nobody else's id
 * moves; those that a file brought lie together in its text, which goes when most of it is dead. The id table is open
 * addressing by vdb_hash over rows with an id. */
typedef struct {
  uint32_t users; /* the database, while a row has it, and result sets; counted atomically */
  uint32_t unused;
} vdb_record_head; /* before a record; one of a file has none */

typedef struct {
  size_t size, dead, moved; /* bytes; dead: of removed rows; moved: below this row no record is in here any more */
  uint32_t users;           /* the database and result sets; counted atomically */
  uint32_t unused;
} vdb_loaded; /* the text of a file that was read follows */

typedef struct {
  unsigned char **records; /* [row capacity]; NULL while no row has an id or metadata, and in a mapped database */
  void **borrowed;         /* [row capacity] of vdb_add_vector's metadata; NULL while none was given */
  vdb_loaded *loaded;      /* NULL if no file was read, or all of its records are gone */
  size_t bytes;            /* of records that are not in it */
  int lent;                /* an id was pointed at (vdb_get_vector): loaded ones stay where they are; set atomically */
  uint32_t *table;         /* [table_size], a power of two; VDB_NO_ROW: empty, VDB_GONE: removed */
  size_t table_size, table_used;
} vdb_records;

#define VDB_GONE 0xfffffffeu
#define VDB_MAX_ROWS 0xfffffffeu

/* An id that a mapped file's journal brought. */
typedef struct {
  uint64_t hash;
  size_t row;
} vdb_journal_id;

/* What a mapped file gives instead of vdb_records.records; offsets are checked whenever they are used. What its journal
 * says of a row's record lies beside it; the rest of the journal is written over private copies of the file's pages. */
typedef struct {
  unsigned char *base;
  size_t size;
  size_t slots;              /* of the file without its journal */
  unsigned char *arrays[6];  /* of these rows, in the order of vdb_block; NULL for those that there are not */
  size_t row_bytes[6];
  const uint64_t *offsets;   /* [slots] 1 + place in `text`, 0 for none; NULL without records */
  const unsigned char *text;
  size_t text_size;
  unsigned char ***records;  /* [pages] of [VDB_RECORD_PAGE]: the record, VDB_NO_RECORD, or NULL: as in the file. A page
                                may be NULL: all of it is as in the file */
  size_t pages;              /* 0 without a journal */
  vdb_journal_id *ids;       /* [id_count] of these records, by hash */
  size_t id_count;
  uint64_t *own;             /* [slots / 64, rounded up] bits of rows that the journal has changed */
  int own_towers;            /* the graph's towers are copies */
} vdb_mapping;

#define VDB_MAPPED_ARRAYS 6 /* arrays of a block */
#define VDB_RECORD_PAGE 1024u
#define VDB_NO_RECORD ((unsigned char *)(uintptr_t)1)

/* Which file a database is: its length and the checksum of its first bytes, which hold the checksums of the rest; and
 * the same of its journal. */
typedef struct {
  uint64_t size, base; /* with and without the journal; size 0: none */
  uint32_t crc, chain; /* of the header; of the journal's last end mark, or the header's again */
} vdb_identity;

/* What has changed since the file was read or written. */
typedef struct {
  uint64_t *whole, *part; /* [words] bits of rows: all of it; whether it is there, and its links */
  size_t words;           /* 0 for a database without a file */
  size_t free_kept;       /* the first free_rows that are as they were */
  int unknown;            /* not all changes are noted: a whole file must be written; set atomically */
  int lent;               /* the same, for ever: a vector was lent, and who has it may write to it; set atomically */
} vdb_changes;

#define VDB_FAULT_BYTES ((size_t)1 << 18) /* that one read of a mapped row may bring in: Linux maps what is around it, too */

/* What lies on disk, and how much of it may be in memory. */
typedef struct {
  size_t limit, touched; /* bytes that may come in before all is given back, 0 for any; that may have come in: atomically */
  int scans;             /* what scans and walks read counts, too */
  int on_disk;           /* vectors are kept in `file` */
  int has_file, file;    /* that, or the mapped file, open */
  size_t size;           /* of the file that vectors are kept in */
} vdb_paging;

#define VDB_KEPT_FILTERS 8

/* What a condition that was asked for was made into, until a record changes. */
typedef struct {
  unsigned char *key; /* [key_size] the condition, written out; NULL for none */
  size_t key_size;
  struct vdb_passing *passing; /* NULL if rows were asked one by one */
  size_t words;                /* of its bitset */
  uint64_t asked; /* when last */
} vdb_kept_filter;

/* Columns of values, read by searches. */
typedef struct {
  vdb_kept_filter kept[VDB_KEPT_FILTERS];
  uint64_t searches;
  struct vdb_column *columns; /* [count] */
  size_t count, capacity;
  uint64_t *touched; /* [rows / 64] rows whose record has changed since they were read */
  size_t rows;       /* columns know of the rows below */
  int any_touched;
  size_t lent; /* searches that read columns without the mutex: none may be forgotten */
#ifdef VDB_MULTITHREADED
  pthread_mutex_t mutex; /* of who reads and makes them, under a reader's lock */
#endif
} vdb_columns;

struct vdb_database {
  size_t dimensions, count;
  vdb_metric metric;
  vdb_options options;
  size_t threads;       /* options.threads, or the number of cores */
  size_t slots;         /* rows that were ever placed: every index is below */
  size_t state;         /* grows whenever rows come, go, or may have other vectors; atomically */
  size_t capacity;      /* rows that blocks and the arrays per row have room for */
  unsigned block_shift; /* block_rows = 1 << block_shift */
  vdb_block *blocks;
  size_t block_count, block_capacity;
  uint64_t *live;       /* [capacity / 64] */
  uint32_t *free_rows;  /* [free_count] indices ready to be used again, the last one first */
  size_t free_count, free_capacity;
  vdb_graph graph;
  vdb_records records;
  vdb_columns columns;
  vdb_mapping mapping;
  vdb_paging paging;
  int read_only;         /* a view of a mapped file */
  vdb_identity identity; /* of the file that was read or written last; written under the writer's mutex */
  vdb_changes changes;
  vdb_lock lock;
  vdb_pool *pool;
};

VDB_INLINE size_t vdb_element_size(vdb_storage storage) {
  return storage == VDB_STORAGE_I8 ? 1 : storage == VDB_STORAGE_F16 || storage == VDB_STORAGE_BF16 ? 2 : 4;
}
VDB_INLINE vdb_element vdb_element_of(vdb_storage storage) {
  return storage == VDB_STORAGE_F32_I8 ? VDB_F32 : (vdb_element)storage;
}
VDB_INLINE size_t vdb_block_rows(const vdb_database *db) { return (size_t)1 << db->block_shift; }
VDB_INLINE const vdb_block *vdb_block_of(const vdb_database *db, size_t row) {
  return &db->blocks[row >> db->block_shift];
}
VDB_INLINE size_t vdb_row_in_block(const vdb_database *db, size_t row) { return row & (vdb_block_rows(db) - 1); }
VDB_INLINE const void *vdb_vector_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->vectors +
         vdb_row_in_block(db, row) * db->dimensions * vdb_element_size(db->options.storage);
}
VDB_INLINE const int8_t *vdb_codes_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->codes + vdb_row_in_block(db, row) * db->dimensions;
}
VDB_INLINE float vdb_norm_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->norms[vdb_row_in_block(db, row)];
}
VDB_INLINE float vdb_scale_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->scales[vdb_row_in_block(db, row)];
}
VDB_INLINE size_t vdb_link_stride(const vdb_database *db) { return 1 + 2 * (size_t)db->options.links; }
VDB_INLINE uint32_t *vdb_links_at(const vdb_database *db, size_t row) {
  return vdb_block_of(db, row)->links + vdb_row_in_block(db, row) * vdb_link_stride(db);
}
VDB_INLINE int vdb_is_live(const vdb_database *db, size_t row) {
  return (int)(db->live[row >> 6] >> (row & 63) & 1u);
}

/* --- sizes of a block --- */
typedef struct {
  size_t vectors, codes, norms, scales, residuals, links, total; /* where each array begins, in bytes */
} vdb_block_layout;

VDB_INLINE int vdb_has_codes(vdb_storage storage) {
  return storage == VDB_STORAGE_I8 || storage == VDB_STORAGE_F32_I8;
}

/* Bytes of a block's vectors, and what scans may read behind them. */
VDB_RARE size_t vdb_vectors_of_block(const vdb_database *db) {
  return vdb_block_rows(db) * db->dimensions * vdb_element_size(db->options.storage) + VDB_ALIGNMENT;
}

VDB_RARE vdb_block_layout vdb_layout_of(const vdb_database *db) {
  size_t rows = vdb_block_rows(db), place = 0;
  vdb_block_layout layout;
  memset(&layout, 0, sizeof layout);
  layout.vectors = place;
  if (!db->paging.on_disk) place += vdb_round_up(vdb_vectors_of_block(db), VDB_ALIGNMENT);
  layout.codes = place;
  if (db->options.storage == VDB_STORAGE_F32_I8)
    place += vdb_round_up(rows * db->dimensions + VDB_ALIGNMENT, VDB_ALIGNMENT);
  layout.norms = place;
  place += rows * sizeof(float);
  layout.scales = place;
  if (vdb_has_codes(db->options.storage)) place += rows * sizeof(float);
  layout.residuals = place;
  if (db->options.storage == VDB_STORAGE_F32_I8) place += rows * sizeof(float);
  layout.links = place;
  if (db->options.index == VDB_INDEX_HNSW) place += rows * vdb_link_stride(db) * sizeof(uint32_t);
  layout.total = vdb_round_up(place, VDB_ALIGNMENT);
  return layout;
}

VDB_ONCE void vdb_point_block(const vdb_database *db, const vdb_block_layout *layout, unsigned char *base,
                              unsigned char *vectors, vdb_block *block) {
  block->vectors = vectors ? vectors : base + layout->vectors;
  block->codes = db->options.storage == VDB_STORAGE_F32_I8 ? (int8_t *)(base + layout->codes)
                 : db->options.storage == VDB_STORAGE_I8   ? (int8_t *)block->vectors
                                                           : NULL;
  block->norms = (float *)(void *)(base + layout->norms);
  block->scales = vdb_has_codes(db->options.storage) ? (float *)(void *)(base + layout->scales) : NULL;
  block->residuals = db->options.storage == VDB_STORAGE_F32_I8 ? (float *)(void *)(base + layout->residuals) : NULL;
  block->links = db->options.index == VDB_INDEX_HNSW ? (uint32_t *)(void *)(base + layout->links) : NULL;
}

/* Scans read up to VDB_ALIGNMENT bytes past a row; after the last one there must be finite numbers, too. */
static inline void vdb_clear_after(vdb_database *db, size_t row) {
  vdb_block *block = &db->blocks[row >> db->block_shift];
  size_t end = (vdb_row_in_block(db, row) + 1) * db->dimensions;
  memset(block->vectors + end * vdb_element_size(db->options.storage), 0, VDB_ALIGNMENT);
  if (db->options.storage == VDB_STORAGE_F32_I8) memset(block->codes + end, 0, VDB_ALIGNMENT);
}

/* --- room --- */
VDB_RARE vdb_error vdb_graph_make_room(vdb_database *db, size_t rows);
static inline vdb_error vdb_graph_removed(vdb_database *db, size_t row);
VDB_RARE void vdb_graph_release(vdb_database *db);
VDB_RARE size_t vdb_graph_bytes(const vdb_database *db);
VDB_RARE void vdb_changes_make_room(vdb_database *db);
VDB_RARE void *vdb_spill(vdb_paging *paging, size_t bytes);
VDB_INLINE void vdb_touch(const vdb_database *db, size_t bytes);

/* `*array` with room for `count` items; the old content stays, what is new is zero. */
VDB_LIGHT int vdb_grow(void **array, size_t old_count, size_t count, size_t item) {
  if (count > SIZE_MAX / item) return 0;
#ifdef VDB_REALLOC
  unsigned char *grown = (unsigned char *)VDB_REALLOC(*array, count * item);
  if (!grown) return 0;
#else
  unsigned char *grown = (unsigned char *)VDB_MALLOC(count * item);
  if (!grown) return 0;
  if (old_count) memcpy(grown, *array, old_count * item);
  VDB_FREE(*array);
#endif
  memset(grown + old_count * item, 0, (count - old_count) * item);
  *array = grown;
  return 1;
}

#define VDB_SLAB_BYTES ((size_t)32 << 20) /* of blocks that are allocated together, at most */

VDB_LIGHT vdb_error vdb_make_blocks(vdb_database *db, size_t rows) {
  size_t blocks = (rows + vdb_block_rows(db) - 1) >> db->block_shift;
  if (blocks <= db->block_count) return VDB_OK;
  if (blocks > db->block_capacity) {
    size_t capacity = vdb_max(blocks, 2 * db->block_capacity);
    if (!vdb_grow((void **)&db->blocks, db->block_capacity, capacity, sizeof(vdb_block)))
      return VDB_ERROR_OUT_OF_MEMORY;
    db->block_capacity = capacity;
  }
  vdb_block_layout layout = vdb_layout_of(db);
  size_t apart = db->paging.on_disk ? vdb_round_up(vdb_vectors_of_block(db), 4096) : 0; /* whole pages */
  while (db->block_count < blocks) {
    size_t count = vdb_max(1, vdb_min(blocks - db->block_count, VDB_SLAB_BYTES / (layout.total + apart)));
    unsigned char *memory = (unsigned char *)vdb_aligned_alloc(count * layout.total);
    if (!memory) return VDB_ERROR_OUT_OF_MEMORY; /* the blocks made so far are kept for the next attempt */
    size_t place = db->paging.size;
    unsigned char *vectors = apart ? (unsigned char *)vdb_spill(&db->paging, count * apart) : NULL;
    if (apart && !vectors) return vdb_aligned_free(memory), VDB_ERROR_IO;
    vdb_advise_huge(memory, count * layout.total);
    for (size_t i = 0; i < count; i++) {
      vdb_block *block = &db->blocks[db->block_count++];
      block->memory = i ? NULL : memory;
      block->bytes = i ? 0 : count * layout.total;
      block->spilled = i ? NULL : vectors;
      block->spilled_bytes = i ? 0 : count * apart;
      block->place = place + i * apart;
      vdb_point_block(db, &layout, memory + i * layout.total, vectors ? vectors + i * apart : NULL, block);
      vdb_clear_after(db, (db->block_count << db->block_shift) - 1);
    }
  }
  return VDB_OK;
}

/* Room for indices below `rows`. */
VDB_RARE vdb_error vdb_make_room(vdb_database *db, size_t rows) {
  if (rows > VDB_MAX_ROWS) return VDB_ERROR_FULL;
  if (rows > db->capacity) {
    size_t old = db->capacity, capacity = vdb_round_up(vdb_max(rows, vdb_max(64, old + old / 2)), 64);
    if (!vdb_grow((void **)&db->live, old / 64, capacity / 64, sizeof(uint64_t)) ||
        (db->records.records &&
         !vdb_grow((void **)&db->records.records, old, capacity, sizeof(unsigned char *))) ||
        (db->records.borrowed && !vdb_grow((void **)&db->records.borrowed, old, capacity, sizeof(void *))))
      return VDB_ERROR_OUT_OF_MEMORY;
    db->capacity = capacity;
    vdb_changes_make_room(db);
  }
  vdb_error error = vdb_make_blocks(db, rows);
  if (!error && db->options.index == VDB_INDEX_HNSW) error = vdb_graph_make_room(db, rows);
  return error;
}

static inline size_t vdb_thread_count(const vdb_database *db) { return db->threads; }

/* Runs tasks 0 to tasks - 1, in any order and on any thread; all are done on return. */
VDB_ONCE void vdb_parallel(const vdb_database *db, size_t tasks, vdb_task run, void *context) {
  size_t threads = vdb_min(vdb_thread_count(db), tasks);
  if (threads > 1 && vdb_pool_run(db->pool, vdb_thread_count(db) - 1, tasks, run, context)) return;
  for (size_t task = 0; task < tasks; task++) run(context, task);
}

/* What was copied of rows is not what they are any more. */
static inline void vdb_rows_change(const vdb_database *db) {
  (void)__atomic_add_fetch(&((vdb_database *)(uintptr_t)db)->state, (size_t)1, __ATOMIC_RELAXED);
}

/* Rows that are stored and described can be found from here on. */
static inline void vdb_make_live(vdb_database *db, const uint32_t *rows, size_t count) {
  vdb_rows_change(db);
  for (size_t i = 0; i < count; i++) db->live[rows[i] >> 6] |= (uint64_t)1 << (rows[i] & 63);
  db->count += count;
}

/* A row's place may be used again. Where there is no memory to note that, it is lost until vdb_compact. */
VDB_LIGHT void vdb_free_row(vdb_database *db, size_t row) {
  if (db->free_count == db->free_capacity) {
    size_t capacity = vdb_max(64, 2 * db->free_capacity);
    if (!vdb_grow((void **)&db->free_rows, db->free_capacity, capacity, sizeof(uint32_t))) return;
    db->free_capacity = capacity;
  }
  db->free_rows[db->free_count++] = (uint32_t)row;
}

/* Noted by writers, for the next search that asks for values. */
static inline void vdb_columns_touch(vdb_columns *columns, size_t row) {
  if (row >= columns->rows) return;
  columns->touched[row >> 6] |= (uint64_t)1 << (row & 63);
  columns->any_touched = 1;
}

/* --- one row --- */
VDB_ONCE void vdb_store_vector(vdb_database *db, size_t row, const float *vector) {
  vdb_block *block = &db->blocks[row >> db->block_shift];
  size_t place = vdb_row_in_block(db, row), dimensions = db->dimensions;
  unsigned char *out = block->vectors + place * dimensions * vdb_element_size(db->options.storage);
  uint16_t *halves = (uint16_t *)(void *)out;
  vdb_touch(db, dimensions * vdb_element_size(db->options.storage));
  switch (db->options.storage) {
    case VDB_STORAGE_F32:
    case VDB_STORAGE_F32_I8: memcpy(out, vector, dimensions * sizeof(float)); break;
    case VDB_STORAGE_F16:
      for (size_t j = 0; j < dimensions; j++) halves[j] = vdb_to_f16(vector[j]);
      break;
    case VDB_STORAGE_BF16:
      for (size_t j = 0; j < dimensions; j++) halves[j] = vdb_to_bf16(vector[j]);
      break;
    case VDB_STORAGE_I8: block->scales[place] = vdb_to_i8(vector, dimensions, (int8_t *)out); break;
  }
}

VDB_ONCE void vdb_decode_row(const vdb_database *db, size_t row, float *out) {
  vdb_touch(db, VDB_FAULT_BYTES);
  float scale = db->options.storage == VDB_STORAGE_I8 ? vdb_scale_at(db, row) : 1.0f;
  vdb_active()->decode(vdb_element_of(db->options.storage), vdb_vector_at(db, row), scale, db->dimensions, out);
}

/* Norm, codes and what the codes miss, from the stored vector; `decoded` is room for one vector. */
VDB_ONCE void vdb_describe_row(vdb_database *db, size_t row, float *decoded) {
  vdb_block *block = &db->blocks[row >> db->block_shift];
  size_t place = vdb_row_in_block(db, row), dimensions = db->dimensions;
  const float *vector = (const float *)vdb_vector_at(db, row);
  if (vdb_element_of(db->options.storage) != VDB_F32) {
    vdb_decode_row(db, row, decoded);
    vector = decoded;
  }
  double sums[2];
  vdb_active()->exact(vector, vector, dimensions, 0, sums);
  double norm = sqrt(sums[1]);
  block->norms[place] = norm == 0.0 || (norm > VDB_SMALL && norm < VDB_GREAT) ? (float)norm : -1.0f;
  if (db->options.storage != VDB_STORAGE_F32_I8) return;
  int8_t *codes = block->codes + place * dimensions;
  float scale = block->scales[place] = vdb_to_i8(vector, dimensions, codes);
  double missed = 0.0;
  for (size_t j = 0; j < dimensions; j++) {
    double difference = (double)vector[j] - (double)scale * (double)codes[j];
    missed += difference * difference;
  }
  block->residuals[place] = block->norms[place] < 0.0f ? 0.0f : (float)(sqrt(missed) * 1.000001);
}

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

/* --- values: metadata with names ---
 *
 * One after the other, in the caller's order: u8 type, u8 bytes of the name, name, 0, then nothing (none), u8 (bool), i64
 * (int), f64 (float), or u32 bytes of the text, text, 0. A record that holds values instead of bytes says so in the
 * highest bit of its metadata's size.
 */
#define VDB_VALUES_BIT 0x80000000u

/* By its bits, so that it holds under -ffast-math too. */
VDB_INLINE int vdb_is_nan(double number) {
  uint64_t bits;
  memcpy(&bits, &number, 8);
  return bits << 1 > (uint64_t)0x7ff << 53;
}

/* The next value from `*place` on, which moves behind it. 0 at the end, and where the bytes make no sense. */
VDB_API int vdb_next_value(const void *values, size_t size, size_t *place, vdb_value *out) {
  const unsigned char *at = (const unsigned char *)values + *place;
  size_t left = *place < size ? size - *place : 0, bytes;
  if (left < 3 || left < (bytes = 3 + (size_t)at[1])) return 0;
  memset(out, 0, sizeof *out);
  out->type = (vdb_value_type)at[0];
  out->name = (const char *)at + 2;
  if (!at[1] || at[bytes - 1]) return 0;
  at += bytes;
  left -= bytes;
  *place += bytes;
  if (out->type == VDB_VALUE_NONE) return 1;
  if (out->type == VDB_VALUE_BOOL) {
    if (!left || *at > 1) return 0;
    out->integer = *at;
    *place += 1;
    return 1;
  }
  if (out->type == VDB_VALUE_INT || out->type == VDB_VALUE_FLOAT) {
    if (left < 8) return 0;
    memcpy(out->type == VDB_VALUE_INT ? (void *)&out->integer : (void *)&out->number, at, 8);
    *place += 8;
    return out->type == VDB_VALUE_INT || !vdb_is_nan(out->number);
  }
  uint32_t length;
  if (out->type != VDB_VALUE_TEXT || left < 5) return 0;
  memcpy(&length, at, 4);
  if (length > left - 5 || at[4 + (size_t)length]) return 0;
  out->text = (const char *)at + 4;
  out->text_size = length;
  *place += 5 + (size_t)length;
  return 1;
}

/* How many values there are, or -1 if the bytes are no values, or two have one name. */
VDB_LIGHT long vdb_count_values(const unsigned char *values, size_t size) {
  size_t place = 0, before;
  vdb_value value, other;
  long count = 0;
  while (place < size) {
    size_t from = place;
    if (!vdb_next_value(values, size, &place, &value) || strlen(value.name) != values[from + 1]) return -1;
    for (before = 0; before < from;)
      if (!vdb_next_value(values, size, &before, &other) || strcmp(other.name, value.name) == 0) return -1;
    count++;
  }
  return count;
}

/* Bytes that values take when they are kept; SIZE_MAX for such as cannot be. */
VDB_LIGHT size_t vdb_values_size(const vdb_value *values, size_t count) {
  size_t bytes = 0;
  if (!values && count) return SIZE_MAX;
  for (size_t i = 0; i < count; i++) {
    const vdb_value *value = &values[i];
    size_t name = value->name ? strlen(value->name) : 0;
    if (!name || name > 255) return SIZE_MAX;
    for (size_t j = 0; j < i; j++)
      if (strcmp(values[j].name, value->name) == 0) return SIZE_MAX;
    bytes += 3 + name;
    if (value->type == VDB_VALUE_BOOL) bytes += 1;
    else if (value->type == VDB_VALUE_INT || value->type == VDB_VALUE_FLOAT) bytes += 8;
    else if (value->type == VDB_VALUE_TEXT) bytes += 5;
    else if (value->type != VDB_VALUE_NONE) return SIZE_MAX;
    if (value->type == VDB_VALUE_FLOAT && vdb_is_nan(value->number)) return SIZE_MAX;
    if (value->type != VDB_VALUE_TEXT) continue;
    if (value->text_size > INT32_MAX || (value->text_size && !value->text)) return SIZE_MAX;
    bytes += value->text_size;
    if (bytes > INT32_MAX) return SIZE_MAX;
  }
  return bytes > INT32_MAX ? SIZE_MAX : bytes;
}

VDB_LIGHT void vdb_write_values(const vdb_value *values, size_t count, unsigned char *out) {
  for (size_t i = 0; i < count; i++) {
    const vdb_value *value = &values[i];
    size_t name = strlen(value->name);
    uint32_t length = (uint32_t)value->text_size;
    *out++ = (unsigned char)value->type;
    *out++ = (unsigned char)name;
    memcpy(out, value->name, name + 1);
    out += name + 1;
    if (value->type == VDB_VALUE_BOOL) *out++ = value->integer != 0;
    if (value->type == VDB_VALUE_INT) memcpy(out, &value->integer, 8), out += 8;
    if (value->type == VDB_VALUE_FLOAT) memcpy(out, &value->number, 8), out += 8;
    if (value->type != VDB_VALUE_TEXT) continue;
    memcpy(out, &length, 4);
    if (length) memcpy(out + 4, value->text, length);
    out[4 + (size_t)length] = 0;
    out += 5 + (size_t)length;
  }
}

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

/* --- rows that pass a condition ---
 *
 * What a condition was made into: a bitset, how many live rows that is, and, where they are few and it is asked for
 * again, a copy of all that a scan reads of them, in one piece: their own places are so far apart that a scan of 1% of the
 * rows waits for memory five times a row. It never changes; those who search by it and the columns that keep it count
 * themselves as its users.
 */
#define VDB_PACKED_SHARE 16u /* kept copies have at most one row in so many of all, together */

typedef struct vdb_passing {
  size_t users;     /* counted atomically */
  size_t words;
  size_t count;     /* live rows that pass, of the state of the rows below; before a copy was thought of, at most so many */
  size_t state;     /* db->state when they were counted and copied */
  int tried;        /* whether there was a reason to copy them */
  uint32_t *packed; /* [count] ascending; NULL for no copy */
  vdb_block rows;   /* the copy: what scans read, and norms, scales and residuals; one allocation with `packed` */
  uint64_t *bits;   /* [words] behind this; those of rows that are gone mean nothing */
} vdb_passing;

/* Room for a bitset, with one user; NULL for want of memory. */
VDB_RARE vdb_passing *vdb_passing_make(size_t words) {
  vdb_passing *passing = (vdb_passing *)VDB_MALLOC(sizeof *passing + (words + 1) * sizeof(uint64_t));
  if (!passing) return NULL;
  memset(passing, 0, sizeof *passing);
  passing->users = 1;
  passing->words = words;
  passing->state = SIZE_MAX;
  passing->bits = (uint64_t *)(void *)(passing + 1);
  return passing;
}

static inline void vdb_passing_enter(vdb_passing *passing) { (void)__atomic_add_fetch(&passing->users, (size_t)1, __ATOMIC_RELAXED); }

static inline void vdb_passing_leave(vdb_passing *passing) {
  if (!passing || __atomic_sub_fetch(&passing->users, (size_t)1, __ATOMIC_ACQ_REL)) return;
  vdb_aligned_free(passing->rows.memory);
  VDB_FREE(passing);
}

/* Whether rows are as they were when those that pass were counted and copied. */
static inline int vdb_passing_holds(const vdb_database *db, const vdb_passing *passing) {
  return passing && passing->state == __atomic_load_n(&db->state, __ATOMIC_RELAXED);
}

/* Counts those that are there, unless it is known what they are `at_most`. */
VDB_ONCE void vdb_passing_count(const vdb_database *db, vdb_passing *passing, size_t at_most) {
  passing->state = __atomic_load_n(&db->state, __ATOMIC_RELAXED);
  passing->count = at_most < SIZE_MAX ? at_most : vdb_active()->count(passing->bits, db->live, passing->words);
}

VDB_RARE size_t vdb_passing_bytes(const vdb_passing *passing) {
  return passing ? sizeof *passing + passing->words * sizeof(uint64_t) + passing->rows.bytes : 0;
}

/* Copies what scans read of the rows that pass, which have been counted. Without memory there is no copy. */
VDB_ONCE void vdb_passing_pack(const vdb_database *db, vdb_passing *passing) {
  int codes = vdb_has_codes(db->options.storage), both = db->options.storage == VDB_STORAGE_F32_I8;
  size_t count = passing->count, stride = db->dimensions * (codes ? 1 : vdb_element_size(db->options.storage));
  size_t numbers = vdb_round_up(count * sizeof(float), VDB_ALIGNMENT), place = 0;
  size_t bytes = vdb_round_up(count * stride + VDB_ALIGNMENT, VDB_ALIGNMENT) + (size_t)(2 + codes + both) * numbers;
  unsigned char *memory = (unsigned char *)vdb_aligned_alloc(bytes);
  if (!memory) return;
  vdb_block *rows = &passing->rows;
  rows->memory = memory;
  rows->bytes = bytes;
  rows->vectors = memory;
  rows->codes = codes ? (int8_t *)memory : NULL;
  passing->packed = (uint32_t *)(void *)(memory + bytes - numbers);
  rows->norms = (float *)(void *)(memory + bytes - 2 * numbers);
  rows->scales = codes ? (float *)(void *)(memory + bytes - 3 * numbers) : NULL;
  rows->residuals = both ? (float *)(void *)(memory + bytes - 4 * numbers) : NULL;
  for (size_t word = 0; word < passing->words; word++) {
    for (uint64_t bits = passing->bits[word] & db->live[word]; bits; bits &= bits - 1, place++) {
      size_t row = (word << 6) + (size_t)__builtin_ctzll(bits), at = vdb_row_in_block(db, row);
      const vdb_block *block = vdb_block_of(db, row);
      memcpy(memory + place * stride, (codes ? (const unsigned char *)block->codes : block->vectors) + at * stride, stride);
      passing->packed[place] = (uint32_t)row;
      rows->norms[place] = block->norms[at];
      if (codes) rows->scales[place] = block->scales[at];
      if (both) rows->residuals[place] = block->residuals[at];
    }
  }
  memset(memory + count * stride, 0, VDB_ALIGNMENT); /* scans read past the last row */
}
/* --- columns ---
 *
 * What searches have asked for by name, read from the records of all rows and kept: chunks of 1024 rows with a tag and a
 * word for each, and what is known of all of them, so that most chunks need not be looked at. Writers only note which
 * records changed (vdb_columns_touch); the next search that wants values reads those again. A text stands in a column by
 * its number in the column's dictionary, or by its hash where it is long or the dictionary is full, and is then compared
 * with the record.
 */
#define VDB_COLUMN_ROWS 1024u
#define VDB_COLUMN_WORDS (VDB_COLUMN_ROWS / 64u)
#define VDB_COLUMNS_MOST 256u    /* when there are more, all are forgotten */
#define VDB_DICTIONARY_MOST 65536u
#define VDB_DICTIONARY_TEXT 256u /* bytes of a text in it, at most */

typedef enum {
  VDB_TAG_MISSING, VDB_TAG_NONE, VDB_TAG_FALSE, VDB_TAG_TRUE, VDB_TAG_INT, VDB_TAG_FLOAT, VDB_TAG_CODED, VDB_TAG_HASHED
} vdb_tag;

typedef struct {
  uint64_t values[VDB_COLUMN_ROWS]; /* bits of an int or a float, a number of the dictionary, or a hash */
  uint8_t tags[VDB_COLUMN_ROWS];
  uint32_t used;                    /* rows with a tag other than MISSING */
  uint32_t kinds;                   /* bits of tags that were ever here, but for MISSING */
  int64_t least_int, greatest_int;  /* of all that were ever here */
  double least, greatest;
} vdb_chunk;

typedef struct {
  uint64_t hash;
  char *text;
  size_t size;
} vdb_word;

typedef struct vdb_column {
  char *name;
  vdb_chunk **chunks; /* [chunk_capacity]; NULL for rows without */
  size_t chunk_capacity;
  vdb_word *words; /* [word_count] the dictionary */
  size_t word_count, word_capacity;
  uint32_t *places; /* [place_count] open addressing by hash: 1 + number, 0 for none */
  size_t place_count;
  uint32_t *order;  /* [order_count] rows that have it by value, once that is worth while: all ints, or all floats */
  size_t order_count;
  vdb_tag order_tag;
  unsigned asked;   /* conditions since a row changed that looked at all of it */
} vdb_column;

static inline int vdb_columns_make(vdb_columns *columns) {
#ifdef VDB_MULTITHREADED
  return pthread_mutex_init(&columns->mutex, NULL) == 0;
#else
  return columns->count == 0;
#endif
}

static inline void vdb_columns_destroy(vdb_columns *columns) {
#ifdef VDB_MULTITHREADED
  pthread_mutex_destroy(&columns->mutex);
#else
  (void)columns;
#endif
}

static inline void vdb_columns_enter(vdb_columns *columns) {
#ifdef VDB_MULTITHREADED
  pthread_mutex_lock(&columns->mutex);
#else
  (void)columns;
#endif
}

static inline void vdb_columns_leave(vdb_columns *columns) {
#ifdef VDB_MULTITHREADED
  pthread_mutex_unlock(&columns->mutex);
#else
  (void)columns;
#endif
}

/* Rows have changed, and with them their order. */
VDB_RARE void vdb_column_unsort(vdb_column *column) {
  VDB_FREE(column->order);
  column->order = NULL;
  column->order_count = 0;
  column->asked = 0;
}

VDB_RARE void vdb_column_release(vdb_column *column) {
  vdb_column_unsort(column);
  for (size_t i = 0; i < column->chunk_capacity; i++) VDB_FREE(column->chunks[i]);
  for (size_t i = 0; i < column->word_count; i++) VDB_FREE(column->words[i].text);
  VDB_FREE(column->chunks);
  VDB_FREE(column->words);
  VDB_FREE(column->places);
  VDB_FREE(column->name);
}

VDB_RARE void vdb_kept_release(vdb_columns *columns) {
  for (int i = 0; i < VDB_KEPT_FILTERS; i++) {
    VDB_FREE(columns->kept[i].key);
    vdb_passing_leave(columns->kept[i].passing);
  }
  memset(columns->kept, 0, sizeof columns->kept);
}

/* Forgets all columns; those that are asked for are read anew. */
VDB_RARE void vdb_columns_release(vdb_columns *columns) {
  vdb_kept_release(columns);
  for (size_t i = 0; i < columns->count; i++) vdb_column_release(&columns->columns[i]);
  VDB_FREE(columns->columns);
  VDB_FREE(columns->touched);
  columns->columns = NULL;
  columns->touched = NULL;
  columns->count = columns->capacity = columns->rows = 0;
  columns->any_touched = 0;
}

/* Memory of the columns, for vdb_info. */
VDB_RARE size_t vdb_columns_bytes(vdb_columns *columns) {
  vdb_columns_enter(columns);
  size_t bytes = columns->rows / 8 + columns->capacity * sizeof(vdb_column);
  for (size_t i = 0; i < columns->count; i++) {
    const vdb_column *column = &columns->columns[i];
    bytes += column->chunk_capacity * sizeof(vdb_chunk *) + column->word_capacity * sizeof(vdb_word) +
             (column->place_count + column->order_count) * sizeof(uint32_t);
    for (size_t c = 0; c < column->chunk_capacity; c++) bytes += column->chunks[c] ? sizeof(vdb_chunk) : 0;
    for (size_t w = 0; w < column->word_count; w++) bytes += column->words[w].size + 1;
  }
  for (int i = 0; i < VDB_KEPT_FILTERS; i++) bytes += columns->kept[i].key_size + vdb_passing_bytes(columns->kept[i].passing);
  vdb_columns_leave(columns);
  return bytes;
}

/* The number of a text in the dictionary, or VDB_NO_ROW. */
VDB_ONCE uint32_t vdb_word_find(const vdb_column *column, const char *text, size_t size, uint64_t hash) {
  if (!column->place_count) return VDB_NO_ROW;
  for (size_t mask = column->place_count - 1, at = (size_t)hash & mask;; at = (at + 1) & mask) {
    uint32_t number = column->places[at];
    if (!number) return VDB_NO_ROW;
    const vdb_word *word = &column->words[number - 1];
    if (word->hash == hash && word->size == size && memcmp(word->text, text, size) == 0) return number - 1;
  }
}

static inline void vdb_word_enter(vdb_column *column, uint32_t number) {
  size_t mask = column->place_count - 1, at = (size_t)column->words[number].hash & mask;
  while (column->places[at]) at = (at + 1) & mask;
  column->places[at] = number + 1;
}

/* Adds a text to the dictionary. 0 for want of memory. */
VDB_ONCE int vdb_word_add(vdb_column *column, const char *text, size_t size, uint64_t hash) {
  if (column->word_count == column->word_capacity) {
    size_t capacity = vdb_max(16, 2 * column->word_capacity), places = 2 * capacity;
    uint32_t *fresh = (uint32_t *)VDB_MALLOC(places * sizeof(uint32_t));
    if (!fresh) return 0;
    if (!vdb_grow((void **)&column->words, column->word_capacity, capacity, sizeof(vdb_word))) {
      VDB_FREE(fresh);
      return 0;
    }
    VDB_FREE(column->places);
    memset(fresh, 0, places * sizeof(uint32_t));
    column->places = fresh;
    column->place_count = places;
    column->word_capacity = capacity;
    for (size_t i = 0; i < column->word_count; i++) vdb_word_enter(column, (uint32_t)i);
  }
  char *copy = (char *)VDB_MALLOC(size + 1);
  if (!copy) return 0;
  if (size) memcpy(copy, text, size);
  vdb_word *word = &column->words[column->word_count];
  word->hash = hash;
  word->text = copy;
  word->size = size;
  vdb_word_enter(column, (uint32_t)column->word_count++);
  return 1;
}

/* The tag of a value in a column, and its word. VDB_TAG_MISSING for want of memory. */
VDB_ONCE vdb_tag vdb_column_encode(vdb_column *column, const vdb_value *value, uint64_t *word) {
  *word = 0;
  if (value->type == VDB_VALUE_NONE) return VDB_TAG_NONE;
  if (value->type == VDB_VALUE_BOOL) return value->integer ? VDB_TAG_TRUE : VDB_TAG_FALSE;
  if (value->type == VDB_VALUE_INT) return memcpy(word, &value->integer, 8), VDB_TAG_INT;
  if (value->type == VDB_VALUE_FLOAT) return memcpy(word, &value->number, 8), VDB_TAG_FLOAT;
  uint64_t hash = vdb_hash(value->text, value->text_size);
  uint32_t number = vdb_word_find(column, value->text, value->text_size, hash);
  if (number == VDB_NO_ROW && value->text_size <= VDB_DICTIONARY_TEXT && column->word_count < VDB_DICTIONARY_MOST) {
    number = (uint32_t)column->word_count;
    if (!vdb_word_add(column, value->text, value->text_size, hash)) return VDB_TAG_MISSING;
  }
  *word = number == VDB_NO_ROW ? hash : number;
  return number == VDB_NO_ROW ? VDB_TAG_HASHED : VDB_TAG_CODED;
}

/* A row without the name, until it is put. */
static inline void vdb_column_clear(vdb_column *column, size_t row) {
  vdb_chunk *chunk = column->chunks[row / VDB_COLUMN_ROWS];
  if (!chunk || !chunk->tags[row % VDB_COLUMN_ROWS]) return;
  chunk->tags[row % VDB_COLUMN_ROWS] = VDB_TAG_MISSING;
  chunk->used--;
}

/* 0 for want of memory. */
VDB_ONCE int vdb_column_put(vdb_column *column, size_t row, const vdb_value *value) {
  vdb_chunk **at = &column->chunks[row / VDB_COLUMN_ROWS], *chunk = *at;
  size_t place = row % VDB_COLUMN_ROWS;
  uint64_t word;
  vdb_tag tag = vdb_column_encode(column, value, &word);
  if (tag == VDB_TAG_MISSING) return 0;
  if (!chunk) {
    if (!(chunk = *at = (vdb_chunk *)VDB_MALLOC(sizeof(vdb_chunk)))) return 0;
    memset(chunk, 0, sizeof *chunk);
    chunk->least_int = INT64_MAX;
    chunk->greatest_int = INT64_MIN;
    chunk->least = INFINITY;
    chunk->greatest = -INFINITY;
  }
  chunk->used += !chunk->tags[place];
  chunk->tags[place] = (uint8_t)tag;
  chunk->values[place] = word;
  chunk->kinds |= 1u << tag;
  if (tag == VDB_TAG_INT) {
    if (value->integer < chunk->least_int) chunk->least_int = value->integer;
    if (value->integer > chunk->greatest_int) chunk->greatest_int = value->integer;
  } else if (tag == VDB_TAG_FLOAT) {
    if (value->number < chunk->least) chunk->least = value->number;
    if (value->number > chunk->greatest) chunk->greatest = value->number;
  }
  return 1;
}

/* The value of this name in a row. 0 if there is none. */
VDB_ONCE int vdb_find_value(const vdb_database *db, size_t row, const char *name, vdb_value *out) {
  const char *id;
  const unsigned char *metadata;
  size_t id_size, size, place = 0;
  if (!vdb_record_at(db, row, &id, &id_size, &metadata, &size) || !vdb_has_values(db, row)) return 0;
  while (vdb_next_value(metadata, size, &place, out))
    if (strcmp(out->name, name) == 0) return 1;
  return 0;
}

/* Reads a row's values into columns [count]. 0 for want of memory. */
VDB_ONCE int vdb_columns_read_row(const vdb_database *db, size_t row, vdb_column *columns, size_t count) {
  const char *id;
  const unsigned char *metadata;
  size_t id_size, size, place = 0;
  vdb_value value;
  if (!vdb_record_at(db, row, &id, &id_size, &metadata, &size) || !vdb_has_values(db, row)) return 1;
  while (vdb_next_value(metadata, size, &place, &value))
    for (size_t i = 0; i < count; i++)
      if (strcmp(columns[i].name, value.name) == 0 && !vdb_column_put(&columns[i], row, &value)) return 0;
  return 1;
}

typedef struct {
  uint64_t key;
  uint32_t row;
} vdb_keyed;

#define VDB_SORT_BITS 11u /* of one pass: 20 bits, which number a million rows, take two */

/* Sorts by keys, of which `differing` has the bits that are not the same in all. The sorted ones are in what it returns. */
VDB_ONCE vdb_keyed *vdb_sort_keyed(vdb_keyed *from, vdb_keyed *to, size_t count, uint64_t differing) {
  const uint64_t mask = ((uint64_t)1 << VDB_SORT_BITS) - 1;
  for (unsigned shift = 0; shift < 64 && differing >> shift; shift += VDB_SORT_BITS) {
    uint32_t places[1u << VDB_SORT_BITS], next = 0;
    shift += (unsigned)__builtin_ctzll(differing >> shift);
    memset(places, 0, sizeof places);
    for (size_t i = 0; i < count; i++) places[from[i].key >> shift & mask]++;
    for (size_t digit = 0; digit <= mask; digit++) {
      uint32_t here = places[digit];
      places[digit] = next;
      next += here;
    }
    for (size_t i = 0; i < count; i++) to[places[from[i].key >> shift & mask]++] = from[i];
    vdb_keyed *sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

/* Whether a column holds nothing but ints or nothing but floats: `*tag`. */
VDB_RARE int vdb_column_is_numbers(const vdb_column *column, vdb_tag *tag, size_t *count) {
  uint32_t kinds = 0;
  *count = 0;
  for (size_t i = 0; i < column->chunk_capacity; i++) {
    if (column->chunks[i]) kinds |= column->chunks[i]->kinds, *count += column->chunks[i]->used;
  }
  *tag = kinds == 1u << VDB_TAG_INT ? VDB_TAG_INT : VDB_TAG_FLOAT;
  return *count && (kinds == 1u << VDB_TAG_INT || kinds == 1u << VDB_TAG_FLOAT);
}

/* The rows of a column in the order of their numbers. Nothing happens for want of memory. */
VDB_ONCE void vdb_column_sort(vdb_column *column) {
  size_t count, filled = 0;
  uint64_t differing = 0;
  if (!vdb_column_is_numbers(column, &column->order_tag, &count)) return;
  vdb_keyed *pairs = (vdb_keyed *)VDB_MALLOC(2 * count * sizeof(vdb_keyed));
  column->order = (uint32_t *)VDB_MALLOC(count * sizeof(uint32_t));
  for (size_t i = 0; pairs && column->order && i < column->chunk_capacity; i++) {
    const vdb_chunk *chunk = column->chunks[i];
    for (size_t place = 0; chunk && place < VDB_COLUMN_ROWS; place++) {
      if (chunk->tags[place] == VDB_TAG_MISSING) continue;
      uint64_t word = chunk->values[place], sign = (uint64_t)1 << 63;
      int downward = column->order_tag == VDB_TAG_FLOAT && (word & sign); /* floats below 0 are ordered from behind */
      pairs[filled].key = downward ? ~word : word ^ sign;
      differing |= pairs[filled].key ^ pairs[0].key;
      pairs[filled++].row = (uint32_t)(i * VDB_COLUMN_ROWS + place);
    }
  }
  vdb_keyed *sorted = filled ? vdb_sort_keyed(pairs, pairs + count, filled, differing) : pairs;
  for (size_t i = 0; i < filled; i++) column->order[i] = sorted[i].row;
  column->order_count = filled;
  VDB_FREE(pairs);
}

/* Room in a column for indices below `rows`. */
VDB_RARE int vdb_column_room(vdb_column *column, size_t rows) {
  size_t chunks = (rows + VDB_COLUMN_ROWS - 1) / VDB_COLUMN_ROWS;
  if (chunks <= column->chunk_capacity) return 1;
  if (!vdb_grow((void **)&column->chunks, column->chunk_capacity, chunks, sizeof(vdb_chunk *))) return 0;
  column->chunk_capacity = chunks;
  return 1;
}

/* Reads what has changed since. Under a reader's lock and the mutex. */
VDB_LIGHT vdb_error vdb_columns_refresh(const vdb_database *db, vdb_columns *columns) {
  size_t old = columns->rows, slots = db->slots, words = (columns->rows + 63) / 64;
  if (columns->any_touched || slots > old) {
    vdb_kept_release(columns);
    for (size_t i = 0; i < columns->count; i++) vdb_column_unsort(&columns->columns[i]);
  }
  for (size_t word = 0; word < words && columns->any_touched; word++) {
    for (uint64_t rest = columns->touched[word]; rest; rest &= rest - 1) {
      size_t row = 64 * word + (size_t)__builtin_ctzll(rest);
      for (size_t i = 0; i < columns->count; i++) vdb_column_clear(&columns->columns[i], row);
      if (row < slots && !vdb_columns_read_row(db, row, columns->columns, columns->count)) return VDB_ERROR_OUT_OF_MEMORY;
    }
    columns->touched[word] = 0;
  }
  columns->any_touched = 0;
  if (slots <= old) return VDB_OK;
  size_t rows = vdb_round_up(slots, 64);
  for (size_t i = 0; i < columns->count; i++)
    if (!vdb_column_room(&columns->columns[i], rows)) return VDB_ERROR_OUT_OF_MEMORY;
  if (!vdb_grow((void **)&columns->touched, words, rows / 64, sizeof(uint64_t))) return VDB_ERROR_OUT_OF_MEMORY;
  for (size_t row = old; row < slots; row++)
    if (!vdb_columns_read_row(db, row, columns->columns, columns->count)) return VDB_ERROR_OUT_OF_MEMORY;
  columns->rows = rows; /* those past `slots` have no record yet, and are noted when they get one */
  return VDB_OK;
}

static inline vdb_column *vdb_columns_find(const vdb_columns *columns, const char *name) {
  for (size_t i = 0; i < columns->count; i++)
    if (strcmp(columns->columns[i].name, name) == 0) return &columns->columns[i];
  return NULL;
}

/* Adds the column of a name, read from all rows, and sorted if it holds numbers, which takes about as long once. Columns
 * must be fresh. */
VDB_LIGHT vdb_error vdb_columns_add(const vdb_database *db, vdb_columns *columns, const char *name) {
  vdb_column column;
  memset(&column, 0, sizeof column);
  if (columns->count == columns->capacity) {
    size_t capacity = vdb_max(8, 2 * columns->capacity);
    if (!vdb_grow((void **)&columns->columns, columns->capacity, capacity, sizeof column)) return VDB_ERROR_OUT_OF_MEMORY;
    columns->capacity = capacity;
  }
  column.name = (char *)VDB_MALLOC(strlen(name) + 1);
  int good = column.name != NULL;
  if (good) memcpy(column.name, name, strlen(name) + 1);
  good = good && vdb_column_room(&column, vdb_max(columns->rows, db->slots));
  for (size_t row = 0; row < db->slots && good; row++) good = vdb_columns_read_row(db, row, &column, 1);
  if (good) {
    vdb_column_sort(&column);
    columns->columns[columns->count++] = column;
  } else {
    vdb_column_release(&column);
  }
  return good ? VDB_OK : VDB_ERROR_OUT_OF_MEMORY;
}

/* --- the whole --- */
VDB_RARE int vdb_valid_options(size_t dimensions, vdb_metric metric, const vdb_options *options) {
  return dimensions >= 1 && dimensions <= VDB_MAX_DIMENSIONS && (unsigned)metric <= 2 &&
         (unsigned)options->storage <= 4 && (unsigned)options->index <= 1 && options->links >= 2 &&
         options->links <= 128 && options->build_effort >= 1 && options->build_effort <= 4096 &&
         options->threads <= 256;
}

/* Blocks of about a quarter of a megabyte, and at least 64 rows: the last one is rarely full. */
VDB_RARE unsigned vdb_block_shift_for(size_t dimensions, vdb_storage storage) {
  size_t row = dimensions * (vdb_element_size(storage) + (storage == VDB_STORAGE_F32_I8));
  unsigned shift = 6;
  while (shift < 16 && (row << (shift + 1)) <= ((size_t)1 << 18)) shift++;
  return shift;
}

VDB_RARE void vdb_drop_last_block(vdb_database *db) {
  vdb_block *block = &db->blocks[--db->block_count];
  vdb_aligned_free(block->memory);
  vdb_unspill(&db->paging, block);
}

static inline void vdb_unmap_file(void *base, size_t size);

VDB_RARE void vdb_release(vdb_database *db) {
  if (!db) return;
  while (db->block_count) vdb_drop_last_block(db);
  if (db->paging.has_file) vdb_sys_close(db->paging.file);
  vdb_graph_release(db);
  if (db->mapping.base) vdb_unmap_file(db->mapping.base, db->mapping.size); /* the table lies in the file */
  else VDB_FREE(db->records.table);
  vdb_release_records(db);
  vdb_release_journal(db);
  vdb_columns_release(&db->columns);
  vdb_columns_destroy(&db->columns);
  VDB_FREE(db->blocks);
  VDB_FREE(db->live);
  VDB_FREE(db->free_rows);
  vdb_changes_release(db);
  if (db->pool) vdb_pool_stop(db->pool);
  VDB_FREE(db->pool);
  vdb_lock_destroy(&db->lock);
  VDB_FREE(db);
}

VDB_RARE vdb_error vdb_allocate(size_t dimensions, vdb_metric metric, const vdb_options *options,
                                vdb_database **out) {
  vdb_database *db = (vdb_database *)VDB_MALLOC(sizeof(vdb_database));
  if (!db) return VDB_ERROR_OUT_OF_MEMORY;
  memset(db, 0, sizeof *db);
  db->pool = (vdb_pool *)VDB_MALLOC(sizeof(vdb_pool));
  int locks = db->pool ? vdb_lock_make(&db->lock) : 0;
  if (!locks || !vdb_columns_make(&db->columns)) {
    if (locks) vdb_lock_destroy(&db->lock);
    VDB_FREE(db->pool);
    VDB_FREE(db);
    return VDB_ERROR_OUT_OF_MEMORY;
  }
  vdb_pool_reset(db->pool);
  db->dimensions = dimensions;
  db->metric = metric;
  db->options = *options;
  db->threads = options->threads ? options->threads : vdb_cores();
  db->block_shift = vdb_block_shift_for(dimensions, options->storage);
  db->graph.entry = VDB_NO_ROW;
  *out = db;
  return VDB_OK;
}

/* --- conditions ---
 *
 * A condition becomes a list of nodes, each before its parts, and that a bitset: chunk by chunk, on all threads. A chunk
 * whose statistics say none or all is not looked at. A walk of the graph meets few rows: where many rows pass, those that
 * it meets are asked one by one, and there is no bitset.
 */
#define VDB_CONDITION_DEPTH 32

typedef struct {
  const vdb_condition *asked;
  size_t size;              /* nodes of it and of its parts */
  vdb_column column;        /* comparisons only, from here on; a copy, as others may add columns while rows are asked */
  uint32_t kinds;           /* bits of the tags that pass whatever the word */
  int negated;
  int64_t low, high;        /* ints that may pass */
  double least, most;       /* floats that may pass */
  int64_t *ints;            /* sorted, when more than one may be equal; NULL otherwise */
  double *numbers;          /* likewise */
  size_t int_count, number_count;
  uint64_t *codes;          /* bitset over the dictionary; NULL when no text is asked for */
  size_t code_count;
  uint64_t *hashes;         /* sorted, of texts that are not in it; NULL for none */
  size_t hash_count;
} vdb_node;

typedef struct {
  const vdb_database *db;
  vdb_node *nodes;
  size_t count, capacity;
  uint64_t *out; /* [words] */
  size_t words;
  size_t passing; /* rows that pass, by a sample, where they are asked one by one; of a range, at most */
} vdb_filtering;

/* How many nodes a condition makes; SIZE_MAX for what is no condition. */
VDB_RARE size_t vdb_condition_nodes(const vdb_condition *condition, int depth) {
  size_t nodes = 1;
  unsigned operation = (unsigned)condition->operation;
  if (operation == VDB_ALL_OF || operation == VDB_ANY_OF) {
    if (depth >= VDB_CONDITION_DEPTH || (condition->count && !condition->parts)) return SIZE_MAX;
    for (size_t i = 0; i < condition->count && nodes != SIZE_MAX; i++) {
      size_t part = vdb_condition_nodes(&condition->parts[i], depth + 1);
      nodes = part == SIZE_MAX || part > SIZE_MAX / 2 - nodes ? SIZE_MAX : nodes + part;
    }
    return nodes;
  }
  if (operation > VDB_ANY_OF || !condition->name || (condition->count && !condition->values)) return SIZE_MAX;
  for (size_t i = 0; i < condition->count; i++) {
    const vdb_value *value = &condition->values[i];
    if ((unsigned)value->type > VDB_VALUE_TEXT || (value->type == VDB_VALUE_FLOAT && vdb_is_nan(value->number)) ||
        (value->type == VDB_VALUE_TEXT && value->text_size && !value->text))
      return SIZE_MAX;
  }
  if (operation <= VDB_NOT_IN) return nodes;
  int number = condition->count == 1 &&
               (condition->values->type == VDB_VALUE_INT || condition->values->type == VDB_VALUE_FLOAT);
  return number ? nodes : SIZE_MAX;
}

static inline int vdb_by_int(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return x < y ? -1 : x > y;
}

static inline int vdb_by_number(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

static inline int vdb_by_hash(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

#define VDB_TWO_63 9223372036854775808.0

/* Whether a float is an int of 64 bits, and which. */
VDB_RARE int vdb_is_int(double number, int64_t *out) {
  if (!(number >= -VDB_TWO_63 && number < VDB_TWO_63)) return 0;
  *out = (int64_t)number;
  return (double)*out == number;
}

/* The numbers that an ordering lets pass: ints from `low` to `high`, floats from `least` to `most`. Exact, though not
 * every int is a float. */
VDB_RARE void vdb_node_range(vdb_node *node, vdb_operator operation, const vdb_value *value) {
  int below = operation == VDB_LESS || operation == VDB_AT_MOST;
  int equal = operation == VDB_AT_MOST || operation == VDB_AT_LEAST;
  double bound = value->type == VDB_VALUE_INT ? (double)value->integer : value->number, away = below ? -INFINITY : INFINITY;
  int64_t whole = value->integer, back = 0;
  int exact = 1; /* the bound is the value itself, as a float and as an int */
  node->low = INT64_MIN, node->high = INT64_MAX, node->least = -INFINITY, node->most = INFINITY;
  if (value->type == VDB_VALUE_INT) {
    /* The float next to the int may lie on either side of it. */
    exact = vdb_is_int(bound, &back) && back == whole;
    int beyond = bound >= VDB_TWO_63 || (!exact && back > whole); /* bound > whole */
    double limit = exact ? (equal ? bound : nextafter(bound, away)) : below == beyond ? nextafter(bound, away) : bound;
    if (below) node->most = limit;
    else node->least = limit;
    if (!equal && whole == (below ? INT64_MIN : INT64_MAX)) {
      node->low = 1, node->high = 0; /* none */
      return;
    }
    if (below) node->high = equal ? whole : whole - 1;
    else node->low = equal ? whole : whole + 1;
    return;
  }
  if (below) node->most = equal ? bound : nextafter(bound, away);
  else node->least = equal ? bound : nextafter(bound, away);
  if (!equal && bound == away) node->least = INFINITY, node->most = -INFINITY; /* nothing is beyond infinity */
  double rounded = below ? floor(bound) : ceil(bound);
  if (vdb_is_int(rounded, &whole)) {
    int outside = !equal && rounded == bound;
    if (outside && whole == (below ? INT64_MIN : INT64_MAX)) node->low = 1, node->high = 0;
    else if (below) node->high = whole - outside;
    else node->low = whole + outside;
  } else if (below ? rounded < 0.0 : rounded > 0.0) {
    node->low = 1, node->high = 0; /* beyond all ints */
  }
}

/* What of a column is equal to one of the values asked for. 0 for want of memory. */
VDB_LIGHT int vdb_node_set(vdb_node *node, const vdb_condition *asked) {
  size_t count = asked->count, words = node->column.word_count / 64 + 1;
  node->ints = (int64_t *)VDB_MALLOC(count * sizeof(int64_t) + 8);
  node->numbers = (double *)VDB_MALLOC(count * sizeof(double) + 8);
  node->hashes = (uint64_t *)VDB_MALLOC(count * sizeof(uint64_t) + 8);
  node->codes = (uint64_t *)VDB_MALLOC(words * sizeof(uint64_t));
  if (!node->ints || !node->numbers || !node->hashes || !node->codes) return 0;
  memset(node->codes, 0, words * sizeof(uint64_t));
  for (size_t i = 0; i < count; i++) {
    const vdb_value *value = &asked->values[i];
    int64_t whole = value->integer;
    if (value->type == VDB_VALUE_NONE) node->kinds |= 1u << VDB_TAG_NONE;
    else if (value->type == VDB_VALUE_BOOL) node->kinds |= 1u << (value->integer ? VDB_TAG_TRUE : VDB_TAG_FALSE);
    else if (value->type == VDB_VALUE_INT) {
      int64_t back;
      node->ints[node->int_count++] = whole;
      if (vdb_is_int((double)whole, &back) && back == whole) node->numbers[node->number_count++] = (double)whole;
    } else if (value->type == VDB_VALUE_FLOAT) {
      node->numbers[node->number_count++] = value->number;
      if (vdb_is_int(value->number, &whole)) node->ints[node->int_count++] = whole;
    } else {
      uint64_t hash = vdb_hash(value->text, value->text_size);
      uint32_t number = vdb_word_find(&node->column, value->text, value->text_size, hash);
      if (number == VDB_NO_ROW) node->hashes[node->hash_count++] = hash;
      else node->codes[number >> 6] |= (uint64_t)1 << (number & 63), node->code_count++;
    }
  }
  qsort(node->ints, node->int_count, sizeof(int64_t), vdb_by_int);
  qsort(node->numbers, node->number_count, sizeof(double), vdb_by_number);
  qsort(node->hashes, node->hash_count, sizeof(uint64_t), vdb_by_hash);
  node->low = node->int_count ? node->ints[0] : 1;
  node->high = node->int_count ? node->ints[node->int_count - 1] : 0;
  node->least = node->number_count ? node->numbers[0] : INFINITY;
  node->most = node->number_count ? node->numbers[node->number_count - 1] : -INFINITY;
  return 1;
}

/* Adds the nodes of a condition, for which there is room. */
VDB_RARE vdb_error vdb_condition_compile(vdb_filtering *filtering, const vdb_condition *asked) {
  vdb_columns *columns = &((vdb_database *)(uintptr_t)filtering->db)->columns;
  size_t place = filtering->count++;
  vdb_error error = VDB_OK;
  vdb_node *node = &filtering->nodes[place];
  memset(node, 0, sizeof *node);
  node->asked = asked;
  if (asked->operation >= VDB_ALL_OF) {
    for (size_t i = 0; i < asked->count && !error; i++) error = vdb_condition_compile(filtering, &asked->parts[i]);
  } else {
    node->column = *vdb_columns_find(columns, asked->name);
    node->negated = asked->operation == VDB_NOT_IN;
    if (asked->operation > VDB_NOT_IN) vdb_node_range(node, asked->operation, asked->values);
    else if (!vdb_node_set(node, asked)) error = VDB_ERROR_OUT_OF_MEMORY;
  }
  filtering->nodes[place].size = filtering->count - place;
  return error;
}

/* Whether a text that stands by its hash is one of those asked for. */
VDB_ONCE int vdb_text_passes(const vdb_database *db, const vdb_node *node, size_t row, uint64_t hash) {
  vdb_value value;
  if (!node->hash_count || !bsearch(&hash, node->hashes, node->hash_count, sizeof hash, vdb_by_hash)) return 0;
  if (!vdb_find_value(db, row, node->column.name, &value) || value.type != VDB_VALUE_TEXT) return 0;
  for (size_t i = 0; i < node->asked->count; i++) {
    const vdb_value *wanted = &node->asked->values[i];
    if (wanted->type == VDB_VALUE_TEXT && wanted->text_size == value.text_size &&
        memcmp(wanted->text, value.text, value.text_size) == 0)
      return 1;
  }
  return 0;
}

VDB_ONCE int vdb_value_passes(const vdb_database *db, const vdb_node *node, size_t row, vdb_tag tag, uint64_t word) {
  int64_t integer;
  double number;
  switch (tag) {
    case VDB_TAG_INT:
      memcpy(&integer, &word, 8);
      if (integer < node->low || integer > node->high) return 0;
      return node->int_count < 2 || bsearch(&integer, node->ints, node->int_count, 8, vdb_by_int) != NULL;
    case VDB_TAG_FLOAT:
      memcpy(&number, &word, 8);
      if (!(number >= node->least && number <= node->most)) return 0;
      return node->number_count < 2 || bsearch(&number, node->numbers, node->number_count, 8, vdb_by_number) != NULL;
    case VDB_TAG_CODED: return node->code_count && (int)(node->codes[word >> 6] >> (word & 63) & 1u);
    case VDB_TAG_HASHED: return vdb_text_passes(db, node, row, word);
    default: return (int)(node->kinds >> tag & 1u);
  }
}

/* 0 if none of a chunk's values can pass, 1 if all of them do, 2 if they must be looked at. */
VDB_ONCE int vdb_chunk_says(const vdb_node *node, const vdb_chunk *chunk) {
  int none = 1, all = 1;
  for (uint32_t rest = chunk->kinds; rest; rest &= rest - 1) {
    vdb_tag tag = (vdb_tag)__builtin_ctz(rest);
    int out = 0, in = 0; /* no value of this tag passes; every one does */
    if (tag == VDB_TAG_INT) {
      out = node->low > node->high || chunk->greatest_int < node->low || chunk->least_int > node->high;
      in = node->int_count < 2 && chunk->least_int >= node->low && chunk->greatest_int <= node->high;
    } else if (tag == VDB_TAG_FLOAT) {
      out = node->least > node->most || chunk->greatest < node->least || chunk->least > node->most;
      in = node->number_count < 2 && chunk->least >= node->least && chunk->greatest <= node->most;
    } else if (tag == VDB_TAG_CODED) {
      out = !node->code_count;
    } else if (tag == VDB_TAG_HASHED) {
      out = !node->hash_count;
    } else {
      in = (int)(node->kinds >> tag & 1u);
      out = !in;
    }
    none &= out;
    all &= in;
  }
  return none ? 0 : all ? 1 : 2;
}

/* Which of 64 rows pass. Columns mostly hold one type: ints, floats and texts have loops of their own. */
static inline uint64_t vdb_word_passes(const vdb_database *db, const vdb_node *node, const vdb_chunk *chunk, size_t first,
                                       size_t row) {
  const uint64_t *values = chunk->values + first;
  const uint8_t *tags = chunk->tags + first;
  uint64_t word = 0;
  if (chunk->kinds == 1u << VDB_TAG_INT && node->int_count < 2) {
    word = vdb_active()->between(values, tags, VDB_TAG_INT, node->low, node->high);
  } else if (chunk->kinds == 1u << VDB_TAG_FLOAT && node->number_count < 2) {
    for (unsigned i = 0; i < 64; i++) {
      double value;
      memcpy(&value, &values[i], 8);
      word |= (uint64_t)((tags[i] == VDB_TAG_FLOAT) & (value >= node->least) & (value <= node->most)) << i;
    }
  } else if (chunk->kinds == 1u << VDB_TAG_CODED) {
    for (unsigned i = 0; i < 64; i++) /* a row without has the code it had before, or 0 */
      word |= ((uint64_t)(tags[i] == VDB_TAG_CODED) & (node->codes[values[i] >> 6] >> (values[i] & 63))) << i;
  } else {
    for (unsigned i = 0; i < 64; i++)
      if (tags[i]) word |= (uint64_t)(unsigned)vdb_value_passes(db, node, row + i, (vdb_tag)tags[i], values[i]) << i;
  }
  return word;
}

/* The same, where rows may be without a value, or all are. */
static inline int vdb_chunk_verdict(const vdb_node *node, const vdb_chunk *chunk) {
  int says = chunk && chunk->used ? vdb_chunk_says(node, chunk) : 0;
  return says == 1 && chunk->used < VDB_COLUMN_ROWS ? 2 : says;
}

static inline void vdb_node_chunk(const vdb_database *db, const vdb_node *node, size_t chunk_number, uint64_t *out) {
  const vdb_column *column = &node->column;
  const vdb_chunk *chunk = chunk_number < column->chunk_capacity ? column->chunks[chunk_number] : NULL;
  int says = vdb_chunk_verdict(node, chunk);
  for (size_t word = 0; word < VDB_COLUMN_WORDS; word++) {
    out[word] = says == 1 ? ~(uint64_t)0 : 0;
    if (says == 2)
      out[word] = vdb_word_passes(db, node, chunk, 64 * word, chunk_number * VDB_COLUMN_ROWS + 64 * word);
    if (node->negated) out[word] = ~out[word];
  }
}

/* The rows of one chunk that pass the nodes from `node` on. */
VDB_ONCE void vdb_filter_chunk(const vdb_filtering *filtering, const vdb_node *node, size_t chunk, uint64_t *out) {
  vdb_operator operation = node->asked->operation;
  if (operation < VDB_ALL_OF) {
    vdb_node_chunk(filtering->db, node, chunk, out);
    return;
  }
  int all = operation == VDB_ALL_OF;
  memset(out, all ? 0xff : 0, VDB_COLUMN_WORDS * sizeof *out);
  for (size_t part = 1; part < node->size; part += node[part].size) {
    uint64_t passes[VDB_COLUMN_WORDS], seen = 0;
    vdb_filter_chunk(filtering, node + part, chunk, passes);
    for (size_t word = 0; word < VDB_COLUMN_WORDS; word++) {
      out[word] = all ? out[word] & passes[word] : out[word] | passes[word];
      seen |= all ? out[word] : ~out[word];
    }
    if (!seen) return; /* nothing is left to be decided */
  }
}

/* Whether one row passes the nodes from `node` on. */
VDB_ONCE int vdb_filter_row(const vdb_database *db, const vdb_node *node, size_t row) {
  if (node->asked->operation < VDB_ALL_OF) {
    size_t number = row / VDB_COLUMN_ROWS, place = row % VDB_COLUMN_ROWS;
    const vdb_chunk *chunk = number < node->column.chunk_capacity ? node->column.chunks[number] : NULL;
    vdb_tag tag = chunk ? (vdb_tag)chunk->tags[place] : VDB_TAG_MISSING;
    return (tag != VDB_TAG_MISSING && vdb_value_passes(db, node, row, tag, chunk->values[place])) != node->negated;
  }
  int all = node->asked->operation == VDB_ALL_OF;
  for (size_t part = 1; part < node->size; part += node[part].size)
    if (vdb_filter_row(db, node + part, row) != all) return !all;
  return all;
}

/* As a filter function of a query's options. */
static int vdb_filter_asks(uint64_t index, void *context) {
  const vdb_filtering *filtering = (const vdb_filtering *)context;
  return vdb_filter_row(filtering->db, filtering->nodes, (size_t)index);
}

#define VDB_SORTED_AFTER 8u  /* conditions on a column whose rows have not changed: then it is sorted by value */
#define VDB_SORTED_SHARE 8u  /* a bitset is made of a sorted column where at most one row in so many is in the range */

/* Whether a node asks for a range of the numbers that its column is sorted by. */
VDB_RARE int vdb_node_is_range(const vdb_node *node) {
  return node->asked->operation < VDB_ALL_OF && !node->negated && !node->kinds && !node->code_count && !node->hash_count &&
         node->int_count < 2 && node->number_count < 2;
}

/* Where numbers that are not below a node's range begin in the order of its column, or, with `above`, those above it. */
VDB_RARE size_t vdb_order_bound(const vdb_node *node, int above) {
  const vdb_column *column = &node->column;
  size_t low = 0, high = column->order_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    uint32_t row = column->order[middle];
    uint64_t word = column->chunks[row / VDB_COLUMN_ROWS]->values[row % VDB_COLUMN_ROWS];
    int64_t integer;
    double number;
    memcpy(&integer, &word, 8);
    memcpy(&number, &word, 8);
    int before = column->order_tag == VDB_TAG_INT ? (above ? integer <= node->high : integer < node->low)
                                                  : (above ? number <= node->most : number < node->least);
    if (before) low = middle + 1;
    else high = middle;
  }
  return low;
}

/* The node after one of those that must all pass: parts of a part that is ALL_OF are among them. */
VDB_INLINE size_t vdb_next_of_all(const vdb_node *nodes, size_t part) {
  return part + (nodes[part].asked->operation == VDB_ALL_OF ? 1 : nodes[part].size);
}

/* Whether a row passes all nodes that must pass but one, which it is known to pass. */
static inline int vdb_filter_others(const vdb_filtering *filtering, const vdb_node *known, size_t row) {
  const vdb_node *nodes = filtering->nodes;
  for (size_t part = 0; part < nodes->size; part = vdb_next_of_all(nodes, part))
    if (nodes[part].asked->operation != VDB_ALL_OF && nodes + part != known &&
        !vdb_filter_row(filtering->db, nodes + part, row))
      return 0;
  return 1;
}

/* 0 if no row of a chunk passes all nodes that must pass but one, 1 if all do, 2 if they must be asked. */
static inline int vdb_others_say(const vdb_filtering *filtering, const vdb_node *known, size_t number) {
  const vdb_node *nodes = filtering->nodes;
  int all = 1;
  for (size_t part = 0; part < nodes->size; part = vdb_next_of_all(nodes, part)) {
    const vdb_node *node = nodes + part;
    if (node->asked->operation == VDB_ALL_OF || node == known) continue;
    int says = 2;
    if (node->asked->operation < VDB_ALL_OF)
      says = vdb_chunk_verdict(node, number < node->column.chunk_capacity ? node->column.chunks[number] : NULL);
    if (says != 2 && says == node->negated) return 0;
    if (says == 2) all = 2;
  }
  return all;
}

#define VDB_PICKED_MOST 64u /* rows of a chunk that are asked one by one: all of it takes as long as so many */

/* Takes from the bitset, which has the rows that pass one node, those that do not pass the others that must: by row, since
 * memory cannot foresee the order of the column's values, and not by row where the chunk says enough. */
VDB_ONCE void vdb_filter_picked(const vdb_filtering *filtering, const vdb_node *known) {
  for (size_t first = 0; first < filtering->words; first += VDB_COLUMN_WORDS) {
    int says = vdb_others_say(filtering, known, first / VDB_COLUMN_WORDS);
    size_t words = vdb_min(VDB_COLUMN_WORDS, filtering->words - first);
    uint64_t *out = filtering->out + first, passes[VDB_COLUMN_WORDS];
    if (says == 1) continue;
    if (says == 2 && vdb_active()->count(out, out, words) > VDB_PICKED_MOST) {
      vdb_filter_chunk(filtering, filtering->nodes, first / VDB_COLUMN_WORDS, passes);
      for (size_t word = 0; word < words; word++) out[word] &= passes[word];
      continue;
    }
    for (size_t word = first; word < first + words; word++) {
      if (!says) filtering->out[word] = 0;
      for (uint64_t rest = filtering->out[word]; rest; rest &= rest - 1)
        if (!vdb_filter_others(filtering, known, 64 * word + (size_t)__builtin_ctzll(rest)))
          filtering->out[word] ^= rest & (~rest + 1);
    }
  }
}

/* Makes the bitset from the few rows of the shortest range, if there is a sorted column that says so; each is asked the
 * rest of the condition. 0 if there is none. Columns that are asked often enough without get sorted. */
VDB_ONCE int vdb_filter_from_order(vdb_filtering *filtering) {
  const vdb_node *root = filtering->nodes, *best = NULL;
  vdb_columns *columns = &((vdb_database *)(uintptr_t)filtering->db)->columns;
  size_t from = 0, most = filtering->db->slots / VDB_SORTED_SHARE + 1;
  for (size_t part = 0; part < root->size; part = vdb_next_of_all(root, part)) {
    vdb_node *node = &filtering->nodes[part];
    if (!vdb_node_is_range(node)) continue;
    vdb_column *column = vdb_columns_find(columns, node->column.name);
    if (!column->order && ++column->asked == VDB_SORTED_AFTER) vdb_column_sort(column);
    node->column = *column;
    if (!column->order_count) continue;
    size_t begin = vdb_order_bound(node, 0), end = vdb_order_bound(node, 1), count = end > begin ? end - begin : 0;
    if (count > most || (best && count == most)) continue;
    best = node;
    from = begin;
    most = count;
  }
  if (!best) return 0;
  filtering->passing = most;
  memset(filtering->out, 0, filtering->words * sizeof(uint64_t));
  for (size_t i = from; i < from + most; i++) {
    uint32_t row = best->column.order[i];
    if (row < filtering->db->slots) filtering->out[row >> 6] |= (uint64_t)1 << (row & 63);
  }
  vdb_filter_picked(filtering, best);
  return 1;
}

#define VDB_FILTER_SAMPLE 128u /* rows */
#define VDB_FILTER_LEAST 16u   /* of them must pass for rows to be asked one by one */

#define VDB_FILTER_WALK 1024.0 /* the graph's least effort times VDB_WALK_COST: with fewer it leaves this to a scan */

/* Whether so few rows pass that no walk will be made, whatever is asked for. */
VDB_RARE int vdb_surely_scanned(const vdb_database *db, size_t passing) {
  size_t linked = db->slots - vdb_min(db->free_count, db->slots);
  return (double)passing * (double)passing / (double)vdb_max(1, linked) <= VDB_FILTER_WALK;
}

/* Asks some rows of all. Whether enough pass, of all and for a walk. */
VDB_LIGHT int vdb_filter_sample(vdb_filtering *filtering) {
  const vdb_database *db = filtering->db;
  size_t asked = 0, passed = 0, linked = db->slots - vdb_min(db->free_count, db->slots);
  for (uint64_t i = 1; i <= VDB_FILTER_SAMPLE && db->slots; i++) {
    size_t row = (size_t)((i * 0x9e3779b97f4a7c15u >> 20) % db->slots);
    if (!vdb_is_live(db, row)) continue;
    asked++;
    passed += (size_t)vdb_filter_row(db, filtering->nodes, row);
  }
  if (asked) filtering->passing = (size_t)((double)linked * (double)passed / (double)asked);
  return passed >= VDB_FILTER_LEAST && !vdb_surely_scanned(db, filtering->passing);
}

#define VDB_FILTER_CHUNKS 16u /* of one task */

static inline void vdb_filter_task(void *context, size_t task) {
  vdb_filtering *filtering = (vdb_filtering *)context;
  uint64_t passes[VDB_COLUMN_WORDS];
  for (size_t i = 0; i < VDB_FILTER_CHUNKS; i++) {
    size_t chunk = task * VDB_FILTER_CHUNKS + i, first = chunk * VDB_COLUMN_WORDS;
    if (first >= filtering->words) return;
    vdb_filter_chunk(filtering, filtering->nodes, chunk, passes);
    memcpy(filtering->out + first, passes, vdb_min(VDB_COLUMN_WORDS, filtering->words - first) * sizeof *passes);
  }
}

/* The columns that a condition asks for, made if need be. */
VDB_RARE vdb_error vdb_condition_columns(const vdb_database *db, vdb_columns *columns, const vdb_condition *asked) {
  vdb_error error = VDB_OK;
  if (asked->operation >= VDB_ALL_OF) {
    for (size_t i = 0; i < asked->count && !error; i++) error = vdb_condition_columns(db, columns, &asked->parts[i]);
    return error;
  }
  return vdb_columns_find(columns, asked->name) ? VDB_OK : vdb_columns_add(db, columns, asked->name);
}

VDB_RARE void vdb_filtering_end(vdb_filtering *filtering) {
  for (size_t i = 0; i < filtering->count; i++) {
    VDB_FREE(filtering->nodes[i].ints);
    VDB_FREE(filtering->nodes[i].numbers);
    VDB_FREE(filtering->nodes[i].codes);
    VDB_FREE(filtering->nodes[i].hashes);
  }
  VDB_FREE(filtering->nodes);
}

/* When no more rows will be asked. */
VDB_RARE void vdb_filtering_return(const vdb_database *db, vdb_filtering *filtering) {
  vdb_columns *columns = &((vdb_database *)(uintptr_t)db)->columns;
  vdb_columns_enter(columns);
  columns->lent--;
  vdb_columns_leave(columns);
  vdb_filtering_end(filtering);
}

/* A condition written out, so that two may be compared. Returns its bytes; `out` may be NULL. */
VDB_RARE size_t vdb_condition_key(const vdb_condition *condition, unsigned char *out) {
  int joins = condition->operation >= VDB_ALL_OF;
  size_t size = 0, name = joins ? 0 : strlen(condition->name);
  uint64_t head[3] = {(uint64_t)condition->operation, condition->count, name};
  if (out) memcpy(out, head, sizeof head);
  size += sizeof head;
  if (out && name) memcpy(out + size, condition->name, name);
  size += name;
  for (size_t i = 0; i < condition->count; i++) {
    if (joins) {
      size += vdb_condition_key(&condition->parts[i], out ? out + size : NULL);
      continue;
    }
    const vdb_value *value = &condition->values[i];
    uint64_t word[2] = {(uint64_t)value->type, 0};
    if (value->type == VDB_VALUE_BOOL) word[1] = value->integer != 0;
    if (value->type == VDB_VALUE_INT) memcpy(&word[1], &value->integer, 8);
    if (value->type == VDB_VALUE_FLOAT) memcpy(&word[1], &value->number, 8);
    if (value->type == VDB_VALUE_TEXT) word[1] = value->text_size;
    if (out) memcpy(out + size, word, sizeof word);
    size += sizeof word;
    if (value->type != VDB_VALUE_TEXT) continue;
    if (out && value->text_size) memcpy(out + size, value->text, value->text_size);
    size += value->text_size;
  }
  return size;
}

/* Where what was made for the same condition is kept, if no record has changed since; or the place for a new one. */
VDB_RARE vdb_kept_filter *vdb_kept_find(vdb_columns *columns, const unsigned char *key, size_t size, size_t words) {
  vdb_kept_filter *oldest = &columns->kept[0];
  for (int i = 0; i < VDB_KEPT_FILTERS; i++) {
    vdb_kept_filter *kept = &columns->kept[i];
    if (kept->key && kept->key_size == size && kept->words == words && memcmp(kept->key, key, size) == 0) return kept;
    if (kept->asked < oldest->asked) oldest = kept;
  }
  return oldest;
}

/* Makes a bitset, from columns that are made if need be, and counts what passes. If there is `by_row` and enough rows pass
 * to ask them one by one, that becomes what knows of them, to be given back by vdb_filtering_return, and there is no
 * bitset. */
VDB_RARE vdb_error vdb_filter_make(const vdb_database *db, const vdb_condition *condition, size_t nodes,
                                   vdb_passing *passing, vdb_filtering *by_row) {
  size_t words = passing->words;
  vdb_columns *columns = &((vdb_database *)(uintptr_t)db)->columns;
  vdb_filtering filtering;
  memset(&filtering, 0, sizeof filtering);
  filtering.db = db;
  filtering.out = passing->bits;
  filtering.words = words;
  filtering.nodes = (vdb_node *)VDB_MALLOC(nodes * sizeof(vdb_node));
  vdb_error error = filtering.nodes ? vdb_condition_columns(db, columns, condition) : VDB_ERROR_OUT_OF_MEMORY;
  if (!error) error = vdb_condition_compile(&filtering, condition);
  int made = !error && vdb_filter_from_order(&filtering);
  if (!error && !made && by_row && vdb_filter_sample(&filtering)) {
    columns->lent++;
    *by_row = filtering;
    return VDB_OK;
  }
  size_t chunks = (words + VDB_COLUMN_WORDS - 1) / VDB_COLUMN_WORDS;
  if (!error && !made) vdb_parallel(db, (chunks + VDB_FILTER_CHUNKS - 1) / VDB_FILTER_CHUNKS, vdb_filter_task, &filtering);
  if (!error) vdb_passing_count(db, passing, made && vdb_surely_scanned(db, filtering.passing) ? filtering.passing : SIZE_MAX);
  vdb_filtering_end(&filtering);
  return error;
}

/* Whether rows that pass are few enough, with all that are kept, to be copied. Pages of a file are not: they may be more
 * than there is memory. */
VDB_RARE int vdb_worth_packing(const vdb_database *db, const vdb_passing *passing) {
  size_t packed = passing->count;
  for (int i = 0; i < VDB_KEPT_FILTERS; i++)
    if (db->columns.kept[i].passing && db->columns.kept[i].passing->packed) packed += db->columns.kept[i].passing->count;
  return passing->count && packed <= db->slots / VDB_PACKED_SHARE && !db->paging.limit && !db->paging.on_disk;
}

/* What is kept, asked for again: counted anew if rows have changed, and copied, if that is worth while, once they have not
 * between two searches. What others may be reading is not changed but replaced. */
VDB_RARE void vdb_kept_renew(const vdb_database *db, vdb_kept_filter *kept) {
  int steady = vdb_passing_holds(db, kept->passing);
  if (steady && kept->passing->tried) return;
  vdb_passing *renewed = vdb_passing_make(kept->passing->words);
  if (!renewed) return;
  memcpy(renewed->bits, kept->passing->bits, renewed->words * sizeof(uint64_t));
  vdb_passing_leave(kept->passing);
  kept->passing = renewed;
  vdb_passing_count(db, renewed, SIZE_MAX);
  renewed->tried = steady;
  if (steady && vdb_worth_packing(db, renewed)) vdb_passing_pack(db, renewed);
}

/* Keeps what a condition was made into for whoever asks again, or, without `passing`, that it was asked; `key` is taken
 * over. */
VDB_RARE void vdb_kept_enter(vdb_kept_filter *kept, unsigned char *key, size_t key_size, size_t words,
                             vdb_passing *passing) {
  if (kept->key != key) VDB_FREE(kept->key);
  vdb_passing_leave(kept->passing);
  if (passing) vdb_passing_enter(passing);
  kept->passing = passing;
  kept->words = words;
  kept->key = key;
  kept->key_size = key_size;
}

/* The rows that pass a condition, to be left by vdb_passing_leave. Under a reader's lock: searches that filter by value
 * make their bitsets one after the other, each on all threads. With `by_row`, zeroed, there may be none: then that has
 * nodes (see vdb_filter_make). */
VDB_RARE vdb_error vdb_filter_by(const vdb_database *db, const vdb_condition *condition, vdb_filtering *by_row,
                                 vdb_passing **out) {
  vdb_columns *columns = &((vdb_database *)(uintptr_t)db)->columns;
  size_t nodes = vdb_condition_nodes(condition, 0), words = (db->slots + 63) / 64;
  *out = NULL;
  if (nodes == SIZE_MAX || nodes > SIZE_MAX / sizeof(vdb_node)) return VDB_ERROR_INVALID_ARGUMENT;
  size_t size = vdb_condition_key(condition, NULL);
  unsigned char *key = (unsigned char *)VDB_MALLOC(size);
  if (!key) return VDB_ERROR_OUT_OF_MEMORY;
  (void)vdb_condition_key(condition, key);
  vdb_columns_enter(columns);
  if (columns->count > VDB_COLUMNS_MOST && !columns->lent) vdb_columns_release(columns);
  vdb_error error = vdb_columns_refresh(db, columns);
  vdb_kept_filter *kept = vdb_kept_find(columns, key, size, words);
  int again = !error && kept->key && kept->words == words && kept->key_size == size && memcmp(kept->key, key, size) == 0;
  vdb_passing *passing = NULL;
  if (again && kept->passing) {
    vdb_kept_renew(db, kept);
    passing = kept->passing;
    vdb_passing_enter(passing);
  } else if (!error) {
    passing = vdb_passing_make(words);
    error = !passing ? VDB_ERROR_OUT_OF_MEMORY
                     : vdb_filter_make(db, condition, nodes, passing, again ? NULL : by_row);
    if (error || (by_row && by_row->nodes)) vdb_passing_leave(passing), passing = NULL;
    if (!error) vdb_kept_enter(kept, key, size, words, passing), key = NULL;
  }
  if (!error) kept->asked = ++columns->searches;
  vdb_columns_leave(columns);
  VDB_FREE(key);
  *out = passing;
  return error;
}
#ifdef VDB_CALM
#pragma GCC pop_options
#endif

/* ------------------------------------------------------------------------------------------------------------------
 * 7 Exact search
 *
 * A scan gives every row a score that is wrong by at most a known bound. Turned into a key, where greater is nearer,
 * each row then has a lower and an upper bound. A row whose upper bound is below the k-th greatest lower bound cannot
 * be in the answer. The few others are a shortlist; their exact distances, in double precision, decide. This is how
 * codes of one byte, or products of split 16-bit numbers, give the very answer of a full scan.
 *
 *     metric      scan                     key                             distance -> key
 *     cosine      <q/|q|, x>               score / |x|                     1 - d
 *     dot         <q/|q|, x>               score                           -d / |q|
 *     Euclidean   sum (q - x)^2            -score                          -d^2
 *     Euclidean   <q, x> (codes, tiles)    score - |x|^2 / 2               (|q|^2 - d^2) / 2
 *
 * Every bound has slack for the rounding of the answer's distance to float, so that rows of equal float distance are
 * all looked at and the lower index wins. Most of it is relative to the row; `constant` of vdb_scan is the absolute part,
 * for what float cannot tell apart near zero: a dot product of 1e-47 is answered as 0, and ties with others. Those of
 * 1e39 and more are all answered as infinite, and tie: `lowest` and `highest`. Rows whose norm is outside 2^-60..2^60
 * have no useful bound in float: they are always on the shortlist.
 */
typedef enum { VDB_FORM_COSINE, VDB_FORM_DOT, VDB_FORM_SQUARES, VDB_FORM_EXPANDED } vdb_form;

#define VDB_SLACK 9.5367432e-7f /* 2^-20 */
#define VDB_UNBOUNDED 3.0e38f   /* upper bound of a row that must be measured */
#define VDB_LEAST 2.3509887e-38f /* 2^-125: more than what a float below 2^-126 may be wrong by, flushed to zero or not */
#define VDB_SCAN_ROWS VDB_TILE_ROWS
#define VDB_PARALLEL_BYTES ((size_t)1 << 19) /* of rows: below this waking a thread costs more than it saves */

typedef struct {
  float distance;
  uint32_t row;
} vdb_found;

/* A query, ready for everything. `probe.values` is scale * values: of norm 1 for cosine and dot product, and unscaled
 * for Euclidean. */
typedef struct {
  const float *values; /* [padded] as asked */
  double square;       /* exact sum of squares */
  float norm, scale;
  float missing;       /* norm of probe.values less what its codes say */
  int wild;            /* Euclidean, and too great or small for bounds in float */
  vdb_probe probe;
} vdb_question;

/* What scans read of a row: its codes, or the vector. */
static inline vdb_element vdb_scanned_element(const vdb_database *db) {
  return vdb_has_codes(db->options.storage) ? VDB_I8 : vdb_element_of(db->options.storage);
}
static inline size_t vdb_scanned_bytes(const vdb_database *db) {
  return db->dimensions * (vdb_has_codes(db->options.storage) ? 1 : vdb_element_size(db->options.storage));
}
static inline const unsigned char *vdb_scanned_rows(const vdb_database *db, const vdb_block *block) {
  return vdb_has_codes(db->options.storage) ? (const unsigned char *)block->codes : block->vectors;
}

static inline size_t vdb_padded(size_t dimensions) { return vdb_round_up(dimensions, VDB_PAD); }

static inline size_t vdb_question_bytes(const vdb_database *db) {
  return vdb_padded(db->dimensions) * (2 * sizeof(float) + (vdb_has_codes(db->options.storage) ? 2 : 0));
}

/* Codes in two parts: what the first part misses, the second has to a 254th of it. */
VDB_ONCE void vdb_make_codes(size_t dimensions, size_t padded, int8_t *high, int8_t *low, vdb_question *question) {
  vdb_probe *probe = &question->probe;
  double missed = 0.0;
  probe->high = high;
  probe->low = low;
  memset(high, 0, 2 * padded);
  probe->high_scale = vdb_to_i8(probe->values, dimensions, high);
  probe->low_scale = probe->high_scale / 254.0f;
  probe->high_sum = probe->low_sum = 0;
  for (size_t j = 0; j < dimensions; j++) {
    float rest = probe->values[j] - probe->high_scale * (float)high[j];
    float code = probe->low_scale > 0.0f ? rest / probe->low_scale : 0.0f;
    int rounded = (int)(code + (code < 0.0f ? -0.5f : 0.5f));
    low[j] = (int8_t)(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
    probe->high_sum += high[j];
    probe->low_sum += low[j];
    double said = (double)probe->high_scale * high[j] + (double)probe->low_scale * low[j];
    missed += ((double)probe->values[j] - said) * ((double)probe->values[j] - said);
  }
  question->missing = (float)(sqrt(missed) * 1.000001);
}

/* `memory` has vdb_question_bytes() and VDB_ALIGNMENT. */
VDB_ONCE void vdb_ask(const vdb_database *db, const float *query, void *memory, vdb_question *out) {
  size_t dimensions = db->dimensions, padded = vdb_padded(dimensions);
  float *values = (float *)memory, *scaled = values + padded;
  double sums[2];
  memset(out, 0, sizeof *out);
  memcpy(values, query, dimensions * sizeof(float));
  memset(values + dimensions, 0, (padded - dimensions) * sizeof(float));
  vdb_active()->exact(values, values, dimensions, 0, sums);
  out->values = values;
  out->square = sums[1];
  double norm = sqrt(out->square);
  out->norm = (float)norm;
  out->scale = 1.0f;
  if (db->metric == VDB_METRIC_EUCLIDEAN) {
    memcpy(scaled, values, padded * sizeof(float));
    out->wild = !(norm < VDB_GREAT);
  } else {
    double inverse = norm > 0.0 ? 1.0 / norm : 0.0;
    for (size_t j = 0; j < padded; j++) scaled[j] = (float)(values[j] * inverse);
  }
  out->probe.values = scaled;
  if (vdb_has_codes(db->options.storage)) {
    int8_t *codes = (int8_t *)(scaled + padded);
    if (!out->wild) vdb_make_codes(dimensions, padded, codes, codes + padded, out);
    else {
      memset(codes, 0, 2 * padded);
      out->probe.high = codes;
      out->probe.low = codes + padded;
    }
  }
}

/* From sums as the kernels' `exact` gives them. */
static inline float vdb_finish_distance(vdb_metric metric, const double sums[2], double query_square) {
  if (metric == VDB_METRIC_EUCLIDEAN) return (float)sqrt(sums[0]);
  if (metric == VDB_METRIC_DOT_PRODUCT) return (float)-sums[0];
  if (query_square == 0.0 || sums[1] == 0.0) return 1.0f;
  double cosine = sums[0] / (sqrt(query_square) * sqrt(sums[1]));
  return (float)(1.0 - (cosine > 1.0 ? 1.0 : cosine < -1.0 ? -1.0 : cosine));
}

/* The distance as answered. `decoded` is room for a vector, used unless rows are f32. */
VDB_ONCE float vdb_exact_distance(const vdb_database *db, const vdb_question *question, size_t row,
                                       float *decoded) {
  double sums[2];
  const float *vector = (const float *)vdb_vector_at(db, row);
  if (vdb_element_of(db->options.storage) != VDB_F32) {
    vdb_decode_row(db, row, decoded);
    vector = decoded;
  } else if (db->paging.limit) {
    vector = vdb_fetch_vector(db, row, decoded);
  }
  vdb_active()->exact(question->values, vector, db->dimensions, db->metric == VDB_METRIC_EUCLIDEAN, sums);
  return vdb_finish_distance(db->metric, sums, question->square);
}

static inline int vdb_passes(const vdb_database *db, const vdb_query_options *options, size_t row) {
  if (!vdb_is_live(db, row)) return 0;
  if (options->bitset && row >> 6 >= options->bitset_words) return 0;
  if (options->bitset && !(options->bitset[row >> 6] >> (row & 63) & 1u)) return 0;
  return !options->filter || options->filter((uint64_t)row, options->filter_context);
}

/* --- the shortlist of one query --- */
typedef struct {
  float upper;
  uint32_t row;
} vdb_candidate;

typedef struct {
  size_t k;
  float threshold;      /* a row whose upper bound is below cannot be in the answer */
  float *lowers;        /* heap of the k greatest lower bounds, the least first */
  size_t lower_count;
  vdb_candidate *list;  /* rows not yet measured */
  size_t count, room;
  vdb_found *best;      /* heap of the k nearest measured rows, the farthest first */
  size_t found;
} vdb_shortlist;

/* What one query needs to turn rows into keys. */
typedef struct {
  const vdb_database *db;
  const vdb_question *question;
  const vdb_query_options *options;
  vdb_form form;
  float gamma, delta; /* see vdb_row_terms */
  float constant;     /* error of the key that does not depend on the row */
  float floor;        /* the same for squares, where it is part of the upper bound */
  float highest;      /* keys count no more than this: below VDB_UNBOUNDED; where dot products leave float, and tie */
  float lowest;       /* keys below this count as -infinity: there dot products leave float, and tie, on the other side */
  float *decoded;
  int few;            /* a bitset leaves few rows, */
  const vdb_passing *packed; /* which are copied; NULL if they are not */
} vdb_scan;

static inline size_t vdb_shortlist_room(size_t k) { return 2 * k + 256; }

static inline size_t vdb_shortlist_bytes(size_t k) {
  return vdb_round_up(k * sizeof(float) + vdb_shortlist_room(k) * sizeof(vdb_candidate) + k * sizeof(vdb_found), 64);
}

VDB_ONCE void vdb_shortlist_make(vdb_shortlist *list, size_t k, void *memory) {
  memset(list, 0, sizeof *list);
  list->k = k;
  list->threshold = -INFINITY;
  list->room = vdb_shortlist_room(k);
  list->list = (vdb_candidate *)memory;
  list->best = (vdb_found *)(void *)(list->list + list->room);
  list->lowers = (float *)(void *)(list->best + k);
}

VDB_INLINE int vdb_farther(vdb_found a, vdb_found b) {
  return a.distance > b.distance || (a.distance == b.distance && a.row > b.row);
}

static inline void vdb_keep_lower(vdb_shortlist *list, float lower) {
  float *heap = list->lowers;
  size_t place = list->lower_count, child;
  if (place < list->k) { /* sift up */
    for (list->lower_count++; place && heap[(place - 1) / 2] > lower; place = (place - 1) / 2)
      heap[place] = heap[(place - 1) / 2];
    heap[place] = lower;
  } else if (lower > heap[0]) { /* in place of the least, sift down */
    for (place = 0; (child = 2 * place + 1) < list->k; place = child) {
      if (child + 1 < list->k && heap[child + 1] < heap[child]) child++;
      if (heap[child] >= lower) break;
      heap[place] = heap[child];
    }
    heap[place] = lower;
  }
  if (list->lower_count == list->k && heap[0] > list->threshold) list->threshold = heap[0];
}

/* Puts `found` in place of the farthest of a heap. */
static inline void vdb_sift_found(vdb_found *heap, size_t count, vdb_found found) {
  size_t place = 0, child;
  for (; (child = 2 * place + 1) < count; place = child) {
    if (child + 1 < count && vdb_farther(heap[child + 1], heap[child])) child++;
    if (!vdb_farther(heap[child], found)) break;
    heap[place] = heap[child];
  }
  heap[place] = found;
}

static inline void vdb_keep_found(vdb_shortlist *list, vdb_found found) {
  vdb_found *heap = list->best;
  size_t place = list->found;
  if (place < list->k) {
    for (list->found++; place && vdb_farther(found, heap[(place - 1) / 2]); place = (place - 1) / 2)
      heap[place] = heap[(place - 1) / 2];
    heap[place] = found;
  } else if (vdb_farther(heap[0], found)) {
    vdb_sift_found(heap, list->k, found);
  }
}

/* A key that no row at this distance or nearer falls below, slack included. */
VDB_ONCE float vdb_key_of(const vdb_scan *scan, float distance) {
  double d = distance, square = scan->question->square, key;
  if (!vdb_is_finite(distance)) return -INFINITY;
  switch (scan->form) {
    case VDB_FORM_COSINE: key = 1.0 - d; break;
    case VDB_FORM_DOT: key = square > 0.0 ? -d / sqrt(square) - scan->constant : -INFINITY; break;
    case VDB_FORM_SQUARES: key = -d * d * (1.0 + 1.0e-6); break;
    default: key = (square - d * d) / 2.0 - 1.0e-6 * (square + d * d) - scan->constant;
  }
  if (key < scan->lowest) return -INFINITY;
  return key < scan->highest ? (float)key : scan->highest;
}

static inline int vdb_by_upper(const void *a, const void *b) {
  const vdb_candidate *x = (const vdb_candidate *)a, *y = (const vdb_candidate *)b;
  if (x->upper != y->upper) return x->upper < y->upper ? 1 : -1;
  return x->row < y->row ? -1 : x->row > y->row;
}

static inline void vdb_prefetch_row(const vdb_database *db, size_t row) {
  const char *vector = (const char *)vdb_vector_at(db, row);
  size_t bytes = vdb_min(db->dimensions * vdb_element_size(db->options.storage), 4096);
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(vector + i);
}

/* Measures the shortlist, most promising first, until no other can be in the answer, and empties it. */
VDB_ONCE void vdb_settle(const vdb_scan *scan, vdb_shortlist *list) {
  size_t kept = 0;
  for (size_t i = 0; i < list->count; i++)
    if (!(list->list[i].upper < list->threshold)) list->list[kept++] = list->list[i];
  if (kept > list->k - list->found) qsort(list->list, kept, sizeof(vdb_candidate), vdb_by_upper);
  for (size_t i = 0; i < kept; i++) {
    if (list->list[i].upper < list->threshold) break;
    if (i + 2 < kept) vdb_prefetch_row(scan->db, list->list[i + 2].row);
    uint32_t row = list->list[i].row;
    vdb_found found = {vdb_exact_distance(scan->db, scan->question, row, scan->decoded), row};
    vdb_keep_found(list, found);
    if (list->found == list->k) {
      float key = vdb_key_of(scan, list->best[0].distance);
      if (key > list->threshold) list->threshold = key;
    }
  }
  list->count = 0;
}

static inline void vdb_shortlist_add(const vdb_scan *scan, vdb_shortlist *list, float upper, float lower,
                                     uint32_t row) {
  vdb_candidate candidate = {upper, row};
  if (list->count == list->room) vdb_settle(scan, list);
  list->list[list->count++] = candidate;
  vdb_keep_lower(list, lower);
}

/* What another thread found in other rows. Bounds and distances of all rows count together. */
VDB_ONCE void vdb_shortlist_merge(const vdb_scan *scan, vdb_shortlist *into, const vdb_shortlist *from) {
  for (size_t i = 0; i < from->lower_count; i++) vdb_keep_lower(into, from->lowers[i]);
  for (size_t i = 0; i < from->found; i++) vdb_keep_found(into, from->best[i]);
  for (size_t i = 0; i < from->count; i++) {
    if (from->list[i].upper < into->threshold) continue;
    if (into->count == into->room) vdb_settle(scan, into);
    into->list[into->count++] = from->list[i];
  }
}

/* --- bounds --- */
static inline vdb_form vdb_form_of(const vdb_database *db, int tiles) {
  if (db->metric == VDB_METRIC_COSINE) return VDB_FORM_COSINE;
  if (db->metric == VDB_METRIC_DOT_PRODUCT) return VDB_FORM_DOT;
  return tiles || vdb_has_codes(db->options.storage) ? VDB_FORM_EXPANDED : VDB_FORM_SQUARES;
}

/* `relative` and `missing` say how wrong scores are: by (relative * |query| + missing) * |row| at most. */
VDB_ONCE vdb_scan vdb_scan_make(const vdb_database *db, const vdb_question *question,
                                     const vdb_query_options *options, vdb_form form, float relative, float missing,
                                     float *decoded) {
  vdb_scan scan;
  float norm = form == VDB_FORM_EXPANDED ? question->norm : 1.0f;
  scan.db = db;
  scan.question = question;
  scan.options = options;
  scan.form = form;
  scan.gamma = (relative + 2.0f * VDB_SLACK) * norm + missing;
  scan.delta = norm * 1.000001f;
  scan.constant = 0.0f;
  scan.floor = (float)(db->dimensions + 16) * VDB_LEAST;
  scan.highest = 2.0e38f;
  scan.lowest = -INFINITY;
  scan.decoded = decoded;
  scan.few = 0;
  scan.packed = NULL;
  if (form == VDB_FORM_SQUARES) scan.gamma = relative + VDB_SLACK;
  if (form == VDB_FORM_EXPANDED) scan.constant = (float)(question->square * VDB_SLACK) + 8.0f * VDB_LEAST;
  if (form == VDB_FORM_DOT) {
    double length = fmax(sqrt(question->square), 1.0e-60);
    scan.constant = (float)fmin(VDB_LEAST / length, 1.0e38);
    scan.highest = (float)(3.0e38 / fmax(length, 1.5));
    scan.lowest = (float)fmax(-3.0e38 / length, -3.0e38);
  }
  return scan;
}

/* `count` <= VDB_TILE_ROWS numbers of a block from `first` on, or those that `picked` names (offsets from `first`). The
 * places behind them, and all where there is no array, get `otherwise`. */
VDB_INLINE void vdb_pick(const float *from, size_t first, const uint8_t *picked, size_t count, float otherwise,
                         float *out) {
  for (size_t i = 0; i < VDB_TILE_ROWS; i++) out[i] = otherwise;
  if (!from) return;
  if (count == VDB_TILE_ROWS && !picked) memcpy(out, from + first, VDB_TILE_ROWS * sizeof(float));
  else
    for (size_t i = 0; i < count; i++) out[i] = from[first + (picked ? picked[i] : i)];
}

/* The terms of rows from their norms, scales and residuals, a whole tile of them. Loops go over all, so that compilers make
 * vectors of them: with codes a scan reads a row in 15 ns, and this is part of it. */
VDB_ONCE void vdb_terms_from(const vdb_scan *scan, const float *norms, const float *scales, const float *residuals,
                               size_t count, vdb_row_terms *out) {
  uint32_t signs = 0;
  for (size_t i = 0; i < VDB_TILE_ROWS; i++) {
    out->alpha[i] = scales[i], out->beta[i] = 0.0f, out->rho[i] = norms[i], out->residual[i] = residuals[i];
    signs |= vdb_bits(norms[i]); /* a minimum of floats would make no vectors */
  }
  if (scan->form == VDB_FORM_COSINE) {
    for (size_t i = 0; i < VDB_TILE_ROWS; i++) {
      float inverse = 1.0f / (norms[i] > 1.0e-30f ? norms[i] : 1.0e-30f); /* a zero vector has the key 0 */
      out->alpha[i] *= inverse, out->residual[i] *= inverse, out->rho[i] = 1.0f;
    }
  } else if (scan->form == VDB_FORM_EXPANDED) {
    for (size_t i = 0; i < VDB_TILE_ROWS; i++) out->beta[i] = norms[i] * norms[i] * (VDB_SLACK - 0.5f);
  } else if (scan->form == VDB_FORM_SQUARES) {
    for (size_t i = 0; i < VDB_TILE_ROWS; i++) {
      out->alpha[i] = scan->gamma - 1.0f, out->beta[i] = scan->floor; /* what underflow can hide */
      out->rho[i] = out->residual[i] = 0.0f;
    }
  }
  for (size_t i = 0; signs >> 31 && i < count; i++) {
    if (!(norms[i] < 0.0f)) continue;
    out->alpha[i] = out->rho[i] = out->residual[i] = 0.0f;
    out->beta[i] = VDB_UNBOUNDED;
  }
}

/* The terms of rows, given as to vdb_pick. */
VDB_ONCE void vdb_terms(const vdb_scan *scan, const vdb_block *block, size_t first, const uint8_t *picked,
                             size_t count, vdb_row_terms *out) {
  float norms[VDB_TILE_ROWS], scales[VDB_TILE_ROWS], residuals[VDB_TILE_ROWS];
  vdb_pick(block->norms, first, picked, count, 1.0f, norms);
  vdb_pick(block->scales, first, picked, count, 1.0f, scales);
  vdb_pick(block->residuals, first, picked, count, 0.0f, residuals);
  vdb_terms_from(scan, norms, scales, residuals, count, out);
}

/* Where what is read of a row lies; numbers that rows do not have are elsewhere. */
typedef struct {
  const void *row;
  const float *norm, *scale, *residual;
} vdb_row_place;

/* The terms of rows that lie anywhere. */
VDB_ONCE void vdb_terms_of_rows(const vdb_scan *scan, const vdb_row_place *places, size_t count, vdb_row_terms *out) {
  float norms[VDB_TILE_ROWS], scales[VDB_TILE_ROWS], residuals[VDB_TILE_ROWS];
  for (size_t i = 0; i < VDB_TILE_ROWS; i++) {
    const vdb_row_place *place = &places[vdb_min(i, count - 1)];
    norms[i] = *place->norm;
    scales[i] = *place->scale;
    residuals[i] = *place->residual;
  }
  vdb_terms_from(scan, norms, scales, residuals, count, out);
}

/* The lower bound that belongs to an upper one. */
static inline float vdb_lower_of(const vdb_scan *scan, const vdb_row_terms *terms, size_t i, float upper, float score) {
  if (upper >= VDB_UNBOUNDED) return -INFINITY;
  if (scan->form == VDB_FORM_SQUARES) return -score * (1.0f + scan->gamma) - terms->beta[i];
  float error = terms->rho[i] * scan->gamma + terms->residual[i] * scan->delta;
  if (scan->form == VDB_FORM_EXPANDED) error += terms->rho[i] * terms->rho[i] * VDB_SLACK;
  float lower = upper - 2.0f * error * (1.0f + VDB_SLACK) - 2.0f * scan->constant - VDB_SLACK * fabsf(upper);
  if (lower < scan->lowest) return -INFINITY;
  return lower < scan->highest ? lower : scan->highest;
}

/* --- which rows may be answered --- */

/* Live rows that the bitset lets pass; or about so many as a condition does. */
VDB_ONCE size_t vdb_count_passing(const vdb_database *db, const vdb_query_options *options) {
  if (vdb_passing_holds(db, options->passing)) return options->passing->count;
  if (options->filter == vdb_filter_asks) return ((const vdb_filtering *)options->filter_context)->passing;
  if (!options->bitset) return db->count;
  return vdb_active()->count(options->bitset, db->live, vdb_min((db->slots + 63) / 64, options->bitset_words));
}

/* Whether a bitset leaves so few rows that picking them beats scanning all. */
VDB_ONCE int vdb_few_pass(const vdb_database *db, const vdb_query_options *options) {
  return options->bitset && vdb_count_passing(db, options) < db->slots / 8;
}

/* --- one query --- */
/* Which of the 32 rows from `row` on may be in the answer, but for the filter function. */
static inline uint32_t vdb_row_mask(const vdb_database *db, const vdb_query_options *options, size_t row) {
  uint64_t mask = db->live[row >> 6];
  if (options->bitset) mask &= row >> 6 < options->bitset_words ? options->bitset[row >> 6] : 0;
  return (uint32_t)(mask >> (row & 63));
}

typedef struct {
  const vdb_scan *scan;
  size_t rows_per_task;
  vdb_shortlist *lists; /* [tasks] */
  float shared;         /* the greatest threshold that a task has reached; read and written atomically */
} vdb_scan_job;

static inline float vdb_share_threshold(float *shared, float own) {
  float seen;
  __atomic_load(shared, &seen, __ATOMIC_RELAXED);
  while (own > seen && !__atomic_compare_exchange(shared, &seen, &own, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
  return own > seen ? own : seen;
}

/* Up to 32 rows that are scored side by side. */
typedef struct {
  size_t count;
  uint32_t rows[VDB_SCAN_ROWS];
  float scores[VDB_SCAN_ROWS], uppers[VDB_SCAN_ROWS];
  vdb_row_terms terms;
} vdb_group;

/* The scores of a group, whose rows lie at `rows`. */
static inline void vdb_score_rows(const vdb_scan *scan, const void *const *rows, vdb_group *group) {
  const vdb_database *db = scan->db;
  const vdb_question *question = scan->question;
  const vdb_kernel_set *kernels = vdb_active();
  vdb_element element = vdb_scanned_element(db);
  const float *values = question->probe.values;
  if (element == VDB_I8) kernels->dots_i8(&question->probe, rows, group->count, db->dimensions, group->scores);
  else if (scan->form == VDB_FORM_SQUARES)
    kernels->squares[element](values, rows, group->count, db->dimensions, group->scores);
  else kernels->dots[element](values, rows, group->count, db->dimensions, group->scores);
}

VDB_INLINE int vdb_group_passes(const vdb_scan *scan, float threshold, vdb_group *group) {
  float gamma = scan->form == VDB_FORM_SQUARES ? 0.0f : scan->gamma;
  return scan->question->wild || vdb_active()->gate(group->scores, &group->terms, group->count, gamma, scan->delta, threshold,
                                                    group->uppers);
}

/* Scores the rows of `mask` from `row` on. 0 if none of them reaches the threshold. */
VDB_ONCE int vdb_score_group(const vdb_scan *scan, size_t row, uint32_t mask, float threshold, vdb_group *group) {
  const vdb_database *db = scan->db;
  const vdb_block *block = vdb_block_of(db, row);
  size_t first = vdb_row_in_block(db, row), count = 0;
  size_t stride = vdb_scanned_bytes(db);
  const unsigned char *base = vdb_scanned_rows(db, block);
  const void *rows[VDB_SCAN_ROWS];
  uint8_t picked[VDB_SCAN_ROWS]; /* offsets from the first row */
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    picked[count] = (uint8_t)__builtin_ctz(rest);
    group->rows[count] = (uint32_t)row + picked[count];
    rows[count] = base + (first + picked[count]) * stride;
    count++;
  }
  group->count = count;
  vdb_score_rows(scan, rows, group);
  vdb_terms(scan, block, first, count == VDB_SCAN_ROWS ? NULL : picked, count, &group->terms);
  return vdb_group_passes(scan, threshold, group);
}

/* Adds the rows of a group that may be in the answer to the list. */
VDB_ONCE void vdb_keep_group(const vdb_scan *scan, const vdb_group *group, vdb_shortlist *list) {
  for (size_t i = 0; i < group->count; i++) {
    float upper = scan->question->wild || !vdb_is_finite(group->uppers[i]) ? VDB_UNBOUNDED : group->uppers[i];
    if (upper < list->threshold) continue;
    if (scan->options->filter && !scan->options->filter(group->rows[i], scan->options->filter_context)) continue;
    float lower = vdb_lower_of(scan, &group->terms, i, upper, group->scores[i]);
    vdb_shortlist_add(scan, list, upper, lower, group->rows[i]);
  }
}

#define VDB_FEW_ROWS 512u /* gathered at a time, at least */
#define VDB_FEW_WORDS 128u

/* Rows that a bitset leaves, on the way to be scored: where what is read of 32 of them and of the next 32 lies. */
typedef struct {
  size_t word, last; /* words of the bitset that are not yet looked at */
  size_t begin, end; /* rows */
  size_t count;
  uint32_t rows[VDB_FEW_ROWS + 64 * VDB_FEW_WORDS + 2];
  vdb_row_place places[2][VDB_SCAN_ROWS];
} vdb_few;

/* The numbers of more rows. Whether a word has a bit, or a second one, cannot be foreseen where 1% pass, and a wrong guess
 * costs as much as a row: so words with a bit are found, and their first two bits written, without a branch. */
VDB_ONCE void vdb_few_gather(const vdb_scan *scan, vdb_few *few) {
  const uint64_t *live = scan->db->live, *bitset = scan->options->bitset;
  size_t count = few->count;
  while (count < VDB_FEW_ROWS && few->word < few->last) {
    uint64_t words[VDB_FEW_WORDS + 1];
    uint32_t firsts[VDB_FEW_WORDS + 1];
    size_t found = 0, last = vdb_min(few->word + VDB_FEW_WORDS, few->last);
    for (size_t word = few->word; word < last; word++) {
      words[found] = live[word] & bitset[word];
      firsts[found] = (uint32_t)(word << 6);
      found += words[found] != 0;
    }
    if (found && firsts[0] < few->begin) words[0] &= ~(uint64_t)0 << (few->begin & 63);
    if (found && few->end - firsts[found - 1] < 64) words[found - 1] &= ((uint64_t)1 << (few->end & 63)) - 1;
    for (size_t i = 0; i < found; i++) {
      uint64_t bits = words[i], rest = bits & (bits - 1);
      few->rows[count] = firsts[i] + (uint32_t)__builtin_ctzll(bits | (uint64_t)1 << 63);
      count += bits != 0;
      few->rows[count] = firsts[i] + (uint32_t)__builtin_ctzll(rest | (uint64_t)1 << 63);
      count += rest != 0;
      for (rest &= rest - 1; rest; rest &= rest - 1) few->rows[count++] = firsts[i] + (uint32_t)__builtin_ctzll(rest);
    }
    few->word = last;
  }
  few->count = count;
}

/* Finds where up to 32 rows lie, and asks for what will be read of them. */
VDB_ONCE void vdb_few_fetch(const vdb_database *db, const uint32_t *rows, size_t count, vdb_row_place *places) {
  static const float one = 1.0f, none = 0.0f;
  size_t bytes = vdb_scanned_bytes(db), fetched = vdb_min(bytes, 1024);
  for (size_t i = 0; i < count; i++) {
    const vdb_block *block = vdb_block_of(db, rows[i]);
    size_t place = vdb_row_in_block(db, rows[i]);
    const unsigned char *row = vdb_scanned_rows(db, block) + place * bytes;
    places[i].row = row;
    places[i].norm = &block->norms[place];
    places[i].scale = block->scales ? &block->scales[place] : &one;
    places[i].residual = block->residuals ? &block->residuals[place] : &none;
    for (size_t at = 0; at < fetched; at += 64) __builtin_prefetch(row + at);
    __builtin_prefetch(places[i].norm);
    __builtin_prefetch(places[i].scale);
    __builtin_prefetch(places[i].residual);
  }
}

/* Where a bitset leaves few rows: they are gathered, so that as many are scored side by side as where all pass, and the
 * memory has the next ones on their way meanwhile. */
VDB_ONCE void vdb_scan_few(const vdb_scan *scan, size_t begin, size_t end, float *shared, vdb_shortlist *list) {
  const vdb_database *db = scan->db;
  vdb_few few;
  vdb_group group;
  const void *rows[VDB_SCAN_ROWS];
  unsigned now = 0;
  few.begin = begin, few.end = end, few.count = 0;
  few.word = begin >> 6, few.last = vdb_min((end + 63) / 64, scan->options->bitset_words);
  vdb_few_gather(scan, &few);
  vdb_few_fetch(db, few.rows, vdb_min(few.count, VDB_SCAN_ROWS), few.places[0]);
  for (size_t done = 0; few.count > done; done += group.count, now ^= 1) {
    if (few.count - done < 2 * VDB_SCAN_ROWS) {
      memmove(few.rows, few.rows + done, (few.count - done) * sizeof(uint32_t));
      few.count -= done;
      done = 0;
      size_t before = few.count;
      vdb_few_gather(scan, &few);
      if (before < VDB_SCAN_ROWS) /* the group was not full when it was fetched */
        vdb_few_fetch(db, few.rows, vdb_min(few.count, VDB_SCAN_ROWS), few.places[now]);
    }
    group.count = vdb_min(few.count - done, VDB_SCAN_ROWS);
    size_t next = vdb_min(few.count - done - group.count, VDB_SCAN_ROWS);
    vdb_few_fetch(db, few.rows + done + group.count, next, few.places[now ^ 1]);
    for (size_t i = 0; i < group.count; i++) rows[i] = few.places[now][i].row;
    memcpy(group.rows, few.rows + done, group.count * sizeof(uint32_t));
    list->threshold = vdb_share_threshold(shared, list->threshold);
    vdb_score_rows(scan, rows, &group);
    vdb_terms_of_rows(scan, few.places[now], group.count, &group.terms);
    if (vdb_group_passes(scan, list->threshold, &group)) vdb_keep_group(scan, &group, list);
  }
}

/* Rows that were copied, from `begin` on. */
VDB_ONCE void vdb_scan_packed(const vdb_scan *scan, size_t begin, size_t end, float *shared, vdb_shortlist *list) {
  size_t stride = vdb_scanned_bytes(scan->db);
  const vdb_block *block = &scan->packed->rows;
  const unsigned char *base = vdb_scanned_rows(scan->db, block);
  const void *rows[VDB_SCAN_ROWS];
  vdb_group group;
  for (size_t place = begin; place < end; place += VDB_SCAN_ROWS) {
    group.count = vdb_min(end - place, VDB_SCAN_ROWS);
    for (size_t i = 0; i < group.count; i++) rows[i] = base + (place + i) * stride;
    memcpy(group.rows, scan->packed->packed + place, group.count * sizeof(uint32_t));
    list->threshold = vdb_share_threshold(shared, list->threshold);
    vdb_score_rows(scan, rows, &group);
    vdb_terms(scan, block, place, NULL, group.count, &group.terms);
    if (vdb_group_passes(scan, list->threshold, &group)) vdb_keep_group(scan, &group, list);
  }
}

static inline void vdb_scan_task(void *context, size_t task) {
  vdb_scan_job *job = (vdb_scan_job *)context;
  const vdb_database *db = job->scan->db;
  vdb_scan scan = *job->scan;
  scan.decoded += task * vdb_padded(db->dimensions);
  vdb_shortlist *list = &job->lists[task];
  size_t row = task * job->rows_per_task, end = vdb_min(row + job->rows_per_task, scan.packed ? scan.packed->count : db->slots);
  if (scan.packed) {
    vdb_scan_packed(&scan, row, end, &job->shared, list);
    return;
  }
  if (scan.few) {
    vdb_scan_few(&scan, row, end, &job->shared, list);
    return;
  }
  for (; row < end; row += VDB_SCAN_ROWS) {
    vdb_group group;
    uint32_t mask = vdb_row_mask(db, scan.options, row);
    if (end - row < VDB_SCAN_ROWS) mask &= (1u << (end - row)) - 1u;
    if (!mask) continue;
    list->threshold = vdb_share_threshold(&job->shared, list->threshold);
    if (db->paging.scans) vdb_touch(db, VDB_SCAN_ROWS * vdb_scanned_bytes(db));
    if (vdb_score_group(&scan, row, mask, list->threshold, &group)) vdb_keep_group(&scan, &group, list);
  }
}

/* How many tasks a pass over so many rows is cut into, and how many rows each has (whole groups). */
VDB_ONCE size_t vdb_cut_rows(const vdb_database *db, size_t rows, size_t work, size_t *rows_per_task) {
  size_t threads = vdb_thread_count(db), groups = (rows + VDB_SCAN_ROWS - 1) / VDB_SCAN_ROWS;
  size_t tasks = threads == 1 || work < VDB_PARALLEL_BYTES ? 1 : vdb_min(4 * threads, groups);
  *rows_per_task = vdb_max(1, (groups + tasks - 1) / tasks) * VDB_SCAN_ROWS;
  return vdb_max(1, (rows + *rows_per_task - 1) / *rows_per_task);
}

/* The nearest rows, sorted: the heap gives the farthest first. */
VDB_ONCE size_t vdb_take_found(vdb_shortlist *list, vdb_found *out) {
  for (size_t rest = list->found; rest; rest--) {
    out[rest - 1] = list->best[0];
    vdb_sift_found(list->best, rest - 1, list->best[rest - 1]);
  }
  return list->found;
}

/* Every distance is 1: the first k rows that pass are the answer. */
VDB_LIGHT size_t vdb_scan_zero(const vdb_database *db, const vdb_query_options *options, size_t k, vdb_found *out) {
  size_t found = 0;
  for (size_t row = 0; row < db->slots && found < k; row++) {
    if (!vdb_passes(db, options, row)) continue;
    out[found].distance = 1.0f;
    out[found++].row = (uint32_t)row;
  }
  return found;
}

/* The exact answer to one question: out [options->k] by (distance, row). */
VDB_ONCE vdb_error vdb_scan_one(const vdb_database *db, const vdb_question *question,
                                     const vdb_query_options *options, vdb_found *out, size_t *found) {
  size_t k = vdb_min(options->k, db->count);
  *found = 0;
  if (!k) return VDB_OK;
  if (db->metric == VDB_METRIC_COSINE && question->square == 0.0) {
    *found = vdb_scan_zero(db, options, k, out);
    return VDB_OK;
  }
  const vdb_passing *passing = options->passing, *packed = vdb_passing_holds(db, passing) && passing->packed ? passing : NULL;
  size_t rows = packed ? packed->count : db->slots, rows_per_task;
  size_t tasks = vdb_cut_rows(db, rows, rows * vdb_scanned_bytes(db), &rows_per_task);
  size_t list_bytes = vdb_shortlist_bytes(k), decoded = vdb_padded(db->dimensions) * sizeof(float);
  size_t lists_bytes = vdb_round_up(tasks * sizeof(vdb_shortlist), 64);
  unsigned char *memory = (unsigned char *)vdb_aligned_alloc(lists_bytes + tasks * (list_bytes + decoded));
  if (!memory) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_shortlist *lists = (vdb_shortlist *)(void *)memory;
  for (size_t i = 0; i < tasks; i++) vdb_shortlist_make(&lists[i], k, memory + lists_bytes + i * list_bytes);
  vdb_form form = vdb_form_of(db, 0);
  vdb_scan scan = vdb_scan_make(db, question, options, form, vdb_rounding(db->dimensions), question->missing,
                                (float *)(void *)(memory + lists_bytes + tasks * list_bytes));
  scan.packed = packed;
  scan.few = !packed && vdb_few_pass(db, options);
  vdb_scan_job job = {&scan, rows_per_task, lists, -INFINITY};
  vdb_parallel(db, tasks, vdb_scan_task, &job);
  for (size_t i = 1; i < tasks; i++) vdb_shortlist_merge(&scan, &lists[0], &lists[i]);
  vdb_settle(&scan, &lists[0]);
  *found = vdb_take_found(&lists[0], out);
  vdb_aligned_free(memory);
  return VDB_OK;
}

/* --- many queries: tiles of 32 rows and up to 128 queries --- */
typedef struct {
  const vdb_database *db;
  const vdb_query_options *options;
  const vdb_question *questions; /* [panel.queries] */
  vdb_panel panel;
  vdb_scan *scans;               /* [panel.queries] */
  float *gamma, *delta, *shared; /* [panel.width] */
  size_t tasks, rows_per_task;
  vdb_shortlist *lists;          /* [tasks][panel.queries] */
  unsigned char *scratch;        /* [tasks] of scratch_bytes */
  size_t scratch_bytes;
  vdb_found *out;                /* [panel.queries][options->k] */
  size_t *counts;                /* [panel.queries] */
} vdb_tile_job;

/* The arrays of one task, cut from its scratch. */
typedef struct {
  float *scores;     /* [VDB_TILE_ROWS][width] */
  float *thresholds; /* [width] */
  vdb_hit *hits;     /* [VDB_TILE_ROWS * width] */
  void *tile;
} vdb_tile_space;

static inline size_t vdb_tile_space_bytes(size_t dimensions, size_t width) {
  return vdb_tile_scratch(dimensions) + (VDB_TILE_ROWS + 1) * width * sizeof(float) +
         vdb_round_up(VDB_TILE_ROWS * width * sizeof(vdb_hit), 64);
}

static inline vdb_tile_space vdb_tile_space_of(const vdb_tile_job *job, size_t task) {
  size_t width = job->panel.width;
  vdb_tile_space space;
  space.tile = job->scratch + task * job->scratch_bytes;
  space.scores = (float *)(void *)((unsigned char *)space.tile + vdb_tile_scratch(job->db->dimensions));
  space.thresholds = space.scores + VDB_TILE_ROWS * width;
  space.hits = (vdb_hit *)(void *)(space.thresholds + width);
  return space;
}

/* Rows that pass all bounds of a tile go to their queries' lists. */
VDB_ONCE void vdb_keep_hits(const vdb_tile_job *job, const vdb_tile_space *space, const vdb_row_terms *terms,
                                 size_t row, uint32_t mask, size_t hits, vdb_shortlist *lists) {
  for (size_t i = 0; i < hits; i++) {
    vdb_hit hit = space->hits[i];
    const vdb_scan *scan = &job->scans[hit.query];
    vdb_shortlist *list = &lists[hit.query];
    uint32_t candidate = (uint32_t)row + hit.row;
    float upper = vdb_is_finite(hit.upper) ? hit.upper : VDB_UNBOUNDED;
    if (!(mask >> hit.row & 1u) || upper < list->threshold) continue;
    if (job->options->filter && !job->options->filter(candidate, job->options->filter_context)) continue;
    float score = space->scores[hit.row * job->panel.width + hit.query];
    vdb_shortlist_add(scan, list, upper, vdb_lower_of(scan, terms, hit.row, upper, score), candidate);
  }
}

static inline void vdb_tile_task(void *context, size_t task) {
  vdb_tile_job *job = (vdb_tile_job *)context;
  const vdb_database *db = job->db;
  const vdb_kernel_set *kernels = vdb_active();
  size_t width = job->panel.width, dimensions = db->dimensions;
  vdb_element element = vdb_scanned_element(db);
  vdb_tile_space space = vdb_tile_space_of(job, task);
  vdb_query_terms queries = {job->gamma, job->delta, space.thresholds};
  vdb_shortlist *lists = &job->lists[task * job->panel.queries];
  vdb_row_terms terms;
  size_t row = task * job->rows_per_task, end = vdb_min(row + job->rows_per_task, db->slots);
  for (size_t q = 0; q < width; q++) space.thresholds[q] = INFINITY;
  for (; row < end; row += VDB_TILE_ROWS) {
    const vdb_block *block = vdb_block_of(db, row);
    size_t first = vdb_row_in_block(db, row), count = vdb_min(end - row, VDB_TILE_ROWS);
    uint32_t mask = vdb_row_mask(db, job->options, row);
    if (!mask) continue;
    const unsigned char *rows = vdb_scanned_rows(db, block) + first * vdb_scanned_bytes(db);
    if (db->paging.scans) vdb_touch(db, VDB_TILE_ROWS * vdb_scanned_bytes(db));
    kernels->tile(element, &job->panel, rows, count, dimensions, space.scores, space.tile);
    vdb_terms(&job->scans[0], block, first, NULL, count, &terms);
    for (size_t q = 0; q < job->panel.queries; q++)
      space.thresholds[q] = lists[q].threshold = vdb_share_threshold(&job->shared[q], lists[q].threshold);
    size_t hits = kernels->gate_tile(space.scores, width, &terms, count, &queries, space.hits);
    if (hits) vdb_keep_hits(job, &space, &terms, row, mask, hits, lists);
  }
}

static inline void vdb_tile_settle(void *context, size_t query) {
  vdb_tile_job *job = (vdb_tile_job *)context;
  vdb_shortlist *list = &job->lists[query];
  for (size_t task = 1; task < job->tasks; task++)
    vdb_shortlist_merge(&job->scans[query], list, &job->lists[task * job->panel.queries + query]);
  vdb_settle(&job->scans[query], list);
  job->counts[query] = vdb_take_found(list, job->out + query * job->options->k);
}

/* Packs the panel and makes the terms of its queries. */
VDB_LIGHT void vdb_tile_prepare(vdb_tile_job *job, float *decoded) {
  const vdb_database *db = job->db;
  const float *values[VDB_TILE_QUERIES];
  for (size_t q = 0; q < job->panel.queries; q++) values[q] = job->questions[q].probe.values;
  vdb_active()->pack(vdb_scanned_element(db), values, db->dimensions, &job->panel);
  for (size_t q = 0; q < job->panel.width; q++) {
    job->gamma[q] = job->delta[q] = 0.0f;
    job->shared[q] = -INFINITY;
    if (q >= job->panel.queries) continue;
    job->scans[q] = vdb_scan_make(db, &job->questions[q], job->options, vdb_form_of(db, 1), job->panel.relative,
                                  job->panel.missing[q], decoded + q * vdb_padded(db->dimensions));
    job->gamma[q] = job->scans[q].gamma;
    job->delta[q] = job->scans[q].delta;
  }
}

/* Exact answers to `count` <= VDB_TILE_QUERIES questions at once: out [count][options->k]. */
VDB_ONCE vdb_error vdb_scan_panel(const vdb_database *db, const vdb_question *questions, size_t count,
                                       const vdb_query_options *options, vdb_found *out, size_t *counts) {
  vdb_tile_job job;
  size_t k = vdb_min(options->k, db->count), width = vdb_round_up(count, 16), place = 0;
  vdb_element element = vdb_scanned_element(db);
  memset(&job, 0, sizeof job);
  job.db = db, job.options = options, job.questions = questions, job.out = out, job.counts = counts;
  job.panel.queries = count, job.panel.width = width;
  job.tasks = vdb_cut_rows(db, db->slots, db->slots * db->dimensions * count, &job.rows_per_task);
  job.scratch_bytes = vdb_tile_space_bytes(db->dimensions, width);
  size_t data = place, decoded = place += vdb_round_up(vdb_active()->panel_bytes(element, width, db->dimensions), 64);
  size_t scans = place += count * vdb_padded(db->dimensions) * sizeof(float);
  size_t floats = place += vdb_round_up(count * sizeof(vdb_scan), 64);
  size_t scratch = place += 4 * width * sizeof(float);
  size_t lists = place += job.tasks * job.scratch_bytes;
  size_t heaps = place += vdb_round_up(job.tasks * count * sizeof(vdb_shortlist), 64);
  place += job.tasks * count * vdb_shortlist_bytes(k);
  unsigned char *memory = (unsigned char *)vdb_aligned_alloc(place);
  if (!memory) return VDB_ERROR_OUT_OF_MEMORY;
  job.panel.data = memory + data;
  job.scans = (vdb_scan *)(void *)(memory + scans);
  job.gamma = (float *)(void *)(memory + floats);
  job.delta = job.gamma + width, job.shared = job.delta + width, job.panel.missing = job.shared + width;
  job.scratch = memory + scratch;
  job.lists = (vdb_shortlist *)(void *)(memory + lists);
  for (size_t i = 0; i < job.tasks * count; i++)
    vdb_shortlist_make(&job.lists[i], k, memory + heaps + i * vdb_shortlist_bytes(k));
  vdb_tile_prepare(&job, (float *)(void *)(memory + decoded));
  vdb_parallel(db, job.tasks, vdb_tile_task, &job);
  vdb_parallel(db, count, vdb_tile_settle, &job);
  vdb_aligned_free(memory);
  return VDB_OK;
}

/* --- all rows within a radius --- */
typedef struct {
  vdb_found *rows;
  size_t count, capacity;
  int failed; /* for want of memory */
} vdb_ball;

typedef struct {
  const vdb_scan *scan;
  float radius;
  size_t rows_per_task;
  vdb_ball *balls; /* [tasks] */
} vdb_range_job;

VDB_LIGHT void vdb_ball_add(vdb_ball *ball, float distance, uint32_t row) {
  vdb_found found = {distance, row};
  if (ball->count == ball->capacity) {
    size_t capacity = vdb_max(64, 2 * ball->capacity);
    if (!vdb_grow((void **)&ball->rows, ball->capacity, capacity, sizeof(vdb_found))) {
      ball->failed = 1;
      return;
    }
    ball->capacity = capacity;
  }
  ball->rows[ball->count++] = found;
}

/* Every row whose bound reaches the radius is measured. */
static inline void vdb_range_task(void *context, size_t task) {
  vdb_range_job *job = (vdb_range_job *)context;
  const vdb_database *db = job->scan->db;
  vdb_scan scan = *job->scan;
  scan.decoded += task * vdb_padded(db->dimensions);
  vdb_ball *ball = &job->balls[task];
  float threshold = vdb_key_of(&scan, job->radius);
  size_t row = task * job->rows_per_task, end = vdb_min(row + job->rows_per_task, db->slots);
  for (; row < end && !ball->failed; row += VDB_SCAN_ROWS) {
    vdb_group group;
    uint32_t mask = vdb_row_mask(db, scan.options, row);
    if (end - row < VDB_SCAN_ROWS) mask &= (1u << (end - row)) - 1u;
    if (!mask || !vdb_score_group(&scan, row, mask, threshold, &group)) continue;
    for (size_t i = 0; i < group.count; i++) {
      uint32_t candidate = group.rows[i];
      if (!scan.question->wild && vdb_is_finite(group.uppers[i]) && group.uppers[i] < threshold) continue;
      if (scan.options->filter && !scan.options->filter(candidate, scan.options->filter_context)) continue;
      float distance = vdb_exact_distance(db, scan.question, candidate, scan.decoded);
      if (distance <= job->radius) vdb_ball_add(ball, distance, candidate);
    }
  }
}

static inline int vdb_by_distance(const void *a, const void *b) {
  const vdb_found *x = (const vdb_found *)a, *y = (const vdb_found *)b;
  return vdb_farther(*x, *y) ? 1 : vdb_farther(*y, *x) ? -1 : 0;
}

/* Every distance is 1. */
VDB_LIGHT void vdb_range_zero(const vdb_database *db, const vdb_query_options *options, float radius,
                                  vdb_ball *out) {
  for (size_t row = 0; row < db->slots && radius >= 1.0f && !out->failed; row++)
    if (vdb_passes(db, options, row)) vdb_ball_add(out, 1.0f, (uint32_t)row);
}

/* The rows within `radius` of one question, by (distance, row), in `out`, whose rows are to be freed. */
VDB_ONCE vdb_error vdb_range_one(const vdb_database *db, const vdb_question *question,
                                      const vdb_query_options *options, float radius, vdb_ball *out) {
  memset(out, 0, sizeof *out);
  if (db->metric == VDB_METRIC_COSINE && question->square == 0.0) {
    vdb_range_zero(db, options, radius, out);
    return out->failed ? VDB_ERROR_OUT_OF_MEMORY : VDB_OK;
  }
  size_t rows_per_task, tasks = vdb_cut_rows(db, db->slots, db->slots * vdb_scanned_bytes(db), &rows_per_task);
  size_t decoded = vdb_padded(db->dimensions) * sizeof(float), balls = vdb_round_up(tasks * sizeof(vdb_ball), 64);
  unsigned char *memory = (unsigned char *)vdb_aligned_alloc(balls + tasks * decoded);
  if (!memory) return VDB_ERROR_OUT_OF_MEMORY;
  memset(memory, 0, balls);
  vdb_scan scan = vdb_scan_make(db, question, options, vdb_form_of(db, 0), vdb_rounding(db->dimensions),
                                question->missing, (float *)(void *)(memory + balls));
  vdb_range_job job = {&scan, radius, rows_per_task, (vdb_ball *)(void *)memory};
  vdb_parallel(db, tasks, vdb_range_task, &job);
  for (size_t task = 0; task < tasks; task++) {
    for (size_t i = 0; i < job.balls[task].count && !out->failed; i++)
      vdb_ball_add(out, job.balls[task].rows[i].distance, job.balls[task].rows[i].row);
    out->failed |= job.balls[task].failed;
    VDB_FREE(job.balls[task].rows);
  }
  vdb_aligned_free(memory);
  if (out->count > 1) qsort(out->rows, out->count, sizeof(vdb_found), vdb_by_distance);
  return out->failed ? VDB_ERROR_OUT_OF_MEMORY : VDB_OK;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 8 HNSW
 *
 * Malkov and Yashunin's graph (arXiv 1603.09320). Every row links to some of its neighbours; from any row a search
 * walks to ever nearer ones and reads a few thousand rows of millions. A row also stands on each higher level with a
 * chance of 1 in `links`, where links are long; a search begins at `entry` on the highest level and comes down.
 *
 *     block.links   [rows][1 + 2 links]  lowest level: how many, then neighbours
 *     towers        of a row that stands higher: its levels, then [levels][1 + links] likewise; tower_of says where
 *
 * A row's level follows from its number alone. Removed rows stay as way points, and are not answered, until a fifth of
 * the graph is dead; then a sweep links their neighbours past them and frees their numbers.
 *
 * Keys order rows as distances do and are cheaper: squared distance, -dot, -cosine, from the codes where there are any.
 * Whatever is answered has its exact distance. Keys decide what is looked at, so a search may miss a row; but it falls
 * back to the scan of section 7 when it found fewer than k, and when the scan is less work.
 *
 * Building is parallel and yet always the same. Rows are inserted in batches. First every row of a batch, in parallel,
 * searches the graph as it was before the batch, compares itself with the rows of the batch before it, and writes its
 * own links, which nobody sees yet. Then the links back to it are sorted by target and added, in parallel by target. So
 * no row is locked and no order is left to chance.
 *
 * Links of a mapped file are not trusted: a neighbour that is no row is passed over, a tower not inside `towers`
 * is none, and since every walk marks what it has seen, or only moves to a smaller key, it ends.
 */
#define VDB_TOP_LEVEL 15u
#define VDB_BATCH 512u       /* rows inserted at once, at most */
#define VDB_BATCH_LINKED 2u  /* levels that the rows of a batch have between them, at most: times VDB_BATCH */
#define VDB_WALKERS 64u      /* kept for the next search */
#define VDB_CHOICE 32u       /* candidates that vdb_choose_links takes at a time */

/* A row met on a walk. */
typedef struct {
  float key;
  uint32_t row, expanded; /* expanded: its neighbours have been looked at */
} vdb_near;

/* What one walk needs; one allocation. */
typedef struct {
  size_t rows, room;     /* lengths of `visited` and `pool` */
  uint16_t *visited;     /* [rows] `epoch` where the walk has been */
  vdb_near *pool;        /* [room] nearest first */
  uint32_t *fresh;       /* [gather] neighbours not seen before, */
  const void **pointers; /* their vectors or codes, */
  float *keys;           /* and keys; gather = max(2 links, VDB_PAD) */
  float *values;         /* [padded] a row as a query */
  float *decoded;        /* [padded] */
  int8_t *codes;         /* [2][padded] a row's codes as a query; the second part is zero */
  uint16_t epoch;
} vdb_walker;

/* Kept between calls, so that searches allocate nothing and an insertion cannot run out of memory half-way. */
typedef struct vdb_workshop {
  vdb_walker *spare[VDB_WALKERS]; /* taken and given back by atomic exchange */
  size_t rows;                    /* length of tower_of */
  size_t unchecked;               /* rows inserted since vdb_connect */
  uint64_t *reverse;              /* [VDB_BATCH * VDB_BATCH_LINKED * links] of one batch, see vdb_reverse */
} vdb_workshop;

/* --- links --- */

/* splitmix64 of the row number. Level l or higher has a share of links^-l. */
VDB_ONCE uint32_t vdb_level_of(size_t row, uint32_t links) {
  uint64_t hash = ((uint64_t)row + 1) * 0x9e3779b97f4a7c15u, share = UINT64_MAX / links;
  uint32_t level = 0;
  hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ hash >> 27) * 0x94d049bb133111ebu;
  hash ^= hash >> 31;
  for (; level < VDB_TOP_LEVEL && hash < share; level++) share /= links;
  return level;
}

static inline size_t vdb_tower_size(uint32_t levels, size_t links) { return 1 + levels * (1 + links); }

/* The highest level that a row stands on. */
static inline uint32_t vdb_levels_at(const vdb_database *db, size_t row) {
  const vdb_graph *graph = &db->graph;
  size_t place = graph->tower_of ? graph->tower_of[row] : 0;
  if (!place || place >= graph->towers_size) return 0;
  uint32_t levels = graph->towers[place];
  if (levels > VDB_TOP_LEVEL || vdb_tower_size(levels, db->options.links) > graph->towers_size - place) return 0;
  return levels;
}

/* How many neighbours, then neighbours, of a row on a level; NULL if it does not stand there. */
static inline uint32_t *vdb_links_of(const vdb_database *db, size_t row, uint32_t level) {
  if (!level) return vdb_links_at(db, row);
  if (level > vdb_levels_at(db, row)) return NULL;
  return db->graph.towers + db->graph.tower_of[row] + vdb_tower_size(level - 1, db->options.links);
}

VDB_INLINE size_t vdb_most_links(const vdb_database *db, uint32_t level) {
  return level ? db->options.links : 2 * (size_t)db->options.links;
}

/* How many of a list may be read: a damaged file can say anything. */
VDB_INLINE size_t vdb_link_count(const vdb_database *db, const uint32_t *links, uint32_t level) {
  return links ? vdb_min(links[0], vdb_most_links(db, level)) : 0;
}

/* --- memory --- */
VDB_RARE vdb_walker *vdb_make_walker(const vdb_database *db, size_t rows, size_t room) {
  size_t padded = vdb_padded(db->dimensions), gather = vdb_max(2 * (size_t)db->options.links, VDB_PAD);
  size_t head = vdb_round_up(sizeof(vdb_walker), VDB_ALIGNMENT), floats = 2 * padded * sizeof(float);
  size_t gathered = vdb_round_up(gather * (sizeof(void *) + sizeof(uint32_t) + sizeof(float)), VDB_ALIGNMENT);
  size_t pool = vdb_round_up(room * sizeof(vdb_near), VDB_ALIGNMENT), tags = rows * sizeof(uint16_t);
  unsigned char *place = (unsigned char *)vdb_aligned_alloc(head + floats + 2 * padded + gathered + pool + tags);
  vdb_walker *walker = (vdb_walker *)(void *)place;
  if (!walker) return NULL;
  memset(place, 0, head + floats + 2 * padded);
  walker->rows = rows;
  walker->room = room;
  walker->values = (float *)(void *)(place += head);
  walker->decoded = walker->values + padded;
  walker->codes = (int8_t *)(place += floats);
  walker->pointers = (const void **)(void *)(place += 2 * padded);
  walker->fresh = (uint32_t *)(walker->pointers + gather);
  walker->keys = (float *)(walker->fresh + gather);
  walker->pool = (vdb_near *)(void *)(place += gathered);
  walker->visited = (uint16_t *)(void *)(place + pool);
  memset(walker->visited, 0, tags);
  return walker;
}

/* The workshop of a database, made when first asked for; several readers may ask at once. */
VDB_ONCE vdb_workshop *vdb_workshop_of(const vdb_database *db) {
  vdb_workshop **place = (vdb_workshop **)(uintptr_t)&db->graph.workshop, *none = NULL;
  vdb_workshop *workshop = __atomic_load_n(place, __ATOMIC_ACQUIRE);
  if (workshop) return workshop;
  workshop = (vdb_workshop *)VDB_MALLOC(sizeof *workshop);
  if (!workshop) return NULL;
  memset(workshop, 0, sizeof *workshop);
  if (__atomic_compare_exchange_n(place, &none, workshop, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return workshop;
  VDB_FREE(workshop);
  return none;
}

VDB_ONCE void vdb_give_walker(const vdb_database *db, vdb_walker *walker) {
  vdb_workshop *workshop = vdb_workshop_of(db);
  for (size_t i = 0; walker && i < VDB_WALKERS; i++) {
    vdb_walker *none = NULL;
    if (__atomic_compare_exchange_n(&workshop->spare[i], &none, walker, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
  }
  vdb_aligned_free(walker);
}

/* A walker with room for `room` candidates; NULL if memory is short. */
VDB_ONCE vdb_walker *vdb_take_walker(const vdb_database *db, size_t room) {
  vdb_workshop *workshop = vdb_workshop_of(db);
  vdb_walker *walker = NULL;
  for (size_t i = 0; workshop && !walker && i < VDB_WALKERS; i++)
    if (__atomic_load_n(&workshop->spare[i], __ATOMIC_RELAXED))
      walker = __atomic_exchange_n(&workshop->spare[i], (vdb_walker *)NULL, __ATOMIC_ACQ_REL);
  if (!workshop || (walker && walker->rows >= db->slots && walker->room >= room)) return walker;
  size_t rows = vdb_max(db->slots, db->capacity);
  vdb_walker *larger = vdb_make_walker(db, vdb_max(rows, walker ? walker->rows : 0),
                                       vdb_max(room, walker ? walker->room : db->options.build_effort));
  if (!larger)
    vdb_give_walker(db, walker);
  else
    vdb_aligned_free(walker);
  return larger;
}

static inline void vdb_start_walk(vdb_walker *walker) {
  if (++walker->epoch) return;
  memset(walker->visited, 0, walker->rows * sizeof(uint16_t));
  walker->epoch = 1;
}

/* Candidates that insertion handles at once: of a search, or all that want to be neighbours of one row. */
static inline size_t vdb_build_room(const vdb_database *db) {
  return vdb_max(db->options.build_effort, 2 * (size_t)db->options.links + VDB_BATCH) + 1;
}

/* Room for towers of rows below `rows` that have none yet. */
VDB_LIGHT vdb_error vdb_make_towers(vdb_database *db, size_t rows) {
  vdb_graph *graph = &db->graph;
  size_t wanted = vdb_max(1, graph->towers_size), links = db->options.links;
  for (size_t row = 0; row < rows; row++) {
    uint32_t levels = graph->tower_of[row] ? 0 : vdb_level_of(row, (uint32_t)links);
    if (levels) wanted += vdb_tower_size(levels, links);
  }
  if (wanted > UINT32_MAX) wanted = UINT32_MAX; /* rows that find no place there stand on the lowest level only */
  if (wanted <= graph->towers_capacity) return VDB_OK;
  if (!vdb_grow((void **)&graph->towers, graph->towers_capacity, wanted, sizeof(uint32_t)))
    return VDB_ERROR_OUT_OF_MEMORY;
  graph->towers_capacity = wanted;
  graph->towers_size = vdb_max(1, graph->towers_size);
  return VDB_OK;
}

/* After it, inserting rows below `rows` cannot fail for want of memory. */
VDB_RARE vdb_error vdb_graph_make_room(vdb_database *db, size_t rows) {
  vdb_workshop *workshop = vdb_workshop_of(db);
  if (!workshop) return VDB_ERROR_OUT_OF_MEMORY;
  if (!workshop->rows && db->graph.tower_of) workshop->rows = db->slots; /* read from a file */
  size_t old = workshop->rows, room = vdb_build_room(db);
  if (rows > old) {
    size_t grown = vdb_min(vdb_max(rows, vdb_max(64, old + old / 2)), VDB_MAX_ROWS);
    if (!vdb_grow((void **)&db->graph.tower_of, old, grown, sizeof(uint32_t))) return VDB_ERROR_OUT_OF_MEMORY;
    workshop->rows = grown;
  }
  if (rows > old || !db->graph.towers_capacity) {
    vdb_error error = vdb_make_towers(db, workshop->rows);
    if (error) {
      workshop->rows = old; /* the next attempt must look again */
      return error;
    }
  }
  if (!workshop->reverse)
    workshop->reverse = (uint64_t *)VDB_MALLOC(sizeof(uint64_t) * VDB_BATCH * VDB_BATCH_LINKED * db->options.links);
  if (!workshop->reverse) return VDB_ERROR_OUT_OF_MEMORY;
  for (size_t i = 0; i < vdb_min(vdb_thread_count(db), VDB_WALKERS); i++) {
    vdb_walker *old_walker = workshop->spare[i];
    if (old_walker && old_walker->rows >= rows && old_walker->room >= room) continue;
    vdb_walker *walker = vdb_make_walker(db, vdb_max(workshop->rows, db->capacity), room);
    if (!walker) return VDB_ERROR_OUT_OF_MEMORY;
    workshop->spare[i] = walker;
    vdb_aligned_free(old_walker);
  }
  return VDB_OK;
}

VDB_RARE void vdb_graph_release(vdb_database *db) {
  vdb_workshop *workshop = db->graph.workshop;
  if (!db->mapping.base || db->mapping.own_towers) { /* otherwise they lie in the file */
    VDB_FREE(db->graph.tower_of);
    VDB_FREE(db->graph.towers);
  }
  for (size_t i = 0; workshop && i < VDB_WALKERS; i++) vdb_aligned_free(workshop->spare[i]);
  if (workshop) VDB_FREE(workshop->reverse);
  VDB_FREE(workshop);
  memset(&db->graph, 0, sizeof db->graph);
  db->graph.entry = VDB_NO_ROW;
}

/* Memory of the towers; what walks use is not counted. */
VDB_RARE size_t vdb_graph_bytes(const vdb_database *db) {
  size_t rows = db->graph.workshop ? vdb_max(db->graph.workshop->rows, db->slots) : db->slots;
  return db->graph.tower_of ? (rows + db->graph.towers_capacity) * sizeof(uint32_t) : 0;
}

/* --- keys --- */

/* A query for keys. For cosine it has the norm 1. */
typedef struct {
  vdb_probe probe;
  const float *values; /* as in probe; NULL if the query is the row `row` */
  uint32_t row;
  float offset;        /* Euclidean by codes: the query's squared norm */
  int codes;           /* by codes */
  int wild;            /* the query is a row whose norm is outside the normal range */
} vdb_aim;

VDB_ONCE vdb_aim vdb_aim_at_question(const vdb_database *db, const vdb_question *question, int codes) {
  vdb_aim aim;
  aim.probe = question->probe;
  aim.values = question->probe.values;
  aim.row = VDB_NO_ROW;
  aim.codes = codes;
  aim.wild = 0;
  aim.offset = db->metric == VDB_METRIC_EUCLIDEAN ? (float)question->square : 0.0f;
  aim.probe.low_scale = 0.0f; /* one part is as fine as the rows' own codes */
  return aim;
}

/* A row as the query. What it points at is in the walker, until the next. */
VDB_ONCE vdb_aim vdb_aim_at_row(const vdb_database *db, uint32_t row, int codes, vdb_walker *walker) {
  size_t dimensions = db->dimensions;
  float norm = vdb_norm_at(db, row);
  float factor = db->metric == VDB_METRIC_COSINE && norm > 0.0f ? 1.0f / norm : 1.0f;
  vdb_aim aim;
  memset(&aim, 0, sizeof aim);
  aim.row = row;
  aim.wild = norm < 0.0f;
  aim.codes = codes;
  aim.offset = db->metric == VDB_METRIC_EUCLIDEAN ? norm * norm : 0.0f;
  if (aim.codes) {
    memcpy(walker->codes, vdb_codes_at(db, row), dimensions);
    for (size_t j = 0; j < dimensions; j++) aim.probe.high_sum += walker->codes[j];
    aim.probe.high = walker->codes;
    aim.probe.low = walker->codes + vdb_padded(dimensions);
    aim.probe.high_scale = vdb_scale_at(db, row) * factor;
    return aim;
  }
  vdb_decode_row(db, row, walker->values);
  if (db->metric == VDB_METRIC_COSINE)
    for (size_t j = 0; j < dimensions; j++) walker->values[j] *= factor;
  aim.probe.values = walker->values;
  return aim;
}

/* The key in double, for rows that a float's range does not bear. Slow, and rare. */
VDB_ONCE float vdb_wild_key(const vdb_database *db, const vdb_aim *aim, uint32_t row, vdb_walker *walker) {
  double dot = 0.0, squares = 0.0, query_square = 0.0, row_square = 0.0, key;
  if (!aim->values) vdb_decode_row(db, aim->row, walker->values);
  vdb_decode_row(db, row, walker->decoded);
  for (size_t j = 0; j < db->dimensions; j++) {
    double q = aim->values ? (double)aim->values[j] : (double)walker->values[j], x = (double)walker->decoded[j];
    dot += q * x;
    squares += (q - x) * (q - x);
    query_square += q * q;
    row_square += x * x;
  }
  key = db->metric == VDB_METRIC_EUCLIDEAN ? squares : -dot;
  if (db->metric == VDB_METRIC_COSINE) key = row_square > 0.0 && query_square > 0.0 ? -dot / sqrt(row_square) : 0.0;
  if (db->metric == VDB_METRIC_COSINE && !aim->values && query_square > 0.0) key /= sqrt(query_square);
  if (!aim->values && !aim->codes) { /* put the query back as it was */
    vdb_aim again = vdb_aim_at_row(db, aim->row, 0, walker);
    (void)again;
  }
  return key > 3.0e38 ? 3.0e38f : key < -3.0e38 ? -3.0e38f : (float)key;
}

/* keys[i] of rows[i]; all rows are below db->slots, and count is at most the walker's gather. */
VDB_ONCE void vdb_find_keys(const vdb_database *db, const vdb_aim *aim, const uint32_t *rows, size_t count,
                                 vdb_walker *walker, float *keys) {
  const vdb_kernel_set *kernels = vdb_active();
  vdb_element element = vdb_element_of(db->options.storage);
  vdb_metric metric = db->metric;
  if (db->paging.scans || !aim->codes) vdb_touch(db, count * VDB_FAULT_BYTES);
  for (size_t i = 0; i < count; i++)
    walker->pointers[i] = aim->codes ? (const void *)vdb_codes_at(db, rows[i]) : vdb_vector_at(db, rows[i]);
  if (aim->codes)
    kernels->dots_i8(&aim->probe, walker->pointers, count, db->dimensions, keys);
  else if (metric == VDB_METRIC_EUCLIDEAN)
    kernels->squares[element](aim->probe.values, walker->pointers, count, db->dimensions, keys);
  else
    kernels->dots[element](aim->probe.values, walker->pointers, count, db->dimensions, keys);
  for (size_t i = 0; i < count; i++) {
    const vdb_block *block = vdb_block_of(db, rows[i]);
    size_t place = vdb_row_in_block(db, rows[i]);
    float norm = block->norms[place], dot = aim->codes ? keys[i] * block->scales[place] : keys[i];
    if (aim->wild || norm < 0.0f)
      keys[i] = vdb_wild_key(db, aim, rows[i], walker);
    else if (metric == VDB_METRIC_COSINE)
      keys[i] = norm > 0.0f ? -dot / norm : 0.0f;
    else if (metric == VDB_METRIC_DOT_PRODUCT)
      keys[i] = -dot;
    else if (aim->codes)
      keys[i] = aim->offset + norm * norm - 2.0f * dot;
  }
}

static inline float vdb_key_at(const vdb_database *db, const vdb_aim *aim, uint32_t row, vdb_walker *walker) {
  float key;
  vdb_find_keys(db, aim, &row, 1, walker, &key);
  return key;
}

/* Whether codes are too coarse to tell the rows of a sorted pool apart, as when all rows are far from the origin and
 * near each other: `plain` aims at the same query by the vectors, and the nearest few say how wrong keys are. */
VDB_ONCE int vdb_codes_blur(const vdb_database *db, const vdb_aim *plain, const vdb_near *pool, size_t count,
                                 vdb_walker *walker) {
  uint32_t rows[4] = {0, 0, 0, 0};
  float keys[4], error = 0.0f;
  size_t some = vdb_min(count, 4);
  for (size_t i = 0; i < some; i++) rows[i] = pool[i].row;
  vdb_find_keys(db, plain, rows, some, walker, keys);
  for (size_t i = 0; i < some; i++) error = fabsf(keys[i] - pool[i].key) > error ? fabsf(keys[i] - pool[i].key) : error;
  return count > 1 && error * 8.0f > pool[count - 1].key - pool[0].key;
}

VDB_ONCE int vdb_row_blurs(const vdb_database *db, const vdb_aim *aim, size_t count, vdb_walker *walker) {
  if (!aim->codes || db->options.storage != VDB_STORAGE_F32_I8) return 0;
  vdb_aim plain = vdb_aim_at_row(db, aim->row, 0, walker);
  return vdb_codes_blur(db, &plain, walker->pool, count, walker);
}

/* Asks for what vdb_find_keys will read. */
VDB_INLINE void vdb_prefetch_near(const vdb_database *db, const vdb_aim *aim, size_t row) {
  const vdb_block *block = vdb_block_of(db, row);
  size_t place = vdb_row_in_block(db, row);
  size_t bytes = db->dimensions * (aim->codes ? 1 : vdb_element_size(db->options.storage));
  const char *from = (aim->codes ? (const char *)block->codes : (const char *)block->vectors) + place * bytes;
  if (aim->codes || db->metric == VDB_METRIC_COSINE) __builtin_prefetch(block->norms + place);
  if (aim->codes) __builtin_prefetch(block->scales + place);
  if (bytes > 1024) bytes = 1024; /* the machine itself sees where the rest is */
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* --- walking --- */

/* Enters a row into a sorted pool of at most `most`; returns its place, `most` if it is too far. */
static inline size_t vdb_pool_enter(vdb_near *pool, size_t *count, size_t most, float key, uint32_t row) {
  size_t low = 0, high = *count;
  if (high == most && !(key < pool[most - 1].key)) return most;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (pool[middle].key < key) low = middle + 1;
    else high = middle;
  }
  if (low == most) return most; /* only a key that is not a number gets here */
  memmove(pool + low + 1, pool + low, ((*count < most ? *count : most - 1) - low) * sizeof *pool);
  pool[low].key = key;
  pool[low].row = row;
  pool[low].expanded = 0;
  if (*count < most) ++*count;
  return low;
}

/* Neighbours of a row on a level into walker->fresh: all, or those that the walk has not met. */
static inline size_t vdb_gather(const vdb_database *db, const vdb_aim *aim, uint32_t row, uint32_t level, int unmet,
                                vdb_walker *walker) {
  const uint32_t *links = vdb_links_of(db, row, level);
  size_t count = vdb_link_count(db, links, level), kept = 0;
  for (size_t i = 1; i <= count; i++) {
    uint32_t other = links[i];
    if (other >= db->slots) continue;
    walker->fresh[kept] = other;
    kept += (size_t)(!unmet | (walker->visited[other] != walker->epoch)); /* no branch: it could not be foreseen */
    if (unmet) walker->visited[other] = walker->epoch;
  }
  for (size_t i = 0; i < kept; i++) vdb_prefetch_near(db, aim, walker->fresh[i]);
  return kept;
}

/* From `at` to ever nearer rows of one level, until none is nearer. */
static inline vdb_near vdb_descend(const vdb_database *db, const vdb_aim *aim, vdb_near at, uint32_t level,
                                   vdb_walker *walker) {
  for (;;) {
    uint32_t before = at.row;
    size_t count = vdb_gather(db, aim, before, level, 0, walker);
    vdb_find_keys(db, aim, walker->fresh, count, walker, walker->keys);
    for (size_t i = 0; i < count; i++)
      if (walker->keys[i] < at.key) at.key = walker->keys[i], at.row = walker->fresh[i];
    if (at.row == before) return at;
  }
}

/* The `effort` nearest rows of one level that are found from `start`, into walker->pool. */
static inline size_t vdb_walk(const vdb_database *db, const vdb_aim *aim, vdb_near start, uint32_t level, size_t effort,
                              vdb_walker *walker) {
  vdb_near *pool = walker->pool;
  size_t count = 1, place = 0;
  vdb_start_walk(walker);
  walker->visited[start.row] = walker->epoch;
  pool[0] = start;
  pool[0].expanded = 0;
  while (place < count) {
    if (pool[place].expanded) {
      place++;
      continue;
    }
    pool[place].expanded = 1;
    size_t fresh = vdb_gather(db, aim, pool[place].row, level, 1, walker), nearest = effort, next = place + 1;
    while (next < count && pool[next].expanded) next++;
    if (next < count && !level) __builtin_prefetch(vdb_links_at(db, pool[next].row));
    vdb_find_keys(db, aim, walker->fresh, fresh, walker, walker->keys);
    for (size_t i = 0; i < fresh; i++) {
      if (count == effort && !(walker->keys[i] < pool[count - 1].key)) continue;
      nearest = vdb_min(nearest, vdb_pool_enter(pool, &count, effort, walker->keys[i], walker->fresh[i]));
    }
    place = nearest <= place ? nearest : place + 1;
  }
  return count;
}

/* From the entry down to `level`. */
VDB_ONCE vdb_near vdb_approach(const vdb_database *db, const vdb_aim *aim, uint32_t level, vdb_walker *walker) {
  vdb_near at = {0.0f, db->graph.entry, 0};
  at.key = vdb_key_at(db, aim, at.row, walker);
  for (uint32_t l = vdb_min(db->graph.top, VDB_TOP_LEVEL); l > level; l--) at = vdb_descend(db, aim, at, l, walker);
  return at;
}

/* --- insertion --- */

/* Of `left` from `begin` on, drops what is nearer to `row` than to where the links begin. */
VDB_ONCE size_t vdb_drop_nearer(const vdb_database *db, uint32_t row, int codes, vdb_near *left, size_t begin,
                                     size_t count, vdb_walker *walker) {
  size_t kept = begin;
  if (begin == count) return count;
  vdb_aim aim = vdb_aim_at_row(db, row, codes, walker);
  for (size_t i = begin; i < count; i++) walker->fresh[i - begin] = left[i].row;
  vdb_find_keys(db, &aim, walker->fresh, count - begin, walker, walker->keys);
  for (size_t i = begin; i < count; i++)
    if (!(walker->keys[i - begin] < left[i].key)) left[kept++] = left[i];
  return kept;
}

/* At most `most` of the pool's `count` rows, nearest first, each nearer to where the links begin than to any chosen
 * before it: so that links lead into all directions. Candidates are taken some at a time, for mostly the first few are
 * enough. */
VDB_ONCE size_t vdb_choose_links(const vdb_database *db, int codes, size_t count, size_t most, uint32_t *chosen,
                                      vdb_walker *walker) {
  size_t found = 0;
  vdb_near left[VDB_CHOICE];
  for (size_t begin = 0; begin < count && found < most; begin += VDB_CHOICE) {
    size_t kept = vdb_min(VDB_CHOICE, count - begin);
    memcpy(left, walker->pool + begin, kept * sizeof *left);
    for (size_t i = 0; i < found && kept; i++) kept = vdb_drop_nearer(db, chosen[i], codes, left, 0, kept, walker);
    for (size_t i = 0; i < kept && found < most; i++) {
      chosen[found++] = left[i].row;
      if (found < most) kept = vdb_drop_nearer(db, left[i].row, codes, left, i + 1, kept, walker);
    }
  }
  return found;
}

/* Enters rows, the walker's gather at a time, into the pool by their keys. */
VDB_ONCE size_t vdb_enter_rows(const vdb_database *db, const vdb_aim *aim, const uint32_t *rows, size_t count,
                                    size_t entered, size_t most, vdb_walker *walker) {
  for (size_t begin = 0; begin < count; begin += VDB_PAD) {
    size_t some = vdb_min(VDB_PAD, count - begin);
    vdb_find_keys(db, aim, rows + begin, some, walker, walker->keys);
    for (size_t i = 0; i < some; i++) vdb_pool_enter(walker->pool, &entered, most, walker->keys[i], rows[begin + i]);
  }
  return entered;
}

typedef struct {
  vdb_database *db;
  const uint32_t *rows; /* of the batch */
  size_t count, reverse_count, tasks;
  vdb_watch *watch;     /* NULL for none */
  size_t entered, all;  /* rows of the call: in earlier batches, and all */
  unsigned char done[VDB_BATCH]; /* of task i */
} vdb_insertion;

static inline int vdb_is_stopped(const vdb_insertion *job) {
  return job->watch && vdb_watch_stops(job->watch, job->entered, job->all);
}

/* Candidates for the links of a row of a batch on one level, into the pool: from a walk that begins at `at`, which
 * moves to the nearest, and from the rows of the batch before it. */
VDB_ONCE size_t vdb_find_candidates(const vdb_insertion *job, size_t position, const vdb_aim *aim, uint32_t level,
                                         vdb_near *at, vdb_walker *walker) {
  const vdb_database *db = job->db;
  size_t count = 0, found = 0, effort = db->options.build_effort;
  uint32_t some[VDB_PAD];
  if (at->row != VDB_NO_ROW && level <= db->graph.top) {
    count = vdb_walk(db, aim, *at, level, effort, walker);
    *at = walker->pool[0];
  }
  if (!level) return vdb_enter_rows(db, aim, job->rows, position, count, effort, walker);
  for (size_t i = 0; i < position; i++) {
    if (vdb_levels_at(db, job->rows[i]) >= level) some[found++] = job->rows[i];
    if (found < VDB_PAD && i + 1 < position) continue;
    count = vdb_enter_rows(db, aim, some, found, count, effort, walker);
    found = 0;
  }
  return count;
}

/* Chooses the links of one row of a batch. */
VDB_ONCE void vdb_link_row(const vdb_insertion *job, size_t position, vdb_walker *walker) {
  vdb_database *db = job->db;
  uint32_t row = job->rows[position], level = vdb_levels_at(db, row);
  vdb_near at = {0.0f, VDB_NO_ROW, 0};
  int codes = vdb_has_codes(db->options.storage);
  vdb_aim aim = vdb_aim_at_row(db, row, codes, walker);
  if (db->graph.entry != VDB_NO_ROW) at = vdb_approach(db, &aim, level, walker);
  for (;;) {
    size_t count = vdb_find_candidates(job, position, &aim, level, &at, walker);
    if (vdb_row_blurs(db, &aim, count, walker)) { /* again, by the vectors */
      codes = 0;
      aim = vdb_aim_at_row(db, row, codes, walker);
      if (at.row != VDB_NO_ROW) at = vdb_approach(db, &aim, level, walker);
      count = vdb_find_candidates(job, position, &aim, level, &at, walker);
    }
    uint32_t *links = vdb_links_of(db, row, level);
    links[0] = (uint32_t)vdb_choose_links(db, codes, count, db->options.links, links + 1, walker);
    if (!level--) return;
    aim = vdb_aim_at_row(db, row, codes, walker); /* vdb_choose_links has used the walker's */
  }
}

static inline void vdb_link_task(void *context, size_t task) {
  vdb_insertion *job = (vdb_insertion *)context;
  vdb_walker *walker = vdb_take_walker(job->db, vdb_build_room(job->db));
  if (!walker) return;
  for (size_t i = task * job->count / job->tasks; i < (task + 1) * job->count / job->tasks; i++) {
    if (vdb_is_stopped(job)) break;
    vdb_link_row(job, i, walker);
  }
  vdb_give_walker(job->db, walker);
  job->done[task] = 1;
}

/* A link back: level << 60 | target << 28 | position of the source in its batch. */
static inline int vdb_by_target(const void *a, const void *b) {
  uint64_t x, y;
  memcpy(&x, a, sizeof x);
  memcpy(&y, b, sizeof y);
  return x < y ? -1 : x > y;
}

VDB_LIGHT size_t vdb_collect_reverse(const vdb_insertion *job) {
  const vdb_database *db = job->db;
  uint64_t *reverse = db->graph.workshop->reverse;
  size_t found = 0;
  for (size_t i = 0; i < job->count; i++) {
    for (uint32_t level = vdb_levels_at(db, job->rows[i]) + 1; level-- > 0;) {
      const uint32_t *links = vdb_links_of(db, job->rows[i], level);
      for (size_t j = 1; j <= links[0]; j++)
        reverse[found++] = (uint64_t)level << 60 | (uint64_t)links[j] << 28 | (uint64_t)i;
    }
  }
  qsort(reverse, found, sizeof *reverse, vdb_by_target);
  return found;
}

/* Adds links back from one target on one level: as they are if there is room, or the choice of old and new. */
VDB_ONCE void vdb_link_back(const vdb_insertion *job, const uint64_t *reverse, size_t count, vdb_walker *walker) {
  vdb_database *db = job->db;
  uint32_t level = (uint32_t)(reverse[0] >> 60), target = (uint32_t)(reverse[0] >> 28);
  uint32_t *links = vdb_links_of(db, target, level), some[VDB_PAD];
  size_t most = vdb_most_links(db, level), old = vdb_link_count(db, links, level), entered, room = walker->room;
  if (!links) return;
  vdb_mark_part(db, target);
  if (old + count <= most) {
    for (size_t i = 0; i < count; i++) links[1 + old + i] = job->rows[reverse[i] & 0xfffffffu];
    links[0] = (uint32_t)(old + count);
    return;
  }
  for (int codes = vdb_has_codes(db->options.storage);; codes = 0) {
    vdb_aim aim = vdb_aim_at_row(db, target, codes, walker);
    entered = 0;
    for (size_t begin = 0; begin < old + count; begin += VDB_PAD) {
      size_t kept = 0;
      for (size_t i = begin; i < vdb_min(begin + VDB_PAD, old + count); i++) {
        uint32_t row = i < old ? links[1 + i] : job->rows[reverse[i - old] & 0xfffffffu];
        if (row < db->slots) some[kept++] = row;
      }
      entered = vdb_enter_rows(db, &aim, some, kept, entered, room, walker);
    }
    if (vdb_row_blurs(db, &aim, entered, walker)) continue;
    links[0] = (uint32_t)vdb_choose_links(db, codes, entered, most, links + 1, walker);
    return;
  }
}

/* Its share of the sorted links back; a target belongs to the task in whose share it begins. */
static inline void vdb_link_back_task(void *context, size_t task) {
  vdb_insertion *job = (vdb_insertion *)context;
  const uint64_t *reverse = job->db->graph.workshop->reverse;
  size_t all = job->reverse_count, i = task * all / job->tasks, end = (task + 1) * all / job->tasks;
  vdb_walker *walker = vdb_take_walker(job->db, vdb_build_room(job->db));
  if (!walker) return;
  while (i && i < end && reverse[i] >> 28 == reverse[i - 1] >> 28) i++;
  while (i < end) {
    size_t count = 1;
    while (i + count < all && reverse[i + count] >> 28 == reverse[i] >> 28) count++;
    vdb_link_back(job, reverse + i, count, walker);
    i += count;
  }
  vdb_give_walker(job->db, walker);
  job->done[task] = 1;
}

/* Runs all tasks; those that found no walker run again here, where the others have given theirs back. */
VDB_LIGHT void vdb_run_insertion(vdb_insertion *job, size_t work, size_t each, vdb_task run) {
  job->tasks = vdb_min((work + each - 1) / each, VDB_BATCH);
  memset(job->done, 0, job->tasks);
  vdb_parallel(job->db, job->tasks, run, job);
  for (size_t task = 0; task < job->tasks; task++)
    if (!job->done[task]) run(job, task);
}

/* A tower for a row that stands higher than the lowest level. A removed row's has no levels, and says behind that how
 * many it has room for. Without memory, which only rows renumbered by vdb_compact can want, the row gets none. */
VDB_LIGHT void vdb_place_tower(vdb_database *db, size_t row) {
  vdb_graph *graph = &db->graph;
  uint32_t links = db->options.links, levels = vdb_level_of(row, links);
  size_t size = vdb_tower_size(levels, links), place = graph->tower_of[row], end = graph->towers_size + size;
  if (place) {
    graph->towers[place] = graph->towers[place + 1];
    graph->towers[place + 1] = 0;
    return;
  }
  if (!levels || end > UINT32_MAX) return;
  if (end > graph->towers_capacity) {
    size_t grown = end + end / 2;
    if (!vdb_grow((void **)&graph->towers, graph->towers_capacity, grown, sizeof(uint32_t))) return;
    graph->towers_capacity = grown;
  }
  graph->tower_of[row] = (uint32_t)graph->towers_size;
  memset(graph->towers + graph->towers_size, 0, size * sizeof(uint32_t));
  graph->towers[graph->towers_size] = levels;
  graph->towers_size = end;
}

VDB_LIGHT void vdb_leave_tower(vdb_database *db, size_t row) {
  uint32_t levels = vdb_levels_at(db, row);
  if (!levels) return;
  for (uint32_t level = 1; level <= levels; level++) vdb_links_of(db, row, level)[0] = 0;
  db->graph.towers[db->graph.tower_of[row]] = 0;
  db->graph.towers[db->graph.tower_of[row] + 1] = levels;
}

/* 0 if it was stopped; then nobody links to the rows of the batch. */
VDB_LIGHT int vdb_insert_batch(vdb_insertion *job) {
  vdb_database *db = job->db;
  vdb_let_readers_in(&db->lock); /* what follows writes only links that no walk can meet yet */
  vdb_run_insertion(job, job->count, 8, vdb_link_task);
  vdb_keep_readers_out(&db->lock);
  if (vdb_is_stopped(job)) return 0;
  job->reverse_count = vdb_collect_reverse(job);
  vdb_run_insertion(job, job->reverse_count, 64, vdb_link_back_task);
  for (size_t i = 0; i < job->count; i++) {
    uint32_t levels = vdb_levels_at(db, job->rows[i]);
    if (db->graph.entry != VDB_NO_ROW && levels <= db->graph.top) continue;
    db->graph.entry = job->rows[i];
    db->graph.top = levels;
  }
  return 1;
}

/* --- reachability --- */

/* Everything that can be reached from `row` and was not before; `queue` has room for all rows. */
VDB_LIGHT void vdb_flood(const vdb_database *db, uint32_t row, uint32_t *queue, vdb_walker *walker) {
  size_t begin = 0, end = 0;
  walker->visited[row] = walker->epoch;
  for (queue[end++] = row; begin < end; begin++) {
    const uint32_t *links = vdb_links_at(db, queue[begin]);
    for (size_t i = 1, count = vdb_link_count(db, links, 0); i <= count; i++) {
      uint32_t other = links[i];
      if (other >= db->slots || walker->visited[other] == walker->epoch) continue;
      walker->visited[other] = walker->epoch;
      queue[end++] = other;
    }
  }
}

VDB_INLINE int vdb_can_host(const vdb_database *db, uint32_t row, const vdb_walker *walker) {
  return row < db->slots && walker->visited[row] == walker->epoch && vdb_links_at(db, row)[0] < vdb_most_links(db, 0);
}

/* A row that was reached, has room for a link, and is a neighbour or a neighbour's neighbour of `row`. */
VDB_LIGHT uint32_t vdb_find_host(const vdb_database *db, uint32_t row, const vdb_walker *walker) {
  const uint32_t *links = vdb_links_at(db, row);
  size_t count = vdb_link_count(db, links, 0);
  for (size_t i = 1; i <= count; i++)
    if (vdb_can_host(db, links[i], walker)) return links[i];
  for (size_t i = 1; i <= count; i++) {
    if (links[i] >= db->slots) continue;
    const uint32_t *next = vdb_links_at(db, links[i]);
    for (size_t j = 1, more = vdb_link_count(db, next, 0); j <= more; j++)
      if (vdb_can_host(db, next[j], walker)) return next[j];
  }
  return VDB_NO_ROW;
}

/* Links to every row that cannot be reached from the entry on the lowest level; choosing among links can cut a row off.
 * Without memory it is left for the next time. */
VDB_LIGHT void vdb_connect(vdb_database *db) {
  vdb_walker *walker = vdb_take_walker(db, vdb_build_room(db));
  uint32_t *queue = (uint32_t *)VDB_MALLOC(vdb_max(1, db->slots) * sizeof(uint32_t)), spare = 0;
  if (walker && queue && db->graph.entry != VDB_NO_ROW) {
    vdb_start_walk(walker);
    vdb_flood(db, db->graph.entry, queue, walker);
    for (uint32_t row = 0; row < db->slots; row++) {
      if (!vdb_is_live(db, row) || walker->visited[row] == walker->epoch) continue;
      uint32_t host = vdb_find_host(db, row, walker), *links = vdb_links_at(db, row);
      if (host == VDB_NO_ROW) {
        while (spare < db->slots && !vdb_can_host(db, spare, walker)) spare++;
        if (spare == db->slots) break;
        host = spare;
        vdb_mark_part(db, row);
        if (links[0] < vdb_most_links(db, 0)) links[++links[0]] = host;
      }
      uint32_t *hosts = vdb_links_at(db, host);
      vdb_mark_part(db, host);
      hosts[++hosts[0]] = row;
      vdb_flood(db, row, queue, walker);
    }
    if (db->graph.workshop) db->graph.workshop->unchecked = 0;
  }
  VDB_FREE(queue);
  vdb_give_walker(db, walker);
}

/* Of rows that were to be inserted, the first `linked` were: they stay as way points, as if removed. */
VDB_RARE void vdb_graph_give_up(vdb_database *db, const uint32_t *rows, size_t count, size_t linked) {
  db->graph.workshop->unchecked += linked;
  for (size_t i = count; i-- > linked;) {
    vdb_leave_tower(db, rows[i]);
    vdb_links_at(db, rows[i])[0] = 0;
    vdb_free_row(db, rows[i]);
  }
}

/* Makes rows that are stored and described part of the graph, and live; vdb_graph_make_room has been called. Until they
 * are live all together, searches that were let in only pass over them. */
VDB_LIGHT vdb_error vdb_graph_insert(vdb_database *db, const uint32_t *rows, size_t count, vdb_watch *watch) {
  vdb_insertion job;
  job.db = db;
  job.watch = watch;
  job.all = count;
  for (size_t i = 0; i < count; i++) {
    vdb_place_tower(db, rows[i]);
    vdb_links_at(db, rows[i])[0] = 0;
  }
  for (size_t begin = 0; begin < count; begin += job.count) {
    size_t linked = 0;
    job.rows = rows + begin;
    job.entered = begin;
    for (job.count = 0; job.count < vdb_min(VDB_BATCH, count - begin); job.count++) {
      linked += 1 + vdb_levels_at(db, job.rows[job.count]);
      if (linked > VDB_BATCH * VDB_BATCH_LINKED) break;
    }
    if (!vdb_insert_batch(&job)) {
      vdb_graph_give_up(db, rows, count, begin);
      return VDB_ERROR_INTERRUPTED;
    }
  }
  vdb_make_live(db, rows, count);
  db->graph.workshop->unchecked += count;
  if (db->graph.workshop->unchecked >= (db->slots - db->free_count) / 8) vdb_connect(db);
  return VDB_OK;
}

/* --- removal --- */
#define VDB_DEAD_WAYS 64u /* removed rows that are looked behind, for one live row */

typedef struct {
  vdb_database *db;
  size_t rows_per_task;
  int failed;
} vdb_sweeping;

/* Rows linked from `row`, not met yet: live ones into the pool (unsorted), removed ones into `dead`. */
VDB_LIGHT size_t vdb_look_behind(const vdb_database *db, uint32_t row, uint32_t level, uint32_t *dead,
                                     size_t *dead_count, size_t count, vdb_walker *walker) {
  const uint32_t *links = vdb_links_of(db, row, level);
  for (size_t i = 1, all = vdb_link_count(db, links, level); i <= all; i++) {
    uint32_t other = links[i];
    if (other >= db->slots || walker->visited[other] == walker->epoch) continue;
    walker->visited[other] = walker->epoch;
    if (!vdb_is_live(db, other)) {
      if (*dead_count < VDB_DEAD_WAYS) dead[(*dead_count)++] = other;
    } else if (count < walker->room) {
      walker->pool[count++].row = other;
    }
  }
  return count;
}

/* Links a live row past its removed neighbours on one level. */
VDB_LIGHT void vdb_mend_row(vdb_database *db, uint32_t row, uint32_t level, vdb_walker *walker) {
  uint32_t dead[VDB_DEAD_WAYS], some[VDB_PAD], *links = vdb_links_of(db, row, level);
  size_t dead_count = 0, count, entered, place;
  vdb_start_walk(walker);
  walker->visited[row] = walker->epoch;
  count = vdb_look_behind(db, row, level, dead, &dead_count, 0, walker);
  if (!dead_count) return;
  vdb_mark_part(db, row);
  for (size_t i = 0; i < dead_count; i++)
    count = vdb_look_behind(db, dead[i], level, dead, &dead_count, count, walker);
  for (int codes = vdb_has_codes(db->options.storage);; codes = 0) {
    vdb_aim aim = vdb_aim_at_row(db, row, codes, walker);
    for (entered = place = 0; place < count;) { /* entering sorts what was read already, in the same array */
      size_t got = 0;
      while (got < VDB_PAD && place < count) some[got++] = walker->pool[place++].row;
      entered = vdb_enter_rows(db, &aim, some, got, entered, walker->room, walker);
    }
    if (vdb_row_blurs(db, &aim, entered, walker)) continue;
    links[0] = (uint32_t)vdb_choose_links(db, codes, entered, vdb_most_links(db, level), links + 1, walker);
    return;
  }
}

/* Live rows change their own links and read those of removed rows, which do not change. */
VDB_ONCE void vdb_mend_task(void *context, size_t task) {
  vdb_sweeping *job = (vdb_sweeping *)context;
  vdb_database *db = job->db;
  size_t end = vdb_min((task + 1) * job->rows_per_task, db->slots);
  vdb_walker *walker = vdb_take_walker(db, vdb_build_room(db));
  if (!walker) {
    __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (size_t row = task * job->rows_per_task; row < end; row++) {
    if (!vdb_is_live(db, row)) continue;
    for (uint32_t level = vdb_levels_at(db, row) + 1; level-- > 0;) vdb_mend_row(db, (uint32_t)row, level, walker);
  }
  vdb_give_walker(db, walker);
}

/* The lowest of the live rows on the highest level. */
VDB_LIGHT void vdb_choose_entry(vdb_database *db) {
  db->graph.entry = VDB_NO_ROW;
  db->graph.top = 0;
  for (size_t row = 0; row < db->slots; row++) {
    if (!vdb_is_live(db, row)) continue;
    uint32_t levels = vdb_levels_at(db, row);
    if (db->graph.entry != VDB_NO_ROW && levels <= db->graph.top) continue;
    db->graph.entry = (uint32_t)row;
    db->graph.top = levels;
  }
}

/* Links live rows past removed ones, which leave the graph and join free_rows. */
VDB_LIGHT vdb_error vdb_graph_sweep(vdb_database *db) {
  vdb_sweeping job = {db, 64, 0};
  if (db->slots - db->free_count == db->count) return VDB_OK;
  vdb_parallel(db, (db->slots + job.rows_per_task - 1) / job.rows_per_task, vdb_mend_task, &job);
  vdb_walker *walker = job.failed ? NULL : vdb_take_walker(db, vdb_build_room(db));
  if (!walker) return VDB_ERROR_OUT_OF_MEMORY; /* what was mended is mended, and removed rows are still way points */
  vdb_start_walk(walker);
  for (size_t i = 0; i < db->free_count; i++) walker->visited[db->free_rows[i]] = walker->epoch;
  for (size_t row = db->slots; row-- > 0;) {
    if (vdb_is_live(db, row) || walker->visited[row] == walker->epoch) continue;
    vdb_mark_part(db, row);
    vdb_leave_tower(db, row);
    vdb_links_at(db, row)[0] = 0;
    vdb_free_row(db, row);
  }
  vdb_give_walker(db, walker);
  vdb_choose_entry(db);
  vdb_connect(db);
  return VDB_OK;
}

/* After a row's live bit was cleared. */
static inline vdb_error vdb_graph_removed(vdb_database *db, size_t row) {
  size_t linked = db->slots - db->free_count, dead = linked > db->count ? linked - db->count : 0;
  (void)row;
  return dead * 5 > linked ? vdb_graph_sweep(db) : VDB_OK;
}

/* After a sweep, when rows and their links have moved: new_of_old[i] is the new number of row i, VDB_NO_ROW if it is
 * gone. No row has moved up, so that each place of tower_of is read before it is written. */
VDB_LIGHT void vdb_graph_renumber(vdb_database *db, const uint32_t *new_of_old, size_t old_slots) {
  vdb_graph *graph = &db->graph;
  for (size_t old = 0; old < old_slots; old++) {
    uint32_t row = new_of_old[old], place = graph->tower_of[old];
    graph->tower_of[old] = 0;
    if (row == VDB_NO_ROW) continue;
    graph->tower_of[row] = place;
    for (uint32_t level = vdb_levels_at(db, row) + 1; level-- > 0;) {
      uint32_t *links = vdb_links_of(db, row, level);
      size_t count = vdb_link_count(db, links, level), kept = 0;
      for (size_t i = 1; i <= count; i++)
        if (links[i] < old_slots && new_of_old[links[i]] != VDB_NO_ROW) links[++kept] = new_of_old[links[i]];
      links[0] = (uint32_t)kept;
    }
  }
  if (graph->entry != VDB_NO_ROW) graph->entry = new_of_old[graph->entry];
}

/* --- search --- */
#define VDB_WALK_COST 16u /* rows that a scan reads while a walk deals with one candidate */

/* Exact distances of the first `most` of the pool that pass; the nearest k of them into `out`, sorted. Returns how many
 * of the pool pass, at most `most`. */
VDB_ONCE size_t vdb_rank(const vdb_database *db, const vdb_question *question, const vdb_query_options *options,
                              vdb_walker *walker, size_t count, size_t most, size_t k, vdb_found *out, size_t *found) {
  size_t passed = 0;
  for (size_t i = 0; i < count && passed < most; i++)
    if (vdb_passes(db, options, walker->pool[i].row)) walker->pool[passed++].row = walker->pool[i].row;
  *found = 0;
  for (size_t i = 0; i < passed; i++) {
    uint32_t row = walker->pool[i].row;
    if (i + 2 < passed) vdb_prefetch_row(db, walker->pool[i + 2].row);
    vdb_found entry = {vdb_exact_distance(db, question, row, walker->decoded), row};
    size_t place = *found;
    if (place == k && !vdb_farther(out[k - 1], entry)) continue;
    if (place < k) ++*found;
    else place--;
    for (; place && vdb_farther(out[place - 1], entry); place--) out[place] = out[place - 1];
    out[place] = entry;
  }
  return passed;
}

/* Rows that pass among the neighbours of a row, and among the neighbours of those neighbours that do not: at most `most`
 * that the walk has not met, into walker->fresh. `seen` and `passed` count rows that were looked at. */
static inline size_t vdb_gather_passing(const vdb_database *db, const vdb_aim *aim, const vdb_query_options *options,
                                        uint32_t row, size_t most, size_t *seen, size_t *passed, vdb_walker *walker) {
  const uint32_t *links = vdb_links_at(db, row);
  uint32_t bridges[2 * 128];
  size_t count = vdb_link_count(db, links, 0), kept = 0, bridge_count = 0;
  for (size_t i = 1; i <= count; i++) {
    uint32_t other = links[i];
    if (other >= db->slots || walker->visited[other] == walker->epoch) continue;
    int passes = vdb_passes(db, options, other);
    ++*seen;
    *passed += (size_t)passes;
    walker->visited[other] = walker->epoch;
    if (passes) {
      walker->fresh[kept++] = other;
      vdb_prefetch_near(db, aim, other);
      continue;
    }
    bridges[bridge_count++] = other;
    const char *list = (const char *)vdb_links_at(db, other);
    for (size_t at = 0; at < vdb_link_stride(db) * sizeof(uint32_t); at += 64) __builtin_prefetch(list + at);
  }
  for (size_t b = 0; b < bridge_count && kept < most; b++) {
    links = vdb_links_at(db, bridges[b]);
    count = vdb_link_count(db, links, 0);
    for (size_t i = 1; i <= count && kept < most; i++) {
      uint32_t other = links[i];
      if (other >= db->slots) continue;
      ++*seen;
      if (!vdb_passes(db, options, other)) continue;
      ++*passed;
      if (walker->visited[other] == walker->epoch) continue;
      walker->visited[other] = walker->epoch;
      walker->fresh[kept++] = other;
      vdb_prefetch_near(db, aim, other);
    }
  }
  return kept;
}

#define VDB_BRIDGED_SHARE 0.25 /* walks are bridged where fewer rows pass */
#define VDB_BRIDGED_SEEN 16.0 /* rows that should pass among those seen before it is judged whether enough do */

/* As vdb_walk on the lowest level, but of rows that pass a bitset, and over those that do not: the pool holds, but for the
 * start, rows that pass only. 0 where those near the query are far fewer than `share`: they may all be elsewhere, and this
 * might not find the way. */
VDB_ONCE size_t vdb_walk_passing(const vdb_database *db, const vdb_aim *aim, const vdb_query_options *options,
                                 vdb_near start, double share, size_t effort, vdb_walker *walker) {
  vdb_near *pool = walker->pool;
  size_t count = 1, place = 0, seen = 0, passed = 0, most = vdb_most_links(db, 0);
  int judged = 0;
  vdb_start_walk(walker);
  walker->visited[start.row] = walker->epoch;
  pool[0] = start;
  pool[0].expanded = 0;
  while (place < count) {
    if (pool[place].expanded) {
      place++;
      continue;
    }
    pool[place].expanded = 1;
    size_t fresh = vdb_gather_passing(db, aim, options, pool[place].row, most, &seen, &passed, walker), nearest = effort;
    if (!judged && (double)seen * share > VDB_BRIDGED_SEEN) {
      if ((double)passed < 0.5 * share * (double)seen) return 0;
      judged = 1;
    }
    size_t next = place + 1;
    while (next < count && pool[next].expanded) next++;
    if (next < count) __builtin_prefetch(vdb_links_at(db, pool[next].row));
    vdb_find_keys(db, aim, walker->fresh, fresh, walker, walker->keys);
    for (size_t i = 0; i < fresh; i++) {
      if (count == effort && !(walker->keys[i] < pool[count - 1].key)) continue;
      nearest = vdb_min(nearest, vdb_pool_enter(pool, &count, effort, walker->keys[i], walker->fresh[i]));
    }
    place = nearest <= place ? nearest : place + 1;
  }
  return count;
}

/* Walks from the entry over the lowest level: over rows that pass, if a bitset knows which, or else with a pool so large
 * that enough of it pass. */
VDB_ONCE size_t vdb_walk_filtered(const vdb_database *db, const vdb_aim *aim, const vdb_query_options *options, double share,
                                  size_t effort, size_t widened, vdb_walker *walker) {
  vdb_near start = vdb_approach(db, aim, 0, walker);
  size_t count = 0;
  if (options->bitset && !options->filter && share < VDB_BRIDGED_SHARE)
    count = vdb_walk_passing(db, aim, options, start, share, effort + 1, walker);
  return count > effort ? count : vdb_walk(db, aim, start, 0, widened, walker);
}

/* Walks, with more effort the fewer rows pass. Gives up, and answers *found < k, when a scan is less work. */
VDB_ONCE vdb_error vdb_search_graph(const vdb_database *db, const vdb_question *question,
                                         const vdb_query_options *options, size_t passing, size_t k, vdb_found *out,
                                         size_t *found) {
  size_t effort = vdb_max(k, options->effort ? options->effort : vdb_max(64, 2 * k));
  size_t linked = db->slots - vdb_min(db->free_count, db->slots);
  vdb_aim plain = vdb_aim_at_question(db, question, 0), aim = plain;
  aim.codes = vdb_has_codes(db->options.storage);
  size_t most = k + (aim.codes ? vdb_max(k, 16) : 4); /* that measured exactly; more than this changes nothing */
  double widened = (double)effort * (double)linked / (double)passing;
  while (widened * VDB_WALK_COST < (double)passing) {
    vdb_walker *walker = vdb_take_walker(db, (size_t)widened + 1);
    if (!walker) return VDB_ERROR_OUT_OF_MEMORY;
    double passed_of = (double)passing / (double)linked;
    size_t count = vdb_walk_filtered(db, &aim, options, passed_of, effort, (size_t)widened, walker);
    if (aim.codes && db->options.storage == VDB_STORAGE_F32_I8 &&
        vdb_codes_blur(db, &plain, walker->pool, count, walker)) {
      aim.codes = 0;
      count = vdb_walk_filtered(db, &aim, options, passed_of, effort, (size_t)widened, walker);
    }
    size_t passed = vdb_rank(db, question, options, walker, count, most, k, out, found);
    vdb_give_walker(db, walker);
    if (passed >= vdb_min(most, effort) || !options->filter) break;
    /* A function's share is known by what it lets pass here. */
    double share = ((double)passed + 1.0) / ((double)count + 1.0);
    if (share * widened > 0.7 * (double)effort) break;
    widened = (double)effort / share;
    passing = (size_t)(share * (double)linked);
  }
  return VDB_OK;
}

/* out [k] by (distance, row). Only if fewer rows pass are there fewer than k. */
VDB_ONCE vdb_error vdb_graph_search(const vdb_database *db, const vdb_question *question,
                                         const vdb_query_options *options, vdb_found *out, size_t *found) {
  size_t passing = vdb_count_passing(db, options), k = vdb_min(options->k, db->count);
  int usable = db->graph.entry < db->slots && db->graph.tower_of &&
               (db->metric == VDB_METRIC_EUCLIDEAN ? !question->wild : question->square > 0.0);
  *found = 0;
  if (!passing) return VDB_OK;
  vdb_error error = usable ? vdb_search_graph(db, question, options, passing, k, out, found) : VDB_OK;
  if (error || *found == vdb_min(k, passing)) return error;
  return vdb_scan_one(db, question, options, out, found);
}

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

/* --- the operating system's files --- */
#define VDB_NAME_ROOM 8192u /* longer than any path that a system takes */

/* The file that a path leads to. */
typedef struct {
  char *path, *other, *temporary; /* [VDB_NAME_ROOM] each; path: without a symbolic link at its end */
  int exists;
#ifndef _WIN32
  struct stat status; /* if it exists */
#endif
  vdb_error error;                /* why it cannot be replaced; VDB_ERROR_IO for what errno says */
} vdb_target;

VDB_RARE int vdb_target_failed(vdb_target *target, vdb_error error, int number) {
  target->error = error;
  return number;
}

VDB_RARE const char *vdb_last_separator(const char *path) {
  const char *slash = strrchr(path, '/');
#ifdef _WIN32
  const char *other = strrchr(path, '\\');
  if (other && (!slash || other > slash)) slash = other;
#endif
  return slash;
}

/* The name of a new file beside the target: its own, cut to `most` bytes where a file system takes no longer one, with
 * what tells it from others. */
VDB_RARE void vdb_name_temporary(vdb_target *target, size_t most) {
  static unsigned counter;
  unsigned number = __atomic_fetch_add(&counter, 1u, __ATOMIC_RELAXED);
  const char *slash = vdb_last_separator(target->path), *name = slash ? slash + 1 : target->path;
  size_t size = strlen(name);
  for (size = vdb_min(size, most); size && ((unsigned char)name[size] & 0xc0u) == 0x80u;) size--; /* whole letters */
  size += (size_t)(name - target->path);
  memcpy(target->temporary, target->path, size);
  snprintf(target->temporary + size, 64, ".tmp-%ld-%u", (long)vdb_sys_getpid(), number);
}

#ifndef _WIN32
/* Follows symbolic links at the end of target->path, to a file that need not be there. 0 or errno. */
VDB_RARE int vdb_follow_links(vdb_target *target) {
  for (int hops = 0; hops < 40; hops++) {
    long size = vdb_sys_readlink(target->path, target->other, VDB_NAME_ROOM);
    if (size < 0) return errno == EINVAL || errno == ENOENT ? 0 : errno; /* no link, or nothing */
    const char *slash = strrchr(target->path, '/');
    size_t folder = slash && target->other[0] != '/' ? (size_t)(slash - target->path) + 1 : 0;
    if (folder + (size_t)size + 64 >= VDB_NAME_ROOM) return ENAMETOOLONG; /* 64: for a temporary name */
    memcpy(target->path + folder, target->other, (size_t)size);
    target->path[folder + (size_t)size] = 0;
  }
  return ELOOP;
}

/* What is at `path`, and whether it may be replaced. 0 or errno. */
VDB_RARE int vdb_find_target(const char *path, vdb_target *target) {
  struct stat seen;
  if (!*path) return vdb_target_failed(target, VDB_ERROR_IO, ENOENT);
  if (strlen(path) + 64 >= VDB_NAME_ROOM) return vdb_target_failed(target, VDB_ERROR_IO, ENAMETOOLONG);
  memcpy(target->path, path, strlen(path) + 1);
  target->exists = stat(path, &seen) == 0;
  if (!target->exists && errno != ENOENT) return vdb_target_failed(target, VDB_ERROR_IO, errno);
  if (target->exists && !S_ISREG(seen.st_mode))
    return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, S_ISDIR(seen.st_mode) ? EISDIR : EINVAL);
  int failed = vdb_follow_links(target);
  if (failed) return vdb_target_failed(target, VDB_ERROR_IO, failed);
  if (!target->exists) return 0;
  target->status = seen;
  /* A link of /proc may lead to a file that has no name any more. */
  if (stat(target->path, &seen) || seen.st_ino != target->status.st_ino || seen.st_dev != target->status.st_dev)
    return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, ENOENT);
  return seen.st_nlink > 1 ? vdb_target_failed(target, VDB_ERROR_LINKED, EMLINK) : 0;
}

/* An open file of a new name beside the target. -1 on failure. Names are tried again, for a killed process of our number
 * may have left some. */
VDB_RARE int vdb_create_beside(vdb_target *target) {
  static const size_t lengths[] = {VDB_NAME_ROOM, 200, 100, 20};
  int file = -1, length = 0;
  for (int attempt = 0; attempt < 100 && file < 0; attempt++) {
    vdb_name_temporary(target, lengths[length]);
    file = open(target->temporary, O_WRONLY | O_CREAT | O_EXCL, target->exists ? 0600 : 0666);
    if (file < 0 && errno == ENAMETOOLONG && length < 3) length++;
    else if (file < 0 && errno != EEXIST) break;
  }
  if (file >= 0) fcntl(file, F_SETFD, FD_CLOEXEC);
  return file;
}

/* Gives the new file the owner, group and mode of the one whose place it will take. 0 or errno. */
VDB_RARE int vdb_take_over(int file, const struct stat *old) {
  struct stat own;
  if (fstat(file, &own)) return errno;
  int others = own.st_uid != old->st_uid || own.st_gid != old->st_gid;
  unsigned user = own.st_uid == old->st_uid ? (unsigned)-1 : (unsigned)old->st_uid;
  if (others && vdb_sys_fchown(file, user, (unsigned)old->st_gid)) return errno;
  if ((others || own.st_mode != old->st_mode) && vdb_sys_fchmod(file, old->st_mode & 07777u)) return errno;
  return 0;
}

/* The new file, open for writing. -1 with errno and target->error set on failure. */
VDB_RARE int vdb_create_new(vdb_target *target) {
  int file = vdb_create_beside(target), failed = 0;
  target->error = VDB_ERROR_IO;
  if (file < 0) {
    if (target->exists && (errno == EACCES || errno == EPERM || errno == EROFS)) target->error = VDB_ERROR_FOLDER;
    return -1;
  }
  if (target->exists) failed = vdb_take_over(file, &target->status);
  if (!failed) return file;
  vdb_sys_close(file);
  vdb_sys_unlink(target->temporary);
  target->error = VDB_ERROR_OWNER;
  errno = failed;
  return -1;
}

/* The folder that holds `path`, to be synced after the rename. -1 if it may not be read: it is left to the system. */
VDB_RARE int vdb_open_folder(const char *path, char *name) {
  const char *slash = strrchr(path, '/');
  size_t size = slash ? (size_t)(slash - path) : 0;
  if (size) memcpy(name, path, size);
  if (!size) name[size++] = slash ? '/' : '.';
  name[size] = 0;
  int folder = open(name, O_RDONLY);
  if (folder >= 0) fcntl(folder, F_SETFD, FD_CLOEXEC);
  return folder;
}

/* Gives the finished file the name that nothing may have yet. 0 or errno. */
VDB_RARE int vdb_name_new(vdb_target *target) {
  if (vdb_sys_linkat(VDB_HERE, target->temporary, VDB_HERE, target->path, 0) == 0)
    return vdb_sys_unlink(target->temporary) ? errno : 0;
  if (errno == EEXIST) return vdb_target_failed(target, VDB_ERROR_CHANGED, EEXIST);
  return rename(target->temporary, target->path) ? errno : 0; /* a file system without hard links */
}

/* The finished file takes its name; then the folder is synced. Not every file system can; EINVAL says that it cannot. */
VDB_RARE int vdb_put_in_place(vdb_target *target, vdb_save_mode mode) {
  int folder = vdb_open_folder(target->path, target->other), failed = 0;
  if (mode == VDB_SAVE_NEW) {
    failed = vdb_name_new(target);
  } else if (rename(target->temporary, target->path)) {
    failed = errno;
    if (target->exists && (failed == EPERM || failed == EACCES)) target->error = VDB_ERROR_FOLDER;
  }
  while (folder >= 0 && !failed && vdb_sys_fsync(folder) && errno != EINVAL)
    if (errno != EINTR) failed = errno;
  if (folder >= 0) vdb_sys_close(folder);
  return failed;
}

VDB_RARE int vdb_is_there(const char *path) {
  struct stat status;
  return stat(path, &status) == 0;
}

/* Opens a file for reading; a pipe or a device is refused without waiting for it. -1 on failure. */
VDB_RARE int vdb_open_file(const char *path, uint64_t *size) {
  struct stat status;
  int file = open(path, O_RDONLY | O_NONBLOCK), failed = 0;
  if (file < 0) return -1;
  fcntl(file, F_SETFD, FD_CLOEXEC);
  if (fstat(file, &status)) failed = errno;
  if (!failed && !S_ISREG(status.st_mode)) failed = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
  if (!failed && (uint64_t)status.st_size > SIZE_MAX) failed = EFBIG;
  *size = (uint64_t)status.st_size;
  if (!failed) return file;
  vdb_sys_close(file);
  errno = failed;
  return -1;
}

/* A view of an open file, which may be written to, until vdb_protect_file, without changing the file: nobody reserves
 * memory for all of it, as little of it will be written to. NULL with errno on failure. */
VDB_RARE void *vdb_map_file(int file, size_t size, int writable) {
#ifdef MAP_NORESERVE
  int flags = MAP_PRIVATE | (writable ? MAP_NORESERVE : 0);
#else
  int flags = MAP_PRIVATE;
#endif
  void *base = mmap(NULL, size, writable ? PROT_READ | PROT_WRITE : PROT_READ, flags, file, 0);
  return base == MAP_FAILED ? NULL : base;
}

VDB_RARE void vdb_protect_file(void *base, size_t size) { (void)mprotect(base, size, PROT_READ); }

static inline void vdb_unmap_file(void *base, size_t size) { (void)munmap(base, size); }
#endif

#ifdef _WIN32
/* Windows. Paths are in the code page of the process, as for fopen. ReplaceFile keeps attributes and access control
 * lists; it does not replace a file that is open elsewhere or mapped, which is VDB_ERROR_IO with EACCES. */
VDB_RARE int vdb_windows_errno(void) {
  switch (GetLastError()) {
    case ERROR_FILE_NOT_FOUND:
    case ERROR_PATH_NOT_FOUND: return ENOENT;
    case ERROR_FILE_EXISTS:
    case ERROR_ALREADY_EXISTS: return EEXIST;
    case ERROR_ACCESS_DENIED:
    case ERROR_SHARING_VIOLATION:
    case ERROR_LOCK_VIOLATION:
    case ERROR_USER_MAPPED_FILE:
    case ERROR_UNABLE_TO_REMOVE_REPLACED: return EACCES;
    case ERROR_DISK_FULL: return ENOSPC;
    case ERROR_NOT_ENOUGH_MEMORY: return ENOMEM;
    default: return EIO;
  }
}

/* What is at `path`, and whether it may be replaced. 0 or errno. */
VDB_RARE int vdb_find_target(const char *path, vdb_target *target) {
  BY_HANDLE_FILE_INFORMATION seen;
  if (!*path) return vdb_target_failed(target, VDB_ERROR_IO, ENOENT);
  if (strlen(path) + 64 >= VDB_NAME_ROOM) return vdb_target_failed(target, VDB_ERROR_IO, ENAMETOOLONG);
  memcpy(target->path, path, strlen(path) + 1);
  DWORD attributes = GetFileAttributesA(path), share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
  HANDLE file = CreateFileA(path, 0, share, NULL, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS, NULL);
  target->exists = file != INVALID_HANDLE_VALUE;
  if (!target->exists) {
    int failed = vdb_windows_errno();
    return failed == ENOENT ? 0 : vdb_target_failed(target, VDB_ERROR_IO, failed);
  }
  int disk = GetFileType(file) == FILE_TYPE_DISK && GetFileInformationByHandle(file, &seen);
  int named = 1;
  if (disk && attributes != INVALID_FILE_ATTRIBUTES && attributes & FILE_ATTRIBUTE_REPARSE_POINT) { /* a link: follow it */
    DWORD size = GetFinalPathNameByHandleA(file, target->path, VDB_NAME_ROOM - 64, 0);
    named = size && size < VDB_NAME_ROOM - 64;
  }
  CloseHandle(file);
  if (!disk) return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, EINVAL);
  if (seen.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, EISDIR);
  if (!named) return vdb_target_failed(target, VDB_ERROR_IO, ENAMETOOLONG);
  return seen.nNumberOfLinks > 1 ? vdb_target_failed(target, VDB_ERROR_LINKED, EMLINK) : 0;
}

/* The new file, open for writing. -1 with errno and target->error set on failure. */
VDB_RARE int vdb_create_new(vdb_target *target) {
  static const size_t lengths[] = {VDB_NAME_ROOM, 200, 100, 20};
  int file = -1;
  for (int attempt = 0; attempt < 100 && file < 0; attempt++) {
    vdb_name_temporary(target, lengths[attempt < 4 ? attempt : 3]);
    file = _open(target->temporary, _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT, _S_IREAD | _S_IWRITE);
    if (file < 0 && errno != EEXIST && attempt >= 3) break;
  }
  target->error = file < 0 && target->exists && errno == EACCES ? VDB_ERROR_FOLDER : VDB_ERROR_IO;
  return file;
}

VDB_RARE int vdb_put_in_place(vdb_target *target, vdb_save_mode mode) {
  DWORD flags = MOVEFILE_WRITE_THROUGH | (mode == VDB_SAVE_NEW ? 0 : MOVEFILE_REPLACE_EXISTING);
  if (mode != VDB_SAVE_NEW && target->exists && ReplaceFileA(target->path, target->temporary, NULL, 0, NULL, NULL)) return 0;
  if ((mode == VDB_SAVE_NEW || !target->exists) && MoveFileExA(target->temporary, target->path, flags)) return 0;
  int failed = vdb_windows_errno();
  return failed == EEXIST ? vdb_target_failed(target, VDB_ERROR_CHANGED, EEXIST) : failed;
}

VDB_RARE int vdb_is_there(const char *path) { return GetFileAttributesA(path) != INVALID_FILE_ATTRIBUTES; }

/* Opens a file for reading, which others may replace meanwhile. -1 on failure. */
VDB_RARE int vdb_open_file(const char *path, uint64_t *size) {
  LARGE_INTEGER length;
  DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
  HANDLE handle = CreateFileA(path, GENERIC_READ, share, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
  if (handle == INVALID_HANDLE_VALUE) {
    errno = vdb_windows_errno();
    return -1;
  }
  int regular = GetFileType(handle) == FILE_TYPE_DISK && GetFileSizeEx(handle, &length);
  if (regular && (uint64_t)length.QuadPart <= SIZE_MAX) {
    int file = _open_osfhandle((intptr_t)handle, _O_RDONLY | _O_BINARY | _O_NOINHERIT);
    *size = (uint64_t)length.QuadPart;
    if (file >= 0) return file;
  }
  CloseHandle(handle);
  errno = regular ? EFBIG : EINVAL;
  return -1;
}

/* A view of an open file, which may be written to without changing the file. NULL with errno on failure. */
VDB_RARE void *vdb_map_file(int file, size_t size, int writable) {
  DWORD pages = writable ? PAGE_WRITECOPY : PAGE_READONLY;
  HANDLE mapping = CreateFileMappingA((HANDLE)_get_osfhandle(file), NULL, pages, 0, 0, NULL);
  void *base = mapping ? MapViewOfFile(mapping, writable ? FILE_MAP_COPY : FILE_MAP_READ, 0, 0, size) : NULL;
  if (!base) errno = vdb_windows_errno();
  if (mapping) CloseHandle(mapping); /* the view keeps it */
  return base;
}

VDB_RARE void vdb_protect_file(void *base, size_t size) {
  DWORD before;
  (void)VirtualProtect(base, size, PAGE_READONLY, &before);
}

static inline void vdb_unmap_file(void *base, size_t size) {
  (void)size;
  UnmapViewOfFile(base);
}
#endif

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

/* ------------------------------------------------------------------------------------------------------------------
 * 10 Functions
 */
VDB_API const char *vdb_error_text(vdb_error error) {
  switch (error) {
    case VDB_OK: return "no error";
    case VDB_ERROR_NULL_POINTER: return "a pointer that must not be NULL is NULL";
    case VDB_ERROR_INVALID_DIMENSIONS: return "dimensions must be 1 to 65536";
    case VDB_ERROR_OUT_OF_MEMORY: return "out of memory";
    case VDB_ERROR_NOT_FOUND: return "not found";
    case VDB_ERROR_INVALID_INDEX: return "no row has this index";
    case VDB_ERROR_THREAD_FAILURE: return "a thread or lock could not be made";
    case VDB_ERROR_NOT_FINITE: return "a vector holds NaN, infinity, or a number too great for its storage";
    case VDB_ERROR_INVALID_ARGUMENT: return "an argument is outside its range";
    case VDB_ERROR_DUPLICATE_ID: return "the id is there already, or twice in one call";
    case VDB_ERROR_READ_ONLY: return "the database is a read-only view of a file";
    case VDB_ERROR_IO: return "the file could not be read or written";
    case VDB_ERROR_CORRUPT: return "not a database file, or damaged";
    case VDB_ERROR_FULL: return "more rows than a database can hold";
    case VDB_ERROR_NOT_REGULAR: return "the path names a folder, a pipe or a device, no regular file";
    case VDB_ERROR_LINKED: return "the file has other names (hard links), which a save would part from it";
    case VDB_ERROR_OWNER: return "the file is another user's or group's, and would not be after a save";
    case VDB_ERROR_FOLDER: return "the file's folder does not let a new file take its place";
    case VDB_ERROR_CHANGED: return "the file is not the one that the database was read from";
    case VDB_ERROR_INTERRUPTED: return "interrupted";
  }
  return "unknown error";
}

VDB_API vdb_options vdb_default_options(void) {
  vdb_options options = {VDB_STORAGE_F32, VDB_INDEX_FLAT, 16, 200, 0};
  return options;
}

VDB_API vdb_query_options vdb_default_query_options(size_t k) {
  vdb_query_options options;
  memset(&options, 0, sizeof options);
  options.k = k;
  return options;
}

VDB_API const char *vdb_kernels(void) { return vdb_active()->name; }

VDB_API vdb_error vdb_set_kernels(const char *name) {
  const vdb_kernel_set *kernels = name ? vdb_kernels_named(name) : NULL;
  if (name && !kernels) return VDB_ERROR_NOT_FOUND;
  vdb_choose(kernels);
  return VDB_OK;
}

/* --- the distances of two vectors --- */
VDB_ONCE float vdb_distance_of(const float *a, const float *b, size_t dimensions, vdb_metric metric) {
  double sums[2], square[2] = {0.0, 0.0};
  vdb_active()->exact(a, b, dimensions, metric == VDB_METRIC_EUCLIDEAN, sums);
  if (metric == VDB_METRIC_COSINE) vdb_active()->exact(a, a, dimensions, 0, square);
  return vdb_finish_distance(metric, sums, square[1]);
}

VDB_API float vdb_dot_product(const float *a, const float *b, size_t dimensions) {
  return -vdb_distance_of(a, b, dimensions, VDB_METRIC_DOT_PRODUCT);
}

VDB_API float vdb_magnitude(const float *a, size_t dimensions) {
  double sums[2];
  vdb_active()->exact(a, a, dimensions, 0, sums);
  return (float)sqrt(sums[1]);
}

VDB_API float vdb_cosine_similarity(const float *a, const float *b, size_t dimensions) {
  return 1.0f - vdb_distance_of(a, b, dimensions, VDB_METRIC_COSINE);
}

VDB_API float vdb_euclidean_distance(const float *a, const float *b, size_t dimensions) {
  return vdb_distance_of(a, b, dimensions, VDB_METRIC_EUCLIDEAN);
}

VDB_API float vdb_compute_distance(const float *a, const float *b, size_t dimensions, vdb_metric metric) {
  return (unsigned)metric <= 2 ? vdb_distance_of(a, b, dimensions, metric) : 0.0f;
}

/* --- making and asking about a database --- */
VDB_API vdb_error vdb_new(size_t dimensions, vdb_metric metric, const vdb_options *options, vdb_database **out) {
  vdb_options chosen = options ? *options : vdb_default_options();
  if (!out) return VDB_ERROR_NULL_POINTER;
  *out = NULL;
  if (dimensions < 1 || dimensions > VDB_MAX_DIMENSIONS) return VDB_ERROR_INVALID_DIMENSIONS;
  if (!vdb_valid_options(dimensions, metric, &chosen)) return VDB_ERROR_INVALID_ARGUMENT;
  return vdb_allocate(dimensions, metric, &chosen, out);
}

VDB_API vdb_database *vdb_create(size_t dimensions, vdb_metric metric) {
  vdb_database *db = NULL;
  vdb_new(dimensions, metric, NULL, &db);
  return db;
}

VDB_API void vdb_destroy(vdb_database *db) { vdb_release(db); }

/* Reading takes the lock although the database is const for the caller. */
VDB_INLINE vdb_lock *vdb_lock_of(const vdb_database *db) { return &((vdb_database *)(uintptr_t)db)->lock; }

VDB_API size_t vdb_count(const vdb_database *db) {
  if (!db) return 0;
  vdb_enter_read(vdb_lock_of(db));
  size_t count = db->count;
  vdb_leave_read(vdb_lock_of(db));
  return count;
}

VDB_API size_t vdb_dimensions(const vdb_database *db) { return db ? db->dimensions : 0; }

VDB_RARE size_t vdb_bytes_held(const vdb_database *db) {
  size_t bytes = sizeof *db + sizeof(vdb_pool) + db->block_capacity * sizeof(vdb_block) + db->capacity / 8;
  size_t columns = vdb_columns_bytes(&((vdb_database *)(uintptr_t)db)->columns);
  if (db->mapping.base && !db->mapping.pages) return db->mapping.size + columns;
  bytes += columns + db->mapping.size + vdb_journal_bytes(&db->mapping);
  bytes += db->free_capacity * sizeof(uint32_t);
  for (size_t i = 0; i < db->block_count; i++) bytes += db->blocks[i].bytes + db->blocks[i].spilled_bytes;
  if (!db->mapping.base) bytes += db->records.table_size * sizeof(uint32_t);
  if (db->records.records) bytes += db->capacity * sizeof(unsigned char *);
  if (db->records.borrowed) bytes += db->capacity * sizeof(void *);
  bytes += db->records.bytes;
  if (db->records.loaded) bytes += sizeof(vdb_loaded) + db->records.loaded->size;
  return bytes + (db->mapping.base && !db->mapping.own_towers ? 0 : vdb_graph_bytes(db));
}

VDB_API vdb_error vdb_info(const vdb_database *db, vdb_information *out) {
  if (!db || !out) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  memset(out, 0, sizeof *out);
  out->dimensions = db->dimensions;
  out->metric = db->metric;
  out->options = db->options;
  out->count = db->count;
  out->slots = db->slots;
  out->bytes = vdb_bytes_held(db);
  out->vector_bytes = db->count * db->dimensions *
                      (vdb_element_size(db->options.storage) + (db->options.storage == VDB_STORAGE_F32_I8));
  out->read_only = db->read_only;
  out->has_ids = db->records.table_used != 0 || db->mapping.id_count != 0;
  vdb_leave_read(vdb_lock_of(db));
  return VDB_OK;
}

VDB_API vdb_error vdb_keep_on_disk(vdb_database *db, const char *folder) {
  if (!db || !folder) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = db->block_count || db->paging.on_disk ? VDB_ERROR_INVALID_ARGUMENT : VDB_OK;
  int file = error ? -1 : vdb_nameless_file(folder);
  if (file >= 0) {
    db->paging.on_disk = db->paging.has_file = 1;
    db->paging.file = file;
  } else if (!error) {
    error = VDB_ERROR_IO;
  }
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_set_resident(vdb_database *db, size_t bytes) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  vdb_enter_write(&db->lock);
  vdb_error error = db->mapping.base || db->paging.on_disk ? VDB_OK : VDB_ERROR_INVALID_ARGUMENT;
  if (!error) vdb_page_within(db, bytes);
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_set_threads(vdb_database *db, uint32_t threads) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (threads > 256) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_enter_write(&db->lock);
  vdb_pool_stop(db->pool); /* no reader is inside: nobody uses it */
  vdb_pool_reset(db->pool);
  db->options.threads = threads;
  db->threads = threads ? threads : vdb_cores();
  vdb_leave_write(&db->lock);
  return VDB_OK;
}

/* --- adding --- */
typedef struct {
  vdb_database *db;
  const float *vectors;
  const uint32_t *rows;
  float *decoded; /* [tasks][padded] */
  size_t count, per_task;
  vdb_watch *watch; /* NULL for none */
} vdb_store_job;

#define VDB_STORED_UNASKED 64u /* rows between two questions whether to go on */

static inline void vdb_store_task(void *context, size_t task) {
  vdb_store_job *job = (vdb_store_job *)context;
  size_t end = vdb_min(job->count, (task + 1) * job->per_task), dimensions = job->db->dimensions;
  for (size_t i = task * job->per_task; i < end; i++) {
    if (job->watch && i % VDB_STORED_UNASKED == 0 && vdb_watch_stops(job->watch, 0, job->count)) return;
    vdb_store_vector(job->db, job->rows[i], job->vectors + i * dimensions);
    vdb_describe_row(job->db, job->rows[i], job->decoded + task * vdb_padded(dimensions));
  }
}

static inline vdb_error vdb_store_rows(vdb_database *db, const float *vectors, const uint32_t *rows, size_t count,
                                       vdb_watch *watch) {
  vdb_store_job job = {db, vectors, rows, NULL, count, vdb_max(1, (count + 63) / 64), count < 1024 ? NULL : watch};
  if (count * db->dimensions < 65536) job.per_task = count;
  size_t tasks = (count + job.per_task - 1) / job.per_task;
  job.decoded = (float *)vdb_aligned_alloc(tasks * vdb_padded(db->dimensions) * sizeof(float));
  if (!job.decoded) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_parallel(db, tasks, vdb_store_task, &job);
  vdb_aligned_free(job.decoded);
  return watch && watch->stopped ? VDB_ERROR_INTERRUPTED : VDB_OK;
}

/* A row leaves: it is not found any more, its id neither. */
VDB_LIGHT void vdb_drop_row(vdb_database *db, size_t row) {
  vdb_rows_change(db);
  vdb_mark_part(db, row);
  vdb_drop_record(db, row);
  db->live[row >> 6] &= ~((uint64_t)1 << (row & 63));
  db->count--;
  if (db->options.index == VDB_INDEX_FLAT) vdb_free_row(db, row);
  else (void)vdb_graph_removed(db, row); /* want of memory only puts the sweep off */
}

/* The id of a new row: asked for several times, measured once. */
typedef struct {
  size_t size;
  uint64_t hash;
} vdb_name;

static inline vdb_name vdb_name_of(const vdb_record *record) {
  vdb_name name = {record->id ? strlen(record->id) : 0, 0};
  if (name.size && name.size <= VDB_MAX_ID) name.hash = vdb_hash(record->id, name.size);
  return name;
}

/* Whether an id is twice in a call, or there already. Counts those that are. */
VDB_LIGHT vdb_error vdb_check_new_names(const vdb_database *db, size_t count, const vdb_record *records,
                                            const vdb_name *names, vdb_add_mode mode, size_t ids, size_t *known) {
  size_t size = 16;
  vdb_error error = VDB_OK;
  while (size < 2 * ids) size *= 2;
  uint32_t *seen = (uint32_t *)VDB_MALLOC(size * sizeof(uint32_t));
  if (!seen) return VDB_ERROR_OUT_OF_MEMORY;
  memset(seen, 0xff, size * sizeof(uint32_t));
  for (size_t i = 0; i < count && !error; i++) {
    size_t length = names[i].size, at = 0;
    if (!length) continue;
    if (vdb_table_seek(db, records[i].id, length, names[i].hash, &at) != VDB_NO_ROW) {
      if (mode == VDB_ADD_UNIQUE) error = VDB_ERROR_DUPLICATE_ID;
      ++*known;
    }
    size_t place = (size_t)names[i].hash & (size - 1);
    for (; seen[place] != VDB_NO_ROW && !error; place = (place + 1) & (size - 1))
      if (names[seen[place]].hash == names[i].hash && strcmp(records[seen[place]].id, records[i].id) == 0)
        error = VDB_ERROR_DUPLICATE_ID;
    seen[place] = (uint32_t)i;
  }
  VDB_FREE(seen);
  return error;
}

VDB_LIGHT int vdb_valid_metadata(const vdb_record *record) {
  if (record->value_count && record->metadata_size) return 0;
  if (record->metadata_size && !record->metadata) return 0;
  return vdb_metadata_size(record) <= INT32_MAX;
}

/* Whether records may be added: sizes, ids twice in the call, ids there already. Counts ids, and those known. */
VDB_LIGHT vdb_error vdb_check_new_records(const vdb_database *db, size_t count, const vdb_record *records,
                                              vdb_name *names, vdb_add_mode mode, size_t *ids, size_t *known) {
  *ids = *known = 0;
  for (size_t i = 0; records && i < count; i++) {
    names[i] = vdb_name_of(&records[i]);
    if (names[i].size > VDB_MAX_ID || !vdb_valid_metadata(&records[i])) return VDB_ERROR_INVALID_ARGUMENT;
    *ids += names[i].size != 0;
  }
  if (mode == VDB_ADD_ANY || !*ids) return VDB_OK;
  return vdb_check_new_names(db, count, records, names, mode, *ids, known);
}

/* Takes rows for `count` vectors: free ones first, the last freed first, then new ones. */
static inline void vdb_take_rows(vdb_database *db, size_t count, uint32_t *rows) {
  for (size_t i = 0; i < count; i++) {
    rows[i] = db->free_count ? db->free_rows[--db->free_count] : (uint32_t)db->slots++;
    vdb_mark_whole(db, rows[i]);
  }
  db->changes.free_kept = vdb_min(db->changes.free_kept, db->free_count);
}

/* As if vdb_take_rows had not been called; the rows hold nothing that is found. */
static inline void vdb_return_rows(vdb_database *db, size_t count, const uint32_t *rows, size_t old_slots) {
  db->slots = old_slots;
  for (size_t i = count; i-- > 0;)
    if (rows[i] < old_slots) vdb_free_row(db, rows[i]);
}

/* Drops the rows of the ids that a call replaces, but for those just added: their copies of the ids are asked for, since
 * the caller's may be what vdb_get_vector gave for a row that is dropped. */
static inline void vdb_drop_replaced(vdb_database *db, const uint32_t *rows, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const char *id;
    const unsigned char *metadata;
    size_t length, size, place = 0;
    uint32_t row;
    vdb_record_at(db, rows[i], &id, &length, &metadata, &size);
    while (length && (row = vdb_table_next(db, id, length, &place)) != VDB_NO_ROW)
      if (row != rows[i]) vdb_drop_row(db, row);
  }
}

/* Stores rows that have their place; they are not live yet. */
VDB_LIGHT vdb_error vdb_fill_rows(vdb_database *db, const float *vectors, const vdb_record *records,
                                      const vdb_name *names, const uint32_t *rows, size_t count, vdb_watch *watch) {
  vdb_error error = vdb_store_rows(db, vectors, rows, count, watch);
  size_t done = 0;
  while (records && done < count && !error) {
    error = vdb_put_record(db, rows[done], &records[done], names[done].size, names[done].hash);
    if (!error) done++;
  }
  if (error)
    for (size_t i = 0; i < done; i++) vdb_drop_record(db, rows[i]);
  else
    vdb_clear_after(db, db->slots - 1);
  return error;
}

/* Under the writer's lock. `rows` [count] is filled; `names` is room for as many. */
VDB_LIGHT vdb_error vdb_add_named(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                                      vdb_name *names, vdb_add_mode mode, vdb_watch *watch, uint32_t *rows) {
  size_t ids, known, old_slots;
  vdb_error error = vdb_check_new_records(db, count, records, names, mode, &ids, &known);
  if (error) return error;
  if (db->options.index == VDB_INDEX_HNSW) (void)vdb_graph_removed(db, 0); /* what an interrupted call has left */
  size_t reused = vdb_min(count, db->free_count);
  old_slots = db->slots;
  if (count - reused > VDB_MAX_ROWS - db->slots) return VDB_ERROR_FULL;
  error = vdb_make_room(db, db->slots + count - reused);
  if (!error && ids) error = vdb_table_room(db, ids);
  if (error) return error;
  vdb_take_rows(db, count, rows);
  error = vdb_fill_rows(db, vectors, records, names, rows, count, watch);
  if (error) {
    vdb_return_rows(db, count, rows, old_slots);
    return error;
  }
  if (db->options.index == VDB_INDEX_HNSW) error = vdb_graph_insert(db, rows, count, watch);
  else vdb_make_live(db, rows, count);
  if (error) {
    for (size_t i = 0; i < count && db->records.records; i++) vdb_drop_record(db, rows[i]);
    return error;
  }
  if (known && mode == VDB_ADD_REPLACE) vdb_drop_replaced(db, rows, count);
  return VDB_OK;
}

VDB_LIGHT vdb_error vdb_add_rows(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                                     vdb_add_mode mode, vdb_watch *watch, uint32_t *rows) {
  vdb_name few[16], *names = few;
  if (records && count > 16 && !(names = (vdb_name *)VDB_MALLOC(count * sizeof(vdb_name))))
    return VDB_ERROR_OUT_OF_MEMORY;
  vdb_error error = vdb_add_named(db, vectors, count, records, names, mode, watch, rows);
  if (names != few) VDB_FREE(names);
  return error;
}

VDB_LIGHT int vdb_storable(const vdb_database *db, const float *vectors, size_t count) {
  if (!vdb_all_finite(vectors, count)) return 0;
  float limit = db->options.storage == VDB_STORAGE_F16 ? 65519.996f : vdb_from_bits(0x7f7f7fffu); /* rounds to finite */
  if (db->options.storage != VDB_STORAGE_F16 && db->options.storage != VDB_STORAGE_BF16) return 1;
  for (size_t i = 0; i < count; i++)
    if (fabsf(vectors[i]) > limit) return 0;
  return 1;
}

VDB_API vdb_error vdb_add_watched(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                                  vdb_add_mode mode, uint64_t *indices,
                                  int (*go_on)(size_t done, size_t count, void *context), void *context) {
  vdb_watch watch;
  vdb_watch_make(&watch, go_on, context);
  if (!db || (!vectors && count)) return VDB_ERROR_NULL_POINTER;
  if ((unsigned)mode > 2) return VDB_ERROR_INVALID_ARGUMENT;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!count) return VDB_OK;
  if (count > VDB_MAX_ROWS) return VDB_ERROR_FULL;
  if (!vdb_storable(db, vectors, count * db->dimensions)) return VDB_ERROR_NOT_FINITE;
  uint32_t few[16], *rows = count <= 16 ? few : (uint32_t *)VDB_MALLOC(count * sizeof(uint32_t));
  if (!rows) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_add_rows(db, vectors, count, records, mode, go_on ? &watch : NULL, rows);
  vdb_leave_write(&db->lock);
  for (size_t i = 0; i < count && !error && indices; i++) indices[i] = rows[i];
  if (rows != few) VDB_FREE(rows);
  return error;
}

VDB_API vdb_error vdb_add(vdb_database *db, const float *vectors, size_t count, const vdb_record *records,
                          vdb_add_mode mode, uint64_t *indices) {
  return vdb_add_watched(db, vectors, count, records, mode, indices, NULL, NULL);
}

VDB_API vdb_error vdb_reserve(vdb_database *db, size_t count) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = count > VDB_MAX_ROWS - db->slots ? VDB_ERROR_FULL : vdb_make_room(db, db->slots + count);
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_add_vector(vdb_database *db, const float *data, const char *id, void *metadata) {
  vdb_record record = {id, NULL, 0, NULL, 0};
  uint32_t row;
  if (!db || !data) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!vdb_storable(db, data, db->dimensions)) return VDB_ERROR_NOT_FINITE;
  vdb_enter_write(&db->lock);
  vdb_error error = VDB_OK;
  if (metadata && !db->records.borrowed) {
    error = vdb_make_room(db, db->slots + 1);
    if (!error && !vdb_grow((void **)&db->records.borrowed, 0, db->capacity, sizeof(void *)))
      error = VDB_ERROR_OUT_OF_MEMORY;
  }
  if (!error) error = vdb_add_rows(db, data, 1, &record, VDB_ADD_ANY, NULL, &row);
  if (!error && metadata) db->records.borrowed[row] = metadata;
  vdb_leave_write(&db->lock);
  return error;
}

/* --- single rows --- */
VDB_API vdb_error vdb_find(const vdb_database *db, const char *id, uint64_t *index) {
  if (!db || !id || !index) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  uint32_t row = vdb_lowest_row(db, id, strlen(id));
  vdb_leave_read(vdb_lock_of(db));
  if (row == VDB_NO_ROW || !*id) return VDB_ERROR_NOT_FOUND;
  *index = row;
  return VDB_OK;
}

static inline int vdb_is_row(const vdb_database *db, uint64_t index) {
  return index < db->slots && vdb_is_live(db, (size_t)index);
}

VDB_API vdb_error vdb_read_vector(const vdb_database *db, uint64_t index, float *vector) {
  vdb_error error = VDB_ERROR_INVALID_INDEX;
  if (!db || !vector) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  if (vdb_is_row(db, index)) {
    vdb_decode_row(db, (size_t)index, vector);
    error = VDB_OK;
  }
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

VDB_API vdb_error vdb_read_record(const vdb_database *db, uint64_t index, vdb_record *out) {
  vdb_error error = VDB_ERROR_INVALID_INDEX;
  if (!db || !out) return VDB_ERROR_NULL_POINTER;
  memset(out, 0, sizeof *out);
  vdb_enter_read(vdb_lock_of(db));
  if (vdb_is_row(db, index)) {
    const char *id;
    const unsigned char *metadata;
    size_t id_size, metadata_size;
    error = VDB_OK;
    if (vdb_record_at(db, (size_t)index, &id, &id_size, &metadata, &metadata_size)) {
      char *copy = (char *)VDB_MALLOC(id_size + 1 + metadata_size);
      if (copy) {
        if (id) memcpy(copy, id, id_size);
        copy[id_size] = 0;
        memcpy(copy + id_size + 1, metadata, metadata_size);
        out->id = copy;
        out->metadata = copy + id_size + 1;
        out->metadata_size = metadata_size;
        if (vdb_has_values(db, (size_t)index)) {
          long values = vdb_count_values(metadata, metadata_size); /* -1 in a damaged mapped file */
          out->value_count = values > 0 ? (size_t)values : 0;
          if (values < 0) out->metadata_size = 0;
        }
      } else {
        error = VDB_ERROR_OUT_OF_MEMORY;
      }
    }
  }
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

VDB_API void vdb_free_record(vdb_record *record) {
  if (!record) return;
  VDB_FREE((void *)(uintptr_t)record->id);
  memset(record, 0, sizeof *record);
}

/* Under the writer's lock. */
VDB_RARE vdb_error vdb_change_metadata(vdb_database *db, size_t row, const vdb_record *record) {
  const char *id;
  const unsigned char *metadata;
  size_t id_size, metadata_size;
  vdb_record_at(db, row, &id, &id_size, &metadata, &metadata_size);
  unsigned char *old = db->records.records ? db->records.records[row] : NULL;
  if (old) db->records.records[row] = NULL;
  vdb_error error = vdb_make_record(db, row, id, id ? id_size : 0, record);
  if (error && old) db->records.records[row] = old;
  if (error) return error;
  if (old) vdb_discard_record(db, old);
  vdb_mark_whole(db, row);
  vdb_columns_touch(&db->columns, row);
  return VDB_OK;
}

VDB_API vdb_error vdb_set_metadata(vdb_database *db, uint64_t index, const vdb_record *record) {
  if (!db || !record) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!vdb_valid_metadata(record)) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? vdb_change_metadata(db, (size_t)index, record) : VDB_ERROR_INVALID_INDEX;
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_set_metadata_of(vdb_database *db, const char *id, const vdb_record *record) {
  if (!db || !id || !record) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!vdb_valid_metadata(record)) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_enter_write(&db->lock);
  uint32_t row = vdb_lowest_row(db, id, strlen(id));
  vdb_error error = row == VDB_NO_ROW ? VDB_ERROR_NOT_FOUND : vdb_change_metadata(db, row, record);
  vdb_leave_write(&db->lock);
  return error;
}

/* What is known of the row may be wrong from now on. Other threads that search see the old norm or none: both are right
 * as long as nobody writes. */
static inline float *vdb_lend_vector(const vdb_database *db, size_t row) {
  float unknown = -1.0f;
  if (vdb_element_of(db->options.storage) != VDB_F32) return NULL;
  if (!db->read_only) __atomic_store_n(&((vdb_database *)(uintptr_t)db)->changes.lent, 1, __ATOMIC_RELAXED);
  if (!db->mapping.base) vdb_rows_change(db);
  if (!db->mapping.base)
    __atomic_store(&vdb_block_of(db, row)->norms[vdb_row_in_block(db, row)], &unknown, __ATOMIC_RELAXED);
  return (float *)(uintptr_t)vdb_vector_at(db, row);
}

VDB_API vdb_error vdb_refresh_vector(vdb_database *db, size_t index) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  if (!error && vdb_element_of(db->options.storage) == VDB_F32) {
    if (vdb_all_finite((const float *)vdb_vector_at(db, index), db->dimensions)) vdb_describe_row(db, index, NULL), vdb_mark_whole(db, index), vdb_rows_change(db);
    else error = VDB_ERROR_NOT_FINITE;
  }
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_get_vector(const vdb_database *db, size_t index, float **data, char **id, void **metadata) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  vdb_enter_read(vdb_lock_of(db));
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  if (!error) {
    const char *text;
    const unsigned char *bytes;
    size_t id_size, size;
    vdb_record_at(db, index, &text, &id_size, &bytes, &size);
    if (data) *data = vdb_lend_vector(db, index);
    if (id) *id = (char *)(uintptr_t)text;
    if (id) __atomic_store_n(&((vdb_database *)(uintptr_t)db)->records.lent, 1, __ATOMIC_RELAXED);
    if (metadata) *metadata = db->records.borrowed ? db->records.borrowed[index] : NULL;
  }
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

/* --- removing --- */
VDB_API vdb_error vdb_remove_index(vdb_database *db, uint64_t index) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  if (!error) vdb_drop_row(db, (size_t)index);
  vdb_leave_write(&db->lock);
  return error;
}

VDB_API vdb_error vdb_remove_id(vdb_database *db, const char *id, size_t *removed) {
  size_t count = 0, place = 0;
  uint32_t row;
  if (!db || !id) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  size_t size = strlen(id);
  row = vdb_table_next(db, id, size, &place);
  if (row != VDB_NO_ROW) { /* `id` may be the row's own, as vdb_get_vector gave it: held until all are gone */
    vdb_hold held = vdb_hold_record(db, row);
    for (id = held.id; row != VDB_NO_ROW; row = vdb_table_next(db, id, size, &place), count++) vdb_drop_row(db, row);
    vdb_hold_end(&held);
  }
  vdb_leave_write(&db->lock);
  if (removed) *removed = count;
  return count ? VDB_OK : VDB_ERROR_NOT_FOUND;
}

VDB_LIGHT void vdb_move_row(vdb_database *db, size_t from, size_t to) {
  const vdb_block *source = vdb_block_of(db, from), *target = vdb_block_of(db, to);
  size_t a = vdb_row_in_block(db, from), b = vdb_row_in_block(db, to);
  size_t bytes = db->dimensions * vdb_element_size(db->options.storage);
  memmove(target->vectors + b * bytes, source->vectors + a * bytes, bytes);
  target->norms[b] = source->norms[a];
  if (target->scales) target->scales[b] = source->scales[a];
  if (target->residuals) {
    target->residuals[b] = source->residuals[a];
    memmove(target->codes + b * db->dimensions, source->codes + a * db->dimensions, db->dimensions);
  }
  if (target->links) memmove(vdb_links_at(db, to), vdb_links_at(db, from), vdb_link_stride(db) * sizeof(uint32_t));
  if (db->records.records) db->records.records[to] = db->records.records[from];
  if (db->records.borrowed) db->records.borrowed[to] = db->records.borrowed[from];
}

/* Gives a file's text back if some of it is dead. */
VDB_RARE vdb_error vdb_repack_records(vdb_database *db) {
  if (!db->records.loaded || !db->records.loaded->dead) return VDB_OK;
  return vdb_leave_text(db, SIZE_MAX) ? VDB_OK : VDB_ERROR_OUT_OF_MEMORY;
}

/* Moves live rows down over the others. `new_of_old` [slots] is filled. */
VDB_LIGHT void vdb_move_rows(vdb_database *db, uint32_t *new_of_old) {
  size_t next = 0, old_slots = db->slots;
  vdb_mark_all(db); /* rows have new numbers */
  for (size_t row = 0; row < old_slots; row++) {
    new_of_old[row] = VDB_NO_ROW;
    if (!vdb_is_live(db, row)) continue;
    if (row != next) vdb_move_row(db, row, next);
    new_of_old[row] = (uint32_t)next++;
  }
  for (size_t row = next; row < old_slots; row++) {
    if (db->records.records) db->records.records[row] = NULL;
    if (db->records.borrowed) db->records.borrowed[row] = NULL;
  }
  memset(db->live, 0, vdb_round_up(old_slots, 64) / 8);
  for (size_t row = 0; row < next; row++) db->live[row >> 6] |= (uint64_t)1 << (row & 63);
  db->slots = next;
  db->free_count = 0;
  vdb_columns_release(&db->columns); /* rows have new numbers */
  while (db->block_count > (next + vdb_block_rows(db) - 1) >> db->block_shift)
    vdb_drop_last_block(db);
  if (next) vdb_clear_after(db, next - 1);
  for (size_t i = 0; i < db->records.table_size; i++)
    if (db->records.table[i] < VDB_GONE) db->records.table[i] = new_of_old[db->records.table[i]];
}

/* Under the writer's lock. */
VDB_RARE vdb_error vdb_compact_rows(vdb_database *db) {
  if (db->count == db->slots) return vdb_repack_records(db);
  uint32_t *new_of_old = (uint32_t *)VDB_MALLOC(db->slots * sizeof(uint32_t));
  if (!new_of_old) return VDB_ERROR_OUT_OF_MEMORY;
  vdb_error error = db->options.index == VDB_INDEX_HNSW ? vdb_graph_sweep(db) : VDB_OK;
  if (!error) error = vdb_repack_records(db);
  if (!error) {
    size_t old_slots = db->slots;
    vdb_move_rows(db, new_of_old);
    if (db->options.index == VDB_INDEX_HNSW) vdb_graph_renumber(db, new_of_old, old_slots);
  }
  VDB_FREE(new_of_old);
  return error;
}

VDB_API vdb_error vdb_compact(vdb_database *db) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_compact_rows(db);
  vdb_leave_write(&db->lock);
  return error;
}

/* Moves what comes after `row`, which is gone, down by one, places of removed rows too. `new_of_old` [slots] is filled. */
VDB_LIGHT void vdb_close_gap(vdb_database *db, size_t row, uint32_t *new_of_old) {
  vdb_records *records = &db->records;
  size_t last = db->slots - 1, kept = 0;
  vdb_mark_all(db); /* rows have new numbers */
  for (size_t i = 0; i <= last; i++) new_of_old[i] = i == row ? VDB_NO_ROW : (uint32_t)(i - (i > row));
  for (size_t i = row; i < last; i++) {
    uint64_t bit = (uint64_t)1 << (i & 63);
    vdb_move_row(db, i + 1, i);
    db->live[i >> 6] = (db->live[i >> 6] & ~bit) | (vdb_is_live(db, i + 1) ? bit : 0);
  }
  db->live[last >> 6] &= ~((uint64_t)1 << (last & 63));
  if (records->records) records->records[last] = NULL;
  if (records->borrowed) records->borrowed[last] = NULL;
  if (records->loaded && records->loaded->moved > row) records->loaded->moved--;
  for (size_t i = 0; i < records->table_size; i++)
    if (records->table[i] < VDB_GONE) records->table[i] = new_of_old[records->table[i]];
  for (size_t i = 0; i < db->free_count; i++)
    if (db->free_rows[i] != row) db->free_rows[kept++] = new_of_old[db->free_rows[i]];
  db->free_count = kept;
  db->slots = last;
  vdb_columns_release(&db->columns); /* rows have new numbers */
  if (last) vdb_clear_after(db, last - 1);
}

VDB_API vdb_error vdb_remove_vector(vdb_database *db, size_t index) {
  if (!db) return VDB_ERROR_NULL_POINTER;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  vdb_enter_write(&db->lock);
  vdb_error error = vdb_is_row(db, index) ? VDB_OK : VDB_ERROR_INVALID_INDEX;
  size_t slots = db->slots;
  uint32_t *new_of_old = error ? NULL : (uint32_t *)VDB_MALLOC(slots * sizeof(uint32_t));
  if (!error && !new_of_old) error = VDB_ERROR_OUT_OF_MEMORY;
  if (!error) {
    vdb_drop_row(db, index);
    if (db->options.index == VDB_INDEX_HNSW) error = vdb_graph_sweep(db); /* nobody links to it any more */
  }
  if (!error) {
    vdb_close_gap(db, index, new_of_old);
    if (db->options.index == VDB_INDEX_HNSW) vdb_graph_renumber(db, new_of_old, slots);
  }
  VDB_FREE(new_of_old);
  vdb_leave_write(&db->lock);
  return error;
}

/* --- searching --- */
#define VDB_QUERY_GROUP 1024u /* questions made ready at once */
#define VDB_TILE_LEAST 4u     /* fewer queries are scanned one by one */

typedef struct {
  const vdb_database *db;
  const vdb_query_options *options;
  const float *queries;
  size_t count;
  vdb_question *questions; /* [count] */
  unsigned char *memory;   /* [count] of question_bytes */
  size_t question_bytes;
  vdb_found *out;          /* [count][options->k] */
  size_t *counts;
  vdb_error error;         /* of any task; written atomically */
} vdb_query_job;

static inline void vdb_query_failed(vdb_query_job *job, vdb_error error) {
  if (error) __atomic_store(&job->error, &error, __ATOMIC_RELAXED);
}

static inline void vdb_one_task(void *context, size_t i) {
  vdb_query_job *job = (vdb_query_job *)context;
  vdb_found *out = job->out + i * job->options->k;
  int graph = job->db->options.index == VDB_INDEX_HNSW && !job->options->exact;
  vdb_query_failed(job, graph ? vdb_graph_search(job->db, &job->questions[i], job->options, out, &job->counts[i])
                              : vdb_scan_one(job->db, &job->questions[i], job->options, out, &job->counts[i]));
}

static inline void vdb_panel_task(void *context, size_t panel) {
  vdb_query_job *job = (vdb_query_job *)context;
  size_t first = panel * VDB_TILE_QUERIES, count = vdb_min(job->count - first, VDB_TILE_QUERIES);
  vdb_query_failed(job, vdb_scan_panel(job->db, job->questions + first, count, job->options,
                                       job->out + first * job->options->k, job->counts + first));
}

/* Questions that tiles have no bounds for are asked one by one. */
static inline int vdb_tiles_fit(const vdb_query_job *job) {
  const vdb_database *db = job->db;
  if (job->count < VDB_TILE_LEAST || vdb_min(job->options->k, db->count) > 1024) return 0;
  if (vdb_few_pass(db, job->options)) return 0;
  if (db->options.index == VDB_INDEX_HNSW && !job->options->exact) return 0;
  for (size_t i = 0; i < job->count; i++)
    if (job->questions[i].wild || (db->metric == VDB_METRIC_COSINE && job->questions[i].square == 0.0)) return 0;
  return 1;
}

/* Answers one group of questions. */
VDB_ONCE void vdb_run_queries(vdb_query_job *job) {
  const vdb_database *db = job->db;
  for (size_t i = 0; i < job->count; i++)
    vdb_ask(db, job->queries + i * db->dimensions, job->memory + i * job->question_bytes, &job->questions[i]);
  if (!vdb_tiles_fit(job)) {
    int apart = db->options.index == VDB_INDEX_HNSW && !job->options->exact; /* each is short: share them out */
    if (apart || db->slots * db->dimensions < VDB_PARALLEL_BYTES) vdb_parallel(db, job->count, vdb_one_task, job);
    else
      for (size_t i = 0; i < job->count; i++) vdb_one_task(job, i);
    return;
  }
  size_t panels = (job->count + VDB_TILE_QUERIES - 1) / VDB_TILE_QUERIES;
  if (panels >= 2 * vdb_thread_count(db)) vdb_parallel(db, panels, vdb_panel_task, job);
  else
    for (size_t i = 0; i < panels; i++) vdb_panel_task(job, i);
}

/* All answers: out [count][options->k]. Under a reader's lock. */
VDB_ONCE vdb_error vdb_answer_queries(const vdb_database *db, const float *queries, size_t count,
                                           const vdb_query_options *options, vdb_found *out, size_t *counts) {
  size_t group = vdb_min(count, VDB_QUERY_GROUP), bytes = vdb_round_up(vdb_question_bytes(db), VDB_ALIGNMENT);
  vdb_query_job job = {db, options, queries, group, NULL, NULL, bytes, out, counts, VDB_OK};
  job.memory = (unsigned char *)vdb_aligned_alloc(group * (bytes + sizeof(vdb_question)));
  if (!job.memory) return VDB_ERROR_OUT_OF_MEMORY;
  job.questions = (vdb_question *)(void *)(job.memory + group * bytes);
  for (size_t first = 0; first < count && !job.error; first += group) {
    job.count = vdb_min(group, count - first);
    job.queries = queries + first * db->dimensions;
    job.out = out + first * options->k;
    job.counts = counts + first;
    vdb_run_queries(&job);
  }
  vdb_aligned_free(job.memory);
  return job.error;
}

/* Bytes of text that an answer carries: ids with their NUL, and metadata. */
VDB_ONCE size_t vdb_answer_text(const vdb_database *db, const vdb_found *found, const size_t *counts, size_t count,
                                     const vdb_query_options *options) {
  size_t bytes = 0, id_size, metadata_size;
  const char *id;
  const unsigned char *metadata;
  if (!options->with_ids && !options->with_metadata) return 0;
  for (size_t q = 0; q < count; q++) {
    for (size_t i = 0; i < counts[q]; i++) {
      vdb_record_at(db, found[q * options->k + i].row, &id, &id_size, &metadata, &metadata_size);
      bytes += (options->with_ids && id ? id_size + 1 : 0) + (options->with_metadata ? metadata_size : 0);
    }
  }
  return bytes;
}

/* An answer with room for everything, in one block. */
VDB_ONCE vdb_answer *vdb_answer_make(size_t queries, const vdb_query_options *options, size_t text,
                                          char **out_text) {
  size_t cells = queries * options->k, place = vdb_round_up(sizeof(vdb_answer), 16);
  size_t counts = place, indices = place += queries * sizeof(size_t), ids = place += cells * sizeof(uint64_t);
  if (options->with_ids) place += cells * sizeof(char *);
  size_t metadata = place;
  if (options->with_metadata) place += cells * (sizeof(void *) + sizeof(size_t));
  size_t distances = place;
  place += cells * sizeof(float);
  size_t has_values = place;
  if (options->with_metadata) place += cells;
  unsigned char *memory = (unsigned char *)VDB_MALLOC(place + text);
  if (!memory) return NULL;
  vdb_answer *answer = (vdb_answer *)(void *)memory;
  memset(answer, 0, sizeof *answer);
  answer->queries = queries;
  answer->k = options->k;
  answer->counts = (size_t *)(void *)(memory + counts);
  answer->indices = (uint64_t *)(void *)(memory + indices);
  answer->distances = (float *)(void *)(memory + distances);
  if (options->with_ids) answer->ids = (const char **)(void *)(memory + ids);
  if (options->with_metadata) {
    answer->metadata = (const void **)(void *)(memory + metadata);
    answer->metadata_sizes = (size_t *)(void *)(memory + metadata + cells * sizeof(void *));
    answer->has_values = memory + has_values;
  }
  *out_text = (char *)memory + place;
  return answer;
}

/* Fills one place of the answer; `found` is NULL for a place without a row. Returns where the text goes on. */
VDB_ONCE char *vdb_answer_fill(const vdb_database *db, vdb_answer *answer, size_t cell, const vdb_found *found,
                                    char *text) {
  const char *id = NULL;
  const unsigned char *metadata = NULL;
  size_t id_size = 0, metadata_size = 0;
  answer->indices[cell] = found ? found->row : VDB_NO_INDEX;
  answer->distances[cell] = found ? found->distance : INFINITY;
  if (!answer->ids && !answer->metadata) return text;
  if (found) vdb_record_at(db, found->row, &id, &id_size, &metadata, &metadata_size);
  if (answer->ids) {
    answer->ids[cell] = id ? text : NULL;
    if (id) {
      memcpy(text, id, id_size);
      text[id_size] = 0;
      text += id_size + 1;
    }
  }
  if (answer->metadata) {
    answer->metadata[cell] = metadata_size ? text : NULL;
    answer->metadata_sizes[cell] = metadata_size;
    answer->has_values[cell] = metadata_size && vdb_has_values(db, found->row);
    if (metadata_size) memcpy(text, metadata, metadata_size);
    text += metadata_size;
  }
  return text;
}

/* Puts the rows that pass by their values into the options' bitset. `*made` is to be left. With `by_row` it may become
 * the options' filter function instead. */
VDB_RARE vdb_error vdb_apply_where(const vdb_database *db, vdb_query_options *options, vdb_filtering *by_row,
                                   vdb_passing **made) {
  vdb_error error = vdb_filter_by(db, options->where, by_row, made);
  if (error) return error;
  if (!*made) {
    options->filter = vdb_filter_asks;
    options->filter_context = by_row;
    return VDB_OK;
  }
  if (options->bitset) { /* both: its own, which nobody else has */
    vdb_passing *both = vdb_passing_make((*made)->words), *one = *made;
    for (size_t i = 0; both && i < both->words; i++)
      both->bits[i] = one->bits[i] & (i < options->bitset_words ? options->bitset[i] : 0);
    vdb_passing_leave(one);
    *made = both;
    if (!both) return VDB_ERROR_OUT_OF_MEMORY;
  }
  options->bitset = (*made)->bits;
  options->bitset_words = (*made)->words;
  options->passing = *made;
  return VDB_OK;
}

/* The answer from rows that were found: found [count][options->k]. */
VDB_ONCE vdb_error vdb_answer_from(const vdb_database *db, const vdb_found *found, const size_t *counts,
                                        size_t count, const vdb_query_options *options, vdb_answer **out) {
  char *text;
  vdb_answer *answer = *out = vdb_answer_make(count, options, vdb_answer_text(db, found, counts, count, options), &text);
  if (!answer) return VDB_ERROR_OUT_OF_MEMORY;
  memcpy(answer->counts, counts, count * sizeof(size_t));
  for (size_t cell = 0; cell < count * options->k; cell++) {
    int filled = cell % options->k < counts[cell / options->k];
    text = vdb_answer_fill(db, answer, cell, filled ? &found[cell] : NULL, text);
  }
  return VDB_OK;
}

VDB_ONCE vdb_error vdb_query_locked(const vdb_database *db, const float *queries, size_t count,
                                         const vdb_query_options *asked, vdb_answer **out) {
  if (asked->where) {
    vdb_passing *made = NULL;
    vdb_query_options filtered = *asked;
    vdb_filtering by_row;
    memset(&by_row, 0, sizeof by_row);
    int walks = db->options.index == VDB_INDEX_HNSW && !asked->exact && !asked->bitset && !asked->filter;
    vdb_error error = vdb_apply_where(db, &filtered, walks ? &by_row : NULL, &made);
    filtered.where = NULL;
    if (!error) error = vdb_query_locked(db, queries, count, &filtered, out);
    if (by_row.nodes) vdb_filtering_return(db, &by_row);
    vdb_passing_leave(made);
    return error;
  }
  vdb_query_options options = *asked;
  options.k = vdb_min(options.k, vdb_max(1, db->count));
  size_t cells = count * options.k;
  vdb_found *found = (vdb_found *)VDB_MALLOC(cells * sizeof(vdb_found) + count * sizeof(size_t) + sizeof(size_t));
  if (!found) return VDB_ERROR_OUT_OF_MEMORY;
  size_t *counts = (size_t *)(void *)(found + cells);
  memset(counts, 0, count * sizeof(size_t));
  vdb_error error = db->count ? vdb_answer_queries(db, queries, count, &options, found, counts) : VDB_OK;
  if (!error) error = vdb_answer_from(db, found, counts, count, &options, out);
  VDB_FREE(found);
  return error;
}

VDB_API vdb_error vdb_query(const vdb_database *db, const float *queries, size_t count,
                            const vdb_query_options *options, vdb_answer **out) {
  if (!db || !options || !out || (!queries && count)) return VDB_ERROR_NULL_POINTER;
  *out = NULL;
  if (options->k == 0 || options->effort > 1u << 20) return VDB_ERROR_INVALID_ARGUMENT;
  if (count > SIZE_MAX / 64 / db->dimensions) return VDB_ERROR_INVALID_ARGUMENT;
  if (!vdb_all_finite(queries, count * db->dimensions)) return VDB_ERROR_NOT_FINITE;
  vdb_enter_read(vdb_lock_of(db));
  vdb_error error = vdb_query_locked(db, queries, count, options, out);
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

/* Takes from an answer what lies beyond the radius. */
static inline void vdb_cut_answer(vdb_answer *answer, size_t query, float radius) {
  while (answer->counts[query]) {
    size_t cell = query * answer->k + answer->counts[query] - 1;
    if (answer->distances[cell] <= radius) return;
    answer->counts[query]--;
    answer->indices[cell] = VDB_NO_INDEX;
    answer->distances[cell] = INFINITY;
    if (answer->ids) answer->ids[cell] = NULL;
    if (answer->metadata) answer->metadata[cell] = NULL, answer->metadata_sizes[cell] = 0, answer->has_values[cell] = 0;
  }
}

/* The balls around `count` queries side by side, as wide as the greatest. */
static inline vdb_error vdb_answer_balls(const vdb_database *db, const vdb_ball *balls, size_t count,
                                         const vdb_query_options *asked, vdb_answer **out) {
  vdb_query_options options = *asked;
  options.k = 1;
  for (size_t i = 0; i < count; i++) options.k = vdb_max(options.k, balls[i].count);
  if (count > SIZE_MAX / 64 / options.k) return VDB_ERROR_OUT_OF_MEMORY;
  size_t cells = count * options.k;
  vdb_found *found = (vdb_found *)VDB_MALLOC(cells * sizeof(vdb_found) + (count + 1) * sizeof(size_t));
  if (!found) return VDB_ERROR_OUT_OF_MEMORY;
  size_t *counts = (size_t *)(void *)(found + cells);
  for (size_t i = 0; i < count; i++) {
    counts[i] = balls[i].count;
    if (counts[i]) memcpy(found + i * options.k, balls[i].rows, counts[i] * sizeof(vdb_found));
  }
  vdb_error error = vdb_answer_from(db, found, counts, count, &options, out);
  VDB_FREE(found);
  return error;
}

VDB_LIGHT vdb_error vdb_range_locked(const vdb_database *db, const float *queries, size_t count, float radius,
                                         const vdb_query_options *asked, vdb_answer **out) {
  vdb_query_options options = *asked;
  vdb_passing *made = NULL;
  vdb_error error = asked->where ? vdb_apply_where(db, &options, NULL, &made) : VDB_OK;
  if (error) return error;
  vdb_ball *balls = (vdb_ball *)VDB_MALLOC((count + 1) * sizeof(vdb_ball));
  unsigned char *memory = (unsigned char *)vdb_aligned_alloc(vdb_question_bytes(db) + VDB_ALIGNMENT);
  if (!balls || !memory) error = VDB_ERROR_OUT_OF_MEMORY;
  size_t done = 0;
  for (; done < count && !error; done++) {
    vdb_question question;
    vdb_ask(db, queries + done * db->dimensions, memory, &question);
    error = vdb_range_one(db, &question, &options, radius, &balls[done]);
  }
  if (!error) error = vdb_answer_balls(db, balls, count, &options, out);
  while (done) VDB_FREE(balls[--done].rows);
  VDB_FREE(balls);
  vdb_aligned_free(memory);
  vdb_passing_leave(made);
  return error;
}

VDB_API vdb_error vdb_query_within(const vdb_database *db, const float *queries, size_t count, float radius,
                                   const vdb_query_options *options, vdb_answer **out) {
  if (!db || !options || !out || (!queries && count)) return VDB_ERROR_NULL_POINTER;
  *out = NULL;
  if (vdb_is_nan((double)radius) || count > SIZE_MAX / 64 / db->dimensions) return VDB_ERROR_INVALID_ARGUMENT;
  if (options->k) {
    vdb_error error = vdb_query(db, queries, count, options, out);
    for (size_t q = 0; !error && q < count; q++) vdb_cut_answer(*out, q, radius);
    return error;
  }
  if (!vdb_all_finite(queries, count * db->dimensions)) return VDB_ERROR_NOT_FINITE;
  vdb_enter_read(vdb_lock_of(db));
  vdb_error error = vdb_range_locked(db, queries, count, radius, options, out);
  vdb_leave_read(vdb_lock_of(db));
  return error;
}

VDB_API void vdb_free_answer(vdb_answer *answer) { VDB_FREE(answer); }

/* The result set, its results and what holds their ids are one block; the ids of a mapped file are copied into it. */
typedef struct {
  vdb_result_set set; /* first: it is what the caller has */
  size_t count;
  vdb_hold *holds; /* [count] */
} vdb_own_set;

VDB_LIGHT vdb_result_set *vdb_result_set_make(const vdb_database *db, const vdb_found *found, size_t count) {
  size_t text = 0, id_size, metadata_size;
  const char *id;
  const unsigned char *metadata;
  for (size_t i = 0; i < count && db->mapping.base; i++)
    if (vdb_record_at(db, found[i].row, &id, &id_size, &metadata, &metadata_size) && id) text += id_size + 1;
  vdb_own_set *own = (vdb_own_set *)VDB_MALLOC(sizeof *own + count * (sizeof(vdb_result) + sizeof(vdb_hold)) + text);
  if (!own) return NULL;
  vdb_result *results = own->set.results = (vdb_result *)(void *)(own + 1);
  own->set.count = own->count = count;
  own->holds = (vdb_hold *)(void *)(results + count);
  char *place = (char *)(own->holds + count);
  for (size_t i = 0; i < count; i++) {
    own->holds[i] = vdb_hold_record(db, found[i].row);
    results[i].index = found[i].row;
    results[i].distance = found[i].distance;
    results[i].metadata = db->records.borrowed ? db->records.borrowed[found[i].row] : NULL;
    results[i].id = (char *)(uintptr_t)own->holds[i].id;
    if (own->holds[i].loaded) __atomic_store_n(&((vdb_database *)(uintptr_t)db)->records.lent, 1, __ATOMIC_RELAXED);
    if (!results[i].id || !db->mapping.base) continue;
    vdb_record_at(db, found[i].row, &id, &id_size, &metadata, &metadata_size);
    memcpy(place, id, id_size);
    place[id_size] = 0;
    results[i].id = place;
    place += id_size + 1;
  }
  return &own->set;
}

VDB_API vdb_result_set *vdb_search(const vdb_database *db, const float *query, size_t k) {
  vdb_result_set *set = NULL;
  if (!db || !query || k == 0 || !vdb_all_finite(query, db->dimensions)) return NULL;
  vdb_enter_read(vdb_lock_of(db));
  vdb_query_options options = vdb_default_query_options(vdb_min(k, db->count));
  size_t count = 0;
  vdb_found *found = db->count ? (vdb_found *)VDB_MALLOC(options.k * sizeof(vdb_found)) : NULL;
  if (found && vdb_answer_queries(db, query, 1, &options, found, &count) == VDB_OK)
    set = vdb_result_set_make(db, found, count);
  vdb_leave_read(vdb_lock_of(db));
  VDB_FREE(found);
  return set;
}

VDB_API void vdb_free_result_set(vdb_result_set *set) {
  vdb_own_set *own = (vdb_own_set *)(void *)set;
  if (!own) return;
  for (size_t i = 0; i < own->count; i++) vdb_hold_end(&own->holds[i]);
  VDB_FREE(own);
}

/* Under the writer's lock. */
VDB_LIGHT size_t vdb_drop_passing(vdb_database *db, const vdb_query_options *options) {
  size_t removed = 0;
  for (size_t row = 0; row < db->slots; row++) {
    if (!vdb_passes(db, options, row)) continue;
    vdb_drop_row(db, row);
    removed++;
  }
  return removed;
}

VDB_API vdb_error vdb_remove_where(vdb_database *db, const vdb_query_options *options, size_t *removed) {
  if (!db || !options) return VDB_ERROR_NULL_POINTER;
  if (removed) *removed = 0;
  if (db->read_only) return VDB_ERROR_READ_ONLY;
  if (!options->bitset && !options->filter && !options->where) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_query_options passing = *options;
  vdb_passing *made = NULL;
  vdb_enter_write(&db->lock);
  vdb_error error = options->where ? vdb_apply_where(db, &passing, NULL, &made) : VDB_OK;
  size_t count = error ? 0 : vdb_drop_passing(db, &passing);
  vdb_leave_write(&db->lock);
  vdb_passing_leave(made);
  if (removed) *removed = count;
  return error;
}

/* --- files --- */
/* Only those that save or change the database read what is written here. */
VDB_RARE void vdb_is_saved(const vdb_database *db, const vdb_identity *identity) {
  vdb_database *saved = (vdb_database *)(uintptr_t)db;
  saved->identity = *identity;
  if (!saved->read_only) vdb_changes_begin(saved);
}

VDB_API vdb_error vdb_save_as(const vdb_database *db, const char *path, vdb_save_mode mode) {
  vdb_identity identity;
  if (!db || !path) return VDB_ERROR_NULL_POINTER;
  if ((unsigned)mode > 2) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_enter_still(vdb_lock_of(db));
  vdb_error error = vdb_write_file(db, path, mode, &identity);
  if (!error) vdb_is_saved(db, &identity);
  vdb_leave_still(vdb_lock_of(db));
  return error;
}

VDB_API vdb_error vdb_save_changes(const vdb_database *db, const char *path) {
  vdb_identity identity;
  if (!db || !path) return VDB_ERROR_NULL_POINTER;
  vdb_enter_still(vdb_lock_of(db));
  vdb_error error = vdb_write_changes(db, path, &identity);
  if (error == VDB_ERROR_READ_ONLY) error = vdb_write_file(db, path, VDB_SAVE_SAME, &identity);
  if (!error) vdb_is_saved(db, &identity);
  vdb_leave_still(vdb_lock_of(db));
  return error;
}

VDB_API vdb_error vdb_save(const vdb_database *db, const char *path) { return vdb_save_as(db, path, VDB_SAVE_ANY); }

VDB_API vdb_error vdb_open_watched(const char *path, vdb_open_mode mode, uint32_t threads, vdb_database **out,
                                   int (*go_on)(size_t done, size_t count, void *context), void *context) {
  vdb_watch watch;
  if (!path || !out) return VDB_ERROR_NULL_POINTER;
  *out = NULL;
  if ((unsigned)mode > 1 || threads > 256) return VDB_ERROR_INVALID_ARGUMENT;
  vdb_watch_make(&watch, go_on, context);
  return vdb_read_file(path, mode, threads, go_on ? &watch : NULL, out, NULL, 0);
}

VDB_API vdb_error vdb_open(const char *path, vdb_open_mode mode, uint32_t threads, vdb_database **out) {
  return vdb_open_watched(path, mode, threads, out, NULL, NULL);
}

VDB_API vdb_error vdb_to_bytes(const vdb_database *db, void **bytes, size_t *size) {
  unsigned char *made = NULL;
  if (!db || !bytes || !size) return VDB_ERROR_NULL_POINTER;
  vdb_enter_still(vdb_lock_of(db));
  vdb_error error = vdb_write_bytes(db, &made, size);
  vdb_leave_still(vdb_lock_of(db));
  *bytes = made;
  return error;
}

VDB_API void vdb_free_bytes(void *bytes) { VDB_FREE(bytes); }

VDB_API vdb_error vdb_from_bytes(const void *bytes, size_t size, uint32_t threads, vdb_database **out) {
  if (!bytes || !out) return VDB_ERROR_NULL_POINTER;
  *out = NULL;
  return threads > 256 ? VDB_ERROR_INVALID_ARGUMENT : vdb_read_memory(bytes, size, threads, out);
}

VDB_API vdb_database *vdb_load(const char *path) {
  vdb_database *db = NULL;
  vdb_open(path, VDB_OPEN_READ, 0, &db);
  return db;
}

VDB_API vdb_error vdb_verify(const char *path, char *message, size_t message_size) {
  vdb_database *db = NULL;
  if (!path) return VDB_ERROR_NULL_POINTER;
  if (message && message_size) message[0] = 0;
  vdb_error error = vdb_read_file(path, VDB_OPEN_READ, 0, NULL, &db, message, message_size);
  vdb_release(db);
  return error;
}

#ifdef VDB_CALM
#pragma GCC pop_options
#endif

#endif /* VDB_IMPLEMENTED */
