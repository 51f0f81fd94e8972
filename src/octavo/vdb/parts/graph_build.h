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

