/* The sub-command that serves a view. */
#ifndef PGCDP_SHOW_VIEW_H
#define PGCDP_SHOW_VIEW_H

int cmd_view(int argc, char **argv);

#endif
