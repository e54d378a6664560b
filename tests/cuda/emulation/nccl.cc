#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Op {
  enum Kind { kAllReduce, kReduce, kSend, kReceive } kind;
  const void* from;
  void* to;
  size_t count;
  ncclDataType_t type;
  ncclRedOp_t op;
  int peer;  // or root

  bool is_sum() const { return kind == kAllReduce || kind == kReduce; }
  size_t bytes() const { return count * (type == ncclInt64 ? 8 : type == ncclFloat32 ? 4 : 1); }
};

struct Member {
  std::deque<Op> sums;
  std::map<int, std::deque<Op>> sends, receives;  // by peer
  int pending = 0;                                // ops that wait for others
  int device = -1;
};

struct Clique {
  std::mutex mutex;
  std::vector<Member> members;
  int joined = 0;
  bool aborted = false;
  ncclResult_t failed = ncclSuccess;  // the ends of an exchange do not match
};

template <class T>
void add_up(std::vector<Member>& members, const Op& first) {
  std::vector<T> total(first.count);
  for (size_t r = 0; r < members.size(); ++r) {
    const T* values = static_cast<const T*>(members[r].sums.front().from);
    for (size_t i = 0; i < first.count; ++i) {
      if constexpr (std::is_same_v<T, float>) total[i] += values[i];
      else if (first.op == ncclMax) total[i] = std::max(total[i], values[i]);
      else total[i] = static_cast<T>(static_cast<uint64_t>(total[i]) + static_cast<uint64_t>(values[i]));
    }
  }
  for (size_t r = 0; r < members.size(); ++r)
    if (first.kind == Op::kAllReduce || static_cast<int>(r) == first.peer)
      std::memcpy(members[r].sums.front().to, total.data(), first.bytes());
}

// Does what all its parts are there for.
void match(Clique& c) {
  for (size_t from = 0; from < c.members.size(); ++from)
    for (auto& [to, sends] : c.members[from].sends) {
      auto& receives = c.members[static_cast<size_t>(to)].receives[static_cast<int>(from)];
      while (!sends.empty() && !receives.empty()) {
        if (sends.front().bytes() != receives.front().bytes()) {
          c.failed = ncclInvalidUsage;
          return;
        }
        std::memcpy(receives.front().to, sends.front().from, sends.front().bytes());
        sends.pop_front();
        receives.pop_front();
        --c.members[from].pending;
        --c.members[static_cast<size_t>(to)].pending;
      }
    }
  while (std::none_of(c.members.begin(), c.members.end(), [](const Member& m) { return m.sums.empty(); })) {
    const Op first = c.members[0].sums.front();
    for (const Member& m : c.members) {
      const Op& other = m.sums.front();
      if (other.kind != first.kind || other.count != first.count || other.type != first.type || other.op != first.op || other.peer != first.peer) {
        c.failed = ncclInvalidUsage;
        return;
      }
    }
    if (first.type == ncclInt64) add_up<int64_t>(c.members, first);
    else if (first.type == ncclFloat32) add_up<float>(c.members, first);
    else add_up<uint8_t>(c.members, first);
    for (Member& m : c.members) {
      m.sums.pop_front();
      --m.pending;
    }
  }
}

std::mutex worlds_mutex;
std::map<uint64_t, std::shared_ptr<Clique>> worlds;
uint64_t next_world = 1;

}  // namespace

struct ncclComm {
  std::shared_ptr<Clique> clique;
  int rank;
};

namespace {

// Of the thread's open group.
thread_local int group_depth = 0;
thread_local std::vector<Op> group;
thread_local ncclComm_t group_comm = nullptr;
thread_local cudaStream_t group_stream = nullptr;

void post(Clique& c, int rank, const std::vector<Op>& ops) {
  std::lock_guard lock(c.mutex);
  Member& m = c.members[static_cast<size_t>(rank)];
  for (const Op& op : ops) {
    ++m.pending;
    if (op.is_sum()) m.sums.push_back(op);
    else (op.kind == Op::kSend ? m.sends : m.receives)[op.peer].push_back(op);
  }
  match(c);
}

ncclResult_t state_of(Clique& c, int rank) {
  std::lock_guard lock(c.mutex);
  if (c.failed != ncclSuccess) return c.failed;
  return c.joined < static_cast<int>(c.members.size()) || c.members[static_cast<size_t>(rank)].pending > 0 ? ncclInProgress : ncclSuccess;
}

ncclResult_t flush_group() {
  if (group.empty()) return ncclSuccess;
  const std::shared_ptr<Clique> clique = group_comm->clique;
  const int rank = group_comm->rank;
  const std::vector<Op> ops = std::exchange(group, {});
  if (!moebius::emulation::is_captured(group_stream)) {
    post(*clique, rank, ops);
    return ncclInProgress;
  }
  moebius::emulation::queue(group_stream, [=] {
    post(*clique, rank, ops);
    while (state_of(*clique, rank) == ncclInProgress) {
      {
        std::lock_guard lock(clique->mutex);
        if (clique->aborted) return;  // the thread that would abort this rank's communicator is this one
      }
      std::this_thread::yield();
    }
  });
  return ncclSuccess;
}

ncclResult_t add(const Op& op, ncclComm_t comm, cudaStream_t stream) {
  const int device = comm->clique->members[static_cast<size_t>(comm->rank)].device;
  for (const void* p : {op.from, static_cast<const void*>(op.to)})
    if (p != nullptr && moebius::emulation::device_of(p) != device) return ncclInvalidArgument;
  if (op.peer < 0 || op.peer >= static_cast<int>(comm->clique->members.size())) return ncclInvalidArgument;
  if (!group.empty() && (group_comm != comm || group_stream != stream)) return ncclInvalidUsage;  // more is not needed here
  group_comm = comm;
  group_stream = stream;
  group.push_back(op);
  return group_depth > 0 ? ncclSuccess : flush_group();
}

}  // namespace

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::lock_guard lock(worlds_mutex);
  id->number = next_world++;
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
  std::shared_ptr<Clique> clique;
  {
    std::lock_guard lock(worlds_mutex);
    std::shared_ptr<Clique>& made = worlds[id.number];
    if (made == nullptr) made = std::make_shared<Clique>();
    clique = made;
  }
  std::lock_guard lock(clique->mutex);
  if (clique->members.empty()) clique->members.resize(static_cast<size_t>(ranks));
  int device = -1;
  (void)cudaGetDevice(&device);
  for (const Member& m : clique->members)
    if (m.device == device) return ncclInvalidUsage;
  clique->members[static_cast<size_t>(rank)].device = device;
  ++clique->joined;
  *comm = new ncclComm{clique, rank};
  return ncclInProgress;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  {
    std::lock_guard lock(comm->clique->mutex);
    comm->clique->aborted = true;
  }
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = static_cast<int>(comm->clique->members.size());
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  *state = state_of(*comm->clique, comm->rank);
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) { return result == ncclInvalidUsage ? "invalid usage" : result == ncclInvalidArgument ? "invalid argument" : "an error"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() { return --group_depth > 0 ? ncclSuccess : flush_group(); }

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return add({Op::kAllReduce, from, to, count, type, op, 0}, comm, stream);
}
ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
  return add({Op::kReduce, from, to, count, type, op, root}, comm, stream);
}
ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return add({Op::kSend, from, nullptr, count, type, ncclSum, peer}, comm, stream);
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return add({Op::kReceive, nullptr, to, count, type, ncclSum, peer}, comm, stream);
}
