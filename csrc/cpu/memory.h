// Memory that is about to be written.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ebft::cpu {

// Asks for large pages where that is a choice of each program. The C library gives large blocks back to the system when
// they are freed, so that their pages are new to every call, and to be given a page of 4 KiB takes longer than to write it.
inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t large = 16 << 20;
  const uintptr_t page = 2 << 20, begin = (uintptr_t(data) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (bytes >= large && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace ebft::cpu
