"""Build the documentation site without Quarto: nbdev renders the notebooks into _proc/, Sphinx makes _docs/ of them.

    python tools/docs.py              # build _docs/; exits 1 and says why if a page is missing or a link is dead
    python tools/docs.py --sidebar    # write nbs/sidebar.yml anew after a notebook was added, renamed or removed
    python -m http.server -d _docs    # look at it"""
import inspect, os, re, shutil, sys
from html import escape
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbdev.serve, nbdev.showdoc
from execnb.nbio import mk_cell, read_nb, write_nb
from fastcore.docments import ShowDocRenderer, docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults, add_show_docs, rm_export
from nbdev.quarto import refresh_quarto_yml
from sphinx.cmd.build import build_main

GROUPS = {0: 'Parts', 10: 'Methods', 20: 'Tools', 31: 'Your own images', 50: 'Studies', 60: 'Commands', 70: 'Stories', 80: 'Speed'}  # by the number with which a group begins
os.chdir(Path(__file__).parents[1])
cfg = get_config()
root, nbs, site = cfg.config_path, cfg.nbs_path, cfg.doc_path
pages = root/'_proc'/'_pages'  # what Sphinx reads
doc_url = cfg.doc_host + cfg.doc_baseurl + '/'
git_url = cfg.git_url
if 'GITHUB_REPOSITORY' in os.environ: git_url = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{os.environ['GITHUB_REPOSITORY']}"


# Which pages there are, and how they are grouped

def notebooks(): return sorted(nbs.glob('[0-9]*.ipynb'))
def page_name(nb): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(nb).stem.lower())  # as in nbdev's links: 01_data is data.html

def groups():
    "The notebooks of each group, in order"
    res = {}
    for nb in notebooks(): res.setdefault(GROUPS[max(n for n in GROUPS if n <= int(nb.name[:2]))], []).append(nb)
    return res

def sidebar_yml():
    "The text of nbs/sidebar.yml, from which Quarto takes its groups"
    lines = ['website:', '  sidebar:', '    contents:', '      - index.ipynb']
    for title,members in groups().items():
        lines += [f'      - section: {title}', '        contents:', *(f'          - {nb.name}' for nb in members)]
    return '\n'.join(lines) + '\n'

def toctrees():
    "The same groups for Sphinx"
    return '\n'.join(f'```{{toctree}}\n:hidden:\n:caption: {title}\n' + '\n'.join(map(page_name, members)) + '\n```\n'
                     for title,members in groups().items())


# What `show_doc` shows on the site: a heading, the source, the call, and a table of parameters

def _type(anno):
    if anno in (inspect.Parameter.empty, None, type(None)): return ''
    return re.sub(r'\b[\w.]+\.', '', anno.__name__ if isinstance(anno, type) else str(anno)).replace(' ', '')

def _value(v):
    if v is inspect.Parameter.empty: return ''
    text = re.sub(r' at 0x\w+', '', getattr(v, '__name__', None) or repr(v))
    return re.sub(r'\d+\.\d{5,}', lambda m: f'{float(m[0]):.4g}', text)

def _row(*cells): return '| ' + ' | '.join(re.sub(r'\s*\n\s*', ' ', c).replace('|', r'\|') for c in cells) + ' |'
def _code(s): return s and f'`{s}`'      # nbdev links what it names,
def _plain(s): return s and f'`` {s} ``'  # unless it is written like this: a parameter `pool` is not the function `pool`

class Renderer(ShowDocRenderer):
    def __init__(self, sym, name=None, title_level=3):
        super().__init__(sym, name, title_level)
        self.callable = self.sig is not None and not isinstance(sym, property)
        if isinstance(sym, type):  # an `__init__` that comes from fastai or torch is theirs to document
            owner = next(c for c in sym.__mro__ if '__init__' in vars(c))
            self.callable &= owner.__module__.split('.')[0] in (cfg.lib_name, sym.__module__.split('.')[0])
        self.params = docments(self.sym, full=True)
        self.params.pop('self', None)
        self.documented = self.callable and any(p.docment for p in self.params.values())

    def call(self):
        "How to call it, with types only where no table follows to tell them"
        def one(k, p):
            star = {p.kind.VAR_POSITIONAL: '*', p.kind.VAR_KEYWORD: '**'}.get(p.kind, '')
            anno = '' if self.documented or p.default is None and p.anno is type(None) else _type(p.anno)
            return star + k + (anno and f': {anno}') + ('' if p.default is inspect.Parameter.empty else f'={_value(p.default)}')
        params = [one(k, p) for k,p in self.params.items() if k != 'return']
        line = f"{self.nm}({', '.join(params)})"
        return line if len(line) < 90 else f'{self.nm}(\n    ' + ',\n    '.join(params) + ')'

    def table(self):
        if not self.documented: return ''
        rows = [('Name', 'Type', 'Default', 'What it is'), ('---',)*4]
        rows += [(_plain(k) if k != 'return' else '*returns*', _code(_type(p.anno)), _plain(_value(p.default)), p.docment or '')
                 for k,p in self.params.items() if k != 'return' or p.docment]
        filled = [column for column in zip(*rows) if any(column[2:])]
        return '\n'.join(_row(*r) for r in zip(*filled))

    def _repr_markdown_(self):
        name, src = self.nm.replace('_', r'\_'), NbdevLookup().code(self.fn)
        src = src and f'<a class="source" href="{escape(src.replace(cfg.git_url, git_url))}">source</a>'
        call = f'```python\n{self.call()}\n```' if self.callable else ''
        return '\n\n'.join(filter(None, [f"{'#'*self.title_level} {name}", f'<div class="api" data-name="{self.nm.lower()}">{src or ""}</div>',
                                         call, self.docs, self.table()]))


# The processors of nbdev, but an exported cell stays, folded under "Show the code"

def fold_export(cell):
    "Fold exported cells, leave out those that only import or that are hidden"
    kinds = {'export', 'exporti', 'exports'} & (cell.directives_ or {}).keys()
    if kinds and any(re.match(r'(def|class|async|@|\w+ *=)', l) for l in cell.source.splitlines()) and 'hide' not in cell.directives_:
        if 'exports' not in kinds: cell.metadata['tags'] = ['hide-input']
    else: rm_export(cell)

class ordered_show_docs(add_show_docs):
    "nbdev documents what a cell defines from the last to the first; turn that round"
    def begin(self):
        super().begin()
        runs = groupby(self.nb.cells, lambda c: bool(getattr(c, 'has_sd', False)))
        self.nb.cells = [c for added,run in runs for c in (reversed(list(run)) if added else run)]

class Processors(FilterDefaults):
    def base_procs(self):
        ours = {rm_export: fold_export, add_show_docs: ordered_show_docs}
        return [ours.get(p, p) for p in super().base_procs()]


# From a notebook that nbdev has rendered to one that Sphinx reads

def markdown_of(cell):
    "The markdown that a cell shows in place of itself (`show_doc`, or `#| output: asis`)"
    text = lambda t: t if isinstance(t, str) else ''.join(t)
    return '\n\n'.join(text(o.get('text') or o['data'].get('text/markdown') or o['data'].get('text/plain', '')) for o in cell.outputs)

def options(cell):
    "What the `#|` lines say, as `{'echo': 'false'}`"
    return dict(re.findall(r'^#\|\s*([\w-]+)\s*:\s*(.*?)\s*$', cell.source, re.M))

def convert(cell):
    "The cells to show for `cell`: none, itself, or markdown"
    if cell.cell_type == 'raw' or 'THIS FILE WAS AUTOGENERATED' in cell.source: return []
    if cell.cell_type == 'markdown': return [cell]
    opt, tags = options(cell), cell.metadata.setdefault('tags', [])
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    if opt.get('include') == 'false': return []
    if opt.get('output') == 'false': cell.outputs = []
    if opt.get('warning') == 'false': cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    if 'fig-alt' in opt: cell.metadata['mystnb'] = dict(image=dict(alt=opt['fig-alt']))
    if opt.get('code-fold') == 'true': tags.append('hide-input')
    if opt.get('echo') == 'false': tags.append('remove-input')
    shown = [] if opt.get('echo') == 'false' or not cell.source else [cell]
    if opt.get('output') == 'asis':
        text, cell.outputs = markdown_of(cell), []
        return shown + [mk_cell(text, 'markdown')]
    language = cell.metadata.get('language', 'python')
    if shown and language != 'python':
        shown = [mk_cell(f'```{language}\n{cell.source}\n```', 'markdown')]
        tags.append('remove-input')
        return shown + [cell]*bool(cell.outputs)
    return [cell] if shown or cell.outputs else []

def link(url, anchors):
    "`url` as a link inside the site where it is one, and to the repository where it leads out of the notebooks' folder"
    if url.startswith('../'): return f'{git_url}/blob/{cfg.branch}/{url[3:]}'
    if url.startswith(doc_url): url = url[len(doc_url):]
    page,_,anchor = url.partition('#')
    if re.fullmatch(r'[\w.]+\.ipynb', page): page, anchor = page_name(page) + '.html', anchor.lower()
    elif page[:-5] in anchors and anchor not in anchors[page[:-5]]:  # a method: its class, or else the top of the page
        anchor = anchor.split('.')[0]
        if anchor not in anchors[page[:-5]]: anchor = ''
    return page + (anchor and f'#{anchor}')

def resolve(text, anchors):
    "Point the links of a piece of markdown into the site, and make links of the names of notebooks"
    names = {nb.stem for nb in notebooks()}
    parts = re.split(r'(^```.*?^```)', text, flags=re.M|re.S)
    for i in range(0, len(parts), 2):
        p = re.sub(r'(?<=\]\()[^()\s]+(?=\))', lambda m: link(m[0], anchors), parts[i])
        parts[i] = re.sub(r'(?<!\[)`(\d+\w*?)(?:\.ipynb)?`', lambda m: f'[{m[0]}]({page_name(m[1])}.html)' if m[1] in names else m[0], p)
    return ''.join(parts)

def title_cell(nb):
    "The first cell as its author wrote it: nbdev keeps only one line of the summary"
    return next((c for c in read_nb(nb).cells if c.cell_type == 'markdown' and re.search(r'^# ', c.source, re.M)), None) or stop(f'{nb.name} has no title')

def write_pages():
    "Render all notebooks with nbdev, then write what Sphinx reads"
    nbdev.showdoc.BasicMarkdownRenderer, nbdev.serve.FilterDefaults = Renderer, Processors
    nbdev.serve.proc_nbs('nbs', force=True, n_workers=0)  # in this process, so that both replacements hold
    sources = [nbs/'index.ipynb', *notebooks()]
    rendered = {page_name(nb): read_nb(root/'_proc'/nb.name) for nb in sources}
    for nb in rendered.values(): nb.cells = [new for cell in nb.cells for new in convert(cell)]
    anchors = {name: {m for c in nb.cells for m in re.findall(r'class="api" data-name="(.*?)"', c.source)} for name,nb in rendered.items()}
    pages.mkdir()
    if (nbs/'images').is_dir(): shutil.copytree(nbs/'images', pages/'images')
    for src,(name,nb) in zip(sources, rendered.items()):
        nb.cells.insert(0, mk_cell(title_cell(src).source, 'markdown'))
        for c in nb.cells:
            if c.cell_type == 'markdown': c.source = resolve(c.source, anchors)
        if name == 'index': nb.cells.append(mk_cell(toctrees(), 'markdown'))
        nb.metadata = dict(kernelspec=dict(name='python3', display_name='python3', language='python'), language_info=dict(name='python', pygments_lexer='ipython3'))
        write_nb(nb, pages/f'{name}.ipynb')


# Does the site hold what it should?

class Page(HTMLParser):
    "The ids, links and text of a page"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.code, self.prose, self.inside = set(), set(), [], [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get('id'))
        self.links.update(attrs[k] for k in ('href', 'src') if attrs.get(k))
        if tag in ('pre', 'code', 'script', 'style', 'svg'): self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]: self.inside.pop()

    def handle_data(self, data):
        if not self.inside: self.prose.append(data)
        elif self.inside[0] == 'pre': self.code.append(data)

def faults():
    "What is wrong with the built site, one line each"
    read = {p.relative_to(site).as_posix(): Page(p) for p in site.rglob('*.html')}
    for nb in ['index.ipynb', *notebooks()]:
        if f'{page_name(nb)}.html' not in read: yield f'{Path(nb).name} has no page'
    for name,page in read.items():
        for mark in re.findall(r':::|\{[#.][\w-]+.*?\}', ''.join(page.prose)): yield f'{name} shows Quarto syntax: {mark}'
        for mark in re.findall(r'^#\|.*', ''.join(page.code), re.M): yield f'{name} shows a directive: {mark}'
        for url in sorted(page.links):
            if urlsplit(url).scheme or url.startswith('//'): continue
            path, anchor = urldefrag(url)
            target = (Path(name).parent/unquote(path.split('?')[0])).as_posix() if path else name
            if not (site/target).is_file(): yield f'{name} links to {url}, which is not there'
            elif anchor and target in read and unquote(anchor) not in read[target].ids: yield f'{name} links to {url}: no such place on that page'


def stop(why): sys.exit(f'docs: {why}')

def main():
    sidebar = nbs/'sidebar.yml'
    refresh_quarto_yml()  # nbs/nbdev.yml follows settings.ini
    if '--sidebar' in sys.argv: return sidebar.write_text(sidebar_yml())
    strays = {nb.name for nb in nbs.glob('*.ipynb')} - {nb.name for nb in notebooks()} - {'index.ipynb'}
    if strays: stop(f'a notebook is called index or begins with a number, unlike {sorted(strays)}')
    if sidebar.read_text() != sidebar_yml(): stop('nbs/sidebar.yml does not name the notebooks that there are; run: python tools/docs.py --sidebar')
    write_pages()
    failed = build_main(['-q', '-W', '--keep-going', '-c', 'tools/docs', '-d', '_proc/_doctrees', str(pages), '_proc/_html'])
    shutil.rmtree(site, ignore_errors=True)
    shutil.move('_proc/_html', site)
    bad = ['Sphinx has warned or failed, see above']*bool(failed) + list(faults())
    if bad: stop('\n  '.join(['the site has faults:', *bad]))
    print(f'docs: {len(notebooks()) + 1} pages in {site.relative_to(root)}, every local link leads somewhere')

if __name__ == '__main__': main()
