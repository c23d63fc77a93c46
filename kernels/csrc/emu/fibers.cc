// The emulation's threads: a stack each, and a switch of stacks at every barrier.
#include <cstdlib>
#include <memory>
#include <vector>

#include "../common.cuh"
#include "../ptx_sm90.cuh"

#if defined(__x86_64__)
extern "C" void phalanx_emu_switch(void** from, void* to);
asm(R"(
.text
.globl phalanx_emu_switch
.hidden phalanx_emu_switch
phalanx_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#include <ucontext.h>
#endif

namespace emu {

const size_t STACK_BYTES = 64 << 10;
const unsigned THREADS_MAX = 1024;

struct Fiber {
  bool done;
#if defined(__x86_64__)
  void* top;
#else
  ucontext_t context;
#endif
};

struct Warp {
  Words words;
  // Lanes that have not ended, lanes that have deposited, and how often all had.
  uint32_t alive, arrived;
  unsigned generation;
  uint32_t present;
};

struct Async;

struct Block {
  Place place;
  unsigned char* shared;
  size_t shared_bytes;
  void (*body)(const void*);
  const void* args;
  unsigned current, alive, arrived, generation;
  // Grows whenever a thread could go on: a round without growth is a deadlock.
  unsigned long progress;
  // The rule that a thread broke.
  const char* broken;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks;
  std::vector<unsigned char> memory;
  // What takes effect later: emu/sm90.cc.
  std::shared_ptr<Async> async;
#if defined(__x86_64__)
  void* host;
#else
  ucontext_t host;
#endif
};

// The block whose turn it is.
static thread_local Block* block;
static const Entry* entries;

Entry::Entry(const char* name, size_t args, unsigned threads, void (*body)(const void*))
    : name(name), args(args), threads(threads), body(body), next(entries) {
  entries = this;
}

Place& place() { return block->place; }
unsigned char* shared() { return block->shared; }

static void yield() {
  Fiber& fiber = block->fibers[block->current];
#if defined(__x86_64__)
  phalanx_emu_switch(&fiber.top, block->host);
#else
  swapcontext(&fiber.context, &block->host);
#endif
}

void take_turns() {
  block->progress++;
  yield();
}

// Ends the block: nothing that its threads do from here on counts.
[[noreturn]] static void fail(const char* rule) {
  block->broken = rule;
  while (true) yield();
}

static void open_block_barrier() {
  block->arrived = 0;
  block->generation++;
  block->progress++;
}

static void open_warp_barrier(Warp& warp) {
  warp.present = warp.arrived;
  warp.arrived = 0;
  warp.generation++;
  block->progress++;
}

static void run_thread() {
  block->body(block->args);
  unsigned lane = block->current % 32;
  Warp& warp = block->warps[block->current / 32];
  block->fibers[block->current].done = true;
  block->progress++;
  // Those who wait do not wait for a thread that has ended.
  warp.alive &= ~(1u << lane);
  if (warp.alive != 0 && warp.arrived == warp.alive) open_warp_barrier(warp);
  block->alive--;
  if (block->alive != 0 && block->arrived == block->alive) open_block_barrier();
  yield();
}

void block_barrier() {
  unsigned generation = block->generation;
  if (++block->arrived == block->alive) {
    open_block_barrier();
    return;
  }
  while (block->generation == generation) yield();
}

static void warp_barrier(Warp& warp) {
  unsigned generation = warp.generation;
  warp.arrived |= 1u << block->current % 32;
  if (warp.arrived == warp.alive) {
    open_warp_barrier(warp);
    return;
  }
  while (warp.generation == generation) yield();
}

const Words& warp_deposit(const uint32_t (&words)[6], unsigned count, uint32_t& present) {
  Warp& warp = block->warps[block->current / 32];
  memcpy(warp.words[block->current % 32], words, count * sizeof words[0]);
  warp_barrier(warp);
  present = warp.present;
  return warp.words;
}

void warp_release() { warp_barrier(block->warps[block->current / 32]); }

static void make_fiber(unsigned thread) {
  Fiber& fiber = block->fibers[thread];
  char* stack = block->stacks.data() + thread * STACK_BYTES;
  fiber.done = false;
#if defined(__x86_64__)
  void** top = (void**)(((uintptr_t)stack + STACK_BYTES) & ~(uintptr_t)15);
  *--top = nullptr;
  *--top = (void*)run_thread;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
#endif
}

static void enter(unsigned thread) {
  block->current = thread;
  block->place.thread = {thread, 0, 0};
  Fiber& fiber = block->fibers[thread];
#if defined(__x86_64__)
  phalanx_emu_switch(&block->host, fiber.top);
#else
  swapcontext(&block->host, &fiber.context);
#endif
}

}  // namespace emu

#include "sm90.cc"

namespace emu {

enum { LAUNCHED = 0, UNKNOWN = 1, WRONG_ARGS = 2, WRONG_SIZE = 3, DEADLOCK = 4, BROKEN = 5 };

static void begin_block(const Entry& entry, const void* args, const uint32_t* grid, size_t shared, unsigned index) {
  unsigned threads = entry.threads;
  block->body = entry.body;
  block->args = args;
  block->fibers.resize(threads);
  block->warps.resize((threads + 31) / 32);
  if (block->stacks.size() < threads * STACK_BYTES) block->stacks.resize(threads * STACK_BYTES);
  block->memory.resize(shared + 16);
  block->shared = (unsigned char*)(((uintptr_t)block->memory.data() + 15) & ~(uintptr_t)15);
  block->shared_bytes = shared;
  memset(block->shared, 0xff, shared);
  block->place.grid = {grid[0], grid[1], grid[2]};
  block->place.block_size = {threads, 1, 1};
  block->place.block_index = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
  block->alive = threads;
  block->broken = nullptr;
  begin_async(threads);
  block->arrived = block->generation = 0;
  for (Warp& warp : block->warps) memset(&warp, 0, sizeof warp);
  for (unsigned i = 0; i < threads; i++) {
    block->warps[i / 32].alive |= 1u << i % 32;
    make_fiber(i);
  }
}

// Each thread up to where it waits.
static bool run_threads(bool backwards) {
  unsigned threads = (unsigned)block->fibers.size();
  for (unsigned i = 0; i < threads && !block->broken; i++) {
    unsigned thread = backwards ? threads - 1 - i : i;
    if (!block->fibers[thread].done) enter(thread);
  }
  return !block->broken;
}

// Runs all blocks, so many at once as may wait for each other, their threads in turn.
static int launch(const Entry& entry, const void* args, const uint32_t* grid, size_t shared, unsigned at_once) {
  if (entry.threads > THREADS_MAX || shared > 227 << 10) return WRONG_SIZE;
  static thread_local std::vector<std::unique_ptr<Block>> resident;
  while (resident.size() < at_once) resident.emplace_back(new Block());
  // Also a grid of one block runs backwards every second time.
  static thread_local unsigned count;
  std::vector<bool> runs(at_once), backwards(at_once);
  unsigned blocks = grid[0] * grid[1] * grid[2], begun = 0, running = 0;
  while (begun < blocks || running > 0) {
    bool progress = false;
    for (unsigned i = 0; i < at_once; i++) {
      block = resident[i].get();
      if (!runs[i] && begun < blocks) {
        begin_block(entry, args, grid, shared, begun++);
        backwards[i] = count++ % 2 == 1;
        runs[i] = true;
        running++;
      }
      if (!runs[i]) continue;
      unsigned long before = block->progress;
      if (!run_threads(backwards[i])) return BROKEN;
      progress |= block->progress != before;
      if (block->alive == 0) {
        runs[i] = false;
        running--;
      }
    }
    if (!progress) return DEADLOCK;
  }
  return LAUNCHED;
}

}  // namespace emu

// What a kernel expects; false if there is none of this name.
extern "C" bool phalanx_emu_find(const char* name, size_t* args_bytes, uint32_t* threads) {
  for (const emu::Entry* entry = emu::entries; entry; entry = entry->next)
    if (strcmp(entry->name, name) == 0) {
      *args_bytes = entry->args;
      *threads = entry->threads;
      return true;
    }
  return false;
}

// The rule that a kernel broke last on this thread.
extern "C" const char* phalanx_emu_broken() { return emu::block && emu::block->broken ? emu::block->broken : ""; }

// Runs a kernel to its end, so many of its blocks at once.
extern "C" int phalanx_emu_launch(const char* name, const void* args, size_t args_bytes, const uint32_t* grid,
                                  size_t shared, unsigned at_once) {
  for (const emu::Entry* entry = emu::entries; entry; entry = entry->next)
    if (strcmp(entry->name, name) == 0)
      return entry->args == args_bytes ? emu::launch(*entry, args, grid, shared, at_once) : emu::WRONG_ARGS;
  return emu::UNKNOWN;
}
