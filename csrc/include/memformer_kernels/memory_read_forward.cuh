// memory_read, forward, on Hopper: every token attends over the memory's slots.
//
//   s = query key^T      p = softmax(scale s), 0 in a row that sees nothing      output = p value
//
// A block has one warpgroup that copies tiles into shared memory and kGroups that compute, each with 64 rows of tokens
// of its own. In the steady state a group issues the logits of the next tile of slots and the product of the present
// one's weights together, and does the softmax of the first while the second runs; the groups take turns at issuing, so
// that one computes its softmax while the matrix units are busy with the other's products. Blocks go on to their next
// tile of tokens without a pause: the logits of its first slots are issued with the last product of the tile before.
#pragma once

#include "memformer_kernels/common.cuh"
#include "memformer_kernels/hopper.cuh"
#include "memformer_kernels/memory_read.h"

namespace memformer_kernels {

template <typename T_, int kWidth_, int kSlots_, int kStages_, int kGroups_, bool kGeneral_>
struct ReadForwardTraits {
  using T = T_;
  static constexpr int kWidth = kWidth_;    // channels of a head's tile
  static constexpr int kSlots = kSlots_;    // of a tile
  static constexpr int kStages = kStages_;  // tiles of slots on their way
  static constexpr int kGroups = kGroups_;
  static constexpr bool kGeneral = kGeneral_;  // any strides, a mask: without TMA
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  // Registers that a block starts with, of one thread of each group. Copying takes more of them where it has to find
  // addresses; computing gets the rest. More than there are would be waited for without end.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8 * (kGroups + 1);
  static constexpr int kCopyRegisters = kGeneral ? 56 : kGroups == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = (kRegisters - kCopyRegisters) / kGroups / 8 * 8;
  static constexpr int kPanels = kWidth / kPanelColumns;
  static constexpr int kQueryPanel = kRows * kPanelRowBytes;  // bytes
  static constexpr int kSlotPanel = kSlots * kPanelRowBytes;
  static constexpr int kQueryTile = kPanels * kQueryPanel;
  static constexpr int kSlotTile = kPanels * kSlotPanel;
  static constexpr int kShared = 1024 + 2 * kQueryTile + 2 * kStages * kSlotTile + 8 * (4 + 4 * kStages);
};

// Places in shared memory, as addresses; an index is a place in a ring.
template <typename Traits>
struct ReadForwardShared {
  uint32_t base;
  __device__ uint32_t query(int i) const { return base + i * Traits::kQueryTile; }
  __device__ uint32_t key(int i) const { return query(2) + i * Traits::kSlotTile; }
  __device__ uint32_t value(int i) const { return key(Traits::kStages) + i * Traits::kSlotTile; }
  __device__ uint32_t query_full(int i) const { return value(Traits::kStages) + 8 * i; }
  __device__ uint32_t query_empty(int i) const { return query_full(2 + i); }
  __device__ uint32_t key_full(int i) const { return query_empty(2 + i); }
  __device__ uint32_t value_full(int i) const { return key_full(Traits::kStages + i); }
  __device__ uint32_t key_empty(int i) const { return value_full(Traits::kStages + i); }
  __device__ uint32_t value_empty(int i) const { return key_empty(Traits::kStages + i); }
};

struct ReadTile {
  int batch, head, row;  // the first row
};

template <typename Traits>
__device__ __forceinline__ ReadTile read_tile(const MemoryReadForwardParams& params, int64_t tile) {
  const int64_t row_tiles = ceil_div<int64_t>(params.L, Traits::kRows);
  const int64_t heads = tile / row_tiles;
  return {static_cast<int>(heads / params.H), static_cast<int>(heads % params.H),
          static_cast<int>(tile % row_tiles) * Traits::kRows};
}

// Rows [first, first + kRows) of a matrix into the layout of TMA's 128-byte swizzle, 0 outside the matrix and in rows
// that are hidden. Any strides.
template <typename Traits, int kRows>
__device__ void copy_general(char* target, const typename Traits::T* matrix, int64_t row_stride, int64_t channel_stride,
                             int first, int rows, int D, const uint8_t* mask, int64_t mask_stride) {
  using T = typename Traits::T;
  constexpr int kWidth = Traits::kWidth;
  for (int i = threadIdx.x % kGroupThreads; i < kRows * kWidth; i += kGroupThreads) {
    const int row = i / kWidth, channel = i % kWidth;
    const int from = first + row;
    const bool keep = from < rows && channel < D && (mask == nullptr || mask[from * mask_stride]);
    const T element = keep ? matrix[from * row_stride + channel * channel_stride] : from_float<T>(0.0f);
    const int column = channel % kPanelColumns;
    const int swizzled = (column / 8 ^ row % 8) * 8 + column % 8;
    reinterpret_cast<T*>(target)[(channel / kPanelColumns * kRows + row) * kPanelColumns + swizzled] = element;
  }
}

template <typename Traits>
__device__ __forceinline__ void read_forward_copy(const MemoryReadForwardParams& params, const CUtensorMap& query_map,
                                                  const CUtensorMap& key_map, const CUtensorMap& value_map,
                                                  ReadForwardShared<Traits> shared, char* base, int64_t tiles) {
  using T = typename Traits::T;
  const int slot_tiles = static_cast<int>(ceil_div<int64_t>(params.M, Traits::kSlots));
  Ring<2> queries;
  Ring<Traits::kStages> slots;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, queries.next()) {
    const ReadTile at = read_tile<Traits>(params, tile);
    // Rows from `first` on to `target`, once `empty` says so; `full` then says that they are there.
    const auto copy = [&](auto tile_rows, uint32_t target, uint32_t empty, uint32_t full, uint32_t parity,
                          const CUtensorMap& map, const Strided<4>& tensor, int first, int64_t rows,
                          const uint8_t* mask) {
      constexpr int kTileRows = decltype(tile_rows)::value;
      [[maybe_unused]] constexpr int kPanel = kTileRows * kPanelRowBytes;
      barrier_wait(empty, parity ^ 1);
      if constexpr (Traits::kGeneral) {
        const int64_t(&stride)[4] = tensor.stride;
        const T* matrix = static_cast<const T*>(tensor.data) + at.batch * stride[0] + at.head * stride[1];
        copy_general<Traits, kTileRows>(base + (target - shared.base), matrix, stride[2], stride[3], first,
                                        static_cast<int>(rows), params.D, mask, params.slot_mask.stride[1]);
        fence_async_proxy();
        barrier_arrive(full);
      } else {
        barrier_arrive_expecting(full, Traits::kPanels * kPanel);
#pragma unroll
        for (int p = 0; p < Traits::kPanels; ++p) {
          copy_tile(target + p * kPanel, &map, full, p * kPanelColumns, first, at.head, at.batch);
        }
      }
    };
    const std::integral_constant<int, Traits::kRows> query_rows;
    const std::integral_constant<int, Traits::kSlots> slot_rows;
    const uint8_t* mask = params.slot_mask.data;
    if (mask != nullptr) mask += at.batch * params.slot_mask.stride[0];
    const int query = queries.place;
    copy(query_rows, shared.query(query), shared.query_empty(query), shared.query_full(query), queries.parity,
         query_map, params.query, at.row, params.L, nullptr);
    for (int i = slot_tiles - 1; i >= 0; --i, slots.next()) {
      const int slot = slots.place, first = i * Traits::kSlots;
      copy(slot_rows, shared.key(slot), shared.key_empty(slot), shared.key_full(slot), slots.parity,
           key_map, params.key, first, params.M, mask);
      copy(slot_rows, shared.value(slot), shared.value_empty(slot), shared.value_full(slot), slots.parity,
           value_map, params.value, first, params.M, mask);
    }
  }
}

constexpr float kNearLogits = 128.0f;  // scaled, in base 2

template <typename Traits>
__device__ __forceinline__ void read_forward_compute(const MemoryReadForwardParams& params,
                                                     ReadForwardShared<Traits> shared, int64_t tiles, int group) {
  using T = typename Traits::T;
  constexpr int kSlots = Traits::kSlots, kWidth = Traits::kWidth;
  constexpr int kSlotSteps = kSlots / 16, kWidthSteps = kWidth / 16;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % 4;
  const int slot_tiles = static_cast<int>(ceil_div<int64_t>(params.M, kSlots));
  const bool elected = lane == 0;
  const float log2_scale = params.log2_scale;

  float s[kSlots / 2];         // logits, then weights; thread's rows are lane / 4 and that + 8 of its warp's 16
  uint32_t p[kSlots / 4];      // weights, rounded
  float out[kWidth / 2];
  float top[2], total[2];      // of the rows that s and p are of
  bool seen = false;

  Ring<2> queries;
  Ring<Traits::kStages> keys, values;
  int64_t tile = blockIdx.x;
  if (tile >= tiles) return;

  const auto issue_logits = [&] {
    const uint64_t a = tile_descriptor(shared.query(queries.place) + group * kGroupRows * kPanelRowBytes, 0);
    const uint64_t b = tile_descriptor(shared.key(keys.place), 0);
#pragma unroll
    for (int k = 0; k < kWidthSteps; ++k) {
      const int panel = k / 4, inside = k % 4 * 32;
      product<T, kAlongSum, kAlongSum>(s, a + ((panel * Traits::kQueryPanel + inside) >> 4),
                                       b + ((panel * Traits::kSlotPanel + inside) >> 4), k > 0);
    }
  };
  const auto issue_output = [&](bool adds) {
    const uint64_t b = tile_descriptor(shared.value(values.place), Traits::kSlotPanel);
#pragma unroll
    for (int k = 0; k < kSlotSteps; ++k) product<T, kAcrossSum>(out, p + 4 * k, b + (k * 2048 >> 4), k > 0 || adds);
  };
  // Logits of one tile of slots into weights relative to the new maximum; what the sums so far shrink by.
  const auto softmax = [&](int slot_tile, int batch, bool first, float(&shrink)[2]) {
    bool masked = slot_tile == slot_tiles - 1 && params.M % kSlots != 0;
    if constexpr (Traits::kGeneral) masked = masked || params.slot_mask.data != nullptr;
    if (first) {
      seen = !Traits::kGeneral || params.slot_mask.data == nullptr;
      top[0] = top[1] = -INFINITY;
      total[0] = total[1] = 0.0f;
    }
    if (masked) {
      const int left = static_cast<int>(params.M) - slot_tile * kSlots;
      bool any = false;
#pragma unroll
      for (int i = 0; i < kSlots / 2; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int slot = i * 2 + lane % 4 * 2 + j;
          bool keep = slot < left;
          if constexpr (Traits::kGeneral) {
            if (keep && params.slot_mask.data != nullptr) {
              keep = params.slot_mask.data[batch * params.slot_mask.stride[0] +
                                      (slot_tile * kSlots + slot) * params.slot_mask.stride[1]];
            }
          }
          any = any || keep;
          if (!keep) s[i + j] = s[i + j + 2] = -INFINITY;
        }
      }
      if constexpr (Traits::kGeneral) seen = seen || __any_sync(0xffffffffu, any);
    }
    float reference[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most[4];  // chains of a quarter of the length
#pragma unroll
      for (int c = 0; c < 4; ++c) most[c] = s[c / 2 * 4 + c % 2 + 2 * r];
#pragma unroll
      for (int i = 8; i < kSlots / 2; i += 8) {
#pragma unroll
        for (int c = 0; c < 4; ++c) most[c] = fmaxf(most[c], s[i + c / 2 * 4 + c % 2 + 2 * r]);
      }
      float new_top = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
      new_top = fmaxf(new_top, top[r]);
      reference[r] = new_top == -INFINITY ? 0.0f : new_top;  // nothing visible so far: 0, not NaN
      shrink[r] = exp2_fast((top[r] - reference[r]) * log2_scale);
      top[r] = new_top;
    }
    const auto weigh = [&](auto exact) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float offset = reference[r] * log2_scale;
        float sum[4] = {total[r] * shrink[r], 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kSlots / 2; i += 8) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& x = s[i + c / 2 * 4 + c % 2 + 2 * r];
            x = exp2_fast(decltype(exact)::value ? (x - reference[r]) * log2_scale : fmaf(x, log2_scale, -offset));
            sum[c] += x;
          }
        }
        total[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
    };
    // One instruction for two where all it costs is a factor of 1 +- 2^-18 that the weights of a row and tile share.
    const float largest = fmaxf(fabsf(reference[0]), fabsf(reference[1])) * log2_scale;
    if (__all_sync(0xffffffffu, largest < kNearLogits)) {
      weigh(std::false_type{});
    } else {
      weigh(std::true_type{});
    }
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < kSlots / 4; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  };
  const auto store = [&](const ReadTile& at) {
    const bool vectors = params.D % 8 == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inv_total = 1.0f / sum;
      const int row = at.row + group * kGroupRows + warp * 16 + lane / 4 + 8 * r;
      if (params.log_sum_exp != nullptr && lane % 4 == 0 && row < params.L) {
        const float lse = top[r] + __log2f(sum) / log2_scale;
        params.log_sum_exp[(static_cast<int64_t>(at.batch) * params.H + at.head) * params.L + row] = seen ? lse : 0.0f;
      }
      const int64_t offset = ((at.batch * params.L + row) * params.H + at.head) * params.D;
      const auto store_words = [&](void* target, int block, uint32_t(&words)[4]) {
        transpose_quad(words, lane % 4);
        const int channel = (4 * block + lane % 4) * 8;
        if (row >= params.L || channel >= params.D) return;
        T* to = static_cast<T*>(target) + offset + channel;
        if (vectors) {
          *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (channel + i < params.D) to[i] = from_float<T>(unpack<T>(words[i / 2], i % 2));
          }
        }
      };
#pragma unroll
      for (int block = 0; block < kWidth / 32; ++block) {
        uint32_t rounded[4], lost[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = (4 * block + j) * 4 + 2 * r;
          const float low = seen ? out[i] * inv_total : 0.0f, high = seen ? out[i + 1] * inv_total : 0.0f;
          rounded[j] = pack<T>(low, high);
          lost[j] = pack<T>(low - unpack<T>(rounded[j], 0), high - unpack<T>(rounded[j], 1));
        }
        store_words(params.output, block, rounded);
        if (params.rounding != nullptr) store_words(params.rounding, block, lost);
      }
    }
  };

  float shrink[2];
  barrier_wait(shared.query_full(0), 0);
  barrier_wait(shared.key_full(0), 0);
  product_fence();
  issue_logits();
  product_commit();
  product_wait<0>();
  pin(s);
  if (elected) barrier_arrive(shared.key_empty(0));
  keys.next();
  ReadTile at = read_tile<Traits>(params, tile);
  softmax(slot_tiles - 1, at.batch, true, shrink);
  round_weights();
  if (group == Traits::kGroups - 1) named_barrier_arrive(1, 2 * kGroupThreads);  // the first turn is group 0's

  int slot_tile = slot_tiles - 1;  // of p
  bool adds = false;               // whether `out` holds a sum of this row tile
  while (true) {
    const bool last = slot_tile == 0;
    const int64_t next_tile = last ? tile + gridDim.x : tile;
    const bool more = next_tile < tiles;
    const int next_slot_tile = last ? slot_tiles - 1 : slot_tile - 1;
    if (last) {
      if (elected) barrier_arrive(shared.query_empty(queries.place));
      queries.next();
      if (more) barrier_wait(shared.query_full(queries.place), queries.parity);
    }
    if (more) barrier_wait(shared.key_full(keys.place), keys.parity);
    named_barrier_sync(1 + group, 2 * kGroupThreads);
    pin(s);
    pin(out);
    product_fence();
    issue_logits();  // past the end, of what happens to lie there
    product_commit();
    barrier_wait(shared.value_full(values.place), values.parity);
    issue_output(adds);
    product_commit();
    named_barrier_arrive(1 + (group + 1) % Traits::kGroups, 2 * kGroupThreads);
    product_wait<1>();
    pin(s);
    if (elected && more) barrier_arrive(shared.key_empty(keys.place));
    keys.next();
    if (last) {
      product_wait<0>();
      pin(out);
      if (elected) barrier_arrive(shared.value_empty(values.place));
      values.next();
      store(at);
      if (!more) break;
      tile = next_tile;
      at = read_tile<Traits>(params, tile);
      softmax(next_slot_tile, at.batch, true, shrink);
    } else {
      softmax(next_slot_tile, at.batch, false, shrink);
      pin(s);
      if (params.M > 0) product_wait<0>();  // always: without a branch, ptxas moves the wait up before the softmax
      product_wait<0>();
      pin(out);
      pin(s);
      if (elected) barrier_arrive(shared.value_empty(values.place));
      values.next();
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) out[i] *= shrink[i / 2 % 2];
    }
    adds = !last;
    slot_tile = next_slot_tile;
    round_weights();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    memory_read_forward_kernel(const __grid_constant__ MemoryReadForwardParams params,
                               const __grid_constant__ CUtensorMap query_map,
                               const __grid_constant__ CUtensorMap key_map,
                               const __grid_constant__ CUtensorMap value_map, int64_t tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char dynamic[];
  const uint32_t begin = shared_address(dynamic);
  const ReadForwardShared<Traits> shared{(begin + 1023) / 1024 * 1024};
  if (threadIdx.x == 0) {
    constexpr int kCopies = Traits::kGeneral ? kGroupThreads : 1;
    constexpr int kReaders = Traits::kGroups * kGroupThreads / kWarpSize;
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.query_full(i), kCopies);
      barrier_init(shared.query_empty(i), kReaders);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      barrier_init(shared.key_full(i), kCopies);
      barrier_init(shared.value_full(i), kCopies);
      barrier_init(shared.key_empty(i), kReaders);
      barrier_init(shared.value_empty(i), kReaders);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int group = threadIdx.x / kGroupThreads;
  if (group == 0) {
    give_registers<Traits::kCopyRegisters>();
    if (Traits::kGeneral || threadIdx.x == 0) {
      read_forward_copy<Traits>(params, query_map, key_map, value_map, shared, dynamic + (shared.base - begin), tiles);
    }
  } else {
    take_registers<Traits::kComputeRegisters>();
    read_forward_compute<Traits>(params, shared, tiles, group - 1);
  }
#endif
}

}  // namespace memformer_kernels
