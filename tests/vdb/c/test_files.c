/* Files: round trips, both formats, damage of every kind, full disks. test_files FOLDER */
#include "files_case.h"
#include <dirent.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

static char path[512], other[512], folder[400];
static size_t stride = 1; /* of the many like cases one in so many is tried */

static vdb_database *open_file(const char *name, vdb_open_mode mode) {
  vdb_database *db = NULL;
  CHECK(vdb_open(name, mode, 2, &db) == VDB_OK);
  return db;
}

static vdb_error error_of(const char *name, vdb_open_mode mode) {
  vdb_database *db = NULL;
  vdb_error error = vdb_open(name, mode, 2, &db);
  CHECK((error == VDB_OK) == (db != NULL));
  vdb_destroy(db);
  return error;
}

/* The reason that vdb_verify gives. */
static const char *reason(const char *name) {
  static char message[200];
  vdb_error error = vdb_verify(name, message, sizeof message);
  CHECK((error == VDB_OK) == (message[0] == 0));
  CHECK(error == error_of(name, VDB_OPEN_READ));
  return message;
}

static size_t temporary_files(const char *where) {
  size_t found = 0;
  DIR *entries = opendir(where);
  CHECK(entries);
  for (struct dirent *entry; (entry = readdir(entries));) found += strstr(entry->d_name, ".tmp-") != NULL;
  closedir(entries);
  return found;
}

/* --- two databases that must be the same --- */
static void same_answers(const vdb_database *a, const vdb_database *b, int exact) {
  size_t dimensions = vdb_dimensions(a), queries = 6, k = 9;
  float *values = (float *)malloc(queries * dimensions * sizeof(float));
  for (size_t i = 0; i < queries * dimensions; i++) values[i] = random_float();
  vdb_query_options options = vdb_default_query_options(k);
  options.exact = exact;
  options.with_ids = options.with_metadata = 1;
  vdb_answer *x = NULL, *y = NULL;
  vdb_error error = vdb_query(a, values, queries, &options, &x);
  CHECK(vdb_query(b, values, queries, &options, &y) == error);
  CHECK(!x || x->k == y->k);
  for (size_t i = 0; x && i < queries * x->k; i++) {
    CHECK(x->counts[i / x->k] == y->counts[i / x->k]);
    CHECK(x->indices[i] == y->indices[i] && memcmp(&x->distances[i], &y->distances[i], sizeof(float)) == 0);
    CHECK((x->ids[i] == NULL) == (y->ids[i] == NULL) && (!x->ids[i] || strcmp(x->ids[i], y->ids[i]) == 0));
    CHECK(x->metadata_sizes[i] == y->metadata_sizes[i]);
    CHECK(!x->metadata_sizes[i] || memcmp(x->metadata[i], y->metadata[i], x->metadata_sizes[i]) == 0);
  }
  vdb_free_answer(x);
  vdb_free_answer(y);
  free(values);
}

static void same_rows(const vdb_database *a, const vdb_database *b) {
  vdb_information x, y;
  CHECK(vdb_info(a, &x) == VDB_OK && vdb_info(b, &y) == VDB_OK);
  CHECK(x.dimensions == y.dimensions && x.metric == y.metric && x.count == y.count && x.slots == y.slots);
  CHECK(x.options.storage == y.options.storage && x.options.index == y.options.index);
  CHECK(x.has_ids == y.has_ids || !x.count);
  CHECK(x.options.links == y.options.links && x.options.build_effort == y.options.build_effort);
  float *u = (float *)malloc(2 * x.dimensions * sizeof(float)), *v = u + x.dimensions;
  for (size_t i = 0; i < x.slots; i++) {
    vdb_record r = {NULL, NULL, 0, NULL, 0}, s = {NULL, NULL, 0, NULL, 0};
    uint64_t at, as;
    vdb_error error = vdb_read_vector(a, i, u);
    CHECK(vdb_read_vector(b, i, v) == error);
    CHECK(error || memcmp(u, v, x.dimensions * sizeof(float)) == 0);
    CHECK(vdb_read_record(a, i, &r) == vdb_read_record(b, i, &s));
    CHECK(r.metadata_size == s.metadata_size && (r.id == NULL) == (s.id == NULL));
    CHECK(!r.metadata_size || memcmp(r.metadata, s.metadata, r.metadata_size) == 0);
    if (r.id && *r.id) {
      CHECK(strcmp(r.id, s.id) == 0);
      CHECK(vdb_find(a, r.id, &at) == VDB_OK && vdb_find(b, r.id, &as) == VDB_OK);
      CHECK(at == as);
    }
    vdb_free_record(&r);
    vdb_free_record(&s);
  }
  free(u);
}

static void same(const vdb_database *a, const vdb_database *b) {
  same_rows(a, b);
  same_answers(a, b, 0);
  same_answers(a, b, 1);
}

static void same_files(const char *a, const char *b) {
  whole_file x = read_whole(a), y = read_whole(b);
  CHECK(x.size == y.size && memcmp(x.bytes, y.bytes, x.size) == 0);
  free(x.bytes);
  free(y.bytes);
}

/* --- round trips --- */
/* What vdb_to_bytes gives is the file, and opens as it does. */
static void in_memory(const vdb_database *db) {
  void *bytes;
  size_t size;
  vdb_database *again;
  whole_file file = read_whole(path);
  CHECK(vdb_to_bytes(db, &bytes, &size) == VDB_OK && size == file.size && memcmp(bytes, file.bytes, size) == 0);
  CHECK(vdb_from_bytes(bytes, size, 1, &again) == VDB_OK);
  same_rows(db, again);
  vdb_destroy(again);
  CHECK(vdb_from_bytes(bytes, size - 1, 1, &again) == VDB_ERROR_CORRUPT && again == NULL);
  CHECK(vdb_from_bytes(bytes, 0, 1, &again) == VDB_ERROR_CORRUPT);
  vdb_free_bytes(bytes);
  free(file.bytes);
}

static void round_trip(const database_case *what) {
  vdb_database *db = make_database(what);
  CHECK(vdb_save(db, path) == VDB_OK);
  CHECK(reason(path)[0] == 0);
  vdb_database *loaded = open_file(path, VDB_OPEN_READ), *mapped = open_file(path, VDB_OPEN_MAP);
  same(db, loaded);
  same(db, mapped);
  CHECK(vdb_save(loaded, other) == VDB_OK);
  same_files(path, other);
  CHECK(vdb_save(mapped, other) == VDB_OK);
  same_files(path, other);
  CHECK(vdb_remove_index(mapped, 0) == VDB_ERROR_READ_ONLY);
  if (what->rows <= 65) in_memory(mapped);
  uint64_t state = random_state;
  fill_rows(db, 10, 5000, what); /* what happens next is the same, too */
  random_state = state;
  fill_rows(loaded, 10, 5000, what);
  for (size_t i = 0; i < what->rows; i += 4) CHECK(vdb_remove_index(db, i) == vdb_remove_index(loaded, i));
  same(db, loaded);
  CHECK(vdb_compact(db) == VDB_OK && vdb_compact(loaded) == VDB_OK);
  same(db, loaded);
  vdb_destroy(db);
  vdb_destroy(loaded);
  vdb_destroy(mapped);
}

static void round_trips(void) {
  static const size_t rows[] = {0, 1, 63, 65, 400}, dimensions[] = {1, 7, 64, 130};
  for (int storage = 0; storage < 5; storage++)
    for (int index = 0; index < 2; index++)
      for (int records = 0; records < 4; records++)
        for (int removed = 0; removed < 2; removed++)
          for (size_t n = 0; n < 5; n++) {
            if (n == 4 && (stride > 1) && records != storage % 4) continue; /* the longest */
            database_case what = {dimensions[(n + (size_t)storage + (size_t)records) % 4], rows[n],
                                  (vdb_metric)((n + (size_t)records) % 3), (vdb_storage)storage, (vdb_index)index,
                                  records & 1, records & 2, removed};
            round_trip(&what);
          }
  database_case several = {300, stride > 1 ? 1100 : 3000, VDB_METRIC_COSINE, VDB_STORAGE_F32_I8, VDB_INDEX_FLAT, 1, 1, 1}; /* blocks */
  round_trip(&several);
  several.storage = VDB_STORAGE_BF16;
  several.index = VDB_INDEX_HNSW;
  round_trip(&several);
}

/* --- the first format --- */
static size_t first_file(unsigned char *bytes, uint64_t dimensions, uint64_t count, int32_t metric) {
  uint32_t magic = VDB_FIRST_MAGIC;
  memcpy(bytes, &magic, 4);
  memcpy(bytes + 4, &dimensions, 8);
  memcpy(bytes + 12, &count, 8);
  memcpy(bytes + 20, &metric, 4);
  return 24;
}

static size_t first_row(unsigned char *bytes, size_t at, const float *vector, size_t dimensions, const char *id,
                        uint32_t id_size) {
  memcpy(bytes + at, vector, dimensions * sizeof(float));
  at += dimensions * sizeof(float);
  memcpy(bytes + at, &id_size, 4);
  memcpy(bytes + at + 4, id, strlen(id));
  return at + 4 + strlen(id);
}

static void expect_first(const unsigned char *bytes, size_t size, vdb_error error, const char *word) {
  write_whole(path, bytes, size);
  asked = 0;
  CHECK(error_of(path, VDB_OPEN_READ) == error);
  CHECK(asked < ((size_t)8 << 20));
  CHECK(strstr(reason(path), word));
  CHECK(error_of(path, VDB_OPEN_MAP) != VDB_OK);
}

static void first_format(void) {
  unsigned char bytes[1024];
  const float rows[3][3] = {{1, 2, 3}, {0, 0, 0}, {-4, 5, 0.5f}};
  size_t size = first_file(bytes, 3, 3, VDB_METRIC_EUCLIDEAN);
  size = first_row(bytes, size, rows[0], 3, "first", 5);
  size = first_row(bytes, size, rows[1], 3, "", 0);
  size_t last = size;
  size = first_row(bytes, size, rows[2], 3, "last", 4);
  write_whole(path, bytes, size);
  CHECK(reason(path)[0] == 0);
  vdb_database *db = vdb_load(path);
  CHECK(db && vdb_count(db) == 3 && vdb_dimensions(db) == 3);
  for (size_t i = 0; i < 3; i++) {
    float *data;
    char *id;
    CHECK(vdb_get_vector(db, i, &data, &id, NULL) == VDB_OK && memcmp(data, rows[i], 12) == 0);
    CHECK(i == 1 ? id == NULL : strcmp(id, i ? "last" : "first") == 0);
  }
  vdb_result_set *found = vdb_search(db, rows[2], 3);
  CHECK(found && found->count == 3 && found->results[0].index == 2 && found->results[0].distance == 0.0f);
  vdb_free_result_set(found);
  CHECK(vdb_save(db, other) == VDB_OK && reason(other)[0] == 0);
  vdb_destroy(db);
  CHECK(error_of(path, VDB_OPEN_MAP) == VDB_ERROR_INVALID_ARGUMENT);
  for (size_t cut = 0; cut < size; cut++) expect_first(bytes, cut, VDB_ERROR_CORRUPT, "");
  expect_first(bytes, size + 1, VDB_ERROR_CORRUPT, "after the last row");
  bytes[last + 17] = 0;
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "a 0 inside");
  bytes[last + 17] = 'a';
  uint32_t nan = 0x7fc00000u, huge = 0xffffffffu;
  memcpy(bytes + last + 4, &nan, 4);
  expect_first(bytes, size, VDB_ERROR_NOT_FINITE, "NaN");
  memcpy(bytes + last + 4, rows[0], 4);
  memcpy(bytes + last + 12, &huge, 4);
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "longer than 2^20");
  first_file(bytes, ((uint64_t)1 << 62) + 1, 3, 1);
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "dimensions");
  first_file(bytes, 0, 3, 1);
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "dimensions");
  first_file(bytes, 65536, 3, 1);
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "more rows");
  first_file(bytes, 3, UINT64_MAX, 1);
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "more rows");
  first_file(bytes, 3, 3, 3);
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "metric");
  first_file(bytes, 3, 3, -1);
  expect_first(bytes, size, VDB_ERROR_CORRUPT, "metric");
}

/* --- damage --- */
static const database_case damaged = {5, 40, VDB_METRIC_COSINE, VDB_STORAGE_F32_I8, VDB_INDEX_HNSW, 1, 1, 1};

static whole_file small_file(const database_case *what) {
  vdb_database *db = make_database(what);
  CHECK(vdb_save(db, path) == VDB_OK);
  vdb_destroy(db);
  return read_whole(path);
}

static void put_byte(int file, size_t at, unsigned char byte) {
  CHECK(pwrite(file, &byte, 1, (off_t)at) == 1);
}

/* Every bit of a file, turned over alone, is found. `step` 1 looks at all, 8 * n at one of each n-th byte. */
static void bit_flips(size_t step) {
  whole_file whole = small_file(&damaged);
  int file = open(path, O_RDWR);
  size_t opened = 0;
  for (size_t bit = 0; bit < 8 * whole.size; bit += step) {
    size_t at = bit / 8, turned = step == 1 ? bit % 8 : random_u32() % 8;
    vdb_database *db = NULL;
    put_byte(file, at, (unsigned char)(whole.bytes[at] ^ (1u << turned)));
    CHECK(vdb_verify(path, NULL, 0) == VDB_ERROR_CORRUPT);
    CHECK(bit % 64 || error_of(path, VDB_OPEN_READ) == VDB_ERROR_CORRUPT);
    if (bit % 8 < 2 && vdb_open(path, VDB_OPEN_MAP, 1, &db) == VDB_OK) {
      opened++;
      ask_everything(db);
    }
    vdb_destroy(db);
    put_byte(file, at, whole.bytes[at]);
  }
  close(file);
  CHECK(opened > whole.size * 8 / vdb_max(step, 8) / 2 && reason(path)[0] == 0);
  printf("  %zu flips of a file of %zu bytes, %zu of them mapped\n", 8 * whole.size / step, whole.size, opened);
  free(whole.bytes);
}

static void wrong_lengths(void) {
  whole_file whole = small_file(&damaged);
  for (size_t more = 1; more < 200; more += 17) {
    int file = open(path, O_RDWR);
    CHECK(truncate(path, (off_t)whole.size) == 0 && truncate(path, (off_t)(whole.size + more)) == 0);
    CHECK(vdb_verify(path, NULL, 0) == VDB_OK && error_of(path, VDB_OPEN_MAP) == VDB_OK); /* a save that was cut off */
    put_byte(file, whole.size + random_u32() % vdb_min(more, 64), 1); /* where a batch would begin */
    CHECK(vdb_verify(path, NULL, 0) == VDB_ERROR_CORRUPT && error_of(path, VDB_OPEN_MAP) == VDB_ERROR_CORRUPT);
    close(file);
  }
  for (size_t size = whole.size - 1; size < whole.size; size -= 1 + random_u32() % stride) {
    CHECK(truncate(path, (off_t)size) == 0);
    CHECK(vdb_verify(path, NULL, 0) == VDB_ERROR_CORRUPT && error_of(path, VDB_OPEN_MAP) == VDB_ERROR_CORRUPT);
  }
  free(whole.bytes);
}

/* One number of the header set to something else, its checksum made right. */
static void one_field(const whole_file *whole, size_t at, size_t bytes, uint64_t value) {
  unsigned char *changed = (unsigned char *)malloc(whole->size);
  memcpy(changed, whole->bytes, whole->size);
  if (memcmp(changed + at, &value, bytes) == 0) value++;
  memcpy(changed + at, &value, bytes);
  stamp(changed, whole->size, 0);
  if (at == 0) memcpy(changed, &value, bytes);
  write_whole(path, changed, whole->size);
  asked = 0;
  vdb_error error = error_of(path, VDB_OPEN_READ);
  int harmless = at == 28 || at == 44 || at == 64 || at == 68 || at == 76; /* another metric, effort, entry, unchecked */
  CHECK(error == VDB_ERROR_CORRUPT || (harmless && error == VDB_OK));
  CHECK(asked < ((size_t)4 << 20));
  vdb_database *db = NULL;
  error = vdb_open(path, VDB_OPEN_MAP, 1, &db);
  CHECK(error == VDB_ERROR_CORRUPT || harmless || at == 8); /* a view has not looked for rows with values: version 3 */
  if (db) ask_everything(db);
  vdb_destroy(db);
  free(changed);
}

static void crafted_headers(void) {
  static const uint64_t values[] = {0, 1, 3, 64, 65537, 0x7fffffff, 0xfffffffeu, 0xffffffffu, (uint64_t)1 << 60, 
                                    ((uint64_t)1 << 62) + 1, UINT64_MAX, UINT64_MAX - 63, UINT64_MAX - 4095};
  whole_file whole = small_file(&damaged);
  for (size_t v = 0; v < sizeof values / sizeof *values; v += 1 + stride / 8) {
    for (size_t at = 0; at < 80; at += at == 0 || at == 16 || at == 48 || at == 56 ? 8 : 4)
      if (at != 24 || values[v] != 5) one_field(&whole, at, at == 0 || at == 16 || at == 48 || at == 56 ? 8 : 4, values[v]);
    for (size_t part = 0; part < VDB_SECTIONS; part++) {
      one_field(&whole, 80 + 24 * part, 4, values[v]);
      one_field(&whole, 80 + 24 * part + 8, 8, values[v]);
      one_field(&whole, 80 + 24 * part + 16, 8, values[v]);
      one_field(&whole, 80 + 24 * part + 16, 8, whole.size + values[v] % 9000);
    }
  }
  for (size_t at = 392; at < 4092; at += 100) one_field(&whole, at, 4, 1);
  for (int part = 1; part < VDB_SECTIONS; part++) { /* two sections at one place */
    vdb_header header;
    memcpy(&header, whole.bytes, sizeof header);
    one_field(&whole, 80 + 24 * (size_t)part + 8, 8, header.section[part - 1].offset);
  }
  free(whole.bytes);
}

/* Numbers in sections set to something else, the checksums made right: refused, or a database that does no harm. */
static void crafted_contents(int storage, int index) {
  static const uint32_t values[] = {0, 1, 2, 5, 39, 40, 41, 0x7f800000u, 0x7fc00000u, 0x80000000u, 0xfffffffeu, 0xffffffffu};
  database_case what = damaged;
  what.storage = (vdb_storage)storage;
  what.index = (vdb_index)index;
  whole_file whole = small_file(&what);
  unsigned char *changed = (unsigned char *)malloc(whole.size);
  vdb_header header;
  memcpy(&header, whole.bytes, sizeof header);
  size_t refused = 0, accepted = 0;
  for (int part = 0; part < VDB_SECTIONS; part++) {
    const vdb_section *section = &header.section[part];
    for (uint64_t at = 0; at + 4 <= section->size; at += 4 * (1 + random_u32() % (2 * stride - 1))) {
      memcpy(changed, whole.bytes, whole.size);
      uint32_t value = values[random_u32() % 12];
      if (random_u32() % 3 == 0) value = random_u32() >> random_u32() % 32;
      memcpy(changed + section->offset + at, &value, 4);
      if (random_u32() % 4 == 0) changed[section->offset + random_u32() % section->size] = (unsigned char)random_u32();
      stamp(changed, whole.size, 0);
      write_whole(path, changed, whole.size);
      vdb_database *db = NULL;
      vdb_error error = vdb_open(path, VDB_OPEN_READ, 1, &db);
      CHECK(error == VDB_OK || error == VDB_ERROR_CORRUPT || error == VDB_ERROR_NOT_FINITE);
      if (db) {
        accepted++;
        ask_everything(db);
        change_everything(db);
        CHECK(vdb_save(db, other) == VDB_OK && reason(other)[0] == 0);
      } else {
        refused++;
      }
      vdb_destroy(db);
      if (vdb_open(path, VDB_OPEN_MAP, 1, &db) == VDB_OK) {
        ask_everything(db);
        vdb_save(db, other);
      }
      vdb_destroy(db);
    }
  }
  printf("  storage %d, index %d: %zu refused, %zu accepted and used\n", storage, index, refused, accepted);
  free(changed);
  free(whole.bytes);
}

/* Makes the checksums of a journal right: of a file whose batches begin at `at`. */
static void stamp_journal(unsigned char *bytes, size_t size, size_t at) {
  vdb_header header;
  vdb_batch head;
  vdb_batch_end end;
  memcpy(&header, bytes, sizeof header);
  uint32_t previous = header.crc;
  while (size - at >= sizeof head) {
    memcpy(&head, bytes + at, sizeof head);
    if (head.size > size - at - sizeof end) return;
    head.previous = previous;
    head.crc = vdb_crc32c(0, &head, sizeof head - 4);
    memcpy(bytes + at, &head, sizeof head);
    memcpy(&end, bytes + at + head.size, sizeof end);
    end.content = vdb_crc32c(0, bytes + at, head.size);
    end.crc = previous = vdb_crc32c(0, &end, sizeof end - 4);
    memcpy(bytes + at + head.size, &end, sizeof end);
    at += head.size + sizeof end;
  }
}

/* Numbers of a journal, or of the file before it, set to something else, the checksums made right: refused, or a database
 * that does no harm, in memory and mapped. */
static void crafted_journal(int storage, int index) {
  static const uint32_t values[] = {0, 1, 2, 3, 39, 40, 44, 0x7f800000u, 0x80000000u, 0xfffffffeu, 0xffffffffu};
  database_case what = damaged;
  what.storage = (vdb_storage)storage;
  what.index = (vdb_index)index;
  vdb_database *db = make_database(&what);
  CHECK(vdb_save(db, path) == VDB_OK);
  whole_file base = read_whole(path);
  fill_rows(db, 4, 100, &what);
  CHECK(vdb_save_changes(db, path) == VDB_OK);
  CHECK(vdb_remove_index(db, 5) == VDB_OK && vdb_remove_index(db, 11) == VDB_OK);
  fill_rows(db, 3, 200, &what);
  CHECK(vdb_save_changes(db, path) == VDB_OK);
  whole_file whole = read_whole(path);
  CHECK(memcmp(base.bytes, whole.bytes, base.size) == 0 && whole.size > base.size);
  vdb_database *mapped = open_file(path, VDB_OPEN_MAP);
  same(db, mapped);
  vdb_destroy(mapped);
  vdb_destroy(db);
  unsigned char *changed = (unsigned char *)malloc(whole.size);
  size_t refused = 0, accepted = 0, viewed = 0;
  for (size_t at = 4096; at + 4 <= whole.size; at += 4 * (1 + random_u32() % (at < base.size ? 40 * stride : 2 * stride - 1))) {
    memcpy(changed, whole.bytes, whole.size);
    uint32_t value = values[random_u32() % 11];
    if (random_u32() % 3 == 0) value = random_u32() >> random_u32() % 32;
    memcpy(changed + at, &value, 4);
    stamp(changed, base.size, 0);
    stamp_journal(changed, whole.size, base.size);
    write_whole(path, changed, whole.size);
    vdb_error error = vdb_open(path, VDB_OPEN_READ, 1, &db);
    CHECK(error == VDB_OK || error == VDB_ERROR_CORRUPT || error == VDB_ERROR_NOT_FINITE);
    if (db) {
      accepted++;
      ask_everything(db);
      change_everything(db);
      CHECK(vdb_save(db, other) == VDB_OK && reason(other)[0] == 0);
    } else {
      refused++;
    }
    vdb_destroy(db);
    if (vdb_open(path, VDB_OPEN_MAP, 1, &db) == VDB_OK) {
      viewed++;
      ask_everything(db);
      vdb_save(db, other);
    }
    vdb_destroy(db);
  }
  printf("  journal, storage %d, index %d: %zu refused, %zu accepted, %zu mapped\n", storage, index, refused, accepted, viewed);
  CHECK(refused && accepted && viewed);
  free(changed);
  free(whole.bytes);
  free(base.bytes);
}

static void not_databases(void) {
  CHECK(error_of("/no/such/file", VDB_OPEN_READ) == VDB_ERROR_IO && errno == ENOENT);
  CHECK(strstr(reason("/no/such/file"), "No such file"));
  CHECK(error_of(folder, VDB_OPEN_READ) == VDB_ERROR_IO && errno == EISDIR);
  CHECK(error_of("/dev/zero", VDB_OPEN_READ) == VDB_ERROR_IO);
  write_whole(path, "", 0);
  CHECK(strstr(reason(path), "not a database"));
  write_whole(path, "VDB2\r\n\x1a\n", 8);
  CHECK(strstr(reason(path), "too early"));
  write_whole(path, "a text, perhaps, of more than 24 bytes\n", 39);
  CHECK(strstr(reason(path), "not a database") && errno == EINVAL);
}

/* --- failing to save --- */
static void failing_save(const vdb_database *db, const char *target, size_t old_count) {
  char where[512];
  snprintf(where, sizeof where, "%s", target);
  *strrchr(where, '/') = 0;
  errno = 0;
  CHECK(vdb_save(db, target) == VDB_ERROR_IO && errno != 0);
  int number = errno;
  if (!old_count) return;
  CHECK(temporary_files(where) == 0);
  vdb_database *old = open_file(target, VDB_OPEN_READ);
  CHECK(vdb_count(old) == old_count);
  vdb_destroy(old);
  errno = number;
}

static void full_disks(void) {
  database_case few = {8, 20, VDB_METRIC_COSINE, VDB_STORAGE_F32, VDB_INDEX_FLAT, 1, 0, 0}, many = few;
  many.rows = 20000;
  vdb_database *small = make_database(&few), *large = make_database(&many);
  CHECK(vdb_save(small, path) == VDB_OK);
  struct rlimit old, limit;
  signal(SIGXFSZ, SIG_IGN);
  CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
  limit = old;
  for (limit.rlim_cur = 0; limit.rlim_cur < 600000; limit.rlim_cur += 9973) {
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    failing_save(large, path, 20);
    CHECK(errno == EFBIG);
  }
  CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
  failing_save(large, "/no/such/folder/file", 0);
  char mounted[512], target[600];
  snprintf(mounted, sizeof mounted, "%s/tiny", folder);
  mkdir(mounted, 0777);
  if (mount("tmpfs", mounted, "tmpfs", 0, "size=64k") == 0) {
    snprintf(target, sizeof target, "%s/file", mounted);
    CHECK(vdb_save(small, target) == VDB_OK);
    failing_save(large, target, 20);
    CHECK(umount(mounted) == 0);
    printf("  a full tmpfs, too\n");
  }
  rmdir(mounted);
  CHECK(mkdir(mounted, 0777) == 0);
  CHECK(vdb_save(small, mounted) == VDB_ERROR_NOT_REGULAR && temporary_files(folder) == 0); /* a folder is in the way */
  rmdir(mounted);
  CHECK(vdb_save(large, path) == VDB_OK && reason(path)[0] == 0);
  vdb_destroy(small);
  vdb_destroy(large);
}

/* A name without a folder, and the permissions that the user's mask leaves. */
static void names(void) {
  database_case few = {8, 20, VDB_METRIC_COSINE, VDB_STORAGE_F32, VDB_INDEX_FLAT, 1, 0, 0};
  vdb_database *db = make_database(&few);
  struct stat status;
  char here[600];
  CHECK(getcwd(here, sizeof here) && chdir(folder) == 0);
  umask(027);
  CHECK(vdb_save(db, "plain") == VDB_OK && stat("plain", &status) == 0 && (status.st_mode & 0777) == 0640);
  CHECK(reason("plain")[0] == 0 && vdb_save(db, "./plain") == VDB_OK && unlink("plain") == 0);
  CHECK(vdb_save(db, "") == VDB_ERROR_IO && temporary_files(".") == 0);
  CHECK(chdir(here) == 0);
  vdb_destroy(db);
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#define RUN(what)                                                   \
  do {                                                              \
    double start = seconds();                                       \
    what;                                                           \
    printf("%-28s %6.1f s\n", #what, seconds() - start);            \
    fflush(stdout);                                                 \
  } while (0)

int main(int count, char **arguments) {
  CHECK(count >= 2);
  if (count > 2) stride = (size_t)atoi(arguments[2]); /* a run of all, every bit too, takes some minutes */
  CHECK(stride >= 1);
  snprintf(folder, sizeof folder, "%s", arguments[1]);
  snprintf(path, sizeof path, "%s/file", folder);
  snprintf(other, sizeof other, "%s/other", folder);
  mkdir(folder, 0777);
  RUN(round_trips());
  RUN(first_format());
  RUN(not_databases());
  RUN(bit_flips(stride > 1 ? 8 * (stride - 1) : 1));
  RUN(wrong_lengths());
  RUN(crafted_headers());
  for (int i = 0; i < 10; i++) crafted_contents(i % 5, i / 5);
  for (int i = 0; i < 10; i++) RUN(crafted_journal(i % 5, i / 5));
  RUN(full_disks());
  RUN(names());
  unlink(path);
  unlink(other);
  CHECK(temporary_files(folder) == 0 && rmdir(folder) == 0);
  printf("test_files: all well\n");
  return 0;
}
