"""Builds `pbsfs.fuse._lseek`, which gives pyfuse3 an answer to SEEK_DATA and SEEK_HOLE.

Why: pyfuse3 fills libfuse's table of operations itself and leaves `lseek` empty, so the kernel
takes every file for one run of data. The extension defines the function that pyfuse3 calls to hand
the table over, adds `lseek` to a copy of it, and passes the copy on to libfuse. How the two are
made to meet is told in `pbsfs.fuse.lseek`, the only caller.

setuptools runs this file on its own (`cffi_modules` in setup.py), so it imports nothing from pbsfs.
"""

from cffi import FFI

CDEF = """
extern "Python" int64_t pbsfs_lseek(uint64_t inode, int64_t offset, int whence, uint64_t fh);
void pbsfs_lseek_enable(void);
"""

SOURCE = r"""
#define FUSE_USE_VERSION 32  /* the level pyfuse3 asks for; no level changes the table of operations */

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <fuse_lowlevel.h>

/*
 * The C names differ from the names of the symbols for two reasons: newer headers define
 * fuse_session_new as a macro, and do not agree on the type of the last argument but one of
 * fuse_session_new_versioned.
 */
#define REPLACES(symbol) __asm__(symbol) __attribute__((visibility("default")))

struct fuse_session *pbsfs_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
                                       size_t op_size, void *userdata)
    REPLACES("fuse_session_new");
struct fuse_session *pbsfs_session_new_versioned(struct fuse_args *args,
                                                 const struct fuse_lowlevel_ops *op, size_t op_size,
                                                 const void *version, void *userdata)
    REPLACES("fuse_session_new_versioned");

typedef struct fuse_session *new_fn(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                    void *);
typedef struct fuse_session *new_versioned_fn(struct fuse_args *, const struct fuse_lowlevel_ops *,
                                              size_t, const void *, void *);

/* Written in Python: an offset, or a negative errno. */
static int64_t pbsfs_lseek(uint64_t inode, int64_t offset, int whence, uint64_t fh);

static int enabled;

static void pbsfs_lseek_enable(void)
{
    enabled = 1;
}

static void lseek_op(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence,
                     struct fuse_file_info *fi)
{
    int64_t answer = pbsfs_lseek(inode, offset, whence, fi->fh);

    /* A reply fails only if the request or the mount is gone, and then nobody waits for it. */
    if (answer < 0)
        (void)fuse_reply_err(req, (int)-answer);
    else
        (void)fuse_reply_lseek(req, (off_t)answer);
}

/*
 * A copy of the table with lseek set, to be freed by the caller; NULL if memory is short.
 * The table is as long as *op_size says, which need not be what this file was compiled with:
 * pyfuse3 may have been compiled against another libfuse.
 */
static struct fuse_lowlevel_ops *with_lseek(const struct fuse_lowlevel_ops *op, size_t *op_size)
{
    size_t least = offsetof(struct fuse_lowlevel_ops, lseek) + sizeof(op->lseek);
    size_t room = *op_size > sizeof(*op) ? *op_size : sizeof(*op);
    struct fuse_lowlevel_ops *copy = calloc(1, room);

    if (copy == NULL) {
        fuse_log(FUSE_LOG_ERR, "pbsfs: no memory for libfuse's table of operations\n");
        return NULL;
    }
    memcpy(copy, op, *op_size);
    copy->lseek = lseek_op;
    if (*op_size < least)
        *op_size = least;
    return copy;
}

/* libfuse's own function of that name. This extension is linked with libfuse, so it comes next. */
static void *next_symbol(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);

    if (found == NULL)
        fuse_log(FUSE_LOG_ERR, "pbsfs: this libfuse has no function %s\n", name);
    return found;
}

struct fuse_session *pbsfs_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
                                       size_t op_size, void *userdata)
{
    new_fn *next = (new_fn *)next_symbol("fuse_session_new");
    struct fuse_lowlevel_ops *copy;
    struct fuse_session *session;

    if (next == NULL)
        return NULL;
    if (!enabled || op == NULL)
        return next(args, op, op_size, userdata);
    copy = with_lseek(op, &op_size);
    if (copy == NULL)
        return NULL;
    session = next(args, copy, op_size, userdata);  /* libfuse keeps a copy of its own */
    free(copy);
    return session;
}

/* What the header of libfuse 3.17 and later calls under the name fuse_session_new. */
struct fuse_session *pbsfs_session_new_versioned(struct fuse_args *args,
                                                 const struct fuse_lowlevel_ops *op, size_t op_size,
                                                 const void *version, void *userdata)
{
    new_versioned_fn *next = (new_versioned_fn *)next_symbol("fuse_session_new_versioned");
    struct fuse_lowlevel_ops *copy;
    struct fuse_session *session;

    if (next == NULL)
        return NULL;
    if (!enabled || op == NULL)
        return next(args, op, op_size, version, userdata);
    copy = with_lseek(op, &op_size);
    if (copy == NULL)
        return NULL;
    session = next(args, copy, op_size, version, userdata);
    free(copy);
    return session;
}
"""

builder = FFI()
builder.cdef(CDEF)
# 3.8 is the first libfuse with an lseek operation.
builder.set_source_pkgconfig(
    "pbsfs.fuse._lseek", ["fuse3 >= 3.8"], SOURCE, extra_compile_args=["-Wall", "-Wextra"]
)

if __name__ == "__main__":
    builder.compile(verbose=True)
