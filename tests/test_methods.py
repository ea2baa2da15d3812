"Every method of the register, by the same questions: does it learn, resume, share its work, go out, run fast, and say what it is?"
import json
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.core import Callback
from fastcore.basics import noop
from torch import nn

import ssl_nb.augment as augment
import ssl_nb.fast  # `learn.fast`
from ssl_nb.augment import CIFAR10_STATS, Normalize
from ssl_nb.data import cifar10_sample, image_dls
from ssl_nb.distributed import data_parallel
from ssl_nb.launch import launch
from ssl_nb.export import export_weights
from ssl_nb.gpu.graph import Tape
from ssl_nb.method import get_method, method_names
from ssl_nb.neighbours import knn_accuracy, pool
from ssl_nb.nets import NIN, Trunk
from ssl_nb.siamese import Accumulate, CollapseMonitor
from ssl_nb.checkpoint import Checkpoint

NAMES = method_names()
TRAIN, TEST = cifar10_sample()
every_method = pytest.mark.parametrize('name', NAMES)


def learner(name, n=48, bs=8, trunk=None, seed=0, plain=False, **kwargs):
    "The registered learner, as runs make it"
    m = get_method(name)
    torch.manual_seed(seed)
    dls = image_dls(TRAIN.subset(slice(0, n)).unlabelled(), TEST.subset(slice(0, 24)).unlabelled(), bs=bs, device='cpu')
    pair = (Normalize(), Normalize()) if plain else m.augment(32, CIFAR10_STATS)
    return m.learner(dls, trunk or NIN(8), size=32, augment=pair, lr=m.rate(bs), **kwargs)


def fit(name, learn, epochs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        get_method(name).fit(learn, epochs)
    return learn


def kept(name, learn):
    "The trunk that is kept, ready to measure"
    return get_method(name).trunk(learn.model).eval()


def same(a, b):
    for (k, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.equal(x, y), k
    assert list(map(float, a.recorder.losses)) == list(map(float, b.recorder.losses)) and a.recorder.lrs == b.recorder.lrs
    assert [list(map(str, v)) for v in a.recorder.values] == [list(map(str, v)) for v in b.recorder.values]  # as words: nan is no number


# It learns

@torch.no_grad()
def knn(name, trunk):
    "Share of ten classes that the features of its best block tell right, each part of the images with BatchNorm's statistics of the batch"
    body, norm = trunk.upto(get_method(name).block(len(trunk.blocks))).train(), get_method(name).augment(32, CIFAR10_STATS)[1]
    feats = [type(im)(torch.cat([pool(body(norm(x))) for x in im.x.split(250)]), im.y) for im in (TRAIN.subset(slice(0, 2000)), TEST)]
    return knn_accuracy(*feats, k=20)


@every_method
def test_it_beats_random_weights(name):
    torch.manual_seed(0)
    trunk = NIN(32)
    before = knn(name, trunk)
    learn = fit(name, learner(name, 1000, 32, trunk), 4 if get_method(name).views else 2)  # four turns of each image are twice the work
    assert knn(name, kept(name, learn)) > before + .01


# It resumes

class Stop(Callback):
    "Tell the checkpoint to stop after some batches"
    def __init__(self, epoch, batch): self.at = epoch, batch
    def after_step(self): self.learn.checkpoint.stop = self.learn.checkpoint.stop or (self.epoch, self.iter) >= self.at
    def after_cancel_batch(self): self.after_step()


@every_method
@pytest.mark.parametrize('together', [1, 2])
def test_it_resumes_bit_for_bit(name, together, tmp_path):
    "... in the middle of an epoch, and of what is accumulated for a step"
    def once(*cbs, **kwargs):
        learn = learner(name, cbs=[*cbs, *([Accumulate(together)] if together > 1 else [])])
        try: fit(name, learn.add_cb(Checkpoint(tmp_path/'a.ckpt', **kwargs)), 3)
        except KeyboardInterrupt: pass
        return learn
    whole = once()
    (tmp_path/'a.ckpt').unlink()
    assert len(once(minutes=0).recorder.losses) == 1
    assert len(once(Stop(1, 2)).recorder.losses) == 9  # with those of the first session
    torch.rand(100)
    same(whole, once())


# One process equals two

class Halves(nn.Module):
    "Two views of each image that are the same in every process: as it is, and mirrored"
    def __init__(self): super().__init__(); self.norm = Normalize()
    def forward(self, x): a, b = x.chunk(2); return self.norm(torch.cat([a, b.flip(-1)]))


def without_batchnorm(net):
    for name, m in net.named_children():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): setattr(net, name, nn.Identity())
        else: without_batchnorm(m)


def shared_fit(name):
    "What a fit of a few steps without BatchNorm says, by however many processes"
    torch.manual_seed(0)
    trunk = Trunk(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(4, b), nn.ReLU()) for a, b in ((3, 8), (8, 16))))
    learn = learner(name, trunk=trunk, plain=True)
    without_batchnorm(learn.model)
    if hasattr(learn, 'pairs'): learn.pairs.augment = Halves()
    with data_parallel(learn): fit(name, learn, 2)
    return dict(losses=list(map(float, learn.recorder.losses)), values=[[float(x) for x in v[:2]] for v in learn.recorder.values],
                weights=[float(p.detach().double().norm()) for p in learn.model.parameters()])


WORKER = '''
import json, sys, warnings
warnings.simplefilter('ignore')
from pathlib import Path
from ssl_nb.distributed import join_processes
rank, world = join_processes(timeout=60)
sys.path.insert(0, sys.argv[1])
from test_methods import NAMES, shared_fit
done = {name: shared_fit(name) for name in NAMES}
(Path(sys.argv[2])/f'{rank}of{world}.json').write_text(json.dumps(done))
'''


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What each of two processes says of every method"
    at = tmp_path_factory.mktemp('both')
    (at/'worker.py').write_text(WORKER)
    assert launch(2, [at/'worker.py', Path(__file__).parent, at]) == 0
    return [json.loads((at/f'{k}of2.json').read_text()) for k in range(2)]


@every_method
def test_one_process_equals_two(name, both):
    alone = shared_fit(name)
    assert both[0][name] == both[1][name]
    for k, v in alone.items(): assert torch.allclose(torch.tensor(v), torch.tensor(both[0][name][k]), atol=1e-5, rtol=1e-4), k
    assert len(set(alone['losses'])) > 6  # it learned


# It goes out

@every_method
def test_exported_features_are_equal(name, tmp_path):
    learn = fit(name, learner(name), 1)
    trunk, x = kept(name, learn).to(memory_format=torch.contiguous_format), torch.randn(4, 3, 32, 32)
    lines, names = export_weights(trunk, tmp_path/'w.safetensors'), {}
    exec(lines, names)
    with torch.no_grad():
        assert torch.equal(names['m'](x), pool(trunk(x)))
        if get_method(name).views: assert torch.equal(learn.model.eval()(x), pool(trunk(x)))
    assert not torch.allclose(next(trunk.parameters()), next(NIN(8).parameters()))


# It runs fast

@every_method
def test_fast_says_what_it_can_do_and_trains(name, monkeypatch):
    said = []
    learn = fit(name, learner(name).fast('float32', say=said.append), 1)
    assert said == ['fast: float32, channels last, no CUDA graph (there is no GPU)']
    monkeypatch.setattr(augment, 'on_gpu', lambda x: True)  # as on a GPU, with a tape in the place of its graph
    def taped(warm):
        learn = learner(name).fast('float32', record=Tape, say=said.append)
        learn.fast_step.warm = warm
        return fit(name, learn, 2)
    a, b = taped(3), taped(10**9)
    assert 'the whole step as a graph' in said[-1] and (a.fast_step.off, a.fast_step.seen) == (None, 12)
    same(a, b)


# It says what it is

@every_method
def test_what_it_says_of_itself(name):
    m = get_method(name)
    assert m.name == name and m.source and m.lr > 0 and set(m.bs) >= {'cpu', 'cuda'}
    assert type(m.learner).__name__ == 'function' and m.learner.__module__ == f'ssl_nb.methods.{name}'
    assert all(1 <= m.block(n) <= n for n in range(1, 13))
    assert m.rate(2*(m.lr_per or 1)) == (2*m.lr if m.lr_per else m.lr)
    for x in m.augment(48, CIFAR10_STATS): assert x(TRAIN.x[:4]).shape[0] == 4


@every_method
def test_its_picture_draws_and_its_curves_are_drawn_of_what_is_there(name):
    m = get_method(name)
    drawn = m.picture(TRAIN.subset(slice(0, 4)), m.augment(32, CIFAR10_STATS))
    assert drawn is not None
    plt.close('all')
    monitor = dict(monitor=CollapseMonitor(TRAIN.subset(slice(0, 40)), TEST.subset(slice(0, 20)))) if m.views else {}
    learn = fit(name, learner(name, **monitor), 1)
    assert set(m.curves) <= set(learn.recorder.metric_names) and m.curves
    assert isinstance(m.trunk(learn.model), NIN)


@every_method
def test_features_of_plain_images(name):
    "`get_preds` gives one row an image; with views, the trunk's pooled features"
    learn = fit(name, learner(name), 1)
    with learn.no_bar(): feats, _ = learn.get_preds(act=noop)
    assert len(feats) == 24
    norm = get_method(name).augment(32, CIFAR10_STATS)[1]
    with torch.no_grad(): want = pool(kept(name, learn)(norm(TEST.x[:24])))
    if get_method(name).views: assert torch.allclose(feats, want, atol=1e-4)
