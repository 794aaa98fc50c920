"""The site in _docs/: links lead somewhere, no page shows raw markup, and a browser needs no other host."""

import functools
import http.server
import posixpath
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from bs4 import BeautifulSoup

from api import read_package
from build import page_of

pytestmark = pytest.mark.slow  # the whole file
SITE = Path(__file__).resolve().parent.parent / '_docs'


@pytest.fixture(scope='session')
def pages():
    "Address within the site -> parsed page"
    if not (SITE / 'index.html').exists():
        pytest.skip('there is no site: make it with `make docs`')
    return {
        p.relative_to(SITE).as_posix(): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
        for p in SITE.rglob('*.html')
    }


def addresses(page):
    for tag in page.find_all(True):
        for name in ('href', 'src'):
            if tag.get(name):
                yield tag, tag[name]


def test_internal_links_lead_somewhere(pages):
    anchors = {
        name: {t[k] for t in page.find_all(True) for k in ('id', 'name') if t.get(k)} for name, page in pages.items()
    }
    checked, broken = 0, []
    for name, page in pages.items():
        for _, address in addresses(page):
            if urlparse(address).scheme or address.startswith('//'):
                continue
            target, anchor = urldefrag(urljoin(f'/{name}', address))
            target = unquote(urlparse(target).path).lstrip('/') or 'index.html'
            checked += 1
            missing = not (SITE / target).is_file() or (
                anchor and target in anchors and unquote(anchor) not in anchors[target]
            )
            if missing:
                broken.append(f'{name}: {address}')
    print(f'{checked} links in {len(pages)} pages')
    assert not broken and checked > 1000, broken[:20]


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = [
        f'{name}: {address}'
        for name, page in pages.items()
        for tag, address in addresses(page)
        if urlparse(address).scheme in ('http', 'https')
        and (tag.name not in ('a', 'link') or 'stylesheet' in tag.get('rel', []))
    ]
    assert not loaded, loaded[:20]


@pytest.mark.parametrize(
    'raw', [r'^---\s*$', r'^:::', r'^#\|', r'Traceback \(most recent call last\)', r'\{py:\w+\}', r'show_doc\(']
)
def test_no_page_shows_raw_markup(pages, raw):
    found = []
    for name, page in pages.items():
        body = BeautifulSoup(str(page.find(attrs={'role': 'main'}) or page.body), 'html.parser')
        for code in body.select('p code, li code, td code'):
            code.decompose()  # inline code may speak of it
        found += [f'{name}: {m.group(0)!r}' for m in re.finditer(raw, body.get_text(), re.MULTILINE)]
    assert not found, found[:20]


def test_every_notebook_has_a_page_with_title_and_description(pages):
    notebooks = [p for p in (SITE.parent / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    for notebook in notebooks:
        page = pages[f"{page_of(notebook.relative_to(SITE.parent / 'nbs')).as_posix()}.html"]
        assert page.h1 and page.find('meta', attrs={'name': 'description'})['content'], notebook


def test_every_public_name_has_an_entry(pages):
    from sphinx.util.inventory import InventoryFile

    with open(SITE / 'objects.inv', 'rb') as f:
        inventory = InventoryFile.load(f, '', posixpath.join)
    entries = {name for kind in ('py:function', 'py:class', 'py:method', 'py:property') for name in inventory[kind]}
    names = {
        f'{module}.{name}' for module, symbols in read_package(SITE.parent / 'protloc').items() for name in symbols
    }
    assert len(names) > 150 and names == entries, names ^ entries


@pytest.fixture(scope='session')
def served(pages):
    "The site on a port of this machine"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture
def tab(browser, served):
    "A phone-sized tab that may speak with this machine alone, and what went wrong in it"
    page = browser.new_page(viewport=dict(width=400, height=800), color_scheme='dark')
    page.wrong = []

    def only_here(route):
        if route.request.url.startswith((served, 'data:')):
            return route.continue_()
        page.wrong.append(f'asked for {route.request.url}')
        route.abort()

    page.route('**/*', only_here)
    page.on('console', lambda m: page.wrong.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.wrong.append(str(e)))
    yield page
    page.close()


@pytest.mark.parametrize('width', [400, pytest.param(1100, marks=pytest.mark.thorough), 1366])
def test_every_page_opens_without_an_error_and_fits_the_window(pages, served, tab, width):
    wide = []
    tab.set_viewport_size(dict(width=width, height=800))
    for name in pages:
        tab.goto(f'{served}/{name}')
        if tab.evaluate('document.documentElement.scrollWidth') > width:
            wide.append(name)
    assert not tab.wrong and not wide, (tab.wrong[:10], wide)


def test_search_finds_a_strategy(served, tab):
    tab.goto(f'{served}/search.html?q=mix_representation')
    tab.wait_for_selector('#search-results li a', timeout=20000)
    found = tab.eval_on_selector_all('#search-results li a', 'links => links.map(a => a.getAttribute("href"))')
    assert any('classify/mixing.html' in link for link in found) and not tab.wrong, (found, tab.wrong)


def test_formulas_are_typeset(pages, served, tab):
    name = next(name for name, page in pages.items() if page.select('.math'))
    tab.goto(f'{served}/{name}')
    tab.wait_for_selector('mjx-container', timeout=20000)
    assert not tab.wrong
