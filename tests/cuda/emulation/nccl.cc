// Ranks of one world, in one process or in several, write what they give into files of a folder of their own, and read what others give:
// sums<rank> what a rank adds to sums, <from>-<to> what it sends, got<from>-<to> a byte for each of these that has been received.
#include <nccl.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace fs = std::filesystem;

struct Op {
  enum Kind : int { kAllReduce, kReduce, kSend, kReceive } kind;
  const void* from;
  void* to;
  size_t count;
  ncclDataType_t type;
  ncclRedOp_t op;
  int peer;  // or root

  bool is_sum() const { return kind == kAllReduce || kind == kReduce; }
  size_t bytes() const { return count * (type == ncclInt64 ? 8 : type == ncclFloat32 ? 4 : 1); }
};

// What stands in a file before an op's data.
struct Header {
  int kind, type, op, peer;
  size_t count;
  bool operator==(const Header&) const = default;
};
Header header_of(const Op& op) { return op.is_sum() ? Header{op.kind, op.type, op.op, op.peer, op.count} : Header{Op::kSend, op.type, 0, 0, op.count}; }

// One rank writes at its end, others read from where they are.
class Channel {
 public:
  explicit Channel(const fs::path& path) : file_(open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) {}
  ~Channel() { close(file_); }
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  void put(const void* data, size_t bytes) {
    for (const auto* at = static_cast<const char*>(data); bytes > 0;) {
      const ssize_t written = write(file_, at, bytes);
      if (written <= 0) std::abort();
      at += written, bytes -= static_cast<size_t>(written);
    }
  }
  bool has(size_t bytes) const {
    struct stat s;
    return fstat(file_, &s) == 0 && static_cast<size_t>(s.st_size) >= at_ + bytes;
  }
  void peek(void* to, size_t bytes, size_t skip = 0) const {
    for (auto* at = static_cast<char*>(to); bytes > 0;) {
      const ssize_t got = pread(file_, at, bytes, static_cast<off_t>(at_ + skip));
      if (got <= 0) std::abort();
      at += got, bytes -= static_cast<size_t>(got), skip += static_cast<size_t>(got);
    }
  }
  void advance(size_t bytes) { at_ += bytes; }

 private:
  int file_;
  size_t at_ = 0;
};
using Channels = std::vector<std::unique_ptr<Channel>>;

template <class T>
void add_up(const Channels& given, const Op& op) {
  std::vector<T> total(op.count), values(op.count);
  for (const auto& channel : given) {
    channel->peek(values.data(), op.bytes(), sizeof(Header));
    for (size_t i = 0; i < op.count; ++i) {
      if constexpr (std::is_same_v<T, float>) total[i] += values[i];
      else if (op.op == ncclMax) total[i] = std::max(total[i], values[i]);
      else total[i] = static_cast<T>(static_cast<uint64_t>(total[i]) + static_cast<uint64_t>(values[i]));
    }
  }
  std::memcpy(op.to, total.data(), op.bytes());
}

fs::path folder_of(const ncclUniqueId& id) {
  return fs::temp_directory_path() / ("emulated-nccl-" + std::to_string(id.process) + "-" + std::to_string(id.number));
}
void mark(const fs::path& path) { std::ofstream{path}; }

}  // namespace

// Used by one thread at a time.
struct ncclComm {
  fs::path folder;
  int rank, ranks, device;
  Channels sums, to, from, got_by, got_from;  // by rank
  std::deque<Op> open_sums;
  std::vector<std::deque<Op>> receives;
  std::vector<size_t> sent;  // and not known to have been received
  bool joined = false;
  ncclResult_t failed = ncclSuccess;  // the ends of an exchange do not match
  std::shared_ptr<int> captured = std::make_shared<int>();  // captured work has it too

  void add(const Op& op) {
    const Header header = header_of(op);
    const auto peer = static_cast<size_t>(op.peer);
    if (op.kind == Op::kReceive) return receives[peer].push_back(op);
    Channel& out = op.is_sum() ? *sums[static_cast<size_t>(rank)] : *to[peer];
    out.put(&header, sizeof header);
    out.put(op.from, op.bytes());
    if (op.is_sum()) open_sums.push_back(op);
    else ++sent[peer];
  }

  // Whether all of `op` is there; the ends must match.
  bool arrived(const Channel& channel, const Op& op) {
    if (!channel.has(sizeof(Header))) return false;
    Header header;
    channel.peek(&header, sizeof header);
    if (!(header == header_of(op))) failed = ncclInvalidUsage;
    return failed == ncclSuccess && channel.has(sizeof header + op.bytes());
  }
  bool sum_arrived() {
    return !open_sums.empty() && std::all_of(sums.begin(), sums.end(), [this](const auto& c) { return arrived(*c, open_sums.front()); });
  }

  // Does what all its parts are there for.
  ncclResult_t progress() {
    for (int r = 0; r < ranks && !joined; ++r)
      if (!fs::exists(folder / ("joined" + std::to_string(r)))) return ncclInProgress;
    joined = true;
    while (sum_arrived()) {
      const Op& op = open_sums.front();
      if (op.kind == Op::kReduce && op.peer != rank) {
      } else if (op.type == ncclInt64) {
        add_up<int64_t>(sums, op);
      } else if (op.type == ncclFloat32) {
        add_up<float>(sums, op);
      } else {
        add_up<uint8_t>(sums, op);
      }
      for (auto& channel : sums) channel->advance(sizeof(Header) + op.bytes());
      open_sums.pop_front();
    }
    bool pending = !open_sums.empty();
    for (size_t r = 0; r < receives.size(); ++r) {
      for (; !receives[r].empty() && arrived(*from[r], receives[r].front()); receives[r].pop_front()) {
        const Op& op = receives[r].front();
        from[r]->peek(op.to, op.bytes(), sizeof(Header));
        from[r]->advance(sizeof(Header) + op.bytes());
        got_from[r]->put("", 1);
      }
      for (; sent[r] > 0 && got_by[r]->has(1); --sent[r]) got_by[r]->advance(1);
      pending |= !receives[r].empty() || sent[r] > 0;
    }
    return failed != ncclSuccess ? failed : pending ? ncclInProgress : ncclSuccess;
  }
};

namespace {

// Of the thread's open group.
thread_local int group_depth = 0;
thread_local std::vector<Op> group;
thread_local ncclComm_t group_comm = nullptr;
thread_local cudaStream_t group_stream = nullptr;

ncclResult_t flush_group() {
  if (group.empty()) return ncclSuccess;
  ncclComm* const comm = group_comm;
  const std::vector<Op> ops = std::exchange(group, {});
  const auto start = [comm, ops] {
    for (const Op& op : ops) comm->add(op);
  };
  if (!moebius::emulation::is_captured(group_stream)) {
    start();
    return ncclInProgress;
  }
  moebius::emulation::queue(group_stream, [comm, start, captured = comm->captured] {
    start();
    while (comm->progress() == ncclInProgress) {
      if (fs::exists(comm->folder / "aborted")) return;  // the thread that would abort this rank's communicator is this one
      std::this_thread::yield();
    }
  });
  return ncclSuccess;
}

ncclResult_t add(const Op& op, ncclComm_t comm, cudaStream_t stream) {
  for (const void* p : {op.from, static_cast<const void*>(op.to)})
    if (p != nullptr && moebius::emulation::device_of(p) != comm->device) return ncclInvalidArgument;
  if (op.peer < 0 || op.peer >= comm->ranks) return ncclInvalidArgument;
  if (!group.empty() && (group_comm != comm || group_stream != stream)) return ncclInvalidUsage;  // more is not needed here
  group_comm = comm;
  group_stream = stream;
  group.push_back(op);
  return group_depth > 0 ? ncclSuccess : flush_group();
}

}  // namespace

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int64_t> next{0};
  *id = {getpid(), next++};
  fs::create_directory(folder_of(*id));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
  auto made = std::make_unique<ncclComm>();
  made->folder = folder_of(id);
  made->rank = rank;
  made->ranks = ranks;
  (void)cudaGetDevice(&made->device);
  const fs::path device = made->folder / ("device" + std::to_string(made->device));
  if (const int taken = open(device.c_str(), O_CREAT | O_EXCL | O_CLOEXEC, 0600); taken >= 0) close(taken);
  else return ncclInvalidUsage;
  const auto channel = [&](const std::string& name) { return std::make_unique<Channel>(made->folder / name); };
  const auto between = [](int from, int to) { return std::to_string(from) + "-" + std::to_string(to); };
  for (int r = 0; r < ranks; ++r) {
    made->sums.push_back(channel("sums" + std::to_string(r)));
    made->to.push_back(channel(between(rank, r)));
    made->from.push_back(channel(between(r, rank)));
    made->got_by.push_back(channel("got" + between(rank, r)));
    made->got_from.push_back(channel("got" + between(r, rank)));
  }
  made->receives.resize(made->sums.size());
  made->sent.resize(made->sums.size());
  mark(made->folder / ("joined" + std::to_string(rank)));
  *comm = made.release();
  return ncclInProgress;
}

// The last one out takes the folder along.
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const std::unique_ptr<ncclComm> gone(comm);
  if (gone->captured.use_count() > 1) {  // NCCL would wait for its end for ever
    std::fprintf(stderr, "emulated NCCL: rank %d is aborted while captured work refers to it\n", gone->rank);
    std::abort();
  }
  mark(gone->folder / "aborted");
  mark(gone->folder / ("left" + std::to_string(gone->rank)));
  for (int r = 0; r < gone->ranks; ++r)
    if (!fs::exists(gone->folder / ("left" + std::to_string(r)))) return ncclSuccess;
  std::error_code error;
  fs::remove_all(gone->folder, error);
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->ranks;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  *state = comm->progress();
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
