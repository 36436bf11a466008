// What the launcher of memory_read takes. Plain C++: the bindings include it too.
//
// B batches, H heads, L tokens, M slots, D channels of a head. A pointer is to a contiguous tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "memformer_kernels/dtype.h"
#include "memformer_kernels/strided.h"

namespace memformer_kernels {

constexpr int kMemoryReadMaxD = 128;

struct MemoryReadForwardParams {
  DType dtype;         // of every `void` pointer: float16 or bfloat16
  Strided<4> query;    // [B, H, L, D], as key and value of whole vectors of 16 bytes: D a multiple of 8
  Strided<4> key;      // [B, H, M, D]
  Strided<4> value;    // [B, H, M, D]
  Mask slot_mask;      // [B, M]
  void* output;        // [B, L, H, D]
  float* log_sum_exp;  // [B, H, L]: of the scaled logits, over the scale; or null
  void* rounding;      // [B, L, H, D]: what the rounding of the output took away; or null
  int64_t B, H, L, M;
  int D;
  float log2_scale;    // scale * log2(e)
  int multiprocessors;
  cudaStream_t stream;
};

extern "C" cudaError_t memory_read_forward(const MemoryReadForwardParams* params);

// Tokens of a tile of the backward, to a whole number of which its statistics are padded.
constexpr int kMemoryReadBackwardTokens = 64;
// Slots that one block holds, which then needs neither output nor statistics; and that a cluster of them does: of more,
// `carry` takes the sum of the query's gradient from each group to the next.
constexpr int kMemoryReadBackwardAlone = 128;
constexpr int kMemoryReadBackwardSlots = 1024;

struct MemoryReadBackwardParams {
  DType dtype;               // of every `void` pointer but the two of sums: float16 or bfloat16
  Strided<4> grad_output;    // [B, H, L, D], as query, key and value of whole vectors of 16 bytes: D a multiple of 8
  Strided<4> query;          // [B, H, L, D]
  Strided<4> key;            // [B, H, M, D]
  Strided<4> value;          // [B, H, M, D]
  Mask slot_mask;            // [B, M]
  const void* output;        // [B, L, H, D]; null, as the next and statistics, up to 128 slots
  const void* rounding;      // [B, L, H, D]
  const float* log_sum_exp;  // [B, H, L]
  float* statistics;         // [B, H, tiles of tokens, 2, tokens of a tile]: workspace; or, without output and
                             // rounding, given: log_sum_exp, infinite past the end, and delta
  float* carry;              // [B, L, H, D]: workspace; or null for one group of slots
  void* grad_query;          // [B, L, H, D]; or null: carry gets it, not yet scaled
  void* grad_key;            // [B, M, H, D], or float sums of chunks [chunks, B, M, H, D]
  void* grad_value;          // like grad_key
  int64_t B, H, L, M;
  int D;
  int64_t chunk;             // tokens that a sum is over, a whole number of tiles
  float scale, log2_scale;
  cudaStream_t stream;
};

extern "C" cudaError_t memory_read_backward(const MemoryReadBackwardParams* params);

}  // namespace memformer_kernels
