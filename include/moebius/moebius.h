/* Moebius: serving Mixture-of-Experts models on several ranks, switching between tensor parallelism (TP) and expert
 * parallelism (EP) while requests run.
 *
 * Conventions
 *   Status     every function that can fail returns a moebius_status: 0 is success, below 0 an error. Its text comes through the
 *              trailing `err`, which may be NULL; otherwise *err is set on failure and freed with moebius_error_destroy. On
 *              failure no other out-parameter is touched, but for the needed size where a function says "always".
 *   Handles    opaque, made by a _create or _load function, given back to _destroy, which takes NULL.
 *   Structs    begin with struct_size, which the caller sets to sizeof. Fields are only ever added at the end; 0 means default.
 *              Bytes behind the fields a library knows must be 0, else MOEBIUS_E_UNSUPPORTED.
 *   NULL       allowed for `err` and `user`, for a callback that is not wanted, for a single id, a count or a needed size that the caller does
 *              not want (but moebius_engine_poll's), and where a function says so; else MOEBIUS_E_INVALID_ARGUMENT.
 *   Strings    UTF-8, NUL-terminated. Borrowed unless said otherwise.
 *   Threads    said per function; "any" means from any thread, at any time, on one handle.
 *   Behaviour  nothing here prints, exits, installs handlers or lets an exception out. The environment is read only to find modules of
 *              devices (MOEBIUS_MODULE_PATH, and what a module says that it needs).
 */
#ifndef MOEBIUS_MOEBIUS_H_
#define MOEBIUS_MOEBIUS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Before each function of the library: exported, or plain with MOEBIUS_STATIC. */
#if defined(MOEBIUS_STATIC)
#define MOEBIUS_API
#else
#define MOEBIUS_API __attribute__((visibility("default")))
#endif

#define MOEBIUS_VERSION_MAJOR 0 /* of this header; moebius_version has the library's */
#define MOEBIUS_VERSION_MINOR 1 /* grows when the ABI does */
#define MOEBIUS_VERSION_PATCH 0 /* grows when it does not */

/* What a call came to: one of the values below; later versions may add some. */
typedef int32_t moebius_status;
/* Values of moebius_status. */
enum {
  MOEBIUS_OK = 0,
  MOEBIUS_E_INVALID_ARGUMENT = -1, /* a parameter, key or value; the text names it */
  MOEBIUS_E_INVALID_STATE = -2,    /* not now: the engine has failed, runs already, or has to be idle */
  MOEBIUS_E_NOT_FOUND = -3,        /* a file, key or request */
  MOEBIUS_E_UNSUPPORTED = -4,      /* something that this version does not have */
  MOEBIUS_E_IO = -5,               /* reading failed */
  MOEBIUS_E_CORRUPT_MODEL = -6,    /* a model's files contradict themselves or each other */
  MOEBIUS_E_OUT_OF_MEMORY = -7,    /* of the host or of a device */
  MOEBIUS_E_TIMEOUT = -8,          /* a wait that has a limit took longer */
  MOEBIUS_E_CANCELLED = -9,        /* by the host */
  MOEBIUS_E_QUEUE_FULL = -10,      /* try again after a step */
  MOEBIUS_E_CONTEXT_TOO_LONG = -11, /* prompt and max_tokens are more than max_context */
  MOEBIUS_E_DOES_NOT_FIT = -12,    /* into the memory there is */
  MOEBIUS_E_RANK_FAILED = -13,     /* a rank died or stopped answering */
  MOEBIUS_E_INTERNAL = -14         /* a fault of the library */
};

/* Who holds what of a layer: every rank a part of each expert (TP), or each rank some experts (EP). */
typedef int32_t moebius_layout;
/* Values of moebius_layout. */
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
  MOEBIUS_EVENT_SWITCH_FINISHED = 8, /* bytes, bytes_changed, seconds; the reason divides them by phase */
  MOEBIUS_EVENT_SWITCH_REFUSED = 9,  /* nothing was changed, the reason says by how much it does not fit; or the engine has failed */
  MOEBIUS_EVENT_ROLLED_BACK = 10,    /* a failure moved the seam back */
  MOEBIUS_EVENT_DECISION = 11        /* a policy decided; the reason is its record */
};

typedef struct moebius_error moebius_error;         /* why a call failed */
typedef struct moebius_config moebius_config;       /* settings of an engine, by key */
typedef struct moebius_engine moebius_engine;       /* a model being served */
typedef struct moebius_request moebius_request;     /* a prompt and how to go on from it */
typedef struct moebius_source moebius_source;       /* a model's files */
typedef struct moebius_tokenizer moebius_tokenizer; /* text to token ids and back */
typedef struct moebius_decoder moebius_decoder;     /* token ids to text as they come */

/* ---- library. Any thread. Since 0.1. */

MOEBIUS_API void moebius_version(int32_t *major, int32_t *minor, int32_t *patch); /* each may be NULL */
MOEBIUS_API const char *moebius_status_name(moebius_status status);               /* e.g. "queue_full"; static */
/* 1 where this library, on this machine, has it: "tokenizer", a kernel path ("amx", "avx512bf16", "avx512", "avx2", "portable"), a device
 * ("cpu"; "cuda": its module is where it is looked for, which says nothing of a GPU). 0 otherwise, and for an unknown name. */
MOEBIUS_API int32_t moebius_has_feature(const char *name);
/* Version, compiler, kernel paths and devices as a JSON object; static. */
MOEBIUS_API const char *moebius_build_info(void);
/* sizeof a struct of this header ("moebius_event") as the library was built with it; 0 for an unknown name. For bindings to compare. */
MOEBIUS_API size_t moebius_struct_size(const char *name);

MOEBIUS_API moebius_status moebius_error_code(const moebius_error *err); /* the status that the call returned */
MOEBIUS_API const char *moebius_error_message(const moebius_error *err); /* lives as long as err */
MOEBIUS_API void moebius_error_destroy(moebius_error *err);              /* NULL is no error */

/* ---- configuration: keys and values. One owner. Since 0.1.
 * Keys: ranks, threads, layout ("tp", "ep"), memory_bytes, kv_tokens, isa, slices_per_expert, page_tokens, chunk_tokens,
 * max_batch, max_queue, max_context, prefix_cache, seed, stall_budget_ms, preempt_to_fit, wait_deadline_ms, dummy_weights,
 * mode ("exact", "fast"), policy ("manual", "threshold", "measured"), policy_variant ("decode", "prefill", "rollout"),
 * policy_threshold, policy_window_steps, policy_cooldown_s, policy_shadow, policy_explore, policy_calibrate_ms, policy_file,
 * engine_id; for devices: device ("cpu", "cuda"), device_ids, communicator ("peer", "nccl"), rank_processes, two_shot_bytes,
 * capture_steps, streams, nccl_comms. moebius_config_key enumerates them with types, defaults, meaning and stability. An unknown key is
 * MOEBIUS_E_INVALID_ARGUMENT and names a near one, if there is any. */

MOEBIUS_API moebius_status moebius_config_create(moebius_config **out_config, moebius_error **err); /* every key has its default */
MOEBIUS_API void moebius_config_destroy(moebius_config *config);                                    /* engines made of it stay */
/* Sets a key of this type; an f64 key takes an integer too. A value is checked here or when an engine is made. */
MOEBIUS_API moebius_status moebius_config_set_i64(moebius_config *config, const char *key, int64_t value, moebius_error **err);
MOEBIUS_API moebius_status moebius_config_set_f64(moebius_config *config, const char *key, double value, moebius_error **err);
MOEBIUS_API moebius_status moebius_config_set_str(moebius_config *config, const char *key, const char *value, moebius_error **err);
/* Things of the host's, one for each rank, which must outlive the engine; 0 of them: the engine makes its own. Keys: streams (cudaStream_t,
 * of the rank's device as device_ids has it, not the default stream; the engine's work is in order with what the host queues there) and
 * nccl_comms (ncclComm_t of one world with the same ranks; where a rank fails they are aborted, and the engine then stays failed). */
MOEBIUS_API moebius_status moebius_config_set_handles(moebius_config *config, const char *key, void *const *handles, size_t num,
                                                      moebius_error **err);

/* Progress of a load, and of each later update of the weights: bytes done and in all; a value other than 0 cancels it
 * (MOEBIUS_E_CANCELLED). Called on the loading threads, one at a time; it must not call that engine. */
typedef int32_t (*moebius_progress_fn)(void *user, int64_t bytes_done, int64_t bytes_total);
MOEBIUS_API moebius_status moebius_config_set_progress(moebius_config *config, moebius_progress_fn fn, void *user, moebius_error **err);

/* What happens, a line a call; category is "load" (warnings too: keys and tensors that are not used), "switch", "policy" or "engine".
 * Called on the thread that it happens on, some of it inside a step: it must not call the engine. One call at a time of one engine's. The
 * strings are lent for the call. */
enum { MOEBIUS_LOG_ERROR = 0, MOEBIUS_LOG_WARNING = 1, MOEBIUS_LOG_INFO = 2 };
typedef void (*moebius_log_fn)(void *user, int32_t level, const char *category, const char *message);
MOEBIUS_API moebius_status moebius_config_set_log(moebius_config *config, moebius_log_fn fn, void *user, moebius_error **err);

/* Each thread that the library starts calls it first (starting is 1) and last (0): to name it, bind it to cores, attach it to a runtime.
 * rank and thread are −1 for the engine's own thread. The thread that calls moebius_engine_step is the host's and does not call it.
 * After RANK_FAILED a thread that is late calls it when it comes back, which may be after the engine was destroyed. */
typedef void (*moebius_thread_fn)(void *user, int32_t rank, int32_t thread, int32_t starting);
MOEBIUS_API moebius_status moebius_config_set_thread_hook(moebius_config *config, moebius_thread_fn fn, void *user, moebius_error **err);

/* Where ranks on the cpu keep weights, KV and activations: `size` bytes aligned to `alignment` (a power of two), zeroed or not; NULL: there
 * are none (MOEBIUS_E_OUT_OF_MEMORY). Both are called by several threads at once, while the engine is made and destroyed, never in a step;
 * after RANK_FAILED memory is given back when the late thread is, which may be after moebius_engine_destroy.
 * With another device MOEBIUS_E_UNSUPPORTED. Both NULL: the library maps huge pages itself. */
typedef void *(*moebius_alloc_fn)(void *user, size_t size, size_t alignment);
typedef void (*moebius_free_fn)(void *user, void *memory, size_t size);
MOEBIUS_API moebius_status moebius_config_set_allocator(moebius_config *config, moebius_alloc_fn alloc_fn, moebius_free_fn free_fn, void *user,
                                                        moebius_error **err);

/* The index-th key; all strings are static. Type: "i64" (flags too: 0 or 1), "f64", "str" or "handles"; stability: "stable" or "experimental"
 * (may change in any release). MOEBIUS_E_NOT_FOUND past the last. out-parameters may be NULL. */
MOEBIUS_API moebius_status moebius_config_key(size_t index, const char **out_name, const char **out_type, const char **out_default,
                                              const char **out_doc, const char **out_stability, moebius_error **err);

/* ---- a model's files, where they are not in a folder. One owner, but what loads from it calls the reader from several threads.
 * Since 0.1. */

/* `name` stands for the model in messages and metrics. */
MOEBIUS_API moebius_status moebius_source_create(const char *name, moebius_source **out_source, moebius_error **err);
MOEBIUS_API void moebius_source_destroy(moebius_source *source);
/* The file `file_name` ("config.json", "model.safetensors", …) is these bytes; borrowed until the source is destroyed. */
MOEBIUS_API moebius_status moebius_source_add_memory(moebius_source *source, const char *file_name, const void *data, size_t size,
                                                     moebius_error **err);
/* A tensor by itself, dense and little-endian, named as in the model's checkpoint; dtype "BF16", "F16" or "F32", shape [num_dims]. The bytes
 * are borrowed likewise. Tensors that were added are the source's weights, in place of *.safetensors; a name given again replaces. */
MOEBIUS_API moebius_status moebius_source_add_tensor(moebius_source *source, const char *name, const char *dtype, const int64_t *shape,
                                                     size_t num_dims, const void *data, size_t size, moebius_error **err);
/* Files that were not added are asked for here. size: bytes of the file, -1: there is no such file. read: fills `out` with bytes
 * [offset, offset + size) of it, 0 on success. Anything else is MOEBIUS_E_IO. Both are called by several threads at once; reads are many, of
 * 4 to 256 KiB, roughly in order for each thread: over a network read ahead, or fetch whole files and add them as memory. */
typedef int64_t (*moebius_size_fn)(void *user, const char *file_name);
typedef int32_t (*moebius_read_fn)(void *user, const char *file_name, uint64_t offset, void *out, size_t size);
MOEBIUS_API moebius_status moebius_source_set_reader(moebius_source *source, moebius_size_fn size_fn, moebius_read_fn read_fn, void *user,
                                                     moebius_error **err);

/* ---- engine. Since 0.1. */

/* Loads the model folder (config.json, *.safetensors) and builds both layouts. Blocks for as long as the load takes. The
 * config (NULL: its defaults) is copied. By design: INVALID_ARGUMENT (settings that exclude each other), NOT_FOUND, IO, UNSUPPORTED,
 * CORRUPT_MODEL, DOES_NOT_FIT, OUT_OF_MEMORY, CANCELLED. */
MOEBIUS_API moebius_status moebius_engine_create(const char *model_dir, const moebius_config *config, moebius_engine **out_engine,
                                                 moebius_error **err);
/* The same from a source, of which nothing is used afterwards. */
MOEBIUS_API moebius_status moebius_engine_create_from(const moebius_source *source, const moebius_config *config, moebius_engine **out_engine,
                                                      moebius_error **err);
/* Ends the own thread if there is one. Requests that still run are dropped. */
MOEBIUS_API void moebius_engine_destroy(moebius_engine *engine);

/* What the model is. */
typedef struct moebius_model_info {
  uint32_t struct_size;
  int32_t num_layers;        /* N */
  int32_t vocab_size;        /* rows of the logits; a tokenizer's may be smaller */
  int32_t hidden;            /* width of a token's row between layers */
  int32_t num_experts;       /* of each sparse layer, without shared ones */
  int32_t top_k;             /* of these, experts that a token goes through */
  int64_t max_context;       /* tokens of a request, prompt included */
  int32_t slices_per_expert; /* S: cuts of each MLP, which ranks share in TP */
  int32_t head_groups;       /* A: groups of attention heads, which ranks share in TP */
} moebius_model_info;
/* Fills out_info. Any thread. */
MOEBIUS_API moebius_status moebius_engine_model(const moebius_engine *engine, moebius_model_info *out_info, moebius_error **err);

/* ---- requests: made, filled, submitted (which copies), destroyed. One owner. Since 0.1. */

MOEBIUS_API moebius_status moebius_request_create(moebius_request **out_request, moebius_error **err); /* without a prompt */
MOEBIUS_API void moebius_request_destroy(moebius_request *request); /* what was submitted of it goes on */
/* Token ids [num_tokens], at least one; copied. */
MOEBIUS_API moebius_status moebius_request_set_prompt(moebius_request *request, const int32_t *token_ids, size_t num_tokens,
                                                      moebius_error **err);
/* Comes back in every event of the request. */
MOEBIUS_API moebius_status moebius_request_set_user_data(moebius_request *request, uint64_t user_data, moebius_error **err);
/* Integer keys (default):
 *   max_tokens (16), min_tokens (0)  tokens to generate, 1 to 2^30; until min_tokens (at most max_tokens) end-of-text and stop tokens are
 *                                    not chosen
 *   n (1)                            samples of the prompt, 1 to 1,024
 *   top_k (0)                        0 or -1: off
 *   seed (none)                      any number; without one the engine's seed and the id decide
 *   ignore_eos (0)                   1: end-of-text does not end it
 *   logprobs (none)                  0 to 20: log-probabilities of the token and of so many likeliest, of the raw distribution
 *   priority (0)                     lower runs first
 *   keep_logits, routed_experts (0)  1: to be taken with moebius_engine_take_logits, _take_routes; such a request uses no cached prefix,
 *                                    and each of its n samples computes the prompt
 * Float keys (default):
 *   temperature (1)                  0: greedy
 *   top_p (1), min_p (0)             above 0 to 1; 0 to 1, of the largest probability
 *   presence_penalty, frequency_penalty (0)  -2 to 2, over generated tokens
 *   repetition_penalty (1)           above 0, over prompt and generated tokens
 *   deadline_ms (0: none)            from submit; then it ends as abort
 * String keys: id (its number; seeds the request where no seed is set).
 * Values are looked at when it is submitted. A key of other engines that is not supported is MOEBIUS_E_UNSUPPORTED, any other
 * MOEBIUS_E_INVALID_ARGUMENT. */
MOEBIUS_API moebius_status moebius_request_set_i64(moebius_request *request, const char *key, int64_t value, moebius_error **err);
MOEBIUS_API moebius_status moebius_request_set_f64(moebius_request *request, const char *key, double value, moebius_error **err);
MOEBIUS_API moebius_status moebius_request_set_str(moebius_request *request, const char *key, const char *value, moebius_error **err);
/* Keys: stop_token_ids (each ends the request, as its last token), allowed_token_ids (no other is chosen). */
MOEBIUS_API moebius_status moebius_request_set_ids(moebius_request *request, const char *key, const int32_t *token_ids, size_t num_tokens,
                                                   moebius_error **err);
/* -100 to 100, added to the token's logit. */
MOEBIUS_API moebius_status moebius_request_add_logit_bias(moebius_request *request, int32_t token, float bias, moebius_error **err);

/* Queues a request; *out_id names it in events. Any thread. By design: INVALID_ARGUMENT, CONTEXT_TOO_LONG, DOES_NOT_FIT,
 * UNSUPPORTED (routed_experts of a model without any), QUEUE_FULL, INVALID_STATE (the engine has failed, drains, or has mixed weights after an update that failed).
 * moebius_engine_check does the same checks (but the queue's) and queues nothing. */
MOEBIUS_API moebius_status moebius_engine_submit(moebius_engine *engine, const moebius_request *request, uint64_t *out_id,
                                                 moebius_error **err);
MOEBIUS_API moebius_status moebius_engine_check(const moebius_engine *engine, const moebius_request *request, moebius_error **err);
/* Queues all of `requests`, or none; out_ids [num]. */
MOEBIUS_API moebius_status moebius_engine_submit_many(moebius_engine *engine, const moebius_request *const *requests, size_t num,
                                                      uint64_t *out_ids, moebius_error **err);
/* Ends a request wherever it is; its FINISHED event (abort) follows. Of one that has finished it gives back the logits and routes that were
 * not taken. NOT_FOUND: unknown, or already finished and keeps nothing. Any thread. */
MOEBIUS_API moebius_status moebius_engine_cancel(moebius_engine *engine, uint64_t id, moebius_error **err);
/* Ends one of its n samples; one that has ended already is left alone. INVALID_ARGUMENT: it has no such sample. Any thread. */
MOEBIUS_API moebius_status moebius_engine_cancel_sample(moebius_engine *engine, uint64_t id, int32_t sample, moebius_error **err);

/* From now on submit is refused (INVALID_STATE). Waits at most timeout_ms until no request runs or waits and no switch is under way, while the
 * engine's own thread or the host's steps on another one end them. TIMEOUT: some still do; to be called again, or they are cancelled.
 * INVALID_STATE: the engine has failed, before or meanwhile. Any thread. */
MOEBIUS_API moebius_status moebius_engine_drain(moebius_engine *engine, double timeout_ms, moebius_error **err);
/* Submit is taken again. Any thread. */
MOEBIUS_API moebius_status moebius_engine_resume(moebius_engine *engine, moebius_error **err);

/* ---- running. Either the host calls step, or the engine's own thread does after start. */

/* What a step did. */
typedef struct moebius_step_result {
  uint32_t struct_size;
  int32_t worked;         /* 0: nothing was running, waiting or switching */
  int32_t decode_rows;    /* tokens that were fed one at a time: a request that generates has one */
  int32_t prefill_rows;   /* tokens of prompts */
  double seconds;         /* of the whole step */
  double compute_seconds; /* of the forward pass and sampling */
  double switch_seconds;  /* spent on switches */
} moebius_step_result;
/* Runs one step (an idle one counts too). The calling thread computes. One thread at a time. out_result may be NULL. An error
 * means that the engine has failed: every request gets a FINISHED event (error), and later calls INVALID_STATE. While the engine's own
 * thread runs it is INVALID_STATE too, and harms nothing. */
MOEBIUS_API moebius_status moebius_engine_step(moebius_engine *engine, moebius_step_result *out_result, moebius_error **err);
/* The engine's own thread steps whenever there is work, and every 50 ms while there is none but a policy watches the load, until
 * stop (which waits for a step under way) or a failure. After stop nobody waits in moebius_engine_poll, until start or step. One
 * thread at a time calls these two. INVALID_STATE: it runs already, or the engine has failed. */
MOEBIUS_API moebius_status moebius_engine_start(moebius_engine *engine, moebius_error **err);
MOEBIUS_API moebius_status moebius_engine_stop(moebius_engine *engine, moebius_error **err);

/* What happened; which fields mean something depends on the type. */
typedef struct moebius_event {
  uint32_t struct_size;
  int32_t type;        /* MOEBIUS_EVENT_… */
  uint64_t step;       /* the step before or in which it happened, from 0 */
  uint64_t request;    /* 0 where none */
  uint64_t user_data;  /* of the request */
  int64_t time_ns;     /* when it happened: CLOCK_MONOTONIC, as all times here */
  int32_t sample;      /* of the request's n */
  int32_t token;       /* TOKEN */
  float logprob;       /* TOKEN, where logprobs was asked for */
  int32_t num_top;     /* entries of top_tokens and top_logprobs */
  int32_t top_tokens[20]; /* the likeliest tokens first */
  float top_logprobs[20]; /* theirs */
  int32_t finish_reason;  /* FINISHED: MOEBIUS_FINISH_…; of the last TOKEN too: STOP is an end or stop token, which is no text */
  int32_t from;        /* layout before a switch */
  int32_t to;          /* layout that it is for */
  int32_t seam;        /* layers [0, seam) run in TP */
  int64_t bytes;         /* written by the switch: weights and KV, all ranks */
  int64_t bytes_changed; /* of these, to a new owner */
  double seconds;        /* that the switch took from its steps */
  int32_t prompt_tokens; /* FINISHED, this and what follows: usage and times of the sample */
  int32_t cached_tokens; /* of the prompt, found in the prefix cache when it was first scheduled */
  int32_t generated_tokens; /* a stop token included */
  int32_t preemptions;    /* times that it gave up its KV */
  int64_t queued_ns;      /* when it was submitted */
  int64_t scheduled_ns;   /* when it first ran; 0: never */
  int64_t first_token_ns; /* 0: never */
  char reason[512];    /* NUL-terminated; only a longer text of a failure is shortened */
} moebius_event;
/* Up to `capacity` events in order into an array whose elements are `stride` bytes apart (sizeof the caller's struct; each
 * element's struct_size is set by the library). Waits at most timeout_ms for the first (0 or less: not at all; INFINITY: as long as it
 * takes, or until stop). Events come from steps only, ARRIVED too, and from an update of the weights that fails. Any thread. */
MOEBIUS_API moebius_status moebius_engine_poll(moebius_engine *engine, moebius_event *out_events, size_t capacity, size_t stride,
                                               double timeout_ms, size_t *out_count, moebius_error **err);

/* A file descriptor (an eventfd) that is readable while events wait: for the loop of a host (epoll, asyncio), which then polls with
 * timeout 0 until it gets fewer than it has room for. It is the engine's: not to be read, written or closed. Any thread. By design:
 * OUT_OF_MEMORY (too many files are open). */
MOEBIUS_API moebius_status moebius_engine_event_fd(moebius_engine *engine, int32_t *out_fd, moebius_error **err);

/* ---- switching. Any thread; taken up before the next step in the order asked for, the outcome of each is an event. One that
 * is asked for while another is under way turns the seam round where it stands; where it goes there already, the end of that
 * one is the outcome of both. When the engine fails, each that has not ended is SWITCH_REFUSED with the reason.
 * QUEUE_FULL: 65,536 wait for the next step. INVALID_STATE: the engine has failed. */

/* Asks for a layout: every layer in TP or every layer in EP. */
MOEBIUS_API moebius_status moebius_engine_switch(moebius_engine *engine, moebius_layout to, moebius_error **err);
/* Moves the seam to this layer (0 = EP … num_layers = TP) and holds it there, until a switch is asked for; policy threshold may ask too. */
MOEBIUS_API moebius_status moebius_engine_hold_seam(moebius_engine *engine, int32_t seam, moebius_error **err);
/* 0: a switch moves everything at once; else the time that each step may lend to it. */
MOEBIUS_API moebius_status moebius_engine_set_stall_budget(moebius_engine *engine, double ms, moebius_error **err);
/* Takes the policy_* keys of the config but policy_calibrate_ms and policy_file, which count when an engine is made; learned costs stay.
 * INVALID_ARGUMENT: a value out of range, or a threshold that max_batch keeps out of reach. */
MOEBIUS_API moebius_status moebius_engine_set_policy(moebius_engine *engine, const moebius_config *config, moebius_error **err);

/* What a switch would take. */
typedef struct moebius_switch_estimate {
  uint32_t struct_size;
  int32_t fits;          /* 0: it would be refused */
  int64_t bytes;         /* that would be written: weights and KV, all ranks */
  int64_t bytes_changed; /* of these, to a new owner */
  double seconds;        /* by the last switches' speed, or a copy's */
  char reason[512];      /* why it does not fit */
} moebius_switch_estimate;
/* What a switch would take now. Waits for a step under way. */
MOEBIUS_API moebius_status moebius_engine_estimate_switch(moebius_engine *engine, moebius_layout to, moebius_switch_estimate *out_estimate,
                                                          moebius_error **err);

/* ---- new weights of the same model, as training makes them between rollouts: written over the engine's, in whatever layout it is (a seam that
 * is held inside too), and the prefix cache is emptied. What it computes from then on is, bit for bit, what an engine made of them computes.
 * Any thread. Blocks for as long as the load takes, after a step under way; requests that are submitted meanwhile wait.
 * Nothing has changed after INVALID_STATE (a request runs or waits, see moebius_engine_drain; a switch is under way), INVALID_ARGUMENT (weights
 * of another model), NOT_FOUND, UNSUPPORTED and CORRUPT_MODEL (tensors that are missing or have another shape or type). A failure later on
 * (IO, CANCELLED by the config's progress, a file that ends early, …) leaves some old and some new weights: step and submit are then
 * INVALID_STATE, and requests that wait end with an error, until an update of all weights succeeds. */

/* From a folder: all tensors. config.json need not be there; if it is, it must not describe another model (its end tokens are not looked at). */
MOEBIUS_API moebius_status moebius_engine_update_weights(moebius_engine *engine, const char *model_dir, moebius_error **err);
/* The same from a source, of which nothing is used afterwards. */
MOEBIUS_API moebius_status moebius_engine_update_weights_from(moebius_engine *engine, const moebius_source *source, moebius_error **err);
/* Only the tensors that the source has, one at least: of a layer, or those that an adapter has been merged into. The others stay. A name that
 * the model does not have is INVALID_ARGUMENT. */
MOEBIUS_API moebius_status moebius_engine_update_tensors(moebius_engine *engine, const moebius_source *source, moebius_error **err);

/* ---- reports. Any thread. */

/* Counters since the engine was made, and where it stands. */
typedef struct moebius_stats {
  uint32_t struct_size;
  int32_t running;    /* samples of requests that have KV */
  int32_t waiting;    /* that wait for it */
  int32_t seam;       /* layers [0, seam) run in TP */
  int32_t num_layers; /* N */
  int32_t switching;  /* 1: a switch is under way */
  uint64_t step; /* steps run, idle ones included */
  uint64_t switches; /* that arrived at a layout, from another one or after a turn; held seams are not counted */
  uint64_t rollbacks;         /* of switches, after a failure */
  uint64_t refusals;          /* of switches, which did not fit */
  uint64_t preemptions;       /* of samples, which gave up their KV */
  uint64_t prompt_tokens;     /* computed, each once */
  uint64_t generation_tokens; /* tokens that were generated */
  uint64_t prefix_queries;    /* tokens that were looked up in the prefix cache */
  uint64_t prefix_hits;       /* of these, found */
  int64_t bytes_moved; /* by switches that ended or were rolled back, held seams too; so switch_seconds */
  double switch_seconds; /* that they took from their steps */
  double kv_usage;       /* 0 to 1, of the present layout's pages */
} moebius_stats;
/* Fills out_stats, as of the last step; `waiting` counts what was submitted since, too. */
MOEBIUS_API moebius_status moebius_engine_stats(const moebius_engine *engine, moebius_stats *out_stats, moebius_error **err);

/* Where memory goes, in bytes of a rank unless said otherwise. */
typedef struct moebius_memory {
  uint32_t struct_size;
  int32_t num_ranks;       /* P */
  int64_t arena_bytes;     /* of the largest rank; its parts: */
  int64_t kept_bytes;      /*   slices owned in both layouts */
  int64_t lead_bytes;      /*   what holding both layouts costs */
  int64_t workspace_bytes; /* per rank: activations, scratch, its share of the logits */
  int64_t shared_bytes;    /* replicated weights, once */
  int64_t layer_bytes;     /* the largest layer's moving bytes */
  int64_t tp_tokens;       /* KV tokens that TP holds in all */
  int64_t ep_tokens;       /* that EP holds, all homes together */
} moebius_memory;
/* Fills out_memory; it stays the same as long as the engine lives. */
MOEBIUS_API moebius_status moebius_engine_memory(const moebius_engine *engine, moebius_memory *out_memory, moebius_error **err);

/* Prometheus text. Writes up to `capacity` bytes (NUL included, never cut inside: INVALID_ARGUMENT when too small) and always
 * *out_needed; call with capacity 0 to learn it. */
MOEBIUS_API moebius_status moebius_engine_metrics_text(const moebius_engine *engine, char *out_text, size_t capacity, size_t *out_needed,
                                                       moebius_error **err);

/* Logits of a keep_logits request, float [positions, vocab_size], positions in order, since the last call that took them.
 * They are stored as they are computed: such a step allocates. When a rank has stopped answering they are copied, not taken.
 * Always sets *out_count (floats). Nothing is taken with out_logits NULL, or when `capacity` floats are too few for all of them
 * (INVALID_ARGUMENT). Waits for a step under way. */
MOEBIUS_API moebius_status moebius_engine_take_logits(moebius_engine *engine, uint64_t id, int32_t sample, float *out_logits,
                                                      size_t capacity, size_t *out_count, moebius_error **err);

/* The experts that the router chose, int16_t [positions, num_layers, top_k] of a routed_experts request (moebius_model_info; −1 in a dense
 * layer; shared experts, which every token goes through, are not among them), in everything else like the logits. Steps with such a request do not replay captured work. */
MOEBIUS_API moebius_status moebius_engine_take_routes(moebius_engine *engine, uint64_t id, int32_t sample, int16_t *out_experts,
                                                      size_t capacity, size_t *out_count, moebius_error **err);

/* ---- tokenizer: byte-level BPE from a model folder's tokenizer.json; the engine itself speaks token ids. Since 0.1.
 * A tokenizer is immutable: any thread. A decoder has one owner and must not outlive its tokenizer. */

/* Reads tokenizer.json of a folder. By design: NOT_FOUND, IO, UNSUPPORTED, CORRUPT_MODEL. */
MOEBIUS_API moebius_status moebius_tokenizer_load(const char *model_dir, moebius_tokenizer **out_tokenizer, moebius_error **err);
MOEBIUS_API moebius_status moebius_tokenizer_load_from(const moebius_source *source, moebius_tokenizer **out_tokenizer, moebius_error **err);
MOEBIUS_API void moebius_tokenizer_destroy(moebius_tokenizer *tokenizer); /* after its decoders */
/* Writes up to `capacity` ids and always *out_count; INVALID_ARGUMENT when too small (nothing written but the count). */
MOEBIUS_API moebius_status moebius_tokenizer_encode(const moebius_tokenizer *tokenizer, const char *text, size_t num_bytes,
                                                    int32_t add_special_tokens, int32_t *out_ids, size_t capacity, size_t *out_count,
                                                    moebius_error **err);
/* The same for bytes; no NUL is written. An id outside the tokenizer's vocabulary is INVALID_ARGUMENT and named (a model's own
 * vocabulary is often padded beyond it); one inside without a token decodes to nothing. */
MOEBIUS_API moebius_status moebius_tokenizer_decode(const moebius_tokenizer *tokenizer, const int32_t *ids, size_t num_ids,
                                                    int32_t skip_special_tokens, char *out_text, size_t capacity, size_t *out_bytes,
                                                    moebius_error **err);
/* Streaming: each push gives the complete UTF-8 that has become certain, borrowed until the next call on the decoder. After an id
 * that is refused as above the decoder is as before and may go on. */
MOEBIUS_API moebius_status moebius_decoder_create(const moebius_tokenizer *tokenizer, moebius_decoder **out_decoder, moebius_error **err);
MOEBIUS_API void moebius_decoder_destroy(moebius_decoder *decoder); /* before its tokenizer */
MOEBIUS_API moebius_status moebius_decoder_push(moebius_decoder *decoder, int32_t id, const char **out_text, size_t *out_bytes,
                                                moebius_error **err);
MOEBIUS_API moebius_status moebius_decoder_finish(moebius_decoder *decoder, const char **out_text, size_t *out_bytes, moebius_error **err);

/* ---- plan: the switch alone, for a server that computes by itself. It describes its model's slices, learns where each lies in a rank's
 * one allocation (its arena) in both layouts, and moves layers one by one while it serves: layers [0, seam) lie in TP, the others in EP.
 * Weights that all ranks have whole in both layouts (norms, biases, routers, embeddings) are no part of it. Since 0.1. */

typedef struct moebius_plan moebius_plan; /* where slices lie in both layouts, and how far they have moved */

/* What is to be placed. */
typedef struct moebius_plan_spec {
  uint32_t struct_size;
  int32_t num_layers;         /* N */
  int32_t num_heads;          /* query heads */
  int32_t num_kv_heads;       /* which query heads share in equal groups */
  int32_t num_experts;        /* of a layer; 0: all layers are dense */
  int32_t slices_per_expert;  /* S: every MLP is cut into so many slices along its neurons; at least the number of ranks */
  int32_t head_groups;        /* A: attention is cut into so many groups of query heads, a multiple of num_kv_heads that divides num_heads; 0:
                                 the fewest that are at least min(S, num_heads) */
  int32_t num_shared_experts; /* of a sparse layer, besides num_experts and as wide as those: every rank has them whole in EP; 0: none */
  int64_t attention_bytes;    /* of a head group's slice (its q and o weights). All bytes here are multiples of 64 */
  int64_t kv_projection_bytes; /* of one KV head's k and v weights, which every rank whose groups read that head has in TP */
  int64_t expert_slice_bytes; /* of one of the S slices of an expert */
  int64_t dense_slice_bytes;  /* of one of the S slices of a dense MLP */
  int64_t kv_slice_bytes;     /* of KV: K and V of one page for one KV head in one layer; 0: no KV lies in the arena */
  int64_t tp_pages;           /* KV pages of each rank in TP, */
  int64_t ep_pages;           /* in EP; both 0: as many as the config's memory_bytes holds */
  const int32_t *experts_of_layer; /* [num_layers], 0: a dense layer; NULL: num_experts everywhere */
  const int32_t *expert_ranks; /* [num_layers][num_experts] the rank of each expert in EP (in a dense layer ignored); NULL: expert e of E
                                  goes to rank floor(e * ranks / E) */
} moebius_plan_spec;

/* What was planned, and the seam. */
typedef struct moebius_plan_info {
  uint32_t struct_size;
  int32_t ranks;            /* P */
  int32_t num_layers;       /* N */
  int32_t seam;             /* layers [0, seam) lie in TP */
  int32_t slices_per_expert; /* S */
  int32_t head_groups;      /* A, as given or chosen */
  int64_t tp_pages;         /* of each rank */
  int64_t ep_pages;         /* of the rank that has the fewest */
  int64_t arena_bytes;      /* of the largest rank */
  int64_t lead_bytes;       /* of these: what holding both layouts costs */
  int64_t to_tp_bytes;      /* of weights that a switch of all layers copies, to TP */
  int64_t to_ep_bytes;      /* and to EP */
} moebius_plan_info;

/* Of the config (NULL: its defaults) these keys count: ranks, layout (where it starts), memory_bytes (of an arena), device, device_ids,
 * streams. By design: INVALID_ARGUMENT, DOES_NOT_FIT, UNSUPPORTED (the device; communicator nccl and rank_processes, since a plan's ranks read
 * each other's memory). A plan's functions may be called from any thread, but moebius_plan_advance and moebius_plan_destroy only while no
 * other runs. */
MOEBIUS_API moebius_status moebius_plan_create(const moebius_plan_spec *spec, const moebius_config *config, moebius_plan **out_plan,
                                               moebius_error **err);
MOEBIUS_API void moebius_plan_destroy(moebius_plan *plan);
MOEBIUS_API moebius_status moebius_plan_get_info(const moebius_plan *plan, moebius_plan_info *out_info, moebius_error **err);
MOEBIUS_API moebius_status moebius_plan_arena_bytes(const moebius_plan *plan, int32_t rank, int64_t *out_bytes, moebius_error **err);
/* Proves both arenas and both lists of copies once more, from their intervals alone: at every seam nothing that is still needed is
 * overwritten. (moebius_plan_create has done it.) INTERNAL: it does not hold, with the place. */
MOEBIUS_API moebius_status moebius_plan_verify(const moebius_plan *plan, moebius_error **err);

/* Kinds of slices. */
enum {
  MOEBIUS_SLICE_EXPERT = 0,
  MOEBIUS_SLICE_DENSE = 1,
  MOEBIUS_SLICE_ATTENTION = 2,
  MOEBIUS_SLICE_KV_PROJECTION = 3,
  MOEBIUS_SLICE_SHARED_EXPERT = 4
};

/* A slice of a layer's weights, as one rank has it. */
typedef struct moebius_slice {
  uint32_t struct_size;
  int32_t kind;      /* MOEBIUS_SLICE_… */
  int32_t index;     /* the expert (shared ones follow the layer's others), 0, the head group or the KV head */
  int32_t cut;       /* of an MLP: 0 to S - 1, consecutive neurons; 0 otherwise */
  int64_t bytes;     /* as the spec says for its kind */
  int64_t tp_offset; /* in the rank's arena; -1: the rank has none of it in this layout */
  int64_t ep_offset; /* likewise */
} moebius_slice;
/* The slices of a layer and where they lie on a rank: an array like that of moebius_engine_poll. Always sets *out_count; INVALID_ARGUMENT
 * when capacity is smaller (nothing is written but the count). Likewise below. */
MOEBIUS_API moebius_status moebius_plan_slices(const moebius_plan *plan, int32_t rank, int32_t layer, moebius_slice *out_slices,
                                               size_t capacity, size_t stride, size_t *out_count, moebius_error **err);

/* Where a layer's KV pages lie on a rank. */
typedef struct moebius_kv_pool {
  uint32_t struct_size;
  int32_t first_head; /* KV heads [first_head, first_head + num_heads) of the model */
  int32_t num_heads;  /* that the rank has in this layout */
  int32_t reserved;   /* 0 */
  int64_t offset;     /* page p of head j (from first_head on) lies at offset + (p * num_heads + j) * kv_slice_bytes */
  int64_t pages;      /* that lie there */
} moebius_kv_pool;
/* Fills out_pool. */
MOEBIUS_API moebius_status moebius_plan_kv_pool(const moebius_plan *plan, moebius_layout layout, int32_t rank, int32_t layer,
                                                moebius_kv_pool *out_pool, moebius_error **err);

/* A block of KV that is in use: its page on all ranks in TP, the rank that is its home in EP, its page there. Never grows. */
typedef struct moebius_page_pair {
  int32_t tp_page; /* on every rank, in TP */
  int32_t home;    /* the rank in EP */
  int32_t ep_page; /* on it */
} moebius_page_pair;

/* One copy from arena to arena. */
typedef struct moebius_block_copy {
  uint32_t struct_size;
  int32_t src_rank;   /* whose arena is read */
  int32_t dst_rank;   /* whose is written */
  int32_t reserved;   /* 0 */
  int64_t src_offset; /* in the arena of src_rank */
  int64_t dst_offset; /* in the arena of dst_rank */
  int64_t bytes;      /* a multiple of 64 */
} moebius_block_copy;
/* What a layer's move to `to` copies, over all ranks: each slice, once, to each rank that has it in the new layout and not in the old; then
 * the KV of `pairs`. INVALID_ARGUMENT: pages out of range, or one that is written twice. */
MOEBIUS_API moebius_status moebius_plan_copies(const moebius_plan *plan, moebius_layout to, int32_t layer, const moebius_page_pair *pairs,
                                               size_t num_pairs, moebius_block_copy *out_copies, size_t capacity, size_t stride,
                                               size_t *out_count, moebius_error **err);
/* Does the copies of the layer that moves next (to TP: layer `seam`; to EP: layer seam - 1) to one rank, or with rank -1 to all of them,
 * and returns when they are there. arenas [ranks]: the host's memory, or the device's, aligned to 64 bytes. Nothing may use that layer
 * meanwhile; all others may be in use. Different ranks at once by different threads. By design: INVALID_STATE (no layer is left). */
MOEBIUS_API moebius_status moebius_plan_copy_next(moebius_plan *plan, moebius_layout to, int32_t rank, void *const *arenas,
                                                  const moebius_page_pair *pairs, size_t num_pairs, moebius_error **err);
/* The next layer has been copied on every rank (by moebius_plan_copy_next or by the host): the seam moves past it. Until the next copy in the
 * same direction the old places are intact, so a move can be taken back by advancing the other way. */
MOEBIUS_API moebius_status moebius_plan_advance(moebius_plan *plan, moebius_layout to, moebius_error **err);

#ifdef __cplusplus
}
#endif

#endif /* MOEBIUS_MOEBIUS_H_ */
