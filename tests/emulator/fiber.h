// Stackful coroutines on one host thread: a stack with a guard page, and a switch that AddressSanitizer
// and ThreadSanitizer know about. Internal to the emulator.
#pragma once

#include <cstddef>
#include <memory>

namespace emulator {

class Fiber {
 public:
  // The code that calls: every program has one, made first.
  Fiber();
  // Runs body(context) from its first switch on; the body never returns.
  Fiber(void (*body)(void*), void* context);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From this fiber, which runs, to the other one.
  void switch_to(Fiber& other);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace emulator
