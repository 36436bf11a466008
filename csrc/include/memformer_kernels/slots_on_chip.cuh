// What the backwards of memory_read and memory_write share: a block keeps slots of a head on chip, and tiles of tokens
// stream past. One group of warps copies; two compute, each with 64 slots as the rows of its products.
#pragma once

#include "memformer_kernels/common.cuh"
#include "memformer_kernels/hopper.cuh"

namespace memformer_kernels {

template <typename T_, int kChannels_>
struct SlotTiles {
  using T = T_;
  static constexpr int kChannels = kChannels_;  // of a head that products look at: 64, 96 or 128
  static constexpr bool kWide = kChannels > 64;
  static constexpr int kWidth = kWide ? 128 : 64;  // channels of a head's tile
  static constexpr int kGroups = 2;
  static constexpr int kSlots = kGroups * kGroupRows;
  static constexpr int kTokens = 64;
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  // Registers that a block starts with, of one thread of each group, and how the groups share them.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8 * (kGroups + 1);
  static constexpr int kCopyRegisters = kWide ? 24 : 40;
  static constexpr int kComputeRegisters = (kRegisters - kCopyRegisters) / kGroups / 8 * 8;

  static constexpr int kPanels = kWidth / kPanelColumns;
  static constexpr int kSlotPanel = kSlots * kPanelRowBytes;
  static constexpr int kSlotTile = kPanels * kSlotPanel;
  static constexpr int kTokenPanel = kTokens * kPanelRowBytes;
  static constexpr int kTokenTile = kPanels * kTokenPanel;
  static constexpr int kScoreTile = kSlots * kTokens * 2;  // [slots, tokens]
  static_assert(kTokens * 2 == kPanelRowBytes, "a slot's scores of a tile are one row");
};

// Of what the groups of both kernels hand one another. For a tile of tokens `fillers` arrive once it is there, and
// `readers` of each warp that computes once it may be overwritten.
template <typename Traits, typename Shared>
__device__ __forceinline__ void init_slot_barriers(const Shared& shared, int fillers, int readers) {
  constexpr int kReaders = Traits::kGroups * kGroupThreads / kWarpSize;
  for (int i = 0; i < Traits::kHeld; ++i) {
    barrier_init(shared.held_full(i), 1);
    barrier_init(shared.held_empty(i), kReaders);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    barrier_init(shared.tokens_full(i), fillers);
    barrier_init(shared.tokens_empty(i), kReaders * readers);
  }
  for (int i = 0; i < Traits::kScores; ++i) {
    barrier_init(shared.scores_full(i), kReaders);
    barrier_init(shared.scores_empty(i), kReaders);
  }
}

// What a warp of a group that computes does with its slots. Tiles are given by their addresses in shared memory.
template <typename Tiles>
struct SlotGroup {
  using T = typename Tiles::T;
  int group, warp, lane;

  __device__ __forceinline__ int row() const { return group * kGroupRows + warp * kWarpRows + lane % 16; }

  // Rows of a tile of slots, as the first operand of a product.
  __device__ __forceinline__ void load_rows(uint32_t* rows, uint32_t tile) const {
    const int at = row();
#pragma unroll
    for (int k = 0; k < Tiles::kWidth / 16; ++k) {
      load_matrices(rows + 4 * k, tile + at * kPanelRowBytes + ((2 * k + lane / 16) ^ row_swizzle(at)) * 16);
    }
  }
  // Rows of [slots, tokens], rounded.
  __device__ __forceinline__ void store_scores(uint32_t tile, const uint32_t* scores) const {
    const int at = fresh(row());
#pragma unroll
    for (int k = 0; k < Tiles::kTokens / 16; ++k) {
      store_matrices(tile + at * kPanelRowBytes + ((2 * k + lane / 16) ^ row_swizzle(at)) * 16, scores + 4 * k);
    }
  }

  // d [slots, tokens]: this group's rows, which narrow heads have in registers, times a tile of tokens.
  __device__ __forceinline__ void issue_against(float (&d)[Tiles::kTokens / 2], const uint32_t* rows,
                                                uint32_t rows_tile, uint32_t tokens) const {
    const uint64_t b = tile_descriptor(tokens, 0);
    if constexpr (Tiles::kWide) {
      const uint64_t a = tile_descriptor(fresh(rows_tile) + group * kGroupRows * kPanelRowBytes, 0);
#pragma unroll
      for (int k = 0; k < Tiles::kChannels / 16; ++k) {
        const int panel = k / 4, inside = k % 4 * 32;
        product<T, kAlongSum, kAlongSum>(d, a + ((panel * Tiles::kSlotPanel + inside) >> 4),
                                         b + ((panel * Tiles::kTokenPanel + inside) >> 4), k > 0);
      }
    } else {
#pragma unroll
      for (int k = 0; k < Tiles::kWidth / 16; ++k) product<T, kAlongSum>(d, rows + 4 * k, b + (k * 32 >> 4), k > 0);
    }
    product_commit();
  }
  // d [slots, channels] += scores of this group's rows, in registers, times a tile of tokens.
  __device__ __forceinline__ void issue_sum(float (&d)[Tiles::kChannels / 2], const uint32_t* scores, uint32_t tokens,
                                            bool adds) const {
    const uint64_t b = tile_descriptor(tokens, Tiles::kTokenPanel);
#pragma unroll
    for (int k = 0; k < Tiles::kTokens / 16; ++k) {
      product<T, kAcrossSum>(d, scores + 4 * k, b + (k * 2048 >> 4), k > 0 || adds);
    }
  }
  // d [tokens, channels]: scores of all slots, transposed, times so many channels of a tile of slots, from the first
  // on: of several panels all, or some inside of one.
  template <int kCount>
  __device__ __forceinline__ void issue_over_slots(float (&d)[kCount], uint32_t scores, uint32_t slots,
                                                   int first) const {
    const uint64_t a = tile_descriptor(scores, 0);
    const uint64_t b = tile_descriptor(
        fresh(slots) + first / kPanelColumns * Tiles::kSlotPanel + first % kPanelColumns * 2, Tiles::kSlotPanel);
#pragma unroll
    for (int k = 0; k < Tiles::kSlots / 16; ++k) {
      product<T, kAcrossSum, kAcrossSum>(d, a + (k * 2048 >> 4), b + (k * 2048 >> 4), k > 0);
    }
  }
};

}  // namespace memformer_kernels
