#!/usr/bin/env bash
# usage: readme_test.sh CC SOURCE_FOLDER LIBRARY_FOLDER: README's C example, as it stands there, compiles without a warning and generates.
set -euo pipefail
cc=$1 source=$2 library=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed -n '/^```c$/,/^```$/{/^```/d;p}' "$source/README.md" >"$work/host.c"
grep -q 'int main' "$work/host.c" || { echo "README.md has no C example"; exit 1; }
"$cc" -std=c99 -Wall -Wextra -Wpedantic -Werror -I"$source/include" "$work/host.c" -L"$library" -lmoebius -o "$work/host"
cd "$source"
tokens=$(LD_LIBRARY_PATH=$library timeout 60 "$work/host")
[ "$(grep -cE '^[0-9]+$' <<<"$tokens")" -eq 16 ] || { echo "not the 16 tokens of a request's default: $tokens"; exit 1; }
