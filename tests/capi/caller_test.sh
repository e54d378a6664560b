#!/usr/bin/env bash
# usage: caller_test.sh MODEL_FOLDER PROGRAM [STATUS]: an example of a caller streams four requests, switches in the middle, has one cancelled, and
# says what is wrong with a bad path, with that status (2).
set -euo pipefail
model=$1 program=$2 status=${3:-2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$program" "$model" >"$work/out"
for i in 0 1 2; do grep -q "^request $i ended: length" "$work/out"; done
grep -q '^request 3 ended: abort' "$work/out"
grep -Eq '^switched to expert parallelism: [0-9]+ bytes' "$work/out"
code=0
"$program" /no/such 2>"$work/err" || code=$?
[ "$code" -eq "$status" ]
grep -q 'no such' "$work/err"
