// memory_forget, backward: which kernels run, and their launch.
#include "memformer_kernels/memory_forget.cuh"

namespace memformer_kernels {
namespace {

template <typename T>
cudaError_t launch_bias(const MemoryForgetBackwardParams& params) {
  const int64_t size = params.M * params.C;
  const int64_t blocks = ceil_div<int64_t>(size, kBiasThreads);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks));
  memory_forget_backward_bias_kernel<T><<<grid, kBiasThreads, 0, params.stream>>>(
      params.partial, static_cast<T*>(params.grad_bias), params.groups, size);
  return cudaGetLastError();
}

template <typename T, bool kVectorized, int kRows>
cudaError_t launch(const MemoryForgetBackwardParams& params) {
  const dim3 block = block_shape(params.C);
  const int64_t blocks = ceil_div<int64_t>(params.M, block.y) * params.groups;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks));
  memory_forget_backward_kernel<T, kVectorized, kRows><<<grid, block, 0, params.stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || params.groups == 1) return error;
  return launch_bias<T>(params);
}

}  // namespace

extern "C" cudaError_t memory_forget_backward(const MemoryForgetBackwardParams* params) {
  return dispatch(params->dtype, [params](auto element) {
    using T = decltype(element);
    const bool vectorized = params->C % Vector<T>::kSize == 0 &&
                            has_vector_rows<T>(params->grad_output) &&
                            has_vector_rows<T>(params->slots) &&
                            has_vector_rows<T>(params->bias);
    if (!vectorized) return launch<T, false, 1>(*params);
    return params->C <= kWidthLimit<kBackwardRows> ? launch<T, true, kBackwardRows>(*params)
                                                   : launch<T, true, 1>(*params);
  });
}

}  // namespace memformer_kernels
