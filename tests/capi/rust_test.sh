#!/usr/bin/env bash
# usage: rust_test.sh RUSTC SOURCE LIBRARY_FOLDER MODEL_FOLDER: builds the Rust example and looks at what it does.
set -euo pipefail
rustc=$1 source=$2 library=$3 model=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$rustc" -O -D warnings --edition 2021 -L "$library" -l moebius -o "$work/stream" "$source"
LD_LIBRARY_PATH=$library bash "$(dirname "$0")/caller_test.sh" "$model" "$work/stream"
