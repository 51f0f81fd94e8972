/* --- the choice --- */

/* Null if this machine, or this compilation, has no such set. */
static inline const vdb_kernel_set *vdb_kernels_named(const char *name) {
#if defined(VDB_X86)
  unsigned features = vdb_features();
  if (!strcmp(name, "amx")) return features & VDB_HAS_AMX ? vdb_amx_set() : NULL;
  if (!strcmp(name, "avx512")) return features & VDB_HAS_AVX512 ? vdb_avx512_set() : NULL;
  if (!strcmp(name, "avx2")) return features & VDB_HAS_AVX2 ? vdb_avx2_set() : NULL;
#elif defined(VDB_ARM)
  if (!strcmp(name, "neon")) return vdb_neon_set();
#endif
  return !strcmp(name, "plain") ? vdb_plain_set() : NULL;
}

static inline const vdb_kernel_set *vdb_best_kernels(void) {
  static const char *const best_first[] = {"amx", "avx512", "avx2", "neon", "plain"};
  const vdb_kernel_set *set = NULL;
  for (int i = 0; !set; i++) set = vdb_kernels_named(best_first[i]);
  return set;
}

/* The one variable of the program: the set in use, or null before the first use. */
static inline const vdb_kernel_set **vdb_chosen(void) {
  static const vdb_kernel_set *chosen;
  return &chosen;
}

static inline void vdb_choose(const vdb_kernel_set *set) { __atomic_store_n(vdb_chosen(), set, __ATOMIC_RELEASE); }

/* Threads that come here first together find the same. */
static inline const vdb_kernel_set *vdb_active(void) {
  const vdb_kernel_set *set = __atomic_load_n(vdb_chosen(), __ATOMIC_ACQUIRE);
  if (!set) {
    set = vdb_best_kernels();
    vdb_choose(set);
  }
  return set;
}

