#!/usr/bin/env bash
# usage: abidiff_test.sh check|write PYTHON CC: compares the types and functions of the header with the baseline that was committed, or writes
# the baseline (scripts/update-abi).
# What is compared is a library of stubs, since debug information of the real one costs minutes. It has the same functions: the real one's are
# defined behind the header (an undeclared one is an error, capi/CMakeLists.txt), and exported_symbols compares their names.
set -euo pipefail
mode=$1 python=$2 cc=$3
root=$(cd "$(dirname "$0")/../.." && pwd)
baseline=$root/capi/abi/moebius-0.abixml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" "$root/capi/abi/facts.py" stub | "$cc" -g -shared -fPIC -I"$root/include" -o "$work/libmoebius.so.0" -Wl,-soname,libmoebius.so.0 -x c -
if [ "$mode" = write ]; then
  abidw --no-show-locs --no-comp-dir-path --no-corpus-path --out-file "$baseline" "$work/libmoebius.so.0"
  exit 0
fi
[ -f "$baseline" ] || { echo "$baseline is missing: scripts/update-abi writes it"; exit 1; }
"$python" "$root/capi/abi/facts.py" suppressions >"$work/appended"
# The status is a sum: 1 abidiff failed, 2 it was called wrongly, 4 something changed, 8 callers break. Added functions and fields are left out.
status=0
abidiff --no-added-syms --suppr "$work/appended" "$baseline" "$work/libmoebius.so.0" || status=$?
[ "$status" -eq 0 ] || { echo "abidiff's status is $status: old callers break (docs/abi.md); scripts/update-abi writes the baseline anew"; exit 1; }
