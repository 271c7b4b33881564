/* What journal_write.c (appending, the applied mark) and journal_segments.c (where segments come from and go to) share. */
#ifndef PGCDP_JOURNAL_WRITER_H
#define PGCDP_JOURNAL_WRITER_H

#include <pthread.h>

#include "cleanup.h"
#include "journal_write.h"
#include "util.h"

struct segment {
    uint64_t sequence, salt, size;
    uint64_t last_write; /* 0 while it holds no batch */
    int fd;              /* -1 unless batches may go into it */
};

#define JW_MOST_LEFTOVERS 64u /* more are removed at the next start */

enum jw_trouble { JW_BATCH, JW_SEGMENT, JW_RECYCLE, JW_TROUBLES };

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
    char errors[JW_TROUBLES][256]; /* what does not work now; "" what does */
    char leftovers[JW_MOST_LEFTOVERS][32]; /* files of no use that a failing disk did not remove: the preparer tries again */
    size_t leftover_count;
    bool drop_tail; /* segments behind the last durable batch are of no use: the preparer removes them */

    /* Only the committer changes these, under the lock. */
    struct segment current; /* fd -1 after a restart: the next batch takes the ready segment */
    uint64_t end_segment, end_offset;
    uint64_t durable_write, durable_batch;

    pthread_mutex_t mark_lock;
    struct fmt_applied mark;
    int mark_fd;
    uint64_t released_write;
};

static inline struct segment *live_at(struct jw *jw, size_t i)
{
    return &jw->live[(jw->live_first + i) % JW_MOST_SEGMENTS];
}

/* Segment files there are, those on their way included. Called with the lock. */
static inline uint64_t jw_file_count(const struct jw *jw)
{
    return jw->live_count + jw->free_count + jw->in_transit + (jw->ready.fd >= 0 ? 1 : 0);
}

/* Something does not work, or works again. Each different trouble is logged once. Called with the lock. */
void jw_note_error(struct jw *jw, enum jw_trouble what, const char *format, ...) __attribute__((format(printf, 3, 4)));
static inline void jw_works(struct jw *jw, enum jw_trouble what) { jw->errors[what][0] = '\0'; }

/* Called with the lock. */
static inline void jw_wait_a_second(pthread_cond_t *cond, pthread_mutex_t *lock)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += 1;
    pthread_cond_timedwait(cond, lock, &until);
}

static inline bool jw_tail_is_useless(struct jw *jw)
{
    HOLD_LOCK(&jw->lock);
    return jw->drop_tail;
}

/* Files of a journal that was just opened: those that a crash left half made go, segments behind its end become free. */
int jw_take_over(struct jw *jw, const struct jw_options *o, struct err *e);

/* The thread that keeps a segment ready. */
void *jw_preparer_main(void *jw);

/* Makes the first segment of a journal that has none, before anything else is done with it. */
int jw_prepare_first(struct jw *jw, struct err *e);

/* Renames live segments that nothing needs to free- names, oldest first. Called without the lock. */
void jw_recycle(struct jw *jw);

#endif
