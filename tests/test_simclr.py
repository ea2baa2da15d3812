"NT-Xent: a mean, without the similarity of a view to itself, in float32; what its negatives are for"
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from ssl_nb.data import InputError, cifar10_sample, image_dls
from ssl_nb.method import get_method
from ssl_nb.methods.simclr import nt_xent, simclr_learner
from ssl_nb.nets import NIN

TRAIN, TEST = cifar10_sample()


def few(n=64): return TRAIN.subset(slice(0, n))


def by_the_book(z1, z2, t):
    "Equation 1, term by term, in double precision"
    z = F.normalize(torch.cat([z1, z2]).double(), dim=1)
    n, e = len(z1), lambda i, j: math.exp(float(z[i] @ z[j])/t)
    pairs = [(k, k+n) for k in range(n)] + [(k+n, k) for k in range(n)]
    return sum(-math.log(e(i, j)/sum(e(i, k) for k in range(2*n) if k != i)) for i, j in pairs)/(2*n)


@pytest.mark.parametrize('n, t', [(1, .5), (2, .5), (7, .1), (7, 1.)])
def test_the_loss_is_that_of_the_paper(n, t):
    torch.manual_seed(n)
    z1, z2 = torch.randn(2, n, 5)
    assert float(nt_xent(z1, z2, t)) == pytest.approx(by_the_book(z1, z2, t), abs=1e-5)


def test_it_is_a_mean_and_not_a_sum():
    for n in (2, 8, 64): assert float(nt_xent(torch.ones(n, 3), torch.ones(n, 3))) == pytest.approx(math.log(2*n - 1), abs=1e-5)


def test_a_view_is_no_negative_of_itself():
    "Else a view in its place would cost log(2), and no net could get below"
    z = torch.eye(64)
    assert nt_xent(z, z, .05) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_float32_comes_out(dtype):
    torch.manual_seed(0)
    z1, z2 = (torch.randn(16, 8).to(dtype).requires_grad_() for _ in range(2))
    loss = nt_xent(z1, z2, .05)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z1.grad.isfinite().all() and z1.grad.abs().sum() > 0
    assert torch.allclose(loss, nt_xent(z1.detach().float(), z2.detach().float(), .05))


def test_autocast_does_not_touch_it():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 16, 8)
    with torch.autocast('cpu', torch.bfloat16): half = nt_xent(z1, z2, .05)
    assert torch.equal(half, nt_xent(z1, z2, .05))


@pytest.mark.parametrize('n, t', [(2, .5), (32, .5), (32, .1)])
def test_lightly_gives_the_same_loss_and_gradients(n, t):
    theirs = pytest.importorskip('lightly.loss', reason='lightly is not installed: pip install lightly').NTXentLoss(t)
    torch.manual_seed(0)
    a = [torch.randn(n, 16, requires_grad=True) for _ in range(2)]
    b = [z.detach().clone().requires_grad_() for z in a]
    x, y = nt_xent(*a, t), theirs(*b)
    x.backward(); y.backward()
    assert torch.allclose(x, y, atol=1e-5) and all(torch.allclose(z.grad, w.grad, atol=1e-5) for z, w in zip(a, b))


@pytest.mark.parametrize('negatives', [True, False])
def test_without_negatives_it_collapses(negatives):
    torch.manual_seed(0)
    learn = simclr_learner(image_dls(few(400), TEST.subset(slice(0, 100)), bs=50, device='cpu'), NIN(16), lr=.1)
    if not negatives: learn.pairs.compare = lambda z1, z2: -F.cosine_similarity(z1, z2).mean()
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        get_method('simclr').fit(learn, 3)
    assert any('collapse' in str(w.message) for w in said) != negatives


def test_settings_reach_the_loss_the_heads_and_the_rate():
    dls = image_dls(few(), few(), bs=16, device='cpu')
    one, two = simclr_learner(dls, NIN(16)), simclr_learner(dls, NIN(16), accumulate=2, temperature=.1, width=24)
    assert two.lr == pytest.approx(2*one.lr) and one.lr == pytest.approx(get_method('simclr').rate(16))
    assert two.pairs.compare.keywords == dict(temperature=.1) and two.pairs.whole
    assert [m.out_features for m in two.model.projector if hasattr(m, 'out_features')] == [24, 128]
    for t in (0, -1, float('nan')):
        with pytest.raises(InputError, match='give a number above 0'): simclr_learner(dls, NIN(16), temperature=t)
