/* Memory between two pages that nobody may touch, for LD_PRELOAD.
 *
 * While `guard_on`, aligned_alloc (the kernels' workspace, csrc/bindings/heap_workspace.h) and the arrays of a NumPy
 * that was given `guard_numpy_handler` end where the forbidden page behind them begins, or with `guard_before` begin
 * where the one before them ends. They are filled with `guard_poison`. What was freed stays forbidden: no address is
 * given out twice. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT int guard_on, guard_before;
EXPORT unsigned char guard_poison;
EXPORT size_t guard_shortens;          /* bytes that a workspace has too few: does the guard see it? */
EXPORT size_t guard_workspaces;        /* how many there were */

extern void __libc_free(void*);
extern void* __libc_memalign(size_t alignment, size_t size);

enum { kPage = 1 << 16 };  /* a multiple of every machine's */
static const size_t kArena = (size_t)1 << 38;  /* of addresses: no memory until it is used */
static char *arena, *next_free;

static int ours(const void* p) { return arena != NULL && (char*)p >= arena && (char*)p < arena + kArena; }

/* [a page with the size][data, in whole pages][the next one's first page, or nothing yet] */
static void* allocate(size_t size) {
  const size_t bytes = size > 0 ? size : 1, pages = (bytes + kPage - 1) / kPage * kPage;
  if (arena == NULL) {
    void* made = mmap(NULL, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) return NULL;
    arena = made;
    next_free = (char*)(((uintptr_t)made + kPage - 1) / kPage * kPage);
  }
  if (bytes > kArena || next_free + pages + 3 * kPage > arena + kArena) return NULL;
  char* const header = __atomic_fetch_add(&next_free, pages + 2 * kPage, __ATOMIC_RELAXED);
  char* const data = header + kPage;
  if (mprotect(header, kPage + pages, PROT_READ | PROT_WRITE) != 0) return NULL;
  memcpy(header, &pages, sizeof pages);
  memset(data, guard_poison, pages);
  if (mprotect(header, kPage, PROT_NONE) != 0) return NULL;
  return guard_before ? data : data + pages - bytes;
}

static void release(void* p) {
  char* const header = (char*)((uintptr_t)p / kPage * kPage) - kPage;
  size_t pages;
  mprotect(header, kPage, PROT_READ);
  memcpy(&pages, header, sizeof pages);
  mmap(header, kPage + pages, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

EXPORT void* aligned_alloc(size_t alignment, size_t size) {
  if (!guard_on) return __libc_memalign(alignment, size);
  __atomic_fetch_add(&guard_workspaces, 1, __ATOMIC_RELAXED);
  void* const p = allocate(size > guard_shortens ? size - guard_shortens : size);
  if (p == NULL) errno = ENOMEM;
  return p;
}

EXPORT void free(void* p) {
  if (ours(p)) release(p);
  else __libc_free(p);
}

static void* numpy_malloc(void* context, size_t size) { return (void)context, allocate(size); }
static void* numpy_calloc(void* context, size_t count, size_t size) {
  void* const p = numpy_malloc(context, count * size);
  return p == NULL ? p : memset(p, 0, count * size);
}
/* The arrays of these tests do not grow. */
static void* numpy_realloc(void* context, void* p, size_t size) { return (void)context, (void)p, (void)size, NULL; }
static void numpy_free(void* context, void* p, size_t size) { (void)context, (void)size, free(p); }

/* NumPy's PyDataMem_Handler. */
EXPORT struct {
  char name[127];
  uint8_t version;
  void* context;
  void* (*malloc)(void*, size_t);
  void* (*calloc)(void*, size_t, size_t);
  void* (*realloc)(void*, void*, size_t);
  void (*free)(void*, void*, size_t);
} guard_numpy_handler = {"guarded", 1, NULL, numpy_malloc, numpy_calloc, numpy_realloc, numpy_free};
