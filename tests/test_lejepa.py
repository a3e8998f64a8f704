"""LeJEPA: SIGReg and the invariance against float64 formulas, what they do to embeddings, 1 and 2 processes, resume, the encoder in use."""
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain_lejepa
from conftest import ROOT, run
from data import UserError
from models import ViT, load_checkpoint, load_encoder
from test_train import equal, losses, weights

TINY = ['--batch_size=8', '--steps=90', '--warmup=0.03', '--log_every=1', '--probe_tiles=4', '--whiten=3', '--save_every=4', '--eval_every=12', '--num_directions=32']


@pytest.fixture
def constants(monkeypatch):
    """constants(name=value, ...): other values for the script's constants, as flags on the command line give them."""
    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(pretrain_lejepa, name, value)
    return change


def train(data, out, *flags, script='pretrain_lejepa.py', **kwargs):
    return run(script, *TINY, f'--data={data}', f'--out_dir={out}', *flags, **kwargs)


@pytest.fixture(scope='module')
def whole(scene_data, tmp_path_factory):
    """The directory of a run of 12 steps in one go."""
    folder = tmp_path_factory.mktemp('lejepa')
    train(scene_data, folder / 'run', '--max_steps=12', pictures=True)
    return folder / 'run'


def unit(directions):
    return directions / np.linalg.norm(directions, axis=0)


# ============ losses against the formulas in float64 ============

def statistic_in_closed_form(x):
    """Epps and Pulley's statistic of n numbers, integrated over all t: sums over pairs, no characteristic function (Baringhaus and Henze 1988)."""
    n = len(x)
    pairs = np.exp(-(x[:, None] - x[None]) ** 2 / 2).sum() / n
    return math.sqrt(2 * math.pi) * (pairs - math.sqrt(2) * np.exp(-x ** 2 / 4).sum() + n / math.sqrt(3))


def plain_sigreg(z, directions):
    """The same as in the script, one view, direction and t at a time"""
    total, t = 0.0, np.linspace(0, 3, 17)
    for view in z:
        for a in directions.T:
            x = view @ a
            distance = [abs(np.exp(1j * s * x).mean() - math.exp(-s * s / 2)) ** 2 * math.exp(-s * s / 2) for s in t]
            total += 2 * len(x) * np.trapezoid(distance, t)
    return total / len(z) / directions.shape[1]


def test_sigreg_agrees_with_float64_and_with_the_integral(constants):
    rng = np.random.default_rng(0)
    z, directions = rng.normal(0.3, 1.2, (3, 24, 5)), unit(rng.normal(size=(5, 7)))
    constants(batch_size=24)
    found = pretrain_lejepa.sigreg(torch.tensor(z, dtype=torch.float32), torch.tensor(directions, dtype=torch.float32)).item()
    assert found == pytest.approx(plain_sigreg(z, directions), rel=1e-5)
    closed = np.mean([[statistic_in_closed_form(view @ a) for a in directions.T] for view in z])
    assert found == pytest.approx(closed, rel=0.02)  # what lies beyond t = 3 counts little


def test_the_invariance_is_the_distance_from_the_global_views_mean():
    z = np.random.default_rng(0).normal(size=(5, 4, 3))
    total = sum(((z[v, b] - (z[0, b] + z[1, b]) / 2) ** 2).sum() for v in range(5) for b in range(4))
    assert pretrain_lejepa.invariance(torch.tensor(z)).item() == pytest.approx(total / z.size)
    same = torch.randn(1, 4, 3).expand(5, 4, 3)
    assert pretrain_lejepa.invariance(same) == pytest.approx(0, abs=1e-12)


def test_sigreg_tells_a_normal_sample_from_a_collapsed_and_a_flat_one(constants):
    torch.manual_seed(0)
    constants(batch_size=256)
    directions = F.normalize(torch.randn(16, 64), dim=0)
    normal = torch.randn(20, 256, 16)
    assert pretrain_lejepa.sigreg(normal, directions).item() == pytest.approx(1.05, abs=0.1)  # the line in curves.png
    flat = normal.clone()
    flat[..., 8:] = 0  # half of the axes are not used
    for worse in (torch.zeros_like(normal), 3 * normal, normal + 1, flat):
        assert pretrain_lejepa.sigreg(worse, directions) > 1.3


def test_sigreg_alone_spreads_points_on_a_line_over_all_directions(constants):
    torch.manual_seed(0)
    constants(batch_size=256)
    z = (0.1 * torch.randn(1, 256, 1) * torch.ones(4) + 1e-3 * torch.randn(1, 256, 4)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        pretrain_lejepa.sigreg(z, F.normalize(torch.randn(4, 32), dim=0)).backward()
        optimizer.step()
    torch.testing.assert_close(torch.cov(z[0].detach().T), torch.eye(4), atol=0.15, rtol=0)
    assert z.mean(1).abs().max() < 0.1


WORKER = """
import sys, torch, torch.distributed as dist, torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
import pretrain_lejepa as script
dist.init_process_group('gloo')
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
script.batch_size = 12
directions = F.normalize(torch.randn(6, 16), dim=0)
x, weight = torch.randn(3, 12, 6), torch.nn.Parameter(torch.randn(6, 6))
own = x[:, rank * 6:rank * 6 + 6]
z = (own @ weight).square()
loss = script.sigreg(z, directions) + script.invariance(z)
loss.backward()
loss = loss.detach()
for value in (loss, weight.grad):  # as DDP does
    dist.all_reduce(value)
    value /= world
torch.save([loss, weight.grad], sys.argv[2] + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


def test_losses_and_gradients_are_the_same_on_two_processes(constants, tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    run(tmp_path / 'worker.py', ROOT, tmp_path / 'out', processes=2)
    torch.manual_seed(0)
    constants(batch_size=12)
    directions = F.normalize(torch.randn(6, 16), dim=0)
    x, weight = torch.randn(3, 12, 6), torch.nn.Parameter(torch.randn(6, 6))
    z = (x @ weight).square()
    loss = pretrain_lejepa.sigreg(z, directions) + pretrain_lejepa.invariance(z)
    loss.backward()
    for rank in range(2):
        own_loss, gradient = torch.load(tmp_path / f'out{rank}', weights_only=True)
        torch.testing.assert_close(own_loss, loss.detach())
        torch.testing.assert_close(gradient, weight.grad)


# ============ the network ============

def test_every_parameter_gets_a_gradient_and_compiles_without_graph_breaks(constants):
    from torch._dynamo.testing import CompileCounter
    model, _ = pretrain_lejepa.build_model({'num_bands': 7})
    big, small = torch.randn(6, 7, 16, 16), torch.randn(9, 7, 8, 8)
    z = model(big, small)
    assert z.shape == (5, 3, 128)
    tokens = model.encoder(small[3:6])[:, 1:]  # the fourth view: the second local crop of each tile
    torch.testing.assert_close(z[3], tokens.mean(1))
    z.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    counter = CompileCounter()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=counter)(big, small)
    assert counter.frame_count == 1


def test_the_sign_of_collapse_tells_all_the_same_from_all_different():
    for same in (torch.ones(16, 32), torch.arange(32.0).expand(16, 32)):
        assert pretrain_lejepa.feature_std(same) == pytest.approx(0, abs=1e-5)
    assert pretrain_lejepa.feature_std(torch.randn(64, 32)) == pytest.approx(1, abs=0.1)


def test_directions_are_unit_vectors_and_others_at_each_step():
    one, two = (pretrain_lejepa.draw_directions(128, step, 'cpu') for step in (1, 2))
    assert one.shape == (128, 256) and not torch.equal(one, two) and torch.equal(one, pretrain_lejepa.draw_directions(128, 1, 'cpu'))
    torch.testing.assert_close(one.norm(dim=0), torch.ones(256))


def test_size_base_is_a_plain_vit_b(constants):
    constants(size='base', **pretrain_lejepa.PRESETS['base'])
    pretrain_lejepa.check_constants({'tile_size': 64, 'num_bands': 32})
    with torch.device('meta'):
        model, encoder_args = pretrain_lejepa.build_model({'num_bands': 32})
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ViT(64, 8, 32).parameters()) and encoder_args['img_size'] == 64


MISTAKES = [(dict(local_crops_size=32), '--local_crops_size=32, .* rising'), (dict(patch_size=5), 'multiples of --patch_size=5'), (dict(img_size=128), 'tiles of 64 px'),
            (dict(batch_size=1), 'needs two tiles'), (dict(local_scale_min=0.5), 'above its maximum'), (dict(img_size=4, local_crops_size=4), 'two patches')]


@pytest.mark.parametrize('changes, words', MISTAKES)
def test_constants_that_cannot_go_together_are_refused_before_the_first_step(changes, words, constants):
    meta = {'tile_size': 64, 'num_bands': 7}
    pretrain_lejepa.check_constants(meta)
    constants(**changes)
    with pytest.raises(UserError, match=words):
        pretrain_lejepa.check_constants(meta)


# ============ runs ============

def test_12_steps_are_5_and_7_bit_for_bit(scene_data, whole, tmp_path):
    for steps in (5, 12):
        train(scene_data, tmp_path / 'parts', f'--max_steps={steps}')
    assert load_checkpoint(tmp_path / 'parts' / 'last.pt')['step'] == 12
    assert equal(weights(whole), weights(tmp_path / 'parts')) and losses(whole) == losses(tmp_path / 'parts')


def test_two_processes_are_one(scene_data, tmp_path):
    for n in (1, 2):
        train(scene_data, tmp_path / str(n), '--max_steps=3', '--dtype=float32', processes=n)
    np.testing.assert_allclose(losses(tmp_path / '1'), losses(tmp_path / '2'), rtol=1e-5)
    logs = [[json.loads(line) for line in open(tmp_path / n / 'log.jsonl') if 'sigreg' in line] for n in '12']
    for one, two in zip(*logs):
        for name in ('invariance', 'sigreg', 'feature_std'):
            assert one[name] == pytest.approx(two[name], rel=1e-4), name
    one, two = weights(tmp_path / '1'), weights(tmp_path / '2')
    for name in one:
        if name.endswith('qkv.bias'):  # a key's bias cancels in the softmax: its gradient is rounding noise
            D = len(one[name]) // 3
            one[name][D:2 * D] = two[name][D:2 * D] = 0
        difference = (one[name].double() - two[name].double()).abs()
        assert difference.max() < 1e-4 and (difference > 5e-6).double().mean() < 1e-3, name


def test_a_run_holds_what_a_reader_needs_and_its_encoder_is_used(scene_data, whole, tmp_path):
    assert {'last.pt', 'log.jsonl', 'curves.png'} <= set(os.listdir(whole))
    assert (whole / 'curves.png').stat().st_size > 5000
    entries = [entry for entry in load_checkpoint(whole / 'last.pt')['log'] if 'loss' in entry]
    terms = [0.8 * entry['invariance'] + 0.2 * entry['sigreg'] for entry in entries]  # lambda is 0.2
    assert len(terms) == 12 and [entry['loss'] for entry in entries] == pytest.approx(terms, rel=1e-5)
    encoder = load_encoder(whole / 'last.pt')
    own = {name.removeprefix('encoder.'): value for name, value in weights(whole).items() if name.startswith('encoder.')}
    assert equal(own, encoder.state_dict()) and encoder.script == 'pretrain_lejepa.py'
    done = run('segment.py', f'--encoder={whole}/last.pt', f'--data={scene_data}', f'--out_dir={tmp_path}/judged', '--decoder=linear', '--steps=1')
    assert 'LeJEPA + linear' in done.stdout
    run('viz_attention.py', f'--encoders={whole}/last.pt', f'--data={scene_data}', f'--out_dir={tmp_path}/maps')
    assert os.listdir(tmp_path / 'maps')


def test_other_scripts_start_from_its_encoder_and_it_from_theirs(scene_data, whole, tmp_path):
    done = run('pretrain_dino.py', '--batch_size=8', '--out_dir', tmp_path / 'dino', f'--data={scene_data}', '--whiten=3', '--probe_tiles=4', '--max_steps=1',
               f'--init_from={whole}/last.pt')
    assert 'tensors taken' in done.stdout
    done = train(scene_data, tmp_path / 'back', '--max_steps=1', '--base_lr=0', f'--init_from={tmp_path}/dino/last.pt')
    assert 'what starts fresh: nothing' in done.stdout
    teacher, own = load_encoder(tmp_path / 'dino' / 'last.pt').state_dict(), load_encoder(tmp_path / 'back' / 'last.pt').state_dict()
    assert own and all(torch.equal(value, teacher[name]) for name, value in own.items())


def test_without_sigreg_the_features_collapse_and_it_is_said(scene_data, tmp_path):
    flags = ['--max_steps=10', '--warmup=0', '--log_every=10', '--eval_every=100', '--base_lr=0.1', '--steps=60']
    done = train(scene_data, tmp_path / 'run', '--sigreg_weight=0', *flags)
    assert 'the features are collapsing' in done.stdout + done.stderr
    healthy = train(scene_data, tmp_path / 'healthy', *flags)
    assert 'collapsing' not in healthy.stdout + healthy.stderr


def test_mistakes_are_told_in_a_sentence(scene_data, tmp_path):
    for flags, code, words in ((['--size=huge'], 2, 'invalid choice'), (['--patch_size=5'], 1, 'multiples of --patch_size'), (['--batch_size=1'], 1, 'two tiles')):
        done = train(scene_data, tmp_path / 'run', *flags, check=False)
        assert done.returncode == code and words in done.stderr and 'Traceback' not in done.stderr, done.stderr
