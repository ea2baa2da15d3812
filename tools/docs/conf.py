"Sphinx's settings; tools/docs.py prepares the pages and calls Sphinx"
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

project, author, release, copyright = cfg['title'], cfg['author'], cfg['version'], cfg['copyright']
language = 'en'
extensions = ['myst_nb', 'sphinx.ext.githubpages']
root_doc = 'index'
suppress_warnings = ['myst.header']  # show_doc's headings are of level 3 wherever they stand

nb_execution_mode = 'off'
nb_code_prompt_show, nb_code_prompt_hide = 'Show the code', 'Hide the code'
nb_render_markdown_format = 'gfm'
nb_render_image_options = {'alt': 'What the code above draws'}
myst_enable_extensions = ['attrs_inline', 'dollarmath', 'html_image', 'smartquotes', 'strikethrough']
myst_all_links_external = True  # tools/docs.py resolves and checks them
myst_heading_anchors = 4

html_theme = 'furo'
html_title = cfg['title']
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sphinx = html_copy_source = html_show_sourcelink = False
html_use_index = False
html_theme_options = dict(source_repository=cfg['git_url'], footer_icons=[])
html_math_renderer = 'mathml'
pygments_style, pygments_dark_style = 'friendly', 'native'


def name_sections(app, doctree):
    "Give the sections that show_doc wrote the ids that nbdev's links ask for, such as `images.subset`"
    for mark in doctree.findall(nodes.raw):
        if not mark.astext().startswith('<div class="api"'): continue
        section, name = mark.parent, mark.astext().split('"')[3]
        for other in doctree.findall(nodes.section):  # a heading of prose gives way
            if name in other['ids']: other['ids'] = [i if i != name else f'on-{i}' for i in other['ids']]
        section['ids'] = [name]

def math(block):
    "Formulas as MathML, which browsers draw without a script"
    def visit(self, node):
        formula = tex2mathml(node.astext())
        self.body.append(formula.replace('<math ', '<math display="block" ', 1) if block else formula)
        raise nodes.SkipNode
    return visit, None

def setup(app):
    app.connect('doctree-read', name_sections, priority=100)
    app.add_html_math_renderer('mathml', inline_renderers=math(False), block_renderers=math(True))
