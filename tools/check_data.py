"""The data set doctor: facts, faults and floors of a tile directory.

    python tools/check_data.py --data=data/mine

The floors are what a network must beat. The exit code is 1 when something is wrong. When all is
said it draws check.png into the directory: a tile, its labels, and the spectrum of each class.
"""
import argparse
import hashlib
import math
import os
import sys
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import (SPLITS, Tiles, class_colors, class_legend, false_color, floors, plain_errors,
                  print_scores, read_meta, save_figure, show_classes)
from scenes import one_line, valid_pixels

SAMPLE_PIXELS = 50_000  # drawn from all tiles: what is said about values comes from these


class Facts(NamedTuple):
    counts: dict  # split -> (256,) pixels of each label
    unseen: dict  # split -> labelled pixels without data
    sums: np.ndarray  # (3, K + 1, C) of tr, by label: pixels, their values, values squared
    extremes: np.ndarray  # (2, C) the lowest and the highest value of each band
    sample: np.ndarray  # (C, 1, n) pixels of all tiles, missing ones too
    sample_scene: np.ndarray  # (n,) the numbers of their scenes
    same_within: int  # tiles that repeat one of their own split
    same_across: int  # tiles that repeat one of another split
    shared_labels: int  # pixels labelled in both


def read_facts(tiles):
    """tiles: dict split -> Tiles. Looks at every tile once."""
    meta = tiles['tr'].meta
    counts = {split: np.zeros(256, np.int64) for split in tiles}
    unseen = dict.fromkeys(tiles, 0)
    sums = np.zeros((3, meta['num_classes'] + 1, meta['num_bands']))
    lowest = np.full(meta['num_bands'], np.inf)
    highest = -lowest
    rng = np.random.default_rng(0)
    per_tile = math.ceil(SAMPLE_PIXELS / sum(map(len, tiles.values())))
    sample, sample_scene = [], []
    first_seen = {}  # fingerprint of an image -> split and labels of the first tile that has it
    same_within = same_across = shared_labels = 0
    for split in tiles:
        for i in tqdm(range(len(tiles[split])), desc=f'reading {split}', leave=False):
            image = np.asarray(tiles[split].images[i])
            labels = np.zeros(image.shape[1:], np.uint8)
            if tiles[split].labels is not None:
                labels = np.asarray(tiles[split].labels[i])
            valid = valid_pixels(image, meta['nodata'])
            counts[split] += np.bincount(labels.ravel(), minlength=256)
            unseen[split] += np.count_nonzero(labels[~valid])

            # the extremes of its values, and pixels for the sample
            if valid.any():
                lowest = np.minimum(lowest, image[:, valid].min(1))
                highest = np.maximum(highest, image[:, valid].max(1))
            drawn = rng.integers(valid.size, size=per_tile)
            sample.append(image.reshape(len(image), 1, -1)[..., drawn])
            sample_scene += [meta['tiles'][split][i][0]] * per_tile

            # is there another tile of the same image?
            fingerprint = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            first_split, first_labels = first_seen.setdefault(fingerprint, (split, labels))
            if first_split != split:
                same_across += 1
                shared_labels += np.count_nonzero((labels > 0) & (first_labels > 0))
            elif first_labels is not labels:
                same_within += 1

            # the spectra of the classes
            if split == 'tr':
                for k in np.unique(labels[valid]):
                    if k <= meta['num_classes']:
                        x = image[:, valid & (labels == k)].astype(np.float64)  # (C, n)
                        sums[:, k] += [np.full(len(x), x.shape[1]), x.sum(1), (x ** 2).sum(1)]
    extremes = np.stack([lowest, highest])
    return Facts(counts, unseen, sums, extremes, np.concatenate(sample, 2), np.array(sample_scene),
                 same_within, same_across, shared_labels)


def print_facts(facts, meta, directory):
    number_of_tiles = {split: len(meta['tiles'][split]) for split in facts.counts}
    patches = [str(side) for side in range(1, 33) if meta['tile_size'] % side == 0]
    print(f'{directory}: {meta["num_bands"]} bands of {meta["dtype"]}, tiles of '
          f'{meta["tile_size"]} px, which patches of {", ".join(patches)} px divide')
    print(f'split: {meta["split"]}')
    print(f'tiles {number_of_tiles}; nodata {100 * meta["nodata_share"]:.1f} % of the pixels')
    levels = grey_levels(facts, meta)
    print(f'different values of a band, in a sample: {min(levels)} to {max(levels)}')
    print(f'tiles with the same image: {facts.same_within} within a split, {facts.same_across} '
          'across splits', end='')
    by_design = facts.same_across and not facts.shared_labels
    print(' (with blocks all splits see the whole image, each with labels of its own)'
          if by_design and meta['split'].startswith('blocks') else '')
    print(f'{"class":28s}' + ''.join(f'{split:>12s}' for split in facts.counts))
    for k, name in enumerate(meta['class_names'], 1):
        pixels = ''.join(f'{count[k]:12d}' for count in facts.counts.values())
        print(f'{k:3d} {name[:24]:24s}{pixels}')


# ============ what may be wrong: each gives a sentence for each fault, what and what to do ======

def faults_of_tiles(facts, meta):
    if meta['tile_size'] % 2:
        yield (f'no usual patch divides tiles of {meta["tile_size"]} px: tile with --tile_size='
               f'{max(meta["tile_size"] // 8 * 8, 8)}')
    if facts.shared_labels:
        yield (f'{facts.shared_labels} pixels are labelled in two splits (identical tiles): '
               'remove the duplicates from tr')
    places = np.concatenate([meta['tiles'][split] for split in facts.counts])
    height, width = places[:, 1:].max(0) + meta['tile_size']
    if meta['num_bands'] == 1 and max(height, width) > 8 * min(height, width):
        yield (f'one band of {height} x {width} px looks like a table of bands x pixels: give '
               'the image as rows x columns x bands')


def faults_of_labels(facts, meta, labels):
    """labels: (N, S, S) of tr, or None"""
    K, names = meta['num_classes'], meta['class_names']
    total = sum(facts.counts.values())  # (256,) pixels of each label
    used = np.flatnonzero(total[1:]) + 1
    for split, count in facts.counts.items():
        if count[K + 1:].any():
            yield (f'{split}: label values above {K} (up to {np.flatnonzero(count)[-1]}): '
                   'repair the labels and tile again')
        if facts.unseen[split]:
            yield (f'{facts.unseen[split]} labelled pixels of {split} have no data: tile again, '
                   'such labels become 0')
    for k in used[facts.counts['tr'][used] == 0]:
        if k <= K:
            yield (f'class {k} ({names[k - 1]}) has labels but none in tr: tile with another '
                   '--seed or a smaller --split_block')
    if len(used) == 1:
        yield (f'{used[0]} is the only class: 0 means unlabelled here, so number the background '
               'as a class of its own')
    elif 0 < 2 * len(used) < K:
        yield (f'only {len(used)} of {K} classes have labels: number the classes 1, 2, 3, ...')
    if labels is not None and are_continuous(labels):
        yield (f'{len(used)} label values, of which neighbours are close, look like heights or '
               'another measured quantity: give class numbers')


def faults_of_values(facts, meta):
    flat = np.flatnonzero(~(np.array(meta['std']) > 0))
    if len(flat):
        yield f'one value only in {band_text(flat)}: --drop_bands leaves bands out'
    coarse = np.flatnonzero(grey_levels(facts, meta) < 16)
    coarse = np.setdiff1d(coarse, flat)
    if len(coarse):
        yield (f'fewer than 16 different values in {band_text(coarse)}: use the sensor\'s own '
               'values if the scene was quantised; --drop_bands leaves bands out')
    yield from missing_in_few_bands(facts, meta)
    fillers = list(find_fillers(facts, meta))
    yield from fillers or other_units(facts, meta)

    # statistics of data that an older tiler, or another program, has made
    n, total, squares = facts.sums.sum(1)
    mean = total / n.clip(1)
    std = np.sqrt((squares / n.clip(1) - mean ** 2).clip(0))
    stated = np.array(meta['std'])
    off = np.abs(mean - meta['mean']) > 0.5 * stated
    off |= (std > 2 * stated) | (std < stated / 2)
    if off.any():
        yield (f'meta.json has another mean or std than the tiles, of '
               f'{band_text(np.flatnonzero(off))}: tile again')


def band_text(numbers):
    """[2, 6] -> 'bands 3, 7': counted from 1"""
    words = ', '.join(str(number + 1) for number in numbers[:8])
    more = f' and {len(numbers) - 8} more' if len(numbers) > 8 else ''
    return f'band{"s" * (len(numbers) > 1)} {words}{more}'


def valid_sample(facts, meta):
    """-> values (C, n) of the sample's valid pixels, the numbers (n,) of their scenes"""
    valid = valid_pixels(facts.sample, meta['nodata'])[0]
    return facts.sample[:, 0, valid], facts.sample_scene[valid]


def grey_levels(facts, meta):
    """(C,) different values of each band"""
    values, _ = valid_sample(facts, meta)
    return np.array([len(np.unique(band)) for band in values])


def missing_in_few_bands(facts, meta):
    missing = ~np.isfinite(facts.sample) | (facts.sample == meta['nodata'])
    lost = ~valid_pixels(facts.sample, meta['nodata']) & ~missing.all(0)  # (1, n)
    if lost.mean() > 0.01:
        often = np.argsort(-missing[:, lost].sum(1), kind='stable')
        often = often[missing[often][:, lost].any(1)]
        yield (f'{100 * lost.mean():.1f} % of the pixels are missing because of some of their bands'
               f', most often of {band_text(often[:3])}: --drop_bands leaves bands out')


def find_fillers(facts, meta):
    """Values that may stand for "missing" and are not declared.

    An extreme value is taken for one when it is repeated and farther from the other values than
    these from each other, or is the only one below 0; or when it is thousands of times as far off.
    So is 0 in all bands of a pixel.
    """
    values, _ = valid_sample(facts, meta)
    found = {}  # value -> numbers of bands
    for band, x in enumerate(values.astype(np.float64)):
        lowest, highest = facts.extremes[:, band]
        rest = x[(x > lowest) & (x < highest)]
        if len(rest) < 100:
            continue
        first, last = np.quantile(rest, [0.01, 0.99])
        for value in (lowest, highest):
            gap = np.abs(rest - value).min()
            repeated = np.count_nonzero(x == value) >= max(3, 1e-4 * len(x))
            alone = gap > np.ptp(rest) or (value < 0 <= rest.min() and gap > 0.05 * np.ptp(rest))
            if repeated and alone or gap > 1000 * (last - first):
                found.setdefault(value, []).append(band)
    for value, bands in found.items():
        share = (values[bands] == value).any(0).mean()
        rest = values[bands][:, (values[bands] != value).all(0)]
        yield (f'{band_text(bands)}: the value {value:g} ({100 * share:.1f} % of the pixels) lies '
               f'far from the others ({rest.min():g} to {rest.max():g}): if it stands for "no '
               f'data", tile with --nodata={value:g}')
    black = (values == 0).all(0).mean()
    if 0 not in found and black > 0.01:
        yield (f'{100 * black:.1f} % of the pixels are 0 in all bands: if this stands for "no data"'
               ', tile with --nodata=0')


def other_units(facts, meta):
    """Scenes whose values differ by a factor that no ground explains: snow is some 30 times as
    bright as water"""
    values, scene_of = valid_sample(facts, meta)
    scenes = np.unique(scene_of)
    level = [np.sqrt(np.square(values[:, scene_of == k], dtype=float).mean()) for k in scenes]
    dark, bright = np.argmin(level), np.argmax(level)
    if level[bright] > 80 * level[dark]:
        names = [meta['scenes'][scenes[number]] for number in (bright, dark)]
        yield (f'the values of {names[0]} (typically {level[bright]:.3g}) are '
               f'{level[bright] / level[dark]:.3g} times those of {names[1]}: if their units '
               'differ, tile with --normalize=scene')


def are_continuous(labels):
    """Are labels (N, S, S) a measured quantity? Then there are many values, and a neighbour with
    another value has nearly the same one."""
    if len(np.unique(labels)) <= 20:
        return False
    here, right = labels[..., :-1].astype(int), labels[..., 1:].astype(int)
    both = (here > 0) & (right > 0)
    here, right = here[both], right[both]
    other = here != right
    step = np.abs(here - right)[other].mean()
    elsewhere = np.random.default_rng(0).permutation(here)
    return other.mean() > 0.2 and step < 0.25 * np.abs(here - elsewhere).mean()


# ============ the picture ============

def save_picture(path, train, sums):
    """A training tile of many classes, its labels, and the mean spectrum of each class"""
    meta, names = train.meta, train.meta['class_names']
    figure = Figure(figsize=(9, 7), layout='constrained')
    axes = figure.subplot_mosaic([['image', 'labels'], ['spectra', 'spectra']])
    chosen = 0
    if train.labels is not None:
        richness = [len(np.unique(x)) + (x > 0).mean() for x in train.labels[:500]]
        chosen = int(np.argmax(richness))
        show_classes(axes['labels'], np.asarray(train.labels[chosen]), names)
        class_legend(figure, names, set(range(len(names) + 1)))
    axes['labels'].set_title('its labels', fontsize=9)
    image = false_color(train.images[chosen], meta)
    axes['image'].imshow(image, interpolation='nearest')
    axes['image'].set_title(f'tile {chosen} of tr, {meta["tile_size"]} px, false colour', fontsize=9)
    for name in ('image', 'labels'):
        axes[name].set(xticks=[], yticks=[])

    # without labels the spectrum of all pixels
    nm = np.array(meta['wavelengths_nm'] or range(1, meta['num_bands'] + 1), float)
    order = np.argsort(nm)
    colors = class_colors(names) / 255
    pixels, total, _ = sums[:, :, order]  # (K + 1, C)
    for k in range(0 if train.labels is None else 1, len(names) + 1):
        if pixels[k, 0]:
            axes['spectra'].plot(nm[order], total[k] / pixels[k], color=colors[k])
    axes['spectra'].set_xlabel('wavelength, nm' if meta['wavelengths_nm'] else 'band', fontsize=8)
    axes['spectra'].set_ylabel('stored value, mean of each class', fontsize=8)
    save_figure(figure, path)


if __name__ == '__main__':
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='data/demo', help='a tile directory')
    directory = parser.parse_args().data
    meta = read_meta(directory)
    tiles = {split: Tiles(directory, split) for split in SPLITS if meta['tiles'][split]}

    facts = read_facts(tiles)
    print_facts(facts, meta, directory)
    faults = [*faults_of_tiles(facts, meta), *faults_of_labels(facts, meta, tiles['tr'].labels),
              *faults_of_values(facts, meta)]
    for fault in faults:
        print(f'{directory}: {fault}', file=sys.stderr)
    if not faults:
        print('nothing wrong found')

    # what a network must beat on the last split that is there
    last = list(tiles)[-1]
    if last != 'tr' and facts.counts['tr'][1:].any() and facts.counts[last][1:].any():
        print(f'\nfloors on {last} (%): what a network must beat')
        print_scores(floors(directory, last))
        if not os.path.exists(os.path.join(directory, 'floors.json')):
            print('floors.json cannot be written there: every script computes the floors anew')

    path = os.path.join(directory, 'check.png')
    try:
        save_picture(path, tiles['tr'], facts.sums)
        print(f'picture: {path}')
    except OSError as error:
        print(f'no picture: {path} cannot be written ({one_line(error)})')
    sys.exit(1 if faults else 0)
