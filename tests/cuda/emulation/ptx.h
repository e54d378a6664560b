// The instructions of cuda/ptx.h on the host.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lib/tensor/dtype.h"

namespace moebius::cuda {

template <class ToFloat>
void emulate_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToFloat&& to_float_) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  emulation::exchange(0xffffffffu, mine, [&](auto&& of) {
    Operands rows[8], columns[2][4];
    for (int i = 0; i < 4; ++i) {
      rows[i] = of(g * 4 + i);
      columns[0][i] = of(2 * t * 4 + i);
      columns[1][i] = of((2 * t + 1) * 4 + i);
    }
    for (int e = 0; e < 4; ++e) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        const uint32_t pair_a = rows[k % 8 / 2].a[k / 8 * 2 + e / 2], pair_b = columns[e % 2][k % 8 / 2].b[k / 8];
        const auto half = [&](uint32_t pair) { return static_cast<double>(to_float_(static_cast<uint16_t>(pair >> (k % 2 * 16)))); };
        sum += half(pair_a) * half(pair_b);
      }
      d[e] = static_cast<float>(static_cast<double>(d[e]) + sum);
    }
    return 0;
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma(d, a, b, [](uint16_t v) { return to_float(v); });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma(d, a, b, [](uint16_t v) { return half_to_float(v); });
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::defer(emulation::kCopies, [=] {
    if (valid) std::memcpy(shared, global, 16);
    else std::memset(shared, 0, 16);
  });
}
inline void cp_async_commit() { emulation::commit(emulation::kCopies); }
template <int groups_left>
void cp_async_wait() {
  emulation::wait(emulation::kCopies, groups_left);
}

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const std::byte*>(p) - emulation::dynamic_shared()); }
inline void fence_async_shared() { emulation::fence_async_shared(); }
inline void wgmma_fence() {}
inline void wgmma_commit() { emulation::commit(emulation::kProducts); }
template <int groups_left>
void wgmma_wait() {
  emulation::wait(emulation::kProducts, groups_left);
}
inline void wgmma_settle(float (&)[16][2][4]) {}

// Of the 64 rows a warp has 16, which its lanes exchange; the columns are read where the descriptor says, as late as can be.
template <int product>
void wgmma_bf16(float (&d)[16][2][4], const uint32_t (&a)[4], uint64_t b) {
  struct Words {
    uint32_t a[4];
  } mine{{a[0], a[1], a[2], a[3]}};
  struct Rows {
    float k[2][16];  // rows g and g + 8
  };
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  const Rows rows = emulation::exchange(0xffffffffu, mine, [&](auto&& of) {
    Rows out;
    for (int i = 0; i < 4; ++i) {
      const Words w = of(g * 4 + i);
      for (int word = 0; word < 4; ++word)
        for (int odd = 0; odd < 2; ++odd) out.k[word % 2][word / 2 * 8 + 2 * i + odd] = to_float(static_cast<uint16_t>(w.a[word] >> (16 * odd)));
    }
    return out;
  });
  emulation::defer(emulation::kProducts, [&d, rows, b, t] {
    const uint64_t begin = (b & 0x3fff) * 16, eight_lines = (b >> 32 & 0x3fff) * 16;
    if (b >> 62 != 1) std::abort();  // another swizzle
    for (int j = 0; j < 16; ++j)
      for (int e = 0; e < 4; ++e) {
        const uint64_t column = static_cast<uint64_t>(8 * j + 2 * t + e % 2);
        double sum = 0;
        for (uint64_t k = 0; k < 16; ++k) {
          uint64_t at = begin + column / 8 * eight_lines + column % 8 * 128 + k * 2;
          at ^= (at >> 7 & 7) << 4;
          uint16_t v;
          std::memcpy(&v, emulation::dynamic_shared() + at, 2);
          sum += static_cast<double>(rows.k[e / 2][k]) * static_cast<double>(to_float(v));
        }
        d[j][product][e] = static_cast<float>(static_cast<double>(d[j][product][e]) + sum);
      }
  });
}

template <class T>
T load_early(const T* p) {
  return *p;
}
inline uint4 load_once(const uint4* p) { return *p; }
inline uint4 load_streaming(const uint4* p) { return *p; }
inline void store_streaming(uint4* p, uint4 v) { *p = v; }
inline uint2 load_half(const uint4* p, int half) { return half == 0 ? uint2{p->x, p->y} : uint2{p->z, p->w}; }
inline uint4 load_written(const uint4* p) { return *p; }
inline void prefetch_line(const void*) {}
inline void prefetch_units(const void* p, int64_t bytes) { emulation::check_prefetch(p, bytes); }
inline void begin_next() {}
inline void await_previous() { emulation::await_previous(); }
inline void add_relaxed(int64_t* p, int64_t v) { *p = static_cast<int64_t>(static_cast<uint64_t>(*p) + static_cast<uint64_t>(v)); }
inline void add_relaxed(float* p, float v) { *p += v; }
template <class T>
void add_relaxed(T* p, const T (&v)[4]) {
  for (int i = 0; i < 4; ++i) add_relaxed(p + i, v[i]);
}
inline void store_release_system(uint64_t* p, uint64_t v) { std::atomic_ref(*p).store(v, std::memory_order_release); }
inline uint64_t load_acquire_system(const uint64_t* p) { return std::atomic_ref(*const_cast<uint64_t*>(p)).load(std::memory_order_acquire); }
inline uint64_t global_timer_ns() { return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()); }
inline float exp2_of(float x) { return std::exp2(x); }
inline uint32_t pack_bf16(float low, float high) { return static_cast<uint32_t>(to_bf16(high)) << 16 | to_bf16(low); }
inline uint32_t pack_f16(float low, float high) { return static_cast<uint32_t>(to_half(high)) << 16 | to_half(low); }

}  // namespace moebius::cuda
