"""The networks: parameter counts, names, shapes and outputs against the public implementations. Checkpoints that are enough to use them."""
import copy
import json
import math
import os
import pickle
import zlib

import numpy as np
import pytest
import torch

import models
from conftest import MAE_TINY, run
from data import Tiles, UserError, kept_meta, standardization, standardize
from models import (Attention, DeepLabV3Plus, MaskedAutoencoder, SpatialSpectralViT, ViT, build_segmenter, check_bands, dense_features, drop_path,
                    load_checkpoint, load_encoder, load_segmenter, patchify, resume_from, save_checkpoint, start_from, unpatchify)

REFERENCE = os.path.join(os.path.dirname(__file__), '..', '..', 'shared', 'reference')
needs_reference = pytest.mark.skipif(not os.path.isdir(REFERENCE), reason='recorded reference outputs are not here')
SMALL = dict(embed_dim=48, num_heads=3)


def fill(name, shape, scale=0.05):
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return torch.from_numpy(rng.uniform(-scale, scale, size=shape).astype(np.float32))


def fill_parameters(model, keep=()):
    for name, parameter in model.named_parameters():
        name = name.removeprefix('encoder.')
        if name in keep:
            continue
        value = fill(name, tuple(parameter.shape))
        if name.endswith(('norm1.weight', 'norm2.weight', 'norm.weight')):
            value += 1
        if name.endswith('gamma'):
            value += 0.5
        parameter.data.copy_(value)
    return model.eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


def recorded(name):
    return np.load(os.path.join(REFERENCE, name))


def test_mae_has_the_dissertations_parameter_count():
    assert count(MaskedAutoencoder()) == 113_378_560


@needs_reference
@pytest.mark.parametrize('file, model', [
    ('mae_vit_base_64x8_32ch', MaskedAutoencoder),
    ('dinov2_vit_base_64x8_32ch_reg4_mlp', lambda: ViT(num_register_tokens=4, init_values=1.0, mask_token=True)),
    ('dinov2_vit_base_64x8_32ch_reg4_swiglufused', lambda: ViT(num_register_tokens=4, init_values=1.0, mask_token=True, ffn='swiglu')),
])
def test_names_and_shapes_are_the_public_ones(file, model):
    with torch.device('meta'):
        ours = {name.removeprefix('encoder.'): list(p.shape) for name, p in model().named_parameters()}
    assert ours == json.load(open(os.path.join(REFERENCE, file + '.keys.json')))


@needs_reference
@pytest.mark.parametrize('normpix', [0, 1])
def test_mae_agrees_with_the_public_implementation(normpix):
    mae = MaskedAutoencoder(depth=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=bool(normpix), **SMALL)
    fill_parameters(mae, keep=('pos_embed', 'decoder_pos_embed'))
    x, noise = fill('input', (2, 32, 64, 64), 1.0), fill('noise', (2, 64), 1.0)
    expected = recorded(f'mae_small_normpix{normpix}.npz')
    with torch.no_grad():
        loss, pred, mask = mae(x, 0.75, noise)
        ids_keep, ids_restore, _ = mae.random_masking(noise, 0.75)
        latent = mae.forward_encoder(patchify(x, 8), ids_keep)
    assert abs(loss.item() - expected['loss']) < 1e-4
    np.testing.assert_allclose(pred[..., ::16], expected['pred_every_16th'], atol=1e-4)
    np.testing.assert_array_equal(mask, expected['mask'])
    np.testing.assert_array_equal(ids_restore, expected['ids_restore'])
    np.testing.assert_allclose(latent, expected['latent'], atol=1e-4)


@needs_reference
@pytest.mark.parametrize('file, ffn', [('mlp', 'mlp'), ('swiglufused', 'swiglu')])
def test_vit_agrees_with_the_public_dinov2(file, ffn):
    vit = fill_parameters(ViT(depth=4, num_register_tokens=4, init_values=1.0, ffn=ffn, mask_token=True, **SMALL))
    x = fill('input', (2, 32, 64, 64), 1.0)
    expected = recorded(f'dinov2_small_{file}.npz')
    with torch.no_grad():
        tokens = vit(x, torch.from_numpy(expected['masks']).reshape(2, 64))
        maps = vit.get_intermediate_layers(x, 4)
        corner = vit(x[:, :, :32, :32])
    np.testing.assert_allclose(tokens[:, 0], expected['cls'], atol=1e-4)
    np.testing.assert_allclose(tokens[:, 1:5], expected['reg'], atol=1e-4)
    np.testing.assert_allclose(tokens[:, 5:], expected['patch'], atol=1e-4)
    np.testing.assert_allclose(maps[0], expected['inter_first'], atol=1e-4)
    np.testing.assert_allclose(maps[3], expected['inter_last'], atol=1e-4)
    np.testing.assert_allclose(corner[:, 0], expected['cls32'], atol=1e-2)


def test_unpatchify_undoes_patchify_and_attention_on_a_cpu_is_the_fused_one():
    x = torch.randn(2, 5, 8, 12)
    assert torch.equal(unpatchify(patchify(x, 4), 4, 2, 3), x)
    attention = Attention(24, 3)
    x = torch.randn(2, 700, 24)  # beyond 512 tokens the fused form is taken: compare the first tokens' outputs for the same keys
    q, k, v = attention.qkv(x[:, :500]).reshape(2, 500, 3, 3, 8).permute(2, 0, 3, 1, 4)
    fused = attention.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 500, 24))
    torch.testing.assert_close(attention(x[:, :500]), fused, atol=1e-5, rtol=1e-4)
    assert attention(x).shape == x.shape


def test_windows_are_blended_and_count_less_at_their_edges():
    class Columns:  # its feature is the column inside the window
        patch_size, img_size = 1, 4

        def get_intermediate_layers(self, x, n):
            return [torch.arange(x.shape[-1]).expand(len(x), 1, *x.shape[-2:]).float()]

    maps = dense_features(Columns(), torch.zeros(1, 3, 4, 6), n=1)[0, 0]
    edge, inner = math.sin(math.pi / 8) ** 2, math.sin(3 * math.pi / 8) ** 2  # of the raised cosine over four columns
    expected = [0, 1, (2 * inner + 0 * edge) / (inner + edge), (3 * edge + 1 * inner) / (inner + edge), 2, 3]
    torch.testing.assert_close(maps, torch.tensor(expected).expand(4, 6))
    maps = dense_features(Columns(), torch.zeros(1, 3, 4, 8), n=1)[0, 0]  # three windows, half a window apart
    torch.testing.assert_close(maps, torch.tensor(expected[:4] + expected[2:]).expand(4, 8))


@pytest.mark.parametrize('H, W', [(60, 64), (64, 60), (145, 145)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(H, W):
    vit = ViT(64, 8, 3, 24, 1, 2)
    with pytest.raises(UserError, match=f'{H} x {W} pixels does not divide into patches of 8'):
        dense_features(vit, torch.zeros(1, 3, H, W), n=1)


@pytest.mark.parametrize('B, rate', [(1, 0.1), (2, 0.1), (4, 0.1), (5, 0.1), (7, 0.1), (11, 0.05), (1, 0.6), (16, 0.1), (8, 0.25), (4, 0.95)])
def test_drop_path_drops_in_small_batches_too_and_keeps_the_mean(B, rate):
    torch.manual_seed(0)
    x = torch.zeros(B, 1, 1)
    change = torch.stack([drop_path(x, torch.ones_like, rate) for _ in range(1000)])
    assert abs((change == 0).float().mean() - rate) < 0.03
    assert abs(change.mean() - 1) < (0.1 if rate < 0.9 else 0.3)
    if (B, rate) in [(16, 0.1), (8, 0.25)]:  # so many in every batch
        assert ((change == 0).sum((1, 2, 3)) == round(B * rate)).all()


# ---- a checkpoint is enough

def content(model, encoder_args, meta, **more):
    return {'model': model.state_dict(), 'encoder_args': encoder_args, 'meta': kept_meta(meta), 'config': {'whiten': 3}, **more}


def raw_tiles(tiles, count=3):
    return torch.from_numpy(tiles.images[:count].copy())


def test_features_by_a_checkpoint_alone_are_those_of_the_run(scene_data, tmp_path):
    run('pretrain_mae.py', *MAE_TINY, '--whiten=3', '--max_steps=1', f'--data={scene_data}', f'--out_dir={tmp_path}/run')
    encoder, tiles = load_encoder(f'{tmp_path}/run/last.pt'), Tiles(scene_data, 'ts')
    raw = raw_tiles(tiles)
    prepared = standardize(raw, *standardization(tiles.meta, 3), tiles.meta['nodata'])
    with torch.no_grad():
        expected = dense_features(encoder, prepared)
        for given in (raw, raw.float(), raw.numpy(), raw.numpy().astype('>f8'), raw.int(), raw.double(), raw.numpy().astype('i8'), raw.numpy().tolist()):
            assert torch.equal(encoder.prepare(given), prepared) and encoder.prepare(given).dtype == torch.float32
            assert torch.equal(dense_features(encoder, encoder.prepare(given)), expected)
        for one in (raw[1], raw[1].numpy()):  # an image by itself is a batch of one
            assert torch.equal(encoder.prepare(one), encoder.prepare(raw[1:2]))
        missing = np.zeros(raw.shape, bool)
        missing[0, 2, 3, 4] = True  # one band of a pixel: all of it is missing, and so 0
        masked = encoder.prepare(np.ma.masked_array(raw.numpy(), missing))
        assert (masked[0, :, 3, 4] == 0).all() and torch.equal(masked[1:], prepared[1:])
    assert (encoder.script, encoder.whiten, encoder.meta) == ('pretrain_mae.py', 3, kept_meta(tiles.meta))
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # as for a worker of a DataLoader
        again.meta['nodata'] = 0 if again.meta['nodata'] is None else None
        assert torch.equal(encoder.prepare(raw), prepared) and again.prepare.__self__ is again
    for wrong in (raw[:, :6], raw[0, 0], raw.numpy()[:, :, :, 0], raw.movedim(1, 3), raw[0].movedim(0, 2), raw[None], 5.0):
        with pytest.raises(UserError, match=r'trained on 7 bands: pass \(B, 7, H, W\) or \(7, H, W\)'):
            encoder.prepare(wrong)


@pytest.mark.parametrize('build', [ViT, SpatialSpectralViT])
def test_a_fine_tuned_best_pt_is_an_encoder_and_a_network(build, scene_data, tmp_path):
    tiles = Tiles(scene_data, 'ts')
    args = dict(img_size=16, patch_size=4, in_chans=7, embed_dim=48, depth=4, num_heads=3)
    args |= {'fusion': 'channel', 'wavelengths_nm': tiles.meta['wavelengths_nm']} if build is SpatialSpectralViT else {}
    model = build_segmenter(build(**args), 3, 'conv', freeze=False, pixel=True)
    config = {'whiten': 3, 'decoder': 'conv', 'freeze': False, 'pixel': True}
    save_checkpoint(f'{tmp_path}/best.pt', {**content(model, args, tiles.meta, script='segment.py', window=16), 'config': config})
    encoder, network = load_encoder(f'{tmp_path}/best.pt'), load_segmenter(f'{tmp_path}/best.pt')
    x, expected = encoder.prepare(raw_tiles(tiles)), model.eval()
    assert network.window == 16 and encoder.whiten == network.whiten == 3 and torch.equal(x, network.prepare(raw_tiles(tiles)))
    with torch.no_grad():
        assert torch.equal(dense_features(encoder, x), model.features(x))
        assert torch.equal(network(x), expected(x)) and network(x).shape == (3, 3, 16, 16)


def test_the_cnn_comes_back_and_what_is_no_segmentation_is_refused(scene_data, tmp_path):
    tiles, args = Tiles(scene_data, 'ts'), dict(in_chans=7, num_classes=3, output_stride=8, width=8)
    model = DeepLabV3Plus(**args).eval()
    save_checkpoint(f'{tmp_path}/best.pt', content(model, args, tiles.meta, script='baseline_deeplab.py', window=16))
    network = load_segmenter(f'{tmp_path}/best.pt')
    x = network.prepare(raw_tiles(tiles))
    with torch.no_grad():
        assert torch.equal(network(x), model(x))
    with pytest.raises(UserError, match='baseline_deeplab.py and holds no encoder'):
        load_encoder(f'{tmp_path}/best.pt')
    vit_args = dict(img_size=16, patch_size=4, in_chans=7, embed_dim=48, depth=1, num_heads=3)
    mae = MaskedAutoencoder(**vit_args, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    with pytest.raises(UserError, match='has 4 patches, this autoencoder was built for 16: crop to img_size 16'):
        mae(torch.zeros(1, 7, 8, 8))
    save_checkpoint(f'{tmp_path}/last.pt', content(mae, {**vit_args, 'fixed_positions': True}, tiles.meta, script='pretrain_mae.py'))
    with pytest.raises(UserError, match='holds no segmentation'):
        load_segmenter(f'{tmp_path}/last.pt')
    for damage, words in (({'encoder_args': {**vit_args, 'depth': 2}}, 'cannot be built again'), ({'encoder_args': {'side': 3}}, 'cannot be built again'),
                          ({'config': {}}, 'cannot be built again')):
        save_checkpoint(f'{tmp_path}/other.pt', {**load_checkpoint(f'{tmp_path}/last.pt'), **damage})
        with pytest.raises(UserError, match=words):
            load_encoder(f'{tmp_path}/other.pt')


def test_data_of_other_bands_is_refused_with_the_command_that_makes_the_right_one():
    encoder = ViT(16, 4, 3, 24, 1, 2)
    encoder.meta = {'num_bands': 3, 'wavelengths_nm': [500.0, 600.5, 700]}
    for nm in ([500, 600, 700.9], None):
        check_bands(encoder.meta, {'num_bands': 3, 'wavelengths_nm': nm}, 'last.pt')
    for nm in ([500, 600, 702], [500, 600, 650, 700]):
        with pytest.raises(UserError, match='last.pt: .* 3 bands.* data.py tile --bands=500,600.5,700'):
            check_bands(encoder.meta, {'num_bands': len(nm), 'wavelengths_nm': nm}, 'last.pt')
    with pytest.raises(UserError, match='3 bands'):
        check_bands(encoder.meta, {'num_bands': 4, 'wavelengths_nm': None}, 'last.pt')
    components = {'num_bands': 3, 'wavelengths_nm': None, 'components': [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]}
    with pytest.raises(UserError, match='principal components of other data'):
        check_bands(encoder.meta, components, 'last.pt')
    encoder.meta = components
    check_bands(encoder.meta, components, 'last.pt')


def test_resume_compares_constants_with_those_in_the_checkpoint(scene_data, tmp_path, monkeypatch, capsys):
    path = f'{tmp_path}/last.pt'
    meta = Tiles(scene_data, 'tr').meta
    open(path + '.tmp', 'w').close()  # of a save that was cut off
    assert resume_from(path, 'pretrain_dino.py', {'lr': 1}, meta) is None and os.listdir(tmp_path) == []
    saved = {**content(ViT(16, 4, 7, 24, 1, 2), {}, meta, script='pretrain_dino.py'), 'config': {'lr': 1, 'out_dir': 'a', 'data': 'd'}, 'step': 5}
    save_checkpoint(path, saved)
    assert resume_from(path, '/home/pretrain_dino.py', {'lr': 1, 'out_dir': 'b', 'data': 'elsewhere'}, meta)['step'] == 5
    assert capsys.readouterr().out == ''
    with monkeypatch.context() as patch:  # a fork goes on with an old run, and is told
        patch.setattr(models, 'code_of', lambda script: 1)
        assert resume_from(path, 'pretrain_dino.py', {'lr': 1}, meta)['step'] == 5
    assert 'the code has changed since it was written' in capsys.readouterr().out
    # a script that is edited while it runs saves the code that it began with
    before = models.code_of('pretrain_dino.py')
    resume_from(path, 'pretrain_dino.py', {'lr': 1}, meta)
    with monkeypatch.context() as patch:
        patch.setattr(models, 'code_of', lambda script: 1)
        save_checkpoint(path, saved)
    assert load_checkpoint(path)['code'] == before != 1
    assert len({models.code_of(name) for name in ('pretrain_dino.py', 'pretrain_mae.py', 'none.py')}) == 3
    with pytest.raises(UserError, match=r'other constants: lr \(1 there, 2 now\), new \(None there, 3 now\): pass another'):
        resume_from(path, 'pretrain_dino.py', {'lr': 2, 'out_dir': 'a', 'new': 3}, meta)
    with pytest.raises(UserError, match='was written by pretrain_dino.py: pass another'):
        resume_from(path, 'pretrain_mae.py', {'lr': 1}, meta)
    with pytest.raises(UserError, match='other data: mean and nodata in meta.json of d are not the same: pass another'):
        resume_from(path, 'pretrain_dino.py', {'lr': 1, 'data': 'd'}, {**meta, 'mean': [0.0] * 7, 'nodata': 5})


def test_a_run_of_ours_starts_another_of_the_same_network_at_another_size(scene_data, tmp_path):
    path, meta = f'{tmp_path}/last.pt', Tiles(scene_data, 'tr').meta

    def mae(side, bands=7):
        return MaskedAutoencoder(side, 4, bands, 48, 1, 3, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    first, larger = mae(16), mae(32)
    save_checkpoint(path, content(first, {}, meta, script='pretrain_mae.py'))
    assert f'{len(first.state_dict())} tensors taken; what starts fresh: nothing' in start_from(path, larger, 'pretrain_mae.py', 3)
    changed = {name for name, value in larger.state_dict().items() if not torch.equal(value, first.state_dict()[name])}
    assert changed == {'encoder.pos_embed', 'decoder_pos_embed'}
    with pytest.raises(UserError, match='3 tensors differ .decoder_pred.bias, decoder_pred.weight, encoder.patch_embed'):
        start_from(path, mae(16, bands=5), 'pretrain_mae.py', 3)
    for other in ({**meta, 'num_bands': 8}, {**meta, 'components': [[1.0] * 7]}):  # as many weights, of other bands
        with pytest.raises(UserError, match='the network was trained on'):
            start_from(path, mae(16), 'pretrain_mae.py', 3, other)
    start_from(path, mae(16), 'pretrain_mae.py', 3, meta)

    def hsi(groups):
        return SpatialSpectralViT(16, 4, 2 * groups, 48, 1, 3, fusion='token')
    save_checkpoint(path, content(hsi(15), {}, meta, script='pretrain_dino_hsi.py'))
    start_from(path, hsi(15), 'pretrain_dino_hsi.py', 3)
    with pytest.raises(UserError, match='does not fit this network'):
        start_from(path, hsi(20), 'pretrain_dino_hsi.py', 3)


class OwnEncoder(torch.nn.Module):
    """A network of convolutions, as a fork may bring it"""

    def __init__(self, in_chans, width=8):
        super().__init__()
        self.patch_size, self.img_size, self.in_chans, self.embed_dim, self.num_prefix_tokens = 4, 16, in_chans, width, 0
        self.embed = torch.nn.Conv2d(in_chans, width, 4, stride=4)
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.prepare = models.prepare.__get__(self)

    def get_intermediate_layers(self, x, n=4):
        maps = [self.embed(x)]
        for block in self.blocks:
            maps.append(maps[-1] + torch.nn.functional.gelu(block(maps[-1])))
        return maps[-n:]


def test_an_encoder_of_ones_own_is_loaded_judged_and_started_from(scene_data, tmp_path, monkeypatch):
    meta = Tiles(scene_data, 'tr').meta
    path, own = f'{tmp_path}/last.pt', OwnEncoder(7)
    saved = content(torch.nn.ModuleDict({'encoder': own}), {'in_chans': 7, 'width': 8}, meta, script='fork.py')
    save_checkpoint(path, saved | {'config': {'whiten': 3, 'data': scene_data}})
    with pytest.raises(UserError, match='make models.build_encoder build it'):
        models.load_encoder(path)
    monkeypatch.setattr(models, 'build_encoder', lambda args: OwnEncoder(**args))
    x = torch.randn(2, 7, 16, 16)
    torch.testing.assert_close(dense_features(models.load_encoder(path), x), dense_features(own.eval(), x))
    assert models.encoder_shape(path) == {}  # nothing of a ViT's
    for decoder in ('linear', 'conv'):
        assert build_segmenter(own, 3, decoder, True, True)(x).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match='these have no attention'):
        build_segmenter(own, 3, 'transformer', True, True)
