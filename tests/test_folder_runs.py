"Runs on folders that change, that are deep, that hold two CSV files; paths from home; and messages that speak of options"
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from fastcore.script import anno_parser

from conftest import one_line_error as one_line
from ssl_nb import cli, decode, terminal
from ssl_nb.classifier import export_run, load_classifier, transfer
from ssl_nb.data import Images, cifar10_sample
from ssl_nb.folders import image_folder
from ssl_nb.report import Run, open_run
from ssl_nb.runs import pretrain
from ssl_nb.settings import try_net

HOW = dict(size=16, bs=8, epochs=1, device='cpu', channels=(8,8,8,8))
TINY = ['--size', '16', '--epochs', '1', '--bs', '8', '--device', 'cpu', '--net', 'channels=(8,8,8,8)']


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp()/'cache'))


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Tiny nets are fastest so"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def write(folder, rows, classes=2, name='{}/{}.png', change=0):
    "Images of CIFAR-10 in folders of two classes"
    train = cifar10_sample()[0]
    for i in rows:
        path = Path(folder)/name.format('ab'[i%classes], i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(train.x[i+change].permute(1, 2, 0).numpy()).save(path)
    return Path(folder)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder of images and a run on it, done; and one that was stopped"
    os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.getbasetemp()/'cache')
    root = tmp_path_factory.mktemp('made')
    write(root/'photos', range(40)); write(root/'held', range(60, 76))
    pretrain(root/'photos', root/'run', **HOW)
    with pytest.raises(KeyboardInterrupt): pretrain(root/'photos', root/'stopped', minutes=1e-9, **HOW)
    return root


@pytest.fixture
def command(capfd):
    "A command called as a function: exit code, output, errors"
    def run(name, *args):
        f = getattr(cli, name)
        capfd.readouterr()
        try:
            given = vars(anno_parser(f.__wrapped__).parse_args([terminal._as_fastcore_wants(str(a)) for a in args]))
            f(**{k: v for k,v in given.items() if k not in ('pdb','xtra')}); code = 0
        except SystemExit as e: code = e.code
        return code, *capfd.readouterr()
    return run


# What a run learned from

@pytest.fixture
def mine(made, tmp_path):
    "A copy of all of it, that may be changed"
    shutil.copytree(made, tmp_path/'mine')
    return tmp_path/'mine'


@pytest.mark.parametrize('run', ['run', 'stopped'])
@pytest.mark.parametrize('config', [True, False])
def test_images_that_were_exchanged(mine, run, config):
    "As many, under the same names, of the same mean: never gone on with, and never said to be done"
    before = (mine/run/'config.json').read_bytes()
    a, b = (mine/'photos'/n for n in ('a/0.png', 'a/2.png'))
    x, y = a.read_bytes(), b.read_bytes(); a.write_bytes(y); b.write_bytes(x)
    if not config: (mine/run/'config.json').unlink()  # weights and checkpoint know it too
    one_line(lambda: pretrain(mine/'photos', mine/run, **HOW), 'its images were changed since')
    a.write_bytes(x); b.write_bytes(y)
    pretrain(mine/'photos', mine/run, **HOW)
    assert Run(mine/run).result and (mine/run/'config.json').read_bytes() == before


def test_what_is_the_same_all_the_same(mine, capfd):
    "Another place, other times, another format: the images are what they were"
    for p in (mine/'photos').rglob('*.png'): Image.open(p).save(p.with_suffix('.bmp')); p.unlink()
    (mine/'photos/notes.txt').write_text('text')
    (mine/'photos').rename(mine/'x'); (mine/'moved').mkdir(); (mine/'x').rename(mine/'moved/photos')
    pretrain(mine/'moved/photos', mine/'run', **HOW)
    assert 'done already' in capfd.readouterr()[0]


def test_another_last_digit_is_the_same_run(mine, capfd):
    "A run whose mean was added up in another order, by an earlier version: finished, and by its own numbers"
    from ssl_nb.fitting import write_json
    for run in ('run', 'stopped'):
        whole = Run(mine/run)._config()
        assert whole['config'].pop('digest') and whole['data'].pop('labels') is None  # as before there were any
        whole['config']['std'][0] += 1e-15; whole['config']['mean'][1] -= 1e-9
        write_json(mine/run/'config.json', **whole)
    capfd.readouterr()
    pretrain(mine/'photos', mine/'run', **HOW)
    assert 'done already' in capfd.readouterr()[0]
    (mine/'stopped/checkpoint.ckpt').unlink()
    run = pretrain(mine/'photos', mine/'stopped', **HOW)
    assert run.config == whole['config'] and run.trunk  # the weights agree with the configuration
    whole['config']['std'][0] += 1e-3
    write_json(mine/'run/config.json', **whole)
    one_line(lambda: pretrain(mine/'photos', mine/'run', **HOW), 'std: ')


def test_labels_that_were_changed(tmp_path):
    "They say what is held out, and measure"
    write(tmp_path/'photos', range(40))
    rows = [f'{p.parent.name}/{p.name},{p.parent.name}' for p in sorted((tmp_path/'photos').rglob('*.png'))]
    table = tmp_path/'labels.csv'
    table.write_text('\n'.join(['file,label', *rows]))
    pretrain(tmp_path/'photos', tmp_path/'run', labels=table, **HOW)
    table.write_text('\n'.join(['file,label', *(r.replace(',a', ',c').replace(',b', ',a').replace(',c', ',b') for r in rows[:2]), *rows[2:]]))
    one_line(lambda: pretrain(tmp_path/'photos', tmp_path/'run', labels=table, **HOW), 'the labels to measure by were changed since')


# More than 8 bits

def deep(folder, rows, top):
    for i in rows:
        path = Path(folder)/'ab'[i%2]/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        x = np.random.default_rng(i).integers(0, top+1, (16,16)); x[0,0] = top
        Image.fromarray(x.astype(np.uint16)).save(path)
    return Path(folder)


def test_one_range_for_all_that_goes_with_a_run(tmp_path, capfd, monkeypatch):
    "Training, labelled, held-out and later images: a dark folder stays dark"
    photos, few, held = (deep(tmp_path/n, r, top) for n, r, top in (('photos', range(40), 4095), ('few', range(50, 66), 900), ('held', range(70, 86), 500)))
    scale, seen, read = {'whole': [0, 4095]}, [], decode.decode_images
    monkeypatch.setattr('ssl_nb.folders.decode_images', lambda *args: seen.append(args[-1]) or read(*args))
    run = pretrain(photos, tmp_path/'run', few, **HOW)
    assert run.config['scale'] == scale and 'whole numbers of 0 to 4095 became 0 to 255, the same in all images' in capfd.readouterr()[0]
    transfer(run, few, held, epochs=1, against=False, device='cpu', name='t')
    assert seen == [None, scale, scale, scale]
    settings = load_classifier(tmp_path/'run/transfer-t')[2]
    later = image_folder(held, 16, scale=settings['scale'])
    assert settings['scale'] == scale and later.x.max() == round(500*255/4095)
    one_line(lambda: transfer(run, image_folder(few, 16), epochs=1, device='cpu'), "scale=run.config['scale']", '4095')
    how = {k: v for k, v in HOW.items() if k != 'size'}
    one_line(lambda: pretrain(image_folder(photos, 16, labels=None), tmp_path/'other', image_folder(few, 16), **how), 'scale=images.scale')
    assert not (tmp_path/'other').exists()
    more = deep(tmp_path/'photos', [98], 9000)  # another range makes other images of all
    one_line(lambda: pretrain(more, tmp_path/'run', few, **HOW), 'holds another run', 'its images were changed since')


# CSV files of two folders

@pytest.fixture
def tables(tmp_path):
    "Two folders with the same names of files, and a labels.csv in each"
    for part, first, labels in (('train', 0, 'ab'), ('val', 40, 'ba')):
        write(tmp_path/part, range(16), name='{1}.png', change=first)
        (tmp_path/part/'labels.csv').write_text('\n'.join(['file,label', *(f'{i}.png,{labels[i%2]}' for i in range(16))]))
    return tmp_path


def held_labels(monkeypatch):
    "What a transfer measures on"
    seen, compare = [], __import__('ssl_nb.classifier', fromlist=['compare']).compare
    def look(run, c, t, train, held, *args): seen.append((train, held)); return compare(run, c, t, train, held, *args)
    monkeypatch.setattr('ssl_nb.classifier.compare', look)
    return seen


@pytest.mark.parametrize('labels, valid', [
    ('labels.csv', ''), ('{}/train/labels.csv', '{}/val/labels.csv'), ('labels.csv', '../val/labels.csv'), ('{}/both.csv', '')])
def test_each_folder_has_its_own_labels(made, tables, monkeypatch, command, labels, valid):
    (tables/'both.csv').write_text('\n'.join(['file,label', *(f'{part}/{i}.png,{l[i%2]}' for part, l in (('train', 'ab'), ('val', 'ba')) for i in range(16))]))
    shutil.copytree(made/'run', tables/'run')
    monkeypatch.chdir(tables/'train')
    seen = held_labels(monkeypatch)
    more = ['--valid_labels', valid.format(tables)] if valid else []
    code, out, err = command('ssl_transfer', '../run', '.', '--valid', '../val', '--labels', labels.format(tables), *more,
                             '--epochs', 1, '--alone', '--device', 'cpu')
    assert code == 0, err
    train, held = seen[0]
    assert [[part.vocab[k] for k in part.y] for part in (train, held)] == [
        ['ab'[int(f[:-4])%2] for f in train.files], ['ba'[int(f[:-4])%2] for f in held.files]]
    assert f"labels: {tables/labels.format(tables) if '/' in labels else tables/'train/labels.csv'}" in out


def test_one_csv_that_could_mean_both(made, tables, command, monkeypatch):
    (tables/'val/labels.csv').unlink()
    monkeypatch.chdir(tables/'train')
    shutil.copytree(made/'run', tables/'run')
    code, out, err = command('ssl_transfer', '../run', '.', '--valid', '../val', '--labels', 'labels.csv', '--device', 'cpu')
    assert code == 2 and "'0.png' is in" in err and '--valid-labels FILE' in err, err


def test_classes_in_another_order(made, tables):
    a, b = (image_folder(made/'photos', 16), image_folder(made/'held', 16, vocab=['b', 'a']))
    one_line(lambda: transfer(made/'run', a, b, epochs=1, device='cpu'), 'another order', 'vocab')


# Paths from home, options with a dash

def test_home(mine, tmp_path, monkeypatch, command):
    "`--out=~/run` is the home folder's, which a shell does not say; so in every option that is a path, and in Python"
    monkeypatch.setenv('HOME', str(mine))
    (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here')
    assert command('ssl_pretrain', '~/photos', '--out', '~/new', '--labelled', '~/held', '--cache', '~/kept',
                   '--weights', '~/run/weights.safetensors', *TINY)[0] == 0
    assert command('ssl_transfer', '~/new', '~/photos', '--valid', '~/held', '--cache', '~/kept', '--epochs', 1, '--alone', '--device', 'cpu')[0] == 0
    assert command('ssl_export', '~/new', '--out', '~/out.safetensors')[0] == 0
    assert (mine/'new/report.html').exists() and (mine/'out.safetensors').exists() and list((mine/'kept').glob('*.bin'))
    assert pretrain('~/photos', '~/run', **HOW).result and open_run('~/run').folder == mine/'run'
    export_run('~/run', path='~/two.safetensors')
    load_classifier(str(next((mine/'new').glob('transfer-*'))).replace(str(mine), '~'))
    one_line(lambda: pretrain('~/photos', '~/photos/run', **HOW), 'in the folder of the images')
    assert (mine/'two.safetensors').exists() and not list((tmp_path/'here').iterdir())


def test_a_dash_between_words(made, tmp_path):
    "`--valid-labels` and `--valid_labels`, whichever of them fastcore has"
    r = subprocess.run([Path(sys.executable).with_name('ssl_pretrain'), made/'photos', f"--max{terminal._BETWEEN[1]}bad=7",
                        '--out', tmp_path/'run'], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.strip() == 'ssl_pretrain: --max-bad 7.0: give a share of the images, from 0 to 1', r.stderr


@pytest.mark.parametrize('net, size, takes', [('convnext_atto', 8, [32, 64]), ('levit_128s', 40, [224])])
def test_sizes_that_are_named_work(net, size, takes):
    c = lambda size: dict(net=dict(name=net, size=size), size=size, weights=None)
    line = one_line(lambda: try_net(c(size), 3), f'{net} cannot learn from images of {size} pixels; take ' + ' or '.join(f'size={s}' for s in takes))
    for s in re.findall(r'size=(\d+)', line): try_net(c(int(s)), 3)


# What is said

def test_where_decoded_images_are(mine, tmp_path, command, cache):
    code, out, err = command('ssl_pretrain', mine/'photos', '--out', tmp_path/'a', *TINY)
    assert code == 0 and f"decoded images are kept in {Path(os.environ['XDG_CACHE_HOME'])/'ssl_nb/folders'}; " in out and '--cache FOLDER' in out
    code, out, err = command('ssl_pretrain', mine/'photos', '--out', tmp_path/'b', '--cache', tmp_path/'mine', *TINY)
    assert code == 0 and f"decoded images are kept in {tmp_path/'mine'}; " in out and list((tmp_path/'mine').glob('*.bin'))
    code, out, err = command('ssl_pretrain', mine/'photos', '--out', tmp_path/'c', '--cache', 'none', *TINY)
    assert code == 0 and 'decoded images are kept' not in out


def test_what_was_passed_over_is_on_the_page(mine, tmp_path, command):
    (mine/'photos/film.mp4').touch()
    with pytest.warns(UserWarning, match='^photos: skipped as no images: 1 .mp4$'):
        code, out, err = command('ssl_pretrain', mine/'photos', '--out', tmp_path/'a', *TINY)
    assert code == 0 and '1 .mp4' in (tmp_path/'a/report.html').read_text()


PYTHON = re.compile(r"(?<![-\w])(max_bad|labels|valid_labels|size|cache|weights|sep|minutes|strict|prefix|channels|vocab|workers)\b\s*=|=None|`skipped`")


@pytest.mark.parametrize('name, args, said', [
    ('ssl_pretrain', ['{bad}'], 'let more pass with --max-bad (now 0.1 of all), such as --max-bad 0.'),
    ('ssl_pretrain', ['{photos}','--size','3'], '--size 3: give a whole number from 8 to 1024, or leave it out'),
    ('ssl_pretrain', ['{photos}','--minutes','-1'], '--minutes -1'),
    ('ssl_pretrain', ['{photos}','--sep',';'], "--sep ';'"),
    ('ssl_pretrain', ['{photos}','--max_bad','2'], '--max-bad 2'),
    ('ssl_pretrain', ['{parts}','--labels','folders'], 'as parts of a data set are, not classes; give one of them'),
    ('ssl_pretrain', ['{mixed}','--labels','folders'], '--labels FILE.csv'),
    ('ssl_pretrain', ['{photos}/a','--backbone','nin','--net','width=8','--weights','imagenet'], 'take no --weights, or a file'),
    ('ssl_pretrain', ['{photos}','--weights','{weights}'], 'does not fit the trunk'),
    ('ssl_pretrain', ['{photos}','--net','','--backbone','convnext_atto','--size','8'], 'cannot learn from images of 8 pixels; take --size 32 or --size 64'),
    ('ssl_transfer', ['{run}','{parts}'], '{parts}/seg_train'),
    ('ssl_transfer', ['{run}','{photos}/a'], 'no labels'),
    ('ssl_transfer', ['{run}','{one}'], 'one class only'),
    ('ssl_transfer', ['{run}','{photos}','--valid','{mixed}/d'], "which is none of the classes to learn from (a, b); add images of it there"),
    ('ssl_transfer', ['{run}','{photos}','--sep',';'], "--sep ';'"),
])
def test_messages_speak_of_options(made, tmp_path, command, name, args, said):
    at = {k: tmp_path/k for k in ('bad', 'parts', 'mixed', 'one')}
    for k, ns in dict(bad=['a/{}.png'], parts=['seg_train/{}.png', 'seg_test/{}.png'], mixed=['{}.png', 'd/e/{}.png', 'd/f/{}.png'], one=['a/{}.png']).items():
        for n in ns: write(at[k], range(24), name=n.replace('{}', '{1}'))
    for p in list((tmp_path/'bad').rglob('*.png'))[:10]: p.write_text('')
    at.update(photos=made/'photos', run=made/'run', weights=made/'run/weights.safetensors')
    args = [a.format(**at) for a in args]
    if name == 'ssl_pretrain':
        if '--net' in args: tiny = [o for o in TINY if o not in ('--net', TINY[-1])]
        elif '--weights' in args: tiny = [*TINY[:-1], 'channels=(8,8,8,16)']
        else: tiny = TINY
        args = [*tiny, *args, '--out', tmp_path/'out']
    code, out, err = command(name, *args)
    lines = [l for l in err.splitlines() if l.strip() and 'skipped' not in l]
    assert code == 2 and len(lines) == 1 and said.format(**at) in lines[0], (code, err)
    assert not PYTHON.search(lines[0].replace(str(tmp_path), '').replace(str(made), '')), lines[0]


def test_options_are_those_of_the_command():
    "Only words that the command has become options; a path that looks like one stays"
    class f:
        def __init__(self, size, max_bad, download): pass
    say = lambda text: terminal.as_options(text, f)
    assert say("size=3: give 8") == '--size 3: give 8' and say('/data/size=3/x.png and lr=3') == '/data/size=3/x.png and lr=3'
    assert say("`download=True` (`--download` on the command line) fetches it") == '`--download` fetches it'
    assert say('let more pass with max_bad (now 0.1 of all), such as max_bad=0.3') == 'let more pass with --max-bad (now 0.1 of all), such as --max-bad 0.3'
