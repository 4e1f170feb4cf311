/* Preloaded (LD_PRELOAD), makes the files below one folder as slow as a disk of a stated rate, without a privilege.
 *
 * SLOW_DISK_FOLDER: the folder; SLOW_DISK_CLOCK: a file of 8 bytes that all processes share; SLOW_DISK_BYTES_PER_S.
 * Reads and writes of all processes queue for one disk. A write returns when the disk has taken it, as if no page cache
 * stood in between; a mapped file is read as a whole, once. Calls below a page are free: names and small JSON files.
 * bench_goodput.py compiles this file: cc -shared -fPIC -O2 -o slow_disk.so slow_disk.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static _Atomic int64_t *free_at_ns; /* when the disk has done all that it was given */
static const char *folder;
static double ns_per_byte;

__attribute__((constructor)) static void begin(void) {
    const char *clock = getenv("SLOW_DISK_CLOCK"), *rate = getenv("SLOW_DISK_BYTES_PER_S");
    folder = getenv("SLOW_DISK_FOLDER");
    int file = folder && clock && rate ? open(clock, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *shared = (void *)syscall(SYS_mmap, 0, sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    ns_per_byte = 1e9 / atof(rate);
    free_at_ns = shared == MAP_FAILED ? NULL : shared;
}

static int is_slow(int file) {
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    size_t prefix = strlen(folder);
    return length > (ssize_t)prefix && strncmp(path, folder, prefix) == 0 && path[prefix] == '/';
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static ssize_t charge(int file, ssize_t n_bytes) {
    if (n_bytes < PAGE_BYTES || !free_at_ns || !is_slow(file)) return n_bytes;
    int64_t before = *free_at_ns, done, now = now_ns();
    do done = (before > now ? before : now) + (int64_t)(n_bytes * ns_per_byte);
    while (!__atomic_compare_exchange_n((int64_t *)free_at_ns, &before, done, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    struct timespec until = {done / 1000000000LL, done % 1000000000LL};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)) {}
    return n_bytes;
}

ssize_t write(int f, const void *b, size_t n) { return charge(f, NEXT(write)(f, b, n)); }
ssize_t pwrite(int f, const void *b, size_t n, off_t o) { return charge(f, NEXT(pwrite)(f, b, n, o)); }
ssize_t pwrite64(int f, const void *b, size_t n, off64_t o) { return charge(f, NEXT(pwrite64)(f, b, n, o)); }
ssize_t writev(int f, const struct iovec *v, int n) { return charge(f, NEXT(writev)(f, v, n)); }
ssize_t read(int f, void *b, size_t n) { return charge(f, NEXT(read)(f, b, n)); }
ssize_t pread(int f, void *b, size_t n, off_t o) { return charge(f, NEXT(pread)(f, b, n, o)); }
ssize_t pread64(int f, void *b, size_t n, off64_t o) { return charge(f, NEXT(pread64)(f, b, n, o)); }
ssize_t readv(int f, const struct iovec *v, int n) { return charge(f, NEXT(readv)(f, v, n)); }
ssize_t preadv(int f, const struct iovec *v, int n, off_t o) { return charge(f, NEXT(preadv)(f, v, n, o)); }
ssize_t preadv64(int f, const struct iovec *v, int n, off64_t o) { return charge(f, NEXT(preadv64)(f, v, n, o)); }
ssize_t preadv2(int f, const struct iovec *v, int n, off_t o, int x) { return charge(f, NEXT(preadv2)(f, v, n, o, x)); }
ssize_t preadv64v2(int f, const struct iovec *v, int n, off64_t o, int x) { return charge(f, NEXT(preadv64v2)(f, v, n, o, x)); }
ssize_t sendfile(int t, int f, off_t *o, size_t n) { return charge(t, charge(f, NEXT(sendfile)(t, f, o, n))); }
ssize_t sendfile64(int t, int f, off64_t *o, size_t n) { return charge(t, charge(f, NEXT(sendfile64)(t, f, o, n))); }
ssize_t copy_file_range(int f, off64_t *a, int t, off64_t *b, size_t n, unsigned x) {
    return charge(t, charge(f, NEXT(copy_file_range)(f, a, t, b, n, x)));
}

void *mmap64(void *at, size_t n, int protection, int flags, int file, off64_t offset) {
    void *found = NEXT(mmap64)(at, n, protection, flags, file, offset);
    static ino_t newest; /* safetensors maps a file twice */
    struct stat facts;
    if (found == MAP_FAILED || file < 0 || flags & MAP_ANONYMOUS || fstat(file, &facts) || facts.st_ino == newest) return found;
    newest = facts.st_ino;
    charge(file, n);
    return found;
}
void *mmap(void *at, size_t n, int protection, int flags, int file, off_t offset) {
    return mmap64(at, n, protection, flags, file, offset);
}
