/* What went wrong while serving: each different error is logged and kept once, all are counted. Any thread. */
#ifndef PGCDP_FAULTS_H
#define PGCDP_FAULTS_H

#include <pthread.h>
#include <stdint.h>

#include "err.h"

#define FAULTS_KEPT 16u

struct fault {
    int code;
    struct err err;
};

struct faults {
    pthread_mutex_t lock;
    uint64_t count;
    unsigned kept;
    struct fault first[FAULTS_KEPT];
};

/* `where`: what was being done, for the log. */
void faults_add(struct faults *f, int code, const struct err *e, const char *where);

/* Copies the kept ones; their number. */
unsigned faults_get(struct faults *f, struct fault out[FAULTS_KEPT], uint64_t *count);

#endif
