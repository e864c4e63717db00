/* What pyfuse3 lacks of libfuse's low-level interface, put into its table of operations.
 *
 * pyfuse3 hands its table to fuse_session_new. This library is loaded before it with global symbols, so
 * that its call arrives here: the table is copied, the operations below are added, and libfuse's own function
 * is called. Requests for file data go to Python's `serve_*` (requests.py), which answer from worker threads.
 *
 * libfuse 3.17 renamed the function; both names are here, each calls the one of its name.
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buffers.c"

#undef fuse_session_new
#define INTERPOSED __attribute__((visibility("default"))) struct fuse_session *

#define MAX_BACKGROUND 64 /* requests of read-ahead and write-back in flight; the kernel's default is 12 */

struct libfuse_version;

static void (*next_init)(void *userdata, struct fuse_conn_info *connection);

static void init(void *userdata, struct fuse_conn_info *connection)
{
    next_init(userdata, connection);
    /* a request is read into memory in one call: through a pipe it takes five */
    connection->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_MOVE);
    connection->max_background = MAX_BACKGROUND;
    connection->congestion_threshold = MAX_BACKGROUND * 3 / 4;
}

static void read_file(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                      struct fuse_file_info *file)
{
    serve_read(request, file->fh, (uint64_t)offset, size);
}

static void write_file(fuse_req_t request, fuse_ino_t inode, struct fuse_bufvec *data, off_t offset,
                       struct fuse_file_info *file)
{
    /* libfuse's buffer is used again as soon as this returns */
    struct fuse_bufvec copy = FUSE_BUFVEC_INIT(fuse_buf_size(data));
    ssize_t size = -ENOMEM;

    Py_BEGIN_ALLOW_THREADS
    copy.buf[0].mem = take_buffer(copy.buf[0].size);
    if (copy.buf[0].mem)
        size = fuse_buf_copy(&copy, data, 0);
    Py_END_ALLOW_THREADS
    if (size < 0) {
        if (copy.buf[0].mem)
            give_back_buffer(copy.buf[0].mem);
        fuse_reply_err(request, (int)-size);
        return;
    }
    serve_write(request, file->fh, (uint64_t)offset, copy.buf[0].mem, (size_t)size);
}

static void sync_file(fuse_req_t request, fuse_ino_t inode, int data_only, struct fuse_file_info *file)
{
    serve_sync(request, file->fh, data_only != 0);
}

static void sync_folder(fuse_req_t request, fuse_ino_t inode, int data_only, struct fuse_file_info *file)
{
    serve_sync_folder(request, file->fh, data_only != 0);
}

static void allocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length,
                     struct fuse_file_info *file)
{
    serve_allocate(request, file->fh, mode, (uint64_t)offset, (uint64_t)length);
}

static void seek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *file)
{
    serve_seek(request, inode, file->fh, (uint64_t)offset, whence);
}

static void copy_range(fuse_req_t request, fuse_ino_t source, off_t source_offset,
                       struct fuse_file_info *source_file, fuse_ino_t target, off_t target_offset,
                       struct fuse_file_info *target_file, size_t length, int flags)
{
    if (flags)
        fuse_reply_err(request, EINVAL);
    else
        serve_copy_range(request, source_file->fh, (uint64_t)source_offset, target_file->fh,
                         (uint64_t)target_offset, length);
}

/* The table with what is added; pyfuse3 opens one session in a process. */
static const struct fuse_lowlevel_ops *extended(const struct fuse_lowlevel_ops *operations, size_t *size)
{
    static struct fuse_lowlevel_ops table;

    memset(&table, 0, sizeof table);
    memcpy(&table, operations, *size < sizeof table ? *size : sizeof table);
    *size = sizeof table;
    next_init = table.init;
    table.init = init;
    table.read = read_file;
    table.write_buf = write_file;
    table.fsync = sync_file;
    table.fsyncdir = sync_folder;
    table.fallocate = allocate;
    table.lseek = seek;
    table.copy_file_range = copy_range;
    return &table;
}

INTERPOSED fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *operations, size_t size,
                            void *userdata)
{
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) =
        dlsym(RTLD_NEXT, "fuse_session_new");

    operations = extended(operations, &size);
    return next ? next(args, operations, size, userdata) : NULL;
}

INTERPOSED fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *operations,
                                      size_t size, struct libfuse_version *version, void *userdata)
{
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                 struct libfuse_version *, void *) =
        dlsym(RTLD_NEXT, "fuse_session_new_versioned");

    operations = extended(operations, &size);
    return next ? next(args, operations, size, version, userdata) : NULL;
}
