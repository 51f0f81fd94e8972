/* prefill.c with AMX's tile instructions written out, for processors that have all but those. */
#define _GNU_SOURCE 1
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static _Thread_local float tile[8][16][16];

static void load(int t, const char *from, int64_t step) {
    for (int r = 0; r < 16; r++) memcpy(tile[t][r], from + r * step, 64);
}

static void store(int t, char *to, int64_t step) {
    for (int r = 0; r < 16; r++) memcpy(to + r * step, tile[t][r], 64);
}

static void widen(float packed, float pair[2]) { /* two of bfloat16 */
    uint32_t bits, half[2];
    memcpy(&bits, &packed, 4);
    half[0] = bits << 16, half[1] = bits & 0xffff0000;
    memcpy(pair, half, 8);
}

static void multiply(int to, int a, int b) {
    float left[2], right[16][2];
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < 16; n++) widen(tile[b][k][n], right[n]);
        for (int m = 0; m < 16; m++) {
            widen(tile[a][m][k], left);
            for (int n = 0; n < 16; n++) tile[to][m][n] += left[0] * right[n][0] + left[1] * right[n][1];
        }
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(configuration) ((void)(configuration))
#define _tile_release() ((void)0)
#define _tile_zero(t) memset(tile[t], 0, sizeof tile[t])
#define _tile_loadd(t, from, step) load(t, (const char *)(from), step)
#define _tile_stored(t, to, step) store(t, (char *)(to), step)
#define _tile_dpbf16ps(to, a, b) multiply(to, a, b)

#define prefill_prepare really_prepare
#include "prefill.c"
#undef prefill_prepare

bool prefill_prepare(void) {
    really_prepare(); /* finds the threads; it grants nothing here */
    return true;
}
