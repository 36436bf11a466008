// memory_read, forward: which kernel runs, and its launch.
#include "memformer_kernels/memory_read_forward.cuh"
#include "memformer_kernels/tensor_map.h"

namespace memformer_kernels {
namespace {

template <typename Traits>
cudaError_t launch_kernel(const MemoryReadForwardParams& params) {
  const auto kernel = memory_read_forward_kernel<Traits>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kShared);
  CUtensorMap query{}, key{}, value{};
  if constexpr (!Traits::kGeneral) {
    const auto map = [&params](CUtensorMap* map, const Strided<4>& tensor, int64_t rows, int box) {
      return make_tensor_map(map, params.dtype, tensor, params.B, params.H, rows, params.D, box);
    };
    if (error == cudaSuccess) error = map(&query, params.query, params.L, Traits::kRows);
    if (error == cudaSuccess) error = map(&key, params.key, params.M, Traits::kSlots);
    if (error == cudaSuccess) error = map(&value, params.value, params.M, Traits::kSlots);
  }
  if (error != cudaSuccess) return error;
  const int64_t tiles = ceil_div<int64_t>(params.L, Traits::kRows) * params.B * params.H;
  const unsigned blocks = static_cast<unsigned>(tiles < params.multiprocessors ? tiles : params.multiprocessors);
  kernel<<<blocks, Traits::kThreads, Traits::kShared, params.stream>>>(params, query, key, value, tiles);
  return cudaGetLastError();
}

// Tiles of 128 slots and 64 rows a group: at narrow heads three tiles fit the shared memory and three groups the
// registers, at wide ones two, and beside a group that finds addresses itself. A row has the same bits in any.
template <typename T, bool kGeneral>
cudaError_t launch(const MemoryReadForwardParams& params) {
  return params.D <= 64 ? launch_kernel<ReadForwardTraits<T, 64, 128, 3, kGeneral ? 2 : 3, kGeneral>>(params)
                        : launch_kernel<ReadForwardTraits<T, 128, 128, 2, 2, kGeneral>>(params);
}

template <typename T>
cudaError_t launch(const MemoryReadForwardParams& params) {
  const auto takes = [&params](const Strided<4>& tensor, int64_t rows) {
    return tensor_map_takes(tensor, params.B, params.H, rows);
  };
  const bool tma = params.slot_mask.data == nullptr && takes(params.query, params.L) && takes(params.key, params.M) &&
                   takes(params.value, params.M);
  return tma ? launch<T, false>(params) : launch<T, true>(params);
}

}  // namespace

extern "C" cudaError_t memory_read_forward(const MemoryReadForwardParams* params) {
  switch (params->dtype) {
    case DType::kFloat16: return launch<__half>(*params);
    case DType::kBFloat16: return launch<__nv_bfloat16>(*params);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace memformer_kernels
