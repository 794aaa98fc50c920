"""Exported code stands on its own: no function leans on a name that only a cell of its notebook imports."""

import builtins
import contextlib
import dis
import importlib
import inspect
import io
import json
import re
import types
from pathlib import Path

import matplotlib.pyplot
import pytest

ROOT = Path(__file__).resolve().parent.parent


def cells_of(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']


def exporting():
    "Module name -> its notebook"
    notebooks = [path for path in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts]
    named = ((re.search(r'#\|\s*default_exp ([\w.]+)', path.read_text(encoding='utf-8')), path) for path in notebooks)
    return {f'protloc.{match[1]}': path for match, path in sorted(named, key=lambda pair: pair[1]) if match}


MODULES = exporting()


def codes(code):
    "A code object and those of the functions and comprehensions in it"
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def functions(module):
    "The functions and methods that a module defines, patched ones too"
    source = Path(module.__file__).read_text(encoding='utf-8')
    yield from codes(compile(source, module.__file__, 'exec'))


@pytest.mark.parametrize('name', MODULES)
def test_every_global_name_is_the_modules_own(name):
    module = importlib.import_module(name)
    known = {*vars(module), *vars(builtins)}
    used = {
        instruction.argval
        for code in functions(module)
        if code.co_name != '<module>'
        for instruction in dis.get_instructions(code)
        if instruction.opname == 'LOAD_GLOBAL'
    }
    assert used <= known, f'{name} uses {sorted(used - known)} and does not import it'


def flags(source):
    return set(re.findall(r'^#\|\s*(\w+)', source, re.MULTILINE))


@pytest.mark.thorough
@pytest.mark.parametrize('name', [name for name in MODULES if not name.startswith('protloc.study.')])
def test_examples_run_on_the_exported_module(name, monkeypatch):
    "The notebook's examples call the module that is installed, not the cells beside them; of studies other tests do"
    notebook = MODULES[name]
    module = importlib.import_module(name)
    before = dict(vars(module))
    monkeypatch.chdir(notebook.parent)
    matplotlib.use('agg')
    names = {**vars(module), '__name__': 'examples', 'display': lambda *things: None}
    with contextlib.redirect_stdout(io.StringIO()):
        for source in cells_of(notebook):
            if not flags(source) & {'export', 'default_exp', 'slow', 'gpu'} and 'show_doc' not in source:
                exec(compile(source, f'{notebook.name}', 'exec'), names)
    matplotlib.pyplot.close('all')
    assert {k for k, v in vars(module).items() if before.get(k) is not v} <= {'__warningregistry__'}


def test_public_names_are_documented():
    "Every public function has a docstring of its own"
    bare = []
    for name in MODULES:
        module = importlib.import_module(name)
        public = [getattr(module, word) for word in getattr(module, '__all__', [])]
        bare += [f'{name}.{thing.__name__}' for thing in public if inspect.isfunction(thing) and not thing.__doc__]
    assert not bare
