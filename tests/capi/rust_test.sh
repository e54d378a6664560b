#!/usr/bin/env bash
# usage: rust_test.sh RUSTC PYTHON SOURCE LIBRARY_FOLDER MODEL_FOLDER: builds the Rust example and looks at what it does, and at where its
# structs have their fields.
set -euo pipefail
rustc=$1 python=$2 source=$3 library=$4 model=$5
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LD_LIBRARY_PATH=$library
build() { "$rustc" -D warnings --edition 2021 -L "$library" -l moebius -o "$@"; }
{ cat "$source"; "$python" "$here/layout.py" rust "$source"; } >"$work/layout.rs"
build "$work/layout" --test "$work/layout.rs"
"$work/layout" --quiet
build "$work/stream" -O "$source"
bash "$here/caller_test.sh" "$model" "$work/stream" 1
