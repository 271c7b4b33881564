/* See wal_files.h. */
#include "wal_files.h"

#include <string.h>

#include "util.h"

static struct wal_file *find(struct wal_files *f, uint16_t volume, uint64_t number)
{
    for (uint32_t i = 0; i < FILES_KEPT; i++)
        if (f->file[i].turn && f->file[i].number == number && f->file[i].volume == volume)
            return &f->file[i];
    return NULL;
}

static struct wal_file *oldest(struct wal_files *f)
{
    struct wal_file *found = &f->file[0];
    for (uint32_t i = 1; i < FILES_KEPT; i++)
        if (f->file[i].turn < found->turn)
            found = &f->file[i];
    return found;
}

struct wal_file *files_take(struct wal_files *f, uint16_t volume, const struct logged_file *logged, uint64_t file_bytes)
{
    struct wal_file *file = find(f, volume, logged->number);
    if (logged->size != file_bytes || logged->which == LOGGED_APART) {
        if (file)
            file->turn = 0;
        return NULL;
    }
    if (logged->which != LOGGED_ALL)
        return file;
    if (!file)
        file = oldest(f);
    file->number = logged->number;
    file->volume = volume;
    file->turn = ++f->turn;
    file->extents = (uint32_t)min_u64(logged->extents, FILES_EXTENTS);
    memcpy(file->extent, logged->extent, file->extents * sizeof *file->extent);
    return file;
}

void files_forget(struct wal_files *f, uint16_t volume)
{
    for (uint32_t i = 0; i < FILES_KEPT; i++)
        if (f->file[i].volume == volume)
            f->file[i].turn = 0;
}

bool files_extents_have(const struct logged_extent *extent, uint32_t extents, uint64_t at, uint64_t place)
{
    for (const struct logged_extent *e = extent; e < extent + extents; e++)
        if (at - e->file < e->length && at - e->file == place - e->place)
            return true;
    return false;
}

bool files_any_has(const struct wal_files *f, uint16_t volume, uint64_t at, uint64_t place)
{
    for (uint32_t i = 0; i < FILES_KEPT; i++)
        if (f->file[i].turn && f->file[i].volume == volume && files_extents_have(f->file[i].extent, f->file[i].extents, at, place))
            return true;
    return false;
}
