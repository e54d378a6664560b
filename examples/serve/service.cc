#include "examples/serve/service.h"

#include <strings.h>
#include <ctime>
#include <random>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/common/strict_json.h"
#include "examples/serve/answer.h"
#include "examples/serve/http_error.h"
#include "examples/serve/page.h"

namespace moebius_examples {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using Clock = std::chrono::steady_clock;
using httplib::Server;

constexpr auto kLook = 100ms;     // at whether an answer is still wanted
constexpr auto kHeartbeat = 1s;   // a comment in a stream in which nothing came
constexpr size_t kWriteBytes = 64 << 10;  // of a stream, until it is looked whether it may go on
constexpr int kClientGone = 499;  // nobody reads it; it counts in the metrics
constexpr const char* kModels = "/v1/models";
constexpr const char* kLayout = "/v1/moebius/layout";
constexpr const char* kHistory = "/v1/moebius/history";
constexpr const char* kCompletions = "/v1/completions";
constexpr const char* kChat = "/v1/chat/completions";

struct Route {
  const char* path;
  bool get, post;
};
constexpr Route kRoutes[] = {{"/", true, false},      {"/health", true, false},    {"/metrics", true, false}, {kModels, true, false},
                             {kHistory, true, false}, {kCompletions, false, true}, {kChat, false, true},      {kLayout, true, true}};

// Throws HttpError(404).
const Route& route_of(const std::string& path) {
  const bool one_model = path.rfind(std::string(kModels) + "/", 0) == 0;
  for (const Route& r : kRoutes)
    if (path == r.path || (one_model && r.path == kModels)) return r;
  throw HttpError(404, "there is no " + path, "", "not_found");
}

void set_json(httplib::Response& res, int status, const json& body) {
  res.status = status;
  res.set_content(line_of(body) + "\n", "application/json");
}

void set_error(httplib::Response& res, const HttpError& error) {
  set_json(res, error.status, error.body());
  if (error.status == 429 || error.status == 503) res.set_header("Retry-After", "1");
  if (error.status == 401) res.set_header("WWW-Authenticate", "Bearer");
}

// The body of this request has not been read: whatever the client sends next is no request.
void end_connection(httplib::Response& res) {
  if (Connection* c = Connection::current()) c->end_after_answer();
  res.set_header("Connection", "close");
}

// Takes as long whatever the first difference is, so that its time says nothing about the key.
bool equal_in_constant_time(const std::string& given, const std::string& key) {
  unsigned difference = given.size() != key.size();
  for (size_t i = 0; i < given.size(); ++i) difference |= static_cast<unsigned char>(given[i] ^ key[i % key.size()]);
  return difference == 0;
}

bool has_key(const httplib::Request& req, const std::string& key) {
  const std::string given = req.get_header_value("Authorization"), scheme = "Bearer ";
  return strncasecmp(given.c_str(), scheme.c_str(), scheme.size()) == 0 && equal_in_constant_time(given.substr(scheme.size()), key);
}

// Whatever parameters it has.
bool is_json(const std::string& type) {
  std::string kind = type.substr(0, type.find(';'));
  kind.erase(kind.find_last_not_of(" \t") + 1);
  return strcasecmp(kind.c_str(), "application/json") == 0;
}

bool expects_body(const httplib::Request& req) { return req.has_header("Content-Length") || req.has_header("Transfer-Encoding"); }

std::string event(const json& data) { return "data: " + line_of(data) + "\n\n"; }

// Ids of two runs of the server do not meet.
std::string random_prefix() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}", random(), random());
}

std::string fingerprint_of(const moebius_model_info& m) {
  int32_t major = 0, minor = 0, patch = 0;
  moebius_version(&major, &minor, &patch);
  return fmt::format("moebius-{}.{}.{}-s{}-a{}", major, minor, patch, m.slices_per_expert, m.head_groups);
}

}  // namespace

// One HTTP request that generates, from its acceptance to the end of its answer.
struct Service::Job {
  Job(Service& s, bool chat, const std::string& body)
      : ticket(s),
        request(read_generate_request(body, chat, s.serving_)),
        generation(submit(s, request)),
        transcript(s.serving_.tokenizer, request.text, request.choices()),
        answer(request, s.serving_.tokenizer, fmt::format("{}-{}{:x}", chat ? "chatcmpl" : "cmpl", s.id_prefix_, s.next_id_++),
               s.serving_.model_name, s.fingerprint_),
        deadline(Clock::now() + s.options_.request_timeout),
        heartbeat(Clock::now() + kHeartbeat) {}

  static std::unique_ptr<Generation> submit(Service& s, const GenerateRequest& request) {
    try {
      return s.broker_.submit(request.requests, request.n);
    } catch (const moebius_cpp::Error& e) {
      throw http_error(e);
    }
  }

  // What came, as text. A choice that a stop string has ended is cancelled.
  std::vector<Piece> next() {
    std::vector<Piece> pieces;
    for (const Item& item : generation->wait(kLook)) {
      std::optional<Piece> piece = transcript.take(item);
      if (!piece) continue;
      if (piece->finish_reason != nullptr && item.finish_reason == MOEBIUS_FINISH_NONE)
        generation->cancel(item.choice);
      if (item.finish_reason == MOEBIUS_FINISH_ERROR) throw HttpError(500, "the request failed: " + item.why);
      pieces.push_back(std::move(*piece));
    }
    return pieces;
  }

  Ticket ticket;
  GenerateRequest request;
  std::unique_ptr<Generation> generation;
  Transcript transcript;
  Answer answer;
  Clock::time_point deadline, heartbeat;
  bool began = false;
};

Service::Ticket::Ticket(Service& service) : service_(service) {
  std::lock_guard lock(service_.mutex_);
  if (service_.draining_) throw HttpError(503, "the server is shutting down", "", "draining");
  if (service_.generations_ >= service_.options_.max_generations)
    throw HttpError(429, fmt::format("{} requests are running or waiting already", service_.generations_), "", "queue_full");
  ++service_.generations_;
}

Service::Ticket::~Ticket() {
  std::lock_guard lock(service_.mutex_);
  if (--service_.generations_ == 0) service_.idle_.notify_all();
}

Service::Service(moebius_cpp::Engine& engine, Broker& broker, const Serving& serving, const ServiceOptions& options)
    : engine_(engine),
      broker_(broker),
      serving_(serving),
      options_(options),
      model_(engine.model()),
      started_(std::time(nullptr)),
      id_prefix_(random_prefix()),
      fingerprint_(fingerprint_of(model_)) {}

void Service::drain(std::chrono::milliseconds most) {
  std::unique_lock lock(mutex_);
  draining_ = true;
  const auto idle = [&] { return generations_ == 0; };
  idle_.wait_for(lock, most, idle);
  ending_ = true;  // also for who waits for a switch
  idle_.wait_for(lock, kLastWords, idle);
}

// ---- the way in

void Service::attach(HttpServer& server) {
  server_ = &server;
  server.set_pre_routing_handler([this](const Request& req, Response& res) { return admit(req, res); });
  const auto post = [&](const char* path, auto handler) {
    server.Post(path, [this, handler](const Request& req, Response& res, const httplib::ContentReader& reader) {
      handler(req, expects_body(req) ? read_body(reader, res) : std::string(), res);
    });
  };
  post(kCompletions, [this](const Request& req, const std::string& body, Response& res) { generate(req, false, body, res); });
  post(kChat, [this](const Request& req, const std::string& body, Response& res) { generate(req, true, body, res); });
  post(kLayout, [this](const Request&, const std::string& body, Response& res) { switch_layout(body, res); });

  server.set_expect_100_continue_handler([this](const Request& req, Response& res) {
    try {
      check_body_headers(req);
      return 100;
    } catch (const HttpError& e) {
      set_error(res, e);
      end_connection(res);
      return e.status;
    }
  });
  server.set_exception_handler([](const Request&, Response& res, std::exception_ptr thrown) {
    res.headers.erase("Content-Type");
    try {
      std::rethrow_exception(thrown);
    } catch (const HttpError& e) {
      set_error(res, e);
    } catch (const moebius_cpp::Error& e) {
      set_error(res, http_error(e));
    } catch (const std::exception& e) {
      set_error(res, HttpError(500, e.what()));
    }
  });
  server.set_error_handler(Server::Handler([](const Request&, Response& res) {
    if (!res.body.empty()) return;
    set_error(res, HttpError(res.status, "the request is no HTTP that this server understands"));  // httplib's own refusal
    end_connection(res);
  }));
  server.set_logger([this](const Request&, const Response& res) { count(res.status); });
}

// Before a body is read: is there such an endpoint, may the client use it, is what it sends of the right kind and size?
Server::HandlerResponse Service::admit(const Request& req, Response& res) {
  try {
    const Route& route = route_of(req.path);
    const bool reads = req.method == "GET" || req.method == "HEAD", writes = req.method == "POST";
    if (!(reads && route.get) && !(writes && route.post)) {
      res.set_header("Allow", route.get && route.post ? "GET, HEAD, POST" : route.get ? "GET, HEAD" : "POST");
      throw HttpError(405, req.method + " is not for " + req.path, "", "method_not_allowed");
    }
    if (!options_.api_key.empty() && req.path.rfind("/v1/", 0) == 0 && !has_key(req, options_.api_key))
      throw HttpError(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", "", "invalid_api_key");
    if (writes) {
      check_body_headers(req);
      if (Connection* c = Connection::current()) c->allow_body();
      return Server::HandlerResponse::Unhandled;  // on to the handler, which reads the body
    }
    if (expects_body(req)) end_connection(res);  // of which nobody reads it
    get(req, res);
  } catch (const HttpError& e) {
    set_error(res, e);
    if (expects_body(req)) end_connection(res);
  }
  return Server::HandlerResponse::Handled;
}

void Service::check_body_headers(const Request& req) const {
  // Other types can be sent by any web page without the browser asking first.
  if (!is_json(req.get_header_value("Content-Type"))) throw HttpError(415, "Content-Type must be application/json");
  // Who is in front of this server must find the same end of a body.
  const size_t lengths = req.get_header_value_count("Content-Length"), codings = req.get_header_value_count("Transfer-Encoding");
  const std::string length = req.get_header_value("Content-Length");
  if (lengths + codings > 1 || (lengths == 1 && (length.empty() || length.find_first_not_of("0123456789") != std::string::npos)) ||
      (codings == 1 && strcasecmp(req.get_header_value("Transfer-Encoding").c_str(), "chunked") != 0))
    throw HttpError(400, "a body must have one Content-Length, or Transfer-Encoding: chunked, and not both");
  if (const std::string packing = req.get_header_value("Content-Encoding");
      !packing.empty() && strcasecmp(packing.c_str(), "identity") != 0 && strcasecmp(packing.c_str(), "gzip") != 0 && strcasecmp(packing.c_str(), "deflate") != 0)
    throw HttpError(415, "Content-Encoding must be gzip, deflate or identity");
  if (lengths == 1 && (length.size() > 18 || std::stoull(length) > options_.max_body_bytes))
    throw HttpError(413, fmt::format("the body has more than {} bytes (--max-body-bytes)", options_.max_body_bytes));
}

std::string Service::read_body(const httplib::ContentReader& reader, Response& res) const {
  std::string body;
  bool fits = true;
  const bool whole = reader([&](const char* data, size_t size) {
    fits = body.size() + size <= options_.max_body_bytes;  // unpacked: the length that was announced says nothing of it
    if (fits) body.append(data, size);
    return fits;
  });
  if (whole) return body;
  end_connection(res);
  if (!fits) throw HttpError(413, fmt::format("the body has more than {} bytes (--max-body-bytes)", options_.max_body_bytes));
  throw HttpError(400, "the body did not come whole, or in time");
}

void Service::get(const Request& req, Response& res) {
  const std::string& path = req.path;
  if (path == "/") {
    res.status = 200;
    res.set_header("Content-Security-Policy",
                   "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:");
    res.set_header("Cache-Control", "no-cache");
    res.set_content(kPage, sizeof kPage - 1, "text/html; charset=utf-8");
  } else if (path == "/health") {
    health(res);
  } else if (path == "/metrics") {
    res.status = 200;
    res.set_content(metrics(), "text/plain; version=0.0.4; charset=utf-8");
  } else if (path == kLayout) {
    set_json(res, 200, layout());
  } else if (path == kModels) {
    set_json(res, 200, models());
  } else if (path.rfind(kModels, 0) == 0) {
    const json model = models()["data"][0];
    const std::string name = path.substr(std::string(kModels).size() + 1);
    if (name != serving_.model_name) throw HttpError(404, "there is no model '" + name + "'", "model", "model_not_found");
    set_json(res, 200, model);
  } else {
    set_json(res, 200, broker_.history().since(std::strtod(req.get_param_value("since").c_str(), nullptr)));
  }
}

// ---- generating

void Service::generate(const Request& req, bool chat, const std::string& body, Response& res) {
  const auto job = std::make_shared<Job>(*this, chat, body);
  if (!job->request.stream) return answer_whole(*job, res);
  res.status = 200;
  res.set_header("Cache-Control", "no-cache");
  ++streams_;
  const auto next = [this, job](size_t, httplib::DataSink& sink) { return stream_next(*job, sink); };
  const auto end = [this](bool success) {
    --streams_;
    if (!success) ++clients_gone_;
  };
  if (req.version != "HTTP/1.0") return res.set_chunked_content_provider("text/event-stream", next, end);
  end_connection(res);  // it knows no chunks: the stream ends with the connection
  res.set_content_provider("text/event-stream", next, end);
}

// Throws why an answer ends before its time.
void Service::end_if_due(const Job& job) const {
  if (ending_) throw HttpError(503, "the server is shutting down", "", "draining");
  if (Clock::now() >= job.deadline) throw HttpError(504, "the request took longer than --request-timeout-s", "", "timeout");
  if (job.generation->overran()) throw HttpError(kClientGone, "the answer was not read fast enough", "", "slow_reader");
}

void Service::answer_whole(Job& job, Response& res) {
  while (!job.transcript.all_ended()) {
    if (const Connection* c = Connection::current(); c != nullptr && c->gone()) {
      ++clients_gone_;
      throw HttpError(kClientGone, "the client has closed the connection");
    }
    end_if_due(job);
    for (const Piece& piece : job.next()) job.answer.add(piece);
  }
  res.status = 200;
  res.body = job.answer.whole(job.transcript.completion_tokens()) + "\n";  // set_content would copy it
  res.set_header("Content-Type", "application/json");
}

// Writes what has come, at least once in kHeartbeat; false: nobody reads it.
bool Service::stream_next(Job& job, httplib::DataSink& sink) {
  std::string out;
  bool done = false;
  const auto write = [&] { return sink.is_writable() && sink.write(out.data(), out.size()); };
  try {
    if (!std::exchange(job.began, true) && job.request.chat)
      for (size_t i = 0; i < job.request.choices(); ++i) out += event(job.answer.first_chunk(static_cast<int32_t>(i)));
    end_if_due(job);
    for (const Piece& piece : job.next()) {
      if (const json chunk = job.answer.chunk(piece); !chunk.is_null()) out += event(chunk);
      if (out.size() < kWriteBytes) continue;
      if (!write()) return false;
      out.clear();
      end_if_due(job);  // however slowly it is read
    }
    done = job.transcript.all_ended();
    if (done && job.request.include_usage) out += event(job.answer.usage_chunk(job.transcript.completion_tokens()));
  } catch (const HttpError& e) {  // the status has been sent: the error is an event
    out += event(e.body());
    done = true;
  } catch (const std::exception&) {  // no memory: the stream breaks off
    return false;
  }
  if (done) out += "data: [DONE]\n\n";
  const auto now = Clock::now();
  if (out.empty() && now >= job.heartbeat) out = ": waiting\n\n";
  if (out.empty()) return sink.is_writable();
  job.heartbeat = now + kHeartbeat;
  if (!write()) return false;
  if (done) sink.done();
  return true;
}

// ---- layout

void Service::switch_layout(const std::string& text, Response& res) {
  json body;
  try {
    body = parse_strictly(text, "the body");
  } catch (const BadInput& e) {
    throw HttpError(400, e.what());
  }
  if (!body.is_object()) throw HttpError(400, "the body must be a JSON object");
  for (const auto& [key, value] : body.items())
    if (key != "layout" && key != "stall_budget_ms" && key != "wait")
      throw HttpError(400, key + " is not known: layout, stall_budget_ms and wait are", key);
  const json name = body.value("layout", json()), budget = body.value("stall_budget_ms", json()), wait = body.value("wait", json(true));
  if (name != "tp" && name != "ep") throw HttpError(400, "layout must be tp or ep", "layout");
  if (!budget.is_null() && !budget.is_number()) throw HttpError(400, "stall_budget_ms must be a number", "stall_budget_ms");
  if (!wait.is_boolean()) throw HttpError(400, "wait must be true or false", "wait");
  if (!budget.is_null()) engine_.set_stall_budget(budget.get<double>());
  const moebius_layout to = name == "tp" ? MOEBIUS_LAYOUT_TP : MOEBIUS_LAYOUT_EP;
  if (!wait.get<bool>()) {
    broker_.switch_to(to, [] { return false; });
    return set_json(res, 202, {{"outcome", "asked"}, {"layout", name}});
  }
  const auto deadline = Clock::now() + options_.request_timeout;
  const auto outcome = broker_.switch_to(to, [&] { return Clock::now() < deadline && !ending_ && !Connection::current()->gone(); });
  if (!outcome) throw HttpError(504, "the outcome of the switch was not waited for: see GET " + std::string(kLayout), "", "timeout");
  const moebius_event& e = outcome->event;
  switch (outcome->kind) {
    case SwitchOutcome::kFinished: break;
    case SwitchOutcome::kRefused: throw HttpError(409, std::string("refused: ") + e.reason, "layout", "refused");
    case SwitchOutcome::kTurned: throw HttpError(409, "turned round by a later request for the other layout", "layout", "turned");
    case SwitchOutcome::kRolledBack: throw HttpError(500, std::string("rolled back: ") + e.reason, "layout", "rolled_back");
  }
  set_json(res, 200,
           {{"outcome", "finished"},
            {"layout", name},
            {"seam", e.seam},
            {"bytes", e.bytes},
            {"bytes_changed", e.bytes_changed},
            {"seconds", e.seconds},
            {"reason", e.reason}});
}

json Service::layout() const {
  moebius_stats s;
  moebius_switch_estimate estimate{};
  moebius_layout other;
  for (int look = 0; look < 3; ++look) {  // an estimate waits for the step under way, which may switch
    s = engine_.stats();
    other = s.seam == 0 ? MOEBIUS_LAYOUT_TP : MOEBIUS_LAYOUT_EP;
    estimate.struct_size = sizeof estimate;
    moebius_cpp::check([&](moebius_error** e) { return moebius_engine_estimate_switch(engine_.get(), other, &estimate, e); });
    if (engine_.stats().seam == s.seam) break;
  }
  const char* const present = s.seam == s.num_layers ? "tp" : s.seam == 0 ? "ep" : "mixed";
  return {{"model", serving_.model_name},
          {"layout", present},
          {"seam", s.seam},
          {"layers", s.num_layers},
          {"switching", s.switching != 0},
          {"switches", s.switches},
          {"refusals", s.refusals},
          {"rollbacks", s.rollbacks},
          {"bytes_moved", s.bytes_moved},
          {"switch_seconds", s.switch_seconds},
          {"last", broker_.history().last_switch()},
          {"estimate",
           {{"layout", name_of_layout(other)},
            {"fits", estimate.fits != 0},
            {"bytes", estimate.bytes},
            {"bytes_changed", estimate.bytes_changed},
            {"seconds", estimate.seconds},
            {"reason", estimate.reason}}}};
}

// ---- reports

json Service::models() const {
  return {{"object", "list"},
          {"data",
           {{{"id", serving_.model_name},
             {"object", "model"},
             {"created", started_},
             {"owned_by", "moebius"},
             {"max_model_len", serving_.max_context}}}}};
}

void Service::health(Response& res) const {
  if (draining_) return set_json(res, 503, {{"status", "draining"}});
  try {
    moebius_cpp::Request least({0});
    least.set("max_tokens", int64_t{1});
    engine_.validate(least);  // refused by an engine that has failed, and only by it
    set_json(res, 200, {{"status", "ok"}});
  } catch (const moebius_cpp::Error& e) {
    set_json(res, 503, {{"status", "failed"}, {"reason", e.what()}});
  }
}

void Service::count(int status) {
  std::lock_guard lock(mutex_);
  ++answers_[status];
}

std::string Service::metrics() {
  std::string out = engine_.metrics_text();
  const auto add = [&](const char* type, const char* name, const char* help, auto value) {
    out += fmt::format("# HELP moebius_http_{0} {1}\n# TYPE moebius_http_{0} {2}\nmoebius_http_{0} {3}\n", name, help, type, value);
  };
  add("gauge", "streams_open", "Streams that are being written.", streams_.load());
  add("gauge", "connections_open", "Connections that have a thread.", server_->open_connections());
  add("counter", "connections_refused_total", "Connections answered 503 because all threads were taken.", server_->refused_connections());
  add("counter", "clients_gone_total", "Clients that left, or stopped reading, before their answer was whole.", clients_gone_.load());
  out += "# HELP moebius_http_requests_total Answers by status (499: the client had left).\n# TYPE moebius_http_requests_total counter\n";
  std::lock_guard lock(mutex_);
  for (const auto& [status, times] : answers_) out += fmt::format("moebius_http_requests_total{{code=\"{}\"}} {}\n", status, times);
  return out;
}

}  // namespace moebius_examples
