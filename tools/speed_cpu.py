"""Training steps on a CPU, side by side with hand-written loops and with lightly, each contestant in a process of its own

    python tools/speed_cpu.py --out results/speed            # every net, two tables: about 40 minutes on two cores
    python tools/speed_cpu.py --out results/speed --net nin  # one of them
    python tools/speed_cpu.py --out results/speed --memory   # what the allocator's setting costs and gains
    python tools/speed_cpu.py --out /tmp/x --tiny            # does it run?

A contestant is a process, since how memory is kept cannot be taken back within one. All wait, and take turns in
shuffled order; the time of a turn is that of a few whole steps: loader, views, forward, backward, optimiser.
`as shipped` is what a user gets: ours by `learn.fast()`, the others in float32 with the system's allocator.
`equal` gives all the same precision and allocator."""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

warnings.filterwarnings('ignore')

NETS = { # steps: of a turn; bs: images a batch (NIN makes four, SimSiam two of each)
    'nin': dict(label='RotNet, NIN 192 wide', bs=128, steps=1),
    'resnet18': dict(label='SimSiam, ResNet-18, small stem', net=dict(name='resnet18'), bs=128, steps=1, channels_last=True),
    'efficientnet_b0': dict(label='SimSiam, EfficientNet-B0', net=dict(name='efficientnet_b0'), bs=128, steps=3, channels_last=True),
    'pit_ti': dict(label='SimSiam, PiT-Ti', net=dict(name='pit_ti_224'), bs=128, steps=3, channels_last=False),
    'narrow64': dict(label='SimSiam, narrow ResNet-18 at 64 px', net=dict(name='resnet18', channels=(16,32,64,128), stem_width=16),
                     bs=64, steps=4, size=64, channels_last=True),
    'resnet18_224': dict(label='SimSiam, ResNet-18 at 224 px', net=dict(name='resnet18'), bs=16, steps=1, size=224, channels_last=True)}
TABLES = {'as shipped': ('ours','resident loop','tutorial loop','lightly'), 'equal': ('ours','resident loop','tutorial loop','lightly')}


# ---- a contestant: a function that makes `n` training steps

def pictures(n, size):
    "Images of the packaged sample, enlarged where they are to be larger"
    import torch.nn.functional as F
    from ssl_nb.data import cifar10_sample
    x = cifar10_sample()[0].x[:n]
    return x if size == 32 else F.interpolate(x.float(), size=size, mode='bilinear').round().to(x.dtype)

def endless(loader):
    while True: yield from loader

def new_net(name, tiny):
    "The net that all contestants train, from the same weights"
    import torch
    from torch import nn
    from ssl_nb.backbones import backbone
    from ssl_nb.heads import linear_head, predictor, projector
    from ssl_nb.nets import NIN, feature_shape
    from ssl_nb.methods.simsiam import SimSiam
    torch.manual_seed(0)
    if name == 'nin':
        trunk = NIN(16 if tiny else 192)
        return nn.Sequential(trunk, linear_head(feature_shape(trunk), 4))
    size = NETS[name].get('size', 32)
    trunk = backbone(size=size, **NETS[name]['net'])
    width = 64 if tiny else 2048
    return SimSiam(trunk, projector(feature_shape(trunk, size=size)[0], width), predictor(width))

def optimiser(net, name, bs):
    import torch
    kwargs = dict(lr=.02, nesterov=True) if name == 'nin' else dict(lr=.03*bs/256)
    return torch.optim.SGD(net.parameters(), momentum=.9, weight_decay=5e-4, **kwargs)

def ours(name, bs, precision, tiny):
    import torch
    from fastai.callback.core import Callback, CancelFitException
    from ssl_nb.data import Images, image_dls
    from ssl_nb.methods.rotation import rotnet_learner
    from ssl_nb.methods.simsiam import simsiam_learner
    import ssl_nb.fast
    size,net = NETS[name].get('size', 32), new_net(name, tiny)
    images = Images(pictures(4500 if size == 32 else 640, size))
    dls = image_dls(images, images.subset(slice(0, bs)), bs, device='cpu')
    class Steps(Callback):
        "Stop after so many; the fit goes on with the next call"
        order,run_valid = 90, False
        def after_batch(self):
            self.left -= 1
            if self.left == 0: raise CancelFitException()
    steps = Steps()
    if name == 'nin': learn = rotnet_learner(dls, net[0], cbs=steps)
    else:
        learn = simsiam_learner(dls, net.trunk, size=size, channels_last=NETS[name]['channels_last'], cbs=steps, width=64 if tiny else None)
        learn.model.load_state_dict(net.state_dict())
    learn.fast(precision, say=None)
    def run(n):
        steps.left = n
        with learn.no_bar(), learn.no_logging(): learn.fit(10**6)
    return run, dict(precision=learn.precision, why=learn.fast_step.why)

def resident(name, bs, precision, tiny):
    "The loop of somebody who knows: images in one tensor, views of a batch at once, channels-last"
    import torch
    import torch.nn.functional as F
    from ssl_nb.augment import crop_augment, view_augment
    from ssl_nb.methods.simsiam import simsiam_loss
    size,net = NETS[name].get('size', 32), new_net(name, tiny)
    if NETS[name].get('channels_last', True): net = net.to(memory_format=torch.channels_last)
    opt,x,y = optimiser(net, name, bs), pictures(4500 if size == 32 else 640, size), torch.arange(4).repeat_interleave(bs)
    view = crop_augment()[0] if name == 'nin' else view_augment(size)[0]
    batches = endless_batches(len(x), bs)
    def step():
        b = x[next(batches)]
        views = [torch.cat([torch.rot90(b, k, (2,3)) for b in [view(b)] for k in range(4)])] if name == 'nin' else view(torch.cat([b, b])).chunk(2)
        with half(precision): out = net(*views)
        loss = F.cross_entropy(out.float(), y) if name == 'nin' else simsiam_loss(*(o.float() for o in out))
        loss.backward(); opt.step(); opt.zero_grad()
    return many(step), dict(precision=precision)

def endless_batches(n, bs):
    import torch
    while True: yield from (i for i in torch.randperm(n).split(bs) if len(i) == bs)

def half(precision):
    import torch
    return torch.autocast('cpu', torch.bfloat16) if precision == 'bf16' else nullcontext()

def many(step):
    def run(n):
        for _ in range(n): step()
    return run

def tutorial(name, bs, precision, tiny):
    "The loop of a tutorial: a `DataLoader` with PIL transforms and two workers, contiguous memory"
    import torch
    import torch.nn.functional as F
    import torchvision.transforms as T
    import torchvision.transforms.functional as TF
    from ssl_nb.augment import CIFAR10_STATS
    from ssl_nb.methods.simsiam import simsiam_loss
    size,net = NETS[name].get('size', 32), new_net(name, tiny)
    pils = [TF.to_pil_image(im) for im in pictures(4500 if size == 32 else 640, size)]
    end = [T.ToTensor(), T.Normalize(*CIFAR10_STATS)]
    blur = [T.RandomApply([T.GaussianBlur(size//20*2+1, (.1,2.))], .5)] if size > 32 else []
    one = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *end]) if name == 'nin' else \
        T.Compose([T.RandomResizedCrop(size, (.2,1.)), T.RandomHorizontalFlip(),
                   T.RandomApply([T.ColorJitter(.4,.4,.4,.1)], .8), T.RandomGrayscale(.2), *blur, *end])
    class Set(torch.utils.data.Dataset):
        def __len__(self): return len(pils)
        def __getitem__(self, i): return one(pils[i]) if name == 'nin' else (one(pils[i]), one(pils[i]))
    loader = endless(torch.utils.data.DataLoader(Set(), bs, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True))
    opt,y = optimiser(net, name, bs), torch.arange(4).repeat_interleave(bs)
    def step():
        b = next(loader)
        with half(precision): out = net(torch.cat([torch.rot90(b, k, (2,3)) for k in range(4)])) if name == 'nin' else net(*b)
        loss = F.cross_entropy(out.float(), y) if name == 'nin' else simsiam_loss(*(o.float() for o in out))
        loss.backward(); opt.step(); opt.zero_grad(); loss.item()
    return many(step), dict(precision=precision, workers=2)

def lightly(name, bs, precision, tiny, workers=2):
    "lightly's transform, data set, collate function, heads and loss, as in its example for SimSiam, with two workers"
    import torch
    import torchvision.transforms.functional as TF
    from lightly.data import LightlyDataset, MultiViewCollate
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import ProjectionHead, SimSiamPredictionHead
    from lightly.transforms import SimSiamTransform
    from torch import nn
    from ssl_nb.augment import CIFAR10_STATS
    size,net = NETS[name].get('size', 32), new_net(name, tiny)
    first,last = net.projector[0], net.predictor[0]
    w = first.out_features
    proj = ProjectionHead([(first.in_features, w, nn.BatchNorm1d(w), nn.ReLU(inplace=True)), (w, w, nn.BatchNorm1d(w, affine=False), None)])
    pred = SimSiamPredictionHead(w, last.out_features, w)
    for theirs,mine in ((proj,net.projector), (pred,net.predictor)): theirs.layers.load_state_dict(mine.state_dict())
    body = getattr(net.trunk, 'model', net.trunk)
    class Pils(torch.utils.data.Dataset):
        transform,items = None, [TF.to_pil_image(im) for im in pictures(4500 if size == 32 else 640, size)]
        def __len__(self): return len(self.items)
        def __getitem__(self, i): return self.transform(self.items[i]), 0
    tfm = SimSiamTransform(input_size=size, gaussian_blur=.5 if size > 32 else 0., normalize=dict(zip(('mean','std'), CIFAR10_STATS)))
    data = LightlyDataset.from_torch_dataset(Pils(), transform=tfm)
    loader = endless(torch.utils.data.DataLoader(data, bs, shuffle=True, drop_last=True, num_workers=workers,
                                                 persistent_workers=workers > 0, collate_fn=MultiViewCollate()))
    params = nn.ModuleList([body, proj, pred]).train()
    opt,crit = optimiser(params, name, bs), NegativeCosineSimilarity()
    def step():
        (x0,x1),_,_ = next(loader)
        with half(precision): z0,z1 = (proj(body(x).flatten(start_dim=1)) for x in (x0,x1)); p0,p1 = pred(z0), pred(z1)
        loss = .5*(crit(z0.detach().float(), p1.float()) + crit(z1.detach().float(), p0.float()))
        loss.backward(); opt.step(); opt.zero_grad()
    return many(step), dict(precision=precision, workers=workers)

CONTESTANTS = {'ours': ours, 'resident loop': resident, 'tutorial loop': tutorial, 'lightly': lightly}

def worker(a):
    "Make the steps that are asked for on standard input, a number a line, and print the seconds that each took"
    import torch
    torch.set_num_threads(a.threads)
    from ssl_nb.device import keep_memory, machine
    run,how = CONTESTANTS[a.contestant](a.net, a.bs, a.precision, a.tiny)
    run(1)
    if a.keep: keep_memory()
    run(1)
    print(json.dumps(dict(how, machine=machine('cpu'))), flush=True)
    for line in sys.stdin:
        t = time.perf_counter(); run(int(line)); print(json.dumps(dict(seconds=time.perf_counter()-t, peak_mb=peak_mb())), flush=True)

def peak_mb():
    "Peak resident memory of this process"
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)


# ---- the referee

class Player:
    "A contestant's process"
    def __init__(self, a, net, contestant, precision, keep, bs=0):
        args = ['--worker', '--net', net, '--contestant', contestant, '--precision', precision,
                '--bs', str(8 if a.tiny else bs or NETS[net]['bs']), '--threads', str(a.threads)]
        env = {**os.environ, 'OMP_NUM_THREADS': str(a.threads), **({} if keep else {'SSL_NB_ALLOCATOR': 'system'})}
        self.p = subprocess.Popen([sys.executable, __file__, *args, *(['--keep'] if keep else []), *(['--tiny'] if a.tiny else [])],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.how = self.read()

    def read(self):
        line = self.p.stdout.readline()
        if not line: raise SystemExit(f'{self.p.args} ended before its turn')
        return json.loads(line)

    def turn(self, steps): self.p.stdin.write(f'{steps}\n'); self.p.stdin.flush(); return self.read()
    def end(self): self.p.stdin.close(); self.p.wait()

def play(a, net, who):
    "Rounds in shuffled order: name -> seconds a step and peak memory; and how each computed"
    players,rng = {n: Player(a, net, *args) for n,args in who.items()}, random.Random(0)
    secs,peak,steps = {n: [] for n in players}, {}, 1 if a.tiny else NETS[net]['steps']
    for r in range(a.rounds):
        for n in rng.sample(list(players), len(players)):
            t = players[n].turn(steps)
            secs[n].append(round(t['seconds']/steps, 5)); peak[n] = t['peak_mb']
        print(f'  round {r+1}/{a.rounds}: ' + ', '.join(f'{n} {v[-1]:.2f}' for n,v in secs.items()), flush=True)
    how = {n: p.how for n,p in players.items()}
    for p in players.values(): p.end()
    return secs, peak, how

def limit(precision, threads):
    "GFLOP/s of a product of two matrices of 2048"
    import torch
    torch.set_num_threads(threads)
    a = torch.randn(2048, 2048, dtype=torch.bfloat16 if precision == 'bf16' else torch.float32)
    times = []
    for _ in range(8):
        t = time.perf_counter(); a@a; times.append(time.perf_counter()-t)
    return round(2*2048**3/min(times)/1e9)

def flops(net):
    "Operations of a step's products for one image or view: three times those of the forward pass"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    model,size = new_net(net, False).eval(), NETS[net].get('size', 32)
    x = torch.randn(2, 3, size, size)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # attention as two products, which can be counted
    with plain, FlopCounterMode(display=False) as f: model(x) if net == 'nin' else model(x, x)
    return 3*f.get_total_flops()/(2 if net == 'nin' else 4)

def save(a, run, **out):
    from ssl_nb.device import machine
    from ssl_nb.results import save_result
    save_result(dict(study='speed', run=run, name=run, kind='speed', protocol='best',
                     scale='tiny' if a.tiny else 'small', seed=0, history=[], machine=machine('cpu'), commit=a.commit, **out), a.out)

def compare(a, net):
    start = time.time()
    secs,peak,how = {}, {}, {}
    for table,names in TABLES.items():
        names = [n for n in names if n != 'lightly' or net != 'nin']
        precision = 'float32' if table == 'as shipped' else how['as shipped']['ours']['precision']
        who = {n: (n, 'auto' if (n,table) == ('ours','as shipped') else precision, table == 'equal' or n == 'ours') for n in names}
        print(f'{NETS[net]["label"]}, {table}', flush=True)
        secs[table],peak[table],how[table] = play(a, net, who)
    products = {p: limit(p, a.threads) for p in ('float32','bf16')}
    save(a, f'cpu-{net}', data=dict(name='sample'),
         config=dict(label=NETS[net]['label'], bs=NETS[net]['bs'], views=4 if net == 'nin' else 2, size=NETS[net].get('size', 32),
                     rounds=a.rounds, steps=NETS[net]['steps'], threads=a.threads),
         metrics=dict(seconds_a_step=secs, peak_mb=peak, how=how, gflops_a_view=flops(net)/1e9, products_gflops=products), seconds=round(time.time()-start, 1))

def memory(a):
    "Rate and peak memory with the system's allocator and with memory that is kept"
    start,rows = time.time(), {}
    cases = [('nin', p, bs) for bs in (128,32) for p in ('float32','bf16')] + [('resnet18','float32',128), ('resnet18_224','float32',16)]
    for net,precision,bs in cases:
        who = {'system': ('ours', precision, False, bs), 'kept': ('ours', precision, True, bs)}
        name = f"{NETS[net]['label']}, {bs}{' x 4' if net == 'nin' else ''} images, {precision}"
        print(name, flush=True)
        secs,peak,_ = play(a, net, who)
        rows[name] = {k: dict(seconds_a_step=secs[k], peak_mb=peak[k]) for k in who}
    save(a, 'cpu-memory', data=dict(name='sample'), config=dict(rounds=a.rounds, threads=a.threads), metrics=rows, seconds=round(time.time()-start, 1))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', default='results/speed', help='folder for result files')
    p.add_argument('--net', default='', help=f'one of {", ".join(NETS)}; by default all')
    p.add_argument('--rounds', type=int, default=5); p.add_argument('--threads', type=int, default=os.cpu_count()); p.add_argument('--bs', type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument('--tiny', action='store_true', help='small nets, to see whether it runs')
    p.add_argument('--memory', action='store_true', help="the allocator's setting instead")
    for hidden in ('--worker','--keep'): p.add_argument(hidden, action='store_true', help=argparse.SUPPRESS)
    for hidden in ('--contestant','--precision'): p.add_argument(hidden, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker: return worker(a)
    if a.net and a.net not in NETS: raise SystemExit(f'--net {a.net}: choose one of {", ".join(NETS)}')
    from ssl_nb.fitting import git_commit
    from ssl_nb.results import check_commit
    a.commit = git_commit()
    check_commit(a.out, a.commit)  # better now than after an hour
    if a.memory: return memory(a)
    for net in [a.net] if a.net else list(NETS)[:-1]: compare(a, net)  # the last one is for --memory

if __name__ == '__main__': main()
