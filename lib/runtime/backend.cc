#include "lib/runtime/backend.h"

#include "lib/base/error.h"
#include "lib/cpu/cpu_device.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/device/module_device.h"
#include "lib/device/remote_device.h"

namespace moebius {

namespace {

void check_for_gpu(const EngineConfig& config, const ModelConfig& model) {
  const ModelShape& s = model.shape;
  if (s.head_dim % kGpuHeadDimUnit != 0 || s.head_dim > kGpuMaxHeadDim)
    fail(Code::kUnsupported, "head_dim is {}, on a GPU it must be a multiple of {} up to {}", s.head_dim, kGpuHeadDimUnit, kGpuMaxHeadDim);
  const auto at_most = [](const char* what, int64_t value, int64_t most) {
    if (value > most) fail(Code::kUnsupported, "{} is {}, on a GPU at most {}", what, value, most);
  };
  at_most("num_key_value_heads", s.num_kv_heads, kGpuMaxKvHeads);
  at_most("vocab_size", model.vocab_size, kGpuMaxVocab);
  at_most("max_context", config.max_context, kGpuMaxContext);
  for (const MlpShape& mlp : s.mlps) at_most("the number of a layer's experts", mlp.all_experts(), kGpuMaxExperts);
}

}  // namespace

std::unique_ptr<Device> open_device(const EngineConfig& config, const ModelConfig& model) {
  if (config.device != "cpu") check_for_gpu(config, model);
  return open_device(config);
}

std::unique_ptr<Device> open_device(const EngineConfig& config) {
  const bool nccl = config.communicator == "nccl";
  if (!nccl && config.communicator != "peer") fail(Code::kInvalidArgument, "communicator is '{}', must be peer or nccl", config.communicator);
  if (config.device == "cpu") {
    if (!config.device_ids.empty()) fail(Code::kInvalidArgument, "device_ids name devices of a module; device is cpu");
    if (nccl) fail(Code::kInvalidArgument, "communicator nccl joins ranks on devices; device is cpu, whose communicator is peer");
    if (config.rank_processes) fail(Code::kInvalidArgument, "rank_processes is for ranks on devices; device is cpu");
    if (!config.streams.empty() || !config.nccl_comms.empty()) fail(Code::kInvalidArgument, "streams and nccl_comms are of ranks on devices; device is cpu");
    return std::make_unique<CpuDevice>(config.ranks, cpu_ops(config.isa), config.allocator);
  }
  if (config.allocator) fail(Code::kUnsupported, "an allocator is of the cpu's memory; device '{}' allocates its own", config.device);
  if (!nccl && !config.nccl_comms.empty()) fail(Code::kInvalidArgument, "nccl_comms are of communicator nccl; it is '{}'", config.communicator);
  // [ranks] entries or none.
  const auto list = [&](const char* name, const auto& values) {
    if (!values.empty() && static_cast<int>(values.size()) != config.ranks)
      fail(Code::kInvalidArgument, "{} has {} entries, there are {} ranks", name, values.size(), config.ranks);
    return values.empty() ? nullptr : values.data();
  };
  ModuleOptions options;
  options.ranks = config.ranks;
  options.devices = list("device_ids", config.device_ids);
  options.row_major = row_major_head(config);
  options.collectives = nccl;
  options.queues = list("streams", config.streams);
  options.comms = list("nccl_comms", config.nccl_comms);
  options.wait_ms = config.wait_deadline_ms;
  if (!config.rank_processes) return open_module_device(config.device, options);
  if (options.queues != nullptr || options.comms != nullptr)
    fail(Code::kInvalidArgument, "streams and nccl_comms are of this process; with rank_processes each rank makes its own");
  return open_remote_device(config.device, options);
}

}  // namespace moebius
