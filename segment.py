"""Train and score a segmentation decoder on an encoder, frozen by default: the judge of every pre-training run.

The last four blocks' maps of the encoder go through a decoder to one class per pixel. The best state on the validation split is
scored on the test split, beside the floors it must beat. Without --encoder the encoder is random: the row every table needs.
Afterwards the same script maps scenes of any size with what it learned, and prints the table of all results.

    python segment.py --encoder=runs/demo/last.pt --decoder=logistic --out_dir=runs/demo_logistic      # frozen encoder, linear decoder, solved
    python segment.py --encoder=runs/demo/last.pt --out_dir=runs/demo_linear                            # the same, trained
    python segment.py --size=tiny --out_dir=runs/demo_random                                            # a random encoder
    torchrun --nproc_per_node=4 segment.py --data=data/whu --encoder=runs/whu/last.pt --freeze=false --out_dir=runs/whu_tuned
    python segment.py --out_dir=runs/demo_logistic --predict=scene.tif --out=map.tif
    python segment.py --table
    python segment.py --compare=runs/demo_logistic,runs/demo_linear --out_dir=runs/compared

Reads a tile directory with labels (python data.py tile). Writes out_dir: best.pt, report.json, confusion.png, examples.png and, of a
decoder that is trained, last.pt, log.jsonl, curves.png; appends a row to results.csv.
"""
import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (IGNORE_INDEX, UserError, Tiles, append_row, chance_warning, class_colors, class_legend, confusion_matrix, demo_if_missing, draw_crops,
                  epoch_ids, false_color, fit_logistic, floors, label_to_class, labelled_pixels, map_scene, plain_errors, print_scores, print_table, resized_crop,
                  resized_crop_labels, save_figure, scores, show_classes, sliding_window, standardization, standardize, write_json)
from models import (SIZES, ConvHead, LinearHead, SpatialSpectralViT, TransformerHead, ViT, dense_features, encoder_bands, load_checkpoint,
                    load_encoder)

# ---- data
data = 'data/demo'  # tile directory with labels; the demo is made on first use
bands = ''  # wavelengths the run works at: nm (485:70,560 = the first 70 nm wide), ohs or landsat (six bands); '' = the data's own or the encoder's
label_share = 1.0  # share of the labelled pixels of tr and val that are used, drawn at random: 0.1, 0.01 ask how many labels it takes
crop_size = 0  # side of the training crops, px; 0 = whole tiles. Larger tiles are then scored by windows of this side, blended
augment = False  # random flips, turns and resized crops; features can then not be kept in memory
# ---- model
encoder = ''  # last.pt of a pre-training run, or a public file (MAE, DINOv2); '' = a random encoder of the constants below (the row every table needs)
by_wavelength = False  # true = a spatial-spectral encoder takes the data's own bands by their wavelengths, not resampled to its
untrained = False  # true = the architecture of that encoder with random weights: what pre-training is to be compared with
size = 'base'  # random encoder: tiny, small or base
img_size = 64  # random or public encoder: side of its window in pixels
patch_size = 8  # random or public encoder: side of a patch
whiten = 16  # random or public encoder: as in pretrain_mae.py; 0 is nearest to what a public one has seen (a run of ours brings its own)
rgb_kernels = 'wavelength'  # how a public file's 3 kernels reach our bands: wavelength (mixture of the nearest in nm), repeat (their mean) or fresh
decoder = 'linear'  # linear (batch norm, 1x1 convolution), conv (UNet-like), transformer (Segmenter), or logistic = linear, solved not trained
freeze = True  # false = fine-tune the encoder as well; with a random encoder: a ViT trained from scratch
window_stride = 0  # step of the encoder's window over larger tiles, px; 0 = half a window (a quarter takes four times as long and gains nothing)
pixel = False  # true = the pixel's own input spectrum goes into the classifier beside the features
# ---- method
loss = 'ce'  # ce = cross-entropy, focal = focal loss (arXiv 1708.02002) with gamma 2, dice = soft Dice of each image (arXiv 1606.04797, without its squares)
class_weights = 'none'  # none, or inverse / sqrt = classes weighted by 1 / (square root of) their number of training pixels (not for dice)
# ---- optimizer
steps = 1000  # optimizer steps; the dissertation stopped after 500 to 5,000
batch_size = 16  # tiles per optimizer step over all processes
grad_accum = 1  # micro-steps a batch is split into, when memory is short
lr = 0.0  # AdamW's; 0 = 1e-2 for a linear decoder on a frozen encoder, 1e-3 for all else. dissertation: 1e-4, never done in its steps
layer_decay = 0.75  # fine-tuning: learning rate of a block over that of the block above it (BEiT, MAE: 0.65 to 0.75)
power = 0.9  # of the poly schedule: lr * (1 - step / steps) ** power
weight_decay = 0.01  # none on biases, norms and tokens
clip_grad = 0.0  # largest global gradient norm; 0 = no clipping
# ---- run
out_dir = 'runs/segment'  # one directory a run
resume = True  # false = leave an existing out_dir alone and start a new one beside it
max_steps = 0  # stop after this many steps of the schedule; 0 = run to its end
seed = 0  # of the decoder's (and a random encoder's) weights, of the order of tiles and of the labels that --label_share keeps
log_every = 20  # steps
eval_every = 100  # steps between scores on the validation split
save_every = 500  # steps between checkpoints
keep_every = 0  # keep step_*.pt at multiples of this; 0 = keep last.pt and best.pt only
results = 'results.csv'  # a row is appended here
table = False  # only print that file as a table, methods side by side
compare = ''  # only draw these run directories (separated by commas) side by side into out_dir: their maps of test tiles, their curves
# ---- map: with --predict nothing is trained; the run in out_dir maps a scene
predict = ''  # a scene file of any size
out = 'map.tif'  # GeoTIFF to write: class numbers, with the scene's georeference, colours and nodata 0; names beside it in .json
probabilities = ''  # GeoTIFF for the classes' probabilities (uint8, 255 = certain) as well; '' = none
overlap = 0.5  # of the windows that are blended, as a share of their side
# ---- system
device = 'auto'  # auto = cuda if present, else cpu
dtype = 'auto'  # of the autocast: bfloat16, float16 or float32; auto = bfloat16 where the hardware multiplies it natively
compile = 'auto'  # torch.compile: true, false; auto = on CUDA only (on CPU a minute of compiling for 10 to 15 %)
cache_gb = 4.0  # features of a frozen encoder are kept in memory when they fit in this


# ---- boilerplate: overrides (the same lines in every script; tests/test_style.py checks) ----
def override_constants():
    """Set this file's constants from `--name=value`; the comment behind a constant is its --help text."""
    def boolean(text):
        return bool(('false', 'true').index(text.lower()))
    parser = argparse.ArgumentParser(description=__doc__, usage='%(prog)s [--name=value ...]', allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in re.findall(r'^(\w+) = .*?  # (.*)$', open(__file__, encoding='utf-8').read(), re.M):
        value = globals()[name]
        kind = dict(type=boolean, nargs='?', const=True) if isinstance(value, bool) else dict(type=type(value))
        parser.add_argument(f'--{name}', default=value, metavar=repr(value), help=comment.replace('%', '%%'), **kind)
    config = vars(parser.parse_args())
    globals().update(config)
    return config
# ---- end of boilerplate: overrides ----


# ---- boilerplate: helpers (the same lines in every training script) ----
FREE_TO_CHANGE = ('out_dir', 'resume', 'max_steps', 'log_every', 'eval_every', 'save_every', 'keep_every', 'device', 'compile',
                  'results', 'cache_gb')


def open_run(out_dir, config, resume):
    """Make the run directory, or check that the one there has the same constants -> its path (another one if not `resume`)."""
    if not resume:
        names = (f'{out_dir}-{n}' if n > 1 else out_dir for n in itertools.count(1))
        out_dir = next(name for name in names if not os.path.exists(name))
    path = os.path.join(out_dir, 'config.json')
    if os.path.exists(path) and any(os.path.exists(os.path.join(out_dir, name)) for name in ('last.pt', 'best.pt')):
        old = json.load(open(path, encoding='utf-8'))['config']
        changed = [f'{k} ({old.get(k)} there, {v} now)' for k, v in config.items() if old.get(k) != v and k not in FREE_TO_CHANGE]
        if changed:
            raise UserError(f'{out_dir}: holds a run with other constants: {", ".join(changed)}: pass another --out_dir, or '
                            '--resume=false to start a new run beside it')
    os.makedirs(out_dir, exist_ok=True)
    for name in os.listdir(out_dir):
        if re.fullmatch(r'\w+\.(pt|json|png|py)\.tmp', name):
            os.remove(os.path.join(out_dir, name))  # of a save that was cut off
    try:
        git = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    except OSError:
        git = ''  # not installed
    write_json(path, {'config': config, 'torch': torch.__version__, 'git': git, 'command': sys.argv})
    script = os.path.join(out_dir, os.path.basename(__file__))
    shutil.copy(__file__, script + '.tmp')
    os.replace(script + '.tmp', script)
    return out_dir


def save_checkpoint(path, content):
    """Atomic: a kill or a full disk leaves the old file as it was."""
    try:
        with open(path + '.tmp', 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:
        raise UserError(f'{path}: could not be written ({" ".join(str(error).split())[:120]}): make room and run the same command '
                        'again; the checkpoint before is as it was') from None


def read_log(path, before_step):
    """Lines of log.jsonl up to `before_step`; what a killed run logged after its last checkpoint is dropped."""
    if not os.path.exists(path):
        return []
    lines = []
    for line in open(path, encoding='utf-8'):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # half a line at the end
    return [entry for entry in lines if entry['step'] <= before_step]


def append_line(path, entry):
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(entry) + '\n')


def cosine(step, total, warmup, peak, end):
    """Linear warm-up from 0 to `peak` over `warmup` steps, then half a cosine down to `end` at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model, weight_decay, layer_decay=1.0, patch_embed_lr=1.0):
    """Weight decay on matrices only: not on biases, norms, tokens and positions. A group's learning rate is to be multiplied by its
    `lr_scale`: layer_decay ** (blocks above it), times `patch_embed_lr` for the patch embedding (Clark et al. 2020; DINOv2)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 1 + max((int(number) for name, _ in named for number in re.findall(r'encoder\.blocks\.(\d+)\.', name)), default=-1)
    groups = {}
    for name, p in named:
        block = re.search(r'encoder\..*(?:blocks|fuse\.\w+)\.(\d+)\.', name)
        first = re.search(r'encoder\.\w*(embed|token)', name)  # patch embedding, tokens and positions come before block 0
        scale = layer_decay ** (depth - int(block[1]) if block else depth + 1 if first else 0)
        scale *= patch_embed_lr if 'patch_embed' in name or 'spectral_embed' in name else 1
        decay = 0.0 if p.ndim == 1 or name.endswith(('_token', '_tokens', 'pos_embed')) else weight_decay
        last_layer = 'last_layer' in name  # DINO holds it still for its first epoch
        group = groups.setdefault((decay, scale, last_layer), {'params': [], 'weight_decay': decay, 'lr_scale': scale, 'last_layer': last_layer})
        group['params'].append(p)
    return list(groups.values())


def native_bfloat16(device):
    """Does the hardware multiply bfloat16 itself? A CPU that must emulate it is up to 80 times slower than in float32."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, name, bool)() for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'))
# ---- end of boilerplate: helpers ----


# ============ method: encoder, decoder, loss ============

class Segmenter(nn.Module):
    """Encoder and decoder in one module. A frozen encoder stays in eval mode and gets no gradient."""

    def __init__(self, encoder, head, freeze, window_stride, pixel_head=None):
        super().__init__()
        self.encoder, self.head, self.pixel_head = encoder, head, pixel_head
        self.freeze, self.window_stride = freeze, window_stride
        for parameter in encoder.parameters():
            parameter.requires_grad_(parameter.requires_grad and not freeze)  # a fixed position table stays fixed

    def train(self, mode=True):
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
            self.head.norm.eval()  # its statistics are those of the whole training split (see calibrate_norm)
        return self

    def features(self, x):
        """x (B, C, H, W) -> maps (B, 4*D, h, w)"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return dense_features(self.encoder, x, stride=self.window_stride)

    def forward(self, x, maps=None):
        """x (B, C, H, W), maps of features() if known -> logits (B, K, H, W)"""
        logits = self.head(self.features(x) if maps is None else maps, x.shape[-2:])
        return logits if self.pixel_head is None else logits + self.pixel_head(x)


def build_segmenter(vit, num_classes, decoder, freeze, window_stride, pixel):
    """Encoder -> Segmenter with a decoder of that name"""
    if len(vit.blocks) < 4:
        raise UserError(f'an encoder of {len(vit.blocks)} blocks: decoders read the maps of the last four: give a deeper one')
    heads = {'linear': LinearHead, 'logistic': LinearHead, 'conv': functools.partial(ConvHead, patch_size=vit.patch_size),
             'transformer': functools.partial(TransformerHead, num_heads=vit.blocks[0].attn.num_heads)}  # 12 heads at ViT-B
    head = heads[decoder](4 * vit.embed_dim, num_classes)
    return Segmenter(vit, head, freeze, window_stride, nn.Conv2d(vit.in_chans, num_classes, 1) if pixel else None)


class FrozenFeatures:
    """Feature maps of a frozen encoder for the tiles of one split: computed when first asked for, then kept in memory."""

    def __init__(self, model, tiles, prepare, autocast):
        self.model, self.tiles, self.prepare, self.autocast, self.kept = model, tiles, prepare, autocast, {}

    def __call__(self, ids):
        """tile numbers (B,) -> maps (B, 4*D, h, w)"""
        for i in ids:
            if int(i) not in self.kept:
                x = self.prepare(self.tiles.batch([int(i)])[0])
                with torch.no_grad(), self.autocast():
                    self.kept[int(i)] = self.model.features(x)[0].float()
        return torch.stack([self.kept[int(i)] for i in ids])


def calibrate_norm(norm, batches):
    """Set a BatchNorm2d's statistics to those of all feature maps (B, D, h, w) in `batches`: then it needs no batch statistics and
    training is the same on 1 and on N processes."""
    count = total = square = 0
    for maps in batches:
        maps = maps.double()
        count += maps.numel() / maps.shape[1]
        total, square = total + maps.sum((0, 2, 3)), square + maps.square().sum((0, 2, 3))
    norm.running_mean.copy_(total / count)
    norm.running_var.copy_((square / count - (total / count).square()).clamp(min=1e-12))


@torch.no_grad()
def predict_tile(model, images, prepare, autocast, window, K):
    """One raw tile (1, C, H, W) -> probabilities (1, K, H, W); of a tile larger than `window` by blended windows of that side."""
    def probabilities(raw):  # (B, C, h, w) -> (B, K, h, w)
        x = prepare(raw)
        with autocast():
            return model(x).float().softmax(1)
    if window >= images.shape[-1]:
        return probabilities(images)
    strips = sliding_window(probabilities, images[0].numpy(), window, window // 2, K)
    return torch.from_numpy(np.concatenate([strip for _, strip in strips], axis=1))[None]


@torch.no_grad()
def evaluate(model, tiles, prepare, autocast, device, rank, world, window, frozen=None):
    """Every tile once, dealt out over the ranks -> (K, K) confusion matrix, summed over the ranks. Counted as it is predicted:
    a prediction never leaves the side of its label. `frozen` holds feature maps where they are known."""
    model.eval()
    K = tiles.meta['num_classes']
    cm = torch.zeros(K, K, dtype=torch.int64, device=device)

    for i in range(rank, len(tiles), world):
        images, labels = tiles.batch([i])
        if frozen:
            with autocast():
                pred = model(prepare(images), frozen([i])).argmax(1)
        else:
            pred = predict_tile(model, images, prepare, autocast, window, K).argmax(1).to(device)
        cm += confusion_matrix(pred, label_to_class(labels).to(device), K)
    if world > 1:
        dist.all_reduce(cm)
    model.train()
    return cm.cpu()


def segmentation_loss(logits, target, weight, kind):
    """logits (B, K, H, W), target (B, H, W) classes or 255 = ignored, weight (K,) -> sum of the losses of pixels ('dice': of images).

    A sum, not a mean: with sparse labels a mean of means is far from the mean (the caller divides by loss_count() over all ranks).
    ce: -log p, with p the probability of the right class; focal: -(1 - p)^2 log p.
    dice: 1 - mean over the image's classes of 2 sum(p t) / (sum(p) + sum(t)), sums over its known pixels, t = 1 at the class's.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    known = target != IGNORE_INDEX
    safe = target.where(known, 0)
    if kind == 'dice':
        p = log_p.exp() * known[:, None]
        t = F.one_hot(safe, logits.shape[1]).movedim(-1, 1) * known[:, None]
        both, size = (p * t).sum((2, 3)), t.sum((2, 3))  # (B, K)
        dice = 2 * both / (p.sum((2, 3)) + size).clamp(min=1e-6)
        present = size > 0
        loss = 1 - (dice * present).sum(1) / present.sum(1).clamp(min=1)
        return loss[present.any(1)].sum()
    pixel_loss = F.nll_loss(log_p, target, weight, ignore_index=IGNORE_INDEX, reduction='none')
    if kind == 'focal':
        pixel_loss = pixel_loss * (1 - log_p.gather(1, safe[:, None])[:, 0].exp()).square()
    return pixel_loss[known].sum()


def loss_count(target, weight, kind):
    """What segmentation_loss is to be divided by: the weights of the known pixels, or for dice the number of images that have some"""
    known = target != IGNORE_INDEX
    return known.flatten(1).any(1).sum().float() if kind == 'dice' else weight[target[known]].sum()


def get_batch(train, labelled, step, *, rank, world, batch_size, crop_size, augment, seed):
    """This rank's share of the global batch of `step` -> tile numbers, images, labels, boxes, turns (see pretrain_mae.get_batch)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    corners, side, boxes, turned = draw_crops(batch_size, train.meta['tile_size'], crop_size, 0.4 if augment else 1.0, 1.0, generator, augment)
    if not augment:
        corners, side = corners + boxes[:, :2], crop_size  # just the box
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    ids = torch.from_numpy(labelled[epoch_ids(len(labelled), batch_size, step, seed)[mine]])
    images, labels = train.batch(ids, corners[mine], side)
    return ids, images, labels, boxes[mine], turned[mine]


def save_pictures(out_dir, cm, predict_one, tiles, meta, log):
    """confusion.png, examples.png (false colour, labels, prediction of up to four test tiles) and curves.png."""
    names, K = meta['class_names'], meta['num_classes']
    side = min(0.4 * K, 6)
    figure = Figure(figsize=(3 + side, 2.5 + side), layout='constrained')
    axis = figure.subplots()
    share = cm.double() / cm.sum(1, keepdim=True).clamp(min=1)
    axis.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for i in range(K):
        for j in range(K):
            if share[i, j] >= 0.005:
                axis.text(j, i, f'{100 * share[i, j]:.0f}', ha='center', va='center', fontsize=8 if K <= 16 else 6, color='white' if share[i, j] > 0.6 else 'black')
    axis.set(xticks=range(K), yticks=range(K), xlabel='predicted', ylabel='true', title='test pixels of a class, %')
    axis.set_xticklabels(names, rotation=60, ha='right', fontsize=8)
    axis.set_yticklabels([f'{name} ({int(n)})' for name, n in zip(names, cm.sum(1))], fontsize=8)
    save_figure(figure, os.path.join(out_dir, 'confusion.png'))

    most_labels = np.argsort([-np.count_nonzero(tiles.labels[i]) for i in range(min(len(tiles), 500))], kind='stable')[:4]
    figure = Figure(figsize=(7.5, 2.4 * len(most_labels) + 0.8), layout='constrained')
    axes, present = figure.subplots(len(most_labels), 3, squeeze=False), set()
    for row, i in zip(axes, most_labels):
        images, labels = tiles.batch([i])
        pred = predict_one(images).argmax(1)[0].cpu().numpy() + 1
        row[0].imshow(false_color(images[0], meta), interpolation='nearest')
        show_classes(row[1], labels[0].numpy(), names)
        show_classes(row[2], pred, names)
        row[0].set_ylabel(f'tile {i}, {pred.shape[0]} px')
        present |= {*labels.unique().tolist(), *pred.flat}
    for axis, title in zip(axes[0], ('false colour', 'test labels', 'prediction')):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    class_legend(figure, names, present)
    save_figure(figure, os.path.join(out_dir, 'examples.png'))

    if log:  # a solved decoder has no curves
        figure = Figure(figsize=(9, 3.2), layout='constrained')
        for axis, key, scale, label in zip(figure.subplots(1, 2), ('loss', 'val_miou'), (1, 100), ('training loss', 'mIoU on val, %')):
            axis.plot([e['step'] for e in log if key in e], [scale * e[key] for e in log if key in e], 'o-' if key == 'val_miou' else '-')
            axis.set(xlabel='step', ylabel=label)
        save_figure(figure, os.path.join(out_dir, 'curves.png'))


def trained_segmenter(path):
    """best.pt of a run -> the Segmenter in eval mode, the checkpoint"""
    checkpoint = load_checkpoint(path)
    if checkpoint.get('script') != 'segment.py' or 'meta' not in checkpoint:
        raise UserError(f'{path}: holds no segmentation of this script: pass --out_dir=, the directory of a run of segment.py')
    args, c = checkpoint['encoder_args'], checkpoint['config']
    vit = (SpatialSpectralViT if 'fusion' in args else ViT)(**args)
    model = build_segmenter(vit, checkpoint['meta']['num_classes'], c['decoder'], c['freeze'], c['window_stride'], c['pixel'])
    model.load_state_dict(checkpoint['model'], strict=True)
    return model.eval(), checkpoint


def saved_classifier(model, checkpoint, meta):
    """trained_segmenter() on the data of `meta` -> a function: one raw tile (1, C, S, S) -> classes (1, S, S), predicted as they are scored, in float32"""
    mean, matrix = standardization(meta, checkpoint['whiten'], checkpoint['config'].get('components'))
    prepare = functools.partial(standardize, mean=mean, matrix=matrix, nodata=meta['nodata'])
    return lambda raw: predict_tile(model, raw, prepare, contextlib.nullcontext, checkpoint['window'], meta['num_classes']).argmax(1)


def save_comparison(out_dir, runs):
    """comparison.png: false colour, labels and each run's prediction of up to three test tiles (runs of this script on one data set);
    comparison_curves.png: the score on val over the steps, for runs of every script (the linear probe's for pre-training)."""
    os.makedirs(out_dir, exist_ok=True)
    figure = Figure(figsize=(8, 3.8), layout='constrained')
    axis, markers, lines = figure.subplots(), itertools.cycle('os^Dv*'), itertools.cycle(('-', '--', '-.', ':'))
    axis.set_prop_cycle(color=[color / 255 for color in class_colors(['run'] * 8)[[5, 6, 3, 7, 1, 2, 8]]])  # told apart by colour-blind eyes
    for run in runs:
        if not os.path.exists(os.path.join(run, 'log.jsonl')):
            raise UserError(f'{run}: holds no log.jsonl: give directories of runs, separated by commas')
        log = read_log(os.path.join(run, 'log.jsonl'), math.inf)
        scored = [(e['step'], 100 * e.get('val_miou', e.get('probe_miou', 0))) for e in log if 'val_miou' in e or 'probe_miou' in e]
        if scored:  # a solved decoder has no curve
            axis.plot(*zip(*scored), marker=next(markers), linestyle=next(lines), markersize=5, label=os.path.basename(os.path.normpath(run)))
    axis.set(xlabel='step', ylabel='mIoU on val (of the probe, while pre-training), %')
    if axis.lines:
        axis.legend(fontsize=8)
    save_figure(figure, os.path.join(out_dir, 'comparison_curves.png'))

    judged = [run for run in runs if os.path.exists(os.path.join(run, 'best.pt')) and os.path.exists(os.path.join(run, 'segment.py'))]
    if not judged:
        return
    models = [trained_segmenter(os.path.join(run, 'best.pt')) for run in judged]
    if len({checkpoint['config']['data'] for _, checkpoint in models}) > 1:
        raise UserError(f'--compare={",".join(judged)}: these runs are on different data sets: their maps cannot stand side by side')
    tiles = Tiles(models[0][1]['config']['data'], 'ts')
    names, present = tiles.meta['class_names'], set()
    shown = np.argsort([-np.count_nonzero(tiles.labels[i]) for i in range(min(len(tiles), 500))], kind='stable')[:3]
    side = min(9 / (2 + len(models)), 2.5)
    figure = Figure(figsize=(9, (side + 0.1) * len(shown) + 1.3), layout='constrained')
    axes = figure.subplots(len(shown), 2 + len(models), squeeze=False)
    for row, i in zip(axes, shown):
        tiles.use_bands('')
        images, labels = (part.clone() for part in tiles.batch([i]))
        row[0].imshow(false_color(images[0], tiles.meta), interpolation='nearest')
        show_classes(row[1], labels[0].numpy(), names)
        row[0].set_ylabel(f'tile {i}, {labels.shape[1]} px', fontsize=8)
        present |= set(labels.unique().tolist())
        for axis, (model, checkpoint) in zip(row[2:], models):
            tiles.use_bands(checkpoint['config'].get('bands', ''))
            pred = saved_classifier(model, checkpoint, tiles.meta)(tiles.batch([i])[0])[0] + 1
            show_classes(axis, pred.numpy(), names)
            present |= set(pred.unique().tolist())
    mious = [json.load(open(os.path.join(run, 'report.json'), encoding='utf-8'))['scores']['miou'] for run in judged]
    titles = [f'{textwrap.fill(os.path.basename(os.path.normpath(run)), 18)}\nmIoU {100 * miou:.1f}' for run, miou in zip(judged, mious)]
    for axis, title in zip(axes[0], ['false colour', 'test labels', *titles]):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    class_legend(figure, names, present)
    save_figure(figure, os.path.join(out_dir, 'comparison.png'))


if __name__ == '__main__':
    plain_errors()
    config = override_constants()
    if table:
        print_table(results)
        sys.exit()
    if compare:
        save_comparison(out_dir, compare.split(','))
        print(f'{out_dir}: comparison.png, comparison_curves.png')
        sys.exit()
    if predict:
        model, checkpoint = trained_segmenter(os.path.join(out_dir, 'best.pt'))

        # ---- boilerplate: map a scene (the same lines in segment.py and baseline_deeplab.py)
        device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device)
        model.to(device)
        mean, matrix = (t.to(device) for t in standardization(checkpoint['meta'], checkpoint['whiten'], checkpoint['config'].get('components')))
        autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype in ('auto', 'bfloat16') and native_bfloat16(device))

        @torch.no_grad()
        def classify(raw):
            with autocast():
                return model(standardize(raw.to(device), mean, matrix)).float().softmax(1)
        map_scene(classify, predict, checkpoint['meta'], checkpoint['window'], overlap, out, probabilities)
        sys.exit()
        # ---- end of boilerplate: map a scene
    if os.path.isfile(encoder):
        config['encoder_crc32'] = zlib.crc32(open(encoder, 'rb').read())  # a run on another state of the encoder is another run

    # ---- boilerplate: distributed setup
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
    device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device)
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', device.index or 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in float32
    if world > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=6))  # rank 0 alone makes pictures and floors
    if min(batch_size, grad_accum, log_every, save_every) < 1:
        raise UserError('--batch_size, --grad_accum, --log_every and --save_every start at 1')
    if batch_size % (world * grad_accum):
        raise UserError(f'--batch_size={batch_size} does not divide over {world} processes x --grad_accum={grad_accum}: change one')
    if dtype == 'auto':
        dtype = 'bfloat16' if native_bfloat16(device) else 'float32'
    if dtype not in ('bfloat16', 'float16', 'float32'):
        raise UserError(f'--dtype={dtype}: choose auto, bfloat16, float16 or float32')
    if compile.lower() not in ('auto', 'true', 'false'):
        raise UserError(f'--compile={compile}: choose auto, true or false')
    compile = {'auto': device.type == 'cuda', 'true': True, 'false': False}[compile.lower()]
    autocast = functools.partial(torch.autocast, device.type, getattr(torch, dtype), enabled=dtype != 'float32')
    torch.manual_seed(seed)  # the same weights on every rank
    print0 = print if rank == 0 else lambda *args, **kwargs: None
    if rank == 0:
        out_dir = open_run(out_dir, config, resume)
    if world > 1:
        paths = [out_dir]
        dist.broadcast_object_list(paths)
        out_dir = paths[0]
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))  # a note: the loop saves and leaves
    # ---- end of boilerplate: distributed setup

    # ---- boilerplate: segmentation data (the same lines in segment.py and baseline_deeplab.py)
    if rank == 0:
        demo_if_missing(data)
    if world > 1:
        dist.barrier()
    if not 0 < label_share <= 1:
        raise UserError(f'--label_share={label_share}: a share of the labelled pixels lies between 0 and 1')
    few = dict(label_share=label_share, seed=seed)
    splits = {split: Tiles(data, split, device.type == 'cuda', bands=bands, **(few if split != 'ts' else {})) for split in ('tr', 'val', 'ts')}
    meta = splits['tr'].meta
    if splits['tr'].labels is None:
        raise UserError(f'{data}: has no labels, and a segmentation needs them: tile scenes that have some')
    labelled = np.array([i for i in range(len(splits['tr'])) if splits['tr'].labels[i].any()])
    if not len(labelled):
        raise UserError(f'{data}: no pixel of its training tiles has a label: tile scenes that have some')
    tile_size = meta['tile_size']
    crop_size = min(crop_size or tile_size, tile_size)
    # ---- end of boilerplate: segmentation data

    # ---- model
    for name, value, known in (('size', size, SIZES), ('decoder', decoder, ('linear', 'conv', 'transformer', 'logistic')), ('loss', loss, ('ce', 'focal', 'dice')),
                               ('class_weights', class_weights, ('none', 'inverse', 'sqrt'))):
        if value not in known:
            raise UserError(f'--{name}={value}: choose one of {", ".join(known)}')
    if encoder:
        vit = load_encoder(encoder, img_size, patch_size, meta['num_bands'], meta['wavelengths_nm'], rgb_kernels, whiten)
        if by_wavelength:
            if not isinstance(vit, SpatialSpectralViT) or not meta['wavelengths_nm']:
                raise UserError(f'--by_wavelength: {encoder} is no spatial-spectral encoder, or {data} has no wavelengths: leave it out')
            vit = vit.at_wavelengths(meta['wavelengths_nm'])  # and in the table under a name of its own
        whiten, encoder_args = vit.config['whiten'], vit.args
        method = {'pretrain_mae.py': 'MAE', 'pretrain_dino.py': 'DINOv2', 'pretrain_dino_hsi.py': 'HSI-DINOv2'}.get(vit.script, vit.script)
        method += ' by wavelength' * by_wavelength
        bands = config['bands'] = encoder_bands(vit, meta, encoder) or bands
        for tiles in splits.values():
            tiles.use_bands(bands)
        if splits['tr'].weights is not None:
            print0(f'{data}: its {len(splits["tr"].weights.T)} bands are resampled to the {len(splits["tr"].weights)} of the encoder')
        meta, config['components'] = splits['tr'].meta, vit.config.get('components')  # for mapping a scene
        if untrained:
            vit, method = type(vit)(**encoder_args).eval(), f'{method} untrained'
    else:
        encoder_args = dict(img_size=img_size, patch_size=patch_size, in_chans=meta['num_bands'], fixed_positions=True, **SIZES[size])
        vit, method = ViT(**encoder_args), 'random ViT' if freeze else 'ViT from scratch'
    if crop_size % vit.patch_size or tile_size % vit.patch_size:
        raise UserError(f'tiles of {tile_size} px and crops of {crop_size} px do not divide into patches of {vit.patch_size}: tile again with a '
                        'multiple, or pass another --crop_size')
    if decoder == 'logistic' and (not freeze or augment or loss != 'ce' or class_weights != 'none'):
        raise UserError('--decoder=logistic: a solved classifier takes a frozen encoder, cross-entropy and no --augment or --class_weights: '
                        'choose --decoder=linear for those')
    if untrained and not encoder:
        raise UserError('--untrained: random weights for the architecture of which encoder? pass --encoder=, or leave --untrained out')
    model = build_segmenter(vit, meta['num_classes'], decoder, freeze, window_stride, pixel).to(device).train()
    if world > 1 and device.type == 'cuda' and not freeze:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # it has no CPU form; frozen encoders do without (calibrate_norm)
    mean, matrix = (t.to(device) for t in standardization(meta, whiten, config.get('components')))
    print0(f'{method} encoder {encoder}, {sum(p.numel() for p in vit.parameters()):,} parameters, '
           f'{"frozen" if freeze else "trained"}; {decoder} decoder, {sum(p.numel() for p in model.head.parameters()):,}; '
           f'{len(labelled)} labelled training tiles of {tile_size} px, crops of {crop_size} px; {device}, {dtype}, {world} process(es); {out_dir}')

    prepare = lambda images: standardize(images.to(device), mean, matrix, meta['nodata'])
    if not freeze:  # what takes no part in features (mask tokens, the last spectral fusion) would make DDP wait for its gradient
        model.eval()(prepare(splits['tr'].batch([0])[0])[..., :crop_size, :crop_size]).sum().backward()
        for parameter in model.train().parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
    feature_bytes = 4 * (len(labelled) + len(splits['val'])) * 4 * vit.embed_dim * (tile_size // vit.patch_size) ** 2
    fits = freeze and not augment and crop_size == tile_size and feature_bytes < cache_gb * 1e9
    frozen = {split: FrozenFeatures(model, splits[split], prepare, autocast) if fits else None for split in ('tr', 'val')}
    if freeze and decoder != 'logistic':  # that one standardises its features itself
        some = labelled[np.linspace(0, len(labelled) - 1, min(len(labelled), 2000)).astype(int)]
        calibrate_norm(model.head.norm, ((frozen['tr'] or FrozenFeatures(model, splits['tr'], prepare, autocast))([i]) for i in some))

    if decoder == 'logistic':  # a convex problem: solved to the end as the floors are, where the best step of a few hundred would rank decoders
        @torch.no_grad()
        def inputs(raw):  # what is linear in the logits: features, and with --pixel the spectrum beside them
            x = prepare(raw)
            with autocast():
                maps = model.head.norm(model.features(x).float())
            return maps if not pixel else torch.cat([F.interpolate(maps, size=x.shape[-2:], mode='bilinear'), x], dim=1)
        x, y, _ = labelled_pixels(splits['tr'], inputs, 50_000, device=device)
        print0(f'solved on {len(y):,} labelled pixels of the training tiles (drawn when there are more than 50,000; the floors take 30,000)')
        solved = fit_logistic(x, y, meta['num_classes'])
        if stop:
            print0(f'interrupted by signal {stop[0]}: nothing was saved, the same command starts again')
            sys.exit(128 + stop[0])
        for layer, weights in zip((model.head.classifier, model.pixel_head), solved[:-1].T[..., None, None].split(4 * vit.embed_dim, dim=1)):
            layer.weight.data.copy_(weights)
            layer.bias.data.copy_(solved[-1] * (layer is model.head.classifier))
        steps = 0

    # ---- boilerplate: segmentation setup (the same lines in segment.py and baseline_deeplab.py)
    counts = torch.tensor(meta['class_counts']['tr'], dtype=torch.float32, device=device).clamp(min=1)
    weight = {'none': torch.ones_like(counts), 'inverse': 1 / counts, 'sqrt': 1 / counts.sqrt()}[class_weights]
    weight = weight / weight.mean()
    total_steps = steps
    last_step = min(max_steps or total_steps, total_steps)
    kept_meta = {key: meta[key] for key in ('num_bands', 'num_classes', 'class_names', 'wavelengths_nm', 'nodata', 'mean', 'std', 'covariance',
                                            'tile_size', 'dtype')}
    about = {'config': config, 'encoder_args': encoder_args, 'whiten': whiten, 'window': crop_size, 'meta': kept_meta,
             'script': os.path.basename(__file__)}  # what mapping a scene needs beside the weights
    # ---- end of boilerplate: segmentation setup

    # ---- optimizer
    lr = lr or (1e-2 if freeze and decoder == 'linear' else 1e-3)
    layer_decay = layer_decay if encoder and not untrained else 1.0  # what was not pre-trained learns at one rate
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay, layer_decay), lr=lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')

    # ---- boilerplate: resume
    step, last_path = 0, os.path.join(out_dir, 'last.pt')
    if os.path.exists(last_path):
        checkpoint = load_checkpoint(last_path)
        model.load_state_dict(checkpoint['model'], strict=True)
        optimizer.load_state_dict(checkpoint['optimizer'])
        scaler.load_state_dict(checkpoint['scaler'])
        step = checkpoint['step']
        print0(f'{last_path}: going on at step {step} of {total_steps}')
    log_path, first_step, started = os.path.join(out_dir, 'log.jsonl'), step, time.time()
    log = read_log(log_path, step)
    if rank == 0:
        with open(log_path, 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(entry) + '\n' for entry in log)
    # ---- end of boilerplate: resume

    # ---- boilerplate: compile and DDP
    net = model
    if compile:
        model.compile()  # in place: names in the checkpoint stay plain
    if world > 1:
        net = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)
    # ---- end of boilerplate: compile and DDP

    # ---- training loop
    draw = functools.partial(get_batch, splits['tr'], labelled, rank=rank, world=world, batch_size=batch_size, crop_size=crop_size,
                             augment=augment, seed=seed)
    batch = draw(step)
    best = max((e['val_miou'] for e in log if 'val_miou' in e), default=-1.0)
    best_path = os.path.join(out_dir, 'best.pt')
    bar = tqdm(total=last_step, initial=step, disable=rank > 0, unit='step', dynamic_ncols=True)
    if decoder == 'logistic' and rank == 0:
        save_checkpoint(best_path, {'model': model.state_dict(), 'step': 0, **about})
    while step < last_step:
        # ---- boilerplate: seed this step
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # dropout differs between ranks, never between resumed runs
        # ---- end of boilerplate: seed this step
        for group in optimizer.param_groups:
            group['lr'] = lr * (1 - step / total_steps) ** power * group['lr_scale']

        # ---- method: forward, loss, backward
        ids, images, labels, boxes, turned = batch
        target = label_to_class(labels.to(device, non_blocking=True))
        if augment:
            target = resized_crop_labels(target, boxes, turned, crop_size)
        count = loss_count(target, weight, loss)
        if world > 1:
            dist.all_reduce(count)
        count = count.clamp(min=1e-12) / world  # DDP takes the mean of the ranks' gradients
        total_loss, extras = torch.zeros((), device=device), {}
        for start in range(0, len(ids), len(ids) // grad_accum):
            micro = slice(start, start + len(ids) // grad_accum)
            x = prepare(images[micro])
            if augment:
                x = resized_crop(x, boxes[micro], turned[micro], crop_size)
            maps = frozen['tr'](ids[micro]) if fits else None
            with autocast():
                logits = net(x, maps)
            loss_sum = segmentation_loss(logits, target[micro], weight, loss)
            scaler.scale(loss_sum / count).backward()
            total_loss += loss_sum.detach() / count
        batch = draw(step + 1)  # while a GPU is still at work

        # ---- boilerplate: clip and finite check
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)  # the same on all ranks after all-reduce
        if not torch.isfinite(norm) and dtype != 'float16':  # the scaler of float16 skips such steps and lowers its scale
            raise UserError(f'step {step}: the gradient is not finite (loss {float(total_loss):.4g}): the weights were left as they '
                            f'were and {last_path} is of an earlier step. Look for NaN or huge values in the data (python data.py '
                            f'check --data={data}), or lower the learning rate')
        # ---- end of boilerplate: clip and finite check
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        bar.update()

        # ---- boilerplate: log
        if step % log_every == 0 or step == last_step:
            if world > 1:
                dist.all_reduce(total_loss, op=dist.ReduceOp.SUM)
                total_loss /= world
            entry = {'step': step, 'loss': float(total_loss), 'lr': max(group['lr'] for group in optimizer.param_groups), 'grad_norm': float(norm),
                     **{name: float(value) for name, value in extras.items()}, 'seconds': time.time() - started}
            log.append(entry)
            if rank == 0:
                append_line(log_path, entry)
            bar.set_postfix(loss=f'{entry["loss"]:.4f}', tiles_per_s=round(batch_size * (step - first_step) / entry['seconds']))
        # ---- end of boilerplate: log

        # ---- evaluate on val, keep the best
        if (eval_every and step % eval_every == 0) or step == last_step:
            val = scores(evaluate(model, splits['val'], prepare, autocast, device, rank, world, crop_size, frozen['val']))
            log.append({'step': step, 'val_miou': val['miou'], 'val_oa': val['oa']})
            if rank == 0:
                append_line(log_path, log[-1])
                if val['miou'] > best:
                    save_checkpoint(best_path, {'model': model.state_dict(), 'step': step, 'val_miou': val['miou'], **about})
            best = max(best, val['miou'])

        # ---- boilerplate: checkpoint, stop
        flag = torch.tensor(stop[0] if stop else 0, device=device)
        if world > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # one rank was told: all leave together
        if rank == 0 and (flag or step == last_step or step % save_every == 0):
            content = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(), 'step': step,
                       'config': config, 'encoder_args': encoder_args, 'script': os.path.basename(__file__)}
            save_checkpoint(last_path, content)
            if keep_every and step % keep_every == 0:
                save_checkpoint(os.path.join(out_dir, f'step_{step}.pt'), content)
        if flag:
            print0(f'\ninterrupted by signal {int(flag)}: saved step {step} of {total_steps} in {last_path}; the same command goes on there')
            sys.exit(128 + int(flag))
        # ---- end of boilerplate: checkpoint, stop

    columns = {'data': data, 'bands': bands, 'method': method, 'decoder': decoder, 'freeze': freeze, 'encoder': encoder or f'{size}/{patch_size}', 'whiten': whiten,
               'pixel': pixel, 'window_stride': window_stride, 'loss': loss}

    # ---- boilerplate: score the best state on the test split (the same lines in segment.py and baseline_deeplab.py)
    bar.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # what was trained is saved: from here on a signal ends the script at once
    if world > 1:
        dist.barrier()
    chosen = load_checkpoint(best_path)
    model.load_state_dict(chosen['model'], strict=True)
    cm = evaluate(model, splits['ts'], prepare, autocast, device, rank, world, crop_size)
    if rank == 0:
        result = scores(cm)
        floor = floors(data, 'ts', label_share, seed, bands)
        rows = {**floor, f'{method} + {decoder}': result}
        print(f'\ntest split of {data} (%), best state on val: step {chosen["step"]}; split: {meta["split"]}')
        print_scores(rows)
        for name, iou, n in zip(meta['class_names'], result['iou'], cm.sum(1).tolist()):
            print(f'  IoU {"absent" if iou is None else f"{100 * iou:6.1f}"}  {name} ({n} px)')
        warning = chance_warning(result)
        if warning:
            print(warning)
        write_json(os.path.join(out_dir, 'report.json'), {
            'split': 'ts', 'how_split': meta['split'], 'scores': result, 'floors': floor, 'class_names': meta['class_names'],
            'confusion_matrix': cm.tolist(), 'best_step': chosen['step'], 'warning': warning, 'config': config, 'torch': torch.__version__,
            'seconds': time.time() - started})
        predict_one = functools.partial(predict_tile, model.eval(), prepare=prepare, autocast=autocast, window=crop_size, K=meta['num_classes'])
        save_pictures(out_dir, cm, predict_one, splits['ts'], meta, log)
        append_row(results, {**columns, 'label_share': label_share, 'seed': seed, 'crop_size': crop_size, 'augment': augment,
                             'class_weights': class_weights, 'lr': lr, 'steps': step, 'best_step': chosen['step'],
                             **{k: round(result[k], 5) for k in ('oa', 'mean_acc', 'miou', 'miou_all', 'kappa', 'mean_f1')},
                             'pixel_floor': round(rows['pixel']['miou'], 5), 'window_floor': round(rows['window']['miou'], 5), 'out_dir': out_dir})
    if world > 1:
        dist.barrier()  # rank 0 may still be at its last pictures: leave together
        dist.destroy_process_group()
    # ---- end of boilerplate: score the best state on the test split
