"""Shared by the tests: the scripts' folder on the path, small data sets made once, a way to run a script as a user would."""
import fcntl
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCENES = os.environ.get('SCENES', os.path.join(os.path.dirname(ROOT), 'shared', 'scenes'))  # real scenes, where they are at hand
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]
os.environ.setdefault('OMP_NUM_THREADS', '1')
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torch', 'torch.distributed', 'torch._dynamo', 'matplotlib.figure', 'tqdm', 'tifffile', 'conftest'])
MAE_TINY = ['--batch_size=8', '--steps=90', '--warmup=0.03', '--log_every=1', '--probe_tiles=4']


def make_scene(path, height=40, width=48, bands=7, num_classes=3, seed=0, **extra):
    """A labelled .npz scene whose classes are stripes of different spectra plus noise."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(height)[:, None] // 5 + np.arange(width) // 6) % num_classes + 1
    spectra = rng.uniform(500, 3000, (num_classes + 1, bands))
    cube = spectra[labels] + rng.normal(0, 100, (height, width, bands))
    labels[rng.random(labels.shape) < 0.2] = 0
    fields = dict(cube=cube.astype(np.uint16), labels=labels.astype(np.uint8), wavelengths_nm=np.linspace(450, 950, bands)) | extra
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return str(path)


class Finished:
    """What subprocess.run gives: returncode, stdout, stderr."""

    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def run_in_child(path, args, out_path, err_path, cwd=ROOT, environment={}, prepare=None, pictures=False):
    """In a fresh child of the fork server (torch imported, nothing else done): become `python path args`. For the rest see run()."""
    for number, name in ((1, out_path), (2, err_path)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    sys.stdout, sys.stderr = open(1, 'w', buffering=1, closefd=False), open(2, 'w', buffering=1, closefd=False)
    os.chdir(cwd)
    sys.argv, sys.path[0:0], code = [path, *args], [os.path.dirname(path)], 0
    if not pictures:
        Figure.savefig = lambda figure, path, **options: open(path, 'wb').close()
    if prepare:
        prepare()
    try:
        runpy.run_path(path, run_name='__main__')
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(*args, processes=1, cwd=ROOT, check=True, prepare=None, pictures=False):
    """Run `python script --flags`, or what torchrun starts of it, from `cwd` and return what it printed and its exit code.

    The processes come from a fork server that has imported torch already: 5 seconds less for each of some 100 runs. Without `pictures` figures
    are built but not rendered, their files are empty: 1 to 2 seconds less."""
    path, args = os.path.join(ROOT, args[0]), list(map(str, args[1:]))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        outputs, ranks = [os.path.join(folder, name) for name in ('out', 'err')], []
        for rank in map(str, range(processes)):
            environment = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
            ranks.append(SERVER.Process(target=run_in_child, args=(path, args, *outputs), kwargs=dict(
                cwd=str(cwd), environment=environment if processes > 1 else {}, prepare=prepare, pictures=pictures)))
            ranks[-1].start()
        codes, deadline = [None], time.time() + 300
        while None in codes and not any(codes) and time.time() < deadline:
            time.sleep(0.02)
            codes = [rank.exitcode for rank in ranks]
        for rank in ranks:  # as torchrun does: when one has failed, all end
            rank.terminate()
            rank.join(30)
            rank.kill()
        returncode = next(filter(None, codes), 0 if None not in codes else 'no end after 300 s')
        done = Finished(returncode, *(open(name).read() if os.path.exists(name) else '' for name in outputs))
    if check and done.returncode:
        raise AssertionError(f'{path} {args} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return done


def tiled(root, out, *flags):
    """Tiles of the scenes `root` in the directory `out`, as `data.py tile --root= --out= --flags` makes them, but in this process: for tests whose
    subject is not the command -> out"""
    import data  # not above: the fork server loads this file, and each run loads a data.py of its own
    data.tile(data.parse(['tile', f'--root={root}', f'--out={out}', *flags]))
    return out


def made_once(tmp_path_factory, name, make):
    """The folder `name`, filled by make(folder) in the first of pytest's workers that asks; the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        root = root.parent  # that of all workers
    folder = root / name
    with open(f'{folder}.lock', 'a+') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if lock.read() != 'made':
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)
            make(folder)
            lock.write('made')
    return folder


@pytest.fixture(scope='session')
def scene_data(tmp_path_factory):
    """A tile directory of one small scene: 7 bands, 3 classes, tiles of 16 px; the floors of all labels and of a tenth are known."""
    from data import floors  # not above: the fork server loads this file, and each run loads a data.py of its own

    def make(folder):
        scene = make_scene(folder / 'scene.npz', height=64, width=96)
        run('data.py', 'tile', f'--root={scene}', f'--out={folder / "tiles"}', '--tile_size=16', '--split_block=8')
        for label_share in (1.0, 0.1):
            floors(str(folder / 'tiles'), 'ts', label_share)
    return str(made_once(tmp_path_factory, 'scene', make) / 'tiles')


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    """A folder with the demo's tiles in demo/."""
    def make(folder):
        assert '24 classes' in run('data.py', 'demo', f'--out={folder / "demo"}').stdout
    return made_once(tmp_path_factory, 'with_demo', make)
