// Learned costs kept in a file between two engines of the same model, machine, ranks and threads.
#pragma once

#include <filesystem>
#include <string>

#include "lib/runtime/step_costs.h"

namespace moebius {

// Empty: taken, or there is no file yet; else a warning: what is wrong with the file, which teaches nothing then. Throws nothing but bad_alloc.
std::string read_costs(const std::filesystem::path& file, const std::string& key, double now_s, CostModel& costs);

// In one piece: a reader finds the old text or the new one. Throws kIo.
void write_costs(const std::filesystem::path& file, const std::string& key, const CostModel& costs);

}  // namespace moebius
