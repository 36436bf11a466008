// The element types a kernel can be asked for. Plain C++: the bindings include it too.
#pragma once

namespace memformer_kernels {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace memformer_kernels
