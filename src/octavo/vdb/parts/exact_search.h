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

