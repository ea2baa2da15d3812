"Result files lead back to the code that made them"
import json
from pathlib import Path

import pytest

import ssl_nb.results as results
import ssl_nb.studies.runner as study
from ssl_nb.data import InputError
from ssl_nb.studies.methods import methods_runs, methods_table
from ssl_nb.studies.demo import demo_runs
from ssl_nb.studies.rotnet import rotations_runs, rotnet_runs
from ssl_nb.studies.simsiam import simsiam_runs
from ssl_nb.fitting import git_commit
from ssl_nb.results import check_commit, read_results, save_result
from ssl_nb.studies.runner import Place, do_run, run_study

RUN = dict(study='toy', run='a', name='a', kind='toy', protocol='best', scale='tiny', seed=0, data=dict(name='sample'),
           config=dict(train=300))
RESULT = dict(RUN, metrics=dict(accuracy=.5), history=[], seconds=1., machine={}, commit='1234567890')


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout whose code was changed; its folder of results"
    monkeypatch.setattr(results, 'results_of_checkout', lambda: tmp_path/'repository/results')
    monkeypatch.setattr(study, 'git_commit', lambda: '1234567890+')
    (tmp_path/'repository/results/toy').mkdir(parents=True)
    return tmp_path/'repository/results'


def test_changed_code_writes_no_result_into_the_repository(checkout, tmp_path, monkeypatch):
    (tmp_path/'link').symlink_to(checkout)
    monkeypatch.chdir(checkout.parent)
    for folder in (checkout/'toy', checkout, tmp_path/'link/new', 'results/toy'):
        with pytest.raises(InputError, match='since commit 12345678: commit the change first, or choose another folder'):
            save_result(dict(RESULT, commit='1234567890+'), folder)
    assert not list(checkout.rglob('*.json'))
    for folder, commit in ((checkout/'toy', '1234567890'), (tmp_path/'runs', '1234567890+'), (tmp_path/'installed', None)):
        save_result(dict(RESULT, commit=commit), folder)
        assert read_results(folder)[0]['commit'] == commit


def test_changed_code_is_refused_before_anything_is_trained(checkout, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setitem(study.KINDS, 'toy', lambda run, place: ran.append(run['run']) or dict(metrics=dict(accuracy=.5), history=[]))
    with pytest.raises(InputError, match='commit the change first'): run_study([RUN], Place(checkout/'toy', 'cpu'), verbose=False)
    assert not ran
    run_study([RUN], Place(tmp_path/'runs', 'cpu'), verbose=False)
    assert ran == ['a'] and read_results(tmp_path/'runs')[0]['commit'] == '1234567890+'


def test_what_is_done_can_be_read_by_changed_code(checkout):
    save_result(RESULT, checkout/'toy')
    run_study([RUN], Place(checkout/'toy', 'cpu'), verbose=False)


def test_the_commit_is_that_of_the_code_which_ran(tmp_path, monkeypatch):
    "And not of a change that was made meanwhile"
    commits = iter(('before', 'after'))
    monkeypatch.setattr(study, 'git_commit', lambda: next(commits))
    monkeypatch.setitem(study.KINDS, 'toy', lambda run, place: dict(metrics=dict(accuracy=.5), history=[]))
    assert do_run(RUN, Place(tmp_path, 'cpu'))['commit'] == 'before'


def test_this_code_may_write_where_it_is_clean():
    commit = git_commit()
    if commit and commit.endswith('+'):
        with pytest.raises(InputError): check_commit(results.results_of_checkout()/'x', commit)
    else: check_commit(results.results_of_checkout()/'x', commit)


def test_committed_results_are_of_the_runs_of_today():
    "Or a table would show a number under a recipe that did not make it"
    home = Path(__file__).parents[1]/'results'
    if not home.exists(): pytest.skip('no checkout')
    runs = {'demo': demo_runs('small'), 'rotations': rotations_runs('small', data='cifar10'), 'rotnet': [], 'simsiam': [],
            'methods': methods_runs('small', data='cifar10')}
    for p in ('report', 'paper', 'best'):
        runs['rotnet'] += rotnet_runs('small', p, data='cifar10', signs='gtsdb')
        for data in ('cifar10', 'stl10', 'celeba'): runs['simsiam'] += simsiam_runs('small', p, data=data)
    for name, some in runs.items():
        known = {r['run']: json.loads(json.dumps(r['config'])) for r in some}
        for r in read_results(home/name, scale='small', seed=0): assert r['config'] == known[r['run']], r['run']


def test_a_result_that_was_changed_by_hand_is_found(tmp_path):
    save_result(RESULT, tmp_path)
    file = tmp_path/'a.json'
    file.write_text(file.read_text().replace('"accuracy": 0.5', '"accuracy": 0.9'))
    with pytest.raises(InputError, match=r'a\.json is damaged'): read_results(tmp_path)


def test_results_from_before_there_were_checksums_are_read_as_they_stand(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps(RESULT))
    assert read_results(tmp_path) == [RESULT]
    save_result(RESULT, tmp_path)
    assert 'checksum' in json.loads((tmp_path/'a.json').read_text()) and read_results(tmp_path) == [RESULT]


def test_committed_results_are_of_kinds_that_there_are():
    "Also those whose kind would have another name today"
    home = Path(__file__).parents[1]/'results'
    if not home.exists(): pytest.skip('no checkout')
    kinds = {r['kind'] for name in ('demo', 'rotations', 'rotnet', 'simsiam', 'methods') for r in read_results(home/name)}
    assert {'pretrain', 'siamese_pretrain'} <= kinds <= study.KINDS.keys() & study.COSTS.keys()


def by_name(method, **config):
    "A pretraining that names its method"
    config = dict(method=method, backbone='resnet18', net=dict(channels=[8, 8, 16, 16]), size=32, stats='cifar10',
                  train=200, test=100, valid=.2, watch=40, bs=40, epochs=1, **config)
    return dict(RUN, run=f'by-{method}', name=method, kind='pretrain', config=config)


def test_a_study_pretrains_by_a_method_of_ones_own(tmp_path, monkeypatch):
    "With the rate, the fit and the block that the method says"
    from dataclasses import replace
    from ssl_nb import method
    fits = []
    def fit(learn, epochs): fits.append((epochs, learn.lr)); learn.fit(epochs)
    mine = replace(method.get_method('rotation'), name='mine', lr=.02, fit=fit, block=lambda n: 3)
    monkeypatch.setitem(method.METHODS, 'mine', mine)
    run_study([by_name('mine')], Place(tmp_path, 'cpu'), verbose=False)
    r, = read_results(tmp_path)
    assert fits == [(1, .02)] and r['block'] == 3 and r['sizes'] == dict(unlabelled=160, bank=160, test=100)
    assert len(r['metrics']['knn']) == 4 and 'linear' in r['metrics'] and r['seconds'] > 0
    assert r['memory_mb'] is None or r['memory_mb'] > 100
    assert (tmp_path/'weights/by-mine.safetensors').exists()


def test_methods_may_have_the_same_budget_of_views():
    from ssl_nb.method import method_names
    from ssl_nb.studies.kinds import views_an_image
    views = {m: views_an_image(m) for m in method_names() if m not in ('mine',)}
    assert views['rotation'] == 4 and views['simsiam'] == 2 and all(2 <= v <= 4 for v in views.values())


def test_the_comparison_of_methods_has_a_row_for_each(tmp_path):
    "Also for one that somebody registers; here two of them are run, at the same number of views"
    from ssl_nb.method import method_names
    runs = methods_runs('tiny')
    assert [r['name'] for r in runs] == ['random', *method_names()]
    some = [r for r in runs if r['name'] in ('random', 'rotation', 'simclr')]
    run_study(some, Place(tmp_path, 'cpu'), verbose=False)
    table = methods_table(read_results(tmp_path))
    assert list(table.index) == ['random', 'rotation', 'simclr'] and table.loc['simclr', 'epochs'] == 2*table.loc['rotation', 'epochs']
