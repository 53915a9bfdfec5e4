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
cargo build -p ddpm-cli
cargo build -p ddpm --example checkpoint_numbers
exec "$venv/bin/python" tools/check_interop.py --bin "$target/debug" "$@"
