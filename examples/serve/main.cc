// moebius-serve: an OpenAI-compatible server over the public API, with a page that shows load, seam and switches while it runs.
#include <unistd.h>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <thread>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/serve/service.h"

namespace {

using namespace moebius_examples;

constexpr size_t kReserve = 32;            // connections beside those that generate: health, metrics, the page
constexpr int64_t kMostChoices = 128;      // of one request, as OpenAI has it
constexpr int64_t kMostConnections = 960;  // httplib takes no descriptor from 1,024 on

struct Options {
  EngineOptions engine;
  std::string host = "127.0.0.1", api_key, api_key_file, model_name, chat_template;
  int port = 8000;
  int64_t max_body_bytes = 1 << 20, max_waiting = 256;
  double request_timeout_s = 600, read_timeout_s = 30, write_timeout_s = 10, drain_s = 30;

  void add_to(CLI::App& app);
  size_t max_generations() const { return static_cast<size_t>(engine.max_batch + max_waiting); }
};

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(std::min(seconds, 1e9) * 1000));
}

void Options::add_to(CLI::App& app) {
  engine.policy = "measured";
  engine.add_to(app, true);
  app.remove_option(app.get_option("--max-queue"));  // here --max-waiting
  app.add_option("--host", host, "address to listen on")->capture_default_str();
  app.add_option("--port", port, "port to listen on (0: any free one)")->check(CLI::Range(0, 65535))->capture_default_str();
  auto* key = app.add_option("--api-key", api_key, "asked of clients of /v1; seen by who lists processes: better --api-key-file")
                  ->check([](const std::string& text) { return std::string(text.empty() ? "an empty key is none" : ""); })
                  ->default_str("none");
  app.add_option("--api-key-file", api_key_file, "file whose first line is the key")->excludes(key)->default_str("none");
  app.add_option("--served-model-name", model_name, "name that clients give as model")->default_str("the model folder's");
  app.add_option("--chat-template", chat_template, "form of chats: chatml, mistral or plain")
      ->check(CLI::IsMember({"chatml", "mistral", "plain"}))
      ->default_str("what the model folder's template is recognised as");
  app.add_option("--max-body-bytes", max_body_bytes, "larger bodies are answered 413")->check(at_least(1))->capture_default_str();
  app.add_option("--max-waiting", max_waiting, "waiting requests; what is beyond is answered 429")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--request-timeout-s", request_timeout_s, "an answer that takes longer ends")->check(at_least(0))->capture_default_str();
  app.add_option("--read-timeout-s", read_timeout_s, "time for a request to come whole")->check(at_least(0))->capture_default_str();
  app.add_option("--write-timeout-s", write_timeout_s, "a client that takes nothing for so long is let go")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--drain-s", drain_s, "time for running requests to end after SIGTERM or SIGINT")
      ->check(at_least(0))
      ->capture_default_str();
}

std::string key_of(const Options& options) {
  if (options.api_key_file.empty()) return options.api_key;
  std::ifstream in(options.api_key_file);
  std::string line;
  if (!in || !std::getline(in, line)) throw BadInput("cannot read a key from " + options.api_key_file);
  if (!line.empty() && line.back() == '\r') line.pop_back();
  if (line.empty()) throw BadInput(options.api_key_file + " begins with an empty line instead of a key");
  return line;
}

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

bool asked_to_stop() {
  sigset_t pending;
  sigpending(&pending);
  return sigismember(&pending, SIGTERM) == 1 || sigismember(&pending, SIGINT) == 1;
}

struct Interrupted {};

moebius_cpp::Engine load_or_stop(const EngineOptions& options, moebius_cpp::Config& config) {
  try {
    auto engine = load(options, config, asked_to_stop);
    if (asked_to_stop()) throw Interrupted();  // since the last weights came
    return engine;
  } catch (const moebius_cpp::Error& e) {
    if (e.code() == MOEBIUS_E_CANCELLED) throw Interrupted();
    throw;
  }
}

// Tokens of a request that fit the context and either layout; in EP one rank holds all of it.
int64_t longest_request(moebius_cpp::Engine& engine) {
  moebius_memory m{};
  m.struct_size = sizeof m;
  moebius_cpp::check([&](moebius_error** e) { return moebius_engine_memory(engine.get(), &m, e); });
  return std::min({engine.model().max_context, m.tp_tokens, m.ep_tokens / m.num_ranks});
}

std::string address(const std::string& host, int port) {
  const bool v6 = host.find(':') != std::string::npos;
  return fmt::format("http://{}{}{}:{}", v6 ? "[" : "", host, v6 ? "]" : "", port);
}

void serve(Options options) {
  // Threads inherit the mask: the signals wait for sigwait below, and no call anywhere is interrupted by them.
  const sigset_t signals = stop_signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  options.engine.max_queue = options.max_waiting;
  if (const auto connections = static_cast<int64_t>(options.max_generations() + kReserve); connections > kMostConnections)
    throw BadInput(fmt::format("--max-batch {} and --max-waiting {} take {} connections, at most {} can be held", options.engine.max_batch,
                               options.max_waiting, connections, kMostConnections));
  ServiceOptions service_options;
  service_options.api_key = key_of(options);
  service_options.max_body_bytes = static_cast<size_t>(options.max_body_bytes);
  service_options.max_generations = options.max_generations();
  service_options.request_timeout = milliseconds(options.request_timeout_s);

  HttpLimits limits;
  limits.connections = options.max_generations() + kReserve;
  limits.body_bytes = 2 * service_options.max_body_bytes + (64 << 10);  // with the frames of a chunked one
  limits.read = milliseconds(options.read_timeout_s);
  limits.write = milliseconds(options.write_timeout_s);
  HttpServer server(limits);
  const int port = server.bind(options.host, options.port);  // before the load: a port that is taken is known at once
  if (port <= 0)
    throw BadInput(fmt::format("cannot listen on {} port {}: is it taken, or the address not this machine's?", options.host, options.port));

  if (!std::filesystem::is_directory(options.engine.model)) throw BadInput(fmt::format("--model '{}': no such directory", options.engine.model));
  const auto tokenizer = before_running([&] { return moebius_cpp::Tokenizer(options.engine.model); });
  const ChatTemplate chat(options.engine.model, options.chat_template);
  auto config = before_running([&] { return options.engine.config(); });
  auto engine = before_running([&] { return load_or_stop(options.engine, config); });
  const Serving serving{engine,
                        tokenizer,
                        chat,
                        options.model_name.empty() ? folder_name(options.engine.model) : options.model_name,
                        longest_request(engine),
                        std::min(kMostChoices, options.max_waiting)};
  Broker broker(engine);
  Service service(engine, broker, serving, service_options);
  service.attach(server);

  fmt::print("{}\n", address(options.host, port));
  std::fflush(stdout);
  std::atomic<bool> lost{false};  // the listening socket
  std::thread listener([&] {
    lost = !server.listen_after_bind();
    if (lost) kill(getpid(), SIGTERM);
  });
  int signal = 0;
  sigwait(&signals, &signal);
  complain("moebius-serve: stopping; running requests have {} s\n", options.drain_s);
  service.drain(milliseconds(options.drain_s));
  server.stop_all();
  listener.join();
  if (lost) throw std::runtime_error("the listening socket failed");
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("moebius-serve", [&] {
    CLI::App app{"Serves a model over HTTP as OpenAI does, and switches between tensor and expert parallelism while requests run."};
    Options options;
    options.add_to(app);
    parse_or_exit(app, argc, argv);
    try {
      serve(options);
    } catch (const Interrupted&) {
      complain("moebius-serve: stopped while loading\n");
    }
  });
}
