"What was learned is kept: for every family of nets, for every kind of image and label, and whoever stops a run"
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from conftest import one_line_error
from torch import nn

from ssl_nb import classifier, cli, report, runs
from ssl_nb.augment import Normalize
from ssl_nb.backbones import FAMILIES, TimmTrunk, backbone
from ssl_nb.classifier import export_run, load_classifier, transfer
from ssl_nb.data import Images, InputError, cifar10_sample, holdout
from ssl_nb.evaluate import predict
from ssl_nb.export import build_trunk, export_weights
from ssl_nb.loading import load_any
from ssl_nb.neighbours import pool
from ssl_nb.report import open_run
from ssl_nb.runs import pretrain
from ssl_nb.transfer import set_bn_statistics
from ssl_nb.checkpoint import Checkpoint, listen_to, read_checkpoint
from ssl_nb.weights import _here, read_weights, save_weights

TRAIN = cifar10_sample()[0]
FEW = dict(method='rotation', epochs=1, bs=8, device='cpu')
TINY = dict(backbone='nin', width=8, **FEW)


def images(n=30, size=32, classes=3):
    "A few images of a few classes, at any size"
    x = torch.nn.functional.interpolate(TRAIN.x[:n].float(), size).byte() if size != 32 else TRAIN.x[:n]
    return Images(x, torch.arange(n) % classes, list('abcdefghij')[:classes], 'few')


# Every family of nets

NETS = [('nin', 32, dict(width=8)), ('resnet18', 32, dict(channels=(8, 8, 16, 16))), ('mobilenetv2_035', 32, {}),
        ('vit_tiny_patch16_224', 32, dict(embed_dim=32, depth=4, num_heads=2)), ('pit_ti_224', 32, dict(base_dims=(8, 8, 8), depth=(1, 1, 1))),
        ('mobilenetv3_small_050', 64, {}), ('convnext_atto', 32, dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))), ('repvgg_a0', 32, {}),
        ('regnetx_002', 64, {}), ('resnetv2_18', 32, dict(channels=(8, 8, 16, 16))), ('ghostnet_050', 32, {})]


@pytest.mark.parametrize('name,size,net', NETS, ids=[n for n, *_ in NETS])
def test_every_family_from_images_to_exported_weights(name, size, net, tmp_path, monkeypatch):
    few, made = images(size=size), []
    monkeypatch.setattr(classifier, 'save_weights', lambda model, *args, **kwargs: (made.append(model), save_weights(model, *args, **kwargs)))
    run = pretrain(few, tmp_path/'run', backbone=name, **{**FEW, **net})
    for kw in (dict(), dict(finetune=True, upto=len(run.trunk.blocks))):
        result = transfer(run, few, epochs=1, bs=8, against=False, device='cpu', **kw)
        again, norm, config = load_classifier(run.folder/f"transfer-{result['name']}")
        a, b = made[-1].state_dict(), again.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert torch.allclose(predict(made[-1], few, norm), predict(again, few, norm), atol=1e-5) and config['vocab'] == few.vocab  # in another memory layout
    lines, x = {}, torch.randn(2, 3, size, size)
    exec(export_run(run, 'timm'), lines)
    with torch.no_grad(): ours, theirs = pool(run.trunk.eval()(x)), pool(lines['m'](x))
    assert torch.allclose(ours, theirs, atol=1e-6) and ours.std() > 0


def test_no_family_is_left_out():
    trunks = [build_trunk(dict(name=name, size=size, **net)) for name, size, net in NETS if name != 'nin']
    assert {next((f for f in FAMILIES if isinstance(t.model, f)), None) for t in trunks} == {*FAMILIES, None}
    assert all(isinstance(t, TimmTrunk) for t in trunks)


def test_parts_that_are_in_a_net_twice(tmp_path):
    "Also for `load_any`; and what is for other programs has every name, since they load strictly"
    def net():
        part = nn.Linear(4, 4)
        return nn.Sequential(part, nn.ReLU(), part)
    a, b = net(), net()
    save_weights(a, tmp_path/'w.safetensors', half=True)
    assert len(read_weights(tmp_path/'w.safetensors')) == 2
    assert load_any(b, tmp_path/'w.safetensors').whole and torch.equal(b[2].weight, a[0].weight.half().float())
    trunk, lines = backbone('coat_tiny', 32, img_size=32, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1), parallel_depth=1), {}
    exec(export_weights(trunk, tmp_path/'coat.safetensors'), lines)
    assert all(torch.equal(v, lines['m'].state_dict()[k]) for k, v in trunk.model.state_dict().items())


# Files of others

def test_only_what_a_dead_process_left_is_swept_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dead = subprocess.Popen([sys.executable, '-c', '']); dead.wait()
    left = [Path(f'.views.png.{_here()}-{dead.pid}.tmp'), Path(f'transfer-x/.weights.safetensors.{_here()}-{dead.pid}.tmp')]
    alive = f'{_here()}-{os.getppid()}'
    others = [Path(p) for p in ('.draft.tmp', 'photos/.draft.1.tmp',
                                f'.report.html.{alive}.tmp', f'run2/.config.json.{alive}.tmp', f'.views.png.00000000-{dead.pid}.tmp')]
    for p in (*left, *others): p.parent.mkdir(exist_ok=True); p.write_text('x')
    pretrain(images(), '.', **TINY)
    assert all(p.exists() for p in others) and not any(p.exists() for p in left)


@pytest.mark.parametrize('name', ['report.html', 'result.json', 'checkpoint.ckpt', 'curves.png'])
def test_a_file_of_somebody_else_is_not_written_over(name, tmp_path):
    (tmp_path/name).write_text('mine')
    one_line_error(lambda: pretrain(images(), tmp_path, **TINY), 'holds no run', name, 'choose another folder')
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path/name).read_text() == 'mine'


# What can be known before training

def attributes(n, *columns): return Images(TRAIN.x[:n], torch.tensor(columns, dtype=torch.bool).expand(n, -1), ['p', 'q'], 'few')


REFUSED = {
    'one image a class': (lambda: dict(labelled=images(3)), 'no class has 2 images'),
    'attributes that all share': (lambda: dict(labelled=attributes(30, True, False)), 'every attribute is always there'),
    'numbers': (lambda: dict(images=Images(TRAIN.x[:30], torch.rand(30))), 'neither classes'),
    'copies only': (lambda: dict(labelled=images().subset([0]*9 + [1]*9)), 'no image is left'),
    'one class': (lambda: dict(labelled=images(classes=1)), 'one class only'),
    'not square': (lambda: dict(images=Images(TRAIN.x[:30, :, :24])), 'give square ones'),
    'no channels': (lambda: dict(images=Images(TRAIN.x[:30, 0])), 'give square ones'),
    'floats up to 255': (lambda: dict(images=Images(TRAIN.x[:30].float())), 'floats from 0 to 1'),
    'not a number': (lambda: dict(images=Images(TRAIN.x[:30]/255*torch.nan)), 'floats from 0 to 1'),
    'int16': (lambda: dict(images=Images(TRAIN.x[:30].short())), 'give uint8')}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_before_training(case, tmp_path):
    made, said = REFUSED[case]
    one_line_error(lambda: pretrain(**{**dict(images=images().unlabelled(), out=tmp_path/'run'), **made(), **TINY}), said)
    assert not (tmp_path/'run').exists()


@pytest.fixture(scope='module')
def done(tmp_path_factory): return pretrain(images(), tmp_path_factory.mktemp('done')/'run', **TINY)


OTHERS = TRAIN.x[40:50]
NO_TRANSFER = {
    'another size': (lambda: dict(labelled=images(size=48)), 'the run has learned from images of (3, 32, 32)'),
    'grey': (lambda: dict(labelled=Images(images().x[:, :1], images().y)), 'learned from images of (3, 32, 32)'),
    'no labels to measure by': (lambda: dict(labelled=images(), valid=images().unlabelled()), 'has no labels'),
    'numbers': (lambda: dict(labelled=Images(TRAIN.x[:30], torch.rand(30))), 'neither classes'),
    'other names': (lambda: dict(labelled=images(), valid=Images(OTHERS, torch.arange(10) % 3, ['b', 'a', 'c'])), 'the same `vocab`'),
    'a class without a name': (lambda: dict(labelled=images(), valid=Images(OTHERS, torch.arange(10))), 'a target of 9'),
    'one image a class': (lambda: dict(labelled=images(3)), 'no class has 2 images'),
    'one class': (lambda: dict(labelled=images(classes=1)), 'one class only'),
    'attributes that none has': (lambda: dict(labelled=attributes(30, False, False)), 'every attribute is always there'),
    'two kinds': (lambda: dict(labelled=images(classes=2), valid=Images(OTHERS, torch.arange(10)[:, None] > torch.tensor([4, 6]))), 'same kind')}


@pytest.mark.parametrize('case', NO_TRANSFER)
def test_no_transfer_that_cannot_end_well(case, done):
    made, said = NO_TRANSFER[case]
    one_line_error(lambda: transfer(done, **made(), epochs=1, device='cpu'), said)
    assert not list(done.folder.glob('transfer-*'))


def test_small_classes(tmp_path):
    "30 classes of 4 images, and 2 labelled images a class: parts of several classes, and a run that ends"
    four = Images(TRAIN.x[:120], torch.arange(120) % 30)
    assert [len(p) for p in holdout(four, .1)] == [108, 12] and len(holdout(four, .1)[1].y.unique()) == 12
    pretrain(four, tmp_path/'four', **TINY)
    run = pretrain(four.unlabelled(), tmp_path/'two', Images(TRAIN.x[200:206], torch.tensor([0, 0, 1, 1, 2, 2])), **TINY)
    assert run.result['sizes']['query'] == 2 and run.result['sizes']['bank'] == 4


@pytest.mark.parametrize('share', [.05, .1, .25, .5, .9])
@pytest.mark.parametrize('seed', range(5))
def test_no_part_is_empty_or_of_one_class(share, seed):
    sizes = torch.randint(1, 12, (6,), generator=torch.Generator().manual_seed(seed))
    y = torch.arange(6).repeat_interleave(sizes)
    fit, held = holdout(Images(torch.zeros(len(y), 1), y), share, seed)
    assert len(fit) + len(held) == len(y) and len(fit.y.unique()) == 6 and len(held.y.unique()) >= 2


def test_no_names_and_other_whole_numbers(tmp_path):
    "Classes are numbered where they have no names, and are classes in every type of whole numbers"
    plain = Images(TRAIN.x[:40], (torch.arange(40) % 3).int())
    run = pretrain(plain, tmp_path/'run', **TINY)
    assert 'knn' in run.result['metrics']['after']
    r = transfer(run, plain, epochs=1, device='cpu', against=False)
    assert r['vocab'] == ['0', '1', '2'] and 'accuracy' in r['metrics']['this run']


def test_what_cannot_be_measured_keeps_no_run_from_its_end(tmp_path, monkeypatch):
    def probe(*_): raise InputError('it cannot be asked')
    monkeypatch.setattr(report, 'linear_probe', probe)
    with pytest.warns(UserWarning, match='not measured: it cannot be asked'): run = pretrain(images(), tmp_path/'run', **TINY)
    assert 'nan' in report.gain_table(run).to_string() and 'nan' in (tmp_path/'run/report.html').read_text() and open_run(run.folder).trunk


# Statistics of BatchNorm

@pytest.mark.parametrize('n,bs', [(251, 250), (501, 250), (2, 250), (3, 2), (5, 2), (9, 4)])
def test_statistics_from_batches_of_one_size(n, bs):
    "A last batch of one image would count as much as 250, and has no statistics where maps are one pixel"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    x = TRAIN.x[:n].clone()
    x[-1] = 255
    set_bn_statistics(net, Images(x), Normalize(), bs)
    with torch.no_grad(): whole = net[:2](Normalize()(x)).mean(0).flatten()
    assert torch.allclose(net[2].running_mean, whole, atol=.01 if n > 100 else .35) and net[2].running_var.isfinite().all()


def test_a_net_whose_maps_shrink_to_one_pixel():
    net = backbone('repvgg_a0', 32)
    set_bn_statistics(net, TRAIN.subset(slice(0, 9)), Normalize(), 4)
    one_line_error(lambda: set_bn_statistics(net, TRAIN.subset(slice(0, 1)), Normalize()), 'give 2 or more')


# Whoever stops a run

STOPS = [pytest.param(s, marks=pytest.mark.skipif(not hasattr(signal, s), reason='not on this system')) for s in ('SIGTERM', 'SIGHUP', 'SIGINT')]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for i, x in enumerate(TRAIN.x[:40]):
        (root/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(root/'ab'[i % 2]/f'{i}.png')
    return root


def ended(command, *args, **kwargs):
    "The exit code of a command"
    try: command(*map(str, args), **kwargs)
    except SystemExit as e: return e.code
    return 0


def stop_at(monkeypatch, name, step=3):
    "Send a signal twice, as a closed terminal does, in the `step`th batch of the next fit"
    sent = []
    def before_batch(self):
        if self.fitting and not sent and self.training and self.train_iter == step:
            sent.append(name)
            for _ in range(1 if name == 'SIGINT' else 2): os.kill(os.getpid(), getattr(signal, name))
    monkeypatch.setattr(Checkpoint, 'before_batch', before_batch, raising=False)
    return sent


SIGNALS = {getattr(signal, n): how for n,how in (
    ('SIGTERM',signal.SIG_DFL), ('SIGHUP',signal.SIG_DFL), ('SIGINT',signal.default_int_handler)) if hasattr(signal, n)}

@pytest.fixture(autouse=True)
def heard():
    "Signals are heard, also where the shell made its job deaf to them (nohup, a job in the background)"
    before = {s: signal.signal(s, how) for s,how in SIGNALS.items()}
    yield
    for s,how in before.items(): signal.signal(s, how)

def commands(photos, at):
    "Each command that trains, what it writes, and where its checkpoint is"
    how = dict(size=32, bs=8, device='cpu', method='rotation', backbone='nin', net='width=8')
    pre = lambda out: ended(cli.ssl_pretrain, photos, out=str(out), epochs=3, **how)
    fit = lambda out: pre(out) or ended(cli.ssl_transfer, out, photos, epochs=2, bs=8, device='cpu')
    study = lambda out: ended(cli.ssl_study, 'demo', scale='tiny', device='cpu', out=str(out))
    return dict(ssl_pretrain=(pre, 'weights.safetensors', 'checkpoint.ckpt'), ssl_transfer=(fit, 'transfer-*/weights.safetensors', 'transfer-*/*.ckpt'),
                ssl_study=(study, 'demo/weights/*.safetensors', 'demo/checkpoints/*.ckpt'))[at]


@pytest.mark.parametrize('name', STOPS)
@pytest.mark.parametrize('at', ['ssl_pretrain', 'ssl_transfer', 'ssl_study'])
def test_every_signal_that_ends_a_program_lets_the_batch_end(at, name, photos, tmp_path, monkeypatch, capfd):
    if at != 'ssl_pretrain' and name != 'SIGTERM': pytest.skip('the same code')
    run, weights, checkpoint = commands(photos, at)
    if at == 'ssl_transfer': assert commands(photos, 'ssl_pretrain')[0](tmp_path/'a') == 0  # the signal is for what follows
    with monkeypatch.context() as m:
        sent = stop_at(m, name)
        capfd.readouterr()
        assert run(tmp_path/'a') == 128 + getattr(signal, name) and sent
    said = capfd.readouterr()[1]
    assert 'stopping after this batch' in said and f'{at}: stopped; the same command goes on' in said and 'Traceback' not in said
    there, = (tmp_path/'a').glob(checkpoint)
    assert read_checkpoint(there)['train_iter'] == 4
    if at == 'ssl_study': return  # that it goes on, bit for bit, is shown elsewhere
    assert run(tmp_path/'a') == 0 and run(tmp_path/'b') == 0
    for a, b in zip(sorted((tmp_path/'a').glob(weights)), sorted((tmp_path/'b').glob(weights)), strict=True):
        a, b = read_weights(a), read_weights(b)
        assert all(torch.equal(a[k], b[k]) for k in a | b)


def test_also_outside_of_a_fit(photos, tmp_path, monkeypatch, capfd):
    run = commands(photos, 'ssl_pretrain')[0]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(runs, 'measure', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path/'run') == 128 + signal.SIGTERM
    assert 'the same command goes on' in capfd.readouterr()[1] and signal.getsignal(signal.SIGTERM) == before
    assert run(tmp_path/'run') == 0


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='not on this system')
def test_nohup_is_respected():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listen_to(lambda *_: pytest.fail('heard')): os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, old)


def test_a_terminal_that_is_closed(photos, tmp_path):
    "Really: what is written to it then is an error, and the shell's signal comes beside the kernel's"
    pty, fcntl, termios = (pytest.importorskip(m) for m in ('pty', 'fcntl', 'termios'))
    ours, theirs = pty.openpty()
    how = '--size 32 --epochs 2000 --bs 8 --method rotation --backbone nin --net width=8 --device cpu --out'.split()
    args = [*map(str, (Path(sys.executable).with_name('ssl_pretrain'), photos, *how, tmp_path/'run'))]
    own = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    p = subprocess.Popen(args, **own, env=dict(os.environ, PYTHONUNBUFFERED='1'))
    os.close(theirs)
    text = b''
    while b'epoch 2/' not in text: text += os.read(ours, 1000)
    os.close(ours)
    assert p.wait(60) != 0
    there = read_checkpoint(tmp_path/'run/checkpoint.ckpt')
    assert there['batch'] > 0  # of the batch in which it came, and not of the last epoch
