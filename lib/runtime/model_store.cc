#include "lib/runtime/model_store.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "lib/base/error.h"
#include "lib/comm/waits.h"
#include "lib/device/pinned.h"
#include "lib/model/scale.h"
#include "lib/runtime/backend.h"
#include "lib/runtime/rank_executor.h"
#include "lib/runtime/resident_copies.h"
#include "lib/tensor/packed.h"

namespace moebius {
namespace {

// Tables hold some 100 bytes of a slice, and dummy weights have no file that a config could be compared with.
constexpr int64_t kMaxSlices = 1 << 20;      // 128 layers of 1,024 experts in 8 cuts
constexpr double kMaxWeightBytes = 0x1p50;   // sums of sizes stay far from 2^63

SliceCounts bounded_slice_counts(const ModelShape& shape, int slices_per_expert) {
  const SliceCounts counts = slice_counts(shape, slices_per_expert);
  const int64_t parts = counts.head_groups + 2 * int64_t{shape.num_kv_heads};  // of a rank that owns all heads (EP)
  if (parts > kMaxLinearParts)
    fail(Code::kUnsupported, "{} head groups, K and V of {} KV heads are {} matrices of a projection, at most {} are read at once",
         counts.head_groups, shape.num_kv_heads, parts, kMaxLinearParts);
  int64_t slices = 0;
  int experts = 0;
  double bytes = 0;
  for (const MlpShape& mlp : shape.mlps) {
    slices += counts.head_groups + shape.num_kv_heads + int64_t{std::max(1, mlp.all_experts())} * counts.cuts;
    experts = std::max(experts, mlp.all_experts());
    bytes += 6.0 * std::max(1, mlp.all_experts()) * mlp.intermediate * shape.hidden;
    bytes += 4.0 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * shape.hidden;
  }
  if (slices > kMaxSlices || bytes > kMaxWeightBytes)
    fail(Code::kUnsupported,
         "{} layers of up to {} experts in {} cuts make {} slices of {:.0f} bytes in all; at most {} of {:.0f} bytes are laid out",
         shape.num_layers(), experts, counts.cuts, slices, bytes, kMaxSlices, kMaxWeightBytes);
  return counts;
}

std::unique_ptr<WeightSource> open_weights(const ModelFiles& files, const ModelConfig& model, const EngineConfig& config) {
  const auto warn = [&](const std::string& text) {
    if (config.log) config.log(LogLevel::kWarning, "load", text);
  };
  if (!model.unknown_keys.empty())
    warn(fmt::format("{}: {} keys are not known and were ignored: {}", files.name_of("config.json"), model.unknown_keys.size(),
                     fmt::join(model.unknown_keys, ", ")));
  return config.dummy_weights ? make_dummy_source(model, config.seed) : open_checkpoint(files, model, warn);
}

bool is_mlp(const Slice& slice) { return slice.kind != SliceKind::kAttentionGroup && slice.kind != SliceKind::kKvProjection; }

int64_t rope_bytes(const ModelConfig& model, int64_t positions) {
  return positions * model.shape.head_dim * static_cast<int64_t>(sizeof(float));  // a cosine and a sine for each half
}

// Positions that a request may reach: longer ones are refused at submit, for no layout holds their KV.
int64_t served_positions(const EngineConfig& config, int64_t tp_pages, int64_t ep_pages) {
  return std::min(config.max_context, std::min(tp_pages, ep_pages) * config.page_tokens);
}

// cos and sin of position · theta^(−2i/d), the angle in float as Hugging Face computes it, d the dimensions that are turned; others by no angle.
void fill_rope(const ModelConfig& model, int64_t positions, float* out) {
  const int64_t half = model.shape.head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const bool turns = 2 * i < model.rotary_dim;
    const auto frequency = turns ? static_cast<float>(1.0 / std::pow(model.rope_theta, 2.0 * static_cast<double>(i) / model.rotary_dim)) : 0.0f;
    for (int64_t p = 0; p < positions; ++p) {
      const float angle = static_cast<float>(p) * frequency;
      out[p * 2 * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      out[(p * 2 + 1) * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

// Arrays that a rank's tables point to, collected on the host as offsets until their place in the rank's memory is known.
class Lists {
 public:
  static constexpr int64_t kAlign = 16;
  template <class T>
  const T* add(const std::vector<T>& values) {
    const size_t at = bytes_.size();
    bytes_.resize(at + static_cast<size_t>(round_up(static_cast<int64_t>(values.size() * sizeof(T)), kAlign)));
    std::memcpy(bytes_.data() + at, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<const T*>(at + 1);  // never null
  }
  template <class T>
  static void move_to(const std::byte* base, const T*& list) {
    if (list != nullptr) list = reinterpret_cast<const T*>(base + reinterpret_cast<uintptr_t>(list) - 1);
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

}  // namespace

ModelStore::ModelStore(const ModelFiles& files, const ModelConfig& model, const EngineConfig& config, World& world, Device& device,
                       int64_t workspace_bytes)
    : ModelStore(*open_weights(files, model, config), model, config, world, device, workspace_bytes) {}

ModelStore::ModelStore(const WeightSource& source, const ModelConfig& model, const EngineConfig& config, World& world, Device& device,
                       int64_t workspace_bytes)
    : model_(model),
      world_(world),
      device_(device),
      shared_(model, row_major_head(config)),
      counts_(bounded_slice_counts(model.shape, config.slices_per_expert)),
      slices_(model.shape, counts_),
      tp_((check_ranks(model.shape, counts_, config.ranks), tp_owners(slices_, config.ranks))),
      ep_(ep_owners(slices_, config.ranks)),
      arena_(plan(config, workspace_bytes)),
      to_tp_(plan_transfer(arena_, Layout::kEp)),
      to_ep_(plan_transfer(arena_, Layout::kTp)) {
  for (int r = 0; r < config.ranks; ++r) {
    ranks_.push_back(std::make_unique<Rank>());
    ranks_.back()->arena = DeviceBuffer(device, r, arena_.arena_bytes(r));
  }
  reserve_shared(served_positions(config, arena_.tp_pages(), *std::max_element(arena_.ep_pages().begin(), arena_.ep_pages().end())));
  scales_ = load(source, config.layout == Layout::kTp ? model.shape.num_layers() : 0, config.progress);
  for (int r = 0; r < config.ranks; ++r) make_tables(config.page_tokens, r);
  set_scales();
  wait_for_ranks();
}

bool ModelStore::update(const WeightSource& source, int seam, const std::function<bool(int64_t, int64_t)>& progress) {
  std::vector<Scales> scales = load(source, seam, progress);
  wait_for_ranks();
  scales_.swap(scales);
  set_scales();
  return scales != scales_;
}

void ModelStore::wait_for_ranks() {
  for (int r = 0; r < world_.ranks(); ++r) wait_until_idle(world_, device_, r);
}

std::vector<std::byte*> ModelStore::arenas() const {
  std::vector<std::byte*> out;
  for (const auto& rank : ranks_) out.push_back(rank->arena.data());
  return out;
}

// Lists have a pointer for each cut of the rank and a number for each expert, in both layouts. ep_pages: of each home.
int64_t ModelStore::most_table_bytes(int64_t tp_pages, int64_t ep_pages) const {
  int64_t experts = 0, most = 0;
  for (const MlpShape& mlp : model_.shape.mlps) experts += 2 * (mlp.all_experts() * int64_t{sizeof(int32_t)} + 2 * Lists::kAlign);
  for (int r = 0; r < world_.ranks(); ++r) {
    int64_t owned = 0;
    for (const Owners* owners : {&tp_, &ep_})
      for (const std::vector<RankSet>& layer : owners->slices)
        owned += std::count_if(layer.begin(), layer.end(), [r](RankSet set) { return (set >> r & 1) != 0; });
    most = std::max(most, experts + owned * int64_t{sizeof(void*)});
  }
  if (ResidentCopies::possible(device_)) most += ResidentCopies::most_bytes(tp_, ep_, tp_pages + world_.ranks() * ep_pages);
  return most;
}

int64_t ModelStore::table_bytes() const {
  return most_table_bytes(arena_.tp_pages(), *std::max_element(arena_.ep_pages().begin(), arena_.ep_pages().end()));
}

// The wish is kv_tokens, or else KV for max_batch requests of up to 4,096 tokens; the limit is memory_bytes, or else the rank's
// share of the memory that is free. A wish that fits is granted as it is; otherwise (or with memory_bytes alone) the limit is filled.
ArenaPlan ModelStore::plan(const EngineConfig& config, int64_t workspace_bytes) {
  const int64_t slice = KvSlice{config.page_tokens, model_.shape.head_dim}.bytes();
  memory_bytes_ = config.memory_bytes > 0 ? config.memory_bytes : device_.free_bytes(0);
  std::map<int, int64_t> sharers;  // [place]
  for (int r = 0; r < config.ranks; ++r) {
    ++sharers[device_.place(r)];
    if (config.memory_bytes == 0) memory_bytes_ = std::min(memory_bytes_, device_.free_bytes(r));
    if (memory_bytes_ > device_.total_bytes(r))
      fail(Code::kDoesNotFit, "memory_bytes is {}, rank {} works where there are {}", memory_bytes_, r, device_.total_bytes(r));
  }
  int64_t fewest = config.ranks;
  for (const auto& [place, ranks] : sharers) fewest = std::min(fewest, ranks);
  // Bytes of a rank beside its arena; ranks of one place share one read-only copy of the replicated weights and of the rotary table.
  const auto beside = [&](int64_t tp_pages, int64_t ep_pages) {
    return workspace_bytes + most_table_bytes(tp_pages, ep_pages) + (shared_.bytes() + rope_bytes(model_, served_positions(config, tp_pages, ep_pages))) / fewest;
  };
  const auto capacity_beside = [&](int64_t bytes) {
    try {
      return plan_capacity(slices_, tp_, ep_, slice, std::vector<int64_t>(static_cast<size_t>(config.ranks), memory_bytes_ - bytes));
    } catch (const Error& e) {
      fail(e.code(), "{} (memory_bytes is {}; {} of it are for activations, which grow with chunk_tokens and max_batch, and for what ranks share)",
           e.what(), memory_bytes_, bytes);
    }
  };

  int64_t pages = 0, per_home = 0;
  if (config.kv_tokens > 0) {
    pages = div_up(config.kv_tokens, config.page_tokens);
    per_home = div_up(pages, config.ranks);
  } else if (config.memory_bytes == 0) {
    const int64_t one = div_up(std::min<int64_t>(config.max_context, 4096) + 1, config.page_tokens);
    pages = config.max_batch * one;
    per_home = std::max(one, div_up(pages, config.ranks));  // a home holds any one request
  }
  if (pages > 0) {
    const ArenaPlan wished =
        plan_arena(slices_, tp_, ep_, slice, pages, std::vector<int64_t>(static_cast<size_t>(config.ranks), per_home));
    int64_t bytes = beside(pages, per_home);
    for (int r = 0; r < config.ranks; ++r) bytes = std::max(bytes, wished.arena_bytes(r) + beside(pages, per_home));
    if (bytes <= memory_bytes_) {
      memory_bytes_ = bytes;
      return wished;
    }
  }
  // The rotary table and what a switch sends grow with the pages: as much as they could call for without these is put aside.
  Capacity capacity = capacity_beside(beside(0, 0));
  capacity = capacity_beside(beside(capacity.tp_pages, *std::max_element(capacity.ep_pages.begin(), capacity.ep_pages.end())));
  return plan_arena(slices_, tp_, ep_, slice, capacity.tp_pages, capacity.ep_pages);
}

// One copy of what is replicated for each place: room for the weights, and the rotary table.
void ModelStore::reserve_shared(int64_t positions) {
  const int64_t bytes = rope_bytes(model_, positions);
  shared_bytes_ = shared_.bytes() + bytes;
  std::map<int, const std::byte*> copy_of;
  for (int r = 0; r < world_.ranks(); ++r) {
    const std::byte*& copy = copy_of[device_.place(r)];
    if (copy == nullptr) copy = copies_.emplace_back(r, DeviceBuffer(device_, r, shared_bytes_)).second.data();
    ranks_[r]->shared = copy;
  }
  HostBuffer staging;
  if (!device_.host_memory()) staging = HostBuffer(bytes);
  std::byte* const rope = device_.host_memory() ? copies_[0].second.data() + shared_.bytes() : staging.data();
  fill_rope(model_, positions, reinterpret_cast<float*>(rope));
  for (const auto& [rank, copy] : copies_)
    if (copy.data() + shared_.bytes() != rope) device_.write(rank, copy.data() + shared_.bytes(), rope, bytes);
}

// [layer][slice] whether the source has anything of it.
std::vector<std::vector<bool>> ModelStore::touched_by(const WeightSource& source) const {
  std::vector<std::vector<bool>> out;
  for (int l = 0; l < slices_.num_layers(); ++l) {
    std::vector<bool>& layer = out.emplace_back();
    const std::span<const Slice> slices = slices_.layer(l);
    for (size_t i = 0; i < slices.size(); ++i) {
      const bool same = i > 0 && slices[i].kind == slices[i - 1].kind && slices[i].index == slices[i - 1].index;  // another cut of it
      layer.push_back(same ? layer.back() : has_any(source, slices[i]));
    }
  }
  return out;
}

// A rank on a device has one thread for its steps; loading takes the machine's others too, as far as memory to pack in goes.
int ModelStore::loading_threads() const {
  if (device_.host_memory()) return world_.threads();
  constexpr int64_t kPackedBytes = int64_t{2} << 30;  // of all threads together
  int64_t largest = 1;
  for (int l = 0; l < slices_.num_layers(); ++l)
    for (const Slice& slice : slices_.layer(l)) largest = std::max(largest, slice.bytes * (is_mlp(slice) ? counts_.cuts : 1));
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(std::thread::hardware_concurrency(), kPackedBytes / largest) / world_.ranks()));
}

// Every rank's threads pack its own slices of each layer's layout; the replicated weights are divided over all threads. Where the host
// cannot write a rank's memory, both are packed on the host first, over what is there if the source is partial.
std::vector<ModelStore::Scales> ModelStore::load(const WeightSource& source, int seam, const std::function<bool(int64_t, int64_t)>& progress) {
  const bool direct = device_.host_memory();
  HostBuffer staging;
  if (!direct) staging = HostBuffer(shared_.bytes());
  std::byte* const shared = direct ? copies_[0].second.data() : staging.data();
  const int64_t shared_begin = shared_.begin_of(source), shared_end = shared_.bytes();
  const auto read_back = [&](int rank, std::byte* to, const std::byte* from, int64_t bytes) {
    device_.read(rank, to, bytes, from, bytes, bytes, 1);
  };
  if (!direct && source.partial()) {
    read_back(copies_[0].first, shared + shared_begin, copies_[0].second.data() + shared_begin, shared_end - shared_begin);
    wait_for_ranks();
  }
  const auto layout_of = [seam](int l) { return l < seam ? Layout::kTp : Layout::kEp; };
  const auto owners_of = [&](int l, size_t i) { return arena_.owners(layout_of(l)).slices[static_cast<size_t>(l)][i]; };

  std::mutex mutex;  // of everything below
  std::vector<std::vector<SliceMaxima>> maxima;
  for (const MlpShape& mlp : model_.shape.mlps) maxima.emplace_back(static_cast<size_t>(1 + std::max(1, mlp.all_experts())));
  const std::vector<std::vector<bool>> touched = touched_by(source);
  int64_t total = shared_end - shared_begin, done = 0;
  for (int l = 0; l < model_.shape.num_layers(); ++l)
    for (size_t i = 0; i < slices_.layer(l).size(); ++i)
      if (touched[l][i]) total += slices_.layer(l)[i].bytes * std::popcount(owners_of(l, i));
  const auto advance = [&](int64_t bytes) {
    std::lock_guard lock(mutex);
    done += bytes;
    if (progress && !progress(done, total)) fail(Code::kCancelled, "loading was cancelled");
  };

  const int threads = loading_threads();
  std::optional<World> own;
  World& loaders = direct ? world_ : own.emplace(world_, threads);
  std::vector<std::mutex> of_rank(static_cast<size_t>(world_.ranks()));
  // What a rank's device does for one of its threads, which has it to itself and returns when it is done.
  const auto on_device = [&](int rank, const auto& work) {
    std::lock_guard lock(of_rank[static_cast<size_t>(rank)]);
    const DrainOnError drain(device_, rank);
    work();
    wait_until_idle(loaders, device_, rank);
  };
  loaders.run_long([&](int rank, int thread) {
    shared_.load(source, rank * threads + thread, world_.ranks() * threads, shared);
    int64_t mine = 0, packed_bytes = 0;
    std::vector<std::byte*> places, outs;
    PinnedBuffer packed;  // where it cannot be done in place
    for (int l = 0; l < model_.shape.num_layers(); ++l) {
      const std::span<const Slice> slices = slices_.layer(l);
      for (size_t i = 0, next; i < slices.size(); i = next) {  // runs of an MLP's cuts, anything else one by one
        const Slice& first = slices[i];
        places.clear();
        for (next = i; next == i || (is_mlp(first) && next < slices.size() && slices[next].kind == first.kind && slices[next].index == first.index); ++next) {
          if (!(owners_of(l, next) >> rank & 1)) break;
          places.push_back(ranks_[rank]->arena.data() + arena_.slice_offset(rank, layout_of(l), l, static_cast<int>(next)));
        }
        next = std::max(next, i + 1);
        if (places.empty() || !touched[l][i] || mine++ % threads != thread) continue;
        loaders.check_abort();
        const int64_t bytes = first.bytes * static_cast<int64_t>(places.size());
        outs = places;
        if (!direct) {
          if (packed_bytes < bytes) packed = PinnedBuffer(device_, packed_bytes = bytes);
          for (size_t n = 0; n < outs.size(); ++n) outs[n] = packed.data() + static_cast<int64_t>(n) * first.bytes;
          if (source.partial())
            on_device(rank, [&] {
              for (size_t n = 0; n < outs.size(); ++n) read_back(rank, outs[n], places[n], first.bytes);
            });
        }
        const SliceMaxima seen = pack_slices(source, model_, slices_, first, outs);
        if (!direct)
          on_device(rank, [&] {
            for (size_t n = 0; n < places.size(); ++n) device_.write(rank, places[n], outs[n], first.bytes);
          });
        {
          std::lock_guard lock(mutex);
          maxima[l][is_mlp(first) ? static_cast<size_t>(1 + first.index) : 0].include(seen);
        }
        advance(bytes);
      }
    }
  });
  for (const auto& [rank, copy] : copies_)
    if (!direct) device_.write(rank, copy.data() + shared_begin, shared + shared_begin, shared_end - shared_begin);
  advance(shared_end - shared_begin);
  if (!source.partial()) maxima_ = std::move(maxima);
  else
    for (size_t l = 0; l < maxima.size(); ++l)
      for (size_t i = 0; i < maxima[l].size(); ++i) maxima_[l][i].replace(maxima[l][i]);
  return scales_of(shared);
}

std::vector<ModelStore::Scales> ModelStore::scales_of(const std::byte* shared) const {
  std::vector<Scales> scales;
  for (int l = 0; l < model_.shape.num_layers(); ++l) {
    const SliceMaxima& attention = maxima_[l][0];
    SliceMaxima mlp;
    for (size_t i = 1; i < maxima_[l].size(); ++i) mlp.include(maxima_[l][i]);
    const SharedLayer whole = shared_.layer(shared, l);
    const auto largest = [](const float* values, int64_t n) {
      float most = 0;
      for (int64_t i = 0; values != nullptr && i < n; ++i) most = std::max(most, std::fabs(values[i]));
      return most;
    };
    const float norm = largest(whole.input_norm, model_.shape.hidden), bias = largest(whole.v_bias, model_.shape.num_kv_heads * int64_t{model_.shape.head_dim});
    scales.push_back({std::ldexp(1.0f, value_exponent(attention, model_, norm, bias)), std::ldexp(1.0f, attention_exponent(attention, model_, bias)),
                      std::ldexp(1.0f, mlp_exponent(mlp, model_, l))});
  }
  return scales;
}

void ModelStore::set_scales() {
  for (const auto& rank : ranks_)
    for (std::vector<LayerWeights>& table : rank->tables)
      for (size_t l = 0; l < table.size(); ++l) {
        table[l].value_scale = scales_[l].value;
        table[l].attention_scale = scales_[l].attention;
        table[l].mlp_scale = scales_[l].mlp;
      }
}

void ModelStore::make_tables(int page_tokens, int rank) {
  const ModelConfig& model = model_;
  Rank& mine = *ranks_[rank];
  mine.forward = {model.shape.num_layers(),
                  model.shape.hidden,
                  model.vocab_size,
                  model.shape.num_heads,
                  model.shape.num_kv_heads,
                  model.shape.head_dim,
                  static_cast<float>(model.rms_norm_eps),
                  model.softmax_scale,
                  model.embedding_multiplier,
                  model.residual_multiplier,
                  shared_.embedding(mine.shared),
                  shared_.lm_head(mine.shared),
                  shared_.row_major(),
                  shared_.final_norm(mine.shared),
                  reinterpret_cast<const float*>(mine.shared + shared_.bytes())};
  Lists lists;
  for (Layout layout : {Layout::kTp, Layout::kEp})
    for (int l = 0; l < model.shape.num_layers(); ++l) {
      LayerWeights& w = mine.tables[static_cast<int>(layout)].emplace_back();
      std::vector<const bf16*> cuts;
      std::vector<int32_t> local_of_expert;
      fill_table(page_tokens, rank, layout, l, w, cuts, local_of_expert);
      w.cuts = lists.add(cuts);
      if (!local_of_expert.empty()) w.local_of_expert = lists.add(local_of_expert);
    }
  mine.lists = DeviceBuffer(device_, rank, static_cast<int64_t>(lists.bytes().size()));
  device_.write(rank, mine.lists.data(), lists.bytes().data(), mine.lists.bytes());
  for (std::vector<LayerWeights>& table : mine.tables)
    for (LayerWeights& w : table) {
      Lists::move_to(mine.lists.data(), w.cuts);
      Lists::move_to(mine.lists.data(), w.local_of_expert);
    }
}

// A rank's table of one layer, but for its scales and for the lists in its own memory: cuts and local_of_expert as they will stand there.
void ModelStore::fill_table(int page_tokens, int rank, Layout layout, int l, LayerWeights& w, std::vector<const bf16*>& cuts,
                            std::vector<int32_t>& local_of_expert) const {
  const ModelConfig& model = model_;
  const Owners& owners = layout == Layout::kTp ? tp_ : ep_;
  const int heads_per_group = model.shape.num_heads / counts_.head_groups;
  const AttentionGroup group{heads_per_group, model.shape.head_dim, model.shape.hidden};
  const KvProjection projection{model.shape.head_dim, model.shape.hidden};
  const std::vector<int>& kv_heads = arena_.local_kv_heads(rank, layout);
  const auto owns = [&](int slice) { return (owners.slices[l][static_cast<size_t>(slice)] >> rank & 1) != 0; };
  const auto at = [&](int slice) {
    return reinterpret_cast<const bf16*>(ranks_[rank]->arena.data() + arena_.slice_offset(rank, layout, l, slice));
  };
  w.heads_of_kv.assign(kv_heads.size(), Range{});
  int first_group = counts_.head_groups;
  for (int a = 0; a < counts_.head_groups; ++a) {
    if (!owns(slices_.attention(a))) continue;
    first_group = std::min(first_group, a);
    const bf16* q = at(slices_.attention(a));
    w.q.push_back(q);
    w.o.push_back({q + group.q().elements(), w.num_heads * int64_t{model.shape.head_dim}});
    const auto kv = std::find(kv_heads.begin(), kv_heads.end(), slices_.kv_head_of_group(a));
    MOEBIUS_ASSERT(kv != kv_heads.end());
    Range& heads = w.heads_of_kv[static_cast<size_t>(kv - kv_heads.begin())];
    if (heads.empty()) heads.begin = w.num_heads;
    w.num_heads += heads_per_group;
    heads.end = w.num_heads;
  }
  for (int h : kv_heads) {
    const bf16* k = at(slices_.kv_projection(h));
    w.k.push_back(k);
    w.v.push_back(k + projection.k().elements());
  }
  w.kv = {ranks_[rank]->arena.data() + arena_.kv_offset(rank, layout, l), static_cast<int32_t>(kv_heads.size()), page_tokens,
          model.shape.head_dim};

  const MlpShape& mlp = model.shape.mlps[static_cast<size_t>(l)];
  w.neurons_per_cut = mlp.intermediate / counts_.cuts;
  const auto slice_of = [&](int e, int s) { return mlp.num_experts > 0 ? slices_.expert_cut(e, s) : slices_.dense_cut(s); };
  local_of_expert.assign(static_cast<size_t>(mlp.all_experts()), -1);
  for (int e = 0; e < std::max(1, mlp.all_experts()); ++e) {
    int32_t num_cuts = 0;
    for (int s = 0; s < counts_.cuts; ++s)
      if (owns(slice_of(e, s))) cuts.push_back(at(slice_of(e, s))), ++num_cuts;
    if (num_cuts == 0) continue;
    w.num_cuts = num_cuts;
    if (mlp.num_experts > 0) local_of_expert[static_cast<size_t>(e)] = w.num_local_experts;
    ++w.num_local_experts;
  }
  const SharedLayer shared = shared_.layer(ranks_[rank]->shared, l);
  w.input_norm = shared.input_norm;
  w.post_attention_norm = shared.post_attention_norm;
  if (shared.q_bias != nullptr) {  // a rank's heads and KV heads lie side by side
    const int64_t group_width = int64_t{heads_per_group} * model.shape.head_dim, kv_begin = kv_heads.front() * int64_t{model.shape.head_dim};
    w.q_bias = shared.q_bias + first_group * group_width;
    w.k_bias = shared.k_bias + kv_begin;
    w.v_bias = shared.v_bias + kv_begin;
  }
  w.q_norm = shared.q_norm;
  w.k_norm = shared.k_norm;
  w.router = shared.router;
  w.router_bias = shared.router_bias;
}

}  // namespace moebius
