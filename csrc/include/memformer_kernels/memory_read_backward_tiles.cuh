// What a block of memory_read's backward works on: its slots and tiles of tokens, where they lie in shared memory, and
// which are its turn.
#pragma once

#include "memformer_kernels/memory_read.h"
#include "memformer_kernels/slots_on_chip.cuh"

namespace memformer_kernels {

template <typename T, int kChannels, int kBlocks_>
struct ReadBackwardTraits : SlotTiles<T, kChannels> {
  using Tiles = SlotTiles<T, kChannels>;
  using Tiles::kGroups, Tiles::kScoreTile, Tiles::kSlotTile, Tiles::kTokens, Tiles::kTokenTile, Tiles::kWide,
      Tiles::kWidth;
  static constexpr int kBlocks = kBlocks_;        // of a cluster: 1, 2, 3, 4, 6 or 8
  static constexpr bool kAlone = kBlocks == 1;
  static constexpr bool kGrouped = kBlocks == 8;  // may have more slots than it holds, one group after the other
  static constexpr int kHeld = kWide ? 1 : 2;     // pairs of keys and values on chip: those of the next head too
  static constexpr int kStages = kWide && !kAlone ? 2 : 3;   // tiles of tokens on their way
  static constexpr int kScores = 2;                          // tiles of ds
  static constexpr int kParts = kAlone ? 0 : kWide ? 2 : 3;  // tiles of what blocks send each other
  static constexpr int kStatistics = (kAlone ? 1 : 2) * kTokens * 4;
  static constexpr int kSums = kAlone ? (kGroups * kGroupThreads / kWarpSize + 1) * kTokens * 4 : 0;
  static_assert(kTokens == kMemoryReadBackwardTokens && Tiles::kSlots == kMemoryReadBackwardAlone);

  // The query's gradient of a tile is added up in units of 16 tokens and 16 channels, which a warp holds: dealt to the
  // blocks of the cluster one after the other.
  static constexpr int kUnitColumns = kWidth / 16;
  static constexpr int kUnits = kTokens / 16 * kUnitColumns;
  static constexpr int kOwnUnits = (kUnits + kBlocks - 1) / kBlocks;  // or one less, of a block
  static constexpr int kUnitBytes = 16 * 16 * 4;
  static constexpr int kPartsTile = kOwnUnits * kBlocks * kUnitBytes;
  __device__ static uint32_t parts_bytes() {
    return (kUnits - cluster_rank() + kBlocks - 1) / kBlocks * kBlocks * kUnitBytes;
  }
  static constexpr int kBarriers = 2 * (kHeld + kStages + kScores + kParts);
  static constexpr int kShared = 1024 + 2 * kHeld * kSlotTile + kStages * (2 * kTokenTile + kStatistics) +
                                 kScores * kScoreTile + kParts * kPartsTile + kSums + 8 * kBarriers;
};

// Places in shared memory, as addresses; an index is a place in a ring.
template <typename Traits>
struct ReadBackwardShared {
  uint32_t base;
  __device__ uint32_t key(int i) const { return base + i * Traits::kSlotTile; }
  __device__ uint32_t value(int i) const { return key(Traits::kHeld + i); }
  __device__ uint32_t query(int i) const { return value(Traits::kHeld) + i * Traits::kTokenTile; }
  __device__ uint32_t grad(int i) const { return query(Traits::kStages + i); }
  __device__ uint32_t scores(int i) const { return grad(Traits::kStages) + i * Traits::kScoreTile; }  // ds^T
  __device__ uint32_t parts(int i) const { return scores(Traits::kScores) + i * Traits::kPartsTile; }
  __device__ uint32_t statistics(int i) const { return parts(Traits::kParts) + i * Traits::kStatistics; }
  __device__ uint32_t sums(int warp) const {  // of delta, of each warp; then of all
    return statistics(Traits::kStages) + warp * Traits::kTokens * 4;
  }
  __device__ uint32_t held_full(int i) const { return sums(0) + Traits::kSums + 8 * i; }
  __device__ uint32_t held_empty(int i) const { return held_full(Traits::kHeld + i); }
  __device__ uint32_t tokens_full(int i) const { return held_empty(Traits::kHeld + i); }
  __device__ uint32_t tokens_empty(int i) const { return tokens_full(Traits::kStages + i); }
  __device__ uint32_t scores_full(int i) const { return tokens_empty(Traits::kStages + i); }
  __device__ uint32_t scores_empty(int i) const { return scores_full(Traits::kScores + i); }
  __device__ uint32_t parts_full(int i) const { return scores_empty(Traits::kScores + i); }  // in the block that adds
  __device__ uint32_t parts_empty(int i) const { return parts_full(Traits::kParts + i); }  // in those that send
};

// What a cluster does at a time: a part, which is a chunk of a head's tokens, with a group of its slots, as many as the
// cluster holds. It goes on with the part's next group: tokens, and their query's gradient so far, are still in the L2
// cache.
struct ReadBackwardWork {
  int parts, chunks, groups;  // in all, of a head, of a part
};

struct ReadBackwardStep {
  int part, group;
  __device__ __forceinline__ ReadBackwardStep() : part(cluster_number()), group(0) {}
  __device__ __forceinline__ bool inside(const ReadBackwardWork& work) const { return part < work.parts; }
  __device__ __forceinline__ void next(const ReadBackwardWork& work) {
    if (++group < work.groups) return;
    group = 0;
    part += cluster_count();
  }
};

// Of this block, in the tensors.
struct ReadBackwardItem {
  int batch, head, chunk, first_token, tiles, first_slot;
};

template <typename Traits>
__device__ __forceinline__ ReadBackwardItem read_backward_item(const MemoryReadBackwardParams& params,
                                                               const ReadBackwardWork& work, ReadBackwardStep step) {
  const int head = step.part / work.chunks, chunk = step.part % work.chunks, H = static_cast<int>(params.H);
  const int size = static_cast<int>(params.chunk), first = chunk * size, left = static_cast<int>(params.L) - first;
  return {head / H, head % H, chunk, first, ceil_div(left < size ? left : size, Traits::kTokens),
          (step.group * Traits::kBlocks + cluster_rank()) * Traits::kSlots};
}

}  // namespace memformer_kernels
