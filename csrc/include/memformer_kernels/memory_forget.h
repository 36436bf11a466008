// What the launchers of memory_forget take. Plain C++: the bindings include it too.
//
// B batches, M slots, C channels. A pointer is to a contiguous tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "memformer_kernels/dtype.h"
#include "memformer_kernels/strided.h"

namespace memformer_kernels {

constexpr int kMemoryForgetMaxC = 8192;

struct MemoryForgetForwardParams {
  DType dtype;       // of every `void` pointer
  Strided<3> slots;  // [B, M, C]
  Strided<2> bias;   // [M, C]
  void* output;      // [B, M, C]
  float* inv_norm;   // [B, M]
  int64_t B, M;
  int C;
  float inv_eps;     // 1 / eps, a normal number
  cudaStream_t stream;
};

struct MemoryForgetBackwardParams {
  DType dtype;             // of every `void` pointer
  Strided<3> grad_output;  // [B, M, C]
  Strided<3> slots;        // [B, M, C]
  Strided<2> bias;         // [M, C]
  const float* inv_norm;   // [B, M], as the forward wrote it
  void* grad_slots;        // [B, M, C]
  void* grad_bias;         // [M, C]
  float* partial;          // [groups, M, C], scratch; unused when groups is 1
  int64_t groups;          // the batches are summed in so many groups of consecutive batches, none of them empty
  int64_t group_size;
  int64_t B, M;
  int C;
  float inv_eps;
  cudaStream_t stream;
};

extern "C" cudaError_t memory_forget_forward(const MemoryForgetForwardParams* params);
extern "C" cudaError_t memory_forget_backward(const MemoryForgetBackwardParams* params);

}  // namespace memformer_kernels
