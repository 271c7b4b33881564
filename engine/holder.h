/* `pgcdp-engine hold`: keeps a set's FUSE connection while capture processes come and go. */
#ifndef PGCDP_HOLDER_H
#define PGCDP_HOLDER_H

int cmd_hold(int argc, char **argv);

#endif
