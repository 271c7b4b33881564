/* Brings the volumes to the end of the journal, before anything else is done with them. */
#ifndef PGCDP_REPLAY_H
#define PGCDP_REPLAY_H

#include <stdbool.h>

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

/* Everything of the journal behind write `applied`, from where `jr` stands; then the volumes are synced.
 * ERR_PRECONDITION for a write that lies outside of the volumes. */
int replay(struct jr *jr, const struct replay_volumes *to, uint64_t applied, struct replayed *out, struct err *e);

#endif
