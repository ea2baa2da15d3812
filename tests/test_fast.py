"learn.fast(): a step that is noted down once and replayed is the step; `Tape` stands for the CUDA graph where there is no GPU"
import shutil
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.callback.core import Callback
from fastai.callback.hook import ActivationStats
from fastai.callback.progress import CSVLogger
from torch import nn

import ssl_nb.augment as augment
import ssl_nb.gpu.kernels as kernels
from conftest import one_line_error
from ssl_nb.augment import Blur, ColorJitter, Normalize, PadCrop
from ssl_nb.data import Images, cifar10_sample, image_dls
from ssl_nb.device import check_precision
from ssl_nb.fast import *  # `learn.fast`
from ssl_nb.gpu.graph import LiveHypers, Tape
from ssl_nb.learner import ssl_learner, torch_opt
from ssl_nb.nets import nin
from ssl_nb.methods.rotation import Rotation, rotnet_learner
from ssl_nb.schedule import *
from ssl_nb.methods.simsiam import simsiam_learner
from ssl_nb.transfer import transfer_learner
from ssl_nb.checkpoint import Checkpoint

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
TRAIN,TEST = (im.subset(slice(0,n)) for im,n in zip(cifar10_sample(), (200,64)))
NEVER = 10**9  # plain steps before the capture: none is captured


@pytest.fixture
def like_gpu(monkeypatch): monkeypatch.setattr(augment, 'on_gpu', lambda x: True)


def dls(**kwargs): return image_dls(TRAIN, TEST, 40, device='cpu', **kwargs)
def rotation(**kwargs): return rotnet_learner(dls(), nin(width=8), **kwargs)
def siamese(**kwargs): return simsiam_learner(dls(), nin(width=8), width=32, **kwargs)
def finetune(**kwargs): return transfer_learner(nin(width=8), TRAIN, TEST, 2, 'conv', 'finetune', bs=40, device='cpu', **kwargs)
def frozen(**kwargs): return transfer_learner(nin(width=8), TRAIN, TEST, 2, 'nonlinear', 'frozen', bs=40, device='cpu', **kwargs)


def fitted(make, fit, warm=3, cbs=(), replay=True, **kwargs):
    torch.manual_seed(0)
    learn = make(**kwargs)
    if replay:
        learn.fast(record=Tape, say=None)
        learn.fast_step.warm = warm
    learn.add_cbs(cbs)
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn


def same(a, b):
    assert all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert list(map(float, a.recorder.losses)) == list(map(float, b.recorder.losses))
    assert a.recorder.lrs == b.recorder.lrs and a.recorder.values == b.recorder.values


one_cycle = lambda learn: learn.fit_one_cycle(4, .02)
FITS = dict(one_cycle=one_cycle, steps=lambda learn: learn.fit_steps(4, .02, drops=(.3,.6)), cosine=lambda learn: learn.fit_cosine(4, .02, warmup=1))
OPTS = dict(sgd=None, adam=torch_opt(torch.optim.Adam, 1e-4), adamw=torch_opt(torch.optim.AdamW, .05))


@pytest.mark.parametrize('make', [rotation, siamese, finetune, frozen])
@pytest.mark.parametrize('fit,opt', [*((f,'sgd') for f in FITS), ('one_cycle','adam'), ('one_cycle','adamw')])
def test_replayed_steps_are_the_steps(make, fit, opt, like_gpu):
    kwargs = {} if opt == 'sgd' else dict(opt_func=OPTS[opt])
    a = fitted(make, FITS[fit], **kwargs)
    assert (a.fast_step.off, a.fast_step.seen) == (None, 20)
    same(a, fitted(make, FITS[fit], NEVER, **kwargs))


class Double(nn.Module):
    def forward(self, x): return x.double()


def test_a_hundred_steps_with_a_changing_rate():
    "... in double precision, beside fastai's own loop and torch's own optimiser: the same weights"
    def make(opt_func):
        net = nn.Sequential(Double(), nn.Flatten(), nn.Linear(3072, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).double()
        return ssl_learner(dls(), net, nn.CrossEntropyLoss(), opt_func, cbs=[augment.Augment(Normalize(), Normalize()), Rotation()])
    for opt in (None, torch_opt(torch.optim.Adam, 1e-4), torch_opt(torch.optim.AdamW, .05)):
        a,b = (fitted(partial(make, opt), lambda learn: learn.fit_one_cycle(20, .02), replay=f) for f in (True,False))
        assert a.fast_step.seen == 100
        for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()): torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_the_tests_see_a_frozen_rate(monkeypatch):
    "If the rate were a number in the graph, the comparison would fail"
    monkeypatch.setattr(LiveHypers, 'step', lambda self: self.one_step(self.opt))
    with pytest.raises(AssertionError): same(fitted(rotation, one_cycle), fitted(rotation, one_cycle, NEVER))


@pytest.mark.parametrize('tfm', [ColorJitter(), ColorJitter(p=1.), Blur(kernel=5), Blur(p=1., kernel=3)])
def test_what_runs_on_a_gpu_gives_the_same(tfm, monkeypatch):
    x,out = TRAIN.x[:64], []
    for on in (True,False):
        monkeypatch.setattr(augment, 'on_gpu', lambda x: on)
        torch.manual_seed(0)
        out.append(tfm(x))
    torch.testing.assert_close(*out, rtol=0, atol=1e-5)


def test_a_smaller_last_batch_is_a_plain_step():
    make = lambda: transfer_learner(nin(width=8), TRAIN, TEST, 2, 'conv', 'finetune', bs=40, device='cpu')
    def fit(learn):
        learn.dls.train.drop_last,learn.dls.train.n = False, 190
        learn.fit_one_cycle(3, .02)
    a = fitted(make, fit)
    assert len(a.recorder.losses) == 15 and a.fast_step.seen == 12
    b = fitted(make, fit, NEVER)
    same(a, b)


class Spy(Callback):
    "Which events come when, and what there is to see after a batch"
    def before_fit(self): self.seen = []
    def before_epoch(self): self.seen.append('epoch')
    def before_train(self): self.seen.append('train')
    def before_validate(self): self.seen.append('validate')
    def after_batch(self):
        shapes = [tuple(t.shape) for t in (*self.xb, *self.yb, *(self.pred if isinstance(self.pred, tuple) else [self.pred]))]
        self.seen.append((self.training, self.iter, self.train_iter, round(self.pct_train, 6), self.opt.hypers[0]['lr'], shapes, self.loss.ndim))
    def after_fit(self): self.seen.append('over')


@pytest.mark.parametrize('make', [rotation, siamese, finetune])
def test_callbacks_see_the_same(make, like_gpu):
    a,b = (fitted(make, one_cycle, replay=f, cbs=Spy()) for f in (True,False))
    assert a.spy.seen == b.spy.seen
    assert a.recorder.lrs == b.recorder.lrs and a.recorder.iters == b.recorder.iters and len(a.recorder.losses) == len(b.recorder.losses)


def test_fastai_callbacks(tmp_path):
    cbs = [SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=10), TerminateOnNaNCallback(), CSVLogger(tmp_path/'log.csv'), GradientClip(.5)]
    def fit(learn):
        learn.path = tmp_path
        learn.fit_one_cycle(3, .02)
    a = fitted(rotation, fit, cbs=cbs)
    assert (a.fast_step.off, a.fast_step.seen) == (None, 15)
    assert (tmp_path/'models'/'best.pth').exists() and len((tmp_path/'log.csv').read_text().splitlines()) == 4


def test_lr_find(tmp_path):
    def find(learn):
        learn.path = tmp_path
        learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None)
    a,b = (fitted(rotation, find, replay=f) for f in (True,False))
    assert a.fast_step.off is None and a.recorder.lrs == b.recorder.lrs
    torch.testing.assert_close(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('stop_at', [2, 7, 11])
def test_goes_on_where_it_was_cut_off(stop_at, tmp_path):
    whole = fitted(rotation, one_cycle)
    class Stop(Callback):
        order = Checkpoint.order - 1
        def after_batch(self):
            if self.train_iter == stop_at: self.learn.checkpoint.stop = True
    with pytest.raises(KeyboardInterrupt): fitted(rotation, one_cycle, cbs=[Checkpoint(tmp_path/'c'), Stop()])
    same(whole, fitted(rotation, one_cycle, cbs=Checkpoint(tmp_path/'c')))


def test_after_ctrl_c_the_learner_is_whole():
    class Stop(Callback):
        def after_batch(self):
            if self.train_iter == 7: raise KeyboardInterrupt
    torch.manual_seed(0)
    learn = rotation(cbs=Stop()).fast(record=Tape, say=None)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(3, .01)
        learn.remove_cb(Stop)
        assert len(learn.validate()) == 2 and len(learn.get_preds()[0]) == len(TEST)
        learn.fit(2, .01)
    assert learn.fast_step.off is None and learn.fast_step.seen == 10


def test_blocks_that_are_frozen_on_the_way_stay():
    class Freeze(Callback):
        def before_epoch(self):
            if self.epoch == 2:
                self.model[0].requires_grad_(False)
                self.kept = [p.clone() for p in self.model[0].parameters()]
    a = fitted(finetune, one_cycle, cbs=Freeze())
    assert a.fast_step.off is None and all(torch.equal(p, q) for p,q in zip(a.model[0].parameters(), a.freeze.kept))
    same(a, fitted(finetune, one_cycle, NEVER, cbs=Freeze()))


def plain_floats():
    "MixUp mixes floats"
    x = Images(TRAIN.x.float()/255, TRAIN.y, TRAIN.vocab)
    net = nn.Sequential(nin(width=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return ssl_learner(image_dls(x, x, 40, device='cpu'), net, cbs=augment.Augment(nn.Identity(), nn.Identity()))

class Inside(Callback):
    def after_backward(self): pass

class Looks(Callback):
    order = 20
    def before_batch(self): self.mean = self.x.mean()


@pytest.mark.parametrize('cb,said', [(Inside(), 'Inside acts within each step'), (Looks(), 'Looks looks at the batch'), (MixUp(), 'MixUp computes the loss'), (GradientAccumulation(80), 'GradientAccumulation'), (ActivationStats(), 'there are hooks on the model')])
def test_off_and_says_why(cb, said):
    learn = fitted(plain_floats if isinstance(cb, MixUp) else finetune, lambda learn: learn.fit(1, .01), cbs=cb)
    assert said in learn.fast_step.how and learn.fast_step.how.count('no CUDA graph') == 1
    assert len(learn.recorder.losses) == 5


def test_a_step_that_waits():
    class Waits(nn.Module):
        def forward(self, x): return x[x.flatten(1).float().mean(1) >= 0]/255
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn = fitted(rotation, lambda learn: learn.fit(2, .01), augment=(Waits(), Waits()))
    assert 'cannot be captured' in learn.fast_step.off and len(learn.recorder.losses) == 10
    assert sum('fast' in str(m.message) for m in w) == 1


def test_off_on_a_cpu_and_says_so(capsys):
    learn = rotation().fast()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01); learn.fit(1, .01)
    assert capsys.readouterr().out.count('fast: float32, channels last, no CUDA graph (there is no GPU)') == 1
    same(learn, learn)


@pytest.mark.parametrize('views,why', [(lambda r, d: lambda x: r(x).to(d), None), (lambda r, d: lambda x: r(x) + .2, 'other views'), (lambda r, d: lambda x: 1/0, 'fails here: division')])
def test_a_kernel_is_tried_before_it_is_trusted(views, why, monkeypatch):
    "`views` stands for a kernel that was compiled for a GPU"
    monkeypatch.setattr(kernels, 'why_not_fused', lambda recipe, x: '')
    monkeypatch.setattr(kernels, 'FusedViews', views)
    learn = siamese().fast(say=None)
    recipe,before = learn.pairs.augment, torch.get_rng_state()
    learn.fast_step._fuse_views('bf16')
    assert torch.equal(torch.get_rng_state(), before)
    if why: assert why in learn.fast_step.views and learn.pairs.augment is recipe and 'one kernel' not in learn.fast_step.how
    else: assert 'one kernel' in learn.fast_step.how and learn.pairs.augment(TRAIN.x[:2]).dtype == torch.bfloat16


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a compiler')
def test_compiled():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 4))
    def make(): return ssl_learner(dls(), deepcopy(net), nn.CrossEntropyLoss(), cbs=[augment.Augment(Normalize(), Normalize()), Rotation()])
    a,b = (fitted(lambda: make().fast(compile=c, say=None), lambda learn: learn.fit(2, .01), replay=False) for c in (True,False))
    assert a.model._compiled_call_impl is not None and a.model.state_dict().keys() == b.model.state_dict().keys()
    for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_twice_is_once():
    learn = rotation().fast(say=None).fast(say=None)
    assert [type(cb).__name__ for cb in learn.cbs].count('FastStep') == 1


def test_bad_input():
    one_line_error(lambda: rotation().fast('bf8'), "unknown precision 'bf8'", 'bf16, fp16')
    if not torch.cuda.is_available(): one_line_error(lambda: rotation().fast('fp16'), 'fp16 is not for this device (cpu)')


def on_gpu(method, precision, warm, **kwargs):
    torch.manual_seed(0)
    loaders = image_dls(TRAIN, TEST, 40, device='cuda')
    learn = rotnet_learner(loaders, nin(width=16)) if method == 'rotation' else simsiam_learner(loaders, nin(width=16), width=32)
    learn.fast(precision, say=None, **kwargs).fast_step.warm = warm
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(20, .02)
    return learn


@cuda
@pytest.mark.parametrize('method', ['rotation','simsiam'])
@pytest.mark.parametrize('precision', ['float32','auto'])
def test_graph_on_a_gpu(method, precision):
    "A hundred steps with a changing rate: those from the graph are those that were never captured, and so is the plain loop at first"
    graph,never,plain = on_gpu(method, precision, 3), on_gpu(method, precision, NEVER), on_gpu(method, precision, 3, graph=False)
    if 'fp16' not in graph.fast_step.how: assert graph.fast_step.off is None and graph.fast_step.seen == 100
    a,b,c = (torch.stack([torch.as_tensor(l).float().cpu() for l in learn.recorder.losses]) for learn in (graph,never,plain))
    torch.testing.assert_close(a[:20], b[:20], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(a, b, rtol=.1, atol=.02)
    torch.testing.assert_close(a[:20], c[:20], rtol=5e-2, atol=1e-2)


@cuda
def test_after_a_capture_that_breaks_off():
    "The draws, the stream and the weights are those of plain steps"
    class Waits(nn.Module):
        def forward(self, x): return Normalize().to(x.device)(x)*(1 if x.float().mean().item() >= 0 else 2)
    torch.manual_seed(0)
    learn = rotnet_learner(image_dls(TRAIN, TEST, 40, device='cuda'), nin(width=16), augment=(nn.Sequential(PadCrop(), Waits()), Normalize())).fast(say=None)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(): warnings.simplefilter('ignore'); learn.fit(3, .01)
    assert 'cannot be captured' in learn.fast_step.how and len(learn.recorder.losses) == 15
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and all(torch.as_tensor(l).isfinite() for l in learn.recorder.losses)
