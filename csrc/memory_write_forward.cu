// memory_write, forward over the tokens: which kernel runs.
#include "memformer_kernels/memory_write_forward.cuh"

namespace memformer_kernels {
namespace {

// At narrow heads the registers are enough for three groups, whose tile takes 4/3 of the time of that of two. A row has
// the same bits in any.
template <typename T>
cudaError_t launch(const MemoryWriteForwardParams& params) {
  constexpr int kTokens = kMemoryWriteForwardTokens;
  using Two = AttentionTraits<T, 64, kTokens, 3, 2, false, true>;
  using Three = AttentionTraits<T, 64, kTokens, 3, 3, false, true>;
  using Wide = AttentionTraits<T, 128, kTokens, 2, 2, false, true>;
  using Masked = AttentionTraits<T, 64, kTokens, 3, 2, true, true>;
  using WideMasked = AttentionTraits<T, 128, kTokens, 2, 2, true, true>;
  if (params.D > Wide::kWidth || params.D % 8 != 0 || params.L == 0 || params.chunk % kTokens != 0 ||
      !tensor_map_takes(params.slots, params.B, params.H, params.M)) {
    return cudaErrorInvalidValue;
  }
  const int64_t chunks = ceil_div(params.L, params.chunk);
  if (params.L > INT32_MAX - params.chunk) return cudaErrorInvalidConfiguration;
  const bool wide = params.D > Two::kWidth;
  if (params.token_mask.data != nullptr) {
    return wide ? launch_attention_forward<WideMasked, MemoryWriteForward>(params, chunks)
                : launch_attention_forward<Masked, MemoryWriteForward>(params, chunks);
  }
  if (wide) return launch_attention_forward<Wide, MemoryWriteForward>(params, chunks);
  return 3 * ceil_div<int64_t>(params.M, Two::kRows) < 4 * ceil_div<int64_t>(params.M, Three::kRows)
             ? launch_attention_forward<Two, MemoryWriteForward>(params, chunks)
             : launch_attention_forward<Three, MemoryWriteForward>(params, chunks);
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
