// Blocks, barriers, warps and shared memory of a launch, and the order in which its threads run.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "race.h"
#include "shared_array.h"

namespace emulator {
namespace {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024, kMaxCluster = 16;

// What a thread waits for.
enum class Wait : std::uint8_t { kNothing, kPause, kBlock, kCluster, kWarp };

// What the lanes of a warp do together.
struct WarpCall {
  WarpOperation operation{};
  unsigned mask = 0;
  int line = 0;
  bool operator==(const WarpCall&) const = default;
};

struct Block;

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Block* block = nullptr;
  uint3 index{};
  unsigned linear = 0;
  Wait wait = Wait::kNothing;
  Site site{};
  WarpCall call;
  bool is_done = false;
  unsigned cluster_arrived = 0, cluster_waited = 0;
  std::vector<std::function<void()>> copies;  // that it has to wait for
};

struct Barrier {
  unsigned arrived = 0, expected = 0, generation = 0;
  int count = 0, result = 0;
  Site site{};
  // For the race detector, in turns: an arrival at the next barrier is not yet ordered before a
  // thread that has not left this one.
  char tags[2];
  char* tag(unsigned of_generation) { return &tags[of_generation % 2]; }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live_blocks = 0;
};

struct Warp {
  unsigned present = 0, waiting = 0;
  std::optional<WarpCall> call;  // of all lanes that wait, if it is the same
  std::uint64_t values[kWarpSize];
  int arguments[kWarpSize];
  char arrivals[kWarpSize], departures[kWarpSize];  // of a lane, for the race detector
};

struct Block {
  uint3 index{};
  unsigned rank = 0, live_threads = 0;
  Cluster* cluster = nullptr;
  Barrier barrier;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::map<const void*, SharedArray> shared;
  std::size_t static_shared = 0;  // bytes that its threads have asked for so far
};

std::string to_string(Site site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string to_string(const Thread& thread) {
  std::ostringstream text;
  text << "block (" << thread.block->index.x << "," << thread.block->index.y << ") thread ("
       << thread.index.x << "," << thread.index.y << ")";
  return text.str();
}

const char* to_string(Wait wait) {
  constexpr const char* kNames[] = {"runs", "pause", "__syncthreads", "cluster barrier",
                                    "warp operation"};
  return kNames[static_cast<int>(wait)];
}

bool is_same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

Schedule schedule = in_order();

class Grid {
 public:
  Grid(const Launch& launch, const std::function<void()>& kernel)
      : launch_(launch),
        kernel_(kernel),
        threads_(launch.block.x * launch.block.y * launch.block.z),
        random_(schedule.seed()) {}

  void run() {
    const unsigned blocks = launch_.grid.x * launch_.grid.y * launch_.grid.z;
    if (blocks == 0 || threads_ == 0 || threads_ > kMaxThreads || launch_.cluster > kMaxCluster ||
        launch_.grid.x % launch_.cluster != 0) {
      throw Error("invalid launch configuration");
    }
    if (const std::string excess = excess_of_shared(launch_, 0); !excess.empty())
      throw Error(excess);
    blockDim = launch_.block;
    gridDim = launch_.grid;
    const std::vector<unsigned> order = order_of(blocks / launch_.cluster);
    const std::size_t window = launch_.cooperative ? order.size() : window_of_schedule();
    std::size_t started = 0;
    race::release(&begin_);
    while (error_.empty() && (started < order.size() || !clusters_.empty())) {
      while (started < order.size() && clusters_.size() < window) add_cluster(order[started++]);
      if (Thread* const thread = next()) {
        resume(main_, *thread);
      } else if (error_.empty()) {
        error_ = describe_deadlock();
      }
      // Not ordered before the blocks to come, hence no acquire.
      std::erase_if(clusters_, [](const auto& cluster) { return cluster->live_blocks == 0; });
    }
    if (!error_.empty()) stop();
    race::acquire(&end_);
  }

  Thread& current() { return *current_; }
  const Launch& launch() const { return launch_; }

  void yield() {
    idle_rounds_ = 0;
    if (schedule.is_in_order()) return;
    ready_.push_back(current_);
    leave();
  }

  void pause(Site site) {
    current_->wait = Wait::kPause;
    current_->site = site;
    polling_.push_back(current_);
    leave();
    current_->wait = Wait::kNothing;
  }

  int meet(Barrier& barrier, Wait wait, int predicate, Site site) {
    char* const tag = barrier.tag(barrier.generation);
    barrier.count += predicate;
    if (arrive(barrier, wait, site)) {
      yield();
    } else {
      suspend(wait, site);
    }
    race::acquire(tag);
    return barrier.result;
  }

  void cluster_arrive(Site site) {
    Thread& thread = *current_;
    if (thread.cluster_arrived != thread.cluster_waited) {
      fail("cluster arrive twice at " + to_string(site));
    }
    ++thread.cluster_arrived;
    arrive(thread.block->cluster->barrier, Wait::kCluster, site);
  }

  void cluster_wait(Site site) {
    Thread& thread = *current_;
    if (thread.cluster_arrived != thread.cluster_waited + 1) {
      fail("cluster wait without arrive at " + to_string(site));
    }
    Barrier& barrier = thread.block->cluster->barrier;
    char* const tag = barrier.tag(thread.cluster_waited++);
    if (barrier.generation < thread.cluster_waited) {
      suspend(Wait::kCluster, site);
    } else {
      yield();
    }
    race::acquire(tag);
  }

  std::uint64_t meet_in_warp(WarpOperation operation, unsigned mask, std::uint64_t value,
                             int argument, Combine combine, Site site) {
    Thread& self = *current_;
    Warp& warp = self.block->warps[self.linear / kWarpSize];
    const unsigned lane = self.linear % kWarpSize, bit = 1u << lane;
    const auto lane_thread = [&](unsigned i) -> Thread& {
      return *self.block->threads[self.linear / kWarpSize * kWarpSize + i];
    };
    if ((mask & bit) == 0) {
      fail("lane " + std::to_string(lane) + " is not in its own mask at " + to_string(site));
    }
    if ((mask & ~warp.present) != 0) {
      fail("the mask names lanes that exited or never were, at " + to_string(site) + ", " +
           to_string(self));
    }
    const unsigned others = warp.waiting & mask;
    const WarpCall call{operation, mask, site.line};
    for (unsigned rest = warp.call == call ? 0 : others; rest != 0; rest &= rest - 1) {
      const Thread& other = lane_thread(static_cast<unsigned>(std::countr_zero(rest)));
      if (other.call == call) continue;
      fail("divergent warp: " + to_string(self) + " at " + to_string(site) + ", " +
           to_string(other) + " at " + to_string(other.site));
    }
    warp.values[lane] = value;
    warp.arguments[lane] = argument;
    // As on a device, shuffles and votes order nothing.
    const bool orders = operation == WarpOperation::kSync;
    if (orders) race::release(&warp.arrivals[lane]);
    if ((others | bit) == mask) {
      combine(warp.values, warp.arguments, mask);
      warp.waiting &= ~mask;
      if (orders) order_lanes(warp, mask);
      for (unsigned rest = others; rest != 0; rest &= rest - 1) {
        make_ready(lane_thread(static_cast<unsigned>(std::countr_zero(rest))));
      }
    } else {
      if (warp.waiting == 0) {
        warp.call = call;
      } else if (warp.call != call) {
        warp.call.reset();
      }
      warp.waiting |= bit;
      self.call = call;
      suspend(Wait::kWarp, site);
    }
    if (orders) race::acquire(&warp.departures[lane]);
    return warp.values[lane];
  }

  // Ends the launch; the thread never runs again.
  [[noreturn]] void fail(const std::string& what) {
    if (error_.empty()) error_ = what;
    current_->fiber->switch_to(main_);
    __builtin_unreachable();
  }

 private:
  [[noreturn]] void stop() const {
    // The race detector would take an abandoned launch for many races.
    if constexpr (race::kIsDetected) {
      std::fprintf(stderr, "emulator: %s\n", error_.c_str());
      std::abort();
    }
    throw Error(error_);
  }

  unsigned window_of_schedule() const {
    const unsigned window = schedule.window();
    if constexpr (race::kIsDetected) {
      return std::clamp(race::kMaxThreads / (threads_ * launch_.cluster), 1u, window);
    }
    return window;
  }

  // By the last lane to arrive, for all of them.
  static void order_lanes(Warp& warp, unsigned mask) {
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      race::acquire(&warp.arrivals[std::countr_zero(rest)]);
    }
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      race::release(&warp.departures[std::countr_zero(rest)]);
    }
  }

  std::uint64_t random_bits() {  // splitmix64
    random_ += 0x9e3779b97f4a7c15;
    std::uint64_t z = random_;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }

  std::vector<unsigned> order_of(unsigned count) {
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) order[i] = schedule.is_reversed() ? count - 1 - i : i;
    if (schedule.is_in_order() || schedule.is_reversed()) return order;
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
    return order;
  }

  void add_cluster(unsigned cluster_index) {
    auto cluster = std::make_unique<Cluster>();
    cluster->live_blocks = launch_.cluster;
    cluster->barrier.expected = launch_.cluster * threads_;
    const dim3 grid = launch_.grid, block_size = launch_.block;
    for (unsigned rank = 0; rank < launch_.cluster; ++rank) {
      auto block = std::make_unique<Block>();
      const unsigned i = cluster_index * launch_.cluster + rank;
      block->index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
      block->rank = rank;
      block->cluster = cluster.get();
      block->live_threads = block->barrier.expected = threads_;
      block->warps.resize((threads_ + kWarpSize - 1) / kWarpSize);
      for (unsigned t = 0; t < threads_; ++t) {
        auto thread = std::make_unique<Thread>();
        thread->fiber = std::make_unique<Fiber>(&Grid::start_thread, this);
        thread->block = block.get();
        thread->linear = t;
        thread->index = {t % block_size.x, t / block_size.x % block_size.y,
                         t / (block_size.x * block_size.y)};
        block->warps[t / kWarpSize].present |= 1u << t % kWarpSize;
        ready_.push_back(thread.get());
        block->threads.push_back(std::move(thread));
      }
      cluster->blocks.push_back(std::move(block));
    }
    clusters_.push_back(std::move(cluster));
  }

  static void start_thread(void* context) {
    Grid& grid = *static_cast<Grid*>(context);
    race::acquire(&grid.begin_);
    grid.kernel_();
    race::release(&grid.end_);
    grid.finish_thread();
  }

  [[noreturn]] void finish_thread() {
    Thread& thread = *current_;
    if (Thread* const successor = retire(thread)) {
      resume(*thread.fiber, *successor);
    } else {
      thread.fiber->switch_to(main_);
    }
    __builtin_unreachable();
  }

  // The thread that runs after the last instruction of this one. Null: the main fiber, which starts
  // and deletes blocks.
  Thread* retire(Thread& thread) {
    const race::Unseen unseen;
    Block& block = *thread.block;
    thread.is_done = true;
    idle_rounds_ = 0;
    block.warps[thread.linear / kWarpSize].present &= ~(1u << thread.linear % kWarpSize);
    if (!thread.copies.empty()) fail(to_string(thread) + " left without waiting for its copies");
    if (block.barrier.arrived != 0) {
      fail("a thread left while others of its block wait at __syncthreads " +
           to_string(block.barrier.site));
    }
    --block.barrier.expected;
    if (--block.live_threads == 0) {
      for (auto& [key, array] : block.shared) {
        if (!array.is_intact()) fail("write outside of shared memory, " + to_string(thread));
        array.clear();
      }
      --block.cluster->live_blocks;
    }
    return block.cluster->live_blocks == 0 ? nullptr : next();
  }

  // Who runs next: the ready ones, then those that poll, of which two rounds without an event in
  // between will never see one.
  Thread* next() {
    constexpr unsigned kIdleRounds = 2;
    if (head_ == ready_.size()) {
      ready_.clear();
      head_ = 0;
      if (polling_.empty() || ++idle_rounds_ > kIdleRounds) return nullptr;
      ready_.swap(polling_);
    }
    std::size_t pick = head_;
    if (schedule.is_reversed()) {
      pick = ready_.size() - 1;
    } else if (!schedule.is_in_order()) {
      pick = head_ + random_bits() % (ready_.size() - head_);
    }
    Thread* const thread = ready_[pick];
    if (schedule.is_in_order()) {
      ++head_;
    } else {
      ready_[pick] = ready_.back();
      ready_.pop_back();
    }
    return thread;
  }

  void resume(Fiber& from, Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    from.switch_to(*thread.fiber);
  }

  // To whoever runs next; comes back when it is this thread's turn again.
  void leave() {
    Thread* const self = current_;
    Thread* const thread = next();
    if (thread == nullptr) {
      self->fiber->switch_to(main_);
    } else if (thread != self) {
      resume(*self->fiber, *thread);
    }
  }

  void suspend(Wait wait, Site site) {
    current_->wait = wait;
    current_->site = site;
    idle_rounds_ = 0;
    leave();
  }

  void make_ready(Thread& thread) {
    thread.wait = Wait::kNothing;
    ready_.push_back(&thread);
  }

  // True for the last one, which releases the others.
  bool arrive(Barrier& barrier, Wait wait, Site site) {
    race::release(barrier.tag(barrier.generation));
    if (barrier.arrived != 0 && !is_same(barrier.site, site)) {
      fail(std::string("divergent ") + to_string(wait) + ": " + to_string(*current_) + " at " +
           to_string(site) + ", others at " + to_string(barrier.site));
    }
    barrier.site = site;
    if (++barrier.arrived < barrier.expected) return false;
    barrier.arrived = 0;
    barrier.result = barrier.count;
    barrier.count = 0;
    ++barrier.generation;
    const auto release = [&](const Block& block) {
      for (const auto& thread : block.threads) {
        if (thread->is_done || thread->wait != wait) continue;
        if (wait == Wait::kCluster && thread->cluster_waited != barrier.generation) continue;
        make_ready(*thread);
      }
    };
    if (wait == Wait::kBlock) {
      release(*current_->block);
    } else {
      for (const auto& block : current_->block->cluster->blocks) release(*block);
    }
    return true;
  }

  std::string describe_deadlock() const {
    std::map<std::string, std::pair<int, std::string>> groups;
    for (const auto& cluster : clusters_) {
      for (const auto& block : cluster->blocks) {
        for (const auto& thread : block->threads) {
          if (thread->is_done) continue;
          auto& [count, first] =
              groups[std::string(to_string(thread->wait)) + " " + to_string(thread->site)];
          if (count++ == 0) first = to_string(*thread);
        }
      }
    }
    std::string text = "deadlock:";
    for (const auto& [where, group] : groups) {
      text += " [" + std::to_string(group.first) + " threads at " + where + ", first " +
              group.second + "]";
    }
    return text;
  }

  const Launch& launch_;
  const std::function<void()>& kernel_;
  const unsigned threads_;
  Fiber main_;
  Thread* current_ = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<Thread*> ready_, polling_;
  std::size_t head_ = 0;
  unsigned idle_rounds_ = 0;
  std::uint64_t random_;
  std::string error_;
  char begin_, end_;  // of the launch, for the race detector
};

Grid* grid = nullptr;

Block& own_block() { return *grid->current().block; }

}  // namespace

void use(const Schedule& next_schedule) { schedule = next_schedule; }

void run(const Launch& launch, const std::function<void()>& kernel) {
  if (grid != nullptr) throw Error("launch from a kernel");
  const race::Unseen unseen;
  struct Reset {
    ~Reset() { grid = nullptr; }
  } reset;
  Grid own(launch, kernel);
  grid = &own;
  own.run();
}

void yield() {
  const race::Unseen unseen;
  grid->yield();
}

void pause(Site site) {
  const race::Unseen unseen;
  grid->pause(site);
}

void wait_for_block(Site site) { count_in_block(false, site); }

int count_in_block(bool predicate, Site site) {
  const race::Unseen unseen;
  return grid->meet(own_block().barrier, Wait::kBlock, predicate ? 1 : 0, site);
}

void cluster_arrive(Site site) {
  const race::Unseen unseen;
  grid->cluster_arrive(site);
}

void cluster_wait(Site site) {
  const race::Unseen unseen;
  grid->cluster_wait(site);
}

unsigned cluster_rank() { return own_block().rank; }

void* cluster_peer(const void* own, unsigned rank) {
  const race::Unseen unseen;
  if (rank >= grid->launch().cluster) grid->fail("cluster_peer: no such rank");
  for (auto& [key, array] : own_block().shared) {
    const auto offset = array.find(own);
    if (!offset) continue;
    Block& peer = *own_block().cluster->blocks[rank];
    if (peer.live_threads == 0) {
      grid->fail("cluster_peer: " + to_string(grid->current()) +
                 " reaches into a block that has exited");
    }
    const auto found = peer.shared.find(key);
    if (found == peer.shared.end()) {
      grid->fail("cluster_peer: the peer block has not started (no cluster barrier before it?)");
    }
    return found->second.data() + *offset;
  }
  grid->fail("cluster_peer: not an address in shared memory");
}

void copy_async(std::function<void()> copy) {
  const race::Unseen unseen;
  grid->current().copies.push_back(std::move(copy));
}

void wait_for_copies() {
  std::vector<std::function<void()>> copies;
  {
    const race::Unseen unseen;
    copies.swap(grid->current().copies);
  }
  for (const auto& copy : copies) copy();
}

void* shared_memory(const void* key, std::size_t bytes) {
  const race::Unseen unseen;
  Block& block = own_block();
  const auto [entry, is_new] = block.shared.try_emplace(key, bytes);
  if (is_new) {
    block.static_shared += bytes;
    const std::string excess = excess_of_shared(grid->launch(), block.static_shared);
    if (!excess.empty()) grid->fail(excess);
  }
  return entry->second.data();
}

void* dynamic_shared_memory() {
  const race::Unseen unseen;
  static const char key = 0;
  return own_block().shared.try_emplace(&key, grid->launch().dynamic_shared).first->second.data();
}

std::uint64_t meet_in_warp(WarpOperation operation, unsigned mask, std::uint64_t value,
                           int argument, Combine combine, Site site) {
  const race::Unseen unseen;
  return grid->meet_in_warp(operation, mask, value, argument, combine, site);
}

}  // namespace emulator

// What kernels/cuda/error.h calls of CUDA's runtime. An emulated launch throws an Error instead.
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t /*error*/) { return "no device"; }
