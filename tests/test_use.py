"""Used beyond the printed commands: the modules in a notebook, run directories that are copied, moved, opened twice, weights that go from run to run."""
import contextlib
import errno
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

import data
import pretrain_mae
from conftest import MAE_TINY, ROOT, made_once, make_scene, run
from data import Tiles, UserError, lock_directory, next_command
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


# ============ what is printed ============

def printed_command(done):
    """The last line that is a command -> its words behind `python`"""
    words = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith('python ')][-1]
    assert words[0] == 'python'
    return words[1:]


def test_printed_commands_run_as_they_are_printed_on_the_runs_own_data(tmp_path):
    home = tmp_path / 'my data'  # with a space
    os.makedirs(home / 'sc enes')
    for name, labels in (('a', 1), ('b', None)):
        scene = make_scene(home / 'sc enes' / f'{name}.npz', height=64, width=64, **({} if labels else {'labels': None}))
        run('data.py', 'tile', f'--root={scene}', f'--out={home}/{name} tiles', '--tile_size=16', '--split_block=8')
    done = run('pretrain_mae.py', *MAE, '--data=a tiles', '--out_dir=my runs/mae', cwd=home)
    judged = run(*printed_command(done), cwd=home)
    assert json.load(open(home / 'my runs' / 'mae_judged' / 'report.json'))['config']['data'] == 'a tiles'
    run(*printed_command(judged), cwd=home)
    assert os.path.exists(home / 'my runs' / 'mae_judged' / 'map.tif')
    done = run('pretrain_mae.py', *MAE, '--data=b tiles', '--out_dir=my runs/b', cwd=home)  # without labels nothing can be judged
    assert printed_command(done)[0].endswith('viz_attention.py')
    run(*printed_command(done), cwd=home)


@pytest.mark.parametrize('started, expected', [('pretrain_mae.py', 'segment.py'), ('../hsi/pretrain_mae.py', '../hsi/segment.py')])
def test_a_printed_command_finds_the_script_from_where_the_user_is(started, expected, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [started])
    assert next_command('segment.py', encoder="it's/last.pt") == shlex.join(['python', expected, "--encoder=it's/last.pt"])


# ============ a run directory that is opened twice, copied, moved ============

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_second_process_is_refused_and_the_first_is_unharmed(scene_data, runs, tmp_path):
    shutil.copytree(runs / 'runs', tmp_path / 'runs')
    scene = make_scene(tmp_path / 's.npz')
    for flags in (['pretrain_mae.py', *MAE, '--max_steps=3', f'--data={scene_data}', f'--out_dir={tmp_path}/runs/mae'],
                  ['segment.py', f'--data={scene_data}', f'--out_dir={tmp_path}/runs/judged'],
                  ['data.py', 'tile', f'--root={scene}', f'--out={tmp_path}/tiles', '--tile_size=16']):
        out = flags[-2] if flags[0] == 'data.py' else flags[-1]
        directory = tmp_path / out.split('=')[1]
        with lock_directory(str(directory)):
            before = contents(directory)
            done = run(*flags, check=False)
            assert done.returncode == 1 and f'{directory}: another process writes here' in done.stderr and 'Traceback' not in done.stderr
            assert contents(directory) == before
    run('pretrain_mae.py', *MAE, '--max_steps=3', f'--data={scene_data}', f'--out_dir={tmp_path}/runs/mae')  # it has ended


def test_a_lock_goes_with_its_process_however_that_ends(tmp_path):
    code = f'import sys, time; sys.path.insert(0, {ROOT!r}); import data; lock = data.lock_directory({str(tmp_path)!r}); print("held", flush=True); time.sleep(60)'
    holder = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(UserError, match='another process writes here'):
        lock_directory(str(tmp_path))
    holder.kill()
    holder.wait()
    lock_directory(str(tmp_path)).close()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(data.fcntl, 'flock', no_locks)
    lock_directory(str(tmp_path)).close()
    assert 'has no locks' in capsys.readouterr().out


@pytest.mark.parametrize('script', ['pretrain_dino.py', 'segment.py'])
def test_a_place_that_cannot_be_written_is_told_before_the_work(script, scene_data, tmp_path):
    (tmp_path / 'file').write_text('')
    done = run(script, f'--data={scene_data}', f'--out_dir={tmp_path}/file/run', check=False)
    assert done.returncode == 1 and 'nothing can be written here' in done.stderr and 'Traceback' not in done.stderr
    assert 'parameters' not in done.stdout


def test_data_that_were_moved_are_the_same_data_and_others_are_not(scene_data, runs, tmp_path):
    shutil.copytree(runs / 'runs' / 'mae', tmp_path / 'run')
    shutil.copytree(runs / 'data' / 'demo', tmp_path / 'moved')
    base = ['pretrain_mae.py', *FLAGS['pretrain_mae.py'], f'--out_dir={tmp_path}/run']
    for step, path in ((3, f'{tmp_path}/moved/'), (4, scene_data), (5, os.path.relpath(scene_data, tmp_path))):
        run(*base, f'--data={path}', f'--max_steps={step}', cwd=tmp_path)
    train('pretrain_mae.py', scene_data, tmp_path / 'quiet', '--max_steps=5')
    assert equal(weights(tmp_path / 'run'), weights(tmp_path / 'quiet')) and losses(tmp_path / 'run') == losses(tmp_path / 'quiet')
    scene = make_scene(tmp_path / 'other.npz', height=64, width=96, seed=4)
    run('data.py', 'tile', f'--root={scene}', f'--out={tmp_path}/other', '--tile_size=16', '--split_block=8')
    done = run(*base, f'--data={tmp_path}/other', '--max_steps=6', check=False)
    assert done.returncode == 1 and f'covariance and mean and settings and std in meta.json of {tmp_path}/other are not the same' in done.stderr


def test_a_checkpoint_of_another_script_in_the_run_directory_is_refused(scene_data, runs, tmp_path):
    os.makedirs(tmp_path / 'run')
    shutil.copy(runs / 'runs' / 'dino' / 'last.pt', tmp_path / 'run')
    for script in ('pretrain_dino_hsi.py', 'pretrain_mae.py'):
        done = train(script, scene_data, tmp_path / 'run', check=False)
        assert done.returncode == 1 and 'last.pt: was written by pretrain_dino.py: pass another --out_dir' in done.stderr
    shutil.copy(runs / 'runs' / 'judged' / 'best.pt', tmp_path / 'run')
    done = train('baseline_deeplab.py', scene_data, tmp_path / 'run', check=False)
    assert done.returncode == 1 and 'best.pt: was written by segment.py' in done.stderr


def test_an_encoder_at_another_path_is_the_same_and_none_is_another(scene_data, runs, tmp_path):
    shutil.copy(runs / 'runs' / 'mae' / 'last.pt', tmp_path / 'mine.pt')
    shutil.copytree(runs / 'runs' / 'judged', tmp_path / 'judged')
    base = ['segment.py', f'--data={scene_data}', f'--out_dir={tmp_path}/judged']
    run(*base, f'--encoder={tmp_path}/mine.pt')
    done = run(*base, check=False)
    assert done.returncode == 1 and 'encoder_crc32' in done.stderr


def test_a_judge_whose_best_state_is_gone_says_so(scene_data, tmp_path):
    for flags in ([], []):
        done = train('segment.py', scene_data, tmp_path / 'run', '--lr=1e-9', *flags)
        if os.path.exists(tmp_path / 'run' / 'best.pt') and 'is gone' not in done.stdout + done.stderr:
            os.remove(tmp_path / 'run' / 'best.pt')
    assert 'best.pt with' in done.stdout + done.stderr and 'is gone: this state replaces it' in done.stdout + done.stderr
