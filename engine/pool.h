/* A few threads that run tasks, begun in the order in which they came. What waits has a weight, and the sum is bounded. */
#ifndef PGCDP_POOL_H
#define PGCDP_POOL_H

#include <stdint.h>

#include "err.h"

struct pool;

struct task { /* the head of the caller's own struct */
    struct task *next;
    uint64_t weight;
};

/* `run(self, task, worker)` on thread number `worker`. */
typedef void (*pool_run)(void *self, struct task *task, unsigned worker);

int pool_start(struct pool **out, unsigned workers, uint64_t limit, pool_run run, void *self, struct err *e);

/* Waits while what waits already weighs more than the limit. */
void pool_put(struct pool *p, struct task *task);

/* Runs what waits, then ends the threads. */
void pool_stop(struct pool *p);

#endif
