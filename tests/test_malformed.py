"""Over 300 malformed inputs, made by a seeded script: image files, CSV files, options, files of a run and weights of others, cut at random bytes and otherwise damaged.
Whatever it is: it works or says one line; no traceback, no hang, and nothing of the user's is lost."""
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from fastcore.script import anno_parser
from safetensors.torch import load_file, save

from ssl_nb import cli
from ssl_nb.classifier import export_run, load_classifier, transfer
from ssl_nb.data import InputError, cifar10_sample
from ssl_nb.folders import good_size, image_folder
from ssl_nb.loading import load_any
from ssl_nb.nets import NIN
from ssl_nb.report import Run, open_run, write_report
from ssl_nb.runs import pretrain
from ssl_nb.weights import load_weights, save_weights

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='needs links, pipes, any byte in names, and a clock that interrupts')
SECONDS = 20  # for one case


class Case:
    "One malformed input: its kind and seed, what it is, and all that makes it"
    def __init__(self, kind, seed, what, **more): self.kind, self.seed, self.what = kind, seed, what; self.__dict__.update(more)
    def __repr__(self): return f'{self.kind} {self.seed}: {self.what}'


def collect(kind, *makers):
    "A case of each maker, `(what, more)` from its own random generator, numbered"
    cases = []
    for make in makers:
        seed = len(cases)
        what, more = make(random.Random(f'{kind} {seed}'))
        cases.append(Case(kind, seed, what, **more))
    return cases


def every(kind, cases): return pytest.mark.parametrize('case', cases, ids=lambda c: repr(c)[:90])


# What a call ends with

class Hang(BaseException): "Not an Exception, which somebody may catch"


@contextlib.contextmanager
def clock(seconds=SECONDS):
    "Interrupt what takes too long, again and again, for it may wait once more while it ends. It rings each second, so that a machine that sleeps counts as one."
    rings = iter(range(seconds))
    def ring(*_):
        if next(rings, None) is None: raise Hang(f'not done within {seconds} s')
    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try: yield
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, old)


def answer(call, *args, **kwargs):
    "What a call gives, and None; or None, and the one line that it says. All else is an error of ours."
    with clock(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        warnings.simplefilter('ignore')
        try: given, line = call(*args, **kwargs), None
        except InputError as e: given, line = None, str(e)
    assert 'Traceback' not in err.getvalue(), err.getvalue()
    assert line is None or line and line.isprintable(), line
    return given, line


def command(name, *args):
    "A command called as a function: exit code, and what it says as an error, without progress and what was skipped"
    f = getattr(cli, name)
    with clock(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        warnings.simplefilter('ignore')
        try:
            given = vars(anno_parser(f.__wrapped__, name).parse_args(list(map(str, args))))
            f(**{k: v for k, v in given.items() if k not in ('pdb', 'xtra')}); code = 0
        except SystemExit as e: code = e.code
    lines = [l for l in err.getvalue().replace('\r', '\n').splitlines() if l.strip() and 'batch/s' not in l and 's/batch' not in l]
    return code, lines


def refused(code, lines):
    "One line, or what argparse says by itself"
    assert code == 2 and lines, (code, lines)
    if lines[0].startswith('usage:'): assert ': error: ' in lines[-1], lines
    else: assert len(lines) == 1 and lines[0].isprintable(), lines


def digests(folder):
    "What is in a folder, by name: nothing of it may get lost"
    def of(p):
        if p.is_symlink(): return os.readlink(p)
        if p.is_file(): return hashlib.md5(p.read_bytes()).hexdigest()
        return 'folder' if p.is_dir() else 'other'
    return {str(p.relative_to(folder)): of(p) for p in sorted(Path(folder).rglob('*'))}


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    "Nothing is kept outside of the tests; and tiny nets are fastest on one core"
    at, n = tmp_path_factory.mktemp('cache'), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m: m.setenv('XDG_CACHE_HOME', str(at)); yield at
    torch.set_num_threads(n)


# Damage

def cut(rng, data): return data[:rng.randrange(len(data))]


def flip(rng, data, first=None):
    "Some bytes are others"
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))): k = rng.randrange(min(len(data), first or len(data))); data[k] ^= rng.randrange(1, 256)
    return bytes(data)


def holes(rng, data):
    "Zeros where a block of the disk was never written"
    a = rng.randrange(len(data)); b = min(len(data), a + rng.choice((1, 30, 512)))
    return data[:a] + bytes(b-a) + data[b:]


def lose(rng, data):
    "Some bytes are gone from the middle"
    a = rng.randrange(len(data))
    return data[:a] + data[a+rng.randrange(1, 30):]


def insert(rng, data):
    a = rng.randrange(len(data))
    return data[:a] + rng.randbytes(rng.randrange(1, 30)) + data[a:]


def swap(rng, data): a = rng.randrange(len(data)); return data[a:] + data[:a]
def as_text(rng, data): return data.replace(b'\n', b'\r\n') if b'\n' in data else data.replace(b'\0', b'')  # sent by FTP as a text


DAMAGES = dict(cut=cut, flip=flip, header=lambda rng, data: flip(rng, data, 40), holes=holes, lose=lose, insert=insert, swap=swap, as_text=as_text)


# Image files

MODES = dict(jpg=['RGB', 'L', 'CMYK', 'YCbCr'], png=['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'], webp=['RGB', 'RGBA'], bmp=['1', 'L', 'P', 'RGB', 'RGBA'],
             tif=['1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'LAB', 'YCbCr', 'I;16', 'I', 'F'], gif=['L', 'P', 'RGB'], ppm=['1', 'L', 'RGB'])


def photo(rng, mode='RGB', side=None):
    size = (side or rng.choice((1, 3, 20, 33, 90)), side or rng.choice((1, 17, 32, 60)))
    img = Image.fromarray(np.random.default_rng(rng.randrange(10**6)).integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    if mode == 'I;16': return Image.fromarray(np.asarray(img.convert('L')).astype(np.uint16)*257)
    if mode == 'LAB': return Image.merge('LAB', img.split())
    return img.convert(mode)


def encoded(rng, end, mode=None):
    "The bytes of an image, with options that files have"
    data, img = io.BytesIO(), photo(rng, mode or rng.choice(MODES[end]))
    more = dict(jpg=[{}, dict(progressive=True), dict(quality=5), dict(exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0')],
        png=[{}, dict(optimize=True)], webp=[{}, dict(lossless=True)],
                tif=[{}, dict(compression='tiff_lzw'), dict(compression='tiff_deflate'), dict(compression='packbits')],
                gif=[{}, dict(save_all=True, append_images=[photo(rng, 'L', 20)]*2)]).get(end, [{}])
    img.save(data, dict(jpg='jpeg', tif='tiff').get(end, end), **rng.choice(more))
    return data.getvalue()


def damaged_image(end, how):
    def make(rng):
        whole = encoded(rng, end)
        return f'{end}, {how}', dict(name=f'bad.{end}', data=DAMAGES[how](rng, whole), whole=whole)
    return make


def strange(what, name, data, must='skipped'):
    "A file of these bytes, or of what a function of the generator gives; it must be 'skipped', 'taken', 'absent' or, None, one of the first two"
    return lambda rng: (what, dict(name=name, data=data(rng) if callable(data) else data, must=must))


def special(what, name, data, must='skipped'):
    "What a function of the path makes there"
    return lambda rng: (what, dict(name=name, data=data, must=must))


def header_of_another(rng):
    a, b = rng.sample(sorted(MODES), 2)
    k = rng.choice((2, 4, 8, 12, 30))
    return encoded(rng, a)[:k] + encoded(rng, b)[k:]


def png(width, height, depth=8, color=2, body=b'\0'*100, extra=b''):
    "A PNG that claims to be of some size"
    chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + extra + chunk(b'IDAT', zlib.compress(body)) + chunk(b'IEND', b'')


def text_bomb():
    "Twenty million letters of comment in twenty thousand bytes"
    d = b'Comment\0\0' + zlib.compress(bytes(2*10**7))
    return png(4, 4, body=b'\0'*52, extra=struct.pack('>I', len(d)) + b'zTXt' + d + struct.pack('>I', zlib.crc32(b'zTXt' + d)))


def bmp(width, height, bits=24):
    return struct.pack('<2sIHHIIiiHHIIiiII', b'BM', 2**31-1, 0, 0, 54, 40, width, height, 1, bits, 0, 0, 1, 1, 0, 0) + b'\x80'*600


def tiff(**tags):
    "A TIFF whose tags say anything"
    named = dict(width=256, height=257, bits=258, compression=259, photometric=262, strips=273, rows=278, bytes=279, samples=277, next=0)
    values = dict(dict(width=8, height=8, bits=8, compression=1, photometric=1, strips=8, rows=8, bytes=64, samples=1),
        **{k: v for k, v in tags.items() if k != 'next'})
    rows = b''.join(struct.pack('<HHII', named[k], 4, 1, v) for k, v in sorted(values.items(), key=lambda kv: named[kv[0]]))
    return struct.pack('<2sHI', b'II', 42, 8) + struct.pack('<H', len(values)) + rows + struct.pack('<I', tags.get('next', 0)) + b'\x80'*64


def plug(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as s: s.bind(path.name)
    finally: os.chdir(here)


def two_loops(path): path.symlink_to(path.with_suffix('.lnk')); path.with_suffix('.lnk').symlink_to(path)
def folder_of_text(path): path.mkdir(); (path/'read me.txt').write_text('text')


NAMES = ['new\nline.png', 'tab\tand\rreturn.JPG', 'ünïcödé 図 \u202e.png', os.fsdecode(b'\xff\xfe\xe4.png'), 'x'*251 + '.png', "it's \"quoted\" %s {0} $HOME `x`;&.png",
    '-rf.png', '\x1b[31mred\x07.png', ' .png', 'a..png.png', 'a.png\u2028.png']
odd_name = lambda name: (lambda rng: (f'name {name[:20]!r}', dict(name=name, data=rng.choice((b'', b'no image', encoded(rng, 'png')[:40])), must='skipped')))

IMAGES = collect('image',
    *[damaged_image(end, how) for how in ('cut', 'cut', 'header', 'flip') for end in MODES],
    *[damaged_image(end, how) for how in ('holes', 'lose', 'insert') for end in MODES],
    *[damaged_image(end, how) for how, end in (('swap', 'jpg'), ('swap', 'png'), ('as_text', 'png'), ('as_text', 'jpg'), ('as_text', 'tif'))],
    *[strange('the header of one format before the body of another', f'x.{end}', header_of_another, None) for end in ('jpg', 'png', 'tif', 'webp')],
    strange('no bytes', 'x.png', b''), strange('one byte', 'x.jpg', b'\xff'), strange('zeros', 'x.png', bytes(5000)),
    strange('random bytes', 'x.webp', lambda rng: rng.randbytes(3000)), strange('a text', 'x.jpg', b'Dear Sir or Madam,\n'),
    strange('a page', 'x.gif', b'<html>404 not found</html>'), strange('a vector image', 'x.png', b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    strange('PostScript', 'x.png', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'),
    strange('an archive', 'x.jpg', b'PK\x03\x04' + bytes(200)),
    strange('a whole image and more', 'x.png', lambda rng: encoded(rng, 'png', 'RGB') + rng.randbytes(999), 'taken'),
    *[strange(f'PNG of {w}x{h}', 'x.png', png(w, h, *more))
      for w, h, *more in ((2**31-1, 2**31-1), (2**32-1, 1), (0, 0), (13000, 13000, 8, 0), (8, 8, 7, 9), (100000, 1, 16, 6))],
    strange('PNG with 20 MB of comment', 'x.png', text_bomb(), None),
    *[strange(f'BMP of {w}x{h}, {b} bits', 'x.bmp', bmp(w, h, b)) for w, h, b in ((2**31-1, 2**31-1, 24), (30000, -30000, 32), (-5, 5, 24), (0, 9, 8), (9, 9, 77))],
    *[strange(f'TIFF with {tags}', 'x.tif', tiff(**tags), must) for tags, must in (
        (dict(width=2**32-1, height=2**32-1), 'skipped'), (dict(strips=2**31), 'skipped'), (dict(bytes=2**32-1), None), (dict(next=8), 'taken'),
        (dict(samples=60000), 'skipped'), (dict(bits=0), 'skipped'), (dict(rows=0), None), (dict(compression=9999), 'skipped'), (dict(photometric=77), 'skipped'))],
    strange('GIF of 65535x65535', 'x.gif', b'GIF89a' + b'\xff'*4 + b'\xf7\0\0' + bytes(768) + b',' + bytes(4) + b'\xff'*4 + b'\0\x08' + bytes(50)),
    strange('JPEG of 65535x65535', 'x.jpg', b'\xff\xd8\xff\xc0\0\x11\x08' + b'\xff'*4 + b'\x03\x01\x11\0\x02\x11\0\x03\x11\0\xff\xd9'),
    special('a folder', 'x.png', Path.mkdir, 'absent'), special('a folder of a text', 'x.jpg', folder_of_text, 'absent'),
    special('a link to nothing', 'x.png', lambda path: path.symlink_to('nowhere.png')), special('a link to itself', 'x.png', lambda path: path.symlink_to(path)),
    special('two links to each other', 'x.png', two_loops), special('a link to the folder', 'up.png', lambda path: path.symlink_to(path.parent), 'absent'),
    special('a link to endless zeros', 'x.png', lambda path: path.symlink_to('/dev/zero')),
    special('a pipe', 'x.png', os.mkfifo), special('a socket', 'x.png', plug), *map(odd_name, NAMES))


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "Twenty images, and what they are by themselves"
    folder, rng = tmp_path_factory.mktemp('good'), random.Random(0)
    for k in range(20): (folder/f'{k:02}.{sorted(MODES)[k%7]}').write_bytes(encoded(rng, sorted(MODES)[k%7], 'RGB'))
    return folder, image_folder(folder, 16, cache=None)


def put(case, folder):
    path = Path(folder)/case.name
    if callable(case.data): case.data(path)
    else: path.write_bytes(case.data)


@every('image', IMAGES)
def test_image(good, tmp_path, case):
    folder, alone = good
    shutil.copytree(folder, tmp_path/'in')
    put(case, tmp_path/'in')
    before = digests(tmp_path/'in')
    for kept in (None, tmp_path/'kept', tmp_path/'kept')[:3 if case.seed % 4 == 0 else 1]:
        with clock(), warnings.catch_warnings(record=True) as said, contextlib.redirect_stderr(io.StringIO()) as err:
            warnings.simplefilter('always')
            images = image_folder(tmp_path/'in', 16, cache=kept)
        at = {f: k for k, f in enumerate(images.files)}
        assert torch.equal(images.x[[at.pop(f) for f in alone.files]], alone.x)  # the others are what they were
        where = 'skipped' if case.name in images.skipped else 'taken' if case.name in at else 'absent'
        assert len(at) + len(images.skipped) == (where != 'absent')
        assert where in ((case.must,) if getattr(case, 'must', None) else ('skipped', 'taken')), where
        assert err.getvalue() == '' and len(said) == (where == 'skipped' or bool(images.passed)) and all(str(w.message).isprintable() for w in said), said
        if where == 'skipped': assert images.skipped[case.name].isprintable() and '1 file skipped' in str(said[0].message)
        if where == 'taken' and case.what.endswith('cut'):  # nothing of the image itself was cut off
            (tmp_path/'whole').mkdir(exist_ok=True); (tmp_path/'whole'/case.name).write_bytes(case.whole)
            assert torch.equal(image_folder(tmp_path/'whole', 16, channels=3, cache=None).x[0], images.x[at[case.name]])
    json.dumps(images.skipped)
    assert digests(tmp_path/'in') == before
    answer(good_size, [tmp_path/'in'/case.name])


def test_all_these_images_together(good, tmp_path):
    "Too many: one line. All the same, when that is wanted: the good ones"
    folder, alone = good
    shutil.copytree(folder, tmp_path/'in')
    for case in IMAGES:
        if case.name in NAMES: put(case, tmp_path/'in'); continue
        (tmp_path/f'in/{case.seed}').mkdir(); put(case, tmp_path/f'in/{case.seed}')
    assert 'too many of its' in answer(image_folder, tmp_path/'in', 16, labels=None)[1]
    images, line = answer(image_folder, tmp_path/'in', 16, labels=None, max_bad=1)
    at = {f: k for k, f in enumerate(images.files)}
    assert torch.equal(images.x[[at[f] for f in alone.files]], alone.x)
    assert len(images.files) + len(images.skipped) == 20 + sum(getattr(c, 'must', None) != 'absent' for c in IMAGES)


# CSV files

TRUE = {f'{"abc"[k%3]}/{k:02}.png': 'ant bee cat'.split()[k%3] for k in range(24)}  # file: label
TABLE = '\n'.join(['file,label', *(f'{f},{l}' for f, l in TRUE.items())]) + '\n'


def rows(change=str, head='file,label', rows=None, end='\n'): return end.join([head, *map(change, (f'{f},{l}' for f, l in (rows or TRUE.items())))]) + end


def table(what, data, must=None, **more):
    "A CSV file, which must be taken as 'true' labels, be 'refused' or, None, one of both; `more` is for `image_folder`"
    return lambda rng: (what, dict(data=data if isinstance(data, bytes) else data.encode(), must=must, more=more))


def damaged_table(how):
    return lambda rng: (how, dict(data=DAMAGES[how](rng, rng.choice((TABLE, rows(end='\r\n'), rows(lambda r: '"' + r.replace(',', '";"') + '"', 'file;label'),
        '\ufeff' + TABLE)).encode()), must=None, more={}, damaged=True))


def named(file, must='refused'): return table(f'file {file[:30]!r}', rows(rows=[*TRUE.items(), (file, 'ant')]), must)


def semicolons(text): return text.replace(',', ';')
def several(sep): return rows(lambda r: r + random.Random(r).choice(('', f'{sep}dog', sep*3, f' {sep} {sep}dog')))

CSVS = collect('csv',
    *[table(what, text, 'true') for what, text in {'as it should be': TABLE, 'DOS': rows(end='\r\n'), 'old Mac': rows(end='\r'), 'byte order mark': '\ufeff' + TABLE,
    'semicolons': semicolons(TABLE), 'tabs': TABLE.replace(',', '\t'),
        'quotes': rows(lambda r: '"' + r.replace(',', '","') + '"'), 'other columns': rows(lambda r: f'é,{r},"a,b"', 'id,file,label,more'),
        'upper case': rows(head=' FILE , Label '), 'empty lines': TABLE.replace('\n', '\n\n') + ',\n\n',
        'each row twice': TABLE + TABLE.split('\n', 1)[1], 'backslashes': TABLE.replace('/', '\\'), 'paths': rows(lambda r: './b/../' + r),
        'no last line end': TABLE.rstrip(),
        '3000 columns': rows(lambda r: r.replace(',', ',7'*3000 + ','), 'file' + ',id'*3000 + ',label'),
        'other order': rows(rows=random.Random(0).sample(sorted(TRUE.items()), 24))}.items()],
    *[damaged_table('cut') for _ in range(14)], *[damaged_table('flip') for _ in range(8)], *[damaged_table(how) for how in ('header', 'holes', 'holes', 'lose', 'lose',
    'insert', 'swap', 'as_text')],
    *[table(what, text, 'refused') for what, text in {'nothing': '', 'a line end': '\n', 'a mark only': '\ufeff', 'header only': 'file,label\n',
    'quoted header only': '"file","label"', 'no header': TABLE.split('\n', 1)[1], 'no label column': TABLE.replace('label', 'class'),
        'no file column': TABLE.replace('file', 'name'), 'a column twice': rows(lambda r: r + ',zebra', 'file,label,label'),
        'file twice': rows(lambda r: 'a/00.png,' + r, 'file,file,label'), 'bars': TABLE.replace(',', '|'), 'spaces': TABLE.replace(',', ' '),
        'commas, then semicolons': rows(semicolons), 'a field too few': rows() + 'a/00.png\n', 'a field too many': TABLE.replace('ant', 'ant,bee', 1),
        'thousands of fields': TABLE.replace('ant', 'ant' + ','*5000, 1), 'blank label': TABLE.replace('ant', '  ', 1),
        'two labels': TABLE + 'a/00.png,bee\n', 'two labels by two paths': TABLE + './a/../a/00.png,bee\n', 'one label for all': rows(lambda r: r.split(',')[0] + ',x'),
        'a quote that never ends': TABLE.replace('ant', '"ant', 1), 'the last quote never ends': TABLE.rstrip() + '"x' + '\na/00.png,"ant',
        'a quote in the middle': TABLE.replace('a/00.png', '"a/"00.png', 1), 'one line without end': 'file,label\na/00.png,' + 'x'*300000,
        'UTF-16': TABLE.encode('utf-16'), 'UTF-16 without a mark': TABLE.encode('utf-16-le'), 'UTF-32': TABLE.encode('utf-32'),
        'Latin-1': TABLE.replace('bee', 'été').encode('latin-1'), 'NUL': TABLE.replace('bee', 'b\0ee', 1), 'NUL in a name': TABLE.replace('a/00', 'a/\x0000', 1),
        'NUL at the end': TABLE + '\0'*4096, 'an image': png(4, 4), 'random bytes': random.Random(1).randbytes(2000),
        '50,000 rows of no image': rows(rows=[(f'x/{k}.png', 'ant') for k in range(50000)])}.items()],
    *map(named, ['/etc/passwd', '/dev/zero', '../labels.csv', 'labels.csv', 'a', '', '.', '..', '~', '~/x.png', 'A/00.PNG/x', 'file:///a/00.png', '../'*5000 + 'x',
    'x'*100000, 'a\x00b', 'ü\u202e.png', '*.png', 'a/00.png a/03.png']),
    *[table(f'several labels by {sep!r}', several(sep), sep=sep) for sep in ('|', ' ', ';', 'e', 'ant', '\0', '🙂', ',')],
    table('several labels, all blank', rows(lambda r: r.split(',')[0] + ',| |'), 'refused', sep='|'))


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "24 tiny images in three folders, and their labels by a CSV file"
    root, x = tmp_path_factory.mktemp('album'), cifar10_sample()[0].x[:24, :, ::2, ::2]
    for f, im in zip(TRUE, x): (root/f).parent.mkdir(exist_ok=True); Image.fromarray(im.permute(1, 2, 0).numpy()).save(root/f)
    (root/'labels.csv').write_text(TABLE)
    return root


@every('csv', CSVS)
def test_csv(album, tmp_path, case):
    (tmp_path/'t.csv').write_bytes(case.data)
    before = digests(album)
    images, line = answer(image_folder, album, 8, labels=tmp_path/'t.csv', cache=None, **case.more)
    assert digests(album) == before and (tmp_path/'t.csv').read_bytes() == case.data
    if case.must == 'refused': assert line
    if case.must == 'true': assert images and [images.vocab[y] for y in images.y] == [TRUE[f] for f in images.files] and len(images) == 24 and not images.skipped
    if line: assert len(line) < 1000; return
    assert len(images.y) == len(images.files) == len(images) and len(images) + len(images.skipped) == 24
    if case.more: return
    wrong = [(f, images.vocab[y]) for f, y in zip(images.files, images.y) if images.vocab[y] != TRUE[f]]
    if case.what == 'cut': assert len(wrong) <= 1 and all(TRUE[f].startswith(l) for f, l in wrong), wrong  # the last label may be shorter
    else: assert len(wrong) <= (3 if hasattr(case, 'damaged') else 0), wrong


@pytest.mark.parametrize('what', ['nothing', 'folder', 'loop', 'name'])
def test_csv_that_is_no_file(album, tmp_path, what):
    path = tmp_path/('n\nl.csv' if what == 'name' else 'l.csv')
    if what == 'folder': path.mkdir()
    if what == 'loop': path.symlink_to(path)
    assert answer(image_folder, album, 8, labels=path, cache=None)[1]


# Options

TINY = ['--size', '16', '--epochs', '1', '--bs', '8', '--device', 'cpu']
NET = ['--net', 'channels=(8,8,8,8)']
WORDS = ['', ' ', 'x', '-', '--', 'ñandú 図', '🙂', "'; rm -rf ~", '%s%n', '\x1b[31m', 'a\nb', 'None', 'True', '[]', '../..', 'x'*4000]
NUMBERS = ['x', '', '1.5.2', '0x10', '1e', '--', '½', 'None', '1,5', '[1]', '9'*5000]


def option(name, *args):
    "A command with these arguments; one of those in a list"
    def make(rng):
        chosen = [rng.choice(a) if isinstance(a, list) else a for a in args]
        return f'{name} {" ".join(chosen)[:60]!r}', dict(command=name, args=chosen)
    return make


def of(name, **values): return [option(name, '--'+k, v) for k, vs in values.items() for v in vs]


WRONG = dict(method=['magic', 'SimSiam', 'simsiam,rotation', WORDS], backbone=['resnet1', 'vgg1', 'hf_hub:x/y', '../x', 'vit_small_patch16_224.', WORDS],
    epochs=['0', '-1', 'nan', '1e3', NUMBERS], size=['3', '-64', '1025', '99999999999999999999', NUMBERS], bs=['1', '-1', '-8', NUMBERS],
             lr=['-1', 'nan', 'inf', '-inf', '1e30', NUMBERS], seed=['-1', str(2**32), str(2**70), '1.5', NUMBERS],
             weights=['none.pth', '.', '/dev/null', '/dev/zero', 'Imagenet', ' '], minutes=['-1', 'nan', '-inf', NUMBERS],
             device=['tpu', 'cuda:99', 'meta', 'CPU', '-1', WORDS],
             processes=['0', '-1', '100000', NUMBERS], labels=['none.csv', '.', '/dev/null', 'Folders'], labelled=['{none}', '{file}', '{flat}', '{empty}'], sep=['|'],
             out=['{file}', '/dev/null', '/dev/null/x', '/proc/x', 'x'*300, '{album}/run', '{album}'])
NETS = ['16', 'width', 'width=', 'width=print()', ')(', '*[1]', '**{}', '**{"size": 8}', 'lambda: 0', 'channels=', 'width=8', 'channels=()', 'channels=(8,8)',
    'channels="abcd"', 'channels=(0,0,0,0)', 'channels=(8,8,8,-8)', 'channels=(8,8,8,1000000000000)', 'in_chans=1', 'in_chans=0', 'in_chans=7',
        'size=99', 'name="nin"', 'images=1', 'out=3', 'method=1', 'weights=3', 'minutes=1', 'pretrained=True', 'num_classes=3', 'features_only=True', 'global_pool="x"',
        'act_layer="none"', 'checkpoint_path="/etc/passwd"', '('*3000, 'é=1', 'channels=(8,8,8,8), channels=(8,8)']
NINS = ['width=-8', 'width=0', 'width=9', 'width="a"', 'width=None', 'width=1000000000000', 'n_blocks=0', 'n_blocks=-1', 'width=8, first=(1,)',
    'width=8, first=(0,0,0)', 'width=8, first=(8,8.5,8)', 'width=8, momentum="x"', 'width=8, channels=1', 'colour=1', 'channels=(8,8,8,8)']
TRANSFERS = dict(head=['box', 'LINEAR', WORDS], upto=['-1', '5', '9'*20, NUMBERS], epochs=['-1', '1.5', NUMBERS], bs=['0', '-1', '1', NUMBERS],
    lr=['-1', 'nan', 'inf', '-inf', '1e30', NUMBERS], seed=['-1', str(2**70), NUMBERS], device=['tpu', WORDS], valid=['{none}', '{flat}', '{file}', '{empty}', '{two}'],
                 labels=['', 'none.csv', '/dev/null', 'Folders'], sep=['|'])

OPTIONS = collect('option',
    *of('ssl_pretrain', **WRONG), *[option('ssl_pretrain', '--net', n) for n in NETS], *[option('ssl_pretrain', '--backbone', 'nin', '--net', n) for n in NINS],
    option('ssl_pretrain', '--backbone', 'vit_small_patch16_224', '--size', '17'), option('ssl_pretrain', '--backbone', 'nin', '--net', 'width=8', '--weights',
    'imagenet'), option('ssl_pretrain', '--labels', 'folders', '--sep', '|'), option('ssl_pretrain', '--labelled', '{album}', '--sep', '|'),
    option('ssl_pretrain', '--none', '1'), option('ssl_pretrain', '--epochs'), option('ssl_pretrain', 'another'),
    *[option('ssl_pretrain', '@', folder) for folder in ('{none}', '{file}', '{empty}', '', '/dev/null', 'x'*5000)],
    *of('ssl_transfer', **TRANSFERS), option('ssl_transfer', '--freeze', '--finetune'), option('ssl_transfer', '--finetune', '--lr', '-1'),
    option('ssl_transfer', '--finetune', '--lr', 'nan'), *[option('ssl_transfer', '@', '{run}', f) for f in ('{none}', '{file}', '{flat}', '{empty}', '{run}')],
    *[option(name, '@', r, *more) for name, *more in (('ssl_transfer', '{album}'), ('ssl_export',)) for r in ('{none}', '{file}', '{album}', '', '/dev/null', 'x'*5000,
    '{run}/config.json')],
    *of('ssl_export', to=['onnx', 'TIMM', WORDS], out=['x.pth', '/', '.', '/dev/null', '/dev/null/x.safetensors', 'x'*300 + '.safetensors', '{run}/config.json',
    '{run}/weights.safetensors', '{folder}']), option('ssl_export', '--half', 'yes'))


@pytest.fixture(scope='module')
def made(album, tmp_path_factory):
    "A run with a transfer, another one, one that was stopped, and folders that are wrong in some way"
    at = tmp_path_factory.mktemp('made')
    for what in ('flat', 'empty', 'two/a', 'two/zebra', 'folder.safetensors'): (at/what).mkdir(parents=True)
    for k in range(5):
        for what in ('flat', 'two/a', 'two/zebra'): shutil.copy(album/f'a/{3*k:02}.png', at/what)
    (at/'file').write_text('some text')
    with clock(120), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        begin(album, at/'run')
        pretrain(album, at/'other', **HOW, method='rotation', backbone='nin', width=8)
        for name in ('run', 'other'): transfer(at/name, album, epochs=1, against=False, device='cpu', name='t')
        with pytest.raises(KeyboardInterrupt): begin(album, at/'stopped', minutes=1e-9)
    return at


HOW = dict(labels='folders', size=16, epochs=1, bs=8, device='cpu')
def begin(album, out, **more): return pretrain(album, out, **HOW, channels=(8, 8, 8, 8), **more)


@every('option', OPTIONS)
def test_option(made, album, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('ssl_nb.launch.launch', lambda n: pytest.fail(f'{n} processes were started'))
    places = dict(none=tmp_path/'none', file=made/'file', folder=made/'folder.safetensors', album=album, run=made/'run',
        **{k: made/k for k in ('flat', 'empty', 'two')})
    args = [places[a[1:-1]] if a[:1] == '{' and a[-1:] == '}' else a.replace('{album}', str(album)).replace('{run}', str(made/'run')) for a in case.args]
    usual = dict(ssl_pretrain=([album], [*TINY, *NET, '--out', tmp_path/'out']), ssl_transfer=([made/'run', album], ['--alone', '--epochs', '5', '--device', 'cpu']),
        ssl_export=([made/'run'], []))[case.command]
    given = args[1:] if args[:1] == ['@'] else usual[0] + args
    before = digests(album), digests(made)
    refused(*command(case.command, *given[:len(usual[0])], *usual[1], *given[len(usual[0]):]))
    assert (digests(album), digests(made)) == before
    assert '1e30' in args or not list(tmp_path.iterdir())  # so that the right command may follow


# Files of a run

def another_seed(path, other): run = open_run(path.parent); save_weights(run.trunk, path, **{**run.config, 'seed': 1})


JSONS = ['null', '3', '[]', '{}', '"x"', 'true', 'NaN', '['*10**5, '{"config": 3, "data": []}', '{"config": {"net": {}}, "data": {}, "metrics": {}}']


def damaged_file(name, how):
    return lambda rng: (f'{name}, {how}', dict(name=name, change=lambda path, other: path.write_bytes(DAMAGES[how](rng, path.read_bytes()))))


def replaced(name, text): return lambda rng: (f'{name}, {text[:20]}', dict(name=name, change=lambda path, other: path.write_text(text)))
def swapped(name): return lambda rng: (f"{name}, another run's", dict(name=name, change=lambda path, other: shutil.copy(other, path)))
def no_file(name): return lambda rng: (f'{name}, a folder', dict(name=name, change=lambda path, other: (path.unlink(), path.mkdir())))
def gone(name): return lambda rng: (f'{name}, gone', dict(name=name, change=lambda path, other: path.unlink()))


RUN_FILES = collect('run file',
    *[damaged_file(n, how) for n in ('config.json', 'result.json', 'weights.safetensors', 'transfer-t/result.json', 'transfer-t/weights.safetensors')
      for how in ('cut', 'cut', 'flip', 'flip', 'header', 'holes', 'lose')],
    *[replaced(n, t) for n in ('config.json', 'result.json') for t in JSONS], *[replaced('transfer-t/result.json', t) for t in JSONS[:3]],
    *[replaced(n, t) for n in ('weights.safetensors', 'transfer-t/weights.safetensors') for t in ('', 'text')],
    *[f(n) for n in ('config.json', 'result.json', 'weights.safetensors', 'transfer-t/result.json', 'transfer-t/weights.safetensors')
      for f in (swapped, no_file, gone)],
    lambda rng: ('weights.safetensors, of another seed', dict(name='weights.safetensors', change=another_seed)))

TRANSFERS = collect('transfer', *[replaced('transfer-t/config.json', t) for t in JSONS], *[damaged_file('transfer-t/config.json', how) for how in ('cut', 'flip', 'lose')],
    *[f('transfer-t/config.json') for f in (swapped, no_file, gone)])

CHECKPOINTS = collect('checkpoint', *[damaged_file('checkpoint.ckpt', how) for how in ('cut', 'cut', 'cut', 'flip', 'flip', 'flip', 'header', 'holes', 'holes', 'lose',
    'insert', 'swap')], replaced('checkpoint.ckpt', ''), replaced('checkpoint.ckpt', 'PK\x03\x04'), no_file('checkpoint.ckpt'),
    *[damaged_file('config.json', how) for how in ('cut', 'flip')])

CACHES = collect('cache', *[damaged_file(n, how) for n in ('*.bin', '*.json') for how in ('cut', 'flip', 'holes', 'lose')],
    *[f(n) for n in ('*.bin', '*.json') for f in (swapped, no_file, gone)], *[replaced('*.json', t) for t in JSONS[:8]])


@pytest.fixture(scope='module')
def right(made):
    "What can be had from the run when nothing is wrong"
    with contextlib.redirect_stdout(io.StringIO()): export_run(made/'run', path=made/'right.safetensors')
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return load_file(made/'right.safetensors'), load_file(made/'run/weights.safetensors'), x, load_classifier(made/'run/transfer-t')[0](x)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every('run file', RUN_FILES)
def test_run_file(made, album, right, tmp_path, case):
    "Each that reads the run gives what it gave before, or says one line; what it does not write is not touched"
    exported, weights, x, scores = right
    run = tmp_path/'run'
    shutil.copytree(made/'run', run)
    case.change(run/case.name, made/'other'/case.name)
    before, photos, metrics = digests(run), digests(album), json.loads((made/'run/result.json').read_text())['metrics']
    given, line = answer(export_run, run, path=tmp_path/'out.safetensors')
    assert line or same(load_file(tmp_path/'out.safetensors'), exported)
    given, line = answer(load_classifier, run/'transfer-t')
    with torch.no_grad(): assert line or "another run's" in case.what or torch.equal(given[0](x), scores)  # which is as good as this one
    answer(repr, Run(run)), answer(lambda: Run(run).transfers)
    assert digests(run) == before
    _, line = answer(lambda: write_report(open_run(run)))
    assert {**digests(run), 'report.html': 0} == {**before, 'report.html': 0}
    before = digests(run)
    given, line = answer(begin, album, run)
    after = digests(run)
    assert digests(album) == photos
    if not line and case.what in ('result.json, gone', 'weights.safetensors, gone'):  # learned anew
        assert given.result['metrics'] == metrics and same(load_file(given.weights), weights)
    elif not line and case.what == 'config.json, gone': assert after == {**before, 'config.json': digests(made/'run')['config.json']}  # the weights know it too
    else: assert after == before


@every('transfer', TRANSFERS)
def test_transfer_beside_another(made, album, tmp_path, case):
    "A transfer whose configuration is spoilt is not written over by the next: that takes another folder, or says one line"
    run = tmp_path/'run'
    shutil.copytree(made/'run', run)
    case.change(run/case.name, made/'other'/case.name)
    before = digests(run/'transfer-t')
    given, line = answer(transfer, run, album, epochs=2, against=False, device='cpu', name='t')
    assert line or given['name'] == 't-2'
    assert digests(run/'transfer-t') == before


@every('checkpoint', CHECKPOINTS)
def test_checkpoint(made, album, right, tmp_path, case):
    "The run that was stopped goes on to the same end, or says one line and stays as it is"
    run = tmp_path/'run'
    shutil.copytree(made/'stopped', run)
    case.change(run/case.name, None)
    before, photos = digests(run), digests(album)
    given, line = answer(begin, album, run)
    assert digests(album) == photos
    if line: assert digests(run) == before
    else: assert same(load_file(given.weights), right[1])


@every('cache', CACHES)
def test_cache(made, album, tmp_path, case):
    "What was kept is made anew: the images are the same"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        true = image_folder(album, 8, cache=tmp_path/'kept')
        image_folder(made/'two', 8, cache=tmp_path/'other')
    case.change(next((tmp_path/'kept').glob(case.name)), next((tmp_path/'other').glob(case.name)))
    before = digests(album)
    for _ in range(2):
        again, line = answer(image_folder, album, 8, cache=tmp_path/'kept')
        assert line is None and torch.equal(again.x, true.x) and torch.equal(again.y, true.y) and again.files == true.files and again.skipped == true.skipped
    assert digests(album) == before


# Weights from elsewhere

class Evil:
    def __reduce__(self): return os.mkdir, ('was_here',)


def tensors(): torch.manual_seed(0); return dict(NIN(8, n_blocks=1).state_dict())
def but(**other): t = tensors(); k = next(k for k in t if t[k].ndim == 4); return {**t, k: other['f'](t[k])}
def spoilt(value): return but(f=lambda w: w.index_fill(0, torch.tensor([0]), value))


def endless():
    d = tensors(); d['again'] = d
    return d


def deep():
    d = tensors()
    for _ in range(200): d = dict(a=d)
    return d


def pth(what, make, must='refused', **how):
    def data():
        f = io.BytesIO()
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); torch.save(make(), f, **how)
        return f.getvalue()
    return lambda rng: (f'.pth with {what}', dict(name='w.pth', data=data, must=must))


def st(what, make, must='refused'): return lambda rng: (f'safetensors, {what}', dict(name='w.safetensors', data=lambda: make(random.Random(rng.random())), must=must))


def saved(config='{}'): return save(tensors(), metadata=dict(format='pt', config=config))


def header(text, n=None): text = text.encode() if isinstance(text, str) else text; return struct.pack('<Q', len(text) if n is None else n) + text + bytes(100)


def zipped():
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z: z.writestr('archive/data.pkl', b'no pickle'); z.writestr('archive/version', '3')
    return f.getvalue()


def bytes_of(make):
    f = io.BytesIO(); torch.save(make(), f); return f.getvalue()


WEIGHTS = collect('weights',
    *[st(how, lambda rng, how=how: DAMAGES[how](rng, saved()), must) for how, must in (('cut', 'refused'), ('cut', 'refused'), ('cut', 'refused'), ('flip', None),
    ('header', None), ('header', None), ('lose', 'refused'), ('insert', 'refused'), ('swap', 'refused'))],
    *[st(what, lambda rng, data=data: data) for what, data in {'header of 2^60 bytes': header('{"a":1}', 2**60), 'header of 2^63 bytes': header('{"a":1}', 2**63),
    'header of 0 bytes': header('', 0), 'header no JSON': header('{' + 'x'*50), 'header a list': header('[]'), 'header deep': header('{"a":'*5000), 'empty': b'',
    'eight bytes': bytes(8),
        'offsets beyond': header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999]}}'),
        'offsets backwards': header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}'),
        'shape of 2^60': header('{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,16]}}'),
        'no such dtype': header('{"a":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}')}.items()],
    *[st(f'config {config!r}', lambda rng, config=config: saved(config), None) for config in ('[]', 'null', '3', '{"recipe": 3}', '{"recipe": [1]}', '{', '"x"')],
    pth('code to run', lambda: dict(tensors(), more=Evil())), pth('code to run, as before', lambda: dict(tensors(), more=Evil()), _use_new_zipfile_serialization=False),
    lambda rng: ('pickle with code to run', dict(name='w.pth', data=lambda: pickle.dumps(Evil(), 2), must='refused')),
    *[pth(what, make) for what, make in {'a list': lambda: list(tensors().values()), 'a number': lambda: 3, 'a tensor': lambda: torch.zeros(3), 'nothing': lambda: None,
    'numbers': lambda: dict(a=1, b=2.), 'no names': lambda: {}, 'other shapes': lambda: {k: v[..., None] for k, v in tensors().items()},
    'strings': lambda: {k: 'x' for k in tensors()},
        'whole numbers': lambda: {k: v.to(torch.int8) for k, v in tensors().items()},
        'complex numbers': lambda: {k: v.to(torch.complex64) for k, v in tensors().items()}, 'not a number': lambda: spoilt(float('nan')), 'infinity': lambda: spoilt(float('inf')),
        'a sparse tensor': lambda: but(f=lambda w: w.to_sparse()), 'a tensor without numbers': lambda: but(f=lambda w: w.to('meta')),
        'a quantised tensor': lambda: but(f=lambda w: torch.quantize_per_tensor(w, .1, 0, torch.qint8)),
        'names with line ends': lambda: {f'a\n{k}\x1b': v[..., None] for k, v in tensors().items()}, 'a name of dots': lambda: {'.'*20000: torch.zeros(3)},
        '1500 prefixes': lambda: {f'p{k}.weight': torch.zeros(1) for k in range(1500)}, 'one missing': lambda: dict(list(tensors().items())[1:])}.items()],
    pth('itself in it', endless, None), pth('dictionaries in dictionaries', deep, None), pth('names that are numbers', lambda: dict(enumerate(tensors().values()))),
    lambda rng: ('a zip', dict(name='w.pth', data=zipped, must='refused')), lambda rng: ('a text', dict(name='w.pth', data=lambda: b'no weights', must='refused')),
    *[(lambda rng, how=how: (f'.pth, {how}', dict(name='w.pth', data=lambda: DAMAGES[how](random.Random(how), bytes_of(tensors)),
    must='refused' if how == 'cut' else None))) for how in ('cut', 'flip', 'header', 'holes', 'lose')])


@every('weights', WEIGHTS)
def test_weights(tmp_path, monkeypatch, case):
    "Refused in one line, with the net as it was; or loaded. No code of the file is run."
    monkeypatch.chdir(tmp_path)
    (tmp_path/case.name).write_bytes(case.data())
    before, (net, other) = digests(tmp_path), (NIN(8, n_blocks=1) for _ in range(2))
    was = {k: v.clone() for k, v in net.state_dict().items()}
    given, line = answer(load_any, net, tmp_path/case.name)
    if case.must: assert line
    if line: assert len(line) < 1000 and same(net.state_dict(), was)
    else: assert given.whole and all(v.isfinite().all() for v in net.state_dict().values()) and len(answer(repr, given)[0]) < 1000
    if case.name.endswith('safetensors'): answer(load_weights, other, tmp_path/case.name)
    assert digests(tmp_path) == before  # no code of it was run


@pytest.mark.parametrize('what', ['code to run', 'not a number', 'a name of dots', 'a list'])
def test_weights_to_start_from(album, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    Path('w.pth').write_bytes(next(c for c in WEIGHTS if c.what == f'.pth with {what}').data())
    refused(*command('ssl_pretrain', album, *TINY, '--out', 'out', '--backbone', 'nin', '--net', 'width=8, n_blocks=1', '--weights', 'w.pth'))
    assert [p.name for p in tmp_path.iterdir()] == ['w.pth']


def test_there_are_enough(): assert len({repr(c) for c in (*IMAGES, *CSVS, *OPTIONS, *RUN_FILES, *CHECKPOINTS, *CACHES, *WEIGHTS)}) >= 300
