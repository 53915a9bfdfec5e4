"""Small JPEGs of every kind that Pillow writes: crates/data/tests/golden/jpeg.json.

    python tools/golden/jpeg.py > crates/data/tests/golden/jpeg.json

Each is hexadecimal; the images are 43 x 37, noise on a slope, so that every component has coefficients.
"""

import io
import json
import random

from PIL import Image

random.seed(5)
WIDTH, HEIGHT = 43, 37


def image(mode):
    bands = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    data = bytes(
        (5 * x + 3 * y + 40 * band + random.randrange(60)) % 256
        for y in range(HEIGHT)
        for x in range(WIDTH)
        for band in range(bands)
    )
    return Image.frombytes(mode, (WIDTH, HEIGHT), data)


def encoded(mode, **options):
    out = io.BytesIO()
    image(mode).save(out, "JPEG", quality=60, **options)
    return out.getvalue().hex()


files = {}
for mode in ("L", "RGB", "CMYK"):
    for progressive in (False, True):
        for restart in (0, 2):
            for sampling in ("4:4:4", "4:2:2", "4:2:0") if mode == "RGB" else ("4:4:4",):
                name = f"{mode} {sampling} {'progressive' if progressive else 'baseline'} restart {restart}"
                options = {"restart_marker_blocks": restart} if restart else {}
                files[name] = encoded(mode, progressive=progressive, subsampling=sampling, **options)
print(json.dumps(files, indent=1))
