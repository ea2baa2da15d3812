"Two processes on the CPU: the same losses as one, exact resume, one writer, and nobody left hanging"
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import one_line_error

from ssl_nb import distributed
from ssl_nb.data import ImageDL, cifar10_sample
from ssl_nb.distributed import data_parallel, is_first, join_processes, launched, my_rows, my_share, share_loader
from ssl_nb.launch import _wait, launch

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='signals and forks of POSIX')

# What each process does; `FOLDER` gets one JSON file a process
WORKER = '''
import hashlib, json, os, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.metrics import RocAucBinary, accuracy
from torch import nn
from ssl_nb.augment import *
from ssl_nb.data import *
from ssl_nb.distributed import *
from ssl_nb.nets import *
from ssl_nb.methods.rotation import *
from ssl_nb.schedule import *
from ssl_nb.methods.simsiam import *
from ssl_nb.siamese import *
from ssl_nb.checkpoint import *
from ssl_nb.weights import *

what, folder = sys.argv[1], Path(sys.argv[2])
rank, world = join_processes(timeout=60)
train, test = cifar10_sample()
plain = Normalize(), Normalize()
done = {}

def net(norm=False):
    layers = nn.Conv2d(3, 8, 3, 2, 1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU()
    return Trunk(nn.Sequential(*layers), nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()))

def rotnet(n=215, norm=False, seed=0, augment=plain, **kwargs):
    torch.manual_seed(seed)
    dls = image_dls(train.subset(slice(0, n)), test.subset(slice(0, 101)), bs=32, valid_bs=30, device='cpu')
    return rotnet_learner(dls, net(norm), augment=augment, **kwargs)

def quiet(learn, fit):
    with data_parallel(learn), learn.no_bar(), learn.no_logging(): fit(learn)
    return learn

def said(learn): return dict(losses=[float(l) for l in learn.recorder.losses], values=[list(map(float, v)) for v in learn.recorder.values], lrs=list(map(float, learn.recorder.lrs)))
def digest(learn): return hashlib.sha256(b''.join(v.numpy().tobytes() for v in learn.model.state_dict().values())).hexdigest()
def note(name, learn): done[name] = dict(said(learn), digest=digest(learn), sum=sum(float(p.double().abs().sum()) for p in learn.model.parameters()))

def curves():
    learn = quiet(rotnet(), lambda l: l.fit_steps(2, .05))
    note('curve', learn)
    assert type(learn.model) is nn.Sequential and len(learn.dls.train) == 215//32 and learn.dls.train.bs == 32
    quiet(learn, lambda l: l.fit_one_cycle(1, .05))  # and again
    note('again', learn)
    note('accumulated', quiet(rotnet(cbs=Accumulate(2)), lambda l: l.fit_steps(2, .05)))
    with data_parallel(learn), learn.no_bar(): done['preds'] = learn.get_preds()[0].tolist()
    try:
        with data_parallel(learn), learn.no_bar(): learn.lr_find(num_it=3, show_plot=False)
    except InputError as e: done['lr_find'] = str(e)
    done['drawn'] = torch.rand(3).tolist()  # each process has its own random state by now

def measures():
    "Measured by all together, and by one alone"
    torch.manual_seed(0)
    dls = image_dls(train.subset(slice(0, 64)), test.subset(slice(0, 101)), bs=32, valid_bs=50, device='cpu')
    learn = simsiam_learner(dls, NIN(8), augment=plain, width=32, monitor=CollapseMonitor(train.thin(100), test.thin(50), probes=dict(twice=lambda a, b: float(a.x.sum() + b.x.sum()))))
    quiet(learn, lambda l: l.fit_cosine(1, constant=(1,)))
    done['simsiam'] = digest(learn)
    with learn.no_bar():
        with data_parallel(learn): shared = learn.validate()
        done['measures'] = [list(map(float, shared)), list(map(float, learn.validate()))]
    binary = Images(train.x[:64], (train.y[:64] > 4).long(), ['no', 'yes'])
    torch.manual_seed(0)
    learn = Learner(DataLoaders(ImageDL(binary, 16, shuffle=True), ImageDL(binary, 25)), nn.Sequential(Normalize(), nn.Flatten(), nn.Linear(3*32*32, 2)), metrics=[accuracy, RocAucBinary()])
    note('auc', quiet(learn, lambda l: l.fit(2, .001)))
    with data_parallel(learn), learn.no_bar(): done['targets'] = learn.get_preds(ds_idx=0)[1].tolist()

def stock():
    "A loader of fastai, whose order comes from Python's generator: another one in each process"
    seen = []
    class Look(Callback):
        def before_batch(self): seen.extend(self.x[:, 0].int().tolist() if self.training else [])
    items = [(torch.full((4,), float(i)), torch.tensor([float(i)])) for i in range(22)]
    learn = Learner(DataLoaders(DataLoader(items, bs=4, shuffle=True), DataLoader(items, bs=5)), nn.Linear(4, 1), nn.MSELoss(), cbs=Look())
    quiet(learn, lambda l: l.fit(2, 1e-4))
    done['stock'] = seen

def resume():
    "Cut off in an epoch, told to stop in an epoch, and never stopped"
    class Cut(Callback):
        def after_step(self):
            if self.epoch == 1 and self.iter == 2: raise KeyboardInterrupt
    augment = nn.Sequential(PadCrop(4), Flip(), Normalize()), Normalize()
    replaced, real = [], os.replace
    os.replace = lambda a, b: (replaced.append(str(b)), real(a, b))
    def fit(name, cbs=(), **kwargs):
        learn = rotnet(norm=True, augment=augment, cbs=cbs)
        try: quiet(learn, lambda l: l.fit_one_cycle(3, .05, cbs=Checkpoint(folder/name, **kwargs)))
        except KeyboardInterrupt: pass
        return learn
    note('whole', fit('whole.ckpt'))
    fit('cut.ckpt', Cut()); torch.rand(100*(1+rank))
    note('cut', fit('cut.ckpt'))
    done['stopped'] = len(fit('told.ckpt', minutes=0).recorder.losses); torch.rand(100)
    note('told', fit('told.ckpt'))
    done['replaced'] = replaced

def wait():
    "What the first process makes, the other finds"
    with first_goes_ahead():
        if is_first(): time.sleep(1); (folder/'kept').write_text('x')
        done['found'] = (folder/'kept').exists()

def lose():
    "The second process dies in the second epoch"
    class Die(Callback):
        def after_step(self):
            if self.epoch == 1 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    quiet(rotnet(cbs=Die()), lambda l: l.fit(100, .01))

for f in what.split(','):
    globals()[f]()
    (folder/f'{rank}of{world}.json').write_text(json.dumps(done))
'''
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port']


@pytest.fixture(scope='module')
def worker(tmp_path_factory):
    path = tmp_path_factory.mktemp('worker')/'worker.py'
    path.write_text(WORKER)
    return path


def run(*args, timeout=100):
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout, env={**env, 'OMP_NUM_THREADS': '1'})


def check(r):
    assert r.returncode == 0, r.stderr[-3000:]
    return r


@pytest.fixture(scope='module')
def alone(worker, tmp_path_factory):
    "What one process says"
    out = tmp_path_factory.mktemp('alone')
    check(run(worker, 'curves,measures,stock', out))
    return json.loads((out/'0of1.json').read_text())


@pytest.fixture(scope='module')
def both(worker, tmp_path_factory):
    "What each of two processes says, started by torchrun, before the second one dies; and how torchrun ended"
    out = tmp_path_factory.mktemp('both')
    r = run(*TORCHRUN, distributed.free_port(), worker, 'wait,curves,measures,stock,resume,lose', out)
    res = [json.loads((out/f'{k}of2.json').read_text()) for k in range(2)]
    assert 'cut' in res[0], r.stderr[-3000:]
    return res + [r]


def near(a, b, eps=1e-5): return torch.allclose(torch.tensor(a), torch.tensor(b), atol=eps, rtol=1e-5)


@pytest.mark.parametrize('fit', ['curve', 'again', 'auc'])
def test_same_curve_as_one_process(alone, both, fit):
    for k in ('losses', 'lrs'): assert near(alone[fit][k], both[0][fit][k]), k
    a, b = (torch.tensor(x[fit]['values']) for x in (alone, both[0]))  # training loss, validation loss, and measures that a last bit can tip
    assert near(a[:, :2].tolist(), b[:, :2].tolist()) and near(a.tolist(), b.tolist(), .02)
    assert abs(alone[fit]['sum'] - both[0][fit]['sum']) < 1e-3


def test_accumulated_gradients(alone, both):
    assert near(alone['accumulated']['losses'], both[0]['accumulated']['losses'])


def test_both_processes_end_with_the_same_net_and_say_the_same(both):
    for fit in ('curve', 'again', 'accumulated', 'auc', 'whole', 'cut', 'told'): assert both[0][fit] == both[1][fit], fit
    assert both[0]['simsiam'] == both[1]['simsiam']  # with BatchNorm's buffers
    assert both[0]['drawn'] != both[1]['drawn']      # but their augmentation differs
    assert 'find the learning rate before' in both[0]['lr_find']


def test_measures_are_those_of_one_process(alone, both):
    for k in range(2):
        shared, single = both[k]['measures']
        assert near(shared, single), (shared, single)
        assert len(both[k]['preds']) == 101 and near(both[k]['preds'], alone['preds'], 1e-3)  # of weights that learned from other sums
        assert len(both[k]['targets']) == 64 and both[k]['targets'] == alone['targets']


def test_a_loader_of_fastai_is_shared_too(alone, both):
    for epoch in range(2):
        parts = [b['stock'][10*epoch:10*epoch+10] for b in both[:2]]
        assert len(set(parts[0] + parts[1])) == 20  # no image twice, and two left out of 22
    assert len(alone['stock']) == 44                # one process drops nothing that its loader does not drop


@pytest.mark.parametrize('how', ['cut', 'told'])
def test_resume_in_the_middle_is_exact(both, how):
    assert both[0][how] == both[0]['whole']
    assert both[0]['stopped'] == 1  # in the middle of an epoch


def test_one_process_writes_and_prints(both):
    assert len(both[0]['replaced']) >= 8 and both[1]['replaced'] == []
    assert [l for l in both[2].stdout.splitlines() if l.startswith('BatchNorm')] == ['BatchNorm averages over 16 images of each process, not over all 32: torch cannot synchronise it on CPUs']


def test_the_first_goes_ahead(both):
    assert both[0]['found'] and both[1]['found']


def test_a_killed_process_ends_the_other_under_torchrun(both):
    r = both[2]
    assert r.returncode != 0 and 'SIGKILL' in r.stderr
    assert distributed.LOST in r.stderr or 'SIGTERM' in r.stderr  # from the other, or torchrun was faster


@pytest.fixture
def calm(monkeypatch): monkeypatch.setenv('PYTHONWARNINGS', 'ignore')  # those of libraries


def test_a_killed_process_ends_the_other_with_one_line(worker, tmp_path, capfd, calm):
    assert launch(2, [worker, 'lose', tmp_path]) == 128+9
    assert capfd.readouterr().err == 'process 2 of 2 was ended by SIGKILL (too little memory?), and so the others; the same command goes on where they were\n'


def test_bad_input_found_by_the_first_while_the_other_waits(tmp_path, capfd, calm):
    (tmp_path/'late.py').write_text("""
import sys
from ssl_nb.data import InputError
from ssl_nb.distributed import first_goes_ahead, is_first, join_processes
join_processes('cpu', timeout=60)
try:
    with first_goes_ahead():
        if is_first(): raise InputError('no images in pictures')
except InputError as e: print(f'command: {e}', file=sys.stderr); sys.exit(2)
""")
    assert launch(2, [tmp_path/'late.py']) == 2
    assert capfd.readouterr().err == 'command: no images in pictures\n'


# Light processes, without torch: what `launch` itself does

def start(tmp_path, code, n=2):
    path = tmp_path/'light.py'
    path.write_text(f'import os, signal, sys, time\nrank = int(os.environ["RANK"])\n{code}')
    return launch(n, [path])


def test_launch_says_things_once(tmp_path, capfd):
    assert start(tmp_path, 'print("out", rank)\nfor line in ("all", "all", f"own {rank}"): print(line, file=sys.stderr)\nsys.stderr.write("\\rbar 10%\\rbar 90%\\r\\n")', 3) == 0
    out, err = capfd.readouterr()
    assert out == 'out 0\n'
    assert sorted(l for l in err.replace('\r', '\n').splitlines() if l.strip()) == ['all', 'all', 'bar 10%', 'bar 90%', 'own 0', 'own 1', 'own 2']


@pytest.mark.parametrize('code,exit,said', [
    ('print("command: no such folder", file=sys.stderr); sys.exit(2)', 2, 'command: no such folder'),
    ('if rank: print("command: broken", file=sys.stderr); sys.exit(2)', 2, 'command: broken'),
    ('if rank: sys.exit(3)', 3, 'process 2 of 2 ended with exit code 3'),
    ('if rank: os.kill(os.getpid(), signal.SIGTERM)', 128+15, 'process 2 of 2 was ended by SIGTERM, and so the others; the same command goes on where they were'),
    (f'if rank: sys.exit(7)\ntime.sleep(.5); print("command: {distributed.LOST}", file=sys.stderr); sys.exit(2)', 7, 'process 2 of 2 ended with exit code 7')])
def test_launch_hands_on_what_was_wrong(tmp_path, capfd, code, exit, said):
    assert start(tmp_path, code) == exit
    assert capfd.readouterr().err == said + '\n'


@pytest.mark.parametrize('ends,exit,said', [('sys.exit(3)', 3, 'process 2 of 2 ended with exit code 3'),
    (f'print("command: {distributed.LOST}", file=sys.stderr); sys.exit(2)', 128+9, 'process 1 of 2 did not answer any more and was ended, and so the others; the same command goes on where they were')])
def test_launch_ends_those_that_hang(tmp_path, monkeypatch, capfd, ends, exit, said):
    monkeypatch.setattr(_wait, '__defaults__', (.5,))
    begun = time.monotonic()
    assert start(tmp_path, f'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: time.sleep(.3); {ends}\ntime.sleep(60)') == exit
    assert capfd.readouterr().err == said + '\n' and time.monotonic() - begun < 10


@pytest.fixture
def listening():
    "Ctrl-C is heard: a shell's background job is born deaf to it"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def test_ctrl_c_waits_for_all(tmp_path, capfd, listening):
    "Each notes Ctrl-C once, and takes the time it needs to save"
    code = f'''
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(1))
if rank == 0: os.kill({os.getpid()}, signal.SIGINT)
while not told: time.sleep(.01)
time.sleep(.3 if rank else .8)
open(f"{tmp_path}/saved{{rank}}", "w").write(str(len(told)))
sys.exit(130)'''
    code = code.replace('if rank == 0:', 'time.sleep(.5)\nif rank == 0:')  # when both listen
    assert start(tmp_path, code) == 130
    assert [(tmp_path/f'saved{k}').read_text() for k in range(2)] == ['1', '1']


def test_nobody_outlives_a_killed_launcher():
    r, w = os.pipe()
    launcher = os.fork()
    if not launcher:  # the launcher: starts a process, and is killed
        if not os.fork():
            distributed.end_with_parent()
            os.write(w, b'.')
            time.sleep(60); os._exit(0)
        os.read(r, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(w)
    os.waitpid(launcher, 0)
    assert select.select([r], [], [], 10)[0] and os.read(r, 1) == b''  # the last writer is gone
    os.close(r)


# Alone

def test_alone_nothing_changes(monkeypatch):
    assert (launched(), is_first(), join_processes()) == (False, True, (0, 1))
    monkeypatch.setenv('RANK', '1')
    assert launched() and not is_first()
    learn = object()
    with data_parallel(learn) as same: assert same is learn


def test_processes_that_do_not_come(monkeypatch):
    for k, v in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=distributed.free_port()).items(): monkeypatch.setenv(k, str(v))
    monkeypatch.setattr(distributed, 'end_with_parent', lambda: None)
    one_line_error(lambda: join_processes('cpu', timeout=1), '2 processes did not all meet within 1 s')


@pytest.mark.parametrize('n,bs,world', [(10, 4, 2), (12, 6, 3), (7, 7, 1), (9, 8, 4)])
def test_shares_make_the_batch(n, bs, world):
    order = torch.randperm(n)
    parts = torch.stack([my_share(order, bs, rank, world).view(n//bs, -1) for rank in range(world)], 1)
    assert torch.equal(parts.flatten(), order[:n//bs*bs])
    assert torch.equal(torch.cat([my_rows(order, rank, world) for rank in range(world)])[:n], order)


def test_a_batch_that_cannot_be_divided(monkeypatch):
    monkeypatch.setattr(distributed, 'which_process', lambda: (0, 2))
    train = cifar10_sample()[0]
    one_line_error(lambda: share_loader(ImageDL(train, 15)), 'a batch of 15 images', 'such as 14')
    assert len(share_loader(ImageDL(train, 16, shuffle=True))) == len(train)//16
    one_line_error(lambda: launch(0), '0 processes')
