/* The FUSE door: one directory, one file a volume (low-level libfuse 3). */
#ifndef PGCDP_FRONT_FUSE_H
#define PGCDP_FRONT_FUSE_H

#include "backend.h"
#include "err.h"

struct front;

/* Mounts at `mountpoint` (an absolute path, or /dev/fd/N of a /dev/fuse that somebody else mounted and keeps). */
int front_open(struct front **out, const struct backend *backend, const char *mountpoint, struct err *e);

/* Serves on this thread, the reader, until front_stop or an unmount from outside. */
int front_serve(struct front *front);

/* Files of this volume that are open now. Any thread. */
unsigned front_open_count(const struct front *front, unsigned volume);

/* The volume has become larger: the kernel asks for its size again. Any thread. */
int front_grown(struct front *front, unsigned volume);

/* Makes front_serve return, from any thread: unmounts, lazily with `force`. */
void front_stop(struct front *front);

void front_close(struct front *front);

#endif
