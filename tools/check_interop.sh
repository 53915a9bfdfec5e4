#!/usr/bin/env bash
# Import and export with real PyTorch and diffusers, which go into an environment of their own under target/.
#
#     tools/check_interop.sh [--only NAME ...] [--no-chains]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}
venv=$target/interop-venv
[ -d "$venv" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r tools/golden/requirements.txt
# As ./test builds them, so that nothing is compiled again behind it. A GPU stays out of it.
export CUDA_VISIBLE_DEVICES=
cargo build --workspace --features ddpm-cli/cuda --bins --examples
exec "$venv/bin/python" tools/check_interop.py --bin "$target/debug" "$@"
