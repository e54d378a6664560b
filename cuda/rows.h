// Work on single rows: embedding, norms with the residual sum, rotary embedding and KV store, gathering.
#pragma once

#include "lib/device/ops.h"

namespace moebius::cuda {

void embed(const EmbedArgs& args, const Lane& lane);
void add_norm(const AddNormArgs& args, const Lane& lane);
void rope_store(const RopeStoreArgs& args, const Lane& lane);
void pick_rows(const PickArgs& args, const Lane& lane);
void fetch_rows(const FetchRowsArgs& args, const Lane& lane);
void add_partials(const AddPartialsArgs& args, const Lane& lane);
void clear(void* to, size_t bytes, const Lane& lane);

}  // namespace moebius::cuda
