#!/usr/bin/env bash
# usage: header_test.sh INCLUDE_FOLDER: the public headers alone, under gcc and clang and every standard, without padding or a warning.
set -euo pipefail
include=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tried=0
check() {  # check COMPILER STANDARD HEADER FLAG…: in a file of its own that includes it twice
  local file="$work/${3//[\/.]/_}"
  printf '#include <%s>\n#include <%s>\nint main(void) { return MOEBIUS_OK; }\n' "$3" "$3" >"$file"
  "$1" "-std=$2" -Wall -Wextra -Wpedantic -Werror "${@:4}" -I"$include" -fsyntax-only "$file" || { echo "$1 -std=$2 ${*:4}: $3"; exit 1; }
  tried=$((tried + 1))
}
cd "$include"
for header in moebius/*.h; do
  other=$(sed -n 's/^ *# *include *//p' "$header" | grep -vxE '<stddef\.h>|<stdint\.h>|<moebius/moebius\.h>' || true)
  [ -z "$other" ] || { echo "$header includes $other: only <stddef.h> and <stdint.h> are everywhere"; exit 1; }
  for flags in "" "-fshort-enums -funsigned-char"; do
    for c in gcc clang; do
      for std in c99 c11 c17 c2x; do check $c $std "$header" -x c -Wpadded -DMOEBIUS_ENABLE_EXPERIMENTAL $flags; done
    done
    for cxx in g++ clang++; do
      for std in c++11 c++14 c++17 c++20 c++2b; do check $cxx $std "$header" -x c++ -Wpadded -DMOEBIUS_ENABLE_EXPERIMENTAL $flags; done
    done
  done
done
for cxx in g++ clang++; do
  for std in c++17 c++20 c++2b; do check $cxx $std moebius/moebius.hpp -x c++; done
done
echo "$tried combinations"
