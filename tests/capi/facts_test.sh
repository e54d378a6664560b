#!/usr/bin/env bash
# usage: facts_test.sh PYTHON ROOT CC: moebius_abi.json and whatever repeats it say what the header says, and another compiler than the one
# that read the header (clang) agrees.
set -euo pipefail
python=$1 root=$2 cc=$3
"$python" "$root/capi/abi/facts.py" check
"$python" "$root/tests/capi/layout.py" c | "$cc" -x c -std=c11 -I"$root/include" -fsyntax-only - ||
  { echo "capi/abi/moebius_abi.json is not what $cc makes of the header"; exit 1; }
