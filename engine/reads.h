/* Answering reads: from what is not yet applied, else from the volumes, without a wait on the reader's thread. */
#ifndef PGCDP_READS_H
#define PGCDP_READS_H

#include <stddef.h>
#include <stdint.h>

struct reads;
struct volume_set;

/* Buffers, the kernel's queue and the completer thread. -errno on failure. */
int reads_start(struct reads **out, struct volume_set *vs);

/* The backend's read (backend.h), called by the reader alone. */
void reads_take(struct reads *r, unsigned volume, uint64_t offset, size_t length, void *cookie);

/* A volume whose sync failed has again what it had: what waits for it is read. By the applier. */
void reads_again(struct reads *r);

/* No more calls come, nor is a volume written again: answers what is under way, ends the thread. NULL is nothing. */
void reads_stop(struct reads *r);

#endif
