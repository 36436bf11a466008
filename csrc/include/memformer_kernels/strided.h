// A tensor of any layout, as a kernel is given it. Plain C++: the bindings include it too.
#pragma once

#include <cstdint>

namespace memformer_kernels {

template <int kDims, typename T = const void>
struct Strided {
  T* data;
  int64_t stride[kDims];  // in elements, in the order of the shape
};
using Mask = Strided<2, const uint8_t>;  // what is visible, or null

}  // namespace memformer_kernels
