#!/usr/bin/env bash
# usage: go_test.sh GO PYTHON SOURCE_FOLDER INCLUDE_FOLDER LIBRARY_FOLDER MODEL_FOLDER: builds the Go example, offline, beside a check of
# what cgo makes of the structs, and looks at what both do.
set -euo pipefail
go=$1 python=$2 source=$3 include=$4 library=$5 model=$6
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
mkdir -p "$work/module/layout" "$work/bin"
cp "$source"/go.mod "$source"/*.go "$work/module"
"$python" "$here/layout.py" go >"$work/module/layout/main.go"
export GOCACHE=$work/cache GOPATH=$work/path GOFLAGS=-mod=mod GOPROXY=off
export CGO_ENABLED=1 CGO_CFLAGS="-I$include" CGO_LDFLAGS="-L$library" LD_LIBRARY_PATH=$library
cd "$work/module"
unformatted=$("$("$go" env GOROOT)/bin/gofmt" -l "$source")
[ -z "$unformatted" ] || { echo "gofmt would change $unformatted"; exit 1; }
"$go" vet .
"$go" build -o "$work/bin/" ./...
"$work/bin/layout"
bash "$here/caller_test.sh" "$model" "$work/bin/go" 1
