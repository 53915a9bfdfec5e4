"""The coefficients of `vector::normal` in crates/kernels: a polynomial p with Phi(-z) = e^(-z^2 / 2) p(1 / (1 + 0.35 z)).

    python normal_cdf.py          # needs numpy and mpmath

Least squares in the relative error at Chebyshev points of z in [0, 14], weights raised where the error is large until
all its peaks are about the same (Lawson's iteration). Prints the coefficients of t^1 ... t^9 and the largest error.
"""
import mpmath as mp
import numpy as np

mp.mp.dps = 40
A, DEGREE, POINTS = 0.35, 9, 600
t_min = 1 / (1 + A * 14.0)
t = (1 + t_min) / 2 + (1 - t_min) / 2 * np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
z = (1 / t - 1) / A
wanted = np.array([float(mp.erfc(mp.mpf(v) / mp.sqrt(2)) / 2 * mp.exp(mp.mpf(v) ** 2 / 2)) for v in z])
terms = np.stack([t ** i for i in range(1, DEGREE + 1)], 1) / wanted[:, None]
weights = np.ones(POINTS)
for _ in range(60):
    c, *_ = np.linalg.lstsq(terms * np.sqrt(weights)[:, None], np.sqrt(weights), rcond=None)
    error = np.abs(terms @ c - 1)
    weights *= error / error.max() + 1e-3
    weights /= weights.sum()
print(*(f'{v:.10g}' for v in c), sep='\n')
print(f'largest relative error {error.max():.2e}')
