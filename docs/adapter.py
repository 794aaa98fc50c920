"""From a notebook that nbdev has processed to one that MyST-NB reads: titles, callouts, API entries, links, tags."""

import re

import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from api import Item, Symbol
from outputs import readable

SHOW_DOC = re.compile(r'^show_doc\(([\w.]+)', re.MULTILINE)
OPTION = re.compile(r'^#\|\s*([\w-]+):?\s*(.*)$')
TAGS = {
    ('echo', 'false'): 'remove-input',
    ('output', 'false'): 'remove-output',
    ('include', 'false'): 'remove-cell',
    ('code-fold', 'true'): 'hide-input',
}


class DocsError(ValueError):
    "Something in a notebook that the site cannot show"


def stop(why: str):
    raise DocsError(why)


class Symbols:
    "Looks up our own names"

    def __init__(self, modules: dict[str, dict[str, Symbol]]):
        self.modules = modules

    def find(self, name: str, module: str = '') -> Symbol | None:
        """By full name, or by the name in its module: in this one first, in the command line's last.

        Commands are called like the functions that they call.
        """
        if name in self.modules.get(module, {}):
            return self.modules[module][name]
        found = [s for m, symbols in self.modules.items() for n, s in symbols.items() if name in (n, f'{m}.{n}')]
        return min(found, key=lambda s: s.module.endswith('.cli')) if found else None

    def linked(self, text: str, module: str) -> str:
        "Backticked names of ours become checked references"

        def role(m):
            s = self.find(m[1].removesuffix('()'), module)
            return f'{{py:obj}}`{m[1]} <{s.module}.{s.name}>`' if s else m[0]

        return re.sub(r'(?<![`}])`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)', role, text)


def adapt(nb: NotebookNode, module: str, symbols: Symbols, base_url: str, notebook_url: str) -> NotebookNode:
    """The same notebook for MyST-NB.

    `base_url` is where the site is published, as in nbdev's links; `module` is empty where nothing is exported.
    """
    front, level, waiting, shown = front_matter(nb), 1, [], set()
    where = f'Module `{module}`, made from [this notebook]({notebook_url})' if module else f'[Notebook]({notebook_url})'
    cells = [
        new_markdown_cell(
            f"# {as_text(front['title'])}\n\n{{.lead}}\n{symbols.linked(as_text(front['description']), module)}"
            f'\n\n{{.where}}\n{where}'
        )
    ]
    for cell in [*nb.cells, None]:
        if name := cell and cell.cell_type == 'code' and SHOW_DOC.search(cell.source):
            waiting.append(
                symbols.find(name[1], module) or stop(f'{module}: show_doc({name[1]}) names nothing that is exported')
            )
            continue
        for symbol in sorted(waiting, key=lambda s: s.line):  # nbdev turns the order within a cell around
            if symbol.name not in shown:
                cells.append(new_markdown_cell(entry(symbol, symbols, min(level + 1, 3), shown)))
        waiting = []
        if cell is None or not cell.source.strip() or cell.source.startswith('<!-- WARNING'):
            continue
        if cell.cell_type == 'code':
            cells.append(code(cell))
        elif cell.cell_type == 'markdown':
            cells.append(new_markdown_cell(links(callouts(cell.source), module, symbols, base_url)))
            headings = re.findall(r'^(#+) ', without_fences(cell.source), re.MULTILINE)
            level = len(headings[-1]) if headings else level
    nb.cells = cells
    nb.metadata = NotebookNode(
        description=front['description'],
        kernelspec=dict(name='python3', display_name='python3', language='python'),
        language_info=dict(name='python', pygments_lexer='ipython3'),
    )
    return nb


def front_matter(nb: NotebookNode) -> dict[str, str]:
    "Title and description, which nbdev took from the title cell"
    raw = next((c.source for c in nb.cells if c.cell_type == 'raw'), '')
    found = yaml.safe_load(raw.strip().strip('-')) or {}
    if not (found.get('title') and found.get('description')):
        stop(f'a notebook needs a title cell, `# Title` and `> one sentence`; found {found}')
    return found


def as_text(text: str) -> str:
    "Without HTML, links and pictures, outside code: `<` and what would begin an address are letters"
    escaped = {'<': '&lt;', '](': ']&#40;'}
    return re.sub(r'(`[^`]*`)|(<|\]\()', lambda m: m[1] or escaped[m[2]], text)


def without_fences(text: str) -> str:
    "Markdown without its code blocks"
    return re.sub(r'^(`{3,}|~{3,}).*?^\1', '', text, flags=re.MULTILINE | re.DOTALL)


def callouts(text: str) -> str:
    "Quarto's `:::{.callout-note}` -> admonitions; other fenced divs vanish, their content stays"
    lines, open_ = [], []
    for line in text.split('\n'):
        if begin := re.match(r'^(:{3,})\s*\{(.+)\}\s*$', line):
            kind = re.search(r'\.callout-(\w+)', begin[2])
            name, folded = re.search(r'title="([^"]*)"', begin[2]), 'collapse="true"' in begin[2]
            open_.append(bool(kind))
            if not kind:
                continue
            style = kind[1] if kind[1] in ('caution', 'important', 'tip', 'warning') else 'note'
            lines.append(
                f'{begin[1]}{{admonition}} {name[1] if name else style.capitalize()}\n:class:'
                f' {style}{" dropdown" if folded else ""}\n'
            )
        elif re.match(r'^:{3,}\s*$', line) and open_:
            if open_.pop():
                lines.append(line)
        else:
            lines.append(line)
    if open_:
        stop(f'a ::: block is never closed: {text[:80]!r}')
    return '\n'.join(lines)


def links(text: str, module: str, symbols: Symbols, base_url: str) -> str:
    "nbdev's links to the published site -> references that are checked; links to notebooks -> links to their pages"

    def role(m):
        symbol = symbols.find(m[1].removesuffix('()'), module) or stop(
            f'{module}: {m[0]} links to nothing that is exported'
        )
        return f'{{py:obj}}`{m[1]} <{symbol.module}.{symbol.name}>`'

    text = re.sub(r'\]\((?![a-z]+:)[^)#]*\.ipynb', lambda m: re.sub(r'(?<=[(/])\d+_', '', m[0]), text)
    return re.sub(rf'\[`([^`\]]+)`\]\({re.escape(base_url)}[^)]*\)', role, text)


def code(cell: NotebookNode) -> NotebookNode:
    "Cell options -> tags; raises `DocsError` for a cell that ends in an error"
    lines, tags = [], list(cell.metadata.get('tags', []))
    for line in cell.source.split('\n'):
        option = OPTION.match(line)
        if option is None:
            lines.append(line)
            continue
        tag = TAGS.get((option[1], option[2].strip().lower()))
        if tag:
            tags.append(tag)
    cell.source, cell.metadata = '\n'.join(lines).strip('\n'), NotebookNode(tags=tags)
    for out in cell.outputs:
        if out.output_type == 'error':
            stop(f'a cell ends in an error: {cell.source[:80]!r}')
    cell.outputs = readable(cell.outputs)
    return cell


def entry(symbol: Symbol, symbols: Symbols, level: int, shown: set) -> str:
    "Heading, signature with its target and source link, docstring, parameters"
    heading = f"{'#' * level} `{symbol.name}`\n\n"
    members = [symbols.modules[symbol.module][n] for n in symbol.members]
    shown |= {symbol.name, *symbol.members}
    return heading + directive(symbol, symbols, [directive(m, symbols, []) for m in members])


def directive(symbol: Symbol, symbols: Symbols, members: list[str]) -> str:
    "A Python-domain directive for one symbol"

    def say(text):
        return symbols.linked(
            re.sub(r'(`[^`]*`)|(--[a-z][\w-]*)', lambda m: m[1] or f'`{m[2]}`', as_text(text)), symbol.module
        )

    body = [say(symbol.about), table(symbol.fields, symbols, say)]
    body.append(
        '\n'.join(f":param {p.name.replace('*', chr(92) + '*')}: {say(p.about)}" for p in symbol.params if p.about)
        + (f'\n:returns: {say(symbol.returns.about)}' if symbol.returns and symbol.returns.about else '')
    )
    if symbol.kind == 'property':
        head, options = symbol.name, f":type: {symbol.returns.type}\n" if symbol.returns else ''
    else:
        head, options = symbol.name + symbol.signature, ''
    text = '\n\n'.join(part for part in [*body, *members] if part.strip())
    longest = max(map(len, re.findall('`+', text)), default=0)
    fence = '`' * max(4 if members else 3, longest + 1 if longest > 2 else 0)
    return f'{fence}{{py:{symbol.kind}}} {head}\n:module: {symbol.module}\n{options}\n{text}\n{fence}\n'


def table(fields: list[Item], symbols: Symbols, say) -> str:
    "Fields of settings or of a dataclass"

    def type_of(f):
        own, short = [s for s in map(symbols.find, re.findall(r'\w+(?:\.\w+)+', f.type)) if s], f.type
        for s in own:
            short = short.replace(f'{s.module}.{s.name}', s.name)
        return f'{{py:obj}}`{short} <{own[0].module}.{own[0].name}>`' if own else f'`{short}`'

    rows = [(f'`{f.name}`', say(f.about), type_of(f), f'`{f.default}`' if f.default else '') for f in fields]
    lines = [('field', 'meaning', 'type', 'default'), ('---',) * 4, *rows]
    return (
        '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in lines) if rows else ''
    )
