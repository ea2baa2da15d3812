"Weights out and in: the lines that load a file, whose names a file has, and files that are refused"
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from copy import deepcopy

import pytest
import timm
import torch
import torchvision
from conftest import one_line_error
from fastai.callback.schedule import *
from fastai.learner import Learner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_nb.augment import Augment, Normalize
from ssl_nb.backbones import FAMILIES, backbone
from ssl_nb.data import Images, image_dls
from ssl_nb.export import build_trunk, export_weights, load_code, recipe_of
from ssl_nb.heads import linear_head
from ssl_nb.loading import load_any, plain_model, read_tensors
from ssl_nb.neighbours import pool
from ssl_nb.nets import NIN, Trunk, feature_shape
from ssl_nb.weights import load_weights, save_weights

NARROW = {'resnet18': dict(channels=[8, 8, 16, 16]), 'efficientnet_b0': {}, 'vit_small_patch16_224': dict(embed_dim=32, depth=4, num_heads=2), 'pit_ti_224': dict(base_dims=[8, 8, 8], depth=[1, 1, 1])}
CASES = [dict(name=n, size=s) for n in NARROW for s in (32, 224 if n[0] == 'v' else 96)] + [
    dict(name='resnet18', size=32, channels=(16, 32, 64, 128)), dict(name='resnet18', size=64, in_chans=1, **NARROW['resnet18']), dict(name='resnet18', size=63, in_chans=1, **NARROW['resnet18']),
    dict(name='resnet18d', size=32, **NARROW['resnet18']), dict(name='efficientnet_b0', size=32, in_chans=1), dict(name='vit_small_2021', size=32, embed_dim=64), dict(name='vit_small_2021', size=96, embed_dim=64, in_chans=1),
    dict(name='vit_small_patch16_224', size=32, global_pool='avg', **NARROW['vit_small_patch16_224']), dict(name='pit_ti_224', size=96, in_chans=1, **NARROW['pit_ti_224'])]
SMALL = {'mobilenetv3_small_050': {}, 'convnext_atto': dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 'regnetx_002': {}, 'regnetv_040': {},
         'mobileone_s0': {}, 'resnetv2_50': dict(layers=(1, 1, 1, 1), channels=(16, 16, 32, 32)),
         'densenet121': dict(block_config=(1, 1, 1, 1)), 'vit_tiny_patch16_224': dict(depth=4), 'pit_ti_224': NARROW['pit_ti_224'], 'efficientnet_lite0': {}}
EDGES = 32, 63, 64, 96, 100  # a stem that is changed for small images, and patches that are, end somewhere here
CASES += [dict(name=n, size=s, **kw) for n, kw in SMALL.items() for s in EDGES if (n[:3] != 'vit' or s != 100) and (n != 'regnetv_040' or s == 63)]
ids = lambda c: '-'.join([c['name'], str(c['size']), *sorted(set(c) - {'name', 'size'})])


@torch.no_grad()
def scramble(net, seed=0, x=None):
    "Random numbers in all that begins as 0 or 1, so that nothing can be left out unseen; with images `x`, statistics of these, so that features depend on the image"
    g = torch.Generator().manual_seed(seed)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for k, v in net.state_dict().items():
        if k.endswith('running_var'): v.copy_(.5 + torch.rand(v.shape, generator=g))
        elif v.is_floating_point() and v.ndim < 2: v.add_(.1*torch.randn(v.shape, generator=g))
    if x is not None and norms:
        before = [m.momentum for m in norms]
        for m in norms: m.momentum = 1.
        net.train()(x)
        for m, b in zip(norms, before): m.momentum = b
    return net.eval()


def images(trunk, n=2):
    channels = next(m.in_channels for m in trunk.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(n, channels, *2*[trunk.recipe.get('size', 32)], generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(net, x): return pool(net(x))


def near(a, b, eps=1e-6): return a.shape == b.shape and torch.allclose(a, b, atol=eps, rtol=eps)


@pytest.fixture(scope='module')
def outside(tmp_path_factory):
    "Every case exported, and loaded in a process that knows only timm and torch by exactly the lines that were returned: {case: (trunk, features there)}"
    at = tmp_path_factory.mktemp('outside')
    trunks, code = {}, []
    for c in CASES:
        to, end = ('torch', '.pth') if c['size'] == 63 else ('timm', '.safetensors')
        trunk = backbone(**c)
        trunks[ids(c)] = scramble(trunk, x=images(trunk, 8))
        lines = export_weights(trunk, at/f'{ids(c)}{end}', to, mean=(.5,)*3, std=(.25,)*3)
        torch.save(images(trunk), at/f'{ids(c)}.x')
        code.append((ids(c), lines))
    run = """import json, sys
for name, lines in json.load(open('code.json')):
    names = {}
    exec(lines, names)
    import torch
    with torch.no_grad(): torch.save(names['m'](torch.load(name + '.x')), name + '.y')
sys.exit('ssl_nb is there' if any(m.startswith(('ssl_nb', 'fastai')) for m in sys.modules) else 0)"""
    (at/'code.json').write_text(json.dumps(code))
    r = subprocess.run([sys.executable, '-c', run], cwd=at, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return {n: (t, torch.load(at/f'{n}.y'), at) for n, t in trunks.items()}


def test_every_family_is_among_them(outside):
    assert {type(t.model) for t, _, _ in outside.values()} >= set(FAMILIES)


@pytest.mark.parametrize('case', CASES, ids=ids)
def test_the_lines_give_the_same_features_with_timm_alone(outside, case):
    trunk, theirs, at = outside[ids(case)]
    x = images(trunk)
    assert torch.equal(features(trunk.model, x), theirs)  # bit for bit
    assert near(features(trunk, x), theirs)
    assert theirs.std() > 1e-3 and not near(theirs[:1], theirs[1:], 1e-4)


@pytest.mark.parametrize('case', [c for c in CASES if c['size'] != 63], ids=ids)
def test_backbone_takes_an_exported_file(outside, case):
    trunk, _, at = outside[ids(case)]
    again = backbone(**case, weights=at/f'{ids(case)}.safetensors').eval()
    x = images(trunk)
    assert torch.equal(features(again, x), features(trunk, x))


def test_a_plain_line_is_enough_for_large_images(outside, tmp_path):
    "What was asked for: `timm.create_model(name, num_classes=0)` loads the file strictly"
    for case in CASES:
        if case['size'] < 96 or set(case) > {'name', 'size'} or case['name'][:3] == 'pit': continue
        trunk, theirs, at = outside[ids(case)]
        m = timm.create_model(case['name'], num_classes=0).eval()
        m.load_state_dict(load_file(at/f'{ids(case)}.safetensors'))
        assert torch.equal(features(m, images(trunk)), theirs)


@pytest.mark.parametrize('net, call', [
    (dict(name='resnet18', global_pool='max', **NARROW['resnet18']), 'm(x)'),
    (dict(name='vit_small_patch16_224', global_pool='', **NARROW['vit_small_patch16_224']), 'm(x).mean(1)')])
def test_a_pool_of_its_own(net, call, tmp_path):
    "What the lines call features are those of the trunk, the mean of maps or of tokens; and the images are said to have the channels that they have"
    trunk, names = scramble(backbone(size=32, in_chans=1, **net)), dict(x=images(backbone(size=32, in_chans=1, **net)))
    lines = export_weights(trunk, tmp_path/'w.safetensors')
    assert f'# {call}: features [N,C] of images x [N,1,32,32]' in lines
    exec(lines, names)
    assert near(eval(call, names), features(trunk, names['x']))
    assert 'x [N,3,96,96]' in load_code(backbone('pit_ti_224', 96, **NARROW['pit_ti_224']))


def test_pit_at_its_own_size(tmp_path):
    trunk = scramble(backbone('pit_ti_224', 224))
    export_weights(trunk, tmp_path/'w.safetensors')
    m = timm.create_model('pit_ti_224', num_classes=0).eval()
    m.load_state_dict(load_file(tmp_path/'w.safetensors'))
    assert near(features(m, images(trunk)), features(trunk, images(trunk)))


@pytest.mark.parametrize('net', [NIN(16), NIN(16, n_blocks=1), NIN(32, n_blocks=5, first=(24, 16, 8), pool3=True, momentum=.9, channels=1)], ids=['plain', 'one block', 'all'])
@pytest.mark.parametrize('to, end', [('timm', '.safetensors'), ('torch', '.pth'), ('safetensors', '.safetensors')])
def test_a_nin_through_timm(net, to, end, tmp_path):
    scramble(net)
    names = {}
    code = export_weights(net, tmp_path/f'w{end}', to, size=32)
    exec(code, names)
    assert 'ssl_nb' in code and torch.equal(features(names['m'], images(net)), features(net, images(net)))
    assert recipe_of(names['m']) == recipe_of(net)


def test_nin_as_one_of_timms_models():
    m = timm.create_model('ssl_nin', num_classes=7, width=16, in_chans=1)
    assert m(torch.randn(2, 1, 32, 32)).shape == (2, 7) and m.num_features == 16 and timm.is_model('ssl_nin')
    one_line_error(lambda: timm.create_model('ssl_nin', pretrained=True), 'no weights to fetch')


def test_the_header_says_all(tmp_path):
    trunk = backbone('resnet18', 32, channels=(8, 8, 16, 16))
    code = export_weights(trunk, tmp_path/'w.safetensors', mean=torch.tensor([.4, .5, .6]).view(3, 1, 1), std=(.1, .2, .3), epochs=3, method='simsiam')
    with safe_open(tmp_path/'w.safetensors', 'pt') as f: config = json.loads(f.metadata()['config'])
    assert {k: config[k] for k in ('mean', 'std', 'size', 'epochs', 'method')} == dict(mean=[.4, .5, .6], std=[.1, .2, .3], size=32, epochs=3, method='simsiam')
    assert config['recipe'] == dict(name='resnet18', size=32, channels=[8, 8, 16, 16])
    assert config['load'] == code.replace(str(tmp_path/'w.safetensors'), 'w.safetensors')
    assert code.splitlines()[-1].endswith('with mean [0.4, 0.5, 0.6] and std [0.1, 0.2, 0.3]') and '[N,3,32,32]' in code
    assert build_trunk(config['recipe'], tmp_path/'w.safetensors').recipe == config['recipe']


def test_half_precision(tmp_path):
    trunk = scramble(NIN(16))
    for to, end in (('timm', '.safetensors'), ('torch', '.pth')):
        names = {}
        exec(export_weights(trunk, tmp_path/f'w{end}', to, half=True), names)
        assert near(features(names['m'], images(trunk)), features(trunk, images(trunk)), 2e-2) and names['m'].blocks[0][0][0].weight.dtype == torch.float32
        assert read_tensors(tmp_path/f'w{end}')['blocks.0.0.0.weight'].dtype == torch.float16
    trunk.blocks[0][0][1].running_var[0] = 1e6
    one_line_error(lambda: export_weights(trunk, tmp_path/'h.safetensors', half=True), 'blocks.0.0.1.running_var', '65504')
    assert not (tmp_path/'h.safetensors').exists()


def test_a_torch_file_is_plain(tmp_path):
    export_weights(NIN(16), tmp_path/'w.pth', 'torch')
    state = torch.load(tmp_path/'w.pth', weights_only=True)
    assert list(state) == list(NIN(16).state_dict())


def test_exports_that_cannot_be(tmp_path):
    one_line_error(lambda: export_weights(NIN(16), tmp_path/'w.onnx', 'onnx'), 'choose one of timm, torch, safetensors')
    one_line_error(lambda: export_weights(NIN(16), tmp_path/'w.pth'), 'ends in .safetensors')
    one_line_error(lambda: export_weights(nn.Sequential(NIN(16), nn.Flatten()), tmp_path/'w.safetensors'), 'give the trunk alone')
    one_line_error(lambda: export_weights(Trunk(nn.Conv2d(3, 4, 1)), tmp_path/'w.safetensors'), 'does not say how it was made')
    one_line_error(lambda: load_code(backbone('vit_small_patch16_224', 32, norm_layer=nn.LayerNorm, **NARROW['vit_small_patch16_224'])), 'numbers, words and lists')
    (tmp_path/'file').write_text('')
    one_line_error(lambda: export_weights(NIN(16), tmp_path/'file/w.pth', 'torch'), 'cannot write')


@pytest.mark.parametrize('recipe, said', [
    ({}, 'no recipe of a trunk'), (dict(name='resnet18', size='64'), 'no recipe of a trunk'), (dict(name='nin', colour=1), 'no recipe of a NIN'), (dict(name='nin', width=7), 'multiple of 4'),
    (dict(name='resnet-18', size=64), 'did you mean'), (dict(name='resnet18', size=64, colour=1), 'arguments that timm knows')])
def test_recipes_that_cannot_be(recipe, said): one_line_error(lambda: build_trunk(recipe), said)


def test_recipes(tmp_path):
    for trunk in (NIN(16, n_blocks=3), backbone('pit_ti_224', 32, **NARROW['pit_ti_224'])):
        assert deepcopy(trunk).recipe == trunk.recipe
        scramble(trunk)
        save_weights(trunk, tmp_path/'w.safetensors')
        again = build_trunk(json.loads(json.dumps(trunk.recipe)), tmp_path/'w.safetensors').eval()
        assert recipe_of(again) == recipe_of(trunk) and torch.equal(features(again, images(trunk)), features(trunk, images(trunk)))
    assert build_trunk(dict(name='nin', size=32, width=16, in_chans=1)).recipe['channels'] == 1  # a run knows the size of its images, and a NIN takes any
    one_line_error(lambda: build_trunk(dict(name='nin', width=16), 'imagenet'), 'no ImageNet weights')


# Names of others

def torchvisions(name):
    "A net of torchvision, narrow where it can be; the trunk for it; what torchvision calls its features"
    tv = torchvision.models
    if name == 'resnet50': return tv.resnet.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1]), backbone('resnet50', 64, layers=(1, 1, 1, 1)), lambda m: nn.Sequential(*list(m.children())[:-1])
    if name == 'efficientnet_b0': return tv.efficientnet_b0(), backbone(name, 64), lambda m: nn.Sequential(m.features, m.avgpool)
    m = tv.VisionTransformer(image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32)
    return m, backbone('vit_small_patch16_224', 32, patch_size=8, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.), lambda m: (setattr(m, 'heads', nn.Identity()), m)[1]


@pytest.mark.parametrize('name', ['resnet50', 'efficientnet_b0', 'vit_b_16'])
def test_torchvisions_names(name, tmp_path):
    m, trunk, body = torchvisions(name)
    scramble(m)
    torch.save(m.state_dict(), tmp_path/'w.pth')
    loaded = load_any(trunk, tmp_path/'w.pth')
    assert loaded.whole and len(loaded.matched) == len(trunk.state_dict()) and len(loaded.unused) == 2 and f'of {len(loaded.matched)} of' in repr(loaded)
    x = images(trunk)
    assert near(features(trunk.eval(), x).flatten(1), features(body(m), x).flatten(1), 1e-5)


WRAPS = {'plain': lambda s: s, 'DataParallel': lambda s: {f'module.{k}': v for k, v in s.items()}, 'compiled': lambda s: {f'_orig_mod.{k}': v for k, v in s.items()},
         'Lightning': lambda s: {'epoch': 3, 'state_dict': {f'model.{k}': v for k, v in s.items()}, 'optimizer_states': [{'x': torch.ones(3)}], 'hyper_parameters': {'lr': .1}},
         'student': lambda s: {'model': {'module': OrderedDict((f'student_backbone.vit.{k}', v) for k, v in s.items())}}, 'online': lambda s: {**{f'target_network.0.{k}': v*0 for k, v in s.items()}, **{f'online_network.0.{k}': v for k, v in s.items()}}}


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('kind', ['nin', 'vit', 'resnet'])
def test_whatever_stands_before_the_names(wrap, kind, tmp_path):
    new = {'nin': lambda: NIN(16), 'vit': lambda: backbone('vit_small_patch16_224', 32, **NARROW['vit_small_patch16_224']), 'resnet': lambda: backbone('resnet18', 32, **NARROW['resnet18'])}[kind]
    trunk, fresh = scramble(new()), new().eval()
    torch.save(WRAPS[wrap]({**plain_model(trunk).state_dict(), 'head.weight': torch.ones(3, 3)}), tmp_path/'w.ckpt')
    loaded = load_any(fresh, tmp_path/'w.ckpt')
    assert loaded.whole and torch.equal(features(fresh, images(trunk)), features(trunk, images(trunk)))
    assert any(k.endswith('head.weight') for k in loaded.unused) and 'head.*' in repr(loaded)
    if wrap == 'online': assert loaded.also == ['target_network.0.'] and 'choose by prefix=' in repr(loaded)


def test_our_own_files(tmp_path):
    "Of `save_weights`, of `export_weights`, and a checkpoint of a run with a head"
    trunk = scramble(backbone('resnet18', 32, **NARROW['resnet18']))
    save_weights(trunk, tmp_path/'a.safetensors')
    export_weights(trunk, tmp_path/'b.safetensors', 'safetensors')
    torch.save(dict(config='{}', model=nn.Sequential(trunk, nn.Linear(16, 4)).state_dict(), rng=torch.get_rng_state(), opt=dict(state={0: dict(momentum_buffer=torch.ones(8, 3, 3, 3))})), tmp_path/'c.ckpt')
    for name in ('a.safetensors', 'b.safetensors', 'c.ckpt'):
        fresh = backbone('resnet18', 32, **NARROW['resnet18']).eval()
        assert load_any(fresh, tmp_path/name).whole and torch.equal(features(fresh, images(trunk)), features(trunk, images(trunk)))
    load_weights(backbone('resnet18', 32, **NARROW['resnet18']), tmp_path/'b.safetensors')


def test_old_files_have_no_counters(tmp_path):
    net, fresh = scramble(NIN(16)), NIN(16).eval()
    torch.save({k: v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')}, tmp_path/'w.pth', _use_new_zipfile_serialization=False)
    loaded = load_any(fresh, tmp_path/'w.pth')
    assert (loaded.whole, loaded.counters) == (True, 12) and '60 of 72' in repr(loaded) and '12 counters' in repr(loaded)
    assert torch.equal(features(fresh, images(net)), features(net, images(net)))


# Files that do not fit

def unchanged(trunk, call, *said):
    before = deepcopy(trunk.state_dict())
    text = one_line_error(call, *said)
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())
    assert len(text) < 800
    return text


def test_less_than_the_whole_trunk(tmp_path):
    net, trunk = NIN(16), NIN(16, n_blocks=5)
    save_weights(net, tmp_path/'w.safetensors')
    unchanged(trunk, lambda: load_any(trunk, tmp_path/'w.safetensors'), '72 of 90', '15 missing: blocks.4.0.0.weight', '3 counters', 'strict=False')
    loaded = load_any(trunk, tmp_path/'w.safetensors', strict=False)
    assert not loaded.whole and len(loaded.matched) == 72 and len(loaded.missing) + loaded.counters == 18 and '72 of 90' in repr(loaded)
    assert torch.equal(trunk.blocks[3][0][0].weight, net.blocks[3][0][0].weight)


def test_shapes_that_conflict(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'w.pth')
    trunk = backbone('resnet18', 32)
    unchanged(trunk, lambda: load_any(trunk, tmp_path/'w.pth'), '1 of another shape: conv1.weight [64, 3, 7, 7] for [64, 3, 3, 3]')
    assert len(load_any(trunk, tmp_path/'w.pth', strict=False).matched) == 119
    save_file({k: v.to(torch.int8) for k, v in NIN(16).state_dict().items()}, tmp_path/'int8.safetensors')
    unchanged(net := NIN(16), lambda: load_any(net, tmp_path/'int8.safetensors'), 'of another shape')


@pytest.mark.parametrize('strict', [True, False])
def test_nothing_fits(strict, tmp_path):
    save_weights(NIN(16), tmp_path/'w.safetensors')
    trunk = backbone('vit_small_patch16_224', 32, **NARROW['vit_small_patch16_224'])
    unchanged(trunk, lambda: load_any(trunk, tmp_path/'w.safetensors', strict), 'none of its 72 tensors fits', 'blocks.0.0.0.weight', 'cls_token')
    unchanged(net := NIN(16), lambda: load_any(net, tmp_path/'w.safetensors', strict, prefix='teacher.'), "no name begins with 'teacher.'")


def test_the_same_shapes_and_another_net(tmp_path):
    export_weights(NIN(16, pool3=True), tmp_path/'w.safetensors')
    assert 'pool3=True, the trunk False' in repr(load_any(NIN(16), tmp_path/'w.safetensors')) and 'other arguments' not in repr(load_any(NIN(16, pool3=True), tmp_path/'w.safetensors'))
    export_weights(backbone('efficientnet_b0', 32), tmp_path/'e.safetensors')
    assert 'size=32, the trunk 96' in repr(load_any(backbone('efficientnet_b0', 96), tmp_path/'e.safetensors'))


class Evil:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def test_no_pickle_runs(tmp_path):
    was_here, weights = tmp_path/'was_here', NIN(16).state_dict()
    torch.save({'state_dict': weights, 'more': Evil(was_here)}, tmp_path/'a.pth')
    torch.save({'state_dict': weights, 'more': Evil(was_here)}, tmp_path/'b.ckpt', _use_new_zipfile_serialization=False)
    (tmp_path/'c.pt').write_bytes(pickle.dumps(Evil(was_here), protocol=2))
    (tmp_path/'d.safetensors').write_bytes(pickle.dumps(Evil(was_here), protocol=2))  # a name is no proof
    torch.save(NIN(16), tmp_path/'e.pth')  # a whole module
    for name in ('a.pth', 'b.ckpt', 'c.pt', 'e.pth'):
        unchanged(net := NIN(16), lambda: load_any(net, tmp_path/name, strict=False), name, 'refused', 'more than tensors')
    (tmp_path/'f.pt').write_bytes(pickle.dumps(Evil(was_here)))  # not torch's kind of pickle at all
    for name in ('d.safetensors', 'f.pt'): unchanged(net := NIN(16), lambda: load_any(net, tmp_path/name), name, 'torch.save')  # torch's versions see different things in it
    assert not was_here.exists()
    torch.load(tmp_path/'a.pth', weights_only=False)
    assert was_here.exists()  # it would have


class Odd: pass


def fastais(net, path, **kwargs):
    "What a fastai user's `learn.save` or `learn.export` wrote after a fit"
    dls = image_dls(*(Images(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 2) for _ in range(2)), 4, device='cpu')
    learn = Learner(dls, nn.Sequential(net, *linear_head(feature_shape(net), 2)), path=path.parent, model_dir='.')
    learn.add_cb(Augment(Normalize(), Normalize()))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 0.)
    getattr(learn, *kwargs)(path.name if 'export' in kwargs else path.stem)
    return learn.model[0]


REFUSED = {
    'learn.save': lambda net, path: fastais(net, path, save=1),
    'learn.export': lambda net, path: fastais(net, path, export=1),
    'a module': lambda net, path: torch.save(net, path),
    'a module in a dictionary': lambda net, path: torch.save(dict(epoch=3, model=net, args=Odd()), path),
    'Lightning': lambda net, path: torch.save({'state_dict': net.state_dict(), 'hyper_parameters': Odd()}, path),
    'two nets': lambda net, path: torch.save({'student': {k: v*0 for k, v in net.state_dict().items()}, 'teacher': net.state_dict(),
                                              'args': Odd(), 'more': [Odd()], 'date': 3}, path),
    'deeper': lambda net, path: torch.save({'run': {'net': net.state_dict(), 'args': Odd()}}, path),
    'beside the tensors': lambda net, path: torch.save({**net.state_dict(), 'args': Odd()}, path),
    'before 1.6': lambda net, path: torch.save({'weights': net.state_dict(), 'args': Odd()}, path, _use_new_zipfile_serialization=False)}


@pytest.mark.parametrize('kind', REFUSED)
def test_the_line_that_a_refusal_names_does_it(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = scramble(NIN(16))
    net = REFUSED[kind](net, tmp_path/'w.pth') or net
    text = unchanged(fresh := NIN(16).eval(), lambda: load_any(fresh, tmp_path/'w.pth'), 'refused', 'write its weights anew by torch.save(')
    exec(text[text.index('torch.save('):], dict(torch=torch))
    load_any(fresh, tmp_path/'new.pth', prefix='teacher.' if kind == 'two nets' else None)
    assert torch.equal(features(fresh, images(net)), features(net.eval(), images(net)))


def test_files_of_no_use(tmp_path):
    export_weights(NIN(16), tmp_path/'w.pth', 'torch')
    export_weights(NIN(16), tmp_path/'w.safetensors')
    whole = {end: (tmp_path/f'w{end}').read_bytes() for end in ('.pth', '.safetensors')}
    for end, data in whole.items():
        for n in (0, 4, 9, 100, len(data)//2, len(data)-1):
            (tmp_path/f'cut{end}').write_bytes(data[:n])
            one_line_error(lambda: read_tensors(tmp_path/f'cut{end}'), f'cut{end}', 'damaged')
    for i, text in enumerate(('no weights at all', 'I am a list', '{"a": 1}', '12345678{', '<html><body>404</body></html>')):
        (tmp_path/'text.pth').write_text(text)
        one_line_error(lambda: read_tensors(tmp_path/'text.pth'), 'text.pth', 'damaged or no file of weights')
    for thing in ({}, [torch.ones(3)], {'epoch': 3}, torch.ones(3)):
        torch.save(thing, tmp_path/'none.pth')
        one_line_error(lambda: read_tensors(tmp_path/'none.pth'), 'holds no tensors')
    one_line_error(lambda: read_tensors(tmp_path/'there/is.none'), 'no such file')
    one_line_error(lambda: read_tensors(tmp_path), 'no such file')


def test_a_dictionary_in_itself(tmp_path):
    d = {}; d['d'] = d
    torch.save(d, tmp_path/'w.pth')
    one_line_error(lambda: read_tensors(tmp_path/'w.pth'), 'w.pth')


# lightly itself

def lightlys(backbone, heads, momentum=False):
    m = nn.Module()
    m.backbone, m.projection_head, m.prediction_head = backbone, heads.SimSiamProjectionHead(512, 64, 32), heads.SimSiamPredictionHead(32, 16, 32)
    if momentum: m.backbone_momentum = scramble(deepcopy(backbone), seed=5)
    return scramble(m)


@pytest.mark.parametrize('momentum', [False, True])
def test_lightlys_simsiam(momentum, tmp_path):
    heads = pytest.importorskip('lightly.models.modules.heads')
    m = lightlys(nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]), heads, momentum)
    torch.save({'epoch': 9, 'global_step': 90, 'pytorch-lightning_version': '2.0.0', 'state_dict': m.state_dict(), 'loops': {}, 'callbacks': {}, 'optimizer_states': [], 'lr_schedulers': []}, tmp_path/'last.ckpt')
    trunk = backbone('resnet18', 64).eval()
    loaded = load_any(trunk, tmp_path/'last.ckpt')
    assert loaded.whole and loaded.prefix == 'state_dict.backbone.' and 'projection_head.*' in repr(loaded) and 'prediction_head.*' in repr(loaded)
    x = images(trunk)
    assert near(features(trunk, x), features(m.backbone, x).flatten(1))
    assert loaded.also == (['state_dict.backbone_momentum.'] if momentum else [])


def test_lightlys_own_resnet(tmp_path):
    heads = pytest.importorskip('lightly.models.modules.heads')
    from lightly.models import ResNetGenerator
    net = ResNetGenerator('resnet-18')
    trunk = backbone('resnet18', 32).eval()
    x = images(trunk)
    torch.save(scramble(net).state_dict(), tmp_path/'whole.ckpt')
    assert load_any(trunk, tmp_path/'whole.ckpt').naming == "lightly's own ResNet"
    net.linear = nn.Identity()
    assert near(features(trunk, x), features(net, x))
    parts = nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1))
    torch.save(lightlys(parts, heads).state_dict(), tmp_path/'parts.ckpt')
    assert 'no ReLU' in repr(load_any(trunk, tmp_path/'parts.ckpt'))
    trunk.model.act1 = nn.Identity()  # and this is true
    trunk = type(trunk)(trunk.model, [nn.Sequential(trunk.model.conv1, trunk.model.bn1, trunk.model.layer1), trunk.model.layer2, trunk.model.layer3, trunk.model.layer4]).eval()
    assert near(features(trunk, x), features(parts.eval(), x).flatten(1))


def test_lightlys_vit(tmp_path):
    modules = pytest.importorskip('lightly.models.modules')
    trunk = backbone('vit_small_patch16_224', 32, **NARROW['vit_small_patch16_224']).eval()
    vit = modules.MaskedVisionTransformerTIMM(vit=deepcopy(trunk.model))
    m = nn.Module()
    m.student_backbone, m.teacher_backbone = scramble(vit), scramble(deepcopy(vit), 3)
    torch.save({'state_dict': m.state_dict()}, tmp_path/'w.ckpt')
    loaded = load_any(trunk, tmp_path/'w.ckpt')
    x = images(trunk)
    assert loaded.prefix == 'state_dict.student_backbone.vit.' and near(features(trunk, x), features(m.student_backbone, x), 1e-5)
    load_any(trunk, tmp_path/'w.ckpt', prefix='state_dict.teacher_backbone.vit.')
    assert near(features(trunk, x), features(m.teacher_backbone, x), 1e-5)
