// An allocator for LD_PRELOAD: what PyTorch allocates for tensors on the CPU, by posix_memalign to 64 bytes, and the
// kernels for scratch, by aligned_alloc, ends at an unmapped page, or begins behind one where guards_begin is set. What
// is freed is unmapped for good. The rest of the process keeps glibc's allocator.
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* p);

int guards_begin;

enum { kAlignment = 64 };
static const size_t kAddresses = (size_t)1 << 42;  // none is used twice
static char* first;
static _Atomic(char*) next;
static size_t page;

__attribute__((constructor)) static void reserve(void) {
  first = mmap(NULL, kAddresses, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (first == MAP_FAILED) abort();
  next = first;
  page = sysconf(_SC_PAGESIZE);
}

// A page that holds the size, one that stays unmapped, the memory, and again one unmapped.
static void* allocate(size_t size) {
  const size_t bytes = (size + page - 1) / page * page;
  char* const pages = atomic_fetch_add(&next, bytes + 3 * page);
  char* const memory = pages + 2 * page;
  if (memory + bytes + page > first + kAddresses || mprotect(pages, page, PROT_READ | PROT_WRITE) != 0 ||
      mprotect(memory, bytes, PROT_READ | PROT_WRITE) != 0) {
    return NULL;
  }
  *(size_t*)pages = bytes;
  return guards_begin ? memory : memory + (bytes - size);
}

int posix_memalign(void** p, size_t alignment, size_t size) {
  *p = alignment == kAlignment && size > 0 ? allocate(size) : __libc_memalign(alignment, size);
  return *p ? 0 : ENOMEM;
}

void* aligned_alloc(size_t alignment, size_t size) {
  const int is_guarded = alignment == kAlignment && size > 0 && size % kAlignment == 0;
  return is_guarded ? allocate(size) : __libc_memalign(alignment, size);
}

void free(void* p) {
  char* const memory = p;
  if (!first || memory < first || memory >= first + kAddresses) {
    __libc_free(p);
    return;
  }
  char* const pages = memory - (uintptr_t)memory % page - 2 * page;
  mmap(pages, *(size_t*)pages + 2 * page, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
