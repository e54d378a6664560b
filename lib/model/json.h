// JSON that nobody vouches for: bounded in depth, and no key twice (the DOM alone would keep the last in silence).
#pragma once

#include <string>
#include <string_view>

#include "lib/base/json_tree.h"

namespace moebius {

// `file` is for messages. Throws kCorruptModel.
JsonTree parse_json(std::string_view text, const std::string& file);

}  // namespace moebius
