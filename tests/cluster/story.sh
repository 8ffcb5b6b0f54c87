#!/usr/bin/env bash
# A job's story (test_story.py) on a cluster whose pods run:
#
#   tests/cluster/story.sh IMAGE_FOLDER [PYTEST_ARGUMENT...]
#
# On the cluster that KUBECONFIG names, with the image that its nodes know as DIGITFLEET_IMAGE_NAME; otherwise on two nodes that bed.py
# makes on this machine, with the image of the working tree. PYTHON is the environment's.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
story=("${PYTHON:-python3}" -m pytest -m cluster tests/cluster/test_story.py "${@:2}")
if [[ -n ${KUBECONFIG:-} ]]; then
    : "${DIGITFLEET_IMAGE_NAME:?the image, as the nodes of the cluster of KUBECONFIG know it}"
    echo "$0: the cluster of KUBECONFIG=$KUBECONFIG, image $DIGITFLEET_IMAGE_NAME"
    exec "${story[@]}"
fi
echo "$0: KUBECONFIG names no cluster: two nodes on this machine"
unset DIGITFLEET_IMAGE_NAME
tests/container/build.sh "$folder" archive
binaries=$(tests/cluster/build.sh)
export PYTHONPATH=$PWD
exec "${PYTHON:-python3}" tests/cluster/bed.py --binaries "$binaries" --folder "$folder/bed" --image "$folder/image.tar" \
    --operators -- "${story[@]}"
