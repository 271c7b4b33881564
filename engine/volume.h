/* The volume set: journal first, then the volumes. Fills the vtable of backend.h. */
#ifndef PGCDP_VOLUME_H
#define PGCDP_VOLUME_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "backing.h"
#include "err.h"
#include "journal_write.h"

struct volume_set;
struct tracked;

enum vs_trouble { VS_APPLY, VS_SYNC, VS_MARK, VS_READ, VS_TRACK, VS_TROUBLES };

struct volume_status {
    bool stalled;         /* writes wait: the journal cannot grow, or a volume cannot be written */
    uint64_t last_write;  /* newest number given */
    uint64_t applied_write; /* on the volumes, perhaps not yet synced */
    uint64_t unapplied_bytes, parked_bytes;
    bool tracks;          /* it can: on_full = track */
    bool tracking;        /* the journal lacks what the volumes have, */
    bool healing;         /* ... and gets it now */
    uint64_t tracked_blocks, tracked_behind; /* so many; changed behind this write, */
    uint64_t tracked_since_ns;               /* ... from this time on (wall clock) */
    uint64_t writes, reads, bytes_written, bytes_read;
    char errors[VS_TROUBLES][256]; /* what does not work now, or "" */
};

struct vs_found { /* what a restart found */
    uint64_t last_write;     /* all up to this one is applied and synced */
    bool inside;             /* it lies inside a rewind in place, or a gap that is taken in while Postgres is stopped */
    struct tracked *tracked; /* may be NULL; it is the set's from now on, and one that is not idle is gone on with */
    const char *journal;     /* its directory, and whose it is: they stay until vs_free */
    const uint8_t *set_id;
};

/* Starts committer, applier and completer. Owns the fds from now on. The `volumes` stay where they are until vs_free; they may grow
 * meanwhile. A gap begins only with `track`. */
int vs_start(struct volume_set **out, struct volume *volumes, unsigned count, struct jw *jw, const struct vs_found *found, bool track,
             struct err *e);

struct backend vs_backend(struct volume_set *vs);

/* A mark with this name, durable when it returns 0. -EAGAIN while the journal is full (it may become durable later), VS_IN_GAP
 * where it would lie in a gap. */
#define VS_IN_GAP (-EINPROGRESS)
int vs_mark(struct volume_set *vs, const char *name, uint8_t flags, uint64_t *write);

/* Everything taken so far is durable in the journal when it returns 0. -EAGAIN while the journal is full, VS_IN_GAP while changes are
 * tracked. */
int vs_cut(struct volume_set *vs, uint64_t *durable_write);

/* Everything durable at the call is on the volumes and synced when it returns 0. Where a sync fails, when it was tried to write again
 * what that lost. */
int vs_sync(struct volume_set *vs, uint64_t *applied_write, struct err *e);

/* While changes are tracked: begins to bring them into the journal, behind the begin record of a gap. ERR_PRECONDITION when nothing
 * is tracked, -EAGAIN when the journal has no room. */
int vs_heal(struct volume_set *vs, struct err *e);

/* The bitmap has room for so many bytes of a volume when it returns 0. VS_IN_GAP while it is in use. */
int vs_grow(struct volume_set *vs, unsigned volume, uint64_t bytes, struct err *e);

/* Looks at once whether segments have become free (after jw_release). */
void vs_wake(struct volume_set *vs);

void vs_get_status(struct volume_set *vs, struct volume_status *out);

/* No method of the backend is called any more. Applies everything, syncs, marks the journal clean. What waits in the calls
 * above is sent home with -ECANCELED; they may still come until vs_free. */
int vs_stop(struct volume_set *vs, struct err *e);

/* After vs_stop, when nobody calls any more. NULL is nothing. */
void vs_free(struct volume_set *vs);

#endif
