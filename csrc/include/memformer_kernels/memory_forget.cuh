// Biased memory normalisation: the kernels. A row is one slot of one batch, C channels.
//
//   forward    z = slots + bias        n = max(||z||, eps)        output = z / n        inv_norm = 1 / n
//
//   backward   y = z / n        dz = (g - y * dot(y, g)) / n  where ||z|| > eps,  g / n  where eps stands for the norm
//              grad_slots = dz        grad_bias[m] = sum of dz[b, m] over b
//
// A row is read once and stays in registers, 16 elements a thread, so C alone says how many threads share a row and in
// which order they add: its bits depend on nothing but the row. Two rows of one slot are in flight at a time where that
// hides the latency of memory: they share one read of the bias.
#pragma once

#include <cfloat>

#include "memformer_kernels/common.cuh"
#include "memformer_kernels/memory_forget.h"

namespace memformer_kernels {

constexpr int kElementsPerThread = 16;
constexpr int kWarpChannels = kElementsPerThread * kWarpSize;  // of a row that one warp holds

// Rows of one slot that are in flight together, and the threads that leave registers for them (65,536 a block): 256
// threads hold rows of 4096 channels, 512 a single row of 8192. With 1024 threads a row, its gradient and the gradient
// of the bias would not fit in the 64 registers of each.
constexpr int kForwardRows = 2;  // up to kWarpChannels; of wider rows a block has one: docs/notebook.md
constexpr int kBackwardRows = 2;
template <int kRows>
constexpr int kThreadLimit = kRows > 1 ? 256 : 512;
template <int kRows>
constexpr int kWidthLimit = kThreadLimit<kRows> * kElementsPerThread;
static_assert(kWidthLimit<1> == kMemoryForgetMaxC, "the widest row fills a block");

// threadIdx.x walks a row, threadIdx.y the slots of the block. Rows of several warps have a block to themselves.
inline dim3 block_shape(int C) {
  const unsigned threads = ceil_div(C, kWarpChannels) * kWarpSize;
  const unsigned slots = threads == kWarpSize ? 4 : 1;
  return dim3(threads, slots);
}

// The part of a row that one thread holds, as stored.
template <typename T>
struct RowFragment {
  static constexpr int kVectors = kElementsPerThread / Vector<T>::kSize;
  static_assert(kVectors * Vector<T>::kSize == kElementsPerThread, "a thread holds whole vectors");
  Vector<T> vector[kVectors];

  // The channel of element i. A warp holds 512 consecutive channels, and its lanes neighbouring vectors, also where
  // elements are accessed one by one, so that the layout of a tensor never changes a bit of the result.
  __device__ __forceinline__ static int channel(int i) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int vector = i / Vector<T>::kSize * kWarpSize + lane;
    return warp * kWarpChannels + vector * Vector<T>::kSize + i % Vector<T>::kSize;
  }

  template <bool kVectorized>
  __device__ __forceinline__ void load(const void* data, int64_t offset, int64_t stride, int C) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const T* row = static_cast<const T*>(data) + offset;
      vector[j] = load_vector<kVectorized>(row, stride, channel(j * Vector<T>::kSize), C);
    }
  }

  template <bool kVectorized>
  __device__ __forceinline__ void store(void* data, int64_t offset, int C) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      store_vector<kVectorized>(static_cast<T*>(data) + offset, channel(j * Vector<T>::kSize), C, vector[j]);
    }
  }

  __device__ __forceinline__ float get(int i) const {
    return to_float(vector[i / Vector<T>::kSize].get(i % Vector<T>::kSize));
  }
  __device__ __forceinline__ void set(int i, float value) {
    vector[i / Vector<T>::kSize].set(i % Vector<T>::kSize, from_float<T>(value));
  }
};

// Every finite row has a finite result. The sum of squares of a row with a norm above 2^64 overflows, and one below
// 2^-100 may miss squares that were rounded as subnormals (C * 2^-150 in all, 2^-37 of it): such a row is summed again,
// shrunk or grown by a power of two that is right for all of them.
constexpr float kSmallestSum = 0x1p-100f;
constexpr float kShrink = 0x1p-72f;
constexpr float kGrow = 0x1p100f;

template <int kRows>
__device__ __forceinline__ void sums_of_squares(const float (&z)[kRows][kElementsPerThread],
                                                const float (&scale)[kRows], float (&sum)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      const float scaled = z[r][i] * scale[r];
      sum[r] = fmaf(scaled, scaled, sum[r]);
    }
  }
  sum_over_row(sum);
}

// inv_norm = 1 / max(||z||, eps), of kRows rows at once. The threads of a row see the same sums, so they take the same
// branches. A row with NaN gets NaN, one with Inf gets 0.
template <int kRows>
__device__ __forceinline__ void inverse_norms(const float (&z)[kRows][kElementsPerThread], float inv_eps,
                                              float (&inv_norm)[kRows]) {
  float scale[kRows], sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) scale[r] = 1.0f;
  sums_of_squares(z, scale, sum);

  bool any_extreme = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (sum[r] > FLT_MAX) scale[r] = kShrink;
    if (sum[r] < kSmallestSum) scale[r] = kGrow;
    any_extreme = any_extreme || scale[r] != 1.0f;
  }
  if (any_extreme) sums_of_squares(z, scale, sum);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    inv_norm[r] = __frsqrt_rn(sum[r]) * scale[r];
    if (inv_norm[r] > inv_eps) inv_norm[r] = inv_eps;  // the inverse of 0 is Inf and becomes 1 / eps; NaN stays
  }
}

// Splits inv_norm into scale * inverse and makes z / n = z * inverse precise. The inverse of a norm above 2^126 is
// subnormal and has few bits: such a row is shrunk in place, and `inverse` is that of the shrunk row. All others have
// scale = 1.
template <int kRows>
__device__ __forceinline__ void shrink_huge_rows(const float (&inv_norm)[kRows],
                                                 float (&z)[kRows][kElementsPerThread], float (&scale)[kRows],
                                                 float (&inverse)[kRows]) {
  bool any_huge = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    scale[r] = 1.0f;
    inverse[r] = inv_norm[r];
    any_huge = any_huge || inv_norm[r] < FLT_MIN;
  }
  if (!any_huge) return;

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!(inv_norm[r] < FLT_MIN)) continue;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) z[r][i] *= kShrink;
  }
  float sum[kRows];
  sums_of_squares(z, scale, sum);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!(inv_norm[r] < FLT_MIN)) continue;
    scale[r] = kShrink;
    inverse[r] = __frsqrt_rn(sum[r]);
  }
}

template <typename T, bool kVectorized, int kRows>
__global__ void __launch_bounds__(kThreadLimit<kRows>, 1)
    memory_forget_forward_kernel(const __grid_constant__ MemoryForgetForwardParams params) {
  const unsigned slot_blocks = ceil_div<unsigned>(params.M, blockDim.y);
  const int64_t m = static_cast<int64_t>(blockIdx.x % slot_blocks) * blockDim.y + threadIdx.y;
  const int64_t first_batch = static_cast<int64_t>(blockIdx.x / slot_blocks) * kRows;
  if (m >= params.M) return;  // a whole warp, in a block that never meets at its barrier

  RowFragment<T> bias, slots[kRows];
  bias.template load<kVectorized>(params.bias.data, m * params.bias.stride[0], params.bias.stride[1], params.C);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = min(first_batch + r, params.B - 1);  // the last batch may be read twice; it is stored once
    const int64_t offset = b * params.slots.stride[0] + m * params.slots.stride[1];
    slots[r].template load<kVectorized>(params.slots.data, offset, params.slots.stride[2], params.C);
  }

  float z[kRows][kElementsPerThread];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) z[r][i] = slots[r].get(i) + bias.get(i);
  }
  float inv_norm[kRows], scale[kRows], inverse[kRows];
  inverse_norms(z, params.inv_eps, inv_norm);
  shrink_huge_rows(inv_norm, z, scale, inverse);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = first_batch + r;
    if (b >= params.B) return;
    const int64_t row = b * params.M + m;
    RowFragment<T> output;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) output.set(i, z[r][i] * inverse[r]);
    output.template store<kVectorized>(params.output, row * params.C, params.C);
    if (threadIdx.x == 0) params.inv_norm[row] = inv_norm[r];
  }
}

// A team of blockDim.x threads owns one slot of one group of batches. It walks the batches in order with the gradient
// of the bias in registers, so every sum has one owner and one order: no atomics, the same bits in every run.
template <typename T, bool kVectorized, int kRows>
__global__ void __launch_bounds__(kThreadLimit<kRows>, 1)
    memory_forget_backward_kernel(const __grid_constant__ MemoryForgetBackwardParams params) {
  const unsigned slot_blocks = ceil_div<unsigned>(params.M, blockDim.y);
  const int64_t m = static_cast<int64_t>(blockIdx.x % slot_blocks) * blockDim.y + threadIdx.y;
  const int64_t group = blockIdx.x / slot_blocks;
  const int64_t end = min((group + 1) * params.group_size, params.B);
  if (m >= params.M) return;  // a whole warp, in a block that never meets at its barrier

  float grad_bias[kElementsPerThread] = {};
  for (int64_t first_batch = group * params.group_size; first_batch < end; first_batch += kRows) {
    RowFragment<T> slots[kRows], grad[kRows], bias;
    float inv_norm[kRows], scale[kRows], inverse[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t b = min(first_batch + r, end - 1);  // the last batch may be read twice; it is used once
      slots[r].template load<kVectorized>(params.slots.data, b * params.slots.stride[0] + m * params.slots.stride[1],
                                          params.slots.stride[2], params.C);
      grad[r].template load<kVectorized>(params.grad_output.data,
                                         b * params.grad_output.stride[0] + m * params.grad_output.stride[1],
                                         params.grad_output.stride[2], params.C);
      inv_norm[r] = params.inv_norm[b * params.M + m];
    }
    // read again for every few rows, out of the cache: registers are what limits the rows in flight
    bias.template load<kVectorized>(params.bias.data, m * params.bias.stride[0], params.bias.stride[1], params.C);

    float z[kRows][kElementsPerThread];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kElementsPerThread; ++i) z[r][i] = slots[r].get(i) + bias.get(i);
    }
    shrink_huge_rows(inv_norm, z, scale, inverse);

    float dot[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      dot[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kElementsPerThread; ++i) dot[r] = fmaf(z[r][i] * inverse[r], grad[r].get(i), dot[r]);
    }
    sum_over_row(dot);

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t b = first_batch + r;
      if (b >= end) break;
      const bool eps_is_the_norm = inv_norm[r] >= params.inv_eps;
      if (eps_is_the_norm) dot[r] = 0.0f;
      RowFragment<T> grad_slots;
#pragma unroll
      for (int i = 0; i < kElementsPerThread; ++i) {
        const float y = z[r][i] * inverse[r];
        const float dz = fmaf(-y, dot[r], grad[r].get(i)) * inverse[r] * scale[r];
        grad_slots.set(i, dz);
        grad_bias[i] += dz;
      }
      grad_slots.template store<kVectorized>(params.grad_slots, (b * params.M + m) * params.C, params.C);
    }
  }

  // a group's sum stays in float; the sum over all batches is stored as the bias is
  const int64_t row = group * params.M + m;
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) {
    const int c = RowFragment<T>::channel(i);
    if (c >= params.C) continue;
    if (params.groups == 1) {
      static_cast<T*>(params.grad_bias)[row * params.C + c] = from_float<T>(grad_bias[i]);
    } else {
      params.partial[row * params.C + c] = grad_bias[i];
    }
  }
}

// grad_bias = the sum of partial [groups, size] over the groups, in their order; one thread an element.
constexpr int kBiasThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kBiasThreads)
    memory_forget_backward_bias_kernel(const float* partial, T* grad_bias, int64_t groups, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 8  // loads in flight
  for (int64_t group = 0; group < groups; ++group) sum += partial[group * size + i];
  grad_bias[i] = from_float<T>(sum);
}

}  // namespace memformer_kernels
