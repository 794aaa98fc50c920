"""Wrong values: of numbers, texts and paths, of settings, of files. Each is a name and a value, or a way to spoil."""

import functools
import json
import os
import random
import struct
import types
import typing
import zlib
from pathlib import Path

import numpy as np
import pydantic
import yaml

LONG = 'x' * 10_000

# what is written -> why Python may read it as a small whole number; '' where no command can use it
NUMBERS = {
    '-1': '',
    '0': '',
    'nan': '',
    'inf': '',
    '-inf': '',
    '1e400': '',
    '1000000000000': '',
    '9' * 5000: '',
    '': '',
    'abc': '',
    '\u0661': 'Python reads the digits of all scripts',
    '1_000': 'Python reads underscores in numbers',
    '0x10': '',
    ' 1': 'Python reads spaces around numbers',
    '1.5': '',
    '-1000000000000': '',
    '1,5': '',
    '1;rm': '',
}

TEXTS = {
    'empty': '',
    'long': LONG,
    'line break': 'a\nb',
    'carriage return': 'a\rb',
    'escape': 'a\x1b[31mb',
    'surrogate': 'a\udcffb',
    'above': '../x',
    'absolute': '/x/y',
    'formula': '=1+1',
    'unknown': 'no-such-name',
    'comma': ',',
    'two commas': 'a,,b',
    'equals': '=',
    'bracket': '(',
    'star': '*',
    'blank': '   ',
    'number': '12345678901234567890',
    'right to left': 'a\u202eb',
    'unicode': '\u2603',
}

# -- settings: YAML texts

VALUES = {
    'list': '[1, 2]',
    'mapping': '{a: 1}',
    'null': 'null',
    'true': 'true',
    'text': 'abc',
    'date': '2020-01-01',
    'nan': '.nan',
    'inf': '.inf',
    'minus inf': '-.inf',
    'minus one': '-1',
    'zero': '0',
    'huge': '1000000000000',
    'minus huge': '-1000000000000',
    'beyond floats': '1' + '0' * 400,
    '5000 digits': '9' * 5000,
    'fraction': '1.5',
    'empty': '""',
    'formula': '"=1+1"',
    'above': '"../x"',
    'line break': '"a\\nb"',
    'NUL': '"a\\0b"',
    'escape': '"a\\e[31mb"',
    'long': f'"{LONG}"',
    'nested': '[' * 50 + ']' * 50,
    'deep': '[' * 3000 + ']' * 3000,
    'code': '!!python/object/apply:os.getcwd []',
    'cycle': '&a [*a]',
    'list of wrong': '[abc, null, {a: [1]}]',
    'mapping of wrong': '{a: abc, 1: null, null: []}',
    'mapping of huge': '{train: 1000000000000, val: -1, test: .nan}',
    'binary': '!!binary aGVsbG8=',
    'set': '!!set {a, b}',
    'open': '[1, 2',
    'surrogate': '"\\uDCFF"',
}


def fields_of(kind, above=''):
    "Every setting below a class of settings: (dotted name, class, field's name)"
    for name, info in kind.model_fields.items():
        yield above + name, kind, name
        for part in parts_of(info.annotation):
            if isinstance(part, type) and issubclass(part, pydantic.BaseModel) and not is_listed(info.annotation):
                yield from fields_of(part, f'{above}{name}.')


def parts_of(annotation):
    "X of X, X | None and Annotated[X, ...]"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from parts_of(part)
    else:
        yield annotation


def is_listed(annotation):
    return any(typing.get_origin(part) in (tuple, list, dict) for part in parts_of(annotation))


_BROKEN = object()


@functools.cache
def parsed(text):
    "The value of a YAML text"
    try:
        return yaml.load(text, yaml.CSafeLoader) if len(text) < 500 or text[0] == '"' else _BROKEN
    except (yaml.YAMLError, ValueError, RecursionError):
        return _BROKEN


@functools.cache
def model_of(kind, name):
    "A class with one field alone"
    info = kind.model_fields[name]
    return pydantic.create_model('One', __base__=kind.__base__, value=(info.annotation, info))


def allows(kind, name, text):
    "Whether a field's own declaration has this value inside its bounds, on both sides"
    value = parsed(text)
    if value is _BROKEN or isinstance(value, str) and not value.isprintable():
        return False
    try:
        model_of(kind, name).model_validate({'value': value})
    except (pydantic.ValidationError, RecursionError, ValueError, TypeError):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        bounds = [vars_of(part) for part in kind.model_fields[name].metadata]
        upper = any('le' in bound or 'lt' in bound for bound in bounds)
        lower = any('ge' in bound or 'gt' in bound for bound in bounds)
        return not (value >= 10**12 and not upper or value <= -1 and not lower)
    return True


def vars_of(bound):
    return {name for name in ('le', 'lt', 'ge', 'gt') if getattr(bound, name, None) is not None}


def edges(kind, name):
    "Values just outside a field's bounds"
    for bound in kind.model_fields[name].metadata:
        for side, step in (('ge', -1), ('gt', 0), ('le', 1), ('lt', 0)):
            limit = getattr(bound, side, None)
            if isinstance(limit, int | float):
                yield f'{side} {limit}', str(limit + step)


# -- the file of a preset, whatever its shape


def billion_laughs(levels=12, width=10):
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x, x]']
    for level in range(1, levels):
        lines.append(f'a{level}: &a{level} [{", ".join([f"*a{level - 1}"] * width)}]')
    return '\n'.join(lines) + '\n'


def yaml_shapes(good):
    "Contents of a YAML file of settings that cannot be used: name -> (bytes, why it may be fine)"
    return {
        'empty': (b'', 'all settings have defaults'),
        'comment alone': (b'# nothing\n', 'all settings have defaults'),
        'binary': (random.Random(0).randbytes(3000), ''),
        'list': (b'- a\n- b\n', ''),
        'scalar': (b'5\n', ''),
        'text': (b'hello\n', ''),
        'tabs': (b'data:\n\tsimulate: 1\n', ''),
        'laughs': (billion_laughs().encode(), ''),
        'laughs in a setting': (f'generator:\n  {billion_laughs()}'.replace('\n', '\n  ').encode(), ''),
        'cycle': (b'data: &a {simulate: *a}\n', ''),
        'cycle in a key': (b'? &a [*a]\n: 1\n', ''),
        'list as a key': (b'? [1, 2]\n: 1\n', ''),
        'mapping as a key': (b'? {a: 1}\n: 1\n', ''),
        'null as a key': (b'null: 1\n', ''),
        'number as a key': (b'5: 1\n', ''),
        'key twice': (good + b'replicates: 2\nreplicates: 3\n', ''),
        'deep': (b'data: ' + b'[' * 5000 + b']' * 5000 + b'\n', ''),
        'deep mappings': (b'data: ' + b'{a: ' * 2000 + b'1' + b'}' * 2000 + b'\n', ''),
        'deeply indented': (''.join(' ' * n + f'k{n}:\n' for n in range(600)).encode(), ''),
        'UTF-16': (good.decode().encode('utf-16'), ''),
        'UTF-32': (good.decode().encode('utf-32'), ''),
        'byte order mark': (b'\xef\xbb\xbf' + good, 'a mark at the start is skipped'),
        'latin-1': ('about: caf\xe9\n'.encode('latin-1') + good, ''),
        'NUL': (good + b'\0', ''),
        '5 MB': (good + b'about2: ' + b'x' * 5_000_000 + b'\n', ''),
        '5 MB of keys': (b''.join(b'k%d: 1\n' % n for n in range(200_000)), ''),
        'two documents': (good + b'---\n' + good, ''),
        'code': (b'data: !!python/object/apply:os.getcwd []\n', ''),
        'unknown tag': (b'data: !wrong 1\n', ''),
        'unknown alias': (b'data: *unknown\n', ''),
        'half': (good[: len(good) // 2 - 3], 'the settings of the second half have defaults'),
        'merge of a scalar': (b'<<: 5\n', ''),
        'merge of itself': (b'&a\n<<: *a\nreplicates: 2\n', ''),
        'CRLF': (good.replace(b'\n', b'\r\n'), 'lines may end as in Windows'),
        'unknown section': (good + b'generatr: {}\n', ''),
        'HTML': (b'<html><body>404</body></html>\n', ''),
        'JSON cut': (b'{"data": {"simulate"', ''),
        'huge number': (good + b'seed: ' + b'9' * 6000 + b'\n', ''),
        'timestamp': (good + b'seed: 2020-01-01\n', ''),
    }


# -- files: name -> (spoil(path), why it may be fine)


def removed(path):
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink()


def emptied(path):
    path.write_bytes(b'')


def halved(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x41
    path.write_bytes(content)


def flipped_early(path):
    content = bytearray(path.read_bytes())
    content[min(9, len(content) - 1)] ^= 0x80
    path.write_bytes(content)


def noise(path):
    path.write_bytes(random.Random(path.name).randbytes(max(100, min(path.stat().st_size, 100_000))))


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def grown(path):
    path.write_bytes(path.read_bytes() + b'\0' * 100)


def folder_instead(path):
    removed(path)
    path.mkdir()


def link_loop(path):
    removed(path)
    path.symlink_to(path.name)


def dangling(path):
    removed(path)
    path.symlink_to('nowhere')


def pipe_instead(path):
    removed(path)
    os.mkfifo(path)


def html(path):
    path.write_text('<!DOCTYPE html><html><body>404 Not Found</body></html>')


ANY = {
    'removed': removed,
    'empty': emptied,
    'cut in half': halved,
    'cut by a byte': cut,
    'a byte flipped': flipped,
    'an early byte flipped': flipped_early,
    'noise': noise,
    'zeros': zeros,
    '100 bytes more': grown,
    'a folder': folder_instead,
    'a link to itself': link_loop,
    'a dangling link': dangling,
    'a pipe': pipe_instead,
    'a web page': html,
}


def written(content):
    def spoil(path):
        path.write_bytes(content)

    return spoil


JSON = {
    'list': b'[]',
    'empty object': b'{}',
    'null': b'null',
    'number': b'5',
    'text': b'"abc"',
    'deep': b'[' * 100_000 + b']' * 100_000,
    'deep object': b'{"a":' * 100_000 + b'1' + b'}' * 100_000,
    'NaN': b'{"n": NaN}',
    'huge': b'{"n": ' + b'9' * 6000 + b'}',
    'list of objects': b'[{}]',
}


def places_in(value, above=()):
    "Every key of nested mappings, and the first entry of every list"
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*above, key)
            yield from places_in(part, (*above, key))
    elif isinstance(value, list) and value:
        yield (*above, 0)
        yield from places_in(value[0], (*above, 0))


def others(value):
    "Values of other types, and out of range"
    if isinstance(value, bool):
        return {'a text': 'abc', 'null': None, 'a list': []}
    if isinstance(value, int | float):
        wrong = {'negative': -7, 'huge': 10**12, 'NaN': float('nan'), 'beyond floats': 10**400}
        return wrong | {'a text': 'abc', 'null': None, 'a list': [value], 'an object': {'a': 1}}
    if isinstance(value, str):
        return {
            'a number': 5,
            'null': None,
            'a list': [value],
            'another text': 'no-such',
            'above': '../../x',
            'control': 'a\r\n',
        }
    if isinstance(value, list):
        return {
            'a number': 5,
            'null': None,
            'empty': [],
            'of null': [None],
            'twice': [*value, *value],
            'an object': {'a': 1},
        }
    if isinstance(value, dict):
        return {'a number': 5, 'null': None, 'a list': [1], 'empty': {}, 'a text': 'abc'}
    return {'a number': 5, 'a text': 'abc', 'a list': [1], 'an object': {'a': 1}}


_GONE = object()


def changed_at(place, value=_GONE, lines=False, dump=json.dumps, load=json.loads):
    "Spoil one value of a JSON file, or of the first line of one with an object a line"

    def spoil(path):
        first, *rest = path.read_text().splitlines() if lines else [path.read_text()]
        content = load(first)
        inside = content
        for key in place[:-1]:
            inside = inside[key]
        if value is _GONE:
            del inside[place[-1]]
        else:
            inside[place[-1]] = value
        path.write_text('\n'.join([dump(content), *rest]) + '\n')

    return spoil


def json_changes(path, lines=False, dump=json.dumps, load=json.loads):
    "Every key of a JSON file gone, and of another type: (what, spoil)"
    text = path.read_text()
    content = load(text.splitlines()[0] if lines else text)
    for place in places_in(content):
        inside = content
        for key in place:
            inside = inside[key]
        where = '.'.join(map(str, place))
        yield f'{where} gone', changed_at(place, lines=lines, dump=dump, load=load)
        for what, other in others(inside).items():
            yield f'{where} is {what}', changed_at(place, other, lines, dump, load)


def table(change):
    "Spoil the lines of a table"

    def spoil(path):
        path.write_text(change(path.read_text().splitlines(keepends=True)), newline='')

    return spoil


def recoded(encoding):
    def spoil(path):
        path.write_bytes(path.read_text().encode(encoding))

    return spoil


def cells(position, value):
    "Every cell of one column replaced"

    def change(lines):
        import csv
        import io

        rows = list(csv.reader(io.StringIO(''.join(lines))))
        for row in rows[1:]:
            if len(row) > position:
                row[position] = value
        out = io.StringIO()
        csv.writer(out).writerows(rows)
        return out.getvalue()

    return table(change)


TABLES = {
    'the header alone': table(lambda lines: lines[0]),
    'no header': table(lambda lines: ''.join(lines[1:])),
    'a row less': table(lambda lines: ''.join(lines[:-1])),
    'a row twice': table(lambda lines: ''.join([*lines, lines[-1]])),
    'a longer row': table(lambda lines: ''.join([*lines[:2], 'a,b,c,d,e,f,g,h,i,j,k,l,m\n', *lines[2:]])),
    'a shorter row': table(lambda lines: ''.join([*lines[:2], 'a\n', *lines[2:]])),
    'an open quote': table(lambda lines: ''.join([*lines[:2], '"abc\n', *lines[2:]])),
    'a NUL': table(lambda lines: ''.join([*lines[:2], 'a\0b,c\n', *lines[2:]])),
    'UTF-16': recoded('utf-16'),
    'the columns renamed': table(lambda lines: ''.join([lines[0].replace('e', 'x').replace('I', 'y'), *lines[1:]])),
    'a column twice': table(lambda lines: ''.join(f'{line.rstrip()},{line.split(",")[0]}\n' for line in lines)),
    'empty lines alone': table(lambda lines: '\n' * 20),
    'semicolons': table(lambda lines: ''.join(lines).replace(',', ';')),
}
CELLS = {
    'empty': '',
    'huge': '9' * 400,
    'nan': 'nan',
    'negative': '-1',
    'text': 'no such thing',
    'formula': '=1+1',
    'control': 'a\rb',
    'above': '../../x',
}


def array(change):
    "Spoil an array"

    def spoil(path):
        changed = change(np.load(path))
        with open(path, 'wb') as file:
            np.save(file, changed, allow_pickle=True)

    return spoil


def with_nan(a):
    a = a.copy()
    a.reshape(-1)[:1] = np.nan if a.dtype.kind == 'f' else 255
    return a


def promising(path):
    "A header that promises more than there is"
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 32, 32, 4), }"
    text += b' ' * (118 - len(text) - 1) + b'\n'
    path.write_bytes(b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text + b'\0' * 1000)


def zipped(path):
    with open(path, 'wb') as file:
        np.savez(file, a=np.zeros(3))


ARRAYS = {
    'another shape': array(lambda a: a.reshape(-1)),
    'one row less': array(lambda a: a[:-1]),
    'one row more': array(lambda a: np.concatenate([a, a[:1]])),
    'no rows': array(lambda a: a[:0]),
    'no dimension': array(lambda a: np.array(5, a.dtype)),
    'one axis more': array(lambda a: a[..., None]),
    'floats': array(lambda a: a.astype('float64') + 0.5),
    'texts': array(lambda a: a.astype(str)),
    'objects': array(lambda a: np.array([{'a': 1}, None], dtype=object)),
    'complex': array(lambda a: a.astype(complex)),
    'records': array(lambda a: np.zeros(len(a), [('a', 'i4'), ('b', 'f4')])),
    'NaN': array(with_nan),
    'big endian': array(lambda a: a.astype(a.dtype.newbyteorder('>')) if a.dtype.itemsize > 1 else a.astype('>u2')),
    'promising': promising,
    'an archive': zipped,
}


def weights(change):
    "Spoil the tensors of a file of weights"

    def spoil(path):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        with safe_open(path, 'pt') as file:
            notes = file.metadata()
        save_file(change(tensors), path, notes)

    return spoil


def _each(function):
    return lambda tensors: {name: function(tensor) for name, tensor in tensors.items()}


def _first_as(function):
    def change(tensors):
        name = next(name for name, tensor in tensors.items() if tensor.ndim and tensor.is_floating_point())
        return {**tensors, name: function(tensors[name]).contiguous()}

    return change


def _full(value):
    import torch

    return lambda tensor: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor


def long_header(path):
    path.write_bytes(struct.pack('<Q', 1 << 50) + b'{}')


def false_header(path):
    text = b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'
    path.write_bytes(struct.pack('<Q', len(text)) + text)


WEIGHTS = {
    'NaN': weights(_each(_full(float('nan')))),
    'one NaN': weights(_first_as(_full(float('nan')))),
    'infinite': weights(_each(_full(float('inf')))),
    'a tensor less': weights(lambda tensors: dict(list(tensors.items())[1:])),
    'a tensor more': weights(lambda tensors: {**tensors, 'another': next(iter(tensors.values())).clone()}),
    'no tensor': weights(lambda tensors: {}),
    'another shape': weights(_first_as(lambda tensor: tensor.reshape(-1)[:1].clone())),
    'halves': weights(_each(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)),
    'whole numbers': weights(_first_as(lambda tensor: tensor.int())),
    'a long header': long_header,
    'a false header': false_header,
}


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(width, height, depth=8, colour=0, rows=b''):
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def picture(mode, size=(32, 32)):
    def spoil(path):
        from PIL import Image

        Image.new(mode, size).save(path, format='TIFF' if mode == 'F' else None)

    return spoil


PICTURES = {
    'huge': written(png(60_000, 60_000)),
    'endless': written(png(2**31 - 1, 2**31 - 1)),
    'no pixels': written(png(0, 0)),
    'colours': picture('RGB'),
    'one pixel': picture('L', (1, 1)),
    'another size': picture('L', (32, 48)),
    'a TIFF of floats': picture('F'),
    'black': picture('L'),
    'a GIF': written(b'GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff!\xf9\x04\x01\x00'),
}
MAY_BE_FINE_PICTURES = {
    'colours': 'an image whose channels are equal is one of grey values',
    'black': 'an image may be black',
    'a TIFF of floats': 'the format is recognised by its content',
}


def spoilings(path):
    "All ways to spoil a file: (what, spoil)"
    path = Path(path)
    yield from ANY.items()
    if path.suffix == '.json':
        yield from ((f'JSON {what}', written(content)) for what, content in JSON.items())
        yield from json_changes(path)
    elif path.suffix == '.jsonl':
        yield from ((f'JSON {what}', written(content)) for what, content in JSON.items())
        yield from json_changes(path, lines=True)
    elif path.suffix in ('.yaml', '.yml'):
        yield from ((what, written(content)) for what, (content, _) in yaml_shapes(path.read_bytes()).items())
        yield from json_changes(path, dump=yaml.safe_dump, load=yaml.safe_load)
    elif path.suffix == '.csv':
        yield from TABLES.items()
        for place, column in enumerate(path.read_text().splitlines()[0].split(',')):
            for what, value in CELLS.items():
                yield f'{column} {what}', cells(place, value)
    elif path.suffix == '.npy':
        yield from ARRAYS.items()
    elif path.suffix == '.safetensors':
        yield from WEIGHTS.items()
    elif path.suffix in ('.png', '.tif', '.jpg'):
        yield from PICTURES.items()
