"""Each script in a loop of bad luck (kills, full disks, one rank of two killed) until it is done: the same weights as a quiet run's, bit for bit."""
import functools
import glob
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from matplotlib.image import imread

from conftest import ROOT, SERVER, run, run_in_child
from models import load_checkpoint
from test_lejepa import TINY
from test_train import FLAGS, JUDGES, SCRIPTS, equal, losses, weights

FLAGS = {**FLAGS, 'pretrain_lejepa.py': TINY}
SCRIPTS = [*SCRIPTS, 'pretrain_lejepa.py']


def command(script, data, out, steps):
    """Flags of a run of so many steps that saves each third one, so that many kills fall into a save."""
    flags = {name: value for name, value in (flag.split('=', 1) for flag in FLAGS[script])} | {'--save_every': '3', '--eval_every': '20'}
    flags['--steps'] = str(steps)
    return [f'{name}={value}' for name, value in flags.items()] + [f'--data={data}', f'--out_dir={out}']


def small_disk(limit):
    """From here on no file of this process grows beyond `limit` bytes: a write fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def some_limit(out, luck):
    """Now and then too small for anything, else for the checkpoint"""
    size = os.path.getsize(f'{out}/last.pt') if os.path.exists(f'{out}/last.pt') else 200_000
    return luck.choice([100, int(luck.uniform(0.01, 0.99) * size)])


def step_reached(out):
    """The last step in log.jsonl. A run that resumes writes it anew under our eyes, so that what is read may begin in the middle of a line."""
    if not os.path.exists(f'{out}/log.jsonl'):
        return 0
    lines = open(f'{out}/log.jsonl').read().splitlines(keepends=True)
    return max((json.loads(line)['step'] for line in lines if line.startswith('{') and line.endswith('}\n')), default=0)


def wait_for_step(out, step, alive):
    while alive() and step_reached(out) < step:
        time.sleep(0.02)


def every_file_under_a_final_name_can_be_read(out):
    for path in glob.glob(f'{out}/*'):
        ending = os.path.splitext(path)[1]
        if ending == '.pt':
            load_checkpoint(path)
        elif ending == '.json':
            json.load(open(path))
        elif ending == '.png':
            imread(path)
        else:
            assert ending == '.tmp' or os.path.basename(path) == 'log.jsonl', path


def same_end(script, quiet, out, steps):
    """The run in `out` ended as the one in `quiet`: weights, every logged loss, and for the judges the best state and the report."""
    assert load_checkpoint(f'{out}/last.pt')['step'] == steps and equal(weights(quiet), weights(out)) and losses(quiet) == losses(out)
    assert not glob.glob(f'{out}/*.tmp')
    if script in JUDGES:
        assert equal(weights(quiet, 'best.pt'), weights(out, 'best.pt'))
        assert len({str(json.load(open(f'{run}/report.json'))['confusion_matrix']) for run in (quiet, out)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_a_run_that_is_killed_again_and_again_ends_like_a_quiet_one(script, scene_data, tmp_path):
    steps, luck, quiet, out, ends = 120, random.Random(script), tmp_path / 'quiet', tmp_path / 'unlucky', []
    run(script, *command(script, scene_data, quiet, steps))
    for attempt in range(100):
        kind = luck.choice(['SIGKILL', 'SIGKILL', 'SIGTERM', 'disk'])
        prepare = functools.partial(small_disk, some_limit(out, luck)) if kind == 'disk' else None
        start = load_checkpoint(f'{out}/last.pt')['step'] if os.path.exists(f'{out}/last.pt') else 0
        child = SERVER.Process(target=run_in_child, args=(os.path.join(ROOT, script), command(script, scene_data, out, steps), str(tmp_path / 'stdout'), str(tmp_path / 'stderr')),
                               kwargs=dict(prepare=prepare, pictures=True))
        child.start()
        if kind == 'disk':
            child.join(300)
        elif luck.random() < 0.25:
            child.join(luck.uniform(0.1, 2))  # while it starts
        else:
            wait_for_step(out, start + luck.randrange(1, 25), child.is_alive)
            child.join(luck.uniform(0, 0.1))  # anywhere in a step or a save
        if child.is_alive():
            os.kill(child.pid, getattr(signal, kind))
            child.join(300)
        ends.append(f'{kind} {child.exitcode}')
        if os.path.isdir(out):
            every_file_under_a_final_name_can_be_read(out)
        if child.exitcode == 0:
            break
    print(f'{script}: {len(ends)} attempts:', *ends, sep='\n  ')
    assert child.exitcode == 0 and len(ends) >= 3
    same_end(script, quiet, out, steps)


def children(pid):
    found = []
    for stat in glob.glob('/proc/[0-9]*/stat'):
        try:
            fields = open(stat).read().rsplit(')', 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.split('/')[2]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='finds the ranks in /proc')
@pytest.mark.parametrize('script', SCRIPTS)
def test_two_processes_in_bad_luck_end_like_two_quiet_ones(script, scene_data, tmp_path):
    """One rank of two is killed, the group gets SIGTERM, the disk is full; then the run is left alone."""
    steps, luck, quiet, out, ends = 40, random.Random(script), tmp_path / 'quiet', tmp_path / 'unlucky', []
    run(script, *command(script, scene_data, quiet, steps), processes=2)
    for kind in luck.sample(['rank', 'SIGTERM', 'disk'], 3) + ['none']:
        prepare = functools.partial(small_disk, some_limit(out, luck)) if kind == 'disk' else None
        start = load_checkpoint(f'{out}/last.pt')['step'] if os.path.exists(f'{out}/last.pt') else 0
        launcher = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', os.path.join(ROOT, script),
                                     *command(script, scene_data, out, steps)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                    start_new_session=True, preexec_fn=prepare)
        if kind in ('rank', 'SIGTERM'):
            wait_for_step(out, start + luck.randrange(4, 10), lambda: launcher.poll() is None)
            time.sleep(luck.uniform(0, 0.1))
        if kind == 'rank':
            os.kill(luck.choice(children(launcher.pid)), signal.SIGKILL)
        elif kind == 'SIGTERM':
            os.killpg(launcher.pid, signal.SIGTERM)
        ends.append(f'{kind} {launcher.wait(300)}')
        assert (launcher.returncode == 0) == (kind == 'none'), ends
        if os.path.isdir(out):
            every_file_under_a_final_name_can_be_read(out)
    print(f'{script}, 2 processes:', *ends, sep='\n  ')
    same_end(script, quiet, out, steps)
