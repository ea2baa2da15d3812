"From a folder to exported weights: the commands as a user gives them, what is cut off, and what is wrong"
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from fastcore.script import anno_parser
from safetensors.torch import load_file

from ssl_nb import cli
from ssl_nb.classifier import export_run, hold_unseen, labelled_parts, last_line, load_classifier, transfer
from ssl_nb.data import Images, InputError, cifar10_sample
from ssl_nb.export import build_trunk
from ssl_nb.fitting import read_json, write_json
from ssl_nb.folders import find_duplicates, image_folder
from ssl_nb.method import DEFAULT_METHOD, METHODS, get_method, method_names
from ssl_nb.nets import NIN
from ssl_nb.report import Run, measure, open_run, write_report
from ssl_nb.runs import pretrain
from ssl_nb.settings import image_sums, run_learner, run_settings, split_images
from ssl_nb.studies.scenes import gtsdb_sample
from ssl_nb.checkpoint import read_checkpoint
from ssl_nb.weights import _here, save_weights

NET = 'channels=(8,8,16,16)'
HOW = dict(size=32, bs=16, device='cpu', channels=(8,8,16,16))
SMALL = ['--size', '32', '--epochs', '3', '--bs', '16', '--net', NET, '--device', 'cpu']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "A folder of unlabelled images, one of labelled ones (classes are subfolders), and one of held-out ones"
    root = tmp_path_factory.mktemp('folders')
    train,test = cifar10_sample()
    for folder,part,n,labelled in (('photos',train,100,False), ('labelled',train,60,True), ('held',test,30,True)):
        for i in range(n):
            to = root/folder/(part.vocab[part.y[i]%3] if labelled else f'day{i%4}')
            to.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.x[i].permute(1, 2, 0).numpy()).save(to/f'{i}.png')
    (root/'photos'/'day0'/'broken.jpg').write_bytes(b'no image')
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp()/'cache'))


@pytest.fixture
def command(capfd):
    "A command called as a function: exit code, output, errors"
    def run(name, *args):
        f = getattr(cli, name)
        capfd.readouterr()
        try:
            given = vars(anno_parser(f.__wrapped__).parse_args(list(map(str, args))))
            f(**{k: v for k,v in given.items() if k not in ('pdb','xtra')}); code = 0
        except SystemExit as e: code = e.code
        return code, *capfd.readouterr()
    return run


@pytest.fixture(scope='module')
def done(folders, tmp_path_factory):
    "A run that nothing disturbed"
    os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.getbasetemp()/'cache')
    return pretrain(folders/'photos', tmp_path_factory.mktemp('done')/'run', folders/'labelled', epochs=3, **HOW)


def test_three_commands(folders, tmp_path, command):
    code,out,err = command('ssl_pretrain', folders/'photos', '--labelled', folders/'labelled', '--out', tmp_path/'run', *SMALL)
    assert code == 0, err
    for said in ('about', '3 epochs of', 'random weights', 'kNN accuracy', 'ssl_transfer'): assert said in out
    assert 'Traceback' not in err
    code,out,err = command('ssl_transfer', tmp_path/'run', folders/'labelled', '--valid', folders/'held', '--head', 'conv', '--upto', 2, '--epochs', 2, '--device', 'cpu')
    assert code == 0, err
    for said in ('this run', 'random blocks, frozen', 'from scratch', '30 others'): assert said in out, said
    code,out,err = command('ssl_export', tmp_path/'run', '--to', 'timm')
    assert code == 0 and 'timm.create_model' in out, err
    exec(out, {})  # the lines that it prints load the file
    page = (tmp_path/'run'/'report.html').read_text()
    for said in ('What was gained', 'conv2', 'broken.jpg', 'data:image/png;base64', 'kNN accuracy'): assert said in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # one file, with nothing outside of it


def test_what_is_done_is_not_done_again(folders, done, capfd):
    before = (done.folder/'result.json').stat().st_mtime_ns
    pretrain(folders/'photos', done.folder, folders/'labelled', epochs=3, **HOW)
    assert 'done already' in capfd.readouterr()[0]
    assert (done.folder/'result.json').stat().st_mtime_ns == before
    with pytest.raises(InputError, match='epochs: 3 and not 4'): pretrain(folders/'photos', done.folder, folders/'labelled', epochs=4, **HOW)


def test_measures_are_those_of_the_weights(done, folders):
    "The gain that is shown can be computed again from the files"
    m,r = done.result['metrics'], done.result
    assert set(m) == {'before','after'} and set(m['after']) == {'twins','knn','linear'}
    assert all(0 <= v <= 1 for part in m.values() for v in part.values())
    assert r['skipped'] and len(r['history']) == 3 and r['sizes']['fit'] + r['sizes']['watch'] + r['copies'] == 100
    parts,copies = split_images(image_folder(folders/'photos', size=32, labels=None), image_folder(folders/'labelled', size=32), done.config['seed'])
    assert copies == r['copies'] and measure(done.trunk, done.config, parts['watch'], parts['bank'], parts['query']) == pytest.approx(m['after'], abs=1e-6)


def test_copies_of_held_out_images_are_left_out(tmp_path, folders):
    "`labelled` are the first 60 of the same 100 images: what is held out of them must not be learned from"
    run = pretrain(folders/'photos', tmp_path/'run', folders/'labelled', epochs=1, **HOW)
    assert run.result['copies'] >= 10


def test_no_copy_on_both_sides():
    "Each image is there three times, and no part that is held out has one in a part that is learned from"
    train = cifar10_sample()[0]
    thrice = train.subset(torch.arange(40).repeat(3))
    for labelled in (None, thrice.subset(slice(20,100))):
        parts,copies = split_images(thrice, labelled)
        fit = thrice.subset(parts['fit'])
        assert copies and len(fit) and len(parts['bank'])
        assert not find_duplicates(fit, parts['watch']) and not find_duplicates(fit, parts['query']) and not find_duplicates(parts['bank'], parts['query'])
    train,held = labelled_parts(thrice, None, 0)
    assert len(train) and len(held) and not find_duplicates(train, held)


def test_classifier_from_its_file(done, folders):
    result = transfer(done, folders/'labelled', folders/'held', head='nonlinear', epochs=3, against=False, device='cpu', name='again')
    net,norm,settings = load_classifier(done.folder/'transfer-again')
    held = image_folder(folders/'held', size=32, vocab=settings['vocab'])
    with torch.no_grad(): acc = (net(norm(held.x)).argmax(1) == held.y).float().mean().item()
    assert acc == pytest.approx(result['metrics']['this run']['accuracy'])


def test_several_labels_an_image(folders, tmp_path):
    "Attributes from a CSV file"
    files = sorted((folders/'photos').rglob('*.png'))[:80]
    rng = random.Random(0)
    rows = [f"{p.relative_to(folders/'photos').as_posix()},{'|'.join(a for a in 'ABC' if rng.random() < .5)}" for p in files]
    (tmp_path/'labels.csv').write_text('\n'.join(['file,label', *rows]))
    run = pretrain(folders/'photos', tmp_path/'run', labels=tmp_path/'labels.csv', sep='|', size=32, epochs=1, bs=16, device='cpu', method='rotation', backbone='nin', width=8)
    assert set(run.result['metrics']['after']) == {'twins','linear_auc'}
    r = transfer(run, folders/'photos', labels=tmp_path/'labels.csv', sep='|', epochs=1, device='cpu')
    assert set(r['metrics']['this run']) == {'accuracy','auc_macro'}
    each = r['attributes']  # each beside what one gets who always says the more common of yes and no
    assert set(each) == set('ABC') and r['guess'] == dict(accuracy=pytest.approx(np.mean([m['always the commonest'] for m in each.values()])), auc_macro=.5)
    assert np.mean([m['this run'] for m in each.values()]) == pytest.approx(r['metrics']['this run']['accuracy'])
    assert 'of 3 attributes' in last_line(r) and 'accuracy by attribute' in (run.folder/'report.html').read_text()


def test_measured_on_images_that_pretraining_did_not_see(tmp_path, capfd):
    "... and the net from scratch, which is the whole net, on the same ones; what they are said to be can be counted in the files"
    photos = cifar10_sample()[0].subset(slice(0,160))
    run = pretrain(photos, tmp_path/'run', method='rotation', backbone='nin', width=8, epochs=1, bs=16, device='cpu')
    learned = run.learned
    assert learned == set(image_sums(photos)) - set(image_sums(split_images(photos)[0]['watch']))
    train,held = labelled_parts(photos, None, 0, learned)
    assert 0 < len(held) <= 160*.1 + 10 and not learned & set(image_sums(held)) and len(train) + len(held) == 160
    r = transfer(run, photos, head='conv', epochs=1, device='cpu')
    assert r['seen'] == 0 and r['sizes']['valid'] == len(held) and f'measured on {len(held)} others, none of which pretraining saw' in capfd.readouterr()[0]
    whole = transfer(run, photos, head='conv', upto=4, epochs=1, device='cpu')['metrics']
    assert r['settings']['upto'] == 2 and r['metrics']['this run'] != whole['this run']
    assert r['metrics']['from scratch, all trained'] == whole['from scratch, all trained']
    page = (run.folder/'report.html').read_text()
    assert 'none of which pretraining saw' in page and 'always the commonest' in page
    seen = transfer(run, photos.subset(slice(0,80)), photos.subset(slice(80,160)), epochs=1, against=False, device='cpu', name='seen')['seen']
    assert seen == len(learned & set(image_sums(photos.subset(slice(80,160)))))
    assert f', {seen} of which pretraining saw, without labels' in capfd.readouterr()[0]
    (run.folder/'images.json').unlink()  # as runs were before
    assert Run(run.folder).learned is None and transfer(run, photos, epochs=1, against=False, device='cpu', name='old')['seen'] is None


def test_a_class_of_which_pretraining_saw_all_is_held_out_all_the_same():
    photos = cifar10_sample()[0].subset(slice(0,80))
    sums = image_sums(photos)
    for free in (set(), {s for s,y in zip(sums, photos.y) if y == 3}, {sums[-1]}, set(sums)):
        train,held = hold_unseen(photos, set(sums) - free, seed=1)
        plain = labelled_parts(photos, None, 1)[1]
        for k in range(10):
            (a,b),new = (set(image_sums(p.subset(p.y == k))) for p in (held,plain)), {s for s,y in zip(sums, photos.y) if y == k} & free
            assert a <= new and len(a) == min(len(new), len(b)) if new else a == b
        assert len(train) + len(held) == 80


@pytest.mark.parametrize('bits', [False, True])
def test_who_never_looks(bits, tmp_path, capfd):
    "27 images of one class and 9 of another: to say the one is right three times of four"
    x,y = cifar10_sample()[0].x[:36], torch.arange(36) % 4 == 0
    labelled = Images(x, y[:,None] if bits else y.long(), ['rare'] if bits else ['common','rare'])
    run = pretrain(labelled, tmp_path/'run', epochs=1, **HOW)
    r = transfer(run, labelled, labelled.subset(slice(20,36)), epochs=1, against=False, device='cpu')
    out = capfd.readouterr()[0].strip().splitlines()
    assert r['guess']['accuracy'] == .75 and 'always to say what is commonest would get 75.0 %' in out[-1] and last_line(r) == out[-1]
    assert re.search(r'always the commonest +75.0', '\n'.join(out)) and '75.0' in (run.folder/'report.html').read_text()
    q = split_images(labelled)[0]['query'].y
    assert run.result['guess'] == (dict(linear_auc=.5) if bits else dict.fromkeys(('knn','linear'), pytest.approx((q == 0).float().mean().item())))


class Constant(NIN):
    "Says the same of all images"
    def forward(self, x): return super().forward(x)*0 + 1


def test_a_collapse_is_on_the_page(tmp_path, monkeypatch, capfd):
    "... and on a line of its own, though the run has few steps"
    for m in ('settings','runs'): monkeypatch.setattr(f'ssl_nb.{m}.build_trunk', lambda recipe, *_: (net := Constant(8), setattr(net, 'loaded', 'random'))[0])
    photos = cifar10_sample()[0].subset(slice(0,60)).unlabelled()
    with pytest.warns(UserWarning, match='^collapse'): run = pretrain(photos, tmp_path/'run', epochs=1, size=32, bs=16, device='cpu', backbone='nin', width=8)
    said = run.result['collapse']
    assert said.startswith('collapse: ') and f'\n{said}\n' in capfd.readouterr()[0]
    assert '<p class="warning">collapse: ' in (run.folder/'report.html').read_text()


def test_a_run_that_did_not_collapse_says_nothing(done):
    assert done.result['collapse'] == '' and '<p class="warning">' not in (done.folder/'report.html').read_text()


def test_pages_of_results_from_before(done, folders, tmp_path):
    "They lack what was not measured then, and the page leaves it out"
    shutil.copytree(done.folder, tmp_path/'run')
    run = Run(tmp_path/'run')
    transfer(run, folders/'labelled', epochs=1, against=False, device='cpu', name='x')
    for path in run.folder.glob('**/result.json'):
        write_json(path, **{k: v for k,v in read_json(path).items() if k not in ('guess','collapse','loaded','seen')})
    write_report(run)
    assert 'Transfer: x' in (run.folder/'report.html').read_text()
    assert 'always the commonest' not in (run.folder/'report.html').read_text() and 'kNN accuracy' in (run.folder/'report.html').read_text()


def test_the_net_of_a_run_comes_in_evaluation_mode(done):
    assert not any(m.training for m in done.trunk.modules())


@pytest.mark.parametrize('net', [dict(backbone='vit_tiny_patch16_224', depth=1, embed_dim=16, num_heads=1), dict(backbone='nin', width=8)], ids=['vit', 'nin'])
@pytest.mark.parametrize('method', ['simsiam','rotation'])
def test_the_rate_that_is_asked_for_is_used(net, method):
    "... by the optimiser, and written down; so is the default, which is small for a net without BatchNorm2d"
    photos = cifar10_sample()[0].subset(slice(0,60)).unlabelled()
    usual = {'simsiam': .1*16/256, 'rotation': .1}[method]/(50 if 'depth' in net else 1)
    for lr in (.02, None):
        c = run_settings(photos, method=method, lr=lr, epochs=1, bs=16, device='cpu', **net)
        learn = run_learner(c, photos, photos.thin(20), torch.device('cpu'))
        with learn.no_bar(), learn.no_logging(): get_method(method).fit(learn, c['epochs'])
        assert c['lr'] == pytest.approx(lr or usual) and max(learn.recorder.lrs) == pytest.approx(c['lr'], rel=.05)


SMALL_RUN = dict(epochs=1, bs=16, device='cpu', backbone='nin', width=8)


@pytest.fixture
def own():
    "A method of somebody's notebook: what it is asked for, and with what"
    asked = []
    def learner(dls, trunk, **kwargs):
        asked.append(kwargs)
        return get_method('rotation').learner(dls, trunk, **kwargs)
    m = replace(get_method('rotation'), name='own', learner=learner, block=lambda n: n-1, lr=.03, bs=dict(cpu=8), picture=None)
    yield m, asked
    METHODS.pop('own', None)


def test_a_method_of_ones_own(own, tmp_path, capsys):
    "By its record or by its name, from plan to export; later, without it, all but the fit"
    method,asked = own
    photos,others = (part.subset(slice(0,60)) for part in cifar10_sample())
    how = {k: v for k,v in SMALL_RUN.items() if k != 'bs'}
    run = pretrain(photos, tmp_path/'run', method=method, **how)
    assert [run.config[k] for k in ('method','block','lr','bs')] == ['own',3,.03,8] and 'own with nin' in capsys.readouterr()[0]
    assert asked and all('monitor' not in kw and kw['lr'] == .03 and kw['size'] == 32 for kw in asked)
    assert pretrain(photos, tmp_path/'run', method='own', **how).result == run.result  # it is registered now
    page = (run.folder/'report.html').read_text()
    assert 'own with nin' in page and 'what the net learned from' not in page  # it has no picture
    METHODS.pop('own')
    with pytest.raises(InputError, match="unknown method 'own'"): pretrain(photos, tmp_path/'run', method='own', **how)
    run = open_run(tmp_path/'run')
    result = transfer(run, photos, others, epochs=1, against=False, device='cpu')
    assert result['settings']['upto'] == 3 and measure(run.trunk, run.config, others)['twins'] >= 0
    assert 'm.load_state_dict' in export_run(run)


def test_a_method_that_compares_views_gets_a_monitor(own, tmp_path):
    method,asked = own
    learner = lambda dls, trunk, **kwargs: asked.append(kwargs) or get_method('simsiam').learner(dls, trunk, **kwargs)
    method = replace(get_method('simsiam'), name='own', learner=learner, curves=('rank',))
    run = pretrain(cifar10_sample()[0].subset(slice(0,60)), tmp_path/'run', method=method, **SMALL_RUN)
    assert asked[-1]['monitor'].sets and {'std','rank','knn'} <= run.result['history'][0].keys()
    assert run.config['block'] is None and run.config['lr'] == pytest.approx(.1*16/256)


def test_runs_from_before_a_configuration_knew_its_block(tmp_path):
    "They are gone on with, measured and transferred, by the block that their method says"
    photos = cifar10_sample()[0].subset(slice(0,60))
    run = pretrain(photos, tmp_path/'run', method='rotation', **SMALL_RUN)
    there = read_json(run.folder/'config.json')
    old = {k: v for k,v in there['config'].items() if k != 'block'}
    run.save('config.json', **{**there, 'config': old})
    save_weights(build_trunk(old['net'], run.weights), run.weights, **old)
    before = run.result
    assert pretrain(photos, tmp_path/'run', method='rotation', **SMALL_RUN).result == before and 'block' not in run.config
    others = cifar10_sample()[1].subset(slice(0,60))
    assert transfer(run, photos, others, epochs=1, against=False, device='cpu')['settings']['upto'] == 2


def test_no_room_for_own_images_names_a_method():
    "... but the default, once"
    names = '|'.join(method_names())
    for room in 'method settings report runs classifier export loading terminal'.split():
        said = re.findall(rf'\b(?:{names})\b.*', Path(importlib.import_module(f'ssl_nb.{room}').__file__).read_text())
        assert len(said) == (room == 'method'), (room, said)
    assert DEFAULT_METHOD in method_names()


def test_weights_from_a_file_are_reported(folders, tmp_path, command, capfd):
    "What was filled, from which names, and what not; an option chooses among several"
    nets = {k: NIN(8) for k in ('online','target')}
    torch.save({f'{k}.net.{n}': v for k,net in nets.items() for n,v in net.state_dict().items()} | {'head.weight': torch.ones(2,2)}, tmp_path/'w.pth')
    args = [folders/'photos', '--backbone', 'nin', '--net', 'width=8', '--epochs', 1, '--size', 32, '--bs', 16,
            '--device', 'cpu', '--weights', tmp_path/'w.pth']
    for prefix in ('', 'target.net.'):
        code,out,err = command('ssl_pretrain', *args, '--out', tmp_path/f'run{prefix}', *(['--prefix', prefix] if prefix else []))
        assert code == 0, err
        line = next(l for l in out.splitlines() if l.startswith('begins with'))
        assert "72 of 72 of the trunk's tensors" in line and repr(prefix or 'online.net.') in line and 'head.*' in line
        assert ("'target.net.' would fit too: choose by prefix= (`--prefix`)" in line) == (not prefix)
        run = open_run(tmp_path/f'run{prefix}')
        assert run.config.get('prefix') == (prefix or None) and run.result['loaded'] in line and "72 of 72" in (run.folder/'report.html').read_text()
    code,out,err = command('ssl_pretrain', *args, '--out', tmp_path/'x', '--prefix', 'teacher.')
    assert code == 2 and "no name begins with 'teacher.'" in err
    code,out,err = command('ssl_pretrain', *args[:-2], '--out', tmp_path/'x', '--prefix', 'teacher.')
    assert code == 2 and '--weights' in err and not (tmp_path/'x').exists()


def test_grey_images(tmp_path, capfd):
    x = cifar10_sample()[0].x[:60].float().mean(1).byte()
    for i,im in enumerate(x):
        to = tmp_path/'grey'/f'{i%2}'; to.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im.numpy()).save(to/f'{i}.png')
    run = pretrain(tmp_path/'grey', tmp_path/'run', labels='folders', epochs=1, **HOW)
    assert run.config['net']['in_chans'] == 1 and len(run.config['mean']) == 1
    transfer(run, tmp_path/'grey', head='conv', upto=2, epochs=1, device='cpu')


def left_half(path):
    "What a process that was killed left of a file"
    dead = subprocess.Popen([sys.executable, '-c', '']); dead.wait()
    path.with_name(f'.{path.name}.{_here()}-{dead.pid}.tmp').touch()


# A process imports once and is forked for each attempt: it is killed in its work, not while it imports
KILLED = """
import os, random, signal, sys, time, warnings
warnings.filterwarnings('ignore')
from dataclasses import replace
from pathlib import Path
import torch
from ssl_nb.runs import pretrain
folder, out = sys.argv[1:3]
def attempt():
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY); os.dup2(null, 1); os.dup2(null, 2)
        code = 1
        try: pretrain(folder, out, size=32, epochs=12, bs=16, device='cpu', channels=(8,8,16,16)); code = 0
        finally: os._exit(code)
    return pid
rng, kills = random.Random(0), 0
for _ in range(10):
    pid = attempt()
    time.sleep(rng.uniform(.1, 2.5))
    os.kill(pid, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(kills, sorted(p.name for p in Path(out).glob('*')), flush=True)
assert os.waitpid(attempt(), 0)[1] == 0
print('kills', kills)
"""


def test_killed_at_ten_random_moments(folders, tmp_path):
    "... and ends bit for bit as the run that was not"
    env = dict(os.environ, OMP_NUM_THREADS='1')
    (tmp_path/'run').mkdir()
    left_half(tmp_path/'run'/'curves.png')  # as one leaves it that is killed while it draws
    r = subprocess.run([sys.executable, '-c', KILLED, folders/'photos', tmp_path/'run'], capture_output=True, text=True, env=env, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    assert int(r.stdout.split()[-1]) >= 5, r.stdout  # the last ones may find the work done
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: two threads add up in another order
    try: whole = pretrain(folders/'photos', tmp_path/'whole', epochs=12, **HOW)
    finally: torch.set_num_threads(threads)
    a,b = (load_file(p/'weights.safetensors') for p in (tmp_path/'run', whole.folder))
    assert all(torch.equal(a[k], b[k]) for k in a | b)
    again = open_run(tmp_path/'run').result
    assert again['history'] == whole.result['history'] and again['metrics'] == whole.result['metrics']
    assert not list((tmp_path/'run').glob('*.ckpt')) and not list((tmp_path/'run').glob('.*'))


def test_ctrl_c_and_the_clock(folders, done, tmp_path):
    "Ctrl-C finishes the batch, saves and says how to go on; --minutes does so by itself; the end is the same"
    args = [Path(sys.executable).with_name('ssl_pretrain'), folders/'photos', '--labelled', folders/'labelled', '--out', tmp_path/'run', *SMALL]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job is born deaf to Ctrl-C
    p = subprocess.Popen([*map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen, env=dict(os.environ, PYTHONUNBUFFERED='1'))
    for line in p.stdout:
        if line.startswith('epoch 1/'): break
    p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    assert p.returncode == 130 and 'stopping after this batch' in err and 'the same command goes on' in err and 'Traceback' not in err, err
    there = read_checkpoint(tmp_path/'run'/'checkpoint.ckpt')
    assert (there['epoch'], there['batch']) > (1, 0)  # more than the checkpoint of the first epoch
    with pytest.raises(KeyboardInterrupt): pretrain(folders/'photos', tmp_path/'run', folders/'labelled', minutes=1e-9, epochs=3, **HOW)
    run = pretrain(folders/'photos', tmp_path/'run', folders/'labelled', epochs=3, **HOW)
    a,b = load_file(run.weights), load_file(done.weights)
    assert all(torch.equal(a[k], b[k]) for k in a | b)


@pytest.mark.parametrize('name,args,said', [
    ('ssl_pretrain', ['{none}'], 'no such folder'),
    ('ssl_pretrain', ['{photos}','--method','magic'], 'choose one of '),
    ('ssl_pretrain', ['{photos}','--backbone','resnet1'], 'did you mean'),
    ('ssl_pretrain', ['{photos}','--epochs','0'], '1 or more'),
    ('ssl_pretrain', ['{photos}','--size','3'], 'size'),
    ('ssl_pretrain', ['{photos}','--bs','1'], '2 or more'),
    ('ssl_pretrain', ['{photos}','--net','16'], 'give names and values'),
    ('ssl_pretrain', ['{photos}','--weights','{none}'], 'none'),
    ('ssl_pretrain', ['{photos}','--device','tpu'], 'not available'),
    ('ssl_pretrain', ['{photos}','--labels','{none}.csv'], 'none.csv'),
    ('ssl_transfer', ['{none}','{labelled}'], 'holds no run'),
    ('ssl_transfer', ['{run}','{photos}/day1'], 'no labels'),
    ('ssl_transfer', ['{run}','{labelled}','--head','box'], 'unknown head'),
    ('ssl_transfer', ['{run}','{labelled}','--upto','9'], 'blocks 1 to 4'),
    ('ssl_transfer', ['{run}','{labelled}','--freeze','--finetune'], 'one of them'),
    ('ssl_export', ['{run}','--to','onnx'], 'onnx'),
    ('ssl_export', ['{none}'], 'holds no run'),
])
def test_bad_input_is_one_line(name, args, said, folders, done, tmp_path, command):
    at = dict(none=tmp_path/'none', photos=folders/'photos', labelled=folders/'labelled', run=done.folder)
    args = [a.format(**at) for a in args] + (['--out', str(tmp_path/'out')] if name == 'ssl_pretrain' else [])
    if name == 'ssl_pretrain' and '--size' not in args: args += ['--size', '32']
    code,out,err = command(name, *args)
    lines = [l for l in err.splitlines() if l.strip() and 'skipped' not in l]
    assert code == 2 and len(lines) == 1 and said in lines[0], (code, err)


def test_unwritable_folder(folders, tmp_path, command):
    (tmp_path/'file').write_text('')
    code,out,err = command('ssl_pretrain', folders/'photos', '--out', tmp_path/'file'/'run', *SMALL)
    assert code == 2 and 'cannot write' in err and 'Traceback' not in err


def test_no_space(folders, done, tmp_path):
    "A disk that is full: writing stops at 20 kB a file. The last checkpoint stays whole, and with room again the end is the same"
    resource = pytest.importorskip('resource')
    with pytest.raises(KeyboardInterrupt): pretrain(folders/'photos', tmp_path/'run', folders/'labelled', minutes=1e-9, epochs=3, **HOW)
    before = (tmp_path/'run'/'checkpoint.ckpt').read_bytes()
    args = [Path(sys.executable).with_name('ssl_pretrain'), folders/'photos', '--labelled', folders/'labelled', '--out', tmp_path/'run', *SMALL]
    r = subprocess.run([*map(str, args)], capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    assert r.returncode == 2 and 'cannot write' in r.stderr and 'make room' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert (tmp_path/'run'/'checkpoint.ckpt').read_bytes() == before and not list((tmp_path/'run').glob('.*'))
    run = pretrain(folders/'photos', tmp_path/'run', folders/'labelled', epochs=3, **HOW)
    a,b = load_file(run.weights), load_file(done.weights)
    assert all(torch.equal(a[k], b[k]) for k in a | b)


def test_photographs_of_traffic_signs(tmp_path, command):
    "Real pictures of many sizes, cut from photographs: better than to say the most frequent class always"
    s,n = gtsdb_sample(), 0
    for k,(y,(left,top,w,h)) in enumerate(zip(s.y.tolist(), s.boxes.int().tolist())):
        if (s.y == y).sum() < 12: continue
        (to := tmp_path/'signs'/s.vocab[y].replace('/', ' ')).mkdir(parents=True, exist_ok=True)
        Image.fromarray(s.x[k,:,top:top+h,left:left+w].permute(1, 2, 0).numpy()).save(to/f'{k}.jpg', quality=95); n += 1
    often = max(len(list(c.iterdir())) for c in (tmp_path/'signs').iterdir())/n
    code,out,err = command('ssl_pretrain', tmp_path/'signs', '--labels', 'folders', '--out', tmp_path/'run', *SMALL, '--epochs', 5)
    assert code == 0 and 'kNN accuracy' in out, err
    code,out,err = command('ssl_transfer', tmp_path/'run', tmp_path/'signs', '--finetune', '--alone', '--epochs', 20, '--bs', 16, '--lr', .003, '--device', 'cpu')
    assert code == 0, err
    assert json.loads(next((tmp_path/'run').glob('transfer-*/result.json')).read_text())['metrics']['this run']['accuracy'] > often + .15


def test_labels_of_a_few_images_and_all_are_learned_from(folders, tmp_path):
    files = sorted((folders/'photos').rglob('*.png'))[:40]
    (tmp_path/'few.csv').write_text('\n'.join(['file,label', *(f"{p.relative_to(folders/'photos').as_posix()},{'AB'[k%2]}" for k,p in enumerate(files))]))
    r = pretrain(folders/'photos', tmp_path/'run', labels=tmp_path/'few.csv', epochs=1, **HOW).result
    assert r['sizes']['fit'] + r['sizes']['watch'] + r['copies'] == 100 and r['sizes']['bank'] + r['sizes']['query'] == 40 and 'knn' in r['metrics']['after']


def test_copies_only(tmp_path):
    (tmp_path/'x').mkdir()
    Image.effect_noise((32,32), 50).save(tmp_path/'x/0.png')
    for i in range(1, 40): shutil.copy(tmp_path/'x/0.png', tmp_path/f'x/{i}.png')
    with pytest.raises(InputError, match='nothing is left to learn from'): pretrain(tmp_path/'x', tmp_path/'run', epochs=1, **HOW)
    assert not (tmp_path/'run').exists()


def test_killed_before_the_page(folders, done, tmp_path):
    shutil.copytree(done.folder, tmp_path/'run')
    (tmp_path/'run'/'report.html').unlink(); left_half(tmp_path/'run'/'report.html'); (tmp_path/'run'/'checkpoint.ckpt').write_text('x')
    pretrain(folders/'photos', tmp_path/'run', folders/'labelled', epochs=3, **HOW)
    assert (tmp_path/'run'/'report.html').exists() and not list((tmp_path/'run').glob('.*')) and not (tmp_path/'run'/'checkpoint.ckpt').exists()


def test_a_transfer_is_no_run(folders, done, command):
    transfer(done, folders/'labelled', epochs=1, against=False, device='cpu', name='q')
    code,out,err = command('ssl_export', done.folder/'transfer-q')
    assert code == 2 and 'give the folder of its run' in err and 'delete' not in err


def test_a_run_among_the_labelled(folders, done, tmp_path):
    shutil.copytree(folders/'labelled', tmp_path/'l'); shutil.copytree(done.folder, tmp_path/'l'/'run')
    with pytest.raises(InputError, match='in the folder of the images'): transfer(tmp_path/'l'/'run', tmp_path/'l', epochs=1, device='cpu')


def test_measured_by_the_same_images(folders, done):
    with pytest.raises(InputError, match='is also in'): transfer(done, folders/'labelled', folders/'labelled', epochs=1, device='cpu')


@pytest.mark.parametrize('out', ['my run', 'é\udcff'])
def test_odd_names_of_a_run(folders, tmp_path, out):
    r = subprocess.run([Path(sys.executable).with_name('ssl_pretrain'), folders/'photos', '--out', os.fsencode(tmp_path/out), *SMALL, '--epochs', '1'], capture_output=True, env=dict(os.environ, PYTHONIOENCODING='ascii:strict'))
    assert r.returncode == 0 and b'Traceback' not in r.stderr, r.stderr[-500:]
    if ' ' in out: assert f"ssl_export '{tmp_path/out}'".encode() in r.stdout
    assert (tmp_path/out/'report.html').exists()


def test_it_says_where_it_goes_on(folders, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt): pretrain(folders/'photos', tmp_path/'run', minutes=1e-9, epochs=3, **HOW)
    capfd.readouterr()
    pretrain(folders/'photos', tmp_path/'run', epochs=3, **HOW)
    out = capfd.readouterr()[0]
    assert 'goes on in epoch 1/3, after 1 batches' in out and 'epoch 1/3: \n' not in out
