"""From scenes on disk to batches on the device: reading, tiling, labels and scores, augmentation, floors.

    python data.py demo                                                       # synthetic 32-band scenes, tiled into data/demo
    python data.py tile --root=scene.npz --out=data/scene --tile_size=64     # one scene, labels split by blocks
    python data.py tile --root=WHU-OHS --out=data/whu --tile_size=64         # a folder tr|val|ts / image|label
    python data.py check --data=data/scene                                    # the data set doctor: statistics, faults, floors

A tile directory holds {tr,val,ts}_images.npy (N, C, S, S) in the sensor's own type, {tr,val,ts}_labels.npy (N, S, S) uint8
(0 = unlabelled, classes from 1) and meta.json. Everything after that is memory-mapped: no worker processes, no file formats.
"""
import argparse
import contextlib
import csv
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

SPLITS = ('tr', 'val', 'ts')
OHS_NM = (466, 480, 500, 520, 536, 550, 566, 580, 596, 610, 626, 640, 656, 670, 686, 700,
          716, 730, 746, 760, 776, 790, 806, 820, 836, 850, 866, 880, 896, 910, 926, 940)  # band centres of the OHS satellites
BAND_SETS = {'ohs': ','.join(map(str, OHS_NM)),  # names for --bands; a width (FWHM) behind each centre, where it is not 15 nm
             'landsat': '485:70,560:80,660:60,830:140,1650:200,2215:270'}  # the six reflective bands of Landsat 5 and 7
OHS_CLASSES = ('Paddy field', 'Dry farm', 'Woodland', 'Shrubbery', 'Sparse woodland', 'Other forest land',
               'High-covered grassland', 'Medium-covered grassland', 'Low-covered grassland', 'River canal', 'Lake',
               'Reservoir pond', 'Beach land', 'Shoal', 'Urban built-up', 'Rural settlement', 'Other construction land', 'Sand',
               'Gobi', 'Saline-alkali soil', 'Marshland', 'Bare land', 'Bare rock', 'Ocean')


class UserError(ValueError):
    """A user's mistake or a bad file, as one sentence: where, what, what to do. The scripts print it without a traceback."""


# ============ labels and scores ============

IGNORE_INDEX = 255


def label_to_class(raw):
    """Raw labels (0 = unlabelled, classes from 1) -> class indices: k -> k - 1, 0 -> 255 (ignored). Nothing else touches labels."""
    return torch.where(raw == 0, IGNORE_INDEX, raw.long() - 1)


def confusion_matrix(pred, target, num_classes):
    """pred, target: class indices of the same shape, target 255 ignored -> (K, K) int64 counts, rows = target, columns = prediction"""
    known = target != IGNORE_INDEX
    pairs = target[known].long() * num_classes + pred[known].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(cm):
    """(K, K) confusion matrix (rows = target) -> dict of fractions.

    `miou` is over the classes present in the targets (the convention of WHU-OHS and of most papers), `miou_all` over all K with
    absent classes as 0; `mean_acc` and `mean_f1` are over classes present; `iou` has None for absent classes.
    """
    cm = cm.double().cpu()
    total, hit, target, pred = cm.sum().clamp(min=1), cm.diag(), cm.sum(1), cm.sum(0)
    present = target > 0
    iou = hit / (target + pred - hit).clamp(min=1)
    mean = lambda values: values[present].mean().item() if present.any() else 0.0
    chance = (target @ pred / total ** 2).item()
    oa = (hit.sum() / total).item()
    return {'oa': oa, 'mean_acc': mean(hit / target.clamp(min=1)), 'miou': mean(iou), 'miou_all': (iou * present).mean().item(),
            'kappa': (oa - chance) / max(1 - chance, 1e-12), 'mean_f1': mean(2 * hit / (target + pred).clamp(min=1)),
            'iou': [v.item() if p else None for v, p in zip(iou, present)]}


def chance_warning(result):
    """A sentence when scores() are not clearly above chance, else ''. The first thing to read in any report."""
    num_present = max(sum(v is not None for v in result['iou']), 1)
    if result['kappa'] < 0.02 or abs(result['mean_acc'] - 1 / num_present) < 0.01:
        return (f'WARNING: not clearly above chance (kappa {result["kappa"]:.3f}, mean accuracy {result["mean_acc"]:.3f} where '
                f'guessing gives {1 / num_present:.3f}): check that predictions and labels are paired and numbered alike')
    return ''


# ============ reading a scene ============

class Scene(NamedTuple):
    cube: np.ndarray              # (C, H, W) in the file's own type
    labels: np.ndarray            # (H, W) uint8, 0 = unlabelled; or None
    wavelengths_nm: list          # of length C; or None
    nodata: float                 # value that marks missing pixels; or None. NaN always does
    class_names: list             # names of classes 1, 2, ...; or None
    geotags: tuple = ()           # GeoTIFF tags (code, type, count, value) that place it on the earth; () = none


def read_scene(path, labels='', mmap=False):
    """Read a scene: .tif (axes as the file states them), .npz / .npy / .mat ((H, W, C), the habit of the field) or ENVI .hdr.

    An .npz holds `cube` and, if known, `labels`, `wavelengths_nm`, `class_names`, `nodata`; a .mat its largest 3-d array and a
    2-d integer array of the same H x W. `labels` names a second file of labels. With `mmap`, .tif and .npy stay on disk (compressed .tif are
    unpacked into a temporary file) unless their type has to be converted. Raises UserError naming the file.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such file: check the path')
    if os.path.getsize(path) == 0:
        raise UserError(f'{path}: the file is empty: copy it again')
    tiff, numpy = functools.partial(read_tiff, mmap=mmap), functools.partial(read_numpy, mmap=mmap)
    readers = {'.tif': tiff, '.tiff': tiff, '.npz': numpy, '.npy': numpy, '.mat': read_mat, '.hdr': read_envi}
    ending = os.path.splitext(path)[1].lower()
    if ending not in readers:
        raise UserError(f'{path}: files of type "{ending}" are not read: convert it to one of {", ".join(readers)}')
    try:
        scene = readers[ending](path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f'{path}: reading it needs a package that is missing: pip install {error.name}') from None
    except Exception as error:  # whatever a damaged file makes a reader do
        raise UserError(f'{path}: cannot be read ({type(error).__name__}: {one_line(error)}): copy or convert it again') from None
    if labels:
        other = read_scene(labels)
        raw = other.labels if other.labels is not None else np.where(other.cube[0] == other.nodata, 0, other.cube[0])
        if raw.shape != scene.cube.shape[1:]:
            raise UserError(f'{labels}: labels of {shape_text(raw)} pixels for an image of {shape_text(scene.cube[0])} ({path}): '
                            'give the label file of the same scene')
        scene = scene._replace(labels=raw)
    if scene.labels is not None:
        scene = scene._replace(labels=checked_labels(scene.labels, labels or path))
    scene = scene._replace(cube=checked_cube(scene.cube, path))
    if scene.wavelengths_nm:
        scene = scene._replace(wavelengths_nm=checked_wavelengths(scene.wavelengths_nm, path, len(scene.cube)).tolist())
    return scene


def one_line(error):
    return ' '.join(str(error).split())[:160] or 'no further reason given'


def shape_text(array):
    return ' x '.join(map(str, array.shape))


def checked_cube(cube, path):
    if cube.ndim != 3 or min(cube.shape) == 0:
        raise UserError(f'{path}: an image of shape {shape_text(cube)} is not bands x rows x columns: give a 3-d array')
    if cube.dtype.kind not in 'iuf':
        raise UserError(f'{path}: values of type {cube.dtype} are not supported: save it as integers or floats')
    keep = cube.dtype.kind in 'iu' and cube.dtype.itemsize <= 2
    return cube.astype(cube.dtype.newbyteorder('=') if keep else np.float32, copy=False)  # 32-bit and wider become float32


def checked_labels(labels, path):
    if labels.dtype.kind == 'f' and (labels == np.round(labels)).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in 'iub':
        raise UserError(f'{path}: labels of type {labels.dtype} are not class numbers: save them as whole numbers')
    if labels.min() < 0 or labels.max() > 254:
        raise UserError(f'{path}: labels run from {labels.min()} to {labels.max()}: use 0 for unlabelled and 1 to 254 for classes')
    return labels.astype(np.uint8)


GEOTAGS = (33550, 33922, 34264, 34735, 34736, 34737)  # pixel scale, tie points, transformation; keys, their numbers and their texts


def read_tiff(path, mmap=False):
    import tifffile
    logging.getLogger('tifffile').setLevel(logging.CRITICAL)  # its warnings come back as our own sentences
    with tifffile.TiffFile(path, _multifile=False, is_mmstack=False, is_ndtiff=False) as tif:  # a name inside a file opens no other file
        series = tif.series[0]
        if series.nbytes > 2000 * os.path.getsize(path):  # no lossless compression does better: a damaged size field
            raise UserError(f'{path}: claims {series.nbytes / 1e9:.0f} GB of pixels in a file of {os.path.getsize(path)} bytes: '
                            'the file is damaged, copy it again')
        for page in series.pages:
            if page is not None and max(map(sum, zip(page.dataoffsets, page.databytecounts)), default=0) > os.path.getsize(path):
                raise UserError(f'{path}: the file is truncated: copy it again')
        try:
            image = series.asarray(out='memmap' if mmap else None)
        except ValueError as error:
            if 'imagecodecs' not in str(error):
                raise
            raise UserError(f'{path}: its compression ({one_line(error).split(">")[0].strip("<")}) needs one more package: '
                            'pip install imagecodecs') from None
        tag = series.keyframe.tags.get(42113)  # GDAL_NODATA
        nodata = float(tag.value) if tag else None
        tags = [series.keyframe.tags[code] for code in GEOTAGS if code in series.keyframe.tags]
        geotags = tuple((tag.code, int(tag.dtype), tag.count, tag.value) for tag in tags)
    axes, shape = series.axes, image.shape
    if image.ndim == 2:
        axes, image = 'S' + axes, image[None]
    if image.ndim != 3 or 'Y' not in axes or 'X' not in axes:
        raise UserError(f'{path}: its axes are {axes} {shape}: expected rows, columns and bands only')
    bands = axes.index(next(letter for letter in axes if letter not in 'YX'))
    if axes[bands] == 'Q':  # written without a stated meaning, as numpy arrays are: the odd one of three sides is the bands'
        bands = next((i for i in range(3) if shape.count(shape[i]) == 1 and len(set(shape)) == 2), int(np.argmin(shape)))
    return Scene(np.moveaxis(image, bands, 0), None, None, None if nodata is None or math.isnan(nodata) else nodata, None, geotags)


def read_numpy(path, mmap=False):
    loaded = np.load(path, allow_pickle=False, mmap_mode='r' if mmap else None)
    if isinstance(loaded, np.ndarray):
        loaded = {'cube': loaded}
    if 'cube' not in loaded and 'labels' in loaded:
        loaded = {'cube': loaded['labels']}  # a file of labels only
    if 'cube' not in loaded:
        raise UserError(f'{path}: holds {sorted(loaded)[:6]} but no array "cube": save the image under that name')
    cube, get = loaded['cube'], lambda name: loaded[name].tolist() if name in loaded else None
    wavelengths = get('wavelengths_nm')
    if cube.ndim == 2:
        cube = cube[..., None]  # one band, or labels
    if cube.ndim == 3 and not (wavelengths and len(wavelengths) == cube.shape[0] != cube.shape[2]):
        cube = np.moveaxis(cube, 2, 0)  # (H, W, C) -> (C, H, W)
    names = get('class_names')
    if names and names[0].lower() in ('unlabelled', 'unlabeled', 'undefined', 'background'):
        names = names[1:]  # the name of label 0
    return Scene(cube, loaded['labels'] if 'labels' in loaded else None, wavelengths, get('nodata'), names)


READ_MAT = """import sys, numpy, scipy.io
arrays = [a for a in scipy.io.loadmat(sys.argv[1]).values() if isinstance(a, numpy.ndarray) and a.dtype.kind in 'iuf' and a.ndim in (2, 3)]
numpy.savez(sys.argv[2], *arrays)"""


def read_mat(path):
    __import__('scipy.io')  # where it is missing, say so before a process is started
    with tempfile.TemporaryDirectory() as folder:  # in a process of its own: scipy's reader crashes the whole process on some damaged files
        kept = os.path.join(folder, 'arrays.npz')
        done = subprocess.run([sys.executable, '-c', READ_MAT, path, kept], capture_output=True, text=True, errors='replace')
        if 'NotImplementedError' in done.stderr:
            raise UserError(f'{path}: MATLAB 7.3 files are not read: save it again with save(..., "-v7")')
        if done.returncode or not os.path.exists(kept):
            reason = done.stderr.strip().splitlines()[-1:] or [f'the reader crashed, code {done.returncode}']
            raise UserError(f'{path}: cannot be read ({one_line(reason[0])}): copy or convert it again')
        arrays = list(np.load(kept).values())
    cubes = sorted((a for a in arrays if a.ndim == 3), key=lambda a: a.size)
    flat = [a for a in arrays if a.ndim == 2 and min(a.shape) > 1]
    if not cubes and len(flat) != 1:
        raise UserError(f'{path}: holds no 3-d array: give the file with the image as the root, the labels with --labels')
    cube = np.moveaxis(cubes[-1], 2, 0) if cubes else flat[0][None]
    labels = next((a for a in flat if cubes and a.shape == cube.shape[1:]), None)
    return Scene(cube, labels, None, None, None)


def read_envi(path):
    import spectral
    image = spectral.open_image(path)
    nodata = image.metadata.get('data ignore value')
    cube = np.asarray(image.open_memmap() if image.using_memmap else image.load(dtype=image.dtype))
    return Scene(np.moveaxis(cube, 2, 0), None, image.bands.centers, None if nodata is None else float(nodata), None,
                 envi_geotags(image.metadata.get('map info', [])))


def envi_geotags(info):
    """ENVI's "map info" (projection, column and row from 1, x, y, pixel width and height, then for UTM zone and North or South, datum) -> GeoTIFF
    tags: pixel scale, tie point, and for UTM or longitude and latitude on WGS-84 the keys of their EPSG number. () where nothing or a rotation is stated."""
    info = [str(word).strip() for word in info]
    if len(info) < 7 or any(word.lower().startswith('rotation') and float(word.split('=')[1]) for word in info):
        return ()
    column, row, x, y, width, height = map(float, info[1:7])
    tags = ((33550, 12, 3, (width, height, 0.0)), (33922, 12, 6, (column - 1, row - 1, 0.0, x, y, 0.0)))
    if not {'wgs-84', 'wgs84', 'wgs 84'} & {word.lower() for word in info[7:]}:
        return tags
    if info[0] == 'UTM':
        kind, key, epsg = 1, 3072, (32700 if info[8].lower() == 'south' else 32600) + int(info[7])
    elif info[0] == 'Geographic Lat/Lon':
        kind, key, epsg = 2, 2048, 4326
    else:
        return tags
    return (*tags, (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, kind, 1025, 0, 1, 1, key, 0, 1, epsg)))  # model, raster of areas, the system


# ============ bands: from one sensor's wavelengths to another's ============

def checked_wavelengths(wavelengths, where, bands=None):
    """Wavelengths of `bands` bands -> (C,) float64 in nm. All below 100 are micrometres, as in many ENVI files: converted."""
    try:
        nm = np.asarray(wavelengths, float)
    except (TypeError, ValueError):
        raise UserError(f'{where}: its wavelengths are not numbers ({str(wavelengths)[:60]}): correct them') from None
    if nm.ndim != 1 or len(nm) != (len(nm) if bands is None else bands):
        raise UserError(f'{where}: has {nm.size} wavelengths for {bands or "its"} bands: give one for each')
    wrong = ~(np.isfinite(nm) & (nm > 0))
    if wrong.any():
        raise UserError(f'{where}: {wrong.sum()} of its {len(nm)} wavelengths are missing (no numbers above 0): correct them, '
                        'or leave those bands out')
    return nm * 1000 if len(nm) and nm.max() < 100 else nm


def parse_bands(text):
    """--bands= -> wavelengths (C',) and widths (C',) in nm: a name of BAND_SETS, or '485:70,560', a width (FWHM) behind the
    centre where it is not 15 nm."""
    try:
        pairs = [(band if ':' in band else f'{band}:15').split(':') for band in BAND_SETS.get(text, text).split(',')]
        nm, fwhm = np.array([(float(centre), float(width)) for centre, width in pairs]).T
    except ValueError:
        raise UserError(f'--bands={text}: give wavelengths in nm separated by commas, as 485:70,560 (a width after a colon), '
                        f'or {" or ".join(BAND_SETS)}') from None
    if not (np.isfinite(fwhm) & (fwhm >= 1)).all():
        raise UserError(f'--bands={text}: a width of {fwhm.min():g} nm: give widths of 1 nm and more')
    return checked_wavelengths(nm, f'--bands={text}'), fwhm


FARTHEST_NM = 50.0  # a band so far from every band of the source would be invented, not resampled


def same_bands(from_nm, to_nm):
    """Are these the same bands in the same order, to 1 nm?"""
    return len(from_nm) == len(to_nm) and np.allclose(from_nm, to_nm, rtol=0, atol=1)


def band_matrix(from_nm, to_nm, fwhm=15.0, where='the scene'):
    """Weights (C', C) that bring bands at `from_nm` (C,) to `to_nm` (C',), nm or micrometres, in any order; rows add up to 1.

    A Gaussian response of `fwhm` nm, one for all or (C',), where the source's steps are finer than that all over the response;
    a source band counts with its share of the wavelengths (where detectors overlap, bands stand closer). Linear interpolation
    elsewhere: in a coarser source, in and beside a hole (dropped water bands), at the ends, and where both sets are the same,
    which gives the bands back. Source bands at one wavelength count as their mean. Refused: a band more than 50 nm from every
    source band, or beyond the last one by more than half a step. The source's own response is not taken out: the result has both.
    """
    source, which = np.unique(checked_wavelengths(from_nm, where), return_inverse=True)
    to_nm = checked_wavelengths(to_nm, 'the bands asked for')
    fwhm, step = np.broadcast_to(fwhm, to_nm.shape)[:, None], np.diff(source)
    apart = to_nm[:, None] - source  # (C', C)
    first, last = (min(FARTHEST_NM, step[end] / 2) if len(step) else 0.0 for end in (0, -1))
    far = (to_nm < source[0] - first - 1) | (to_nm > source[-1] + last + 1) | (np.abs(apart).min(1) > FARTHEST_NM)
    if far.any():
        named = ', '.join(f'{nm:.0f}' for nm in to_nm[far][:6])
        raise UserError(f'{where}: has {len(source)} bands from {source[0]:.0f} to {source[-1]:.0f} nm, none near {named} nm: '
                        'choose bands inside its range and not in a hole of it')
    low, high = to_nm[:, None] - fwhm / 2, to_nm[:, None] + fwhm / 2  # of the response, (C', 1)
    fine = ((step <= fwhm) | (source[1:] <= low) | (source[:-1] >= high)).all(1)
    fine &= (low >= source[0])[:, 0] & (high <= source[-1])[:, 0] & (not same_bands(source, np.sort(to_nm)))
    half = np.minimum(step, fwhm) / 2  # of each interval, (C', C - 1): one half is the lower band's, one the upper's
    share = np.pad(half, ((0, 0), (0, 1))) + np.pad(half, ((0, 0), (1, 0)))
    gauss = share * np.exp(-4 * np.log(2) * (apart / fwhm) ** 2)
    linear = np.stack([np.interp(to_nm, source, row) for row in np.eye(len(source))], 1)  # (C', C)
    weights = np.where(fine[:, None], gauss / gauss.sum(1, keepdims=True).clip(1e-300), linear)
    return weights @ ((which == np.arange(len(source))[:, None]) / np.bincount(which)[:, None])


def resample_bands(x, from_nm, to_nm, fwhm=15.0):
    """x (C, H, W) at band centres `from_nm` -> (C', H, W) float32 at `to_nm`, as band_matrix() says. Raises UserError where
    the source does not reach, and for wavelengths that are missing or not as many as bands."""
    weights = band_matrix(checked_wavelengths(from_nm, 'the scene', len(x)), to_nm, fwhm)
    return np.tensordot(weights.astype(np.float32), x.astype(np.float32), 1)


def at_bands(meta, bands, where):
    """meta of a tile directory, --bands -> meta at those bands, weights (C', C) for to_bands(); None where they are its own.

    Resampling is linear, so the statistics follow exactly: mean' = R mean, covariance' = R covariance R'.
    """
    if not bands:
        return meta, None
    nm, fwhm = parse_bands(bands)
    if not meta['wavelengths_nm']:
        raise UserError(f'{where}: --bands needs the wavelengths of the data, and they are not known: tile scenes that have '
                        'them (.npz with wavelengths_nm, ENVI)')
    if same_bands(meta['wavelengths_nm'], nm):
        return meta, None
    weights = band_matrix(meta['wavelengths_nm'], nm, fwhm, where)
    covariance = weights @ np.array(meta['covariance']) @ weights.T
    changed = {'num_bands': len(nm), 'wavelengths_nm': nm.tolist(), 'nodata': None, 'dtype': 'float32',
               'mean': (weights @ meta['mean']).tolist(), 'std': np.sqrt(covariance.diagonal()).tolist(), 'covariance': covariance.tolist()}
    return {**meta, **changed}, torch.from_numpy(weights).float()


def to_bands(x, weights, nodata=None):
    """x (B, C, H, W) raw values, weights (C', C) of at_bands() -> (B, C', H, W) float32, invalid pixels NaN; None: x itself"""
    if weights is None:
        return x
    x = x.float().masked_fill(~valid_pixels(x, nodata)[:, None], math.nan)
    return torch.matmul(weights, x.flatten(2)).reshape(len(x), -1, *x.shape[2:])


def valid_pixels(x, nodata, band_dim=-3):
    """True where a pixel is real: all bands finite and not all equal to `nodata`. numpy or torch, any leading dimensions."""
    xp = torch if isinstance(x, torch.Tensor) else np
    valid = xp.isfinite(x).all(band_dim)
    return valid if nodata is None else valid & ~(x == nodata).all(band_dim)


# ============ tiling ============

def split_by_blocks(labels, shares, block, gap, seed):
    """(H, W) labels -> (H, W) split numbers 0, 1, 2: a checkerboard of blocks dealt out so that each class has its share of each.

    tr takes the black squares first (all of them at a share of 0.5), ts the white ones last; the best of 500 random deals counts,
    and a class still missing from tr gets its largest block. Pixels within `gap` of a block of another split get 3 (unused).
    """
    H, W = labels.shape
    h, w = -(-H // block), -(-W // block)
    block_of = (np.arange(H) // block)[:, None] * w + (np.arange(W) // block)  # (H, W)
    num_classes = int(labels.max())
    counts = np.bincount((block_of * (num_classes + 1) + labels).ravel(), minlength=h * w * (num_classes + 1))
    counts = counts.reshape(h * w, num_classes + 1)[:, 1:].astype(float)  # (blocks, classes)
    rng, goal, best = np.random.default_rng(seed), np.array(shares)[:, None], (np.inf, None)
    order_split = np.searchsorted(np.round(np.cumsum(shares) * h * w), np.arange(h * w), side='right').clip(max=2)
    white = (np.add.outer(np.arange(h), np.arange(w)) % 2).ravel()
    for _ in range(500):
        order = np.lexsort((rng.random(h * w), white ^ rng.integers(2)))  # black squares first, each colour shuffled
        deal = np.empty(h * w, int)
        deal[order] = order_split
        got = np.stack([counts[deal == s].sum(0) for s in range(3)]) / counts.sum(0).clip(1)  # (3, classes)
        missing = (got < 0.1 * goal) * np.array([[100], [1], [10]])
        cost = np.abs(got - goal).mean() + missing.sum()
        if cost < best[0]:
            best = cost, deal
    deal = best[1]
    for k in np.flatnonzero((counts[deal == 0].sum(0) == 0) & (counts.sum(0) > 0)):
        deal[counts[:, k].argmax()] = 0
    split = deal[block_of]
    if gap:
        planes = torch.from_numpy(split)[None, None].float()
        high, low = (F.max_pool2d(sign * planes, 2 * gap + 1, 1, gap)[0, 0] * sign for sign in (1, -1))
        split = np.where((high == low).numpy(), split, 3)
    return split


def cut_positions(length, size, stride):
    """Starts of tiles or windows of `size` that cover `length`; the last one is moved back to end at the border."""
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] + size == length else starts + [length - size]


class TileWriter:
    """Appends tiles to {split}_*.npy.part and remembers in progress.json how far everything has come, so that a killed run goes
    on from there: parts are cut back to what progress.json vouches for. finish() writes headers, renames, and meta.json last."""

    def __init__(self, out, dtype, bands, size, labelled, progress):
        self.out, self.progress, self.saved_at = out, progress, time.time()
        self.kinds = {'images': (np.dtype(dtype), (bands, size, size)), 'index': (np.dtype(np.int32), (3,))}
        if labelled:
            self.kinds['labels'] = (np.dtype(np.uint8), (size, size))
        self.files = {}
        for split in SPLITS:
            for kind, (kind_dtype, shape) in self.kinds.items():
                path = os.path.join(out, f'{split}_{kind}.npy.part')
                if os.path.exists(path.removesuffix('.part')):  # killed in finish(), between two renames
                    os.replace(path.removesuffix('.part'), path)
                file = self.files[split, kind] = open(path, 'r+b' if os.path.exists(path) else 'w+b')
                file.truncate(256 + progress['tiles'][split] * kind_dtype.itemsize * math.prod(shape))
                file.seek(0, os.SEEK_END)

    def add(self, split, image, labels, index):
        for kind, array in (('images', image), ('labels', labels), ('index', np.array(index, np.int32))):
            if kind in self.kinds:
                self.files[split, kind].write(np.ascontiguousarray(array, self.kinds[kind][0]).tobytes())
        self.progress['tiles'][split] += 1

    def save_progress(self, at_least_every=2.0):
        if time.time() - self.saved_at >= at_least_every:
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            write_json(os.path.join(self.out, 'progress.json'), self.progress)
            self.saved_at = time.time()

    def finish(self, meta):
        self.save_progress(0)
        for (split, kind), file in self.files.items():
            dtype, shape = self.kinds[kind]
            count = self.progress['tiles'][split]
            header = repr({'descr': np.lib.format.dtype_to_descr(dtype), 'fortran_order': False, 'shape': (count, *shape)})
            file.seek(0)
            file.write(b'\x93NUMPY\x01\x00' + (246).to_bytes(2, 'little') + header.ljust(245).encode() + b'\n')
            file.close()
            if kind == 'index':
                meta['tiles'][split] = np.load(file.name).tolist() if count else []
        for (split, kind), file in self.files.items():
            if kind != 'index' and self.progress['tiles'][split]:
                os.replace(file.name, file.name.removesuffix('.part'))
        write_json(os.path.join(self.out, 'meta.json'), meta)
        for name in os.listdir(self.out):
            if name.endswith('.part') or name == 'progress.json':
                os.remove(os.path.join(self.out, name))


def write_json(path, content):
    """Atomic: the file is either the old one or the new one, never half of it."""
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + '.tmp', path)


def add_statistics(stats, cube, nodata):
    """Add a cube's valid pixels to running sums (float64, about the first file's mean so that nothing cancels)."""
    for top in range(0, cube.shape[1], 256):
        part = cube[:, top:top + 256]
        valid = valid_pixels(part, nodata)
        stats['pixels'] += int(valid.size)
        x = part[:, valid].astype(np.float64)  # (C, n)
        if x.shape[1] == 0:
            continue
        if 'shift' not in stats:
            stats.update(shift=x.mean(1).tolist(), sum=[0.0] * len(x), outer=np.zeros((len(x), len(x))).tolist())
        x -= np.array(stats['shift'])[:, None]
        stats['valid'] += x.shape[1]
        stats['sum'] = (np.array(stats['sum']) + x.sum(1)).tolist()
        stats['outer'] = (np.array(stats['outer']) + x @ x.T).tolist()


def list_inputs(root, labels):
    """--root -> list of (name, image path, label path, split or '' when the scene is to be split)"""
    if os.path.isdir(root):
        inputs = []
        for split in SPLITS:
            folder = os.path.join(root, split, 'image')
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
                label = os.path.join(root, split, 'label', name)
                if name.lower().endswith(('.tif', '.tiff', '.npy', '.npz', '.mat', '.hdr')):
                    with_labels = os.path.isdir(os.path.join(root, split, 'label'))
                    inputs.append((f'{split}/{name}', os.path.join(folder, name), label if with_labels else '', split))
        if not any(entry[3] == 'tr' for entry in inputs):
            raise UserError(f'{root}: no images under {os.path.join(root, "tr", "image")}: expected tr|val|ts / image|label, or pass a scene file')
        return inputs
    paths = root.split(',')
    label_paths = labels.split(',') if labels else [''] * len(paths)
    if len(label_paths) != len(paths):
        raise UserError(f'--labels names {len(label_paths)} files for {len(paths)} scenes: give one for each, separated by commas')
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f'{path}: there is no such file or folder: check --root')
    return [(path, path, label, '') for path, label in zip(paths, label_paths)]


def read_input(path, label_path, bands):
    if label_path and not os.path.isfile(label_path):
        raise UserError(f'{path}: its label file {label_path} is missing: add it, or remove the image')
    scene = read_scene(path, label_path)
    if not bands:
        return scene
    if not scene.wavelengths_nm:
        raise UserError(f'{path}: --bands needs the wavelengths of the scene, and the file has none: save it as .npz with wavelengths_nm')
    cube = scene.cube.astype(np.float32)
    cube[:, ~valid_pixels(scene.cube, scene.nodata)] = np.nan
    nm, fwhm = parse_bands(bands)
    weights = band_matrix(scene.wavelengths_nm, nm, fwhm, path).astype(np.float32)
    return scene._replace(cube=np.tensordot(weights, cube, 1), wavelengths_nm=nm.tolist(), nodata=None)


def parts_of(scene, split, args):
    """The images to cut out of one input: list of (split, cube, labels, top, left)."""
    cube, labels = scene.cube, scene.labels
    if labels is None:
        labels = np.zeros(cube.shape[1:], np.uint8)
    if split or not labels.any():
        return [(split or 'tr', cube, labels, 0, 0)]
    shares = [float(share) for share in args.shares.split(',')]
    if args.split == 'halves':  # the scene itself is cut: no image pixel is shared (inductive)
        axis = int(np.argmax(labels.shape))
        ends = np.round(np.cumsum([0] + shares) * labels.shape[axis]).astype(int)
        cuts = [(slice(a, b), slice(None))[::1 if axis == 0 else -1] for a, b in zip(ends, ends[1:])]
        return [(s, cube[:, r, c], labels[r, c], r.start or 0, c.start or 0) for s, (r, c) in zip(SPLITS, cuts) if labels[r, c].size]
    deal = split_by_blocks(labels, shares, args.split_block, args.split_gap, args.seed)
    return [(s, cube, np.where(deal == i, labels, 0), 0, 0) for i, s in enumerate(SPLITS) if shares[i]]


def check_fits(path, scene, facts, first, parts, args):
    """Raise UserError when a scene cannot go into one tile directory with those before it."""
    for key in ('bands', 'dtype', 'wavelengths_nm', 'class_names'):
        if facts[key] != first[key] and None not in (facts[key], first[key]):
            raise UserError(f'{path}: its {key} ({str(facts[key])[:60]}) differ from the first file\'s ({str(first[key])[:60]}): '
                            'tile scenes of one sensor together, others into a directory of their own')
    if facts['nodata'] != first['nodata']:
        raise UserError(f'{path}: its nodata value is {facts["nodata"]}, the first file\'s {first["nodata"]}: convert it, or tile it apart')
    if not valid_pixels(scene.cube, scene.nodata).any():
        raise UserError(f'{path}: no valid pixel, all are NaN or nodata: remove the file')
    if os.path.isdir(args.root) and (facts['bands'], facts['dtype']) == (32, 'int16') and scene.labels is not None and scene.labels.max() > 24:
        raise UserError(f'{path}: its label file has the value {scene.labels.max()}, WHU-OHS has classes 1 to 24 '
                        '(0 = unlabelled): repair the label file')
    for split, cube, *_ in parts:
        if min(cube.shape[1:]) < args.tile_size:
            raise UserError(f'{path}: its part for {split} has {shape_text(cube[0])} pixels, less than --tile_size={args.tile_size}: '
                            'choose smaller tiles')


def tile(args):
    """The command `tile`: see --help. Every input is read once; memory holds one input and its tiles."""
    settings = {key: value for key, value in vars(args).items() if key not in ('command', 'skip_bad', 'out')}
    command = 'python data.py tile ' + ' '.join(f'--{k}={v}' for k, v in vars(args).items() if k != 'command' and v != '')
    inputs = list_inputs(args.root, args.labels)
    if args.bands:
        parse_bands(args.bands)  # a mistake in it is no fault of the scenes
    meta_path, progress_path = os.path.join(args.out, 'meta.json'), os.path.join(args.out, 'progress.json')
    for path in (meta_path, progress_path):
        if os.path.exists(path):
            old = json.load(open(path, encoding='utf-8'))['settings']
            changed = [f'{k} ({old.get(k)} there, {v} now)' for k, v in settings.items() if old.get(k) != v]
            if changed:
                raise UserError(f'{args.out}: was made with other settings: {", ".join(changed)}: choose another --out or delete it')
    if os.path.exists(meta_path):
        meta = json.load(open(meta_path, encoding='utf-8'))
        new = [entry[0] for entry in inputs if entry[0] not in meta['scenes'] + meta['skipped']]
        if new:
            raise UserError(f'{args.out}: is complete, and {len(new)} inputs are new ({new[0]} ...): choose another --out or delete it')
        print(f'{args.out}: complete, nothing to do')
        return
    os.makedirs(args.out, exist_ok=True)
    if os.path.exists(progress_path):
        progress = json.load(open(progress_path, encoding='utf-8'))
        print(f'{args.out}: going on after {len(progress["done"])} of {len(inputs)} inputs')
    else:
        progress = {'settings': settings, 'command': command, 'done': {}, 'tiles': dict.fromkeys(SPLITS, 0), 'scene': None,
                    'statistics': {'pixels': 0, 'valid': 0}, 'class_counts': {split: [0] * 255 for split in SPLITS}}
    writer, failures = None, {}
    labelled = any(entry[2] for entry in inputs) or not os.path.isdir(args.root)
    for name, path, label_path, split in tqdm(inputs, desc='tiling', unit='file', disable=len(inputs) == 1):
        if name in progress['done']:
            continue
        try:
            scene = read_input(path, label_path, args.bands)
            facts = json.loads(json.dumps({'bands': scene.cube.shape[0], 'dtype': scene.cube.dtype.name, 'nodata': scene.nodata,
                                           'wavelengths_nm': scene.wavelengths_nm, 'class_names': scene.class_names}))
            parts = parts_of(scene, split, args)
            check_fits(path, scene, facts, progress['scene'] or facts, parts, args)
        except UserError as error:
            failures[name] = str(error)
            continue
        first = progress['scene'] = progress['scene'] or facts
        if writer is None:
            writer = TileWriter(args.out, first['dtype'], first['bands'], args.tile_size, labelled, progress)
        for part_split, cube, labels, top, left in parts:
            labels, counts = labels.copy(), progress['class_counts'][part_split]
            counts[:] = (np.array(counts) + np.bincount(labels.ravel(), minlength=256)[1:]).tolist()
            train = part_split == 'tr'
            stride = args.stride if train and args.stride else args.tile_size
            for row in cut_positions(cube.shape[1], args.tile_size, stride):
                for col in cut_positions(cube.shape[2], args.tile_size, stride):
                    image = cube[:, row:row + args.tile_size, col:col + args.tile_size]
                    label = labels[row:row + args.tile_size, col:col + args.tile_size]
                    if valid_pixels(image, scene.nodata).any() and (train or label.any() or not labelled):
                        writer.add(part_split, image, label, (len(progress['done']), top + row, left + col))
                    if not train:
                        label[:] = 0  # where tiles overlap at the border, each test pixel counts once
            if train:
                add_statistics(progress['statistics'], cube, scene.nodata)
        progress['done'][name] = True
        writer.save_progress()
    if writer:
        writer.save_progress(0)
    if failures and not (args.skip_bad and progress['scene']):
        raise UserError('\n'.join(failures.values()) + f'\n{args.out}: {len(failures)} of {len(inputs)} inputs could not be used; what is finished '
                        'is kept: repair or remove them and run the same command again, or go on without them with --skip_bad=true')
    for failure in failures.values():
        print('skipped:', failure)
    meta = make_meta(progress, list(failures), args, os.path.isdir(args.root))
    if writer is None:
        writer = TileWriter(args.out, meta['dtype'], meta['num_bands'], args.tile_size, labelled, progress)  # all done before
    writer.finish(meta)
    print(f'{args.out}: {meta["num_bands"]} bands, {meta["num_classes"]} classes, tiles {progress["tiles"]}, '
          f'labelled pixels { {s: sum(c) for s, c in meta["class_counts"].items()} }')


def make_meta(progress, skipped, args, is_folder):
    """progress of a complete run -> the content of meta.json"""
    scene, stats = progress['scene'], progress['statistics']
    if not stats['valid']:
        raise UserError(f'{args.root}: no training image with valid pixels: nothing to make statistics from')
    n, total = stats['valid'], np.array(stats['sum'])
    covariance = (np.array(stats['outer']) - np.outer(total, total) / n) / max(n - 1, 1)
    used = max((k + 1 for counts in progress['class_counts'].values() for k, c in enumerate(counts) if c), default=0)
    names_known = scene['class_names'] or (list(OHS_CLASSES) if is_folder and (scene['bands'], scene['dtype']) == (32, 'int16') else [])
    class_names = names_known + [f'class {k + 1}' for k in range(len(names_known), used)]
    how = {'blocks': f'blocks of {args.split_block} px, gap {args.split_gap} px: the splits share the image, no label (transductive)',
           'halves': 'the scene is cut: the splits share no pixel (inductive)'}[args.split]
    return {'settings': progress['settings'], 'command': progress['command'], 'num_bands': scene['bands'], 'dtype': scene['dtype'],
            'wavelengths_nm': scene['wavelengths_nm'] or (list(OHS_NM) if is_folder and (scene['bands'], scene['dtype']) == (32, 'int16') else None),
            'nodata': scene['nodata'], 'nodata_share': 1 - n / stats['pixels'], 'mean': (np.array(stats['shift']) + total / n).tolist(),
            'std': np.sqrt(covariance.diagonal()).tolist(), 'covariance': covariance.tolist(), 'num_classes': len(class_names),
            'class_names': class_names, 'class_counts': {s: c[:len(class_names)] for s, c in progress['class_counts'].items()},
            'split': 'as the folders say' if is_folder else how, 'scenes': list(progress['done']), 'skipped': skipped, 'tile_size': args.tile_size, 'tiles': {}}


# ============ tiles in, batches out ============

class Tiles:
    """One split of a tile directory: `.images` (N, C, S, S) and `.labels` (N, S, S) or None, memory-mapped; `.meta` of meta.json.
    With a `label_share` below 1 the labels are those of keep_label_share(), in memory. With `bands` (see parse_bands) batches are
    resampled to those wavelengths and `.meta` speaks of them; `.images`, on disk, stay as they are."""

    def __init__(self, directory, split, pin_memory=False, label_share=1.0, seed=0, bands=''):
        meta_path = os.path.join(directory, 'meta.json')
        if not os.path.exists(meta_path):
            half_made = os.path.join(directory, 'progress.json')
            if os.path.exists(half_made):
                raise UserError(f'{directory}: is half-made: finish it with\n  {json.load(open(half_made, encoding="utf-8"))["command"]}')
            raise UserError(f'{directory}: no tiles here: make them with `python data.py tile --root=... --out={directory}`')
        self.directory, self.split, self.meta, self.pin_memory = directory, split, json.load(open(meta_path, encoding='utf-8')), pin_memory
        count, size = len(self.meta['tiles'][split]), self.meta['tile_size']
        if not count:
            raise UserError(f'{directory}: the split "{split}" has no tiles: tile it again with other --shares or more scenes')
        self.images = self._open('images', (count, self.meta['num_bands'], size, size))
        has_labels = os.path.exists(os.path.join(directory, f'{split}_labels.npy'))
        self.labels = self._open('labels', (count, size, size)) if has_labels else None
        if has_labels and label_share < 1:
            self.labels = keep_label_share(self.labels, self.meta['tiles'][split], label_share, seed)
        self._buffers, self._turn = {}, 0
        self._stored = self.meta
        self.use_bands(bands)

    def use_bands(self, bands):
        """From now on batches and `.meta` are at these --bands; '' = as stored"""
        self.meta, self.weights = at_bands(self._stored, bands, self.directory)

    def _open(self, kind, shape):
        path = os.path.join(self.directory, f'{self.split}_{kind}.npy')
        try:
            array = np.load(path, mmap_mode='r')
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: cannot be read ({one_line(error)}): delete {self.directory} and tile again') from None
        if array.shape != shape:
            raise UserError(f'{path}: has shape {array.shape}, meta.json says {shape}: delete {self.directory} and tile again')
        return array

    def __len__(self):
        return len(self.images)

    def batch(self, ids, corners=None, side=0):
        """Tiles `ids` -> images (B, C, S, S) in the stored type (resampled ones float32), labels (B, S, S) uint8 or None.

        With `corners` (B, 2) only the window of `side` pixels at that row and column is read. The tensors are kept buffers, two in
        turn: valid until the next call but one (pinned when asked for, so that the copy to a GPU can overlap with its work; the
        scripts' finite check waits for the GPU once a step, so that a copy has ended before its buffer is written again).
        """
        ids = np.asarray(ids)
        self._turn = 1 - self._turn
        out = []
        for kind, source in (('images', self.images), ('labels', self.labels)):
            if source is None:
                out.append(None)
                continue
            size = side if corners is not None else source.shape[-1]
            shape = (len(ids), *source.shape[1:-2], size, size)
            key = (kind, self._turn, shape)
            if key not in self._buffers:
                self._buffers = {k: v for k, v in self._buffers.items() if k[:2] != key[:2]}
                buffer = torch.from_numpy(np.empty(shape, source.dtype))
                self._buffers[key] = buffer.pin_memory() if self.pin_memory else buffer
            buffer = self._buffers[key].numpy()
            if size == source.shape[-1]:
                np.take(source, ids, axis=0, out=buffer, mode='clip')  # 'clip' copies straight into the buffer
            else:
                for i, (row, col) in enumerate(np.asarray(corners)):
                    buffer[i] = source[ids[i], ..., row:row + size, col:col + size]
            out.append(self._buffers[key])
        if self.weights is not None:
            out[0] = self.resampled(out[0])
            out[0] = out[0].pin_memory() if self.pin_memory else out[0]
        return tuple(out)

    def resampled(self, images):
        """images (B, C, S, S) as stored -> (B, C', S, S) at the bands of this object"""
        return to_bands(images, self.weights, self._stored['nodata'])


def keep_label_share(labels, places, share, seed):
    """Labels (N, S, S), places (N, 3) = scene, row, column of each tile -> the same with only `share` of the labelled pixels, drawn at random by
    (seed, scene, row, column): where tiles overlap, a pixel is kept in all of them or in none. Each class keeps one pixel at least."""
    labels, S = np.array(labels), labels.shape[-1]

    def draws(scene, top, left):  # one number in 0..1 for each pixel of a scene, by mixing its coordinates (splitmix64)
        x = np.uint64(abs(seed) * 1_000_003 + scene) << np.uint64(40)
        x = x + (np.arange(top, top + S, dtype=np.uint64)[:, None] << np.uint64(20)) + np.arange(left, left + S, dtype=np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x / 2.0 ** 64

    limit = np.ones(256)
    for tile, place in zip(labels, places):
        np.minimum.at(limit, tile, draws(*place))
    limit = limit.clip(min=share)
    for tile, place in zip(labels, places):
        tile[draws(*place) > limit[tile]] = 0
    return labels


def epoch_ids(num_tiles, batch_size, step, seed):
    """The tiles of a step: an endless stream of permutations, one per epoch, cut into batches. Needs no loader state."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    order = {e: np.random.default_rng([seed, e]).permutation(num_tiles) for e in set((positions // num_tiles).tolist())}
    return np.array([order[p // num_tiles][p % num_tiles] for p in positions.tolist()])


def open_sources(directories, bands, img_size, pin_memory=False):
    """--data=a,b,c -> the training tiles of each at common --bands, and the number of windows of img_size px that each holds"""
    sources = [Tiles(directory, 'tr', pin_memory, bands=bands) for directory in directories.split(',')]
    first = sources[0].meta
    for source in sources:
        meta = source.meta
        if img_size > meta['tile_size']:
            raise UserError(f'--img_size={img_size}: the tiles of {source.directory} have {meta["tile_size"]} px: choose at most that')
        bands_differ = not same_bands(meta['wavelengths_nm'] or [], first['wavelengths_nm'] or [])
        if bands_differ or meta['num_bands'] != first['num_bands']:
            raise UserError(f'{source.directory}: its {meta["num_bands"]} bands are not the {first["num_bands"]} of '
                            f'{sources[0].directory}: pass --bands=, wavelengths within the reach of all, as --bands=landsat')
    return sources, [len(source) * max(1, round((source.meta['tile_size'] / img_size) ** 2)) for source in sources]


def pick_source(windows, step, seed):
    """Which of several data sets the batch of a step comes from: drawn by (seed, step), in proportion to their windows"""
    return int(np.random.default_rng([seed, step, 3]).choice(len(windows), p=np.array(windows) / sum(windows)))


def principal_components(meta, count):
    """meta -> the `count` leading principal components (count, C), unit vectors, and their shares of the variance (count,)"""
    covariance = torch.tensor(meta['covariance'], dtype=torch.float64)
    if not 0 < count <= len(covariance):
        raise UserError(f'--pca={count}: choose from 1 to {len(covariance)} components, as many as there are bands')
    variance, vectors = torch.linalg.eigh(covariance)
    components = vectors[:, -count:].flip(1).T
    components = components * components.sum(1, keepdim=True).sign()  # a component has no sign of its own: choose one
    return components, variance[-count:].flip(0) / variance.sum()


def standardization(meta, whiten=0, components=None):
    """meta -> mean (C,), matrix: (C,) per-band 1 / std, or (C, C) ZCA whitening of the `whiten` leading principal components
    (all of them when there are fewer bands), or with `components` (K, C), unit vectors, (K, C): those, each to variance 1.

    Neighbouring bands are near copies, so that per band the loss is brightness over and over; whitening gives the small spectral
    differences the same weight. ZCA turns back into band space: channels keep their wavelengths. The ridge (1e-6 of the mean
    variance) keeps noise directions from exploding; the scale makes the mean variance over channels 1.
    """
    mean = torch.tensor(meta['mean'], dtype=torch.float32)
    if whiten == 0 and components is None:
        return mean, 1 / torch.tensor(meta['std'], dtype=torch.float32).clamp(min=1e-6 * (max(meta['std']) or 1))
    covariance = torch.tensor(meta['covariance'], dtype=torch.float64)
    bands = len(covariance)
    if components is not None:
        components = torch.as_tensor(components, dtype=torch.float64)
        variance = ((components @ covariance) * components).sum(1, keepdim=True)
        return mean, (components / (variance + 1e-6 * covariance.diagonal().mean()).sqrt()).float()
    if whiten < 0:
        raise UserError(f'--whiten={whiten}: choose 0 for per-band standardisation, or a number of components')
    whiten = min(whiten, bands)
    variance, vectors = torch.linalg.eigh(covariance)
    variance, vectors = variance[-whiten:], vectors[:, -whiten:]
    matrix = (vectors / (variance + 1e-6 * covariance.diagonal().mean()).sqrt()) @ vectors.T * math.sqrt(bands / whiten)
    return mean, matrix.float()


def standardize(x, mean, matrix, nodata=None):
    """x (B, C, H, W) raw values, any type -> (B, C, H, W) float32, standardised, invalid pixels 0 (= the mean). A matrix
    (K, C) makes K channels of the C bands."""
    valid = valid_pixels(x, nodata)[:, None]
    x = torch.where(valid, x.float() - mean[:, None, None], 0.0)
    if matrix.ndim == 1:
        return x * matrix[:, None, None]
    with full_float32(x.device):  # whitening magnifies small differences
        return torch.matmul(matrix, x.flatten(2)).reshape(len(x), -1, *x.shape[2:])


@contextlib.contextmanager
def full_float32(device):
    """Products of float32 are that in here: autocast's bfloat16 and TF32 (10 bits, what the scripts allow on CUDA) would round."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ============ augmentation: a whole batch at once, on the device ============

def draw_crops(n, tile_size, img_size, scale_min, scale_max, generator, turns=True):
    """Random crops for n tiles -> corners (n, 2) and `side` of the window to read, boxes (n, 4) int and turns (n, 3) bool.

    A box (top, left, height, width, in pixels of that window) has scale_min..scale_max times the area of img_size x img_size and
    an aspect ratio of 3/4..4/3 (torchvision's RandomResizedCrop), anywhere in the tile: in a tile larger than img_size, crops
    really move. `turns` are (flip rows, flip columns, transpose): nadir views have no up or left.
    """
    u = torch.rand(n, 7, generator=generator)
    area = img_size ** 2 * (scale_min + (scale_max - scale_min) * u[:, 0])
    ratio = torch.exp((u[:, 1] * 2 - 1) * math.log(4 / 3))
    sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).round().clamp(1, min(tile_size, 2 * img_size))  # (n, 2)
    if scale_min == scale_max == 1:
        sizes[:] = img_size  # no resizing at all: exact copies
    start = (u[:, 2:4] * (tile_size - sizes + 1)).floor().clamp(min=0)  # (n, 2)
    side = min(tile_size, math.ceil(img_size * math.sqrt(scale_max * 4 / 3)))
    corners = torch.minimum(start, torch.full_like(start, tile_size - side))
    boxes = torch.cat([start - corners, sizes], 1).long()
    return corners.long(), side, boxes, (u[:, 4:] < 0.5) & turns


def resize_weights(start, length, source, out, flip, soften):
    """Starts and lengths (...) of boxes -> (..., out, source): row i of a product that crops, resizes and flips one axis.

    Triangle filter, widened when shrinking: bilinear interpolation with anti-aliasing, as torch's interpolate(antialias=True).
    `soften` (...) or 1 widens it further: a blur that costs nothing.
    """
    scale = length / out  # source pixels per output pixel
    where = start[..., None] + (torch.arange(out, device=start.device) + 0.5) * scale[..., None] - 0.5  # (..., out)
    where = torch.where(flip[..., None], where.flip(-1), where)
    pixel = torch.arange(source, device=start.device)
    weights = (1 - (pixel - where[..., None]).abs() / (soften * scale.clamp(min=1))[..., None, None]).clamp(min=0)  # (..., out, source)
    inside = (pixel >= start[..., None]) & (pixel < (start + length)[..., None])
    weights = weights * inside[..., None, :]
    return weights / weights.sum(-1, keepdim=True)


def crop_weights(boxes, turns, H, W, out, soften=1.0):
    """boxes (B, V, 4) and turns (B, V, 3) of draw_crops, V crops of each image of H x W px -> rows (B, V, out, H), cols (B, V, out, W) for crop_by"""
    return (resize_weights(boxes[..., 0], boxes[..., 2], H, out, turns[..., 0], soften),
            resize_weights(boxes[..., 1], boxes[..., 3], W, out, turns[..., 1], soften))


def crop_by(x, rows, cols, transposed):
    """x (B, C, H, W), crop_weights(), transposed (B, V) bool -> (V * B, C, out, out) float32, the first crop of every image, then the second.

    Two matrix products, rows then columns, are exact bilinear resizing; flips ride along for free. The first is one product for all crops of an
    image and takes it row by row, (B, H, C * W): an x in that order of memory (see standardize_rows) is not copied.
    """
    (B, C, H, W), (V, out) = x.shape, rows.shape[1:3]
    y = rows.flatten(1, 2) @ x.float().transpose(1, 2).reshape(B, H, C * W)  # (B, V * out, C * W)
    y = (y.reshape(-1, out * C, W) @ cols.flatten(0, 1).transpose(1, 2)).reshape(B, V, out, C, out)
    crops = y.new_empty(V, B, C, out, out)
    torch.where(transposed.T[..., None, None, None], y.permute(1, 0, 3, 4, 2), y.permute(1, 0, 3, 2, 4), out=crops)
    return crops.flatten(0, 1)


def resized_crop(x, boxes, turns, out, soften=1.0):
    """x (B, C, H, W), a box (B, 4) and turns (B, 3) of draw_crops for each -> (B, C, out, out) float32, blurred where `soften` (B,) is above 1"""
    boxes, turns = boxes.to(x.device)[:, None], turns.to(x.device)[:, None]
    soften = soften[:, None] if torch.is_tensor(soften) else soften
    return crop_by(x, *crop_weights(boxes, turns, *x.shape[2:], out, soften), turns[..., 2])


def resized_crop_labels(labels, boxes, turns, out):
    """The same crops of label maps (B, H, W) -> (B, out, out), nearest neighbour."""
    boxes, turns = boxes.to(labels.device), turns.to(labels.device)
    step = (torch.arange(out, device=labels.device) + 0.5) / out
    picks = []
    for axis in (0, 1):
        pick = (boxes[:, axis, None] + step * boxes[:, axis + 2, None]).floor().long()
        picks.append(torch.where(turns[:, axis, None], pick.flip(1), pick))
    y = labels[torch.arange(len(labels), device=labels.device)[:, None, None], picks[0][:, :, None], picks[1][:, None, :]]
    return torch.where(turns[:, 2, None, None], y.transpose(1, 2), y)


def standardize_rows(x, mean, matrix, nodata=None):
    """x (B, C, H, W) raw values -> (B, C + 1, H, W): standardize(), and last 1 = valid pixel, 0 = not; in memory row by row (B, H, C + 1, W), as
    resized_crop likes it. Crop this, then augment_spectra: what is invalid stays known through resizing."""
    (B, _, H, W), C = x.shape, len(matrix)
    rows = torch.empty(B, H, C + 1, W, device=x.device).transpose(1, 2)
    rows[:, :C] = standardize(x, mean, matrix, nodata)
    rows[:, C] = valid_pixels(x, nodata)
    return rows


def augment_spectra(x, u, field, mean, std, matrix, wavelengths_nm, gain=0.0, offset=0.0, tilt=0.0, noise=0.0, band_dropout=0.0,
                    jitter=0.0, solarize=0.0, out=None):
    """x (B, C + 1, H, W), crops of standardize_rows -> (B, C, H, W) standardised, each sample seen in another light. Invalid pixels are 0. Into
    `out`, if given.

    As light and air change the sensor's values: all times up to 1 +- gain (illumination); plus up to +- offset standard deviations in all bands
    (path radiance); plus the mean spectrum times a slope over the wavelengths of up to +- tilt (haze). On standardised values: `noise`, the
    largest standard deviation of white noise; `band_dropout`, the probability that a run of neighbouring bands (up to a third) is 0;
    `jitter` of contrast and brightness and `solarize`, the probability that what is above the mean is mirrored, are the dissertation's,
    for any number of bands.
    u (B, 11) uniform in 0..1; field (C, F, S) standard normal, F >= H, S >= W: runs of its rows are the noise of all samples, so that it need not be
    drawn for each; mean, std (C,), matrix (C,) or (C, C) of standardization().
    """
    C, (H, W) = x.shape[1] - 1, x.shape[2:]
    x, valid, signed = x[:, :C], x[:, C:], 2 * u - 1
    nm = wavelengths_nm - wavelengths_nm.min()
    slope = 2 * nm / nm.max().clamp(min=1e-6) - 1  # (C,) from -1 to 1
    shift = (gain * signed[:, :1] + tilt * signed[:, 1:2] * slope) * mean + offset * signed[:, 2:3] * std  # (B, C) of the sensor's values
    shift = shift * matrix if matrix.ndim == 1 else shift @ matrix.T
    y = torch.mul(x, 1 + gain * signed[:, :1, None, None], out=out).add_(shift[..., None, None])  # standardising is linear: whitened once, not crop by crop
    if noise:
        rows = (u[:, 3:4] * (field.shape[1] - H + 1)).long() + torch.arange(H, device=x.device)  # (B, H)
        windows = field[:, :, :W].index_select(1, rows.flatten()).reshape(C, -1, H, W).transpose(0, 1)  # (B, C, H, W)
        y.addcmul_(windows, noise * u[:, 4, None, None, None])
    if jitter:
        middle = y.mean((1, 2, 3), keepdim=True)
        y.sub_(middle).mul_(1 + jitter * signed[:, 5, None, None, None]).add_(middle + jitter * signed[:, 6, None, None, None])
    if solarize:
        y.copy_(torch.where((u[:, 7] < solarize)[:, None, None, None], -y.abs(), y))
    if band_dropout:
        length = (u[:, 9] * C / 3).ceil()
        start = (u[:, 10] * (C - length + 1)).floor()
        band = torch.arange(C, device=x.device)
        dropped = (band >= start[:, None]) & (band < (start + length)[:, None]) & (u[:, 8] < band_dropout)[:, None]  # (B, C)
        y.mul_(~dropped[..., None, None])
    return y.mul_(valid)


# ============ linear classifiers: probes and floors ============

def labelled_pixels(tiles, features, limit=50_000, max_tiles=2000, seed=0, device='cpu'):
    """Features and classes of labelled pixels: x (n, D) float32, y (n,), blocks (n,), about `limit` of them at the most, drawn at random from
    at most `max_tiles` tiles that have labels.

    `features(raw images) -> maps (B, D, h, w)`; maps coarser than the tile are upsampled (bilinear) to its pixels. `blocks` are numbers of the
    places the pixels lie in: neighbours, and one pixel seen in two tiles, have the same. In a folder of scenes a place is a scene.
    """
    if tiles.labels is None:
        raise UserError(f'{tiles.directory}: the split "{tiles.split}" has no labels')
    generator = torch.Generator().manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(tiles))
    chosen = np.sort(list(itertools.islice((i for i in order if tiles.labels[i].any()), max_tiles))).astype(int)
    total = sum(np.count_nonzero(tiles.labels[i]) for i in chosen)
    places, side = torch.tensor(tiles.meta['tiles'][tiles.split]), tiles.meta['settings']['split_block']
    xs, ys, blocks = [], [], []
    together = 4 if tiles.meta['tile_size'] <= 128 else 1  # maps of large tiles are large
    for start in range(0, len(chosen), together):
        ids = chosen[start:start + together]
        images, labels = tiles.batch(ids)
        pick = (labels > 0) & (torch.rand(labels.shape, generator=generator) < limit / max(total, 1))
        if not pick.any():
            continue
        maps = features(images.to(device)).float()
        if maps.shape[-1] != labels.shape[-1]:
            maps = F.interpolate(maps, size=labels.shape[-2:], mode='bilinear')
        xs.append(maps.permute(0, 2, 3, 1)[pick.to(device)])
        ys.append(label_to_class(labels[pick]).to(device))
        tile, row, col = pick.nonzero().unbind(1)
        scene, top, left = places[torch.from_numpy(ids)][tile].unbind(1)
        where = ((top + row) // side << 20) + (left + col) // side if tiles.meta['split'] != 'as the folders say' else 0
        blocks.append((scene.long() << 40) + where)
    if not xs:
        raise UserError(f'{tiles.directory}: the split "{tiles.split}" has no labelled pixel')
    return torch.cat(xs), torch.cat(ys), torch.cat(blocks).to(device)


def ridge_probe(x, y, blocks, num_classes, folds=5, strength=1e-3):
    """Closed-form linear classifier (ridge regression on one-hot targets) of features x (n, D), classes y (n,) -> scores() of each pixel under the
    classifier fitted without its fold. Folds are of whole `blocks` (n,): a pixel's neighbours do not vote on it. Seconds, no tuning.
    """
    x = torch.cat([(x - x.mean(0)) / x.std(0).clamp(min=1e-6), x.new_ones(len(x), 1)], 1).double()
    names, block = blocks.unique(return_inverse=True)
    fold = (torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).to(x.device) % folds)[block]
    targets = F.one_hot(y, num_classes).double()
    grams, sums = zip(*((part.T @ part, part.T @ targets[fold == i]) for i in range(folds) for part in [x[fold == i]]))
    penalty = strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    cm = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=x.device)
    for i in range(folds):
        weights = torch.linalg.solve(sum(grams) - grams[i] + penalty, sum(sums) - sums[i])
        cm += confusion_matrix((x[fold == i] @ weights).argmax(1), y[fold == i], num_classes)
    return scores(cm)


def fit_logistic(x, y, num_classes, max_iter=500):
    """Features x (n, D), classes y (n,) -> weights (D + 1, K), the last row the bias: logistic regression on standardised features, solved by
    L-BFGS with an L2 penalty of 1 (scikit-learn's default)."""
    center, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - center) / spread
    weights = torch.zeros(x.shape[1] + 1, num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=max_iter, history_size=20, line_search_fn='strong_wolfe', tolerance_change=1e-9)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights[:-1] + weights[-1], y) + weights[:-1].square().sum() / (2 * len(x))
        value.backward()
        return value

    with full_float32(x.device):
        optimizer.step(loss)
    weights = weights.detach()
    matrix = weights[:-1] / spread[:, None]  # of features that are not standardised
    return torch.cat([matrix, (weights[-1] - center @ matrix)[None]])


def logistic_probe(train_x, train_y, test_x, test_y, num_classes):
    """scores() on the test pixels of fit_logistic() on the training pixels"""
    weights = fit_logistic(train_x, train_y, num_classes)
    return scores(confusion_matrix((test_x @ weights[:-1] + weights[-1]).argmax(1), test_y, num_classes))


def window_means(x, valid, windows=(1, 3, 5, 9)):
    """x (B, C, H, W), valid (B, 1, H, W) -> (B, C * len(windows), H, W): means over square windows, nodata left out"""
    def box(y, k):
        return F.avg_pool2d(y, k, stride=1, padding=k // 2, count_include_pad=False)
    return torch.cat([box(x * valid, k) / box(valid.float(), k).clamp(min=1e-6) for k in windows], 1)


def spectrum_features(meta, windows, device='cpu'):
    """The function raw images -> standardised spectra averaged over `windows`, for labelled_pixels: no learning, only context."""
    mean, matrix = (t.to(device) for t in standardization(meta))
    return lambda raw: window_means(standardize(raw, mean, matrix, meta['nodata']), valid_pixels(raw, meta['nodata'])[:, None], windows)


FLOORS = {'pixel': (1,), 'window': (1, 3, 5, 9)}


def floors(directory, split='ts', label_share=1.0, seed=0, bands=''):
    """What a network must beat on `split`: majority class, chance, and logistic regression on the pixel's spectrum and on spectra
    averaged over windows of 1, 3, 5 and 9 px. Fitted on 'tr' (see Tiles for `label_share` and `bands`), kept in floors.json.
    -> dict name -> scores()"""
    path = os.path.join(directory, 'floors.json')
    known = json.load(open(path, encoding='utf-8')) if os.path.exists(path) else {}
    key = split if label_share == 1 else f'{split}, {label_share:g} of the labels, seed {seed}'
    key += f', bands {bands}' * bool(bands)
    if key in known:
        return known[key]
    train = Tiles(directory, 'tr', label_share=label_share, seed=seed, bands=bands)
    test = Tiles(directory, split, bands=bands)
    num_classes, result = train.meta['num_classes'], {}
    for name, windows in FLOORS.items():
        features = spectrum_features(train.meta, windows)
        (train_x, train_y, _), (test_x, test_y, _) = labelled_pixels(train, features, 30_000), labelled_pixels(test, features, 200_000)
        if not result:
            majority = torch.bincount(train_y, minlength=num_classes).argmax()
            result['majority'] = scores(confusion_matrix(majority.expand(len(test_y)), test_y, num_classes))
            counts = torch.bincount(test_y, minlength=num_classes).double()  # guessing, in expectation
            result['chance'] = scores(counts[:, None].expand(-1, num_classes) / num_classes)
        result[name] = logistic_probe(train_x, train_y, test_x, test_y, num_classes)
    try:
        write_json(path, {**known, key: result})
    except OSError:
        pass  # a read-only data set: computed again next time
    return result


def print_scores(rows):
    """rows: dict name -> scores(). A table in percent."""
    print(f'{"":24s}{"OA":>7s}{"mean acc":>10s}{"mIoU":>7s}{"mIoU all":>10s}{"kappa":>8s}{"mean F1":>9s}')
    for name, r in rows.items():
        print(f'{name:24s}{100 * r["oa"]:7.1f}{100 * r["mean_acc"]:10.1f}{100 * r["miou"]:7.1f}{100 * r["miou_all"]:10.1f}'
              f'{r["kappa"]:8.3f}{100 * r["mean_f1"]:9.1f}')


def append_row(path, row):
    """Add `row` (dict) to a .csv table unless it is there already; columns it does not know yet are added at the end."""
    rows = list(csv.DictReader(open(path, newline='', encoding='utf-8'))) if os.path.exists(path) else []
    row = {name: str(value) for name, value in row.items()}
    if any(all(known.get(name) == value for name, value in row.items()) for known in rows):
        return
    columns = list(dict.fromkeys(name for known in [*rows, row] for name in known))
    if rows and columns == list(rows[0]):  # one line at the end: runs that finish together do not lose each other's
        with open(path, 'a', newline='', encoding='utf-8') as file:
            csv.DictWriter(file, columns, restval='').writerow(row)
        return
    with open(f'{path}.{os.getpid()}.tmp', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, restval='')
        writer.writeheader()
        writer.writerows([*rows, row])
    os.replace(f'{path}.{os.getpid()}.tmp', path)


def print_table(path):
    """The rows of results.csv as a table: one line for each method, mean and standard deviation (n - 1) over its seeds, floors below."""
    if not os.path.exists(path):
        raise UserError(f'{path}: there are no results yet: run segment.py or baseline_deeplab.py first')
    rows = list({(row['out_dir'], row['data'], row['seed']): row for row in csv.DictReader(open(path, newline='', encoding='utf-8'))}.values())  # the last of each run
    results = ('oa', 'mean_acc', 'miou', 'miou_all', 'kappa', 'mean_f1', 'pixel_floor', 'window_floor', 'best_step', 'out_dir', 'seed', 'data', 'label_share')
    groups, seeds_of = {}, {}
    without_seed = lambda row, name: re.sub(rf'_{row["seed"]}(?=[/\\]|$)', '', row[name])
    for row in rows:
        seeds_of.setdefault((without_seed(row, 'data'), row['encoder']), set()).add(row['seed'])
    for row in rows:  # data/ip_0, data/ip_1 with seeds 0, 1: the same experiment on other splits; so are runs/mae_0, runs/mae_1, unless one is judged on all
        data = without_seed(row, 'data')
        encoder = without_seed(row, 'encoder') if len(seeds_of[data, row['encoder']]) == 1 else row['encoder']
        settings = tuple((name, encoder if name == 'encoder' else value) for name, value in row.items() if name not in results)
        group = data, float(row.get('label_share') or 1), row.get('bands') or ''
        groups.setdefault(group, {}).setdefault(settings, {})[row['data'], row['seed']] = row  # the last one, of a run made twice
    for (data, share, bands), methods in sorted(groups.items()):
        methods = {settings: list(runs.values()) for settings, runs in methods.items()}
        every = [row for runs in methods.values() for row in runs]
        at = f' at the bands {bands[:40]}' if bands else ''
        print(f'\n{data}{at}, {100 * share:g} % of the labels' + f'\n{"":44s}{"OA":>13s}{"mean acc":>13s}{"mIoU":>13s}{"mIoU all":>13s}{"seeds":>7s}')
        for settings, runs in sorted(methods.items(), key=lambda item: -np.mean([float(row['miou']) for row in item[1]])):
            alike = [dict(other) for other in methods if dict(other)['method'] == dict(settings)['method'] and dict(other)['decoder'] == dict(settings)['decoder']]
            differ = [f'{name} {value}' for name, value in settings if any(other.get(name) != value for other in alike)]  # what tells rows of one name apart
            name = ' '.join([runs[0]['method'], runs[0]['decoder'], *differ])
            cells = [np.array([100 * float(row[key]) for row in runs]) for key in ('oa', 'mean_acc', 'miou', 'miou_all')]
            print(f'{name:44s}' + ''.join(f'{v.mean():6.1f} ± {v.std(ddof=len(v) > 1):4.1f}' for v in cells) + f'{len(runs):7d}')
        for floor in ('window', 'pixel'):
            values = {(row['data'], row['seed'] if share < 1 else ''): 100 * float(row[f'{floor}_floor']) for row in every}
            values = np.array(list(values.values()))
            print(f'{floor + " floor":44s}{"":26s}{values.mean():6.1f} ± {values.std(ddof=len(values) > 1):4.1f}')


# ============ whole scenes ============

def blend_weights(side):
    """(side, side) float32: what the cells of a window count for where windows overlap, a raised cosine in each direction, most in the middle"""
    ramp = torch.sin(torch.pi * (torch.arange(side, dtype=torch.float64) + 0.5) / side).square()
    return (ramp[:, None] * ramp).float()


def sliding_window(predict, cube, window, stride, num_classes, batch_size=8):
    """Predictions for an image of any size from overlapping windows, blended smoothly so that no seam shows.

    predict(raw (B, C, window, window)) -> probabilities (B, K, window, window); cube (C, H, W), an array or a memory map. Yields
    (first row, (K, rows, W) float32) from top to bottom, rows as soon as no further window touches them: memory holds one row of windows,
    however large the scene. Windows that overlap have blend_weights(); an image smaller than the window is continued by its border.
    """
    C, H, W = cube.shape
    starts = [cut_positions(max(size, window), window, stride) for size in (H, W)]
    weight = blend_weights(window).numpy() if stride < window else np.ones((window, window), np.float32)
    weight = weight + 1e-6  # corners of the scene have one window only
    total = np.zeros((num_classes, window, max(W, window)), np.float32)
    norm = np.zeros((window, max(W, window)), np.float32)
    for top, below in zip(starts[0], starts[0][1:] + [starts[0][-1] + window]):
        for i in range(0, len(starts[1]), batch_size):
            lefts = starts[1][i:i + batch_size]
            pieces = [np.asarray(cube[:, top:top + window, left:left + window]) for left in lefts]
            pieces = [np.pad(piece, [(0, 0)] + [(0, window - side) for side in piece.shape[1:]], mode='edge') for piece in pieces]
            for left, probs in zip(lefts, predict(torch.from_numpy(np.stack(pieces))).float().cpu().numpy()):
                total[:, :, left:left + window] += probs * weight
                norm[:, left:left + window] += weight
        done = min(below - top, H - top)
        yield top, total[:, :done, :W] / norm[:done, :W]
        for array in (total, norm):  # move what the next row of windows shares with this one to the top
            keep = window - (below - top)
            array[..., :keep, :] = array[..., window - keep:, :].copy()
            array[..., keep:, :] = 0


def map_scene(predict, path, meta, window, overlap, out, probabilities=''):
    """Classify the scene at `path` by blended windows and write a map to `out`: a GeoTIFF of class numbers (uint8, 0 = missing pixel) with the
    scene's georeference and the classes' colours; beside it their names (.json) and a picture (.png).

    predict(raw (B, C, window, window)) -> probabilities (B, K, window, window), of the bands of `meta` (the training data's); a scene with
    other wavelengths is resampled to them. `probabilities` names a second GeoTIFF, (K, H, W) uint8, 255 = certain. Files appear when complete.
    """
    import tifffile
    scene = read_scene(path, mmap=True)
    scene = scene._replace(nodata=meta['nodata'] if scene.nodata is None else scene.nodata)
    (C, H, W), K, nm = scene.cube.shape, meta['num_classes'], meta['wavelengths_nm']
    same = C == meta['num_bands'] and (not nm or not scene.wavelengths_nm or np.allclose(nm, scene.wavelengths_nm, atol=1))
    if not same and not (nm and scene.wavelengths_nm):
        raise UserError(f'{path}: has {C} bands, the model was trained on {meta["num_bands"]}, and without wavelengths on both sides nobody knows '
                        'which is which: give a scene of the same bands')
    if not 0 <= overlap < 1:
        raise UserError(f'--overlap={overlap}: choose a share of the window from 0 to below 1, as 0.5')
    for name in filter(None, (out, probabilities)):
        if os.path.splitext(name)[1].lower() not in ('.tif', '.tiff'):
            raise UserError(f'{name}: the map is a GeoTIFF: choose a name that ends in .tif')
        if len({os.path.abspath(p) for p in (path, out, probabilities) if p}) < 2 + bool(probabilities):
            raise UserError(f'{name}: scene, map and probabilities need names of their own: change --out or --probabilities')
    if not same:
        print(f'{path}: {C} bands are resampled to the {meta["num_bands"]} of the model')

    def classify(raw):  # invalid pixels become NaN, which every later step knows
        x = raw.numpy()
        valid = valid_pixels(x, scene.nodata)
        if not same:
            x = np.stack([resample_bands(image, scene.wavelengths_nm, nm) for image in np.nan_to_num(x)])
        return predict(torch.from_numpy(np.where(valid[:, None], x, np.nan).astype(np.float32)))

    def create(name, **kind):  # an array on disk under a temporary name
        tags = [(*tag, True) for tag in scene.geotags] + ([(42113, 's', 0, '0', True)] if name == out else [])  # a probability of 0 is a value
        return tifffile.memmap(name + '.tmp', dtype=np.uint8, extratags=tags, metadata=None, **kind)

    colors = np.zeros((3, 256), np.uint16)
    colors[:, :K + 1] = class_colors(meta['class_names']).T.astype(np.uint16) * 257
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    classes = create(out, shape=(H, W), photometric='palette', colormap=colors)
    shares = create(probabilities, shape=(K, H, W), photometric='minisblack', **({'planarconfig': 'separate'} if K > 1 else {})) if probabilities else None
    stride, started = max(1, round(window * (1 - overlap))), time.time()
    with tqdm(total=H, unit='row', dynamic_ncols=True) as bar:
        for top, probs in sliding_window(classify, scene.cube, window, stride, K):
            rows = slice(top, top + probs.shape[1])
            valid = valid_pixels(np.asarray(scene.cube[:, rows]), scene.nodata)
            classes[rows] = np.where(valid, probs.argmax(0) + 1, 0)
            if probabilities:
                shares[:, rows] = np.where(valid, np.round(255 * probs), 0)
            bar.update(probs.shape[1])
    classes.flush()
    if probabilities:
        shares.flush()
    save_map(os.path.splitext(out)[0] + '.png', scene._replace(wavelengths_nm=scene.wavelengths_nm or (nm if same else None)), classes, meta['class_names'])
    del classes, shares  # Windows renames no file that is mapped
    for name in filter(None, (out, probabilities)):
        os.replace(name + '.tmp', name)
    write_json(os.path.splitext(out)[0] + '.json', {str(k + 1): name for k, name in enumerate(meta['class_names'])})
    where = ('' if any(tag[0] == 34735 for tag in scene.geotags) else '; placed as the scene is, without a coordinate system: none that is known here was found in it'
             if scene.geotags else '; no georeference: none was found in the scene (it is read from GeoTIFF and ENVI files)')
    print(f'{out}: {H} x {W} pixels in {time.time() - started:.0f} s{where}')


# ============ pictures ============

OHS_PALETTE = ('bed2ff 00ffc5 267300 a3ff73 4ce600 55ff00 737300 a8a800 ffff00 73b2ff 005ce6 002673 7a8ef5 00a884 730000 ff7f7f '
               'ffbebe ffbee8 ff00c5 e600a9 a80084 73004c ff73df a1a1a1').split()  # the colours of earlier work on WHU-OHS
SAFE_PALETTE = 'e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 999999'.split()  # told apart by colour-blind eyes (Okabe and Ito 2008)


def class_colors(class_names):
    """(K + 1, 3) uint8: black for unlabelled, then one colour a class: WHU-OHS's own for its classes, safe ones for up to 8, else tab20's"""
    if tuple(class_names) == OHS_CLASSES:
        palette = OHS_PALETTE
    elif len(class_names) <= len(SAFE_PALETTE):
        palette = SAFE_PALETTE
    else:
        from matplotlib import colormaps, colors
        palette = [colors.to_hex(c)[1:] for c in colormaps['tab20'].colors]
    return np.array([[0, 0, 0]] + [[int(palette[k % len(palette)][i:i + 2], 16) for i in (0, 2, 4)] for k in range(len(class_names))], np.uint8)


def principal_colors(features):
    """features (..., D) -> (..., 3) in 0..1, on the CPU: their three leading principal components, each scaled to mean 0.5 and 2 standard deviations"""
    points = features.flatten(0, -2).double()
    points = points - points.mean(0)
    directions = torch.linalg.eigh(points.T @ points).eigenvectors[:, -3:].flip(1)
    directions = directions * directions.sum(0).sign()  # a component has no sign of its own: choose one
    shown = points @ directions
    return (shown / shown.std(0).clamp(min=1e-12) / 4 + 0.5).clamp(0, 1).reshape(*features.shape[:-1], 3).cpu()


def false_color_bands(wavelengths_nm, num_bands):
    """Numbers of three bands to show as red, green, blue: near infrared, red, green where wavelengths are known"""
    nm = np.array(wavelengths_nm or [], float)
    if len(nm) and nm.min() < 600 < 800 < nm.max():
        return [int(np.argmin(np.abs(nm - w))) for w in (866, 656, 560)]
    return [round(f * (num_bands - 1)) for f in (0.75, 0.5, 0.2)]


def false_color(x, meta):
    """x (C, H, W) values of a scene -> (H, W, 3) in 0..1, mean ± 2 standard deviations of each band of false_color_bands(); missing = black"""
    bands = false_color_bands(meta['wavelengths_nm'], len(x))
    x = np.asarray(x)[bands].astype(np.float32)  # torch 2.6 does not index uint16
    mean, std = np.array(meta['mean'])[bands], np.array(meta['std'])[bands]  # one stretch for the data set: pictures compare
    rgb = (np.moveaxis(x, 0, 2) - mean) / (4 * std) + 0.5
    return np.where(valid_pixels(x, meta['nodata'])[..., None], rgb, 0).clip(0, 1)


def are_numbered(class_names):
    """Past 8 classes no palette is safe for colour-blind eyes: pictures then carry the classes' numbers as well"""
    return len(class_names) > len(SAFE_PALETTE)


def show_classes(axis, classes, class_names, step=1):
    """Draw classes (h, w), 0 = none, in their colours, `step` pixels of the scene apart; where colours do not do, number their larger areas"""
    (h, w), colors = classes.shape, class_colors(class_names)
    axis.imshow(colors[classes], interpolation='nearest', extent=(0, w * step, h * step, 0))
    inside, depth = (classes > 0) & are_numbered(class_names), np.zeros(classes.shape, int)
    while inside.any():  # peel the areas: what is left last is the middle of an area, and deep enough for a number
        depth += inside
        rim = np.pad(np.where(inside, classes, 0), 1)
        inside &= np.all([classes == part for part in (rim[:-2, 1:-1], rim[2:, 1:-1], rim[1:-1, :-2], rim[1:-1, 2:])], 0)
    rows, cols = np.mgrid[:h, :w]
    depth[depth < max(3, max(h, w) // 24)] = 0
    while depth.any():
        row, col = np.unravel_index(depth.argmax(), depth.shape)
        number = classes[row, col]
        axis.text((col + 0.5) * step, (row + 0.5) * step, str(number), ha='center', va='center', fontsize=7,
                  color='black' if colors[number] @ (0.3, 0.59, 0.11) > 110 else 'white')
        depth[(classes == number) & (np.hypot(rows - row, cols - col) < max(h, w) / 3)] = 0  # one number is enough there


def class_legend(figure, class_names, present):
    """Below the figure: the colours of the classes in `present` (their numbers, 0 = none)"""
    from matplotlib.patches import Patch
    labels = [f'{k} {name}' if are_numbered(class_names) else name for k, name in enumerate(class_names, 1)]
    shown = [(k, labels[k - 1]) for k in sorted(present) if k] + [(0, 'no label, no data')] * (0 in present)
    columns = max(1, int(figure.bbox.width / figure.dpi / (0.55 + 0.07 * max(len(label) for _, label in shown))))
    figure.legend(handles=[Patch(color=class_colors(class_names)[k] / 255, label=label) for k, label in shown], loc='outside lower center', fontsize=8,
                  ncols=min(columns, len(shown)), frameon=False)


def save_map(path, scene, classes, class_names, max_side=600):
    """Picture of a map: the scene in false colour, its labels if it has some, classes (H, W). Of large scenes every n-th pixel is read and shown."""
    from matplotlib.figure import Figure
    H, W = classes.shape
    step = math.ceil(max(H, W) / max_side)
    thin, bands = scene.cube[:, ::step, ::step], false_color_bands(scene.wavelengths_nm, len(scene.cube))
    x = np.asarray(thin[bands], np.float32)
    valid = valid_pixels(x, scene.nodata)
    stretch = {'mean': np.zeros(len(thin)), 'std': np.ones(len(thin))}
    for band, values in zip(bands, x[:, valid]):
        stretch['mean'][band], stretch['std'][band] = (values.mean(), max(values.std(), 1e-6)) if len(values) else (0, 1)
    rgb = false_color(thin, {**stretch, 'wavelengths_nm': scene.wavelengths_nm, 'nodata': scene.nodata})
    panels = {'labels': scene.labels, 'map': classes} if scene.labels is not None and scene.labels.any() else {'map': classes}
    panels = {title: np.asarray(shown[::step, ::step]) for title, shown in panels.items()}
    stacked, n = W > 2 * H, 1 + len(panels)
    height = n * (min(9 * H / W, 9) + 0.3) if stacked else min(9 / n * H / W, 9)
    figure = Figure(figsize=(9, height + 1), layout='constrained')
    axes = figure.subplots(*((n, 1) if stacked else (1, n)), sharex=True, sharey=True, squeeze=False).ravel()
    axes[0].imshow(rgb, interpolation='nearest', extent=(0, rgb.shape[1] * step, rgb.shape[0] * step, 0))
    axes[0].set_title('false colour', fontsize=10)
    for axis, (title, shown) in zip(axes[1:], panels.items()):
        show_classes(axis, shown, class_names, step)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.set_xlabel('column, px', fontsize=8)
    axes[0].set_ylabel('row, px', fontsize=8)
    class_legend(figure, class_names, set(np.unique(list(panels.values())).tolist()))
    save_figure(figure, path)


def save_figure(figure, path):
    for text in figure.findobj(lambda artist: hasattr(artist, 'set_parse_math')):
        text.set_parse_math(False)  # the name of a class may hold a $
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() != 'linear'):
        axis.set_major_formatter('{x:,.10g}')  # matplotlib's own are formulas, now shown as their source
    figure.savefig(path + '.tmp', format='png', dpi=110, bbox_inches='tight')
    os.replace(path + '.tmp', path)
    figure.clear()


# ============ the data set doctor ============

def check(args):
    """The command `check`: facts, faults and floors of a tile directory. Exit code 1 when something is wrong."""
    splits = [s for s in SPLITS if Tiles(args.data, 'tr').meta['tiles'][s]]
    tiles, problems, seen = {s: Tiles(args.data, s) for s in splits}, [], {}
    meta = tiles['tr'].meta
    counts = {s: np.zeros(256, np.int64) for s in splits}
    sums = np.zeros((3, meta['num_classes'] + 1, meta['num_bands']))  # pixels, values, squares by class
    levels = [set() for _ in range(meta['num_bands'])]
    same, leaks = dict.fromkeys(('within a split', 'across splits'), 0), 0
    for split in splits:
        for i in tqdm(range(len(tiles[split])), desc=f'reading {split}', unit='tile', leave=False):
            image = np.asarray(tiles[split].images[i])
            labels = np.asarray(tiles[split].labels[i]) if tiles[split].labels is not None else np.zeros(image.shape[1:], np.uint8)
            counts[split] += np.bincount(labels.ravel(), minlength=256)
            key = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            if key in seen:
                other_split, j = seen[key]
                same['within a split' if other_split == split else 'across splits'] += 1
                if other_split != split and tiles[split].labels is not None:
                    leaks += int(((labels > 0) & (tiles[other_split].labels[j] > 0)).sum())
            seen.setdefault(key, (split, i))
            if split == 'tr':
                valid = valid_pixels(image, meta['nodata'])
                for k in np.unique(labels[valid]):
                    if k <= meta['num_classes']:
                        x = image[:, valid & (labels == k)].astype(np.float64)
                        sums[:, k] += np.stack([np.full(len(x), x.shape[1]), x.sum(1), (x ** 2).sum(1)])
                if i < 64:
                    for band, values in zip(levels, image[:, valid]):
                        band.update(np.unique(values[:4096]).tolist())
    print(f'{args.data}: {meta["num_bands"]} bands of {meta["dtype"]}, tiles of {meta["tile_size"]} px; split: {meta["split"]}')
    print(f'tiles {({s: len(t) for s, t in tiles.items()})}; nodata {100 * meta["nodata_share"]:.1f} % of the pixels')
    few, many = min(map(len, levels)), max(map(len, levels))
    print(f'effective grey levels per band (first tiles): {few} to {many}')
    print(f'identical tiles within a split {same["within a split"]}, across splits {same["across splits"]}')
    print(f'{"class":28s}' + ''.join(f'{s:>12s}' for s in splits))
    for k, name in enumerate(meta['class_names']):
        print(f'{k + 1:3d} {name[:24]:24s}' + ''.join(f'{counts[s][k + 1]:12d}' for s in splits))
        if counts['tr'][k + 1] == 0 and any(counts[s][k + 1] for s in splits):
            problems.append(f'class {k + 1} ({name}) has labels but none in tr: tile with another --seed or a smaller --split_block')
    for split in splits:
        if counts[split][meta['num_classes'] + 1:].any():
            problems.append(f'{split}: label values above {meta["num_classes"]} (up to {np.flatnonzero(counts[split])[-1]}): '
                            'repair the labels and tile again')
    flat = [band for band, std in enumerate(meta['std']) if not std > 0]
    if flat:
        problems.append(f'bands {flat[:8]} have one value only: leave them out of the scene')
    if few < 16:
        problems.append(f'a band has only {few} grey levels: the scene was quantised; use the sensor\'s own values')
    if leaks:
        problems.append(f'{leaks} pixels are labelled in two splits (identical tiles): remove the duplicates from tr')
    if counts['tr'][1:].any() and len(splits) > 1:
        rows = floors(args.data, splits[-1])
        print(f'\nfloors on {splits[-1]} (%): what a network must beat')
        print_scores(rows)

    save_check(os.path.join(args.data, 'check.png'), tiles, counts, sums)
    print(f'picture: {os.path.join(args.data, "check.png")}')
    if problems:
        raise UserError('\n'.join(f'{args.data}: {problem}' for problem in problems))
    print('nothing wrong found')


def save_check(path, tiles, counts, sums):
    """check.png: one training tile (false colour, single bands, labels), labelled pixels of each class and split, mean spectrum of each class.

    tiles, counts: dicts split -> Tiles, pixels of each label (256,); sums (3, K + 1, C): pixels, values and squares by label
    """
    from matplotlib.figure import Figure
    train, meta, names = tiles['tr'], tiles['tr'].meta, tiles['tr'].meta['class_names']
    spectra = [k for k in range(1, meta['num_classes'] + 1) if sums[0, k, 0] > 1] or [0]
    columns = min(len(spectra), 6)
    rows = math.ceil(len(spectra) / columns)
    figure = Figure(figsize=(9, 4.9 + 0.2 * math.ceil(len(names) / 4) + 1.2 * rows), layout='constrained')
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.2 + 0.2 * math.ceil(len(names) / 4), 2.2, 0.5 + 1.2 * rows))

    many = [len(np.unique(labels)) + (labels > 0).mean() for labels in train.labels[:500]] if train.labels is not None else [0]
    image, nm = np.asarray(train.images[np.argmax(many)]), meta['wavelengths_nm']
    axes = top.subplots(1, 5)
    axes[0].imshow(false_color(image, meta), interpolation='nearest')
    axes[0].set_title('false colour', fontsize=9)
    axes[0].set_ylabel(f'tile {np.argmax(many)} of tr, {image.shape[1]} px', fontsize=8)
    gray = np.where(valid_pixels(image, meta['nodata']), image, np.nan)
    for axis, share in zip(axes[1:], (0.2, 0.5, 0.8)):
        band = round(share * (len(image) - 1))
        low, high = np.nanquantile(gray[band], (0.02, 0.98)) if np.isfinite(gray[band]).any() else (0, 1)
        axis.imshow(gray[band], cmap='gray', vmin=low, vmax=high, interpolation='nearest')
        axis.set_title(f'band {band + 1}' + (f', {nm[band]:.0f} nm' if nm else ''), fontsize=9)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    if train.labels is None:
        axes[4].axis('off')
    else:
        show_classes(axes[4], train.labels[np.argmax(many)], names)
        axes[4].set_title('labels', fontsize=9)
        class_legend(top, names, range(len(names) + 1))

    axis = middle.subplots()
    for i, (split, color) in enumerate(zip(tiles, ('#0072b2', '#e69f00', '#999999'))):
        axis.bar(np.arange(len(names)) + 0.27 * (i - 1), counts[split][1:len(names) + 1], 0.27, label=split, color=color)
    axis.set(yscale='symlog', ylim=(0, None), xticks=range(len(names)))
    axis.set_ylabel('labelled pixels', fontsize=8)
    axis.set_xticklabels([str(k) if are_numbered(names) else name.replace(' ', '\n') for k, name in enumerate(names, 1)])
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, ncols=3, loc='lower right', bbox_to_anchor=(1, 1), frameon=False)

    nm = np.array(nm or range(1, meta['num_bands'] + 1), float)
    order = np.argsort(nm)
    mean = sums[1] / sums[0].clip(1)
    std = np.sqrt((sums[2] / sums[0].clip(1) - mean ** 2).clip(0))
    axes = bottom.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, k in itertools.zip_longest(axes.flat, spectra):
        if k is None:
            axis.axis('off')
            continue
        for other in spectra:  # the others in gray: what a class is to be told from
            axis.plot(nm[order], mean[other, order], color='0.8', linewidth=0.5)
        color = class_colors(names)[k] / 255
        axis.fill_between(nm[order], (mean - std)[k, order], (mean + std)[k, order], color=color, alpha=0.6, linewidth=0)
        axis.plot(nm[order], mean[k, order], color='black', linewidth=1)
        axis.set_title('\n'.join(textwrap.wrap(f'{k} {names[k - 1]}', 26)) if k else 'all pixels', fontsize=7)
        axis.tick_params(labelsize=7)
    bottom.supxlabel('wavelength, nm' if meta['wavelengths_nm'] else 'band', fontsize=8)
    bottom.supylabel('stored value, mean ± std', fontsize=8)
    save_figure(figure, path)


# ============ the demo data set ============

def smooth_noise(rng, size, scale):
    """(size, size) Gaussian noise, smoothed to patches of about `scale` px, mean 0 and std 1"""
    f = np.fft.fftfreq(size)
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * np.exp(-2 * (np.pi * scale / 2.5) ** 2 * (f[:, None] ** 2 + f ** 2))).real
    return (field - field.mean()) / field.std()


def demo_scene(rng, size, classes):
    """One synthetic scene -> image (size, size, 32) int16 z-scores x 10,000 as in WHU-OHS, labels (size, size) uint8.

    Classes come in families of nearly the same mean spectrum, each class in three varieties (crops, roofs) that differ from other classes' by
    traces: smooth spectra of a hundredth of the reflectance, which vary from pixel to pixel by more than that. So one pixel tells little, its
    surroundings tell more, and no plane separates a class. Eigenvalues and neighbours' correlation of the components are like `indian_pines`'.
    """
    nm = np.array(OHS_NM, float)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    vegetation = 0.04 + 0.03 * np.exp(-((nm - 550) / 30) ** 2) + 0.42 * sigmoid((nm - 715) / 14)  # green peak, red edge
    soil = 0.08 + 0.25 * (nm - 466) / 474
    water = 0.07 * np.exp(-(nm - 466) / 160)
    built = 0.2 + 0.05 * np.sin(nm / 120)
    absorption = 1 - 0.25 * np.exp(-((nm - 760) / 8) ** 2) - 0.3 * np.exp(-((nm - 935) / 18) ** 2)  # oxygen, water vapour
    families = [(vegetation, soil), (vegetation, built), (soil, built), (water, vegetation), (water, soil), (built, water)]
    labels = np.stack([smooth_noise(rng, size, 34) + bias for bias in classes]).argmax(0)  # long-tailed by the biases
    variety = np.stack([smooth_noise(rng, size, 26) for _ in range(3)]).argmax(0)
    order = np.arange(1, 15)
    waves = np.cos(np.pi * order[:, None] * (nm - 466) / 474) / order[:, None] ** 0.7  # 14 smooth spectra span the traces
    signatures = np.random.default_rng(0).normal(size=(3, len(classes), 14))  # the same in all scenes
    within_fields = np.stack([smooth_noise(rng, size, scale) for scale in rng.permutation(np.geomspace(1.5, 12, 14))], -1)
    traces = 0.007 * signatures[variety, labels] + 0.003 * within_fields + 0.015 * rng.normal(size=(size, size, 14))
    spectra = traces @ waves
    rows, cols = np.mgrid[:size, :size]
    mixture = 0.1 * smooth_noise(rng, size, 5)
    for k in range(len(classes)):
        first, second = families[k % 6]
        period, angle = (3.2, 4.5, 7, 11)[k // 6], (0, 0.8, 1.6, 2.4)[(k // 6 + k) % 4]
        phase = 2 * np.pi * (rows * np.sin(angle) + cols * np.cos(angle)) / period
        texture = np.sin(phase + smooth_noise(rng, size, 30)) if k % 2 else smooth_noise(rng, size, period)
        share = (0.38 + 0.08 * (k // 6) + 0.03 * texture + mixture).clip(0, 1)[..., None]
        here = labels == k
        spectra[here] += (share * first + (1 - share) * second)[here]
    blurred = sum(np.roll(spectra, shift, (0, 1)) for shift in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))) / 5  # mixed edges
    light = 1 + 0.1 * smooth_noise(rng, size, 45)[..., None] + 0.05 * rng.normal()
    tilt = 1 + 0.04 * smooth_noise(rng, size, 60)[..., None] * (nm - 700) / 240  # haze: not the same at all wavelengths
    image = (0.5 * spectra + 0.5 * blurred) * absorption * light * tilt + 0.002 * rng.normal(size=spectra.shape)
    image = (image - image.mean((0, 1))) / image.std((0, 1))
    image = (image * 10_000).clip(-32_767, 32_767).astype(np.int16)
    labels = (labels + 1).astype(np.uint8)
    labels[smooth_noise(rng, size, 20) > 1.2] = 0  # unlabelled islands
    corner = rows + cols < rng.integers(0, size // 3)
    image[corner], labels[corner] = -32_768, 0
    return image, labels


def demo(args):
    """The command `demo`: synthetic scenes in the WHU-OHS layout under OUT/scenes, tiled into OUT. Nothing to download."""
    import tifffile
    rng = np.random.default_rng(0)
    bias = -0.09 * np.arange(24)[rng.permutation(24)]  # a long-tailed prior: common classes win the argmax more often
    for split, count in zip(SPLITS, (24, 6, 8)):
        for folder in ('image', 'label'):
            os.makedirs(os.path.join(args.out, 'scenes', split, folder), exist_ok=True)
        for i in range(count):
            path = os.path.join(args.out, 'scenes', split, '{}', f'D_{i + 1:04d}.tif')
            image, labels = demo_scene(np.random.default_rng([SPLITS.index(split), i]), 128, bias + rng.normal(0, 0.5, 24))
            tifffile.imwrite(path.format('image'), image, planarconfig='contig', photometric='minisblack',
                             extratags=[(42113, 's', 0, '-32768', True)])
            tifffile.imwrite(path.format('label'), labels, photometric='minisblack')
    tile(parse(['tile', f'--root={os.path.join(args.out, "scenes")}', f'--out={args.out}', '--tile_size=64']))


def demo_if_missing(directory):
    """The scripts' default data set is made on first use."""
    if directory == 'data/demo' and not os.path.exists(os.path.join(directory, 'meta.json')):
        demo(parse(['demo', f'--out={directory}']))


# ============ command line ============

def parse(argv=None):
    boolean = lambda text: bool(('false', 'true').index(text.lower()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)
    p = commands.add_parser('tile', help='cut scenes into tiles', allow_abbrev=False)
    p.add_argument('--root', required=True, help='a scene, several separated by commas, or a folder tr|val|ts / image|label')
    p.add_argument('--out', required=True, help='directory for the tiles')
    p.add_argument('--tile_size', type=int, default=64, help='side of a tile in pixels (default %(default)s)')
    p.add_argument('--stride', type=int, default=0, help='step between training tiles; 0 = tile_size, less = they overlap')
    p.add_argument('--labels', default='', help='label file of each scene, if the scene has none inside')
    p.add_argument('--bands', default='', help='resample to these wavelengths in nm (comma-separated, "ohs" or "landsat"; 485:70 = 70 nm wide)')
    p.add_argument('--split', default='blocks', choices=('blocks', 'halves'), help='how labels of one scene are split: blocks shares '
                   'the image between splits (transductive), halves cuts it (inductive)')
    p.add_argument('--split_block', type=int, default=16, help='side of a block in pixels (default %(default)s)')
    p.add_argument('--split_gap', type=int, default=0, help='pixels left unused beside a block of another split (default %(default)s)')
    p.add_argument('--shares', default='0.5,0.1,0.4', help='shares of tr,val,ts (default %(default)s)')
    p.add_argument('--seed', type=int, default=0, help='of the split (default %(default)s)')
    p.add_argument('--skip_bad', type=boolean, default=False, help='true = go on without files that cannot be used')
    p = commands.add_parser('check', help='statistics, faults and floors of a tile directory', allow_abbrev=False)
    p.add_argument('--data', default='data/demo', help='a tile directory (default %(default)s)')
    p = commands.add_parser('demo', help='make the synthetic data set', allow_abbrev=False)
    p.add_argument('--out', default='data/demo', help='where (default %(default)s)')
    args = parser.parse_args(argv)
    if args.command == 'tile':
        shares = args.shares.split(',')
        if len(shares) != 3 or not all(s.replace('.', '', 1).isdigit() for s in shares) or abs(sum(map(float, shares)) - 1) > 1e-6:
            parser.error(f'--shares={args.shares}: give three numbers that add up to 1, as 0.5,0.1,0.4')
        if args.tile_size < 1 or args.stride < 0 or args.split_block < 1 or args.split_gap < 0:
            parser.error('--tile_size and --split_block start at 1, --stride and --split_gap at 0')
    return args


def plain_errors():
    """From here on a user's mistake ends the program with its sentence and exit code 1, not with a traceback."""
    def hook(kind, error, trace):
        full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if issubclass(kind, (UserError, KeyboardInterrupt)) or (issubclass(kind, OSError) and (error.filename or full)):
            print(f'error: {error}' if str(error) else 'interrupted', file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
    sys.excepthook = hook


if __name__ == '__main__':
    plain_errors()
    arguments = parse()
    {'tile': tile, 'check': check, 'demo': demo}[arguments.command](arguments)
