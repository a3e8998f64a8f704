"""Runs side by side: a table over seeds, curves on one axis, maps of the same tiles.

    python tools/compare.py runs/mae_seg runs/dino_seg_0 runs/dino_seg_1 --out_dir=runs/compared

A row of the table is a method: mean and standard deviation (n - 1) over its seeds. Runs are one
method when they differ only in --seed, --out_dir and the number of the seed in the paths of data
and encoder (data/ip_0, data/ip_1). Methods of one name are told apart by the flags that differ.
Refuses runs whose tiles or encoder were made anew in between, and two runs of one method and seed.
Writes out_dir: curves.png (mIoU over the steps, of pre-training runs the probe's) and
comparison.png (a map of each method on up to three test tiles of the first run's data).
"""
import argparse
import json
import os
import re
import sys
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import (Tiles, UserError, most_labelled, plain_errors, predict_tile, read_json,
                  save_figure, save_maps)
from models import MAY_CHANGE, load_segmenter

# flags that do not make a method; data sets and label shares have tables of their own
NOT_THE_METHOD = {*MAY_CHANGE, 'seed', 'encoder_crc32', 'label_share'}
NOT_THE_METHOD -= {'encoder', 'max_steps', 'eval_every'}  # they may change the scores

# what is read here of the report.json of segment.py and baseline_deeplab.py
REPORT = {'name', 'config', 'scores', 'floors', 'warning', 'class_names', 'how_split',
          'confusion_matrix'}
CONFIG = {'data', 'seed', 'label_share'}


class Run(NamedTuple):
    path: str  # the run directory
    log: list  # dicts of log.jsonl
    report: dict  # report.json: name, config, scores, floors; {} of a pre-training run
    config: dict  # the flags of a run with a report


def read_run(path):
    path = os.path.normpath(path)
    log_path = os.path.join(path, 'log.jsonl')
    report_path = os.path.join(path, 'report.json')
    log, report = [], {}
    if os.path.exists(log_path):
        with open(log_path, encoding='utf-8') as file:
            log = [json.loads(line) for line in file if line.endswith('\n')]  # half a line waits
    if os.path.exists(report_path):
        report = read_report(report_path)
    elif not log:
        raise UserError(f'{path}: holds no report.json and no log.jsonl: give directories of runs')
    config = report.get('config', {})
    for name in ('data', 'encoder'):
        if config.get(name):
            config[name] = os.path.normpath(config[name])
    return Run(path, log, report, config)


def read_report(path):
    try:
        report = read_json(path)
    except ValueError:  # no JSON
        report = None
    known = isinstance(report, dict) and REPORT <= report.keys()
    if not known or not CONFIG <= report['config'].keys():
        raise UserError(f'{path}: is no report of segment.py or baseline_deeplab.py: give '
                        'directories of their runs')
    return report


# ============ the table ============

def without_seed(path, seed):
    """'runs/mae_3/last.pt' of seed 3 -> 'runs/mae/last.pt'"""
    return re.sub(rf'_{seed}(?=[/\\]|$)', '', path)


def data_of(run, runs):
    """Its data: data/ip_0 judged with seed 0 only is seed 0 of data/ip; with more seeds, itself"""
    data, name = run.config['data'], run.report['name']
    seeds = {other.config['seed'] for other in runs
             if other.config['data'] == data and other.report['name'] == name}
    return data if len(seeds) > 1 else without_seed(data, run.config['seed'])


def method_of(run, runs):
    """-> what makes its method: its name, and flags as pairs (flag, value)"""
    flags = {name: str(value) for name, value in run.config.items()
             if name not in NOT_THE_METHOD}

    # runs/mae_0 that is judged with seed 0 only is seed 0 of runs/mae; with more seeds, itself
    encoder = flags.get('encoder')
    seeds = {other.config['seed'] for other in runs
             if other.config.get('encoder') == encoder
             and data_of(other, runs) == data_of(run, runs)}
    if encoder and len(seeds) == 1:
        flags['encoder'] = without_seed(encoder, run.config['seed'])
    return run.report['name'], *flags.items()


def contents_of(run):
    """What the paths held that a run names -> dict path -> dict name of a fact -> its value"""
    report, config = run.report, run.config
    # the test labels: all of them are scored, whatever the seed and the label share
    counts = [sum(row) for row in report['confusion_matrix']]
    tiles = {'class_names': report['class_names'], 'how_split': report['how_split'],
             'test labels of each class': counts}
    contents = {config['data']: tiles}
    if config.get('encoder_crc32'):  # 0 of a random encoder
        contents[config['encoder']] = {'encoder_crc32': config['encoder_crc32']}
    return contents


def check_contents(runs):
    """Refuses runs that name one tile directory, or one encoder, that was made anew in between"""
    first = {}  # path -> the first run that names it, and what it held then
    for run in runs:
        for path, facts in contents_of(run).items():
            other, before = first.setdefault(path, (run, facts))
            differ = [fact for fact in facts if facts[fact] != before[fact]]
            if differ:
                raise UserError(f'{other.path} and {run.path}: {path} changed between them '
                                f'({", ".join(differ)}): judge both again on what is there now, '
                                'or compare them apart')


def group_runs(runs):
    """-> dict (data, label share) -> dict method -> dict seed -> run. Refuses a second run of one
    method and seed: neither may be dropped in silence."""
    check_contents(runs)
    tables = {}
    for run in runs:
        table = tables.setdefault((data_of(run, runs), run.config['label_share']), {})
        seeds = table.setdefault(method_of(run, runs), {})
        other = seeds.setdefault(run.config['seed'], run)
        if os.path.realpath(other.path) != os.path.realpath(run.path):
            differ = [flag for flag, value in run.config.items()
                      if other.config.get(flag) != value]
            raise UserError(f'{other.path} and {run.path}: are the same method and seed (what '
                            f'differs: {", ".join(differ) or "nothing"}): give one of them')
    return tables


def row_name(method, methods):
    """Its name, and the flags in which it differs from other methods of this name"""
    name, *flags = method
    alike = [dict(other[1:]) for other in methods if other[0] == name]
    differ = [f'{flag}={value}' for flag, value in flags
              if any(other.get(flag) != value for other in alike)]
    return ' '.join([name, *differ])


def print_table(data, label_share, table):
    rows = {row_name(method, table): [run.report['scores'] for run in seeds.values()]
            for method, seeds in table.items()}
    best_first = sorted(rows, key=lambda name: -np.mean([score['miou'] for score in rows[name]]))
    rows = {name: rows[name] for name in best_first}
    # floors go with the data, and with the seed where it draws the labels
    floors = {}
    for seeds in table.values():
        for run in seeds.values():
            seed = run.config['seed'] if label_share < 1 else ''
            floors[run.config['data'], seed] = run.report['floors']
    for floor in ('window', 'pixel'):
        rows[f'{floor} floor'] = [scores[floor] for scores in floors.values()]

    columns = {'OA': 'oa', 'mean acc': 'mean_acc', 'mIoU': 'miou', 'mIoU all': 'miou_all'}
    width = max(map(len, rows))
    print(f'\n{data}, {100 * label_share:g} % of the labels')
    print(' ' * width + ''.join(f'{title:>13s}' for title in columns) + '  seeds')
    for name, scores in rows.items():
        line = f'{name:{width}s}'
        for key in columns.values():
            values = np.array([100 * score[key] for score in scores])
            deviation = f'{values.std(ddof=1):4.1f}' if len(values) > 1 else '   -'
            line += f'{values.mean():6.1f} ± {deviation}'
        print(f'{line}{len(scores):7d}')


# ============ the pictures ============

def save_curves(path, runs):
    """mIoU on val over the steps: of the decoder, or of the probe while pre-training"""
    figure = Figure(figsize=(8, 3.8), layout='constrained')
    axis = figure.subplots()
    for run in runs:
        scored = [entry for entry in run.log if 'val_miou' in entry or 'probe_miou' in entry]
        if scored:  # a solved decoder has no curve
            miou = [100 * entry.get('val_miou', entry.get('probe_miou')) for entry in scored]
            steps = [entry['step'] for entry in scored]
            axis.plot(steps, miou, 'o-', label=os.path.basename(run.path))
    axis.set(xlabel='step', ylabel='mIoU on val (of the probe, while pre-training), %')
    if axis.lines:
        axis.legend(fontsize=8)
    save_figure(figure, path)


def compare_maps(path, runs):
    """Labels and each run's map of up to three test tiles of their data set"""
    tiles = Tiles(runs[0].config['data'], 'ts')
    ids = most_labelled(tiles, 3)
    columns = [('test labels', [np.asarray(tiles.labels[i]) for i in ids])]
    for run in runs:
        network = load_segmenter(os.path.join(run.path, 'best.pt'))
        if any(network.meta[name] != tiles.meta[name] for name in ('class_names', 'num_bands')):
            print(f'{run.path}: not drawn, since {tiles.directory} has other classes or bands now '
                  'than it was judged on')
            continue

        def predict(raw):
            return network(network.prepare(raw)).softmax(1)
        K = network.meta['num_classes']
        maps = [predict_tile(predict, tiles.batch([i])[0], network.window, K) for i in ids]
        title = textwrap.fill(os.path.basename(run.path), 14)
        title += f'\nmIoU {100 * run.report["scores"]["miou"]:.1f}'
        columns.append((title, [one.argmax(1)[0].numpy() + 1 for one in maps]))
    save_maps(path, tiles, ids, columns)


if __name__ == '__main__':
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', help='run directories')
    parser.add_argument('--out_dir', default='runs/compared', help='where the pictures go')
    flags = parser.parse_args()
    runs = [read_run(path) for path in flags.runs]
    judged = [run for run in runs if run.report]

    for (data, label_share), table in group_runs(judged).items():
        print_table(data, label_share, table)
    for run in judged:
        if run.report['warning']:
            print(f'{run.path}: {run.report["warning"]}')

    os.makedirs(flags.out_dir, exist_ok=True)
    save_curves(os.path.join(flags.out_dir, 'curves.png'), runs)
    side_by_side = {}  # one run of each method, on the data of the first
    for run in judged:
        if run.config['data'] == judged[0].config['data']:
            method = run.config['label_share'], method_of(run, judged)
            side_by_side.setdefault(method, run)
    if side_by_side:
        compare_maps(os.path.join(flags.out_dir, 'comparison.png'), list(side_by_side.values()))
    print(f'pictures: {flags.out_dir}')
