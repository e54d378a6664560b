#include "lib/device/remote_device.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "lib/base/error.h"
#include "lib/base/numbers.h"
#include "lib/base/time.h"
#include "lib/base/waited.h"
#include "lib/device/module_device.h"
#include "lib/device/wire.h"

extern char** environ;

namespace moebius {
namespace {

using namespace wire;

// A rank's process and the way to it.
class RemoteRank {
 public:
  RemoteRank(int rank, const std::string& program) : rank_(rank) {
    const int fd = memfd_create("moebius-rank", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, kSharedBytes) != 0) {
      if (fd >= 0) close(fd);
      fail(Code::kOutOfMemory, "cannot make memory to share with the process of rank {}", rank);
    }
    void* mapping = mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (mapping != MAP_FAILED) {
      memory_ = static_cast<std::byte*>(mapping);
      control_ = new (memory_) Control;
      posix_spawn_file_actions_t actions;
      posix_spawn_file_actions_init(&actions);
      posix_spawn_file_actions_adddup2(&actions, fd, kDescriptor);
      char* const arguments[] = {const_cast<char*>("moebius-rank"), nullptr};
      pid_t process = -1;
      if (posix_spawn(&process, program.c_str(), &actions, nullptr, arguments, environ) == 0) process_ = process;
      posix_spawn_file_actions_destroy(&actions);
    }
    close(fd);
    if (process_ <= 0) {
      if (memory_ != nullptr) munmap(memory_, kSharedBytes);
      fail(Code::kUnsupported, "the process of rank {} cannot be started: {}", rank, program);
    }
  }
  ~RemoteRank() {
    if (process_ > 0) {
      try {
        post(Command::kClose, 0);
      } catch (...) {  // it has ended
      }
      for (int i = 0; i < 2000 && process_ > 0; ++i) {  // two seconds
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        look_after();
      }
      if (process_ > 0) {
        kill(process_, SIGKILL);
        waitpid(process_, nullptr, 0);
      }
    }
    munmap(memory_, kSharedBytes);
  }

  int rank() const { return rank_; }
  bool has_ended() const { return process_ <= 0; }
  // The rank does not wait for others' marks, or does so again.
  void stop_waiting(bool stop) { std::atomic_ref(control_->stop_waiting).store(stop ? 1 : 0); }
  void set_deadline(double ms) { deadline_ms_ = ms; }
  std::function<void()> on_failure;  // when it answers so, or is found to have ended

  // Writes a command whose parts stand one after the other, each aligned.
  template <class... Parts>
  void post(Command command, const Parts&... parts) {
    std::lock_guard lock(mutex_);
    write(command, parts...);
  }
  // The same, and waits for the answer.
  template <class... Parts>
  Answer ask(Command command, const Parts&... parts) {
    std::lock_guard lock(mutex_);
    write(command, parts...);
    ++asked_;
    return wait_for_answer();
  }
  // The same in two: several ranks are at it meanwhile.
  template <class... Parts>
  void begin_to_ask(Command command, const Parts&... parts) {
    std::lock_guard lock(mutex_);
    write(command, parts...);
    ++asked_;
  }
  Answer answer() {
    std::lock_guard lock(mutex_);
    return wait_for_answer();
  }

  // Bytes of the host as a part of a command.
  struct Bytes {
    const void* data;
    int64_t bytes;
  };

  void read(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height) {
    const int64_t bytes = width * height;
    if (bytes == 0) return;
    if (bytes > kReadBytes) {  // row by row, and those that are too long in pieces
      for (int64_t i = 0; i < height; ++i)
        for (int64_t at = 0; at < width; at += kReadBytes)
          read(static_cast<std::byte*>(to) + i * to_pitch + at, 0, static_cast<const std::byte*>(from) + i * from_pitch + at, 0, std::min(kReadBytes, width - at), 1);
      return;
    }
    while (read_bytes_ + bytes > kReadBytes) idle();
    post(Command::kRead, Read{read_bytes_, width, from, from_pitch, width, height});
    reads_.push_back({static_cast<std::byte*>(to), to_pitch, read_bytes_, width, height});
    read_bytes_ = round_up(read_bytes_ + bytes, kAlign);
  }
  bool idle() {
    int64_t idle = 0;
    try {
      idle = ask(Command::kIdle).values[0];
    } catch (...) {  // what was to be read is not there, and may have nowhere to go by the next time
      forget_reads();
      throw;
    }
    if (idle == 0) return false;
    const std::byte* room = memory_ + kControlBytes + kRingBytes;
    for (const PendingRead& r : reads_)
      for (int64_t i = 0; i < r.height; ++i) std::memcpy(r.to + i * r.to_pitch, room + r.at + i * r.width, static_cast<size_t>(r.width));
    forget_reads();
    return true;
  }

 private:
  struct PendingRead {
    std::byte* to;
    int64_t to_pitch, at, width, height;
  };

  Answer wait_for_answer() {
    wait([&] { return control_->answered.load(std::memory_order_acquire) >= asked_; });
    const Answer answer = control_->answer;
    if (answer.status.code >= 0) return answer;
    if (on_failure) on_failure();
    throw Error(static_cast<Code>(answer.status.code), fmt::format("process of rank {}: {}", rank_, answer.status.text));
  }

  void forget_reads() {
    reads_.clear();
    read_bytes_ = 0;
  }

  static int64_t size_of(const Bytes& b) { return round_up(b.bytes, kAlign); }
  template <class T>
  static int64_t size_of(const T&) { return round_up(static_cast<int64_t>(sizeof(T)), kAlign); }
  static int64_t size_of(int) { return 0; }  // no part

  template <class... Parts>
  void write(Command command, const Parts&... parts) {
    const int64_t bytes = (int64_t{0} + ... + size_of(parts));
    MOEBIUS_ASSERT(bytes <= kMaxCommand);
    const int64_t all = round_up(static_cast<int64_t>(sizeof(Header)), kAlign) + bytes, begin = control_->written.load(std::memory_order_relaxed);
    wait([&] { return begin + all - control_->done.load(std::memory_order_acquire) <= kRingBytes; });
    int64_t at = begin;
    put(at, Header{command, static_cast<int32_t>(bytes)});
    (put(at, parts), ...);
    control_->written.store(at, std::memory_order_release);
  }
  void put_bytes(int64_t& at, const void* data, int64_t bytes) {
    const auto* from = static_cast<const std::byte*>(data);
    const int64_t offset = at % kRingBytes, first = std::min(bytes, kRingBytes - offset);
    std::byte* ring = memory_ + kControlBytes;
    std::memcpy(ring + offset, from, static_cast<size_t>(first));
    std::memcpy(ring, from + first, static_cast<size_t>(bytes - first));
    at += round_up(bytes, kAlign);
  }
  void put(int64_t& at, const Bytes& b) {
    if (b.bytes > 0) put_bytes(at, b.data, b.bytes);
  }
  template <class T>
  void put(int64_t& at, const T& value) { put_bytes(at, &value, sizeof value); }
  void put(int64_t&, int) {}

  // Spins, then yields, then naps; throws when the process has ended, or has let it nap for as long as the deadline is: after that, as long as
  // it has not come back, at once.
  template <class F>
  void wait(const F& done) {
    if (done()) {
      is_late_ = false;
      return;
    }
    Waited waited;
    for (int64_t turn = 0; !done(); ++turn) {
      if (process_ <= 0) fail(Code::kRankFailed, "the process of rank {} {}", rank_, how_it_ended_);
      if (turn > 1000) sched_yield();
      if (turn > 100000) std::this_thread::sleep_for(std::chrono::microseconds(100));
      if (turn % 256 < 255) continue;
      look_after();
      if (!is_late_ && !waited.exceeds(clamped_ms(deadline_ms_))) continue;
      is_late_ = true;
      fail(Code::kTimeout, "the process of rank {} did not answer within {:.0f} ms", rank_, deadline_ms_);
    }
    is_late_ = false;
  }
  void look_after() {
    int state = 0;
    const pid_t found = waitpid(process_, &state, WNOHANG);
    if (found == 0 || (found < 0 && errno != ECHILD)) return;
    if (found < 0) how_it_ended_ = "has ended";  // the host has waited for it
    else how_it_ended_ = WIFSIGNALED(state) ? fmt::format("was ended by signal {}", WTERMSIG(state)) : fmt::format("ended with status {}", WEXITSTATUS(state));
    process_ = -1;
    if (on_failure) on_failure();
  }

  int rank_;
  std::byte* memory_ = nullptr;
  Control* control_ = nullptr;
  std::atomic<pid_t> process_ = -1;
  std::string how_it_ended_ = "has ended";
  bool is_late_ = false;
  double deadline_ms_ = 3.6e6;  // to start with an hour: drivers take their time
  std::mutex mutex_;  // of what is written
  int64_t asked_ = 0;
  std::vector<PendingRead> reads_;  // by the rank's thread
  int64_t read_bytes_ = 0;
};

// ---- ops

enum OpNumber {
#define MOEBIUS_NUMBER(op, args) kOp_##op,
  MOEBIUS_OPS(MOEBIUS_NUMBER)
#undef MOEBIUS_NUMBER
};

// Collects the host's arrays behind one another.
struct Gather {
  std::array<std::byte, 64 << 10> memory;
  int64_t bytes = 0;

  template <class T>
  void operator()(const T* values, int64_t count) {
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    if (bytes + size > static_cast<int64_t>(memory.size())) fail(Code::kInternal, "an op's arrays are too long for a command");
    std::memcpy(memory.data() + bytes, values, static_cast<size_t>(size));
    bytes += round_up(size, kAlign);
  }
  template <class T>
  void peers(const T* values, int64_t count) { (*this)(values, count); }
};

template <int kNumber, class Args>
void remote_op(const Args& given, const Lane& lane) {
  Args args = given;
  Gather arrays;
  each_array(args, arrays);
  static_cast<RemoteRank*>(lane.queue)
      ->post(static_cast<Command>(static_cast<int>(Command::kFirstOp) + kNumber), OpHeader{lane.scratch}, args, RemoteRank::Bytes{arrays.memory.data(), arrays.bytes});
}

void remote_clear(void* to, size_t bytes, const Lane& lane) {
  static_cast<RemoteRank*>(lane.queue)->post(Command::kClear, Copy{to, nullptr, static_cast<int64_t>(bytes)});
}

class RemoteDevice final : public Device, private Collectives {
 public:
  RemoteDevice(const std::string& name, const DeviceModule& module, const std::string& file, const std::string& program, const ModuleOptions& options)
      : name_(name), has_collectives_(options.collectives != 0), ops_(*module.ops(nullptr)) {
#define MOEBIUS_REMOTE(op, args) ops_.op = remote_op<kOp_##op, args>;
    MOEBIUS_OPS(MOEBIUS_REMOTE)
#undef MOEBIUS_REMOTE
    ops_.clear = remote_clear;
    marks_.resize(static_cast<size_t>(options.ranks));
    std::vector<Answer> opened;
    for (int r = 0; r < options.ranks; ++r) ranks_.push_back(std::make_unique<RemoteRank>(r, program));
    for (const auto& rank : ranks_) {
      Open open;
      if (file.size() >= sizeof open.module) fail(Code::kUnsupported, "the path {} is too long", file);
      std::memcpy(open.module, file.data(), file.size());
      open.rank = rank->rank();
      open.ranks = options.ranks;
      open.device = options.devices != nullptr ? options.devices[rank->rank()] : -1;
      open.row_major = options.row_major;
      open.collectives = options.collectives;
      open.wait_ms = options.wait_ms;
      rank->begin_to_ask(Command::kOpen, open);
    }
    for (const auto& rank : ranks_) {
      opened.push_back(rank->answer());
      devices_.push_back(opened.back().values[0]);
    }
    const auto devices = static_cast<int>(std::set<int64_t>(devices_.begin(), devices_.end()).size());
    if (!has_collectives_) share_marks(opened);
    else if (devices < options.ranks)
      fail(Code::kUnsupported, "{} ranks on {} devices: NCCL needs a device for each; communicator peer does not", options.ranks, devices);
    for (const auto& rank : ranks_) {
      rank->on_failure = [this] { stop_waiting(); };
      rank->set_deadline(options.wait_ms);
    }
  }

  ~RemoteDevice() override {
    for (const auto& rank : ranks_) rank->on_failure = nullptr;
    stop_waiting();
    // Memory may go once nobody has it mapped.
    if (!has_collectives_)
      for (const auto& rank : ranks_) if_it_lives([&] { rank->ask(Command::kForgetAll); });
  }

  const char* name() const override { return name_.c_str(); }
  bool host_memory() const override { return false; }
  const Ops& ops() const override { return ops_; }
  int place(int rank) const override { return rank; }  // processes share no memory that an op takes
  int64_t total_bytes(int rank) const override { return of(rank).ask(Command::kMemory).values[0]; }
  int64_t free_bytes(int rank) const override {
    const auto sharers = std::count(devices_.begin(), devices_.end(), devices_[static_cast<size_t>(rank)]);
    return of(rank).ask(Command::kMemory).values[1] / sharers;
  }

  std::byte* allocate(int rank, int64_t bytes) override {
    const Answer answer = of(rank).ask(Command::kAllocate, bytes);
    auto* const address = reinterpret_cast<std::byte*>(answer.values[0]);
    for (const auto& other : ranks_)
      if (other->rank() != rank && !has_collectives_) other->post(Command::kImport, Shared{rank, address, bytes, answer.handle});
    return address;
  }
  void release(int rank, std::byte* memory, int64_t bytes) noexcept override {
    for (const auto& other : ranks_)
      if (other->rank() != rank && !has_collectives_) if_it_lives([&] { other->ask(Command::kForget, Shared{rank, memory, bytes, {}}); });
    if_it_lives([&] { of(rank).ask(Command::kRelease, memory); });
  }

  void* queue(int rank) override { return &of(rank); }
  void write(int rank, void* to, const void* from, int64_t bytes) override {
    constexpr int64_t kPiece = kMaxCommand / 2;
    for (int64_t at = 0; at < bytes; at += kPiece) {
      const int64_t size = std::min(kPiece, bytes - at);
      of(rank).post(Command::kWrite, Copy{static_cast<std::byte*>(to) + at, nullptr, size}, RemoteRank::Bytes{static_cast<const std::byte*>(from) + at, size});
    }
  }
  void read(int rank, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height) override {
    of(rank).read(to, to_pitch, from, from_pitch, width, height);
  }
  void copy(int rank, void* to, int from_rank, const void* from, int64_t bytes) override {
    of(rank).post(Command::kCopy, Copy{to, from, bytes, from_rank});
  }
  void copy_block(int rank, void* to, int from_rank, const void* from, int64_t bytes) override {
    of(rank).post(Command::kCopyBlock, Copy{to, from, bytes, from_rank});
  }
  void finish_blocks(int rank) override { of(rank).post(Command::kFinishBlocks, 0); }
  int keep_blocks(int rank) override { return static_cast<int>(of(rank).ask(Command::kKeepBlocks).values[0]); }
  void copy_kept(int rank, int number, int64_t begin, int64_t end) override { of(rank).post(Command::kCopyKept, Kept{number, begin, end}); }
  void mark(int rank) override {
    ++marks_of(rank).now();
    of(rank).post(Command::kMark, 0);
  }
  void pass(int rank) override { of(rank).post(Command::kPass, 0); }
  void align_marks() override {
    int64_t most = 0;
    for (const MarksSet& marks : marks_) most = std::max(most, marks.set);
    if (std::none_of(ranks_.begin(), ranks_.end(), [](const auto& rank) { return rank->has_ended(); }))
      for (const auto& rank : ranks_) rank->stop_waiting(false);
    for (const auto& rank : ranks_)
      if (int64_t& set = marks_of(rank->rank()).set; set != most) rank->post(Command::kSetMarks, set = most);
  }
  bool can_capture() const override { return true; }
  void begin_capture(int rank) override {
    marks_of(rank).capturing = true;
    marks_of(rank).captured.push_back(0);
    of(rank).post(Command::kBeginCapture, 0);
  }
  int end_capture(int rank) override {
    marks_of(rank).capturing = false;
    return static_cast<int>(of(rank).ask(Command::kEndCapture).values[0]);
  }
  void replay(int rank, int number) override {
    marks_of(rank).set += marks_of(rank).captured[static_cast<size_t>(number)];
    of(rank).post(Command::kReplay, int64_t{number});
  }
  void forget_captures(int rank) override {
    marks_of(rank).capturing = false;
    marks_of(rank).captured.clear();
    of(rank).post(Command::kForgetCaptures, 0);
  }
  bool idle(int rank) override { return of(rank).idle(); }
  Collectives* collectives() override { return has_collectives_ ? this : nullptr; }

 private:
  void share_marks(const std::vector<Answer>& opened) {
    for (const auto& rank : ranks_) {
      std::vector<IpcHandle> others;
      for (const auto& other : ranks_)
        if (rank != other) others.push_back(opened[static_cast<size_t>(other->rank())].handle);
      rank->ask(Command::kImportMarks, static_cast<int64_t>(others.size()), RemoteRank::Bytes{others.data(), static_cast<int64_t>(others.size() * sizeof(IpcHandle))});
    }
  }

  void prepare() override {
    id_ = ranks_[0]->ask(Command::kPrepare).connection;
    connection_begins();
  }
  void connect(int rank) override { of(rank).post(Command::kConnect, id_); }
  void all_reduce(int rank, void* data, int64_t count, Element element) override { collective(rank, Command::kAllReduce, {data, count, element, 0}); }
  void reduce(int rank, void* data, int64_t count, Element element, int root) override { collective(rank, Command::kReduce, {data, count, element, root}); }
  void send(int rank, const void* data, int64_t bytes, int to) override {
    collective(rank, Command::kSend, {const_cast<void*>(data), bytes, Element::kUint8, to});
  }
  void receive(int rank, void* data, int64_t bytes, int from) override { collective(rank, Command::kReceive, {data, bytes, Element::kUint8, from}); }
  void exchange(int rank) override { of(rank).post(Command::kExchange, 0); }
  bool exchanged(int rank) override { return of(rank).ask(Command::kExchanged).values[0] != 0; }
  void give_up(int) noexcept override {
    connection_ends();
    // In NCCL one process's abort waits for the others'.
    for (const auto& one : ranks_) if_it_lives([&] { one->post(Command::kGiveUp, 0); });
  }

  void collective(int rank, Command command, const Collective& what) { of(rank).post(command, what); }
  void stop_waiting() const {
    for (const auto& rank : ranks_) rank->stop_waiting(true);
  }
  RemoteRank& of(int rank) const { return *ranks_[static_cast<size_t>(rank)]; }
  // Used by the rank's thread, and by one when no rank is at work.
  struct MarksSet {
    int64_t set = 0;
    bool capturing = false;
    std::vector<int64_t> captured;  // in each captured step
    int64_t& now() { return capturing ? captured.back() : set; }
  };
  MarksSet& marks_of(int rank) { return marks_[static_cast<size_t>(rank)]; }
  // A process that has ended has let go of everything.
  template <class F>
  static void if_it_lives(const F& f) noexcept {
    try {
      f();
    } catch (...) {
    }
  }

  std::string name_;
  const bool has_collectives_;
  ConnectionId id_;
  Ops ops_;
  std::vector<std::unique_ptr<RemoteRank>> ranks_;
  std::vector<int64_t> devices_;  // [ranks]
  std::vector<MarksSet> marks_;   // [ranks]
};

}  // namespace

std::unique_ptr<Device> open_remote_device(const std::string& name, const ModuleOptions& options) {
  std::string file;
  const DeviceModule& module = load_module(name, &file);
  return std::make_unique<RemoteDevice>(name, module, file, find_beside("moebius-rank"), options);
}

}  // namespace moebius
