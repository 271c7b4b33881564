/* Brings writes from the journal to the volumes: at a start all behind the applied mark, and behind a failed sync what that may have
 * lost (rewrite.c). */
#ifndef PGCDP_REPLAY_H
#define PGCDP_REPLAY_H

#include <stdbool.h>
#include <stdint.h>

#include "backing.h"
#include "err.h"
#include "journal_read.h"

struct replay_volumes {
    const struct volume *volumes;
    unsigned count;
    bool put_back; /* the journal may hold writes to one volume more, which is given up */
};

struct replayed {
    uint64_t writes; /* so many */
    bool inside;     /* as FMT_APPLIED_INSIDE: at first as the mark has it, then behind all of them */
};

#define REPLAY_ALL UINT64_MAX

/* The journal's writes behind `applied` up to `last` or to its end, from where `jr` stands; then the volumes are synced.
 * ERR_PRECONDITION for a write that lies outside of the volumes. */
int replay(struct jr *jr, const struct replay_volumes *to, uint64_t applied, uint64_t last, struct replayed *out, struct err *e);

#endif
