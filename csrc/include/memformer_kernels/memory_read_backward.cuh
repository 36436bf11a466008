// memory_read, backward, on Hopper.
//
//   p = exp(scale (s - lse))    s = query key^T    ds = p (grad value^T - delta)    delta = rowdot(grad, output)
//   grad_value = p^T grad       grad_key = scale ds^T query       grad_query = scale ds key
//
// The slots stay on chip and the tokens stream past, in one pass of five products. A cluster of blocks holds the slots
// of a head, 128 a block: their keys and values, and the sums of their gradients in registers. What the slots of one
// block add to the query's gradient goes to the block of the cluster that adds up that part of the tile, always in the
// order of the blocks: no atomics, no sum in global memory. A block that holds all slots is alone: it has the query's
// gradient whole, and takes delta from the weights, so that it needs no output.
//
// The two groups that compute have s^T and ds^T as the rows of their products, and add up in turns.
#pragma once

#include "memformer_kernels/memory_read_backward_tiles.cuh"

namespace memformer_kernels {

template <typename Traits>
__device__ __forceinline__ void read_backward_copy(const MemoryReadBackwardParams& params, const ReadBackwardWork& work,
                                                   const CUtensorMap& grad_map, const CUtensorMap& query_map,
                                                   const CUtensorMap& key_map, const CUtensorMap& value_map,
                                                   ReadBackwardShared<Traits> shared) {
  constexpr int kTokens = Traits::kTokens;
  const int token_tiles = ceil_div(static_cast<int>(params.L), kTokens);
  Ring<Traits::kHeld> held;
  Ring<Traits::kStages> stage;
  for (ReadBackwardStep step; step.inside(work); step.next(work), held.next()) {
    const ReadBackwardItem item = read_backward_item<Traits>(params, work, step);
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
    copy(shared.key(held.place), Traits::kSlotPanel, key_map, held_full, item.first_slot);
    copy(shared.value(held.place), Traits::kSlotPanel, value_map, held_full, item.first_slot);
    const int64_t tile = (item.batch * params.H + item.head) * token_tiles + item.first_token / kTokens;
    const float* statistics = params.statistics + tile * 2 * kTokens;
    int token = item.first_token;
#pragma unroll 1
    for (int t = item.tiles; t > 0; --t, stage.next()) {
      const uint32_t full = shared.tokens_full(stage.place);
      barrier_wait(shared.tokens_empty(stage.place), stage.parity ^ 1);
      barrier_arrive_expecting(full, 2 * Traits::kTokenTile + (Traits::kAlone ? 0 : Traits::kStatistics));
      copy(shared.query(stage.place), Traits::kTokenPanel, query_map, full, token);
      copy(shared.grad(stage.place), Traits::kTokenPanel, grad_map, full, token);
      if constexpr (!Traits::kAlone) {
        copy_bytes(shared.statistics(stage.place), statistics, Traits::kStatistics, full);
      }
      token += kTokens;
      statistics += 2 * kTokens;
    }
  }
}

// The log-sum-exps of the tiles, which lie anywhere, by one warp; past the end what makes weights of 0.
template <typename Traits>
__device__ __forceinline__ void read_backward_copy_log_sum_exp(const MemoryReadBackwardParams& params,
                                                               const ReadBackwardWork& work,
                                                               ReadBackwardShared<Traits> shared) {
  static_assert(Traits::kTokens == 2 * kWarpSize);
  const int lane = threadIdx.x % kWarpSize;
  Ring<Traits::kStages> stage;
  for (ReadBackwardStep step; step.inside(work); step.next(work)) {
    const ReadBackwardItem item = read_backward_item<Traits>(params, work, step);
    const int64_t first = (item.batch * params.H + item.head) * params.L + item.first_token;
    int left = static_cast<int>(params.L) - item.first_token;
    const float* from = params.log_sum_exp + first;
#pragma unroll 1
    for (int t = item.tiles; t > 0; --t, stage.next(), left -= Traits::kTokens, from += Traits::kTokens) {
      const float low = lane < left ? from[lane] : INFINITY;
      const float high = lane + kWarpSize < left ? from[lane + kWarpSize] : INFINITY;
      barrier_wait(shared.tokens_empty(stage.place), stage.parity ^ 1);
      store_shared(shared.statistics(stage.place) + lane * 4, low);
      store_shared(shared.statistics(stage.place) + (lane + kWarpSize) * 4, high);
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.tokens_full(stage.place));
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void read_backward_compute(const MemoryReadBackwardParams& params,
                                                      const ReadBackwardWork& work, ReadBackwardShared<Traits> shared,
                                                      int group) {
  using T = typename Traits::T;
  constexpr int kWidth = Traits::kWidth, kChannels = Traits::kChannels, kTokens = Traits::kTokens;
  constexpr int kGroupCount = Traits::kGroups;
  constexpr int kThreads = kGroupCount * kGroupThreads;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize % 4, 0);
  const bool elected = lane == 0;
  const float log2_scale = params.log2_scale;

  float s[kTokens / 2], dp[kTokens / 2];     // [slots, tokens]: logits, then weights; their gradients
  uint32_t p[kTokens / 4], ds[kTokens / 4];  // rounded
  float grad_key[kChannels / 2], grad_value[kChannels / 2];
  float grad_query[kWidth / 4];  // of this group's half of the channels
  uint32_t key[Traits::kWide ? 1 : kWidth / 4], value[Traits::kWide ? 1 : kWidth / 4];  // narrow heads' stay here

  Ring<Traits::kHeld> held;
  Ring<Traits::kStages> stage;
  Ring<Traits::kScores> stored, multiplied;  // of ds
  Ring<Traits::kAlone ? 1 : Traits::kParts> sent, added;  // of what blocks send each other

  const SlotGroup<Traits> slots{group, warp, lane};
  const auto issue_logits = [&] { slots.issue_against(s, key, shared.key(held.place), shared.query(stage.place)); };
  const auto issue_weights_grad = [&] {
    slots.issue_against(dp, value, shared.value(held.place), shared.grad(stage.place));
  };
  const auto issue_grad_query = [&] {
    slots.issue_over_slots(grad_query, shared.scores(multiplied.place), shared.key(held.place), group * kWidth / 2);
  };
  const auto store_scores = [&] {
    slots.store_scores(shared.scores(stored.place), ds);
    fence_async_proxy();
    __syncwarp();
    if (elected) barrier_arrive(shared.scores_full(stored.place));
    stored.next();
  };
  // To the blocks that add up the units of this warp's rows and this group's channels.
  const auto send_grad_query = [&] {
    constexpr int kOwn = Traits::kUnitColumns / kGroupCount;
    barrier_wait(shared.parts_empty(sent.place), sent.parity ^ 1);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int unit = warp * Traits::kUnitColumns + group * kOwn + i;
      const int block = unit % Traits::kBlocks, place = unit - block + cluster_rank();
      const uint32_t offset = place * Traits::kUnitBytes + fresh(lane) * 16;
      const uint32_t target = cluster_address(shared.parts(sent.place) + offset, block);
      const uint32_t full = cluster_address(shared.parts_full(sent.place), block);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        cluster_store(target + half * kWarpSize * 16, grad_query + (2 * i + half) * 4, full);
      }
    }
    sent.next();
  };

  struct Rows {       // of the query's gradient, from a tile on
    int64_t element;  // of the first
    int count;
    int turn;         // twice the group of slots, and which of the two adds the tile up: the same one in every group
  };
  // This block's units of a tile, of all blocks of the cluster, by the group whose turn it is.
  const auto add_up = [&](const Rows& of) {
    const uint32_t full = shared.parts_full(added.place);
    if (of.turn % 2 == group) {
      const int row_size = static_cast<int>(params.H) * params.D, half = warp % 2, at_lane = fresh(lane);
      barrier_wait(full, added.parity);
#pragma unroll
      for (int i = 0; i < (Traits::kOwnUnits + 1) / 2; ++i) {
        const int own = 2 * i + warp / 2, unit = own * Traits::kBlocks + cluster_rank();
        if (unit >= Traits::kUnits) break;
        const int row = unit / Traits::kUnitColumns * 16 + at_lane / 4;  // and eight rows below
        const int channel = unit % Traits::kUnitColumns * 16 + half * 8 + at_lane % 4 * 2;
        const bool inside = row < of.count && channel < params.D, below = row + 8 < of.count && channel < params.D;
        const int64_t at = (of.element + (row * row_size + channel)) / 2, at_below = at + 4 * row_size;
        float2* carry = reinterpret_cast<float2*>(params.carry);
        float2 sum[2] = {};
        if (Traits::kGrouped && of.turn > 1) {
          if (inside) sum[0] = carry[at];
          if (below) sum[1] = carry[at_below];
        }
        const uint32_t from = shared.parts(added.place) + own * Traits::kBlocks * Traits::kUnitBytes +
                              (half * kWarpSize + at_lane) * 16;
        constexpr int kAtATime = Traits::kBlocks % 4 == 0 ? 4 : Traits::kBlocks == 2 ? 2 : 3;  // registers are few
#pragma unroll
        for (int first = 0; first < Traits::kBlocks; first += kAtATime) {
          float4 part[kAtATime];
#pragma unroll
          for (int j = 0; j < kAtATime; ++j) part[j] = load_shared4(from + (first + j) * Traits::kUnitBytes);
#pragma unroll
          for (int j = 0; j < kAtATime; ++j) {
            sum[0].x += part[j].x, sum[0].y += part[j].y, sum[1].x += part[j].z, sum[1].y += part[j].w;
          }
        }
        if (params.grad_query != nullptr && (!Traits::kGrouped || of.turn / 2 == work.groups - 1)) {
          uint32_t* target = static_cast<uint32_t*>(params.grad_query);
          if (inside) target[at] = pack<T>(sum[0].x * params.scale, sum[0].y * params.scale);
          if (below) target[at_below] = pack<T>(sum[1].x * params.scale, sum[1].y * params.scale);
        } else {
          if (inside) carry[at] = sum[0];
          if (below) carry[at_below] = sum[1];
        }
      }
      if (warp == 0 && elected) barrier_arrive_expecting(full, Traits::parts_bytes());
      __syncwarp();
      if (lane < Traits::kBlocks) cluster_barrier_arrive(cluster_address(shared.parts_empty(added.place), lane));
    }
    added.next();
  };

  const auto store_grad_query = [&](const Rows& of) {
    const int row_size = static_cast<int>(params.H) * params.D;
    const int row = warp * kWarpRows + fresh(lane) / 4, first = group * kWidth / 2;
    T* target = static_cast<T*>(params.grad_query) + of.element + row * row_size + first;
    const TwoRows rows{{row < of.count, row + 8 < of.count}};
    store_rows(target, 8 * row_size, rows, grad_query, params.scale, params.D - first);
  };

  const int M = static_cast<int>(params.M);
  int first_slot = 0;   // of this block
  bool hides = false;   // some of its slots
  bool visible[2] = {};  // this thread's two
  Rows left{};           // of this tile
  const auto slot_of = [&](int r) {
    return first_slot + group * kGroupRows + warp * kWarpRows + fresh(lane) / 4 + 8 * r;
  };
  const auto hide = [&](float(&x)[kTokens / 2]) {
    if (hides) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) x[i] = visible[i / 2 % 2] ? x[i] : 0.0f;
    }
    if (left.count < kTokens) {  // past the end there are zeros, which times an infinite key are NaN
      const int token = fresh(lane) % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) x[i] = i / 4 * 8 + i % 2 + token < left.count ? x[i] : 0.0f;
    }
  };
  const auto weigh = [&] {
    const uint32_t lse = shared.statistics(stage.place) + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 of = load_shared2(lse + j * 32);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        s[4 * j + 2 * r] = exp2_fast((s[4 * j + 2 * r] - of.x) * log2_scale);
        s[4 * j + 2 * r + 1] = exp2_fast((s[4 * j + 2 * r + 1] - of.y) * log2_scale);
      }
    }
    hide(s);
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  };
  // delta of the tile, of which this thread has two slots: added up over the lanes that have others, each of which ends
  // with two tokens, then over the warps.
  const auto add_up_delta = [&] {
    constexpr int kWarps = kGroupCount * kGroupThreads / kWarpSize, kColumns = kTokens / 4;
    const int at_lane = fresh(lane), at_warp = group * 4 + warp;
    float sum[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int at = i / 2 * 4 + i % 2;
      sum[i] = s[at] * dp[at] + s[at + 2] * dp[at + 2];
    }
    const float2 two = sum_over_lanes(sum);
    store_shared2(shared.sums(at_warp) + at_lane * 8, two.x, two.y);
    named_barrier_sync(1, kThreads);
    static_assert(kWarps == 8 && kTokens == 8 * kWarps, "each warp takes 8 tokens, and a lane two of the warps' sums");
    const uint32_t token = (at_warp * 8 + at_lane % 8) * 4;
    float total = load_shared(shared.sums(at_lane / 8) + token) + load_shared(shared.sums(at_lane / 8 + 4) + token);
    total += __shfl_xor_sync(0xffffffffu, total, 8);
    total += __shfl_xor_sync(0xffffffffu, total, 16);
    if (at_lane < 8) store_shared(shared.sums(kWarps) + token, total);
    named_barrier_sync(1, kThreads);
  };
  const auto differentiate = [&] {
    uint32_t delta = shared.statistics(stage.place) + kTokens * 4 + lane % 4 * 8;
    if constexpr (Traits::kAlone) {
      add_up_delta();
      delta = shared.sums(kThreads / kWarpSize) + lane % 4 * 8;
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 of = load_shared2(delta + j * 32);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        dp[4 * j + 2 * r] = s[4 * j + 2 * r] * (dp[4 * j + 2 * r] - of.x);
        dp[4 * j + 2 * r + 1] = s[4 * j + 2 * r + 1] * (dp[4 * j + 2 * r + 1] - of.y);
      }
    }
    hide(dp);
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) ds[i] = pack<T>(dp[2 * i], dp[2 * i + 1]);
  };
  ReadBackwardStep item;
  // The gradients of the slots' keys and values, or with several chunks this one's parts of them.
  const auto store_grad_slots = [&] {
    const ReadBackwardItem at = read_backward_item<Traits>(params, work, item);
    const int row_size = static_cast<int>(params.H) * params.D, slot = slot_of(0);
    const int64_t first = ((at.chunk * params.B + at.batch) * params.M + slot) * row_size + at.head * params.D;
    const TwoRows rows{{slot < M, slot + 8 < M}, {!hides || visible[0], !hides || visible[1]}};
    if (work.chunks == 1) {
      store_rows(static_cast<T*>(params.grad_key) + first, 8 * row_size, rows, grad_key, params.scale, params.D);
      store_rows(static_cast<T*>(params.grad_value) + first, 8 * row_size, rows, grad_value, 1.0f, params.D);
    } else {
      store_rows(static_cast<float*>(params.grad_key) + first, 8 * row_size, rows, grad_key, params.scale, params.D);
      store_rows(static_cast<float*>(params.grad_value) + first, 8 * row_size, rows, grad_value, 1.0f, params.D);
    }
  };

  // The keys and values of an item, once they are here.
  const auto take_slots = [&](int batch) {
    barrier_wait(shared.held_full(held.place), held.parity);
    hides = params.slot_mask.data != nullptr || first_slot + Traits::kSlots > M;
    if (hides) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int slot = slot_of(r);
        visible[r] = slot < M &&
                     (params.slot_mask.data == nullptr ||
                      params.slot_mask.data[batch * params.slot_mask.stride[0] + slot * params.slot_mask.stride[1]]);
        if (visible[r]) continue;
        const int row = group * kGroupRows + warp * kWarpRows + lane / 4 + 8 * r;
#pragma unroll
        for (int c = 0; c < Traits::kPanels * 2; ++c) {  // whatever they hold, even NaN, must not reach a product
          const uint32_t offset = c / 2 * Traits::kSlotPanel + row * kPanelRowBytes + (lane % 4 + c % 2 * 4) * 16;
          store_shared_zero(shared.key(held.place) + offset);
          store_shared_zero(shared.value(held.place) + offset);
        }
      }
      fence_async_proxy();
      named_barrier_sync(4, kThreads);
    }
    if constexpr (!Traits::kWide) {
      slots.load_rows(key, shared.key(held.place));
      slots.load_rows(value, shared.value(held.place));
    }
  };

  // A tile's part of the query's gradient is sent while the next tile is computed, and added up one more tile later, by
  // when the other blocks have sent theirs.
  Rows ready{}, waiting{};  // of the tile to be sent, of the one to be added up
  if (!item.inside(work)) return;
  const auto take = [&] {
    const ReadBackwardItem of = read_backward_item<Traits>(params, work, item);
    first_slot = of.first_slot;
    take_slots(of.batch);
    left = {((of.batch * params.L + of.first_token) * params.H + of.head) * params.D,
            static_cast<int>(params.L) - of.first_token, 2 * item.group};
    return of.tiles;
  };
  int tiles = take();  // of tokens, that are left
  barrier_wait(shared.tokens_full(stage.place), stage.parity);
  product_fence();
  issue_logits();
  bool adds = false;  // whether this is not the first tile of an item
  while (true) {      // a tile of tokens, whose logits are on their way
    product_wait<0>();
    pin(s);
    product_fence();
    issue_weights_grad();
    weigh();
    product_fence();
    slots.issue_sum(grad_value, p, shared.grad(stage.place), adds);
    product_commit();
    product_wait<1>();
    pin(dp);
    differentiate();
    if constexpr (Traits::kWide) product_wait<0>();  // frees the registers of p
    barrier_wait(shared.scores_empty(stored.place), stored.parity ^ 1);
    store_scores();
    product_fence();
    slots.issue_sum(grad_key, ds, shared.query(stage.place), adds);
    // Of the tile before, so that the groups do not wait for each other.
    if (adds) barrier_wait(shared.scores_full(multiplied.place), multiplied.parity);
    issue_grad_query();  // at an item's first, of what happens to lie there
    product_commit();
    const auto finish_grad_query = [&] {
      if (elected) barrier_arrive(shared.scores_empty(multiplied.place));
      multiplied.next();
      if constexpr (Traits::kAlone) {
        store_grad_query(ready);
      } else {
        send_grad_query();
        if (waiting.count > 0) add_up(waiting);
        waiting = ready;
      }
    };
    const uint32_t tokens_empty = shared.tokens_empty(stage.place), held_empty = shared.held_empty(held.place);
    stage.next();
    const bool last = --tiles == 0;
    bool more = true;
    if (last) {  // of this tile as well, while the keys are here
      product_wait<0>();
      pin(grad_query);
      pin(grad_key);
      pin(grad_value);
      if (adds) finish_grad_query();
      ready = left;
      barrier_wait(shared.scores_full(multiplied.place), multiplied.parity);
      product_fence();
      issue_grad_query();
      product_commit();
      if constexpr (Traits::kHeld == 1) {
        product_wait<0>();
        pin(grad_query);
        finish_grad_query();
        if (elected) barrier_arrive(held_empty);
      }
      store_grad_slots();
      held.next();
      item.next(work);
      more = item.inside(work);
      if (more) tiles = take();
    }
    if (more) barrier_wait(shared.tokens_full(stage.place), stage.parity);
    product_fence();
    issue_logits();  // past the end, of what happens to lie there
    product_wait<1>();
    pin(grad_query);
    barrier_arrive(tokens_empty);  // all lanes, which have read the statistics
    if (last ? Traits::kHeld > 1 : adds) finish_grad_query();
    if (last) {
      if (Traits::kHeld > 1 && elected) barrier_arrive(held_empty);
      if (!more) break;
    } else {
      ready = left;
      left.element += kTokens * params.H * params.D;
      left.count -= kTokens;
      left.turn ^= 1;
    }
    adds = !last;
  }
  product_wait<0>();
  if constexpr (!Traits::kAlone) add_up(waiting);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    memory_read_backward_kernel(const __grid_constant__ MemoryReadBackwardParams params,
                                const __grid_constant__ ReadBackwardWork work,
                                const __grid_constant__ CUtensorMap grad_map,
                                const __grid_constant__ CUtensorMap query_map,
                                const __grid_constant__ CUtensorMap key_map,
                                const __grid_constant__ CUtensorMap value_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char dynamic[];
  const ReadBackwardShared<Traits> shared{(shared_address(dynamic) + 1023) / 1024 * 1024};
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&grad_map, &query_map, &key_map, &value_map}) prefetch_map(map);
    init_slot_barriers<Traits>(shared, Traits::kAlone ? 2 : 1, kWarpSize);
    for (int i = 0; i < Traits::kParts; ++i) {
      barrier_init(shared.parts_full(i), 1);
      barrier_init(shared.parts_empty(i), Traits::kBlocks * kGroupThreads / kWarpSize);
    }
    fence_barrier_init();
    for (int i = 0; i < Traits::kParts; ++i) {
      barrier_arrive_expecting(shared.parts_full(i), Traits::parts_bytes());
    }
  }
  __syncthreads();
  wait_for_kernels_before();
  cluster_sync();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
  if (group == 0) {
    give_registers<Traits::kCopyRegisters>();
    if (threadIdx.x == 0) {
      read_backward_copy<Traits>(params, work, grad_map, query_map, key_map, value_map, shared);
    }
    if constexpr (Traits::kAlone) {
      if (threadIdx.x / kWarpSize == 1) read_backward_copy_log_sum_exp<Traits>(params, work, shared);
    }
  } else {
    take_registers<Traits::kComputeRegisters>();
    read_backward_compute<Traits>(params, work, shared, group - 1);
  }
  __syncwarp();
  cluster_sync();  // none leaves while others may still write to it
#endif
}

// Statistics of the tokens, tile by tile: log_sum_exp and delta, and past the end what makes weights of 0.
template <typename T, int kWidth>
__global__ void memory_read_backward_statistics_kernel(const __grid_constant__ MemoryReadBackwardParams params,
                                                       int64_t tiles) {
  wait_for_kernels_before();
  constexpr int kLanes = kWidth / Vector<T>::kSize, kTokens = kMemoryReadBackwardTokens;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int64_t heads = row / (tiles * kTokens), token = row % (tiles * kTokens);
  if (heads >= params.B * params.H) return;
  const int64_t batch = heads / params.H, head = heads % params.H;
  float delta = 0.0f;
  if (token < params.L) {
    const int first = threadIdx.x % kLanes * Vector<T>::kSize;
    const int64_t offset = ((batch * params.L + token) * params.H + head) * params.D;
    const int64_t(&stride)[4] = params.grad_output.stride;
    const T* grad_row =
        static_cast<const T*>(params.grad_output.data) + batch * stride[0] + head * stride[1] + token * stride[2];
    const auto grad = load_vector<true>(grad_row, 1, first, params.D);
    const auto output = load_vector<true>(static_cast<const T*>(params.output) + offset, 1, first, params.D);
    const auto rounding = load_vector<true>(static_cast<const T*>(params.rounding) + offset, 1, first, params.D);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      delta += to_float(grad.get(i)) * (to_float(output.get(i)) + to_float(rounding.get(i)));
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
  if (threadIdx.x % kLanes == 0) {
    float* tile = params.statistics + (heads * tiles + token / kTokens) * 2 * kTokens + token % kTokens;
    tile[0] = token < params.L ? params.log_sum_exp[heads * params.L + token] : INFINITY;
    tile[kTokens] = delta;
  }
}

}  // namespace memformer_kernels
