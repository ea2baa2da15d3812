"Images of one channel: the same views as three equal channels give, and both pretext tasks and the transfer on them"
import warnings

import pytest
import torch
from conftest import one_line_error
from safetensors.torch import save_file

from ssl_nb.augment import Augment, Blur, ColorJitter, Flip, Greyscale, Normalize, PadCrop, ResizedCrop, color_jitter, grey, crop_augment, shift_hue, view_augment
from ssl_nb.backbones import backbone
from ssl_nb.data import Images, cifar10_sample, image_dls, show_grid
from ssl_nb.neighbours import knn_accuracy
from ssl_nb.nets import NIN, feature_shape, nin
from ssl_nb.methods.rotation import rotate, rotated_images, rotnet_learner
from ssl_nb.methods.simsiam import simsiam_learner
from ssl_nb.siamese import CollapseMonitor
from ssl_nb.transfer import cache_features, set_bn_statistics, transfer_learner

STATS = (.48,), (.24,)
NETS = {'resnet18': dict(channels=[8, 8, 16, 16]), 'efficientnet_b0': {}, 'vit_small_patch16_224': dict(embed_dim=32, depth=4, num_heads=2), 'pit_ti_224': dict(base_dims=[8, 8, 8], depth=[1, 1, 1])}


def grey_part(images, n):
    return Images(grey(images.x[:n].float()).round().to(torch.uint8), images.y[:n], images.vocab, f'{images.name}, grey')


@pytest.fixture(scope='module')
def sets(): return tuple(grey_part(im, 96) for im in cifar10_sample())


def three(x): return x.expand(-1, 3, *x.shape[2:])


def views(tfm, x, seed):
    torch.manual_seed(seed)
    return tfm(x)


def quiet_fit(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n, **kwargs)
    assert all(v == v for v in learn.recorder.values[-1])
    return learn


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('tfm', [PadCrop(4), Flip(), ResizedCrop(24), ColorJitter(p=1.), Greyscale(.5), Blur(p=.5, kernel=5)], ids=lambda t: type(t).__name__)
def test_a_grey_image_goes_the_way_of_three_equal_channels(sets, tfm, seed):
    x = sets[0].x[:40]
    one, all3 = views(tfm, x, seed), views(tfm, three(x), seed)
    assert one.shape[1] == 1 and one.dtype == all3.dtype
    torch.testing.assert_close(three(one), all3, atol=1e-3, rtol=0)  # the weights of the luma add up to .9999


@pytest.mark.parametrize('make', [crop_augment, lambda **k: view_augment(32, **k), lambda **k: view_augment(40, **k)], ids=['rotnet', 'simsiam', 'simsiam-blurred'])
def test_recipes_too(sets, make):
    x = sets[0].x[:40]
    for k in (0, 1):  # training, measuring
        one = views(make(stats=STATS)[k], x, 0)
        assert one.shape[1] == 1
        torch.testing.assert_close(three(one), views(make(stats=tuple(s*3 for s in STATS))[k], three(x), 0), atol=4e-3, rtol=0)


def test_brightness_and_contrast_act_and_the_rest_does_not(sets):
    x, n = sets[0].x[:8]/255, torch.zeros(8)
    jitter = lambda f, shift=0.: color_jitter(x, torch.tensor(f).expand(8, 3), n + shift, torch.arange(4).expand(8, 4))
    torch.testing.assert_close(jitter([.5, 1., 1.]), x/2)
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(jitter([1., .5, 1.]), (x + mean)/2)
    torch.testing.assert_close(jitter([1., 1., .2], .4), x)
    assert shift_hue(x, n + .3) is x and torch.equal(Greyscale(1.)(x), x)


@pytest.mark.parametrize('recipe', [crop_augment()[0], crop_augment('report')[1], *view_augment(32)], ids=str)
def test_statistics_of_another_number_of_channels_are_refused(sets, recipe):
    one_line_error(lambda: recipe(sets[0].x[:4]), 'images of 1 channel,', 'of 3', 'stats=((.5,), (.25,))')


def test_other_numbers_of_channels_are_refused(sets):
    x = sets[0].x[:4]
    one_line_error(lambda: Normalize(*STATS)(three(x)), 'images of 3 channels', 'of 1')
    one_line_error(lambda: ColorJitter()(x.expand(-1, 4, -1, -1)), 'images of 4 channels')
    four = (.5,)*4, (.25,)*4
    assert crop_augment(stats=four)[0](x.expand(-1, 4, -1, -1)).shape[1] == 4  # no colours: any number goes
    one_line_error(lambda: rotnet_learner(image_dls(*sets, bs=32, device='cpu'), NIN(16, channels=1)).fit(1), 'images of 1 channel,')


def test_shown_as_they_are(sets):
    dark = torch.full((1, 1, 8, 8), 30, dtype=torch.uint8)
    for x, top in ((dark, 255), (dark/255, 1)):
        shown = show_grid(x)[0, 0].images[0]
        assert shown.get_clim() == (0, top) and shown.cmap.name == 'gray'
    assert len(sets[0].show(4)[0]) == 8


def test_nets_of_one_channel():
    x = torch.zeros(2, 1, 32, 32)
    for make in (NIN, nin): assert feature_shape(make(width=16, channels=1)) == tuple(make(width=16, channels=1)(x).shape[1:])
    assert NIN(16, channels=1).recipe['channels'] == 1  # so that its weights come back into such a net
    assert feature_shape(nin('report', width=16, channels=1)) == feature_shape(nin('report', width=16)) == (16, 4, 4)


@pytest.mark.parametrize('size', [32, 96])
@pytest.mark.parametrize('name', NETS)
def test_backbones_of_one_channel(name, size):
    trunk = backbone(name, size, in_chans=1, **NETS[name])
    x = torch.randn(2, 1, size, size)
    with torch.no_grad(): shapes = [tuple(f.shape[1:]) for f in trunk.eval().each(x)]
    assert shapes == [feature_shape(trunk, k, size) for k in range(1, len(shapes)+1)]
    assert shapes == [feature_shape(backbone(name, size, **NETS[name]), k, size) for k in range(1, len(shapes)+1)]


def test_weights_of_one_channel_come_back(tmp_path):
    kwargs = dict(channels=[8, 8, 16, 16])
    trunk = backbone('resnet18', 32, in_chans=1, **kwargs)
    save_file(trunk.state_dict(), tmp_path/'grey.safetensors')
    again = backbone('resnet18', 32, tmp_path/'grey.safetensors', in_chans=1, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(trunk.state_dict().values(), again.state_dict().values()))
    one_line_error(lambda: backbone('resnet18', 32, tmp_path/'grey.safetensors', **kwargs), 'grey.safetensors')


@pytest.mark.parametrize('turns', [2, 4, 8])
def test_turns(sets, turns):
    out = rotate(sets[0].x[:3], turns)
    assert out.shape == (3*turns, 1, 32, 32)
    torch.testing.assert_close(three(out), rotate(three(sets[0].x[:3]), turns))


@pytest.mark.parametrize('trunk', [lambda: NIN(16, channels=1), lambda: backbone('resnet18', 32, in_chans=1, channels=[8, 8, 16, 16])], ids=['nin', 'resnet18'])
def test_rotations_are_learned_and_the_blocks_transferred(sets, trunk):
    torch.manual_seed(0)
    trunk, augment = trunk(), crop_augment(stats=STATS)
    learn = quiet_fit(rotnet_learner(image_dls(*sets, bs=32, device='cpu'), trunk, augment=augment))
    assert learn.get_preds()[0].shape == (96, 4)
    set_bn_statistics(trunk, sets[0], augment[1])
    assert cache_features(trunk, sets[1], augment[1], 2).x.shape == (96, *feature_shape(trunk, 2))
    for mode in ('cached', 'frozen', 'finetune'): quiet_fit(transfer_learner(trunk, *sets, mode=mode, head='linear', bs=32, augment=augment, device='cpu'))
    quiet_fit(transfer_learner(trunk, *sets, bs=32, augment=augment, passes=2, device='cpu'))
    one_line_error(lambda: transfer_learner(trunk, *sets, device='cpu'), 'images of 1 channel,')


def test_all_turns_as_a_set_of_their_own(sets):
    parts = [rotated_images(im.subset(slice(0, 16))) for im in sets]
    quiet_fit(rotnet_learner(image_dls(*parts, bs=16, device='cpu'), NIN(16, channels=1), augment=crop_augment('report', STATS), rotated=True))


@pytest.mark.parametrize('name', NETS)
def test_views_are_compared_and_the_trunk_transferred(sets, name):
    torch.manual_seed(0)
    trunk, augment = backbone(name, 32, in_chans=1, **NETS[name]), view_augment(32, STATS)
    learn = simsiam_learner(image_dls(*sets, bs=32, device='cpu'), trunk, augment=augment, width=32, monitor=CollapseMonitor(*sets), channels_last=False)
    quiet_fit(learn)
    assert 0 <= dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['knn'] <= 1
    feats = [cache_features(trunk, im, augment[1]) for im in sets]
    assert 0 <= knn_accuracy(*feats) <= 1
    quiet_fit(transfer_learner(trunk, *sets, upto=None, head='linear', mode='finetune', bs=32, augment=augment, device='cpu'), lr=1e-3)


def test_the_callback_alone(sets):
    from fastai.learner import Learner
    from torch import nn
    learn = Learner(image_dls(*sets, bs=32, device='cpu'), nn.Sequential(nn.Flatten(), nn.Linear(32*32, 10)), cbs=Augment(*crop_augment(stats=STATS)))
    quiet_fit(learn)
