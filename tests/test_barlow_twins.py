"Barlow Twins: the cross-correlation and its two sums, lambda, float32, and what each half of the loss is for"
import warnings

import numpy as np
import pytest
import torch

from ssl_nb.data import InputError, cifar10_sample, image_dls
from ssl_nb.method import get_method
from ssl_nb.methods.barlow_twins import barlow_learner, barlow_loss, cross_correlation
from ssl_nb.nets import NIN

TRAIN, TEST = cifar10_sample()


def few(n=64): return TRAIN.subset(slice(0, n))


def pair(n=32, d=8):
    torch.manual_seed(0)
    z = torch.randn(n, d)
    return z + .5*torch.randn(n, d), z + .5*torch.randn(n, d)


def test_the_matrix_is_that_of_numpy():
    z1, z2 = pair()
    c = np.corrcoef(z1.numpy(), z2.numpy(), rowvar=False)[:8, 8:]
    assert np.allclose(cross_correlation(z1, z2).numpy(), c, atol=1e-4)


@pytest.mark.parametrize('lam', [0., 5e-3, .5, 1.])
def test_lambda_weighs_what_is_beside_the_diagonal_and_nothing_else(lam):
    z1, z2 = pair()
    c = cross_correlation(z1, z2)
    on = sum((c[i, i]-1)**2 for i in range(8))
    off = sum(c[i, j]**2 for i in range(8) for j in range(8) if i != j)
    assert torch.allclose(barlow_loss(z1, z2, lam), on + lam*off, atol=1e-5)


def test_lambda_is_applied_to_the_gradient_too():
    z1, z2 = pair()
    grads = []
    for lam in (0., 1., 2.):
        z = z1.clone().requires_grad_()
        barlow_loss(z, z2, lam).backward()
        grads.append(z.grad)
    assert torch.allclose(grads[2]-grads[0], 2*(grads[1]-grads[0]), atol=1e-5) and (grads[1]-grads[0]).abs().max() > 1e-3


def test_size_and_mean_of_a_number_do_not_count():
    z1, z2 = pair()
    assert torch.allclose(barlow_loss(7*z1 + 3, z2), barlow_loss(z1, z2), atol=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_float32_comes_out(dtype):
    z1, z2 = (1000*z.to(dtype).requires_grad_() for z in pair(256, 32))
    z1.retain_grad()
    loss = barlow_loss(z1, z2)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z1.grad.isfinite().all()
    assert torch.allclose(loss, barlow_loss(z1.detach().float(), z2.detach().float()))


def test_autocast_does_not_touch_it():
    z1, z2 = pair()
    with torch.autocast('cpu', torch.bfloat16): half = barlow_loss(z1, z2)
    assert torch.equal(half, barlow_loss(z1, z2))


@pytest.mark.parametrize('n, lam', [(4, 5e-3), (32, 5e-3), (32, .1)])
def test_lightly_gives_the_same_loss_and_gradients(n, lam):
    theirs = pytest.importorskip('lightly.loss', reason='lightly is not installed: pip install lightly').BarlowTwinsLoss(lam)
    a = [z.requires_grad_() for z in pair(n, 16)]
    b = [z.detach().clone().requires_grad_() for z in a]
    x, y = barlow_loss(*a, lam), theirs(*b)
    x.backward(); y.backward()
    assert torch.allclose(x, y, atol=1e-5) and all(torch.allclose(z.grad, w.grad, atol=1e-5) for z, w in zip(a, b))


def fitted(loss=None, **kwargs):
    "A short fit, and whether a collapse was warned of"
    torch.manual_seed(0)
    learn = barlow_learner(image_dls(few(400), TEST.subset(slice(0, 100)), bs=50, device='cpu'), NIN(16), **kwargs)
    learn.pairs.compare = loss or learn.pairs.compare
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        get_method('barlow_twins').fit(learn, 8)
    return learn, any('collapse' in str(w.message) for w in said)


def test_a_fit_does_not_collapse_and_without_lambda_it_does():
    assert [fitted(**kwargs)[1] for kwargs in (dict(lr=.004), dict(lam=0., lr=.004))] == [False, True]


def test_settings_reach_the_loss_the_heads_and_the_rate():
    dls = image_dls(few(), few(), bs=16, device='cpu')
    one, two = barlow_learner(dls, NIN(16)), barlow_learner(dls, NIN(16), accumulate=2, lam=.1, width=24)
    assert two.lr == pytest.approx(2*one.lr) and one.lr == pytest.approx(get_method('barlow_twins').rate(16))
    assert two.pairs.compare.keywords == dict(lam=.1) and two.pairs.whole
    assert [m.out_features for m in two.model.projector if hasattr(m, 'out_features')] == [24]*3
    for lam in (-1, float('nan')):
        with pytest.raises(InputError, match='give 0 or more'): barlow_learner(dls, NIN(16), lam=lam)
