#include "capi/config.h"

#include <charconv>
#include <limits>
#include <variant>

#include "capi/guarded.h"

namespace {

using moebius::Code;
using moebius::EngineConfig;
using moebius::fail;
using moebius::Layout;
using moebius::PolicyKind;
using moebius::ThresholdVariant;

using SetI64 = void (*)(EngineConfig&, int64_t);
using SetF64 = void (*)(EngineConfig&, double);
using SetStr = void (*)(EngineConfig&, const std::string&);
using SetHandles = void (*)(EngineConfig&, const std::vector<void*>&);

struct Key {
  const char* name;
  const char* default_text;
  const char* doc;
  std::variant<SetI64, SetF64, SetStr, SetHandles> set;
  const char* stability = "stable";
  const char* type() const {
    constexpr const char* kTypes[] = {"i64", "f64", "str", "handles"};
    return kTypes[set.index()];
  }
};

int narrow(const char* key, int64_t value) {
  if (value < 0 || value > std::numeric_limits<int>::max()) fail(Code::kInvalidArgument, "{} is {}, must be from 0 to 2147483647", key, value);
  return static_cast<int>(value);
}

template <class T>
T one_of(const char* key, const std::string& value, std::initializer_list<std::pair<const char*, T>> choices) {
  std::string known;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  fail(Code::kInvalidArgument, "{} is '{}', must be one of {}", key, value, known);
}

std::vector<int32_t> device_list(const std::string& text) {
  std::vector<int32_t> out;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    int32_t value = -1;
    const auto [stop, error] = std::from_chars(at, end, value);
    if (error != std::errc() || value < 0 || (stop != end && (*stop != ',' || stop + 1 == end)))
      fail(Code::kInvalidArgument, "device_ids is '{}', must be numbers from 0 on with commas between them", text);
    out.push_back(value);
    at = stop == end ? stop : stop + 1;
  }
  return out;
}

#define INT_KEY(field, name, fallback, doc) \
  Key { name, fallback, doc, SetI64([](EngineConfig& c, int64_t v) { c.field = narrow(name, v); }) }
#define WIDE_KEY(field, name, fallback, doc) \
  Key { name, fallback, doc, SetI64([](EngineConfig& c, int64_t v) { c.field = static_cast<decltype(c.field)>(v); }) }
#define FLAG_KEY(field, name, fallback, doc) \
  Key { name, fallback, doc, SetI64([](EngineConfig& c, int64_t v) { c.field = v != 0; }) }
#define REAL_KEY(field, name, fallback, doc) \
  Key { name, fallback, doc, SetF64([](EngineConfig& c, double v) { c.field = v; }) }

const Key kKeys[] = {
    INT_KEY(ranks, "ranks", "1", "ranks that share the model"),
    INT_KEY(threads, "threads", "0", "computing threads per rank; 0: cores divided by ranks"),
    Key{"layout", "tp", "layout to start in: tp or ep", SetStr([](EngineConfig& c, const std::string& v) {
          c.layout = one_of<Layout>("layout", v, {{"tp", Layout::kTp}, {"ep", Layout::kEp}});
        })},
    WIDE_KEY(memory_bytes, "memory_bytes", "0",
             "per rank, weights, KV and workspace; 0: for max_batch requests of min(context, 4096) tokens, at most half of the free memory (cpu)"),
    WIDE_KEY(kv_tokens, "kv_tokens", "0", "KV tokens at most, over all ranks; 0: as many as the memory holds"),
    Key{"device", "cpu", "where ranks work: cpu, or the name of a module (cuda)",
        SetStr([](EngineConfig& c, const std::string& v) { c.device = v; })},
    Key{"device_ids", "", "devices of the ranks, such as 0,1 or 0,0; empty: ranks take turns on all there are",
        SetStr([](EngineConfig& c, const std::string& v) { c.device_ids = device_list(v); })},
    Key{"communicator", "peer", "how ranks on devices exchange: peer (they read each other's memory) or nccl (a device for each rank)",
        SetStr([](EngineConfig& c, const std::string& v) { c.communicator = v; })},
    FLAG_KEY(rank_processes, "rank_processes", "0", "each rank on a device has a process of its own, which the library starts"),
    WIDE_KEY(two_shot_bytes, "two_shot_bytes", "262144", "sums of TP on devices: from so many bytes of a rank on, each adds up its share of the rows first"),
    Key{"streams", "", "cudaStream_t of the ranks; none: the engine's own",
        SetHandles([](EngineConfig& c, const std::vector<void*>& v) { c.streams = v; })},
    Key{"nccl_comms", "", "ncclComm_t of the ranks, where communicator is nccl; none: the engine's own",
        SetHandles([](EngineConfig& c, const std::vector<void*>& v) { c.nccl_comms = v; })},
    FLAG_KEY(capture_steps, "capture_steps", "1", "decode steps are captured at start-up where the device can (CUDA graphs)"),
    Key{"isa", "", "kernel path: amx, avx512bf16, avx512, avx2, portable; empty: the best there is",
        SetStr([](EngineConfig& c, const std::string& v) { c.isa = v; })},
    INT_KEY(slices_per_expert, "slices_per_expert", "0", "cuts of each MLP; fixes the bits; 0: 8 where cuts keep 96 neurons, else 4"),
    INT_KEY(page_tokens, "page_tokens", "16", "tokens of a KV page, a multiple of 16"),
    INT_KEY(chunk_tokens, "chunk_tokens", "512", "prompt tokens that a step takes over all requests"),
    INT_KEY(max_batch, "max_batch", "64", "running requests over all ranks"),
    INT_KEY(max_queue, "max_queue", "65536", "waiting requests; submit beyond it is refused"),
    WIDE_KEY(max_context, "max_context", "0", "tokens of a request, prompt included; 0: the model's"),
    FLAG_KEY(prefix_cache, "prefix_cache", "1", "pages of equal prefixes are shared"),
    Key{"seed", "0", "seeds the requests that name no seed, and dummy weights",
        SetI64([](EngineConfig& c, int64_t v) { c.seed = static_cast<uint64_t>(v); })},
    REAL_KEY(stall_budget_ms, "stall_budget_ms", "0", "time that each step may lend to a switch; 0: all at once"),
    FLAG_KEY(preempt_to_fit, "preempt_to_fit", "0", "a switch that does not fit preempts requests instead of being refused"),
    REAL_KEY(wait_deadline_ms, "wait_deadline_ms", "30000", "every wait of one rank for another"),
    INT_KEY(engine_id, "engine_id", "0", "label `engine` of the metrics: tells several engines of one model apart"),
    FLAG_KEY(dummy_weights, "dummy_weights", "0", "seeded random weights; only config.json is read"),
    Key{"mode", "", "exact: equal bits whatever the layout; fast: sums in any order; empty: exact on the cpu, fast on devices",
        SetStr([](EngineConfig& c, const std::string& v) { c.mode = v; })},
    Key{"policy", "measured", "who decides on switches: manual (the host alone), threshold or measured", SetStr([](EngineConfig& c, const std::string& v) {
          c.policy.kind = one_of<PolicyKind>(
              "policy", v, {{"manual", PolicyKind::kManual}, {"threshold", PolicyKind::kThreshold}, {"measured", PolicyKind::kMeasured}});
        })},
    Key{"policy_variant", "decode", "what the threshold counts: decode, prefill or rollout", SetStr([](EngineConfig& c, const std::string& v) {
          c.policy.variant = one_of<ThresholdVariant>(
              "policy_variant", v,
              {{"decode", ThresholdVariant::kDecode}, {"prefill", ThresholdVariant::kPrefill}, {"rollout", ThresholdVariant::kRollout}});
        })},
    REAL_KEY(policy.threshold, "policy_threshold", "0", "0: the variant's for this number of ranks"),
    INT_KEY(policy.window_steps, "policy_window_steps", "0", "steps that are averaged; 0: the variant's"),
    REAL_KEY(policy.cooldown_s, "policy_cooldown_s", "-1", "seconds without a decision after a switch; below 0: the variant's"),
    FLAG_KEY(policy.shadow, "policy_shadow", "0", "decide and record, but do not switch"),
    Key{"policy_explore", "0.01", "measured: share of the time that may be spent elsewhere than its rule says, to learn or ahead of it; 0: none",
        SetF64([](EngineConfig& c, double v) { c.policy.explore = v; }), "experimental"},
    Key{"policy_calibrate_ms", "0", "time at start-up for dummy requests in both layouts, which teach their costs, unless policy_file has them; 0: none",
        SetF64([](EngineConfig& c, double v) { c.policy_calibrate_ms = v; }), "experimental"},
    Key{"policy_file", "", "where the learned costs are read from and, when the engine is destroyed, written to; empty: nowhere",
        SetStr([](EngineConfig& c, const std::string& v) { c.policy_file = v; }), "experimental"},
};
#undef INT_KEY
#undef WIDE_KEY
#undef FLAG_KEY
#undef REAL_KEY

const Key& key_named(const char* name) {
  moebius::capi::not_null(name, "key");
  std::vector<const char*> known;
  for (const Key& k : kKeys) {
    if (std::strcmp(k.name, name) == 0) return k;
    known.push_back(k.name);
  }
  fail(Code::kInvalidArgument, "config has no key '{}'{}", name, moebius::capi::did_you_mean(name, known));
}

template <class Set, class V>
moebius_status set(moebius_config* config, const char* name, const V& value, moebius_error** err) {
  return moebius::capi::guarded(err, [&] {
    moebius_config& c = moebius::capi::not_null(config, "config");
    const Key& key = key_named(name);
    if (const Set* f = std::get_if<Set>(&key.set)) (*f)(c.engine, value);
    else if (const SetF64* real = std::get_if<SetF64>(&key.set); real != nullptr && std::is_same_v<V, int64_t>) {
      if constexpr (std::is_same_v<V, int64_t>) (*real)(c.engine, static_cast<double>(value));
    } else {
      fail(Code::kInvalidArgument, "config key '{}' is of type {}", name, key.type());
    }
  });
}

}  // namespace

extern "C" {

moebius_status moebius_config_create(moebius_config** out_config, moebius_error** err) {
  return moebius::capi::guarded(err, [&] {
    moebius::capi::not_null(out_config, "out_config");
    *out_config = new moebius_config();
  });
}

void moebius_config_destroy(moebius_config* config) { delete config; }

moebius_status moebius_config_set_i64(moebius_config* config, const char* key, int64_t value, moebius_error** err) {
  return set<SetI64>(config, key, value, err);
}

moebius_status moebius_config_set_f64(moebius_config* config, const char* key, double value, moebius_error** err) {
  return set<SetF64>(config, key, value, err);
}

moebius_status moebius_config_set_str(moebius_config* config, const char* key, const char* value, moebius_error** err) {
  if (value == nullptr) return moebius::capi::report(MOEBIUS_E_INVALID_ARGUMENT, "value is NULL", err);
  return set<SetStr>(config, key, value, err);
}

moebius_status moebius_config_set_handles(moebius_config* config, const char* key, void* const* handles, size_t num, moebius_error** err) {
  if (num > 0 && handles == nullptr) return moebius::capi::report(MOEBIUS_E_INVALID_ARGUMENT, "handles is NULL", err);
  std::vector<void*> list;
  const moebius_status copied = moebius::capi::guarded(err, [&] {
    moebius::capi::check_length("num", num);
    list.assign(handles, handles + num);
  });
  return copied != MOEBIUS_OK ? copied : set<SetHandles>(config, key, list, err);
}

moebius_status moebius_config_set_progress(moebius_config* config, moebius_progress_fn fn, void* user, moebius_error** err) {
  return moebius::capi::guarded(err, [&] {
    moebius_config& c = moebius::capi::not_null(config, "config");
    c.engine.progress = nullptr;
    if (fn != nullptr) c.engine.progress = [fn, user](int64_t done, int64_t total) { return fn(user, done, total) == 0; };
  });
}

moebius_status moebius_config_set_log(moebius_config* config, moebius_log_fn fn, void* user, moebius_error** err) {
  return moebius::capi::guarded(err, [&] {
    moebius_config& c = moebius::capi::not_null(config, "config");
    c.engine.log = nullptr;
    if (fn != nullptr)
      c.engine.log = [fn, user](moebius::LogLevel level, const char* category, const std::string& message) {
        fn(user, static_cast<int32_t>(level), category, message.c_str());
      };
  });
}

moebius_status moebius_config_set_thread_hook(moebius_config* config, moebius_thread_fn fn, void* user, moebius_error** err) {
  return moebius::capi::guarded(err, [&] {
    moebius_config& c = moebius::capi::not_null(config, "config");
    c.engine.thread_hook = nullptr;
    if (fn != nullptr) c.engine.thread_hook = [fn, user](int rank, int thread, bool starting) { fn(user, rank, thread, starting); };
  });
}

moebius_status moebius_config_set_allocator(moebius_config* config, moebius_alloc_fn alloc_fn, moebius_free_fn free_fn, void* user,
                                            moebius_error** err) {
  return moebius::capi::guarded(err, [&] {
    moebius_config& c = moebius::capi::not_null(config, "config");
    if ((alloc_fn == nullptr) != (free_fn == nullptr)) fail(Code::kInvalidArgument, "one of alloc_fn and free_fn is NULL");
    c.engine.allocator = {};
    if (alloc_fn != nullptr)
      c.engine.allocator = {[alloc_fn, user](size_t size, size_t alignment) { return alloc_fn(user, size, alignment); },
                            [free_fn, user](void* memory, size_t size) { free_fn(user, memory, size); }};
  });
}

moebius_status moebius_config_key(size_t index, const char** out_name, const char** out_type, const char** out_default, const char** out_doc,
                                  const char** out_stability, moebius_error** err) {
  return moebius::capi::guarded(err, [&] {
    if (index >= std::size(kKeys)) fail(Code::kNotFound, "config has {} keys, {} is past the last", std::size(kKeys), index);
    const Key& k = kKeys[index];
    if (out_name != nullptr) *out_name = k.name;
    if (out_type != nullptr) *out_type = k.type();
    if (out_default != nullptr) *out_default = k.default_text;
    if (out_doc != nullptr) *out_doc = k.doc;
    if (out_stability != nullptr) *out_stability = k.stability;
  });
}

}  // extern "C"
