/* A journal's files: segments, headers, the applied mark, single batches. Shared with journal_read.c alone. */
#ifndef PGCDP_JOURNAL_FILES_H
#define PGCDP_JOURNAL_FILES_H

#include "journal_read.h"

#define SCAN_BYTES ((uint64_t)1 << 20)

struct jr {
    char *dir;
    int dir_fd;
    uint8_t set_id[16];
    struct jr_segment *segments;
    size_t count;
    size_t capacity;
    struct fmt_applied mark; /* all zero without one */
    bool marked;

    bool started;     /* the position is known */
    bool first_lost;  /* ... but not its numbers: the first batch is damaged, and what came before it is released */
    size_t at;
    uint64_t offset;
    uint64_t until; /* from this write on nothing counts; 0: all does */
    uint64_t next_batch;
    uint64_t next_write;
    uint64_t prev_segment;
    uint64_t prev_end;
    bool torn;

    int fd; /* of segment `fd_of` */
    size_t fd_of;
    uint8_t *batch;
    size_t batch_size;
    uint8_t *scan;
};

/* That segment `index` was recycled under us: JR_STALE. */
int jr_stale(const struct jr *jr, size_t index, struct err *e);

int jr_read_segment(struct jr *jr, size_t index, void *data, uint64_t length, uint64_t offset, struct err *e);

/* Whether these bytes begin a batch of this use of the segment that fits at `offset`; says nothing of its data. */
bool jr_plausible(const struct fmt_batch *h, const struct jr_segment *s, uint64_t offset);

/* 1 with the header of the batch at `offset`, 0 when there is none, or -errno. */
int jr_read_header(struct jr *jr, size_t index, uint64_t offset, struct fmt_batch *out, struct err *e);

/* Reads the batch at `offset` into jr->batch: 1 when it is valid (1.2), 0 when not, or -errno. */
int jr_read_batch(struct jr *jr, size_t index, uint64_t offset, struct err *e);

static inline const struct fmt_batch *jr_loaded(const struct jr *jr) { return (const void *)jr->batch; }

static inline const struct fmt_record *jr_loaded_records(const struct jr *jr)
{
    return (const void *)(jr->batch + sizeof(struct fmt_batch));
}

#endif
