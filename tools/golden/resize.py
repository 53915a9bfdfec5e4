"""What torchvision makes of small images: Resize(antialias), CenterCrop, resized_crop, convert('L'), CMYK, make_grid,
save_image.

Writes crates/data/tests/golden/resize.json, which the tests of crates/data compare with. The images are made
from a formula (`sample`), so they need not be stored. Needs torch 2.11, torchvision 0.26, pillow, numpy.
"""
import io
import json
import pathlib

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode
from torchvision.utils import make_grid, save_image


def sample(height, width, channels, top, low=0):
    """(height, width, channels) of integers from `low` to `top`: an edge, a ramp and a scramble."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing='ij')
    scramble = (y * 7919 + x * 104729 + c * 1299709 + x * y * 31) % 1009 / 1008
    value = 0.4 * scramble + 0.3 * (x / width) + 0.3 * ((x + 2 * y) % 11 < 5)
    return low + np.floor(value * (top - low)).astype(np.int64)


def covering(h, w, height, width):
    """torchvision's Resize(int), for targets that need not be square."""
    return (height, int(height * w / h)) if height * w >= width * h else (int(width * h / w), width)


def resize_8(h, w, channels, height, width):
    """By Pillow; transparent images as there with premultiplied alpha, but without its rounding in between."""
    to = covering(h, w, height, width)
    if channels in (2, 4):
        t = torch.from_numpy(sample(h, w, channels, 255, 120).astype(np.float64)).permute(2, 0, 1)
        t[:-1] *= t[-1:]
        t = F.center_crop(F.resize(t, to, InterpolationMode.BILINEAR, antialias=True), [height, width])
        t[:-1] /= t[-1:]
        return np.round(t.permute(1, 2, 0).numpy()).astype(np.int64)
    a = sample(h, w, channels, 255).astype(np.uint8)
    image = Image.fromarray(a.squeeze(-1) if channels == 1 else a)
    image = F.resize(image, to, InterpolationMode.BILINEAR, antialias=True)
    return np.asarray(F.center_crop(image, [height, width]))


def resize_16(h, w, channels, height, width):
    t = torch.from_numpy(sample(h, w, channels, 65535).astype(np.float64)).permute(2, 0, 1)
    t = F.resize(t, covering(h, w, height, width), InterpolationMode.BILINEAR, antialias=True)
    return np.round(F.center_crop(t, [height, width]).permute(1, 2, 0).numpy()).astype(np.int64)


def case(bits, *numbers):
    made = (resize_8 if bits == 8 else resize_16)(*numbers)
    h, w, channels, height, width = numbers
    return dict(bits=bits, from_size=[h, w], channels=channels, size=[height, width], samples=made.flatten().tolist())


def steps():
    """The tutorials' pipelines on an RGB image of 31x44 or 9x14: smaller, larger, and from a crop."""
    def image(h, w):
        return Image.fromarray(sample(h, w, 3, 255).astype(np.uint8))

    def made(kind, image, numbers, result):
        return dict(kind=kind, from_size=list(image.size[::-1]), numbers=numbers,
                    samples=np.asarray(result).flatten().tolist())

    out = []
    for p in image(31, 44), image(9, 14):
        out.append(made('exact', p, [12, 10], F.resize(p, [12, 10], InterpolationMode.BILINEAR, antialias=True)))
        side = F.resize(p, 15, InterpolationMode.BILINEAR, antialias=True)
        out.append(made('side', p, [15, 12, 12], F.center_crop(side, [12, 12])))
        box = [2, 3, 6, 8]
        out.append(made('crop', p, box + [10, 9], F.resized_crop(p, *box, [10, 9], InterpolationMode.BILINEAR)))
    out.append(made('flip', image(9, 14), [], F.hflip(image(9, 14))))
    return out


def cmyk():
    """A JPEG with four inks, as its bytes, and what Pillow makes of it."""
    y, x = np.meshgrid(np.arange(8), np.arange(8), indexing='ij')
    inks = np.stack([x * 30, y * 30, 200 - x * 20, (x + y) * 8], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(inks, 'CMYK').save(file, 'jpeg', quality=95)
    rgb = np.asarray(Image.open(file).convert('RGB'))
    return dict(jpeg=list(file.getvalue()), rgb=rgb.flatten().tolist())


def grids():
    """save_image of make_grid on 5 images of 3x4, 3 a row, with padding 2 and with 1: one channel of it."""
    a = sample(15, 4, 1, 255).astype(np.float32).reshape(5, 1, 3, 4) / 255 * 2.4 - 1.2
    out = []
    for per_row, padding, n in [(3, 2, 5), (8, 1, 5), (8, 2, 1)]:
        unit = torch.from_numpy((a[:n] + 1) / 2)
        file = io.BytesIO()
        save_image(make_grid(unit, nrow=per_row, padding=padding), file, format='png')
        made = np.asarray(Image.open(file))
        assert (made == made[:, :, :1]).all()
        out.append(dict(per_row=per_row, padding=padding, images=n, values=a[:n].flatten().tolist(),
                        height=made.shape[0], width=made.shape[1], samples=made[:, :, 0].flatten().tolist()))
    return out


if __name__ == '__main__':
    colours = sample(6, 9, 3, 255).astype(np.uint8)
    golden = dict(
        resize=[case(8, 23, 31, 1, 12, 12), case(8, 31, 20, 3, 11, 9), case(8, 9, 14, 1, 17, 20),
                case(8, 40, 17, 4, 8, 7), case(8, 20, 29, 2, 9, 9), case(8, 64, 8, 3, 5, 5),
                case(16, 23, 31, 1, 10, 10), case(16, 19, 25, 3, 6, 8)],
        luma=dict(size=[6, 9], samples=np.asarray(Image.fromarray(colours).convert('L')).flatten().tolist()),
        steps=steps(),
        cmyk=cmyk(),
        grid=grids(),
    )
    path = pathlib.Path(__file__).parents[2] / 'crates/data/tests/golden/resize.json'
    text = json.dumps(golden, separators=(',', ':')).replace('{"bits"', '\n{"bits"').replace('{"per_row"', '\n{"per_row"')
    text = text.replace('{"kind"', '\n{"kind"').replace('"cmyk"', '\n"cmyk"')
    path.write_text(text + '\n')
    print(path.name, len(text), 'bytes')
