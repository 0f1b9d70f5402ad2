#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace emulator {

ThreadContext* context = nullptr;

namespace {

constexpr size_t kStackBytes = 64 * 1024;

struct PendingCopy {
  char* destination;
  const char* source;
  int bytes, source_bytes, group;
  const void* instruction;
};

struct Fiber {
  void* stack_pointer;
  char* stack_begin;
  ThreadContext thread;
  unsigned id, warp, lane, block;
  bool done;
  const char* waits_at;
  int line;
  int committed_groups;
  std::deque<PendingCopy> copies;
  uint32_t grid_epoch, block_epoch, warp_epoch;
};

struct Warp {
  unsigned ready_count, arrived;
  uint8_t ready[32];
  void* arguments[32];
  const void* kind;
  const char* what;
  uint64_t priority;
};

struct Block {
  unsigned arrived, live;
  const char* file;
  int line;
};

struct Machine {
  std::mt19937_64 random;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<unsigned> ready_warps;
  unsigned threads_per_block, live, grid_arrived;
  const char* grid_file;
  int grid_line;
  bool cooperative, running = false;
  const std::function<void()>* kernel;
  std::string error;
} machine;

Fiber* current = nullptr;
void* scheduler_stack;
const void* copy_instruction = nullptr;  // whose delivery runs now, for faults inside memcpy
sigjmp_buf fault_jump;
std::vector<char*> stack_tops;

std::string describe_current() { return describe_thread(current->id, machine.threads_per_block); }

void make_ready(Fiber& fiber) {
  Warp& warp = machine.warps[fiber.warp];
  if (!warp.ready_count) machine.ready_warps.push_back(fiber.warp);
  warp.ready[warp.ready_count++] = fiber.lane;
}

void wait_here(const char* where, int line) {
  current->waits_at = where;
  current->line = line;
  switch_stack(&current->stack_pointer, scheduler_stack);
}

void run_fiber() {
  (*machine.kernel)();
  if (!current->copies.empty()) {
    fail("cp.async still in flight when " + describe_current() + " exits; issued at " +
         describe_instruction(current->copies.front().instruction));
  }
  current->done = true;
  Block& block = machine.blocks[current->block];
  if (block.arrived || machine.grid_arrived) {
    const bool in_block = block.arrived != 0;
    fail("barrier divergence: " + describe_current() + " exits while others wait at " +
         (in_block ? block.file : machine.grid_file) + ":" +
         std::to_string(in_block ? block.line : machine.grid_line));
  }
  --block.live;
  --machine.live;
  switch_stack(&current->stack_pointer, scheduler_stack);
  std::abort();
}

Fiber& pick_next() {
  auto& ready = machine.ready_warps;
  const Policy policy = options().policy;
  size_t chosen = 0;
  switch (policy) {
    case Policy::kLinear:
      chosen = std::min_element(ready.begin(), ready.end()) - ready.begin();
      break;
    case Policy::kReverse:
      chosen = std::max_element(ready.begin(), ready.end()) - ready.begin();
      break;
    case Policy::kRandom:
      chosen = machine.random() % ready.size();
      break;
    case Policy::kPriorities:
      for (size_t i = 1; i < ready.size(); ++i) {
        if (machine.warps[ready[i]].priority > machine.warps[ready[chosen]].priority) chosen = i;
      }
      if (machine.random() % 256 == 0) machine.warps[ready[chosen]].priority = machine.random();
  }
  const unsigned id = ready[chosen];
  Warp& warp = machine.warps[id];
  uint8_t* const end = warp.ready + warp.ready_count;
  unsigned k = 0;
  if (policy == Policy::kLinear) {
    k = std::min_element(warp.ready, end) - warp.ready;
  } else if (policy == Policy::kReverse) {
    k = std::max_element(warp.ready, end) - warp.ready;
  } else {
    k = machine.random() % warp.ready_count;
  }
  const unsigned lane = warp.ready[k];
  warp.ready[k] = warp.ready[--warp.ready_count];
  if (!warp.ready_count) {
    ready[chosen] = ready.back();
    ready.pop_back();
  }
  return machine.fibers[id * 32 + lane];
}

std::string describe_deadlock() {
  std::map<std::string, int> waiting;
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.done) continue;
    ++waiting["block " + std::to_string(fiber.block) + " at " + fiber.waits_at + ":" +
              std::to_string(fiber.line)];
  }
  std::string text = "deadlock: not all threads reach the same barrier; waiting:";
  int shown = 0;
  for (const auto& [where, count] : waiting) {
    if (shown++ == 12) return text + "\n  ...";
    text += "\n  " + std::to_string(count) + " threads of " + where;
  }
  return text;
}

void on_fault(int, siginfo_t* info, void* state) {
  if (!machine.running || !current) {
    signal(SIGSEGV, SIG_DFL);
    raise(SIGSEGV);
    return;
  }
  const void* instruction = copy_instruction;
  if (!instruction) {
    const auto* user = static_cast<ucontext_t*>(state);
    // describe_instruction() expects a return address, one past the faulting instruction
    instruction = reinterpret_cast<char*>(user->uc_mcontext.gregs[REG_RIP]) + 1;
  }
  machine.error = "memory fault at " + describe_address(static_cast<char*>(info->si_addr)) +
                  " by " + describe_current() + " at " + describe_instruction(instruction);
  siglongjmp(fault_jump, 1);
}

void install_fault_handler() {
  static char alternate_stack[256 * 1024];
  stack_t stack{};
  stack.ss_sp = alternate_stack;
  stack.ss_size = sizeof alternate_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

void deliver(const PendingCopy& copy) {
  copy_instruction = copy.instruction;
  memcpy(copy.destination, copy.source, copy.source_bytes);
  memset(copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy_instruction = nullptr;
}

}  // namespace

Options& options() {
  static Options current_options;
  return current_options;
}

Statistics& statistics() {
  static Statistics totals;
  return totals;
}

int& cooperative_limit() {
  static int limit = 0;
  return limit;
}

void fail(const std::string& message) {
  machine.error = message;
  switch_stack(&current->stack_pointer, scheduler_stack);
  std::abort();
}

/// An access by the running fiber; its own stack is private and not recorded.
void on_access(const void* address, size_t bytes, bool write, const void* instruction) {
  if (!machine.running || !current || !options().detect_races) return;
  const char* p = static_cast<const char*>(address);
  if (size_t(p - current->stack_begin) < kStackBytes) return;
  const Accessor who{
      current->id,         current->warp,        current->block,     machine.threads_per_block,
      current->grid_epoch, current->block_epoch, current->warp_epoch};
  if (record_access(who, p, bytes, write, instruction)) ++statistics().accesses;
}

/// Device code must access memory at natural alignment.
void on_aligned_access(const void* address, size_t bytes, bool write, const void* instruction) {
  const bool misaligned = reinterpret_cast<uintptr_t>(address) % bytes != 0;
  if (misaligned && machine.running && current && is_buffer_memory(address)) {
    fail("misaligned " + std::to_string(bytes) + "-byte " + (write ? "write to " : "read of ") +
         describe_address(static_cast<const char*>(address)) + " by " + describe_current() +
         " at " + describe_instruction(instruction));
  }
  on_access(address, bytes, write, instruction);
}

void touch(const void* address, size_t bytes, bool write) {
  on_access(address, bytes, write, __builtin_return_address(0));
}

void block_barrier(const char* file, int line) {
  Block& block = machine.blocks[current->block];
  if (block.live != machine.threads_per_block) {
    fail("barrier divergence: " + describe_current() + " is at __syncthreads, " + file + ":" +
         std::to_string(line) + ", after a thread of its block has exited");
  }
  if (!block.arrived) {
    block.file = file;
    block.line = line;
  } else if (block.line != line || strcmp(block.file, file) != 0) {
    fail("barrier divergence: " + describe_current() + " is at " + file + ":" +
         std::to_string(line) + ", others of its block at " + block.file + ":" +
         std::to_string(block.line));
  }
  ++current->block_epoch;
  ++current->warp_epoch;
  if (++block.arrived < block.live) return wait_here(file, line);
  block.arrived = 0;
  ++statistics().barriers;
  for (unsigned t = 0; t < machine.threads_per_block; ++t) {
    Fiber& fiber = machine.fibers[current->block * machine.threads_per_block + t];
    if (&fiber != current) make_ready(fiber);
  }
}

void grid_barrier(const char* file, int line) {
  const std::string here = std::string(file) + ":" + std::to_string(line);
  if (!machine.cooperative) fail("grid sync in a launch that is not cooperative, at " + here);
  if (machine.live != machine.fibers.size()) {
    fail("barrier divergence: " + describe_current() + " is at a grid sync, " + here +
         ", after a thread has exited");
  }
  if (!machine.grid_arrived) {
    machine.grid_file = file;
    machine.grid_line = line;
  } else if (machine.grid_line != line || strcmp(machine.grid_file, file) != 0) {
    fail("barrier divergence: " + describe_current() + " is at " + here + ", others at " +
         machine.grid_file + ":" + std::to_string(machine.grid_line));
  }
  ++current->grid_epoch;
  ++current->block_epoch;
  ++current->warp_epoch;
  if (++machine.grid_arrived < machine.live) return wait_here(file, line);
  machine.grid_arrived = 0;
  ++statistics().grid_syncs;
  for (Fiber& fiber : machine.fibers) {
    if (&fiber != current) make_ready(fiber);
  }
}

void warp_collective(const void* kind, const char* what, bool orders_memory, void* argument,
                     WarpFunction function) {
  Warp& warp = machine.warps[current->warp];
  if (!warp.arrived) {
    warp.kind = kind;
    warp.what = what;
  } else if (warp.kind != kind) {
    fail("warp divergence: " + describe_current() + " is at " + what + ", its warp at " +
         warp.what);
  }
  warp.arguments[current->lane] = argument;
  if (orders_memory) ++current->warp_epoch;
  if (++warp.arrived < 32) return wait_here(what, 0);
  warp.arrived = 0;
  ++statistics().warp_operations;
  function(warp.arguments);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lane != current->lane) make_ready(machine.fibers[current->warp * 32 + lane]);
  }
}

void copy_async(void* destination, const void* source, int bytes, int source_bytes) {
  const void* instruction = __builtin_return_address(0);
  const bool bad_source = source_bytes && reinterpret_cast<uintptr_t>(source) % bytes;
  if (reinterpret_cast<uintptr_t>(destination) % bytes || bad_source) {
    fail("cp.async: misaligned address by " + describe_current() + " at " +
         describe_instruction(instruction));
  }
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async: bad source size");
  const PendingCopy copy{static_cast<char*>(destination),
                         static_cast<const char*>(source),
                         bytes,
                         source_bytes,
                         current->committed_groups,
                         instruction};
  ++statistics().copies;
  // A copy may happen at any time between its issue and the wait: both ends are recorded.
  if (source_bytes) on_access(source, source_bytes, false, instruction);
  on_access(destination, bytes, true, instruction);
  const Delivery delivery = options().delivery;
  if (delivery == Delivery::kEarly ||
      (delivery == Delivery::kRandom && machine.random() % 2 == 0)) {
    return deliver(copy);
  }
  memset(destination, 0xFF, bytes);  // in flight: the old contents are gone, the new not there
  current->copies.push_back(copy);
}

void copy_async_commit() { ++current->committed_groups; }

void copy_async_wait(int pending_groups) {
  auto& copies = current->copies;
  while (!copies.empty() && copies.front().group < current->committed_groups - pending_groups) {
    const PendingCopy copy = copies.front();
    copies.pop_front();
    deliver(copy);
    if (copy.source_bytes) on_access(copy.source, copy.source_bytes, false, copy.instruction);
    on_access(copy.destination, copy.bytes, true, copy.instruction);
  }
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel) {
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) {
    throw Error("only one-dimensional grids and blocks are emulated");
  }
  const unsigned blocks = grid.x, threads = block.x;
  if (threads % 32 || !threads || threads > 1024) {
    throw Error("the block size must be a multiple of 32, at most 1024");
  }
  if (!blocks) throw Error("a grid of 0 blocks is a launch error on the device");
  static const bool installed = (install_fault_handler(), true);
  (void)installed;
  while (stack_tops.size() < size_t(blocks) * threads) {
    char* stack = map_pages(kStackBytes + kPage);
    mprotect(stack, kPage, PROT_NONE);
    stack_tops.push_back(stack + kPage + kStackBytes);
  }
  std::vector<std::unique_ptr<Buffer>> shared;
  for (unsigned i = 0; i < blocks; ++i) {
    shared.emplace_back(new Buffer("shared memory of block " + std::to_string(i),
                                   (shared_bytes + 127) / 128 * 128, 128, true, false));
  }
  start_access_record(options().detect_races);

  Machine& m = machine;
  m.random.seed(options().seed);
  m.kernel = &kernel;
  m.error.clear();
  m.threads_per_block = threads;
  m.live = blocks * threads;
  m.grid_arrived = 0;
  m.cooperative = cooperative;
  m.warps.assign(m.live / 32, Warp{});
  m.blocks.assign(blocks, Block{0, threads, nullptr, 0});
  m.ready_warps.clear();
  m.fibers.clear();
  m.fibers.resize(m.live);
  for (Warp& warp : m.warps) warp.priority = m.random();
  for (unsigned i = 0; i < m.live; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.id = i;
    fiber.block = i / threads;
    fiber.warp = i / 32;
    fiber.lane = i % 32;
    fiber.waits_at = "start";
    fiber.thread = {{i % threads, 0, 0},
                    {fiber.block, 0, 0},
                    block,
                    grid,
                    static_cast<unsigned char*>(shared[fiber.block]->data())};
    fiber.stack_begin = stack_tops[i] - kStackBytes;
    fiber.stack_pointer = fresh_stack(stack_tops[i], run_fiber);
    make_ready(fiber);
  }
  ++statistics().launches;
  statistics().shared_bytes = shared_bytes;
  m.running = true;
  if (sigsetjmp(fault_jump, 1) == 0) {
    while (m.live && m.error.empty()) {
      if (m.ready_warps.empty()) {
        m.error = describe_deadlock();
        break;
      }
      current = &pick_next();
      context = &current->thread;
      ++statistics().switches;
      switch_stack(&scheduler_stack, current->stack_pointer);
    }
  }
  m.running = false;
  current = nullptr;
  context = nullptr;
  copy_instruction = nullptr;
  for (const auto& buffer : shared) {
    if (m.error.empty() && !buffer->slack_intact()) m.error = "stray write next to shared memory";
  }
  if (!m.error.empty()) throw Error(m.error);
}

}  // namespace emulator
