"""Where a training step on a CPU goes, and what other ways of its parts would gain

    python tools/profile_cpu.py --out results/speed  # every net: about 8 minutes on two cores
    python tools/profile_cpu.py --out /tmp/x --tiny  # does it run?

The step is that of the resident loop of `speed_cpu.py`, in the precision that is faster for the net, with memory that is kept.
Shares come from torch's profiler. A variant changes one thing, and takes turns with the plain step within one process."""
import argparse
import os
import random
import statistics
import time
import warnings

import speed_cpu as S

KINDS = { # what the profiler calls it: the first that fits counts
    'convolutions': ('convolution',), 'other products': ('addmm','::mm','bmm','linear','dot_product','matmul'), 'normalisation': ('norm',),
    'ReLU and other activations': ('threshold','clamp_min','relu','gelu','silu','sigmoid','softmax'), 'pooling': ('pool','mean'), 'optimiser': ('_foreach','Optimizer','_fused')}

def kind(name): return next((k for k,words in KINDS.items() if any(w in name for w in words)), 'the rest')

def shares(step, views, n=3):
    "Part of the time of `n` steps by kind of operation; those within `views` count as views"
    import torch
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        for _ in range(n): step()
    out = {}
    def walk(e, inside):
        inside = inside or e.name == views
        k = 'views' if inside else kind(e.name)
        out[k] = out.get(k, 0)+e.self_cpu_time_total
        for c in e.cpu_children: walk(c, inside)
    for e in p.events():
        if e.cpu_parent is None: walk(e, False)
    total = sum(out.values())
    return {k: round(v/total, 4) for k,v in sorted(out.items(), key=lambda kv: -kv[1])}

def relu_of_integers():
    "ReLU as the larger of 0 and a 16-bit integer, which bf16 numbers order like"
    import torch
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.view(torch.int16).clamp_(min=0).view(x.dtype) if x.dtype == torch.bfloat16 else x.clamp_(min=0)
            ctx.mark_dirty(x); ctx.save_for_backward(x)
            return x
        @staticmethod
        def backward(ctx, g): return torch.ops.aten.threshold_backward(g, ctx.saved_tensors[0], 0)
    class Module(torch.nn.Module):
        def forward(self, x): return Relu.apply(x)
    return Module()

def replace_relus(net, make):
    from torch import nn
    for m in net.modules():
        for name,child in m.named_children():
            if isinstance(child, nn.ReLU): setattr(m, name, make())
    return net

def stepper(name, precision, tiny, change=lambda net: net, narrow=None):
    "A training step of a new net: `change` the net, or make the views `narrow` before it gets them"
    import torch
    import torch.nn.functional as F
    from ssl_nb.augment import crop_augment, view_augment
    from ssl_nb.methods.simsiam import simsiam_loss
    bs,size = 8 if tiny else S.NETS[name]['bs'], S.NETS[name].get('size', 32)
    net = S.new_net(name, tiny)
    if S.NETS[name].get('channels_last', True): net = net.to(memory_format=torch.channels_last)
    opt,x,y = S.optimiser(net, name, bs), S.pictures(4500 if size == 32 else 640, size), torch.arange(4).repeat_interleave(bs)
    net,batches = change(net), S.endless_batches(len(x), bs)
    view = crop_augment()[0] if name == 'nin' else view_augment(size)[0]
    def step():
        with torch.profiler.record_function('views'):
            b = x[next(batches)]
            views = [torch.cat([torch.rot90(b, k, (2,3)) for b in [view(b)] for k in range(4)])] if name == 'nin' else view(torch.cat([b, b])).chunk(2)
            if narrow: views = [v.to(narrow) for v in views]
        with S.half(precision): out = net(*views)
        loss = F.cross_entropy(out.float(), y) if name == 'nin' else simsiam_loss(*(o.float() for o in out))
        loss.backward(); opt.step(); opt.zero_grad()
    return step

def variants(name, precision):
    import torch
    from torch import nn
    out = {'ReLU not in place': dict(change=lambda net: replace_relus(net, nn.ReLU))}
    if name in ('nin','resnet18'): out['compiled'] = dict(change=torch.compile)  # the others take minutes to compile
    if precision == 'bf16': out |= {'ReLU of 16-bit integers': dict(change=lambda net: replace_relus(net, relu_of_integers)),
                                    'views in bf16': dict(narrow=torch.bfloat16)}
    return {k: v for k,v in out.items() if name != 'pit_ti' or 'ReLU' not in k}  # it has none but in its heads

def turns(steppers, rounds, n, seed=0):
    "Seconds a step of each, by round in shuffled order"
    rng,secs = random.Random(seed), {k: [] for k in steppers}
    for _ in range(rounds):
        for k in rng.sample(list(steppers), len(steppers)):
            t = time.perf_counter()
            for _ in range(n): steppers[k]()
            secs[k].append(round((time.perf_counter()-t)/n, 5))
    return secs

def look_at(a, name):
    "Shares and variants of a net"
    from ssl_nb.device import keep_memory
    precision = 'float32' if name in ('efficientnet_b0','pit_ti') else 'bf16'  # what `cpu-NET.json` measured to be faster
    steppers,first = dict(plain=stepper(name, precision, a.tiny)), {}
    for k,v in variants(name, precision).items(): steppers[k] = stepper(name, precision, a.tiny, **v)
    for k in list(steppers):
        t = time.perf_counter()
        try: steppers[k]()
        except Exception as e: print(f'  {k}: {str(e).splitlines()[0]}'); steppers.pop(k); continue  # no compiler here, say
        first[k] = round(time.perf_counter()-t, 2)
    keep_memory()
    for s in steppers.values(): s()
    secs = turns(steppers, a.rounds, 1 if a.tiny else S.NETS[name]['steps'])
    print(f"{S.NETS[name]['label']}: " + ', '.join(f'{k} {statistics.median(v):.3f}' for k,v in secs.items()), flush=True)
    return dict(precision=precision, shares=shares(steppers['plain'], 'views'), seconds_a_step=secs, first_step=first)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', default='results/speed', help='folder for the result file')
    p.add_argument('--rounds', type=int, default=7); p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--tiny', action='store_true', help='small batches, to see whether it runs')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    import torch
    torch.set_num_threads(a.threads)
    from ssl_nb.fitting import git_commit
    from ssl_nb.results import check_commit
    a.commit = git_commit()
    check_commit(a.out, a.commit)
    start,rows = time.time(), {S.NETS[n]['label']: look_at(a, n) for n in list(S.NETS)[:-1]}
    S.save(a, 'cpu-step', data=dict(name='sample'), config=dict(rounds=a.rounds, threads=a.threads), metrics=rows, seconds=round(time.time()-start, 1))

if __name__ == '__main__': main()
