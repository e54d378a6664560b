// Loading reads each rank's slices of the start layout and nothing else: counted element by element at the source.
#include <mutex>
#include <thread>

#include "lib/cpu/cpu_device.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/model_store.h"
#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

// Elements that each thread has read; with one thread a rank, that is each rank.
struct Counts {
  std::mutex mutex;
  std::map<std::thread::id, int64_t> elements;
  void add(int64_t n) {
    std::lock_guard lock(mutex);
    elements[std::this_thread::get_id()] += n;
  }
};

struct CountingReader final : MatrixReader {
  CountingReader(std::unique_ptr<MatrixReader> inner, Counts& counts) : inner(std::move(inner)), counts(counts) {}
  void read(Range rows, Range columns, bf16* out) const override {
    inner->read(rows, columns, out);
    counts.add(rows.size() * columns.size());
  }
  std::unique_ptr<MatrixReader> inner;
  Counts& counts;
};

class CountingSource final : public WeightSource {
 public:
  CountingSource(const WeightSource& inner, Counts& counts) : inner_(inner), counts_(counts) {}
  std::unique_ptr<MatrixReader> matrix(const std::string& name, int64_t rows, int64_t columns) const override {
    return std::make_unique<CountingReader>(inner_.matrix(name, rows, columns), counts_);
  }
  std::unique_ptr<MatrixReader> expert(int layer, int expert, ExpertPart part) const override {
    return std::make_unique<CountingReader>(inner_.expert(layer, expert, part), counts_);
  }
  std::vector<float> vector(const std::string& name, int64_t size) const override { return inner_.vector(name, size); }
  bool has(const std::string& name) const override { return inner_.has(name); }

 private:
  const WeightSource& inner_;
  Counts& counts_;
};

// Elements of the slices that a rank owns, without their padding.
int64_t owned_elements(const ModelShape& s, const ArenaPlan& arena, Layout layout, int rank) {
  int64_t elements = 0;
  const SliceCounts counts = arena.table().counts();
  for (int l = 0; l < s.num_layers(); ++l)
    for (size_t i = 0; i < arena.table().layer(l).size(); ++i) {
      if (!(arena.owners(layout).slices[static_cast<size_t>(l)][i] >> rank & 1)) continue;
      switch (arena.table().layer(l)[i].kind) {
        case SliceKind::kAttentionGroup: elements += 2LL * s.num_heads / counts.head_groups * s.head_dim * s.hidden; break;
        case SliceKind::kKvProjection: elements += 2LL * s.head_dim * s.hidden; break;
        default: elements += 3LL * s.mlps[static_cast<size_t>(l)].intermediate / counts.cuts * s.hidden; break;
      }
    }
  return elements;
}

int64_t shared_elements(const ModelConfig& model) {
  const ModelShape& s = model.shape;
  int64_t elements = int64_t{model.vocab_size} * s.hidden * (model.tie_word_embeddings ? 1 : 2);
  const bool gates = model.names->shared_gate != nullptr;
  for (const MlpShape& mlp : s.mlps) elements += mlp.num_experts > 0 ? (int64_t{mlp.num_experts} + gates) * s.hidden : 0;
  return elements;
}

}  // namespace

TEST_CASE("each rank reads its slices of the start layout once and nothing else") {
  for (const std::string& path : {kQwen, kDense, kMixtral, kQwen2, kGlm, kGranite})
    for (int ranks : {1, 2, 4})
      for (Layout layout : {Layout::kTp, Layout::kEp}) {
        INFO(path << ", " << ranks << " ranks, " << name_of(layout));
        const ModelConfig model = read_config(path);
        EngineConfig config = small_config(ranks, 1, layout);
        config.max_context = 1024;
        Counts counts;
        CpuDevice device(ranks, cpu_ops(best_isa()));
        World world(ranks, 1, 30000);
        const auto source = open_checkpoint(path, model, nullptr);
        const ModelStore store(CountingSource(*source, counts), model, config, world, device, 0);
        REQUIRE(counts.elements.size() == static_cast<size_t>(ranks));

        int64_t all = 0, owned = 0;
        for (const auto& [thread, n] : counts.elements) all += n;
        for (int r = 0; r < ranks; ++r) owned += owned_elements(model.shape, store.arena(), layout, r);
        CHECK(all == owned + shared_elements(model));
        // The calling thread is rank 0: its own slices and a share of the replicated weights.
        const int64_t first = counts.elements.at(std::this_thread::get_id()) - owned_elements(model.shape, store.arena(), layout, 0);
        CHECK(first > 0);
        CHECK(first <= div_up(shared_elements(model), ranks) + 32 * model.shape.hidden);  // whole routers
      }
}

}  // namespace moebius::test
