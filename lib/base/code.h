// What kind of error an operation ended with: a file of its own, for modules that throw nothing.
#pragma once

#include <cstdint>

namespace moebius {

// Codes cross the C ABI unchanged (include/moebius/moebius.h): numbers are never reused.
enum class Code : int32_t {
  kInvalidArgument = -1,
  kInvalidState = -2,
  kNotFound = -3,
  kUnsupported = -4,
  kIo = -5,
  kCorruptModel = -6,
  kOutOfMemory = -7,
  kTimeout = -8,
  kCancelled = -9,
  kQueueFull = -10,
  kContextTooLong = -11,
  kDoesNotFit = -12,
  kRankFailed = -13,
  kInternal = -14,
};

}  // namespace moebius
