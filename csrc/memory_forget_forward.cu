// memory_forget, forward: which kernel runs, and its launch.
#include "memformer_kernels/memory_forget.cuh"

namespace memformer_kernels {
namespace {

template <typename T, bool kVectorized, int kRows>
cudaError_t launch(const MemoryForgetForwardParams& params) {
  const dim3 block = block_shape(params.C);
  const int64_t blocks = ceil_div<int64_t>(params.M, block.y) * ceil_div<int64_t>(params.B, kRows);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks));
  memory_forget_forward_kernel<T, kVectorized, kRows><<<grid, block, 0, params.stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t memory_forget_forward(const MemoryForgetForwardParams* params) {
  return dispatch(params->dtype, [params](auto element) {
    using T = decltype(element);
    const bool vectorized = params->C % Vector<T>::kSize == 0 &&
                            has_vector_rows<T>(params->slots) &&
                            has_vector_rows<T>(params->bias);
    if (!vectorized) return launch<T, false, 1>(*params);
    return params->C <= kWarpChannels ? launch<T, true, kForwardRows>(*params) : launch<T, true, 1>(*params);
  });
}

}  // namespace memformer_kernels
