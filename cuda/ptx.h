// Single instructions that C++ has no name for, and what stands for them where kernels are tested on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef MOEBIUS_EMULATED
#include "tests/cuda/emulation/ptx.h"
#else

namespace moebius::cuda {

// d += A·B of one m16n8k16 for a warp, lane = 4·g + t: d[0], d[1] are row g, columns 2t, 2t + 1; d[2], d[3] row g + 8. Of A, a[0] is row g, a[1]
// row g + 8 at k = 2t, 2t + 1; a[2], a[3] the same at k + 8. Of B, b[0] is column g at k = 2t, 2t + 1; b[1] at k + 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global into shared memory, or zeros; done after cp_async_wait of the group that is committed next.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// What was there before the step began, read before the kernels ahead have ended: past the first-level cache, which may have it from a step before.
template <class T>
__device__ __forceinline__ T load_early(const T* p) {
  static_assert(sizeof(T) % 8 == 0 && alignof(T) % 8 == 0);
  T out;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 8; ++i)
    reinterpret_cast<unsigned long long*>(&out)[i] = __ldcg(reinterpret_cast<const unsigned long long*>(p) + i);
  return out;
}
// Weights, which nobody writes meanwhile: passes the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// Half of it, the other half being read soon after.
__device__ __forceinline__ uint2 load_half(const uint4* p, int half) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(reinterpret_cast<const uint2*>(p) + half));
  return v;
}
// The same where the memory may have been written since the kernel started.
__device__ __forceinline__ uint4 load_written(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// And is read once in all.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_streaming(uint4* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A kernel may start while the ones ahead of it in its stream still run (launch.h). The next one may start once all blocks of this have called
// begin_next, and is held at await_previous until those ahead have ended and what they wrote is there.
__device__ __forceinline__ void begin_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Starts the way of `bytes`, above 0 and like the address a multiple of 16, into the second-level cache; nothing waits for it. (From Hopper on.)
__device__ __forceinline__ void prefetch_units(const void* p, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(static_cast<uint32_t>(bytes)) : "memory");
#endif
}

// Starts the way of a line of 128 bytes into the second-level cache; nothing waits for it.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ void add_relaxed(int64_t* p, int64_t v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void add_relaxed(float* p, float v) { asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"); }

__device__ __forceinline__ void add_relaxed(int64_t* p, const int64_t (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) add_relaxed(p + i, v[i]);
}
// Of 4 floats, aligned to 16 bytes.
__device__ __forceinline__ void add_relaxed(float* p, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) add_relaxed(p + i, v[i]);
#endif
}

// What is written before the one, in any memory, is seen by who has read its value by the other, on any device.
__device__ __forceinline__ void store_release_system(uint64_t* p, uint64_t v) { asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t v;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v));
  return v;
}

// ---- Hopper's products of four warps (wgmma), where the code is made for sm_90a

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MOEBIUS_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define MOEBIUS_WGMMA(...) __trap()
#endif

// What was written to shared memory before is seen by wgmma.
__device__ __forceinline__ void fence_async_shared() { MOEBIUS_WGMMA("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers written before may be read by the products that follow.
__device__ __forceinline__ void wgmma_fence() { MOEBIUS_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { MOEBIUS_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last so many committed groups are done.
template <int groups_left>
__device__ __forceinline__ void wgmma_wait() {
  MOEBIUS_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(groups_left) : "memory");
}

// d[·][product] += A·B of one m64n128k16: a are the warp's 16 rows and d[j][product] its columns 8j … 8j + 7, each as in mma_bf16. B: swizzled_descriptor.
template <int product>
__device__ __forceinline__ void wgmma_bf16(float (&d)[16][2][4], const uint32_t (&a)[4], uint64_t b) {
#define MOEBIUS_D(j) "+f"(d[j][product][0]), "+f"(d[j][product][1]), "+f"(d[j][product][2]), "+f"(d[j][product][3])
  MOEBIUS_WGMMA(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
      : MOEBIUS_D(0), MOEBIUS_D(1), MOEBIUS_D(2), MOEBIUS_D(3), MOEBIUS_D(4), MOEBIUS_D(5), MOEBIUS_D(6), MOEBIUS_D(7), MOEBIUS_D(8),
        MOEBIUS_D(9), MOEBIUS_D(10), MOEBIUS_D(11), MOEBIUS_D(12), MOEBIUS_D(13), MOEBIUS_D(14), MOEBIUS_D(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#undef MOEBIUS_D
}
#undef MOEBIUS_WGMMA

// After wgmma_wait: the compiler takes it that they have changed only now.
__device__ __forceinline__ void wgmma_settle(float (&d)[16][2][4]) {
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][p][e])::"memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 2^x to some 2^-22 of it, 0 for what is below 2^-126; the same on every device of an architecture.
__device__ __forceinline__ float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Two floats to bf16 pairs and f16 pairs, `low` in the lower half; to nearest, ties to even.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

}  // namespace moebius::cuda

#endif

namespace moebius::cuda {

// Where wgmma finds B of k16 in shared memory: lines of 64 of k for each column, eight of them kSwizzleBytes, their 16-byte pieces exchanged by
// the column's number; `p` is the first column's first element, of lines that begin at a multiple of kSwizzleBytes.
constexpr unsigned kSwizzleBytes = 1024;
__device__ __forceinline__ uint64_t swizzled_descriptor(const void* p) {
  constexpr uint64_t kEightLines = uint64_t{kSwizzleBytes / 16} << 32, kOne = uint64_t{1} << 16, kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kEightLines | kOne | (shared_address(p) & 0x3ffff) / 16;
}

// The whole units of 16 bytes among them, as far as one instruction goes (below 1 MiB).
__device__ __forceinline__ void prefetch_bytes(const void* p, int64_t bytes) {
  bytes = min(bytes, int64_t{512} << 10);
  const auto begin = reinterpret_cast<uintptr_t>(p), first = (begin + 15) / 16 * 16, end = (begin + static_cast<uintptr_t>(bytes)) / 16 * 16;
  if (first < end) prefetch_units(reinterpret_cast<const void*>(first), static_cast<int64_t>(end - first));
}

// What a kernel does first that has nothing to fetch before.
__device__ __forceinline__ void follow_previous() {
  begin_next();
  await_previous();
}

}  // namespace moebius::cuda
