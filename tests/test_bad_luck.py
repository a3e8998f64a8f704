"""Each script in a loop of bad luck (kills, full disks, one rank of two killed) until it is done: the same weights as a quiet run's, bit for bit."""
import functools
import glob
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, SERVER, run, run_in_child
from models import load_checkpoint
from test_train import FLAGS, JUDGES, SCRIPTS, equal, weights

STEPS = 150


def command(script, data, out):
    flags = {name: value for name, value in (flag.split('=', 1) for flag in FLAGS[script])} | {'--save_every': '3', '--eval_every': '20'}
    flags['--steps' if script in JUDGES else '--epochs'] = str(STEPS)  # more epochs than steps
    more = [f'--results={out}.csv'] if script in JUDGES else []
    return [f'{name}={value}' for name, value in flags.items()] + more + [f'--data={data}', f'--out_dir={out}', f'--max_steps={STEPS}']


def small_disk(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def every_file_under_a_final_name_can_be_read(out):
    for path in glob.glob(f'{out}/*.pt'):
        load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_a_run_that_is_killed_again_and_again_ends_like_a_quiet_one(script, scene_data, tmp_path):
    run(script, *command(script, scene_data, tmp_path / 'quiet'))
    luck, out, ends = random.Random(script), tmp_path / 'unlucky', []
    for attempt in range(200):
        kind = luck.choice(['SIGKILL', 'SIGTERM', 'disk'])
        prepare = None
        if kind == 'disk':
            prepare = functools.partial(small_disk, luck.randrange(200_000, 3_000_000))
        child = SERVER.Process(target=run_in_child, args=(os.path.join(ROOT, script), command(script, scene_data, out), ROOT, prepare,
                                                          str(tmp_path / 'stdout'), str(tmp_path / 'stderr')))
        child.start()
        child.join(luck.uniform(0.5, 3) if kind != 'disk' else 300)
        if child.is_alive():
            os.kill(child.pid, getattr(signal, kind))
            child.join(300)
        ends.append((kind, child.exitcode))
        if os.path.isdir(out):
            every_file_under_a_final_name_can_be_read(out)
        if child.exitcode == 0:
            break
    print(script, f'{len(ends)} attempts:', *(f'{kind} {code},' for kind, code in ends))
    assert child.exitcode == 0 and len(ends) >= 3
    assert load_checkpoint(f'{out}/last.pt')['step'] == STEPS and equal(weights(tmp_path / 'quiet'), weights(out))
    assert not glob.glob(f'{out}/*.tmp')


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
def test_one_rank_of_two_is_killed_and_the_run_goes_on_where_it_was_saved(scene_data, tmp_path):
    script = 'pretrain_mae.py'
    run(script, *command(script, scene_data, tmp_path / 'quiet'), processes=2)
    luck, out = random.Random(1), tmp_path / 'unlucky'
    for attempt in range(20):
        launcher = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', os.path.join(ROOT, script),
                                     *command(script, scene_data, out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if attempt < 3:
            for _ in range(600):  # let it get some steps further, then kill one of the two
                if os.path.exists(f'{out}/last.pt') and load_checkpoint(f'{out}/last.pt')['step'] >= 6 * (attempt + 1):
                    break
                time.sleep(0.1)
            ranks = children(launcher.pid)
            if ranks:
                os.kill(luck.choice(ranks), signal.SIGKILL)
        if launcher.wait(300) == 0:
            break
        every_file_under_a_final_name_can_be_read(out)
    assert attempt >= 1 and load_checkpoint(f'{out}/last.pt')['step'] == STEPS and equal(weights(tmp_path / 'quiet'), weights(out))
