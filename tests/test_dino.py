"""DINOv2 and its spatial-spectral form: parameter counts, losses against float64 formulas, crops, masks, both fusions."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain_dino
import pretrain_dino_hsi
from conftest import ROOT, make_scene, run
from data import Tiles, UserError, augment_spectra, crop_by, crop_weights, draw_crops, resized_crop, standardization, standardize, standardize_rows
from models import DINOHead, SpatialSpectralViT, ViT

MODULES = [pretrain_dino, pretrain_dino_hsi]
each_script = pytest.mark.parametrize('script', MODULES, ids=['dino', 'dino_hsi'])


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameter_counts_are_the_dissertations():
    with torch.device('meta'):
        head = DINOHead(768, 65_536)
    dinov2 = dict(num_register_tokens=4, init_values=1e-5, mask_token=True)
    assert count(ViT(ffn='swiglu', **dinov2)) + count(head) == 109_853_440
    assert count(SpatialSpectralViT(ffn='mlp', fusion='token', **dinov2)) + count(head) == 202_915_984


# ============ losses against the formulas in float64 ============

def plain_sinkhorn(logits, temp, n_iterations=3):
    """As the papers write it: K x B, exponentials, no logarithms; float64 bears it."""
    q = np.exp((logits.astype(np.float64) - logits.max()) / temp).T
    K, B = q.shape
    q /= q.sum()
    for _ in range(n_iterations):
        q /= q.sum(1, keepdims=True) * K
        q /= q.sum(0, keepdims=True) * B
    return (q * B).T


def plain_cross_entropy(student, probs):
    z = student.astype(np.float64) / 0.1
    log_p = z - z.max(-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    return -(probs * log_p).sum(-1)


@each_script
@pytest.mark.parametrize('temp', [0.04, 0.07])
def test_sinkhorn_agrees_with_float64(script, temp):
    logits = np.random.default_rng(0).uniform(-1, 1, (24, 40)).astype(np.float32)
    probs = script.sinkhorn_knopp(torch.from_numpy(logits), temp).numpy()
    np.testing.assert_allclose(probs, plain_sinkhorn(logits, temp), atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)


@each_script
def test_sinkhorn_is_finite_where_exponentials_are_not(script):
    logits = torch.randn(32, 64) * 8
    logits[5] += 100  # an outlier
    probs = script.sinkhorn_knopp(logits, 0.01)
    assert torch.isfinite(probs).all() and torch.allclose(probs.sum(1), torch.ones(32), atol=1e-4)
    shifted = script.sinkhorn_knopp(logits + 50, 0.01)  # a constant changes nothing
    torch.testing.assert_close(probs, shifted, atol=1e-3, rtol=0)


@each_script
def test_losses_agree_with_float64(script):
    rng = np.random.default_rng(1)
    student, probs = rng.normal(size=(12, 30)).astype(np.float32), rng.dirichlet(np.ones(30), 12).astype(np.float32)
    expected = plain_cross_entropy(student, probs)
    assert script.dino_loss(torch.from_numpy(student), torch.from_numpy(probs)).item() == pytest.approx(expected.mean(), rel=1e-5)

    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[0, 2:5], mask[1, 0], mask[3, 1:9] = True, True, True  # 3, 1, 0 and 8 masked patches
    weight = np.array([1 / 3] * 3 + [1] + [1 / 8] * 8)
    loss = script.ibot_loss(torch.from_numpy(student), torch.from_numpy(probs), mask)
    assert loss.item() == pytest.approx((expected * weight).sum() / 4, rel=1e-5)

    x = rng.normal(size=(10, 6))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=2) + 9 * np.eye(10)
    assert script.koleo_loss(torch.from_numpy(x)).item() == pytest.approx(-np.log(distance.min(1)).mean(), rel=1e-5)


@each_script
def test_each_crop_is_compared_with_the_other_view(script):
    B, L, K = 3, 2, 8
    rng = np.random.default_rng(2)
    big, small = rng.normal(size=(2 * B, K)).astype(np.float32), rng.normal(size=(L * B, K)).astype(np.float32)
    probs = rng.dirichlet(np.ones(K), 2 * B).astype(np.float32)
    terms = []
    for t in range(2):
        for crop in [big[:B], big[B:]][1 - t:2 - t] + list(small.reshape(L, B, K)):
            terms.append(plain_cross_entropy(crop, probs[t * B:(t + 1) * B]).mean())
    outputs = (torch.randn(2 * B, 5), torch.from_numpy(big), torch.zeros(0, K), torch.from_numpy(small))
    losses = script.distillation_losses(outputs, torch.from_numpy(probs), torch.zeros(0, K), torch.zeros(2 * B, 4, dtype=torch.bool))
    assert len(terms) == 2 + 2 * L and losses['dino'].item() == pytest.approx(np.mean(terms), rel=1e-5) and losses['ibot'] == 0


@each_script
def test_koleo_survives_duplicates_and_refuses_a_batch_of_one(script):
    x = torch.ones(4, 6, requires_grad=True)
    loss = script.koleo_loss(x)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    with pytest.raises(UserError, match='two tiles'):
        script.koleo_loss(torch.ones(1, 6))


@each_script
def test_softmax_centering_moves_its_center_to_the_mean(script):
    logits, center = torch.randn(64, 10) + torch.arange(10), torch.zeros(10)
    for _ in range(200):
        probs = script.teacher_probs(logits, 0.5, 'softmax', center, 0.9)
    torch.testing.assert_close(center, logits.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(probs, F.softmax((logits - logits.mean(0)) / 0.5, -1), atol=1e-3, rtol=1e-3)


WORKER = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import {module} as script
dist.init_process_group('gloo')
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
logits, features = torch.randn(24, 40) * 3, torch.randn(12, 6)
uneven = [slice(0, 7), slice(7, 24)][rank]
probs = script.sinkhorn_knopp(logits[uneven], 0.05)
weight = torch.nn.Parameter(torch.eye(6))
loss = script.koleo_loss(features[rank * 6:rank * 6 + 6] @ weight)
loss.backward()
dist.all_reduce(weight.grad)
weight.grad /= world  # as DDP does
center = torch.zeros(40)
script.teacher_probs(logits[uneven], 0.05, 'softmax', center, 0.9)
torch.save([probs, loss.detach(), weight.grad, center], sys.argv[2] + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize('script', [pretrain_dino, pytest.param(pretrain_dino_hsi, marks=pytest.mark.slow)])
def test_targets_and_koleo_are_the_same_on_two_processes(script, tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER.format(module=script.__name__))
    run(tmp_path / 'worker.py', ROOT, tmp_path / 'out', processes=2)
    parts = [torch.load(tmp_path / f'out{rank}', weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    logits, features = torch.randn(24, 40) * 3, torch.randn(12, 6)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), script.sinkhorn_knopp(logits, 0.05), atol=1e-6, rtol=1e-5)
    weight, center = torch.nn.Parameter(torch.eye(6)), torch.zeros(40)
    loss = script.koleo_loss(features @ weight)
    loss.backward()
    script.teacher_probs(logits, 0.05, 'softmax', center, 0.9)
    for part in parts:
        torch.testing.assert_close(part[1], loss.detach())
        torch.testing.assert_close(part[2], weight.grad)
        torch.testing.assert_close(part[3], center)


# ============ student and teacher ============

def small_model(script, **flags):
    args = dict(img_size=16, patch_size=4, in_chans=7, embed_dim=48, depth=2, num_heads=3, num_register_tokens=2, init_values=0.1, ffn='swiglu',
                mask_token=True)
    encoder = ViT(**args) if script is pretrain_dino else SpatialSpectralViT(**args, **flags)
    return script.SelfDistillation(script.Branch(encoder, DINOHead(48, 32, 64, 16)), 32)


def inputs(script, B=3, L=2):
    big, small = torch.randn(2 * B, 7, 16, 16), torch.randn(L * B, 7, 8, 8)
    masks = [torch.rand(2 * B, n) < 0.4 for n in (16, 4)]
    rows = [mask.flatten().nonzero()[:, 0] for mask in masks]
    return (big, masks[0], rows[0], small) if script is pretrain_dino else (big, masks, rows, small)


VARIANTS = [(pretrain_dino, {}), (pretrain_dino_hsi, {'fusion': 'channel'}), (pretrain_dino_hsi, {'fusion': 'token'})]
each_variant = pytest.mark.parametrize('script, flags', VARIANTS, ids=['dino', 'channel', 'token'])


@each_variant
def test_the_teacher_is_a_running_average_without_gradient(script, flags):
    model = small_model(script, **flags).train()
    assert not model.teacher.training and not any(p.requires_grad for p in model.teacher.parameters())
    before = [p.clone() for p in model.teacher.parameters()]
    for p in model.student.parameters():
        p.data += torch.randn_like(p)
    model.update_teacher(0.9)
    for old, teacher, student in zip(before, model.teacher.parameters(), model.student.parameters()):
        torch.testing.assert_close(teacher.data, 0.9 * old + 0.1 * student.data)


@each_variant
def test_every_trainable_parameter_gets_a_gradient(script, flags):
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # torch.empty now gives NaN: nothing may stay uninitialised
    try:
        model = small_model(script, **flags)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    outputs = model(*inputs(script))
    streams = [outputs] if script is pretrain_dino else outputs
    sum(out.float().square().mean() for stream in streams for out in stream).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@each_variant
def test_a_masked_patch_is_not_seen_by_the_student(script, flags):
    model = small_model(script, **flags).eval()
    big, masks, rows, _ = inputs(script)
    mask = masks if script is pretrain_dino else masks[0]
    hidden = mask.reshape(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noisy = torch.where(hidden, 100 * torch.randn_like(big), big)
    tokens = [model.student.encoder(x, masks) if script is pretrain_dino else model.student.encoder(x, masks[0])[0] for x in (big, noisy)]
    torch.testing.assert_close(tokens[0], tokens[1])  # the spectral stream reads pixels of its own, but starts apart (fuse = 0)
    assert not torch.allclose(model.teacher.encoder(big)[0], model.teacher.encoder(noisy)[0])


@each_variant
def test_only_masked_tokens_go_through_the_head(script, flags):
    model, seen = small_model(script, **flags), []
    big, masks, rows, small = inputs(script)
    model.student.head.register_forward_hook(lambda head, args, out: seen.append(len(args[0])))
    model(big, masks, rows, small)
    expected = [len(big) + len(small) + len(row) for row in ([rows] if script is pretrain_dino else rows)]  # once a stream
    assert seen == expected


@each_variant
def test_compiles_without_graph_breaks_for_both_crop_sizes(script, flags):
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    model = small_model(script, **flags)
    torch.compile(model, fullgraph=True, backend=counter)(*inputs(script))
    torch._dynamo.reset()
    again = CompileCounter()
    encoder = torch.compile(model.student.encoder, fullgraph=True, backend=again, dynamic=False)
    encoder(torch.randn(2, 7, 16, 16)), encoder(torch.randn(2, 7, 8, 8)), encoder(torch.randn(2, 7, 16, 16))
    assert counter.frame_count == 1 and again.frame_count == 2  # a graph for each crop size, none for the third call


def test_token_fusion_refuses_other_sizes_and_channel_fusion_takes_them():
    args = dict(img_size=16, patch_size=4, in_chans=7, embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(UserError, match='works at 16 and 8 px only'):
        SpatialSpectralViT(**args, fusion='token')(torch.randn(1, 7, 12, 12))
    spatial, spectral = SpatialSpectralViT(**args)(torch.randn(1, 7, 12, 20))
    assert spectral.shape == (1, 1 + 4, 48) and spatial.shape == (1, 1 + 15, 48)


@pytest.mark.parametrize('fusion', ['channel', 'token'])
@pytest.mark.parametrize('bands, patch', [(1, 2), (6, 2), (32, 2), (200, 8)])
def test_any_band_count(fusion, bands, patch):
    encoder = SpatialSpectralViT(16, 4, bands, 24, 2, 2, spectral_patch_size=patch, fusion=fusion)
    assert encoder(torch.randn(2, bands, 16, 16))[1].shape == (2, 1 + math.ceil(bands / patch), 24)


def test_the_streams_hear_of_each_other_once_fusion_has_weights():
    for fusion in ('channel', 'token'):
        encoder = SpatialSpectralViT(16, 4, 6, 24, 2, 2, fusion=fusion, mask_token=True).eval()
        x, mask = torch.randn(1, 6, 16, 16), torch.tensor([[True, False, False]])
        apart = [encoder(x)[0], encoder(x, spectral_mask=mask)[0]]
        torch.testing.assert_close(*apart)
        for p in encoder.fuse.parameters():
            torch.nn.init.normal_(p, std=0.1)
        assert not torch.allclose(encoder(x)[0], encoder(x, spectral_mask=mask)[0])


def test_spectral_tokens_know_their_wavelength():
    nm = [450.0, 460.0, 800.0, 810.0]
    encoder = SpatialSpectralViT(8, 4, 4, 24, 1, 2, wavelengths_nm=nm)
    plain = SpatialSpectralViT(8, 4, 4, 24, 1, 2, wavelengths_nm=nm, wavelength_encoding=False)
    x = torch.ones(1, 4, 8, 8)  # all bands alike: only the wavelength tells the groups apart
    tokens = encoder.embed_spectra(x)[0, 1:]
    assert not torch.allclose(tokens[0], tokens[1]) and torch.allclose(*plain.embed_spectra(x)[0, 1:])
    angle = 45.5  # the first group's mean wavelength in units of 10 nm
    torch.testing.assert_close(tokens[0, 0] - plain.embed_spectra(x)[0, 1, 0] - encoder.spectral_embed(x[:, :2].mean() * torch.ones(1, 32))[0, 0]
                               + plain.spectral_embed(torch.ones(1, 32))[0, 0], torch.tensor(math.sin(angle)), atol=1e-4, rtol=0)
    indices = SpatialSpectralViT(8, 4, 4, 24, 1, 2)  # no wavelengths: band numbers
    assert indices.wavelength_code[0, 1, 0].item() == pytest.approx(math.sin(2.5), abs=1e-5)


# ============ crops and masks ============

@each_script
def test_block_masks_have_their_counts_and_are_blocks(script):
    masks = script.block_masks(64, 8, 8, 0.5, 0.1, 0.5, np.random.default_rng(0))
    counts = masks.sum(1)
    assert (counts > 0).sum() == 32 and counts[counts > 0].min() >= 6 and counts.max() <= 32
    assert abs(counts[counts > 0].float().mean() / 64 - 0.3) < 0.03
    grid = masks.reshape(-1, 8, 8)
    together = (grid[:, 1:] & grid[:, :-1]).sum() / grid.sum()
    assert together > 0.6  # scattered at random it would be 0.3


def test_band_masks_are_runs_of_neighbours():
    masks = pretrain_dino_hsi.band_masks(200, 16, 0.5, 0.3, 0.6, np.random.default_rng(0))
    assert (masks.any(1)).sum() == 100
    for mask in masks[masks.any(1)]:
        where = mask.nonzero()[:, 0]
        assert 5 <= len(where) <= 10 and where[-1] - where[0] == len(where) - 1


def batch_of(script, tiles, **changes):
    flags = dict(rank=0, world=1, img_size=16, patch_size=4, batch_size=8, global_scale=(0.4, 1), local_scale=(0.15, 0.4), local_crops_number=3,
                 turns=True, blur=0.5, mask_probability=0.5, mask_ratio_min=0.1, mask_ratio_max=0.5, seed=0)
    if script is pretrain_dino_hsi:
        flags |= dict(num_groups=4, spectral_mask_ratio_min=0.3, spectral_mask_ratio_max=0.6)
    return script.get_batch(tiles, 3, **flags | changes)


@each_script
def test_ranks_share_one_batch(script, scene_data):
    whole = [part.clone() for part in batch_of(script, Tiles(scene_data, 'tr'))]
    halves = [[part.clone() for part in batch_of(script, Tiles(scene_data, 'tr'), rank=rank, world=2)] for rank in range(2)]
    for one, *two in zip(whole, *halves):
        assert torch.equal(one, torch.cat(two))


def test_all_crops_of_a_tile_lie_in_one_window(tmp_path):
    coordinates = np.mgrid[:64, :64].astype(np.float32)
    run('data.py', 'tile', f'--root={make_scene(tmp_path / "s.npz", cube=np.moveaxis(coordinates, 0, 2), labels=None, wavelengths_nm=None)}',
        f'--out={tmp_path / "t"}', '--tile_size=64')
    tiles = Tiles(str(tmp_path / 't'), 'tr')
    raw, boxes, turned, soften, u, _ = batch_of(pretrain_dino, tiles, blur=0.0)
    assert raw.shape[-1] == 16 and (soften == 1).all()
    assert len({tuple(window[:, 0, 0].tolist()) for window in raw}) > 4  # and the windows move over the tile
    mean, matrix = standardization(tiles.meta)
    big, small = pretrain_dino.make_crops(raw, boxes, turned, soften, u, tiles.meta, mean, matrix, 16, 8, torch.zeros(2, 64, 16), {})
    assert big.shape == (16, 2, 16, 16) and small.shape == (24, 2, 8, 8)
    back = lambda x: x / matrix[:, None, None] + mean[:, None, None]
    for i in range(8):
        low, high = raw[i].amin((1, 2)), raw[i].amax((1, 2))
        for crop in (big[i], big[8 + i], *small[i::8]):
            values = back(crop)
            assert (values.amin((1, 2)) >= low - 1e-3).all() and (values.amax((1, 2)) <= high + 1e-3).all()
    spread = lambda crops: (back(crops).amax((2, 3)) - back(crops).amin((2, 3)) + 1).prod(1) / 256
    assert spread(big).mean() > 0.5 > 0.36 > spread(small).mean()  # shares of the window that are seen


# ============ spectral augmentation ============

def augmented(whiten=0, value=0.25, **strengths):
    torch.manual_seed(0)
    raw = torch.rand(3, 5, 8, 8) * 100 + 500
    raw[:, :, 0, 0] = torch.nan
    mean, std = torch.full((5,), 550.0), torch.full((5,), 30.0)
    matrix = torch.diag(1 / std) + 0.01 * torch.randn(5, 5) if whiten else 1 / std
    u = torch.full((3, 11), value)
    x = standardize_rows(raw, mean, matrix)
    return augment_spectra(x, u, torch.randn(5, 32, 8), mean, std, matrix, torch.linspace(400, 800, 5), **strengths), raw, mean, std, matrix


@pytest.mark.parametrize('whiten', [0, 1])
def test_spectral_augmentation_is_what_light_and_air_do_to_raw_values(whiten):
    for strengths, change in (({}, lambda raw: raw), ({'gain': 0.1}, lambda raw: raw * 0.95), ({'offset': 0.2}, lambda raw: raw - 0.1 * 30),
                              ({'tilt': 0.1}, lambda raw: raw - 0.05 * (torch.linspace(-1, 1, 5) * mean)[:, None, None])):
        y, raw, mean, std, matrix = augmented(whiten, **strengths)
        torch.testing.assert_close(y, standardize(change(raw), mean, matrix), atol=1e-4, rtol=1e-4)


def test_noise_dropout_jitter_and_solarize():
    plain = augmented()[0]
    noisy = augmented(noise=0.5, value=0.5)[0]
    assert (noisy - augmented(value=0.5)[0])[:, :, 1:].std().item() == pytest.approx(0.25, rel=0.2) and (noisy[:, :, 0, 0] == 0).all()
    dropped = (augmented(band_dropout=1.0, value=0.5)[0] == 0).all(3).all(2)[0].tolist()
    assert dropped == [False, False, True, False, False] or sum(dropped) in (1, 2)
    assert not (augmented(band_dropout=0.2, value=0.5)[0] == 0).all(3).all(2).any()
    assert (augmented(solarize=0.5)[0] <= 0).all() and (augmented(solarize=0.2)[0] > 0).any()
    assert not torch.allclose(augmented(jitter=0.4)[0], plain)


def test_blur_is_honoured_by_the_resize():
    x = torch.zeros(2, 1, 16, 16)
    x[:, :, 8, 8] = 1
    boxes, turns = torch.tensor([[0, 0, 16, 16]] * 2), torch.zeros(2, 3, dtype=torch.bool)
    y = resized_crop(x, boxes, turns, 16, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(y[0], x[0])
    assert y[1].max() == pytest.approx(0.25) and y[1].sum() == pytest.approx(1, rel=1e-3)


def test_crops_of_many_images_at_once_are_those_of_one_by_one():
    """GPUs take the whole batch at once, CPUs tile by tile."""
    torch.manual_seed(0)
    x, generator = torch.randn(3, 5, 16, 16), torch.Generator().manual_seed(0)
    _, _, boxes, turns = draw_crops(6, 16, 16, 0.3, 1.0, generator)  # 2 crops of each of the 3 images, crop by crop
    soften = 1 + torch.rand(6)
    by_image = [part.unflatten(0, (-1, 3)).transpose(0, 1) for part in (boxes, turns, soften)]
    together = crop_by(x, *crop_weights(*by_image[:2], *x.shape[2:], 8, by_image[2]), by_image[1][..., 2])
    for i in range(6):
        torch.testing.assert_close(together[i], resized_crop(x[i % 3:i % 3 + 1], boxes[i:i + 1], turns[i:i + 1], 8, soften[i:i + 1])[0])


@pytest.mark.parametrize('module', MODULES)
def test_crops_made_for_a_gpu_are_those_made_for_a_cpu(module):
    """A GPU takes the whole batch at once, a CPU tile by tile: crop by crop they must come out in the same order."""
    class Elsewhere(torch.Tensor):
        is_cuda = True

    torch.manual_seed(0)
    raw, generator = torch.rand(3, 5, 16, 16) * 100, torch.Generator().manual_seed(0)
    crops = [draw_crops(3, 16, 16, 0.3, 1.0, generator)[2:] for _ in range(4)]
    boxes, turned = (torch.stack(parts, 1) for parts in zip(*crops))
    meta = {'std': [1.0] * 5, 'wavelengths_nm': None, 'num_bands': 5, 'nodata': None}
    rest = (boxes, turned, 1 + torch.rand(3, 4), torch.rand(3, 4, 11), meta, torch.full((5,), 50.0), torch.ones(5), 16, 8, torch.randn(5, 64, 16),
            dict(gain=0.1, offset=0.1, noise=0.5, band_dropout=0.5))
    for one_by_one, at_once in zip(module.make_crops(raw, *rest), module.make_crops(raw.as_subclass(Elsewhere), *rest)):
        assert one_by_one.std() > 0.1
        torch.testing.assert_close(at_once.as_subclass(torch.Tensor), one_by_one)
