/* A C99 host: loads a model, streams tokens of several requests, switches the layout while they run, reports a bad path.
 * Usage: moebius-c-example MODEL_DIR */
#include <moebius/moebius.h>
#include <stdio.h>

static int failed(const char *what, moebius_error *err) {
  fprintf(stderr, "%s: %s\n", what, moebius_error_message(err));
  moebius_error_destroy(err);
  return 1;
}

static int submit(moebius_engine *engine, int32_t first, moebius_error **err) {
  const int32_t prompt[3] = {first, first + 1, first + 2};
  moebius_request *request = NULL;
  moebius_status status = moebius_request_create(&request, err);
  if (status == MOEBIUS_OK) status = moebius_request_set_prompt(request, prompt, 3, err);
  if (status == MOEBIUS_OK) status = moebius_request_set_i64(request, "max_tokens", 12, err);
  if (status == MOEBIUS_OK) status = moebius_request_set_f64(request, "temperature", 0, err);
  if (status == MOEBIUS_OK) status = moebius_engine_submit(engine, request, NULL, err);
  moebius_request_destroy(request);
  return status == MOEBIUS_OK;
}

int main(int argc, char **argv) {
  moebius_error *err = NULL;
  moebius_config *config = NULL;
  moebius_engine *engine = NULL;
  int i, finished = 0, step, ok = 1;
  if (argc != 2) {
    fprintf(stderr, "usage: %s MODEL_DIR\n", argv[0]);
    return 2;
  }
  if (moebius_config_create(&config, &err) != MOEBIUS_OK) return failed("config", err);
  ok = moebius_config_set_i64(config, "ranks", 2, &err) == MOEBIUS_OK;
  if (ok && moebius_engine_create(argv[1], config, &engine, &err) != MOEBIUS_OK) {
    moebius_config_destroy(config);
    failed(argv[1], err);
    return 2;
  }
  moebius_config_destroy(config);
  for (i = 0; ok && i < 3; ++i) ok = submit(engine, 10 * (i + 1), &err);
  for (step = 0; ok && finished < 3; ++step) {
    moebius_event events[32];
    size_t count = 0, e;
    if (step == 4) ok = moebius_engine_switch(engine, MOEBIUS_LAYOUT_EP, &err) == MOEBIUS_OK; /* in the middle of all three */
    ok = ok && moebius_engine_step(engine, NULL, &err) == MOEBIUS_OK &&
         moebius_engine_poll(engine, events, 32, sizeof events[0], 0, &count, &err) == MOEBIUS_OK;
    for (e = 0; ok && e < count; ++e) {
      if (events[e].type == MOEBIUS_EVENT_TOKEN) printf("request %d: %d\n", (int)events[e].request, (int)events[e].token);
      if (events[e].type == MOEBIUS_EVENT_SWITCH_FINISHED) printf("now in EP: %.0f bytes moved\n", (double)events[e].bytes);
      if (events[e].type == MOEBIUS_EVENT_FINISHED) ++finished;
    }
  }
  moebius_engine_destroy(engine);
  if (!ok) return failed("moebius", err);
  if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
  fprintf(stderr, "cannot write to standard output\n");
  return 1;
}
