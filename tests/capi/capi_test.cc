// The C ABI: NULL everywhere, wrong sizes, ownership, and a run of everything together.
#include <poll.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "moebius/moebius.hpp"
#include "tests/catch.h"

namespace {

const std::string kModel = std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe";

constexpr int32_t kEndOfText = 0;

struct Message {
  moebius_error* error = nullptr;
  ~Message() { moebius_error_destroy(error); }
  std::string text() const { return moebius_error_message(error); }
};

moebius_cpp::Engine small_engine(int ranks = 2) {
  moebius_cpp::Config c;
  c.set("ranks", int64_t{ranks}).set("threads", int64_t{1}).set("kv_tokens", int64_t{4096}).set("max_batch", int64_t{8});
  c.set("policy", std::string("manual"));
  return moebius_cpp::Engine(kModel, c);
}

}  // namespace

TEST_CASE("statuses have names, errors can be destroyed twice over nothing") {
  CHECK(std::string(moebius_status_name(MOEBIUS_OK)) == "ok");
  CHECK(std::string(moebius_status_name(MOEBIUS_E_QUEUE_FULL)) == "queue_full");
  CHECK(std::string(moebius_status_name(MOEBIUS_E_INTERNAL)) == "internal");
  CHECK(std::string(moebius_status_name(-99)) == "unknown");
  CHECK(std::string(moebius_status_name(1)) == "unknown");
  moebius_error_destroy(nullptr);
  CHECK(moebius_error_code(nullptr) == MOEBIUS_OK);
  CHECK(std::string(moebius_error_message(nullptr)) == "");
  int32_t major = -1;
  moebius_version(&major, nullptr, nullptr);
  CHECK(major == MOEBIUS_VERSION_MAJOR);
}

TEST_CASE("every function takes NULL for any pointer and says so") {
  moebius_engine* engine = nullptr;
  moebius_config* config = nullptr;
  moebius_request* request = nullptr;
  moebius_event event{};
  size_t count = 0;
  uint64_t id = 0;
  const int32_t ids[1] = {1};
  const std::vector<moebius_status> statuses = {
      moebius_config_create(nullptr, nullptr),
      moebius_config_set_i64(config, "ranks", 1, nullptr),
      moebius_config_set_f64(config, "stall_budget_ms", 1, nullptr),
      moebius_config_set_str(config, "layout", "tp", nullptr),
      moebius_config_set_str(config, "layout", nullptr, nullptr),
      moebius_config_set_progress(config, nullptr, nullptr, nullptr),
      moebius_config_set_log(config, nullptr, nullptr, nullptr),
      moebius_config_set_thread_hook(config, nullptr, nullptr, nullptr),
      moebius_config_set_allocator(config, nullptr, nullptr, nullptr, nullptr),
      moebius_engine_create(nullptr, nullptr, &engine, nullptr),
      moebius_engine_create("x", nullptr, nullptr, nullptr),
      moebius_engine_model(engine, nullptr, nullptr),
      moebius_request_create(nullptr, nullptr),
      moebius_request_set_prompt(request, ids, 1, nullptr),
      moebius_request_set_i64(request, "n", 1, nullptr),
      moebius_request_set_f64(request, "top_p", 1, nullptr),
      moebius_request_set_str(request, "id", "a", nullptr),
      moebius_request_set_ids(request, "stop_token_ids", ids, 1, nullptr),
      moebius_request_add_logit_bias(request, 1, 1, nullptr),
      moebius_engine_submit(engine, request, &id, nullptr),
      moebius_engine_check(engine, request, nullptr),
      moebius_engine_cancel(engine, 1, nullptr),
      moebius_engine_step(engine, nullptr, nullptr),
      moebius_engine_start(engine, nullptr),
      moebius_engine_stop(engine, nullptr),
      moebius_engine_poll(engine, &event, 1, sizeof event, 0, &count, nullptr),
      moebius_engine_switch(engine, MOEBIUS_LAYOUT_TP, nullptr),
      moebius_engine_hold_seam(engine, 0, nullptr),
      moebius_engine_set_stall_budget(engine, 0, nullptr),
      moebius_engine_set_policy(engine, config, nullptr),
      moebius_engine_estimate_switch(engine, MOEBIUS_LAYOUT_TP, nullptr, nullptr),
      moebius_engine_stats(engine, nullptr, nullptr),
      moebius_engine_memory(engine, nullptr, nullptr),
      moebius_engine_metrics_text(engine, nullptr, 0, nullptr, nullptr),
      moebius_engine_take_logits(engine, 1, 0, nullptr, 0, nullptr, nullptr),
      moebius_tokenizer_load(nullptr, nullptr, nullptr),
      moebius_tokenizer_encode(nullptr, nullptr, 0, 0, nullptr, 0, nullptr, nullptr),
      moebius_tokenizer_decode(nullptr, nullptr, 0, 0, nullptr, 0, nullptr, nullptr),
      moebius_decoder_create(nullptr, nullptr, nullptr),
      moebius_decoder_push(nullptr, 0, nullptr, nullptr, nullptr),
      moebius_decoder_finish(nullptr, nullptr, nullptr, nullptr),
  };
  for (size_t i = 0; i < statuses.size(); ++i) {
    INFO("call " << i);
    CHECK(statuses[i] == MOEBIUS_E_INVALID_ARGUMENT);
  }
  moebius_config_destroy(nullptr);
  moebius_engine_destroy(nullptr);
  moebius_request_destroy(nullptr);
  moebius_tokenizer_destroy(nullptr);
  moebius_decoder_destroy(nullptr);
}

TEST_CASE("config keys are enumerated; an unknown one names the nearest, a wrong type its own") {
  moebius_cpp::Config c;
  size_t n = 0;
  const char *name = nullptr, *type = nullptr, *fallback = nullptr, *doc = nullptr, *stability = nullptr;
  for (; moebius_config_key(n, &name, &type, &fallback, &doc, &stability, nullptr) == MOEBIUS_OK; ++n) {
    CHECK(std::strlen(doc) > 0);
    CHECK((std::string(stability) == "stable" || std::string(stability) == "experimental"));
    moebius_status status = MOEBIUS_E_INTERNAL;  // every key takes a value of its type
    if (std::string(type) == "i64") status = moebius_config_set_i64(c.get(), name, 1, nullptr);
    if (std::string(type) == "f64") status = moebius_config_set_f64(c.get(), name, 1, nullptr);
    if (std::string(type) == "str" && *fallback) status = moebius_config_set_str(c.get(), name, fallback, nullptr);
    if (std::string(type) == "str" && !*fallback) status = MOEBIUS_OK;
    if (std::string(type) == "handles") status = moebius_config_set_handles(c.get(), name, nullptr, 0, nullptr);
    INFO(name);
    CHECK(status == MOEBIUS_OK);
  }
  CHECK(n > 20);
  Message m;
  CHECK(moebius_config_set_i64(c.get(), "thread", 1, &m.error) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK_THAT(m.text(), Catch::Contains("'threads'"));
  Message wrong;
  CHECK(moebius_config_set_str(c.get(), "threads", "two", &wrong.error) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK_THAT(wrong.text(), Catch::Contains("i64"));
  CHECK(moebius_config_set_str(c.get(), "layout", "pp", nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  void* handle = &c;
  CHECK(moebius_config_set_handles(c.get(), "streams", nullptr, 1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_config_set_handles(c.get(), "ranks", &handle, 1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_config_set_handles(nullptr, "streams", &handle, 1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  moebius_cpp::Config other;
  CHECK(moebius_config_set_handles(other.get(), "streams", &handle, 1, nullptr) == MOEBIUS_OK);
  moebius_engine* engine = nullptr;
  Message refused;
  CHECK(moebius_engine_create(MOEBIUS_TEST_DATA "/tiny-qwen3-moe", other.get(), &engine, &refused.error) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK_THAT(refused.text(), Catch::Contains("streams and nccl_comms are of ranks on devices; device is cpu"));
  CHECK(moebius_config_set_i64(c.get(), "ranks", -1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
}

TEST_CASE("an unknown key is answered with the nearest one, where one is near") {
  moebius_cpp::Config config;
  CHECK_THROWS_WITH(config.set("rankz", int64_t{2}), Catch::Contains("'rankz'; did you mean 'ranks'?"));
  CHECK_THROWS_WITH(config.set("warning", int64_t{2}), "config has no key 'warning'");
  CHECK_THROWS_WITH(config.set("", int64_t{2}), "config has no key ''");
}

TEST_CASE("requests refuse unknown keys, and by name those of other engines") {
  moebius_cpp::Request r({1, 2});
  CHECK(moebius_request_set_i64(r.get(), "max_token", 1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_request_set_i64(r.get(), "logprobs", -1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  Message m;
  CHECK(moebius_request_set_str(r.get(), "stop", "x", &m.error) == MOEBIUS_E_UNSUPPORTED);
  CHECK_THAT(m.text(), Catch::Contains("'stop'"));
  Message bias;
  CHECK(moebius_request_set_str(r.get(), "logit_bias", "x", &bias.error) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK_THAT(bias.text(), Catch::Contains("add_logit_bias"));
  CHECK(moebius_request_set_f64(r.get(), "max_tokens", 1.5, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_request_set_i64(r.get(), "temperature", 0, nullptr) == MOEBIUS_OK);  // a whole number will do
}

TEST_CASE("a bad path is an error with a message, and nothing is handed out") {
  moebius_engine* engine = reinterpret_cast<moebius_engine*>(1);
  Message m;
  CHECK(moebius_engine_create("/no/such/model", nullptr, &engine, &m.error) == MOEBIUS_E_NOT_FOUND);
  CHECK_THAT(m.text(), Catch::Contains("/no/such/model"));
  CHECK(engine == reinterpret_cast<moebius_engine*>(1));
}

TEST_CASE("a load can be watched and cancelled") {
  moebius_cpp::Config c;
  struct Seen {
    int64_t last = 0, total = 0;
  } seen;
  moebius_config_set_progress(c.get(), [](void* user, int64_t done, int64_t total) -> int32_t {
    auto& s = *static_cast<Seen*>(user);
    CHECK(done >= s.last);
    s = {done, total};
    return 0;
  }, &seen, nullptr);
  moebius_cpp::Engine engine(kModel, c);
  CHECK(seen.last == seen.total);
  CHECK(seen.total > 0);
  moebius_config_set_progress(c.get(), [](void*, int64_t, int64_t) -> int32_t { return 1; }, nullptr, nullptr);
  moebius_engine* none = nullptr;
  CHECK(moebius_engine_create(kModel.c_str(), c.get(), &none, nullptr) == MOEBIUS_E_CANCELLED);
}

TEST_CASE("struct sizes: too small is refused, larger must be zero behind what is known") {
  const auto engine = small_engine();
  moebius_stats stats{};
  stats.struct_size = 8;
  CHECK(moebius_engine_stats(engine.get(), &stats, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  struct {
    moebius_stats stats;
    uint64_t future;
  } larger{};
  larger.stats.struct_size = sizeof larger;
  CHECK(moebius_engine_stats(engine.get(), &larger.stats, nullptr) == MOEBIUS_OK);
  CHECK(larger.stats.num_layers == 6);
  larger.future = 1;
  CHECK(moebius_engine_stats(engine.get(), &larger.stats, nullptr) == MOEBIUS_E_UNSUPPORTED);
  moebius_event event{};
  size_t count = 0;
  CHECK(moebius_engine_poll(engine.get(), &event, 1, sizeof event - 8, 0, &count, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
}

TEST_CASE("requests run, stream, switch and end; logits, metrics, memory and estimates can be had") {
  auto engine = small_engine();
  const moebius_cpp::Tokenizer tokenizer(kModel);
  moebius_cpp::Request r(tokenizer.encode("ROMEO:"));
  r.set("max_tokens", int64_t{12}).set_real("temperature", 0).set("keep_logits", int64_t{1}).set("logprobs", int64_t{3}).set("ignore_eos", int64_t{1});
  const uint64_t id = engine.submit(r);
  moebius_cpp::Request other(std::vector<int32_t>{1, 2, 3});
  other.set("max_tokens", int64_t{200}).set("ignore_eos", int64_t{1});
  const uint64_t cancelled = engine.submit(other);
  std::vector<moebius_event> events;
  std::vector<int32_t> tokens;
  int finished = 0, switched = 0;
  for (int step = 0; finished < 2 && step < 500; ++step) {
    if (step == 3) engine.request_switch(MOEBIUS_LAYOUT_EP);
    if (step == 6) engine.cancel(cancelled);
    engine.step();
    engine.poll(events);
    for (const moebius_event& e : events) {
      CHECK(e.struct_size == sizeof(moebius_event));
      if (e.type == MOEBIUS_EVENT_TOKEN && e.request == id) {
        tokens.push_back(e.token);
        CHECK(e.num_top == 3);
        CHECK(e.top_tokens[0] == e.token);
        CHECK(e.logprob == e.top_logprobs[0]);
        CHECK(e.finish_reason == (tokens.size() == 12 ? MOEBIUS_FINISH_LENGTH : MOEBIUS_FINISH_NONE));
      }
      if (e.type == MOEBIUS_EVENT_FINISHED) {
        ++finished;
        CHECK(e.finish_reason == (e.request == id ? MOEBIUS_FINISH_LENGTH : MOEBIUS_FINISH_ABORT));
      }
      if (e.type == MOEBIUS_EVENT_SWITCH_FINISHED) {
        ++switched;
        CHECK(e.bytes >= e.bytes_changed);
        CHECK(std::strlen(e.reason) > 0);
      }
    }
  }
  CHECK(finished == 2);
  CHECK(switched == 1);
  CHECK(tokens.size() == 12);
  CHECK(engine.take_logits(id).size() == (tokenizer.encode("ROMEO:").size() + 12 - 1) * 1024);
  CHECK_THROWS_AS(engine.take_logits(id), moebius_cpp::Error);
  CHECK_THROWS_AS(engine.cancel(id), moebius_cpp::Error);
  CHECK(engine.stats().seam == 0);
  CHECK(engine.stats().switches == 1);

  size_t needed = 0;
  CHECK(moebius_engine_metrics_text(engine.get(), nullptr, 0, &needed, nullptr) == MOEBIUS_OK);
  std::string text(needed, '?');
  CHECK(moebius_engine_metrics_text(engine.get(), text.data(), needed - 1, nullptr, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_engine_metrics_text(engine.get(), text.data(), needed, nullptr, nullptr) == MOEBIUS_OK);
  CHECK_THAT(text, Catch::Contains("moebius_generation_tokens_total{model_name=\"shakespeare-moe\",engine=\"0\"} "));
  CHECK(engine.metrics_text() == text.c_str());

  moebius_memory memory{};
  memory.struct_size = sizeof memory;
  CHECK(moebius_engine_memory(engine.get(), &memory, nullptr) == MOEBIUS_OK);
  CHECK(memory.lead_bytes > 0);
  CHECK(memory.lead_bytes <= memory.layer_bytes);  // at most one layer
  moebius_switch_estimate estimate{};
  estimate.struct_size = sizeof estimate;
  CHECK(moebius_engine_estimate_switch(engine.get(), MOEBIUS_LAYOUT_TP, &estimate, nullptr) == MOEBIUS_OK);
  CHECK(estimate.fits == 1);
  CHECK(estimate.bytes > 0);
  CHECK(moebius_engine_estimate_switch(engine.get(), 5, &estimate, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_engine_hold_seam(engine.get(), 7, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
}

TEST_CASE("with one rank a switch succeeds and moves nothing") {
  auto engine = small_engine(1);
  engine.request_switch(MOEBIUS_LAYOUT_EP);
  engine.step();
  std::vector<moebius_event> events;
  engine.poll(events);
  REQUIRE(events.size() == 2);
  CHECK(events[1].type == MOEBIUS_EVENT_SWITCH_FINISHED);
  CHECK(events[1].bytes == 0);
  CHECK(engine.stats().seam == 0);
}

TEST_CASE("text is streamed in whole characters and equals what is decoded at once") {
  const moebius_cpp::Tokenizer tokenizer(kModel);
  const std::string text = "naïve café — 日本 👩‍👩‍👧";
  const std::vector<int32_t> ids = tokenizer.encode(text);
  CHECK(tokenizer.decode(ids) == text);
  moebius_decoder* decoder = nullptr;
  REQUIRE(moebius_decoder_create(tokenizer.get(), &decoder, nullptr) == MOEBIUS_OK);
  std::string streamed;
  const char* piece = nullptr;
  size_t bytes = 0;
  for (int32_t id : ids) {
    REQUIRE(moebius_decoder_push(decoder, id, &piece, &bytes, nullptr) == MOEBIUS_OK);
    streamed.append(piece, bytes);
  }
  REQUIRE(moebius_decoder_finish(decoder, &piece, &bytes, nullptr) == MOEBIUS_OK);
  streamed.append(piece, bytes);
  CHECK(streamed == text);
  moebius_decoder_destroy(decoder);
}

TEST_CASE("an id outside the tokenizer's vocabulary is refused by name and leaves a decoder as it was") {
  const moebius_cpp::Tokenizer tokenizer(kModel);
  const std::vector<int32_t> ids = tokenizer.encode("日");
  REQUIRE(ids.size() == 3);
  for (int32_t id : {-1, 1 << 20, INT32_MIN, INT32_MAX}) {
    CHECK_THROWS_WITH(tokenizer.decode({ids[0], id}), Catch::Contains("id " + std::to_string(id) + " is outside"));
    moebius_decoder* decoder = nullptr;
    REQUIRE(moebius_decoder_create(tokenizer.get(), &decoder, nullptr) == MOEBIUS_OK);
    const char* piece = "untouched";
    size_t bytes = 0;
    std::string streamed;
    for (int32_t next : ids) {
      CHECK(moebius_decoder_push(decoder, id, &piece, &bytes, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
      REQUIRE(moebius_decoder_push(decoder, next, &piece, &bytes, nullptr) == MOEBIUS_OK);
      streamed.append(piece, bytes);
    }
    CHECK(streamed == "日");
    moebius_decoder_destroy(decoder);
  }
}

TEST_CASE("a step whose result struct is wrong is refused before it runs") {
  auto engine = small_engine(1);
  struct {
    moebius_step_result result;
    uint64_t future;
  } larger{};
  larger.result.struct_size = sizeof larger;
  larger.future = 1;
  CHECK(moebius_engine_step(engine.get(), &larger.result, nullptr) == MOEBIUS_E_UNSUPPORTED);
  larger.result.struct_size = 8;
  CHECK(moebius_engine_step(engine.get(), &larger.result, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(engine.stats().step == 0);
  larger = {};
  larger.result.struct_size = sizeof larger;
  CHECK(moebius_engine_step(engine.get(), &larger.result, nullptr) == MOEBIUS_OK);
  CHECK(engine.stats().step == 1);
}

TEST_CASE("logits are taken whole or not at all, also while the engine's own thread adds more") {
  const auto request = [] {
    moebius_cpp::Request r({1, 2, 3});
    r.set("id", "x").set("max_tokens", int64_t{300}).set("keep_logits", int64_t{1}).set("ignore_eos", int64_t{1});
    return r;
  };
  auto driven = small_engine(1);
  const uint64_t id = driven.submit(request());
  driven.step();
  std::vector<float> row(1024, -1.0f);
  size_t count = 0;
  CHECK(moebius_engine_take_logits(driven.get(), id, 0, row.data(), 1024, &count, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(count == 3 * 1024);
  CHECK(row == std::vector<float>(1024, -1.0f));
  while (driven.stats().running > 0) driven.step();
  const std::vector<float> expected = driven.take_logits(id);
  REQUIRE(expected.size() == (3 + 300 - 1) * 1024);

  auto own = small_engine(1);
  own.start();
  const uint64_t other = own.submit(request());
  std::vector<float> got;
  while (got.size() < expected.size()) {
    const std::vector<float> part = own.take_logits(other);
    got.insert(got.end(), part.begin(), part.end());
  }
  own.stop();
  CHECK(got == expected);
}

namespace {

using Change = std::function<void(moebius_cpp::Request&)>;

struct Result {
  std::map<int, std::vector<int32_t>> tokens;  // by sample
  int finish = MOEBIUS_FINISH_NONE;
  moebius_event last{};                        // token event
};

// Greedy unless changed, 24 tokens after a fixed prompt.
Result run(moebius_cpp::Engine& engine, const Change& change) {
  moebius_cpp::Request r({5, 6, 7});
  r.set("id", "x").set("max_tokens", int64_t{24}).set_real("temperature", 0);
  change(r);
  engine.submit(r);
  Result out;
  std::vector<moebius_event> events;
  while (engine.step().worked) {
    engine.poll(events);
    for (const moebius_event& e : events) {
      if (e.type == MOEBIUS_EVENT_TOKEN) out.tokens[e.sample].push_back(e.token), out.last = e;
      if (e.type == MOEBIUS_EVENT_FINISHED) out.finish = e.finish_reason;
    }
  }
  engine.poll(events);
  for (const moebius_event& e : events)
    if (e.type == MOEBIUS_EVENT_FINISHED) out.finish = e.finish_reason;
  return out;
}

Change hot(const Change& more = [](moebius_cpp::Request&) {}) {
  return [more](moebius_cpp::Request& r) { r.set_real("temperature", 1.5), more(r); };
}

}  // namespace

TEST_CASE("every sampling key has its effect", "[long]") {
  using R = moebius_cpp::Request;
  auto engine = small_engine(1);
  const std::vector<int32_t> greedy = run(engine, [](R&) {}).tokens[0];
  const std::vector<int32_t> sampled = run(engine, hot()).tokens[0];
  REQUIRE(greedy.size() == 24);
  REQUIRE(sampled != greedy);  // temperature
  CHECK(run(engine, hot()).tokens[0] == sampled);
  CHECK(run(engine, [](R& r) { r.set("max_tokens", int64_t{3}); }).tokens[0] == std::vector<int32_t>(greedy.begin(), greedy.begin() + 3));

  CHECK(run(engine, hot([](R& r) { r.set("top_k", int64_t{1}); })).tokens[0] == greedy);
  CHECK(run(engine, hot([](R& r) { r.set_real("top_p", 1e-6); })).tokens[0] == greedy);
  CHECK(run(engine, hot([](R& r) { r.set_real("min_p", 1); })).tokens[0] == greedy);
  CHECK(run(engine, hot([](R& r) { r.set("id", "y"); })).tokens[0] != sampled);
  const std::vector<int32_t> seeded = run(engine, hot([](R& r) { r.set("seed", int64_t{0}); })).tokens[0];
  CHECK(seeded != sampled);
  CHECK(run(engine, hot([](R& r) { r.set("seed", int64_t{0}).set("id", "y"); })).tokens[0] == seeded);
  CHECK(run(engine, hot([](R& r) { r.set("seed", int64_t{1}); })).tokens[0] != seeded);
  const Result three = run(engine, hot([](R& r) { r.set("n", int64_t{3}); }));
  CHECK(three.tokens.size() == 3);
  CHECK(three.tokens.at(0) != three.tokens.at(2));

  for (const char* key : {"presence_penalty", "frequency_penalty"}) {
    const Change penalty = [key](R& r) { r.set_real(key, 2).set("max_tokens", int64_t{200}).set("ignore_eos", int64_t{1}); };
    const Change none = [](R& r) { r.set("max_tokens", int64_t{200}).set("ignore_eos", int64_t{1}); };
    CHECK(run(engine, penalty).tokens[0] != run(engine, none).tokens[0]);
  }
  CHECK(run(engine, [](R& r) { r.set_real("repetition_penalty", 3).set("max_tokens", int64_t{100}); }).tokens[0] !=
        run(engine, [](R& r) { r.set("max_tokens", int64_t{100}); }).tokens[0]);

  const Result allowed = run(engine, hot([](R& r) { r.set_ids("allowed_token_ids", {40, 41}); }));
  for (int32_t t : allowed.tokens.at(0)) CHECK((t == 40 || t == 41));
  const Result biased = run(engine, [](R& r) { r.add_logit_bias(99, 100); });
  CHECK(biased.tokens.at(0) == std::vector<int32_t>(24, 99));

  const Result stopped = run(engine, [](R& r) { r.add_logit_bias(99, 100).set_ids("stop_token_ids", {98, 99}); });
  CHECK(stopped.finish == MOEBIUS_FINISH_STOP);
  CHECK(stopped.tokens.at(0) == std::vector<int32_t>{99});
  const Result later = run(engine, [](R& r) { r.add_logit_bias(99, 100).set_ids("stop_token_ids", {99}).set("min_tokens", int64_t{4}); });
  CHECK(later.tokens.at(0).size() == 5);
  const Result ended = run(engine, [](R& r) { r.add_logit_bias(kEndOfText, 100); });
  CHECK(ended.finish == MOEBIUS_FINISH_STOP);
  CHECK(ended.tokens.at(0).size() == 1);
  const Result on = run(engine, [](R& r) { r.add_logit_bias(kEndOfText, 100).set("ignore_eos", int64_t{1}); });
  CHECK(on.finish == MOEBIUS_FINISH_LENGTH);

  const moebius_event with = run(engine, [](R& r) { r.set("logprobs", int64_t{4}); }).last;
  CHECK(with.num_top == 4);
  CHECK(with.logprob < 0);
  CHECK(with.top_logprobs[0] >= with.top_logprobs[3]);
  CHECK(run(engine, [](R&) {}).last.num_top == 0);
}

TEST_CASE("priority, deadline_ms and keep_logits have their effect") {
  moebius_cpp::Config c;
  c.set("threads", int64_t{1}).set("kv_tokens", int64_t{4096}).set("max_batch", int64_t{1});
  moebius_cpp::Engine engine(kModel, c);
  const auto submit = [&](const char* key, int64_t value) {
    moebius_cpp::Request r({5, 6, 7});
    r.set("max_tokens", int64_t{4}).set("ignore_eos", int64_t{1}).set(key, value);
    return engine.submit(r);
  };
  const uint64_t later = submit("priority", 3), sooner = submit("priority", 1), late = submit("deadline_ms", 1), kept = submit("keep_logits", 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  std::vector<std::pair<uint64_t, int>> ends;
  std::vector<moebius_event> events;
  while (ends.size() < 4) {
    engine.step();
    engine.poll(events);
    for (const moebius_event& e : events)
      if (e.type == MOEBIUS_EVENT_FINISHED) ends.emplace_back(e.request, e.finish_reason);
  }
  CHECK(ends == std::vector<std::pair<uint64_t, int>>{{late, MOEBIUS_FINISH_ABORT}, {kept, MOEBIUS_FINISH_LENGTH}, {sooner, MOEBIUS_FINISH_LENGTH},
                                                      {later, MOEBIUS_FINISH_LENGTH}});
  CHECK(engine.take_logits(kept).size() == (3 + 4 - 1) * 1024);
  CHECK_THROWS_AS(engine.take_logits(sooner), moebius_cpp::Error);
}

// Three requests of 21 pages: TP's 80 pages hold them, EP's two homes of 40 do not.
TEST_CASE("the record of a switch that is asked for again is whole, down to the shortage that stands last") {
  moebius_cpp::Config c;
  c.set("ranks", int64_t{2}).set("threads", int64_t{1}).set("kv_tokens", int64_t{80 * 16}).set("policy", std::string("manual"));
  moebius_cpp::Engine engine(kModel, c);
  for (int i = 0; i < 3; ++i) {
    moebius_cpp::Request r(std::vector<int32_t>(330, 10 + i));
    r.set("max_tokens", int64_t{50}).set("ignore_eos", int64_t{1});
    engine.submit(r);
  }
  for (int i = 0; i < 4; ++i) engine.step();
  REQUIRE(engine.stats().running == 3);
  c.set("policy", "threshold").set("policy_variant", "rollout").set_real("policy_threshold", 2);
  engine.set_policy(c);
  engine.step();
  const moebius_cpp::Request small({5, 6, 7});
  for (int more : {12000, 10}) {  // the load moves by more than a quarter of the threshold, and its numbers are long
    for (int i = 0; i < more; ++i) engine.submit(small);
    engine.step();
  }
  CHECK(engine.stats().refusals == 3);
  std::vector<moebius_event> events;
  std::string record;
  for (engine.poll(events); !events.empty(); engine.poll(events))
    for (const moebius_event& e : events)
      if (e.type == MOEBIUS_EVENT_DECISION) record = e.reason;
  CHECK_THAT(record, Catch::Contains("which failed") && Catch::EndsWith("tokens short)"));
  CHECK(record.size() > 255);  // what a field of 256 would hold
}

TEST_CASE("the policy of a config, and one set later, decide") {
  moebius_cpp::Config c;
  c.set("ranks", int64_t{2}).set("threads", int64_t{1}).set("kv_tokens", int64_t{4096});
  moebius_cpp::Engine engine(kModel, c);
  moebius_cpp::Request r({5, 6, 7});
  r.set("max_tokens", int64_t{30}).set("ignore_eos", int64_t{1});
  engine.submit(r);
  for (int i = 0; i < 3; ++i) engine.step();
  CHECK(engine.stats().switches == 0);
  c.set("policy", "threshold").set("policy_variant", "rollout").set_real("policy_threshold", 1).set_real("policy_cooldown_s", 0);
  c.set("policy_window_steps", int64_t{2});
  engine.set_policy(c);
  for (int i = 0; i < 3; ++i) engine.step();
  CHECK(engine.stats().switches == 1);
  std::vector<moebius_event> events;
  engine.poll(events);
  int decisions = 0;
  for (const moebius_event& e : events)
    if (e.type == MOEBIUS_EVENT_DECISION) {
      ++decisions;
      CHECK(e.to == MOEBIUS_LAYOUT_EP);
      CHECK_THAT(std::string(e.reason), Catch::Contains("rollout") && Catch::Contains("over 2 steps"));
    }
  CHECK(decisions == 1);

  moebius_cpp::Engine from_config(kModel, c);
  from_config.submit(r);
  for (int i = 0; i < 3; ++i) from_config.step();
  CHECK(from_config.stats().switches == 1);
}

TEST_CASE("the engine's own thread serves two hosts that submit, cancel and poll, and holds a seam under a stall budget") {
  auto engine = small_engine();
  engine.set_stall_budget(0.001);
  CHECK(moebius_engine_set_stall_budget(engine.get(), -1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  REQUIRE(moebius_engine_start(engine.get(), nullptr) == MOEBIUS_OK);
  CHECK(moebius_engine_start(engine.get(), nullptr) == MOEBIUS_E_INVALID_STATE);
  constexpr int kEach = 8;
  std::atomic<int> finished{0}, aborted{0}, seams{0};
  std::atomic<bool> failed{false};
  const auto host = [&] {
    try {
      std::vector<moebius_event> events;
      for (int i = 0; i < kEach; ++i) {
        moebius_cpp::Request r({1 + i, 2, 3});
        r.set("max_tokens", int64_t{i % 4 == 3 ? 1500 : 20}).set("ignore_eos", int64_t{1});
        const uint64_t id = engine.submit(r);
        if (i % 4 == 3) engine.cancel(id);
        if (i == 2) engine.hold_seam(3);
      }
      const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      while (finished < 2 * kEach && std::chrono::steady_clock::now() < until) {
        engine.poll(events, 20);
        for (const moebius_event& e : events) {
          finished += e.type == MOEBIUS_EVENT_FINISHED;
          aborted += e.type == MOEBIUS_EVENT_FINISHED && e.finish_reason == MOEBIUS_FINISH_ABORT;
          seams += e.type == MOEBIUS_EVENT_SEAM;
        }
      }
    } catch (const std::exception&) {
      failed = true;
    }
  };
  std::thread one(host), two(host);
  one.join(), two.join();
  REQUIRE(moebius_engine_stop(engine.get(), nullptr) == MOEBIUS_OK);
  CHECK(moebius_engine_stop(engine.get(), nullptr) == MOEBIUS_OK);
  CHECK_FALSE(failed);
  CHECK(finished == 2 * kEach);
  CHECK(aborted == 4);
  for (int i = 0; i < 200 && engine.stats().switching; ++i) engine.step();  // the host drives it again
  CHECK(engine.stats().seam == 3);
}

TEST_CASE("who waits for an event as long as it takes is woken by stop, and waits again after start or a step") {
  auto engine = small_engine();
  const auto events_of_wait = [&] {
    moebius_event event;
    size_t count = 9;
    moebius_engine_poll(engine.get(), &event, 1, sizeof event, INFINITY, &count, nullptr);
    return count;
  };
  const auto wait_until_none = [&] {
    while (events_of_wait() > 0) {
    }
  };
  for (const bool own_thread : {true, false}) {
    if (own_thread) REQUIRE(moebius_engine_start(engine.get(), nullptr) == MOEBIUS_OK);
    else engine.step();
    std::thread waits(wait_until_none);
    moebius_cpp::Request r({1, 2, 3});
    r.set("max_tokens", int64_t{4}).set("ignore_eos", int64_t{1});
    const uint64_t id = engine.submit(r);
    if (own_thread) REQUIRE(moebius_engine_drain(engine.get(), 60e3, nullptr) == MOEBIUS_OK);
    else
      while (engine.stats().running + engine.stats().waiting > 0) engine.step();
    CHECK(moebius_engine_cancel(engine.get(), id, nullptr) == MOEBIUS_E_NOT_FOUND);
    REQUIRE(moebius_engine_stop(engine.get(), nullptr) == MOEBIUS_OK);
    waits.join();
    CHECK(events_of_wait() == 0);  // whoever comes later waits for nothing
    REQUIRE(moebius_engine_resume(engine.get(), nullptr) == MOEBIUS_OK);
  }
}

TEST_CASE("a descriptor is readable while events wait: a host sleeps until then") {
  auto engine = small_engine();
  const int fd = engine.event_fd();
  CHECK(engine.event_fd() == fd);
  const auto readable = [&](int timeout_ms) {
    pollfd p{fd, POLLIN, 0};
    return ::poll(&p, 1, timeout_ms) == 1;
  };
  CHECK_FALSE(readable(0));
  engine.start();
  moebius_cpp::Request r(std::vector<int32_t>{1, 2, 3});
  r.set("max_tokens", int64_t{40}).set("ignore_eos", int64_t{1});
  const uint64_t id = engine.submit(r);
  int tokens = 0, wakes = 0;
  bool finished = false;
  while (!finished) {
    REQUIRE(readable(10000));
    ++wakes;
    moebius_event one;  // fewer than wait: it stays readable
    size_t count = 0;
    REQUIRE(moebius_engine_poll(engine.get(), &one, 1, sizeof one, 0, &count, nullptr) == MOEBIUS_OK);
    REQUIRE(count == 1);
    tokens += one.type == MOEBIUS_EVENT_TOKEN && one.request == id;
    finished = one.type == MOEBIUS_EVENT_FINISHED;
  }
  CHECK(tokens == 40);
  CHECK(wakes >= 41);
  CHECK_FALSE(readable(0));
}

TEST_CASE("a model's files may lie in memory, or behind the host's reader, and give the same tokens") {
  const auto file = [](const char* name) {
    std::ifstream in(kModel + "/" + name, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  static const std::map<std::string, std::string> files = {
      {"config.json", file("config.json")}, {"model.safetensors", file("model.safetensors")}, {"tokenizer.json", file("tokenizer.json")}};
  moebius_cpp::Config c;
  c.set("threads", int64_t{1}).set("kv_tokens", int64_t{1024});
  const auto tokens_of = [](moebius_cpp::Engine engine) {
    moebius_cpp::Request r({52, 49, 47});
    engine.submit(r.set("temperature", int64_t{0}).set("max_tokens", int64_t{8}));
    std::vector<int32_t> out;
    std::vector<moebius_event> events;
    while (engine.step().worked)
      for (engine.poll(events); const auto& e : events)
        if (e.type == MOEBIUS_EVENT_TOKEN) out.push_back(e.token);
    return out;
  };
  const std::vector<int32_t> expected = tokens_of(moebius_cpp::Engine(kModel, c));
  REQUIRE(expected.size() == 8);

  moebius_cpp::Source memory("in memory");
  for (const auto& [name, text] : files) memory.add(name, text.data(), text.size());
  CHECK(tokens_of(moebius_cpp::Engine(memory, c)) == expected);
  CHECK(moebius_cpp::Tokenizer(memory).encode("ROMEO:") == moebius_cpp::Tokenizer(kModel).encode("ROMEO:"));

  moebius_cpp::Source reader("behind a reader");
  static bool broken = false;
  const moebius_size_fn size = [](void*, const char* name) -> int64_t {
    const auto it = files.find(name);
    return it == files.end() ? -1 : static_cast<int64_t>(it->second.size());
  };
  const moebius_read_fn read = [](void*, const char* name, uint64_t offset, void* out, size_t bytes) -> int32_t {
    std::memcpy(out, files.at(name).data() + offset, bytes);
    return broken && bytes > 4096 ? 5 : 0;
  };
  REQUIRE(moebius_source_set_reader(reader.get(), size, read, nullptr, nullptr) == MOEBIUS_OK);
  CHECK(tokens_of(moebius_cpp::Engine(reader, c)) == expected);
  broken = true;
  moebius_engine* none = nullptr;
  Message m;
  CHECK(moebius_engine_create_from(reader.get(), c.get(), &none, &m.error) == MOEBIUS_E_IO);
  CHECK_THAT(m.text(), Catch::Contains("behind a reader/") && Catch::Contains("reader says 5"));
  Message missing;
  CHECK(moebius_engine_create_from(moebius_cpp::Source("nothing").get(), c.get(), &none, &missing.error) == MOEBIUS_E_NOT_FOUND);
  CHECK_THAT(missing.text(), Catch::Contains("nothing/config.json"));
}

TEST_CASE("a host sees the library's log, its threads, and gives it memory") {
  struct Host {
    std::mutex mutex;
    std::vector<std::string> lines;
    int starting = 0, ending = 0;
    std::atomic<int> blocks{0};  // several threads allocate at once
    std::atomic<size_t> bytes{0};
  } host;
  moebius_cpp::Config c;
  c.set("ranks", int64_t{2}).set("threads", int64_t{2}).set("kv_tokens", int64_t{1024});
  moebius_config_set_log(c.get(), [](void* user, int32_t level, const char* category, const char* message) {
    auto& h = *static_cast<Host*>(user);
    std::lock_guard lock(h.mutex);
    h.lines.push_back(std::to_string(level) + " " + category + " " + message);
  }, &host, nullptr);
  moebius_config_set_thread_hook(c.get(), [](void* user, int32_t rank, int32_t thread, int32_t starting) {
    auto& h = *static_cast<Host*>(user);
    std::lock_guard lock(h.mutex);
    ++(starting != 0 ? h.starting : h.ending);
    if (rank < 0 ? thread != -1 : (rank > 1 || thread < 0 || thread > 1)) h.lines.push_back("impossible thread");
  }, &host, nullptr);
  moebius_config_set_allocator(
      c.get(),
      [](void* user, size_t size, size_t alignment) {
        auto& h = *static_cast<Host*>(user);
        ++h.blocks;
        h.bytes += size;
        void* memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
        std::memset(memory, 0x5a, size);  // the library does not count on zeros
        return memory;
      },
      [](void* user, void* memory, size_t size) {
        auto& h = *static_cast<Host*>(user);
        --h.blocks;
        h.bytes -= size;
        std::free(memory);
      },
      &host, nullptr);
  {
    moebius_cpp::Engine engine(kModel, c);
    CHECK(host.blocks > 0);
    CHECK(host.bytes > 0);
    engine.start();
    engine.submit(moebius_cpp::Request({1, 2, 3}));
    engine.request_switch(MOEBIUS_LAYOUT_EP);
    moebius_cpp::check([&](moebius_error** e) { return moebius_engine_drain(engine.get(), 20000, e); });
    while (engine.stats().switches == 0) std::this_thread::yield();
  }
  CHECK(host.starting == 4);  // three that compute beside the caller's, and the engine's own
  CHECK(host.ending == host.starting);
  CHECK(host.blocks == 0);
  CHECK(host.bytes == 0);
  std::string all;
  for (const std::string& line : host.lines) all += line + "\n";
  CHECK_THAT(all, Catch::Contains("2 load ") && Catch::Contains("qwen3_moe on 2 ranks of cpu"));
  CHECK_THAT(all, Catch::Contains("2 switch finished: tp to ep, seam 0, "));
  CHECK_THAT(all, !Catch::Contains("impossible"));

  moebius_config_set_allocator(c.get(), [](void*, size_t, size_t) -> void* { return nullptr; }, [](void*, void*, size_t) {}, nullptr, nullptr);
  moebius_engine* none = nullptr;
  CHECK(moebius_engine_create(kModel.c_str(), c.get(), &none, nullptr) == MOEBIUS_E_OUT_OF_MEMORY);
}

TEST_CASE("many requests are queued at once or not at all; their events carry the host's number, usage and times") {
  moebius_cpp::Engine engine = small_engine();
  std::vector<moebius_cpp::Request> requests;
  for (uint64_t i = 0; i < 3; ++i) {
    requests.emplace_back(std::vector<int32_t>(20, 7));
    requests.back().set("max_tokens", int64_t{2} + static_cast<int64_t>(i)).set("ignore_eos", int64_t{1});
    moebius_request_set_user_data(requests.back().get(), 1000 + i, nullptr);
  }
  const moebius_request* list[] = {requests[0].get(), requests[1].get(), requests[2].get()};
  uint64_t ids[3] = {};
  REQUIRE(moebius_engine_submit_many(engine.get(), list, 3, ids, nullptr) == MOEBIUS_OK);
  CHECK(ids[1] == ids[0] + 1);
  const moebius_cpp::Request empty({});
  const moebius_request* bad[] = {requests[0].get(), empty.get()};
  uint64_t untouched[2] = {77, 77};
  CHECK(moebius_engine_submit_many(engine.get(), bad, 2, untouched, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(untouched[0] == 77);
  CHECK(engine.stats().waiting == 3);
  bad[1] = nullptr;
  CHECK(moebius_engine_submit_many(engine.get(), bad, 2, untouched, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_engine_submit_many(engine.get(), nullptr, 0, nullptr, nullptr) == MOEBIUS_OK);

  std::vector<moebius_event> events;
  std::map<uint64_t, moebius_event> ends;
  while (engine.step().worked)
    for (engine.poll(events); const auto& e : events) {
      if (e.request != 0) CHECK(e.user_data == 1000 + (e.request - ids[0]));
      if (e.type == MOEBIUS_EVENT_FINISHED) ends[e.request] = e;
    }
  REQUIRE(ends.size() == 3);
  for (int i = 0; i < 3; ++i) {
    const moebius_event& e = ends[ids[i]];
    CHECK(e.prompt_tokens == 20);
    CHECK(e.generated_tokens == 2 + i);
    CHECK(e.preemptions == 0);
    CHECK(e.queued_ns > 0);
    CHECK(e.queued_ns <= e.scheduled_ns);
    CHECK(e.scheduled_ns < e.first_token_ns);
    CHECK(e.first_token_ns <= e.time_ns);
  }
  const uint64_t again = engine.submit(requests[0]);  // its first page is in the prefix cache
  while (engine.step().worked)
    for (engine.poll(events); const auto& e : events)
      if (e.type == MOEBIUS_EVENT_FINISHED && e.request == again) CHECK(e.cached_tokens == 16);
}

TEST_CASE("one sample of a request can be cancelled, and the others go on") {
  moebius_cpp::Engine engine = small_engine();
  moebius_cpp::Request r({1, 2, 3});
  r.set("n", int64_t{3}).set("max_tokens", int64_t{6}).set("ignore_eos", int64_t{1}).set("seed", int64_t{5});
  const uint64_t id = engine.submit(r);
  std::vector<moebius_event> events;
  std::map<int32_t, int> tokens;
  std::map<int32_t, int32_t> ends;
  int steps = 0, cancelled = 0;
  while (engine.step().worked) {
    if (++steps == 2) engine.cancel(id, 1);
    for (engine.poll(events); const auto& e : events) {
      tokens[e.sample] += e.type == MOEBIUS_EVENT_TOKEN;
      if (e.type == MOEBIUS_EVENT_FINISHED) ends[e.sample] = e.finish_reason;
      if (e.type == MOEBIUS_EVENT_CANCELLED) {
        ++cancelled;
        CHECK(e.sample == 1);
        engine.cancel(id, 1);  // once more: it has ended, which is no event
      }
    }
  }
  CHECK(cancelled == 1);
  CHECK(tokens[0] == 6);
  CHECK(tokens[2] == 6);
  CHECK(tokens[1] < 6);
  CHECK(ends == std::map<int32_t, int32_t>{{0, MOEBIUS_FINISH_LENGTH}, {1, MOEBIUS_FINISH_ABORT}, {2, MOEBIUS_FINISH_LENGTH}});
  CHECK(moebius_engine_cancel_sample(engine.get(), id, 1, nullptr) == MOEBIUS_E_NOT_FOUND);
  const uint64_t next = engine.submit(r);
  CHECK(moebius_engine_cancel_sample(engine.get(), next, 3, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_engine_cancel_sample(engine.get(), next, -1, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
}

TEST_CASE("a cancel names a sample that goes on, and each sample ends once") {
  moebius_cpp::Engine engine = small_engine();
  moebius_cpp::Request r({1, 2, 3});
  r.set("n", int64_t{2}).set("max_tokens", int64_t{50}).set("ignore_eos", int64_t{1});
  const uint64_t id = engine.submit(r);
  std::vector<std::pair<int32_t, int32_t>> seen;  // event, sample
  std::vector<moebius_event> events;
  for (int step = 0; step < 4; ++step) {
    if (step == 1) engine.cancel(id, 0);
    if (step == 2) engine.cancel(id);
    engine.step();
    for (engine.poll(events); const auto& e : events)
      if (e.type == MOEBIUS_EVENT_CANCELLED || e.type == MOEBIUS_EVENT_FINISHED) seen.emplace_back(e.type, e.sample);
  }
  CHECK(seen == std::vector<std::pair<int32_t, int32_t>>{
                    {MOEBIUS_EVENT_CANCELLED, 0}, {MOEBIUS_EVENT_FINISHED, 0}, {MOEBIUS_EVENT_CANCELLED, 1}, {MOEBIUS_EVENT_FINISHED, 1}});
}

TEST_CASE("what a cancelled request keeps can be taken, or is given back by cancelling it once more") {
  moebius_cpp::Engine engine = small_engine();
  moebius_cpp::Request r({1, 2, 3});
  r.set("max_tokens", int64_t{50}).set("ignore_eos", int64_t{1}).set("keep_logits", int64_t{1});
  const uint64_t taken = engine.submit(r), forgotten = engine.submit(r);
  engine.step();
  for (uint64_t id : {taken, forgotten}) engine.cancel(id);
  engine.step();
  CHECK(moebius_engine_cancel_sample(engine.get(), forgotten, 0, nullptr) == MOEBIUS_E_NOT_FOUND);
  CHECK(moebius_engine_cancel(engine.get(), forgotten, nullptr) == MOEBIUS_OK);
  engine.step();
  CHECK(engine.take_logits(taken).size() > 0);
  CHECK_THROWS_AS(engine.take_logits(forgotten), moebius_cpp::Error);
  for (uint64_t id : {taken, forgotten}) CHECK(moebius_engine_cancel(engine.get(), id, nullptr) == MOEBIUS_E_NOT_FOUND);
}

TEST_CASE("a drain ends when nothing runs, although the engine was resumed meanwhile") {
  moebius_cpp::Engine engine = small_engine();
  moebius_cpp::Request r({1, 2, 3});
  r.set("max_tokens", int64_t{200}).set("ignore_eos", int64_t{1});
  engine.submit(r);
  engine.start();
  std::thread other([&] { moebius_engine_resume(engine.get(), nullptr); });
  CHECK(moebius_engine_drain(engine.get(), INFINITY, nullptr) == MOEBIUS_OK);
  other.join();
  engine.stop();
}

TEST_CASE("a drain waits for the switch under way too: an update may follow") {
  moebius_cpp::Config c;
  c.set("ranks", int64_t{2}).set("threads", int64_t{1}).set("kv_tokens", int64_t{4096}).set("stall_budget_ms", 1e-6).set("policy", "manual");
  moebius_cpp::Engine engine(kModel, c);
  engine.request_switch(MOEBIUS_LAYOUT_EP);
  Message m;
  CHECK(moebius_engine_drain(engine.get(), 0, nullptr) == MOEBIUS_E_TIMEOUT);
  engine.step();
  CHECK(moebius_engine_drain(engine.get(), 0, &m.error) == MOEBIUS_E_TIMEOUT);
  CHECK_THAT(m.text(), Catch::Contains("a switch is under way"));
  engine.start();
  CHECK(moebius_engine_drain(engine.get(), 60000, nullptr) == MOEBIUS_OK);
  CHECK(moebius_engine_update_weights(engine.get(), kModel.c_str(), nullptr) == MOEBIUS_OK);
  engine.stop();
}

TEST_CASE("an engine that drains takes nothing new, ends what it has, and can be resumed") {
  moebius_cpp::Engine engine = small_engine();
  moebius_cpp::Request r({1, 2, 3});
  r.set("max_tokens", int64_t{5}).set("ignore_eos", int64_t{1});
  engine.submit(r);
  Message m;
  CHECK(moebius_engine_drain(engine.get(), 0, &m.error) == MOEBIUS_E_TIMEOUT);
  CHECK_THAT(m.text(), Catch::Contains("0 requests run and 1 wait"));
  CHECK(moebius_engine_submit(engine.get(), r.get(), nullptr, nullptr) == MOEBIUS_E_INVALID_STATE);
  CHECK(moebius_engine_check(engine.get(), r.get(), nullptr) == MOEBIUS_E_INVALID_STATE);
  std::thread host([&] {
    while (engine.step().worked) {
    }
  });
  CHECK(moebius_engine_drain(engine.get(), 20000, nullptr) == MOEBIUS_OK);
  host.join();
  CHECK(engine.stats().generation_tokens == 5);
  CHECK(moebius_engine_resume(engine.get(), nullptr) == MOEBIUS_OK);
  CHECK(moebius_engine_submit(engine.get(), r.get(), nullptr, nullptr) == MOEBIUS_OK);
}

TEST_CASE("the experts of every position can be had, and are the same in every layout") {
  const std::vector<int32_t> prompt = {52, 49, 47, 300, 12, 9, 411, 77, 5, 18, 200, 31, 64, 8, 99, 101, 7, 6, 5};
  const auto routes_of = [&](int ranks, int32_t seam, int64_t chunk) {
    moebius_cpp::Config c;
    c.set("ranks", int64_t{ranks}).set("threads", int64_t{1}).set("kv_tokens", int64_t{1024}).set("chunk_tokens", chunk);
    moebius_cpp::Engine engine(kModel, c);
    engine.hold_seam(seam);
    moebius_cpp::Request r(prompt), other({3, 4, 5});
    const uint64_t first = engine.submit(other.set("max_tokens", int64_t{9}));
    const uint64_t id = engine.submit(r.set("max_tokens", int64_t{6}).set("temperature", int64_t{0}).set("ignore_eos", int64_t{1}).set("routed_experts", int64_t{1}));
    while (engine.step().worked) {
    }
    CHECK(moebius_engine_take_routes(engine.get(), first, 0, nullptr, 0, nullptr, nullptr) == MOEBIUS_E_NOT_FOUND);
    size_t count = 0;
    CHECK(moebius_engine_take_routes(engine.get(), id, 0, nullptr, 0, &count, nullptr) == MOEBIUS_OK);
    std::vector<int16_t> out(count);
    CHECK(moebius_engine_take_routes(engine.get(), id, 0, out.data(), count - 1, &count, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
    CHECK(moebius_engine_take_routes(engine.get(), id, 0, out.data(), count, &count, nullptr) == MOEBIUS_OK);
    CHECK(moebius_engine_take_routes(engine.get(), id, 0, nullptr, 0, nullptr, nullptr) == MOEBIUS_E_NOT_FOUND);  // taken
    return out;
  };
  const moebius_model_info info = small_engine(1).model();
  const std::vector<int16_t> expected = routes_of(1, 0, 512);
  const size_t row = static_cast<size_t>(info.num_layers * info.top_k);
  REQUIRE(expected.size() == (prompt.size() + 5) * row);  // the last token is never fed
  std::vector<int> hits(static_cast<size_t>(info.num_experts));
  for (size_t i = 0; i < expected.size(); i += static_cast<size_t>(info.top_k)) {
    const std::set<int16_t> chosen(expected.begin() + static_cast<int64_t>(i), expected.begin() + static_cast<int64_t>(i) + info.top_k);
    CHECK(chosen.size() == static_cast<size_t>(info.top_k));
    for (int16_t e : chosen) ++hits.at(static_cast<size_t>(e));
  }
  CHECK(std::count(hits.begin(), hits.end(), 0) < info.num_experts / 2);
  CHECK(routes_of(2, info.num_layers, 512) == expected);
  CHECK(routes_of(2, 0, 7) == expected);
  CHECK(routes_of(4, 3, 3) == expected);
}

TEST_CASE("what can never be, and lengths that are mistakes, are refused at once") {
  moebius_cpp::Config c;
  c.set("threads", int64_t{1}).set("kv_tokens", int64_t{1024}).set("max_queue", int64_t{2});
  moebius_cpp::Engine engine(kModel, c);
  moebius_cpp::Request r({1, 2, 3});
  r.set("n", int64_t{3});
  CHECK(moebius_engine_submit(engine.get(), r.get(), nullptr, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_engine_check(engine.get(), r.get(), nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  r.set("n", int64_t{1});
  const moebius_request* list[] = {r.get(), r.get(), r.get()};
  uint64_t ids[3] = {};
  CHECK(moebius_engine_submit_many(engine.get(), list, 3, ids, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  const int32_t id = 1;
  for (size_t length : {size_t{1} << 62, SIZE_MAX / 4 + 2, SIZE_MAX}) {
    CHECK(moebius_request_set_prompt(r.get(), &id, length, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
    CHECK(moebius_request_set_ids(r.get(), "stop_token_ids", &id, length, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
    CHECK(moebius_engine_submit_many(engine.get(), list, length, ids, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  }
  engine.submit(r);
  engine.step();
  moebius_event event;
  size_t count = 7;
  for (size_t stride : {size_t{8}, size_t{1} << 17, size_t{1} << 32, SIZE_MAX})
    CHECK(moebius_engine_poll(engine.get(), &event, 1, stride, 0, &count, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(moebius_engine_poll(engine.get(), &event, 1, sizeof event, 0, &count, nullptr) == MOEBIUS_OK);
  CHECK((count == 1 && event.type == MOEBIUS_EVENT_ARRIVED));  // none was taken by the calls that were refused
  moebius_cpp::Source tensors("tensors");
  const int64_t shape = 1;
  for (size_t dims : {size_t{1} << 61, SIZE_MAX})
    CHECK(moebius_source_add_tensor(tensors.get(), "a", "F32", &shape, dims, &id, 4, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  engine.start();
  CHECK(moebius_engine_step(engine.get(), nullptr, nullptr) == MOEBIUS_E_INVALID_STATE);
  std::thread other([&] { moebius_engine_stop(engine.get(), nullptr); });
  moebius_engine_stop(engine.get(), nullptr);
  other.join();
  CHECK(moebius_engine_step(engine.get(), nullptr, nullptr) == MOEBIUS_OK);

  moebius_cpp::Source broken("broken");
  moebius_source_set_reader(broken.get(), [](void*, const char*) -> int64_t { return -5; },
                            [](void*, const char*, uint64_t, void*, size_t) -> int32_t { return 0; }, nullptr, nullptr);
  moebius_engine* none = nullptr;
  Message m;
  CHECK(moebius_engine_create_from(broken.get(), nullptr, &none, &m.error) == MOEBIUS_E_IO);
  CHECK_THAT(m.text(), Catch::Contains("says -5 when asked for its size"));
}

TEST_CASE("the library tells what it is and has") {
  CHECK(moebius_has_feature("cpu") == 1);
  CHECK(moebius_has_feature("portable") == 1);
  CHECK(moebius_has_feature("warp drive") == 0);
  CHECK(moebius_has_feature(nullptr) == 0);
  CHECK_THAT(moebius_build_info(), Catch::Contains("\"version\": \"0.") && Catch::Contains("\"portable\"") && Catch::Contains("\"cpu\""));
  CHECK(moebius_struct_size("moebius_event") == sizeof(moebius_event));
  CHECK(moebius_struct_size("moebius_stats") == sizeof(moebius_stats));
  CHECK(moebius_struct_size("no such") == 0);
}

TEST_CASE("on failure no out-parameter is touched but a needed size") {
  auto engine = small_engine(1);
  moebius_engine* e = engine.get();
  const moebius_cpp::Tokenizer tokenizer(kModel);
  const moebius_cpp::Request empty({});
  // Memory that a failing call gets as every out-parameter; the needed size is elsewhere.
  alignas(16) unsigned char bytes[sizeof(moebius_event)];
  const auto as = [&](auto* null) { return reinterpret_cast<decltype(null)>(bytes); };
  size_t needed = 12345;
  moebius_engine** out_engine = nullptr;
  moebius_tokenizer** out_tokenizer = nullptr;
  moebius_decoder** out_decoder = nullptr;
  const char** text = nullptr;
  const int32_t ids[] = {300, 301, 302};
  struct Call {
    const char* name;
    std::function<moebius_status()> run;
    bool sets_needed = false;
  };
  const auto sized = [&](auto* null, uint32_t size) {
    auto* out = as(null);
    std::memcpy(bytes, &size, sizeof size);
    return out;
  };
  const std::vector<Call> calls = {
      {"engine_create", [&] { return moebius_engine_create("/no/such", nullptr, as(out_engine), nullptr); }},
      {"config_key", [&] { return moebius_config_key(9999, as(text), as(text), as(text), as(text), as(text), nullptr); }},
      {"engine_submit", [&] { return moebius_engine_submit(e, empty.get(), as((uint64_t*)nullptr), nullptr); }},
      {"engine_model", [&] { return moebius_engine_model(e, sized((moebius_model_info*)nullptr, 4), nullptr); }},
      {"engine_step", [&] { return moebius_engine_step(e, sized((moebius_step_result*)nullptr, 4), nullptr); }},
      {"engine_event_fd", [&] { return moebius_engine_event_fd(nullptr, as((int32_t*)nullptr), nullptr); }},
      {"engine_poll", [&] { return moebius_engine_poll(e, as((moebius_event*)nullptr), 1, 8, 0, &needed, nullptr); }},
      {"engine_estimate_switch", [&] { return moebius_engine_estimate_switch(e, 0, sized((moebius_switch_estimate*)nullptr, 4), nullptr); }},
      {"engine_estimate_switch", [&] { return moebius_engine_estimate_switch(e, 9, as((moebius_switch_estimate*)nullptr), nullptr); }},
      {"engine_stats", [&] { return moebius_engine_stats(e, sized((moebius_stats*)nullptr, 4), nullptr); }},
      {"engine_memory", [&] { return moebius_engine_memory(e, sized((moebius_memory*)nullptr, 4), nullptr); }},
      {"engine_metrics_text", [&] { return moebius_engine_metrics_text(e, as((char*)nullptr), 3, &needed, nullptr); }, true},
      {"engine_take_logits", [&] { return moebius_engine_take_logits(e, 77, 0, as((float*)nullptr), 9, &needed, nullptr); }},
      {"tokenizer_load", [&] { return moebius_tokenizer_load("/no/such", as(out_tokenizer), nullptr); }},
      {"tokenizer_encode", [&] { return moebius_tokenizer_encode(tokenizer.get(), "What say you", 12, 1, as((int32_t*)nullptr), 1, &needed, nullptr); }, true},
      {"tokenizer_decode", [&] { return moebius_tokenizer_decode(tokenizer.get(), ids, 3, 0, as((char*)nullptr), 1, &needed, nullptr); }, true},
      {"decoder_create", [&] { return moebius_decoder_create(nullptr, as(out_decoder), nullptr); }},
      {"decoder_push", [&] { return moebius_decoder_push(nullptr, 1, as(text), as((size_t*)nullptr), nullptr); }},
      {"decoder_finish", [&] { return moebius_decoder_finish(nullptr, as(text), as((size_t*)nullptr), nullptr); }},
  };
  for (const Call& call : calls) {
    INFO(call.name);
    std::memset(bytes, 0xab, sizeof bytes);
    needed = 12345;
    CHECK(call.run() < 0);
    CHECK((needed != 12345) == call.sets_needed);
    for (size_t i = sizeof(uint32_t); i < sizeof bytes; ++i)
      if (bytes[i] != 0xab) FAIL_CHECK("byte " << i << " was written");
  }
}
