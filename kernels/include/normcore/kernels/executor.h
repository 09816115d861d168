// How a CPU kernel runs in parallel: a parallel_for given by the caller (at::parallel_for in the
// torch layer, loops of any order and width in tests). Kernels give bit-identical results for every
// executor.
#pragma once

#include <cstdint>
#include <type_traits>

namespace normcore::kernels {

struct CpuExecutor {
  using Body = void (*)(void* body_context, std::int64_t begin, std::int64_t end);
  // Calls body on disjoint ranges that cover [0, count); ranges smaller than `grain` are not worth
  // a thread.
  using ParallelFor = void (*)(void* context, std::int64_t count, std::int64_t grain, Body body,
                               void* body_context);

  void* context = nullptr;
  ParallelFor run = nullptr;
  int num_threads = 1;

  template <class F>
  void parallel_for(std::int64_t count, std::int64_t grain, F&& body) const {
    if (count <= 0) return;
    using Fn = std::remove_reference_t<F>;
    run(
        context, count, grain,
        [](void* fn, std::int64_t begin, std::int64_t end) { (*static_cast<Fn*>(fn))(begin, end); },
        const_cast<std::remove_const_t<Fn>*>(&body));
  }
};

}  // namespace normcore::kernels
