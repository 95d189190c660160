// The scheduler of cuda_host.h: one block after the other, its threads as fibers. It is compiled without instrumentation and
// tells the sanitizers what orders what: VLMK_ASAN and VLMK_TSAN say which of them the kernels are built with.
#include "cuda_host.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

extern "C" {
#ifdef VLMK_ASAN
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif
#ifdef VLMK_TSAN
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
}

Index threadIdx, blockIdx, blockDim, gridDim;

namespace vlmk::host {

Recorder recorder = nullptr;

namespace {

constexpr size_t kStack = size_t(256) << 10;
constexpr unsigned kUnordered = 1;  // a switch of fibers orders no memory
constexpr int kStride = 37;         // from a thread to its like in the next block, in fibers

enum class State { ready, at_barrier, in_warp, done };

// What one thread after the other runs on. To TSan it is a thread: two blocks put their like threads on different fibers, so
// that it sees what they do to each other.
struct Fiber {
  ucontext_t context;
  char* stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  void* tsan = __tsan_create_fiber(0);
  void* fake_stack = nullptr;

  void prepare(void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = kStack;
    makecontext(&context, function, 0);
  }
};

struct Thread {
  Fiber* fiber;
  State state = State::ready;
  Place place;
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  int source = 0;
};

// Tokens are addresses that stand for what orders memory. Barriers of a block, and those of a warp, take two of them in turn,
// so that what a thread does after one is not taken for what another does before it.
struct Warp {
  unsigned meetings = 0;
  char tokens[2];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<std::pair<const char*, unsigned>, std::unique_ptr<char[]>> shared;
  unsigned barriers = 0;
  int waiting = 0, done = 0;
  char tokens[2], shared_token;
};

const std::function<void()>* body;
ucontext_t scheduler;
void* scheduler_tsan;
const void* scheduler_stack;
size_t scheduler_stack_size;
Block* block;
int current;
char start_token, end_token;

Thread& me() { return block->threads[current]; }

[[noreturn]] void fault(const char* what) {
  std::fprintf(stderr, "vlmk: %s, block %u\n", what, blockIdx.x);
  std::map<std::string, std::pair<int, size_t>> places;  // where -> threads, the first of them
  for (size_t i = 0; i < block->threads.size(); ++i) {
    const Thread& t = block->threads[i];
    std::string where = t.state == State::done ? "ended" : "ready";
    if (t.state == State::at_barrier || t.state == State::in_warp) {
      where = std::string("at ") + t.place.file_name() + ":" + std::to_string(t.place.line());
    }
    ++places.try_emplace(where, 0, i).first->second.first;
  }
  for (const auto& [where, threads] : places) {
    std::fprintf(stderr, "  %d threads, %zu the first of them, %s\n", threads.first, threads.second, where.c_str());
  }
  std::_Exit(42);
}

void leave() {  // to the scheduler
  Fiber& fiber = *me().fiber;
  __sanitizer_start_switch_fiber(me().state == State::done ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_stack_size);
  __tsan_switch_to_fiber(scheduler_tsan, kUnordered);
  swapcontext(&fiber.context, &scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void enter(int thread) {
  current = thread;
  threadIdx = {unsigned(thread), 0, 0};
  Fiber& fiber = *me().fiber;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
  __tsan_switch_to_fiber(fiber.tsan, kUnordered);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void begin() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  __tsan_acquire(&start_token);
  (*body)();
  __tsan_release(&end_token);
  me().state = State::done;
  ++block->done;
  leave();
}

// Who gets a turn after whom: VLMK_ORDER is forward, reverse, or the seed of a random order.
std::vector<int> turns(int threads) {
  static const char* const wanted = std::getenv("VLMK_ORDER");
  static const std::string order = wanted ? wanted : "forward";
  static std::mt19937 random(std::strtoul(order.c_str(), nullptr, 10));
  std::vector<int> out(threads);
  std::iota(out.begin(), out.end(), 0);
  if (order == "reverse") std::reverse(out.begin(), out.end());
  if (order != "reverse" && order != "forward") std::shuffle(out.begin(), out.end(), random);
  return out;
}

void release_barrier() {
  for (const Thread& t : block->threads) {
    if (t.state == State::done) fault("__syncthreads after some threads have ended");
    if (t.place.line() != block->threads[0].place.line()) fault("divergent __syncthreads");
  }
  for (Thread& t : block->threads) t.state = State::ready;
  block->waiting = 0;
  ++block->barriers;
}

void run_block() {
  const int threads = int(block->threads.size());
  while (block->done < threads) {
    bool moved = false;
    for (int thread : turns(threads)) {
      if (block->threads[thread].state != State::ready) continue;
      enter(thread);
      moved = true;
    }
    if (block->waiting && block->waiting + block->done == threads) {
      release_barrier();
    } else if (!moved) {
      fault("threads wait for others that do not come");
    }
  }
}

}  // namespace

void run(int64_t blocks, int threads, const std::function<void()>& thread) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  while (int(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  body = &thread;
  scheduler_tsan = __tsan_get_current_fiber();
  gridDim = {unsigned(blocks), 1, 1}, blockDim = {unsigned(threads), 1, 1};
  std::vector<Block> all(blocks);  // until the end, that no two blocks share an address
  __tsan_release(&start_token);
  for (int64_t b = 0; b < blocks; ++b) {
    block = &all[b];
    block->warps.resize((threads + 31) / 32);
    blockIdx = {unsigned(b), 0, 0};
    for (int i = 0; i < threads; ++i) {
      block->threads.emplace_back().fiber = fibers[(i + b * kStride) % threads].get();
      block->threads.back().fiber->prepare(begin);
    }
    run_block();
  }
  __tsan_acquire(&end_token);
}

void* shared(size_t bytes, Place place) {
  auto& memory = block->shared[{place.file_name(), place.line()}];
  if (!memory) {
    memory = std::make_unique<char[]>(bytes);
    std::memset(memory.get(), 0xff, bytes);
    __tsan_release(&block->shared_token);
  }
  __tsan_acquire(&block->shared_token);
  return memory.get();
}

void wait_for_block(Place place) {
  char* const token = &block->tokens[block->barriers % 2];
  me().place = place;
  me().state = State::at_barrier;
  ++block->waiting;
  __tsan_release(token);
  leave();
  __tsan_acquire(token);
}

uint64_t wait_for_warp(uint32_t mask, uint64_t value, int source, bool orders_memory, Place place) {
  const int lane = current % 32;
  Thread* const lanes = &block->threads[current - lane];
  Warp& warp = block->warps[current / 32];
  char* const token = &warp.tokens[warp.meetings % 2];
  Thread& my = lanes[lane];
  my.state = State::in_warp, my.place = place, my.mask = mask, my.value = value, my.source = source;
  if (!(mask >> lane & 1)) fault("a lane takes part under a mask that does not name it");
  if (!(mask >> source & 1)) fault("a lane reads from one that the mask does not name");
  if (orders_memory) __tsan_release(token);
  bool all = true;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (current - lane + i >= int(block->threads.size())) fault("the mask names lanes that do not exist");
    if (lanes[i].state != State::in_warp) {
      all = false;
    } else if (lanes[i].mask != mask || lanes[i].place.line() != place.line()) {
      fault("lanes of a warp meet at different places or under different masks");
    }
  }
  if (!all) {
    leave();
  } else {
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) lanes[i].result = lanes[lanes[i].source].value, lanes[i].state = State::ready;
    }
    ++warp.meetings;
  }
  if (orders_memory) __tsan_acquire(token);
  return my.result;
}

}  // namespace vlmk::host

extern "C" void vlmk_record(vlmk::host::Recorder recorder) { vlmk::host::recorder = recorder; }

extern "C" const char* vlmk_kernel_name(void* kernel) {
  Dl_info info{};
  return dladdr(kernel, &info) ? info.dli_sname : nullptr;
}
