"Folders of images as they are: odd files, odd names, labels, what is kept for next time, and what is said when it cannot be"
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from conftest import one_line_error as one_line
from ssl_nb import decode, image_files
from ssl_nb.augment import Normalize
from ssl_nb.data import ImageDL, Images, InputError, holdout, image_dls, label_fraction
from ssl_nb.decode import decode_images
from ssl_nb.folders import FolderImages, duplicate_words, find_duplicates, fits, good_size, image_folder, measure_stats, memory_needed, skipped_words
from ssl_nb.image_files import find_images

posix = pytest.mark.skipif(os.name != 'posix', reason='needs links, pipes and any byte in names')


def photo(seed=0, size=(40, 32), mode='RGB'):
    "A smooth image, so that JPEG is close to it"
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.BICUBIC).convert(mode)


def fill(folder, names, size=(40, 32)):
    "Write a photograph under each name; gives the folder"
    for k, n in enumerate(names):
        path = os.path.join(folder, n)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        photo(k, size).save(path)
    return folder


def loud(f, *args, **kwargs):
    "What a call gives, and what it warns of"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        return f(*args, **kwargs), [str(w.message) for w in said]


def square(path, size=32, channels=None): return image_files._square(path, size, channels)


def rgb(img, size=32):
    "What should become of an image in mode RGB"
    side = min(img.size)
    left, top = (img.width-side)//2, (img.height-side)//2
    return np.asarray(img.crop((left, top, left+side, top+side)).resize((size, size), Image.BICUBIC)).transpose(2, 0, 1)


def off(a, b): return np.abs(a.astype(int)-b).mean()


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    "Nothing is kept outside of the test"
    cache = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
    return cache/'ssl_nb/folders'


@pytest.fixture
def no_decoding(monkeypatch):
    def forbid():
        def fail(*args, **kwargs): raise AssertionError('an image was decoded')
        monkeypatch.setattr(decode, '_read_all', fail)
    return forbid


@pytest.fixture
def no_memory(monkeypatch): monkeypatch.setattr(decode, 'fits', lambda n_bytes, share=.5: False)


# One image

@pytest.mark.parametrize('end', ['jpg', 'jpeg', 'JPG', 'png', 'PNG', 'webp', 'bmp', 'tif', 'TIFF', 'gif', 'ppm'])
def test_formats(tmp_path, end):
    photo().save(tmp_path/f'x.{end}')
    x = image_folder(tmp_path, 32, cache=None).x
    assert x.shape == (1, 3, 32, 32) and x.dtype == torch.uint8
    assert off(x[0].numpy(), rgb(photo())) < (12 if end == 'gif' else 6)
    if end.lower() in ('png', 'bmp', 'tif', 'tiff', 'ppm'): assert (x[0].numpy() == rgb(photo())).all()


def test_every_suffix_that_is_looked_for(tmp_path):
    "... and that Pillow can write too: all are read, by what is in them"
    writable = [e for e in image_files.SUFFIXES if Image.registered_extensions()[e] in Image.SAVE]
    for e in writable:
        image = photo(size=(64, 64)).convert('1' if e in ('.xbm', '.pbm') else 'L' if e == '.pfm' else 'RGB')
        image.convert('F' if e == '.pfm' else None).save(tmp_path/f'x{e}')
    images = image_folder(tmp_path, cache=None)
    assert len(images) == len(writable) > 25 and not images.skipped and {'.jfif', '.jpe', '.jp2', '.tga'} <= set(writable)


@pytest.mark.parametrize('end', ['pdf', 'eps', 'ps', 'mpg', 'wmf', 'h5', 'fli'])
def test_what_starts_programs_or_is_no_photograph_is_not_opened(tmp_path, end): assert f'.{end}' not in image_files.SUFFIXES


def test_a_class_of_jfif(tmp_path):
    "Pictures saved by a browser are a class like any other"
    fill(tmp_path, ['cat/1.jpg', 'cat/2.jpg'])
    (tmp_path/'dog').mkdir()
    for k in range(3): photo(k).save(tmp_path/f'dog/{k}.JFIF', format='JPEG')
    images, said = loud(image_folder, tmp_path)
    assert images.vocab == ['cat', 'dog'] and images.y.tolist() == [0, 0, 1, 1, 1] and not said


def test_telephones(tmp_path, monkeypatch):
    "HEIC, whatever it is called: named with the package that reads it, and read where that is installed"
    fill(tmp_path, [f'{k}.png' for k in range(9)])
    for n in ('a.HEIC', 'b.jpg'): (tmp_path/n).write_bytes(b'\0\0\0\x18ftypheic' + bytes(100))
    (tmp_path/'c.NEF').write_bytes(b'MM\0*' + bytes(100))
    monkeypatch.setattr(image_files, 'SUFFIXES', tuple(e for e in image_files.SUFFIXES if e != '.heic'))
    images, said = loud(image_folder, tmp_path, max_bad=.5)
    assert images.skipped['a.HEIC'] == images.skipped['b.jpg'] == 'in .heic, which `pip install pillow-heif` makes readable'
    assert "camera's raw format" in images.skipped['c.NEF'] and 'pip install pillow-heif' in said[0]
    class Reader(ImageFile.ImageFile):
        format = 'HEIF'
        def _open(self): self._size, self._mode, self.tile = (40, 32), 'RGB', []
        def load(self): self.im = photo().im; return super().load()
    Image.register_open('HEIF', Reader, lambda head: head[4:12] == b'ftypheic')
    Image.register_extension('HEIF', '.heic')
    try:
        monkeypatch.setattr(image_files, 'SUFFIXES', image_files._suffixes())
        images, _ = loud(image_folder, tmp_path, 32, max_bad=.5, cache=None)
        assert list(images.skipped) == ['c.NEF'] and (images.x[images.files.index('a.HEIC')].numpy() == rgb(photo())).all()
    finally: Image.OPEN.pop('HEIF'); Image.ID.remove('HEIF'); Image.EXTENSION.pop('.heic')


def test_content_counts_and_not_the_suffix(tmp_path):
    photo().save(tmp_path/'x.png')
    (tmp_path/'x.png').rename(tmp_path/'x.jpg')
    assert (square(tmp_path/'x.jpg') == rgb(photo())).all()


@pytest.mark.parametrize('size', [8, 31, 32, 33, 100])
@pytest.mark.parametrize('shape', [(32, 32), (33, 32), (400, 30), (31, 500), (1, 1), (1, 300), (300, 1), (2, 3)])
def test_any_shape(tmp_path, size, shape):
    photo(1, shape).save(tmp_path/'x.png')
    x = square(tmp_path/'x.png', size)
    assert x.shape == (3, size, size) and off(x, rgb(photo(1, shape), size)) < (20 if shape == (2, 3) else 1)  # enlarged ten times, the row beside the square counts


def test_image_of_the_right_size_is_not_touched(tmp_path):
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    img.save(tmp_path/'x.png')
    assert (square(tmp_path/'x.png').transpose(1, 2, 0) == np.asarray(img)).all()


@pytest.mark.parametrize('end', ['jpg', 'png'])
def test_antialiasing(tmp_path, end):
    "Stripes one pixel wide become grey, instead of a pattern; also with the fast roads for large images"
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path/f'x.{end}', **(dict(quality=95) if end == 'jpg' else {}))
    assert np.abs(square(tmp_path/f'x.{end}')[:, :, 1:-1].astype(int) - 127).max() < 20


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('size', [16, 32, 64, 250])
def test_large_jpeg(tmp_path, mode, size):
    "Decoded at a part of its size, and near to what it is at full size"
    img = photo(3, (1003, 701), mode)
    img.save(tmp_path/'x.jpg', quality=95)
    with Image.open(tmp_path/'x.jpg') as full: assert off(square(tmp_path/'x.jpg', size), rgb(full.convert('RGB'), size)) < 2


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('end', ['jpg', 'png', 'webp', 'tiff'])
def test_exif(tmp_path, turn, end):
    "As Pillow itself turns it"
    from PIL import ImageOps
    exif = Image.Exif()
    exif[274] = turn
    photo(2, (48, 32)).save(tmp_path/f'x.{end}', exif=exif)
    with Image.open(tmp_path/f'x.{end}') as img: want = rgb(ImageOps.exif_transpose(img).convert('RGB'))
    assert (square(tmp_path/f'x.{end}') == want).all()


@pytest.mark.parametrize('exif', [b'', b'Exif\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0' + bytes(range(200)), b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0', b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0'])
def test_damaged_exif(tmp_path, exif, capfd):
    photo().save(tmp_path/'x.jpg', exif=exif)
    images, said = loud(image_folder, tmp_path, cache=None)
    assert off(images.x[0].numpy(), rgb(photo(), 64)) < 6 and not said and capfd.readouterr() == ('', '')


@pytest.mark.parametrize('order', ['<', '>'])
def test_16_bits(tmp_path, order):
    "Scaled, not clipped: 65,535 becomes 255"
    a = np.linspace(0, 65535, 32*32).reshape(32, 32)
    img = Image.frombytes('I;16' if order == '<' else 'I;16B', (32, 32), a.astype(f'{order}u2').tobytes())
    for end in ('png', 'tif') if order == '<' else ('tif',):
        img.save(tmp_path/f'x.{end}')
        x = square(tmp_path/f'x.{end}')
        assert x.min() == 0 and x.max() == 255 and np.abs(x - a.astype(int)/257).max() <= .5 and (x[0] == x[2]).all()


def png16(path, a, color):
    "A PNG of 16 bits a channel, [H,W,C], which Pillow cannot write"
    raw = b''.join(b'\0' + row.astype('>u2').tobytes() for row in a)
    chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', a.shape[1], a.shape[0], 16, color, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b''))


@pytest.mark.parametrize('color, channels', [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_of_colour_and_transparency(tmp_path, color, channels):
    a = np.random.default_rng(0).integers(0, 65536, (32, 32, channels))
    if channels in (2, 4): a[..., -1] = 65535
    png16(tmp_path/'x.png', a, color)
    want = np.broadcast_to(a[..., :3] if channels > 2 else a[..., :1], (32, 32, 3)).transpose(2, 0, 1)
    assert np.abs(square(tmp_path/'x.png').astype(int) - want/257).max() <= 1


def test_wide_values(tmp_path):
    "32 bits and floats"
    a = np.linspace(0, 1, 32*32, dtype=np.float32).reshape(32, 32)
    for v, want in [(a, 255*a), (a*.5, 127.5*a), (a*1e6-5e5, 255*a), (a*255, 255*a), ((a*1e6).astype(np.int32), 255*a), ((a*60000).astype(np.int32), a*60000/257), (a*0, a*0), (a*0-7, a*0)]:
        Image.fromarray(v).save(tmp_path/'x.tif')
        assert np.abs(square(tmp_path/'x.tif')[0] - want).max() <= 1
    a[3, 3], a[4, 4] = np.nan, np.inf
    Image.fromarray(a).save(tmp_path/'x.tif')
    x = square(tmp_path/'x.tif')[0]
    assert x[3, 3] == x[4, 4] == 0 and x[31, 31] == 255


@pytest.mark.parametrize('mode, end', [('RGBA', 'png'), ('RGBA', 'webp'), ('LA', 'png'), ('P', 'png'), ('P', 'gif'), ('L', 'png'), ('RGB', 'png'), ('1', 'png')])
def test_transparent_on_white(tmp_path, mode, end):
    "The left half is transparent, however the format says so: white; the right half as it is"
    img, keys = Image.new('RGBA', (32, 32), (0, 0, 0, 0)), {}
    img.paste((200, 200, 200, 255), (16, 0, 32, 32))
    if mode in ('RGBA', 'LA'): img = img.convert(mode)
    elif mode == 'P': img = img.convert('RGB').quantize(4); keys = dict(transparency=img.getpixel((0, 0)))
    else: img = img.convert('RGB').convert(mode); keys = dict(transparency=(0, 0, 0) if mode == 'RGB' else 0)
    img.save(tmp_path/f'x.{end}', **keys, **(dict(lossless=True) if end == 'webp' else {}))
    x = square(tmp_path/f'x.{end}')
    assert (x[:, :, :12] == 255).all() and np.abs(x[:, :, 20:].astype(int) - (255 if mode == '1' else 200)).max() <= 2


def test_half_transparent(tmp_path):
    Image.new('RGBA', (40, 40), (255, 0, 0, 128)).save(tmp_path/'x.png')
    assert np.abs(square(tmp_path/'x.png').astype(int).reshape(3, -1) - [[255], [127], [127]]).max() <= 1


def test_hidden_colours_do_not_shine_through(tmp_path):
    "Green that is fully transparent leaves no green rim when the image is made smaller"
    img = Image.new('RGBA', (256, 256), (0, 255, 0, 0))
    img.paste((0, 0, 0, 255), (77, 0, 256, 256))
    img.save(tmp_path/'x.png')
    x = square(tmp_path/'x.png').astype(int)
    assert np.abs(x[0]-x[1]).max() <= 2


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr'])
def test_other_modes(tmp_path, mode):
    img = photo(4, (40, 40)).convert(mode)
    img.save(tmp_path/'x.tif')
    assert off(square(tmp_path/'x.tif'), rgb(img.convert('RGB'))) < 3


def test_first_frame(tmp_path):
    a, b = photo(1), photo(2)
    for end, more in dict(gif={}, webp=dict(lossless=True), tiff={}, png={}).items():
        a.save(tmp_path/f'x.{end}', save_all=True, append_images=[b, b], **more)
        assert off(square(tmp_path/f'x.{end}'), rgb(a)) < 10 < off(rgb(b), rgb(a)), end
    a.save(tmp_path/'x.jpg', format='MPO', save_all=True, append_images=[b])  # as telephones do
    assert off(square(tmp_path/'x.jpg'), rgb(a)) < 7


# Grey or colour

@pytest.mark.parametrize('kinds, channels', [('L', 1), ('LL1', 1), (['L', 'I;16', 'LA', 'P'], 1), ('LR', 3), ('RL', 3), ('R', 3)])
def test_channels(tmp_path, kinds, channels):
    for k, mode in enumerate(kinds):
        img = photo(k, mode='L')
        if mode == 'R': img = photo(k)
        elif mode == 'I;16': img = Image.fromarray(np.asarray(img).astype(np.uint16)*257)
        else: img = img.convert(mode)
        img.save(tmp_path/f'{k}.png')
    for cache in (None, True, True):
        x = image_folder(tmp_path, 32, cache=cache).x
        assert x.shape == (len(kinds), channels, 32, 32)
        for k in range(len(kinds)): assert (x[k].numpy() == square(tmp_path/f'{k}.png')[:channels]).all()
    assert image_folder(tmp_path, 32, channels=3).x.shape[1] == 3
    assert image_folder(tmp_path, 32, channels=1).x.shape[1] == 1


def test_grey_saved_as_colour(tmp_path):
    for k in range(5): photo(k, (200, 150), 'L').convert('RGB').save(tmp_path/f'{k}.jpg', quality=70)
    assert image_folder(tmp_path).x.shape[1] == 1


# Files that cannot be read

@pytest.mark.parametrize('end', ['jpg', 'png', 'webp', 'bmp', 'tif', 'gif'])
@pytest.mark.parametrize('share', [0, .001, .1, .5, .9])
def test_truncated(tmp_path, end, share, capfd):
    fill(tmp_path, [f'{k:02}.{end}' for k in range(10)], (90, 90))
    path = tmp_path/f'05.{end}'
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    images, said = loud(image_folder, tmp_path)
    assert list(images.skipped) == [path.name] and len(images) == 9 and path.name not in images.files
    assert images.skipped[path.name] in ('empty', 'truncated', 'damaged', 'no image of a known kind')
    assert len(said) == 1 and path.name in said[0] and '1 file skipped' in said[0] and '\n' not in said[0]
    assert capfd.readouterr() == ('', '')
    assert (images.x[5].numpy() == square(tmp_path/f'06.{end}', 64)).all()  # the rows after it moved up
    again, said = loud(image_folder, tmp_path)
    assert again.skipped == images.skipped and torch.equal(again.x, images.x) and len(said) == 1


@pytest.mark.parametrize('end', ['jpg', 'png', 'webp', 'bmp', 'tif', 'gif', 'ppm'])
def test_any_byte_changed(tmp_path, end, capfd):
    "Whatever is in a file: an image of the right form, or a reason"
    photo(0, (60, 60)).save(tmp_path/f'x.{end}')
    whole, rng, reasons = (tmp_path/f'x.{end}').read_bytes(), random.Random(0), set()
    with image_files.quiet_pillow():
        for _ in range(150):
            k = rng.randrange(min(len(whole), 200)) if rng.random() < .7 else rng.randrange(len(whole))
            (tmp_path/f'x.{end}').write_bytes(whole[:k] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4))) + whole[k+rng.randrange(3):])
            x = decode.try_square(tmp_path/f'x.{end}', 32)
            if isinstance(x, str): reasons.add(x); assert '\n' not in x and len(x) < 60
            else: assert x.shape == (3, 32, 32) and x.dtype == np.uint8
    assert capfd.readouterr() == ('', '')


def test_reasons(tmp_path):
    fill(tmp_path, [f'{k:03}.png' for k in range(60)])
    (tmp_path/'text.jpg').write_text('not an image')
    (tmp_path/'empty.jpg').touch()
    (tmp_path/'phone.HEIC').write_bytes(b'\0\0\0\x18ftypheic' + bytes(100))
    (tmp_path/'vector.png').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')  # no other program is started for it
    (tmp_path/'bomb.ppm').write_bytes(b'P6 20000 20000 255 ')
    png16(tmp_path/'bomb.png', np.zeros((8, 8, 1)), 0)
    whole = (tmp_path/'bomb.png').read_bytes()
    head = b'IHDR' + struct.pack('>II', 30000, 20000) + whole[24:29]
    (tmp_path/'bomb.png').write_bytes(whole[:12] + head + struct.pack('>I', zlib.crc32(head)) + whole[33:])
    images, said = loud(image_folder, tmp_path, max_bad=.2)
    assert len(images) == 60
    huge, strange = 'too large (over 178 million pixels)', 'no image of a known kind'
    assert images.skipped == {'text.jpg': strange, 'empty.jpg': 'empty',
                              'phone.HEIC': 'in .heic, which `pip install pillow-heif` makes readable',
                              'vector.png': strange, 'bomb.ppm': huge, 'bomb.png': huge}
    assert said == [skipped_words(images)] and '6 files skipped (2 too large' in said[0]
    assert '2 no image of a known kind' in said[0] and 'the first is bomb.png' in said[0]
    assert repr(images).endswith(', 6 skipped')


def test_large_but_not_too_large(tmp_path):
    "Over the number from which Pillow warns, below the limit: it is read, and nothing is said"
    Image.new('L', (10000, 9500), 77).save(tmp_path/'x.jpg', quality=50)
    images, said = loud(image_folder, tmp_path)
    assert not said and ((images.x-77.).abs() <= 2).all()


def test_strict_warnings_do_not_matter(tmp_path):
    Image.new('L', (10000, 9500), 77).save(tmp_path/'x.jpg', quality=50)
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert not image_folder(tmp_path).skipped


@posix
def test_links_and_pipes(tmp_path):
    fill(tmp_path/'real', [f'{k:02}.png' for k in range(30)])
    (tmp_path/'real/by link.png').symlink_to(tmp_path/'real/00.png')
    (tmp_path/'real/lost.png').symlink_to(tmp_path/'nowhere')
    (tmp_path/'real/round.png').symlink_to(tmp_path/'real/round.png')
    os.mkfifo(tmp_path/'real/pipe.png')  # who opens it waits for ever
    images, _ = loud(image_folder, tmp_path, labels=None)
    assert len(images) == 31 and images.skipped['real/pipe.png'] == 'no file' and set(images.skipped) == {'real/lost.png', 'real/round.png', 'real/pipe.png'}
    assert find_duplicates(images, images) == [(0, 30)]


@posix
def test_links_to_folders(tmp_path):
    fill(tmp_path, ['pictures/b/1.png', 'pictures/a/1.png', 'elsewhere/c/1.png'])
    p = tmp_path/'pictures'
    (p/'0 up').symlink_to(tmp_path)
    (p/'a/round').symlink_to(p)
    (p/'0 first').symlink_to(p/'b')
    (tmp_path/'elsewhere/d').symlink_to(tmp_path/'elsewhere/c')
    assert list(find_images(p)) == ['0 up/elsewhere/c/1.png', 'a/1.png', 'b/1.png']  # each file once, by the name without a link where there is one
    (p/'0 up').unlink()
    (p/'c').symlink_to(tmp_path/'elsewhere')
    assert list(find_images(p)) == ['a/1.png', 'b/1.png', 'c/c/1.png']
    (tmp_path/'link').symlink_to(p)
    assert image_folder(tmp_path/'link').vocab == ['a', 'b', 'c']


def test_too_many_bad(tmp_path, home):
    fill(tmp_path/'x', [f'{k:02}.png' for k in range(20)])
    for k in (3, 5): (tmp_path/f'x/{k:02}.png').write_text('')
    assert len(loud(image_folder, tmp_path/'x')[0]) == 18  # a tenth, and not more
    (tmp_path/'x/07.png').write_text('no image')
    for _ in range(2): one_line(lambda: image_folder(tmp_path/'x'), f"{tmp_path/'x'}: too many of its 20 images cannot be read (2 empty, 1 no image of a known kind; the first is 03.png)", 'max_bad (now 0.1')
    assert not list(home.glob('.*'))  # nothing half is left
    assert len(loud(image_folder, tmp_path/'x', max_bad=.2)[0]) == 17
    one_line(lambda: image_folder(tmp_path/'x'), 'too many')  # kept by now, and refused all the same
    for p in (tmp_path/'x').iterdir(): p.write_text('')
    one_line(lambda: image_folder(tmp_path/'x', max_bad=1), 'too many of its 20 images cannot be read (20 empty')
    one_line(lambda: image_folder(tmp_path/'x', size=None), 'no size can be chosen')


def test_stops_early(tmp_path, monkeypatch):
    for k in range(3000): (tmp_path/f'{k}.png').write_text('')
    seen, try_square = [], decode.try_square
    monkeypatch.setattr(decode, 'try_square', lambda path, **kwargs: seen.append(path) or try_square(path, **kwargs))
    one_line(lambda: image_folder(tmp_path, max_bad=.02), 'too many of its 3000 images')
    assert len(seen) < 200


# Names

NAMES = ['a b/x y.png', 'a b/ünïcödé 図.png', "a b/it's \"quoted\", %s {0} $HOME `x`.png", 'c;,\t/tab\there.png', 'c;,\t/-rf.png', 'c;,\t/~.png']


@posix
def test_odd_names(tmp_path):
    names = [*NAMES, 'new\nline/two\nlines\r.png', 'new\nline/\x1b[31mred.png', os.fsdecode(b'\xff\xfe/\xe4.png'), 'back\\slash/\\.png', 'ends.jpg/x.png', 'c;,\t/' + 'long'*60 + '.png']
    fill(tmp_path, names)
    for bad in ('new\nline/b\nad.png', os.fsdecode(b'\xff\xfe/\xe5.png')): open(tmp_path/bad, 'w').close()
    for _ in range(2):
        images, said = loud(image_folder, tmp_path, max_bad=.5)
        assert sorted(images.files) == images.files == sorted(names) and len(images.skipped) == 2
        assert images.vocab == sorted({n.split('/')[0] for n in names}) and all(images.vocab[y] == f.split('/')[0] for y, f in zip(images.y, images.files))
        assert len(said) == 1 and said[0].isprintable()
        for k, f in enumerate(images.files): assert (images.x[k].numpy() == square(os.path.join(tmp_path, f), 64)).all()
        json.dumps(images.files), json.dumps(images.skipped)
    for part in ('new\nline', os.fsdecode(b'\xff\xfe')):
        assert one_line(lambda: image_folder(tmp_path/part, max_bad=0)).isprintable()
        assert one_line(lambda: image_folder(tmp_path/part/'none')).isprintable()
    assert one_line(lambda: image_folder(tmp_path, vocab=['x', 'y'])).isprintable()


@posix
def test_one_line_for_folders_of_any_name(tmp_path):
    odd = tmp_path/'a\nb'
    fill(odd, ['x.png', 'c\nd/y.png'])
    (odd/'no\nimages').mkdir()
    (odd/'no\nimages/x.t\nt').touch()
    (odd/'l\n.csv').write_text('nothing')
    for call in (lambda: image_folder(odd), lambda: image_folder(odd/'no\nimages'), lambda: image_folder(odd/'x.png'), lambda: image_folder(odd/'l\n.csv'), lambda: image_folder(odd, labels='l\n.csv'),
                 lambda: image_folder(odd, labels='m\n.csv'), lambda: image_folder(odd/'c\nd', vocab=['a', 'b'])): assert one_line(call).isprintable()
    images = image_folder(odd, labels=None)
    assert duplicate_words(find_duplicates(images, images), images, images).isprintable() and skipped_words(images).isprintable()


def test_what_is_passed_over(tmp_path):
    fill(tmp_path, ['x.png', '.hidden.png', '.git/y.png', '__MACOSX/z.png', '._x.png'])
    for n in ('Thumbs.db', 'notes.txt', 'labels.csv', 'x.json', 'README', 'x.png.bak', 'movie.mp4', '.DS_Store'): (tmp_path/n).write_text('text')
    images, said = loud(image_folder, tmp_path)
    assert images.files == ['x.png'] and not images.skipped
    assert images.passed == {'hidden': 3, '__MACOSX folder': 1, '.txt': 1, '.csv': 1, '.json': 1, 'without a suffix': 1, '.bak': 1, '.mp4': 1}
    assert len(said) == 1 and said[0] == skipped_words(images) and 'skipped as no images: 3 hidden, 1 ' in said[0] and said[0].endswith(', 3 others')
    assert images.subset(slice(0, 1)).passed == images.passed
    labels = tmp_path/'labels.csv'
    labels.write_text('file,label\nx.png,a\n')
    assert '.csv' not in loud(image_folder, tmp_path, labels='labels.csv', vocab=['a', 'b'])[0].passed  # it was read


@pytest.mark.parametrize('litter', ['@eaDir', '__MACOSX', '.thumbnails', '#recycle', '$RECYCLE.BIN', 'System Volume Information'])
def test_litter(tmp_path, litter):
    "Thumbnails and what was thrown away, as a class of their own or below one: left out, and said"
    fill(tmp_path, ['cat/1.jpg', 'dog/1.jpg', f'{litter}/1.jpg', f'dog/{litter}/1.jpg/SYNOPHOTO_THUMB_M.jpg'])
    images, said = loud(image_folder, tmp_path)
    assert images.vocab == ['cat', 'dog'] and images.files == ['cat/1.jpg', 'dog/1.jpg']
    assert len(said) == 1 and f'2 {litter} folders' in said[0]
    assert len(image_folder(tmp_path/litter)) == 1  # who asks for it gets it


def test_a_hidden_root_is_not_hidden(tmp_path):
    fill(tmp_path/'.cache/x', ['a.png'])
    assert image_folder(tmp_path/'.cache/x').files == ['a.png']


# The folder

def test_no_folder(tmp_path, monkeypatch):
    (tmp_path/'file.zip').write_text('')
    (tmp_path/'empty').mkdir()
    (tmp_path/'texts/deep').mkdir(parents=True)
    for n in ('a.txt', 'deep/b.txt', 'deep/c.MP4', 'README'): (tmp_path/'texts'/n).touch()
    one_line(lambda: image_folder(tmp_path/'none'), f"{tmp_path/'none'}: no such folder")
    one_line(lambda: image_folder(tmp_path/'file.zip'), 'is a file; give the folder', 'unpack')
    one_line(lambda: image_folder(tmp_path/'empty'), f"{tmp_path/'empty'} holds no images", '.jpg, .jpeg, .png', 'found nothing')
    one_line(lambda: image_folder(tmp_path/'texts'), 'found 2 .txt, 1 ', '1 .mp4', '1 without a suffix')
    monkeypatch.chdir(tmp_path/'empty')
    one_line(lambda: image_folder(''), 'holds no images')
    for folder in (None, 3, ['x']): one_line(lambda: image_folder(folder), 'give the path of a folder')
    one_line(lambda: image_folder('a\0b'), 'no such folder')


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    "Below it too: a class that is missing would not be noticed"
    fill(tmp_path, ['a/x.png', 'b/secret/x.png'])
    scandir = os.scandir
    def refuse(path):
        if str(path).endswith('secret'): raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    one_line(lambda: image_folder(tmp_path), f"{tmp_path/'b/secret'} cannot be read: Permission denied")


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    fill(tmp_path, ['a.png', 'b.png'])
    Open = Image.open
    def refuse(path, **kwargs):
        if str(path).endswith('a.png'): raise PermissionError(13, 'Permission denied')
        return Open(path, **kwargs)
    monkeypatch.setattr(Image, 'open', refuse)
    assert loud(image_folder, tmp_path, max_bad=.5)[0].skipped == {'a.png': 'permission denied'}


@pytest.mark.parametrize('wrong', [dict(size=7), dict(size=1025), dict(size=0), dict(size=-64), dict(size=64.), dict(size='64'), dict(size=True), dict(channels=2), dict(channels=0), dict(channels='3'), dict(workers=0),
                                   dict(workers=1.5), dict(max_bad=-.1), dict(max_bad=2), dict(max_bad='x'), dict(max_bad=float('nan')), dict(labels=3), dict(labels=['a']), dict(sep=';'), dict(labels=None, sep=';'), dict(labels='x.csv', sep=''), dict(labels='x.csv', sep=3)])
def test_wrong_settings(tmp_path, wrong):
    fill(tmp_path, ['x.png'])
    name = 'sep' if 'sep' in wrong else next(iter(wrong))
    one_line(lambda: image_folder(tmp_path, **wrong), f'{name}={wrong[name]!r}: give')


def test_path_kinds(tmp_path, monkeypatch):
    fill(tmp_path/'x', ['x.png'])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    for folder in ('x', str(tmp_path/'x'), tmp_path/'x', './x/', '~/x', 'x/../x'):
        images = image_folder(folder)
        assert images.root == tmp_path/'x' and images.name == 'x' and images.files == ['x.png']


# Labels by folder

def test_labels_by_folder(tmp_path):
    fill(tmp_path, ['b/1.png', 'a/deep/er/2.png', 'a/1.png', 'B/1.png', '10/1.png', '9/1.png'])
    images = image_folder(tmp_path)
    assert images.vocab == ['10', '9', 'B', 'a', 'b'] and images.files == ['10/1.png', '9/1.png', 'B/1.png', 'a/1.png', 'a/deep/er/2.png', 'b/1.png']
    assert images.y.tolist() == [0, 1, 2, 3, 3, 4] and images.y.dtype == torch.long and images.c == 5
    other = image_folder(tmp_path, vocab=['z', 'b', 'a', 'B', 9, 10])
    assert other.vocab == ['z', 'b', 'a', 'B', '9', '10'] and other.y.tolist() == [5, 4, 3, 2, 2, 1]
    assert image_folder(tmp_path, labels=None).y is None


def test_flat_folder(tmp_path):
    fill(tmp_path, ['1.png', '2.png'])
    (tmp_path/'empty').mkdir()
    (tmp_path/'texts').mkdir()
    (tmp_path/'texts/a.txt').touch()
    images = image_folder(tmp_path)
    assert images.y is None and images.vocab is None and images.c == 0
    one_line(lambda: image_folder(tmp_path, vocab=['a', 'b']), 'vocab is given, but there are no labels')


def test_unclear_folders(tmp_path):
    fill(tmp_path, ['mixed/1.png', 'mixed/2.png', 'mixed/a/1.png', 'mixed/b/1.png', 'one/a/1.png', 'parts/Train/a/1.png', 'parts/test/a/1.png', 'class/train/1.png', 'class/boat/1.png'])
    one_line(lambda: image_folder(tmp_path/'mixed'), '1.png is in no subfolder', '(such images in all: 2)', 'labels=None')
    one_line(lambda: image_folder(tmp_path/'one'), "one class only, 'a'", 'labels=None')
    one_line(lambda: image_folder(tmp_path/'parts'), 'subfolders are called Train, test', 'labels=None')
    for part in ('mixed', 'one', 'parts'): assert image_folder(tmp_path/part, labels=None).y is None
    assert image_folder(tmp_path/'class').vocab == ['boat', 'train']
    assert image_folder(tmp_path/'one', vocab=['a', 'b']).y.tolist() == [0]
    assert image_folder(tmp_path/'parts', vocab=['Train', 'test']).y.tolist() == [0, 1]  # who says so
    one_line(lambda: image_folder(tmp_path/'one', vocab=['b', 'c']), "a/1.png has the label 'a', which is not in vocab (b, c)")
    one_line(lambda: image_folder(tmp_path/'one', vocab=['a', 'b', 'a']), "vocab has 'a' more than once")
    one_line(lambda: image_folder(tmp_path/'one', vocab=[]), 'no image has a label')


@pytest.mark.parametrize('names', [
    ['seg_train', 'seg_test'], ['seg_train', 'seg_test', 'seg_pred'], ['train2017', 'val2017'],
    ['Training Images', 'Test Images'], ['TRAIN'], ['train', 'valid', 'test', 'annotations']])
def test_parts_are_asked_about(tmp_path, names):
    fill(tmp_path, [f'{n}/cat/1.png' for n in names])
    line = one_line(lambda: image_folder(tmp_path), 'as parts of a data set are, not classes', 'give one of them, such as', 'labels=None')
    assert str(tmp_path/next(n for n in names if 'train' in n.lower())) in line


@pytest.mark.parametrize('names', [['train', 'boat', 'bus'], ['trainer', 'tester'], ['test tube', 'train', 'boat', 'bus', 'pipette'], ['valley', 'testudo']])
def test_classes_that_are_no_parts(tmp_path, names):
    fill(tmp_path, [f'{n}/1.png' for n in names])
    assert image_folder(tmp_path).vocab == sorted(names)


@posix
def test_two_forms_of_one_name(tmp_path):
    "A Mac writes é as two letters, a spreadsheet as one: the same class, the same file"
    nfd, nfc = 'cafe\u0301', 'caf\u00e9'
    fill(tmp_path/'mac', [f'{nfd}/1.png', f'{nfc}/2.png', f'bar/{nfd}.png'])
    images = image_folder(tmp_path/'mac')
    assert images.vocab == ['bar', nfc] and images.y.tolist() == [images.vocab.index(nfc if f[0] == 'c' else 'bar') for f in images.files]
    assert image_folder(tmp_path/'mac', vocab=['bar', nfd]).vocab == ['bar', nfc]
    one_line(lambda: image_folder(tmp_path/'mac', vocab=['bar', nfd, nfc]), 'more than once')
    table = csv(tmp_path, f'file,label\nmac/{nfd}/1.png,{nfc}\nmac/{nfc}/2.png,{nfd}\nmac/bar/{nfc}.png,bar\n')
    assert same(image_folder(tmp_path/'mac', labels=table), images)


# Labels from a CSV file

@pytest.fixture
def four(tmp_path):
    fill(tmp_path/'four', ['1.png', '2.png', 'sub/3.png', 'sub/4 x.png'])
    return tmp_path/'four'


def csv(folder, text, name='labels.csv', encoding='utf-8'):
    (folder/name).write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return folder/name


ROWS = 'file,label\n1.png,cat\n2.png,dog\nsub/3.png,dog\nsub/4 x.png,cat\n'


@pytest.mark.parametrize('text', [ROWS, ROWS.replace('\n', '\r\n'), ROWS.replace('\n', '\r'), '\ufeff' + ROWS, ROWS.replace(',', ';'), ROWS.replace(',', '\t'), ROWS.replace('file,label', ' Label , FILE').replace('1.png,cat', 'cat,1.png')
                                  .replace('2.png,dog', 'dog,2.png').replace('sub/3.png,dog', 'dog,sub/3.png').replace('sub/4 x.png,cat', 'cat,sub/4 x.png'), ROWS.rstrip(), ROWS.replace('cat', '"cat"').replace('2.png', '"2.png"'),
                                  ROWS.replace(',', ' , '), ROWS.replace('sub/', 'sub\\'), ROWS.replace('sub/', './sub/../sub//'), ROWS.replace('\n', ',7\n').replace('label,7', 'label,id'), ROWS + '\n\n,\n', ROWS + '1.png,cat\n'])
def test_csv(four, text):
    images = image_folder(four, labels=csv(four, text))
    assert images.vocab == ['cat', 'dog'] and images.y.tolist() == [0, 1, 1, 0] and not images.skipped


def test_csv_elsewhere(four, tmp_path, monkeypatch):
    "Names from the folder, from the CSV file, or whole; the file by its path, or by its name in the folder"
    for rows in (ROWS, ROWS.replace('\n', '\nfour/').removesuffix('four/'), ROWS.replace('\n', f'\n{four}/').removesuffix(f'{four}/')):
        assert image_folder(four, labels=str(csv(tmp_path, rows, 'mine.csv'))).y.tolist() == [0, 1, 1, 0]
    csv(four, ROWS)
    assert image_folder(four, labels='labels.csv').y.tolist() == [0, 1, 1, 0]
    monkeypatch.chdir(tmp_path)
    assert image_folder('four', labels='mine.csv').y.tolist() == [0, 1, 1, 0]


def test_a_csv_belongs_to_its_folder(tmp_path, monkeypatch):
    "Both folders have a labels.csv of the same names: none is taken for the other, wherever one is"
    for part, rows in (('train', '1.png,cat\n2.png,dog\n'), ('val', '1.png,dog\n2.png,cat\n')):
        fill(tmp_path/part, ['1.png', '2.png']); csv(tmp_path/part, 'file,label\n' + rows)
    for here in ('train', 'val', '.'):
        monkeypatch.chdir(tmp_path/here)
        assert image_folder(tmp_path/'val', labels='labels.csv').y.tolist() == [1, 0]
        assert image_folder(tmp_path/'train', labels='labels.csv').y.tolist() == [0, 1]
    assert image_folder(tmp_path/'val', labels=tmp_path/'train/labels.csv').y.tolist() == [0, 1]  # a whole path does what it says


def test_one_csv_over_two_folders(tmp_path):
    for part in ('train', 'val'): fill(tmp_path/part, ['1.png', f'{part}2.png'])
    table = csv(tmp_path, 'file,label\ntrain/1.png,cat\ntrain/train2.png,dog\nval/1.png,dog\nval2.png,cat\n')
    train, val = tmp_path/'train', tmp_path/'val'
    assert image_folder(train, labels=table, others=[val]).y.tolist() == [0, 1] and image_folder(val, labels=table, others=[train]).y.tolist() == [1, 0]
    one_line(lambda: image_folder(train, labels=table), "line 4: there is no image 'val/1.png'")
    csv(tmp_path, 'file,label\n1.png,cat\ntrain2.png,dog\nval2.png,cat\n')  # whose is 1.png?
    one_line(lambda: image_folder(val, labels=table, others=[train]),
             f"line 2: '1.png' is in {val} and in {train}; give names that go from where the CSV file is")
    csv(tmp_path, 'file,label\ntrain/1.png,cat\ntrain2.png,dog\n')
    one_line(lambda: image_folder(val, labels=table, others=[train]), f'names no image of {val}; give a CSV file of its own')


def test_csv_leaves_out(four):
    for cache in (True, True, None):
        images, said = loud(image_folder, four, labels=csv(four, 'file,label\nsub/3.png,b\n1.png,a\n'), cache=cache)
        assert images.files == ['1.png', 'sub/3.png'] and images.y.tolist() == [0, 1]
        assert images.skipped == {f: 'without a row in the CSV file' for f in ('2.png', 'sub/4 x.png')} and len(said) == 1 and '2 files skipped (2 without a row' in said[0]
        assert (images.x[1].numpy() == square(four/'sub/3.png', 64)).all()


def test_csv_and_bad_images(four):
    (four/'2.png').write_text('')
    images, _ = loud(image_folder, four, labels=csv(four, ROWS), max_bad=.5)
    assert images.skipped == {'2.png': 'empty'} and images.y.tolist() == [0, 1, 0] and images.files == ['1.png', 'sub/3.png', 'sub/4 x.png']


def test_several_labels(four):
    text = 'file;label\n1.png;red, round\n2.png;\nsub/3.png;round,round ,,\nsub/4 x.png;7\n'
    images = image_folder(four, labels=csv(four, text), sep=',')
    assert images.vocab == ['7', 'red', 'round'] and images.y.dtype == torch.bool
    assert images.y.int().tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert type(images.loss_func).__name__.startswith('BCE') and images.c == 3
    assert image_folder(four, labels=csv(four, text), sep=',', vocab=['round', 'red', 'x', '7']).y.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert [len(p) for p in holdout(images, .25)] == [3, 1] and len(label_fraction(images, .5)) == 2
    assert loud(image_folder, four, labels=csv(four, 'file,label\n1.png,red\n2.png,\n'), sep='|')[0].y.tolist() == [[True], [False]]  # one attribute is enough
    one_line(lambda: image_folder(four, labels=csv(four, 'file,label\n1.png,\n'), sep='|'), 'no image has a label')
    one_line(lambda: image_folder(four, labels=csv(four, text), sep=',', vocab=['round', 'red']), "sub/4 x.png has the label '7', which is not in vocab (round, red)")


def test_numbers_are_names(four):
    images = image_folder(four, labels=csv(four, 'file,label\n1.png,007\n2.png,7\nsub/3.png,1.0\nsub/4 x.png,-1\n'))
    assert images.vocab == ['-1', '007', '1.0', '7']


@pytest.mark.parametrize('text, said', [
    ('x'*200000, 'the first line should name the columns'),  # longer than Python's csv reads a field
    ('', "the first line should name the columns, as in file,label; it is ''"),
    ('1.png,cat\n2.png,dog\n', "it is '1.png,cat'"),
    ('name,label\n1.png,cat\n', 'the first line should name the columns'),
    ('file label\n1.png cat\n', 'the first line should name the columns'),
    ('file,label\n', 'names no image'),
    ('file,label\n1.png,cat\n2.png\n', 'line 3: 1 fields, but line 1 names 2'),
    ('file,label\n1.png,cat\n2.png,dog,red\n', "line 3: 3 fields, but line 1 names 2; put quotes around a field with ','"),
    ('file,label\n1.png,cat\n2.png,\n', "line 3: '2.png' has no label"),
    ('file,label\n1.png,cat\n2.png,   \n', "line 3: '2.png' has no label"),
    ('file,label\n1.png,cat\n9.png,dog\n8.png,dog\n', "line 3: there is no image '9.png' in"),
    ('file,label\n1.png,cat\n9.png,dog\n8.png,dog\n', '(such rows in all: 2)'),
    ('file,label\n1.png,cat\nlabels.csv,dog\n', "no image 'labels.csv'"),
    ('file,label\n1.png,cat\n/etc/passwd,dog\n', "no image '/etc/passwd'"),
    ('file,label\n1.png,cat\n../four/../../x.png,dog\n', 'no image'),
    ('file,label\n1.png,cat\n,dog\n', "no image ''"),
    ('file,label\n1.png,cat\n2.png,dog\n./1.png,dog\n', "line 4: './1.png' had another label"),
    ('file,label\n1.png,cat\n2.png,cat\n', "one class only, 'cat'"),
    ('file,label\n1.png,' + 'x'*200000 + '\n', 'line 2: field larger than field limit'),
    ('file,label\n1.png,"a\nb"\n2.png,"a\nb"\n', "one class only, 'a\\nb'"),
    ('file,label\n1\n.png,cat\n', 'line 2: 1 fields'),
    (ROWS.replace('dog', 'chïen').encode('latin-1'), 'is not in UTF-8 (byte 29); save it as CSV in UTF-8'),
    (ROWS.encode('utf-16'), 'is not in UTF-8 (byte 0)'),
    (b'\x89PNG\r\n\x1a\n', 'is not in UTF-8'),
    (b'file,label\n1.png,\0\n', ''),
])
def test_wrong_csv(four, text, said, home):
    one_line(lambda: image_folder(four, labels=csv(four, text)), said)
    assert not home.exists()  # it is seen before anything is decoded


def test_csv_that_is_not_there(four, tmp_path):
    one_line(lambda: image_folder(four, labels='nothing.csv'), f"{four/'nothing.csv'} cannot be read: No such file", "'folders'")
    one_line(lambda: image_folder(four, labels=tmp_path/'nothing.csv'), 'cannot be read')
    one_line(lambda: image_folder(four, labels='sub'), 'cannot be read')


def test_csv_with_any_byte_changed(four):
    rng, whole, refused = random.Random(1), ROWS.encode(), 0
    for _ in range(200):
        k = rng.randrange(len(whole))
        path = csv(four, whole[:k] + bytes([rng.randrange(256)]) + whole[k+rng.randrange(2):])
        try: images, _ = loud(image_folder, four, labels=path, size=8); assert len(images.y) == len(images.files) == len(images)
        except InputError as e: refused += 1; assert str(e).isprintable()
    assert 50 < refused < 200


# Kept for next time

def kept(home): return sorted(p.suffix for p in home.iterdir())


def same(a, b): return torch.equal(a.x, b.x) and a.files == b.files and a.skipped == b.skipped and (a.y is b.y is None or torch.equal(a.y, b.y)) and a.vocab == b.vocab


@pytest.fixture
def twelve(tmp_path):
    fill(tmp_path/'twelve', [f'{"ab"[k%2]}/{k:02}.png' for k in range(12)])
    (tmp_path/'twelve/b/05.png').write_text('')
    return tmp_path/'twelve'


def test_second_time(twelve, home, no_decoding):
    first = loud(image_folder, twelve)[0]
    grey = loud(image_folder, twelve, channels=1)[0]
    small = loud(image_folder, twelve, 32)[0]
    assert kept(home) == ['.bin']*3 + ['.json']*3
    no_decoding()
    assert same(loud(image_folder, twelve)[0], first) and same(loud(image_folder, twelve, channels=1)[0], grey) and same(loud(image_folder, twelve, 32)[0], small)
    assert loud(image_folder, twelve, labels=None)[0].y is None  # labels are not kept
    with pytest.raises(AssertionError): loud(image_folder, twelve, 48)
    with pytest.raises(AssertionError): loud(image_folder, twelve, cache=None)


@pytest.mark.parametrize('change', ['touch', 'content', 'add', 'remove', 'rename', 'mend', 'break', 'link'])
def test_changed_folder(twelve, home, change):
    loud(image_folder, twelve)
    old = sorted(home.iterdir())
    path = twelve/'a/02.png'
    if change == 'touch': os.utime(path, ns=(0, path.stat().st_mtime_ns+1))
    if change == 'content': photo(99).save(path)
    if change == 'add': photo(99).save(twelve/'a/new.png')
    if change == 'remove': path.unlink()
    if change == 'rename': path.rename(twelve/'b/02.png')
    if change == 'mend': photo(99).save(twelve/'b/05.png')
    if change == 'break': path.write_text('')
    if change == 'link': path.rename(twelve.parent/'x.png'); path.symlink_to(twelve.parent/'x.png'); photo(98).save(twelve.parent/'x.png')
    new = loud(image_folder, twelve, max_bad=.2)[0]
    assert same(new, loud(image_folder, twelve, cache=None, max_bad=.2)[0])
    assert kept(home) == ['.bin', '.json'] and not set(old) & set(home.iterdir())  # the old ones are gone


def test_other_things_may_change(twelve, home, no_decoding):
    first = loud(image_folder, twelve)[0]
    no_decoding()
    (twelve/'notes.txt').write_text('')
    (twelve/'a/.hidden.png').write_text('')
    (twelve/'empty').mkdir()
    assert same(loud(image_folder, twelve)[0], first)


def test_all_and_a_labelled_part(four, home, no_decoding):
    "Pretraining takes all images, a task the labelled ones: what is kept of one does not replace the other"
    path = csv(four, 'file,label\n1.png,a\n2.png,b\n')
    image_folder(four, labels=None)
    loud(image_folder, four, labels=path)
    no_decoding()
    assert len(image_folder(four, labels=None)) == 4 and len(loud(image_folder, four, labels=path)[0]) == 2
    csv(four, 'file,label\n1.png,b\n2.png,a\n')  # other labels of the same images
    assert loud(image_folder, four, labels=path)[0].y.tolist() == [1, 0]


def test_other_folders_stay(tmp_path, home):
    for n in 'ab': fill(tmp_path/n, ['x.png', 'y.png'])
    for n in 'ab': image_folder(tmp_path/n)
    image_folder(tmp_path/'a', 32)
    photo(50).save(tmp_path/'a/z.png')
    image_folder(tmp_path/'a')
    assert kept(home) == ['.bin']*3 + ['.json']*3


@pytest.mark.parametrize('file', ['.bin', '.json'])
@pytest.mark.parametrize('how', ['empty', 'grown', 'zeros'])
def test_damaged_cache(twelve, home, file, how):
    "The images are the right ones (files that are cut, changed or others': test_malformed.py)"
    first = loud(image_folder, twelve)[0]
    path = next(home.glob(f'*{file}'))
    whole = path.read_bytes()
    path.write_bytes(dict(empty=b'', grown=whole + b'\0', zeros=bytes(len(whole)))[how])
    again = loud(image_folder, twelve)[0]
    assert torch.equal(again.x, first.x) and again.files == first.files and list(again.skipped) == list(first.skipped)


@pytest.mark.parametrize('edit', [lambda d: d.update(shape=[11, 3, 32, 128]), lambda d: d.update(shape=[-11, -3, 64, 64]), lambda d: d.update(files=d['files'][:-1]), lambda d: d['files'].reverse(), lambda d: d.update(files=None),
                                  lambda d: d['skipped'].clear(), lambda d: d.update(stamp=[0, 0]), lambda d: d.pop('files'), lambda d: d.update(files=d['files'][:-1] + ['z.png'])])
def test_cache_that_tells_lies(twelve, home, edit):
    first = loud(image_folder, twelve)[0]
    path = next(home.glob('*.json'))
    about = json.loads(path.read_text())
    edit(about)
    path.write_text(json.dumps(about))
    if about.get('files') == first.files[::-1]: return  # as many and the same: nothing tells that the order is another
    assert same(loud(image_folder, twelve)[0], first)


def test_missing_half(twelve, home):
    first = loud(image_folder, twelve)[0]
    for end in ('.bin', '.json'):
        next(home.glob(f'*{end}')).unlink()
        assert same(loud(image_folder, twelve)[0], first) and kept(home) == ['.bin', '.json']


def test_rows_of_another_time(twelve, home, tmp_path):
    "The rows of this name were replaced, by as many bytes: the JSON file does not believe them"
    first = loud(image_folder, twelve)[0]
    path = next(home.glob('*.bin'))
    (tmp_path/'x').write_bytes(bytes(path.stat().st_size))
    os.replace(tmp_path/'x', path)
    assert same(loud(image_folder, twelve)[0], first)


@pytest.mark.parametrize('where', ['own', 'home', 'relative'])
def test_where_it_is_kept(twelve, tmp_path, monkeypatch, where, home):
    if where == 'own': loud(image_folder, twelve, cache=tmp_path/'my own'); folder = tmp_path/'my own'
    if where == 'home': monkeypatch.delenv('XDG_CACHE_HOME'); monkeypatch.setenv('HOME', str(tmp_path)); loud(image_folder, twelve); folder = tmp_path/'.cache/ssl_nb/folders'
    if where == 'relative': monkeypatch.setenv('XDG_CACHE_HOME', 'here'); monkeypatch.setenv('HOME', str(tmp_path)); loud(image_folder, twelve); folder = tmp_path/'.cache/ssl_nb/folders'  # must be absolute, by its specification
    assert kept(folder) == ['.bin', '.json'] and not home.exists()


@pytest.mark.parametrize('cache', [None, False])
def test_nothing_kept(twelve, home, cache):
    images = loud(image_folder, twelve, cache=cache)[0]
    assert not home.exists() and len(images) == 11
    images.x[0] = 0  # may be written to


def test_cannot_be_kept(twelve, tmp_path, home):
    (tmp_path/'file').write_text('')
    images, said = loud(image_folder, twelve, cache=tmp_path/'file')
    assert same(images, loud(image_folder, twelve)[0]) and len(said) == 2
    assert said[0].startswith(f"the decoded images are not kept for next time: cannot write {tmp_path/'file'}") and '\n' not in said[0]


@pytest.mark.parametrize('when', ['before', 'while'])
def test_full_disk(twelve, home, monkeypatch, when):
    true = loud(image_folder, twelve, cache=None)[0]
    if when == 'before': monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
    else:
        read = decode._read_all
        def full(f, **kwargs):
            if not isinstance(f, io.BytesIO): f.write(b'some'); raise OSError(28, 'No space left on device')
            return read(f, **kwargs)
        monkeypatch.setattr(decode, '_read_all', full)
    images, said = loud(image_folder, twelve)
    assert same(images, true) and 'No space left' in said[0] and list(home.iterdir()) == []


def test_neither_disk_nor_memory(twelve, no_memory, monkeypatch):
    one_line(lambda: image_folder(twelve, cache=None), '12 images of 64x64 pixels take 0.0 GB, more than the memory holds')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
    one_line(lambda: loud(image_folder, twelve), 'more than the memory holds')


def test_interrupted(twelve, home, monkeypatch):
    "Ctrl-C in the middle: at once; the next time goes on there, and ends the same"
    true = loud(image_folder, twelve, cache=None)[0]
    opened = count_decoded(monkeypatch, stop=7)
    with pytest.raises(KeyboardInterrupt): image_folder(twelve, workers=1)
    assert sorted(p.suffix for p in home.iterdir()) == ['.log', '.part'] and 6 <= len(opened) < 12
    log = next(home.glob('.*.log')).read_bytes()
    opened.clear()
    assert same(loud(image_folder, twelve)[0], true) and len(opened) == 12 - log.count(b'\n')
    assert kept(home) == ['.bin', '.json']


def count_decoded(monkeypatch, stop=None):
    "A list of what is decoded from now on; after so many, once, Ctrl-C"
    opened, try_square, note, left = [], decode.try_square, decode._note, [stop]
    monkeypatch.setattr(decode, 'try_square', lambda path, **kwargs: opened.append(path) or try_square(path, **kwargs))
    def noted(*args):
        note(*args)
        if left[0]:
            left[0] -= 1
            if not left[0]: raise KeyboardInterrupt
    monkeypatch.setattr(decode, '_note', noted)
    return opened


@pytest.mark.parametrize('harm', ['cut rows', 'cut log', 'other byte', 'zeros', 'no log', 'no rows', 'longer', 'nonsense', 'lies'])
def test_what_was_left_is_believed_as_far_as_it_stands(twelve, home, monkeypatch, harm):
    true = loud(image_folder, twelve, cache=None)[0]
    with monkeypatch.context() as m:
        count_decoded(m, stop=8)
        with pytest.raises(KeyboardInterrupt): image_folder(twelve, workers=1)
    rows, log = next(home.glob('.*.part')), next(home.glob('.*.log'))
    r, l = rows.read_bytes(), log.read_bytes()
    if harm == 'cut rows': rows.write_bytes(r[:-5000])
    if harm == 'cut log': log.write_bytes(l[:-4])
    if harm == 'other byte': rows.write_bytes(r[:30000] + bytes([r[30000] ^ 1]) + r[30001:])
    if harm == 'zeros': rows.write_bytes(bytes(len(r))); log.write_bytes(bytes(len(l)))
    if harm == 'no log': log.unlink()
    if harm == 'no rows': rows.write_bytes(b'')
    if harm == 'longer': rows.write_bytes(r + b'more'); log.write_bytes(l + b'[1')
    if harm == 'nonsense': log.write_bytes(b'{}\n' + l)
    if harm == 'lies': log.write_bytes(b'null\n[]\n[1, 2, 3]\n\xff\n')
    assert same(loud(image_folder, twelve)[0], true) and kept(home) == ['.bin', '.json']


def test_grey_goes_on_grey(tmp_path, home, monkeypatch):
    "Whether all are grey is known of those that were decoded before, too"
    for k in range(9): photo(k, mode='L' if k else 'RGB').save(tmp_path/f'{k}.png')
    count_decoded(monkeypatch, stop=4)
    with pytest.raises(KeyboardInterrupt): image_folder(tmp_path, 32, workers=1)
    assert image_folder(tmp_path, 32).x.shape == (9, 3, 32, 32)


# More than 8 bits

def deep(path, a): Image.fromarray(np.asarray(a, np.uint16)).save(path)


def ramp(top): return np.linspace(0, top, 32*32).round().reshape(32, 32)


@pytest.mark.parametrize('end', ['png', 'tif'])
def test_twelve_bits_in_sixteen(tmp_path, end, home):
    "As many grey levels as there are to be had, one factor for all images, and one line that says so"
    for k, top in enumerate((4095, 900, 200)): deep(tmp_path/f'{k}.{end}', ramp(top))
    for _ in range(2):
        images, said = loud(image_folder, tmp_path, 32)
        assert images.x.shape[1] == 1 and len(images.x[0].unique()) == 256 and images.scale == {'whole': [0, 4095]}
        for x, top in zip(images.x, (4095, 900, 200)): assert np.abs(x[0].numpy() - ramp(top)*255/4095).max() <= .5
        assert len(said) == 1 and 'whole numbers of 0 to 4095 became 0 to 255, the same in all images' in said[0] and '\n' not in said[0]
    assert images.subset(slice(0, 2)).scale == images.scale
    later, said = loud(image_folder, tmp_path, 32, scale={'whole': [0, 65535]})  # they go with others
    assert not said and later.x.max() == 16 and same(loud(image_folder, tmp_path, 32)[0], images)
    (tmp_path/'more').mkdir(); deep(tmp_path/f'more/0.{end}', ramp(9000))
    later, said = loud(image_folder, tmp_path/'more', 32, scale=images.scale)
    assert later.x.max() == 255 and len(said) == 1 and '16383 is beyond 4095' in said[0] and 'cut off' in said[0]


@pytest.mark.parametrize('top, high', [(65535, 65535), (40000, 65535), (1000, 1023), (255, 255), (1, 255), (0, 255)])
def test_as_many_bits_as_the_folder_holds(tmp_path, top, high):
    deep(tmp_path/'0.png', ramp(top)); deep(tmp_path/'1.png', ramp(top//2)); photo().save(tmp_path/'2.jpg')
    images, said = loud(image_folder, tmp_path, 32, cache=None)
    assert images.scale == {'whole': [0, high]} and len(said) == (high < 65535)
    assert np.abs(images.x[1].numpy() - ramp(top//2)*255/high).max() <= .5


def test_floats_by_what_the_folder_holds(tmp_path):
    "A dark image stays darker than a bright one"
    for k, top in enumerate((3000, 1500)): Image.fromarray(ramp(top).astype(np.float32)).save(tmp_path/f'{k}.tif')
    images, said = loud(image_folder, tmp_path, 32)
    assert images.scale == {'float': [0, 3000]} and 'floats of 0 to 3000' in said[0] and images.x[0].max() == 255 and images.x[1].max() == 128


def test_wrong_scale(tmp_path):
    fill(tmp_path, ['x.png'])
    for wrong in (3, [0, 1], {'whole': [1]}): one_line(lambda: image_folder(tmp_path, scale=wrong), 'scale=', 'images.scale')


def test_leftovers(twelve, home):
    "What a killed process left is removed, what another one is writing is not"
    loud(image_folder, twelve)
    path = next(home.glob('*.bin'))
    old, new, other = (path.with_name(f'.{n}.123.tmp') for n in (path.name, path.name.replace('.bin', 'x.bin'), 'mine'))
    for p in (old, new, other): p.write_text('half')
    for p in (old, other): os.utime(p, (0, 0))
    photo(9).save(twelve/'a/new.png')
    loud(image_folder, twelve)
    assert not old.exists() and new.exists() and other.exists()


fork = pytest.mark.skipif(not hasattr(os, 'fork') or sys.platform == 'darwin', reason='needs fork')


def child(f):
    "Run `f` in a process of its own, which need not import torch again; gives its number"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pid = os.fork()
    if pid: return pid
    code = 1
    try: f(); code = 0
    finally: os._exit(code)


@fork
def test_killed_at_any_moment(tmp_path, home):
    fill(tmp_path/'x', [f'{k:03}.png' for k in range(60)], (200, 200))
    true, rng, killed = image_folder(tmp_path/'x', cache=None), random.Random(0), 0
    start = time.time()
    image_folder(tmp_path/'x')
    whole = time.time()-start
    for _ in range(10):
        shutil.rmtree(home)
        pid = child(lambda: image_folder(tmp_path/'x', workers=1))
        time.sleep(rng.random()*1.2*whole)
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert same(image_folder(tmp_path/'x'), true)
        assert same(image_folder(tmp_path/'x'), true)
    assert killed > 2


@fork
def test_many_processes_at_once(tmp_path, home):
    "Some decode, some read, and the folder changes in between: each sees right images"
    fill(tmp_path/'x', [f'{k:03}.png' for k in range(30)])
    true = image_folder(tmp_path/'x', cache=None)
    def work():
        for _ in range(3): assert same(image_folder(tmp_path/'x', workers=1), true)
        os.utime(tmp_path/'x/000.png')
        assert same(image_folder(tmp_path/'x', workers=1), true)
    pids = [child(work) for _ in range(4)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0]*4
    image_folder(tmp_path/'x')
    assert kept(home) == ['.bin', '.json']


def test_workers(twelve):
    true = loud(image_folder, twelve, cache=None)[0]
    for n in (1, 2, 16): assert same(loud(image_folder, twelve, cache=None, workers=n)[0], true)


def test_few_are_decoded_ahead(tmp_path, monkeypatch):
    "Rows wait in memory for the slow one that comes first: not more than a few"
    for k in range(400): (tmp_path/f'{k:03}.png').write_text('')
    running, most = [0, 0], [0]
    def slow(path, **kwargs):
        running[0] += 1
        return np.zeros((3, 8, 8), np.uint8)
    class Slow(io.BytesIO):
        def write(self, x): running[1] += 1; most[0] = max(most[0], running[0]-running[1]); return super().write(x)
    monkeypatch.setattr(decode, 'try_square', slow)
    decode._read_all(Slow(), tmp_path, [f'{k:03}.png' for k in range(400)], 8, 3, 2, 0, False)
    assert running == [400, 400] and most[0] <= 12


def test_progress(tmp_path, capfd, monkeypatch):
    fill(tmp_path, [f'{k}.png' for k in range(4)])
    slow = image_files._square
    monkeypatch.setattr(image_files, '_square', lambda *args: time.sleep(.8) or slow(*args))
    image_folder(tmp_path, cache=None, workers=1)
    assert '/4' in capfd.readouterr().err
    image_folder(tmp_path, cache=None, workers=4, bar=False)
    assert capfd.readouterr() == ('', '')


# Larger than the memory

def resident(x):
    "How many bytes of a mapped array are in memory"
    start, found = x.data_ptr(), 0
    for line in open('/proc/self/smaps'):
        if '-' in line.split()[0]: a, b = (int(v, 16) for v in line.split()[0].split('-')); inside = a <= start < b
        elif inside and line.startswith('Rss:'): found += 1024*int(line.split()[1])
    return found


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps'), reason='needs Linux')
def test_a_batch_reads_only_its_rows(tmp_path, no_memory, monkeypatch):
    row = np.random.default_rng(0).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    for k in range(1000): (tmp_path/f'{k:04}.png').touch()
    monkeypatch.setattr(decode, 'try_square', lambda path, **kwargs: np.roll(row, int(path[-8:-4])))
    image_folder(tmp_path, 128)
    images = image_folder(tmp_path, 128)  # 49 MB, mapped
    assert resident(images.x) < 2e6
    torch.manual_seed(0)
    (x,) = next(iter(ImageDL(images, bs=16, shuffle=True, device='cpu')))
    assert 16*row.size/2 < resident(images.x) < 1e7
    torch.manual_seed(0)
    for image, k in zip(x, torch.randperm(1000)): assert (image.numpy() == np.roll(row, int(k))).all()


def test_mapped_is_the_same(twelve, no_memory, home):
    for _ in range(2):
        images = loud(image_folder, twelve)[0]
        assert isinstance(decode_images(twelve, find_images(twelve), max_bad=.2)[0], np.memmap)
        for k, f in enumerate(images.files): assert (images.x[k].numpy() == square(twelve/f, 64)).all()
        dls = image_dls(images, images.subset(slice(0, 4)), bs=4, device='cpu')
        assert [len(b[0]) for b in dls.train] == [4, 4] and dls.vocab == ['a', 'b']
        images.x[0] = 0  # a copy of the page: the file stays as it is
    shutil.rmtree(home)
    assert (images.x[1].numpy() == square(twelve/images.files[1], 64)).all()  # mapped files live on


def test_rows_may_be_written_to(twelve):
    for _ in range(2):
        images = loud(image_folder, twelve)[0]
        images.x.zero_()
    assert loud(image_folder, twelve)[0].x.any()


def test_memory():
    assert memory_needed(10, 32) == 30720 and memory_needed(10, 32, 1) == 10240
    assert fits(1000) and not fits(10**16) and not fits(1000, 0)


# Parts of a set

def test_parts_keep_files(twelve):
    images = loud(image_folder, twelve)[0]
    def check(part):
        assert isinstance(part, FolderImages) and part.root == twelve and part.skipped == {'b/05.png': 'empty'} and len(part.files) == len(part) and part.vocab == ['a', 'b']
        for x, f in zip(part.x, part.files): assert torch.equal(x, images.x[images.files.index(f)])
        if part.y is not None: assert [part.vocab[k] for k in part.y] == [f[0] for f in part.files]
    for i in (slice(3, 7), [5, 1], torch.tensor([4, 4, 0]), images.y == 1, np.array([3, 2]), slice(None)): check(images.subset(i))
    for part in (*holdout(images, .3), label_fraction(images, 2), images.thin(3), images.unlabelled(), images.to('cpu'), *holdout(images.unlabelled()), images.unlabelled().thin(4)): check(part)
    assert images.subset(slice(0, 2), 'few').name == 'few'
    assert images.to('meta').files == images.files
    one_line(lambda: FolderImages(images.x, files=['x']), '11 images but 1 files')


def test_learner_takes_them(twelve):
    "A stock fastai Learner fits and predicts"
    from fastai.learner import Learner
    images = loud(image_folder, twelve, 16)[0]
    fit, valid = holdout(images, .4)
    class Flat(torch.nn.Module):
        def __init__(self): super().__init__(); self.lin = torch.nn.Linear(768, 2)
        def forward(self, x): return self.lin(x.flatten(1)/255.)
    learn = Learner(image_dls(fit, valid, bs=4, device='cpu'), Flat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with learn.no_bar(): assert torch.equal(learn.get_preds()[1], valid.y)


# Sizes, statistics, duplicates

@pytest.mark.parametrize('sides, size', [([20], 32), ([32], 32), ([63], 32), ([64], 64), ([95, 96, 97], 96), ([100, 150, 3000], 128), ([223, 224], 128), ([224, 800, 900], 224), ([5000], 224)])
def test_good_size(tmp_path, sides, size):
    for k, s in enumerate(sides): photo(k, (s, s+100)).save(tmp_path/f'{k}.jpg')
    (tmp_path/'bad.jpg').write_text('')
    assert good_size(str(p) for p in sorted(tmp_path.iterdir())) == size
    assert loud(image_folder, tmp_path, size=None, max_bad=.5)[0].x.shape[-1] == size


def test_good_size_looks_at_few_headers(tmp_path, monkeypatch):
    photo().save(tmp_path/'x.png')
    opened, Open = [], image_files._open
    monkeypatch.setattr(image_files, '_open', lambda p: opened.append(p) or Open(p))
    assert good_size([tmp_path/'x.png']*12345) == 32 and 50 <= len(opened) <= 100


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('n', [1, 99, 101, 300])
def test_stats(n, channels):
    x = torch.randint(0, 256, (n, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    mean, std = measure_stats(Images(x))
    assert np.allclose(mean, (x/255.).mean((0, 2, 3))) and np.allclose(std, (x/255.).transpose(0, 1).flatten(1).std(1, correction=0), atol=1e-5) and len(mean) == channels
    assert np.allclose(measure_stats(Images(x/255.))[0], mean, atol=1e-5)
    z = Normalize(mean, std)(x)
    assert abs(z.mean()) < 1e-3 and abs(z.std()-1) < .01
    some = measure_stats(Images(x), n=max(1, n//3))
    assert np.allclose(some[0], mean, atol=.1)


def test_stats_do_not_depend_on_threads():
    "To the last digit"
    x = Images(torch.randint(0, 256, (300, 1, 33, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    threads, seen = torch.get_num_threads(), set()
    try:
        for n in (1, 2, 3, 5): torch.set_num_threads(n); seen.add(measure_stats(x))
    finally: torch.set_num_threads(threads)
    v = x.x.numpy().astype(object)
    assert seen == {((float(v.sum()/(255*v.size)),), (np.sqrt(float(v.size*(v*v).sum() - v.sum()**2))/(255*v.size),))}


def test_stats_of_images_that_are_all_alike():
    mean, std = measure_stats(Images(torch.full((5, 3, 8, 8), 51, dtype=torch.uint8)))
    assert np.allclose(mean, .2) and np.allclose(std, 1/255)


def test_duplicates(tmp_path):
    fill(tmp_path, ['a/1.png', 'a/2.png', 'b/3.png'])
    shutil.copy(tmp_path/'a/2.png', tmp_path/'b/again.png')
    Image.open(tmp_path/'a/2.png').save(tmp_path/'b/other.bmp')  # another file of the same pixels
    near = np.asarray(Image.open(tmp_path/'a/1.png')).copy()
    near[16, 16, 0] ^= 255
    Image.fromarray(near).save(tmp_path/'b/near.png')
    a = image_folder(tmp_path, 32)
    assert [(a.files[i], a.files[j]) for i, j in find_duplicates(a, a)] == [('a/2.png', 'b/again.png'), ('a/2.png', 'b/other.bmp')]
    b = a.subset([5, 2, 0])
    assert find_duplicates(a, b) == [(1, 0), (2, 1), (0, 2)] and find_duplicates(b, b) == []
    assert duplicate_words(find_duplicates(a, b), a, b).count('\n') == 0
    words = duplicate_words(find_duplicates(a, a), a, a)
    assert '2 of 6 images repeat an earlier one' in words and 'b/again.png is a/2.png' in words
    assert 'none of 3 images' in duplicate_words([], b, b) and 'number 2 is a/1.png' in duplicate_words([(0, 2)], a, Images(b.x))
    one_line(lambda: find_duplicates(a, image_folder(tmp_path, 16)), 'same size and channels')
    one_line(lambda: find_duplicates(a, image_folder(tmp_path, 32, channels=1)), 'same size and channels')


def test_many_equal_images():
    "All black: a pair for each, not for each two"
    black = Images(torch.zeros(3000, 3, 8, 8, dtype=torch.uint8))
    assert find_duplicates(black, black) == [(0, j) for j in range(1, 3000)]
    grey = Images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)[:, :1])  # no row of it lies together
    assert len(find_duplicates(grey, grey)) == 4


def test_docstrings_tell_of_input_errors():
    for f in (image_folder, find_images, decode_images, good_size, find_duplicates): assert 'Raises `InputError`' in f.__doc__
