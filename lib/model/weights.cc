#include "lib/model/weights.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <span>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "lib/base/error.h"
#include "lib/tensor/packed.h"
#include "lib/tensor/transpose.h"

namespace moebius {
namespace {

float max_abs(const bf16* x, int64_t n) {
  int16_t most = 0;  // of |x| as bits: ordered as the values are; NaN counts as largest
  for (int64_t i = 0; i < n; ++i) most = std::max(most, static_cast<int16_t>(x[i] & 0x7fff));
  return to_float(static_cast<bf16>(most));
}

// One tile of outputs = rows, `width` columns of each: pair p at out + p·pair_elements, 16 outputs × 2. What is missing is 0.
void pack_tile(const bf16* in, int64_t stride, int64_t rows, int64_t width, bf16* out, int64_t pair_elements) {
  int64_t c = 0;
  if (rows == kTile)
    for (; c + 8 <= width; c += 8)
      for (int64_t r = 0; r < kTile; r += 4) {
        const bf16* x = in + r * stride + c;
        transpose_4x4(x, x + stride, x + 2 * stride, x + 3 * stride, out + c / 2 * pair_elements + 2 * r, pair_elements * 2);
      }
  for (; c < width; c += 2)
    for (int64_t r = 0; r < kTile; ++r) {
      bf16* pair = out + c / 2 * pair_elements + 2 * r;
      pair[0] = r < rows ? in[r * stride + c] : bf16{0};
      pair[1] = r < rows && c + 1 < width ? in[r * stride + c + 1] : bf16{0};
    }
}

// Rows [rows) × columns [columns) of a matrix, cut along the columns into outs.size() equal parts: part i goes to outs[i] as tiles
// of outputs = rows, tile_elements apart. A file has whole rows in turn, so they are read once for all parts. Returns the largest absolute
// value, −1 where there is no matrix.
float pack_rows(const MatrixReader* m, Range rows, Range columns, std::span<bf16* const> outs, int64_t tile_elements, int64_t pair_elements) {
  if (m == nullptr) return -1;
  const int64_t stride = columns.size(), width = stride / static_cast<int64_t>(outs.size());
  std::vector<bf16> strip(static_cast<size_t>(kTile * stride));  // [rows of a tile, columns]
  float most = 0;
  for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kTile) {
    const Range some{r0, std::min(rows.end, r0 + kTile)};
    m->read(some, columns, strip.data());
    most = std::max(most, max_abs(strip.data(), some.size() * stride));
    for (size_t i = 0; i < outs.size(); ++i)
      pack_tile(strip.data() + static_cast<int64_t>(i) * width, stride, some.size(), width,
                outs[i] + (r0 - rows.begin) / kTile * tile_elements, pair_elements);
  }
  return most;
}

float pack_matrix(const MatrixReader* m, Range rows, Range columns, bf16* out) {
  return pack_rows(m, rows, columns, {&out, 1}, PackedMatrix{rows.size(), columns.size()}.tile_elements(), 2 * kTile);
}

std::string layer_name(int layer, std::string_view what) { return fmt::format("model.layers.{}.{}", layer, what); }
std::string attention_name(int layer, const char* what) { return layer_name(layer, "self_attn.") + what; }

// The spelling that the source has, else the first.
std::string spelled(const WeightSource& source, int layer, const char* const (&spellings)[2]) {
  std::string name = layer_name(layer, spellings[0]);
  if (spellings[1] == nullptr || source.has(name)) return name;
  std::string other = layer_name(layer, spellings[1]);
  return source.has(other) ? other : name;
}

// As WeightSource::expert numbers it.
int expert_of(const Slice& slice) { return slice.kind == SliceKind::kDenseCut ? -1 : slice.index; }

// The order in which a head's dimensions of q and k are kept. Kernels turn dimension i with dim/2 + i, all of them; where a model turns only the
// first `turned`, i with turned/2 + i, those lie as the kernels want them, and the others have angle 0. Products of q and k are the same in any order.
struct HeadOrder {
  int64_t dim, turned;
  int64_t source(int64_t i) const {
    const bool upper = i >= dim / 2;
    if (i - upper * (dim / 2) < turned / 2) return upper ? i - dim / 2 + turned / 2 : i;
    return upper ? i : i + turned / 2;
  }
};

// Rows of heads in that order.
class HeadRows final : public MatrixReader {
 public:
  HeadRows(std::unique_ptr<MatrixReader> rows, HeadOrder order) : rows_(std::move(rows)), order_(order) {}
  void read(Range rows, Range columns, bf16* out) const override {
    const auto source = [&](int64_t r) { return r / order_.dim * order_.dim + order_.source(r % order_.dim); };
    for (int64_t r = rows.begin, end; r < rows.end; r = end) {
      for (end = r + 1; end < rows.end && source(end) == source(end - 1) + 1;) ++end;
      rows_->read({source(r), source(r) + end - r}, columns, out + (r - rows.begin) * columns.size());
    }
  }

 private:
  std::unique_ptr<MatrixReader> rows_;
  HeadOrder order_;
};

// q_proj or k_proj of a layer, as it is kept.
std::unique_ptr<MatrixReader> turned_rows(const WeightSource& source, const ModelConfig& model, int layer, const char* what, int64_t rows) {
  std::unique_ptr<MatrixReader> m = source.matrix(attention_name(layer, what), rows, model.shape.hidden);
  if (m == nullptr || model.rotary_dim == model.shape.head_dim) return m;
  return std::make_unique<HeadRows>(std::move(m), HeadOrder{model.shape.head_dim, model.rotary_dim});
}

// Cuts first.cut, first.cut + 1, … of one MLP.
SliceMaxima pack_mlp(const WeightSource& source, const ModelConfig& model, const SliceTable& table, const Slice& first,
                     std::span<std::byte* const> outs) {
  const MlpCut cut{model.shape.mlps[static_cast<size_t>(first.layer)].intermediate / table.counts().cuts, model.shape.hidden};
  const auto num_cuts = static_cast<int64_t>(outs.size());
  const Range neurons{first.cut * cut.neurons, (first.cut + num_cuts) * cut.neurons}, hidden{0, cut.hidden};
  using Part = WeightSource::ExpertPart;
  const int expert = expert_of(first);
  const auto gate = source.expert(first.layer, expert, Part::kGate), up = source.expert(first.layer, expert, Part::kUp),
             down = source.expert(first.layer, expert, Part::kDown);
  SliceMaxima most;
  std::vector<bf16*> downs;
  for (int64_t i = 0; i < num_cuts; ++i) {
    bf16* out = reinterpret_cast<bf16*>(outs[static_cast<size_t>(i)]);
    const Range own{neurons.begin + i * cut.neurons, neurons.begin + (i + 1) * cut.neurons};
    bf16* const parts[2] = {out, out + 2 * kTile};
    most.gate = std::max(most.gate, pack_rows(gate.get(), own, hidden, {parts, 1}, cut.gate_up_tile_elements(), 4 * kTile));
    most.up = std::max(most.up, pack_rows(up.get(), own, hidden, {parts + 1, 1}, cut.gate_up_tile_elements(), 4 * kTile));
    downs.push_back(out + cut.gate_up_elements());
    // The padding neurons' weights: columns beyond the cut's own are 0.
    if (down && cut.padded() != cut.neurons) std::fill_n(downs.back(), cut.down().elements(), bf16{0});
  }
  most.down = pack_rows(down.get(), hidden, neurons, downs, cut.down().tile_elements(), 2 * kTile);
  return most;
}

}  // namespace

void SliceMaxima::include(const SliceMaxima& other) {
  gate = std::max(gate, other.gate);
  up = std::max(up, other.up);
  down = std::max(down, other.down);
}

void SliceMaxima::replace(const SliceMaxima& newer) {
  if (newer.gate >= 0) gate = newer.gate;
  if (newer.up >= 0) up = newer.up;
  if (newer.down >= 0) down = newer.down;
}

bool has_any(const WeightSource& source, const Slice& slice) {
  if (!source.partial()) return true;
  const auto has = [&](const char* what) { return source.has(attention_name(slice.layer, what)); };
  if (slice.kind == SliceKind::kAttentionGroup) return has("q_proj.weight") || has("o_proj.weight");
  if (slice.kind == SliceKind::kKvProjection) return has("k_proj.weight") || has("v_proj.weight");
  for (auto part : {WeightSource::ExpertPart::kGate, WeightSource::ExpertPart::kUp, WeightSource::ExpertPart::kDown})
    if (source.expert(slice.layer, expert_of(slice), part) != nullptr) return true;
  return false;
}

SliceMaxima pack_slices(const WeightSource& source, const ModelConfig& model, const SliceTable& table, const Slice& slice,
                        std::span<std::byte* const> outs) {
  bf16* out = reinterpret_cast<bf16*>(outs[0]);
  const ModelShape& s = model.shape;
  const Range all{0, s.hidden};
  if (slice.kind == SliceKind::kAttentionGroup) {
    const AttentionGroup group{s.num_heads / table.counts().head_groups, s.head_dim, s.hidden};
    const int64_t width = group.heads * s.head_dim, total = int64_t{s.num_heads} * s.head_dim;
    const Range heads{slice.index * width, (slice.index + 1) * width};
    SliceMaxima most;
    const auto q = turned_rows(source, model, slice.layer, "q_proj.weight", total);
    const auto o = source.matrix(attention_name(slice.layer, "o_proj.weight"), s.hidden, total);
    most.gate = pack_matrix(q.get(), heads, all, out);
    most.down = pack_matrix(o.get(), all, heads, out + group.q().elements());
    return most;
  }
  if (slice.kind == SliceKind::kKvProjection) {
    const KvProjection projection{s.head_dim, s.hidden};
    const Range head{slice.index * int64_t{s.head_dim}, (slice.index + 1) * int64_t{s.head_dim}};
    const int64_t total = int64_t{s.num_kv_heads} * s.head_dim;
    SliceMaxima most;
    const auto k = turned_rows(source, model, slice.layer, "k_proj.weight", total);
    const auto v = source.matrix(attention_name(slice.layer, "v_proj.weight"), total, s.hidden);
    most.gate = pack_matrix(k.get(), head, all, out);
    most.up = pack_matrix(v.get(), head, all, out + projection.k().elements());
    return most;
  }
  return pack_mlp(source, model, table, slice, outs);
}

// ---- checkpoint

namespace {

bf16 convert(const std::byte* p, Dtype dtype) {
  uint16_t half;
  float single;
  switch (dtype) {
    case Dtype::kBf16: std::memcpy(&half, p, 2); return half;
    case Dtype::kF16: std::memcpy(&half, p, 2); return to_bf16(half_to_float(half));
    default: std::memcpy(&single, p, 4); return to_bf16(single);
  }
}

float convert_to_float(const std::byte* p, Dtype dtype) {
  uint16_t half;
  float single;
  switch (dtype) {
    case Dtype::kBf16: std::memcpy(&half, p, 2); return to_float(half);
    case Dtype::kF16: std::memcpy(&half, p, 2); return half_to_float(half);
    default: std::memcpy(&single, p, 4); return single;
  }
}

int64_t element_bytes(const Checkpoint::Tensor& t) { return t.info->dtype == Dtype::kF32 ? 4 : 2; }

// A matrix in a file: row_length elements a row, beginning at element `first` of its tensor.
struct StoredMatrix {
  Checkpoint::Tensor tensor;
  int64_t first = 0, row_length = 0;
};

// bf16 rows that follow one another in the file are read straight to where they are wanted, anything else by way of a buffer.
class StoredReader final : public MatrixReader {
 public:
  explicit StoredReader(const StoredMatrix& m) : m_(m), size_(element_bytes(m.tensor)) {}
  void read(Range rows, Range columns, bf16* out) const override {
    const int64_t width = columns.size();
    const bool as_stored = m_.tensor.info->dtype == Dtype::kBf16;
    if (as_stored && width == m_.row_length) {
      const auto bytes = rows.size() * width * 2;
      for (int64_t done = 0; done < bytes; done += kBufferBytes)
        m_.tensor.read(byte_of(rows.begin, 0) + done, reinterpret_cast<std::byte*>(out) + done, static_cast<size_t>(std::min(kBufferBytes, bytes - done)));
      return;
    }
    for (int64_t r = rows.begin; r < rows.end;) {
      // From the first wanted element of row r to the last of row `last`, what lies between rows included.
      const int64_t last = std::min(rows.end - 1, r + rows_at_once(width) - 1);
      buffer_.resize(static_cast<size_t>(((last - r) * m_.row_length + width) * size_));
      m_.tensor.read(byte_of(r, columns.begin), buffer_.data(), buffer_.size());
      const std::byte* row = buffer_.data();
      for (; r <= last; ++r, out += width, row += m_.row_length * size_) {
        if (as_stored)
          std::memcpy(out, row, static_cast<size_t>(width) * 2);
        else
          for (int64_t c = 0; c < width; ++c) out[c] = convert(row + c * size_, m_.tensor.info->dtype);
      }
    }
  }

 private:
  // A gap of up to 4 KiB takes no longer to be read along than another call does.
  static constexpr int64_t kMaxGapBytes = 4096, kBufferBytes = 256 << 10;
  int64_t rows_at_once(int64_t width) const {
    if ((m_.row_length - width) * size_ > kMaxGapBytes) return 1;
    return std::max<int64_t>(1, kBufferBytes / (m_.row_length * size_));
  }
  uint64_t byte_of(int64_t row, int64_t column) const { return static_cast<uint64_t>((m_.first + row * m_.row_length + column) * size_); }

  StoredMatrix m_;
  int64_t size_;
  mutable std::vector<std::byte> buffer_;
};

class CheckpointSource final : public WeightSource {
 public:
  CheckpointSource(const ModelFiles& files, const ModelConfig& model, bool partial) : checkpoint_(files), model_(model), partial_(partial) {}

  const Checkpoint& checkpoint() const { return checkpoint_; }
  bool has(const std::string& name) const override { return checkpoint_.find(name) != nullptr; }
  bool partial() const override { return partial_; }
  bool lacks(const std::string& name) const { return partial_ && !has(name); }

  std::unique_ptr<MatrixReader> matrix(const std::string& name, int64_t rows, int64_t columns) const override {
    if (lacks(name)) return nullptr;
    const Checkpoint::Tensor& t = require(name, {rows, columns});
    return std::make_unique<StoredReader>(StoredMatrix{t, 0, columns});
  }

  std::vector<float> vector(const std::string& name, int64_t size) const override {
    if (lacks(name)) return {};
    const Checkpoint::Tensor& t = require(name, {size});
    std::vector<float> out(static_cast<size_t>(size));
    const int64_t bytes = element_bytes(t);
    std::vector<std::byte> stored(static_cast<size_t>(size * bytes));
    t.read(0, stored.data(), stored.size());
    for (int64_t i = 0; i < size; ++i) out[static_cast<size_t>(i)] = convert_to_float(stored.data() + i * bytes, t.info->dtype);
    return out;
  }

  std::unique_ptr<MatrixReader> expert(int layer, int expert, ExpertPart part) const override {
    const Located located = locate(layer, expert, part);
    return located.name.empty() ? nullptr : std::make_unique<StoredReader>(located.matrix);
  }

  // Where a part of an expert lies, checked against the config; shared ones are parts of one MLP, expert −1 is the dense MLP. Without a name: a partial source lacks it.
  struct Located {
    std::string name;
    StoredMatrix matrix;
  };
  Located locate(int layer, int expert, ExpertPart part) const {
    const int64_t hidden = model_.shape.hidden;
    const MlpShape& mlp = model_.shape.mlps[static_cast<size_t>(layer)];
    const bool down = part == ExpertPart::kDown;
    const int64_t rows = down ? hidden : mlp.intermediate, columns = down ? mlp.intermediate : hidden;
    if (expert >= mlp.num_experts) {
      const std::string name = layer_name(layer, model_.names->shared_mlp[static_cast<int>(part)]);
      if (lacks(name)) return {};
      const int64_t first = int64_t{expert - mlp.num_experts} * mlp.intermediate, width = int64_t{mlp.num_shared} * mlp.intermediate;
      const Checkpoint::Tensor& t = down ? require(name, {hidden, width}) : require(name, {width, hidden});
      return {name, {t, down ? first : first * hidden, down ? width : hidden}};
    }
    const char* const dense[] = {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"};
    const char* const pattern = expert < 0 ? nullptr : model_.names->experts[static_cast<int>(part)];
    const std::string fused = spelled(*this, layer, down ? model_.names->fused_down : model_.names->fused_gate_up);
    if (expert >= 0 && (pattern == nullptr || has(fused))) {
      if (lacks(fused)) return {};
      const int64_t fused_rows = down ? hidden : 2 * mlp.intermediate;
      const Checkpoint::Tensor& t = require(fused, {mlp.num_experts, fused_rows, columns});
      const int64_t first = expert * fused_rows + (part == ExpertPart::kUp ? mlp.intermediate : 0);
      return {fused, {t, first * columns, columns}};
    }
    std::string name = layer_name(layer, expert < 0 ? dense[static_cast<int>(part)] : pattern);
    if (const size_t at = name.find("{e}"); at != std::string::npos) name.replace(at, 3, std::to_string(expert));
    if (lacks(name)) return {};
    const Checkpoint::Tensor& t = require(name, {rows, columns});
    return {name, {t, 0, columns}};
  }

  // Looks a tensor up and compares it with what the config says.
  const Checkpoint::Tensor& require(const std::string& name, const std::vector<int64_t>& shape) const {
    const Checkpoint::Tensor* t = checkpoint_.find(name);
    if (t == nullptr) fail(Code::kCorruptModel, "{}: tensor '{}' is missing", checkpoint_.name(), name);
    if (t->info->shape != shape)
      fail(Code::kCorruptModel, "{}: tensor '{}' has shape [{}], config.json calls for [{}]", t->file->name(), name,
           fmt::join(t->info->shape, ", "), fmt::join(shape, ", "));
    if (t->info->dtype == Dtype::kOther)
      fail(Code::kUnsupported, "{}: tensor '{}' is {}; BF16, F16 and F32 are read", t->file->name(), name, t->info->dtype_name);
    return *t;
  }

 private:
  Checkpoint checkpoint_;
  ModelConfig model_;
  bool partial_;
};

// Visits every tensor that the model will read, and returns their names.
std::unordered_set<std::string> check_tensors(const CheckpointSource& source, const ModelConfig& model) {
  const ModelShape& s = model.shape;
  std::unordered_set<std::string> used;
  const auto want = [&](const std::string& name, const std::vector<int64_t>& shape) {
    if (source.lacks(name)) return;
    source.require(name, shape);
    used.insert(name);
  };
  want("model.embed_tokens.weight", {model.vocab_size, s.hidden});
  want("model.norm.weight", {s.hidden});
  if (!model.tie_word_embeddings) want("lm_head.weight", {model.vocab_size, s.hidden});
  for (int l = 0; l < s.num_layers(); ++l) {
    want(layer_name(l, "input_layernorm.weight"), {s.hidden});
    want(layer_name(l, "post_attention_layernorm.weight"), {s.hidden});
    const int64_t q = int64_t{s.num_heads} * s.head_dim, kv = int64_t{s.num_kv_heads} * s.head_dim;
    want(attention_name(l, "q_proj.weight"), {q, s.hidden});
    want(attention_name(l, "k_proj.weight"), {kv, s.hidden});
    want(attention_name(l, "v_proj.weight"), {kv, s.hidden});
    want(attention_name(l, "o_proj.weight"), {s.hidden, q});
    if (model.qkv_bias) {
      want(attention_name(l, "q_proj.bias"), {q});
      want(attention_name(l, "k_proj.bias"), {kv});
      want(attention_name(l, "v_proj.bias"), {kv});
    }
    if (model.qk_norm) {
      want(attention_name(l, "q_norm.weight"), {s.head_dim});
      want(attention_name(l, "k_norm.weight"), {s.head_dim});
    }
    const MlpShape& mlp = s.mlps[static_cast<size_t>(l)];
    if (mlp.num_experts > 0) {
      want(spelled(source, l, model.names->router), {mlp.num_experts, s.hidden});
      if (model.names->router_bias != nullptr) want(layer_name(l, model.names->router_bias), {mlp.num_experts});
      if (model.names->shared_gate != nullptr) want(layer_name(l, model.names->shared_gate), {1, s.hidden});
    }
    for (int e = 0; e < std::max(1, mlp.all_experts()); ++e)
      for (auto part : {WeightSource::ExpertPart::kGate, WeightSource::ExpertPart::kUp, WeightSource::ExpertPart::kDown})
        used.insert(source.locate(l, mlp.num_experts > 0 ? e : -1, part).name);
  }
  used.erase("");  // what a partial source lacks
  return used;
}

// The layer of "model.layers.{l}.…"; −1 for every other name.
int64_t layer_of(std::string_view name) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (name.substr(0, kPrefix.size()) != kPrefix) return -1;
  int64_t layer = -1;
  const auto [end, error] = std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), layer);
  if (error == std::errc::invalid_argument || end == name.data() + name.size() || *end != '.') return -1;
  return error == std::errc() ? layer : INT64_MAX;
}

// Would this tensor, which the model does not read, have changed what it computes? Inside a layer everything would, but for
// tables that are computed anyway; outside of the layers a bias would.
bool changes_arithmetic(std::string_view name) {
  const auto ends_with = [&](std::string_view end) { return name.size() >= end.size() && name.substr(name.size() - end.size()) == end; };
  if (layer_of(name) >= 0) return !ends_with(".rotary_emb.inv_freq");
  return ends_with(".bias");
}

// Refuses what may not be ignored; tells the rest in one warning.
void report_unused(const Checkpoint& checkpoint, const std::unordered_set<std::string>& used, const ModelConfig& model,
                   const std::function<void(const std::string&)>& warning) {
  constexpr size_t kShown = 3;
  std::vector<std::string_view> some;
  size_t unused = 0;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    if (used.count(name) || (model.tie_word_embeddings && name == "lm_head.weight")) continue;
    if (layer_of(name) >= model.shape.num_layers() + model.num_prediction_layers)
      fail(Code::kUnsupported, "{}: tensor '{}' belongs to layer {}, config.json's num_hidden_layers is {}", tensor.file->name(), name,
           layer_of(name), model.shape.num_layers());
    if (changes_arithmetic(name) && layer_of(name) < model.shape.num_layers())
      fail(Code::kUnsupported, "{}: tensor '{}' [{}] would change what the model computes, and {} with {} layers of its config.json does not use it",
           tensor.file->name(), name, fmt::join(tensor.info->shape, ", "), model.family, model.shape.num_layers());
    if (++unused <= kShown) some.push_back(name);
  }
  if (unused > 0 && warning)
    warning(fmt::format("{}: {} tensors are not used: '{}'{}", checkpoint.name(), unused, fmt::join(some, "', '"), unused > kShown ? ", …" : ""));
}

}  // namespace

std::unique_ptr<WeightSource> open_checkpoint(const ModelFiles& files, const ModelConfig& model,
                                              const std::function<void(const std::string&)>& warning) {
  auto source = std::make_unique<CheckpointSource>(files, model, false);
  report_unused(source->checkpoint(), check_tensors(*source, model), model, warning);
  return source;
}

std::unique_ptr<WeightSource> open_tensors(const ModelFiles& files, const ModelConfig& model) {
  auto source = std::make_unique<CheckpointSource>(files, model, true);
  const std::unordered_set<std::string> used = check_tensors(*source, model);
  for (const auto& [name, tensor] : source->checkpoint().tensors())
    if (!used.contains(name) && !(model.tie_word_embeddings && name == "lm_head.weight"))
      fail(Code::kInvalidArgument, "{}: tensor '{}' is none that the model has", tensor.file->name(), name);
  if (source->checkpoint().tensors().empty()) fail(Code::kInvalidArgument, "{}: there is no tensor", files.name());
  return source;
}

// ---- dummy weights

namespace {

uint64_t hash_name(const std::string& name, uint64_t seed) {
  uint64_t h = 0xcbf29ce484222325ull ^ (seed * 0x9e3779b97f4a7c15ull);
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return h;
}

// Uniform in ±√3·scale (so that its deviation is `scale`), from a mix of the element's index.
struct DummyReader final : MatrixReader {
  DummyReader(uint64_t seed, int64_t row_length, float deviation) : seed_(seed), row_length_(row_length), scale_(deviation * 1.7320508f) {}
  void read(Range rows, Range columns, bf16* out) const override {
    const uint64_t seed = seed_;
    const float scale = scale_ * 0x1p-31f;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const auto first = static_cast<uint32_t>(static_cast<uint64_t>(r * row_length_ + columns.begin) + seed);
      const auto high = static_cast<uint32_t>((static_cast<uint64_t>(r * row_length_) + seed) >> 32);
      for (int64_t c = 0; c < columns.size(); ++c) {  // a 32-bit mixer: vectorises
        uint32_t x = first + static_cast<uint32_t>(c);
        x ^= high;
        x *= 0x9e3779b1u;
        x ^= x >> 15;
        x *= 0x85ebca77u;
        x ^= x >> 13;
        x *= 0xc2b2ae3du;
        x ^= x >> 16;
        *out++ = to_bf16(static_cast<float>(static_cast<int32_t>(x)) * scale);
      }
    }
  }
  uint64_t seed_;
  int64_t row_length_;
  float scale_;
};

class DummySource final : public WeightSource {
 public:
  DummySource(const ModelConfig& model, uint64_t seed) : model_(model), seed_(seed) {}
  bool has(const std::string&) const override { return true; }
  std::unique_ptr<MatrixReader> matrix(const std::string& name, int64_t, int64_t columns) const override {
    // A normed input has deviation 1, so outputs have deviation about 1; the router's are equally large for every expert, which
    // is what spreads the tokens evenly. Embeddings have deviation 1 too: smaller ones would drown in what attention adds, which
    // rows of one prompt have in common.
    const float deviation = name == "model.embed_tokens.weight" ? 1.0f : 1.0f / std::sqrt(static_cast<float>(columns));
    return std::make_unique<DummyReader>(hash_name(name, seed_), columns, deviation);
  }
  std::unique_ptr<MatrixReader> expert(int layer, int expert, ExpertPart part) const override {
    const int64_t columns = part == ExpertPart::kDown ? model_.shape.mlps[static_cast<size_t>(layer)].intermediate : model_.shape.hidden;
    return matrix(fmt::format("{}.{}.{}", layer, expert, static_cast<int>(part)), 0, columns);
  }
  std::vector<float> vector(const std::string& name, int64_t size) const override {  // of norms, or a bias
    return std::vector<float>(static_cast<size_t>(size), name.ends_with("bias") ? 0.0f : 1.0f);
  }

 private:
  ModelConfig model_;
  uint64_t seed_;
};

}  // namespace

std::unique_ptr<WeightSource> make_dummy_source(const ModelConfig& model, uint64_t seed) { return std::make_unique<DummySource>(model, seed); }

// ---- replicated weights

namespace {

// Of the router and what gates shared experts.
int64_t router_elements(const ModelConfig& model, int layer) {
  const int experts = model.shape.mlps[static_cast<size_t>(layer)].num_experts;
  if (experts == 0) return 0;
  return PackedMatrix{experts, model.shape.hidden}.elements() + (model.names->shared_gate != nullptr ? PackedMatrix{1, model.shape.hidden}.elements() : 0);
}

int64_t most_experts(const ModelConfig& model) {
  int most = 0;
  for (const MlpShape& mlp : model.shape.mlps) most = std::max(most, mlp.num_experts);
  return most;
}

}  // namespace

SharedWeights::SharedWeights(const ModelConfig& model, bool row_major) : model_(model), row_major_(row_major) {
  const auto place = [&](int64_t bytes) { return std::exchange(bytes_, bytes_ + round_up(bytes, 64)); };  // cache lines
  const ModelShape& s = model.shape;
  const int64_t rows_bytes = int64_t{model.vocab_size} * s.hidden * 2;
  place(row_major ? rows_bytes : PackedMatrix{model.vocab_size, s.hidden}.bytes());
  if (!model.tie_word_embeddings) embedding_ = place(rows_bytes);
  q_bias_ = 2 * s.hidden + 2 * s.head_dim;
  router_bias_ = q_bias_ + (model.qkv_bias ? (s.num_heads + 2 * int64_t{s.num_kv_heads}) * s.head_dim : 0);
  stride_ = round_up(router_bias_ + (model.names->router_bias != nullptr ? most_experts(model) : 0), 4);
  norms_ = place((s.hidden + s.num_layers() * stride_) * 4);
  for (int l = 0; l < s.num_layers(); ++l) {
    const int64_t elements = router_elements(model, l);
    routers_.push_back(elements > 0 ? place(elements * 2) : -1);
  }
}

const bf16* SharedWeights::embedding(const std::byte* base) const {
  if (embedding_ < 0) return row_major_ ? lm_head(base) : nullptr;
  return reinterpret_cast<const bf16*>(base + embedding_);
}

SharedLayer SharedWeights::layer(const std::byte* base, int l) const {
  const ModelShape& s = model_.shape;
  const float* norms = final_norm(base) + s.hidden + l * stride_;
  SharedLayer out;
  out.input_norm = norms;
  out.post_attention_norm = norms + model_.shape.hidden;
  if (model_.qk_norm) {
    out.q_norm = norms + 2 * model_.shape.hidden;
    out.k_norm = out.q_norm + model_.shape.head_dim;
  }
  if (model_.qkv_bias) {
    out.q_bias = norms + q_bias_;
    out.k_bias = out.q_bias + int64_t{s.num_heads} * s.head_dim;
    out.v_bias = out.k_bias + int64_t{s.num_kv_heads} * s.head_dim;
  }
  if (const int64_t router = routers_[static_cast<size_t>(l)]; router >= 0) {
    out.router = reinterpret_cast<const bf16*>(base + router);
    if (model_.names->router_bias != nullptr) out.router_bias = norms + router_bias_;
  }
  return out;
}

int64_t SharedWeights::begin_of(const WeightSource& source) const {
  const bool has_large = !source.partial() || source.has("model.embed_tokens.weight") || source.has("lm_head.weight");
  return has_large ? 0 : norms_;
}

void SharedWeights::load(const WeightSource& source, int worker, int workers, std::byte* memory) const {
  const ModelShape& s = model_.shape;
  const PackedMatrix head{model_.vocab_size, s.hidden};
  const Range tiles = share_of(head.tiles(), worker, workers);
  const Range rows{tiles.begin * kTile, std::min<int64_t>(model_.vocab_size, tiles.end * kTile)};
  if (!rows.empty()) {
    const auto embedding = source.matrix("model.embed_tokens.weight", model_.vocab_size, s.hidden);
    const bool tied = model_.tie_word_embeddings;
    const std::unique_ptr<MatrixReader> lm = tied ? nullptr : source.matrix("lm_head.weight", model_.vocab_size, s.hidden);
    const MatrixReader* const m = tied ? embedding.get() : lm.get();
    if (!row_major_) pack_matrix(m, rows, {0, s.hidden}, reinterpret_cast<bf16*>(memory) + tiles.begin * head.tile_elements());
    else if (m != nullptr) m->read(rows, {0, s.hidden}, reinterpret_cast<bf16*>(memory) + rows.begin * s.hidden);
    if (!tied && embedding) embedding->read(rows, {0, s.hidden}, reinterpret_cast<bf16*>(memory + embedding_) + rows.begin * s.hidden);
  }
  const auto copy = [&](const std::string& name, int64_t size, float* out, float divisor = 1) {
    for (const float v : source.vector(name, size)) *out++ = v / divisor;
  };
  const auto copy_heads = [&](const std::string& name, int64_t heads, float* out) {  // in the order of q and k
    const std::vector<float> values = source.vector(name, heads * s.head_dim);
    const HeadOrder order{s.head_dim, model_.rotary_dim};
    for (size_t i = 0; i < values.size(); ++i) {
      const int64_t d = static_cast<int64_t>(i) % s.head_dim;
      out[i] = values[i - static_cast<size_t>(d) + static_cast<size_t>(order.source(d))];
    }
  };
  float* const norms = reinterpret_cast<float*>(memory + norms_);
  if (worker == 0) copy("model.norm.weight", s.hidden, norms, model_.logits_scaling);  // logits are linear in it
  for (int l = worker; l < s.num_layers(); l += workers) {
    float* base = norms + s.hidden + l * stride_;
    copy(layer_name(l, "input_layernorm.weight"), s.hidden, base);
    copy(layer_name(l, "post_attention_layernorm.weight"), s.hidden, base + s.hidden);
    if (model_.qk_norm) {
      copy_heads(attention_name(l, "q_norm.weight"), 1, base + 2 * s.hidden);
      copy_heads(attention_name(l, "k_norm.weight"), 1, base + 2 * s.hidden + s.head_dim);
    }
    if (model_.qkv_bias) {
      float* const k_bias = base + q_bias_ + int64_t{s.num_heads} * s.head_dim;
      copy_heads(attention_name(l, "q_proj.bias"), s.num_heads, base + q_bias_);
      copy_heads(attention_name(l, "k_proj.bias"), s.num_kv_heads, k_bias);
      copy(attention_name(l, "v_proj.bias"), int64_t{s.num_kv_heads} * s.head_dim, k_bias + int64_t{s.num_kv_heads} * s.head_dim);
    }
    const int experts = s.mlps[static_cast<size_t>(l)].num_experts;
    if (experts == 0) continue;
    const FamilyDescriptor& names = *model_.names;
    bf16* const router = reinterpret_cast<bf16*>(memory + routers_[static_cast<size_t>(l)]);
    pack_matrix(source.matrix(spelled(source, l, names.router), experts, s.hidden).get(), {0, experts}, {0, s.hidden}, router);
    if (names.shared_gate != nullptr)
      pack_matrix(source.matrix(layer_name(l, names.shared_gate), 1, s.hidden).get(), {0, 1}, {0, s.hidden}, router + PackedMatrix{experts, s.hidden}.elements());
    if (names.router_bias != nullptr) copy(layer_name(l, names.router_bias), experts, base + router_bias_);
  }
}

}  // namespace moebius
