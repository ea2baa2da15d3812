"Memory that is kept, and precision that is measured"
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner
from torch import nn

from conftest import one_line_error
from ssl_nb import device, fast
from ssl_nb.augment import Augment, Normalize
from ssl_nb.data import cifar10_sample, image_dls
from ssl_nb.device import CpuBf16, KeepMemory, bf16_units, check_precision
from ssl_nb.heads import linear_head
from ssl_nb.method import method_names
from ssl_nb.nets import NIN, feature_shape
from ssl_nb.methods.rotation import rotnet_learner
from ssl_nb.methods.simsiam import simsiam_learner
from ssl_nb.checkpoint import Checkpoint, read_checkpoint

TRAIN,TEST = cifar10_sample()
FEW,QUIZ = TRAIN.subset(slice(0,160)), TEST.subset(slice(0,40))

def rotation(seed=0, **kwargs):
    torch.manual_seed(seed)
    return rotnet_learner(image_dls(FEW.unlabelled(), QUIZ, 16, device='cpu'), NIN(width=16), **kwargs)

def siamese():
    torch.manual_seed(0)
    return simsiam_learner(image_dls(FEW.unlabelled(), QUIZ.unlabelled(), 16, device='cpu'), NIN(width=8), width=32, lr=.02)

def quietly(learn, fit=lambda l: l.fit(1, .02)):
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn

@pytest.fixture
def timed(monkeypatch):
    "A CPU with units for bf16, whose gain the test decides"
    monkeypatch.delenv('SSL_NB_PRECISION', raising=False)
    monkeypatch.setattr(device, 'bf16_units', lambda: ['amx_bf16'])
    def gain(g): monkeypatch.setattr(fast, 'trial_steps', lambda learn, precision: [g if precision == 'float32' else 1.])
    fast._TIMED.clear()
    yield gain
    fast._TIMED.clear()


def test_importing_the_package_leaves_the_allocator_alone_and_a_fit_does_not():
    code = '''
import ssl_nb.cli, ssl_nb.runs, ssl_nb.studies.runner
from ssl_nb.device import keep_memory, machine
assert not keep_memory.cache_info().currsize and machine('cpu')['allocator'] == 'system'
from test_device import quietly, rotation
quietly(rotation())
print(keep_memory.cache_info().currsize, machine('cpu')['allocator'])
'''
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.split() in (['1','kept'], ['1','system'])

def test_memory_is_kept_from_the_second_step_on(monkeypatch):
    steps = []
    monkeypatch.setattr(device, 'keep_memory', lambda: steps.append(learn.train_iter))
    learn = rotation()
    quietly(learn, lambda l: l.fit(2, .02))
    quietly(learn)
    assert steps == [1, 1]  # at the end of the first step of each fit

def test_the_command_line_is_quick_to_answer():
    "No torch for `--help`, and none to say that an argument is wrong"
    code = "import sys; from ssl_nb import cli; assert not {'torch','fastai','matplotlib','numpy'} & sys.modules.keys(), sorted(sys.modules)"
    assert not subprocess.run([sys.executable, '-c', code]).returncode

@pytest.mark.parametrize('args', [['--help'], ['photos', '--method', 'magic']], ids=['help', 'unknown'])
def test_methods_are_named_without_torch(args):
    command = Path(sys.executable).with_name('ssl_pretrain')
    r = subprocess.run([sys.executable, '-X', 'importtime', command, *args], capture_output=True, text=True)
    imports = [l.rpartition('|')[2].strip() for l in r.stderr.splitlines() if l.startswith('import time:')]
    assert 'ssl_nb.method' in imports and 'torch' not in imports and 'ssl_nb.data' not in imports
    said = ' '.join(w for l in (r.stdout + r.stderr).splitlines() if not l.startswith('import time:') for w in l.split())
    assert r.returncode == (0 if args == ['--help'] else 2) and ', '.join(method_names()) in said, said

@pytest.mark.parametrize('make', [rotation, siamese])
@pytest.mark.parametrize('gain', [.5, 1.05, 1.5])
def test_the_faster_precision_is_taken(make, gain, timed):
    timed(gain)
    learn = make().fast(say=None)
    assert learn.precision == ('bf16' if gain > 1.1 else 'float32')
    assert any(isinstance(cb, CpuBf16) for cb in learn.cbs) == (learn.precision == 'bf16')
    quietly(learn)
    assert learn.fast_step.how.startswith(f'{learn.precision} (bf16 was {gain:.1f} times as fast as float32)')
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32} and all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert {s.dtype for st in learn.opt.opt.state.values() for s in st.values() if isinstance(s, torch.Tensor)} == {torch.float32}

@pytest.mark.parametrize('make', [rotation, siamese])
def test_trial_steps_leave_no_trace(make, monkeypatch, tmp_path):
    "Weights, random numbers, callbacks and files are as before"
    learn = make()
    learn.add_cb(Checkpoint(tmp_path/'c.ckpt'))
    before,dice = {k: v.clone() for k,v in learn.model.state_dict().items()}, torch.get_rng_state()
    with fast._same_dice(): secs = [fast.trial_steps(learn, p, n=3) for p in ('float32','bf16')]
    assert [len(s) for s in secs] == [2,2] and all(t > 0 for s in secs for t in s)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and torch.equal(torch.get_rng_state(), dice)
    assert not list(tmp_path.iterdir()) and not any(isinstance(cb, MixedPrecision) for cb in learn.cbs)
    assert all(p.grad is None for p in learn.model.parameters())

def test_a_plain_learner_of_fastai(timed):
    "The callback by itself, and `fast()`"
    timed(2.)
    def make():
        torch.manual_seed(0)
        trunk = NIN(width=16)
        return Learner(image_dls(FEW, QUIZ, 16, device='cpu'), nn.Sequential(trunk, linear_head(feature_shape(trunk), 10)),
                       lr=.01, cbs=Augment(Normalize(), Normalize()))
    a,b,c = (quietly(l) for l in (make(), make().fast(say=None), make().add_cb(CpuBf16())))
    assert b.precision == 'bf16' and {l.dtype for l in b.recorder.losses + c.recorder.losses} == {torch.float32}
    assert abs(float(a.recorder.losses[0]) - float(c.recorder.losses[0])) < .05  # the first loss is the same, but for rounding
    assert float(a.recorder.losses[0]) != float(c.recorder.losses[0])

def test_loaders_without_a_device(monkeypatch):
    "torch's own: where the model is decides, and steps can be tried all the same"
    from fastai.data.core import DataLoaders
    monkeypatch.delenv('SSL_NB_PRECISION', raising=False)
    monkeypatch.setattr(device, 'bf16_units', lambda: ['amx_bf16'])
    fast._TIMED.clear()
    data = torch.utils.data.TensorDataset(FEW.x.float()/255, FEW.y)
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, 16) for _ in range(2)))
    assert getattr(dls, 'device', None) is None
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = Learner(dls, net, nn.CrossEntropyLoss(), lr=.01).fast(say=None)
    assert learn.precision in ('float32','bf16') and 'times as fast' in learn.fast_step.why
    quietly(learn)

def test_a_fit_that_was_cut_off_resumes_in_its_precision(timed, tmp_path):
    from ssl_nb.studies.runner import Place, fit_run
    class Cut(Exception): pass
    from fastai.callback.core import Callback
    class Stop(Callback):
        order = Checkpoint.order + 5
        def after_epoch(self): raise Cut('here')
    place = Place(tmp_path, 'cpu')
    run = dict(run='r', name='r', seed=0, data={}, config=dict(epochs=2, lr=.02))
    timed(2.)
    learn = rotation(cbs=Stop())
    with pytest.raises(Cut): fit_run(learn, run, place)
    assert read_checkpoint(place.checkpoint('r'))['config'].count('bf16')
    fast._TIMED.clear(); timed(.5)  # another day
    assert fit_run(rotation(), run, place).precision == 'bf16'
    (tmp_path/'other').mkdir()
    assert fit_run(rotation(), run, Place(tmp_path/'other', 'cpu')).precision == 'float32'

def test_what_a_cpu_cannot_do(monkeypatch):
    monkeypatch.delenv('SSL_NB_PRECISION', raising=False)
    monkeypatch.setattr(device, 'bf16_units', lambda: [])
    assert check_precision('auto', 'cpu') == 'float32'
    with pytest.warns(UserWarning, match='emulates it'): assert check_precision('bf16', 'cpu') == 'bf16'
    one_line_error(lambda: check_precision('fp16', 'cpu'), 'fp16 is not for this device (cpu)', 'choose auto or float32')
    monkeypatch.setattr(device, 'bf16_units', lambda: ['avx512_bf16'])
    assert check_precision('auto', 'cpu') == 'auto'
    monkeypatch.setenv('SSL_NB_PRECISION', 'float32')
    assert check_precision('auto', 'cpu') == 'float32' and check_precision('bf16', 'cpu') == 'bf16'

def test_processors_of_other_makes(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=True, avx512_bf16=False, cpu_name='x'), raising=False)
    assert bf16_units.__wrapped__() == ['amx_bf16']
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert set(bf16_units.__wrapped__()) <= {'amx_bf16','avx512_bf16','bf16'}

def test_no_step_can_be_tried(timed, monkeypatch):
    "A net that bf16 does not suit, or a loader that nothing is known of, trains in float32 and says why"
    def broken(learn, precision): raise RuntimeError('no kernel\nfor this')
    monkeypatch.setattr(fast, 'trial_steps', broken)
    learn = rotation().fast(say=None)
    assert learn.precision == 'float32' and learn.fast_step.why == 'bf16 could not be tried: no kernel'

def test_keep_memory_is_a_callback_of_every_learner(): assert any(isinstance(cb, KeepMemory) for cb in rotation().cbs)
