"""The CNN to compare with: DeepLabV3+ (arXiv 1802.02611) on ResNetV1c-50, trained from scratch.

It sees no unlabelled tile: its scores are what a budget of labels buys without pre-training. Tiles,
losses, scores and report are those of segment.py, the network is another.

    python baseline_deeplab.py                                 # demo data, minutes on a CPU
    python baseline_deeplab.py --size=base --data=data/mine    # the dissertation's, on one GPU
    torchrun --nproc_per_node=4 baseline_deeplab.py --size=base --data=data/mine

Writes out_dir: last.pt, log.jsonl, curves.png, and of the best state on the validation split
best.pt, report.json, confusion.png, examples.png. The same command again resumes a run.

Where to start: the training loop, and models.DeepLabV3Plus. Blocks headed `judge` are the same in
segment.py, those headed `shell` in every script: skip these at first.

Shapes: B crops, C bands, K classes.
"""
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
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (UserError, Tiles, demo_if_missing, draw_crops, epoch_ids, evaluate, floors,
                  kept_meta, label_to_class, lock_directory, next_command, plain_errors,
                  predict_tile, read_flags, report, resized_crop, resized_crop_labels,
                  save_confusion, save_examples, save_figure, scene_flags, scores, standardization,
                  standardize)
from models import (DeepLabV3Plus, load_checkpoint, loss_count, native_bfloat16, parameter_groups,
                    resume_from, save_checkpoint, segmentation_loss, start_from)

# ---- data
data = 'data/demo'  # tile directory with labels; the demo is made on first use
label_share = 1.0  # share of the labelled pixels of tr and val that is used, drawn at random
crop_size = 32  # side of the training crops, px; 0: whole tiles
augment = True  # random flips, quarter turns and resized crops
whiten = 16  # ZCA of this many leading components; 0: each band to mean 0 and std 1
# ---- model
size = 'tiny'  # tiny | base: the network, and what goes with it (PRESETS)
width = 16  # channels of the first stage; 64 in ResNet-50
output_stride = 8  # px between two features of the last stage; 16 suits tiles of 512 px
stem = 'three'  # three | seven: three 3x3 convolutions (ResNetV1c), or one 7x7 (torchvision's)
init_from = ''  # last.pt of a run, or of tools/convert_weights.py (resnet50.pth; stem seven)
# ---- loss
criterion = 'ce'  # ce | focal | dice: cross-entropy, focal loss with gamma 2, soft Dice
class_weights = 'none'  # none | sqrt | inverse: of 1 / (a class's training pixels); not for dice
# ---- optimizer
steps = 800  # length of the run
batch_size = 16  # crops per step, over all processes
lr = 1e-3  # of AdamW; 1e-4 in the dissertation
weight_decay = 0.05  # on matrices only
clip_grad = 5.0  # largest norm of a gradient; 0: any
# ---- run
out_dir = 'runs/deeplab'  # one directory a run
max_steps = 0  # stop here, to go on later; 0: at the end
seed = 0  # of random weights, order of the tiles, and the labels that label_share keeps
log_every = 20  # steps
eval_every = 100  # steps between scores on the validation split
save_every = 100  # steps between checkpoints
dtype = 'auto'  # auto | bfloat16 | float16 | float32: auto is bfloat16 where hardware has it
compile = True  # torch.compile, on a GPU
cuda_graphs = False  # of a compiled step, on one GPU: not tried here
wandb_log = False  # send the log to wandb.ai as well

PRESETS = {
    'tiny': {},  # the values above
    'base': dict(width=64, output_stride=16, crop_size=0, batch_size=8, steps=40_000),
}


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

def learning_rate(step):
    """From its peak down to 0, nearly on a straight line (the `poly` schedule)"""
    return lr * (1 - step / steps) ** 0.9


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

    # ---- shell: what was saved here before
    last_path = os.path.join(out_dir, 'last.pt')
    checkpoint = resume_from(last_path, __file__, config, meta)  # None in a new run

    # ---- model and optimizer
    encoder_args = dict(in_chans=meta['num_bands'], num_classes=meta['num_classes'],
                        output_stride=output_stride, stem=stem, width=width)
    name = 'DeepLabV3+'
    model = DeepLabV3Plus(**encoder_args)
    if init_from and not checkpoint:
        print(start_from(init_from, model, __file__, whiten, meta))
    if world > 1 and on_gpu:
        # it has no CPU form: there the norms see the crops of their own process only
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device).train()
    if on_gpu:
        model.to(memory_format=torch.channels_last)  # convolutions of bfloat16 are faster in it
    torch.backends.cudnn.deterministic = True
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), fused=True)

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
    print(f'{name}, {sum(p.numel() for p in model.parameters()):,} parameters; '
          f'{len(labelled)} labelled training tiles, crops of {crop_size} px; '
          f'steps {step} to {last_step} of {steps} ({epochs:.1f} epochs); '
          f'{device}, {dtype}, {world} process(es); {out_dir}')

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
            group['lr'] = learning_rate(step)

        # one step: logits of each pixel, from the last stage and (auxiliary) from stage 3
        x = prepare(batch.raw)
        target = label_to_class(batch.labels.to(device, non_blocking=True))
        if augment:
            x = resized_crop(x, batch.boxes, batch.flips, crop_size)
            target = resized_crop_labels(target, batch.boxes, batch.flips, crop_size)
        with autocast:
            logits, auxiliary = net(x)
        # the mean over all known pixels of the batch, whatever their number on each rank
        count = loss_count(target, weight, criterion)
        if world > 1:
            dist.all_reduce(count)
        count = count.clamp(min=1e-12) / world  # DDP takes the mean of the ranks' gradients
        main_loss = segmentation_loss(logits, target, weight, criterion)
        auxiliary_loss = segmentation_loss(auxiliary, target, weight, criterion)
        loss = (main_loss + 0.4 * auxiliary_loss) / count
        scaler.scale(loss).backward()
        batch = get_batch(train, labelled, step + 1, rank, world)  # while the GPU is at work
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)

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
