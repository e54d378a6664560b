// Weights on their way from a checkpoint into packed slices (lib/tensor/packed.h), bf16 in memory whatever the file holds.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lib/layout/slices.h"
#include "lib/model/config.h"
#include "lib/model/safetensors.h"
#include "lib/tensor/dtype.h"

namespace moebius {

// A [rows, columns] matrix of a model, read by rectangles; one thread at a time.
class MatrixReader {
 public:
  virtual ~MatrixReader() = default;
  // out[r·columns.size() + c] = bf16 of element (rows.begin + r, columns.begin + c).
  virtual void read(Range rows, Range columns, bf16* out) const = 0;
};

// Where a model's matrices come from. Thread-safe after construction. One that has only some of the tensors gives null, or an empty vector,
// for the others.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool partial() const { return false; }
  // `name` as on disk, of the given shape [rows, columns].
  virtual std::unique_ptr<MatrixReader> matrix(const std::string& name, int64_t rows, int64_t columns) const = 0;
  // Expert e's gate, up ([I, H]) or down ([H, I]) of layer l, shared ones behind the others, −1 the dense MLP; the source knows how they are stored.
  enum class ExpertPart { kGate, kUp, kDown };
  virtual std::unique_ptr<MatrixReader> expert(int layer, int expert, ExpertPart part) const = 0;
  virtual std::vector<float> vector(const std::string& name, int64_t size) const = 0;
  virtual bool has(const std::string& name) const = 0;
};

// Every tensor that the config calls for is looked up and its shape compared before this returns. A tensor that is not read but
// would change the arithmetic (anything else in a layer, also one beyond num_hidden_layers: a bias, a shared expert, an expert too
// many, sinks; a bias elsewhere) is refused by name; what remains is told to `warning` (may be null) in one line.
std::unique_ptr<WeightSource> open_checkpoint(const ModelFiles& files, const ModelConfig& model,
                                              const std::function<void(const std::string&)>& warning);
// The same of some tensors of the model, at least one, and nothing else.
std::unique_ptr<WeightSource> open_tensors(const ModelFiles& files, const ModelConfig& model);
inline std::unique_ptr<WeightSource> open_checkpoint(const std::filesystem::path& model_dir, const ModelConfig& model,
                                                     const std::function<void(const std::string&)>& warning) {
  return open_checkpoint(FolderFiles(model_dir), model, warning);
}
// Seeded random weights: an element depends on (seed, name, index) only. Router rows are scaled so that experts are hit about
// evenly.
std::unique_ptr<WeightSource> make_dummy_source(const ModelConfig& model, uint64_t seed);

// Largest absolute values seen while packing, by role: a property of the model, since a maximum has no order. Below 0: none was seen.
struct SliceMaxima {
  float gate = -1, up = -1, down = -1;  // MLP slices; q or k, v, o of attention
  void include(const SliceMaxima& other);
  void replace(const SliceMaxima& newer);  // what has been seen there
};

// Whether the source has anything of a slice.
bool has_any(const WeightSource& source, const Slice& slice);

// Writes slices in packed form, padding included: one of attention, or cuts first.cut, first.cut + 1, … of one MLP, which are read
// together. outs[i] (first.bytes) takes the i-th. Reads only their elements. What a partial source lacks stays in outs as it is.
SliceMaxima pack_slices(const WeightSource& source, const ModelConfig& model, const SliceTable& table, const Slice& first,
                        std::span<std::byte* const> outs);

struct SharedLayer {
  const float* input_norm = nullptr;           // [hidden]
  const float* post_attention_norm = nullptr;  // [hidden]
  const float* q_norm = nullptr;               // [head_dim] or null
  const float* k_norm = nullptr;
  const float* q_bias = nullptr;               // of all heads, [heads·head_dim], and of all KV heads; or null
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  const bf16* router = nullptr;                // as RouteArgs::w; null for a dense layer
  const float* router_bias = nullptr;          // [num_experts] or null
};

// What every rank needs whole: embedding, LM head, norms, biases, routers. One block of memory, read-only, of which ranks that share memory
// share one copy; this says what lies where in it.
class SharedWeights {
 public:
  // row_major: the LM head is kept as [vocab, hidden], not packed; where tied it is the embedding too.
  SharedWeights(const ModelConfig& model, bool row_major);
  int64_t bytes() const { return bytes_; }

  // Loads this worker's share of all of it, or of what the source has, into the block at `base`; call with every worker 0 … workers − 1.
  void load(const WeightSource& source, int worker, int workers, std::byte* base) const;

  // load() writes nothing before this byte: embedding and LM head come first.
  int64_t begin_of(const WeightSource& source) const;

  const bf16* embedding(const std::byte* base) const;  // [vocab, hidden]; null when tied to a packed LM head
  const bf16* lm_head(const std::byte* base) const { return reinterpret_cast<const bf16*>(base); }
  bool row_major() const { return row_major_; }
  const float* final_norm(const std::byte* base) const { return reinterpret_cast<const float*>(base + norms_); }
  SharedLayer layer(const std::byte* base, int l) const;

 private:
  const ModelConfig& model_;
  const bool row_major_;
  int64_t embedding_ = -1, norms_ = 0, bytes_ = 0;  // offsets; −1: tied
  int64_t q_bias_ = 0, router_bias_ = 0, stride_ = 0;  // floats of one layer: where biases begin behind the norms, and all of them
  std::vector<int64_t> routers_;                    // [layers] offsets; −1: dense
};

}  // namespace moebius
