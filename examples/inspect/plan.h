// What an engine would place where, without the memory for it: its own planning, run on a device that has only numbers.
#pragma once

#include "lib/layout/arena.h"
#include "lib/layout/transfer.h"
#include "lib/model/config.h"
#include "lib/runtime/engine.h"

namespace moebius::inspect {

struct MemoryPlan {
  ArenaPlan arena;
  TransferPlan to_tp, to_ep;
  int64_t memory_bytes = 0;     // per rank: as asked for, or what the plan takes
  int64_t workspace_bytes = 0;  // per rank
  int64_t shared_bytes = 0;     // of one copy
};

// Of ranks on the CPU. own_memory: each has a copy of what is replicated, else there is one for all. memory_bytes 0: no limit, KV as the
// engine wishes for by default. Throws as making the engine would: kInvalidArgument, kUnsupported, kDoesNotFit.
MemoryPlan plan_memory(const ModelConfig& model, const EngineConfig& config, bool own_memory);

// The same with a single page of KV and no limit: what every rank needs at least is its memory_bytes.
MemoryPlan plan_least(const ModelConfig& model, EngineConfig config, bool own_memory);

// The same of slices that are not as lib/tensor/packed.h keeps them: an arena filled to memory_bytes − beside_bytes. Without workspace.
MemoryPlan plan_slices(const SliceTable& table, int ranks, int64_t kv_slice_bytes, int64_t memory_bytes, int64_t beside_bytes);
// What activations take of a rank's memory.
int64_t planned_workspace_bytes(const ModelConfig& model, const EngineConfig& config);

}  // namespace moebius::inspect
