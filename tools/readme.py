"""Write README.md from nbs/index.ipynb, without Quarto.

    python tools/readme.py            # write README.md, and the figures it shows into README_files/
    python tools/readme.py --check    # write nothing; exit 1 if they are not what the notebook gives"""
import json, re, sys
from base64 import b64decode
from pathlib import Path

root = Path(__file__).resolve().parents[1]
NOTE = '<!-- Written by tools/readme.py from nbs/index.ipynb: change that instead -->'
HIDDEN = {'hide', 'default_exp', 'export', 'exporti'}

def text(t): return t if isinstance(t, str) else ''.join(t)
def strip_ansi(s): return re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', s)

def directives(source):
    "What the `#|` lines of a cell say, as `{'echo': 'false', 'hide': ''}`"
    lines = re.findall(r'^\s*#\|\s*(.*?)\s*$', source, re.M)
    return {k.strip(): v.strip() for k,_,v in (l.partition(':' if ':' in l else ' ') for l in lines)}

def fence(source):
    "Code as a fenced block: a shell's where every line is one, else Python's"
    source = re.sub(r'^\s*#\|.*\n?', '', source, flags=re.M).strip('\n')
    if re.match(r'%%(bash|sh)\b', source): lang, source = 'sh', source.partition('\n')[2]
    elif source and all(l.startswith('!') for l in source.splitlines()): lang, source = 'sh', re.sub('^!', '', source, flags=re.M)
    else: lang, source = 'python', re.sub(r'^%.*\n?', '', source, flags=re.M)
    return f'```{lang}\n{source.strip()}\n```' if source.strip() else ''

def output(out, opt, figures):
    "One output as markdown; a figure is put into `figures`"
    if out['output_type'] == 'stream':
        if out['name'] == 'stderr': return ''
        data = {'text/plain': out['text']}
    else: data = out.get('data', {})
    if 'text/markdown' in data: return text(data['text/markdown']).strip()
    if 'image/png' in data:
        name = f'README_files/figure-{len(figures) + 1}.png'
        figures[name] = b64decode(text(data['image/png']))
        return f"![{opt.get('fig-alt', 'What the code above draws')}]({name})"
    plain = strip_ansi(text(data.get('text/plain', ''))).rstrip()
    return plain if opt.get('output') == 'asis' else re.sub('^(?=.)', '    ', plain, flags=re.M)

def links(md):
    "The notebooks and pictures that `md` links to, as seen from the root"
    parts = re.split(r'(^```.*?^```)', md, flags=re.M|re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'(?<=\]\()(?!\w+:|[#/])([^()\s]+)(?=\))',
                          lambda m: m[1][3:] if m[1].startswith('../') else f'nbs/{m[1]}', parts[i])
    return ''.join(parts)

def cell_blocks(cell, figures):
    "The pieces of markdown that a cell gives"
    source = text(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return [links(source)]
    if cell['cell_type'] == 'raw': return []
    opt = directives(source)
    if HIDDEN & opt.keys() or opt.get('include') == 'false': return []
    shown = [] if opt.get('echo') == 'false' else [fence(source)]
    if opt.get('output') == 'false': return shown
    return shown + [output(o, opt, figures) for o in cell['outputs']]

def readme():
    "The README and its figures, as `{path: bytes}`"
    cells, figures = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells'], {}
    blocks = [b for c in cells for b in cell_blocks(c, figures) if b.strip()]
    md = '\n\n'.join([blocks[0], NOTE, *blocks[1:]]) + '\n'
    if not re.match(r'# \S', md): sys.exit('README: nbs/index.ipynb does not begin with a title')
    if re.search(r'^:::', md, re.M): sys.exit('README: nbs/index.ipynb uses the `:::` of Quarto, which GitHub and PyPI do not know')
    return {'README.md': md.encode(), **figures}

def main():
    want = readme()
    have = {str(p.relative_to(root)): p.read_bytes() for p in [root/'README.md', *root.glob('README_files/*')] if p.is_file()}
    if want == have: return
    if '--check' in sys.argv: sys.exit('README.md is not what nbs/index.ipynb gives; run: python tools/readme.py')
    for name in have.keys() - want.keys(): (root/name).unlink()
    for name,content in want.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(content)

if __name__ == '__main__': main()
