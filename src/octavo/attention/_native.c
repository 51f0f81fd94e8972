/* Attention over ragged pages on the CPU: the operation that reference.py defines.

   A row is one (sequence, KV head): its slots in the pages, then the new tokens. A row's `queries` are
   all that read it, token by token, the heads of its group beside each other. The slots that some query
   sees are gathered, as pointers, into tiles; a tile is scored, weighted and summed for every query
   before the next one, so that each key and value is read from memory once.

   The file includes itself: first everything that does not depend on the instruction set, then, in
   between, the three kernels over a tile, once per instruction set. */
#ifndef LANES

#define _GNU_SOURCE 1 /* RTLD_DEFAULT */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "_threads.h"

enum { FLOAT32, BFLOAT16, FLOAT16, DTYPES }; /* the codes that native.py passes */
enum {
    TILE = 64,         /* slots scored together; a multiple of every LANES */
    BLOCK = 64,        /* queries per pass over the slots, so that their state stays in cache */
    WIDEST = 16,       /* floats in the widest vector; head_dim is padded to a multiple of it */
    SHARE = 4,         /* chunks per thread: one that starts late or runs slow takes fewer */
};
/* Multiply-adds that are worth a chunk of their own: about 4 us, against some 2 us to call a thread. */
static _Atomic int64_t chunk_work = 200000;

static const int SIZE_OF[DTYPES] = {4, 2, 2};

typedef struct {
    const char *key[TILE], *value[TILE];
    int32_t position[TILE], expiry[TILE];
    int count;
    int dtype;
    bool masked; /* some query of the block does not see some slot of the tile */
} Tile;

typedef struct {
    const char *name;
    void (*score)(const Tile *, const Tile *next, const float *query, int queries, int dim, float *scores);
    void (*weigh)(const Tile *, const int32_t *at, int queries, float *scores, float *top, float *sum,
                  float *decay);
    void (*gather)(const Tile *, const Tile *next, const float *weights, const float *decay, int queries,
                   int dim, float *acc);
} Kernels;

/* The running softmax of a row's queries: largest score, sum of weights, weighted sum of values. */
typedef struct {
    float *acc; /* [queries, dim] */
    float *top; /* [queries] */
    float *sum; /* [queries] */
} State;

typedef struct {
    const char *query, *key, *value; /* [B, heads, tokens, head_dim], the last dimension contiguous */
    char *out;                       /* [B, tokens, heads, head_dim] */
    const int32_t *position;         /* [B, tokens] */
    const int32_t *expiry;           /* [B, kv_heads, tokens] */
    const char *k_pages, *v_pages;   /* [P, page_size, head_dim] */
    const int32_t *slot_position, *slot_expiry; /* [P, page_size] */
    const int32_t *page_table;                  /* [B, kv_heads, pages_per_row] */
    const int32_t *length;                      /* [B, kv_heads] */
    int64_t batch, heads, kv_heads, tokens, head_dim, page_size, pages_per_row;
    int64_t query_step[3], key_step[3], value_step[3]; /* bytes to the next sequence, head, token */
    int dtype, page_dtype;
    float scale;

    const Kernels *kernels;
    int64_t rows, group, queries;
    int dim; /* head_dim, padded */
    int64_t *start; /* [rows + 1], slots in all rows before this one */
    int threads, chunks;
    char *scratch; /* [threads], scratch_size bytes each */
    size_t scratch_size;
    float *partial; /* [2 * chunks], the states of rows that are cut between chunks */
    void *memory;
    _Atomic int joined, taken; /* threads and chunks so far */
} Job;

/* What one thread needs: the struct, then the floats it points to. */
typedef struct {
    Tile tile[2];
    int32_t at[BLOCK]; /* positions of the block's queries */
    int32_t oldest, newest;
    float decay[BLOCK];
    float *query;   /* [BLOCK, dim] */
    float *scores;  /* [BLOCK, TILE] */
    float *widened; /* [2 tiles, TILE, key and value, dim], if head_dim is not a multiple of WIDEST */
    State state;
} Scratch;

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | rest << 13);
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f)); /* subnormals become normal */
}

static uint16_t to_half(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more round to infinity */
    if (bits < 0x38800000) /* subnormal: floats between 0.5 and 1 have the step of those */
        return (uint16_t)(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
    bits += 0xfff + (bits >> 13 & 1); /* to nearest, ties to even */
    return (uint16_t)(sign | (bits - 0x38000000) >> 13);
}

static uint16_t to_bfloat(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void widen(const char *from, int dtype, int64_t n, int64_t padded, float scale, float *to) {
    const uint16_t *words = (const uint16_t *)from;
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < n; i++) to[i] = ((const float *)from)[i] * scale;
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = float_of((uint32_t)words[i] << 16) * scale;
    else
        for (int64_t i = 0; i < n; i++) to[i] = from_half(words[i]) * scale;
    for (int64_t i = n; i < padded; i++) to[i] = 0;
}

static void narrow(const float *from, float scale, int64_t n, int dtype, char *to) {
    uint16_t *words = (uint16_t *)to;
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < n; i++) ((float *)to)[i] = from[i] * scale;
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < n; i++) words[i] = to_bfloat(from[i] * scale);
    else
        for (int64_t i = 0; i < n; i++) words[i] = to_half(from[i] * scale);
}

#define PASTE(a, b) a##_##b
#define PASTE_VALUES(a, b) PASTE(a, b)
#define NAME(function) PASTE_VALUES(function, ISA)
#define STRING(text) #text
#define TEXT(text) STRING(text)

#define LANES 4
#define VALUES 2
#define TARGET
#define ISA scalar
#define EACH_LANE(F, w) F(0, w), F(1, w), F(2, w), F(3, w)
#include "_native.c"

#if defined(__x86_64__)
#define LANES 8
#define VALUES 2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define ISA avx2
#define EACH_LANE(F, w) F(0, w), F(1, w), F(2, w), F(3, w), F(4, w), F(5, w), F(6, w), F(7, w)
#include "_native.c"

#define LANES 16
#define VALUES 4
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define ISA avx512
#define EACH_LANE(F, w)                                                                             \
    F(0, w), F(1, w), F(2, w), F(3, w), F(4, w), F(5, w), F(6, w), F(7, w), F(8, w), F(9, w),       \
        F(10, w), F(11, w), F(12, w), F(13, w), F(14, w), F(15, w)
#include "_native.c"
#endif

static const Kernels *const KERNELS[] = {
    &kernels_scalar,
#if defined(__x86_64__)
    &kernels_avx2, &kernels_avx512,
#endif
};
enum { ISAS = sizeof KERNELS / sizeof *KERNELS };
static _Atomic int chosen;

static bool supported(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == 0;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static void load_queries(const Job *job, int64_t row, int64_t first, int n, Scratch *s) {
    int64_t b = row / job->kv_heads, h = row % job->kv_heads;
    s->oldest = INT32_MAX;
    s->newest = -1;
    for (int r = 0; r < n; r++) {
        int64_t token = (first + r) / job->group, head = h * job->group + (first + r) % job->group;
        const char *from =
            job->query + b * job->query_step[0] + head * job->query_step[1] + token * job->query_step[2];
        widen(from, job->dtype, job->head_dim, job->dim, job->scale, s->query + (int64_t)r * job->dim);
        int32_t at = s->at[r] = job->position[b * job->tokens + token];
        if (at < s->oldest) s->oldest = at;
        if (at > s->newest) s->newest = at;
    }
}

/* A run of neighbouring slots: of one page, or of the new tokens. */
typedef struct {
    const char *key, *value;
    const int32_t *position, *expiry;
    int64_t key_step, value_step, slots;
    int dtype;
} Run;

static Run run_at(const Job *job, int64_t row, int64_t at) {
    int64_t b = row / job->kv_heads, h = row % job->kv_heads, used = job->length[row];
    if (at >= used) {
        int64_t n = at - used;
        return (Run){job->key + b * job->key_step[0] + h * job->key_step[1] + n * job->key_step[2],
                     job->value + b * job->value_step[0] + h * job->value_step[1] + n * job->value_step[2],
                     job->position + b * job->tokens + n, job->expiry + row * job->tokens + n,
                     job->key_step[2], job->value_step[2], job->tokens - n, job->dtype};
    }
    int64_t inside = at % job->page_size, step = job->head_dim * SIZE_OF[job->page_dtype];
    int64_t page = job->page_table[row * job->pages_per_row + at / job->page_size];
    int64_t slot = page * job->page_size + inside;
    return (Run){job->k_pages + slot * step, job->v_pages + slot * step,
                 job->slot_position + slot, job->slot_expiry + slot,
                 step, step, smaller(job->page_size - inside, used - at), job->page_dtype};
}

/* The kernels read whole vectors of padded head_dim; a slot of another size is copied out for them. */
static void widen_tile(const Job *job, Tile *tile, float *room) {
    for (int i = 0; i < tile->count; i++, room += 2 * job->dim) {
        widen(tile->key[i], tile->dtype, job->head_dim, job->dim, 1, room);
        widen(tile->value[i], tile->dtype, job->head_dim, job->dim, 1, room + job->dim);
        tile->key[i] = (char *)room;
        tile->value[i] = (char *)(room + job->dim);
    }
    tile->dtype = FLOAT32;
}

/* Adds those slots of a run that some query may see; returns the new count. */
static int add_slots(Tile *tile, Run run, int slots, int32_t oldest, int32_t newest) {
    int n = tile->count, hidden = 0;
    memcpy(tile->position + n, run.position, sizeof(int32_t) * (size_t)slots);
    memcpy(tile->expiry + n, run.expiry, sizeof(int32_t) * (size_t)slots);
    for (int i = 0; i < slots; i++)
        hidden += (run.position[i] < 0) | (run.position[i] > newest) | (run.expiry[i] < oldest);
    for (int i = 0; i < slots; i++) {
        tile->key[n + i] = run.key + i * run.key_step;
        tile->value[n + i] = run.value + i * run.value_step;
    }
    if (!hidden) return n + slots;
    for (int i = 0; i < slots; i++) { /* without a branch on what is seen: expiries come in no order */
        tile->key[n] = run.key + i * run.key_step;
        tile->value[n] = run.value + i * run.value_step;
        tile->position[n] = run.position[i];
        tile->expiry[n] = run.expiry[i];
        n += (run.position[i] >= 0) & (run.position[i] <= newest) & (run.expiry[i] >= oldest);
    }
    return n;
}

/* Positions and expiries are needed before anything else of a slot, so they are fetched two tiles early. */
static void prefetch_slots(const Job *job, int64_t row, int64_t at) {
    if (at >= job->length[row]) return;
    int64_t slot = job->page_table[row * job->pages_per_row + at / job->page_size] * job->page_size;
    __builtin_prefetch(job->slot_position + slot + at % job->page_size);
    __builtin_prefetch(job->slot_expiry + slot + at % job->page_size);
}

/* Fills a tile with the next slots before `last` that some query may see; returns where to go on. */
static int64_t fill_tile(const Job *job, int64_t row, int64_t at, int64_t last, Scratch *s, int which) {
    Tile *tile = &s->tile[which];
    tile->count = 0;
    while (at < last && tile->count < TILE) {
        Run run = run_at(job, row, at);
        if (tile->count && run.dtype != tile->dtype) break;
        prefetch_slots(job, row, at + 2 * TILE);
        tile->dtype = run.dtype;
        int slots = (int)smaller(smaller(run.slots, last - at), TILE - tile->count);
        tile->count = add_slots(tile, run, slots, s->oldest, s->newest);
        at += slots;
    }
    int n = tile->count;
    tile->masked = false;
    if (s->oldest < s->newest)
        for (int i = 0; i < n; i++)
            tile->masked |= tile->position[i] > s->oldest || tile->expiry[i] < s->newest;
    if (n && job->dim != job->head_dim)
        widen_tile(job, tile, s->widened + (int64_t)which * 2 * TILE * job->dim);
    for (int i = n; n && i < TILE; i++) { /* scoring works on whole vectors of slots */
        tile->key[i] = tile->key[0];
        tile->value[i] = tile->value[0];
    }
    return at;
}

static void attend_piece(const Job *job, Scratch *s, int64_t row, int64_t first, int64_t last, State state) {
    for (int64_t r = 0; r < job->queries; r += BLOCK) {
        int n = (int)smaller(BLOCK, job->queries - r);
        float *acc = state.acc + r * job->dim, *top = state.top + r, *sum = state.sum + r;
        load_queries(job, row, r, n, s);
        memset(acc, 0, sizeof(float) * (size_t)n * (size_t)job->dim);
        for (int i = 0; i < n; i++) top[i] = -INFINITY, sum[i] = 0;
        int64_t at = fill_tile(job, row, first, last, s, 0);
        for (int which = 0; s->tile[which].count; which ^= 1) {
            at = fill_tile(job, row, at, last, s, which ^ 1); /* known early, so that it can be prefetched */
            const Tile *tile = &s->tile[which], *next = &s->tile[which ^ 1];
            if (!next->count) next = tile;
            job->kernels->score(tile, next, s->query, n, job->dim, s->scores);
            job->kernels->weigh(tile, s->at, n, s->scores, top, sum, s->decay);
            job->kernels->gather(tile, next, s->scores, s->decay, n, job->dim, acc);
        }
    }
}

static void write_row(const Job *job, int64_t row, State state) {
    int64_t b = row / job->kv_heads, h = row % job->kv_heads, size = job->head_dim * SIZE_OF[job->dtype];
    for (int64_t r = 0; r < job->queries; r++) {
        int64_t token = r / job->group, head = h * job->group + r % job->group;
        float scale = state.sum[r] > 0 ? 1 / state.sum[r] : 0; /* a padded query has seen nothing */
        narrow(state.acc + r * job->dim, scale, job->head_dim, job->dtype,
               job->out + ((b * job->tokens + token) * job->heads + head) * size);
    }
}

/* Chunks are equal shares of all slots, whatever the lengths of the rows. */
static int64_t bound(const Job *job, int chunk) { return job->start[job->rows] * chunk / job->chunks; }

static int64_t row_of(const Job *job, int64_t slot) { /* the row with start[row] <= slot < start[row + 1] */
    int64_t low = 0, high = job->rows;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->start[middle] <= slot) low = middle;
        else high = middle;
    }
    return low;
}

static size_t state_floats(const Job *job) { return (size_t)job->queries * ((size_t)job->dim + 2); }

static State state_in(const Job *job, float *floats) {
    float *top = floats + job->queries * job->dim;
    return (State){floats, top, top + job->queries};
}

/* A chunk cuts at most two rows: the one it begins inside of and the one it ends inside of. */
static State partial_state(const Job *job, int chunk, bool begins_row) {
    return state_in(job, job->partial + (2 * (size_t)chunk + begins_row) * state_floats(job));
}

static void attend_chunk(const Job *job, int chunk, int thread) {
    Scratch *s = (Scratch *)(job->scratch + (size_t)thread * job->scratch_size);
    int64_t low = bound(job, chunk), high = bound(job, chunk + 1);
    for (int64_t row = row_of(job, low); row < job->rows && job->start[row] < high; row++) {
        int64_t start = job->start[row], end = job->start[row + 1];
        bool whole = start >= low && end <= high;
        State state = whole ? s->state : partial_state(job, chunk, start >= low);
        attend_piece(job, s, row, larger(low, start) - start, smaller(high, end) - start, state);
        if (whole) write_row(job, row, state);
    }
}

static void add_state(const Job *job, State to, State from) {
    for (int64_t r = 0; r < job->queries; r++) {
        if (from.top[r] == -INFINITY) continue;
        float top = fmaxf(to.top[r], from.top[r]);
        float old = expf(to.top[r] - top), new = expf(from.top[r] - top);
        for (int64_t d = r * job->dim; d < (r + 1) * job->dim; d++)
            to.acc[d] = to.acc[d] * old + from.acc[d] * new;
        to.sum[r] = to.sum[r] * old + from.sum[r] * new;
        to.top[r] = top;
    }
}

static void join_cut_rows(const Job *job) {
    for (int chunk = 0; chunk + 1 < job->chunks;) {
        int64_t cut = bound(job, chunk + 1), row = row_of(job, cut);
        if (cut >= job->start[job->rows] || job->start[row] == cut) {
            chunk++;
            continue;
        }
        State state = partial_state(job, chunk, true);
        for (chunk++; bound(job, chunk) < job->start[row + 1]; chunk++)
            add_state(job, state, partial_state(job, chunk, false));
        chunk--; /* the last of the row's chunks may cut another row at its end */
        write_row(job, row, state);
    }
}

static void take_chunks(void *data) {
    Job *job = data;
    int thread = atomic_fetch_add(&job->joined, 1);
    for (int chunk; (chunk = atomic_fetch_add(&job->taken, 1)) < job->chunks;)
        attend_chunk(job, chunk, thread);
}

static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

/* The chunks depend on the shapes and on `threads` alone, never on who runs them: so does the result. */
static void plan(Job *job, int threads) {
    job->start[0] = 0;
    for (int64_t row = 0; row < job->rows; row++)
        job->start[row + 1] = job->start[row] + job->length[row] + job->tokens;
    double work = (double)job->start[job->rows] * (double)job->dim * (double)(2 * job->queries + 2);
    int most = threads == 1 ? 1 : (int)smaller(threads * SHARE, job->start[job->rows]);
    job->chunks = (int)larger(1, smaller(most, (int64_t)(work / (double)atomic_load(&chunk_work))));
    job->threads = (int)smaller(threads, job->chunks);
}

static bool allocate(Job *job) {
    size_t dim = (size_t)job->dim, state = state_floats(job) * sizeof(float);
    size_t query = aligned(BLOCK * dim * sizeof(float)), scores = BLOCK * TILE * sizeof(float);
    size_t widened = job->dim == job->head_dim ? 0 : 4 * TILE * dim * sizeof(float);
    job->scratch_size = aligned(sizeof(Scratch)) + query + scores + widened + aligned(state);
    size_t scratch = (size_t)job->threads * job->scratch_size;
    size_t partial = job->chunks > 1 ? 2 * (size_t)job->chunks * state : 0;
    job->memory = aligned_alloc(64, scratch + aligned(partial));
    if (!job->memory) return false;
    job->scratch = job->memory;
    job->partial = (float *)(job->scratch + scratch);
    for (int thread = 0; thread < job->threads; thread++) {
        char *at = job->scratch + (size_t)thread * job->scratch_size;
        Scratch *s = (Scratch *)at;
        s->query = (float *)(at += aligned(sizeof(Scratch)));
        s->scores = (float *)(at += query);
        s->widened = (float *)(at += scores);
        s->state = state_in(job, (float *)(at + widened));
    }
    return true;
}

static bool attend(Job *job, int threads) {
    job->rows = job->batch * job->kv_heads;
    job->group = job->heads / job->kv_heads;
    job->queries = job->group * job->tokens;
    job->dim = (int)((job->head_dim + WIDEST - 1) / WIDEST * WIDEST);
    job->kernels = KERNELS[atomic_load(&chosen)];
    job->start = malloc(sizeof(int64_t) * (size_t)(job->rows + 1));
    if (!job->start) return false;
    plan(job, threads);
    bool enough = allocate(job);
    if (enough) {
        on_threads(take_chunks, job, job->threads);
        join_cut_rows(job);
        free(job->memory);
    }
    free(job->start);
    return enough;
}

enum { INTEGERS = 33 };

static void read_steps(const long long *elements, int dtype, int64_t *bytes) {
    for (int i = 0; i < 3; i++) bytes[i] = elements[i] * SIZE_OF[dtype];
}

static Job job_from(const long long *a) {
    Job job = {
        .query = (const char *)(intptr_t)a[0],
        .key = (const char *)(intptr_t)a[1],
        .value = (const char *)(intptr_t)a[2],
        .out = (char *)(intptr_t)a[3],
        .position = (const int32_t *)(intptr_t)a[4],
        .expiry = (const int32_t *)(intptr_t)a[5],
        .k_pages = (const char *)(intptr_t)a[6],
        .v_pages = (const char *)(intptr_t)a[7],
        .slot_position = (const int32_t *)(intptr_t)a[10],
        .slot_expiry = (const int32_t *)(intptr_t)a[11],
        .page_table = (const int32_t *)(intptr_t)a[12],
        .length = (const int32_t *)(intptr_t)a[13],
        .batch = a[14], .heads = a[15], .kv_heads = a[16], .tokens = a[17],
        .head_dim = a[18], .page_size = a[19], .pages_per_row = a[20],
        .dtype = (int)a[30],
        .page_dtype = (int)a[31],
    };
    read_steps(a + 21, job.dtype, job.query_step);
    read_steps(a + 24, job.dtype, job.key_step);
    read_steps(a + 27, job.dtype, job.value_step);
    return job;
}

PyDoc_STRVAR(attend_doc,
"paged_attention(query, key, value, out, position, expiry, k_pages, v_pages, k_scale, v_scale,\n"
"slot_position, slot_expiry, page_table, length, B, Hq, H, N, D, S, M, *query_strides, *key_strides,\n"
"*value_strides, dtype, page_dtype, threads, scale)\n\n"
"Tensors are addresses, strides are counted in elements over (B, heads, N), dtypes are 0 float32,\n"
"1 bfloat16, 2 float16. k_scale and v_scale, one float32 per slot, are for quantised pages to come\n"
"and must be 0.\n"
"Addresses and shapes are trusted: octavo.attention.native checks them.");

static PyObject *py_paged_attention(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count != INTEGERS + 1) {
        PyErr_Format(PyExc_TypeError, "paged_attention takes %d arguments, not %zd", INTEGERS + 1, count);
        return NULL;
    }
    long long a[INTEGERS];
    for (int i = 0; i < INTEGERS; i++) a[i] = PyLong_AsLongLong(args[i]);
    double scale = PyFloat_AsDouble(args[INTEGERS]);
    if (PyErr_Occurred()) return NULL;
    bool known = a[30] >= 0 && a[30] < DTYPES && a[31] >= 0 && a[31] < DTYPES;
    if (a[8] || a[9] || !known || a[16] < 1 || a[19] < 1) {
        PyErr_SetString(PyExc_ValueError,
                        "paged_attention: scales must be 0, dtypes 0 to 2, H and S at least 1");
        return NULL;
    }
    Job job = job_from(a);
    job.scale = (float)scale;
    int threads = (int)larger(1, smaller(a[32], MOST_THREADS));
    bool enough;
    Py_BEGIN_ALLOW_THREADS
    enough = attend(&job, threads);
    Py_END_ALLOW_THREADS
    if (!enough) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_isa(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    return PyUnicode_FromString(KERNELS[atomic_load(&chosen)]->name);
}

static PyObject *py_set_isa(PyObject *module, PyObject *name) {
    (void)module;
    for (int isa = 0; isa < ISAS; isa++)
        if (supported(isa) && PyUnicode_Check(name) &&
            !PyUnicode_CompareWithASCIIString(name, KERNELS[isa]->name)) {
            atomic_store(&chosen, isa);
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set %R", name);
}

static PyObject *py_set_chunk_work(PyObject *module, PyObject *work) {
    (void)module;
    long long least = PyLong_AsLongLong(work);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromLongLong(atomic_exchange(&chunk_work, larger(1, least)));
}

static PyMethodDef methods[] = {
    {"paged_attention", (PyCFunction)(void (*)(void))py_paged_attention, METH_FASTCALL, attend_doc},
    {"isa", py_isa, METH_NOARGS, "isa() -> the instruction set in use: scalar, avx2 or avx512."},
    {"set_isa", py_set_isa, METH_O, "set_isa(name): use another instruction set, for tests."},
    {"set_chunk_work", py_set_chunk_work, METH_O,
     "set_chunk_work(n) -> the former: least multiply-adds per chunk, small in tests so that rows are cut."},
    {NULL, NULL, 0, NULL},
};

static int prepare(PyObject *module) {
    (void)module;
    find_threads();
    for (int isa = 0; isa < ISAS; isa++)
        if (supported(isa)) atomic_store(&chosen, isa);
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "Attention over ragged pages on the CPU.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }

#else /* LANES: floats in a vector. VALUES: vectors of values that `gather` sums at a time. */

#define V NAME(Floats)
#define U NAME(Words)
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(Halves) __attribute__((vector_size(2 * LANES)));

INLINE V NAME(splat)(float x) { return x - (V){0}; }

INLINE V NAME(load)(const char *from, int64_t element, const int dtype) {
    V x;
    if (dtype == FLOAT32) {
        memcpy(&x, from + 4 * element, sizeof x);
        return x;
    }
    NAME(Halves) halves;
    memcpy(&halves, from + 2 * element, sizeof halves);
#if LANES == 16 /* intrinsics, because gcc widens vectors by halves */
    if (dtype == BFLOAT16) return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
    return (V)_mm512_cvtph_ps((__m256i)halves);
#elif LANES == 8
    if (dtype == BFLOAT16) return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)halves), 16);
    return (V)_mm256_cvtph_ps((__m128i)halves);
#else
    if (dtype == BFLOAT16) return (V)(__builtin_convertvector(halves, U) << 16);
    for (int i = 0; i < LANES; i++) x[i] = from_half(halves[i]);
    return x;
#endif
}

INLINE void NAME(prefetch)(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* exp(x) for x <= 0, relative error below 2e-7; 0 below -87, where a float's exponent ends. */
INLINE V NAME(exponential)(V x) {
    V n = x * 0x1.715476p+0f + 0x1.8p23f; /* x / ln 2, rounded by the addition, an integer in the low bits */
    U bits = (U)n;
    n -= 0x1.8p23f;
    V r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f; /* ln 2 in two parts */
    V series = r * (1.f / 5040) + 1.f / 720;
    series = series * r + 1.f / 120;
    series = series * r + 1.f / 24;
    series = series * r + 1.f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.f;
    series = series * r + 1.f;
    V power = (V)((bits + 127) << 23);
    return (V)((U)(series * power) & (U)(x >= NAME(splat)(-87.f)));
}

/* Lane l of a fold holds lanes l and l ^ w of a, or of b where l has bit w. Folding LANES vectors in
   pairs, with w = 1, 2, 4..., leaves the sum of vector l in lane l. */
#define KEPT(l, w) ((l) & (w) ? LANES + (l) : (l))
#define ADDED(l, w) ((l) & (w) ? LANES + ((l) ^ (w)) : ((l) ^ (w)))
#define FOLD(a, b, w) \
    (__builtin_shufflevector(a, b, EACH_LANE(KEPT, w)) + __builtin_shufflevector(a, b, EACH_LANE(ADDED, w)))

INLINE V NAME(sums)(const V *v) {
    V two[LANES / 2], four[LANES / 4];
    _Pragma("GCC unroll 8") for (int i = 0; i < LANES / 2; i++) two[i] = FOLD(v[2 * i], v[2 * i + 1], 1);
    _Pragma("GCC unroll 4") for (int i = 0; i < LANES / 4; i++) four[i] = FOLD(two[2 * i], two[2 * i + 1], 2);
#if LANES == 16
    return FOLD(FOLD(four[0], four[1], 4), FOLD(four[2], four[3], 4), 8);
#elif LANES == 8
    return FOLD(four[0], four[1], 4);
#else
    return four[0];
#endif
}

INLINE V NAME(larger)(V a, V b) {
    U first = (U)(a > b);
    return (V)(((U)a & first) | ((U)b & ~first));
}

#define CROSSED(l, w) ((l) ^ (w))
#define CROSS(v, w) __builtin_shufflevector(v, v, EACH_LANE(CROSSED, w))

INLINE float NAME(highest)(V v) {
    v = NAME(larger)(v, CROSS(v, 1));
    v = NAME(larger)(v, CROSS(v, 2));
#if LANES > 4
    v = NAME(larger)(v, CROSS(v, 4));
#endif
#if LANES > 8
    v = NAME(larger)(v, CROSS(v, 8));
#endif
    return v[0];
}

INLINE float NAME(total)(V v) {
    v += CROSS(v, 1);
    v += CROSS(v, 2);
#if LANES > 4
    v += CROSS(v, 4);
#endif
#if LANES > 8
    v += CROSS(v, 8);
#endif
    return v[0];
}

INLINE void NAME(score_some)(const Tile *tile, const Tile *next, const float *query, int dim, float *scores,
                             const int dtype, const int queries) {
    V partial[4][LANES];
    int64_t size = (int64_t)dim * SIZE_OF[next->dtype];
    for (int first = 0; first < tile->count; first += LANES) {
        for (int i = 0; i < LANES; i += 2) {
            const char *key = tile->key[first + i], *other = tile->key[first + i + 1];
            NAME(prefetch)(next->key[first + i], size);
            NAME(prefetch)(next->key[first + i + 1], size);
            V even[4] = {{0}}, odd[4] = {{0}};
            for (int d = 0; d < dim; d += LANES) {
                V k = NAME(load)(key, d, dtype), k_other = NAME(load)(other, d, dtype);
                _Pragma("GCC unroll 4") for (int r = 0; r < queries; r++) {
                    V q = NAME(load)((const char *)(query + r * (int64_t)dim), d, FLOAT32);
                    even[r] += q * k;
                    odd[r] += q * k_other;
                }
            }
            _Pragma("GCC unroll 4") for (int r = 0; r < queries; r++) {
                partial[r][i] = even[r];
                partial[r][i + 1] = odd[r];
            }
        }
        for (int r = 0; r < queries; r++) {
            V sums = NAME(sums)(partial[r]);
            memcpy(scores + r * TILE + first, &sums, sizeof sums);
        }
    }
}

INLINE void NAME(gather_some)(const Tile *tile, const Tile *next, const float *weights, const float *decay,
                              int dim, int d, float *acc, const int dtype, const int queries,
                              const int vectors) {
    V sum[4][VALUES];
    _Pragma("GCC unroll 4") for (int r = 0; r < queries; r++)
        _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++)
            sum[r][j] = NAME(load)((const char *)(acc + r * (int64_t)dim), d + j * LANES, FLOAT32) * decay[r];
    int64_t size = (int64_t)vectors * LANES * SIZE_OF[next->dtype];
    for (int i = 0; i < tile->count; i++) {
        NAME(prefetch)(next->value[i] + d * SIZE_OF[next->dtype], size);
        V value[VALUES];
        _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++)
            value[j] = NAME(load)(tile->value[i], d + j * LANES, dtype);
        _Pragma("GCC unroll 4") for (int r = 0; r < queries; r++) {
            V weight = NAME(splat)(weights[r * TILE + i]);
            _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++) sum[r][j] += weight * value[j];
        }
    }
    _Pragma("GCC unroll 4") for (int r = 0; r < queries; r++)
        _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++)
            memcpy(acc + r * (int64_t)dim + d + j * LANES, &sum[r][j], sizeof(V));
}

INLINE void NAME(gather_rows)(const Tile *tile, const Tile *next, const float *weights, const float *decay,
                              int dim, float *acc, const int dtype, const int queries) {
    int d = 0;
    for (; d + VALUES * LANES <= dim; d += VALUES * LANES)
        NAME(gather_some)(tile, next, weights, decay, dim, d, acc, dtype, queries, VALUES);
    for (; d < dim; d += LANES)
        NAME(gather_some)(tile, next, weights, decay, dim, d, acc, dtype, queries, 1);
}

/* Storage and number of queries are constants inside the kernels: their sums then stay in registers. */
#define WITH_QUERIES(kernel, queries, ...)                \
    switch (queries) {                                    \
    case 1: kernel(__VA_ARGS__, 1); break;                \
    case 2: kernel(__VA_ARGS__, 2); break;                \
    case 3: kernel(__VA_ARGS__, 3); break;                \
    default: kernel(__VA_ARGS__, 4); break;               \
    }
#define SPECIALISED(kernel, dtype, queries, ...)                                \
    if (dtype == FLOAT32) WITH_QUERIES(kernel, queries, __VA_ARGS__, FLOAT32)   \
    else if (dtype == BFLOAT16) WITH_QUERIES(kernel, queries, __VA_ARGS__, BFLOAT16) \
    else WITH_QUERIES(kernel, queries, __VA_ARGS__, FLOAT16)

TARGET static void NAME(score)(const Tile *tile, const Tile *next, const float *query, int queries, int dim,
                               float *scores) {
    for (int r = 0; r < queries; r += 4) {
        const float *some = query + (int64_t)r * dim;
        SPECIALISED(NAME(score_some), tile->dtype, queries - r, tile, next, some, dim, scores + r * TILE)
    }
}

TARGET static void NAME(gather)(const Tile *tile, const Tile *next, const float *weights, const float *decay,
                                int queries, int dim, float *acc) {
    for (int r = 0; r < queries; r += 4) {
        float *some = acc + (int64_t)r * dim;
        const float *theirs = weights + r * TILE;
        SPECIALISED(NAME(gather_rows), tile->dtype, queries - r, tile, next, theirs, decay + r, dim, some)
    }
}

/* Scores become weights, exp(score - top); what was summed before is to be multiplied by `decay`. */
TARGET static void NAME(weigh)(const Tile *tile, const int32_t *at, int queries, float *scores, float *top,
                               float *sum, float *decay) {
    int padded = (tile->count + LANES - 1) / LANES * LANES;
    for (int r = 0; r < queries; r++, scores += TILE) {
        for (int i = tile->count; i < padded; i++) scores[i] = -INFINITY;
        if (tile->masked)
            for (int i = 0; i < tile->count; i++)
                scores[i] = tile->position[i] <= at[r] && at[r] <= tile->expiry[i] ? scores[i] : -INFINITY;
        V most = NAME(splat)(-INFINITY), all = {0};
        for (int i = 0; i < padded; i += LANES) {
            V s = NAME(load)((const char *)scores, i, FLOAT32);
            most = NAME(larger)(s, most);
        }
        float old = top[r], highest = NAME(highest)(most);
        top[r] = highest > old ? highest : old;
        V base = NAME(splat)(top[r] == -INFINITY ? 0 : top[r]); /* weights are 0 until a slot is seen */
        for (int i = 0; i < padded; i += LANES) {
            V weight = NAME(exponential)(NAME(load)((const char *)scores, i, FLOAT32) - base);
            memcpy(scores + i, &weight, sizeof weight);
            all += weight;
        }
        decay[r] = top[r] == old ? 1 : NAME(exponential)(NAME(splat)(old) - base)[0];
        sum[r] = sum[r] * decay[r] + NAME(total)(all);
    }
}

static const Kernels NAME(kernels) = {TEXT(ISA), NAME(score), NAME(weigh), NAME(gather)};

#undef LANES
#undef VALUES
#undef TARGET
#undef ISA
#undef EACH_LANE
#undef V
#undef U
#undef INLINE
#undef KEPT
#undef ADDED
#undef FOLD
#undef CROSSED
#undef CROSS
#undef WITH_QUERIES
#undef SPECIALISED
#endif
