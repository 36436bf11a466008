// memory_read, forward: the launch of the form that is fastest.
#include <utility>

#include "memformer_kernels/memory_read_forms.cuh"
#include "memformer_kernels/memory_read_forward.cuh"

namespace memformer_kernels {
namespace {

template <typename T, bool kMasked, size_t kPlace>
cudaError_t launch_form(const MemoryReadForwardParams& params) {
  constexpr MemoryReadForm kForm = kMemoryReadForms[kPlace];
  using Traits = AttentionTraits<T, kForm.width, kForm.slots, kForm.stages, kForm.groups, kMasked, false>;
  return launch_attention_forward<Traits, MemoryReadForward>(params, 1);
}

template <typename T, bool kMasked, size_t... kPlaces>
cudaError_t launch(const MemoryReadForwardParams& params, std::index_sequence<kPlaces...>) {
  using Launch = cudaError_t (*)(const MemoryReadForwardParams&);
  constexpr Launch kLaunches[] = {launch_form<T, kMasked, kPlaces>...};
  const int form = fastest_memory_read_form(params.L, params.M, params.D, params.B * params.H, params.multiprocessors);
  return kLaunches[form](params);
}

template <typename T>
cudaError_t launch(const MemoryReadForwardParams& params) {
  if (params.D > kMemoryReadMaxD || params.D % 8 != 0) return cudaErrorInvalidValue;
  constexpr auto kPlaces = std::make_index_sequence<std::size(kMemoryReadForms)>();
  return params.slot_mask.data == nullptr ? launch<T, false>(params, kPlaces) : launch<T, true>(params, kPlaces);
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
