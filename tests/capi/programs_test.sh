#!/usr/bin/env bash
# The contract of the programs: exit statuses, what stops a run before it starts, records, events, logits.
set -uo pipefail
bin=$1 model=$2 include=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
fail() { echo "FAILED: $*"; failures=$((failures + 1)); }
expect() {  # expect STATUS TEXT-ON-STDERR COMMAND…
  local status=$1 text=$2; shift 2
  "$@" >"$work/out" 2>"$work/err" </dev/null
  local got=$?
  [ "$got" -eq "$status" ] || fail "status $got, not $status: $* ($(head -c 300 "$work/err"))"
  grep -qF -- "$text" "$work/err" || fail "stderr lacks '$text': $* ($(head -c 300 "$work/err"))"
  if [ "$status" -eq 2 ] && [ -s "$work/out" ]; then fail "printed a result although it did not run: $*"; fi
  "$@" >/dev/null 2>/dev/full </dev/null
  got=$?
  [ "$got" -eq "$status" ] || fail "status $got, not $status, where stderr is full: $*"
}
prints() {  # prints PATTERN NAME COMMAND…: it ends well and its output has the pattern (all of it is read: grep -q in a pipe leaves early)
  local pattern=$1 name=$2; shift 2
  "$@" >"$work/printed" && grep -q -- "$pattern" "$work/printed" || fail "$name"
}
generate="$bin/moebius-generate --model $model"

programs=$(cd "$bin" && ls -d moebius-*)
for program in $programs; do
  "$bin/$program" --help >"$work/out" 2>&1 || fail "$program --help"
  expect 2 "" "$bin/$program" --no-such-flag
  "$bin/$program" --help >/dev/full 2>"$work/err"; [ $? -eq 1 ] || fail "$program --help on a full disk is no status 1"
done
expect 2 "no-such-model" "$bin/moebius-generate" --model "$work/no-such-model" --prompt-ids 1
mkdir "$work/pipes" && mkfifo "$work/pipes/config.json" && expect 2 "regular file" timeout 20 "$bin/moebius-generate" --model "$work/pipes" --prompt-ids 1
expect 2 "" $generate
expect 2 "" $generate --prompt a --prompt-ids 1
expect 2 "no token id" $generate --prompt-ids 1,x
expect 2 "--prompt-ids: the prompt is empty" $generate --prompt-ids ""
expect 2 "cannot read" $generate --prompts ""
expect 2 "--seam: -1 is not at least 0" $generate --prompt-ids 1 --seam -1
expect 2 "--stall-budget-ms: inf" $generate --prompt-ids 1 --stall-budget-ms inf
expect 2 "4096" $generate --prompt-ids 1 --threads 4096 --ranks 4
expect 2 "1024" $generate --prompt-ids 1,1024
expect 2 "no token id" $generate --prompt-ids 1,
expect 2 "64 bits" $generate --prompt-ids 1 --seed 9223372036854775808
expect 2 "64 bits" $generate --prompt-ids 1 --sampling-seed -9223372036854775809
expect 2 "2^60" $generate --prompt-ids 1 --memory-bytes 9223372036854775807
expect 2 "nan" $generate --prompt-ids 1 --policy-explore nan
for switches in 3:xy 3:tp, 9223372036854775808:tp; do expect 2 "--switch-at" $generate --prompt-ids 1 --switch-at "$switches"; done
expect 2 "same file" $generate --prompt-ids 1 --events "$work/both" --logits-out "$work/./both"
echo before >"$work/out"
(exec >>"$work/out"; $generate --prompt-ids 1 --events /dev/stdout 2>"$work/err") && fail "--events may go to the file of stdout"
grep -q "the file that stdout goes to" "$work/err" && [ "$(cat "$work/out")" = before ] || fail "--events /dev/stdout: $(cat "$work/err" "$work/out")"
expect 2 "--seam" $generate --prompt-ids 1 --seam 7
expect 2 "cannot write" $generate --prompt-ids 1 --events "$work/none/e"
expect 2 "cannot write" $generate --prompt-ids 1 --logits-out "$work/none/l"
expect 2 "ranks" $generate --prompt-ids 1 --ranks 5
expect 2 "top_p" $generate --prompt-ids 1 --top-p 2
expect 2 "isa" $generate --prompt-ids 1 --isa sse9

bad() {  # bad TEXT LINE: the second line of a prompts file is wrong; the message names it
  printf '{"prompt_ids":[1]}\n%s\n' "$2" >"$work/p.jsonl"
  expect 2 "$1" $generate --prompts "$work/p.jsonl"
  grep -q 'p.jsonl:2' "$work/err" || fail "the message does not name line 2: $2 ($(cat "$work/err"))"
}
bad "empty" '{"prompt_ids":[]}'
bad "empty" '{"prompt":""}'
bad "5000" '{"prompt_ids":[5000]}'
bad "-1" '{"prompt_ids":[-1]}'
bad "twice" '{"id":0,"prompt_ids":[1]}'
bad "colour" '{"prompt_ids":[1],"colour":1}'
bad "max_token" '{"prompt_ids":[1],"max_token":1}'
bad "not supported" '{"prompt_ids":[1],"stop":["x"]}'
bad "2048" '{"prompt_ids":[1],"max_tokens":2048}'
bad "neither" '{"id":"a"}'
bad "id is empty" '{"id":"","prompt_ids":[1]}'
bad "id is empty" '{"id":"a\u0000b","prompt_ids":[1]}'
bad "both" '{"prompt":"a","prompt_ids":[1]}'
bad "JSON" '{"prompt_ids":[1]'
bad "object" '[1]'
bad "integer" '{"prompt_ids":[1],"max_tokens":1.5}'
bad "temperature" '{"prompt_ids":[1],"temperature":-1}'
bad "twice" '{"prompt_ids":[1],"seed":1,"seed":2}'
bad "arrival_step" '{"prompt_ids":[1],"arrival_step":-1}'
expect 2 "cannot read" $generate --prompts "$work/none.jsonl"
: >"$work/empty.jsonl"
expect 2 "no prompt" $generate --prompts "$work/empty.jsonl"

cat >"$work/p.jsonl" <<'P'
{"id":"a","prompt":"ROMEO:","max_tokens":8,"temperature":0}
{"id":7,"prompt_ids":[5,6,7],"max_tokens":40,"arrival_step":3,"cancel_step":9,"ignore_eos":true}
{"prompt_ids":[5,6],"max_tokens":3,"arrival_step":5,"cancel_step":5}
{"id":"late","prompt_ids":[9],"max_tokens":4,"arrival_step":30,"logprobs":1,"seed":0}
P
run() { $generate --prompts "$work/p.jsonl" --format json "$@" 2>"$work/err" || fail "generate $* ($(cat "$work/err"))"; }
run --events "$work/ev" --logits-out "$work/l" --ranks 2 --switch-at 4:ep,12:tp,99:ep >"$work/r1"
grep -qF 'was not reached' "$work/err" || fail "a switch after the last step is not named"
[ "$(wc -l <"$work/r1")" -eq 4 ] || fail "not one record a request"
grep -q '"id":7,.*"finish_reason":"abort"' "$work/r1" || fail "the cancelled request has no abort record"
grep -q '"id":2,"prompt_ids":\[5,6\],"token_ids":\[\],"logprobs":null,"finish_reason":"abort"' "$work/r1" || fail "cancel at the arrival step: no record without tokens"
grep -q '"id":"late".*"logprobs":\[{' "$work/r1" || fail "no logprobs"
for type in arrived finished cancelled switch_started seam switch_finished; do
  grep -q "\"type\":\"$type\"" "$work/ev" || fail "no event $type"
done
grep -q '"step":30,"type":"arrived","id":"late"' "$work/ev" || fail "idle steps are not counted"
for flags in "--ranks 1" "--ranks 2 --layout ep" "--ranks 4 --threads 2" "--ranks 2 --seam 3" "--ranks 2 --stall-budget-ms 0.01 --switch-at 2:ep,7:tp"; do
  run $flags --logits-out "$work/l2" >"$work/r2"
  cmp -s "$work/r1" "$work/r2" || fail "records differ with $flags"
done
run --ranks 2 --logits-out "$work/l2" >/dev/null
cmp -s "$work/l" "$work/l2" || fail "logits differ"
warned="$generate --prompts $work/p.jsonl --format json --ranks 2 --switch-at 99:ep --events $work/ev"
unsaid() { [ "$1" -eq 0 ] && cmp -s "$work/r1" "$work/r2" && ! grep -q warning "$work/ev" || fail "status $1, or other results, where stderr is $2"; }
$warned >"$work/r2" 2>/dev/full; unsaid $? full
$warned >"$work/r2" 2>&-; unsaid $? closed
$warned >"$work/r2" 2> >(:); unsaid $? "a dead pipe"
run --ranks 2 --switch-at 4:ep,4:tp,4:ep --events "$work/ev" --logits-out "$work/l2" >"$work/r2"
[ "$(grep -c '"step":4,"type":"switch_finished"' "$work/ev")" -eq 3 ] || fail "of three switches at one step some are lost"
cmp -s "$work/r1" "$work/r2" && cmp -s "$work/l" "$work/l2" || fail "three switches at one step change something"
run --ranks 2 --switch-at "4:ep$(printf ',4:tp,4:ep%.0s' $(seq 50))" --events "$work/ev" >"$work/r2"
[ "$(grep -c '"step":4,"type":"switch_finished"' "$work/ev")" -eq 101 ] || fail "of 101 switches at one step some are lost"
cmp -s "$work/r1" "$work/r2" || fail "101 switches at one step change something"
$generate --prompts "$work/p.jsonl" --format json --switch-at "4:ep$(printf ',4:tp,4:ep%.0s' $(seq 50))" --events /dev/full >"$work/r2" 2>"$work/err"
[ $? -eq 1 ] && cmp -s "$work/r1" "$work/r2" || fail "events on a full disk: no status 1, or records are lost"
echo '{' >"$work/costs"
$generate --prompt-ids 1 --policy measured --ranks 2 --policy-file "$work/costs" >/dev/null 2>"$work/err" || fail "a broken policy file"
grep -q "warning: .*costs" "$work/err" || fail "a broken policy file is not named"
printf '{"id":1,"prompt_ids":[1],"ignore_eos":true,"max_tokens":3}\n{"id":2,"prompt_ids":[2],"ignore_eos":true,"max_tokens":3}\n' >"$work/p.jsonl"
run --max-batch 1 >"$work/r3"
[ "$(wc -l <"$work/r3")" -eq 2 ] || fail "a small batch drops requests"
$generate --prompt-ids 5,6,7 --max-tokens 500 --ignore-eos --prompts /dev/null 2>/dev/null && fail "two prompt sources are taken"
"$bin/moebius-generate" --model "$model" --prompt "What " --max-tokens 5 >/dev/full 2>/dev/null; [ $? -eq 1 ] || fail "a full disk is no status 1"

# Every sampling flag reaches the request: with 99 forced by a bias, each changes what is printed.
most=6
one() { $generate --prompt-ids 5,6,7 --format json --max-tokens "$most" "$@" 2>"$work/err" | sed 's/.*"token_ids":\[\([0-9,]*\)\].*"finish_reason":"\([a-z]*\)".*/\1 \2/'; }
is() { local want=$1; shift; local got; got=$(one "$@"); [ "$got" = "$want" ] || fail "'$got', not '$want', with $* ($(head -c 300 "$work/err"))"; }
is '99,99,99,99,99,99 length' --logit-bias '{"99": 100}' --temperature 0
is '40,40,40,40,40,40 length' --allowed-token-ids 40
is '99 stop' --logit-bias '{"99":100}' --temperature 0 --stop-token-ids 98,99
is '0 stop' --logit-bias '{"0":100}' --temperature 0
is '0,0,0,0,0,0 length' --logit-bias '{"0":100}' --temperature 0 --ignore-eos
most=3; is '99,99,99 length' --logit-bias '{"99":100}' --temperature 0; most=6
[ "$(one --temperature 0 --logit-bias '{"99":100}' --stop-token-ids 99 --min-tokens 2 | tr ',' '\n' | wc -l)" -eq 3 ] || fail "--min-tokens"
greedy=$(one --temperature 0 --ignore-eos) sampled=$(one --ignore-eos --temperature 2)
[ "$greedy" != "$sampled" ] || fail "--temperature has no effect"
for flags in "--top-k 1" "--top-p 0.000001" "--min-p 1"; do is "$greedy" --ignore-eos --temperature 2 $flags; done
is "$sampled" --ignore-eos --temperature 2 --n 1 --priority 3 --deadline-ms 60000
[ "$(one --ignore-eos --temperature 2 --sampling-seed 5)" != "$sampled" ] || fail "--sampling-seed has no effect"
[ "$(one --ignore-eos --temperature 2 --seed 5)" != "$sampled" ] || fail "--seed has no effect"
most=150; long=$(one --temperature 0 --ignore-eos)
for flag in --presence-penalty --frequency-penalty --repetition-penalty; do
  [ "$(one --temperature 0 --ignore-eos $flag 2)" != "$long" ] || fail "$flag has no effect"
done
prints '"logprobs":\[{' "--logprobs" $generate --prompt-ids 1 --format json --logprobs 2 2>/dev/null
expect 2 "--n" $generate --prompt-ids 1 --n
expect 2 "n is 2" $generate --prompt-ids 1 --n 2
expect 2 "logit_bias" $generate --prompt-ids 1 --logit-bias 5
expect 2 "--logit-bias" $generate --prompt-ids 1 --logit-bias x
expect 2 "twice" $generate --prompt-ids 1 --logit-bias '{"5": 1, "5": 2}'
expect 2 "logit_bias" $generate --prompt-ids 1 --logit-bias '{"5": 101}'
expect 2 "logit_bias" $generate --prompt-ids 1 --logit-bias '{"5000": 1}'
expect 2 "allowed_token_ids" $generate --prompt-ids 1 --allowed-token-ids 5000

# A switch that does not fit is refused and the run goes on; a full KV preempts; a full queue makes the rest wait.
ids=$(seq -s, 1 330)
for i in 1 2 3; do printf '{"prompt_ids":[%s],"max_tokens":40,"ignore_eos":true}\n' "$ids"; done >"$work/p.jsonl"
run --ranks 2 --page-tokens 64 --kv-tokens 1280 --prefix-cache 0 --chunk-tokens 1000 --switch-at 3:ep --events "$work/ev" >"$work/r5"
grep -q '"step":3,"type":"switch_refused".*"reason":".*tokens short' "$work/ev" || fail "no switch_refused event: $(cat "$work/ev")"
grep -q 'switch refused' "$work/err" || fail "a refused switch is not named on stderr"
[ "$(grep -c '"finish_reason":"length"' "$work/r5")" -eq 3 ] || fail "requests after a refused switch"
for i in $(seq 10); do printf '{"prompt_ids":[%s,5,6],"max_tokens":50,"temperature":0,"ignore_eos":true}\n' "$i"; done >"$work/p.jsonl"
run --events "$work/ev" >"$work/r6"
run --kv-tokens 320 --events "$work/ev2" >"$work/r7"
grep -q '"type":"preempted","id":' "$work/ev2" || fail "no preempted event"
cmp -s "$work/r6" "$work/r7" || fail "records differ after preemptions"
run --max-queue 2 --max-batch 3 >"$work/r8"
cmp -s "$work/r6" "$work/r8" || fail "a full queue drops or changes requests"
$generate --prompt "ROMEO:" --max-tokens 5 --temperature 0 >"$work/t1" 2>/dev/null && grep -q '^ROMEO:' "$work/t1" || fail "text of one prompt"
$generate --prompts "$work/p.jsonl" --format text >"$work/t2" 2>/dev/null || fail "text of a file"
[ "$(grep -c '^--- [0-9] (length)$' "$work/t2")" -eq 10 ] || fail "text names each request with its reason"

# Weights that are no numbers: the requests end with an error, each with its record, and that is a failure.
cp -r "$model" "$work/no-numbers" && weights=$work/no-numbers/model.safetensors
header=$((8 + $(od -An -t u8 -N 8 "$model/model.safetensors")))
{ head -c "$header" "$model/model.safetensors"; head -c $(($(stat -c %s "$model/model.safetensors") - header)) /dev/zero | LC_ALL=C sed 's/\x00\x00/\xc0\x7f/g'; } >"$weights"
expect 1 "1 of 1 requests ended with an error" "$bin/moebius-generate" --model "$work/no-numbers" --prompt-ids 1 --format json
grep -q '"finish_reason":"error"' "$work/out" || fail "no record where the weights are no numbers"

# A library that fails in its sixth step, in front of the real one; a signal that comes as soon as it is waited for.
export ASAN_OPTIONS=${ASAN_OPTIONS:-}:verify_asan_link_order=0
cat >"$work/failing.c" <<'C'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <moebius/moebius.h>
#include <signal.h>
int sigwait(const sigset_t *set, int *out) {
  (void)set;
  *out = SIGTERM;
  return 0;
}
moebius_status moebius_engine_step(moebius_engine *e, moebius_step_result *r, moebius_error **err) {
  static int calls;
  moebius_status (*real)(moebius_engine *, moebius_step_result *, moebius_error **) = dlsym(RTLD_NEXT, "moebius_engine_step");
  return real(calls++ == 5 ? NULL : e, r, err);
}
C
if cc -shared -fPIC -I"$include" "$work/failing.c" -o "$work/failing.so" 2>"$work/err"; then
  printf '{"id":"s","prompt_ids":[1],"ignore_eos":true,"max_tokens":3}\n{"id":"l","prompt_ids":[2],"ignore_eos":true,"max_tokens":30}\n{"id":"n","prompt_ids":[2],"arrival_step":9}\n' >"$work/p.jsonl"
  LD_PRELOAD="$work/failing.so" $generate --prompts "$work/p.jsonl" --format json >"$work/r4" 2>"$work/err"
  [ $? -eq 1 ] || fail "an engine failure is no status 1"
  [ "$(sed 's/.*"id":"\(.\)".*"finish_reason":"\([a-z]*\)".*/\1 \2/' "$work/r4" | tr '\n' ' ')" = "s length l error n error " ] || fail "records after an engine failure: $(cat "$work/r4")"
  LD_PRELOAD="$work/failing.so" "$bin/moebius-demo" --requests 4 >"$work/out" 2>"$work/err"
  [ $? -eq 1 ] || fail "the demo: an engine failure is no status 1"
  if [ -x "$bin/moebius-serve" ]; then
    for i in 1 2 3 4 5; do
      LD_PRELOAD="$work/failing.so" timeout -s KILL 60 "$bin/moebius-serve" --model "$model" --port 0 --threads 1 >"$work/out" 2>/dev/full
      got=$?; [ $got -eq 0 ] || fail "status $got of a server that is stopped before it listens"
    done
  fi
else
  fail "no compiler for the failing library: $(head -c 300 "$work/err")"
fi
expect 2 "no-such-model" "$bin/moebius-demo" --model "$work/no-such-model"
expect 2 "bytes short" "$bin/moebius-demo" --page-tokens 1024 --memory-bytes 4000000
expect 2 "config.json" "$bin/moebius-bench" decode --model "$work/no-such-model"
expect 2 "" "$bin/moebius-bench" decode --model "$model" --ranks 5
expect 2 "nan" "$bin/moebius-bench" switch --model "$model" --stall-budget-ms nan
ln -s "$model" "$work/"$'\xff'
prints '"what":"load"' "bench of a folder whose name is no UTF-8" "$bin/moebius-bench" load --model "$work/"$'\xff' --rounds 1 --format json

"$bin/moebius-demo" --requests 12 --layout ep >"$work/demo" 2>"$work/progress" || fail "demo"
grep -q 'EP → TP under load' "$work/progress" || fail "the demo's switching run does not begin in --layout ep"
"$bin/moebius-demo" --requests 20 >"$work/demo" 2>"$work/progress" || fail "demo"
grep -q 'TP → EP under load' "$work/progress" && grep -q 'EP → TP under load' "$work/progress" || fail "the demo does not go to EP and back"
grep -q 'running' "$work/progress" || fail "the demo's live table is not on stderr"
grep -q 'running' "$work/demo" && fail "the demo's live table is on stdout"
[ "$(tail -n 1 "$work/demo")" = "tokens: identical in 3 of 3 runs" ] || fail "the demo's last line"
for flags in "--requests 1" "--requests 8 --max-queue 3"; do
  "$bin/moebius-demo" $flags >"$work/demo" 2>/dev/full || fail "demo $flags where stderr is full"
  [ "$(tail -n 1 "$work/demo")" = "tokens: identical in 3 of 3 runs" ] || fail "the last line of demo $flags"
done
prints '"share_of_floor"' "bench decode" "$bin/moebius-bench" decode --model "$model" --batch 2 --steps 4 --format json
prints '"floor_tokens_per_second"' "bench prefill" "$bin/moebius-bench" prefill --model "$model" --tokens 40 --rounds 1 --format json
prints '"part":"kv"' "bench switch" "$bin/moebius-bench" switch --model "$model" --ranks 2 --requests 3 --context 20 --rounds 1 --format json
"$bin/moebius-bench" load --model "$model" --rounds 1 --format json >"$work/load" || fail "bench load"
grep -q '"memcpy_seconds"' "$work/load" && grep -q '"floor_tokens_per_second"' "$work/load" || fail "bench load: keys"
prints 'earlier' "bench --compare" "$bin/moebius-bench" load --model "$model" --rounds 1 --compare "$work/load"
expect 2 "demo:1 is no line" "$bin/moebius-bench" load --model "$model" --compare "$work/demo"
for full in "moebius-bench load --rounds 1 --model $model" "moebius-demo --requests 2" "moebius-c-example $model" "moebius-cpp-example $model"; do
  "$bin"/$full >/dev/full 2>/dev/null; [ $? -eq 1 ] || fail "a full disk is no status 1: $full"
  { "$bin"/$full 2>/dev/null; echo $? >"$work/status"; } | :
  [ "$(cat "$work/status")" -eq 1 ] || fail "status $(cat "$work/status") where nobody reads what comes: $full"
done
[ "$failures" -eq 0 ] && echo "all as promised"
exit "$((failures > 0))"
