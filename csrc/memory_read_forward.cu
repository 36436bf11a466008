// memory_read, forward: which kernel runs, and its launch.
#include "memformer_kernels/memory_read.cuh"

namespace memformer_kernels {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function that makes the map of a tensor for TMA, found without linking to it.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
  }();
  return function;
}

// Of [B, H, rows, D], in boxes of so many rows and 64 channels.
cudaError_t make_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&stride)[4], int64_t B, int64_t H,
                     int64_t rows, int64_t D, int box_rows) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {cuuint64_t(D), cuuint64_t(rows), cuuint64_t(H), cuuint64_t(B)};
  const auto bytes = [](int64_t size, int64_t elements) { return cuuint64_t(size == 1 ? 16 : 2 * elements); };
  const cuuint64_t strides[3] = {bytes(rows, stride[2]), bytes(H, stride[1]), bytes(B, stride[0])};
  const cuuint32_t box[4] = {kPanelColumns, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Traits>
cudaError_t launch_kernel(const MemoryReadForwardParams& params) {
  CUtensorMap query{}, key{}, value{};
  if constexpr (!Traits::kGeneral) {
    const auto map = [&params](CUtensorMap* map, const void* data, const int64_t (&stride)[4], int64_t rows, int box) {
      return make_map(map, params.dtype, data, stride, params.B, params.H, rows, params.D, box);
    };
    cudaError_t error = map(&query, params.query, params.query_stride, params.L, Traits::kRows);
    if (error == cudaSuccess) error = map(&key, params.key, params.key_stride, params.M, Traits::kSlots);
    if (error == cudaSuccess) error = map(&value, params.value, params.value_stride, params.M, Traits::kSlots);
    if (error != cudaSuccess) return error;
  }
  const int64_t tiles = ceil_div<int64_t>(params.L, Traits::kRows) * params.B * params.H;
  const auto kernel = memory_read_forward_kernel<Traits>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kShared);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(tiles < params.multiprocessors ? tiles : params.multiprocessors);
  kernel<<<blocks, Traits::kThreads, Traits::kShared, params.stream>>>(params, query, key, value, tiles);
  return cudaGetLastError();
}

// Tiles of 128 slots and 64 rows a group: at narrow heads three tiles fit the shared memory and three groups the
// registers, at wide ones two, and beside a group that finds addresses itself. A row has the same bits in any.
template <typename T, bool kGeneral>
cudaError_t launch(const MemoryReadForwardParams& params) {
  return params.D <= 64 ? launch_kernel<ReadForwardTraits<T, 64, 128, 3, kGeneral ? 2 : 3, kGeneral>>(params)
                        : launch_kernel<ReadForwardTraits<T, 128, 128, 2, 2, kGeneral>>(params);
}

// TMA copies rows of whole vectors at positive strides, and knows no mask.
template <typename T>
cudaError_t launch(const MemoryReadForwardParams& params) {
  const auto takes = [&params](const void* data, const int64_t(&stride)[4], int64_t rows) {
    const int64_t sizes[3] = {params.B, params.H, rows};
    int64_t used[4] = {stride[0], stride[1], stride[2], stride[3]};
    for (int i = 0; i < 3; ++i) {
      if (sizes[i] == 1) used[i] = Vector<T>::kSize;  // whatever it is, nothing moves along it
      if (used[i] <= 0 || used[i] >= int64_t{1} << 38) return false;
    }
    return has_vector_rows<T>(data, used);
  };
  const bool tma = params.slot_mask == nullptr && takes(params.query, params.query_stride, params.L) &&
                   takes(params.key, params.key_stride, params.M) && takes(params.value, params.value_stride, params.M);
  return tma ? launch<T, false>(params) : launch<T, true>(params);
}

}  // namespace

extern "C" cudaError_t memory_read_forward(const MemoryReadForwardParams* params) {
  switch (params->dtype) {
    case DType::kFloat16: return launch<__half>(*params);
    case DType::kBFloat16: return launch<__nv_bfloat16>(*params);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace memformer_kernels
