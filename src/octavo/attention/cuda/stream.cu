// Attention of one query per head over ragged pages, with tensor cores, read once and in equal shares.
//
// It computes what `_attend` in decode.py does, and leaves its parts where `_merge` looks for them. Triton moves keys and
// values through shared memory, and values that are codes byte by byte. Here a thread reads what its part of a product needs
// from memory, 16 bytes at once, and turns values over with byte permutations in registers.
//
// The compiler is given these names:
//   D          elements of a head: 64 or 128
//   G          query heads that share a KV head, at most 8
//   S          slots of a page, a multiple of 16
//   CODES      0: pages hold what the queries are; 1: int8 codes; 2: float8 codes (e4m3)
//   BF16       1: queries are bfloat16, 0: float16
//   WRITES     1: a new token is put into its slot first, and no slot lies after the query
//   INDEXED    1: `rows` says which lines of the tables sequences have
//   RESIDENT   blocks that a core is to hold at once
//
// A warp is a program of its own, so none waits for another. It takes tiles of 16 slots one after another, and asks for
// the next tile's keys and values when it is done with this one's. Of the two products of a tile
//
//   scores [16 slots, 8 queries] = keys [16, D] x queries [D, 8]
//   result [D, 8 queries]       += values [D, 16 slots] x weights [16, 8]
//
// the operands lie in registers as mma.m16n8k16 wants them: with g = lane / 4 and j = lane % 4 a thread holds of keys
// the slots g and g + 8, of values the slots 2j, 2j + 1, 2j + 8 and 2j + 9, and of scores, weights and results the
// queries 2j and 2j + 1. Which element of a head is which row or column of a product is free, and chosen so that each
// thread reads 16 bytes that lie side by side.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

#define WARPS 4  // of a block
#define TILE 16
#define BLOCK 32  // slots that shares are counted in: BLOCK of the package
#define ALL 0xffffffffu
#define NOTHING -1e30f
#define UNSEEN __int_as_float(0xff800000)
#define SLACK 8.0f  // how far, in powers of two, a score may exceed what weights are relative to

#define BYTES (CODES ? 1 : 2)
#define CHUNK (16 / BYTES)        // elements in 16 bytes
#define CHUNKS (D / (4 * CHUNK))  // of a slot's key that a thread holds
#define OWN (D / 8)               // elements of a slot's value that a thread holds
#define WORDS (OWN * BYTES / 4)   // in so many registers
#define ROW (D * BYTES)           // bytes of a slot's key or value

struct Job {
    const u16 *query;
    char *key, *value;
    float *key_scale, *value_scale;
    const int *position, *expiry;
    float *part;
    u16 *out;
    const u16 *new_key, *new_value;
    const int *at, *table, *length, *begins;
    const char *new_slot;  // int32, or int64 of which the lower half is read
    const int *new_position, *rows;
    float scale;
    int R, H, unused;
    i64 query_b, query_h, at_b, table_b, table_h, length_b, length_h, out_b;
    i64 page_bytes, page_words;  // from one page to the next, in bytes and in 4-byte words
    i64 new_key_b, new_key_h, new_value_b, new_value_h, new_slot_b, new_slot_h;  // the last two in bytes
    i64 new_position_b;
};

// Numbers

static __device__ __forceinline__ float wide(u16 x) {
#if BF16
    return __uint_as_float((u32)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

static __device__ __forceinline__ u32 halves(float low, float high) {  // float16
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

static __device__ __forceinline__ u32 narrow2(float low, float high) {  // what the queries are
#if BF16
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return halves(low, high);
#endif
}

static __device__ __forceinline__ u32 permuted(u32 a, u32 b, u32 selector) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

static __device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two codes, the lower or the upper half of `x`, as float16. In int8 the sign bits have been flipped (`unsigned_`): then
// a code is 0 to 255, and behind the byte 0x64 that is 1024 more as a float16.
static __device__ __forceinline__ u32 unsigned_(u32 x) { return CODES == 1 ? x ^ 0x80808080u : x; }

struct Magic {
    u32 byte, less;  // the byte 0x64 four times, and 1152 as a float16 twice
};

static __device__ __forceinline__ Magic magic_numbers() {  // kept in registers: the compiler would make them each time
    Magic m;
    asm volatile("mov.b32 %0, 0x64646464;" : "=r"(m.byte));
    asm volatile("mov.b32 %0, 0x64806480;" : "=r"(m.less));
    return m;
}

static __device__ __forceinline__ u32 decoded(u32 x, int upper, Magic magic) {
    u32 y;
    if (CODES == 1) {
        y = permuted(x, magic.byte, upper ? 0x4342 : 0x4140);
        asm("sub.f16x2 %0, %0, %1;" : "+r"(y) : "r"(magic.less));
    } else {
        u16 two = (u16)(upper ? x >> 16 : x);
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(two));
    }
    return y;
}

// c [16, 8] += a [16, 16] x b [16, 8]
static __device__ __forceinline__ void product(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16 && !CODES
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ u32 turned(u32 x) {  // an 8 x 8 matrix of 16-bit numbers, over the warp
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Memory

#ifndef HINT
#define HINT ".L2::128B"
#endif
static __device__ __forceinline__ void load16(u32 *to, const void *from) {  // read once: not kept in the first cache
    asm volatile("ld.global.L1::no_allocate" HINT ".v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
}

static __device__ __forceinline__ void load8(u32 *to, const void *from) {
    asm volatile("ld.global.L1::no_allocate" HINT ".v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}

struct Slots {  // of the slots g and g + 8 of a tile
    int expiry[2], position[2];
    float key_scale[2], value_scale[2];
};

// The key or value of a new token, by one warp: D / 32 elements a lane.
static __device__ __forceinline__ void put(
    char *to, float *scale_to, const u16 *from, int lane)
{
    float x[D / 32];
    for (int i = 0; i < D / 32; i++)
        x[i] = wide(from[lane * (D / 32) + i]);
    if (CODES) {
        float most = 1e-30f;
        for (int i = 0; i < D / 32; i++)
            most = fmaxf(most, fabsf(x[i]));
        for (int i = 16; i > 0; i /= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL, most, i));
        float scale = __fdiv_rn(most, CODES == 1 ? 127.0f : 448.0f);
        if (lane == 0)
            *scale_to = scale;
        for (int i = 0; i < D / 32; i++)
            x[i] = __fdiv_rn(x[i], scale);
    }
    for (int i = 0; i < D / 32; i++) {
        int at = lane * (D / 32) + i;
        if (CODES == 1) {
            to[at] = (char)__float2int_rn(x[i]);
        } else if (CODES == 2) {
            u16 two;
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(0.0f), "f"(x[i]));
            to[at] = (char)two;
        } else {
            ((u16 *)to)[at] = from[at];
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) stream(const __grid_constant__ Job job)
{
    const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int R = job.R, program = blockIdx.x * WARPS + threadIdx.x / 32, programs = gridDim.x * WARPS;
    const Magic magic = magic_numbers();

    // This warp's share of all blocks of slots, and the row in which it begins: how many rows end at or before it.
    const i64 total = job.begins[R];
    const i64 sharing = total < programs ? total : programs;
    if (program >= sharing)
        return;
    int first = (int)(program * total / sharing);
    const int last = (int)((program + 1) * total / sharing), my_first = first;
    int row = 0;
    for (int rest = R; rest > 0;) {  // of `rest` rows from `row` on the first 32nds that end in time are passed over
        const int step = (rest + 31) / 32, at = row + (lane + 1) * step;
        const bool passed = (lane + 1) * step <= rest && job.begins[at] <= first;
        const int steps = __popc(__ballot_sync(ALL, passed));
        row += steps * step;
        rest = step == 1 ? 0 : min(step - 1, rest - steps * step);
    }

    for (; first < last; row++) {
        // What does not depend on each other is asked for first, since each answer takes hundreds of steps.
        const int b = row / job.H, h = row % job.H;
        const int begin = job.begins[row], end = job.begins[row + 1];
        const i64 line = INDEXED ? job.rows[b] : b;
        const int now = job.at[b * job.at_b];
        int taken = 0, fresh = -1;
        if (WRITES) {
            taken = *(const int *)(job.new_slot + b * job.new_slot_b + h * job.new_slot_h);
            fresh = job.new_position[b * job.new_position_b];
        }
        u32 q[CHUNKS][CHUNK / 2];  // of query g: what a thread's keys hold of a slot, chunks 4i + j
        const u16 *query = job.query + b * job.query_b + (h * G + g) * job.query_h;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
#pragma unroll
            for (int k = 0; k < CHUNK / 8; k++) {
                if (g < G)
                    load16(&q[i][4 * k], query + (4 * i + j) * CHUNK + 8 * k);
                else
                    q[i][4 * k] = q[i][4 * k + 1] = q[i][4 * k + 2] = q[i][4 * k + 3] = 0;
            }
        const int used = line < 0 || now < 0 ? 0 : job.length[line * job.length_b + h * job.length_h];
        const int *names = job.table + (line < 0 ? 0 : line) * job.table_b + h * job.table_h;
        const int stop = min(last, end), low = (first - begin) * BLOCK, high = min((stop - begin) * BLOCK, used);

        if (WRITES && fresh >= 0 && taken >= low && taken < high) {
            const i64 own = names[taken / S], inside = taken % S, scales = own * job.page_words + inside;
            const i64 place = own * job.page_bytes + inside * ROW;
            put(job.key + place, job.key_scale + scales, job.new_key + b * job.new_key_b + h * job.new_key_h, lane);
            put(job.value + place, job.value_scale + scales, job.new_value + b * job.new_value_b + h * job.new_value_h,
                lane);
            __threadfence_block();  // only this warp reads them in this launch
            __syncwarp();
        }

        float acc[D / 16][4], m[2] = {NOTHING, NOTHING}, sum[2] = {0, 0}, largest = 0.0f, less = 0.0f;
        for (int t = 0; t < D / 16; t++)
            acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = 0;
        const int count = (high - low + TILE - 1) / TILE;
        u32 k[2][CHUNKS][4], v[4][WORDS];
        Slots slots, coming;
        i64 page = 0;
        int ids = 0;

        // What tile number n of this warp needs. A lane knows the page of every 32nd tile from its own on.
#define SLOT(n) (low + (n) * TILE)
#define NAME(n)                                                                                                   \
    do {                                                                                                          \
        if ((n) % 32 == 0) {                                                                                      \
            int mine = SLOT((n) + lane);                                                                          \
            ids = mine < high ? names[mine / S] : 0;                                                              \
        }                                                                                                         \
        page = __shfl_sync(ALL, ids, (n) % 32);                                                                   \
    } while (0)
#define KEYS(n)                                                                                                   \
    do {                                                                                                          \
        const char *from = job.key + page * job.page_bytes + (SLOT(n) % S + g) * ROW + j * 16;                    \
        _Pragma("unroll") for (int i = 0; i < CHUNKS; i++) {                                                      \
            load16(k[0][i], from + 64 * i);                                                                       \
            load16(k[1][i], from + 64 * i + 8 * ROW);                                                             \
        }                                                                                                         \
    } while (0)
#define REST(n)                                                                                                   \
    do {                                                                                                          \
        i64 place = page * job.page_words + SLOT(n) % S + g;                                                      \
        _Pragma("unroll") for (int i = 0; i < 2; i++) {                                                           \
            coming.expiry[i] = job.expiry[place + 8 * i];                                                         \
            if (!WRITES)                                                                                          \
                coming.position[i] = job.position[place + 8 * i];                                                 \
            if (CODES) {                                                                                          \
                coming.key_scale[i] = job.key_scale[place + 8 * i];                                               \
                coming.value_scale[i] = job.value_scale[place + 8 * i];                                           \
            }                                                                                                     \
        }                                                                                                         \
    } while (0)
#define VALUES(n)                                                                                                 \
    do {                                                                                                          \
        const char *from = job.value + page * job.page_bytes + (SLOT(n) % S + 2 * j) * ROW                        \
                           + g * (WORDS == 2 ? 8 : 16);                                                           \
        _Pragma("unroll") for (int s = 0; s < 4; s++) {                                                           \
            const char *slot = from + (s % 2 + 8 * (s / 2)) * ROW;                                                \
            if (WORDS == 2)                                                                                       \
                load8(v[s], slot);                                                                                \
            else                                                                                                  \
                _Pragma("unroll") for (int c = 0; c < WORDS / 4; c++)                                             \
                    load16(&v[s][4 * c], slot + 128 * c);                                                         \
        }                                                                                                         \
    } while (0)

        if (count > 0) {
            NAME(0);
            KEYS(0);
            REST(0);
            VALUES(0);
        }
        float grown[2] = {job.scale, job.scale};  // of queries 2j and 2j + 1: what products are multiplied by
        if (CODES) {  // float16 may be too small for queries, so they are divided by their largest element
            float most = 1e-30f;
            for (int i = 0; i < CHUNKS; i++)
                for (int c = 0; c < CHUNK / 2; c++)
                    most = fmaxf(most, fmaxf(fabsf(wide((u16)q[i][c])), fabsf(wide((u16)(q[i][c] >> 16)))));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
            const float shrunk = 1.0f / most;
            for (int i = 0; i < CHUNKS; i++)
                for (int c = 0; c < CHUNK / 2; c++)
                    q[i][c] = halves(wide((u16)q[i][c]) * shrunk, wide((u16)(q[i][c] >> 16)) * shrunk);
            grown[0] *= __shfl_sync(ALL, most, 8 * j);
            grown[1] *= __shfl_sync(ALL, most, 8 * j + 4);
        }
#pragma unroll 1
        for (int n = 0; n < count; n++) {
            float x[4] = {0, 0, 0, 0};  // slot g: queries 2j, 2j + 1; slot g + 8: the same
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
#pragma unroll
                for (int e = 0; e < CHUNK / 4; e++) {
                    if (CODES) {
                        u32 one = unsigned_(k[0][i][e]), other = unsigned_(k[1][i][e]);
                        product(x, decoded(one, 0, magic), decoded(other, 0, magic), decoded(one, 1, magic),
                                decoded(other, 1, magic), q[i][2 * e], q[i][2 * e + 1]);
                    } else {
                        product(x, k[0][i][2 * e], k[1][i][2 * e], k[0][i][2 * e + 1], k[1][i][2 * e + 1],
                                q[i][2 * e], q[i][2 * e + 1]);
                    }
                }
            }
            slots = coming;
            const bool more = n + 1 < count;
            if (more) {
                NAME(n + 1);
                KEYS(n + 1);
                REST(n + 1);
            }

            bool far = false;
#pragma unroll
            for (int s = 0; s < 2; s++) {
                bool seen = SLOT(n) + g + 8 * s < high && now <= slots.expiry[s];
                if (!WRITES)
                    seen = seen && slots.position[s] >= 0 && slots.position[s] <= now;
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float y = x[2 * s + c] * grown[c];
                    if (CODES)
                        y *= slots.key_scale[s];
                    y = seen ? y : UNSEEN;
                    x[2 * s + c] = y;
                    far = far || y > m[c] + SLACK;
                }
                if (CODES) {
                    slots.value_scale[s] = seen ? slots.value_scale[s] : 0;
                    far = far || slots.value_scale[s] > largest;
                }
            }
            if (__any_sync(ALL, far)) {  // weights become relative to a larger score, value scales to a larger one
                float shrink[2];
                for (int c = 0; c < 2; c++) {
                    float top = fmaxf(m[c], fmaxf(x[c], x[2 + c]));
                    for (int i = 4; i < 32; i *= 2)
                        top = fmaxf(top, __shfl_xor_sync(ALL, top, i));
                    shrink[c] = exp2_(m[c] - top);
                    sum[c] *= shrink[c];
                    m[c] = top;
                }
                if (CODES) {
                    float top = fmaxf(fmaxf(largest, 1e-30f), fmaxf(slots.value_scale[0], slots.value_scale[1]));
                    for (int i = 4; i < 32; i *= 2)
                        top = fmaxf(top, __shfl_xor_sync(ALL, top, i));
                    less = 1.0f / top;
                    shrink[0] *= largest * less;
                    shrink[1] *= largest * less;
                    largest = top;
                }
                for (int t = 0; t < D / 16; t++)
                    for (int i = 0; i < 4; i++)
                        acc[t][i] *= shrink[i % 2];
            }
            for (int i = 0; i < 4; i++) {
                x[i] = exp2_(x[i] - m[i % 2]);
                sum[i % 2] += x[i];
                if (CODES)
                    x[i] *= slots.value_scale[i / 2] * less;
            }
            if (SLOT(n) + TILE > high)  // what lies behind a row's end may be anything, and 0 times that NaN
#pragma unroll
                for (int s = 0; s < 4; s++)
                    if (SLOT(n) + 2 * j + s % 2 + 8 * (s / 2) >= high)
#pragma unroll
                        for (int r = 0; r < WORDS; r++)
                            v[s][r] = 0;
            const u32 w0 = turned(CODES ? halves(x[0], x[1]) : narrow2(x[0], x[1]));
            const u32 w1 = turned(CODES ? halves(x[2], x[3]) : narrow2(x[2], x[3]));
#pragma unroll
            for (int r = 0; r < WORDS; r++) {
                if (CODES) {
                    u32 a = unsigned_(v[0][r]), b = unsigned_(v[1][r]), c = unsigned_(v[2][r]), d = unsigned_(v[3][r]);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        u32 ab = permuted(a, b, e ? 0x7362 : 0x5140), cd = permuted(c, d, e ? 0x7362 : 0x5140);
                        product(acc[2 * r + e], decoded(ab, 0, magic), decoded(ab, 1, magic), decoded(cd, 0, magic),
                                decoded(cd, 1, magic), w0, w1);
                    }
                } else {
                    product(acc[r], permuted(v[0][r], v[1][r], 0x5410), permuted(v[0][r], v[1][r], 0x7632),
                            permuted(v[2][r], v[3][r], 0x5410), permuted(v[2][r], v[3][r], 0x7632), w0, w1);
                }
            }
            if (more)
                VALUES(n + 1);
        }

        // Elements 2t and 2t + 1 of thread g's own are rows g and g + 8 of tile t.
        const bool whole = begin >= my_first && end <= last;  // nobody else has a part of this row
        float inverse[2];
        for (int c = 0; c < 2; c++) {
            for (int i = 4; i < 32; i *= 2)
                sum[c] += __shfl_xor_sync(ALL, sum[c], i);
            inverse[c] = sum[c] > 0 ? (CODES ? largest : 1.0f) / sum[c] : 0;
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int of = 2 * j + c;
            if (of >= G)
                continue;
            const i64 mine = (i64)(row + program) * G + of;
#pragma unroll
            for (int t = 0; t < D / 16; t++) {
                const int own = 2 * t, d = CODES ? g * OWN + own : (g + 8 * (own / 8)) * 8 + own % 8;
                const float x = acc[t][c] * inverse[c], y = acc[t][2 + c] * inverse[c];
                if (whole)
                    *(u32 *)(job.out + b * job.out_b + (h * G + of) * D + d) = narrow2(x, y);
                else
                    *(float2 *)(job.part + mine * D + d) = make_float2(x, y);
            }
            if (!whole && g == 0)
                job.part[(i64)(R + programs) * (G * D) + mine] = sum[c] > 0 ? m[c] + __log2f(sum[c]) : NOTHING;
        }
        first = stop;
    }
}
