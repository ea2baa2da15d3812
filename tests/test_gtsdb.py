"The traffic signs: a strict reader, a download that leaves nothing half done, crops that hold their sign, splits that do not leak"
import hashlib
from zipfile import ZIP_DEFLATED, ZipFile

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import one_line_error as one_line
from ssl_nb.studies import scenes
from ssl_nb.data import InputError, Images
from ssl_nb.studies.scenes import Scenes, gtsdb, gtsdb_sample, leaking_split, show_boxes, sign_crops, split_scenes

matplotlib.use('agg')
GT = ['00003.ppm;774;411;815;446;11', '00005.ppm;0;0;127;128;40', '00005.ppm;1304;752;1359;799;38', '00899.ppm;5;6;22;24;0']


def photo(seed, size=(1360, 800)):
    "A smooth photograph, so that JPEG is close to it"
    noise = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.BILINEAR)


def write_release(folder, lines=GT, end='\n'):
    "A release in the benchmark's own format: the photographs that the lines name, one that they do not, and gt.txt"
    folder.mkdir(parents=True)
    for n in (3, 4, 5, 899): photo(n).save(folder/f'{n:05}.ppm')
    (folder/'gt.txt').write_bytes(''.join(l + end for l in lines).encode())
    return folder


@pytest.fixture(scope='session')
def release(tmp_path_factory): return write_release(tmp_path_factory.mktemp('gtsdb')/'FullIJCNN2013')


@pytest.fixture
def quarter(tmp_path):
    "The same at a quarter of full size, which a test may damage"
    folder = tmp_path/'quarter'
    folder.mkdir()
    for n in (3, 5, 899): photo(n).reduce(4).save(folder/f'{n:05}.png')
    (folder/'gt.txt').write_text('\n'.join(GT))
    return folder


# Reading

@pytest.mark.parametrize('shrink', [1, 2, 3, 4, 5, 8, 16])
def test_shrink(release, shrink):
    s = gtsdb(release, shrink)
    assert s.x.dtype == torch.uint8 and s.x.shape == (3, 3, -(-800//shrink), -(-1360//shrink))
    assert (s.ids, s.scene.tolist(), s.y.tolist(), len(s)) == ([3, 5, 899], [0, 1, 1, 2], [11, 40, 38, 0], 4)
    assert s.boxes.dtype == torch.float32
    full = torch.tensor([[774, 411, 42, 36], [0, 0, 128, 129], [1304, 752, 56, 48], [5, 6, 18, 19]])
    assert torch.allclose(s.boxes*shrink, full.float(), atol=1e-3)
    for im, n in zip(s.x, s.ids): assert (im.permute(1, 2, 0).numpy() == np.array(photo(n).reduce(shrink))).all()


@pytest.mark.parametrize('where', ['.', 'gtsdb', 'FullIJCNN2013'])
def test_where_it_may_be(quarter, tmp_path, where):
    root = tmp_path/'root'
    root.mkdir()
    quarter.rename(root/where if where != '.' else tmp_path/'direct')
    assert len(gtsdb(str(root) if where != '.' else tmp_path/'direct')) == 4


@pytest.mark.parametrize('k, end, up', [*((k, 'ppm', up) for k in (1, 2, 3, 4, 7, 8) for up in (False, True)), (3, 'png', True), (7, 'jpg', False)])
def test_smaller_files(tmp_path, k, end, up):
    "Photographs at 1/k of full size, the size rounded up or down"
    size = [-(-s//k) if up else s//k for s in (1360, 800)]
    for n in (3, 5, 899): photo(n, size).save(tmp_path/f'{n:05}.{end}')
    (tmp_path/'gt.txt').write_text('\r\n'.join(GT))
    s = gtsdb(tmp_path, 2*k)
    assert s.x.shape == (3, 3, -(-size[1]//2), -(-size[0]//2))
    assert torch.allclose(s.boxes[0], torch.tensor([774, 411, 42, 36.])/2/k)
    if k > 1:
        for shrink in (1, k+1): one_line(lambda: gtsdb(tmp_path, shrink), f'at 1/{k} of full size', f'a multiple of {k}')


def test_ppm_first(quarter):
    Image.new('RGB', (340, 200), (1, 2, 3)).save(quarter/'00003.ppm')
    assert gtsdb(quarter).x[0].flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]


@pytest.mark.parametrize('shrink', [0, -1, 2.5, '4', None])
def test_bad_shrink(quarter, shrink): one_line(lambda: gtsdb(quarter, shrink), 'a whole number of 1 or more')


# Damage

@pytest.mark.parametrize('line,said', [
    *((l, 'six fields') for l in [
        'no line of this kind', ';;;;;', '00003.ppm', '00003.ppm;774;411;815;446', '00003.ppm;774;411;815;446;', '00003.ppm;774;411;815;446;11;',
        '00003.ppm,774,411,815,446,11', '00003.ppm;774;411;815;446;eleven', '00003.ppm;774.0;411;815;446;11', '00003.ppm;7_4;411;815;446;11',
        '00003.ppm; 774;411;815;446;11', '00003.ppm;0x3;411;815;446;11', '00003.ppm;nan;411;815;446;11', '00003.ppm;774;411;815;446;1' + '1'*5000,
        '3.ppm;774;411;815;446;11', '../00003.ppm;774;411;815;446;11', '/etc/passwd;774;411;815;446;11', '00003.jpg;774;411;815;446;11',
        '00003.ppm;٧٧;411;815;446;11', '\x00\x00\xff', '\ufeff00003.ppm;774;411;815;446;11', '00003.ppm;774;411\u2028;815;446;11']),
    *((f'00003.ppm;774;411;815;446;{y}', f'has class {y}') for y in (43, -1, 99999)),
    *((f'00003.ppm;{b};11', 'without an area') for b in ('815;411;774;446', '774;446;815;411', '774;411;774;446', '774;411;815;411')),
    *((f'00003.ppm;{b};11', 'outside its photograph') for b in ('-1;411;815;446', '774;-9;815;446', '774;411;1360;446', '774;411;815;800', '2000;2000;2010;2010')),
])
def test_malformed_line(quarter, line, said):
    (quarter/'gt.txt').write_text('\n'.join([*GT[:2], line, *GT[2:]]), encoding='utf-8')
    assert len(one_line(lambda: gtsdb(quarter), f"{quarter/'gt.txt'}, line 3", said, 'gt.txt')) < 600


@pytest.mark.parametrize('content', [b'', b'\n', b'\r\n \r\n'])
def test_gt_without_a_line(quarter, content):
    (quarter/'gt.txt').write_bytes(content)
    one_line(lambda: gtsdb(quarter), 'gt.txt holds no line')


def test_no_gt(quarter, tmp_path):
    (quarter/'gt.txt').unlink()
    for root in (quarter, tmp_path/'nothing', tmp_path/('long'*100), 'a\0b', quarter/'00003.png'):
        one_line(lambda: gtsdb(root), 'no gt.txt in', 'FullIJCNN2013.zip (1.6 GB)', 'benchmark.ini.rub.de', '--download')


def test_missing_photograph(quarter):
    (quarter/'00899.png').unlink()
    one_line(lambda: gtsdb(quarter), f"{quarter/'gt.txt'}, line 4: 00899.ppm is not there")


@pytest.mark.parametrize('name', ['00003', '00899'])  # the first says how large all are
@pytest.mark.parametrize('end', ['ppm', 'png', 'jpg'])
@pytest.mark.parametrize('share', [0, .001, .5, .99])
def test_truncated_photograph(quarter, name, end, share):
    for n in (3, 5, 899): photo(n, (340, 200)).save(quarter/f'{n:05}.{end}')
    if end != 'png': [p.unlink() for p in quarter.glob('*.png')]
    whole = (quarter/f'{name}.{end}').read_bytes()
    (quarter/f'{name}.{end}').write_bytes(whole[:int(share*len(whole))])
    one_line(lambda: gtsdb(quarter), f'{quarter/name}.{end} cannot be read')


def test_no_image(quarter):
    (quarter/'00005.png').write_bytes(b'<html>Not found</html>')
    one_line(lambda: gtsdb(quarter), '00005.png cannot be read')


def test_sizes(quarter):
    photo(5).reduce(8).save(quarter/'00005.png')
    one_line(lambda: gtsdb(quarter), '00005.png has 170x100 pixels but 00003.png has 340x200')
    photo(5, (1360, 801)).save(quarter/'00003.png')
    one_line(lambda: gtsdb(quarter), '00003.png has 1360x801 pixels', '1360x800, or a half')


# The download

@pytest.fixture
def server(tmp_path, monkeypatch, serve):
    "A server in this process with an archive of the release's own layout; the module is told its address and the md5 of its gt.txt"
    folder = tmp_path/'server'
    write_release(folder/'FullIJCNN2013')
    pack(folder, {p: f'FullIJCNN2013/{p.name}' for p in (folder/'FullIJCNN2013').iterdir()})
    monkeypatch.setattr(scenes, '_URL', f'{serve(folder)}/release.zip')
    monkeypatch.setattr(scenes, '_GT_MD5', hashlib.md5((folder/'FullIJCNN2013/gt.txt').read_bytes()).hexdigest())
    yield folder


def pack(folder, names, compression=ZIP_DEFLATED):
    with ZipFile(folder/'release.zip', 'w', compression) as z:
        for p, name in names.items(): z.write(p, name)


def members(folder): return {p: f'FullIJCNN2013/{p.name}' for p in (folder/'FullIJCNN2013').iterdir()}


def nothing_left(root):
    assert not root.exists() or not list(root.iterdir())


def test_download(server, release, tmp_path):
    root = tmp_path/'root'
    s = gtsdb(root, download=True)
    assert torch.equal(s.x, gtsdb(release).x) and torch.equal(s.boxes, gtsdb(release).boxes)
    assert [p.name for p in root.iterdir()] == ['FullIJCNN2013']  # no archive, no folder of another name
    (server/'release.zip').unlink()
    assert len(gtsdb(root, download=True)) == 4  # now it is there, and nothing is fetched


def test_line_ends(server, tmp_path):
    "The md5 is that of the lines, whatever ends them"
    (server/'FullIJCNN2013/gt.txt').write_bytes(''.join(l + '\r\n' for l in GT).encode())
    pack(server, members(server))
    assert len(gtsdb(tmp_path/'root', download=True)) == 4


def test_what_a_killed_download_left(server, tmp_path):
    root = tmp_path/'root'
    left = root/'FullIJCNN2013.part/release/FullIJCNN2013'
    left.mkdir(parents=True)
    (left/'gt.txt').write_text(GT[0])
    one_line(lambda: gtsdb(root), 'no gt.txt in')  # it does not look whole
    assert len(gtsdb(root, download=True)) == 4
    assert [p.name for p in root.iterdir()] == ['FullIJCNN2013']


@pytest.mark.parametrize('share', [0, .3, .999])
def test_truncated_archive(server, tmp_path, share):
    whole = (server/'release.zip').read_bytes()
    (server/'release.zip').write_bytes(whole[:int(share*len(whole))])
    one_line(lambda: gtsdb(tmp_path/'root', download=True), 'download failed', 'is there a network', 'benchmark.ini.rub.de')
    nothing_left(tmp_path/'root')


def test_damaged_archive(server, tmp_path):
    "A byte of a photograph is wrong, which only the archive's own checksum can tell"
    pack(server, members(server), compression=0)
    raw = bytearray((server/'release.zip').read_bytes())
    raw[len(raw)//2] ^= 1
    (server/'release.zip').write_bytes(raw)
    one_line(lambda: gtsdb(tmp_path/'root', download=True), 'download failed', 'CRC')
    nothing_left(tmp_path/'root')


def test_other_gt(server, tmp_path):
    (server/'FullIJCNN2013/gt.txt').write_text('\n'.join(GT[:-1]))
    pack(server, members(server))
    one_line(lambda: gtsdb(tmp_path/'root', download=True), 'its md5 differs')
    nothing_left(tmp_path/'root')


def test_archive_without_a_photograph(server, tmp_path):
    pack(server, {p: n for p, n in members(server).items() if '00899' not in n})
    one_line(lambda: gtsdb(tmp_path/'root', download=True), 'line 4: 00899.ppm is not there')
    nothing_left(tmp_path/'root')


def test_archive_of_something_else(server, tmp_path):
    pack(server, {server/'FullIJCNN2013/00003.ppm': 'photo.ppm'})
    one_line(lambda: gtsdb(tmp_path/'root', download=True), 'holds no gt.txt')
    nothing_left(tmp_path/'root')


@pytest.mark.parametrize('name', ['../evil.txt', '/evil.txt', 'FullIJCNN2013/../../../../evil.txt'])
def test_archive_that_wants_to_leave_its_folder(server, tmp_path, name):
    absolute = f"{tmp_path}/evil.txt" if name.startswith('/') else name
    with ZipFile(server/'release.zip', 'a') as z: z.writestr(absolute, 'evil')
    assert len(gtsdb(tmp_path/'a/b/root', download=True)) == 4
    inside = tmp_path/'a/b/root/FullIJCNN2013'  # zipfile leaves out the dots, and so one of the names may end here
    assert all(p.parent == inside for p in tmp_path.rglob('evil.txt'))


def test_no_server(server, tmp_path):
    (server/'release.zip').unlink()
    one_line(lambda: gtsdb(tmp_path/'root', download=True), 'is there a network')
    nothing_left(tmp_path/'root')


def test_interrupted(server, tmp_path, monkeypatch):
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(scenes, '_unpack', interrupt)
    with pytest.raises(KeyboardInterrupt): gtsdb(tmp_path/'root', download=True)
    nothing_left(tmp_path/'root')


def test_where_nothing_can_be_written(server, tmp_path):
    (tmp_path/'file').write_text('')
    one_line(lambda: gtsdb(tmp_path/'file', download=True), 'cannot write to')
    (tmp_path/'root/FullIJCNN2013').mkdir(parents=True)
    one_line(lambda: gtsdb(tmp_path/'root', download=True), 'holds no gt.txt; delete it')


# The sample, crops and splits

def test_sample():
    s = gtsdb_sample()
    assert (len(s), s.x.shape, len(set(s.ids)), len(s.vocab)) == (300, (300, 3, 64, 64), 300, 43)
    assert s.boxes.dtype == torch.float32 and s.y.dtype == s.scene.dtype == torch.long
    assert (s.boxes[:, :2] >= 0).all() and (s.boxes[:, :2]+s.boxes[:, 2:] <= 64).all()
    assert s.boxes[:, 2:].min() < 5 and s.boxes[:, 2:].max() > 30
    assert torch.equal(s.boxes*4, (s.boxes*4).round())  # whole pixels at full size


def coordinates(n, H, W):
    "Scenes whose pixels tell the scene, the row and the column"
    x = torch.empty(n, 3, H, W, dtype=torch.uint8)
    x[:, 0], x[:, 1], x[:, 2] = torch.arange(n).view(n, 1, 1), torch.arange(H).view(H, 1), torch.arange(W)
    return x


@pytest.mark.parametrize('seed', range(25))
def test_crops_hold_their_box(seed):
    "Boxes of any size anywhere: a crop is a piece of its scene, holds the box where that can be, and as much as possible where not"
    g = np.random.default_rng(seed)
    n, m = 20, 200
    H, W, size, step = g.integers(40, 120), g.integers(40, 200), g.integers(8, 40), g.choice([1, 2, 4, 8])
    wh = np.stack([g.integers(1, s*step+1, m) for s in (W, H)], 1)
    wh = np.where(g.random((m, 1)) < .7, np.minimum(wh, g.integers(1, size*step+1, (m, 2))), wh)  # most are smaller than the crop
    xy = np.floor(g.random((m, 2))*(np.array([W, H])*step - wh + 1))
    boxes = torch.tensor(np.concatenate([xy, wh], 1)/step, dtype=torch.float32)
    scene = torch.tensor(g.integers(0, n, m))
    crops = sign_crops(Scenes(coordinates(n, H, W), boxes, scene, torch.zeros(m, dtype=torch.long)), 4, int(size), seed)
    assert crops.x.shape == (4*m, 3, size, size) and crops.y.dtype == torch.float32
    box, corner = boxes.repeat(4, 1), torch.stack([crops.x[:, 2, 0, 0], crops.x[:, 1, 0, 0]], 1).float()
    assert torch.equal(crops.x[:, 0, 0, 0].long(), scene.repeat(4))
    assert (crops.x[:, 2, 0] == crops.x[:, 2, 0, :1] + torch.arange(size)).all()
    start, end = (box[:, :2]-corner).clamp(min=0), (box[:, :2]+box[:, 2:]-corner).clamp(max=size)
    assert torch.equal(crops.y, torch.cat([start, end-start], 1))  # the intersection
    assert (crops.y[:, :2] >= 0).all() and (crops.y[:, 2:] > 0).all() and (crops.y[:, :2]+crops.y[:, 2:] <= size).all()
    for axis, side in ((0, W), (1, H)):  # no other place of the crop holds more of the box
        offsets = torch.arange(side-size+1)
        overlap = torch.minimum(offsets+size, (box[:, axis]+box[:, 2+axis])[:, None]) - torch.maximum(offsets, box[:, axis, None])
        assert torch.equal(crops.y[:, 2+axis], overlap.max(1)[0])


def test_crops_are_drawn_from_all_places():
    s = Scenes(coordinates(1, 40, 60), torch.tensor([[20.25, 3, 10, 8]]), torch.tensor([0]), torch.tensor([0]))
    x = sign_crops(s, 5000).x
    assert x[:, 2, 0, 0].unique().tolist() == list(range(0, 21)) and x[:, 1, 0, 0].unique().tolist() == list(range(0, 4))
    share = x[:, 2, 0, 0].long().bincount()/5000
    assert (share - 1/21).abs().max() < .015


def test_crops_order_and_seed():
    s = gtsdb_sample()
    c = sign_crops(s, 3, seed=4)
    assert torch.equal(c.y[:, 2:], s.boxes[:, 2:].repeat(3, 1))  # all first crops, all second, all third
    assert torch.equal(sign_crops(s, 3, seed=4).x, c.x) and not torch.equal(sign_crops(s, 3, seed=5).y, c.y)
    state = torch.get_rng_state()
    sign_crops(s)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_crops():
    s = gtsdb_sample()
    for size in (0, -1, 65): one_line(lambda: sign_crops(s, size=size), 'which has 64x64 pixels')
    for n in (0, -1): one_line(lambda: sign_crops(s, n), 'give 1 or more')


@pytest.mark.parametrize('seed', range(30))
def test_splits(seed):
    "Photographs with any number of signs, in one window or in several: none is in both parts"
    g = torch.Generator().manual_seed(seed)
    n, m, k = [int(torch.randint(2, top, (), generator=g)) for top in (40, 100, 15)]
    ids = torch.randint(0, k, (n,), generator=g); ids[:2] = torch.tensor([0, 1])
    scene = torch.cat([torch.arange(n), torch.randint(0, n, (m,), generator=g)])
    s = Scenes(coordinates(n, 8, 9), torch.rand(n+m, 4, generator=g), scene, torch.arange(n+m), ids=ids.tolist())
    for share in (.01, .15, .5, .99):
        parts = split_scenes(s, share, seed)
        train, test = parts
        assert len(train) and len(test) and not set(train.ids) & set(test.ids)
        assert sorted(train.y.tolist() + test.y.tolist()) == list(range(n+m))
        assert set(train.ids) | set(test.ids) == set(ids.tolist())
        for p in parts:  # each box is still in its scene
            assert torch.equal(p.x[p.scene, 0, 0, 0].long(), scene[p.y]) and torch.equal(p.boxes, s.boxes[p.y])
            assert [p.ids[i] for i in p.scene] == ids[scene[p.y]].tolist()


def test_share_of_split():
    s = gtsdb_sample()
    assert [len(p) for p in split_scenes(s)] == [255, 45]
    assert split_scenes(s, seed=1)[1].ids != split_scenes(s, seed=2)[1].ids
    assert split_scenes(s, seed=1)[1].ids == split_scenes(s, seed=1)[1].ids
    for share in (0, 1, -1, 2, float('nan')):
        one_line(lambda: split_scenes(s, share), 'between 0 and 1')
        one_line(lambda: leaking_split(sign_crops(s), share), 'between 0 and 1')
    one_line(lambda: split_scenes(s.subset([3])), 'needs two or more')


def test_leaking_split_leaks():
    s = gtsdb_sample()
    s.x[:] = torch.arange(300).view(300, 1, 1, 1) % 256  # a sign's number, nearly
    s.x[:, 1] = torch.arange(300).view(300, 1, 1) // 256
    train, test = leaking_split(sign_crops(s))
    number = lambda c: set((c.x[:, 0, 0, 0].long() + 256*c.x[:, 1, 0, 0].long()).tolist())
    assert (len(train), len(test)) == (765, 135) and number(test) <= number(train)
    train, test = map(sign_crops, split_scenes(s))
    assert not number(test) & number(train)
    train, test = leaking_split(Images(torch.zeros(3639, 1, 1, 1), torch.zeros(3639, 4)))
    assert (len(train), len(test)) == (3093, 546)  # as in the report


def test_show():
    c = sign_crops(gtsdb_sample())
    assert [len(a.patches) for a in show_boxes(c.x, c.y, c.y+1, n=5, cols=4).flat] == [2]*5 + [0]*3
    assert [len(a.patches) for a in show_boxes(c.x, pred=c.y, n=4, cols=4).flat] == [1]*4
    assert len(gtsdb_sample().show(3, cols=2).flat) == 4
    plt.close('all')
