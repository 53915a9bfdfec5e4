"""Golden checkpoints of PyTorch and diffusers: writes crates/ddpm/tests/golden/interop and fuzz/seeds.

    python interop.py

Tiny networks with random weights, saved as people save them; `expected.safetensors` has for each CASE the input CASE/x,
the timesteps CASE/t, with classes CASE/label, and PyTorch's output CASE/y. `tensors.pth` and `tensors-legacy.pth` hold
tensors of every kind of number and every kind of view, `tensors.safetensors` the same as dense f32; `tensors-protocol-*`
are by Python's other pickle protocols. `evil-*.pth` would run a program where they are loaded by Python. `kinds` is made by
`interop_kinds.py`.
"""
import json
import pathlib
import pickle
import shutil

import diffusers
import torch
from safetensors.torch import save_file

import interop_kinds
import nets

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT, SEEDS = ROOT / 'crates/ddpm/tests/golden/interop', ROOT / 'fuzz/seeds'
torch.set_grad_enabled(False)
torch.manual_seed(2026)
expected = {}

D, A, U, V = 'DownBlock2D', 'AttnDownBlock2D', 'UpBlock2D', 'AttnUpBlock2D'
TINY = dict(sample_size=8, block_out_channels=(8, 16), down_block_types=(D, A), up_block_types=(V, U), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=4)
PIPELINES = {
    # As google/ddpm-cifar10-32, with the attention names and the file of its time.
    'classic': (dict(TINY, act_fn='silu', attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
                     norm_eps=1e-6), dict(variance_type='fixed_large')),
    # As diffusers' training example, with everything else at its default.
    'example': (TINY, {}),
    'classes': (dict(TINY, num_class_embeds=5, in_channels=1, out_channels=1), dict(beta_schedule='squaredcos_cap_v2')),
    'options': (dict(TINY, act_fn='mish', resnet_time_scale_shift='scale_shift', downsample_type='resnet',
                     upsample_type='resnet', center_input_sample=True, mid_block_scale_factor=2.0, dropout=0.1),
                dict(num_train_timesteps=500, beta_schedule='sigmoid', clip_sample=False)),
}


def randomise(net):
    for name, p in net.named_parameters():
        if p.dim() == 1:
            p.copy_(torch.randn(p.shape) * 0.1 + (1 if name.endswith('weight') else 0))
    for name, b in net.named_buffers():
        if name.endswith('running_mean'):
            b.copy_(torch.randn(b.shape) * 0.1)
        elif name.endswith('running_var'):
            b.copy_(torch.rand(b.shape) + 0.5)
        elif name.endswith('num_batches_tracked'):
            b.fill_(1234)
    return net.eval()


def expect(case, net, channels, side, classes=None):
    x, t = torch.randn(2, channels, side, side), torch.tensor([3, 721])
    expected[f'{case}/x'], expected[f'{case}/t'] = x, t.float()
    kwargs = {}
    if classes:
        kwargs['class_labels'] = torch.tensor([1, classes - 1])
        expected[f'{case}/label'] = kwargs['class_labels'].float()
    y = net(x, t, **kwargs)
    expected[f'{case}/y'] = getattr(y, 'sample', y).contiguous()


def attention():
    return randomise(nets.AttentionUnet(1, (8, 16), (16, 16, 8), (True,), 8, (1, 1, 1), 2))


def simple():
    return randomise(nets.SimpleUnet(3, (4, 8, 12), 8))


shutil.rmtree(OUT, ignore_errors=True)
shutil.rmtree(SEEDS, ignore_errors=True)
for folder in 'pth', 'legacy', 'safetensors', 'config':
    (SEEDS / folder).mkdir(parents=True)
OUT.mkdir(parents=True)

net = attention()
torch.save(net.state_dict(), OUT / 'attention.pth')
torch.save(net.state_dict(), OUT / 'attention-legacy.pth', _use_new_zipfile_serialization=False)
torch.save({'state_dict': {'module.' + k: v.half() for k, v in net.state_dict().items()}, 'epoch': 7, 'lr': 1e-4,
            'size': torch.Size([8, 8]), 'device': torch.device('cpu'), 'done': None, 'tags': {'a', 'b'}},
           OUT / 'attention-half.ckpt')
expect('attention', net, 1, 8)
half = attention()
half.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})
expect('attention-half', half.eval(), 1, 8)
raw, ema = simple(), simple()
adam = torch.optim.Adam(raw.parameters(), lr=0.0)
for p in raw.parameters():
    p.grad = torch.ones_like(p)
adam.step()
torch.save({'model': raw.state_dict(), 'ema': ema.state_dict(), 'optimizer': adam.state_dict()}, OUT / 'simple.ckpt')
expect('simple', raw, 3, 8)
expect('simple-ema', ema, 3, 8)

for name, (settings, scheduler) in PIPELINES.items():
    net = randomise(diffusers.UNet2DModel(**settings))
    old = name == 'classic'
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**scheduler)).save_pretrained(OUT / name, safe_serialization=not old)
    if old:
        file = OUT / name / 'unet/diffusion_pytorch_model.bin'
        sd = torch.load(file, weights_only=True)
        for new, was in ('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn'):
            sd = {k.replace(f'.{new}.', f'.{was}.'): v for k, v in sd.items()}
        torch.save(sd, file, _use_new_zipfile_serialization=False)
    expect(name, net, net.config.in_channels, 8, net.config.num_class_embeds)
save_file(expected, OUT / 'expected.safetensors')

# Views and kinds of numbers. f64 and i64 have values that f32 has too.
whole = torch.arange(24, dtype=torch.float32) / 7
tensors = {
    'dense': whole.clone().reshape(2, 3, 4),
    'transposed': whole.reshape(4, 6).t(),
    'permuted': whole.reshape(2, 3, 4).permute(2, 0, 1),
    'strided': whole[1::3],
    'offset': whole[5:17].reshape(3, 4),
    'expanded': whole[:3].reshape(3, 1).expand(3, 5),
    'channels_last': torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    'scalar': torch.tensor(2.5),
    'empty': torch.zeros(0, 3),
    'f64': torch.tensor([0.5, -1.25, 1e30], dtype=torch.float64),
    'f16': (whole[:5]).half(),
    'bf16': (whole[5:12]).bfloat16(),
    'i64': torch.tensor([1, -2, 1 << 40]),
    'i32': torch.tensor([[3], [-4]], dtype=torch.int32),
    'i16': torch.tensor([5, -6], dtype=torch.int16),
    'i8': torch.tensor([7, -8], dtype=torch.int8),
    'u8': torch.tensor([9, 250], dtype=torch.uint8),
    'bool': torch.tensor([True, False]),
    'parameter': torch.nn.Parameter(whole[2:4]),
}
torch.save(tensors, OUT / 'tensors.pth')
torch.save(tensors, OUT / 'tensors-legacy.pth', _use_new_zipfile_serialization=False)
for protocol in 3, 4, 5:
    torch.save(tensors, OUT / f'tensors-protocol-{protocol}.pth', pickle_protocol=protocol)
save_file({k: v.detach().float().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
          OUT / 'tensors.safetensors')


class Evil:
    def __reduce__(self):
        import os
        return os.system, ('echo this must never be seen',)


class Cell:
    def __reduce__(self):
        return eval, ('1 + 1',)


torch.save({'model': {'weight': torch.ones(3)}, 'config': Evil()}, OUT / 'evil-zip.pth')
torch.save({'config': Cell()}, OUT / 'evil-legacy.pth', _use_new_zipfile_serialization=False)
(OUT / 'evil-plain.pth').write_bytes(b'cos\nsystem\n(S\'echo this must never be seen\'\ntR.')
(OUT / 'evil-protocol-4.pth').write_bytes(pickle.dumps(Evil(), protocol=4))

torch.set_grad_enabled(True)
interop_kinds.main()
torch.set_grad_enabled(False)

# Seeds are as small as they can be and still be read.
tiny = randomise(nets.AttentionUnet(1, (8, 8), (8, 8), (True,), 2, (1, 1, 1), 1))
torch.save(tiny.state_dict(), SEEDS / 'pth/attention.pth')
torch.save(tiny.state_dict(), SEEDS / 'legacy/attention.pth', _use_new_zipfile_serialization=False)
save_file(tiny.state_dict(), SEEDS / 'safetensors/attention.safetensors')
small = randomise(nets.SimpleUnet(1, (2, 4), 4))
nested = {'model': {'module.' + k: v for k, v in small.state_dict().items()}, 'epoch': 3}
torch.save(nested, SEEDS / 'pth/simple.pth')
torch.save(nested, SEEDS / 'legacy/simple.pth', _use_new_zipfile_serialization=False)
torch.save(tensors, SEEDS / 'pth/tensors.pth')
torch.save(tensors, SEEDS / 'legacy/tensors.pth', _use_new_zipfile_serialization=False)
save_file({k: v.half() for k, v in small.state_dict().items()}, SEEDS / 'safetensors/simple.safetensors')
for name in PIPELINES:
    for part, file in ('unet', 'config.json'), ('scheduler', 'scheduler_config.json'), ('.', 'model_index.json'):
        shutil.copy(OUT / name / part / file, SEEDS / f'config/{name}-{file}')
    index = json.loads((OUT / name / 'model_index.json').read_text())
    assert index['_class_name'] == 'DDPMPipeline'
for name in 'ema-pytorch.pt', 'lit-ema.ckpt', 'extras-protocol-4.pth', 'module.pt':
    shutil.copy(interop_kinds.OUT / name, SEEDS / 'pth' / name)
for name in 'extras-legacy.pth', 'shadow-params.pt':
    shutil.copy(interop_kinds.OUT / name, SEEDS / 'legacy' / name)
for path in sorted([*OUT.rglob('*'), *SEEDS.rglob('*')]):
    if path.is_file():
        print(f'{path.stat().st_size:8} {path.relative_to(ROOT)}')
