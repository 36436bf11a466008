// memory_read, forward: what becomes of the attention of the tokens over the slots.
#pragma once

#include "memformer_kernels/attention_forward.cuh"
#include "memformer_kernels/memory_read.h"

namespace memformer_kernels {

struct MemoryReadForward {
  using Params = MemoryReadForwardParams;
  static constexpr bool kChunks = false;
  __host__ __device__ static int64_t rows(const Params& params) { return params.L; }
  __host__ __device__ static int64_t keys(const Params& params) { return params.M; }
  __device__ static Mask mask(const Params& params) { return params.slot_mask; }

  template <typename Traits, typename Map>
  static void add_maps(const Params& params, AttentionMaps& maps, const Map& map) {
    map(&maps.output, heads_of_rows(params.output, params.L, params.H, params.D), params.L, kWarpRows);
    if (params.rounding == nullptr) return;
    map(&maps.rounding, heads_of_rows(params.rounding, params.L, params.H, params.D), params.L, kWarpRows);
  }

  // Of a warp's rows of the tile, from `first` on: this thread's part of the sum of weight * value is in `out`, and its
  // place is used, as registers are few.
  template <typename T, int kCount, typename Shared>
  __device__ __forceinline__ static void store(const Params& params, const AttentionMaps& maps, const AttentionTile& at,
                                               int first, const AttentionSums& sums, float (&out)[kCount],
                                               const Shared& shared) {
    const int lane = fresh(threadIdx.x) % kWarpSize;
    float inv_total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at.row + first + lane / 4 + 8 * r;
      inv_total[r] = sums.seen(r) ? 1.0f / sums.total[r] : 0.0f;
      if (params.log_sum_exp != nullptr && lane % 4 == 0 && row < params.L) {
        const float lse = sums.top[r] + __log2f(sums.total[r]) / params.log2_scale;
        params.log_sum_exp[(static_cast<int64_t>(at.batch) * params.H + at.head) * params.L + row] =
            sums.seen(r) ? lse : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] *= inv_total[i / 2 % 2];
    if (lane == 0) store_wait<0>();  // the last tile's, long done
    const auto store = [&](const CUtensorMap& map, bool rounding) {
#pragma unroll
      for (int p = 0; p < Shared::kPanels; ++p) {
        const int panel = rounding * Shared::kPanels + p;
        const uint32_t target = shared.output(panel % 2) + first * Shared::kPanelRowBytes;
        if (panel >= 2 && lane == 0) store_wait<1>();
        __syncwarp();
        const auto word = [&](int i, int) {
          const float* two = out + Shared::kPanelColumns / 2 * p + i;
          const uint32_t rounded = pack<T>(two[0], two[1]);
          return rounding ? pack<T>(two[0] - unpack<T>(rounded, 0), two[1] - unpack<T>(rounded, 1)) : rounded;
        };
        store_blocks<Shared::kPanelRowBytes>(target, Shared::kPanelColumns / 8, word);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) store_tile(&map, target, p * Shared::kPanelColumns, at.row + first, at.head, at.batch);
      }
    };
    store(maps.output, false);
    if (params.rounding != nullptr) store(maps.rounding, true);
  }
};

}  // namespace memformer_kernels
