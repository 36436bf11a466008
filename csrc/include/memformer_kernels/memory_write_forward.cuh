// memory_write, forward: what becomes of the attention of the slots over the tokens of a chunk. The first chunk's takes
// the slot's own entry in.
#pragma once

#include "memformer_kernels/attention_forward.cuh"
#include "memformer_kernels/memory_write.h"

namespace memformer_kernels {

struct MemoryWriteForward {
  using Params = MemoryWriteForwardParams;
  static constexpr bool kChunks = true;
  __host__ __device__ static int64_t rows(const Params& params) { return params.M; }
  __host__ __device__ static int64_t keys(const Params& params) { return params.L; }
  __device__ static Mask mask(const Params& params) { return params.token_mask; }

  // Whether the slots, a row's own values, are copied into shared memory: those in 16 bits.
  __host__ __device__ static bool copies_own(const Params& params) { return params.slots_dtype == params.dtype; }

  template <typename Traits, typename Map>
  static void add_maps(const Params& params, AttentionMaps& maps, const Map& map) {
    map(&maps.own_key, params.own_key, params.M, Traits::kRows);
    if (copies_own(params)) map(&maps.own_value, params.slots, params.M, Traits::kRows);
  }

  // Elements of a slot.
  template <typename T>
  __device__ static const T* at_row(const Strided<4>& tensor, const AttentionTile& at, int row) {
    const int64_t(&stride)[4] = tensor.stride;
    return static_cast<const T*>(tensor.data) + at.batch * stride[0] + at.head * stride[1] + row * stride[2];
  }

  // The sum and the products of two elements each, in a word.
  template <typename T>
  __device__ __forceinline__ static float add_products(float sum, float two, float others) {
    const uint32_t a = __float_as_uint(two), b = __float_as_uint(others);
    return fmaf(unpack<T>(a, 1), unpack<T>(b, 1), fmaf(unpack<T>(a, 0), unpack<T>(b, 0), sum));
  }

  // Of the tile's row, by a thread, from query and own key in shared memory.
  template <typename T, typename Shared>
  __device__ __forceinline__ static void own_logit(const Params& params, const AttentionTile& at, int row,
                                                   uint32_t query, uint32_t own_key, const Shared& shared) {
    constexpr int kPairs = kPanelRowBytes / 8;  // of words
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < Shared::kPanels * kPairs; ++i) {
      const int place = i / kPairs * Shared::kQueryPanel + row * kPanelRowBytes + ((i % kPairs ^ row % 8 * 2) * 8);
      const float2 q = load_shared2(query + place), k = load_shared2(own_key + place);
      sum = add_products<T>(add_products<T>(sum, q.x, k.x), q.y, k.y);
    }
    store_shared(shared.own_logits() + 4 * row, sum);
    if (at.row + row < params.M) {
      params.own_logit[(at.batch * params.H + at.head) * params.M + at.row + row] = sum;
    }
  }

  // As memory_read's.
  template <typename T, int kCount, typename Shared>
  __device__ __forceinline__ static void store(const Params& params, const AttentionMaps&, const AttentionTile& at,
                                               int first, const AttentionSums& sums, const float (&out)[kCount],
                                               const Shared& shared) {
    const int lane = threadIdx.x % 4, channel = 2 * lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + threadIdx.x % kWarpSize / 4 + 8 * r, slot = at.row + row;
      if (slot >= params.M) continue;
      float best = sums.top[r], sum = sums.total[r], shrink = 1.0f, own_weight = 0.0f;
      if (at.chunk == 0) {
        const float own = load_shared(shared.own_logits() + 4 * row);
        best = fmaxf(sums.top[r], own);
        shrink = exp2_fast((sums.top[r] - best) * params.log2_scale);
        own_weight = exp2_fast((own - best) * params.log2_scale);
        sum = sum * shrink + own_weight;
      }
      if (lane == 0) {
        const int64_t place = ((at.chunk * params.B + at.batch) * params.H + at.head) * params.M + slot;
        params.top[place] = best;
        params.total[place] = sum;
      }
      float* acc = params.acc + (((at.chunk * params.B + at.batch) * params.M + slot) * params.H + at.head) * params.D;
      float2 own[kCount / 4] = {};  // all of them loaded before a store that they would have to wait for
      if (at.chunk == 0 && copies_own(params)) {
        const uint32_t values = shared.own() + row * kPanelRowBytes + 4 * lane;
        float words[kCount / 4];
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
          words[j] = load_shared(values + j / 8 * Shared::kQueryPanel + (j % 8 ^ row % 8) * 16);
        }
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
          const uint32_t word = __float_as_uint(words[j]);
          own[j] = {unpack<T>(word, 0), unpack<T>(word, 1)};
        }
      } else if (at.chunk == 0) {
        const float* values = at_row<float>(params.slots, at, slot) + channel;
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
          if (8 * j + channel < params.D) own[j] = *reinterpret_cast<const float2*>(values + 8 * j);
        }
      }
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        if (8 * j + channel >= params.D) break;
        const float* two = out + 4 * j + 2 * r;
        // Where nothing was seen, own to the sign of zero, which a sum with 0 loses.
        store_global(acc + channel + 8 * j, sums.seen(r) ? fmaf(two[0], shrink, own_weight * own[j].x) : own[j].x,
                     sums.seen(r) ? fmaf(two[1], shrink, own_weight * own[j].y) : own[j].y);
      }
    }
  }
};

}  // namespace memformer_kernels
