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

