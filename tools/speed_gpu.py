"""Training speed on one NVIDIA GPU, beside loops of others: `nbs/81_speed_gpu.ipynb` tells the story and draws the tables.

    python tools/speed_gpu.py --tiny                                          # a minute: does everything run here? On a CPU, too
    python tools/speed_gpu.py --data DIR --minutes 8 --out results/speed      # a file for every workload; run it again to go on

It needs torch, torchvision, timm, fastai and the package, installed or in the folder above; lightly is measured where it can be imported."""
import argparse
import gc
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from fastai.callback.core import Callback, CancelEpochException, CancelValidException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))
from ssl_nb.augment import CIFAR10_STATS, crop_augment, view_augment
from ssl_nb.backbones import backbone
from ssl_nb.data import Images, InputError, cifar10, cifar10_sample, image_dls
from ssl_nb.fast import FastStep  # and with it `learn.fast`
from ssl_nb.heads import linear_head
from ssl_nb.nets import feature_shape, nin
from ssl_nb.methods.rotation import Rotation, rotate4, rotation_labels, rotnet_learner
from ssl_nb.methods.simsiam import SimSiam, simsiam_heads, simsiam_learner, simsiam_loss
from ssl_nb.device import machine
from ssl_nb.fitting import git_commit
from ssl_nb.results import check_commit, save_result

# What is trained

@dataclass(frozen=True)
class Work:
    "A workload; `make` is for the net, `conv` nets have their channels last"
    title:str; net:str; size:int=32; bs:int=512; conv:bool=True; make:dict=field(default_factory=dict); width:int=2048; n:int=50_000; workers:int=0

    @property
    def rotnet(self): return self.net == 'nin'
    @property
    def views(self): return 4 if self.rotnet else 2  # of each image
    @property
    def lr(self): return .02 if self.rotnet else .03*self.bs/256
    @property
    def augment(self): return crop_augment() if self.rotnet else view_augment(self.size)  # views, and plain images

    def new_net(self):
        "The same weights at every call"
        torch.manual_seed(0)
        trunk = nin(**self.make) if self.rotnet else backbone(self.net, self.size, **self.make)
        shape = feature_shape(trunk, size=self.size)
        return nn.Sequential(trunk, linear_head(shape, 4)) if self.rotnet else SimSiam(trunk, *simsiam_heads(shape[0], width=self.width))

    def new_sgd(self, net, **kwargs): return torch.optim.SGD(net.parameters(), self.lr, momentum=.9, nesterov=self.rotnet, weight_decay=5e-4, **kwargs)

WORKLOADS = dict(
    nin=Work('RotNet, NIN', 'nin', bs=128, make=dict(width=192)),
    resnet18=Work('SimSiam, ResNet-18, small stem', 'resnet18'),
    efficientnet=Work('SimSiam, EfficientNet-B0', 'efficientnet_b0'),
    pit=Work('SimSiam, PiT-Ti', 'pit_ti_224', conv=False),
    resnet18_96=Work('SimSiam, ResNet-18, 96 pixels', 'resnet18', size=96, bs=256),
    vit_96=Work('SimSiam, ViT-S/16, 96 pixels', 'vit_small_patch16_224', size=96, bs=256, conv=False))

TINY = dict(nin=dict(width=8), resnet18=dict(channels=(8,8,16,16)), efficientnet_b0={}, pit_ti_224=dict(depth=(1,1,1)), vit_small_patch16_224=dict(depth=1))

def tiny(work):
    "The same at a scale of seconds: narrow nets, two steps an epoch"
    n = 64 if work.net in ('nin','resnet18') and work.size == 32 else 8
    return replace(work, make=TINY[work.net], width=64, n=n, bs=n//2)

def get_images(work, data=None):
    "`work.n` images, whole batches, at the size; of CIFAR-10 (or its parts) in the folder `data`, else of the packaged sample; repeated when there are too few"
    images = (cifar10(data, partial=True) if data else cifar10_sample())[0]
    n,there = work.n//work.bs*work.bs, len(images)
    x = images.x.repeat(-(-n//there), 1, 1, 1)[:n]
    if work.size != 32: x = torch.cat([F.interpolate(b.float(), size=work.size, mode='bicubic').clamp(0, 255).round().to(torch.uint8) for b in x.split(1000)])
    return Images(x, name=images.name + (f' ({there}), repeated' if n > there else ''))

# Contestants: each takes (work, device, images) and gives a function that trains an epoch and gives its mean loss

class TrainOnly(Callback):
    "Train only, and keep the sum of the losses on the device"
    order = 51  # after the recorder and the collapse monitor
    def before_train(self): self.total = 0.
    def after_batch(self): self.total += self.loss.detach()
    def before_validate(self): raise CancelValidException()

def go_on(learn, lr):
    "An epoch at a call, all of one fit: a graph is captured once, as in a long fit"
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger,learn.n_epoch = (lambda row: None), 1000
    learn.create_opt(); learn.opt.set_hypers(lr=lr)
    learn('before_fit')
    def epoch():
        learn._with_events(learn._do_epoch, 'epoch', CancelEpochException)
        return (learn.train_only.total/len(learn.dls.train)).item()
    epoch.learn = learn
    return epoch

def ours(work, device, images, **fast):
    "`rotnet_learner` or `simsiam_learner` with `.fast()`"
    dls,net = image_dls(images, images.subset(slice(0,2)), work.bs, device=device), work.new_net()
    kwargs = dict(size=work.size, augment=work.augment, channels_last=work.conv, cbs=TrainOnly())
    learn = rotnet_learner(dls, net[0], **kwargs) if work.rotnet else simsiam_learner(dls, net.trunk, width=work.width, **kwargs)
    learn.model.load_state_dict(net.state_dict())
    return go_on(learn.fast(say=None, **fast), work.lr)

def resident(work, device, images, precision=torch.bfloat16):
    "The loop of somebody who knows: images on the device, views by the batch, autocast, channels last, fused SGD, the loss read once"
    net,recipe,x = work.new_net().to(device), work.augment[0].to(device), images.x.to(device)
    layout = torch.channels_last if work.conv else torch.contiguous_format
    net,opt = net.to(memory_format=layout), work.new_sgd(net, fused=device.type == 'cuda')
    labels = rotation_labels(work.bs, device)
    def step(b):
        views = (rotate4(recipe(b)),) if work.rotnet else recipe(torch.cat([b, b])).chunk(2)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            out = net(*(v.contiguous(memory_format=layout) for v in views))
            return F.cross_entropy(out, labels) if work.rotnet else simsiam_loss(*out)
    def epoch():
        net.train(); total = 0.
        for i in torch.randperm(len(x)).to(device).split(work.bs):
            loss = step(x[i])
            loss.backward(); opt.step(); opt.zero_grad()
            total += loss.detach()
        return (total/(len(x)//work.bs)).item()
    return epoch

class Pictures(Dataset):
    "PIL images with a target; an item goes through `transform`"
    def __init__(self, images, transform=None): self.x,self.transform = [TF.to_pil_image(im) for im in images.x], transform
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.transform(self.x[i]), 0

class TwoViews(Pictures):
    def __getitem__(self, i): return self.transform(self.x[i]), self.transform(self.x[i]), 0

def pil_transform(work):
    "The same distribution of views by torchvision, an image at a time"
    end = [T.ToTensor(), T.Normalize(*CIFAR10_STATS)]
    if work.rotnet: return T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *end])
    blur = [T.RandomApply([T.GaussianBlur(work.size//20*2+1, (.1,2.))], .5)] if work.size > 32 else []
    return T.Compose([T.RandomResizedCrop(work.size, (.2,1.)), T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(.4,.4,.4,.1)], .8), T.RandomGrayscale(.2), *blur, *end])

def stock_fastai(work, device, images):
    "After fastai's docs: its `DataLoaders` with workers, its `Learner` and its SGD (which knows no Nesterov), float32"
    data = Pictures if work.rotnet else TwoViews
    dls = DataLoaders.from_dsets(*(data(im, pil_transform(work)) for im in (images, images.subset(slice(0,2)))), bs=work.bs, num_workers=work.workers, device=device)
    loss = nn.CrossEntropyLoss() if work.rotnet else lambda out, y: simsiam_loss(*out)
    cbs = [TrainOnly(), *([Rotation()] if work.rotnet else [])]
    return go_on(Learner(dls, work.new_net(), loss, opt_func=partial(SGD, mom=.9, wd=5e-4, decouple_wd=False), cbs=cbs), work.lr)

class Example(nn.Module):
    "The model of lightly's example"
    def __init__(self, backbone, projection_head, prediction_head):
        super().__init__()
        self.backbone,self.projection_head,self.prediction_head = backbone,projection_head,prediction_head

    def forward(self, x):
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)

def lightly_model(work):
    "lightly's heads on timm's model, with the weights of ours"
    from lightly.models.modules.heads import ProjectionHead, SimSiamPredictionHead
    net = work.new_net()
    first,last = net.projector[0], net.predictor[0]
    w = first.out_features
    proj = ProjectionHead([(first.in_features, w, nn.BatchNorm1d(w), nn.ReLU(inplace=True)), (w, w, nn.BatchNorm1d(w, affine=False), None)])
    pred = SimSiamPredictionHead(w, last.out_features, w)
    for theirs,mine in ((proj,net.projector), (pred,net.predictor)): theirs.layers.load_state_dict(mine.state_dict())
    return Example(net.trunk.model, proj, pred)

def lightly_loop(work, device, images, bf16=False):
    "lightly's transform, data set, collate function, heads and loss, workers that stay alive; Lightning's own loop is left out"
    from lightly.data import LightlyDataset, MultiViewCollate
    from lightly.loss import NegativeCosineSimilarity
    from lightly.transforms import SimSiamTransform
    tfm = SimSiamTransform(input_size=work.size, gaussian_blur=.5 if work.size > 32 else 0., normalize=dict(zip(('mean','std'), CIFAR10_STATS)))
    dl = DataLoader(LightlyDataset.from_torch_dataset(Pictures(images), transform=tfm), work.bs, shuffle=True, drop_last=True, num_workers=work.workers,
                    persistent_workers=work.workers > 0, pin_memory=device.type == 'cuda', collate_fn=MultiViewCollate())
    net,crit = lightly_model(work).to(device), NegativeCosineSimilarity()
    opt = work.new_sgd(net)
    def epoch():
        net.train(); total = 0.
        for views,_,_ in dl:
            x0,x1 = (v.to(device, non_blocking=True) for v in views)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                (z0,p0),(z1,p1) = net(x0), net(x1)
                loss = .5*(crit(z0, p1) + crit(z1, p0))
            loss.backward(); opt.step(); opt.zero_grad()
            total += loss.detach()
        return (total/len(dl)).item()
    return epoch

has_lightly = importlib.util.find_spec('lightly') is not None

def contestants(work):
    "Name -> (function, is it slow?); lightly has no RotNet"
    lightly = {'lightly as shipped': (lightly_loop, True), 'lightly, bf16': (partial(lightly_loop, bf16=True), True)} if has_lightly and not work.rotnet else {}
    return {'ours': (ours, False), 'ours, no graph': (partial(ours, graph=False), False), 'ours, float32': (partial(ours, precision='float32'), False),
            'resident loop': (resident, False), 'stock fastai': (stock_fastai, True), **lightly}

# Measuring

class TimeOver(Exception): "Too little was measured for a result"

def sync(device):
    if device.type == 'cuda': torch.cuda.synchronize()

def timed(f, device):
    "Seconds, and what it gave"
    sync(device); t = time.perf_counter(); out = f(); sync(device)
    return time.perf_counter()-t, out

def limits(device, small=False):
    "What the device can do: operations a second of a bf16 matrix product, and bytes a second (read and written) of a copy; random data, best of five"
    n,size = (256, 10**6) if small else (8192, 8*10**9)
    a,b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    x = torch.empty(size//8, dtype=torch.int64, device=device).random_()
    y = torch.empty_like(x)
    product,copy = lambda: [a@b for _ in range(10)], lambda: [y.copy_(x) for _ in range(3)]
    for f in (product, copy): f()
    return dict(matmul=20*n**3/min(timed(product, device)[0] for _ in range(5)), copy=6*size/min(timed(copy, device)[0] for _ in range(5)))

def flops_a_view(work):
    "Operations of a training step for a view: those of the forward pass three times, heads included"
    net,x = work.new_net(), torch.zeros(2, 3, work.size, work.size)
    with FlopCounterMode(display=False) as count: net(x) if work.rotnet else net(x, x)
    return 3*count.get_total_flops()/(2 if work.rotnet else 4)

def free(device):
    if device.type == 'cuda': gc.collect(); torch.cuda.empty_cache()

def one_line(e): return f'{type(e).__name__}: {(str(e).strip().splitlines() or [""])[0][:150]}'

def enter(make, work, device, images):
    "A contestant after its first epoch, and its row"
    free(device)
    before = 0
    if device.type == 'cuda': before = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
    built,epoch = timed(lambda: make(work, device, images), device)
    first,loss = timed(epoch, device)
    memory = torch.cuda.max_memory_allocated()-before if device.type == 'cuda' else 0
    return epoch, dict(built=built, first=first, memory=memory, loss=loss, seconds=[])

def half(work, images):
    "The images that slow contestants see: about half of them, the same number of batches for each worker"
    steps,k = len(images)//work.bs, max(1, work.workers)
    return images.subset(slice(0, max(2, steps//2//k*k)*work.bs))

def measure(work, device, images, rounds=5, slow_rounds=2, ends=float('inf'), say=print):
    "Rows of all contestants by name. Slow ones see half of the images, in fewer rounds; their seconds are scaled. Raises `TimeOver` when the time is over in the first round."
    part,live,rows,slow = half(work, images), {}, {}, {name for name,(_,is_slow) in contestants(work).items() if is_slow}
    def attempt(name, f):
        if time.monotonic() > ends: raise TimeOver()
        try: return f()
        except Exception as e: rows[name] = dict(failed=one_line(e)); live.pop(name, None); free(device)
    for name,(make,is_slow) in contestants(work).items():
        seen = part if is_slow else images
        got = attempt(name, lambda: enter(make, work, device, seen))
        if got: live[name],rows[name] = got; rows[name]['scaled'] = round(len(images)/len(seen), 4)
        say(f"  {name}: {rows[name].get('failed') or 'first epoch %.2f s' % rows[name]['first']}")
    rng = random.Random(0)
    try:
        for r in range(rounds):
            for name in rng.sample(sorted(live), len(live)):
                if name in slow and r >= slow_rounds: continue
                got = attempt(name, lambda: timed(live[name], device))
                if got: rows[name]['seconds'].append(got[0]); rows[name]['loss'] = got[1]
    except TimeOver:
        if any(not rows[name]['seconds'] for name in live): raise
    return {name: finished(row, live[name]) if name in live else row for name,row in rows.items()}

def finished(row, epoch):
    "Seconds of whole epochs, and what the start cost: all that construction and first epoch took beyond an epoch"
    start = row.pop('built') + max(0., row.pop('first')-statistics.median(row['seconds']))
    step = getattr(getattr(epoch, 'learn', None), 'fast_step', None)  # of ours: what was on, and why the rest was off
    return {**row, 'how': step.how if step else '', 'start': round(start, 3), 'seconds': [round(s*row['scaled'], 4) for s in row['seconds']]}

def about(device):
    "As in every result file; where the package is not installed, without its versions"
    try: return machine(device)
    except Exception: return dict(device=str(device), name=torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU', threads=torch.get_num_threads(), torch=torch.__version__, torchvision=torchvision.__version__)

def run_work(name, work, device, data, folder, small, **kwargs):
    "Measure a workload and write its file"
    t,images,can,flops = time.monotonic(), get_images(work, data), limits(device, small), flops_a_view(work)
    rows = measure(work, device, images, **kwargs)
    result = dict(study='speed', name=name, run=file_name(name, small), kind='speed', protocol='best', scale='tiny' if small else 'gpu', seed=0, history=[], machine=about(device), commit=git_commit(),
        data=dict(name=images.name, train=len(images)), config=dict(title=work.title, bs=work.bs, size=work.size, views=work.views*len(images), workers=work.workers, cudnn_benchmark=torch.backends.cudnn.benchmark),
        metrics=dict(limits=can, flops_a_view=flops, rows=rows), seconds=round(time.monotonic()-t, 1))
    save_result(result, folder)
    return result

def file_name(name, small): return f"{name}-{'tiny' if small else 'gpu'}"

def run_all(folder, data=None, device=None, small=False, minutes=None, only=None, workers=None, say=print, **kwargs):
    "Measure all workloads that have no file in `folder` yet. Raises `InputError` for a full run without a GPU."
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type != 'cuda' and not small: raise InputError("no NVIDIA GPU here: `--tiny` runs everything at a tiny scale")
    check_commit(folder, git_commit())  # better now than after the measuring
    torch.backends.cudnn.benchmark = True  # for all contestants
    ends = time.monotonic()+60*minutes if minutes else float('inf')
    for name in only or WORKLOADS:
        if (Path(folder)/f'{file_name(name, small)}.json').exists(): say(f'{name}: is there'); continue
        work = replace(WORKLOADS[name], workers=(2 if small else min(16, os.cpu_count())) if workers is None else workers)
        if small: work = tiny(work)
        say(f'{name}: {work.title}')
        try: run_work(name, work, device, data, folder, small, ends=ends, say=say, **kwargs)
        except TimeOver: say('time is over; run it again to go on'); return
        except InputError: raise  # such as a folder without data
        except Exception as e: say(f'{name} failed: {one_line(e)}')
        finally: free(device)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--data', default=os.environ.get('SSL_DATA'), help='folder with cifar-10-batches-py; without it the packaged sample is repeated')
    p.add_argument('--out', default=None, help='folder of the result files; by default results/speed, or with --tiny one that is thrown away')
    p.add_argument('--minutes', type=float, default=float(os.environ.get('MINUTES', 0)), help='stop after so long; what is done is kept')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--only', nargs='+', choices=WORKLOADS)
    p.add_argument('--tiny', action='store_true', help='every contestant for two steps, on any device')
    a = p.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temp:
            run_all(a.out or (temp if a.tiny else Path(__file__).resolve().parents[1]/'results'/'speed'), a.data, small=a.tiny, minutes=a.minutes, only=a.only, rounds=a.rounds)
    except InputError as e: sys.exit(str(e))

if __name__ == '__main__': main()
