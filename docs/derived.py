"""`python docs/derived.py`: what git keeps of what is made from the notebooks and settings.ini.

That is README.md, and Quarto's files for `nbdev_preview`.
"""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml

ROOT = Path(__file__).resolve().parent.parent


def readme():
    notebook = nbformat.read(ROOT / 'nbs' / 'index.ipynb', as_version=4)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r'(\]\(|src=")(?!https?:|#)', r'\1nbs/', text).strip()
    (ROOT / 'README.md').write_text(
        '<!-- made from nbs/index.ipynb by docs/derived.py -->\n\n' + text + '\n', encoding='utf-8'
    )


def main():
    readme()
    refresh_quarto_yml()
    nbdev_sidebar()


if __name__ == '__main__':
    main()
