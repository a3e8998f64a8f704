"""Map a scene of any size with what a run of segment.py or baseline_deeplab.py learned.

    python tools/map_scene.py --run=runs/segment --scene=scene.tif --out=map.tif

Overlapping windows are classified and blended smoothly, one row of windows after the other: memory
does not grow with the height of the scene. Other wavelengths are resampled to the model's.

Writes a GeoTIFF of class numbers (0 = missing pixel) with the scene's georeference and the colours
of the classes; beside it their names (map.json) and a picture (map.png). With --probabilities=p.tif
also the probability of each class (255 = certain).
"""
import argparse
import math
import os
import sys
import time

import numpy as np
import tifffile
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import (add_statistics, class_colors, class_legend, false_color_bands, plain_errors,
                  save_figure, show_classes, sliding_window, write_json)
from models import load_segmenter, native_bfloat16
from scenes import (UserError, band_matrix, parse_bands, read_scene, same_bands,
                    valid_pixels)


def read_flags():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', default='runs/segment', help='the run directory: its best.pt maps')
    parser.add_argument('--scene', required=True, help='scene file of any size')
    parser.add_argument('--out', default='map.tif', help='GeoTIFF of class numbers to write')
    parser.add_argument('--probabilities', default='', help='GeoTIFF of probabilities to write')
    parser.add_argument('--overlap', type=float, default=0.5,
                        help='of the windows that are blended, as a share of their side')
    return parser.parse_args()


def check_names(scene, out, probabilities):
    """The names of the files to write must not do harm"""
    names = [name for name in (scene, out, probabilities) if name]
    for name in names[1:]:
        if not name.lower().endswith(('.tif', '.tiff')):
            raise UserError(f'{name}: the map is a GeoTIFF: choose a name that ends in .tif')
    if len({os.path.abspath(name) for name in names}) < len(names):
        raise UserError(f'{out}: scene, map and probabilities need names of their own: change '
                        '--out or --probabilities')


# ============ from the scene's values to the model's ============

def open_scene(path, meta):
    """-> the Scene, on disk where possible, and the function that brings its values to the model's:
    what `python data.py tile` did to the training data, with its --bands, --normalize and --pca"""
    scene = read_scene(path, mmap=True)
    if scene.nodata is None:
        scene = scene._replace(nodata=meta['nodata'])
    settings = meta.get('settings', {})
    wanted_nm, width_nm = meta['wavelengths_nm'], 15.0
    if settings.get('bands'):
        wanted_nm, width_nm = parse_bands(settings['bands'])
    components = np.array(meta.get('components') or np.eye(meta['num_bands']))
    wanted = components.shape[1]

    # all of it is linear: weights @ x + offset
    C = len(scene.cube)
    weights, offset = np.eye(C), np.zeros(wanted)
    nm_known = scene.wavelengths_nm is not None and wanted_nm is not None
    if nm_known and not same_bands(scene.wavelengths_nm, wanted_nm):
        print(f'{path}: {C} bands are resampled to the {wanted} of the model')
        weights = band_matrix(scene.wavelengths_nm, wanted_nm, width_nm, path)
    elif C != wanted:
        raise UserError(f'{path}: has {C} bands, the model was trained on {wanted}, and without '
                        'wavelengths on both sides nobody knows which is which: give a scene of '
                        'the same bands')
    if settings.get('normalize') == 'scene':
        mean, covariance = statistics(scene, path)
        std = np.sqrt((weights @ covariance @ weights.T).diagonal())
        weights = weights / np.where(std > 0, std, 1)[:, None]
        offset = -weights @ mean
    weights = (components @ weights).astype(np.float32)  # (C', C)
    offset = (components @ offset).astype(np.float32)[:, None]

    def to_model(x):
        """(B, C, h, w) of the scene -> (B, C', h, w) float32; a missing pixel becomes NaN, which
        every later step knows"""
        B, _, h, w = x.shape
        valid = valid_pixels(x, scene.nodata)[:, None]
        x = np.where(valid, x, 0).astype(np.float32).reshape(B, C, h * w)
        x = (weights @ x + offset).reshape(B, -1, h, w)
        return np.where(valid, x, np.float32(np.nan))
    return scene, to_model


def statistics(scene, path):
    """-> mean (C,) and covariance (C, C) of the scene's valid pixels, read strip by strip"""
    sums = {'pixels': 0, 'valid': 0}
    add_statistics(sums, scene.cube, scene.nodata)
    if sums['valid'] == 0:
        raise UserError(f'{path}: no valid pixel, all are NaN or nodata: nothing can be mapped')
    mean = np.array(sums['sum']) / sums['valid']  # without the `shift` that is taken from all
    covariance = np.array(sums['outer']) / sums['valid'] - np.outer(mean, mean)
    return mean + sums['shift'], covariance


def units_warning(scene, to_model, meta):
    """A sentence where the scene's values lie far from those the model was trained on, else ''.

    Looks at about 100 x 100 pixels, band by band: a mean more than 4 standard deviations off, or
    values spread 5 times more or less. Half of the bands must be so: other units show in all.
    """
    step = math.ceil(max(scene.cube.shape[1:]) / 100)
    sample = np.asarray(scene.cube[:, ::step, ::step])
    x = to_model(sample[None])[0].astype(np.float64)
    x = x[:, np.isfinite(x).all(0)]  # (C', n)
    if x.shape[1] == 0:
        return ''
    mean, std = x.mean(1), x.std(1)
    model_mean, model_std = np.array(meta['mean']), np.array(meta['std'])
    model_std = model_std.clip(min=1e-6 * model_std.max())
    shift = np.abs(mean - model_mean) / model_std
    spread = std / model_std
    far = (shift > 4) | (spread > 5) | (spread < 1 / 5)
    if 2 * far.sum() < len(far):
        return ''
    return (f'WARNING: in {far.sum()} of {len(far)} bands the values lie far from those the model '
            f'was trained on. Over all bands their mean is {mean.mean():.4g} (deviation '
            f'{std.mean():.4g}), that of the training data {model_mean.mean():.4g} (deviation '
            f'{model_std.mean():.4g}): are they in the same units?')


# ============ the map ============

def map_scene(predict, path, meta, window, overlap, out, probabilities=''):
    """Classify the scene at `path` by blended windows; write `out` and what belongs to it.

    predict(raw (B, C, window, window)) -> probabilities (B, K, window, window), of the bands that
    `meta` tells of (the training data's). The files appear under their names when complete.
    """
    check_names(path, out, probabilities)
    if not 0 <= overlap < 1:
        raise UserError(f'--overlap={overlap}: choose a share of the window from 0 to below 1')
    scene, to_model = open_scene(path, meta)
    _, H, W = scene.cube.shape
    warning = units_warning(scene, to_model, meta)
    if warning:
        print(f'{path}: {warning}')

    # both GeoTIFFs in full size, on disk under temporary names
    started = time.time()
    K = meta['num_classes']
    colors = np.zeros((3, 256), np.uint16)
    colors[:, :K + 1] = class_colors(meta['class_names']).T.astype(np.uint16) * 257
    nodata_is_0 = (42113, 's', 0, '0', True)  # GDAL_NODATA
    classes = new_tiff(out, scene.geotags + (nodata_is_0,), shape=(H, W), photometric='palette',
                       colormap=colors)
    if probabilities:
        layout = dict(planarconfig='separate') if K > 1 else {}
        shares = new_tiff(probabilities, scene.geotags, shape=(K, H, W), photometric='minisblack',
                          **layout)

    def classify(raw):
        return predict(torch.from_numpy(to_model(raw.numpy())))

    # from top to bottom; rows come when no further window touches them
    stride = max(1, round(window * (1 - overlap)))
    with tqdm(total=H, unit='row') as bar:
        for top, probs in sliding_window(classify, scene.cube, window, stride, K):
            rows = slice(top, top + probs.shape[1])
            valid = valid_pixels(np.asarray(scene.cube[:, rows]), scene.nodata)
            classes[rows] = np.where(valid, probs.argmax(0) + 1, 0)
            if probabilities:
                shares[:, rows] = np.where(valid, np.round(255 * probs), 0)
            bar.update(probs.shape[1])

    # the final names, then what belongs to the map
    step = picture_step(scene)
    thin_classes = np.array(classes[::step, ::step])
    classes.flush()
    del classes  # Windows renames no file that is mapped
    os.replace(out + '.tmp', out)
    if probabilities:
        shares.flush()
        del shares
        os.replace(probabilities + '.tmp', probabilities)
    stem = os.path.splitext(out)[0]
    write_json(stem + '.json', {str(k): name for k, name in enumerate(meta['class_names'], 1)})
    save_picture(stem + '.png', scene, thin_classes, meta)
    print(f'{out}: {H} x {W} pixels in {time.time() - started:.0f} s{place_note(scene.geotags)}')


def new_tiff(path, geotags, **layout):
    """A GeoTIFF of uint8 that is to be filled: an array on disk, path + '.tmp'"""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    extratags = [(*tag[:4], True) for tag in geotags]
    return tifffile.memmap(path + '.tmp', dtype=np.uint8, extratags=extratags, metadata=None,
                           **layout)


def place_note(geotags):
    """What is to be said about where the map lies: '' when it lies where the scene does"""
    codes = [tag[0] for tag in geotags]
    if not codes:
        return '; no georeference: the scene has none (GeoTIFF and ENVI files can have one)'
    if 34735 not in codes:  # the keys of a coordinate system
        return '; placed as the scene is, but no coordinate system that is known here was found'
    return ''


# ============ its picture ============

def picture_step(scene, max_side=600):
    """Of a large scene the picture reads and shows every step-th row and column"""
    return math.ceil(max(scene.cube.shape[1:]) / max_side)


def save_picture(path, scene, classes, meta):
    """The scene in false colour, its labels if it has some, and the map: every step-th pixel of
    its classes"""
    _, H, W = scene.cube.shape
    step = picture_step(scene)
    names = meta['class_names']
    panels = {'map': classes}
    if scene.labels is not None and scene.labels.any():
        panels = {'labels': scene.labels[::step, ::step], 'map': classes}

    # side by side, or a wide scene one below the other
    rows, columns = (1 + len(panels), 1) if W > 2 * H else (1, 1 + len(panels))
    height = min(9 / columns * H / W, 9) * rows + 0.3 * rows + 0.7
    figure = Figure(figsize=(9, height), layout='constrained')
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()

    # axes count the pixels of the scene, whatever the step
    rgb = thin_false_color(scene, step, meta['wavelengths_nm'])
    axes[0].imshow(rgb, interpolation='nearest',
                   extent=(0, rgb.shape[1] * step, rgb.shape[0] * step, 0))
    axes[0].set_title('false colour', fontsize=10)
    axes[0].set_ylabel('row, px', fontsize=8)
    for axis, (title, numbers) in zip(axes[1:], panels.items()):
        show_classes(axis, numbers, names, step)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.set_xlabel('column, px', fontsize=8)
    present = {int(k) for numbers in panels.values() for k in np.unique(numbers)}
    class_legend(figure, names, present)
    save_figure(figure, path)


def thin_false_color(scene, step, model_nm):
    """Every step-th pixel (h, w, 3) in 0..1: three bands, each its mean ± 2 standard deviations"""
    num_bands = len(scene.cube)
    nm = scene.wavelengths_nm
    if nm is None and model_nm and len(model_nm) == num_bands:
        nm = model_nm
    bands = false_color_bands(nm, num_bands)
    x = np.asarray(scene.cube[:, ::step, ::step][bands], np.float32)
    valid = valid_pixels(x, scene.nodata)
    if valid.any():
        mean = x[:, valid].mean(1)[:, None, None]
        std = x[:, valid].std(1).clip(min=1e-6)[:, None, None]
        x = (x - mean) / (4 * std) + 0.5
    return np.where(valid, x, 0).clip(0, 1).transpose(1, 2, 0)


if __name__ == '__main__':
    plain_errors()
    flags = read_flags()
    network = load_segmenter(os.path.join(flags.run, 'best.pt'))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    network.to(device)
    use_bfloat16 = native_bfloat16(device)

    @torch.no_grad()
    def predict(raw):
        x = network.prepare(raw.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
            return network(x).float().softmax(1)

    map_scene(predict, flags.scene, network.meta, network.window, flags.overlap, flags.out,
              flags.probabilities)
