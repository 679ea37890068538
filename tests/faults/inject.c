/* Faults of a machine, made on purpose, in a real process: preloaded (LD_PRELOAD), this stands between the process and
 * libc, so that what Python, torch (C++) and safetensors (Rust) do to files is counted and spoilt alike.
 *
 * Everything that changes a file or folder below FAULT_ROOT is an operation and has a number, from 1. Operation
 * FAULT_AT (0: none) is spoilt: FAULT_ACTION is "kill" (SIGKILL to the process; a write has then written half its
 * bytes) or the number of an error that it fails with, as do all later ones with FAULT_LASTING. FAULT_OPS (comma
 * separated: open,read,write,sync,rename,remove,mkdir,link,truncate; without it all but read) and FAULT_GLOB (of the
 * path below the root) say which operations count; FAULT_RANK, in which of several processes. FAULT_LOG gets one line
 * per operation. All are variables of the environment, read at the start and again by `fault_arm`, which a process
 * that was forked calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))
#define LONGEST (2 * PATH_MAX)

static char root[PATH_MAX], glob[PATH_MAX], ops[256];
static int armed, kills, code, lasting, log_handle = -1;
static long at;
static atomic_long count;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void setting(const char *name, char *value, size_t size) {
    const char *given = getenv(name);
    snprintf(value, size, "%s", given ? given : "");
}

void fault_arm(void) {
    char action[32], number[32], rank[32], log[PATH_MAX];
    setting("FAULT_ROOT", root, sizeof root);
    setting("FAULT_GLOB", glob, sizeof glob);
    setting("FAULT_OPS", ops, sizeof ops);
    setting("FAULT_ACTION", action, sizeof action);
    setting("FAULT_AT", number, sizeof number);
    setting("FAULT_RANK", rank, sizeof rank);
    setting("FAULT_LOG", log, sizeof log);
    const char *own = getenv("RANK");
    armed = root[0] && (!rank[0] || strcmp(rank, own ? own : "") == 0);
    kills = strcmp(action, "kill") == 0;
    code = atoi(action);
    at = atol(number);
    lasting = getenv("FAULT_LASTING") != NULL;
    atomic_store(&count, 0);
    if (armed && log[0])
        log_handle = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

__attribute__((constructor)) static void begin(void) { fault_arm(); }

long fault_count(void) { return atomic_load(&count); }

static int is_asked(const char *op) {
    if (!ops[0]) return strcmp(op, "read") != 0;
    const char *found = strstr(ops, op);
    return found && strchr(",", found[strlen(op)]) != NULL;
}

/* The absolute path of a name, for a folder's handle as well. */
static const char *absolute(int folder, const char *path, char *buffer) {
    char place[64];
    if (path[0] == '/') return path;
    snprintf(place, sizeof place, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(place, buffer, PATH_MAX);
    if (length < 0) return path;
    snprintf(buffer + length, LONGEST - length, "/%s", path);
    return buffer;
}

static int is_watched(const char *path) {
    size_t length = strlen(root);
    if (strncmp(path, root, length) != 0 || path[length] != '/') return 0;
    return !glob[0] || fnmatch(glob, path + length + 1, 0) == 0;
}

/* Count an operation; tell whether it is the one to spoil. */
static int is_spoilt(const char *op, const char *path) {
    if (!armed || !is_asked(op) || !is_watched(path)) return 0;
    long number = atomic_fetch_add(&count, 1) + 1;
    if (log_handle >= 0) {
        char line[LONGEST + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, op, path + strlen(root) + 1);
        syscall(SYS_write, log_handle, line, length);
    }
    return at && (number == at || (lasting && !kills && number > at));
}

static int is_spoilt_at(const char *op, int folder, const char *path) {
    if (!armed) return 0;
    char buffer[LONGEST];
    int saved = errno;
    int spoilt = is_spoilt(op, absolute(folder, path, buffer));
    errno = saved;
    return spoilt;
}

static int is_spoilt_handle(const char *op, int handle) {
    if (!armed) return 0;
    char place[64], path[PATH_MAX];
    int saved = errno;
    snprintf(place, sizeof place, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(place, path, sizeof path - 1);
    errno = saved;
    if (length < 0) return 0;
    path[length] = 0;
    return is_spoilt(op, path);
}

static int spoil(void) {
    if (kills) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = code;
    return -1;
}

static int is_writing(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

#define OPENING(name)                                                                                                  \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        if (is_spoilt_at(is_writing(flags) ? "open" : "read", AT_FDCWD, path)) return spoil();                         \
        return REAL(name)(path, flags, mode);                                                                          \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                                                               \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        if (is_spoilt_at(is_writing(flags) ? "open" : "read", folder, path)) return spoil();                           \
        return REAL(name)(folder, path, flags, mode);                                                                  \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

#define OPENING_STREAM(name)                                                                                           \
    FILE *name(const char *path, const char *mode) {                                                                   \
        int writes = mode[0] != 'r' || strchr(mode, '+');                                                              \
        if (is_spoilt_at(writes ? "open" : "read", AT_FDCWD, path)) return spoil(), NULL;                              \
        return REAL(name)(path, mode);                                                                                 \
    }
OPENING_STREAM(fopen)
OPENING_STREAM(fopen64)

ssize_t write(int handle, const void *bytes, size_t size) {
    if (is_spoilt_handle("write", handle)) {
        if (kills) REAL(write)(handle, bytes, size / 2);
        return spoil();
    }
    return REAL(write)(handle, bytes, size);
}

ssize_t writev(int handle, const struct iovec *parts, int number) {
    if (is_spoilt_handle("write", handle)) {
        if (kills && number) REAL(write)(handle, parts[0].iov_base, parts[0].iov_len / 2);
        return spoil();
    }
    return REAL(writev)(handle, parts, number);
}

#define WRITING_AT(name, offset_type)                                                                                  \
    ssize_t name(int handle, const void *bytes, size_t size, offset_type offset) {                                     \
        if (is_spoilt_handle("write", handle)) return spoil();                                                         \
        return REAL(name)(handle, bytes, size, offset);                                                                \
    }
WRITING_AT(pwrite, off_t)
WRITING_AT(pwrite64, off64_t)

#define SENDING(name, offset_type)                                                                                     \
    ssize_t name(int target, int source, offset_type *offset, size_t size) {                                           \
        if (is_spoilt_handle("write", target)) return spoil();                                                         \
        return REAL(name)(target, source, offset, size);                                                               \
    }
SENDING(sendfile, off_t)
SENDING(sendfile64, off64_t)

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t size, unsigned flags) {
    if (is_spoilt_handle("write", target)) return spoil();
    return REAL(copy_file_range)(source, from, target, to, size, flags);
}

#define ON_HANDLE(op, name, declared, given)                                                                           \
    int name declared {                                                                                                \
        if (is_spoilt_handle(op, handle)) return spoil();                                                              \
        return REAL(name) given;                                                                                       \
    }
ON_HANDLE("sync", fsync, (int handle), (handle))
ON_HANDLE("sync", fdatasync, (int handle), (handle))
ON_HANDLE("truncate", ftruncate, (int handle, off_t size), (handle, size))
ON_HANDLE("truncate", ftruncate64, (int handle, off64_t size), (handle, size))

#define ON_PATH(op, name, declared, given)                                                                             \
    int name declared {                                                                                                \
        if (is_spoilt_at(op, AT_FDCWD, path)) return spoil();                                                          \
        return REAL(name) given;                                                                                       \
    }
ON_PATH("truncate", truncate, (const char *path, off_t size), (path, size))
ON_PATH("truncate", truncate64, (const char *path, off64_t size), (path, size))
ON_PATH("remove", unlink, (const char *path), (path))
ON_PATH("remove", rmdir, (const char *path), (path))
ON_PATH("mkdir", mkdir, (const char *path, mode_t mode), (path, mode))
/* The second name counts: it is the one that appears. */
ON_PATH("rename", rename, (const char *from, const char *path), (from, path))
ON_PATH("link", link, (const char *from, const char *path), (from, path))
ON_PATH("link", symlink, (const char *from, const char *path), (from, path))

#define ON_PATH_AT(op, name, declared, given)                                                                          \
    int name declared {                                                                                                \
        if (is_spoilt_at(op, folder, path)) return spoil();                                                            \
        return REAL(name) given;                                                                                       \
    }
ON_PATH_AT("remove", unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
ON_PATH_AT("mkdir", mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode))
ON_PATH_AT("rename", renameat, (int old, const char *from, int folder, const char *path), (old, from, folder, path))
ON_PATH_AT("rename", renameat2, (int old, const char *from, int folder, const char *path, unsigned flags),
           (old, from, folder, path, flags))
ON_PATH_AT("link", linkat, (int old, const char *from, int folder, const char *path, int flags),
           (old, from, folder, path, flags))
