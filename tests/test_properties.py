"Properties that hold for any seed and any size, and fastai's own use of our loader"
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from torch import nn

from ssl_nb.augment import Augment, Blur, ColorJitter, Flip, Greyscale, Normalize, PadCrop, ResizedCrop, random_boxes, crop_augment, view_augment
from ssl_nb.data import ImageDL, Images, InputError, cifar10_sample, holdout, image_dls, label_fraction
from ssl_nb.neighbours import knn
from ssl_nb.nets import NIN, nin
from ssl_nb.methods.rotation import Rotation, rotate4, rotation_labels, rotnet_learner
from ssl_nb.transfer import set_bn_statistics, transfer_learner

train, test = cifar10_sample()


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('labels', [1, 7, 450, .013, 1.])
def test_label_fraction_is_balanced_and_a_subset(seed, labels):
    few = label_fraction(train, labels, seed)
    assert few.y.bincount(minlength=10).unique().numel() == 1
    keys = {bytes(x.flatten().numpy()): int(y) for x, y in zip(train.x, train.y)}
    assert all(keys[bytes(x.flatten().numpy())] == int(y) for x, y in zip(few.x, few.y))


@pytest.mark.parametrize('share', [.01, .1, .5, .9])
def test_holdout_is_a_partition(share):
    a, b = holdout(train, share, seed=3)
    assert len(a) + len(b) == len(train) and abs(len(b) - share*len(train)) <= 10
    rows = torch.cat([a.x, b.x]).flatten(1)
    assert torch.equal(rows.long().sum(1).sort()[0], train.x.flatten(1).long().sum(1).sort()[0])


@pytest.mark.parametrize('size', [8, 31, 32, 96])
@pytest.mark.parametrize('tfm', [PadCrop(2), Flip(), ResizedCrop(16), ColorJitter(), Greyscale(), Blur(kernel=5), Normalize()], ids=lambda t: type(t).__name__)
def test_augmentation_of_any_size_and_batch(tfm, size):
    for n in (1, 3):
        x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        out = tfm(x.clone())
        side = 16 if isinstance(tfm, ResizedCrop) else size
        assert out.shape == (n, 3, side, side) and out.isfinite().all()
        if not isinstance(tfm, Normalize) and out.dtype != torch.uint8: assert out.min() >= -1e-6 and out.max() <= 1 + 1e-5


def test_augmentation_does_not_write_into_the_data():
    x = train.x[:20].clone()
    for recipe in (*crop_augment(), *view_augment(32)): recipe(x)
    assert torch.equal(x, train.x[:20])


def test_each_image_has_its_own_draw():
    "The same image many times in a batch comes out in many ways"
    torch.manual_seed(0)
    x = train.x[:1].expand(64, -1, -1, -1)
    for tfm in (PadCrop(4), ResizedCrop(32), ColorJitter(p=1.), Blur(p=1.)): assert len(tfm(x).float().flatten(1).unique(dim=0)) > 30, tfm


@pytest.mark.parametrize('hw', [(32, 32), (20, 50), (50, 20)])
def test_boxes_lie_in_the_image(hw):
    t, l, h, w = random_boxes(5000, hw, scale=(.01, 1.)).T
    assert (t >= 0).all() and (l >= 0).all() and (h > 0).all() and (w > 0).all() and (t+h <= hw[0]).all() and (l+w <= hw[1]).all()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('side', [1, 5, 32])
def test_rotations_form_a_group(side, dtype):
    x = torch.randint(0, 256, (3, 3, side, side)).to(dtype)
    a, b, c, d = rotate4(x).chunk(4)
    assert torch.equal(a, x)
    assert torch.equal(rotate4(b).chunk(4)[3], x) and torch.equal(rotate4(c).chunk(4)[2], x) and torch.equal(rotate4(b).chunk(4)[1], c)
    assert rotation_labels(3).tolist() == [0]*3 + [1]*3 + [2]*3 + [3]*3


@pytest.mark.parametrize('n,bs,steps', [(10, 3, None), (10, 10, None), (7, 20, None), (5, 2, 11)])
def test_every_image_comes_equally_often(n, bs, steps):
    data = Images(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))
    dl = ImageDL(data, bs, shuffle=True, drop_last=False, steps=steps)
    batches = [b[1] for b in dl]
    assert len(batches) == len(dl)
    counts = torch.cat(batches).bincount(minlength=n)
    assert counts.max() - counts.min() <= (1 if steps else 0)


def test_distributed_loader_shards_the_data(monkeypatch):
    pytest.importorskip('accelerate')  # fastai.distributed wants it
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: [int(i) for i in t])  # it talks to GPUs
    data = Images(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.arange(40))
    seen = []
    for rank in range(2):
        dl = DistributedDL(ImageDL(data, 5), rank=rank, world_size=2)
        seen.append(torch.cat([b[1] for b in dl]))
    assert sorted(torch.cat(seen).tolist()) == list(range(40))


def test_knn_finds_itself():
    x, y = torch.randn(200, 16), torch.randint(0, 7, (200,))
    assert (knn(x, y, x, k=1).argmax(1) == y).all()
    with pytest.raises(InputError): knn(x, y, x, k=201)


@pytest.mark.parametrize('protocol', ['report', 'paper', 'best'])
def test_frozen_is_frozen_in_every_protocol(protocol):
    torch.manual_seed(0)
    trunk = nin(protocol, width=16)
    few, quiz = label_fraction(train, 3), test.subset(slice(0, 20))
    learn = transfer_learner(trunk, few, quiz, mode='frozen', protocol=protocol, bs=15, device='cpu')
    before = {k: v.clone() for k, v in learn.model[0].state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .1)
    assert all(torch.equal(v, before[k]) for k, v in learn.model[0].state_dict().items())


def test_bn_statistics_leave_the_weights_alone():
    trunk = NIN(16)
    before = {k: v.clone() for k, v in trunk.named_parameters()}
    set_bn_statistics(trunk, train.subset(slice(0, 100)), Normalize())
    assert all(torch.equal(v, before[k]) for k, v in trunk.named_parameters())
    assert not torch.equal(trunk.blocks[0][0][1].running_var, torch.ones(16))


def test_rotation_in_a_plain_learner_with_lr_find_and_get_preds():
    small = train.subset(slice(0, 200))
    learn = rotnet_learner(image_dls(small, test.subset(slice(0, 50)), 20, device='cpu'), NIN(16))
    with learn.no_bar(): learn.lr_find(num_it=5)
    preds, _ = learn.get_preds()
    assert preds.shape == (50, 4)


def test_loss_is_the_rotations_even_when_the_learner_has_another():
    seen = []
    class Peek(Callback):
        order = 40
        def after_loss(self): seen.append((self.loss.item(), len(self.yb[0])))
    net = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 4))
    nn.init.zeros_(net[1].weight); nn.init.zeros_(net[1].bias)
    learn = Learner(image_dls(train.subset(slice(0, 20)), test.subset(slice(0, 20)), 20, device='cpu'), net, nn.MSELoss(), cbs=[Augment(*crop_augment()), Rotation(), Peek()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    assert seen[0][1] == 80 and abs(seen[0][0] - 1.3863) < 1e-3  # log(4)
