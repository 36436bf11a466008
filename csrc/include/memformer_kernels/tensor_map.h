// Maps of tensors for TMA, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "memformer_kernels/dtype.h"
#include "memformer_kernels/strided.h"

namespace memformer_kernels {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function that makes a map, found without linking to it.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
  }();
  return function;
}

// Whether TMA can copy it: rows of whole vectors of 16 bytes at positive strides.
inline bool tensor_map_takes(const Strided<4>& tensor, int64_t B, int64_t H, int64_t rows) {
  const int64_t sizes[3] = {B, H, rows};
  const auto& stride = tensor.stride;
  bool takes = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && stride[3] == 1;
  for (int i = 0; i < 3; ++i) {  // along a size of 1 nothing moves, whatever the stride
    takes = takes && (sizes[i] == 1 || (stride[i] > 0 && stride[i] < int64_t{1} << 38 && stride[i] % 8 == 0));
  }
  return takes;
}

// A contiguous [B, rows, H, D] as [B, H, rows, D].
inline Strided<4> heads_of_rows(void* data, int64_t rows, int64_t H, int64_t D) {
  return {data, {rows * H * D, D, H * D, 1}};
}

// Of [B, H, rows, D] in 16 bits, in boxes of so many rows and channels, 64 or 32, swizzled by as many bytes as a row
// has. The driver refuses it in a thread that has no context yet: call the runtime before, which binds one.
inline cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const Strided<4>& tensor, int64_t B, int64_t H,
                                   int64_t rows, int64_t D, int box_rows, int box_channels = 64) {
  if (!tensor_map_takes(tensor, B, H, rows)) return cudaErrorInvalidValue;
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {cuuint64_t(D), cuuint64_t(rows), cuuint64_t(H), cuuint64_t(B)};
  const auto bytes = [](int64_t size, int64_t elements) { return cuuint64_t(size == 1 ? 16 : 2 * elements); };
  const cuuint64_t strides[3] = {bytes(rows, tensor.stride[2]), bytes(H, tensor.stride[1]),
                                bytes(B, tensor.stride[0])};
  const cuuint32_t box[4] = {cuuint32_t(box_channels), cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto swizzle = box_channels == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result =
      encode(map, type, 4, const_cast<void*>(tensor.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace memformer_kernels
