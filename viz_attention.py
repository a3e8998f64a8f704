"""What encoders look at: attention of the cls token and of a chosen patch, features as colours.

An image gives one picture, each encoder a row in it. Attention is what the cls token, or the patch
at --query, takes from each patch in one block: a row of softmax(q k' / sqrt(width of a head)).
Colours are three principal components of the patch tokens (DINOv2, arXiv 2304.07193, Fig. 1). A
spatial-spectral encoder also shows what its cls token takes from each group of bands.

    python viz_attention.py --encoders=runs/mae/last.pt
    python viz_attention.py --encoders=runs/mae/last.pt,runs/dino/last.pt --tiles=3,17
    python viz_attention.py --encoders=runs/mae/last.pt --image=scene.tif --query=20,40

Writes out_dir/attention_*.png. Where to start: capture() takes the attention out of a network.

Shapes: C bands, H x W pixels, P side of a patch, h x w patches, nh heads, D width, T tokens [cls,
registers, patches], S spectral tokens [cls, registers, groups of bands].
"""
import os
import re

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data import (HOW_READ, UserError, Tiles, demo_if_missing, false_color, plain_errors,
                  principal_colors, read_flags, read_scene, save_figure, valid_pixels)
from models import check_bands, load_encoder, tiles_of

encoders = 'runs/mae/last.pt'  # last.pt of one or several runs, separated by commas: a row each
data = ''  # tile directory; '' is the one that the first encoder was trained on
split = 'tr'  # tr | val | ts: which of its tiles
tiles = '0,1'  # numbers of tiles, separated by commas: a picture each
image = ''  # a scene file instead of tiles, of the same bands
window = 256  # the middle of so many px is looked at; 0: all of it, at the cost of its square
block = -1  # whose attention is taken: 0 is the first block, -1 the last
heads = 4  # so many heads at most have a column of their own; 0: none
query = ''  # pixel of the picture (after --window) whose patch asks: row,column; '' is its middle
out_dir = 'runs/attention'  # where the pictures go


# ============ method ============

def capture(encoder, x, block, tokens=slice(None)):
    """x (1, C, H, W) -> attention of a block (nh, T, T), that of its spectral stream (nh, S, S) or
    None, features of the patches (h, w, D).

    Of the first only the rows `tokens`: all of them take gigabytes for a large image.
    """
    captured = {}

    def keep(stream, rows):
        def hook(layer, args):  # args[0] is what this attention layer sees
            q, k, _ = layer.heads(args[0])
            captured[stream] = layer.weights(q[:, :, rows], k)[0]
        return hook

    hooks = [encoder.blocks[block].attn.register_forward_pre_hook(keep('spatial', tokens))]
    if hasattr(encoder, 'spectral_blocks'):
        layer = encoder.spectral_blocks[block].attn
        hooks.append(layer.register_forward_pre_hook(keep('spectral', slice(None))))
    with torch.no_grad():
        features = encoder.get_intermediate_layers(x, 1)[0][0]  # (D, h, w)
    for hook in hooks:
        hook.remove()
    return captured['spatial'], captured.get('spectral'), features.permute(1, 2, 0)


def patch_maps(attention, token, num_prefix_tokens, h, w):
    """attention (nh, T, T) -> what `token` takes from the patches (nh, h, w), times their number:
    1 is an even share of all it takes"""
    return attention[:, token, num_prefix_tokens:].reshape(-1, h, w) * h * w


# ============ the picture ============

def draw(path, raw, names, loaded, meta, pixel):
    """One picture of an image: raw (C, H, W), missing pixels NaN.

    names, loaded: of the encoders, a row each; pixel: row, column in the patch that asks.
    """
    _, H, W = raw.shape
    most_heads = max(encoder.blocks[0].attn.num_heads for encoder in loaded)
    titles = ['false colour', 'features', 'chosen\npatch', 'cls,\nall heads']
    titles += [f'cls,\nhead {i + 1}' for i in range(min(heads, most_heads))]
    widths = [1] * len(titles)
    if any(hasattr(encoder, 'spectral_blocks') for encoder in loaded):
        widths.append(2)
    side = min(9 / sum(widths), 1.8)
    height = (side * min(H / W, 2) + 0.3) * len(loaded) + 0.8
    figure = Figure(figsize=(9, height), layout='constrained')
    axes = figure.subplots(len(loaded), len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.axis('off')  # until something is drawn there
    for row, name, encoder in zip(axes, names, loaded):
        draw_row(row, raw, encoder, meta, pixel)
        row[0].set_ylabel(f'{name}\n{H} x {W} px', fontsize=8)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.supxlabel('Attention: dark = 0, yellow = the 99 % quantile; 1 = an even share.\n'
                     'Chosen patch: red. Features: three principal components.', fontsize=8)
    save_figure(figure, path)


def draw_row(row, raw, encoder, meta, pixel):
    """The pictures of one encoder into the axes `row`"""
    _, H, W = raw.shape
    P, prefix = encoder.patch_size, encoder.num_prefix_tokens
    h, w = H // P, W // P
    asking = prefix + pixel[0] // P * w + pixel[1] // P
    x = encoder.prepare(raw[None])
    spread = x.std((2, 3)).mean()  # 1 in the data that the encoder learned from
    if not 0.02 < spread < 50:
        print(f'WARNING: standardised values spread by {spread:.2g}, '
              'those of the training data by 1: '
              'are they in the same units?')
    attention, spectral_attention, features = capture(encoder, x, block, [0, asking])
    cls = patch_maps(attention, 0, prefix, h, w)
    asked = patch_maps(attention, 1, prefix, h, w)

    maps = [asked.mean(0), cls.mean(0), *cls[:heads]]
    for axis, values in zip(row, [false_color(raw, meta), principal_colors(features), *maps]):
        axis.axis('on')
        axis.set(xticks=[], yticks=[])
        look = {}
        if values.ndim == 2:
            look = dict(cmap='viridis', norm=PowerNorm(0.5, 0, np.quantile(values, 0.99)))
            axis.set_xlabel(f'max. {values.max():.1f} x even', fontsize=7)
        axis.imshow(values, extent=(0, W, H, 0), interpolation='nearest', **look)
    for axis in (row[0], row[2]):
        corner = (pixel[1] // P * P, pixel[0] // P * P)
        axis.add_patch(Rectangle(corner, P, P, fill=False, color='red', linewidth=1.5))
    if spectral_attention is not None:
        draw_spectrum(row[-1], raw, meta, encoder, spectral_attention)


def draw_spectrum(axis, raw, meta, encoder, attention):
    """The mean spectrum of the image, and what the spectral cls token takes from each group"""
    nm = np.array(meta['wavelengths_nm'] or range(len(raw)), float)
    order = np.argsort(nm)
    spectrum = raw[:, np.isfinite(raw).all(0)].mean(1)
    axis.axis('on')
    axis.plot(nm[order], spectrum[order], color='black', linewidth=1)
    axis.set_xlabel('wavelength, nm' if meta['wavelengths_nm'] else 'band', fontsize=7)
    axis.set_ylabel('mean of stored values', fontsize=7)
    axis.tick_params(labelsize=6)
    groups, size = encoder.num_groups, encoder.spectral_patch_size
    share = attention[:, 0, encoder.num_prefix_tokens:].mean(0).numpy() * groups
    middle = [nm[i * size:(i + 1) * size].mean() for i in range(groups)]
    right = axis.twinx()
    right.bar(middle, share, width=0.8 * np.ptp(nm) / groups, color='#e69f00', alpha=0.6)
    right.set_ylim(0, max(2.0, 1.1 * share.max()))
    right.set_ylabel('attention, 1 = even', fontsize=7, color='#a65000')
    right.tick_params(labelsize=6)


# ============ the images ============

def read_images(encoder, path, unit):
    """-> images by name, as cut_middle() gives them, and the meta of their data. What a scene at
    --image does not tell is as in the data of the encoder, whose file is `path`."""
    if image:
        # read as the tiler was told to read the scenes of the encoder
        settings = encoder.meta.get('settings', {})
        asked = {name: settings[name] for name in HOW_READ if name in settings}
        scene = read_scene(image, **asked)
        print('\n  '.join([f'{image}:', *scene.notes]))
        meta = {**encoder.meta, 'num_bands': len(scene.cube), 'components': None,
                'scale': scene.scale}
        meta['wavelengths_nm'] = scene.wavelengths_nm or meta['wavelengths_nm']
        meta['nodata'] = meta['nodata'] if scene.nodata is None else scene.nodata
        cubes = {os.path.splitext(os.path.basename(image))[0]: scene.cube}
    else:
        directory = data or tiles_of(encoder, path)
        demo_if_missing(directory)
        chosen = Tiles(directory, split)
        meta = chosen.meta
        ids = numbers('tiles', tiles)
        if max(ids) >= len(chosen):
            raise UserError(f'--tiles={tiles}: {directory} has tiles 0 to {len(chosen) - 1} in '
                            f'{split}')
        cubes = {f'tile{i}': chosen.images[i] for i in ids}
    return {name: cut_middle(name, cubes[name], meta['nodata'], unit) for name in cubes}, meta


def cut_middle(name, cube, nodata, unit):
    """cube (C, H, W) -> its middle, of --window px at most, sides a multiple of `unit` px; missing
    pixels are NaN"""
    H, W = [min(side, window or side) for side in cube.shape[1:]]
    if min(H, W) < unit:
        raise UserError(f'{name}: {H} x {W} pixels hold no patch of {unit}: give a larger image or '
                        '--window')
    H, W = H // unit * unit, W // unit * unit
    top, left = (cube.shape[1] - H) // 2, (cube.shape[2] - W) // 2
    raw = cube[:, top:top + H, left:left + W]
    return np.where(valid_pixels(raw, nodata), raw, np.nan).astype(np.float32)


def numbers(flag, text):
    """'20,40' -> [20, 40]"""
    if not re.fullmatch(r'\d+(,\d+)*', text):
        raise UserError(f'--{flag}={text}: give whole numbers separated by commas, as 20,40')
    return [int(word) for word in text.split(',')]


if __name__ == '__main__':
    plain_errors()
    read_flags(globals())
    paths = encoders.split(',')
    loaded = [load_encoder(path) for path in paths]
    names = [os.path.basename(os.path.dirname(path)) or path for path in paths]
    unit = int(np.lcm.reduce([encoder.patch_size for encoder in loaded]))  # whole patches for all
    images, meta = read_images(loaded[0], paths[0], unit)
    meta = {**meta, 'nodata': None}  # missing pixels are NaN now
    tiled_how = meta.get('settings', {}).get('normalize')
    for path, encoder in zip(paths, loaded):
        check_bands(encoder.meta, meta, path)
        encoder.meta['nodata'] = None
        trained_how = encoder.meta.get('settings', {}).get('normalize')
        if image and trained_how == 'scene':
            raise UserError(f'--image={image}: {path} was trained on standardised scenes: '
                            'tile this one with --normalize=scene, '
                            'and pass the tiles as --data')
        differ = trained_how != tiled_how
        if not image and differ and 'scene' in (trained_how, tiled_how):
            raise UserError(f'--data={data}: {path} was trained on tiles of '
                            f'--normalize={trained_how}: give such tiles')
        own, learned = meta.get('scale'), encoder.meta.get('scale')
        if own and learned and tuple(own) != tuple(learned):
            raise UserError(f'{image or data}: the values have another scale than those that '
                            f'{path} was trained on: give them in the same units')
        depth = len(encoder.blocks)
        if not -depth <= block < depth:
            raise UserError(f'--block={block}: {path} has blocks 0 to {depth - 1}, or -1 for the '
                            'last')
    os.makedirs(out_dir, exist_ok=True)
    for name, raw in images.items():
        _, H, W = raw.shape
        pixel = numbers('query', query) if query else [H // 2, W // 2]
        if len(pixel) != 2 or pixel[0] >= H or pixel[1] >= W:
            raise UserError(f'--query={query}: give row,column of a pixel of {name}, which has '
                            f'{H} x {W}')
        path = os.path.join(out_dir, f'attention_{name}.png')
        draw(path, raw, names, loaded, meta, pixel)
        print(path)
