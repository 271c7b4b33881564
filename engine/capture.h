#ifndef PGCDP_CAPTURE_H
#define PGCDP_CAPTURE_H

/* `pgcdp-engine capture`; returns the exit code. */
int cmd_capture(int argc, char **argv);

#endif
