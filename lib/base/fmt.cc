// fmt's functions, compiled once: every other file sees only their declarations, and the library needs no libfmt beside it. What is called here
// without inlining (CMakeLists.txt) becomes a symbol that they link with.
#define FMT_HEADER_ONLY
#include <fmt/format.h>

namespace moebius {

std::string fmt_is_compiled_here(const void* p) { return fmt::format("{:L} {:Lg} {:g} {:?} {}", 1, 1.0, 1.0f, "text", p); }

}  // namespace moebius
