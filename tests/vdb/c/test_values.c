/* Values of rows: kept, changed, saved, and filtered by, against a model that asks every row. */
#include "vdb.h"
#include "check.h"

enum { rows = 3000, names = 5, dimensions = 4 };

static const char *const NAMES[names] = {"year", "lang", "score", "flag", "a name that is rare"};

typedef struct {
  int there, count;
  vdb_value values[names];
  char texts[names][400];
} model_row;

static model_row model[rows];

/* Numbers that are hard: ints that no float is, floats beyond all ints. */
static vdb_value random_value(char *text) {
  static const int64_t ints[] = {0,         1,         2,  -1, 2020, 9007199254740993, 9007199254740992, -9007199254740993,
                                 INT64_MAX, INT64_MIN, 17, 18, INT64_MAX - 1};
  static const double floats[] = {0.0, 1.0, 1.5, -1.0, 2020.0, 9007199254740992.0, 1e300, -1e300, 9223372036854775808.0,
                                  -9223372036854775808.0, 0.25, INFINITY, -INFINITY, -0.0};
  vdb_value value;
  memset(&value, 0, sizeof value);
  value.type = (vdb_value_type)random_below(5);
  if (value.type == VDB_VALUE_BOOL) value.integer = (int64_t)random_below(2);
  if (value.type == VDB_VALUE_INT) value.integer = ints[random_below(sizeof ints / sizeof *ints)];
  if (value.type == VDB_VALUE_FLOAT) value.number = floats[random_below(sizeof floats / sizeof *floats)];
  if (value.type == VDB_VALUE_TEXT) {
    value.text_size = random_below(8) ? random_below(3) : 300 + random_below(2); /* some are too long for a dictionary */
    for (size_t i = 0; i < value.text_size; i++) text[i] = (char)(random_below(2) ? 'a' : 0);
    value.text = text;
  }
  return value;
}

static void random_row(model_row *row) {
  row->there = 1;
  row->count = 0;
  for (int i = 0; i < names; i++) {
    if (random_below(i == names - 1 ? 40 : 3) == 0) continue;
    row->values[row->count] = random_value(row->texts[i]);
    if (i == 0 && random_below(2)) row->values[row->count].type = VDB_VALUE_INT; /* mostly ints, as years are */
    if (i == 1 && row->values[row->count].type != VDB_VALUE_TEXT) row->values[row->count].type = VDB_VALUE_NONE;
    row->values[row->count++].name = NAMES[i];
  }
}

/* As exact as long double is: it holds every int64_t and every double. */
static int compare_numbers(const vdb_value *a, const vdb_value *b) {
  long double x = a->type == VDB_VALUE_INT ? (long double)a->integer : (long double)a->number;
  long double y = b->type == VDB_VALUE_INT ? (long double)b->integer : (long double)b->number;
  return x < y ? -1 : x > y;
}

static int is_number(const vdb_value *value) { return value->type == VDB_VALUE_INT || value->type == VDB_VALUE_FLOAT; }

static int equal(const vdb_value *a, const vdb_value *b) {
  if (is_number(a) && is_number(b)) return compare_numbers(a, b) == 0;
  if (a->type != b->type) return 0;
  if (a->type == VDB_VALUE_BOOL) return a->integer == b->integer;
  if (a->type == VDB_VALUE_NONE) return 1;
  return a->text_size == b->text_size && memcmp(a->text, b->text, a->text_size) == 0;
}

static int passes(const model_row *row, const vdb_condition *condition) {
  if (condition->operation == VDB_ALL_OF || condition->operation == VDB_ANY_OF) {
    int all = condition->operation == VDB_ALL_OF;
    for (size_t i = 0; i < condition->count; i++)
      if (passes(row, &condition->parts[i]) != all) return !all;
    return all;
  }
  const vdb_value *value = NULL;
  for (int i = 0; i < row->count; i++)
    if (strcmp(row->values[i].name, condition->name) == 0) value = &row->values[i];
  if (condition->operation <= VDB_NOT_IN) {
    int found = 0;
    for (size_t i = 0; value && i < condition->count; i++) found |= equal(value, &condition->values[i]);
    return found == (condition->operation == VDB_IS_IN);
  }
  if (!value || !is_number(value)) return 0;
  int order = compare_numbers(value, condition->values);
  switch (condition->operation) {
    case VDB_LESS: return order < 0;
    case VDB_AT_MOST: return order <= 0;
    case VDB_GREATER: return order > 0;
    default: return order >= 0;
  }
}

typedef struct {
  vdb_condition conditions[64];
  vdb_value values[64][4];
  char texts[64][4][400];
  size_t used;
} space;

static void random_condition(space *room, vdb_condition *out, int depth) {
  memset(out, 0, sizeof *out);
  if (depth < 3 && random_below(3) == 0 && room->used < 60) {
    out->operation = random_below(2) ? VDB_ALL_OF : VDB_ANY_OF;
    out->count = random_below(4);
    vdb_condition *parts = &room->conditions[room->used];
    room->used += out->count;
    out->parts = parts;
    for (size_t i = 0; i < out->count; i++) random_condition(room, &parts[i], depth + 1);
    return;
  }
  size_t place = room->used++;
  out->operation = (vdb_operator)random_below(6);
  out->name = random_below(12) ? NAMES[random_below(names)] : "no row has this";
  out->values = room->values[place];
  out->count = out->operation <= VDB_NOT_IN ? random_below(4) : 1;
  for (size_t i = 0; i < out->count; i++) {
    room->values[place][i] = random_value(room->texts[place][i]);
    if (out->operation > VDB_NOT_IN && !is_number(out->values)) room->values[place][0].type = VDB_VALUE_INT;
  }
}

static vdb_record record_of(const model_row *row) {
  vdb_record record = {NULL, NULL, 0, row->values, (size_t)row->count};
  return record;
}

static void add_rows(vdb_database *db, size_t first, size_t count) {
  static float vectors[rows][dimensions];
  static vdb_record records[rows];
  static uint64_t indices[rows];
  for (size_t i = 0; i < count; i++) {
    random_row(&model[first + i]);
    records[i] = record_of(&model[first + i]);
    for (int j = 0; j < dimensions; j++) vectors[i][j] = (float)random_below(100);
  }
  CHECK(vdb_add(db, vectors[0], count, records, VDB_ADD_UNIQUE, indices) == VDB_OK);
  for (size_t i = 0; i < count; i++) CHECK(indices[i] == first + i);
}

/* Every row that the model lets pass is in the answer, and no other. */
static size_t check_filters(const vdb_database *db, int times) {
  static space room;
  size_t total = 0;
  for (int time = 0; time < times; time++) {
    float query[dimensions] = {1, 2, 3, 4};
    vdb_condition condition;
    vdb_query_options options = vdb_default_query_options(rows);
    vdb_answer *answer;
    uint64_t bits[rows / 64 + 1];
    room.used = 0;
    random_condition(&room, &condition, 0);
    options.where = &condition;
    options.exact = 1;
    for (size_t i = 0; i < sizeof bits / 8; i++) bits[i] = 0xaaaaaaaaaaaaaaaau;
    if (time % 3 == 0) options.bitset = bits, options.bitset_words = sizeof bits / 8;
    CHECK(vdb_query(db, query, 1, &options, &answer) == VDB_OK);
    static unsigned char found[rows];
    memset(found, 0, sizeof found);
    for (size_t i = 0; i < answer->counts[0]; i++) found[answer->indices[i]] = 1;
    for (size_t i = 0; i < rows; i++) {
      int wanted = model[i].there && passes(&model[i], &condition) && (!options.bitset || i % 2);
      CHECK(found[i] == wanted);
    }
    total += answer->counts[0];
    vdb_free_answer(answer);
  }
  return total;
}

static void check_kept(const vdb_database *db, size_t index, const model_row *row) {
  vdb_record record;
  vdb_value value;
  size_t place = 0;
  CHECK(vdb_read_record(db, index, &record) == VDB_OK && record.value_count == (size_t)row->count);
  for (int i = 0; i < row->count; i++) {
    CHECK(vdb_next_value(record.metadata, record.metadata_size, &place, &value));
    CHECK(strcmp(value.name, row->values[i].name) == 0 && value.type == row->values[i].type);
    CHECK(equal(&value, &row->values[i]));
    if (value.type == VDB_VALUE_TEXT) CHECK(value.text[value.text_size] == 0);
  }
  CHECK(!vdb_next_value(record.metadata, record.metadata_size, &place, &value));
  vdb_free_record(&record);
}

static void change(vdb_database *db) {
  for (int i = 0; i < 200; i++) {
    size_t row = random_below(rows);
    if (!model[row].there) continue;
    if (random_below(3) == 0) {
      CHECK(vdb_remove_index(db, row) == VDB_OK);
      model[row].there = 0;
      continue;
    }
    random_row(&model[row]);
    vdb_record record = record_of(&model[row]);
    CHECK(vdb_set_metadata(db, row, &record) == VDB_OK);
  }
}

static uint32_t version_of(const char *path) {
  uint32_t version = 0;
  FILE *file = fopen(path, "rb");
  CHECK(file && fseek(file, 8, SEEK_SET) == 0 && fread(&version, 4, 1, file) == 1);
  fclose(file);
  return version;
}

static void check_saved(const vdb_database *db, const char *path) {
  CHECK(vdb_save(db, path) == VDB_OK && vdb_verify(path, NULL, 0) == VDB_OK && version_of(path) == 3);
  for (int mode = VDB_OPEN_MAP; mode >= VDB_OPEN_READ; mode--) {
    vdb_database *again;
    CHECK(vdb_open(path, (vdb_open_mode)mode, 2, &again) == VDB_OK);
    for (size_t i = 0; i < rows; i += 7)
      if (model[i].there) check_kept(again, i, &model[i]);
    CHECK(check_filters(again, 60) > 0);
    if (mode == VDB_OPEN_READ) {
      change(again);
      check_filters(again, 20);
    }
    vdb_destroy(again);
  }
}

static void check_against_model(vdb_index index, const char *path) {
  vdb_options options = vdb_default_options();
  vdb_database *db, *view;
  options.index = index;
  options.threads = 2;
  memset(model, 0, sizeof model);
  CHECK(vdb_new(dimensions, VDB_METRIC_EUCLIDEAN, &options, &db) == VDB_OK);
  add_rows(db, 0, 900);
  check_filters(db, 40);
  add_rows(db, 900, rows - 900); /* columns are there already */
  CHECK(check_filters(db, 100) > 0);
  for (int i = 0; i < 5; i++) {
    change(db);
    check_filters(db, 20);
  }
  for (size_t i = 0; i < rows; i++)
    if (model[i].there) check_kept(db, i, &model[i]);
  CHECK(vdb_save(db, path) == VDB_OK && vdb_open(path, VDB_OPEN_MAP, 2, &view) == VDB_OK);
  CHECK(check_filters(view, 60) > 0);
  CHECK(vdb_set_metadata(view, 0, &(vdb_record){NULL, NULL, 0, NULL, 0}) == VDB_ERROR_READ_ONLY);
  vdb_destroy(view);
  size_t next = 0; /* rows get new numbers */
  CHECK(vdb_compact(db) == VDB_OK);
  for (size_t i = 0; i < rows; i++)
    if (model[i].there && i != next++) model[next - 1] = model[i], model[i].there = 0;
  for (size_t i = 0; i < next; i++) /* texts lie in the rows, which have moved */
    for (int v = 0, at = 0; v < model[i].count; v++, at++) {
      while (strcmp(NAMES[at], model[i].values[v].name) != 0) at++;
      if (model[i].values[v].text) model[i].values[v].text = model[i].texts[at];
    }
  check_filters(db, 60);
  check_saved(db, path);
  vdb_destroy(db);
}

static void check_refusals(void) {
  vdb_database *db = vdb_create(dimensions, VDB_METRIC_COSINE);
  float vector[dimensions] = {1, 0, 0, 0};
  char long_name[300];
  memset(long_name, 'n', sizeof long_name - 1);
  long_name[sizeof long_name - 1] = 0;
  vdb_value value = {"x", VDB_VALUE_INT, 1, 0, NULL, 0}, twice[2] = {value, value};
  vdb_record record = {"id", "m", 1, &value, 1};
  CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_ERROR_INVALID_ARGUMENT); /* both */
  record.metadata = NULL, record.metadata_size = 0;
  record.values = twice, record.value_count = 2;
  CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_ERROR_INVALID_ARGUMENT);
  record.values = &value, record.value_count = 1;
  const char *bad_names[] = {NULL, "", long_name};
  for (int i = 0; i < 3; i++) {
    value.name = bad_names[i];
    CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_ERROR_INVALID_ARGUMENT);
  }
  value.name = "x", value.type = VDB_VALUE_FLOAT, value.number = NAN;
  CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_ERROR_INVALID_ARGUMENT && vdb_count(db) == 0);
  value.number = 0.5;
  CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_OK);
  record.values = NULL, record.value_count = 0;
  CHECK(vdb_set_metadata(db, 7, &record) == VDB_ERROR_INVALID_INDEX);

  vdb_query_options options = vdb_default_query_options(1);
  vdb_answer *answer;
  vdb_condition deep[40], condition = {VDB_LESS, "x", &value, NULL, 1};
  options.where = &condition;
  value.type = VDB_VALUE_TEXT, value.text = "t", value.text_size = 1;
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_ERROR_INVALID_ARGUMENT); /* texts have no order */
  condition.operation = (vdb_operator)8;
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_ERROR_INVALID_ARGUMENT);
  condition.operation = VDB_IS_IN, condition.name = NULL;
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_ERROR_INVALID_ARGUMENT);
  condition.name = "x";
  for (int i = 0; i < 40; i++) {
    vdb_condition one = {VDB_ALL_OF, NULL, NULL, i ? &deep[i - 1] : &condition, 1};
    deep[i] = one;
  }
  options.where = &deep[39];
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_ERROR_INVALID_ARGUMENT);
  options.where = &deep[20];
  CHECK(vdb_query(db, vector, 1, &options, &answer) == VDB_OK && answer->counts[0] == 0);
  vdb_free_answer(answer);
  vdb_destroy(db);
}

/* A graph answers with rows that pass only, and with k of them where there are k. */
static void check_graph(void) {
  vdb_options settings = vdb_default_options();
  vdb_database *db;
  settings.index = VDB_INDEX_HNSW;
  CHECK(vdb_new(dimensions, VDB_METRIC_EUCLIDEAN, &settings, &db) == VDB_OK);
  for (int64_t i = 0; i < 2000; i++) {
    float vector[dimensions];
    for (int j = 0; j < dimensions; j++) vector[j] = (float)random_below(1000);
    vdb_value value = {"i", VDB_VALUE_INT, i, 0, NULL, 0};
    vdb_record record = {NULL, NULL, 0, &value, 1};
    CHECK(vdb_add(db, vector, 1, &record, VDB_ADD_ANY, NULL) == VDB_OK);
  }
  static const int64_t limits[] = {5, 20, 1000};
  for (int i = 0; i < 3; i++) {
    float query[dimensions] = {500, 500, 500, 500};
    vdb_value limit = {NULL, VDB_VALUE_INT, limits[i], 0, NULL, 0};
    vdb_condition condition = {VDB_LESS, "i", &limit, NULL, 1};
    vdb_query_options options = vdb_default_query_options(10);
    vdb_answer *answer;
    options.where = &condition;
    options.with_metadata = 1;
    CHECK(vdb_query(db, query, 1, &options, &answer) == VDB_OK);
    CHECK(answer->counts[0] == (size_t)(limits[i] < 10 ? limits[i] : 10));
    for (size_t j = 0; j < answer->counts[0]; j++) {
      vdb_value value;
      size_t place = 0;
      CHECK(answer->indices[j] < (uint64_t)limits[i] && answer->has_values[j]);
      CHECK(vdb_next_value(answer->metadata[j], answer->metadata_sizes[j], &place, &value));
      CHECK(value.integer == (int64_t)answer->indices[j]);
    }
    vdb_free_answer(answer);
  }
  vdb_destroy(db);
}

/* A condition that few rows pass answers as the same rows in a bitset do, however often it was asked before, and whatever
 * has happened to the rows since: what was copied of them must not be answered. */
static void ask_again(const vdb_database *db, const vdb_condition *condition, const float *query) {
  uint64_t bits[rows / 64 + 1] = {0};
  vdb_query_options listed = vdb_default_query_options(10), asked = listed;
  vdb_answer *expected, *answer;
  for (size_t row = 0; row < db->slots; row++)
    if (vdb_is_live(db, row) && !vdb_record_at(db, row, &(const char *){0}, &(size_t){0}, &(const unsigned char *){0}, &(size_t){0}))
      bits[row / 64] |= (uint64_t)1 << row % 64;
  listed.bitset = bits, listed.bitset_words = rows / 64 + 1, listed.exact = 1;
  asked.where = condition, asked.exact = 1;
  CHECK(vdb_query(db, query, 1, &listed, &expected) == VDB_OK && expected->counts[0] == 10);
  for (int time = 0; time < 4; time++) {
    CHECK(vdb_query(db, query, 1, &asked, &answer) == VDB_OK && answer->counts[0] == expected->counts[0]);
    CHECK(memcmp(answer->indices, expected->indices, answer->counts[0] * sizeof(uint64_t)) == 0);
    CHECK(memcmp(answer->distances, expected->distances, answer->counts[0] * sizeof(float)) == 0);
    vdb_free_answer(answer);
  }
  vdb_free_answer(expected);
}

static void check_asked_again(vdb_index index, vdb_storage storage) {
  enum { width = 24, few = 150, step = rows / few };
  vdb_options settings = vdb_default_options();
  vdb_database *db;
  float vector[width], query[width], *lent, *other;
  uint64_t gone[8], place;
  settings.index = index, settings.storage = storage, settings.threads = 1;
  CHECK(vdb_new(width, VDB_METRIC_EUCLIDEAN, &settings, &db) == VDB_OK);
  for (int j = 0; j < width; j++) query[j] = 50.0f;
  for (size_t i = 0; i < rows; i++) { /* few rows have no record */
    for (int j = 0; j < width; j++) vector[j] = (float)random_below(100);
    vdb_value value = {"a", VDB_VALUE_INT, 0, 0, NULL, 0};
    vdb_record record = {NULL, NULL, 0, &value, 1};
    CHECK(vdb_add(db, vector, 1, i % step ? &record : NULL, VDB_ADD_ANY, &place) == VDB_OK);
    if (i % step == 0) gone[i / step % 8] = place; /* the last ones: of the first 32 a scan measures all */
  }
  vdb_value zero = {NULL, VDB_VALUE_INT, 0, 0, NULL, 0};
  vdb_condition condition = {VDB_NOT_IN, "a", &zero, NULL, 1};
  ask_again(db, &condition, query);
  CHECK(db->columns.kept[0].passing && db->columns.kept[0].passing->packed); /* or this tests nothing */
  for (int i = 0; i < 8; i += 2) {
    for (int time = 0; time < 2; time++) { /* a row that is far goes, then one that is near */
      CHECK(vdb_remove_index(db, time ? place : gone[i]) == VDB_OK);
      ask_again(db, &condition, query);
      for (int j = 0; j < width; j++) vector[j] = 50.0f + (float)i;
      CHECK(vdb_add(db, vector, 1, NULL, VDB_ADD_ANY, &place) == VDB_OK); /* a flat index has a place that was used */
      CHECK(index != VDB_INDEX_FLAT || place == gone[i]);
      ask_again(db, &condition, query);
    }
    if (storage != VDB_STORAGE_F32 && storage != VDB_STORAGE_F32_I8) continue;
    CHECK(vdb_get_vector(db, gone[i + 1], &lent, NULL, NULL) == VDB_OK);
    for (int time = 0; time < 4; time++) { /* near, far, and near again */
      for (int j = 0; j < width; j++) lent[j] = time % 2 ? 500.0f : 49.0f - (float)i;
      if (time) CHECK(vdb_refresh_vector(db, gone[i + 1]) == VDB_OK);
      if (time == 1) CHECK(vdb_get_vector(db, 1, &other, NULL, NULL) == VDB_OK); /* rows are copied with what is known now */
      ask_again(db, &condition, query);
    }
  }
  CHECK(vdb_compact(db) == VDB_OK);
  ask_again(db, &condition, query);
  vdb_destroy(db);
}

int main(int count, char **arguments) {
  const char *path = count > 1 ? arguments[1] : "test_values.vdb";
  check_refusals();
  check_graph();
  for (int storage = 0; storage < 5; storage++)
    for (int index = 0; index < 2; index++) check_asked_again((vdb_index)index, (vdb_storage)storage);
  check_against_model(VDB_INDEX_FLAT, path);
  check_against_model(VDB_INDEX_HNSW, path);
  remove(path);
  puts("values and conditions");
  return 0;
}
