/* Notes on the design.
 *
 * Segments: live (`.seg`, oldest first; the last durable batch is in `current`), one ready behind it (a `.seg` with a
 * header and no batch), free ones. The `preparer` thread makes the ready one, so that a switch costs the committer
 * nothing. Renames and header go before the first batch with their own syncs: a `.seg` with a bad header is damage.
 * A live segment becomes free when it is older than `current` and all its writes are applied, synced and released.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checksum.h"
#include "io.h"
#include "journal_writer.h"
#include "log.h"

static void segment_name(char out[32], uint64_t sequence) { snprintf(out, 32, "%016lu.seg", sequence); }
static void free_name(char out[32], uint64_t number) { snprintf(out, 32, "free-%016lu", number); }
static void new_name(char out[32], uint64_t number) { snprintf(out, 32, "new-%016lu", number); }

void jw_note_error(struct jw *jw, enum jw_trouble what, const char *format, ...)
{
    char message[sizeof jw->errors[0]];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    if (strcmp(message, jw->errors[what]) != 0)
        log_error("journal: %s", message);
    memcpy(jw->errors[what], message, sizeof message);
}

static void note_error(struct jw *jw, enum jw_trouble trouble, int rc, const char *what)
{
    HOLD_LOCK(&jw->lock);
    jw_note_error(jw, trouble, "%s: %s", what, strerror(-rc));
}

/* ---- making segments ready ---- */

static int write_whole_file(int fd, uint64_t size)
{
    enum { CHUNK = 1 << 20 };
    /* Reserved first: a disk without room for all of it is not filled by the attempt. */
    int rc = io_reserve("journal.segment.reserve", fd, size);
    void *zeros = io_alloc(CHUNK);
    if (rc == 0 && !zeros)
        rc = -ENOMEM;
    for (uint64_t at = 0; rc == 0 && at < size; at += CHUNK)
        rc = io_pwrite("journal.segment.fill", fd, zeros, (size_t)min_u64(CHUNK, size - at), at);
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
    int rc = io_pwrite("journal.segment.header", fd, block, FMT_HEADER_BYTES, 0);
    io_free(block, FMT_HEADER_BYTES);
    return rc ? rc : io_fdatasync("journal.segment.header.sync", fd);
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
    if (rc == 0 && fresh)
        rc = io_fsync_file("journal.segment.sync", fd);
    if (rc == 0)
        rc = io_rename("journal.segment.rename", jw->dir, from, to);
    if (rc == 0)
        rc = io_fsync_dir("journal.segment.directory", jw->dir);
    if (rc) {
        close(fd);
        return rc;
    }
    s->fd = fd;
    return 0;
}

/* Segments in which no batch became durable, newest first, so that a crash on the way leaves no hole in their numbers. A batch
 * that failed in them is written anew in another file; else each try on a failing disk would leave one behind, until the
 * limit is reached and nothing can free them. Called without the lock. */
static void drop_tail(struct jw *jw)
{
    for (;;) {
        char name[32];
        int fd = -1;
        {
            HOLD_LOCK(&jw->lock);
            struct segment *s = jw->ready.fd >= 0 ? &jw->ready : jw->live_count ? live_at(jw, jw->live_count - 1) : NULL;
            if (!s || s->sequence <= jw->end_segment)
                break;
            fd = s->fd;
            segment_name(name, s->sequence);
        }
        int rc = io_unlink("journal.tail.unlink", jw->dir, name);
        if (rc && rc != -ENOENT) {
            note_error(jw, JW_SEGMENT, rc, "cannot remove a segment");
            return; /* the next try is in a second */
        }
        HOLD_LOCK(&jw->lock);
        if (jw->ready.fd >= 0) {
            close(fd);
            jw->ready.fd = -1;
        } else {
            jw->live_count--; /* the committer has closed it */
        }
    }
    int rc = io_fsync_dir("journal.tail.directory", jw->dir);
    if (rc) {
        note_error(jw, JW_SEGMENT, rc, "cannot sync the journal's directory");
        return;
    }
    HOLD_LOCK(&jw->lock);
    jw->next_sequence = jw->end_segment + 1;
    jw->drop_tail = false;
}

/* ---- what a failing disk did not remove ---- */

/* It takes room, and nobody uses it. Called without the lock. */
static void note_leftover(struct jw *jw, int rc, const char *name)
{
    HOLD_LOCK(&jw->lock);
    if (rc && rc != -ENOENT && jw->leftover_count < JW_MOST_LEFTOVERS)
        memcpy(jw->leftovers[jw->leftover_count++], name, sizeof jw->leftovers[0]);
}

/* By the preparer, which alone takes them from the list. Called without the lock. */
static void remove_leftovers(struct jw *jw)
{
    for (;;) {
        char name[32];
        {
            HOLD_LOCK(&jw->lock);
            if (jw->leftover_count == 0)
                return;
            memcpy(name, jw->leftovers[jw->leftover_count - 1], sizeof name);
        }
        int rc = io_unlink("journal.leftover.unlink", jw->dir, name);
        if (rc && rc != -ENOENT)
            return; /* the next try is in a second */
        HOLD_LOCK(&jw->lock);
        for (size_t i = 0; i < jw->leftover_count; i++) /* another thread may have noted more */
            if (strcmp(jw->leftovers[i], name) == 0) {
                memmove(jw->leftovers[i], jw->leftovers[--jw->leftover_count], sizeof name);
                break;
            }
    }
}

/* Called without the lock; false when there is nothing to do now. */
static bool prepare_one(struct jw *jw)
{
    char from[32];
    struct segment s = {.fd = -1};
    bool fresh;
    uint64_t number;
    if (jw_tail_is_useless(jw))
        drop_tail(jw);
    {
        HOLD_LOCK(&jw->lock);
        if (jw->ready.fd >= 0 || jw->drop_tail)
            return false;
        fresh = jw->free_count == 0;
        if (fresh && (jw_file_count(jw) + 1) * jw->segment_bytes > jw->limit)
            return false;
        number = fresh ? jw->next_free_name++ : jw->free_names[--jw->free_count];
        (fresh ? new_name : free_name)(from, number);
        jw->in_transit++;
        s.sequence = jw->next_sequence;
        s.size = jw->segment_bytes;
    }
    int rc = make_ready(jw, from, &s, fresh);
    if (rc) {
        note_error(jw, JW_SEGMENT, rc, fresh ? "cannot make a segment" : "cannot use a segment again");
        /* The next try is another file: this one may never work again. */
        note_leftover(jw, io_unlink("journal.segment.unlink", jw->dir, from), from);
    }
    HOLD_LOCK(&jw->lock);
    jw->in_transit--;
    if (rc == 0) {
        jw->ready = s;
        jw->next_sequence++;
        jw_works(jw, JW_SEGMENT);
        pthread_cond_broadcast(&jw->space);
    }
    return rc == 0;
}

int jw_prepare_first(struct jw *jw, struct err *e)
{
    if (prepare_one(jw))
        return 0;
    HOLD_LOCK(&jw->lock);
    return err_set(e, -EIO, "the journal has no segment, and none can be made%s%s", jw->errors[JW_SEGMENT][0] ? ": " : "",
                   jw->errors[JW_SEGMENT]);
}

void *jw_preparer_main(void *arg)
{
    struct jw *jw = arg;
    for (;;) {
        remove_leftovers(jw);
        bool worked = prepare_one(jw);
        HOLD_LOCK(&jw->lock);
        if (jw->stop)
            return NULL;
        if (!worked || jw->ready.fd >= 0)
            jw_wait_a_second(&jw->work, &jw->lock);
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
void jw_recycle(struct jw *jw)
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
        int rc = keep ? io_rename("journal.recycle.rename", jw->dir, from, to)
                      : io_unlink("journal.recycle.unlink", jw->dir, from);
        if (rc) {
            note_error(jw, JW_RECYCLE, rc, "cannot free a segment");
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
    int rc = io_fsync_dir("journal.recycle.directory", jw->dir);
    if (rc) {
        /* A `.seg` name that a crash brings back must have what it had: these files are never written to again. */
        note_error(jw, JW_RECYCLE, rc, "cannot sync the journal's directory");
        for (size_t i = 0; i < kept; i++) {
            char name[32];
            free_name(name, freed[i]);
            note_leftover(jw, io_unlink("journal.recycle.give_up", jw->dir, name), name);
        }
        HOLD_LOCK(&jw->lock);
        jw->in_transit -= kept;
        pthread_cond_signal(&jw->work);
        return;
    }
    HOLD_LOCK(&jw->lock);
    jw_works(jw, JW_RECYCLE);
    jw->in_transit -= kept;
    for (size_t i = 0; i < kept; i++)
        jw->free_names[jw->free_count++] = freed[i];
    pthread_cond_signal(&jw->work);
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
            io_unlink("journal.open.unlink_new", jw->dir, entry->d_name);
        if (sscanf(entry->d_name, "free-%lu", &number) != 1)
            continue;
        if (number >= jw->next_free_name)
            jw->next_free_name = number + 1;
        bool usable = fstatat(jw->dir, entry->d_name, &st, 0) == 0 && (uint64_t)st.st_size == jw->segment_bytes &&
                      (uint64_t)st.st_blocks * 512 >= jw->segment_bytes && jw->free_count < JW_MOST_SEGMENTS;
        if (usable)
            jw->free_names[jw->free_count++] = number;
        else
            io_unlink("journal.open.unlink_free", jw->dir, entry->d_name);
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
        int rc = io_rename("journal.open.rename", jw->dir, name, to);
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
    int rc = io_fsync_dir("journal.open.directory", jw->dir);
    return rc ? err_sys(e, rc, "cannot sync the journal's directory") : 0;
}

int jw_take_over(struct jw *jw, const struct jw_options *o, struct err *e)
{
    int rc = collect_free_files(jw, e);
    if (rc == 0)
        rc = take_over_segments(jw, o, e);
    if (rc)
        return rc;
    jw->free_count = 0;
    return collect_free_files(jw, e);
}
