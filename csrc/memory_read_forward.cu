// memory_read, forward: which kernel runs, and its launch.
#include "memformer_kernels/memory_read_forward.cuh"

namespace memformer_kernels {
namespace {

// Tiles of 128 slots and 64 rows a group: at narrow heads three tiles fit the shared memory and three groups the
// registers; at wide ones two. Four groups have registers for tiles of 64 slots, and take a sixteenth longer for a row:
// where they leave so many fewer rows empty, they are faster. At heads up to 96 channels three groups have registers for
// tiles of 96 slots: where as many of these hold all slots.
template <typename T, bool kMasked>
cudaError_t launch(const MemoryReadForwardParams& params) {
  using Narrow = AttentionTraits<T, 64, 128, 3, 3, kMasked, false>;
  using Four = AttentionTraits<T, 64, 64, 4, 4, kMasked, false>;
  using Middle = AttentionTraits<T, 96, 128, 3, 2, kMasked, false>;
  using Fewer = AttentionTraits<T, 96, 96, 3, 3, kMasked, false>;
  using Wide = AttentionTraits<T, 128, 128, 2, 2, kMasked, false>;
  if (params.D % 8 != 0) return cudaErrorInvalidValue;
  if (params.D > Middle::kWidth) return launch_attention_forward<Wide, MemoryReadForward>(params, 1);
  if (params.D > Narrow::kWidth) {
    if (ceil_div<int64_t>(params.M, Fewer::kKeys) == ceil_div<int64_t>(params.M, Middle::kKeys)) {
      return launch_attention_forward<Fewer, MemoryReadForward>(params, 1);
    }
    return launch_attention_forward<Middle, MemoryReadForward>(params, 1);
  }
  const auto rows = [&params](int tile) { return ceil_div<int64_t>(params.L, tile) * tile; };
  if (17 * rows(256) < 16 * rows(192)) {  // the same tiles of slots, and so the same bits, with a mask and without
    return launch_attention_forward<Four, MemoryReadForward>(params, 1);
  }
  return launch_attention_forward<Narrow, MemoryReadForward>(params, 1);
}

template <typename T>
cudaError_t launch(const MemoryReadForwardParams& params) {
  return params.slot_mask.data == nullptr ? launch<T, false>(params) : launch<T, true>(params);
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
