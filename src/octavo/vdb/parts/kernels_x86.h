/* --- what this machine has ---
 *
 * The processor's word is not enough: the operating system must save the registers too. */
enum { VDB_HAS_AVX2 = 1, VDB_HAS_AVX512 = 2, VDB_HAS_AMX = 4 };

static inline unsigned vdb_features(void) {
  unsigned a, b, c, d, b7 = 0, c7 = 0, d7 = 0, saved, high, bf16 = 0, features = 0;
  const unsigned fma = 1u << 12, sse42 = 1u << 20, popcnt = 1u << 23, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  const unsigned wanted = fma | sse42 | popcnt | osxsave | avx | f16c;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
  if (a >= 1) {
    __get_cpuid_count(7, 1, &bf16, &b, &c, &d);
    bf16 &= 1u << 5;
  }
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & 0x6u) != 0x6u || !(b7 & 1u << 5)) return 0;
  features = VDB_HAS_AVX2;
  const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;
  if ((saved & 0xe6u) != 0xe6u || (b7 & f_dq_bw_vl) != f_dq_bw_vl || !(c7 & vnni)) return features;
  features |= VDB_HAS_AVX512;
  const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25; /* bf16, tile, int8 */
  if ((saved & 0x60000u) != 0x60000u || (d7 & amx) != amx || !bf16) return features;
#ifdef __linux__
  if (vdb_sys_syscall(158, 0x1023, 18) == 0) features |= VDB_HAS_AMX; /* arch_prctl: may this process use the tiles' data? */
#endif
  return features;
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif /* VDB_X86 */

