#include "normcore/settings.h"

#include <atomic>

namespace normcore {
namespace {

std::atomic<bool> is_batch_invariant{false}, is_sync_debugged{false};

}  // namespace

void set_batch_invariant(bool enabled) { is_batch_invariant = enabled; }
bool batch_invariant() { return is_batch_invariant; }

void set_debug_sync(bool enabled) { is_sync_debugged = enabled; }
bool debug_sync() { return is_sync_debugged; }

}  // namespace normcore
