// memformer_kernels._C: the table of contents of the compiled module.
//
// Tensors arrive as addresses, with strides in elements; the Python side has checked and allocated them. Nothing here
// knows PyTorch, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "memformer_kernels/memory_forget.h"
#include "memformer_kernels/memory_read.h"
#include "memformer_kernels/memory_write.h"

namespace py = pybind11;
namespace mk = memformer_kernels;

// A pair of an address and strides.
template <int kDims, typename T>
struct pybind11::detail::type_caster<mk::Strided<kDims, T>> {
  using Tensor = mk::Strided<kDims, T>;
  using Pair = std::pair<uintptr_t, std::array<int64_t, kDims>>;
  PYBIND11_TYPE_CASTER(Tensor, const_name("tuple[int, tuple[int, ...]]"));
  bool load(handle source, bool convert) {
    make_caster<Pair> pair;
    if (!pair.load(source, convert)) return false;
    const auto [address, stride] = cast_op<Pair>(pair);
    value.data = reinterpret_cast<T*>(address);
    std::copy(stride.begin(), stride.end(), value.stride);
    return true;
  }
};

namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* function, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(function) + ": CUDA error: " + cudaGetErrorString(error));
  }
}

void memory_forget_forward(int dtype, mk::Strided<3> slots, mk::Strided<2> bias, Address output, Address inv_norm,
                           int64_t B, int64_t M, int C, float inv_eps, Address stream) {
  const mk::MemoryForgetForwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .slots = slots,
      .bias = bias,
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

void memory_forget_backward(int dtype, mk::Strided<3> grad_output, mk::Strided<3> slots, mk::Strided<2> bias,
                            Address inv_norm, Address grad_slots, Address grad_bias, Address partial, int64_t groups,
                            int64_t group_size, int64_t B, int64_t M, int C, float inv_eps, Address stream) {
  const mk::MemoryForgetBackwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .grad_output = grad_output,
      .slots = slots,
      .bias = bias,
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

void memory_read_forward(int dtype, mk::Strided<4> query, mk::Strided<4> key, mk::Strided<4> value, mk::Mask slot_mask,
                         Address output, Address log_sum_exp, Address rounding, int64_t B, int64_t H, int64_t L,
                         int64_t M, int D, float log2_scale, int multiprocessors, Address stream) {
  const mk::MemoryReadForwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .query = query,
      .key = key,
      .value = value,
      .slot_mask = slot_mask,
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

void memory_read_backward(int dtype, mk::Strided<4> grad_output, mk::Strided<4> query, mk::Strided<4> key,
                          mk::Strided<4> value, mk::Mask slot_mask, Address output, Address rounding,
                          Address log_sum_exp, Address statistics, Address carry, Address grad_query, Address grad_key,
                          Address grad_value, int64_t B, int64_t H, int64_t L, int64_t M, int D, int64_t chunk,
                          float scale, float log2_scale, Address stream) {
  const mk::MemoryReadBackwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .grad_output = grad_output,
      .query = query,
      .key = key,
      .value = value,
      .slot_mask = slot_mask,
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

void memory_write_forward(int dtype, int slots_dtype, mk::Strided<4> query, mk::Strided<4> own_key,
                          mk::Strided<4> slots, mk::Strided<4> key, mk::Strided<4> value, mk::Mask token_mask,
                          Address acc, Address top, Address total, Address own_logit, int64_t B, int64_t H, int64_t L,
                          int64_t M, int D, int64_t chunk, float log2_scale, int multiprocessors, Address stream) {
  const mk::MemoryWriteForwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .slots_dtype = static_cast<mk::DType>(slots_dtype),
      .query = query,
      .own_key = own_key,
      .slots = slots,
      .key = key,
      .value = value,
      .token_mask = token_mask,
      .acc = pointer<float>(acc),
      .top = pointer<float>(top),
      .total = pointer<float>(total),
      .own_logit = pointer<float>(own_logit),
      .B = B,
      .H = H,
      .L = L,
      .M = M,
      .D = D,
      .chunk = chunk,
      .log2_scale = log2_scale,
      .multiprocessors = multiprocessors,
      .stream = reinterpret_cast<cudaStream_t>(stream),
  };
  check("memory_write_forward", mk::memory_write_forward(&params));
}

void memory_write_backward(int dtype, mk::Strided<4> query, mk::Strided<4> du, mk::Strided<4> key, mk::Strided<4> value,
                           mk::Mask token_mask, Address log_sum_exp, Address delta, Address partial, Address grad_key,
                           Address grad_value, int64_t B, int64_t H, int64_t L, int64_t M, int D, int64_t chunk,
                           float scale, float log2_scale, int multiprocessors, Address stream) {
  const mk::MemoryWriteBackwardParams params{
      .dtype = static_cast<mk::DType>(dtype),
      .query = query,
      .du = du,
      .key = key,
      .value = value,
      .token_mask = token_mask,
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
  module.attr("memory_write_forward_tokens") = mk::kMemoryWriteForwardTokens;
  module.def("memory_write_forward", memory_write_forward, release_gil);
  module.attr("memory_write_backward_slots") = mk::kMemoryWriteBackwardSlots;
  module.def("memory_write_backward", memory_write_backward, release_gil);
  module.def("memory_read_backward", memory_read_backward, release_gil);
}
