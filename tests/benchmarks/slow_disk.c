/* A disk of a set speed between a program and its files, loaded by LD_PRELOAD; slow_disk.py builds it and sets it.
 *
 * The model. What is written lies in memory until the disk is asked for it: by fsync or fdatasync, which wait for it, or
 * by sync_file_range and posix_fadvise(DONTNEED), with which Linux begins to write and does not wait. From then on the
 * disk takes so many bytes a second, file after file. Whoever asks waits as soon as more than QUEUE_BYTES are asked for,
 * as in the queue of a real one. Linux itself would begin with a file unasked only after seconds, or when a tenth of the
 * memory is to be written; here it never does.
 *
 * While a speed is set, fsync leaves the real disk alone, so that only the set one is measured. Regular files only.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_FILES 64
#define QUEUE_BYTES (32 << 20)

struct file {
    dev_t device;
    ino_t inode;
    double waiting; /* bytes that lie in memory */
    double done_at; /* when the disk has all that it was asked for */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct file files[MOST_FILES];
static int oldest;
static double speed;    /* bytes a second; 0: the real disk */
static double busy_to;  /* when the disk has done what it was asked for */
static uint64_t n_seen; /* bytes written since the speed was set */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void wait_until(double moment) {
    double left;
    while ((left = moment - now()) > 0) {
        struct timespec time = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
        nanosleep(&time, NULL);
    }
}

/* The entry of an open regular file, under the lock; NULL for all else. */
static struct file *entry_of(int descriptor) {
    struct stat about;
    if (fstat(descriptor, &about) != 0 || !S_ISREG(about.st_mode)) return NULL;
    for (int i = 0; i < MOST_FILES; i++)
        if (files[i].inode == about.st_ino && files[i].device == about.st_dev) return &files[i];
    struct file *entry = &files[oldest++ % MOST_FILES];
    *entry = (struct file){about.st_dev, about.st_ino, 0, 0};
    return entry;
}

static void written(int descriptor, ssize_t n_bytes) {
    if (speed == 0 || n_bytes <= 0) return;
    int before = errno;
    pthread_mutex_lock(&lock);
    struct file *entry = entry_of(descriptor);
    if (entry != NULL) {
        entry->waiting += (double)n_bytes;
        n_seen += (uint64_t)n_bytes;
    }
    pthread_mutex_unlock(&lock);
    errno = before;
}

/* Ask the disk for what waits of a file; wait for room in its queue, or until it has all. */
static void ask(int descriptor, int is_waiting) {
    pthread_mutex_lock(&lock);
    double until = 0;
    struct file *entry = entry_of(descriptor);
    if (entry != NULL) {
        double moment = now();
        if (entry->waiting > 0) {
            busy_to = (busy_to > moment ? busy_to : moment) + entry->waiting / speed;
            entry->waiting = 0;
            entry->done_at = busy_to;
        }
        until = is_waiting ? entry->done_at : busy_to - QUEUE_BYTES / speed;
    }
    pthread_mutex_unlock(&lock);
    wait_until(until);
}

/* For slow_disk.py. */
void slow_disk_set(double bytes_per_second) {
    pthread_mutex_lock(&lock);
    speed = bytes_per_second;
    busy_to = 0;
    n_seen = 0;
    for (int i = 0; i < MOST_FILES; i++) files[i] = (struct file){0};
    pthread_mutex_unlock(&lock);
}

uint64_t slow_disk_seen(void) { return n_seen; }

#define REAL(name) \
    static __typeof__(&name) real; \
    if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define WRITES(name, arguments, ...) \
    ssize_t name arguments { \
        REAL(name); \
        ssize_t n_bytes = real(__VA_ARGS__); \
        written(descriptor, n_bytes); \
        return n_bytes; \
    }

WRITES(write, (int descriptor, const void *bytes, size_t n), descriptor, bytes, n)
WRITES(pwrite, (int descriptor, const void *bytes, size_t n, off_t at), descriptor, bytes, n, at)
WRITES(pwrite64, (int descriptor, const void *bytes, size_t n, off64_t at), descriptor, bytes, n, at)
WRITES(writev, (int descriptor, const struct iovec *parts, int n), descriptor, parts, n)

#define ASKS(name, is_asked, is_waiting, arguments, ...) \
    int name arguments { \
        REAL(name); \
        if (speed == 0) return real(__VA_ARGS__); \
        if (is_asked) ask(descriptor, is_waiting); \
        return 0; \
    }

ASKS(fsync, 1, 1, (int descriptor), descriptor)
ASKS(fdatasync, 1, 1, (int descriptor), descriptor)
ASKS(sync_file_range, 1, 0, (int descriptor, off64_t at, off64_t n, unsigned int how), descriptor, at, n, how)
ASKS(posix_fadvise, how == POSIX_FADV_DONTNEED, 0, (int descriptor, off_t at, off_t n, int how), descriptor, at, n, how)
ASKS(posix_fadvise64, how == POSIX_FADV_DONTNEED, 0, (int descriptor, off64_t at, off64_t n, int how), descriptor, at, n,
     how)
