#!/usr/bin/env bash
# usage: package_test.sh BUILD SOURCE LIBDIR CMAKE C_COMPILER CXX_COMPILER VERSION
# Installs the build, moves what was installed, and builds and runs consumers of each kind against it: all must choose the same tokens.
set -euo pipefail
build=$1 source=$2 libdir=$3 cmake=$4
export CC=$5 CXX=$6
version=$7
here=$source/tests/package model=$source/examples/models/shakespeare-moe
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAILED: $*"; exit 1; }
quiet() { "$@" >"$work/log" 2>&1 || { cat "$work/log"; fail "$*"; }; }
files() { (cd "$1" && find . ! -type d | LC_ALL=C sort); }
install() { quiet "$cmake" --install "$build" --prefix "$@"; }

install "$work/runtime" --component runtime
[ "$(files "$work/runtime")" = "$(printf '%s\n' "./$libdir/libmoebius.so.0" "./$libdir/libmoebius.so.$version")" ] ||
  fail "component runtime is $(files "$work/runtime")"
for component in runtime dev static tools; do install "$work/first" --component $component; done
mkdir "$work/second" && mv "$work/first" "$work/second/usr"
prefix=$work/second/usr
if grep -rlF "$work/first" "$prefix"; then fail "these name the place where they were installed first"; fi
bash "$source/tests/capi/symbols_test.sh" "$prefix/$libdir/libmoebius.so" "$source/capi/abi/moebius.symbols"

consumers=()
project() {  # project NAME CONSUMER …: by CMake
  local name=$1
  shift
  quiet "$cmake" -G Ninja -S "$here/$name" -B "$work/$name" "-DCMAKE_PREFIX_PATH=$prefix" -DCMAKE_BUILD_TYPE=Release
  quiet "$cmake" --build "$work/$name"
  for consumer in "$@"; do consumers+=("$work/$name/$consumer"); done
}
project shared consumer_c
project static consumer_cpp consumer_static

config() { PKG_CONFIG_LIBDIR=$prefix/$libdir/pkgconfig pkg-config "$@" moebius; }  # with no development files of what is inside
[ "$(config --modversion)" = "$version" ] || fail "moebius.pc has version $(config --modversion)"
read -ra flags <<<"$(config --cflags --libs)"
quiet "$CC" "$here/consumer.c" "${flags[@]}" "-Wl,-rpath,$prefix/$libdir" -o "$work/consumer_pc"
read -ra flags <<<"$(config --static --cflags --libs)"
quiet "$CC" -static "$here/consumer.c" "${flags[@]}" -o "$work/consumer_pc_static"
consumers+=("$work/consumer_pc" "$work/consumer_pc_static")

for consumer in "${consumers[@]}"; do
  "$consumer" "$model" >"$work/tokens" || fail "$consumer ends with $?"
  [ -f "$work/expected" ] || cp "$work/tokens" "$work/expected"
  [ "$(wc -l <"$work/tokens")" -eq 12 ] || fail "$consumer printed $(wc -l <"$work/tokens") tokens, not 12"
  cmp -s "$work/tokens" "$work/expected" || fail "$consumer chose other tokens than ${consumers[0]}"
  needs=no
  if readelf -d "$consumer" | grep -q 'NEEDED.*libmoebius\.so\.0'; then needs=yes; fi
  case $consumer in *static) expected=no ;; *) expected=yes ;; esac
  [ $needs = $expected ] || fail "$consumer needs libmoebius.so.0: $needs"
done

# Installed programs find library and model from where they lie.
"$prefix/bin/moebius-generate" --model "$prefix/share/moebius/models/shakespeare-moe" --prompt-ids 52,49,47 --max-tokens 12 --temperature 0 --format json >"$work/record"
tr -d ' \n' <"$work/record" | grep -qF "\"token_ids\":[$(paste -sd, "$work/expected")]" || fail "moebius-generate printed $(cat "$work/record")"

# As a part of a parent project. Its build is looked at, not done: the sources are compiled once.
quiet "$cmake" -G Ninja -S "$here/subdirectory" -B "$work/subdirectory" "-DMOEBIUS_SOURCE=$source"
quiet ninja -C "$work/subdirectory" "$here/consumer.c^"
quiet ninja -C "$work/subdirectory" -n all
quiet "$cmake" --install "$work/subdirectory" --prefix "$work/nothing"
[ ! -e "$work/nothing" ] || fail "the parent installs $(files "$work/nothing")"
echo "${#consumers[@]} consumers chose the same tokens"
