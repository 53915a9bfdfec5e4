"""Compares a run's losses with the PyTorch reference's, step by step.

    python tools/compare_losses.py RUN/metrics.jsonl [REFERENCE] [--last 100]

REFERENCE (step and loss in each line) is tools/golden/mnist_reference_losses.txt if not given: `mnist_reference.py` with
seed 0 and 600 steps. A run to compare starts from the same weights and sees the same draws:

    python tools/golden/mnist_reference.py MNIST_DIR OUT --steps 0      # writes OUT/init.safetensors
    ddpm train --preset mnist --data MNIST_DIR --init OUT/init.safetensors --steps 600
"""
import argparse
import json
import pathlib

ap = argparse.ArgumentParser()
ap.add_argument('metrics')
ap.add_argument('reference', nargs='?',
                default=pathlib.Path(__file__).parent / 'golden' / 'mnist_reference_losses.txt')
ap.add_argument('--last', type=int, default=100)
a = ap.parse_args()
theirs = {int(step): float(loss) for step, loss in map(str.split, open(a.reference))}
# The reference counts steps from 0, as lines of metrics without a format do; format 2 counts the steps that are done.
ours = {m['step'] - (m.get('format', 1) > 1): m['loss'] for m in map(json.loads, open(a.metrics))}
both = sorted(set(ours) & set(theirs))
last = both[-a.last:]
mean = lambda losses: sum(losses[s] for s in last) / len(last)
worst = max(both, key=lambda s: abs(ours[s] / theirs[s] - 1))
print(f'{len(both)} steps in both; steps {last[0]} to {last[-1]}: mean loss {mean(ours):.6f}, PyTorch {mean(theirs):.6f}, '
      f'ratio {mean(ours) / mean(theirs):.6f}')
print(f'largest difference of a single step: {abs(ours[worst] / theirs[worst] - 1):.2e} at step {worst}')
