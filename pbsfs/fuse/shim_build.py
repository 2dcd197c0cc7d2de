"""Builds `pbsfs.fuse._shim`, which gives pyfuse3 what it lacks: seeks, interrupts, replies without waiting.

Why: pyfuse3 fills libfuse's table of operations itself. It leaves `lseek` empty, so the kernel takes
every file for one run of data; and it never asks libfuse to report interrupts, so a program that is
killed while it waits for an answer can't end before that answer. The extension defines the function
that pyfuse3 calls to hand the table over, makes a copy of it with `lseek` added and with the operations
that may take long wrapped, and passes the copy on to libfuse. And pyfuse3 keeps Python's lock (GIL) while the
kernel copies what was read: 0.3 ms for 1 MiB, in which nothing is received and no decoding starts or ends.
The extension defines that function too, and releases the lock for that time. And pyfuse3 answers each request
in a task, which costs more than most answers: the extension answers what needs no waiting before pyfuse3
sees it, and takes the next request that comes soon. `pbsfs.fuse.shim`, the only caller, describes how the
dynamic linker makes pyfuse3 use these definitions.

setuptools runs this file on its own (`cffi_modules` in setup.py), so it imports nothing from pbsfs.
"""

from cffi import FFI

ATTRIBUTES = """
struct pbsfs_attributes {
    uint64_t inode, rdev, size, blocks;
    int64_t seconds;  /* all of the times */
    uint32_t nanoseconds, mode, nlink, uid, gid, block_size;
    double entry_lasts, lasts;  /* seconds for which the kernel may keep the name, and the rest */
};
"""

CDEF = f"""
{ATTRIBUTES}
extern "Python" int64_t pbsfs_lseek(uint64_t inode, int64_t offset, int whence, uint64_t fh);
extern "Python" void pbsfs_interrupted(uint64_t request);
extern "Python" int pbsfs_lookup(uint64_t parent, const char *name, struct pbsfs_attributes *found);
extern "Python" void pbsfs_forget(uint64_t inode);
extern "Python" int pbsfs_getattr(uint64_t inode, struct pbsfs_attributes *found);
extern "Python" int pbsfs_open(uint64_t inode, int flags, uint64_t *fh);
extern "Python" int pbsfs_read(uint64_t request, uint64_t fh, int64_t offset, uint64_t size);
extern "Python" int pbsfs_release(uint64_t fh);
extern "Python" int pbsfs_lacks_xattr(uint64_t inode, const char *name);
int pbsfs_reply(uint64_t request, const char *data, size_t size);
void pbsfs_shim_enable(const char *holes, size_t size);
uint64_t pbsfs_request(void);
int pbsfs_is_interrupted(uint64_t request);
int64_t pbsfs_caller(uint64_t request);
int pbsfs_session_fd(void);
int pbsfs_drop_pages(uint64_t inode, int64_t offset, int64_t length);
"""

SOURCE = (
    r"""
#define FUSE_USE_VERSION 32  /* the level pyfuse3 asks for; no level changes the table of operations */

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <fuse_lowlevel.h>
"""
    + ATTRIBUTES
    + r"""
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

int pbsfs_reply_buf(fuse_req_t req, const char *data, size_t size) REPLACES("fuse_reply_buf");
void pbsfs_process_buf(struct fuse_session *session, const struct fuse_buf *buf)
    REPLACES("fuse_session_process_buf");

typedef int reply_buf_fn(fuse_req_t, const char *, size_t);
typedef void process_buf_fn(struct fuse_session *, const struct fuse_buf *);
typedef struct fuse_session *new_fn(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                    void *);
typedef struct fuse_session *new_versioned_fn(struct fuse_args *, const struct fuse_lowlevel_ops *,
                                              size_t, const void *, void *);

/* Written in Python: an offset, or a negative errno. */
static int64_t pbsfs_lseek(uint64_t inode, int64_t offset, int whence, uint64_t fh);

/* Written in Python: learns that the program may not wait for this request any more. */
static void pbsfs_interrupted(uint64_t request);

/*
 * Written in Python: answers without waiting, each in the thread that pyfuse3 handles requests in. Where one
 * can't answer, it changes nothing, and pyfuse3 gets the request.
 *
 * lookup and getattr: whether *found has them. A look-up counts as one that the kernel has, until it forgets.
 * open: whether the kernel may keep the pages that it has, and the handle in *fh; -1 without an answer.
 * read: whether it replied, by pbsfs_reply. release: whether the handle is closed.
 * lacks_xattr: whether the inode is known not to have the attribute.
 */
static int pbsfs_lookup(uint64_t parent, const char *name, struct pbsfs_attributes *found);
static void pbsfs_forget(uint64_t inode);
static int pbsfs_getattr(uint64_t inode, struct pbsfs_attributes *found);
static int pbsfs_open(uint64_t inode, int flags, uint64_t *fh);
static int pbsfs_read(uint64_t request, uint64_t fh, int64_t offset, uint64_t size);
static int pbsfs_release(uint64_t fh);
static int pbsfs_lacks_xattr(uint64_t inode, const char *name);

static int enabled;

/* pyfuse3's own operations, and the request that one of them got last. */
static struct fuse_lowlevel_ops wrapped;
static uint64_t last_request;

/* Smaller replies take less time than releasing the lock and getting it back. */
#define LARGE_REPLY (16 << 10)

/* How the request that is being processed was answered. */
static enum { LATER, AT_ONCE, AT_ONCE_LARGE } answered;

/*
 * The memory that handlers answer reads of holes from, and the little that is sent instead, again and again:
 * it stays in the processor's cache. And the kernel looks up each page that it copies, which takes it longer
 * where the page was never written.
 */
#define ZEROS (16 << 10)
#define MOST_ZEROS (1 << 20)
static const char *holes;
static size_t holes_size;
static const char zeros[ZEROS] __attribute__((aligned(4096)));

static void pbsfs_shim_enable(const char *data, size_t size)
{
    enabled = 1;
    holes = data;
    holes_size = size;
}

static uint64_t pbsfs_request(void)
{
    return last_request;
}

static int pbsfs_is_interrupted(uint64_t request)
{
    return fuse_req_interrupted((fuse_req_t)(uintptr_t)request);
}

static int64_t pbsfs_caller(uint64_t request)
{
    return fuse_req_ctx((fuse_req_t)(uintptr_t)request)->pid;
}

/* The session that was made last. NULL too where pyfuse3 made it past this extension. */
static struct fuse_session *last_session;

/* Its connection to the kernel; -1 without a session. */
static int pbsfs_session_fd(void)
{
    return last_session == NULL ? -1 : fuse_session_fd(last_session);
}

/* 0, or a negative errno. Waits for pages that the kernel has asked for. */
static int pbsfs_drop_pages(uint64_t inode, int64_t offset, int64_t length)
{
    if (last_session == NULL)
        return -ENOTCONN;
    return fuse_lowlevel_notify_inval_inode(last_session, inode, (off_t)offset, (off_t)length);
}

static void interrupted(fuse_req_t req, void *data)
{
    (void)data;
    pbsfs_interrupted((uint64_t)(uintptr_t)req);
}

static void begin(fuse_req_t req)
{
    last_request = (uint64_t)(uintptr_t)req;
    fuse_req_interrupt_func(req, interrupted, NULL);
}

static struct stat stat_of(const struct pbsfs_attributes *found)
{
    struct timespec time = {.tv_sec = found->seconds, .tv_nsec = found->nanoseconds};
    struct stat shown = {
        .st_ino = found->inode,
        .st_mode = found->mode,
        .st_nlink = found->nlink,
        .st_uid = found->uid,
        .st_gid = found->gid,
        .st_rdev = found->rdev,
        .st_size = (off_t)found->size,
        .st_blksize = found->block_size,
        .st_blocks = (blkcnt_t)found->blocks,
        .st_atim = time,
        .st_mtim = time,
        .st_ctim = time,
    };

    return shown;
}

static void lookup_op(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct pbsfs_attributes found;

    if (pbsfs_lookup(parent, name, &found)) {
        struct fuse_entry_param entry = {
            .ino = found.inode,
            .attr = stat_of(&found),
            .attr_timeout = found.lasts,
            .entry_timeout = found.entry_lasts,
        };

        answered = AT_ONCE;
        if (fuse_reply_entry(req, &entry) != 0)
            pbsfs_forget(found.inode);  /* nobody got it */
        return;
    }
    begin(req);
    wrapped.lookup(req, parent, name);
}

static void getattr_op(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    struct pbsfs_attributes found;

    if (pbsfs_getattr(inode, &found)) {
        struct stat shown = stat_of(&found);

        answered = AT_ONCE;
        (void)fuse_reply_attr(req, &shown, found.lasts);
        return;
    }
    begin(req);
    wrapped.getattr(req, inode, fi);
}

static void readlink_op(fuse_req_t req, fuse_ino_t inode)
{
    begin(req);
    wrapped.readlink(req, inode);
}

/* 0, or a negative errno. cffi calls it without Python's lock. */
static int pbsfs_reply(uint64_t request, const char *data, size_t size)
{
    return pbsfs_reply_buf((fuse_req_t)(uintptr_t)request, data, size);
}

static void open_op(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    uint64_t fh;
    int keep_cache = pbsfs_open(inode, fi->flags, &fh);

    if (keep_cache >= 0) {
        answered = AT_ONCE;
        fi->fh = fh;
        fi->keep_cache = keep_cache != 0;
        if (fuse_reply_open(req, fi) != 0)
            (void)pbsfs_release(fh);  /* nobody got the handle */
        return;
    }
    begin(req);
    wrapped.open(req, inode, fi);
}

static void read_op(fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset,
                    struct fuse_file_info *fi)
{
    if (pbsfs_read((uint64_t)(uintptr_t)req, fi->fh, offset, size)) {
        answered = size < LARGE_REPLY ? AT_ONCE : AT_ONCE_LARGE;
        return;
    }
    begin(req);
    wrapped.read(req, inode, size, offset, fi);
}

static void release_op(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    if (!pbsfs_release(fi->fh)) {
        wrapped.release(req, inode, fi);
        return;
    }
    answered = AT_ONCE;
    (void)fuse_reply_err(req, 0);
}

static void opendir_op(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    begin(req);
    wrapped.opendir(req, inode, fi);
}

static void readdirplus_op(fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset,
                           struct fuse_file_info *fi)
{
    begin(req);
    wrapped.readdirplus(req, inode, size, offset, fi);
}

static void getxattr_op(fuse_req_t req, fuse_ino_t inode, const char *name, size_t size)
{
    if (pbsfs_lacks_xattr(inode, name)) {
        answered = AT_ONCE;
        (void)fuse_reply_err(req, ENODATA);
        return;
    }
    begin(req);
    wrapped.getxattr(req, inode, name, size);
}

static void listxattr_op(fuse_req_t req, fuse_ino_t inode, size_t size)
{
    begin(req);
    wrapped.listxattr(req, inode, size);
}

static void lseek_op(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence,
                     struct fuse_file_info *fi)
{
    int64_t answer = pbsfs_lseek(inode, offset, whence, fi->fh);

    /* A reply fails only if the request or the mount has ended, and then no program waits for it. */
    if (answer < 0)
        (void)fuse_reply_err(req, (int)-answer);
    else
        (void)fuse_reply_lseek(req, (off_t)answer);
}

#define WRAP(name) do { if (op->name != NULL) copy->name = name##_op; } while (0)

/*
 * A copy of the table with lseek set and the rest wrapped, to be freed by the caller; NULL if memory is
 * short.
 * The table is as long as *op_size says, which need not be what this file was compiled with:
 * pyfuse3 may have been compiled against another libfuse.
 */
static struct fuse_lowlevel_ops *completed(const struct fuse_lowlevel_ops *op, size_t *op_size)
{
    size_t least = offsetof(struct fuse_lowlevel_ops, lseek) + sizeof(op->lseek);
    size_t room = *op_size > sizeof(*op) ? *op_size : sizeof(*op);
    struct fuse_lowlevel_ops *copy = calloc(1, room);

    if (copy == NULL) {
        fuse_log(FUSE_LOG_ERR, "pbsfs: no memory for libfuse's table of operations\n");
        return NULL;
    }
    memcpy(copy, op, *op_size);
    memset(&wrapped, 0, sizeof(wrapped));
    memcpy(&wrapped, op, *op_size < sizeof(wrapped) ? *op_size : sizeof(wrapped));
    op = &wrapped;  /* of which every member may be looked at */
    copy->lseek = lseek_op;
    WRAP(lookup);
    WRAP(getattr);
    WRAP(readlink);
    WRAP(open);
    WRAP(read);
    WRAP(release);
    WRAP(opendir);
    WRAP(readdirplus);
    WRAP(getxattr);
    WRAP(listxattr);
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
    copy = completed(op, &op_size);
    if (copy == NULL)
        return NULL;
    session = next(args, copy, op_size, userdata);  /* libfuse keeps a copy of its own */
    last_session = session;
    free(copy);
    return session;
}

static int is_hole(const char *data, size_t size)
{
    return data >= holes && data < holes + holes_size && size <= (size_t)(holes + holes_size - data);
}

static int reply_zeros(fuse_req_t req, size_t size)
{
    struct iovec parts[MOST_ZEROS / ZEROS];
    int count = 0;

    for (; size > 0; count++) {
        parts[count].iov_base = (void *)zeros;
        parts[count].iov_len = size < ZEROS ? size : ZEROS;
        size -= parts[count].iov_len;
    }
    return fuse_reply_iov(req, parts, count);
}

extern int PyGILState_Check(void);

int pbsfs_reply_buf(fuse_req_t req, const char *data, size_t size)
{
    static reply_buf_fn *next;
    PyThreadState *held;
    int result;

    if (next == NULL) {
        next = (reply_buf_fn *)next_symbol("fuse_reply_buf");
        if (next == NULL)
            abort();  /* pyfuse3 could not have been loaded */
    }
    if (size < LARGE_REPLY)
        return next(req, data, size);
    held = PyGILState_Check() ? PyEval_SaveThread() : NULL;  /* the caller holds the data */
    result = size <= MOST_ZEROS && is_hole(data, size) ? reply_zeros(req, size) : next(req, data, size);
    if (held != NULL)
        PyEval_RestoreThread(held);
    return result;
}

/*
 * Before each request, pyfuse3 gives the trio loop two turns, which take longer than most answers. So after
 * an answer that took no waiting, the next request is taken here if it comes within SOON (SOON_AFTER_LARGE,
 * if the answer was large). The loop's other tasks wait no longer than ONE_TURN for that. In nanoseconds.
 */
#define SOON 100000
#define SOON_AFTER_LARGE 200000
#define ONE_TURN 2000000

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/*
 * Whether a request is there, or comes soon. Releases Python's lock while it waits. After a small answer it
 * does not sleep: to be woken takes longer than most requests take to come. Other programs may have the
 * processor meanwhile. A program that got much takes longer to come back, and decoding needs the processor.
 */
static int is_readable(int fd)
{
    struct pollfd wanted = {.fd = fd, .events = POLLIN};
    struct timespec most = {.tv_nsec = SOON_AFTER_LARGE};
    PyThreadState *held;
    int64_t end;
    int found = poll(&wanted, 1, 0);

    if (found == 0) {
        held = PyEval_SaveThread();
        if (answered == AT_ONCE_LARGE) {
            found = ppoll(&wanted, 1, &most, NULL);
        } else {
            end = now() + SOON;
            do {
                (void)sched_yield();
                found = poll(&wanted, 1, 0);
            } while (found == 0 && now() < end);
        }
        PyEval_RestoreThread(held);
    }
    return found == 1 && wanted.revents == POLLIN;
}

void pbsfs_process_buf(struct fuse_session *session, const struct fuse_buf *buf)
{
    static process_buf_fn *next;
    int64_t end = now() + ONE_TURN;

    if (next == NULL) {
        next = (process_buf_fn *)next_symbol("fuse_session_process_buf");
        if (next == NULL)
            abort();  /* pyfuse3 could not have been loaded */
    }
    /* Errors of the connection are left to pyfuse3, which meets them when it asks for the next request. */
    do {
        answered = LATER;
        next(session, buf);
    } while (answered != LATER && now() < end && is_readable(fuse_session_fd(session))
             && fuse_session_receive_buf(session, (struct fuse_buf *)buf) > 0);  /* it is pyfuse3's own */
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
    copy = completed(op, &op_size);
    if (copy == NULL)
        return NULL;
    session = next(args, copy, op_size, version, userdata);
    last_session = session;
    free(copy);
    return session;
}
"""
)

builder = FFI()
builder.cdef(CDEF)
# 3.8 is the first libfuse with an lseek operation.
builder.set_source_pkgconfig(
    "pbsfs.fuse._shim", ["fuse3 >= 3.8"], SOURCE, extra_compile_args=["-Wall", "-Wextra"]
)

if __name__ == "__main__":
    builder.compile(verbose=True)
