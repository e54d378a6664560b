// Streams the text of several requests at once from C++17, cancels one, and changes the layout while they run. The host drives: each call of
// step() computes on this thread.
// Usage: moebius-cpp-example MODEL_DIR
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include <moebius/moebius.hpp>

namespace {

struct Stream {
  int number;
  moebius_cpp::Decoder decoder;
};

moebius_cpp::Config settings() {
  moebius_cpp::Config config;
  config.set("ranks", int64_t{2}).set("max_batch", int64_t{8}).set("kv_tokens", int64_t{4096});
  return config;
}

void run(const moebius_cpp::Tokenizer& tokenizer, moebius_cpp::Engine& engine) {
  std::map<uint64_t, Stream> streams;
  uint64_t last = 0;
  for (const char* prompt : {"ROMEO:", "First Citizen:\n", "What say you", "The king"}) {
    const auto number = static_cast<int>(streams.size());
    moebius_cpp::Request request(tokenizer.encode(prompt));
    request.set("max_tokens", int64_t{number == 3 ? 1000 : 60}).set("ignore_eos", int64_t{1}).set_real("temperature", 0.8);
    last = engine.submit(request);
    streams.emplace(last, Stream{number, moebius_cpp::Decoder(tokenizer)});
  }

  const char* const reasons[] = {"", "stop", "length", "abort", "error"};
  std::vector<moebius_event> events;
  int tokens = 0;
  for (size_t left = streams.size(); left > 0;) {
    engine.step();
    engine.poll(events);
    for (const moebius_event& e : events) {
      if (e.type == MOEBIUS_EVENT_SWITCH_FINISHED)
        std::printf("switched to expert parallelism: %lld bytes in %.2f ms\n", static_cast<long long>(e.bytes), 1e3 * e.seconds);
      if (e.type != MOEBIUS_EVENT_TOKEN && e.type != MOEBIUS_EVENT_FINISHED) continue;
      Stream& stream = streams.at(e.request);
      if (e.type == MOEBIUS_EVENT_TOKEN) {
        const std::string text(stream.decoder.push(e.token));
        if (!text.empty()) std::printf("request %d: %s\n", stream.number, text.c_str());
        if (++tokens == 20) {  // in the middle of all of them
          engine.request_switch(MOEBIUS_LAYOUT_EP);
          engine.cancel(last);
        }
      } else {
        std::printf("request %d: %s\nrequest %d ended: %s\n", stream.number, std::string(stream.decoder.finish()).c_str(), stream.number,
                    e.finish_reason <= MOEBIUS_FINISH_ERROR ? reasons[e.finish_reason] : "otherwise");
        --left;
      }
    }
  }
  std::printf("%d tokens in all\n", tokens);
}

}  // namespace

int main(int argc, char** argv) {
  const bool help = argc == 2 && std::strcmp(argv[1], "--help") == 0;
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error, no end
  if (help || argc != 2) std::fprintf(help ? stdout : stderr, "usage: %s MODEL_DIR\n", argv[0]);
  int status = help ? 0 : 2;  // 2 until there is a model, then 1
  if (argc == 2 && !help) try {
      const moebius_cpp::Tokenizer tokenizer(argv[1]);
      moebius_cpp::Engine engine(argv[1], settings());
      status = 1;
      run(tokenizer, engine);
      status = 0;
    } catch (const moebius_cpp::Error& e) {
      std::fprintf(stderr, "%s: %s\n", argv[0], e.what());
    }
  if (status != 0) return status;
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return 0;
  std::fprintf(stderr, "cannot write to standard output\n");
  return 1;
}
