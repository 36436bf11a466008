// The forward of both memories' attention on Hopper: rows attend over keys.
//
//   s = query key^T      p = softmax(scale s), 0 in a row that sees nothing      output = p value
//
// A block has one warpgroup that copies tiles into shared memory and kGroups that compute, each with 64 rows of its
// own. In the steady state a group issues the logits of the next tile of keys and the product of the present one's
// weights together, and does the softmax of the first while the second runs; the groups take turns at issuing, so that
// one computes its softmax while the matrix units are busy with the other's products. Of narrow heads two blocks of one
// group share a multiprocessor, without turns. Blocks go on to their next tile of rows without a pause: the logits of
// its first keys are issued with the last product of the tile before, whose sums are stored after the softmax. Wide
// heads' keys that all fit the shared memory are copied once for all of a block's rows of a head.
//
// An operation, memory_read_forward.cuh or memory_write_forward.cuh, is a struct that says of its params which tensors
// are rows and keys, whether a row has an entry of its own beside the keys, and what becomes of a row's sums.
#pragma once

#include "memformer_kernels/attention_tiles.cuh"

namespace memformer_kernels {

// Rows from `first` on of the tile's head; `full` then says that they are there.
template <typename Traits, int kPanelBytes, bool kOnce = false>
__device__ __forceinline__ void copy_rows(uint32_t target, const CUtensorMap& map, uint32_t full, int first,
                                          const AttentionTile& at) {
  barrier_arrive_expecting(full, Traits::kPanels * kPanelBytes);
#pragma unroll
  for (int p = 0; p < Traits::kPanels; ++p) {
    copy_tile<kOnce>(target + p * kPanelBytes, &map, full, p * Traits::kPanelColumns, first, at.head, at.batch);
  }
}

template <typename Traits, typename Op>
__device__ __forceinline__ void attention_copy(const typename Op::Params& params, const AttentionMaps& maps,
                                               const AttentionWork& work, AttentionShared<Traits> shared) {
  constexpr bool kOnce = Op::kChunks && Traits::kWidth == 64;  // a wider head shares cache lines with its neighbours
  const AttentionTiles tiles = attention_tiles<Traits, Op>(params, work);
  Ring<2> queries;
  Ring<Traits::kStages> keys;
#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.step, queries.next()) {
    const AttentionTile at = attention_tile<Traits, Op>(params, work, tile);
    const int query = queries.place;
    barrier_wait(shared.query_empty(query), queries.parity ^ 1);
    copy_rows<Traits, Traits::kQueryPanel>(shared.query(query), maps.query, shared.query_full(query), at.row, at);
    if (attention_keeps_keys<Traits, Op>(params, work, tiles, tile)) continue;
#pragma unroll 1
    for (int i = at.key_tiles - 1; i >= 0; --i, keys.next()) {
      const int place = keys.place, first = at.first_key + i * Traits::kKeys;
      barrier_wait(shared.key_empty(place), keys.parity ^ 1);
      copy_rows<Traits, Traits::kKeyPanel, kOnce>(shared.key(place), maps.key, shared.key_full(place), first, at);
      barrier_wait(shared.value_empty(place), keys.parity ^ 1);
      copy_rows<Traits, Traits::kKeyPanel, kOnce>(shared.value(place), maps.value, shared.value_copied(place), first,
                                                  at);
    }
  }
}

constexpr int kOwnThreads = 2 * kWarpSize;

// By kOwnThreads: the logits of the rows' own entries, which belong to the first chunk, from their keys, and then
// copies of their values in the place of the keys.
template <typename Traits, typename Op>
__device__ __forceinline__ void attention_own(const typename Op::Params& params, const AttentionMaps& maps,
                                              const AttentionWork& work, AttentionShared<Traits> shared, int thread) {
  const AttentionTiles tiles = attention_tiles<Traits, Op>(params, work);
  Ring<2> queries;
  Ring<1> own;
#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.step, queries.next()) {
    const AttentionTile at = attention_tile<Traits, Op>(params, work, tile);
    const uint32_t query = shared.query(queries.place), query_full = shared.query_full(queries.place);
    if (at.chunk > 0) {
      barrier_wait(query_full, queries.parity);
    } else {
      barrier_wait(shared.own_empty(), own.parity ^ 1);
      if (thread == 0) {
        copy_rows<Traits, Traits::kQueryPanel>(shared.own(), maps.own_key, shared.own_key_full(), at.row, at);
      }
      barrier_wait(query_full, queries.parity);
      barrier_wait(shared.own_key_full(), own.parity);
#pragma unroll 1
      for (int row = thread; row < Traits::kRows; row += kOwnThreads) {
        Op::template own_logit<typename Traits::T>(params, at, row, query, shared.own(), shared);
      }
      named_barrier_sync(1 + Traits::kGroups, kOwnThreads);  // all have read the keys
      if (thread == 0 && Op::copies_own(params)) {
        copy_rows<Traits, Traits::kQueryPanel>(shared.own(), maps.own_value, shared.own_full(), at.row, at);
      } else {
        barrier_arrive(shared.own_full());
      }
      own.next();
    }
    barrier_arrive(shared.query_empty(queries.place));
  }
}

// With a mask, by one warp: says which keys of a tile are visible, and clears the values of the others, which, even
// NaN, must not reach the product with their weights of 0.
template <typename Traits, typename Op>
__device__ __forceinline__ void attention_mask(const typename Op::Params& params, const AttentionWork& work,
                                               AttentionShared<Traits> shared) {
  const AttentionTiles tiles = attention_tiles<Traits, Op>(params, work);
  constexpr int kWords = Traits::kWords, kOfKeys = Traits::kKeys / kWarpSize;
  constexpr int kRowVectors = Traits::kPanelRowBytes / 16, kRowsAtOnce = kWarpSize / kRowVectors;
  const int lane = threadIdx.x % kWarpSize;
  Ring<Traits::kStages> values;
#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
    if (attention_keeps_keys<Traits, Op>(params, work, tiles, tile)) continue;
    const AttentionTile at = attention_tile<Traits, Op>(params, work, tile);
    const int64_t stride = Op::mask(params).stride[1];
    const uint8_t* mask = Op::mask(params).data + at.batch * Op::mask(params).stride[0] + at.first_key * stride;
#pragma unroll 1
    for (int i = at.key_tiles - 1; i >= 0; --i, values.next()) {
      uint32_t visible[kWords];
      bool all = true;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int key = i * Traits::kKeys + w * kWarpSize + lane;
        visible[w] = w < kOfKeys ? __ballot_sync(0xffffffffu, key < at.keys && mask[key * stride]) : visible[w - 1];
        all = all && visible[w] == 0xffffffffu;
      }
      barrier_wait(shared.value_empty(values.place), values.parity ^ 1);
      if (lane == 0) {
#pragma unroll
        for (int w = 0; w < kWords; w += 2) {
          store_shared2(shared.visible(values.place) + 4 * w, __uint_as_float(visible[w]),
                        __uint_as_float(visible[w + 1]));
        }
        barrier_arrive(shared.visible_full(values.place));
      }
      __syncwarp();
      barrier_wait(shared.value_copied(values.place), values.parity);
      if (!all) {
        const uint32_t value = shared.value(values.place) + lane * 16;
#pragma unroll
        for (int w = 0; w < kOfKeys; ++w) {
          const uint32_t rows = visible[w] >> lane / kRowVectors;
#pragma unroll
          for (int row = 0; row < kWarpSize; row += kRowsAtOnce) {
            if (rows >> row & 1) continue;
#pragma unroll
            for (int p = 0; p < Traits::kPanels; ++p) {
              store_shared_zero(value + p * Traits::kKeyPanel + (w * kWarpSize + row) * Traits::kPanelRowBytes);
            }
          }
        }
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.value_full(values.place));
    }
  }
}

constexpr float kLeastLogit = -3.402823466e38f;  // taken for the largest of keys whose logits are all less

// Of a thread's two rows: the largest logit and the sum of the weights relative to it.
struct AttentionSums {
  float top[2], total[2];
  __device__ __forceinline__ bool seen(int r) const { return top[r] >= kLeastLogit; }  // whether the row sees a key
};

constexpr float kNearLogits = 128.0f;  // scaled, in base 2

template <typename Traits, typename Op>
__device__ __forceinline__ void attention_compute(const typename Op::Params& params, const AttentionMaps& maps,
                                                  const AttentionWork& work, AttentionShared<Traits> shared,
                                                  int group) {
  using T = typename Traits::T;
  const AttentionTiles tiles = attention_tiles<Traits, Op>(params, work);
  constexpr int kKeys = Traits::kKeys, kWidth = Traits::kWidth, kRowBytes = Traits::kPanelRowBytes;
  constexpr int kKeySteps = kKeys / 16, kWidthSteps = kWidth / 16;
  constexpr bool kTakesTurns = Traits::kGroups > 1;
  const bool elected = threadIdx.x % kWarpSize == 0;
  const float log2_scale = params.log2_scale;

  float s[kKeys / 2];     // logits, then weights; thread's rows are lane / 4 and that + 8 of its warp's 16
  uint32_t p[kKeys / 4];  // weights, rounded
  float out[kWidth / 2];
  AttentionSums sums;  // of the rows that s and p are of

  Ring<2> queries;
  Ring<Traits::kStages> keys, values;
  Ring<1> own;
  int tile = tiles.first;
  bool keeps = attention_keeps_keys<Traits, Op>(params, work, tiles, tile + 1);  // the keys that logits are taken of

  const auto issue_logits = [&] {
    const uint64_t a = tile_descriptor<kRowBytes>(shared.query(queries.place) + group * kGroupRows * kRowBytes, 0);
    const uint64_t b = tile_descriptor<kRowBytes>(shared.key(keys.place), 0);
#pragma unroll
    for (int k = 0; k < kWidthSteps; ++k) {
      const int panel = k * 32 / kRowBytes, inside = k * 32 % kRowBytes;
      product<T, kAlongSum, kAlongSum>(s, a + ((panel * Traits::kQueryPanel + inside) >> 4),
                                       b + ((panel * Traits::kKeyPanel + inside) >> 4), k > 0);
    }
  };
  const auto issue_output = [&](bool adds) {
    const uint64_t b = tile_descriptor<kRowBytes>(shared.value(values.place), Traits::kKeyPanel);
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
      product<T, kAcrossSum>(out, p + 4 * k, b + (k * 16 * kRowBytes >> 4), k > 0 || adds);
    }
  };
  // Logits of one tile of keys into weights relative to the new maximum; what the sums so far shrink by.
  const auto softmax = [&](int key_tile, int all_keys, bool first, float(&shrink)[2]) {
    bool masked = first && all_keys % kKeys != 0;  // the last keys come first
    [[maybe_unused]] uint32_t visible[Traits::kWords];
    if (first) {
      sums.top[0] = sums.top[1] = Traits::kMasked ? -INFINITY : kLeastLogit;
      sums.total[0] = sums.total[1] = 0.0f;
    }
    if constexpr (Traits::kMasked) {
      barrier_wait(shared.visible_full(keys.place), keys.parity);
      bool seen = false;
      masked = false;
#pragma unroll
      for (int w = 0; w < Traits::kWords; w += 2) {  // by the lane that later says that they may be overwritten
        const float2 words = elected ? load_shared2(shared.visible(keys.place) + 4 * w) : float2{};
        visible[w] = __shfl_sync(0xffffffffu, __float_as_uint(words.x), 0);
        visible[w + 1] = __shfl_sync(0xffffffffu, __float_as_uint(words.y), 0);
        masked = masked || (visible[w] & visible[w + 1]) != 0xffffffffu;
        seen = seen || (visible[w] | visible[w + 1]) != 0;
      }
      if (seen) {
#pragma unroll
        for (float& top : sums.top) top = fmaxf(top, kLeastLogit);
      }
      masked = __any_sync(0xffffffffu, masked);
    }
    if (masked) {
      const int first_column = fresh(threadIdx.x) % 4 * 2;  // not kept, as registers are few
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = first_column + j;
          bool keep = i * 2 + column < all_keys - key_tile * kKeys;
          if constexpr (Traits::kMasked) keep = visible[i / 16] >> (i / 4 % 4 * 8 + column) & 1;
          if (!keep) s[i + j] = s[i + j + 2] = -INFINITY;
        }
      }
    }
    float reference[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most[4];  // chains of a quarter of the length
#pragma unroll
      for (int c = 0; c < 4; ++c) most[c] = s[c / 2 * 4 + c % 2 + 2 * r];
#pragma unroll
      for (int i = 8; i < kKeys / 2; i += 8) {
#pragma unroll
        for (int c = 0; c < 4; ++c) most[c] = fmaxf(most[c], s[i + c / 2 * 4 + c % 2 + 2 * r]);
      }
      float new_top = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
      new_top = fmaxf(new_top, sums.top[r]);
      reference[r] = new_top == -INFINITY ? 0.0f : new_top;  // nothing visible so far: 0, not NaN
      shrink[r] = exp2_fast((sums.top[r] - reference[r]) * log2_scale);
      sums.top[r] = new_top;
    }
    const auto weigh = [&](auto exact) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float offset = reference[r] * log2_scale;
        float sum[4] = {sums.total[r] * shrink[r], 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kKeys / 2; i += 8) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& x = s[i + c / 2 * 4 + c % 2 + 2 * r];
            x = exp2_fast(decltype(exact)::value ? (x - reference[r]) * log2_scale : fmaf(x, log2_scale, -offset));
            sum[c] += x;
          }
        }
        sums.total[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
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
    for (int i = 0; i < kKeys / 4; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  };
  const auto store = [&](const AttentionTile& at, AttentionSums& sums) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums.total[r] += __shfl_xor_sync(0xffffffffu, sums.total[r], 1);
      sums.total[r] += __shfl_xor_sync(0xffffffffu, sums.total[r], 2);
    }
    const int row = group * kGroupRows + fresh(threadIdx.x) / kWarpSize % 4 * kWarpRows;  // the warp's first
    const bool has_own = Traits::kOwn && at.chunk == 0;
    if (has_own) barrier_wait(shared.own_full(), own.parity);
    Op::template store<T>(params, maps, at, row, sums, out, shared);
    if (has_own) {
      barrier_arrive(shared.own_empty());
      own.next();
    }
  };
  // Past a tile of keys, or of values, or back to the first for the next tile of rows.
  const auto pass = [&](Ring<Traits::kStages>& ring, bool again, int key_tiles) {
    ring.next();
    if (again) ring.back(key_tiles);
  };
  float shrink[2];
  barrier_wait(shared.query_full(0), 0);
  barrier_wait(shared.key_full(0), 0);
  product_fence();
  issue_logits();
  product_commit();
  product_wait<0>();
  pin(s);
  int all_keys = attention_keys<Op>(params, work, tile), key_tile = ceil_div(all_keys, kKeys) - 1;  // of p
  if (elected && !keeps) barrier_arrive(shared.key_empty(0));
  softmax(key_tile, all_keys, true, shrink);
  pass(keys, keeps && key_tile == 0, ceil_div(all_keys, kKeys));
  round_weights();
  if (kTakesTurns && group == Traits::kGroups - 1) {
    named_barrier_arrive(1, 2 * kGroupThreads);  // the first turn is group 0's
  }

  while (true) {
    const bool last = key_tile == 0, keeps_values = keeps;
    const int next_tile = last ? tile + tiles.step : tile;
    const bool more = next_tile < tiles.end;
    if (last) {
      if (elected) barrier_arrive(shared.query_empty(queries.place));
      queries.next();
      if (more) barrier_wait(shared.query_full(queries.place), queries.parity);
    }
    if (more) barrier_wait(shared.key_full(keys.place), keys.parity);
    if (kTakesTurns) named_barrier_sync(1 + group, 2 * kGroupThreads);
    pin(s);
    pin(out);
    product_fence();
    issue_logits();  // past the end, of what happens to lie there
    product_commit();
    barrier_wait(shared.value_full(values.place), values.parity);
    issue_output((key_tile + 1) * kKeys < all_keys);
    product_commit();
    if (kTakesTurns) named_barrier_arrive(1 + (group + 1) % Traits::kGroups, 2 * kGroupThreads);
    AttentionSums done = sums;
    if (last) {
      keeps = attention_keeps_keys<Traits, Op>(params, work, tiles, next_tile + 1);
      all_keys = attention_keys<Op>(params, work, next_tile);
    }
    key_tile = last ? ceil_div(all_keys, kKeys) - 1 : key_tile - 1;
    product_wait<1>();
    pin(s);
    if (more) {
      if (elected && !keeps) barrier_arrive(shared.key_empty(keys.place));
      softmax(key_tile, all_keys, last, shrink);
      pass(keys, keeps && key_tile == 0, ceil_div(all_keys, kKeys));
    }
    pin(s);
    if (all_keys > 0) product_wait<0>();  // always: without a branch, ptxas moves the wait up before the softmax
    product_wait<0>();
    pin(out);
    pin(s);
    if (elected && !keeps_values) barrier_arrive(shared.value_empty(values.place));
    pass(values, keeps_values && last, ceil_div(all_keys, kKeys));
    round_weights();
    if (last) {
      store(attention_tile<Traits, Op>(params, work, tile), done);
      if (!more) break;
      tile = next_tile;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) out[i] *= shrink[i / 2 % 2];
    }
  }
}

template <typename Traits, typename Op>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    attention_forward_kernel(const __grid_constant__ typename Op::Params params,
                             const __grid_constant__ AttentionMaps maps,
                             const __grid_constant__ AttentionWork work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char dynamic[];
  const AttentionShared<Traits> shared{(shared_address(dynamic) + 1023) / 1024 * 1024};
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.query, &maps.key, &maps.value}) prefetch_map(map);
    constexpr int kReaders = Traits::kGroups * kGroupThreads / kWarpSize;
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.query_full(i), 1);
      barrier_init(shared.query_empty(i), kReaders + (Traits::kOwn ? kOwnThreads : 0));
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      barrier_init(shared.key_full(i), 1);
      barrier_init(shared.value_full(i), 1);
      barrier_init(shared.key_empty(i), kReaders);
      barrier_init(shared.value_empty(i), kReaders);
      if (Traits::kMasked) {
        barrier_init(shared.value_copied(i), 1);
        barrier_init(shared.visible_full(i), 1);
      }
    }
    if (Traits::kOwn) {
      barrier_init(shared.own_key_full(), 1);
      barrier_init(shared.own_full(), kOwnThreads);
      barrier_init(shared.own_empty(), Traits::kGroups * kGroupThreads);
    }
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_kernels_before();
  const int group = threadIdx.x / kGroupThreads;
  if (group == 0) {
    give_registers<Traits::kCopyRegisters>();
    if (threadIdx.x == 0) {
      attention_copy<Traits, Op>(params, maps, work, shared);
    }
    if constexpr (Traits::kMasked) {
      if (threadIdx.x / kWarpSize == 1) attention_mask<Traits, Op>(params, work, shared);
    }
    if constexpr (Traits::kOwn) {
      const int thread = static_cast<int>(threadIdx.x) - (kGroupThreads - kOwnThreads);
      if (thread >= 0) attention_own<Traits, Op>(params, maps, work, shared, thread);
    }
  } else {
    take_registers<Traits::kComputeRegisters>();
    attention_compute<Traits, Op>(params, maps, work, shared, group - 1);
    if (threadIdx.x % kWarpSize == 0) store_wait<0>();
  }
#endif
}

// Groups of a block, at most so many, that go over the rows of all heads in the least time; `sharing` blocks of one
// group fit a multiprocessor. A row has the same bits in any.
inline int fastest_groups(int64_t rows, int64_t heads, int64_t multiprocessors, int most, int sharing) {
  constexpr int kTimes[] = {20, 29, 37};  // that a multiprocessor takes with so many groups, in proportion
  int fastest = most;
  int64_t least = INT64_MAX;
  for (int groups = most; groups > 0; --groups) {
    const int64_t tiles = ceil_div<int64_t>(rows, groups * kGroupRows) * heads;
    const int blocks = groups == 1 && tiles > multiprocessors ? sharing : 1;
    const int64_t time = ceil_div(tiles, blocks * multiprocessors) * kTimes[groups * blocks - 1];
    if (time < least) {
      least = time;
      fastest = groups;
    }
  }
  return fastest;
}

template <typename Traits, typename Op>
cudaError_t launch_attention_forward(const typename Op::Params& params, int64_t chunks) {
  const auto kernel = attention_forward_kernel<Traits, Op>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kShared);
  AttentionMaps maps{};
  const auto map = [&](CUtensorMap* map, const Strided<4>& tensor, int64_t rows, int box) {
    if (error == cudaSuccess) {
      error = make_tensor_map(map, params.dtype, tensor, params.B, params.H, rows, params.D, box,
                              Traits::kPanelColumns);
    }
  };
  map(&maps.query, params.query, Op::rows(params), Traits::kRows);
  map(&maps.key, params.key, Op::keys(params), Traits::kKeys);
  map(&maps.value, params.value, Op::keys(params), Traits::kKeys);
  Op::template add_maps<Traits>(params, maps, map);
  if (error != cudaSuccess) return error;
  const int64_t row_tiles = ceil_div<int64_t>(Op::rows(params), Traits::kRows);
  const int64_t tiles = row_tiles * params.B * params.H * chunks;
  if (tiles > INT32_MAX - Traits::kBlocks * params.multiprocessors || Op::rows(params) > INT32_MAX - Traits::kRows ||
      Op::keys(params) > INT32_MAX - Traits::kKeys) {
    return cudaErrorInvalidConfiguration;
  }
  int64_t last_keys = Op::keys(params);
  if constexpr (Op::kChunks) last_keys -= (chunks - 1) * params.chunk;
  const AttentionWork work{
      .tiles = static_cast<int>(tiles),
      .last_chunk = static_cast<int>(tiles - tiles / chunks),
      .last_keys = static_cast<int>(last_keys),
      .row_tiles = Divisor(row_tiles),
      .heads = Divisor(params.H),
      .batches = Divisor(params.B),
  };
  const int64_t at_once = int64_t{Traits::kBlocks} * params.multiprocessors;
  const unsigned blocks = static_cast<unsigned>(tiles < at_once ? tiles : at_once);
  return launch_overlapping(kernel, blocks, Traits::kThreads, Traits::kShared, params.stream, params, maps,
                            work);
}

}  // namespace memformer_kernels
