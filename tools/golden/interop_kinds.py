"""Golden checkpoints as training programs leave them: writes crates/ddpm/tests/golden/interop/kinds.

    python interop_kinds.py

All raw weights are 1 and all averaged ones 2, so that a test sees at once which half was read. `flags.pth` has views whose
flags change values and tensors with attributes, `flags.safetensors` what PyTorch says of them; `extras*.pth` have beside the
weights what training programs keep: scalars of numpy, states of random numbers, settings of every class.
"""
import argparse
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import random
import shutil
import types
import uuid

import diffusers
import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

import nets

OUT = pathlib.Path(__file__).resolve().parents[2] / 'crates/ddpm/tests/golden/interop/kinds'
D, A, U, V = 'DownBlock2D', 'AttnDownBlock2D', 'UpBlock2D', 'AttnUpBlock2D'
TINY = dict(sample_size=8, block_out_channels=(4, 8), down_block_types=(D, A), up_block_types=(V, U), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=4)


class Mode(enum.Enum):
    FAST = 1


class Bits(enum.IntFlag):
    ONE = 1


@dataclasses.dataclass
class Settings:
    lr: float = 1e-3
    folder: pathlib.Path = pathlib.PurePosixPath('x')


class Dot(dict):
    """As easydict, and Lightning's AttributeDict."""


class Holder:
    """Averages that are kept as an object, not as a state dict."""

    def __init__(self, net):
        self.decay, self.shadow = 0.999, {k: v.clone() for k, v in net.state_dict().items()}


class Tagged(torch.Tensor):
    pass


Pair = collections.namedtuple('Pair', 'a b')
for kind in Mode, Bits, Settings, Dot, Holder, Tagged, Pair:
    kind.__module__ = 'trainer'
    setattr(__import__('sys').modules.setdefault('trainer', types.ModuleType('trainer')), kind.__name__, kind)
nets.__name__ = 'nets'


@torch.no_grad()
def net(value, widths=(2, 4)):
    made = nets.SimpleUnet(1, widths, 4).eval()
    for p in made.parameters():
        p.fill_(value)
    return made


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def save(name, content, old=True, **options):
    torch.save(content, OUT / name, _use_new_zipfile_serialization=not old, **options)


def extras():
    random.seed(1)
    np.random.seed(1)
    small = np.random.RandomState(1)
    return {
        'best_loss': np.float64(0.25), 'losses': np.arange(3.0), 'epoch': np.int64(3), 'args': argparse.Namespace(lr=1e-4),
        'rng': {'python': random.getstate(), 'numpy': small.get_state()[:1] + small.get_state()[2:],
                'torch': torch.arange(16, dtype=torch.uint8), 'generator': np.random.default_rng(0)},
        'hyper_parameters': Dot(lr=1e-4, loss_fn=torch.nn.functional.mse_loss, mode=Mode.FAST, bits=Bits.ONE,
                                act=functools.partial(torch.nn.functional.silu, inplace=False), loss=torch.nn.MSELoss()),
        'folder': pathlib.PurePosixPath('a/b'), 'settings': Settings(), 'bytes': b'ab\xff', 'array': bytearray(b'\xff'),
        'complex': 1 + 2j, 'seen': collections.Counter('aab'), 'lists': collections.defaultdict(list, {'a': [1]}),
        'last': collections.deque([1, 2], maxlen=5), 'time': datetime.datetime(2024, 1, 2), 'span': datetime.timedelta(1),
        'pair': Pair(1, 2), 'slice': slice(1, 2), 'range': range(3), 'price': decimal.Decimal('1.5'),
        'id': uuid.UUID(int=5), 'class': int, 'dtype': torch.int64, 'half': torch.bfloat16, 'size': torch.Size([2, 3]),
        'device': torch.device('cpu'), 'layout': torch.strided, 'mask': torch.eye(2).to_sparse(),
        'spectrum': torch.ones(2, dtype=torch.complex64).conj(), 'codes': torch.zeros(4, dtype=torch.uint16),
        'tagged': torch.ones(2).as_subclass(Tagged), 'space': types.SimpleNamespace(a=1),
    }


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    raw, ema = net(1.0), net(2.0)
    r, e = raw.state_dict(), ema.state_dict()
    names = [n for n, _ in raw.named_parameters()]

    # ema-pytorch (denoising-diffusion-pytorch), with the network inside of a diffusion, and the same by other names.
    def nested(a, b, inner='model.', begun=True):
        return {**under(f'{a}.{inner}', r), **under(f'{b}.{inner}', e), 'initted': torch.tensor(begun), 'step': torch.tensor(7)}
    save('ema-pytorch.pt', {'step': 7, 'model': under('model.', r), 'opt': {'state': {}, 'param_groups': []},
                            'ema': nested('online_model', 'ema_model'), 'scaler': None, 'version': '1.0'}, old=False)
    save('ema-other-names.pt', {'model': r, 'ema': nested('net', 'shadow', '')})
    save('ema-not-begun.pt', {'model': r, 'ema': nested('online_model', 'ema_model', '', begun=False)})
    # PyTorch's own, under a key that says nothing.
    average = torch.optim.swa_utils.AveragedModel(raw)
    average.update_parameters(ema)
    average.module.load_state_dict(e)
    save('averaged-model.pt', {'model': r, 'second': average.state_dict()})
    # Lists: diffusers' EMAModel; score_sde and torch_ema, which keep the raw ones aside at times.
    listed = EMAModel(ema.parameters()).state_dict()
    save('shadow-params.pt', {'model': r, 'ema': listed, 'step': 7})
    aside = {'decay': 0.999, 'num_updates': 7, 'collected_params': [r[n] for n in names], 'shadow_params': [e[n] for n in names]}
    save('shadow-params-and-collected.pt', {'optimizer': {}, 'model': r, 'ema': aside})
    save('shadow-params-alone.pt', listed)
    # latent-diffusion's LitEma, whose names have no points, with what Lightning keeps.
    flat = {('model_ema.' + ('diffusion_model.' + n).replace('.', '')): e[n] for n in names}
    save('lit-ema.ckpt', {'epoch': 3, 'global_step': 7, 'pytorch-lightning_version': '2.4.0', 'state_dict': {
        'betas': torch.ones(3), **under('model.diffusion_model.', r), 'model_ema.decay': torch.tensor(0.9999),
        'model_ema.num_updates': torch.tensor(7), **flat}, 'callbacks': {}, 'hyper_parameters': Dot(lr=1e-4, mode=Mode.FAST)})
    # Which one is meant nobody can know, or it cannot be read.
    save('two-averages.pt', {'model': r, 'ema_0.99': e, 'ema_0.999': copy.deepcopy(e)})
    save('two-networks.pt', {'first': r, 'other': e})
    save('unread-averages.pt', {'model': r, 'ema': {'weights': {k.replace('.', '/'): v for k, v in e.items()}}})
    # Objects with the weights inside.
    save('object.pt', {'model': r, 'ema': Holder(ema)})
    for name, old in ('module.pt', False), ('module-legacy.pt', True):
        save(name, raw, old)
    save('module-averaged.pt', {'model': raw, 'ema': ema, 'epoch': 3}, old=False)
    # Beside the weights.
    save('extras.pth', {'model': r, **extras()}, old=False)
    save('extras-legacy.pth', {'model': r, **extras()})
    save('extras-protocol-4.pth', {'model': r, **extras()}, old=False, pickle_protocol=4)

    # In the weights.
    sparse = dict(r)
    sparse['conv0.weight'] = sparse['conv0.weight'].to_sparse()
    save('sparse.pth', sparse)
    quantized = dict(r)
    quantized['output.weight'] = torch.quantize_per_tensor(r['output.weight'], 0.1, 0, torch.qint8)
    save('quantized.pth', quantized)
    save('arrays.pth', {k: v.numpy() for k, v in r.items()})
    (OUT / 'pickled.pkl').write_bytes(pickle.dumps(r, protocol=4))
    for name, value, dtype in ('overflow', 1e300, torch.float64), ('infinite-half', 1e5, torch.float16), ('nan', float('nan'), None):
        odd = {k: v.clone().to(dtype or v.dtype) if v.is_floating_point() else v for k, v in r.items()}
        odd['output.bias'] = torch.full([1], value, dtype=torch.float64).to(dtype or torch.float32)
        save(f'{name}.pth', odd)

    # Flags and attributes.
    whole = torch.arange(1, 13, dtype=torch.float32) / 7
    flagged = whole.clone()
    flagged.note = 'as a training program marks its tensors'
    parameter = torch.nn.Parameter(whole[2:4].clone())
    parameter.note = 'the same'
    hooked = torch.nn.Parameter(whole[:2].clone())
    hooked.register_hook(torch.nn.functional.relu)
    flags = {
        'negative': torch._neg_view(whole.clone()),
        'negative-f64': torch._neg_view(whole.double()),
        'negative-half': torch._neg_view(whole.half()).reshape(3, 4).t(),
        'negative-offset': torch._neg_view(whole)[2::3],
        'negative-i32': torch._neg_view(torch.tensor([1, -2], dtype=torch.int32)),
        'conjugate-imag': torch.complex(whole, whole + 1).conj().imag,
        'attribute': flagged,
        'parameter': parameter,
        'hooked': hooked,
        'plain': whole,
    }
    save('flags.pth', flags, old=False)
    save('flags-legacy.pth', flags)
    plain = {k: v.detach().resolve_neg().float().clone(memory_format=torch.contiguous_format) for k, v in flags.items()}
    save_file(plain, OUT / 'flags.safetensors')

    # Folders of diffusers: in several files, rounded, and what its training leaves.
    unet = diffusers.UNet2DModel(**TINY)
    with torch.no_grad():
        for p in unet.parameters():
            p.fill_(1.0)
    for folder, options in {
        'shards': dict(max_shard_size='12KB'), 'shards-fp16': dict(max_shard_size='12KB', variant='fp16'),
        'shards-bin': dict(max_shard_size='12KB', safe_serialization=False),
    }.items():
        unet.save_pretrained(OUT / folder, **options)
    unet.save_pretrained(OUT / 'checkpoint-500/unet')
    with torch.no_grad():
        for p in unet.parameters():
            p.fill_(2.0)
    EMAModel(unet.parameters(), model_cls=diffusers.UNet2DModel, model_config=unet.config).save_pretrained(
        OUT / 'checkpoint-500/unet_ema')
    for path in sorted(OUT.rglob('*')):
        if path.is_file():
            print(f'{path.stat().st_size:8} {path.relative_to(OUT)}')


if __name__ == '__main__':
    main()
