// memory_read, forward: which kernel runs, and its launch.
#include <cmath>
#include <type_traits>

#include "memformer_kernels/memory_read_forward.cuh"

namespace memformer_kernels {
namespace {

// A form of the kernel, and the time of an H200 full of its blocks, in picoseconds: of a row, and of each slot of a row
// of its tiles, empty ones included.
template <typename Traits_>
struct Form {
  using Traits = Traits_;
  double row, slot;

  static int64_t tiles(const MemoryReadForwardParams& params) {  // of a head's rows
    return ceil_div<int64_t>(params.L, Traits::kRows);
  }
  double of_a_head(const MemoryReadForwardParams& params) const {
    const int64_t slots = ceil_div<int64_t>(params.M, Traits::kKeys) * Traits::kKeys;
    return row * params.L + slot * (tiles(params) * Traits::kRows) * slots;
  }
  double of_all(const MemoryReadForwardParams& params) const {
    const int64_t of_a_multiprocessor = ceil_div<int64_t>(params.B * params.H * tiles(params), params.multiprocessors);
    return of_a_head(params) / tiles(params) * of_a_multiprocessor;
  }
};

// Tiles of as many slots as in the form that is fastest on a GPU full of blocks: they decide the bits of a row, which
// must not depend on B. Of the forms with these tiles, which share out the rows, the one that is fastest here.
template <typename... Forms>
cudaError_t launch_fastest(const MemoryReadForwardParams& params, const Forms&... forms) {
  int keys = 0;
  double least = INFINITY;
  const auto decide = [&](const auto& form) {
    if (form.of_a_head(params) >= least) return;
    least = form.of_a_head(params);
    keys = std::decay_t<decltype(form)>::Traits::kKeys;
  };
  (decide(forms), ...);
  cudaError_t (*launch)(const MemoryReadForwardParams&, int64_t) = nullptr;
  least = INFINITY;
  const auto choose = [&](const auto& form) {
    using Traits = typename std::decay_t<decltype(form)>::Traits;
    if (Traits::kKeys != keys || form.of_all(params) >= least) return;
    least = form.of_all(params);
    launch = launch_attention_forward<Traits, MemoryReadForward>;
  };
  (choose(forms), ...);
  return launch(params, 1);
}

// Groups of 64 rows: as many as there are registers for, or, where there are few rows, one. Tiles of 64 and 96 slots
// leave fewer empty, and leave registers for one group more, whose tile may leave fewer rows empty.
template <typename T, bool kMasked>
cudaError_t launch(const MemoryReadForwardParams& params) {
  if (params.D % 8 != 0) return cudaErrorInvalidValue;
  if (params.D > 96) {
    return launch_fastest(params, Form<AttentionTraits<T, 128, 128, 2, 2, kMasked, false>>{86, 0.82},
                          Form<AttentionTraits<T, 128, 128, 2, 1, kMasked, false>>{86, 1.27},
                          Form<AttentionTraits<T, 128, 96, 2, 2, kMasked, false>>{76, 0.93},
                          Form<AttentionTraits<T, 128, 96, 2, 1, kMasked, false>>{100, 1.32});
  }
  if (params.D > 64) {
    return launch_fastest(params, Form<AttentionTraits<T, 96, 128, 3, 2, kMasked, false>>{51, 0.83},
                          Form<AttentionTraits<T, 96, 128, 3, 1, kMasked, false>>{107, 1.02},
                          Form<AttentionTraits<T, 96, 96, 3, 3, kMasked, false>>{51, 0.71},
                          Form<AttentionTraits<T, 96, 96, 3, 1, kMasked, false>>{92, 1.22});
  }
  return launch_fastest(params, Form<AttentionTraits<T, 64, 128, 3, 3, kMasked, false>>{43, 0.50},
                        Form<AttentionTraits<T, 64, 128, 2, 1, kMasked, false>>{36, 0.64},
                        Form<AttentionTraits<T, 64, 96, 3, 3, kMasked, false>>{43, 0.55},
                        Form<AttentionTraits<T, 64, 96, 3, 1, kMasked, false>>{36, 0.69},
                        Form<AttentionTraits<T, 64, 64, 4, 4, kMasked, false>>{29, 0.585},
                        Form<AttentionTraits<T, 64, 64, 4, 1, kMasked, false>>{38, 0.78});
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
