"""Used beyond the printed commands: the modules in a notebook, run directories that are copied, moved, opened twice, weights that go from run to run."""
import contextlib
import errno
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from matplotlib.figure import Figure

import data
import pretrain_mae
from conftest import MAE_TINY, ROOT, made_once, make_scene, run, tiled
from data import Tiles, UserError, lock_directory, next_command
from models import MaskedAutoencoder, SpatialSpectralViT, dense_features, load_checkpoint, load_encoder, save_checkpoint, start_from
from test_train import FLAGS, JUDGES, PRETRAINERS, altered_copy, equal, losses, train, weights, whole  # noqa: F401  a fixture

MAE = [*MAE_TINY, '--whiten=3', '--max_steps=2']
JUDGED = ['--decoder=linear', '--steps=20', '--eval_every=20']  # seconds less than to solve it, and it knows more than one class


@pytest.fixture(scope='module')
def runs(scene_data, tmp_path_factory):
    """A folder as a user has it: data/demo with tiles, runs of two steps in runs/mae, runs/dino, runs/dino_hsi, one judged in runs/judged."""
    def make(folder):
        shutil.copytree(scene_data, folder / 'data' / 'demo')
        for script, name in zip(PRETRAINERS, ('mae', 'dino', 'dino_hsi')):
            train(script, 'data/demo', f'runs/{name}', '--max_steps=2', cwd=folder)
        run('segment.py', '--encoder=runs/mae/last.pt', '--out_dir=runs/judged', *JUDGED, cwd=folder)
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
    assert len(np.unique(expected)) > 1
    # the own loop's encoder comes back
    own, model = load_encoder('own.pt'), names['model'].eval()
    with torch.no_grad():
        assert torch.equal(dense_features(own, own.prepare(raw)), dense_features(model.encoder, own.prepare(raw)))
    again = MaskedAutoencoder(**names['args'], decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3)
    again.load_state_dict(load_checkpoint('own.pt')['model'])
    done = run('segment.py', '--encoder=own.pt', '--data=data/demo', '--out_dir=runs/own', '--decoder=linear', '--steps=1', cwd=tmp_path / 'home')
    assert 'own loop + linear' in done.stdout


# ============ what is printed ============

def printed_command(done):
    """The last line that is a command -> its words behind `python`"""
    words = [shlex.split(line) for line in done.stdout.splitlines() if 'python' in line.split(' ')[0]][-1]
    assert os.path.basename(words[0]).startswith('python')
    return words[1:]


def test_printed_commands_run_as_they_are_printed_on_the_runs_own_data(tmp_path):
    home = tmp_path / 'my data'  # with a space
    os.makedirs(home / 'sc enes')
    for name, labels in (('a', 1), ('b', None)):
        scene = make_scene(home / 'sc enes' / f'{name}.npz', height=64, width=64, **({} if labels else {'labels': None}))
        tiled(scene, home / f'{name} tiles', '--tile_size=16', '--split_block=8')
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
    assert next_command('segment.py', encoder="it's/last.pt") == shlex.join([sys.orig_argv[0], expected, "--encoder=it's/last.pt"])


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


def test_a_notebook_runs_a_script_again_and_others_stay_out(scene_data, tmp_path):
    """As `%run` does it: one process, and the globals of the first run, with its lock, are still alive at the second."""
    cells = "import runpy, sys\nscript, *flags = sys.argv[1:]\nkept = []\nfor last in '12':\n    sys.argv = [script, *flags, f'--max_steps={last}']\n"
    (tmp_path / 'notebook.py').write_text(cells + "    kept.append(runpy.run_path(script, run_name='__main__'))\n")
    run(tmp_path / 'notebook.py', os.path.join(ROOT, 'pretrain_mae.py'), *MAE, f'--data={scene_data}', f'--out_dir={tmp_path}/run')
    assert load_checkpoint(tmp_path / 'run' / 'last.pt')['step'] == 2
    first, again = lock_directory(str(tmp_path / 'run')), lock_directory(f'{tmp_path}/./run/')
    assert first.closed and not again.closed
    done = run('pretrain_mae.py', *MAE, f'--data={scene_data}', f'--out_dir={tmp_path}/run', check=False)
    assert done.returncode == 1 and 'another process writes here' in done.stderr
    again.close()


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


def test_data_that_were_moved_are_the_same_data_and_others_are_not(scene_data, whole, runs, tmp_path):
    shutil.copytree(runs / 'runs' / 'mae', tmp_path / 'run')
    shutil.copytree(runs / 'data' / 'demo', tmp_path / 'moved')
    base = ['pretrain_mae.py', *FLAGS['pretrain_mae.py'], f'--out_dir={tmp_path}/run']
    for step, path in ((3, f'{tmp_path}/moved/'), (12, os.path.relpath(scene_data, tmp_path))):
        run(*base, f'--data={path}', f'--max_steps={step}', cwd=tmp_path)
    quiet = whole('pretrain_mae.py')
    assert equal(weights(tmp_path / 'run'), weights(quiet)) and losses(tmp_path / 'run') == losses(quiet)
    scene = make_scene(tmp_path / 'other.npz', height=64, width=96, seed=4)
    tiled(scene, tmp_path / 'other', '--tile_size=16', '--split_block=8')
    done = run(*base, f'--data={tmp_path}/other', '--max_steps=13', check=False)
    assert done.returncode == 1 and f'covariance and mean and settings and std in meta.json of {tmp_path}/other are not the same' in done.stderr


def test_a_checkpoint_of_another_script_in_the_run_directory_is_refused(scene_data, runs, tmp_path):
    os.makedirs(tmp_path / 'run')
    shutil.copy(runs / 'runs' / 'dino' / 'last.pt', tmp_path / 'run')
    for script in ('pretrain_dino_hsi.py', 'pretrain_mae.py'):
        done = train(script, scene_data, tmp_path / 'run', check=False)
        assert done.returncode == 1 and 'last.pt: was written by pretrain_dino.py: pass another --out_dir' in done.stderr
    os.remove(tmp_path / 'run' / 'last.pt')
    shutil.copy(runs / 'runs' / 'judged' / 'best.pt', tmp_path / 'run')
    done = train('baseline_deeplab.py', scene_data, tmp_path / 'run', check=False)
    assert done.returncode == 1 and 'best.pt: was written by segment.py' in done.stderr


def test_an_encoder_at_another_path_is_the_same_and_none_is_another(scene_data, runs, tmp_path):
    shutil.copy(runs / 'runs' / 'mae' / 'last.pt', tmp_path / 'mine.pt')
    shutil.copytree(runs / 'runs' / 'judged', tmp_path / 'judged')
    base = ['segment.py', f'--data={scene_data}', f'--out_dir={tmp_path}/judged', *JUDGED]
    run(*base, f'--encoder={tmp_path}/mine.pt')
    done = run(*base, check=False)
    assert done.returncode == 1 and 'encoder_crc32' in done.stderr


def test_a_judge_whose_best_state_is_gone_says_so(scene_data, tmp_path):
    for flags in ([], []):
        done = train('segment.py', scene_data, tmp_path / 'run', '--lr=1e-9', *flags)
        if os.path.exists(tmp_path / 'run' / 'best.pt') and 'is gone' not in done.stdout + done.stderr:
            os.remove(tmp_path / 'run' / 'best.pt')
    assert 'best.pt with' in done.stdout + done.stderr and 'is gone: this state replaces it' in done.stdout + done.stderr


def test_what_could_not_be_read_again_is_not_saved(tmp_path):
    save_checkpoint(tmp_path / 'own.pt', {'losses': [0.5], 'step': 1})
    for value in (np.float64(0.4), [np.ones(3)], np.float32(1)):
        with pytest.raises(UserError, match='own.pt: not written, since its numpy.* could not be read again safely: make it a tensor, number'):
            save_checkpoint(tmp_path / 'own.pt', {'losses': value, 'step': 2})
        assert load_checkpoint(tmp_path / 'own.pt')['step'] == 1


# ============ weights that go from run to run ============

@pytest.mark.parametrize('script, source, fresh, left_out', [
    ('pretrain_dino_hsi.py', 'mae', 'fuse, head, mask_token, spectral', 'decoder'), ('pretrain_dino.py', 'dino_hsi', 'head', 'fuse, spectral'),
    ('pretrain_mae.py', 'judged', 'decoder, decoder_pred, mask_token', ''),
    pytest.param('pretrain_dino.py', 'mae', 'head, mask_token', 'decoder, decoder_pred, mask_token', marks=pytest.mark.slow),
    pytest.param('pretrain_dino_hsi.py', 'dino', 'fuse, head, spectral', '', marks=pytest.mark.slow)])
def test_a_run_starts_from_the_encoder_of_any_other(script, source, fresh, left_out, scene_data, runs, tmp_path):
    path = shutil.copy(runs / 'runs' / source / ('best.pt' if source == 'judged' else 'last.pt'), tmp_path)
    still = ['--base_lr=0'] + ['--momentum_teacher=1'] * ('dino' in script)
    done = train(script, scene_data, tmp_path / 'run', f'--init_from={path}', '--max_steps=1', '--whiten=2', *still)
    assert re.search(rf'{path}: \d+ tensors taken; what starts fresh: {fresh}(; what is left out of the file: {left_out}.*)?; they learned with --whiten=3, here it is 2\n', done.stdout)
    assert ('left out of the file' in done.stdout) == bool(left_out)
    assert 'Warning' not in done.stderr  # torch's remarks on a script's own lines are no news to a user
    given, got = load_encoder(path).state_dict(), load_encoder(tmp_path / 'run' / 'last.pt').state_dict()
    shared = given.keys() & got.keys()
    assert len(shared) > 70 and all(torch.equal(given[name], got[name]) for name in shared)
    if 'dino' in script:  # student and teacher alike
        both = weights(tmp_path / 'run')
        assert all(torch.equal(both[f'student.encoder.{name}'], given[name]) for name in shared)
    if script == 'pretrain_mae.py':  # last.pt is all that going on needs
        os.remove(path)
        done = train(script, scene_data, tmp_path / 'run', f'--init_from={path}', '--max_steps=2', '--whiten=2', *still)
        assert 'tensors taken' not in done.stdout and load_checkpoint(tmp_path / 'run' / 'last.pt')['step'] == 2


def test_what_cannot_start_a_run_is_told_in_a_sentence(scene_data, runs, tmp_path):
    for script, source, words in (('pretrain_mae.py', 'dino', 'start pretrain_dino.py from it'), ('pretrain_mae.py', 'dino_hsi', 'start pretrain_dino.py from it')):
        done = train(script, scene_data, tmp_path / 'run', f'--init_from={runs}/runs/{source}/last.pt', check=False)
        assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr
    train('baseline_deeplab.py', scene_data, tmp_path / 'cnn', '--max_steps=1')
    done = train('pretrain_dino.py', scene_data, tmp_path / 'run', f'--init_from={tmp_path}/cnn/last.pt', check=False)
    assert done.returncode == 1 and 'holds no encoder' in done.stderr and 'Traceback' not in done.stderr
    done = train('baseline_deeplab.py', scene_data, tmp_path / 'run', f'--init_from={runs}/runs/mae/last.pt', check=False)
    assert done.returncode == 1 and 'does not fit this network' in done.stderr and 'Traceback' not in done.stderr
    with pytest.raises(UserError, match='decoder_pred.*does not fit|does not fit'):  # its own script's run is taken whole or not at all
        start_from(str(runs / 'runs' / 'mae' / 'last.pt'), MaskedAutoencoder(16, 4, 7, 128, 6, 4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2), 'pretrain_mae.py', 3)


def test_a_second_stream_of_other_groups_starts_fresh(runs, tmp_path):
    """An encoder of two streams in another script's file, while this one groups its bands otherwise"""
    checkpoint = load_checkpoint(runs / 'runs' / 'dino_hsi' / 'last.pt')
    weights = {name.removeprefix('teacher.'): value for name, value in checkpoint['model'].items() if name.startswith('teacher.encoder.')}
    path = str(tmp_path / 'last.pt')
    save_checkpoint(path, {**checkpoint, 'model': weights, 'script': 'segment.py'})
    model = torch.nn.Module()
    model.encoder = SpatialSpectralViT(**{**checkpoint['encoder_args'], 'spectral_patch_size': 3})
    before = model.state_dict()['encoder.spectral_embed.weight'].clone()
    assert 'starts fresh: spectral' in start_from(path, model, 'pretrain_dino_hsi.py', checkpoint['config']['whiten'])
    after = model.state_dict()
    assert torch.equal(after['encoder.spectral_embed.weight'], before)
    assert torch.equal(after['encoder.blocks.0.attn.qkv.weight'], weights['encoder.blocks.0.attn.qkv.weight'])


def test_the_first_probe_of_a_run_that_started_from_weights_is_not_called_random():
    log = [{'step': 0, 'probe_miou': 0.1}, {'step': 9, 'probe_miou': 0.4}]
    for init_from, label in (('', 'random encoder'), ('runs/mae/last.pt', 'the encoder it started from')):
        axis = Figure().subplots()
        data.draw_probe(axis, log, init_from)
        assert [line.get_label() for line in axis.lines] == ['frozen encoder', label]
    for script in PRETRAINERS:
        assert 'draw_probe(right, log, init_from)' in open(os.path.join(ROOT, script), encoding='utf-8').read()


# ============ mistakes that are blamed on something else ============

def tiles_with(meta_changes, source, folder):
    shutil.copytree(source, folder)
    meta = json.load(open(folder / 'meta.json'))
    for name, value in meta_changes.items():
        meta[name] = value
    json.dump(meta, open(folder / 'meta.json', 'w'))
    return folder


def test_splits_without_labels_are_refused_only_where_they_are_needed(scene_data, tmp_path):
    counts = json.load(open(os.path.join(scene_data, 'meta.json')))['class_counts']
    for split in ('val', 'ts'):
        tiles = tiles_with({'class_counts': {**counts, split: [0, 0, 0]}}, scene_data, tmp_path / split)
        np.save(tiles / f'{split}_labels.npy', 0 * np.load(tiles / f'{split}_labels.npy'))
        for decoder in ('logistic', 'linear')[:1 + (split == 'val')]:  # the CNN's lines are the same text
            done = train('segment.py', tiles, tmp_path / f'{split}_{decoder}', f'--decoder={decoder}', '--steps=1', '--label_share=0.1', check=False)
            if decoder == 'logistic' and split == 'val':
                assert done.returncode == 0, done.stderr  # nothing is chosen by it
            else:
                assert done.returncode == 1 and f'its tiles of "{split}" have no labels' in done.stderr and 'Traceback' not in done.stderr


def test_what_is_no_directory_of_tiles_and_what_is_not_installed_are_told(scene_data, tmp_path):
    scene = make_scene(tmp_path / 's.npz')
    for path in (scene, str(tmp_path / 'gone'), f'{scene_data},{scene_data}'):
        with pytest.raises(UserError, match=f'{re.escape(path)}: no tiles here: make them with `python data.py tile .* as --data'):
            Tiles(path, 'tr')
    if not importlib.util.find_spec('wandb'):
        done = run('pretrain_mae.py', *MAE, '--wandb_log', f'--data={scene_data}', f'--out_dir={tmp_path}/run', check=False)
        assert done.returncode == 1 and done.stderr == "error: No module named 'wandb': pip install wandb\n"


def test_a_mask_of_0_and_1_is_no_data_set_of_two_classes(tmp_path):
    rng = np.random.default_rng(0)
    scene = make_scene(tmp_path / 's.npz', height=64, width=64, labels=(rng.random((64, 64)) < 0.3).astype(np.uint8))
    tiled(scene, tmp_path / 'tiles', '--tile_size=16', '--split_block=8')
    for script in JUDGES:
        done = run(script, f'--data={tmp_path}/tiles', f'--out_dir={tmp_path}/run', check=False)
        assert done.returncode == 1 and 'store a mask of 0 and 1 as 1 and 2' in done.stderr and 'Traceback' not in done.stderr


MAE_MISTAKES = [(dict(img_size=128), 'tiles of 64 px'), (dict(patch_size=16), '--mask_ratio=0.75 of 1 patches'), (dict(mask_ratio=0.01), 'hide one at least'),
                (dict(mask_ratio=1.0), 'leave one'), (dict(patch_size=5), '--patch_size=5')]


@pytest.mark.parametrize('changes, words', MAE_MISTAKES)
def test_constants_of_the_autoencoder_that_cannot_go_together_are_refused(changes, words, monkeypatch):
    pretrain_mae.check_constants({'tile_size': 64})
    for name, value in changes.items():
        monkeypatch.setattr(pretrain_mae, name, value)
    with pytest.raises(UserError, match=words):
        pretrain_mae.check_constants({'tile_size': 64})


def test_labels_edited_to_numbers_that_are_no_classes_are_told_and_not_a_traceback(scene_data, tmp_path):
    shutil.copytree(scene_data, tmp_path / 'tiles')
    for split in ('tr', 'val', 'ts'):
        labels = np.load(tmp_path / 'tiles' / f'{split}_labels.npy')
        np.save(tmp_path / 'tiles' / f'{split}_labels.npy', np.where(labels == 3, 7, labels).astype(np.uint8))
    commands = [['segment.py', f'--out_dir={tmp_path}/a'], ['segment.py', '--decoder=linear', '--steps=1', f'--out_dir={tmp_path}/b'],
                ['pretrain_mae.py', *MAE, f'--out_dir={tmp_path}/c'], ['tools/check_data.py']]
    for command in commands:
        done = run(*command, f'--data={tmp_path}/tiles', check=False)
        assert done.returncode == 1 and 'Traceback' not in done.stderr and '_labels.npy: has labels above 3, the number of classes in meta.json' in done.stderr
    assert 'label values above 3 (up to 7)' in done.stderr  # the doctor has said all it found before


@pytest.mark.parametrize('script, flags', [('pretrain_mae.py', []), ('pretrain_dino.py', ['--local_crops_size=8'])])
def test_tiles_that_do_not_divide_into_patches_are_refused_before_the_first_step(script, flags, tmp_path):
    scene = make_scene(tmp_path / 's.npz', height=60, width=60, labels=None)
    tiled(scene, tmp_path / 'tiles', '--tile_size=30')
    done = train(script, tmp_path / 'tiles', tmp_path / 'run', *flags, check=False)
    assert done.returncode == 1 and '30 px' in done.stderr and '--patch_size' in done.stderr and 'Traceback' not in done.stderr
    assert not os.path.exists(tmp_path / 'run' / 'log.jsonl')


def test_a_float16_run_that_diverges_stops_whether_its_loss_or_only_its_gradient_overflows(scene_data, tmp_path):
    flags = [f'--data={scene_data}', '--dtype=float16', '--batch_size=2']  # float16 is slow on a CPU
    done = run('pretrain_mae.py', *MAE_TINY, *flags, f'--out_dir={tmp_path}/loss', '--base_lr=30', check=False)
    assert done.returncode == 1 and 'the gradient is not finite (loss nan)' in done.stderr and '--dtype=float32' in done.stderr
    copy = altered_copy('pretrain_mae.py', tmp_path / 'copy', ('scaler.scale(loss).backward()', 'scaler.scale(1e9 * loss).backward()'))
    done = run(copy, *MAE_TINY, *flags, f'--out_dir={tmp_path}/short', '--max_steps=3')  # it ends before the scale is down: not without a word
    assert re.findall(r'step (\d): skipped, since float16 overflowed; its scale is now (\d+)', done.stdout) == [('0', '32768'), ('1', '16384'), ('2', '8192')]
    done = run(copy, *MAE_TINY, *flags, f'--out_dir={tmp_path}/gradient', check=False)
    assert done.returncode == 1 and re.search(r'step 1\d: the gradient is not finite \(loss \d', done.stderr)
