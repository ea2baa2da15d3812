"VICReg: three terms, the half of the variance, float32, and what becomes of it without the variance"
import warnings

import pytest
import torch

from ssl_nb.data import InputError, cifar10_sample, image_dls
from ssl_nb.method import get_method
from ssl_nb.methods.vicreg import vicreg_learner, vicreg_loss, vicreg_terms
from ssl_nb.nets import NIN

TRAIN, TEST = cifar10_sample()


def few(n=64): return TRAIN.subset(slice(0, n))


def pair(n=32, d=8, scale=.6):
    torch.manual_seed(0)
    z = torch.randn(n, d)
    return scale*(z + .5*torch.randn(n, d)), scale*(z + .5*torch.randn(n, d))


def by_the_book(z1, z2):
    "s, v(Z) + v(Z') and c(Z) + c(Z') of equations 1 to 5, number by number"
    n, d = z1.shape
    s = sum(((a-b)**2).sum() for a, b in zip(z1, z2))/n
    v = sum(sum(max(0, 1 - float(((z[:, j] - z[:, j].mean())**2).sum()/(n-1) + 1e-4)**.5) for j in range(d))/d for z in (z1, z2))
    c = 0
    for z in (z1, z2):
        cov = sum(torch.outer(a, a) for a in z - z.mean(0))/(n-1)
        c += sum(cov[i, j]**2 for i in range(d) for j in range(d) if i != j)/d
    return float(s), v, float(c)


def test_the_terms_are_those_of_the_paper_but_for_two_factors():
    z1, z2 = pair()
    s, v, c = by_the_book(z1, z2)
    assert [float(t) for t in vicreg_terms(z1, z2)] == pytest.approx([s/8, v/2, c], abs=1e-5)


def test_the_variance_is_halved_as_in_the_authors_code():
    same = torch.ones(4, 2)
    assert float(vicreg_terms(same, same)[1]) == pytest.approx(.99)
    assert float(vicreg_loss(same, same)) == pytest.approx(25*.99)
    s, v, c = by_the_book(*pair())
    assert float(vicreg_loss(*pair(), sim=8*25., var=50.)) == pytest.approx(25*s + 25*v + c, abs=1e-3)  # the paper's equation 6


@pytest.mark.parametrize('k, name', [(0, 'sim'), (1, 'var'), (2, 'cov')])
def test_each_weight_is_that_of_its_term(k, name):
    weights = {n: float(n == name) for n in ('sim', 'var', 'cov')}
    assert torch.equal(vicreg_loss(*pair(), **weights), vicreg_terms(*pair())[k])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_float32_comes_out(dtype):
    z1, z2 = (z.to(dtype).requires_grad_() for z in pair(256, 32, scale=300.))  # whose squares are no halves
    loss = vicreg_loss(z1, z2)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z1.grad.isfinite().all()
    assert torch.allclose(loss, vicreg_loss(z1.detach().float(), z2.detach().float()))


def test_autocast_does_not_touch_it():
    with torch.autocast('cpu', torch.bfloat16): half = vicreg_loss(*pair())
    assert torch.equal(half, vicreg_loss(*pair()))


def test_gradients_of_a_collapsed_net_are_numbers():
    z = torch.ones(4, 3, requires_grad=True)
    vicreg_loss(z, z.detach()).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize('n, weights', [(4, (25., 25., 1.)), (32, (25., 25., 1.)), (32, (1., 2., 3.))])
def test_lightly_gives_the_same_loss_and_gradients(n, weights):
    theirs = pytest.importorskip('lightly.loss', reason='lightly is not installed: pip install lightly').VICRegLoss(*weights)
    a = [z.requires_grad_() for z in pair(n, 16)]
    b = [z.detach().clone().requires_grad_() for z in a]
    x, y = vicreg_loss(*a, *weights), theirs(*b)
    x.backward(); y.backward()
    assert torch.allclose(x, y, atol=1e-5) and all(torch.allclose(z.grad, w.grad, atol=1e-5) for z, w in zip(a, b))


@pytest.mark.parametrize('var', [25., 0.])
def test_without_the_variance_it_collapses(var):
    torch.manual_seed(0)
    learn = vicreg_learner(image_dls(few(400), TEST.subset(slice(0, 100)), bs=50, device='cpu'), NIN(16), var=var)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        get_method('vicreg').fit(learn, 8)
    assert any('collapse' in str(w.message) for w in said) == (var == 0)


def test_settings_reach_the_loss_the_heads_and_the_rate():
    dls = image_dls(few(), few(), bs=16, device='cpu')
    one, two = vicreg_learner(dls, NIN(16)), vicreg_learner(dls, NIN(16), accumulate=2, var=50., width=24)
    assert two.lr == pytest.approx(2*one.lr) and one.lr == pytest.approx(get_method('vicreg').rate(16))
    assert two.pairs.compare.keywords == dict(sim=25., var=50., cov=1.) and two.pairs.whole
    assert [m.out_features for m in two.model.projector if hasattr(m, 'out_features')] == [24]*3
    for bad in (dict(sim=-1), dict(var=-1), dict(cov=float('nan'))):
        with pytest.raises(InputError, match='give weights of 0 or more'): vicreg_learner(dls, NIN(16), **bad)
