// New weights for an engine that runs: what it then holds and computes is what a fresh engine made of them does.
#include <atomic>
#include <thread>

#include "tests/unit/engine/harness.h"
#include "tests/unit/engine/model_copy.h"

namespace moebius::test {
namespace {

using Catch::Matchers::Contains;

struct Changed : ModelCopy {
  explicit Changed(const std::string& model) : ModelCopy(model) { change_all(); }
  Changed(const std::string& model, const Choice& chosen) : ModelCopy(model) { change_all(chosen); }
};

// One of so many parts of a checkpoint, which divide layers and experts anyhow.
ModelCopy::Choice part(uint32_t which, uint32_t of) {
  return [=](const std::string& tensor) {
    uint32_t sum = 0;
    for (char c : tensor) sum = sum * 31 + static_cast<unsigned char>(c);
    return (sum >> 4) % of == which;
  };
}

// All that an engine has of its weights, in its present layout.
struct Weights {
  std::vector<std::byte> slices, shared;
  std::vector<std::array<float, 3>> scales;  // [rank, layout, layer] value, attention, mlp
  friend bool operator==(const Weights&, const Weights&) = default;
};

Weights weights_of(Engine& engine) {
  const ModelStore& store = engine.impl().store();
  Weights out{weight_bytes(engine), {}, {}};
  for (int r = 0; r < engine.impl().world().ranks(); ++r) {
    const std::vector<std::byte> shared = bytes_at(engine, r, store.forward(r).lm_head, store.shared_bytes());  // first of what is replicated
    out.shared.insert(out.shared.end(), shared.begin(), shared.end());
    for (const auto& table : store.tables(r))
      for (const LayerWeights& w : table) out.scales.push_back({w.value_scale, w.attention_scale, w.mlp_scale});
  }
  return out;
}

void hold(Engine& engine, int32_t seam) {
  engine.hold_seam(seam);
  engine.step();
  REQUIRE(engine.stats().seam == seam);
}

Outcome serve(Engine& engine) { return Runner(engine, true).run(busy_script()); }

// A checkpoint whose n-th read fails, or does something first.
class WatchedFiles final : public ModelFiles {
 public:
  WatchedFiles(const std::string& model, std::function<void(int64_t read)> watch) : files_(model), watch_(std::move(watch)) {}
  std::string name() const override { return files_.name(); }
  std::string label() const override { return files_.label(); }
  bool has(const std::string& file) const override { return files_.has(file); }
  std::unique_ptr<ModelFile> open(const std::string& file) const override {
    struct Watched final : ModelFile {
      Watched(std::unique_ptr<ModelFile> file, const WatchedFiles& all)
          : ModelFile(file->name(), file->size()), inner(std::move(file)), files(all) {}
      void read(uint64_t offset, void* out, size_t bytes) const override {
        files.watch_(files.reads_++);
        inner->read(offset, out, bytes);
      }
      std::unique_ptr<ModelFile> inner;
      const WatchedFiles& files;
    };
    return std::make_unique<Watched>(files_.open(file), *this);
  }
  int64_t reads() const { return reads_; }

 private:
  FolderFiles files_;
  std::function<void(int64_t)> watch_;
  mutable std::atomic<int64_t> reads_{0};
};

template <class F>
Error error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e;
  }
  FAIL("nothing was refused");
  throw;  // not reached
}

}  // namespace

TEST_CASE("after an update weights, scales and logits are those of a fresh engine, at either end, at a seam inside, and after a switch") {
  int64_t turn = 0;
  for (const std::string& model : {kQwen, kDense, kMixtral, kQwen2, kGlm, kGranite}) {
    const Changed changed(model);
    const Outcome before = run_script(model, small_config(1, 1, Layout::kTp), busy_script());
    const Outcome expected = run_script(changed.path(), small_config(1, 1, Layout::kTp), busy_script());
    REQUIRE(difference(before, expected) != "");
    for (int ranks : {1, 2, 3, 4})
      for (int32_t seam : {0, 2, -1}) {
        if ((ranks == 1 && seam == 2) || turn++ % kSweep != 0) continue;
        INFO(model << " on " << ranks << " ranks, seam " << seam);
        const EngineConfig config = small_config(ranks, ranks == 2 ? 2 : 1, seam == 0 ? Layout::kEp : Layout::kTp);
        Engine engine(model, config), fresh(changed.path(), config);
        if (seam < 0) seam = engine.model().num_layers;
        CHECK(difference(before, serve(engine)) == "");
        if (ranks > 1) hold(engine, 1);  // what is left of an earlier place must not matter
        for (Engine* e : {&engine, &fresh}) hold(*e, seam);
        const Weights old = weights_of(engine);
        engine.update_weights(changed.path());
        const Weights now = weights_of(engine);
        REQUIRE(old.scales != now.scales);
        CHECK((now == weights_of(fresh)));
        for (int32_t there : {engine.model().num_layers, 0, seam}) {
          for (Engine* e : {&engine, &fresh}) hold(*e, there);
          CHECK((weights_of(engine) == weights_of(fresh)));
        }
        CHECK(difference(expected, serve(engine)) == "");
        engine.hold_seam(seam == 0 ? engine.model().num_layers : 0);
        CHECK(difference(expected, serve(engine)) == "");
        check_no_leaks(engine, false);
      }
  }
}

TEST_CASE("an update of some tensors gives what a checkpoint with these gives, and all of them, part by part, give all") {
  constexpr uint32_t kParts = 3;
  int64_t turn = 0;
  for (const std::string& model : {kQwen, kDense, kQwen2, kGlm, kGranite}) {
    const Changed changed(model), partly(model, part(0, kParts));
    const Outcome expected = run_script(changed.path(), small_config(1, 1, Layout::kTp), busy_script());
    const Outcome between = run_script(partly.path(), small_config(1, 1, Layout::kTp), busy_script());
    REQUIRE(difference(expected, between) != "");
    for (const auto& [ranks, seam] : {std::pair{1, 0}, {2, 2}, {3, -1}}) {
      if ((model != kQwen && ranks != 2) || turn++ % kSweep != 0) continue;
      INFO(model << " on " << ranks << " ranks, seam " << seam);
      const EngineConfig config = small_config(ranks, 1, Layout::kEp);
      Engine engine(model, config), fresh(changed.path(), config), fresh_between(partly.path(), config);
      if (ranks > 1)
        for (Engine* e : {&engine, &fresh, &fresh_between}) hold(*e, seam < 0 ? e->model().num_layers : seam);
      serve(engine);
      for (uint32_t i = 0; i < kParts; ++i) {
        Changed some(model);
        some.keep(part(i, kParts));
        engine.update_tensors(FolderFiles(some.path()));
        CHECK(engine.impl().kv().live_blocks().empty());
        if (i > 0 && i + 1 < kParts) continue;
        CHECK((weights_of(engine) == weights_of(i == 0 ? fresh_between : fresh)));
        CHECK(difference(i == 0 ? between : expected, serve(engine)) == "");
      }
    }
  }
}

TEST_CASE("no prefix from before an update is found after it") {
  const Changed changed(kQwen);
  for (int32_t seam : {0, 2, 4}) {
    Engine engine(kQwen, small_config(2, 1, Layout::kTp));
    hold(engine, seam);
    const Script script{{{greedy_request("a", prompt_of(7, 70), 20)}}, {}};
    const auto hits_of_a_run = [&] {
      const uint64_t hits = engine.stats().prefix_hits;
      Runner(engine, true).run(script);
      return engine.stats().prefix_hits - hits;
    };
    CHECK(hits_of_a_run() == 0);
    CHECK(hits_of_a_run() == 64);
    engine.update_weights(changed.path());
    CHECK(engine.impl().kv().live_blocks().empty());
    CHECK(hits_of_a_run() == 0);
    CHECK(hits_of_a_run() == 64);
    CHECK(difference(run_script(changed.path(), small_config(1, 1, Layout::kTp), script), Runner(engine, true).run(script)) == "");
  }
}

TEST_CASE("an update is refused before anything changes: while a request or a switch is under way, and what is another model's") {
  ModelCopy other(kQwen);
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  const Outcome expected = serve(engine);
  const size_t cached = engine.impl().kv().live_blocks().size();
  const auto refused = [&](const std::string& path, Code code) {
    const Error e = error_of([&] { engine.update_weights(path); });
    CHECK(e.code() == code);
    return std::string(e.what());
  };

  const uint64_t id = engine.submit(greedy_request("r", prompt_of(1, 5), 400));
  CHECK_THAT(refused(kQwen, Code::kInvalidState), Contains("0 requests run and 1 wait") && Contains("drain"));
  engine.step();
  CHECK_THAT(refused(kQwen, Code::kInvalidState), Contains("1 requests run and 0 wait"));
  engine.cancel(id);
  engine.step();
  engine.impl().switcher().set_piece_bytes(kSmallPieces);
  engine.set_stall_budget(1e-6);
  engine.request_switch(Layout::kEp);
  engine.step();
  CHECK_THAT(refused(kQwen, Code::kInvalidState), Contains("a switch is under way (at seam 4)"));
  while (engine.stats().switching) engine.step();

  other.set("config.json", "rope_theta", 5000.0);
  CHECK_THAT(refused(other.path(), Code::kInvalidArgument), Contains("config.json: rope_theta is 5000"));
  other.remove("config.json");  // it need not be there
  CHECK_THAT(refused(kDense, Code::kInvalidArgument), Contains("num_key_value_heads is 4, of the model that is served 2"));
  CHECK_THAT(refused(kQwen + "/nowhere", Code::kNotFound), Contains("no such directory"));
  {
    ModelCopy without_config(kDense);
    without_config.remove("config.json");
    CHECK_THAT(refused(without_config.path(), Code::kCorruptModel), Contains("tensor 'lm_head.weight' is missing"));
  }
  {
    const auto some_refused = [&](const ModelCopy& some) {
      return std::string(error_of([&] { engine.update_tensors(FolderFiles(some.path())); }).what());
    };
    ModelCopy none(kQwen), others(kDense);
    none.keep([](const std::string&) { return false; });
    CHECK_THAT(some_refused(none), Contains("there is no tensor"));
    others.keep([](const std::string& tensor) { return tensor == "model.layers.5.input_layernorm.weight"; });
    CHECK_THAT(some_refused(others), Contains("'model.layers.5.input_layernorm.weight' is none that the model has"));
    ModelCopy wrong(kDense);
    wrong.keep([](const std::string& tensor) { return tensor == "model.layers.1.self_attn.k_proj.weight"; });
    CHECK_THAT(some_refused(wrong), Contains("has shape"));
  }
  CHECK(engine.impl().kv().live_blocks().size() >= cached);
  CHECK(difference(expected, serve(engine)) == "");
  engine.update_weights(other.path());
  CHECK(difference(expected, serve(engine)) == "");
}

TEST_CASE("an update that fails half-way leaves an engine that serves nothing until one succeeds") {
  const Changed changed(kQwen);
  const Outcome expected = run_script(changed.path(), small_config(1, 1, Layout::kTp), busy_script());
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    Engine engine(kQwen, small_config(2, 1, layout));
    serve(engine);
    const WatchedFiles all(changed.path(), [](int64_t) {});
    engine.update_weights(all);
    for (int64_t bad : {int64_t{8}, all.reads() / 2, all.reads() - 1}) {
      INFO("read " << bad << " of " << all.reads());
      const RequestSpec spec = greedy_request("late", prompt_of(2, 9), 4);
      uint64_t late = 0;
      const WatchedFiles failing(changed.path(), [&](int64_t read) {
        if (read == 6) late = engine.submit(spec);
        if (read == bad) fail(Code::kIo, "injected");
      });
      CHECK(error_of([&] { engine.update_weights(failing); }).code() == Code::kIo);
      for (const auto& call : {std::function<void()>([&] { engine.step(); }), {[&] { engine.submit(spec); }}, {[&] { engine.check(spec); }}}) {
        const Error e = error_of(call);
        CHECK(e.code() == Code::kInvalidState);
        CHECK_THAT(e.what(), Contains("until an update of all of them succeeds") && Contains("injected"));
      }
      std::vector<Event> events(64);
      events.resize(engine.poll(events, 0));
      REQUIRE(late != 0);
      CHECK(std::count_if(events.begin(), events.end(), [&](const Event& e) {
              return e.type == EventType::kFinished && e.request == late && e.finish_reason == FinishReason::kError;
            }) == 1);
      CHECK(engine.stats().waiting == 0);
      CHECK_THAT(error_of([&] { engine.update_weights(kDense); }).what(), Contains("of the model that is served"));
      CHECK_THAT(error_of([&] { engine.update_tensors(FolderFiles(changed.path())); }).what(), Contains("an update of all of them"));
      CHECK_THROWS_AS(engine.step(), Error);  // refusals mend nothing
      engine.update_weights(changed.path());
      CHECK(difference(expected, serve(engine)) == "");
    }
  }
}

TEST_CASE("an update tells its progress and can be cancelled") {
  const Changed changed(kQwen);
  EngineConfig config = small_config(2, 1, Layout::kEp);
  int64_t most = INT64_MAX, last = 0, total = 0;
  config.progress = [&](int64_t done, int64_t all) {
    last = done, total = all;
    return done <= most;
  };
  Engine engine(kQwen, config);
  const int64_t of_the_load = std::exchange(total, 0);
  last = 0;
  engine.update_weights(changed.path());
  CHECK(total == of_the_load);
  CHECK(last == total);
  most = total / 2;
  CHECK(error_of([&] { engine.update_weights(kQwen); }).code() == Code::kCancelled);
  CHECK_THROWS_AS(engine.step(), Error);
  most = total;
  engine.update_weights(changed.path());
  CHECK(difference(run_script(changed.path(), small_config(1, 1, Layout::kTp), busy_script()), serve(engine)) == "");
}

TEST_CASE("the engine's own thread outlives an update that fails, and serves with the next one's weights") {
  const Changed changed(kQwen);
  const std::vector<int32_t> expected =
      run_script(changed.path(), small_config(1, 1, Layout::kTp), {{{greedy_request("a", prompt_of(5, 20), 6)}}, {}}).outputs.at("a").tokens;
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.policy.kind = PolicyKind::kThreshold;  // which has the thread step while nothing is to be done
  config.policy.threshold = 60;
  config.policy.shadow = true;
  Engine engine(kQwen, config);
  engine.start();
  const WatchedFiles failing(changed.path(), [&](int64_t read) {
    if (read == 40) fail(Code::kIo, "injected");
  });
  CHECK_THROWS_AS(engine.update_weights(failing), Error);
  engine.request_switch(Layout::kEp);  // waits
  std::this_thread::sleep_for(std::chrono::milliseconds(120));
  CHECK(engine.stats().seam == 4);
  engine.update_weights(changed.path());
  engine.submit(greedy_request("a", prompt_of(5, 20), 6));
  std::vector<int32_t> tokens;
  std::vector<Event> events(64);
  for (bool done = false; !done;) {
    const size_t n = engine.poll(events, 20000);
    REQUIRE(n > 0);
    for (size_t i = 0; i < n; ++i) {
      if (events[i].type == EventType::kToken) tokens.push_back(events[i].token);
      done |= events[i].type == EventType::kFinished;
    }
  }
  CHECK(tokens == expected);
  CHECK(engine.stats().seam == 0);
}

}  // namespace moebius::test
