"""Golden training steps: writes crates/ddpm/tests/golden/training.safetensors (the weights it starts from) and
training.json (its settings, and loss, gradient norm and learning rate of each step).

    OMP_NUM_THREADS=1 python training.py

Twenty steps of a tiny `AttentionUnet`, once with few of the settings and once with all that a step can have: AdamW with
weight decay, two micro-batches a step, clipping that binds in some steps, warm-up and cosine, Huber. PyTorch's
optimizer, `clip_grad_norm_`, schedulers and losses in f64, on the draws of `ddpm train`: micro-batch number
b = step * accumulate + k has the images at positions b * batch .. of the order, and its timesteps and noise. The data
are 20 grey images of 12 x 8 whose byte j is the lowest byte of word j at (TEST, step 0, index = image).
"""
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim import lr_scheduler as sched

import nets
import philox

SEED, STEPS, BATCH, IMAGES, SIZE = 2026, 20, 3, 20, (12, 8)
NET = dict(channels=1, down=(8, 16), mid=(16, 8), resample=(True,), temb=16, layers=(1, 1, 1), heads=2)
HERE = pathlib.Path(__file__).resolve().parents[2] / 'crates/ddpm/tests/golden'
torch.set_num_threads(1)

values = SIZE[0] * SIZE[1]
words = [philox.philox(SEED, np.arange(values // 4), i, 0, philox.TEST).reshape(-1) for i in range(IMAGES)]
images = np.stack(words).astype(np.uint8).astype(np.float32).reshape(IMAGES, 1, *SIZE) / np.float32(255) * 2 - 1
abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
sqrt_abar, sqrt_one_minus_abar = np.sqrt(abar).astype(np.float32), np.sqrt(1 - abar).astype(np.float32)


def micro_batch(number):
    at = [divmod(number * BATCH + i, IMAGES) for i in range(BATCH)]
    x0 = images[[philox.permutation(SEED, epoch, IMAGES)[place] for epoch, place in at]]
    t = np.array([philox.timestep(SEED, number, i, 1000) for i in range(BATCH)])
    eps = np.stack([philox.normals(SEED, philox.NOISE, number, i, values) for i in range(BATCH)]).reshape(x0.shape)
    x_t = sqrt_abar[t][:, None, None, None] * x0 + sqrt_one_minus_abar[t][:, None, None, None] * eps
    return torch.from_numpy(x_t).double(), torch.from_numpy(t), torch.from_numpy(eps).double()


def train(weights, loss, accumulate, optimizer, clip_norm, warmup, lr_min, settings):
    net = nets.AttentionUnet(**NET)
    net.load_state_dict(weights)
    net = net.double()
    opt = optimizer(net.parameters())
    lr = sched.ConstantLR(opt, factor=1)
    if warmup:
        rise = sched.LinearLR(opt, start_factor=1 / warmup, total_iters=warmup - 1)
        cosine = sched.CosineAnnealingLR(opt, T_max=STEPS - warmup, eta_min=lr_min)
        lr = sched.SequentialLR(opt, [rise, cosine], milestones=[warmup])
    losses, norms, rates = [], [], []
    for step in range(STEPS):
        opt.zero_grad()
        total = 0
        for k in range(accumulate):
            x_t, t, eps = micro_batch(step * accumulate + k)
            part = loss(net(x_t, t), eps) / accumulate
            part.backward()
            total += part.item()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), clip_norm or float('inf')).item())
        losses.append(total)
        rates.append(opt.param_groups[0]['lr'])
        opt.step()
        lr.step()
    clipped = sum(n > clip_norm for n in norms) if clip_norm else 0
    print(f'{settings}: losses {losses[0]:.6f} to {losses[-1]:.6f}, norms {min(norms):.3f} to {max(norms):.3f}, '
          f'{clipped} of {STEPS} clipped')
    return {'settings': {'batch_size': BATCH, 'steps': STEPS, 'seed': SEED, **settings}, 'loss': losses,
            'grad_norm': norms, 'learning_rate': rates}


torch.manual_seed(SEED)
weights = nets.AttentionUnet(**NET).state_dict()
runs = [
    train(weights, F.l1_loss, 1, lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.01), 0, 0, 0.0,
          {'loss': 'l1', 'optimizer': 'adam', 'lr': 1e-3, 'weight_decay': 0.01}),
    train(weights, lambda y, eps: F.huber_loss(y, eps, delta=0.8), 2,
          lambda p: torch.optim.AdamW(p, lr=5e-3, betas=(0.8, 0.99), weight_decay=0.2), 0.4, 5, 2e-4,
          {'loss': 'huber', 'huber_delta': 0.8, 'accumulate': 2, 'optimizer': 'adamw', 'lr': 5e-3, 'beta1': 0.8,
           'beta2': 0.99, 'weight_decay': 0.2, 'clip_norm': 0.4, 'warmup_steps': 5, 'lr_schedule': 'cosine',
           'lr_min': 2e-4}),
]
save_file(weights, HERE / 'training.safetensors')
out = HERE / 'training.json'
out.write_text(json.dumps({'network': NET, 'images': IMAGES, 'size': SIZE, 'runs': runs}, indent=1) + '\n')
print(f'{out}: {out.stat().st_size:,} bytes; weights {(HERE / "training.safetensors").stat().st_size:,} bytes, '
      f'{sum(w.numel() for w in weights.values()):,} numbers')
