#!/bin/sh
# Prints hashes of what a build computes: two builds that print the same lists compute the same bytes.
#
#     tools/same_bytes.sh target/release/ddpm > after.txt; diff before.txt after.txt
#
# The weights after 100 training steps of every preset, samples from every sampler, the results of every editing command,
# and an export. Only settings and flags that all versions know are used. DDPM_ISA chooses the instruction set.
set -eu

bin=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# hash NAME FILE...: one line for the content of the files, in the order of their names.
hash() {
    name=$1
    shift
    printf '%s  %s\n' "$(cat "$@" | sha256sum | cut -c1-32)" "$name"
}

# quiet COMMAND...: runs the program, and shows what it said only if it failed.
quiet() {
    "$bin" "$@" >log 2>&1 || { echo "ddpm $*:" >&2; cat log >&2; exit 1; }
}

# Images in colour.
python3 - <<'PY'
import math, os, struct, zlib

os.mkdir('colour')
for i in range(8):
    rows = b''
    for y in range(64):
        rows += b'\0' + bytes(int(127.5 + 127 * math.sin((c + 1) * (x + i) / 9 + y * i / 40)) for x in range(64) for c in range(3))
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    with open(f'colour/{i}.png', 'wb') as file:
        file.write(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 64, 64, 8, 2, 0, 0, 0))
                   + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
PY

# train NAME STEPS FLAG...: a run on $data.
data=digits
train() {
    name=$1 steps=$2
    shift 2
    quiet train --data $data --name "$name" --steps "$steps" --batch-size 2 --set data.digits_count=64 \
        --set train.sample_every=1000000 --set "train.checkpoint_every=$steps" --set train.tensorboard=false --set data.csv=none "$@"
    hash "weights of $name" runs/"$name"/checkpoints/*/model.safetensors runs/"$name"/checkpoints/*/ema.safetensors
}

for preset in $("$bin" config --list | cut -d' ' -f1); do
    case $preset in
        digits | pictures | images) size=16 channels=1 ;;
        digits28 | mnist) size=28 channels=1 ;;
        textures) size=28 channels=3 ;;
        cifar10 | ddpm-cifar10) size=32 channels=3 ;;
        cars) size=64 channels=3 ;;
        bone-age) size=64 channels=1 ;;
        *) echo "same_bytes.sh: which size and channels has the preset $preset?" >&2; exit 1 ;;
    esac
    case $preset in
        # A preset that was renamed.
        pictures | images) name=own-data ;;
        *) name=$preset ;;
    esac
    data=digits
    [ $channels = 1 ] || data=colour
    train "$name" 100 --preset "$preset" --size $size --channels $channels --set train.ema_decay=0.9
done

data=digits
train small 60 --preset digits --set train.ema_decay=0.9 --set attention.num_class_embeds=10
train bf16 5 --preset digits --set train.precision=bf16 --set train.ema_decay=0.9
for set in diffusion.prediction=v diffusion.schedule=cosine diffusion.learned_variance=true train.loss=huber \
    train.loss_weight=min-snr train.optimizer=adamw train.clip_norm=1 train.accumulate=2 train.lr_schedule=cosine; do
    train "$set" 10 --preset digits --set train.ema_decay=0.9 --set "$set"
done

for sampler in ddpm ddim dpm++2m dpm++2s dpm++2m-sde unipc heun euler euler-ancestral pndm plms; do
    quiet sample small -n 4 --steps 12 --sampler $sampler --out "s-$sampler"
    hash "samples of $sampler" "s-$sampler"/images/*.png
done
quiet sample small -n 4 --steps 12 --class 3 --guidance 3 --sampler ddim --out guided
hash "guided samples" guided/images/*.png
quiet sample small -n 4 --steps 12 --threshold dynamic --sampler ddim --spacing quadratic --eta 0.5 --out dynamic
hash "dynamically thresholded samples" dynamic/images/*.png

image=guided/images/000000.png
other=guided/images/000001.png
mask=dynamic/images/000000.png
quiet vary small $image -n 2 --class 1 --steps 12 --strength 0.5 --out e-vary
quiet interpolate small $image $other -n 3 --class 1 --steps 12 --out e-interpolate
quiet inpaint small $image --mask $mask -n 2 --class 1 --steps 12 --out e-inpaint
for edit in vary interpolate inpaint; do
    hash "images of $edit" e-$edit/images/*.png
done
quiet denoise small $image --sigma 0.1 --class 1 --out e-denoise
hash "images of denoise" $(find e-denoise* -name '*.png' | sort)

# The tensors alone: the files also record the settings, whose names may change.
quiet export small --to safetensors --out small.safetensors
quiet export small --to pytorch --out small.pth
python3 - <<'PY'
import struct, zipfile

file = open('small.safetensors', 'rb').read()
open('safetensors.data', 'wb').write(file[8 + struct.unpack('<Q', file[:8])[0]:])
archive = zipfile.ZipFile('small.pth')
names = sorted(name for name in archive.namelist() if '/data/' in name)
open('pytorch.data', 'wb').write(b''.join(name.split('/', 1)[1].encode() + archive.read(name) for name in names))
PY
hash "tensors of the safetensors export" safetensors.data
hash "tensors of the pytorch export" pytorch.data
quiet export ddpm-cifar10 --to diffusers --out pipeline
hash "diffusers export" $(find pipeline -name '*.safetensors' -o -name '*.json' | sort)
quiet eval small -n 4 --batch-size 2 --out bound
hash "variational bound" $(find bound* -name '*.csv')
