"""From scenes on disk to batches on the device, and from predictions to scores.

    python data.py demo                                                   # synthetic scenes
    python data.py tile --root=scene.npz --out=data/scene                 # one scene
    python data.py tile --root=WHU-OHS --out=data/whu                     # tr|val|ts / image|label
    python data.py tile --root=a.npz,b.hdr --bands=landsat --normalize=scene --out=data/two

A tile directory holds {tr,val,ts}_images.npy (N, C, S, S) in the sensor's own type,
{tr,val,ts}_labels.npy (N, S, S) uint8 (0 = unlabelled, classes from 1) and meta.json. Everything
after that is memory-mapped: no worker processes, no file formats.

Shapes: B tiles or crops, C bands, S side of a tile, K classes, D features, V crops of a tile.
"""
import argparse
import contextlib
import errno
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks: see to it that one process writes a directory
    fcntl = None

from scenes import (OHS_NM, READERS, UserError, band_matrix, both_files, is_header_of_tiff,
                    mix_bands, normalized, one_line, parse_bands, read_scene, same_bands,
                    split_name, strips, valid_pixels)

SPLITS = ('tr', 'val', 'ts')
IGNORE_INDEX = 255
BY_FOLDERS = 'as the folders say'  # meta['split'] of a folder of scenes
OHS_CLASSES = (
    'Paddy field', 'Dry farm', 'Woodland', 'Shrubbery', 'Sparse woodland', 'Other forest land',
    'High-covered grassland', 'Medium-covered grassland', 'Low-covered grassland', 'River canal',
    'Lake', 'Reservoir pond', 'Beach land', 'Shoal', 'Urban built-up', 'Rural settlement',
    'Other construction land', 'Sand', 'Gobi', 'Saline-alkali soil', 'Marshland', 'Bare land',
    'Bare rock', 'Ocean')


# ============ labels and scores ============

def label_to_class(raw):
    """Raw labels (0 = unlabelled, classes from 1) -> class indices: k -> k - 1, 0 -> 255, ignored.

    Nothing else touches labels.
    """
    return torch.where(raw == 0, IGNORE_INDEX, raw.long() - 1)


def confusion_matrix(pred, target, num_classes):
    """Class indices of one shape, target 255 ignored -> (K, K) counts: rows target, columns pred"""
    known = target != IGNORE_INDEX
    pairs = target[known].long() * num_classes + pred[known].long()
    counts = torch.bincount(pairs, minlength=num_classes ** 2)
    return counts.reshape(num_classes, num_classes)


def scores(cm):
    """(K, K) confusion matrix (rows = target) -> dict of fractions.

    `miou`, `mean_acc` and `mean_f1` are over the classes present in the targets (as in WHU-OHS and
    most papers), `miou_all` over all K with absent classes as 0; `iou` has None for absent ones.
    """
    cm = cm.double().cpu()
    total = cm.sum().clamp(min=1)
    hit, target, pred = cm.diag(), cm.sum(1), cm.sum(0)
    present = target > 0
    iou = hit / (target + pred - hit).clamp(min=1)
    oa = (hit.sum() / total).item()
    chance = (target @ pred / total ** 2).item()

    def mean(values):
        return values[present].mean().item() if present.any() else 0.0

    return {'oa': oa,
            'mean_acc': mean(hit / target.clamp(min=1)),
            'miou': mean(iou),
            'miou_all': (iou * present).mean().item(),
            'kappa': (oa - chance) / max(1 - chance, 1e-12),
            'mean_f1': mean(2 * hit / (target + pred).clamp(min=1)),
            'iou': [value.item() if there else None for value, there in zip(iou, present)]}


def chance_warning(result):
    """A sentence when scores() are not clearly above chance, else ''. Read it first."""
    guessing = 1 / max(sum(iou is not None for iou in result['iou']), 1)
    if result['kappa'] >= 0.02 and abs(result['mean_acc'] - guessing) >= 0.01:
        return ''
    return (f'WARNING: not clearly above chance (kappa {result["kappa"]:.3f}, mean accuracy '
            f'{result["mean_acc"]:.3f} where guessing gives {guessing:.3f}): check that '
            'predictions and labels are paired and numbered alike')


def print_scores(rows):
    """rows: dict name -> scores(). A table in percent."""
    print(f'{"":24s}     OA  mean acc   mIoU  mIoU all   kappa  mean F1')
    for name, row in rows.items():
        print(f'{name:24s}{100 * row["oa"]:7.1f}{100 * row["mean_acc"]:10.1f}'
              f'{100 * row["miou"]:7.1f}{100 * row["miou_all"]:10.1f}{row["kappa"]:8.3f}'
              f'{100 * row["mean_f1"]:9.1f}')


# ============ tiler: which pixels for which split ============

class Input(NamedTuple):
    """One scene to be tiled"""
    name: str  # as meta.json lists it
    path: str  # a file, or an array in one, as file.mat:name
    labels: str  # the same of its labels; '' = labels inside, or none
    split: str  # tr, val or ts; '' = its labels are to be split


class Region(NamedTuple):
    """The area of a scene that the tiles of one split are cut from"""
    split: str
    rows: slice
    cols: slice
    labels: np.ndarray  # (H, W) uint8 of the whole scene; 0 where a label is another split's


def list_inputs(root, labels):
    """--root and --labels -> list of Input; a folder is one of tr|val|ts / image|label"""
    if not os.path.isdir(root):
        paths = root.split(',')
        label_paths = labels.split(',') if labels else [''] * len(paths)
        if len(label_paths) != len(paths):
            raise UserError(f'--labels names {len(label_paths)} files for {len(paths)} scenes: '
                            'give one for each, separated by commas')
        return [Input(path, path, label_path, '') for path, label_path in zip(paths, label_paths)]
    if labels:
        raise UserError(f'--labels={labels}: goes with scene files. In the folder {root} labels '
                        'lie beside the images: tr/image/x.tif, tr/label/x.tif')
    inputs = []
    for split in SPLITS:
        images, label_dir = (os.path.join(root, split, kind) for kind in ('image', 'label'))
        for name in sorted(os.listdir(images)) if os.path.isdir(images) else []:
            path = os.path.join(images, name)
            if name.lower().endswith(tuple(READERS)) and not is_header_of_tiff(path):
                label_path = os.path.join(label_dir, name) if os.path.isdir(label_dir) else ''
                inputs.append(Input(f'{split}/{name}', path, label_path, split))
    if not any(item.split == 'tr' for item in inputs):
        raise UserError(f'{root}: no images under {os.path.join(root, "tr", "image")}: expected '
                        'tr|val|ts / image|label, or pass scene files, separated by commas')
    return inputs


def open_input(item, args):
    """-> its Scene at --bands and --normalize; a large one stays on disk"""
    scene = read_scene(item.path, item.labels, True, args.axes, args.nodata, args.drop_bands,
                       args.keep_bad_bands)
    if scene.cube.dtype.itemsize * math.prod(scene.cube.shape) <= IN_MEMORY:
        scene = scene._replace(cube=np.asarray(scene.cube))  # unpacked once, not at every use
    if item.split and len(scene.cube) == 32 and scene.cube.dtype == np.int16:  # WHU-OHS
        note = 'taken for WHU-OHS: its wavelengths and class names are filled in'
        scene = scene._replace(wavelengths_nm=scene.wavelengths_nm or list(OHS_NM),
                               class_names=scene.class_names or list(OHS_CLASSES),
                               notes=(*scene.notes, note))
        if scene.labels is not None and scene.labels.max() > 24:
            raise UserError(f'{item.path}: its label file has the value {scene.labels.max()}, '
                            'WHU-OHS has classes 1 to 24 (0 = unlabelled): repair the label file')
    in_strips = (scene.cube[:, strip] for strip in strips(scene.cube))
    if not any(valid_pixels(values, scene.nodata).any() for values in in_strips):
        raise UserError(f'{item.path}: no valid pixel, all are NaN or nodata: remove it')
    if args.bands:
        if not scene.wavelengths_nm:
            raise UserError(f'{item.path}: --bands needs the wavelengths of the scene, and the '
                            'file has none: save it as .npz with wavelengths_nm')
        nm, fwhm = parse_bands(args.bands)
        weights = band_matrix(scene.wavelengths_nm, nm, fwhm, item.path)
        scene = mix_bands(scene, weights, nm.tolist(), fwhm.tolist())
    if args.normalize == 'scene':
        scene = normalized(scene)
    return scene


def regions_of(scene, item, args):
    """-> list of Region: one where a folder says the split, else by blocks or halves of labels"""
    H, W = scene.cube.shape[1:]
    rows, cols = slice(0, H), slice(0, W)
    labels = np.zeros((H, W), np.uint8)
    if scene.labels is not None:
        labels = scene.labels.copy()  # cut() will change it
    shares = [float(share) for share in args.shares.split(',')]
    regions = []
    if item.split or not labels.any():
        regions = [Region(item.split or 'tr', rows, cols, labels)]
    elif args.split == 'blocks':  # all splits see the whole image, each its own labels
        deal = split_by_blocks(labels, shares, args.split_block, args.split_gap, args.seed)
        regions = [Region(split, rows, cols, np.where(deal == number, labels, 0))
                   for number, split in enumerate(SPLITS) if shares[number]]
    else:  # the scene itself is cut across its longer side: no pixel is shared
        ends = np.round(np.cumsum([0, *shares]) * max(H, W)).astype(int).tolist()
        for split, start, stop in zip(SPLITS, ends, ends[1:]):
            area = (slice(start, stop), cols) if H >= W else (rows, slice(start, stop))
            if stop > start:
                regions.append(Region(split, *area, labels))
    for split, rows, cols, _ in regions:
        height, width = rows.stop - rows.start, cols.stop - cols.start
        if min(height, width) < args.tile_size:
            raise UserError(f'{item.path}: its area for {split} has {height} x {width} pixels, '
                            f'less than --tile_size={args.tile_size}: choose smaller tiles')
    return regions


def split_by_blocks(labels, shares, block, gap, seed):
    """(H, W) labels -> (H, W) split numbers 0, 1, 2: blocks dealt out so that each class has its
    share of each split.

    Blocks have the colours of a checkerboard. In random order all of one colour come first, then
    the others: tr takes its share from the front, ts from the end. Of 500 such deals the one
    nearest to the shares is kept, and a class still missing from tr gets its largest block.
    Pixels within `gap` of a block of another split get 3 (unused).
    """
    H, W = labels.shape
    h, w = math.ceil(H / block), math.ceil(W / block)
    num_blocks = h * w
    block_of = (np.arange(H) // block)[:, None] * w + np.arange(W) // block  # (H, W)
    counts = np.stack([np.bincount(block_of[labels == k], minlength=num_blocks)
                       for k in range(1, labels.max() + 1)], 1)  # (blocks, classes)
    pixels = counts.sum(0)

    # deals that give a class too little of a split cost most, most of all in tr
    rng = np.random.default_rng(seed)
    white = (np.add.outer(np.arange(h), np.arange(w)) % 2).ravel()
    ends = np.round(np.cumsum(shares) * num_blocks)
    split_of_place = np.searchsorted(ends, np.arange(num_blocks), side='right').clip(max=2)
    goal = np.array(shares)[:, None]
    price = np.array([[100], [1], [10]])  # of a class that is missing from tr, val, ts
    best_cost = np.inf
    for _ in range(500):
        luck = rng.random(num_blocks)
        order = np.lexsort((luck, white ^ rng.integers(2)))  # one colour, then the other
        trial = np.empty(num_blocks, int)
        trial[order] = split_of_place
        got = np.stack([counts[trial == split].sum(0) for split in range(3)]) / pixels.clip(1)
        cost = np.abs(got - goal).mean() + ((got < 0.1 * goal) * price).sum()
        if cost < best_cost:
            best_cost, deal = cost, trial
    for k in np.flatnonzero((counts[deal == 0].sum(0) == 0) & (pixels > 0)):
        deal[counts[:, k].argmax()] = 0
    split = deal[block_of]
    if gap:
        planes = torch.from_numpy(split)[None, None].float()
        highest = F.max_pool2d(planes, 2 * gap + 1, 1, gap)[0, 0]
        lowest = -F.max_pool2d(-planes, 2 * gap + 1, 1, gap)[0, 0]
        split = np.where((highest == lowest).numpy(), split, 3)
    return split


def cut_positions(length, size, stride):
    """Starts of tiles or windows of `size` that cover `length`; the last one is moved back to end
    at the border, and one that is larger than `length` starts at 0."""
    starts = list(range(0, max(length - size, 0) + 1, stride))
    if starts[-1] + size < length:
        starts.append(length - size)
    return starts


def cut(scene, regions, args):
    """Yield (split, row, column, image (C, S, S), labels (S, S)) of each tile of a scene, of which
    it reads one row of tiles at a time. Left out are tiles without a valid pixel, and those of val
    and ts without a label, where the scene has labels."""
    size = args.tile_size
    strides = {'tr': args.stride or size, 'val': size, 'ts': size}
    regions_at = {}  # row -> regions that have tiles there
    for region in regions:
        height = region.rows.stop - region.rows.start
        for row in cut_positions(height, size, strides[region.split]):
            regions_at.setdefault(region.rows.start + row, []).append(region)

    for row in sorted(regions_at):
        strip = scene.cube[:, row:row + size]  # (C, S, W)
        valid = valid_pixels(strip, scene.nodata)
        for split, _, cols, labels in regions_at[row]:
            for left in cut_positions(cols.stop - cols.start, size, strides[split]):
                col = cols.start + left
                tile_labels = labels[row:row + size, col:col + size].copy()
                if split != 'tr':  # where tiles overlap at the border, a pixel is scored once
                    labels[row:row + size, col:col + size] = 0
                wanted = split == 'tr' or scene.labels is None or tile_labels.any()
                if wanted and valid[:, col:col + size].any():
                    yield split, row, col, strip[:, :, col:col + size], tile_labels


# ============ tiler: one pass over the scenes ============

IN_MEMORY = 2e8  # bytes; a smaller scene is unpacked once, a larger one stays on disk
FEW_FILES = 9  # of so many all is printed that was read


def tile(args):
    """The command `tile`: see --help.

    Tiles are written as the scenes are read. meta.json comes last: a directory without it is not
    complete, and the same command makes it anew.
    """
    if args.bands:
        parse_bands(args.bands)  # a mistake in it is no fault of the scenes
    path = os.path.join(args.out, 'meta.json')
    inputs = list_inputs(args.root, args.labels)
    if os.path.exists(path):
        check_same(read_json(path), inputs, args)
        print(f'{args.out}: complete, nothing to do')
        return
    os.makedirs(args.out, exist_ok=True)
    meta = write_tiles(inputs, args)
    if args.pca:
        meta |= to_components(meta, args)
    print_classes(meta)
    write_json(path, meta)
    counts = {split: len(places) for split, places in meta['tiles'].items()}
    labelled = {split: sum(pixels) for split, pixels in meta['class_counts'].items()}
    print(f'{args.out}: {meta["num_bands"]} bands, {meta["num_classes"]} classes, tiles {counts}, '
          f'labelled pixels {labelled}')


def settings_of(args):
    """The flags that make the tiles what they are"""
    return {flag: value for flag, value in vars(args).items()
            if flag not in ('command', 'out', 'skip_bad')}


def check_same(meta, inputs, args):
    """Refuses a directory that was made with other settings or from other inputs"""
    changed = [f'{flag} ({meta["settings"].get(flag)} there, {value} now)'
               for flag, value in settings_of(args).items()
               if meta['settings'].get(flag) != value]
    names = {item.name for item in inputs}
    changed += [f'{name} is new' for name in sorted(names - {*meta['scenes'], *meta['skipped']})]
    changed += [f'{name} is gone' for name in sorted({*meta['scenes']} - names)]
    if changed:
        raise UserError(f'{args.out}: was made with other settings or inputs: '
                        f'{", ".join(changed[:9])}: choose another --out or delete it')
    path = os.path.join(args.out, 'meta.json')
    named = {split_name(name)[0] for item in inputs for name in (item.path, item.labels)}
    for file in sorted(file for name in named if os.path.isfile(name) for file in both_files(name)):
        if os.path.getmtime(file) > os.path.getmtime(path):
            raise UserError(f'{file}: is newer than the tiles in {args.out}: delete these and run '
                            f'the same command again, or, if it is as it was, touch {path}')


HEADER = 128  # bytes of a .npy file before its items, whatever their number


def new_array(path):
    """A .npy file to which items are written one after the other"""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)  # not written over: a run may have the old one mapped
    file = open(path, 'wb')
    file.write(bytes(HEADER))
    return file


def finish_array(file, shape, dtype):
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': shape})
    assert file.tell() == HEADER
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_tiles(inputs, args):
    """Write the tiles of all scenes -> meta. Prints what was read of the files; raises UserError
    with a sentence for each that cannot be used."""
    tiles = {split: [] for split in SPLITS}  # [scene, row, column] of each
    class_counts = {split: np.zeros(256, int) for split in SPLITS}
    images, labels = ({split: new_array(os.path.join(args.out, f'{split}_{kind}.npy'))
                       for split in SPLITS} for kind in ('images', 'labels'))
    statistics = {'pixels': 0, 'valid': 0}
    names, failures = [], {}  # failures: name -> why the scene cannot be used
    first = None  # what all scenes have alike
    said = set()
    for item in tqdm(inputs, 'tiling', unit='file', disable=len(inputs) == 1):
        try:
            scene = open_input(item, args)
            regions = regions_of(scene, item, args)
            say_notes(item.path, scene.notes, said, whole=len(inputs) <= FEW_FILES)
            first = check_fits(item.path, scene, first)
        except UserError as error:
            failures[item.name] = str(error)
            continue
        if args.pca > first['num_bands']:
            raise UserError(f'--pca={args.pca}: choose from 1 to {first["num_bands"]} components, '
                            'as many as there are bands')
        for split, rows, cols, labels_there in regions:
            class_counts[split] += np.bincount(labels_there[rows, cols].ravel(), minlength=256)
            if split == 'tr':
                add_statistics(statistics, scene.cube, scene.nodata, rows, cols)
        for split, row, col, image, tile_labels in cut(scene, regions, args):
            images[split].write(image.tobytes())
            labels[split].write(tile_labels.tobytes())
            tiles[split].append([len(names), row, col])
        names.append(item.name)
    if failures and not (args.skip_bad and names):
        advice = ', or go on without them with --skip_bad=true' if names else ''
        raise UserError('\n'.join(failures.values()) + f'\n{args.out}: {len(failures)} of '
                        f'{len(inputs)} inputs could not be used: repair or remove them and run '
                        f'the same command again{advice}')
    for sentence in failures.values():
        print('skipped:', sentence)
    S = args.tile_size
    for split, places in tiles.items():
        N = len(places)
        finish_array(images[split], (N, first['num_bands'], S, S), first['dtype'])
        finish_array(labels[split], (N, S, S), np.uint8)
    how_split = (f'blocks of {args.split_block} px, gap {args.split_gap} px: the splits share the '
                 'image, no label (transductive)')
    if args.split == 'halves':
        how_split = 'the scene is cut: the splits share no pixel (inductive)'
    if os.path.isdir(args.root):
        how_split = BY_FOLDERS
    return {'settings': settings_of(args), **first, **moments(statistics, args.root),
            **name_classes(first['class_names'], class_counts), 'split': how_split,
            'scenes': names, 'skipped': list(failures), 'tile_size': args.tile_size, 'tiles': tiles}


def check_fits(path, scene, first):
    """-> what all scenes of a directory have alike, as meta.json lists it: that of the `first`,
    or of this scene if there is none. Refuses one that has something else."""
    must_agree = ('nodata', 'scale', 'wavelengths_nm', 'bands', 'class_names')
    stated = (*must_agree, 'fwhm_nm', 'class_colors', 'file_bands')
    facts = {'num_bands': len(scene.cube), 'dtype': scene.cube.dtype.name,
             **{name: getattr(scene, name) for name in stated}}
    first = first or facts

    # scenes of one sensor of which other bands are bad or empty
    kept, kept_first = (set(fact['bands'] or range(fact['file_bands'])) for fact in (facts, first))
    unlike = sorted(band + 1 for band in kept ^ kept_first)
    if facts['file_bands'] == first['file_bands'] and unlike:
        numbers = ','.join(map(str, unlike))
        raise UserError(f'{path}: of its {facts["file_bands"]} bands others are left out than of '
                        f'the scenes before it: --drop_bands={numbers} leaves these out of all')
    known = facts['wavelengths_nm'] and first['wavelengths_nm']
    if facts['file_bands'] != first['file_bands'] and not known:
        raise UserError(f'{path}: the file has {facts["file_bands"]} bands, those of the scenes '
                        f'before it {first["file_bands"]}, and without wavelengths nobody knows '
                        'which are the same: tile scenes of one sensor together')
    for name in ('num_bands', 'dtype', *must_agree):
        here, there = facts[name], first[name]
        alike = here == there or (None in (here, there) and name != 'nodata')
        if name == 'wavelengths_nm' and not alike:
            alike = same_bands(here, there)
        if not alike:
            by_mask = '; if a mask made the one float32, --nodata= keeps its type'
            raise UserError(f'{path}: its {name.removeprefix("num_")} ({str(here)[:60]}) and that '
                            f'of the scenes before it ({str(there)[:60]}) differ: tile scenes of '
                            'one sensor and the same classes together; others at common --bands= '
                            'with --normalize=scene, or into a directory of their own'
                            f'{by_mask if name == "dtype" else ""}')
    # what the first scene does not state, a later one may
    return first | {name: facts[name] for name in stated
                    if first[name] is None and name not in ('nodata', 'bands')}


def say_notes(path, notes, said, whole):
    """Print what was read of a file: all, or only sentences that were not `said` of a file before,
    be it with other numbers"""
    fresh = []
    for note in notes:
        kind = re.sub(r'#[#:, ]*#', '#', re.sub(r'[\d.,]*\d', '#', note))
        if whole or kind not in said:
            fresh.append(f'  {note}')
        said.add(kind)
    if fresh:
        tqdm.write('\n'.join([f'{path}:', *fresh]))


def add_statistics(stats, cube, nodata, rows, cols):
    """Add an area's valid pixels to float64 sums of values minus the first strip's mean: large sums
    that are nearly equal, once subtracted, would lose digits"""
    for strip in strips(cube, rows):
        values = cube[:, strip, cols]
        valid = valid_pixels(values, nodata)
        stats['pixels'] += valid.size
        if not valid.any():
            continue
        x = values[:, valid].astype(np.float64)  # (C, n)
        stats.setdefault('shift', x.mean(1))
        x -= stats['shift'][:, None]
        stats['valid'] += x.shape[1]
        stats['sum'] = x.sum(1) + stats.get('sum', 0)
        stats['outer'] = x @ x.T + stats.get('outer', 0)


def moments(stats, root):
    """Running sums -> what meta.json has of them"""
    n = stats['valid']
    if not n:
        raise UserError(f'{root}: no training image with valid pixels: nothing to make statistics '
                        'from')
    covariance = (stats['outer'] - np.outer(stats['sum'], stats['sum']) / n) / max(n - 1, 1)
    return {'nodata_share': 1 - n / stats['pixels'], 'mean': stats['shift'] + stats['sum'] / n,
            'covariance': covariance, 'std': np.sqrt(covariance.diagonal())}


def name_classes(stated_names, class_counts):
    """Names that a file states, or None, and pixels by label value (256,) of each split -> what
    meta.json has of the classes"""
    counts = np.array([class_counts[split][1:] for split in SPLITS])
    highest = max(np.flatnonzero(counts.any(0)) + 1, default=0)
    names = list(stated_names or [])
    names += [f'class {k}' for k in range(len(names) + 1, highest + 1)]
    return {'class_names': names, 'num_classes': len(names),
            'class_counts': dict(zip(SPLITS, counts[:, :len(names)].tolist()))}


def to_components(meta, args):
    """Replace the bands of all tiles by their --pca leading principal components -> what changes
    in meta; missing pixels become NaN"""
    C, K, S = meta['num_bands'], args.pca, args.tile_size
    variance, vectors = np.linalg.eigh(meta['covariance'])
    components = vectors[:, ::-1][:, :K].T  # (K, C) unit vectors, the leading ones first
    components = components * np.sign(components.sum(1, keepdims=True))  # either would do
    explained = variance[::-1][:K] / variance.sum()
    print(f'{K} principal components have of the variance:',
          ', '.join(f'{share:.2%}' for share in explained))
    for split, places in meta['tiles'].items():
        path = os.path.join(args.out, f'{split}_images.npy')
        file = new_array(path + '.tmp')
        with open(path, 'rb') as source:
            source.seek(HEADER)
            for _ in places:
                image = np.fromfile(source, meta['dtype'], C * S * S).reshape(C, S, S)
                values = np.where(valid_pixels(image, meta['nodata']), image, np.nan)
                file.write(np.tensordot(components, values, 1).astype(np.float32).tobytes())
        finish_array(file, (len(places), K, S, S), np.float32)
        os.replace(path + '.tmp', path)
    covariance = components @ meta['covariance'] @ components.T
    return {'num_bands': K, 'dtype': 'float32', 'nodata': None, 'wavelengths_nm': None,
            'fwhm_nm': None, 'components': components, 'explained_variance': explained,
            'mean': components @ meta['mean'], 'covariance': covariance,
            'std': np.sqrt(covariance.diagonal())}


def print_classes(meta):
    """How many pixels each class has in each split, and what is odd about that"""
    counts = np.array([meta['class_counts'][split] for split in SPLITS])
    used = np.flatnonzero(counts.any(0))
    print(f'{"labelled pixels":28s}' + ''.join(f'{split:>12s}' for split in SPLITS))
    for k in used:
        pixels = ''.join(f'{count:12,d}' for count in counts[:, k])
        print(f'{k + 1:3d} {meta["class_names"][k][:24]:24s}{pixels}')
    if len(used) == 1:
        print('WARNING: only one class has labels. 0 means unlabelled: if it is the background, '
              'number the background 1 and the object 2')
    if len(used) < meta['num_classes'] / 2:
        print(f'WARNING: only {len(used)} of {meta["num_classes"]} class numbers have labels: are '
              'they classes? Number these 1, 2, 3, ...')


def write_json(path, content):
    """Atomic: the file is either the old one or the new one, never half of it."""
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.write(json.dumps(content, default=np.ndarray.tolist))
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + '.tmp', path)


def read_json(path):
    with open(path, encoding='utf-8') as file:
        return json.load(file)


LOCKS = {}  # path -> the file that locks it; in a notebook a script runs again in one process


def lock_directory(directory):
    """Make a directory, and keep other processes from writing it while the file that is returned
    is open. A process that ends, however it does, gives the lock back."""
    place = os.path.realpath(directory)
    if place in LOCKS:
        LOCKS[place].close()
    try:
        os.makedirs(directory, exist_ok=True)
        file = open(os.path.join(directory, '.lock'), 'w', encoding='utf-8')
    except OSError as error:
        raise UserError(f'{directory}: nothing can be written here ({one_line(error)}): choose '
                        'another directory') from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'{directory}: another process writes here: wait until it has ended, or '
                        'choose another directory') from None
    except OSError as error:
        print(f'{directory}: this file system has no locks ({one_line(error)}): see to it that '
              'no other process writes here')
    LOCKS[place] = file
    return file


# ============ tiles in, batches out ============

KEPT_META = ('num_bands', 'num_classes', 'class_names', 'class_counts', 'class_colors',
             'wavelengths_nm', 'bands', 'file_bands', 'nodata', 'scale', 'mean', 'std',
             'covariance', 'components', 'tile_size', 'dtype', 'settings')


def kept_meta(meta):
    """What of meta.json goes into a checkpoint: all that an encoder needs away from its data, and
    `settings`, the tiler's: how a scene is brought to the bands and units of the tiles"""
    return {key: meta[key] for key in KEPT_META if key in meta}


def read_meta(directory):
    """The content of a tile directory's meta.json"""
    path = os.path.join(directory, 'meta.json')
    if not os.path.exists(path):
        if os.path.exists(os.path.join(directory, 'tr_images.npy')):
            raise UserError(f'{directory}: is half-made, its tiling was cut off or still runs: run '
                            'the same `python data.py tile` command again')
        raise UserError(f'{directory}: no tiles here: make them with `python data.py tile '
                        '--root=SCENES --out=DIRECTORY`, and pass that directory as --data')
    return read_json(path)


class Tiles:
    """One split of a tile directory: `.images` (N, C, S, S) and `.labels` (N, S, S) or None,
    memory-mapped; `.meta`, the content of meta.json.

    With a `label_share` below 1 the labels are those of keep_label_share(), in memory.
    """

    def __init__(self, directory, split, pin_memory=False, label_share=1.0, seed=0):
        self.arguments = (directory, split, pin_memory, label_share, seed)
        self.directory = directory
        self.split = split
        self.pin_memory = pin_memory
        self.meta = read_meta(directory)
        places = self.meta['tiles'][split]
        size = self.meta['tile_size']
        if not places:
            raise UserError(f'{directory}: the split "{split}" has no tiles: tile again with more '
                            'scenes, other --shares, or --labels= if no scene has any')
        self.images = self._open('images', (len(places), self.meta['num_bands'], size, size))
        self.labels = None
        if os.path.exists(self._path('labels')):
            self.labels = self._open('labels', (len(places), size, size))
            if label_share < 1:
                self.labels = keep_label_share(self.labels, places, label_share, seed)
        self._buffers = {}  # (images or labels, turn) -> tensor
        self._turn = 0

    def _path(self, kind):
        return os.path.join(self.directory, f'{self.split}_{kind}.npy')

    def _open(self, kind, shape):
        path = self._path(kind)
        try:
            array = np.load(path, mmap_mode='r')
            if array.shape != shape:
                raise ValueError(f'its shape is {array.shape}, meta.json says {shape}')
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: cannot be read ({one_line(error)}): delete '
                            f'{self.directory} and tile again') from None
        return array

    def __reduce__(self):
        return Tiles, self.arguments  # the workers of a DataLoader open the files themselves

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        """Tile i -> image (C, S, S), labels (S, S), copies; without labels the image alone"""
        image = torch.from_numpy(self.images[i].copy())
        if self.labels is None:
            return image
        return image, torch.from_numpy(self.labels[i].copy())

    def windows_per_epoch(self, img_size):
        """An epoch is one window for every img_size x img_size pixels stored: a large tile is met
        several times in it."""
        return len(self) * max(1, round((self.meta['tile_size'] / img_size) ** 2))

    def ids_of_step(self, step, batch_size, img_size, seed):
        """-> (batch_size,) numbers of the tiles that a training step sees, see epoch_ids()"""
        num_windows = self.windows_per_epoch(img_size)
        return epoch_ids(num_windows, batch_size, step, seed) % len(self)

    def batch(self, ids, corners=None, side=0, reuse=False):
        """Tiles `ids` -> images (B, C, S, S) in the stored type, labels (B, S, S) uint8 or None.

        With `corners` (B, 2) only the window of `side` pixels at that row and column is read.
        With `reuse` the tensors are two kept buffers in turn: a batch stays valid while the next
        one is read. Fresh memory would take the system longer than the reading. Pinned ones reach
        a GPU while it does other work. That copy has ended before its buffer is written
        again, since a training loop waits for the GPU once a step.
        """
        ids = np.asarray(ids)
        if ((ids < 0) | (ids >= len(self))).any():
            raise IndexError(f'tiles {ids} of {len(self)}')
        if reuse:
            self._turn = 1 - self._turn
        batch = []
        for kind, source in (('images', self.images), ('labels', self.labels)):
            if source is None:
                batch.append(None)
                continue
            whole = source.shape[-1]
            window = whole if corners is None else side
            shape = (len(ids), *source.shape[1:-2], window, window)
            tensor = self._buffers.get((kind, self._turn)) if reuse else None
            if tensor is None or tensor.shape != shape:
                tensor = torch.from_numpy(np.empty(shape, source.dtype))
                if self.pin_memory:
                    tensor = tensor.pin_memory()
            if reuse:
                self._buffers[kind, self._turn] = tensor
            if window == whole:
                np.take(source, ids, axis=0, out=tensor.numpy(), mode='clip')  # straight into it
            else:
                for item, i, (row, col) in zip(tensor.numpy(), ids, np.asarray(corners)):
                    item[:] = source[i, ..., row:row + window, col:col + window]
            if kind == 'labels' and (tensor > self.meta['num_classes']).any():
                raise UserError(f'{self._path(kind)}: has labels above {self.meta["num_classes"]}, '
                                'the number of classes in meta.json: change the label files of the '
                                'scenes, and tile them into another directory')
            batch.append(tensor)
        return tuple(batch)

    def read_ahead(self, ids, side=0):
        """Have the system fetch the tiles `ids` from the disk while the program does other work:
        all at once, several times as fast as batch(), which waits for one after the other. But not
        tiles much larger than the window of `side` pixels that is wanted (0: the whole tile)."""
        whole = self.meta['tile_size']
        if not hasattr(os, 'posix_fadvise') or whole > 2 * (side or whole):
            return  # Windows and macOS have no posix_fadvise
        for kind, source in (('images', self.images), ('labels', self.labels)):
            if not isinstance(source, np.memmap):
                continue  # no labels, or a share of them, which is in memory
            tile_bytes = source.nbytes // len(source)
            with open(self._path(kind), 'rb') as file:
                for i in ids:
                    start = source.offset + int(i) * tile_bytes
                    os.posix_fadvise(file.fileno(), start, tile_bytes, os.POSIX_FADV_WILLNEED)


def keep_label_share(labels, places, share, seed):
    """Labels (N, S, S) -> the same with only `share` of the labelled pixels, and one of each class
    at least, drawn at random. places (N, 3): scene, row and column of each tile; where tiles
    overlap, a pixel is kept in all of them or in none."""
    labels = np.array(labels)
    steps = np.arange(labels.shape[-1], dtype=np.uint64)

    def draw(scene, top, left):
        """A number in 0..1 for each pixel of a tile, by mixing its coordinates (splitmix64)"""
        x = np.uint64(abs(seed) * 1_000_003 + scene) << np.uint64(40)
        x = x + ((steps[:, None] + np.uint64(top)) << np.uint64(20)) + (steps + np.uint64(left))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x / 2.0 ** 64

    lowest = np.ones(256)  # draw of each class
    for tile_labels, place in zip(labels, places):
        np.minimum.at(lowest, tile_labels, draw(*place))
    limit = lowest.clip(min=share)
    for tile_labels, place in zip(labels, places):
        tile_labels[draw(*place) > limit[tile_labels]] = 0
    return labels


def epoch_ids(num_windows, batch_size, step, seed):
    """The windows of a step: an endless stream of permutations, one per epoch, cut into batches.
    Nothing is kept from step to step, so a resumed run sees the same windows."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_windows)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        places[here] = shuffled(places[here], num_windows, [seed, epoch])
    return places


def shuffled(places, n, key):
    """Which of n cards lie at `places` of a shuffled deck; each key gives another deck.

    Computed for these places alone, in the same time for a thousand cards and for a billion. The
    cards lie in a table of about sqrt(n) rows and columns. By turns each column is rotated by a
    number mixed from its index, and each row likewise. A rotation can be undone, so no two cards
    ever meet (a Feistel network). A place beyond the last card goes round again.
    """
    height = math.isqrt(n - 1) + 1
    width = -(-n // height)  # height * width is n, or up to height - 1 more
    salts = np.random.default_rng(key).integers(2 ** 63, size=(6, 2), dtype=np.uint64)

    def mix(index, salt):
        x = (index ^ salt) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 32)) * 0x94D049BB133111EB
        return x >> 32

    def shuffle(cells):
        row, col = np.divmod(cells, width)
        for salt in salts:
            row = (row + mix(col, salt[0])) % height
            col = (col + mix(row, salt[1])) % width
        return row * width + col

    cards = shuffle(places.astype(np.uint64))
    while (beyond := cards >= n).any():
        cards[beyond] = shuffle(cards[beyond])
    return cards.astype(np.int64)


# ============ standardisation ============

def standardization(meta, whiten=0):
    """meta -> mean (C,) and matrix: (C,) per-band 1 / std, or (C, C) ZCA whitening of the
    `whiten` leading principal components (all of them when there are fewer bands).

    Neighbouring bands are near copies, so that per band the loss is brightness over and over;
    whitening gives the small spectral differences the same weight. ZCA turns back into band
    space: channels keep their wavelengths. The ridge (1e-6 of the mean variance) keeps noise
    directions from exploding; the scale makes the mean variance over channels 1.
    """
    mean = torch.tensor(meta['mean'], dtype=torch.float32)
    if whiten == 0:
        std = torch.tensor(meta['std'], dtype=torch.float32)
        return mean, 1 / std.clamp(min=1e-6 * (max(meta['std']) or 1))
    covariance = torch.tensor(meta['covariance'], dtype=torch.float64)
    bands = len(covariance)
    whiten = min(whiten, bands)
    variance, vectors = torch.linalg.eigh(covariance)
    variance, vectors = variance[-whiten:], vectors[:, -whiten:]
    ridge = 1e-6 * covariance.diagonal().mean()
    matrix = (vectors / (variance + ridge).sqrt()) @ vectors.T * math.sqrt(bands / whiten)
    return mean, matrix.float()


def standardize(x, mean, matrix, nodata=None):
    """x (B, C, H, W) raw values, any type -> (B, C, H, W) float32, standardised; invalid pixels
    become 0, which is the mean."""
    valid = valid_pixels(x, nodata)[:, None]
    x = torch.where(valid, x.float() - mean[:, None, None], 0.0)
    if matrix.ndim == 1:
        return x * matrix[:, None, None]
    with full_float32(x.device):  # whitening magnifies small differences
        return torch.matmul(matrix, x.flatten(2)).reshape(x.shape)


@contextlib.contextmanager
def full_float32(device):
    """Products of float32 are exact in here: autocast's bfloat16 and TF32 (10 bits, what the
    scripts allow on CUDA) would round."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ============ crops: a whole batch at once, on the device ============

class Crops(NamedTuple):
    corners: torch.Tensor  # (n, 2) row and column of the window to read, for Tiles.batch
    side: int  # of that window
    boxes: torch.Tensor  # (n, 4) top, left, height, width of the crop in the window, int
    flips: torch.Tensor  # (n, 3) flip the rows, flip the columns, transpose; bool


def draw_crops(n, tile_size, img_size, scale_min, scale_max, generator, turns=True):
    """Random crops for n tiles -> Crops.

    A box has scale_min..scale_max times the area of img_size x img_size and an aspect ratio of
    3/4..4/3 (torchvision's RandomResizedCrop), anywhere in the tile: in a tile larger than
    img_size, crops really move. With `turns` they are flipped and transposed at random: an image
    taken from above has no up or left.
    """
    draws = torch.rand(n, 7, generator=generator)  # area, aspect ratio, top, left, three flips
    area = img_size ** 2 * (scale_min + (scale_max - scale_min) * draws[:, 0])
    ratio = torch.exp((draws[:, 1] * 2 - 1) * math.log(4 / 3))
    sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1)  # (n, 2)
    sizes = sizes.round().clamp(1, min(tile_size, 2 * img_size))
    side = min(tile_size, math.ceil(img_size * math.sqrt(scale_max * 4 / 3)))
    if scale_min == scale_max == 1:  # no resizing at all: the window is the crop, an exact copy
        sizes[:] = side = img_size
    start = (draws[:, 2:4] * (tile_size - sizes + 1)).floor().clamp(min=0)  # (n, 2)
    corners = start.clamp(max=tile_size - side)
    boxes = torch.cat([start - corners, sizes], 1).long()
    return Crops(corners.long(), side, boxes, (draws[:, 4:] < 0.5) & turns)


def resize_weights(start, length, source, out, flip, softness):
    """Starts and lengths (...) of boxes -> (..., out, source): a product with it crops, resizes
    and, where flip (...) is True, flips one axis.

    Triangle filter, widened when shrinking: bilinear interpolation with anti-aliasing, as torch's
    interpolate(antialias=True). `softness` (...) or 1 widens it more, which blurs at no cost.
    """
    scale = length / out  # source pixels per output pixel
    steps = torch.arange(out, device=start.device) + 0.5
    where = start[..., None] + steps * scale[..., None] - 0.5  # (..., out)
    where = torch.where(flip[..., None], where.flip(-1), where)
    pixel = torch.arange(source, device=start.device)
    width = (softness * scale.clamp(min=1))[..., None, None]
    weights = (1 - (pixel - where[..., None]).abs() / width).clamp(min=0)  # (..., out, source)
    inside = (pixel >= start[..., None]) & (pixel < (start + length)[..., None])
    weights = weights * inside[..., None, :]
    return weights / weights.sum(-1, keepdim=True)


def crop_weights(boxes, flips, H, W, out, softness=1.0):
    """boxes (B, V, 4) and flips (B, V, 3), V crops of each image -> matrices for crop_by: of rows
    (B, V, out, H) and of columns (B, V, out, W)"""
    top, left, height, width = boxes.unbind(-1)
    rows = resize_weights(top, height, H, out, flips[..., 0], softness)
    cols = resize_weights(left, width, W, out, flips[..., 1], softness)
    return rows, cols


def crop_by(x, rows, cols, transposed):
    """x (B, C, H, W), crop_weights(), transposed (B, V) bool -> (V * B, C, out, out) float32, the
    first crop of every image, then the second.

    Two matrix products, rows then columns, are exact bilinear resizing; flips ride along for
    free. The first is one product for all crops of an image and takes it row by row,
    (B, H, C * W): an x in that order of memory (see standardize_rows) is not copied.
    """
    B, C, H, W = x.shape
    V, out = rows.shape[1:3]
    by_rows = x.float().transpose(1, 2).reshape(B, H, C * W)
    y = rows.flatten(1, 2) @ by_rows  # (B, V * out, C * W)
    y = y.reshape(B * V, out * C, W) @ cols.flatten(0, 1).transpose(1, 2)
    y = y.reshape(B, V, out, C, out).permute(1, 0, 3, 2, 4)  # (V, B, C, out, out)
    crops = y.new_empty(V, B, C, out, out)
    torch.where(transposed.T[..., None, None, None], y.transpose(-1, -2), y, out=crops)
    return crops.flatten(0, 1)


def resized_crop(x, boxes, flips, out):
    """x (B, C, H, W), a box (B, 4) and flips (B, 3) for each -> (B, C, out, out) float32"""
    boxes, flips = (values.to(x.device, non_blocking=True)[:, None] for values in (boxes, flips))
    rows, cols = crop_weights(boxes, flips, *x.shape[2:], out)
    return crop_by(x, rows, cols, flips[..., 2])


def resized_crop_labels(labels, boxes, flips, out):
    """The same crops of label maps (B, H, W) -> (B, out, out), nearest neighbour"""
    boxes, flips = (values.to(labels.device, non_blocking=True) for values in (boxes, flips))
    steps = (torch.arange(out, device=labels.device) + 0.5) / out
    picks = []  # rows, columns: (B, out)
    for axis in (0, 1):
        start, length = boxes[:, axis, None], boxes[:, axis + 2, None]
        pick = (start + steps * length).floor().long()
        picks.append(torch.where(flips[:, axis, None], pick.flip(1), pick))
    number = torch.arange(len(labels), device=labels.device)[:, None, None]
    y = labels[number, picks[0][:, :, None], picks[1][:, None, :]]
    return torch.where(flips[:, 2, None, None], y.transpose(1, 2), y)


# ============ light: each crop as another sun and sky would show it ============

class Statistics(NamedTuple):
    """What augment_spectra has to know of the values"""
    mean: torch.Tensor  # (C,) of each band
    std: torch.Tensor  # (C,)
    matrix: torch.Tensor  # (C,) or (C, C) of standardization()


class Light(NamedTuple):
    """How strongly augment_spectra changes what is seen; 0 = not at all"""
    gain: float = 0.0  # all bands times up to 1 +- this: illumination
    offset: float = 0.0  # all bands plus up to +- this many standard deviations: path radiance
    noise: float = 0.0  # largest standard deviation of white noise, on standardised values
    band_dropout: float = 0.0  # probability that a run of bands (up to a third of them) is 0
    jitter: float = 0.0  # of contrast and brightness, as the dissertation has it
    solarize: float = 0.0  # probability that what is above the mean is mirrored, as it has it


def standardize_rows(x, mean, matrix, nodata=None):
    """x (B, C, H, W) raw values -> (B, C + 1, H, W): standardize(), and last 1 = valid pixel, 0 =
    not; in memory row by row, (B, H, C + 1, W), as crop_by likes it.

    Crop this, then augment_spectra: what is invalid stays known through resizing.
    """
    B, C, H, W = x.shape
    rows = torch.empty(B, H, C + 1, W, device=x.device).transpose(1, 2)
    rows[:, :C] = standardize(x, mean, matrix, nodata)
    rows[:, C] = valid_pixels(x, nodata)
    return rows


def augment_spectra(x, draws, field, statistics, light):
    """x (B, C + 1, H, W), crops of standardize_rows -> (B, C, H, W) standardised, each sample in
    a light of its own; invalid pixels are 0.

    draws (B, 11) are uniform in 0..1. field (C, F, S) is standard normal, F >= H, S >= W: the noise
    of a sample is H rows of it from a random start, which is faster than drawing each its own.
    """
    C = x.shape[1] - 1
    H, W = x.shape[2:]
    x, valid = x[:, :C], x[:, C:]
    mean, std, matrix = statistics
    # a number of each sample for each thing that varies, (B, 1); the second is not used
    gain, _, offset, first_row, strength, contrast, brightness, mirror, drop, length, start = (
        draws[:, None].unbind(-1))
    gain = light.gain * (2 * gain - 1)
    offset = light.offset * (2 * offset - 1)

    # standardising is linear: a change of the sensor's values is one of the standardised ones
    shift = gain * mean + offset * std  # (B, C)
    shift = shift * matrix if matrix.ndim == 1 else shift @ matrix.T
    y = x * (1 + gain[..., None, None])
    y.add_(shift[..., None, None])
    if light.noise:
        first_row = (first_row * (field.shape[1] - H + 1)).long()
        rows = first_row + torch.arange(H, device=x.device)  # (B, H)
        noise = field[:, :, :W].index_select(1, rows.flatten())
        noise = noise.reshape(C, -1, H, W).transpose(0, 1)  # (B, C, H, W)
        y.addcmul_(noise, light.noise * strength[..., None, None])
    if light.jitter:
        middle = y.mean((1, 2, 3), keepdim=True)
        contrast = 1 + light.jitter * (2 * contrast - 1)[..., None, None]
        brightness = light.jitter * (2 * brightness - 1)[..., None, None]
        y.sub_(middle).mul_(contrast).add_(middle + brightness)
    if light.solarize:
        mirrored = (mirror < light.solarize)[..., None, None]
        y.copy_(torch.where(mirrored, -y.abs(), y))
    if light.band_dropout and C >= 3:  # of one or two bands nothing would be left
        length = (length * C / 3).ceil()
        start = (start * (C - length + 1)).floor()
        band = torch.arange(C, device=x.device)
        dropped = (band >= start) & (band < start + length)  # (B, C)
        dropped &= drop < light.band_dropout
        y.mul_(~dropped[..., None, None])
    return y.mul_(valid)


# ============ linear classifiers: probes and floors ============

def labelled_pixels(tiles, features, limit=50_000, max_tiles=2000, device='cpu'):
    """Features and classes of labelled pixels: x (n, D) float32, y (n,), blocks (n,); about
    `limit` of them at the most, drawn at random from at most `max_tiles` tiles that have labels.

    features(raw images) -> maps (B, D, h, w); coarser ones are upsampled (bilinear) to the tile's
    pixels. `blocks` are numbers of the places the pixels lie in: neighbours, and one pixel seen
    in two tiles, have the same. In a folder of scenes a place is a scene.
    """
    if tiles.labels is None:
        raise UserError(f'{tiles.directory}: the split "{tiles.split}" has no labels')
    order = np.random.default_rng(0).permutation(len(tiles))
    with_labels = (i for i in order if tiles.labels[i].any())
    chosen = np.sort(list(itertools.islice(with_labels, max_tiles))).astype(int)
    if not len(chosen):
        raise UserError(f'{tiles.directory}: the split "{tiles.split}" has no labelled pixel')
    share = limit / sum(np.count_nonzero(tiles.labels[i]) for i in chosen)

    generator = torch.Generator().manual_seed(0)
    places = torch.tensor(tiles.meta['tiles'][tiles.split])
    block = tiles.meta['settings']['split_block']
    one_scene = tiles.meta['split'] != BY_FOLDERS
    batch_size = 4 if tiles.meta['tile_size'] <= 128 else 1  # maps of large tiles are large
    xs, ys, blocks = [], [], []
    for ids in torch.from_numpy(chosen).split(batch_size):
        raw, labels = tiles.batch(ids)
        pick = (labels > 0) & (torch.rand(labels.shape, generator=generator) < share)
        if not pick.any():
            continue
        maps = features(raw.to(device)).float()
        if maps.shape[-1] != labels.shape[-1]:
            maps = F.interpolate(maps, size=labels.shape[-2:], mode='bilinear')
        xs.append(maps.permute(0, 2, 3, 1)[pick.to(device)])
        ys.append(label_to_class(labels[pick]).to(device))
        tile_number, row, col = pick.nonzero().unbind(1)
        scene, top, left = places[ids][tile_number].unbind(1)
        place = scene.long() << 40
        if one_scene:
            place += ((top + row) // block << 20) + (left + col) // block
        blocks.append(place)
    return torch.cat(xs), torch.cat(ys), torch.cat(blocks).to(device)


def ridge_probe(x, y, blocks, num_classes, folds=5, strength=1e-3):
    """Features x (n, D), classes y (n,) -> scores() of a linear classifier, cross-validated.

    It is ridge regression on one-hot targets, in closed form: seconds, no tuning. Each pixel is
    judged by the one fitted without its fold. Folds are of whole `blocks` (n,), so that a pixel is
    not judged by what was fitted on its neighbours.
    """
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
    targets = F.one_hot(y, num_classes).double()
    names, block = blocks.unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    fold = (order.to(x.device) % folds)[block]  # (n,)
    inputs = [x[fold == i] for i in range(folds)]
    grams = [z.T @ z for z in inputs]  # (D + 1, D + 1) each
    products = [z.T @ targets[fold == i] for i, z in enumerate(inputs)]  # (D + 1, K)
    penalty = strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    cm = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=x.device)
    for i in range(folds):
        gram = sum(grams) - grams[i] + penalty
        weights = torch.linalg.solve(gram, sum(products) - products[i])
        cm += confusion_matrix((inputs[i] @ weights).argmax(1), y[fold == i], num_classes)
    return scores(cm)


@torch.no_grad()
def probe(features, splits, max_tiles, device='cpu'):
    """mIoU of ridge_probe() on features(raw images) -> maps (B, D, h, w), over labelled pixels of
    at most `max_tiles` tiles of each of the Tiles in `splits`"""
    drawn = [labelled_pixels(tiles, features, 10_000, max_tiles, device=device)
             for tiles in splits]
    x, y, blocks = (torch.cat(of_splits) for of_splits in zip(*drawn))
    return ridge_probe(x, y, blocks, splits[0].meta['num_classes'])['miou']


def probe_splits(directory):
    """The Tiles that the probe looks at, of tr and val; none where one of them has no labels"""
    counts = read_meta(directory)['class_counts']
    if not all(sum(counts[split]) for split in ('tr', 'val')):
        print(f'{directory}: tr and val do not both have labels, so no probe watches')
        return []
    return [Tiles(directory, split) for split in ('tr', 'val')]


def probe_floors(splits, max_tiles, device='cpu'):
    """What the probe has to beat: its mIoU on spectra instead of features -> name: mIoU"""
    found = {}
    for name, windows in FLOORS.items() if splits else ():
        features = spectrum_features(splits[0].meta, windows, device)
        found[f'{name} floor'] = probe(features, splits, max_tiles, device)
    return found


def draw_probe(axis, log, init_from=''):
    """The probe over the steps; as lines what it has to beat: itself at step 0, where the encoder
    is random or that of the file `init_from`, and the floors"""
    probed = [entry for entry in log if 'probe_miou' in entry]
    if not probed:
        return
    steps = [entry['step'] for entry in probed]
    axis.plot(steps, [100 * entry['probe_miou'] for entry in probed], 'o-', label='frozen encoder')
    first = probed[0]
    lines = {'the encoder it started from' if init_from else 'random encoder': first['probe_miou'],
             **{key: value for key, value in first.items() if key.endswith('floor')}}
    for (label, miou), style in zip(lines.items(), ('-.', ':', '--')):
        axis.axhline(100 * miou, color='gray', linestyle=style, label=label)
    axis.set(xlabel='step', ylabel='linear probe, mIoU in %')
    axis.legend(fontsize=8)


def fit_logistic(x, y, num_classes, max_iter=500):
    """Features x (n, D), classes y (n,) -> weights (D + 1, K), the last row the bias.

    Logistic regression on standardised features with an L2 penalty of 1 (scikit-learn's default),
    solved by at most 500 iterations of L-BFGS: to within 1 % of the least loss (docs/log.md).
    """
    center = x.mean(0)
    spread = x.std(0).clamp(min=1e-6)
    x = (x - center) / spread
    weights = torch.zeros(x.shape[1] + 1, num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=max_iter, history_size=20,
                                  line_search_fn='strong_wolfe', tolerance_change=1e-9)

    def loss():
        optimizer.zero_grad()
        penalty = weights[:-1].square().sum() / (2 * len(x))
        value = F.cross_entropy(x @ weights[:-1] + weights[-1], y) + penalty
        value.backward()
        return value

    with full_float32(x.device):
        optimizer.step(loss)
    weights = weights.detach()
    matrix = weights[:-1] / spread[:, None]  # of features that are not standardised
    bias = weights[-1] - center @ matrix
    return torch.cat([matrix, bias[None]])


FLOORS = {'pixel': (1,), 'window': (1, 3, 5, 9)}  # sides of the windows they average over, px


def window_means(x, valid, windows):
    """x (B, C, H, W), valid (B, 1, H, W) -> (B, C * len(windows), H, W): means over square
    windows, missing pixels left out"""
    def mean(values, side):
        return F.avg_pool2d(values, side, 1, side // 2, count_include_pad=False)
    means = [mean(x * valid, side) / mean(valid.float(), side).clamp(min=1e-6)
             for side in windows]
    return torch.cat(means, 1)


def spectrum_features(meta, windows, device='cpu'):
    """-> the function raw images -> standardised spectra averaged over `windows`, for
    labelled_pixels: no learning, only context"""
    mean, matrix = (values.to(device) for values in standardization(meta))

    def features(raw):
        valid = valid_pixels(raw, meta['nodata'])[:, None]
        return window_means(standardize(raw, mean, matrix, meta['nodata']), valid, windows)
    return features


def floors(directory, split='ts', label_share=1.0, seed=0):
    """What a network must beat on `split` -> dict name -> scores().

    The majority class, chance, and logistic regression on the pixel's spectrum and on spectra
    averaged over windows of 1, 3, 5 and 9 px. Fitted on 'tr' (see Tiles for `label_share`), kept
    in floors.json.
    """
    path = os.path.join(directory, 'floors.json')
    known = read_json(path) if os.path.exists(path) else {}
    train = Tiles(directory, 'tr', label_share=label_share, seed=seed)
    test = Tiles(directory, split)
    key = split
    if label_share != 1:
        key += f', {label_share:g} of the labels, seed {seed}'
    # floors of other labels, or of tiles made anew, are others
    for content in (train.labels, test.labels, json.dumps(train.meta).encode()):
        key += f', {zlib.crc32(content):08x}'
    if key in known:
        return known[key]
    num_classes = train.meta['num_classes']
    fitted = {}
    for name, windows in FLOORS.items():
        features = spectrum_features(train.meta, windows)
        train_x, train_y, _ = labelled_pixels(train, features, 30_000)
        test_x, test_y, _ = labelled_pixels(test, features, 200_000)
        weights = fit_logistic(train_x, train_y, num_classes)
        predicted = (test_x @ weights[:-1] + weights[-1]).argmax(1)
        fitted[name] = scores(confusion_matrix(predicted, test_y, num_classes))
    majority = torch.bincount(train_y, minlength=num_classes).argmax().expand(len(test_y))
    counts = torch.bincount(test_y, minlength=num_classes).double()
    guessed = counts[:, None].expand(-1, num_classes) / num_classes  # in expectation
    result = {'majority': scores(confusion_matrix(majority, test_y, num_classes)),
              'chance': scores(guessed), **fitted}
    try:
        write_json(path, {**known, key: result})
    except OSError:
        pass  # a read-only data set: computed again next time
    return result


# ============ whole scenes ============

def blend_weights(side):
    """(side, side) float32: what the cells of a window count for where windows overlap, a raised
    cosine in each direction, most in the middle"""
    places = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    ramp = torch.sin(torch.pi * places).square()
    return (ramp[:, None] * ramp).float()


def sliding_window(predict, cube, window, stride, num_classes, batch_size=8):
    """Predictions for an image of any size from overlapping windows, blended so that no seam shows.

    predict(raw (B, C, window, window)) -> probabilities (B, K, window, window); cube (C, H, W), an
    array or a Lazy, continued by its border where it is smaller than the window. Yields (first row,
    (K, rows, W) float32) from top to bottom, rows as soon as no further window touches them:
    memory holds one row of windows, however large the scene.
    """
    _, H, W = cube.shape
    tops = cut_positions(H, window, stride)
    lefts = cut_positions(W, window, stride)
    weight = blend_weights(window).numpy() if stride < window else 1.0
    weight = weight + 1e-6  # corners of the scene have one window only
    total = np.zeros((num_classes, window, max(W, window)), np.float32)
    norm = np.zeros((window, max(W, window)), np.float32)
    for top, below in zip(tops, [*tops[1:], tops[-1] + window]):
        # predict a row of windows, of which the cube is read once
        strip = np.asarray(cube[:, top:top + window])
        if H < window or W < window:
            beyond = max(window - H, 0), max(window - W, 0)
            strip = np.pad(strip, ((0, 0), (0, beyond[0]), (0, beyond[1])), mode='edge')
        for start in range(0, len(lefts), batch_size):
            columns = lefts[start:start + batch_size]
            raw = np.stack([strip[..., left:left + window] for left in columns])
            probabilities = predict(torch.from_numpy(raw)).float().cpu().numpy()
            for left, predicted in zip(columns, probabilities):
                total[:, :, left:left + window] += predicted * weight
                norm[:, left:left + window] += weight
        # hand out what is finished, and move the rest to the top for the next row of windows
        step = below - top
        done = min(step, H - top)
        yield top, total[:, :done, :W] / norm[:done, :W]
        for array in (total, norm):
            array[..., :window - step, :] = array[..., step:, :].copy()
            array[..., window - step:, :] = 0


# ============ judging ============

@torch.no_grad()
def predict_tile(probabilities, raw, window, num_classes):
    """One raw tile (1, C, S, S) -> probabilities (1, K, S, S); of a tile larger than `window` by
    blended windows of that side. probabilities(raw (B, C, h, w)) -> (B, K, h, w)"""
    if window >= raw.shape[-1]:
        return probabilities(raw)
    stride = max(1, window // 2)
    finished = sliding_window(probabilities, raw[0].numpy(), window, stride, num_classes)
    rows = np.concatenate([rows for _, rows in finished], axis=1)
    return torch.from_numpy(rows)[None]


@torch.no_grad()
def evaluate(predict, tiles, rank=0, world=1, device='cpu'):
    """Every tile once, dealt out over the ranks -> (K, K) confusion matrix, summed over the ranks.
    predict(raw (1, C, S, S)) -> classes (1, S, S), counted at once beside their labels."""
    num_classes = tiles.meta['num_classes']
    cm = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    ids = range(rank, len(tiles), world)
    for i in tqdm(ids, 'scoring', unit='tile', leave=False, delay=10, disable=rank > 0):
        raw, labels = tiles.batch([i])
        target = label_to_class(labels).to(device)
        cm += confusion_matrix(predict(raw).to(device), target, num_classes)
    if world > 1:
        dist.all_reduce(cm)
    return cm.cpu()


def report(out_dir, name, cm, floors, meta, about):
    """Print the scores of a confusion matrix (K, K) beside its floors, and write report.json.

    about: what else is to be known of the run (its constants, its best step) -> scores()
    """
    result = scores(cm)
    warning = chance_warning(result)
    print(f'\ntest split, in %; split: {meta["split"]}')
    print_scores({**floors, name: result})
    for class_name, iou, pixels in zip(meta['class_names'], result['iou'], cm.sum(1).tolist()):
        percent = 'absent' if iou is None else f'{100 * iou:6.1f}'
        print(f'  IoU {percent}  {class_name} ({pixels} px)')
    if warning:
        print(warning)
    if result['miou'] < floors['window']['miou']:
        print('below the window floor: averaged spectra alone do better')
    write_json(os.path.join(out_dir, 'report.json'), {
        'split': 'ts', 'how_split': meta['split'], 'scores': result, 'floors': floors,
        'class_names': meta['class_names'], 'confusion_matrix': cm.tolist(), 'warning': warning,
        **about})
    return result


def save_confusion(path, cm, class_names):
    """Picture of a confusion matrix (K, K), in percent of each class's test pixels"""
    K = len(class_names)
    pixels = cm.sum(1)
    share = cm.double() / pixels[:, None].clamp(min=1)
    side = min(0.4 * K, 6)
    figure = Figure(figsize=(3 + side, 2.5 + side), layout='constrained')
    axis = figure.subplots()
    axis.imshow(share.numpy(), cmap='Blues', vmin=0, vmax=1)
    for row, col in (share >= 0.005).nonzero().tolist():
        axis.text(col, row, f'{100 * share[row, col]:.0f}', ha='center', va='center', fontsize=7,
                  color='white' if share[row, col] > 0.6 else 'black')
    rows = [f'{name} ({count})' for name, count in zip(class_names, pixels.tolist())]
    axis.set_xticks(range(K), class_names, rotation=60, ha='right', fontsize=8)
    axis.set_yticks(range(K), rows, fontsize=8)
    axis.set(xlabel='predicted', ylabel='true', title='test pixels of a class, %')
    save_figure(figure, path)


def save_examples(path, predict, tiles):
    """False colour, labels and predict(raw (1, C, S, S)) -> (1, S, S) of four test tiles"""
    ids = most_labelled(tiles, 4)
    labels = [np.asarray(tiles.labels[i]) for i in ids]
    predicted = [predict(tiles.batch([i])[0])[0].cpu().numpy() + 1 for i in ids]
    save_maps(path, tiles, ids, [('test labels', labels), ('prediction', predicted)])


def most_labelled(tiles, number):
    """Numbers of the tiles, up to `number` of the first 500, that have most labels"""
    counts = [np.count_nonzero(labels) for labels in tiles.labels[:500]]
    return np.argsort(-np.array(counts), kind='stable')[:number]


def save_maps(path, tiles, ids, columns):
    """A row for each of the tiles `ids`: false colour, then maps of its classes.

    columns: list of (title, a map (S, S) of class numbers for each of ids, 0 = none)
    """
    side = min(9 / (1 + len(columns)), 2.5)
    size = side * (1 + len(columns)), (side + 0.1) * len(ids) + 1.3
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(len(ids), 1 + len(columns), squeeze=False)
    axes[0, 0].set_title('false colour', fontsize=9)
    for axis, i in zip(axes[:, 0], ids):
        image = false_color(tiles.images[i], tiles.meta)
        axis.imshow(image, interpolation='nearest')
        axis.set_ylabel(f'tile {i}, {len(image)} px', fontsize=8)
    for column, (title, maps) in zip(axes[:, 1:].T, columns):
        column[0].set_title(title, fontsize=9)
        for axis, classes in zip(column, maps):
            show_classes(axis, classes, tiles.meta)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    drawn = np.concatenate([maps for _, maps in columns])
    class_legend(figure, tiles.meta, set(np.unique(drawn).tolist()))
    save_figure(figure, path)


# ============ pictures ============

# the colours of earlier work on WHU-OHS; and those told apart by colour-blind eyes (Okabe and Ito)
OHS_PALETTE = ('bed2ff 00ffc5 267300 a3ff73 4ce600 55ff00 737300 a8a800 ffff00 73b2ff 005ce6 '
               '002673 7a8ef5 00a884 730000 ff7f7f ffbebe ffbee8 ff00c5 e600a9 a80084 73004c '
               'ff73df a1a1a1')
SAFE_PALETTE = 'e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 999999'


def class_colors(meta):
    """(K + 1, 3) uint8: black for unlabelled, then one colour a class: those of the label file, if
    they tell the classes apart, WHU-OHS's own, safe ones for up to 8 classes, else tab20's"""
    class_names = meta['class_names']
    stated = (meta.get('class_colors') or [])[:len(class_names)]
    palette = SAFE_PALETTE.split()
    if len(class_names) > len(palette):
        palette = [to_hex(color)[1:] for color in colormaps['tab20'].colors]
    if tuple(class_names) == OHS_CLASSES:
        palette = OHS_PALETTE.split()
    if len(set(map(tuple, stated))) == len(class_names):
        palette = [bytes(color).hex() for color in stated]
    chosen = ['000000'] + [palette[k % len(palette)] for k in range(len(class_names))]
    return np.array([list(bytes.fromhex(code)) for code in chosen], np.uint8)


def principal_colors(features):
    """features (..., D) -> (..., 3) in 0..1, on the CPU: their three leading principal components,
    each scaled to mean 0.5 and 2 standard deviations"""
    points = features.flatten(0, -2).double()
    points = points - points.mean(0)
    directions = torch.linalg.eigh(points.T @ points).eigenvectors[:, -3:].flip(1)
    directions = directions * directions.sum(0).sign()  # a component has no sign: choose one
    values = points @ directions
    colors = values / values.std(0).clamp(min=1e-12) / 4 + 0.5
    return colors.clamp(0, 1).reshape(*features.shape[:-1], 3).cpu()


def false_color_bands(wavelengths_nm, num_bands):
    """Numbers of three bands to show as red, green, blue: near infrared, red, green where
    wavelengths are known"""
    nm = np.array(wavelengths_nm or [], float)
    if len(nm) and nm.min() < 600 < 800 < nm.max():
        return [int(np.argmin(np.abs(nm - wanted))) for wanted in (866, 656, 560)]
    return [round(share * (num_bands - 1)) for share in (0.75, 0.5, 0.2)]


def false_color(x, meta, bands=None):
    """x (C, H, W) values of a scene -> (H, W, 3) in 0..1: mean ± 2 standard deviations of three
    bands, the same for all pictures of a data set; missing = black. bands: their numbers, where
    x holds no others."""
    x = np.asarray(x)  # torch 2.6 does not index uint16
    if bands is None:
        bands = false_color_bands(meta['wavelengths_nm'], len(x))
        x = x[bands]
    valid = valid_pixels(x, meta['nodata'])
    mean = np.array(meta['mean'])[bands]
    std = np.array(meta['std'])[bands]
    rgb = (np.moveaxis(x.astype(np.float32), 0, 2) - mean) / (4 * std) + 0.5
    return np.where(valid[..., None], rgb, 0).clip(0, 1)


def show_classes(axis, classes, meta, step=1):
    """Draw classes (h, w), 0 = none, in their colours, `step` pixels of the scene apart"""
    h, w = classes.shape
    colors = class_colors(meta)
    axis.imshow(colors[classes], interpolation='nearest', extent=(0, w * step, h * step, 0))


def class_legend(figure, meta, present):
    """Below the figure: the colours of the classes in `present` (their numbers, 0 = none)"""
    names, colors = meta['class_names'], class_colors(meta) / 255
    handles = [Patch(color=colors[number], label=f'{number} {names[number - 1]}')
               for number in sorted(present - {0})]
    if 0 in present:
        handles.append(Patch(color=colors[0], label='no label, no data'))
    figure.legend(handles=handles, loc='outside lower center', fontsize=8, frameon=False,
                  ncols=min(3, len(handles)))


def save_figure(figure, path):
    """Write a .png under a temporary name, then rename it"""
    for text in figure.findobj(lambda artist: hasattr(artist, 'set_parse_math')):
        text.set_parse_math(False)  # the name of a class may hold a $
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() != 'linear':  # matplotlib's own numbers are formulas there
                axis.set_major_formatter('{x:,.10g}')
    figure.savefig(path + '.tmp', format='png', dpi=110, bbox_inches='tight')
    os.replace(path + '.tmp', path)
    figure.clear()


# ============ the demo data set ============

def smooth_noise(rng, size, scale):
    """(size, size) Gaussian noise, smoothed to patches of about `scale` px, mean 0 and std 1"""
    f = np.fft.fftfreq(size)
    smoother = np.exp(-2 * (np.pi * scale / 2.5) ** 2 * (f[:, None] ** 2 + f ** 2))
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * smoother).real
    return (field - field.mean()) / field.std()


def demo_scene(rng, size, classes):
    """One synthetic scene -> image (size, size, 32) int16 z-scores x 10,000 as in WHU-OHS, labels
    (size, size) uint8. `classes` (24,) are biases: how common each class is.

    Classes come in families of nearly the same mean spectrum, each class in three varieties that
    differ from other classes' by traces: smooth spectra of a hundredth of the reflectance, which
    vary from pixel to pixel by more. So one pixel tells little, its surroundings more, and no
    plane separates a class. The components' eigenvalues and correlation of neighbours are like
    those of the real scene `indian_pines`.
    """
    nm = np.array(OHS_NM, float)
    green_peak = np.exp(-((nm - 550) / 30) ** 2)
    red_edge = 1 / (1 + np.exp(-((nm - 715) / 14)))
    vegetation = 0.04 + 0.03 * green_peak + 0.42 * red_edge  # reflectance (32,)
    soil = 0.08 + 0.25 * (nm - 466) / 474
    water = 0.07 * np.exp(-(nm - 466) / 160)
    built = 0.2 + 0.05 * np.sin(nm / 120)
    families = [(vegetation, soil), (vegetation, built), (soil, built),
                (water, vegetation), (water, soil), (built, water)]
    rows, cols = np.mgrid[:size, :size]

    # where which class and which of its varieties is; the biases make it long-tailed
    labels = np.stack([smooth_noise(rng, size, 34) + bias for bias in classes]).argmax(0)
    variety = np.stack([smooth_noise(rng, size, 26) for _ in range(3)]).argmax(0)

    # traces: a signature of each variety, the same in all scenes, and what varies around it
    order = np.arange(1, 15)[:, None]
    waves = np.cos(np.pi * order * (nm - 466) / 474) / order ** 0.7  # (14, 32) smooth spectra
    signatures = np.random.default_rng(0).normal(size=(3, len(classes), 14))
    scales = rng.permutation(np.geomspace(1.5, 12, 14))
    within_fields = np.stack([smooth_noise(rng, size, scale) for scale in scales], -1)
    of_pixels = rng.normal(size=(size, size, 14))
    traces = 0.007 * signatures[variety, labels] + 0.003 * within_fields + 0.015 * of_pixels
    spectra = traces @ waves

    # each class mixes the two materials of its family, in stripes or patches of its own
    mixture = 0.1 * smooth_noise(rng, size, 5)
    for k in range(len(classes)):
        first, second = families[k % 6]
        period = (3.2, 4.5, 7, 11)[k // 6]
        angle = (0, 0.8, 1.6, 2.4)[(k // 6 + k) % 4]
        if k % 2:
            phase = 2 * np.pi * (rows * np.sin(angle) + cols * np.cos(angle)) / period
            texture = np.sin(phase + smooth_noise(rng, size, 30))
        else:
            texture = smooth_noise(rng, size, period)
        share = (0.38 + 0.08 * (k // 6) + 0.03 * texture + mixture).clip(0, 1)[..., None]
        here = labels == k
        spectra[here] += (share * first + (1 - share) * second)[here]

    # the sensor: mixed edges, absorption by oxygen and water vapour, light, haze, noise
    shifts = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
    blurred = sum(np.roll(spectra, shift, (0, 1)) for shift in shifts) / 5
    oxygen = 0.25 * np.exp(-((nm - 760) / 8) ** 2)
    vapour = 0.3 * np.exp(-((nm - 935) / 18) ** 2)
    light = 1 + 0.1 * smooth_noise(rng, size, 45)[..., None] + 0.05 * rng.normal()
    haze = 1 + 0.04 * smooth_noise(rng, size, 60)[..., None] * (nm - 700) / 240
    image = (0.5 * spectra + 0.5 * blurred) * (1 - oxygen - vapour) * light * haze
    image = image + 0.002 * rng.normal(size=spectra.shape)

    # as WHU-OHS stores it, with unlabelled islands and a corner without data
    image = (image - image.mean((0, 1))) / image.std((0, 1))
    image = (image * 10_000).clip(-32_767, 32_767).astype(np.int16)
    labels = (labels + 1).astype(np.uint8)
    labels[smooth_noise(rng, size, 20) > 1.2] = 0
    corner = rows + cols < rng.integers(0, size // 3)
    image[corner] = -32_768
    labels[corner] = 0
    return image, labels


def demo(args):
    """The command `demo`: synthetic scenes in the WHU-OHS layout under OUT/scenes, tiled into
    OUT. Nothing to download."""
    import tifffile
    if os.path.exists(os.path.join(args.out, 'meta.json')):
        print(f'{args.out}: complete, nothing to do')
        return
    rng = np.random.default_rng(0)
    bias = -0.09 * np.arange(24)[rng.permutation(24)]  # common classes win the argmax more often
    root = os.path.join(args.out, 'scenes')
    nodata = [(42113, 's', 0, '-32768', True)]  # as GDAL writes it
    for number, (split, count) in enumerate(zip(SPLITS, (24, 6, 8))):
        images, labels = (os.path.join(root, split, kind) for kind in ('image', 'label'))
        os.makedirs(images, exist_ok=True)
        os.makedirs(labels, exist_ok=True)
        for i in range(count):
            classes = bias + rng.normal(0, 0.5, 24)
            image, label = demo_scene(np.random.default_rng([number, i]), 128, classes)
            name = f'D_{i + 1:04d}.tif'
            tifffile.imwrite(os.path.join(images, name), image, planarconfig='contig',
                             photometric='minisblack', extratags=nodata)
            tifffile.imwrite(os.path.join(labels, name), label, photometric='minisblack')
    with contextlib.redirect_stdout(io.StringIO()) as said:  # of scenes that were just made
        tile(parse(['tile', f'--root={root}', f'--out={args.out}', '--tile_size=64']))
    print(said.getvalue().splitlines()[-1])


def demo_if_missing(directory):
    """The scripts' default data set is made on first use"""
    at_default = os.path.normpath(directory) == os.path.join('data', 'demo')
    if at_default and not os.path.exists(os.path.join(directory, 'meta.json')):
        with lock_directory(directory):
            demo(parse(['demo', f'--out={directory}']))


# ============ command line ============

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    tiler = commands.add_parser('tile', help='cut scenes into tiles', allow_abbrev=False)
    flag = tiler.add_argument
    flag('--root', required=True,
         help='a scene, several separated by commas, or a folder tr|val|ts / image|label')
    flag('--out', required=True, help='directory for the tiles')
    flag('--tile_size', type=int, default=64, help='side of a tile in pixels (default 64)')
    flag('--stride', type=int, default=0,
         help='step between training tiles; 0 = tile_size, less = they overlap')
    flag('--labels', default='', help='label file of each scene, if the scene has none inside')
    flag('--axes', default='', help='order of the axes of an array that does not state it: hwc '
         '(bands last) or chw')
    flag('--nodata', type=float, help='value of missing pixels, if the file states none or a wrong '
         'one')
    flag('--drop_bands', default='', help='bands to leave out, numbers from 1 or wavelengths: '
         '1,5,100-110 or 1380-1410nm')
    flag('--keep_bad_bands', type=boolean, nargs='?', const=True, default=False,
         help='use the bands that the file marks as bad, too')
    flag('--bands', default='', help='resample to these wavelengths in nm (comma-separated, "ohs" '
         'or "landsat"; 485:70 = 70 nm wide)')
    flag('--pca', type=int, default=0,
         help='store this many principal components instead of bands; 0 = the bands')
    flag('--normalize', default='none', choices=('none', 'scene'), help='scene: store each band at '
         'mean 0 and std 1 over its scene, so that several sensors or units go together')
    flag('--split', default='blocks', choices=('blocks', 'halves'), help='how the labels of a '
         'scene are split: blocks share the image (transductive), halves cut it (inductive)')
    flag('--split_block', type=int, default=16, help='side of a block in pixels (default 16)')
    flag('--split_gap', type=int, default=0,
         help='pixels left unused beside a block of another split (default 0)')
    flag('--shares', default='0.5,0.1,0.4', help='of tr,val,ts (default 0.5,0.1,0.4)')
    flag('--seed', type=int, default=0, help='of the split (default 0)')
    flag('--skip_bad', type=boolean, nargs='?', const=True, default=False,
         help='go on without files that cannot be used')
    maker = commands.add_parser('demo', help='make the synthetic data set', allow_abbrev=False)
    maker.add_argument('--out', default='data/demo', help='where (default data/demo)')
    args = parser.parse_args(argv)
    if args.command == 'tile':
        try:
            shares = [float(share) for share in args.shares.split(',')]
        except ValueError:
            shares = []
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            parser.error(f'--shares={args.shares}: give three numbers that add up to 1, as '
                         '0.5,0.1,0.4')
        if args.nodata is not None and math.isnan(args.nodata):
            args.nodata = None  # NaN marks missing pixels in any case
        if min(args.tile_size, args.split_block) < 1:
            parser.error('--tile_size and --split_block start at 1')
        if min(args.stride, args.split_gap, args.pca, args.seed) < 0:
            parser.error('--stride, --split_gap, --pca and --seed start at 0')
    return args


def boolean(text):
    return bool(('false', 'true').index(text.lower()))


def next_command(script, **flags):
    """The line that runs a script of this project as this one was run, quoted for a shell"""
    path = os.path.join(os.path.dirname(sys.argv[0]), script)
    python = sys.orig_argv[0]  # as the user called it, so that it is that of the environment
    return shlex.join([python, path, *(f'--{name}={value}' for name, value in flags.items())])


HOW_READ = ('axes', 'nodata', 'drop_bands', 'keep_bad_bands')  # settings that read_scene takes


def scene_flags(meta):
    """-> flags of tools/map_scene.py for the last of the scenes that the tiles of `meta` were cut
    from: where it is, and how the tiler was told to read it"""
    path, settings = meta['scenes'][-1], meta['settings']
    if meta['split'] == BY_FOLDERS:
        split, file = path.split('/')
        path = os.path.join(settings['root'], split, 'image', file)
    if not os.path.exists(split_name(path)[0]):  # it lies where the tiler ran, or once was
        path = 'SCENE'
    told = {name: settings.get(name) for name in HOW_READ}
    return {'scene': path} | {name: value for name, value in told.items()
                              if value not in ('', None) and value is not False}


def plain_errors():
    """From here on a user's mistake ends the program with its sentence and exit code 1, not with a
    traceback."""
    def hook(kind, error, trace):
        about_files = isinstance(error, OSError) and error.filename
        disk_full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if isinstance(error, ModuleNotFoundError):
            error = UserError(f'{error}: pip install {error.name}')
        if isinstance(error, (UserError, KeyboardInterrupt)) or about_files or disk_full:
            print(f'error: {error}' if str(error) else 'interrupted', file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
    sys.excepthook = hook


def read_flags(constants, presets=None):
    """The globals() of a script, changed as the command line says -> the constants, by name.

    A line `name = value  # comment` makes a flag, the comment its help; `a | b: ` in front of that
    are choices. `presets` are other values by --size; what is on the command line wins over them.
    No number is negative. A whole number starts at 1, unless it is 0 or the comment says what
    `0: ` means, and ends at 2 ** 31: seeds are made of it. What the comment calls a share or a
    probability ends at 1.
    """
    parser = argparse.ArgumentParser(description=constants['__doc__'], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    with open(constants['__file__'], encoding='utf-8') as file:
        comments = dict(re.findall(r'^(\w+) = .*?  # (.*)$', file.read(), re.M))
    for name, comment in comments.items():
        value = constants[name]
        words = comment.split(':')[0].split(' | ')
        kind = dict(type=type(value), choices=words if len(words) > 1 else None)
        if isinstance(value, bool):
            kind = dict(type=boolean, nargs='?', const=True)
        parser.add_argument(f'--{name}', default=value, metavar=repr(value),
                            help=comment.replace('%', '%%'), **kind)
    if presets:
        size = parser.parse_known_args()[0].size
        parser.set_defaults(**presets[size])
    config = vars(parser.parse_args())
    for name, value in config.items():
        default, comment = constants[name], comments[name]
        if isinstance(default, str) or default < 0:
            continue
        share = type(default) is float and re.search('share|probability', comment)
        lowest = 1 if type(default) is int and default > 0 and '0: ' not in comment else 0
        highest = 1 if share else 2 ** 31
        if not lowest <= value <= highest:
            span = 'a share, from 0 to 1' if share else f'{lowest} or more, up to {highest:,}'
            raise UserError(f'--{name}={value}: choose {span}')
    constants.update(config)
    return config


if __name__ == '__main__':
    plain_errors()
    arguments = parse()
    is_new = not os.path.exists(arguments.out)
    with lock_directory(arguments.out):
        try:
            {'tile': tile, 'demo': demo}[arguments.command](arguments)
        except UserError:
            if is_new:  # nothing in it is of use
                shutil.rmtree(arguments.out, ignore_errors=True)
            raise
