/* What both kernels are asked: attention of new tokens over the pages of their sequences, and over a chunk of new
   tokens where there is one. `kernels.py` checks the tensors and packs this struct, field by field, in this order.

   A row is one (sequence, KV head). Its slots are numbered 0 to length - 1; slot i lies in page
   table[row][i / page_size] at place i % page_size. The chunk's tokens follow them. Which slots a query sees is said
   by the visibility rule alone: position <= q <= expiry. */
#ifndef OCTAVO_JOB_H
#define OCTAVO_JOB_H

#include <stdbool.h>
#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8, DTYPES }; /* FLOAT8 is e4m3 */

static const int SIZE_OF[DTYPES] = {4, 2, 2, 1, 1};

enum { MOST_THREADS = 256 };

/* Pointers are numbers here, so that Python can pack them; 0 is NULL. */
typedef struct {
    int64_t query;                              /* [batch, heads, queries, head_dim], the last one contiguous */
    int64_t out;                                /* [batch, queries, heads, head_dim] contiguous */
    int64_t at;                                 /* int32 [batch, queries]: positions of the queries, -1 is padding */
    int64_t page_key, page_value;               /* [page, page_size, head_dim] of page_dtype */
    int64_t page_key_scale, page_value_scale;   /* float32 [page, page_size], or 0 where pages hold floats */
    int64_t page_position, page_expiry;         /* int32 [page, page_size] */
    int64_t table, length;                      /* int32 [batch, kv_heads, columns], [batch, kv_heads] */
    int64_t key, value;                         /* of the chunk: [batch, kv_heads, tokens, head_dim] */
    int64_t position, expiry;                   /* of the chunk: int32 [batch, tokens], [batch, kv_heads, tokens] */
    int64_t sinks;                              /* float32 [heads], or 0: scores that join a softmax without a value */
    int64_t batch, heads, kv_heads, queries, tokens, head_dim, page_size;
    int64_t query_step[3], key_step[3], value_step[3]; /* elements to the next sequence, head, token */
    int64_t page_step;                                 /* bytes to the next page */
    int64_t table_step[2], length_step[2];             /* elements to the next sequence, head */
    int64_t dtype, page_dtype, threads;
    double scale, softcap; /* softcap 0: none, else a score s becomes softcap * tanh(s / softcap) */
} Request;

/* The same as the kernels use it: pointers, steps in bytes. */
typedef struct {
    const char *query;
    char *out;
    const int32_t *at;
    const char *page_key, *page_value, *page_key_scale, *page_value_scale, *page_position, *page_expiry;
    const int32_t *table, *length;
    const char *key, *value;
    const int32_t *position, *expiry;
    const float *sinks;
    int64_t batch, heads, kv_heads, queries, tokens, head_dim, page_size;
    int64_t query_step[3], key_step[3], value_step[3];
    int64_t page_step, table_step[2], length_step[2];
    int dtype, page_dtype, threads;
    double scale, softcap;
} Asked;

/* A page, as its parts lie in memory. */
typedef struct {
    const char *key, *value;
    const float *key_scale, *value_scale; /* NULL where the page holds floats */
    const int32_t *position, *expiry;
} Page;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; } /* rounded up */

static inline int64_t slots_of(const Asked *asked, int64_t row) {
    return asked->length[row / asked->kv_heads * asked->length_step[0] +
                         row % asked->kv_heads * asked->length_step[1]];
}

static inline Page page_of(const Asked *asked, int64_t row, int64_t column) {
    int64_t page = asked->table[row / asked->kv_heads * asked->table_step[0] +
                                row % asked->kv_heads * asked->table_step[1] + column];
    int64_t at = page * asked->page_step;
    return (Page){
        asked->page_key + at,
        asked->page_value + at,
        asked->page_key_scale ? (const float *)(asked->page_key_scale + at) : 0,
        asked->page_value_scale ? (const float *)(asked->page_value_scale + at) : 0,
        (const int32_t *)(asked->page_position + at),
        (const int32_t *)(asked->page_expiry + at),
    };
}

/* decode.c: for few queries. `isa` 0, 1, 2 is scalar, AVX2, AVX-512. Return whether there was memory enough. */
bool decode_attend(const Asked *asked);
bool decode_has(int isa);
const char *decode_isa(void);
bool decode_choose(const char *name);
int64_t decode_set_chunk_work(int64_t least);
void decode_prepare(void);

/* prefill.c: for chunks of bfloat16, on AMX. */
bool prefill_attend(const Asked *asked);
bool prefill_prepare(void); /* whether processor and system grant AMX to this process */

#endif
