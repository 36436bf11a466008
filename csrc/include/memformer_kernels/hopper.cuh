// What Hopper adds, as PTX: barriers in shared memory, copies of tiles by the tensor memory accelerator (TMA), matrix
// products of a group of four warps, and registers that groups hand to each other. PTX ISA 9.0, sections 9.7.9 to
// 9.7.15.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace memformer_kernels {

constexpr int kGroupThreads = 128;  // of a warpgroup

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
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

// Barriers of the block by number: `threads` of them meet, some of which only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// -- Tiles from global to shared memory ------------------------------------------------------------------------------

// Box at (channel, row, head, batch); what lies outside the tensor arrives as 0.
__device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap* map, uint32_t barrier, int channel,
                                          int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(target), "l"(map), "r"(barrier), "r"(channel), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// What this thread has written to shared memory becomes visible to matrix products and copies.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
// 16-bit tiles lie in shared memory as TMA's 128-byte swizzle leaves them: rows of 64 elements, 128 bytes, eight of
// which, 1024 bytes, are an atom. Wider tiles are panels of 64 columns, one after the other.

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;

// How a product finds a tile. `panel`: bytes between panels of 64 columns, which only a product over the rows looks at.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t panel) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kAtoms = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kAtoms | uint64_t{panel >> 4} << 16 | (address & 0x3ffff) >> 4;
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
#define MK_32(d, i) MK_8(d, i), MK_8(d, i + 8), MK_8(d, i + 16), MK_8(d, i + 24)
#define MK_NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31"
#define MK_NAMES_64 MK_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
    "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// The two products of a type and a width N. d [64, N] is a * b, with `adds` added to what d holds:
// product<T>(d, a, b, adds): a [64, 16] and b [N, 16] in shared memory, the 16 contiguous: d = a b^T
// product<T>(d, a, b, adds): a [64, 16] in registers, b [16, N] in shared memory, N contiguous: d = a b
#define MK_PRODUCTS(TYPE, N, NAMES, P1, P2, P3, P4, P5, P6, ...) \
  __device__ __forceinline__ void product_##TYPE(float (&d)[N / 2], uint64_t a, uint64_t b, int adds) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " P3 ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" NAMES "}, " P1 ", " P2 \
                 ", adds, 1, 1, 0, 0;\n}\n" \
                 : __VA_ARGS__ \
                 : "l"(a), "l"(b), "r"(adds)); \
  } \
  __device__ __forceinline__ void product_##TYPE(float (&d)[N / 2], const uint32_t* a, uint64_t b, int adds) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " P6 ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" NAMES "}, {" P1 "," P2 "," P3 \
                 "," P4 "}, " P5 ", adds, 1, 1, 1;\n}\n" \
                 : __VA_ARGS__ \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds)); \
  }
#define MK_PRODUCTS_OF(TYPE) \
  MK_PRODUCTS(TYPE, 64, MK_NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37", MK_32(d, 0)) \
  MK_PRODUCTS(TYPE, 128, MK_NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69", MK_32(d, 0), MK_32(d, 32))
MK_PRODUCTS_OF(f16)
MK_PRODUCTS_OF(bf16)
#undef MK_PRODUCTS_OF
#undef MK_PRODUCTS
#undef MK_NAMES_64
#undef MK_NAMES_32
#undef MK_32
#undef MK_8

template <typename T, typename A, int kCount>
__device__ __forceinline__ void product(float (&d)[kCount], A a, uint64_t b, int adds) {
  if constexpr (std::is_same_v<T, __half>) {
    product_f16(d, a, b, adds);
  } else {
    product_bf16(d, a, b, adds);
  }
}

}  // namespace memformer_kernels
