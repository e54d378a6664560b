// What a model would run on, as numbers: devices, their memory and links, and how much of each kernels and copies get.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lib/layout/types.h"

namespace moebius::plan {

struct Link {
  double bandwidth = 0;  // bytes per second that one rank sends, and as many that it gets
  double latency_s = 0;  // of one round of messages among all ranks
};

// Shares of the cluster's peak numbers that are reached; the only things that are ever fitted.
struct Efficiencies {
  double memory = 1, matrix = 1, link = 1, copy = 1;  // link: by a step's exchanges; copy: of a link, by a switch
};

struct Cluster {
  std::string name;
  int devices = 1, devices_per_node = 1;
  int ranks = 1;  // of one world, unless asked for otherwise; the devices make as many replicas as there is room for
  int64_t memory_bytes = 0;
  double memory_bandwidth = 0, matrix_flops = 0;  // of a device
  Link inside, between;                           // nodes
  double launch_s = 0;                            // from the start of a kernel that does nothing to the next one's
  int sum_bytes = 4;                              // of a partial sum in an exchange: floats in mode fast, 8 in mode exact
  double all_to_all_s = 0;  // of an all-to-all, where rows go to the ranks of their experts alone; 0: this engine, which sends them to all
  Efficiencies efficiency;
  std::vector<std::string> sources;
};

// The name of a shipped cluster, or a file. Throws kNotFound, kCorruptModel with file and key.
Cluster read_cluster(const std::string& name_or_file);
Cluster parse_cluster(const std::string& text, const std::string& name);

// Seconds of the exchanges among `ranks` of a cluster's devices, neighbours first: rounds of messages and bytes over the slowest link.
class Exchanges {
 public:
  Exchanges(const Cluster& cluster, int ranks);
  // Every rank has `bytes` and gets the sum over ranks: each reads all (one round and a barrier), or, when that is less, adds up its share
  // and collects the others'.
  double all_reduce(double bytes) const;
  // Every rank gets so many bytes, evenly from the others: by reading them after a barrier, or by messages to each.
  double collect(double bytes) const;
  double all_to_all(double bytes) const;
  double copy_rate() const;  // bytes per second that a rank gets in a switch

 private:
  double rounds(int n) const { return ranks_ > 1 ? n * latency_s_ : 0; }
  double move(double bytes) const;

  int ranks_;
  double latency_s_, all_to_all_s_, copying_, inside_rate_, between_rate_, leaving_;
};

}  // namespace moebius::plan
