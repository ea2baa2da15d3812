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
import sys
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from fastcore.script import anno_parser
from safetensors.torch import load_file, save_file

from ssl_nb import cli
from ssl_nb.backbones import backbone
from ssl_nb.classifier import export_run, load_classifier, transfer
from ssl_nb.data import InputError, cifar10_sample
from ssl_nb.export import load_any
from ssl_nb.folders import good_size, image_folder
from ssl_nb.nets import NIN
from ssl_nb.runs import Run, open_run, pretrain, write_report
from ssl_nb.weights import load_weights, read_checkpoint, save_weights

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
    "Interrupt what takes too long; again and again, for it may wait once more while it ends"
    def ring(*_): raise Hang(f'not done within {seconds} s')
    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
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
    "Nothing is kept outside of the tests"
    at = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as m: m.setenv('XDG_CACHE_HOME', str(at)); yield at


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
    more = dict(jpg=[{}, dict(progressive=True), dict(quality=5), dict(exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0')], png=[{}, dict(optimize=True)], webp=[{}, dict(lossless=True)],
                tif=[{}, dict(compression='tiff_lzw'), dict(compression='tiff_deflate'), dict(compression='packbits')], gif=[{}, dict(save_all=True, append_images=[photo(rng, 'L', 20)]*2)]).get(end, [{}])
    img.save(data, dict(jpg='jpeg', tif='tiff').get(end, end), **rng.choice(more))
    return data.getvalue()


def damaged_image(end, how):
    def make(rng):
        whole = encoded(rng, end)
        return f'{end}, {how}', dict(name=f'bad.{end}', data=DAMAGES[how](rng, whole), whole=whole)
    return make


def strange(what, name, data, must='skipped'):
    "A file of these bytes (or a function of the path that makes it), which must be 'skipped', 'taken', 'absent' or, None, one of the first two"
    return lambda rng: (what, dict(name=name, data=data(rng) if callable(data) and not hasattr(data, 'makes') else data, must=must))


def makes(f): f.makes = True; return f  # of a path, not of a generator


def header_of_another(rng):
    a, b = rng.sample(sorted(MODES), 2)
    k = rng.choice((2, 4, 8, 12, 30))
    return encoded(rng, a)[:k] + encoded(rng, b)[k:]


def png(width, height, depth=8, color=2, body=b'\0'*100, extra=b''):
    "A PNG that claims to be of some size"
    chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)) + extra + chunk(b'IDAT', zlib.compress(body)) + chunk(b'IEND', b'')


def text_bomb():
    "A hundred million letters of comment in a hundred thousand bytes"
    d = b'Comment\0\0' + zlib.compress(bytes(10**8), 9)
    return png(4, 4, body=b'\0'*52, extra=struct.pack('>I', len(d)) + b'zTXt' + d + struct.pack('>I', zlib.crc32(b'zTXt' + d)))


def bmp(width, height, bits=24, offset=54): return struct.pack('<2sIHHIIiiHHIIiiII', b'BM', 2**31-1, 0, 0, offset, 40, width, height, 1, bits, 0, 0, 1, 1, 0, 0) + b'\x80'*600


def tiff(**tags):
    "A TIFF whose tags say anything"
    named = dict(width=256, height=257, bits=258, compression=259, photometric=262, strips=273, rows=278, bytes=279, samples=277, next=0)
    values = dict(dict(width=8, height=8, bits=8, compression=1, photometric=1, strips=8, rows=8, bytes=64, samples=1), **{k: v for k, v in tags.items() if k != 'next'})
    rows = b''.join(struct.pack('<HHII', named[k], 4, 1, v) for k, v in sorted(values.items(), key=lambda kv: named[kv[0]]))
    return struct.pack('<2sHI', b'II', 42, 8) + struct.pack('<H', len(values)) + rows + struct.pack('<I', tags.get('next', 0)) + b'\x80'*64


@makes
def pipe(path): os.mkfifo(path)
@makes
def plug(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
        here = os.getcwd(); os.chdir(path.parent)  # such a path may not be long
        try: s.bind(path.name)
        finally: os.chdir(here)
@makes
def dangling(path): path.symlink_to(path.parent/'nowhere.png')
@makes
def loop(path): path.symlink_to(path)
@makes
def two_loops(path): path.symlink_to(path.parent/'other.lnk'); (path.parent/'other.lnk').symlink_to(path)
@makes
def device(path): path.symlink_to('/dev/zero')
@makes
def empty_folder(path): path.mkdir()
@makes
def folder_of_text(path): path.mkdir(); (path/'read me.txt').write_text('text')
@makes
def up(path): path.symlink_to(path.parent)


NAMES = ['new\nline.png', 'tab\tand\rreturn.JPG', 'ünïcödé 図 \u202e.png', os.fsdecode(b'\xff\xfe\xe4.png'), 'x'*251 + '.png', "it's \"quoted\" %s {0} $HOME `x`;&.png", '-rf.png', '\x1b[31mred\x07.png', ' .png', '..png.png', 'a.png\u2028.png']
odd_name = lambda name: (lambda rng: (f'name {name[:20]!r}', dict(name=name, data=rng.choice((b'', b'no image', encoded(rng, 'png')[:40])), must='skipped')))

IMAGES = collect('image',
    *[damaged_image(end, how) for how in ('cut', 'cut', 'header', 'flip') for end in MODES],
    *[damaged_image(end, how) for how in ('holes', 'lose', 'insert') for end in MODES], *[damaged_image(end, how) for how, end in (('swap', 'jpg'), ('swap', 'png'), ('as_text', 'png'), ('as_text', 'jpg'), ('as_text', 'tif'))],
    *[strange('the header of one format before the body of another', f'x.{end}', header_of_another, None) for end in ('jpg', 'png', 'tif', 'webp')],
    strange('no bytes', 'x.png', b''), strange('one byte', 'x.jpg', b'\xff'), strange('zeros', 'x.png', bytes(5000)), strange('random bytes', 'x.webp', lambda rng: rng.randbytes(3000)), strange('a text', 'x.jpg', b'Dear Sir or Madam,\n'),
    strange('a page', 'x.gif', b'<html>404 not found</html>'), strange('a vector image', 'x.png', b'<svg xmlns="http://www.w3.org/2000/svg"/>'), strange('PostScript', 'x.png', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'),
    strange('an archive', 'x.jpg', b'PK\x03\x04' + bytes(200)), strange('a whole image and more', 'x.png', lambda rng: encoded(rng, 'png', 'RGB') + rng.randbytes(999), 'taken'),
    *[strange(f'PNG of {w}x{h}', 'x.png', png(w, h, *more)) for w, h, *more in ((2**31-1, 2**31-1), (2**32-1, 1), (0, 0), (13000, 13000, 8, 0), (8, 8, 7, 9), (100000, 1, 16, 6))], strange('PNG with a hundred MB of comment', 'x.png', text_bomb(), None),
    *[strange(f'BMP of {w}x{h}, {b} bits', 'x.bmp', bmp(w, h, b)) for w, h, b in ((2**31-1, 2**31-1, 24), (30000, -30000, 32), (-5, 5, 24), (0, 9, 8), (9, 9, 77))],
    *[strange(f'TIFF with {tags}', 'x.tif', tiff(**tags), must) for tags, must in ((dict(width=2**32-1, height=2**32-1), 'skipped'), (dict(strips=2**31), 'skipped'), (dict(bytes=2**32-1), None), (dict(next=8), 'taken'), (dict(samples=60000), 'skipped'),
        (dict(bits=0), 'skipped'), (dict(rows=0), None), (dict(compression=9999), 'skipped'), (dict(photometric=77), 'skipped'))],
    strange('GIF of 65535x65535', 'x.gif', b'GIF89a' + b'\xff'*4 + b'\xf7\0\0' + bytes(768) + b',' + bytes(4) + b'\xff'*4 + b'\0\x08' + bytes(50)), strange('JPEG of 65535x65535', 'x.jpg', b'\xff\xd8\xff\xc0\0\x11\x08' + b'\xff'*4 + b'\x03\x01\x11\0\x02\x11\0\x03\x11\0\xff\xd9'),
    strange('a folder', 'x.png', empty_folder, 'absent'), strange('a folder of a text', 'x.jpg', folder_of_text, 'absent'), strange('a link to nothing', 'x.png', dangling), strange('a link to itself', 'x.png', loop), strange('two links to each other', 'x.png', two_loops),
    strange('a link to the folder', 'up.png', up, 'absent'), strange('a link to endless zeros', 'x.png', device), strange('a pipe', 'x.png', pipe), strange('a socket', 'x.png', plug), *map(odd_name, NAMES))


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
        assert len(at) + len(images.skipped) == (where != 'absent') and where == (getattr(case, 'must', None) or where) and (where != 'absent' or case.must == 'absent'), where
        assert err.getvalue() == '' and len(said) == (where == 'skipped') and all(str(w.message).isprintable() for w in said), said
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
    assert torch.equal(images.x[[at[f] for f in alone.files]], alone.x) and len(images.files) + len(images.skipped) == 20 + sum(getattr(c, 'must', None) != 'absent' for c in IMAGES)


# CSV files

TRUE = {f'{"abc"[k%3]}/{k:02}.png': 'ant bee cat'.split()[k%3] for k in range(24)}  # file: label
TABLE = '\n'.join(['file,label', *(f'{f},{l}' for f, l in TRUE.items())]) + '\n'


def rows(change=str, head='file,label', rows=None, end='\n'): return end.join([head, *map(change, (f'{f},{l}' for f, l in (rows or TRUE.items())))]) + end


def table(what, data, must=None, **more):
    "A CSV file, which must be taken as 'true' labels, 'refused', or, None, refused or without wrong labels"
    return lambda rng: (what, dict(data=(d := data(rng) if callable(data) else data) if isinstance(d, bytes) else d.encode(), must=must, more=more))


def damaged_table(how):
    return lambda rng: (how, dict(data=DAMAGES[how](rng, rng.choice((TABLE, rows(end='\r\n'), rows(lambda r: '"' + r.replace(',', '";"') + '"', 'file;label'), '\ufeff' + TABLE)).encode()), must=None, more={}, damaged=True))


def named(file, must='refused'): return table(f'file {file[:30]!r}', rows(rows=[*TRUE.items(), (file, 'ant')]), must)


wide = lambda rng: '\n'.join([','.join(['file', *(f'c{k}' for k in range(3000)), 'label']), *(','.join([f, *['7']*3000, l]) for f, l in TRUE.items())])
each = lambda text: text.replace(',', ';')

CSVS = collect('csv',
    *[table(what, text, 'true') for what, text in {'as it should be': TABLE, 'DOS': rows(end='\r\n'), 'old Mac': rows(end='\r'), 'byte order mark': '\ufeff' + TABLE, 'semicolons': each(TABLE), 'tabs': TABLE.replace(',', '\t'),
        'quotes': rows(lambda r: '"' + r.replace(',', '","') + '"'), 'other columns': rows(lambda r: f'é,{r},"a,b"', 'id,file,label,more'), 'upper case': rows(head=' FILE , Label '), 'empty lines': TABLE.replace('\n', '\n\n') + ',\n\n',
        'each row twice': TABLE + TABLE.split('\n', 1)[1], 'backslashes': TABLE.replace('/', '\\'), 'paths': TABLE.replace('/', '/.././a/../').replace('a/../', '', 0).replace('/.././a/../', '/./'), 'no last line end': TABLE.rstrip(),
        '3000 columns': wide(None), 'other order': rows(rows=random.Random(0).sample(sorted(TRUE.items()), 24))}.items()],
    *[damaged_table('cut') for _ in range(14)], *[damaged_table('flip') for _ in range(8)], *[damaged_table(how) for how in ('header', 'holes', 'holes', 'lose', 'lose', 'insert', 'swap', 'as_text')],
    *[table(what, text, 'refused') for what, text in {'nothing': '', 'a line end': '\n', 'a mark only': '\ufeff', 'header only': 'file,label\n', 'quoted header only': '"file","label"', 'no header': TABLE.split('\n', 1)[1], 'no label column': TABLE.replace('label', 'class'),
        'no file column': TABLE.replace('file', 'name'), 'a column twice': rows(lambda r: r + ',zebra', 'file,label,label'), 'file twice': rows(lambda r: 'a/00.png,' + r, 'file,file,label'), 'bars': TABLE.replace(',', '|'), 'spaces': TABLE.replace(',', ' '),
        'commas, then semicolons': rows(each), 'a field too few': rows() + 'a/00.png\n', 'a field too many': TABLE.replace('ant', 'ant,bee', 1), 'thousands of fields': TABLE.replace('ant', 'ant' + ','*5000, 1), 'blank label': TABLE.replace('ant', '  ', 1),
        'two labels': TABLE + 'a/00.png,bee\n', 'two labels by two paths': TABLE + './a/../a/00.png,bee\n', 'one label for all': rows(lambda r: r.split(',')[0] + ',x'), 'a quote that never ends': TABLE.replace('ant', '"ant', 1), 'the last quote never ends': TABLE.rstrip() + '"x' + '\na/00.png,"ant',
        'a quote in the middle': TABLE.replace('a/00.png', '"a/"00.png', 1), 'one line without end': 'file,label\na/00.png,' + 'x'*300000, 'UTF-16': TABLE.encode('utf-16'), 'UTF-16 without a mark': TABLE.encode('utf-16-le'), 'UTF-32': TABLE.encode('utf-32'),
        'Latin-1': TABLE.replace('bee', 'été').encode('latin-1'), 'NUL': TABLE.replace('bee', 'b\0ee', 1), 'NUL in a name': TABLE.replace('a/00', 'a/\x0000', 1), 'NUL at the end': TABLE + '\0'*4096, 'an image': png(4, 4), 'random bytes': random.Random(1).randbytes(2000),
        '50,000 rows of no image': rows(rows=[(f'x/{k}.png', 'ant') for k in range(50000)])}.items()],
    *map(named, ['/etc/passwd', '/dev/zero', '../labels.csv', 'labels.csv', 'a', '', '.', '..', '~', '~/x.png', 'a/00.png/', 'A/00.PNG/x', 'file:///a/00.png', '../'*5000 + 'x', 'x'*100000, 'a\x00b', 'ü\u202e.png', '*.png', 'a/00.png a/03.png']),
    *[table(f'several labels by {sep!r}', rows(lambda r: r + rng.choice(('', f'{sep}dog', sep*3, f' {sep} {sep}dog')), 'file;label' if sep == ',' else 'file,label') if sep != ',' else TABLE, None, sep=sep) for rng in [random.Random(3)] for sep in ('|', ' ', ';', 'e', 'ant', '\0', '🙂', ',')],
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
    assert len(wrong) <= (3 if getattr(case, 'damaged', 0) else 0) if case.what != 'cut' else wrong == [] or len(wrong) == 1 and TRUE[wrong[0][0]].startswith(wrong[0][1]), wrong


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


def option(name, *args): return lambda rng: (f'{name} {" ".join(map(str, args))[:60]!r}', dict(command=name, args=[rng.choice(a) if isinstance(a, list) else a for a in args]))
def of(name, **values): return [option(name, '--'+k, v) for k, vs in values.items() for v in vs]


WRONG = dict(method=['byol', 'SimSiam', 'simsiam,rotation', WORDS], backbone=['resnet1', 'vgg11', 'hf_hub:x/y', '../x', 'vit_small_patch16_224.', WORDS], epochs=['0', '-1', 'nan', '1e3', NUMBERS], size=['3', '-64', '1025', '99999999999999999999', NUMBERS], bs=['1', '-1', '-8', NUMBERS],
             lr=['-1', 'nan', 'inf', '-inf', '1e30', NUMBERS], seed=['-1', str(2**32), str(2**70), '1.5', NUMBERS], weights=['none.pth', '.', '/dev/null', '/dev/zero', 'Imagenet', ' '], minutes=['-1', 'nan', '-inf', NUMBERS], device=['tpu', 'cuda:99', 'meta', 'CPU', '-1', WORDS],
             processes=['0', '-1', '100000', NUMBERS], labels=['none.csv', '.', '/dev/null', 'Folders'], labelled=['{none}', '{file}', '{flat}', '{empty}'], sep=['|', '\0'], out=['{file}', '/dev/null', '/dev/null/x', '/proc/x', 'x'*300, '{album}/run', '{album}'])
NETS = ['16', 'width', 'width=', 'width=print()', ')(', '*[1]', '**{}', '**{"size": 8}', 'lambda: 0', 'channels=', 'width=8', 'channels=()', 'channels=(8,8)', 'channels="abcd"', 'channels=(0,0,0,0)', 'channels=(8,8,8,-8)', 'channels=(8,8,8,1000000000000)', 'in_chans=1', 'in_chans=0', 'in_chans=7',
        'size=99', 'name="nin"', 'images=1', 'out=3', 'method=1', 'weights=3', 'minutes=1', 'pretrained=True', 'num_classes=3', 'features_only=True', 'global_pool="x"', 'act_layer="none"', 'checkpoint_path="/etc/passwd"', '('*3000, 'é=1', 'channels=(8,8,8,8), channels=(8,8)', '\0']
NINS = ['width=-8', 'width=0', 'width=9', 'width="a"', 'width=None', 'width=1000000000000', 'n_blocks=0', 'n_blocks=-1', 'width=8, first=(1,)', 'width=8, first=(0,0,0)', 'width=8, first=(8,8.5,8)', 'width=8, momentum="x"', 'width=8, channels=1', 'colour=1', 'channels=(8,8,8,8)']
TRANSFERS = dict(head=['box', 'LINEAR', WORDS], upto=['-1', '5', '9'*20, NUMBERS], epochs=['-1', '1.5', NUMBERS], bs=['0', '-1', '1', NUMBERS], lr=['-1', 'nan', 'inf', '-inf', '1e30', NUMBERS], seed=['-1', str(2**70), NUMBERS], device=['tpu', WORDS], valid=['{none}', '{flat}', '{file}', '{empty}', '{two}'],
                 labels=['', 'none.csv', '/dev/null', 'Folders'], sep=['|'])

OPTIONS = collect('option',
    *of('ssl_pretrain', **WRONG), *[option('ssl_pretrain', '--net', n) for n in NETS], *[option('ssl_pretrain', '--backbone', 'nin', '--net', n) for n in NINS],
    option('ssl_pretrain', '--backbone', 'vit_small_patch16_224', '--size', '17'), option('ssl_pretrain', '--backbone', 'nin', '--net', 'width=8', '--weights', 'imagenet'), option('ssl_pretrain', '--labels', 'folders', '--sep', '|'), option('ssl_pretrain', '--labelled', '{album}', '--sep', '|'),
    option('ssl_pretrain', '--none', '1'), option('ssl_pretrain', '--epochs'), option('ssl_pretrain', 'another'), *[option('ssl_pretrain', '@', folder) for folder in ('{none}', '{file}', '{empty}', '', '/dev/null', 'x'*5000)],
    *of('ssl_transfer', **TRANSFERS), option('ssl_transfer', '--freeze', '--finetune'), option('ssl_transfer', '--finetune', '--lr', '-1'), option('ssl_transfer', '--finetune', '--lr', 'nan'), *[option('ssl_transfer', '@', '{run}', f) for f in ('{none}', '{file}', '{flat}', '{empty}', '{run}')],
    *[option(name, '@', r, *more) for name, *more in (('ssl_transfer', '{album}'), ('ssl_export',)) for r in ('{none}', '{file}', '{album}', '', '/dev/null', 'x'*5000, '{run}/config.json')],
    *of('ssl_export', to=['onnx', 'TIMM', WORDS], out=['x.pth', '/', '.', '/dev/null', '/dev/null/x.safetensors', 'x'*300 + '.safetensors', '{run}/config.json', '{run}/weights.safetensors', '{folder}']), option('ssl_export', '--half', 'yes'))
