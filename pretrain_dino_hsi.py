"""Self-distillation of a spatial-spectral ViT on hyperspectral tiles: DINOv2 with two streams.

As pretrain_dino.py (DINOv2, arXiv 2304.07193), with a second stream of tokens beside the patches:
groups of neighbouring bands. After each block the streams are fused (models.SpatialSpectralViT),
and the losses are those of both streams.

A student and a teacher have the same network. Its head compares a token, of either stream, with K
learned vectors ("prototypes"), and gives a distribution over them. The student sees two large
("global") crops of a tile, most with some patches and bands masked, and small ("local") ones. The
teacher, a running average of the student, sees the two large crops whole. The student learns to
predict the teacher's distribution: of the other crop as a whole (DINO), and of each masked token
(iBOT; off in `tiny`).

What keeps all images from getting the same output ("collapse"): Sinkhorn-Knopp spreads the
teacher's targets over all prototypes, KoLeo pushes the features of different tiles apart, and no
gradient reaches the teacher. Labels are used by the probe only, a linear classifier that measures
the features now and then and trains nothing.

    python pretrain_dino_hsi.py                                     # demo data, minutes on a CPU
    python pretrain_dino_hsi.py --size=base --data=data/mine --out_dir=runs/mine        # on one GPU
    torchrun --nproc_per_node=4 pretrain_dino_hsi.py ...                                # on four

Writes into out_dir: last.pt (to resume from, and for users of the encoder), log.jsonl
and curves.png. The same command again resumes a run that was stopped.

Where to start: "one step" in the training loop, stream_loss(), get_batch(). Blocks headed `shell`
are the same in every script: skip them at first. What is in a checkpoint stands at the call of
save_checkpoint. `diff pretrain_dino.py pretrain_dino_hsi.py` shows the second stream.

Shapes: B tiles, C bands, S side of a global and s of a local crop, V views (crops) of a tile,
L local crops of a tile, N patches of a global crop, G groups of bands, M masked tokens of a
batch, T tokens of a crop, D width, K prototypes.
"""
import copy
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (Light, Statistics, Tiles, UserError, augment_spectra, crop_by, crop_weights,
                  demo_if_missing, draw_crops, draw_probe, kept_meta, lock_directory,
                  next_command, plain_errors, probe, probe_floors, probe_splits, read_flags,
                  save_figure, standardization, standardize, standardize_rows)
from models import (SIZES, DINOHead, all_rows, build_encoder, dense_features, encoder_shape,
                    native_bfloat16, parameter_groups, resume_from, save_checkpoint, start_from)

# Each line `name = value  # help` is a flag, --name=other; `a | b: ` in its help are the choices.
# ---- data
data = 'data/demo'  # tile directory; its bands are those of the encoder
img_size = 16  # side of the global crops, px
local_crops_size = 8  # side of the local crops, px
local_crops_number = 2  # local crops of a tile
global_scale_min = 0.7  # smallest global crop, share of img_size x img_size (DINOv2: 0.32)
local_scale_min = 0.3  # smallest local crop, likewise a share (0.05 in DINOv2)
local_scale_max = 0.4  # largest share: it should see less than the teacher does
whiten = 16  # components that decorrelate the bands (ZCA); 0: standardise each
blur = 0.3  # probability that a crop is blurred
gain = 0.02  # all bands times a factor of 1 +- this: illumination
offset = 0.1  # all bands plus +- this many standard deviations: haze
noise = 0.5  # largest standard deviation of white noise, on standardised values
band_dropout = 0.3  # probability that a crop lacks a run of bands; after whitening
jitter = 0.0  # of contrast and brightness; 0.4 in the dissertation
solarize = 0.0  # probability that values above the mean are mirrored; dissertation 0.2
# ---- model
size = 'tiny'  # tiny | small | base: the network, and what goes with it (PRESETS)
patch_size = 4  # side of a patch, px
ffn = 'swiglu'  # swiglu | mlp: the MLP of a block (DINOv2 has swiglu)
spectral_patch_size = 2  # bands in a spectral token; 8 or more for 200 bands
fusion = 'channel'  # channel | token: what fusion mixes (token: dissertation)
drop_path_rate = 0.1  # probability that a sample skips a residual branch
init_from = ''  # checkpoint to start from; its encoder's size is taken
# ---- method
out_dim = 256  # prototypes K; 131,072 in DINOv2, for 142 million images
ibot_weight = 0.0  # weight of the loss on masked tokens; use 1 for many different scenes
koleo_weight = 1.0  # weight of the loss that spreads cls features; 0.1 in DINOv2
spectral_weight = 0.3  # weight of all losses of the spectral stream
mask_probability = 0.8  # share of global crops the student sees masked, also without iBOT
mask_ratio_min = 0.3  # smallest share masked in such a crop
mask_ratio_max = 0.7  # largest share of patches
spectral_mask_ratio_max = 0.6  # largest share of band groups
teacher_temp = 0.05  # temperature of the teacher's targets, rising from 0.04
momentum_teacher = 0.98  # share of itself the teacher keeps, rising to 1 by a cosine
# ---- optimizer
steps = 480  # length of the run
warmup = 0.1  # share of the steps in which the learning rate rises
teacher_temp_warmup = 0.3  # share of the steps in which the temperature rises
freeze_last_layer = 0.03  # share of the steps in which the prototypes are frozen
batch_size = 16  # tiles per step, over all processes
base_lr = 1e-2  # per 1,024 tiles: lr = base_lr * sqrt(batch_size / 1024)
weight_decay = 0.04  # not on biases, norms, tokens; rising to ten times this by a cosine
# ---- run
out_dir = 'runs/dino_hsi'  # one directory a run
max_steps = 0  # stop at this step, to resume later; 0: run to the end
seed = 0  # of weights, crops, masks and order
log_every = 20  # steps between entries of the log
eval_every = 120  # steps between probes
save_every = 100  # steps between checkpoints
probe_tiles = 64  # tiles of each split that the probe looks at
dtype = 'auto'  # auto | bfloat16 | float16 | float32: auto is bfloat16 if native, else float32
compile = True  # torch.compile, on a GPU
cuda_graphs = False  # no use: masked tokens change in number
wandb_log = False  # send the log to wandb.ai as well

LARGE = dict(img_size=64, local_crops_size=32, local_crops_number=8, global_scale_min=0.4,
             local_scale_min=0.15, patch_size=8, out_dim=4096, ibot_weight=1.0,
             koleo_weight=0.02, momentum_teacher=0.992, batch_size=64, base_lr=1e-3,
             log_every=100, eval_every=2000, save_every=2000)
PRESETS = {
    'tiny': {},  # the values above
    'small': {**LARGE, 'steps': 100_000},
    'base': {**LARGE, 'steps': 482_200},  # the dissertation's: 100 epochs of WHU-OHS
}


# ============ method: student and teacher ============

class Output(NamedTuple):
    """What a network gives, of one stream"""
    cls_features: torch.Tensor  # (2B, D) cls tokens of all first global crops, then all second
    global_logits: torch.Tensor  # (2B, K) of these
    masked_logits: torch.Tensor  # (M, K) of the masked tokens
    local_logits: torch.Tensor  # (L * B, K) of the local crops' cls tokens


class Branch(nn.Module):
    """An encoder and its head: the student, and a copy of it as the teacher"""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, big, masks, masked_ids, small=None):
        """Global crops (2B, C, S, S), local (L * B, C, s, s) or None -> Output of each stream.

        masks: (2B, N) and (2B, G), True = masked, or None and None. masked_ids: numbers (M,) of
        masked tokens among all 2B * N, and among all 2B * G: only these go through the head.
        """
        spatial, spectral = self.encoder(big, *masks)
        local_spatial = local_spectral = None
        if small is not None:
            local_spatial, local_spectral = self.encoder(small)
        return [self.project(spatial, masked_ids[0], local_spatial),
                self.project(spectral, masked_ids[1], local_spectral)]

    def project(self, tokens, masked_ids, local_tokens):
        """Tokens of global crops (2B, T, D), local ones (L * B, t, D) or None -> Output"""
        cls = tokens[:, 0]
        patches = tokens[:, self.encoder.num_prefix_tokens:].flatten(0, 1)
        masked = patches.index_select(0, masked_ids)
        local = cls[:0] if local_tokens is None else local_tokens[:, 0]
        # one call of the head for all, because each call normalises the prototypes
        logits = self.head(torch.cat([cls, local, masked]))
        global_logits, local_logits, masked_logits = logits.split(
            [len(cls), len(local), len(masked)])
        return Output(cls, global_logits, masked_logits, local_logits)


class SelfDistillation(nn.Module):
    """Student and teacher. forward() is the student's, so that DDP sees its gradients."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # no drop path in what gives the targets
        return self

    def forward(self, *args):
        return self.student(*args)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """teacher = momentum * teacher + (1 - momentum) * student"""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)  # all parameters in few kernels


# ============ method: targets and losses ============

@torch.no_grad()
def sinkhorn_knopp(logits, temp, n_iterations=3):
    """Targets that use all prototypes equally often (SwAV, arXiv 2006.09882).

    logits (n, K) -> probabilities (n, K). exp(logits / temp) is scaled so that columns
    (prototypes), then rows (samples) have equal sums; in logarithms, which never overflow.
    """
    log_q = logits.float() / temp
    for _ in range(n_iterations):
        log_q -= total_logsumexp(log_q)
        log_q -= torch.logsumexp(log_q, dim=1, keepdim=True)
    return log_q.exp()


def total_logsumexp(x):
    """log sum exp over the rows of x (n, K), of all processes taken as one -> (1, K)"""
    value = torch.logsumexp(x, dim=0, keepdim=True)
    return torch.logsumexp(all_rows(value), dim=0, keepdim=True)


def stream_loss(student_out, teacher_out, mask, masked_ids, temp):
    """Output of student and teacher for one stream -> loss, its terms for the log

    mask (2B, N), masked_ids (M,): what was masked. temp: the teacher's temperature.
    """
    target = sinkhorn_knopp(teacher_out.global_logits, temp)
    terms = {'dino': dino_loss(student_out, target),
             **signs_of_collapse(student_out.cls_features, target)}
    loss = terms['dino']
    if ibot_weight:
        target = sinkhorn_knopp(teacher_out.masked_logits, temp)
        terms['ibot'] = ibot_loss(student_out, target, mask, masked_ids)
        loss = loss + ibot_weight * terms['ibot']
    if koleo_weight:
        first, second = student_out.cls_features.chunk(2)  # two crops of a tile should be near
        terms['koleo'] = koleo_loss(first) + koleo_loss(second)
        loss = loss + koleo_weight * terms['koleo']
    return loss, terms


def cross_entropy(logits, target):
    """- sum_k p_k log softmax(s / 0.1)_k of each sample, 0.1 being the student's temperature:
    logits s (..., B, K), probabilities p (B, K) -> (..., B)"""
    return -(target * F.log_softmax(logits.float() / 0.1, dim=-1)).sum(-1)


def dino_loss(student_out, target):
    """Each student crop against the teacher's view of the *other* global crop: 2 + 2L pairs.

    target (2B, K). A local crop meets both: cross-entropy is linear, so it takes their mean.
    """
    B = len(target) // 2
    L = len(student_out.local_logits) // B
    first, second = target[:B], target[B:]
    global_loss = cross_entropy(student_out.global_logits, torch.cat([second, first])).mean()
    local = student_out.local_logits.reshape(L, B, -1)
    local_loss = cross_entropy(local, (first + second) / 2).mean()
    return (global_loss + L * local_loss) / (1 + L)  # 2 and 2L pairs


def ibot_loss(student_out, target, mask, masked_ids):
    """Cross-entropy of masked tokens (arXiv 2111.07832), target (M, K): the mean over
    a crop's tokens, then over all 2B crops. A crop without a mask counts as 0."""
    per_crop = mask.sum(1, keepdim=True).expand_as(mask).flatten()
    weight = 1 / per_crop.index_select(0, masked_ids)  # (M,)
    return (cross_entropy(student_out.masked_logits, target) * weight).sum() / len(mask)


def koleo_loss(features, eps=1e-8):
    """Minus the mean log distance to the nearest neighbour (arXiv 1806.03198).

    features (B, D) are spread; neighbours are of all processes. eps: duplicates stay finite.
    """
    x = F.normalize(features.float(), dim=-1)
    if dist.is_initialized():
        everyone = list(all_rows(x.detach()).split(len(x)))
        # DDP averages gradients over processes, but KoLeo needs their sum: times their number
        everyone[dist.get_rank()] = x.detach() + len(everyone) * (x - x.detach())
        x = torch.cat(everyone)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    distance = (x - x.index_select(0, nearest)).square().sum(1).add(eps).sqrt()
    return -distance.log().mean()


@torch.no_grad()
def signs_of_collapse(cls_features, target):
    """For the log: entropy of the targets (2B, K) as a share of ln K (1: they say nothing), spread
    of features (2B, D) (0: all the same, 1: as random vectors), prototypes that are some crop's
    first choice, over the most there can be"""
    entropy = -(target * target.clamp(min=1e-30).log()).sum(1).mean()
    features = all_rows(F.normalize(cls_features.float(), dim=-1))
    first_choice = all_rows(target.argmax(1))
    K = target.shape[1]
    used = target.new_zeros(K).index_fill(0, first_choice, 1).sum()
    return {'teacher_entropy': entropy / math.log(K),
            'feature_std': features.std(0).mean() * math.sqrt(features.shape[1]),
            'prototypes_used': used / min(len(first_choice), K)}


# ============ method: crops and masks ============

def block_masks(n, h, w, rng):
    """Masks of rectangles (BEiT, arXiv 2106.08254) -> (n, h * w) bool, True = masked.

    `mask_probability` of the n crops get one, which hides mask_ratio_min to _max of its patches.
    """
    count = round(n * mask_probability)
    share = (rng.permutation(count) + rng.random(count)) / count  # evenly spread
    ratio = mask_ratio_min + (mask_ratio_max - mask_ratio_min) * share
    wanted = np.rint(ratio * h * w).clip(1)
    # each round covers a rectangle of about what is missing, in all masks at once
    covered = np.zeros((count, h, w), bool)
    missing = wanted
    while missing.any():
        area = rng.uniform(0.3, 1, count) * missing
        aspect = np.exp(rng.uniform(-1.2, 1.2, count))
        rows = random_runs(np.sqrt(area * aspect), h, rng)
        cols = random_runs(np.sqrt(area / aspect), w, rng)
        rectangles = rows[:, :, None] & cols[:, None, :]
        covered[missing > 0] |= rectangles[missing > 0]
        missing = (wanted - covered.sum((1, 2))).clip(0)
    # the last one may have covered too many: `wanted` of the covered patches stay, at random
    uncovered = 1.0 - covered.reshape(count, h * w)
    order = (uncovered + rng.random((count, h * w))).argsort(1).argsort(1)
    masks = np.zeros((n, h * w), bool)
    chosen = rng.permutation(n)[:count]
    masks[chosen] = order < wanted[:, None]
    return torch.from_numpy(masks)


def random_runs(lengths, n, rng):
    """lengths (m,) -> (m, n) bool: in each row a run of so many True, anywhere"""
    lengths = np.rint(lengths).clip(1, n)[:, None]
    start = np.floor(rng.random(lengths.shape) * (n - lengths + 1))
    place = np.arange(n)
    return (place >= start) & (place < start + lengths)


def band_masks(n, groups, rng):
    """Masks of one run of neighbouring band groups -> (n, groups) bool, True = masked.

    It hides mask_ratio_min to spectral_mask_ratio_max of the groups."""
    count = round(n * mask_probability)
    ratio = rng.uniform(mask_ratio_min, spectral_mask_ratio_max, count)
    masks = np.zeros((n, groups), bool)
    runs = random_runs(ratio * groups, groups, rng)
    masks[rng.permutation(n)[:count]] = runs
    return torch.from_numpy(masks)


class Batch(NamedTuple):
    """One rank's share of a step's batch; V = 2 + L views of each tile"""
    raw: torch.Tensor  # (B, C, S, S) windows as stored
    boxes: torch.Tensor  # (B, V, 4) the crops in each: top, left, height, width
    flips: torch.Tensor  # (B, V, 3) flip rows, flip columns, transpose
    draws: torch.Tensor  # (B, V, 13) uniform numbers: two for the blur, then the light
    mask: torch.Tensor  # (2B, N) True = masked; all first global crops, then all second
    masked_ids: torch.Tensor  # (M,) masked tokens among all 2B * N; none at ibot_weight=0
    band_mask: torch.Tensor  # (2B, G) the same of groups of bands
    masked_band_ids: torch.Tensor  # (M,)


def get_batch(tiles, step, rank=0, world=1):
    """What is cropped and masked at `step` -> Batch.

    All of it is drawn for the whole batch from (seed, step). So one process and four see
    the same crops, and a resumed run needs no generator's state.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    ids = tiles.ids_of_step(step, batch_size, img_size, seed)
    # a window of img_size, in which all crops of a tile lie
    window = draw_crops(batch_size, tiles.meta['tile_size'], img_size, 1.0, 1.0, generator)
    big = draw_crops(2 * batch_size, img_size, img_size, global_scale_min, 1.0, generator)
    small = draw_crops(local_crops_number * batch_size, img_size, img_size, local_scale_min,
                       local_scale_max, generator)
    boxes = torch.cat([crop.boxes.reshape(batch_size, -1, 4) for crop in (big, small)], dim=1)
    flips = torch.cat([crop.flips.reshape(batch_size, -1, 3) for crop in (big, small)], dim=1)
    draws = torch.rand(*boxes.shape[:2], 13, generator=generator)
    h = img_size // patch_size
    rng = np.random.default_rng([seed, step, 1])
    mask = block_masks(2 * batch_size, h, h, rng)
    groups = math.ceil(tiles.meta['num_bands'] / spectral_patch_size)
    rng = np.random.default_rng([seed, step, 2])
    band_mask = band_masks(2 * batch_size, groups, rng)

    here = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    raw, _ = tiles.batch(ids[here], window.corners[here], img_size, reuse=True)
    next_ids = tiles.ids_of_step(step + 1, batch_size, img_size, seed)
    tiles.read_ahead(next_ids[here], img_size)
    return Batch(raw, boxes[here], flips[here], draws[here], *masks_of_rank(mask, here),
                 *masks_of_rank(band_mask, here))


def masks_of_rank(mask, here):
    """Masks of all tiles (2 * batch_size, N) -> mask (2B, N) of those `here`, masked_ids (M,)

    These are found on the host, so that no GPU has to wait for their number.
    """
    mask = mask.reshape(batch_size, 2, -1)[here].transpose(0, 1).flatten(0, 1)
    masked_ids = mask.flatten().nonzero()[:, 0]
    return mask, (masked_ids if ibot_weight else masked_ids[:0])


def to_device(batch, device):
    """Batch -> the same on the device"""
    batch = Batch(*(t.to(device, non_blocking=True) for t in batch))
    # the number of masked tokens changes: torch.compile is told, or it would compile anew
    torch._dynamo.maybe_mark_dynamic(batch.masked_ids, 0)
    torch._dynamo.maybe_mark_dynamic(batch.masked_band_ids, 0)
    return batch


def make_crops(batch, statistics, nodata, step):
    """-> global crops (2B, C, S, S) and local crops (L * B, C, s, s), standardised"""
    device = batch.raw.device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    shape = (batch.raw.shape[1], 4 * img_size, img_size)
    noise_field = torch.randn(shape, generator=generator, device=device)
    light = Light(gain, offset, noise, band_dropout, jitter, solarize)
    # the last channel says which pixels are valid
    x = standardize_rows(batch.raw, statistics.mean, statistics.matrix, nodata)

    def crop(views, side):
        boxes, flips, draws = (t[:, views] for t in (batch.boxes, batch.flips, batch.draws))
        # 1 is sharp, 2 a resize filter twice as wide
        softness = torch.where(draws[..., 1] < blur, 1 + draws[..., 0], 1.0)
        rows, cols = crop_weights(boxes, flips, img_size, img_size, side, softness)
        crops = crop_by(x, rows, cols, flips[..., 2])  # (v * B, C + 1, side, side)
        draws = draws[..., 2:].transpose(0, 1).flatten(0, 1)
        return augment_spectra(crops, draws, noise_field, statistics, light)

    return crop(slice(0, 2), img_size), crop(slice(2, None), local_crops_size)


# ============ method: schedules and model ============

def cosine(step, start, end):
    """Half a cosine from `start` at step 0 to `end` after the last step"""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def learning_rate(step):
    """Linear warm-up, then half a cosine down to 0"""
    peak = base_lr * math.sqrt(batch_size / 1024)
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def teacher_temperature(step):
    """A linear rise from 0.04: targets are sharp at first"""
    rise = min(1, step / max(1, round(teacher_temp_warmup * steps)))
    return 0.04 + (teacher_temp - 0.04) * rise


def set_schedules(optimizer, step):
    """Learning rate and weight decay of each group of parameters at `step`"""
    frozen = step < round(freeze_last_layer * steps)
    for group in optimizer.param_groups:
        group['lr'] = learning_rate(step)
        if group['name'] == 'prototypes' and frozen:
            group['lr'] = 0.0
        if group['name'] != 'vectors':
            group['weight_decay'] = cosine(step, weight_decay, 10 * weight_decay)


def build_model(meta, shape={}):
    """-> student and teacher, and the arguments that build their encoder again.
    `shape`: those that weights to start from settle, see encoder_shape()."""
    hidden_dim, bottleneck_dim = (512, 64) if size == 'tiny' else (2048, 256)
    encoder_args = dict(img_size=img_size, patch_size=patch_size, in_chans=meta['num_bands'],
                        ffn=ffn, num_register_tokens=4, init_values=1.0, mask_token=True,
                        drop_path_rate=drop_path_rate, **SIZES[size])
    encoder_args.update(spectral_patch_size=spectral_patch_size, fusion=fusion,
                        wavelengths_nm=meta['wavelengths_nm'])
    encoder_args.update(shape)
    encoder = build_encoder(encoder_args)  # models.SpatialSpectralViT, by its `fusion`
    head = DINOHead(encoder.embed_dim, out_dim, hidden_dim, bottleneck_dim)
    return SelfDistillation(Branch(encoder, head)), encoder_args


def check_constants(meta):
    """Refuse constants that do not fit together, before the first step."""
    sides = local_crops_size, img_size, meta['tile_size']
    if list(sides) != sorted(sides) or any(side % patch_size for side in sides):
        raise UserError(f'--local_crops_size={sides[0]}, --img_size={sides[1]}, tiles of {sides[2]}'
                        f' px: choose multiples of --patch_size={patch_size}, in rising order')
    if img_size == patch_size:
        raise UserError(f'--img_size={img_size}: a global crop needs two patches in a row')
    if fusion == 'token' and local_crops_size * 2 != img_size:
        raise UserError('--fusion=token needs local crops of half the global ones: pass '
                        f'--local_crops_size={img_size // 2} or --fusion=channel')
    if koleo_weight and batch_size < 2:
        raise UserError('KoLeo needs two tiles in a batch: choose more, or --koleo_weight=0')
    highest = min(mask_ratio_max, spectral_mask_ratio_max)
    if local_scale_min > local_scale_max or mask_ratio_min > highest:
        raise UserError('--local_scale_min or --mask_ratio_min is above its maximum')
    if round(freeze_last_layer * steps) >= steps:
        raise UserError(f'--freeze_last_layer={freeze_last_layer}: prototypes would not learn')
    if (ibot_weight or mask_probability) and round(2 * batch_size * mask_probability) < 1:
        raise UserError(f'--mask_probability={mask_probability}: none of {2 * batch_size} crops is '
                        'masked: choose a larger one, or 0 with --ibot_weight=0')


# ============ shell: signals ============

stop_signal, stop_time = 0, 0.0


def note_signal(number, frame):
    """SIGTERM or Ctrl-C: the loop saves and exits. A second one ends the program, unless it comes
    within 5 s: then it is the first, sent on by torchrun."""
    global stop_signal, stop_time
    if not stop_signal:
        stop_signal, stop_time = number, time.time()
    elif time.time() - stop_time > 5:
        os._exit(128 + number)


# ============ what is watched ============

def save_curves(path, log):
    """Losses, signs of collapse, and the probe, over the steps"""
    figure = Figure(figsize=(12, 4), layout='constrained')
    left, middle, right = figure.subplots(1, 3)
    trained = [entry for entry in log if 'loss' in entry]
    at = [entry['step'] for entry in trained]
    for name in ('dino', 'ibot', 'dino_spectral', 'ibot_spectral'):
        if trained and name in trained[0]:
            left.plot(at, [entry[name] for entry in trained], label=name)
    left.axhline(math.log(out_dim), color='gray', linestyle=':', label='ln K: nothing learned')
    left.set(xlabel='step', ylabel='cross-entropy')
    for name, bad in {'teacher_entropy': 1, 'feature_std': 0, 'prototypes_used': 0}.items():
        line, = middle.plot(at, [entry[name] for entry in trained], label=f'{name} (bad: {bad})')
        spectral = [entry.get(f'{name}_spectral', math.nan) for entry in trained]
        middle.plot(at, spectral, '--', color=line.get_color())
    middle.set(xlabel='step', ylabel='signs of collapse (dashed: spectral)', ylim=(0, 1.05))
    left.legend(fontsize=8)
    middle.legend(fontsize=8)
    draw_probe(right, log, init_from)
    save_figure(figure, path)


if __name__ == '__main__':
    plain_errors()
    config = read_flags(globals(), PRESETS)  # the constants of this run

    # ---- shell: processes and device (torchrun sets these variables, else there is one process)
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    main_process = rank == 0
    if not main_process:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # one process speaks
    on_gpu = torch.cuda.is_available()
    device = torch.device('cpu')
    if on_gpu:
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 where something stays in float32
    if world > 1:  # a long time-out, since rank 0 alone computes floors and draws pictures
        dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=timedelta(hours=6))
    if batch_size % world:
        raise UserError(f'--batch_size={batch_size} does not divide over {world} process(es)')
    if dtype == 'auto':
        dtype = 'bfloat16' if native_bfloat16(device) else 'float32'
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != 'float32')
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note_signal)
    torch.manual_seed(seed)  # the same weights on every rank
    if main_process:
        lock = lock_directory(out_dir)  # until this process ends
        demo_if_missing(data)
    if world > 1:
        dist.barrier()

    # ---- data
    train = Tiles(data, 'tr', pin_memory=on_gpu)
    meta = train.meta
    check_constants(meta)
    mean, matrix = (t.to(device) for t in standardization(meta, whiten))
    std = torch.tensor(meta['std'], dtype=torch.float32, device=device)
    statistics = Statistics(mean, std, matrix)

    def prepare(raw):
        """Raw values, any type -> whitened or standardised (B, C, H, W) float32"""
        return standardize(raw.to(device, non_blocking=True), mean, matrix, meta['nodata'])

    # ---- shell: what was saved here before
    last_path = os.path.join(out_dir, 'last.pt')
    checkpoint = resume_from(last_path, __file__, config, meta)  # None in a new run

    # ---- model and optimizer
    shape = encoder_shape(init_from, checkpoint)
    model, encoder_args = build_model(meta, shape)
    model.to(device).train()
    if init_from and not checkpoint:
        print(start_from(init_from, model, __file__, whiten, meta))
    groups = parameter_groups(model, weight_decay)
    # any other optimizer needs fused=True as well: see "update the weights"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)

    # ---- shell: resume
    step, log = 0, []
    if checkpoint:
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        scaler.load_state_dict(checkpoint['scaler'])
        step, log = checkpoint['step'], checkpoint['log']
    last_step = min(max_steps or steps, steps)
    if main_process:
        # rewritten: the steps after the last checkpoint will run again
        log_file = open(os.path.join(out_dir, 'log.jsonl'), 'w', encoding='utf-8', buffering=1)
        log_file.writelines(json.dumps(entry) + '\n' for entry in log)
        if wandb_log:
            import wandb  # pip install wandb
            wandb.init(project='hyperspectral', name=out_dir, config=config)

    def record(entry):
        """Into the log: log.jsonl now, last.pt with the next checkpoint"""
        log.append(entry)
        if main_process:
            log_file.write(json.dumps(entry) + '\n')
            if wandb_log:
                wandb.log(entry, step=entry['step'])

    # ---- shell: what this run is
    epochs = steps * batch_size / train.windows_per_epoch(img_size)
    print(f'{sum(p.numel() for p in model.parameters()):,} parameters; '
          f'{meta["num_bands"]} bands, crops of {img_size} px, patches of {patch_size} px; '
          f'steps {step} to {last_step} of {steps} ({epochs:.1f} epochs); '
          f'{device}, {dtype}, {world} process(es); {out_dir}')

    # ---- what is watched
    if main_process:
        labelled = probe_splits(data)
        floors = probe_floors(labelled, probe_tiles, device)  # what the probe has to beat

    def features(raw):
        return dense_features(model.teacher.encoder, prepare(raw))

    def watch():
        """The teacher as it is now (it is the encoder to use): probe, curves."""
        model.eval()
        if labelled:
            with autocast:
                miou = probe(features, labelled, probe_tiles, device)
            record({'step': step, 'probe_miou': miou, **floors})
            tqdm.write(f'step {step}: probe mIoU {100 * miou:.1f} %')
        save_curves(os.path.join(out_dir, 'curves.png'), log)
        model.train()

    # ---- shell: compile and DDP
    if compile and on_gpu:  # in place: parameters keep their names
        model.compile(mode='reduce-overhead' if cuda_graphs and world == 1 else 'default')
    net = DistributedDataParallel(model) if world > 1 else model

    # ---- the teacher is compiled too
    if compile and on_gpu:
        model.teacher.compile()  # model.compile() above is of forward(), the student's

    # ---- training loop
    batch = get_batch(train, step, rank, world)
    bar = tqdm(total=last_step, initial=step, disable=not main_process)
    started = time.time() - max((entry.get('seconds', 0) for entry in log), default=0)
    if main_process and step == 0:
        watch()
    while step < last_step:
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # drop path, on each rank
        set_schedules(optimizer, step)

        # one step: two global crops of each tile and some local ones
        batch = to_device(batch, device)
        big, small = make_crops(batch, statistics, meta['nodata'], step)
        masks = batch.mask, batch.band_mask
        masked_ids = batch.masked_ids, batch.masked_band_ids
        # the teacher sees the global crops whole
        with torch.no_grad(), autocast:
            teacher_out = model.teacher(big, (None, None), masked_ids)
        # the student sees them masked, and the local crops
        with autocast:
            student_out = net(big, masks, masked_ids, small)
        # and learns to say what the teacher says
        temp = teacher_temperature(step)
        loss, terms = stream_loss(student_out[0], teacher_out[0], masks[0], masked_ids[0], temp)
        spectral_loss, spectral_terms = stream_loss(student_out[1], teacher_out[1], masks[1],
                                                    masked_ids[1], temp)
        loss = loss + spectral_weight * spectral_loss
        terms |= {f'{name}_spectral': value for name, value in spectral_terms.items()}
        scaler.scale(loss).backward()
        batch = get_batch(train, step + 1, rank, world)  # read while the GPU is still at work
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)

        # ---- shell: update the weights
        # fused AdamW skips this step where found_inf is 1: the GPU decides, the host does not wait
        optimizer.found_inf = 1.0 - torch.isfinite(norm).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # ---- method: the teacher follows the student
        model.update_teacher(cosine(step, momentum_teacher, 1.0))

        # ---- shell: stop if the gradient was not finite (here the host waits for the GPU)
        if not torch.isfinite(norm):
            # float16's scaler skips such a step and halves its scale, which is normal at first
            if not scaler.is_enabled() or not torch.isfinite(loss) or scaler.get_scale() < 1:
                raise UserError(f'step {step}: the gradient is not finite (loss {loss.item():.4g})'
                                f': look for huge values with tools/check_data.py --data={data}, '
                                'lower the learning rate, or pass --dtype=float32')
            bar.write(f'step {step}: skipped, since float16 overflowed; its scale is now '
                      f'{scaler.get_scale():g}')

        # ---- log
        step += 1
        bar.update()
        if step % log_every == 0 or step == last_step:
            means = torch.stack([loss, *terms.values()]).detach() / world
            if world > 1:
                dist.all_reduce(means)  # over the processes
            mean_loss, *means = means.tolist()
            record({'step': step, 'loss': mean_loss, 'lr': optimizer.param_groups[0]['lr'],
                    'grad_norm': norm.item(), 'seconds': time.time() - started,
                    **dict(zip(terms, means))})
            bar.set_postfix(loss=f'{mean_loss:.4f}')
            entropy, spread = log[-1]['teacher_entropy'], log[-1]['feature_std']
            entropy = max(entropy, log[-1]['teacher_entropy_spectral'])
            spread = min(spread, log[-1]['feature_std_spectral'])
            if (entropy > 0.99 or spread < 0.05) and step > warmup * steps:
                bar.write(f'step {step}: WARNING: the features are collapsing (see curves.png): '
                          'try a lower --teacher_temp or --base_lr, or more --koleo_weight')
        if main_process and (step % eval_every == 0 or step == last_step):
            watch()

        # ---- shell: save, and leave if told to (when one rank was told, all leave together)
        told = stop_signal
        if world > 1:
            told = torch.tensor(stop_signal, device=device)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        if main_process and (told or step == last_step or step % save_every == 0):
            save_checkpoint(last_path, {
                'model': model.state_dict(),  # all networks of this script
                'optimizer': optimizer.state_dict(),
                'scaler': scaler.state_dict(),  # of float16
                'step': step, 'log': log,
                'config': config,  # the constants above
                'encoder_args': encoder_args,  # for load_encoder() and load_segmenter()
                'meta': kept_meta(meta),  # statistics, wavelengths and classes of the data
                'script': os.path.basename(__file__)})
        if told:
            bar.write(f'interrupted by signal {int(told)}: saved step {step} of {steps} in '
                      f'{last_path}; the same command goes on there')
            if world > 1:
                dist.barrier()  # leave together: torchrun would end rank 0 while it saves
            sys.exit(128 + int(told))

    # ---- shell: end
    bar.close()
    if main_process:
        print(f'{step} steps in {time.time() - started:.0f} s; encoder in {last_path}; next:')
        if labelled:
            judged = os.path.normpath(out_dir) + '_judged'
            print(next_command('segment.py', encoder=last_path, out_dir=judged))
        else:
            print(next_command('viz_attention.py', encoders=last_path))
    if world > 1:
        dist.barrier()  # rank 0 may still be at its last pictures: leave together
        dist.destroy_process_group()
