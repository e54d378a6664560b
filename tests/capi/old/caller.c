/* A caller as it was built with an old version's header: every struct of that size, a request with a switch, events by that stride. It is
 * run with the library of today, which may write no byte more. And a caller from the future: larger structs, with zeros or more behind. */
#include <moebius/moebius.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 0xA5, BEHIND = 4096, TOKENS = 12, EVENTS = 4 };

static moebius_engine *engine;
static moebius_plan *plan;

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
static moebius_status get_plan(void *s) { return moebius_plan_get_info(plan, s, NULL); }
static moebius_status get_pool(void *s) { return moebius_plan_kv_pool(plan, MOEBIUS_LAYOUT_TP, 1, 0, s, NULL); }

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

/* A spec of `struct_size` bytes: a model of one layer, on two ranks. */
static moebius_status make_plan(const moebius_config *config, size_t struct_size, int behind) {
  unsigned char *room = calloc(1, sizeof(moebius_plan_spec) + BEHIND);
  moebius_plan_spec spec;
  moebius_status status;
  REQUIRE(room != NULL);
  memset(&spec, 0, sizeof spec);
  spec.struct_size = (uint32_t)struct_size;
  spec.num_layers = 1;
  spec.num_heads = spec.num_kv_heads = spec.num_experts = spec.slices_per_expert = 2;
  spec.attention_bytes = spec.kv_projection_bytes = spec.expert_slice_bytes = spec.dense_slice_bytes = spec.kv_slice_bytes = 64;
  spec.tp_pages = spec.ep_pages = 2;
  memcpy(room, &spec, sizeof spec);
  room[sizeof spec + BEHIND - 1] = (unsigned char)behind;
  moebius_plan_destroy(plan);
  plan = NULL;
  status = moebius_plan_create((const moebius_plan_spec *)room, config, &plan, NULL);
  free(room);
  return status;
}

/* Slices of a rank by the old stride. */
static void take_slices(void) {
  moebius_slice slices[EVENTS * 8 + 1];
  const size_t capacity = EVENTS * 8;
  size_t count, i;
  memset(slices, GUARD, sizeof slices);
  REQUIRE(moebius_plan_slices(plan, 0, 0, slices, capacity, sizeof slices[0] - 1, &count, NULL) == MOEBIUS_E_INVALID_ARGUMENT);
  REQUIRE(moebius_plan_slices(plan, 0, 0, slices, capacity, sizeof slices[0], &count, NULL) == MOEBIUS_OK);
  REQUIRE(count > 0 && all((unsigned char *)(slices + count), (capacity + 1 - count) * sizeof slices[0], GUARD));
  for (i = 0; i < count; ++i) REQUIRE(slices[i].bytes == 64 && slices[i].tp_offset >= -1 && slices[i].ep_offset >= -1);
}

int main(int argc, char **argv) {
  moebius_model_info model;
  moebius_step_result step;
  moebius_switch_estimate estimate;
  moebius_stats stats;
  moebius_memory memory;
  moebius_plan_info info;
  moebius_kv_pool pool;
  moebius_config *config = NULL;
  REQUIRE(argc == 2);
  REQUIRE(moebius_config_create(&config, NULL) == MOEBIUS_OK && moebius_config_set_i64(config, "ranks", 2, NULL) == MOEBIUS_OK &&
          moebius_config_set_i64(config, "kv_tokens", 1024, NULL) == MOEBIUS_OK);
  REQUIRE(moebius_engine_create(argv[1], config, &engine, NULL) == MOEBIUS_OK);
  REQUIRE(make_plan(config, sizeof(moebius_plan_spec) - 1, 0) == MOEBIUS_E_INVALID_ARGUMENT);
  REQUIRE(make_plan(config, sizeof(moebius_plan_spec) + BEHIND, 1) == MOEBIUS_E_UNSUPPORTED);
  REQUIRE(make_plan(config, sizeof(moebius_plan_spec) + BEHIND, 0) == MOEBIUS_OK);
  REQUIRE(make_plan(config, sizeof(moebius_plan_spec), 1) == MOEBIUS_OK);
  moebius_config_destroy(config);
  sizes(get_plan, &info, sizeof info);
  sizes(get_pool, &pool, sizeof pool);
  take_slices();
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
  REQUIRE(info.ranks == 2 && info.num_layers == 1 && info.seam == 1 && info.arena_bytes > 0);
  REQUIRE(pool.num_heads == 1 && pool.pages == 2 && pool.offset >= 0);
  moebius_plan_destroy(plan);
  moebius_engine_destroy(engine);
  return 0;
}
