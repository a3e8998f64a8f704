"""tests/gpu.py, rehearsed on a CPU: what is to run on a GPU for minutes that are not to be lost must run at all."""
import json
import os
import re
import subprocess
import sys
import time

import pytest

import gpu
from conftest import ROOT


def rehearse(folder, *flags, minutes=9, failing=()):
    command = [sys.executable, os.path.join(ROOT, 'tests', 'gpu.py'), '--rehearse', f'--out={folder}', f'--minutes={minutes}', *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(folder / 'gpu.json') as file:
        results = json.load(file)
    for name, facts in results.items():
        assert not name.startswith('part ') or name in failing, (name, facts)  # a part that failed, or for which there was no time
        assert name in done.stdout or name == 'of a call before'
        if isinstance(facts, dict) and name != 'SIGTERM':
            assert facts.get('exit code', 0) == 0, (name, facts)
    return results


def test_numbers_and_paths_are_rehearsed_and_a_part_that_fails_stops_no_other(demo, tmp_path):
    os.symlink(demo / 'demo', tmp_path / 'demo')  # it would make one
    (tmp_path / 'gpu.json').write_text('{"of a call before": 1, "part numbers": "not run"}')
    results = rehearse(tmp_path, '--only=numbers,nonsense,paths,peer', failing=['part nonsense'])
    assert results['of a call before'] == 1
    assert 'KeyError' in results['part nonsense']['failed']
    assert results['whitening: error beside float64, relative'] < 1e-5
    assert results['solved decoder, beside the CPU']['pixels with the same class'] > 0.99
    assert len([name for name in results if 'a batch of' in name]) == 7 and results['map of 64 x 64 px, ViT-tiny, windows at half a step, s'] > 0


def log_of(steps, wrong=None):
    return [{'step': 0, 'probe_miou': 0.3}, *({'step': step, 'loss': 1 / step + (step == wrong)} for step in range(1, steps + 1))]


def test_a_resumed_run_is_equal_only_where_all_three_runs_went_as_meant():
    good, bad = {'exit code': 0}, {'exit code': 1, 'last words': 'broken'}
    right = [(good, log_of(12)), (good, log_of(7)), (good, log_of(12))]
    assert gpu.compare_resumed(*right)['equal'] and gpu.compare_resumed(*right)['difference'] == 0
    never_saved = [right[0], (bad, log_of(3)), right[2]]  # the third began anew, and is equal to the first
    assert not gpu.compare_resumed(*never_saved)['equal'] and gpu.compare_resumed(*never_saved)['last words'] == 'broken'
    assert not gpu.compare_resumed(right[0], (good, log_of(0)), right[2])['equal']
    assert not gpu.compare_resumed(*[(bad, [])] * 3)['equal'] and not gpu.compare_resumed(*right[:2], (good, log_of(12, wrong=9)))['equal']
    assert gpu.difference(log_of(0), log_of(0)) is None and gpu.difference(log_of(3), log_of(2)) is None


def test_a_second_call_starts_its_runs_anew_and_keeps_other_results(tmp_path, monkeypatch):
    """Or a run that had ended would be measured by the log of the code before it"""
    (tmp_path / 'stub.py').write_text('import os, sys\nout = sys.argv[-1].split("=")[1]\nos.makedirs(out, exist_ok=True)\n'
                                      'open(out + "/log.jsonl", "a").write(\'{"loss": 1}\\n\')\n')
    launch = 'import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])'  # without torch
    for name, value in dict(LAUNCH=launch, ROOT=str(tmp_path), out=str(tmp_path), rehearse=True, deadline=time.time() + 100, begun=set()).items():
        monkeypatch.setattr(gpu, name, value, raising=False)
    assert [len(gpu.run('stub', 'a')[1]) for _ in range(2)] == [1, 2]  # within a call a run may be resumed
    gpu.begun = set()
    facts, log = gpu.run('stub', 'a')
    assert len(log) == 1 and facts['exit code'] == 0


@pytest.mark.slow
def test_all_of_it_is_rehearsed_on_a_cpu(tmp_path):
    results = rehearse(tmp_path, minutes=60)
    for script in ('pretrain_mae', 'pretrain_dino', 'pretrain_dino_hsi', 'pretrain_lejepa'):
        for name in ('gpu', 'compiled'):  # on a CPU all are the same run
            assert results[f'{script}, ten losses: {name} against cpu' if name == 'gpu' else f'{script}, ten losses: compiled against gpu']['difference'] == 0
        assert results[f'{script}, 12 = 7 + 5 steps']['equal']
        assert results[f'{script}, base, compiled']['ms a step'] > 0
        assert os.path.getsize(tmp_path / f'base_{script}_compiled_profile.txt') > 1000
    assert results['pretrain_mae, base, eager']['ms a step'] > 0
    assert not [name for name in os.listdir(tmp_path) if not re.fullmatch('[A-Za-z0-9._-]+', name)]
    assert results['SIGTERM']['exit code'] == 143 and results['SIGTERM']['steps in the log'] >= 3
    assert len(results['pretrain_mae, small, probe mIoU over steps']['probe']) == 3
