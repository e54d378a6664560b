/* Moebius: serving Mixture-of-Experts models on several ranks, switching between tensor parallelism (TP) and expert
 * parallelism (EP) while requests run.
 *
 * Conventions
 *   Status     every function that can fail returns a moebius_status: 0 is success, below 0 an error. Its text comes through the
 *              trailing `err`, which may be NULL; otherwise *err is overwritten on failure (it is not freed first) and the caller
 *              frees it with moebius_error_destroy. On success *err is untouched. On failure no other out-parameter is touched,
 *              but for the sizes that two-call functions say they set. A NULL where no NULL is allowed, or a value out of range,
 *              is MOEBIUS_E_INVALID_ARGUMENT; running out of memory MOEBIUS_E_OUT_OF_MEMORY, everywhere. "By design" lists what
 *              else a correct program should expect; MOEBIUS_E_INTERNAL is a bug of ours.
 *   Handles    opaque, made by a _create or _load function, given back to _destroy, which takes NULL. No handle may be used
 *              while, or after, another thread destroys it.
 *   Structs    begin with struct_size, which the caller sets to sizeof. Fields are only ever added at the end; 0 means default.
 *              A struct smaller than that of its first version is MOEBIUS_E_INVALID_ARGUMENT. Bytes behind the fields that a
 *              library knows must be 0, else MOEBIUS_E_UNSUPPORTED. The library writes no more than struct_size bytes.
 *   Strings    UTF-8, NUL-terminated, borrowed for the call, unless said otherwise.
 *   Threads    "any": from any thread at any time, also several at once on one handle. "owner": one thread at a time.
 *   Blocking   no function waits for a step, a load or I/O unless it says so.
 *   Since      0.1, unless said otherwise.
 *   Behaviour  nothing here prints, exits, installs handlers, reads the environment or lets an exception out. Callbacks must
 *              neither throw, nor longjmp, nor call back into the handle that calls them.
 */
#ifndef MOEBIUS_MOEBIUS_H_
#define MOEBIUS_MOEBIUS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(MOEBIUS_STATIC) || !defined(__GNUC__)
#define MOEBIUS_API
#else
#define MOEBIUS_API __attribute__((visibility("default")))
#endif

#define MOEBIUS_VERSION_MAJOR 0
#define MOEBIUS_VERSION_MINOR 1
#define MOEBIUS_VERSION_PATCH 0

/* Numbers are never reused; a host must take an unknown one below 0 for an error. */
typedef int32_t moebius_status;
enum {
  MOEBIUS_OK = 0,
  MOEBIUS_E_INVALID_ARGUMENT = -1,  /* a NULL, a range, an unknown key */
  MOEBIUS_E_INVALID_STATE = -2,     /* not now: the engine has failed, or its thread runs already */
  MOEBIUS_E_NOT_FOUND = -3,         /* a file, a request, an index past the last */
  MOEBIUS_E_UNSUPPORTED = -4,       /* known, and not done here: a key, a model's setting, a newer struct */
  MOEBIUS_E_IO = -5,                /* a file could not be read */
  MOEBIUS_E_CORRUPT_MODEL = -6,     /* a file contradicts itself or the others */
  MOEBIUS_E_OUT_OF_MEMORY = -7,
  MOEBIUS_E_TIMEOUT = -8,           /* a rank waited longer than wait_deadline_ms for another */
  MOEBIUS_E_CANCELLED = -9,         /* a callback asked for it */
  MOEBIUS_E_QUEUE_FULL = -10,       /* try again after a step */
  MOEBIUS_E_CONTEXT_TOO_LONG = -11, /* prompt + max_tokens over the context */
  MOEBIUS_E_DOES_NOT_FIT = -12,     /* into memory_bytes, or into the KV of one of the layouts */
  MOEBIUS_E_RANK_FAILED = -13,      /* a rank ended with an error, which the text repeats */
  MOEBIUS_E_INTERNAL = -14          /* our bug */
};

/* Layouts. */
typedef int32_t moebius_layout;
enum { MOEBIUS_LAYOUT_TP = 0, MOEBIUS_LAYOUT_EP = 1 };

/* Why a request ended. */
enum { MOEBIUS_FINISH_NONE = 0, MOEBIUS_FINISH_STOP = 1, MOEBIUS_FINISH_LENGTH = 2, MOEBIUS_FINISH_ABORT = 3, MOEBIUS_FINISH_ERROR = 4 };

/* Event types. */
enum {
  MOEBIUS_EVENT_ARRIVED = 1,         /* the request entered the queue */
  MOEBIUS_EVENT_TOKEN = 2,           /* one more token of a request */
  MOEBIUS_EVENT_FINISHED = 3,        /* final; finish_reason */
  MOEBIUS_EVENT_PREEMPTED = 4,       /* it gave up its KV and will be recomputed */
  MOEBIUS_EVENT_CANCELLED = 5,       /* a cancel took effect; FINISHED (abort) follows */
  MOEBIUS_EVENT_SWITCH_STARTED = 6,
  MOEBIUS_EVENT_SEAM = 7,            /* the seam moved to `seam` */
  MOEBIUS_EVENT_SWITCH_FINISHED = 8, /* bytes, bytes_changed, seconds */
  MOEBIUS_EVENT_SWITCH_REFUSED = 9,  /* nothing was changed; the reason says by how much it does not fit */
  MOEBIUS_EVENT_ROLLED_BACK = 10,    /* a failure moved the seam back */
  MOEBIUS_EVENT_DECISION = 11        /* a policy decided; the reason is its record */
};

typedef struct moebius_error moebius_error;
typedef struct moebius_config moebius_config;
typedef struct moebius_engine moebius_engine;
typedef struct moebius_request moebius_request;
typedef struct moebius_tokenizer moebius_tokenizer;
typedef struct moebius_decoder moebius_decoder;

/* ---- library */

/* Version of the library that runs (the MOEBIUS_VERSION_ macros tell that of this header). Each pointer may be NULL. Threads: any. */
MOEBIUS_API void moebius_version(int32_t *major, int32_t *minor, int32_t *patch);
/* A status in words, e.g. "queue_full"; "unknown" for others. A static string. Threads: any. */
MOEBIUS_API const char *moebius_status_name(moebius_status status);

/* The status that came with an error; MOEBIUS_OK for NULL. Threads: any. */
MOEBIUS_API moebius_status moebius_error_code(const moebius_error *err);
/* What happened, with its numbers; "" for NULL. Lives as long as err. Threads: any. */
MOEBIUS_API const char *moebius_error_message(const moebius_error *err);
/* Frees an error; takes NULL. Threads: owner. */
MOEBIUS_API void moebius_error_destroy(moebius_error *err);

/* ---- configuration: keys and values. Threads: owner.
 *
 * Keys, each with its type and default, are enumerated by moebius_config_key: ranks, threads, layout ("tp", "ep"), memory_bytes,
 * kv_tokens, isa, slices_per_expert, page_tokens, chunk_tokens, max_batch, max_queue, max_context, prefix_cache, seed,
 * stall_budget_ms, preempt_to_fit, wait_deadline_ms, dummy_weights, plain_sums, policy ("manual", "threshold"), policy_variant
 * ("decode", "prefill", "rollout"), policy_threshold, policy_window_steps, policy_cooldown_s, policy_shadow.
 * An unknown key, a value of another type or out of range is MOEBIUS_E_INVALID_ARGUMENT; the text names the nearest key, the
 * type or the range. What is not set keeps its default. */

/* A configuration of defaults. *out_config is the caller's. */
MOEBIUS_API moebius_status moebius_config_create(moebius_config **out_config, moebius_error **err);
/* Engines that were made from it keep their copy. */
MOEBIUS_API void moebius_config_destroy(moebius_config *config);
/* Sets a key of type i64 (flags are 0 or 1), or one of type f64 to a whole number. */
MOEBIUS_API moebius_status moebius_config_set_i64(moebius_config *config, const char *key, int64_t value, moebius_error **err);
/* Sets a key of type f64; not-a-number is out of every range. */
MOEBIUS_API moebius_status moebius_config_set_f64(moebius_config *config, const char *key, double value, moebius_error **err);
/* Sets a key of type str; the value is copied. */
MOEBIUS_API moebius_status moebius_config_set_str(moebius_config *config, const char *key, const char *value, moebius_error **err);

/* Progress of a load, in bytes; bytes_done never falls. A value other than 0 cancels the load, which then ends with
 * MOEBIUS_E_CANCELLED. Called on the loading threads, one at a time. */
typedef int32_t (*moebius_progress_fn)(void *user, int64_t bytes_done, int64_t bytes_total);
/* A warning, e.g. of tensors that are not used; `message` lives for the call. Called on the thread of moebius_engine_create. */
typedef void (*moebius_warning_fn)(void *user, const char *message);
/* Watches the loads of engines that are made from this config; fn NULL: nobody. `user` is handed through; it and fn must live
 * until the last moebius_engine_create with this config has returned. */
MOEBIUS_API moebius_status moebius_config_set_progress(moebius_config *config, moebius_progress_fn fn, void *user, moebius_error **err);
/* The same for warnings. */
MOEBIUS_API moebius_status moebius_config_set_warning(moebius_config *config, moebius_warning_fn fn, void *user, moebius_error **err);

/* The index-th key, from 0: its name, its type ("i64", "f64", "str"), its default as text and its meaning, all static strings.
 * Each out-parameter may be NULL. Threads: any. By design: NOT_FOUND past the last. */
MOEBIUS_API moebius_status moebius_config_key(size_t index, const char **out_name, const char **out_type, const char **out_default,
                                              const char **out_doc, moebius_error **err);

/* ---- engine */

/* Loads the model folder (config.json, *.safetensors), lays out both layouts and starts the ranks' threads. config NULL: all
 * defaults; it is copied. *out_engine is the caller's. Blocks for as long as the load takes. Threads: any.
 * By design: NOT_FOUND, IO, UNSUPPORTED, CORRUPT_MODEL, DOES_NOT_FIT, CANCELLED. */
MOEBIUS_API moebius_status moebius_engine_create(const char *model_dir, const moebius_config *config, moebius_engine **out_engine,
                                                 moebius_error **err);
/* Ends the own thread if there is one; requests that still run are dropped without an event. Blocks until a step under way is
 * done. Threads: owner. */
MOEBIUS_API void moebius_engine_destroy(moebius_engine *engine);

typedef struct moebius_model_info {
  uint32_t struct_size;
  int32_t num_layers;
  int32_t vocab_size;
  int32_t hidden;
  int32_t num_experts;       /* of the widest layer */
  int32_t top_k;             /* experts a token */
  int64_t max_context;       /* tokens of a request, prompt included */
  int32_t slices_per_expert; /* S: cuts of each expert */
  int32_t head_groups;       /* A: cuts of the query heads. At most min(S, A, experts) ranks can share the model */
} moebius_model_info;
/* What was loaded. The caller sets struct_size. Threads: any. */
MOEBIUS_API moebius_status moebius_engine_model(const moebius_engine *engine, moebius_model_info *out_info, moebius_error **err);

/* ---- requests: made, filled, submitted (which copies), destroyed; one may be submitted many times. Threads: owner. */

/* A request without a prompt, everything else at its default. *out_request is the caller's. */
MOEBIUS_API moebius_status moebius_request_create(moebius_request **out_request, moebius_error **err);
/* What was submitted from it goes on. */
MOEBIUS_API void moebius_request_destroy(moebius_request *request);
/* The prompt [num_tokens], copied. Ids are checked against the vocabulary at submit. */
MOEBIUS_API moebius_status moebius_request_set_prompt(moebius_request *request, const int32_t *token_ids, size_t num_tokens,
                                                      moebius_error **err);
/* Keys have vLLM's names and defaults; ranges are checked at submit. A key that other engines know and this one does not support
 * ("stop", "bad_words", "prompt_logprobs", …) is MOEBIUS_E_UNSUPPORTED by name; any other unknown key, or one of another type,
 * MOEBIUS_E_INVALID_ARGUMENT.
 *
 * Integers: max_tokens (16), min_tokens (0), top_k (0: all), seed (unset: hash of the engine's seed and id), n (1: samples of
 * the prompt), logprobs (-1: none; k: of the chosen token and the k likeliest, at most 20), ignore_eos (0 or 1), priority (0;
 * lower runs first, then arrival), keep_logits (0 or 1). Also takes the float keys below. */
MOEBIUS_API moebius_status moebius_request_set_i64(moebius_request *request, const char *key, int64_t value, moebius_error **err);
/* Floats: temperature (1; 0 is greedy), top_p (1), min_p (0), presence_penalty (0), frequency_penalty (0),
 * repetition_penalty (1), deadline_ms (0: none; from submit, after which the request ends as aborted). */
MOEBIUS_API moebius_status moebius_request_set_f64(moebius_request *request, const char *key, double value, moebius_error **err);
/* Strings: id ("": the request's number), which seeds the request where no seed is set. Copied. */
MOEBIUS_API moebius_status moebius_request_set_str(moebius_request *request, const char *key, const char *value, moebius_error **err);
/* Token lists [num_tokens], copied: stop_token_ids (none), allowed_token_ids (empty: all). */
MOEBIUS_API moebius_status moebius_request_set_ids(moebius_request *request, const char *key, const int32_t *token_ids, size_t num_tokens,
                                                   moebius_error **err);
/* Adds `bias` (-100 to 100) to a token's logit before sampling. */
MOEBIUS_API moebius_status moebius_request_add_logit_bias(moebius_request *request, int32_t token, float bias, moebius_error **err);

/* Queues a copy of the request; *out_id (which may be NULL) names it in events, never 0. Threads: any, but the request has an
 * owner. By design: CONTEXT_TOO_LONG, DOES_NOT_FIT (the KV of one of the layouts could never hold it), QUEUE_FULL,
 * INVALID_STATE (the engine has failed). */
MOEBIUS_API moebius_status moebius_engine_submit(moebius_engine *engine, const moebius_request *request, uint64_t *out_id,
                                                 moebius_error **err);
/* The same checks but for the queue's and the engine's state; nothing is queued. Threads: any. */
MOEBIUS_API moebius_status moebius_engine_check(const moebius_engine *engine, const moebius_request *request, moebius_error **err);
/* Ends a request wherever it is, before the next step; its CANCELLED and FINISHED (abort) events follow unless it finishes first.
 * Threads: any. By design: NOT_FOUND (unknown or already finished). */
MOEBIUS_API moebius_status moebius_engine_cancel(moebius_engine *engine, uint64_t id, moebius_error **err);

/* ---- running: either the host calls step, or the engine's own thread does after start */

typedef struct moebius_step_result {
  uint32_t struct_size;
  int32_t worked;        /* 0: nothing was running, waiting or switching */
  int32_t decode_rows;   /* tokens computed for requests that generate */
  int32_t prefill_rows;  /* and for those in their prompt */
  double seconds;        /* of the whole step; its parts: */
  double compute_seconds;
  double switch_seconds;
} moebius_step_result;
/* Runs one step (an idle one counts too). out_result may be NULL. The calling thread computes as rank 0's first; its
 * floating-point mode is set for the step and restored. Blocks for the step. Threads: one at a time; others wait their turn.
 * By design: INVALID_STATE once the engine has failed. Any error after the arguments were found right means that the engine has
 * failed now (e.g. TIMEOUT, RANK_FAILED): every request gets a FINISHED event (error), and later calls are INVALID_STATE. */
MOEBIUS_API moebius_status moebius_engine_step(moebius_engine *engine, moebius_step_result *out_result, moebius_error **err);
/* Starts the engine's own thread, which steps while there is work and sleeps otherwise. A failure of the engine ends it and is
 * told by the requests' FINISHED events. Threads: any. By design: INVALID_STATE (it runs already). */
MOEBIUS_API moebius_status moebius_engine_start(moebius_engine *engine, moebius_error **err);
/* Ends the own thread after its step; nothing is lost, and step or start may go on. Without a thread it does nothing. Blocks for
 * that step. Threads: any. */
MOEBIUS_API moebius_status moebius_engine_stop(moebius_engine *engine, moebius_error **err);

typedef struct moebius_event {
  uint32_t struct_size;
  int32_t type;          /* MOEBIUS_EVENT_; hosts skip those they do not know */
  uint64_t step;         /* the step before or in which it happened, from 0 */
  uint64_t request;      /* 0 where none */
  int32_t sample;        /* of the request's n, from 0 */
  int32_t token;         /* TOKEN, else -1 */
  float logprob;         /* TOKEN, where logprobs was asked for: natural log, of the raw distribution */
  int32_t num_top;       /* entries of top_tokens and top_logprobs, likeliest first */
  int32_t top_tokens[20];
  float top_logprobs[20];
  int32_t finish_reason; /* FINISHED: MOEBIUS_FINISH_ */
  int32_t from;          /* layouts of a switch */
  int32_t to;
  int32_t seam;          /* layers [0, seam) run in TP, the others in EP */
  int64_t bytes;         /* written by the switch: weights and KV, all ranks */
  int64_t bytes_changed; /* of these, to a new owner */
  double seconds;        /* that the switch took, over all its steps */
  char reason[256];      /* why, NUL-terminated, shortened if need be; empty for most */
} moebius_event;
/* Moves up to `capacity` waiting events, in the order they happened, into an array whose elements are `stride` bytes apart: the
 * caller's sizeof, at most 65536. Elements are overwritten whole; their struct_size is set to stride. *out_count says how many.
 * Blocks for at most timeout_ms for the first (0 or less: not at all; more than a day: a day). Threads: any; each event goes to
 * one caller. Events wait without limit: a host that never polls keeps all of them. */
MOEBIUS_API moebius_status moebius_engine_poll(moebius_engine *engine, moebius_event *out_events, size_t capacity, size_t stride,
                                               double timeout_ms, size_t *out_count, moebius_error **err);

/* ---- switching. Taken up before the next step; the outcome is an event. Threads: any. */

/* Moves the seam all the way to a layout. While another switch is under way it turns the seam round where it stands; to the present
 * layout, or with one rank, it succeeds and moves nothing. Of several calls between two steps the last one counts. */
MOEBIUS_API moebius_status moebius_engine_switch(moebius_engine *engine, moebius_layout to, moebius_error **err);
/* Moves the seam to this layer (0 = EP … num_layers = TP) and leaves it there until the next switch. */
MOEBIUS_API moebius_status moebius_engine_hold_seam(moebius_engine *engine, int32_t seam, moebius_error **err);
/* The milliseconds that each step may lend to a switch (at least one piece moves a step); 0: a switch moves everything at once. */
MOEBIUS_API moebius_status moebius_engine_set_stall_budget(moebius_engine *engine, double ms, moebius_error **err);
/* Takes over the policy keys of a config (policy, policy_*) and no others. */
MOEBIUS_API moebius_status moebius_engine_set_policy(moebius_engine *engine, const moebius_config *config, moebius_error **err);

typedef struct moebius_switch_estimate {
  uint32_t struct_size;
  int32_t fits;          /* 1, or 0: `reason` says by how much it does not */
  int64_t bytes;         /* weights and KV that would be written, all ranks */
  int64_t bytes_changed; /* of these, to a new owner */
  double seconds;        /* predicted from earlier copies */
  char reason[256];
} moebius_switch_estimate;
/* What a switch would take now; changes nothing. The caller sets struct_size. Blocks until a step under way is done. Threads: any. */
MOEBIUS_API moebius_status moebius_engine_estimate_switch(moebius_engine *engine, moebius_layout to, moebius_switch_estimate *out_estimate,
                                                          moebius_error **err);

/* ---- reports. Threads: any. */

typedef struct moebius_stats {
  uint32_t struct_size;
  int32_t running;            /* samples, not requests: n of each */
  int32_t waiting;
  int32_t seam;               /* layers [0, seam) run in TP */
  int32_t num_layers;
  int32_t switching;          /* 1 while the seam is on its way */
  uint64_t step;              /* steps run, idle ones included */
  uint64_t switches;          /* finished */
  uint64_t rollbacks;
  uint64_t refusals;
  uint64_t preemptions;
  uint64_t prompt_tokens;     /* computed, again after a preemption */
  uint64_t generation_tokens;
  uint64_t prefix_queries;    /* prompt tokens looked up in the prefix cache */
  uint64_t prefix_hits;       /* and found there */
  int64_t bytes_moved;        /* by all switches */
  double switch_seconds;      /* of all switches */
  double kv_usage;            /* 0 to 1, of the present layout's pages */
} moebius_stats;
/* As of the last step, but for `waiting`, which counts what was submitted since. The caller sets struct_size. */
MOEBIUS_API moebius_status moebius_engine_stats(const moebius_engine *engine, moebius_stats *out_stats, moebius_error **err);

typedef struct moebius_memory {
  uint32_t struct_size;
  int32_t num_ranks;
  int64_t arena_bytes;     /* of the largest rank; its parts: */
  int64_t kept_bytes;      /*   slices owned in both layouts */
  int64_t lead_bytes;      /*   what holding both layouts costs */
  int64_t workspace_bytes; /* per rank, beside the arena */
  int64_t shared_bytes;    /* replicated weights, once for all ranks */
  int64_t layer_bytes;     /* the largest layer's moving bytes */
  int64_t tp_tokens;       /* KV tokens that TP holds in all */
  int64_t ep_tokens;       /* that EP holds, all homes together */
} moebius_memory;
/* Where the memory went; fixed once the engine is made. The caller sets struct_size. */
MOEBIUS_API moebius_status moebius_engine_memory(const moebius_engine *engine, moebius_memory *out_memory, moebius_error **err);

/* Prometheus text. *out_needed (which may be NULL) is always set to the bytes it needs, NUL included; with capacity 0 that is all.
 * Otherwise the text is written whole, or, when capacity is too small, not at all: INVALID_ARGUMENT. It may grow between two
 * calls: leave some room, or ask again. */
MOEBIUS_API moebius_status moebius_engine_metrics_text(const moebius_engine *engine, char *out_text, size_t capacity, size_t *out_needed,
                                                       moebius_error **err);

/* Takes the logits of a request's sample that came since the last call, float [positions, vocab_size], positions in order and
 * each once: the raw output of the LM head after each token but the last. *out_count (which may be NULL) is the number of floats
 * written. With out_logits NULL it is only set to what there is, and nothing is taken; when capacity is less than that, nothing is
 * taken either: INVALID_ARGUMENT. What a step adds meanwhile is kept for the next call. The engine keeps a finished request's
 * logits until they are taken. Blocks until a step under way is done.
 * By design: NOT_FOUND (unknown, or finished and all taken), INVALID_STATE (submitted without keep_logits). */
MOEBIUS_API moebius_status moebius_engine_take_logits(moebius_engine *engine, uint64_t id, int32_t sample, float *out_logits,
                                                      size_t capacity, size_t *out_count, moebius_error **err);

/* ---- tokenizer: byte-level BPE from a model folder's tokenizer.json; the engine itself speaks token ids. Immutable.
 * Threads: any. */

/* *out_tokenizer is the caller's. Blocks for the read. By design: NOT_FOUND, IO, CORRUPT_MODEL, UNSUPPORTED. */
MOEBIUS_API moebius_status moebius_tokenizer_load(const char *model_dir, moebius_tokenizer **out_tokenizer, moebius_error **err);
/* Its decoders must be gone. Threads: owner. */
MOEBIUS_API void moebius_tokenizer_destroy(moebius_tokenizer *tokenizer);
/* Ids of a text of num_bytes bytes (SIZE_MAX: up to its NUL); ill-formed UTF-8 is read as U+FFFD. add_special_tokens: 1 adds what
 * the model's template puts around a text. *out_count (which may be NULL) is always set to the number of ids; with capacity 0 that
 * is all; when capacity is too small nothing is written: INVALID_ARGUMENT. By design: UNSUPPORTED (a byte without a token). */
MOEBIUS_API moebius_status moebius_tokenizer_encode(const moebius_tokenizer *tokenizer, const char *text, size_t num_bytes,
                                                    int32_t add_special_tokens, int32_t *out_ids, size_t capacity, size_t *out_count,
                                                    moebius_error **err);
/* The text of ids [num_ids] as well-formed UTF-8 without a NUL at its end (it may hold some inside); ids without a token decode to
 * nothing. skip_special_tokens: 1 leaves them out. *out_bytes and capacity as above. */
MOEBIUS_API moebius_status moebius_tokenizer_decode(const moebius_tokenizer *tokenizer, const int32_t *ids, size_t num_ids,
                                                    int32_t skip_special_tokens, char *out_text, size_t capacity, size_t *out_bytes,
                                                    moebius_error **err);

/* Streaming decode: a decoder for each sample. Threads: owner. */

/* *out_decoder is the caller's and must not outlive its tokenizer. */
MOEBIUS_API moebius_status moebius_decoder_create(const moebius_tokenizer *tokenizer, int32_t skip_special_tokens,
                                                  moebius_decoder **out_decoder, moebius_error **err);
MOEBIUS_API void moebius_decoder_destroy(moebius_decoder *decoder);
/* The complete UTF-8 that this id makes certain, perhaps empty; NUL-terminated, *out_bytes long, borrowed until the next call on the
 * decoder. Both out-parameters may be NULL. */
MOEBIUS_API moebius_status moebius_decoder_push(moebius_decoder *decoder, int32_t id, const char **out_text, size_t *out_bytes,
                                                moebius_error **err);
/* U+FFFD if a character was left open, else empty; the decoder is as new afterwards. */
MOEBIUS_API moebius_status moebius_decoder_finish(moebius_decoder *decoder, const char **out_text, size_t *out_bytes, moebius_error **err);

#ifdef __cplusplus
}
#endif

#endif /* MOEBIUS_MOEBIUS_H_ */
