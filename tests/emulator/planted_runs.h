// Runs the kernels of planted_bugs.h on values whose sum shows any other order of additions.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "planted_bugs.h"

namespace normcore::kernels::testing {

inline constexpr int kSize = 1000, kBlocks = 6, kCluster = 4;

inline std::vector<float> input() {
  std::vector<float> x(kSize + 1, std::numeric_limits<float>::quiet_NaN());  // one past the end
  // Of many magnitudes: another order of additions has another rounding.
  for (int i = 0; i < kSize; ++i) {
    x[static_cast<std::size_t>(i)] =
        0.1f * static_cast<float>(i % 37) * static_cast<float>(1 << (i % 13));
  }
  return x;
}

using Result = std::vector<float>;

inline Result run_block_sum(Bug bug) {
  Result sum(1, -1.0f);
  block_sum(input().data(), kSize, sum.data(), bug);
  return sum;
}

inline Result run_exchange_sum(Bug bug) {
  Result sum(1, -1.0f);
  exchange_sum(input().data(), kSize, sum.data(), bug);
  return sum;
}

// Twice: a ticket that is not reset shows in the second launch.
inline Result run_ticket_sum(Bug bug) {
  Result result;
  std::vector<double> partials(kBlocks, std::numeric_limits<double>::quiet_NaN());
  unsigned ticket = 0;
  for (int launch = 0; launch < 2; ++launch) {
    float sum = -1.0f;
    ticket_sum(input().data(), kSize, kBlocks, partials.data(), &ticket, &sum, bug);
    result.push_back(sum);
    partials.assign(kBlocks, std::numeric_limits<double>::quiet_NaN());
  }
  return result;
}

inline Result run_cluster_sum(Bug bug) {
  Result sums(kCluster, -1.0f);
  cluster_sum(input().data(), kSize, sums.data(), bug);
  return sums;
}

inline Result run_team_sum(Bug bug) {
  Result sums(kBlocks, -1.0f);
  std::vector<double> partials(kBlocks, std::numeric_limits<double>::quiet_NaN());
  unsigned counter = 0;
  team_sum(input().data(), kSize, kBlocks, partials.data(), &counter, sums.data(), bug);
  return sums;
}

using Kernel = Result (*)(Bug);

inline constexpr Kernel kAllKernels[] = {run_block_sum, run_exchange_sum, run_ticket_sum,
                                         run_cluster_sum, run_team_sum};
inline constexpr std::pair<Kernel, Bug> kRacesOnly[] = {
    {run_exchange_sum, Bug::kShuffleForBarrier}, {run_exchange_sum, Bug::kOverwritesTooEarly},
    {run_ticket_sum, Bug::kTicketRelaxed},       {run_ticket_sum, Bug::kTicketReleaseOnly},
    {run_cluster_sum, Bug::kArrivesTooEarly},
};

}  // namespace normcore::kernels::testing
