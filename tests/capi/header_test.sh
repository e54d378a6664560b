#!/usr/bin/env bash
# The public headers alone, under every compiler and standard at hand, with no padding and no warning.
set -euo pipefail
include=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '#include <moebius/moebius.h>\nint main(void) { return MOEBIUS_OK; }\n' >"$work/c.c"
cp "$work/c.c" "$work/c.cc"
printf '#include <moebius/moebius.hpp>\nint main() { return 0; }\n' >"$work/cpp.cc"
tried=0
check() {  # check COMPILER STANDARD FILE EXTRA…
  "$1" "-std=$2" -Wall -Wextra -Wpedantic -Wpadded -Werror "${@:4}" -I"$include" -fsyntax-only "$3"
  tried=$((tried + 1))
}
for c in gcc clang; do
  command -v "$c" >/dev/null || continue
  for std in c99 c11 c17 c2x; do check "$c" "$std" "$work/c.c"; done
  check "$c" c99 "$work/c.c" -fshort-enums -funsigned-char
done
for cxx in g++ clang++; do
  command -v "$cxx" >/dev/null || continue
  for std in c++11 c++14 c++17 c++20; do check "$cxx" "$std" "$work/c.cc"; done
  for std in c++17 c++20; do check "$cxx" "$std" "$work/cpp.cc" -Wno-padded; done
done
echo "$tried combinations"
[ "$tried" -ge 11 ]
