/* A FUSE connection that a holder keeps: how its descriptors come from the holder, and what its note says (FORMAT.md 6). */
#ifndef PGCDP_HELD_H
#define PGCDP_HELD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"
#include "format.h"

/* What a capture process has of its holder. */
struct held {
    int fuse;               /* the /dev/fuse that the holder opened and mounted */
    int note_fd;            /* shared memory of one page, which outlives each capture process */
    struct fmt_held_note *note;  /* its bytes */
};

/* ---- the capture process ---- */

/* Asks the holder at `socket`. ERR_PRECONDITION when none answers, it is not root's, or its connection has ended. */
int held_get(struct held **out, const char *socket, struct err *e);

/* Whether the note tells what a capture process and the kernel agreed on. ERR_PRECONDITION for a note of another version,
 * or one that is not whole. */
int held_agreed(const struct held *h, bool *agreed, struct err *e);

/* Notes what was agreed on: the kernel's FUSE_INIT and the answer to it, of at most FMT_HELD_NOTE_INIT bytes each. Before the
 * answer is given: a note without agreement means that the kernel waits for an answer still. */
int held_agree(struct held *h, const void *init, size_t init_length, const void *answer, size_t answer_length, struct err *e);

/* How many capture processes have served the connection. */
uint64_t held_captures(const struct held *h);

/* Forgets nothing, closes what is this process's. NULL is nothing. */
void held_close(struct held *h);

/* ---- the holder ---- */

/* Whether the connection has ended. It is looked at, not waited for: a waiter at /dev/fuse is woken by each request. */
bool held_ended(int fuse);

/* Listens at `path` (0600), not blocking. */
int held_listen(const char *path, struct err *e);

/* Hands both descriptors to whoever connects next, if that is root; 0, or -errno. */
int held_hand_out(int listener, int fuse, int note);

#endif
