#include "lib/device/module_device.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <vector>

#include "lib/base/error.h"
#include "lib/device/module.h"

namespace moebius {
namespace {

void check(const ModuleStatus& status) {
  if (status.code < 0) throw Error(static_cast<Code>(status.code), status.text);
}

std::vector<std::filesystem::path> module_folders() {
  std::vector<std::filesystem::path> out;
  if (const char* path = std::getenv("MOEBIUS_MODULE_PATH"); path != nullptr && *path != '\0') {
    for (std::string_view rest = path; !rest.empty();) {
      const size_t end = std::min(rest.find(':'), rest.size());
      if (end > 0) out.emplace_back(rest.substr(0, end));
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
    return out;
  }
  Dl_info info;
  void* map = nullptr;
  if (dladdr1(reinterpret_cast<const void*>(&module_folders), &info, &map, RTLD_DL_LINKMAP) == 0) return out;
  const std::filesystem::path library = static_cast<const link_map*>(map)->l_name;
  std::error_code error;  // a program has no name there, and its first argument need be no path
  const std::filesystem::path file = library.empty() ? std::filesystem::read_symlink("/proc/self/exe", error) : std::filesystem::absolute(library, error);
  if (file.empty()) return out;
  const std::filesystem::path here = file.lexically_normal().parent_path();
  const std::filesystem::path beside = here.parent_path() / "lib";
  out = {here, here / "moebius"};
  if (beside != here) out.insert(out.end(), {beside, beside / "moebius"});
  return out;
}

struct Found {
  std::string path, tried;  // the path is empty where it is nowhere
};
Found find(const std::string& file) {
  Found out;
  for (const std::filesystem::path& folder : module_folders()) {
    std::error_code error;
    if (std::filesystem::exists(folder / file, error)) {
      out.path = (folder / file).string();
      return out;
    }
    out.tried += (out.tried.empty() ? "" : ", ") + folder.string();
  }
  if (out.tried.empty()) out.tried = "any folder";
  return out;
}

class ModuleDevice final : public Device, private Collectives {
 public:
  ModuleDevice(const DeviceModule& module, const ModuleOptions& options)
      : module_(module), ranks_(options.ranks), has_collectives_(options.collectives != 0) {
    ModuleStatus status;
    device_ = module.open(options, status);
    check(status);
    if (options.comms != nullptr) connection_begins();
  }
  ~ModuleDevice() override { module_.close(device_); }

  const char* name() const override { return module_.name; }
  bool host_memory() const override { return false; }
  const Ops& ops() const override { return *module_.ops(device_); }
  int place(int rank) const override { return module_.place(device_, rank); }
  int64_t total_bytes(int rank) const override { return memory(rank).total; }
  int64_t free_bytes(int rank) const override { return memory(rank).free; }

  std::byte* allocate(int rank, int64_t bytes) override { return call(module_.allocate, rank, bytes); }
  void release(int rank, std::byte* memory, int64_t) noexcept override { module_.release(device_, rank, memory); }

  void* queue(int rank) override { return module_.queue(device_, rank); }
  void write(int rank, void* to, const void* from, int64_t bytes) override { call(module_.write, rank, to, from, bytes); }
  void read(int rank, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height) override {
    call(module_.read, rank, to, to_pitch, from, from_pitch, width, height);
  }
  void pin(void* host, int64_t bytes) override { call(module_.pin, host, bytes); }
  void unpin(void* host) noexcept override { module_.unpin(device_, host); }
  void copy(int rank, void* to, int, const void* from, int64_t bytes) override { call(module_.copy, rank, to, from, bytes); }
  void copy_block(int rank, void* to, int, const void* from, int64_t bytes) override { call(module_.copy_block, rank, to, from, bytes); }
  void finish_blocks(int rank) override { call(module_.finish_blocks, rank); }
  int keep_blocks(int rank) override { return call(module_.keep_blocks, rank); }
  void copy_kept(int rank, int number, int64_t begin, int64_t end) override { call(module_.copy_kept, rank, number, begin, end); }
  void mark(int rank) override { call(module_.mark, rank); }
  void pass(int rank) override { call(module_.pass, rank); }
  void align_marks() override {
    for (int r = 0; r < ranks_; ++r) call(module_.set_marks, r, int64_t{0});
  }
  bool can_capture() const override { return true; }
  bool captures_together() const override { return !has_collectives_; }
  void begin_capture(int rank) override { call(module_.begin_capture, rank); }
  void join_capture(int rank) override { call(module_.join_capture, rank); }
  int end_capture(int rank) override { return call(module_.end_capture, rank); }
  void replay(int rank, int number) override { call(module_.replay, rank, number); }
  void forget_captures(int rank) override { module_.forget_captures(device_, rank); }
  int current() override { return module_.current(device_); }
  void set_current(int current) override { module_.set_current(device_, current); }
  bool idle(int rank) override { return call(module_.idle, rank) != 0; }
  Collectives* collectives() override { return has_collectives_ ? this : nullptr; }

 private:
  void prepare() override {
    call(module_.prepare, &id_);
    connection_begins();
  }
  void connect(int rank) override { call(module_.connect, rank, &id_); }
  void all_reduce(int rank, void* data, int64_t count, Element element) override { call(module_.all_reduce, rank, data, count, element); }
  void reduce(int rank, void* data, int64_t count, Element element, int root) override { call(module_.reduce, rank, data, count, element, root); }
  void send(int rank, const void* data, int64_t bytes, int to) override { call(module_.send, rank, data, bytes, to); }
  void receive(int rank, void* data, int64_t bytes, int from) override { call(module_.receive, rank, data, bytes, from); }
  void exchange(int rank) override { call(module_.exchange, rank); }
  bool exchanged(int rank) override { return call(module_.exchanged, rank) != 0; }
  void give_up(int rank) noexcept override {
    connection_ends();
    module_.give_up(device_, rank);
  }

  struct Memory {
    int64_t total = 0, free = 0;
  };
  Memory memory(int rank) const {
    Memory m;
    call(module_.memory, rank, &m.total, &m.free);
    return m;
  }
  template <class R, class... Parameters, class... Args>
  R call(R (*function)(void*, Parameters...), Args... args) const {
    ModuleStatus status;
    const R result = function(device_, args..., status);
    check(status);
    return result;
  }

  const DeviceModule& module_;
  const int ranks_;
  const bool has_collectives_;
  ConnectionId id_;
  void* device_ = nullptr;
};

}  // namespace

const DeviceModule& load_module_file(const std::string& name, const std::string& file) {
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle == nullptr) fail(Code::kUnsupported, "device '{}': {}", name, dlerror());
  const auto get = reinterpret_cast<DeviceModuleFunction>(dlsym(handle, kDeviceModuleSymbol));
  if (get == nullptr) fail(Code::kUnsupported, "device '{}': {} is no module of this library ({} is missing)", name, file, kDeviceModuleSymbol);
  const DeviceModule* module = get();
  if (std::strcmp(module->version, kModuleVersion) != 0 || module->bytes != sizeof(DeviceModule))
    fail(Code::kUnsupported, "device '{}': {} is of version {}, this library of {}: they must come from one build", name, file, module->version, kModuleVersion);
  return *module;
}

const DeviceModule& load_module(const std::string& name, std::string* out_file) {
  const bool plain = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-'; });
  if (!plain) fail(Code::kInvalidArgument, "device is '{}', must be cpu or the name of a module, such as cuda", name);
  const std::string file = "libmoebius-" + name + ".so";
  const Found found = find(file);
  if (found.path.empty()) fail(Code::kUnsupported, "device '{}': {} was not found in {} (MOEBIUS_MODULE_PATH names other folders)", name, file, found.tried);
  if (out_file != nullptr) *out_file = found.path;
  return load_module_file(name, found.path);
}

bool has_module(const std::string& name) { return !find("libmoebius-" + name + ".so").path.empty(); }

std::string find_beside(const std::string& program) {
  const Found found = find(program);
  if (found.path.empty()) fail(Code::kUnsupported, "{} was not found in {} (MOEBIUS_MODULE_PATH names other folders)", program, found.tried);
  return found.path;
}

std::unique_ptr<Device> open_module_device(const std::string& name, const ModuleOptions& options) {
  return std::make_unique<ModuleDevice>(load_module(name), options);
}

}  // namespace moebius
