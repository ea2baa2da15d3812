"What the tests share: the command line in a process of its own, as a user runs it"
import os
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')  # `pytest -n`: a process on each core; read when torch is imported, and by what a test starts

os.environ.setdefault('SSL_NB_PRECISION', 'float32')  # `auto` would be measured, and a busy machine may choose now this, now that

import pytest

from ssl_nb import cli
from ssl_nb.data import InputError

def one_line_error(call, *said):
    "Check that a call is refused in one line that says all of `said`, and give the line"
    with pytest.raises(InputError) as e: call()
    text = str(e.value)
    assert '\n' not in text and '\r' not in text
    for s in said: assert s in text, text
    return text


@pytest.fixture
def serve(monkeypatch):
    "A function that serves a folder over HTTP from this process until the test is over, and gives the address"
    servers = []
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    def start(folder):
        servers.append(ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=folder)))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}'
    yield start
    for s in servers: s.shutdown(); s.server_close()


SSL_STUDY = Path(sys.executable).with_name('ssl_study')


@pytest.fixture(scope='session')
def ssl_study():
    def run(*args, **kwargs):
        return subprocess.run([SSL_STUDY, *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600, **kwargs)
    return run


@pytest.fixture
def study(capfd):
    "The same command called as a function, which saves the seconds that a new process takes to import torch"
    def run(*args, **kwargs):
        capfd.readouterr()
        try: cli.ssl_study(*args, **{k: str(v) if k == 'out' else v for k,v in kwargs.items()}); code = 0
        except SystemExit as e: code = e.code
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return run


@pytest.fixture(scope='session')
def finished(ssl_study, tmp_path_factory):
    "A folder with the demo at scale tiny, run without interruption"
    out = tmp_path_factory.mktemp('finished')
    r = ssl_study('demo', '--scale', 'tiny', '--device', 'cpu', '--out', out)  # bits can be compared on the CPU only
    assert r.returncode == 0, r.stderr
    return out


@pytest.fixture
def one_line():
    "Check that a command ended with one clear line and exit code 2, and give the line"
    def check(r):
        assert r.returncode == 2, (r.returncode, r.stderr[-2000:])
        lines = [l for l in r.stderr.replace('\r', '\n').splitlines() if l.strip() and 'batch/s' not in l]
        assert len(lines) == 1, r.stderr
        assert 'Traceback' not in r.stderr
        return lines[0]
    return check
