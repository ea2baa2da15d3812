"CIFAR-10's download and its checks, on an archive of the release's own format, from a server in this process"
import hashlib
import pickle
import tarfile

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from ssl_nb.data import InputError, cifar10

md5 = lambda b: hashlib.md5(b).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch, serve):
    "A small release: six batches of 20 images, the class names, the archive; torchvision is told its address and its sums"
    folder, rng = tmp_path/'server', np.random.default_rng(0)
    (folder/'cifar-10-batches-py').mkdir(parents=True)
    sums = {}
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch', 'batches.meta']:
        if name == 'batches.meta': content = {'label_names': [f'class {i}' for i in range(10)], 'num_cases_per_batch': 20, 'num_vis': 3072}
        else: content = {'batch_label': name, 'labels': rng.integers(0, 10, 20).tolist(), 'data': rng.integers(0, 256, (20, 3072), dtype=np.uint8), 'filenames': ['x.png']*20}
        data = pickle.dumps(content, protocol=2)
        (folder/'cifar-10-batches-py'/name).write_bytes(data)
        sums[name] = md5(data)
    archive = folder/'cifar-10-python.tar.gz'
    with tarfile.open(archive, 'w:gz') as t: t.add(folder/'cifar-10-batches-py', 'cifar-10-batches-py')
    monkeypatch.setattr(CIFAR10, 'url', f'{serve(folder)}/{archive.name}')
    monkeypatch.setattr(CIFAR10, 'tgz_md5', md5(archive.read_bytes()))
    monkeypatch.setattr(CIFAR10, 'train_list', [[n, sums[n]] for n in sums if n.startswith('data')])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', sums['test_batch']]])
    monkeypatch.setattr(CIFAR10, 'meta', {'filename': 'batches.meta', 'key': 'label_names', 'md5': sums['batches.meta']})
    yield archive


def test_download_and_read(server, tmp_path):
    train, test = cifar10(tmp_path/'root', download=True)
    assert (len(train), len(test), train.c, train.vocab[3]) == (100, 20, 10, 'class 3')
    with open(tmp_path/'server/cifar-10-batches-py/test_batch', 'rb') as f: raw = pickle.load(f)
    assert (test.x.flatten(1).numpy() == raw['data']).all() and test.y.tolist() == raw['labels']
    again = cifar10(tmp_path/'root')[0]  # now it is there
    assert (again.x == train.x).all()


def test_archive_that_was_tampered_with(server, tmp_path):
    server.write_bytes(server.read_bytes()[:-10] + b'0123456789')
    with pytest.raises(InputError, match='download failed'): cifar10(tmp_path/'root', download=True)


def test_no_server(server, tmp_path):
    server.unlink()
    with pytest.raises(InputError, match='is there a network'): cifar10(tmp_path/'root', download=True)


@pytest.mark.parametrize('n', [0, 1, 1000])
def test_truncated_batch(server, tmp_path, n):
    cifar10(tmp_path/'root', download=True)
    batch = tmp_path/'root/cifar-10-batches-py/data_batch_3'
    batch.write_bytes(batch.read_bytes()[:n])
    with pytest.raises(InputError, match='data_batch_3 is truncated'): cifar10(tmp_path/'root')


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path/'root').write_text('a file')
    with pytest.raises(InputError): cifar10(tmp_path/'root', download=True)
