// What crosses between the library and a backend's module, which it loads at run time: plain data and functions that never throw.
// Both come from one build: the handshake compares versions exactly.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lib/device/collectives.h"
#include "lib/device/ops.h"

namespace moebius {

// Changed with every change to what follows or to ops.h that a size does not show.
inline constexpr const char* kModuleVersion = "0.1.11";

// Set by whoever returns a Code below 0; a text ends with NUL.
struct ModuleStatus {
  int32_t code = 0;  // 0 or a Code
  char text[500] = {};
};

// Names memory of one process in others (cudaIpcMemHandle_t).
struct IpcHandle {
  std::byte bytes[64] = {};
};

inline constexpr int64_t kMarkBytes = 256;  // DeviceModule::share_marks

struct ModuleOptions {
  int32_t ranks = 1;
  // Where each rank has a process of its own: the rank that this one is, of how many (0: all are here), and 1: its memory and marks are shared
  // with the others.
  int32_t first_rank = 0, world_ranks = 0, shared = 0;
  // The most that a rank waits on its device for another process's mark; and a word, on a page of its own, that is set when it has waited so
  // long, or by whoever knows that the mark will not come: no rank waits while it is set, and idle() says so.
  double wait_ms = 0;
  uint32_t* stop_waiting = nullptr;
  const int32_t* devices = nullptr;  // [ranks] the device of each rank; null: rank r of the world on device r mod their number
  int32_t row_major = 0;             // 1: LinearArgs::row_major will be asked for
  int32_t collectives = 0;           // 1: ranks exchange by these and read no peer's memory
  void* const* queues = nullptr;     // [ranks] the host's own (cudaStream_t), which must outlive the device; null: the device makes them
  void* const* comms = nullptr;      // [ranks] the host's own (ncclComm_t, of one world with the same ranks); null: the device makes them
};

// One function for each of Device's, then of Collectives', with the same meaning. `device` is what open() gave.
struct DeviceModule {
  const char* version;
  size_t bytes;  // sizeof(DeviceModule)
  const char* name;
  void* (*open)(const ModuleOptions& options, ModuleStatus& status);
  void (*close)(void* device);
  const Ops* (*ops)(void* device);
  int32_t (*place)(void* device, int rank);
  int32_t (*memory)(void* device, int rank, int64_t* total_bytes, int64_t* free_bytes, ModuleStatus& status);
  std::byte* (*allocate)(void* device, int rank, int64_t bytes, ModuleStatus& status);
  void (*release)(void* device, int rank, std::byte* memory);
  void* (*queue)(void* device, int rank);
  int32_t (*write)(void* device, int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status);
  int32_t (*read)(void* device, int rank, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height,
                  ModuleStatus& status);
  int32_t (*pin)(void* device, void* host, int64_t bytes, ModuleStatus& status);
  void (*unpin)(void* device, void* host);
  int32_t (*copy)(void* device, int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status);
  int32_t (*copy_block)(void* device, int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status);
  int32_t (*finish_blocks)(void* device, int rank, ModuleStatus& status);
  int32_t (*keep_blocks)(void* device, int rank, ModuleStatus& status);
  int32_t (*copy_kept)(void* device, int rank, int number, int64_t begin, int64_t end, ModuleStatus& status);
  int32_t (*mark)(void* device, int rank, ModuleStatus& status);
  int32_t (*pass)(void* device, int rank, ModuleStatus& status);
  int32_t (*set_marks)(void* device, int rank, int64_t marks, ModuleStatus& status);  // while no rank is at work: so many have been set
  int32_t (*begin_capture)(void* device, int rank, ModuleStatus& status);
  int32_t (*join_capture)(void* device, int rank, ModuleStatus& status);
  int32_t (*end_capture)(void* device, int rank, ModuleStatus& status);
  int32_t (*replay)(void* device, int rank, int number, ModuleStatus& status);
  void (*forget_captures)(void* device, int rank);
  int32_t (*current)(void* device);
  void (*set_current)(void* device, int32_t current);
  int32_t (*idle)(void* device, int rank, ModuleStatus& status);  // 1: idle; 0: not yet
  // Between processes of one rank each: memory that allocate() gave, and that of another process. Marks lie in kMarkBytes of such memory, the
  // rank's own and the others', which all live as long as the device.
  int32_t (*share_marks)(void* device, std::byte* own, std::byte* const* others, int num_others, ModuleStatus& status);
  int32_t (*ipc_handle)(void* device, std::byte* memory, IpcHandle* out_handle, ModuleStatus& status);
  std::byte* (*ipc_open)(void* device, int rank, const IpcHandle* handle, ModuleStatus& status);
  void (*ipc_close)(void* device, std::byte* memory);
  int32_t (*prepare)(void* device, ConnectionId* out_id, ModuleStatus& status);
  int32_t (*connect)(void* device, int rank, const ConnectionId* id, ModuleStatus& status);
  int32_t (*all_reduce)(void* device, int rank, void* data, int64_t count, Element element, ModuleStatus& status);
  int32_t (*reduce)(void* device, int rank, void* data, int64_t count, Element element, int root, ModuleStatus& status);
  int32_t (*send)(void* device, int rank, const void* data, int64_t bytes, int to, ModuleStatus& status);
  int32_t (*receive)(void* device, int rank, void* data, int64_t bytes, int from, ModuleStatus& status);
  int32_t (*exchange)(void* device, int rank, ModuleStatus& status);
  int32_t (*exchanged)(void* device, int rank, ModuleStatus& status);  // 1: taken up; 0: not yet
  void (*give_up)(void* device, int rank);
};

// The one symbol of a module.
inline constexpr const char* kDeviceModuleSymbol = "moebius_device_module";
using DeviceModuleFunction = const DeviceModule* (*)();

}  // namespace moebius
