/* ------------------------------------------------------------------------------------------------------------------
 * 5 Threads
 *
 * The lock lets many readers in or one writer; a waiting writer goes before new readers. It is made of mutexes and
 * conditions, since -std=c11 hides pthread_rwlock_t, and so that a writer at work for long can let readers in between
 * its steps. Without VDB_MULTITHREADED all of this is empty.
 *
 * The pool runs `tasks` calls of one function on its workers and on the caller. It is made at the first call that wants
 * it and serves one job at a time: who finds it busy works alone, since the cores are busy too. After a fork() the
 * first thread of the child that wants it makes it anew; the others wait for that.
 */
typedef void (*vdb_task)(void *context, size_t task);

#ifdef VDB_MULTITHREADED
typedef struct {
  pthread_mutex_t writer; /* held through a whole writing call */
  pthread_mutex_t mutex;  /* guards what follows, for a moment at a time */
  pthread_cond_t readable, writable;
  size_t readers;
  int writing; /* readers stay out */
} vdb_lock;

typedef struct {
  pthread_mutex_t mutex;
  pthread_cond_t work, done;
  pthread_t *threads;
  size_t thread_count;
  long process; /* whose threads these are; -p while a thread of process p, after a fork, makes the pool its own */
  int busy, stopping;
  vdb_task run;
  void *context;
  size_t tasks, next, unfinished; /* next is taken under the mutex: tasks are large */
} vdb_pool;
#else
typedef struct {
  char unused;
} vdb_lock;
typedef struct {
  char unused;
} vdb_pool;
#endif

#ifdef VDB_MULTITHREADED

static inline int vdb_lock_make(vdb_lock *lock) {
  memset(lock, 0, sizeof *lock);
  if (pthread_mutex_init(&lock->writer, NULL)) return 0;
  if (pthread_mutex_init(&lock->mutex, NULL)) {
    pthread_mutex_destroy(&lock->writer);
    return 0;
  }
  pthread_cond_init(&lock->readable, NULL);
  pthread_cond_init(&lock->writable, NULL);
  return 1;
}

static inline void vdb_lock_destroy(vdb_lock *lock) {
  pthread_cond_destroy(&lock->readable);
  pthread_cond_destroy(&lock->writable);
  pthread_mutex_destroy(&lock->mutex);
  pthread_mutex_destroy(&lock->writer);
}

static inline void vdb_enter_read(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  while (lock->writing) pthread_cond_wait(&lock->readable, &lock->mutex);
  lock->readers++;
  pthread_mutex_unlock(&lock->mutex);
}

static inline void vdb_leave_read(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  if (--lock->readers == 0 && lock->writing) pthread_cond_signal(&lock->writable);
  pthread_mutex_unlock(&lock->mutex);
}

/* For the writer: no new readers from here, and none left on return. */
static inline void vdb_keep_readers_out(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  lock->writing = 1;
  while (lock->readers) pthread_cond_wait(&lock->writable, &lock->mutex);
  pthread_mutex_unlock(&lock->mutex);
}

/* For the writer: readers may read what is there; other writers still wait. */
static inline void vdb_let_readers_in(vdb_lock *lock) {
  pthread_mutex_lock(&lock->mutex);
  lock->writing = 0;
  pthread_cond_broadcast(&lock->readable);
  pthread_mutex_unlock(&lock->mutex);
}

static inline void vdb_enter_write(vdb_lock *lock) {
  pthread_mutex_lock(&lock->writer);
  vdb_keep_readers_out(lock);
}

/* For a reader that must not see a writer's work half done. */
static inline void vdb_enter_still(vdb_lock *lock) {
  pthread_mutex_lock(&lock->writer);
  vdb_enter_read(lock);
}

static inline void vdb_leave_still(vdb_lock *lock) {
  vdb_leave_read(lock);
  pthread_mutex_unlock(&lock->writer);
}

static inline void vdb_leave_write(vdb_lock *lock) {
  vdb_let_readers_in(lock);
  pthread_mutex_unlock(&lock->writer);
}

/* Takes tasks until there are none. Called and left with the mutex held. */
static inline void vdb_pool_work(vdb_pool *pool) {
  while (pool->next < pool->tasks) {
    size_t task = pool->next++;
    vdb_task run = pool->run;
    void *context = pool->context;
    pthread_mutex_unlock(&pool->mutex);
    run(context, task);
    pthread_mutex_lock(&pool->mutex);
    if (--pool->unfinished == 0) pthread_cond_signal(&pool->done);
  }
}

static inline void *vdb_pool_worker(void *argument) {
  vdb_pool *pool = (vdb_pool *)argument;
  pthread_mutex_lock(&pool->mutex);
  while (!pool->stopping) {
    vdb_pool_work(pool);
    if (!pool->stopping) pthread_cond_wait(&pool->work, &pool->mutex);
  }
  pthread_mutex_unlock(&pool->mutex);
  return NULL;
}

VDB_LIGHT void vdb_pool_reset(vdb_pool *pool) {
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->work, NULL);
  pthread_cond_init(&pool->done, NULL);
  pool->threads = NULL;
  pool->thread_count = 0;
  pool->busy = pool->stopping = 0;
  pool->tasks = pool->next = pool->unfinished = 0;
  __atomic_store_n(&pool->process, (long)vdb_sys_getpid(), __ATOMIC_RELEASE);
}

/* In a child of fork() the pool is the parent's, whose threads are not here and whose mutex may be locked. One thread
 * makes it anew. A child that is forked meanwhile finds the number of another process, and begins again. */
VDB_LIGHT void vdb_pool_adopt(vdb_pool *pool) {
  long process = (long)vdb_sys_getpid(), found = __atomic_load_n(&pool->process, __ATOMIC_ACQUIRE);
  while (found != process) {
    if (found == -process) {
      sched_yield();
      found = __atomic_load_n(&pool->process, __ATOMIC_ACQUIRE);
    } else if (__atomic_compare_exchange_n(&pool->process, &found, -process, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
      VDB_FREE(pool->threads);
      vdb_pool_reset(pool);
      return;
    }
  }
}

/* Joins the workers; those of a parent process are not ours to join. */
VDB_LIGHT void vdb_pool_stop(vdb_pool *pool) {
  if (pool->process == (long)vdb_sys_getpid()) {
    pthread_mutex_lock(&pool->mutex);
    pool->stopping = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (size_t i = 0; i < pool->thread_count; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
  }
  VDB_FREE(pool->threads);
  pool->threads = NULL;
}

/* Starts the workers. Fewer than wanted, or none, is no failure: the caller works too. */
VDB_LIGHT void vdb_pool_start(vdb_pool *pool, size_t workers) {
  pool->threads = (pthread_t *)VDB_MALLOC(workers * sizeof(pthread_t));
  if (!pool->threads) return;
  while (pool->thread_count < workers &&
         pthread_create(&pool->threads[pool->thread_count], NULL, vdb_pool_worker, pool) == 0)
    pool->thread_count++;
}

/* 1 if the job was done by the pool, 0 if the pool was busy and nothing was done. */
VDB_ONCE int vdb_pool_run(vdb_pool *pool, size_t workers, size_t tasks, vdb_task run, void *context) {
  vdb_pool_adopt(pool);
  pthread_mutex_lock(&pool->mutex);
  if (pool->busy) {
    pthread_mutex_unlock(&pool->mutex);
    return 0;
  }
  pool->busy = 1;
  if (!pool->threads) vdb_pool_start(pool, workers);
  pool->run = run;
  pool->context = context;
  pool->next = 0;
  pool->tasks = pool->unfinished = tasks;
  pthread_cond_broadcast(&pool->work);
  vdb_pool_work(pool);
  while (pool->unfinished) pthread_cond_wait(&pool->done, &pool->mutex);
  pool->tasks = pool->next = 0;
  pool->busy = 0;
  pthread_mutex_unlock(&pool->mutex);
  return 1;
}

VDB_ONCE size_t vdb_cores(void) {
  long cores = vdb_sys_get_nprocs();
  return cores < 1 ? 1 : cores > 256 ? 256 : (size_t)cores;
}

#else

static inline int vdb_lock_make(vdb_lock *lock) { return (lock->unused = 0) == 0; }
static inline void vdb_lock_destroy(vdb_lock *lock) { (void)lock; }
static inline void vdb_enter_read(vdb_lock *lock) { (void)lock; }
static inline void vdb_leave_read(vdb_lock *lock) { (void)lock; }
static inline void vdb_keep_readers_out(vdb_lock *lock) { (void)lock; }
static inline void vdb_let_readers_in(vdb_lock *lock) { (void)lock; }
static inline void vdb_enter_write(vdb_lock *lock) { (void)lock; }
static inline void vdb_leave_write(vdb_lock *lock) { (void)lock; }
static inline void vdb_enter_still(vdb_lock *lock) { (void)lock; }
static inline void vdb_leave_still(vdb_lock *lock) { (void)lock; }
VDB_LIGHT void vdb_pool_reset(vdb_pool *pool) { pool->unused = 0; }
VDB_LIGHT void vdb_pool_stop(vdb_pool *pool) { (void)pool; }
VDB_ONCE size_t vdb_cores(void) { return 1; }

VDB_ONCE int vdb_pool_run(vdb_pool *pool, size_t workers, size_t tasks, vdb_task run, void *context) {
  (void)pool, (void)workers;
  for (size_t task = 0; task < tasks; task++) run(context, task);
  return 1;
}

#endif

/* Who may stop a long call; see vdb_add_watched and vdb_open_watched. */
typedef struct {
  int (*go_on)(size_t done, size_t count, void *context);
  void *context;
#ifdef VDB_MULTITHREADED
  pthread_t caller;
#endif
  int stopped; /* written by the caller's thread; read and written atomically */
} vdb_watch;

static inline void vdb_watch_make(vdb_watch *watch, int (*go_on)(size_t, size_t, void *), void *context) {
  memset(watch, 0, sizeof *watch);
  watch->go_on = go_on;
  watch->context = context;
#ifdef VDB_MULTITHREADED
  watch->caller = pthread_self();
#endif
}

/* Whether the call was stopped; on the caller's thread, asks. */
VDB_ONCE int vdb_watch_stops(vdb_watch *watch, size_t done, size_t count) {
  if (__atomic_load_n(&watch->stopped, __ATOMIC_RELAXED)) return 1;
#ifdef VDB_MULTITHREADED
  if (!pthread_equal(watch->caller, pthread_self())) return 0;
#endif
  if (watch->go_on(done, count, watch->context)) return 0;
  __atomic_store_n(&watch->stopped, 1, __ATOMIC_RELAXED);
  return 1;
}

