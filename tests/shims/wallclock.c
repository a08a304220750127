/* A wall clock that is wrong, from outside: what asks for the time of day gets it moved; monotonic clocks stay.
 *
 * In: the environment, as it is when the process starts.
 *   SHIM_CLOCK_SECONDS  how far the clock is off, a signed integer
 *   SHIM_CLOCK_FILE     a file with seconds to add to that, read at every call; missing or empty: 0
 *
 * The kernel keeps its own time: the times of files are not moved.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long fixed_seconds;
static char file[PATH_MAX]; /* empty: none */

__attribute__((constructor)) static void set_the_clock(void) {
    const char *seconds = getenv("SHIM_CLOCK_SECONDS");
    const char *name = getenv("SHIM_CLOCK_FILE");
    if (seconds) fixed_seconds = strtoll(seconds, NULL, 10);
    if (name && strlen(name) < sizeof file) strcpy(file, name);
}

static long long seconds_in_file(void) {
    char text[32] = "";
    int before = errno;
    int fd = *file ? (int)syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC, 0L) : -1;
    if (fd >= 0) {
        if (syscall(SYS_read, fd, text, sizeof text - 1) < 0) text[0] = '\0';
        syscall(SYS_close, fd);
    }
    long long seconds = strtoll(text, NULL, 10);
    errno = before;
    return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, (long)clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += fixed_seconds + seconds_in_file();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    if (zone) memset(zone, 0, sizeof(struct timezone));
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
