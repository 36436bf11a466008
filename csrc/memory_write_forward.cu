// memory_write, forward over the tokens: which kernel runs.
#include "memformer_kernels/memory_write_forward.cuh"

namespace memformer_kernels {
namespace {

// Of heads up to kWidth channels. At narrow ones the registers are enough for three groups.
template <typename T, bool kMasked, int kWidth>
cudaError_t launch_at_width(const MemoryWriteForwardParams& params) {
  constexpr bool kNarrow = kWidth <= 64;
  constexpr int kTokens = kMemoryWriteForwardTokens, kStages = kWidth < 128 ? 3 : 2;
  using One = AttentionTraits<T, kWidth, kTokens, kNarrow ? 2 : kStages, 1, kMasked, true>;  // two share their memory
  using Two = AttentionTraits<T, kWidth, kTokens, kStages, 2, kMasked, true>;
  using Three = AttentionTraits<T, kWidth, kTokens, kStages, 3, kMasked, true>;
  const int64_t chunks = ceil_div(params.L, params.chunk), heads = params.B * params.H * chunks;
  const int groups = fastest_groups(params.M, heads, params.multiprocessors, kNarrow ? 3 : 2, One::kBlocks);
  if (groups == 1) return launch_attention_forward<One, MemoryWriteForward>(params, chunks);
  if constexpr (kNarrow) {
    if (groups == 3) return launch_attention_forward<Three, MemoryWriteForward>(params, chunks);
  }
  return launch_attention_forward<Two, MemoryWriteForward>(params, chunks);
}

template <typename T, bool kMasked>
cudaError_t launch(const MemoryWriteForwardParams& params) {
  if (params.D > 128 || params.D % 8 != 0 || params.L == 0 || params.chunk % kMemoryWriteForwardTokens != 0 ||
      !tensor_map_takes(params.slots, params.B, params.H, params.M)) {
    return cudaErrorInvalidValue;
  }
  if (params.L > INT32_MAX - params.chunk) return cudaErrorInvalidConfiguration;
  if (params.D > 96) return launch_at_width<T, kMasked, 128>(params);
  if (params.D > 64) return launch_at_width<T, kMasked, 96>(params);
  return launch_at_width<T, kMasked, 64>(params);
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
