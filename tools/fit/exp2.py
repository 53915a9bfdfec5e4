"""The coefficients of `vector::exp2` in crates/kernels: a polynomial p with 2^r = p(r) on [-1/2, 1/2] and p(0) = 1.

    python exp2.py [DEGREE]       # needs numpy; degree 5 if none is given

Least squares in the relative error at Chebyshev points, weights raised where the error is large until all its peaks are
about the same (Lawson's iteration). Prints the coefficients of r^1 ... and the largest error.
"""
import sys

import numpy as np

DEGREE, POINTS = int(sys.argv[1]) if len(sys.argv) > 1 else 5, 400
r = 0.5 * np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
terms = np.stack([r ** i for i in range(1, DEGREE + 1)], 1) / 2 ** r[:, None]
wanted = 1 - 2 ** -r
weights = np.ones(POINTS)
for _ in range(400):
    c, *_ = np.linalg.lstsq(terms * np.sqrt(weights)[:, None], wanted * np.sqrt(weights), rcond=None)
    error = np.abs(terms @ c - wanted)
    weights *= error / error.max() + 1e-3
    weights /= weights.sum()
print(*(f'{v:.10g}' for v in c), sep='\n')
print(f'largest relative error {error.max():.2e}, {error.max() * 2 ** 24:.2f} half units in the last place of 1')
