#!/usr/bin/env bash
# usage: abidiff_test.sh check|write PYTHON CC: compares the header's types and functions with the committed baseline, or writes the baseline.
# What is compared is a library of stubs, since debug information of the real one would double the border's compile time. It has the same
# functions: the real ones are defined behind the header (an undeclared one is an error) and exported_symbols compares their names.
set -euo pipefail
mode=$1 python=$2 cc=$3
root=$(cd "$(dirname "$0")/../.." && pwd)
baseline=$root/capi/abi/moebius-0.abixml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
library=$work/libmoebius.so.0
"$python" "$root/capi/abi/facts.py" stub | "$cc" -g -shared -fPIC -Wl,-soname,libmoebius.so.0 -I"$root/include" -o "$library" -x c -
if [ "$mode" = write ]; then
  abidw --no-show-locs --no-comp-dir-path --no-corpus-path --out-file "$baseline" "$library"
  exit 0
fi
[ -f "$baseline" ] || { echo "$baseline is missing: scripts/update-abi writes it"; exit 1; }
"$python" "$root/capi/abi/facts.py" suppressions >"$work/appended"
# The status is a sum: 1 abidiff failed, 2 it was called wrongly, 4 something changed, 8 callers break. Added functions and fields are none.
status=0
abidiff --no-added-syms --suppr "$work/appended" "$baseline" "$library" || status=$?
[ "$status" -eq 0 ] || { echo "abidiff's status is $status: callers break (docs/abi.md); scripts/update-abi writes the baseline"; exit 1; }
