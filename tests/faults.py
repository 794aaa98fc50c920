"""Bad input of every kind, for every command, setting and file: one sentence, exit code 2, nothing hurt, nothing left.

    python tests/faults.py                      # the chosen cases that the tests run
    python tests/faults.py --all                # all of them
    python tests/faults.py --only 'predict' --report faults.csv

Wrong values come from what the commands declare: their parameters, the classes of settings, and the files that a
command opens when nothing is wrong. A new option, setting or file is covered without a line here.
"""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import argparse
import collections
import csv
import functools
import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
import typing
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / 'scripts'), str(Path(__file__).parent.parent)]

import numpy as np
import yaml
from PIL import Image

import wrong
from trial import Case, Tries, call, can_make_devices, content, in_child, printed_to, run_cases

CHOSEN = 870  # cases in the tests
SEED = 14  # of the choice
SLOW_CHOSEN = 6  # strata of cases that take seconds, among them

PRESET = {
    'about': 'a study of seconds',
    'replicates': 2,
    'data': {
        'simulate': {
            'size': 32,
            'counts': {'train': 12, 'val': 6, 'test': 6},
            'classes': ['Nucleoli', 'Plasma membrane', 'Cytosol'],
            'least': 1,
        },
        'prepare': {'size': 16},
    },
    'generator': {'unet': {'widths': [8]}, 'loop': {'steps': 2, 'batch_size': 4, 'warmup': 0, 'ema_decay': None}},
    'generate': {'images': 6, 'num_inference_steps': 1},
    'classifier': {'backbone': 'resnet10', 'loop': {'steps': 2, 'batch_size': 4, 'warmup': 0}},
    'arms': ['real', 'concat'],
}
CLASSES = 'Nucleoli,Plasma membrane,Cytosol'

# a good call of each command; {home} has the inputs, {work} is an empty folder
COMMANDS = {
    'presets': 'presets',
    'simulate': 'simulate {work}/out --train 12 --val 6 --test 6 --classes Nucleoli,Cytosol --least 1',
    'prepare': 'prepare {home}/challenge {work}/out --size 16 --workers 1',
    'info': 'info {home}/store --sheet {work}/sheet.png',
    'split': 'split {work}/store --train 0.5 --val 0.25 --test 0.25',
    'train-generator': 'train-generator {home}/store {work}/out --preset {home}/preset.yaml',
    'generate': 'generate {home}/generator {work}/out --like {home}/store --images 2 --num-inference-steps 1',
    'train-classifier': 'train-classifier {home}/store {work}/out --preset {home}/preset.yaml --strategy real',
    'evaluate': 'evaluate {home}/classifier {home}/store',
    'thresholds': 'thresholds {home}/classifier {home}/store --out {work}/thresholds.json',
    'fidelity': 'fidelity {home}/store {home}/drawn --classifier {home}/classifier --halves 2 --out {work}/examined',
    'predict': 'predict {home}/classifier {home}/new {work}/predicted.csv --workers 1',
    'export': 'export {home}/classifier {work}/classifier.ts --kind torchscript',
    'report': 'report {work}/run',
    'compare': 'compare {home}/run {work}/run --out {work}/compare.html',
    'run': 'run {home}/preset.yaml --out {work}/out',
    'plan': 'plan {home}/preset.yaml',
}
# further calls, which read further files: name -> words
FURTHER = {
    'generate with a plan': COMMANDS['generate'] + ' --plan {home}/plan.csv',
    'generate with a classifier': COMMANDS['generate'] + ' --classifier {home}/classifier --min-fidelity 0.1',
    'generate by editing': COMMANDS['generate'] + ' --edit 0.5',
    'generate, continued': 'generate {home}/generator {work}/drawing/out --like {home}/store --images 6'
    ' --num-inference-steps 1 --batch-size 2',
    'prepare, continued': 'prepare {home}/challenge {work}/preparing/out --size 16 --workers 1',
    'predict with thresholds': COMMANDS['predict'] + ' --threshold {home}/thresholds.json',
    'predict with a table': COMMANDS['predict'] + ' --threshold {home}/thresholds.csv',
    'predict the challenge': 'predict {home}/classifier {home}/challenge {work}/predicted.csv --workers 1',
    'train-classifier with a teacher': 'train-classifier {home}/store {work}/out --preset {home}/preset.yaml'
    ' --strategy soft_labels --synthetic {home}/drawn --teacher {home}/classifier',
    'train-classifier, finished': 'train-classifier {home}/store {work}/classifier --preset {home}/preset.yaml'
    ' --strategy real',
    'train-generator, finished': 'train-generator {home}/store {work}/generator --preset {home}/preset.yaml',
    'run, continued': 'run {home}/preset.yaml --out {work}/half',
    'run, finished': 'run {home}/preset.yaml --out {work}/run',
    'run on images': 'run {home}/preset.yaml --data {home}/challenge --out {work}/out',
    'run on a store': 'run {home}/preset.yaml --data {home}/store --out {work}/out',
    'info, verified': 'info {home}/store --verify',
}
# options that mean something only beside others
BESIDE = {
    ('generate', 'min_fidelity'): '--classifier {home}/classifier',
    ('generate', 'best_of'): '--classifier {home}/classifier',
    ('train-classifier', 'synthetic'): '--strategy concat',
    ('train-classifier', 'teacher'): '--strategy soft_labels --synthetic {home}/drawn',
    ('train-classifier', 'partners'): '--strategy concat --synthetic {home}/drawn',
    ('train-classifier', 'ratio'): '--strategy concat --synthetic {home}/drawn',
    ('train-classifier', 'option'): '--strategy mix_loss --synthetic {home}/drawn',
    ('split', 'folds'): '',
    ('split', 'test_fold'): '--folds 3',
    ('prepare', 'nucleus'): '--min-foreground 0.1',
}
WITHOUT = {('split', 'folds'): ('--train', '--val', '--test'), ('split', 'test_fold'): ('--train', '--val', '--test')}
OUTPUTS = ('out', 'sheet', 'probabilities')  # parameters that name what is written
SLOW = ('report', 'compare', 'plan', 'fidelity')  # commands that take seconds where nothing is wrong


def copies_of(words):
    "The inputs that a call also writes"
    return tuple(
        dict.fromkeys(re.findall(r'\{work\}/(store|run|half|drawing|preparing|classifier|generator)(?![\w.])', words))
    )


# -- inputs


def make_inputs(home, with_run=True):
    "All inputs, small; in a process of its own"
    home.mkdir(parents=True)
    (home / 'preset.yaml').write_text(yaml.safe_dump(PRESET, sort_keys=False))
    rng = np.random.default_rng(0)
    for folder, prefix, count in (('challenge/train', 'f', 8), ('challenge/test', 't', 2), ('new', 'n', 2)):
        (home / folder).mkdir(parents=True)
        for i in range(count):
            for stain in ('red', 'green', 'blue', 'yellow'):
                pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(home / folder / f'{prefix}{i}_{stain}.png')
    rows = ''.join(f'f{i},{i % 3} 25\n' for i in range(8))
    (home / 'challenge' / 'train.csv').write_text('Id,Target\n' + rows)
    (home / 'plan.csv').write_text('classes,n\nNucleoli,1\nCytosol,1\n')
    commands = [
        f'simulate store --train 12 --val 6 --test 6 --size 32 --least 1 --classes={CLASSES}',
        'train-classifier store classifier --preset preset.yaml --strategy real',
        'train-generator store generator --preset preset.yaml',
        'thresholds classifier store --out thresholds.json',
        'thresholds classifier store --out thresholds.csv',
        'generate generator drawn --like store --images 4 --num-inference-steps 1',
        'run preset.yaml --out run',
    ]
    for command in commands:
        if with_run or not command.startswith('run'):
            good(command, home)
    if not with_run:
        return
    shutil.copytree(home / 'run', home / 'half')
    for name in ('report.html', 'report.ipynb', 'results', 'figures', 'replicate-1/classifiers/concat'):
        wrong.removed(home / 'half' / name)
    for name, command in (
        ('preparing', 'prepare {home}/challenge preparing/out --size 16 --workers 1'),
        ('drawing', 'generate {home}/generator drawing/out --like {home}/store --images 6 --num-inference-steps 1'
         ' --batch-size 2'),
    ):  # fmt: skip
        stopped_midway(command.replace('{home}', str(home)), home, name)


def words_of(text):
    "The words of a call; classes have spaces in their names"
    return re.sub(r'Plasma membrane', 'Plasma\0membrane', text).split(' ') if text else []


def split_words(text):
    return [word.replace('\0', ' ') for word in words_of(text)]


def good(command, folder):
    "A command that must succeed; what it printed is shown where it does not"
    os.chdir(folder)
    out, err = folder.parent / 'made-stdout', folder.parent / 'made-stderr'
    with printed_to(out, err):
        code, detail, _ = call(split_words(command))
    if code:
        raise RuntimeError(f'{command}: {code} {detail}: {err.read_text()[-2000:]}')


def stopped_midway(command, home, name):
    "The partial output of a command that ends without any clean-up, halfway through its changes of files"
    (home / name).mkdir()
    counted = 0

    def count_or_end(limit):
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in ('os.rename', 'os.remove', 'os.mkdir'):
                seen += 1
                if seen == limit:
                    os._exit(0)

        sys.addaudithook(hook)
        good(command, home)
        (home.parent / 'counted').write_text(str(seen))

    in_child(functools.partial(count_or_end, 0))
    counted = int((home.parent / 'counted').read_text())
    wrong.removed(home / name)
    (home / name).mkdir()
    in_child(functools.partial(count_or_end, max(2, counted // 2)))


def files_read(words, home, root):
    "The files of the inputs that a good call opens, as it names them; what it must leave where it continues a store"
    tries = Tries(root)
    noted = root / 'read'

    def watch():
        tries.begin()
        tries.clear()
        for name in copies_of(words):
            shutil.copytree(tries.home / name, tries.work / name, symlinks=True)
        there = [str(path) for folder in (tries.home, tries.work) for path in folder.rglob('*') if path.is_file()]
        opened = {}

        def hook(event, arguments):
            if event == 'open' and isinstance(arguments[0], str | bytes | os.PathLike):
                opened[os.path.abspath(os.fsdecode(arguments[0]))] = None

        sys.addaudithook(hook)
        os.chdir(tries.work)
        with printed_to(root / 'stdout', root / 'stderr'):
            code, detail, trained = call(tries.arguments(Case('', '', '', split_words(words))))
        if code:
            raise RuntimeError(f'{words}: {code} {detail} {(root / "stderr").read_text()[-1500:]}')
        # a library in another language opens weights by itself
        found = [path for path in there if path in opened or path.endswith(f'{os.sep}classifier.safetensors')
                 or path.endswith('model.safetensors')]  # fmt: skip
        used = set(re.findall(r'(\{(?:home|work)\})/(\w+)', words))
        kept = []
        for path in found:
            for folder, mark in ((tries.home, '{home}'), (tries.work, '{work}')):
                if path.startswith(f'{folder}{os.sep}'):
                    name = os.path.relpath(path, folder)
                    if (mark, Path(name).parts[0].split('.')[0]) in used:
                        kept.append(f'{mark}/{name}')
        ends = re.findall(r'\{work\}/(?:drawing|preparing)/out', words)
        right = {
            f'{end}/{file}': content(tries.filled(f'{end}/{file}'))
            for end in ends
            for file in ('images.npy', 'table.csv')
        }
        noted.write_text(json.dumps((kept, right)))

    if in_child(watch):
        return None, {}
    return json.loads(noted.read_text())


# -- cases of options


def odd(work):
    "Things that are no proper files, in the case's own folder"
    folder = work / 'odd'
    (folder / 'folder').mkdir(parents=True)
    (folder / 'void').mkdir()
    (folder / 'folder' / 'keep.txt').write_text('keep this')
    (folder / 'file').write_text('keep this')
    (folder / 'dangling').symlink_to('nowhere')
    (folder / 'loop').symlink_to('loop')
    os.mkfifo(folder / 'pipe')
    if devices():
        os.mknod(folder / 'zero', 0o666 | 0o020000, os.makedev(1, 5))
        os.mknod(folder / 'full', 0o666 | 0o020000, os.makedev(1, 7))


@functools.cache
def devices():
    with tempfile.TemporaryDirectory() as folder:
        return can_make_devices(folder)


STRANGE = {
    'a line break': '{work}/a\nb',
    'a carriage return': '{work}/a\rb',
    'an escape': '{work}/a\x1b[31mb',
    'a surrogate': '{work}/a\udcffb',
    '300 letters': '{work}/' + 'n' * 300,
    '5000 letters': '{work}/' + 'n/' * 2500,
}
ODD = {
    'below a file': '{work}/odd/file/x',
    'a dangling link': '{work}/odd/dangling',
    'below a dangling link': '{work}/odd/dangling/x',
    'a link loop': '{work}/odd/loop',
    'below a link loop': '{work}/odd/loop/x',
    'a pipe': '{work}/odd/pipe',
    'empty': '',
}


def odd_paths():
    if devices():
        return ODD | {'the device zero': '{work}/odd/zero', 'the device full': '{work}/odd/full'}
    return ODD


def input_paths(right):
    "Wrong paths where something is read: what -> value"
    yield 'missing', '{work}/odd/missing'
    yield 'a file of text', '{work}/odd/file'
    yield 'an unrelated folder', '{work}/odd/folder'
    yield 'an empty folder', '{work}/odd/void'
    yield from odd_paths().items()
    yield from STRANGE.items()
    kinds = dict(store='store', drawn='store', challenge='images', new='images', classifier='classifier')
    kinds |= {'generator': 'generator', 'run': 'run', 'half': 'run', 'preset.yaml': 'preset', 'plan.csv': 'plan'}
    kinds |= {'thresholds.json': 'thresholds', 'store/images.npy': '', 'classifier/classifier.safetensors': ''}
    for name, kind in kinds.items():
        if not kind or kind != right:
            yield f'the {name}', f'{{home}}/{name}'


RIGHT = {  # what a parameter wants, where a good call does not show it
    'data': 'images store',
    'like': 'store',
    'synthetic': 'store',
    'teacher': 'classifier',
    'classifier': 'classifier',
    'also': 'classifier',
    'preset': 'preset',
    'plan': 'plan',
    'threshold': 'thresholds',
    'store': 'store',
    'generator': 'generator',
    'labels': '',
    'runs': 'run',
}


FOREIGN = 'a training may lie beside other files, which stay'
INSIDE_IT = 'the page gets its name in a folder'


def output_paths(words, is_file):
    "Wrong paths where something is written: what -> (value, why it may be fine)"
    purpose = 'a file of this kind is replaced' if is_file else ''
    yield 'a file', '{work}/odd/file', purpose
    in_folder = FOREIGN if words.startswith('train') else INSIDE_IT if words.startswith('compare') else ''
    yield 'a folder', '{work}/odd/folder', in_folder
    for what, value in odd_paths().items():
        yield what, value, 'folders that are missing are made' if what == 'below a dangling link' else ''
    for what, value in STRANGE.items():
        yield what, value, '' if 'letters' in what else 'a file may be named so'
    taken = dict.fromkeys(re.findall(r'\{home\}/[\w.]+', words))
    for path in taken:
        yield f'the input {path[7:]}', path, ''
        yield f'in the input {path[7:]}', f'{path}/inside', ''
        yield f'the input {path[7:]} by another way', f'{path}/../{path[7:]}', ''
    yield 'over all inputs', '{home}', INSIDE_IT if words.startswith('compare') else ''
    for path in taken:
        inside = {'store': 'images.npy', 'classifier': 'classifier.json', 'generator': 'pipeline/model_index.json'}
        inside |= {'challenge': 'train.csv', 'new': 'n0_red.png'}
        if path[7:] in inside:
            yield f'a file of the {path[7:]}', f'{path}/{inside[path[7:]]}', ''


def positions(words):
    "Where the arguments stand among the words of a call"
    places, skip = [], False
    for place, word in enumerate(words):
        if place == 0 or skip:
            skip = False
        elif word.startswith('--'):
            skip = '=' not in word
        else:
            places.append(place)
    return places


def with_value(command, parameter, values):
    "A good call with one parameter given otherwise"
    words = split_words(COMMANDS[command])
    dropped = WITHOUT.get((command, parameter.name), ())
    beside = split_words(BESIDE.get((command, parameter.name), ''))
    dropped = {*dropped, *(word for word in beside if word.startswith('--'))}
    if parameter.param_type_name == 'argument':
        arguments = [p.name for p in commands()[command].params if p.param_type_name == 'argument']
        words[positions(words)[arguments.index(parameter.name)]] = values[0]
        return words
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in dropped or word in parameter.opts:
            skip = True
        else:
            kept.append(word)
    return [*kept, *beside, parameter.opts[0], *values]


@functools.cache
def commands():
    import typer

    from protloc.cli import app

    return {name: command for name, command in typer.main.get_command(app).commands.items() if not command.hidden}


@functools.cache
def kinds_of(command):
    "The types of a command's parameters"
    from protloc.cli import app

    for registered in app.registered_commands:
        name = registered.name or registered.callback.__name__.replace('_', '-')
        if name == command:
            return typing.get_type_hints(registered.callback)
    raise LookupError(command)


def base_type(annotation):
    "Path of Path | None and list[Path]; (float, float) of a pair"
    parts = [part for part in wrong.parts_of(annotation) if part is not type(None)]
    inside = parts[0]
    if typing.get_origin(inside) is list:
        return base_type(typing.get_args(inside)[0])
    return typing.get_args(inside) if typing.get_origin(inside) is tuple else inside


FINE_NUMBERS = {  # (parameter, value) -> why it is no mistake; * for all
    ('seed', '0'): 'a seed may be 0',
    ('workers', '-1'): 'one for each core',
    ('distance', '0'): 'copies alone',
    ('test_fold', '0'): 'folds are counted from 0',
    ('min_foreground', '0'): 'nothing is dropped',
    ('min_fidelity', '0'): 'nothing is dropped',
    ('guidance_rescale', '0'): 'nothing is taken back',
    ('guidance_scale', '0'): 'a scale below 1 is weaker than none',
    ('guidance_scale', '-1'): 'a scale below 0 leads away',
    ('temper', '0'): 'all label sets are alike',
    ('shift', '0'): 'not moved',
    ('similarity', '0'): 'all are alike',
    ('train', '0'): 'a split may be empty',
    ('val', '0'): 'a split may be empty',
    ('test', '0'): 'a split may be empty',
    ('seed', '1000000000000'): 'seeds are large numbers',
    ('workers', '0'): 'no process beside this one',
}
INSIDE = {  # values of shares and scales that lie inside the bounds
    'guidance_scale': ('1.5',),
    'temper': ('1.5',),
    'ratio': ('1.5',),
}
FINE_TEXTS = {  # (parameter, what) -> why it is no mistake; * for all
    ('*', 'empty'): 'as if it were not given',
    ('exclude', '*'): 'a pattern may fit nothing',
    ('split', 'empty'): 'all images',
    ('match', 'star'): 'a pattern that fits all',
}
WRONG_PAIRS = ('nan nan', '0.9 0.1', '-1 2', 'abc 1', '1e400 0', '0 1000000000000', '0 0', ' ')


def as_sentences_have(value):
    "Parts of a value by which a sentence may name it"
    if not value:
        return ['. ', 'empty', "''"]  # the path '' is this folder
    if len(value) >= 60:
        return [value.replace('{work}/', '')[:20]]
    parts = {value.replace('{work}/', '').replace('{home}/', ''), os.path.basename(value), value.split('/')[-1]}
    parts |= {'/home'} if value == '{home}' else set()
    parts |= {text.encode('ascii', 'backslashreplace').decode() for text in parts}
    parts |= {repr(text)[1:-1] for text in parts} | {value.replace('_', '') if value[0].isdigit() else value}
    parts |= {part for text in parts for part in text.split('/')} | {'nowhere'}
    return [text for text in parts if text.isprintable() and (len(text) > 2 or not text.isalnum())]


def option_cases():
    for command, declared in commands().items():
        if command not in COMMANDS:
            what = 'no good call is known: add one to COMMANDS'
            yield Case('option', f'{command} (new)', what, [command, '--nothing'])
            continue
        yield from call_cases(command, declared, copies_of(COMMANDS[command]))
        for parameter in declared.params:
            if parameter.name != 'help':
                yield from parameter_cases(command, parameter)


def parameter_cases(command, parameter):
    "A good call with one parameter given otherwise, in all ways that its type has"
    name = parameter.name
    label = name.upper() if parameter.param_type_name == 'argument' else parameter.opts[0]
    named = {label, name, name.replace('_', '-'), name.replace('_', ' '), name.rstrip('s')}
    always = dict(copies=copies_of(COMMANDS[command]), slow=command in SLOW)

    def case(what, values, fine='', spoil=odd):
        shown = {part for value in values for part in as_sentences_have(value)}
        words = with_value(command, parameter, values)
        return Case('option', f'{command} {label}', what, words, tuple(named | shown), fine=fine, spoil=spoil, **always)

    kind = base_type(kinds_of(command)[name])
    if kind is bool:
        words = [*split_words(COMMANDS[command]), f'{label}=maybe']
        yield Case('option', f'{command} {label}', 'a value', words, tuple(named), **always)
    elif isinstance(kind, tuple):
        for pair in WRONG_PAIRS:
            yield case(f'numbers {pair}', pair.split(' '), spoil=None)
    elif kind in (int, float):
        yield from number_cases(parameter, case)
    elif kind is Path:
        yield from path_cases(command, parameter, case)
    else:
        yield from text_cases(parameter, case)


def number_cases(parameter, case):
    for text, reason in wrong.NUMBERS.items():
        what = text if len(text) < 30 else f'{len(text)} digits'
        fine = FINE_NUMBERS.get((parameter.name, text), '')
        if reason:
            fine = reason
        if text in INSIDE.get(parameter.name, ()):
            fine = 'it lies inside the bounds'
        yield case(what or 'empty', [text], fine, None)


def path_cases(command, parameter, case):
    good_words = split_words(COMMANDS[command])
    if parameter.name in OUTPUTS:
        place = next((word for word in good_words if word.startswith('{work}')), '')
        is_file = bool(Path(place).suffix)
        for what, value, fine in output_paths(COMMANDS[command], is_file):
            yield case(what, [value], fine)
        if command == 'predict' and parameter.name == 'probabilities':
            yield case('the other output', ['{work}/predicted.csv'])
        return
    right = RIGHT.get(parameter.name, 'run' if command == 'report' else 'images' if parameter.name == 'folder' else '')
    for what, value in input_paths(right):
        fine = ''
        if parameter.name == 'data' and value in ('{home}/store', '{home}/drawn', '{home}/challenge', '{home}/new'):
            fine = 'images are wanted'
        if command == 'report' and value == '{home}/run':
            continue
        yield case(what, [value], fine)


def text_cases(parameter, case):
    for what, value in wrong.TEXTS.items():
        fine = FINE_TEXTS.get((parameter.name, what), FINE_TEXTS.get((parameter.name, '*'), ''))
        yield case(what, [value], fine or FINE_TEXTS.get(('*', what), ''), None)
    default = parameter.default
    if isinstance(default, str) and default.lower() != default.upper():
        yield case('another case', [default.swapcase()], 'letters of either case may be meant', None)
    if RIGHT.get(parameter.name, None) is not None:
        for what, value in input_paths(RIGHT[parameter.name]):
            yield case(what, [value], 'as if it were not given' if value == '' else '')


def call_cases(command, declared, copies):
    "A call that is wrong as a whole"
    words = split_words(COMMANDS[command])
    stratum = f'{command} (the call)'

    def case(what, words, names=(), fine=''):
        return Case('option', stratum, what, words, names, fine, copies, slow=command in SLOW)

    yield case('an unknown option', [*words, '--no-such-option'], ('no-such-option',))
    yield case('an unknown option with a value', [*words, '--no-such=5'], ('no-such',))
    yield case('an option of one letter', [*words, '-q'], ('-q',))
    yield case('an argument too many', [*words, 'one-too-many', 'and-another'], ('one-too-many', 'argument'))
    yield case('no arguments', [command], fine='' if positions(words) and command != 'run' else 'none are needed')
    yield case('a line break in an option', [*words, '--a\nb'])
    options = [parameter for parameter in declared.params if parameter.param_type_name == 'option']
    for parameter in options:
        if kinds_of(command).get(parameter.name) is not bool and parameter.name != 'help':
            yield case(f'{parameter.opts[0]} without a value', [*words, parameter.opts[0]], (parameter.opts[0],))
            break
    if options:
        yield case('an option in capitals', [*words, options[0].opts[0].upper(), '1'], (options[0].opts[0].upper(),))


def outer_cases():
    "Wrong before any command"
    for what, words, names in (
        ('an unknown command', ['trian'], ('trian',)),
        ('an unknown option', ['--no-such-option'], ('no-such-option',)),
        ('an empty command', [''], ()),
        ('a line break', ['a\nb'], ()),
        ('a command in capitals', ['SIMULATE'], ('SIMULATE',)),
        ('a long command', ['x' * 10_000], ()),
        ('a surrogate', ['a\udcffb'], ()),
    ):
        yield Case('option', 'protloc', what, words, names)


# -- cases of settings


def values_for(kind, name):
    yield from wrong.VALUES.items()
    for what, text in wrong.edges(kind, name):
        yield f'just outside {what}', text


def settings():
    from protloc.study.arms import ArmConfig, StudyConfig

    yield from ((name, kind, field, '{}') for name, kind, field in wrong.fields_of(StudyConfig))
    for field in ArmConfig.model_fields:
        beside = (
            'strategy: concat' if field == 'name' else 'name: other' + (', strategy: concat' * (field != 'strategy'))
        )
        yield f'arms.{field}', ArmConfig, field, f'[real, {{{beside}, {field}: {{}}}}]'


def setting_call(name):
    "The call of `run` that reads a setting"
    if name.startswith('data.prepare'):
        return COMMANDS['run'] + ' --data {home}/challenge'
    return COMMANDS['run'] + ('' if name.startswith('data') else ' --data {home}/store')


def as_yaml(key, text):
    "The preset with a setting given otherwise, as a text"
    mark = '--the-value--'
    values = json.loads(json.dumps(PRESET))
    inside = values
    *above, last = key.split('.')
    for part in above:
        if not isinstance(inside.get(part), dict):
            inside[part] = {}
        inside = inside[part]
    inside[last] = mark
    return yaml.safe_dump(values, sort_keys=False, width=1_000_000).replace(mark, text)


def write_preset(text):
    def spoil(work):
        (work / 'preset.yaml').write_bytes(text.encode('utf-8', 'surrogatepass'))

    return spoil


def setting_case(name, key, field, what, value, text):
    "A setting given by --set, in a preset's file, or to the command of its section: each by its turn"
    names = {field, name, *name.split('.')[-2:], field.replace('_', ' '), *([text] if 2 < len(text) < 60 else [])}
    section, _, rest = name.partition('.')
    ways = 3 if rest and section in ('generator', 'classifier') else 2
    way = draw_of(f'{name} {what}') % ways
    words = split_words(setting_call(name))
    if way == 0:
        return Case('setting', name, what, [*words, '--set', f'{key}={value}'], tuple(names))
    if way == 1:
        words = [word.replace('{home}/preset.yaml', '{work}/preset.yaml') for word in words]
        spoil = write_preset(as_yaml(key, value))
        return Case('setting', name, f'{what}, in a file', words, (*names, 'preset.yaml'), spoil=spoil)
    words = [*split_words(COMMANDS[f'train-{section}']), '--set', f'{rest}={value}']
    return Case('setting', name, f'{what}, of its command', words, tuple(names))


def draw_of(text):
    "A number that depends on a text alone"
    return int.from_bytes(hashlib.sha256(f'{SEED}/{text}'.encode('utf-8', 'replace')).digest()[:4], 'big')


def setting_cases():
    for name, kind, field, form in settings():
        key = 'arms' if name.startswith('arms.') else name
        for what, text in values_for(kind, field):
            if wrong.allows(kind, field, text):
                continue
            value = form.replace('{}', text, 1) if form != '{}' else text
            yield setting_case(name, key, field, what, value, text)
    for what, text in (
        ('no equals', 'seed'), ('no name', '=5'), ('empty', ''), ('a part of a number', 'replicates.a.b=5'),
        ('points', '..=5'),
        ('an unknown setting', 'seedz=5'), ('an unknown part', 'classifier.lop.steps=5'), ('a line break', 'a\nb=5'),
        ('a long name', f'{"a." * 3000}b=1'), ('a surrogate', 'a\udcff=5'), ('a part of a list', 'arms.0=real'),
    ):  # fmt: skip
        for command in ('run', 'train-generator', 'train-classifier'):
            yield Case('setting', f'--set of {command}', what, [*split_words(COMMANDS[command]), '--set', text])


READ_A_PRESET = ('run', 'train-generator', 'generate', 'train-classifier')


def yaml_cases():
    for command in READ_A_PRESET:
        words = [word.replace('{home}/preset.yaml', '{work}/preset.yaml') for word in split_words(COMMANDS[command])]
        if command == 'generate':
            words += ['--preset', '{work}/preset.yaml']
        good_text = yaml.safe_dump(PRESET, sort_keys=False).encode()
        for what, (text, fine) in wrong.yaml_shapes(good_text).items():

            def spoil(work, text=text):
                (work / 'preset.yaml').write_bytes(text)

            only_others = command != 'run' and what in (
                'unknown section',
                '5 MB',
                'huge number',
                'timestamp',
                '5 MB of keys',
            )
            fine = fine or ('a section of another command' if only_others else '')
            yield Case('yaml', f'preset of {command}', what, words, ('preset', 'yaml'), fine, spoil=spoil)


# -- cases of files

NO_CHECKSUM = 'a text that people may edit has no checksum'
TEXT = r'(?<!table)\.(csv|json|jsonl|yaml)$'
FINE_FILES = [  # (file, what) as patterns -> why it may be fine
    (TEXT, r'a byte flipped|an early byte flipped|cut by a byte', NO_CHECKSUM),
    (
        r'\.png$',
        r'a byte flipped|cut by a byte|100 bytes more|an early byte flipped',
        'an image may be whole after all',
    ),
    (r'\.png$', 'colours', 'an image whose channels are equal is one of grey values'),
    (r'\.png$', 'black', 'an image may be black'),
    (r'\.png$', 'a TIFF of floats', 'formats are recognised by content'),
    (r'\.safetensors$', 'a byte flipped|an early byte flipped', 'weights have no checksum'),
    (r'\.safetensors$', 'halves|whole numbers', 'weights are converted'),
    (r'manifest\.json$', r'sha256\.checksums (gone|is null)', 'older stores have none'),
    (r'checksums\.npy$', 'another shape', 'an array of one axis keeps its shape'),
    (
        r'classifier\.json$',
        r'(pooling|head|fields|depths|depths\.0) gone|(fields|depths) is empty',
        'older ones have none',
    ),
    (r'manifest\.json$', r'made\b.*', 'a note that is shown and not used'),
    (r'plan.*\.csv$', 'classes empty', 'an image may be drawn without a label'),
    (r'(challenge|plan|thresholds).*\.csv$', 'a column twice', 'columns that nobody asks for are let be'),
    (r'(challenge|plan).*\.csv$', 'a row less|a row twice|the columns renamed', 'a shorter table is a table'),
    (r'\.yaml$', 'empty|comment alone|byte order mark|CRLF', 'settings have defaults'),
    (r'(README\.md|samples\.png|log\.jsonl)$', '.*', 'it is for people alone'),
    (r'lock$', '.*', 'a lock holds a note for people'),
    (r'pipeline/.*\.json$', r'_\w+ .*', 'a note of diffusers'),
    (r'pipeline/.*\.safetensors$', 'a tensor more', 'what is not needed is let be'),
    (r'pipeline/.*config\.json$', r'.* gone', 'diffusers fills in what is missing'),
    (r'scheduler_config\.json$', 'time_shift_type is null', 'it is not set'),
    (r'scheduler_config\.json$', 'lambda_min_clipped is negative', 'this bound may be negative'),
    (
        r'unet/config\.json$',
        r'(num_train_timesteps|num_class_embeds|attn_norm_num_groups) is a number',
        'null and numbers are taken there',
    ),
    (
        r'(manifest|model_index)\.json$',
        r'(channels|classes)\.\d+ is (another text|above)',
        'names are what the file says that they are',
    ),
    (r'unet/config\.json$', '(attention_head_dim|mid_block_type) is null', 'null is taken there'),
    (r'model_index\.json$', r'(condition|conditions) gone|conditions is empty', 'older generators have none'),
    (r'training\.json$', 'seed is huge', 'a seed may be large'),
    (r'classifier\.json$', 'depths is twice', 'a set of depths'),
    (r'training\.json$', 'removed|a dangling link|a link to itself|a pipe|a folder', 'older generators have none'),
    (r'training\.json$', r'(config|store|versions|images|made|seen)\b.*', 'a note of how it was trained'),
    (r'run/|half/', '.*', 'the stage that wrote it may be finished'),
    (r'\{work\}/(classifier|generator)', '.*', 'what is finished need not be read again'),
    (r'\{work\}/(drawing|preparing)', '.*', 'it may begin again, if it ends in the same images'),
]
OF_SLOW = (
    'removed',
    'empty',
    'cut in half',
    'noise',
    'JSON list',
    'no rows',
    'NaN',
    'objects',
    'the header alone',
    'a pipe',
)


def file_fine(file, what):
    found = (
        reason for pattern, spoiled, reason in FINE_FILES if re.search(pattern, file) and re.fullmatch(spoiled, what)
    )
    return next(found, '')


def of_run(home):
    "The files of a run that may be read for its report, by whatever process"
    places = (str(path.relative_to(home)) for path in sorted((home / 'run').rglob('*')) if path.is_file())
    return [f'{{work}}/{place}' for place in places if not re.search(r'(figures|results)/|last\.|best\.', place)]


def spoilings_of(path, command, is_first):
    "The ways to spoil a file that are tried in this call"
    by_key = re.compile(r'.* (gone|is .*)')
    shapes = set(wrong.yaml_shapes(b''))
    for what, spoil in wrong.spoilings(path):
        if command in SLOW and what not in OF_SLOW:
            continue
        if path.suffix in ('.yaml', '.yml') and (
            what in shapes - set(wrong.ANY) or by_key.fullmatch(what) and not is_first
        ):
            continue
        # what another call has shown for this file need not be shown again
        if by_key.fullmatch(what) and (not is_first or path.name == 'preset.yaml'):
            continue
        # a run has many files that are alike
        if by_key.fullmatch(what) and re.search(r'/(run|half)/', str(path)) and draw_of(f'{path.name} {what}') % 8:
            continue
        yield what, spoil


def file_cases(tries):
    others = ('presets', 'simulate', 'plan')  # which read no file, or what `run` reads
    calls = {name: words for name, words in (COMMANDS | FURTHER).items() if name not in others}
    shown = set()
    for name, words in calls.items():
        read, right = (of_run(tries.home), {}) if name == 'report' else files_read(words, tries.home, tries.root)
        if read is None:
            yield Case(
                'file', name, 'the good call fails', split_words(words), fine='it is good', copies=copies_of(words)
            )
            continue
        command = words.split(' ')[0]
        copies = copies_of(words)
        grows = bool(copies) and command != 'split'
        for file in read:
            path = tries.home / file[7:]
            names = (path.name, *path.relative_to(tries.home).parts)
            stratum = f'{name}: {file[7:]}'
            for what, spoil in spoilings_of(path, command, file[7:] not in shown):
                yield Case(
                    'file', stratum, what, split_words(words), names, file_fine(file, what), copies, file, spoil, grows,
                    right if file.startswith('{work}') else {}, command in SLOW,
                )  # fmt: skip
            if command not in SLOW:
                shown.add(file[7:])
        for root in dict.fromkeys('/'.join(file.split('/')[:2]) for file in read if file.count('/') > 1):
            for what in ('removed', 'a link to itself', 'a dangling link', 'a pipe'):
                again = (
                    root.startswith('{work}') and grows and (what == 'removed' or what == 'a dangling link' and right)
                )
                fine = 'it begins again, and makes folders that are missing' if again else ''
                yield Case(
                    'file', f'{name}: {root[7:]}', what, split_words(words), (root[7:], 'nowhere'), fine, copies, root,
                    wrong.ANY[what], grows, right, command in SLOW,
                )  # fmt: skip


def thinned(cases):
    "Of files that are alike, such as the images of a folder, the first one"
    seen = {}
    for case in cases:
        alike = re.sub(r'[a-z]\d+_(red|green|blue|yellow)\.png', '*.png', case.stratum)
        first = seen.setdefault(alike, case.stratum)
        if first == case.stratum:
            yield case


def all_cases(tries):
    yield from outer_cases()
    yield from option_cases()
    yield from setting_cases()
    yield from yaml_cases()
    yield from thinned(file_cases(tries))


def choose(cases, count=CHOSEN, seed=SEED):
    "Some cases of every stratum, each by its turn; always the same ones"
    strata = collections.defaultdict(list)
    for case in cases:
        strata[case.group, case.stratum].append(case)
    for members in strata.values():
        members.sort(key=lambda case: draw_of(f'{seed} {case.name}'))
    slow = sorted(stratum for stratum, members in strata.items() if all(case.slow for case in members))
    groups = set()
    for place, stratum in enumerate(slow):
        members = strata.pop(stratum)
        # what takes seconds is tried for a few strata, and for one of every group
        of_command = stratum[0], re.split(r'[ :]', stratum[1])[0]
        if place % max(1, len(slow) // SLOW_CHOSEN) == 0 or of_command not in groups:
            strata['slow', ''] += members[:1]
        groups.add(of_command)
    for stratum in strata:
        if stratum[0] != 'slow':
            strata[stratum] = [case for case in strata[stratum] if not case.slow]
    chosen = []
    turn = 0
    while len(chosen) < count and any(len(members) > turn for members in strata.values()):
        chosen += [members[turn] for key, members in strata.items() if len(members) > turn and key[0] != 'slow']
        turn += 1
    return [*chosen[:count], *strata.get(('slow', ''), [])]


# -- as a program


def table_of(cases, results):
    "Counts by group"
    kinds = ('traceback', 'hang', 'died', 'taken', 'exit code', 'usage', 'no sentence', 'several lines', 'long',
             'unprintable', 'unnamed', 'input hurt', 'left over', 'wrong result')  # fmt: skip
    rows = collections.defaultdict(collections.Counter)
    for place, case in enumerate(cases):
        result = results[place]
        for row in (rows[f'{case.group}: {group_of(case)}'], rows['all']):
            row['cases'] += 1
            row['good'] += not result.faults
            row['seconds'] += result.seconds
            for fault in result.faults:
                row[fault] += 1
    used = [kind for kind in kinds if rows['all'][kind]]
    head = ['group', 'cases', 'good', *used, 'seconds']
    lines = [head] + [
        [name, row['cases'], row['good'], *(row[kind] for kind in used), f'{row["seconds"]:.1f}']
        for name, row in sorted(rows.items(), key=lambda item: (item[0] == 'all', item[0]))
    ]
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(head))]
    return '\n'.join(
        '  '.join(str(cell).ljust(width) if not n else str(cell).rjust(width)
                  for n, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines
    )  # fmt: skip


def group_of(case):
    "The part of a group that is shown on one line, and tested as one"
    if case.group == 'setting':
        return re.split(r'[. ]', case.stratum)[0]
    return re.split(r'[ ,:]', case.stratum)[0] if case.group != 'yaml' else case.stratum.split()[-1]


def write_report(path, cases, results):
    with open(path, 'w', newline='', errors='backslashreplace') as file:
        out = csv.writer(file)
        out.writerow(
            ('group', 'part', 'stratum', 'case', 'faults', 'code', 'seconds', 'sentence', 'detail', 'fine', 'words')
        )
        for place, case in enumerate(cases):
            result = results[place]
            words = ' '.join(
                word if len(word) < 200 else f'{word[:60]}... ({len(word)} letters)' for word in case.words
            )
            out.writerow((case.group, group_of(case), case.stratum, case.what, '+'.join(result.faults), result.code,
                          f'{result.seconds:.3f}', result.sentence[:1200], result.detail, case.fine,
                          repr(words)))  # fmt: skip


def tracebacks(cases, results):
    "Distinct tracebacks: how often, the exception, the place, one case"
    kinds = collections.defaultdict(list)
    for place, case in enumerate(cases):
        result = results[place]
        if 'traceback' in result.faults:
            parts = re.match(r'(\S+) at (.*?:\d+ \S+|): ?(.*)', result.detail) or re.match(
                r'(.*)( at .*)()', result.detail
            )
            key = (parts[1], parts[2]) if parts else (result.detail[:80], '')
            kinds[key].append((case.name, result.detail))
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return '\n'.join(f'{len(found):5}  {key[0]}  {key[1]}\n       e.g. {found[0][0]}\n       {found[0][1][:200]}'
                     for key, found in ordered)  # fmt: skip


def prepare_tries(root):
    "Folders with all inputs"
    tries = Tries(root)

    def make():
        import torch

        torch.set_num_threads(1)
        make_inputs(tries.home)

    if in_child(make):
        raise RuntimeError('the inputs could not be made')
    tries.keep_all()
    return tries


def warm_up():
    "Import all that commands import, before any process is forked"
    import diffusers  # noqa: F401
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    from safetensors import safe_open  # noqa: F401

    import protloc.classify.export
    import protloc.classify.submission
    import protloc.classify.thresholds
    import protloc.classify.train
    import protloc.data.prepare
    import protloc.data.resplit
    import protloc.data.simulate.datasets
    import protloc.diffusion.train
    import protloc.study.compare
    import protloc.study.draw
    import protloc.study.report
    import protloc.study.runner  # noqa: F401

    torch.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--all', action='store_true', help='all cases, not the chosen ones')
    parser.add_argument('--count', type=int, default=CHOSEN, help='how many are chosen')
    parser.add_argument('--only', default='', metavar='PATTERN', help='cases whose name fits a regular expression')
    parser.add_argument('--report', type=Path, metavar='FILE.csv', help='write a row for each case')
    parser.add_argument('--tracebacks', type=Path, metavar='FILE', help='write the distinct tracebacks')
    parser.add_argument('--list', action='store_true', help='name the cases, and try none')
    parser.add_argument('--show', type=int, default=40, help='how many faulty cases are printed')
    asked = parser.parse_args()
    began = time.time()
    warm_up()
    with tempfile.TemporaryDirectory(prefix='faults-', ignore_cleanup_errors=True) as folder:
        tries = prepare_tries(Path(folder).resolve())
        made = time.time()
        cases = list(all_cases(tries))
        total = len(cases)
        strata = len({(case.group, case.stratum) for case in cases})
        if not asked.all and not asked.only:
            cases = choose(cases, asked.count)
        cases = [case for case in cases if re.search(asked.only, case.name)]
        listed = time.time()
        print(f'{len(cases)} of {total} cases in {strata} strata; imports and inputs {made - began:.0f} s,'
              f' files read {listed - made:.0f} s', flush=True)  # fmt: skip
        if asked.list:
            print('\n'.join(ascii(case.name)[1:-1] for case in cases))
            return 0
        results = {}

        def seen(place, result):
            results[place] = result
            if len(results) % 500 == 0:
                print(f'{len(results)} cases, {time.time() - listed:.0f} s', flush=True)
                save(results)

        def save(results):
            known = [place for place in range(len(cases)) if place in results]
            some, of_some = [cases[place] for place in known], {n: results[place] for n, place in enumerate(known)}
            if asked.report:
                write_report(asked.report, some, of_some)
            if asked.tracebacks:
                asked.tracebacks.write_text(tracebacks(some, of_some) + '\n', errors='backslashreplace')

        run_cases(tries, cases, seen)
        save(results)
        os.chdir('/')
    print(table_of(cases, results))
    faulty = [(case, results[place]) for place, case in enumerate(cases) if results[place].faults]
    for case, result in faulty[: asked.show]:
        print(ascii(f'{"+".join(result.faults)}: {case.name}: {(result.detail or result.sentence)[:200]}')[1:-1])
    print(f'{len(cases)} cases, {len(faulty)} faulty, {time.time() - began:.0f} s')
    return int(bool(faulty))


if __name__ == '__main__':
    sys.exit(main())
