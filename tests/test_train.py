"""The training scripts as a user runs them: exact resume, several processes, signals, full disks, bad numbers, mistakes."""
import functools
import importlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import baseline_deeplab
import pretrain_dino
import pretrain_dino_hsi
import pretrain_lejepa
import pretrain_mae
import segment
from conftest import MAE_TINY, ROOT, made_once, make_scene, run, tiled
from data import UserError, read_flags, standardize
from models import (LinearHead, MaskedAutoencoder, ViT, dense_features, load_checkpoint, load_encoder, native_bfloat16, parameter_groups,
                    save_checkpoint, segmentation_loss)

DINO_TINY = ['--batch_size=8', '--out_dim=64', '--ibot_weight=1', '--steps=90', '--warmup=0.03', '--freeze_last_layer=0.03', '--log_every=1', '--probe_tiles=4',
             '--whiten=3', '--save_every=4', '--eval_every=12']
FLAGS = {'pretrain_mae.py': [*MAE_TINY, '--whiten=3', '--save_every=4', '--eval_every=12'],
         'pretrain_dino.py': DINO_TINY, 'pretrain_dino_hsi.py': DINO_TINY,
         'segment.py': ['--decoder=linear', '--steps=12', '--batch_size=8', '--log_every=1', '--eval_every=4', '--save_every=4'],
         'baseline_deeplab.py': ['--width=8', '--steps=12', '--batch_size=8', '--log_every=1', '--eval_every=4', '--save_every=4']}
SCRIPTS = list(FLAGS)
PRETRAINERS, JUDGES = SCRIPTS[:3], SCRIPTS[3:]
ONE_STREAM_OF_NOISE = {'pretrain_mae.py': ['--dropout=0'], 'pretrain_dino.py': ['--drop_path_rate=0'], 'pretrain_dino_hsi.py': ['--drop_path_rate=0'],
                       'segment.py': [], 'baseline_deeplab.py': []}  # what draws on each rank by itself is switched off where 1 and 2 processes are compared


def train(script, data, out, *flags, **kwargs):
    return run(script, *FLAGS[script], f'--data={data}', f'--out_dir={out}', *flags, **kwargs)


def weights(out, name='last.pt'):
    return load_checkpoint(os.path.join(out, name))['model']


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    return [entry['loss'] for entry in map(json.loads, open(os.path.join(out, 'log.jsonl'))) if 'loss' in entry]


@pytest.fixture(scope='module')
def whole(scene_data, tmp_path_factory):
    """whole(script): the directory of a run of 12 steps in one go with one process, made when it is first asked for."""
    def run_of(script):
        return made_once(tmp_path_factory, f'whole_{script}', lambda folder: train(script, scene_data, folder / 'run', '--max_steps=12', pictures=True)) / 'run'
    return run_of


def slow_unless(fast, *args):
    """A parameter set that only the full run takes: the same blocks are tested through other scripts in the fast one."""
    return pytest.param(*args, marks=[] if args in fast else pytest.mark.slow)


@pytest.mark.parametrize('script, processes', [slow_unless([(s, 1) for s in ('pretrain_mae.py', 'pretrain_dino_hsi.py', 'segment.py')], script, n)
                                               for script in SCRIPTS for n in (1, 2)])
def test_12_steps_are_5_and_7_bit_for_bit(script, processes, scene_data, whole, tmp_path):
    reference = whole(script)
    if processes == 2:
        reference = tmp_path / 'whole'
        train(script, scene_data, reference, '--max_steps=12', processes=2)
    for steps in (5, 12):
        train(script, scene_data, tmp_path / 'parts', f'--max_steps={steps}', processes=processes)
    assert load_checkpoint(tmp_path / 'parts' / 'last.pt')['step'] == 12
    assert equal(weights(reference), weights(tmp_path / 'parts'))
    assert losses(reference) == losses(tmp_path / 'parts')
    seconds = [json.loads(line)['seconds'] for line in open(tmp_path / 'parts' / 'log.jsonl') if 'seconds' in line]
    assert seconds == sorted(seconds)  # those of the first part count on


@pytest.mark.parametrize('script', [slow_unless([('pretrain_mae.py',), ('pretrain_dino_hsi.py',)], s) for s in SCRIPTS[:4]])  # the baseline's batch norm sees a process's tiles only, on CPU (SyncBatchNorm on CUDA)
def test_two_processes_are_one(script, scene_data, tmp_path):
    for n in (1, 2):
        train(script, scene_data, tmp_path / str(n), '--max_steps=3', '--dtype=float32', *ONE_STREAM_OF_NOISE[script], processes=n)
    np.testing.assert_allclose(losses(tmp_path / '1'), losses(tmp_path / '2'), rtol=1e-6)
    logs = [[json.loads(line) for line in open(tmp_path / n / 'log.jsonl') if 'grad_norm' in line] for n in '12']
    for one, two in zip(*logs):  # all of the log is of all processes, not of the first one's share
        assert one.keys() == two.keys()
        for name in one.keys() - {'seconds'}:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name
    one, two = weights(tmp_path / '1'), weights(tmp_path / '2')
    for name in one:
        if name.endswith('qkv.bias'):  # a key's bias cancels in the softmax: its gradient is rounding noise, which AdamW blows up
            D = len(one[name]) // 3
            one[name][D:2 * D] = two[name][D:2 * D] = 0
        difference = (one[name].double() - two[name].double()).abs()  # AdamW divides a gradient by its own size, so one of rounding
        assert difference.max() < 5e-5 and (difference > 2e-6).double().mean() < 1e-3, name  # noise moves its weight as far as any
    if script == 'segment.py':
        reports = [json.load(open(tmp_path / n / 'report.json')) for n in '12']
        assert reports[0]['confusion_matrix'] == reports[1]['confusion_matrix']


def test_unequal_numbers_of_labels_on_two_processes_and_batches_without_any(scene_data, tmp_path):
    shutil.copytree(scene_data, tmp_path / 'tiles')
    labels = np.load(tmp_path / 'tiles' / 'tr_labels.npy', mmap_mode='r+')
    # a few tiles keep all labels, the others have one, in the corner, which few crops see
    labels[np.arange(len(labels)) % 4 > 0] = (np.arange(256) == 0).reshape(16, 16)
    labels.flush()
    for n in (1, 2):
        train('segment.py', tmp_path / 'tiles', tmp_path / str(n), '--max_steps=12', '--batch_size=2', '--crop_size=8', '--dtype=float32', processes=n)
    counts = losses(tmp_path / '1')
    assert 0 in counts and max(counts) > 0  # batches without a label are survived
    np.testing.assert_allclose(counts, losses(tmp_path / '2'), atol=1e-6)
    one, two = weights(tmp_path / '1'), weights(tmp_path / '2')
    assert all((one[name].double() - two[name].double()).abs().max() < 5e-5 for name in one)


def altered_copy(script, folder, *changes):
    """A copy of the scripts in `folder`, `script` with changes (old text, new text) -> its path"""
    os.makedirs(folder)
    for name in os.listdir(ROOT):
        if name.endswith('.py'):
            shutil.copy(os.path.join(ROOT, name), folder)
    source = open(folder / script, encoding='utf-8').read()
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / script).write_text(source, encoding='utf-8')
    return folder / script


@pytest.mark.parametrize('script, processes', [slow_unless([('segment.py', 1), ('pretrain_mae.py', 2)], script, n)
                                               for script in SCRIPTS for n in (1, 2)])
def test_sigterm_loses_nothing(script, processes, scene_data, whole, tmp_path):
    # it sleeps in each step, so that the signal comes in mid-run
    slow = altered_copy(script, tmp_path / 'slow', ('        bar.update()', f'        bar.update()\n        time.sleep(0.3)\n        open(f"{tmp_path}/pid{{rank}}", "w").write(str(os.getpid()))'))
    launcher = [sys.executable] + (['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone'] if processes == 2 else [])
    process = subprocess.Popen([*launcher, str(slow), *FLAGS[script], f'--data={scene_data}', f'--out_dir={tmp_path / "run"}', '--max_steps=12'],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    log = tmp_path / 'run' / 'log.jsonl'
    for _ in range(600):
        if log.exists() and sum('grad_norm' in line for line in open(log)) >= 2:
            break
        time.sleep(0.1)
    if processes == 1:
        process.terminate()
    else:
        for pid in (int((tmp_path / 'pid0').read_text()), int((tmp_path / 'pid1').read_text()), process.pid):
            os.kill(pid, signal.SIGTERM)  # all of them, as a scheduler does; torchrun sends it to its processes once more
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM if processes == 1 else process.returncode, output
    assert 'interrupted by signal 15' in output
    step = load_checkpoint(tmp_path / 'run' / 'last.pt')['step']
    assert 2 <= step < 12
    train(script, scene_data, tmp_path / 'run', '--max_steps=12', processes=processes)
    if processes == 1:
        assert equal(weights(whole(script)), weights(tmp_path / 'run'))


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_second_signal_ends_the_program_but_not_within_seconds(script, monkeypatch):
    module, ended = importlib.import_module(script[:-3]), []
    monkeypatch.setattr(os, '_exit', ended.append)
    monkeypatch.setattr(module, 'stop_signal', 0)
    monkeypatch.setattr(module, 'stop_time', 0.0)
    module.note_signal(signal.SIGTERM, None)
    module.note_signal(signal.SIGTERM, None)  # of torchrun
    assert not ended and module.stop_signal == signal.SIGTERM
    module.stop_time -= 10
    module.note_signal(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]


def stop_at_the_last_score():
    """For run(prepare=): the second scoring is interrupted"""
    import data
    evaluate, calls = data.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)
    data.evaluate = interrupted


@pytest.mark.parametrize('script', ['segment.py', pytest.param('baseline_deeplab.py', marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_or_shortened_at_its_end_goes_on_to_its_report(script, scene_data, tmp_path):
    flags = [script, f'--data={scene_data}', '--steps=2', '--batch_size=4', *(['--decoder=linear'] if script == 'segment.py' else ['--width=8']), f'--out_dir={tmp_path}/run']
    done = run(*flags, check=False, prepare=stop_at_the_last_score)
    assert done.returncode == 128 + signal.SIGTERM and not (tmp_path / 'run' / 'report.json').exists()
    assert load_checkpoint(tmp_path / 'run' / 'last.pt')['step'] == 2
    run(*flags, '--max_steps=1')  # fewer than it has made: nothing is trained, it is judged
    assert load_checkpoint(tmp_path / 'run' / 'last.pt')['step'] == 2 and (tmp_path / 'run' / 'report.json').exists()


class HostReads(TorchDispatchMode):
    """Tells `note` of each operation whose result the host has to wait for: on a GPU it drains the queue of work."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_truth = function is torch.ops.aten.index.Tensor and any(ids is not None and ids.dtype == torch.bool for ids in args[1])
        if by_truth or function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            frame, callers = sys._getframe(), set()
            while frame:
                callers.add(frame.f_code.co_name)
                frame = frame.f_back
            if 'get_batch' not in callers:  # there all tensors are the host's own
                self.note('host reads')
        return function(*args, **kwargs or {})


def trace_loop(path):
    """For run(prepare=): what a training loop does, in order, into the file `path`."""
    sys.path.insert(0, ROOT)
    import data
    file = open(path, 'w', buffering=1)
    note = lambda word: file.write(word + '\n')

    def noted(owner, name, word):
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def call(*args, **kwargs):
            note(word)
            return plain(*args, **kwargs)
        setattr(owner, name, call)

    noted(data.Tiles, 'batch', 'batch')
    noted(data.Tiles, 'read_ahead', 'read ahead')
    noted(torch.Tensor, 'backward', 'backward')
    noted(torch.optim.AdamW, 'step', 'optimizer')
    HostReads(note).__enter__()


@pytest.mark.parametrize('script', [slow_unless([('pretrain_dino_hsi.py',), ('segment.py',)], s) for s in SCRIPTS])
def test_the_host_waits_for_the_gpu_once_a_step_when_all_work_is_launched(script, scene_data, tmp_path):
    ahead = [] if script in JUDGES else ['read ahead']
    train(script, scene_data, tmp_path / 'run', '--eval_every=100', '--log_every=100', '--max_steps=4', prepare=functools.partial(trace_loop, tmp_path / 'trace'))
    words = (tmp_path / 'trace').read_text().split('\n')
    steps = [place for place, word in enumerate(words) if word == 'optimizer']
    assert len(steps) == 4
    for start, end in zip(steps, steps[1:]):  # the next batch is read while the backward pass runs
        assert words[start:end] == ['optimizer', 'host reads', 'backward', 'batch', *ahead]


def limit_file_size(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_leaves_the_checkpoint_before(scene_data, whole, tmp_path):
    shutil.copytree(whole('pretrain_mae.py'), tmp_path / 'run')
    before = weights(tmp_path / 'run')
    limit = os.path.getsize(tmp_path / 'run' / 'last.pt') // 2
    done = train('pretrain_mae.py', scene_data, tmp_path / 'run', '--max_steps=14', check=False,
                 prepare=functools.partial(limit_file_size, limit))
    assert done.returncode == 1 and 'could not be written' in done.stderr and 'Traceback' not in done.stderr
    assert equal(before, weights(tmp_path / 'run'))
    train('pretrain_mae.py', scene_data, tmp_path / 'run', '--max_steps=14')
    assert load_checkpoint(tmp_path / 'run' / 'last.pt')['step'] == 14 and not (tmp_path / 'run' / 'last.pt.tmp').exists()


def note_moves(path):
    """For run(prepare=): into the file `path`, whether each step of the optimizer moved the weights."""
    file, plain = open(path, 'a', buffering=1), torch.optim.AdamW.step

    @functools.wraps(plain)
    def step(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        before = [p.detach().clone() for p in parameters]
        plain(optimizer, *args, **kwargs)
        file.write('kept\n' if all(map(torch.equal, parameters, before)) else 'moved\n')
    torch.optim.AdamW.step = step


@pytest.mark.parametrize('script, processes', [slow_unless([('pretrain_mae.py', 1), ('pretrain_dino.py', 1)], script, n)
                                               for script, n in (*((script, 1) for script in PRETRAINERS), ('pretrain_mae.py', 2))])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(script, processes, tmp_path):
    cube = np.random.default_rng(0).normal(1000, 100, (32, 64, 4)).astype(np.float32)
    tiled(make_scene(tmp_path / 's.npz', cube=cube, labels=None, wavelengths_nm=None), tmp_path / 'tiles', '--tile_size=16')
    train(script, tmp_path / 'tiles', tmp_path / 'run', '--max_steps=2', '--batch_size=4')
    images = np.load(tmp_path / 'tiles' / 'tr_images.npy', mmap_mode='r+')
    images[:, :, 0, 0] = np.nan  # NaN is nodata: harmless
    images.flush()
    train(script, tmp_path / 'tiles', tmp_path / 'run', '--max_steps=3', '--batch_size=4', processes=processes)
    images[3] = 3e38  # finite, but its square is not
    images.flush()
    done = train(script, tmp_path / 'tiles', tmp_path / 'run', '--max_steps=6', '--batch_size=4', processes=processes, check=False,
                 prepare=functools.partial(note_moves, tmp_path / 'moves'))
    assert done.returncode and 'the gradient is not finite' in done.stderr and 'step ' in done.stderr
    moves = (tmp_path / 'moves').read_text().split()
    assert moves[-processes:] == ['kept'] * processes and set(moves[:-processes]) <= {'moved'}
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / 'run').values())


def test_a_directory_with_another_run_is_refused(scene_data, whole, tmp_path):
    shutil.copytree(whole('pretrain_mae.py'), tmp_path / 'run')
    before = weights(tmp_path / 'run')
    done = train('pretrain_mae.py', scene_data, tmp_path / 'run', '--mask_ratio=0.5', check=False)
    assert done.returncode == 1 and 'mask_ratio (0.75 there, 0.5 now)' in done.stderr and 'Traceback' not in done.stderr
    assert equal(before, weights(tmp_path / 'run'))
    os.remove(tmp_path / 'run' / 'log.jsonl')  # the checkpoint alone says which run it is, and holds its log
    done = train('pretrain_mae.py', scene_data, tmp_path / 'run', '--mask_ratio=0.5', check=False)
    assert done.returncode == 1 and 'mask_ratio' in done.stderr
    train('pretrain_mae.py', scene_data, tmp_path / 'run', '--max_steps=12')
    assert losses(tmp_path / 'run') == losses(whole('pretrain_mae.py'))


@pytest.mark.parametrize('script', [slow_unless([('pretrain_mae.py',)], s) for s in PRETRAINERS])
def test_pre_training_needs_no_labels(script, tmp_path):
    for name, labels in (('without', None), ('with', 'in one tile of tr only')):
        scene = make_scene(tmp_path / f'{name}.npz', height=32, width=64, labels=None)
        tiled(scene, tmp_path / name, '--tile_size=16')
        if labels:  # as a folder whose val has none
            meta = json.load(open(tmp_path / name / 'meta.json'))
            meta['class_counts']['tr'] = [5]
            json.dump(meta, open(tmp_path / name / 'meta.json', 'w'))
        done = train(script, tmp_path / name, tmp_path / f'run_{name}', '--max_steps=2', '--batch_size=4')
        assert 'no probe watches' in done.stdout and len(losses(tmp_path / f'run_{name}')) == 2


MISTAKES = [(['--no_such_flag=1'], 2, 'unrecognized arguments'), (['--seed=-1'], 1, '--seed=-1: choose 0'), (['--data=nowhere'], 1, 'data.py tile')]
DINO_MISTAKES = [(['--size=huge'], 2, 'invalid choice'), (['--patch_size=5'], 1, 'multiples of --patch_size'),
                 (['--init_from=nowhere.pt'], 1, 'no such checkpoint'), (['--batch_size=1'], 1, '--koleo_weight=0')]


@pytest.mark.parametrize('script, flags, code, words', [(script, *mistake) for script in ('pretrain_mae.py', 'segment.py', 'baseline_deeplab.py') for mistake in MISTAKES]
                         + [(script, *mistake) for script in PRETRAINERS[1:] for mistake in DINO_MISTAKES]
                         + [('pretrain_mae.py', ['--patch_size=5'], 1, '5'),
                            ('pretrain_dino_hsi.py', ['--fusion=token', '--local_crops_size=4'], 1, '--local_crops_size=8')])
def test_mistakes_are_told_in_a_sentence(script, flags, code, words, scene_data, tmp_path):
    done = train(script, scene_data, tmp_path / 'run', *flags, check=False)
    assert done.returncode == code and words in done.stderr and 'Traceback' not in done.stderr, done.stderr


FLAG_MISTAKES = [('--no_such_flag=1', 2, 'unrecognized arguments'), ('--batch_siz=8', 2, 'unrecognized'), ('--seed=one', 2, 'invalid int'),
                 ('--size=huge', 2, 'invalid choice'), ('--seed=-1', 1, '--seed=-1: choose 0'), ('--log_every=0', 1, '--log_every=0: choose 1'),
                 ('--batch_size=0', 1, '--batch_size=0: choose 1'), ('--dtype=int8', 2, 'invalid choice'), ('--compile=yes', 2, 'invalid boolean value'),
                 ('--whiten=-1', 1, 'choose 0')]


@pytest.mark.parametrize('script, flag, code, words', [(script, *mistake) for script in (pretrain_mae, segment, baseline_deeplab) for mistake in FLAG_MISTAKES]
                         + [(script, '--label_share=5', 1, 'a share') for script in (segment, baseline_deeplab)]
                         + [(script, '--local_crops_number=0', 1, 'choose 1 or more') for script in (pretrain_dino, pretrain_dino_hsi)]
                         + [(pretrain_dino_hsi, '--fusion=both', 2, 'invalid choice')])
def test_what_is_no_flag_or_not_its_value_is_told_in_a_sentence(script, flag, code, words, monkeypatch, capsys):
    """By read_flags(), with which each script begins: a UserError ends the program with code 1, argparse with its usage and code 2"""
    monkeypatch.setattr(sys, 'argv', ['script', *FLAGS[os.path.basename(script.__file__)], '--data=tiles', '--out_dir=run', flag])
    with pytest.raises(UserError if code == 1 else SystemExit) as caught:
        read_flags(dict(vars(script)), script.PRESETS)
    assert getattr(caught.value, 'code', 1) == code and words in str(caught.value) + capsys.readouterr().err


RANGES = [(pretrain_mae, '--seed=1000000000000', 'up to 2,147,483,648'), (pretrain_mae, '--mask_ratio=1.5', 'a share, from 0 to 1'), (pretrain_mae, '--scale_min=1.5', 'a share'), (pretrain_mae, '--dropout=2', 'a share'),
          (pretrain_mae, '--base_lr=-1', 'choose 0 or more'), (pretrain_mae, '--base_lr=nan', 'choose 0'), (pretrain_mae, '--probe_tiles=0', 'choose 1 or more'), (pretrain_mae, '--whiten=-1', 'choose 0'),
          (pretrain_mae, '--max_steps=-1', 'choose 0'), (pretrain_dino, '--mask_ratio_max=1.5', 'a share'), (pretrain_dino, '--mask_ratio_min=-0.1', 'a share'),
          (pretrain_dino, '--mask_probability=2', 'a share'), (pretrain_dino, '--momentum_teacher=1.5', 'a share'), (pretrain_dino, '--local_scale_max=2', 'a share'),
          (pretrain_dino, '--blur=-1', 'a share'), (pretrain_dino, '--koleo_weight=-1', 'choose 0'), (pretrain_dino_hsi, '--spectral_patch_size=0', 'choose 1'),
          (pretrain_lejepa, '--sigreg_weight=1.5', 'a share'), (pretrain_lejepa, '--num_directions=0', 'choose 1'), (segment, '--label_share=1.1', 'a share')]


@pytest.mark.parametrize('script, flag, words', RANGES, ids=[flag for _, flag, _ in RANGES])
def test_numbers_outside_their_range_are_refused_by_their_name(script, flag, words, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script', flag])
    with pytest.raises(UserError, match=f'{flag.split("=")[0]}=.*: choose .*{words.removeprefix("choose ")}'):
        read_flags(dict(vars(script)), script.PRESETS)


@pytest.mark.parametrize('script', [pretrain_mae, pretrain_dino, pretrain_dino_hsi, pretrain_lejepa, segment, baseline_deeplab])
def test_the_defaults_of_every_size_lie_in_their_ranges_and_the_command_line_wins(script, monkeypatch):
    for size, preset in script.PRESETS.items():
        constants = dict(vars(script))
        monkeypatch.setattr(sys, 'argv', ['script', f'--size={size}', '--steps=7', '--seed=0', '--max_steps=0', '--compile=false', '--wandb_log'])
        config = read_flags(constants, script.PRESETS)
        expected = {**preset, 'steps': 7}
        assert {name: config[name] for name in expected} == {name: constants[name] for name in expected} == expected
        assert config['seed'] == 0 and config['compile'] is False and config['wandb_log'] is True


def test_an_encoder_of_another_band_count_is_refused_where_wavelengths_are_not_known(whole, tmp_path):
    scene = make_scene(tmp_path / 's.npz', bands=5, height=64, width=64, wavelengths_nm=None)
    tiled(scene, tmp_path / 'tiles', '--tile_size=16', '--split_block=8')
    done = train('segment.py', tmp_path / 'tiles', tmp_path / 'run', f'--encoder={whole("pretrain_mae.py") / "last.pt"}', check=False)
    assert done.returncode == 1 and '7 bands' in done.stderr and '(5)' in done.stderr and 'Traceback' not in done.stderr


def test_foreign_and_damaged_checkpoints_run_no_code(tmp_path, whole):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)
    evil, half = str(tmp_path / 'evil.pt'), str(tmp_path / 'half.pt')
    torch.save({'model': Evil()}, evil)
    good = open(whole('pretrain_mae.py') / 'last.pt', 'rb').read()
    open(half, 'wb').write(good[:len(good) // 2])
    pickle.dump({'a': 1}, open(tmp_path / 'plain.pt', 'wb'))
    for path in (evil, half, str(tmp_path / 'plain.pt'), str(tmp_path / 'none.pt')):
        with pytest.raises(ValueError, match='checkpoint') as caught:
            load_encoder(path)
        assert path in str(caught.value)
    assert not (tmp_path / 'owned').exists()


def test_a_checkpoint_that_holds_something_else_is_told_in_a_sentence(tmp_path, whole):
    good = load_checkpoint(whole('pretrain_mae.py') / 'last.pt')
    for name, content in (('list', [1, 2]), ('tensor', torch.ones(2)), ('no arguments', {'script': 'pretrain_mae.py', 'model': {}}),
                          ('other arguments', {**good, 'encoder_args': {'no_such': 1}}), ('other weights', {**good, 'model': {'encoder.norm.weight': torch.ones(3)}}),
                          ('wrong shape', {**good, 'encoder_args': {**good['encoder_args'], 'in_chans': 3}}), ('names', {**good, 'model': [1]})):
        torch.save(content, tmp_path / 'x.pt')
        with pytest.raises(ValueError, match='x.pt: ') as caught:
            load_encoder(tmp_path / 'x.pt')
        assert '\n' not in str(caught.value), name


def test_damaged_checkpoints_are_read_or_told_in_a_sentence(tmp_path, whole):
    from fuzz_scenes import damage
    content, rng, path = open(whole('pretrain_mae.py') / 'last.pt', 'rb').read(), np.random.default_rng(0), tmp_path / 'damaged.pt'
    good, refused = load_encoder(whole('pretrain_mae.py') / 'last.pt').state_dict(), 0
    for i in range(60):
        path.write_bytes(damage(content, rng, ranges=[]))
        try:
            assert equal(load_encoder(path).state_dict(), good), i  # between the weights there is room where damage does nothing
        except UserError as error:
            assert str(path) in str(error) and '\n' not in str(error)
            refused += 1
    assert refused > 30


def test_names_inside_files_are_never_paths(tmp_path, whole):
    """Scenes and checkpoints whose contents name other places: what is written lies in the directories on the command line, and nowhere else."""
    home = tmp_path / 'a' / 'b' / 'c'
    os.makedirs(home / 'in')
    names = ['../../escaped', str(tmp_path / 'escaped'), 'escaped $\\frac$']
    scene = make_scene(home / 'in' / 'scene.npz', height=64, width=96, class_names=names, **{'../../escaped': np.ones(3), str(tmp_path / 'escaped'): np.ones(3)})
    checkpoint = load_checkpoint(whole('pretrain_mae.py') / 'last.pt')
    checkpoint['script'] = 'pretrain_/../../../escaped.py'
    checkpoint['config'] |= {name: str(tmp_path / 'escaped') for name in ('out_dir', 'data', 'results', 'out', 'init_from')}
    torch.save(checkpoint, home / 'in' / 'last.pt')
    before = {path: os.stat(path).st_mtime_ns for path in map(str, tmp_path.rglob('*')) if os.path.isfile(path)}
    run('data.py', 'tile', f'--root={scene}', f'--out={home}/tiles', '--tile_size=16', '--split_block=8', cwd=home / 'in')
    train('segment.py', home / 'tiles', home / 'run', f'--encoder={home}/in/last.pt', '--steps=2', '--label_share=0.1', cwd=home / 'in')
    run('tools/map_scene.py', f'--run={home}/run', f'--scene={scene}', f'--out={home}/map/map.tif', cwd=home / 'in')
    assert os.path.exists(home / 'map' / 'map.tif')
    after = {path: os.stat(path).st_mtime_ns for path in map(str, tmp_path.rglob('*')) if os.path.isfile(path)}
    assert {path: time for path, time in after.items() if path in before} == before
    for path in after.keys() - before.keys():
        assert os.path.relpath(path, home).split(os.sep)[0] in ('tiles', 'run', 'map'), path
    assert not list(tmp_path.rglob('*escaped*'))


SCORED_FILES = ['best.pt', 'report.json', 'confusion.png', 'examples.png']


@pytest.mark.parametrize('script, extra', [('pretrain_mae.py', ['reconstruction.png']), pytest.param('pretrain_dino.py', [], marks=pytest.mark.slow),
                                           ('pretrain_dino_hsi.py', []), ('segment.py', SCORED_FILES), ('baseline_deeplab.py', SCORED_FILES)])
def test_a_run_directory_holds_what_a_reader_needs(script, extra, whole):
    names = os.listdir(whole(script))
    assert {'last.pt', 'log.jsonl', 'curves.png', *extra} <= set(names)
    assert all((whole(script) / name).stat().st_size > 5000 for name in names if name.endswith('.png'))
    assert not [name for name in names if name.endswith('.tmp')]
    assert not [key for key in weights(whole(script)) if 'module.' in key or '_orig_mod' in key]
    if script in JUDGES:
        report = json.load(open(whole(script) / 'report.json'))
        assert {'majority', 'chance', 'pixel', 'window'} == set(report['floors']) and report['split'] == 'ts'


def test_untrained_gives_the_same_architecture_with_random_weights(scene_data, whole, tmp_path):
    encoder = whole('pretrain_dino_hsi.py') / 'last.pt'
    train('segment.py', scene_data, tmp_path / 'run', f'--encoder={encoder}', '--untrained=true', '--steps=2')
    trained, random = load_encoder(encoder).state_dict(), {k.removeprefix('encoder.'): v for k, v in weights(tmp_path / 'run').items()}
    assert all(random[name].shape == value.shape for name, value in trained.items())
    assert not torch.equal(random['patch_embed.proj.weight'], trained['patch_embed.proj.weight'])
    assert 'untrained' in json.load(open(tmp_path / 'run' / 'report.json'))['name']


def test_augmentation_fine_tuning_and_every_option_of_the_decoder_run(scene_data, tmp_path):
    for i, flags in enumerate((['--augment=true', '--freeze=false', '--criterion=focal'], ['--pixel=false', '--class_weights=sqrt'], ['--batch_size=1'],
                               ['--decoder=conv', '--criterion=dice'], ['--decoder=transformer', '--freeze=false', '--layer_decay=0.5'])):
        train('segment.py', scene_data, tmp_path / str(i), '--steps=3', *flags)
        assert np.isfinite(losses(tmp_path / str(i))).all()


def test_the_solved_decoder_is_at_least_as_good_as_the_trained_one_and_the_same_every_time(scene_data, tmp_path):
    reports = {}
    for name, flags in (('linear', []), ('logistic', ['--decoder=logistic']), ('again', ['--decoder=logistic'])):
        train('segment.py', scene_data, tmp_path / name, *flags, '--dtype=float32')
        reports[name] = json.load(open(tmp_path / name / 'report.json'))
    assert reports['logistic']['scores']['oa'] >= reports['linear']['scores']['oa'] - 0.02
    assert reports['logistic']['confusion_matrix'] == reports['again']['confusion_matrix']


# ============ networks and losses in training ============

def test_every_trainable_parameter_gets_a_gradient_and_none_is_uninitialised():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # torch.empty now gives NaN
    try:
        mae = MaskedAutoencoder(16, 4, 5, 48, 2, 3, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
        vit = ViT(16, 4, 5, 48, 2, 3, num_register_tokens=2, init_values=1e-5, mask_token=True)
        head = LinearHead(48 * 2, 3)
    finally:
        torch.use_deterministic_algorithms(False)
    for module in (mae, vit, head):
        assert all(torch.isfinite(p).all() for p in module.parameters())
    mae(torch.randn(2, 5, 16, 16))[0].backward()
    head(torch.cat(vit.get_intermediate_layers(torch.randn(2, 5, 16, 16), 2), 1)).sum().backward()
    assert all(p.grad is not None for p in mae.parameters() if p.requires_grad)


@pytest.mark.parametrize('ratio', [0.0, 0.1, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0])
def test_the_share_of_masked_patches_is_rounded_not_truncated(ratio):
    for grid in (4, 8, 10):
        mae = MaskedAutoencoder(grid, 1, 1, 8, 1, 1, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=1)
        _, _, mask = mae.random_masking(torch.rand(2, grid * grid), ratio)
        assert (mask == 0).sum(1).tolist() == [max(1, round(grid * grid * (1 - ratio)))] * 2


def test_any_band_count_and_shapes_that_are_not_square():
    for bands in (1, 3, 7, 200):
        maps = ViT(16, 4, bands, 24, 2, 2).get_intermediate_layers(torch.randn(1, bands, 8, 20), 2)
        assert maps[0].shape == (1, 24, 2, 5)
    with pytest.raises(ValueError, match='7 bands, the encoder was built for 3'):
        ViT(16, 4, 3, 24, 1, 2)(torch.randn(1, 7, 16, 16))
    with pytest.raises(ValueError, match='17 x 16 pixels'):
        ViT(16, 4, 3, 24, 1, 2)(torch.randn(1, 3, 17, 16))


def test_dense_features_of_one_window_are_the_encoders_own_and_cover_larger_images():
    encoder = ViT(16, 4, 3, 24, 2, 2).eval()
    x = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        own = torch.cat(encoder.get_intermediate_layers(x[..., :16, :16], 2), 1)
        torch.testing.assert_close(dense_features(encoder, x[..., :16, :16], 2), own)
        maps = dense_features(encoder, x, 2)
        assert maps.shape == (2, 48, 10, 8) and torch.isfinite(maps).all()
        torch.testing.assert_close(maps[..., :2, :2], own[..., :2, :2])  # windows are 8 px apart: these corners lie in one only
        torch.testing.assert_close(maps[..., 8:, 6:], torch.cat(encoder.get_intermediate_layers(x[..., 24:, 16:], 2), 1)[..., 2:, 2:])


@pytest.mark.parametrize('kind', ['ce', 'focal', 'dice'])
def test_ignored_pixels_change_neither_loss_nor_gradient(kind):
    logits, target = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randint(0, 4, (2, 6, 6))
    target[:, :3] = 255
    other = logits.detach().clone()
    other[:, :, :3] = 1e4 * torch.randn(2, 4, 3, 6)
    other.requires_grad_()
    grads = []
    for x in (logits, other):
        total = segmentation_loss(x, target, torch.ones(4), kind)
        grads.append((total.detach(), torch.autograd.grad(total, x)[0]))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1][:, :, 3:], grads[1][1][:, :, 3:])
    assert (grads[1][1][:, :, :3] == 0).all()
    total = segmentation_loss(logits, torch.full_like(target, 255), torch.ones(4), kind)
    assert total == 0 and (torch.autograd.grad(total, logits)[0] == 0).all()


def test_focal_loss_is_cross_entropy_times_its_factor():
    logits, target = torch.randn(1, 3, 1, 1), torch.tensor([[[1]]])
    ce = segmentation_loss(logits, target, torch.ones(3), 'ce')
    focal = segmentation_loss(logits, target, torch.ones(3), 'focal')
    assert focal == pytest.approx(float(ce * (1 - torch.exp(-ce)) ** 2))


def test_a_frozen_encoder_stays_as_it_is(scene_data, whole, tmp_path):
    encoder = whole('pretrain_mae.py') / 'last.pt'
    for freeze in ('true', 'false'):
        train('segment.py', scene_data, tmp_path / freeze, f'--encoder={encoder}', f'--freeze={freeze}', '--steps=3')
        same = equal({k: v for k, v in weights(tmp_path / freeze).items() if k.startswith('encoder.')},
                     {k: v for k, v in weights(whole('pretrain_mae.py')).items() if k.startswith('encoder.')})
        assert same == (freeze == 'true')
        assert torch.equal(weights(tmp_path / freeze)['encoder.pos_embed'], weights(whole('pretrain_mae.py'))['encoder.pos_embed'])
    shutil.copy(encoder, tmp_path / 'last.pt')
    train('segment.py', scene_data, tmp_path / 'run', f'--encoder={tmp_path}/last.pt', '--steps=3')
    checkpoint = load_checkpoint(encoder)
    checkpoint['model']['encoder.norm.bias'] += 1e-3  # as after another step, say
    save_checkpoint(tmp_path / 'last.pt', checkpoint)
    again = train('segment.py', scene_data, tmp_path / 'run', f'--encoder={tmp_path}/last.pt', '--steps=3', check=False)
    assert again.returncode == 1 and 'encoder_crc32' in again.stderr  # the file is another encoder now


@pytest.mark.parametrize('script', [slow_unless([('pretrain_dino_hsi.py',)], s) for s in PRETRAINERS[1:]])
def test_an_encoder_with_parameters_that_features_do_not_use_is_fine_tuned_on_two_processes(script, scene_data, whole, tmp_path):
    train('segment.py', scene_data, tmp_path / 'run', f'--encoder={whole(script) / "last.pt"}', '--freeze=false', '--max_steps=3', processes=2)
    assert len(losses(tmp_path / 'run')) == 3


def test_a_mistake_leaves_no_run_behind_that_refuses_the_right_command(scene_data, tmp_path):
    train('segment.py', scene_data, tmp_path / 'run', '--decoder=conw', check=False)
    train('segment.py', scene_data, tmp_path / 'run', '--decoder=conv', '--max_steps=1')


def test_a_cnn_is_no_encoder(scene_data, whole, tmp_path):
    done = train('segment.py', scene_data, tmp_path / 'run', f'--encoder={whole("baseline_deeplab.py") / "last.pt"}', check=False)
    assert done.returncode == 1 and 'holds no encoder' in done.stderr and 'pass the last.pt of a pre-training run' in done.stderr
    assert 'Traceback' not in done.stderr


def test_whitening_is_not_rounded_by_autocast_or_tf32(monkeypatch):
    mean, matrix = torch.zeros(4), torch.randn(4, 4) * 100
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(standardize(x, mean, matrix), (matrix @ x.flatten(2)).float().reshape(x.shape)) is False
        under = standardize(x, mean, matrix)
    matmul, seen = torch.matmul, []
    monkeypatch.setattr(torch, 'matmul', lambda *args: (seen.append(torch.get_float32_matmul_precision()), matmul(*args))[1])
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA, as the scripts set it
    try:
        again = standardize(x, mean, matrix)
        assert seen == ['highest'] and torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision('highest')
    assert torch.equal(under, again)


def test_bfloat16_is_native_only_where_a_gpu_does_not_emulate_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)  # a GPU before Ampere
    assert not native_bfloat16(torch.device('cuda'))


def test_models_compile_without_graph_breaks():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    mae = MaskedAutoencoder(16, 4, 5, 48, 2, 3, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    torch.compile(mae, fullgraph=True, backend=counter)(torch.randn(2, 5, 16, 16), 0.75, torch.rand(2, 16))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_float16_goes_through_its_scaler_and_resumes_exactly(scene_data, tmp_path):
    for name, steps in (('whole', [4]), ('parts', [2, 4])):
        for n in steps:
            train('pretrain_mae.py', scene_data, tmp_path / name, '--dtype=float16', f'--max_steps={n}')
    checkpoint = load_checkpoint(tmp_path / 'parts' / 'last.pt')
    assert checkpoint['scaler']['scale'] > 0 and equal(weights(tmp_path / 'whole'), checkpoint['model'])
    assert all(torch.isfinite(value).all() for value in checkpoint['model'].values())


def test_bfloat16_autocast_gives_nearly_the_same_loss():
    mae = MaskedAutoencoder(16, 4, 5, 48, 2, 3, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    x, noise = torch.randn(4, 5, 16, 16), torch.rand(4, 16)
    with torch.autocast('cpu', torch.bfloat16):
        loss, _, _ = mae(x, 0.75, noise)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(mae(x, 0.75, noise)[0].item(), rel=0.02)


# ============ DINO runs ============

CHECKSUMS = """
{indent}import zlib
{indent}sums = [zlib.crc32(b''.join(v.numpy().tobytes() for v in part.state_dict().values())) for part in (model.student, model.teacher)]
{indent}print(step, *sums, file=open(os.path.join(out_dir, f'sums{{rank}}.txt'), 'a'))
"""


@pytest.mark.parametrize('script', [slow_unless([('pretrain_dino.py',)], s) for s in PRETRAINERS[1:]])
def test_students_and_teachers_are_the_same_on_both_processes(script, scene_data, tmp_path):
    end_of_setup, end_of_step = '    # ---- shell: compile and DDP', '        bar.update()'  # before DDP broadcasts anything; after each step
    path = altered_copy(script, tmp_path / 'copy', (end_of_setup, CHECKSUMS.format(indent=4 * ' ') + end_of_setup),
                        (end_of_step, end_of_step + CHECKSUMS.format(indent=8 * ' ')))
    run(path, *FLAGS[script], f'--data={scene_data}', f'--out_dir={tmp_path / "run"}', '--max_steps=3', processes=2)
    first, second = (open(tmp_path / 'run' / f'sums{rank}.txt').read().splitlines() for rank in (0, 1))
    assert first == second
    steps, students, teachers = zip(*(line.split() for line in first))
    assert steps == ('0', '1', '2', '3') and students[0] == teachers[0] and len({*students, *teachers}) == 7  # both move, apart from each other


@pytest.mark.parametrize('flags', [['--ffn=mlp', '--jitter=0.4', '--solarize=0.2'],
                                   ['--fusion=token', '--koleo_weight=0', '--dtype=float32', '--ibot_weight=0', '--mask_probability=0']])
def test_every_option_of_dino_runs_and_its_encoder_is_judged(flags, scene_data, tmp_path):
    train('pretrain_dino_hsi.py', scene_data, tmp_path / 'run', '--max_steps=2', *flags)
    assert np.isfinite(losses(tmp_path / 'run')).all()
    encoder = load_encoder(tmp_path / 'run' / 'last.pt')
    teacher = {name.removeprefix('teacher.encoder.'): value for name, value in weights(tmp_path / 'run').items() if name.startswith('teacher.encoder.')}
    assert equal(teacher, encoder.state_dict())
    done = train('segment.py', scene_data, tmp_path / 'segment', f'--encoder={tmp_path}/run/last.pt', '--max_steps=2')
    assert 'HSI-DINOv2 + linear' in done.stdout


@pytest.mark.parametrize('script', [slow_unless([('pretrain_dino.py',)], s) for s in PRETRAINERS[1:]])
def test_a_last_stage_at_higher_resolution_starts_from_the_weights_of_the_first(script, scene_data, tmp_path):
    train(script, scene_data, tmp_path / 'low', '--img_size=8', '--local_crops_size=4', '--max_steps=2')
    flags = [f'--init_from={tmp_path}/low/last.pt', '--base_lr=0', '--momentum_teacher=1', '--max_steps=1']
    train(script, scene_data, tmp_path / 'high', *flags)
    low, high = weights(tmp_path / 'low'), weights(tmp_path / 'high')
    for name in low:
        if name.endswith('pos_embed'):
            assert low[name].shape[1] == 5 and high[name].shape[1] == 17
        else:
            assert torch.equal(low[name], high[name]), name
    done = train(script, scene_data, tmp_path / 'other', *flags, '--out_dim=32', check=False)
    assert done.returncode == 1 and 'does not fit this network' in done.stderr and 'Traceback' not in done.stderr


def test_collapse_is_announced(scene_data, tmp_path):
    done = train('pretrain_dino.py', scene_data, tmp_path / 'run', '--max_steps=4', '--warmup=0', '--teacher_temp=1000', '--teacher_temp_warmup=0',
                 '--base_lr=1e-9')  # a teacher that says the same of everything
    assert 'the features are collapsing' in done.stdout + done.stderr
    healthy = train('pretrain_dino.py', scene_data, tmp_path / 'healthy', '--max_steps=4', '--warmup=0')
    assert 'collapsing' not in healthy.stdout + healthy.stderr


@pytest.mark.parametrize('sign, value', [('teacher_entropy', 1.0), ('feature_std', 0.01)])
def test_a_collapse_of_the_spectral_stream_is_announced_too(sign, value, scene_data, tmp_path):
    script = altered_copy('pretrain_dino_hsi.py', tmp_path / 'one_stream', (
        "        terms |= {f'{name}_spectral'", f"        spectral_terms['{sign}'] = torch.tensor({value})\n        terms |= {{f'{{name}}_spectral'"))
    done = run(script, *FLAGS['pretrain_dino_hsi.py'], f'--data={scene_data}', f'--out_dir={tmp_path}/run', '--max_steps=2', '--warmup=0')
    assert 'the features are collapsing' in done.stdout + done.stderr
    if sign == 'feature_std':
        healthy = train('pretrain_dino_hsi.py', scene_data, tmp_path / 'healthy', '--max_steps=2', '--warmup=0')
        assert 'collapsing' not in healthy.stdout + healthy.stderr


def test_layer_wise_decay_scales_what_is_near_the_input_most():
    model = torch.nn.ModuleDict({'encoder': ViT(16, 4, 3, 24, 3, 2, num_register_tokens=1), 'head': torch.nn.Linear(24, 2)})
    scale = {id(p): (group['lr_scale'], group['weight_decay']) for group in parameter_groups(model, 0.1, 0.5) for p in group['params']}
    assert len(scale) == len(list(model.parameters()))
    got = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert got['head.weight'] == (1, 0.1) and got['head.bias'] == (1, 0.0) and got['encoder.norm.weight'] == (1, 0.0)
    assert got['encoder.blocks.2.mlp.fc1.weight'] == (0.5, 0.1) and got['encoder.blocks.0.mlp.fc1.weight'] == (0.125, 0.1)
    assert got['encoder.cls_token'] == (0.0625, 0.0) and got['encoder.patch_embed.proj.weight'] == (0.0625, 0.1)
    assert {g['lr_scale'] for g in parameter_groups(model, 0.1)} == {1}


def test_learning_rate_schedule(monkeypatch):
    for name, value in dict(steps=100, warmup=0.1, batch_size=256, base_lr=1.0).items():
        monkeypatch.setattr(pretrain_mae, name, value)
    rates = [pretrain_mae.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1 and rates[100] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
