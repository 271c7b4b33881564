/* `pgcdp-engine dump` and `pgcdp-engine check`: argv[0] is the sub-command; they return the exit code. */
#ifndef PGCDP_DUMP_H
#define PGCDP_DUMP_H

int cmd_dump(int argc, char **argv);
int cmd_check(int argc, char **argv);

#endif
