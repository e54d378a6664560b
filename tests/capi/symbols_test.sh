#!/usr/bin/env bash
# What the shared library exports in MOEBIUS_0 is exactly capi/abi/moebius.symbols, what else is there is the experimental tier, and it needs
# no library of a GPU or a cluster.
set -euo pipefail
library=$1 golden=$2
nm -D --defined-only "$library" | awk '$2 != "A" && $3 !~ /@@MOEBIUS_EXPERIMENTAL$/ {print $3}' | sed 's/@@MOEBIUS_0$//' | LC_ALL=C sort |
  diff -u <(LC_ALL=C sort "$golden") - || { echo "the exported names differ from $golden: scripts/update-abi writes it from the header"; exit 1; }
readelf -d "$library" | grep -q 'SONAME.*libmoebius\.so\.0' || { echo "SONAME is not libmoebius.so.0"; exit 1; }
if readelf -d "$library" | grep -E 'NEEDED.*(cuda|nccl|mpi|fmt)'; then echo "an unwanted library is needed"; exit 1; fi
# It prints nothing, ends no process, installs no handler and changes neither locale nor environment: it cannot, without these.
if nm -D --undefined-only "$library" | awk '{sub(/@.*/, "", $2); print $2}' |
   grep -xE '_?exit|quick_exit|abort|v?f?printf|__v?f?printf_chk|f?puts|putchar|fwrite|perror|stdout|stderr|_ZSt4(cout|cerr|clog)|signal|sigaction|setlocale|setenv|putenv'
then echo "the library must not use these"; exit 1; fi
