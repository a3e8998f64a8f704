"""The pictures of attention: that they show attention, of the right tokens, at any size."""
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import viz_attention
from conftest import MAE_TINY, make_scene, run, tiled
from data import Tiles
from models import (Attention, SpatialSpectralViT, ViT, load_checkpoint, load_encoder,
                    save_checkpoint)

DINO_TINY = ['--size=tiny', '--batch_size=8', '--local_crops_number=1', '--out_dim=32',
             '--whiten=3', '--probe_tiles=2', '--max_steps=1']


@pytest.mark.parametrize('tokens', [21, 600])  # spelled out, and fused
def test_attention_times_values_is_the_layers_own_output(tokens):
    layer, x = Attention(48, 3).eval(), torch.randn(2, tokens, 48)
    q, k, v = layer.heads(x)
    weights = layer.weights(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, tokens))
    output = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('registers', [0, 4])
def test_cls_and_registers_are_sliced_off_and_maps_are_in_image_order(registers):
    encoder = ViT(16, 4, 3, 24, 2, 2, num_register_tokens=registers).eval()
    x = torch.randn(1, 3, 16, 24)
    attention, spectral, features = viz_attention.capture(encoder, x, -1)
    tokens = 1 + registers + 24
    assert attention.shape == (2, tokens, tokens) and spectral is None
    assert features.shape == (4, 6, 24)
    maps = viz_attention.patch_maps(attention, 0, encoder.num_prefix_tokens, 4, 6)
    assert maps.shape == (2, 4, 6)
    assert maps[1, 2, 5] == attention[1, 0, 1 + registers + 2 * 6 + 5] * 24
    to_prefix = attention[:, 0, :1 + registers].sum(1)
    torch.testing.assert_close(maps.mean((1, 2)) + to_prefix, torch.ones(2))


def test_the_hook_sees_what_the_block_computes():
    encoder = SpatialSpectralViT(16, 4, 6, 24, 3, 2, num_register_tokens=1).eval()
    for name in ('spatial', 'spectral'):
        torch.nn.init.normal_(encoder.fuse[name][0].weight)
    x = torch.randn(1, 6, 16, 16)
    attention, spectral, _ = viz_attention.capture(encoder, x, 1)
    with torch.no_grad():
        first = next(iter(encoder.run_blocks(x)))  # both streams after block 0
        for stream, blocks, got in ((first[0], encoder.blocks, attention),
                                    (first[1], encoder.spectral_blocks, spectral)):
            q, k, _ = blocks[1].attn.heads(blocks[1].norm1(stream))
            torch.testing.assert_close(got, blocks[1].attn.weights(q, k)[0])
    assert spectral.shape == (2, 1 + 1 + 3, 1 + 1 + 3)
    two_rows = viz_attention.capture(encoder, x, 1, [0, 7])[0]
    torch.testing.assert_close(two_rows, attention[:, [0, 7]])


def test_maps_at_two_resolutions_agree():
    torch.manual_seed(0)
    encoder = ViT(32, 4, 3, 24, 2, 2, fixed_positions=True).eval()
    kernel = encoder.patch_embed.proj.weight.data
    kernel.copy_(kernel.mean((2, 3), keepdim=True).expand_as(kernel))
    small = F.interpolate(torch.randn(1, 3, 8, 8), scale_factor=4.0)  # a colour a patch
    large = F.interpolate(small, scale_factor=2.0)  # twice the size: each patch four times
    maps = []
    for x, h in ((small, 8), (large, 16)):
        attention = viz_attention.capture(encoder, x, 0)[0]
        maps.append(viz_attention.patch_maps(attention, 0, 1, h, h))
    torch.testing.assert_close(F.avg_pool2d(maps[1], 2), maps[0], rtol=0.05, atol=0.03)


@pytest.fixture(scope='module')
def encoders(scene_data, tmp_path_factory):
    """last.pt of a MAE and of a spatial-spectral DINO run"""
    folder = tmp_path_factory.mktemp('encoders')
    shutil.copytree(scene_data, folder / 'tiles')
    run('pretrain_mae.py', *MAE_TINY, '--whiten=3', '--max_steps=1', f'--data={folder}/tiles',
        f'--out_dir={folder}/mae')
    run('pretrain_dino_hsi.py', *DINO_TINY, f'--data={folder}/tiles', f'--out_dir={folder}/hsi')
    return f'{folder}/mae/last.pt,{folder}/hsi/last.pt'


def test_pictures_of_several_encoders(encoders, tmp_path):
    both = ['viz_attention.py', f'--encoders={encoders}', f'--out_dir={tmp_path}']
    run(*both, '--tiles=0,2', '--query=3,9', pictures=True)  # of the data they were trained on
    assert sorted(os.listdir(tmp_path)) == ['attention_tile0.png', 'attention_tile2.png']
    assert all((tmp_path / name).stat().st_size > 5000 for name in os.listdir(tmp_path))
    scene = make_scene(tmp_path / 'big.npz', height=45, width=61)
    done = run(*both, f'--image={scene}', '--block=0', '--heads=2', '--window=32')
    assert done.stdout.startswith(f'{scene}:\n  7 bands of 45 x 61 px')  # what was read is said
    assert done.stdout.endswith(f'{tmp_path}/attention_big.png\n') and 'WARNING' not in done.stdout
    assert (tmp_path / 'attention_big.png').exists()


def test_an_image_needs_no_tiles(encoders, tmp_path):
    mae, _ = encoders.split(',')
    shutil.copy(mae, tmp_path / 'last.pt')
    scene = make_scene(tmp_path / 's.npz', height=20, width=20, wavelengths_nm=None)
    flags = [f'--encoders={tmp_path}/last.pt', f'--out_dir={tmp_path}']
    run('viz_attention.py', *flags, f'--image={scene}', cwd=tmp_path)
    assert (tmp_path / 'attention_s.png').exists()


def test_mistakes_are_told_in_a_sentence(encoders, scene_data, tmp_path):
    np.save(tmp_path / 'few.npy', np.zeros((20, 20, 3), np.int16))
    other = make_scene(tmp_path / 'other.npz', wavelengths_nm=np.linspace(1000, 2000, 7))
    for flags, words in (
            (['--tiles=999'], '--tiles=999'), (['--tiles=-1'], '--tiles=-1'),
            (['--query=99,99'], '--query=99,99'), (['--query=a'], '--query=a'),
            (['--query=3'], 'row,column'), (['--block=40'], 'blocks 0 to 5'),
            (['--window=3'], 'hold no patch of 4'), (['--encoders=none.pt'], 'no such checkpoint'),
            (['--data=nowhere'], 'no tiles here'),
            ([f'--image={tmp_path}/few.npy'], 'trained on 7 bands, and those of the data (3)'),
            ([f'--image={other}'], 'are others: tile the scenes again')):
        done = run('viz_attention.py', f'--encoders={encoders}', f'--data={scene_data}',
                   f'--out_dir={tmp_path}/out', *flags, check=False)
        assert done.returncode == 1 and words in done.stderr, (flags, done.stderr)
        assert 'Traceback' not in done.stderr


def test_what_an_encoder_knows_of_its_data_decides_what_it_can_look_at(encoders, tmp_path):
    mae, _ = encoders.split(',')
    content = load_checkpoint(mae)
    del content['config']['data']  # as of a training loop of one's own
    content['meta']['scale'] = [0.001, 0]
    save_checkpoint(tmp_path / 'in_thousandths.pt', content)
    content['meta']['settings']['normalize'] = 'scene'
    save_checkpoint(tmp_path / 'other.pt', content)
    directory = load_encoder(mae).config['data']
    scene = make_scene(tmp_path / 's.npz', height=20, width=20)
    scaled = make_scene(tmp_path / 'scaled.npz', height=20, width=20, scale=0.0001)
    base = ['viz_attention.py', f'--out_dir={tmp_path}/out', '--heads=0']
    for first, flags, words in (
            ('', [], 'does not say which tiles it learned from: pass --data'),
            (f'{tmp_path}/in_thousandths.pt,', [f'--image={scaled}'], 'the values have another scale than those that'),
            (f'{mae},', [f'--image={scene}'], 'other.pt was trained on standardised scenes'),
            ('', [f'--data={directory}'], 'was trained on tiles of --normalize=scene')):
        done = run(*base, f'--encoders={first}{tmp_path}/other.pt', *flags, check=False)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr


def test_an_image_in_other_units_is_said_and_read_as_the_training_data_were(encoders, tmp_path):
    mae, _ = encoders.split(',')
    content = load_checkpoint(mae)
    content['meta']['settings']['drop_bands'] = '8'
    save_checkpoint(tmp_path / 'last.pt', content)
    cube = np.random.default_rng(0).uniform(0, 0.3, (20, 20, 8)).astype(np.float32)
    scene = make_scene(tmp_path / 's.npz', 20, 20, bands=8, cube=cube, wavelengths_nm=None)
    done = run('viz_attention.py', f'--encoders={tmp_path}/last.pt', f'--image={scene}', f'--out_dir={tmp_path}')
    assert 'band 8 left out' in done.stdout and 'are they in the same units?' in done.stdout


def test_a_zero_in_one_band_of_an_8_bit_image_is_no_missing_pixel(tmp_path):
    cube = np.random.default_rng(0).integers(1, 200, (40, 48, 7)).astype(np.uint8)
    cube[np.arange(40) % 2 == 0, :, 2] = 0  # in each patch
    cube[np.arange(40) % 2 == 1, :, 5] = 0
    cube[:, 40:] = 0  # missing
    scene = make_scene(tmp_path / 's.npz', cube=cube, nodata=0)
    tiled(scene, tmp_path / 'tiles', '--tile_size=16', '--split_block=8')
    run('pretrain_mae.py', *MAE_TINY, '--whiten=3', '--max_steps=1', f'--data={tmp_path}/tiles', f'--out_dir={tmp_path}/mae')
    encoder = load_encoder(str(tmp_path / 'mae' / 'last.pt'))
    raw, _ = Tiles(str(tmp_path / 'tiles'), 'tr').batch([0, 2])
    assert raw.dtype == torch.uint8 and encoder.meta['nodata'] == 0
    prepared = encoder.prepare(raw)
    assert (prepared.abs().sum(1) > 0).float().mean() > 0.6
    assert torch.equal(encoder.prepare(raw.numpy()), prepared)
    assert (data.false_color(raw[0], encoder.meta).sum(2) > 0).mean() > 0.9
    done = run('viz_attention.py', f'--encoders={tmp_path}/mae/last.pt', f'--out_dir={tmp_path}/a', '--tiles=0')
    assert 'WARNING' not in done.stdout  # else all of it would be missing


def test_missing_pixels_are_nan_and_the_middle_is_cut_out(encoders, monkeypatch, tmp_path):
    cube = np.random.default_rng(0).integers(100, 3000, (30, 50, 7)).astype(np.uint16)
    cube[:4, :9] = 5
    scene = make_scene(tmp_path / 's.npz', 30, 50, cube=cube, nodata=5)
    monkeypatch.setattr(viz_attention, 'image', scene)
    images, meta = viz_attention.read_images(load_encoder(encoders.split(',')[0]), 'last.pt', 1)
    raw = images['s']
    assert raw.shape == (7, 30, 50) and meta['nodata'] == 5
    assert np.isnan(raw[:, :4, :9]).all() and np.isnan(raw).sum() == 7 * 4 * 9
    np.testing.assert_array_equal(raw[:, 4:], np.moveaxis(cube, 2, 0)[:, 4:])
    middle = viz_attention.cut_middle('s', raw, None, 4)
    np.testing.assert_array_equal(middle, raw[:, 1:29, 1:49])
    monkeypatch.setattr(viz_attention, 'window', 16)
    np.testing.assert_array_equal(viz_attention.cut_middle('s', raw, None, 4), raw[:, 7:23, 17:33])
