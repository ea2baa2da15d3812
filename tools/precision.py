"""Is what bf16 learns as good as what float32 learns? Three seeds of RotNet and of SimSiam, same data and steps

    python tools/precision.py --out results/speed    # about ten minutes on two cores
    python tools/precision.py --out /tmp/x --tiny    # does it run?"""
import argparse
import time
import warnings

warnings.filterwarnings('ignore')

import torch

from ssl_nb.augment import crop_augment
from ssl_nb.backbones import backbone
from ssl_nb.data import Images, cifar10_sample, image_dls, label_fraction
from ssl_nb.device import machine
from ssl_nb.evaluate import linear_probe, predict
from ssl_nb.neighbours import knn_accuracy, pool
from ssl_nb.nets import NIN
from ssl_nb.methods.rotation import rotnet_learner
from ssl_nb.schedule import *  # `fit_cosine`
from ssl_nb.methods.simsiam import simsiam_learner
from ssl_nb.fast import *  # `learn.fast`
from ssl_nb.fitting import git_commit
from ssl_nb.results import check_commit, save_result
from ssl_nb.transfer import transfer_learner

SIZES = {False: dict(width=32, channels=(16,32,64,128), rotnet=6, simsiam=10, train=4500, heads=6),
         True: dict(width=8, channels=(8,8,8,8), rotnet=1, simsiam=1, train=200, heads=1)}

def quietly(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn

def features(trunk, images, upto=None): return Images(pool(predict(trunk.upto(upto), images, crop_augment()[1])), images.y)

def rotnet(precision, seed, train, test, s):
    "Rotations told right, kNN after block 2, and a conv head on it with 20 labels per class"
    torch.manual_seed(seed)
    trunk = NIN(s['width'])
    learn = rotnet_learner(image_dls(train.unlabelled(), test.unlabelled(), 32, device='cpu'), trunk).fast(precision, say=None)
    quietly(learn, lambda l: l.fit_one_cycle(s['rotnet'], .1))
    few = label_fraction(train, min(20, len(train)//20), seed=seed)
    torch.manual_seed(seed)
    head = transfer_learner(trunk, few, test, 2, 'conv', bs=min(50, len(few)), steps=50, device='cpu', half=precision == 'bf16').fast(precision, say=None)
    quietly(head, lambda l: l.fit_one_cycle(s['heads'], .1))
    return dict(rotations=learn.recorder.values[-1][2], knn=knn_accuracy(features(trunk, train, 2), features(trunk, test, 2)), head=head.recorder.values[-1][2])

def simsiam(precision, seed, train, test, s):
    "kNN and linear probe after the last block"
    torch.manual_seed(seed)
    trunk = backbone('resnet18', 32, channels=s['channels'], stem_width=s['channels'][0])
    learn = simsiam_learner(image_dls(train.unlabelled(), test.unlabelled(), 64, device='cpu'), trunk, width=512).fast(precision, say=None)
    quietly(learn, lambda l: l.fit_cosine(s['simsiam'], constant=(1,)))
    bank,query = features(trunk, train), features(trunk, test)
    return dict(knn=knn_accuracy(bank, query), linear=linear_probe(bank, query))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', default='results/speed'); p.add_argument('--seeds', type=int, default=3); p.add_argument('--tiny', action='store_true')
    a = p.parse_args()
    commit,start,s = git_commit(), time.time(), SIZES[a.tiny]
    check_commit(a.out, commit)
    train,test = cifar10_sample()
    train,test = train.thin(s['train']), test.thin(100 if a.tiny else None)
    rows = {}
    for name,f in (('RotNet',rotnet), ('SimSiam',simsiam)):
        for precision in ('float32','bf16'):
            for seed in range(a.seeds):
                m = f(precision, seed, train, test, s)
                for k,v in m.items(): rows.setdefault(name, {}).setdefault(k, {}).setdefault(precision, []).append(round(float(v), 4))
                print(name, precision, seed, {k: f'{100*v:.1f}' for k,v in m.items()}, f'{time.time()-start:.0f} s', flush=True)
    save_result(dict(study='speed', run='cpu-precision', name='cpu-precision', kind='precision', protocol='best',
                     scale='tiny' if a.tiny else 'small', seed=0, data=dict(name='sample', train=len(train), test=len(test)),
                     config=dict(s, seeds=a.seeds), metrics=rows, history=[], seconds=round(time.time()-start, 1),
                     machine=machine('cpu'), commit=commit), a.out)

if __name__ == '__main__': main()
