/* What becomes of writes when the journal cannot grow, with on_full = track. Notes on the design: tracking.c. */
#ifndef PGCDP_TRACKING_H
#define PGCDP_TRACKING_H

#include "volume_set.h"

#define TRACK_AFTER_NS ((uint64_t)3000000000) /* writes wait so long for room in the journal: a gap is worse than that */

/* Goes on with what the bitmap says, before any thread runs. */
int tracking_resume(struct volume_set *vs, struct err *e);

/* ---- the committer ---- */

/* From now on changes are tracked, when it returns 0; the first of them was taken at `since_ns`. Else writes go on waiting. */
int tracking_begin(struct volume_set *vs, uint64_t since_ns);

/* The batch's blocks are noted, its writes on the volumes and synced when it returns 0. */
int tracking_commit(struct volume_set *vs, const struct fmt_record *records, uint32_t count, struct block *room);

/* Before the next try; called with the lock. */
void tracking_wait(struct volume_set *vs);

/* Somebody wants it: the journal gets what it lacks, if it has room. */
void tracking_heal(struct volume_set *vs);

/* While healing: these records are durable in the journal. Without any: the end of the gap is tried again. */
void tracking_journalled(struct volume_set *vs, const struct fmt_record *records, uint32_t count);

/* ---- called with the lock ---- */

/* While healing: the journal gets these blocks by this record. */
void tracking_taken(struct volume_set *vs, const struct fmt_record *r);

/* These records were committed: in the journal with this `data`, or tracked, without (NULL). */
void tracking_marks(struct volume_set *vs, const struct fmt_record *records, uint32_t count, const uint8_t *data);

void tracking_status(struct volume_set *vs, struct volume_status *out);

/* ---- the hot copy ---- */

void *copier_main(void *vs);

/* The name that both records of the gap bear; its length. */
size_t tracking_name(const struct volume_set *vs, char out[48]);

#endif
