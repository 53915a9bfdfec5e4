"""Golden numbers of the schedules and the reverse step: writes crates/ddpm/tests/golden/schedule.json.

    python schedule.py

Everything in f64 by numpy, from the formulas of Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models"
(2020), with timesteps counted from 0 (their t is ours + 1) and abar_{-1} = 1:

    beta = linspace(1e-4, 0.02, T), alpha = 1 - beta, abar = cumprod(alpha)
    beta_tilde = beta (1 - abar_prev) / (1 - abar)                                          eq. 7, zero at t = 0
    mean(x_t, x0) = mean_x0 x0 + mean_xt x_t                                                eq. 7
        mean_x0 = sqrt(abar_prev) beta / (1 - abar), mean_xt = sqrt(alpha) (1 - abar_prev) / (1 - abar)
    mean(x_t, eps) = (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha)                        eq. 11
    x0(x_t, eps) = (x_t - sqrt(1 - abar) eps) / sqrt(abar)                                  eq. 15
    x_{t-1} = mean + sqrt(beta_tilde) z; no noise at t = 0

The schedules beside the linear one (`kinds`) come twice. In f64 by numpy, as other programs write them: `quad` of Ho
et al.'s program; the cosine of lucidrains' denoising-diffusion-pytorch; its sigmoid; algorithm 1 of Lin et al. 2023.
And, where it has them, from diffusers' DDPMScheduler, which computes in f32 (its cosine holds betas below 0.999,
we and the tutorials below 0.9999: the steps between are left out).
"""
import json
import pathlib

import numpy as np
from diffusers import DDPMScheduler

import philox

SEED = 2026
BETA_START, BETA_END, MAX_BETA = 1e-4, 0.02, 0.9999
OUT = pathlib.Path(__file__).resolve().parents[2] / 'crates/ddpm/tests/golden/schedule.json'


def schedule(timesteps):
    beta = np.linspace(BETA_START, BETA_END, timesteps)
    alpha = 1 - beta
    abar = np.cumprod(alpha)
    prev = np.append(1.0, abar[:-1])
    return {
        'beta': beta,
        'alpha_bar': abar,
        'sqrt_alpha_bar': np.sqrt(abar),
        'sqrt_one_minus_alpha_bar': np.sqrt(1 - abar),
        'recip_sqrt_alpha': 1 / np.sqrt(alpha),
        'recip_sqrt_alpha_bar': 1 / np.sqrt(abar),
        'recip_sqrt_alpha_bar_minus_one': np.sqrt(1 - abar) / np.sqrt(abar),
        'beta_tilde': beta * (1 - prev) / (1 - abar),
        'mean_x0': np.sqrt(prev) * beta / (1 - abar),
        'mean_xt': np.sqrt(alpha) * (1 - prev) / (1 - abar),
    }


def entry(timesteps, ts):
    s = schedule(timesteps)
    return {'timesteps': timesteps, 'beta_start': BETA_START, 'beta_end': BETA_END, 't': ts,
            **{k: v[ts].tolist() for k, v in s.items()}}


def reverse_step(index, t):
    """Twelve elements at timestep t of T = 1000. In the odd cases eps_pred is the noise that made x_t, so x0 is not far
    from [-1, 1]; in the even ones the two are independent, and x0 is far outside at large t."""
    s = {k: v[t] for k, v in schedule(1000).items()}
    x_t, eps, z = (philox.normals(SEED, philox.TEST, 0, 3 * index + j, 12).astype(np.float64) for j in range(3))
    if index % 2:
        x_t = s['sqrt_alpha_bar'] * 0.8 * z[::-1] + s['sqrt_one_minus_alpha_bar'] * eps
        x_t = x_t.astype(np.float32).astype(np.float64)
    x0 = (x_t - s['sqrt_one_minus_alpha_bar'] * eps) / s['sqrt_alpha_bar']
    noise = np.sqrt(s['beta_tilde']) * z if t else 0 * z
    mean_eps = s['recip_sqrt_alpha'] * (x_t - s['beta'] / s['sqrt_one_minus_alpha_bar'] * eps)
    mean = s['mean_x0'] * x0 + s['mean_xt'] * x_t
    clipped = s['mean_x0'] * np.clip(x0, -1, 1) + s['mean_xt'] * x_t
    assert np.allclose(mean, mean_eps, rtol=1e-11, atol=1e-11), 'eq. 7 with eq. 15 is eq. 11'
    return {'timesteps': 1000, 't': t, 'x_t': x_t.tolist(), 'eps_pred': eps.tolist(), 'z': z.tolist(), 'x0': x0.tolist(),
            'clipped_elements': int((np.abs(x0) > 1).sum()), 'x_prev_eps': (mean_eps + noise).tolist(),
            'x_prev_unclipped': (mean + noise).tolist(), 'x_prev_clipped': (clipped + noise).tolist()}


def logistic(x):
    return 1 / (1 + np.exp(-x))


def quad(timesteps):
    return np.linspace(BETA_START ** 0.5, BETA_END ** 0.5, timesteps, dtype=np.float64) ** 2


def geodiff_sigmoid(timesteps):
    return logistic(np.linspace(-6, 6, timesteps)) * (BETA_END - BETA_START) + BETA_START


def betas_of(alphas_cumprod):
    """lucidrains: both schedules end so; the clip there is 0.999."""
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, MAX_BETA)


def lucidrains_cosine(timesteps, s=0.008):
    t = np.linspace(0, timesteps, timesteps + 1, dtype=np.float64) / timesteps
    return betas_of(np.cos((t + s) / (1 + s) * np.pi * 0.5) ** 2)


def lucidrains_sigmoid(timesteps, start=-3, end=3, tau=1):
    t = np.linspace(0, timesteps, timesteps + 1, dtype=np.float64) / timesteps
    v_start, v_end = logistic(start / tau), logistic(end / tau)
    return betas_of((-logistic((t * (end - start) + start) / tau) + v_end) / (v_end - v_start))


def rescale_zero_terminal_snr(betas):
    """Lin, Liu, Li, Yang 2023, algorithm 1, as printed."""
    sqrt_abar = np.sqrt(np.cumprod(1 - betas))
    first, last = sqrt_abar[0], sqrt_abar[-1]
    abar = ((sqrt_abar - last) * first / (first - last)) ** 2
    return 1 - np.append(abar[0], abar[1:] / abar[:-1])


KINDS = {  # our name: the betas, diffusers' name
    'linear': (lambda T: np.linspace(BETA_START, BETA_END, T), 'linear'),
    'scaled-linear': (quad, 'scaled_linear'),
    'quadratic': (quad, 'scaled_linear'),
    'cosine': (lucidrains_cosine, 'squaredcos_cap_v2'),
    'sigmoid': (lucidrains_sigmoid, None),
    'sigmoid-beta': (geodiff_sigmoid, 'sigmoid'),
}


def kind(name, timesteps, zero):
    betas, theirs = KINDS[name]
    beta = betas(timesteps)
    if zero:
        beta = rescale_zero_terminal_snr(beta)
    abar = np.cumprod(1 - beta)
    with np.errstate(divide='ignore'):
        log_snr = np.log(abar) - np.log1p(-abar)
    ts = [0, 1, 2, timesteps // 10, timesteps // 3, timesteps // 2, timesteps - 10, timesteps - 3, timesteps - 2,
          timesteps - 1]
    entry = {'kind': name, 'timesteps': timesteps, 'zero_terminal_snr': zero, 't': ts, 'beta': beta[ts].tolist(),
             'alpha_bar': abar[ts].tolist(), 'log_snr': [v if np.isfinite(v) else None for v in log_snr[ts].tolist()]}
    if theirs:
        scheduler = DDPMScheduler(num_train_timesteps=timesteps, beta_start=BETA_START, beta_end=BETA_END,
                                  beta_schedule=theirs, rescale_betas_zero_snr=zero)
        theirs = scheduler.betas.numpy()
        # Its rescaled cosine is another one, as its last steps are.
        known = [not (name == 'cosine' and (zero or theirs[t] >= np.float32(0.999))) for t in ts]
        entry['diffusers_beta'] = [float(theirs[t]) if k else None for t, k in zip(ts, known)]
        worst = max([abs(b / beta[t] - 1) for t, b in zip(ts, entry['diffusers_beta']) if b is not None], default=0)
        print(f'{name}, T = {timesteps}{", zero terminal SNR" if zero else ""}: diffusers within {worst:.1e} (relative)')
    return entry


golden = {
    'kinds': [kind(k, T, zero) for k in KINDS for T in (1000, 300) for zero in (False, True)],
    'schedules': [entry(1000, [0, 1, 2, 10, 100, 500, 998, 999]), entry(300, [0, 1, 2, 10, 100, 299])],
    'reverse_steps': [reverse_step(k, t) for k, t in enumerate([0, 0, 1, 1, 10, 100, 500, 500, 998, 999])],
}
OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text(json.dumps(golden, indent=1) + '\n')
print(f'{OUT}: {OUT.stat().st_size:,} bytes')
for r in golden['reverse_steps']:
    print(f't {r["t"]}: {r["clipped_elements"]} of 12 clipped, x0 within {max(map(abs, r["x0"])):.3g}')
