"The installed package: its files, its modules, its names"
import importlib
import pkgutil
import subprocess
import sys
from importlib import metadata, resources

import pytest
import ssl_nb

MODULES = sorted(m.name.removeprefix('ssl_nb.') for m in pkgutil.walk_packages(ssl_nb.__path__, 'ssl_nb.')
                 if not m.ispkg and not m.name.startswith('ssl_nb._'))


def test_modules_are_all_there():
    parts = 'errors data augment nets backbones heads device learner schedule neighbours evaluate method siamese transfer weights checkpoint fast'
    parts += ' distributed plots fitting results loading image_files labels decode folders export settings report runs classifier launch terminal cli'
    assert MODULES == sorted([*parts.split(), *(f'studies.{m}' for m in 'datasets scenes runner kinds demo rotnet simsiam methods reports'.split()),
                              *(f'methods.{m}' for m in 'barlow_twins byol essl rotation simclr simsiam vicreg'.split()),
                              *(f'gpu.{m}' for m in 'graph kernels step'.split())])


@pytest.mark.parametrize('name', MODULES)
def test_exports(name):
    m = importlib.import_module(f'ssl_nb.{name}')
    assert m.__all__
    for n in m.__all__:
        if '.' not in n: assert hasattr(m, n), n


@pytest.mark.parametrize('name', MODULES)
def test_public_functions_are_documented(name):
    m = importlib.import_module(f'ssl_nb.{name}')
    for n in m.__all__:
        o = getattr(m, n, None)
        if callable(o) and getattr(o, '__module__', '') == m.__name__: assert o.__doc__, f'{name}.{n} has no docstring'


def test_own_images_need_no_study():
    "Who pretrains on a folder loads nothing of STL-10, CelebA and traffic signs"
    code = "import sys, ssl_nb.runs, ssl_nb.classifier; sys.exit(' '.join(m for m in sys.modules if m.startswith('ssl_nb.studies')) or 0)"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_page_templates_are_there():
    pages = [p.name for p in (resources.files('ssl_nb')/'templates').iterdir()]
    assert 'report.html' in pages


def test_version():
    assert metadata.version('ssl_nb') == ssl_nb.__version__


def test_sample_is_in_the_package():
    names = {p.name: p for p in (resources.files('ssl_nb')/'sample').iterdir()}
    assert {'train.webp', 'test.webp', 'labels.json'} <= set(names)
    assert sum(len(p.read_bytes()) for p in names.values() if p.is_file()) < 11e6


def test_no_development_tool_at_run_time():
    code = "import sys, ssl_nb.cli; bad = {'nbdev', 'execnb', 'jupyterlab', 'sphinx', 'pytest'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
