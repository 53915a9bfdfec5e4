"""Golden numbers of the networks `simple`, `double-conv` and `unet2d`: writes crates/ddpm/tests/golden/NAME.safetensors
for each. Takes some minutes.

    python networks.py [NAME ...]

Weights (by the parameter's position in `named_parameters()`), inputs, targets and samples are drawn by the rules that
attention.py states. For each network there are cases of two kinds, all in f64 from f32 numbers, rounded to f32:

whole   forward and backward of mse_loss(net(x, t), eps) in training mode without dropout: `y`, `loss`, and either every
        gradient (`grad/NAME`) or, of large networks, their norms and eight samples of each.
steps   20 steps of Adam (lr 1e-4, or as STEPS says, betas 0.9 and 0.999, eps 1e-8) on the network of its default settings, with the draws of
        attention.py's `adam20`: the losses, the final norms of all parameters (and of all running statistics), and the
        output in evaluation mode after the last step for x at t = 500.

Metadata key `golden`: for each case `settings` (in the project's names), `batch`, `height`, `width`, `channels`, `t`,
`parameters` (their number), `names`, and `labels` where there are classes. Timesteps' embeddings are the references' own
in f32, but for `simple`, whose ReLUs make much of their errors: in f64 there (nets.py).
"""
import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

import nets
import philox
from rules import SEED, norms, images, samples, set_weights

HERE = pathlib.Path(__file__).resolve().parents[2] / 'crates/ddpm/tests/golden'
torch.set_num_threads(1)


def simple(channels, size, **s):
    return nets.SimpleUnet(channels, tuple(s['widths']), s['time_emb_dim'])


def double_conv(channels, size, **s):
    assert (s['base_channels'], s['num_heads']) == (64, 4), 'the reference has no other'
    return nets.DoubleConvUnet(channels, s['time_emb_dim'], 0.0)


class Unet2d(torch.nn.Module):
    def __init__(self, channels, size, **s):
        super().__init__()
        self.net = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **s)

    def forward(self, x, t, labels=None):
        return self.net(x, t, class_labels=labels).sample


def unet2d(channels, size, **s):
    return Unet2d(channels, size, **s)


PAPER = dict(layers_per_block=2, block_out_channels=[128, 256, 256, 256],
             down_block_types=['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'],
             up_block_types=['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'], attention_head_dim=None,
             norm_num_groups=32, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)
OPTIONS = dict(layers_per_block=1, block_out_channels=[8, 16], down_block_types=['AttnDownBlock2D', 'DownBlock2D'],
               up_block_types=['UpBlock2D', 'AttnUpBlock2D'], norm_num_groups=4, norm_eps=1e-5)
CASES = {
    'simple': (simple, [
        ('tiny', dict(widths=[4, 8, 12], time_emb_dim=8), 3, 8, 12, 2, [1, 742, 300], True),
        # Timesteps at which no input of a ReLU that matters lies near 0 (see `swayed`). Images of 32x16 leave batch norm four
        # pixels of a channel at the bottom, and its gradients sway by 4e-2.
        ('default', dict(widths=[64, 128, 256, 512, 1024], time_emb_dim=32), 2, 64, 64, 1, [22, 977], False),
    ]),
    'double-conv': (double_conv, [
        ('default', dict(base_channels=64, time_emb_dim=128, num_heads=4), 2, 16, 24, 3, [17, 999], False),
    ]),
    'unet2d': (unet2d, [
        ('plain', dict(OPTIONS, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1),
         2, 8, 12, 3, [1, 742], True),
        ('options', dict(OPTIONS, attention_head_dim=4, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
                         downsample_type='resnet', upsample_type='resnet', resnet_time_scale_shift='scale_shift',
                         center_input_sample=True, mid_block_scale_factor=1.4, act_fn='gelu', num_class_embeds=5),
         2, 8, 8, 1, [5, 900], True),
        ('mish', dict(OPTIONS, attention_head_dim=8, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
                      add_attention=False, act_fn='mish', attn_norm_num_groups=2), 1, 4, 8, 1, [400], True),
        ('default', PAPER, 2, 16, 16, 3, [17, 999], False),
    ]),
}


# `simple` makes much of the least differences: at a learning rate of 1e-4 and batches of 2, PyTorch's f32 losses are 1e-3
# away from its f64 ones after three steps. So it gets more images and smaller steps: 6e-6 within eight steps.
STEPS = {'simple': dict(batch=4, lr=1e-5, h=32, w=32)}


def swayed(net, x, t, eps, draws=5):
    """By how much rounding errors of f32 move the norms of the gradients at most: errors of 1e-6 of what is typical are added to
    the results of all convolutions, as f32 sums have them. In `simple` an input of a ReLU that falls on the other side of 0
    changes the gradients of all layers before it, by up to 1e-2; with half a million such inputs some are always near, so
    that timesteps are taken at which none matters much."""
    amount, generator = [0.0], torch.Generator().manual_seed(0)

    def sway(module, inputs, y):
        typical = y.detach().pow(2).mean().sqrt()
        return y + amount[0] * typical * torch.randn(y.shape, generator=generator, dtype=y.dtype)

    state = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = [m.register_forward_hook(sway) for m in net.modules()
             if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    found = []
    for amount[0] in [0.0] + [1e-6] * draws:
        net.load_state_dict(state)
        net.zero_grad()
        torch.nn.functional.mse_loss(net(x, t), eps).backward()
        found.append(torch.stack([p.grad.norm() for p in net.parameters()]))
    for hook in hooks:
        hook.remove()
    net.load_state_dict(state)
    net.zero_grad()
    return max((norm / found[0] - 1).abs().max().item() for norm in found[1:])


def run(net, x, t, labels):
    return net(x, t, labels) if labels is not None else net(x, t)


def names_of(net):
    return [k.removeprefix('net.') for k, _ in net.named_parameters()]


def whole(make, case, settings, batch, h, w, channels, t, every):
    net = set_weights(make(channels, max(h, w), **settings)).double().train()
    x, eps = images(1, batch, channels, h, w), images(2, batch, channels, h, w)
    labels = torch.arange(batch) * 2 if settings.get('num_class_embeds') else None
    if settings.get('center_input_sample'):
        x = (x * 0.5 + 0.5).float()
    if make is simple:
        by = swayed(net, x.double(), torch.tensor(t), eps.double())
        assert by < 1e-3, f'{case}: rounding moves a norm by {by:.1e}: take other timesteps'
    y = run(net, x.double(), torch.tensor(t), labels)
    loss = torch.nn.functional.mse_loss(y, eps.double())
    loss.backward()
    grads = {k: p.grad for k, p in zip(names_of(net), net.parameters())}
    out = {f'{case}/x': x, f'{case}/eps': eps, f'{case}/y': y.detach(), f'{case}/loss': loss.detach()}
    if every:
        out |= {f'{case}/grad/{k}': g for k, g in grads.items()}
    else:
        out[f'{case}/grad_norm'] = norms(grads.values())
        out[f'{case}/grad_samples'] = torch.stack([samples(g) for g in grads.values()])
    about = dict(settings=settings, batch=batch, height=h, width=w, channels=channels, t=t,
                 parameters=sum(g.numel() for g in grads.values()), names=list(grads))
    if labels is not None:
        about['labels'] = labels.tolist()
    print(f'{case}: {about["parameters"]:,} parameters, loss {loss.item():.9g}', flush=True)
    return out, about


def steps(make, settings, h, w, channels, batch=2, lr=1e-4):
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    signal = torch.from_numpy(np.sqrt(abar).astype(np.float32))
    noise = torch.from_numpy(np.sqrt(1 - abar).astype(np.float32))
    net = set_weights(make(channels, max(h, w), **settings)).double().train()
    opt = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for k in range(20):
        x0 = (images(1000 + k, batch, channels, h, w) * 0.5).clamp(-1, 1)
        eps = images(2000 + k, batch, channels, h, w)
        words = [int(philox.philox(SEED, 0, i, 3000 + k, philox.TEST)[0]) for i in range(batch)]
        t = torch.tensor([word * 1000 >> 32 for word in words])
        x_t = signal[t][:, None, None, None] * x0 + noise[t][:, None, None, None] * eps
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(net(x_t.double(), t), eps.double())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    out = {'steps/loss': torch.tensor(losses), 'steps/norm': norms(net.parameters())}
    running = {k: v for k, v in net.named_buffers() if 'running' in k}
    if running:
        out['steps/running'] = norms(running.values())
    net.eval()
    with torch.no_grad():
        out['steps/eval'] = net(images(1, 1, channels, h, w).double(), torch.tensor([500]))
    print(f'steps: losses {losses[0]:.6g} to {losses[-1]:.6g}', flush=True)
    about = dict(settings=settings, batch=batch, lr=lr, height=h, width=w, channels=channels, names=names_of(net),
                 running=list(running))
    return out, about


for name in sys.argv[1:] or CASES:
    make, cases = CASES[name]
    tensors, meta = {}, {}
    for case, *rest in cases:
        out, meta[case] = whole(make, case, *rest)
        tensors |= out
    _, settings, _, h, w, channels, _, _ = cases[-1]
    out, meta['steps'] = steps(make, settings, channels=channels, **{'h': h, 'w': w, **STEPS.get(name, {})})
    tensors |= out
    path = HERE / f'{name}.safetensors'
    save_file({k: v.to(torch.float32).contiguous() for k, v in tensors.items()}, path,
              metadata={'golden': json.dumps(meta)})
    print(f'{path}: {len(tensors)} tensors, {path.stat().st_size:,} bytes', flush=True)
