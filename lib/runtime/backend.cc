#include "lib/runtime/backend.h"

#include "lib/base/error.h"
#include "lib/cpu/cpu_device.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/device/module_device.h"

namespace moebius {

namespace {

void check_for_gpu(const ModelConfig& model) {
  const ModelShape& s = model.shape;
  if (s.head_dim % kGpuHeadDimUnit != 0 || s.head_dim > kGpuMaxHeadDim)
    fail(Code::kUnsupported, "head_dim is {}, on a GPU it must be a multiple of {} up to {}", s.head_dim, kGpuHeadDimUnit, kGpuMaxHeadDim);
  const auto at_most = [](const char* what, int64_t value, int64_t most) {
    if (value > most) fail(Code::kUnsupported, "{} is {}, on a GPU at most {}", what, value, most);
  };
  at_most("num_key_value_heads", s.num_kv_heads, kGpuMaxKvHeads);
  at_most("vocab_size", model.vocab_size, kGpuMaxVocab);
  for (const MlpShape& mlp : s.mlps) at_most("num_experts", mlp.num_experts, kGpuMaxExperts);
}

}  // namespace

std::unique_ptr<Device> open_device(const EngineConfig& config, const ModelConfig& model) {
  if (config.device == "cpu") {
    if (!config.device_ids.empty()) fail(Code::kInvalidArgument, "device_ids are of another device than the cpu");
    return std::make_unique<CpuDevice>(config.ranks, cpu_ops(config.isa));
  }
  if (config.plain_sums) fail(Code::kUnsupported, "plain_sums is of the cpu; device is '{}'", config.device);
  if (!config.device_ids.empty() && static_cast<int>(config.device_ids.size()) != config.ranks)
    fail(Code::kInvalidArgument, "device_ids has {} entries, there are {} ranks", config.device_ids.size(), config.ranks);
  check_for_gpu(model);
  return open_module_device(config.device, config.ranks, config.device_ids);
}

}  // namespace moebius
