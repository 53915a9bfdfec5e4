"""A step of a PyTorch reference for each line of standard input: the rival of `ddpm bench --loop=on-line`.

    python rival.py attention train --bf16 --channels-last --fused-attention --compile
    python rival.py unet2d sample --batch 1
    python rival.py attention start --weights model.safetensors

For each line one step is made and one line of JSON is written: `part`, `seconds`, `resident_bytes` (the most memory that
the process has held; with --device cuda, of the GPU). A step of `train` draws timesteps and noise, makes the noisy images, and does forward, MSE,
backward and Adam; `forward` is the network alone; `sample` is a step of ancestral sampling. `start` loads weights and
makes one such step, with nothing to wait for.

The networks are those of the tutorials in `tools/golden/nets.py`, and `diffusers.UNet2DModel`.
"""
import argparse
import functools
import json
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / 'tools/golden'))
import nets  # noqa: E402


def ddpm_cifar10():
    """The network of Ho et al. 2020 for CIFAR-10 (35,746,307 parameters), as `diffusers` builds it."""
    from diffusers import UNet2DModel
    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=None,
        norm_num_groups=32, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)


CASES = {  # name: (network, batch, channels, size)
    'attention': (nets.AttentionUnet, 64, 1, 28),
    'simple': (nets.SimpleUnet, 32, 1, 64),
    'unet2d': (ddpm_cifar10, 16, 3, 32),
    'double-conv': (nets.DoubleConvUnet, 8, 3, 64),
}
T = 1000


def fuse_attention(net):
    """PyTorch's fused attention in the place of the one that returns its weights, which nobody looks at."""
    for m in net.modules():
        if isinstance(m, torch.nn.MultiheadAttention):
            whole = m.forward
            m.forward = functools.wraps(whole)(lambda *a, whole=whole, **k: whole(*a, **{**k, 'need_weights': False}))


def resident():
    """The most memory that the process has held, in bytes."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith('VmHWM:'))


class Rival:
    def __init__(self, a):
        make, batch, c, size = CASES[a.case]
        self.bf16, self.batch = a.bf16, a.batch or batch
        self.device = torch.device(a.device)
        torch.set_default_device(self.device)
        torch.backends.cudnn.benchmark = True
        self.net = make()
        if a.weights:
            from safetensors.torch import load_file
            self.net.load_state_dict(load_file(a.weights, device=a.device))
        if a.fused_attention:
            fuse_attention(self.net)
        self.x = torch.randn(self.batch, c, size, size)
        if a.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.net.train(a.part == 'train')
        if a.part == 'train':
            self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4, fused=True)
        if a.compile:
            self.net = torch.compile(self.net, mode='max-autotune' if self.device.type == 'cuda' else None)
        self.beta = torch.linspace(1e-4, 0.02, T)
        self.alpha_bar = torch.cumprod(1 - self.beta, 0)
        self.t = T

    def memory(self):
        return torch.cuda.max_memory_reserved() if self.device.type == 'cuda' else resident()

    def predict(self, x, t):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            y = self.net(x, t)
            return getattr(y, 'sample', y).float()

    def train(self):
        t, eps = torch.randint(0, T, (self.batch,)), torch.randn_like(self.x)
        alpha_bar = self.alpha_bar[t][:, None, None, None]
        self.optimizer.zero_grad()
        x_t = alpha_bar.sqrt() * self.x + (1 - alpha_bar).sqrt() * eps
        loss = torch.nn.functional.mse_loss(self.predict(x_t, t), eps)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def forward(self):
        return self.predict(self.x, torch.full((self.batch,), 10))

    @torch.no_grad()
    def sample(self):
        """x_t to x_{t-1}, the expected image clipped (Ho et al. 2020, eq. 15 and 7)."""
        t = self.t = self.t - 1 if self.t > 1 else T - 1
        a, before, beta = self.alpha_bar[t], self.alpha_bar[t - 1], self.beta[t]
        eps = self.predict(self.x, torch.full((self.batch,), t))
        x_0 = ((self.x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        mean = before.sqrt() * beta / (1 - a) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - a) * self.x
        self.x = mean + ((1 - before) / (1 - a) * beta).sqrt() * torch.randn_like(self.x)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('case', choices=CASES)
    ap.add_argument('part', choices=('train', 'forward', 'sample', 'start'))
    ap.add_argument('--batch', type=int)
    ap.add_argument('--threads', type=int)
    ap.add_argument('--weights')
    ap.add_argument('--device', default='cpu')
    for flag in ('bf16', 'channels-last', 'fused-attention', 'compile'):
        ap.add_argument('--' + flag, action='store_true')
    a = ap.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    rival = Rival(a)
    if a.part == 'start':
        rival.sample()
        return
    step = getattr(rival, a.part)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        if rival.device.type == 'cuda':
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps({'part': a.part, 'seconds': seconds, 'resident_bytes': rival.memory()}), flush=True)


main()
