// A device of a module for tests of single ops: which module is the executable's choice (MOEBIUS_TEST_DEVICE).
#pragma once

#include <cstring>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "lib/cpu/cpu_ops.h"
#include "lib/device/module_device.h"
#include "tests/catch.h"

namespace moebius {

constexpr bool kEmulated = std::string_view(MOEBIUS_TEST_DEVICE) == "cuda-emulated";

// Opened once, with four ranks.
Device& test_device();

inline void finish(int rank = 0) {
  while (!test_device().idle(rank)) {
  }
}

// An array in a rank's memory.
template <class T>
class Array {
 public:
  // Filled with 0xff bytes: NaN, −1.
  explicit Array(size_t n, int rank = 0) : n_(n), rank_(rank), buffer_(test_device(), rank, static_cast<int64_t>((n + kSlack) * sizeof(T))) {
    const std::vector<std::byte> poison(static_cast<size_t>(buffer_.bytes()), std::byte{0xff});
    test_device().write(rank, buffer_.data(), poison.data(), buffer_.bytes());
  }
  explicit Array(const std::vector<T>& values, int rank = 0) : Array(values.size(), rank) {
    test_device().write(rank, buffer_.data(), values.data(), static_cast<int64_t>(n_ * sizeof(T)));
  }
  T* get() const { return reinterpret_cast<T*>(buffer_.data()); }
  size_t size() const { return n_; }
  // Waits for the rank's work; also checks that nothing was written behind the end.
  std::vector<T> values() const {
    std::vector<T> out(n_ + kSlack);
    const auto bytes = static_cast<int64_t>(out.size() * sizeof(T));
    test_device().read(rank_, out.data(), bytes, buffer_.data(), bytes, bytes, 1);
    finish(rank_);
    for (const auto* p = reinterpret_cast<const unsigned char*>(out.data() + n_); p < reinterpret_cast<const unsigned char*>(out.data() + n_ + kSlack); ++p)
      if (*p != 0xff) FAIL("something was written behind the end of an array");
    out.resize(n_);
    return out;
  }

 private:
  static constexpr size_t kSlack = 64;
  size_t n_;
  int rank_;
  DeviceBuffer buffer_;
};

inline const Ops& reference() { return cpu_ops(Isa::kPortable); }

// A lane with scratch memory for the limits, on the device and on the host.
struct Lanes {
  explicit Lanes(const OpLimits& limits)
      : memory(std::vector<unsigned char>(test_device().ops().scratch_bytes(limits))),
        host_memory(reference().scratch_bytes(limits) + 128),
        device{0, 1, reinterpret_cast<std::byte*>(memory.get()), test_device().queue(0)},
        host{0, 1, host_memory.data() + (64 - reinterpret_cast<uintptr_t>(host_memory.data()) % 64), nullptr} {}
  Array<unsigned char> memory;
  std::vector<std::byte> host_memory;
  Lane device, host;
};

struct Random {
  explicit Random(uint32_t seed) : engine(seed) {}
  std::mt19937 engine;
  float normal() { return std::normal_distribution<float>()(engine); }
  int below(int n) { return static_cast<int>(engine() % static_cast<uint32_t>(n)); }
  std::vector<float> floats(size_t n, float scale = 1) {
    std::vector<float> out(n);
    for (float& v : out) v = scale * normal();
    return out;
  }
  std::vector<bf16> bf16s(size_t n, float scale = 1) {
    std::vector<bf16> out(n);
    for (bf16& v : out) v = to_bf16(scale * normal());
    return out;
  }
};

// A residual stream with a sum that is to be added, and its norm, on the device.
struct NormThere {
  NormThere(Random& random, int rows, int64_t hidden, bool plain)
      : rows(rows), hidden(hidden), plain(plain), h(random.floats(static_cast<size_t>(rows * hidden))), weight(random.floats(static_cast<size_t>(hidden))), x(h.size()),
        x_float(h.size()), h_out(h.size()), flags(flags_of(rows)), sum(sum_of(random, rows * hidden, plain)) {}

  AddNormArgs args(Range of) const {
    const auto* const floats_or_integers = reinterpret_cast<const int64_t*>(sum.get());
    partials = floats_or_integers;
    flag_list = flags.get();
    return {of, hidden, h.get(), 1, &partials, &flag_list, plain ? 1.0f : 0x1p-28f, plain, 0, weight.get(), 1e-6f, x.get(), x_float.get(), h_out.get()};
  }

  int rows;
  int64_t hidden;
  bool plain;
  Array<float> h, weight;
  Array<bf16> x;
  Array<float> x_float, h_out;
  Array<uint8_t> flags;
  Array<unsigned char> sum;

 private:
  static std::vector<uint8_t> flags_of(int rows) {
    std::vector<uint8_t> flags(static_cast<size_t>(rows), 0);
    if (rows > 2) flags[2] = 1;
    return flags;
  }
  static std::vector<unsigned char> sum_of(Random& random, int64_t n, bool plain) {
    std::vector<unsigned char> bytes(static_cast<size_t>(n) * sizeof(int64_t));
    for (int64_t i = 0; i < n; ++i) {
      const float v = random.normal();
      const auto fixed = static_cast<int64_t>(v * 0x1p28f);
      if (plain) std::memcpy(bytes.data() + i * 4, &v, sizeof v);
      else std::memcpy(bytes.data() + i * 8, &fixed, sizeof fixed);
    }
    return bytes;
  }

  mutable const int64_t* partials = nullptr;
  mutable const uint8_t* flag_list = nullptr;
};

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace moebius
