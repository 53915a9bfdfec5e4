"""Images a second and memory of a training step, as batch, size, width and threads grow; `grow.sh` runs it.

The network is `unet2d` with half the paper's widths: convolutions, normalisations and attention in one. Each of the four
grows alone, from the same middle.
"""
import argparse
import csv
import json
import pathlib
import subprocess
import sys

import machine

HERE = pathlib.Path(__file__).resolve().parent
WIDTHS = (64, 128, 128, 128)
MIDDLE = {'batch': 16, 'size': 32, 'width': 1, 'threads': len(machine.cores())}
AXES = {
    'batch': [1, 2, 4, 8, 16, 32, 64, 128],
    'size': [16, 24, 32, 48, 64, 96, 128],
    'width': [1, 1.5, 2],
    'threads': sorted({1, 2, 4, 8, len(machine.cores())} & set(range(1, len(machine.cores()) + 1))),
}
LARGE = {'batch': 4}  # the size grows with this batch, so that the largest fits
COLUMNS = ['axis', *MIDDLE, 'seconds', 'images_per_second', 'gflops', 'arena_mib', 'scratch_mib', 'resident_mib']


def measure(a, axis, value):
    point = {**MIDDLE, **(LARGE if axis == 'size' else {}), axis: value}
    settings = {
        'network.name': 'unet2d', 'data.channels': 3, 'data.size': point['size'],
        'unet2d.block_out_channels': [int(w * point['width']) for w in WIDTHS],
        'train.batch_size': point['batch'], 'compute.threads': point['threads'], 'compute.precision': a.precision}
    runs = a.runs or (2 if point['batch'] * point['size'] ** 2 > 16 * 32**2 else 5)
    command = [str(a.ddpm), 'bench', '--random-data', '--json', '--only', 'train', '--runs', str(runs)]
    for pair in settings.items():
        command += ['--set', '{}={}'.format(*pair)]
    part = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)['parts'][0]
    row = {'axis': axis, **point, 'seconds': part['seconds'], 'images_per_second': part['images_per_second'],
           'gflops': part['gflops'], 'arena_mib': part['arena_bytes'] / 2**20, 'scratch_mib': part['scratch_bytes'] / 2**20,
           'resident_mib': (part['resident_bytes'] or 0) / 2**20}
    print(' '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in row.items()), file=sys.stderr, flush=True)
    return row


def plot(rows, path):
    axes = list(dict.fromkeys(r['axis'] for r in rows))
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib import ticker
    figure, both = plt.subplots(2, len(axes), figsize=(4 * len(axes), 7), constrained_layout=True, squeeze=False)
    kinds = (('images_per_second', 'images/s', 'tab:blue'), ('gflops', 'GFLOP/s', 'tab:green')), \
        (('resident_mib', 'most held, MiB', 'tab:red'), ('arena_mib', 'arena, MiB', 'tab:orange'))
    for column, axis in enumerate(axes):
        mine = [r for r in rows if r['axis'] == axis]
        for row, kind in enumerate(kinds):
            at = both[row][column]
            for key, name, colour in kind:
                at.plot([r[axis] for r in mine], [r[key] for r in mine], 'o-', color=colour, label=name)
            at.set(xlabel=axis, xscale='log', yscale='log')
            at.set_xticks([r[axis] for r in mine], [str(r[axis]) for r in mine])
            at.xaxis.set_minor_locator(ticker.NullLocator())
            at.yaxis.set_major_formatter('{x:g}')
            at.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(1.5, 0.7)))
            at.grid(alpha=0.3)
            at.legend()
    figure.savefig(path, dpi=100)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--ddpm', type=pathlib.Path, required=True)
    ap.add_argument('--axes', nargs='+', choices=AXES, default=list(AXES))
    ap.add_argument('--most', type=float, default=float('inf'), help='leave out values above this')
    ap.add_argument('--runs', type=int, default=0, help='steps that are timed; 2 of large ones and 5 of small ones if not given')
    ap.add_argument('--passes', type=int, default=2, help='times that all is measured; of each point the fastest counts')
    ap.add_argument('--precision', choices=('f32', 'bf16'), default='f32')
    ap.add_argument('--out', type=pathlib.Path, default=HERE, help='folder for the results')
    a = ap.parse_args()
    points = [(axis, value) for axis in a.axes for value in AXES[axis] if value <= a.most]
    # A spell in which the machine has less to give falls on single points, and looks like a cliff.
    passes = [[measure(a, *point) for point in points] for _ in range(a.passes)]
    rows = [min(of_point, key=lambda row: row['seconds']) for of_point in zip(*passes)]
    with open(a.out / 'growth.csv', 'w', newline='') as f:
        out = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        out.writeheader()
        out.writerows({k: f'{v:.5g}' if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    text = ['# How training grows', '', 'Written by `bench/grow.sh`; do not edit. Numbers: [growth.csv](growth.csv).', '',
            *machine.lines(), f'- `unet2d` with channels {", ".join(map(str, WIDTHS))} at width 1, {a.precision}; '
            f'all measured {a.passes} times, of each point the fastest counts', '',
            '![growth](growth.png)', '']
    for axis in a.axes:
        mine = [r for r in rows if r['axis'] == axis]
        if mine:
            rest = ', '.join(f'{k} {mine[0][k]}' for k in MIDDLE if k != axis)
            text += [f'## {axis.capitalize()} ({rest})', '', f'| {axis} | s a step | images/s | GFLOP/s | arena | scratch | most held |',
                     '|---' * 7 + '|']
            text += [f'| {r[axis]} | {r["seconds"]:.3f} | {r["images_per_second"]:.1f} | {r["gflops"]:.0f} | {r["arena_mib"]:.0f} MiB '
                     f'| {r["scratch_mib"]:.0f} MiB | {r["resident_mib"]:.0f} MiB |' for r in mine] + ['']
    text = '\n'.join(text).rstrip() + '\n'
    (a.out / 'GROWTH.md').write_text(text)
    plot(rows, a.out / 'growth.png')
    print(text)


main()
