"""Golden trajectories of the samplers, by diffusers' schedulers with a denoiser that is known exactly.

Every number of an image is drawn from the same mixture of two normals, times `scale`; the best prediction of noise,
image and v at a noise level x = alpha x_0 + sigma eps is the posterior's mean, in f64 here and in the test. The start
and the noise of a step are the project's draws (`philox.py`), 2 images of 5 numbers. The schedule is linear, T = 1000,
1e-4 to 0.02; schedulers get its alpha_bar in f64 where they would compute it in f32.

Trajectories are those of x = alpha x_0 + sigma eps: what schedulers on Karras et al.'s time axis keep, x / alpha, is
scaled. A scheduler is run for every prediction that it knows; these must agree, and one is stored. Levels between two
timesteps are told to the denoiser as they are, where some schedulers round the timestep.

Clipping is every scheduler's own where it has one: `clip_sample` of DDPM, DDIM and Heun, and of the DPM solvers and UniPC
`thresholding` with `sample_max_value` 1, which divides by no more than 1. Euler's two and PNDM have none: there the denoiser
clips x_0, and the noise and v that it gives follow from the clipped one. `zero_terminal_snr` has the stretched schedule, from
whose last timestep x_0 and v are sampled.

`timesteps.json` has what `set_timesteps(n)` of DDIMScheduler gives for every n, as a checksum each.
"""
import json
import pathlib
from fractions import Fraction

import diffusers
import diffusers.schedulers as S
import numpy as np
import torch

import philox

SEED, START, NOISE = 2026, 5, 6
T, IMAGES, NUMBERS = 1000, 2, 5
MIXTURE = [(0.35, -0.6, 0.2), (0.65, 0.4, 0.1)]  # weight, mean, deviation
AGREE = 1e-5
OUT = pathlib.Path(__file__).resolve().parents[2] / 'crates/ddpm/tests/samplers/golden.json'

BETAS = np.linspace(1e-4, 0.02, T)
PLAIN = np.cumprod(1 - BETAS)
ROOT = np.sqrt(PLAIN)
STRETCHED = ((ROOT - ROOT[-1]) * (ROOT[0] / (ROOT[0] - ROOT[-1]))) ** 2
ALPHA_BAR = PLAIN


def draws(purpose, step):
    z = [philox.normals(SEED, purpose, step, i, NUMBERS).astype(np.float32) for i in range(IMAGES)]
    return torch.from_numpy(np.stack(z)).double().reshape(IMAGES, 1, 1, NUMBERS)


def level(t):
    a = ALPHA_BAR[int(t)]
    return float(np.sqrt(a)), float(np.sqrt(1 - a))


def level_of(ratio):
    return 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)


def expected(x, alpha, sigma, scale):
    """E[x_0 | x]."""
    parts, logs = [], []
    for w, m, s in MIXTURE:
        m, s = m * scale, s * scale
        v = alpha ** 2 * s ** 2 + sigma ** 2
        parts.append(m + alpha * s ** 2 / v * (x - alpha * m))
        logs.append(np.log(w) - 0.5 * np.log(v) - (x - alpha * m) ** 2 / (2 * v))
    r = torch.softmax(torch.stack(logs), 0)
    return (r * torch.stack(parts)).sum(0)


def output(kind, x, alpha, sigma, scale, clip=False):
    x0 = expected(x, alpha, sigma, scale)
    x0 = x0.clamp(-1, 1) if clip else x0
    eps = (x - alpha * x0) / sigma
    return {'epsilon': eps, 'sample': x0, 'v_prediction': alpha * eps - sigma * x0}[kind]


def told_variance(x):
    """What the denoiser says of the variance, where it does."""
    return torch.sin(3 * x)


def spaced(spacing, n):
    """Our timesteps, falling: crates/diffusion/src/sampler/spacing.rs."""
    if spacing == 'linspace':
        ts = np.linspace(0, T - 1, n).round().astype(int).tolist()
    elif spacing == 'uniform':
        ts = [i * (T // n) for i in range(n)]
    elif spacing == 'trailing':
        ts = (np.round(np.arange(T, 0, -T / n)[:n]).astype(int) - 1).tolist()[::-1]
    else:
        ts, following = [], 0
        for i in range(n):
            t = min(max(int((np.sqrt(0.8 * T) * i / (n - 1)) ** 2), following), T - n + i)
            ts.append(t)
            following = t + 1
    return ts[::-1]


def given_noise(module, n):
    """Makes a scheduler's module draw our noise: the i-th draw is that of the i-th step."""
    count = iter(range(n))
    module.randn_tensor = lambda shape, **_: draws(NOISE, n - 1 - next(count))


def module_of(scheduler):
    return __import__(type(scheduler).__module__, fromlist=['x'])


def discrete(make, kind, case):
    """Schedulers that keep x and step from timestep to timestep: DDPM and DDIM."""
    ts, n, x = spaced(case['spacing'], case['steps']), case['steps'], draws(START, 0)
    scheduler = make(kind)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(timesteps=ts) if isinstance(scheduler, S.DDPMScheduler) else scheduler.set_timesteps(n)
    if isinstance(scheduler, S.DDIMScheduler):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    states = []
    for i, t in enumerate(ts):
        y = output(kind, x, *level(t), case['scale'])
        if case.get('variance') == 'learned':
            y = torch.cat([y, told_variance(x)], dim=1)
        z = draws(NOISE, n - 1 - i)
        if isinstance(scheduler, S.DDIMScheduler):
            # It takes T // steps for the distance to the next timestep, whatever that is.
            scheduler.num_inference_steps = Fraction(T, t - (ts[i + 1] if i + 1 < n else -1))
            x = scheduler.step(y, t, x, eta=case.get('eta', 0.0), variance_noise=z,
                               use_clipped_model_output=case.get('use_clipped_model_output', False)).prev_sample
        else:
            module_of(scheduler).randn_tensor = lambda *_, **__: z
            x = scheduler.step(y, t, x).prev_sample
        states.append(x)
    return states


def by_sigma(make, kind, case):
    """Schedulers that have a list of sigmas, and step from one to the next."""
    n, spacing, edm = case['steps'], case['spacing'], case['edm']
    scheduler = make(kind)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    sigmas = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)
    names = {'karras': 'use_karras_sigmas', 'exponential': 'use_exponential_sigmas'}
    if spacing in names:
        scheduler.register_to_config(**{names[spacing]: True})
        scheduler.set_timesteps(n)
    elif spacing == 'sigma':
        scheduler.set_timesteps(sigmas=list(np.linspace(sigmas[-1], sigmas[0], n)) + [0.0])
    elif isinstance(scheduler, (S.DPMSolverMultistepScheduler, S.DPMSolverSinglestepScheduler)):
        if isinstance(scheduler, S.DPMSolverSinglestepScheduler):
            scheduler.set_timesteps(n)  # for its orders
        scheduler.set_timesteps(timesteps=spaced(spacing, n))
    else:
        scheduler.register_to_config(timestep_spacing={'uniform': 'leading'}.get(spacing, spacing))
        scheduler.set_timesteps(n)
    # Theirs are f32.
    if spacing in names or spacing == 'sigma':
        first, last = sigmas[-1], sigmas[0]
        f, back = {'karras': (lambda s: s ** (1 / 7), lambda s: s ** 7), 'exponential': (np.log, np.exp),
                   'sigma': (lambda s: s, lambda s: s)}[spacing]
        exact = back(np.linspace(f(first), f(last), n))
    else:
        exact = sigmas[spaced(spacing, n)]
    exact = np.append(exact, 0.0)
    heun = isinstance(scheduler, S.HeunDiscreteScheduler)
    if heun:
        exact = np.concatenate([exact[:1], exact[1:-1].repeat(2), exact[-1:]])
    assert len(exact) == len(scheduler.sigmas), (len(exact), len(scheduler.sigmas))
    assert np.allclose(exact, scheduler.sigmas.numpy(), rtol=2e-5), (exact, scheduler.sigmas)
    scheduler.sigmas = torch.from_numpy(exact)
    given_noise(module_of(scheduler), n)
    x = draws(START, 0) * (np.hypot(1, exact[0]) if edm else 1)
    states = []
    for i, t in enumerate(scheduler.timesteps):
        scheduler._step_index = i  # by itself it takes the timestep's, of which there may be two
        alpha, sigma = level_of(exact[i])
        y = output(kind, x * (alpha if edm else 1), alpha, sigma, case['scale'], case.get('clip_model', False))
        if edm:
            scheduler.is_scale_input_called = True
        x = scheduler.step(y, t, x).prev_sample.double()
        if not heun or scheduler.state_in_first_order or i + 1 == len(scheduler.timesteps):
            states.append(x / np.hypot(1, float(exact[i + 1])) if edm else x)
    return states


def pndm(make, kind, case):
    scheduler, n = make(kind), case['steps']
    scheduler.alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.register_to_config(timestep_spacing={'uniform': 'leading'}.get(case['spacing'], case['spacing']))
    scheduler.set_timesteps(n)
    plms = scheduler.config.skip_prk_steps
    x, states = draws(START, 0), []
    for i, t in enumerate(scheduler.timesteps):
        y = output(kind, x, *level(t), case['scale'], case.get('clip_model', False))
        x = scheduler.step(y, int(t), x).prev_sample
        # The first of PLMS is repeated with the second prediction; PRK has four predictions a step.
        if (plms and i != 0) or (not plms and (i >= 12 or i % 4 == 3)):
            states.append(x)
    return states


ALL = ['epsilon', 'sample', 'v_prediction']
COMMON = dict(num_train_timesteps=T, trained_betas=BETAS)
DPM = dict(**COMMON, final_sigmas_type='zero', lower_order_final=True)
cases = []


def add(run, make, kinds=ALL, **case):
    case = {'scale': 1.0, **case}
    runs = [run(make, kind, case) for kind in kinds]
    worst = max(float((a - b).abs().max()) for other in runs for a, b in zip(runs[0], other))
    assert worst < AGREE, f'{case}: predictions differ by {worst}'
    states, n = runs[0], case['steps']
    assert len(states) == n, (len(states), n)
    assert torch.stack(states).isfinite().all(), case
    at = sorted({0, 1, 2, 3, n // 2, n - 2, n - 1} & set(range(n)))
    states = {str(i + 1): [round(v, 9) for v in states[i].flatten().tolist()] for i in at}
    cases.append({**{k: v for k, v in case.items() if k not in ('edm', 'clip_model')}, 'states': states})
    print(f'{case}: predictions within {worst:.1e}')


def ddpm_cases():
    def make(**more):
        return lambda kind: S.DDPMScheduler(**COMMON, prediction_type=kind, **more)
    for spacing, n in [('linspace', 10), ('uniform', 7), ('trailing', 20), ('linspace', 1000)]:
        add(discrete, make(clip_sample=False), sampler='ddpm', steps=n, spacing=spacing, threshold='none')
    add(discrete, make(clip_sample=False, variance_type='fixed_large'), sampler='ddpm', steps=10, spacing='uniform',
        threshold='none', variance='large')
    add(discrete, make(clip_sample=True), sampler='ddpm', steps=10, spacing='uniform', threshold='clip', scale=2.0)
    add(discrete, make(clip_sample=False, thresholding=True, sample_max_value=1e9), sampler='ddpm', steps=10,
        spacing='uniform', threshold='dynamic', scale=2.0)
    # Down to timestep 0: from any other diffusers adds noise of a variance between 1e-20 and beta in the last step, too.
    for spacing, n in [('linspace', 10), ('uniform', 7), ('linspace', 1000)]:
        add(discrete, make(clip_sample=False, variance_type='learned_range'), sampler='ddpm', steps=n, spacing=spacing,
            threshold='none', variance='learned')


def ddim_cases():
    def make(**more):
        return lambda kind: S.DDIMScheduler(**COMMON, prediction_type=kind, **more)
    for eta in (0.0, 0.4, 1.0):
        for spacing, n in [('uniform', 10), ('trailing', 10), ('quadratic', 12), ('linspace', 7), ('uniform', 50)]:
            add(discrete, make(clip_sample=False), sampler='ddim', steps=n, spacing=spacing, threshold='none', eta=eta)
    dynamic = make(clip_sample=False, thresholding=True, sample_max_value=1e9)
    for use in (True, False):
        case = dict(sampler='ddim', scale=2.0, use_clipped_model_output=use)
        for n, spacing, eta in [(10, 'uniform', 0.0), (50, 'trailing', 0.0), (50, 'uniform', 1.0)]:
            add(discrete, make(clip_sample=True), steps=n, spacing=spacing, threshold='clip', eta=eta, **case)
        add(discrete, dynamic, steps=10, spacing='trailing', threshold='dynamic', eta=0.5, **case)


SIGMAS = ['karras', 'exponential']


def by_sigma_cases():
    def of(scheduler, **settings):
        return lambda kind: scheduler(**settings, prediction_type=kind)
    multi, single = S.DPMSolverMultistepScheduler, S.DPMSolverSinglestepScheduler
    for n in (5, 10, 20, 50):
        for spacing in SIGMAS + ['trailing', 'quadratic'] + (['linspace'] if n == 50 else []):
            # linspace in fewer steps has one that is too long to look back (sampler/dpm_solver.rs).
            case = dict(steps=n, spacing=spacing, threshold='none', edm=False)
            add(by_sigma, of(multi, **DPM), sampler='dpm++2m', **case)
            if spacing != 'quadratic':
                add(by_sigma, of(multi, **DPM, algorithm_type='sde-dpmsolver++'), sampler='dpm++2m-sde', **case)
            if spacing not in ('exponential', 'quadratic'):
                add(by_sigma, of(single, **DPM), sampler='dpm++2s', **case)
            if spacing in SIGMAS + ['trailing']:
                uni = dict(COMMON, final_sigmas_type='zero', solver_order=2, solver_type='bh2')
                add(by_sigma, of(S.UniPCMultistepScheduler, **uni), sampler='unipc', **case)
    add(by_sigma, of(single, **DPM), sampler='dpm++2s', steps=9, spacing='karras', threshold='none', edm=False)
    add(by_sigma, of(multi, **DPM, thresholding=True, sample_max_value=1e9), sampler='dpm++2m', steps=10, scale=2.0,
        spacing='karras', threshold='dynamic', edm=False)
    for n in (4, 10, 28):  # 999 is divided by n - 1: theirs lie between timesteps elsewhere
        for spacing in SIGMAS + ['linspace', 'uniform', 'trailing']:
            case = dict(steps=n, spacing=spacing, threshold='none', edm=True)
            if spacing != 'uniform' or 1000 % n == 0:
                add(by_sigma, of(S.EulerDiscreteScheduler, **COMMON), sampler='euler', **case)
                if n > 4 or spacing == 'trailing':  # other steps are too long for a second half (sampler/heun.rs)
                    add(by_sigma, of(S.HeunDiscreteScheduler, **COMMON), sampler='heun', **case)
                if spacing not in SIGMAS:
                    # It knows no prediction of the image.
                    add(by_sigma, of(S.EulerAncestralDiscreteScheduler, **COMMON), ['epsilon', 'v_prediction'],
                        sampler='euler-ancestral', **case)


def pndm_cases():
    # It takes means of whatever the network predicts, and makes noise of them: the same for noise alone.
    for skip, sampler in ((False, 'pndm'), (True, 'plms')):
        for n in (5, 10, 20, 50):
            add(pndm, lambda kind: S.PNDMScheduler(**COMMON, prediction_type=kind, skip_prk_steps=skip), ['epsilon'],
                sampler=sampler, steps=n, spacing='uniform', threshold='none')


def clipped_cases():
    """The other samplers' whole chains with clipping on, of data half of which it changes."""
    def of(scheduler, **settings):
        return lambda kind: scheduler(**settings, prediction_type=kind)
    held = dict(thresholding=True, sample_max_value=1.0)
    multi, single = S.DPMSolverMultistepScheduler, S.DPMSolverSinglestepScheduler
    uni = dict(COMMON, final_sigmas_type='zero', solver_order=2, solver_type='bh2')
    for n, spacing in [(10, 'karras'), (20, 'trailing'), (20, 'karras')]:
        case = dict(steps=n, spacing=spacing, threshold='clip', scale=2.0)
        add(by_sigma, of(multi, **DPM, **held), sampler='dpm++2m', edm=False, **case)
        add(by_sigma, of(multi, **DPM, **held, algorithm_type='sde-dpmsolver++'), sampler='dpm++2m-sde', edm=False, **case)
        add(by_sigma, of(single, **DPM, **held), sampler='dpm++2s', edm=False, **case)
        add(by_sigma, of(S.UniPCMultistepScheduler, **uni, **held), sampler='unipc', edm=False, **case)
        add(by_sigma, of(S.HeunDiscreteScheduler, **COMMON, clip_sample=True), sampler='heun', edm=True, **case)
        add(by_sigma, of(S.EulerDiscreteScheduler, **COMMON), sampler='euler', edm=True, clip_model=True, **case)
        if spacing == 'trailing':
            add(by_sigma, of(S.EulerAncestralDiscreteScheduler, **COMMON), ['epsilon', 'v_prediction'],
                sampler='euler-ancestral', edm=True, clip_model=True, **case)
    for skip, sampler in ((False, 'pndm'), (True, 'plms')):
        for n in (10, 50):
            add(pndm, lambda kind: S.PNDMScheduler(**COMMON, prediction_type=kind, skip_prk_steps=skip), ['epsilon'],
                sampler=sampler, steps=n, spacing='uniform', threshold='clip', scale=2.0, clip_model=True)


def zero_terminal_snr_cases():
    """From the timestep that leaves nothing of x_0, which the noise says nothing about."""
    global ALPHA_BAR
    ALPHA_BAR = STRETCHED
    for n, spacing in [(1, 'trailing'), (2, 'trailing'), (5, 'linspace'), (10, 'trailing')]:
        case = dict(steps=n, spacing=spacing, threshold='none', zero_terminal_snr=True)
        add(discrete, lambda kind: S.DDPMScheduler(**COMMON, prediction_type=kind, clip_sample=False), ALL[1:],
            sampler='ddpm', **case)
        for eta in (0.0, 1.0):
            add(discrete, lambda kind: S.DDIMScheduler(**COMMON, prediction_type=kind, clip_sample=False), ALL[1:],
                sampler='ddim', eta=eta, **case)
    ALPHA_BAR = PLAIN


def checksum(timesteps):
    h = 0
    for t in timesteps:
        h = (h * 1000003 + t + 1) % 2 ** 32
    return h


def all_timesteps():
    """Of every number of steps. numpy's arange makes one more of some trailing ones by a rounding, -1 at the end, which is not
    counted; and linspace in one step is timestep 0 alone, where no image begins, which the test leaves out."""
    golden = {}
    for steps in (7, 300, 1000):
        of = golden.setdefault(str(steps), {})
        for name, ours in (('linspace', 'linspace'), ('leading', 'uniform'), ('trailing', 'trailing')):
            scheduler = S.DDIMScheduler(num_train_timesteps=steps, timestep_spacing=name)
            of[ours] = []
            for n in range(1, steps + 1):
                scheduler.set_timesteps(n)
                ts = scheduler.timesteps.tolist()
                assert len(ts) == n or (len(ts) == n + 1 and ts[-1] == -1), (name, n)
                of[ours].append(checksum(ts[:n]))
    path = OUT.with_name('timesteps.json')
    path.write_text(json.dumps(golden, separators=(',', ':')).replace(',"', ',\n"') + '\n')
    print(f'{path}: {path.stat().st_size:,} bytes')


ddpm_cases()
ddim_cases()
by_sigma_cases()
pndm_cases()
clipped_cases()
zero_terminal_snr_cases()
all_timesteps()

OUT.parent.mkdir(parents=True, exist_ok=True)
golden = {'seed': SEED, 'images': IMAGES, 'numbers': NUMBERS, 'mixture': MIXTURE, 'cases': cases}
lines = ',\n'.join(json.dumps(c) for c in cases)
text = json.dumps({**golden, 'cases': []}, indent=None)[:-2] + '\n' + lines + '\n]}\n'
json.loads(text)
OUT.write_text(text)
print(f'{OUT}: {len(cases)} cases, {OUT.stat().st_size:,} bytes, diffusers {diffusers.__version__}')
