#!/usr/bin/env bash
# Builds the image's cpu target without a Docker daemon and without an image registry, and unpacks it for runc:
#
#   tests/container/build.sh FOLDER      # FOLDER/rootfs, FOLDER/image.json
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

"${build[@]}" inspect --type image localhost/digitfleet:cpu |
    python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["OCIv1"]["config"]))' >"$folder/image.json"
container=$("${build[@]}" from localhost/digitfleet:cpu)
rm -rf "$folder/rootfs"
cp -a "$("${build[@]}" mount "$container")" "$folder/rootfs"
"${build[@]}" rm "$container" >/dev/null
