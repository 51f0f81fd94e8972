/* What the tests of files share: small databases, whole files in memory, and files remade with right checksums. */
#ifndef FILES_CASE_H
#define FILES_CASE_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>

/* Bytes asked for since `asked` was last set to 0: a header that lies must not make the loader ask for much. */
static size_t asked;
static void *count_malloc(size_t size) {
  __atomic_fetch_add(&asked, size, __ATOMIC_RELAXED);
  return malloc(size);
}
static void *count_realloc(void *old, size_t size) {
  __atomic_fetch_add(&asked, size, __ATOMIC_RELAXED);
  return realloc(old, size);
}
#define VDB_MALLOC count_malloc
#define VDB_REALLOC count_realloc
#define VDB_FREE free
#include "vdb.h"

#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);    \
      exit(1);                                                                   \
    }                                                                            \
  } while (0)

static uint64_t random_state = 88172645463325252u;
static inline uint32_t random_u32(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)(random_state >> 16);
}
static inline float random_float(void) { return (float)(int32_t)random_u32() / 2147483648.0f; }

typedef struct {
  unsigned char *bytes;
  size_t size;
} whole_file;

static inline whole_file read_whole(const char *path) {
  whole_file file = {NULL, 0};
  FILE *in = fopen(path, "rb");
  CHECK(in);
  fseek(in, 0, SEEK_END);
  file.size = (size_t)ftell(in);
  rewind(in);
  file.bytes = (unsigned char *)malloc(file.size + 1);
  CHECK(file.bytes && fread(file.bytes, 1, file.size, in) == file.size);
  fclose(in);
  return file;
}

static inline void write_whole(const char *path, const void *bytes, size_t size) {
  FILE *out = fopen(path, "wb");
  CHECK(out && fwrite(bytes, 1, size, out) == size && fclose(out) == 0);
}

typedef struct {
  size_t dimensions, rows;
  vdb_metric metric;
  vdb_storage storage;
  vdb_index index;
  int ids, metadata, removed; /* removed: every third row, then as many added again but five */
} database_case;

static inline void fill_rows(vdb_database *db, size_t rows, size_t first, const database_case *what) {
  float *vectors = (float *)malloc((rows + 1) * what->dimensions * sizeof(float));
  vdb_record *records = (vdb_record *)calloc(rows + 1, sizeof(vdb_record));
  char(*names)[24] = (char(*)[24])calloc(rows + 1, 24);
  vdb_value(*values)[2] = (vdb_value(*)[2])calloc(rows + 1, 2 * sizeof(vdb_value));
  for (size_t i = 0; i < rows * what->dimensions; i++) vectors[i] = random_float();
  for (size_t i = 0; i < rows; i++) {
    snprintf(names[i], 24, "row-%zu", (first + i) % 97 == 5 ? 5 : first + i); /* some ids are there twice */
    if (what->ids && i % 5 != 3) records[i].id = names[i];
    if (what->metadata && i % 4 != 1) {
      records[i].metadata = names[rows - 1 - i];
      records[i].metadata_size = i % 24;
    } else if (what->metadata && i % 3 == 0) {
      vdb_value both[2] = {{"row", VDB_VALUE_INT, (int64_t)i, 0, NULL, 0},
                           {"name", VDB_VALUE_TEXT, 0, 0, names[i], strlen(names[i])}};
      memcpy(values[i], both, sizeof both);
      records[i].values = values[i];
      records[i].value_count = 2;
    }
  }
  if (rows && what->rows != 1) memset(vectors, 0, what->dimensions * sizeof(float)); /* a zero vector, too */
  CHECK(vdb_add(db, vectors, rows, records, VDB_ADD_ANY, NULL) == VDB_OK);
  free(vectors);
  free(records);
  free(names);
  free(values);
}

static inline vdb_database *make_database(const database_case *what) {
  vdb_options options = vdb_default_options();
  vdb_database *db = NULL;
  options.storage = what->storage;
  options.index = what->index;
  options.links = 4;
  options.build_effort = 20;
  options.threads = 1;
  CHECK(vdb_new(what->dimensions, what->metric, &options, &db) == VDB_OK);
  if (what->rows) fill_rows(db, what->rows, 0, what);
  if (what->removed) {
    for (size_t i = 0; i < what->rows; i += 3) CHECK(vdb_remove_index(db, i) == VDB_OK);
    if (what->rows / 3 > 5) fill_rows(db, what->rows / 3 - 5, what->rows, what);
  }
  return db;
}

/* --- files with right checksums --- */
static inline void stamp(unsigned char *bytes, size_t size, int file_size) {
  vdb_header header;
  if (size < sizeof header) return;
  memcpy(&header, bytes, sizeof header);
  memcpy(header.magic, VDB_MAGIC, 8);
  if (file_size) header.file_size = size;
  for (int part = 0; part < VDB_SECTIONS; part++) {
    vdb_section *section = &header.section[part];
    if (section->offset > size || section->size > size - section->offset) continue;
    uint64_t end = vdb_next_place(section->offset + section->size, part);
    if (end <= size) section->crc = vdb_crc32c(0, bytes + section->offset, (size_t)(end - section->offset));
  }
  header.crc = vdb_crc32c(0, &header, sizeof header - 4);
  memcpy(bytes, &header, sizeof header);
}

/* The short form for the fuzzer: 56 bytes of settings, then per section a u16 size and its bytes. expand() makes the
 * file that has them, its places and checksums right. */
#define SHORT_SETTINGS 56u
static inline whole_file expand(const unsigned char *bytes, size_t size) {
  whole_file file = {NULL, 0};
  vdb_header header;
  memset(&header, 0, sizeof header);
  header.version = 2;
  header.header_size = sizeof header;
  if (size < SHORT_SETTINGS) return file;
  memcpy((unsigned char *)&header + 24, bytes, SHORT_SETTINGS);
  file.bytes = (unsigned char *)calloc(1, sizeof header + 2 * size + VDB_SECTIONS * 2 * 4096);
  size_t at = SHORT_SETTINGS;
  file.size = sizeof header;
  for (int part = 0; part < VDB_SECTIONS; part++) {
    uint16_t length = 0;
    if (size - at >= 2) memcpy(&length, bytes + at, 2);
    at += size - at >= 2 ? 2 : 0;
    if (length > size - at) length = (uint16_t)(size - at);
    memcpy(file.bytes + file.size, bytes + at, length);
    header.section[part].kind = (uint32_t)part + 1;
    header.section[part].offset = file.size;
    header.section[part].size = length;
    at += length;
    file.size = (size_t)vdb_next_place(file.size + length, part);
  }
  memcpy(file.bytes, &header, sizeof header);
  stamp(file.bytes, file.size, 1);
  return file;
}

static inline whole_file contract(const whole_file *from) {
  whole_file file = {(unsigned char *)malloc(from->size + 256), SHORT_SETTINGS};
  vdb_header header;
  memcpy(&header, from->bytes, sizeof header);
  memcpy(file.bytes, from->bytes + 24, SHORT_SETTINGS);
  for (int part = 0; part < VDB_SECTIONS; part++) {
    uint16_t length = (uint16_t)header.section[part].size;
    CHECK(length == header.section[part].size);
    memcpy(file.bytes + file.size, &length, 2);
    memcpy(file.bytes + file.size + 2, from->bytes + header.section[part].offset, length);
    file.size += 2 + (size_t)length;
  }
  return file;
}

/* --- everything that can be asked of a database --- */
/* Reads values, whatever they are, and searches that filter by them. */
static inline void ask_values(vdb_database *db, const float *query) {
  vdb_value limit = {NULL, VDB_VALUE_INT, 3, 0, NULL, 0}, text = {NULL, VDB_VALUE_TEXT, 0, 0, "row-5", 5};
  vdb_condition parts[3] = {{VDB_AT_LEAST, "row", &limit, NULL, 1}, {VDB_IS_IN, "name", &text, NULL, 1},
                            {VDB_LESS, "i", &limit, NULL, 1}};
  vdb_condition any = {VDB_ANY_OF, NULL, NULL, parts, 3};
  vdb_query_options options = vdb_default_query_options(5);
  vdb_answer *answer = NULL;
  options.where = &any;
  options.with_metadata = 1;
  if (vdb_query(db, query, 1, &options, &answer) == VDB_OK)
    for (size_t i = 0; i < answer->counts[0]; i++) {
      vdb_value value;
      size_t place = 0;
      while (vdb_next_value(answer->metadata[i], answer->metadata_sizes[i], &place, &value))
        asked += strlen(value.name) + value.text_size;
    }
  vdb_free_answer(answer);
}

static inline void ask_everything(vdb_database *db) {
  vdb_information information;
  CHECK(vdb_info(db, &information) == VDB_OK);
  size_t dimensions = information.dimensions, slots = information.slots < 300 ? information.slots : 300;
  float *vector = (float *)calloc(2 * dimensions, sizeof(float));
  for (size_t j = 0; j < 2 * dimensions; j++) vector[j] = (float)(j % 7) - 3.0f;
  for (int i = 0; i < 3; i++) {
    vdb_query_options options = vdb_default_query_options(i ? 5 : 1);
    vdb_answer *answer = NULL;
    options.exact = i == 2;
    options.effort = 1; /* so little that the graph is walked from 17 rows on */
    options.with_ids = options.with_metadata = 1;
    if (vdb_query(db, vector, 2, &options, &answer) == VDB_OK)
      for (size_t j = 0; j < answer->queries * answer->k; j++)
        if (answer->ids[j]) asked += strlen(answer->ids[j]);
    vdb_free_answer(answer);
  }
  ask_values(db, vector);
  for (size_t i = 0; i < slots; i++) {
    vdb_record record;
    uint64_t index;
    vdb_read_vector(db, i, vector);
    if (vdb_read_record(db, i, &record) != VDB_OK) continue;
    if (record.id) vdb_find(db, record.id, &index);
    vdb_free_record(&record);
  }
  uint64_t index;
  vdb_find(db, "row-5", &index);
  free(vector);
}

/* Changes of every kind, after which the database must still be one. */
static inline void change_everything(vdb_database *db) {
  vdb_information information;
  CHECK(vdb_info(db, &information) == VDB_OK);
  size_t dimensions = information.dimensions;
  float *vectors = (float *)calloc(3 * dimensions, sizeof(float));
  vdb_record records[3] = {{"new", "data", 4, NULL, 0}, {NULL, NULL, 0, NULL, 0}, {"row-5", NULL, 0, NULL, 0}};
  for (size_t j = 0; j < 3 * dimensions; j++) vectors[j] = (float)(j % 11) - 5.0f;
  vdb_add(db, vectors, 3, records, VDB_ADD_REPLACE, NULL);
  for (size_t i = 0; i < information.slots && i < 40; i += 2) vdb_remove_index(db, i);
  vdb_add(db, vectors, 3, records, VDB_ADD_ANY, NULL);
  vdb_remove_id(db, "row-2", NULL);
  ask_everything(db);
  vdb_compact(db);
  ask_everything(db);
  free(vectors);
}
#endif
