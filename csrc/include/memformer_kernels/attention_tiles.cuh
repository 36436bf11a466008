// What a block of the forward of attention works on: its tiles of rows and keys, where they lie in shared memory, and
// which are its turn.
#pragma once

#include <algorithm>

#include "memformer_kernels/common.cuh"
#include "memformer_kernels/hopper.cuh"
#include "memformer_kernels/tensor_map.h"

namespace memformer_kernels {

template <typename T_, int kWidth_, int kKeys_, int kStages_, int kGroups_, bool kMasked_, bool kOwn_>
struct AttentionTraits {
  using T = T_;
  static constexpr int kWidth = kWidth_;    // channels of a head's tile
  static constexpr int kKeys = kKeys_;      // of a tile
  static constexpr int kWords = ceil_div(kKeys, 64) * 2;  // of a bit for each; where one is left over, the last twice
  static constexpr int kStages = kStages_;  // tiles of keys on their way
  static constexpr int kGroups = kGroups_;
  static constexpr bool kMasked = kMasked_;  // whether some keys may be hidden
  static constexpr bool kOwn = kOwn_;        // whether a row has an entry of its own beside the keys
  static constexpr bool kHolds = kGroups == 2 && !kOwn;  // whether keys that fit stay: more groups lack the registers
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kBlocks = kGroups == 1 && kWidth == 64 ? 2 : 1;  // that share a multiprocessor
  // Registers that a block starts with, of one thread of each group, and how the groups share them. More than there are
  // would be waited for without end.
  static constexpr int kRegisters = 65536 / (kBlocks * kThreads) / 8 * 8 * (kGroups + 1);
  static constexpr int kCopyRegisters = kGroups >= 3 ? 32 : 40;
  static constexpr int kComputeRegisters = std::min(240, (kRegisters - kCopyRegisters) / kGroups / 8 * 8);
  static constexpr int kPanelColumns = kWidth % 64 == 0 ? 64 : 32;
  static constexpr int kPanelRowBytes = 2 * kPanelColumns;
  static constexpr int kPanels = kWidth / kPanelColumns;
  static constexpr int kQueryPanel = kRows * kPanelRowBytes;  // bytes
  static constexpr int kKeyPanel = kKeys * kPanelRowBytes;
  static constexpr int kQueryTile = kPanels * kQueryPanel;
  static constexpr int kOutputPanels = 2;  // of which one is filled while the other is stored
  static constexpr int kKeyTile = kPanels * kKeyPanel;
  static constexpr int kShared = 1024 + 2 * kQueryTile + 2 * kStages * kKeyTile + 8 * (4 + 4 * kStages) +
                                 (kMasked ? kStages * (8 + 8 + 4 * kWords) : 0) +
                                 (kOwn ? kQueryTile + 8 + 8 + 8 + 4 * kRows : kOutputPanels * kQueryPanel);
  static_assert(kBlocks * (kShared + 1024) <= 228 * 1024, "of a multiprocessor, which keeps 1 KB of each block's");
};

// What TMA copies: boxes of a block's rows, of a tile of keys, and of the rows of a warp.
struct AttentionMaps {
  CUtensorMap query, key, value;
  CUtensorMap own_key, own_value;  // of a row's own entry
  CUtensorMap output, rounding;
};

// Places in shared memory, as addresses; an index is a place in a ring.
template <typename Traits>
struct AttentionShared {
  static constexpr bool kMasked = Traits::kMasked;
  static constexpr int kPanels = Traits::kPanels, kQueryPanel = Traits::kQueryPanel;
  static constexpr int kPanelColumns = Traits::kPanelColumns, kPanelRowBytes = Traits::kPanelRowBytes;
  uint32_t base;
  __device__ uint32_t query(int i) const { return base + i * Traits::kQueryTile; }
  __device__ uint32_t key(int i) const { return query(2) + i * Traits::kKeyTile; }
  __device__ uint32_t value(int i) const { return key(Traits::kStages) + i * Traits::kKeyTile; }
  __device__ uint32_t own() const { return value(Traits::kStages); }  // keys, then values, laid out as queries
  __device__ uint32_t output(int i) const { return value(Traits::kStages) + i * kQueryPanel; }  // where none are own
  __device__ uint32_t query_full(int i) const {
    return value(Traits::kStages) + (Traits::kOwn ? Traits::kQueryTile : Traits::kOutputPanels * kQueryPanel) + 8 * i;
  }
  __device__ uint32_t query_empty(int i) const { return query_full(2 + i); }
  __device__ uint32_t key_full(int i) const { return query_empty(2 + i); }
  __device__ uint32_t value_full(int i) const { return key_full(Traits::kStages + i); }
  __device__ uint32_t key_empty(int i) const { return value_full(Traits::kStages + i); }
  __device__ uint32_t value_empty(int i) const { return key_empty(Traits::kStages + i); }
  // With a mask: when values are there, which are then cleared; which keys are visible, a bit for each.
  __device__ uint32_t value_copied(int i) const {
    return Traits::kMasked ? value_empty(Traits::kStages + i) : value_full(i);
  }
  __device__ uint32_t visible_full(int i) const { return value_copied(Traits::kStages + i); }
  __device__ uint32_t visible(int i) const { return visible_full(Traits::kStages) + i * 4 * Traits::kWords; }
  __device__ uint32_t own_full() const {
    return Traits::kMasked ? visible(Traits::kStages) : value_empty(Traits::kStages);
  }
  __device__ uint32_t own_empty() const { return own_full() + 8; }
  __device__ uint32_t own_key_full() const { return own_full() + 16; }
  __device__ uint32_t own_logits() const { return own_full() + 24; }
};

struct AttentionTile {
  int batch, head, row;                   // the first row
  int chunk, first_key, keys, key_tiles;  // that its sums are over
};

// Of all blocks.
struct AttentionWork {
  int tiles;
  int last_chunk, last_keys;  // its first tile, and its keys, which may be fewer than the others'
  Divisor row_tiles, heads, batches;
};

// Keys that a tile's sums are over.
template <typename Op>
__device__ __forceinline__ int attention_keys(const typename Op::Params& params, const AttentionWork& work, int tile) {
  if constexpr (Op::kChunks) return tile < work.last_chunk ? static_cast<int>(params.chunk) : work.last_keys;
  return static_cast<int>(Op::keys(params));
}

// Tiles of a head's rows follow one another, then heads, then chunks of the keys.
template <typename Traits, typename Op>
__device__ __forceinline__ AttentionTile attention_tile(const typename Op::Params& params, const AttentionWork& work,
                                                        int tile) {
  const int keys = attention_keys<Op>(params, work, tile);
  const int row = work.row_tiles.split(tile) * Traits::kRows, head = work.heads.split(tile);
  int batch = tile, chunk = 0, first_key = 0;
  if constexpr (Op::kChunks) {
    batch = work.batches.split(tile);
    chunk = tile;
    first_key = chunk * static_cast<int>(params.chunk);
  }
  return {batch, head, row, chunk, first_key, keys, ceil_div(keys, Traits::kKeys)};
}

// The tiles of a block. Where all keys of a head are held in shared memory they follow one another; else blocks are at
// the same heads at a time, whose keys are then in the L2 cache.
struct AttentionTiles {
  int first, end, step;
  bool held;
};

template <typename Traits, typename Op>
__device__ __forceinline__ AttentionTiles attention_tiles(const typename Op::Params& params,
                                                          const AttentionWork& work) {
  const int block = fresh(static_cast<int>(blockIdx.x)), blocks = static_cast<int>(gridDim.x);
  if (!Traits::kHolds || attention_tile<Traits, Op>(params, work, 0).key_tiles > Traits::kStages) {
    return {block, work.tiles, blocks, false};
  }
  const auto begin = [&](int64_t i) { return static_cast<int>(i * work.tiles / blocks); };
  return {begin(block), begin(block + 1), 1, true};
}

// Whether the keys of the tile before it are this one's.
template <typename Traits, typename Op>
__device__ __forceinline__ bool attention_keeps_keys(const typename Op::Params& params, const AttentionWork& work,
                                                     const AttentionTiles& tiles, int tile) {
  return Traits::kHolds && tiles.held && tile > tiles.first && tile < tiles.end &&
         attention_tile<Traits, Op>(params, work, tile).row > 0;
}

}  // namespace memformer_kernels
