// memory_read, backward: its kernels, and their launches.
#include <algorithm>
#include <atomic>

#include "memformer_kernels/memory_read_backward.cuh"
#include "memformer_kernels/tensor_map.h"

namespace memformer_kernels {
namespace {

// Clusters of so many blocks that run at a time. It decides about speed alone, so that one GPU may answer for another.
template <typename Traits, typename Kernel>
cudaError_t concurrent_clusters(Kernel kernel, const cudaLaunchConfig_t& config, int* clusters) {
  static std::atomic<int> known;
  *clusters = known.load(std::memory_order_relaxed);
  if (*clusters > 0) return cudaSuccess;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  if (*clusters < 1) return cudaErrorInvalidClusterSize;  // a slice of a GPU that holds none
  known.store(*clusters, std::memory_order_relaxed);
  return cudaSuccess;
}

template <typename Traits>
cudaError_t launch_kernels(const MemoryReadBackwardParams& params) {
  using T = typename Traits::T;
  const int64_t heads = params.B * params.H;
  constexpr int kSlots = Traits::kBlocks * Traits::kSlots;  // of a cluster
  const int64_t groups = ceil_div<int64_t>(params.M, kSlots);
  if ((params.statistics == nullptr) != Traits::kAlone || (groups > 1 && !(Traits::kGrouped && params.carry)) ||
      (params.grad_query == nullptr && (Traits::kAlone || !params.carry))) {
    return cudaErrorInvalidValue;
  }
  if (!Traits::kAlone && params.output != nullptr) {
    constexpr int kThreads = 256, kRows = kThreads / (Traits::kWidth / Vector<T>::kSize);
    const int64_t tiles = ceil_div<int64_t>(params.L, Traits::kTokens);
    const int64_t row_blocks = ceil_div<int64_t>(heads * tiles * Traits::kTokens, kRows);
    if (row_blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
    const auto statistics = memory_read_backward_statistics_kernel<T, Traits::kWidth>;
    const unsigned blocks = static_cast<unsigned>(row_blocks);
    const cudaError_t error = launch_overlapping(statistics, blocks, kThreads, 0, params.stream, params, tiles);
    if (error != cudaSuccess) return error;
  }

  const auto kernel = memory_read_backward_kernel<Traits>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kShared);
  if (error != cudaSuccess) return error;
  CUtensorMap grad{}, query{}, key{}, value{};
  const auto map = [&](CUtensorMap* map, const Strided<4>& tensor, int64_t rows, int box) {
    if (error == cudaSuccess) {
      error = make_tensor_map(map, params.dtype, tensor, params.B, params.H, rows, params.D, box);
    }
  };
  map(&grad, params.grad_output, params.L, Traits::kTokens);
  map(&query, params.query, params.L, Traits::kTokens);
  map(&key, params.key, params.M, Traits::kSlots);
  map(&value, params.value, params.M, Traits::kSlots);
  if (error != cudaSuccess) return error;

  const int64_t chunks = ceil_div(params.L, params.chunk), parts = heads * chunks;
  if (parts > INT32_MAX || params.L > INT32_MAX - params.chunk || params.M > INT32_MAX - kSlots ||
      params.H * params.D > INT32_MAX / Traits::kTokens) {
    return cudaErrorInvalidConfiguration;
  }
  cudaLaunchAttribute attributes[2] = {{.id = cudaLaunchAttributeClusterDimension}, overlapping()};
  attributes[0].val.clusterDim = {Traits::kBlocks, 1, 1};
  cudaLaunchConfig_t config{.gridDim = {Traits::kBlocks}, .blockDim = {Traits::kThreads},
                            .dynamicSmemBytes = Traits::kShared, .stream = params.stream, .attrs = attributes,
                            .numAttrs = 2};
  int clusters = 0;
  error = concurrent_clusters<Traits>(kernel, config, &clusters);
  if (error != cudaSuccess) return error;
  config.gridDim.x = static_cast<unsigned>(std::min<int64_t>(clusters, parts) * Traits::kBlocks);
  const ReadBackwardWork work{static_cast<int>(parts), static_cast<int>(chunks), static_cast<int>(groups)};
  return cudaLaunchKernelEx(&config, kernel, params, work, grad, query, key, value);
}

template <typename T, int kChannels>
cudaError_t launch(const MemoryReadBackwardParams& params) {
  if (params.M <= kMemoryReadBackwardAlone) return launch_kernels<ReadBackwardTraits<T, kChannels, 1>>(params);
  if (params.M <= 256) return launch_kernels<ReadBackwardTraits<T, kChannels, 2>>(params);
  if constexpr (kChannels == 64) {  // at wide heads there is no room for what does not divide the units
    if (params.M <= 384) return launch_kernels<ReadBackwardTraits<T, kChannels, 3>>(params);
    if (512 < params.M && params.M <= 768) return launch_kernels<ReadBackwardTraits<T, kChannels, 6>>(params);
  }
  if (params.M <= 512) return launch_kernels<ReadBackwardTraits<T, kChannels, 4>>(params);
  return launch_kernels<ReadBackwardTraits<T, kChannels, 8>>(params);
}

template <typename T>
cudaError_t launch(const MemoryReadBackwardParams& params) {
  return params.D <= 64 ? launch<T, 64>(params) : params.D <= 96 ? launch<T, 96>(params) : launch<T, 128>(params);
}

}  // namespace

extern "C" cudaError_t memory_read_backward(const MemoryReadBackwardParams* params) {
  switch (params->dtype) {
    case DType::kFloat16: return launch<__half>(*params);
    case DType::kBFloat16: return launch<__nv_bfloat16>(*params);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace memformer_kernels
