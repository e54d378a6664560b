// How a rank that has a process of its own is told what to do: commands in a ring of shared memory, one after the other, and answers to some.
//
// The engine's process writes, the rank's reads; a rank's commands are written by one thread at a time (RemoteRank's lock). Both sides are of
// one build. Pointers in commands are addresses of the rank's process; arrays of the host travel along, and pointers into other ranks' memory
// stand only where it is known whose they are (processes may have equal addresses): in a block to copy, and in arrays that are named as such
// below, which have an entry for each rank, or one of the rank's own. The rank's process translates them. (With collectives they are all its own.)
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lib/device/module.h"

namespace moebius::wire {

inline constexpr int kDescriptor = 3;                 // of the shared memory, in the rank's process
inline constexpr int64_t kRingBytes = 16 << 20;       // a power of two
inline constexpr int64_t kMaxCommand = kRingBytes / 4;
inline constexpr int64_t kReadBytes = 16 << 20;       // room, pinned, for what is read until the rank is idle; more waits for it
inline constexpr int64_t kAlign = 16;

enum class Command : int32_t {
  kOpen, kImportMarks, kImport, kForget, kForgetAll, kAllocate, kRelease, kMemory, kWrite, kRead, kCopy, kCopyBlock, kFinishBlocks, kKeepBlocks, kCopyKept,
  kMark, kPass, kSetMarks, kIdle, kClear, kBeginCapture, kEndCapture, kReplay, kForgetCaptures, kPrepare, kConnect, kAllReduce, kReduce, kSend, kReceive,
  kExchange, kExchanged, kGiveUp, kClose, kFirstOp  // kFirstOp + number of an op in MOEBIUS_OPS
};

// Ops that take their arguments as one struct.
#define MOEBIUS_OPS(X)                                                                                                                            \
  X(embed, EmbedArgs) X(add_norm, AddNormArgs) X(linear, LinearArgs) X(rope_store, RopeStoreArgs) X(attention, AttentionArgs)                     \
  X(exact_linear, ExactLinearArgs) X(route, RouteArgs) X(group_experts, GroupArgs) X(experts_gate_up, ExpertsArgs) X(experts_down, ExpertsArgs)   \
  X(pick_rows, PickArgs) X(choose_tokens, ChooseArgs) X(add_partials, AddPartialsArgs) X(fetch_rows, FetchRowsArgs) X(copy_pages, CopyPagesArgs) \
  X(norm_linear, NormLinearArgs) X(rope_attention, RopeAttentionArgs) X(norm_route, NormRouteArgs)

// Calls v(array, count) for each array of the host that the arguments point to, and v.peers(array, count) where it holds pointers to ranks'
// memory.
template <class Args, class V>
void each_array(Args&, V&&) {}
template <class V>
void each_array(AddNormArgs& a, V&& v) { v.peers(a.partials, a.num_partials), v.peers(a.flags, a.num_partials); }
template <class V>
void each_array(LinearArgs& a, V&& v) { v(a.parts, a.num_parts); }
template <class V>
void each_array(NormLinearArgs& a, V&& v) { each_array(a.norm, v), each_array(a.linear, v); }
template <class V>
void each_array(NormRouteArgs& a, V&& v) { each_array(a.norm, v); }
template <class V>
void each_array(AttentionArgs& a, V&& v) { v(a.heads_of_kv, a.kv.num_kv_heads); }
template <class V>
void each_array(RopeAttentionArgs& a, V&& v) { each_array(a.attention, v); }
template <class V>
void each_array(ExactLinearArgs& a, V&& v) { v(a.parts, a.num_parts); }
template <class V>
void each_array(ChooseArgs& a, V&& v) { v.peers(a.shares, a.num_shares), v(a.columns, a.num_shares); }
template <class V>
void each_array(AddPartialsArgs& a, V&& v) { v.peers(a.partials, a.num_partials), v.peers(a.flags, a.num_partials); }
template <class V>
void each_array(FetchRowsArgs& a, V&& v) {
  v(a.homes, a.num_homes), v.peers(a.x, a.num_homes);
  if (a.ids != nullptr) v.peers(a.ids, a.num_homes), v.peers(a.weights, a.num_homes);
}
template <class V>
void each_array(CopyPagesArgs& a, V&& v) { v.peers(a.from, a.num_ranks); }

// Arguments of the commands that are no ops.
struct Open {
  char module[1024] = {};
  int32_t rank = 0, ranks = 0, device = -1;  // −1: by turns
  int32_t row_major = 0, collectives = 0;
  double wait_ms = 0;
};
struct Shared {  // memory of another rank
  int32_t rank = 0;
  const std::byte* address = nullptr;  // in its process
  int64_t bytes = 0;
  IpcHandle handle;
};
struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  int64_t bytes = 0;
  int32_t from_rank = 0;
};
struct Read {
  int64_t to = 0;  // in the room for reading
  int64_t to_pitch = 0;
  const void* from = nullptr;
  int64_t from_pitch = 0, width = 0, height = 0;
};
struct Kept {
  int32_t number = 0;
  int64_t begin = 0, end = 0;
};
struct Collective {
  void* data = nullptr;
  int64_t count = 0;  // or bytes
  Element element = Element::kUint8;
  int32_t other = 0;  // root, to or from
};
struct OpHeader {
  std::byte* scratch = nullptr;
};

struct Answer {
  ModuleStatus status;
  int64_t values[3] = {};
  IpcHandle handle;
  ConnectionId connection;
};

struct Header {
  Command command;
  int32_t bytes;  // of what follows, a multiple of kAlign
};

// At the beginning of the shared memory; then the ring, then the room for reading.
struct Control {
  uint32_t stop_waiting = 0;  // ModuleOptions::stop_waiting, first on the page
  alignas(64) std::atomic<int64_t> written{0};   // bytes of the ring so far
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<int64_t> answered{0};  // answers so far
  Answer answer;
};
inline constexpr int64_t kControlBytes = 4096;
inline constexpr int64_t kSharedBytes = kControlBytes + kRingBytes + kReadBytes;
static_assert(sizeof(Control) <= kControlBytes && std::atomic<int64_t>::is_always_lock_free);

}  // namespace moebius::wire
