// A CUDA driver library without a GPU, for the tests of the libcuda driver: device memory is memfds,
// copies happen at once, and the rules of the virtual memory calls are enforced as cuda.h 13.0
// states them. Written apart from csrc/driver/host.cpp on purpose: two readings of the same rules.
//
// Environment, read at every call: STUB_CUDA_DEVICES (1), STUB_CUDA_VMM (1), STUB_CUDA_BYTES (1 GiB).
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef STUB_WITHOUT_VMM  // an old driver
#define VMM static __attribute__((unused))
#else
#define VMM __attribute__((visibility("default")))
#endif
#define API __attribute__((visibility("default")))

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
#define GRANULARITY (2ul << 20)

typedef struct { int type, id; } Location;
typedef struct { int type, handle_types; Location location; void *win32; unsigned char flags[8]; } Properties;
typedef struct { Location location; int access; } AccessDesc;

typedef struct Memory { struct Memory *next; int fd; size_t bytes; int references, mappings; } Memory;
typedef struct Range { struct Range *next; uintptr_t begin; size_t bytes; Memory *memory; int access; } Range;
typedef struct Object { struct Object *next; char kind; } Object;  // 's'tream, 'e'vent, 'h'ost memory

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int initialized, contexts;
static Memory *memories;
static Range *reservations, *mappings;
static Object *objects;
static size_t used;
static __thread int depth;  // of this thread's stack of contexts; there is only one context
static int the_context;

#define ENTER pthread_mutex_lock(&mutex)
#define LEAVE(code) do { int code_ = (code); pthread_mutex_unlock(&mutex); return code_; } while (0)
#define NEED_CONTEXT do { if (depth == 0) return INVALID_CONTEXT; } while (0)

static size_t setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

API int stub_live(int kind) {  // handles, reservations, mappings, contexts, else objects of a kind
  int count = 0;
  ENTER;
  if (kind == 'H') for (Memory *m = memories; m; m = m->next) ++count;
  else if (kind == 'R') for (Range *r = reservations; r; r = r->next) ++count;
  else if (kind == 'M') for (Range *r = mappings; r; r = r->next) ++count;
  else if (kind == 'C') count = contexts;
  else for (Object *o = objects; o; o = o->next) count += o->kind == kind;
  LEAVE(count);
}

API int cuInit(unsigned flags) { initialized = 1; return flags ? INVALID : OK; }
API int cuGetErrorString(int code, const char **text) {
  *text = code == NO_MEMORY ? "out of memory" : code == INVALID ? "invalid argument" : "some error";
  return OK;
}
API int cuDeviceGetCount(int *count) {
  if (!initialized) return NOT_INITIALIZED;
  *count = (int)setting("STUB_CUDA_DEVICES", 1);
  return OK;
}
API int cuDeviceGet(int *device, int index) { *device = index; return index < (int)setting("STUB_CUDA_DEVICES", 1) ? OK : INVALID_DEVICE; }
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 102 ? (int)setting("STUB_CUDA_VMM", 1) : 0;  // VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
  return OK;
}
API int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; ENTER; ++contexts; *context = &the_context; LEAVE(OK); }
API int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; ENTER; LEAVE(contexts-- > 0 ? OK : INVALID); }
API int cuCtxGetCurrent(void **context) { *context = depth ? &the_context : NULL; return OK; }
API int cuCtxPushCurrent_v2(void *context) { if (context != &the_context) return INVALID_CONTEXT; ++depth; return OK; }
API int cuCtxPopCurrent_v2(void **context) { NEED_CONTEXT; --depth; *context = &the_context; return OK; }
API int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  NEED_CONTEXT;
  ENTER;
  *total = setting("STUB_CUDA_BYTES", 1ul << 30);
  *free_bytes = *total - used;
  LEAVE(OK);
}

VMM int cuMemGetAllocationGranularity(size_t *bytes, const Properties *wanted, int option) {
  if (wanted->type != 1 || wanted->location.type != 1 || option > 1) return INVALID;
  *bytes = GRANULARITY;
  return OK;
}

static void reap(Memory *memory) {
  if (memory->references || memory->mappings) return;
  for (Memory **at = &memories; *at; at = &(*at)->next) {
    if (*at != memory) continue;
    *at = memory->next;
    used -= memory->bytes;
    close(memory->fd);
    free(memory);
    return;
  }
}
static int held(Memory *memory) {
  for (Memory *m = memories; m; m = m->next) if (m == memory) return m->references > 0;
  return 0;
}
// Whether mappings fill the range without cutting one.
static int filled(uintptr_t begin, size_t bytes) {
  size_t covered = 0;
  for (Range *m = mappings; m; m = m->next) {
    if (m->begin + m->bytes <= begin || begin + bytes <= m->begin) continue;
    if (m->begin < begin || m->begin + m->bytes > begin + bytes) return 0;
    covered += m->bytes;
  }
  return bytes && covered == bytes;
}
static int readable(uintptr_t begin, size_t bytes, int access) {
  size_t covered = 0;
  for (Range *m = mappings; m; m = m->next) {
    uintptr_t from = m->begin > begin ? m->begin : begin;
    uintptr_t to = m->begin + m->bytes < begin + bytes ? m->begin + m->bytes : begin + bytes;
    if (from < to && (m->access & access) == access) covered += to - from;
  }
  return covered == bytes;
}

VMM int cuMemCreate(Memory **handle, size_t bytes, const Properties *wanted, unsigned long long flags) {
  ENTER;
  if (!bytes || bytes % GRANULARITY || flags || wanted->type != 1 || wanted->location.type != 1) LEAVE(INVALID);
  if (used + bytes > setting("STUB_CUDA_BYTES", 1ul << 30)) LEAVE(NO_MEMORY);
  int fd = memfd_create("stub", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, (off_t)bytes)) LEAVE(NO_MEMORY);
  Memory *memory = calloc(1, sizeof *memory);
  *memory = (Memory){memories, fd, bytes, 1, 0};
  *handle = memories = memory;
  used += bytes;
  LEAVE(OK);
}
VMM int cuMemRelease(Memory *handle) {
  ENTER;
  if (!held(handle)) LEAVE(INVALID);
  --handle->references;
  reap(handle);
  LEAVE(OK);
}
VMM int cuMemAddressReserve(uintptr_t *address, size_t bytes, size_t alignment, uintptr_t hint, unsigned long long flags) {
  ENTER;
  if (!bytes || bytes % GRANULARITY || flags || hint || (alignment & (alignment - 1))) LEAVE(INVALID);
  if (alignment < GRANULARITY) alignment = GRANULARITY;
  char *raw = mmap(NULL, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) LEAVE(NO_MEMORY);
  char *begin = (char *)(((uintptr_t)raw + alignment - 1) / alignment * alignment);
  if (begin > raw) munmap(raw, (size_t)(begin - raw));
  munmap(begin + bytes, (size_t)(raw + alignment - begin));
  Range *range = calloc(1, sizeof *range);
  *range = (Range){reservations, (uintptr_t)begin, bytes, NULL, 0};
  reservations = range;
  *address = (uintptr_t)begin;
  LEAVE(OK);
}
VMM int cuMemAddressFree(uintptr_t begin, size_t bytes) {
  ENTER;
  for (Range *m = mappings; m; m = m->next) if (m->begin < begin + bytes && begin < m->begin + m->bytes) LEAVE(INVALID);
  for (Range **at = &reservations; *at; at = &(*at)->next) {
    Range *range = *at;
    if (range->begin != begin || range->bytes != bytes) continue;
    *at = range->next;
    munmap((void *)begin, bytes);
    free(range);
    LEAVE(OK);
  }
  LEAVE(INVALID);
}
VMM int cuMemMap(uintptr_t begin, size_t bytes, size_t offset, Memory *handle, unsigned long long flags) {
  ENTER;
  if (!held(handle) || flags || offset || bytes != handle->bytes || begin % GRANULARITY) LEAVE(INVALID);
  int inside = 0;
  for (Range *r = reservations; r; r = r->next) inside |= begin >= r->begin && begin + bytes <= r->begin + r->bytes;
  for (Range *m = mappings; m; m = m->next) if (m->begin < begin + bytes && begin < m->begin + m->bytes) inside = 0;
  if (!inside) LEAVE(INVALID);
  if (mmap((void *)begin, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, handle->fd, 0) == MAP_FAILED) LEAVE(NO_MEMORY);
  Range *mapping = calloc(1, sizeof *mapping);
  *mapping = (Range){mappings, begin, bytes, handle, 0};
  mappings = mapping;
  ++handle->mappings;
  LEAVE(OK);
}
VMM int cuMemSetAccess(uintptr_t begin, size_t bytes, const AccessDesc *wanted, size_t count) {
  ENTER;
  if (count != 1 || wanted->location.type != 1 || !filled(begin, bytes)) LEAVE(INVALID);
  int access = wanted->access;  // 1: read, 3: read and write
  mprotect((void *)begin, bytes, access == 3 ? PROT_READ | PROT_WRITE : access == 1 ? PROT_READ : PROT_NONE);
  for (Range *m = mappings; m; m = m->next) if (m->begin >= begin && m->begin < begin + bytes) m->access = access;
  LEAVE(OK);
}
VMM int cuMemUnmap(uintptr_t begin, size_t bytes) {
  ENTER;
  if (!filled(begin, bytes)) LEAVE(INVALID);
  mmap((void *)begin, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  for (Range **at = &mappings; *at;) {
    Range *mapping = *at;
    if (mapping->begin < begin || mapping->begin >= begin + bytes) { at = &mapping->next; continue; }
    *at = mapping->next;
    --mapping->memory->mappings;
    reap(mapping->memory);
    free(mapping);
  }
  LEAVE(OK);
}

static Object *add(char kind, size_t bytes) {
  Object *object = aligned_alloc(64, (sizeof *object + bytes + 127) / 64 * 64);
  ENTER;
  *object = (Object){objects, kind};
  objects = object;
  pthread_mutex_unlock(&mutex);
  return object;
}
static int find(Object *wanted, char kind, int take) {
  ENTER;
  for (Object **at = &objects; *at; at = &(*at)->next) {
    Object *object = *at;
    if (object != wanted || object->kind != kind) continue;
    if (take) { *at = object->next; free(object); }
    LEAVE(OK);
  }
  LEAVE(INVALID_HANDLE);
}
API int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
  NEED_CONTEXT;
  if (!bytes || flags != 1) return INVALID;  // portable, nothing else
  char *object = (char *)add('h', bytes + 64);
  *memory = memset(object + 64, 0, bytes);
  return OK;
}
API int cuMemFreeHost(void *memory) { NEED_CONTEXT; return find((Object *)((char *)memory - 64), 'h', 1) ? INVALID : OK; }
API int cuStreamCreate(Object **stream, unsigned flags) { NEED_CONTEXT; if (flags != 1) return INVALID; *stream = add('s', 0); return OK; }
API int cuStreamDestroy_v2(Object *stream) { NEED_CONTEXT; return find(stream, 's', 1); }
API int cuStreamSynchronize(Object *stream) { NEED_CONTEXT; return find(stream, 's', 0); }
API int cuStreamWaitEvent(Object *stream, Object *event, unsigned flags) {
  NEED_CONTEXT;
  if (flags) return INVALID;
  return find(stream, 's', 0) ? INVALID_HANDLE : find(event, 'e', 0);
}
API int cuEventCreate(Object **event, unsigned flags) { NEED_CONTEXT; if (flags & ~3u) return INVALID; *event = add('e', 0); return OK; }
API int cuEventDestroy_v2(Object *event) { NEED_CONTEXT; return find(event, 'e', 1); }
API int cuEventRecord(Object *event, Object *stream) { NEED_CONTEXT; return find(stream, 's', 0) ? INVALID_HANDLE : find(event, 'e', 0); }
API int cuEventQuery(Object *event) { NEED_CONTEXT; return find(event, 'e', 0); }
API int cuEventSynchronize(Object *event) { NEED_CONTEXT; return find(event, 'e', 0); }

static int copy(void *to, const void *from, size_t bytes, Object *stream, int to_device, int from_device) {
  if (depth == 0) return INVALID_CONTEXT;
  if (find(stream, 's', 0)) return INVALID_HANDLE;
  ENTER;
  int allowed = (!to_device || readable((uintptr_t)to, bytes, 3)) && (!from_device || readable((uintptr_t)from, bytes, 1));
  pthread_mutex_unlock(&mutex);
  if (!allowed) return INVALID;
  memmove(to, from, bytes);
  return OK;
}
API int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, Object *stream) { return copy((void *)to, from, bytes, stream, 1, 0); }
API int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, Object *stream) { return copy(to, (void *)from, bytes, stream, 0, 1); }
API int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, Object *stream) { return copy((void *)to, (void *)from, bytes, stream, 1, 1); }
API int cuMemsetD8Async(uintptr_t to, unsigned char value, size_t bytes, Object *stream) {
  NEED_CONTEXT;
  if (find(stream, 's', 0)) return INVALID_HANDLE;
  ENTER;
  int allowed = readable(to, bytes, 3);
  pthread_mutex_unlock(&mutex);
  if (!allowed) return INVALID;
  memset((void *)to, value, bytes);
  return OK;
}
