// memory_read, forward: what becomes of the attention of the tokens over the slots.
#pragma once

#include "memformer_kernels/attention_forward.cuh"
#include "memformer_kernels/memory_read.h"

namespace memformer_kernels {

constexpr int kWarpRows = kGroupRows / 4;

struct MemoryReadForward {
  using Params = MemoryReadForwardParams;
  static constexpr bool kChunks = false;
  __host__ __device__ static int64_t rows(const Params& params) { return params.L; }
  __host__ __device__ static int64_t keys(const Params& params) { return params.M; }
  __device__ static Mask mask(const Params& params) { return params.slot_mask; }

  template <typename Traits, typename Map>
  static void add_maps(const Params& params, AttentionMaps& maps, const Map& map) {
    const auto as_query = [&params](void* tensor) {
      return Strided<4>{tensor, {params.L * params.H * params.D, params.D, params.H * params.D, 1}};
    };
    map(&maps.output, as_query(params.output), params.L, kWarpRows);
    if (params.rounding != nullptr) map(&maps.rounding, as_query(params.rounding), params.L, kWarpRows);
  }

  // Of a warp's rows of the tile, from `first` on: this thread's part of the sum of weight * value is in `out`.
  template <typename T, int kCount, typename Shared>
  __device__ __forceinline__ static void store(const Params& params, const AttentionMaps& maps, const AttentionTile& at,
                                               int first, const AttentionSums& sums, const float (&out)[kCount],
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
    if (lane == 0) store_wait<0>();  // the last tile's, long done
    const auto store = [&](const CUtensorMap& map, bool rounding) {
#pragma unroll
      for (int p = 0; p < Shared::kPanels; ++p) {
        const int place = (rounding * Shared::kPanels + p) % 2;
        const uint32_t target = shared.output(place) + first * kPanelRowBytes;
        if (rounding && Shared::kPanels == 2 && lane == 0) store_wait<1>();
        __syncwarp();
#pragma unroll
        for (int block = 0; block < 8 && p * 8 + block < kCount / 4; block += 2) {
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* two = out + (p * 8 + block) * 4 + 2 * i;
            const float low = two[0] * inv_total[i % 2], high = two[1] * inv_total[i % 2];
            words[i] = pack<T>(low, high);
            if (rounding) words[i] = pack<T>(low - unpack<T>(words[i], 0), high - unpack<T>(words[i], 1));
          }
          store_matrices(target + lane % 16 * kPanelRowBytes + ((block + lane / 16) ^ lane % 8) * 16, words);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) store_tile(&map, target, p * kPanelColumns, at.row + first, at.head, at.batch);
      }
    };
    store(maps.output, false);
    if (params.rounding != nullptr) store(maps.rounding, true);
  }
};

}  // namespace memformer_kernels
