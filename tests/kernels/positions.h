// Addressing of a norm's input by (n, c, s), for code that checks results element by element.
#pragma once

#include <cstdint>

#include "normcore/kernels/norm_input.h"

namespace normcore::kernels::testing {

inline std::int64_t index_of(const Extent& extent, Layout layout, std::int64_t n, std::int64_t c,
                             std::int64_t s) {
  return layout == Layout::kNCS ? (n * extent.c + c) * extent.s + s
                                : (n * extent.s + s) * extent.c + c;
}

// The slice of channel c of sample n; num_groups = 0 is batch norm.
inline std::int64_t slice_of(const Extent& extent, std::int64_t num_groups, std::int64_t n,
                             std::int64_t c) {
  return num_groups == 0 ? c : n * num_groups + c / (extent.c / num_groups);
}

inline bool counts(const NormInput& input, std::int64_t n, std::int64_t c, std::int64_t s) {
  switch (input.mask.kind) {
    case MaskKind::kNone:
      return true;
    case MaskKind::kRow:
      return input.mask.data[n * input.extent.s + s] != 0;
    case MaskKind::kElement:
      return input.mask.data[index_of(input.extent, input.layout, n, c, s)] != 0;
  }
  return true;
}

// Calls body(n, c, s) for every position.
template <class Body>
void for_each_position(const Extent& extent, Body body) {
  for (std::int64_t n = 0; n < extent.n; ++n) {
    for (std::int64_t c = 0; c < extent.c; ++c) {
      for (std::int64_t s = 0; s < extent.s; ++s) body(n, c, s);
    }
  }
}

}  // namespace normcore::kernels::testing
