"""Self-distillation of a spatial-spectral Vision Transformer on hyperspectral tiles: DINOv2 (arXiv 2304.07193) with two streams.

As pretrain_dino.py, with a second stream of tokens, groups of neighbouring bands, beside the patches, fused after each block. The
student learns to say what the teacher says of the whole image and of what was masked, in both streams: patches, and runs of bands.
`diff pretrain_dino.py pretrain_dino_hsi.py` shows what that takes.

    python pretrain_dino_hsi.py --size=tiny                          # demo data, made on first use
    python pretrain_dino_hsi.py --data=data/whu                      # the dissertation's sizes (ViT-B/8, 64 px, batch 64), on one GPU
    torchrun --nproc_per_node=4 pretrain_dino_hsi.py --data=data/whu

Reads a tile directory (python data.py tile). Writes out_dir: last.pt, log.jsonl, curves.png, features.png, config.json and a copy
of this file. The same command again goes on exactly where the last one stopped. Results and times: README.md.

Shapes in comments: B tiles, L local crops of each, C bands, S and s px the sides of global and local crops, T and t their tokens, N patches
of a global crop, G groups of neighbouring bands, M masked tokens of the batch, D width, K prototypes.
"""
import argparse
import copy
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
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (FLOORS, UserError, Tiles, augment_spectra, crop_by, crop_weights, demo_if_missing, draw_crops, epoch_ids, false_color,
                  labelled_pixels, open_sources, pick_source, plain_errors, principal_colors, ridge_probe, save_figure, spectrum_features, standardization, standardize,
                  standardize_rows, write_json)
from models import SIZES, DINOHead, SpatialSpectralViT, dense_features, load_checkpoint, public_shape, start_from

# ---- data
data = 'data/demo'  # tile directory; the demo is made on first use. a,b,c = of several sensors, drawn by size; a is probed and shown
bands = ''  # wavelengths the run works at: nm (485:70,560 = the first 70 nm wide), ohs or landsat (six bands); '' = the data's own
img_size = 64  # side of the global crops in pixels; tiles may be larger, then windows of this side move
local_crops_size = 32  # side of the local crops
whiten = 16  # ZCA of this many leading components (or of all bands, if fewer); 0 = each band to mean 0, std 1 (dissertation)
global_crops_scale_min = 0.4  # share of the window in a global crop: 0.32 to 1 in DINOv2
global_crops_scale_max = 1.0  # 1 = up to the whole window
local_crops_scale_min = 0.15  # share of the window in a local crop. dissertation: 0.05, which is 14 px blown up to 32
local_crops_scale_max = 0.4  # the local crop should see clearly less than the teacher does
local_crops_number = 8  # local crops a tile
turns = True  # random flips and quarter turns: seen from above there is no up. dissertation: flips only
blur = 0.3  # probability that a crop is blurred (the resize filter is up to twice as wide). dissertation: always
gain = 0.02  # all bands times 1 +- this: illumination
offset = 0.1  # all bands plus +- this many standard deviations: path radiance
tilt = 0.0  # slope over the wavelengths of +- this: haze; whitening magnifies it, so keep it below 0.01
noise = 0.5  # largest standard deviation of white noise on standardised values
band_dropout = 0.3  # probability that a run of neighbouring bands (up to a third) is removed from a crop
jitter = 0.0  # of contrast and brightness, on standardised values. dissertation: meant to be 0.4, never ran
solarize = 0.0  # probability that values above the mean are mirrored. dissertation: 0.2
# ---- model
size = 'base'  # tiny (width 128, depth 6), small (384, 12) or base (768, 12)
patch_size = 8  # 8 for 64 px (the dissertation); 2 to 4 for small scenes, at (8 / patch)^2 times the tokens
num_register_tokens = 4  # extra tokens that take up global information (arXiv 2309.16588)
ffn = 'swiglu'  # mlp or swiglu (DINOv2). dissertation: mlp here, by its count of parameters
spectral_patch_size = 2  # neighbouring bands in a spectral token; 8 or more for 200 bands
fusion = 'channel'  # channel (any crop size) or token (dissertation; crops of img_size and half of that only): see models.py
wavelength_encoding = True  # spectral tokens know their wavelength (or band number, where there are none)
init_values = 1.0  # LayerScale at the start; DINOv2's 1e-5 is for 1,000 times more steps: at 0.1 the probe did not rise here (docs/log.md)
drop_path_rate = 0.1  # probability that a residual branch skips a sample; at most 0.1 on small data, 0.3 in DINOv2 ViT-L
init_from = ''  # last.pt of a run to start from, e.g. with a larger --img_size (DINOv2's last stage); or a public ViT, whose shape is then taken
rgb_kernels = 'wavelength'  # how a public file's 3 kernels reach our bands: wavelength (mixture of the nearest in nm), repeat (their mean) or fresh
# ---- method
out_dim = 4096  # prototypes: 65,536 (dissertation) suit 100 million images; Sinkhorn spreads a batch of 128 evenly over them
separate_heads = False  # true = heads of their own for DINO and iBOT (DINOv2); one shared head (iBOT, dissertation) costs less
dino_weight = 1.0  # of the loss on cls tokens
ibot_weight = 1.0  # of the loss on masked patches
koleo_weight = 0.02  # of the loss that spreads cls features over the sphere; 0.1 in DINOv2, where every image is another place
mask_probability = 0.8  # share of the global crops that are masked; 0.5 in DINOv2
mask_ratio_min = 0.3  # smallest share of masked patches; 0.1 in DINOv2, whose patches hold more
mask_ratio_max = 0.7  # largest share of masked patches; 0.5 in DINOv2
spectral_weight = 0.3  # of all losses on the spectral stream, added to those on the spatial stream; at 1 the probe fell (docs/log.md)
spectral_mask_ratio_min = 0.3  # smallest share of masked band groups: one run of neighbours, single bands are too easily guessed
spectral_mask_ratio_max = 0.6  # largest share of masked band groups; masked with the same probability, drawn on its own
centering = 'sinkhorn'  # sinkhorn (Sinkhorn-Knopp, as SwAV) or softmax (subtract a running mean, DINO): either prevents collapse
center_momentum = 0.9  # of that running mean
warmup_teacher_temp = 0.04  # the teacher's softmax temperature at the start: the smaller, the more one-hot its targets
teacher_temp = 0.05  # after the warm-up; 0.07 in DINO, and above is unstable
warmup_teacher_temp_epochs = 30.0  # epochs of that warm-up: 30 of 100 in DINO
momentum_teacher = 0.992  # the teacher keeps this share of itself each step, rising to 1 by a cosine; .9995 for very long runs
# ---- optimizer
epochs = 100  # an epoch is one window for every img_size x img_size pixels stored
warmup_epochs = 10.0  # linear warm-up of the learning rate
batch_size = 64  # tiles per optimizer step over all processes
grad_accum = 1  # micro-steps a batch is split into, when memory is short; KoLeo then looks for neighbours in a micro-batch
base_lr = 1e-3  # per 1,024 tiles: lr = base_lr * sqrt(batch_size / 1024) (DINOv2: 4e-3). dissertation: 2.5e-5 in all
min_lr = 1e-6  # where the cosine ends
weight_decay = 0.04  # at the start; none on biases, norms and tokens
weight_decay_end = 0.4  # at the end (cosine); --weight_decay=0 stays 0
beta2 = 0.999  # AdamW's second beta
clip_grad = 3.0  # largest global gradient norm; 0 = no clipping
layer_decay = 1.0  # learning rate of a block over that of the block above it; 0.9 in DINOv2, 1 suits short runs
patch_embed_lr = 1.0  # factor on the learning rate of the patch embedding; 0.2 in DINOv2, 1 suits short runs
freeze_last_layer_epochs = 1.0  # the prototypes stand still for this long: early gradients would scatter them
# ---- run
out_dir = 'runs/dino_hsi'  # one directory a run
resume = True  # false = leave an existing out_dir alone and start a new one beside it
max_steps = 0  # stop after this many steps of the schedule; 0 = run to its end
seed = 0  # of weights, crops, masks and order
log_every = 20  # steps
eval_every = 500  # steps between linear probes and pictures; 0 = only at step 0 and at the end
probe_tiles = 64  # tiles used by the probe in each split
save_every = 500  # steps between checkpoints
keep_every = 0  # keep step_*.pt at multiples of this; 0 = keep last.pt only
# ---- system
device = 'auto'  # auto = cuda if present, else cpu
dtype = 'auto'  # of the autocast: bfloat16, float16 or float32; auto = bfloat16 where the hardware multiplies it natively
compile = 'auto'  # torch.compile: true, false; auto = on CUDA only (on CPU a minute of compiling for 10 to 15 %)


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


# ============ method: student and teacher ============

class Branch(nn.Module):
    """An encoder and its head: the student, and a copy of it as the teacher."""

    def __init__(self, encoder, head, patch_head=None):
        super().__init__()
        self.encoder, self.head, self.patch_head = encoder, head, patch_head

    def project(self, tokens, rows, local_tokens=None):
        """Tokens of one stream, of the global crops (2B, T, D) and of the local ones (L * B, t, D), rows (M,) -> cls (2B, D), its logits (2B, K),
        those of the masked tokens (M, K) and of the local crops' cls (L * B, K). One pass through the head: prototypes are normalised once."""
        cls = tokens[:, 0]
        masked = tokens[:, self.encoder.num_prefix_tokens:].flatten(0, 1).index_select(0, rows)  # (M, D)
        crops = cls if local_tokens is None else torch.cat([cls, local_tokens[:, 0]])  # (2B + L * B, D)
        if self.patch_head is not None:
            logits, patch_logits = self.head(crops), self.patch_head(masked)
        else:
            logits, patch_logits = self.head(torch.cat([crops, masked])).split([len(crops), len(masked)])
        return cls, logits[:len(cls)], patch_logits, logits[len(cls):]

    def forward(self, big, masks, rows, small=None):
        """Global crops (2B, C, S, S); for the spatial and the spectral stream mask (2B, N) True = masked, rows (M,) numbers of the masked tokens
        among all 2B * N; local crops (L * B, C, s, s) or None -> for each stream what project() gives: only those tokens go through the head"""
        tokens, local_tokens = self.encoder(big, *masks), (None, None) if small is None else self.encoder(small)
        return [self.project(*stream) for stream in zip(tokens, rows, local_tokens)]


class SelfDistillation(nn.Module):
    """Student and teacher. The forward pass is the student's, so that DDP sees its gradients; the teacher gets none."""

    def __init__(self, student, out_dim):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer('cls_center', torch.zeros(2, out_dim))  # of softmax centring, one for each stream
        self.register_buffer('patch_center', torch.zeros(2, out_dim))

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # no drop path in what gives the targets
        return self

    def forward(self, big, masks, rows, small):
        """What the student says, see Branch"""
        return self.student(big, masks, rows, small)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """teacher = momentum * teacher + (1 - momentum) * student, over all parameters at once"""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


# ============ method: targets and losses ============

# Copied from pretrain_dino.py
def total_logsumexp(x):
    """log sum exp over the rows (B) of x (B, K) on all processes together -> (1, K)"""
    value = torch.logsumexp(x, dim=0, keepdim=True)
    if dist.is_initialized():
        highest = value.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        share = (value - highest).exp()
        dist.all_reduce(share)
        value = highest + share.log()
    return value


# Copied from pretrain_dino.py
@torch.no_grad()
def sinkhorn_knopp(logits, temp, n_iterations=3):
    """Targets whose prototypes are used equally often (Cuturi 2013; SwAV, arXiv 2006.09882).

    logits (B, K), B counted over all processes -> probs (B, K). exp(logits / temp) is scaled so that its columns (prototypes) and then its
    rows (samples) have equal sums, n_iterations times; rows end with a sum of 1. In logarithms and float32: nothing over- or underflows.
    """
    log_q = logits.float() / temp
    for _ in range(n_iterations):
        log_q = log_q - total_logsumexp(log_q)
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)
    return log_q.exp()


# Copied from pretrain_dino.py
@torch.no_grad()
def teacher_probs(logits, temp, centering, center, center_momentum):
    """Targets (B, K) from the teacher's logits (B, K); softmax centring also moves its `center` (K,)."""
    if centering == 'sinkhorn':
        return sinkhorn_knopp(logits, temp)
    probs = F.softmax((logits.float() - center) / temp, dim=-1)
    total = torch.cat([logits.float().sum(0), logits.new_full((1,), len(logits), dtype=torch.float32)])
    if dist.is_initialized():
        dist.all_reduce(total)
    center.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - center_momentum)
    return probs


# Copied from pretrain_dino.py
def dino_loss(student_logits, teacher_probs, student_temp=0.1):
    """Cross-entropy - sum_k p_k log softmax(s / 0.1)_k, mean over samples. (..., B, K) and (B, K) -> scalar"""
    return -(teacher_probs * F.log_softmax(student_logits.float() / student_temp, dim=-1)).sum(-1).mean()


# Copied from pretrain_dino.py
def ibot_loss(student_logits, teacher_probs, mask, student_temp=0.1):
    """The same on masked patches (iBOT, arXiv 2111.07832): (M, K), (M, K), mask (B, N) with M True -> scalar.

    Each image's patches are weighted by 1 / their number, and the sum is divided by the number of images, masked or not.
    """
    weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]  # (M,)
    loss = -(teacher_probs * F.log_softmax(student_logits.float() / student_temp, dim=-1)).sum(-1)
    return (loss * weight).sum() / len(mask)


# Copied from pretrain_dino.py
def koleo_loss(features, eps=1e-8):
    """Minus the mean log distance to the nearest neighbour on the sphere (Sablayrolles et al. 2019, arXiv 1806.03198): spreads features.

    features (B, D) -> scalar; neighbours are sought over all processes. eps keeps duplicates finite.
    """
    x = F.normalize(features.float(), dim=-1)
    if dist.is_initialized():
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.detach())
        rows[dist.get_rank()] = x.detach() + len(rows) * (x - x.detach())  # DDP will take the mean of gradients: here the sum is due
        x = torch.cat(rows)
    if len(x) < 2:
        raise UserError('the KoLeo loss needs two tiles at least: use a larger --batch_size or --koleo_weight=0')
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -torch.log((x - x[nearest]).square().sum(1).add(eps).sqrt()).mean()


# Copied from pretrain_dino.py
def distillation_losses(outputs, cls_probs, patch_probs, mask, koleo=True):
    """outputs of SelfDistillation, the teacher's targets (2B, K) and (M, K), mask (2B, N) -> dict of the three losses (KoLeo 0 if not asked for)

    Each student crop is compared with the teacher's view of the *other* global crop (or both, for local crops): 2 + 2L pairs.
    """
    cls, big, patches, small = outputs
    B = len(cls) // 2
    L = len(small) // B
    other = cls_probs.roll(B, 0)
    both = (cls_probs[:B] + cls_probs[B:]) / 2  # cross-entropy is linear in the target: two pairs for the price of one
    dino = (dino_loss(big, other) + L * dino_loss(small.reshape(L, B, -1), both)) / (1 + L)
    spread = sum(koleo_loss(half) for half in cls.chunk(2)) if koleo else dino.new_zeros(())
    return {'dino': dino, 'ibot': ibot_loss(patches, patch_probs, mask), 'koleo': spread}


# Copied from pretrain_dino.py
@torch.no_grad()
def collapse_watch(cls, cls_probs, patch_probs):
    """What to look at in the log: the entropy of a target for a crop and for a patch (ln K = says nothing), the spread of cls features (0 = all
    the same, 1 = as random vectors) and the number of prototypes that are the first choice for a crop of this process."""
    spread = F.normalize(cls.float(), dim=-1).std(0).mean() * math.sqrt(cls.shape[1])
    entropy, patch_entropy = (-(probs * probs.clamp(min=1e-30).log()).sum() / max(len(probs), 1) for probs in (cls_probs, patch_probs))
    return {'teacher_entropy': entropy, 'patch_entropy': patch_entropy, 'feature_std': spread, 'prototypes_used': cls_probs.argmax(1).unique().numel()}


# ============ method: crops and masks ============

# Copied from pretrain_dino.py
def block_masks(n, h, w, probability, ratio_min, ratio_max, rng):
    """Masks of rectangles (BEiT, arXiv 2106.08254) -> (n, h*w) bool, True = masked; about `probability` of the n samples get one,
    with shares of patches spread evenly over ratio_min..ratio_max."""
    masks = np.zeros((n, h, w), bool)
    count = round(n * probability)
    for image, level in zip(rng.permutation(n)[:count], rng.permutation(count)):
        ratio = ratio_min + (ratio_max - ratio_min) * (level + rng.random()) / count
        mask, wanted = masks[image], max(1, round(ratio * h * w))
        while mask.sum() < wanted:
            area, aspect = rng.uniform(0.3, 1) * (wanted - mask.sum()), np.exp(rng.uniform(-1.2, 1.2))
            rows = int(np.clip(round(math.sqrt(area * aspect)), 1, h))
            cols = int(np.clip(round(math.sqrt(area / aspect)), 1, w))
            top, left = rng.integers(h - rows + 1), rng.integers(w - cols + 1)
            mask[top:top + rows, left:left + cols] = True
        surplus = np.flatnonzero(mask)
        mask.flat[rng.permutation(surplus)[:len(surplus) - wanted]] = False
    return torch.from_numpy(masks.reshape(n, h * w))


def band_masks(n, groups, probability, ratio_min, ratio_max, rng):
    """Masks of one run of neighbouring band groups each -> (n, groups) bool, True = masked; `probability` of the n samples get one."""
    masks = np.zeros((n, groups), bool)
    for sample in rng.permutation(n)[:round(n * probability)]:
        length = max(1, round(rng.uniform(ratio_min, ratio_max) * groups))
        start = rng.integers(groups - length + 1)
        masks[sample, start:start + length] = True
    return torch.from_numpy(masks)


def get_batch(train, step, *, rank, world, img_size, patch_size, batch_size, global_scale, local_scale, local_crops_number, turns, blur,
              mask_probability, mask_ratio_min, mask_ratio_max, num_groups, spectral_mask_ratio_min, spectral_mask_ratio_max, seed):
    """This rank's share of the global batch of `step` -> raw windows (b, C, S, S), boxes (b, 2 + L, 4), turns (b, 2 + L, 3), blur
    (b, 2 + L), numbers of augment_spectra (b, 2 + L, 11), masks (b, 2, N), spectral masks (b, 2, G).

    Everything random is drawn for the whole batch from (seed, step), the same on every rank: 1 process and 4 see the same crops,
    and a resumed run needs no generator state.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    windows_per_tile = max(1, round((train.meta['tile_size'] / img_size) ** 2))
    ids = epoch_ids(len(train) * windows_per_tile, batch_size, step, seed) % len(train)
    corners, _, boxes, _ = draw_crops(batch_size, train.meta['tile_size'], img_size, 1.0, 1.0, generator, False)
    side = min(img_size, train.meta['tile_size'])
    corners = corners + boxes[:, :2]  # of a window of img_size, in which all crops of a tile lie
    crops = [draw_crops(batch_size, side, side, *scale, generator, turns)[2:] for scale in [global_scale] * 2 + [local_scale] * local_crops_number]
    boxes, turned = (torch.stack(parts, 1) for parts in zip(*crops))
    u = torch.rand(batch_size, len(crops), 13, generator=generator)
    soften = 1 + u[..., 0] * (u[..., 1] < blur)
    masks = block_masks(2 * batch_size, img_size // patch_size, img_size // patch_size, mask_probability, mask_ratio_min, mask_ratio_max,
                        np.random.default_rng([seed, step, 1])).reshape(batch_size, 2, -1)
    spectral_masks = band_masks(2 * batch_size, num_groups, mask_probability, spectral_mask_ratio_min, spectral_mask_ratio_max,
                                np.random.default_rng([seed, step, 2])).reshape(batch_size, 2, -1)
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    images, _ = train.batch(ids[mine], corners[mine], side)
    return images, boxes[mine], turned[mine], soften[mine], u[mine, :, 2:], masks[mine], spectral_masks[mine]


# Copied from pretrain_dino.py
def make_crops(raw, boxes, turned, soften, u, meta, mean, matrix, img_size, local_crops_size, field, strengths):
    """Raw windows (B, C, S, S) and the draws of get_batch -> global crops (2B, C, img_size, img_size), local crops (L * B, C, s, s)"""
    std, nm = (torch.tensor(v, dtype=torch.float32, device=raw.device) for v in (meta['std'], meta['wavelengths_nm'] or range(meta['num_bands'])))
    boxes, turned, u, soften = (part.to(raw.device) for part in (boxes, turned, u, soften))
    B, V = boxes.shape[:2]
    big, small = (std.new_empty(views, B, meta['num_bands'], side, side) for views, side in ((2, img_size), (V - 2, local_crops_size)))
    by_size = [(views, crops, *crop_weights(boxes[:, views], turned[:, views], *raw.shape[2:], crops.shape[-1], soften[:, views]))
               for views, crops in ((slice(2), big), (slice(2, V), small))]
    together = B if raw.is_cuda else 1  # tile by tile what becomes of it stays in a CPU's cache
    for start in range(0, B, together):
        some = slice(start, start + together)
        x = standardize_rows(raw[some], mean, matrix, meta['nodata'])
        for views, crops, rows, cols in by_size:
            crop = crop_by(x, rows[some], cols[some], turned[some, views, 2])  # (views * together, C + 1, side, side)
            draws = u[some, views].transpose(0, 1).flatten(0, 1)
            augment_spectra(crop, draws, field, mean, std, matrix, nm, **strengths, out=crops[:, some].view(-1, *crops.shape[2:]))
    return big.flatten(0, 1), small.flatten(0, 1)


# Copied from pretrain_dino.py
@torch.no_grad()
def probe(features, splits, probe_tiles, device):
    """mIoU of a closed-form linear classifier on `features` (raw images -> maps), cross-validated over the labelled pixels of `splits`."""
    pixels = [labelled_pixels(tiles, features, 10_000, probe_tiles, device=device) for tiles in splits]
    return ridge_probe(*map(torch.cat, zip(*pixels)), splits[0].meta['num_classes'])['miou']


# Copied from pretrain_dino.py
@torch.no_grad()
def save_features(path, encoder, raw, prepare, meta):
    """Four tiles in false colour, and the three leading principal components of the teacher's patch features as red, green, blue."""
    maps = dense_features(encoder, prepare(raw), n=1)  # (4, D, h, w)
    shown = principal_colors(maps.permute(0, 2, 3, 1))  # (4, h, w, 3)
    figure = Figure(figsize=(2.4 * len(maps), 5), layout='constrained')
    axes = figure.subplots(2, len(maps), squeeze=False)
    for i in range(len(maps)):
        axes[0, i].imshow(false_color(raw[i].cpu().numpy(), meta), interpolation='nearest')
        axes[1, i].imshow(shown[i], interpolation='nearest')
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel('false colour')
    axes[1, 0].set_ylabel('features (3 components)')
    save_figure(figure, path)


# Copied from pretrain_dino.py
def save_curves(path, log, out_dim):
    """Losses, signs of collapse, and the probe over the steps, with the floors and the random encoder (the probe at step 0) as lines."""
    figure = Figure(figsize=(11, 4.2), layout='constrained')
    left, middle, right = figure.subplots(1, 3)
    trained = [e for e in log if 'loss' in e]
    names = [key for key in (trained[0] if trained else {}) if key.startswith(('dino', 'ibot'))]
    for name, style in zip(names, itertools.cycle(('-', '--', '-.'))):
        left.plot([e['step'] for e in trained], [e[name] for e in trained], style, label=name)
    left.axhline(math.log(out_dim), color='gray', linestyle=':', label='ln K: nothing learned')
    left.set(xlabel='step', ylabel='cross-entropy')
    for name, scale, label, style in (('teacher_entropy', math.log(out_dim), 'teacher entropy / ln K', '-'),
                                      ('patch_entropy', math.log(out_dim), 'its entropy for patches / ln K', '--'),
                                      ('feature_std', 1, 'feature std', '-.'), ('prototypes_used', out_dim, 'prototypes used / K', ':')):
        middle.plot([e['step'] for e in trained], [e[name] / scale for e in trained], style, label=label)
    middle.set(xlabel='step', ylabel='signs of collapse', ylim=(0, None))
    probed = [e for e in log if 'probe_miou' in e]
    if probed:
        right.plot([e['step'] for e in probed], [100 * e['probe_miou'] for e in probed], 'o-', label='frozen teacher')
        lines = {'random encoder': probed[0]['probe_miou'], **{k: v for k, v in probed[0].items() if k.endswith('floor')}}
        for (name, value), style in zip(lines.items(), ('-.', ':', '--')):
            right.axhline(100 * value, color='gray', linestyle=style, label=name)
        right.set(xlabel='step', ylabel='linear probe, mIoU in %')
    for axis in (left, middle, right):
        axis.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=2)  # below: lines may run anywhere
    save_figure(figure, path)


if __name__ == '__main__':
    plain_errors()
    config = override_constants()

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

    # ---- data
    if rank == 0:
        demo_if_missing(data)
    if world > 1:
        dist.barrier()
    sources, windows_of = open_sources(data, bands, img_size, pin_memory=device.type == 'cuda')
    train, meta = sources[0], sources[0].meta
    config['wavelengths_nm'] = meta['wavelengths_nm']  # into the checkpoint: data of other bands can be brought to these
    if img_size % patch_size or local_crops_size % patch_size or local_crops_number < 1:
        raise UserError(f'--img_size={img_size} and --local_crops_size={local_crops_size} must be multiples of --patch_size={patch_size}, and '
                        f'--local_crops_number={local_crops_number} at least 1: change one')
    statistics = [[t.to(device) for t in standardization(source.meta, whiten)] for source in sources]  # each its own
    prepare = lambda raw: standardize(raw, *statistics[0], meta['nodata'])
    watched = rank == 0 and all(os.path.exists(os.path.join(train.directory, f'{split}_labels.npy')) for split in ('tr', 'val'))
    if watched:
        # Tiles of their own: a batch waits in the buffers of `train`
        probe_splits = [Tiles(train.directory, split, bands=bands) for split in ('tr', 'val')]
        floors = {f'{name} floor': probe(spectrum_features(meta, windows, device), probe_splits, probe_tiles, device)
                  for name, windows in FLOORS.items()}
    windows = sum(windows_of)
    total_steps = max(1, round(epochs * windows / batch_size))
    warmup_steps = min(round(warmup_epochs * windows / batch_size), total_steps // 2)
    last_step = min(max_steps or total_steps, total_steps)
    warmup_temp_steps = round(warmup_teacher_temp_epochs * windows / batch_size)
    frozen_steps = round(freeze_last_layer_epochs * windows / batch_size)

    # ---- model
    for name, value, known in (('size', size, SIZES), ('ffn', ffn, ('mlp', 'swiglu')), ('centering', centering, ('sinkhorn', 'softmax'))):
        if value not in known:
            raise UserError(f'--{name}={value}: choose one of {", ".join(known)}')
    hidden_dim, bottleneck_dim = {'tiny': (512, 64), 'small': (2048, 256), 'base': (2048, 256)}[size]
    if fusion == 'token' and local_crops_size * 2 != img_size:
        raise UserError(f'--fusion=token needs local crops of half the global ones: pass --local_crops_size={img_size // 2} or --fusion=channel')
    encoder_args = dict(img_size=img_size, patch_size=patch_size, in_chans=meta['num_bands'], ffn=ffn, num_register_tokens=num_register_tokens,
                        init_values=init_values, drop_path_rate=drop_path_rate, mask_token=True, **SIZES[size],
                        spectral_patch_size=spectral_patch_size, fusion=fusion, wavelength_encoding=wavelength_encoding,
                        wavelengths_nm=meta['wavelengths_nm'])
    encoder_args.update(public_shape(init_from))
    encoder = SpatialSpectralViT(**encoder_args)
    heads = [DINOHead(encoder.embed_dim, out_dim, hidden_dim, bottleneck_dim) for _ in range(1 + separate_heads)]
    model = SelfDistillation(Branch(encoder, *heads), out_dim).to(device).train()
    if init_from:
        print0(start_from(init_from, model, meta['wavelengths_nm'], rgb_kernels))
    parameters = sum(p.numel() for p in model.student.parameters())
    print0(f'{parameters:,} parameters, twice (student and teacher); {meta["num_bands"]} bands, 2 crops of {img_size} px and '
           f'{local_crops_number} of {local_crops_size} px, patches of {patch_size} px, {encoder.num_groups} groups of {spectral_patch_size} bands, '
           f'{fusion} fusion, {out_dim:,} prototypes; {windows} windows an epoch, '
           f'{total_steps} steps of {batch_size}; {device}, {dtype}, {world} process(es); {out_dir}')

    # ---- optimizer
    lr = base_lr * math.sqrt(batch_size / 1024)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay, layer_decay, patch_embed_lr), lr=lr, betas=(0.9, beta2), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')

    if device.type == 'cpu' and rank == 0:  # how long will this take? one tile's crops tell
        tick = time.time()
        with autocast():
            crops = [torch.randn(n, meta['num_bands'], side, side) for n, side in ((2, img_size), (local_crops_number, local_crops_size))]
            rows, counts = [torch.arange(2)] * 2, ((img_size // patch_size) ** 2, encoder.num_groups)
            masks = [torch.zeros(2, n, dtype=torch.bool) for n in counts]
            model.teacher(crops[0], (None, None), rows)
            sum(out.float().mean() for stream in model(crops[0], masks, rows, crops[1]) for out in stream).backward()
        optimizer.zero_grad()
        hours = (time.time() - tick) * batch_size / world * last_step / 3600
        print(f'on this CPU: at most {hours:.1f} hours' + (', try --size=tiny, fewer --epochs or --max_steps' if hours > 1 else ''))

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
    if compile:
        model.teacher.compile()

    # ---- training loop
    crop = functools.partial(get_batch, rank=rank, world=world, img_size=img_size, patch_size=patch_size, batch_size=batch_size,
                             global_scale=(global_crops_scale_min, global_crops_scale_max),
                             local_scale=(local_crops_scale_min, local_crops_scale_max), local_crops_number=local_crops_number, turns=turns,
                             blur=blur, mask_probability=mask_probability, mask_ratio_min=mask_ratio_min, mask_ratio_max=mask_ratio_max,
                             num_groups=encoder.num_groups, spectral_mask_ratio_min=spectral_mask_ratio_min,
                             spectral_mask_ratio_max=spectral_mask_ratio_max, seed=seed)
    draw = lambda step: crop(sources[pick_source(windows_of, step, seed)], step)  # a batch comes from one data set
    strengths = dict(gain=gain, offset=offset, tilt=tilt, noise=noise, band_dropout=band_dropout, jitter=jitter, solarize=solarize)
    batch, collapsed = draw(step), False
    bar = tqdm(total=last_step, initial=step, disable=rank > 0, unit='step', dynamic_ncols=True)
    while step <= last_step:
        # ---- evaluate: the teacher's encoder as it is now, before the step; at step 0 it is the random encoder
        if rank == 0 and (step == last_step or step == 0 or (eval_every and step % eval_every == 0)):
            model.eval()
            if watched and not any(e['step'] == step and 'probe_miou' in e for e in log):
                with autocast():
                    miou = probe(lambda raw: dense_features(model.teacher.encoder, prepare(raw)), probe_splits, probe_tiles, device)
                log.append({'step': step, 'probe_miou': miou, **floors})
                append_line(log_path, log[-1])
                bar.write(f'step {step}: probe mIoU {miou:.3f}; random encoder {log[0]["probe_miou"]:.3f}, '
                          + ', '.join(f'{name} {value:.3f}' for name, value in floors.items()))
            shown = train.resampled(torch.from_numpy(np.array(train.images[:4]))).to(device)
            save_features(os.path.join(out_dir, 'features.png'), model.teacher.encoder, shown, prepare, meta)
            save_curves(os.path.join(out_dir, 'curves.png'), log, out_dim)
            model.train()
        if step == last_step:
            break

        # ---- boilerplate: seed this step
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # dropout differs between ranks, never between resumed runs
        # ---- end of boilerplate: seed this step
        for group in optimizer.param_groups:
            group['lr'] = cosine(step, total_steps, warmup_steps, lr, min_lr) * group['lr_scale'] * (not group['last_layer'] or step >= frozen_steps)
            group['weight_decay'] = cosine(step, total_steps, 0, weight_decay, weight_decay_end) if group['weight_decay'] else 0.0
        temp = warmup_teacher_temp + (teacher_temp - warmup_teacher_temp) * min(1, step / max(1, warmup_temp_steps))

        # ---- method: crops
        field = torch.randn(meta['num_bands'], 4 * img_size, img_size, generator=torch.Generator().manual_seed(seed * 1_000_003 + step)).to(device)
        pieces, source = [], pick_source(windows_of, step, seed)
        for raw, boxes, turned, soften, u, *masks in zip(*(t.chunk(grad_accum) for t in batch)):
            big, small = make_crops(raw.to(device, non_blocking=True), boxes, turned, soften, u, sources[source].meta, *statistics[source], img_size,
                                    local_crops_size, field, strengths)
            masks = [mask.transpose(0, 1).flatten(0, 1) for mask in masks]  # (2B, N) and (2B, G), crop by crop as `big`
            rows = [mask.flatten().nonzero()[:, 0] for mask in masks]
            pieces.append((big, [mask.to(device) for mask in masks], [row.to(device) for row in rows], small))
        batch = draw(step + 1)  # while a GPU is still at work

        # ---- method: targets. The teacher sees the global crops unmasked; Sinkhorn makes it use all prototypes, so that saying the
        # same of every image, the trivial solution, is not open to it
        with torch.no_grad(), autocast():
            logits = [model.teacher(big, (None, None), rows) for big, _, rows, _ in pieces]  # pieces x streams x (cls, its logits, masked)
        targets = []
        for stream in range(2):
            parts = [piece[stream][1:3] for piece in logits]
            targets.append([teacher_probs(torch.cat(part), temp, centering, center[stream], center_momentum).split([len(p) for p in part])
                            for part, center in zip(zip(*parts), (model.cls_center, model.patch_center))])

        # ---- method: forward, loss, backward of the student
        total_loss, extras = 0.0, {}
        for i, (big, masks, rows, small) in enumerate(pieces):
            with autocast():
                outputs = net(big, masks, rows, small)
            losses, spectral = (distillation_losses(out, cls_probs[i], masked_probs[i], mask, koleo_weight > 0)
                                for out, (cls_probs, masked_probs), mask in zip(outputs, targets, masks))
            loss = dino_weight * losses['dino'] + ibot_weight * losses['ibot'] + koleo_weight * losses['koleo']
            loss = loss + spectral_weight * (dino_weight * spectral['dino'] + ibot_weight * spectral['ibot'] + koleo_weight * spectral['koleo'])
            losses.update({f'{name}_spectral': value for name, value in spectral.items()})
            scaler.scale(loss / grad_accum).backward()
            total_loss += loss.detach() / grad_accum
        if (step + 1) % log_every == 0 or step + 1 == last_step:
            extras = {**{name: value.detach() for name, value in losses.items()}, **collapse_watch(outputs[0][0], targets[0][0][-1], targets[0][1][-1]),
                      'teacher_temp': temp}

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
        model.update_teacher(cosine(step, total_steps, 0, momentum_teacher, 1.0))
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
        if extras and rank == 0 and step > warmup_steps and not collapsed and (
                entry['feature_std'] < 0.05 or max(entry['teacher_entropy'], entry['patch_entropy']) > 0.99 * math.log(out_dim)):
            collapsed = True  # say it once
            bar.write(f'step {step}: WARNING: the features are collapsing (feature_std {entry["feature_std"]:.3f}, teacher entropy '
                      f'{entry["teacher_entropy"]:.3f} (crops) and {entry["patch_entropy"]:.3f} (patches) where ln K is {math.log(out_dim):.3f}, DINO loss {entry["dino"]:.3f}): try a lower '
                      '--teacher_temp or --base_lr, or more --koleo_weight')

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

    # ---- end
    bar.close()
    print0(f'done: {step} steps in {time.time() - started:.0f} s; encoder in {last_path}; next: python segment.py --encoder={last_path}')
    if world > 1:
        dist.barrier()  # rank 0 may still be at its last pictures: leave together
        dist.destroy_process_group()
