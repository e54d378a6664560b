// The floor of a step: t = max(bytes ÷ read rate, operations ÷ bf16 rate), both rates measured by the threads that run the model.
#pragma once

#include <cstdint>
#include <filesystem>

#include "lib/comm/world.h"
#include "lib/device/ops.h"
#include "lib/model/config.h"

namespace moebius::bench {

struct Rates {
  double read = 0;   // bytes per second
  double flops = 0;  // bf16 multiply-adds count as two
};

// What a step reads and computes. The first block is the model's, the second the step's.
struct FloorInputs {
  int64_t expert_bytes = 0;       // one expert as experts_reached counts it (in TP, a rank's cuts)
  int64_t dense_jobs = 0;         // of experts_reached, the dense layers
  int64_t fixed_bytes = 0;        // attention projections, dense MLPs, routers
  int64_t head_bytes = 0;         // LM head
  int64_t kv_token_bytes = 0;     // K and V of one token over all layers
  double row_flops = 0;           // everything but LM head and attention scores
  double head_flops = 0;          // a row's LM head
  double pair_flops = 0;          // one query row against one token of KV
  int64_t total_weight_bytes = 0;

  int64_t rows = 0, logit_rows = 0, experts_reached = 0, kv_tokens_read = 0;
  int64_t attention_pairs = 0;    // (row, token) pairs; 0: kv_tokens_read
};

FloorInputs floor_inputs(const ModelConfig& model, int slices_per_expert, int ranks, bool tp);
double floor_seconds(const FloorInputs& work, const Rates& rates);

double now();  // seconds of a clock that only goes on

Rates measure_rates(World& world, const Ops& ops);
Rates better(const Rates& a, const Rates& b);  // a floor is of the best that was seen

// A plain memcpy of `bytes` by all threads.
double memcpy_seconds(World& world, int64_t bytes);

// Reading a folder's safetensors files by all threads; their bytes are looked at by nobody.
double cached_read_seconds(World& world, const std::filesystem::path& model_dir);
int64_t peak_resident_bytes();  // of this process so far

}  // namespace moebius::bench
