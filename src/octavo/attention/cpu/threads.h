/* Work on the threads of the OpenMP runtime that torch has loaded. Threads of our own lose: torch's keep
   spinning on their cores after each of its operators, and with all cores taken ours displace the caller.
   Where that runtime has another interface, and in a forked child, whose parent's threads it would wait
   for in vain, a call uses its own thread only. Needs _GNU_SOURCE, for RTLD_DEFAULT. */
#ifndef OCTAVO_THREADS_H
#define OCTAVO_THREADS_H

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

typedef void Parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static Parallel *parallel;
static pthread_once_t found = PTHREAD_ONCE_INIT;

static void forget_threads(void) { parallel = NULL; }

static void look_for_threads(void) {
    void *symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    memcpy(&parallel, &symbol, sizeof parallel); /* ISO C has no cast from object to function */
    pthread_atfork(NULL, NULL, forget_threads);
}

static void find_threads(void) { pthread_once(&found, look_for_threads); }

/* Runs `body` on up to `threads` threads at once, this one among them, and waits for all. */
static void on_threads(void (*body)(void *), void *data, int threads) {
    if (threads > 1 && parallel) parallel(body, data, (unsigned)threads, 0);
    else body(data);
}

#endif
