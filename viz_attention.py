"""What an encoder looks at: attention of the cls token and of a chosen patch, features as colours, attention over wavelengths.

For each tile one picture, for each encoder a row (the dissertation's Fig. 5.5). Attention is softmax(q k' / sqrt(hd)) of one block; a head's map is the
row of the cls token (or of the patch at --query) without the columns of cls and registers. Colours are the three leading principal
components of the patch tokens (DINOv2, arXiv 2304.07193, Fig. 1). An image may be larger than the encoder's: its positions are interpolated.

    python viz_attention.py --encoders=runs/demo/last.pt                              # the demo's tiles 0 and 1
    python viz_attention.py --encoders=runs/mae/last.pt,runs/dino/last.pt --data=data/mine --tiles=3,17 --query=20,40
    python viz_attention.py --encoders=runs/dino/last.pt --data=data/mine --image=scene.tif

Reads a tile directory (its statistics standardise the image too). Writes out_dir/attention_*.png.
"""
import argparse
import os
import re

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data import (UserError, Tiles, at_bands, demo_if_missing, false_color, plain_errors, principal_colors, read_scene, save_figure, standardization,
                  standardize, to_bands, valid_pixels)
from models import encoder_bands, load_encoder

encoders = 'runs/demo/last.pt'  # last.pt of one or several pre-training runs, or public files (MAE, DINOv2), separated by commas: a row each
patch_size = 8  # of public files, adapted to it
whiten = 0  # of public files: 0 = each band to mean 0, std 1, or so many components (a run of ours brings its own)
rgb_kernels = 'wavelength'  # how a public file's 3 kernels reach our bands: wavelength (mixture of the nearest in nm), repeat (their mean) or fresh
data = 'data/demo'  # tile directory
split = 'tr'  # which of its tiles: tr, val or ts
tiles = '0,1'  # numbers of tiles, separated by commas: a picture each
image = ''  # a scene file instead of tiles, of the same bands
max_side = 256  # an image is cut to this many pixels a side (attention grows with the square of the number of patches)
window = 0  # cut the middle of this many pixels out of each tile, the encoder's own img_size for instance; 0 = the whole tile
block = -1  # block whose attention is shown: 0 = the first, -1 = the last
heads = 4  # at most so many heads, each in a column, beside their mean
query = ''  # pixel whose patch asks: row,column; '' = the middle of the image
out_dir = 'runs/attention'  # where the pictures go


# ---- boilerplate: overrides (the same lines in every script; tests/test_style.py checks) ----
def override_constants():
    """Set this file's constants from `--name=value`; the comment behind a constant is its --help text."""
    def boolean(text):
        return bool(('false', 'true').index(text.lower()))
    parser = argparse.ArgumentParser(description=__doc__, usage='%(prog)s [--name=value ...]', allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in re.findall(r'^(\w+) = .*?  # (.*)$', open(__file__, encoding='utf-8').read(), re.M):
        value = globals()[name]
        kind = dict(type=boolean, nargs='?', const=True) if isinstance(value, bool) else dict(type=type(value))
        parser.add_argument(f'--{name}', default=value, metavar=repr(value), help=comment.replace('%', '%%'), **kind)
    config = vars(parser.parse_args())
    globals().update(config)
    return config
# ---- end of boilerplate: overrides ----


def capture(encoder, x, block, tokens=slice(None)):
    """x (1, C, H, W) -> attention of one block (nh, T, T), of its spectral stream (nh, 1 + R + G, 1 + R + G) or None, patch features (h, w, D).
    `tokens`: of the first only these rows, since all of them take gigabytes for a large image."""
    seen = {}

    def keep(name):
        def hook(module, args):  # args[0] is what this attention layer sees
            q, k, _ = module.heads(args[0])
            seen[name] = module.weights(q[:, :, tokens] if name == 'blocks' else q, k)[0]
        return hook
    hooks = [getattr(encoder, name)[block].attn.register_forward_pre_hook(keep(name)) for name in ('blocks', 'spectral_blocks') if hasattr(encoder, name)]
    with torch.no_grad():
        features = encoder.get_intermediate_layers(x, 1)[0][0].permute(1, 2, 0)
    for hook in hooks:
        hook.remove()
    return seen['blocks'], seen.get('spectral_blocks'), features


def patch_maps(attention, token, num_prefix_tokens, h, w):
    """attention (nh, T, T) -> what `token` takes from the patches, (nh, h, w), times their number: 1 = what it takes on average"""
    return attention[:, token, num_prefix_tokens:].reshape(-1, h, w) * h * w


def draw(path, raw, named_encoders, meta, block, heads, query):
    """One picture of one image: raw (C, H, W), named_encoders: list of (name, encoder); query (row, column) in pixels"""
    (H, W), spectral = raw.shape[1:], any(hasattr(encoder, 'spectral_blocks') for _, encoder in named_encoders)
    shown_heads = min(heads, max(encoder.blocks[0].attn.num_heads for _, encoder in named_encoders))
    titles = ['false colour', 'cls,\nall heads'] + [f'cls,\nhead {i + 1}' for i in range(shown_heads)] + ['chosen\npatch', 'features']
    widths = [1] * len(titles) + [2] * spectral
    side = min(9 / sum(widths), 1.8)
    figure = Figure(figsize=(9, (side * min(H / W, 2) + 0.3) * len(named_encoders) + 0.8), layout='constrained')
    axes = figure.subplots(len(named_encoders), len(widths), squeeze=False, width_ratios=widths)
    for row, (name, encoder) in zip(axes, named_encoders):
        own_meta, weights = at_bands(meta, encoder_bands(encoder, meta, name), name)
        own = to_bands(torch.from_numpy(raw[None].astype(np.float32)), weights, meta['nodata'])  # at the encoder's bands
        mean, matrix = standardization(own_meta, encoder.config['whiten'], encoder.config.get('components'))
        x = standardize(own, mean, matrix, own_meta['nodata'])
        P, prefix, (h, w) = encoder.patch_size, encoder.num_prefix_tokens, (side // encoder.patch_size for side in (H, W))
        attention, spectral_attention, features = capture(encoder, x, block, [0, prefix + query[0] // P * w + query[1] // P])
        cls, asked = patch_maps(attention, 0, prefix, h, w), patch_maps(attention, 1, prefix, h, w).mean(0)
        row[0].imshow(false_color(raw, meta), extent=(0, W, H, 0))
        row[0].add_patch(Rectangle((query[1] // P * P, query[0] // P * P), P, P, fill=False, color='red', linewidth=1.5))
        row[0].set_ylabel(f'{name}\n{H} x {W} px', fontsize=8)
        for axis, values in zip(row[1:], [cls.mean(0), *cls[:shown_heads], *[None] * (shown_heads - len(cls)), asked]):
            if values is None:
                axis.axis('off')
                continue
            axis.imshow(values, cmap='viridis', norm=PowerNorm(0.5, 0, float(values.flatten().quantile(0.99))), extent=(0, W, H, 0), interpolation='nearest')
            axis.set_xlabel(f'max. {values.max():.1f}', fontsize=7)
        row[len(titles) - 2].add_patch(Rectangle((query[1] // P * P, query[0] // P * P), P, P, fill=False, color='red', linewidth=1))
        row[len(titles) - 1].imshow(principal_colors(features), extent=(0, W, H, 0), interpolation='nearest')
        for axis in row[:len(titles)]:
            axis.set(xticks=[], yticks=[])
        if spectral_attention is not None:
            draw_spectrum(row[-1], own[0].numpy(), own_meta, encoder, spectral_attention)
        elif spectral:
            row[-1].axis('off')
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.supxlabel('Attention: 1 = the average over all patches; dark = 0, yellow = its 99 % quantile or more, square root between.\n'
                     'Chosen patch: red. Features: three principal components.', fontsize=8)
    save_figure(figure, path)


def draw_spectrum(axis, raw, meta, encoder, attention):
    """The image's mean spectrum, and what the cls token of the encoder's spectral stream takes from each band group"""
    nm = np.array(meta['wavelengths_nm'] or range(len(raw)), float)
    order = np.argsort(nm)
    valid = valid_pixels(raw, meta['nodata'])
    axis.plot(nm[order], raw[:, valid].mean(1)[order], color='black', linewidth=1)
    axis.set_xlabel('wavelength, nm' if meta['wavelengths_nm'] else 'band', fontsize=7)
    axis.set_ylabel('mean value', fontsize=7)
    axis.tick_params(labelsize=6)
    groups, size = encoder.num_groups, encoder.spectral_patch_size
    share = attention[:, 0, encoder.num_prefix_tokens:].mean(0).numpy() * groups
    middle = [nm[i * size:(i + 1) * size].mean() for i in range(groups)]
    right = axis.twinx()
    right.bar(middle, share, width=0.8 * np.abs(np.diff(middle)).min() if groups > 1 else 1, color='#e69f00', alpha=0.6)
    right.set_ylim(0, max(2.0, 1.1 * share.max()))
    right.tick_params(labelsize=6)
    right.set_ylabel('attention, 1 = average', fontsize=7, color='#a65000')


if __name__ == '__main__':
    plain_errors()
    override_constants()
    demo_if_missing(data)
    chosen = Tiles(data, split)
    meta = chosen.meta
    paths = encoders.split(',')
    names = [os.path.basename(os.path.dirname(path)) or path for path in paths]
    loaded = [load_encoder(path, 0, patch_size, meta['num_bands'], meta['wavelengths_nm'], rgb_kernels, whiten) for path in paths]
    for path, encoder in zip(paths, loaded):
        encoder_bands(encoder, meta, path)  # raises where the data cannot be brought to them
        if not -len(encoder.blocks) <= block < len(encoder.blocks):
            raise UserError(f'--block={block}: {path} has blocks 0 to {len(encoder.blocks) - 1}, or -1 for the last')
    if image:
        scene = read_scene(image)
        if len(scene.cube) != meta['num_bands']:
            raise UserError(f'{image}: has {len(scene.cube)} bands, {data} has {meta["num_bands"]}: give an image of the same bands')
        images = {os.path.splitext(os.path.basename(image))[0]: scene.cube[:, :max_side, :max_side]}
        meta = {**meta, 'nodata': meta['nodata'] if scene.nodata is None else scene.nodata}
    else:
        if not re.fullmatch(r'\d+(,\d+)*', tiles) or max(map(int, tiles.split(','))) >= len(chosen):
            raise UserError(f'--tiles={tiles}: give numbers from 0 to {len(chosen) - 1}, separated by commas')
        images = {f'tile{i}': np.array(chosen.images[int(i)]) for i in tiles.split(',')}
    os.makedirs(out_dir, exist_ok=True)
    unit = int(np.lcm.reduce([encoder.patch_size for encoder in loaded]))  # sides that every encoder can cut into patches
    for name, raw in images.items():
        H, W = (min(side, window or side) // unit * unit for side in raw.shape[1:])
        if not H or not W:
            raise UserError(f'{name}: an image of {raw.shape[1]} x {raw.shape[2]} pixels holds no patch of {unit}: give a larger one')
        top, left = (raw.shape[1] - H) // 2, (raw.shape[2] - W) // 2
        raw = raw[:, top:top + H, left:left + W]
        if query and not re.fullmatch(r'\d+,\d+', query):
            raise UserError(f'--query={query}: give a pixel as row,column, for instance 20,40')
        pixel = tuple(map(int, query.split(','))) if query else (H // 2, W // 2)
        if pixel[0] >= H or pixel[1] >= W:
            raise UserError(f'--query={query}: lies outside of {name}, {H} x {W} pixels: give row,column inside')
        path = os.path.join(out_dir, f'attention_{name}.png')
        draw(path, raw, list(zip(names, loaded)), meta, block, heads, pixel)
        print(path)
