"""Runs the micro-benchmarks of the kernels and sets them beside the measured peak; `kernels.sh` runs it."""
import argparse
import pathlib
import re
import subprocess
import sys

import machine

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / 'KERNELS.md'
ENTRY = re.compile(r'^((?:[│ ]  )*)[╰├]─ (.*)$')
RATE = re.compile(r'([\d.]+) ([KMGT]?)(?:item|B)/s')
UNIT = {'': 1, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
WAYS = ('f32', 'bf16', 'winograd', 'winograd_bf16')


def rates(text):
    """From divan's tables: {(names down to the benchmark): its median rate a second}."""
    path, found = [], {}
    for line in text.splitlines():
        entry, rate = ENTRY.match(line), RATE.findall(line)
        if entry:
            depth = len(entry[1]) // 3
            name = re.split(r'\s{2,}|\s+│|\s+[\d.]+ [nµm]?s ', entry[2].strip())[0]
            path = [*path[:depth], name]
        elif len(rate) >= 3:
            number, unit = rate[2]  # fastest, slowest, median, mean
            found[tuple(path)] = float(number) * UNIT[unit]
    return found


def table(head, rows):
    return ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|', *('| ' + ' | '.join(r) + ' |' for r in rows), '']


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('only', nargs='*', help='names of benchmarks')
    ap.add_argument('--read', type=argparse.FileType(), help="divan's output, instead of running it")
    a = ap.parse_args()
    if a.read:
        text = a.read.read()
    else:
        command = ['cargo', 'bench', '-p', 'ddpm-kernels', '--bench', 'kernels', '--', *(['peak', *a.only] if a.only else [])]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
        text = ''
        for line in run.stdout:
            text += line
            print(line, end='', file=sys.stderr, flush=True)
        if run.wait():
            sys.exit('the benchmarks failed')
    found = rates(text)
    peak = {way: found.get(('peak', way), 0) for way in ('f32', 'bf16')}
    peak |= {'winograd': peak['f32'], 'winograd_bf16': peak['bf16']}

    def share(rate, way='f32'):
        return f'{rate / 1e9:.0f} ({100 * rate / peak[way]:.0f} %)' if rate and peak[way] else ''

    out = ['# Hot kernels', '', 'Written by `bench/kernels.sh`; do not edit.', '', *machine.lines(),
           f'- one thread; peak in registers: f32 {peak["f32"] / 1e9:.0f} GFLOP/s'
           + (f', bf16 {peak["bf16"] / 1e9:.0f} GFLOP/s' if peak['bf16'] else ''), '']
    passes = ('forward', 'data_gradient', 'weight_gradient')
    shapes = list(dict.fromkeys(p[2] for p in found if p[0] in passes))
    if shapes:
        out += ['## Convolutions', '',
                'GFLOP/s of the plain convolution and the share of the peak: of f32 for f32 and Winograd (which multiplies less),',
                'of bf16 where factors are bf16. Shapes are images x height x width, channels in-out, kernel and stride.', '']
        head = ['shape'] + [f'{p.replace("_", " ")}, {way.replace("_", " ")}' for p in passes for way in WAYS]
        out += table(head, [[s] + [share(found.get((p, way, s), 0), way) for p in passes for way in WAYS] for s in shapes])
    sizes = list(dict.fromkeys(p[3] for p in found if p[0] == 'attention'))
    if sizes:
        out += ['## Attention', '', 'An image: 2 products of tokens with tokens forward, 5 in the gradient; an exponential for each pair of',
                'tokens and head in both.', '']
        rows = []
        for s in sizes:
            tokens, channels, heads = map(int, re.findall(r'\d+', s))
            row = [str(tokens), str(channels), str(heads), str(channels // heads)]
            for name, products in (('forward', 2), ('gradient', 5)):
                for way in ('f32', 'bf16'):
                    rate = found.get(('attention', name, way, s), 0)
                    row += [share(rate, way), f'{rate / (2 * products * channels / heads) / 1e9:.2f}']
            rows.append(row)
        head = [h for name in ('forward', 'gradient') for way in ('f32', 'bf16') for h in (f'{name}, {way}, GFLOP/s', 'Gexp/s')]
        out += table(['tokens', 'channels', 'heads', 'width', *head], rows)
    others = [(p[1:], rate) for p, rate in found.items() if p[0] == 'passes']
    if others:
        out += ['## Passes over memory', '']
        out += table(['pass', 'rate'], [[' '.join(p).replace('_', ' '), f'{r / 1e9:.2f} ' + ('Gexp/s' if p[0] == 'exponential' else 'GB/s')]
                                        for p, r in others])
    text = '\n'.join(out).rstrip() + '\n'
    print(text)
    if not a.only and not a.read:
        RESULTS.write_text(text)


main()
