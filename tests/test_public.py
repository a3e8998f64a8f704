"""tools/convert_weights.py: synthetic files with the public names and shapes, what the adapted encoders answer, and the way back."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import MAE_TINY, ROOT, run
from data import UserError, Tiles, standardize
from models import (SIZES, DeepLabV3Plus, MaskedAutoencoder, SpatialSpectralViT, ViT, encoder_shape, load_checkpoint, load_encoder, save_checkpoint,
                    start_from)
from scenes import OHS_NM

sys.path.append(os.path.join(ROOT, 'tools'))
from convert_weights import RGB_NM, at_wavelengths, check_out, convert, export, resize_kernel, spread_bands

REFERENCE = os.path.join(os.path.dirname(ROOT), 'shared', 'reference')
BLOCK = {'norm1.weight': ('D',), 'norm1.bias': ('D',), 'attn.qkv.weight': ('3D', 'D'), 'attn.qkv.bias': ('3D',), 'attn.proj.weight': ('D', 'D'),
         'attn.proj.bias': ('D',), 'norm2.weight': ('D',), 'norm2.bias': ('D',)}
MLP = {'mlp.fc1.weight': ('4D', 'D'), 'mlp.fc1.bias': ('4D',), 'mlp.fc2.weight': ('D', '4D'), 'mlp.fc2.bias': ('D',)}
SWIGLU = {'mlp.w12.weight': ('2H', 'D'), 'mlp.w12.bias': ('2H',), 'mlp.w3.weight': ('D', 'H'), 'mlp.w3.bias': ('D',)}


def names(D, depth, patch, side, dinov2=False, registers=0, ffn=MLP, decoder=None, bands=3):
    """name -> shape as in the public files: mae_pretrain_vit_*.pth (side 14 of 16 px), dinov2_vit*14_*.pth (side 37 of 14 px)"""
    scale = {'D': D, '3D': 3 * D, '4D': 4 * D, 'H': (int(4 * D * 2 / 3) + 7) // 8 * 8, '2H': 2 * ((int(4 * D * 2 / 3) + 7) // 8 * 8)}
    found = {'cls_token': (1, 1, D), 'pos_embed': (1, 1 + side * side, D), 'patch_embed.proj.weight': (D, bands, patch, patch),
             'patch_embed.proj.bias': (D,), 'norm.weight': (D,), 'norm.bias': (D,)}
    for i in range(depth):
        scales = {'ls1.gamma': ('D',), 'ls2.gamma': ('D',)} if dinov2 else {}
        found.update({f'blocks.{i}.{name}': tuple(scale[s] for s in shape) for name, shape in {**BLOCK, **ffn, **scales}.items()})
    if dinov2:
        found['mask_token'] = (1, D)
    if registers:
        found['register_tokens'] = (1, registers, D)
    if decoder:
        d, layers = decoder
        found.update({'mask_token': (1, 1, d), 'decoder_pos_embed': (1, 1 + side * side, d), 'decoder_embed.weight': (d, D), 'decoder_embed.bias': (d,),
                      'decoder_norm.weight': (d,), 'decoder_norm.bias': (d,), 'decoder_pred.weight': (patch * patch * bands, d),
                      'decoder_pred.bias': (patch * patch * bands,)})
        wide = {'D': d, '3D': 3 * d, '4D': 4 * d}
        found.update({f'decoder_blocks.{i}.{name}': tuple(wide[s] for s in shape) for i in range(layers) for name, shape in {**BLOCK, **MLP}.items()})
    return found


def synthetic(path, wrapped=True, **kwargs):
    """A file with those names, small random values -> its state"""
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.05 * torch.randn(shape, generator=generator) + (name.endswith(('norm.weight', 'norm1.weight', 'norm2.weight')))
             for name, shape in names(**kwargs).items()}
    torch.save({'model': state} if wrapped else state, path)
    return state


def meta_of(bands, wavelengths_nm=None):
    """meta.json of a data set, as far as an encoder knows it"""
    rng = np.random.default_rng(0)
    covariance = np.cov(rng.normal(size=(bands, 3 * bands)))
    return {'num_bands': bands, 'wavelengths_nm': wavelengths_nm, 'nodata': None, 'mean': rng.normal(size=bands).tolist(),
            'std': np.sqrt(np.atleast_2d(covariance).diagonal()).tolist(), 'covariance': np.atleast_2d(covariance).tolist(), 'num_classes': 2,
            'class_names': ['a', 'b'], 'tile_size': 64, 'dtype': 'float32'}


def converted(path, bands, wavelengths_nm=None, **flags):
    """A public file brought to those bands -> path of the last.pt beside it"""
    out = f'{path}.last.pt'
    save_checkpoint(out, convert(str(path), meta_of(bands, wavelengths_nm), **flags))
    return out


TINY_MAE = dict(D=64, depth=2, patch=16, side=14)
TINY_DINO = dict(D=64, depth=2, patch=14, side=37, dinov2=True, wrapped=False)


@pytest.mark.parametrize('file, kwargs', [('mae_vit_base_64x8_32ch', dict(D=768, depth=12, patch=8, side=8, decoder=(512, 8), bands=32)),
                                          ('dinov2_vit_base_64x8_32ch_reg4_mlp', dict(D=768, depth=12, patch=8, side=8, dinov2=True, registers=4, bands=32)),
                                          ('dinov2_vit_base_64x8_32ch_reg4_swiglufused',
                                           dict(D=768, depth=12, patch=8, side=8, dinov2=True, registers=4, bands=32, ffn=SWIGLU))])
def test_the_synthetic_files_have_the_recorded_names_and_shapes(file, kwargs):
    path = os.path.join(REFERENCE, f'{file}.keys.json')
    if not os.path.exists(path):
        pytest.skip('the recorded names are not at hand')
    assert {name: list(shape) for name, shape in names(**kwargs).items()} == json.load(open(path))


KINDS = [(TINY_MAE, 0, 'mlp'), ({**TINY_MAE, 'decoder': (32, 1)}, 0, 'mlp'), (TINY_DINO, 0, 'mlp'), ({**TINY_DINO, 'registers': 4}, 4, 'mlp'),
         ({**TINY_DINO, 'ffn': SWIGLU}, 0, 'swiglu')]
WIDE, DEEP = dict(D=768, depth=2, patch=16, side=14), {**TINY_MAE, 'depth': 12}  # of a ViT-B's width, of its depth
BASE = {**WIDE, 'depth': 12}  # mae_pretrain_vit_base.pth
LARGE = [(BASE, 0, 'mlp', 32), (BASE, 0, 'mlp', 200), (dict(D=1024, depth=24, patch=16, side=14), 0, 'mlp', 32),  # dinov2_vitb14_reg4_pretrain.pth:
         (dict(D=768, depth=12, patch=14, side=37, dinov2=True, wrapped=False, registers=4), 4, 'mlp', 200)]


@pytest.mark.parametrize('kwargs, registers, ffn, bands', [(*kind, bands) for kind in KINDS for bands in (32, 200)] + [(WIDE, 0, 'mlp', 32), (DEEP, 0, 'mlp', 32)]
                         + [pytest.param(*kind, marks=pytest.mark.slow) for kind in LARGE])
def test_a_public_file_loads_into_64_px_patches_of_8_and_any_bands(kwargs, registers, ffn, bands, tmp_path):
    state = synthetic(tmp_path / 'public.pth', **kwargs)
    encoder = load_encoder(converted(tmp_path / 'public.pth', bands, np.linspace(450, 2400, bands).tolist(), whiten=3))
    assert (encoder.embed_dim, len(encoder.blocks), encoder.num_prefix_tokens) == (kwargs['D'], kwargs['depth'], 1 + registers)
    assert encoder.blocks[0].attn.num_heads == kwargs['D'] // 64 and encoder.whiten == 3 and not encoder.training
    assert type(encoder.blocks[0].mlp).__name__ == {'mlp': 'Mlp', 'swiglu': 'SwiGLU'}[ffn]
    got = encoder.state_dict()
    for name, value in got.items():
        if name == 'pos_embed':
            assert value.shape == (1, 65, kwargs['D']) and torch.equal(value[:, 0], state[name][:, 0])
        elif name == 'patch_embed.proj.weight':
            assert value.shape == (kwargs['D'], bands, 8, 8)
        else:
            assert torch.equal(value, state[name]), name
    assert set(state) - set(got) == {name for name in state if name.startswith('decoder_') or (name == 'mask_token' and 'decoder' in kwargs)}
    with torch.no_grad():
        maps = encoder.get_intermediate_layers(torch.randn(1, bands, 64, 64), 2)
    assert maps[-1].shape == (1, kwargs['D'], 8, 8) and maps[-1].isfinite().all()
    again = ViT(**encoder.args)  # what segment.py rebuilds a run from
    again.load_state_dict(got, strict=True)


def test_where_window_patch_and_bands_are_the_same_the_file_is_taken_as_it_is(tmp_path):
    state = synthetic(tmp_path / 'public.pth', **{**TINY_MAE, 'side': 4})
    encoder = load_encoder(converted(tmp_path / 'public.pth', 3, patch_size=16))
    assert (encoder.img_size, encoder.patch_size, encoder.in_chans) == (64, 16, 3)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items() if name != 'patch_embed.proj.weight')
    torch.testing.assert_close(encoder.patch_embed.proj.weight, state['patch_embed.proj.weight'], rtol=1e-6, atol=0)


def smooth_images(side, seed=0):
    """Eight images of 12 waves each, none shorter than half an image, (8, 3, side, side) float64"""
    generator = torch.Generator().manual_seed(seed)
    angle, phase, frequency = (torch.rand(12, 8, 3, 1, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    along = (angle * math.tau).cos() * at[:, None] + (angle * math.tau).sin() * at
    return (math.tau * (2 * frequency * along + phase)).sin().sum(0)


def response(images, kernel):
    return F.conv2d(images, kernel.double(), stride=kernel.shape[-1])


def error(old, new, adapt, seed=0):
    """Largest difference between the adapted kernel's answer to an image and the original's to the upscaled image, as a share of the largest answer;
    or the same of the root mean squares, if that is more. Kernels of white noise, the hardest there are; 8 x 8 patches"""
    kernel = torch.randn(64, 3, old, old, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    small = smooth_images(8 * new, seed)
    large = F.interpolate(small, size=(8 * old, 8 * old), mode='bicubic')
    expected, got = response(large, kernel), response(small, adapt(kernel, new))
    return max(float(norm(got - expected) / norm(expected)) for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()))


@pytest.mark.parametrize('old, new', [(16, 8), (14, 8), (16, 4), (8, 16), (14, 16)])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_resized_kernel_answers_to_an_image_as_the_original_to_the_upscaled_one(old, new, seed):
    def interpolated(kernel, P):
        return F.interpolate(kernel, size=(P, P), mode='bicubic', antialias=P < kernel.shape[-1])
    ours = error(old, new, resize_kernel, seed)
    assert ours < 0.02
    assert error(old, new, interpolated, seed) > 0.2  # it changes the sum over the pixels
    assert error(old, new, lambda kernel, P: interpolated(kernel, P) * (old / new) ** 2, seed) > 3 * ours  # and more than the sum


def test_growing_is_exact_and_undone_by_shrinking():
    kernel = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(resize_kernel(kernel, 4), kernel)
    torch.testing.assert_close(resize_kernel(resize_kernel(kernel, 16), 4), kernel)
    assert resize_kernel(kernel, 1).shape == (5, 3, 1, 1)
    torch.testing.assert_close(resize_kernel(kernel, 1)[..., 0, 0], kernel.sum((2, 3)))  # one pixel a patch: the answer to a flat patch


@pytest.mark.parametrize('nm', [list(np.linspace(466, 940, 32)), list(np.linspace(400, 2450, 200)), [485, 560, 660, 830, 1650, 2215], [800, 900, 1000],
                                [660, 560, 480], [560], None])
def test_a_grey_image_gives_the_same_response_in_any_bands(nm):
    kernel = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    C, grey = len(nm or range(7)), torch.randn(2, 1, 16, 16, dtype=torch.float64)
    spread = spread_bands(kernel, C, nm)
    assert spread.shape == (16, C, 8, 8)
    torch.testing.assert_close(response(grey.expand(-1, C, -1, -1), spread), response(grey.expand(-1, 3, -1, -1), kernel), rtol=1e-5, atol=1e-5)


def test_bands_take_the_kernels_nearest_in_wavelength(capsys):
    kernel = torch.eye(3).reshape(3, 3, 1, 1)  # answers with red, green, blue
    r, g, b = RGB_NM
    shares = spread_bands(kernel, 6, [b - 100, b, (b + g) / 2, g, r, 2400.0])[:, :, 0, 0]
    torch.testing.assert_close(shares, torch.tensor([[0, 0, 0, 0, 1 / 2, 1 / 2], [0, 0, 1 / 3, 2 / 3, 0, 0], [0.4, 0.4, 0.2, 0, 0, 0]]))
    unsorted = spread_bands(kernel, 3, [b, g, r])[:, :, 0, 0]
    torch.testing.assert_close(unsorted, torch.eye(3).flip(1))
    assert torch.equal(spread_bands(kernel, 3, None), kernel)  # principal components, or a picture
    assert not capsys.readouterr().out
    torch.testing.assert_close(spread_bands(kernel, 4, None)[:, :, 0, 0], torch.full((3, 4), 1 / 4))
    assert 'each of 4 bands takes the mean of the 3 kernels' in capsys.readouterr().out  # no spectrum is left


def test_a_converted_file_has_the_kernels_of_its_datas_wavelengths(tmp_path):
    state, nm = synthetic(tmp_path / 'p.pth', **TINY_MAE), [470.0, 560.0, 660.0, 850.0]
    model = load_checkpoint(converted(tmp_path / 'p.pth', 4, nm, patch_size=4))['model']
    assert torch.equal(model['encoder.patch_embed.proj.weight'], spread_bands(resize_kernel(state['patch_embed.proj.weight'], 4), 4, nm))


def test_foreign_names_and_shapes_are_an_error_that_names_them(tmp_path):
    path = str(tmp_path / 'public.pth')
    state = synthetic(path, **{**TINY_MAE, 'side': 2})
    foreign = {'timm': ({**state, 'reg_token': torch.zeros(1, 4, 64), 'head.weight': torch.zeros(9, 64)}, ['head.weight', 'reg_token']),
               'less': ({k: v for k, v in state.items() if k != 'blocks.1.attn.proj.bias'}, ['blocks.1.attn.proj.bias']),
               'chunks': ({k.replace('blocks.', 'blocks.0.'): v for k, v in state.items()}, ['blocks.0.0.attn.proj.bias']),
               'shape': ({**state, 'norm.bias': torch.zeros(63)}, ['norm.bias']),
               'no cls position': ({**state, 'pos_embed': torch.zeros(1, 4, 64)}, ['pos_embed']),
               'resnet': ({'conv1.weight': torch.zeros(64, 3, 7, 7)}, ['no encoder', 'conv1.weight']),
               'prefixed': ({f'module.{k}': v for k, v in state.items()}, ['no encoder', 'module.blocks.0.']),
               'numbers': ({'model': 3}, ['no encoder']), 'list': ([1, 2], ['list'])}
    for content, words in foreign.values():
        torch.save(content, path)
        with pytest.raises(UserError) as caught:
            convert(path, meta_of(4))
        assert all(word in str(caught.value) for word in [path, *words]), str(caught.value)


def test_a_public_file_is_no_run_and_the_sentence_names_the_tool(tmp_path):
    synthetic(tmp_path / 'public.pth', **TINY_MAE)
    path = str(tmp_path / 'public.pth')
    model = MaskedAutoencoder(16, 8, 4, 64, 2, 1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    for read in (load_encoder, encoder_shape, lambda file: start_from(file, model, 'pretrain_mae.py', 3)):
        with pytest.raises(UserError, match=f'python tools/convert_weights.py --weights={path}'):
            read(path)


def test_what_a_run_has_to_share_with_the_encoder_it_starts_from(tmp_path):
    synthetic(tmp_path / 'p.pth', **TINY_DINO, ffn=SWIGLU, registers=4)
    shape = encoder_shape(converted(tmp_path / 'p.pth', 4))
    assert shape == {'embed_dim': 64, 'depth': 2, 'num_heads': 1, 'mlp_ratio': pytest.approx(4.125), 'ffn': 'swiglu', 'num_register_tokens': 4,
                     'init_values': 1.0}
    assert encoder_shape('') == {}


def test_a_whole_masked_autoencoder_gives_its_decoder_where_it_fits(tmp_path):
    path = str(tmp_path / 'full.pth')
    state = synthetic(path, **TINY_MAE, decoder=(32, 1))
    build = lambda depth, patch, bands: MaskedAutoencoder(4 * patch, patch, bands, 64, 2, 1, decoder_embed_dim=32, decoder_depth=depth, decoder_num_heads=2)
    same, other, deep = build(1, 16, 3), build(1, 8, 5), build(2, 16, 3)
    last = converted(path, 3, patch_size=16)
    assert 'starts fresh: nothing' in start_from(last, same, 'pretrain_mae.py', 3)
    assert 'starts fresh: decoder, decoder_pred, mask_token' in start_from(last, deep, 'pretrain_mae.py', 3)
    with pytest.raises(UserError, match='encoder.patch_embed.proj.weight'):
        start_from(last, other, 'pretrain_mae.py', 3)
    assert 'starts fresh: decoder_pred' in start_from(converted(path, 5), other, 'pretrain_mae.py', 3)
    torch.testing.assert_close(same.decoder_pred.weight.data, state['decoder_pred.weight'])
    assert torch.equal(other.decoder_blocks[0].mlp.fc1.weight, state['decoder_blocks.0.mlp.fc1.weight']) and torch.equal(other.mask_token, state['mask_token'])
    assert not torch.equal(deep.decoder_blocks[0].mlp.fc1.weight, state['decoder_blocks.0.mlp.fc1.weight'])
    assert all(torch.equal(model.encoder.norm.bias, state['norm.bias']) for model in (same, other, deep))
    same(torch.randn(2, 3, 64, 64))[0].backward()


def test_a_frozen_encoder_has_no_gradient_and_no_dropout():
    model = MaskedAutoencoder(16, 8, 4, 64, 2, 1, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, dropout=0.5, freeze_encoder=True)
    for mode in (None, False, True):
        model = model if mode is None else model.train(mode)
        assert not any(module.training for module in model.encoder.modules()) and model.decoder_blocks[0].training == (mode is not False)
    model(torch.randn(2, 4, 16, 16))[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if not name.startswith('encoder.') and name != 'decoder_pos_embed'}


# ---- the scripts

TINY_RUN = [*MAE_TINY, '--whiten=0', '--log_every=1', '--max_steps=3', '--eval_every=100']


def bring(path, data, *flags):
    """tools/convert_weights.py as a user runs it: writes last.pt beside `path` for windows of 16 px and patches of 4"""
    done = run('tools/convert_weights.py', f'--weights={path}', f'--data={data}', f'--out={os.path.dirname(path)}/last.pt', '--img_size=16',
               '--patch_size=4', *flags)
    assert f'{path}: a public ViT of width 64, depth' in done.stdout


def weights_of(out):
    return load_checkpoint(os.path.join(out, 'last.pt'))['model']


@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_frozen_encoder_keeps_its_bits_while_the_decoder_moves(processes, scene_data, tmp_path):
    state = synthetic(tmp_path / 'mae.pth', **TINY_MAE)
    bring(tmp_path / 'mae.pth', scene_data)
    flags = [f'--data={scene_data}', f'--init_from={tmp_path}/last.pt', '--freeze_encoder=true', f'--out_dir={tmp_path}/run']
    done = run('pretrain_mae.py', *TINY_RUN, *flags, '--max_steps=1', processes=processes)
    assert 'starts fresh: decoder, decoder_pred, mask_token' in done.stdout
    first = weights_of(tmp_path / 'run')
    run('pretrain_mae.py', *TINY_RUN, *flags, processes=processes)  # goes on
    last = weights_of(tmp_path / 'run')
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith('encoder.'))
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert {'decoder_pred.weight', 'decoder_blocks.0.attn.qkv.weight', 'mask_token'} <= set(moved)
    for name, value in state.items():
        if name not in ('pos_embed', 'patch_embed.proj.weight'):
            assert torch.equal(last[f'encoder.{name}'], value), name
    assert load_encoder(str(tmp_path / 'run' / 'last.pt')).embed_dim == 64  # judged as any other


def test_an_encoder_that_is_not_frozen_learns_on_and_dinov2_is_refused_where_it_does_not_fit(scene_data, tmp_path):
    synthetic(tmp_path / 'mae.pth', **TINY_MAE)
    bring(tmp_path / 'mae.pth', scene_data)
    run('pretrain_mae.py', *TINY_RUN, f'--data={scene_data}', f'--init_from={tmp_path}/last.pt', f'--out_dir={tmp_path}/one')
    one = weights_of(tmp_path / 'one')
    assert not torch.equal(one['encoder.norm.bias'], load_checkpoint(str(tmp_path / 'mae.pth'))['model']['norm.bias'])  # it learns
    synthetic(tmp_path / 'dino.pth', **TINY_DINO)
    bring(tmp_path / 'dino.pth', scene_data)
    done = run('pretrain_mae.py', *TINY_RUN, f'--data={scene_data}', f'--init_from={tmp_path}/last.pt', f'--out_dir={tmp_path}/three', check=False)
    assert done.returncode == 1 and 'has registers, LayerScale or SwiGLU' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_a_masked_autoencoder_starts_from_a_run_of_ours(scene_data, tmp_path):
    run('pretrain_mae.py', *TINY_RUN, f'--data={scene_data}', f'--out_dir={tmp_path}/ours')
    flags = [f'--init_from={tmp_path}/ours/last.pt', '--base_lr=0', f'--out_dir={tmp_path}/two']
    assert 'tensors taken' in run('pretrain_mae.py', *TINY_RUN, f'--data={scene_data}', *flags).stdout
    ours, two = weights_of(tmp_path / 'ours'), weights_of(tmp_path / 'two')
    assert all(torch.equal(two[name], value) for name, value in ours.items())


DINO_RUN = ['--batch_size=8', '--local_crops_number=1', '--out_dim=32', '--whiten=0', '--probe_tiles=2', '--max_steps=1', '--eval_every=100',
            '--base_lr=0', '--momentum_teacher=1']


@pytest.mark.parametrize('script, kwargs', [('pretrain_dino.py', {**TINY_DINO, 'registers': 4}), ('pretrain_dino_hsi.py', TINY_MAE),
                                            pytest.param('pretrain_dino_hsi.py', {**TINY_DINO, 'ffn': SWIGLU}, marks=pytest.mark.slow)])
def test_dino_starts_student_and_teacher_from_a_public_file(script, kwargs, scene_data, tmp_path):
    state = synthetic(tmp_path / 'public.pth', **kwargs)
    bring(tmp_path / 'public.pth', scene_data)
    done = run(script, *DINO_RUN, f'--data={scene_data}', f'--init_from={tmp_path}/last.pt', f'--out_dir={tmp_path}/run')
    assert 'starts fresh: ' in done.stdout and 'head' in done.stdout
    model = weights_of(tmp_path / 'run')
    for branch in ('student', 'teacher'):
        for name, value in state.items():
            if name not in ('pos_embed', 'patch_embed.proj.weight'):
                assert torch.equal(model[f'{branch}.encoder.{name}'], value), name
        assert torch.equal(model[f'{branch}.encoder.pos_embed'][:, 0], state['pos_embed'][:, 0])


@pytest.mark.parametrize('kwargs', [pytest.param(TINY_MAE, marks=pytest.mark.slow), {**TINY_DINO, 'registers': 4}])
def test_a_public_file_is_judged_and_looked_at(kwargs, scene_data, tmp_path):
    synthetic(tmp_path / 'my_vit.pth', **{**kwargs, 'depth': 4})  # segment.py reads four blocks
    bring(tmp_path / 'my_vit.pth', scene_data)
    run('segment.py', f'--encoder={tmp_path}/last.pt', f'--data={scene_data}', f'--out_dir={tmp_path}/run', '--decoder=linear', '--steps=1')
    run('viz_attention.py', f'--encoders={tmp_path}/last.pt', f'--data={scene_data}', f'--out_dir={tmp_path}/out', '--tiles=0')
    assert os.path.exists(tmp_path / 'run' / 'report.json') and os.path.exists(tmp_path / 'out' / 'attention_tile0.png')


def test_a_resnet_of_torchvision_reaches_the_cnn(tmp_path):
    source = DeepLabV3Plus(3, 5, stem='seven')
    state = {name: 0.1 * torch.randn_like(value) if value.ndim else value for name, value in source.state_dict().items()
             if name.startswith(('layer', 'conv1', 'bn1'))}
    old = {name: value for name, value in state.items() if not name.endswith('num_batches_tracked')}  # as the oldest file
    model = DeepLabV3Plus(32, 24, stem='seven')
    for content in (state, old):
        torch.save({**content, 'fc.weight': torch.zeros(1000, 2048), 'fc.bias': torch.zeros(1000)}, tmp_path / 'resnet50.pth')
        last = converted(tmp_path / 'resnet50.pth', 32)
        assert 'starts fresh: aspp, auxiliary, bottleneck, classifier, low_level, merge, pool' in start_from(last, model, 'pretrain_mae.py', 3)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items() if name != 'conv1.weight')
        grey = torch.randn(1, 1, 16, 16)
        torch.testing.assert_close(model.conv1(grey.expand(-1, 32, -1, -1)), F.conv2d(grey.expand(-1, 3, -1, -1), state['conv1.weight'], None, 2, 3),
                                   rtol=1e-4, atol=1e-4)
    assert 'stem' in start_from(last, DeepLabV3Plus(32, 24, stem='three'), 'pretrain_mae.py', 3)
    with pytest.raises(UserError, match='holds no encoder'):
        load_encoder(last)
    for other in (DeepLabV3Plus(32, 24, stem='seven', width=16), MaskedAutoencoder(16, 8, 32, 48, 1, 3)):
        with pytest.raises(UserError, match='does not fit this network'):
            start_from(last, other, 'pretrain_mae.py', 3)


# ---- other bands by their wavelengths

@pytest.mark.parametrize('nm', [np.arange(460, 946, 7.0), np.arange(470, 940, 18.0), np.array(OHS_NM[::-1], float)])
def test_a_spatial_spectral_encoder_takes_other_bands_by_their_wavelengths(nm):
    torch.manual_seed(0)
    args = dict(img_size=16, patch_size=4, in_chans=32, embed_dim=64, depth=3, num_heads=4, wavelengths_nm=list(OHS_NM), num_register_tokens=2,
                fusion='channel')
    encoder = SpatialSpectralViT(**args).eval()
    for parameter in encoder.fuse.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ramp = torch.linspace(0.5, 1.5, 16)

    def images(nm):  # three smooth spectra, brighter to the right: (3, C, 16, 16)
        return torch.stack([torch.sin((torch.tensor(nm) - 400) / 150 + k)[:, None, None] * ramp.expand(16, 16) for k in range(3)]).float()

    def at(nm):
        other_args, weights = at_wavelengths(args, encoder.state_dict(), nm)
        other = SpatialSpectralViT(**other_args).eval()
        other.load_state_dict(weights)
        return other
    other = at(nm.tolist())
    with torch.no_grad():
        expected, got = encoder(images(np.array(OHS_NM, float)))[0], other(images(nm))[0]
        same = at(list(OHS_NM))(images(np.array(OHS_NM, float)))
    error, spread = (got - expected).norm() / expected.norm(), (expected[0] - expected[2]).norm() / expected.norm()
    assert error < 0.05 < 0.3 < spread
    assert all(torch.equal(a, b) for a, b in zip(same, encoder(images(np.array(OHS_NM, float)))))
    assert other.num_groups == -(-len(nm) // 2) and encoder.in_chans == 32  # the encoder itself stays


def test_a_run_is_brought_to_other_bands_or_refused_in_a_sentence(scene_data, tmp_path):
    own = np.linspace(440, 960, 20).tolist()
    args = dict(img_size=16, patch_size=4, in_chans=20, embed_dim=48, depth=4, num_heads=3, fusion='channel', wavelengths_nm=own)

    def save(args, build):
        model = {f'teacher.encoder.{name}': value for name, value in build(**args).state_dict().items()}
        torch.save({'script': 'pretrain_dino_hsi.py', 'config': {'whiten': 3}, 'encoder_args': args, 'model': model, 'meta': meta_of(20, own)},
                   tmp_path / 'hsi.pt')
    flags = [f'--weights={tmp_path}/hsi.pt', f'--data={scene_data}', f'--out={tmp_path}/last.pt']
    save(args, SpatialSpectralViT)
    run('tools/convert_weights.py', *flags)
    encoder = load_encoder(str(tmp_path / 'last.pt'))
    meta = Tiles(scene_data, 'tr').meta
    assert (encoder.in_chans, encoder.whiten, encoder.args['wavelengths_nm']) == (7, 3, meta['wavelengths_nm'])
    run('segment.py', f'--encoder={tmp_path}/last.pt', f'--data={scene_data}', f'--out_dir={tmp_path}/judged', '--decoder=linear', '--steps=1')
    save({**args, 'fusion': 'token', 'depth': 1}, SpatialSpectralViT)
    done = run('tools/convert_weights.py', *flags, check=False)
    assert done.returncode == 1 and 'with channel fusion' in done.stderr and 'Traceback' not in done.stderr
    save({**args, 'wavelengths_nm': None}, SpatialSpectralViT)
    done = run('tools/convert_weights.py', *flags, check=False)
    assert done.returncode == 1 and 'known wavelengths' in done.stderr
    args.pop('fusion'), args.pop('wavelengths_nm')
    save(args, ViT)
    done = run('tools/convert_weights.py', *flags, check=False)
    assert done.returncode == 1 and 'data.py tile --bands' in done.stderr


# ---- the way back

def our_run(path, whiten=3, **extra):
    """last.pt as a pre-training script writes it, of a ViT with random values"""
    args = {**dict(img_size=16, patch_size=4, in_chans=7, embed_dim=48, depth=2, num_heads=3), **extra}
    torch.manual_seed(0)
    encoder = ViT(**args)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save({'script': 'pretrain_dino.py', 'config': {'whiten': whiten}, 'encoder_args': args, 'meta': meta_of(7),
                'model': {f'teacher.encoder.{name}': value for name, value in encoder.state_dict().items()}}, path)
    return encoder.eval()


OURS = {'mae': dict(fixed_positions=True), 'dino': dict(num_register_tokens=4, ffn='swiglu', init_values=1.0, mask_token=True),
        'plain dino': dict(ffn='mlp', init_values=1.0, mask_token=True)}


@pytest.mark.parametrize('kind', OURS)
def test_what_is_exported_with_public_names_comes_back_bit_by_bit(kind, tmp_path):
    encoder = our_run(tmp_path / 'last.pt', **OURS[kind])
    lines = export(str(tmp_path / 'last.pt'), str(tmp_path / 'vit.pth'), 'dinov2')
    module = 'dinov2.models.vision_transformer'
    assert f'import {module}\nvit = {module}.DinoVisionTransformer(img_size=16, patch_size=4, in_chans=7' in lines
    state = torch.load(tmp_path / 'vit.pth', weights_only=True)
    ffn = SWIGLU if 'swiglu' in OURS[kind].values() else MLP
    recorded = names(48, 2, 4, 4, dinov2=True, registers=OURS[kind].get('num_register_tokens', 0), ffn=ffn, bands=7)
    if kind == 'mae':  # no LayerScale: DINOv2's ViT with init_values=None
        recorded = {name: shape for name, shape in recorded.items() if 'gamma' not in name}
    assert {name: tuple(value.shape) for name, value in state.items()} == recorded
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())


def test_heads_are_not_in_a_file_but_known_of_every_size_of_ours(tmp_path):
    for size in SIZES.values():
        encoder, x = our_run(tmp_path / 'last.pt', **{**size, 'depth': 1}), torch.randn(1, 7, 16, 16)
        export(str(tmp_path / 'last.pt'), str(tmp_path / 'vit.pth'), 'dinov2')
        with torch.no_grad():
            again = load_encoder(converted(tmp_path / 'vit.pth', 7, img_size=16, patch_size=4))
            torch.testing.assert_close(again(x), encoder(x), rtol=1e-5, atol=1e-5)


def test_the_command_exports_and_refuses_in_a_sentence(tmp_path):
    encoder = our_run(tmp_path / 'last.pt', whiten=0)  # a vector: the export makes it a matrix
    done = run('tools/convert_weights.py', f'--export={tmp_path}/last.pt', f'--out={tmp_path}/new/vit.pth')
    assert 'vit = timm.models.VisionTransformer(img_size=16' in done.stdout and sorted(os.listdir(tmp_path / 'new')) == ['vit.npz', 'vit.pth']
    statistics, raw = np.load(tmp_path / 'new' / 'vit.npz'), torch.randn(1, 7, 16, 16)
    prepared = standardize(raw, torch.from_numpy(statistics['mean']), torch.from_numpy(statistics['matrix']))
    torch.testing.assert_close(prepared, load_encoder(str(tmp_path / 'last.pt')).prepare(raw))  # a matrix, where it was a vector
    assert encoder(prepared).isfinite().all()
    lines = {'numpy': np, 'torch': torch, 'raw': raw}
    exec('\n'.join(line for line in done.stdout.splitlines() if line.startswith(('mean, matrix =', 'x ='))), lines)
    torch.testing.assert_close(lines['x'], prepared)
    for flags, code, words in (([f'--export={tmp_path}/last.pt', '--form=jax'], 2, 'choose from'), ([f'--export={tmp_path}/no.pt'], 1, 'no such checkpoint'),
                               ([f'--weights={tmp_path}/last.pt'], 2, 'needs --data'), ([], 2, 'required')):
        done = run('tools/convert_weights.py', *flags, f'--out={tmp_path}/x.pth', check=False)
        assert done.returncode == code and words in done.stderr and 'Traceback' not in done.stderr


NO_TORCHVISION = r'''
import importlib.abc, importlib.machinery, sys, types
import torch
try:
    import torchvision
except ImportError:  # timm imports names of it at the top, for data and detection; its ViT uses none
    class Name(type):
        def __getattr__(cls, name):
            if name.startswith('__'):
                raise AttributeError(name)
            return name
    class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split('.')[0] == 'torchvision' else None
        def create_module(self, spec):
            def name_of(name):
                if name.startswith('__'):
                    raise AttributeError(name)
                return Name(name, (), {})
            module = types.ModuleType(spec.name)
            module.__getattr__ = name_of
            return module
        def exec_module(self, module):
            pass
    sys.meta_path.append(Empty())
'''


@pytest.mark.parametrize('whiten', [0, 3])
@pytest.mark.parametrize('kind', OURS)
def test_the_lines_that_the_export_prints_see_in_timm_what_the_encoder_sees(kind, whiten, tmp_path):
    if not __import__('importlib.util').util.find_spec('timm'):
        pytest.skip('timm is not installed')
    our_run(tmp_path / 'last.pt', whiten=whiten, **OURS[kind])
    encoder, raw = load_encoder(tmp_path / 'last.pt'), 1000 + 200 * torch.randn(2, 7, 16, 16)
    torch.save(raw, tmp_path / 'raw.pt')
    done = run('tools/convert_weights.py', f'--export={tmp_path}/last.pt', f'--out={tmp_path}/vit.pth')
    lines = done.stdout[done.stdout.index('import numpy'):]
    code = f'{NO_TORCHVISION}\nimport torch\nraw = torch.load("{tmp_path}/raw.pt")\n{lines}\ntorch.save(features.detach(), "{tmp_path}/y.pt")'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / 'y.pt', weights_only=True), encoder(encoder.prepare(raw)), rtol=1e-4, atol=1e-4)


# ---- what the command refuses, and a ResNet's bands

def test_a_resnet_takes_the_kernels_of_its_datas_wavelengths(tmp_path, capsys):
    kernel = torch.randn(64, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.save({'conv1.weight': kernel, 'fc.weight': torch.zeros(1000, 2048)}, tmp_path / 'resnet50.pth')
    r, g, b = RGB_NM

    def first_layer(bands, nm):
        return load_checkpoint(converted(tmp_path / 'resnet50.pth', bands, nm))['model']['conv1.weight']
    torch.testing.assert_close(first_layer(3, [b, g, r]), kernel.flip(1))
    nm = np.linspace(450, 950, 12).tolist()
    assert torch.equal(first_layer(12, nm), spread_bands(kernel, 12, nm))
    assert torch.equal(first_layer(3, None), kernel)
    assert 'takes the mean' not in capsys.readouterr().out
    first_layer(12, None)
    assert 'each of 12 bands takes the mean of the 3 kernels' in capsys.readouterr().out


@pytest.mark.parametrize('name, value', [('img_size', 0), ('img_size', -8), ('patch_size', 0), ('patch_size', -4), ('whiten', -3)])
def test_sizes_that_no_encoder_has_are_refused_in_a_sentence(name, value, tmp_path):
    synthetic(tmp_path / 'mae.pth', **TINY_MAE)
    with pytest.raises(UserError, match=f'^--{name}={value}: choose {int(name != "whiten")} or more$'):
        converted(tmp_path / 'mae.pth', 4, **{name: value})


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_the_command_writes_over_no_file_of_others(scene_data, tmp_path):
    our_run(tmp_path / 'run.pt')
    synthetic(tmp_path / 'mae.pth', **TINY_MAE)
    (tmp_path / 'same.pt').symlink_to('run.pt')
    os.link(tmp_path / 'run.pt', tmp_path / 'linked.pt')
    np.savez(tmp_path / 'scene.npz', cube=np.ones((4, 4, 2)), mean=1, matrix=1)
    np.savez(tmp_path / 'less.npz', mean=1)
    our_run(tmp_path / 'other.pt')
    (tmp_path / 'scene.tif').write_bytes(b'II*\0 a picture')
    (tmp_path / 'broken.npz').write_bytes(b'PK\3\4 half of it')
    export_it, convert_it = f'--export={tmp_path}/run.pt', f'--weights={tmp_path}/mae.pth'
    before = contents(tmp_path)
    for source, out, words in ((export_it, 'vit.npz', 'vit.npz: .npz is the ending of'), (export_it, 'scene.pth', 'scene.npz: is there'),
                               (export_it, 'run.pt', 'run.pt: is the file'), (convert_it, 'other.pt', 'other.pt: is there')):
        done = run('tools/convert_weights.py', source, f'--data={scene_data}', f'--out={tmp_path}/{out}', check=False)
        assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr, (out, done.stderr)
        assert contents(tmp_path) == before, out
    for source, exporting, out, words in (
            ('run.pt', True, 'less.pth', 'less.npz: is there'), ('run.pt', True, 'broken', 'broken.npz: is there'), ('run.pt', True, 'same.pt', 'is the file'),
            ('run.pt', True, 'linked.pt', 'is the file'), ('run.pt', True, '../' + tmp_path.name + '/run.pt', 'is the file'),
            ('run.pt', True, 'mae.pth', 'mae.pth: is there'), ('mae.pth', False, 'vit.NPZ', 'is the ending of'), ('mae.pth', False, 'mae.pth', 'is the file'),
            ('mae.pth', False, 'scene.tif', 'scene.tif: is there')):
        with pytest.raises(UserError, match=words):
            check_out(f'{tmp_path}/{out}', f'{tmp_path}/{source}', exporting)
    check_out(f'{tmp_path}/scene.pth', f'{tmp_path}/mae.pth', False)  # there a .npz is not written


def test_the_command_replaces_what_it_wrote_before(scene_data, tmp_path):
    our_run(tmp_path / 'run.pt')
    synthetic(tmp_path / 'mae.pth', **TINY_MAE)
    for form in ('timm', 'dinov2'):
        run('tools/convert_weights.py', f'--export={tmp_path}/run.pt', f'--out={tmp_path}/vit.pth', f'--form={form}')
    assert 'mask_token' in torch.load(tmp_path / 'vit.pth', weights_only=True)
    for whiten in (0, 3):
        run('tools/convert_weights.py', f'--weights={tmp_path}/mae.pth', f'--data={scene_data}', f'--out={tmp_path}/last.pt', f'--whiten={whiten}')
    assert load_encoder(str(tmp_path / 'last.pt')).whiten == 3
