// Rows into the order of packed data, four by four 32-bit elements (pairs of bf16) at a time in vector registers.
#pragma once

#include <cstdint>

#include "lib/base/numbers.h"

namespace moebius {

// Four elements of each of four rows a, b, c, d; element i of all rows goes to out + i·pitch, 16 bytes. Nothing need be aligned.
MOEBIUS_INLINE void transpose_4x4(const void* a, const void* b, const void* c, const void* d, void* out, int64_t pitch_bytes) {
  using Four = uint32_t __attribute__((vector_size(16), aligned(1), may_alias));
  const auto load = [](const void* at) __attribute__((always_inline)) { return *static_cast<const Four*>(at); };
  const Four ra = load(a), rb = load(b), rc = load(c), rd = load(d);
  const Four ab = __builtin_shufflevector(ra, rb, 0, 4, 1, 5), cd = __builtin_shufflevector(rc, rd, 0, 4, 1, 5);
  const Four ab2 = __builtin_shufflevector(ra, rb, 2, 6, 3, 7), cd2 = __builtin_shufflevector(rc, rd, 2, 6, 3, 7);
  const auto store = [&](int64_t i, Four x) __attribute__((always_inline)) {
    *reinterpret_cast<Four*>(static_cast<char*>(out) + i * pitch_bytes) = x;
  };
  store(0, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store(1, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  store(2, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
  store(3, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

}  // namespace moebius
