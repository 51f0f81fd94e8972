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

