#!/usr/bin/env bash
# Builds the image's cpu target without a Docker daemon and without an image registry, and unpacks it for runc:
#
#   tests/container/build.sh FOLDER              # FOLDER/rootfs, FOLDER/image.json
#   tests/container/build.sh FOLDER archive      # and FOLDER/image.tar, as `docker save` writes it, for the nodes of a cluster
#
# Debian's own Python, put together by debootstrap, stands in for the base that the Dockerfile names. Needs root, buildah, debootstrap,
# and the package indices of Debian and Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
for program in buildah debootstrap; do
    command -v "$program" >/dev/null || { echo "$0: $program is missing: apt-get install buildah debootstrap runc" >&2; exit 2; }
done
mkdir -p "$folder"
folder=$(realpath "$folder")
# Images of its own, not those of the machine.
build=(buildah --root "$folder/storage" --runroot "$folder/run")

if ! "${build[@]}" inspect --type image localhost/base >/dev/null 2>&1; then
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/base" >"$folder/debootstrap.log"
    container=$("${build[@]}" from scratch)
    "${build[@]}" add --quiet "$container" "$folder/base" / >/dev/null
    "${build[@]}" commit --quiet --rm "$container" localhost/base >/dev/null
    rm -rf "$folder/base"
fi

options=(--build-arg BASE=localhost/base --target cpu --isolation chroot --network host --layers)
# The certificate that this machine's pip trusts, where it has one of its own.
if [[ -n ${PIP_CERT:-} ]]; then
    options+=(--volume "$(dirname "$PIP_CERT"):$(dirname "$PIP_CERT"):ro" --build-arg "PIP_CERT=$PIP_CERT")
fi
if [[ -n ${PIP_INDEX_URL:-} ]]; then options+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"); fi
"${build[@]}" build "${options[@]}" --file k8s/Dockerfile --tag localhost/digitfleet:cpu .

image=localhost/digitfleet:cpu
"${build[@]}" inspect --type image "$image" |
    python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["OCIv1"]["config"]))' >"$folder/image.json"
id=$("${build[@]}" inspect --type image --format '{{.FromImageID}}' "$image")
# Gigabytes are written when there is something new only.
if [[ $(cat "$folder/rootfs.id" 2>/dev/null) != "$id" ]]; then
    container=$("${build[@]}" from "$image")
    rm -rf "$folder/rootfs"
    cp -a "$("${build[@]}" mount "$container")" "$folder/rootfs"
    "${build[@]}" rm "$container" >/dev/null
    echo "$id" >"$folder/rootfs.id"
fi
if [[ ${2:-} == archive && $(cat "$folder/image.tar.id" 2>/dev/null) != "$id" ]]; then
    rm -f "$folder/image.tar"
    "${build[@]}" push --quiet --disable-compression "$image" "docker-archive:$folder/image.tar:$image"
    echo "$id" >"$folder/image.tar.id"
fi
