// memory_write, backward over the tokens: its launch.
#include <algorithm>

#include "memformer_kernels/memory_write_backward.cuh"
#include "memformer_kernels/tensor_map.h"

namespace memformer_kernels {
namespace {

template <typename T, int kChannels>
cudaError_t launch(const MemoryWriteBackwardParams& params) {
  using Traits = WriteBackwardTraits<T, kChannels>;
  const int64_t chunks = ceil_div(params.L, params.chunk), parts = params.B * params.H * chunks;
  if (params.M > Traits::kSlots) return cudaErrorInvalidValue;
  if (parts > INT32_MAX || params.L > INT32_MAX - params.chunk ||
      params.H * params.D > INT32_MAX / Traits::kTokens) {
    return cudaErrorInvalidConfiguration;
  }
  const auto kernel = memory_write_backward_kernel<Traits>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kShared);
  if (error != cudaSuccess) return error;
  WriteBackwardMaps maps{};
  const auto map = [&](CUtensorMap* map, const Strided<4>& tensor, int64_t rows, int box) {
    if (error == cudaSuccess) {
      error = make_tensor_map(map, params.dtype, tensor, params.B, params.H, rows, params.D, box);
    }
  };
  map(&maps.query, params.query, params.M, Traits::kSlots);
  map(&maps.du, params.du, params.M, Traits::kSlots);
  map(&maps.key, params.key, params.L, Traits::kTokens);
  map(&maps.value, params.value, params.L, Traits::kTokens);
  map(&maps.grad_key, heads_of_rows(params.grad_key, params.L, params.H, params.D), params.L, kWarpRows);
  map(&maps.grad_value, heads_of_rows(params.grad_value, params.L, params.H, params.D), params.L, kWarpRows);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(parts, params.multiprocessors));
  return launch_overlapping(kernel, blocks, Traits::kThreads, Traits::kShared, params.stream, params,
                            static_cast<int>(parts), static_cast<int>(chunks), maps);
}

template <typename T>
cudaError_t launch(const MemoryWriteBackwardParams& params) {
  return params.D <= 64 ? launch<T, 64>(params) : params.D <= 96 ? launch<T, 96>(params) : launch<T, 128>(params);
}

}  // namespace

extern "C" cudaError_t memory_write_backward(const MemoryWriteBackwardParams* params) {
  switch (params->dtype) {
    case DType::kFloat16: return launch<__half>(*params);
    case DType::kBFloat16: return launch<__nv_bfloat16>(*params);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace memformer_kernels
