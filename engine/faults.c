/* See faults.h. */
#include "faults.h"

#include <string.h>

#include "cleanup.h"
#include "log.h"

void faults_add(struct faults *f, int code, const struct err *e, const char *where)
{
    HOLD_LOCK(&f->lock);
    f->count++;
    for (unsigned i = 0; i < f->kept; i++)
        if (strcmp(f->first[i].err.message, e->message) == 0)
            return;
    if (f->kept == FAULTS_KEPT) /* a disk that is gone has an error for each block: the count tells how many */
        return;
    f->first[f->kept++] = (struct fault){.code = code, .err = *e};
    log_error("%s: %s", where, e->message);
}

unsigned faults_get(struct faults *f, struct fault out[FAULTS_KEPT], uint64_t *count)
{
    HOLD_LOCK(&f->lock);
    memcpy(out, f->first, f->kept * sizeof *out);
    *count = f->count;
    return f->kept;
}
