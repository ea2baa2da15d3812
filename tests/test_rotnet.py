"The RotNet study: from the command line at scale tiny, and what each protocol asks for"
import json

import pytest
import torch
from fastai.learner import Learner
from torch import nn

from ssl_nb.cli import find_signs
from ssl_nb.data import InputError
from ssl_nb.nets import NIN, feature_shape
from ssl_nb.methods.rotation import rotate, rotation_labels
from ssl_nb.studies.rotnet import (RECIPES, SCALES, _settings, artefact_table, freeze_like_keras1, rotations_runs, rotnet_runs, rotnet_table,
                                 train_mode_accuracy)
from ssl_nb.results import read_results
from ssl_nb.studies.runner import KINDS, Place, do_run, run_study


def test_the_whole_study_from_the_command_line(ssl_study, tmp_path):
    args = ['rotnet', '--scale', 'tiny', '--device', 'cpu', '--out', tmp_path]
    r = ssl_study(*args)
    assert r.returncode == 0, r.stderr[-2000:]
    for title in ('Table 3', 'Table 4', 'Table 5', 'Table 6', 'by labels a class', 'TensorFlow 1'): assert title in r.stdout
    assert 'in all, on this machine' in r.stdout
    for name in (*(f'figure{n}' for n in range(4, 10)), 'few-labels'): assert (tmp_path/f'rotnet/tiny-best-sample-seed0-{name}.png').stat().st_size > 4000
    before = {p: p.read_bytes() for p in tmp_path.glob('rotnet/*.json')}
    again = ssl_study(*args)
    assert '23 of them done' in again.stdout and again.stdout.split('Rotations told right')[1] == r.stdout.split('Rotations told right')[1]
    assert before == {p: p.read_bytes() for p in tmp_path.glob('rotnet/*.json')}


@pytest.mark.parametrize('protocol', RECIPES)
@pytest.mark.parametrize('scale', SCALES)
def test_runs_are_plain_data_with_names_of_their_own(scale, protocol):
    runs = rotnet_runs(scale, protocol, 3, 'cifar10', signs='gtsdb') + rotations_runs(scale, protocol, 3, 'cifar10')
    assert len({r['run'] for r in runs}) == len(runs)
    assert json.loads(json.dumps(runs)) == runs
    s = _settings(scale, protocol)
    for r in runs:
        if r['kind'] == 'boxes' and protocol != 'report': assert r['config']['split'] == 'photograph'
        if r['name'].startswith('fraction'): assert (r['config']['epochs'], r['config']['steps']) == (s['epochs']['fraction'], s['fraction']['steps'])  # equal for all


def test_report_drops_and_decays_as_its_code_did():
    runs = {r['name']: r for r in rotnet_runs('full', 'report', data='cifar10', signs='gtsdb')}
    assert [round(100*d) for d in runs['pretrain']['config']['drops']] == [31, 61, 81] and runs['pretrain']['config']['bs'] == 512
    assert [round(100*d) for d in runs['block2']['config']['drops']] == [20, 40, 45, 50]
    assert [round(100*d) for d in runs['conv']['config']['drops']] == [35, 70, 85]
    assert runs['signs-rotnet-leaking']['config']['bs'] == 16


def test_the_papers_nonlinear_head_drops_three_times():
    runs = {r['name']: r['config'] for r in rotnet_runs('full', 'paper', data='cifar10', signs='gtsdb')}
    for name in ('block1', 'block4', 'random-nonlinear'): assert [round(100*d) for d in runs[name]['drops']] == [20, 40, 45]
    assert [round(100*d) for d in runs['conv']['drops']] == [35, 70, 85]


@pytest.mark.parametrize('name', ['block1', 'conv', 'finetuned', 'fraction-conv-20'])
def test_heads_of_the_papers_code_start_wide(name, monkeypatch):
    "N(0, sqrt(2/out)), not cut off; the supervised net is no head on another"
    import ssl_nb.studies.rotnet as study
    monkeypatch.setattr(study, 'run_transfer', lambda run, place, change=None: change('trunk'))
    runs = {r['name']: r for r in rotnet_runs('full', 'paper', data='cifar10')}
    trunk, head = KINDS[runs[name]['kind']](runs[name], None)
    torch.manual_seed(0)
    last = [m for m in head(feature_shape(NIN(192), 2), 10).modules() if isinstance(m, nn.Linear)][-1]
    assert trunk == 'trunk' and not last.bias.any()
    assert last.weight.std().item() == pytest.approx(.447, rel=.06) and last.weight.abs().max() > 2.5*.447
    assert runs['supervised']['kind'] == runs['fraction-supervised-20']['kind'] == 'transfer'


def test_a_run_of_the_papers_heads(tmp_path):
    runs = {r['name']: r for r in rotnet_runs('tiny', 'paper')}
    assert do_run(runs['random-nonlinear'], Place(tmp_path, device='cpu'))['config']['linear'] == 'normal'


def test_the_artefact_of_the_report_has_its_rates_its_momentum_and_all_labels(tmp_path, monkeypatch):
    import ssl_nb.studies.rotnet as study
    c = next(r for r in rotnet_runs('full', 'report', data='cifar10') if r['name'] == 'artefact')['config']
    assert [round(100*d) for d in c['drops']] == [35, 70, 85] and c['labels'] is None and (c['epochs'], c['lr'], c['bs']) == (100, .1, 128)
    heads, fit = [], study.fit_run
    monkeypatch.setattr(study, 'fit_run', lambda learn, *args: heads.append(learn.model[1]) or fit(learn, *args))
    place = Place(tmp_path, device='cpu')
    runs = {p: next(r for r in rotnet_runs('tiny', p) if r['name'] == 'artefact') for p in ('best', 'report')}
    do_run(runs['best'], place)
    def one_cycle(*args, **kwargs): raise AssertionError('the honest head shall have the same rates')
    monkeypatch.setattr(Learner, 'fit_one_cycle', one_cycle)
    do_run(runs['report'], place)
    assert [{m.momentum for m in h.modules() if isinstance(m, nn.BatchNorm2d)} for h in heads] == [{.1}, {.9}]


def test_an_artefact_with_other_rates_does_not_count_as_done(tmp_path):
    run = next(r for r in rotnet_runs('tiny', 'report') if r['name'] == 'artefact')
    place = Place(tmp_path, device='cpu')
    do_run(dict(run, config={k: v for k, v in run['config'].items() if k != 'drops'}), place)
    with pytest.raises(InputError, match=r'another config \(drops: None and not'): run_study([run], place, verbose=False)


def test_a_demonstration_is_not_taken_for_the_artefact():
    "It is fitted on a few images, and stands beside rows that have all labels"
    metrics = dict(training_mode=1., same_images_in_evaluation=.1, test=.1, honest_test=.3)
    def result(labels, n):
        what = dict(study='rotnet', name='artefact', protocol='report', scale='small', seed=0, data=dict(name='cifar10'))
        return dict(what, config=dict(labels=labels), sizes=dict(labelled=n), metrics=metrics)
    few, whole = (rotnet_table([r], 5)['ours: report, small'] for r in (result(20, 200), result(None, 50000)))
    rows = ['random + conv, as frozen by TensorFlow 1', 'demonstration of that on few labels']
    assert few[rows].tolist() == ['not run', '10.0 (n=1), 200 images'] and whole[rows].tolist() == ['10.0 (n=1)', 'not run']
    assert list(artefact_table([result(20, 200)])) == ['accuracy, fitted on 200 images']
    parts = {s: {p: next(r for r in rotnet_runs(s, p, data='cifar10') if r['name'] == 'artefact')['part'] for p in RECIPES} for s in SCALES}
    assert [(s, p) for s in SCALES for p in RECIPES if 'demonstration' not in parts[s][p]] == [('full', 'report'), ('full', 'best')]


def test_a_study_without_its_signs_leaves_them_out(tmp_path, capsys):
    assert find_signs(str(tmp_path), False) is None
    assert 'Table 6 is left out' in capsys.readouterr().out
    assert find_signs('', False) == 'sample' and find_signs(str(tmp_path), True) == 'gtsdb'
    assert not any(r['kind'] == 'boxes' for r in rotnet_runs('tiny', signs=None))


def test_paper_takes_its_200_epochs():
    runs = {r['name']: r['config'].get('epochs') for r in rotnet_runs('full', 'paper', data='cifar10')}
    assert (runs['pretrain'], runs['supervised'], runs['conv'], runs['block2']) == (200, 200, 100, 100)


def test_a_run_says_on_which_data_it_is(tmp_path):
    with pytest.raises(InputError, match="is to run on 'cifar10', but the place has 'sample'"): run_study(rotnet_runs('tiny', data='cifar10'), Place(tmp_path, device='cpu'))


def test_labels_are_those_that_were_asked_for():
    runs = rotnet_runs('tiny', labels=(3, 7))
    assert sorted({r['config']['labels'] for r in runs if r['name'].startswith('fraction')}) == [3, 7]
    assert {r['config']['labels'] for r in rotnet_runs('small') if r['name'].startswith('fraction')} == {20, 100, 400, None}  # what the sample has


@pytest.mark.parametrize('turns', [2, 4, 8])
def test_every_turn_is_its_own_class(turns):
    x = torch.rand(3, 3, 16, 16)
    out, y = rotate(x, turns), rotation_labels(3, turns=turns)
    assert len(out) == len(y) == 3*turns and y.bincount().tolist() == [3]*turns
    k = turns//2  # half a circle
    torch.testing.assert_close(out[3*k:3*k+3].flip(-1, -2), out[:3], atol=1e-5, rtol=0)


def test_other_numbers_of_turns_are_refused():
    for turns in (0, 1, 3, 16):
        with pytest.raises(InputError, match='give 2, 4 or 8'): rotate(torch.rand(1, 3, 8, 8), turns)


def test_keras_freezing_changes_nothing_but_what_is_evaluated():
    torch.manual_seed(0)
    blocks = freeze_like_keras1(NIN(16).upto(2))
    x, state = torch.randn(40, 3, 32, 32), {k: v.clone() for k, v in blocks.state_dict().items()}
    trained, evaluated = blocks.train()(x), blocks.eval()(x)
    for k, v in blocks.state_dict().items():
        if 'num_batches' not in k: assert torch.equal(v, state[k]), k
    assert (trained - evaluated).abs().mean() > .1*trained.abs().mean()


def test_result_of_a_sign_run_says_what_one_box_for_all_gives(tmp_path):
    runs = rotnet_runs('tiny')
    place = Place(tmp_path, device='cpu')
    do_run(next(r for r in runs if r['name'] == 'signs-random-photograph'), place)
    m = read_results(tmp_path)[0]['metrics']
    assert set(m) == {'argmax_match', 'iou', 'iou_50', 'mae_px', 'constant'} and set(m['constant']) == set(m) - {'constant'}


def test_tables_never_mix_data_sets():
    r = dict(study='rotnet', name='block1', protocol='best', scale='small', seed=0, data=dict(name='sample'), metrics=dict(accuracy=.5))
    with pytest.raises(InputError, match='several settings'): rotnet_table([r, dict(r, data=dict(name='cifar10'))], 3)
    assert rotnet_table([r, dict(r, seed=1)], 3).loc['block 1', 'ours: best, small'].endswith('(n=2)')
