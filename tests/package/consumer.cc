// usage: consumer MODEL_DIR: consumer.c in C++17.
#include <cstdio>

#include <moebius/moebius.hpp>

int main(int argc, char** argv) try {
  if (argc != 2) return 2;
  moebius_cpp::Config config;
  config.set("ranks", 2).set("threads", 1).set("kv_tokens", 64);
  moebius_cpp::Engine engine(argv[1], config);
  moebius_cpp::Request request({52, 49, 47});
  engine.submit(request.set("max_tokens", 12).set_real("temperature", 0));
  std::vector<moebius_event> events;
  for (bool finished = false; !finished;) {
    engine.step();
    engine.poll(events);
    for (const moebius_event& event : events) {
      if (event.type == MOEBIUS_EVENT_TOKEN) std::printf("%d\n", static_cast<int>(event.token));
      if (event.type == MOEBIUS_EVENT_FINISHED) finished = true;
    }
  }
  return 0;
} catch (const moebius_cpp::Error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
