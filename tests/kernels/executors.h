// Executors that a kernel must not be able to tell apart: they cut the range into pieces of any
// size, run the pieces in any order, and report any number of threads to the plan.
//   serial     one piece
//   reversed   single elements from the last to the first
//   shuffled   pieces of random lengths in random order
//   threads    one std::thread per piece
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "normcore/kernels/executor.h"

namespace normcore::kernels::testing {

struct NamedExecutor {
  std::string name;
  CpuExecutor executor;
};

namespace executor_detail {

using Body = CpuExecutor::Body;

inline void serial(void*, std::int64_t count, std::int64_t, Body body, void* context) {
  body(context, 0, count);
}

inline void reversed(void*, std::int64_t count, std::int64_t, Body body, void* context) {
  for (std::int64_t i = count; i-- > 0;) body(context, i, i + 1);
}

inline void shuffled(void*, std::int64_t count, std::int64_t, Body body, void* context) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::vector<std::pair<std::int64_t, std::int64_t>> pieces;
  for (std::int64_t begin = 0; begin < count;) {
    const std::int64_t end = std::min<std::int64_t>(count, begin + 1 + random() % (1 + count / 5));
    pieces.emplace_back(begin, end);
    begin = end;
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  for (const auto& [begin, end] : pieces) body(context, begin, end);
}

template <int kThreads>
void threads(void*, std::int64_t count, std::int64_t, Body body, void* context) {
  std::vector<std::thread> workers;
  const std::int64_t piece = (count + kThreads - 1) / kThreads;
  for (std::int64_t begin = 0; begin < count; begin += piece) {
    workers.emplace_back(body, context, begin, std::min(count, begin + piece));
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace executor_detail

inline CpuExecutor serial_executor() { return {nullptr, &executor_detail::serial, 1}; }

inline CpuExecutor thread_executor() { return {nullptr, &executor_detail::threads<8>, 8}; }

// All but the serial one.
inline std::vector<NamedExecutor> other_executors() {
  return {{"serial, 8 threads claimed", {nullptr, &executor_detail::serial, 8}},
          {"reversed, 2 threads claimed", {nullptr, &executor_detail::reversed, 2}},
          {"shuffled, 3 threads claimed", {nullptr, &executor_detail::shuffled, 3}},
          {"shuffled, 64 threads claimed", {nullptr, &executor_detail::shuffled, 64}},
          {"3 threads", {nullptr, &executor_detail::threads<3>, 3}}};
}

}  // namespace normcore::kernels::testing
