#!/usr/bin/env bash
# Builds Kubernetes's control plane from its published Go modules and prints the folder with it:
#
#   tests/cluster/build.sh
#
# Once for each version (about seven minutes on two cores), outside of the tree: ~/.cache/digitfleet, or XDG_CACHE_HOME.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
version=$(sed -nE 's|^\s*k8s.io/kubernetes (v[0-9.]+)$|\1|p' "$here/go.mod" | head -1)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/digitfleet/kubernetes-$version
if [[ ! -x $folder/etcd ]]; then
    command -v go >/dev/null || { echo "$0: go is missing: https://go.dev/doc/install" >&2; exit 2; }
    # A copy: go notes in go.mod what it has needed.
    source=$(mktemp -d)
    trap 'rm -rf "$source"' EXIT
    cp "$here"/{go.mod,go.sum,etcd.go} "$source"
    cd "$source"
    # Without it, the binaries take themselves for version 0 and clients complain.
    name="-X k8s.io/component-base/version.gitVersion=$version"
    mkdir -p "$folder"
    go build -mod=mod -ldflags "$name" -o "$folder/" k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager >&2
    # The last one, by which the others are known to be there.
    go build -mod=mod -o "$folder/etcd" . >&2
fi
echo "$folder"
