#include "cuda/nccl.h"

#include <cstring>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "cuda/library.h"
#include "cuda/status.h"

#ifdef MOEBIUS_NCCL
#include <nccl.h>
#endif

namespace moebius::cuda {
namespace {

#ifdef MOEBIUS_NCCL

struct NcclLibrary : Library {
  NcclLibrary() : Library("MOEBIUS_NCCL_LIBRARY", "libnccl.so.2") {}
  MOEBIUS_LIBRARY_FUNCTION(get_unique_id, ncclGetUniqueId);
  MOEBIUS_LIBRARY_FUNCTION(init, ncclCommInitRankConfig);
  MOEBIUS_LIBRARY_FUNCTION(abort, ncclCommAbort);
  MOEBIUS_LIBRARY_FUNCTION(count, ncclCommCount);
  MOEBIUS_LIBRARY_FUNCTION(user_rank, ncclCommUserRank);
  MOEBIUS_LIBRARY_FUNCTION(async_error, ncclCommGetAsyncError);
  MOEBIUS_LIBRARY_FUNCTION(error_string, ncclGetErrorString);
  MOEBIUS_LIBRARY_FUNCTION(last_error, ncclGetLastError);
  MOEBIUS_LIBRARY_FUNCTION(group_start, ncclGroupStart);
  MOEBIUS_LIBRARY_FUNCTION(group_end, ncclGroupEnd);
  MOEBIUS_LIBRARY_FUNCTION(all_reduce, ncclAllReduce);
  MOEBIUS_LIBRARY_FUNCTION(reduce, ncclReduce);
  MOEBIUS_LIBRARY_FUNCTION(send, ncclSend);
  MOEBIUS_LIBRARY_FUNCTION(receive, ncclRecv);

  static const NcclLibrary& get() {
    static const NcclLibrary& library = *new NcclLibrary;
    return library;
  }
};

class Nccl final : public Exchange {
 public:
  static std::unique_ptr<Nccl> open(const ModuleOptions& options, ModuleStatus& status) {
    auto nccl = std::make_unique<Nccl>();
    if (!nccl->library_.failure().empty()) {
      refuse(status, Code::kUnsupported, "NCCL cannot be loaded: %s", nccl->library_.failure().c_str());
      return nullptr;
    }
    nccl->handed_in_ = options.comms != nullptr;
    nccl->first_rank_ = options.first_rank;
    nccl->world_ranks_ = options.world_ranks > 0 ? options.world_ranks : options.ranks;
    for (int r = 0; r < options.ranks; ++r) {
      nccl->ranks_.push_back(std::make_unique<Rank>());
      if (nccl->handed_in_ && nccl->take(r, static_cast<ncclComm_t>(options.comms[r]), options.ranks, status) < 0) return nullptr;
    }
    return nccl;
  }
  ~Nccl() override {
    for (const auto& rank : ranks_)  // its work is done: the streams were waited for
      if (rank->comm != nullptr && !handed_in_) (void)library_.abort(rank->comm);
  }

  int32_t prepare(ConnectionId* out_id, ModuleStatus& status) override {
    if (handed_in_) return refuse(status, Code::kRankFailed, "NCCL: a rank failed and the host's communicators were aborted; only the host can make others");
    ncclUniqueId id;
    static_assert(sizeof id <= sizeof *out_id);
    if (checked(library_.get_unique_id(&id), "a new world", 0, status) < 0) return status.code;
    std::memcpy(out_id->bytes, &id, sizeof id);
    return 0;
  }

  int32_t connect(int rank, const ConnectionId& id, ModuleStatus& status) override {
    ncclUniqueId world;
    std::memcpy(&world, id.bytes, sizeof world);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // a rank that waits for a failed one must be able to stop
    return checked(library_.init(&of(rank).comm, world_ranks_, world, first_rank_ + rank, &config), "connecting", rank, status);
  }

  void all_reduce(int rank, void* data, int64_t count, Element element) override { ask(rank, {Asked::kAllReduce, 0, element, data, count}); }
  void reduce(int rank, void* data, int64_t count, Element element, int root) override { ask(rank, {Asked::kReduce, root, element, data, count}); }
  void send(int rank, const void* data, int64_t bytes, int to) override {
    ask(rank, {Asked::kSend, to, Element::kUint8, const_cast<void*>(data), bytes});
  }
  void receive(int rank, void* data, int64_t bytes, int from) override { ask(rank, {Asked::kReceive, from, Element::kUint8, data, bytes}); }

  int32_t exchange(int rank, cudaStream_t stream, ModuleStatus& status) override {
    Rank& r = of(rank);
    if (r.asked.empty()) return 0;
    starts_late = true;
    if (r.comm == nullptr) {
      r.asked.clear();
      return refuse(status, Code::kRankFailed, "NCCL, rank %d: it is not connected", first_rank_ + rank);
    }
    int result = library_.group_start();
    for (const Asked& a : r.asked)
      if (good(result)) result = start(a, r.comm, stream);
    r.asked.clear();
    const int ended = library_.group_end();
    return checked(good(result) ? ended : result, "an exchange", rank, status);
  }

  int32_t exchanged(int rank, ModuleStatus& status) override {
    Rank& r = of(rank);
    if (r.comm == nullptr) return 1;  // it has given up
    ncclResult_t state = ncclSuccess;
    const int asked = library_.async_error(r.comm, &state);
    if (checked(asked != ncclSuccess ? asked : state, "an exchange", rank, status) < 0) return status.code;
    return state == ncclInProgress ? 0 : 1;
  }

  void give_up(int rank) override {
    Rank& r = of(rank);
    r.asked.clear();
    if (r.comm != nullptr) (void)library_.abort(std::exchange(r.comm, nullptr));
  }

 private:
  struct Asked {
    enum Kind { kAllReduce, kReduce, kSend, kReceive } kind;
    int peer;  // or root
    Element element;
    void* data;
    int64_t count;
  };
  struct Rank {  // used by its own thread, and by one when no rank is at work
    ncclComm_t comm = nullptr;
    std::vector<Asked> asked;
  };

  Rank& of(int rank) const { return *ranks_[static_cast<size_t>(rank)]; }
  static bool good(int result) { return result == ncclSuccess || result == ncclInProgress; }

  void ask(int rank, const Asked& asked) {
    if (asked.count > 0) of(rank).asked.push_back(asked);
  }

  int start(const Asked& a, ncclComm_t comm, cudaStream_t stream) const {
    const ncclDataType_t type = a.element == Element::kInt64 ? ncclInt64 : a.element == Element::kFloat ? ncclFloat32 : ncclUint8;
    const ncclRedOp_t op = a.element == Element::kUint8 ? ncclMax : ncclSum;
    const auto count = static_cast<size_t>(a.count);
    switch (a.kind) {
      case Asked::kAllReduce: return library_.all_reduce(a.data, a.data, count, type, op, comm, stream);
      case Asked::kReduce: return library_.reduce(a.data, a.data, count, type, op, a.peer, comm, stream);
      case Asked::kSend: return library_.send(a.data, count, type, a.peer, comm, stream);
      case Asked::kReceive: return library_.receive(a.data, count, type, a.peer, comm, stream);
    }
    return ncclInvalidArgument;
  }

  int32_t take(int r, ncclComm_t comm, int ranks, ModuleStatus& status) {
    int count = 0, rank = 0;
    if (comm == nullptr) return refuse(status, Code::kInvalidArgument, "the host's communicator %d is NULL", r);
    if (checked(library_.count(comm, &count), "the host's communicator", r, status) < 0) return status.code;
    if (checked(library_.user_rank(comm, &rank), "the host's communicator", r, status) < 0) return status.code;
    if (count != ranks || rank != r)
      return refuse(status, Code::kInvalidArgument, "the host's communicator %d is of rank %d of %d, must be of rank %d of %d", r, rank, count, r, ranks);
    of(r).comm = comm;
    return 0;
  }

  int32_t checked(int result, const char* what, int rank, ModuleStatus& status) const {
    if (good(result)) return 0;
    const char* more = of(rank).comm != nullptr ? library_.last_error(of(rank).comm) : nullptr;
    return refuse(status, Code::kRankFailed, "NCCL, rank %d: %s: %s %s", first_rank_ + rank, what, library_.error_string(static_cast<ncclResult_t>(result)),
                  more != nullptr ? more : "");
  }

  const NcclLibrary& library_ = NcclLibrary::get();
  bool handed_in_ = false;
  int first_rank_ = 0, world_ranks_ = 0;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

#endif

}  // namespace

std::unique_ptr<Exchange> open_nccl(const ModuleOptions& options, ModuleStatus& status) {
#ifdef MOEBIUS_NCCL
  return Nccl::open(options, status);
#else
  refuse(status, Code::kUnsupported, "this build of the module, for %d ranks, has no NCCL: use communicator peer, or build where nccl.h is found", options.ranks);
  return nullptr;
#endif
}

}  // namespace moebius::cuda
