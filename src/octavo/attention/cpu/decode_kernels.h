/* The three kernels of decode.c over one tile, for one instruction set. decode.c includes this file once for each, with
   LANES      floats in a vector
   TOGETHER   slots that are scored at a time, 2 or 4: as many as there are registers for
   VALUES     vectors of values that `gather` sums at a time
   TARGET     the attribute that lets the compiler use the instructions
   ISA        the name
   EACH_LANE(F, w)   F(0, w), F(1, w)... for every lane
   defined before; all but decode.c's own names are undefined again at the end. */

#define V NAME(Floats)
#define U NAME(Words)
/* Unrolled, because what is indexed by `i` stays in registers only then. */
#define EACH(i, n) _Pragma("GCC unroll 4") for (int64_t i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(Halves) __attribute__((vector_size(2 * LANES)));
typedef int8_t NAME(Bytes) __attribute__((vector_size(LANES)));
typedef int32_t NAME(Signed) __attribute__((vector_size(4 * LANES)));

INLINE V NAME(splat)(float x) { return x - (V){0}; }

INLINE V NAME(load)(const char *from, int64_t element, const int dtype) {
    V x;
    if (dtype == FLOAT32) {
        memcpy(&x, from + 4 * element, sizeof x);
        return x;
    }
#if LANES == 16 /* intrinsics, because gcc widens vectors by halves */
    if (dtype == INT8)
        return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(from + element))));
    if (dtype == FLOAT8) { /* see from_float8; widening copies the sign to bits 14 and 15, of which 14 is cleared */
        __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(from + element)));
        return (V)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16((short)0xbfff)));
    }
    __m256i halves = _mm256_loadu_si256((const void *)(from + 2 * element));
    if (dtype == BFLOAT16) return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    return (V)_mm512_cvtph_ps(halves);
#elif LANES == 8
    if (dtype == INT8)
        return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(from + element))));
    if (dtype == FLOAT8) {
        __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)(from + element)));
        return (V)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16((short)0xbfff)));
    }
    __m128i halves = _mm_loadu_si128((const void *)(from + 2 * element));
    if (dtype == BFLOAT16) return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    return (V)_mm256_cvtph_ps(halves);
#else
    if (dtype == BFLOAT16) {
        NAME(Halves) halves;
        memcpy(&halves, from + 2 * element, sizeof halves);
        return (V)(__builtin_convertvector(halves, U) << 16);
    }
    if (dtype == FLOAT16) {
        for (int i = 0; i < LANES; i++) x[i] = element_of(from, dtype, element + i);
        return x;
    }
    NAME(Bytes) bytes;
    memcpy(&bytes, from + element, sizeof bytes);
    if (dtype == INT8) return __builtin_convertvector(bytes, V);
    U words = (U)__builtin_convertvector(bytes, NAME(Signed)); /* as above, but right into the layout of a float */
    return (V)(words << 20 & 0x87f00000) * 0x1p112f;
#endif
}

/* The cache lines that begin in these bytes. Into the second level: the first can wait for fewer lines at a time. */
INLINE void NAME(prefetch)(const char *from, int64_t first, int64_t last) {
    for (int64_t i = (first + 63) & -64; i < last; i += 64) __builtin_prefetch(from + i, 0, 2);
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

/* LANES / TOGETHER vectors in which TOGETHER slots are folded already. */
INLINE V NAME(sums)(const V *v) {
#if LANES == 16
    return FOLD(FOLD(v[0], v[1], 4), FOLD(v[2], v[3], 4), 8);
#elif LANES == 8
    return FOLD(FOLD(v[0], v[1], 2), FOLD(v[2], v[3], 2), 4);
#else
    return FOLD(v[0], v[1], 2);
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

/* TOGETHER slots at a time share the loads of the queries, and are folded while their sums are in registers. */
INLINE void NAME(score_some)(const Tile *tile, const Tile *next, const float *query, int64_t dim, float *scores,
                             const int dtype, const int queries) {
    V partial[4][LANES / TOGETHER];
    int64_t size = dim * SIZE_OF[next->dtype];
    for (int64_t first = 0; first < tile->count; first += LANES) {
        for (int64_t i = 0; i < LANES; i += TOGETHER) {
            const char *const *key = tile->key + first + i;
            V sum[4][TOGETHER] = {{{0}}};
            EACH(t, TOGETHER) NAME(prefetch)(next->key[first + i + t], 0, size);
            for (int64_t d = 0; d < dim; d += LANES) {
                V k[TOGETHER];
                EACH(t, TOGETHER) k[t] = NAME(load)(key[t], d, dtype);
                EACH(r, queries) {
                    V q = NAME(load)((const char *)(query + r * dim), d, FLOAT32);
                    EACH(t, TOGETHER) sum[r][t] += q * k[t];
                }
            }
            EACH(r, queries) {
#if TOGETHER == 4
                V even = FOLD(sum[r][0], sum[r][1], 1), odd = FOLD(sum[r][2], sum[r][3], 1);
                partial[r][i / TOGETHER] = FOLD(even, odd, 2);
#else
                partial[r][i / TOGETHER] = FOLD(sum[r][0], sum[r][1], 1);
#endif
            }
        }
        EACH(r, queries) {
            V sums = NAME(sums)(partial[r]);
            if (tile->scaled) sums *= NAME(load)((const char *)tile->key_scale, first, FLOAT32);
            memcpy(scores + r * TILE + first, &sums, sizeof sums);
        }
    }
}

INLINE void NAME(gather_some)(const Tile *tile, const Tile *next, const float *weights, const float *decay,
                              int64_t dim, int64_t d, float *acc, const int dtype, const int queries,
                              const int vectors) {
    V sum[4][VALUES];
    EACH(r, queries)
        EACH(j, vectors)
            sum[r][j] = NAME(load)((const char *)(acc + r * dim), d + j * LANES, FLOAT32) * decay[r];
    int64_t size = SIZE_OF[next->dtype], begin = d * size, end = (d + vectors * LANES) * size;
    for (int64_t i = 0; i < tile->count; i++) {
        NAME(prefetch)(next->value[i], begin, end);
        V value[VALUES];
        EACH(j, vectors)
            value[j] = NAME(load)(tile->value[i], d + j * LANES, dtype);
        EACH(r, queries) {
            V weight = NAME(splat)(weights[r * TILE + i]);
            EACH(j, vectors) sum[r][j] += weight * value[j];
        }
    }
    EACH(r, queries)
        EACH(j, vectors)
            memcpy(acc + r * dim + d + j * LANES, &sum[r][j], sizeof(V));
}

INLINE void NAME(gather_rows)(const Tile *tile, const Tile *next, const float *weights, const float *decay,
                              int64_t dim, float *acc, const int dtype, const int queries) {
    int64_t d = 0;
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
    else if (dtype == FLOAT16) WITH_QUERIES(kernel, queries, __VA_ARGS__, FLOAT16)   \
    else if (dtype == INT8) WITH_QUERIES(kernel, queries, __VA_ARGS__, INT8)         \
    else WITH_QUERIES(kernel, queries, __VA_ARGS__, FLOAT8)

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

/* softcap * tanh(score / softcap). Far below the cap 1 - e would have lost its digits: there a series serves. */
INLINE void NAME(cap)(float *scores, int64_t n, float softcap) {
    for (int64_t i = 0; i < n; i += LANES) {
        V score = NAME(load)((const char *)scores, i, FLOAT32), x = score / softcap, square = x * x;
        V e = NAME(exponential)((V)((U)x | 0x80000000) * 2.f); /* exp(-2 |x|) */
        V large = (1.f - e) / (1.f + e) * softcap;
        large = (V)((U)large | ((U)score & 0x80000000));
        V small = score + score * square * (square * (2.f / 15) - 1.f / 3);
        U few = (U)(square < NAME(splat)(0x1p-8f));
        V capped = (V)(((U)small & few) | ((U)large & ~few));
        memcpy(scores + i, &capped, sizeof capped);
    }
}

/* Scores become weights, exp(score - top); what was summed before is to be multiplied by `decay`. */
TARGET static void NAME(weigh)(const Tile *tile, const int32_t *at, int queries, float softcap, float *scores,
                               float *top, float *sum, float *decay) {
    int64_t padded = (tile->count + LANES - 1) / LANES * LANES;
    for (int r = 0; r < queries; r++, scores += TILE) {
        if (softcap > 0) NAME(cap)(scores, padded, softcap);
        for (int64_t i = tile->count; i < padded; i++) scores[i] = -INFINITY;
        if (tile->masked)
            for (int64_t i = 0; i < tile->count; i++)
                scores[i] = tile->position[i] <= at[r] && at[r] <= tile->expiry[i] ? scores[i] : -INFINITY;
        V most = NAME(splat)(-INFINITY), all = {0};
        for (int64_t i = 0; i < padded; i += LANES) {
            V s = NAME(load)((const char *)scores, i, FLOAT32);
            most = NAME(larger)(s, most);
        }
        float old = top[r], highest = NAME(highest)(most);
        top[r] = highest > old ? highest : old;
        V base = NAME(splat)(top[r] == -INFINITY ? 0 : top[r]); /* weights are 0 until a slot is seen */
        for (int64_t i = 0; i < padded; i += LANES) {
            V weight = NAME(exponential)(NAME(load)((const char *)scores, i, FLOAT32) - base);
            all += weight;
            if (tile->scaled) weight *= NAME(load)((const char *)tile->value_scale, i, FLOAT32);
            memcpy(scores + i, &weight, sizeof weight);
        }
        decay[r] = top[r] == old ? 1 : NAME(exponential)(NAME(splat)(old) - base)[0];
        sum[r] = sum[r] * decay[r] + NAME(total)(all);
    }
}

static const Kernels NAME(kernels) = {TEXT(ISA), NAME(score), NAME(weigh), NAME(gather)};

#undef LANES
#undef VALUES
#undef TOGETHER
#undef TARGET
#undef ISA
#undef EACH_LANE
#undef V
#undef U
#undef INLINE
#undef EACH
#undef KEPT
#undef ADDED
#undef FOLD
#undef CROSSED
#undef CROSS
#undef WITH_QUERIES
#undef SPECIALISED
