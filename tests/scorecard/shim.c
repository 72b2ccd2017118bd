/* A library to preload that counts the calls by which a process changes files, and attacks one of them.
 *
 * Only calls whose path, or the path of whose file descriptor, lies in the watched folder are counted. At the
 * n-th, the process is killed, the call fails, or a write is cut short. fwrite is counted as a write, because
 * libc's own call of write cannot be replaced. Reading is never attacked.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, WRITE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, TRUNCATE, LINK, CHMOD, CLOSE };
static const char *const NAMES[] = {"open",  "write",    "sync", "rename", "unlink", "mkdir",
                                    "rmdir", "truncate", "link", "chmod",  "close"};

enum mode { OFF, COUNT, KILL_BEFORE, KILL_AFTER, FAIL, FAIL_FROM, SHORT };
enum action { PASS, DIE_AFTER, REFUSE, HALF };

static char watched[PATH_MAX];
static int mode = OFF, error_number, trace = -1;
static long target, count;
static unsigned kinds; /* the kinds that FAIL_FROM attacks, as a bit mask */

/* Starts to count and to attack. `trace_fd` gets a line "kind inode path" for each call, with inode 0 where the
 * call has no file descriptor; -1 writes none. */
void shim_arm(const char *folder, int new_mode, long n, int new_errno, unsigned mask, int trace_fd) {
    snprintf(watched, sizeof watched, "%s", folder);
    error_number = new_errno, target = n, kinds = mask, trace = trace_fd, count = 0;
    mode = new_mode;
}

/* Stops, and returns how many calls were counted. */
long shim_disarm(void) {
    mode = OFF;
    return count;
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static enum action enter(enum kind kind, const char *path, int fd) {
    size_t length = strlen(watched);
    if (mode == OFF || strncmp(path, watched, length) || (path[length] && path[length] != '/')) return PASS;

    long n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        struct stat status = {0};
        if (fd >= 0) fstat(fd, &status);
        unsigned long inode = status.st_ino;
        int size = snprintf(line, sizeof line, "%s %lu %s\n", NAMES[kind], inode, path + length);
        syscall(SYS_write, trace, line, size);
    }
    int hit = n == target;
    if (mode == KILL_BEFORE && hit) die();
    if (mode == KILL_AFTER && hit) return DIE_AFTER;
    if (mode == SHORT && hit && kind == WRITE) return HALF;
    if ((mode == FAIL && hit) || (mode == FAIL_FROM && n >= target && (kinds >> kind & 1))) {
        errno = error_number;
        return REFUSE;
    }
    return PASS;
}

static enum action enter_at(enum kind kind, int folder, const char *name) {
    char path[2 * PATH_MAX], base[PATH_MAX], link[64];
    if (mode == OFF || !name) return PASS;
    if (name[0] == '/') return enter(kind, name, -1);
    ssize_t size = -1;
    if (folder == AT_FDCWD) {
        if (getcwd(base, sizeof base)) size = strlen(base);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        size = readlink(link, base, sizeof base - 1);
    }
    if (size < 0) return PASS;
    snprintf(path, sizeof path, "%.*s/%s", (int)size, base, name);
    return enter(kind, path, -1);
}

static enum action enter_fd(enum kind kind, int fd) {
    char path[PATH_MAX], link[64];
    if (mode == OFF) return PASS;
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (size < 0) return PASS;
    path[size] = 0;
    return enter(kind, path, fd);
}

#define REAL(name)                                           \
    static __typeof__(name) *real;                           \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define CALL(type, attack, call)                             \
    enum action action = attack;                             \
    if (action == REFUSE) return -1;                         \
    type result = call;                                      \
    if (action == DIE_AFTER) die();                          \
    return result

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define OPENING(name)                                                        \
    int name(const char *path, int flags, ...) {                             \
        REAL(name);                                                          \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                        \
        CALL(int, WRITES(flags) ? enter_at(OPEN, AT_FDCWD, path) : PASS, real(path, flags, bits)); \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                     \
    int name(int folder, const char *path, int flags, ...) {                 \
        REAL(name);                                                          \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                        \
        CALL(int, WRITES(flags) ? enter_at(OPEN, folder, path) : PASS, real(folder, path, flags, bits)); \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

#define CREATING(name)                                                       \
    int name(const char *path, mode_t bits) {                                \
        REAL(name);                                                          \
        CALL(int, enter_at(OPEN, AT_FDCWD, path), real(path, bits));         \
    }
CREATING(creat)
CREATING(creat64)

/* What a program calls that is compiled with _FORTIFY_SOURCE; they never create a file. */
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int folder, const char *path, int flags) { return openat(folder, path, flags); }
int __openat64_2(int folder, const char *path, int flags) { return openat64(folder, path, flags); }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    CALL(ssize_t, enter_fd(WRITE, fd), real(fd, data, action == HALF && size > 1 ? size / 2 : size));
}

#define WRITING_AT(name)                                                     \
    ssize_t name(int fd, const void *data, size_t size, off_t at) {          \
        REAL(name);                                                          \
        CALL(ssize_t, enter_fd(WRITE, fd), real(fd, data, action == HALF && size > 1 ? size / 2 : size, at)); \
    }
WRITING_AT(pwrite)
WRITING_AT(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(writev);
    enum action action = enter_fd(WRITE, fd);
    if (action == REFUSE) return -1;
    if (action == HALF && number > 0) return write(fd, parts[0].iov_base, (parts[0].iov_len + 1) / 2);
    ssize_t result = real(fd, parts, number);
    if (action == DIE_AFTER) die();
    return result;
}

size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
    REAL(fwrite);
    enum action action = enter_fd(WRITE, fileno(file));
    if (action == REFUSE) return 0;
    size_t result = real(data, size, number, file);
    if (action == DIE_AFTER) die();
    return result;
}

#define ON_FD(name, kind, parameters, ...)                                   \
    int name parameters {                                                    \
        REAL(name);                                                          \
        CALL(int, enter_fd(kind, fd), real(__VA_ARGS__));                    \
    }
ON_FD(fsync, SYNC, (int fd), fd)
ON_FD(fdatasync, SYNC, (int fd), fd)
ON_FD(ftruncate, TRUNCATE, (int fd, off_t size), fd, size)
ON_FD(ftruncate64, TRUNCATE, (int fd, off64_t size), fd, size)
ON_FD(fchmod, CHMOD, (int fd, mode_t bits), fd, bits)

/* Linux frees the descriptor even if close fails. Closing what is open for reading changes nothing. */
int close(int fd) {
    REAL(close);
    int saved = errno, flags = mode == OFF ? -1 : fcntl(fd, F_GETFL);
    errno = saved;
    enum action action = flags >= 0 && flags & (O_WRONLY | O_RDWR) ? enter_fd(CLOSE, fd) : PASS;
    int result = real(fd);
    if (action == DIE_AFTER) die();
    if (action != REFUSE) return result;
    errno = error_number;
    return -1;
}

#define ON_PATH(name, kind, parameters, folder, path, ...)                   \
    int name parameters {                                                    \
        REAL(name);                                                          \
        CALL(int, enter_at(kind, folder, path), real(__VA_ARGS__));          \
    }
ON_PATH(unlink, UNLINK, (const char *path), AT_FDCWD, path, path)
ON_PATH(unlinkat, flags & AT_REMOVEDIR ? RMDIR : UNLINK, (int folder, const char *path, int flags), folder, path,
        folder, path, flags)
ON_PATH(rmdir, RMDIR, (const char *path), AT_FDCWD, path, path)
ON_PATH(mkdir, MKDIR, (const char *path, mode_t bits), AT_FDCWD, path, path, bits)
ON_PATH(mkdirat, MKDIR, (int folder, const char *path, mode_t bits), folder, path, folder, path, bits)
ON_PATH(truncate, TRUNCATE, (const char *path, off_t size), AT_FDCWD, path, path, size)
ON_PATH(truncate64, TRUNCATE, (const char *path, off64_t size), AT_FDCWD, path, path, size)
ON_PATH(chmod, CHMOD, (const char *path, mode_t bits), AT_FDCWD, path, path, bits)
ON_PATH(fchmodat, CHMOD, (int folder, const char *path, mode_t bits, int flags), folder, path, folder, path, bits,
        flags)

/* Two paths: the one that is changed names the call. */
ON_PATH(rename, RENAME, (const char *old, const char *new), AT_FDCWD, new, old, new)
ON_PATH(renameat, RENAME, (int from, const char *old, int to, const char *new), to, new, from, old, to, new)
ON_PATH(renameat2, RENAME, (int from, const char *old, int to, const char *new, unsigned flags), to, new, from, old,
        to, new, flags)
ON_PATH(link, LINK, (const char *old, const char *new), AT_FDCWD, new, old, new)
ON_PATH(linkat, LINK, (int from, const char *old, int to, const char *new, int flags), to, new, from, old, to, new,
        flags)
ON_PATH(symlink, LINK, (const char *old, const char *new), AT_FDCWD, new, old, new)
ON_PATH(symlinkat, LINK, (const char *old, int to, const char *new), to, new, old, to, new)
