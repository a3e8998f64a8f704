"""Ten steps of each script on the demo: a change that should not alter numbers must leave these losses as they are.

Twice: with today's constants, and (slow) with those of the scripts' first form, which tie them to the numbers of then.

After a change that should: python tests/test_reference.py writes reference_losses.json anew (say why in the commit).
"""
import json
import os
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, run

# The constants of the scripts' first form, so that the losses are still comparable with those of then
AT_ONCE = ['--batch_size=8', '--warmup=0', '--base_lr=1e-2', '--steps=5760']  # no warm-up: ten steps of it would hardly move a weight
DINO = [*AT_ONCE[:-1], '--steps=19200', '--out_dim=64', '--freeze_last_layer=0', '--momentum_teacher=0.9', '--ibot_weight=1', '--koleo_weight=0.02', '--global_scale_min=0.4',
        '--local_scale_min=0.15']
FLAGS = {'pretrain_mae.py': [*AT_ONCE, '--dropout=0.1'], 'pretrain_dino.py': DINO, 'pretrain_dino_hsi.py': DINO,
         'segment.py': ['--batch_size=4', '--steps=10', '--decoder=conv', '--pixel=false'],
         'baseline_deeplab.py': ['--batch_size=4', '--steps=10', '--crop_size=32']}
FLAGS |= {f'{script} today': [] for script in (*FLAGS, 'pretrain_lejepa.py')} | {'segment.py today': ['--decoder=linear']}
PATH = os.path.join(ROOT, 'tests', 'reference_losses.json')


def without_scores():
    """For run(prepare=): no probe, scores, floors and examples. They take longer than ten steps, and draw no random number that a loss depends on."""
    sys.path.insert(0, ROOT)
    import data
    data.probe = lambda features, splits, max_tiles, device='cpu': 0.0
    data.evaluate = lambda predict, tiles, *ranks: torch.zeros(2 * [tiles.meta['num_classes']], dtype=torch.int64)
    data.floors = lambda *args: {'window': data.scores(torch.zeros(2, 2))}
    data.save_examples = lambda *args: None


def ten_losses(script, folder, prepare=None):
    more = ['--probe_tiles=2'] if script.startswith('pretrain') else ['--eval_every=10']
    run(script.split()[0], *FLAGS[script], *more, '--max_steps=10', '--log_every=1', '--dtype=float32', f'--data={folder}/demo', f'--out_dir={folder}/{script}',
        prepare=prepare)
    return [entry['loss'] for entry in map(json.loads, open(f'{folder}/{script}/log.jsonl')) if 'loss' in entry]


CASES = [pytest.param(script, marks=() if 'today' in script else pytest.mark.slow) for script in FLAGS]


@pytest.mark.parametrize('script', CASES)
def test_losses_are_those_of_the_reference(script, demo):
    reference = json.load(open(PATH))
    if reference['torch'] != torch.__version__.split('+')[0]:
        pytest.skip(f'written with torch {reference["torch"]}: another version draws other weights')
    expected = reference[script]
    tolerance = 0.01 if 'baseline' in script else 1e-3  # machines differ by rounding, which ten steps amplify, batch norm most
    np.testing.assert_allclose(ten_losses(script, demo, without_scores), expected, rtol=tolerance)


if __name__ == '__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as place:
        run('data.py', 'demo', f'--out={place}/demo')
        losses = {'torch': torch.__version__.split('+')[0], **{script: [round(value, 6) for value in ten_losses(script, place)] for script in FLAGS}}
    json.dump(losses, open(PATH, 'w'), indent=1)
    print(PATH)
