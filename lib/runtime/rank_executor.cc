#include "lib/runtime/rank_executor.h"

#include <algorithm>
#include <utility>

#include "lib/base/error.h"
#include "lib/tensor/packed.h"

namespace moebius {

RankExecutor::RankExecutor(const ForwardModel& model, const std::vector<LayerWeights> (&layers)[2], const RankContext& context)
    : model_(model), layers_(layers), context_(context) {}

AddNormArgs RankExecutor::norm_of(Range rows, const Sums& sums, const float* weight, bool keep_float, Residual& residual) const {
  const RankBuffers& b = *context_.buffers;
  AddNormArgs args;
  args.rows = rows;
  args.hidden = model_.hidden;
  args.h = residual.here;
  args.h_out = residual.next;
  if (sums.partials.num > 0 && residual.next != nullptr) std::swap(residual.here, residual.next);
  args.num_partials = sums.partials.num;
  args.partials = sums.partials.sums;
  args.flags = sums.partials.flags;
  args.plain = b.sums[0].plain;
  args.factor = model_.residual_multiplier / (args.plain ? 1.0f : sums.scale);
  args.whole_rows = sums.partials.whole_rows;
  args.weight = weight;
  args.eps = model_.eps;
  args.x = b.x;
  args.x_float = keep_float ? b.x_float : nullptr;
  return args;
}

// Norm, projections, rotary embedding, KV write, attention and O projection: fills the attention sum of the norm's rows.
void RankExecutor::attend(const StepShape& shape, const StepView& view, const LayerWeights& layer, Layout layout, const AddNormArgs& norm, const Lane& lane) {
  const Range rows = norm.rows;
  const RankBuffers& b = *context_.buffers;
  const Ops& ops = *context_.ops;
  const int64_t q_width = layer.num_heads * model_.head_dim, kv_width = layer.kv.num_kv_heads * model_.head_dim;
  float* const q = b.qkv;
  float* const k = q + b.max_rows * q_width;
  float* const v = k + b.max_rows * kv_width;

  LinearPart parts[kMaxLinearParts];
  int num_parts = 0;
  const int64_t group_width = q_width / static_cast<int64_t>(layer.q.size());
  for (size_t g = 0; g < layer.q.size(); ++g)
    parts[num_parts++] = {layer.q[g], group_width, q + static_cast<int64_t>(g) * group_width, q_width};
  for (size_t h = 0; h < layer.k.size(); ++h) {
    const int64_t at = static_cast<int64_t>(h) * model_.head_dim;
    parts[num_parts++] = {layer.k[h], model_.head_dim, k + at, kv_width};
    parts[num_parts++] = {layer.v[h], model_.head_dim, v + at, kv_width};
  }
  LinearArgs linear;
  linear.rows = rows;
  linear.x = b.x;
  linear.ldx = linear.k = model_.hidden;
  linear.num_parts = num_parts;
  linear.parts = parts;
  linear.plain = b.sums[0].plain;
  if (ops.norm_linear != nullptr) {
    ops.norm_linear({norm, linear}, lane);
  } else {
    norm_rows(context_, norm, lane);
    ops.linear(linear, lane);
  }
  context_.comm->rank_barrier();

  const int which = static_cast<int>(layout);
  RopeAttentionArgs args;
  RopeStoreArgs& rope = args.rope;
  rope.rows = rows;
  rope.places = view.places[which];
  rope.num_heads = layer.num_heads;
  rope.q = q;
  rope.k = k;
  rope.v = v;
  rope.q_bias = layer.q_bias;
  rope.k_bias = layer.k_bias;
  rope.v_bias = layer.v_bias;
  rope.q_norm = layer.q_norm;
  rope.k_norm = layer.k_norm;
  rope.eps = model_.eps;
  rope.rope = model_.rope;
  rope.q_out = b.q;
  rope.kv = layer.kv;
  rope.value_scale = layer.value_scale;

  const Range chunks = layout == Layout::kTp ? Range{0, shape.num_chunks}
                                             : shape.chunks_of_home[context_.comm->rank()];
  AttentionArgs& attention = args.attention;
  attention.num_chunks = static_cast<int>(chunks.size());
  attention.chunks = view.chunks[which] + chunks.begin;
  attention.num_rows = rows.size();
  attention.max_tokens = shape.max_tokens;
  attention.num_heads = layer.num_heads;
  attention.heads_of_kv = layer.heads_of_kv.data();
  attention.softmax_scale = model_.softmax_scale;
  attention.value_scale = layer.value_scale;
  attention.q = b.q;
  attention.out = b.attention;
  attention.kv = layer.kv;
  if (ops.rope_attention != nullptr) {
    ops.rope_attention(args, lane);
  } else {
    ops.rope_store(rope, lane);
    context_.comm->rank_barrier();  // the step's own K and V are read back as stored
    ops.attention(attention, lane);
  }
  context_.comm->rank_barrier();

  ExactLinearArgs out;
  out.rows = rows;
  out.x = b.attention;
  out.ldx = q_width;
  out.hidden = model_.hidden;
  out.k = q_width / std::max<int64_t>(1, static_cast<int64_t>(layer.o.size()));
  out.num_parts = static_cast<int>(layer.o.size());
  out.parts = layer.o.data();
  out.out = b.sums[static_cast<int>(Accumulator::kAttention)];
  out.out.scale = layer.attention_scale;
  ops.exact_linear(out, lane);
}

void RankExecutor::forward(const StepShape& shape, const StepView& view, const Lane& lane) {
  const RankBuffers& b = *context_.buffers;
  const int64_t num_rows = shape.num_rows;
  const auto backend_of = [&](int32_t layer) -> const LayerBackend& {
    return layer < shape.seam ? tp_backend() : ep_backend();
  };

  // Flags are sticky within a step: a row that has become NaN stays NaN.
  context_.ops->clear(b.step_state, static_cast<size_t>(b.step_state_bytes), lane);

  Range rows = backend_of(0).rows(context_, shape.homes.data(), num_rows);
  EmbedArgs embed;
  embed.rows = rows;
  embed.tokens = view.tokens;
  embed.hidden = model_.hidden;
  embed.table = model_.embedding;
  embed.packed = model_.lm_head;
  embed.h = b.h;
  embed.multiplier = model_.embedding_multiplier;
  context_.ops->embed(embed, lane);
  context_.comm->rank_barrier();

  Sums pending;
  Residual residual{b.h, b.h_other};
  for (int32_t l = 0; l < model_.num_layers; ++l) {
    const LayerBackend& backend = backend_of(l);
    const Layout layout = l < shape.seam ? Layout::kTp : Layout::kEp;
    const LayerWeights& layer = layers_[static_cast<int>(layout)][l];
    rows = backend.rows(context_, shape.homes.data(), num_rows);

    attend(shape, view, layer, layout, norm_of(rows, pending, layer.input_norm, false, residual), lane);
    const PartialSums attention = backend.finish_attention(context_, num_rows);

    const AddNormArgs norm = norm_of(rows, {attention, layer.attention_scale}, layer.post_attention_norm, !layer.dense(), residual);
    pending = {backend.run_mlp(context_, layer, norm, shape.homes.data(), num_rows, lane), layer.mlp_scale};
    if (context_.routes != nullptr && lane.thread == 0 && !layer.dense()) keep_routes(l, num_rows);
  }
  context_.ops->add_norm(norm_of(rows, pending, model_.final_norm, false, residual), lane);
  // The LM head is divided by vocabulary, so every rank needs every row.
  if (shape.seam < model_.num_layers) context_.comm->gather_rows(shape.homes.data(), lane);
  else context_.comm->rank_barrier();
}

// In either layout a rank has every row's choices when it has run the MLP, until the next layer's router.
void RankExecutor::keep_routes(int32_t layer, int64_t num_rows) {
  const RankBuffers& b = *context_.buffers;
  const RouteRule& rule = context_.rule;
  const auto bytes = [](int32_t ids) { return ids * static_cast<int64_t>(sizeof(int32_t)); };
  context_.device->read(context_.comm->rank(), context_.routes + layer * b.max_rows * rule.top_k, bytes(rule.top_k), b.expert_ids, bytes(rule.choices()),
                        bytes(rule.top_k), num_rows);
}

Range RankExecutor::columns() const {
  const Range tiles = share_of(div_up(model_.vocab, kTile), context_.comm->rank(), context_.comm->size());
  return {tiles.begin * kTile, std::min(model_.vocab, tiles.end * kTile)};
}

void RankExecutor::logits(const StepView& view, Range group, float* logits, int64_t stride, const Lane& lane) {
  const RankBuffers& b = *context_.buffers;
  context_.ops->pick_rows({group.size(), view.logit_rows + group.begin, model_.hidden, b.x, b.head_x}, lane);
  context_.comm->rank_barrier();

  const PackedMatrix head{model_.vocab, model_.hidden};
  const Range mine = columns();
  if (mine.empty()) return;
  const int64_t begin = model_.row_major_head ? mine.begin * model_.hidden : mine.begin / kTile * head.tile_elements();
  const LinearPart part{model_.lm_head + begin, mine.size(), logits, stride};
  LinearArgs args;
  args.rows = {0, group.size()};
  args.x = b.head_x;
  args.ldx = args.k = model_.hidden;
  args.num_parts = 1;
  args.parts = &part;
  args.row_major = model_.row_major_head;
  context_.ops->linear(args, lane);
}

}  // namespace moebius
