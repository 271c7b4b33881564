/* The sub-command that lists what the map of a view says. */
#ifndef PGCDP_LIST_MAP_H
#define PGCDP_LIST_MAP_H

int cmd_map(int argc, char **argv);

#endif
