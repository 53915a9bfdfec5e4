"""Golden numbers of the linear schedule and the reverse step: writes crates/ddpm/tests/golden/schedule.json.

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
"""
import json
import pathlib

import numpy as np

import philox

SEED = 2026
BETA_START, BETA_END = 1e-4, 0.02
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


golden = {
    'schedules': [entry(1000, [0, 1, 2, 10, 100, 500, 998, 999]), entry(300, [0, 1, 2, 10, 100, 299])],
    'reverse_steps': [reverse_step(k, t) for k, t in enumerate([0, 0, 1, 1, 10, 100, 500, 500, 998, 999])],
}
OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text(json.dumps(golden, indent=1) + '\n')
print(f'{OUT}: {OUT.stat().st_size:,} bytes')
for r in golden['reverse_steps']:
    print(f't {r["t"]}: {r["clipped_elements"]} of 12 clipped, x0 within {max(map(abs, r["x0"])):.3g}')
