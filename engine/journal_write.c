/* Notes on the design (bytes: FORMAT.md 1).
 *
 * A write may be answered when, and only when, the batch that holds it is durable. jw_append writes the whole batch with
 * one O_DIRECT pwritev into blocks that were written before (so that fdatasync has no filesystem metadata to commit), then
 * calls fdatasync once. One batch is under way at a time, so only the last one can be torn by a crash:
 *
 *     committer   |-- batch 7: pwritev, fdatasync --|-- batch 8: pwritev, fdatasync --|
 *     answered                                       7's writes                        8's writes
 *     crash here                                                 ^ batch 8 torn or absent, 7 whole
 *
 * A failed write or sync is never tried again in the same place: after a failed fdatasync the kernel may call the pages
 * clean although they never reached the disk. The segment is sealed where the last durable batch ended, and the same
 * batch goes to another segment, whose header of the batch before says where the good part ended (FORMAT.md 1.5, rule 3).
 *
 * Where segments come from and go to: journal_segments.c.
 *
 * Lock order: jw->lock only; it is held for no I/O of a batch. mark_lock serialises the applied mark and is taken first.
 */
#include "journal_writer.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checksum.h"
#include "io.h"
#include "log.h"

/* ---- appending ---- */

/* The next segment becomes current. -ENOSPC when none is ready; waits while one can still be made. */
static int take_ready(struct jw *jw)
{
    HOLD_LOCK(&jw->lock);
    if (jw->ready.fd < 0 || jw->drop_tail)
        return -ENOSPC;
    if (jw->current.fd >= 0)
        close(jw->current.fd);
    jw->current = jw->ready;
    *live_at(jw, jw->live_count) = jw->ready;
    jw->live_count++;
    jw->ready.fd = -1;
    pthread_cond_signal(&jw->work);
    return 0;
}

static int write_batch(struct jw *jw, struct fmt_batch *b, const void *data, size_t data_length, uint64_t offset)
{
    b->salt = jw->current.salt;
    b->checksum = checksum_zeroed2(b, b->header_length, offsetof(struct fmt_batch, checksum), data, data_length);
    struct iovec iov[2] = {{b, b->header_length}, {(void *)(uintptr_t)data, data_length}};
    int rc = io_pwritev("journal.batch.write", jw->current.fd, iov, data_length ? 2 : 1, offset);
#ifdef WITHOUT_SYNC /* a test build only: the power cuts of the tests must notice */
    return rc;
#endif
    return rc ? rc : io_fdatasync("journal.batch.sync", jw->current.fd);
}

int jw_append(struct jw *jw, void *header, uint32_t records, const void *data, size_t data_length)
{
    struct fmt_batch *b = header;
    const struct fmt_record *first = (const struct fmt_record *)((uint8_t *)header + sizeof *b);
    memcpy(b->magic, FMT_BATCH_MAGIC, 8);
    b->number = jw->durable_batch + 1;
    b->first_write = first->number;
    b->records = records;
    b->header_length = (uint32_t)fmt_batch_header(records);
    b->length = b->header_length + data_length;
    b->prev_segment = jw->end_segment;
    b->prev_end = jw->end_offset;
    for (;;) {
        uint64_t offset = jw->current.sequence == jw->end_segment ? jw->end_offset : FMT_HEADER_BYTES;
        if (jw->current.fd < 0 || offset + b->length > jw->current.size) {
            int rc = take_ready(jw);
            if (rc)
                return rc;
            continue;
        }
        int rc = write_batch(jw, b, data, data_length, offset);
        HOLD_LOCK(&jw->lock);
        if (rc) {
            /* Sealed: whatever is behind the last durable batch there no longer counts. */
            jw_note_error(jw, JW_BATCH, "segment %lu: batch %lu could not be made durable: %s", jw->current.sequence,
                          b->number, strerror(-rc));
            log_warn("journal: segment %lu is sealed at %lu", jw->current.sequence, offset);
            close(jw->current.fd);
            jw->current.fd = -1;
            if (jw->current.sequence == jw->end_segment)
                continue;
            jw->drop_tail = true; /* it failed in a fresh one too: no faster than the caller waits */
            pthread_cond_signal(&jw->work);
            return -ENOSPC;
        }
        jw_works(jw, JW_BATCH);
        jw->end_segment = jw->current.sequence;
        jw->end_offset = offset + b->length;
        jw->durable_batch = b->number;
        jw->durable_write = b->first_write + records - 1;
        live_at(jw, jw->live_count - 1)->last_write = jw->durable_write;
        return 0;
    }
}

void jw_wait_space(struct jw *jw)
{
    HOLD_LOCK(&jw->lock);
    if (jw->ready.fd < 0 || jw->drop_tail) {
        pthread_cond_signal(&jw->work);
        jw_wait_a_second(&jw->space, &jw->lock);
    }
}

/* ---- applied mark ---- */

static int write_mark(struct jw *jw, struct err *e)
{
    uint8_t *slot = io_alloc(FMT_HEADER_BYTES);
    if (!slot)
        return err_sys(e, -ENOMEM, "applied mark");
    jw->mark.sequence++;
    jw->mark.checksum = 0;
    memcpy(slot, &jw->mark, sizeof jw->mark);
    jw->mark.checksum = checksum_zeroed(slot, FMT_HEADER_BYTES, offsetof(struct fmt_applied, checksum));
    memcpy(slot, &jw->mark, sizeof jw->mark);
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && i < 2; i++) {
        rc = io_pwrite("journal.mark.write", jw->mark_fd, slot, FMT_HEADER_BYTES, i * FMT_HEADER_BYTES);
        if (rc == 0)
            rc = io_fdatasync("journal.mark.sync", jw->mark_fd);
    }
    io_free(slot, FMT_HEADER_BYTES);
    return rc ? err_sys(e, rc, "cannot write the applied mark") : 0;
}

int jw_set_applied(struct jw *jw, uint64_t write, uint32_t flags, struct err *e)
{
    pthread_mutex_lock(&jw->mark_lock);
    struct fmt_applied before;
    {
        HOLD_LOCK(&jw->lock);
        before = jw->mark;
        jw->mark.applied_write = write;
        jw->mark.released_write = jw->released_write;
        jw->mark.flags = flags;
        jw->mark.durable_write = jw->durable_write;
        jw->mark.durable_batch = jw->durable_batch;
        jw->mark.durable_segment = jw->end_segment;
        jw->mark.durable_offset = jw->end_offset;
    }
    int rc = write_mark(jw, e);
    if (rc) {
        HOLD_LOCK(&jw->lock);
        before.sequence = jw->mark.sequence;
        jw->mark = before;
    } else {
        jw_recycle(jw);
    }
    pthread_mutex_unlock(&jw->mark_lock);
    return rc;
}

int jw_set_tracking(struct jw *jw, const struct fmt_tracking *tracking, struct err *e)
{
    pthread_mutex_lock(&jw->mark_lock);
    {
        HOLD_LOCK(&jw->lock);
        jw->mark.tracking = *tracking; /* also when it fails: the next mark is the next try */
    }
    int rc = write_mark(jw, e);
    pthread_mutex_unlock(&jw->mark_lock);
    return rc;
}

void jw_release(struct jw *jw, uint64_t write)
{
    HOLD_LOCK(&jw->lock);
    jw->released_write = max_u64(jw->released_write, min_u64(write, jw->durable_write));
}

void jw_get_status(struct jw *jw, struct jw_status *out)
{
    HOLD_LOCK(&jw->lock);
    *out = (struct jw_status){
        .limit = jw->limit,
        .segments = jw_file_count(jw),
        .segment_bytes = jw->segment_bytes,
        .durable_write = jw->durable_write,
        .durable_batch = jw->durable_batch,
        .durable_segment = jw->end_segment,
        .durable_offset = jw->end_offset,
        .synced_write = jw->mark.applied_write,
        .released_write = jw->released_write,
        .ready = jw->ready.fd >= 0 && !jw->drop_tail,
        .preparing = jw->in_transit > 0,
    };
    /* Bytes that cannot be used again yet: whole segments behind the oldest needed one, and the current one so far. */
    for (size_t i = 0; i < jw->live_count; i++) {
        struct segment *s = live_at(jw, i);
        out->bytes += s->sequence == jw->end_segment ? jw->end_offset : s->size;
    }
    if (jw->live_count > 1) {
        struct segment *oldest = live_at(jw, 0);
        /* Also when the mark is behind it already: it was the current one then, and only a new mark recycles. */
        out->needs_applied = oldest->sequence < jw->end_segment && oldest->last_write <= jw->released_write;
    }
    for (int i = 0; i < JW_TROUBLES && !out->error[0]; i++)
        memcpy(out->error, jw->errors[i], sizeof out->error);
}

/* ---- opening ---- */

static int open_mark(struct jw *jw, const struct jw_options *o, struct err *e)
{
    jw->mark = o->mark;
    jw->mark_fd = openat(jw->dir, "applied", O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
    if (jw->mark_fd < 0)
        return err_sys(e, -errno, "cannot open the applied mark");
    int rc = io_fsync_dir("journal.mark.directory", jw->dir);
    if (rc)
        return err_sys(e, rc, "cannot sync the journal's directory");
    memcpy(jw->mark.magic, FMT_APPLIED_MAGIC, 8);
    jw->mark.version = FORMAT_VERSION;
    memcpy(jw->mark.set_id, jw->set_id, 16);
    jw->released_write = jw->mark.released_write;
    return jw_set_applied(jw, jw->mark.applied_write, jw->mark.flags, e);
}

int jw_open(struct jw **out, const struct jw_options *o, struct err *e)
{
    struct jw *jw = calloc(1, sizeof *jw);
    if (!jw)
        return err_sys(e, -ENOMEM, "journal");
    *jw = (struct jw){.dir = -1, .mark_fd = -1, .segment_bytes = o->segment_bytes, .limit = o->limit, .next_sequence = 1};
    memcpy(jw->set_id, o->set_id, 16);
    jw->ready.fd = jw->current.fd = -1;
    jw->end_segment = o->end_segment;
    jw->next_sequence = o->end_segment + 1;
    jw->end_offset = o->end_offset;
    jw->durable_write = o->last_write;
    jw->durable_batch = o->last_batch;
    pthread_mutex_init(&jw->lock, NULL);
    pthread_mutex_init(&jw->mark_lock, NULL);
    cond_init_monotonic(&jw->work);
    cond_init_monotonic(&jw->space);
    jw->live = calloc(JW_MOST_SEGMENTS, sizeof *jw->live);
    jw->free_names = calloc(JW_MOST_SEGMENTS, sizeof *jw->free_names);
    jw->dir = open(o->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = !jw->live || !jw->free_names ? err_sys(e, -ENOMEM, "journal") : 0;
    if (rc == 0 && jw->dir < 0)
        rc = err_sys(e, -errno, "cannot open the journal %s", o->directory);
    if (rc == 0)
        rc = jw_take_over(jw, o, e);
    /* A journal without segments is whole only as long as the mark says that it was stopped in order. */
    if (rc == 0 && jw->live_count == 0 && jw->durable_write)
        rc = jw_prepare_first(jw, e);
    if (rc == 0)
        rc = open_mark(jw, o, e);
    if (rc == 0 && (rc = -pthread_create(&jw->preparer, NULL, jw_preparer_main, jw)) != 0)
        rc = err_sys(e, rc, "cannot start a thread");
    else if (rc == 0)
        jw->preparer_runs = true;
    if (rc) {
        jw_close(jw);
        return rc;
    }
    *out = jw;
    return 0;
}

void jw_close(struct jw *jw)
{
    if (!jw)
        return;
    if (jw->preparer_runs) {
        pthread_mutex_lock(&jw->lock);
        jw->stop = true;
        pthread_cond_signal(&jw->work);
        pthread_mutex_unlock(&jw->lock);
        pthread_join(jw->preparer, NULL);
    }
    for (int i = 0; i < 3; i++) {
        int fd = i == 0 ? jw->ready.fd : i == 1 ? jw->current.fd : jw->mark_fd;
        if (fd >= 0)
            close(fd);
    }
    if (jw->dir >= 0)
        close(jw->dir);
    free(jw->live);
    free(jw->free_names);
    free(jw);
}
