"""`python docs/derived.py`: what git keeps of what is made from the notebooks and settings.ini.

That is README.md, and Quarto's files for `nbdev_preview`.
"""

import re
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.quarto import refresh_quarto_yml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'


def readme():
    notebook = nbformat.read(NBS / 'index.ipynb', as_version=4)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r'(\]\(|src=")(?!https?:|#)', r'\1nbs/', text).replace('](nbs/../', '](').strip()
    (ROOT / 'README.md').write_text(
        '<!-- made from nbs/index.ipynb by docs/derived.py -->\n\n' + text + '\n', encoding='utf-8'
    )


def contents(folder: Path) -> list:
    "Notebooks and sections of a folder, in the order of their numbers"
    entries = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.name != 'index.ipynb', path.name)):
        if path.suffix == '.ipynb':
            entries.append(path.relative_to(NBS).as_posix())
        elif path.is_dir() and path.name != '.ipynb_checkpoints' and (inner := contents(path)):
            entries.append(dict(section=re.sub(r'^\d+_', '', path.name), contents=inner))
    return entries


def sidebar():
    "Quarto's sidebar; nbdev's own leaves the numbers of folders out of the paths"
    tree = dict(website=dict(sidebar=dict(contents=contents(NBS))))
    (NBS / 'sidebar.yml').write_text(yaml.safe_dump(tree, sort_keys=False), encoding='utf-8')


def main():
    readme()
    refresh_quarto_yml()
    sidebar()


if __name__ == '__main__':
    main()
