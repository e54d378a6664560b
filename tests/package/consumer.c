/* usage: consumer MODEL_DIR: serves one request and prints its twelve tokens, one a line. C99, as a consumer of the package. */
#include <moebius/moebius.h>
#include <stdio.h>

static int failed(moebius_error *err) {
  fprintf(stderr, "%s\n", moebius_error_message(err));
  moebius_error_destroy(err);
  return 1;
}

int main(int argc, char **argv) {
  const int32_t prompt[] = {52, 49, 47};
  moebius_error *err = NULL;
  moebius_config *config = NULL;
  moebius_engine *engine = NULL;
  moebius_request *request = NULL;
  int finished = 0;
  if (argc != 2) return 2;
  if (moebius_config_create(&config, &err) || moebius_config_set_i64(config, "ranks", 2, &err) ||
      moebius_config_set_i64(config, "threads", 1, &err) || moebius_config_set_i64(config, "kv_tokens", 64, &err) ||
      moebius_engine_create(argv[1], config, &engine, &err) || moebius_request_create(&request, &err) ||
      moebius_request_set_prompt(request, prompt, 3, &err) || moebius_request_set_i64(request, "max_tokens", 12, &err) ||
      moebius_request_set_f64(request, "temperature", 0, &err) || moebius_engine_submit(engine, request, NULL, &err))
    return failed(err);
  while (!finished) {
    moebius_event event;
    size_t count = 0;
    if (moebius_engine_step(engine, NULL, &err)) return failed(err);
    while (!moebius_engine_poll(engine, &event, 1, sizeof event, 0, &count, NULL) && count) {
      if (event.type == MOEBIUS_EVENT_TOKEN) printf("%d\n", (int)event.token);
      if (event.type == MOEBIUS_EVENT_FINISHED) finished = 1;
    }
  }
  moebius_request_destroy(request);
  moebius_engine_destroy(engine);
  moebius_config_destroy(config);
  return 0;
}
