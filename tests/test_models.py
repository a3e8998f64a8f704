"""The networks: parameter counts, names, shapes and outputs against the public implementations."""
import json
import math
import os
import zlib

import numpy as np
import pytest
import torch

from models import Attention, MaskedAutoencoder, ViT, dense_features, patchify, unpatchify

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
