/* What a door (FUSE today) serves: a vtable in the manner of nbdkit's.
 *
 * Contract, for every method that takes a cookie:
 *  - the backend completes the request exactly once, on any thread, by the done function it was given; before or after
 *    the method returns;
 *  - offset and length are multiples of 4096, length is not 0, the range lies inside the volume: the door sees to it;
 *  - `data` of a write is only valid during the call;
 *  - a write, zero or discard is completed only when it is durable: a flush has nothing left to do;
 *  - methods are called by one thread at a time (the reader), and do no I/O on it.
 */
#ifndef PGCDP_BACKEND_H
#define PGCDP_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct done {
    /* `error` 0 or -errno. */
    void (*write)(void *cookie, size_t length, int error);
    void (*read)(void *cookie, const void *data, size_t length, int error);
};

struct backend {
    void *self;
    unsigned volumes;
    const char *(*name)(void *self, unsigned volume);
    uint64_t (*size)(void *self, unsigned volume);
    void (*read)(void *self, unsigned volume, uint64_t offset, size_t length, void *cookie);
    void (*write)(void *self, unsigned volume, uint64_t offset, const void *data, size_t length, void *cookie);
    /* The range reads back as zeros; `discard` says which of the two records it becomes. */
    void (*zero)(void *self, unsigned volume, uint64_t offset, uint64_t length, bool discard, void *cookie);
    void (*set_done)(void *self, const struct done *done);
};

#define BACKEND_MAX_REQUEST ((size_t)1 << 20) /* bytes of one read or write */

#endif
