#!/usr/bin/env bash
# Compiles every CUDA kernel with NVIDIA's compiler, for Ampere and Hopper. Needs no GPU and no CUDA toolkit: NVRTC comes
# as a Python package, into target/cuda-venv or the folder that is given.
#
#     tools/check_cuda_kernels.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-target/cuda-venv}
find_library() { find "$folder" -name 'libnvrtc.so.*' 2>/dev/null | head -n 1; }
if [ -z "$(find_library)" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --no-deps nvidia-cuda-nvrtc-cu12
fi
library=$(find_library)
if [ -z "$library" ]; then
    echo "check_cuda_kernels: no libnvrtc.so in $folder; delete it and try again" >&2
    exit 1
fi
export LD_LIBRARY_PATH="$(cd "$(dirname "$library")" && pwd)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test -p ddpm-engine-cuda --test compile -- --nocapture | tee "$log"
if grep -q '^skipped' "$log"; then
    echo "check_cuda_kernels: $library was not used" >&2
    exit 1
fi
