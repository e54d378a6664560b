// Moebius for C++17: owners over the C ABI, statuses as exceptions. Header-only; everything said in moebius.h holds here.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moebius/moebius.h"

namespace moebius_cpp {

// What a call failed with.
class Error : public std::runtime_error {
 public:
  // The message is what().
  Error(moebius_status code, const std::string& message) : std::runtime_error(message), code_(code) {}
  moebius_status code() const { return code_; }  // MOEBIUS_E_…

 private:
  moebius_status code_;
};

// Throws what a call left behind: check([&](moebius_error** e) { return moebius_engine_start(engine, e); })
template <class Call>
void check(Call&& call) {
  moebius_error* error = nullptr;
  const moebius_status status = call(&error);
  if (status == MOEBIUS_OK) return;
  const std::string message = moebius_error_message(error);
  moebius_error_destroy(error);
  throw Error(status, message);
}

// Gives a handle back with its function.
template <class T, void (*Destroy)(T*)>
struct Destroyer {
  void operator()(T* handle) const { Destroy(handle); }  // of unique_ptr
};
// The one owner of a handle.
template <class T, void (*Destroy)(T*)>
using Handle = std::unique_ptr<T, Destroyer<T, Destroy>>;

// Settings of an engine, by key.
class Config {
 public:
  Config() {
    moebius_config* c = nullptr;
    check([&](moebius_error** e) { return moebius_config_create(&c, e); });
    handle_.reset(c);
  }
  Config& set(const char* key, int64_t value) {
    check([&](moebius_error** e) { return moebius_config_set_i64(get(), key, value, e); });
    return *this;
  }
  Config& set_real(const char* key, double value) {
    check([&](moebius_error** e) { return moebius_config_set_f64(get(), key, value, e); });
    return *this;
  }
  // As set_real: not the integer that a real number would become.
  template <class Real, class = std::enable_if_t<std::is_floating_point_v<Real>>>
  Config& set(const char* key, Real value) {
    return set_real(key, value);
  }
  Config& set(const char* key, const std::string& value) {
    check([&](moebius_error** e) { return moebius_config_set_str(get(), key, value.c_str(), e); });
    return *this;
  }
  moebius_config* get() const { return handle_.get(); }  // for calls of moebius.h

 private:
  Handle<moebius_config, moebius_config_destroy> handle_;
};

// Files of a model that are not in a folder. The reader is set with moebius_source_set_reader.
class Source {
 public:
  explicit Source(const std::string& name) {
    moebius_source* s = nullptr;
    check([&](moebius_error** e) { return moebius_source_create(name.c_str(), &s, e); });
    handle_.reset(s);
  }
  // Borrowed for as long as the source lives.
  Source& add(const std::string& file_name, const void* data, size_t size) {
    check([&](moebius_error** e) { return moebius_source_add_memory(get(), file_name.c_str(), data, size, e); });
    return *this;
  }
  // One tensor, borrowed likewise; dtype as in safetensors: "BF16", "F16", "F32".
  Source& add_tensor(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape, const void* data, size_t size) {
    check([&](moebius_error** e) {
      return moebius_source_add_tensor(get(), name.c_str(), dtype.c_str(), shape.data(), shape.size(), data, size, e);
    });
    return *this;
  }
  moebius_source* get() const { return handle_.get(); }  // for calls of moebius.h

 private:
  Handle<moebius_source, moebius_source_destroy> handle_;
};

// A prompt and how to go on from it; submitting copies it.
class Request {
 public:
  explicit Request(const std::vector<int32_t>& prompt_ids) {
    moebius_request* r = nullptr;
    check([&](moebius_error** e) { return moebius_request_create(&r, e); });
    handle_.reset(r);
    check([&](moebius_error** e) { return moebius_request_set_prompt(r, prompt_ids.data(), prompt_ids.size(), e); });
  }
  Request& set(const char* key, int64_t value) {
    check([&](moebius_error** e) { return moebius_request_set_i64(get(), key, value, e); });
    return *this;
  }
  Request& set_real(const char* key, double value) {
    check([&](moebius_error** e) { return moebius_request_set_f64(get(), key, value, e); });
    return *this;
  }
  // As set_real: not the integer that a real number would become.
  template <class Real, class = std::enable_if_t<std::is_floating_point_v<Real>>>
  Request& set(const char* key, Real value) {
    return set_real(key, value);
  }
  Request& set(const char* key, const std::string& value) {
    check([&](moebius_error** e) { return moebius_request_set_str(get(), key, value.c_str(), e); });
    return *this;
  }
  Request& set_ids(const char* key, const std::vector<int32_t>& ids) {
    check([&](moebius_error** e) { return moebius_request_set_ids(get(), key, ids.data(), ids.size(), e); });
    return *this;
  }
  Request& set_user_data(uint64_t user_data) {
    check([&](moebius_error** e) { return moebius_request_set_user_data(get(), user_data, e); });
    return *this;
  }
  Request& add_logit_bias(int32_t token, float bias) {
    check([&](moebius_error** e) { return moebius_request_add_logit_bias(get(), token, bias, e); });
    return *this;
  }
  moebius_request* get() const { return handle_.get(); }  // for calls of moebius.h

 private:
  Handle<moebius_request, moebius_request_destroy> handle_;
};

// A model being served.
class Engine {
 public:
  Engine(const std::string& model_dir, const Config& config) {
    moebius_engine* engine = nullptr;
    check([&](moebius_error** e) { return moebius_engine_create(model_dir.c_str(), config.get(), &engine, e); });
    handle_.reset(engine);
  }
  Engine(const Source& source, const Config& config) {
    moebius_engine* engine = nullptr;
    check([&](moebius_error** e) { return moebius_engine_create_from(source.get(), config.get(), &engine, e); });
    handle_.reset(engine);
  }
  uint64_t submit(const Request& request) {
    uint64_t id = 0;
    check([&](moebius_error** e) { return moebius_engine_submit(get(), request.get(), &id, e); });
    return id;
  }
  // All of them or none.
  std::vector<uint64_t> submit(const std::vector<Request>& requests) {
    std::vector<const moebius_request*> list;
    for (const Request& r : requests) list.push_back(r.get());
    std::vector<uint64_t> ids(list.size());
    check([&](moebius_error** e) { return moebius_engine_submit_many(get(), list.data(), list.size(), ids.data(), e); });
    return ids;
  }
  void validate(const Request& request) const {
    check([&](moebius_error** e) { return moebius_engine_check(get(), request.get(), e); });
  }
  void cancel(uint64_t id) {
    check([&](moebius_error** e) { return moebius_engine_cancel(get(), id, e); });
  }
  void cancel(uint64_t id, int32_t sample) {
    check([&](moebius_error** e) { return moebius_engine_cancel_sample(get(), id, sample, e); });
  }
  // False: some requests still run or wait.
  bool drain(double timeout_ms) {
    try {
      check([&](moebius_error** e) { return moebius_engine_drain(get(), timeout_ms, e); });
      return true;
    } catch (const Error& error) {
      if (error.code() != MOEBIUS_E_TIMEOUT) throw;
      return false;
    }
  }
  void resume() {
    check([&](moebius_error** e) { return moebius_engine_resume(get(), e); });
  }
  moebius_step_result step() {
    moebius_step_result result{};
    result.struct_size = sizeof result;
    check([&](moebius_error** e) { return moebius_engine_step(get(), &result, e); });
    return result;
  }
  void start() {
    check([&](moebius_error** e) { return moebius_engine_start(get(), e); });
  }
  void stop() {
    check([&](moebius_error** e) { return moebius_engine_stop(get(), e); });
  }
  // Readable while events wait; the engine's own.
  int event_fd() {
    int32_t fd = -1;
    check([&](moebius_error** e) { return moebius_engine_event_fd(get(), &fd, e); });
    return fd;
  }
  // Replaces `events` by those that wait, at most 1,024.
  void poll(std::vector<moebius_event>& events, double timeout_ms = 0) {
    moebius_event batch[16];  // an event is almost a KiB: only what came is written
    events.clear();
    events.reserve(1024);  // before anything is taken
    for (size_t count = 16; count == 16 && events.size() < 1024; timeout_ms = 0) {
      check([&](moebius_error** e) { return moebius_engine_poll(get(), batch, 16, sizeof(moebius_event), timeout_ms, &count, e); });
      events.insert(events.end(), batch, batch + count);
    }
  }
  void request_switch(moebius_layout to) {
    check([&](moebius_error** e) { return moebius_engine_switch(get(), to, e); });
  }
  void hold_seam(int32_t seam) {
    check([&](moebius_error** e) { return moebius_engine_hold_seam(get(), seam, e); });
  }
  void set_stall_budget(double ms) {
    check([&](moebius_error** e) { return moebius_engine_set_stall_budget(get(), ms, e); });
  }
  void set_policy(const Config& config) {
    check([&](moebius_error** e) { return moebius_engine_set_policy(get(), config.get(), e); });
  }
  // New weights of the same model, while nothing runs.
  void update_weights(const std::string& model_dir) {
    check([&](moebius_error** e) { return moebius_engine_update_weights(get(), model_dir.c_str(), e); });
  }
  void update_weights(const Source& source) {
    check([&](moebius_error** e) { return moebius_engine_update_weights_from(get(), source.get(), e); });
  }
  // Only those that the source has.
  void update_tensors(const Source& source) {
    check([&](moebius_error** e) { return moebius_engine_update_tensors(get(), source.get(), e); });
  }
  std::string metrics_text() const {
    std::string text;
    for (size_t needed = 1;;) try {
        text.resize(needed);
        check([&](moebius_error** e) { return moebius_engine_metrics_text(get(), &text[0], text.size(), &needed, e); });
        text.resize(needed - 1);  // without the NUL
        return text;
      } catch (const Error&) {
        if (needed <= text.size()) throw;  // else again with the room it asked for
      }
  }
  moebius_model_info model() const {
    moebius_model_info info{};
    info.struct_size = sizeof info;
    check([&](moebius_error** e) { return moebius_engine_model(get(), &info, e); });
    return info;
  }
  moebius_stats stats() const {
    moebius_stats stats{};
    stats.struct_size = sizeof stats;
    check([&](moebius_error** e) { return moebius_engine_stats(get(), &stats, e); });
    return stats;
  }
  std::vector<float> take_logits(uint64_t id, int32_t sample = 0) { return take<float>(moebius_engine_take_logits, id, sample); }
  std::vector<int16_t> take_routes(uint64_t id, int32_t sample = 0) { return take<int16_t>(moebius_engine_take_routes, id, sample); }
  moebius_engine* get() const { return handle_.get(); }  // for calls of moebius.h

 private:
  template <class T, class Take>
  std::vector<T> take(Take call, uint64_t id, int32_t sample) {
    std::vector<T> out(1);  // never empty, so that the call takes them
    for (size_t count = 0;;) try {
        check([&](moebius_error** e) { return call(get(), id, sample, out.data(), out.size(), &count, e); });
        out.resize(count);
        return out;
      } catch (const Error&) {
        if (count <= out.size()) throw;
        out.resize(count);  // again with the room it asked for; another thread's step may add more meanwhile
      }
  }

  Handle<moebius_engine, moebius_engine_destroy> handle_;
};

// Text to token ids and back; immutable, for any thread.
class Tokenizer {
 public:
  explicit Tokenizer(const Source& source) {
    moebius_tokenizer* t = nullptr;
    check([&](moebius_error** e) { return moebius_tokenizer_load_from(source.get(), &t, e); });
    handle_.reset(t);
  }
  explicit Tokenizer(const std::string& model_dir) {
    moebius_tokenizer* t = nullptr;
    check([&](moebius_error** e) { return moebius_tokenizer_load(model_dir.c_str(), &t, e); });
    handle_.reset(t);
  }
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const {
    size_t count = 0;
    check([&](moebius_error** e) {
      return moebius_tokenizer_encode(get(), text.data(), text.size(), add_special_tokens, nullptr, 0, &count, e);
    });
    std::vector<int32_t> ids(count);
    if (count > 0)
      check([&](moebius_error** e) {
        return moebius_tokenizer_encode(get(), text.data(), text.size(), add_special_tokens, ids.data(), count, &count, e);
      });
    return ids;
  }
  std::string decode(const std::vector<int32_t>& ids, bool skip_special_tokens = false) const {
    size_t bytes = 0;
    check([&](moebius_error** e) {
      return moebius_tokenizer_decode(get(), ids.data(), ids.size(), skip_special_tokens, nullptr, 0, &bytes, e);
    });
    std::string text(bytes, '\0');
    if (bytes > 0)
      check([&](moebius_error** e) {
        return moebius_tokenizer_decode(get(), ids.data(), ids.size(), skip_special_tokens, text.data(), bytes, &bytes, e);
      });
    return text;
  }
  moebius_tokenizer* get() const { return handle_.get(); }  // for calls of moebius.h

 private:
  Handle<moebius_tokenizer, moebius_tokenizer_destroy> handle_;
};

// Turns tokens into text as they come: whole characters, each as soon as it is certain. Must not outlive its tokenizer.
class Decoder {
 public:
  explicit Decoder(const Tokenizer& tokenizer) {
    moebius_decoder* d = nullptr;
    check([&](moebius_error** e) { return moebius_decoder_create(tokenizer.get(), &d, e); });
    handle_.reset(d);
  }
  // Both are borrowed until the next call.
  std::string_view push(int32_t id) {
    const char* text = nullptr;
    size_t bytes = 0;
    check([&](moebius_error** e) { return moebius_decoder_push(get(), id, &text, &bytes, e); });
    return {text, bytes};
  }
  std::string_view finish() {
    const char* text = nullptr;
    size_t bytes = 0;
    check([&](moebius_error** e) { return moebius_decoder_finish(get(), &text, &bytes, e); });
    return {text, bytes};
  }
  moebius_decoder* get() const { return handle_.get(); }  // for calls of moebius.h

 private:
  Handle<moebius_decoder, moebius_decoder_destroy> handle_;
};

// The switch alone, for a server that computes by itself.
class Plan {
 public:
  Plan(moebius_plan_spec spec, const Config& config) {
    spec.struct_size = sizeof spec;
    moebius_plan* plan = nullptr;
    check([&](moebius_error** e) { return moebius_plan_create(&spec, config.get(), &plan, e); });
    handle_.reset(plan);
  }
  moebius_plan_info info() const {
    moebius_plan_info info{};
    info.struct_size = sizeof info;
    check([&](moebius_error** e) { return moebius_plan_get_info(get(), &info, e); });
    return info;
  }
  int64_t arena_bytes(int32_t rank) const {
    int64_t bytes = 0;
    check([&](moebius_error** e) { return moebius_plan_arena_bytes(get(), rank, &bytes, e); });
    return bytes;
  }
  std::vector<moebius_slice> slices(int32_t rank, int32_t layer) const {
    return array<moebius_slice>([&](moebius_slice* out, size_t capacity, size_t* count, moebius_error** e) {
      return moebius_plan_slices(get(), rank, layer, out, capacity, sizeof(moebius_slice), count, e);
    });
  }
  moebius_kv_pool kv_pool(moebius_layout layout, int32_t rank, int32_t layer) const {
    moebius_kv_pool pool{};
    pool.struct_size = sizeof pool;
    check([&](moebius_error** e) { return moebius_plan_kv_pool(get(), layout, rank, layer, &pool, e); });
    return pool;
  }
  std::vector<moebius_block_copy> copies(moebius_layout to, int32_t layer, const std::vector<moebius_page_pair>& pairs = {}) const {
    return array<moebius_block_copy>([&](moebius_block_copy* out, size_t capacity, size_t* count, moebius_error** e) {
      return moebius_plan_copies(get(), to, layer, pairs.data(), pairs.size(), out, capacity, sizeof(moebius_block_copy), count, e);
    });
  }
  void verify() const {
    check([&](moebius_error** e) { return moebius_plan_verify(get(), e); });
  }
  // rank -1: all of them.
  void copy_next(moebius_layout to, int32_t rank, const std::vector<void*>& arenas, const std::vector<moebius_page_pair>& pairs = {}) {
    check([&](moebius_error** e) { return moebius_plan_copy_next(get(), to, rank, arenas.data(), pairs.data(), pairs.size(), e); });
  }
  void advance(moebius_layout to) {
    check([&](moebius_error** e) { return moebius_plan_advance(get(), to, e); });
  }
  moebius_plan* get() const { return handle_.get(); }  // for calls of moebius.h

 private:
  template <class T, class Fill>
  static std::vector<T> array(Fill&& fill) {
    size_t count = 0;
    check([&](moebius_error** e) { return fill(nullptr, 0, &count, e); });
    std::vector<T> out(count);
    if (count > 0) check([&](moebius_error** e) { return fill(out.data(), count, &count, e); });
    return out;
  }
  Handle<moebius_plan, moebius_plan_destroy> handle_;
};

}  // namespace moebius_cpp
