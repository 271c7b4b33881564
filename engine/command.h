/* What the sub-commands for people share: how an error is told, how a number is read. */
#ifndef PGCDP_COMMAND_H
#define PGCDP_COMMAND_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"

/* Prints the error and its hint on stderr; the exit code. */
int command_failed(const struct err *e, int code);

/* A whole number without sign. */
bool command_number(const char *text, uint64_t *out);

#endif
