"""This program and PyTorch in turns on the four networks; `compare.sh` runs it. Prints the tables and writes RESULTS.md.

Both programs are started, wait, and make one step each in turn, so that whatever else happens to the machine happens to
both. (Of one image alone whole drawings take turns: what a step finds in the caches counts there.) Every number is a median. PyTorch takes part in the form that is fastest of those it has, which is found first
(and kept in WORK/variants.json): as the tutorial writes it, channels-last, compiled, with fused attention.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import machine

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / 'RESULTS.md'
SETTINGS = {  # of each network: preset, batch, channels, size
    'attention': ('digits28', 64, 1, 28),
    'simple': ('digits', 32, 1, 64),
    'unet2d': ('digits', 16, 3, 32),
    'double-conv': ('digits', 8, 3, 64),
}
# How many times as fast as PyTorch in the same precision a training step and a forward pass are to be.
GOALS = {
    'f32': {'attention': 3.5, 'simple': 1.6, 'unet2d': 1.6, 'double-conv': 10},
    'bf16': {'attention': 3, 'simple': 1.4, 'unet2d': 1.4, 'double-conv': 9},
}
SAMPLE_GOAL = 3
IMAGES, STEPS = 64, 50
PAUSE = 0.2  # seconds between turns, in which the other's threads go to sleep
WARM = 3  # steps of a compiled network that are not counted; it is compiled twice, for its first input and for the next


class Player:
    """A program that makes a step for each line."""

    def __init__(self, command):
        self.command = [str(c) for c in command]
        self.errors = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True)
        self.seconds = []

    def turn(self, steps, counted=True):
        """So many steps in a row; what counts is the mean."""
        try:
            self.process.stdin.write('\n' * steps)
            self.process.stdin.flush()
            said = [self.process.stdout.readline() for _ in range(steps)]
        except BrokenPipeError:
            said = ['']
        if not all(said):
            self.errors.seek(0)
            tail = ''.join(self.errors.readlines()[-5:])
            raise RuntimeError(f'{" ".join(self.command)} ended with {self.process.wait()}:\n{tail}')
        said = [json.loads(line) for line in said]
        self.resident = said[-1]['resident_bytes']
        seconds = statistics.mean(step['seconds'] for step in said)
        if counted:
            self.seconds.append(seconds)
        return seconds

    def close(self):
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()
        self.errors.close()

    def result(self):
        return {'seconds': statistics.median(self.seconds), 'all': self.seconds, 'resident': self.resident}


def tell(text):
    print(text, file=sys.stderr, flush=True)


def ours(a, network, part, precision, batch=None):
    preset, own_batch, channels, size = SETTINGS[network]
    settings = {'network.name': network, 'data.size': size, 'data.channels': channels, 'train.batch_size': batch or own_batch,
                'compute.threads': a.threads, 'ema.decay': 0}  # PyTorch keeps no average either
    if a.device != 'cpu':
        settings['compute.device'] = a.device
    if a.has_precision:
        settings['compute.precision'] = precision
    command = [a.ddpm, 'bench', '--random-data', '--json', '--loop=on-line', '--only', part, '--preset', preset]
    sets = [f'{k}={v}' for k, v in settings.items()] + a.set
    return command + [word for s in sets for word in ('--set', s)]


def theirs(a, network, part, precision, flags, batch=None):
    command = [sys.executable, HERE / 'rival.py', network, part, '--threads', a.threads, '--device', a.device, *flags]
    return command + (['--bf16'] if precision == 'bf16' else []) + (['--batch', batch] if batch else [])


def turns(commands, rounds, steps=1):
    """Turns of so many steps; the result of each program, seconds a step."""
    players = [Player(c) for c in commands]
    warm = WARM if any('--compile' in c for c in commands) else 1
    try:
        for i in range(-warm, rounds):
            for player in players:
                player.turn(steps if i >= 0 else 1, counted=i >= 0)
                time.sleep(PAUSE)
        return [p.result() for p in players]
    finally:
        for p in players:
            p.close()


def variants(network):
    forms = [[], ['--channels-last'], ['--compile'], ['--compile', '--channels-last']]
    if network in ('attention', 'double-conv'):  # UNet2DModel has it anyway, and "simple" has no attention
        forms = [[]] + [['--fused-attention', *f] for f in forms]
    return forms


def fastest(a, network, part, precision):
    """The fastest form of PyTorch, and the time of the tutorial's own."""
    store = a.work / 'variants.json'
    known = json.loads(store.read_text()) if store.exists() and not a.again else {}
    key = f'{network} {part} {precision} {a.threads}'
    if key not in known:
        times = []
        for flags in variants(network):
            try:
                player = Player(theirs(a, network, part, precision, flags))
                try:
                    player.turn(1), player.turn(1)
                    seconds = min(player.turn(1), player.turn(1))
                finally:
                    player.close()
            except RuntimeError as error:
                tell(f'not possible here: {error}')
                seconds = None
            tell(f'PyTorch {key} {" ".join(flags) or "as it is written"}: {seconds and round(seconds, 3)} s')
            times.append((flags, seconds))
        known = json.loads(store.read_text()) if store.exists() else {}
        known[key] = times
        store.write_text(json.dumps(known, indent=1))
    times = [(flags, seconds) for flags, seconds in known[key] if seconds]
    if not times:
        sys.exit(f'PyTorch cannot do {key} here')
    return min(times, key=lambda t: t[1])[0], known[key][0][1]


def ratio(theirs, ours, goal=None):
    times = f'{theirs["seconds"] / ours["seconds"]:.2f}×'
    return f'**{times}** (goal {goal}×)' if goal else f'**{times}**'


def mib(result):
    return f'{result["resident"] / 2**20:.0f} MiB'


def named(flags):
    return ', '.join(f.strip('-').replace('-', ' ') for f in flags) or 'as written'


def table(head, rows):
    return ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head), *('| ' + ' | '.join(r) + ' |' for r in rows), '']


def steps(a, precision, record):
    """The table of training steps and forward passes."""
    rows = []
    for network in a.networks:
        for part in [p for p in ('train', 'forward') if p in a.parts]:
            flags, written = fastest(a, network, part, precision)
            tell(f'{network} {part} {precision}')
            mine, other = turns([ours(a, network, part, precision), theirs(a, network, part, precision, flags)], a.rounds)
            record[f'{network} {part} {precision}'] = {'ours': mine, 'theirs': other, 'flags': flags, 'written': written}
            rows.append([network, part, f'{mine["seconds"]:.3f} s', f'{other["seconds"]:.3f} s ({named(flags)})',
                         ratio(other, mine, GOALS[precision][network]), f'{written:.3f} s' if written else 'not measured',
                         mib(mine), mib(other),
                         f'{mine["resident"] / other["resident"]:.2f}'])
            tell(' | '.join(rows[-1]))
    head = ['network', 'step', 'ours', 'PyTorch, its fastest', 'times as fast', 'PyTorch as written', 'our memory',
            'PyTorch\'s', 'of it']
    return table(head, rows)


def across(a, record):
    """Our f32 beside PyTorch's bf16."""
    rows = []
    for network in a.networks:
        for part in ('train', 'forward'):
            pair = [record.get(f'{network} {part} {p}') for p in ('f32', 'bf16')]
            if all(pair):
                mine, other = pair[0]['ours'], pair[1]['theirs']
                rows.append([network, part, f'{mine["seconds"]:.3f} s', f'{other["seconds"]:.3f} s', ratio(other, mine, 1)])
    return table(['network', 'step', 'our f32', 'PyTorch\'s bf16', 'times as fast'], rows)


def sampling(a, precision, record):
    """The table of denoising steps: many images at once, and one alone."""
    rows = []
    for network in a.networks:
        flags, _ = fastest(a, network, 'forward', precision)
        for batch, steps in ((IMAGES, 1), (1, STEPS)):
            tell(f'{network} sample {precision}, batch {batch}')
            mine, other = turns([ours(a, network, 'sample', precision, batch),
                                 theirs(a, network, 'sample', precision, flags, batch)], a.rounds, steps)
            record[f'{network} sample-{batch} {precision}'] = {'ours': mine, 'theirs': other, 'flags': flags}
            whole = [f'{STEPS * r["seconds"]:.2f} s' for r in (mine, other)]
            rows.append([network, str(batch), *whole, ratio(other, mine, SAMPLE_GOAL), mib(mine), mib(other)])
            tell(' | '.join(rows[-1]))
    return table(['network', 'images', f'ours, {STEPS} steps', 'PyTorch', 'times as fast', 'our memory', 'PyTorch\'s'], rows)


def timed(command, runs, cwd=None):
    def once():
        start = time.perf_counter()
        subprocess.run([str(c) for c in command], check=True, cwd=cwd, capture_output=True)
        return time.perf_counter() - start
    once()
    return statistics.median(once() for _ in range(runs))


def starting(a, record):
    """The table of what it takes to begin."""
    with tempfile.TemporaryDirectory() as folder:
        train = ['train', '--preset', 'digits28', '--steps', '1', '--batch-size', '1', '--name', 'start']
        sets = ['data.digits_count=8', 'output.sample_count=0', 'output.tensorboard=false']
        subprocess.run([a.ddpm, *train, *(w for s in sets for w in ('--set', s))], check=True, cwd=folder, capture_output=True)
        weights = next(pathlib.Path(folder).glob('runs/start/checkpoints/*/model.safetensors'))
        draw = [a.ddpm, 'sample', 'start', '-n', '1', '--steps', '1', '--threads', a.threads, '--out', 'drawn']
        record['start'] = {
            'help': timed([a.ddpm, '--help'], 20),
            'ours': timed(draw, max(5, a.rounds), folder),
            'theirs': timed([sys.executable, HERE / 'rival.py', 'attention', 'start', '--threads', a.threads,
                             '--weights', weights], max(2, a.rounds // 2)),
        }
    s = record['start']
    return table(['', 'ours', 'PyTorch', 'goal'], [
        ['`ddpm --help`', f'{1000 * s["help"]:.1f} ms', '', '10 ms'],
        ['from a checkpoint of 10 M parameters through the first sample step, the program\'s start included',
         f'{s["ours"]:.3f} s', f'{s["theirs"]:.2f} s', '0.3 s'],
    ])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--ddpm', type=pathlib.Path, required=True)
    ap.add_argument('--work', type=pathlib.Path, required=True)
    ap.add_argument('--networks', nargs='+', choices=SETTINGS, default=list(SETTINGS))
    ap.add_argument('--precisions', nargs='+', choices=GOALS, default=list(GOALS))
    ap.add_argument('--parts', nargs='+', choices=('train', 'forward', 'sample', 'start'),
                    default=['train', 'forward', 'sample', 'start'])
    ap.add_argument('--rounds', type=int, default=5, help='steps of each program that are counted')
    ap.add_argument('--threads', type=int, default=len(machine.cores()))
    ap.add_argument('--device', default='cpu', help='cpu or cuda, for both programs; ours must be built with --features cuda')
    ap.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='a setting of ours, such as compute.winograd=false')
    ap.add_argument('--again', action='store_true', help="look for PyTorch's fastest form again")
    ap.add_argument('--out', type=pathlib.Path, help=f'where the tables go; bench/{RESULTS.name} if all was measured')
    a = ap.parse_args()
    a.ddpm = a.ddpm.resolve()
    a.work.mkdir(parents=True, exist_ok=True)
    settings = machine.said(str(a.ddpm), 'config')
    a.has_precision = any(line.startswith('precision =') for line in settings.splitlines())
    if not a.has_precision and 'bf16' in a.precisions:
        tell('this build has no compute.precision: f32 only')
        a.precisions = ['f32']

    import diffusers
    import torch
    text = ['# Beside PyTorch', '', 'Written by `bench/compare.sh`; do not edit.', '',
            *machine.lines([f'torch {torch.__version__}', f'diffusers {diffusers.__version__}']),
            f'- {a.threads} threads; medians of {a.rounds} steps in turns; memory is the most that the process held'
            + (f'; ours with {", ".join(a.set)}' if a.set else ''), '']
    if (a.work / 'variants.json').exists() and not a.again:
        text[-1:] = ["- The fastest PyTorch variants are those of an earlier search (`--again` repeats it)", '']
    record = {}
    store = a.work / 'compare.json'

    def section(title, rows):
        text.extend([f'## {title}', '', *rows])
        store.write_text(json.dumps(record, indent=1))

    if {'train', 'forward'} & set(a.parts):
        for precision in a.precisions:
            section(f'Training steps and forward passes, {precision}', steps(a, precision, record))
        if len(a.precisions) > 1:
            section("Our f32 beside PyTorch's bf16", across(a, record))
    if 'sample' in a.parts:
        for precision in a.precisions:
            section(f'Drawing, {precision}', [
                f'Drawings of {STEPS} steps: of one image the median of {a.rounds}, of {IMAGES} from the median of {a.rounds} steps.',
                '', *sampling(a, precision, record)])
    if 'start' in a.parts:
        section('Starting', starting(a, record))
    text = '\n'.join(text).rstrip() + '\n'
    print(text)
    whole = (len(a.networks), len(a.parts)) == (len(SETTINGS), 4) and a.rounds >= 5 and not a.set
    out = a.out or (RESULTS if whole else None)
    if out:
        out.write_text(text)


if __name__ == '__main__':
    main()
