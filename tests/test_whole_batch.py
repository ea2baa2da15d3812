"Losses that need the whole batch: two processes with half of it each learn what one learns from all of it"
import json
import os
import runpy
import subprocess
import sys
import warnings

import pytest
import torch

from ssl_nb.distributed import free_port
from ssl_nb.launch import process_env

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='processes that meet as POSIX has them')

WORKER = '''
import json, sys, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch
import torch.distributed as dist
from torch import nn
from ssl_nb.augment import Normalize
from ssl_nb.data import Images, image_dls
from ssl_nb.distributed import *
from ssl_nb.method import *
from ssl_nb.nets import Trunk
from ssl_nb.siamese import *
from ssl_nb.methods.barlow_twins import barlow_loss
from ssl_nb.methods.simclr import nt_xent
from ssl_nb.methods.vicreg import vicreg_loss
folder = Path(sys.argv[1])
rank, world = join_processes(timeout=60)
images = Images(torch.randint(0, 256, (94, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte(), None)
done = {}

def losses():
    "On the same 16 pairs, of which each process has its part"
    for name, loss in dict(simclr=nt_xent, barlow_twins=barlow_loss, vicreg=vicreg_loss).items():
        torch.manual_seed(0)
        weight, x = torch.randn(8, 6).requires_grad_(), torch.randn(2, 16, 8)
        mine = x.view(2, world, 16//world, 8)[:, rank]
        out = loss(*(gather(v @ weight) for v in mine)); out.backward()
        if world > 1: dist.all_reduce(weight.grad)
        done[name] = dict(loss=out.item(), grad=(weight.grad/world).tolist())  # DistributedDataParallel averages

def learner(loss, whole=True):
    torch.manual_seed(0)
    net = TwoViews(Trunk(nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU())), nn.Linear(8, 6))
    dls = image_dls(images.subset(slice(0, 64)), images.subset(slice(64, 94)), bs=16, valid_bs=20, device='cpu')
    return views_learner(dls, net, loss, augment=(Normalize(), Normalize()), whole=whole)

def fit(**kwargs):
    learn = learner(nt_xent, **kwargs)
    with data_parallel(learn), learn.no_bar(), learn.no_logging(): learn.fit(2, .05)
    return dict(losses=[float(l) for l in learn.recorder.losses], valid=[float(v[1]) for v in learn.recorder.values])

losses()
done['fit'], done['parted'] = fit(), fit(whole=False)
if rank == 0:  # as when a run times its steps; the other process is not there to gather with
    learn = learner(nt_xent)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    done['alone'] = [float(l) for l in learn.recorder.losses]
(folder/f'{rank}of{world}.json').write_text(json.dumps(done))
'''


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    "What one process says, and what each of two says"
    out = tmp_path_factory.mktemp('whole')
    (out/'worker.py').write_text(WORKER)
    argv, port = [str(out/'worker.py'), str(out)], free_port()
    env = {'OMP_NUM_THREADS': '1', 'SSL_NB_LAUNCHER': str(os.getpid())}
    procs = [subprocess.Popen([sys.executable, *argv], env={**process_env(k, 2, port), **env}) for k in range(2)]
    with pytest.MonkeyPatch.context() as m, warnings.catch_warnings(): m.setattr(sys, 'argv', argv); runpy.run_path(argv[0])
    assert [p.wait(100) for p in procs] == [0, 0]
    return [json.loads((out/name).read_text()) for name in ('0of1.json', '0of2.json', '1of2.json')]


def near(a, b, eps=1e-5): return torch.allclose(torch.tensor(a), torch.tensor(b), atol=eps, rtol=1e-5)


@pytest.mark.parametrize('name', ['simclr', 'barlow_twins', 'vicreg'])
def test_loss_and_gradients_of_two_processes_are_those_of_one(said, name):
    one, *two = (d[name] for d in said)
    for part in two: assert near(one['loss'], part['loss']) and near(one['grad'], part['grad'])


def test_a_fit_of_two_processes_is_that_of_one(said):
    one, *two = (d['fit'] for d in said)
    for part in two:
        assert near(one['losses'], part['losses'])
        assert near(one['valid'], part['valid'])  # what is measured is gathered once, not twice


def test_without_gathering_it_is_another_loss(said):
    assert not near(said[0]['fit']['losses'], said[1]['parted']['losses'], .05)
    assert near(said[0]['fit']['losses'], said[0]['parted']['losses'])  # in one process there is nothing to gather


def test_a_process_that_fits_alone_waits_for_nobody(said):
    assert near(said[1]['alone'], said[0]['fit']['losses'][:4])
