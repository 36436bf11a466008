// memory_write, forward over the tokens: which kernel runs.
#include "memformer_kernels/memory_write_forward.cuh"

namespace memformer_kernels {
namespace {

template <typename Traits>
cudaError_t launch_over_chunks(const MemoryWriteForwardParams& params) {
  return launch_attention_forward<Traits, MemoryWriteForward>(params, ceil_div(params.L, params.chunk));
}

// At narrow heads the registers are enough for three groups, whose tile takes 4/3 of the time of that of two. A row has
// the same bits in any.
template <typename T, bool kMasked>
cudaError_t launch(const MemoryWriteForwardParams& params) {
  constexpr int kTokens = kMemoryWriteForwardTokens;
  using Two = AttentionTraits<T, 64, kTokens, 3, 2, kMasked, true>;
  using Three = AttentionTraits<T, 64, kTokens, 3, 3, kMasked, true>;
  using Middle = AttentionTraits<T, 96, kTokens, 2, 2, kMasked, true>;
  using Wide = AttentionTraits<T, 128, kTokens, 2, 2, kMasked, true>;
  if (params.D > Wide::kWidth || params.D % 8 != 0 || params.L == 0 || params.chunk % kTokens != 0 ||
      !tensor_map_takes(params.slots, params.B, params.H, params.M)) {
    return cudaErrorInvalidValue;
  }
  if (params.L > INT32_MAX - params.chunk) return cudaErrorInvalidConfiguration;
  if (params.D > Middle::kWidth) return launch_over_chunks<Wide>(params);
  if (params.D > Two::kWidth) return launch_over_chunks<Middle>(params);
  if (3 * ceil_div<int64_t>(params.M, Two::kRows) >= 4 * ceil_div<int64_t>(params.M, Three::kRows)) {
    return launch_over_chunks<Three>(params);
  }
  return launch_over_chunks<Two>(params);
}

template <typename T>
cudaError_t launch(const MemoryWriteForwardParams& params) {
  return params.token_mask.data == nullptr ? launch<T, false>(params) : launch<T, true>(params);
}

}  // namespace

extern "C" cudaError_t memory_write_forward(const MemoryWriteForwardParams* params) {
  switch (params->dtype) {
    case DType::kFloat16: return launch<__half>(*params);
    case DType::kBFloat16: return launch<__nv_bfloat16>(*params);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace memformer_kernels
