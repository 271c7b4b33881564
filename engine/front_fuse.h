/* The FUSE door: one directory, one file a volume (low-level libfuse 3). */
#ifndef PGCDP_FRONT_FUSE_H
#define PGCDP_FRONT_FUSE_H

#include "backend.h"
#include "err.h"
#include "held.h"

struct front;

/* Mounts at `mountpoint`, an absolute path. With `held` it is mounted already: the connection is the holder's, begun or taken
 * over as its note says, and goes on when this process ends. On the thread that will serve. */
int front_open(struct front **out, const struct backend *backend, const char *mountpoint, struct held *held, struct err *e);

/* Whether this engine could take over a connection that another one has begun: 0, or ERR_PRECONDITION. Asks the kernel nothing,
 * and leaves both as they are. */
int front_fits(struct held *held, struct err *e);

/* Serves on this thread, the reader, until front_stop, front_leave or an unmount from outside. Of a connection that was taken
 * over, first what the process before had taken and not answered. */
int front_serve(struct front *front);

/* Of a held connection: takes no more requests, and returns when front_serve has. What was taken and is not answered, the
 * next process gets. Any other thread. */
void front_leave(struct front *front);

/* Of a held connection: unmounts, then as front_leave. -EBUSY while a file in it is open: nothing is done. Any other thread. */
int front_unmount(struct front *front);

/* Requests of the process before that came again. Any thread. */
uint64_t front_resent(const struct front *front);

/* Files of this volume that are open now. Any thread. */
unsigned front_open_count(const struct front *front, unsigned volume);

/* The volume has become larger: the kernel asks for its size again. Any thread. */
int front_grown(struct front *front, unsigned volume);

/* Makes front_serve return, from any thread: unmounts, lazily with `force`. */
void front_stop(struct front *front);

void front_close(struct front *front);

#endif
