/* `pgcdp-engine wal`: what the WAL inside stored writes says, as tables (FORMAT.md 4). */
#ifndef PGCDP_WAL_INDEX_H
#define PGCDP_WAL_INDEX_H

int cmd_wal(int argc, char **argv);

#endif
