/* Release at the end of a scope: `CLEANUP_FREE char *p = ...;`, `CLEANUP_CLOSE int fd = -1;`, `HOLD_LOCK(&mutex);` */
#ifndef PGCDP_CLEANUP_H
#define PGCDP_CLEANUP_H

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void cleanup_free(void *p) { free(*(void **)p); }

static inline void cleanup_close(const int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void cleanup_unlock(pthread_mutex_t **lock) { pthread_mutex_unlock(*lock); }

#define CLEANUP_FREE __attribute__((cleanup(cleanup_free)))
#define CLEANUP_CLOSE __attribute__((cleanup(cleanup_close)))
#define HOLD_LOCK(lock)                                                              \
    __attribute__((cleanup(cleanup_unlock), unused)) pthread_mutex_t *held_lock = (lock); \
    pthread_mutex_lock(held_lock)

#endif
