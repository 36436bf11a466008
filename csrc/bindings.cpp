// memformer_kernels._C: the table of contents of the compiled module.
//
// Tensors arrive as addresses and strides in elements; the Python side has checked and allocated them. Nothing here
// knows PyTorch, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "memformer_kernels/memory_forget.h"
#include "memformer_kernels/memory_read.h"
#include "memformer_kernels/memory_write.h"

namespace py = pybind11;
namespace mk = memformer_kernels;

namespace {

using Address = uintptr_t;
using Stride2 = std::array<int64_t, 2>;
using Stride3 = std::array<int64_t, 3>;
using Stride4 = std::array<int64_t, 4>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* function, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(function) + ": CUDA error: " + cudaGetErrorString(error));
  }
}

void memory_forget_forward(int dtype, Address slots, Stride3 slots_stride, Address bias, Stride2 bias_stride,
                           Address output, Address inv_norm, int64_t B, int64_t M, int C, float inv_eps,
                           Address stream) {
  const mk::MemoryForgetForwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .slots = pointer(slots),
      .slots_stride = {slots_stride[0], slots_stride[1], slots_stride[2]},
      .bias = pointer(bias),
      .bias_stride = {bias_stride[0], bias_stride[1]},
      .output = pointer(output),
      .inv_norm = pointer<float>(inv_norm),
      .B = B,
      .M = M,
      .C = C,
      .inv_eps = inv_eps,
      .stream = reinterpret_cast<cudaStream_t>(stream),
  };
  check("memory_forget_forward", mk::memory_forget_forward(&params));
}

void memory_forget_backward(int dtype, Address grad_output, Stride3 grad_output_stride, Address slots,
                            Stride3 slots_stride, Address bias, Stride2 bias_stride, Address inv_norm,
                            Address grad_slots, Address grad_bias, Address partial, int64_t groups, int64_t group_size,
                            int64_t B, int64_t M, int C, float inv_eps, Address stream) {
  const mk::MemoryForgetBackwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .grad_output = pointer(grad_output),
      .grad_output_stride = {grad_output_stride[0], grad_output_stride[1], grad_output_stride[2]},
      .slots = pointer(slots),
      .slots_stride = {slots_stride[0], slots_stride[1], slots_stride[2]},
      .bias = pointer(bias),
      .bias_stride = {bias_stride[0], bias_stride[1]},
      .inv_norm = pointer<const float>(inv_norm),
      .grad_slots = pointer(grad_slots),
      .grad_bias = pointer(grad_bias),
      .partial = pointer<float>(partial),
      .groups = groups,
      .group_size = group_size,
      .B = B,
      .M = M,
      .C = C,
      .inv_eps = inv_eps,
      .stream = reinterpret_cast<cudaStream_t>(stream),
  };
  check("memory_forget_backward", mk::memory_forget_backward(&params));
}

void memory_read_forward(int dtype, Address query, Stride4 query_stride, Address key, Stride4 key_stride,
                         Address value, Stride4 value_stride, Address slot_mask, Stride2 slot_mask_stride,
                         Address output, Address log_sum_exp, Address rounding, int64_t B, int64_t H, int64_t L,
                         int64_t M, int D, float log2_scale, int multiprocessors, Address stream) {
  const mk::MemoryReadForwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .query = pointer(query),
      .query_stride = {query_stride[0], query_stride[1], query_stride[2], query_stride[3]},
      .key = pointer(key),
      .key_stride = {key_stride[0], key_stride[1], key_stride[2], key_stride[3]},
      .value = pointer(value),
      .value_stride = {value_stride[0], value_stride[1], value_stride[2], value_stride[3]},
      .slot_mask = pointer<const uint8_t>(slot_mask),
      .slot_mask_stride = {slot_mask_stride[0], slot_mask_stride[1]},
      .output = pointer(output),
      .log_sum_exp = pointer<float>(log_sum_exp),
      .rounding = pointer(rounding),
      .B = B,
      .H = H,
      .L = L,
      .M = M,
      .D = D,
      .log2_scale = log2_scale,
      .multiprocessors = multiprocessors,
      .stream = reinterpret_cast<cudaStream_t>(stream),
  };
  check("memory_read_forward", mk::memory_read_forward(&params));
}

void memory_read_backward(int dtype, Address grad_output, Stride4 grad_output_stride, Address query,
                          Stride4 query_stride, Address key, Stride4 key_stride, Address value, Stride4 value_stride,
                          Address slot_mask, Stride2 slot_mask_stride, Address output, Address rounding,
                          Address log_sum_exp, Address statistics, Address carry, Address grad_query, Address grad_key,
                          Address grad_value, int64_t B, int64_t H, int64_t L, int64_t M, int D, int64_t chunk,
                          float scale, float log2_scale, Address stream) {
  const mk::MemoryReadBackwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .grad_output = pointer(grad_output),
      .grad_output_stride = {grad_output_stride[0], grad_output_stride[1], grad_output_stride[2],
                             grad_output_stride[3]},
      .query = pointer(query),
      .query_stride = {query_stride[0], query_stride[1], query_stride[2], query_stride[3]},
      .key = pointer(key),
      .key_stride = {key_stride[0], key_stride[1], key_stride[2], key_stride[3]},
      .value = pointer(value),
      .value_stride = {value_stride[0], value_stride[1], value_stride[2], value_stride[3]},
      .slot_mask = pointer<const uint8_t>(slot_mask),
      .slot_mask_stride = {slot_mask_stride[0], slot_mask_stride[1]},
      .output = pointer(output),
      .rounding = pointer(rounding),
      .log_sum_exp = pointer<const float>(log_sum_exp),
      .statistics = pointer<float>(statistics),
      .carry = pointer<float>(carry),
      .grad_query = pointer(grad_query),
      .grad_key = pointer(grad_key),
      .grad_value = pointer(grad_value),
      .B = B,
      .H = H,
      .L = L,
      .M = M,
      .D = D,
      .chunk = chunk,
      .scale = scale,
      .log2_scale = log2_scale,
      .stream = reinterpret_cast<cudaStream_t>(stream),
  };
  check("memory_read_backward", mk::memory_read_backward(&params));
}

void memory_write_backward(int dtype, Address query, Stride4 query_stride, Address du, Stride4 du_stride, Address key,
                           Stride4 key_stride, Address value, Stride4 value_stride, Address token_mask,
                           Stride2 token_mask_stride, Address log_sum_exp, Address delta, Address partial,
                           Address grad_key, Address grad_value, int64_t B, int64_t H, int64_t L, int64_t M, int D,
                           int64_t chunk, float scale, float log2_scale, int multiprocessors, Address stream) {
  const mk::MemoryWriteBackwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .query = pointer(query),
      .query_stride = {query_stride[0], query_stride[1], query_stride[2], query_stride[3]},
      .du = pointer(du),
      .du_stride = {du_stride[0], du_stride[1], du_stride[2], du_stride[3]},
      .key = pointer(key),
      .key_stride = {key_stride[0], key_stride[1], key_stride[2], key_stride[3]},
      .value = pointer(value),
      .value_stride = {value_stride[0], value_stride[1], value_stride[2], value_stride[3]},
      .token_mask = pointer<const uint8_t>(token_mask),
      .token_mask_stride = {token_mask_stride[0], token_mask_stride[1]},
      .log_sum_exp = pointer<const float>(log_sum_exp),
      .delta = pointer<const float>(delta),
      .partial = pointer<float>(partial),
      .grad_key = pointer(grad_key),
      .grad_value = pointer(grad_value),
      .B = B,
      .H = H,
      .L = L,
      .M = M,
      .D = D,
      .chunk = chunk,
      .scale = scale,
      .log2_scale = log2_scale,
      .multiprocessors = multiprocessors,
      .stream = reinterpret_cast<cudaStream_t>(stream),
  };
  check("memory_write_backward", mk::memory_write_backward(&params));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  const auto release_gil = py::call_guard<py::gil_scoped_release>();

  module.doc() = "CUDA kernels of memformer_kernels. Called by ops/<op>/cuda.py; addresses are not checked here.";
  module.attr("architectures") = MEMFORMER_KERNELS_ARCHITECTURES;
  constexpr int kMajor = CUDART_VERSION / 1000, kMinor = CUDART_VERSION % 1000 / 10;
  module.attr("cuda_version") = std::to_string(kMajor) + "." + std::to_string(kMinor);

  module.attr("float32") = static_cast<int>(mk::DType::kFloat32);
  module.attr("float16") = static_cast<int>(mk::DType::kFloat16);
  module.attr("bfloat16") = static_cast<int>(mk::DType::kBFloat16);

  module.attr("memory_forget_max_width") = mk::kMemoryForgetMaxC;
  module.def("memory_forget_forward", memory_forget_forward, release_gil);
  module.def("memory_forget_backward", memory_forget_backward, release_gil);

  module.attr("memory_read_max_channels") = mk::kMemoryReadMaxD;
  module.def("memory_read_forward", memory_read_forward, release_gil);
  module.attr("memory_read_backward_tokens") = mk::kMemoryReadBackwardTokens;
  module.attr("memory_read_backward_slots") = mk::kMemoryReadBackwardSlots;
  module.attr("memory_write_backward_slots") = mk::kMemoryWriteBackwardSlots;
  module.def("memory_write_backward", memory_write_backward, release_gil);
  module.def("memory_read_backward", memory_read_backward, release_gil);
}
