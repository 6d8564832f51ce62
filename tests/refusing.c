/* A file system that cannot do what a local disk can, or will not: preloaded, it refuses the calls that the environment
   names. REFUSE is CALL:ERRNO:PART; calls to CALL about files whose path has PART in it fail with ERRNO. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int refused(const char *call, const char *path) {
  const char *rule = getenv("REFUSE");
  size_t length = strlen(call);
  if (!rule || strncmp(rule, call, length) || rule[length] != ':') return 0;
  char *part;
  long code = strtol(rule + length + 1, &part, 10);
  if (!path || !strstr(path, part + 1)) return 0;
  errno = (int)code;
  return 1;
}

static int refused_open_file(const char *call, int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  return refused(call, path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    va_list more;                                                              \
    va_start(more, flags);                                                     \
    int mode = va_arg(more, int);                                              \
    va_end(more);                                                              \
    return refused("open", path) ? -1 : NEXT(name)(path, flags, mode);         \
  }
OPEN(open)
OPEN(open64)

#define MAP(name, offset_type)                                                                              \
  void *name(void *address, size_t length, int protection, int flags, int descriptor, offset_type offset) { \
    if (descriptor >= 0 && refused_open_file("mmap", descriptor)) return MAP_FAILED;                        \
    return NEXT(name)(address, length, protection, flags, descriptor, offset);                              \
  }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

int flock(int descriptor, int operation) {
  return refused_open_file("flock", descriptor) ? -1 : NEXT(flock)(descriptor, operation);
}

int rename(const char *from, const char *to) { return refused("rename", to) ? -1 : NEXT(rename)(from, to); }

int link(const char *from, const char *to) { return refused("link", to) ? -1 : NEXT(link)(from, to); }
