// What ThreadSanitizer is told in the build that looks for races: every CUDA thread is one of its
// fibers, switches between them order nothing, and what orders is named by acquire() and release();
// the kernels' atomics it sees by itself. The emulator is compiled without the sanitizer. In other
// builds nothing here does anything. Internal to the emulator.
#pragma once

extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace emulator::race {

inline constexpr bool kIsDetected = EMULATOR_DETECTS_RACES != 0;
// With more live threads the sanitizer's runtime runs out of slots and overlooks races.
inline constexpr unsigned kMaxThreads = 255;

// What was released at an address so far is ordered before what follows an acquire there.
inline void acquire([[maybe_unused]] void* address) {
  if constexpr (kIsDetected) __tsan_acquire(address);
}
inline void release([[maybe_unused]] void* address) {
  if constexpr (kIsDetected) __tsan_release(address);
}

// In its scope accesses of the current fiber are the emulator's own, not the kernel's: those of
// library functions, which the sanitizer intercepts.
class Unseen {
 public:
  Unseen() {
    if constexpr (kIsDetected) {
      AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
      AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
  }
  ~Unseen() {
    if constexpr (kIsDetected) {
      AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
      AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

inline void* current_fiber() {
  if constexpr (kIsDetected) return __tsan_get_current_fiber();
  return nullptr;
}
// Ordered after what its creator did so far.
inline void* create_fiber() {
  if constexpr (kIsDetected) return __tsan_create_fiber(0);
  return nullptr;
}
inline void destroy_fiber([[maybe_unused]] void* fiber) {
  if constexpr (kIsDetected) __tsan_destroy_fiber(fiber);
}
// Right before the switch itself.
inline void switch_to_fiber([[maybe_unused]] void* fiber) {
  constexpr unsigned kNoSync = 1;
  if constexpr (kIsDetected) __tsan_switch_to_fiber(fiber, kNoSync);
}

}  // namespace emulator::race
