// memory_write, backward, on Hopper: the part that goes over the tokens.
//
//   w = exp(scale (s - lse))    s = query key^T    ds = w (du value^T - delta)
//   grad_value = w^T du         grad_key = scale ds^T query     partial = ds key
//
// As in memory_read_backward.cuh a block holds the slots of a head, up to 128, and the tokens stream past; here the sum
// that stays in registers is the query's, and a tile of tokens has two gradients of its own. Both need all slots: the
// two groups hand each other their weights and ds through shared memory; one has the keys' gradient, one the values'.
#pragma once

#include "memformer_kernels/memory_write.h"
#include "memformer_kernels/slots_on_chip.cuh"

namespace memformer_kernels {

template <typename T, int kChannels>
struct WriteBackwardTraits : SlotTiles<T, kChannels> {
  using Tiles = SlotTiles<T, kChannels>;
  using Tiles::kGroups, Tiles::kScoreTile, Tiles::kSlots, Tiles::kSlotTile, Tiles::kTokenTile, Tiles::kWide;
  static constexpr int kHeld = kWide ? 1 : 2;    // pairs of queries and du on chip: those of the next head too
  static constexpr int kStages = kWide ? 2 : 3;  // tiles of tokens on their way
  static constexpr int kScores = 2;              // tiles of weights and ds
  static_assert(kSlots == kMemoryWriteBackwardSlots);
  static constexpr int kBarriers = 2 * (kHeld + kStages + kScores);
  static constexpr int kShared = 1024 + 2 * kHeld * kSlotTile + kStages * (2 * kTokenTile + 8) +
                                 kScores * 2 * kScoreTile + kGroups * kTokenTile + 8 * kBarriers;
};

// What TMA copies: boxes of all slots, of a tile of tokens, and of the tokens of a warp.
struct WriteBackwardMaps {
  CUtensorMap query, du, key, value, grad_key, grad_value;
};

// Places in shared memory, as addresses; an index is a place in a ring.
template <typename Traits>
struct WriteBackwardShared {
  uint32_t base;
  __device__ uint32_t query(int i) const { return base + i * Traits::kSlotTile; }
  __device__ uint32_t du(int i) const { return query(Traits::kHeld + i); }
  __device__ uint32_t key(int i) const { return du(Traits::kHeld) + i * Traits::kTokenTile; }
  __device__ uint32_t value(int i) const { return key(Traits::kStages + i); }
  __device__ uint32_t weights(int i) const { return value(Traits::kStages) + i * Traits::kScoreTile; }  // w^T
  __device__ uint32_t scores(int i) const { return weights(Traits::kScores + i); }                      // ds^T
  __device__ uint32_t grads(int group) const { return scores(Traits::kScores) + group * Traits::kTokenTile; }
  __device__ uint32_t visible(int i) const { return grads(Traits::kGroups) + 8 * i; }  // tokens, a bit for each
  __device__ uint32_t held_full(int i) const { return visible(Traits::kStages + i); }
  __device__ uint32_t held_empty(int i) const { return held_full(Traits::kHeld + i); }
  __device__ uint32_t tokens_full(int i) const { return held_empty(Traits::kHeld + i); }
  __device__ uint32_t tokens_empty(int i) const { return tokens_full(Traits::kStages + i); }
  __device__ uint32_t scores_full(int i) const { return tokens_empty(Traits::kStages + i); }
  __device__ uint32_t scores_empty(int i) const { return scores_full(Traits::kScores + i); }
};

// A part: a chunk of a head's tokens.
struct WriteBackwardItem {
  int batch, head, chunk, first_token, tiles;
};

template <typename Traits>
__device__ __forceinline__ WriteBackwardItem write_backward_item(const MemoryWriteBackwardParams& params, int chunks,
                                                                 int part) {
  const int head = part / chunks, chunk = part % chunks, H = static_cast<int>(params.H);
  const int size = static_cast<int>(params.chunk), first = chunk * size, left = static_cast<int>(params.L) - first;
  return {head / H, head % H, chunk, first, ceil_div(left < size ? left : size, Traits::kTokens)};
}

template <typename Traits>
__device__ __forceinline__ void write_backward_copy(const MemoryWriteBackwardParams& params, int parts, int chunks,
                                                    const WriteBackwardMaps& maps,
                                                    WriteBackwardShared<Traits> shared) {
  Ring<Traits::kHeld> held;
  Ring<Traits::kStages> stage;
  for (int part = blockIdx.x; part < parts; part += gridDim.x, held.next()) {
    const WriteBackwardItem item = write_backward_item<Traits>(params, chunks, part);
    // Loops that are not unrolled: registers are few.
    const auto copy = [&](uint32_t target, int panel_bytes, const CUtensorMap& map, uint32_t full, int row) {
#pragma unroll 1
      for (int channel = 0; channel < Traits::kWidth; channel += kPanelColumns, target += panel_bytes) {
        copy_tile(target, &map, full, channel, row, item.head, item.batch);
      }
    };
    const uint32_t held_full = shared.held_full(held.place);
    barrier_wait(shared.held_empty(held.place), held.parity ^ 1);
    barrier_arrive_expecting(held_full, 2 * Traits::kSlotTile);
    copy(shared.query(held.place), Traits::kSlotPanel, maps.query, held_full, 0);
    copy(shared.du(held.place), Traits::kSlotPanel, maps.du, held_full, 0);
    int token = item.first_token;
#pragma unroll 1
    for (int t = item.tiles; t > 0; --t, stage.next(), token += Traits::kTokens) {
      const uint32_t full = shared.tokens_full(stage.place);
      barrier_wait(shared.tokens_empty(stage.place), stage.parity ^ 1);
      barrier_arrive_expecting(full, 2 * Traits::kTokenTile);
      copy(shared.key(stage.place), Traits::kTokenPanel, maps.key, full, token);
      copy(shared.value(stage.place), Traits::kTokenPanel, maps.value, full, token);
    }
  }
}

// Which tokens of a tile are visible, by one warp.
template <typename Traits>
__device__ __forceinline__ void write_backward_copy_mask(const MemoryWriteBackwardParams& params, int parts, int chunks,
                                                         WriteBackwardShared<Traits> shared) {
  static_assert(Traits::kTokens == 2 * kWarpSize);
  const int lane = threadIdx.x % kWarpSize, L = static_cast<int>(params.L);
  Ring<Traits::kStages> stage;
  for (int part = blockIdx.x; part < parts; part += gridDim.x) {
    const WriteBackwardItem item = write_backward_item<Traits>(params, chunks, part);
    const uint8_t* mask = params.token_mask.data;
    if (mask != nullptr) mask += item.batch * params.token_mask.stride[0];
    int token = item.first_token + lane;
#pragma unroll 1
    for (int t = item.tiles; t > 0; --t, stage.next(), token += Traits::kTokens) {
      const auto is_visible = [&](int at) {
        return at < L && (mask == nullptr || mask[at * params.token_mask.stride[1]]);
      };
      const uint32_t low = __ballot_sync(0xffffffffu, is_visible(token));
      const uint32_t high = __ballot_sync(0xffffffffu, is_visible(token + kWarpSize));
      barrier_wait(shared.tokens_empty(stage.place), stage.parity ^ 1);
      if (lane == 0) {
        store_shared2(shared.visible(stage.place), __uint_as_float(low), __uint_as_float(high));
        barrier_arrive(shared.tokens_full(stage.place));
      }
      __syncwarp();
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void write_backward_compute(const MemoryWriteBackwardParams& params, int parts, int chunks,
                                                       const WriteBackwardMaps& maps,
                                                       WriteBackwardShared<Traits> shared, int group) {
  using T = typename Traits::T;
  constexpr int kChannels = Traits::kChannels, kTokens = Traits::kTokens;
  constexpr int kThreads = Traits::kGroups * kGroupThreads;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize % 4, 0);
  const bool elected = lane == 0;
  const float log2_scale = params.log2_scale;
  const int M = static_cast<int>(params.M);

  float s[kTokens / 2], dp[kTokens / 2];  // [slots, tokens]: logits, then weights; their gradients
  uint32_t ds[kTokens / 4];               // rounded
  float grad_query[kChannels / 2];
  const bool has_keys = group == 0;
  float grad_tokens[kChannels / 2];  // of the tile's keys or values
  uint32_t query[Traits::kWide ? 1 : kChannels / 4], du[Traits::kWide ? 1 : kChannels / 4];  // narrow heads' stay here
  float log_sum_exp[2], delta[2];                      // of this thread's slots

  Ring<Traits::kHeld> held;
  Ring<Traits::kStages> stage;
  Ring<Traits::kScores> stored, multiplied;

  const SlotGroup<Traits> slots{group, warp, lane};
  const auto issue_logits = [&] { slots.issue_against(s, query, shared.query(held.place), shared.key(stage.place)); };
  const auto issue_weights_grad = [&] {
    slots.issue_against(dp, du, shared.du(held.place), shared.value(stage.place));
  };
  const auto issue_of_tile = [&] {
    const uint32_t weights = has_keys ? shared.scores(multiplied.place) : shared.weights(multiplied.place);
    slots.issue_over_slots(grad_tokens, weights, has_keys ? shared.query(held.place) : shared.du(held.place), 0);
  };

  struct Rows {        // of the tokens' gradients, of a tile
    int head, token;   // of all batches' heads; the first
    uint32_t visible;  // 16 tokens of this warp, a bit for each
  };
  const auto store_of_tokens = [&](const Rows& rows) {
    const uint32_t target = shared.grads(group) + warp * kWarpRows * kPanelRowBytes;
    const float factor = has_keys ? params.scale : 1.0f;
    const uint32_t shown = rows.visible >> fresh(lane) / 4;
    if (elected) store_wait<0>();  // the last tile's, long done
    __syncwarp();
#pragma unroll
    for (int p = 0; p < Traits::kPanels; ++p) {
      const auto word = [&](int i, int r) {
        const float* two = grad_tokens + 32 * p + i;
        return shown >> 8 * r & 1 ? pack<T>(two[0] * factor, two[1] * factor) : 0;
      };
      store_blocks(target + p * Traits::kTokenPanel, kChannels / 8 - 8 * p, word);
    }
    fence_async_proxy();
    __syncwarp();
    if (elected) {
      const CUtensorMap* map = has_keys ? &maps.grad_key : &maps.grad_value;
      const int H = static_cast<int>(params.H), first = rows.token + warp * kWarpRows;
#pragma unroll
      for (int p = 0; p < Traits::kPanels; ++p) {
        store_tile(map, target + p * Traits::kTokenPanel, p * kPanelColumns, first, rows.head % H, rows.head / H);
      }
    }
  };
  const auto store_partial = [&](const WriteBackwardItem& at) {
    const int row_size = static_cast<int>(params.H) * params.D;
    const int slot = group * kGroupRows + warp * kWarpRows + fresh(lane) / 4;
    const int64_t first = ((at.chunk * params.B + at.batch) * params.M + slot) * row_size + at.head * params.D;
    store_rows(params.partial + first, 8 * row_size, {{slot < M, slot + 8 < M}}, grad_query, 1.0f, params.D);
  };

  // Hidden ones of this thread's 16 tokens have weights and gradients of 0.
  uint32_t visible[2] = {};
  const auto hide = [&](float(&x)[kTokens / 2]) {
    if ((visible[0] & visible[1]) == 0xffffffffu) return;
    const int token = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      x[i] = visible[i / 16] >> (i / 4 % 4 * 8 + i % 2 + token) & 1 ? x[i] : 0.0f;
    }
  };
  const auto weigh = [&] {
    // Read by the lane that later says that they may be overwritten: its own reads are all that its arrival orders.
    const float2 words = elected ? load_shared2(shared.visible(stage.place)) : float2{};
    visible[0] = __shfl_sync(0xffffffffu, __float_as_uint(words.x), 0);
    visible[1] = __shfl_sync(0xffffffffu, __float_as_uint(words.y), 0);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) s[i] = exp2_fast((s[i] - log_sum_exp[i / 2 % 2]) * log2_scale);
    hide(s);
    uint32_t w[kTokens / 4];
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) w[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    slots.store_scores(shared.weights(stored.place), w);
  };
  const auto differentiate = [&] {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) dp[i] = s[i] * (dp[i] - delta[i / 2 % 2]);
    hide(dp);
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) ds[i] = pack<T>(dp[2 * i], dp[2 * i + 1]);
    slots.store_scores(shared.scores(stored.place), ds);
    fence_async_proxy();
    __syncwarp();
    if (elected) barrier_arrive(shared.scores_full(stored.place));
    stored.next();
  };
  // Whatever hidden keys hold, even NaN, must not reach the product with ds.
  const auto clear_hidden_keys = [&] {
    if (params.token_mask.data == nullptr || (visible[0] & visible[1]) == 0xffffffffu) return;
    constexpr int kVectors = Traits::kWidth / 8;  // swizzled: of the last panel too all
    for (int i = group * kGroupThreads + threadIdx.x % kGroupThreads; i < kTokens * kVectors; i += kThreads) {
      const int row = i / kVectors, vector = i % kVectors;
      if ((row < 32 ? visible[0] : visible[1]) >> row % 32 & 1) continue;
      store_shared_zero(shared.key(stage.place) + vector / 8 * Traits::kTokenPanel + row * kPanelRowBytes +
                        vector % 8 * 16);
    }
    fence_async_proxy();
    named_barrier_sync(1, kThreads);
  };

  const auto take_slots = [&](const WriteBackwardItem& item) {
    const int64_t head = (item.batch * params.H + item.head) * params.M;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int slot = group * kGroupRows + warp * kWarpRows + lane / 4 + 8 * r;
      log_sum_exp[r] = slot < M ? params.log_sum_exp[head + slot] : INFINITY;
      delta[r] = slot < M ? params.delta[head + slot] : 0.0f;
    }
    barrier_wait(shared.held_full(held.place), held.parity);
    if constexpr (!Traits::kWide) {
      slots.load_rows(query, shared.query(held.place));
      slots.load_rows(du, shared.du(held.place));
    }
  };

  Rows left{}, ready{};  // of this tile, of the one before
  int part = blockIdx.x;
  if (part >= parts) return;
  WriteBackwardItem item;
  const auto take = [&] {
    item = write_backward_item<Traits>(params, chunks, part);
    take_slots(item);
    left = {item.batch * static_cast<int>(params.H) + item.head, item.first_token, 0};
  };
  take();
  int tiles = item.tiles;  // of tokens, that are left
  barrier_wait(shared.tokens_full(stage.place), stage.parity);
  product_fence();
  issue_logits();
  bool adds = false;  // whether this is not the first tile of an item
  while (true) {      // a tile of tokens, whose logits are on their way
    product_wait<0>();
    pin(s);
    product_fence();
    issue_weights_grad();
    barrier_wait(shared.scores_empty(stored.place), stored.parity ^ 1);
    weigh();
    left.visible = (warp < 2 ? visible[0] : visible[1]) >> (warp % 2 * 16);
    product_wait<0>();
    pin(dp);
    differentiate();
    clear_hidden_keys();
    product_fence();
    slots.issue_sum(grad_query, ds, shared.key(stage.place), adds);
    // Of the tile before, so that the groups do not wait for each other.
    if (adds) barrier_wait(shared.scores_full(multiplied.place), multiplied.parity);
    issue_of_tile();  // at an item's first, of what happens to lie there
    product_commit();
    const auto finish_tile = [&] {
      if (elected) barrier_arrive(shared.scores_empty(multiplied.place));
      multiplied.next();
      store_of_tokens(ready);
    };
    const uint32_t tokens_empty = shared.tokens_empty(stage.place), held_empty = shared.held_empty(held.place);
    stage.next();
    const bool last = --tiles == 0;
    bool more = true;
    if (last) {  // of this tile as well, while the slots are here
      product_wait<0>();
      pin(grad_query);
      pin(grad_tokens);
      if (adds) finish_tile();
      ready = left;
      barrier_wait(shared.scores_full(multiplied.place), multiplied.parity);
      product_fence();
      issue_of_tile();
      product_commit();
      store_partial(item);
      if constexpr (Traits::kHeld == 1) {
        product_wait<0>();
        pin(grad_tokens);
        finish_tile();
        if (elected) barrier_arrive(held_empty);
      }
      held.next();
      part += gridDim.x;
      more = part < parts;
      if (more) {
        take();
        tiles = item.tiles;
      }
    }
    if (more) barrier_wait(shared.tokens_full(stage.place), stage.parity);
    product_fence();
    issue_logits();  // past the end, of what happens to lie there
    product_wait<1>();
    pin(grad_tokens);
    if (elected) barrier_arrive(tokens_empty);
    if (last ? Traits::kHeld > 1 : adds) finish_tile();
    if (last) {
      if (Traits::kHeld > 1 && elected) barrier_arrive(held_empty);
      if (!more) break;
    } else {
      ready = left;
      left.token += kTokens;
    }
    adds = !last;
  }
  product_wait<0>();
  if (elected) store_wait<0>();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    memory_write_backward_kernel(const __grid_constant__ MemoryWriteBackwardParams params, int parts, int chunks,
                                 const __grid_constant__ WriteBackwardMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char dynamic[];
  const WriteBackwardShared<Traits> shared{(shared_address(dynamic) + 1023) / 1024 * 1024};
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.query, &maps.du, &maps.key, &maps.value}) prefetch_map(map);
    init_slot_barriers<Traits>(shared, 2, 1);
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_kernels_before();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
  if (group == 0) {
    give_registers<Traits::kCopyRegisters>();
    if (threadIdx.x == 0) {
      write_backward_copy<Traits>(params, parts, chunks, maps, shared);
    }
    if (threadIdx.x / kWarpSize == 1) write_backward_copy_mask<Traits>(params, parts, chunks, shared);
  } else {
    take_registers<Traits::kComputeRegisters>();
    write_backward_compute<Traits>(params, parts, chunks, maps, shared, group - 1);
  }
#endif
}

}  // namespace memformer_kernels
