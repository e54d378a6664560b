#include "examples/common/device_trace.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#ifdef MOEBIUS_CUPTI
#include <cupti.h>
#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda/library.h"
#endif

namespace moebius_examples {

std::vector<DeviceShare> shares_of(std::vector<DeviceRun> runs) {
  std::sort(runs.begin(), runs.end(), [](const DeviceRun& a, const DeviceRun& b) { return a.begin < b.begin; });
  std::map<std::string, DeviceShare> of_name;
  const auto seconds = [](uint64_t begin, uint64_t end) { return end > begin ? 1e-9 * static_cast<double>(end - begin) : 0; };
  uint64_t ended = 0;  // when all before had
  for (const DeviceRun& run : runs) {
    DeviceShare& share = of_name[run.name];
    ++share.runs;
    share.seconds += seconds(run.begin, run.end);
    share.added += seconds(std::max(ended, run.begin), run.end);
    ended = std::max(ended, run.end);
  }
  std::vector<DeviceShare> out;
  for (auto& [name, share] : of_name) {
    share.name = name;
    out.push_back(share);
  }
  std::stable_sort(out.begin(), out.end(), [](const DeviceShare& a, const DeviceShare& b) { return a.added > b.added; });
  return out;
}

std::string short_kernel_name(std::string_view demangled) {
  constexpr size_t kLongest = 40;
  std::string name(demangled);
  constexpr std::string_view kUnnamed = "(anonymous namespace)";
  for (size_t at; (at = name.find(kUnnamed)) != std::string::npos;) name.erase(at, kUnnamed.size());
  size_t begin = 0, end = name.size(), arguments = std::string::npos;
  int depth = 0;
  for (size_t i = 0; i < end; ++i) {
    const char c = name[i];
    if (c == '<' && depth++ == 0) arguments = i;
    if (c == '>') --depth;
    if (depth > 0) continue;
    if (c == '(') end = i;
    if (c == ' ' || c == ':') begin = i + 1;
  }
  if (end - begin > kLongest && arguments != std::string::npos && arguments > begin) end = arguments;
  return name.substr(begin, end - begin);
}

#ifdef MOEBIUS_CUPTI
namespace {

#define MOEBIUS_STRINGIFY(x) #x
#define MOEBIUS_STRING(x) MOEBIUS_STRINGIFY(x)

struct Cupti : moebius::cuda::Library {
  Cupti() : Library("MOEBIUS_CUPTI_LIBRARY", "libcupti.so." MOEBIUS_STRING(MOEBIUS_CUPTI)) {}
  MOEBIUS_LIBRARY_FUNCTION(register_callbacks, cuptiActivityRegisterCallbacks);
  MOEBIUS_LIBRARY_FUNCTION(enable, cuptiActivityEnable);
  MOEBIUS_LIBRARY_FUNCTION(disable, cuptiActivityDisable);
  MOEBIUS_LIBRARY_FUNCTION(flush, cuptiActivityFlushAll);
  MOEBIUS_LIBRARY_FUNCTION(next_record, cuptiActivityGetNextRecord);
  MOEBIUS_LIBRARY_FUNCTION(text_of, cuptiGetResultString);

  void check(CUptiResult result) const {
    const char* text = "unknown error";
    if (result == CUPTI_SUCCESS) return;
    (void)text_of(result, &text);
    throw std::runtime_error(std::string("the GPU cannot be profiled: CUPTI says ") + text);
  }
  static const Cupti& get() {
    static const Cupti library;
    if (!library.failure().empty()) throw std::runtime_error("the GPU cannot be profiled: " + library.failure());
    return library;
  }
};

constexpr CUpti_ActivityKind kWatched[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMCPY2,
                                           CUPTI_ACTIVITY_KIND_MEMSET};

// CUPTI calls back without saying for whom, on a thread of its own too.
std::mutex of_runs;
std::vector<DeviceRun> seen_runs;

template <class Record>
DeviceRun run_of(std::string name, const Record& record) {
  return {std::move(name), record.start, record.end};
}

// Records of older versions are the beginnings of newer ones.
void add_run(const CUpti_Activity& record) {
  switch (record.kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
      const auto& kernel = reinterpret_cast<const CUpti_ActivityKernel9&>(record);
      int status = 0;
      const std::unique_ptr<char, void (*)(void*)> demangled(abi::__cxa_demangle(kernel.name, nullptr, nullptr, &status), std::free);
      seen_runs.push_back(run_of(short_kernel_name(status == 0 ? demangled.get() : kernel.name), kernel));
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: seen_runs.push_back(run_of("copy", reinterpret_cast<const CUpti_ActivityMemcpy5&>(record))); break;
    case CUPTI_ACTIVITY_KIND_MEMCPY2: seen_runs.push_back(run_of("copy between devices", reinterpret_cast<const CUpti_ActivityMemcpyPtoP4&>(record))); break;
    case CUPTI_ACTIVITY_KIND_MEMSET: seen_runs.push_back(run_of("clear", reinterpret_cast<const CUpti_ActivityMemset4&>(record))); break;
    default: break;
  }
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* bytes, size_t* max_records) {
  constexpr size_t kBytes = size_t{8} << 20, kAligned = 8;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(kAligned, kBytes));
  *bytes = *buffer != nullptr ? kBytes : 0;
  *max_records = 0;  // as many as fit
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid_bytes) {
  const std::lock_guard lock(of_runs);
  CUpti_Activity* record = nullptr;
  while (Cupti::get().next_record(buffer, valid_bytes, &record) == CUPTI_SUCCESS) add_run(*record);
  std::free(buffer);
}

}  // namespace

DeviceTrace::DeviceTrace() {
  const Cupti& cupti = Cupti::get();
  cupti.check(cupti.register_callbacks(give_buffer, take_buffer));
  for (CUpti_ActivityKind kind : kWatched) cupti.check(cupti.enable(kind));
}

std::vector<DeviceRun> DeviceTrace::stop() {
  const Cupti& cupti = Cupti::get();
  for (CUpti_ActivityKind kind : kWatched) cupti.check(cupti.disable(kind));
  cupti.check(cupti.flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED));
  const std::lock_guard lock(of_runs);
  return std::exchange(seen_runs, {});
}
#else
DeviceTrace::DeviceTrace() { throw std::runtime_error("the GPU cannot be profiled: this was built without CUPTI (preset cuda builds with the toolkit's)"); }
std::vector<DeviceRun> DeviceTrace::stop() { return {}; }
#endif

}  // namespace moebius_examples
