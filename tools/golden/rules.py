"""The rules by which the golden files of whole networks get their numbers; attention.py states them."""
import numpy as np
import torch

import philox

SEED = 2026
STRIDE = 104729


def set_weights(net):
    """Fills the parameters of a network; buffers stay as they are."""
    state = dict(net.named_parameters())
    for i, (name, w) in enumerate(state.items()):
        z = philox.normals(SEED, philox.TEST, 0, i, w.numel()).astype(np.float64)
        if w.ndim >= 2:
            v = z * (1 / np.sqrt(w[0].numel()))
        else:
            v = 1 + 0.1 * z if name.endswith('weight') else 0.1 * z
        state[name] = torch.from_numpy(v.astype(np.float32).reshape(tuple(w.shape)))
    net.load_state_dict(state, strict=False)
    return net


def images(step, batch, channels, h, w):
    """[B, C, H, W] f32, drawn channels last."""
    z = [philox.normals(SEED, philox.TEST, step, i, h * w * channels).reshape(h, w, channels) for i in range(batch)]
    return torch.from_numpy(np.stack(z).transpose(0, 3, 1, 2).copy())


def sample_indices(n):
    return [STRIDE * (j + 1) % n for j in range(8)]


def samples(v):
    return v.detach().reshape(-1)[sample_indices(v.numel())]


def norms(vs):
    return torch.stack([v.detach().double().norm() for v in vs])


def relative(a, b):
    """|a - b| / |b| in the L2 norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
