/* See command.h. */
#include "command.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

int command_failed(const struct err *e, int code)
{
    fflush(stdout);
    fprintf(stderr, "pgcdp-engine: error: %s\n", e->message);
    if (e->hint[0])
        fprintf(stderr, "hint: %s\n", e->hint);
    return err_exit_code(code);
}

bool command_number(const char *text, uint64_t *out)
{
    char *end;
    errno = 0;
    *out = strtoull(text, &end, 10);
    return text[0] >= '0' && text[0] <= '9' && !*end && !errno;
}
