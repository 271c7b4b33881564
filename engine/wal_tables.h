/* What was read from WAL, as the tables of FORMAT.md 4.1: files in a directory. */
#ifndef PGCDP_WAL_TABLES_H
#define PGCDP_WAL_TABLES_H

#include "err.h"
#include "format.h"
#include "wal.h"
#include "wal_xacts.h"

struct tables;

/* New files in `directory`; 0 or -errno. */
int tables_open(struct tables **out, const char *directory, struct err *e);

/* 0 or -errno. */
int tables_end(struct tables *t, const struct xact_end *end);
int tables_note(struct tables *t, const struct wal_record *record);
int tables_mark(struct tables *t, uint64_t write, const void *name, uint32_t length);
int tables_lost(struct tables *t, uint64_t from, uint64_t to, uint64_t write);
int tables_running(struct tables *t, uint32_t xid); /* one that has not ended */
int tables_write(struct tables *t, const struct fmt_wal_write *row);

/* Writes what is left, and says whether all went well. */
int tables_close(struct tables *t, struct err *e);

#endif
