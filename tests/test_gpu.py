"""tests/gpu.py, rehearsed on a CPU: what is to run on a GPU for minutes that are not to be lost must run at all."""
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT


def rehearse(folder, *flags, minutes=9, failing=()):
    command = [sys.executable, os.path.join(ROOT, 'tests', 'gpu.py'), '--rehearse', f'--out={folder}', f'--minutes={minutes}', *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(folder / 'gpu.json') as file:
        results = json.load(file)
    for name, facts in results.items():
        assert not name.startswith('part ') or name in failing, (name, facts)  # a part that failed, or for which there was no time
        assert name in done.stdout
        if isinstance(facts, dict) and name != 'SIGTERM':
            assert facts.get('exit code', 0) == 0, (name, facts)
    return results


def test_numbers_and_paths_are_rehearsed_and_a_part_that_fails_stops_no_other(demo, tmp_path):
    os.symlink(demo / 'demo', tmp_path / 'demo')  # it would make one
    results = rehearse(tmp_path, '--only=numbers,nonsense,paths,peer', failing=['part nonsense'])
    assert 'KeyError' in results['part nonsense']['failed']
    assert results['whitening: error beside float64, relative'] < 1e-5
    assert results['solved decoder, beside the CPU']['pixels with the same class'] > 0.99
    assert len([name for name in results if 'a batch of' in name]) == 7 and results['map of 64 x 64 px, ViT-tiny, windows at half a step, s'] > 0


@pytest.mark.slow
def test_all_of_it_is_rehearsed_on_a_cpu(tmp_path):
    results = rehearse(tmp_path, minutes=60)
    for script in ('pretrain_mae', 'pretrain_dino', 'pretrain_dino_hsi', 'pretrain_lejepa'):
        for name in ('gpu', 'compiled'):  # on a CPU all are the same run
            assert results[f'{script}, ten losses: {name} against cpu' if name == 'gpu' else f'{script}, ten losses: compiled against gpu']['difference'] == 0
        assert results[f'{script}, 12 = 7 + 5 steps']['equal']
        for kind in ('compiled', 'eager') if script == 'pretrain_mae' else ('compiled',):
            assert results[f'{script}, base, {kind}']['ms a step'] > 0
            assert os.path.getsize(tmp_path / f'base_{script}_{kind}_profile.txt') > 1000
    assert results['SIGTERM']['exit code'] == 143 and results['SIGTERM']['steps in the log'] >= 3
    assert len(results['pretrain_mae, small, probe mIoU over steps']['probe']) == 3
