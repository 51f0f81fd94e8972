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

