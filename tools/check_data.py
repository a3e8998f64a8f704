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
from scenes import find_fillers, name_bands, one_line, short_text, valid_pixels

SAMPLE_PIXELS = 50_000  # drawn from all tiles: what is said about values comes from these


class Facts(NamedTuple):
    counts: dict  # split -> (256,) pixels of each label
    labels_on_missing: dict  # split -> how many
    sums: np.ndarray  # (2, K + 1, C) of tr, by label: pixels, their values
    extremes: np.ndarray  # (2, C) the lowest and the highest value of each band
    sample: np.ndarray  # (C, n) float64, pixels drawn from all tiles; NaN = no value
    sample_scene: np.ndarray  # (n,) the numbers of their scenes
    same_images: int  # tiles that repeat one of another split
    shared_labels: int  # pixels labelled in both


def read_facts(tiles):
    """tiles: dict split -> Tiles. Looks at every tile once; where tiles overlap, a pixel's label
    counts once."""
    meta = tiles['tr'].meta
    size = meta['tile_size']
    nodata = meta['nodata']
    counts = {split: np.zeros(256, np.int64) for split in tiles}
    labels_on_missing = dict.fromkeys(tiles, 0)
    sums = np.zeros((2, meta['num_classes'] + 1, meta['num_bands']))
    lowest = np.full(meta['num_bands'], np.inf)
    highest = -lowest
    rng = np.random.default_rng(0)
    per_tile = math.ceil(SAMPLE_PIXELS / sum(map(len, tiles.values())))
    sample, sample_scene = [], []
    first_seen = {}  # fingerprint of an image -> split and labels of the first tile that has it
    same_images = shared_labels = 0
    for split in tiles:
        places = np.array(meta['tiles'][split])  # scene, row, column
        scene_of_counted = -1
        for i in tqdm(range(len(tiles[split])), desc=f'reading {split}', leave=False):
            image = np.asarray(tiles[split].images[i])
            labels = np.zeros(image.shape[1:], np.uint8)
            if tiles[split].labels is not None:
                labels = np.asarray(tiles[split].labels[i])
            valid = valid_pixels(image, nodata)
            scene, row, col = places[i]
            if scene != scene_of_counted:  # tiles of a scene follow each other
                counted = np.zeros(places[:, 1:].max(0) + size, bool)
                scene_of_counted = scene
            fresh = ~counted[row:row + size, col:col + size]
            counted[row:row + size, col:col + size] = True
            counts[split] += np.bincount(labels[fresh], minlength=256)
            labels_on_missing[split] += np.count_nonzero(labels[fresh & ~valid])

            # is it in another split too?
            fingerprint = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            first_split, first_labels = first_seen.setdefault(fingerprint, (split, labels))
            if first_split != split and image.min() != image.max():
                same_images += 1
                shared_labels += np.count_nonzero((labels > 0) & (first_labels > 0))

            # the extremes of its values, and pixels for the sample
            if valid.any():
                lowest = np.minimum(lowest, image[:, valid].min(1))
                highest = np.maximum(highest, image[:, valid].max(1))
            if first_labels is labels:  # an image that is new
                drawn = rng.permutation(valid.size)[:per_tile]
                drawn = image.reshape(len(image), -1)[:, drawn]
                missing = ~np.isfinite(drawn) | (drawn == nodata)
                missing &= ~valid_pixels(drawn[:, None], nodata)
                sample.append(np.where(missing, np.nan, drawn))
                sample_scene += [scene] * drawn.shape[1]

            # the spectra of the classes
            if split == 'tr':
                for k in np.unique(labels[valid]):
                    if k <= meta['num_classes']:
                        x = image[:, valid & (labels == k)].astype(np.float64)  # (C, n)
                        sums[:, k] += [np.full(len(x), x.shape[1]), x.sum(1)]
    return Facts(counts, labels_on_missing, sums, np.stack([lowest, highest]),
                 np.concatenate(sample, 1), np.array(sample_scene), same_images, shared_labels)


def print_facts(facts, meta, directory):
    number_of_tiles = {split: len(meta['tiles'][split]) for split in facts.counts}
    patches = [str(side) for side in range(1, 33) if meta['tile_size'] % side == 0]
    print(f'{directory}: {meta["num_bands"]} bands of {meta["dtype"]}, tiles of '
          f'{meta["tile_size"]} px; patches of {", ".join(patches)} px divide them')
    print(f'tiles {number_of_tiles}; split: {meta["split"]}')
    print(f'{100 * meta["nodata_share"]:.1f} % of the pixels are missing')
    meant = ', as is meant: with blocks the splits share the image'
    print(f'{facts.same_images} tiles have the image of a tile of another split'
          f'{meant if meta["split"].startswith("blocks") else ""}')
    print(f'{"class":28s}' + ''.join(f'{split:>12s}' for split in facts.counts))
    for k, name in enumerate(meta['class_names'], 1):
        pixels = ''.join(f'{count[k]:12d}' for count in facts.counts.values())
        print(f'{k:3d} {name[:24]:24s}{pixels}')


# ============ faults: each a sentence, what and what to do ============

def faults_of_tiles(facts, meta):
    size = meta['tile_size']
    if size % 2:
        yield (f'no usual patch divides tiles of {size} px: tile with '
               f'--tile_size={max(size // 8 * 8, 8)}')
    if facts.shared_labels:
        yield (f'{facts.shared_labels} pixels are labelled in two splits (identical tiles): '
               'remove the duplicates from tr')
    places = np.concatenate([meta['tiles'][split] for split in facts.counts])
    sides = places[:, 1:].max(0) + size
    if meta['num_bands'] == 1 and sides.max() > 8 * sides.min():
        yield (f'one band of {sides[0]} x {sides[1]} px looks like a table of bands x pixels: give '
               'the image as rows x columns x bands')


def faults_of_labels(facts, meta, labels):
    """labels: (N, S, S) of tr, or None"""
    K = meta['num_classes']
    pixels = sum(facts.counts.values())  # (256,)
    used = np.flatnonzero(pixels[1:]) + 1
    for split, count in facts.counts.items():
        if count[K + 1:].any():
            yield (f'{split}: label values above {K} (up to {np.flatnonzero(count)[-1]}): '
                   'repair the labels and tile again')
        if facts.labels_on_missing[split]:
            yield (f'{split}: {facts.labels_on_missing[split]} labels lie on missing pixels: tile '
                   'again, then they become 0')
    for k in used[used <= K]:
        if facts.counts['tr'][k] == 0:
            yield (f'class {k} ({meta["class_names"][k - 1]}) has labels but none in tr: tile with '
                   'another --seed or a smaller --split_block')
    if len(used) == 1:
        yield (f'all labels are {used[0]}, one class only: 0 means unlabelled here, so give the '
               'background a number of its own')
    elif 0 < 2 * len(used) < K and meta['class_names'][0] == 'class 1':
        yield f'only {len(used)} of {K} classes have labels: number the classes 1, 2, ...'
    if labels is not None and are_measured(labels):
        yield (f'{len(used)} label values, neighbours often 1 or 2 apart, look like heights: '
               'give class numbers')


def are_measured(labels):
    """Are labels (N, S, S) no classes? Then there are many values, and a neighbour that has
    another value has nearly the same."""
    if len(np.unique(labels)) <= 20:
        return False
    here = labels[..., :-1].astype(int)
    right = labels[..., 1:].astype(int)
    both = (here > 0) & (right > 0)
    here, right = here[both], right[both]
    other = here != right
    step = np.abs(here - right)[other].mean()
    elsewhere = np.random.default_rng(0).permutation(here)
    return other.mean() > 0.2 and step < 0.25 * np.abs(here - elsewhere).mean()


def faults_of_values(facts, meta):
    one_value = np.flatnonzero(~(np.array(meta['std']) > 0))
    if len(one_value):
        yield f'{in_file(one_value, meta)}: one value only: --drop_bands leaves bands out'
    known = [values[~np.isnan(values)] for values in facts.sample]
    few_values = [band for band, values in enumerate(known)
                  if len(np.unique(values)) < 16]
    quantised = np.setdiff1d(few_values, one_value).astype(int)
    if len(quantised):
        yield (f'{in_file(quantised, meta)}: fewer than 16 different values: use the own values of '
               'a quantised scene, else --drop_bands leaves bands out')
    missing = np.isnan(facts.sample)
    partly_missing = missing.any(0) & ~missing.all(0)
    if partly_missing.mean() > 0.01:
        worst = missing[:, partly_missing].sum(1).argmax()
        yield (f'{100 * partly_missing.mean():.1f} % of the pixels are missing in some bands only, '
               f'most in {in_file([worst], meta)}: --drop_bands leaves bands out')

    # values that may stand for "missing"
    valid = facts.sample[:, ~missing.any(0)]
    fillers = find_fillers(facts.sample, *facts.extremes)
    for value, bands in fillers.items():
        yield (f'{in_file(bands, meta)}: values far outside the rest ({value:g}): if they mean "no '
               f'data", tile with --nodata={short_text(value)}')
    black = (valid == 0).all(0).mean() if valid.size else 0
    if black > 0.01 and 0 not in fillers:
        yield 'pixels that are 0 in all bands: if this means "no data", tile with --nodata=0'

    # no ground explains such a factor: snow is some 30 times as bright as water
    scene_of = facts.sample_scene[~missing.any(0)]
    levels = {scene: np.sqrt(np.square(valid[:, scene_of == scene]).mean())
              for scene in np.unique(scene_of)}
    if levels and not fillers:
        dark = min(levels, key=levels.get)
        bright = max(levels, key=levels.get)
        if levels[bright] > 80 * levels[dark]:
            yield (f'{meta["scenes"][bright]} has values of about {levels[bright]:.2g}, '
                   f'{meta["scenes"][dark]} of about {levels[dark]:.2g}: if their units differ, '
                   'tile with --normalize=scene')


def in_file(bands, meta):
    """'bands 3, 5-9' for numbers of bands in the tiles: as the scene's file counts them"""
    numbers = meta.get('bands') or range(meta['num_bands'])
    return name_bands([numbers[band] for band in bands], None)


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
        show_classes(axes['labels'], np.asarray(train.labels[chosen]), meta)
        class_legend(figure, meta, set(range(len(names) + 1)))
    axes['labels'].set_title('its labels', fontsize=9)
    image = false_color(train.images[chosen], meta)
    axes['image'].imshow(image, interpolation='nearest')
    axes['image'].set_title(f'tile {chosen} of tr, false colour', fontsize=9)
    for name in ('image', 'labels'):
        axes[name].set(xticks=[], yticks=[])

    # without labels the spectrum of all pixels
    nm = np.array(meta['wavelengths_nm'] or range(1, meta['num_bands'] + 1), float)
    order = np.argsort(nm)
    colors = class_colors(meta) / 255
    pixels, total = sums[:, :, order]  # (K + 1, C)
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
    labelled = [facts.counts[split][1:].sum() > facts.labels_on_missing[split]
                for split in ('tr', last)]
    if last != 'tr' and all(labelled):
        print(f'\nfloors on {last} (%): what a network must beat')
        print_scores(floors(directory, last))
        if not os.path.exists(os.path.join(directory, 'floors.json')):
            print('floors.json cannot be written there')

    path = os.path.join(directory, 'check.png')
    try:
        save_picture(path, tiles['tr'], facts.sums)
        print(f'picture: {path}')
    except Exception as error:  # all that matters has been said
        print(f'no picture: {path} could not be made ({one_line(error)})')
    sys.exit(1 if faults else 0)
