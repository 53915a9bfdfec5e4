"""Checks that a checkpoint of `ddpm train` loads into the PyTorch reference of its network as it is, every name and shape
(strict=True), and, if asked, that the two compute the same.

    python check_pytorch_load.py CHECKPOINT_DIR [--config FILE] [--forward FILE] [--tolerance 1e-4]

CHECKPOINT_DIR holds model.safetensors and manifest.json, whose field `config` is the run's settings as TOML text;
--config reads them from a file instead; the network is built from the section of its name (`unet2d` needs diffusers).

--forward names a safetensors file with x [B, C, H, W] (channels first), t [B] (timesteps from 0) and optionally y
[B, C, H, W], the Rust network's output; the exit status is 1 where y is further from PyTorch's than the tolerance,
relative to PyTorch's largest magnitude. Without y, PyTorch's output is printed in short.
"""
import argparse
import json
import pathlib
import sys
import tomllib

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / 'golden'))
import nets  # noqa: E402

ap = argparse.ArgumentParser()
ap.add_argument('checkpoint', type=pathlib.Path)
ap.add_argument('--config', type=pathlib.Path)
ap.add_argument('--forward', type=pathlib.Path)
ap.add_argument('--tolerance', type=float, default=1e-4)
a = ap.parse_args()

if a.config:
    text, source = a.config.read_text(), a.config
else:
    source = a.checkpoint / 'manifest.json'
    text = json.loads(source.read_text())['config']
settings = tomllib.loads(text)
kind, channels = settings['network']['name'], settings['network']['im_channels']
c = settings[kind.replace('-', '_')]
if kind == 'attention':
    net = nets.AttentionUnet(channels, c['down_channels'], c['mid_channels'], c['down_sample'], c['time_emb_dim'],
                             (c['num_down_layers'], c['num_mid_layers'], c['num_up_layers']), c['num_heads'])
elif kind == 'simple':
    net = nets.SimpleUnet(channels, tuple(c['widths']), c['time_emb_dim'])
elif kind == 'double-conv':
    if (c['base_channels'], c['num_heads']) != (64, 4):
        sys.exit('the reference DoubleConvUnet has 64 base channels and 4 heads')
    net = nets.DoubleConvUnet(channels, c['time_emb_dim'], c['dropout'])
else:
    from diffusers import UNet2DModel
    net = UNet2DModel(in_channels=channels, out_channels=channels, **c)
net.load_state_dict(load_file(a.checkpoint / 'model.safetensors'), strict=True)
net.eval()
print(f'{a.checkpoint}: loads, {len(net.state_dict())} tensors, {sum(p.numel() for p in net.parameters()):,} parameters')

if a.forward:
    data = load_file(a.forward)
    with torch.no_grad():
        y = net(data['x'], data['t'])
        y = getattr(y, 'sample', y)
    print(f'y: shape {list(y.shape)}, mean {y.mean():.7g}, standard deviation {y.std():.7g}, '
          f'largest magnitude {y.abs().max():.7g}')
    if 'y' not in data:
        print(f'the first of it: {y.reshape(-1)[:8].tolist()}')
    else:
        if data['y'].shape != y.shape:
            sys.exit(f'{a.forward}: y is {list(data["y"].shape)}, PyTorch\'s is {list(y.shape)}')
        error = ((data['y'] - y).abs().max() / y.abs().max()).item()
        print(f'largest difference {error:.3g} of the largest magnitude; tolerance {a.tolerance:g}')
        if not error <= a.tolerance:
            sys.exit(1)
