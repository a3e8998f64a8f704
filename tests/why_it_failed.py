"""Why the dissertation measured 1.4 % mIoU for ten networks: python tests/why_it_failed.py runs/segment

A trained model's own predictions on its test split, scored rightly, and scored with the two faults
read in the dissertation's public evaluation code. A: the loader shuffled the tiles, so that a
prediction met the label of another one. B: training counted classes from 0, and scoring compared
them with raw labels, which count from 1 and keep 0 for "unlabelled".
"""
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import (Tiles, UserError, chance_warning, confusion_matrix, label_to_class, plain_errors,
                  predict_tile, print_scores, scores)
from models import load_segmenter


def predictions(run):
    """Run directory -> predicted classes (N, S, S) and raw labels (N, S, S) of its test split, and
    the names of the classes"""
    network = load_segmenter(os.path.join(run, 'best.pt'))
    tiles = Tiles(network.config['data'], 'ts')
    if tiles.labels is None:
        raise UserError(f'{tiles.directory}: its test split has no labels: nothing can be scored')
    names = tiles.meta['class_names']

    def probabilities(raw):
        return network(network.prepare(raw)).softmax(1)
    predicted = []
    for i in range(len(tiles)):
        raw, _ = tiles.batch([i])
        predicted.append(predict_tile(probabilities, raw, network.window, len(names)).argmax(1))
    return torch.cat(predicted), torch.from_numpy(np.array(tiles.labels)), names


def score(pred, raw, num_classes, shuffled=False, off_by_one=False):
    """Predictions 0..K-1 (N, S, S) against raw labels 0..K, 0 = unlabelled, with none, one or both
    of the faults -> scores()"""
    if shuffled:
        generator = torch.Generator().manual_seed(0)
        pred = pred[torch.randperm(len(pred), generator=generator)]
    if off_by_one:  # what is predicted as class k is compared with raw label k
        return scores(confusion_matrix(pred, raw.long(), num_classes + 1))
    return scores(confusion_matrix(pred, label_to_class(raw), num_classes))


if __name__ == '__main__':
    plain_errors()
    if len(sys.argv) != 2:
        raise UserError('pass the directory of one run of segment.py, as runs/segment')
    pred, raw, names = predictions(sys.argv[1])
    faults = {'scored rightly': {}, 'A: tiles shuffled': dict(shuffled=True),
              'B: classes off by one': dict(off_by_one=True),
              'A and B': dict(shuffled=True, off_by_one=True)}
    rows = {name: score(pred, raw, len(names), **fault) for name, fault in faults.items()}
    print_scores(rows)
    print(f'chance is {100 / len(names):.1f} % mean accuracy for {len(names)} classes')
    for name, result in rows.items():
        if chance_warning(result):
            print(f'{name}: {chance_warning(result)}')
