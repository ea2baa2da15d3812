"The kernels give the views of the recipes: in Triton's interpreter, and on a GPU where there is one. Triton's compiler takes them in any case."
import importlib.util
import os
import subprocess
import sys
from itertools import permutations

import pytest
import torch
from torch import nn

from ssl_nb.augment import CIFAR10_STATS, Blur, ColorJitter, Flip, Greyscale, Normalize, PadCrop, ResizedCrop, crop_augment, view_augment, unit

triton = pytest.importorskip('triton')
from ssl_nb.gpu import kernels
from ssl_nb.gpu.kernels import FusedViews, fuse_views, why_not_fused

# triton reads the variable when it is imported, and that was before this file: these tests run in a process of their own
interpreted = pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') != '1', reason='for the process with the interpreter')
compiled = pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='for the process without the interpreter')
gpu = pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get('TRITON_INTERPRET') == '1', reason='needs a GPU')

def stats(C): return tuple(s[:C] for s in CIFAR10_STATS)
def recipe(size, C=3, p=.5, scale=(.2,1.)):
    return nn.Sequential(ResizedCrop(size, scale), Flip(p), ColorJitter(.4, .4, .4, .1, p), Greyscale(p), Normalize(*stats(C)))

def images(B, C, H, W): return torch.randint(0, 256, (B,C,H,W), dtype=torch.uint8, generator=torch.Generator().manual_seed(B+C+H+W))

def check(recipe, x, dtype=torch.float32, eps=2e-5, seed=0):
    "The same views after the same seed, the same random state after them, and channels last in memory"
    assert why_not_fused(recipe, x) == ''
    torch.manual_seed(seed); want, after = recipe(x), torch.rand(3, device=x.device)
    torch.manual_seed(seed); got, after2 = fuse_views(recipe, dtype)(x), torch.rand(3, device=x.device)
    assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(after, after2)
    assert ((got.float()-want)*recipe[-1].std).abs().max() < eps


@compiled
def test_in_the_interpreter():
    "All tests of this file that want the interpreter"
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
    r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__], env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stdout[-5000:] + r.stderr[-2000:]
    assert 'passed' in r.stdout and 'failed' not in r.stdout


@interpreted
@pytest.mark.parametrize('size, C, B, H, W', [(32,3,8,32,32), (32,1,4,32,32), (24,3,3,32,32), (24,3,2,31,53), (48,3,2,32,32), (48,1,1,70,64), (64,3,2,64,64), (64,3,1,20,90), (5,3,2,96,33), (1,3,2,8,8)])
def test_crops(size, C, B, H, W): check(recipe(size, C), images(B, C, H, W))

@interpreted
@pytest.mark.parametrize('p, scale', [(0., (.2,1.)), (1., (.2,1.)), (1., (1.,1.)), (.5, (.02,.05))])
def test_extremes(p, scale): check(recipe(32, 3, p, scale), images(4, 3, 32, 32))

@interpreted
def test_every_order_of_the_colours():
    "All 24 orders, with large changes, on images that also hold grey and black pixels"
    x = images(24, 3, 16, 16)
    x[:,:,:4] = x[:,:1,:4]
    x[:,:,4:6] = 0
    order = torch.tensor(list(permutations(range(4))))
    r = nn.Sequential(ResizedCrop(16), ColorJitter(.9, .9, .9, .5, 1.), Normalize())
    draw = r[1].draw
    r[1].draw = lambda x: (*draw(x)[:2], order, torch.ones(24))
    check(r, x)

@interpreted
@pytest.mark.parametrize('left_out', [(1,), (2,), (3,), (1,2,3)])
def test_a_part_less(left_out): check(nn.Sequential(*(m for k,m in enumerate(recipe(32)) if k not in left_out)), images(3, 3, 32, 32))

@interpreted
def test_recipes_of_the_studies():
    for seed in range(3): check(view_augment(32)[0], images(6, 3, 32, 32), seed=seed)
    check(crop_augment()[0], images(5, 3, 32, 32))

@interpreted
@pytest.mark.parametrize('pad, C, B, H, W', [(4,3,1,32,32), (4,1,3,32,32), (0,3,2,17,40), (9,3,2,40,33), (40,3,2,32,32)])
def test_pad_crops(pad, C, B, H, W):
    for flip in ([Flip()], [Flip(1.)], []): check(nn.Sequential(PadCrop(pad), *flip, Normalize(*stats(C))), images(B, C, H, W))

@interpreted
@pytest.mark.parametrize('r', [recipe(32), crop_augment()[0]], ids=['crop', 'pad'])
def test_images_in_any_memory_order_and_by_rows(r):
    x = images(9, 3, 32, 32)
    views = fuse_views(r)
    def seeded(*args): torch.manual_seed(1); return views(*args)
    want = seeded(x)
    big = images(9, 3, 80, 70); big[:,:,40:72,20:52] = x
    for same in (x.to(memory_format=torch.channels_last), x.permute(3,1,0,2).contiguous().permute(2,1,3,0), big[:,:,40:72,20:52]): assert torch.equal(seeded(same), want)
    rows = torch.tensor([8,0,0,5,3])
    for i in (rows, rows.int(), rows.repeat_interleave(2)[::2]): assert torch.equal(seeded(x, i), seeded(x[rows]))
    assert torch.equal(seeded(x[:1].expand(4,-1,-1,-1)), seeded(x[:1].repeat(4,1,1,1)))

@interpreted
@pytest.mark.parametrize('dtype, eps', [(torch.float16, 2**-11), (torch.bfloat16, 2**-7)])  # the interpreter cuts bfloat16 off
def test_half_precision(dtype, eps):
    for r in (recipe(32), crop_augment()[0]): check(r, images(3, 3, 32, 32), dtype, eps)


def test_what_cannot_be_fused():
    r,norm = recipe(32), Normalize()
    for bad, said in ((view_augment(64)[0], 'Blur'), (recipe(65), '65'), (norm, 'no nn.Sequential'), (nn.Sequential(), 'does not begin'), (nn.Sequential(*r, norm), 'each once'),
                      (nn.Sequential(r[0], r[2], r[1], norm), 'each once'), (nn.Sequential(*r[:-1]), 'end with Normalize'), (nn.Sequential(Flip(), norm), 'does not begin'),
                      (nn.Sequential(PadCrop(), ColorJitter(), norm), 'ColorJitter'), (nn.Sequential(PadCrop(), Blur(), norm), 'Blur')):
        assert said in why_not_fused(bad), (bad, why_not_fused(bad))
        assert fuse_views(bad) is None
    class Other(Flip): pass
    assert 'Other' in why_not_fused(nn.Sequential(r[0], Other(), norm))

@compiled
def test_without_triton(monkeypatch):
    "Where triton cannot be imported the module can, and there are no kernels"
    monkeypatch.setitem(sys.modules, 'triton', None)
    spec = importlib.util.spec_from_file_location('ssl_nb.gpu.kernels_without_triton', kernels.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.why_not_fused(recipe(32)) == 'triton is not installed' and alone.fuse_views(recipe(32)) is None
    x = images(2, 3, 32, 32)
    torch.manual_seed(0); want = recipe(32)(x)
    torch.manual_seed(0); assert torch.equal(alone.FusedViews(recipe(32))(x), want)

def test_half_interpreted(monkeypatch):
    "Kernels of one kind and Triton's own functions of the other do not go together"
    monkeypatch.setattr(kernels.tl, 'sum', None if isinstance(kernels.tl.sum, triton.JITFunction) else triton.JITFunction(kernels.tl.sum.fn))
    assert 'TRITON_INTERPRET' in why_not_fused(recipe(32))

@compiled
def test_falls_back_to_the_recipe():
    "What is not on a GPU, and floats, give what the recipe gives, to the bit; errors of the recipe come through"
    r,x = recipe(32), images(4, 3, 40, 30)
    views = fuse_views(r)
    assert isinstance(views, FusedViews) and 'one kernel' in repr(views)
    rows = torch.tensor([2,2,0])
    for args, same in (((x,), x), ((unit(x),), unit(x)), ((x,rows), x[rows])):
        torch.manual_seed(0); want = r(same)
        torch.manual_seed(0); assert torch.equal(views(*args), want)
    assert fuse_views(r, torch.bfloat16)(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match='images of 1 channel'): views(x[:,:1])

def test_reasons_by_image():
    r,x = recipe(32), images(2, 3, 32, 32)
    for bad, said in ((unit(x), 'float32'), (x[0], 'not uint8 [B,C,H,W]'), (x[:,:1], '1 channels'), (x.to('meta'), 'meta')): assert said in why_not_fused(r, bad)
    if os.environ.get('TRITON_INTERPRET') == '1':
        assert 'no images' in why_not_fused(r, x[:0]) and 'rows' in why_not_fused(r, x, torch.tensor([True,False])) and 'no images' in why_not_fused(r, x, torch.tensor([]).long())
    else: assert 'cpu, not on a GPU' in why_not_fused(r, x)


@compiled
@pytest.mark.parametrize('capability', [80, 90])
def test_compiles_for_gpus_that_are_not_here(capability, tmp_path, monkeypatch):
    "Triton's own compiler and NVIDIA's assembler take the kernels, and all of an image fits in registers"
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    types = dict(x='*u8', rows='*i64', boxes='*i64', corners='*i64', order='*i64', out='*bf16', **dict.fromkeys(('flips','factors','shift','coins','greys','mean','std'), '*fp32'))
    def compile(kernel, warps, **fixed):
        names = kernel.arg_names
        signature = {n: 'constexpr' if n in fixed else types.get(n, 'i32') for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): v for n,v in fixed.items()}, {})
        return triton.compile(source, target=GPUTarget('cuda', capability, 32), options={'num_warps': warps}).asm
    for asm in (compile(kernels._crop_views, 8, C=3, S=32, P=1024, KY=2, KX=2, rows=None), compile(kernels._crop_views, 16, C=3, S=64, P=4096, KY=3, KX=7), compile(kernels._pad_views, 4, C=3, P=1024, flips=None)):
        assert len(asm['cubin']) > 1000
        assert '.f64' not in asm['ptx'] and '.local' not in asm['ptx']


@gpu
@pytest.mark.parametrize('size, C, B, H, W', [(32,3,512,32,32), (32,1,64,32,32), (24,3,65,31,53), (48,3,33,96,96), (64,3,40,178,218), (1,3,2,8,8)])
def test_on_a_gpu(size, C, B, H, W):
    x = images(B, C, H, W).cuda()
    for p in (0., .5, 1.): check(recipe(size, C, p).cuda(), x, eps=1e-4)
    check(nn.Sequential(PadCrop(4), Flip(), Normalize(*stats(C))).cuda(), x, eps=1e-4)
    for dtype, eps in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)): check(recipe(size, C).cuda(), x.to(memory_format=torch.channels_last), dtype, eps)

@gpu
def test_rows_on_a_gpu():
    x,rows = images(1000, 3, 32, 32).cuda(), torch.randint(0, 1000, (256,), device='cuda')
    for r in (recipe(32).cuda(), crop_augment()[0].cuda()):
        views = fuse_views(r)
        torch.manual_seed(0); want = views(x[rows])
        torch.manual_seed(0); assert torch.equal(views(x, rows), want)

@gpu
@pytest.mark.parametrize('r', [recipe(32), crop_augment()[0]], ids=['crop', 'pad'])
def test_in_a_cuda_graph(r):
    "Recorded once, played twice: other draws each time, and each what the recipe makes of images that came later"
    views,x = fuse_views(r.cuda()), images(64, 3, 32, 32).cuda()
    views(x)  # compiled here
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = views(x)
    x.copy_(images(64, 3, 32, 32).flip(0))
    torch.manual_seed(0); graph.replay(); first = out.clone(); graph.replay()
    assert not torch.equal(first, out)
    torch.manual_seed(0); graph.replay()
    assert torch.equal(first, out)
    torch.manual_seed(0)
    assert ((first-r(x))*r[-1].std).abs().max() < 1e-4
