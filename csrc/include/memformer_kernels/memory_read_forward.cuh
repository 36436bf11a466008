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

  // Of two rows of the tile, `row` and the eighth after it: the largest logit, the sum of the weights relative to it, in
  // `out` this thread's part of the sum of weight * value, and whether a key was seen.
  template <typename T, int kCount>
  __device__ __forceinline__ static void store(const Params& params, const AttentionTile& at, int row,
                                               const float (&top)[2], const float (&total)[2],
                                               const float (&out)[kCount], bool seen) {
    const int lane = threadIdx.x % 4;
    row += at.row;
#pragma unroll
    for (int r = 0; r < 2; ++r, row += 8) {
      const float inv_total = 1.0f / total[r];
      if (params.log_sum_exp != nullptr && lane == 0 && row < params.L) {
        const float lse = top[r] + __log2f(total[r]) / params.log2_scale;
        params.log_sum_exp[(static_cast<int64_t>(at.batch) * params.H + at.head) * params.L + row] = seen ? lse : 0.0f;
      }
      const int64_t offset = ((at.batch * params.L + row) * params.H + at.head) * params.D;
      const auto store_words = [&](void* target, int block, uint32_t(&words)[4]) {
        transpose_quad(words, lane);
        const int channel = (4 * block + lane) * 8;
        if (row >= params.L || channel >= params.D) return;
        T* to = static_cast<T*>(target) + offset + channel;
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      };
#pragma unroll
      for (int block = 0; block < kCount / 16; ++block) {
        uint32_t rounded[4], lost[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = (4 * block + j) * 4 + 2 * r;
          const float low = seen ? out[i] * inv_total : 0.0f, high = seen ? out[i + 1] * inv_total : 0.0f;
          rounded[j] = pack<T>(low, high);
          lost[j] = pack<T>(low - unpack<T>(rounded[j], 0), high - unpack<T>(rounded[j], 1));
        }
        store_words(params.output, block, rounded);
        if (params.rounding != nullptr) store_words(params.rounding, block, lost);
      }
    }
  }
};

}  // namespace memformer_kernels
