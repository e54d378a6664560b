// The one symbol of libmoebius-cuda.so.
#include <new>

#include "cuda/device.h"
#include "cuda/ops.h"
#include "lib/base/code.h"

namespace moebius::cuda {
namespace {

CudaDevice& of(void* device) { return *static_cast<CudaDevice*>(device); }

// Only memory can run out in here; it must not leave as an exception.
template <class R, class F>
R guarded(ModuleStatus& status, R failed, F&& f) noexcept {
  try {
    return f();
  } catch (...) {
    status.code = static_cast<int32_t>(Code::kOutOfMemory);
    constexpr char kText[] = "CUDA: the host's memory is used up";
    for (size_t i = 0; i < sizeof kText; ++i) status.text[i] = kText[i];
    return failed;
  }
}

// Makes a device the calling thread's, where it is not: to set it makes a context there. Where there can be none (another process's device) the
// thread had none either: no error of ours.
void make_current(int device) {
  int now = 0;
  if (cudaGetDevice(&now) == cudaSuccess && now == device) return;
  if (cudaSetDevice(device) != cudaSuccess) (void)cudaGetLastError();
}

// Leaves the calling thread's device as it was.
struct KeptCurrent {
  int before = 0;
  bool had = cudaGetDevice(&before) == cudaSuccess;
  ~KeptCurrent() {
    if (had) make_current(before);
  }
};

template <class F>
int32_t asked(ModuleStatus& status, F&& f) noexcept {
  return guarded(status, -1, [&] {
    f();
    return 0;
  });
}

constexpr DeviceModule kModule{
    .version = kModuleVersion,
    .bytes = sizeof(DeviceModule),
    .name = "cuda",
    .open = [](const ModuleOptions& options, ModuleStatus& s) -> void* {
      return guarded(s, static_cast<void*>(nullptr), [&]() -> void* { 
        KeptCurrent current;
        current.had &= options.world_ranks == 0;  // a rank's process stays on its device, and makes no context on another
        return CudaDevice::open(options, s).release();
      });
    },
    .close = [](void* d) {
      const KeptCurrent current;
      delete static_cast<CudaDevice*>(d);
    },
    .ops = [](void*) { return &ops(); },
    .place = [](void* d, int rank) -> int32_t { return of(d).place(rank); },
    .memory = [](void* d, int rank, int64_t* total, int64_t* free, ModuleStatus& s) { return of(d).memory(rank, total, free, s); },
    .allocate = [](void* d, int rank, int64_t bytes, ModuleStatus& s) { return of(d).allocate(rank, bytes, s); },
    .release = [](void* d, int rank, std::byte* memory) { of(d).release(rank, memory); },
    .queue = [](void* d, int rank) { return of(d).queue(rank); },
    .write = [](void* d, int rank, void* to, const void* from, int64_t n, ModuleStatus& s) { return of(d).write(rank, to, from, n, s); },
    .read = [](void* d, int rank, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height,
               ModuleStatus& s) { return of(d).read(rank, to, to_pitch, from, from_pitch, width, height, s); },
    .pin = [](void* d, void* host, int64_t bytes, ModuleStatus& s) { return of(d).pin(host, bytes, s); },
    .unpin = [](void*, void* host) { (void)cudaHostUnregister(host); },
    .copy = [](void* d, int rank, void* to, const void* from, int64_t n, ModuleStatus& s) { return of(d).copy(rank, to, from, n, s); },
    .copy_block = [](void* d, int rank, void* to, const void* from, int64_t n, ModuleStatus& s) { return of(d).copy_block(rank, to, from, n, s); },
    .finish_blocks = [](void* d, int rank, ModuleStatus& s) { return of(d).finish_blocks(rank, s); },
    .keep_blocks = [](void* d, int rank, ModuleStatus& s) { return guarded(s, -1, [&] { return of(d).keep_blocks(rank, s); }); },
    .copy_kept = [](void* d, int rank, int number, int64_t begin, int64_t end, ModuleStatus& s) { return of(d).copy_kept(rank, number, begin, end, s); },
    .mark = [](void* d, int rank, ModuleStatus& s) { return of(d).mark(rank, s); },
    .pass = [](void* d, int rank, ModuleStatus& s) { return of(d).pass(rank, s); },
    .set_marks = [](void* d, int rank, int64_t marks, ModuleStatus& s) { return of(d).set_marks(rank, marks, s); },
    .begin_capture = [](void* d, int rank, ModuleStatus& s) { return of(d).begin_capture(rank, s); },
    .join_capture = [](void* d, int rank, ModuleStatus& s) { return of(d).join_capture(rank, s); },
    .end_capture = [](void* d, int rank, ModuleStatus& s) { return guarded(s, -1, [&] { return of(d).end_capture(rank, s); }); },
    .replay = [](void* d, int rank, int number, ModuleStatus& s) { return of(d).replay(rank, number, s); },
    .forget_captures = [](void* d, int rank) { of(d).forget_captures(rank); },
    .current = [](void*) -> int32_t {
      int device = 0;
      (void)cudaGetDevice(&device);
      return device;
    },
    .set_current = [](void*, int32_t device) { make_current(device); },
    .idle = [](void* d, int rank, ModuleStatus& s) { return of(d).idle(rank, s); },
    .share_marks = [](void* d, std::byte* own, std::byte* const* others, int n, ModuleStatus& s) { return of(d).share_marks(own, others, n, s); },
    .ipc_handle = [](void* d, std::byte* memory, IpcHandle* out, ModuleStatus& s) { return of(d).ipc_handle(memory, out, s); },
    .ipc_open = [](void* d, int rank, const IpcHandle* handle, ModuleStatus& s) { return of(d).ipc_open(rank, handle, s); },
    .ipc_close = [](void* d, std::byte* memory) { of(d).ipc_close(memory); },
    .prepare = [](void* d, ConnectionId* out, ModuleStatus& s) { return of(d).prepare(out, s); },
    .connect = [](void* d, int rank, const ConnectionId* id, ModuleStatus& s) { return of(d).nccl_on(rank).connect(rank, *id, s); },
    .all_reduce = [](void* d, int rank, void* data, int64_t count, Element element, ModuleStatus& s) {
      return asked(s, [&] { of(d).nccl().all_reduce(rank, data, count, element); });
    },
    .reduce = [](void* d, int rank, void* data, int64_t count, Element element, int root, ModuleStatus& s) {
      return asked(s, [&] { of(d).nccl().reduce(rank, data, count, element, root); });
    },
    .send = [](void* d, int rank, const void* data, int64_t bytes, int to, ModuleStatus& s) {
      return asked(s, [&] { of(d).nccl().send(rank, data, bytes, to); });
    },
    .receive = [](void* d, int rank, void* data, int64_t bytes, int from, ModuleStatus& s) {
      return asked(s, [&] { of(d).nccl().receive(rank, data, bytes, from); });
    },
    .exchange = [](void* d, int rank, ModuleStatus& s) { return of(d).exchange(rank, s); },
    .exchanged = [](void* d, int rank, ModuleStatus& s) { return of(d).nccl().exchanged(rank, s); },
    .give_up = [](void* d, int rank) { of(d).give_up(rank); },
};

}  // namespace
}  // namespace moebius::cuda

extern "C" [[gnu::visibility("default")]] const moebius::DeviceModule* moebius_device_module() { return &moebius::cuda::kModule; }
