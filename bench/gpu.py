"""This program and PyTorch in turns on one GPU: training at several batch sizes, and drawing. Prints the tables.

    python bench/gpu.py --ddpm target/release/ddpm --work /tmp/work --out /tmp/gpu.md

Both programs are started and make some steps each in turn; every number is the median of the turns' means. PyTorch takes part
channels-last, compiled (max-autotune, which runs it as CUDA graphs), with fused attention and Adam, in bf16 under autocast; where it
cannot be compiled, without, and the table says so. Our memory is the plan's, theirs what PyTorch's allocator reserved at most: the driver's own, some
hundred MiB for each program, is in neither. The program must be built with `--features cuda`.
"""
import argparse
import json
import pathlib
import subprocess
import sys

import machine
from compare import HERE, SETTINGS, Player, named, ratio, table, tell

LARGEST = {'attention': 3, 'double-conv': 3, 'simple': 1.2, 'unet2d': 1.2}  # times as fast, at the largest batch
AT_16 = 2
SAMPLING = 2
IMAGES, STEPS = 64, 1000
WARM = 4  # turns that are not counted: a compiled network is compiled in them


def sets(a, network, batch):
    preset, _, channels, size = SETTINGS[network]
    settings = {'network.name': network, 'data.size': size, 'data.channels': channels, 'train.batch_size': batch,
                'ema.decay': 0, 'compute.device': a.device, 'compute.precision': a.precision}
    words = [f'{k}={v}' for k, v in settings.items()] + a.set
    return ['--random-data', '--json', '--preset', preset, *(w for s in words for w in ('--set', s))]


def ours(a, network, part, batch):
    return [a.ddpm, 'bench', '--loop=on-line', '--only', part, *sets(a, network, batch)]


def theirs(a, network, part, batch, flags):
    command = [sys.executable, HERE / 'rival.py', network, part, '--device', a.device, '--batch', batch, *flags]
    return command + (['--bf16'] if a.precision == 'bf16' else [])


def arena(a, network, part, batch):
    """Bytes of our plan."""
    out = subprocess.run([str(c) for c in [a.ddpm, 'bench', '--runs', 1, '--only', part, *sets(a, network, batch)]],
                         check=True, capture_output=True, text=True).stdout
    return json.loads(out)['parts'][0]['arena_bytes']


def forms(network):
    """PyTorch's, the fastest that is to be expected first."""
    plain = ['--channels-last'] + (['--fused-attention'] if network in ('attention', 'double-conv') else [])
    return [plain + ['--compile'], plain]


def turns(a, network, part, batch, steps):
    """Our result, theirs, and their form."""
    for flags in forms(network):
        players = []
        try:
            for command in (ours(a, network, part, batch), theirs(a, network, part, batch, flags)):
                players.append(Player(command))
            for i in range(-WARM, a.rounds):
                for player in players:
                    player.turn(steps, counted=i >= 0)
            return *(p.result() for p in players), flags
        except RuntimeError as error:
            tell(f'not possible here: {error}')
        finally:
            for player in players:
                player.close()
    sys.exit(f'{network} {part}: PyTorch cannot do it here, or we cannot')


def row(a, network, part, batch, goal, steps, record):
    mine, other, flags = turns(a, network, part, batch, steps)
    mine['arena'] = arena(a, network, part, batch)
    record[f'{network} {part} {batch}'] = {'ours': mine, 'theirs': other, 'flags': flags}
    share = mine['arena'] / other['resident']
    cells = [network, str(batch), *(f'{batch / r["seconds"]:.0f}' for r in (mine, other)), ratio(other, mine, goal),
             f'{mine["arena"] / 2**20:.0f} MiB', f'{other["resident"] / 2**20:.0f} MiB', f'{share:.2f}', named(flags)]
    tell(' | '.join(cells))
    return cells


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--ddpm', type=pathlib.Path, required=True)
    ap.add_argument('--work', type=pathlib.Path, required=True)
    ap.add_argument('--networks', nargs='+', choices=SETTINGS, default=list(SETTINGS))
    ap.add_argument('--batches', nargs='+', type=int, default=[16, 64, 128, 256])
    ap.add_argument('--parts', nargs='+', choices=('train', 'sample'), default=['train', 'sample'])
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--steps', type=int, default=20, help='steps of a turn')
    ap.add_argument('--precision', choices=('f32', 'tf32', 'bf16'), default='bf16')
    ap.add_argument('--device', default='cuda')
    ap.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='a setting of ours, such as compute.deterministic=true')
    ap.add_argument('--out', type=pathlib.Path)
    a = ap.parse_args()
    a.ddpm = a.ddpm.resolve()
    a.work.mkdir(parents=True, exist_ok=True)

    import torch
    name = torch.cuda.get_device_name() if a.device.startswith('cuda') else a.device
    text = ['# Beside PyTorch on a GPU', '', 'Written by `bench/gpu.py`; do not edit.', '',
            *machine.lines([f'torch {torch.__version__}', name]),
            f'- {a.precision}; medians of {a.rounds} turns of {a.steps} steps' + (f'; ours with {", ".join(a.set)}' if a.set else ''), '']
    record = {}
    head = ['network', 'batch', 'our images/s', "PyTorch's", 'times as fast', 'our memory', "PyTorch's", 'of it', 'its form']
    for part in a.parts:
        rows = []
        for network in a.networks:
            for batch in a.batches if part == 'train' else [IMAGES]:
                goal = LARGEST[network] if batch == max(a.batches) else AT_16 if batch == 16 else None
                if part == 'sample':
                    goal = SAMPLING
                tell(f'{network} {part} {batch}')
                rows.append(row(a, network, part, batch, goal, a.steps, record))
                (a.work / 'gpu.json').write_text(json.dumps(record, indent=1))
        title = 'Training steps' if part == 'train' else f'Denoising steps ({STEPS} of them draw an image)'
        text += [f'## {title}', '', *table(head, rows)]
    text = '\n'.join(text).rstrip() + '\n'
    print(text)
    if a.out:
        a.out.write_text(text)


main()
