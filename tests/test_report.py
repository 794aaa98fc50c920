"The report as a page: on every screen, in the dark, by keys, on paper, without the network; and as a notebook."

import re
import shutil

import nbformat
import pytest

from protloc.study.examine import examine_study
from protloc.study.folder import RunFolder
from protloc.study.report import write_report
from protloc.study.scores import Study

CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number)
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor)
      if (colour.length === 3 || colour[3] > 0.9) return colour
    }
    return [255, 255, 255]
  }
  const bad = []
  for (const e of document.querySelectorAll('main *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())
    if (!own || !e.checkVisibility()) continue
    const [one, other] = [parse(getComputedStyle(e).color), behind(e)].map(light).sort((a, b) => b - a)
    if ((one + 0.05) / (other + 0.05) < 4.5) bad.push(`${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`)
  }
  return bad
}"""
BROKEN = """() => [...document.images].filter((i) => !i.complete || !i.naturalWidth).length"""
TOO_SMALL = """() => [...document.querySelectorAll('figure.chart img')].map((i) => i.getBoundingClientRect().width)"""


@pytest.fixture
def opened(browser, finished):
    "Open the report at a width; what went wrong on the way is in its `wrong`"
    pages = []

    def open_at(width, scheme='light'):
        page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        page.wrong = []
        page.on('console', lambda message: page.wrong.append(message.text) if message.type == 'error' else None)
        page.on('request', lambda request: page.wrong.append(request.url) if request.url.startswith('http') else None)
        page.goto(RunFolder(finished).report.as_uri())
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [400, 800, 1280])
def test_every_screen(width, scheme, opened):
    page = opened(width, scheme)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate(BROKEN) == 0 and page.evaluate(CONTRAST) == []
    assert page.wrong == []
    widths = page.evaluate(TOO_SMALL)
    assert len(widths) >= 9 and min(widths) > 0.5 * min(width, 960)


def test_a_telephone_gets_other_drawings(opened):
    sources = [opened(width).evaluate('[...document.images].map((i) => i.currentSrc)') for width in (400, 1280)]
    pictures = opened(400).evaluate("document.querySelectorAll('picture').length")
    assert sum(one != other for one, other in zip(*sources, strict=True)) == pictures >= 10


def test_every_figure_says_its_numbers(opened):
    texts = opened(1280).evaluate("[...document.images].map((i) => i.alt)")
    assert texts and all(re.search(r'\d', text) for text in texts)


def test_keys_open_what_is_folded_and_scroll_tables(opened):
    page = opened(400)
    summary = page.locator('summary', has_text='What the words mean')
    summary.focus()
    page.keyboard.press('Enter')
    assert page.locator('dt', has_text='corrected p').is_visible()
    tables = page.locator('.table')
    assert tables.count() >= 3 and all(one.get_attribute('tabindex') == '0' for one in tables.all())


def test_on_paper_nothing_is_folded(opened):
    page = opened(800, 'dark')
    page.emulate_media(media='print')
    heights = page.evaluate("[...document.querySelectorAll('details > :not(summary)')].map((e) => e.offsetHeight)")
    assert len(heights) >= 4 and min(heights) > 10
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'


def test_simulated_images_are_never_called_real(opened):
    text = opened(1280).evaluate('document.body.innerText')
    said = 'The cells are simulated and stand for real ones'
    assert said in text
    assert not re.findall(r'[^\n]*\breal (?:images?|ones?|cells?)\b[^\n]*', text.replace(said, ''))


def test_size_and_order(finished):
    report = RunFolder(finished).report
    assert report.stat().st_size < 10e6
    headings = re.findall(r'<h2[^>]*>([^<]*)', report.read_text())
    assert headings[:3] == ['What to do now', 'How sure this is', 'Why']


def test_the_notebook_runs_on_from_the_runs_folder(finished, tmp_path, monkeypatch):
    run = RunFolder(finished)
    cells = nbformat.read(run.notebook, as_version=4).cells
    first = [cell.source for cell in cells if cell.cell_type == 'code'][:3]
    assert "folder = '.'" in first[1] and str(run.path) not in ''.join(first)
    monkeypatch.chdir(run.path)
    names = {}
    for source in first:
        exec(source, names)
    assert names['results'].run.path.samefile(run.path)
    assert eval('what_to_do(results)', names).data.startswith('<ol')  # its commands name the folder


def test_an_unknown_palette_is_refused_before_anything_changes(finished):
    before = RunFolder(finished).report.read_bytes()
    with pytest.raises(Exception, match="no palette 'rainbow'.*safe"):
        write_report(finished, 'rainbow')
    assert RunFolder(finished).report.read_bytes() == before


def test_a_generator_that_failed_leaves_the_others_examined(finished, tmp_path):
    "Also where it is that of the first replicate"
    run = RunFolder(shutil.copytree(finished, tmp_path / 'run'))
    for place in (run.generator(0), run.synthetic(0), run.classifier('concat', 0)):
        shutil.rmtree(place)
    run.predictions('real', 0, 'synthetic').unlink()
    run.note_failure('generator of replicate 0', 'it diverged')
    study = Study(run.path)
    found = examine_study(study)
    assert study.judged == [1] and len(study.synthetic) == 64
    assert set(found.copies.pairs.replicate) == {1}
    assert found.classes[found.classes.measure == 'label_fidelity'].value.notna().any()
