"""`python docs/outputs.py`: drop from the notebooks' outputs what no reader can use: progress bars, stderr."""

from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
WIDGET = 'application/vnd.jupyter.widget-view+json'  # needs a kernel, and scripts from elsewhere


def readable(outputs: list) -> list:
    "The outputs that a page can show"
    return [out for out in outputs if out.get('name') != 'stderr' and WIDGET not in out.get('data', {})]


def main():
    for path in (ROOT / 'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in path.parts:
            continue
        before = path.read_text(encoding='utf-8')
        if WIDGET not in before and '"stderr"' not in before and '"widgets"' not in before:
            continue
        notebook = nbformat.reads(before, as_version=4)
        notebook.metadata.pop('widgets', None)
        for cell in notebook.cells:
            if cell.cell_type == 'code':
                cell.outputs = readable(cell.outputs)
        path.write_text(nbformat.writes(notebook) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
