"learn.fast() at its edges: callbacks that keep things or come in between, fits that were cut off, steps that cannot be captured"
import copy
import warnings

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from torch import nn

import ssl_nb.gpu.kernels as kernels
from ssl_nb.augment import Augment, Normalize
from ssl_nb.data import cifar10_sample, image_dls
from ssl_nb.fast import FastStep
from ssl_nb.gpu.graph import Tape
from ssl_nb.gpu.step import Stage
from ssl_nb.learner import sgd, ssl_learner, torch_opt
from ssl_nb.nets import nin
from ssl_nb.methods.rotation import Rotation, rotate, rotnet_learner

TRAIN,TEST = (im.subset(slice(0,n)) for im,n in zip(cifar10_sample(), (200,64)))
NEVER = 10**9


def dls(device='cpu'): return image_dls(TRAIN, TEST, 40, device=device)
def rotation(**kwargs): return rotnet_learner(dls(), nin(width=8), **kwargs)
def small(*cbs, net=None, **kwargs): return ssl_learner(dls(), net or nn.Sequential(nn.Flatten(), nn.Linear(3072,10)), nn.CrossEntropyLoss(), cbs=cbs, **kwargs)
def fit(learn, f=lambda learn: learn.fit(2, .01)):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(): warnings.simplefilter('ignore'); f(learn)
    return learn
def norm(): return Augment(Normalize(), Normalize())
def fast(learn, warm=3): learn.fast(record=Tape, say=None).fast_step.warm = warm; return learn
def same(a, b): assert all(torch.allclose(p, q, atol=1e-6) for p,q in zip(a.model.parameters(), b.model.parameters()))


class Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x*1
    @staticmethod
    def backward(ctx, g): g.sum().item(); return g

class WaitsBack(nn.Module):
    def forward(self, x): return Waits.apply(x)

def test_a_capture_that_breaks_off_in_the_backward_pass_leaves_no_gradients():
    def run(warm):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072,4,bias=False), WaitsBack(), nn.Linear(4,10))
        return fit(fast(small(norm(), net=net, opt_func=sgd(0., 0., False)), warm))
    a = run(2)
    assert 'cannot be captured' in a.fast_step.off
    same(a, run(NEVER))


def test_what_callbacks_keep_stays():
    class Keep(Callback):
        def before_fit(self): self.kept = []
        def after_batch(self):
            if self.training: self.kept.append((self.pred, self.xb[0], self.yb[0]))
    learn = fit(fast(rotation(cbs=Keep())))
    for i in (0,1): assert len({float(k[i].detach().sum()) for k in learn.keep.kept}) == 10


class Stop(Callback):
    def after_batch(self):
        if self.train_iter == 6: raise KeyboardInterrupt

@pytest.mark.parametrize('then', [lambda l: l.fast(graph=False, say=None).validate(), lambda l: fit(l.remove_cb(FastStep)), lambda l: l.export('x.pkl')])
@pytest.mark.parametrize('how', ['ctrl-c','lr_find'])
def test_after_a_fit_that_was_cut_off(then, how, tmp_path):
    learn = fast(rotation()); learn.path = tmp_path
    if how == 'lr_find': fit(learn, lambda l: l.lr_find(num_it=8, show_plot=False, suggest_funcs=None))
    else:
        learn.add_cb(Stop())
        with pytest.raises(KeyboardInterrupt): fit(learn)
        learn.remove_cb(Stop)
    with learn.no_bar(), learn.no_logging(): then(learn)
    assert all(cb.run_train for cb in learn.cbs if isinstance(cb, (Augment,Rotation)))


def test_uneven_steps_of_adam():
    def run(warm):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072,8), nn.Linear(8,10)); net[1].requires_grad_(False)
        learn = fast(small(norm(), Thaw(), net=net, opt_func=torch_opt(torch.optim.Adam), splitter=lambda m: list(m.parameters())), warm)
        return fit(learn, lambda l: l.fit(8, 1e-3))
    class Thaw(Callback):
        def before_epoch(self):
            if self.epoch == 6: self.model[1].requires_grad_(True)
    a = run(3)
    assert 'different numbers of steps' in a.fast_step.how


@pytest.mark.parametrize('opt', [sgd(), torch_opt(torch.optim.Adam)])
def test_an_optimiser_that_is_loaded_on_the_way(opt):
    class Load(Callback):
        def after_epoch(self):
            if self.epoch == 0: self.old = copy.deepcopy(self.opt.opt.state_dict())
            if self.epoch == 1: self.opt.opt.load_state_dict(self.old)
    def run(warm): torch.manual_seed(0); return fit(fast(small(norm(), Load(), opt_func=opt), warm), lambda l: l.fit(4, .01))
    same(run(2), run(NEVER))


class Mine(Rotation):
    def before_fit(self): self.n = 0
    def after_batch(self): self.n += self.training

class Stronger(Augment):
    def before_batch(self):
        super().before_batch()
        if self.training: self.learn.xb = (self.xb[0]*(1+self.epoch),)

class Look(Callback):
    def before_fit(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append(round(float(self.xb[0].abs().mean()), 3))

def test_subclasses_of_ours_are_heard():
    assert fit(fast(small(norm(), Mine(), net=nn.Sequential(nn.Flatten(), nn.Linear(3072,4))))).mine.n == 10
    out = []
    for f in (fast, lambda l: l):
        torch.manual_seed(0)
        out.append(fit(f(small(Stronger(Normalize(), Normalize()), Look())), lambda l: l.fit(3, .01)).look.seen)
    assert out[0] == out[1]


@pytest.mark.parametrize('order', [0, Augment.order])
def test_callbacks_before_and_beside_the_augmentation(order):
    class Halve(Callback):
        def before_batch(self):
            if self.training: self.learn.xb = (self.xb[0].float()/255,)
    Halve.order = order
    out = []
    for f in (fast, lambda l: l):
        torch.manual_seed(0)
        learn = fit(f(small(norm(), Halve(), Look())))
        out.append(learn.look.seen)
        if f is fast: assert (learn.fast_step.seen == 10) == ('whole step as a graph' in learn.fast_step.how)
    assert out[0] == out[1]


def test_an_old_autograd_graph_is_let_go():
    alive = []
    class Spy(Tape):
        def warm(self, step):
            def model_sees(*_): alive.append(any(getattr(getattr(learn, k, None), 'grad_fn', None) is not None for k in ('pred','loss','loss_grad')))
            old = learn.model.forward
            learn.model.forward = lambda *x: (model_sees(), old(*x))[1]
            try: step()
            finally: del learn.model.forward
    learn = fit(rotation(), lambda l: l.lr_find(num_it=5, show_plot=False, suggest_funcs=None))
    learn.fast(record=Spy, say=None)
    fit(learn)
    assert alive == [False]*3


def test_how_is_true_before_and_after():
    learn = rotation().fast(say=None)
    assert 'whole step' not in learn.fast_step.how
    fit(learn)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert 'there is no GPU' in learn.fast_step.how


def test_back_to_full_precision(monkeypatch):
    monkeypatch.setattr(kernels, 'why_not_fused', lambda *args: 'no GPU')
    learn = fast(rotation())
    learn.augment.train_tfms = kernels.FusedViews(learn.augment.train_tfms, torch.bfloat16)
    assert len(fit(learn.to_fp32()).recorder.losses) == 10


def test_the_optimiser_is_made_where_the_weights_will_be():
    seen = []
    def opt_func(params, lr): seen.extend({p.device.type for g in params for p in ([g] if isinstance(g, torch.Tensor) else g)}); raise StopIteration
    with pytest.raises(StopIteration): fit(ssl_learner(dls('meta'), nn.Linear(3,10), nn.CrossEntropyLoss(), opt_func))
    assert seen == ['meta']


def test_foreach_is_not_fused():
    class OnGpu(nn.Parameter): is_cuda = True
    assert torch_opt(torch.optim.Adam, foreach=True)([OnGpu(torch.zeros(3))], .1)


def test_eighths_copy_nothing_to_the_device():
    import torchvision.transforms.functional as TF
    from torch.utils._python_dispatch import TorchDispatchMode
    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten.lift_fresh.default
            return func(*args, **(kwargs or {}))
    x = torch.rand(2,3,32,32)
    with Look(): y = rotate(x, 8)
    at = torch.linspace(-1, 1, 32); inside = (at**2 + at[:,None]**2 <= 1)
    torch.testing.assert_close(y[2:4], inside*TF.rotate(x, 45, TF.InterpolationMode.BILINEAR), rtol=0, atol=1e-5)


def test_the_stages_of_a_fit():
    "... in the words of `Stage`: warm, captured, warm again when the step is another, plain where there is a reason, idle when it is over"
    class Stages(Callback):
        def before_fit(self): self.seen = [self.learn.fast_step.stage.name]
        def before_epoch(self):
            if self.epoch == 1: self.model[1].weight.requires_grad_(False)
            if self.epoch == 2: self.opt.opt.param_groups[0]['weight_decay'] = .1
        def after_batch(self):
            if self.training: self.seen.append(self.learn.fast_step.stage.name)
    learn = fit(fast(small(norm(), Stages()), warm=2), lambda l: l.fit(4, .01))
    assert learn.stages.seen == ['IDLE', *['WARMING']*2, *['CAPTURED']*3, *['WARMING']*2, *['CAPTURED']*3, *['PLAIN']*10]
    assert learn.fast_step.stage is Stage.IDLE and 'weight_decay' in learn.fast_step.how
    fit(learn, lambda l: l.fit(1, .01))
    assert learn.fast_step.off is None and learn.stages.seen[1:] == [*['WARMING']*2, *['CAPTURED']*3]  # the next fit begins anew


def test_a_validation_within_an_epoch_takes_nothing_from_the_steps():
    "Such a callback puts the Learner back into training, and the step goes on with its parts"
    class Look(Callback):
        def before_fit(self):
            if not hasattr(self, 'seen'): self.seen = []
        def after_batch(self):
            if not self.training: return
            self.seen.append(len(self.yb))  # labels of the rotation: a part of the step
            if self.train_iter != 3: return
            dl,it,epochs = self.learn.dl, self.learn.iter, self.learn.n_epoch
            self.learn.validate()
            self.learn.dl,self.learn.iter,self.learn.training,self.learn.n_epoch = dl, it, True, epochs
            self.model.train()
    learn = fit(fast(rotation(cbs=Look())), lambda l: l.fit(1, .01))
    assert learn.look.seen == [1]*5
