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
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import (SPLITS, Tiles, class_colors, class_legend, false_color, floors, plain_errors,
                  print_scores, read_meta, save_figure, show_classes)
from scenes import one_line, valid_pixels


class Facts(NamedTuple):
    counts: dict  # split -> (256,) pixels of each label
    sums: np.ndarray  # (3, K + 1, C) of tr, by label: pixels, their values, values squared
    grey_levels: list  # (C,) different values of each band in the first tiles
    same_within: int  # tiles that repeat one of their own split
    same_across: int  # tiles that repeat one of another split
    shared_labels: int  # pixels labelled in both


def read_facts(tiles):
    """tiles: dict split -> Tiles. Looks at every tile once."""
    meta = tiles['tr'].meta
    counts = {split: np.zeros(256, np.int64) for split in tiles}
    sums = np.zeros((3, meta['num_classes'] + 1, meta['num_bands']))
    first_seen = {}  # fingerprint of an image -> split and labels of the first tile that has it
    same_within = same_across = shared_labels = 0
    for split in tiles:
        for i in tqdm(range(len(tiles[split])), desc=f'reading {split}', leave=False):
            image = np.asarray(tiles[split].images[i])
            labels = np.zeros(image.shape[1:], np.uint8)
            if tiles[split].labels is not None:
                labels = np.asarray(tiles[split].labels[i])
            counts[split] += np.bincount(labels.ravel(), minlength=256)

            # is there another tile of the same image?
            fingerprint = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            first_split, first_labels = first_seen.setdefault(fingerprint, (split, labels))
            if first_split != split:
                same_across += 1
                shared_labels += int(((labels > 0) & (first_labels > 0)).sum())
            elif first_labels is not labels:
                same_within += 1

            # the spectra of the classes
            if split == 'tr':
                valid = valid_pixels(image, meta['nodata'])
                for k in np.unique(labels[valid]):
                    if k <= meta['num_classes']:
                        x = image[:, valid & (labels == k)].astype(np.float64)  # (C, n)
                        sums[:, k] += [np.full(len(x), x.shape[1]), x.sum(1), (x ** 2).sum(1)]
    first_tiles = tiles['tr'].images[:16]
    grey_levels = [len(np.unique(first_tiles[:, band])) for band in range(meta['num_bands'])]
    return Facts(counts, sums, grey_levels, same_within, same_across, shared_labels)


def print_facts(facts, meta, directory):
    number_of_tiles = {split: len(meta['tiles'][split]) for split in facts.counts}
    print(f'{directory}: {meta["num_bands"]} bands of {meta["dtype"]}, tiles of '
          f'{meta["tile_size"]} px; split: {meta["split"]}')
    print(f'tiles {number_of_tiles}; nodata {100 * meta["nodata_share"]:.1f} % of the pixels')
    print(f'effective grey levels per band (first tiles): {min(facts.grey_levels)} to '
          f'{max(facts.grey_levels)}')
    print(f'identical tiles within a split {facts.same_within}, across splits {facts.same_across}')
    print(f'{"class":28s}' + ''.join(f'{split:>12s}' for split in facts.counts))
    for k, name in enumerate(meta['class_names'], 1):
        pixels = ''.join(f'{count[k]:12d}' for count in facts.counts.values())
        print(f'{k:3d} {name[:24]:24s}{pixels}')


def find_faults(facts, meta):
    """-> a sentence for each fault: what, and what to do"""
    faults = []
    K = meta['num_classes']
    for k, name in enumerate(meta['class_names'], 1):
        if facts.counts['tr'][k] == 0 and any(count[k] for count in facts.counts.values()):
            faults.append(f'class {k} ({name}) has labels but none in tr: tile with another --seed '
                          'or a smaller --split_block')
    for split, count in facts.counts.items():
        if count[K + 1:].any():
            faults.append(f'{split}: label values above {K} (up to {np.flatnonzero(count)[-1]}): '
                          'repair the labels and tile again')
    flat = [band for band, std in enumerate(meta['std'], 1) if not std > 0]
    if flat:
        faults.append(f'{len(flat)} bands have one value only (counted from 1: {flat[:8]}): leave '
                      'them out of the scene')
    if min(facts.grey_levels) < 16:
        faults.append(f'a band has only {min(facts.grey_levels)} grey levels: the scene was '
                      'quantised; use the sensor\'s own values')
    if facts.shared_labels:
        faults.append(f'{facts.shared_labels} pixels are labelled in two splits (identical tiles): '
                      'remove the duplicates from tr')
    return faults


# ============ the picture ============

def save_picture(path, train, sums):
    """A training tile of many classes and its labels; below, the spectrum of each class"""
    meta, names = train.meta, train.meta['class_names']
    classes = [k for k in range(1, len(names) + 1) if sums[0, k, 0] > 1]
    rows = math.ceil(max(len(classes), 1) / 6)
    heights = (3 + 0.2 * math.ceil(len(names) / 4), 0.5 + 1.2 * rows)
    figure = Figure(figsize=(9, sum(heights)), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    draw_spectra(below, rows, classes or [0], sums, meta)  # without labels: of all pixels

    chosen = 0
    if train.labels is not None:
        richness = [len(np.unique(x)) + (x > 0).mean() for x in train.labels[:500]]
        chosen = int(np.argmax(richness))
    left, right = above.subplots(1, 2)
    left.imshow(false_color(train.images[chosen], meta), interpolation='nearest')
    left.set_title(f'tile {chosen} of tr, {meta["tile_size"]} px, false colour', fontsize=9)
    left.set(xticks=[], yticks=[])
    if train.labels is None:
        right.axis('off')
    else:
        show_classes(right, np.asarray(train.labels[chosen]), names)
        right.set_title('its labels', fontsize=9)
        right.set(xticks=[], yticks=[])
        class_legend(above, names, set(range(len(names) + 1)))
    save_figure(figure, path)


def draw_spectra(figure, rows, classes, sums, meta):
    """Mean spectrum and deviation of each class, the means of the others in gray"""
    nm = np.array(meta['wavelengths_nm'] or range(1, meta['num_bands'] + 1), float)
    order = np.argsort(nm)
    nm = nm[order]
    count, total, squares = sums[:, :, order]
    mean = total / count.clip(1)
    std = np.sqrt((squares / count.clip(1) - mean ** 2).clip(0))
    colors = class_colors(meta['class_names']) / 255
    axes = figure.subplots(rows, min(len(classes), 6), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(classes):]:
        axis.axis('off')
    for axis, k in zip(axes.flat, classes):
        axis.plot(nm, mean[classes].T, color='0.8', linewidth=0.5, zorder=0)
        axis.fill_between(nm, mean[k] - std[k], mean[k] + std[k], color=colors[k], alpha=0.6)
        axis.plot(nm, mean[k], color='black', linewidth=1)
        title = f'{k} {meta["class_names"][k - 1]}' if k else 'all pixels'
        axis.set_title(textwrap.fill(title, 22), fontsize=7)
        axis.tick_params(labelsize=7)
    figure.supxlabel('wavelength, nm' if meta['wavelengths_nm'] else 'band', fontsize=8)
    figure.supylabel('stored value, mean ± std', fontsize=8)


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
    faults = find_faults(facts, meta)
    for fault in faults:
        print(f'{directory}: {fault}', file=sys.stderr)
    if not faults:
        print('nothing wrong found')

    # what a network must beat on the last split that is there
    last = list(tiles)[-1]
    if last != 'tr' and facts.counts['tr'][1:].any() and facts.counts[last][1:].any():
        print(f'\nfloors on {last} (%): what a network must beat')
        print_scores(floors(directory, last))

    path = os.path.join(directory, 'check.png')
    try:
        save_picture(path, tiles['tr'], facts.sums)
        print(f'picture: {path}')
    except OSError as error:
        print(f'no picture: {path} cannot be written ({one_line(error)})')
    sys.exit(1 if faults else 0)
