"""Checks import and export against real PyTorch and diffusers, with random weights.

    pip install -r tools/golden/requirements.txt
    cargo build --release -p ddpm-cli && cargo build --release -p ddpm --example checkpoint_numbers
    python tools/check_interop.py [--bin target/release] [--only NAME ...] [--no-chains]

For every network and the diffusers configurations of `CONFIGS`:

1. their checkpoint -> `ddpm import` -> our output against theirs (largest difference over the largest magnitude);
2. `ddpm export` -> their load is strict, every tensor is equal to the bit, and so is that of a second import;
3. a 1000-step DDPM and a 50-step DDIM chain of diffusers' own pipeline loop with our noise, against our
   sampler's images, in [0, 1]; DDIM also with use_clipped_model_output;
4. a 20-step chain of each of diffusers' schedulers of `SCHEDULERS` with clipping on, in the same way. The three that have no
   clipping (Euler's two, PNDM) get the noise that follows from the clipped x_0.

The exit status is 1 where one is off. Nothing outside a temporary folder is written.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest.mock

import diffusers
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / 'golden'))
import nets  # noqa: E402

OUTPUT, CHAIN, STEPS = 1e-4, 1 / 255, 20

D, A, U, V = 'DownBlock2D', 'AttnDownBlock2D', 'UpBlock2D', 'AttnUpBlock2D'
# What the five classic configurations have in common.
CLASSIC = dict(act_fn='silu', attention_head_dim=None, center_input_sample=False, downsample_padding=0,
               flip_sin_to_cos=False, freq_shift=1, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-6,
               norm_num_groups=32)
WIDE = dict(CLASSIC, block_out_channels=(128, 128, 256, 256, 512, 512), down_block_types=(D, D, D, D, A, D),
            up_block_types=(U, V, U, U, U, U))
TWO = dict(block_out_channels=(32, 64), down_block_types=(D, A), up_block_types=(V, U), layers_per_block=1)
# Name: (settings, side of the images in this check, the scheduler's settings).
CONFIGS = {
    'ddpm-cifar10-32': (dict(CLASSIC, sample_size=32, block_out_channels=(128, 256, 256, 256),
                             down_block_types=(D, A, D, D), up_block_types=(U, U, V, U)), 32,
                        dict(variance_type='fixed_large')),
    'ddpm-celebahq-256': (dict(WIDE, sample_size=256), 64, dict(variance_type='fixed_small')),
    'ddpm-ema-bedroom-256': (dict(WIDE, sample_size=256), 32, dict(variance_type='fixed_small')),
    'ddpm-ema-cat-256': (dict(WIDE, sample_size=256), 32, dict(variance_type='fixed_small')),
    'ddpm-ema-church-256': (dict(WIDE, sample_size=256), 32, dict(variance_type='fixed_small')),
    'train_unconditional': (dict(sample_size=64, layers_per_block=2, block_out_channels=(128, 128, 256, 256, 512, 512),
                                 down_block_types=(D, D, D, D, A, D), up_block_types=(U, V, U, U, U, U)), 64,
                            dict(beta_schedule='linear')),
    'class-embedded': (dict(TWO, num_class_embeds=10), 32, dict(beta_schedule='squaredcos_cap_v2')),
    'heads-of-4': (dict(TWO, attention_head_dim=4), 32, {}),
    'groups-and-eps': (dict(TWO, norm_num_groups=8, norm_eps=1e-3), 32, dict(beta_schedule='scaled_linear')),
    'scale-shift': (dict(TWO, resnet_time_scale_shift='scale_shift'), 32, dict(clip_sample=False)),
    'middle': (dict(TWO, add_attention=False, mid_block_scale_factor=2.0), 32, dict(beta_schedule='sigmoid')),
    'resnet-resampling': (dict(TWO, downsample_type='resnet', upsample_type='resnet'), 32, {}),
    'mish-centred': (dict(TWO, act_fn='mish', center_input_sample=True, dropout=0.1), 32,
                     dict(num_train_timesteps=500, beta_end=0.03)),
    'gelu-grey': (dict(TWO, act_fn='gelu', in_channels=1, out_channels=1, flip_sin_to_cos=False), 28,
                  dict(rescale_betas_zero_snr=True)),
    'relu-attn-groups': (dict(TWO, act_fn='relu', attn_norm_num_groups=4, freq_shift=1), 32, {}),
    'defaults-narrow': (dict(block_out_channels=(32, 64, 96, 128)), 32, {}),
    'one-block-rgba': (dict(block_out_channels=(64,), down_block_types=(A,), up_block_types=(V,), in_channels=4,
                            out_channels=4, norm_num_groups=16), 16, {}),
}
# Networks of the tutorials: (network, how the file is written, import's flags).
TUTORIALS = {
    'attention': (lambda: nets.AttentionUnet(), 'zip', []),
    'attention-rgb': (lambda: nets.AttentionUnet(3, (16, 32, 64), (64, 64, 32), (True, False), 64, (1, 2, 1), 2), 'nested',
                      ['--heads', '2', '--size', '32']),
    'simple': (lambda: nets.SimpleUnet(), 'legacy', ['--size', '32']),
    'simple-rgb': (lambda: nets.SimpleUnet(3, (16, 32, 64), 32), 'module', ['--size', '32']),
    'double-conv': (lambda: nets.DoubleConvUnet(), 'zip', []),
    'double-conv-grey': (lambda: nets.DoubleConvUnet(1, 64), 'safetensors', []),
}

# Of the DPM solvers and UniPC, thresholding that divides by no more than 1 is clipping.
DPM = dict(final_sigmas_type='zero', thresholding=True, sample_max_value=1.0)
# Our sampler: (theirs, its settings, our spacing, whether the model must clip).
SCHEDULERS = {
    'ddpm': (diffusers.DDPMScheduler, dict(clip_sample=True, timestep_spacing='leading'), 'uniform', False),
    # Its steps are T // n long whatever the spacing, which is that of `trailing` and `leading` alone.
    'ddim': (diffusers.DDIMScheduler, dict(clip_sample=True, timestep_spacing='trailing'), 'trailing', False),
    'dpm++2m': (diffusers.DPMSolverMultistepScheduler, dict(DPM, timestep_spacing='trailing'), 'trailing', False),
    'dpm++2m-sde': (diffusers.DPMSolverMultistepScheduler,
                    dict(DPM, algorithm_type='sde-dpmsolver++', timestep_spacing='trailing'), 'trailing', False),
    'dpm++2s': (diffusers.DPMSolverSinglestepScheduler, DPM, 'trailing', False),
    'unipc': (diffusers.UniPCMultistepScheduler, dict(DPM, solver_type='bh2', timestep_spacing='trailing'), 'trailing', False),
    'heun': (diffusers.HeunDiscreteScheduler, dict(clip_sample=True, timestep_spacing='trailing'), 'trailing', False),
    'euler': (diffusers.EulerDiscreteScheduler, dict(timestep_spacing='trailing'), 'trailing', True),
    'euler-ancestral': (diffusers.EulerAncestralDiscreteScheduler, dict(timestep_spacing='trailing'), 'trailing', True),
    'pndm': (diffusers.PNDMScheduler, dict(set_alpha_to_one=True, timestep_spacing='leading'), 'uniform', True),
    'plms': (diffusers.PNDMScheduler, dict(set_alpha_to_one=True, skip_prk_steps=True, timestep_spacing='leading'),
             'uniform', True),
}

ap = argparse.ArgumentParser()
ap.add_argument('--bin', type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[1] / 'target/release')
ap.add_argument('--only', nargs='*')
ap.add_argument('--no-chains', action='store_true')
a = ap.parse_args()
a.bin = a.bin.resolve()  # programs run in another folder
work = pathlib.Path(tempfile.mkdtemp(prefix='interop-'))
failed = []
torch.set_grad_enabled(False)


def run(program, *arguments):
    done = subprocess.run([str(a.bin / program), *map(str, arguments)], capture_output=True, text=True, cwd=work)
    if done.returncode:
        sys.exit(f'{program} {arguments}: {done.stderr}')
    return done


def ddpm(*arguments):
    return run('ddpm', *arguments)


def wanted(name):
    return not a.only or name in a.only


def randomise(net, seed):
    """Weights of every size: fresh networks have biases of 0 and norms of 1, which hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.dim() == 1:
            p.copy_(torch.randn(p.shape, generator=g) * 0.1 + (1 if name.endswith('weight') else 0))
    for name, b in net.named_buffers():
        if name.endswith('running_mean'):
            b.copy_(torch.randn(b.shape, generator=g) * 0.1)
        elif name.endswith('running_var'):
            b.copy_(torch.rand(b.shape, generator=g) + 0.5)
        elif name.endswith('num_batches_tracked'):
            b.fill_(1234)
    return net.eval()


def check(name, what, value, limit):
    good = value <= limit
    print(f'{name:22} {what:34} {value:.2e}  (limit {limit:.2e})  {"" if good else "WRONG"}', flush=True)
    if not good:
        failed.append(f'{name}: {what}')


def same(name, what, one, other):
    def equal(a, b):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    equal = one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    print(f'{name:22} {what:34} {"equal to the bit" if equal else "DIFFERS"}', flush=True)
    if not equal:
        failed.append(f'{name}: {what}')


def outputs(name, net, checkpoint, channels, side, classes=None):
    """Ours against theirs."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, side, side, generator=g)
    t = torch.tensor([0.0, 357.0, 999.0])
    given = {'x': x, 't': t}
    kwargs = {}
    if classes:
        label = torch.tensor([0, 3, classes - 1])
        given['label'] = label.float()
        kwargs['class_labels'] = label
    save_file(given, work / 'in.safetensors')
    run('examples/checkpoint_numbers', 'predict', checkpoint, 'in.safetensors', 'out.safetensors')
    theirs = net(x, t.long(), **kwargs)
    theirs = getattr(theirs, 'sample', theirs)
    ours = load_file(work / 'out.safetensors')['y']
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def stepped(net):
    """The state of an Adam that has made a step."""
    adam = torch.optim.Adam(net.parameters(), lr=0.0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    return adam.state_dict()


def newest(runs):
    return runs / 'checkpoints/step-0000000'


def tutorial(name, make, how, flags):
    net = randomise(make(), 3)
    sd = net.state_dict()
    path = work / f'{name}.{"safetensors" if how == "safetensors" else "pth"}'
    if how == 'zip':
        torch.save(sd, path)
    elif how == 'legacy':
        torch.save(sd, path, _use_new_zipfile_serialization=False)
    elif how == 'module':
        torch.save({'state_dict': {'module.' + k: v for k, v in sd.items()}, 'epoch': 7, 'lr': 1e-4}, path)
    elif how == 'nested':
        raw = {k: torch.zeros_like(v) for k, v in sd.items()}
        torch.save({'model': raw, 'ema': sd, 'optimizer': stepped(net)}, path)
    else:
        save_file({k: v.contiguous() for k, v in sd.items()}, path)
    out = work / f'runs/{name}'
    ddpm('import', path, '--out', out, *flags)
    channels = {'attention': 1, 'attention-rgb': 3, 'simple': 1, 'simple-rgb': 3, 'double-conv': 3, 'double-conv-grey': 1}[name]
    side = 28 if name == 'attention' else 32
    check(name, 'import: our output', outputs(name, net, newest(out), channels, side), OUTPUT)
    for to in 'pytorch', 'safetensors':
        ddpm('export', out, '--to', to)
    back = torch.load(out / 'export/model.pth', weights_only=True)
    fresh = make()
    fresh.load_state_dict(back, strict=True)
    fresh.eval()
    same(name, 'export: .pth, loaded strictly', fresh.state_dict(), sd)
    same(name, 'export: safetensors', load_file(out / 'export/model.safetensors'), sd)
    check(name, 'export: their output', outputs(name, fresh, newest(out), channels, side), OUTPUT)
    again = work / f'runs/{name}-again'
    ddpm('import', out / 'export/model.pth', '--out', again, *flags)
    ours = [load_file(newest(r) / 'model.safetensors') for r in (out, again)]
    same(name, 'ours -> theirs -> ours', *ours)
    assert newest(out).joinpath('model.safetensors').read_bytes() == newest(again).joinpath('model.safetensors').read_bytes()


def taught(net, scheduler, steps=150):
    """The network after a short training on images of one colour with a bar. With random weights a chain without fresh
    noise is chaotic: PyTorch's own in f32 and in f64 end with other images."""
    side, channels = net.config.sample_size, net.config.in_channels
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(steps):
            x0 = (torch.rand(16, channels, 1, 1) * 1.6 - 0.8).repeat(1, 1, side, side)
            x0[torch.arange(16), :, torch.randint(side, (16,))] = 0.9
            t, eps = torch.randint(scheduler.config.num_train_timesteps, (16,)), torch.randn_like(x0)
            loss = (net(scheduler.add_noise(x0, eps, t), t).sample - eps).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    print(f'taught for {steps} steps: loss {loss.item():.3f}', flush=True)
    return net.eval()


def pipeline(name, settings, scheduler, old_names=False, teach=False):
    """A saved pipeline with random weights, or taught for a moment."""
    torch.manual_seed(len(name))
    net = diffusers.UNet2DModel(**settings)
    net = taught(net, diffusers.DDPMScheduler(**scheduler)) if teach else randomise(net, 5)
    folder = work / name
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder, safe_serialization=not old_names)
    if old_names:
        file = folder / 'unet/diffusion_pytorch_model.bin'
        sd = torch.load(file, weights_only=True)
        for new, old in ('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn'):
            sd = {k.replace(f'.{new}.', f'.{old}.'): v for k, v in sd.items()}
        torch.save(sd, file, _use_new_zipfile_serialization=False)
    return net, folder


def config(name, settings, side, scheduler):
    net, folder = pipeline(name, settings, scheduler, old_names=name in ('ddpm-cifar10-32', 'heads-of-4'))
    out = work / f'runs/{name}'
    ddpm('import', folder, '--out', out, '--size', side)
    channels, classes = net.config.in_channels, net.config.num_class_embeds
    check(name, 'import: our output', outputs(name, net, newest(out), channels, side, classes), OUTPUT)
    exported = out / 'export/diffusers'
    ddpm('export', out, '--to', 'diffusers')
    pipe = diffusers.DDPMPipeline.from_pretrained(exported)
    diffusers.DDIMPipeline.from_pretrained(exported)
    theirs, info = diffusers.UNet2DModel.from_pretrained(exported / 'unet', output_loading_info=True)
    if any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')):
        failed.append(f'{name}: not strict: {info}')
    theirs.eval()
    same(name, 'export: loaded strictly', theirs.state_dict(), net.state_dict())
    check(name, 'export: their output', outputs(name, theirs, newest(out), channels, side, classes), OUTPUT)
    plain = lambda v: list(v) if isinstance(v, tuple) else v
    for key, value in net.config.items():
        if not key.startswith('_') and key != 'sample_size' and plain(theirs.config[key]) != plain(value):
            failed.append(f'{name}: {key} was {value} and is {theirs.config[key]}')
    given = diffusers.DDPMScheduler.from_pretrained(folder, subfolder='scheduler')
    for key in 'num_train_timesteps', 'variance_type', 'clip_sample', 'rescale_betas_zero_snr':
        if given.config[key] != pipe.scheduler.config[key]:
            failed.append(f'{name}: {key} was {given.config[key]} and is {pipe.scheduler.config[key]}')
    check(name, 'export: their alphas_cumprod',
          (given.alphas_cumprod - pipe.scheduler.alphas_cumprod).abs().max().item(), 1e-6)
    again = work / f'runs/{name}-again'
    ddpm('import', exported, '--out', again)
    ours = [newest(r).joinpath('model.safetensors').read_bytes() for r in (out, again)]
    print(f'{name:22} {"ours -> theirs -> ours":34} {"equal to the bit" if ours[0] == ours[1] else "DIFFERS"}')
    if ours[0] != ours[1] or out.joinpath('config.toml').read_text() != again.joinpath('config.toml').read_text():
        failed.append(f'{name}: the round trip')
    subprocess.run(['rm', '-rf', str(folder), str(out), str(again)])


def our_chain(out, *what):
    run('examples/checkpoint_numbers', 'chain', newest(out), 'chain.safetensors', *what)
    return load_file(work / 'chain.safetensors')


def compare_chain(name, what, ours, theirs):
    image = (ours['x'] / 2 + 0.5).clamp(0, 1)
    check(name, f'{what} (deviation {theirs.std().item():.2f})', (image - theirs).abs().max().item(), CHAIN)


def chains(name, settings, scheduler):
    """The loops of DDPMPipeline and DDIMPipeline with our noise."""
    net, folder = pipeline(name, settings, scheduler, teach=True)
    out = work / f'runs/{name}'
    ddpm('import', folder, '--out', out)
    as_ddim = work / f'{name}-ddim'
    diffusers.DDIMPipeline.from_pretrained(folder).save_pretrained(as_ddim)
    out_ddim = work / f'runs/{name}-ddim'
    ddpm('import', as_ddim, '--out', out_ddim)
    for sampler, steps, kind, run, said in (('ddpm', 1000, diffusers.DDPMPipeline, out, []),
                                            ('ddim', 50, diffusers.DDIMPipeline, out_ddim, []),
                                            ('ddim', 50, diffusers.DDIMPipeline, out, ['ddim', 50, 'uniform', 'true'])):
        # What is not said is as imported, and theirs is the pipeline's default.
        ours, used = our_chain(run, *said), bool(said)
        # The pipeline as it is; only the random numbers are ours: the start first, then one for each step.
        left = iter([ours['start'], *ours['noise']])
        module = 'ddpm' if sampler == 'ddpm' else 'ddim'
        take = lambda *_, **__: next(left).clone()
        pipe = kind.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        with unittest.mock.patch(f'diffusers.pipelines.{module}.pipeline_{module}.randn_tensor', take), \
                unittest.mock.patch(f'diffusers.schedulers.scheduling_{module}.randn_tensor', take):
            more = dict(use_clipped_model_output=True) if used else {}
            theirs = pipe(batch_size=2, num_inference_steps=steps, output_type='pt').images if sampler == 'ddpm' else \
                torch.from_numpy(pipe(batch_size=2, num_inference_steps=steps, output_type='np',
                                      **more).images).permute(0, 3, 1, 2)
        compare_chain(name, f'{sampler}, {steps} steps{", clipped" if used else ""}', ours, theirs)
    if name == 'chain-fixed-small':
        for sampler in SCHEDULERS:
            schedulers(name, net, out, scheduler, sampler)


def clipped_noise(eps, y, alpha, sigma):
    """The noise beside the clipped x_0 of y = x / alpha, or of x where alpha is that of the schedule."""
    x0 = ((y - sigma * eps) / alpha).clamp(-1, 1)
    return (y - alpha * x0) / sigma


def schedulers(name, net, out, trained, sampler):
    """One of diffusers' schedulers, with our noise."""
    kind, settings, spacing, clip_model = SCHEDULERS[sampler]
    ours = our_chain(out, sampler, STEPS, spacing, *(['true'] if sampler == 'ddim' else []))
    # beta_start and beta_end of most are others than DDPMScheduler's, with which the network was taught.
    scheduler = kind(**{**dict(beta_start=1e-4, beta_end=0.02, beta_schedule='linear'), **trained, **settings})
    scheduler.set_timesteps(STEPS)
    if sampler == 'dpm++2s':
        # By itself it has no spacing but its own; its orders are set by then.
        scheduler.set_timesteps(timesteps=[999 - 50 * i for i in range(STEPS)])
    module = sys.modules[kind.__module__]
    left = iter(ours['noise'])
    x = ours['start'] * scheduler.init_noise_sigma
    edm = sampler in ('heun', 'euler', 'euler-ancestral')
    extra = dict(use_clipped_model_output=True) if sampler == 'ddim' else {}
    with unittest.mock.patch.object(module, 'randn_tensor', lambda *_, **__: next(left).clone(), create=True):
        for t in scheduler.timesteps:
            eps = net(scheduler.scale_model_input(x, t), t).sample
            if clip_model and edm:
                eps = clipped_noise(eps, x, 1.0, scheduler.sigmas[scheduler.step_index])
            elif clip_model:
                bar = scheduler.alphas_cumprod[int(t)]
                eps = clipped_noise(eps, x, bar.sqrt(), (1 - bar).sqrt())
            x = scheduler.step(eps, t, x, **extra).prev_sample
    compare_chain(name, f'{sampler}, {STEPS} steps', ours, (x / 2 + 0.5).clamp(0, 1))


diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
for name, (make, how, flags) in TUTORIALS.items():
    if wanted(name):
        tutorial(name, make, how, flags)
for name, (settings, side, scheduler) in CONFIGS.items():
    if wanted(name):
        config(name, settings, side, scheduler)
if not a.no_chains:
    narrow = dict(CONFIGS['ddpm-cifar10-32'][0], sample_size=16, block_out_channels=(32, 32, 64, 64))
    for name, settings, scheduler in (('chain-fixed-small', dict(TWO, sample_size=16), {}),
                                      ('chain-fixed-large', narrow, dict(variance_type='fixed_large')),
                                      ('chain-cosine', dict(TWO, sample_size=16), dict(beta_schedule='squaredcos_cap_v2'))):
        if wanted(name):
            chains(name, settings, scheduler)
print(json.dumps({'failed': failed}))
sys.exit(bool(failed))
