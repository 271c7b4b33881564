/* See wal_files.h. */
#include "wal_files.h"

#include "util.h"

static struct wal_file *find(struct wal_files *f, uint16_t volume, uint64_t inode)
{
    for (uint32_t i = 0; i < FILES_KEPT; i++)
        if (f->file[i].turn && f->file[i].inode == inode && f->file[i].volume == volume)
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

struct wal_file *files_take(struct wal_files *f, const struct xfs_log *x, uint16_t volume, const struct xfs_inode *inode,
                                  uint64_t file_bytes)
{
    struct wal_file *file = find(f, volume, inode->number);
    if (inode->size != file_bytes || inode->tree) {
        if (file)
            file->turn = 0;
        return NULL;
    }
    if (!inode->has_extents)
        return file;
    if (!file)
        file = oldest(f);
    file->inode = inode->number;
    file->volume = volume;
    file->turn = ++f->turn;
    file->extents = 0;
    for (uint32_t i = 0; i < inode->extents && file->extents < FILES_EXTENTS; i++)
        file->extents += xfs_log_extent(x, inode->extent + (uint64_t)i * XFS_EXTENT_BYTES, &file->extent[file->extents]);
    return file;
}

void files_forget(struct wal_files *f, uint16_t volume)
{
    for (uint32_t i = 0; i < FILES_KEPT; i++)
        if (f->file[i].volume == volume)
            f->file[i].turn = 0;
}

bool files_has(const struct wal_file *file, uint64_t at, uint64_t place)
{
    for (uint32_t i = 0; i < file->extents; i++) {
        const struct xfs_extent *e = &file->extent[i];
        if (at - e->file < e->length && at - e->file == place - e->place)
            return true;
    }
    return false;
}

bool files_any_has(const struct wal_files *f, uint16_t volume, uint64_t at, uint64_t place)
{
    for (uint32_t i = 0; i < FILES_KEPT; i++)
        if (f->file[i].turn && f->file[i].volume == volume && files_has(&f->file[i], at, place))
            return true;
    return false;
}
