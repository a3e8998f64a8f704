"""Judge an encoder: a decoder on its features, scored on the labelled tiles of the test split.

The encoder is frozen. A decoder sees the feature maps of its last four blocks, and beside them the
pixel's spectrum and its means over small windows, and gives each pixel a class. By default it is
linear and solved (logistic regression is a convex problem), so that only its inputs decide. The
scores stand beside those of floors, which use no network: the window floor is the same decoder on
averaged spectra alone. Compare with a random encoder as well.

    python segment.py                                          # a random encoder: minutes on a CPU
    python segment.py --encoder=runs/mae/last.pt --out_dir=runs/mae_logistic
    torchrun --nproc_per_node=4 segment.py --encoder=runs/mae/last.pt --decoder=linear \\
        --freeze=false --out_dir=runs/mae_tuned                # the encoder learns too

Writes out_dir: best.pt (decoder and encoder), report.json, confusion.png, examples.png. A trained
decoder has last.pt, log.jsonl and curves.png as well; the same command again resumes it, and the
best state on the validation split is scored.

Where to start: the block `a solved decoder` is all that happens by default, the training loop is
for the other decoders. Blocks headed `judge` are the same in baseline_deeplab.py, those headed
`shell` in every script: skip these at first.

Shapes: B tiles or crops, C bands, D width of the encoder, h w its grid of patches, K classes.
"""
import json
import math
import os
import signal
import sys
import time
import zlib
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (UserError, Tiles, demo_if_missing, draw_crops, epoch_ids, evaluate, fit_logistic,
                  floors, kept_meta, label_to_class, labelled_pixels, lock_directory, next_command,
                  plain_errors, predict_tile, read_flags, report, resized_crop, resized_crop_labels,
                  save_confusion, save_examples, save_figure, scene_flags, scores, standardization,
                  standardize)
from models import (SIZES, ViT, build_segmenter, calibrate_norm, check_bands, load_checkpoint,
                    load_encoder, loss_count, native_bfloat16, parameter_groups, resume_from,
                    save_checkpoint, segmentation_loss, tiles_of)

# ---- data
data = ''  # tile directory with labels; '': the encoder's own, of a random one data/demo
label_share = 1.0  # share of the labelled pixels of tr and val that is used, drawn at random
crop_size = 0  # side of the training crops, px; 0: whole tiles
augment = False  # random flips, quarter turns and resized crops
# ---- encoder
encoder = ''  # last.pt of a pre-training run; '': random weights, of the size given below
untrained = False  # random weights in the architecture of that encoder
size = 'tiny'  # tiny | small | base: of a random encoder (PRESETS)
img_size = 16  # of a random encoder: side of its window, px
patch_size = 4  # of a random encoder: side of a patch, px
whiten = 16  # of a random encoder: ZCA of this many components; 0: bands to mean 0 and std 1
freeze = True  # false: the encoder learns too
# ---- decoder
decoder = 'logistic'  # logistic | linear | conv | transformer: the first is solved, others trained
pixel = True  # the decoder also sees spectra: the pixel's, and their means over 3, 5 and 9 px
criterion = 'ce'  # ce | focal | dice: cross-entropy, focal loss with gamma 2, soft Dice
class_weights = 'none'  # none | sqrt | inverse: of 1 / (a class's training pixels); not for dice
# ---- optimizer
steps = 1000  # of a trained decoder; the dissertation stopped after 500 to 5,000
batch_size = 16  # tiles or crops per step, over all processes
lr = 0.0  # of AdamW; 0: 1e-2 for a linear decoder on a frozen encoder, else 1e-3
layer_decay = 1.0  # fine-tuning: learning rate of a block over that of the one above it
weight_decay = 0.01  # on matrices only
# ---- run
out_dir = 'runs/segment'  # one directory a run
max_steps = 0  # stop here, to go on later; 0: at the end
seed = 0  # of random weights, order of the tiles, and the labels that label_share keeps
log_every = 20  # steps
eval_every = 100  # steps between scores on the validation split
save_every = 100  # steps between checkpoints
dtype = 'auto'  # auto | bfloat16 | float16 | float32: auto is bfloat16 where hardware has it
compile = True  # torch.compile, on a GPU
cuda_graphs = False  # of a compiled step, on one GPU: not tried here
wandb_log = False  # send the log to wandb.ai as well

LARGE = dict(img_size=64, patch_size=8)
PRESETS = {'tiny': {}, 'small': LARGE, 'base': LARGE}
METHODS = {'pretrain_mae.py': 'MAE', 'pretrain_dino.py': 'DINOv2',
           'pretrain_dino_hsi.py': 'HSI-DINOv2', 'pretrain_lejepa.py': 'LeJEPA',
           'segment.py': 'ViT of segment.py'}


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


# ============ method ============

def get_encoder(meta):
    """-> the encoder to be judged, with .args and .whiten as load_encoder() sets them; its name"""
    if not encoder:
        args = dict(img_size=img_size, patch_size=patch_size, in_chans=meta['num_bands'],
                    fixed_positions=True, **SIZES[size])
        vit = ViT(**args)
        vit.args, vit.whiten = args, whiten
        return vit, 'random ViT' if freeze else 'ViT from scratch'
    vit = load_encoder(encoder)
    check_bands(vit.meta, meta, encoder)
    if vit.meta['mean'] != meta['mean']:
        print(f'{data} is not what {encoder} learned from: the statistics of {data} are used')
    method = METHODS.get(vit.script, vit.script)
    if untrained:
        vit.load_state_dict(type(vit)(**vit.args).state_dict())
        method += ' untrained'
    return vit, method


def fill_decoder(model, solved):
    """Write weights (columns + 1, K) of fit_logistic into the linear decoder: those of 4*D features
    and, if there are more columns, of 4*C averaged bands; the last row is the bias."""
    head = model.head.classifier
    weight = solved[:-1].T[..., None, None]  # (K, columns, 1, 1)
    head.weight.data.copy_(weight[:, :head.in_channels])
    head.bias.data.copy_(solved[-1])
    if pixel:
        bands = weight.shape[1] - head.in_channels
        model.pixel_head.bias.data.zero_()
        model.pixel_head.weight.data.zero_()
        model.pixel_head.weight.data[:, :bands] = weight[:, head.in_channels:]


def learning_rate(step):
    """From its peak down to 0, nearly on a straight line (the `poly` schedule)"""
    peak = lr or (1e-2 if freeze and decoder == 'linear' else 1e-3)
    return peak * (1 - step / steps) ** 0.9


def without_effect():
    """-> flags of the command line that this run does not look at"""
    idle = []
    if encoder:
        idle += ['size', 'img_size', 'patch_size', 'whiten']
    if decoder == 'logistic':
        idle += ['steps', 'max_steps', 'batch_size', 'lr', 'weight_decay']
    if freeze or untrained or not encoder:
        idle += ['layer_decay']
    given = {word.split('=')[0] for word in sys.argv}
    return [f'--{name}' for name in idle if f'--{name}' in given]


# ============ judge: batches with labels ============

class Batch(NamedTuple):
    """One rank's share of a step's batch"""
    ids: np.ndarray  # (B,) numbers of the tiles
    raw: torch.Tensor  # (B, C, side, side) windows as stored
    labels: torch.Tensor  # (B, side, side) as stored: 0 is unlabelled
    boxes: torch.Tensor  # (B, 4) the crop in each: top, left, height, width
    flips: torch.Tensor  # (B, 3) flip rows, flip columns, transpose


def get_batch(tiles, labelled, step, rank=0, world=1):
    """Which of the `labelled` tiles are seen at `step`, and which crops of them -> Batch.

    Drawn for the whole batch from (seed, step): the same on one process and on four, and in a run
    that was resumed.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    ids = labelled[epoch_ids(len(labelled), batch_size, step, seed)]
    scale_min = 0.4 if augment else 1.0
    corners, side, boxes, flips = draw_crops(batch_size, tiles.meta['tile_size'], crop_size,
                                             scale_min, 1.0, generator, augment)
    here = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    raw, labels = tiles.batch(ids[here], corners[here], side, reuse=True)
    return Batch(ids[here], raw, labels, boxes[here], flips[here])


def save_curves(path, log):
    """Training loss, and mIoU on the validation split, over the steps"""
    figure = Figure(figsize=(9, 3.2), layout='constrained')
    for axis, key in zip(figure.subplots(1, 2), ('loss', 'val_miou')):
        entries = [entry for entry in log if key in entry]
        axis.plot([entry['step'] for entry in entries], [entry[key] for entry in entries])
        axis.set(xlabel='step', ylabel=key)
    save_figure(figure, path)


# ============ the run ============

if __name__ == '__main__':
    plain_errors()
    config = read_flags(globals(), PRESETS)  # the constants of this run
    if untrained and not encoder:
        raise UserError('--untrained: the architecture of which encoder? Pass --encoder= as well')
    if not data:
        data = tiles_of(load_encoder(encoder), encoder) if encoder else 'data/demo'
    config['data'] = data

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

    # ---- judge: tiles with labels
    train = Tiles(data, 'tr', on_gpu, label_share, seed)
    test = Tiles(data, 'ts')
    meta = train.meta
    for split in ('tr', 'ts'):
        if not sum(meta['class_counts'][split]):
            raise UserError(f'{data}: its tiles of "{split}" have no labels, and a segmentation '
                            'needs them: tile scenes that have some')
    if meta['num_classes'] < 2:
        raise UserError(f'{data}: its labels know one class, and 0 means unlabelled: store a mask '
                        'of 0 and 1 as 1 and 2, and tile again')
    labelled = np.flatnonzero(train.labels.any(axis=(1, 2)))  # the tiles that have some
    tile_size = meta['tile_size']
    crop_size = min(crop_size or tile_size, tile_size)

    # ---- encoder and decoder
    solvable = freeze and not augment and criterion == 'ce' and class_weights == 'none'
    if decoder == 'logistic' and not (solvable and crop_size == tile_size):
        raise UserError('--decoder=logistic: a solved decoder takes a frozen encoder, whole tiles '
                        'and plain cross-entropy, no --augment: choose --decoder=linear')
    idle = without_effect()
    if idle:
        print('without effect in this run:', ', '.join(idle))
    vit, method = get_encoder(meta)
    encoder_args = vit.args
    whiten = config['whiten'] = vit.whiten
    config['encoder_crc32'] = 0
    if encoder:
        with open(encoder, 'rb') as file:  # a run on another state of the encoder is another run
            config['encoder_crc32'] = zlib.crc32(file.read())
    name = f'{method} + {decoder}'
    if crop_size % vit.patch_size or tile_size % vit.patch_size:
        raise UserError(f'tiles of {tile_size} px and crops of {crop_size} px do not divide into '
                        f'patches of {vit.patch_size} px: pass another --crop_size, or tile again')
    model = build_segmenter(vit, meta['num_classes'], decoder, freeze, pixel).to(device).train()
    if world > 1 and on_gpu and not freeze:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # it has no CPU form
    torch.backends.cudnn.deterministic = True
    print(f'{name}: encoder of {sum(p.numel() for p in vit.parameters()):,} parameters, '
          f'{"frozen" if freeze else "trained"}; {len(labelled)} labelled training tiles, crops of '
          f'{crop_size} px; {device}, {dtype}, {world} process(es); {out_dir}')

    # ---- shell: what was saved here before
    last_path = os.path.join(out_dir, 'last.pt')
    checkpoint = resume_from(last_path, __file__, config, meta)  # None in a new run

    # ---- judge: scores
    mean, matrix = (t.to(device) for t in standardization(meta, whiten))
    best_path = os.path.join(out_dir, 'best.pt')
    resume_from(best_path, __file__, config, meta)  # refuses that of another run
    facts = {'config': config, 'encoder_args': encoder_args, 'window': crop_size,
             'meta': kept_meta(meta), 'script': os.path.basename(__file__)}

    def prepare(raw):
        """Raw values, any type -> whitened or standardised (B, C, H, W) float32"""
        return standardize(raw.to(device, non_blocking=True), mean, matrix, meta['nodata'])

    def probabilities(raw):
        """Raw (B, C, h, w) -> (B, K, h, w)"""
        with autocast:
            return model(prepare(raw)).float().softmax(1)

    def predict(raw):
        """A raw tile (1, C, S, S) -> classes (1, S, S)"""
        return predict_tile(probabilities, raw, crop_size, meta['num_classes']).argmax(1)

    def validate():
        """Score the network as it is on the validation split; the best so far goes to best.pt"""
        model.eval()
        result = scores(evaluate(predict, val, rank, world, device))
        model.train()
        best = max((entry['val_miou'] for entry in log if 'val_miou' in entry), default=-1.0)
        miou = result['miou']
        record({'step': step, 'val_miou': miou, 'val_oa': result['oa']})
        bar.write(f'step {step}: mIoU on val {100 * miou:.1f} %')
        if main_process:
            save_curves(os.path.join(out_dir, 'curves.png'), log)
            if miou <= best and not os.path.exists(best_path):
                bar.write(f'{best_path} with {100 * best:.1f} % is gone: this state replaces it')
            if miou > best or not os.path.exists(best_path):
                state = {'model': model.state_dict(), 'step': step, 'val_miou': miou}
                save_checkpoint(best_path, {**state, **facts})

    def judge_and_leave(about, rows):
        """Score the network as it is on the test split, and end. `about` goes into report.json,
        `rows` (name -> scores()) into the printed table."""
        model.eval()
        cm = evaluate(predict, test, rank, world, device)
        if main_process:
            floor = floors(data, 'ts', label_share, seed)
            about = {'name': name, 'config': config, 'floors': floor, **about}
            report(out_dir, name, cm, {**floor, **rows}, meta, about)
            save_confusion(os.path.join(out_dir, 'confusion.png'), cm, meta['class_names'])
            save_examples(os.path.join(out_dir, 'examples.png'), predict, test)
            map_path = os.path.join(out_dir, 'map.tif')
            print('to map a scene:\n' + next_command('tools/map_scene.py', run=out_dir,
                                                     out=map_path, **scene_flags(meta)))
        if world > 1:
            dist.barrier()  # rank 0 may still be at its last pictures: leave together
            dist.destroy_process_group()
        sys.exit()

    # ---- a solved decoder
    def features_of(x):
        """Standardised tiles -> maps of the frozen encoder (B, 4*D, h, w)"""
        with autocast:
            return model.features(x).float()

    def features(raw):
        return features_of(prepare(raw))

    def features_and_spectra(raw):
        """Raw -> (B, 4*D + 4*C, H, W), what the logits of a pixel are linear in"""
        x = prepare(raw)
        maps = F.interpolate(features_of(x), x.shape[-2:], mode='bilinear')
        return torch.cat([maps, model.spectra(x)], dim=1)

    if decoder == 'logistic':
        if stop_signal:
            sys.exit(128 + stop_signal)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # there is nothing to save before the end
        inputs = features_and_spectra if pixel else features
        x, y, _ = labelled_pixels(train, inputs, 50_000, device=device)
        print(f'solving the decoder on {len(y):,} labelled pixels of the training tiles (each '
              'counts once for every tile it is in): minutes')
        about, rows = {'best_step': 0}, {}
        if pixel:  # first without it
            columns = 4 * vit.embed_dim
            fill_decoder(model, fit_logistic(x[:, :columns], y, meta['num_classes']))
            model.eval()
            alone = scores(evaluate(predict, test, rank, world, device))
            about['scores_without_pixel'] = rows['without the spectrum'] = alone
        fill_decoder(model, fit_logistic(x, y, meta['num_classes']))
        if main_process:
            save_checkpoint(best_path, {'model': model.state_dict(), 'step': 0, **facts})
        judge_and_leave(about, rows)  # the script ends here

    # ---- a trained decoder: maps of a frozen encoder are computed once, if 4 GB hold them
    known_maps = {}
    if freeze:
        num_patches = (tile_size // vit.patch_size) ** 2
        gigabytes = len(labelled) * num_patches * 4 * vit.embed_dim * 4 / 1e9
        if gigabytes < 4 and not augment and crop_size == tile_size:
            known_maps = {i: features(train.batch([i])[0]) for i in labelled.tolist()}
        sample = labelled[::1 + len(labelled) // 2000].tolist()
        maps = known_maps.values() or (features(train.batch([i])[0]) for i in sample)
        calibrate_norm(model.head.norm, maps)
    else:  # DDP would wait for gradients of what features do not use (mask tokens): find it once
        x = prepare(train.batch([0])[0])[..., :crop_size, :crop_size]
        model.eval()(x).sum().backward()
        for parameter in model.train().parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    # ---- judge: validation split, weights of the classes in the loss
    val = Tiles(data, 'val', False, label_share, seed)
    if not sum(meta['class_counts']['val']):
        raise UserError(f'{data}: its tiles of "val" have no labels, and the best state is chosen '
                        'by them: tile again with other --shares')
    weight = torch.ones(meta['num_classes'], device=device)
    if class_weights != 'none' and criterion == 'dice':
        raise UserError(f'--class_weights={class_weights}: soft Dice counts all classes alike: '
                        'leave it out, or choose another --criterion')
    if class_weights != 'none':
        counts = sum(np.bincount(tile.ravel(), minlength=256) for tile in train.labels)
        pixels = weight.new_tensor(counts[1:meta['num_classes'] + 1])
        weight = pixels.clamp(min=1) ** {'sqrt': -0.5, 'inverse': -1.0}[class_weights]
        weight = weight / weight.mean()

    # ---- optimizer
    random = untrained or not encoder  # what was not pre-trained learns at one rate
    groups = parameter_groups(model, weight_decay, 1.0 if random else layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)

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

    # ---- what this run is
    epochs = steps * batch_size / len(labelled)
    print(f'steps {step} to {last_step} of {steps} ({epochs:.1f} epochs)')

    # ---- shell: compile and DDP
    if compile and on_gpu:  # in place: parameters keep their names
        model.compile(mode='reduce-overhead' if cuda_graphs and world == 1 else 'default')
    net = DistributedDataParallel(model) if world > 1 else model

    # ---- training loop
    batch = get_batch(train, labelled, step, rank, world)
    bar = tqdm(total=last_step, initial=step, disable=not main_process)
    started = time.time() - max((entry.get('seconds', 0) for entry in log), default=0)
    while True:
        if step % eval_every == 0 or step == steps:
            validate()
        if step >= last_step:
            break
        torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)  # of dropout
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step) * group['lr_scale']

        # one step: logits of each pixel, from maps that are known or through the encoder
        x = prepare(batch.raw)
        target = label_to_class(batch.labels.to(device, non_blocking=True))
        if augment:
            x = resized_crop(x, batch.boxes, batch.flips, crop_size)
            target = resized_crop_labels(target, batch.boxes, batch.flips, crop_size)
        maps = None
        if known_maps:
            maps = torch.cat([known_maps[i] for i in batch.ids.tolist()])
        with autocast:
            logits = net(x, maps)
        # the mean over all known pixels of the batch, whatever their number on each rank
        count = loss_count(target, weight, criterion)
        if world > 1:
            dist.all_reduce(count)
        count = count.clamp(min=1e-12) / world  # DDP takes the mean of the ranks' gradients
        loss = segmentation_loss(logits, target, weight, criterion) / count
        scaler.scale(loss).backward()
        batch = get_batch(train, labelled, step + 1, rank, world)  # while the GPU is at work
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
            mean_loss = loss.detach() / world
            if world > 1:
                dist.all_reduce(mean_loss)
            record({'step': step, 'loss': mean_loss.item(), 'lr': learning_rate(step - 1),
                    'grad_norm': norm.item(), 'seconds': time.time() - started})
            bar.set_postfix(loss=f'{mean_loss.item():.4f}')

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

    # ---- judge: the best state, on the test split
    bar.close()
    if world > 1:
        dist.barrier()  # rank 0 has written best.pt
    if stop_signal:  # while the last state was scored
        print(f'interrupted by signal {stop_signal}: the same command scores it again')
        sys.exit(128 + stop_signal)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # all is saved: from here on a signal ends at once
    best = load_checkpoint(best_path)
    model.load_state_dict(best['model'])
    print(f'the best state on val is that of step {best["step"]}')
    judge_and_leave({'best_step': best['step']}, {})
