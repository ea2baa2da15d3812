"Whatever a person can get wrong on the command line: one line, exit code 2, nothing lost"
import os
import resource
import shutil

import pytest

TINY = 'demo', '--scale', 'tiny'


@pytest.mark.parametrize('args,said', [
    (['rotnets'], "unknown study 'rotnets': choose one of demo"),
    (['demo', '--scale', 'huge'], "no scale 'huge': choose one of tiny, small"),
    (['demo', '--protocol', 'theirs'], "no protocol 'theirs': choose one of best"),
    (['demo', '--device', 'abacus'], "device 'abacus' is not to be had here"),
    (['demo', '--device', 'cuda:77'], "device 'cuda:77' is not to be had here"),
    (['demo', '--download'], '--download needs --data'),
])
def test_unknown_names(ssl_study, one_line, tmp_path, args, said):
    assert said in one_line(ssl_study(*args, '--out', tmp_path))


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


def test_data_folders(ssl_study, one_line, tmp_path, release):
    run = lambda root: one_line(ssl_study(*TINY, '--data', root, '--out', tmp_path/'out'))
    (tmp_path/'empty').mkdir()
    assert 'no folder' in run(tmp_path/'empty')
    assert 'no folder' in run(tmp_path/'missing')
    assert 'data_batch_1 is truncated or not the release' in run(release.parent)
    (release/'data_batch_1').unlink()
    assert 'data_batch_1 is missing' in run(release.parent)


def test_folder_that_cannot_be_written(ssl_study, one_line, tmp_path):
    (tmp_path/'file').write_text('')
    assert 'cannot write' in one_line(ssl_study(*TINY, '--out', tmp_path/'file'))


def test_no_space(ssl_study, one_line, finished, tmp_path):
    "A disk that is full: writing stops at 20 kB a file, too little for a checkpoint"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    line = one_line(ssl_study(*TINY, '--out', tmp_path, preexec_fn=limit))
    assert 'cannot write' in line and 'make room' in line
    assert not list(tmp_path.rglob('*.tmp'))
    # with room again, the same command completes
    assert ssl_study(*TINY, '--out', tmp_path).returncode == 0
    assert len(list(tmp_path.glob('demo/*.json'))) == len(list(finished.glob('demo/*.json')))


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path/'copy')
    return tmp_path/'copy'


@pytest.mark.parametrize('damage', [b'', b'{"study": "demo"', b'[]', b'{}', b'\xff\xfe\x00'])
def test_damaged_result(ssl_study, one_line, copy, damage):
    path = copy/'demo/tiny-best-sample-seed0-pretrain.json'
    path.write_bytes(damage)
    assert str(path) in (line := one_line(ssl_study(*TINY, '--out', copy))) and 'delete it' in line


def test_damaged_weights(ssl_study, one_line, copy):
    weights = copy/'demo/weights/tiny-best-sample-seed0-pretrain.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    (copy/'demo/tiny-best-sample-seed0-rotnet-5labels-draw0.json').unlink()
    assert 'is damaged' in one_line(ssl_study(*TINY, '--out', copy))
    weights.unlink()
    assert 'no such file' in one_line(ssl_study(*TINY, '--out', copy))


def test_damaged_checkpoint(ssl_study, one_line, copy):
    (copy/'demo/tiny-best-sample-seed0-pretrain.json').unlink()
    (copy/'demo/checkpoints').mkdir(exist_ok=True)
    (copy/'demo/checkpoints/tiny-best-sample-seed0-pretrain.ckpt').write_bytes(b'PK\x03\x04 half a file')
    assert 'is damaged' in one_line(ssl_study(*TINY, '--out', copy))


def test_result_of_another_configuration(ssl_study, one_line, copy):
    path = copy/'demo/tiny-best-sample-seed0-pretrain.json'
    path.write_text(path.read_text().replace('"width": 16', '"width": 20'))
    assert 'width: 20 and not 16' in one_line(ssl_study(*TINY, '--out', copy))


def test_too_many_labels():
    from ssl_nb.data import InputError, cifar10_sample, label_fraction
    train, _ = cifar10_sample()
    for labels in (451, 10**9):
        with pytest.raises(InputError, match='class .* has 450'): label_fraction(train, labels)
    for labels in (0, -1, -.5):
        with pytest.raises(InputError, match='give a number of 1 or more'): label_fraction(train, labels)
    with pytest.raises(InputError, match='has no labels'): label_fraction(train.unlabelled(), 1)
