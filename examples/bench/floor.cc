#include "examples/bench/floor.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "lib/device/buffer.h"
#include "lib/tensor/packed.h"

namespace moebius::bench {
namespace {

// Per core, several times any cache; more threads than cores share it. Made once: first touch costs more than the measurement.
constexpr int64_t kProbeBytes = 192 << 20, kLeastProbeBytes = 8 << 20;

int64_t probe_bytes(int threads) {
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return std::max(kLeastProbeBytes, kProbeBytes * std::min<int64_t>(threads, cores) / threads);
}

}  // namespace

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

FloorInputs floor_inputs(const ModelConfig& m, int cuts, int ranks, bool tp) {
  const ModelShape& s = m.shape;
  FloorInputs f;
  const int64_t q = int64_t{s.num_heads} * s.head_dim, kv = int64_t{s.num_kv_heads} * s.head_dim;
  const int64_t attention = s.hidden * (2 * q + 2 * kv);
  for (const MlpShape& mlp : s.mlps) {
    const int64_t params = MlpCut{mlp.intermediate / cuts, s.hidden}.bytes() / 2 * cuts;
    const int64_t router = int64_t{mlp.num_experts} * s.hidden;
    f.fixed_bytes += 2 * (attention + router);
    f.row_flops += 2.0 * static_cast<double>(attention + router);
    if (mlp.num_experts > 0) {
      f.expert_bytes = 2 * params / (tp ? ranks : 1);
      f.row_flops += 2.0 * static_cast<double>(params) * (m.top_k + mlp.num_shared);
      f.total_weight_bytes += 2 * params * mlp.all_experts();
    } else {
      f.dense_jobs += ranks;
      f.fixed_bytes += 2 * params;
      f.row_flops += 2.0 * static_cast<double>(params);
    }
  }
  const int64_t head = int64_t{m.vocab_size} * s.hidden;
  f.head_bytes = 2 * head;
  f.head_flops = 2.0 * static_cast<double>(head);
  f.kv_token_bytes = 2 * 2 * kv * s.num_layers();
  f.pair_flops = 4.0 * static_cast<double>(q) * s.num_layers();
  f.total_weight_bytes += f.fixed_bytes + (m.tie_word_embeddings ? 1 : 2) * f.head_bytes;
  return f;
}

double floor_seconds(const FloorInputs& w, const Rates& rates) {
  const double bytes = static_cast<double>((w.experts_reached - w.dense_jobs) * w.expert_bytes + w.fixed_bytes +
                                           (w.logit_rows > 0 ? w.head_bytes : 0) + w.kv_tokens_read * w.kv_token_bytes);
  const int64_t pairs = w.attention_pairs > 0 ? w.attention_pairs : w.kv_tokens_read;
  const double flops = static_cast<double>(w.rows) * w.row_flops + static_cast<double>(w.logit_rows) * w.head_flops +
                       static_cast<double>(pairs) * w.pair_flops;
  return std::max(bytes / rates.read, flops / rates.flops);
}

Rates measure_rates(World& world, const Ops& ops) {
  const int threads = world.ranks() * world.threads();
  const int64_t bytes = probe_bytes(threads);
  static std::vector<HostBuffer> buffers;
  if (static_cast<int>(buffers.size()) < threads || static_cast<int64_t>(buffers[0].bytes()) < bytes) {
    buffers.clear();
    for (int i = 0; i < threads; ++i) buffers.emplace_back(bytes);
    world.run_long([&](int r, int t) { std::memset(buffers[static_cast<size_t>(r * world.threads() + t)].data(), 1, static_cast<size_t>(bytes)); });
  }
  Rates rates;
  volatile uint64_t keep = 0;
  for (int round = 0; round < 2; ++round) {
    double begin = now();
    world.run_long([&](int r, int t) {
      keep = keep + ops.probe_read(buffers[static_cast<size_t>(r * world.threads() + t)].data(), static_cast<size_t>(bytes));
    });
    rates.read = std::max(rates.read, static_cast<double>(bytes) * threads / (now() - begin));
    std::vector<double> flops(static_cast<size_t>(threads));
    constexpr int64_t kIterations = 400;  // some milliseconds
    begin = now();
    world.run_long([&](int r, int t) { flops[static_cast<size_t>(r * world.threads() + t)] = ops.probe_dot(kIterations); });
    double total = 0;
    for (double x : flops) total += x;
    rates.flops = std::max(rates.flops, total / (now() - begin));
  }
  return rates;
}

Rates better(const Rates& a, const Rates& b) { return {std::max(a.read, b.read), std::max(a.flops, b.flops)}; }

double memcpy_seconds(World& world, int64_t bytes) {
  const int threads = world.ranks() * world.threads();
  const int64_t share = bytes / threads, most = std::min<int64_t>(std::max<int64_t>(share, 1), 256 << 20);
  static std::vector<HostBuffer> from, to;
  if (static_cast<int>(from.size()) < threads || static_cast<int64_t>(from[0].bytes()) < most) {
    from.clear(), to.clear();
    for (int i = 0; i < threads; ++i) from.emplace_back(most), to.emplace_back(most);
    world.run_long([&](int r, int t) {
      const auto i = static_cast<size_t>(r * world.threads() + t);
      std::memset(from[i].data(), 1, static_cast<size_t>(most));
      std::memset(to[i].data(), 1, static_cast<size_t>(most));
    });
  }
  const double begin = now();
  world.run_long([&](int r, int t) {
    const auto i = static_cast<size_t>(r * world.threads() + t);
    for (int64_t done = 0; done < share; done += most)
      std::memcpy(to[i].data(), from[i].data(), static_cast<size_t>(std::min(most, share - done)));
  });
  return now() - begin;
}

double cached_read_seconds(World& world, const std::filesystem::path& model_dir) {
  constexpr int64_t kChunk = 1 << 20;
  struct File {
    int descriptor;
    int64_t bytes;
  };
  std::vector<File> files;
  for (const auto& entry : std::filesystem::directory_iterator(model_dir))
    if (entry.path().extension() == ".safetensors")
      files.push_back({open(entry.path().c_str(), O_RDONLY | O_CLOEXEC), static_cast<int64_t>(entry.file_size())});
  const int threads = world.ranks() * world.threads();
  std::vector<HostBuffer> buffers;
  for (int i = 0; i < threads; ++i) buffers.emplace_back(kChunk);
  const double begin = now();
  world.run_long([&](int r, int t) {
    const int lane = r * world.threads() + t;
    for (const File& file : files)
      for (int64_t at = lane * kChunk; at < file.bytes; at += threads * kChunk)
        if (pread(file.descriptor, buffers[static_cast<size_t>(lane)].data(), static_cast<size_t>(std::min(kChunk, file.bytes - at)), at) <= 0)
          throw std::runtime_error("a safetensors file cannot be read");
  });
  const double seconds = now() - begin;
  for (const File& file : files) close(file.descriptor);
  return seconds;
}

int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

}  // namespace moebius::bench
