// What a CUDA device allows a normalisation kernel: the figures that plan_cuda() and the design of
// the kernels rest on. Prints one line of JSON per figure, for the device it runs on.
//   nvcc -O3 -std=c++20 -arch=native benchmarks/device_limits.cu -o build/device_limits
//   build/device_limits [streams|reread|occupancy|barriers|resident]...
//
//   streams    GB/s of copy, read, write and two reads with one write, by vectors per thread
//   reread     time of "read a tensor, then read it again and write another", over a copy's
//   occupancy  clusters that are resident at once, by size, threads and shared memory
//   barriers   nanoseconds of a barrier of a block, a cluster, a grid; of a launch in a graph
//   resident   a slice held in registers by a block, a cluster or a team of blocks of a persistent
//              grid: loaded once, its mean and deviations exchanged, normalised and stored; GB/s
//              counted as read once and written once
//
// Times are the best of several, each after a write to more memory than the L2 cache holds.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda/atomic>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

namespace cg = cooperative_groups;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

constexpr std::size_t kTensorBytes = std::size_t{1} << 30;
constexpr int kRounds = 7;

struct Device {
  cudaDeviceProp properties;
  char *x, *dy, *y, *scratch;
  unsigned* words;  // zeroed
  std::size_t scratch_bytes;
  cudaStream_t stream;
  cudaEvent_t begin, end;

  Device() {
    check(cudaGetDeviceProperties(&properties, 0), "device");
    check(cudaStreamCreate(&stream), "stream");
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    scratch_bytes = std::max<std::size_t>(4 * properties.l2CacheSize, std::size_t{1} << 28);
    for (char** tensor : {&x, &dy, &y}) check(cudaMalloc(tensor, kTensorBytes), "memory");
    check(cudaMalloc(&scratch, scratch_bytes), "memory");
    check(cudaMalloc(&words, 1 << 20), "memory");
    check(cudaMemset(words, 0, 1 << 20), "memset");
    // Small numbers of every sign: bfloat16 in each half.
    std::vector<std::uint32_t> values(kTensorBytes / 4);
    std::uint32_t state = 1;
    for (auto& value : values) {
      state = state * 1664525u + 1013904223u;
      value = 0x3f003f00u ^ (state & 0x80ff80ffu);
    }
    for (char* tensor : {x, dy}) {
      check(cudaMemcpy(tensor, values.data(), kTensorBytes, cudaMemcpyHostToDevice), "copy");
    }
  }

  // Best time of `run` in microseconds, the caches cold.
  double time(const std::function<void()>& run, int rounds = kRounds) const {
    float best = std::numeric_limits<float>::max();
    run();
    for (int i = 0; i < rounds; ++i) {
      check(cudaMemsetAsync(scratch, i, scratch_bytes, stream), "memset");
      check(cudaEventRecord(begin, stream), "record");
      run();
      check(cudaEventRecord(end, stream), "record");
      check(cudaEventSynchronize(end), "synchronize");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end), "time");
      best = std::min(best, ms);
    }
    check(cudaGetLastError(), "kernel");
    return 1e3 * best;
  }
};

// ---- streams

enum class Stream { kCopy, kRead, kWrite, kTwoReads };

__device__ uint4 mix(uint4 a, uint4 b) { return {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w}; }

template <Stream kStream, int kVectors, bool kHint>
__global__ void stream_kernel(const uint4* x, const uint4* dy, uint4* y, unsigned* sink) {
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * blockDim.x * kVectors;
  uint4 v[kVectors], w[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const std::size_t i = first + k * blockDim.x + threadIdx.x;
    if constexpr (kStream == Stream::kWrite) {
      v[k] = {threadIdx.x, threadIdx.x, 0, 0};
    } else {
      v[k] = kHint ? __ldcs(x + i) : __ldg(x + i);
      if constexpr (kStream == Stream::kTwoReads) w[k] = kHint ? __ldcs(dy + i) : __ldg(dy + i);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const std::size_t i = first + k * blockDim.x + threadIdx.x;
    if constexpr (kStream == Stream::kTwoReads) v[k] = mix(v[k], w[k]);
    if constexpr (kStream == Stream::kRead) {
      if (v[k].x == 12345 && v[k].y == 54321 && v[k].z == 1 && v[k].w == 2) *sink = 1;
    } else if constexpr (kHint) {
      __stcs(y + i, v[k]);
    } else {
      y[i] = v[k];
    }
  }
}

template <Stream kStream, int kVectors, bool kHint>
void stream_figure(const Device& d, const char* name, double tensors, std::size_t bytes) {
  for (unsigned threads : {128u, 256u, 512u}) {
    const auto blocks = static_cast<unsigned>(bytes / 16 / threads / kVectors);
    const double us = d.time([&] {
      stream_kernel<kStream, kVectors, kHint><<<blocks, threads, 0, d.stream>>>(
          reinterpret_cast<uint4*>(d.x), reinterpret_cast<uint4*>(d.dy),
          reinterpret_cast<uint4*>(d.y), d.words);
    });
    std::printf(
        "{\"figure\": \"stream\", \"kind\": \"%s\", \"mib\": %zu, \"vectors\": %d, \"threads\": "
        "%u, "
        "\"hint\": %d, \"us\": %.1f, \"gb_per_s\": %.0f}\n",
        name, bytes >> 20, kVectors, threads, kHint, us,
        tensors * static_cast<double>(bytes) / us / 1e3);
  }
}

template <int kVectors>
void stream_figures(const Device& d) {
  stream_figure<Stream::kCopy, kVectors, false>(d, "copy", 2, kTensorBytes);
  stream_figure<Stream::kCopy, kVectors, true>(d, "copy", 2, kTensorBytes);
  stream_figure<Stream::kRead, kVectors, false>(d, "read", 1, kTensorBytes);
  stream_figure<Stream::kWrite, kVectors, false>(d, "write", 1, kTensorBytes);
  stream_figure<Stream::kTwoReads, kVectors, false>(d, "two reads, one write", 3, kTensorBytes);
  stream_figure<Stream::kTwoReads, kVectors, true>(d, "two reads, one write", 3, kTensorBytes);
}

void streams(const Device& d) {
  stream_figures<1>(d);
  stream_figures<2>(d);
  stream_figures<4>(d);
  stream_figures<8>(d);
  for (std::size_t mib : {4, 8, 16, 32, 50, 64, 100, 200, 400}) {
    stream_figure<Stream::kCopy, 4, false>(d, "copy", 2, mib << 20);
    stream_figure<Stream::kCopy, 4, true>(d, "copy", 2, mib << 20);
    const double us = d.time([&] {
      check(cudaMemcpyAsync(d.y, d.x, mib << 20, cudaMemcpyDeviceToDevice, d.stream), "copy");
    });
    std::printf("{\"figure\": \"memcpy\", \"mib\": %zu, \"us\": %.1f, \"gb_per_s\": %.0f}\n", mib,
                us, 2.0 * static_cast<double>(mib << 20) / us / 1e3);
  }
}

// ---- reread

template <bool kReverse, bool kHint>
__global__ void second_sweep(const uint4* x, uint4* y) {
  constexpr int kVectors = 4;
  const unsigned block = kReverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const std::size_t first = static_cast<std::size_t>(block) * blockDim.x * kVectors;
  uint4 v[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const std::size_t i = first + k * blockDim.x + threadIdx.x;
    v[k] = kHint ? __ldcs(x + i) : __ldg(x + i);
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const std::size_t i = first + k * blockDim.x + threadIdx.x;
    if constexpr (kHint) {
      __stcs(y + i, v[k]);
    } else {
      y[i] = v[k];
    }
  }
}

template <bool kReverse, bool kHint>
void reread_figure(const Device& d, std::size_t bytes, double copy_us, double read_us) {
  const auto blocks = static_cast<unsigned>(bytes / 16 / 256 / 4);
  const auto* x = reinterpret_cast<const uint4*>(d.x);
  auto* y = reinterpret_cast<uint4*>(d.y);
  const double us = d.time([&] {
    stream_kernel<Stream::kRead, 4, false><<<blocks, 256, 0, d.stream>>>(x, x, y, d.words);
    second_sweep<kReverse, kHint><<<blocks, 256, 0, d.stream>>>(x, y);
  });
  std::printf(
      "{\"figure\": \"reread\", \"mib\": %zu, \"reverse\": %d, \"hint\": %d, \"us\": %.1f, "
      "\"read_us\": %.1f, \"copy_us\": %.1f, \"over_copy\": %.2f}\n",
      bytes >> 20, kReverse, kHint, us, read_us, copy_us, us / copy_us);
}

void reread(const Device& d) {
  for (std::size_t mib : {8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 256}) {
    const std::size_t bytes = mib << 20;
    const auto blocks = static_cast<unsigned>(bytes / 16 / 256 / 4);
    const auto* x = reinterpret_cast<const uint4*>(d.x);
    auto* y = reinterpret_cast<uint4*>(d.y);
    const double copy = d.time([&] {
      stream_kernel<Stream::kCopy, 4, false><<<blocks, 256, 0, d.stream>>>(x, x, y, d.words);
    });
    const double read = d.time([&] {
      stream_kernel<Stream::kRead, 4, false><<<blocks, 256, 0, d.stream>>>(x, x, y, d.words);
    });
    reread_figure<false, false>(d, bytes, copy, read);
    reread_figure<true, false>(d, bytes, copy, read);
    reread_figure<false, true>(d, bytes, copy, read);
    reread_figure<true, true>(d, bytes, copy, read);
  }
}

// ---- launches with attributes

struct Shape {
  unsigned blocks, threads, cluster = 1;
  std::size_t shared = 0;
  bool cooperative = false, programmatic = false;
};

cudaLaunchConfig_t config_of(const Shape& shape, cudaStream_t stream,
                             std::vector<cudaLaunchAttribute>& attributes) {
  cudaLaunchAttribute attribute = {};
  if (shape.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
    attributes.push_back(attribute);
  }
  if (shape.cooperative) {
    attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    attributes.push_back(attribute);
  }
  if (shape.programmatic) {
    attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    attributes.push_back(attribute);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  return config;
}

template <class... Parameters>
void prepare(void (*kernel)(Parameters...), const Shape& shape) {
  if (shape.cluster > 8) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
  }
  if (shape.shared > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared)),
          "shared memory");
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t stream,
            std::type_identity_t<Parameters>... arguments) {
  std::vector<cudaLaunchAttribute> attributes;
  const cudaLaunchConfig_t config = config_of(shape, stream, attributes);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

template <class... Parameters>
int max_clusters(void (*kernel)(Parameters...), const Shape& shape) {
  std::vector<cudaLaunchAttribute> attributes;
  const cudaLaunchConfig_t config = config_of(shape, nullptr, attributes);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  return clusters;
}

// ---- barriers

__global__ void cluster_barriers(int count) {
  for (int i = 0; i < count; ++i) cg::this_cluster().sync();
}

__global__ void block_barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

// A barrier of `blocks` blocks. Arrivals are counted for ever; `target` is their number so far.
__device__ void team_barrier(unsigned* word, unsigned blocks, unsigned& target) {
  __syncthreads();
  target += blocks;
  if (threadIdx.x == 0) {
    cuda::atomic_ref<unsigned, cuda::thread_scope_device> counter(*word);
    counter.fetch_add(1, cuda::memory_order_acq_rel);
    while (static_cast<int>(counter.load(cuda::memory_order_acquire) - target) < 0) {
    }
  }
  __syncthreads();
}

__global__ void grid_barriers(unsigned* word, int count) {
  unsigned target = 0;
  for (int i = 0; i < count; ++i) team_barrier(word, gridDim.x, target);
}

__global__ void nothing(unsigned* word) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  if (word == nullptr) __trap();
}

void occupancy(const Device&) {
  for (unsigned cluster : {2u, 4u, 8u, 16u}) {
    for (unsigned threads : {256u, 512u, 1024u}) {
      for (std::size_t kib : {0, 48, 100, 200}) {
        const Shape shape{cluster, threads, cluster, kib << 10};
        prepare(cluster_barriers, shape);
        std::printf(
            "{\"figure\": \"clusters\", \"size\": %u, \"threads\": %u, \"shared_kib\": %zu, "
            "\"resident\": %d}\n",
            cluster, threads, kib, max_clusters(cluster_barriers, shape));
      }
    }
  }
}

void barriers(const Device& d) {
  constexpr int kCount = 1000;
  const auto per_barrier = [&](const std::function<void(int)>& run) {
    return (d.time([&] { run(2 * kCount); }) - d.time([&] { run(kCount); })) / kCount * 1e3;
  };
  const auto print = [](const char* kind, unsigned size, unsigned threads, double ns) {
    std::printf(
        "{\"figure\": \"barrier\", \"kind\": \"%s\", \"size\": %u, \"threads\": %u, \"ns\": "
        "%.0f}\n",
        kind, size, threads, ns);
  };
  for (unsigned threads : {256u, 512u}) {
    print("block", threads, threads, per_barrier([&](int count) {
            launch(block_barriers, Shape{132, threads}, d.stream, count);
          }));
    for (unsigned cluster : {2u, 4u, 8u, 16u}) {
      const Shape shape{128 / cluster * cluster, threads, cluster};
      prepare(cluster_barriers, shape);
      print("cluster", cluster, threads,
            per_barrier([&](int count) { launch(cluster_barriers, shape, d.stream, count); }));
    }
    for (unsigned blocks : {2u, 8u, 16u, 33u, 66u, 132u, 264u}) {
      print("grid", blocks, threads, per_barrier([&](int count) {
              check(cudaMemsetAsync(d.words, 0, 4, d.stream), "memset");
              launch(grid_barriers, Shape{blocks, threads, 1, 0, true}, d.stream, d.words, count);
            }));
    }
  }
  for (bool programmatic : {false, true}) {
    cudaGraph_t graph;
    cudaGraphExec_t instance;
    check(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeGlobal), "capture");
    for (int i = 0; i < kCount; ++i) {
      launch(nothing, Shape{132, 256, 1, 0, false, programmatic}, d.stream, d.words);
    }
    check(cudaStreamEndCapture(d.stream, &graph), "capture");
    check(cudaGraphInstantiate(&instance, graph, 0), "graph");
    const double us = d.time([&] { check(cudaGraphLaunch(instance, d.stream), "graph"); });
    print(programmatic ? "launch in a graph, programmatic" : "launch in a graph", 132, 256,
          us / kCount * 1e3);
    check(cudaGraphExecDestroy(instance), "graph");
    check(cudaGraphDestroy(graph), "graph");
  }
}

// ---- resident slices

enum class Holder { kBlock, kCluster, kTeam };

struct Record {
  float count, mean, m2;
};

__device__ Record merged(Record a, Record b) {
  const float count = a.count + b.count, delta = b.mean - a.mean;
  return {count, a.mean + delta * b.count / count,
          a.m2 + b.m2 + delta * delta * a.count * b.count / count};
}

__device__ float warp_sum(float value) {
  for (int offset = 16; offset != 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  return value;
}

__device__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

__device__ float low(unsigned word) { return __uint_as_float(word << 16); }
__device__ float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
__device__ unsigned packed(float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&both);
}

template <int kVectors, class F>
__device__ void for_each_word(uint4 (&v)[kVectors], F f) {
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    asm volatile("" : "+r"(v[k].x), "+r"(v[k].y), "+r"(v[k].z), "+r"(v[k].w));
    f(v[k].x), f(v[k].y), f(v[k].z), f(v[k].w);
  }
}

// Each of `parts` blocks holds blockDim.x * kVectors vectors of a slice; slices of a team are taken
// in turns. Everything is full: slices are multiples of what a holder holds.
template <Holder kHolder, int kThreads, int kVectors, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    resident_kernel(const uint4* x, uint4* y, unsigned slices, unsigned parts, Record* records,
                    unsigned* words, unsigned target) {
  __shared__ float shared[32];
  __shared__ Record of_part[16];
  const unsigned part = blockIdx.x % parts, team = blockIdx.x / parts, teams = gridDim.x / parts;
  constexpr unsigned kHeld = kThreads * kVectors;
  constexpr float kCount = kHeld * 8.0f;
  for (unsigned slice = team; slice < slices; slice += teams) {
    const std::size_t first =
        (static_cast<std::size_t>(slice) * parts + part) * kHeld + threadIdx.x;
    uint4 v[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) v[k] = __ldcs(x + first + k * kThreads);
    float sum = 0;
    for_each_word<kVectors>(v, [&](unsigned& word) { sum += low(word) + high(word); });
    const float mean = block_sum(sum, shared) / kCount;
    float square = 0;
    for_each_word<kVectors>(v, [&](unsigned& word) {
      const float a = low(word) - mean, b = high(word) - mean;
      square = fmaf(a, a, fmaf(b, b, square));
    });
    Record all{kCount, mean, block_sum(square, shared)};
    if constexpr (kHolder == Holder::kCluster) {
      const cg::cluster_group cluster = cg::this_cluster();
      if (threadIdx.x < parts) cluster.map_shared_rank(of_part, threadIdx.x)[part] = all;
      cluster.sync();
      all = of_part[0];
      for (unsigned i = 1; i < parts; ++i) all = merged(all, of_part[i]);
    } else if constexpr (kHolder == Holder::kTeam) {
      Record* const own = records + (slice / teams % 2 * teams + team) * parts;
      if (threadIdx.x == 0) own[part] = all;
      team_barrier(words + team * 32, parts, target);
      all = {0, 0, 0};
      for (unsigned i = threadIdx.x; i < parts; i += kThreads) {
        const Record next{__ldcg(&own[i].count), __ldcg(&own[i].mean), __ldcg(&own[i].m2)};
        all = all.count == 0 ? next : merged(all, next);
      }
      const float count = block_sum(all.count, shared);
      const float center = block_sum(all.count * all.mean, shared) / count;
      const float delta = all.mean - center;
      all = {count, center, block_sum(all.m2 + all.count * delta * delta, shared)};
    }
    const float rstd = rsqrtf(all.m2 / all.count + 1e-5f);
    for_each_word<kVectors>(v, [&](unsigned& word) {
      word = packed((low(word) - all.mean) * rstd, (high(word) - all.mean) * rstd);
    });
#pragma unroll
    for (int k = 0; k < kVectors; ++k) __stcs(y + first + k * kThreads, v[k]);
  }
}

template <Holder kHolder, int kThreads, int kVectors, int kBlocks>
void resident_figure(const Device& d, unsigned parts) {
  auto* const kernel = resident_kernel<kHolder, kThreads, kVectors, kBlocks>;
  const std::size_t slice_bytes = std::size_t{parts} * kThreads * kVectors * 16;
  Shape shape{0, kThreads};
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0), "occupancy");
  if (kHolder == Holder::kCluster) {
    shape.cluster = parts;
    prepare(kernel, shape);
  }
  const auto sms = static_cast<unsigned>(d.properties.multiProcessorCount);
  const unsigned teams = sms * static_cast<unsigned>(resident) / parts;
  if (kHolder == Holder::kTeam && teams == 0) return;
  for (std::size_t mib : {50, 256}) {
    auto slices = static_cast<unsigned>((mib << 20) / slice_bytes);
    if (kHolder == Holder::kTeam) {
      if (slices >= teams) slices = slices / teams * teams;
      shape.blocks = std::min(teams, slices) * parts;
      shape.cooperative = true;
    } else {
      shape.blocks = slices * parts;
    }
    if (slices == 0) continue;
    check(cudaMemset(d.words, 0, 1 << 17), "memset");
    unsigned arrivals = 0;  // at each team's barrier so far
    const double us = d.time([&] {
      launch(kernel, shape, d.stream, reinterpret_cast<const uint4*>(d.x),
             reinterpret_cast<uint4*>(d.y), slices, parts,
             reinterpret_cast<Record*>(d.words + (1 << 16)), d.words, arrivals);
      arrivals += slices * parts / shape.blocks * parts;
    });
    static const char* const kNames[] = {"block", "cluster", "team"};
    std::printf(
        "{\"figure\": \"resident\", \"holder\": \"%s\", \"parts\": %u, \"threads\": %d, "
        "\"vectors\": %d, \"blocks_per_sm\": %d, \"part_kib\": %d, \"slice_kib\": %zu, \"slices\": "
        "%u, \"us\": %.1f, \"gb_per_s\": %.0f}\n",
        kNames[static_cast<int>(kHolder)], parts, kThreads, kVectors, resident,
        kThreads * kVectors * 16 / 1024, slice_bytes >> 10, slices, us,
        2.0 * static_cast<double>(slice_bytes) * slices / us / 1e3);
  }
}

template <int kThreads, int kVectors, int kBlocks>
void resident_figures(const Device& d) {
  resident_figure<Holder::kBlock, kThreads, kVectors, kBlocks>(d, 1);
  for (unsigned parts : {2u, 4u, 8u, 16u}) {
    resident_figure<Holder::kCluster, kThreads, kVectors, kBlocks>(d, parts);
  }
  for (unsigned parts : {4u, 8u, 16u, 33u, 66u, 132u, 264u}) {
    resident_figure<Holder::kTeam, kThreads, kVectors, kBlocks>(d, parts);
  }
}

void resident(const Device& d) {
  resident_figures<128, 8, 4>(d);   // 16 KiB
  resident_figures<256, 8, 4>(d);   // 32 KiB
  resident_figures<512, 4, 3>(d);   // 32 KiB
  resident_figures<512, 8, 2>(d);   // 64 KiB
  resident_figures<256, 16, 2>(d);  // 64 KiB
  resident_figures<256, 24, 2>(d);  // 96 KiB
  resident_figures<384, 16, 1>(d);  // 96 KiB
  resident_figures<512, 16, 1>(d);  // 128 KiB
  resident_figures<512, 20, 1>(d);  // 160 KiB
  resident_figures<512, 24, 1>(d);  // 192 KiB
}

}  // namespace

int main(int argc, char** argv) {
  const Device d;
  std::printf(
      "{\"figure\": \"device\", \"name\": \"%s\", \"multiprocessors\": %d, \"l2_mib\": %d, "
      "\"shared_kib_per_sm\": %zu}\n",
      d.properties.name, d.properties.multiProcessorCount, d.properties.l2CacheSize >> 20,
      d.properties.sharedMemPerMultiprocessor >> 10);
  const struct {
    const char* name;
    void (*measure)(const Device&);
  } sections[] = {{"streams", streams},
                  {"reread", reread},
                  {"occupancy", occupancy},
                  {"barriers", barriers},
                  {"resident", resident}};
  for (const auto& section : sections) {
    bool chosen = argc == 1;
    for (int i = 1; i < argc; ++i) chosen |= std::strcmp(argv[i], section.name) == 0;
    if (chosen) section.measure(d);
    std::fflush(stdout);
  }
  return 0;
}
