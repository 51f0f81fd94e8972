/* --- the operating system's files --- */
#define VDB_NAME_ROOM 8192u /* longer than any path that a system takes */

/* The file that a path leads to. */
typedef struct {
  char *path, *other, *temporary; /* [VDB_NAME_ROOM] each; path: without a symbolic link at its end */
  int exists;
#ifndef _WIN32
  struct stat status; /* if it exists */
#endif
  vdb_error error;                /* why it cannot be replaced; VDB_ERROR_IO for what errno says */
} vdb_target;

VDB_RARE int vdb_target_failed(vdb_target *target, vdb_error error, int number) {
  target->error = error;
  return number;
}

VDB_RARE const char *vdb_last_separator(const char *path) {
  const char *slash = strrchr(path, '/');
#ifdef _WIN32
  const char *other = strrchr(path, '\\');
  if (other && (!slash || other > slash)) slash = other;
#endif
  return slash;
}

/* The name of a new file beside the target: its own, cut to `most` bytes where a file system takes no longer one, with
 * what tells it from others. */
VDB_RARE void vdb_name_temporary(vdb_target *target, size_t most) {
  static unsigned counter;
  unsigned number = __atomic_fetch_add(&counter, 1u, __ATOMIC_RELAXED);
  const char *slash = vdb_last_separator(target->path), *name = slash ? slash + 1 : target->path;
  size_t size = strlen(name);
  for (size = vdb_min(size, most); size && ((unsigned char)name[size] & 0xc0u) == 0x80u;) size--; /* whole letters */
  size += (size_t)(name - target->path);
  memcpy(target->temporary, target->path, size);
  snprintf(target->temporary + size, 64, ".tmp-%ld-%u", (long)vdb_sys_getpid(), number);
}

#ifndef _WIN32
/* Follows symbolic links at the end of target->path, to a file that need not be there. 0 or errno. */
VDB_RARE int vdb_follow_links(vdb_target *target) {
  for (int hops = 0; hops < 40; hops++) {
    long size = vdb_sys_readlink(target->path, target->other, VDB_NAME_ROOM);
    if (size < 0) return errno == EINVAL || errno == ENOENT ? 0 : errno; /* no link, or nothing */
    const char *slash = strrchr(target->path, '/');
    size_t folder = slash && target->other[0] != '/' ? (size_t)(slash - target->path) + 1 : 0;
    if (folder + (size_t)size + 64 >= VDB_NAME_ROOM) return ENAMETOOLONG; /* 64: for a temporary name */
    memcpy(target->path + folder, target->other, (size_t)size);
    target->path[folder + (size_t)size] = 0;
  }
  return ELOOP;
}

/* What is at `path`, and whether it may be replaced. 0 or errno. */
VDB_RARE int vdb_find_target(const char *path, vdb_target *target) {
  struct stat seen;
  if (!*path) return vdb_target_failed(target, VDB_ERROR_IO, ENOENT);
  if (strlen(path) + 64 >= VDB_NAME_ROOM) return vdb_target_failed(target, VDB_ERROR_IO, ENAMETOOLONG);
  memcpy(target->path, path, strlen(path) + 1);
  target->exists = stat(path, &seen) == 0;
  if (!target->exists && errno != ENOENT) return vdb_target_failed(target, VDB_ERROR_IO, errno);
  if (target->exists && !S_ISREG(seen.st_mode))
    return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, S_ISDIR(seen.st_mode) ? EISDIR : EINVAL);
  int failed = vdb_follow_links(target);
  if (failed) return vdb_target_failed(target, VDB_ERROR_IO, failed);
  if (!target->exists) return 0;
  target->status = seen;
  /* A link of /proc may lead to a file that has no name any more. */
  if (stat(target->path, &seen) || seen.st_ino != target->status.st_ino || seen.st_dev != target->status.st_dev)
    return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, ENOENT);
  return seen.st_nlink > 1 ? vdb_target_failed(target, VDB_ERROR_LINKED, EMLINK) : 0;
}

/* An open file of a new name beside the target. -1 on failure. Names are tried again, for a killed process of our number
 * may have left some. */
VDB_RARE int vdb_create_beside(vdb_target *target) {
  static const size_t lengths[] = {VDB_NAME_ROOM, 200, 100, 20};
  int file = -1, length = 0;
  for (int attempt = 0; attempt < 100 && file < 0; attempt++) {
    vdb_name_temporary(target, lengths[length]);
    file = open(target->temporary, O_WRONLY | O_CREAT | O_EXCL, target->exists ? 0600 : 0666);
    if (file < 0 && errno == ENAMETOOLONG && length < 3) length++;
    else if (file < 0 && errno != EEXIST) break;
  }
  if (file >= 0) fcntl(file, F_SETFD, FD_CLOEXEC);
  return file;
}

/* Gives the new file the owner, group and mode of the one whose place it will take. 0 or errno. */
VDB_RARE int vdb_take_over(int file, const struct stat *old) {
  struct stat own;
  if (fstat(file, &own)) return errno;
  int others = own.st_uid != old->st_uid || own.st_gid != old->st_gid;
  unsigned user = own.st_uid == old->st_uid ? (unsigned)-1 : (unsigned)old->st_uid;
  if (others && vdb_sys_fchown(file, user, (unsigned)old->st_gid)) return errno;
  if ((others || own.st_mode != old->st_mode) && vdb_sys_fchmod(file, old->st_mode & 07777u)) return errno;
  return 0;
}

/* The new file, open for writing. -1 with errno and target->error set on failure. */
VDB_RARE int vdb_create_new(vdb_target *target) {
  int file = vdb_create_beside(target), failed = 0;
  target->error = VDB_ERROR_IO;
  if (file < 0) {
    if (target->exists && (errno == EACCES || errno == EPERM || errno == EROFS)) target->error = VDB_ERROR_FOLDER;
    return -1;
  }
  if (target->exists) failed = vdb_take_over(file, &target->status);
  if (!failed) return file;
  vdb_sys_close(file);
  vdb_sys_unlink(target->temporary);
  target->error = VDB_ERROR_OWNER;
  errno = failed;
  return -1;
}

/* The folder that holds `path`, to be synced after the rename. -1 if it may not be read: it is left to the system. */
VDB_RARE int vdb_open_folder(const char *path, char *name) {
  const char *slash = strrchr(path, '/');
  size_t size = slash ? (size_t)(slash - path) : 0;
  if (size) memcpy(name, path, size);
  if (!size) name[size++] = slash ? '/' : '.';
  name[size] = 0;
  int folder = open(name, O_RDONLY);
  if (folder >= 0) fcntl(folder, F_SETFD, FD_CLOEXEC);
  return folder;
}

/* Gives the finished file the name that nothing may have yet. 0 or errno. */
VDB_RARE int vdb_name_new(vdb_target *target) {
  if (vdb_sys_linkat(VDB_HERE, target->temporary, VDB_HERE, target->path, 0) == 0)
    return vdb_sys_unlink(target->temporary) ? errno : 0;
  if (errno == EEXIST) return vdb_target_failed(target, VDB_ERROR_CHANGED, EEXIST);
  return rename(target->temporary, target->path) ? errno : 0; /* a file system without hard links */
}

/* The finished file takes its name; then the folder is synced. Not every file system can; EINVAL says that it cannot. */
VDB_RARE int vdb_put_in_place(vdb_target *target, vdb_save_mode mode) {
  int folder = vdb_open_folder(target->path, target->other), failed = 0;
  if (mode == VDB_SAVE_NEW) {
    failed = vdb_name_new(target);
  } else if (rename(target->temporary, target->path)) {
    failed = errno;
    if (target->exists && (failed == EPERM || failed == EACCES)) target->error = VDB_ERROR_FOLDER;
  }
  while (folder >= 0 && !failed && vdb_sys_fsync(folder) && errno != EINVAL)
    if (errno != EINTR) failed = errno;
  if (folder >= 0) vdb_sys_close(folder);
  return failed;
}

VDB_RARE int vdb_is_there(const char *path) {
  struct stat status;
  return stat(path, &status) == 0;
}

/* Opens a file for reading; a pipe or a device is refused without waiting for it. -1 on failure. */
VDB_RARE int vdb_open_file(const char *path, uint64_t *size) {
  struct stat status;
  int file = open(path, O_RDONLY | O_NONBLOCK), failed = 0;
  if (file < 0) return -1;
  fcntl(file, F_SETFD, FD_CLOEXEC);
  if (fstat(file, &status)) failed = errno;
  if (!failed && !S_ISREG(status.st_mode)) failed = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
  if (!failed && (uint64_t)status.st_size > SIZE_MAX) failed = EFBIG;
  *size = (uint64_t)status.st_size;
  if (!failed) return file;
  vdb_sys_close(file);
  errno = failed;
  return -1;
}

/* A view of an open file, which may be written to, until vdb_protect_file, without changing the file: nobody reserves
 * memory for all of it, as little of it will be written to. NULL with errno on failure. */
VDB_RARE void *vdb_map_file(int file, size_t size, int writable) {
#ifdef MAP_NORESERVE
  int flags = MAP_PRIVATE | (writable ? MAP_NORESERVE : 0);
#else
  int flags = MAP_PRIVATE;
#endif
  void *base = mmap(NULL, size, writable ? PROT_READ | PROT_WRITE : PROT_READ, flags, file, 0);
  return base == MAP_FAILED ? NULL : base;
}

VDB_RARE void vdb_protect_file(void *base, size_t size) { (void)mprotect(base, size, PROT_READ); }

static inline void vdb_unmap_file(void *base, size_t size) { (void)munmap(base, size); }
#endif

