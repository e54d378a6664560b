#!/usr/bin/env bash
# usage: rust_test.sh RUSTC SOURCE LIBRARY_FOLDER MODEL_FOLDER: builds the Rust example and looks at what it prints.
set -euo pipefail
rustc=$1 source=$2 library=$3 model=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$rustc" -O -D warnings --edition 2021 -L "$library" -l moebius -o "$work/stream" "$source"
export LD_LIBRARY_PATH=$library
"$work/stream" "$model" >"$work/out"
for i in 0 1 2; do grep -q "^request $i ended: length" "$work/out"; done
grep -q '^request 3 ended: abort' "$work/out"
grep -Eq '^switched to expert parallelism: [0-9]+ bytes' "$work/out"
code=0
"$work/stream" /no/such 2>"$work/err" || code=$?
[ "$code" -eq 1 ]
grep -q 'no such file' "$work/err"
