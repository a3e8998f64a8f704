"""LeJEPA on hyperspectral tiles (Balestriero and LeCun 2025, arXiv 2511.08544).

A Vision Transformer (ViT) sees two large ("global") crops of a tile and small ("local") ones, each
with illumination, noise and missing bands of its own. The mean of a crop's patch tokens is its
embedding. The ViT learns to give all crops of a tile the same embedding.

What keeps all tiles from getting the same one ("collapse"): the embeddings of a batch are pulled
towards a standard normal distribution, whose points lie apart (SIGReg). There is no teacher, no
head, no temperature: loss = (1 - lambda) * invariance + lambda * SIGReg. Labels are used by the
probe only, a linear classifier that measures the features now and then and trains nothing.

    python pretrain_lejepa.py                                  # demo data, minutes on a CPU
    python pretrain_lejepa.py --size=base --data=data/mine --out_dir=runs/mine     # on one GPU
    torchrun --nproc_per_node=4 pretrain_lejepa.py ...                             # on four

Writes into out_dir: last.pt (to resume from, and for users of the encoder), log.jsonl
and curves.png. The same command again resumes a run that was stopped.

Where to start: "one step" in the training loop, invariance(), sigreg(), get_batch(). Blocks headed
`shell` are the same in every script: skip them at first. What is in a checkpoint stands at the
call of save_checkpoint.

Shapes: B tiles, C bands, S side of a global and s of a local crop, V views (crops) of a tile,
L local crops of a tile, D width, M directions.
"""
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from typing import NamedTuple

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
from models import (SIZES, all_rows, build_encoder, dense_features, encoder_shape,
                    native_bfloat16, parameter_groups, resume_from, save_checkpoint, start_from)

# Each line `name = value  # help` is a flag, --name=other; `a | b: ` in its help are the choices.
# ---- data
data = 'data/demo'  # tile directory; its bands are those of the encoder
img_size = 16  # side of the global crops, px
local_crops_size = 8  # side of the local crops, px
local_crops_number = 2  # local crops of a tile
global_scale_min = 0.7  # smallest global crop, share of img_size x img_size
local_scale_min = 0.3  # smallest local crop, likewise a share
local_scale_max = 0.4  # largest local crop, likewise a share
whiten = 16  # components that decorrelate the bands (ZCA); 0: standardise each
blur = 0.3  # probability that a crop is blurred
gain = 0.02  # all bands times a factor of 1 +- this: illumination
offset = 0.1  # all bands plus +- this many standard deviations: haze
noise = 0.5  # largest standard deviation of white noise, on standardised values
band_dropout = 0.3  # probability that a crop lacks a run of bands; after whitening
# ---- model
size = 'tiny'  # tiny | small | base: the network, and what goes with it (PRESETS)
patch_size = 4  # side of a patch, px
init_from = ''  # checkpoint to start from; its encoder's size is taken
# ---- method
sigreg_weight = 0.2  # lambda, the share of SIGReg in the loss; the invariance has the rest
num_directions = 256  # random projections of the embeddings in a step, for SIGReg
# ---- optimizer
steps = 400  # length of the run
warmup = 0.1  # share of the steps in which the learning rate rises
batch_size = 32  # tiles per step, over all processes
base_lr = 1e-2  # per 1,024 tiles: lr = base_lr * sqrt(batch_size / 1024)
weight_decay = 0.05  # not on biases, norms and tokens
# ---- run
out_dir = 'runs/lejepa'  # one directory a run
max_steps = 0  # stop at this step, to resume later; 0: run to the end
seed = 0  # of weights, crops, directions and order
log_every = 20  # steps between entries of the log
eval_every = 100  # steps between probes
save_every = 100  # steps between checkpoints
probe_tiles = 64  # tiles of each split that the probe looks at
dtype = 'auto'  # auto | bfloat16 | float16 | float32: auto is bfloat16 if native, else float32
compile = True  # torch.compile, on a GPU
cuda_graphs = True  # of a compiled step, on one GPU: 1.4 times as fast at base (docs/gpu.md)
wandb_log = False  # send the log to wandb.ai as well

LARGE = dict(img_size=64, local_crops_size=32, local_crops_number=8, global_scale_min=0.4,
             local_scale_min=0.15, patch_size=8, sigreg_weight=0.05, num_directions=1024,
             batch_size=128, base_lr=1.4e-3, log_every=100, eval_every=2000, save_every=2000)
PRESETS = {
    'tiny': {},  # the values above
    'small': {**LARGE, 'steps': 50_000},
    'base': {**LARGE, 'steps': 241_100},  # the dissertation's: 100 epochs of WHU-OHS
}


# ============ method: embeddings and losses ============

class LeJEPA(nn.Module):
    """The encoder, whose forward() here gives embeddings. Nothing else is learned."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, big, small):
        """Global crops (2B, C, S, S), local (L * B, C, s, s) -> embeddings z (V, B, D), z[v]
        those of view v of every tile. Each is the mean of a crop's patch tokens."""
        prefix = self.encoder.num_prefix_tokens
        z = [self.encoder(crops)[:, prefix:].float().mean(1) for crops in (big, small)]
        return torch.cat(z).unflatten(0, (-1, len(big) // 2))


def invariance(z):
    """Mean squared distance of each view from the mean of the tile's two global views.

    z (V, B, D): embeddings, global views first
    """
    center = z[:2].mean(0)
    return (z - center).square().mean()


def sigreg(z, directions):
    """How far the embeddings of each view are from a standard normal distribution.

    z (V, B, D), directions (D, M) of length 1. A distribution is standard normal if its projection
    on every direction is (Cramer and Wold). The projection x = z @ a of B embeddings is measured by
    its characteristic function phi(t) = mean of exp(i t x). A standard normal one has exp(-t^2 / 2)
    (Epps and Pulley 1983), so the statistic is

        B * integral of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

    by the trapezoidal rule at 17 points from 0 to 3, doubled, since the integrand is even.
    """
    t = torch.linspace(0, 3, 17, device=z.device)
    normal = (-t.square() / 2).exp()
    angles = (z @ directions)[..., None] * t  # (V, B, M, 17)
    real = batch_mean(angles.cos())
    imaginary = batch_mean(angles.sin())
    error = (real - normal).square() + imaginary.square()
    statistic = 2 * torch.trapezoid(error * normal, t)
    return batch_size * statistic.mean()


def batch_mean(x):
    """Mean over the tiles of all processes: x (V, B, ...) -> (V, ...)"""
    mean = x.mean(1)
    if dist.is_initialized():
        everyone = mean.detach().clone()
        dist.all_reduce(everyone)
        everyone /= dist.get_world_size()
        # the value is that of all processes, the gradient this one's, which DDP averages
        mean = mean + (everyone - mean.detach())
    return mean


def draw_directions(width, step, device):
    """-> (width, M) unit vectors, other ones at each step and the same on all processes"""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    directions = torch.randn(width, num_directions, generator=generator, device=device)
    return F.normalize(directions, dim=0)


def feature_std(z):
    """Sign of collapse: spread of embeddings (n, D); 0: all the same, 1: as random vectors"""
    return all_rows(F.normalize(z, dim=-1)).std(0).mean() * math.sqrt(z.shape[1])


# ============ method: crops ============

class Batch(NamedTuple):
    """One rank's share of a step's batch; V = 2 + L views of each tile"""
    raw: torch.Tensor  # (B, C, S, S) windows as stored
    boxes: torch.Tensor  # (B, V, 4) the crops in each: top, left, height, width
    flips: torch.Tensor  # (B, V, 3) flip rows, flip columns, transpose
    draws: torch.Tensor  # (B, V, 13) uniform numbers: two for the blur, then the light


def get_batch(tiles, step, rank=0, world=1):
    """What is cropped at `step` -> Batch.

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

    here = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    raw, _ = tiles.batch(ids[here], window.corners[here], img_size, reuse=True)
    next_ids = tiles.ids_of_step(step + 1, batch_size, img_size, seed)
    tiles.read_ahead(next_ids[here], img_size)
    return Batch(raw, boxes[here], flips[here], draws[here])


def make_crops(batch, statistics, nodata, step):
    """-> global crops (2B, C, S, S) and local crops (L * B, C, s, s), standardised"""
    device = batch.raw.device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    shape = (batch.raw.shape[1], 4 * img_size, img_size)
    noise_field = torch.randn(shape, generator=generator, device=device)
    light = Light(gain, offset, noise, band_dropout)
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

def learning_rate(step):
    """Linear warm-up, then half a cosine down to 0"""
    peak = base_lr * math.sqrt(batch_size / 1024)
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def build_model(meta, shape={}):
    """-> the model for the data's bands, and the arguments that build its encoder again.
    `shape`: those that weights to start from settle, see encoder_shape()."""
    encoder_args = dict(img_size=img_size, patch_size=patch_size, in_chans=meta['num_bands'],
                        **SIZES[size])
    encoder_args.update(shape)
    return LeJEPA(build_encoder(encoder_args)), encoder_args  # models.ViT


def check_constants(meta):
    """Refuse constants that do not fit together, before the first step."""
    sides = local_crops_size, img_size, meta['tile_size']
    if list(sides) != sorted(sides) or any(side % patch_size for side in sides):
        raise UserError(f'--local_crops_size={sides[0]}, --img_size={sides[1]}, tiles of {sides[2]}'
                        f' px: choose multiples of --patch_size={patch_size}, in rising order')
    if img_size == patch_size:
        raise UserError(f'--img_size={img_size}: a global crop needs two patches in a row')
    if batch_size < 2:
        raise UserError('--batch_size=1: a distribution needs two tiles')
    if local_scale_min > local_scale_max:
        raise UserError('--local_scale_min is above its maximum')


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
    """The two terms of the loss, the sign of collapse, and the probe, over the steps"""
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    trained = [entry for entry in log if 'loss' in entry]
    at = [entry['step'] for entry in trained]
    for name in ('sigreg', 'feature_std', 'invariance'):
        left.plot(at, [entry[name] for entry in trained], label=name)
    left.axhline(1.05, color='gray', linestyle=':', label='sigreg of normal samples')
    left.set(xlabel='step', yscale='log')
    left.legend(fontsize=8)
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
        return dense_features(model.encoder, prepare(raw))

    def watch():
        """The encoder as it is now: probe, curves."""
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

    # ---- training loop
    batch = get_batch(train, step, rank, world)
    bar = tqdm(total=last_step, initial=step, disable=not main_process)
    started = time.time() - max((entry.get('seconds', 0) for entry in log), default=0)
    if main_process and step == 0:
        watch()
    while step < last_step:
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step)

        # one step: two global crops of each tile and some local ones get embeddings
        batch = Batch(*(t.to(device, non_blocking=True) for t in batch))
        big, small = make_crops(batch, statistics, meta['nodata'], step)
        with autocast:
            z = net(big, small)
        # pull a tile's embeddings together, and all tiles' towards a normal distribution
        same = invariance(z)
        normal = sigreg(z, draw_directions(z.shape[2], step, device))
        loss = (1 - sigreg_weight) * same + sigreg_weight * normal
        scaler.scale(loss).backward()
        batch = get_batch(train, step + 1, rank, world)  # read while the GPU is still at work
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # only measured

        # ---- shell: update the weights
        # fused AdamW skips this step where found_inf is 1: the GPU decides, the host does not wait
        optimizer.found_inf = 1.0 - torch.isfinite(norm).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

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
            terms = {'invariance': same, 'sigreg': normal,
                     'feature_std': feature_std(z.detach().flatten(0, 1))}
            means = torch.stack([loss, *terms.values()]).detach() / world
            if world > 1:
                dist.all_reduce(means)  # over the processes
            mean_loss, *means = means.tolist()
            record({'step': step, 'loss': mean_loss, 'lr': optimizer.param_groups[0]['lr'],
                    'grad_norm': norm.item(), 'seconds': time.time() - started,
                    **dict(zip(terms, means))})
            bar.set_postfix(loss=f'{mean_loss:.4f}')
            if log[-1]['feature_std'] < 0.1 and step > warmup * steps:
                bar.write(f'step {step}: WARNING: the features are collapsing (see curves.png): '
                          'try a larger --sigreg_weight or a lower --base_lr')
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
