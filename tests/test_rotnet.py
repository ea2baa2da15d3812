"The RotNet study: from the command line at scale tiny, and what each protocol asks for"
import json

import pytest
import torch

from ssl_nb.cli import find_signs
from ssl_nb.data import InputError
from ssl_nb.nets import NIN
from ssl_nb.rotation import rotate, rotation_labels
from ssl_nb.rotnet_study import RECIPES, SCALES, freeze_like_keras1, rotations_runs, rotnet_runs, rotnet_table, train_mode_accuracy
from ssl_nb.study import Place, do_run, read_results, run_study


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
    for r in runs:
        if r['kind'] == 'boxes' and protocol != 'report': assert r['config']['split'] == 'photograph'
        if r['name'].startswith('fraction'): assert (r['config']['epochs'], r['config']['steps']) == (SCALES[scale]['epochs']['fraction'], SCALES[scale]['fraction']['steps'])  # equal for all


def test_report_drops_and_decays_as_its_code_did():
    runs = {r['name']: r for r in rotnet_runs('full', 'report', data='cifar10', signs='gtsdb')}
    assert [round(100*d) for d in runs['pretrain']['config']['drops']] == [31, 61, 81] and runs['pretrain']['config']['bs'] == 512
    assert [round(100*d) for d in runs['block2']['config']['drops']] == [20, 40, 45, 50]
    assert [round(100*d) for d in runs['conv']['config']['drops']] == [35, 70, 85]
    assert runs['signs-rotnet-leaking']['config']['bs'] == 16


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
