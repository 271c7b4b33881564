/* The map that a view shows now, with the frames files that it names; it can be exchanged while it is read from.
 *
 * A reader takes the map, reads, gives it back. An exchange puts the new map in place, so that whoever takes one from then
 * on has the new one, and waits until the last who took the old one has given it back: only then may what the old one read
 * from the image be changed (truth 6). Nobody waits for an exchange but the one who asked for it.
 */
#ifndef PGCDP_SHOWN_MAP_H
#define PGCDP_SHOWN_MAP_H

#include "block_map.h"
#include "err.h"
#include "frame_file.h"

struct shown_map;

/* Holds no map yet: NULL when there is no memory. */
struct shown_map *shown_map_new(void);

/* Nobody may have taken the map any more. */
void shown_map_free(struct shown_map *s);

/* Loads and checks a map and shows it. A later one must have the first one's set and volumes, with their images; frames files
 * that the one before names as well stay open. When this returns, nobody reads by the one before. On an error (ERR_DAMAGE
 * or -errno) that one goes on; -EBUSY when `from` is given and another map than that is shown. Any thread. */
int shown_map_exchange(struct shown_map *s, const char *path, const char *from, struct err *e);

struct taken_map; /* does not change until it is given back */
struct taken_map *shown_map_take(struct shown_map *s);
void shown_map_give(struct shown_map *s, struct taken_map *t);

const struct block_map *taken_map_blocks(const struct taken_map *t);

/* The frames file of a source, opened when it is first needed. ERR_DAMAGE or -errno. */
int taken_map_file(struct taken_map *t, uint32_t source, const struct frame_file **file, struct err *e);

/* Exchanges done, and the path of the map that the last of them put in place: while one waits for readers of the map before,
 * it is not told yet. Cut off where `room` ends. */
uint64_t shown_map_get_status(struct shown_map *s, char *path, size_t room);

#endif
