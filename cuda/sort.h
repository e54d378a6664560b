// A stable sort of pairs of numbers by the first, on a stream, in memory that the caller has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lib/base/numbers.h"

namespace moebius::cuda {

size_t sort_storage_bytes(int64_t num);  // what the sort itself needs for so many

// Arrays of `num` in a block of bytes(num).
struct SortScratch {
  int32_t *keys, *values, *sorted_keys, *sorted_values;
  std::byte* storage;

  SortScratch(std::byte* base, int64_t num) {
    const auto array = [&](int i) { return reinterpret_cast<int32_t*>(base + i * array_bytes(num)); };
    keys = array(0);
    values = array(1);
    sorted_keys = array(2);
    sorted_values = array(3);
    storage = base + 4 * array_bytes(num);
  }
  static int64_t array_bytes(int64_t num) { return round_up(num * static_cast<int64_t>(sizeof(int32_t)), 256); }
  static int64_t bytes(int64_t num) { return 4 * array_bytes(num) + static_cast<int64_t>(sort_storage_bytes(num)); }
};

// Keys are from 0 to max_key.
void sort_by_key(const SortScratch& scratch, int64_t num, int32_t max_key, void* queue);

}  // namespace moebius::cuda
