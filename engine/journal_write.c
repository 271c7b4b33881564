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
 * Segments: live (`.seg`, oldest first; the last durable batch is in `current`), one ready behind it (a `.seg` with a
 * header and no batch), free ones. The `preparer` thread makes the ready one, so that a switch costs the committer
 * nothing. Renames and header go before the first batch with their own syncs: a `.seg` with a bad header is damage.
 * A live segment becomes free when it is older than `current` and all its writes are applied, synced and released.
 *
 * Lock order: jw->lock only; it is held for no I/O of a batch. mark_lock serialises the applied mark and is taken first.
 */
#include "journal_write.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checksum.h"
#include "cleanup.h"
#include "io.h"
#include "log.h"
#include "util.h"


struct segment {
    uint64_t sequence, salt, size;
    uint64_t last_write; /* 0 while it holds no batch */
    int fd;              /* -1 unless batches may go into it */
};

struct jw {
    int dir;
    uint8_t set_id[16];
    uint64_t segment_bytes, limit;

    pthread_mutex_t lock;
    pthread_cond_t work;  /* for the preparer */
    pthread_cond_t space; /* for the committer */
    pthread_t preparer;
    bool preparer_runs, stop;

    struct segment *live; /* ring of JW_MOST_SEGMENTS, oldest first, without the ready one */
    size_t live_first, live_count;
    struct segment ready; /* fd -1: none */
    uint64_t next_sequence;
    uint64_t next_free_name;
    uint64_t *free_names; /* numbers of free- files of the right size */
    size_t free_count;
    size_t in_transit; /* files between live, free and ready: they still take space */
    char error[256];
    bool no_segment; /* `error` is that none could be made ready */

    /* Only the committer changes these, under the lock. */
    struct segment current; /* fd -1 after a restart: the next batch takes the ready segment */
    uint64_t end_segment, end_offset;
    uint64_t durable_write, durable_batch;

    pthread_mutex_t mark_lock;
    struct fmt_applied mark;
    int mark_fd;
    uint64_t released_write;
};

static void segment_name(char out[32], uint64_t sequence) { snprintf(out, 32, "%016lu.seg", sequence); }
static void free_name(char out[32], uint64_t number) { snprintf(out, 32, "free-%016lu", number); }
static void new_name(char out[32], uint64_t number) { snprintf(out, 32, "new-%016lu", number); }

static struct segment *live_at(struct jw *jw, size_t i) { return &jw->live[(jw->live_first + i) % JW_MOST_SEGMENTS]; }

static uint64_t file_count(const struct jw *jw)
{
    return jw->live_count + jw->free_count + jw->in_transit + (jw->ready.fd >= 0 ? 1 : 0);
}

static void note_error(struct jw *jw, int rc, const char *what)
{
    HOLD_LOCK(&jw->lock);
    snprintf(jw->error, sizeof jw->error, "%s: %s", what, strerror(-rc));
    log_error("journal: %s", jw->error);
}

/* ---- making segments ready ---- */

static int write_whole_file(int fd, uint64_t size)
{
    enum { CHUNK = 1 << 20 };
    /* Reserved first: a disk without room for all of it is not filled by the attempt. */
    if (fallocate(fd, 0, 0, (off_t)size) < 0 && errno != EOPNOTSUPP)
        return -errno;
    void *zeros = io_alloc(CHUNK);
    int rc = zeros ? 0 : -ENOMEM;
    for (uint64_t at = 0; rc == 0 && at < size; at += CHUNK)
        rc = io_pwrite(fd, zeros, (size_t)min_u64(CHUNK, size - at), at);
    io_free(zeros, CHUNK);
    return rc;
}

static int write_segment_header(struct jw *jw, int fd, struct segment *s)
{
    uint8_t *block = io_alloc(FMT_HEADER_BYTES);
    if (!block)
        return -ENOMEM;
    struct fmt_segment *h = (struct fmt_segment *)block;
    memcpy(h->magic, FMT_SEGMENT_MAGIC, 8);
    h->version = FORMAT_VERSION;
    h->header_length = FMT_HEADER_BYTES;
    memcpy(h->set_id, jw->set_id, 16);
    h->sequence = s->sequence;
    h->salt = s->salt;
    h->size = s->size;
    h->created_ns = clock_ns(CLOCK_REALTIME);
    h->checksum = checksum_zeroed(block, FMT_HEADER_BYTES, offsetof(struct fmt_segment, checksum));
    int rc = io_pwrite(fd, block, FMT_HEADER_BYTES, 0);
    io_free(block, FMT_HEADER_BYTES);
    return rc ? rc : io_fdatasync(fd);
}

/* A file under its free- or new- name becomes segment `s`, durably. */
static int make_ready(struct jw *jw, const char *from, struct segment *s, bool fresh)
{
    char to[32];
    segment_name(to, s->sequence);
    if (getrandom(&s->salt, sizeof s->salt, 0) != sizeof s->salt)
        return -EIO;
    int fd = openat(jw->dir, from, O_RDWR | O_CLOEXEC | O_DIRECT | (fresh ? O_CREAT | O_TRUNC : 0), 0600);
    if (fd < 0)
        return -errno;
    int rc = fresh ? write_whole_file(fd, s->size) : 0;
    if (rc == 0)
        rc = write_segment_header(jw, fd, s);
    if (rc == 0 && fresh && fsync(fd) < 0)
        rc = -errno;
    if (rc == 0 && renameat(jw->dir, from, jw->dir, to) < 0)
        rc = -errno;
    if (rc == 0)
        rc = io_fsync_dir(jw->dir);
    if (rc) {
        close(fd);
        return rc;
    }
    s->fd = fd;
    return 0;
}

/* Called without the lock; false when there is nothing to do now. */
static bool prepare_one(struct jw *jw)
{
    char from[32];
    struct segment s = {.fd = -1};
    bool fresh;
    uint64_t number;
    {
        HOLD_LOCK(&jw->lock);
        if (jw->ready.fd >= 0)
            return false;
        fresh = jw->free_count == 0;
        if (fresh && (file_count(jw) + 1) * jw->segment_bytes > jw->limit)
            return false;
        number = fresh ? jw->next_free_name++ : jw->free_names[--jw->free_count];
        (fresh ? new_name : free_name)(from, number);
        jw->in_transit++;
        s.sequence = jw->next_sequence;
        s.size = jw->segment_bytes;
    }
    int rc = make_ready(jw, from, &s, fresh);
    if (rc) {
        note_error(jw, rc, fresh ? "cannot make a segment" : "cannot use a segment again");
        unlinkat(jw->dir, from, 0); /* the next try is another file: this one may never work again */
    }
    HOLD_LOCK(&jw->lock);
    jw->in_transit--;
    if (rc == 0) {
        jw->ready = s;
        jw->next_sequence++;
        if (jw->no_segment)
            jw->error[0] = '\0'; /* that is over; a failed batch stays told until a restart */
        jw->no_segment = false;
        pthread_cond_broadcast(&jw->space);
    } else
        jw->no_segment = true;
    return rc == 0;
}

static void wait_a_second(pthread_cond_t *cond, pthread_mutex_t *lock)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += 1;
    pthread_cond_timedwait(cond, lock, &until);
}

static void *preparer_main(void *arg)
{
    struct jw *jw = arg;
    for (;;) {
        bool worked = prepare_one(jw);
        HOLD_LOCK(&jw->lock);
        if (jw->stop)
            return NULL;
        if (!worked || jw->ready.fd >= 0)
            wait_a_second(&jw->work, &jw->lock);
    }
}

/* ---- recycling ---- */

/* The oldest live segment, if nothing needs it any more: leaves the list and is named `from`. */
static bool take_unneeded(struct jw *jw, struct segment *out, uint64_t *free_number)
{
    HOLD_LOCK(&jw->lock);
    if (jw->live_count == 0)
        return false;
    struct segment *s = live_at(jw, 0);
    uint64_t done = min_u64(jw->mark.applied_write, jw->mark.released_write);
    if (s->sequence >= jw->end_segment || s->last_write > done)
        return false;
    *out = *s;
    *free_number = jw->next_free_name++;
    return true;
}

/* Renames live segments that nothing needs to free- names, oldest first. Only when the renames are durable may the files
 * be written to: a new header under an old `.seg` name would be damage. Called without the lock. */
static void recycle(struct jw *jw)
{
    uint64_t freed[64];
    size_t count = 0, kept = 0;
    struct segment s;
    uint64_t number;
    while (count < sizeof freed / sizeof *freed && take_unneeded(jw, &s, &number)) {
        char from[32], to[32];
        segment_name(from, s.sequence);
        free_name(to, number);
        bool keep = s.size == jw->segment_bytes;
        int rc = keep ? (renameat(jw->dir, from, jw->dir, to) < 0 ? -errno : 0)
                      : (unlinkat(jw->dir, from, 0) < 0 ? -errno : 0);
        if (rc) {
            note_error(jw, rc, "cannot free a segment");
            break;
        }
        HOLD_LOCK(&jw->lock);
        jw->live_first = (jw->live_first + 1) % JW_MOST_SEGMENTS;
        jw->live_count--;
        count++;
        if (keep) {
            freed[kept++] = number;
            jw->in_transit++;
        }
    }
    if (count == 0)
        return;
    int rc = io_fsync_dir(jw->dir);
    if (rc) {
        note_error(jw, rc, "cannot sync the journal's directory"); /* the files are found again at the next start */
        return;
    }
    HOLD_LOCK(&jw->lock);
    jw->in_transit -= kept;
    for (size_t i = 0; i < kept; i++)
        jw->free_names[jw->free_count++] = freed[i];
    pthread_cond_signal(&jw->work);
}

/* ---- appending ---- */

/* The next segment becomes current. -ENOSPC when none is ready; waits while one can still be made. */
static int take_ready(struct jw *jw)
{
    HOLD_LOCK(&jw->lock);
    if (jw->ready.fd < 0)
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
    int rc = io_pwritev(jw->current.fd, iov, data_length ? 2 : 1, offset);
#ifdef WITHOUT_SYNC /* a test build only: the power cuts of the tests must notice */
    return rc;
#endif
    return rc ? rc : io_fdatasync(jw->current.fd);
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
            snprintf(jw->error, sizeof jw->error, "segment %lu: batch %lu could not be made durable: %s",
                     jw->current.sequence, b->number, strerror(-rc));
            log_error("journal: %s; the segment is sealed at %lu", jw->error, offset);
            close(jw->current.fd);
            jw->current.fd = -1;
            continue;
        }
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
    if (jw->ready.fd < 0) {
        pthread_cond_signal(&jw->work);
        wait_a_second(&jw->space, &jw->lock);
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
        rc = io_pwrite(jw->mark_fd, slot, FMT_HEADER_BYTES, i * FMT_HEADER_BYTES);
        if (rc == 0)
            rc = io_fdatasync(jw->mark_fd);
    }
    io_free(slot, FMT_HEADER_BYTES);
    return rc ? err_sys(e, rc, "cannot write the applied mark") : 0;
}

int jw_set_applied(struct jw *jw, uint64_t write, bool clean, struct err *e)
{
    pthread_mutex_lock(&jw->mark_lock);
    struct fmt_applied before;
    {
        HOLD_LOCK(&jw->lock);
        before = jw->mark;
        jw->mark.applied_write = write;
        jw->mark.released_write = jw->released_write;
        jw->mark.flags = clean ? FMT_APPLIED_CLEAN : 0;
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
        recycle(jw);
    }
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
        .segments = file_count(jw),
        .segment_bytes = jw->segment_bytes,
        .durable_write = jw->durable_write,
        .durable_batch = jw->durable_batch,
        .durable_segment = jw->end_segment,
        .durable_offset = jw->end_offset,
        .synced_write = jw->mark.applied_write,
        .released_write = jw->released_write,
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
    memcpy(out->error, jw->error, sizeof out->error);
}

/* ---- opening ---- */

/* Free- files are of no use unless they have the right size; new- ones were never made whole. */
static int collect_free_files(struct jw *jw, struct err *e)
{
    CLEANUP_CLOSE int scan = openat(jw->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = scan < 0 ? NULL : fdopendir(scan);
    if (!d)
        return err_sys(e, -errno, "cannot read the journal's directory");
    scan = -1; /* closedir owns it now */
    struct dirent *entry;
    while ((entry = readdir(d))) {
        unsigned long number;
        struct stat st;
        if (sscanf(entry->d_name, "new-%lu", &number) == 1)
            unlinkat(jw->dir, entry->d_name, 0);
        if (sscanf(entry->d_name, "free-%lu", &number) != 1)
            continue;
        if (number >= jw->next_free_name)
            jw->next_free_name = number + 1;
        bool usable = fstatat(jw->dir, entry->d_name, &st, 0) == 0 && (uint64_t)st.st_size == jw->segment_bytes &&
                      (uint64_t)st.st_blocks * 512 >= jw->segment_bytes && jw->free_count < JW_MOST_SEGMENTS;
        if (usable)
            jw->free_names[jw->free_count++] = number;
        else
            unlinkat(jw->dir, entry->d_name, 0);
    }
    closedir(d);
    return 0;
}

/* Segments behind the journal's end hold nothing that counts: they are made ready anew, with new salts. */
static int take_over_segments(struct jw *jw, const struct jw_options *o, struct err *e)
{
    if (o->segment_count >= JW_MOST_SEGMENTS)
        return err_set(e, ERR_PRECONDITION, "the journal has %zu segments, at most %u can be used", o->segment_count,
                       JW_MOST_SEGMENTS - 1);
    size_t kept = o->segment_count;
    /* The last one first: killed in between, the sequence numbers that are left have no hole. */
    while (kept > 0) {
        const struct jw_segment *found = &o->segments[kept - 1];
        if (found->sequence <= o->end_segment && (o->last_write || found->first_write))
            break;
        char name[32], to[32];
        segment_name(name, found->sequence);
        free_name(to, jw->next_free_name++);
        int rc = renameat(jw->dir, name, jw->dir, to) < 0 ? -errno : 0;
        if (rc)
            return err_sys(e, rc, "cannot rename segment %s", name);
        kept--;
    }
    for (size_t i = 0; i < kept; i++) {
        const struct jw_segment *found = &o->segments[i];
        *live_at(jw, jw->live_count++) = (struct segment){
            .sequence = found->sequence, .size = found->size, .last_write = found->last_write, .fd = -1};
        jw->next_sequence = found->sequence + 1;
    }
    int rc = io_fsync_dir(jw->dir);
    return rc ? err_sys(e, rc, "cannot sync the journal's directory") : 0;
}

static int open_mark(struct jw *jw, const struct jw_options *o, struct err *e)
{
    jw->mark = o->mark;
    jw->mark_fd = openat(jw->dir, "applied", O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
    if (jw->mark_fd < 0)
        return err_sys(e, -errno, "cannot open the applied mark");
    int rc = io_fsync_dir(jw->dir);
    if (rc)
        return err_sys(e, rc, "cannot sync the journal's directory");
    memcpy(jw->mark.magic, FMT_APPLIED_MAGIC, 8);
    jw->mark.version = FORMAT_VERSION;
    memcpy(jw->mark.set_id, jw->set_id, 16);
    jw->released_write = jw->mark.released_write;
    return jw_set_applied(jw, jw->mark.applied_write, false, e);
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
        rc = collect_free_files(jw, e);
    if (rc == 0)
        rc = take_over_segments(jw, o, e);
    if (rc == 0) {
        jw->free_count = 0;
        rc = collect_free_files(jw, e);
    }
    if (rc == 0)
        rc = open_mark(jw, o, e);
    if (rc == 0 && (rc = -pthread_create(&jw->preparer, NULL, preparer_main, jw)) != 0)
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
