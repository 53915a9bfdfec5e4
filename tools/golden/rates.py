"""Golden learning rates: writes crates/ddpm/tests/golden/rates.json.

    python rates.py

The learning rate of every step, from PyTorch's own schedulers: LinearLR (from 1 / warm-up over warm-up - 1 steps: the
first step has lr / warm-up, the last of the warm-up lr), then ConstantLR or CosineAnnealingLR by SequentialLR; and
ReduceLROnPlateau (mode min, threshold_mode rel), stepped once an epoch with its mean loss. The plateau cases have four
steps an epoch, whose losses are normals of philox.py around a curve that falls and flattens; `losses` are f32 values.
"""
import json
import pathlib
import warnings

import numpy as np
import torch
from torch.optim import lr_scheduler as sched

import philox

OUT = pathlib.Path(__file__).resolve().parents[2] / 'crates/ddpm/tests/golden/rates.json'
warnings.filterwarnings('ignore')


def optimizer(lr):
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def by_step(kind, lr, steps, warmup=0, lr_min=0.0):
    opt = optimizer(lr)
    rest = sched.CosineAnnealingLR(opt, T_max=steps - warmup, eta_min=lr_min) if kind == 'cosine' else \
        sched.ConstantLR(opt, factor=1)
    if warmup:
        rise = sched.LinearLR(opt, start_factor=1 / warmup, total_iters=warmup - 1) if warmup > 1 else \
            sched.ConstantLR(opt, factor=1)
        rest = sched.SequentialLR(opt, [rise, rest], milestones=[warmup])
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]['lr'])
        opt.step()
        rest.step()
    return {'lr_schedule': kind, 'lr': lr, 'steps': steps, 'warmup_steps': warmup, 'lr_min': lr_min, 'rates': rates}


def plateau(index, lr, epochs, patience, factor, threshold, lr_min):
    opt = optimizer(lr)
    reduce = sched.ReduceLROnPlateau(opt, mode='min', factor=factor, patience=patience, threshold=threshold,
                                     threshold_mode='rel', min_lr=lr_min)
    z = philox.normals(2026, philox.TEST, 0, index, 4 * epochs).astype(np.float64).reshape(epochs, 4)
    curve = 0.1 + np.exp(-np.arange(epochs) / 6)[:, None]
    losses = (curve * (1 + 0.03 * z)).astype(np.float32).astype(np.float64)
    rates = []
    for epoch in losses:
        rates += [opt.param_groups[0]['lr']] * 4
        opt.step()
        reduce.step(sum(epoch.tolist()) / 4)
    return {'lr_schedule': 'plateau', 'lr': lr, 'plateau_patience': patience, 'plateau_factor': factor,
            'plateau_threshold': threshold, 'lr_min': lr_min, 'losses': losses.reshape(-1).tolist(), 'rates': rates}


golden = [
    by_step('constant', 1e-4, 12),
    by_step('constant', 2e-4, 12, warmup=5),
    by_step('cosine', 1e-3, 50),
    by_step('cosine', 2e-3, 60, warmup=10, lr_min=1e-5),
    by_step('cosine', 1e-3, 9, warmup=1),
    by_step('cosine', 1e-3, 9, warmup=8),
    plateau(0, 1e-3, 60, patience=3, factor=0.5, threshold=1e-4, lr_min=0.0),
    plateau(1, 1e-3, 60, patience=0, factor=0.1, threshold=0.01, lr_min=2e-6),
    plateau(2, 5e-4, 60, patience=10, factor=0.1, threshold=1e-4, lr_min=0.0),
    plateau(3, 1e-7, 40, patience=1, factor=0.3, threshold=1e-4, lr_min=0.0),  # changes below 1e-8 are not made
]
OUT.write_text(json.dumps(golden, indent=None, separators=(',', ':')).replace('{"lr_sch', '\n{"lr_sch') + '\n')
print(f'{OUT}: {OUT.stat().st_size:,} bytes')
for g in golden:
    changes = sum(a != b for a, b in zip(g['rates'], g['rates'][1:]))
    print(f'{g["lr_schedule"]}: {g["rates"][0]:.3g} to {g["rates"][-1]:.3g}, {changes} changes in {len(g["rates"])} steps')
