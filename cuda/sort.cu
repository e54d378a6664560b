#include "cuda/sort.h"

#include <cub/device/device_radix_sort.cuh>

namespace moebius::cuda {

size_t sort_storage_bytes(int64_t num) {
  size_t bytes = 0;
  const int32_t* in = nullptr;
  int32_t* out = nullptr;
  (void)cub::DeviceRadixSort::SortPairs(nullptr, bytes, in, out, in, out, num);
  return bytes;
}

void sort_by_key(const SortScratch& scratch, int64_t num, int32_t max_key, void* queue) {
  int bits = 1;
  while (max_key >> bits != 0) ++bits;
  size_t bytes = sort_storage_bytes(num);
  (void)cub::DeviceRadixSort::SortPairs(scratch.storage, bytes, scratch.keys, scratch.sorted_keys, scratch.values, scratch.sorted_values, num, 0, bits,
                                        static_cast<cudaStream_t>(queue));
}

}  // namespace moebius::cuda
