// The path of matrix registers (lib/cpu/matrix.h) over plain memory: what it reads, and in what order it adds, is seen on every machine, by the
// address sanitizer too.
#define MOEBIUS_ISA moebius::plain_matrix
#define MOEBIUS_ISA_NAME "plain matrix"
#include "lib/cpu/isa_portable.h"
#include "lib/cpu/matrix.h"

namespace MOEBIUS_ISA {

class PlainUnit {
  static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? x * 0.0f : x; }
  template <class T>
  static auto line(int r, int i) {
    using Alias __attribute__((may_alias)) = T;
    return reinterpret_cast<Alias*>(registers_[r][i]);
  }

 public:
  PlainUnit() { __builtin_memset(registers_, 0, sizeof(registers_)); }
  PlainUnit(const PlainUnit&) = delete;
  PlainUnit& operator=(const PlainUnit&) = delete;

  template <int T>
  static void zero() {
    __builtin_memset(registers_[T], 0, sizeof(registers_[T]));
  }
  template <int T>
  static void load(const void* at, int64_t step) {
    for (int64_t i = 0; i < kTile; ++i) __builtin_memcpy(registers_[T][i], static_cast<const char*>(at) + i * step, 64);
  }
  template <int T>
  static void store(void* at, int64_t step) {
    for (int64_t i = 0; i < kTile; ++i) __builtin_memcpy(static_cast<char*>(at) + i * step, registers_[T][i], 64);
  }
  template <int Sums, int Rows, int Weights>
  static void dot() { add_products(Sums, Rows, Weights); }

 private:
  // As AMX adds, which takes values too small for a normal float for 0. (The product of two bf16 is exact where it is none of them.)
  [[gnu::noinline]] static void add_products(int to, int rows, int weights) {
    float w[kTile][2][kTile];
    for (int k = 0; k < kTile; ++k)
      for (int n = 0; n < kTile; ++n)
        for (int i = 0; i < 2; ++i) w[k][i][n] = flushed(to_float(line<bf16>(weights, k)[2 * n + i]));
    for (int m = 0; m < kTile; ++m) {
      float parts[2][kTile] = {};
      for (int k = 0; k < kTile; ++k)
        for (int i = 0; i < 2; ++i) {
          const float a = flushed(to_float(line<bf16>(rows, m)[2 * k + i]));
          for (int n = 0; n < kTile; ++n) parts[i][n] = flushed(parts[i][n] + a * w[k][i][n]);
        }
      auto* sums = line<float>(to, m);
      for (int n = 0; n < kTile; ++n) sums[n] = flushed(flushed(sums[n]) + flushed(parts[0][n] + parts[1][n]));
    }
  }

  alignas(64) static inline thread_local char registers_[8][kTile][64];
};

using Vec = Matrix<Portable, PlainUnit>;

}  // namespace MOEBIUS_ISA

#include "lib/cpu/kernels.h"
