// A request as the engine keeps it, and its sequences: one for each of its n samples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lib/base/time.h"
#include "lib/kv/kv_manager.h"
#include "lib/runtime/engine.h"
#include "lib/runtime/sampler.h"

namespace moebius {

constexpr Clock::time_point kNoDeadline = Clock::time_point::max();

enum class SequenceState : uint8_t { kWaiting, kRunning, kFinished };

struct Request;

// What is kept of every position, once each, until it is taken: `width` values a position.
template <class T>
struct Record {
  std::vector<T> values;   // positions [taken, kept)
  int64_t kept = 0;        // positions recorded so far
  int64_t taken = 0;       // of these, handed out
  bool collected = false;  // all of them, the sequence being finished

  void make_room(int64_t positions, int64_t width) {  // up to that position
    values.resize(static_cast<size_t>((std::max(positions, kept) - taken) * width));
  }
  bool wants(int64_t position) const { return position >= kept; }
  T* at(int64_t position, int64_t width) { return values.data() + (position - taken) * width; }
};

// Invariants: 0 ≤ computed < tokens.size() between steps; the KV of tokens [0, computed) is written and committed;
// blocks cover at least [0, computed); the last sampled token has no KV yet.
struct Sequence {
  Request* request = nullptr;
  int32_t sample = 0;
  uint64_t arrival = 0;                // order of arrival, over all sequences
  SequenceState state = SequenceState::kWaiting;
  std::vector<int32_t> tokens;         // prompt, then generated; capacity reserved for both
  int64_t computed = 0;
  int32_t home = -1;                   // −1 while only TP is alive
  std::vector<int32_t> blocks;         // KvManager blocks, in order of position
  std::vector<int32_t> tp_pages, ep_pages;  // page tables made from them: what kernels read
  BlockKey chain;                      // key of the last full block
  uint64_t root = 0;                   // KvManager::root_of its first block
  int32_t chained_blocks = 0;          // full blocks that `chain` covers
  SamplerState sampler;
  Record<float> logits;                // keep_logits: [positions, vocab]
  Record<int16_t> routes;              // keep_routes: [positions, layers, top_k]
  Clock::time_point first_scheduled{}, first_token{}, last_token{};
  int32_t preemptions = 0, cached_tokens = 0;
  int64_t prompt_counted = 0;          // prompt tokens that metrics have seen: recomputed ones do not count again

  int64_t prompt_tokens() const;
  int64_t generated() const { return static_cast<int64_t>(tokens.size()) - prompt_tokens(); }
  int64_t remaining_rows() const { return static_cast<int64_t>(tokens.size()) - computed; }
};

struct Request {
  uint64_t number = 0;
  RequestSpec spec;
  Clock::time_point submitted{}, deadline = kNoDeadline;
  std::vector<Sequence> samples;              // never resized
  int32_t unfinished = 0;
};

// Of positions that were computed before nothing is recorded: no part of such a request comes from the prefix cache.
inline bool keeps_positions(const RequestSpec& spec) { return spec.keep_logits || spec.keep_routes; }

inline int64_t Sequence::prompt_tokens() const { return static_cast<int64_t>(request->spec.prompt_ids.size()); }

// Lower priority value first, then arrival.
inline bool runs_before(const Sequence& a, const Sequence& b) {
  if (a.request->spec.priority != b.request->spec.priority) return a.request->spec.priority < b.request->spec.priority;
  return a.arrival < b.arrival;
}

}  // namespace moebius
