"""Golden numbers of the whole `AttentionUnet`: writes crates/ddpm/tests/golden/attention.safetensors (and
attention_names.txt). Takes about a minute.

    python attention.py

All numbers are functions of counter-based draws, `normals(seed=2026, purpose=100, step, index, n)` of philox.py:

Weights    step 0, index i = the parameter's position in `state_dict()` order; n numbers z in PyTorch's flat order.
           Each is computed in f64 from the f32 z and rounded to f32:
             tensors with two or more dimensions   z / sqrt(product of all dimensions but the first)
                                                   (transposed convolutions [cin, cout, kh, kw] too)
             1-D, the name ends in `weight`        1 + 0.1 z   (group norms)
             the other 1-D tensors                 0.1 z       (biases)
Input x    step 1, index = place in the batch; Target eps: step 2 likewise. The numbers of an image are drawn
           channels last: H*W*C numbers are shape (H, W, C).
Samples    eight entries j = 0..7 of a tensor of n numbers: flat indices 104729 (j + 1) mod n in PyTorch's order.

`tiny/...` and `default/...`: forward and backward of mse_loss(net(x, t), eps) in f64 (f32 weights, x and eps cast up;
the sinusoidal embedding of t is the reference's f32 one, stored as `embedding`), rounded to f32.

`adam20/...`: 20 steps of Adam (lr 1e-4, betas 0.9 and 0.999, eps 1e-8) on the default network from the weights above,
batch 2; at step k = 0..19, for item i:
           x0  = clamp(0.5 normals(step=1000+k, index=i), -1, 1)
           eps = normals(step=2000+k, index=i)
           t   = the first word of block 0 at (step=3000+k, index=i), as an integer below 1000: (word * 1000) >> 32
           x_t = f32(sqrt(abar_t)) * x0 + f32(sqrt(1 - abar_t)) * eps, each operation rounded to f32; abar in f64
run once in f32 and once in f64 (from the same f32 x_t): the distance between the two is what rounding alone does.
The keys' third of every `in_proj_bias` has a gradient of exactly zero in theory (softmax does not see it), so what is
there is rounding noise, and Adam turns noise into steps of up to lr: compare nothing there.

README.md lists the tensors. On record, PyTorch 2.11.0 in f32 (CPU, one thread) against these f64 numbers:

tiny       y 1.3e-6 at most (of 2.48), loss 2.1e-8, all gradients 9.1e-7 relative in L2, the worst tensor 2.0e-6
default    y 1.9e-6 at most (of 2.54), loss 3.4e-8, all gradients 1.0e-6 relative in L2, the worst tensor 2.4e-6
adam20     losses 3.8e-7 relative at most; but for in_proj_bias the parameters end 2.7e-5 of the whole update away (L2),
           1.2e-5 at most, and the norm of a tensor's update differs by 6.1e-5 relative at most

An embedding computed in f64 instead of the reference's f32 (2.8e-5 apart at t = 999) moves the default network's y by
5.6e-6, its loss by 1.0e-7 and its gradients by at most 5.7e-6 (relative, worst tensor).
"""
import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

import nets
import philox
from rules import SEED, STRIDE, norms, images, relative, samples, set_weights

HERE = pathlib.Path(__file__).resolve().parents[2] / 'crates/ddpm/tests/golden'
torch.set_num_threads(1)

TINY = dict(channels=3, down=(16, 32, 32), mid=(32, 32), resample=(True, False), temb=32, layers=(1, 1, 1), heads=4)
DEFAULT = dict(channels=1, down=(32, 64, 128, 256), mid=(256, 256, 128), resample=(True, True, False), temb=128,
               layers=(2, 2, 2), heads=4)


def forward_backward(config, dtype, x, t, eps):
    net = set_weights(nets.AttentionUnet(**config)).to(dtype)
    y = net(x.to(dtype), t)
    loss = torch.nn.functional.mse_loss(y, eps.to(dtype))
    loss.backward()
    return {'y': y.detach(), 'loss': loss.detach()}, {k: p.grad for k, p in net.named_parameters()}


tensors, meta = {}, {'seed': SEED, 'sample_stride': STRIDE}


def whole_network(case, config, batch, h, w, t):
    x, eps = images(1, batch, config['channels'], h, w), images(2, batch, config['channels'], h, w)
    steps = torch.tensor(t)
    out, grads = forward_backward(config, torch.float64, x, steps, eps)
    out32, grads32 = forward_backward(config, torch.float32, x, steps, eps)
    embedding = nets.sincos(steps, config['temb'])
    tensors.update({f'{case}/x': x, f'{case}/eps': eps, f'{case}/embedding': embedding})
    tensors.update({f'{case}/{k}': v for k, v in out.items()})
    shapes = {k: list(v.shape) for k, v in grads.items()}
    meta[case] = {'config': config, 'batch': batch, 'height': h, 'width': w, 't': t,
                  'parameters': sum(v.numel() for v in grads.values()), 'names': list(shapes),
                  'shapes': list(shapes.values())}
    errors = {k: relative(grads32[k], v) for k, v in grads.items()}
    worst = max(errors, key=errors.get)
    whole = relative(torch.cat([v.reshape(-1) for v in grads32.values()]),
                     torch.cat([v.reshape(-1) for v in grads.values()]))
    print(f'{case}: {meta[case]["parameters"]:,} parameters in {len(grads)} tensors, loss {out["loss"].item():.9g}')
    print(f'  f32 error: y max {(out32["y"] - out["y"]).abs().max().item():.2g} of {out["y"].abs().max().item():.3g}, '
          f'loss relative {relative(out32["loss"], out["loss"]):.2g}, all gradients relative {whole:.2g}, '
          f'worst tensor {errors[worst]:.2g} ({worst})')
    return grads


def adam20():
    config = DEFAULT
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    signal = torch.from_numpy(np.sqrt(abar).astype(np.float32))
    noise = torch.from_numpy(np.sqrt(1 - abar).astype(np.float32))
    finals, starts, losses, ts = {}, {}, {}, []
    for dtype in (torch.float32, torch.float64):
        net = set_weights(nets.AttentionUnet(**config)).to(dtype)
        starts[dtype] = [p.detach().clone() for p in net.parameters()]
        opt = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
        losses[dtype], ts = [], []
        for k in range(20):
            x0 = (images(1000 + k, 2, 1, 28, 28) * 0.5).clamp(-1, 1)
            eps = images(2000 + k, 2, 1, 28, 28)
            words = [int(philox.philox(SEED, 0, i, 3000 + k, philox.TEST)[0]) for i in range(2)]
            t = torch.tensor([w * 1000 >> 32 for w in words])
            x_t = signal[t][:, None, None, None] * x0 + noise[t][:, None, None, None] * eps
            opt.zero_grad()
            loss = torch.nn.functional.mse_loss(net(x_t.to(dtype), t), eps.to(dtype))
            loss.backward()
            opt.step()
            losses[dtype].append(loss.item())
            ts.append(t.tolist())
        finals[dtype] = [p.detach() for p in net.parameters()]
    for dtype, tag in ((torch.float32, 'f32'), (torch.float64, 'f64')):
        tensors[f'adam20/loss_{tag}'] = torch.tensor(losses[dtype], dtype=torch.float64)
        tensors[f'adam20/norm_{tag}'] = norms(finals[dtype])
        tensors[f'adam20/update_norm_{tag}'] = norms(b - a for a, b in zip(starts[dtype], finals[dtype]))
        tensors[f'adam20/samples_{tag}'] = torch.stack([samples(p) for p in finals[dtype]])
    meta['adam20'] = {'config': config, 'batch': 2, 'steps': 20, 'lr': 1e-4, 'betas': (0.9, 0.999), 'eps': 1e-8,
                      't': ts}
    l32, l64 = np.array(losses[torch.float32]), np.array(losses[torch.float64])
    print(f'adam20: losses {l64[0]:.6g} to {l64[-1]:.6g}; f32 relative error of a loss at most '
          f'{np.max(np.abs(l32 / l64 - 1)):.2g} (first step {abs(l32[0] / l64[0] - 1):.2g})')
    seen = [i for i, k in enumerate(net.state_dict()) if 'in_proj_bias' not in k]
    apart, update = (torch.cat([(b[i].double() - a[i].double()).reshape(-1) for i in seen])
                     for a, b in ((finals[torch.float32], finals[torch.float64]),
                                  (starts[torch.float64], finals[torch.float64])))
    ratio = tensors['adam20/update_norm_f32'] / tensors['adam20/update_norm_f64'] - 1
    print(f'  parameters but in_proj_bias: f32 from f64 {(apart.norm() / update.norm()).item():.2g} of the update (L2), '
          f'largest {apart.abs().max().item():.2g}; '
          f'norm of a tensor\'s update at most {ratio[seen].abs().max().item():.2g}')


tensors.update({f'tiny/grad/{k}': v for k, v in whole_network('tiny', TINY, 2, 12, 8, [1, 742]).items()})
grads = whole_network('default', DEFAULT, 2, 28, 28, [17, 999])
tensors['default/grad_norm'] = norms(grads.values())
tensors['default/grad_samples'] = torch.stack([samples(g) for g in grads.values()])
adam20()

HERE.mkdir(parents=True, exist_ok=True)
out = HERE / 'attention.safetensors'
save_file({k: v.to(torch.float32).contiguous() for k, v in tensors.items()}, out, metadata={'golden': json.dumps(meta)})
names = HERE / 'attention_names.txt'
names.write_text(''.join(f'{k}: {"x".join(map(str, v.shape))}\n' for k, v in grads.items()))
print(f'{out}: {len(tensors)} tensors, {out.stat().st_size:,} bytes; {names}: {names.stat().st_size:,} bytes')
