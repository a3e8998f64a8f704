"""Used beyond the printed commands: the modules in a notebook, run directories that are copied, moved, opened twice, weights that go from run to run."""
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import MAE_TINY, ROOT, made_once, make_scene, run
from data import Tiles, UserError, lock_directory
from models import MaskedAutoencoder, dense_features, load_checkpoint, load_encoder, start_from
from test_train import FLAGS, JUDGES, PRETRAINERS, equal, losses, train, weights

MAE = [*MAE_TINY, '--whiten=3', '--max_steps=2']


@pytest.fixture(scope='module')
def runs(scene_data, tmp_path_factory):
    """A folder as a user has it: data/demo with tiles, runs of two steps in runs/mae, runs/dino, runs/dino_hsi, one judged in runs/judged."""
    def make(folder):
        shutil.copytree(scene_data, folder / 'data' / 'demo')
        for script, name in zip(PRETRAINERS, ('mae', 'dino', 'dino_hsi')):
            train(script, 'data/demo', f'runs/{name}', '--max_steps=2', cwd=folder)
        run('segment.py', '--encoder=runs/mae/last.pt', '--out_dir=runs/judged', cwd=folder)
    return made_once(tmp_path_factory, 'used', make)


# ============ the modules as something people import ============

def recipes():
    text = open(os.path.join(ROOT, 'docs', 'python.md'), encoding='utf-8').read()
    return re.findall(r'```python\n(.*?)```', text, re.S)


def test_the_recipes_of_the_docs_run_and_say_what_they_should(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / 'home')
    monkeypatch.chdir(tmp_path / 'home')
    assert len(recipes()) == 5 and all(len(recipe.splitlines()) <= 12 for recipe in recipes())
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for recipe in recipes():
            exec(compile(recipe, 'docs/python.md', 'exec'), names)
    tiles, encoder = names['tiles'], names['encoder']
    nearest = json.loads(printed.getvalue().splitlines()[0])
    assert len(set(nearest)) == 5 and 5 not in nearest
    assert float(re.search(r'R2 (\S+)', printed.getvalue())[1]) > 0.5  # the mean of a band is in the features
    assert int(re.search(r'(\d+)% right', printed.getvalue())[1]) > 80  # classes of very different spectra
    # the map is that of the run, tile by tile
    network, raw = names['network'], tiles.batch([0])[0]
    with torch.no_grad():
        expected = network(network.prepare(raw)).argmax(1)[0] + 1
    np.testing.assert_array_equal(names['classes'], expected)
    # the own loop's encoder comes back
    own, model = load_encoder('own.pt'), names['model'].eval()
    with torch.no_grad():
        assert torch.equal(dense_features(own, own.prepare(raw)), dense_features(model.encoder, own.prepare(raw)))
    again = MaskedAutoencoder(**names['args'], decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3)
    again.load_state_dict(load_checkpoint('own.pt')['model'])
    done = run('segment.py', '--encoder=own.pt', '--data=data/demo', '--out_dir=runs/own', cwd=tmp_path / 'home')
    assert 'own loop + logistic' in done.stdout
