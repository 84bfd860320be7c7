// A CUDA driver library without a GPU, for the tests of the libcuda driver: device memory is memfds,
// copies happen at once, and the rules of the virtual memory calls are enforced as cuda.h 13.0
// states them. Written apart from csrc/driver/host.cpp on purpose: two readings of the same rules.
//
// Environment, read at every call: STUB_CUDA_DEVICES (1), STUB_CUDA_VMM (1), STUB_CUDA_BYTES (1 GiB),
// STUB_CUDA_EXPORT (1), STUB_CUDA_RDMA (0), STUB_CUDA_NUMA (1), STUB_CUDA_NUMA_NODE (0).
// Every call may be made to fail (stub_fail), and knows whether it may run during a capture into a
// graph (stub_capture). Left out when built with -DSTUB_WITHOUT_<VMM | V2 | OPTIONAL>.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define ABSENT static __attribute__((unused))
#ifdef STUB_WITHOUT_VMM
#define VMM ABSENT
#else
#define VMM API
#endif
#ifdef STUB_WITHOUT_V2  // before cuMemGetInfo, cuMemcpy*Async and others took 64-bit sizes
#define V2 ABSENT
#else
#define V2 API
#endif
#ifdef STUB_WITHOUT_OPTIONAL
#define OPTIONAL ABSENT
#else
#define OPTIONAL API
#endif

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713,
       NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_IMPLICIT = 906 };
enum { DEVICE = 1, HOST_NUMA = 3 };                   // types of location
enum { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };   // modes of capture
#define GRANULARITY (2ul << 20)

typedef struct { int type, id; } Location;
typedef struct { int type, handle_types; Location location; void *win32; struct { unsigned char compression, rdma, rest[6]; } flags; } Properties;
typedef struct { Location location; int access; } AccessDesc;

typedef struct Memory { struct Memory *next; int fd; size_t bytes; int references, mappings; Properties made; ino_t inode; int imported; } Memory;
typedef struct Range { struct Range *next; uintptr_t begin; size_t bytes; Memory *memory; int access; } Range;
typedef struct Object { struct Object *next; char kind; } Object;  // 's'tream, 'e'vent, 'h'ost memory

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int initialized, contexts;
static Memory *memories;
static Range *reservations, *mappings;
static Range *registrations;  // of host memory
static Object *objects;
static Object *captured;  // the stream that is being captured into a graph
static int captured_mode, captured_broken;
static __thread int thread_mode;
static size_t used;
static __thread int depth;  // of this thread's stack of contexts; there is only one context
static int the_context;
static struct { char name[64]; int nth, code; } fault;

#define ENTER pthread_mutex_lock(&mutex)
#define LEAVE(code) do { int code_ = (code); pthread_mutex_unlock(&mutex); return code_; } while (0)
#define NEED_CONTEXT do { if (depth == 0) return INVALID_CONTEXT; } while (0)

// First in every call.
#define BEGIN do { int code_ = injected(__func__); if (code_) return code_; } while (0)
// First in those that cuda.h calls unsafe during a capture: waiting, queries, allocation.
#define BEGIN_UNSAFE do { BEGIN; int code_ = forbidden(); if (code_) return code_; } while (0)

static int injected(const char *name) {
  int code = OK;
  pthread_mutex_lock(&mutex);
  size_t length = strlen(fault.name);
  // "cuMemGetInfo" names cuMemGetInfo_v2 too.
  if (fault.nth > 0 && !strncmp(name, fault.name, length) && (!name[length] || name[length] == '_') && --fault.nth == 0) code = fault.code;
  pthread_mutex_unlock(&mutex);
  return code;
}
// A capture in the global mode forbids them to every thread that is not relaxed, and is broken by them.
static int forbidden(void) {
  pthread_mutex_lock(&mutex);
  int broken = captured && captured_mode == GLOBAL && thread_mode != RELAXED;
  if (broken) captured_broken = 1;
  pthread_mutex_unlock(&mutex);
  return broken ? CAPTURE_UNSUPPORTED : OK;
}
static int waits_for_captured(Object *stream) {
  pthread_mutex_lock(&mutex);
  int broken = captured && captured == stream;
  if (broken) captured_broken = 1;
  pthread_mutex_unlock(&mutex);
  return broken;
}

static size_t setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

// The nth call of that name from now on returns code and does nothing. nth 0: no more of that.
API void stub_fail(const char *name, int nth, int code) {
  pthread_mutex_lock(&mutex);
  strncpy(fault.name, name, sizeof fault.name - 1);
  fault.nth = nth;
  fault.code = code;
  pthread_mutex_unlock(&mutex);
}
API int stub_fault_is_pending(void) { ENTER; LEAVE(fault.nth > 0); }
// A capture of the stream begins (in the mode of CUDA), or ends with NULL; whether one was broken.
API int stub_capture(Object *stream, int mode) {
  ENTER;
  int was_broken = captured_broken;
  captured = stream;
  captured_mode = mode;
  captured_broken = 0;
  LEAVE(was_broken);
}
// Of the calling thread: its mode, then the depth of its stack of contexts; both start again.
API int stub_take_thread_state(void) {
  int state = thread_mode * 1000 + depth;
  thread_mode = depth = 0;
  return state;
}

API int stub_live(int kind) {  // handles (D: for RDMA), reservations, mappings, registrations (P), contexts, else objects of a kind
  int count = 0;
  ENTER;
  if (kind == 'H') for (Memory *m = memories; m; m = m->next) ++count;
  else if (kind == 'R') for (Range *r = reservations; r; r = r->next) ++count;
  else if (kind == 'M') for (Range *r = mappings; r; r = r->next) ++count;
  else if (kind == 'P') for (Range *r = registrations; r; r = r->next) ++count;
  else if (kind == 'D') for (Memory *m = memories; m; m = m->next) count += m->made.flags.rdma;
  else if (kind == 'C') count = contexts;
  else for (Object *o = objects; o; o = o->next) count += o->kind == kind;
  LEAVE(count);
}

API int cuInit(unsigned flags) { BEGIN; initialized = 1; return flags ? INVALID : OK; }
API int cuGetErrorString(int code, const char **text) {
  BEGIN;
  *text = code == NO_MEMORY ? "out of memory" : code == INVALID ? "invalid argument" : "some error";
  return OK;
}
API int cuDeviceGetCount(int *count) {
  BEGIN;
  if (!initialized) return NOT_INITIALIZED;
  *count = (int)setting("STUB_CUDA_DEVICES", 1);
  return OK;
}
API int cuDeviceGet(int *device, int index) { BEGIN; *device = index; return index < (int)setting("STUB_CUDA_DEVICES", 1) ? OK : INVALID_DEVICE; }
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
  BEGIN;
  (void)device;
  switch (attribute) {
    case 102: *value = (int)setting("STUB_CUDA_VMM", 1); return OK;      // VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    case 103: *value = (int)setting("STUB_CUDA_EXPORT", 1); return OK;   // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
    case 110: *value = (int)setting("STUB_CUDA_RDMA", 0); return OK;     // GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
    case 134: *value = (int)setting("STUB_CUDA_NUMA_NODE", 0); return OK;  // HOST_NUMA_ID
    case 141: *value = (int)setting("STUB_CUDA_NUMA", 1); return OK;     // HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    default: return INVALID;
  }
}
API int cuDevicePrimaryCtxRetain(void **context, int device) { BEGIN; (void)device; ENTER; ++contexts; *context = &the_context; LEAVE(OK); }
V2 int cuDevicePrimaryCtxRelease_v2(int device) { BEGIN; (void)device; ENTER; LEAVE(contexts-- > 0 ? OK : INVALID); }
API int cuCtxGetCurrent(void **context) { BEGIN; *context = depth ? &the_context : NULL; return OK; }
V2 int cuCtxPushCurrent_v2(void *context) { BEGIN; if (context != &the_context) return INVALID_CONTEXT; ++depth; return OK; }
V2 int cuCtxPopCurrent_v2(void **context) { BEGIN; NEED_CONTEXT; --depth; *context = &the_context; return OK; }
V2 int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  BEGIN_UNSAFE;
  NEED_CONTEXT;
  ENTER;
  *total = setting("STUB_CUDA_BYTES", 1ul << 30);
  *free_bytes = *total - used;
  LEAVE(OK);
}

static int known(const Properties *wanted) {
  if (wanted->type != 1 || wanted->win32 || wanted->flags.compression) return 0;
  if (wanted->handle_types & ~1 || (wanted->handle_types && !setting("STUB_CUDA_EXPORT", 1))) return 0;
  if (wanted->flags.rdma && !setting("STUB_CUDA_RDMA", 0)) return 0;
  if (wanted->location.type == DEVICE) return wanted->location.id < (int)setting("STUB_CUDA_DEVICES", 1);
  int node = (int)setting("STUB_CUDA_NUMA_NODE", 0);
  return wanted->location.type == HOST_NUMA && setting("STUB_CUDA_NUMA", 1) && wanted->location.id == (node < 0 ? 0 : node);
}
VMM int cuMemGetAllocationGranularity(size_t *bytes, const Properties *wanted, int option) {
  BEGIN;
  if (!known(wanted) || option > 1) return INVALID;
  *bytes = GRANULARITY;
  return OK;
}

static void reap(Memory *memory) {
  if (memory->references || memory->mappings) return;
  for (Memory **at = &memories; *at; at = &(*at)->next) {
    if (*at != memory) continue;
    *at = memory->next;
    if (!memory->imported && memory->made.location.type == DEVICE) used -= memory->bytes;
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
  BEGIN_UNSAFE;
  ENTER;
  if (!bytes || bytes % GRANULARITY || flags || !known(wanted)) LEAVE(INVALID);
  int on_device = wanted->location.type == DEVICE;
  if (on_device && used + bytes > setting("STUB_CUDA_BYTES", 1ul << 30)) LEAVE(NO_MEMORY);
  int fd = memfd_create("stub", MFD_CLOEXEC);
  struct stat file;
  if (fd < 0 || ftruncate(fd, (off_t)bytes) || fstat(fd, &file)) LEAVE(NO_MEMORY);
  Memory *memory = calloc(1, sizeof *memory);
  *memory = (Memory){memories, fd, bytes, 1, 0, *wanted, file.st_ino, 0};
  *handle = memories = memory;
  if (on_device) used += bytes;
  LEAVE(OK);
}
OPTIONAL int cuMemExportToShareableHandle(int *shared, Memory *handle, int type, unsigned long long flags) {
  BEGIN_UNSAFE;
  ENTER;
  if (!held(handle) || type != 1 || flags || handle->made.handle_types != 1) LEAVE(INVALID);
  *shared = dup(handle->fd);  // not close-on-exec, as nothing promises that
  LEAVE(*shared < 0 ? NO_MEMORY : OK);
}
OPTIONAL int cuMemImportFromShareableHandle(Memory **handle, void *shared, int type) {
  BEGIN_UNSAFE;
  ENTER;
  struct stat file;
  if (type != 1 || fstat((int)(intptr_t)shared, &file) || fcntl((int)(intptr_t)shared, F_GET_SEALS) < 0) LEAVE(INVALID);
  for (Memory *m = memories; m; m = m->next) {  // one of ours: another reference
    if (m->inode != file.st_ino) continue;
    ++m->references;
    *handle = m;
    LEAVE(OK);
  }
  Memory *memory = calloc(1, sizeof *memory);
  *memory = (Memory){memories, fcntl((int)(intptr_t)shared, F_DUPFD_CLOEXEC, 0), (size_t)file.st_size, 1, 0, {.location = {DEVICE, 0}}, file.st_ino, 1};
  *handle = memories = memory;
  LEAVE(OK);
}
VMM int cuMemRelease(Memory *handle) {
  BEGIN_UNSAFE;
  ENTER;
  if (!held(handle)) LEAVE(INVALID);
  --handle->references;
  reap(handle);
  LEAVE(OK);
}
VMM int cuMemAddressReserve(uintptr_t *address, size_t bytes, size_t alignment, uintptr_t hint, unsigned long long flags) {
  BEGIN_UNSAFE;
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
  BEGIN_UNSAFE;
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
  BEGIN_UNSAFE;
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
  BEGIN_UNSAFE;
  ENTER;
  if (!filled(begin, bytes)) LEAVE(INVALID);
  int access = 0;  // of the device; 1: read, 3: read and write
  int protection = 0, of_host = 0;
  for (Range *m = mappings; m; m = m->next) of_host |= m->begin == begin && m->memory->made.location.type == HOST_NUMA;
  for (size_t i = 0; i < count; ++i) {
    if (wanted[i].location.type != DEVICE && !(of_host && wanted[i].location.type == HOST_NUMA)) LEAVE(INVALID);
    if (wanted[i].location.type == DEVICE) access = wanted[i].access;
    if (!of_host || wanted[i].location.type == HOST_NUMA) protection = wanted[i].access;
  }
  mprotect((void *)begin, bytes, protection == 3 ? PROT_READ | PROT_WRITE : protection == 1 ? PROT_READ : PROT_NONE);
  for (Range *m = mappings; m; m = m->next) if (m->begin >= begin && m->begin < begin + bytes) m->access = access;
  LEAVE(OK);
}
VMM int cuMemUnmap(uintptr_t begin, size_t bytes) {
  BEGIN_UNSAFE;
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
  BEGIN_UNSAFE;
  NEED_CONTEXT;
  if (!bytes || flags != 1) return INVALID;  // portable, nothing else
  char *object = (char *)add('h', bytes + 64);
  *memory = memset(object + 64, 0, bytes);
  return OK;
}
API int cuMemFreeHost(void *memory) { BEGIN_UNSAFE; NEED_CONTEXT; return find((Object *)((char *)memory - 64), 'h', 1) ? INVALID : OK; }
OPTIONAL int cuMemHostRegister_v2(uintptr_t begin, size_t bytes, unsigned flags) {
  BEGIN_UNSAFE;
  NEED_CONTEXT;
  if (!bytes || flags != 1) return INVALID;  // portable, nothing else
  ENTER;
  for (Range *r = registrations; r; r = r->next) {  // whole pages are locked
    if ((r->begin & ~4095ul) < begin + bytes && (begin & ~4095ul) < r->begin + r->bytes) LEAVE(ALREADY_REGISTERED);
  }
  Range *range = calloc(1, sizeof *range);
  *range = (Range){registrations, begin, bytes, NULL, 0};
  registrations = range;
  LEAVE(OK);
}
OPTIONAL int cuMemHostUnregister(uintptr_t begin) {
  BEGIN_UNSAFE;
  NEED_CONTEXT;
  ENTER;
  for (Range **at = &registrations; *at; at = &(*at)->next) {
    Range *range = *at;
    if (range->begin != begin) continue;
    *at = range->next;
    free(range);
    LEAVE(OK);
  }
  LEAVE(NOT_REGISTERED);
}
OPTIONAL int cuThreadExchangeStreamCaptureMode(int *mode) {
  BEGIN;
  if (*mode < GLOBAL || *mode > RELAXED) return INVALID;
  int before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return OK;
}
OPTIONAL int cuStreamIsCapturing(Object *stream, int *status) {
  BEGIN;
  NEED_CONTEXT;
  if (!stream && captured) return CAPTURE_IMPLICIT;  // the legacy default stream
  if (stream && find(stream, 's', 0)) return INVALID_HANDLE;
  ENTER;
  *status = stream && captured == stream ? 1 + captured_broken : 0;
  LEAVE(OK);
}
API int cuStreamCreate(Object **stream, unsigned flags) { BEGIN; NEED_CONTEXT; if (flags != 1) return INVALID; *stream = add('s', 0); return OK; }
V2 int cuStreamDestroy_v2(Object *stream) { BEGIN; NEED_CONTEXT; return find(stream, 's', 1); }
API int cuStreamSynchronize(Object *stream) { BEGIN_UNSAFE; NEED_CONTEXT; if (waits_for_captured(stream)) return CAPTURE_UNSUPPORTED; return find(stream, 's', 0); }
API int cuStreamWaitEvent(Object *stream, Object *event, unsigned flags) {
  BEGIN;
  NEED_CONTEXT;
  if (flags) return INVALID;
  return find(stream, 's', 0) ? INVALID_HANDLE : find(event, 'e', 0);
}
API int cuEventCreate(Object **event, unsigned flags) { BEGIN; NEED_CONTEXT; if (flags & ~3u) return INVALID; *event = add('e', 0); return OK; }
V2 int cuEventDestroy_v2(Object *event) { BEGIN; NEED_CONTEXT; return find(event, 'e', 1); }
API int cuEventRecord(Object *event, Object *stream) { BEGIN; NEED_CONTEXT; return find(stream, 's', 0) ? INVALID_HANDLE : find(event, 'e', 0); }
API int cuEventQuery(Object *event) { BEGIN_UNSAFE; NEED_CONTEXT; return find(event, 'e', 0); }
API int cuEventSynchronize(Object *event) { BEGIN_UNSAFE; NEED_CONTEXT; return find(event, 'e', 0); }

// A copy that touches a registration and more than it is refused.
static int in_one_piece(uintptr_t begin, size_t bytes) {
  for (Range *r = registrations; r; r = r->next) {
    if (begin + bytes <= r->begin || r->begin + r->bytes <= begin) continue;
    return r->begin <= begin && begin + bytes <= r->begin + r->bytes;
  }
  return 1;
}
static int copy(void *to, const void *from, size_t bytes, Object *stream, int to_device, int from_device) {
  if (depth == 0) return INVALID_CONTEXT;
  if (find(stream, 's', 0)) return INVALID_HANDLE;
  ENTER;
  int allowed = to_device ? readable((uintptr_t)to, bytes, 3) : in_one_piece((uintptr_t)to, bytes);
  allowed = allowed && (from_device ? readable((uintptr_t)from, bytes, 1) : in_one_piece((uintptr_t)from, bytes));
  pthread_mutex_unlock(&mutex);
  if (!allowed) return INVALID;
  memmove(to, from, bytes);
  return OK;
}
V2 int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, Object *stream) { BEGIN; return copy((void *)to, from, bytes, stream, 1, 0); }
V2 int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, Object *stream) { BEGIN; return copy(to, (void *)from, bytes, stream, 0, 1); }
V2 int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, Object *stream) { BEGIN; return copy((void *)to, (void *)from, bytes, stream, 1, 1); }
API int cuMemsetD8Async(uintptr_t to, unsigned char value, size_t bytes, Object *stream) {
  BEGIN;
  NEED_CONTEXT;
  if (find(stream, 's', 0)) return INVALID_HANDLE;
  ENTER;
  int allowed = readable(to, bytes, 3);
  pthread_mutex_unlock(&mutex);
  if (!allowed) return INVALID;
  memset((void *)to, value, bytes);
  return OK;
}
