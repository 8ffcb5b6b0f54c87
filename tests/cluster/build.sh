#!/usr/bin/env bash
# Builds Kubernetes from its published Go modules (control plane, scheduler, kubelet), with etcd, CoreDNS and a pause program, and the
# operators JobSet and Kueue and kwok (controllers) with what they ship for a cluster; prints the folder with them:
#
#   tests/cluster/build.sh
#
# Once for each state of go.mod and of this folder (about a quarter of an hour on two cores), outside of the tree: ~/.cache/digitfleet, or
# XDG_CACHE_HOME.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
version=$(sed -nE 's|^\s*k8s.io/kubernetes (v[0-9.]+)( // indirect)?$|\1|p' "$here/go.mod")
[[ -n $version ]]
state=$(cat "$here"/{build.sh,go.mod,go.sum,etcd.go,coredns/main.go,pause/main.go,controllers/{,kueue/}go.{mod,sum}} | sha256sum | cut -c1-12)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/digitfleet/kubernetes-$version-$state
if [[ ! -e $folder/complete ]]; then
    command -v go >/dev/null || { echo "$0: go is missing: https://go.dev/doc/install" >&2; exit 2; }
    cd "$here"
    mkdir -p "$folder"
    # Without the version, the binaries take themselves for version 0 and clients complain.
    go build -ldflags "-X k8s.io/component-base/version.gitVersion=$version" -o "$folder/" \
        k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet} >&2
    go build -o "$folder/etcd" . >&2
    go build -o "$folder/coredns" ./coredns >&2
    # Without the machine's C library: it runs in an image that is empty but for it.
    CGO_ENABLED=0 go build -o "$folder/pause" ./pause >&2
    cd controllers
    mkdir -p "$folder"/{jobset,kueue,kwok/stages}
    go build -o "$folder/jobset/controller" sigs.k8s.io/jobset >&2
    go build -o "$folder/kwok/controller" sigs.k8s.io/kwok/cmd/kwok >&2
    # Built for an older Kubernetes, whose packages it takes along.
    go -C kueue build -o "$folder/kueue/controller" sigs.k8s.io/kueue/cmd/kueue >&2
    cp -r --no-preserve=mode "$(go list -m -f '{{.Dir}}' sigs.k8s.io/jobset)"/config/{default,components} "$folder/jobset/"
    cp -r --no-preserve=mode "$(go -C kueue list -m -f '{{.Dir}}' sigs.k8s.io/kueue)"/config/{default,components} "$folder/kueue/"
    # Pods that run, nodes that stay.
    stages=$(go list -m -f '{{.Dir}}' sigs.k8s.io/kwok)/kustomize/stage
    cp --no-preserve=mode "$stages"/pod/fast/pod-ready.yaml "$stages"/node/{fast,heartbeat-with-lease}/node-*.yaml "$folder/kwok/stages/"
    # The last one, by which the others are known to be there.
    touch "$folder/complete"
fi
echo "$folder"
