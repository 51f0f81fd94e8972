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

