// SPDX-License-Identifier: Apache-2.0
// Fibers and their scheduler, what they wait for, and asynchronous copies.
#include "cuda_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else  // nobody has to know about stacks
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace kdk::host {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kPage = 64 << 10, kStackBytes = 64 << 10;  // or multiples of a page

// A stack, and where what runs on it went on to another one.
struct Stack {
  ucontext_t start = {};
  bool started = false;
  void* registers[5] = {};
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* sanitizers = nullptr;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  Stack stack;
  bool waits = false;  // or is done
  std::vector<Copy> copies;
  int group = 0;  // of the next copy
};

struct Warp {
  unsigned arrived = 0, handed_in = 0;  // of the collective, and ever
  const char* collective = nullptr;
  // A lane that is ahead hands its next value in while others still read those before.
  alignas(16) unsigned char values[2][32 * kValueBytes];
};

// The block that runs. Fibers outlive it: each runs one thread of every block.
std::mutex one_grid;
std::unique_ptr<void, void (*)(void*)> shared(nullptr, std::free);
Stack scheduler{.started = true};
Fiber fibers[kMaxThreads];
std::vector<Warp> warps;
unsigned left, arrived;  // threads that are not done, and at the barrier
const std::function<void()>* body;
std::string clash;  // of collectives

Fiber& current() { return fibers[threadIdx.x]; }

// Returns when something switches back, which is always done from where this went. The builtins
// cost no system call, and with the calls around them the sanitizer need not know of the jump.
__attribute__((no_sanitize_address)) void switch_stacks(Stack& from, Stack& to) {
  __sanitizer_start_switch_fiber(&from.sanitizers, to.bottom, to.bytes);
  if (__builtin_setjmp(from.registers) == 0) {
    if (to.started) __builtin_longjmp(to.registers, 1);
    to.started = true;
    setcontext(&to.start);
  }
  __sanitizer_finish_switch_fiber(from.sanitizers, &to.bottom, &to.bytes);
}

void wait() {
  current().waits = true;
  switch_stacks(current().stack, scheduler);
}

void run_threads() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.bytes);
  for (;; wait()) {
    (*body)();
    --left;
  }
}

void prepare(Fiber& fiber) {
  fiber.waits = false;
  fiber.copies.clear();
  if (fiber.stack.bottom != nullptr) return;
  void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  // a page that stops an overflow
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  getcontext(&fiber.stack.start);
  fiber.stack.start.uc_stack.ss_sp = static_cast<char*>(memory) + kPage;
  fiber.stack.start.uc_stack.ss_size = fiber.stack.bytes = kStackBytes;
  fiber.stack.bottom = fiber.stack.start.uc_stack.ss_sp;
  makecontext(&fiber.stack.start, run_threads, 0);
}

void run_block(unsigned threads, const std::vector<unsigned>& order) {
  std::for_each(fibers, fibers + threads, prepare);
  warps.assign(threads / 32, {});
  arrived = 0;
  left = threads;
  while (left > 0) {
    bool moved = false;
    for (const unsigned thread : order) {
      if (fibers[thread].waits) continue;
      moved = true;
      threadIdx.x = thread;
      switch_stacks(scheduler, fibers[thread].stack);
    }
    if (moved) continue;
    for (Fiber& fiber : fibers) fiber = {};  // its stack stays in the middle of the kernel
    throw std::runtime_error(
        std::to_string(left) + " of " + std::to_string(threads) +
        " threads wait at a barrier or in a collective that the others do not reach" + clash);
  }
}

std::vector<unsigned> order_of(size_t n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  const char* asked = std::getenv("KDKERNELS_CUDA_HOST_ORDER");
  const std::string name = asked ? asked : "forward";
  if (name == "reverse") {
    std::reverse(order.begin(), order.end());
  } else if (name.starts_with("shuffle-")) {
    std::shuffle(order.begin(), order.end(), std::mt19937(std::stoul(name.substr(8))));
  } else if (name != "forward") {
    throw std::runtime_error("KDKERNELS_CUDA_HOST_ORDER: forward, reverse or shuffle-<seed>");
  }
  return order;
}

// The last of `count` threads, from `first` on, frees those that wait.
void meet(unsigned& here, unsigned first, unsigned count) {
  if (++here < count) return wait();
  here = 0;
  for (unsigned thread = first; thread < first + count; ++thread) fibers[thread].waits = false;
}

}  // namespace

void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard lock(one_grid);
  if (threads == 0 || threads % 32 != 0 || threads > kMaxThreads)
    throw std::runtime_error("a block must have whole warps and at most 1024 threads");
  if (shared_bytes > most_shared_bytes())
    throw std::runtime_error("a block asks for " + std::to_string(shared_bytes) +
                             " bytes of shared memory, and may have " +
                             std::to_string(most_shared_bytes()));
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  const auto thread_order = order_of(threads), block_order = order_of(blocks);
  body = &thread;
  clash.clear();
  blockDim = {threads, 1, 1};
  gridDim = grid;
  for (const unsigned b : block_order) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
    shared.reset(std::memset(memory, 0xff, shared_bytes));
    run_block(threads, thread_order);
  }
}

size_t most_shared_bytes() {
  const char* asked = std::getenv("KDKERNELS_CUDA_HOST_SHARED_KIB");
  return std::stoul(asked ? asked : "163") << 10;
}

unsigned char* shared_memory() { return static_cast<unsigned char*>(shared.get()); }

const void* gather_bytes(const char* what, const void* value, size_t bytes) {
  Warp& warp = warps[threadIdx.x / 32];
  if (warp.arrived == 0) warp.collective = what;
  if (std::strcmp(warp.collective, what) != 0) {
    clash = std::string(": lanes of a warp are in ") + warp.collective + " and in " + what;
    wait();
  }
  unsigned char* values = warp.values[warp.handed_in++ / 32 % 2];
  std::memcpy(values + lane() * bytes, value, bytes);
  meet(warp.arrived, threadIdx.x / 32 * 32, 32);
  return values;
}

void copy_later(void* to, const void* from, int bytes) {
  current().copies.push_back({to, from, bytes, current().group});
}

void close_copies() { ++current().group; }

void wait_copies(int groups_left) {
  auto& copies = current().copies;
  auto next = copies.begin();
  for (; next != copies.end() && current().group - next->group > groups_left; ++next) {
    std::memset(next->to, 0, 16);
    if (next->bytes > 0) std::memcpy(next->to, next->from, next->bytes);
  }
  copies.erase(copies.begin(), next);
}

}  // namespace kdk::host

void __syncthreads() { kdk::host::meet(kdk::host::arrived, 0, blockDim.x); }

// Returns how many there were since the last call.
extern "C" __attribute__((visibility("default"))) int64_t kdk_take_differences() {
  return std::exchange(kdk::host::differences, 0);
}
