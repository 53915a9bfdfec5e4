"""Trains the PyTorch `AttentionUnet` on MNIST with the draws of `ddpm train --preset mnist --seed S`: the rival of
"a mean loss within 3 %". Takes about an hour on two cores.

    python mnist_reference.py MNIST_DIR OUT_DIR [--steps 600] [--seed 0]

Writes OUT_DIR/init.safetensors (the weights it started from, for `ddpm train --init`), OUT_DIR/losses.txt
(step, loss) and OUT_DIR/final.safetensors.
"""
import argparse
import gzip
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

import nets
import philox

ap = argparse.ArgumentParser()
ap.add_argument('mnist_dir')
ap.add_argument('out_dir')
ap.add_argument('--steps', type=int, default=600)
ap.add_argument('--seed', type=int, default=0)
ap.add_argument('--batch', type=int, default=64)
a = ap.parse_args()

out = pathlib.Path(a.out_dir)
out.mkdir(parents=True, exist_ok=True)
with gzip.open(pathlib.Path(a.mnist_dir) / 'train-images-idx3-ubyte.gz') as f:
    images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
torch.manual_seed(a.seed)
net = nets.AttentionUnet().fused_attention()
save_file(net.state_dict(), out / 'init.safetensors')
opt = torch.optim.Adam(net.parameters(), lr=1e-4)
abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
sqrt_abar, sqrt_one_minus_abar = np.sqrt(abar).astype(np.float32), np.sqrt(1 - abar).astype(np.float32)
orders = {}
with open(out / 'losses.txt', 'w') as log:
    for step in range(a.steps):
        index = []
        for i in range(a.batch):
            epoch, at = divmod(step * a.batch + i, len(images))
            if epoch not in orders:
                orders = {epoch: philox.permutation(a.seed, epoch, len(images))}
            index.append(orders[epoch][at])
        x0 = images[index].astype(np.float32)[:, None] / np.float32(255) * 2 - 1
        t = np.array([philox.timestep(a.seed, step, i, 1000) for i in range(a.batch)])
        eps = np.stack([philox.normals(a.seed, philox.NOISE, step, i, 784) for i in range(a.batch)])
        eps = eps.reshape(a.batch, 1, 28, 28)
        x_t = sqrt_abar[t][:, None, None, None] * x0 + sqrt_one_minus_abar[t][:, None, None, None] * eps
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(net(torch.from_numpy(x_t), torch.from_numpy(t)), torch.from_numpy(eps))
        loss.backward()
        opt.step()
        print(step, f'{loss.item():.7g}', file=log, flush=True)
save_file(net.state_dict(), out / 'final.safetensors')
