// SPDX-License-Identifier: Apache-2.0
// Fibers, their scheduler, and asynchronous copies of cuda_host.h.
#include "cuda_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace kdk::host {
namespace {

constexpr size_t kPage = 64 << 10;        // or a multiple of one
constexpr size_t kStackBytes = 64 << 10;  // small: the sanitizer clears one in every switch

struct Copy {
  void* to;
  const void* from;
  int bytes, zeros, group;
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started, done;
  const uint64_t* waits_for;  // a generation that has to pass `seen`; null: can go on
  uint64_t seen;
  unsigned thread;
  void* stack;
  std::vector<Copy> copies;
  int group;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
};

struct Meeting {
  unsigned arrived = 0;
  uint64_t generation = 0;
  Collective what = nullptr;
  const void* in[32];
  void* out[32];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting barrier;
  unsigned char* shared = nullptr;
  const std::function<void()>* thread = nullptr;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  jmp_buf back;
  std::string failure;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  const void* bottom;
  size_t size;
#endif
} block;

// Switching by setjmp costs no system call; the sanitizer has to see every switch instead.
#if defined(__SANITIZE_ADDRESS__)
void switch_to(Fiber& fiber) {
  block.current = &fiber;
  __sanitizer_start_switch_fiber(&block.fake_stack, fiber.stack, kStackBytes);
  swapcontext(&block.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
}

void switch_back() {
  Fiber& fiber = *block.current;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, block.bottom,
                                 block.size);
  swapcontext(&fiber.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.bottom, &block.size);
}
#else
void switch_to(Fiber& fiber) {
  block.current = &fiber;
  if (_setjmp(block.back) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

void switch_back() {
  if (_setjmp(block.current->resume) == 0) _longjmp(block.back, 1);
}
#endif

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.bottom, &block.size);
#endif
  (*block.thread)();
  block.current->done = true;
  switch_back();
}

void wait_for(const uint64_t& generation) {
  block.current->waits_for = &generation;
  block.current->seen = generation;
  switch_back();
}

bool runnable(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || *fiber.waits_for != fiber.seen);
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
    throw std::runtime_error(
        "KDKERNELS_CUDA_HOST_ORDER must be forward, reverse or shuffle-<seed>");
  }
  return order;
}

void start(Fiber& fiber, unsigned thread) {
  if (fiber.stack == nullptr) {  // behind a page that stops an overflow
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(memory) + kPage;
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.started = fiber.done = false;
  fiber.waits_for = nullptr;
  fiber.thread = thread;
  fiber.copies.clear();
  fiber.group = 0;
}

void run_block(unsigned threads, const std::vector<unsigned>& order) {
  for (unsigned t = 0; t < threads; ++t) start(block.fibers[t], t);
  block.warps.assign(threads / 32, {});
  block.barrier = {};
  for (unsigned left = threads; left > 0;) {
    bool moved = false;
    for (const unsigned t : order) {
      Fiber& fiber = block.fibers[t];
      if (!runnable(fiber)) continue;
      fiber.waits_for = nullptr;
      threadIdx = {t, 0, 0};
      switch_to(fiber);
      moved = true;
      if (!block.failure.empty()) throw std::runtime_error(block.failure);
      if (fiber.done) --left;
    }
    if (!moved) {
      throw std::runtime_error(
          std::to_string(left) + " of " + std::to_string(threads) +
          " threads wait at a barrier or in a collective that the others do not reach");
    }
  }
}

std::mutex one_grid;

}  // namespace

void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard lock(one_grid);
  if (threads == 0 || threads % 32 != 0 || threads > 1024)
    throw std::runtime_error("a block must have whole warps and at most 1024 threads");
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  const auto thread_order = order_of(threads), block_order = order_of(blocks);
  block.thread = &thread;
  block.failure.clear();
  blockDim = {threads, 1, 1};
  gridDim = grid;
  for (const unsigned b : block_order) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
    if (memory) std::memset(memory, 0xff, shared_bytes);
    block.shared = static_cast<unsigned char*>(memory);
    run_block(threads, thread_order);
  }
}

unsigned char* shared_memory() { return block.shared; }

void sync_block() {
  Meeting& barrier = block.barrier;
  if (++barrier.arrived < block.warps.size() * 32) return wait_for(barrier.generation);
  barrier.arrived = 0;
  ++barrier.generation;
}

void sync_warp(Collective what, const void* in, void* out) {
  const unsigned thread = block.current->thread;
  Meeting& warp = block.warps[thread / 32];
  if (warp.arrived > 0 && warp.what != what) {
    block.failure = "the lanes of a warp meet in different collectives";
    return switch_back();
  }
  warp.what = what;
  warp.in[thread % 32] = in;
  warp.out[thread % 32] = out;
  if (++warp.arrived < 32) return wait_for(warp.generation);
  what(warp.in, warp.out);
  warp.arrived = 0;
  ++warp.generation;
}

void copy_later(void* to, const void* from, int bytes, int zeros) {
  block.current->copies.push_back({to, from, bytes, zeros, block.current->group});
}

void close_copies() { ++block.current->group; }

void wait_copies(int groups_left) {
  auto& copies = block.current->copies;
  const int first_open = block.current->group - groups_left;
  const auto end = std::find_if(copies.begin(), copies.end(),
                                [&](const Copy& copy) { return copy.group >= first_open; });
  for (auto copy = copies.begin(); copy != end; ++copy) {
    if (copy->bytes > 0) std::memcpy(copy->to, copy->from, copy->bytes);
    std::memset(static_cast<char*>(copy->to) + copy->bytes, 0, copy->zeros);
  }
  copies.erase(copies.begin(), end);
}

}  // namespace kdk::host
