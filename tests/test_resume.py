"A study that is killed at any moment goes on where it was, and ends with the same weights bit for bit"
import json
import random
import signal
import subprocess
import time

import pytest
from conftest import SSL_STUDY


def digests(out):
    "Name of each run -> digest of its final weights and its metrics"
    return {p.stem: (r['digest'], r['metrics'], r['history']) for p in out.glob('demo/*.json') for r in [json.loads(p.read_text())]}


@pytest.mark.parametrize('seed', range(2))
def test_sigkill_at_random_moments(ssl_study, finished, tmp_path, seed):
    rng, args, kills = random.Random(seed), ['demo', '--scale', 'tiny', '--out', str(tmp_path)], 0
    for _ in range(4):
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


def test_ctrl_c_says_how_to_go_on(ssl_study, finished, tmp_path):
    args = ['demo', '--scale', 'tiny', '--out', str(tmp_path)]
    p = subprocess.Popen([SSL_STUDY, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    time.sleep(.5)
    p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    assert p.returncode == 130 and 'the same command goes on' in err and 'Traceback' not in err
    assert ssl_study(*args).returncode == 0
    assert digests(tmp_path) == digests(finished)
