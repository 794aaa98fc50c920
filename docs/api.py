"""What the exported modules say of themselves: signatures, docstrings, docments, read as text."""

import ast
import io
import tokenize
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Item:
    "A parameter of a function or a field of a class"

    name: str
    type: str = ''
    default: str = ''
    about: str = ''  # the comment beside it


@dataclass
class Symbol:
    "A public function, class, method or property"

    module: str
    name: str  # with its class: 'ImageStore.rows'
    kind: str  # 'function', 'class', 'method' or 'property'
    line: int  # where it begins in the module
    about: str = ''  # docstring
    signature: str = ''  # '(n: int, alpha: float = 0.3) -> Tensor'; empty for classes with fields
    params: list[Item] = field(default_factory=list)
    returns: Item | None = None
    fields: list[Item] = field(default_factory=list)  # of settings and dataclasses
    members: list[str] = field(default_factory=list)  # names of the documented methods in the body of a class


class Comments:
    "The comments of a source file, by line"

    def __init__(self, source: str):
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
        self.beside = {t.start[0]: t.string.lstrip('# ').rstrip() for t in tokens}
        self.alone = {t.start[0] for t in tokens if t.line.strip() == t.string.strip()}

    def of(self, first: int, last: int) -> str:
        "The comment beside the last line of something, else the lines of comment right above it"
        if last in self.beside:
            return self.beside[last]
        line = first
        while line - 1 in self.alone:
            line -= 1
        return ' '.join(self.beside[i] for i in range(line, first))


def imported(tree: ast.Module, module: str) -> dict[str, str]:
    "Names that this package defines or imports from itself -> their full names"
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = f'{module}.{node.name}'
        if isinstance(node, ast.ImportFrom) and node.level:
            base = '.'.join([*module.split('.')[: -node.level], *([node.module] if node.module else [])])
            found |= {a.asname or a.name: f'{base}.{a.name}' for a in node.names}
    return found


class Module:
    "The public symbols of one exported module"

    def __init__(self, path: Path, module: str):
        source = path.read_text(encoding='utf-8')
        tree = ast.parse(source)
        self.module, self.comments, self.known = module, Comments(source), imported(tree, module)
        self.aliases = {
            n.targets[0].id: n.value
            for n in tree.body
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        }
        self.symbols: dict[str, Symbol] = {}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self.add_class(node)
            if isinstance(node, ast.FunctionDef):
                self.add_function(node, self.patched(node))

    def patched(self, node) -> str:
        "The class that `@patch` gives this function to; '' for an ordinary one"
        decorated = any('patch' in ast.unparse(d) for d in node.decorator_list)
        return ast.unparse(node.args.args[0].annotation).strip("'") if decorated else ''

    def qualified(self, annotation) -> str:
        "An annotation with our own types under their full names"
        if annotation is None:
            return ''
        known = self.known

        class Full(ast.NodeTransformer):
            def visit_Name(self, node):
                return ast.parse(known[node.id], mode='eval').body if node.id in known else node

        return ast.unparse(Full().visit(ast.parse(ast.unparse(annotation), mode='eval').body))

    def type_and_help(self, annotation) -> tuple[str, str]:
        "The type of a parameter; for a command line's `Annotated` also its help"
        meant = self.aliases.get(annotation.id, annotation) if isinstance(annotation, ast.Name) else annotation
        if isinstance(meant, ast.Subscript) and ast.unparse(meant.value) == 'Annotated':
            kind, option = meant.slice.elts[:2]
            return self.qualified(kind), next(
                (ast.literal_eval(k.value) for k in option.keywords if k.arg == 'help'), ''
            )
        return self.qualified(annotation), ''

    def add_function(self, node, owner: str = ''):
        if node.name.startswith('_') and not (owner and node.name.startswith('__')):
            return
        marks = {ast.unparse(d).split('.')[-1] for d in node.decorator_list}
        kind = 'method' if owner else 'function'
        if owner and marks & {'property', 'cached_property', 'patch(as_prop=True)'}:
            kind = 'property'
        params = self.params(node)[1 if owner and 'staticmethod' not in marks else 0 :]
        returns = (
            Item('return', self.qualified(node.returns), about=self.comments.beside.get(node.returns.end_lineno, ''))
            if node.returns
            else None
        )
        name = f'{owner}.{node.name}' if owner else node.name
        self.symbols[name] = Symbol(
            self.module,
            name,
            kind,
            node.lineno,
            ast.get_docstring(node) or '',
            written(params, returns),
            params,
            returns,
        )

    def params(self, node) -> list[Item]:
        a, found = node.args, []
        plain = a.posonlyargs + a.args
        for arg, default in zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults, strict=True):
            found.append((arg, default, ''))
        if a.vararg:
            found.append((a.vararg, None, '*'))
        elif a.kwonlyargs:
            found.append((None, None, '*'))
        found += [(arg, default, '') for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
        if a.kwarg:
            found.append((a.kwarg, None, '**'))
        # a comment belongs to the last parameter on its line
        last = {arg.end_lineno: arg for arg, _, _ in found if arg}
        if node.returns:
            last.pop(node.returns.end_lineno, None)
        return [self.item(arg, default, star, last) for arg, default, star in found]

    def item(self, arg, default, star, last) -> Item:
        if arg is None:
            return Item('*')
        kind, help = self.type_and_help(arg.annotation)
        about = self.comments.of(arg.lineno, arg.end_lineno) if last.get(arg.end_lineno) is arg else ''
        return Item(star + arg.arg, kind, ast.unparse(default) if default else '', about or help)

    def add_class(self, node):
        if node.name.startswith('_'):
            return
        symbol = Symbol(self.module, node.name, 'class', node.lineno, ast.get_docstring(node) or '')
        symbol.fields = [
            self.field(n) for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith('_')
        ]
        self.symbols[node.name] = symbol
        for n in node.body:
            if not isinstance(n, ast.FunctionDef):
                continue
            if n.name in ('__init__', '__new__'):
                symbol.params = self.params(n)[1:]
                symbol.signature = written(symbol.params, None)
            elif ast.get_docstring(n):
                self.add_function(n, node.name)
                symbol.members += [f'{node.name}.{n.name}'] if f'{node.name}.{n.name}' in self.symbols else []

    def field(self, node) -> Item:
        "A field of a dataclass or of settings; limits (pydantic's, or the simulator's `parameter`) belong to its type"
        kind, value = self.qualified(node.annotation), node.value
        limits, about = '', self.comments.of(node.lineno, node.end_lineno)
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ('pydantic.Field', 'field'):
            signs = dict(ge='≥', gt='>', le='≤', lt='<')
            limits = ', '.join(f'{signs[k.arg]} {ast.unparse(k.value)}' for k in value.keywords if k.arg in signs)
            value = value.args[0] if value.args else None
        elif isinstance(value, ast.Call) and ast.unparse(value.func) == 'parameter':
            value, low, high, unit, meaning = value.args
            limits, about = f'{ast.unparse(low)} to {ast.unparse(high)}', f'{meaning.value} ({unit.value})'
        return Item(node.target.id, f'{kind}, {limits}' if limits else kind, ast.unparse(value) if value else '', about)


def written(params: list[Item], returns: Item | None) -> str:
    "A signature in Python's own form"

    def one(param):
        kind = f': {param.type}' if param.type else ''
        equals = ' = ' if param.type else '='
        return param.name + kind + (equals + param.default if param.default else '')

    ending = f' -> {returns.type}' if returns else ''
    return f"({', '.join(map(one, params))}){ending}"


def read_package(root: Path) -> dict[str, dict[str, Symbol]]:
    "Module -> name -> symbol, of everything that notebooks export"
    found = {}
    for path in sorted(root.rglob('*.py')):
        if path.stem.startswith('_') and path.stem != '__main__':
            continue
        module = '.'.join(path.relative_to(root.parent).with_suffix('').parts)
        found[module] = Module(path, module).symbols
    return found
