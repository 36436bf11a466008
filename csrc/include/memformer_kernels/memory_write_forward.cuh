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
    constexpr int kRowBytes = Shared::kPanelRowBytes, kPairs = kRowBytes / 8;  // of words
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < Shared::kPanels * kPairs; ++i) {
      const int pair = i % kPairs ^ row_swizzle<kRowBytes>(row) * 2;
      const int place = i / kPairs * Shared::kQueryPanel + row * kRowBytes + pair * 8;
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
    const int lane = fresh(threadIdx.x) % kWarpSize, channel = lane % 4 * 2, row = first + lane / 4;
    const int step = static_cast<int>(8 * params.H * params.D);  // from a thread's first row to its second
    TwoRows rows;
    float shrink[2], own_weight[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int slot = at.row + row + 8 * r;
      float best = sums.top[r], total = sums.total[r];
      if (at.chunk == 0) {
        const float own = load_shared(shared.own_logits() + 4 * (row + 8 * r));
        best = fmaxf(sums.top[r], own);
        shrink[r] = exp2_fast((sums.top[r] - best) * params.log2_scale);
        own_weight[r] = exp2_fast((own - best) * params.log2_scale);
        total = total * shrink[r] + own_weight[r];
      }
      rows.inside[r] = slot < params.M;
      if (lane % 4 == 0 && rows.inside[r]) {
        const int64_t place = ((at.chunk * params.B + at.batch) * params.H + at.head) * params.M + slot;
        params.top[place] = best;
        params.total[place] = total;
      }
    }
    const int64_t slot = (at.chunk * params.B + at.batch) * params.M + at.row + row;
    float* acc = params.acc + (slot * params.H + at.head) * params.D;
    if (at.chunk > 0) {
      store_rows(acc, step, rows, out, 1.0f, params.D);
    } else if (copies_own(params)) {
      constexpr int kRowBytes = Shared::kPanelRowBytes, kVectors = kRowBytes / 16;
      const int own_row = first + lane % kWarpRows;
      const uint32_t own = shared.own() + own_row * kRowBytes;
#pragma unroll
      for (int j = 0; j < kCount / 4; j += 2) {  // blocks of eight channels
        uint32_t words[4];
        const int vector = (j % kVectors + lane / 16) ^ row_swizzle<kRowBytes>(own_row);
        load_matrices(words, own + j / kVectors * Shared::kQueryPanel + vector * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = i % 2, block = j + i / 2;
          if (!rows.inside[r] || 8 * block + channel >= params.D) continue;
          const float2 value{unpack<T>(words[i], 0), unpack<T>(words[i], 1)};
          store_sum<Shared>(acc + r * step + 8 * block + channel, out + 4 * block + 2 * r, value, sums.seen(r),
                            shrink[r], own_weight[r]);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* own = at_row<float>(params.slots, at, at.row + row + 8 * r) + channel;
#pragma unroll
        for (int j = 0; j < kCount / 4; j += 4) {
          float2 values[4];  // loaded before a store that they would have to wait for
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool inside = rows.inside[r] && 8 * (j + i) + channel < params.D;
            if (inside) values[i] = *reinterpret_cast<const float2*>(own + 8 * (j + i));
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!rows.inside[r] || 8 * (j + i) + channel >= params.D) continue;
            store_sum<Shared>(acc + r * step + 8 * (j + i) + channel, out + 4 * (j + i) + 2 * r, values[i],
                              sums.seen(r), shrink[r], own_weight[r]);
          }
        }
      }
    }
  }

  // Of two channels. Where nothing was seen it is the row's own value to the sign of zero, which a sum with 0 loses.
  template <typename Shared>
  __device__ __forceinline__ static void store_sum(float* target, const float* sums, float2 own, bool seen,
                                                   float shrink, float own_weight) {
    const float x = fmaf(sums[0], shrink, own_weight * own.x), y = fmaf(sums[1], shrink, own_weight * own.y);
    store_global(target, !Shared::kMasked || seen ? x : own.x, !Shared::kMasked || seen ? y : own.y);
  }
};

}  // namespace memformer_kernels
