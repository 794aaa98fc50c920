"""Settings of Sphinx for the site that docs/build.py makes."""

import html
import os
from configparser import ConfigParser
from pathlib import Path

from api import read_package

ROOT = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(ROOT / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
modules = read_package(ROOT / cfg['lib_path'])

project, author, release = cfg['title'], cfg['author'], cfg['version']
project_copyright = cfg['copyright']
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx.ext.linkcode', 'sphinx_copybutton']
source_suffix = {'.ipynb': 'myst-nb', '.md': 'myst-nb'}
nitpicky = True  # a link to nothing fails the build ...
nitpick_ignore_regex = [('py:.*', r'(?!protloc\b).*')]  # ... unless it is to another library

smartquotes_action = 'D'  # dashes, but quotes as they are: '' is a value
nb_execution_mode = 'off'  # the outputs are in the notebooks
nb_merge_streams = True
myst_enable_extensions = ['attrs_block', 'colon_fence', 'dollarmath', 'fieldlist', 'html_image']
mathjax_path = 'mathjax/tex-chtml.js'

add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 78
toc_object_entries = False  # every entry has a heading

html_theme = 'furo'
html_title = cfg['title']
html_static_path = ['static', os.environ['PROTLOC_DOCS_STATIC']]
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    'source_repository': cfg['git_url'],
    'navigation_with_keys': True,
    'light_css_variables': {'color-brand-primary': '#0b6e4f', 'color-brand-content': '#0b6e4f'},
    'dark_css_variables': {'color-brand-primary': '#5fd3a5', 'color-brand-content': '#5fd3a5'},
}
copybutton_exclude = '.linenos, .gp'


def linkcode_resolve(domain, info):
    symbol = modules[info['module']][info['fullname']]
    return f"{cfg['git_url']}/blob/{cfg['branch']}/{info['module'].replace('.', '/')}.py#L{symbol.line}"


def describe(app, page, template, context, doctree):
    "The notebook's one sentence, for search engines"
    about = app.env.metadata.get(page, {}).get('description', '')
    if about:
        context['metatags'] += f'<meta name="description" content="{html.escape(about)}">'


def setup(app):
    app.connect('html-page-context', describe)
