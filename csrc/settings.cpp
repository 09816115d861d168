#include "normcore/settings.h"

#include <atomic>

namespace normcore {
namespace {

std::atomic<bool> is_batch_invariant{false};

}  // namespace

void set_batch_invariant(bool enabled) { is_batch_invariant = enabled; }
bool batch_invariant() { return is_batch_invariant; }

}  // namespace normcore
