/* The `wal` sub-command: the transactions in the writes of a store's intervals, one JSON object a line. */
#ifndef PGCDP_WAL_LIST_H
#define PGCDP_WAL_LIST_H

int cmd_wal(int argc, char **argv);

#endif
