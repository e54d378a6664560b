// moebius-generate: runs prompts, with arrivals, cancels and switches at given steps. Uses the public headers only.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/common/output_file.h"
#include "examples/common/strict_json.h"
#include "examples/generate/prompts.h"

namespace moebius_examples {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

struct Switch {
  int64_t step = 0;
  moebius_layout to = MOEBIUS_LAYOUT_TP;
};

struct Options {
  EngineOptions engine;
  std::string source, prompt, prompt_ids, prompts, switch_at, format = "text", logits_out, events;  // source: the flag given
  int64_t seam = -1;
  SamplingKeys sampling = SamplingKeys::object();
};

const char* const kFinish[] = {"none", "stop", "length", "abort", "error"};
const char* const kEvents[] = {"", "arrived", "token", "finished", "preempted", "cancelled", "switch_started", "seam",
                               "switch_finished", "switch_refused", "rolled_back", "decision"};

// A later library may have more of both.
const char* finish_name(int32_t reason) { return static_cast<size_t>(reason) < std::size(kFinish) ? kFinish[reason] : "error"; }

// What stands between commas; nothing of an empty text.
std::vector<std::string> items_of(const std::string& text) {
  std::vector<std::string> items;
  for (size_t at = 0, end = 0; !text.empty() && at <= text.size(); at = end + 1) {
    end = std::min(text.find(',', at), text.size());
    items.push_back(text.substr(at, end - at));
  }
  return items;
}

std::vector<Switch> parse_switches(const std::string& text) {
  std::vector<Switch> out;
  for (const std::string& item : items_of(text)) {
    const size_t colon = item.find(':');
    char* rest = nullptr;
    Switch s;
    errno = 0;
    s.step = std::strtoll(item.c_str(), &rest, 10);
    const std::string to = colon == std::string::npos ? "" : item.substr(colon + 1);
    if (colon == 0 || rest != item.c_str() + colon || s.step < 0 || errno != 0 || (to != "tp" && to != "ep"))
      throw BadInput("--switch-at: '" + item + "' is not STEP:tp or STEP:ep");
    s.to = to == "tp" ? MOEBIUS_LAYOUT_TP : MOEBIUS_LAYOUT_EP;
    out.push_back(s);
  }
  return out;
}

std::vector<int32_t> parse_ids(const std::string& text) {
  std::vector<int32_t> ids;
  for (const std::string& item : items_of(text)) {
    char* rest = nullptr;
    const long id = std::strtol(item.c_str(), &rest, 10);
    if (item.empty() || *rest != '\0' || id < 0 || id > INT32_MAX) throw BadInput("--prompt-ids: '" + item + "' is no token id");
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

struct Running {
  const PromptEntry* prompt = nullptr;
  std::vector<int32_t> tokens;
  json logprobs = json::array();
  std::vector<float> logits;
  int finish = MOEBIUS_FINISH_NONE;
};

class Generate {
 public:
  explicit Generate(const Options& o)
      : o_(o), switches_(parse_switches(o.switch_at)), logits_file_(o.logits_out, "--logits-out"), events_file_(o.events, "--events") {
    if (events_file_.is_same_file(logits_file_)) throw BadInput("--events and --logits-out are the same file");
    if (std::error_code unreadable; !std::filesystem::exists(o_.engine.model + "/config.json", unreadable)) throw BadInput(o_.engine.model + ": no model here, config.json is missing");
    load_tokenizer();
    read();
    moebius_cpp::Config config = o_.engine.config();
    if (!o_.logits_out.empty()) config.set("prefix_cache", int64_t{0});
    engine_.emplace(load(o_.engine, config));
    for (const PromptEntry& p : prompts_) try {
        engine_->validate(p.request);
      } catch (const moebius_cpp::Error& e) {
        throw BadInput(p.where + ": " + e.what());
      }
    if (o_.seam > engine_->model().num_layers)
      throw BadInput(fmt::format("--seam {} is outside 0 … {}", o_.seam, engine_->model().num_layers));
  }

  // One record for each request, whatever happens: an engine that fails ends those it has not finished with `error`.
  void run() {
    logits_file_.start();
    events_file_.start();
    runs_.resize(prompts_.size());
    for (size_t i = 0; i < prompts_.size(); ++i) runs_[i].prompt = &prompts_[i];
    std::exception_ptr failure;
    try {
      serve();
    } catch (const moebius_cpp::Error&) {
      failure = std::current_exception();
      take_events();
      for (Running& r : runs_)
        if (r.finish == MOEBIUS_FINISH_NONE) r.finish = MOEBIUS_FINISH_ERROR;
    }
    for (const Running& r : runs_) print(r);
    write_logits();
    events_file_.close();
    if (failure) std::rethrow_exception(failure);
    const auto failed = std::count_if(runs_.begin(), runs_.end(), [](const Running& r) { return r.finish == MOEBIUS_FINISH_ERROR; });
    if (failed > 0) throw std::runtime_error(fmt::format("{} of {} requests ended with an error", failed, runs_.size()));
  }

 private:
  void serve() {
    if (o_.seam >= 0) engine_->hold_seam(static_cast<int32_t>(o_.seam));
    for (int64_t step = 0; finished_ < runs_.size(); ++step) {
      for (const Switch& s : switches_)
        if (s.step == step) engine_->request_switch(s.to);
      arrive_and_cancel(step);
      if (finished_ == runs_.size()) break;
      engine_->step();
      take_events();
      last_step_ = step;
    }
    for (const Switch& s : switches_)
      if (s.step > last_step_)
        complain("warning: the switch to {} at step {} was not reached, the last step was {}\n", s.to == MOEBIUS_LAYOUT_TP ? "tp" : "ep",
                 s.step, last_step_);
  }

  void load_tokenizer() {
    const std::string path = o_.engine.model + "/tokenizer.json";
    if (std::error_code unreadable; !std::filesystem::exists(path, unreadable)) return;
    try {
      tokenizer_.emplace(o_.engine.model);
    } catch (const moebius_cpp::Error& e) {
      if (o_.source == "--prompt") throw BadInput(e.what());
      complain("warning: {}\n", e.what());  // ids do without it
    }
  }

  void read() {
    const bool keep = !o_.logits_out.empty();
    const moebius_cpp::Tokenizer* tokenizer = tokenizer_ ? &*tokenizer_ : nullptr;
    if (o_.source == "--prompts") {
      prompts_ = read_prompts(o_.prompts, o_.sampling, tokenizer, keep);
    } else if (o_.source == "--prompt-ids") {
      prompts_.push_back(one_prompt(parse_ids(o_.prompt_ids), "--prompt-ids", o_.sampling, keep));
    } else {
      if (tokenizer == nullptr) throw BadInput("--prompt: a text prompt needs " + o_.engine.model + "/tokenizer.json; give --prompt-ids instead");
      prompts_.push_back(one_prompt(tokenizer->encode(o_.prompt), "--prompt", o_.sampling, keep));
    }
  }

  void arrive_and_cancel(int64_t step) {
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const PromptEntry& p = prompts_[i];
      if (p.cancel_step == step && numbers_.count(i) == 0 && runs_[i].finish == MOEBIUS_FINISH_NONE) {
        abort_unborn(i, step);  // at or before its arrival, or still kept back by a full queue
      } else if (p.arrival_step <= step && numbers_.count(i) == 0 && runs_[i].finish == MOEBIUS_FINISH_NONE) {
        submit(i);
      } else if (p.cancel_step == step && numbers_.count(i) != 0 && runs_[i].finish == MOEBIUS_FINISH_NONE) {
        engine_->cancel(numbers_[i]);
      }
    }
  }

  void submit(size_t i) {
    const auto id = submit_if_room(*engine_, prompts_[i].request);
    if (!id) return;
    numbers_[i] = *id;
    by_number_[*id] = i;
  }

  void abort_unborn(size_t i, int64_t step) {
    runs_[i].finish = MOEBIUS_FINISH_ABORT;
    ++finished_;
    for (const char* type : {"cancelled", "finished"}) {
      ordered_json e = {{"step", step}, {"type", type}, {"id", prompts_[i].id}};
      if (std::strcmp(type, "finished") == 0) e["reason"] = "abort";
      write_event(e);
    }
  }

  void take_events() {
    std::vector<moebius_event> events;
    do {
      engine_->poll(events);
      for (const moebius_event& e : events) take(e);
    } while (!events.empty());
  }

  void take(const moebius_event& e) {
    Running* r = e.request != 0 ? &runs_[by_number_.at(e.request)] : nullptr;
    if (e.type == MOEBIUS_EVENT_TOKEN) {
      r->tokens.push_back(e.token);
      if (r->prompt->wants_logprobs) {
        ordered_json row = {{"token_id", e.token}, {"logprob", e.logprob}, {"top", json::array()}};
        for (int i = 0; i < e.num_top; ++i)
          row["top"].push_back(ordered_json{{"token_id", e.top_tokens[i]}, {"logprob", e.top_logprobs[i]}});
        r->logprobs.push_back(json(row));
      }
      return;
    }
    if (static_cast<size_t>(e.type) >= std::size(kEvents)) return;  // of a later library
    ordered_json row = {{"step", e.step}, {"type", kEvents[e.type]}};
    if (r != nullptr) row["id"] = r->prompt->id;
    if (e.type == MOEBIUS_EVENT_FINISHED) {
      r->finish = e.finish_reason;
      ++finished_;
      if (!o_.logits_out.empty()) r->logits = engine_->take_logits(e.request);
      row["reason"] = finish_name(e.finish_reason);
      if (e.finish_reason == MOEBIUS_FINISH_ERROR)
        complain("warning: request {} ended with an error: {}\n", r->prompt->id.dump(), e.reason);
    }
    if (e.type >= MOEBIUS_EVENT_SWITCH_STARTED) {
      row["from"] = e.from == MOEBIUS_LAYOUT_TP ? "tp" : "ep";
      row["to"] = e.to == MOEBIUS_LAYOUT_TP ? "tp" : "ep";
      row["seam"] = e.seam;
      if (e.type == MOEBIUS_EVENT_SWITCH_FINISHED || e.type == MOEBIUS_EVENT_ROLLED_BACK) {
        row["bytes"] = e.bytes;
        row["bytes_changed"] = e.bytes_changed;
        row["seconds"] = e.seconds;
      }
      if (e.reason[0] != '\0') row["reason"] = e.reason;
      if (e.type == MOEBIUS_EVENT_SWITCH_REFUSED) complain("warning: step {}: switch refused: {}\n", e.step, e.reason);
      if (e.type == MOEBIUS_EVENT_ROLLED_BACK) complain("warning: step {}: switch rolled back: {}\n", e.step, e.reason);
    }
    write_event(row);
  }

  void write_event(const ordered_json& row) {
    if (!events_file_) return;
    const std::string line = line_of(row) + "\n";
    events_file_.write(line.data(), line.size());
  }

  void print(const Running& r) {
    if (o_.format == "json") {
      const ordered_json record = {{"id", r.prompt->id},
                                   {"prompt_ids", r.prompt->prompt_ids},
                                   {"token_ids", r.tokens},
                                   {"logprobs", r.prompt->wants_logprobs ? r.logprobs : json()},
                                   {"finish_reason", finish_name(r.finish)}};
      fmt::print("{}\n", line_of(record));
      return;
    }
    if (prompts_.size() > 1) fmt::print("--- {} ({})\n", r.prompt->key, finish_name(r.finish));
    if (tokenizer_) {
      std::vector<int32_t> ids = r.prompt->prompt_ids;
      ids.insert(ids.end(), r.tokens.begin(), r.tokens.end());
      try {
        fmt::print("{}\n", tokenizer_->decode(ids, true));
        return;
      } catch (const moebius_cpp::Error& e) {  // an id of a padded vocabulary
        complain("moebius-generate: request {} as ids: {}\n", r.prompt->key, e.what());
      }
    }
    fmt::print("{}\n", fmt::join(r.tokens, " "));
  }

  // safetensors: float32 logits.<id> [T, vocab].
  void write_logits() {
    if (!logits_file_) return;
    const int64_t vocab = engine_->model().vocab_size;
    std::map<std::string, const std::vector<float>*> order;
    for (const Running& r : runs_) order["logits." + r.prompt->key] = &r.logits;
    ordered_json header = ordered_json::object();
    uint64_t at = 0;
    for (const auto& [name, logits] : order) {
      const uint64_t bytes = logits->size() * sizeof(float);
      header[name] = {{"dtype", "F32"}, {"shape", {static_cast<int64_t>(logits->size()) / vocab, vocab}}, {"data_offsets", {at, at + bytes}}};
      at += bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const uint64_t size = text.size();
    logits_file_.write(&size, sizeof size);
    logits_file_.write(text.data(), text.size());
    for (const auto& [name, logits] : order)
      if (!logits->empty()) logits_file_.write(logits->data(), logits->size() * sizeof(float));
    logits_file_.close();
  }

  Options o_;
  std::vector<Switch> switches_;
  OutputFile logits_file_, events_file_;
  std::optional<moebius_cpp::Tokenizer> tokenizer_;
  std::vector<PromptEntry> prompts_;
  std::optional<moebius_cpp::Engine> engine_;
  std::vector<Running> runs_;
  std::map<size_t, uint64_t> numbers_;
  std::map<uint64_t, size_t> by_number_;
  size_t finished_ = 0;
  int64_t last_step_ = -1;
};

void add_sampling(CLI::App& app, SamplingKeys& keys) {
  const auto integer = [&](const char* flag, const char* key, const char* doc, const char* shown) {
    app.add_option_function<int64_t>(
           flag, [&keys, key](const int64_t& v) { keys[key] = v; }, doc)
        ->check(fits_int64())
        ->default_str(shown)
        ->group("Sampling");
  };
  const auto real = [&](const char* flag, const char* key, const char* doc, const char* shown) {
    app.add_option_function<double>(flag, [&keys, key](const double& v) { keys[key] = v; }, doc)->default_str(shown)->group("Sampling");
  };
  integer("--max-tokens", "max_tokens", "tokens to generate at most", "16");
  integer("--min-tokens", "min_tokens", "no end before so many tokens", "0");
  real("--temperature", "temperature", "0 is greedy", "1");
  real("--top-p", "top_p", "the most likely tokens that make up this probability", "1");
  integer("--top-k", "top_k", "the k most likely tokens (0: all)", "0");
  real("--min-p", "min_p", "tokens at least this likely, relative to the likeliest", "0");
  real("--presence-penalty", "presence_penalty", "against tokens generated before", "0");
  real("--frequency-penalty", "frequency_penalty", "the same, by how often", "0");
  real("--repetition-penalty", "repetition_penalty", "against tokens of prompt and output", "1");
  integer("--sampling-seed", "seed", "seed of every request (unset: hash of --seed and the request's id)", "unset");
  integer("--n", "n", "samples of a prompt; a record holds one, so only 1 is taken", "1");
  integer("--priority", "priority", "lower values run first, then arrival", "0");
  real("--deadline-ms", "deadline_ms", "a request that takes longer ends with abort (0: none)", "0");
  integer("--logprobs", "logprobs", "log-probabilities of the chosen and the k likeliest tokens", "none");
  app.add_flag_function("--ignore-eos", [&keys](int64_t) { keys["ignore_eos"] = true; }, "go on after an end-of-text token")->group("Sampling");
  const auto ids = [&](const char* flag, const char* key, const char* doc) {
    app.add_option_function<std::vector<int32_t>>(flag, [&keys, key](const std::vector<int32_t>& v) { keys[key] = v; }, doc)
        ->delimiter(',')
        ->default_str("none")
        ->group("Sampling");
  };
  ids("--stop-token-ids", "stop_token_ids", "end after one of these");
  ids("--allowed-token-ids", "allowed_token_ids", "choose among these only");
  app.add_option_function<std::string>(
         "--logit-bias", [&keys](const std::string& text) { keys["logit_bias"] = parse_strictly(text, "--logit-bias"); },
         "added to these logits: {\"17\": 2.5, \"4\": -100}")
      ->default_str("none")
      ->group("Sampling");
}

}  // namespace
}  // namespace moebius_examples

int main(int argc, char** argv) {
  using namespace moebius_examples;
  return run_program("moebius-generate", [&] {
    Options o;
    CLI::App app{"Generates from one prompt or a file of them, switching layouts at given steps. Results go to stdout, everything else to stderr."};
    o.engine.add_to(app, true);
    auto* source = app.add_option_group("Prompt", "exactly one of");
    source->add_option("--prompt", o.prompt, "text (needs the model's tokenizer.json)");
    source->add_option("--prompt-ids", o.prompt_ids, "token ids: 1,2,3");
    source->add_option("--prompts", o.prompts,
                       "file of JSON lines: id, prompt or prompt_ids, max_tokens, arrival_step, cancel_step, priority, sampling keys");
    source->require_option(1);
    app.add_option("--seed", o.engine.seed, "seed of the engine")->check(fits_int64())->capture_default_str();
    app.add_option("--switch-at", o.switch_at, "switches: STEP:tp or STEP:ep, separated by commas")->default_str("none");
    app.add_option("--seam", o.seam, "hold the seam at this layer: layers before it in TP, the others in EP")
        ->check(at_least(0))
        ->default_str("not held");
    app.add_option("--format", o.format, "text or json (one record a line)")->check(CLI::IsMember({"text", "json"}))->capture_default_str();
    app.add_option("--logits-out", o.logits_out, "safetensors file for every position's logits; turns the prefix cache off")
        ->default_str("none");
    app.add_option("--events", o.events, "file for events, JSON lines")->default_str("none");
    add_sampling(app, o.sampling);
    parse_or_exit(app, argc, argv);
    for (const CLI::Option* option : source->get_options())
      if (option->count() > 0) o.source = option->get_name();
    before_running([&] { return std::make_unique<Generate>(o); })->run();
  });
}
