/* Notes on the design (docs/decisions/2026-11-29-failed-sync.md).
 *
 * A failed sync leaves a volume in any state between the last sync that succeeded and now: the kernel may call pages clean that never
 * reached the disk, and tells of it once. All of it is durable in the journal, which is never recycled behind the last sync. So it is
 * written once more, in order, and synced:
 *
 *     journal   ... | synced_write ........ applied_write | ........ durable_write
 *     volumes         may have lost any of these            not there yet, in the ring
 *
 * The applier does it, and applies nothing meanwhile: what is in the ring comes behind it, as ever. Whoever reads a block that is not in
 * the ring waits (reads.c); without that Postgres would read the older block, change it, and make the loss its own.
 */
#include "journal_read.h"
#include "log.h"
#include "replay.h"
#include "volume_set.h"

static int rewrite_once(struct volume_set *vs, uint64_t applied, uint64_t *writes, struct err *e)
{
    struct jr *jr;
    struct replayed replayed = {.writes = 0};
    struct replay_volumes to = {.volumes = vs->volumes, .count = vs->count};
    int rc = jr_open(&jr, vs->journal, vs->set_id, e);
    if (rc)
        return rc;
    rc = jr_seek(jr, vs->synced_write + 1, e);
    if (rc == 0)
        rc = replay(jr, &to, vs->synced_write, applied, &replayed, e);
    jr_close(jr);
    *writes = replayed.writes;
    if (rc == 0 && replayed.writes != applied - vs->synced_write)
        return err_set(e, JR_DAMAGE, "the journal has %lu of the writes %lu to %lu", replayed.writes, vs->synced_write + 1, applied);
    return rc;
}

int vs_rewrite(struct volume_set *vs, uint64_t applied, struct err *e)
{
    uint64_t writes = 0;
    int rc = JR_STALE;
    for (int i = 0; rc == JR_STALE && i < JR_STALE_ATTEMPTS; i++)
        rc = rewrite_once(vs, applied, &writes, e);
    if (rc == 0)
        log_warn("the volumes have again what a failed sync may have lost: %lu writes up to %lu, and they are synced", writes, applied);
    return rc;
}
