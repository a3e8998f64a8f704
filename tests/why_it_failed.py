"""Why the dissertation measured 1.4 % mIoU for ten networks: python tests/why_it_failed.py runs/demo_logistic

A trained model's own predictions on its test split, scored rightly, and scored with the two faults read in the dissertation's public
evaluation code: (A) the loader shuffled the tiles, so that a prediction met the label of another one; (B) training counted classes from
0, scoring compared them with raw labels, which count from 1 and keep 0 for "unlabelled".
"""
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import Tiles, UserError, chance_warning, confusion_matrix, label_to_class, plain_errors, print_scores, scores
from segment import saved_classifier, trained_segmenter


def predictions(run):
    """run directory -> predicted classes (N, S, S) and raw labels (N, S, S) of its test split, class names"""
    model, checkpoint = trained_segmenter(os.path.join(run, 'best.pt'))
    tiles = Tiles(checkpoint['config']['data'], 'ts', bands=checkpoint['config'].get('bands', ''))
    if tiles.labels is None:
        raise UserError(f'{tiles.directory}: its test split has no labels: nothing can be scored')
    classify = saved_classifier(model, checkpoint, tiles.meta)
    pred = torch.cat([classify(tiles.batch([i])[0]) for i in range(len(tiles))])
    return pred, torch.from_numpy(np.array(tiles.labels)), tiles.meta['class_names']


def score(pred, raw, num_classes, shuffled=False, off_by_one=False):
    """Predictions 0..K-1 (N, S, S) against raw labels 0..K, 0 = unlabelled, with none, one or both of the faults -> scores()"""
    if shuffled:
        pred = pred[torch.randperm(len(pred), generator=torch.Generator().manual_seed(0))]
    if not off_by_one:
        return scores(confusion_matrix(pred, label_to_class(raw), num_classes))
    return scores(confusion_matrix(pred, raw.long(), num_classes + 1))  # what is predicted as class k is compared with raw label k


if __name__ == '__main__':
    plain_errors()
    if len(sys.argv) != 2:
        raise UserError('pass the directory of one run of segment.py, as runs/demo_logistic')
    pred, raw, names = predictions(sys.argv[1])
    rows = {'scored rightly': score(pred, raw, len(names)), 'A: tiles shuffled': score(pred, raw, len(names), shuffled=True),
            'B: classes off by one': score(pred, raw, len(names), off_by_one=True),
            'A and B': score(pred, raw, len(names), shuffled=True, off_by_one=True)}
    print_scores(rows)
    print(f'chance is {100 / len(names):.1f} % mean accuracy for {len(names)} classes')
    for name, result in rows.items():
        if chance_warning(result):
            print(f'{name}: {chance_warning(result)}')
