"""Map a scene of any size with what a run of segment.py or baseline_deeplab.py learned.

    python tools/map_scene.py --run=runs/segment --scene=scene.tif --out=map.tif

Overlapping windows are classified and blended smoothly, one row of windows after the other: memory
does not grow with the height of the scene. Other wavelengths are resampled to the model's.

Writes a GeoTIFF of class numbers (0 = missing pixel) with the scene's georeference and the colours
of the classes; beside it their names (map.json) and a picture (map.png). With --probabilities=p.tif
also the probability of each class (255 = certain).
"""
import argparse
import errno
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
from data import (boolean, class_colors, class_legend, false_color, false_color_bands, plain_errors,
                  read_json, save_figure, show_classes, sliding_window, write_json)
from models import load_segmenter, native_bfloat16
from scenes import (UserError, band_matrix, mix_bands, name_bands, normalized, parse_bands,
                    read_scene, same_bands, split_name, strips, take_bands, valid_pixels,
                    when_read)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag('--run', default='runs/segment', help='the run directory: its best.pt maps')
    flag('--scene', required=True, help='scene file of any size')
    flag('--out', default='map.tif', help='GeoTIFF of class numbers to write')
    flag('--probabilities', default='', help='GeoTIFF of probabilities to write')
    flag('--overlap', type=float, default=0.5,
         help='of the windows that are blended, as a share of their side')
    same = 'as python data.py tile has it'
    flag('--axes', default='', help=same)
    flag('--nodata', type=float, help=same)
    flag('--drop_bands', default='', help=same)
    flag('--keep_bad_bands', type=boolean, nargs='?', const=True, default=False, help=same)
    flags = parser.parse_args(argv)

    # refuse names that would overwrite the scene or each other
    if not 0 <= flags.overlap < 1:
        raise UserError(f'--overlap={flags.overlap}: choose a share from 0 to below 1')
    names = [split_name(flags.scene)[0], flags.out, flags.probabilities]
    for name in filter(None, names[1:]):
        if not name.lower().endswith(('.tif', '.tiff')):
            raise UserError(f'{name}: the map is a GeoTIFF: choose a name that ends in .tif')
    if len({os.path.abspath(name) for name in names}) < 3:
        raise UserError(f'{flags.out}: scene, map and probabilities need names of their own: '
                        'change --out or --probabilities')
    refuse_strangers(flags.out, flags.probabilities)
    return flags


def refuse_strangers(out, probabilities):
    """Only the files of an earlier map are replaced, which has its class numbers in map.json"""
    stem = os.path.splitext(out)[0]
    names = [name for name in (stem + '.json', stem + '.png', out, probabilities)
             if name and os.path.exists(name)]
    try:
        earlier = read_json(stem + '.json') if names else {}
    except (OSError, ValueError, UserError):
        earlier = {}
    is_map = isinstance(earlier, dict) and earlier and all(key.isdigit() for key in earlier)
    if names and not is_map:
        raise UserError(f'{names[0]}: is there already, and no earlier map wrote it: choose '
                        'another --out, or remove it')


# ============ from the scene to what the model was trained on ============

def open_scene(flags, meta):
    """-> the Scene in float32, missing pixels NaN, as `python data.py tile` brought the training
    data to the bands and values of the model: a cube on disk stays there. Prints what was read."""
    scene = read_scene(flags.scene, '', True, flags.axes, flags.nodata, flags.drop_bands,
                       flags.keep_bad_bands)
    print('\n  '.join([f'{flags.scene}:', *scene.notes]))
    # nodata: as the file states it, else as the training data had it, in files of the same type
    settings = meta.get('settings', {})
    per_scene = settings.get('normalize') == 'scene'
    asked_nodata = settings.get('nodata')
    training_nodata = asked_nodata if meta['nodata'] is None else meta['nodata']
    changed = settings.get('bands') or settings.get('pca') or per_scene
    same_type = changed or scene.cube.dtype.name == meta.get('dtype')  # changed: not known
    if scene.nodata is None and training_nodata is not None and same_type:
        scene = scene._replace(nodata=training_nodata)
        print('  no nodata value is stated: taken is that of the training data, '
              f'{training_nodata:g}')
    if flags.nodata is None and asked_nodata not in (None, scene.nodata) and same_type:
        print(f'  WARNING: it states nodata {scene.nodata:g}, the training data were tiled with '
              f'--nodata={asked_nodata:g}: pass that here if it is the same kind of file')
    scene = match_bands(scene, meta, flags.scene)
    own, theirs = scene.scale, meta.get('scale')
    factor, shift = 1.0, 0.0
    if own and theirs and tuple(own) != tuple(theirs):
        factor, shift = own[0] / theirs[0], (own[1] - theirs[1]) / theirs[0]
        print(f'  {factor:g} * value + {shift:g} brings it to the units of the training data, as '
              'both state their scale')
    nodata = scene.nodata

    def values(x, rows, cols):
        converted = factor * x.astype(np.float32) + shift
        converted[:, ~valid_pixels(x, nodata)] = np.nan
        return converted
    scene = scene._replace(cube=when_read(scene.cube, values, np.float32), nodata=None)
    if per_scene:
        scene = normalized(scene)
    if meta.get('components'):
        scene = mix_bands(scene, meta['components'])
    return scene


def match_bands(scene, meta, path):
    """-> the Scene with the bands that the training data had before --pca: those that it has, by
    wavelength or number, or resampled"""
    nm, wanted_nm, fwhm = scene.wavelengths_nm, meta['wavelengths_nm'], 15.0
    resampled = meta.get('settings', {}).get('bands')  # so were the training data
    if resampled:
        wanted_nm, fwhm = parse_bands(resampled)
    if nm is None or wanted_nm is None:
        wanted = np.shape(meta.get('components') or np.eye(meta['num_bands']))[1]
        kept = bands_by_number(scene, wanted, meta, path)
    elif same_bands(nm, wanted_nm):
        return scene
    else:
        distance = np.abs(np.subtract.outer(wanted_nm, nm))  # (C', C)
        kept = distance.argmin(1)
        if resampled or distance.min(1).max() > 1:
            if not resampled:
                refuse_holes(nm, wanted_nm, path)
            print(f'  {len(nm)} bands are resampled to the {len(wanted_nm)} of the model')
            return mix_bands(scene, band_matrix(nm, wanted_nm, fwhm, path), list(wanted_nm))
    if list(kept) == list(range(len(scene.cube))):
        return scene
    print(f'  of its {len(scene.cube)} bands the {len(kept)} of the training data are used')
    return scene._replace(cube=take_bands(scene.cube, kept), wavelengths_nm=None)


def bands_by_number(scene, wanted, meta, path):
    """Without wavelengths: numbers of the scene's bands that are those of the training data, where
    the files have as many bands; or all, if they are as many as the model wants"""
    there = scene.bands or list(range(len(scene.cube)))
    needed = meta.get('bands') or list(range(wanted))
    if meta.get('settings', {}).get('bands'):
        raise UserError(f'{path}: states no wavelengths, and the training data were resampled by '
                        'theirs: give a file that states them, as .npz with wavelengths_nm')
    if (scene.file_bands or len(there)) == (meta.get('file_bands') or wanted):
        gone = sorted(set(needed) - set(there))
        if gone:
            raise UserError(f'{path}: the model needs {name_bands(gone, None)}, left out here (see '
                            'above): give a scene that has data there')
        return [there.index(band) for band in needed]
    if len(there) == wanted:
        return range(wanted)
    raise UserError(f'{path}: has {len(there)} bands, the model was trained on {wanted}, and '
                    'without wavelengths on both sides nobody knows which is which: give a scene '
                    'of the same bands')


def refuse_holes(nm, wanted_nm, path):
    """Refuses a scene that has no data where the model needs a band, since bands without data are
    left out: band_matrix() would interpolate over as much as 50 nm"""
    nm, wanted_nm = np.array(nm), np.array(wanted_nm)
    usual_step = np.median(np.diff(np.sort(nm))) if len(nm) > 1 else 0
    hole = np.abs(np.subtract.outer(wanted_nm, nm)).min(1) > max(0.75 * usual_step, 15)
    hole &= (nm.min() < wanted_nm) & (wanted_nm < nm.max())
    if hole.any():
        named = ', '.join(f'{wanted:.0f}' for wanted in wanted_nm[hole][:6])
        raise UserError(f'{path}: has no band with data near {named} nm, which the model needs: '
                        'give a scene that has')


def units_warning(scene, meta):
    """A sentence where the scene's values lie far from those the model was trained on, else ''.

    Looks at about 100 x 100 pixels, band by band. Far is a mean more than 4 standard deviations
    off, or both brightness and spread more than 4 times larger or smaller: a meadow alone has
    little spread, clouds have much. Half of the bands must be so: other units show in all.
    """
    step = math.ceil(max(scene.cube.shape[1:]) / 100)
    x = valid_spectra(scene.cube[:, ::step, ::step])
    if x.shape[1] < 100:  # little of the scene is valid: look at all of it
        everywhere = list(strips(scene.cube))
        most = math.ceil(10_000 / len(everywhere))  # pixels of a strip
        x = np.concatenate([valid_spectra(scene.cube[:, strip])[:, :most]
                            for strip in everywhere], 1)
    if x.shape[1] == 0:
        return ''
    mean, std = x.mean(1), x.std(1)
    model_mean, model_std = np.array(meta['mean']), np.array(meta['std'])
    model_std = model_std.clip(min=1e-6 * model_std.max())
    brightness = np.hypot(mean, std) / np.hypot(model_mean, model_std)
    spread = std / model_std
    far = np.abs(mean - model_mean) > 4 * model_std
    far |= np.minimum(brightness, spread) > 4
    far |= np.maximum(brightness, spread) < 1 / 4
    if 2 * far.sum() < len(far):
        return ''
    sentence = (f'WARNING: in {far.sum()} of {len(far)} bands the values lie far from those the '
                f'model was trained on. Over all bands their mean is {mean.mean():.4g} (deviation '
                f'{std.mean():.4g}), that of the training data {model_mean.mean():.4g} (deviation '
                f'{model_std.mean():.4g}): are they in the same units?')
    if bool(scene.scale) != bool(meta.get('scale')):
        who, scale = ('scene', scene.scale) if scene.scale else ('training data', meta['scale'])
        sentence += f' Only the {who} state a scale: {scale[0]:g} * value + {scale[1]:g}.'
    return sentence


def valid_spectra(x):
    """(C, h, w) with NaN for missing -> (C, n) float64"""
    return x[:, np.isfinite(x).all(0)].astype(np.float64)


# ============ the map ============

def map_scene(predict, flags, meta, window):
    """Classify the scene by blended windows; write --out and what belongs to it.

    predict(raw (B, C, window, window)) -> probabilities (B, K, window, window), of the bands that
    `meta` tells of (the training data's). The files appear under their names when complete.
    -> False where the map cannot be right.
    """
    out, probabilities = flags.out, flags.probabilities
    scene = open_scene(flags, meta)
    warning = units_warning(scene, meta)
    if warning:
        print(f'{flags.scene}: {warning}')
    _, H, W = scene.cube.shape

    # both GeoTIFFs in full size, on disk under temporary names
    started = time.time()
    K = meta['num_classes']
    colors = np.zeros((3, 256), np.uint16)
    # 0..255 -> 0..65535, as TIFF's colour maps are
    colors[:, :K + 1] = class_colors(meta).T.astype(np.uint16) * 257
    nodata_is_0 = (42113, 's', 0, '0', True)  # GDAL_NODATA
    classes = new_tiff(out, scene.geotags + (nodata_is_0,), shape=(H, W), photometric='palette',
                       colormap=colors)
    if probabilities:
        shares = new_tiff(probabilities, scene.geotags, shape=(K, H, W), photometric='minisblack',
                          planarconfig='separate')

    # from top to bottom; rows come when no further window touches them
    stride = max(1, round(window * (1 - flags.overlap)))
    pixels = np.zeros(K + 1, np.int64)  # of each class
    with tqdm(total=H, unit='row') as bar:
        for top, probs in sliding_window(predict, scene.cube, window, stride, K):
            rows = slice(top, top + probs.shape[1])
            valid = np.concatenate([np.isfinite(scene.cube[:, strip]).all(0)
                                    for strip in strips(scene.cube, rows)])
            classes[rows] = np.where(valid, probs.argmax(0) + 1, 0)
            pixels += np.bincount(classes[rows].ravel(), minlength=K + 1)
            if probabilities:
                shares[:, rows] = np.where(valid, np.round(255 * probs), 0)
            bar.update(probs.shape[1])

    # the final names, then what belongs to the map
    step = math.ceil(max(H, W) / 600)  # of a large scene the picture shows every step-th pixel
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
    scene = scene._replace(labels=labels_to_draw(scene, meta))
    save_picture(stem + '.png', scene, thin_classes, step, meta)
    print(f'{out}: {H} x {W} pixels in {time.time() - started:.0f} s')
    present = np.flatnonzero(pixels[1:])
    if len(present) == 1:
        print(f'WARNING: every pixel became class {present[0] + 1}, '
              f'{meta["class_names"][present[0]]}')
    return not (warning and len(present) == 1)


def new_tiff(path, geotags, **layout):
    """A GeoTIFF of uint8 that is to be filled: an array on disk, path + '.tmp'"""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    extratags = [(*tag[:4], True) for tag in geotags]
    array = tifffile.memmap(path + '.tmp', dtype=np.uint8, extratags=extratags, metadata=None,
                            **layout)
    if not hasattr(os, 'posix_fallocate'):
        return array
    try:  # a full disk would end the program at some later row, without a word
        with open(path + '.tmp', 'r+b') as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
    except OSError as error:
        os.remove(path + '.tmp')
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f'{path}: takes {array.nbytes / 1e9:.2g} GB, and the disk has not so much '
                        'left: make room, or choose another place') from None
    return array


# ============ its picture ============

def labels_to_draw(scene, meta):
    """The scene's labels where they mean the classes of the model, else None, which is said"""
    names, K = meta['class_names'], meta['num_classes']
    if scene.labels is None:
        return None
    if scene.labels.max() > K:
        print(f'the picture leaves out the labels of the scene: they go up to '
              f'{scene.labels.max()}, the model knows {K} classes')
        return None
    stated = names != [f'class {k}' for k in range(1, K + 1)]
    differ = any(own != theirs for own, theirs in zip(scene.class_names or [], names))
    if stated and differ:
        print('the picture leaves out the labels of the scene: its classes are '
              f'{", ".join(scene.class_names)}, those of the model {", ".join(names)}')
        return None
    return scene.labels


def save_picture(path, scene, classes, step, meta):
    """The scene in false colour, its labels if it has some, and the map: every step-th pixel of
    each; `classes` are thinned already"""
    _, H, W = scene.cube.shape
    panels = {'map': classes}
    if scene.labels is not None and scene.labels.any():
        panels = {'labels': scene.labels[::step, ::step], 'map': classes}

    # side by side, or a wide scene one below the other
    rows, columns = (1 + len(panels), 1) if W > 2 * H else (1, 1 + len(panels))
    height = min(9 / columns * H / W, 9) * rows + 0.3 * rows + 0.7
    figure = Figure(figsize=(9, height), layout='constrained')
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()

    # of a large scene three bands are in memory; axes count its pixels, whatever the step
    bands = false_color_bands(meta['wavelengths_nm'], len(scene.cube))
    rgb = false_color(scene.cube[bands, ::step, ::step], meta | {'nodata': None}, bands)
    axes[0].imshow(rgb, interpolation='nearest',
                   extent=(0, rgb.shape[1] * step, rgb.shape[0] * step, 0))
    axes[0].set_title('false colour', fontsize=10)
    axes[0].set_ylabel('row, px', fontsize=8)
    for axis, (title, numbers) in zip(axes[1:], panels.items()):
        show_classes(axis, numbers, meta, step)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.set_xlabel('column, px', fontsize=8)
    present = {int(k) for numbers in panels.values() for k in np.unique(numbers)}
    class_legend(figure, meta, present)
    save_figure(figure, path)


if __name__ == '__main__':
    plain_errors()
    flags = parse()
    network = load_segmenter(os.path.join(flags.run, 'best.pt'))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    network.to(device)
    use_bfloat16 = native_bfloat16(device)

    @torch.no_grad()
    def predict(raw):
        x = network.prepare(raw.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
            return network(x).float().softmax(1)

    meta = dict(network.meta)
    network.meta['nodata'] = None  # missing pixels come to it as NaN
    plausible = map_scene(predict, flags, meta, network.window)
    sys.exit(0 if plausible else 1)
