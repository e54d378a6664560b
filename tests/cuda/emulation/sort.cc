// cuda/sort.h on the host.
#include "cuda/sort.h"

#include "tests/cuda/emulation/cuda_runtime.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace moebius::cuda {

size_t sort_storage_bytes(int64_t) { return 256; }

void sort_by_key(const SortScratch& s, int64_t num, int32_t, void* stream) {
  emulation::queue(static_cast<cudaStream_t>(stream), [=] {
    std::vector<int32_t> order(static_cast<size_t>(num));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return s.keys[a] < s.keys[b]; });
    for (int64_t i = 0; i < num; ++i) {
      s.sorted_keys[i] = s.keys[order[static_cast<size_t>(i)]];
      s.sorted_values[i] = s.values[order[static_cast<size_t>(i)]];
    }
  });
}

}  // namespace moebius::cuda
