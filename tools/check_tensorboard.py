"""Checks with the real TensorBoard that the event files of a run say what metrics.jsonl and samples/ say.

    pip install tensorboard pillow
    python check_tensorboard.py RUN [--serve]

RUN is a folder that `ddpm train` made, stopped and resumed as often as you like. TensorBoard's EventAccumulator must
list every number of metrics.jsonl as a scalar, each step once, under the same number (but for the lines of versions that
counted from 0 there), the settings that have a part in what is learnt as hyperparameters (HParams), and sample sheets as images with the pixels of their PNGs. Only sheets of steps before which the run was resumed may
be missing; they are noted. --serve also starts the TensorBoard server on the folder above and asks
it, as a browser would. The exit status is 1 where anything differs.
"""
import argparse
import io
import json
import pathlib
import sys
import time
import tomllib
import urllib.parse
import urllib.request

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

ap = argparse.ArgumentParser()
ap.add_argument('run', type=pathlib.Path)
ap.add_argument('--serve', action='store_true')
a = ap.parse_args()

lines = [json.loads(line) for line in (a.run / 'metrics.jsonl').read_text().splitlines()]
for line in lines:
    # Lines without a format count steps from 0.
    line['step'] += line.pop('format', 1) < 2
tags = [key for key in lines[-1] if key not in ('step', 'seconds')]
sheets = {int(path.stem.split('-')[1]): path for path in sorted((a.run / 'samples').glob('step-*.png'))}
failed = False


def check(what, good):
    global failed
    failed |= not good
    print(('ok    ' if good else 'WRONG ') + what)


def as_setting(value):
    return getattr(value, value.WhichOneof('kind'))


def plain(settings, key):
    section, name = key.split('.')
    value = settings.get(section, {}).get(name)
    return value if isinstance(value, (str, bool, int, float)) else json.dumps(value)


def pixels(png):
    return np.asarray(Image.open(png))


events = EventAccumulator(str(a.run), size_guidance={'scalars': 0, 'images': 0}).Reload()
listed = events.Tags()
check(f'scalars {listed["scalars"]}', sorted(listed['scalars']) == sorted(tags))
for tag in tags:
    found = [(e.step, e.value) for e in events.Scalars(tag)]
    # What an earlier version did not measure is not there in its lines, or null.
    expected = [(line['step'], np.float32(line[tag])) for line in lines if line.get(tag) is not None]
    check(f'{tag}: {len(found)} steps, {found[0][0]} to {found[-1][0]}', found == expected)
if 'hparams' in events.PluginTagToContent.__self__._plugin_to_tag_to_content:
    content = events.PluginTagToContent('hparams')['_hparams_/session_start_info']
    told = metadata.parse_session_start_info_plugin_data(content).hparams
    settings = tomllib.loads((a.run / 'config.toml').read_text())
    same = [key for key, value in told.items() if as_setting(value) == plain(settings, key)]
    # TensorBoard keeps those that the run began with.
    check(f'{len(told)} hyperparameters, {len(told) - len(same)} of them changed since', len(told) > 20)
    check('diffusion.prediction and optimizer.lr among them', 'diffusion.prediction' in same and 'optimizer.lr' in told)
else:
    check('hyperparameters', False)
check(f'images {listed["images"]}', listed['images'] == (['samples'] if sheets else []))
if sheets:
    found = events.Images('samples')
    shown = [e.step for e in found]
    check(f'samples at steps {shown}', shown == sorted(set(shown) & set(sheets)) and shown[-1] == max(sheets))
    for step in sorted(set(sheets) - set(shown)):
        print(f'note: {sheets[step]} is not there; was the run resumed from before step {step}?')
    same = all(np.array_equal(pixels(io.BytesIO(e.encoded_image_string)), pixels(sheets[e.step])) for e in found)
    check('samples have the pixels of their files', same)
    sizes = all((e.height, e.width) == pixels(sheets[e.step]).shape[:2] for e in found)
    check('samples have the sizes of their files', sizes)

if a.serve:
    from tensorboard import program

    board = program.TensorBoard()
    board.configure(argv=[None, '--logdir', str(a.run.parent), '--host', '127.0.0.1', '--port', '0'])
    url = board.launch()
    name = a.run.resolve().name

    def ask(path, **query):
        with urllib.request.urlopen(f'{url}data/plugin/{path}?{urllib.parse.urlencode(query)}') as answer:
            return json.load(answer)

    # It reads in the background.
    for _ in range(60):
        scalars, images = ask('scalars/tags').get(name, {}), ask('images/tags').get(name, {})
        if set(scalars) >= set(tags) and (images or not sheets):
            break
        time.sleep(1)
    check(f'the server lists scalars {sorted(scalars)}', sorted(scalars) == sorted(tags))
    check(f'the server lists images {sorted(images)}', sorted(images) == (['samples'] if sheets else []))
    states = [f'STATUS_{state}' for state in ('UNKNOWN', 'SUCCESS', 'FAILURE', 'RUNNING')]
    query = {'experimentName': '', 'allowedStatuses': states, 'colParams': [], 'startIndex': 0, 'sliceSize': 100}
    body = json.dumps(query).encode()
    request = urllib.request.Request(f'{url}data/plugin/hparams/session_groups', body, {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request) as answer:
        groups = json.load(answer)['sessionGroups']
    ours = [group for group in groups if any(session['name'] == name for session in group['sessions'])]
    check(f'the server has the hyperparameters of {len(groups)} runs, this one among them',
          len(ours) == 1 and ours[0]['hparams']['diffusion.prediction'] in ('eps', 'x0', 'v'))
    # It keeps a sample of long runs.
    steps = [step for _, step, _ in ask('scalars/scalars', run=name, tag='loss')]
    check(f'the server has {len(steps)} losses, {steps[0]} to {steps[-1]}',
          steps == sorted(set(steps)) and steps[-1] == lines[-1]['step'])

sys.exit(failed)
