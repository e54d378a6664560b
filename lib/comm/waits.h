// Waits of a rank's thread for its device, inside a region of the world: with its deadline, until it is aborted.
#pragma once

#include "lib/base/error.h"
#include "lib/base/waited.h"
#include "lib/comm/world.h"
#include "lib/device/device.h"

namespace moebius {

// For all that a rank has queued.
inline void wait_until_idle(World& world, Device& device, int rank) {
  world.wait_until([&] { return device.idle(rank); });
}

// Starts what the rank has asked for, and waits until it has been taken up.
inline void exchange(World& world, Collectives& collectives, int rank) {
  collectives.exchange(rank);
  world.wait_until([&] { return collectives.exchanged(rank); });
}

// Before a region in which ranks exchange: an earlier one may have failed. Ranks with collectives that are not connected become so, by a region
// of its own.
inline void join_ranks(World& world, Device& device) {
  device.align_marks();
  Collectives* collectives = device.collectives();
  if (collectives == nullptr || collectives->connection() != 0) return;
  collectives->prepare();
  world.run_long([&world, &device, collectives](int rank, int) {
    constexpr std::chrono::minutes kMost{5};  // many times what connecting takes
    const DrainOnError drain(device, rank);
    collectives->connect(rank);
    Waited waited;
    world.wait_until([&] {
      if (waited.exceeds(kMost)) fail(Code::kTimeout, "rank {} is not connected with the others after {} minutes", rank, kMost.count());
      return collectives->exchanged(rank);
    });
  });
}

}  // namespace moebius
