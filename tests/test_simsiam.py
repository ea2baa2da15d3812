"""SimSiam: views, loss, collapse, accumulation, backbones, and the study's runs and faults"""
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from safetensors.torch import save_file
from torch import nn

from ssl_nb.augment import Augment, Normalize
from ssl_nb.backbones import backbone
from ssl_nb.data import ImageDL, Images, InputError, cifar10_sample, image_dls
from ssl_nb.evaluate import attribute_measures, base_rates
from ssl_nb.heads import predictor, projector
from ssl_nb.learner import torch_opt
from ssl_nb.nets import NIN, feature_shape
from ssl_nb.schedule import *
from ssl_nb.methods.simsiam import SIMSIAM, SimSiam, negative_cosine, simsiam_learner, simsiam_loss
from ssl_nb.siamese import Accumulate, CollapseMonitor, effective_rank, spread
from ssl_nb.studies.kinds import parts_of, start_trunk
from ssl_nb.studies.simsiam import simsiam_runs, without_missing_weights
from ssl_nb.transfer import transfer_learner
from ssl_nb.results import read_results
from ssl_nb.studies.runner import Place, run_study

TRAIN, TEST = cifar10_sample()
NETS = {'resnet18': dict(channels=[8, 8, 16, 16]), 'efficientnet_b0': {}, 'vit_small_patch16_224': dict(embed_dim=32, depth=4, num_heads=2), 'pit_ti_224': dict(base_dims=[8, 8, 8], depth=[1, 1, 1])}


def few(n=48): return TRAIN.subset(slice(0, n))


def quiet_fit(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_cosine(epochs, constant=(1,), **kwargs)
    return learn


@pytest.mark.parametrize('name', NETS)
def test_every_backbone_learns_from_views(name):
    torch.manual_seed(0)
    trunk = backbone(name, 32, **NETS[name])
    before = deepcopy(trunk.state_dict())
    learn = quiet_fit(simsiam_learner(image_dls(few(), few(), bs=16), trunk, width=32, channels_last=False))
    after = learn.model.trunk.state_dict()
    weights = [k for k, p in trunk.named_parameters()]
    moved = [k for k in weights if not torch.equal(before[k], after[k])]
    assert len(moved) > .9*len(weights), set(weights) - set(moved)
    assert all(v.isfinite().all() for v in after.values() if v.is_floating_point())


@pytest.mark.parametrize('name', NETS)
def test_features_of_each_block_are_those_of_the_whole(name):
    trunk = backbone(name, 32, **NETS[name]).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for k, f in enumerate(trunk.each(x), 1): assert torch.allclose(f, trunk.features(x, k), atol=1e-5)
    assert feature_shape(trunk)[0] == trunk.features(x).shape[1]


@pytest.mark.parametrize('name', NETS)
def test_blocks_of_every_backbone_can_be_transferred(name):
    trunk = backbone(name, 32, **NETS[name])
    for upto, head, mode in ((2, 'conv', 'cached'), (1, 'nonlinear', 'frozen'), (None, 'linear', 'finetune'), (None, 'nonlinear', 'cached')):
        learn = transfer_learner(trunk, few(), few(16), upto, head, mode, bs=16, device='cpu')
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert learn.recorder.values[-1][0] == learn.recorder.values[-1][0]
    if name[:3] in ('vit', 'pit'):
        with pytest.raises(InputError, match='a conv head needs maps'): transfer_learner(trunk, few(), few(16), None, 'conv', device='cpu')


@pytest.mark.parametrize('bad, said', [
    (dict(name='resnet-18'), 'did you mean'), (dict(name='zzzzzz'), 'timm.list_models'), (dict(size=34, name='vit_small_patch16_224'), 'for images of 34 pixels'),
    (dict(weights='nowhere.safetensors'), 'nowhere.safetensors'), (dict(colour='red'), 'arguments that timm knows'), (dict(name='vit_small_2021', weights='imagenet'), 'no longer has')])
def test_a_backbone_that_there_is_not(bad, said):
    with pytest.raises(InputError, match=said) as e: backbone(**bad)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_a_file_of_weights_that_does_not_fit(tmp_path):
    save_file(backbone('resnet18', 32, **NETS['resnet18']).state_dict(), tmp_path/'narrow.safetensors')
    (tmp_path/'text.safetensors').write_text('no weights')
    with pytest.raises(InputError, match='narrow.safetensors cannot be loaded into resnet18'): backbone('resnet18', 32, tmp_path/'narrow.safetensors')
    with pytest.raises(InputError, match='text.safetensors cannot be read'): backbone('resnet18', 32, tmp_path/'text.safetensors')


def test_no_gradient_goes_through_the_targets():
    p, z = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    negative_cosine(p, z).backward()
    assert z.grad is None and p.grad.abs().sum() > 0


def test_the_loss_is_symmetric_and_in_float32():
    p1, z1, p2, z2 = torch.randn(4, 6, 8).half()
    a = simsiam_loss(p1, z1, p2, z2)
    assert a.dtype == torch.float32 and torch.allclose(a, simsiam_loss(p2, z2, p1, z1))
    assert torch.allclose(a, -(F.cosine_similarity(p1.float(), z2.float()).mean() + F.cosine_similarity(p2.float(), z1.float()).mean())/2, atol=1e-4)


def test_scaling_a_projection_changes_nothing():
    p, z = torch.randn(2, 6, 8)
    assert torch.allclose(negative_cosine(p, z), negative_cosine(7*p, .1*z), atol=1e-6)


@pytest.mark.parametrize('n, d', [(200, 16), (50, 64)])
def test_spread_and_rank_of_known_vectors(n, d):
    torch.manual_seed(0)
    even, one = torch.randn(n, d), torch.randn(d).expand(n, d)
    assert spread(even) > .9 and spread(one) < 1e-3
    assert effective_rank(even) > .5*min(n, d) and abs(effective_rank(torch.randn(n, 1)*torch.ones(d)) - 1) < .1


def test_the_monitor_warns_of_one_vector_for_all_and_of_not_a_number():
    for z in (torch.ones(1, 8).expand(40, 8), torch.full((40, 8), float('nan'))):
        m = CollapseMonitor()
        m.learn, m.zs = SimpleNamespace(train_iter=100), [z]
        with pytest.warns(UserWarning, match='collapse'): m.after_validate()


def test_images_are_drawn_each_by_itself_and_twice():
    same = Images(TRAIN.x[:1].expand(16, -1, -1, -1), None)
    class Seen(Callback):
        order = 50
        def before_batch(self): self.learn.views = self.xb
    v1, v2 = quiet_fit(simsiam_learner(image_dls(same, same, bs=16), NIN(16), width=16, cbs=Seen())).views
    for a, b in ((v1[:-1], v1[1:]), (v1, v2)): assert ((a - b).flatten(1).abs().mean(1) > .005).all()


def test_the_predictor_keeps_its_rate_and_decay_holds_in_both_groups():
    class Rates(Callback):
        def before_fit(self): self.seen = []
        def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])
    learn = quiet_fit(simsiam_learner(image_dls(few(), few(), bs=16), NIN(16), 'report', width=16, cbs=Rates()), 3)
    trunk, head = zip(*learn.rates.seen)
    assert len(set(head)) == 1 and trunk[-1] < .1*head[-1]
    assert [h['wd'] for h in learn.opt.hypers] == [SIMSIAM['report']['wd']]*2


@pytest.mark.parametrize('batches, n', [(1, 4), (4, 4), (5, 4), (7, 3), (6, 1)])
def test_steps_of_accumulated_batches(batches, n):
    class Count(Callback):
        def before_fit(self): self.steps = 0
        def after_step(self): self.steps += 1
    learn = simsiam_learner(image_dls(few(8*batches), few(16), bs=8), NIN(16), width=16, cbs=Count(), accumulate=n)
    quiet_fit(learn, 2)
    assert learn.count.steps == 2*-(-batches//n) and len(learn.recorder.lrs) == 2*batches


def test_an_unfinished_group_is_weighed_by_its_own_size():
    "Without BatchNorm: three batches of 8 with Accumulate(2) are a step of 16 images and one of 8"
    def trained(bs, n):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10))
        dls = DataLoaders(ImageDL(few(24), bs, device='cpu'), ImageDL(few(16), 16, device='cpu'))
        learn = Learner(dls, net, opt_func=torch_opt(wd=0.), cbs=[Augment(Normalize(), Normalize()), Accumulate(n)])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
        return net[1].weight.detach().clone()
    assert torch.allclose(trained(8, 2), trained(16, 1), atol=1e-6)


def test_a_batch_of_one_is_refused():
    with pytest.raises(InputError, match='a batch of one image'): quiet_fit(simsiam_learner(image_dls(few(), few(), bs=1), NIN(16), width=16))


@pytest.mark.parametrize('head, mode', [('nonlinear', 'cached'), ('conv', 'frozen'), ('linear', 'finetune')])
def test_a_batch_of_one_is_refused_in_transfer(head, mode):
    for images, bs in ((few(), 1), (few(1), 8)):
        with pytest.raises(InputError, match='a batch of one image'): transfer_learner(backbone('resnet18', 32, **NETS['resnet18']), images, few(16), 2, head, mode, bs=bs, device='cpu')
    transfer_learner(backbone('resnet18', 32, **NETS['resnet18']), few(), few(16), 2, 'linear', 'frozen', bs=1, device='cpu')  # frozen blocks keep their statistics


def test_views_of_a_size_that_the_trunk_cannot_take():
    with pytest.raises(InputError, match='views of 32 pixels; say with size='): simsiam_learner(image_dls(few(), few(), bs=8), backbone('vit_small_patch16_224', 64, **NETS['vit_small_patch16_224']), width=16)


@pytest.mark.parametrize('n', [0, -1, 2.5])
def test_a_group_of_no_batches_is_refused(n):
    with pytest.raises(InputError, match='a whole number'): simsiam_learner(image_dls(few(), few(), bs=8), NIN(16), width=16, accumulate=n)


def test_lightly_gives_the_same_loss_and_gradients():
    loss = pytest.importorskip('lightly.loss', reason='lightly is not installed: pip install lightly')
    heads = pytest.importorskip('lightly.models.modules')
    torch.manual_seed(0)
    ours = SimSiam(NIN(16), projector(16, 64, 3), predictor(64, 16))
    trunk, proj, pred = deepcopy(ours.trunk), heads.SimSiamProjectionHead(16, 64, 64), heads.SimSiamPredictionHead(64, 16, 64)
    for mine, theirs in ((ours.projector, proj), (ours.predictor, pred)): theirs.load_state_dict({f'layers.{k}': v for k, v in mine.state_dict().items()})
    x1, x2 = torch.randn(2, 32, 3, 32, 32)
    a = simsiam_loss(*ours(x1, x2)); a.backward()
    z1, z2 = (proj(trunk(x).mean((2, 3))) for x in (x1, x2))
    crit = loss.NegativeCosineSimilarity()
    b = .5*(crit(pred(z1), z2.detach()) + crit(pred(z2), z1.detach())); b.backward()
    assert torch.allclose(a, b, atol=1e-6)
    theirs = [*trunk.parameters(), *proj.parameters(), *pred.parameters()]
    for p, q in zip([*ours.trunk.parameters(), *ours.projector.parameters(), *ours.predictor.parameters()], theirs): assert torch.allclose(p.grad, q.grad, atol=1e-5)


def test_attributes_by_hand():
    y = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    m = attribute_measures(torch.tensor([[1., -1], [-1, 1], [-2, 1], [-3, 2]]), y)
    assert m['accuracy'] == pytest.approx(6/8) and m['jaccard_macro'] == pytest.approx((1/2 + 2/3)/2) and m['jaccard_micro'] == pytest.approx(3/5)
    assert m['auc_macro'] == pytest.approx((1. + 3.5/4)/2)
    nothing = attribute_measures(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.bool))
    assert nothing['auc_macro'] != nothing['auc_macro'] and nothing['accuracy'] == 1


def test_who_never_looks_has_an_auc_of_a_half():
    torch.manual_seed(0)
    im = Images(torch.zeros(500, 3, 1, 1), torch.rand(500, 5) < torch.tensor([.05, .2, .5, .8, .95]), list('abcde'))
    floor = base_rates(im, im)
    assert floor['auc_macro'] == .5 and floor['auc_micro'] > .8


def test_nothing_held_out_is_learned_from(tmp_path):
    run = simsiam_runs('tiny')[0]
    parts = parts_of(run, Place(tmp_path, 'cpu'))
    seen = {k: set(map(bytes, parts[k].x.flatten(1).numpy())) for k in parts}
    assert not seen['unlabelled'] & (seen['valid'] | seen['test']) and not seen['fit'] & seen['valid']
    assert parts['unlabelled'].y is None


def test_paper_pretrains_on_all_images(tmp_path):
    "And has them all in the bank of kNN and probe; what is held out serves curves and fine-tuning"
    runs = {r['name']: r for r in simsiam_runs('tiny', 'paper')}
    place = Place(tmp_path, 'cpu')
    names = 'pretrain-resnet18', 'probe-resnet18', 'finetune-resnet18-set'
    size = {n: {k: len(v) for k, v in parts_of(runs[n], place).items()} for n in names}
    assert size['pretrain-resnet18'] == size['probe-resnet18'] == dict(unlabelled=200, bank=200, fit=160, valid=40, test=100)
    assert size['finetune-resnet18-set'] == dict(unlabelled=160, bank=160, fit=160, valid=40, test=100)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); run_study([runs['pretrain-resnet18']], place, verbose=False)
    assert read_results(tmp_path)[0]['sizes'] == dict(images=200, bank=200, test=100)
    for p in ('report', 'paper', 'best'): assert simsiam_runs('full', p, data='cifar10')[0]['config'].get('whole', False) == (p == 'paper')


@pytest.mark.parametrize('scale', ['tiny', 'small', 'full'])
@pytest.mark.parametrize('data', ['sample', 'cifar10', 'stl10', 'celeba'])
def test_best_keeps_the_budget_of_the_report(scale, data):
    for r in simsiam_runs(scale, 'best', data=data):
        if r['kind'] == 'siamese_pretrain': assert r['config']['epochs'] <= 100


def test_two_runs_with_one_seed_are_equal(tmp_path):
    runs = [r for r in simsiam_runs('tiny') if r['name'] in ('pretrain-resnet18', 'finetune-resnet18-set')]
    for k in 'ab':
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); run_study(runs, Place(tmp_path/k, 'cpu'), verbose=False)
    a, b = (read_results(tmp_path/k) for k in 'ab')
    assert [r['digest'] for r in a] == [r['digest'] for r in b] and len(a) == 2


def test_rows_without_weights_are_left_out(monkeypatch, capsys):
    import ssl_nb.studies.simsiam as study
    def none(name, size, weights=None, **kwargs): raise InputError(f'{name}: no network')
    monkeypatch.setattr(study, 'backbone', none)
    runs = simsiam_runs('full', data='celeba')
    kept = without_missing_weights(runs)
    assert len(runs) - len(kept) == 2 and all(r['config'].get('start') != 'imagenet' for r in kept)
    assert capsys.readouterr().out.count('left out') == 2


def test_imagenet_weights_are_where_a_fit_starts(tmp_path, monkeypatch):
    "timm's own way, with a file in the place of its download"
    create, net = timm.create_model, dict(channels=[8, 8, 16, 16])
    theirs = create('resnet18', **net)
    save_file(theirs.state_dict(), tmp_path/'timms.safetensors')
    def here(name, pretrained=False, **kwargs): return create(name, pretrained, **{**kwargs, **(dict(pretrained_cfg_overlay=dict(file=str(tmp_path/'timms.safetensors'))) if pretrained else {})})
    monkeypatch.setattr(timm, 'create_model', here)
    run = next(r for r in simsiam_runs('tiny') if r['name'] == 'finetune-resnet18-random')
    run = dict(run, run='imagenet', config=dict(run['config'], start='imagenet', net=net))
    assert without_missing_weights([run]) == [run]
    place = Place(tmp_path, 'cpu')
    assert torch.equal(start_trunk(run, place).model.layer1[0].conv1.weight, theirs.layer1[0].conv1.weight)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); run_study([run], place, verbose=False)
    assert [r['run'] for r in read_results(tmp_path)] == ['imagenet']


def test_the_old_vit_has_no_imagenet_weights_and_todays_has():
    runs = {r['name']: r['config'] for r in simsiam_runs('full', data='stl10')}
    assert runs['finetune-vit_small_2021-imagenet']['backbone'] == 'vit_small_patch16_224'
    assert {c['backbone'] for n, c in runs.items() if 'vit' in n and not n.endswith('imagenet')} == {'vit_small_2021'}


def test_the_report_has_its_own_size_of_faces():
    assert {p: simsiam_runs('full', p, data='celeba')[0]['config']['size'] for p in ('report', 'paper', 'best')} == dict(report=224, paper=112, best=112)
    assert simsiam_runs('small', 'report', data='celeba')[0]['config']['size'] == 64


def test_noise_is_probed_with_the_statistics_of_photographs(tmp_path, monkeypatch):
    "As random blocks are: what is compared are weights"
    import ssl_nb.studies.simsiam as study
    seen = []
    monkeypatch.setattr(study, 'probe_trunk', lambda trunk, *args: seen.append(deepcopy(trunk)) or {})
    runs = [r for r in simsiam_runs('tiny') if r['name'] == 'noise-normal']
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); run_study(runs, Place(tmp_path, 'cpu'), verbose=False)
    kept = backbone('resnet18', 32, tmp_path/f"weights/{runs[0]['run']}.safetensors", **runs[0]['config']['net'])
    for k, v in kept.state_dict().items():
        if 'running_mean' in k: assert not torch.allclose(v, seen[0].state_dict()[k])
        elif v.is_floating_point() and 'running' not in k: assert torch.allclose(v, seen[0].state_dict()[k], atol=1e-3)


def test_a_place_must_hold_what_a_run_wants(tmp_path):
    with pytest.raises(InputError, match="on 'cifar10', but the place has 'sample'"): run_study(simsiam_runs('tiny', data='cifar10'), Place(tmp_path, 'cpu'))
    with pytest.raises(InputError, match='needs `root`'): Place(tmp_path, 'cpu', data='stl10')
    with pytest.raises(InputError, match='unknown data'): Place(tmp_path, 'cpu', root='.', data='mnist')
