// What the launcher of memory_write takes. Plain C++: the bindings include it too.
//
// B batches, H heads, L tokens, M slots, D channels of a head. A pointer is to a contiguous tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "memformer_kernels/dtype.h"
#include "memformer_kernels/strided.h"

namespace memformer_kernels {

struct MemoryWriteForwardParams {
  DType dtype;         // of every `void` pointer but slots': float16 or bfloat16
  DType slots_dtype;   // or float32
  Strided<4> query;    // [B, H, M, D], as the other four of whole vectors of 8 elements: D a multiple of 8
  Strided<4> own_key;  // [B, H, M, D]
  Strided<4> slots;    // [B, H, M, D]
  Strided<4> key;      // [B, H, L, D]
  Strided<4> value;    // [B, H, L, D]
  Mask token_mask;     // [B, L]
  float* acc;          // [chunks, B, M, H, D]: sum of weight * value
  float* top;          // [chunks, B, H, M]: the largest logit
  float* total;        // [chunks, B, H, M]: sum of the weights
  float* own_logit;    // [B, H, M]
  int64_t B, H, L, M;
  int D;
  int64_t chunk;       // tokens that a sum is over, a whole number of tiles of kMemoryWriteForwardTokens
  float log2_scale;    // scale * log2(e)
  int multiprocessors;
  cudaStream_t stream;
};

constexpr int kMemoryWriteForwardTokens = 128;

extern "C" cudaError_t memory_write_forward(const MemoryWriteForwardParams* params);

constexpr int kMemoryWriteBackwardSlots = 128;  // that a block holds

struct MemoryWriteBackwardParams {
  DType dtype;               // of every `void` pointer: float16 or bfloat16
  Strided<4> query;          // [B, H, M, D], as du, key and value of whole vectors of 16 bytes: D a multiple of 8
  Strided<4> du;             // [B, H, M, D]: gradient of what the slots attended to
  Strided<4> key;            // [B, H, L, D]
  Strided<4> value;          // [B, H, L, D]
  Mask token_mask;           // [B, L]
  const float* log_sum_exp;  // [B, H, M]: of the scaled logits, over the scale
  const float* delta;        // [B, H, M]
  float* partial;            // [chunks, B, M, H, D]: ds key
  void* grad_key;            // [B, L, H, D]
  void* grad_value;          // [B, L, H, D]
  int64_t B, H, L, M;
  int D;
  int64_t chunk;             // tokens that a sum is over, a whole number of tiles of 64
  float scale, log2_scale;
  int multiprocessors;
  cudaStream_t stream;
};

extern "C" cudaError_t memory_write_backward(const MemoryWriteBackwardParams* params);

}  // namespace memformer_kernels
