// The instructions of cuda/ptx.h on the host.
#pragma once

#include <atomic>
#include <chrono>
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
  if (valid) std::memcpy(shared, global, 16);
  else std::memset(shared, 0, 16);
}
inline void cp_async_commit() {}
template <int groups_left>
void cp_async_wait() {}

inline uint4 load_once(const uint4* p) { return *p; }
inline uint4 load_streaming(const uint4* p) { return *p; }
inline void store_streaming(uint4* p, uint4 v) { *p = v; }
inline uint4 load_written(const uint4* p) { return *p; }
inline void prefetch_line(const void*) {}
inline void prefetch_bytes(const void* p, int64_t bytes) { emulation::check_prefetch(p, bytes); }
inline void begin_next() {}
inline void await_previous() { emulation::await_previous(); }
inline void add_relaxed(int64_t* p, int64_t v) { *p = static_cast<int64_t>(static_cast<uint64_t>(*p) + static_cast<uint64_t>(v)); }
inline void add_relaxed(float* p, float v) { *p += v; }
inline void store_release_system(uint64_t* p, uint64_t v) { std::atomic_ref(*p).store(v, std::memory_order_release); }
inline uint64_t load_acquire_system(const uint64_t* p) { return std::atomic_ref(*const_cast<uint64_t*>(p)).load(std::memory_order_acquire); }
inline uint64_t global_timer_ns() { return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()); }
inline uint32_t pack_bf16(float low, float high) { return static_cast<uint32_t>(to_bf16(high)) << 16 | to_bf16(low); }
inline uint32_t pack_f16(float low, float high) { return static_cast<uint32_t>(to_half(high)) << 16 | to_half(low); }

}  // namespace moebius::cuda
