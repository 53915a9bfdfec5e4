"""Sets our resizing beside torchvision's on real images: `compare_resize.py DDPM FOLDER [IMAGES]`.

Takes IMAGES (50) of the images in FOLDER, half of them as they are, half in mosaics of 12x16 with a little noise,
saved as PNG so that JPEG decoders play no part; brings each to sizes below and above its own by `ddpm data show` and by
the torchvision transforms that the tutorials use on PIL images; and tells the greatest difference in steps of 1/255.
Fails if it is above 1. Needs torchvision 0.26, pillow, numpy and a built `ddpm`.
"""
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
from torchvision import transforms as T

PIPELINES = [
    ('exact', lambda h, w: T.Resize((h, w)), lambda h, w: ['--set=data.resize=exact']),
    ('short side, middle', lambda h, w: T.Compose([T.Resize(max(h, w)), T.CenterCrop((h, w))]),
     lambda h, w: [f'--set=data.resize_side={max(h, w)}']),
    ('a quarter larger, middle', lambda h, w: T.Compose([T.Resize(max(h, w) * 5 // 4), T.CenterCrop((h, w))]),
     lambda h, w: [f'--set=data.resize_side={max(h, w) * 5 // 4}']),
]
SIZES = [(16, 16), (28, 28), (64, 64), (48, 80), (200, 200)]


def images(folder, count):
    paths = sorted(p for p in folder.rglob('*') if p.suffix.lower() in ('.png', '.jpg', '.jpeg'))
    random = np.random.default_rng(0)
    chosen = random.choice(len(paths), count // 2, replace=False)
    yield from (Image.open(paths[i]).convert('RGB') for i in chosen)
    for _ in range(count - count // 2):
        tiles = [np.asarray(Image.open(paths[i]).convert('RGB').resize((32, 32))) for i in random.integers(len(paths), size=192)]
        whole = np.concatenate([np.concatenate(tiles[r * 16:r * 16 + 16], 1) for r in range(12)], 0)
        rows, columns = random.integers(100, 384), random.integers(100, 512)
        noisy = whole[:rows, :columns] + random.normal(0, 6, (rows, columns, 3))
        yield Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def main(ddpm, folder, count=50):
    worst = {}
    for image in images(pathlib.Path(folder), int(count)):
        with tempfile.TemporaryDirectory() as place:
            place = pathlib.Path(place)
            (place / 'set').mkdir()
            image.save(place / 'set' / 'a.png')
            for name, theirs, flags in PIPELINES:
                for h, w in SIZES:
                    run = [ddpm, 'data', 'show', place / 'set', f'--size={h}x{w}', '--channels=3', '-n1', '-o', place / 'out.png',
                           # The network plays no part, but must take the size.
                           '--set=attention.down_sample=[false,false]', *flags(h, w)]
                    subprocess.run(run, check=True, capture_output=True)
                    ours = np.asarray(Image.open(place / 'out.png').convert('RGB')).astype(int)
                    expected = np.asarray(theirs(h, w)(image)).astype(int)
                    assert ours.shape == expected.shape, (ours.shape, expected.shape)
                    difference = np.abs(ours - expected)
                    most, ones, all_ = worst.get((name, h, w), (0, 0, 0))
                    worst[name, h, w] = max(most, difference.max()), ones + (difference > 0).sum(), all_ + difference.size
    for (name, h, w), (most, ones, all_) in worst.items():
        print(f'{name:26} {h:3}x{w:<3}  at most {most}/255, {100 * ones / all_:.2f} % of the samples differ')
    return max(most for most, _, _ in worst.values())


if __name__ == '__main__':
    sys.exit(0 if main(*sys.argv[1:]) <= 1 else 1)
