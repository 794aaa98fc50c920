"""Makes README.md from nbs/index.ipynb."""
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def main():
    notebook = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = text.replace('](images/', '](nbs/images/').strip()
    (ROOT/'README.md').write_text('<!-- made from nbs/index.ipynb by docs/readme.py -->\n\n' + text + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
