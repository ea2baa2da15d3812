"Whatever a person can get wrong on the command line: one line, exit code 2, nothing lost"
import json
import shutil

import pytest
import torch
from safetensors.torch import load

from ssl_nb.fitting import write_json

TINY = dict(study='demo', scale='tiny', device='cpu')


@pytest.mark.parametrize('args,said', [
    (dict(study='rotnets'), "unknown study 'rotnets': choose one of demo, rotnet, rotations, trials, simsiam, methods"),
    (dict(scale='huge'), "no scale 'huge': choose one of tiny, small"),
    (dict(protocol='theirs'), "no protocol 'theirs': choose one of best"),
    (dict(device='abacus'), "device 'abacus' is not available"),
    (dict(device='cuda:77'), "device 'cuda:77' is not available"),
    (dict(device='meta'), "device 'meta' is not available"),
    (dict(download=True), '--download needs --data'),
    (dict(labels='31'), "31 labels a class are wanted, but class 'airplane'"),
    (dict(labels='451', scale='small'), '451 labels a class are wanted'),
    (dict(labels='0'), 'give a whole number of 1 or more'),
    (dict(labels='ten'), 'give whole numbers with commas between'),
    (dict(seed=-1), 'give a number from 0 to'),
    (dict(seed=10**20), 'give a number from 0 to'),
])
def test_unknown_names(study, one_line, tmp_path, args, said):
    assert said in one_line(study(**{**TINY, **args}, out=tmp_path))


def test_in_a_process_of_its_own(ssl_study, one_line, tmp_path):
    assert one_line(ssl_study('rotnets', '--out', tmp_path)) == "ssl_study: unknown study 'rotnets': choose one of demo, rotnet, rotations, trials, simsiam, methods"


def test_unknown_option_and_no_study(ssl_study):
    for args in (['demo', '--sclae', 'tiny'], []):
        r = ssl_study(*args)
        assert r.returncode == 2 and 'usage' in r.stderr and 'Traceback' not in r.stderr


def test_help(ssl_study):
    r = ssl_study('--help')
    assert r.returncode == 0 and 'which study' in r.stdout and '--data' in r.stdout


@pytest.fixture
def release(tmp_path):
    "A folder with the names of CIFAR-10's release, of which no file is right"
    folder = tmp_path/'data/cifar-10-batches-py'
    folder.mkdir(parents=True)
    for n in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch', 'batches.meta']: (folder/n).write_bytes(b'\x80\x02}q\x00.')
    return folder


def test_data_folders(study, one_line, tmp_path, release):
    run = lambda root: one_line(study(**TINY, data=str(root), out=tmp_path/'out'))
    (tmp_path/'empty').mkdir()
    assert 'no folder' in run(tmp_path/'empty')
    assert 'no folder' in run(tmp_path/'missing')
    assert 'data_batch_1 is truncated or not the release' in run(release.parent)
    (release/'data_batch_1').unlink()
    assert 'data_batch_1 is missing' in run(release.parent)


def test_folder_that_cannot_be_written(study, one_line, tmp_path):
    (tmp_path/'file').write_text('')
    assert 'cannot write' in one_line(study(**TINY, out=tmp_path/'file'))


def test_no_space(ssl_study, study, one_line, finished, tmp_path):
    "A disk that is full: writing stops at 20 kB a file, too little for a checkpoint"
    resource = pytest.importorskip('resource')
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    line = one_line(ssl_study('demo', '--scale', 'tiny', '--device', 'cpu', '--out', tmp_path, preexec_fn=limit))
    assert 'cannot write' in line and 'make room' in line
    assert not list(tmp_path.rglob('*.tmp'))
    # with room again, the same command completes
    assert study(**TINY, out=tmp_path).returncode == 0
    assert len(list(tmp_path.glob('demo/*.json'))) == len(list(finished.glob('demo/*.json')))


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path/'copy')
    return tmp_path/'copy'


def emptied(key, value):
    "A result file whose `key` holds nothing of use"
    return lambda old: json.dumps({**json.loads(old), key: value}).encode()


@pytest.mark.parametrize('damage', [b'', b'{"study": "demo"', b'[]', b'{}', b'\xff\xfe\x00', emptied('metrics', {}), emptied('history', None), emptied('config', 3), emptied('data', ['cifar10'])])
def test_damaged_result(study, one_line, copy, damage):
    path = copy/'demo/tiny-best-sample-seed0-pretrain.json'
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    assert str(path) in (line := one_line(study(**TINY, out=copy))) and 'delete it' in line


def test_damaged_weights(study, one_line, copy):
    weights = copy/'demo/weights/tiny-best-sample-seed0-pretrain.safetensors'
    whole = weights.read_bytes()
    (copy/'demo/tiny-best-sample-seed0-rotnet-5labels-draw0.json').unlink()
    weights.write_bytes(whole[:1000])
    assert 'is damaged' in (line := one_line(study(**TINY, out=copy))) and 'delete it' in line
    weights.unlink()  # as the line says: then they are made again
    assert study(**TINY, out=copy).returncode == 0
    a, b = load(whole), load(weights.read_bytes())
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_weights_of_another_run(study, one_line, copy):
    r = study(**TINY, out=copy, seed=1)
    assert r.returncode == 0, r.stderr
    shutil.copy(copy/'demo/weights/tiny-best-sample-seed1-pretrain.safetensors', copy/'demo/weights/tiny-best-sample-seed0-pretrain.safetensors')
    (copy/'demo/tiny-best-sample-seed0-rotnet-5labels-draw0.json').unlink()
    assert 'does not hold the weights' in one_line(study(**TINY, out=copy))


def test_damaged_checkpoint(study, one_line, copy):
    (copy/'demo/tiny-best-sample-seed0-pretrain.json').unlink()
    (copy/'demo/checkpoints').mkdir(exist_ok=True)
    (copy/'demo/checkpoints/tiny-best-sample-seed0-pretrain.ckpt').write_bytes(b'PK\x03\x04 half a file')
    assert 'is damaged' in one_line(study(**TINY, out=copy))


def test_result_of_another_configuration(study, one_line, copy):
    path = copy/'demo/tiny-best-sample-seed0-pretrain.json'
    other = json.loads(path.read_text().replace('"width": 16', '"width": 20'))
    other.pop('checksum')
    write_json(path, **other)
    assert 'width: 20 and not 16' in one_line(study(**TINY, out=copy))


def test_too_many_labels():
    from ssl_nb.data import InputError, cifar10_sample, label_fraction
    train, _ = cifar10_sample()
    for labels in (451, 10**9):
        with pytest.raises(InputError, match='class .* has 450'): label_fraction(train, labels)
    for labels in (0, -1, -.5):
        with pytest.raises(InputError, match='a whole number of 1 or more'): label_fraction(train, labels)
    with pytest.raises(InputError, match='has no labels'): label_fraction(train.unlabelled(), 1)
