/* Attention of few queries over ragged pages on the CPU: the operation that reference.py defines, made for decoding.

   A row is one (sequence, KV head): its slots in the pages, then the chunk's tokens, where there is a chunk. A row's
   `queries` are all that read it, token by token, the heads of its group beside each other. The slots that some
   query sees are gathered, as pointers, into tiles; a tile is scored, weighted and summed for every query before the
   next one, so that each key and value is read from memory once. Keys and values of pages that hold codes are widened
   as they are, and the slot's scale multiplies its score and its weight. */
#define _GNU_SOURCE 1 /* RTLD_DEFAULT */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "job.h"
#include "threads.h"

enum {
    TILE = 64,         /* slots scored together; a multiple of every LANES */
    BLOCK = 64,        /* queries per pass over the slots, so that their state stays in cache */
    WIDEST = 16,       /* floats in the widest vector; head_dim is padded to a multiple of it */
    SHARE = 4,         /* chunks per thread: one that starts late or runs slow takes fewer */
};
/* Multiply-adds that are worth a chunk of their own: about 4 us, against some 2 us to call a thread. */
static _Atomic int64_t chunk_work = 200000;

typedef struct {
    const char *key[TILE], *value[TILE];
    int32_t position[TILE], expiry[TILE];
    float key_scale[TILE], value_scale[TILE]; /* where `scaled` */
    int64_t count;
    int dtype;
    bool masked; /* some query of the block does not see some slot of the tile */
    bool scaled; /* the slots hold codes */
} Tile;

typedef struct {
    const char *name;
    void (*score)(const Tile *, const Tile *next, const float *query, int queries, int dim, float *scores);
    void (*weigh)(const Tile *, const int32_t *at, int queries, float softcap, float *scores, float *top, float *sum,
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
    const Asked *asked;
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

/* e4m3 has half precision's layout with a shorter exponent: moved into its place, it is 2^-8 of its value, for which
   `fill_tile` makes up in the slot's scale. NaN, whose bits are all ones, becomes a number; pages hold none. */
static float from_float8(uint8_t byte) { return from_half((uint16_t)((byte & 0x80) << 8 | (byte & 0x7f) << 7)); }

static float element_of(const char *from, int dtype, int64_t i) {
    switch (dtype) {
    case FLOAT32: return ((const float *)from)[i];
    case BFLOAT16: return float_of((uint32_t)((const uint16_t *)from)[i] << 16);
    case FLOAT16: return from_half(((const uint16_t *)from)[i]);
    case INT8: return ((const int8_t *)from)[i];
    default: return from_float8(((const uint8_t *)from)[i]);
    }
}

static void widen(const char *from, int dtype, int64_t n, int64_t padded, float scale, float *to) {
    for (int64_t i = 0; i < n; i++) to[i] = element_of(from, dtype, i) * scale;
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
#define TOGETHER 2
#define VALUES 2
#define TARGET
#define ISA scalar
#define EACH_LANE(F, w) F(0, w), F(1, w), F(2, w), F(3, w)
#include "decode_kernels.h"

#if defined(__x86_64__)
#define LANES 8
#define TOGETHER 2
#define VALUES 2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define ISA avx2
#define EACH_LANE(F, w) F(0, w), F(1, w), F(2, w), F(3, w), F(4, w), F(5, w), F(6, w), F(7, w)
#include "decode_kernels.h"

#define LANES 16
#define TOGETHER 4
#define VALUES 4
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define ISA avx512
#define EACH_LANE(F, w)                                                                             \
    F(0, w), F(1, w), F(2, w), F(3, w), F(4, w), F(5, w), F(6, w), F(7, w), F(8, w), F(9, w),       \
        F(10, w), F(11, w), F(12, w), F(13, w), F(14, w), F(15, w)
#include "decode_kernels.h"
#endif

static const Kernels *const KERNELS[] = {
    &kernels_scalar,
#if defined(__x86_64__)
    &kernels_avx2, &kernels_avx512,
#endif
};
enum { ISAS = sizeof KERNELS / sizeof *KERNELS };
static _Atomic int chosen;

/* The TARGETs above, asked of the processor: an instruction that it lacks would end the process. The wider set asks for
   all of the narrower one, of which compilers may use what they like. */
bool decode_has(int isa) {
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    __builtin_cpu_init();
    if (isa == 1) /* older compilers do not know f16c by name */
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
               c >> 29 & 1;
    if (isa == 2)
        return decode_has(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == 0;
}

static void load_queries(const Job *job, int64_t row, int64_t first, int n, Scratch *s) {
    const Asked *a = job->asked;
    int64_t b = row / a->kv_heads, h = row % a->kv_heads;
    s->oldest = INT32_MAX;
    s->newest = -1;
    for (int r = 0; r < n; r++) {
        int64_t token = (first + r) / job->group, head = h * job->group + (first + r) % job->group;
        const char *from =
            a->query + b * a->query_step[0] + head * a->query_step[1] + token * a->query_step[2];
        widen(from, a->dtype, a->head_dim, job->dim, job->scale, s->query + (int64_t)r * job->dim);
        int32_t at = s->at[r] = a->at[b * a->queries + token];
        if (at < s->oldest) s->oldest = at;
        if (at > s->newest) s->newest = at;
    }
}

/* A run of neighbouring slots: of one page, or of the chunk's tokens. */
typedef struct {
    const char *key, *value;
    const float *key_scale, *value_scale; /* NULL where slots hold floats */
    const int32_t *position, *expiry;
    int64_t key_step, value_step, slots;
    int dtype;
} Run;

static Run run_at(const Asked *a, int64_t row, int64_t used, int64_t at) {
    if (at >= used) {
        int64_t b = row / a->kv_heads, h = row % a->kv_heads, n = at - used;
        return (Run){
            .key = a->key + b * a->key_step[0] + h * a->key_step[1] + n * a->key_step[2],
            .value = a->value + b * a->value_step[0] + h * a->value_step[1] + n * a->value_step[2],
            .position = a->position + b * a->tokens + n, .expiry = a->expiry + row * a->tokens + n,
            .key_step = a->key_step[2], .value_step = a->value_step[2], .slots = a->tokens - n,
            .dtype = a->dtype,
        };
    }
    int64_t inside = at % a->page_size, step = a->head_dim * SIZE_OF[a->page_dtype];
    Page page = page_of(a, row, at / a->page_size);
    return (Run){
        .key = page.key + inside * step, .value = page.value + inside * step,
        .key_scale = page.key_scale ? page.key_scale + inside : NULL,
        .value_scale = page.value_scale ? page.value_scale + inside : NULL,
        .position = page.position + inside, .expiry = page.expiry + inside,
        .key_step = step, .value_step = step, .slots = smaller(a->page_size - inside, used - at),
        .dtype = a->page_dtype,
    };
}

/* The kernels read whole vectors of padded head_dim; a slot of another size is copied out for them. */
static void widen_tile(const Job *job, Tile *tile, float *room) {
    int64_t head_dim = job->asked->head_dim;
    for (int64_t i = 0; i < tile->count; i++, room += 2 * job->dim) {
        widen(tile->key[i], tile->dtype, head_dim, job->dim, 1, room);
        widen(tile->value[i], tile->dtype, head_dim, job->dim, 1, room + job->dim);
        tile->key[i] = (char *)room;
        tile->value[i] = (char *)(room + job->dim);
    }
    tile->dtype = FLOAT32;
}

/* Adds those slots of a run that some query may see; returns the new count. Indices have 64 bits here and in the
   kernels: Python's own flags hold -fwrapv, under which loops over `int` are not turned into vectors. */
static int64_t add_slots(Tile *tile, Run run, int64_t slots, int32_t oldest, int32_t newest) {
    int64_t n = tile->count;
    int hidden = 0;
    for (int64_t i = 0; i < slots; i++)
        hidden += (run.position[i] < 0) | (run.position[i] > newest) | (run.expiry[i] < oldest);
    if (!hidden) { /* mostly; with so much less to do for each slot that it shows in the whole */
        memcpy(tile->position + n, run.position, sizeof(int32_t) * (size_t)slots);
        memcpy(tile->expiry + n, run.expiry, sizeof(int32_t) * (size_t)slots);
        if (run.key_scale) {
            memcpy(tile->key_scale + n, run.key_scale, sizeof(float) * (size_t)slots);
            memcpy(tile->value_scale + n, run.value_scale, sizeof(float) * (size_t)slots);
        }
        for (int64_t i = 0; i < slots; i++) {
            tile->key[n + i] = run.key + i * run.key_step;
            tile->value[n + i] = run.value + i * run.value_step;
        }
        return n + slots;
    }
    for (int64_t i = 0; i < slots; i++) { /* without a branch on what is seen: expiries come in no order */
        tile->key[n] = run.key + i * run.key_step;
        tile->value[n] = run.value + i * run.value_step;
        tile->position[n] = run.position[i];
        tile->expiry[n] = run.expiry[i];
        if (run.key_scale) {
            tile->key_scale[n] = run.key_scale[i];
            tile->value_scale[n] = run.value_scale[i];
        }
        n += (run.position[i] >= 0) & (run.position[i] <= newest) & (run.expiry[i] >= oldest);
    }
    return n;
}

/* What fills a tile is needed before the keys and values of its slots, so it is fetched two tiles early: read from
   memory without that, the scales alone took more time than codes save. */
static void prefetch_slots(const Asked *a, int64_t row, int64_t used, int64_t at) {
    if (at >= used) return;
    Page page = page_of(a, row, at / a->page_size);
    int64_t inside = at % a->page_size;
    __builtin_prefetch(page.position + inside);
    __builtin_prefetch(page.expiry + inside);
    if (!page.key_scale) return;
    __builtin_prefetch(page.key_scale + inside);
    __builtin_prefetch(page.value_scale + inside);
}

/* Fills a tile with the next slots before `last` that some query may see; returns where to go on. */
static int64_t fill_tile(const Job *job, int64_t row, int64_t at, int64_t last, Scratch *s, int which) {
    Tile *tile = &s->tile[which];
    int64_t used = slots_of(job->asked, row);
    tile->count = 0;
    while (at < last && tile->count < TILE) {
        Run run = run_at(job->asked, row, used, at);
        if (tile->count && run.dtype != tile->dtype) break;
        prefetch_slots(job->asked, row, used, at + 2 * TILE);
        tile->dtype = run.dtype;
        tile->scaled = run.key_scale != NULL;
        int64_t slots = smaller(smaller(run.slots, last - at), TILE - tile->count);
        tile->count = add_slots(tile, run, slots, s->oldest, s->newest);
        at += slots;
    }
    int64_t n = tile->count;
    if (n && tile->dtype == FLOAT8) /* see from_float8 */
        for (int64_t i = 0; i < n; i++) tile->key_scale[i] *= 256, tile->value_scale[i] *= 256;
    tile->masked = false;
    if (s->oldest < s->newest)
        for (int64_t i = 0; i < n; i++)
            tile->masked |= tile->position[i] > s->oldest || tile->expiry[i] < s->newest;
    if (n && job->dim != job->asked->head_dim)
        widen_tile(job, tile, s->widened + (int64_t)which * 2 * TILE * job->dim);
    for (int64_t i = n; n && i < TILE; i++) { /* scoring works on whole vectors of slots */
        tile->key[i] = tile->key[0];
        tile->value[i] = tile->value[0];
        tile->key_scale[i] = tile->value_scale[i] = 0;
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
            job->kernels->weigh(tile, s->at, n, (float)job->asked->softcap, s->scores, top, sum, s->decay);
            job->kernels->gather(tile, next, s->scores, s->decay, n, job->dim, acc);
        }
    }
}

static void write_row(const Job *job, int64_t row, State state) {
    const Asked *a = job->asked;
    int64_t b = row / a->kv_heads, h = row % a->kv_heads, size = a->head_dim * SIZE_OF[a->dtype];
    for (int64_t r = 0; r < job->queries; r++) {
        int64_t token = r / job->group, head = h * job->group + r % job->group;
        float sum = state.sum[r], scale = 0; /* a padded query has seen nothing */
        if (sum > 0) scale = 1 / (sum + (a->sinks ? expf(a->sinks[head] - state.top[r]) : 0));
        narrow(state.acc + r * job->dim, scale, a->head_dim, a->dtype,
               a->out + ((b * a->queries + token) * a->heads + head) * size);
    }
}

/* Rows without slots are in no chunk: their queries see nothing. */
static void clear_empty_rows(const Job *job) {
    const Asked *a = job->asked;
    size_t size = (size_t)(job->group * a->head_dim * SIZE_OF[a->dtype]);
    for (int64_t row = 0; row < job->rows; row++) {
        if (job->start[row] < job->start[row + 1]) continue;
        int64_t b = row / a->kv_heads, h = row % a->kv_heads;
        for (int64_t token = 0; token < a->queries; token++)
            memset(a->out + ((b * a->queries + token) * a->kv_heads + h) * (int64_t)size, 0, size);
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
        job->start[row + 1] = job->start[row] + slots_of(job->asked, row) + job->asked->tokens;
    double work = (double)job->start[job->rows] * (double)job->dim * (double)(2 * job->queries + 2);
    int most = threads == 1 ? 1 : (int)smaller(threads * SHARE, job->start[job->rows]);
    job->chunks = (int)larger(1, smaller(most, (int64_t)(work / (double)atomic_load(&chunk_work))));
    job->threads = (int)smaller(threads, job->chunks);
}

static bool allocate(Job *job) {
    size_t dim = (size_t)job->dim, state = state_floats(job) * sizeof(float);
    size_t query = aligned(BLOCK * dim * sizeof(float)), scores = BLOCK * TILE * sizeof(float);
    size_t widened = job->dim == job->asked->head_dim ? 0 : 4 * TILE * dim * sizeof(float);
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

bool decode_attend(const Asked *asked) {
    Job whole = {.asked = asked, .scale = (float)asked->scale}, *job = &whole;
    job->rows = asked->batch * asked->kv_heads;
    job->group = asked->heads / asked->kv_heads;
    job->queries = job->group * asked->queries;
    job->dim = (int)divided(asked->head_dim, WIDEST) * WIDEST;
    job->kernels = KERNELS[atomic_load(&chosen)];
    if (!job->rows || !job->queries) return true;
    job->start = malloc(sizeof(int64_t) * (size_t)(job->rows + 1));
    if (!job->start) return false;
    plan(job, asked->threads);
    bool enough = allocate(job);
    if (enough) {
        on_threads(take_chunks, job, job->threads);
        join_cut_rows(job);
        clear_empty_rows(job);
        free(job->memory);
    }
    free(job->start);
    return enough;
}

const char *decode_isa(void) { return KERNELS[atomic_load(&chosen)]->name; }

bool decode_choose(const char *name) {
    for (int isa = 0; isa < ISAS; isa++)
        if (decode_has(isa) && !strcmp(name, KERNELS[isa]->name)) {
            atomic_store(&chosen, isa);
            return true;
        }
    return false;
}

int64_t decode_set_chunk_work(int64_t least) { return atomic_exchange(&chunk_work, least); }

void decode_prepare(void) {
    find_threads();
    for (int isa = 0; isa < ISAS; isa++)
        if (decode_has(isa)) atomic_store(&chosen, isa);
}
