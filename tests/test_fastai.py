"A fastai user's way: the callbacks in a plain `Learner`, with fastai's own loaders and fastai's own callbacks"
import importlib
import math
import pkgutil
import random
import sys
import warnings
from contextlib import contextmanager
from copy import deepcopy

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize as FastaiNormalize
from fastai.data.transforms import RandomSplitter, get_image_files
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fastcore.basics import noop
from PIL import Image
from torch import nn
from torchvision.utils import save_image

import ssl_nb
from ssl_nb.augment import CIFAR10_STATS, Augment, Normalize, crop_augment, view_augment
from ssl_nb.data import ImageDL, Images, cifar10_sample, image_dls
from ssl_nb.heads import linear_head, predictor, projector
from ssl_nb.learner import LazyProgressCallback, OnDevice, sgd, ssl_learner
from ssl_nb.nets import NIN, feature_shape
from ssl_nb.methods.rotation import Rotation, rotate4, rotation_accuracy, rotation_labels, rotnet_learner
from ssl_nb.schedule import *
from ssl_nb.methods.simsiam import SimSiam, simsiam_learner, simsiam_loss
from ssl_nb.siamese import Accumulate, CollapseMonitor, Pairs
from ssl_nb.transfer import Frozen
from ssl_nb.checkpoint import Checkpoint
from ssl_nb.weights import load_weights, save_weights

TRAIN, TEST = cifar10_sample()
NORM = Normalize()
TASKS = 'rotation', 'pairs'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The first 80 images as files, in a folder for each class"
    root = tmp_path_factory.mktemp('images')
    for k in range(80):
        path = root/TRAIN.vocab[TRAIN.y[k]]/f'{k:03}.png'
        path.parent.mkdir(exist_ok=True)
        save_image(TRAIN.x[k]/255, path)
    return root


def unlabelled(folder, bs=16, **kwargs):
    block = DataBlock(blocks=ImageBlock, get_items=get_image_files, splitter=RandomSplitter(.25, seed=0), item_tfms=Resize(32), **kwargs)
    return block.dataloaders(folder, bs=bs, num_workers=0, device='cpu')


def labelled(folder, bs=16, **kwargs):
    return ImageDataLoaders.from_folder(folder, valid_pct=.25, seed=0, item_tfms=Resize(32), bs=bs, num_workers=0, device='cpu', **kwargs)


def augmented(folder): return labelled(folder, batch_tfms=aug_transforms(size=32, min_scale=.75))


LOADERS = unlabelled, labelled, augmented
TWO = unlabelled, augmented


def learner(task, dls, cbs=(), seed=0, **kwargs):
    "A plain `Learner` for one of the two tasks, as a reader of fastai's documentation would make it"
    torch.manual_seed(seed)
    trunk = NIN(16)
    if task == 'rotation':
        model = nn.Sequential(trunk, linear_head(feature_shape(trunk), 4))
        return Learner(dls, model, CrossEntropyLossFlat(), metrics=rotation_accuracy, cbs=[Augment(*crop_augment()), Rotation(), *cbs], **kwargs)
    monitor = CollapseMonitor()
    model = SimSiam(trunk, projector(16, 32), predictor(32))
    return Learner(dls, model, simsiam_loss, metrics=monitor.metrics, cbs=[Pairs(*view_augment(32), simsiam_loss), monitor, *cbs], **kwargs)


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'collapse')
        yield learn


def fit(learn, n=1, lr=1e-2, **kwargs):
    with quiet(learn): learn.fit(n, lr, **kwargs)
    return learn


def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def column(learn, name): return [v[list(learn.recorder.metric_names[1:]).index(name)] for v in learn.recorder.values]


@pytest.mark.parametrize('loaders', LOADERS)
@pytest.mark.parametrize('task', TASKS)
def test_fit_one_cycle_on_fastais_loaders(task, loaders, folder):
    learn = learner(task, loaders(folder))
    before = weights(learn)
    with quiet(learn): learn.fit_one_cycle(2, 1e-2)
    assert sum(not torch.equal(v, before[k]) for k, v in learn.model.named_parameters()) == len(list(learn.model.parameters()))
    for name in ('train_loss', 'valid_loss'):
        assert all(math.isfinite(v) and (0 < v < 5 if task == 'rotation' else -1 <= v <= 1) for v in column(learn, name))
    assert all(0 <= v <= 1 for v in column(learn, 'rotation_accuracy')) if task == 'rotation' else all(v > 0 for v in column(learn, 'std'))


@pytest.mark.parametrize('loaders', LOADERS)
def test_valid_loss_is_that_of_the_task(loaders, folder):
    learn = fit(learner('rotation', loaders(folder)))
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad(): pred = learn.model.eval()(rotate4(NORM(x)))
    loss, acc = learn.validate()
    torch.testing.assert_close(torch.tensor(loss), F.cross_entropy(pred, rotation_labels(len(x))))
    assert abs(acc - (pred.argmax(1) == rotation_labels(len(x))).float().mean()) < 1e-6
    learn = fit(learner('pairs', loaders(folder)))
    learn.pairs.augment = NORM  # both views are the image itself
    with torch.no_grad(): p, z, *_ = learn.model.eval()(NORM(x), NORM(x))
    assert abs(learn.validate()[0] - simsiam_loss(p, z, p, z)) < 1e-5


@pytest.mark.parametrize('loaders', LOADERS)
@pytest.mark.parametrize('task', TASKS)
def test_get_preds_are_of_each_image_as_it_is(task, loaders, folder):
    learn = fit(learner(task, loaders(folder)))
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    preds, targs = learn.get_preds(act=noop)
    with torch.no_grad(): torch.testing.assert_close(preds, learn.model.eval()(NORM(x)), atol=1e-5, rtol=1e-4)
    assert targs is None
    preds, _ = learn.get_preds(0)
    assert len(preds) == 60
    test_dl = learn.dls.test_dl(sorted(folder.rglob('*.png'))[:10])
    assert len(learn.get_preds(dl=test_dl)[0]) == 10


@pytest.mark.parametrize('loaders', TWO)
@pytest.mark.parametrize('task', TASKS)
def test_lr_find_leaves_the_weights_as_they_were(task, loaders, folder):
    learn = learner(task, loaders(folder), cbs=[OnDevice()])
    before = weights(learn)
    with quiet(learn): found = learn.lr_find(num_it=12)
    plt.close('all')
    assert 1e-7 <= found.valley <= 10 and same(before, weights(learn))
    assert task == 'rotation' or len(learn.recorder.losses) == 12  # to the end, though losses below 0 are always above four times the best
    fit(learn, lr=found.valley)
    assert not same(before, weights(learn))


@pytest.mark.parametrize('task', TASKS)
def test_the_best_model_is_saved_and_loaded_at_the_end(task, folder, tmp_path):
    class Keep(Callback):
        order = SaveModelCallback.order - 1
        def before_fit(self): self.kept = []
        def after_epoch(self): self.kept.append(weights(self.learn))
    save, keep = SaveModelCallback(fname='best'), Keep()
    learn = fit(learner(task, unlabelled(folder), path=tmp_path), 4, 1., cbs=[save, keep])  # a rate so high that the last epoch need not be the best
    losses = column(learn, 'valid_loss')
    best = losses.index(min(losses))
    assert same(weights(learn), keep.kept[best]) and save.best == losses[best]
    assert (tmp_path/'models/best.pth').is_file() and len(learn.recorder.values) == 4
    metric = 'rotation_accuracy' if task == 'rotation' else 'rank'
    fit(learn, 2, cbs=[SaveModelCallback(metric, fname='metric')])
    assert (tmp_path/'models/metric.pth').is_file()


@pytest.mark.parametrize('task', TASKS)
def test_early_stopping_and_a_rate_that_drops_on_a_plateau(task, folder):
    learn = fit(learner(task, unlabelled(folder)), 5, cbs=EarlyStoppingCallback(min_delta=9., patience=2))
    assert len(learn.recorder.values) == 3
    learn = fit(learner(task, unlabelled(folder)), 4, 1e-2, cbs=ReduceLROnPlateau(min_delta=9., patience=1))
    assert abs(learn.opt.hypers[-1]['lr'] - 1e-5) < 1e-9


@pytest.mark.parametrize('cbs', [[], [OnDevice()]], ids=['stock', 'OnDevice'])
@pytest.mark.parametrize('task', TASKS)
def test_csv_logger(task, cbs, folder, tmp_path):
    learn = fit(learner(task, unlabelled(folder), cbs=[CSVLogger(), *cbs], path=tmp_path), 3)
    log = learn.csv_logger.read_log()
    assert list(log.columns) == list(learn.recorder.metric_names) and list(log.epoch) == [0, 1, 2]
    assert [round(v, 4) for v in log.valid_loss] == [round(v, 4) for v in column(learn, 'valid_loss')]


@pytest.mark.parametrize('opt_func', [None, sgd()], ids=['Adam', 'sgd'])
@pytest.mark.parametrize('task', TASKS)
def test_tensorboard(task, opt_func, folder, tmp_path):
    pytest.importorskip('tensorboard', reason='pip install tensorboard: fastai has the callback only where it is installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    cb = TensorBoardCallback(tmp_path/'log', trace_model=False, log_preds=False)
    fit(learner(task, unlabelled(folder), **(dict(opt_func=opt_func) if opt_func else {})), 1, cbs=cb)
    assert [p.stat().st_size > 100 for p in (tmp_path/'log').iterdir()] == [True]


class Steps(Callback):
    "After which batches the optimiser made a step"
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append(self.iter)


def plain_net(task):
    "Without BatchNorm, so that two small batches are as good as a large one"
    torch.manual_seed(0)
    flat = lambda n: nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, n))
    if task == 'rotation': return flat(4), [Augment(NORM, NORM), Rotation()]
    return SimSiam(flat(8), nn.Linear(8, 8), nn.Linear(8, 8)), [Pairs(NORM, NORM, simsiam_loss)]


@pytest.mark.parametrize('task', TASKS)
def test_gradient_accumulation(task, folder):
    "fastai's callback counts what the loss is made of: images, and with `Rotation` every turn of them"
    def run(bs, *more):
        net, cbs = plain_net(task)
        dls = labelled(folder, bs=bs, shuffle=False, drop_last=False)
        learn = fit(Learner(dls, net, CrossEntropyLossFlat(), opt_func=sgd(), cbs=[*cbs, *more, Steps()]), lr=.01)
        return weights(learn), learn.steps.seen, column(learn, 'train_loss')
    turns = 4 if task == 'rotation' else 1
    large, steps, _ = run(30)
    assert steps == [0, 1]
    for acc in (GradientAccumulation(30*turns), Accumulate(2)):
        small, steps, _ = run(15, acc)
        assert steps == [1, 3]
        for k in large: torch.testing.assert_close(small[k], large[k], atol=1e-6, rtol=1e-4)
    assert run(15, GradientClip(1e-9))[1] == [0, 1, 2, 3]


class BF16OnCPU(MixedPrecision):
    "fastai's callback as `to_bf16` adds it, for the autocast of a CPU: fastai's own asks for that of CUDA"
    def __init__(self): super().__init__('bf16')
    def before_fit(self): super().before_fit(); self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)


class Dtypes(Callback):
    "What the trunk hands on, what the predictions are, and what the gradient starts from"
    order = 45
    def before_fit(self): self.seen = {}; self.hook = next(m for m in self.model.modules() if isinstance(m, NIN)).register_forward_hook(lambda m, i, o: self.seen.update(trunk=o.dtype))
    def after_pred(self): self.seen['pred'] = (self.pred[0] if isinstance(self.pred, tuple) else self.pred).dtype
    def after_loss(self): self.seen['loss'] = self.loss.dtype
    def after_fit(self): self.hook.remove()


@pytest.mark.parametrize('loaders', TWO)
@pytest.mark.parametrize('task', TASKS)
def test_half_precision_by_the_autocast_of_a_cpu(task, loaders, folder):
    learn = learner(task, loaders(folder), cbs=[BF16OnCPU(), Dtypes()])
    before = weights(learn)
    fit(learn, 1)
    assert learn.dtypes.seen == dict(trunk=torch.bfloat16, pred=torch.float32, loss=torch.float32)
    assert not same(before, weights(learn)) and math.isfinite(column(learn, 'valid_loss')[0])
    assert learn.get_preds(act=noop)[0].dtype == torch.float32 and not torch.is_autocast_enabled('cpu')


@pytest.mark.skipif(torch.cuda.is_available(), reason='says what happens where there is no GPU')
@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16'])
@pytest.mark.parametrize('task', TASKS)
def test_mixed_precision_without_a_gpu_is_single_precision(task, how, folder):
    def run(change):
        random.seed(0)  # fastai draws the order of images from Python's random numbers
        learn = change(learner(task, unlabelled(folder)))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch says that it switches autocast and the scaler off
            return weights(fit(learn))
    assert same(run(noop), run(lambda l: getattr(l, how)()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: fastai asks for the autocast and the gradient scaler of CUDA')
@pytest.mark.parametrize('how, dtype', [('to_fp16', torch.float16), ('to_bf16', torch.bfloat16)])
@pytest.mark.parametrize('task', TASKS)
def test_mixed_precision_on_a_gpu(task, how, dtype, folder):
    dls = unlabelled(folder)
    dls.to('cuda')
    learn = getattr(learner(task, dls, cbs=[Dtypes()]), how)()
    before = weights(learn)
    fit(learn, 3)
    assert learn.dtypes.seen == dict(trunk=dtype, pred=torch.float32, loss=torch.float32)
    assert not same({k: v.cpu() for k, v in weights(learn).items()}, {k: v.cpu() for k, v in before.items()}) and math.isfinite(column(learn, 'valid_loss')[-1])


@pytest.mark.parametrize('loaders', TWO)
@pytest.mark.parametrize('task', TASKS)
def test_show_batch_shows_the_images_of_the_loader(task, loaders, folder):
    learn = fit(learner(task, loaders(folder)))
    learn.dls.show_batch(max_n=4)
    assert sum(len(ax.images) for ax in plt.gcf().axes) == 4
    plt.close('all')


@pytest.mark.parametrize('task', TASKS)
def test_saved_and_loaded(task, folder, tmp_path):
    dls = unlabelled(folder)
    learn = learner(task, dls, path=tmp_path)
    with quiet(learn): learn.fit_one_cycle(1, 1e-2)
    x = NORM(TEST.x[:8])
    with torch.no_grad(): out = learn.model.eval()(x)
    learn.save('all')
    save_weights(learn.model, tmp_path/'w.safetensors', net='NIN', width=16)
    again = learner(task, dls, seed=1, path=tmp_path)
    with torch.no_grad(): assert not torch.equal(again.model.eval()(x), out)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        again.load('all')
    with torch.no_grad(): assert torch.equal(again.model.eval()(x), out)
    third = learner(task, dls, seed=2)
    load_weights(third.model, tmp_path/'w.safetensors')  # no pickle on this way
    with torch.no_grad(): assert torch.equal(third.model.eval()(x), out)
    fit(again)
    fit(third)


@pytest.mark.parametrize('loaders', TWO)
@pytest.mark.parametrize('task', TASKS)
def test_export_is_possible_all_the_same(task, loaders, folder, tmp_path):
    learn = fit(learner(task, loaders(folder), cbs=[OnDevice()], path=tmp_path))
    learn.export('whole.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # fastai warns of pickles
        again = load_learner(tmp_path/'whole.pkl')
    files = sorted(folder.rglob('*.png'))[:6]
    a, b = (l.get_preds(dl=l.dls.test_dl(files), act=noop)[0] for l in (learn, again))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize('task', TASKS)
def test_on_device_changes_no_number(task, folder):
    def run(*cbs):
        random.seed(0)
        learn = fit(learner(task, unlabelled(folder), cbs=cbs), 2)
        return torch.stack([torch.as_tensor(l).as_subclass(torch.Tensor) for l in learn.recorder.losses]), [list(v) for v in learn.recorder.values]
    (a, u), (b, v) = run(), run(OnDevice())
    assert torch.equal(a, b) and u == v


@pytest.mark.parametrize('task', TASKS)
def test_a_fit_goes_on_from_its_checkpoint(task, folder, tmp_path):
    class Cut(Callback):
        order = 90
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    few = image_dls(TRAIN.subset(slice(0, 60)), TEST.subset(slice(0, 30)), 15, device='cpu')
    for loaders in (lambda: few, lambda: unlabelled(folder)):
        def run(name, *cbs):
            learn = learner(task, loaders(), cbs=[OnDevice(), Checkpoint(tmp_path/name)], opt_func=sgd())
            fit(learn, 3, cbs=cbs)
            return learn
        whole = run('whole.pt')
        with pytest.raises(KeyboardInterrupt): run('cut.pt', Cut())
        again = run('cut.pt')
        assert again.checkpoint.start == 2 and len(again.recorder.values) == 3 and all(map(math.isfinite, column(again, 'valid_loss')))
        if loaders() is few: assert same(weights(whole), weights(again))  # fastai's own loaders draw their order from Python's random numbers, which a checkpoint does not hold
        for p in tmp_path.glob('*.pt'): p.unlink()


def test_the_monitor_has_its_say_in_a_plain_learner(folder):
    monitor = CollapseMonitor(TRAIN.subset(slice(0, 60)), TEST.subset(slice(0, 30)))
    trunk = NIN(16)
    learn = Learner(unlabelled(folder), SimSiam(trunk, projector(16, 32), predictor(32)), simsiam_loss, metrics=monitor.metrics, cbs=[Pairs(*view_augment(32), simsiam_loss), monitor])
    fit(learn)
    assert list(learn.recorder.metric_names)[3:6] == ['std', 'rank', 'knn'] and 0 <= column(learn, 'knn')[0] <= 1
    learn.model.projector[-1] = nn.Linear(32, 32)
    nn.init.zeros_(learn.model.projector[-1].weight)  # one vector for all images
    monitor.min_steps = 0
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='collapse'): learn.fit(1, 0.)


def test_loaders_that_normalise_get_a_recipe_that_does_not(folder):
    seen = {}
    class See(Callback):
        order = Augment.order + .5
        def before_batch(self):
            if not self.training: seen.setdefault(self.key, self.x.as_subclass(torch.Tensor))
    for key, dls, recipe in (('here', labelled(folder), crop_augment()),
                             ('there', labelled(folder, batch_tfms=FastaiNormalize.from_stats(*CIFAR10_STATS)), (nn.Identity(), nn.Identity()))):
        learn = learner('rotation', dls)
        learn.augment.train_tfms, learn.augment.valid_tfms = recipe
        see = See(); see.key = key
        fit(learn, cbs=see)
    torch.testing.assert_close(seen['here'], seen['there'], atol=1e-4, rtol=0)


@pytest.mark.parametrize('task', TASKS)
def test_then_the_blocks_go_to_the_labelled_task(task, folder):
    learn = fit(learner(task, augmented(folder)))
    trunk = learn.model[0] if task == 'rotation' else learn.model.trunk
    dls = augmented(folder)
    net = nn.Sequential(Frozen(trunk, 2), linear_head(feature_shape(trunk, 2), dls.c))
    before = deepcopy(net[0].state_dict())
    down = fit(Learner(dls, net, metrics=accuracy, cbs=[Augment(NORM, NORM)]))
    assert same(before, dict(net[0].state_dict())) and 0 <= column(down, 'accuracy')[0] <= 1
    assert down.show_results(max_n=2) is None
    plt.close('all')


@pytest.mark.parametrize('loaders', TWO)
def test_our_learners_take_fastais_loaders(loaders, folder, tmp_path):
    for make in (lambda d: rotnet_learner(d, NIN(16), path=tmp_path), lambda d: simsiam_learner(d, NIN(16), width=32, accumulate=2, path=tmp_path)):
        learn = make(loaders(folder))
        with quiet(learn):
            learn.lr_find(num_it=12, show_plot=False)
            learn.fit_cosine(1, 1e-2)
        assert len(learn.get_preds(act=noop)[0]) == 20 and math.isfinite(learn.validate()[0])


@pytest.mark.parametrize('task', TASKS)
def test_torchs_loaders_too(task):
    data = torch.utils.data.TensorDataset(TRAIN.x[:60]/255, TRAIN.y[:60])
    dls = DataLoaders(torch.utils.data.DataLoader(data, 16, shuffle=True, drop_last=True), torch.utils.data.DataLoader(data, 16))
    learn = learner(task, dls, cbs=[OnDevice()])
    before = weights(learn)
    fit(learn)
    assert not same({k: v.cpu() for k, v in weights(learn).items()}, before)


@pytest.mark.parametrize('labels', [True, False])
def test_loaders_of_images_in_memory_can_be_exported(labels, tmp_path):
    parts = [im.subset(slice(0, 60)) if labels else im.subset(slice(0, 60)).unlabelled() for im in (TRAIN, TEST)]
    for make in (lambda d: rotnet_learner(d, NIN(16), path=tmp_path), lambda d: simsiam_learner(d, NIN(16), width=32, path=tmp_path)):
        learn = fit(make(image_dls(*parts, 16, device='cpu')))
        learn.export('whole.pkl')
        assert len(learn.dls.train.dataset) == 60 and (tmp_path/'whole.pkl').stat().st_size < 60*3*32*32 + 4*sum(p.numel() for p in learn.model.parameters())  # without the images
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            again = load_learner(tmp_path/'whole.pkl')
        a, b = (l.get_preds(dl=ImageDL(parts[1], 20), act=noop)[0] for l in (learn, again))
        torch.testing.assert_close(a, b)


def test_what_is_wrong_in_a_batch_is_said_in_one_line(folder):
    "though fastai puts a line of its own before it"
    wide = image_dls(*(Images(TRAIN.x[:40, :, :24]) for _ in range(2)), 20, device='cpu')
    one_line_error(lambda: fit(learner('rotation', wide)), 'images 32 wide and 24 high', 'Resize(24)')
    one_line_error(lambda: fit(learner('pairs', labelled(folder, bs=59, drop_last=False))), 'a batch of one image', 'drop_last=True')
    one_line_error(lambda: fit(learner('pairs', labelled(folder, bs=1))), 'give bs=2')
    assert len(fit(learner('pairs', labelled(folder, bs=19))).get_preds()[0]) == 20  # a last batch of one is no matter when measuring


class Cut(Callback):
    "The power fails after two epochs"
    order = 90
    def before_epoch(self):
        if self.epoch == 2: raise KeyboardInterrupt


@pytest.mark.parametrize('opt_func', [Adam, sgd()], ids=['Adam', 'sgd'])
@pytest.mark.parametrize('task', TASKS)
def test_a_fit_goes_on_from_its_checkpoint_with_fastais_callbacks(task, opt_func, folder, tmp_path):
    few = image_dls(TRAIN.subset(slice(0, 60)), TEST.subset(slice(0, 30)), 15, device='cpu')  # the order of fastai's own loaders is drawn from Python's random numbers, which a checkpoint does not hold
    def run(*cbs, ckpt='c.pt'):
        learn = learner(task, few, opt_func=opt_func, path=tmp_path, cbs=[Checkpoint(tmp_path/ckpt)])
        with quiet(learn): learn.fit_one_cycle(5, 1e-2, cbs=[EarlyStoppingCallback(min_delta=9., patience=3), *cbs])
        return learn
    whole = run(ckpt='whole.pt')
    assert len(whole.recorder.values) == 4
    with pytest.raises(KeyboardInterrupt): run(Cut())
    again = run()
    assert again.checkpoint.start == 2 and same(weights(whole), weights(again))
    assert [list(v) for v in whole.recorder.values] == [list(v) for v in again.recorder.values]
    once_more = run()
    assert once_more.checkpoint.start == 4 and same(weights(whole), weights(once_more))  # it had stopped early, and does so again


@pytest.mark.parametrize('task', TASKS)
def test_lr_find_leaves_no_checkpoint(task, folder, tmp_path):
    learn = learner(task, unlabelled(folder), opt_func=sgd(), cbs=[Checkpoint(tmp_path/'c.pt')])
    with quiet(learn): learn.lr_find(num_it=12, show_plot=False)
    assert not (tmp_path/'c.pt').exists()
    fit(learn, 2)
    with quiet(learn): learn.lr_find(num_it=12, show_plot=False)
    assert torch.load(tmp_path/'c.pt', weights_only=True)['n_epoch'] == 2


# What a fastai user does with a Learner that is trained: on our own loaders, and after `load_learner`

FEW = [im.subset(slice(0, 40)) for im in (TRAIN, TEST)]


def classifier(parts=FEW, **kwargs):
    torch.manual_seed(0)
    c = parts[0].c
    net = nn.Sequential(NIN(16), *linear_head(feature_shape(NIN(16)), c))
    return fit(Learner(image_dls(*parts, 20, device='cpu'), net, cbs=[Augment(NORM, NORM)], **kwargs))


def reloaded(learn, path):
    learn.path = path
    learn.export('whole.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_learner(path/'whole.pkl')


def attributes(images):
    y = torch.stack([images.y % 2 == 0, images.y > 4], 1)
    return Images(images.x, y, ['even', 'high'], images.name)


def drawn():
    "The titles of the pictures of the last figure, and the pictures"
    axes = [ax for ax in plt.gcf().axes if ax.images]
    out = [ax.get_title() for ax in axes], [ax.images[0].get_array() for ax in axes]
    plt.close('all')
    return out


@pytest.mark.parametrize('again', [False, True], ids=['here', 'loaded'])
def test_predict(again, tmp_path):
    learn = classifier()
    with learn.no_bar(): probs = learn.get_preds()[0]
    if again: learn = reloaded(learn, tmp_path)
    x = TEST.x[7]
    for item in (x, Image.fromarray(x.permute(1, 2, 0).numpy()), x.permute(1, 2, 0).numpy()):
        name, k, p = learn.predict(item)
        torch.testing.assert_close(p, probs[7])
        assert name == TRAIN.vocab[k] and k == probs[7].argmax()
    assert torch.equal(torch.as_tensor(learn.predict(x, with_input=True)[0]), x)
    for bad, said in ((x[:, :24], '(3, 24, 32)'), ('cat.jpg', 'image_folder'), (Image.new('RGB', (40, 40)), '(3, 40, 40)')):
        one_line_error(lambda: learn.predict(bad), said)
    bits = classifier([attributes(im) for im in FEW])
    if again: bits = reloaded(bits, tmp_path)
    names, there, p = bits.predict(x)
    assert list(names) == [n for n, t in zip(('even', 'high'), there) if t] and torch.equal(there, p > .5)


def test_results_of_classes_and_of_attributes():
    learn = classifier()
    with learn.no_bar():
        learn.show_results(max_n=4, shuffle=False)
        titles, pictures = drawn()
        assert titles == [f'{TRAIN.vocab[y]}\n{TRAIN.vocab[k]}' for y, k in zip(TEST.y[:4], learn.get_preds()[0].argmax(1))]
        assert all((p == im.permute(1, 2, 0).numpy()).all() for p, im in zip(pictures, TEST.x))
        bits = classifier([attributes(im) for im in FEW])
        bits.show_results(max_n=4, shuffle=False)
        name = lambda row: ', '.join(n for n, t in zip(('even', 'high'), row) if t)
        assert drawn()[0] == [f'{name(y)}\n{name(p > .5)}' for y, p in zip(attributes(FEW[1]).y[:4], bits.get_preds()[0])]


@pytest.mark.parametrize('again', [False, True], ids=['here', 'loaded'])
def test_top_losses_and_confusion(again, tmp_path):
    learn = classifier()
    with learn.no_bar(): losses = F.cross_entropy(learn.get_preds()[0].log(), FEW[1].y, reduction='none')
    if again: learn = reloaded(learn, tmp_path)
    learn.remove_cb(learn.progress)
    interp = ClassificationInterpretation.from_learner(learn, dl=learn.dls.test_dl(FEW[1]) if again else None)
    torch.testing.assert_close(interp.losses, losses, check_stride=False)
    interp.plot_top_losses(3)
    titles, pictures = drawn()
    worst = losses.topk(3)[1]
    assert [t.split(' / ')[0].split('/')[1] for t in titles] == [TRAIN.vocab[y] for y in FEW[1].y[worst]]
    assert (pictures[0] == FEW[1].x[worst[0]].permute(1, 2, 0).numpy()).all()
    assert interp.confusion_matrix().sum() == 40 and interp.confusion_matrix().shape == (10, 10)
    assert all(a in TRAIN.vocab and b in TRAIN.vocab for a, b, _ in interp.most_confused())
    interp.plot_confusion_matrix()
    assert [t.get_text() for t in plt.gcf().axes[0].get_xticklabels()] == TRAIN.vocab
    plt.close('all')


def test_top_losses_without_names_and_of_attributes(capsys):
    for parts in ([Images(im.x, im.y) for im in FEW], [attributes(im) for im in FEW],
                  [Images(im.x/255, im.y, im.vocab) for im in FEW], [Images(NORM(im.x), im.y, im.vocab) for im in FEW]):
        learn = classifier(parts)
        learn.remove_cb(learn.progress)
        ClassificationInterpretation.from_learner(learn).plot_top_losses(2)
        assert all(0 <= p.min() and p.max() <= (255 if p.dtype.kind == 'u' else 1) and p.max() > p.min() for p in drawn()[1])


def test_an_exported_learner_has_no_images(tmp_path):
    learn = reloaded(classifier(), tmp_path)
    for call in (learn.show_results, learn.get_preds, learn.validate, learn.dls.show_batch): one_line_error(call, 'has no images of its own', 'test_dl')
    with learn.no_bar(): learn.show_results(dl=learn.dls.test_dl(FEW[1]), max_n=2)
    assert len(drawn()[0]) == 2 and learn.dls.test_dl(FEW[1]).bs == 40  # and not as many as the one black image


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('labels', [True, False])
def test_a_net_without_labels_has_no_results_to_show(task, labels):
    make = rotnet_learner if task == 'rotation' else simsiam_learner
    learn = fit(make(image_dls(*(im if labels else im.unlabelled() for im in FEW), 20, device='cpu'), NIN(16)))
    one_line_error(learn.show_results, 'plot_neighbours')
    one_line_error(lambda: ClassificationInterpretation.from_learner(learn), 'an image has none')
    assert len(learn.predict(FEW[1].x[0])[2]) == (4 if task == 'rotation' else 16)  # turns, or features


def test_fastais_own_classes_stay_as_they_are():
    "After all of the package is imported they have three new methods, and none that is replaced: other Learners keep fastai's `no_bar`"
    for m in pkgutil.walk_packages(ssl_nb.__path__, 'ssl_nb.'): importlib.import_module(m.name)
    classes = {o for name,m in list(sys.modules.items()) if name.startswith('fastai.') for o in vars(m).values()
               if isinstance(o, type) and o.__module__.startswith('fastai.')}
    def ours(f): return getattr(getattr(f, 'fget', f), '__module__', None) or ''
    assert {f'{c.__name__}.{k}' for c in classes for k,f in vars(c).items() if ours(f).startswith('ssl_nb')} == {'Learner.fast', 'Learner.fit_cosine', 'Learner.fit_steps'}


def test_no_bar_gives_back_the_bar_that_was_there():
    learn = ssl_learner(image_dls(TRAIN, TEST, device='cpu'), nn.Linear(3, 10), nn.CrossEntropyLoss())
    bar = learn.progress
    with learn.no_bar(): assert not hasattr(learn, 'progress')
    assert learn.progress is bar and type(bar) is LazyProgressCallback
    with pytest.raises(KeyboardInterrupt), learn.no_bar(): raise KeyboardInterrupt
    assert learn.progress is bar
    learn.remove_cb(bar)
    with learn.no_bar(): pass
    assert not hasattr(learn, 'progress')
    stock = Learner(learn.dls, learn.model, nn.CrossEntropyLoss())
    with stock.no_bar(): assert not hasattr(stock, 'progress')
    assert type(stock.progress) is ProgressCallback


def test_a_learner_that_goes_into_a_file_comes_back_with_its_no_bar(tmp_path):
    learn = ssl_learner(image_dls(TRAIN, TEST, device='cpu'), nn.Linear(3, 10), nn.CrossEntropyLoss())
    learn.path = tmp_path
    learn.export('l.pkl')
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); back = load_learner(tmp_path/'l.pkl')
    assert type(back) is type(learn) and isinstance(back, Learner)
    with back.no_bar(): assert not hasattr(back, 'progress')
    assert type(back.progress) is LazyProgressCallback
