"""Masked-autoencoder pre-training on hyperspectral tiles (He et al. 2021, arXiv 2111.06377).

Three quarters of an image's patches are hidden; a ViT encodes the visible ones and a small decoder predicts the pixels of the
rest. The target is the image itself, standardised or spectrally whitened; no label is used except by the probe that watches.

    python pretrain_mae.py --size=tiny                          # demo data, made on first use; minutes on a laptop
    python pretrain_mae.py --data=data/whu                      # the dissertation's ViT-B/8, on one GPU
    torchrun --nproc_per_node=4 pretrain_mae.py --data=data/whu

Reads a tile directory (python data.py tile). Writes out_dir: last.pt, log.jsonl, curves.png, reconstruction.png, config.json and
a copy of this file. The same command again goes on exactly where the last one stopped. Results and times: README.md.
"""
import argparse
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
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (FLOORS, UserError, Tiles, demo_if_missing, draw_crops, epoch_ids, false_color, labelled_pixels, open_sources, pick_source,
                  plain_errors, principal_components, resized_crop, ridge_probe, save_figure, spectrum_features, standardization, standardize,
                  write_json)
from models import SIZES, MaskedAutoencoder, dense_features, load_checkpoint, patchify, public_shape, start_from, unpatchify

# ---- data
data = 'data/demo'  # tile directory; the demo is made on first use. a,b,c = of several sensors, drawn by size; a is probed and shown
bands = ''  # wavelengths the run works at: nm (485:70,560 = the first 70 nm wide), ohs or landsat (six bands); '' = the data's own
img_size = 64  # side of the training crops in pixels; tiles may be larger, then crops move
whiten = 16  # ZCA of this many leading components (or of all bands, if fewer); 0 = each band to mean 0, std 1 (dissertation)
pca = 0  # this many principal components, each of variance 1, instead of the bands (dissertation, section 4.1: 3); 0 = bands
scale_min = 0.4  # smallest crop, as a share of img_size x img_size; 0.2 in MAE, too much zoom for 64 px
scale_max = 1.0  # largest crop; 1 with scale_min = 1 never resizes
turns = True  # random flips and quarter turns: seen from above there is no up. dissertation: flips only
# ---- model
size = 'base'  # tiny (width 128, depth 6), small (384, 12) or base (768, 12)
patch_size = 8  # 8 for 64 px (the dissertation); 2 to 4 for small scenes, at (8 / patch)^2 times the tokens
init_from = ''  # last.pt of a run to start from, or a public MAE file: its width, depth and heads are taken, `size` is then the decoder's
rgb_kernels = 'wavelength'  # how a public file's 3 kernels reach our bands: wavelength (mixture of the nearest in nm), repeat (their mean) or fresh
freeze_encoder = False  # true = only the decoder learns (the dissertation's proof of concept)
dropout = 0.1  # dissertation: 0.1 "on the small amount of data"; MAE itself uses 0
# ---- method
mask_ratio = 0.75  # 0.75 in MAE, Table 1a
norm_pix_loss = False  # targets with mean 0 and std 1 in each patch (MAE, Table 1d); removes brightness, and with it a feature
# ---- optimizer
epochs = 100  # an epoch is one crop for every img_size x img_size pixels stored
warmup_epochs = 10.0  # linear warm-up; 40 of 800 in MAE
batch_size = 128  # crops per optimizer step over all processes
grad_accum = 1  # micro-steps a batch is split into, when memory is short
base_lr = 1.5e-4  # per 256 crops: lr = base_lr * batch_size / 256 (MAE); small models and batches bear 10 times as much
min_lr = 0.0  # where the cosine ends
weight_decay = 0.05  # MAE; none on biases, norms and tokens
beta2 = 0.95  # AdamW's second beta; 0.95 in MAE, 0.999 is slower to forget
clip_grad = 0.0  # largest global gradient norm; 0 = no clipping
# ---- run
out_dir = 'runs/mae'  # one directory a run
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


# ============ method: what is cropped and masked; the target is the crop itself (MaskedAutoencoder.forward_loss in models.py) ============

def get_batch(train, step, *, rank, world, img_size, patch_size, batch_size, scale_min, scale_max, turns, seed):
    """This rank's share of the global batch of `step` -> raw windows (b, C, side, side), boxes, turns, mask noise (b, N).

    Everything random is drawn for the whole batch from (seed, step), the same on every rank: 1 process and 4 see the same crops,
    and a resumed run needs no generator state.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    crops_per_tile = max(1, round((train.meta['tile_size'] / img_size) ** 2))
    ids = epoch_ids(len(train) * crops_per_tile, batch_size, step, seed) % len(train)
    corners, side, boxes, turned = draw_crops(batch_size, train.meta['tile_size'], img_size, scale_min, scale_max, generator, turns)
    noise = torch.rand(batch_size, (img_size // patch_size) ** 2, generator=generator)
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    images, _ = train.batch(ids[mine], corners[mine], side)
    return images, boxes[mine], turned[mine], noise[mine]


@torch.no_grad()
def probe(features, splits, probe_tiles, device):
    """mIoU of a closed-form linear classifier on `features` (raw images -> maps), cross-validated over the labelled pixels of `splits`."""
    pixels = [labelled_pixels(tiles, features, 10_000, probe_tiles, device=device) for tiles in splits]
    return ridge_probe(*map(torch.cat, zip(*pixels)), splits[0].meta['num_classes'])['miou']


@torch.no_grad()
def save_reconstruction(path, model, raw, mean, matrix, meta, img_size, mask_ratio):
    """False colour of four crops: input, what the encoder saw, what the decoder made of it (visible patches as they are).
    Principal components are brought back to bands for it, beside the image with all its bands."""
    x = standardize(raw[:, :, :img_size, :img_size], mean, matrix, meta['nodata'])
    h = img_size // model.encoder.patch_size
    noise = torch.rand(len(x), h * h, generator=torch.Generator().manual_seed(0)).to(x.device)
    _, pred, mask = model(x, mask_ratio, noise)
    patches = patchify(x, model.encoder.patch_size)
    if model.norm_pix_loss:  # the decoder predicts each patch up to its own mean and scale: give them back for the picture
        pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    hidden = mask[..., None].bool()
    back = torch.linalg.pinv(matrix) if matrix.ndim == 2 else 1 / matrix  # out of the standardised space
    images, first = {}, 'input' if len(matrix) == len(mean) else f'{len(matrix)} components'
    for title, shown in {first: patches, f'visible ({1 - mask_ratio:.0%})': patches.masked_fill(hidden, torch.nan),
                         'predicted': torch.where(hidden, pred.float(), patches)}.items():
        image = unpatchify(shown, model.encoder.patch_size, h, h)
        image = (back @ image.flatten(2)).reshape(len(x), -1, *x.shape[2:]) if back.ndim == 2 else image * back[:, None, None]
        images[title] = (image + mean[:, None, None]).cpu().numpy()
    if len(matrix) < len(mean):
        images = {'all bands': raw[:, :, :img_size, :img_size].cpu().float().numpy(), **images}
    figure = Figure(figsize=(2.35 * len(images), 2.4 * len(x)), layout='constrained')
    axes = figure.subplots(len(x), len(images), squeeze=False)
    for column, (title, image) in enumerate(images.items()):
        for row in range(len(x)):
            unseen = np.isnan(image[row, 0])[..., None]
            axes[row, column].imshow(np.where(unseen, 0.5, false_color(image[row], meta)), interpolation='nearest')
            axes[row, column].set(xticks=[], yticks=[])
            axes[0, column].set_title(title)
    save_figure(figure, path)


def save_curves(path, log):
    """Loss and probe over the steps, with the floors and the random encoder (the probe at step 0) as lines."""
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot([e['step'] for e in log if 'loss' in e], [e['loss'] for e in log if 'loss' in e])
    left.set(xlabel='step', ylabel='loss (mean squared error)', ylim=(0, None))
    probed = [e for e in log if 'probe_miou' in e]
    if probed:
        right.plot([e['step'] for e in probed], [100 * e['probe_miou'] for e in probed], 'o-', label='frozen encoder')
        lines = {'random encoder': probed[0]['probe_miou'], **{k: v for k, v in probed[0].items() if k.endswith('floor')}}
        for (name, value), style in zip(lines.items(), ('-.', ':', '--')):
            right.axhline(100 * value, color='gray', linestyle=style, label=name)
        right.set(xlabel='step', ylabel='linear probe, mIoU in %')
        right.legend(fontsize=8)
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
    sources, windows = open_sources(data, bands, img_size, pin_memory=device.type == 'cuda')
    train, meta, components = sources[0], sources[0].meta, None
    config['wavelengths_nm'] = meta['wavelengths_nm']  # into the checkpoint: data of other bands can be brought to these
    if pca:
        if len(sources) > 1:
            raise UserError(f'--pca={pca}: the components of one scene are not those of another: give one directory in --data')
        components, shares = principal_components(meta, pca)
        config['components'] = components.tolist()
        print0(f'{pca} principal components hold {float(shares.sum()):.2%} of the variance: '
               + ', '.join(f'{share:.2%}' for share in shares))
        if rank == 0:
            write_json(os.path.join(out_dir, 'pca.json'), {
                'explained_variance': shares.tolist(), 'components': components.tolist(), 'mean': meta['mean'],
                'wavelengths_nm': meta['wavelengths_nm']})
    statistics = [[t.to(device) for t in standardization(source.meta, whiten, components)] for source in sources]  # each its own
    prepares = [functools.partial(standardize, mean=mean, matrix=matrix, nodata=source.meta['nodata'])
                for source, (mean, matrix) in zip(sources, statistics)]
    (mean, matrix), prepare = statistics[0], prepares[0]
    watched = rank == 0 and all(os.path.exists(os.path.join(train.directory, f'{split}_labels.npy')) for split in ('tr', 'val'))
    if watched:
        # Tiles of their own: a batch waits in the buffers of `train`
        probe_splits = [Tiles(train.directory, split, bands=bands) for split in ('tr', 'val')]
        floors = {f'{name} floor': probe(spectrum_features(meta, windows, device), probe_splits, probe_tiles, device)
                  for name, windows in FLOORS.items()}
    crops = sum(windows)
    total_steps = max(1, round(epochs * crops / batch_size))
    warmup_steps = min(round(warmup_epochs * crops / batch_size), total_steps // 2)
    last_step = min(max_steps or total_steps, total_steps)

    # ---- model
    if size not in SIZES:
        raise UserError(f'--size={size}: choose one of {", ".join(SIZES)}')
    decoder = {'tiny': (96, 2, 4), 'small': (256, 4, 8), 'base': (512, 8, 16)}[size]
    encoder_args = dict(img_size=img_size, patch_size=patch_size, in_chans=len(matrix), dropout=dropout, **SIZES[size])
    public = public_shape(init_from)
    if public and (public['num_register_tokens'] or public['init_values'] or public['ffn'] != 'mlp'):
        raise UserError(f'{init_from}: has registers, LayerScale or SwiGLU, which a masked autoencoder has not: pass a file of MAE here, and '
                        'this one to pretrain_dino.py')
    encoder_args.update({name: public[name] for name in SIZES[size] if name in public})
    model = MaskedAutoencoder(**encoder_args, decoder_embed_dim=decoder[0], decoder_depth=decoder[1], decoder_num_heads=decoder[2],
                              norm_pix_loss=norm_pix_loss, freeze_encoder=freeze_encoder).to(device)
    if init_from:
        print0(start_from(init_from, model, None if pca else meta['wavelengths_nm'], rgb_kernels))
    encoder_args['fixed_positions'] = True  # as MaskedAutoencoder builds its ViT; load_encoder builds it from these
    print0(f'{sum(p.numel() for p in model.parameters()):,} parameters; {len(matrix)} {"components" if pca else "bands"}, {img_size} px crops, '
           f'{(img_size // patch_size) ** 2} patches of {patch_size} px, {mask_ratio:.0%} hidden; {crops} crops an epoch, '
           f'{total_steps} steps of {batch_size}; {device}, {dtype}, {world} process(es); {out_dir}')

    # ---- optimizer
    lr = base_lr * batch_size / 256
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=(0.9, beta2), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')

    if device.type == 'cpu' and rank == 0:  # how long will this take? forward and backward of 8 crops tell
        sample, tick = torch.randn(8, len(matrix), img_size, img_size), time.time()
        with autocast():
            model(sample, mask_ratio)[0].backward()
        optimizer.zero_grad()
        hours = (time.time() - tick) / 8 * batch_size / world * last_step / 3600
        print(f'on this CPU: about {hours:.1f} hours' + (', try --size=tiny, fewer --epochs or --max_steps' if hours > 1 else ''))

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
    crop = functools.partial(get_batch, rank=rank, world=world, img_size=img_size, patch_size=patch_size, batch_size=batch_size,
                             scale_min=scale_min, scale_max=scale_max, turns=turns, seed=seed)
    draw = lambda step: crop(sources[pick_source(windows, step, seed)], step)  # a batch comes from one data set
    batch = draw(step)
    bar = tqdm(total=last_step, initial=step, disable=rank > 0, unit='step', dynamic_ncols=True)
    while step <= last_step:
        # ---- evaluate: the encoder as it is now, before the step; at step 0 it is the random encoder
        if rank == 0 and (step == last_step or step == 0 or (eval_every and step % eval_every == 0)):
            model.eval()
            if watched and not any(e['step'] == step and 'probe_miou' in e for e in log):
                with autocast():
                    miou = probe(lambda raw: dense_features(model.encoder, prepare(raw)), probe_splits, probe_tiles, device)
                log.append({'step': step, 'probe_miou': miou, **floors})
                append_line(log_path, log[-1])
                bar.write(f'step {step}: probe mIoU {miou:.3f}; random encoder {log[0]["probe_miou"]:.3f}, '
                          + ', '.join(f'{name} {value:.3f}' for name, value in floors.items()))
            shown = train.resampled(torch.from_numpy(np.array(train.images[:4]))).to(device)
            save_reconstruction(os.path.join(out_dir, 'reconstruction.png'), model, shown, mean, matrix, meta, img_size, mask_ratio)
            save_curves(os.path.join(out_dir, 'curves.png'), log)
            model.train()
        if step == last_step:
            break

        # ---- boilerplate: seed this step
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # dropout differs between ranks, never between resumed runs
        # ---- end of boilerplate: seed this step
        for group in optimizer.param_groups:
            group['lr'] = cosine(step, total_steps, warmup_steps, lr, min_lr)

        # ---- method: forward, loss, backward. Target: the standardised pixels of the hidden patches; pixels cannot collapse
        total_loss, extras = 0.0, {}
        pieces = [t.to(device, non_blocking=True).chunk(grad_accum) for t in batch]
        source = pick_source(windows, step, seed)
        for raw, boxes, turned, noise in zip(*pieces):
            x = resized_crop(prepares[source](raw), boxes, turned, img_size)
            with autocast():
                loss, _, _ = net(x, mask_ratio, noise)
            scaler.scale(loss / grad_accum).backward()
            total_loss += loss.detach() / grad_accum
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
