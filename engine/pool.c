/* See pool.h. */
#include "pool.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "cleanup.h"

struct worker {
    struct pool *pool;
    unsigned number;
    pthread_t thread;
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t more, less;
    struct task *first, **last;
    uint64_t weight, limit;
    bool stop;
    pool_run run;
    void *self;
    unsigned count;
    struct worker workers[];
};

static struct task *take(struct pool *p)
{
    HOLD_LOCK(&p->lock);
    while (!p->first && !p->stop)
        pthread_cond_wait(&p->more, &p->lock);
    struct task *task = p->first;
    if (task) {
        p->first = task->next;
        if (!p->first)
            p->last = &p->first;
        p->weight -= task->weight;
        pthread_cond_signal(&p->less);
    }
    return task;
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    struct task *task;
    while ((task = take(w->pool)))
        w->pool->run(w->pool->self, task, w->number);
    return NULL;
}

int pool_start(struct pool **out, unsigned workers, uint64_t limit, pool_run run, void *self, struct err *e)
{
    struct pool *p = calloc(1, sizeof *p + workers * sizeof *p->workers);
    if (!p)
        return err_sys(e, -ENOMEM, "threads");
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->more, NULL);
    pthread_cond_init(&p->less, NULL);
    p->last = &p->first;
    p->limit = limit;
    p->run = run;
    p->self = self;
    for (; p->count < workers; p->count++) {
        struct worker *w = &p->workers[p->count];
        *w = (struct worker){.pool = p, .number = p->count};
        int rc = -pthread_create(&w->thread, NULL, worker_main, w);
        if (rc) {
            pool_stop(p);
            return err_sys(e, rc, "cannot start a thread");
        }
    }
    *out = p;
    return 0;
}

void pool_put(struct pool *p, struct task *task)
{
    HOLD_LOCK(&p->lock);
    while (p->weight > p->limit)
        pthread_cond_wait(&p->less, &p->lock);
    task->next = NULL;
    *p->last = task;
    p->last = &task->next;
    p->weight += task->weight;
    pthread_cond_signal(&p->more);
}

void pool_stop(struct pool *p)
{
    if (!p)
        return;
    {
        HOLD_LOCK(&p->lock);
        p->stop = true;
        pthread_cond_broadcast(&p->more);
    }
    for (unsigned i = 0; i < p->count; i++)
        pthread_join(p->workers[i].thread, NULL);
    pthread_cond_destroy(&p->less);
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
