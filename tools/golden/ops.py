"""Golden numbers of the engine's operators: writes crates/engine-cpu/tests/golden/ops.safetensors.

    python ops.py

Everything is computed by PyTorch in f64 from inputs that f32 represents, and rounded to f32 once at the end, so the
numbers are exact to half an ulp; PyTorch's layouts (NCHW, OIHW; transposed convolutions IOHW). All tensors are F32
and named CASE/TENSOR. The file's only metadata key, `cases`, is a JSON list of {"name", "op", parameters...}.
Inputs and output gradients are normals(SEED, TEST, 0, index) of philox.py, `index` counting them through the file.
README.md lists the tensors and the parameters of each op.
"""
import json
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import nets
import philox

SEED = 2026
OUT = pathlib.Path(__file__).resolve().parents[2] / 'crates/engine-cpu/tests/golden/ops.safetensors'
torch.set_num_threads(1)

cases, tensors, drawn = [], {}, 0


def draw(*shape, scale=1.0, shift=0.0):
    """Normals as an f64 leaf whose values f32 represents."""
    global drawn
    z = philox.normals(SEED, philox.TEST, 0, drawn, math.prod(shape)).astype(np.float64) * scale + shift
    drawn += 1
    return torch.from_numpy(z.astype(np.float32).astype(np.float64).reshape(shape)).requires_grad_()


def case(name, op, inputs, function, params=None, grads=True, output='y'):
    """Records one case: the inputs, `output` = function(**inputs), `d{output}`, and the gradient of every input."""
    assert name not in {c['name'] for c in cases}, name
    cases.append({'name': name, 'op': op, **(params or {})})
    result = function(**inputs)
    record = {**inputs, output: result}
    if grads:
        # A scalar (a mean loss) has the gradient 1, which needs no tensor.
        seed = draw(*result.shape) if result.ndim else torch.ones_like(result)
        if result.ndim:
            record['d' + output] = seed
        result.backward(seed.detach())
        record |= {'d' + k: v.grad for k, v in inputs.items() if v.requires_grad}
    for k, v in record.items():
        assert torch.isfinite(v).all(), (name, k)
        tensors[f'{name}/{k}'] = v.detach().to(torch.float32).contiguous()


# --- Convolutions: batch, cin, cout, (h, w), (kh, kw), stride, padding, bias ----------------------
for b, cin, cout, size, kernel, stride, padding, bias in [
    (1, 1, 3, (7, 5), (3, 3), (1, 1), (1, 1), True),
    (2, 5, 1, (6, 9), (3, 3), (1, 1), (1, 1), True),
    (3, 5, 3, (4, 7), (3, 3), (1, 1), (1, 1), False),
    (1, 16, 16, (9, 11), (3, 3), (1, 1), (1, 1), True),
    (2, 24, 40, (5, 6), (3, 3), (1, 1), (1, 1), True),
    (1, 40, 24, (1, 1), (3, 3), (1, 1), (1, 1), True),
    (1, 16, 3, (17, 3), (3, 3), (1, 1), (1, 1), True),
    (2, 5, 24, (3, 7), (1, 1), (1, 1), (0, 0), True),
    (1, 24, 16, (5, 5), (1, 1), (1, 1), (0, 0), True),
    (3, 1, 1, (2, 9), (1, 1), (1, 1), (0, 0), True),
    (1, 16, 5, (7, 6), (1, 1), (2, 2), (0, 0), True),
    (2, 5, 5, (8, 6), (4, 4), (2, 2), (1, 1), True),
    (1, 16, 16, (7, 10), (4, 4), (2, 2), (1, 1), True),
    (1, 3, 5, (9, 7), (5, 3), (2, 1), (2, 0), True),
    (2, 16, 8, (6, 5), (5, 3), (2, 1), (2, 0), True),
    (2, 5, 3, (7, 6), (3, 3), (2, 2), (1, 1), True),
    (1, 16, 16, (8, 9), (3, 3), (2, 2), (1, 1), True),
    (2, 5, 3, (7, 6), (3, 3), (2, 2), (0, 0), True),
    (1, 16, 24, (9, 8), (3, 3), (2, 2), (0, 0), True),
]:
    name = (f'conv2d_b{b}_{cin}to{cout}_{size[0]}x{size[1]}_k{kernel[0]}x{kernel[1]}'
            f'_s{stride[0]}x{stride[1]}_p{padding[0]}x{padding[1]}' + ('' if bias else '_nobias'))
    inputs = {'x': draw(b, cin, *size), 'weight': draw(cout, cin, *kernel)}
    if bias:
        inputs['bias'] = draw(cout)
    case(name, 'conv2d', inputs,
         lambda x, weight, bias=None: F.conv2d(x, weight, bias, stride=stride, padding=padding),
         {'kernel': kernel, 'stride': stride, 'padding': padding, 'bias': bias})

for b, cin, cout, size, k, s, p, bias in [
    (2, 5, 3, (3, 4), 4, 2, 1, True),
    (1, 16, 16, (5, 3), 4, 2, 1, True),
    (1, 24, 8, (4, 1), 4, 2, 1, True),
    (2, 5, 3, (5, 4), 3, 1, 1, True),
    (1, 16, 24, (3, 7), 3, 1, 1, True),
    (3, 5, 3, (3, 2), 2, 2, 0, True),
    (1, 16, 16, (4, 5), 2, 2, 0, False),
    (2, 5, 3, (3, 4), 3, 2, 1, True),
    (1, 16, 8, (5, 6), 3, 2, 1, True),
]:
    name = f'conv_transpose2d_b{b}_{cin}to{cout}_{size[0]}x{size[1]}_k{k}_s{s}_p{p}' + ('' if bias else '_nobias')
    inputs = {'x': draw(b, cin, *size), 'weight': draw(cin, cout, k, k)}
    if bias:
        inputs['bias'] = draw(cout)
    case(name, 'conv_transpose2d', inputs,
         lambda x, weight, bias=None: F.conv_transpose2d(x, weight, bias, stride=s, padding=p),
         {'kernel': (k, k), 'stride': (s, s), 'padding': (p, p), 'output_padding': (0, 0), 'bias': bias})

# --- Linear, normalization, activation ------------------------------------------------------------
for rows, cin, cout, bias in [
    (1, 1, 1, True), (3, 5, 7, True), (2, 32, 24, True), (17, 16, 48, True), (9, 33, 40, False),
]:
    inputs = {'x': draw(rows, cin), 'weight': draw(cout, cin)}
    if bias:
        inputs['bias'] = draw(cout)
    case(f'linear_{rows}_{cin}to{cout}' + ('' if bias else '_nobias'), 'linear', inputs,
         lambda x, weight, bias=None: F.linear(x, weight, bias), {'bias': bias})

for b, c, size, groups, shift in [
    (1, 5, (3, 7), 1, 0), (2, 16, (5, 3), 1, 0), (2, 8, (3, 3), 8, 0), (2, 16, (7, 5), 8, 0), (3, 24, (2, 5), 8, 0),
    (1, 40, (9, 3), 8, 0), (1, 16, (1, 1), 8, 0), (1, 16, (6, 7), 8, 30),
]:
    for op, after in [('group_norm', lambda y: y), ('group_norm_silu', F.silu)]:
        name = f'{op}_b{b}_c{c}_{size[0]}x{size[1]}_g{groups}' + (f'_mean{shift}' if shift else '')
        case(name, op, {'x': draw(b, c, *size, shift=shift), 'weight': draw(c), 'bias': draw(c)},
             lambda x, weight, bias: after(F.group_norm(x, groups, weight, bias, eps=1e-5)),
             {'groups': groups, 'eps': 1e-5})

case('silu_3x67', 'silu', {'x': draw(3, 67, scale=4)}, lambda x: F.silu(x))
extremes = [0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 1.0, -1.0, 10.0, -10.0, 20.0, -20.0, 80.0, -80.0, 87.0, -87.0, 100.0,
            -100.0, 1000.0, -1000.0]
case('silu_extremes', 'silu', {'x': torch.tensor(extremes).to(torch.float64).requires_grad_()}, lambda x: F.silu(x))

# --- Attention: batch, heads, head width, tokens, factor on qkv -----------------------------------
for b, heads, d, n, factor in [
    (3, 1, 4, 9, 1), (2, 4, 4, 9, 1), (2, 4, 5, 9, 1), (1, 4, 5, 49, 1), (1, 4, 8, 49, 1), (2, 1, 16, 9, 1),
    (1, 4, 16, 49, 1), (1, 1, 33, 130, 1), (1, 4, 4, 130, 1), (1, 4, 33, 9, 1), (1, 1, 8, 1, 1),
    (1, 4, 8, 49, 8), (1, 1, 16, 130, 8),
]:
    def attend(qkv):
        q, k, v = (p.reshape(b, n, heads, d).transpose(1, 2) for p in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(2, 3) / math.sqrt(d)).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).reshape(b, n, heads * d)

    name = f'mha_b{b}_h{heads}_d{d}_n{n}' + (f'_times{factor}' if factor != 1 else '')
    case(name, 'mha', {'qkv': draw(b, n, 3 * heads * d, scale=factor)}, attend,
         {'heads': heads, 'head_dim': d, 'scale': 1 / math.sqrt(d)}, output='o')

# --- Joining --------------------------------------------------------------------------------------
for b, c1, c2, size in [(1, 3, 5, (3, 4)), (2, 16, 16, (5, 3)), (3, 1, 24, (2, 5))]:
    case(f'concat_b{b}_{c1}and{c2}_{size[0]}x{size[1]}', 'concat', {'a': draw(b, c1, *size), 'b': draw(b, c2, *size)},
         lambda a, b: torch.cat([a, b], dim=1))
case('add_2x5x3x7', 'add', {'a': draw(2, 5, 3, 7), 'b': draw(2, 5, 3, 7)}, lambda a, b: a + b)
for b, c, size in [(1, 3, (4, 5)), (2, 16, (5, 3)), (3, 5, (1, 7))]:
    case(f'add_channels_b{b}_c{c}_{size[0]}x{size[1]}', 'add_channels', {'x': draw(b, c, *size), 'b': draw(b, c)},
         lambda x, b: x + b[:, :, None, None])

# --- Diffusion ------------------------------------------------------------------------------------
for dim in (32, 128):
    t = [0, 1, 17, 999]

    def embed(t):
        arg = t[:, None] / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
        return torch.cat([arg.sin(), arg.cos()], dim=-1)

    case(f'sincos_{dim}', 'sincos', {'t': torch.tensor(t, dtype=torch.float64)}, embed, {'dim': dim, 't': t},
         grads=False)
    # What the tutorial computes in f32: up to 2.8e-5 off at t = 999, where t / frequency is large.
    tensors[f'sincos_{dim}/y_reference_f32'] = nets.sincos(torch.tensor(t), dim)

for shape in [(1, 1, 3, 5), (3, 3, 7, 5)]:
    case('mse_' + 'x'.join(map(str, shape)), 'mse', {'x': draw(*shape), 'target': draw(*shape)},
         lambda x, target: F.mse_loss(x, target), {'reduction': 'mean'}, output='loss')

for t, shape in [([0, 999], (2, 3, 5, 4)), ([1, 17, 500], (3, 1, 3, 7))]:
    def q_sample(x0, eps):
        abar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t][:, None, None, None]
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    case('q_sample_' + 'x'.join(map(str, shape)), 'q_sample', {'x0': draw(*shape), 'eps': draw(*shape)}, q_sample,
         {'t': t, 'timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02}, grads=False, output='x_t')

for op, function, params in [
    ('l1', F.l1_loss, {}),
    ('huber', lambda x, target: F.huber_loss(x, target, delta=0.5), {'delta': 0.5}),
    ('huber', lambda x, target: F.huber_loss(x, target, delta=2.0), {'delta': 2.0}),
]:
    name = op + (f'_{params["delta"]}' if params else '') + '_3x2x7x5'
    case(name, op, {'x': draw(3, 2, 7, 5), 'target': draw(3, 2, 7, 5)}, lambda x, target: function(x, target),
         {'reduction': 'mean', **params}, output='loss')

# --- The tutorials' other operations --------------------------------------------------------------
for act, function in [('relu', F.relu), ('gelu', F.gelu), ('mish', F.mish)]:
    case(f'{act}_3x67', act, {'x': draw(3, 67, scale=4)}, lambda x: function(x))
for b, c, size in [(2, 5, (3, 4)), (3, 16, (7, 5)), (2, 33, (1, 2))]:
    case(f'batch_norm_b{b}_c{c}_{size[0]}x{size[1]}', 'batch_norm',
         {'x': draw(b, c, *size, shift=2), 'weight': draw(c), 'bias': draw(c)},
         lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5), {'eps': 1e-5})
for b, c, size in [(2, 5, (3, 4)), (1, 64, (7, 5)), (2, 33, (2, 2))]:
    case(f'layer_norm_b{b}_c{c}_{size[0]}x{size[1]}', 'layer_norm',
         {'x': draw(b, c, *size, shift=2), 'weight': draw(c), 'bias': draw(c)},
         lambda x, weight, bias: F.layer_norm(x.permute(0, 2, 3, 1), [c], weight, bias, 1e-5).permute(0, 3, 1, 2),
         {'eps': 1e-5})
for op, function in [
    ('max_pool', lambda x: F.max_pool2d(x, 2)),
    ('avg_pool', lambda x: F.avg_pool2d(x, 2)),
    ('nearest', lambda x: F.interpolate(x, scale_factor=2, mode='nearest')),
    ('bilinear', lambda x: F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True)),
]:
    for b, c, size in [(2, 5, (4, 6)), (1, 16, (5, 7)), (2, 17, (2, 3))]:
        case(f'{op}_b{b}_c{c}_{size[0]}x{size[1]}', op, {'x': draw(b, c, *size)}, function)
for b, cin, cout, size in [(2, 5, 3, (6, 8)), (1, 16, 16, (7, 4))]:
    case(f'conv2d_pad_after_b{b}_{cin}to{cout}_{size[0]}x{size[1]}', 'conv2d_pad_after',
         {'x': draw(b, cin, *size), 'weight': draw(cout, cin, 3, 3), 'bias': draw(cout)},
         lambda x, weight, bias: F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2))
for b, c, size in [(2, 5, (3, 4)), (3, 16, (1, 5))]:
    case(f'scale_channels_b{b}_c{c}_{size[0]}x{size[1]}', 'scale_channels', {'x': draw(b, c, *size), 'b': draw(b, c)},
         lambda x, b: x * (1 + b[:, :, None, None]))

# --- The bound with a learned variance ------------------------------------------------------------
def variational_bound(output, v, x_0, x_t, t, steps, first, last, scale):
    """scale * mean of L_t in bits, noise being predicted; only v has a gradient (Nichol, Dhariwal 2021, their program's
    `_vb_terms_bpd` with the exact normal distribution for its approximation)."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    tilde = betas * (1 - before) / (1 - bar)
    tilde[0] = tilde[1]
    at = lambda table: table[t][:, None, None, None]
    nothing = 0 * (output.sum() + x_0.sum() + x_t.sum())  # their gradients are 0
    x_0, x_t, eps = x_0.detach(), x_t.detach(), output.detach()
    expected = (x_t - (1 - at(bar)).sqrt() * eps) / at(bar).sqrt()
    mean = lambda x: at(before.sqrt() * betas / (1 - bar)) * x + at((1 - betas).sqrt() * (1 - before) / (1 - bar)) * x_t
    part = (v + 1) / 2
    log_variance = part * at(betas.log()) + (1 - part) * at(tilde.log())
    difference = mean(x_0) - mean(expected)
    kl = 0.5 * (-1 + log_variance - at(tilde.log()) + (at(tilde.log()) - log_variance).exp()
                + difference ** 2 * (-log_variance).exp())
    # Mirrored where the level lies above the mean: shares near 1 have no digits for the rest.
    sign = torch.where(x_0 > expected, -1.0, 1.0)
    x, m, inverse = sign * x_0, sign * expected, (-0.5 * log_variance).exp()
    below = lambda z: 0.5 * torch.special.erfc(-z / math.sqrt(2))
    to = torch.where(x > 0.999, 1.0, below((x - m + 1 / 255) * inverse))
    since = torch.where(x < -0.999, 0.0, below((x - m - 1 / 255) * inverse))
    decoder = -(to - since).clamp(min=1e-12).log()
    first_step = torch.tensor([i == 0 for i in t])[:, None, None, None]
    return scale * torch.where(first_step, decoder, kl).mean() / math.log(2) + nothing


for t, shape in [([0, 1, 7, 0], (4, 3, 5, 2)), ([9, 0, 3], (3, 1, 3, 4))]:
    params = {'t': t, 'steps': 10, 'first': 1e-2, 'last': 0.3, 'scale': 0.7}
    case('variational_bound_' + 'x'.join(map(str, shape)), 'variational_bound',
         {'output': draw(*shape), 'v': draw(*shape), 'x_0': draw(*shape, scale=0.6), 'x_t': draw(*shape)},
         lambda **inputs: variational_bound(**inputs, **params), params, output='loss')

OUT.parent.mkdir(parents=True, exist_ok=True)
save_file(tensors, OUT, metadata={'cases': json.dumps(cases)})
print(f'{OUT}: {len(cases)} cases, {len(tensors)} tensors, {OUT.stat().st_size:,} bytes')
