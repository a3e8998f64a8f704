"""DINOv2 and its spatial-spectral form: parameter counts, losses against float64 formulas, crops, masks, both fusions."""
import copy
import functools
import math

import numpy as np
import pytest
import torch

import pretrain_dino
import pretrain_dino_hsi
from conftest import ROOT, make_scene, run, tiled
from data import (Light, Statistics, Tiles, UserError, augment_spectra, crop_by, crop_weights, draw_crops, standardization, standardize,
                  standardize_rows)
from models import DINOHead, SpatialSpectralViT, ViT

MODULES = [pretrain_dino, pretrain_dino_hsi]
each_script = pytest.mark.parametrize('script', MODULES, ids=['dino', 'dino_hsi'])


@pytest.fixture
def constants(monkeypatch):
    """constants(script, name=value, ...): other values for a script's constants, as flags on the command line give them."""
    def change(script, **values):
        for name, value in values.items():
            if hasattr(script, name):  # the second stream's are in one script only
                monkeypatch.setattr(script, name, value)
    return change


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameter_counts_are_the_dissertations():
    with torch.device('meta'):
        head = DINOHead(768, 65_536)
    dinov2 = dict(num_register_tokens=4, init_values=1e-5, mask_token=True)
    assert count(ViT(ffn='swiglu', **dinov2)) + count(head) == 109_853_440
    assert count(SpatialSpectralViT(ffn='mlp', fusion='token', **dinov2)) + count(head) == 202_915_984


@pytest.mark.parametrize('script, flags, expected', [(pretrain_dino, {}, 109_853_440), (pretrain_dino_hsi, {'fusion': 'token', 'ffn': 'mlp'}, 202_915_984)],
                         ids=['dino', 'dino_hsi'])
def test_size_base_builds_the_dissertations_networks(script, flags, expected, constants):
    constants(script, size='base', **script.PRESETS['base'] | {'out_dim': 65_536}, **flags)
    with torch.device('meta'):
        model, encoder_args = script.build_model({'num_bands': 32, 'wavelengths_nm': None})
    assert count(model.student) == count(model.teacher) == expected and encoder_args['img_size'] == 64


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


def said(script, cls=torch.randn(4, 5), crops=torch.zeros(0, 8), masked=torch.zeros(0, 8), local=torch.zeros(0, 8)):
    """What a network says of one stream, arrays as tensors"""
    return script.Output(*(torch.as_tensor(value) for value in (cls, crops, masked, local)))


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
    np.testing.assert_allclose(script.cross_entropy(torch.from_numpy(student), torch.from_numpy(probs)), expected, rtol=1e-5)

    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[0, 2:5], mask[1, 0], mask[3, 1:9] = True, True, True  # 3, 1, 0 and 8 masked patches
    weight = np.array([1 / 3] * 3 + [1] + [1 / 8] * 8)
    loss = script.ibot_loss(said(script, masked=student), torch.from_numpy(probs), mask, mask.flatten().nonzero()[:, 0])
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
    loss = script.dino_loss(said(script, crops=big, local=small), torch.from_numpy(probs))
    assert len(terms) == 2 + 2 * L and loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


@each_script
def test_a_streams_loss_is_the_weighted_sum_of_its_terms(script, constants):
    torch.manual_seed(0)
    mask = torch.rand(6, 9) < 0.4
    rows = mask.flatten().nonzero()[:, 0]
    student, teacher = (said(script, torch.randn(6, 5), torch.randn(6, 8), torch.randn(len(rows), 8), torch.randn(9, 8)) for _ in range(2))
    constants(script, ibot_weight=0.5, koleo_weight=0.1)
    loss, terms = script.stream_loss(student, teacher, mask, rows, 0.05)
    dino, ibot = script.dino_loss(student, script.sinkhorn_knopp(teacher.global_logits, 0.05)), script.ibot_loss(student, script.sinkhorn_knopp(teacher.masked_logits, 0.05),
                                                                                                         mask, rows)
    koleo = script.koleo_loss(student.cls_features[:3]) + script.koleo_loss(student.cls_features[3:])
    torch.testing.assert_close({name: terms[name] for name in ('dino', 'ibot', 'koleo')}, {'dino': dino, 'ibot': ibot, 'koleo': koleo})
    torch.testing.assert_close(loss, dino + 0.5 * ibot + 0.1 * koleo)
    constants(script, ibot_weight=0.0, koleo_weight=0.0)
    loss, terms = script.stream_loss(student, teacher, mask, rows[:0], 0.05)
    assert terms.keys() == {'dino', 'teacher_entropy', 'feature_std', 'prototypes_used'} and terms['dino'] == loss == dino


@each_script
def test_koleo_survives_duplicates(script):
    x = torch.ones(4, 6, requires_grad=True)
    loss = script.koleo_loss(x)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()


@each_script
def test_signs_of_collapse_tell_all_the_same_from_all_different(script):
    signs = script.signs_of_collapse(torch.ones(16, 32), script.sinkhorn_knopp(torch.zeros(16, 64), 0.05))
    assert signs['teacher_entropy'] == pytest.approx(1, rel=1e-4)
    assert signs['feature_std'] == pytest.approx(0, abs=1e-5) and signs['prototypes_used'] == 1 / 16
    signs = script.signs_of_collapse(torch.randn(16, 32), script.sinkhorn_knopp(5 * torch.eye(16), 0.05))
    assert signs['teacher_entropy'] < 0.3 and signs['feature_std'] == pytest.approx(1, abs=0.1) and signs['prototypes_used'] == 1


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
torch.save([probs, loss.detach(), weight.grad], sys.argv[2] + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize('script', [pretrain_dino, pytest.param(pretrain_dino_hsi, marks=pytest.mark.slow)])
def test_targets_and_koleo_are_the_same_on_two_processes(script, tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER.format(module=script.__name__))
    run(tmp_path / 'worker.py', ROOT, tmp_path / 'out', processes=2)
    saved = [torch.load(tmp_path / f'out{rank}', weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    logits, features = torch.randn(24, 40) * 3, torch.randn(12, 6)
    torch.testing.assert_close(torch.cat([probs for probs, _, _ in saved]), script.sinkhorn_knopp(logits, 0.05), atol=1e-6, rtol=1e-5)
    weight = torch.nn.Parameter(torch.eye(6))
    loss = script.koleo_loss(features @ weight)
    loss.backward()
    for _, own_loss, gradient in saved:
        torch.testing.assert_close(own_loss, loss.detach())
        torch.testing.assert_close(gradient, weight.grad)


# ============ student and teacher ============

def small_model(script, **flags):
    args = dict(img_size=16, patch_size=4, in_chans=7, embed_dim=48, depth=2, num_heads=3, num_register_tokens=2, init_values=0.1, ffn='swiglu',
                mask_token=True)
    encoder = ViT(**args) if script is pretrain_dino else SpatialSpectralViT(**args, **flags)
    return script.SelfDistillation(script.Branch(encoder, DINOHead(48, 32, 64, 16)))


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
    outputs = model(big, masks, rows, small)
    expected = [len(big) + len(small) + len(row) for row in ([rows] if script is pretrain_dino else rows)]  # once a stream
    assert seen == expected
    for stream, row in zip([outputs] if script is pretrain_dino else outputs, [rows] if script is pretrain_dino else rows):
        assert [len(value) for value in stream] == [len(big), len(big), len(row), len(small)]


def test_what_no_one_asks_for_is_spared_the_last_mlp_and_changes_nothing(monkeypatch):
    model, seen = small_model(pretrain_dino).eval(), []
    big, mask, rows, small = inputs(pretrain_dino)
    model.student.encoder.blocks[-1].mlp.register_forward_hook(lambda mlp, args, out: seen.append(args[0].shape[1]))
    with_patches = model(big, mask, rows, small)
    cls_alone = model(big, mask, rows[:0], small)
    assert seen == [19, 1, 1, 1]  # cls, 2 registers and 16 patches; cls of local crops; cls alone
    torch.testing.assert_close(cls_alone.cls_features, with_patches.cls_features)
    torch.testing.assert_close(cls_alone.global_logits, with_patches.global_logits)
    torch.testing.assert_close(with_patches.local_logits, model.student.head(model.student.encoder(small)[:, 0]))


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


@each_variant
def test_another_number_of_masked_tokens_compiles_nothing_again(script, flags):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    model = small_model(script, **flags)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    big, masks, rows, small = inputs(script)
    for fewer in (0, 1, 3):
        numbers = [row[:len(row) - fewer] for row in ([rows] if script is pretrain_dino else rows)]
        names = ['masked_ids', 'masked_band_ids'][:len(numbers)]
        batch = script.Batch(**{name: torch.zeros(1) for name in script.Batch._fields})._replace(**dict(zip(names, numbers)))
        batch = script.to_device(batch, 'cpu')
        compiled(big, masks, batch.masked_ids if script is pretrain_dino else (batch.masked_ids, batch.masked_band_ids), small)
    assert counter.frame_count == 1


def test_token_fusion_refuses_other_sizes_and_channel_fusion_takes_them():
    args = dict(img_size=16, patch_size=4, in_chans=7, embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(UserError, match='weights for 16 and 8 px only.*--window'):
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
    plain = copy.deepcopy(encoder)
    plain.wavelength_code.zero_()
    x = torch.ones(1, 4, 8, 8)  # all bands alike: only the wavelength tells the groups apart
    tokens = encoder.embed_spectra(x)[0, 1:]
    assert not torch.allclose(tokens[0], tokens[1]) and torch.allclose(*plain.embed_spectra(x)[0, 1:])
    angle = 45.5  # the first group's mean wavelength in units of 10 nm
    torch.testing.assert_close(tokens[0, 0] - plain.embed_spectra(x)[0, 1, 0], torch.tensor(math.sin(angle)), atol=1e-4, rtol=0)
    indices = SpatialSpectralViT(8, 4, 4, 24, 1, 2)  # no wavelengths: band numbers
    assert indices.wavelength_code[0, 1, 0].item() == pytest.approx(math.sin(2.5), abs=1e-5)


# ============ crops and masks ============

@each_script
def test_block_masks_have_their_counts_and_are_blocks(script, constants):
    constants(script, mask_probability=0.5, mask_ratio_min=0.1, mask_ratio_max=0.5)
    masks = script.block_masks(64, 8, 8, np.random.default_rng(0))
    counts = masks.sum(1)
    assert (counts > 0).sum() == 32 and counts[counts > 0].min() >= 6 and counts.max() <= 32
    assert abs(counts[counts > 0].float().mean() / 64 - 0.3) < 0.03
    grid = masks.reshape(-1, 8, 8)
    neighbours = (grid[:, 1:] & grid[:, :-1]).sum() / grid.sum()
    assert neighbours > 0.6  # scattered at random it would be 0.3
    constants(script, mask_probability=0.0)
    assert not script.block_masks(64, 8, 8, np.random.default_rng(0)).any()


def masks_one_by_one(n, side, rng, probability, low, high):
    """The masks as BEiT draws them: crop by crop, rectangle by rectangle."""
    masks, count = np.zeros((n, side, side), bool), round(n * probability)
    for image, level in zip(rng.permutation(n)[:count], rng.permutation(count)):
        mask, wanted = masks[image], max(1, round((low + (high - low) * (level + rng.random()) / count) * side * side))
        while mask.sum() < wanted:
            area, aspect = rng.uniform(0.3, 1) * (wanted - mask.sum()), np.exp(rng.uniform(-1.2, 1.2))
            height, width = (int(np.clip(round(math.sqrt(part)), 1, side)) for part in (area * aspect, area / aspect))
            top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
            mask[top:top + height, left:left + width] = True
        masked = np.flatnonzero(mask)
        mask.flat[rng.permutation(masked)[:len(masked) - wanted]] = False
    return masks


@functools.cache  # seconds, and the same for both scripts
def many_masks_one_by_one():
    return masks_one_by_one(3000, 8, np.random.default_rng(1), 0.8, 0.3, 0.7)


def shape_of_masks(masks):
    """What tells masks apart: shares of masked patches with a masked neighbour below, beside, none; of corner and middle; the middle half of counts"""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1))).astype(int)
    neighbours = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2]
    counts, total = masks.sum((1, 2)), masks.sum()
    return np.array([(masks[:, 1:] & masks[:, :-1]).sum() / total, (masks[:, :, 1:] & masks[:, :, :-1]).sum() / total, (masks & (neighbours == 0)).sum() / total,
                     masks[:, 0, 0].mean(), masks[:, 4, 4].mean(), masks.all(2).any(1).mean(), *np.quantile(counts[counts > 0], [0.25, 0.75]) / 64])


@each_script
def test_masks_of_a_batch_at_once_are_as_those_drawn_one_by_one(script, constants):
    constants(script, mask_probability=0.8, mask_ratio_min=0.3, mask_ratio_max=0.7)
    at_once = script.block_masks(3000, 8, 8, np.random.default_rng(0)).numpy().reshape(-1, 8, 8)
    one_by_one = many_masks_one_by_one()
    np.testing.assert_allclose(shape_of_masks(at_once), shape_of_masks(one_by_one), atol=0.03)
    np.testing.assert_allclose(shape_of_masks(at_once)[:3], shape_of_masks(one_by_one)[:3], atol=0.006)
    counts = np.sort(at_once.sum((1, 2)))
    assert (counts == np.sort(one_by_one.sum((1, 2)))).mean() > 0.9  # evenly spread ratios, exact counts


def test_band_masks_are_runs_of_neighbours(constants):
    constants(pretrain_dino_hsi, mask_probability=0.5, mask_ratio_min=0.3, spectral_mask_ratio_max=0.6)
    masks = pretrain_dino_hsi.band_masks(200, 16, np.random.default_rng(0))
    assert (masks.any(1)).sum() == 100
    lengths, starts = [], []
    for mask in masks[masks.any(1)]:
        where = mask.nonzero()[:, 0]
        assert 5 <= len(where) <= 10 and where[-1] - where[0] == len(where) - 1
        lengths.append(len(where)), starts.append(where[0].item())
    assert set(lengths) == {5, 6, 7, 8, 9, 10} and min(starts) == 0 and max(starts) == 11  # all lengths, anywhere
    constants(pretrain_dino_hsi, mask_probability=0.0)
    assert not pretrain_dino_hsi.band_masks(200, 16, np.random.default_rng(0)).any()


SMALL_BATCH = dict(img_size=16, patch_size=4, batch_size=8, global_scale_min=0.4, local_scale_min=0.15, local_scale_max=0.4, local_crops_number=3, blur=0.5,
                   ibot_weight=1.0, mask_probability=0.5, mask_ratio_min=0.1, mask_ratio_max=0.5, seed=0)


def batch_of(script, tiles, **ranks):
    """A batch whose tensors are its own"""
    return script.Batch(*(value.clone() for value in script.get_batch(tiles, 3, **ranks)))


@each_script
def test_ranks_share_one_batch(script, constants, scene_data):
    constants(script, **SMALL_BATCH)
    tiles = Tiles(scene_data, 'tr')
    whole = batch_of(script, tiles)
    halves = [batch_of(script, tiles, rank=rank, world=2) for rank in range(2)]
    for name in ('raw', 'boxes', 'flips', 'draws'):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves])), name
    for mask, rows in (('mask', 'masked_ids'), ('band_mask', 'masked_band_ids'))[:1 + (script is pretrain_dino_hsi)]:
        crop_by_crop = [getattr(half, mask).unflatten(0, (2, -1)) for half in halves]
        assert getattr(whole, mask).any() and torch.equal(getattr(whole, mask), torch.cat(crop_by_crop, 1).flatten(0, 1))
        for batch in (whole, *halves):
            assert torch.equal(getattr(batch, mask).flatten().nonzero()[:, 0], getattr(batch, rows))


@each_script
def test_without_ibot_masks_only_augment_and_without_masks_the_student_sees_all(script, constants, scene_data):
    tiles = Tiles(scene_data, 'tr')
    constants(script, **SMALL_BATCH | {'ibot_weight': 0.0})
    batch = batch_of(script, tiles)
    assert batch.mask.any() and len(batch.masked_ids) == 0  # no token is learned
    constants(script, mask_probability=0.0)
    batch = batch_of(script, tiles)
    assert not batch.mask.any() and (script is pretrain_dino or not batch.band_mask.any())


MISTAKES = [
    (dict(img_size=128), 'tiles of 64 px: .* rising'), (dict(local_crops_size=32), '--local_crops_size=32, .* rising'), (dict(patch_size=5), 'multiples of --patch_size=5'),
    (dict(patch_size=16, local_crops_size=16), 'two patches'), (dict(batch_size=1), '--koleo_weight=0'),
    (dict(ibot_weight=1.0, mask_probability=0.0), '--ibot_weight'), (dict(mask_probability=0.001), '--mask_probability=0.001: none of'),
    (dict(steps=10, freeze_last_layer=0.97), 'prototypes would not learn'), (dict(patch_size=7, img_size=21, local_crops_size=7), 'tiles of 64 px'),
    (dict(mask_ratio_min=0.8), 'above its maximum'), (dict(local_scale_min=0.5), 'above its maximum')]


@pytest.mark.parametrize('script, changes, words', [(script, *mistake) for script in MODULES for mistake in MISTAKES] + [
    (pretrain_dino_hsi, dict(fusion='token', local_crops_size=4), '--local_crops_size=8'),
    (pretrain_dino_hsi, dict(mask_ratio_min=0.65), 'above its maximum')])
def test_constants_that_cannot_go_together_are_refused_before_the_first_step(script, changes, words, constants):
    meta = {'tile_size': 64, 'num_bands': 7}
    script.check_constants(meta)
    constants(script, **script.PRESETS['base'])
    script.check_constants(meta)
    constants(script, img_size=16, local_crops_size=8, patch_size=4, ibot_weight=0.0)
    constants(script, **changes)
    with pytest.raises(UserError, match=words):
        script.check_constants(meta)


@each_script
def test_all_crops_of_a_tile_lie_in_one_window(script, constants, tmp_path):
    coordinates = np.mgrid[:64, :64].astype(np.float32)
    tiled(make_scene(tmp_path / 's.npz', cube=np.moveaxis(coordinates, 0, 2), labels=None, wavelengths_nm=None), tmp_path / 't', '--tile_size=64')
    tiles = Tiles(str(tmp_path / 't'), 'tr')
    constants(script, **SMALL_BATCH | dict(blur=0.0, local_crops_size=8, gain=0.0, offset=0.0, noise=0.0, band_dropout=0.0))
    batch = batch_of(script, tiles)
    raw = batch.raw
    assert raw.shape[-1] == 16
    assert len({tuple(window[:, 0, 0].tolist()) for window in raw}) > 4  # and the windows move over the tile
    mean, matrix = standardization(tiles.meta)
    big, small = script.make_crops(batch, Statistics(mean, 1 / matrix, matrix), None, 3)
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
    draws = torch.full((3, 11), value)
    x = standardize_rows(raw, mean, matrix)
    return augment_spectra(x, draws, torch.randn(5, 32, 8), Statistics(mean, std, matrix), Light(**strengths)), raw, mean, std, matrix


@pytest.mark.parametrize('whiten', [0, 1])
def test_spectral_augmentation_is_what_light_and_air_do_to_raw_values(whiten):
    for strengths, change in (({}, lambda raw: raw), ({'gain': 0.1}, lambda raw: raw * 0.95), ({'offset': 0.2}, lambda raw: raw - 0.1 * 30)):
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


def one_crop(x, boxes, flips, out, softness):
    """resized_crop() with a softness (B,)"""
    rows, cols = crop_weights(boxes[:, None], flips[:, None], *x.shape[2:], out, softness[:, None])
    return crop_by(x, rows, cols, flips[:, None, 2])


def test_blur_is_honoured_by_the_resize():
    x = torch.zeros(2, 1, 16, 16)
    x[:, :, 8, 8] = 1
    boxes, flips = torch.tensor([[0, 0, 16, 16]] * 2), torch.zeros(2, 3, dtype=torch.bool)
    y = one_crop(x, boxes, flips, 16, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(y[0], x[0])
    assert y[1].max() == pytest.approx(0.25) and y[1].sum() == pytest.approx(1, rel=1e-3)


def test_crops_of_many_images_at_once_are_those_of_one_by_one():
    torch.manual_seed(0)
    x, generator = torch.randn(3, 5, 16, 16), torch.Generator().manual_seed(0)
    _, _, boxes, flips = draw_crops(6, 16, 16, 0.3, 1.0, generator)  # 2 crops of each of the 3 images, crop by crop
    softness = 1 + torch.rand(6)
    by_image = [value.unflatten(0, (-1, 3)).transpose(0, 1) for value in (boxes, flips, softness)]
    at_once = crop_by(x, *crop_weights(*by_image[:2], *x.shape[2:], 8, by_image[2]), by_image[1][..., 2])
    for i in range(6):
        torch.testing.assert_close(at_once[i], one_crop(x[i % 3:i % 3 + 1], boxes[i:i + 1], flips[i:i + 1], 8, softness[i:i + 1])[0])
