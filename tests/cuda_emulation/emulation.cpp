// Runs the blocks of a launch one after the other, the threads of each as fibers.
#include "cuda_runtime.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ebft::cuda {
// As much as every GPU has without being asked in a special way.
thread_local double dynamic_shared_memory[(48 << 10) / sizeof(double)];
}  // namespace ebft::cuda

namespace emulation {
namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr unsigned char poison = 0xff;

struct Fiber {
  enum State { fresh, ready, waiting, done };

  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it waits: jumps, unlike changes of context, need no system call
  void* fake_stack;
  State state;
  Wait wait;
  uint64_t bits;  // what it gives away, then what it gets
  int source;
};

std::vector<Fiber> fibers;  // one for each thread of a block; the stacks serve all blocks
jmp_buf scheduler;
int running;
const std::function<void()>* body;
int order = 0;
std::string failure;

// AddressSanitizer has to be told of every change of stack.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#else
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

void enter(int thread) {
  Fiber& fiber = fibers[running = thread];
  threadIdx = {unsigned(thread) % blockDim.x, unsigned(thread) / blockDim.x % blockDim.y,
               unsigned(thread) / (blockDim.x * blockDim.y)};
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), stack_bytes);
  if (!_setjmp(scheduler)) {
    if (fiber.state == Fiber::fresh) setcontext(&fiber.context);
    _longjmp(fiber.place, 1);
  }
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void arrive(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void leave(Fiber& fiber) {
  const bool for_ever = fiber.state == Fiber::done;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
  if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
  arrive(fiber.fake_stack);
}

void start() {
  arrive(nullptr);
  (*body)();
  Fiber& fiber = fibers[running];
  fiber.state = Fiber::done;
  leave(fiber);
}

void prepare(Fiber& fiber) {
  fiber.state = Fiber::fresh;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start, 0);
}

// The threads [first, second) that thread `t` waits among.
std::pair<int, int> group_of(const Wait& wait, int t) {
  if (wait.mask == 0) return {0, int(fibers.size())};
  return {t / warp_size * warp_size, t / warp_size * warp_size + warp_size};
}

bool is_awaited(const Wait& wait, int t) { return wait.mask == 0 || wait.mask >> t % warp_size & 1; }

// Somebody whom thread `t` waits for and who does not wait for the same; -1 if there is nobody.
int missing(int t) {
  const Wait& wait = fibers[t].wait;
  const auto [first, last] = group_of(wait, t);
  for (int other = first; other < last; ++other) {
    if (!is_awaited(wait, other)) continue;
    if (other >= int(fibers.size())) return other;
    if (fibers[other].state != Fiber::waiting || !(fibers[other].wait == wait)) return other;
  }
  return -1;
}

// Lets all go on that wait with thread `t`, with what they get from each other.
void release(int t) {
  const Wait wait = fibers[t].wait;
  const auto [first, last] = group_of(wait, t);
  std::vector<uint64_t> bits(last - first);
  for (int other = first; other < last; ++other) {
    if (is_awaited(wait, other)) bits[other - first] = fibers[other].bits;
  }
  for (int other = first; other < last; ++other) {
    if (!is_awaited(wait, other)) continue;
    fibers[other].state = Fiber::ready;
    if (wait.mask) fibers[other].bits = bits[fibers[other].source];
  }
}

std::string place(const Wait& wait) {
  const char* name = strrchr(wait.file, '/');
  return std::string(wait.what) + " (" + (name ? name + 1 : wait.file) + ":" + std::to_string(wait.line) + ")";
}

std::string describe(int t) {
  const int other = missing(t);
  std::string text = "thread " + std::to_string(t) + " waits at " + place(fibers[t].wait) + " for thread " +
                     std::to_string(other) + ", which ";
  if (other >= int(fibers.size())) return text + "does not exist";
  return text + (fibers[other].state == Fiber::done ? "has ended" : "waits at " + place(fibers[other].wait));
}

// All static and dynamic shared memory of the kernels: the thread-local memory of this library.
std::pair<unsigned char*, size_t> shared_memory() {
  std::pair<unsigned char*, size_t> found = {nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) {
        auto* result = static_cast<std::pair<unsigned char*, size_t>*>(to);
        auto* inside = reinterpret_cast<unsigned char*>(ebft::cuda::dynamic_shared_memory);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          auto* data = static_cast<unsigned char*>(info->dlpi_tls_data);
          const size_t size = info->dlpi_phdr[i].p_memsz;
          if (info->dlpi_phdr[i].p_type == PT_TLS && data && data <= inside && inside < data + size) {
            *result = {data, size};
          }
        }
        return 0;
      },
      &found);
  return found;
}

// The threads of each warp in the order in which they get their turns, and the warps likewise.
std::vector<std::vector<int>> turns() {
  std::vector<std::vector<int>> warps((fibers.size() + warp_size - 1) / warp_size);
  for (int t = 0; t < int(fibers.size()); ++t) warps[t / warp_size].push_back(t);
  std::mt19937 random(order);
  const auto arrange = [&](auto& items) {
    if (order == 1) std::reverse(items.begin(), items.end());
    if (order > 1) std::shuffle(items.begin(), items.end(), random);
  };
  for (auto& warp : warps) arrange(warp);
  arrange(warps);
  return warps;
}

// Runs a warp until all its threads have ended or wait for other warps, or for somebody who does not come.
void run_warp(const std::vector<int>& warp) {
  for (bool released = true; released;) {
    for (int t : warp) {
      if (fibers[t].state <= Fiber::ready) enter(t);
    }
    released = false;
    for (int t : warp) {
      if (fibers[t].state != Fiber::waiting || fibers[t].wait.mask == 0 || missing(t) >= 0) continue;
      release(t);
      released = true;
    }
  }
}

// Each warp runs ahead of the others as far as it can: what it overwrites too early then, others have not read.
bool run_block(const std::vector<std::vector<int>>& warps) {
  for (Fiber& fiber : fibers) prepare(fiber);
  for (;;) {
    for (const auto& warp : warps) run_warp(warp);
    int waiting = -1;
    for (int t = int(fibers.size()); t-- > 0;) {
      if (fibers[t].state == Fiber::waiting) waiting = t;
    }
    if (waiting < 0) return true;
    if (missing(waiting) >= 0) {
      failure = describe(waiting);
      return false;
    }
    release(waiting);
  }
}

}  // namespace

uint64_t meet(const Wait& wait, uint64_t sent, int source) {
  Fiber& fiber = fibers[running];
  fiber.state = Fiber::waiting;
  fiber.wait = wait;
  fiber.bits = sent;
  fiber.source = source;
  leave(fiber);
  return fiber.bits;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  const size_t threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  if (threads < 1 || threads > 1024 || config.dynamicSmemBytes > sizeof ebft::cuda::dynamic_shared_memory) {
    return cudaErrorInvalidConfiguration;
  }
  fibers.resize(threads);
  body = &thread;
  const std::vector<std::vector<int>> in_turn = turns();
  const auto [shared, shared_bytes] = shared_memory();
  auto* dynamic = reinterpret_cast<unsigned char*>(ebft::cuda::dynamic_shared_memory);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        std::fill(shared, shared + shared_bytes, poison);
        if (!run_block(in_turn)) return cudaErrorLaunchFailure;
        const auto* beyond = std::find_if(dynamic + config.dynamicSmemBytes,
                                          dynamic + sizeof ebft::cuda::dynamic_shared_memory,
                                          [](unsigned char byte) { return byte != poison; });
        if (beyond == dynamic + sizeof ebft::cuda::dynamic_shared_memory) continue;
        failure = "byte " + std::to_string(beyond - dynamic) + " of " + std::to_string(config.dynamicSmemBytes) +
                  " bytes of shared memory was written";
        return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidConfiguration";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulation::failure.c_str() : "invalid configuration argument";
}

// 0: threads, and warps, take turns in ascending order; 1: descending; else in an order that depends on the number.
extern "C" void emulation_set_order(int order) { emulation::order = order; }
