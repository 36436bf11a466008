// What Hopper adds, as PTX: barriers in shared memory, copies of tiles by the tensor memory accelerator (TMA), clusters
// of blocks, matrix products of a group of four warps, and registers that groups hand to each other. PTX ISA 9.0,
// sections 9.7.9 to 9.7.15.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace memformer_kernels {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;      // of its matrix products
constexpr int kWarpRows = 16;       // of them, of each warp

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// -- Kernels that start while the one before them ends ----------------------------------------------------------------

// Waits until the kernels before this one have ended and what they wrote can be read: PTX's griddepcontrol. What stands
// before it overlaps them, and may look at no global memory but maps of tensors. Letting the next kernel start before
// this one's end is slower: its blocks then crowd on the multiprocessors that are free first.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// How a kernel is launched that calls `wait_for_kernels_before` in every thread.
inline cudaLaunchAttribute overlapping() {
  cudaLaunchAttribute attribute{.id = cudaLaunchAttributeProgrammaticStreamSerialization};
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}
template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), unsigned blocks, int threads, int shared_bytes,
                               cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = overlapping();
  const cudaLaunchConfig_t config{.gridDim = {blocks}, .blockDim = {static_cast<unsigned>(threads)},
                                  .dynamicSmemBytes = static_cast<size_t>(shared_bytes), .stream = stream,
                                  .attrs = &attribute, .numAttrs = 1};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// -- Barriers in shared memory ---------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for so many bytes of copies as well.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// A place in a ring of kSize, and the parity of the present round.
template <int kSize>
struct Ring {
  int place = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++place == kSize) {
      place = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void back(int steps) {  // at most kSize
    place -= steps;
    if (place < 0) {
      place += kSize;
      parity ^= 1;
    }
  }
};

// Barriers of the block by number: `threads` of them meet, some of which only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// -- Tiles from global to shared memory ------------------------------------------------------------------------------

// Fetches what a copy looks up of its tensor.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Box at (channel, row, head, batch); what lies outside the tensor arrives as 0. What is copied once is the first that
// the L2 cache gives up.
template <bool kOnce = false>
__device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap* map, uint32_t barrier, int channel,
                                          int row, int head, int batch) {
  if constexpr (kOnce) {
    asm volatile(
        "{.reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%3, %4, %5, %6}], [%2], policy;}" ::"r"(target),
        "l"(map), "r"(barrier), "r"(channel), "r"(row), "r"(head), "r"(batch)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(channel), "r"(row), "r"(head), "r"(batch)
        : "memory");
  }
}

// The same box from shared to global memory, but for what lies outside the tensor. A thread waits until all of its
// stores but kPending have read what they store.
__device__ __forceinline__ void store_tile(const CUtensorMap* map, uint32_t source, int channel, int row, int head,
                                           int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(map), "r"(source), "r"(channel), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
template <int kPending>
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// What this thread has written to shared memory becomes visible to matrix products and copies.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// So many bytes, a multiple of 16, from one place in a row to another.
__device__ __forceinline__ void copy_bytes(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// -- Blocks of a cluster, which reach each other's shared memory -----------------------------------------------------

__device__ __forceinline__ int cluster_rank() {  // of this block
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_number() {
  uint32_t number;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
  return static_cast<int>(number);
}
__device__ __forceinline__ int cluster_count() {
  uint32_t count;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return static_cast<int>(count);
}

// Where an address in this block's shared memory lies in that of block `rank`.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, int rank) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Both addresses of the same block: the barrier's phase counts the 16 bytes when they are there.
__device__ __forceinline__ void cluster_store(uint32_t target, const float* four, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void cluster_barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// -- Fragments: what a warp holds of a matrix -----------------------------------------------------------------------
//
// Of every 8 x 8 block lane i has elements 2 (i % 4) and that + 1 of row i / 4.

// Elements of shared memory by their address.
__device__ __forceinline__ float2 load_shared2(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ float4 load_shared4(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
__device__ __forceinline__ float load_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ void store_shared2(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void store_shared_zero(uint32_t address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Four blocks from and to shared memory; lane i gives the address of row i % 8 of block i / 8.
__device__ __forceinline__ void load_matrices(uint32_t* registers, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t* registers) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(registers[0]),
               "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// The value, from which the compiler computes nothing ahead of a loop, to keep it in registers that are needed there.
template <typename T>
__device__ __forceinline__ T fresh(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Sums over the eight lanes that differ in their quad, of 16 values each: lane i gets those of values 2 (i / 4) and
// 2 (i / 4) + 1.
__device__ __forceinline__ float2 sum_over_lanes(const float (&value)[16]) {
  const auto halve = [](float low, float high, int step) {
    const bool upper = threadIdx.x & step;
    return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, step);
  };
  float eight[8], four[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) eight[i] = halve(value[i], value[i + 8], 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = halve(eight[i], eight[i + 4], 8);
  return make_float2(halve(four[0], four[2], 4), halve(four[1], four[3], 4));
}

// Of four lanes with four words each: lane i gets the i-th word of every one.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, lane & step ? words[i] : words[i | step], step);
      if (lane & step) {
        words[i] = received;
      } else {
        words[i | step] = received;
      }
    }
  }
}

// In one access, which the compiler takes apart where it sees through a plain one.
__device__ __forceinline__ void store_global(void* target, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}
// Partial sums, which the next kernel reads: the last that the L2 cache gives up.
__device__ __forceinline__ void store_global(float* target, float x, float y) {
  asm volatile(
      "{.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
      "st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, policy;}" ::"l"(target),
      "f"(x), "f"(y)
      : "memory");
}

// Stores two rows, eight apart, of what a product gave, from target and from target + step on, as far as channels
// reach: those that are inside, as 0 where they are not shown. Of 32 channels in 16 bits each of four lanes has eight.
struct TwoRows {
  bool inside[2], shown[2] = {true, true};
};
template <typename T, int kCount>
__device__ __forceinline__ void store_rows(T* target, int step, const TwoRows& rows, const float (&d)[kCount],
                                           float scale, int channels) {
  const int lane = fresh(threadIdx.x) % 4, channel = lane * 8;
#pragma unroll
  for (int c = 0; c < kCount / 16; ++c) {
    uint32_t words[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* two = d + (4 * c + i) * 4 + 2 * r;
        words[r][i] = rows.shown[r] ? pack<T>(two[0] * scale, two[1] * scale) : 0;
      }
      transpose_quad(words[r], lane);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (rows.inside[r] && 32 * c + channel < channels) {
        store_global(target + r * step + 32 * c + channel, words[r]);
      }
    }
  }
}
template <int kCount>
__device__ __forceinline__ void store_rows(float* target, int step, const TwoRows& rows, const float (&d)[kCount],
                                           float scale, int channels) {
  const int channel = fresh(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* row = target + r * step + channel;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      if (!rows.inside[r] || 8 * j + channel >= channels) break;
      const float* two = d + 4 * j + 2 * r;
      store_global(row + 8 * j, rows.shown[r] ? two[0] * scale : 0.0f, rows.shown[r] ? two[1] * scale : 0.0f);
    }
  }
}

// -- Registers -------------------------------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// -- Matrix products of a warpgroup ----------------------------------------------------------------------------------
//
// 16-bit tiles lie in shared memory as TMA's swizzle leaves them, in panels one after the other: of 64 columns, whose
// rows are 128 bytes, or of 32. Eight rows are an atom.

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 2 * kPanelColumns;

// What moves the vectors of 16 bytes in a row: vector i is at place i ^ row_swizzle(row).
template <int kRowBytes = kPanelRowBytes>
__device__ __forceinline__ int row_swizzle(int row) {
  return row / (128 / kRowBytes) % (kRowBytes / 16);
}

// How a product finds a tile. `panel`: bytes between panels, which only a product over the rows looks at.
template <int kRowBytes = kPanelRowBytes>
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t panel) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kSwizzle = uint64_t{kRowBytes == 128 ? 1 : 2} << 62, kAtoms = uint64_t{8 * kRowBytes >> 4} << 32;
  return kSwizzle | kAtoms | uint64_t{panel >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// A warp's rows of what a product gave, in 16 bits, as many blocks of it as a panel takes, into the panel whose rows
// begin at `target`. word(i, r): elements i and i + 1 of the product, which are in the upper rows, r = 0, or the lower.
template <int kRowBytes = kPanelRowBytes, typename Word>
__device__ __forceinline__ void store_blocks(uint32_t target, int blocks, const Word& word) {
  const int lane = fresh(threadIdx.x) % kWarpSize, row = lane % kWarpRows;
#pragma unroll
  for (int block = 0; block < kRowBytes / 16; block += 2) {
    if (block >= blocks) break;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = word(4 * block + 2 * i, i % 2);
    store_matrices(target + row * kRowBytes + ((block + lane / 16) ^ row_swizzle<kRowBytes>(row)) * 16, words);
  }
}

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what makes or takes these registers across a product in flight.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define MK_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define MK_16(d, i) MK_8(d, i), MK_8(d, i + 8)
#define MK_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MK_NAMES_32 MK_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MK_NAMES_48 MK_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define MK_NAMES_64 MK_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// The two products of a type and a width N: d [64, N] is a [64, 16] times b [16, N], with `adds` added to what d holds.
//   product<T, A, B>(d, a, b, adds): a and b in shared memory
//   product<T, B>(d, a, b, adds): a in registers
// A and B say along which of its dimensions an operand is contiguous.
enum Major { kAlongSum = 0, kAcrossSum = 1 };

#define MK_PRODUCTS(TYPE, N, NAMES, P1, P2, P3, P4, P5, P6, P7, ...) \
  template <Major kA, Major kB> \
  __device__ __forceinline__ void product_##TYPE(float (&d)[N / 2], uint64_t a, uint64_t b, int adds) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " P3 ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" NAMES "}, " P1 ", " P2 \
                 ", adds, 1, 1, " P4 ", " P5 ";\n}\n" \
                 : __VA_ARGS__ \
                 : "l"(a), "l"(b), "r"(adds), "n"(int(kA)), "n"(int(kB))); \
  } \
  template <Major kB> \
  __device__ __forceinline__ void product_##TYPE(float (&d)[N / 2], const uint32_t* a, uint64_t b, int adds) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " P6 ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" NAMES "}, {" P1 "," P2 "," P3 \
                 "," P4 "}, " P5 ", adds, 1, 1, " P7 ";\n}\n" \
                 : __VA_ARGS__ \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(int(kB))); \
  }
#define MK_PRODUCTS_OF(TYPE) \
  MK_PRODUCTS(TYPE, 32, MK_NAMES_16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", MK_16(d, 0)) \
  MK_PRODUCTS(TYPE, 64, MK_NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", MK_16(d, 0), MK_16(d, 16)) \
  MK_PRODUCTS(TYPE, 96, MK_NAMES_48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", MK_16(d, 0), MK_16(d, 16), \
              MK_16(d, 32)) \
  MK_PRODUCTS(TYPE, 128, MK_NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", MK_16(d, 0), MK_16(d, 16), \
              MK_16(d, 32), MK_16(d, 48))
MK_PRODUCTS_OF(f16)
MK_PRODUCTS_OF(bf16)
#undef MK_PRODUCTS_OF
#undef MK_PRODUCTS
#undef MK_NAMES_64
#undef MK_NAMES_48
#undef MK_NAMES_32
#undef MK_NAMES_16
#undef MK_16
#undef MK_8

template <typename T, Major kA, Major kB, int kCount>
__device__ __forceinline__ void product(float (&d)[kCount], uint64_t a, uint64_t b, int adds) {
  if constexpr (std::is_same_v<T, __half>) {
    product_f16<kA, kB>(d, a, b, adds);
  } else {
    product_bf16<kA, kB>(d, a, b, adds);
  }
}
template <typename T, Major kB, int kCount>
__device__ __forceinline__ void product(float (&d)[kCount], const uint32_t* a, uint64_t b, int adds) {
  if constexpr (std::is_same_v<T, __half>) {
    product_f16<kB>(d, a, b, adds);
  } else {
    product_bf16<kB>(d, a, b, adds);
  }
}

}  // namespace memformer_kernels
