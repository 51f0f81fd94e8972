/* ------------------------------------------------------------------------------------------------------------------
 * 2 Platform
 *
 * gcc or clang on a little-endian POSIX system. The code is the common part of C11 and C++11. On Linux the functions of
 * unistd.h, and those that a strict -std=c11 hides, are declared here under names of our own: so a program may call
 * what is its own link, read or write.
 */
#if !defined(__GNUC__)
#error "vdb.h needs gcc or clang (vector extensions and per-function targets)"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "vdb.h needs a little-endian machine (its files are used in place)"
#endif

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#ifdef _WIN32
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <io.h>
#include <windows.h>
#else
#include <sys/mman.h>
#endif
#ifdef VDB_MULTITHREADED
#include <pthread.h>
#include <sched.h>
#endif
#if defined(VDB_PLAIN) || (defined(_WIN32) && !defined(__clang__)) /* gcc misaligns its stack there (gcc bug 54412) */
#elif defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define VDB_X86 1
#define VDB_TARGET(isa) __attribute__((target(isa)))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VDB_ARM 1
#endif

#if defined(__linux__) && defined(__LP64__)
#include <sys/syscall.h>
#ifdef __cplusplus
#define VDB_SYSTEM(returns, name, arguments) extern "C" returns vdb_sys_##name arguments __asm__(#name)
#else
#define VDB_SYSTEM(returns, name, arguments) extern returns vdb_sys_##name arguments __asm__(#name)
#endif
VDB_SYSTEM(int, posix_fallocate, (int, long, long));
VDB_SYSTEM(int, get_nprocs, (void));
VDB_SYSTEM(long, syscall, (long, ...));
#define VDB_HERE (-100) /* AT_FDCWD */
/* By number: in a program's own file even the name that the linker sees may be another function's. */
static inline int vdb_sys_close(int file) { return (int)vdb_sys_syscall(SYS_close, (long)file); }
static inline long vdb_sys_write(int file, const void *bytes, size_t size) {
  return vdb_sys_syscall(SYS_write, (long)file, bytes, size);
}
static inline long vdb_sys_pread(int file, void *bytes, size_t size, long at) {
  return vdb_sys_syscall(SYS_pread64, (long)file, bytes, size, at);
}
static inline long vdb_sys_lseek(int file, long at, int from) { return vdb_sys_syscall(SYS_lseek, (long)file, at, (long)from); }
static inline int vdb_sys_fsync(int file) { return (int)vdb_sys_syscall(SYS_fsync, (long)file); }
static inline int vdb_sys_ftruncate(int file, long size) { return (int)vdb_sys_syscall(SYS_ftruncate, (long)file, size); }
static inline int vdb_sys_unlink(const char *path) { return (int)vdb_sys_syscall(SYS_unlinkat, (long)VDB_HERE, path, 0L); }
static inline int vdb_sys_linkat(int from, const char *path, int to, const char *name, int flags) {
  return (int)vdb_sys_syscall(SYS_linkat, (long)from, path, (long)to, name, (long)flags);
}
static inline long vdb_sys_readlink(const char *path, char *to, size_t size) {
  return vdb_sys_syscall(SYS_readlinkat, (long)VDB_HERE, path, to, size);
}
static inline int vdb_sys_fchown(int file, unsigned user, unsigned group) {
  return (int)vdb_sys_syscall(SYS_fchown, (long)file, (long)(int)user, (long)(int)group);
}
static inline int vdb_sys_fchmod(int file, unsigned mode) { return (int)vdb_sys_syscall(SYS_fchmod, (long)file, (long)mode); }
static inline long vdb_sys_getpid(void) { return vdb_sys_syscall(SYS_getpid); }
static inline int vdb_sys_madvise(void *memory, size_t size, int advice) {
  return (int)vdb_sys_syscall(SYS_madvise, memory, size, (long)advice);
}
#elif defined(_WIN32)
#define vdb_sys_close _close
#define vdb_sys_fsync _commit
#define vdb_sys_unlink _unlink
static inline long vdb_sys_getpid(void) { return (long)GetCurrentProcessId(); }
static inline int64_t vdb_sys_lseek(int file, int64_t place, int from) { return _lseeki64(file, place, from); }
static inline long vdb_sys_write(int file, const void *bytes, size_t size) {
  return _write(file, bytes, (unsigned)(size < 1u << 30 ? size : 1u << 30));
}
static inline long vdb_sys_pread(int file, void *to, size_t size, int64_t at) {
  OVERLAPPED place;
  DWORD got = 0;
  memset(&place, 0, sizeof place);
  place.Offset = (DWORD)at;
  place.OffsetHigh = (DWORD)(at >> 32);
  if (ReadFile((HANDLE)_get_osfhandle(file), to, (DWORD)(size < 1u << 30 ? size : 1u << 30), &got, &place)) return (long)got;
  if (GetLastError() == ERROR_HANDLE_EOF) return 0;
  errno = EIO;
  return -1;
}
static inline int vdb_sys_get_nprocs(void) {
  SYSTEM_INFO system;
  GetSystemInfo(&system);
  return (int)system.dwNumberOfProcessors;
}
#else
#include <unistd.h>
#define vdb_sys_close close
#define vdb_sys_write write
#define vdb_sys_pread pread
#define vdb_sys_lseek lseek
#define vdb_sys_fsync fsync
#define vdb_sys_ftruncate ftruncate
#define vdb_sys_posix_fallocate posix_fallocate
#define vdb_sys_unlink unlink
#define vdb_sys_linkat linkat
#define vdb_sys_readlink readlink
#define vdb_sys_fchown fchown
#define vdb_sys_fchmod fchmod
#define vdb_sys_getpid getpid
#define vdb_sys_madvise madvise
#define vdb_sys_syscall syscall
#define VDB_HERE AT_FDCWD
static inline int vdb_sys_get_nprocs(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
#endif

#if !defined(VDB_MALLOC) && !defined(VDB_FREE) && !defined(VDB_REALLOC)
#define VDB_REALLOC realloc
#endif
#ifndef VDB_MALLOC
#define VDB_MALLOC malloc
#endif
#ifndef VDB_FREE
#define VDB_FREE free
#endif

#ifdef ESTALE
#define VDB_STALE ESTALE
#else
#define VDB_STALE EBUSY
#endif

#define VDB_INLINE static inline __attribute__((always_inline))
/* gcc spends most of its time on making code quick. What is no inner loop has one body, which is called; loops over rows
 * that wait for memory or files are compiled with less effort, and with none what seldom runs and does not loop. */
#if defined(__clang__)
#define VDB_EFFORT(level)
#else
#define VDB_EFFORT(level) __attribute__((optimize(level)))
#endif
#define VDB_ONCE static __attribute__((noinline, unused))
#define VDB_LIGHT static __attribute__((noinline, unused)) VDB_EFFORT("O1")
#define VDB_RARE static __attribute__((cold, noinline, unused)) VDB_EFFORT("O0")
/* gcc compiles what is neither kernel nor scan nor graph, but for what stores vectors, with less effort; not where nothing was
 * asked of it, or a small size. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__)
#define VDB_CALM
#endif
#define VDB_ALIGNMENT 64u /* of every array of rows; as many readable bytes follow each */

VDB_INLINE size_t vdb_min(size_t a, size_t b) { return a < b ? a : b; }
VDB_INLINE size_t vdb_max(size_t a, size_t b) { return a > b ? a : b; }
VDB_INLINE size_t vdb_round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

/* 64-byte aligned memory from VDB_MALLOC, the address that VDB_FREE needs kept just before it. Not cleared. */
VDB_ONCE void *vdb_aligned_alloc(size_t bytes) {
  if (bytes > SIZE_MAX - 2 * VDB_ALIGNMENT) return NULL;
  unsigned char *raw = (unsigned char *)VDB_MALLOC(bytes + 2 * VDB_ALIGNMENT);
  if (!raw) return NULL;
  uintptr_t address = ((uintptr_t)raw + sizeof(void *) + VDB_ALIGNMENT - 1) & ~(uintptr_t)(VDB_ALIGNMENT - 1);
  unsigned char *aligned = raw + (address - (uintptr_t)raw);
  memcpy(aligned - sizeof(void *), &raw, sizeof(void *));
  return aligned;
}

/* Huge pages for the inside of a large allocation, where the system has them: rows met on a walk over a graph lie
 * anywhere, and with small pages most of them would miss the TLB. */
static inline void vdb_advise_huge(void *memory, size_t bytes) {
#ifdef __linux__
  uintptr_t page = (uintptr_t)1 << 21, begin = ((uintptr_t)memory + page - 1) & ~(page - 1);
  uintptr_t end = ((uintptr_t)memory + bytes) & ~(page - 1);
  if (begin < end) (void)vdb_sys_madvise((unsigned char *)memory + (begin - (uintptr_t)memory), end - begin, 14); /* HUGEPAGE */
#else
  (void)memory, (void)bytes;
#endif
}

VDB_ONCE void vdb_aligned_free(void *pointer) {
  void *raw;
  if (!pointer) return;
  memcpy(&raw, (unsigned char *)pointer - sizeof(void *), sizeof(void *));
  VDB_FREE(raw);
}

