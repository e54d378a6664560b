// moebius-rank: the process of one rank. It is started by the library (remote_device.cc), not by hand, and does what it is told through shared
// memory (wire.h) with a module's device of one rank.
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "lib/base/error.h"
#include "lib/base/numbers.h"
#include "lib/device/module_device.h"
#include "lib/device/wire.h"

namespace moebius {
namespace {

using namespace wire;

class RankProcess {
 public:
  explicit RankProcess(std::byte* memory) : memory_(memory), control_(*reinterpret_cast<Control*>(memory)) {}

  int run() {
    for (;;) {
      const int64_t begin = control_.done.load(std::memory_order_relaxed);
      if (!wait_for_more(begin)) return 0;
      int64_t at = begin;
      Header header;
      get_bytes(at, &header, sizeof header);
      payload_.resize(static_cast<size_t>(header.bytes));
      get_bytes(at, payload_.data(), header.bytes);
      at_ = 0;
      if (header.command == Command::kClose) {
        if (device_ != nullptr) module_->close(device_);
        return 0;
      }
      control_.done.store(at, std::memory_order_release);
      obey(header.command);
    }
  }

 private:
  bool wait_for_more(int64_t begin) const {
    for (int64_t turn = 0; control_.written.load(std::memory_order_acquire) == begin; ++turn) {
      if (turn > 1000) sched_yield();
      if (turn > 100000) std::this_thread::sleep_for(std::chrono::microseconds(turn > 110000 ? 1000 : 50));
      if (turn > 1000 && getppid() != parent_) return false;  // the engine's process has ended
    }
    return true;
  }
  void get_bytes(int64_t& at, void* to, int64_t bytes) const {
    const int64_t offset = at % kRingBytes, first = std::min(bytes, kRingBytes - offset);
    const std::byte* ring = memory_ + kControlBytes;
    std::memcpy(to, ring + offset, static_cast<size_t>(first));
    std::memcpy(static_cast<std::byte*>(to) + first, ring, static_cast<size_t>(bytes - first));
    at += round_up(bytes, kAlign);
  }
  // The next part of the command.
  std::byte* next(int64_t bytes) { return payload_.data() + std::exchange(at_, at_ + round_up(bytes, kAlign)); }
  template <class T>
  T& next() { return *reinterpret_cast<T*>(next(sizeof(T))); }

  struct Peer {
    int64_t bytes = 0;
    std::byte* mapped = nullptr;  // in this process
  };

  // What an address of a rank's process is in this one; null, and the status says why, where it is not known here.
  template <class T>
  T* here(int rank, T* address) {
    if (rank == rank_ || address == nullptr || !shares_) return address;
    auto* const p = reinterpret_cast<const std::byte*>(address);
    auto it = shared_.upper_bound({rank, p});
    if (it == shared_.begin() || (--it)->first.first != rank || p >= it->first.second + it->second.bytes) {
      if (status_.code >= 0) {  // else it is known why
        status_.code = static_cast<int32_t>(Code::kInternal);
        std::snprintf(status_.text, sizeof status_.text, "an address of rank %d that it has not shared", rank);
      }
      return nullptr;
    }
    return reinterpret_cast<T*>(it->second.mapped + (p - it->first.second));
  }

  // Points arguments to the arrays that came with them.
  struct Arrays {
    RankProcess& process;
    template <class T>
    void operator()(const T*& values, int64_t count) {
      values = reinterpret_cast<const T*>(process.next(count * static_cast<int64_t>(sizeof(T))));
    }
    template <class T>
    void peers(T* const*& values, int64_t count) {
      auto** list = reinterpret_cast<T**>(process.next(count * static_cast<int64_t>(sizeof(T*))));
      for (int64_t i = 0; i < count; ++i) list[i] = process.here(count > 1 ? static_cast<int>(i) : process.rank_, list[i]);
      values = list;
    }
  };

  template <class Args>
  void run_op(void (*op)(const Args&, const Lane&)) {
    const OpHeader header = next<OpHeader>();
    Args& args = next<Args>();
    each_array(args, Arrays{*this});
    if (status_.code < 0) return;
    op(args, {0, 1, header.scratch, module_->queue(device_, 0)});
  }

  void answer(const Answer& given) {
    control_.answer = given;
    control_.answer.status = std::exchange(status_, {});  // of everything since the last answer
    control_.answered.fetch_add(1, std::memory_order_release);
  }

  void wait_until_idle() {
    while (module_->idle(device_, 0, status_) == 0) sched_yield();
  }

  void open(const Open& open) {
    Answer out;
    rank_ = open.rank;
    try {
      module_ = &load_module_file("rank", open.module);
      ModuleOptions options;
      options.first_rank = open.rank;
      options.world_ranks = open.ranks;
      options.shared = shares_ = open.collectives == 0;
      options.collectives = open.collectives;
      options.wait_ms = open.wait_ms;
      options.stop_waiting = &control_.stop_waiting;
      options.devices = open.device >= 0 ? &open.device : nullptr;
      options.row_major = open.row_major;
      device_ = module_->open(options, status_);
      if (device_ != nullptr) {
        out.values[0] = module_->place(device_, 0);
        module_->pin(device_, read_room(), kReadBytes, status_);  // or each read would hold up the commands behind it
        if (shares_) {
          marks_ = module_->allocate(device_, 0, kMarkBytes, status_);
          if (marks_ != nullptr) module_->ipc_handle(device_, marks_, &out.handle, status_);
          wait_until_idle();  // cleared before others look
        }
      }
    } catch (const Error& e) {
      status_.code = static_cast<int32_t>(e.code());
      std::snprintf(status_.text, sizeof status_.text, "%s", e.what());
    }
    answer(out);
  }

  void obey(Command command) {
    ModuleStatus& s = status_;
    Answer out;
    switch (command) {
      case Command::kOpen: return open(next<Open>());
      case Command::kImportMarks:  // [number of other ranks] handles
        for (int64_t n = next<int64_t>(); n > 0; --n) others_marks_.push_back(module_->ipc_open(device_, 0, &next<IpcHandle>(), s));
        if (s.code >= 0) module_->share_marks(device_, marks_, others_marks_.data(), static_cast<int>(others_marks_.size()), s);
        return answer(out);
      case Command::kForgetAll:
        wait_until_idle();
        for (auto& [address, peer] : shared_) module_->ipc_close(device_, peer.mapped);
        for (std::byte* memory : others_marks_) module_->ipc_close(device_, memory);
        shared_.clear(), others_marks_.clear();
        return answer(out);
      case Command::kImport: {
        const Shared& shared = next<Shared>();
        // At once: where an op first needs it, a capture may be open.
        if (std::byte* memory = module_->ipc_open(device_, 0, &shared.handle, s); memory != nullptr)
          shared_[{shared.rank, shared.address}] = {shared.bytes, memory};
        return;
      }
      case Command::kForget: {
        const Shared& gone = next<Shared>();
        const auto it = shared_.find({gone.rank, gone.address});
        if (it != shared_.end()) {
          module_->ipc_close(device_, it->second.mapped);
          shared_.erase(it);
        }
        return answer(out);
      }
      case Command::kAllocate: {
        std::byte* memory = module_->allocate(device_, 0, next<int64_t>(), s);
        out.values[0] = reinterpret_cast<int64_t>(memory);
        if (memory != nullptr && shares_) module_->ipc_handle(device_, memory, &out.handle, s);
        return answer(out);
      }
      case Command::kRelease: module_->release(device_, 0, next<std::byte*>()); return answer(out);
      case Command::kMemory: module_->memory(device_, 0, &out.values[0], &out.values[1], s); return answer(out);
      case Command::kWrite: {
        const Copy c = next<Copy>();
        module_->write(device_, 0, c.to, next(c.bytes), c.bytes, s);
        return;
      }
      case Command::kRead: {
        const Read r = next<Read>();
        module_->read(device_, 0, read_room() + r.to, r.to_pitch, r.from, r.from_pitch, r.width, r.height, s);
        return;
      }
      case Command::kCopy:
      case Command::kCopyBlock: {
        const Copy c = next<Copy>();
        if (const void* from = here(c.from_rank, c.from); from != nullptr)
          (command == Command::kCopy ? module_->copy : module_->copy_block)(device_, 0, c.to, from, c.bytes, s);
        return;
      }
      case Command::kFinishBlocks: module_->finish_blocks(device_, 0, s); return;
      case Command::kKeepBlocks: out.values[0] = module_->keep_blocks(device_, 0, s); return answer(out);
      case Command::kCopyKept: {
        const Kept k = next<Kept>();
        module_->copy_kept(device_, 0, k.number, k.begin, k.end, s);
        return;
      }
      case Command::kMark: module_->mark(device_, 0, s); return;
      case Command::kPass: module_->pass(device_, 0, s); return;
      case Command::kSetMarks: module_->set_marks(device_, 0, next<int64_t>(), s); return;
      case Command::kIdle: out.values[0] = module_->idle(device_, 0, s); return answer(out);
      case Command::kClear: {
        const Copy c = next<Copy>();
        ops().clear(c.to, static_cast<size_t>(c.bytes), {0, 1, nullptr, module_->queue(device_, 0)});
        return;
      }
      case Command::kBeginCapture: module_->begin_capture(device_, 0, s); return;
      case Command::kEndCapture: out.values[0] = module_->end_capture(device_, 0, s); return answer(out);
      case Command::kReplay: module_->replay(device_, 0, static_cast<int>(next<int64_t>()), s); return;
      case Command::kForgetCaptures: module_->forget_captures(device_, 0); return;
      case Command::kPrepare: module_->prepare(device_, &out.connection, s); return answer(out);
      case Command::kConnect: module_->connect(device_, 0, &next<ConnectionId>(), s); return;
      case Command::kAllReduce:
      case Command::kReduce:
      case Command::kSend:
      case Command::kReceive: return ask_for(command, next<Collective>());
      case Command::kExchange: module_->exchange(device_, 0, s); return;
      case Command::kExchanged: out.values[0] = module_->exchanged(device_, 0, s); return answer(out);
      case Command::kGiveUp: module_->give_up(device_, 0); return;
      default: break;
    }
    int number = static_cast<int>(Command::kFirstOp);
#define MOEBIUS_RUN(op, args) \
  if (static_cast<int>(command) == number++) return run_op<args>(ops().op);
    MOEBIUS_OPS(MOEBIUS_RUN)
#undef MOEBIUS_RUN
  }

  void ask_for(Command command, const Collective& c) {
    switch (command) {
      case Command::kAllReduce: module_->all_reduce(device_, 0, c.data, c.count, c.element, status_); return;
      case Command::kReduce: module_->reduce(device_, 0, c.data, c.count, c.element, c.other, status_); return;
      case Command::kSend: module_->send(device_, 0, c.data, c.count, c.other, status_); return;
      default: module_->receive(device_, 0, c.data, c.count, c.other, status_); return;
    }
  }

  const Ops& ops() const { return *module_->ops(device_); }
  std::byte* read_room() const { return memory_ + kControlBytes + kRingBytes; }

  std::byte* memory_;
  Control& control_;
  const pid_t parent_ = getppid();
  std::vector<std::byte> payload_;
  int64_t at_ = 0;
  const DeviceModule* module_ = nullptr;
  void* device_ = nullptr;
  int rank_ = 0;
  bool shares_ = false;                        // its memory and marks, with the other processes
  std::byte* marks_ = nullptr;
  std::vector<std::byte*> others_marks_;
  ModuleStatus status_;                        // the first thing that went wrong since the last answer
  std::map<std::pair<int, const std::byte*>, Peer> shared_;  // by rank and address in its process
};

}  // namespace
}  // namespace moebius

int main() {
  // A terminal or a service manager signals the engine's whole group: that process decides what becomes of the ranks, and its end is seen.
  for (int signal : {SIGHUP, SIGINT, SIGTERM}) std::signal(signal, SIG_IGN);
  void* memory = mmap(nullptr, moebius::wire::kSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, moebius::wire::kDescriptor, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "moebius-rank is a part of the library, which starts it for a rank with a process of its own (config key rank_processes)\n");
    return 2;
  }
  close(moebius::wire::kDescriptor);
  return moebius::RankProcess(static_cast<std::byte*>(memory)).run();
}
