#include "cuda/sort.h"

#include <cub/device/device_radix_sort.cuh>

#include "cuda/launch.h"

namespace moebius::cuda {

// CUB's own answer needs a device, which who plans may not have: two arrays beside those given, counters for each tile and digit, and some.
size_t sort_storage_bytes(int64_t num) { return static_cast<size_t>(num) * 16 + (size_t{1} << 20); }

void sort_by_key(const SortScratch& scratch, int64_t num, int32_t max_key, void* queue) {
  int bits = 1;
  while (max_key >> bits != 0) ++bits;
  size_t bytes = 0;
  const auto sort = [&](void* storage) {  // null: how many bytes of it are needed
    return cub::DeviceRadixSort::SortPairs(storage, bytes, scratch.keys, scratch.sorted_keys, scratch.values, scratch.sorted_values, num, 0, bits,
                                           static_cast<cudaStream_t>(queue));
  };
  starts_late = true;
  if (sort(nullptr) != cudaSuccess || bytes > sort_storage_bytes(num) || sort(scratch.storage) != cudaSuccess) failed_op = "a sort";
}

}  // namespace moebius::cuda
