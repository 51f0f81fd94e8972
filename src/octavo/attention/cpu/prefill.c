/* Attention of a chunk of new tokens over ragged pages, in bfloat16 on AMX: `reference.attend`,
   made for prefill.

   A row is one (sequence, KV head): its slots in the pages, then the chunk's tokens. It goes through three
   stages, each shared among the threads:
   1. plan:   the slots that some query of the chunk sees are put into an order in which most strips of
              STRIP slots are seen by every query, or by none, of a block of queries;
   2. pack:   their keys and values are copied into the layouts that AMX multiplies by;
   3. attend: a block of queries passes over the strips that it sees, GROUP at a time, with a running
              softmax. Queries are taken token by token, the heads of a group beside each other, so that
              all of them share one pass.

   Tile products and vector instructions run on different units of a core, but too far apart in the code
   to overlap by themselves. So the softmax of one step carries with it, a little per query, the products
   of the step before (weights by values) and of the step after (queries by keys): see `attend_block`. */
#define _GNU_SOURCE 1 /* RTLD_DEFAULT, syscall */
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
/* Older compilers lack the instructions; then torch does this work. */
#if defined(__x86_64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "job.h"
#include "threads.h"

enum {
    EDGE = 16,         /* rows of a tile, and floats or pairs of bfloat16 in each of them */
    TILE = EDGE * 64,  /* bytes of a tile */
    STRIP = 2 * EDGE,  /* slots that are packed together: what one product with the values takes in */
    GROUP = 4,         /* strips per step of the running softmax */
    PAIR = 2 * EDGE,   /* queries of a step */
    BLOCK = 2 * PAIR,  /* queries of a task; each group of strips is fetched once for all of them */
    PIECE = 8,         /* strips that are packed as one task */
    BUCKETS = 64,      /* by which slots are ordered */
    STAGES = 3,
};

typedef struct {
    int64_t source; /* which slot of the row; -1 - n for token n of the chunk */
    int32_t position, expiry;
} Slot;

/* What a strip's slots have in common, so that most queries need not look at each slot. */
typedef struct {
    int32_t first, last;      /* least and greatest position */
    int32_t earliest, latest; /* least and greatest expiry */
} Range;

typedef struct {
    int64_t slots, strips;
    Slot *found, *slot;         /* [slots] that some query sees, as they come and in order */
    int32_t *position, *expiry; /* [strips * STRIP] */
    Range *range;               /* [strips] */
    char *keys, *values;        /* [strips, head_dim / 16 tiles] */
    _Atomic int64_t taken[STAGES], done[STAGES]; /* tasks */
} Row;

/* A step of the running softmax: PAIR queries by up to GROUP strips. */
typedef struct {
    int pair, strips;
    bool first; /* of its queries: nothing has been summed yet */
    const int64_t *strip;
    uint32_t decayed[2]; /* the queries of each tile whose earlier sums are to be multiplied by `decay` */
    float decay[PAIR];
} Step;

/* What one thread needs: the struct, then what it points to. */
typedef struct {
    int32_t at[BLOCK]; /* positions of the block's queries */
    int32_t oldest, newest;
    float top[BLOCK];       /* in units of log 2 */
    float sum[BLOCK][EDGE]; /* of weights, by lane */
    char *query;            /* [BLOCK / 16, head_dim / 32] tiles */
    float *acc;             /* [BLOCK / 16, head_dim / 16] tiles */
    float *scores[2];       /* [2, 2 * GROUP] tiles, of this step and the next */
    char *weights[2];       /* [2, GROUP] tiles, of this step and the one before */
    int64_t *strip;         /* those that the block sees */
} Scratch;

typedef struct Job Job;
typedef void Task(const Job *, Scratch *, int64_t row, int64_t task);

struct Job {
    const Asked *asked;
    float scale;   /* to units of log 2 */
    float cap;     /* where scores are capped, in units of products of queries and keys; 0: nowhere */
    bool negative; /* scores are to be turned around */

    int64_t rows, group, queries, blocks;
    Row *row;
    char *scratch; /* [threads], scratch_size bytes each */
    size_t scratch_size;
    int threads;
    _Atomic int joined; /* threads so far */
};

/* The positions of queries [from, to) that are no padding; `oldest` > `newest` if all are. */
static void span(const Asked *a, int64_t b, int64_t from, int64_t to, int32_t *oldest, int32_t *newest) {
    const int32_t *position = a->at + b * a->queries;
    *oldest = INT32_MAX;
    *newest = -1;
    for (int64_t n = from; n < to; n++) {
        if (position[n] < 0) continue;
        if (position[n] < *oldest) *oldest = position[n];
        if (position[n] > *newest) *newest = position[n];
    }
}

/* Adds those slots of a run of neighbours that some query sees. */
static void find_slots(Row *row, const int32_t *position, const int32_t *expiry, int64_t count,
                       int64_t source, int64_t step, int32_t oldest, int32_t newest) {
    int64_t n = row->slots;
    for (int64_t i = 0; i < count; i++) { /* without a branch on what is seen: expiries come in no order */
        row->found[n] = (Slot){source + i * step, position[i], expiry[i]};
        n += (position[i] >= 0) & (position[i] <= newest) & (expiry[i] >= oldest);
    }
    row->slots = n;
}

/* Slots that last through the chunk come first, then the others by expiry, so that those that have
   expired, and those that are yet to come, fill whole strips. Rough order will do: masks are exact. */
static void order_slots(Row *row, int32_t oldest, int32_t newest) {
    int64_t start[BUCKETS + 1] = {0};
    float factor = (BUCKETS - 1) / ((float)newest - (float)oldest + 1);
#define BUCKET(s) ((s).expiry >= newest ? 0 : 1 + (int)(((float)(s).expiry - (float)oldest) * factor))
    for (int64_t i = 0; i < row->slots; i++) start[smaller(BUCKET(row->found[i]), BUCKETS - 1) + 1]++;
    for (int bucket = 0; bucket < BUCKETS; bucket++) start[bucket + 1] += start[bucket];
    for (int64_t i = 0; i < row->slots; i++)
        row->slot[start[smaller(BUCKET(row->found[i]), BUCKETS - 1)]++] = row->found[i];
#undef BUCKET
}

static void plan_row(const Job *job, Scratch *s, int64_t r, int64_t task) {
    (void)s, (void)task;
    const Asked *a = job->asked;
    Row *row = &job->row[r];
    int32_t oldest, newest;
    int64_t used = slots_of(a, r);
    row->slots = 0;
    span(a, r / a->kv_heads, 0, a->queries, &oldest, &newest);
    for (int64_t at = 0; at < used; at += a->page_size) {
        Page page = page_of(a, r, at / a->page_size);
        find_slots(row, page.position, page.expiry, smaller(a->page_size, used - at), at, 1, oldest, newest);
    }
    find_slots(row, a->position + r / a->kv_heads * a->tokens, a->expiry + r * a->tokens, a->tokens, -1, -1,
               oldest, newest);
    order_slots(row, oldest, newest);
    row->strips = divided(row->slots, STRIP);
}

#ifdef HAS_AMX
#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
/* gcc takes tile loads for instructions that read no memory, and would move stores past them. */
#define SETTLE_MEMORY() __asm__ volatile("" ::: "memory")

INLINE void transpose(const char *const *from, int64_t offset, char *to) {
    __m512i a[EDGE], b[EDGE];
    EACH(i, EDGE) a[i] = _mm512_loadu_si512(from[i] + offset);
    EACH(i, EDGE / 2) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    EACH(i, EDGE / 4) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    EACH(i, 4) EACH(j, 2) {
        b[8 * j + i] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + 4 + i], 0x88);
        b[8 * j + 4 + i] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + 4 + i], 0xdd);
    }
    EACH(i, EDGE / 2) {
        _mm512_storeu_si512(to + 64 * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + 64 * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}

/* Tile rows hold a pair of dimensions of sixteen keys; two tiles for every 32 dimensions. */
TARGET static void pack_keys(const char *const *key, int64_t head_dim, char *to) {
    for (int64_t d = 0; d < head_dim; d += 2 * EDGE, to += 2 * TILE) {
        transpose(key, 2 * d, to);
        transpose(key + EDGE, 2 * d, to + TILE);
    }
}

/* Tile rows hold sixteen dimensions of a pair of values; a tile for every 16 dimensions. */
TARGET static void pack_values(const char *const *value, int64_t head_dim, char *to) {
    for (int64_t d = 0; d < head_dim; d += EDGE, to += TILE)
        EACH(i, EDGE) {
            __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(value[2 * i] + 2 * d)));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(value[2 * i + 1] + 2 * d)));
            _mm512_storeu_si512(to + 64 * i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

static Range range_of(const Slot *slot, int slots) {
    Range range = {INT32_MAX, -1, INT32_MAX, -1};
    for (int i = 0; i < slots; i++) {
        if (slot[i].position < range.first) range.first = slot[i].position;
        if (slot[i].position > range.last) range.last = slot[i].position;
        if (slot[i].expiry < range.earliest) range.earliest = slot[i].expiry;
        if (slot[i].expiry > range.latest) range.latest = slot[i].expiry;
    }
    if (slots < STRIP) range.earliest = -1; /* the missing ones are hidden by a mask */
    return range;
}

static const char NOTHING[512]; /* the key and the value of a missing slot */

/* bfloat16 of one key or value that is stored as codes: 16 at a time, rounded to nearest. */
TARGET static void decoded(const char *code, float scale, int dtype, int64_t n, char *to) {
    __m512 factor = _mm512_set1_ps(dtype == FLOAT8 ? scale * 256 : scale);
    for (int64_t d = 0; d < n; d += EDGE) {
        __m128i bytes = _mm_loadu_si128((const void *)(code + d));
        __m512 wide;
        if (dtype == INT8) wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        else { /* e4m3 is half precision with a shorter exponent: moved into place, it is 2^-8 of its value */
            __m256i words = _mm256_cvtepi8_epi16(bytes);
            __m256i sign = _mm256_and_si256(words, _mm256_set1_epi16((short)0x8000));
            __m256i rest = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(0x3f80));
            wide = _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
        }
        __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(wide, factor));
        memcpy(to + 2 * d, &rounded, sizeof rounded);
    }
}

typedef struct {
    char key[STRIP][512], value[STRIP][512]; /* of slots that are stored as codes */
    const char *at_key[STRIP], *at_value[STRIP];
} Gathered;

static void gather_slot(const Asked *a, int64_t r, int64_t source, int i, Gathered *to) {
    int64_t b = r / a->kv_heads, h = r % a->kv_heads;
    if (source < 0) {
        int64_t n = -1 - source;
        to->at_key[i] = a->key + b * a->key_step[0] + h * a->key_step[1] + n * a->key_step[2];
        to->at_value[i] = a->value + b * a->value_step[0] + h * a->value_step[1] + n * a->value_step[2];
        return;
    }
    Page page = page_of(a, r, source / a->page_size);
    int64_t inside = source % a->page_size, step = a->head_dim * SIZE_OF[a->page_dtype];
    to->at_key[i] = page.key + inside * step;
    to->at_value[i] = page.value + inside * step;
    if (page.key_scale) {
        decoded(to->at_key[i], page.key_scale[inside], a->page_dtype, a->head_dim, to->key[i]);
        decoded(to->at_value[i], page.value_scale[inside], a->page_dtype, a->head_dim, to->value[i]);
        to->at_key[i] = to->key[i];
        to->at_value[i] = to->value[i];
    }
}

static void pack_strip(const Job *job, int64_t r, int64_t strip) {
    const Asked *a = job->asked;
    Row *row = &job->row[r];
    Gathered gathered;
    int slots = (int)smaller(STRIP, row->slots - strip * STRIP);
    const Slot *slot = row->slot + strip * STRIP;
    for (int i = 0; i < STRIP; i++) {
        if (i < slots) gather_slot(a, r, slot[i].source, i, &gathered);
        else gathered.at_key[i] = gathered.at_value[i] = NOTHING;
        row->position[strip * STRIP + i] = i < slots ? slot[i].position : INT32_MAX;
        row->expiry[strip * STRIP + i] = i < slots ? slot[i].expiry : -1;
    }
    row->range[strip] = range_of(slot, slots);
    pack_keys(gathered.at_key, a->head_dim, row->keys + strip * STRIP * 2 * a->head_dim);
    pack_values(gathered.at_value, a->head_dim, row->values + strip * STRIP * 2 * a->head_dim);
}

static void pack_piece(const Job *job, Scratch *s, int64_t r, int64_t task) {
    (void)s;
    int64_t first = task * PIECE;
    Row *row = &job->row[r];
    for (int64_t strip = first; strip < smaller(first + PIECE, row->strips); strip++)
        pack_strip(job, r, strip);
}

/* Queries by keys: 32 dimensions of the scores of PAIR queries by one strip. */
INLINE void score_part(const Job *job, Scratch *s, const Row *row, const Step *step, int part,
                       float *scores) {
    int64_t parts = job->asked->head_dim / 32; /* of a strip */
    int64_t strip = part / parts, d = part % parts;
    const char *query = s->query + (2 * step->pair * parts + d) * TILE;
    const char *keys = row->keys + (step->strip[strip] * parts + d) * 2 * TILE;
    if (d == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    _tile_loadd(4, query, 64);
    _tile_loadd(6, keys, 64);
    _tile_loadd(7, keys + TILE, 64);
    _tile_loadd(5, query + parts * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (d == parts - 1) {
        char *to = (char *)scores + 2 * strip * TILE;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + TILE, 64);
        _tile_stored(2, to + 2 * GROUP * TILE, 64);
        _tile_stored(3, to + (2 * GROUP + 1) * TILE, 64);
    }
}

/* Weights by values: one strip's share of 32 dimensions of the sums of PAIR queries. */
INLINE void gather_part(const Job *job, Scratch *s, const Row *row, const Step *step, int part,
                        const char *weights) {
    int64_t strip = part % step->strips, d = part / step->strips, parts = job->asked->head_dim / 32;
    const char *values = row->values + (step->strip[strip] * parts + d) * 2 * TILE;
    char *acc = (char *)s->acc + (2 * step->pair * parts + d) * 2 * TILE, *next = acc + parts * 2 * TILE;
    if (strip == 0 && step->first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else if (strip == 0) {
        _tile_loadd(0, acc, 64);
        _tile_loadd(1, acc + TILE, 64);
        _tile_loadd(2, next, 64);
        _tile_loadd(3, next + TILE, 64);
    }
    _tile_loadd(4, weights + strip * TILE, 64);
    _tile_loadd(6, values, 64);
    _tile_loadd(7, values + TILE, 64);
    _tile_loadd(5, weights + (GROUP + strip) * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (strip == step->strips - 1) {
        _tile_stored(0, acc, 64);
        _tile_stored(1, acc + TILE, 64);
        _tile_stored(2, next, 64);
        _tile_stored(3, next + TILE, 64);
    }
}

TARGET static void decay_sums(const Job *job, Scratch *s, const Step *step) {
    if (step->first) return;
    int64_t vectors = job->asked->head_dim / EDGE;
    for (int tile = 0; tile < 2; tile++)
        for (uint32_t left = step->decayed[tile]; left; left &= left - 1) {
            int r = __builtin_ctz(left);
            __m512 decay = _mm512_set1_ps(step->decay[tile * EDGE + r]);
            float *acc = s->acc + (2 * step->pair + tile) * vectors * EDGE * EDGE + r * EDGE;
            for (int64_t j = 0; j < vectors; j++, acc += EDGE * EDGE)
                _mm512_storeu_ps(acc, _mm512_mul_ps(_mm512_loadu_ps(acc), decay));
        }
}

/* Products that are carried along: those of `before`, then those of `after`. */
typedef struct {
    const Job *job;
    Scratch *s;
    const Row *row;
    const Step *before, *after;
    const char *weights; /* of `before` */
    float *scores;       /* of `after` */
    int done, gathers, parts;
} Carried;

static Carried carry(const Job *job, Scratch *s, const Row *row, const Step *before, const Step *after) {
    int each = (int)(job->asked->head_dim / 32);
    Carried carried = {.job = job, .s = s, .row = row, .before = before, .after = after};
    carried.gathers = before ? before->strips * each : 0;
    carried.parts = carried.gathers + (after ? after->strips * each : 0);
    return carried;
}

INLINE void advance(Carried *c, int until) {
    if (c->done >= until) return;
    SETTLE_MEMORY();
    for (; c->done < until; c->done++)
        if (c->done < c->gathers) gather_part(c->job, c->s, c->row, c->before, c->done, c->weights);
        else score_part(c->job, c->s, c->row, c->after, c->done - c->gathers, c->scores);
    SETTLE_MEMORY();
}

/* The largest lane of each of sixteen vectors. */
INLINE __m512 largest(const __m512 *v) {
    __m512 a[EDGE / 2], b[EDGE / 4], c[2];
    EACH(i, EDGE / 2)
        a[i] = _mm512_max_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    EACH(i, EDGE / 4) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    EACH(i, 2)
        c[i] = _mm512_max_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_max_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

/* 2^x with a relative error below 1e-4, a fiftieth of what rounding to bfloat16 costs; 0 for -infinity. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, 0x09); /* x - floor(x) */
    __m512 series = _mm512_fmadd_ps(_mm512_set1_ps(0x1.3f9620p-4f), r, _mm512_set1_ps(0x1.cefc40p-3f));
    series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(0x1.64445ap-1f));
    series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(0x1.fff630p-1f));
    return _mm512_scalef_ps(series, x); /* times 2^floor(x) */
}

/* 2^x as above with a relative error below 3e-6: what is capped is multiplied by the cap. */
INLINE __m512 exact_power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, 0x08), r = _mm512_sub_ps(x, whole);
    __m512 series = _mm512_fmadd_ps(_mm512_set1_ps(0x1.5d87fep-10f), r, _mm512_set1_ps(0x1.3b2ab6p-7f));
    series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(0x1.c6b08ep-5f));
    series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(0x1.ebfbe0p-3f));
    series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(0x1.62e430p-1f));
    series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(series, whole);
}

/* Products s become cap * tanh(s / cap). */
TARGET static void cap_step(const Job *job, const Step *step, float *scores) {
    __m512 cap = _mm512_set1_ps(job->cap), one = _mm512_set1_ps(1);
    __m512 factor = _mm512_set1_ps(fmaxf(-2 * 0x1.715476p+0f / job->cap, -FLT_MAX)), least = _mm512_set1_ps(-126);
    bool high = job->asked->softcap > 1024; /* below it 3e-6 of the cap do no harm */
    __m512i sign = _mm512_set1_epi32((int)0x80000000);
    for (int tile = 0; tile < 2; tile++, scores += 2 * GROUP * EDGE * EDGE)
        for (int i = 0; i < 2 * step->strips * EDGE; i++) {
            __m512 score = _mm512_loadu_ps(scores + i * EDGE);
            __m512 e = _mm512_max_ps(_mm512_mul_ps(_mm512_abs_ps(score), factor), least);
            e = exact_power_of_two(e); /* exp(-2 |x|) */
            __m512 capped = _mm512_mul_ps(_mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e)), cap);
            __m512i signs = _mm512_and_si512(_mm512_castps_si512(score), sign);
            capped = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(capped), signs));
            if (high) { /* far below the cap 1 - e would have lost its digits: there a series serves */
                __m512 x = _mm512_div_ps(score, cap), square = _mm512_mul_ps(x, x);
                __mmask16 few = _mm512_cmp_ps_mask(square, _mm512_set1_ps(0x1p-8f), _CMP_LT_OQ);
                __m512 series = _mm512_fmadd_ps(square, _mm512_set1_ps(2.f / 15), _mm512_set1_ps(-1.f / 3));
                series = _mm512_fmadd_ps(score, _mm512_mul_ps(square, series), score);
                capped = _mm512_mask_mov_ps(capped, few, series);
            }
            _mm512_storeu_ps(scores + i * EDGE, capped);
        }
}

/* Scores of slots that a query does not see become -infinity. */
TARGET static void mask_strip(const int32_t *position, const int32_t *expiry, const int32_t *at,
                              float *scores) {
    __m512 hidden = _mm512_set1_ps(-INFINITY);
    for (int half = 0; half < 2; half++, scores += EDGE * EDGE) {
        __m512i from = _mm512_loadu_si512(position + half * EDGE);
        __m512i to = _mm512_loadu_si512(expiry + half * EDGE);
        for (int r = 0; r < EDGE; r++) {
            __m512i q = _mm512_set1_epi32(at[r]);
            __mmask16 unseen = _mm512_cmpgt_epi32_mask(from, q) | _mm512_cmpgt_epi32_mask(q, to);
            _mm512_mask_storeu_ps(scores + r * EDGE, unseen, hidden);
        }
    }
}

static void mask_step(const Row *row, Scratch *s, const Step *step, float *scores) {
    const int32_t *at = s->at + step->pair * PAIR;
    for (int i = 0; i < step->strips; i++) {
        int64_t slot = step->strip[i] * STRIP;
        Range range = row->range[step->strip[i]];
        if (range.last <= s->oldest && range.earliest >= s->newest) continue;
        for (int tile = 0; tile < 2; tile++)
            mask_strip(row->position + slot, row->expiry + slot, at + tile * EDGE,
                       scores + (tile * 2 * GROUP + 2 * i) * EDGE * EDGE);
    }
}

/* Chooses the exponent that weights are relative to. It follows the largest score only by leaps: weights
   up to 2^8 do no harm, and so the sums are seldom multiplied. */
INLINE void raise_top(Scratch *s, Step *step, int tile, const float *scores, float scale, const int strips) {
    float *top = s->top + step->pair * PAIR + tile * EDGE;
    __m512 most[EDGE];
    EACH(r, EDGE) {
        most[r] = _mm512_loadu_ps(scores + r * EDGE);
        EACH(i, 2 * strips - 1)
            most[r] = _mm512_max_ps(most[r], _mm512_loadu_ps(scores + ((i + 1) * EDGE + r) * EDGE));
    }
    __m512 high = _mm512_mul_ps(largest(most), _mm512_set1_ps(scale)), old = _mm512_loadu_ps(top);
    high = _mm512_roundscale_ps(high, 0x0a); /* upwards */
    __mmask16 raised = _mm512_cmp_ps_mask(high, _mm512_add_ps(old, _mm512_set1_ps(8)), _CMP_GT_OQ);
    step->decayed[tile] = raised;
    if (!raised) return;
    __m512 decay = _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_sub_ps(old, high)); /* 0 at first */
    _mm512_storeu_ps(step->decay + tile * EDGE, decay);
    _mm512_mask_storeu_ps(top, raised, high);
    for (uint32_t left = raised; left; left &= left - 1) {
        int r = __builtin_ctz(left);
        float *sum = s->sum[step->pair * PAIR + tile * EDGE + r];
        __m512 by = _mm512_set1_ps(step->decay[tile * EDGE + r]);
        _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), by));
    }
}

/* Scores become weights, 2^(score - top), of which the sums are kept. */
INLINE void weigh_tile(Scratch *s, Step *step, int tile, const float *scores, char *weights, float scale,
                       Carried *carried, const int strips) {
    raise_top(s, step, tile, scores, scale, strips);
    int first = step->pair * PAIR + tile * EDGE;
    for (int r = 0; r < EDGE; r++) {
        advance(carried, carried->parts * (tile * EDGE + r + 1) / PAIR);
        float top = s->top[first + r];
        __m512 base = _mm512_set1_ps(top == -INFINITY ? 0 : top), factor = _mm512_set1_ps(scale);
        __m512 sum = _mm512_loadu_ps(s->sum[first + r]);
        EACH(i, strips) {
            const float *from = scores + (2 * i * EDGE + r) * EDGE;
            __m512 low = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(from), factor, base));
            __m512 high = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(from + EDGE * EDGE), factor, base));
            __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            memcpy(weights + i * TILE + r * 64, &both, sizeof both);
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        }
        _mm512_storeu_ps(s->sum[first + r], sum);
    }
}

TARGET static void weigh(const Job *job, Scratch *s, Step *step, const float *scores, char *weights,
                         Carried *carried) {
    for (int tile = 0; tile < 2; tile++) {
        const float *from = scores + tile * 2 * GROUP * EDGE * EDGE;
        char *to = weights + tile * GROUP * TILE;
        switch (step->strips) {
        case 1: weigh_tile(s, step, tile, from, to, job->scale, carried, 1); break;
        case 2: weigh_tile(s, step, tile, from, to, job->scale, carried, 2); break;
        case 3: weigh_tile(s, step, tile, from, to, job->scale, carried, 3); break;
        default: weigh_tile(s, step, tile, from, to, job->scale, carried, GROUP); break;
        }
    }
}

static void load_queries(const Job *job, Scratch *s, int64_t r, int64_t first) {
    const Asked *a = job->asked;
    int64_t b = r / a->kv_heads, h = r % a->kv_heads, parts = a->head_dim / 32;
    for (int64_t i = 0; i < BLOCK; i++) {
        int64_t token = (first + i) / job->group, head = h * job->group + (first + i) % job->group;
        char *to = s->query + (i / EDGE * parts * EDGE + i % EDGE) * 64;
        const char *from = a->query + b * a->query_step[0] + head * a->query_step[1] + token * a->query_step[2];
        bool real = first + i < job->queries;
        s->at[i] = real ? a->at[b * a->queries + token] : -1;
        for (int64_t d = 0; d < parts; d++) {
            if (real) memcpy(to + d * TILE, from + d * 64, 64);
            else memset(to + d * TILE, 0, 64);
            if (job->negative)
                for (int j = 0; j < 64; j += 2) to[d * TILE + j + 1] ^= (char)0x80;
        }
    }
    int64_t last = smaller(first + BLOCK, job->queries) - 1;
    span(a, b, first / job->group, last / job->group + 1, &s->oldest, &s->newest);
}

TARGET static void write_queries(const Job *job, const Scratch *s, int64_t r, int64_t first) {
    const Asked *a = job->asked;
    int64_t b = r / a->kv_heads, h = r % a->kv_heads, parts = a->head_dim / 32;
    for (int64_t i = 0; i < smaller(BLOCK, job->queries - first); i++) {
        int64_t token = (first + i) / job->group, head = h * job->group + (first + i) % job->group;
        char *to = a->out + ((b * a->queries + token) * a->heads + head) * a->head_dim * 2;
        if (s->at[i] < 0 || s->top[i] == -INFINITY) { /* padding, or nothing is seen */
            memset(to, 0, (size_t)a->head_dim * 2);
            continue;
        }
        float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(s->sum[i]));
        if (a->sinks) sum += exp2f(a->sinks[head] * 0x1.715476p+0f - s->top[i]);
        __m512 scale = _mm512_set1_ps(1 / sum);
        const float *acc = s->acc + (i / EDGE * parts * 2 * EDGE + i % EDGE) * EDGE;
        for (int64_t d = 0; d < parts; d++, acc += 2 * EDGE * EDGE) {
            __m512 low = _mm512_mul_ps(_mm512_loadu_ps(acc), scale);
            __m512 high = _mm512_mul_ps(_mm512_loadu_ps(acc + EDGE * EDGE), scale);
            __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            memcpy(to + d * 64, &both, sizeof both);
        }
    }
}

/* Static, because gcc takes the load of a configuration for a read of its first bytes only. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TILES = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
           .rows = {EDGE, EDGE, EDGE, EDGE, EDGE, EDGE, EDGE, EDGE}};

/* The strips that some query of the block sees. */
static int64_t choose_strips(const Row *row, Scratch *s) {
    int64_t n = 0;
    for (int64_t strip = 0; strip < row->strips; strip++) {
        s->strip[n] = strip;
        n += row->range[strip].first <= s->newest && row->range[strip].latest >= s->oldest;
    }
    return n;
}

static Step step_at(const Scratch *s, int64_t strips, int64_t step, int pairs) {
    int64_t at = step / pairs * GROUP;
    return (Step){.pair = (int)(step % pairs), .strips = (int)smaller(GROUP, strips - at), .first = !at,
                  .strip = s->strip + at};
}

/* Step n is weighed while step n - 1 is gathered and step n + 1 is scored. */
TARGET static void attend_block(const Job *job, Scratch *s, int64_t r, int64_t task) {
    int64_t first = (job->blocks - 1 - task) * BLOCK; /* the longest task first */
    const Row *row = &job->row[r];
    load_queries(job, s, r, first);
    for (int i = 0; i < BLOCK; i++) s->top[i] = -INFINITY;
    memset(s->sum, 0, sizeof s->sum);
    int pairs = (int)divided(smaller(BLOCK, job->queries - first), PAIR);
    int64_t strips = choose_strips(row, s), steps = divided(strips, GROUP) * pairs;
    Step step[3]; /* step n is in place n % 3 */
    _tile_loadconfig(&TILES);
    for (int64_t n = -1; n <= steps; n++) {
        Step *before = n >= 1 ? &step[(n - 1) % 3] : NULL, *after = NULL;
        if (n + 1 < steps) {
            after = &step[(n + 1) % 3];
            *after = step_at(s, strips, n + 1, pairs);
        }
        if (before) decay_sums(job, s, before);
        Carried carried = carry(job, s, row, before, after);
        carried.weights = s->weights[(n + 1) & 1];
        carried.scores = s->scores[(n + 1) & 1];
        if (n >= 0 && n < steps) {
            if (job->cap > 0) cap_step(job, &step[n % 3], s->scores[n & 1]);
            mask_step(row, s, &step[n % 3], s->scores[n & 1]);
            weigh(job, s, &step[n % 3], s->scores[n & 1], s->weights[n & 1], &carried);
        }
        advance(&carried, carried.parts);
    }
    _tile_release();
    write_queries(job, s, r, first);
}

enum { PERMIT_COMPONENT = 0x1023, TILE_DATA = 18 }; /* arch_prctl's ARCH_REQ_XCOMP_PERM */

static bool granted(void) {
    uint32_t a, b, c, d, states, high;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return false; /* OSXSAVE */
    __asm__("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
    if ((states & 0x600e6) != 0x600e6) return false; /* vectors, masks and tiles are saved */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, amx = 1u << 22 | 1u << 24;
    if ((b & avx512) != avx512 || (d & amx) != amx) return false; /* F, DQ, BW, VL; BF16, TILE */
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false; /* AVX512_BF16 */
    return !syscall(SYS_arch_prctl, PERMIT_COMPONENT, TILE_DATA);
}
#else
static bool granted(void) { return false; }
static void pack_piece(const Job *job, Scratch *s, int64_t r, int64_t task) {
    (void)job, (void)s, (void)r, (void)task;
}
static void attend_block(const Job *job, Scratch *s, int64_t r, int64_t task) {
    (void)job, (void)s, (void)r, (void)task;
}
#endif

static int64_t tasks_of(const Job *job, const Row *row, int stage) {
    return stage == 0 ? 1 : stage == 1 ? divided(row->strips, PIECE) : job->blocks;
}

/* One parallel region for all stages, for where other processes take a core from a thread, every region
   waits until it is back. One that comes late finds nothing left to do, and is not waited for before. */
static void work_on(const Job *job, Scratch *s, int64_t r, int stage) {
    static Task *const TASK[STAGES] = {plan_row, pack_piece, attend_block};
    Row *row = &job->row[r];
    if (stage > 0)
        while (atomic_load(&row->done[stage - 1]) < tasks_of(job, row, stage - 1)) sched_yield();
    int64_t tasks = tasks_of(job, row, stage);
    for (int64_t task; (task = atomic_fetch_add(&row->taken[stage], 1)) < tasks;) {
        TASK[stage](job, s, r, task);
        atomic_fetch_add(&row->done[stage], 1);
    }
}

/* Every thread begins with rows of its own, the same in all stages, so that most of what it packs is in
   its own cache when it attends; then it helps with the others. */
static void work(void *data) {
    Job *job = data;
    int thread = atomic_fetch_add(&job->joined, 1);
    Scratch *s = (Scratch *)(job->scratch + (size_t)thread * job->scratch_size);
    for (int stage = 0; stage < STAGES; stage++)
        for (int64_t i = 0; i < job->rows; i++)
            work_on(job, s, (thread * job->rows / job->threads + i) % job->rows, stage);
}

/* Hands out parts of `memory`, in whole cache lines; without it, only counts what they need. */
static void *part(char *memory, size_t *used, size_t bytes) {
    size_t at = *used;
    *used += (bytes + 63) & ~(size_t)63;
    return memory ? memory + at : NULL;
}

static void divide_row(Row *row, int64_t most, int64_t head_dim, char *memory, size_t *used) {
    size_t strips = (size_t)divided(most, STRIP), packed = strips * STRIP * (size_t)head_dim * 2;
    Row own = {0}; /* no task is taken */
    own.found = part(memory, used, sizeof(Slot) * (size_t)(most + 1)); /* written to before it is decided */
    own.slot = part(memory, used, sizeof(Slot) * (size_t)most);
    own.position = part(memory, used, sizeof(int32_t) * strips * STRIP);
    own.expiry = part(memory, used, sizeof(int32_t) * strips * STRIP);
    own.range = part(memory, used, sizeof(Range) * strips);
    own.keys = part(memory, used, packed);
    own.values = part(memory, used, packed);
    if (memory) *row = own;
}

static void divide_scratch(Scratch *s, int64_t strips, size_t head_dim, char *memory, size_t *used) {
    Scratch own;
    own.query = part(memory, used, BLOCK * head_dim * 2);
    own.acc = part(memory, used, BLOCK * head_dim * 4);
    for (int i = 0; i < 2; i++) own.scores[i] = part(memory, used, 4 * GROUP * TILE);
    for (int i = 0; i < 2; i++) own.weights[i] = part(memory, used, 2 * GROUP * TILE);
    own.strip = part(memory, used, sizeof(int64_t) * (size_t)(strips + 1));
    if (memory) *s = own;
}

/* Returns the size of the memory that is needed. */
static size_t divide(Job *job, char *memory) {
    size_t used = 0;
    int64_t longest = 0;
    job->row = part(memory, &used, sizeof(Row) * (size_t)job->rows);
    for (int64_t r = 0; r < job->rows; r++) {
        int64_t most = slots_of(job->asked, r) + job->asked->tokens;
        longest = larger(longest, most);
        divide_row(memory ? &job->row[r] : NULL, most, job->asked->head_dim, memory, &used);
    }
    size_t first = used;
    job->scratch = memory ? memory + first : NULL;
    for (int thread = 0; thread < job->threads; thread++) {
        Scratch *s = part(memory, &used, sizeof(Scratch));
        divide_scratch(s, divided(longest, STRIP), (size_t)job->asked->head_dim, memory, &used);
    }
    job->scratch_size = (used - first) / (size_t)job->threads;
    return used;
}

bool prefill_attend(const Asked *asked) {
    /* Over ln 2; and not 0, because -infinity times 0 is not -infinity. */
    float scale = (float)fmax(fabs(asked->scale) * 1.4426950408889634, 1e-30);
    Job whole = {.asked = asked, .scale = scale, .negative = asked->scale < 0}, *job = &whole;
    job->cap = (float)(asked->softcap * 1.4426950408889634 / scale);
    job->rows = asked->batch * asked->kv_heads;
    job->group = asked->heads / asked->kv_heads;
    job->queries = job->group * asked->queries;
    job->blocks = divided(job->queries, BLOCK);
    job->threads = (int)larger(1, smaller(asked->threads, job->rows * job->blocks));
    if (!job->rows || !job->queries) return true;
    char *memory = aligned_alloc(64, divide(job, NULL));
    if (!memory) return false;
    divide(job, memory);
    on_threads(work, job, job->threads);
    free(memory);
    return true;
}

bool prefill_prepare(void) {
    find_threads();
    return granted();
}
