#include "capi/request.h"

#include "capi/guarded.h"

namespace {

using moebius::Code;
using moebius::fail;
using moebius::RequestSpec;
using moebius::capi::check_length;
using moebius::capi::guarded;
using moebius::capi::not_null;

struct IntKey {
  const char* name;
  void (*set)(RequestSpec&, int64_t);
};
struct RealKey {
  const char* name;
  void (*set)(RequestSpec&, double);
};
struct IdsKey {
  const char* name;
  std::vector<int32_t> moebius::SamplingParams::*ids;
};

int32_t in_32_bits(const char* key, int64_t v) {
  if (v < INT32_MIN || v > INT32_MAX) fail(Code::kInvalidArgument, "{} is {}, which does not fit 32 bits", key, v);
  return static_cast<int32_t>(v);
}

#define INT_KEY(name, field) \
  IntKey { name, [](RequestSpec& r, int64_t v) { r.field = in_32_bits(name, v); } }

const IntKey kInts[] = {
    INT_KEY("max_tokens", sampling.max_tokens),
    INT_KEY("min_tokens", sampling.min_tokens),
    INT_KEY("top_k", sampling.top_k),
    INT_KEY("n", sampling.n),
    {"logprobs",
     [](RequestSpec& r, int64_t v) {
       if (v < 0) fail(Code::kInvalidArgument, "logprobs is {}, must be at least 0 (a request without the key returns none)", v);
       r.sampling.logprobs = in_32_bits("logprobs", v);
     }},
    INT_KEY("priority", priority),
    {"seed", [](RequestSpec& r, int64_t v) { r.sampling.seed = static_cast<uint64_t>(v); }},
    {"ignore_eos", [](RequestSpec& r, int64_t v) { r.sampling.ignore_eos = v != 0; }},
    {"keep_logits", [](RequestSpec& r, int64_t v) { r.keep_logits = v != 0; }},
    {"routed_experts", [](RequestSpec& r, int64_t v) { r.keep_routes = v != 0; }},
};
#undef INT_KEY
const RealKey kReals[] = {
    {"temperature", [](RequestSpec& r, double v) { r.sampling.temperature = v; }},
    {"top_p", [](RequestSpec& r, double v) { r.sampling.top_p = v; }},
    {"min_p", [](RequestSpec& r, double v) { r.sampling.min_p = v; }},
    {"presence_penalty", [](RequestSpec& r, double v) { r.sampling.presence_penalty = v; }},
    {"frequency_penalty", [](RequestSpec& r, double v) { r.sampling.frequency_penalty = v; }},
    {"repetition_penalty", [](RequestSpec& r, double v) { r.sampling.repetition_penalty = v; }},
    {"deadline_ms", [](RequestSpec& r, double v) { r.deadline_ms = v; }},
};
const IdsKey kIds[] = {
    {"stop_token_ids", &moebius::SamplingParams::stop_token_ids},
    {"allowed_token_ids", &moebius::SamplingParams::allowed_token_ids},
};
// What other engines take and this one does not (yet): said so instead of ignored.
const char* const kUnsupported[] = {"stop", "bad_words", "prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens",
                                    "detokenize", "spaces_between_special_tokens", "output_kind", "stream_interval", "best_of",
                                    "structured_outputs", "guided_decoding", "logits_processors", "truncate_prompt_tokens", "typical_p"};

[[noreturn]] void unknown_key(const char* key, const char* type) {
  std::vector<const char*> known;
  for (const char* k : kUnsupported)
    if (std::strcmp(k, key) == 0) fail(Code::kUnsupported, "'{}' is not supported", key);
  if (std::strcmp(key, "logit_bias") == 0) fail(Code::kInvalidArgument, "logit_bias is added token by token: moebius_request_add_logit_bias");
  for (const IntKey& k : kInts) known.push_back(k.name);
  for (const RealKey& k : kReals) known.push_back(k.name);
  for (const IdsKey& k : kIds) known.push_back(k.name);
  known.push_back("id");
  for (const char* k : known)
    if (std::strcmp(k, key) == 0) fail(Code::kInvalidArgument, "request key '{}' does not take {}", key, type);
  fail(Code::kInvalidArgument, "a request has no key '{}'{}", key, moebius::capi::did_you_mean(key, known));
}

}  // namespace

extern "C" {

moebius_status moebius_request_create(moebius_request** out_request, moebius_error** err) {
  return guarded(err, [&] {
    not_null(out_request, "out_request");
    *out_request = new moebius_request();
  });
}

void moebius_request_destroy(moebius_request* request) { delete request; }

moebius_status moebius_request_set_prompt(moebius_request* request, const int32_t* token_ids, size_t num_tokens, moebius_error** err) {
  return guarded(err, [&] {
    moebius_request& r = not_null(request, "request");
    if (num_tokens > 0) not_null(token_ids, "token_ids");
    check_length("num_tokens", num_tokens);
    r.spec.prompt_ids.assign(token_ids, token_ids + num_tokens);
  });
}

moebius_status moebius_request_set_user_data(moebius_request* request, uint64_t user_data, moebius_error** err) {
  return guarded(err, [&] { not_null(request, "request").spec.user_data = user_data; });
}

moebius_status moebius_request_set_i64(moebius_request* request, const char* key, int64_t value, moebius_error** err) {
  return guarded(err, [&] {
    moebius_request& r = not_null(request, "request");
    not_null(key, "key");
    for (const IntKey& k : kInts)
      if (std::strcmp(k.name, key) == 0) return k.set(r.spec, value);
    for (const RealKey& k : kReals)
      if (std::strcmp(k.name, key) == 0) return k.set(r.spec, static_cast<double>(value));
    unknown_key(key, "an integer");
  });
}

moebius_status moebius_request_set_f64(moebius_request* request, const char* key, double value, moebius_error** err) {
  return guarded(err, [&] {
    moebius_request& r = not_null(request, "request");
    not_null(key, "key");
    for (const RealKey& k : kReals)
      if (std::strcmp(k.name, key) == 0) return k.set(r.spec, value);
    unknown_key(key, "a float");
  });
}

moebius_status moebius_request_set_str(moebius_request* request, const char* key, const char* value, moebius_error** err) {
  return guarded(err, [&] {
    moebius_request& r = not_null(request, "request");
    not_null(key, "key");
    not_null(value, "value");
    if (std::strcmp(key, "id") != 0) unknown_key(key, "a string");
    r.spec.id = value;
  });
}

moebius_status moebius_request_set_ids(moebius_request* request, const char* key, const int32_t* token_ids, size_t num_tokens,
                                       moebius_error** err) {
  return guarded(err, [&] {
    moebius_request& r = not_null(request, "request");
    not_null(key, "key");
    if (num_tokens > 0) not_null(token_ids, "token_ids");
    check_length("num_tokens", num_tokens);
    for (const IdsKey& k : kIds)
      if (std::strcmp(k.name, key) == 0) return (r.spec.sampling.*k.ids).assign(token_ids, token_ids + num_tokens);
    unknown_key(key, "a list of token ids");
  });
}

moebius_status moebius_request_add_logit_bias(moebius_request* request, int32_t token, float bias, moebius_error** err) {
  return guarded(err, [&] { not_null(request, "request").spec.sampling.logit_bias.emplace_back(token, bias); });
}

}  // extern "C"
