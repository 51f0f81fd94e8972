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
