#include "extmap.h"

#include <stdlib.h>

#include "io.h"

struct entry {
    uint64_t key;    /* volume in the upper 16 bits, block below; EMPTY: free */
    uint64_t number; /* the write that put it */
    const uint8_t *data;
};

struct zeros {
    uint64_t first, end, number;
    unsigned volume;
};

struct extmap {
    struct entry *table;
    size_t mask, used;
    struct zeros zeros[EXTMAP_ZERO_RANGES];
    size_t zero_count;
};

#define EMPTY UINT64_MAX

static uint64_t key_of(unsigned volume, uint64_t block) { return (uint64_t)volume << 48 | block; }

static size_t slot_of(const struct extmap *map, uint64_t key)
{
    return (size_t)((key * 0x9E3779B97F4A7C15u) >> 20) & map->mask;
}

struct extmap *extmap_new(size_t blocks)
{
    struct extmap *map = calloc(1, sizeof *map);
    if (!map)
        return NULL;
    size_t size = 1024;
    while (size < blocks * 2) /* at most half full, so that probes stay short */
        size *= 2;
    map->mask = size - 1;
    map->table = io_alloc(size * sizeof *map->table);
    if (!map->table) {
        free(map);
        return NULL;
    }
    for (size_t i = 0; i < size; i++)
        map->table[i].key = EMPTY;
    return map;
}

void extmap_free(struct extmap *map)
{
    if (map)
        io_free(map->table, (map->mask + 1) * sizeof *map->table);
    free(map);
}

static size_t find(const struct extmap *map, uint64_t key)
{
    size_t i = slot_of(map, key);
    while (map->table[i].key != EMPTY && map->table[i].key != key)
        i = (i + 1) & map->mask;
    return i;
}

void extmap_put(struct extmap *map, unsigned volume, uint64_t block, const uint8_t *data, uint64_t number)
{
    uint64_t key = key_of(volume, block);
    size_t i = find(map, key);
    if (map->table[i].key == EMPTY)
        map->used++;
    map->table[i] = (struct entry){.key = key, .number = number, .data = data};
}

/* Closes the gap at `i`: entries that probed past it move back (Knuth 6.4, algorithm R). */
static void remove_at(struct extmap *map, size_t i)
{
    size_t j = i;
    map->used--;
    for (;;) {
        j = (j + 1) & map->mask;
        if (map->table[j].key == EMPTY)
            break;
        size_t home = slot_of(map, map->table[j].key);
        if (((j - home) & map->mask) >= ((j - i) & map->mask)) {
            map->table[i] = map->table[j];
            i = j;
        }
    }
    map->table[i].key = EMPTY;
}

bool extmap_zero_room(const struct extmap *map) { return map->zero_count < EXTMAP_ZERO_RANGES; }

void extmap_put_zeros(struct extmap *map, unsigned volume, uint64_t first, uint64_t count, uint64_t number)
{
    uint64_t from = key_of(volume, first), to = key_of(volume, first + count);
    if (count <= map->used) {
        for (uint64_t key = from; key < to; key++) {
            size_t i = find(map, key);
            if (map->table[i].key != EMPTY)
                remove_at(map, i);
        }
    } else {
        /* remove_at may move an entry across the scan's position, so the place is looked at again. A gap closed over
         * the table's end can move one behind the scan: the second pass takes it. */
        for (int pass = 0; pass < 2; pass++)
            for (size_t i = 0; i <= map->mask; i++)
                while (map->table[i].key >= from && map->table[i].key < to)
                    remove_at(map, i);
    }
    map->zeros[map->zero_count++] =
        (struct zeros){.first = first, .end = first + count, .number = number, .volume = volume};
}

enum extmap_hit extmap_get(const struct extmap *map, unsigned volume, uint64_t block, const uint8_t **data)
{
    const struct entry *entry = &map->table[find(map, key_of(volume, block))];
    if (entry->key != EMPTY) {
        *data = entry->data;
        return EXTMAP_DATA;
    }
    for (size_t i = 0; i < map->zero_count; i++) {
        const struct zeros *z = &map->zeros[i];
        if (z->volume == volume && block >= z->first && block < z->end)
            return EXTMAP_ZEROS;
    }
    return EXTMAP_MISS;
}

void extmap_drop(struct extmap *map, unsigned volume, uint64_t block, uint64_t number)
{
    size_t i = find(map, key_of(volume, block));
    if (map->table[i].key != EMPTY && map->table[i].number <= number)
        remove_at(map, i);
}

void extmap_drop_zeros(struct extmap *map, uint64_t number)
{
    size_t kept = 0;
    for (size_t i = 0; i < map->zero_count; i++)
        if (map->zeros[i].number > number)
            map->zeros[kept++] = map->zeros[i];
    map->zero_count = kept;
}

bool extmap_empty(const struct extmap *map) { return map->used == 0 && map->zero_count == 0; }
