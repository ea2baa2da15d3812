"A study that is killed at any moment goes on where it was, and ends with the same weights bit for bit"
import json
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import SSL_STUDY


def digests(out):
    "Name of each run -> digest of its final weights and its metrics"
    return {p.stem: (r['digest'], r['metrics'], r['history']) for p in out.glob('demo/*.json') for r in [json.loads(p.read_text())]}


def test_sigkill_at_random_moments(ssl_study, finished, tmp_path):
    rng, args, kills = random.Random(0), ['demo', '--scale', 'tiny', '--device', 'cpu', '--out', str(tmp_path)], 0
    for _ in range(3):
        p = subprocess.Popen([SSL_STUDY, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        p.stdout.readline()  # the imports are done, the study begins
        time.sleep(rng.uniform(0, 3))
        p.send_signal(signal.SIGKILL)
        kills += p.wait() == -signal.SIGKILL
        p.stdout.close()
        for f in tmp_path.glob('demo/*.json'): json.loads(f.read_text())  # whole files or none
    assert kills > 0
    r = ssl_study(*args)
    assert r.returncode == 0, r.stderr
    assert digests(tmp_path) == digests(finished)


# Kill the process itself just before, or just after, the n-th file takes its name: the moments at which most could be lost
AT_RENAME = """
import os, signal
real, left = os.replace, {n}
def replace(a, b):
    global left
    left -= 1
    if left == 0 and {before}: os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
from ssl_nb.cli import ssl_study
ssl_study('demo', scale='tiny', device='cpu', out={out!r})
"""


@pytest.mark.parametrize('n,before', [(2, True), (4, False), (5, False)])
def test_sigkill_while_a_file_is_written(ssl_study, finished, tmp_path, n, before):
    "The files of a run: a checkpoint after each epoch, the weights, the result; the first file of all only tries the folder"
    code = AT_RENAME.format(n=n, before=before, out=str(tmp_path))
    p = subprocess.run([sys.executable, '-c', code], capture_output=True)
    assert p.returncode == -signal.SIGKILL, p.stderr[-1000:]
    r = ssl_study('demo', '--scale', 'tiny', '--device', 'cpu', '--out', tmp_path)
    assert r.returncode == 0, r.stderr
    assert digests(tmp_path) == digests(finished)
    assert not list(tmp_path.rglob('*.tmp')) and not list(tmp_path.rglob('*.ckpt'))


def test_ctrl_c_says_how_to_go_on(ssl_study, finished, tmp_path):
    args = ['demo', '--scale', 'tiny', '--device', 'cpu', '--out', str(tmp_path)]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job is born deaf to Ctrl-C
    p = subprocess.Popen([SSL_STUDY, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    p.stdout.readline()
    time.sleep(.5)
    p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    assert p.returncode == 130 and 'the same command goes on' in err and 'Traceback' not in err
    assert ssl_study(*args).returncode == 0
    assert digests(tmp_path) == digests(finished)
