/* A caller as it was built with an old version's header: every struct of that size, a request with a switch, events by that stride. It is
 * run with the library of today, which may write no byte more. And a caller from the future: larger structs, with zeros or more behind. */
#include <moebius/moebius.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 0xA5, BEHIND = 4096, TOKENS = 12, EVENTS = 4 };

static moebius_engine *engine;

#define REQUIRE(x)                                                      \
  do {                                                                  \
    if (!(x)) {                                                         \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #x);   \
      exit(1);                                                          \
    }                                                                   \
  } while (0)

static moebius_status get_model(void *s) { return moebius_engine_model(engine, s, NULL); }
static moebius_status get_step(void *s) { return moebius_engine_step(engine, s, NULL); }
static moebius_status get_estimate(void *s) { return moebius_engine_estimate_switch(engine, MOEBIUS_LAYOUT_EP, s, NULL); }
static moebius_status get_stats(void *s) { return moebius_engine_stats(engine, s, NULL); }
static moebius_status get_memory(void *s) { return moebius_engine_memory(engine, s, NULL); }

static int all(const unsigned char *bytes, size_t num, int value) {
  size_t i;
  for (i = 0; i < num; ++i)
    if (bytes[i] != value) return 0;
  return 1;
}

static moebius_status call_with(moebius_status (*get)(void *), unsigned char *room, size_t struct_size) {
  const uint32_t size = (uint32_t)struct_size;
  memcpy(room, &size, sizeof size);
  return get(room);
}

/* Fills `out` (size bytes) as the old caller gets it, and tries the sizes that are not its own. */
static void sizes(moebius_status (*get)(void *), void *out, size_t size) {
  unsigned char *room = calloc(1, size + BEHIND);
  uint32_t said;
  REQUIRE(room != NULL);
  REQUIRE(call_with(get, room, 0) == MOEBIUS_E_INVALID_ARGUMENT);
  REQUIRE(call_with(get, room, size - 1) == MOEBIUS_E_INVALID_ARGUMENT);
  REQUIRE(all(room + sizeof said, size + BEHIND - sizeof said, 0));
  room[size + BEHIND - 1] = 1;
  REQUIRE(call_with(get, room, size + BEHIND) == MOEBIUS_E_UNSUPPORTED);
  REQUIRE(all(room + sizeof said, size + BEHIND - sizeof said - 1, 0));
  room[size + BEHIND - 1] = 0;
  REQUIRE(call_with(get, room, size + BEHIND) == MOEBIUS_OK);
  memset(room, 0, size);
  memset(room + size, GUARD, BEHIND);
  REQUIRE(call_with(get, room, size) == MOEBIUS_OK);
  REQUIRE(all(room + size, BEHIND, GUARD));
  memcpy(&said, room, sizeof said);
  REQUIRE(said == size);
  memcpy(out, room, size);
  free(room);
}

/* Polls into elements `stride` bytes apart; counts of tokens, ends and switches. */
static void take_events(size_t stride, int *tokens, int *ends, int *switches) {
  unsigned char *room = malloc(EVENTS * stride + BEHIND);
  size_t count, i;
  REQUIRE(room != NULL);
  REQUIRE(moebius_engine_poll(engine, (moebius_event *)room, EVENTS, sizeof(moebius_event) - 1, 0, &count, NULL) ==
          MOEBIUS_E_INVALID_ARGUMENT);
  do {
    memset(room, GUARD, EVENTS * stride + BEHIND);
    REQUIRE(moebius_engine_poll(engine, (moebius_event *)room, EVENTS, stride, 0, &count, NULL) == MOEBIUS_OK);
    REQUIRE(count <= EVENTS && all(room + count * stride, (EVENTS - count) * stride + BEHIND, GUARD));
    for (i = 0; i < count; ++i) {
      moebius_event e;
      memcpy(&e, room + i * stride, sizeof e);
      REQUIRE(e.struct_size >= sizeof e && memchr(e.reason, 0, sizeof e.reason) != NULL);
      *tokens += e.type == MOEBIUS_EVENT_TOKEN;
      *ends += e.type == MOEBIUS_EVENT_FINISHED && e.finish_reason == MOEBIUS_FINISH_LENGTH;
      *switches += e.type == MOEBIUS_EVENT_SWITCH_FINISHED && e.from == MOEBIUS_LAYOUT_TP && e.to == MOEBIUS_LAYOUT_EP && e.bytes > 0;
    }
  } while (count == EVENTS);
  free(room);
}

static void serve(void) {
  const int32_t prompt[] = {52, 49, 47};
  moebius_request *request = NULL;
  int tokens = 0, ends = 0, switches = 0, steps = 0;
  REQUIRE(moebius_request_create(&request, NULL) == MOEBIUS_OK);
  REQUIRE(moebius_request_set_prompt(request, prompt, 3, NULL) == MOEBIUS_OK);
  REQUIRE(moebius_request_set_i64(request, "max_tokens", TOKENS, NULL) == MOEBIUS_OK);
  REQUIRE(moebius_request_set_i64(request, "ignore_eos", 1, NULL) == MOEBIUS_OK);
  REQUIRE(moebius_engine_submit(engine, request, NULL, NULL) == MOEBIUS_OK);
  moebius_request_destroy(request);
  while (ends == 0 && ++steps < 100) {
    REQUIRE(moebius_engine_step(engine, NULL, NULL) == MOEBIUS_OK);
    if (steps == 4) REQUIRE(moebius_engine_switch(engine, MOEBIUS_LAYOUT_EP, NULL) == MOEBIUS_OK);
    take_events(sizeof(moebius_event) + (steps % 2 ? 0 : 64), &tokens, &ends, &switches);
  }
  REQUIRE(tokens == TOKENS && ends == 1 && switches == 1);
}

int main(int argc, char **argv) {
  moebius_model_info model;
  moebius_step_result step;
  moebius_switch_estimate estimate;
  moebius_stats stats;
  moebius_memory memory;
  moebius_config *config = NULL;
  REQUIRE(argc == 2);
  REQUIRE(moebius_config_create(&config, NULL) == MOEBIUS_OK && moebius_config_set_i64(config, "ranks", 2, NULL) == MOEBIUS_OK &&
          moebius_config_set_i64(config, "kv_tokens", 1024, NULL) == MOEBIUS_OK);
  REQUIRE(moebius_engine_create(argv[1], config, &engine, NULL) == MOEBIUS_OK);
  moebius_config_destroy(config);
  sizes(get_model, &model, sizeof model);
  sizes(get_step, &step, sizeof step);
  sizes(get_estimate, &estimate, sizeof estimate);
  serve();
  sizes(get_stats, &stats, sizeof stats);
  sizes(get_memory, &memory, sizeof memory);
  REQUIRE(model.num_layers > 0 && model.max_context > 0 && model.head_groups > 0);
  REQUIRE(step.worked == 0 && step.seconds >= 0);
  REQUIRE(estimate.fits == 1 && estimate.bytes > 0 && estimate.reason[0] == 0);
  REQUIRE(stats.generation_tokens == TOKENS && stats.switches == 1 && stats.num_layers == model.num_layers && stats.kv_usage == 0);
  REQUIRE(memory.num_ranks == 2 && memory.arena_bytes > 0 && memory.ep_tokens > 0);
  moebius_engine_destroy(engine);
  return 0;
}
