"""The pictures of attention: that they show attention, of the right tokens, at any size."""
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import viz_attention
from conftest import MAE_TINY, make_scene, run
from models import Attention, SpatialSpectralViT, ViT

DINO_TINY = ['--size=tiny', '--img_size=16', '--local_crops_size=8', '--patch_size=4', '--batch_size=8', '--local_crops_number=1', '--out_dim=32',
             '--whiten=3', '--probe_tiles=2', '--max_steps=1']


@pytest.mark.parametrize('tokens', [21, 600])  # spelled out, and fused
def test_attention_times_values_is_the_layers_own_output(tokens):
    layer, x = Attention(48, 3).eval(), torch.randn(2, tokens, 48)
    q, k, v = layer.heads(x)
    weights = layer.weights(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, tokens))
    torch.testing.assert_close(layer.proj((weights @ v).transpose(1, 2).flatten(2)), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('registers', [0, 4])
def test_cls_and_registers_are_sliced_off_and_maps_are_in_image_order(registers):
    encoder = ViT(16, 4, 3, 24, 2, 2, num_register_tokens=registers).eval()
    attention, spectral, features = viz_attention.capture(encoder, torch.randn(1, 3, 16, 24), -1)
    assert attention.shape == (2, 1 + registers + 24, 1 + registers + 24) and spectral is None and features.shape == (4, 6, 24)
    maps = viz_attention.patch_maps(attention, 0, encoder.num_prefix_tokens, 4, 6)
    assert maps.shape == (2, 4, 6) and maps[1, 2, 5] == attention[1, 0, 1 + registers + 2 * 6 + 5] * 24
    torch.testing.assert_close(maps.mean((1, 2)) + attention[:, 0, :1 + registers].sum(1), torch.ones(2))


def test_the_hook_sees_what_the_block_computes():
    encoder = SpatialSpectralViT(16, 4, 6, 24, 3, 2, num_register_tokens=1).eval()
    for name in ('spatial', 'spectral'):
        torch.nn.init.normal_(encoder.fuse[name][0].weight)
    x = torch.randn(1, 6, 16, 16)
    attention, spectral, _ = viz_attention.capture(encoder, x, 1)
    with torch.no_grad():
        first = next(iter(encoder.run_blocks(x)))
        for stream, blocks, got in ((first[0], encoder.blocks, attention), (first[1], encoder.spectral_blocks, spectral)):
            q, k, _ = blocks[1].attn.heads(blocks[1].norm1(stream))
            torch.testing.assert_close(got, blocks[1].attn.weights(q, k)[0])
    assert spectral.shape == (2, 1 + 1 + 3, 1 + 1 + 3)
    torch.testing.assert_close(viz_attention.capture(encoder, x, 1, [0, 7])[0], attention[:, [0, 7]])  # some rows are those rows


def test_maps_at_two_resolutions_agree():
    torch.manual_seed(0)
    encoder = ViT(32, 4, 3, 24, 2, 2, fixed_positions=True).eval()
    encoder.patch_embed.proj.weight.data = encoder.patch_embed.proj.weight.data.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4).clone()
    small = F.interpolate(torch.randn(1, 3, 8, 8), scale_factor=4.0)  # a colour a patch
    large = F.interpolate(small, scale_factor=2.0)  # the same image at twice the size: each patch four times
    maps = [viz_attention.patch_maps(viz_attention.capture(encoder, x, 0)[0], 0, 1, h, h) for x, h in ((small, 8), (large, 16))]
    torch.testing.assert_close(F.avg_pool2d(maps[1], 2), maps[0], rtol=0.05, atol=0.03)


def test_pictures_of_several_encoders_and_plain_sentences(scene_data, tmp_path):
    run('pretrain_mae.py', *MAE_TINY, '--whiten=3', '--max_steps=1', f'--data={scene_data}', f'--out_dir={tmp_path}/mae')
    run('pretrain_dino_hsi.py', *DINO_TINY, f'--data={scene_data}', f'--out_dir={tmp_path}/hsi')
    both = ['viz_attention.py', f'--encoders={tmp_path}/mae/last.pt,{tmp_path}/hsi/last.pt', f'--data={scene_data}', f'--out_dir={tmp_path}/out']
    run(*both, '--tiles=0,2', '--query=3,9', pictures=True)
    assert sorted(os.listdir(tmp_path / 'out')) == ['attention_tile0.png', 'attention_tile2.png']
    assert all((tmp_path / 'out' / name).stat().st_size > 5000 for name in os.listdir(tmp_path / 'out'))
    scene = make_scene(tmp_path / 'big.npz', height=45, width=61)
    run(*both, f'--image={scene}', '--block=0')
    assert (tmp_path / 'out' / 'attention_big.png').exists()
    np.save(tmp_path / 'few.npy', np.zeros((20, 20, 3), np.int16))
    for flags, words in (['--tiles=999'], '--tiles=999'), (['--query=99,99'], '--query=99,99'), (['--block=40'], 'blocks 0 to 5'), \
            (['--encoders=none.pt'], 'no such checkpoint'), ([f'--image={tmp_path}/few.npy'], 'has 3 bands'), (['--query=a'], 'row,column'):
        done = run(*both, *flags, check=False)
        assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr, done.stderr
