#!/usr/bin/env bash
# The hot kernels beside the measured peak: writes KERNELS.md. About four minutes. Words pick benchmarks by name.
#
#     bench/kernels.sh
#     bench/kernels.sh attention
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python3 "$here/kernels.py" "$@"
