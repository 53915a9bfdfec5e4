#!/usr/bin/env bash
# Sets this program beside PyTorch on the four networks, and writes RESULTS.md.
#
#     bench/compare.sh                                   everything: about an hour
#     bench/compare.sh --networks attention --rounds 1   a look
#     bench/compare.sh --help
#
# Needs cargo, python3 and, the first time, the network: PyTorch 2.11 goes into an environment of its own. (2.10 and 2.13
# have known faults in just this work: wrong bias gradients; slow bf16 convolution.) A C++ compiler lets torch.compile
# take part.
packages="torch==2.11.0 torchvision diffusers safetensors"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" "$here/compare.py" --ddpm "$ddpm" --work "$target/bench" ${rest[@]+"${rest[@]}"}
