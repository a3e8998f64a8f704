"""Decoders, baseline, scores of whole scenes, label shares: what stands between a feature and a number one can trust."""
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

import segment
import why_it_failed
from conftest import MAE_TINY, SCENES, make_scene, run, tiled
from data import Tiles, confusion_matrix, label_to_class, scene_flags, scores, sliding_window
from models import (DeepLabV3Plus, MaskedAutoencoder, ViT, build_segmenter, load_checkpoint, load_segmenter, loss_count, save_checkpoint,
                    segmentation_loss)
from tools import map_scene

TRAINED = ['--decoder=linear', '--batch_size=8', '--eval_every=10']
FEW_LABELS = ['--label_share=0.1']  # decoder and floors are solved in less time: for tests in which it does not matter how good they are


def report_of(folder):
    return json.load(open(folder / 'report.json'))


def two_tiles():
    """Two tiles (2, 5, 16, 16) of noise and labels (2, 16, 16) that change from pixel block to pixel block; some ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = torch.randn(2, 5, 16, 16, generator=generator) + torch.nn.functional.one_hot(labels, 5).movedim(-1, 1)
    labels[:, 0] = 255
    return images, labels


@pytest.mark.parametrize('decoder, kind', [('linear', 'ce'), ('transformer', 'ce'), ('conv', 'ce'), ('conv', 'focal'), ('conv', 'dice')])
def test_every_decoder_and_loss_learns_two_tiles_by_heart(decoder, kind):
    torch.manual_seed(0)
    x, y = two_tiles()
    model = build_segmenter(ViT(16, 2 if decoder == 'transformer' else 4, 5, 48, 4, 3), 3, decoder, freeze=False, pixel=False)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for _ in range(60):
        loss = segmentation_loss(model(x), y, torch.ones(3), kind) / loss_count(y, torch.ones(3), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.parameters())  # skips and all take part
    centres = slice(1, None, 4) if decoder == 'linear' else slice(None)  # bilinear upsampling blurs the borders between patches
    assert scores(confusion_matrix(model(x).argmax(1)[:, centres, centres], y[:, centres, centres], 3))['miou'] > 0.95


@pytest.mark.parametrize('stem', ['three', pytest.param('seven', marks=pytest.mark.slow)])
def test_the_baseline_learns_two_tiles_by_heart_and_every_weight_takes_part(stem):
    torch.manual_seed(0)
    x, y = two_tiles()
    x, y = (torch.nn.functional.interpolate(v, scale_factor=4.0) for v in (x, y[:, None].float()))
    y = y[:, 0].long()
    model = DeepLabV3Plus(5, 3, output_stride=8, stem=stem, width=8, blocks=(1, 1, 1, 1), head_dim=32)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(segmentation_loss(out, y, torch.ones(3), 'ce') for out in model(x)) / y.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert scores(confusion_matrix(model(x)[0].argmax(1), y, 3))['miou'] > 0.95
    model.train()(x[:1])  # a batch of 1 trains
    assert model.eval()(x[:, :, :50, :42]).shape == (2, 3, 50, 42)


@pytest.mark.parametrize('output_stride, side', [(16, 4), (8, 8)])
def test_the_baselines_last_stage_has_the_output_stride_it_says(output_stride, side):
    model = DeepLabV3Plus(4, 3, output_stride=output_stride, width=8, blocks=(1, 1, 1, 1), head_dim=16).eval()
    seen = []
    model.layer4.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    model(torch.randn(1, 4, 64, 64))
    assert seen == [side]


def test_dice_is_its_formula():
    logits, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 2, (2, 4, 4))
    target[0, :2], target[1] = 255, 1
    expected = 0
    for image, label in zip(logits.softmax(1), target):
        known = label != 255
        dice = [2 * image[k][known & (label == k)].sum() / (image[k][known].sum() + (known & (label == k)).sum()) for k in range(3) if (label == k).any()]
        expected += 1 - sum(dice) / len(dice)
    assert segmentation_loss(logits, target, torch.ones(3), 'dice').item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss_count(target, torch.ones(3), 'dice') == 2
    target[0] = 255
    assert loss_count(target, torch.ones(3), 'dice') == 1


# ============ features follow the image ============

def test_features_shift_with_the_image_when_positions_are_taken_away():
    vit = ViT(16, 4, 3, 24, 3, 2, num_register_tokens=2).eval()
    torch.nn.init.zeros_(vit.pos_embed)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for maps, moved in zip(vit.get_intermediate_layers(x), vit.get_intermediate_layers(x.roll((4, 8), (2, 3)))):
            torch.testing.assert_close(maps.roll((1, 2), (2, 3)), moved, rtol=1e-4, atol=1e-5)


def test_features_of_a_masked_autoencoder_come_in_image_order():
    encoder = MaskedAutoencoder(16, 4, 3, 24, 2, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).encoder.eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = encoder.get_intermediate_layers(x, 1)[0]
        for row, col in ((0, 0), (1, 3), (3, 2)):
            other = x.clone()
            other[..., 4 * row:4 * row + 4, 4 * col:4 * col + 4] += 3
            change = (encoder.get_intermediate_layers(other, 1)[0] - before).norm(dim=1)[0]
            assert divmod(int(change.argmax()), 4) == (row, col)


# ============ whole scenes ============

def whole(strips):
    strips = list(strips)
    assert [top for top, _ in strips] == np.cumsum([0] + [part.shape[1] for _, part in strips[:-1]]).tolist()
    return np.concatenate([part for _, part in strips], axis=1)


@pytest.mark.parametrize('H, W, window, stride', [(40, 48, 16, 8), (41, 37, 16, 5), (16, 16, 16, 8), (7, 30, 16, 8), (33, 9, 16, 16), (1, 1, 8, 4), (50, 20, 16, 3)])
def test_blended_windows_give_back_what_does_not_depend_on_the_window(H, W, window, stride):
    cube = np.random.default_rng(0).normal(size=(3, H, W)).astype(np.float32)
    got = whole(sliding_window(lambda x: torch.stack([x[:, 0], 2 * x[:, 1]], 1), cube, window, stride, 2, batch_size=3))
    assert got.shape == (2, H, W)
    np.testing.assert_allclose(got, np.stack([cube[0], 2 * cube[1]]), rtol=1e-4, atol=1e-5)


def test_windows_side_by_side_are_tile_wise_prediction():
    cube = np.random.default_rng(0).normal(size=(3, 32, 48)).astype(np.float32)
    place = torch.arange(16.0)[None, None, :, None] + torch.arange(16.0) / 100  # depends on the place in the window

    def predict(x):
        return torch.cat([x.mean((1, 2, 3), keepdim=True) + place, x[:, :1]], 1)
    got = whole(sliding_window(predict, cube, 16, 16, 2))
    for top in (0, 16):
        for left in (0, 16, 32):
            tile = torch.from_numpy(cube[None, :, top:top + 16, left:left + 16])
            np.testing.assert_allclose(got[:, top:top + 16, left:left + 16], predict(tile)[0], rtol=1e-5, atol=1e-6)


def test_blended_windows_leave_no_seam():
    cube = np.zeros((1, 64, 64), np.float32)
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)  # each window errs most at its border, to the left low, to the right high
    got = whole(sliding_window(lambda x: x + ramp, cube, 16, 8, 1))[0]
    plain = whole(sliding_window(lambda x: x + ramp, cube, 16, 16, 1))[0]
    jumps = [np.abs(np.diff(part[:, 8:-8], axis=1)).max() for part in (got, plain)]
    assert jumps[0] < 0.2 * jumps[1]


def test_memory_is_that_of_a_row_of_windows():
    class Cube:  # an image that counts what is read of it
        shape = (2, 10_000, 40)
        rows = []

        def __getitem__(self, index):
            self.rows.append(index[1])  # rows, of all bands and columns
            return np.zeros((2, min(index[1].stop, 10_000) - index[1].start, 40), np.float32)
    cube = Cube()
    sizes = [part.shape for _, part in sliding_window(lambda x: x, cube, 16, 8, 2)]
    assert max(rows for _, rows, _ in sizes) <= 16 and max(s.stop - s.start for s in cube.rows) == 16 and sum(rows for _, rows, _ in sizes) == 10_000


@pytest.mark.parametrize('script, flags', [('segment.py', [*TRAINED, '--freeze=false', '--img_size=8']),
                                           ('baseline_deeplab.py', ['--width=8', '--batch_size=4'])])
def test_crops_smaller_than_the_tile_train_and_the_whole_tile_is_scored(script, flags, scene_data, tmp_path):
    run(script, *flags, '--augment=true', f'--data={scene_data}', '--crop_size=8', '--steps=3', '--dtype=float32', f'--out_dir={tmp_path}/run')
    report = report_of(tmp_path / 'run')
    assert np.sum(report['confusion_matrix']) == np.count_nonzero(Tiles(scene_data, 'ts').labels)
    pred, raw, names = why_it_failed.predictions(str(tmp_path / 'run'))  # what is drawn is what is scored
    assert confusion_matrix(pred, label_to_class(raw), len(names)).tolist() == report['confusion_matrix']
    assert load_segmenter(tmp_path / 'run' / 'best.pt').window == 8


@pytest.mark.parametrize('script, flags', [('segment.py', TRAINED), ('segment.py', FEW_LABELS),
                                           pytest.param('baseline_deeplab.py', ['--width=8', '--batch_size=4'], marks=pytest.mark.slow)])
def test_a_finished_run_is_scored_again_and_alike_by_two_processes(script, flags, scene_data, tmp_path):
    reports = []
    for n in (1, 2):
        done = run(script, *flags, f'--data={scene_data}', '--steps=2', f'--out_dir={tmp_path / "run"}', '--dtype=float32', processes=n)
        assert 'window' in done.stdout and 'to map a scene' in done.stdout
        reports.append(report_of(tmp_path / 'run')['confusion_matrix'])
        os.remove(tmp_path / 'run' / 'report.json')
    assert reports[0] == reports[1] and np.sum(reports[0])


# ============ the solved decoder ============

def test_the_spectrum_beside_the_features_is_reported_with_and_without(scene_data, tmp_path):
    for pixel in ('true', 'false'):
        done = run('segment.py', *FEW_LABELS, f'--data={scene_data}', f'--pixel={pixel}', f'--out_dir={tmp_path}/{pixel}', '--dtype=float32')
        assert ('without the spectrum' in done.stdout) == (pixel == 'true')
    both, alone = report_of(tmp_path / 'true'), report_of(tmp_path / 'false')
    assert both['scores_without_pixel'] == alone['scores'] and both['scores'] != alone['scores'] and 'scores_without_pixel' not in alone
    assert set(both['floors']) == {'majority', 'chance', 'pixel', 'window'} and both['name'] == 'random ViT + logistic'
    model = load_segmenter(tmp_path / 'true' / 'best.pt')
    assert model.pixel_head.weight.abs().sum() > 0 and load_segmenter(tmp_path / 'false' / 'best.pt').pixel_head is None


def test_the_decoder_sees_the_spectra_of_the_window_floor_and_no_missing_pixel():
    torch.manual_seed(0)
    model = build_segmenter(ViT(8, 4, 5, 48, 4, 3), 3, 'logistic', freeze=True, pixel=True).eval()
    x = torch.randn(1, 5, 16, 16)
    x[:, :, :8, :8] = 0  # missing: standardize() leaves 0
    spectra = model.spectra(x)
    assert torch.equal(spectra[:, :5], x)  # the pixel's own first
    for number, side in enumerate((1, 3, 5, 9)):
        reach = side // 2
        there = x[0, :, 8 - reach:9 + reach, 9 - reach:10 + reach].flatten(1)
        valid = there.any(0)
        torch.testing.assert_close(spectra[0, 5 * number:5 * number + 5, 8, 9], there[:, valid].mean(1))
    # what the solved weights say is what the network says
    weights = torch.randn(4 * 48 + 4 * 5 + 1, 3)
    head = model.head.classifier
    head.weight.data.copy_(weights[:192].T[..., None, None])
    head.bias.data.copy_(weights[-1])
    model.pixel_head.weight.data.copy_(weights[192:-1].T[..., None, None])
    model.pixel_head.bias.data.zero_()
    with torch.no_grad():
        maps = torch.nn.functional.interpolate(model.features(x), (16, 16), mode='bilinear')
        inputs = torch.cat([maps, spectra], 1).movedim(1, -1)
        torch.testing.assert_close(model(x).movedim(1, -1), inputs @ weights[:-1] + weights[-1], rtol=1e-3, atol=1e-3)


def test_a_decoder_that_is_solved_takes_a_frozen_encoder_and_a_directory_of_its_own(scene_data, tmp_path):
    base = ['segment.py', *FEW_LABELS, f'--data={scene_data}', f'--out_dir={tmp_path}/run']
    for flags in (['--freeze=false'], ['--augment'], ['--criterion=dice'], ['--class_weights=sqrt'], ['--crop_size=8']):
        done = run(*base, *flags, check=False)
        assert done.returncode == 1 and 'choose --decoder=linear' in done.stderr and 'Traceback' not in done.stderr
    run(*base)
    for flags in (['--seed=1'], ['--decoder=linear', '--steps=2']):
        done = run(*base, *flags, check=False)
        assert done.returncode == 1 and 'best.pt: is of a run with other constants' in done.stderr


def test_flags_without_effect_are_said(monkeypatch):
    for constants, flags, expected in (
            (dict(decoder='logistic', freeze=True, encoder=''), ['--lr=5', '--steps', '7', '--size=tiny'], ['--steps', '--lr']),
            (dict(decoder='linear', freeze=False, encoder='a.pt'), ['--lr=5', '--layer_decay=0.5', '--img_size=64'], ['--img_size']),
            (dict(decoder='linear', freeze=True, encoder=''), ['--layer_decay=0.5'], ['--layer_decay'])):
        for name, value in (constants | {'untrained': False}).items():
            monkeypatch.setattr(segment, name, value)
        monkeypatch.setattr(sys, 'argv', ['segment.py', *flags])
        assert segment.without_effect() == expected


@pytest.mark.parametrize('script, flags', [('segment.py', ['--decoder=linear']), ('baseline_deeplab.py', ['--width=8'])])
def test_dice_takes_no_weights_of_classes(script, flags, scene_data, tmp_path):
    done = run(script, *flags, f'--data={scene_data}', '--criterion=dice', '--class_weights=sqrt', f'--out_dir={tmp_path}/run', check=False)
    assert done.returncode == 1 and 'soft Dice counts all classes alike' in done.stderr and 'Traceback' not in done.stderr


# ============ the data of an encoder ============

def test_an_encoder_is_judged_on_its_own_data_unless_told_otherwise(scene_data, tmp_path):
    run('pretrain_mae.py', f'--data={scene_data}', '--steps=2', '--batch_size=4', '--whiten=3', '--probe_tiles=4', f'--out_dir={tmp_path}/mae')
    base = ['segment.py', f'--encoder={tmp_path}/mae/last.pt', '--decoder=linear', '--steps=1', *FEW_LABELS, '--dtype=float32']
    done = run(*base, f'--out_dir={tmp_path}/own')
    own = load_segmenter(tmp_path / 'own' / 'best.pt')
    assert own.config['data'] == scene_data and 'its own statistics' not in done.stdout and 'MAE + linear' in done.stdout
    assert own.whiten == own.config['whiten'] == 3
    scene = make_scene(tmp_path / 'other.npz', height=64, width=96, seed=5)
    tiled(scene, tmp_path / 'other', '--tile_size=16', '--split_block=8')
    done = run(*base, f'--data={tmp_path}/other', f'--out_dir={tmp_path}/there')
    assert f'{tmp_path}/other is not what {tmp_path}/mae/last.pt learned from: the statistics of' in done.stdout
    assert load_segmenter(tmp_path / 'there' / 'best.pt').meta['mean'] != own.meta['mean']
    fine = make_scene(tmp_path / 'fine.npz', height=64, width=96, bands=9)
    tiled(fine, tmp_path / 'fine', '--tile_size=16', '--split_block=8')
    done = run(*base, f'--data={tmp_path}/fine', f'--out_dir={tmp_path}/refused', check=False)
    assert done.returncode == 1 and '--bands=' in done.stderr and 'Traceback' not in done.stderr
    done = run('segment.py', '--untrained', f'--out_dir={tmp_path}/refused', check=False)
    assert done.returncode == 1 and 'of which encoder' in done.stderr


@pytest.mark.parametrize('script', ['segment.py', 'baseline_deeplab.py'])
def test_data_without_labels_is_refused_in_a_sentence(script, tmp_path):
    scene = make_scene(tmp_path / 's.npz', height=64, width=64, labels=None)
    tiled(scene, tmp_path / 'tiles', '--tile_size=16')
    done = run(script, f'--data={tmp_path}/tiles', f'--out_dir={tmp_path}/run', check=False)
    assert done.returncode == 1 and str(tmp_path / 'tiles') in done.stderr and 'Traceback' not in done.stderr


def test_the_cnn_starts_from_the_weights_of_another_run(scene_data, tmp_path):
    flags = [f'--data={scene_data}', '--width=8', '--batch_size=4', '--steps=2']
    run('baseline_deeplab.py', *flags, f'--out_dir={tmp_path}/first')
    done = run('baseline_deeplab.py', *flags, f'--init_from={tmp_path}/first/last.pt', f'--out_dir={tmp_path}/second')
    assert 'tensors taken' in done.stdout
    # the same number of bands elsewhere in the spectrum
    scene = make_scene(tmp_path / 's.npz')
    with np.load(scene) as stored:
        np.savez(scene, **{**stored, 'wavelengths_nm': stored['wavelengths_nm'] + 300})
    tiled(scene, tmp_path / 'other', '--tile_size=16')
    done = run('baseline_deeplab.py', f'--data={tmp_path}/other', *flags[1:], f'--init_from={tmp_path}/first/last.pt', f'--out_dir={tmp_path}/third', check=False)
    assert done.returncode == 1 and 'the network was trained on' in done.stderr


def test_a_run_that_was_stopped_between_two_scores_judges_the_same_state(scene_data, tmp_path):
    """Were the state at the stop scored as well, it could be the best of a run that never scored it"""
    flags = [f'--data={scene_data}', '--decoder=linear', '--steps=8', '--eval_every=4', '--batch_size=4', '--lr=0.1']
    run('segment.py', *flags, f'--out_dir={tmp_path}/whole')
    run('segment.py', *flags, '--max_steps=6', f'--out_dir={tmp_path}/parts')
    assert load_checkpoint(tmp_path / 'parts' / 'best.pt')['step'] in (0, 4)
    run('segment.py', *flags, f'--out_dir={tmp_path}/parts')
    logs = [[{k: v for k, v in json.loads(line).items() if k in ('step', 'val_miou')} for line in open(tmp_path / name / 'log.jsonl') if 'val_miou' in line] for name in ('whole', 'parts')]
    assert logs[0] == logs[1] and [entry['step'] for entry in logs[0]] == [0, 4, 8]
    whole, parts = (load_checkpoint(tmp_path / name / 'best.pt') for name in ('whole', 'parts'))
    assert whole['step'] == parts['step'] and all(torch.equal(value, parts['model'][name]) for name, value in whole['model'].items())


def test_an_encoder_that_does_not_say_its_tiles_needs_data(scene_data, tmp_path):
    run('pretrain_mae.py', *MAE_TINY, f'--data={scene_data}', '--steps=1', f'--out_dir={tmp_path}/mae')
    checkpoint = load_checkpoint(tmp_path / 'mae' / 'last.pt')
    save_checkpoint(f'{tmp_path}/own.pt', {**checkpoint, 'config': {'whiten': 3}})
    done = run('segment.py', f'--encoder={tmp_path}/own.pt', f'--out_dir={tmp_path}/judged', check=False)
    assert done.returncode == 1 and 'own.pt: does not say which tiles it learned from: pass --data' in done.stderr


# ============ few labels ============

def test_a_share_of_the_labels_is_kept_wherever_tiles_overlap(tmp_path):
    scene = make_scene(tmp_path / 's.npz', height=96, width=96)
    tiled(scene, tmp_path / 't', '--tile_size=32', '--stride=16')
    every, few, other = (Tiles(tmp_path / 't', 'tr', label_share=share, seed=seed) for share, seed in ((1.0, 0), (0.1, 0), (0.1, 1)))
    seen = {}
    for tiles in (every, few):
        seen[tiles] = np.zeros((96, 96), np.uint8)
        for labels, (_, row, col) in zip(tiles.labels, tiles.meta['tiles']['tr']):
            here = seen[tiles][row:row + 32, col:col + 32]
            if tiles is few:  # what one tile keeps, the overlapping one keeps as well
                known = here > 0
                assert (labels[known] == here[known]).all()
            np.copyto(here, labels, where=labels > 0)
    kept = (seen[few] > 0).sum() / (seen[every] > 0).sum()
    assert 0.07 < kept < 0.13 and (seen[few][seen[few] > 0] == seen[every][seen[few] > 0]).all()
    assert not np.array_equal(few.labels, other.labels)
    assert set(np.unique(Tiles(tmp_path / 't', 'tr', label_share=1e-6).labels)) == set(np.unique(every.labels))  # one pixel of each class is left


def test_label_share_reaches_training_and_floors(scene_data, tmp_path):
    for share in (1.0, 0.02):
        run('segment.py', *TRAINED, f'--data={scene_data}', '--steps=2', f'--label_share={share}', f'--out_dir={tmp_path / str(share)}')
    reports = [report_of(tmp_path / share) for share in ('1.0', '0.02')]
    assert [key for key in json.load(open(os.path.join(scene_data, 'floors.json'))) if '0.02 of the labels' in key]
    assert reports[0]['floors']['window']['oa'] >= reports[1]['floors']['window']['oa']
    assert np.sum(reports[0]['confusion_matrix']) == np.sum(reports[1]['confusion_matrix'])  # the test labels are all there


def test_a_share_of_the_labels_is_as_a_data_set_that_has_no_others(scene_data, tmp_path):
    """Weights of classes come from the labels that are kept"""
    shutil.copytree(scene_data, tmp_path / 'few')
    kept = Tiles(scene_data, 'tr', label_share=0.05).labels
    np.save(tmp_path / 'few' / 'tr_labels.npy', kept)
    meta = json.load(open(tmp_path / 'few' / 'meta.json'))
    meta['class_counts']['tr'] = np.bincount(kept.ravel(), minlength=meta['num_classes'] + 1)[1:].tolist()
    json.dump(meta, open(tmp_path / 'few' / 'meta.json', 'w'))
    found = []
    for data, share in ((scene_data, 0.05), (tmp_path / 'few', 1.0)):
        run('segment.py', *TRAINED, f'--data={data}', f'--label_share={share}', '--class_weights=inverse', '--steps=2', '--log_every=1', f'--out_dir={tmp_path}/{share}')
        found.append([json.loads(line)['loss'] for line in open(tmp_path / str(share) / 'log.jsonl') if 'loss' in line])
    assert found[0] == found[1] and len(found[0]) == 2


def test_the_printed_map_command_reads_a_scene_as_the_tiler_was_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.mat').touch()
    meta = {'scenes': ['a.mat'], 'split': 'blocks', 'settings': dict(axes='hwc', nodata=0.0, drop_bands='', keep_bad_bands=True, root='.')}
    assert scene_flags(meta) == {'scene': 'a.mat', 'axes': 'hwc', 'nodata': 0.0, 'keep_bad_bands': True}
    map_scene.parse([f'--{name}={value}' for name, value in scene_flags(meta).items()])  # all of them are its flags
    meta['settings'] |= dict(axes='', nodata=None, keep_bad_bands=False)
    assert scene_flags(meta) == {'scene': 'a.mat'} and scene_flags(meta | {'scenes': ['a.mat:HSI']}) == {'scene': 'a.mat:HSI'}
    assert scene_flags(meta | {'scenes': ['elsewhere.mat']}) == {'scene': 'SCENE'}  # moved, or relative to another directory


# ============ why the dissertation failed ============

def test_the_dissertations_two_faults_turn_a_good_model_into_chance(tmp_path):
    path = os.path.join(SCENES, 'indian_pines.npz')
    if not os.path.exists(path):
        pytest.skip('no real scene here')
    tiled(path, tmp_path / 't', '--tile_size=16', '--bands=ohs')
    run('segment.py', '--patch_size=2', '--pixel=false', '--label_share=0.3', f'--data={tmp_path / "t"}', f'--out_dir={tmp_path / "run"}')
    pred, raw, names = why_it_failed.predictions(str(tmp_path / 'run'))
    right = why_it_failed.score(pred, raw, len(names))
    assert right['miou'] == pytest.approx(json.load(open(tmp_path / 'run' / 'report.json'))['scores']['miou'], abs=0.02) and right['miou'] > 0.4
    for faults in (dict(shuffled=True), dict(off_by_one=True), dict(shuffled=True, off_by_one=True)):
        wrong = why_it_failed.score(pred, raw, len(names), **faults)
        assert wrong['miou'] < 0.12 and wrong['miou'] < 0.25 * right['miou']
    perfect = label_to_class(raw).clamp(max=len(names) - 1)  # even a perfect predictor
    assert why_it_failed.score(perfect, raw, len(names))['miou'] == 1
    assert why_it_failed.score(perfect, raw, len(names), shuffled=True, off_by_one=True)['miou'] < 0.1
