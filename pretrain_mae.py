"""Masked autoencoder (He et al. 2021, arXiv 2111.06377), pre-trained on hyperspectral tiles.

Three quarters of a crop's patches are hidden. A Vision Transformer (ViT) encodes the visible ones,
and a small decoder predicts the pixels of the hidden ones. The target is the crop itself, whitened
(bands decorrelated): it comes from the data and not from a network, so that an encoder which gives
every image the same output ("collapse") cannot win. Labels are used by the probe only, a linear
classifier that measures the features now and then and trains nothing.

    python pretrain_mae.py                                     # demo data, minutes on a CPU
    python pretrain_mae.py --size=base --data=data/mine --out_dir=runs/mine        # on one GPU
    torchrun --nproc_per_node=4 pretrain_mae.py ...                                # on four

Writes into out_dir: last.pt (to resume from, and for users of the encoder), log.jsonl,
curves.png and reconstruction.png. The same command again resumes a run that was stopped.

Where to start: "one step" in the training loop, get_batch(), models.MaskedAutoencoder. Blocks
headed `shell` are the same in every script: skip them at first. What is in a checkpoint stands at
the call of save_checkpoint. The siblings: pretrain_lejepa.py learns without a decoder,
pretrain_dino.py from a teacher, pretrain_dino_hsi.py with a second stream of band groups.

Shapes: B crops, C bands, N patches of a crop, in rows of h.
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
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (Tiles, UserError, demo_if_missing, draw_crops, draw_probe, false_color,
                  kept_meta, lock_directory, next_command, plain_errors, probe, probe_floors,
                  probe_splits, read_flags, resized_crop, save_figure, standardization, standardize)
from models import (SIZES, MaskedAutoencoder, dense_features, encoder_shape, native_bfloat16,
                    parameter_groups, patchify, resume_from, save_checkpoint, start_from,
                    unpatchify)

# Each line `name = value  # help` is a flag, --name=other; `a | b: ` in its help are the choices.
# ---- data
data = 'data/demo'  # tile directory; its bands are those of the encoder
img_size = 16  # side of a crop, px
whiten = 16  # components that decorrelate the bands (ZCA); 0: standardise each
scale_min = 0.4  # smallest crop, as a share of img_size x img_size (0.2 in MAE)
# ---- model
size = 'tiny'  # tiny | small | base: the network, and what goes with it (PRESETS)
patch_size = 4  # side of a patch, px
dropout = 0.0  # probability that a unit is dropped; 0 in MAE, 0.1 in the dissertation
mask_ratio = 0.75  # share of the patches that is hidden (MAE, Figure 5)
norm_pix_loss = False  # targets of mean 0 and std 1 in each patch (MAE, Table 1d)
init_from = ''  # checkpoint to start from; its encoder's size is taken
freeze_encoder = False  # only the decoder learns (the dissertation's proof of concept)
# ---- optimizer
steps = 400  # length of the run
warmup = 0.1  # share of the steps in which the learning rate rises
batch_size = 64  # crops per step, over all processes
base_lr = 6e-3  # per 256 crops: lr = base_lr * batch_size / 256; high, as the run is short
weight_decay = 0.05  # not on biases, norms and tokens
# ---- run
out_dir = 'runs/mae'  # one directory a run
max_steps = 0  # stop at this step, to resume later; 0: run to the end
seed = 0  # of weights, crops, masks and order
log_every = 20  # steps between entries of the log
eval_every = 100  # steps between probes
save_every = 100  # steps between checkpoints
probe_tiles = 64  # tiles of each split that the probe looks at
dtype = 'auto'  # auto | bfloat16 | float16 | float32: auto is bfloat16 if native, else float32
compile = True  # torch.compile, on a GPU
cuda_graphs = True  # of a compiled step, on one GPU: some three times as fast (docs/gpu.md)
wandb_log = False  # send the log to wandb.ai as well

LARGE = dict(img_size=64, patch_size=8, batch_size=128, base_lr=1.5e-4, log_every=100,
             eval_every=2000, save_every=2000)
PRESETS = {
    'tiny': {},  # the values above
    'small': {**LARGE, 'steps': 20_000},
    'base': {**LARGE, 'steps': 241_100},  # the dissertation's: 100 epochs of WHU-OHS
}


# ============ method ============

class Batch(NamedTuple):
    """One rank's share of a step's batch"""
    raw: torch.Tensor  # (B, C, side, side) windows as stored
    boxes: torch.Tensor  # (B, 4) the crop in each: top, left, height, width
    flips: torch.Tensor  # (B, 3) flip rows, flip columns, transpose
    mask_noise: torch.Tensor  # (B, N) the patches with the smallest numbers stay visible


def get_batch(tiles, step, rank=0, world=1):
    """What is cropped and hidden at `step` -> Batch.

    A window is read from a tile, and a box in it is resized to the crop. All of it is drawn for the
    whole batch from (seed, step). So one process and four see the same crops, and a resumed run
    needs no generator's state.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    ids = tiles.ids_of_step(step, batch_size, img_size, seed)
    corners, side, boxes, flips = draw_crops(batch_size, tiles.meta['tile_size'], img_size,
                                             scale_min, 1.0, generator)
    num_patches = (img_size // patch_size) ** 2
    mask_noise = torch.rand(batch_size, num_patches, generator=generator)

    here = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    raw, _ = tiles.batch(ids[here], corners[here], side, reuse=True)
    next_ids = tiles.ids_of_step(step + 1, batch_size, img_size, seed)
    tiles.read_ahead(next_ids[here], side)
    return Batch(raw, boxes[here], flips[here], mask_noise[here])


def learning_rate(step):
    """Linear warm-up, then half a cosine down to 0"""
    peak = base_lr * batch_size / 256
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def build_model(meta, shape={}):
    """-> the autoencoder for the data's bands, and the arguments that build its encoder again.
    `shape`: those that weights to start from settle, see encoder_shape()."""
    decoder_sizes = {'tiny': (96, 2, 4), 'small': (256, 4, 8), 'base': (512, 8, 16)}
    decoder_dim, decoder_depth, decoder_heads = decoder_sizes[size]
    encoder_args = dict(img_size=img_size, patch_size=patch_size, in_chans=meta['num_bands'],
                        dropout=dropout, **SIZES[size])
    encoder_args.update(shape)
    plain = {'num_register_tokens': 0, 'init_values': 0.0, 'ffn': 'mlp'}
    if any(encoder_args.get(name, value) != value for name, value in plain.items()):
        raise UserError(f'{init_from}: has registers, LayerScale or SwiGLU, which a masked '
                        'autoencoder lacks: start pretrain_dino.py from it')
    model = MaskedAutoencoder(**encoder_args, decoder_embed_dim=decoder_dim,
                              decoder_depth=decoder_depth, decoder_num_heads=decoder_heads,
                              norm_pix_loss=norm_pix_loss, freeze_encoder=freeze_encoder)
    # positions do not learn here: sine-cosine ones, or those that came with the weights
    return model, {**encoder_args, 'fixed_positions': True}


def check_constants(meta):
    """Refuse constants that do not fit together, before the first step."""
    tile_size = meta['tile_size']
    if img_size > tile_size or img_size % patch_size or tile_size % patch_size:
        raise UserError(f'--img_size={img_size}, tiles of {tile_size} px: crops are no larger than '
                        f'tiles, and both are multiples of --patch_size={patch_size}')
    num_patches = (img_size // patch_size) ** 2
    if not 0 < round(num_patches * mask_ratio) < num_patches:
        raise UserError(f'--mask_ratio={mask_ratio} of {num_patches} patches: hide one at least, '
                        'and leave one')


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

@torch.no_grad()
def save_reconstruction(path, model, x, to_raw, meta):
    """False colour of some crops: the input, what the encoder saw, what the decoder made of it"""
    h = img_size // patch_size
    noise = torch.rand(len(x), h * h, generator=torch.Generator().manual_seed(0))
    # model(...) is compiled, and would be again for a batch of this size; forward() is not
    _, pred, mask = model.forward(x, mask_ratio, noise.to(x.device))
    patches, hidden = patchify(x, patch_size), mask[..., None].bool()
    if norm_pix_loss:  # normalised patches are predicted: give them the input's mean and std
        std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        pred = pred * std + patches.mean(-1, keepdim=True)
    columns = {'input': patches,
               f'visible ({1 - mask_ratio:.0%})': patches.masked_fill(hidden, torch.nan),
               'with predictions': torch.where(hidden, pred.float(), patches)}
    figure = Figure(figsize=(7, 2.4 * len(x)), layout='constrained')
    axes = figure.subplots(len(x), 3, squeeze=False)
    for column, (title, tokens) in zip(axes.T, columns.items()):
        column[0].set_title(title)
        images = to_raw(unpatchify(tokens, patch_size, h, h)).cpu()
        for axis, image in zip(column, images):
            axis.imshow(false_color(image, meta), interpolation='nearest')
            axis.set(xticks=[], yticks=[])
    save_figure(figure, path)


def save_curves(path, log):
    """Loss and probe over the steps; at step 0 the probe is of the encoder as it started"""
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    trained = [entry for entry in log if 'loss' in entry]
    left.plot([entry['step'] for entry in trained], [entry['loss'] for entry in trained])
    left.set(xlabel='step', ylabel='loss (mean squared error)')
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

    def prepare(raw):
        """Raw values, any type -> whitened or standardised (B, C, H, W) float32"""
        return standardize(raw.to(device, non_blocking=True), mean, matrix, meta['nodata'])

    def to_raw(x):
        """The way back from prepare(), for pictures; what whitening left out is lost"""
        back = torch.linalg.pinv(matrix) if matrix.ndim == 2 else torch.diag(1 / matrix)
        return torch.einsum('kc,bchw->bkhw', back, x) + mean[:, None, None]

    # ---- shell: what was saved here before
    last_path = os.path.join(out_dir, 'last.pt')
    checkpoint = resume_from(last_path, __file__, config, meta)  # None in a new run

    # ---- model and optimizer
    shape = encoder_shape(init_from, checkpoint)
    model, encoder_args = build_model(meta, shape)
    model.to(device)
    if init_from and not checkpoint:
        print(start_from(init_from, model, __file__, whiten, meta))
    groups = parameter_groups(model, weight_decay)
    # any other optimizer needs fused=True as well: see "update the weights"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

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
        """The encoder as it is now: probe, reconstruction, curves."""
        model.eval()
        if labelled:
            with autocast:
                miou = probe(features, labelled, probe_tiles, device)
            record({'step': step, 'probe_miou': miou, **floors})
            tqdm.write(f'step {step}: probe mIoU {100 * miou:.1f} %')
        start = (meta['tile_size'] - img_size) // 2
        middle = slice(start, start + img_size)
        crops = prepare(torch.from_numpy(train.images[:4, :, middle, middle].copy()))
        save_reconstruction(os.path.join(out_dir, 'reconstruction.png'), model, crops, to_raw, meta)
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
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # dropout, on each rank
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step)

        # one step: the crop is the input, and its hidden patches are the target. The network hides
        # patches, encodes the others, decodes, and compares: models.MaskedAutoencoder.forward()
        x = resized_crop(prepare(batch.raw), batch.boxes, batch.flips, img_size)
        mask_noise = batch.mask_noise.to(device, non_blocking=True)
        with autocast:
            loss, _, _ = net(x, mask_ratio, mask_noise)
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
            mean_loss = loss.detach() / world  # this rank's share of the mean
            if world > 1:
                dist.all_reduce(mean_loss)
            record({'step': step, 'loss': mean_loss.item(), 'lr': optimizer.param_groups[0]['lr'],
                    'grad_norm': norm.item(), 'seconds': time.time() - started})
            bar.set_postfix(loss=f'{mean_loss.item():.4f}')
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
