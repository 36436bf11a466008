// Element types, 16-byte accesses and sums over a row: what the kernels of every op need.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memformer_kernels/dtype.h"
#include "memformer_kernels/strided.h"

namespace memformer_kernels {

constexpr int kWarpSize = 32;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kMaxWarpsPerBlock = kMaxThreadsPerBlock / kWarpSize;
constexpr int64_t kMaxBlocks = INT32_MAX;  // along x

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer numerator, Integer denominator) {
  return (numerator + denominator - 1) / denominator;
}

// The upper half of the product.
__host__ __device__ inline uint32_t upper_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#endif
}

// Divides what is below 2^31 by a number that the host knows, with two products instead of a division. (Granlund and
// Montgomery, Division by invariant integers using multiplication, 1994)
struct Divisor {
  uint32_t number, multiplier, shift;
  explicit Divisor(int64_t number) : number(static_cast<uint32_t>(number)), shift(0) {
    while (int64_t{1} << shift < number) ++shift;
    multiplier = static_cast<uint32_t>(ceil_div(int64_t{1} << (31 + shift), number));
  }
  // Leaves the quotient and returns the rest.
  __host__ __device__ __forceinline__ int split(int& value) const {
    const uint32_t dividend = static_cast<uint32_t>(value), quotient = upper_product(2 * dividend, multiplier) >> shift;
    value = static_cast<int>(quotient);
    return static_cast<int>(dividend - quotient * number);
  }
};

// Elements are stored as T and computed in float.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

// Two elements in a word, the first in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ float unpack(uint32_t bits, int which) {
  const uint16_t half = static_cast<uint16_t>(bits >> (16 * which));
  T value;
  memcpy(&value, &half, sizeof(value));
  return to_float(value);
}

// 2^x; what would be denormal is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Calls `launch` with a value of the C++ type of `dtype`; only its type matters.
template <typename Launch>
cudaError_t dispatch(DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFloat32: return launch(float{});
    case DType::kFloat16: return launch(__half{});
    case DType::kBFloat16: return launch(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

constexpr int kAccessBytes = 16;  // the widest a thread can make

// Consecutive elements of a row, as stored. They are kept as the four registers they are loaded into, and taken apart
// only where they are used: an array of 16-bit elements would take a register for each.
template <typename T>
struct Vector {
  static constexpr int kSize = kAccessBytes / sizeof(T);
  static_assert(kSize * sizeof(T) == kAccessBytes && sizeof(uint4) == kAccessBytes, "an access holds whole elements");
  uint4 bits = {0, 0, 0, 0};

  // `i` must be known at compile time once loops are unrolled.
  __device__ __forceinline__ T get(int i) const {
    T element[kSize];
    memcpy(element, &bits, kAccessBytes);
    return element[i];
  }
  __device__ __forceinline__ void set(int i, T value) {
    T element[kSize];
    memcpy(element, &bits, kAccessBytes);
    element[i] = value;
    memcpy(&bits, element, kAccessBytes);
  }
};

// Elements [first, first + kSize) of a row of C; those past its end read as 0, which adds nothing to a sum.
// The vectorised form needs C to be a multiple of kSize, so that a vector is inside the row or past it.
template <bool kVectorized, typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t stride, int first, int C) {
  Vector<T> vector;
  if constexpr (kVectorized) {
    if (first < C) vector.bits = *reinterpret_cast<const uint4*>(row + first);
  } else {
    const T* element = row + first * stride;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i, element += stride) {
      if (first + i < C) vector.set(i, *element);
    }
  }
  return vector;
}

template <bool kVectorized, typename T>
__device__ __forceinline__ void store_vector(T* row, int first, int C, const Vector<T>& vector) {
  if constexpr (kVectorized) {
    if (first < C) *reinterpret_cast<uint4*>(row + first) = vector.bits;
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      if (first + i < C) row[first + i] = vector.get(i);
    }
  }
}

// Whether every row of a tensor is contiguous and starts on a 16-byte boundary.
template <typename T, int kDims>
bool has_vector_rows(const Strided<kDims>& tensor) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % kAccessBytes == 0 && tensor.stride[kDims - 1] == 1;
  for (int i = 0; i < kDims - 1; ++i) aligned = aligned && tensor.stride[i] % Vector<T>::kSize == 0;
  return aligned;
}

// Adds `value[r]` up over the blockDim.x threads of a row, for kRows rows at once. Every thread gets the same bits: the
// order is fixed, a butterfly in the warp and then the warps one after the other. A row of several warps must have the
// block to itself, because they meet at the block's barrier.
template <int kRows>
__device__ __forceinline__ void sum_over_row(float (&value)[kRows]) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) value[r] += __shfl_xor_sync(0xffffffffu, value[r], offset);
  }
  const int warps = blockDim.x / kWarpSize;
  if (warps == 1) return;

  __shared__ float warp_sum[kMaxWarpsPerBlock][kRows];
  __syncthreads();  // the sums of an earlier call have been read
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) warp_sum[threadIdx.x / kWarpSize][r] = value[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) value[r] = warp_sum[0][r];
#pragma unroll 1
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) value[r] += warp_sum[warp][r];
  }
}

}  // namespace memformer_kernels
