/* slowfs: one directory of files behind FUSE, every read, write and fsync answered DELAY microseconds
 * after it arrived.  One thread and a queue of deadlines: any number of requests wait at the same time
 * and cost nothing meanwhile, which is what storage behind a network looks like.
 *
 *   slowfs SOURCE MOUNTPOINT DELAY_US      (runs in the foreground; SIGTERM unmounts)
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 314
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define QUEUE 4096
#define NAMES 256

struct waiting {
    fuse_req_t request;
    long long deadline;
    int kind, fd; /* kind: 'r'ead, 'w'ritten with result in size, 's'ync */
    size_t size;
    off_t offset;
};

static struct waiting queue[QUEUE];
static unsigned head, tail;
static long long delay_ns;
static int source;
static char *names[NAMES];

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void postpone(fuse_req_t request, int kind, int fd, size_t size, off_t offset)
{
    if (tail - head == QUEUE) {
        fuse_reply_err(request, ENOMEM);
        return;
    }
    queue[tail++ % QUEUE] = (struct waiting){request, now() + delay_ns, kind, fd, size, offset};
}

static void answer(struct waiting *w)
{
    static char buffer[1 << 20];
    if (w->kind == 'r') {
        ssize_t n = pread(w->fd, buffer, w->size < sizeof buffer ? w->size : sizeof buffer, w->offset);
        if (n < 0)
            fuse_reply_err(w->request, errno);
        else
            fuse_reply_buf(w->request, buffer, n);
    } else if (w->kind == 'w') {
        fuse_reply_write(w->request, w->size);
    } else {
        fuse_reply_err(w->request, 0);
    }
}

static fuse_ino_t inode_of(const char *name)
{
    for (int i = 2; i < NAMES; i++) {
        if (!names[i])
            names[i] = strdup(name);
        if (!strcmp(names[i], name))
            return i;
    }
    return 0;
}

static int attributes(fuse_ino_t inode, struct stat *info)
{
    int failed = inode == 1 ? fstat(source, info) : fstatat(source, names[inode], info, 0);
    info->st_ino = inode;
    return failed ? errno : 0;
}

static void do_init(void *data, struct fuse_conn_info *connection)
{
    (void)data;
    connection->max_background = QUEUE / 2; /* the default would let 12 requests wait at once */
    connection->congestion_threshold = QUEUE / 2;
}

static void do_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    (void)parent;
    struct fuse_entry_param entry = {0};
    struct stat info;
    if (fstatat(source, name, &info, 0)) {
        fuse_reply_err(request, errno);
        return;
    }
    entry.ino = inode_of(name);
    entry.attr = info;
    entry.attr.st_ino = entry.ino;
    fuse_reply_entry(request, &entry);
}

static void do_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
    (void)file;
    struct stat info;
    int error = attributes(inode, &info);
    if (error)
        fuse_reply_err(request, error);
    else
        fuse_reply_attr(request, &info, 0);
}

static void do_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *wanted, int which,
                       struct fuse_file_info *file)
{
    if (which & FUSE_SET_ATTR_SIZE) {
        int fd = openat(source, names[inode], O_WRONLY | O_CLOEXEC);
        if (fd < 0 || ftruncate(fd, wanted->st_size)) {
            fuse_reply_err(request, errno);
            return;
        }
        close(fd);
    }
    do_getattr(request, inode, file);
}

static void do_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
    int fd = openat(source, names[inode], (file->flags & O_ACCMODE) | O_CLOEXEC);
    if (fd < 0) {
        fuse_reply_err(request, errno);
        return;
    }
    file->fh = fd;
    file->direct_io = 1;
    fuse_reply_open(request, file);
}

static void do_release(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
    (void)inode;
    close(file->fh);
    fuse_reply_err(request, 0);
}

static void do_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                    struct fuse_file_info *file)
{
    (void)inode;
    postpone(request, 'r', file->fh, size, offset);
}

static void do_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *file)
{
    (void)inode;
    ssize_t n = pwrite(file->fh, data, size, offset);
    if (n < 0)
        fuse_reply_err(request, errno);
    else
        postpone(request, 'w', file->fh, n, offset);
}

static void do_fsync(fuse_req_t request, fuse_ino_t inode, int datasync, struct fuse_file_info *file)
{
    (void)inode;
    (void)datasync;
    fdatasync(file->fh);
    postpone(request, 's', file->fh, 0, 0);
}

static void do_readdir(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                       struct fuse_file_info *file)
{
    (void)inode;
    (void)size;
    (void)offset;
    (void)file;
    fuse_reply_buf(request, NULL, 0);
}

static void loop(struct fuse_session *session)
{
    struct fuse_buf buffer = {0};
    while (!fuse_session_exited(session)) {
        while (head != tail && queue[head % QUEUE].deadline <= now())
            answer(&queue[head++ % QUEUE]);
        struct pollfd ready = {.fd = fuse_session_fd(session), .events = POLLIN};
        long long left = head == tail ? 200000000ll : queue[head % QUEUE].deadline - now();
        if (left < 0)
            continue;
        struct timespec timeout = {left / 1000000000, left % 1000000000};
        if (ppoll(&ready, 1, &timeout, NULL) <= 0)
            continue;
        int n = fuse_session_receive_buf(session, &buffer);
        if (n == 0 || n == -ENODEV)
            break;
        if (n > 0)
            fuse_session_process_buf(session, &buffer);
    }
    free(buffer.mem);
}

int main(int argc, char **argv)
{
    static const struct fuse_lowlevel_ops operations = {
        .init = do_init,
        .lookup = do_lookup,
        .getattr = do_getattr,
        .setattr = do_setattr,
        .open = do_open,
        .release = do_release,
        .read = do_read,
        .write = do_write,
        .fsync = do_fsync,
        .readdir = do_readdir,
    };
    if (argc != 4) {
        fprintf(stderr, "usage: slowfs SOURCE MOUNTPOINT DELAY_US\n");
        return 2;
    }
    source = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    delay_ns = atoll(argv[3]) * 1000;
    char *options[] = {argv[0], "-ofsname=slowfs"};
    struct fuse_args arguments = FUSE_ARGS_INIT(2, options);
    struct fuse_session *session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
    if (source < 0 || !session || fuse_set_signal_handlers(session) ||
        fuse_session_mount(session, argv[2])) {
        perror("slowfs");
        return 1;
    }
    loop(session);
    fuse_session_unmount(session);
    fuse_remove_signal_handlers(session);
    fuse_session_destroy(session);
    return 0;
}
