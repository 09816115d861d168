#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "race.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#endif
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

// The race detector clears what it knows about a stack with every new fiber: a small one is faster.
constexpr std::size_t kStackBytes = (race::kIsDetected ? 64 : 256) << 10, kGuardBytes = 4096;

// Stacks are kept for the next fiber, since mapping one costs more than running most kernels.
std::vector<unsigned char*>& free_stacks() {
  static std::vector<unsigned char*> stacks;
  return stacks;
}

unsigned char* take_stack() {
  if (!free_stacks().empty()) {
    unsigned char* const stack = free_stacks().back();
    free_stacks().pop_back();
    if constexpr (race::kIsDetected) {
      // Mapped anew: what the new thread does there does not race with its predecessor.
      if (mmap(stack, kStackBytes, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != stack) {
        throw std::bad_alloc();
      }
    }
    return stack;
  }
  void* const map = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<unsigned char*>(map) + kGuardBytes;
}

// Where a fiber's first frame ends. Not at the same place in the page of every stack: the
// threads of a block would share a few sets of the caches.
unsigned char* first_frame(unsigned char* stack) {
  constexpr std::size_t kPage = 4096, kStep = 11 * 64;
  static std::size_t count = 0;
  return stack + kStackBytes - count++ * kStep % kPage;
}

#if defined(__x86_64__)
// Saves the registers that a function must preserve and exchanges the stacks.
asm(R"(
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
extern "C" void emulator_switch(void** save, void* load);
#endif

}  // namespace

struct Fiber::State {
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  unsigned char* stack = nullptr;
  void* race_fiber = nullptr;
#if defined(__x86_64__)
  void* registers = nullptr;
#else
  ucontext_t registers;
#endif
#if defined(EMULATOR_ASAN)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
#endif

  static State* current;
  static State* previous;  // who switched to the current one

  // The first thing that a fiber does after a switch to it.
  static void arrive() {
#if defined(EMULATOR_ASAN)
    const void* bottom;
    std::size_t size;
    __sanitizer_finish_switch_fiber(current->fake_stack, &bottom, &size);
    if (previous->bottom == nullptr) previous->bottom = bottom, previous->size = size;
#endif
  }
  static void start() {
    arrive();
    current->body(current->context);
    __builtin_unreachable();
  }
};

Fiber::State* Fiber::State::current = nullptr;
Fiber::State* Fiber::State::previous = nullptr;

Fiber::Fiber() : state_(std::make_unique<State>()) {
  state_->race_fiber = race::current_fiber();
  State::current = state_.get();
}

Fiber::Fiber(void (*body)(void*), void* context) : state_(std::make_unique<State>()) {
  state_->body = body;
  state_->context = context;
  state_->stack = take_stack();
  state_->race_fiber = race::create_fiber();
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(state_->stack, kStackBytes);  // frames of an abandoned kernel
  state_->bottom = state_->stack;
  state_->size = kStackBytes;
#endif
#if defined(__x86_64__)
  constexpr int kSavedRegisters = 6;
  void** const top = reinterpret_cast<void**>(first_frame(state_->stack)) - 2;
  *top = reinterpret_cast<void*>(&State::start);
  state_->registers = top - kSavedRegisters;
#else
  getcontext(&state_->registers);
  state_->registers.uc_stack.ss_sp = state_->stack;
  state_->registers.uc_stack.ss_size = kStackBytes;
  state_->registers.uc_link = nullptr;
  makecontext(&state_->registers, &State::start, 0);
#endif
}

Fiber::~Fiber() {
  if (state_->stack == nullptr) return;
  race::destroy_fiber(state_->race_fiber);
  free_stacks().push_back(state_->stack);
}

void Fiber::switch_to(Fiber& other) {
  State* const from = state_.get();
  State* const to = other.state_.get();
  if (from == to) return;
  State::previous = from;
  State::current = to;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
#endif
  race::switch_to_fiber(to->race_fiber);
#if defined(__x86_64__)
  emulator_switch(&from->registers, to->registers);
#else
  swapcontext(&from->registers, &to->registers);
#endif
  State::arrive();
}

}  // namespace emulator
