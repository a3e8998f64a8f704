"""Shared by the tests: the scripts' folder on the path, small data sets made once, a way to run a script as a user would."""
import os
import subprocess
import sys

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCENES = os.path.join(os.path.dirname(ROOT), 'shared', 'scenes')  # real scenes, where they are at hand
sys.path.insert(0, ROOT)
os.environ.setdefault('OMP_NUM_THREADS', '1')
MAE_TINY = ['--size=tiny', '--img_size=16', '--patch_size=4', '--batch_size=8', '--epochs=30', '--warmup_epochs=1', '--log_every=1',
            '--probe_tiles=4']


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


def run(*args, processes=1, cwd=ROOT, check=True, **kwargs):
    """Run `python script --flags` (or torchrun) from `cwd` and return the finished process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master_port=0', '--standalone']
    command = launcher + [os.path.join(ROOT, args[0]), *map(str, args[1:])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, **kwargs)
    if check and done.returncode:
        raise AssertionError(f'{command} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return done


@pytest.fixture(scope='session')
def scene_data(tmp_path_factory):
    """A tile directory of one small scene: 7 bands, 3 classes, tiles of 16 px."""
    folder = tmp_path_factory.mktemp('scene')
    scene = make_scene(folder / 'scene.npz', height=64, width=96)
    run('data.py', 'tile', f'--root={scene}', f'--out={folder / "tiles"}', '--tile_size=16', '--split_block=8')
    return str(folder / 'tiles')
