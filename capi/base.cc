#include "capi/guarded.h"

#include <array>
#include <numeric>
#include <vector>

#include "lib/cpu/cpu_ops.h"
#include "lib/device/module_device.h"

namespace moebius::capi {

moebius_error* out_of_memory_error() noexcept {
  static moebius_error error{MOEBIUS_E_OUT_OF_MEMORY, "out of memory"};  // short enough to need none
  return &error;
}

moebius_status report(moebius_status code, const char* message, moebius_error** err) noexcept {
  if (err == nullptr) return code;
  try {
    *err = new moebius_error{code, message};
  } catch (...) {
    *err = out_of_memory_error();
  }
  return code;
}

std::string did_you_mean(std::string_view name, const std::vector<const char*>& known) {
  std::string best;
  size_t least = SIZE_MAX;
  for (std::string_view k : known) {
    std::vector<size_t> row(k.size() + 1);
    std::iota(row.begin(), row.end(), size_t{0});
    for (size_t i = 1; i <= name.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i;
      for (size_t j = 1; j <= k.size(); ++j) {
        const size_t above = row[j];
        row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (name[i - 1] != k[j - 1])});
        diagonal = above;
      }
    }
    if (row.back() < least) least = row.back(), best = k;
  }
  return 2 * least <= name.size() ? fmt::format("; did you mean '{}'?", best) : "";
}

namespace {

constexpr std::array kModules = {"cuda"};

bool has_feature(std::string_view name) {
  if (name == "tokenizer" || name == "cpu") return true;
  if (const std::optional<Isa> isa = parse_isa(name)) return isa_available(*isa);
  return std::find(kModules.begin(), kModules.end(), name) != kModules.end() && has_module(std::string(name));
}

std::string build_info() {
  std::string isas, devices = "\"cpu\"";
  for (const Isa isa : available_isas()) isas += fmt::format("{}\"{}\"", isas.empty() ? "" : ", ", isa_name(isa));
  for (const char* module : kModules)
    if (has_module(module)) devices += fmt::format(", \"{}\"", module);
  return fmt::format(R"({{"version": "{}.{}.{}", "compiler": "{}", "isa": [{}], "devices": [{}]}})", MOEBIUS_VERSION_MAJOR,
                     MOEBIUS_VERSION_MINOR, MOEBIUS_VERSION_PATCH, __VERSION__, isas, devices);
}

struct NamedSize {
  const char* name;
  size_t size;
};
#define NAMED_SIZE(type) \
  NamedSize { #type, sizeof(type) }
constexpr NamedSize kStructs[] = {NAMED_SIZE(moebius_model_info), NAMED_SIZE(moebius_step_result),     NAMED_SIZE(moebius_event),
                                  NAMED_SIZE(moebius_memory),     NAMED_SIZE(moebius_switch_estimate), NAMED_SIZE(moebius_stats),
                                  NAMED_SIZE(moebius_plan_spec),  NAMED_SIZE(moebius_plan_info),       NAMED_SIZE(moebius_slice),
                                  NAMED_SIZE(moebius_kv_pool),    NAMED_SIZE(moebius_page_pair),       NAMED_SIZE(moebius_block_copy)};

}  // namespace
}  // namespace moebius::capi

extern "C" {

int32_t moebius_has_feature(const char* name) {
  int32_t has = 0;
  moebius::capi::guarded(nullptr, [&] { has = name != nullptr && moebius::capi::has_feature(name); });
  return has;
}

const char* moebius_build_info(void) {
  try {
    static const std::string info = moebius::capi::build_info();
    return info.c_str();
  } catch (...) {
    return "{}";
  }
}

size_t moebius_struct_size(const char* name) {
  for (const auto& s : moebius::capi::kStructs)
    if (name != nullptr && std::strcmp(s.name, name) == 0) return s.size;
  return 0;
}

void moebius_version(int32_t* major, int32_t* minor, int32_t* patch) {
  if (major != nullptr) *major = MOEBIUS_VERSION_MAJOR;
  if (minor != nullptr) *minor = MOEBIUS_VERSION_MINOR;
  if (patch != nullptr) *patch = MOEBIUS_VERSION_PATCH;
}

const char* moebius_status_name(moebius_status status) {
  static const char* const names[] = {"ok",         "invalid_argument", "invalid_state", "not_found",        "unsupported",
                                      "io",         "corrupt_model",    "out_of_memory", "timeout",          "cancelled",
                                      "queue_full", "context_too_long", "does_not_fit",  "rank_failed",      "internal"};
  return status <= 0 && status >= MOEBIUS_E_INTERNAL ? names[-status] : "unknown";
}

moebius_status moebius_error_code(const moebius_error* err) { return err == nullptr ? MOEBIUS_OK : err->code; }
const char* moebius_error_message(const moebius_error* err) { return err == nullptr ? "" : err->message.c_str(); }
void moebius_error_destroy(moebius_error* err) {
  if (err != moebius::capi::out_of_memory_error()) delete err;
}

}  // extern "C"
