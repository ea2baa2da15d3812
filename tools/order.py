"""Does every notebook import only from notebooks with a lower number, and has each number one notebook?

    python tools/order.py    # exits 1 and names the arrows that run up"""
import ast
import json
import re
from collections import Counter
from pathlib import Path

NBS = Path(__file__).parents[1]/'nbs'


def cells(path): return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']

def imported(source):
    "Modules of the package that a cell imports"
    source = re.sub(r'^\s*[%!].*$', '', source, flags=re.M)  # magics and shell commands
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('ssl_nb'):
            yield node.module
            yield from (f'{node.module}.{a.name}' for a in node.names)
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)

def main():
    books = {p: cells(p) for p in sorted(NBS.glob('[0-9]*.ipynb'))}
    made_by = {f'ssl_nb.{m[1]}': p for p,cs in books.items() for c in cs if (m := re.match(r'#\| ?default_exp ([\w.]+)', c))}
    faults = [f'{n} is the number of {k} notebooks' for n,k in Counter(p.name[:2] for p in books).items() if k > 1]
    for path,cs in books.items():
        uses = {made_by[m] for c in cs for m in imported(c) if m in made_by}
        faults += [f'{path.stem} imports from {other.stem}' for other in sorted(uses) if other.name > path.name]
    if faults: raise SystemExit('\n'.join(faults))
    print(f'{len(books)} notebooks: each imports only from lower numbers')


if __name__ == '__main__': main()
