/* A C99 host with an event loop: streams the text of several requests at once, cancels one, and changes the layout while they run. The engine
 * works on a thread of its own; this one sleeps in poll() until the engine's descriptor says that there are events.
 * Usage: moebius-c-example MODEL_DIR */
#define _POSIX_C_SOURCE 200809L
#include <moebius/moebius.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

enum { REQUESTS = 4, CANCELLED = 3, EVENTS = 64 };

struct stream {
  uint64_t id;
  moebius_decoder *decoder; /* turns tokens into whole characters */
};

struct host {
  moebius_config *config;
  moebius_engine *engine;
  moebius_tokenizer *tokenizer;
  struct stream streams[REQUESTS];
  int tokens, left;
};

static void close_host(struct host *h) {
  int i;
  moebius_engine_destroy(h->engine);
  for (i = 0; i < REQUESTS; ++i) moebius_decoder_destroy(h->streams[i].decoder);
  moebius_tokenizer_destroy(h->tokenizer);
  moebius_config_destroy(h->config);
}

static int open_host(struct host *h, const char *model, moebius_error **err) {
  return moebius_tokenizer_load(model, &h->tokenizer, err) == MOEBIUS_OK && moebius_config_create(&h->config, err) == MOEBIUS_OK &&
         moebius_config_set_i64(h->config, "ranks", 2, err) == MOEBIUS_OK && moebius_config_set_i64(h->config, "max_batch", 8, err) == MOEBIUS_OK &&
         moebius_config_set_i64(h->config, "kv_tokens", 4096, err) == MOEBIUS_OK &&
         moebius_engine_create(model, h->config, &h->engine, err) == MOEBIUS_OK && moebius_engine_start(h->engine, err) == MOEBIUS_OK;
}

static int submit(struct host *h, struct stream *s, const char *prompt, int max_tokens, moebius_error **err) {
  int32_t ids[64];
  size_t num = 0;
  moebius_request *request = NULL;
  int ok = moebius_tokenizer_encode(h->tokenizer, prompt, strlen(prompt), 1, ids, 64, &num, err) == MOEBIUS_OK &&
           moebius_decoder_create(h->tokenizer, &s->decoder, err) == MOEBIUS_OK && moebius_request_create(&request, err) == MOEBIUS_OK &&
           moebius_request_set_prompt(request, ids, num, err) == MOEBIUS_OK &&
           moebius_request_set_i64(request, "max_tokens", max_tokens, err) == MOEBIUS_OK &&
           moebius_request_set_i64(request, "ignore_eos", 1, err) == MOEBIUS_OK &&
           moebius_request_set_f64(request, "temperature", 0.8, err) == MOEBIUS_OK &&
           moebius_engine_submit(h->engine, request, &s->id, err) == MOEBIUS_OK;
  moebius_request_destroy(request);
  return ok;
}

/* What an event means to this host. */
static int take(struct host *h, const moebius_event *e, moebius_error **err) {
  static const char *const reasons[] = {"", "stop", "length", "abort", "error"};
  const char *text = NULL;
  size_t bytes = 0;
  int i = 0;
  if (e->type == MOEBIUS_EVENT_SWITCH_FINISHED) printf("switched to expert parallelism: %.0f bytes in %.2f ms\n", (double)e->bytes, 1e3 * e->seconds);
  if (e->type != MOEBIUS_EVENT_TOKEN && e->type != MOEBIUS_EVENT_FINISHED) return 1;
  while (h->streams[i].id != e->request) ++i;
  if (e->type == MOEBIUS_EVENT_TOKEN) {
    if (moebius_decoder_push(h->streams[i].decoder, e->token, &text, &bytes, err) != MOEBIUS_OK) return 0;
    if (bytes > 0) printf("request %d: %.*s\n", i, (int)bytes, text);
    if (++h->tokens == 20) /* in the middle of all of them */
      return moebius_engine_switch(h->engine, MOEBIUS_LAYOUT_EP, err) == MOEBIUS_OK &&
             moebius_engine_cancel(h->engine, h->streams[CANCELLED].id, err) == MOEBIUS_OK;
    return 1;
  }
  if (moebius_decoder_finish(h->streams[i].decoder, &text, &bytes, err) != MOEBIUS_OK) return 0;
  printf("request %d: %.*s\nrequest %d ended: %s\n", i, (int)bytes, text, i,
         e->finish_reason <= MOEBIUS_FINISH_ERROR ? reasons[e->finish_reason] : "otherwise");
  --h->left;
  return 1;
}

static int serve(struct host *h, moebius_error **err) {
  moebius_event events[EVENTS];
  struct pollfd wait = {-1, POLLIN, 0};
  size_t count, i;
  if (moebius_engine_event_fd(h->engine, &wait.fd, err) != MOEBIUS_OK) return 0;
  while (h->left > 0) {
    if (poll(&wait, 1, -1) < 0) continue; /* a signal */
    if (moebius_engine_poll(h->engine, events, EVENTS, sizeof events[0], 0, &count, err) != MOEBIUS_OK) return 0;
    for (i = 0; i < count; ++i)
      if (!take(h, &events[i], err)) return 0;
  }
  printf("%d tokens in all\n", h->tokens);
  return 1;
}

/* The exit status: 2 where the model cannot be had, 1 where it failed later. */
static int run(const char *program, const char *model) {
  static const char *const prompts[REQUESTS] = {"ROMEO:", "First Citizen:\n", "What say you", "The king"};
  struct host h;
  moebius_error *err = NULL;
  int i, opened, ok;
  memset(&h, 0, sizeof h);
  h.left = REQUESTS;
  ok = opened = open_host(&h, model, &err);
  for (i = 0; ok && i < REQUESTS; ++i) ok = submit(&h, &h.streams[i], prompts[i], i == CANCELLED ? 1000 : 60, &err);
  ok = ok && serve(&h, &err);
  if (!ok) fprintf(stderr, "%s: %s\n", program, moebius_error_message(err));
  moebius_error_destroy(err);
  close_host(&h);
  return ok ? 0 : opened ? 1 : 2;
}

int main(int argc, char **argv) {
  const int help = argc == 2 && strcmp(argv[1], "--help") == 0;
  int status = 0;
  signal(SIGPIPE, SIG_IGN); /* a closed pipe is an error, no end */
  if (help || argc != 2) fprintf(help ? stdout : stderr, "usage: %s MODEL_DIR\n", argv[0]);
  if (!help) status = argc == 2 ? run(argv[0], argv[1]) : 2;
  if (status == 0 && (fflush(stdout) != 0 || ferror(stdout))) {
    fprintf(stderr, "cannot write to standard output\n");
    status = 1;
  }
  return status;
}
