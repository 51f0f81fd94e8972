#ifdef _WIN32
/* Windows. Paths are in the code page of the process, as for fopen. ReplaceFile keeps attributes and access control
 * lists; it does not replace a file that is open elsewhere or mapped, which is VDB_ERROR_IO with EACCES. */
VDB_RARE int vdb_windows_errno(void) {
  switch (GetLastError()) {
    case ERROR_FILE_NOT_FOUND:
    case ERROR_PATH_NOT_FOUND: return ENOENT;
    case ERROR_FILE_EXISTS:
    case ERROR_ALREADY_EXISTS: return EEXIST;
    case ERROR_ACCESS_DENIED:
    case ERROR_SHARING_VIOLATION:
    case ERROR_LOCK_VIOLATION:
    case ERROR_USER_MAPPED_FILE:
    case ERROR_UNABLE_TO_REMOVE_REPLACED: return EACCES;
    case ERROR_DISK_FULL: return ENOSPC;
    case ERROR_NOT_ENOUGH_MEMORY: return ENOMEM;
    default: return EIO;
  }
}

/* What is at `path`, and whether it may be replaced. 0 or errno. */
VDB_RARE int vdb_find_target(const char *path, vdb_target *target) {
  BY_HANDLE_FILE_INFORMATION seen;
  if (!*path) return vdb_target_failed(target, VDB_ERROR_IO, ENOENT);
  if (strlen(path) + 64 >= VDB_NAME_ROOM) return vdb_target_failed(target, VDB_ERROR_IO, ENAMETOOLONG);
  memcpy(target->path, path, strlen(path) + 1);
  DWORD attributes = GetFileAttributesA(path), share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
  HANDLE file = CreateFileA(path, 0, share, NULL, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS, NULL);
  target->exists = file != INVALID_HANDLE_VALUE;
  if (!target->exists) {
    int failed = vdb_windows_errno();
    return failed == ENOENT ? 0 : vdb_target_failed(target, VDB_ERROR_IO, failed);
  }
  int disk = GetFileType(file) == FILE_TYPE_DISK && GetFileInformationByHandle(file, &seen);
  int named = 1;
  if (disk && attributes != INVALID_FILE_ATTRIBUTES && attributes & FILE_ATTRIBUTE_REPARSE_POINT) { /* a link: follow it */
    DWORD size = GetFinalPathNameByHandleA(file, target->path, VDB_NAME_ROOM - 64, 0);
    named = size && size < VDB_NAME_ROOM - 64;
  }
  CloseHandle(file);
  if (!disk) return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, EINVAL);
  if (seen.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) return vdb_target_failed(target, VDB_ERROR_NOT_REGULAR, EISDIR);
  if (!named) return vdb_target_failed(target, VDB_ERROR_IO, ENAMETOOLONG);
  return seen.nNumberOfLinks > 1 ? vdb_target_failed(target, VDB_ERROR_LINKED, EMLINK) : 0;
}

/* The new file, open for writing. -1 with errno and target->error set on failure. */
VDB_RARE int vdb_create_new(vdb_target *target) {
  static const size_t lengths[] = {VDB_NAME_ROOM, 200, 100, 20};
  int file = -1;
  for (int attempt = 0; attempt < 100 && file < 0; attempt++) {
    vdb_name_temporary(target, lengths[attempt < 4 ? attempt : 3]);
    file = _open(target->temporary, _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT, _S_IREAD | _S_IWRITE);
    if (file < 0 && errno != EEXIST && attempt >= 3) break;
  }
  target->error = file < 0 && target->exists && errno == EACCES ? VDB_ERROR_FOLDER : VDB_ERROR_IO;
  return file;
}

VDB_RARE int vdb_put_in_place(vdb_target *target, vdb_save_mode mode) {
  DWORD flags = MOVEFILE_WRITE_THROUGH | (mode == VDB_SAVE_NEW ? 0 : MOVEFILE_REPLACE_EXISTING);
  if (mode != VDB_SAVE_NEW && target->exists && ReplaceFileA(target->path, target->temporary, NULL, 0, NULL, NULL)) return 0;
  if ((mode == VDB_SAVE_NEW || !target->exists) && MoveFileExA(target->temporary, target->path, flags)) return 0;
  int failed = vdb_windows_errno();
  return failed == EEXIST ? vdb_target_failed(target, VDB_ERROR_CHANGED, EEXIST) : failed;
}

VDB_RARE int vdb_is_there(const char *path) { return GetFileAttributesA(path) != INVALID_FILE_ATTRIBUTES; }

/* Opens a file for reading, which others may replace meanwhile. -1 on failure. */
VDB_RARE int vdb_open_file(const char *path, uint64_t *size) {
  LARGE_INTEGER length;
  DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
  HANDLE handle = CreateFileA(path, GENERIC_READ, share, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
  if (handle == INVALID_HANDLE_VALUE) {
    errno = vdb_windows_errno();
    return -1;
  }
  int regular = GetFileType(handle) == FILE_TYPE_DISK && GetFileSizeEx(handle, &length);
  if (regular && (uint64_t)length.QuadPart <= SIZE_MAX) {
    int file = _open_osfhandle((intptr_t)handle, _O_RDONLY | _O_BINARY | _O_NOINHERIT);
    *size = (uint64_t)length.QuadPart;
    if (file >= 0) return file;
  }
  CloseHandle(handle);
  errno = regular ? EFBIG : EINVAL;
  return -1;
}

/* A view of an open file, which may be written to without changing the file. NULL with errno on failure. */
VDB_RARE void *vdb_map_file(int file, size_t size, int writable) {
  DWORD pages = writable ? PAGE_WRITECOPY : PAGE_READONLY;
  HANDLE mapping = CreateFileMappingA((HANDLE)_get_osfhandle(file), NULL, pages, 0, 0, NULL);
  void *base = mapping ? MapViewOfFile(mapping, writable ? FILE_MAP_COPY : FILE_MAP_READ, 0, 0, size) : NULL;
  if (!base) errno = vdb_windows_errno();
  if (mapping) CloseHandle(mapping); /* the view keeps it */
  return base;
}

VDB_RARE void vdb_protect_file(void *base, size_t size) {
  DWORD before;
  (void)VirtualProtect(base, size, PAGE_READONLY, &before);
}

static inline void vdb_unmap_file(void *base, size_t size) {
  (void)size;
  UnmapViewOfFile(base);
}
#endif

