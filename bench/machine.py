"""What a table of results must say of the machine and the versions."""
import datetime
import os
import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Instruction sets that decide how fast this work goes.
SETS = ('avx2', 'fma', 'avx512f', 'avx512_bf16', 'avx512_fp16', 'amx_bf16', 'amx_tile', 'asimd', 'bf16', 'sve')


def said(*command):
    """What a command says, or nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def fields(path):
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(':') for line in lines)
    return {key.strip(): value.strip() for key, _, value in reversed(list(pairs))}


def cores():
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count())


def lines(versions=()):
    """Lines of Markdown: date, machine, versions; `versions` are added to them."""
    cpu, memory = fields('/proc/cpuinfo'), fields('/proc/meminfo')
    flags = (cpu.get('flags') or cpu.get('Features') or '').split()
    total = memory.get('MemTotal', '0 kB').split()[0]
    name = cpu.get('model name') or platform.processor() or platform.machine()
    family = ', '.join(f'{k.split()[-1]} {cpu[k]}' for k in ('cpu family', 'model') if k in cpu)
    commit = said('git', 'rev-parse', '--short', 'HEAD') + (' and changes' if said('git', 'status', '--short', '-uno') else '')
    return [
        f'- {datetime.date.today().isoformat()}, commit {commit}',
        f'- {name} ({family}), {len(cores())} cores, {int(total) / 2**20:.0f} GiB; '
        f'{", ".join(s for s in SETS if s in flags) or platform.machine()}; {platform.system()} {platform.release()}',
        '- ' + ', '.join([said('rustc', '--version'), f'Python {platform.python_version()}', *versions]),
    ]
