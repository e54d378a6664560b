#!/usr/bin/env bash
# usage: old_test.sh CC LIBRARY_FOLDER MODEL_FOLDER: callers that were built with the headers of earlier versions, with today's library.
set -euo pipefail
cc=$1 library=$2 model=$3
old=$(cd "$(dirname "$0")/old" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/moebius"
for header in "$old"/moebius-*.h; do
  cp "$header" "$work/moebius/moebius.h"
  "$cc" -std=c99 -Wall -Wextra -Wpedantic -Werror -I"$work" "$old/caller.c" -L"$library" -lmoebius -o "$work/caller"
  LD_LIBRARY_PATH=$library "$work/caller" "$model" || { echo "a caller of ${header##*/} is not served as it was"; exit 1; }
done
