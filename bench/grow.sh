#!/usr/bin/env bash
# How training grows with batch, size, width and threads: writes GROWTH.md, growth.csv and growth.png. About six minutes.
#
#     bench/grow.sh
#     bench/grow.sh --precision bf16 --out /tmp
packages="matplotlib"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" "$here/grow.py" --ddpm "$ddpm" ${rest[@]+"${rest[@]}"}
