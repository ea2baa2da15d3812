"CIFAR-10 in parts, STL-10, CelebA and noise: files in the releases' own formats, and what is said of each that is damaged"
import hashlib
import os
import pickle
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, STL10

from conftest import one_line_error as one_line
from ssl_nb.studies import datasets
from ssl_nb.data import ImageDL, InputError, cifar10
from ssl_nb.studies.datasets import celeba, noise, stl10
from ssl_nb.studies.demo import demo_runs, demo_table, probe_table
from ssl_nb.checkpoint import Checkpoint
from ssl_nb.results import one_setting, read_result, read_results
from ssl_nb.studies.runner import Place, do_run, run_study

md5 = lambda b: hashlib.md5(b).hexdigest()
COUNTS = dict(train=7, test=5, unlabeled=9)
FILES = ['train_X.bin', 'train_y.bin', 'unlabeled_X.bin', 'test_X.bin', 'test_y.bin']


# CIFAR-10 in parts

BATCHES = [f'data_batch_{k}' for k in range(1, 6)]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "The folder of a small release, 100 images a batch, ten of each class; torchvision is told its sums"
    folder, rng, sums = tmp_path/'cifar/cifar-10-batches-py', np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for name in [*BATCHES, 'test_batch', 'batches.meta']:
        content = dict(data=rng.integers(0, 256, (100, 3072), dtype=np.uint8), labels=rng.permutation(100).__mod__(10).tolist())
        if name == 'batches.meta': content = dict(label_names=[f'class {k}' for k in range(10)])
        (folder/name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = md5((folder/name).read_bytes())
    monkeypatch.setattr(CIFAR10, 'train_list', [[n, sums[n]] for n in BATCHES])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', sums['test_batch']]])
    monkeypatch.setattr(CIFAR10, 'meta', dict(filename='batches.meta', key='label_names', md5=sums['batches.meta']))
    return folder


def lose(folder, *numbers):
    for k in numbers: (folder/f'data_batch_{k}').unlink()


@pytest.mark.parametrize('there, name', [([1], 'batch 1'), ([5], 'batch 5'), ([1, 3], 'batches 1 and 3'), ([2, 3, 5], 'batches 2, 3 and 5'), ([1, 2, 3, 4], 'batches 1, 2, 3 and 4')])
def test_cifar_part(cifar, there, name):
    whole, test = cifar10(cifar.parent)
    lose(cifar, *({1, 2, 3, 4, 5} - {*there}))
    part, same = cifar10(str(cifar.parent), partial=True)
    rows = torch.cat([torch.arange(100*k-100, 100*k) for k in there])
    assert torch.equal(part.x, whole.x[rows]) and torch.equal(part.y, whole.y[rows]) and part.vocab == whole.vocab
    assert torch.equal(same.x, test.x) and torch.equal(same.y, test.y) and same.name == 'CIFAR-10, test'
    assert part.name == f'CIFAR-10, train, {name} of 5' and part.batches == there
    first = next(k for k in range(1, 6) if k not in there)
    one_line(lambda: cifar10(cifar.parent), f"{cifar/f'data_batch_{first}'} is missing", 'download=True', '`partial=True` (`--partial`) takes the training batches that are there')
    assert [n for n, _ in CIFAR10.train_list] == BATCHES  # torchvision's own list is as it was


def test_cifar_whole_as_part(cifar):
    (whole, _), (same, _) = (cifar10(cifar.parent, partial=p) for p in (False, True))
    assert torch.equal(whole.x, same.x) and whole.name == same.name == 'CIFAR-10, train' and whole.batches is same.batches is None


@pytest.mark.parametrize('name', ['data_batch_1', 'data_batch_3', 'test_batch', 'batches.meta'])
def test_cifar_part_damage(cifar, name):
    "What is there but is not right is never passed over, nor unpickled"
    lose(cifar, 2, 4)
    path = cifar/name
    whole = path.read_bytes()
    for damaged in (b'', whole[:-1], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], pickle.dumps(print)):
        path.write_bytes(damaged)
        assert '--partial' not in one_line(lambda: cifar10(cifar.parent, partial=True), f'{path} is truncated or not')
    path.unlink()
    for odd in (lambda: path.mkdir(), lambda: (path.rmdir(), path.symlink_to(cifar/'nowhere'))):
        odd()
        one_line(lambda: cifar10(cifar.parent, partial=True), f'{path} is no file')
    path.unlink()
    if 'data' not in name: assert '--partial' not in one_line(lambda: cifar10(cifar.parent, partial=True), f'{path} is missing')
    path.write_bytes(whole)
    assert cifar10(cifar.parent, partial=True)[0].batches == [1, 3, 5]


def test_cifar_part_of_nothing(cifar, tmp_path):
    call = lambda root=cifar.parent: cifar10(root, partial=True)
    lose(cifar, 1, 2, 3, 4, 5)
    one_line(call, f'{cifar} holds no training batch', 'download=True')
    assert '--partial' not in one_line(lambda: cifar10(cifar.parent), 'data_batch_1 is missing')  # it would not help
    for p in cifar.iterdir(): p.unlink()
    one_line(call, 'holds no training batch')
    cifar.rmdir()
    one_line(call, f'no folder {cifar}')
    cifar.write_text('')
    one_line(call, f'no folder {cifar}')
    one_line(lambda: call(tmp_path/'nowhere'), 'no folder')
    one_line(lambda: cifar10(tmp_path, download=True, partial=True), '--download', '--partial', 'give one of them')


def test_cifar_that_cannot_be_read(cifar, monkeypatch):
    "As of a folder of somebody else's; whoever runs this may be allowed all, so the system's answer is made up"
    def forbid(path): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(os, 'listdir', forbid)
    for partial in (True, False): one_line(lambda: cifar10(cifar.parent, partial=partial), f'cannot read {cifar}: Permission denied')


@pytest.fixture
def place(cifar, tmp_path):
    "A function that makes the place of a study on these images"
    return lambda out='out', **kwargs: Place(tmp_path/out, 'cpu', cifar.parent, **kwargs)


def shorter(runs): return [dict(r, config=dict(r['config'], train=100, test=50, **(dict(epochs=1) if 'epochs' in r['config'] else {}))) for r in runs]


def test_study_on_a_part(cifar, place, capfd):
    "Its results say so; other files do not go on with them; tables take one part only"
    runs = shorter(demo_runs('tiny', data='cifar10'))[:4]  # pretraining, two probes, and a head on the pretrained blocks
    lose(cifar, 2, 4, 5)
    run_study(runs, place(partial=True))
    assert 'on a part of cifar10: training batches [1, 3] only' in capfd.readouterr().out
    results = read_results(place().folder)
    assert len(results) == len(runs) and all(r['data'] == {'name': 'cifar10', 'batches': [1, 3]} for r in results)
    assert all(r['data'] == {'name': 'cifar10'} for r in runs)  # the plain data is as it was
    (place().folder/f"{runs[-1]['run']}.json").unlink()
    run_study(runs, place(partial=True), verbose=False)  # the same files: what is left is done
    assert len(read_results(place().folder)) == len(runs)
    demo_table(results), probe_table(results)

    lost = (cifar/'data_batch_3').read_bytes()
    (cifar/'data_batch_3').unlink()
    one_line(lambda: run_study(runs, place(partial=True)), 'made with another data (batches: [1, 3] and not [1])')
    (cifar/'data_batch_3').write_bytes(lost)
    for table in (demo_table, probe_table, one_setting):
        mixed = results + [dict(r, data={'name': 'cifar10'}) for r in results]
        one_line(lambda: table(mixed), 'several parts of the training images', '"all", [1, 3]')


def test_study_on_a_part_and_on_all(cifar, place):
    "With all five files `partial` changes nothing; what was made on all does not go on with fewer"
    runs = shorter(demo_runs('tiny', data='cifar10'))[2:3]  # a probe of random blocks
    run_study(runs, place(partial=True), verbose=False)
    saved = read_result(place().folder/f"{runs[0]['run']}.json")
    assert saved['data'] == {'name': 'cifar10'}
    run_study(runs, place(), verbose=False)
    lose(cifar, 1)
    one_line(lambda: place().data, 'data_batch_1 is missing')
    one_line(lambda: run_study(runs, place(partial=True)), 'made with another data (batches: all and not [2, 3, 4, 5])')
    again = do_run(dict(saved, data={'name': 'cifar10', 'batches': [9]}), place('other', partial=True))  # it is the place that knows
    assert again['data'] == {'name': 'cifar10', 'batches': [2, 3, 4, 5]}


def test_checkpoint_of_a_part(cifar, place, monkeypatch):
    "A fit that was cut off on a part does not go on with all"
    runs = shorter(demo_runs('tiny', data='cifar10'))[:1]
    runs[0]['config']['epochs'] = 2
    def stop(self): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        after = Checkpoint.after_epoch
        m.setattr(Checkpoint, 'after_epoch', lambda self: (after(self), stop(self)) if self.fitting else None)
        lost = (cifar/'data_batch_2').read_bytes()
        lose(cifar, 2)
        with pytest.raises(KeyboardInterrupt): run_study(runs, place(partial=True), verbose=False)
    (cifar/'data_batch_2').write_bytes(lost)
    one_line(lambda: run_study(runs, place(partial=True), verbose=False), 'belongs to another run', '"batches": [1, 3, 4, 5]')
    lose(cifar, 2)
    run_study(runs, place(partial=True), verbose=False)
    assert read_results(place().folder)[0]['data']['batches'] == [1, 3, 4, 5]


def test_place_without_parts(tmp_path, cifar, place):
    one_line(lambda: Place(tmp_path/'out', 'cpu', partial=True), 'partial=True', 'sample is taken whole')
    for data in ('stl10', 'celeba', 'sample'): one_line(lambda: place(data=data, partial=True), f'{data} is taken whole')
    one_line(lambda: place(partial=True, download=True).data, 'give one of them')
    assert not (tmp_path/'out/.writable').exists()


# STL-10

def write_stl(root, counts=COUNTS):
    "The release's files, with a few random images each; gives the images and labels as they should come back"
    folder, rng, res = root/'stl10_binary', np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for part, n in counts.items():
        x, y = rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
        x.transpose(0, 1, 3, 2).tofile(folder/f'{part}_X.bin')
        if part != 'unlabeled': (y+1).tofile(folder/f'{part}_y.bin')
        res[part] = torch.tensor(x), torch.tensor(y).long()
    (folder/'class_names.txt').write_text('\n'.join(datasets._STL10_CLASSES) + '\n')
    (folder/'fold_indices.txt').write_text('0 1 2 \n'*10)
    return res


def tell_md5(monkeypatch, root):
    "torchvision shall take these files for the release's"
    for files in ('train_list', 'test_list'):
        monkeypatch.setattr(STL10, files, [[n, md5((root/'stl10_binary'/n).read_bytes())] for n, _ in getattr(STL10, files)])


@pytest.fixture
def stl(tmp_path, monkeypatch):
    "A root with a small release"
    write_stl(tmp_path/'stl')
    tell_md5(monkeypatch, tmp_path/'stl')
    return tmp_path/'stl'


def test_stl10(tmp_path, monkeypatch):
    "1,203 images without labels: they are turned a thousand at a time"
    true = write_stl(tmp_path, {**COUNTS, 'unlabeled': 1203})
    tell_md5(monkeypatch, tmp_path)
    data = stl10(str(tmp_path))
    assert list(data) == ['train', 'test', 'unlabelled']
    for part, name in zip(data, COUNTS):
        x, y = true[name]
        assert torch.equal(data[part].x, x) and data[part].x.is_contiguous() and data[part].name == f'STL-10, {part}'
        if name == 'unlabeled': assert data[part].y is None
        else: assert torch.equal(data[part].y, y) and data[part].y.dtype == torch.long and data[part].c == 10
    assert [b.shape for b in ImageDL(data['unlabelled'], 100, shuffle=True).one_batch()] == [(100, 3, 96, 96)]
    data['train'].x.fill_(0)  # the tensor may be written to


def test_stl10_images_are_in_memory_once(stl):
    "What torchvision read is what is given: no copy of it is left"
    read = []
    class Reader(datasets._Checked):
        def __init__(self, *args): super().__init__(*args); read.append(self.data)
    datasets._Checked, old = Reader, datasets._Checked
    try: x = stl10(stl, parts='unlabelled')['unlabelled'].x
    finally: datasets._Checked = old
    assert x.data_ptr() == read[0].__array_interface__['data'][0] and len(read) == 1


@pytest.mark.parametrize('parts', [('test',), ['unlabelled', 'train'], 'train', ('train', 'test')])
def test_stl10_parts(stl, parts):
    "The parts that are asked for, in that order, need no other files"
    wanted = [parts] if isinstance(parts, str) else list(parts)
    for name in FILES:
        if name.split('_')[0].replace('unlabeled', 'unlabelled') not in wanted: (stl/'stl10_binary'/name).unlink()
    assert list(stl10(stl, parts=parts)) == wanted
    one_line(lambda: stl10(stl), 'is missing', 'download=True')


def forbid(monkeypatch, where):
    "As of somebody else's folder; whoever runs this may be allowed all, so the system's answer is made up"
    def told(call): return lambda path, *args: no(path) if where in str(path) else call(path, *args)
    def no(path): raise PermissionError(13, 'Permission denied', str(path))
    for of, name in ((Path, 'is_dir'), (Path, 'exists'), (os, 'scandir')): monkeypatch.setattr(of, name, told(getattr(of, name)))


def test_stl10_that_cannot_be_read(stl, monkeypatch):
    forbid(monkeypatch, 'stl10_binary')
    one_line(lambda: stl10(stl), 'stl10_binary cannot be read (Permission denied)')


@pytest.mark.parametrize('parts', [(), 'unlabeled', ['train', 'folds']])
def test_stl10_unknown_parts(stl, parts): one_line(lambda: stl10(stl, parts=parts), 'one or more of train, test, unlabelled')


@pytest.mark.parametrize('name', FILES)
def test_stl10_damage(stl, name):
    path = stl/'stl10_binary'/name
    whole = path.read_bytes()
    for n in (0, 1, len(whole)//2, len(whole)-1):
        path.write_bytes(whole[:n])
        one_line(lambda: stl10(stl), f'{path} is truncated or not', 'download=True')
    path.write_bytes(whole[:3] + bytes([whole[3] ^ 1]) + whole[4:])
    one_line(lambda: stl10(stl), f'{path} is truncated or not', 'md5')
    path.unlink()
    one_line(lambda: stl10(stl), f'{path} is missing')
    path.mkdir()
    one_line(lambda: stl10(stl), f'{path} is missing')
    path.rmdir()
    path.write_bytes(whole)
    stl10(stl)


def test_stl10_is_not_there(tmp_path):
    one_line(lambda: stl10(tmp_path), f"no folder {tmp_path/'stl10_binary'}", 'download=True')
    one_line(lambda: stl10(tmp_path/'nowhere'), 'no folder')


@pytest.fixture
def server(tmp_path, monkeypatch, serve):
    "A server in this process with an archive of the release's own layout; torchvision is told its address and sums"
    folder = tmp_path/'server'
    write_stl(folder)
    tell_md5(monkeypatch, folder)
    archive = folder/'stl10_binary.tar.gz'
    with tarfile.open(archive, 'w:gz') as t: t.add(folder/'stl10_binary', 'stl10_binary')
    monkeypatch.setattr(STL10, 'url', f'{serve(folder)}/{archive.name}')
    monkeypatch.setattr(STL10, 'tgz_md5', md5(archive.read_bytes()))
    yield archive


def test_stl10_download(server, tmp_path):
    root = tmp_path/'root'
    assert [len(d) for d in stl10(root, download=True).values()] == [7, 5, 9]
    server.unlink()
    stl10(root, download=True)  # now it is there, and nothing is fetched
    (root/'stl10_binary/test_X.bin').write_bytes(b'half')
    one_line(lambda: stl10(root), 'test_X.bin is truncated')
    assert len(stl10(root, download=True)['test']) == 5  # from the archive that stayed


def test_stl10_download_fails(server, tmp_path):
    whole = server.read_bytes()
    for content in (whole[:-10] + b'0123456789', whole[:len(whole)//2], b''):
        server.write_bytes(content)
        one_line(lambda: stl10(tmp_path/'root', download=True), 'download failed', 'is there a network', 'stl10_binary.tar.gz')
    server.unlink()
    one_line(lambda: stl10(tmp_path/'other', download=True), 'download failed', 'is there a network')
    (tmp_path/'file').write_text('')
    one_line(lambda: stl10(tmp_path/'file', download=True), 'cannot write to')


# CelebA

N, PARTS = 12, [0, 2, 0, 1, 0, 0, 2, 1, 0, 0, 1, 0]
NAMES = [f'Attribute_{k}' for k in range(40)]
Y = torch.rand(N, 40, generator=torch.Generator().manual_seed(0)) < .3
FACES = [f'{k:06}.jpg' for k in range(1, N+1)]


def photo(seed, size=(178, 218)):
    "A smooth image, so that JPEG is close to it"
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(size, Image.BILINEAR)


def attr_lines(): return [str(N), ' '.join(NAMES) + ' ', *(f + ' ' + ' '.join(' 1' if v else '-1' for v in row) for f, row in zip(FACES, Y))]


def part_lines(): return [f'{f} {p}' for f, p in zip(FACES, PARTS)]


def write(path, lines, end='\n'): path.write_bytes(''.join(l + end for l in lines).encode('latin-1'))


@pytest.fixture
def faces(tmp_path):
    "A small release, as celeba below the root; no face in it is one"
    folder = tmp_path/'root/celeba'
    (folder/'img_align_celeba').mkdir(parents=True)
    for k, f in enumerate(FACES): photo(k).save(folder/'img_align_celeba'/f, quality=92)
    write(folder/'list_attr_celeba.txt', attr_lines())
    write(folder/'list_eval_partition.txt', part_lines())
    return folder


@pytest.fixture
def no_decoding(monkeypatch):
    "From here on the images must come from what was kept"
    def forbid():
        def fail(*args): raise AssertionError('an image was decoded')
        monkeypatch.setattr(datasets, '_middle', fail)
    return forbid


def kept(folder): return sorted(p.name for p in folder.iterdir() if not p.name.startswith(('img', 'list')))


def same(a, b): return all(torch.equal(a[p].x, b[p].x) and torch.equal(a[p].y, b[p].y) for p in a)


@pytest.mark.parametrize('size', [16, 64, 101, 178, 256])
def test_celeba(faces, size):
    data = celeba(faces.parent, size)
    assert list(data) == ['train', 'valid', 'test']
    for k, (part, images) in enumerate(data.items()):
        i = [j for j in range(N) if PARTS[j] == k]
        assert images.x.shape == (len(i), 3, size, size) and images.x.dtype == torch.uint8 and images.name == f'CelebA, {part}'
        assert torch.equal(images.y, Y[i]) and images.y.dtype == torch.bool and images.vocab == NAMES and images.c == 40
        for x, j in zip(images.x, i):
            true = Image.open(faces/'img_align_celeba'/FACES[j]).crop((0, 20, 178, 198)).resize((size, size), Image.BICUBIC)
            assert (x.permute(1, 2, 0).numpy() == np.array(true)).all()
            images.x[0] = 0  # the tensor may be written to


def test_celeba_root_may_be_the_folder(faces):
    assert same(celeba(faces, 16), celeba(str(faces.parent), 16))


def test_celeba_is_resized_with_antialiasing(faces):
    "Stripes one pixel wide become grey, instead of a pattern"
    stripes = np.zeros((218, 178, 3), np.uint8)
    stripes[:, ::2] = 255
    for f in FACES: Image.fromarray(stripes).save(faces/'img_align_celeba'/f.replace('jpg', 'png')); (faces/'img_align_celeba'/f).unlink()
    x = celeba(faces, 32)['train'].x[:, :, :, 1:-1].int()
    assert (x-127).abs().max() < 20


def test_celeba_other_kinds_of_image(faces):
    "Grey, wide, with a palette, small: each is a square in the end"
    images = faces/'img_align_celeba'
    photo(0).convert('L').save(images/FACES[0])
    photo(1, (300, 100)).save(images/FACES[2])
    photo(2, (89, 109)).save(images/FACES[4])
    (images/FACES[5]).unlink()
    photo(3).convert('P').save(images/FACES[5].replace('jpg', 'png'))
    x = celeba(faces, 50)['train'].x
    assert x.shape == (7, 3, 50, 50)
    assert torch.equal(x[0, 0], x[0, 1])
    wide = Image.open(images/FACES[2]).crop((100, 0, 200, 100)).resize((50, 50), Image.BICUBIC)
    assert (x[1].permute(1, 2, 0).numpy() == np.array(wide)).all()


def test_celeba_line_ends_and_extra_files(faces):
    data = celeba(faces, 16)
    write(faces/'list_attr_celeba.txt', attr_lines(), ' \r\n')
    write(faces/'list_eval_partition.txt', part_lines() + ['', ''], '\r\n')
    photo(99).save(faces/'img_align_celeba/000099.jpg')  # in no list: ignored
    (faces/'img_align_celeba/notes.txt').write_text('mine')
    assert same(celeba(faces, 16), data)


@pytest.mark.parametrize('size', [15, 257, 0, -64, 64., '64', None, True])
def test_celeba_bad_size(faces, size): one_line(lambda: celeba(faces, size), 'from 16 to 256')


# ... kept images

def test_celeba_second_time(faces, no_decoding):
    data = celeba(faces, 16)
    celeba(faces, 32)
    assert kept(faces) == ['celeba-16x16.npz', 'celeba-32x32.npz']
    no_decoding()
    assert same(celeba(faces, 16), data)
    assert celeba(faces, 32)['test'].x.shape == (2, 3, 32, 32)
    with pytest.raises(AssertionError): celeba(faces, 48)
    write(faces/'list_attr_celeba.txt', [l.replace('-1', ' 1') for l in attr_lines()])  # other answers, the same images
    assert celeba(faces, 16)['train'].y.all()


@pytest.mark.parametrize('change', ['image', 'order', 'part', 'png'])
def test_celeba_other_files(faces, change):
    "What was kept is for these files in this order: with others it is made anew, and is right"
    celeba(faces, 16)
    if change == 'image': photo(50).save(faces/'img_align_celeba'/FACES[3], quality=70)
    if change == 'order': write(faces/'list_attr_celeba.txt', attr_lines()[:2] + attr_lines()[:1:-1])
    if change == 'part': write(faces/'list_eval_partition.txt', part_lines()[:-1] + [f'{FACES[-1]} 2'])
    if change == 'png': (faces/'img_align_celeba'/FACES[0]).unlink(); photo(77).save(faces/'img_align_celeba/000001.png')
    data = celeba(faces, 16)
    (faces/'celeba-16x16.npz').unlink()
    assert same(data, celeba(faces, 16))


@pytest.mark.parametrize('how, seed', [('nothing', 0), ('PK', 0), *((how, seed) for how in ('cut', 'flip') for seed in range(3))])
def test_celeba_damaged_npz(faces, how, seed):
    "Cut off, a byte changed anywhere, or something else of that name: the images are the right ones"
    data, path, rng = celeba(faces, 16), faces/'celeba-16x16.npz', np.random.default_rng(seed)
    whole = path.read_bytes()
    k = int(rng.integers(len(whole)))
    path.write_bytes(dict(nothing=b'', PK=b'PK', cut=whole[:k], flip=whole[:k] + bytes([whole[k] ^ 255]) + whole[k+1:])[how])
    assert same(celeba(faces, 16), data)


@pytest.mark.parametrize('save', [lambda f: np.save(f, np.zeros(3)), lambda f: np.savez(f, digest='x'), lambda f: np.savez(f, images=np.zeros(3)),
                                  lambda f: np.savez(f, digest=np.array({}, dtype=object), images=np.zeros(3))])
def test_celeba_other_npz(faces, save):
    with open(faces/'celeba-16x16.npz', 'wb') as f: save(f)
    data = celeba(faces, 16)
    (faces/'celeba-16x16.npz').unlink()
    assert same(celeba(faces, 16), data)


def test_celeba_npz_of_other_shape(faces):
    "The right digest with images that are not"
    data = celeba(faces, 16)
    with np.load(faces/'celeba-16x16.npz') as z: digest = z['digest']
    for x in (np.zeros((N, 3, 8, 8), np.uint8), np.zeros((N, 3, 16, 16))):
        with open(faces/'celeba-16x16.npz', 'wb') as f: np.savez(f, digest=digest, images=x)
        assert same(celeba(faces, 16), data)


def test_celeba_cannot_keep(faces):
    "A folder has the name: one warning, and it goes without"
    data = celeba(faces, 16)
    (faces/'celeba-16x16.npz').unlink()
    (faces/'celeba-16x16.npz').mkdir()
    with pytest.warns(UserWarning, match='cannot be written') as seen: assert same(celeba(faces, 16), data)
    assert len(seen) == 1 and seen[0].filename == __file__ and kept(faces) == ['celeba-16x16.npz']
    with warnings.catch_warnings(): warnings.simplefilter('error'); celeba(faces, 17)


def test_celeba_interrupted(faces, monkeypatch):
    def interrupt(f, **arrays): f.write(b'half'); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(np, 'savez', interrupt)
        with pytest.raises(KeyboardInterrupt): celeba(faces, 16)
    assert kept(faces) == []
    celeba(faces, 16)


# ... faults

def edited(lines, k, old, new):
    "The lines, with something replaced in line `k`, counted from 1"
    assert old in lines[k-1]
    return lines[:k-1] + [lines[k-1].replace(old, new, 1)] + lines[k:]


ATTR_FAULTS = [
    (lambda l: [], 1, 'number of images'),
    (lambda l: l[1:], 1, 'number of images'),
    (lambda l: edited(l, 1, '12', '-12'), 1, 'number of images'),
    (lambda l: edited(l, 1, '12', '9'*5000), 1, 'number of images'),
    (lambda l: edited(l, 1, '12', '13'), 1, '13 images are announced but 12 follow'),
    (lambda l: l[:-1], 1, '12 images are announced but 11 follow'),
    (lambda l: l[:1], 2, 'names of the attributes'),
    (lambda l: l[:1] + l[2:], 2, 'names of the attributes'),
    (lambda l: edited(l, 2, 'Attribute_3 ', ''), 3, '40 values, but line 2 names 39'),
    (lambda l: edited(l, 2, 'Attribute_3 ', 'Attribute_2 '), 2, 'each once'),
    (lambda l: edited(l, 8, ' -1', ' 0'), 8, "000006.jpg has the value '0'"),
    (lambda l: edited(l, 8, ' -1', ' 1.0'), 8, "000006.jpg has the value '1.0'"),
    (lambda l: edited(l, 8, ' -1', ' -'), 8, "000006.jpg has the value '-'"),
    (lambda l: edited(l, 9, ' -1', ''), 9, '39 values'),
    (lambda l: edited(l, 9, ' -1', ' -1 1'), 9, '41 values'),
    (lambda l: edited(l, 9, '000007.jpg', ''), 9, '39 values'),
    (lambda l: edited(l, 9, '000007.jpg', '../07.jpg'), 9, "'../07.jpg' should be the name"),
    (lambda l: edited(l, 9, '000007.jpg', '/etc/hosts'), 9, 'should be the name'),
    (lambda l: edited(l, 9, '000007.jpg', '000006.jpg'), 9, '000006.jpg is in line 8 already'),
    (lambda l: l[:4] + [l[4][:50]] + l[5:], 5, 'values, but line 2 names 40'),
]


@pytest.mark.parametrize('k', range(len(ATTR_FAULTS)))
def test_celeba_attribute_list(faces, k):
    edit, line, said = ATTR_FAULTS[k]
    write(faces/'list_attr_celeba.txt', edit(attr_lines()))
    one_line(lambda: celeba(faces, 16), f"{faces/'list_attr_celeba.txt'}, line {line}: ", said)
    assert kept(faces) == []


PART_FAULTS = [
    (lambda l: edited(l, 3, ' 0', ' 3'), 3, "part '3'"),
    (lambda l: edited(l, 3, ' 0', ' -1'), 3, "part '-1'"),
    (lambda l: edited(l, 3, ' 0', ' train'), 3, "part 'train'"),
    (lambda l: edited(l, 3, ' 0', ''), 3, 'two fields'),
    (lambda l: edited(l, 3, ' 0', ' 0 0'), 3, 'two fields'),
    (lambda l: edited(l, 3, ' 0', ',0'), 3, 'two fields'),
    (lambda l: edited(l, 3, '000003.jpg', '000003'), 3, 'should be the name'),
    (lambda l: edited(l, 3, '000003.jpg', '000001.jpg'), 3, '000001.jpg is in line 1 already'),
]


@pytest.mark.parametrize('k', range(len(PART_FAULTS)))
def test_celeba_partition(faces, k):
    edit, line, said = PART_FAULTS[k]
    write(faces/'list_eval_partition.txt', edit(part_lines()))
    one_line(lambda: celeba(faces, 16), f"{faces/'list_eval_partition.txt'}, line {line}: ", said)


@pytest.mark.parametrize('part', range(3))
def test_celeba_empty_part(faces, part):
    write(faces/'list_eval_partition.txt', [l[:-1] + str((part+1) % 3) if l.endswith(f' {part}') else l for l in part_lines()])
    one_line(lambda: celeba(faces, 16), f'no image has part {part}')


def test_celeba_lists_of_other_images(faces):
    write(faces/'list_eval_partition.txt', part_lines()[:-3])
    one_line(lambda: celeba(faces, 16), 'list_attr_celeba.txt, line 12: 000010.jpg is not in list_eval_partition.txt (such images in all: 3)')
    write(faces/'list_eval_partition.txt', part_lines() + ['000013.jpg 0', '000014.jpg 0'])
    one_line(lambda: celeba(faces, 16), 'list_eval_partition.txt, line 13: 000013.jpg is not in list_attr_celeba.txt (such images in all: 2)')


def test_celeba_missing_images(faces):
    for k in (4, 6): (faces/'img_align_celeba'/FACES[k]).unlink()
    (faces/'img_align_celeba'/FACES[6]).symlink_to(faces/'nothing')  # a link to nowhere is no image, nor is a folder
    (faces/'img_align_celeba'/FACES[4]).mkdir()
    one_line(lambda: celeba(faces, 16), 'list_attr_celeba.txt, line 7: 000005.jpg is not in', '(missing in all: 2)', 'mmlab.ie.cuhk.edu.hk')


@pytest.mark.parametrize('end', ['jpg', 'png'])
@pytest.mark.parametrize('share', [0, .001, .5, .97])
def test_celeba_truncated_image(faces, end, share):
    path = faces/f'img_align_celeba/000009.{end}'
    (faces/'img_align_celeba/000009.jpg').unlink()
    photo(8).save(path)
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    one_line(lambda: celeba(faces, 16), f'{path} cannot be read')
    assert kept(faces) == []


def test_celeba_is_not_there(faces, tmp_path):
    one_line(lambda: celeba(tmp_path/'nowhere'), 'no img_align_celeba in', 'mmlab.ie.cuhk.edu.hk', 'torchvision.datasets.CelebA(root, download=True)')
    for name in ('list_attr_celeba.txt', 'list_eval_partition.txt', 'img_align_celeba'):
        (faces/name).rename(tmp_path/name)
        one_line(lambda: celeba(faces.parent, 16), f'{faces/name} is missing')
        (tmp_path/name).rename(faces/name)
    (faces/'list_attr_celeba.txt').rename(tmp_path/'list')
    (faces/'list_attr_celeba.txt').mkdir()
    one_line(lambda: celeba(faces, 16), 'list_attr_celeba.txt cannot be read')


def test_celeba_is_packed(faces, tmp_path):
    (faces/'img_align_celeba').rename(tmp_path/'moved')
    (faces/'img_align_celeba').write_text('')
    one_line(lambda: celeba(faces, 16), 'is not a folder')
    (faces/'img_align_celeba').unlink()
    (faces/'img_align_celeba.zip').write_text('')
    one_line(lambda: celeba(faces, 16), f"{faces/'img_align_celeba.zip'} is packed; unzip it in {faces}")


@pytest.mark.parametrize('seed', range(8))
def test_celeba_lists_with_any_byte_changed(faces, seed):
    "Each time one byte of a list is another: one line is said, or what comes back has the right form"
    rng = np.random.default_rng(seed)
    refused = 0
    for name in ['list_attr_celeba.txt', 'list_eval_partition.txt']*10:
        whole = (faces/name).read_bytes()
        k = int(rng.integers(len(whole)))
        (faces/name).write_bytes(whole[:k] + bytes([rng.integers(256)]) + whole[k + (rng.random() < .7):])
        try:
            data = celeba(faces, 16)
            assert sum(map(len, data.values())) == N and all(d.y.shape == (len(d), 40) for d in data.values())
        except InputError as e: refused += 1; assert '\n' not in str(e)
        (faces/name).write_bytes(whole)
    assert refused > 5


# Noise

@pytest.mark.parametrize('kind', ['normal', 'uniform', 'wrapped'])
def test_noise(kind):
    state = torch.get_rng_state()
    images = noise(1500, kind, size=8, seed=3)  # more than the thousand that are drawn at once
    assert images.x.shape == (1500, 3, 8, 8) and images.x.dtype == torch.uint8 and images.y is None and kind in images.name
    assert torch.equal(noise(1500, kind, 8, 3).x, images.x) and not torch.equal(noise(1500, kind, 8, 4).x, images.x)
    assert not torch.equal(images.x[:500], images.x[1000:])  # the second thousand is not the first again
    assert torch.equal(torch.get_rng_state(), state)
    x = images.x.float()
    std = dict(normal=61.4, uniform=73.9, wrapped=73.9)[kind]
    assert abs(x.mean()-127.5) < .6 and abs(x.std()-std) < .7
    assert abs(torch.corrcoef(torch.stack([x[..., :-1].flatten(), x[..., 1:].flatten()]))[0, 1]) < .01  # neighbours are independent
    assert noise(1, kind, 1).x.shape == (1, 3, 1, 1)


def chi2(c): return ((c-c.float().mean())**2/c.float().mean()).sum().item()


@pytest.mark.parametrize('seed', range(3))
def test_wrapped_noise_is_nearly_uniform(seed):
    counts = {k: noise(300, k, seed=seed).x.flatten().bincount(minlength=256) for k in ('normal', 'uniform', 'wrapped')}
    assert chi2(counts['uniform']) < 350 and chi2(counts['wrapped'][1:]) < 350  # 255 and 254 degrees of freedom, standard deviation 23
    assert abs(256*counts['wrapped'][0]/counts['wrapped'].sum() - 1.4) < .05  # 0 has an interval of twice the width
    assert chi2(counts['normal'][1:255]) > 1e4


def test_wrapped_noise_is_a_remainder():
    "The same numbers, by the definition: cut towards zero, then modulo 256"
    z = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    true = [int(v) % 256 for v in (255*z).flatten().tolist()]
    assert noise(4, 'wrapped', 16, 9).x.flatten().tolist() == true


@pytest.mark.parametrize('n, kind, size, said', [(0, 'normal', 32, '0 images of 32x32'), (-5, 'normal', 32, '1 or more'), (2.5, 'normal', 32, '1 or more'), (3, 'normal', 0, '3 images of 0x0'),
                                                 (3, 'gaussian', 32, 'normal, uniform, wrapped'), (3, None, 32, 'normal, uniform, wrapped')])
def test_bad_noise(n, kind, size, said): one_line(lambda: noise(n, kind, size), said)


def test_docstrings_tell_of_input_errors():
    for f in (stl10, celeba, noise): assert re.search('Raises `InputError`', f.__doc__)


@pytest.mark.parametrize('where', ['root/celeba', 'img_align_celeba'])
def test_celeba_that_cannot_be_read(faces, monkeypatch, where):
    forbid(monkeypatch, where)
    one_line(lambda: celeba(faces, 16), 'cannot be read (Permission denied)')


@pytest.mark.parametrize('bs', [0, -1, 2.5, '8', None])
def test_a_batch_that_there_is_not(place, bs): one_line(lambda: ImageDL(place().data['train'], bs), f'bs={bs!r}: give a whole number')
