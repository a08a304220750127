/* Disk errors from outside: what a process changes below $SHIM_UNDER is counted, traced, and made to fail or to kill.
 *
 * In: the environment, as it is when the process starts.
 *   SHIM_UNDER      an absolute directory without symlinks; it and what is below it is counted
 *   SHIM_FAIL_AT    the number of the operation that fails, from 1
 *   SHIM_FAIL_FROM  the number of the first operation that fails, and all later ones with it
 *   SHIM_ERRNO      what they fail with; 0: a write is cut to half its bytes, other operations are let through
 *   SHIM_KILL_AT    the number of the operation before which the process kills itself
 *   SHIM_TRACE      a file that gets a line of JSON for each operation that was done or failed
 *
 * Counted: what CPython calls to change files (see the public functions at the end). Not counted: opens without
 * O_CREAT, truncate by path, symlink, chmod, utime, sendfile, copy_file_range, pwritev2, and what maps files.
 *
 * The work is done by raw system calls: they need no dlsym, so nothing here allocates or depends on load order.
 */
#undef _FORTIFY_SOURCE /* its inline open() would be defined twice */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct operation {
    const char *name;
    long number;
    int shortened;            /* a write of which only half is to be done */
    char path[PATH_MAX];      /* empty: could not be resolved */
    char to[PATH_MAX];        /* the second path of a rename or a link */
    long long offset, size;   /* -1: does not apply */
    long long inode;          /* of what a descriptor leads to; -1: there is no descriptor */
    int mode;                 /* permissions of what was made; -1: does not apply */
    int created, truncated;   /* of an open */
    const struct iovec *parts; /* of a write */
    int errno_before;
};

#define OPERATION(called) {.name = (called), .offset = -1, .size = -1, .inode = -1, .mode = -1}

static struct {
    pid_t pid; /* 0: nothing is counted */
    char under[PATH_MAX];
    char trace[PATH_MAX]; /* empty: no trace */
    long fail_at, fail_from, kill_at;
    int error;
} shim;

static long counted;

/* Held from the count to the line in the trace, so that the lines stand in the order in which things were done. */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static long number_in(const char *variable, long otherwise) {
    const char *text = getenv(variable);
    return text && *text ? strtol(text, NULL, 10) : otherwise;
}

static void text_in(const char *variable, char *text) {
    const char *found = getenv(variable);
    if (found && strlen(found) < PATH_MAX) strcpy(text, found);
}

__attribute__((constructor)) static void begin_to_count(void) {
    text_in("SHIM_UNDER", shim.under);
    text_in("SHIM_TRACE", shim.trace);
    shim.fail_at = number_in("SHIM_FAIL_AT", 0);
    shim.fail_from = number_in("SHIM_FAIL_FROM", 0);
    shim.kill_at = number_in("SHIM_KILL_AT", 0);
    shim.error = (int)number_in("SHIM_ERRNO", EIO);
    if (*shim.under) shim.pid = getpid();
}

/* ---- whether an operation counts: these keep errno, so that what is let through looks untouched ---- */

/* A forked child is let through before anything else is looked at: after vfork its memory is that of its parent. */
static int counting(void) { return shim.pid && shim.pid == getpid(); }

static int is_under(const char *path) {
    size_t length = strlen(shim.under);
    return strncmp(path, shim.under, length) == 0 && (path[length] == '\0' || path[length] == '/');
}

static int path_of_descriptor(int fd, char *path) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = '\0';
    return length > 0;
}

/* A FIFO is left alone: a write to it may wait for a thread that waits for its turn. */
static int concerns_descriptor(int fd, struct operation *op) {
    if (!counting()) return 0;
    int before = errno;
    struct stat found;
    int concerns = path_of_descriptor(fd, op->path) && is_under(op->path) && fstat(fd, &found) == 0 &&
                   (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode));
    if (concerns) op->inode = (long long)found.st_ino;
    errno = before;
    return concerns;
}

/* The last part of a name is not followed; what comes before it is resolved by the kernel, symlinks and all. */
static int path_of_name(int dirfd, const char *name, char *path) {
    char parent[PATH_MAX];
    size_t length = strlen(name);
    while (length > 1 && name[length - 1] == '/') length--;
    size_t start = length;
    while (start > 0 && name[start - 1] != '/') start--;
    if (length >= PATH_MAX || start == length) return 0;
    memcpy(parent, name, start);
    strcpy(parent + start, start ? "" : ".");
    int fd = (int)syscall(SYS_openat, dirfd, parent, O_PATH | O_DIRECTORY | O_CLOEXEC, 0L);
    if (fd < 0) return 0;
    int resolved = path_of_descriptor(fd, path);
    syscall(SYS_close, fd);
    size_t end = resolved && path[1] ? strlen(path) : 0;
    resolved = resolved && end + 1 + (length - start) < PATH_MAX;
    if (resolved) snprintf(path + end, PATH_MAX - end, "/%.*s", (int)(length - start), name + start);
    return resolved;
}

static int concerns_name(int dirfd, const char *name, char *path) {
    if (!counting()) return 0;
    int before = errno;
    int resolved = path_of_name(dirfd, name, path);
    if (!resolved) *path = '\0';
    errno = before;
    return resolved && is_under(path);
}

/* As for writes: an open may wait as well. */
static int is_fifo(int dirfd, const char *name) {
    int before = errno;
    struct stat found;
    int fifo = fstatat(dirfd, name, &found, 0) == 0 && S_ISFIFO(found.st_mode);
    errno = before;
    return fifo;
}

/* ---- the trace ---- */

static char *put_escaped(char *at, const char *text) {
    *at++ = '"';
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;
        if (byte < 0x20 || byte == '"' || byte == '\\')
            at += sprintf(at, "\\u%04x", byte);
        else
            *at++ = (char)byte;
    }
    *at++ = '"';
    return at;
}

static char *put_hex(char *at, const struct iovec *parts, size_t bytes) {
    for (; bytes; parts++) {
        const unsigned char *from = parts->iov_base;
        size_t length = parts->iov_len < bytes ? parts->iov_len : bytes;
        for (size_t i = 0; i < length; i++) {
            *at++ = "0123456789abcdef"[from[i] >> 4];
            *at++ = "0123456789abcdef"[from[i] & 15];
        }
        bytes -= length;
    }
    return at;
}

static char *put_number(char *at, const char *key, long long number) {
    return number < 0 ? at + sprintf(at, ", \"%s\": null", key) : at + sprintf(at, ", \"%s\": %lld", key, number);
}

/* A trace with a hole would prove the wrong thing, so a line that cannot be written ends the process. */
static void append_to_trace(const char *line, size_t length) {
    int fd = (int)syscall(SYS_openat, AT_FDCWD, shim.trace, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600L);
    if (fd < 0 || syscall(SYS_write, fd, line, length) != (long)length) abort();
    syscall(SYS_close, fd);
}

static void trace(const struct operation *op, long result, int error) {
    size_t bytes = op->parts && result > 0 ? (size_t)result : 0;
    size_t room = 512 + 6 * (strlen(op->path) + strlen(op->to)) + 2 * bytes;
    char *line = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (line == MAP_FAILED) abort();
    char *at = line + sprintf(line, "{\"n\": %ld, \"pid\": %d, \"op\": \"%s\", \"path\": ", op->number, shim.pid, op->name);
    at = put_escaped(at, op->path);
    at = put_escaped(at + sprintf(at, ", \"to\": "), op->to);
    at = put_number(at, "offset", op->offset);
    at = put_number(at, "size", op->size);
    at = put_number(at, "inode", op->inode);
    at = put_number(at, "mode", op->mode);
    at += sprintf(at, ", \"created\": %s", op->created ? "true" : "false");
    at += sprintf(at, ", \"truncated\": %s, \"data\": \"", op->truncated ? "true" : "false");
    at = put_hex(at, op->parts, bytes);
    at += sprintf(at, "\", \"result\": %ld, \"errno\": %d}\n", result, error);
    append_to_trace(line, (size_t)(at - line));
    munmap(line, room);
}

/* ---- the two ends of a counted operation ---- */

/* Take the turn. What the operation is to fail with; 0: it is to be done. */
static int begin(struct operation *op) {
    op->errno_before = errno;
    pthread_mutex_lock(&turn);
    op->number = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (op->number == shim.kill_at) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    int chosen = op->number == shim.fail_at || (shim.fail_from && op->number >= shim.fail_from);
    op->shortened = chosen && shim.error == 0;
    return chosen ? shim.error : 0;
}

static long failed(int error) {
    errno = error;
    return -1;
}

/* Give the turn on. The result, with the errno that belongs to it. */
static long end(struct operation *op, long result) {
    int error = result < 0 ? errno : 0;
    if (*shim.trace) trace(op, result, error);
    pthread_mutex_unlock(&turn);
    errno = error ? error : op->errno_before;
    return result;
}

/* ---- the operations ---- */

static int open_at(int dirfd, const char *name, int flags, mode_t mode) {
    struct operation op = OPERATION("open");
    if (!(flags & O_CREAT) || !concerns_name(dirfd, name, op.path) || is_fifo(dirfd, name))
        return (int)syscall(SYS_openat, dirfd, name, flags, (long)mode);
    int error = begin(&op);
    struct stat found;
    int missing = fstatat(dirfd, name, &found, AT_SYMLINK_NOFOLLOW) != 0;
    long fd = error ? failed(error) : syscall(SYS_openat, dirfd, name, flags, (long)mode);
    op.created = missing && fd >= 0;
    op.truncated = (flags & O_TRUNC) != 0;
    if (fd >= 0 && fstat((int)fd, &found) == 0) {
        op.inode = (long long)found.st_ino;
        if (op.created) op.mode = found.st_mode & 07777;
    }
    return (int)end(&op, fd);
}

/* Where a write begins. Linux appends with O_APPEND even where pwrite names an offset. */
static long long start_of_write(int fd, const off_t *offset) {
    struct stat found;
    if (fcntl(fd, F_GETFL) & O_APPEND) return fstat(fd, &found) == 0 ? found.st_size : -1;
    return offset ? *offset : lseek(fd, 0, SEEK_CUR);
}

static long write_now(int fd, const struct iovec *parts, int count, const off_t *offset) {
    if (!offset) return syscall(SYS_writev, fd, parts, (long)count);
    return syscall(SYS_pwritev, fd, parts, (long)count, *offset, 0L);
}

/* Half of the bytes; of one byte there is no half. */
static long write_half(int fd, const struct iovec *parts, int count, const off_t *offset) {
    struct iovec kept[IOV_MAX];
    size_t total = 0, left;
    for (int i = 0; i < count; i++) total += parts[i].iov_len;
    if (total == 1) return failed(EIO);
    left = total / 2;
    for (int i = 0; i < count; i++) {
        kept[i] = parts[i];
        if (kept[i].iov_len > left) kept[i].iov_len = left;
        left -= kept[i].iov_len;
    }
    return write_now(fd, kept, count, offset);
}

/* offset NULL: at the position of the descriptor. */
static ssize_t write_parts(int fd, const struct iovec *parts, int count, const off_t *offset) {
    struct operation op = OPERATION("write");
    if (count < 0 || count > IOV_MAX || !concerns_descriptor(fd, &op)) return write_now(fd, parts, count, offset);
    int error = begin(&op);
    op.parts = parts;
    op.offset = start_of_write(fd, offset);
    long result = error ? failed(error) : (op.shortened ? write_half : write_now)(fd, parts, count, offset);
    return end(&op, result);
}

static int truncate_file(int fd, off_t length) {
    struct operation op = OPERATION("truncate");
    if (!concerns_descriptor(fd, &op)) return (int)syscall(SYS_ftruncate, fd, length);
    int error = begin(&op);
    op.size = length;
    return (int)end(&op, error ? failed(error) : syscall(SYS_ftruncate, fd, length));
}

/* Where the file system cannot, glibc's posix_fallocate would write; this one says so. */
static int allocate(int fd, int mode, off_t offset, off_t length) {
    /* Other modes make holes, which no reader of the trace knows: they have another name. */
    struct operation op = OPERATION((mode & ~FALLOC_FL_KEEP_SIZE) ? "fallocate-mode" : "fallocate");
    if (!concerns_descriptor(fd, &op)) return (int)syscall(SYS_fallocate, fd, (long)mode, offset, length);
    int error = begin(&op);
    struct stat found;
    long result = error ? failed(error) : syscall(SYS_fallocate, fd, (long)mode, offset, length);
    if (result == 0 && fstat(fd, &found) == 0) op.size = found.st_size;
    return (int)end(&op, result);
}

/* posix_fallocate returns its error and leaves errno alone. */
static int allocate_posix(int fd, off_t offset, off_t length) {
    int before = errno;
    int error = allocate(fd, 0, offset, length) == 0 ? 0 : errno;
    errno = before;
    return error;
}

static int sync_descriptor(const char *name, long call, int fd) {
    struct operation op = OPERATION(name);
    if (!concerns_descriptor(fd, &op)) return (int)syscall(call, fd);
    int error = begin(&op);
    return (int)end(&op, error ? failed(error) : syscall(call, fd));
}

static int rename_at(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    struct operation op = OPERATION(flags & ~RENAME_NOREPLACE ? "rename-flags" : "rename");
    /* Both, whatever the first says: each fills in its path. */
    int concerns = concerns_name(from_fd, from, op.path) | concerns_name(to_fd, to, op.to);
    if (!concerns) return (int)syscall(SYS_renameat2, from_fd, from, to_fd, to, (long)flags);
    int error = begin(&op);
    return (int)end(&op, error ? failed(error) : syscall(SYS_renameat2, from_fd, from, to_fd, to, (long)flags));
}

static int link_at(int from_fd, const char *from, int to_fd, const char *to, int flags) {
    struct operation op = OPERATION("link");
    int concerns = concerns_name(from_fd, from, op.path) | concerns_name(to_fd, to, op.to);
    if (!concerns) return (int)syscall(SYS_linkat, from_fd, from, to_fd, to, (long)flags);
    int error = begin(&op);
    return (int)end(&op, error ? failed(error) : syscall(SYS_linkat, from_fd, from, to_fd, to, (long)flags));
}

static int remove_at(int dirfd, const char *name, int flags) {
    struct operation op = OPERATION(flags & AT_REMOVEDIR ? "rmdir" : "unlink");
    if (!concerns_name(dirfd, name, op.path)) return (int)syscall(SYS_unlinkat, dirfd, name, (long)flags);
    int error = begin(&op);
    return (int)end(&op, error ? failed(error) : syscall(SYS_unlinkat, dirfd, name, (long)flags));
}

static int make_directory_at(int dirfd, const char *name, mode_t mode) {
    struct operation op = OPERATION("mkdir");
    if (!concerns_name(dirfd, name, op.path)) return (int)syscall(SYS_mkdirat, dirfd, name, (long)mode);
    int error = begin(&op);
    struct stat found;
    long result = error ? failed(error) : syscall(SYS_mkdirat, dirfd, name, (long)mode);
    if (result == 0 && fstatat(dirfd, name, &found, 0) == 0) op.mode = found.st_mode & 07777;
    return (int)end(&op, result);
}

/* ---- what stands in for the functions of glibc ---- */

#define MODE_AFTER(last)                                      \
    mode_t mode = 0;                                          \
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
        va_list rest;                                         \
        va_start(rest, last);                                 \
        mode = va_arg(rest, mode_t);                          \
        va_end(rest);                                         \
    }

int open(const char *name, int flags, ...) {
    MODE_AFTER(flags)
    return open_at(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...) {
    MODE_AFTER(flags)
    return open_at(AT_FDCWD, name, flags, mode);
}

int openat(int fd, const char *name, int flags, ...) {
    MODE_AFTER(flags)
    return open_at(fd, name, flags, mode);
}

int openat64(int fd, const char *name, int flags, ...) {
    MODE_AFTER(flags)
    return open_at(fd, name, flags, mode);
}

ssize_t write(int fd, const void *from, size_t length) {
    struct iovec whole = {.iov_base = (void *)from, .iov_len = length};
    return write_parts(fd, &whole, 1, NULL);
}

ssize_t pwrite(int fd, const void *from, size_t length, off_t offset) {
    struct iovec whole = {.iov_base = (void *)from, .iov_len = length};
    return write_parts(fd, &whole, 1, &offset);
}

ssize_t pwrite64(int fd, const void *from, size_t length, off64_t offset) { return pwrite(fd, from, length, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) { return write_parts(fd, parts, count, NULL); }

int ftruncate(int fd, off_t length) { return truncate_file(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncate_file(fd, length); }

int fallocate(int fd, int mode, off_t offset, off_t length) { return allocate(fd, mode, offset, length); }
int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return allocate(fd, mode, offset, length); }
int posix_fallocate(int fd, off_t offset, off_t length) { return allocate_posix(fd, offset, length); }
int posix_fallocate64(int fd, off64_t offset, off64_t length) { return allocate_posix(fd, offset, length); }

int fsync(int fd) { return sync_descriptor("fsync", SYS_fsync, fd); }
int fdatasync(int fd) { return sync_descriptor("fdatasync", SYS_fdatasync, fd); }

int rename(const char *from, const char *to) { return rename_at(AT_FDCWD, from, AT_FDCWD, to, 0); }

int renameat(int from_fd, const char *from, int to_fd, const char *to) { return rename_at(from_fd, from, to_fd, to, 0); }

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    return rename_at(from_fd, from, to_fd, to, flags);
}

int link(const char *from, const char *to) { return link_at(AT_FDCWD, from, AT_FDCWD, to, 0); }

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
    return link_at(from_fd, from, to_fd, to, flags);
}

int unlink(const char *name) { return remove_at(AT_FDCWD, name, 0); }
int unlinkat(int fd, const char *name, int flags) { return remove_at(fd, name, flags); }
int rmdir(const char *name) { return remove_at(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdir(const char *name, mode_t mode) { return make_directory_at(AT_FDCWD, name, mode); }
int mkdirat(int fd, const char *name, mode_t mode) { return make_directory_at(fd, name, mode); }
