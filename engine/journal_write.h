/* The writing half of the journal: append a batch, and it is durable. The durability rule lives here and nowhere else. */
#ifndef PGCDP_JOURNAL_WRITE_H
#define PGCDP_JOURNAL_WRITE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"
#include "format.h"

struct jw;

struct jw_segment { /* one `.seg` file that a restart found, oldest first */
    uint64_t sequence;
    uint64_t size;
    uint64_t first_write; /* 0: holds no batch */
    uint64_t last_write;
};

#define JW_MOST_SEGMENTS 65536u

struct jw_options {
    const char *directory; /* locked by the caller */
    uint8_t set_id[16];
    uint64_t segment_bytes; /* multiple of 4096 */
    uint64_t limit;         /* bytes that all segment files may take */

    /* What a restart found (journal_read); all zero for a new journal. */
    const struct jw_segment *segments;
    size_t segment_count;
    struct fmt_applied mark;
    uint64_t last_write, last_batch, end_segment, end_offset;
};

struct jw_status {
    uint64_t bytes, limit, segments, segment_bytes;
    uint64_t durable_write, durable_batch, durable_segment, durable_offset;
    uint64_t synced_write, released_write;
    bool ready;         /* there is a segment to go on in */
    bool preparing;     /* one is being made */
    bool needs_applied; /* segments wait for nothing but the applied mark */
    char error[256];    /* what of the journal's storage does not work now, or "" */
};

/* Cleans up what a crash left half made and starts the thread that keeps a segment ready. */
int jw_open(struct jw **out, const struct jw_options *options, struct err *e);

/* Makes a batch durable. `header` is page-aligned, fmt_batch_header(records) long, the records in their place; the rest of
 * it is filled in here. `data` is page-aligned, `data_length` a multiple of 4096, the batch at most half a segment.
 * 0: durable. -ENOSPC: no segment may be used now (limit, disk full or failing): nothing was written that counts; wait with
 * jw_wait_space and call again with the same batch. One caller at a time. */
int jw_append(struct jw *jw, void *header, uint32_t records, const void *data, size_t data_length);

/* Waits until there may be space, at most a second. */
void jw_wait_space(struct jw *jw);

/* The volumes hold all writes up to this one and were synced since. Durable when it returns 0; frees segments.
 * `flags`: FMT_APPLIED_CLEAN when every write of the journal is applied, FMT_APPLIED_INSIDE as the journal has it up to any write from
 * this one on. */
int jw_set_applied(struct jw *jw, uint64_t write, uint32_t flags, struct err *e);

/* The applied mark says this of the bitmap of changed blocks. Durable when it returns 0; else either may be there. */
int jw_set_tracking(struct jw *jw, const struct fmt_tracking *tracking, struct err *e);

/* The store holds all writes up to this one. Frees segments; becomes durable with the next applied mark. */
void jw_release(struct jw *jw, uint64_t write);

void jw_get_status(struct jw *jw, struct jw_status *out);

void jw_close(struct jw *jw);

#endif
