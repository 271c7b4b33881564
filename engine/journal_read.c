/*
 * Reading a journal (FORMAT.md 1.5).
 *
 * Notes on the design
 *
 * Position. (`at`, `offset`) is where batch `next_batch` with first write `next_write` is expected; (`prev_segment`,
 * `prev_end`) is where the batch before ended, which that batch must repeat. The two differ only just after a
 * move to another segment.
 *
 * Rule 3 asks whether the next segment goes on from here. A segment can be given up before anything in it was
 * acknowledged (two failed syncs in a row, or a kill while the first batch after a restart was on its way), so *all*
 * later segments are asked, the last one first. That admits nothing else: a first batch that has the expected number
 * and names this place says that nothing between the two was ever acknowledged.
 *
 * Rule 4 is kept more strictly than its wording. The writer has one batch on its way at a time, so a batch *header* of
 * this segment's salt with a number above the expected one proves that the expected batch was durable once, even when
 * the later batch is itself torn. (Data of the expected batch cannot hold such a header: its number was not given out.)
 *
 * A live journal. The capture process may finish a batch between our look at it and our look behind it. What seems
 * damaged is therefore looked at twice: the expected batch is durable before a later one is begun.
 */
#include "journal_read.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cleanup.h"
#include "io.h"
#include "journal_files.h"
#include "util.h"

/* ---- where the next batch is ---- */

static void stand_at(struct jr *jr, size_t index, uint64_t offset, const struct fmt_batch *h)
{
    jr->started = true;
    jr->first_lost = false;
    jr->at = index;
    jr->offset = offset;
    jr->next_batch = h->number;
    jr->next_write = h->first_write;
    jr->prev_segment = h->prev_segment;
    jr->prev_end = h->prev_end;
}

/* Whether a batch continues the journal from where we stand; at the start, whether it continues what is gone. */
static bool continues(const struct jr *jr, const struct fmt_batch *h)
{
    if (!jr->started)
        return h->prev_segment < jr->segments[0].sequence;
    return h->number == jr->next_batch && h->first_write == jr->next_write && h->prev_segment == jr->prev_segment &&
           h->prev_end == jr->prev_end;
}

/*
 * Rule 3, and rule 2 at the start: the last of the segments from `from` on whose first batch is valid and continues
 * the journal. Returns 1 with its index and its batch loaded, 0 or -errno.
 */
static int find_continuation(struct jr *jr, size_t from, size_t *index, struct err *e)
{
    for (size_t i = jr->count; i-- > from;) {
        struct fmt_batch h;
        int rc = jr_read_header(jr, i, BLOCK, &h, e);
        if (rc == 1 && continues(jr, &h))
            rc = jr_read_batch(jr, i, BLOCK, e);
        else if (rc >= 0)
            continue;
        if (rc < 0)
            return rc;
        if (rc == 1) {
            *index = i;
            return 1;
        }
    }
    return 0;
}

/*
 * The first block from `offset` on in a segment that tells of a batch after the expected one: 1 with its place and
 * header, 0 or -errno. With `valid`, only batches that are valid, and also the expected one.
 */
static int find_later(struct jr *jr, size_t index, uint64_t offset, bool valid, uint64_t *place, struct fmt_batch *h,
                      struct err *e)
{
    const struct jr_segment *s = &jr->segments[index];
    for (uint64_t base = offset; base < s->size; base += SCAN_BYTES) {
        uint64_t length = min_u64(SCAN_BYTES, s->size - base);
        int rc = jr_read_segment(jr, index, jr->scan, length, base, e);
        if (rc)
            return rc;
        for (uint64_t i = 0; i < length; i += BLOCK) {
            memcpy(h, jr->scan + i, sizeof *h);
            if (!jr_plausible(h, s, base + i) || h->number < jr->next_batch)
                continue;
            *place = base + i;
            bool expected_here = index == jr->at && base + i == jr->offset;
            if (!valid && !expected_here && h->number > jr->next_batch)
                return 1;
            rc = jr_read_batch(jr, index, base + i, e);
            if (rc)
                return rc;
        }
    }
    return 0;
}

/* Rule 4 over this segment and all later ones. */
static int find_proof(struct jr *jr, bool valid, size_t *index, uint64_t *place, struct fmt_batch *h, struct err *e)
{
    for (size_t i = jr->at; i < jr->count; i++) {
        int rc = find_later(jr, i, i == jr->at ? jr->offset : BLOCK, valid, place, h, e);
        *index = i;
        if (rc)
            return rc;
    }
    return 0;
}

static int damage_here(const struct jr *jr, const struct fmt_batch *proof, struct err *e)
{
    char name[32], lost[64];
    jr_segment_name(name, jr->segments[jr->at].sequence);
    if (jr->first_lost)
        snprintf(lost, sizeof lost, "writes up to %" PRIu64, proof ? proof->first_write - 1 : jr->mark.durable_write);
    else if (proof && proof->first_write > jr->next_write)
        snprintf(lost, sizeof lost, "writes %" PRIu64 " to %" PRIu64, jr->next_write, proof->first_write - 1);
    else
        snprintf(lost, sizeof lost, "writes from %" PRIu64 " on", jr->next_write);
    err_set(e, JR_DAMAGE, "segment %s/%s is damaged at offset %" PRIu64 ": its batch is not what was written; %s"
            " cannot be read", jr->dir, name, jr->offset, lost);
    if (jr->next_write > 1)
        err_hint(e, "writes up to %" PRIu64 " are whole, as far as this journal holds them", jr->next_write - 1);
    return JR_DAMAGE;
}

/* Whether the file that we read is still the segment that we opened; a recycled one is no damage. */
static int still_there(struct jr *jr, struct err *e)
{
    char name[32];
    struct fmt_segment h;
    jr_segment_name(name, jr->segments[jr->at].sequence);
    CLEANUP_CLOSE int fd = openat(jr->dir_fd, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || io_pread(fd, &h, sizeof h, 0) || h.salt != jr->segments[jr->at].salt)
        return jr_stale(jr, jr->at, e);
    return 0;
}

/* No batch belongs here: 0 when this is the end, JR_DAMAGE by rule 4. */
static int end_or_damage(struct jr *jr, struct err *e)
{
    size_t index;
    uint64_t place;
    struct fmt_batch proof;
    int rc = find_proof(jr, false, &index, &place, &proof, e);
    if (rc < 0)
        return rc;
    if (rc == 1) {
        rc = still_there(jr, e);
        return rc ? rc : damage_here(jr, &proof, e);
    }
    if (jr->marked && jr->mark.durable_write >= jr->next_write) {
        rc = still_there(jr, e);
        return rc ? rc : damage_here(jr, NULL, e);
    }
    jr->torn = false;
    for (size_t i = jr->at; i < jr->count && !jr->torn; i++) {
        rc = jr_read_header(jr, i, i == jr->at ? jr->offset : BLOCK, &proof, e);
        if (rc < 0)
            return rc;
        jr->torn = rc == 1;
    }
    return 0;
}

/* Rule 2: finds the first batch, and checks that nothing is missing before it. 1, 0 (there is none) or -errno. */
static int start(struct jr *jr, struct err *e)
{
    if (!jr->count)
        return 0;
    size_t index;
    /* Only segments whose writes are applied and released, by a durable mark, are ever used again. */
    uint64_t done = min_u64(jr->mark.applied_write, jr->mark.released_write);
    int rc = find_continuation(jr, 0, &index, e);
    if (rc < 0)
        return rc;
    if (rc == 1) {
        const struct fmt_batch *h = jr_loaded(jr);
        if (h->first_write > done + 1)
            return err_set(e, JR_DAMAGE,
                           "journal %s begins with write %" PRIu64 " in segment %016" PRIu64
                           ".seg, but writes from %" PRIu64 " on were still needed: segments before it are missing",
                           jr->dir, h->first_write, jr->segments[index].sequence, done + 1);
        stand_at(jr, index, BLOCK, h);
        return 1;
    }
    /* Nothing was written since all that came before was released: the mark knows where the numbers stand. */
    bool gone = jr->mark.durable_segment < jr->segments[0].sequence && done == jr->mark.durable_write;
    struct fmt_batch h = {.number = 1, .first_write = 1};
    if (jr->marked && gone)
        h = (struct fmt_batch){.number = jr->mark.durable_batch + 1,
                               .first_write = jr->mark.durable_write + 1,
                               .prev_segment = jr->mark.durable_segment,
                               .prev_end = jr->mark.durable_offset};
    else if (!jr->marked && jr->segments[0].sequence > 1)
        return err_set(e, JR_DAMAGE, "journal %s has lost its applied mark, the file \"applied\"", jr->dir);
    stand_at(jr, 0, BLOCK, &h);
    jr->first_lost = jr->segments[0].sequence > 1 && !gone;
    return 1;
}

/* Rules 3 and 4 where we stand: 1 with the batch loaded, 0 at the end, or -errno. */
static int locate(struct jr *jr, struct err *e)
{
    int rc = 1;
    if (!jr->started && (rc = start(jr, e)) != 1)
        return rc;
    for (int look = 0; look < 2; look++) {
        size_t index;
        rc = find_continuation(jr, jr->at + 1, &index, e);
        if (rc < 0)
            return rc;
        if (rc == 1) {
            stand_at(jr, index, BLOCK, jr_loaded(jr));
            return 1;
        }
        rc = jr_read_batch(jr, jr->at, jr->offset, e);
        if (rc < 0 || (rc == 1 && continues(jr, jr_loaded(jr))))
            return rc;
        rc = end_or_damage(jr, e);
        if (rc != JR_DAMAGE)
            return rc;
    }
    return rc;
}

/* A batch with the right checksum that contradicts itself was written wrongly; better said than applied. */
static int check_records(const struct jr *jr, struct err *e)
{
    const struct fmt_batch *h = jr_loaded(jr);
    const struct fmt_record *r = jr_loaded_records(jr);
    uint64_t data = 0;
    for (uint32_t i = 0; i < h->records; i++, r++) {
        bool right = r->number == h->first_write + i && r->offset % BLOCK == 0 &&
                     r->flags <= (r->kind == FMT_MARK ? FMT_GAP_END : 0) &&
                     r->length % BLOCK == 0 && r->length <= UINT64_MAX - r->offset;
        if (r->kind == FMT_WRITE)
            right = right && r->data_length == r->length;
        else if (r->kind == FMT_MARK)
            right = right && r->length == 0 && r->offset == 0;
        else
            right = right && r->data_length == 0 && (r->kind == FMT_ZERO || r->kind == FMT_DISCARD);
        if (!right)
            return err_set(e, JR_DAMAGE, "segment %016" PRIu64 ".seg of journal %s: write %" PRIu64
                           " in the batch at offset %" PRIu64 " contradicts itself (kind %u, %" PRIu64
                           " bytes at %" PRIu64 ", %u bytes of data)",
                           jr->segments[jr->at].sequence, jr->dir, h->first_write + i, jr->offset, r->kind, r->length,
                           r->offset, r->data_length);
        data += round_block(r->data_length);
    }
    if (h->header_length + data != h->length)
        return err_set(e, JR_DAMAGE, "segment %016" PRIu64 ".seg of journal %s: the batch at offset %" PRIu64
                       " has %" PRIu64 " bytes, its records need %" PRIu64,
                       jr->segments[jr->at].sequence, jr->dir, jr->offset, h->length, h->header_length + data);
    return 0;
}

static void consume(struct jr *jr, uint64_t records, uint64_t length)
{
    jr->offset += length;
    jr->next_batch++;
    jr->next_write += records;
    jr->prev_segment = jr->segments[jr->at].sequence;
    jr->prev_end = jr->offset;
}

/* At the end: which segments hold what. One that was given up lies behind the place where the batch before the segment
 * that took over ended; any other one holds batches, also when its first one cannot be read any more: then only an upper
 * bound is known, and nobody may take it for empty. */
static int finish(struct jr *jr, struct err *e)
{
    uint64_t write = jr->next_write, ended = jr->prev_segment;
    for (size_t i = jr->count; i-- > 0;) {
        struct jr_segment *s = &jr->segments[i];
        s->first_write = s->first_batch = s->last_write = 0;
        if (i > jr->at || s->sequence > ended)
            continue;
        s->last_write = write - 1;
        int rc = jr_read_batch(jr, i, BLOCK, e);
        if (rc == 0 || rc == JR_STALE) /* damaged, or recycled under a reader of a live journal */
            continue;
        if (rc < 0)
            return rc;
        const struct fmt_batch *h = jr_loaded(jr);
        s->first_batch = h->number;
        s->first_write = write = h->first_write;
        ended = h->prev_segment;
    }
    return 0;
}

void jr_end_at(struct jr *jr, uint64_t write) { jr->until = write + 1; }

int jr_next(struct jr *jr, struct jr_batch *out, struct err *e)
{
    int rc = jr->started && jr->until && jr->next_write >= jr->until ? 0 : locate(jr, e);
    if (rc == 0 && jr->started)
        rc = finish(jr, e);
    if (rc != 1)
        return rc;
    rc = check_records(jr, e);
    if (rc)
        return rc;
    const struct fmt_batch *h = jr_loaded(jr);
    *out = (struct jr_batch){
        .number = h->number,
        .first_write = h->first_write,
        .records = h->records,
        .record = jr_loaded_records(jr),
        .data = jr->batch + h->header_length,
        .segment = jr->segments[jr->at].sequence,
        .offset = jr->offset,
        .end_offset = jr->offset + h->length,
    };
    consume(jr, h->records, h->length);
    return 1;
}

/* ---- seek ---- */

/* Goes to the last segment that begins before `write` and goes on from an earlier one; data between is not read. */
static int pass_segments(struct jr *jr, uint64_t write, struct err *e)
{
    for (size_t i = jr->count; i-- > jr->at + 1;) {
        struct fmt_batch h;
        int rc = jr_read_header(jr, i, BLOCK, &h, e);
        if (rc < 0)
            return rc;
        if (rc == 0 || h.first_write > write || h.number < jr->next_batch || h.first_write < jr->next_write ||
            h.prev_segment < jr->segments[jr->at].sequence)
            continue;
        rc = jr_read_batch(jr, i, BLOCK, e);
        if (rc < 0)
            return rc;
        if (rc == 1) {
            stand_at(jr, i, BLOCK, jr_loaded(jr));
            return 0;
        }
    }
    return 0;
}

/* Passes one batch by its header: 1 done, 0 not possible, or -errno. A header behind it proves that it was durable. */
static int pass_batch(struct jr *jr, uint64_t write, struct err *e)
{
    struct fmt_batch h, behind;
    int rc = jr_read_header(jr, jr->at, jr->offset, &h, e);
    if (rc != 1 || !continues(jr, &h) || h.first_write + h.records > write)
        return rc < 0 ? rc : 0;
    rc = jr_read_header(jr, jr->at, jr->offset + h.length, &behind, e);
    if (rc != 1 || behind.number != h.number + 1 || behind.first_write != h.first_write + h.records)
        return rc < 0 ? rc : 0;
    consume(jr, h.records, h.length);
    return 1;
}

int jr_seek(struct jr *jr, uint64_t write, struct err *e)
{
    int rc = 1;
    if (!jr->started && (rc = start(jr, e)) != 1)
        return rc;
    rc = pass_segments(jr, write, e);
    if (rc)
        return rc;
    for (;;) {
        rc = pass_batch(jr, write, e);
        if (rc == 1)
            continue;
        if (rc == 0)
            rc = locate(jr, e);
        if (rc != 1 || jr_loaded(jr)->first_write + jr_loaded(jr)->records > write)
            return rc == 1 ? 0 : rc;
        consume(jr, jr_loaded(jr)->records, jr_loaded(jr)->length);
    }
}

/* ---- damage and the end ---- */

int jr_pass_damage(struct jr *jr, uint64_t *missing_to)
{
    size_t index;
    uint64_t place;
    struct fmt_batch h;
    *missing_to = 0;
    if (!jr->started)
        return 0;
    if (jr_read_batch(jr, jr->at, jr->offset, NULL) == 1 && continues(jr, jr_loaded(jr))) {
        /* The batch is what was written; it was its records that contradict themselves. */
        *missing_to = jr->next_write + jr_loaded(jr)->records - 1;
        consume(jr, jr_loaded(jr)->records, jr_loaded(jr)->length);
        return 1;
    }
    if (find_proof(jr, true, &index, &place, &h, NULL) != 1)
        return 0;
    *missing_to = h.first_write - 1;
    stand_at(jr, index, place, &h);
    return 1;
}

void jr_end(const struct jr *jr, struct jr_end *out)
{
    *out = (struct jr_end){
        .marked = jr->marked,
        .clean = (jr->mark.flags & FMT_APPLIED_CLEAN) != 0,
        .inside = (jr->mark.flags & FMT_APPLIED_INSIDE) != 0,
        .mark_sequence = jr->mark.sequence,
        .applied_write = jr->mark.applied_write,
        .released_write = jr->mark.released_write,
        .mark_durable_write = jr->mark.durable_write,
        .tracking = jr->mark.tracking,
    };
    if (!jr->started && !jr->count) {
        out->last_write = jr->mark.durable_write;
        out->last_batch = jr->mark.durable_batch;
        out->segment = jr->mark.durable_segment;
        out->offset = jr->mark.durable_offset;
    }
    if (!jr->started)
        return;
    out->last_write = jr->next_write - 1;
    out->last_batch = jr->next_batch - 1;
    out->segment = jr->prev_segment;
    out->offset = jr->prev_end;
    out->torn = jr->torn;
}

const struct jr_segment *jr_segments(const struct jr *jr, size_t *count)
{
    *count = jr->count;
    return jr->segments;
}
