/* pgcdp-engine: where bytes flow at volume speed. One sub-command a task. */
#include <stdio.h>
#include <string.h>

#include "capture.h"
#include "dump.h"
#include "holder.h"
#include "list_map.h"
#include "show_view.h"
#include "wal_index.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} COMMANDS[] = {
    {"capture", cmd_capture, "serve a set's volumes and journal every write"},
    {"hold", cmd_hold, "keep a set's FUSE connection while capture processes come and go"},
    {"view", cmd_view, "serve a set's volumes as they were at a recovery point"},
    {"dump", cmd_dump, "list the records of a journal"},
    {"map", cmd_map, "list what the map of a view says"},
    {"wal", cmd_wal, "list the transactions in the writes of stored intervals"},
    {"check", cmd_check, "read a whole journal and name every damage"},
};

int main(int argc, char **argv)
{
    size_t count = sizeof COMMANDS / sizeof *COMMANDS;
    for (size_t i = 0; argc > 1 && i < count; i++)
        if (strcmp(argv[1], COMMANDS[i].name) == 0)
            return COMMANDS[i].run(argc - 1, argv + 1);
    FILE *out = argc > 1 && strcmp(argv[1], "--help") == 0 ? stdout : stderr;
    fprintf(out, "usage: pgcdp-engine COMMAND [OPTION ...]\n\n");
    for (size_t i = 0; i < count; i++)
        fprintf(out, "  %-10s %s\n", COMMANDS[i].name, COMMANDS[i].help);
    return out == stdout ? 0 : 2;
}
