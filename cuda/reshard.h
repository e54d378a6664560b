// Copies of blocks between arenas: the whole of a switch on a GPU. One kernel walks a table of blocks, of its own or a peer's memory: weights,
// by tables made at start-up. Another finds the blocks of KV by itself, from the pages.
//
// Floor on one device: 2 · bytes ÷ memory bandwidth (read and written once).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "lib/device/device.h"

namespace moebius::cuda {

// Bytes [begin, begin + its size) of the table's blocks laid end to end are copied from `from` to `to`. Sizes are multiples of 64 bytes,
// addresses aligned to 16 at least. A table ends with an entry that holds only the total.
struct CopyEntry {
  void* to = nullptr;
  const void* from = nullptr;
  int64_t begin = 0;
};
static_assert(sizeof(CopyEntry) == kKeptBlockBytes);

// A table that stays on the device.
class KeptBlocks {
 public:
  KeptBlocks() = default;
  KeptBlocks(KeptBlocks&& other) noexcept : table_(std::exchange(other.table_, nullptr)), num_(other.num_) {}
  KeptBlocks& operator=(KeptBlocks&&) = delete;
  ~KeptBlocks();
  void copy(int64_t begin, int64_t end, cudaStream_t stream) const;

 private:
  friend class BlockCopies;
  CopyEntry* table_ = nullptr;
  int64_t num_ = 0;
};

// Collects blocks and copies them on a stream. Nothing is allocated once the table has grown to what a switch needs; a second table
// is filled while the first may still be read.
class BlockCopies {
 public:
  BlockCopies() = default;
  ~BlockCopies();
  BlockCopies(const BlockCopies&) = delete;
  BlockCopies& operator=(const BlockCopies&) = delete;

  cudaError_t add(void* to, const void* from, int64_t bytes);
  cudaError_t flush(cudaStream_t stream);
  cudaError_t keep(cudaStream_t stream, KeptBlocks& out);  // instead

 private:
  struct Table {
    CopyEntry* host = nullptr;    // pinned
    CopyEntry* device = nullptr;
    cudaEvent_t read = nullptr;   // the kernel that reads it has ended
    int64_t capacity = 0;
  };
  cudaError_t grow(Table& table);
  static void release(Table& table);

  Table tables_[2];
  int now_ = 0;
  int64_t num_ = 0, bytes_ = 0;
};

void copy_pages(const CopyPagesArgs& args, const Lane& lane);

}  // namespace moebius::cuda
