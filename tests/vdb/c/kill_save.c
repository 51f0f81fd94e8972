/* A process that saves over an existing file is killed at random moments: the file is always whole, old or new.
 *     kill_save FOLDER [TIMES] */
#include "files_case.h"
#include <dirent.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

static void save_for_ever(const char *path) {
  database_case small = {32, 2000, VDB_METRIC_COSINE, VDB_STORAGE_F32_I8, VDB_INDEX_FLAT, 1, 0, 0}, large = small;
  large.rows = 6000;
  vdb_database *a = make_database(&small), *b = make_database(&large);
  for (;;) CHECK(vdb_save(a, path) == VDB_OK && vdb_save(b, path) == VDB_OK);
}

/* Removes what killed processes left. */
static size_t sweep(const char *folder) {
  size_t swept = 0;
  char path[1024];
  DIR *entries = opendir(folder);
  for (struct dirent *entry; (entry = readdir(entries));) {
    if (!strstr(entry->d_name, ".tmp-")) continue;
    snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
    swept += unlink(path) == 0;
  }
  closedir(entries);
  return swept;
}

int main(int count, char **arguments) {
  char path[512], message[200];
  size_t seen[2] = {0, 0}, left = 0;
  int times = count > 2 ? atoi(arguments[2]) : 300;
  CHECK(count >= 2);
  mkdir(arguments[1], 0777);
  snprintf(path, sizeof path, "%s/file", arguments[1]);
  random_state ^= (uint64_t)time(NULL);
  for (int i = 0; i < times; i++) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) save_for_ever(path);
    struct stat status;
    while (i == 0 && stat(path, &status)) usleep(1000);
    usleep(i == 0 ? 0 : 10000 + random_u32() % 30000);
    kill(child, SIGKILL);
    CHECK(waitpid(child, NULL, 0) == child);
    vdb_database *db = NULL;
    vdb_error error = vdb_verify(path, message, sizeof message);
    if (error) fprintf(stderr, "%s\n", message);
    CHECK(error == VDB_OK && vdb_open(path, VDB_OPEN_READ, 1, &db) == VDB_OK);
    CHECK(vdb_count(db) == 2000 || vdb_count(db) == 6000);
    seen[vdb_count(db) == 6000]++;
    vdb_destroy(db);
    left += sweep(arguments[1]);
  }
  unlink(path);
  rmdir(arguments[1]);
  printf("kill_save: %d kills, the file always whole (%zu and %zu); %zu of them left a temporary file\n", times, seen[0],
         seen[1], left);
  return 0;
}
