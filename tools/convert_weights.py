"""Public files of MAE, DINO, DINOv2 -> a last.pt of ours, and ours -> timm, DINOv2.

    python tools/convert_weights.py --weights=mae_pretrain_vit_base.pth \\
        --data=data/mine --out=runs/public/last.pt
    python tools/convert_weights.py --weights=resnet50.pth --data=data/mine --out=runs/resnet.pt
    python tools/convert_weights.py --weights=runs/hsi/last.pt --data=data/b --out=runs/b/last.pt
    python tools/convert_weights.py --export=runs/mae/last.pt --out=vit.pth --form=timm

The first brings a public encoder, of patches of 14 or 16 px and three bands, to --patch_size and to
the bands of --data: for segment.py --encoder, or pretrain_mae.py --init_from. The second does so
with torchvision's CNN, for baseline_deeplab.py --stem=seven --init_from. The third brings a
spatial-spectral encoder of ours to other bands by their wavelengths. The last writes plain tensors
that timm or DINOv2 loads, and beside them a .npz with the mean and matrix of the input.
"""
import argparse
import math
import os
import re
import sys
import zipfile

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import UserError, Tiles, kept_meta, plain_errors, standardization
from models import (LayerScale, SpatialSpectralViT, SwiGLU, ViT, load_checkpoint, load_encoder,
                    resize_positions, save_checkpoint)
from scenes import band_matrix

RGB_NM = (600.0, 540.0, 460.0)  # about where a camera's red, green and blue peak
KERNEL = 'patch_embed.proj.weight'


# ============ reading a public file ============

def read_public(path, weights):
    """Tensors of a public file -> our ViT's arguments, its tensors, a MAE decoder's.

    Nearly all shows in names and shapes. Heads do not: they are 64 channels wide, but for MAE's
    ViT-H and our tiny. Raises UserError for other networks.
    """
    ndims = {name: value.ndim for name, value in weights.items()
             if isinstance(value, torch.Tensor)}
    all_tensors = len(ndims) == len(weights)
    if not all_tensors or ndims.get('pos_embed') != 3 or ndims.get(KERNEL) != 4:
        found = sorted(map(str, weights))[:6]
        raise UserError(f'{path}: holds no encoder with the names of MAE and DINOv2 '
                        f'(found {found}): pass a public file of these')
    decoder = {name: value.float() for name, value in weights.items()
               if name.startswith('decoder_') or (name == 'mask_token' and value.ndim == 3)}
    encoder = {name: value.float() for name, value in weights.items() if name not in decoder}

    D, C, P = encoder[KERNEL].shape[:3]
    grid = math.isqrt(encoder['pos_embed'].shape[1] - 1)
    blocks = {name.split('.')[1] for name in encoder if re.match(r'blocks\.\d+\.', name)}
    num_heads = {128: 4, 1280: 16}.get(D, max(1, D // 64))  # our tiny, MAE's ViT-H
    args = dict(img_size=grid * P, patch_size=P, in_chans=C, embed_dim=D,
                depth=len(blocks), num_heads=num_heads)
    if 'blocks.0.mlp.fc1.weight' in encoder:
        args['mlp_ratio'] = len(encoder['blocks.0.mlp.fc1.weight']) / D
    elif 'blocks.0.mlp.w3.weight' in encoder:
        # SwiGLU takes 2/3 of the hidden width that it is given
        args['ffn'] = 'swiglu'
        args['mlp_ratio'] = 1.5 * encoder['blocks.0.mlp.w3.weight'].shape[1] / D
    if 'register_tokens' in encoder:
        args['num_register_tokens'] = encoder['register_tokens'].shape[1]
    if 'blocks.0.ls1.gamma' in encoder:
        args['init_values'] = 1.0
    args['mask_token'] = 'mask_token' in encoder

    with torch.device('meta'):  # names and shapes only
        expected = ViT(**args).state_dict()
    wrong = set(encoder) ^ set(expected)
    if not wrong:
        wrong = {name for name in expected if expected[name].shape != encoder[name].shape}
    if wrong:
        names = ', '.join(sorted(wrong)[:8])
        raise UserError(f'{path}: differs from a ViT of MAE or DINOv2 of width {D} '
                        f'and depth {len(blocks)} in {names}: pass an encoder alone, '
                        'with public names and shapes')
    return args, encoder, decoder


# ============ another patch, other bands ============

def stretch(n, m):
    """(m, n) matrix that brings n pixels in a row to m: linear between their centres,
    and straight on beyond the outermost."""
    at = (torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5
    left = at.floor().clamp(0, max(n - 2, 0)).long()
    right = (left + 1).clamp(max=n - 1)
    share = (at - left)[:, None]
    eye = torch.eye(n, dtype=torch.float64)
    return eye[left] * (1 - share) + eye[right] * share


def resize_kernel(kernel, P):
    """kernel (D, C, p, p) -> (D, C, P, P) that answers to a resized patch as the old one did to the
    patch (FlexiViT, arXiv 2212.08013).

    With B the resizing, <x, w> = <B x, w'> for all x is solved by w' = pinv(B') w. B is `stretch`
    to larger patches and its pseudo-inverse to smaller ones: so w' = stretch' w there, exact for
    stretched patches. Interpolating w would scale answers by the ratio of areas.
    """
    p = kernel.shape[-1]
    if P <= p:
        matrix = stretch(P, p).T  # (P, p), for rows and columns alike
    else:
        matrix = torch.linalg.pinv(stretch(p, P).T)
    return (matrix @ kernel.double() @ matrix.T).to(kernel.dtype)


def spread_bands(kernel, C, wavelengths_nm=None):
    """kernel (D, c, P, P) -> (D, C, P, P) that answers to a grey image, all bands alike, as the old
    one did.

    Of three kernels, a band at a known wavelength takes a mixture of the two it lies between, or
    the one at its end, scaled so that each kernel's sum stays. Otherwise C = c bands keep their
    kernels, and others take the mean kernel times c / C.
    """
    c = kernel.shape[1]
    mixture = torch.ones(C, c, dtype=torch.float64)
    if c == 3 and wavelengths_nm:
        nm = torch.tensor(wavelengths_nm, dtype=torch.float64)
        r, g, b = RGB_NM
        red = ((nm - g) / (r - g)).clamp(0, 1)
        blue = ((g - nm) / (g - b)).clamp(0, 1)
        mixture = torch.stack([red, 1 - red - blue, blue], dim=1)  # (C, 3)
        for k in range(3):
            if not mixture[:, k].any():  # a sensor that sees nothing there
                mixture[(nm - RGB_NM[k]).abs().argmin(), k] = 1
    elif C == c:
        mixture = torch.eye(c, dtype=torch.float64)
    else:
        print(f'each of {C} bands takes the mean of the {c} kernels: their sum is all that is seen')
    mixture = mixture / mixture.sum(0)
    return torch.einsum('dcpq,Cc->dCpq', kernel.double(), mixture).to(kernel.dtype)


def convert_resnet(weights, bands, wavelengths_nm):
    """torchvision's resnet50 -> tensors for DeepLabV3Plus with stem 'seven'"""
    taken = {'conv1.weight': spread_bands(weights['conv1.weight'], bands, wavelengths_nm)}
    for name, value in weights.items():
        if name.startswith(('bn1.', 'layer')):
            taken[name] = value
            # old files lack a counter that batch norms have today
            counter = name.replace('running_mean', 'num_batches_tracked')
            taken.setdefault(counter, torch.tensor(0))
    return taken


def at_wavelengths(args, weights, wavelengths_nm):
    """Arguments and tensors of a SpatialSpectralViT -> those of one for bands at `wavelengths_nm`
    (C',) instead of its own C. Images are not resampled.

    The spectral stream groups the new bands and codes their wavelengths. A patch kernel is a
    function of wavelength: with R (C, C') that brings the new bands to the old ones (responses as
    wide as the old bands' steps), w' = w R answers to a spectrum as w does to the resampled one.
    """
    own = args.get('wavelengths_nm')
    if args.get('fusion') != 'channel' or not own or not wavelengths_nm:
        raise UserError('other bands by their wavelengths: only for an encoder of '
                        'pretrain_dino_hsi.py with channel fusion, with known wavelengths on both '
                        'sides: for others python data.py tile --bands=... tiles the data again')
    own = np.asarray(own, float)
    widths = np.full(len(own), 15.0)
    if len(own) > 1:
        order = np.argsort(own)
        widths[order] = np.gradient(own[order]).clip(min=1)
    matrix = torch.from_numpy(band_matrix(wavelengths_nm, own, widths))  # (C, C')
    kernel = weights[KERNEL]
    kernel = torch.einsum('dcpq,ck->dkpq', kernel, matrix.to(kernel))
    args = args | dict(in_chans=len(wavelengths_nm), wavelengths_nm=list(wavelengths_nm))
    return args, weights | {KERNEL: kernel}


def convert(path, meta, img_size=64, patch_size=8, whiten=0):
    """A file brought to the data of `meta` -> content of a last.pt of ours"""
    for name, value, lowest in (('img_size', img_size, 1), ('patch_size', patch_size, 1),
                                ('whiten', whiten, 0)):
        if value < lowest:
            raise UserError(f'--{name}={value}: choose {lowest} or more')
    weights = load_checkpoint(path)
    bands, wavelengths_nm = meta['num_bands'], meta['wavelengths_nm']
    args, encoder, others = {}, {}, {}
    if 'script' in weights:
        run = load_encoder(path)
        whiten = run.whiten  # its input stays as it is
        args, encoder = at_wavelengths(run.args, run.state_dict(), wavelengths_nm)
        print(f'{path}: a spatial-spectral ViT for {run.in_chans} bands')
    elif 'conv1.weight' in weights and 'fc.weight' in weights:
        others = convert_resnet(weights, bands, wavelengths_nm)
        print(f'{path}: a ResNet, for baseline_deeplab.py --stem=seven')
    else:
        if isinstance(weights.get('model'), dict):  # MAE's files
            weights = weights['model']
        args, encoder, others = read_public(path, weights)
        print(f'{path}: a public ViT of width {args["embed_dim"]}, depth {args["depth"]}, '
              f'patches of {args["patch_size"]} px, {args["in_chans"]} bands')
        if (args['patch_size'], args['in_chans']) != (patch_size, bands):
            # the decoder's last layer makes pixels, here those of another patch
            others = {name: value for name, value in others.items()
                      if not name.startswith('decoder_pred.')}
        args.update(img_size=img_size, patch_size=patch_size, in_chans=bands)
        kernel = resize_kernel(encoder[KERNEL], patch_size)
        encoder[KERNEL] = spread_bands(kernel, bands, wavelengths_nm)
        encoder = resize_positions(encoder, ViT(**args).state_dict())
    encoder = {f'encoder.{name}': value for name, value in encoder.items()}
    return {'model': encoder | others, 'encoder_args': args, 'meta': kept_meta(meta),
            'config': {'whiten': whiten}, 'script': 'convert_weights.py'}


# ============ the way back ============

def statistics_of(out):
    """vit.pth -> vit.npz, which an export writes beside it"""
    return os.path.splitext(out)[0] + '.npz'


def export(path, out, form='timm'):
    """Write an encoder of ours as plain tensors that load with strict=True into timm's ViT ('timm')
    or DINOv2's ('dinov2'), and beside them a .npz with the mean (C,) and matrix (C, C) of its input
    -> the lines that use both on `raw` (B, C, H, W)."""
    encoder = load_encoder(path)
    if isinstance(encoder, SpatialSpectralViT):
        raise UserError(f'{path}: has a second stream, which neither timm nor DINOv2 '
                        'has: export a run of pretrain_mae.py or pretrain_dino.py')
    weights = encoder.state_dict()
    block = encoder.blocks[0]
    swiglu = isinstance(block.mlp, SwiGLU)
    registers = encoder.num_prefix_tokens - 1
    options = dict(img_size=encoder.img_size, patch_size=encoder.patch_size,
                   in_chans=encoder.in_chans, embed_dim=encoder.embed_dim,
                   depth=len(encoder.blocks), num_heads=block.attn.num_heads,
                   init_values=1.0 if isinstance(block.ls1, LayerScale) else None)
    if form == 'dinov2':
        network = 'dinov2.models.vision_transformer.DinoVisionTransformer'
        weights.setdefault('mask_token', torch.zeros(1, encoder.embed_dim))
        options |= dict(mlp_ratio=encoder.args.get('mlp_ratio', 4.0), block_chunks=0,
                        ffn_layer='"swiglufused"' if swiglu else '"mlp"',
                        num_register_tokens=registers)
    else:
        network = 'timm.models.VisionTransformer'
        weights.pop('mask_token', None)
        if registers:  # timm adds no position to the cls token of a ViT with registers
            table = weights['pos_embed']
            weights['reg_token'] = weights.pop('register_tokens')
            weights['cls_token'] = weights['cls_token'] + table[:, :1]
            weights['pos_embed'] = table[:, 1:]
        for name in list(weights):
            new_name = name.replace('.w12.', '.fc1.').replace('.w3.', '.fc2.')
            weights[new_name] = weights.pop(name)
        hidden = len(weights['blocks.0.mlp.fc1.weight'])
        options |= dict(mlp_ratio=hidden / encoder.embed_dim, num_classes=0,
                        reg_tokens=registers, no_embed_class=registers > 0)
        if swiglu:
            options |= dict(mlp_layer='timm.layers.SwiGLUPacked',
                            act_layer='torch.nn.SiLU')
    save_checkpoint(out, {name: value.clone() for name, value in weights.items()})
    mean, matrix = standardization(encoder.meta, encoder.whiten)
    statistics = statistics_of(out)
    matrix = matrix if matrix.ndim == 2 else torch.diag(matrix)
    np.savez(statistics, mean=mean.numpy(), matrix=matrix.numpy())
    arguments = ', '.join(f'{name}={value}' for name, value in options.items())
    module = network.rpartition('.')[0]
    return f'''import numpy
import torch
import {module}
vit = {network}({arguments})
vit.load_state_dict(torch.load({out!r}, weights_only=True))
mean, matrix = map(torch.from_numpy, numpy.load({statistics!r}).values())
x = torch.einsum('kc,bchw->bkhw', matrix, raw - mean[:, None, None])
features = vit.eval().forward_features(x)'''


# ============ what may be written ============

def is_statistics(path):
    """Whether a file is the .npz of an export, and not a scene or another array of the user's"""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist()) == {'mean.npy', 'matrix.npy'}


def was_written_here(out):
    """Whether the file `out` is one of this tool. An export has no mark but the .npz beside it."""
    try:
        content = load_checkpoint(out)
    except UserError:  # no checkpoint at all
        return False
    if 'script' in content:
        return content['script'] == 'convert_weights.py'
    return is_statistics(statistics_of(out))


def check_out(out, source, exporting):
    """Refuses an --out where something would be lost: the file `source` that is read, a run, or
    any other file that this tool did not write. With `exporting` a .npz is written as well."""
    if out.lower().endswith('.npz'):
        raise UserError(f'{out}: .npz is the ending of the statistics that an export writes beside '
                        'the weights: choose another --out, as vit.pth or last.pt')
    if os.path.exists(out):
        if os.path.exists(source) and os.path.samefile(out, source):
            raise UserError(f'{out}: is the file that is read: choose another --out')
        if not was_written_here(out):
            raise UserError(f'{out}: is there, and was not written by this tool: choose another '
                            '--out, or move that file away')
    statistics = statistics_of(out)
    if exporting and os.path.exists(statistics) and not is_statistics(statistics):
        raise UserError(f'{statistics}: is there, and an export would replace it by the mean and '
                        'matrix of its input: choose another --out, or move that file away')


if __name__ == '__main__':
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--weights', help='a public file, or a spatial-spectral run')
    source.add_argument('--export', help='a last.pt or best.pt for other programs')
    parser.add_argument('--out', required=True, help='file to write')
    parser.add_argument('--data', help='with --weights: tiles it is brought to')
    parser.add_argument('--img_size', type=int, default=64, help='its window, px')
    parser.add_argument('--patch_size', type=int, default=8, help='its patch, px')
    parser.add_argument('--whiten', type=int, default=0,
                        help='of its input; 0 is nearest to what a public encoder has seen')
    parser.add_argument('--form', default='timm', choices=('timm', 'dinov2'),
                        help='with --export: whose names')
    flags = parser.parse_args()
    check_out(flags.out, flags.export or flags.weights, bool(flags.export))
    os.makedirs(os.path.dirname(flags.out) or '.', exist_ok=True)
    if flags.export:
        lines = export(flags.export, flags.out, flags.form)
        print(f'{flags.out}: written. To use it on raw images (B, C, H, W), float32 and '
              'without missing pixels:\n')
        print(lines)
    elif flags.data:
        meta = Tiles(flags.data, 'tr').meta
        content = convert(flags.weights, meta, flags.img_size, flags.patch_size, flags.whiten)
        content['config']['data'] = flags.data  # what segment.py takes by default
        save_checkpoint(flags.out, content)
        print(f'{flags.out}: for the {meta["num_bands"]} bands of {flags.data}')
    else:
        parser.error('--weights needs --data, whose bands it is brought to')
