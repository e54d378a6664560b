// Every allocation of the library fails once, through the C ABI: the call says out of memory, nothing leaks, and nothing ends the process.
// A program of its own, because it replaces operator new (which a sanitizer build must not).
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "moebius/moebius.h"
#include "tests/catch.h"

static std::atomic<int64_t> live{0};        // blocks that have not been given back
static std::atomic<int64_t> until_failure{0};  // 0: none fails; n: the n-th from now on does
static std::atomic<bool> failed{false};
static bool all_after = false;              // and all that come after it

static void* allocate(size_t bytes, size_t alignment) noexcept {
  if (until_failure.load(std::memory_order_relaxed) > 0 && until_failure.fetch_sub(1) == 1) {
    failed = true;
    if (all_after) until_failure = 1;
    return nullptr;
  }
  void* const p = alignment > alignof(std::max_align_t) ? std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)
                                                        : std::malloc(bytes != 0 ? bytes : 1);
  if (p != nullptr) ++live;
  return p;
}
static void* allocate_or_throw(size_t bytes, size_t alignment) {
  if (void* p = allocate(bytes, alignment)) return p;
  throw std::bad_alloc();
}
static void release(void* p) noexcept {
  if (p != nullptr) --live;
  std::free(p);
}
void* operator new(size_t bytes) { return allocate_or_throw(bytes, 1); }
void* operator new[](size_t bytes) { return allocate_or_throw(bytes, 1); }
void* operator new(size_t bytes, std::align_val_t a) { return allocate_or_throw(bytes, static_cast<size_t>(a)); }
void* operator new[](size_t bytes, std::align_val_t a) { return allocate_or_throw(bytes, static_cast<size_t>(a)); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 1); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 1); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { release(p); }

namespace {

constexpr char kSmallConfig[] = R"({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "head_dim": 32,
  "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
  "moe_intermediate_size": 32, "intermediate_size": 64, "norm_topk_prob": true, "vocab_size": 64, "max_position_embeddings": 64,
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true, "mlp_only_layers": [],
  "decoder_sparse_step": 1, "eos_token_id": [0, 1]})";
const std::string kModel = std::string(MOEBIUS_TEST_DATA) + "/tiny-qwen3-moe";

// Runs `scene` with its first allocation failing, then its second (or every stride-th), … until one run needs no more; how many there
// were. A scene gives back what it made and returns the first status that was not 0.
int64_t fail_each(const std::function<moebius_status()>& scene, int64_t stride = 1) {
  REQUIRE(scene() == MOEBIUS_OK);  // what is made once for good is made now
  int64_t n = 0;
  for (bool more = true; more;) {
    const int64_t before = live;
    failed = false;
    until_failure = n += stride;
    const moebius_status status = scene();
    until_failure = 0;
    more = failed;
    const int64_t leaked = live - before;
    if (leaked != 0) FAIL("allocation " << n << " fails: " << leaked << " blocks leaked, status " << moebius_status_name(status));
    if (status != (more ? MOEBIUS_E_OUT_OF_MEMORY : MOEBIUS_OK)) FAIL("allocation " << n << " fails: status " << moebius_status_name(status));
  }
  return n - 1;
}

struct Engine {
  moebius_config* config = nullptr;
  moebius_source* source = nullptr;
  moebius_engine* engine = nullptr;
  moebius_request* request = nullptr;
  ~Engine() {
    moebius_request_destroy(request);
    moebius_engine_destroy(engine);
    moebius_source_destroy(source);
    moebius_config_destroy(config);
  }
  // From the checkpoint, or with dummy weights from a model so small that every allocation can have its turn.
  moebius_status create(moebius_error** err, bool checkpoint = false) {
    moebius_status s = moebius_config_create(&config, err);
    if (s == MOEBIUS_OK) s = moebius_config_set_i64(config, "dummy_weights", checkpoint ? 0 : 1, err);
    if (s == MOEBIUS_OK) s = moebius_config_set_i64(config, "ranks", 2, err);
    if (s == MOEBIUS_OK) s = moebius_config_set_i64(config, "threads", 1, err);
    if (s == MOEBIUS_OK) s = moebius_config_set_i64(config, "kv_tokens", 256, err);
    if (s == MOEBIUS_OK) s = moebius_config_set_i64(config, "max_batch", 4, err);
    if (s == MOEBIUS_OK) s = moebius_config_set_str(config, "mode", "exact", err);
    if (checkpoint) return s != MOEBIUS_OK ? s : moebius_engine_create(kModel.c_str(), config, &engine, err);
    if (s == MOEBIUS_OK) s = moebius_source_create("small", &source, err);
    if (s == MOEBIUS_OK) s = moebius_source_add_memory(source, "config.json", kSmallConfig, sizeof kSmallConfig - 1, err);
    return s != MOEBIUS_OK ? s : moebius_engine_create_from(source, config, &engine, err);
  }
  moebius_status submit(moebius_error** err) {
    const int32_t prompt[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18};
    moebius_request_destroy(request);
    request = nullptr;
    moebius_status s = moebius_request_create(&request, err);
    if (s == MOEBIUS_OK) s = moebius_request_set_prompt(request, prompt, 18, err);
    if (s == MOEBIUS_OK) s = moebius_request_set_str(request, "id", "a name that is long enough to need memory of its own", err);
    if (s == MOEBIUS_OK) s = moebius_request_set_i64(request, "keep_logits", 1, err);
    if (s == MOEBIUS_OK) s = moebius_request_set_i64(request, "routed_experts", 1, err);
    if (s == MOEBIUS_OK) s = moebius_request_set_i64(request, "n", 2, err);
    if (s == MOEBIUS_OK) s = moebius_request_set_i64(request, "max_tokens", 3, err);
    if (s == MOEBIUS_OK) s = moebius_request_set_i64(request, "ignore_eos", 1, err);
    if (s == MOEBIUS_OK) s = moebius_request_set_f64(request, "repetition_penalty", 1.2, err);
    if (s == MOEBIUS_OK) s = moebius_engine_submit(engine, request, nullptr, err);
    return s;
  }
  moebius_status run(moebius_error** err) {
    moebius_status s = moebius_engine_switch(engine, MOEBIUS_LAYOUT_EP, err);
    for (int i = 0; i < 6 && s == MOEBIUS_OK; ++i) s = moebius_engine_step(engine, nullptr, err);
    return s;
  }
};

// The error that a failed call leaves belongs to the caller.
moebius_status ended(moebius_status status, moebius_error* error) {
  if (status != MOEBIUS_OK) {
    REQUIRE(moebius_error_code(error) == status);
    REQUIRE(*moebius_error_message(error) != '\0');
  }
  moebius_error_destroy(error);
  return status;
}

}  // namespace

TEST_CASE("any allocation of an update may fail, and the next one mends it") {
  Engine e;
  REQUIRE(e.create(nullptr) == MOEBIUS_OK);
  struct Shape {
    std::string name;
    std::vector<int64_t> dims;
  };
  std::vector<Shape> tensors = {{"model.embed_tokens.weight", {64, 64}}, {"model.norm.weight", {64}}};
  for (int l = 0; l < 2; ++l) {
    const std::string layer = "model.layers." + std::to_string(l) + ".";
    for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) tensors.push_back({layer + norm + ".weight", {64}});
    for (const char* norm : {"q_norm", "k_norm"}) tensors.push_back({layer + "self_attn." + norm + ".weight", {32}});
    for (const char* p : {"q_proj", "k_proj", "v_proj", "o_proj"}) tensors.push_back({layer + "self_attn." + p + ".weight", {64, 64}});
    tensors.push_back({layer + "mlp.gate.weight", {4, 64}});
    tensors.push_back({layer + "mlp.experts.gate_up_proj", {4, 64, 64}});
    tensors.push_back({layer + "mlp.experts.down_proj", {4, 64, 32}});
  }
  const std::vector<uint16_t> ones(4 * 64 * 64, 0x3f80);
  const int64_t n = fail_each([&] {
    moebius_error* error = nullptr;
    moebius_source* source = nullptr;
    moebius_status s = moebius_source_create("trained", &source, &error);
    for (const Shape& t : tensors) {
      size_t size = 2;
      for (int64_t d : t.dims) size *= static_cast<size_t>(d);
      if (s == MOEBIUS_OK) s = moebius_source_add_tensor(source, t.name.c_str(), "BF16", t.dims.data(), t.dims.size(), ones.data(), size, &error);
    }
    if (s == MOEBIUS_OK) s = moebius_engine_update_weights_from(e.engine, source, &error);
    moebius_source_destroy(source);
    return ended(s, error);
  }, 3);
  CHECK(n > 300);
  CHECK(moebius_engine_step(e.engine, nullptr, nullptr) == MOEBIUS_OK);
}

TEST_CASE("any allocation of making an engine may fail") {
  for (const bool checkpoint : {false, true}) {
    const int64_t n = fail_each(
        [checkpoint] {
          Engine e;
          moebius_error* error = nullptr;
          const moebius_status s = e.create(&error, checkpoint);
          return ended(s, error);
        },
        checkpoint ? 61 : 1);
    CHECK(n > 400);
  }
}

TEST_CASE("any allocation of a request, a switch and its steps may fail; an engine that was in a step has failed and says so") {
  const int64_t n = fail_each([] {
    const int64_t armed = until_failure.exchange(0);  // not while it is made
    Engine e;
    moebius_error* error = nullptr;
    REQUIRE(e.create(nullptr) == MOEBIUS_OK);
    until_failure = armed;
    moebius_status s = e.submit(&error);
    if (s == MOEBIUS_OK) s = e.run(&error);
    until_failure = 0;
    if (s == MOEBIUS_OK) return ended(s, error);
    // Either nothing has happened, and it goes on; or the engine has failed, and every request has its end.
    moebius_stats stats{};
    stats.struct_size = sizeof stats;
    REQUIRE(moebius_engine_stats(e.engine, &stats, nullptr) == MOEBIUS_OK);
    const moebius_status again = e.submit(nullptr);
    if (again == MOEBIUS_OK) REQUIRE(e.run(nullptr) == MOEBIUS_OK);
    else REQUIRE(again == MOEBIUS_E_INVALID_STATE);
    return ended(s, error);
  });
  CHECK(n > 20);
}

TEST_CASE("every request has its end, though nobody has polled and no memory is left") {
  constexpr int kRequests = 1500;  // with the cancel of each more events than the queue has room for before it grows
  Engine e;
  REQUIRE(e.create(nullptr) == MOEBIUS_OK);
  REQUIRE(moebius_request_create(&e.request, nullptr) == MOEBIUS_OK);
  const int32_t prompt[] = {1, 2, 3};
  REQUIRE(moebius_request_set_prompt(e.request, prompt, 3, nullptr) == MOEBIUS_OK);
  std::vector<uint64_t> ids(kRequests);
  for (uint64_t& id : ids) REQUIRE(moebius_engine_submit(e.engine, e.request, &id, nullptr) == MOEBIUS_OK);
  for (uint64_t id : ids) REQUIRE(moebius_engine_cancel(e.engine, id, nullptr) == MOEBIUS_OK);
  std::vector<moebius_event> events(4 * kRequests);
  all_after = true;
  until_failure = 1;
  const moebius_status status = moebius_engine_step(e.engine, nullptr, nullptr);
  all_after = false;
  until_failure = 0;
  CHECK(status == MOEBIUS_E_OUT_OF_MEMORY);
  size_t count = 0;
  REQUIRE(moebius_engine_poll(e.engine, events.data(), events.size(), sizeof events[0], 0, &count, nullptr) == MOEBIUS_OK);
  std::vector<int> ends(kRequests);
  for (size_t i = 0; i < count; ++i)
    if (events[i].type == MOEBIUS_EVENT_FINISHED) ++ends[static_cast<size_t>(events[i].request - ids[0])];
  CHECK(std::count(ends.begin(), ends.end(), 1) == kRequests);
}

TEST_CASE("any allocation of a plan, a tokenizer, and of reports may fail") {
  const std::string text_model = std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe";
  Engine e;
  REQUIRE(e.create(nullptr) == MOEBIUS_OK);
  CHECK(fail_each([&] {
          moebius_error* error = nullptr;
          size_t needed = 0;
          moebius_status s = moebius_engine_metrics_text(e.engine, nullptr, 0, &needed, &error);
          moebius_switch_estimate estimate{};
          estimate.struct_size = sizeof estimate;
          if (s == MOEBIUS_OK) s = moebius_engine_estimate_switch(e.engine, MOEBIUS_LAYOUT_EP, &estimate, &error);
          return ended(s, error);
        }) > 0);
  CHECK(fail_each([] {
          moebius_error* error = nullptr;
          moebius_plan_spec spec{};
          spec.struct_size = sizeof spec;
          spec.num_layers = 2, spec.num_heads = 4, spec.num_kv_heads = 2, spec.num_experts = 4, spec.slices_per_expert = 4;
          spec.attention_bytes = spec.kv_projection_bytes = spec.expert_slice_bytes = spec.kv_slice_bytes = 64;
          spec.tp_pages = spec.ep_pages = 2;
          moebius_plan* plan = nullptr;
          moebius_status s = moebius_plan_create(&spec, nullptr, &plan, &error);
          size_t count = 0;
          if (s == MOEBIUS_OK) s = moebius_plan_copies(plan, MOEBIUS_LAYOUT_EP, 0, nullptr, 0, nullptr, 0, 0, &count, &error);
          moebius_plan_destroy(plan);
          return ended(s, error);
        }) > 20);
  moebius_tokenizer* tokenizer = nullptr;
  REQUIRE(moebius_tokenizer_load(text_model.c_str(), &tokenizer, nullptr) == MOEBIUS_OK);
  CHECK(fail_each([&] {
          moebius_error* error = nullptr;
          int32_t ids[64];
          size_t count = 0, bytes = 0;
          char text[256];
          moebius_decoder* decoder = nullptr;
          const char* out = nullptr;
          moebius_status s = moebius_tokenizer_encode(tokenizer, "What say you, my gentle lord of York?", 37, 1, ids, 64, &count, &error);
          if (s == MOEBIUS_OK) s = moebius_tokenizer_decode(tokenizer, ids, count, 0, text, sizeof text, &bytes, &error);
          if (s == MOEBIUS_OK) s = moebius_decoder_create(tokenizer, &decoder, &error);
          for (size_t i = 0; i < count && s == MOEBIUS_OK; ++i) s = moebius_decoder_push(decoder, ids[i], &out, &bytes, &error);
          moebius_decoder_destroy(decoder);
          return ended(s, error);
        }) > 5);
  moebius_tokenizer_destroy(tokenizer);
}
