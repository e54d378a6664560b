#include "lib/runtime/cost_file.h"

#include <cmath>
#include <fstream>
#include <iterator>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include "lib/base/error.h"
#include "lib/base/json_tree.h"

namespace moebius {
namespace {

constexpr int kVersion = 3;
constexpr size_t kMaxBytes = 1 << 20;  // a file of ours has some 15 KiB

template <size_t N>
std::array<double, N> numbers(const nlohmann::json& list) {
  std::array<double, N> out;
  if (!list.is_array() || list.size() != N) fail(Code::kCorruptModel, "a list has {} numbers, must have {}", list.size(), N);
  for (size_t i = 0; i < N; ++i) {
    if (!list[i].is_number()) fail(Code::kCorruptModel, "an entry is no number");
    out[i] = list[i].get<double>();
  }
  return out;
}

const nlohmann::json& member(const nlohmann::json& object, const char* name) {
  const auto it = object.is_object() ? object.find(name) : object.end();
  if (!object.is_object() || it == object.end()) fail(Code::kCorruptModel, "'{}' is missing", name);
  return *it;
}

// All of it is read before any of it is taken.
CostModel parse(const nlohmann::json& root, double now_s) {
  CostModel costs;
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    const nlohmann::json& curve = member(member(root, "curves"), name_of(layout));
    if (curve.is_null()) continue;  // never seen
    if (!costs.curve(layout).restore(numbers<StepCurve::kState>(curve), now_s)) fail(Code::kCorruptModel, "curve '{}' is no such state", name_of(layout));
  }
  const Costs corrections = numbers<2>(member(root, "switch_corrections"));
  for (double c : corrections)
    if (!(std::isfinite(c) && c >= 0)) fail(Code::kCorruptModel, "a switch's correction is {}", c);
  costs.restore_corrections(corrections);
  return costs;
}

std::string quoted(const std::string& text) { return nlohmann::json(text).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace); }

}  // namespace

std::string read_costs(const std::filesystem::path& file, const std::string& key, double now_s, CostModel& costs) {
  std::error_code error;
  const auto type = std::filesystem::status(file, error).type();
  if (type == std::filesystem::file_type::not_found) return "";
  if (type != std::filesystem::file_type::regular)  // a FIFO would be waited for
    return fmt::format("{}: no learned costs: it is no file that can be read: {}", file.string(), error ? error.message() : "not a regular one");
  std::ifstream in(file, std::ios::binary);
  if (!in) return fmt::format("{}: no learned costs: it cannot be read", file.string());
  std::string text(kMaxBytes + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(in.gcount()));
  try {
    if (text.size() > kMaxBytes) fail(Code::kCorruptModel, "more than {} bytes", kMaxBytes);
    const JsonTree tree = parse_json(text, file.string());
    const nlohmann::json& version = member(tree.root(), "moebius_costs");
    if (!version.is_number_integer() || version.get<int64_t>() != kVersion) fail(Code::kCorruptModel, "'moebius_costs' is not {}", kVersion);
    const nlohmann::json& had = member(tree.root(), "key");
    if (!had.is_string() || had.get_ref<const std::string&>() != key)
      return fmt::format("{}: it is of {}, this engine is {}: not used, and left as it is", file.string(), had.dump(), quoted(key));
    costs = parse(tree.root(), now_s);
  } catch (const Error& e) {
    return fmt::format("{}: no learned costs, left as it is: {}", file.string(), e.what());
  }
  return "";
}

void write_costs(const std::filesystem::path& file, const std::string& key, const CostModel& costs) {
  const auto state = [&](Layout l) { return costs.curve(l).seen() ? fmt::format("[{}]", fmt::join(costs.curve(l).state(), ",")) : "null"; };
  const std::filesystem::path part = fmt::format("{}.{}-{}.part", file.string(), getpid(), static_cast<const void*>(&costs));
  {
    std::ofstream out(part, std::ios::binary | std::ios::trunc);
    out << fmt::format("{{\"moebius_costs\":{},\"key\":{},\n\"curves\":{{\"tp\":{},\n\"ep\":{}}},\n\"switch_corrections\":[{}]}}\n", kVersion, quoted(key),
                       state(Layout::kTp), state(Layout::kEp), fmt::join(costs.corrections(), ","));
    out.flush();
    if (!out) {
      std::error_code ignored;
      std::filesystem::remove(part, ignored);
      fail(Code::kIo, "{}: cannot be written", part.string());
    }
  }
  std::error_code error;
  std::filesystem::rename(part, file, error);
  if (!error) return;
  std::error_code ignored;
  std::filesystem::remove(part, ignored);
  fail(Code::kIo, "{}: cannot be put in place: {}", file.string(), error.message());
}

}  // namespace moebius
