// Threads, and memory of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ebft::cpu {

// At most `most`, and no more than there are pieces of work; one that reads few bytes costs more than it saves.
inline int thread_count(int most, int64_t pieces, int64_t bytes) {
  const int64_t bytes_per_thread = 64 << 10;
  return int(std::min({int64_t(most), 1 + bytes / bytes_per_thread, std::max<int64_t>(pieces, 1)}));
}

// Calls body(i, thread) for every i < count. Threads take pieces as they become free: the others of a shared machine
// delay some more than others.
template <class Body>
void for_each(int64_t count, int threads, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 2) nowait
    for (int64_t i = 0; i < count; ++i) body(i, thread);
  }
#else
  (void)threads;
  for (int64_t i = 0; i < count; ++i) body(i, 0);
#endif
}

// Memory of each thread, uninitialised, in cache lines of its own; allocated before there are threads, because nothing may
// be thrown among them.
template <class T>
class Scratch {
 public:
  Scratch(int threads, int64_t count)
      : stride_((count * int64_t(sizeof(T)) + line - 1) / line * line),
        memory_(static_cast<char*>(::operator new(threads * stride_, std::align_val_t(line)))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t(line)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* of(int thread) { return reinterpret_cast<T*>(memory_ + thread * stride_); }

 private:
  static constexpr int64_t line = 64;
  int64_t stride_;
  char* memory_;
};

}  // namespace ebft::cpu
