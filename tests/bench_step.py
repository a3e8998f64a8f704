"""Speed of the main job at ViT-B/8, 65,536 prototypes. Prints ratios measured in this run.

    python tests/bench_step.py [batch]          # needs a minute or two for each tile of the batch
    python tests/bench_step.py peers [batch]    # 4 below alone

1. pretrain_dino's step in bfloat16 against float32, plain and compiled, and each against a matrix product of its type: a step is divided by
   the mean of the products just before and after it, so that a busy machine slows both alike.
2. The student's crops in two passes (one for each size) against one pass a crop.
3. Augmentation of 32 tiles into 2 + 8 crops, batched, against a loop over samples with torch's own operations.
4. A step of pretrain_mae and of pretrain_dino against the same step of public code, where that is installed
   (pip install transformers lightly timm): transformers' ViTMAEForPreTraining, lightly's DINOv2 parts on timm's ViT.
"""
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import pretrain_dino
from data import Statistics, draw_crops
from models import native_bfloat16, parameter_groups

BFLOAT16 = native_bfloat16(torch.device('cpu'))  # emulated it would take minutes a step
CONSTANTS = {**pretrain_dino.PRESETS['base'], 'size': 'base', 'out_dim': 65_536, 'drop_path_rate': 0.0, 'koleo_weight': 0.1, 'mask_probability': 0.5,
             'mask_ratio_min': 0.1, 'mask_ratio_max': 0.5, 'gain': 0.05, 'offset': 0.1, 'noise': 0.2, 'band_dropout': 0.2}
for name, value in CONSTANTS.items():
    setattr(pretrain_dino, name, value)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def make_step(dtype, batch, compiled=False):
    """One optimizer step as the training loop makes it, on random crops -> function, model, crops"""
    torch.manual_seed(0)
    model, _ = pretrain_dino.build_model({'num_bands': 32})
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.04), lr=1e-4, fused=True)
    if compiled:
        model.compile()
        model.teacher.compile()
    big, small = torch.randn(2 * batch, 32, 64, 64), torch.randn(8 * batch, 32, 32, 32)
    mask = pretrain_dino.block_masks(2 * batch, 8, 8, np.random.default_rng(0))
    rows = mask.flatten().nonzero()[:, 0]

    def step():
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
            with torch.no_grad():
                taught = model.teacher(big, None, rows)
            said = model(big, mask, rows, small)
        loss, _ = pretrain_dino.stream_loss(said, taught, mask, rows, 0.05)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(0.99)
    return step, model, (big, small)


def flops_of(step):
    """Multiplications and additions of the matrix products in a step (attention's too)."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def steps_and_products(batch, rounds=5):
    kinds = [('float32', False), ('float32', True), *([('bfloat16', False), ('bfloat16', True)] if BFLOAT16 else [])]
    steps = {kind: make_step(kind[0], batch, kind[1]) for kind in kinds}
    flops = flops_of(steps['float32', False][0])
    for step, *_ in steps.values():
        step()  # compiles
    tokens = 2 * batch * 69
    product_flops = 2 * tokens * 768 * 3072
    repeats = max(1, int(2e11 / product_flops))
    times, shares, rates = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            a, b = torch.randn(tokens, 768, dtype=getattr(torch, kind[0])), torch.randn(768, 3072, dtype=getattr(torch, kind[0]))
            before, step_time, after = (seconds(f) for f in (lambda: [a @ b for _ in range(repeats)], steps[kind][0], lambda: [a @ b for _ in range(repeats)]))
            times[kind].append(step_time)
            rates[kind].append(2 * repeats * product_flops / (before + after) / 1e9)
            shares[kind].append(flops / step_time / 1e9 / rates[kind][-1])
    print(f'{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}; ViT-B/8, 65,536 prototypes, batch {batch}, '
          f'2 x 64 px + 8 x 32 px, {flops / 1e12:.2f} TFLOP a step, medians of {rounds}')
    median = {kind: statistics.median(times[kind]) for kind in kinds}
    for kind in kinds:
        print(f'{kind[0]}{", compiled" * kind[1]}: {median[kind]:.2f} s a step; a product of {tokens} x 768 x 3072: {statistics.median(rates[kind]):.0f} GFLOP/s; '
              f'share {statistics.median(shares[kind]):.0%} ({", ".join(f"{share:.0%}" for share in shares[kind])})')
    if BFLOAT16:
        print(f'bfloat16 is {median["float32", False] / median["bfloat16", False]:.2f} times as fast as float32')
    else:
        print('bfloat16: not measured, this CPU only emulates it')
    return steps


def passes(model, big, small, rounds=5):
    """Student forward and backward: all crops of a size in one pass, or crop by crop."""
    def one_pass_a_size():
        sum(model.student.encoder(x).square().mean() for x in (big, small)).backward()

    def one_pass_a_crop():
        sum(model.student.encoder(x).square().mean() for x in (*big.chunk(2), *small.chunk(8))).backward()
    times = {f: [] for f in (one_pass_a_size, one_pass_a_crop)}
    for _ in range(rounds):
        for f in times:
            with torch.autocast('cpu', torch.bfloat16, enabled=BFLOAT16):
                times[f].append(seconds(f))
    print(f'student in 2 passes is {statistics.median(times[one_pass_a_crop]) / statistics.median(times[one_pass_a_size]):.2f} times as fast as in 10')


def augmentation(rounds=5):
    """32 tiles of 32 x 64 x 64 -> 2 + 8 crops: the script's make_crops against a loop over samples with torch's own operations, which does the
    same work: invalid pixels stay known, the same share of crops is blurred."""
    torch.manual_seed(0)
    raw = torch.randint(0, 3000, (32, 32, 64, 64), dtype=torch.int16)
    generator = torch.Generator().manual_seed(0)
    crops = [draw_crops(32, 64, 64, *scale, generator) for scale in [(0.4, 1.0)] * 2 + [(0.15, 0.4)] * 8]
    boxes, flips = torch.stack([crop.boxes for crop in crops], 1), torch.stack([crop.flips for crop in crops], 1)
    draws = torch.rand(32, 10, 13)  # two for the blur, then the light
    gauss = torch.exp(-torch.linspace(-2, 2, 5).square())
    kernel = (gauss[:, None] * gauss / gauss.sum() ** 2).expand(33, 1, 5, 5).contiguous()
    mean, matrix = torch.full((32,), 1500.0), torch.eye(32) / 900
    values = Statistics(mean, torch.full((32,), 900.0), matrix)
    no_mask, no_rows = torch.zeros(64, 64, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    batch = pretrain_dino.Batch(raw, boxes, flips, draws, no_mask, no_rows)

    def batched():
        return pretrain_dino.make_crops(batch, values, None, 0)

    def loop():
        out = [[], []]
        for i in range(32):
            for view in range(10):
                top, left, height, width = boxes[i, view].tolist()
                size, draw = (64, 32)[view > 1], draws[i, view, 2:]
                x = raw[i:i + 1, :, top:top + height, left:left + width].float()
                valid = torch.isfinite(x).all(1, keepdim=True)
                x = torch.cat([torch.where(valid, x - mean[:, None, None], 0.0), valid.float()], 1)
                x = F.interpolate(x, size=(size, size), mode='bilinear', antialias=True, align_corners=False)
                if draws[i, view, 1] < pretrain_dino.blur:
                    x = F.conv2d(F.pad(x, (2, 2, 2, 2), mode='reflect'), kernel, groups=33)
                if flips[i, view, 0]:
                    x = x.flip(2)
                if flips[i, view, 1]:
                    x = x.flip(3)
                if flips[i, view, 2]:
                    x = x.transpose(2, 3)
                x, valid = x[:, :32], x[:, 32:]
                x = x * (1 + 0.05 * (2 * draw[0] - 1)) + 0.05 * (2 * draw[0] - 1) * 1500 + 0.1 * (2 * draw[2] - 1) * 900
                x = torch.einsum('cd,bdhw->bchw', matrix, x)
                x = x + 0.2 * draw[4] * torch.randn_like(x)
                if draw[8] < 0.2:
                    length = int(draw[9] * 32 / 3) + 1
                    start = int(draw[10] * (33 - length))
                    x[:, start:start + length] = 0
                x = x * valid
                out[view > 1].append(x)
        return [torch.cat(crops) for crops in out]

    times = {f: [] for f in (batched, loop)}
    for f in times:
        f()
    for _ in range(rounds):
        for f in times:
            times[f].append(seconds(f))
    median = {f: statistics.median(values) for f, values in times.items()}
    print(f'augmentation of 32 tiles into 2 + 8 crops: {1000 * median[batched]:.0f} ms batched, {1000 * median[loop]:.0f} ms in a loop over samples: '
          f'{median[loop] / median[batched]:.2f} times as fast')


def compare_steps(name, steps, rounds=5):
    """{whose: function} -> prints seconds a step, and the ratio of each round's pair"""
    for step in steps.values():
        step()
    times = {whose: [] for whose in steps}
    for _ in range(rounds):
        for whose, step in steps.items():
            times[whose].append(seconds(step))
    ours, *others = steps
    print(f'{name}: {ours} {statistics.median(times[ours]):.2f} s a step')
    for whose in others:
        ratios = sorted(other / our for other, our in zip(times[whose], times[ours]))
        print(f'    {whose} {statistics.median(times[whose]):.2f} s: ours is {statistics.median(ratios):.2f} '
              f'times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f} in {rounds} rounds)', flush=True)


def training_step(parameters, loss_of, after=lambda: None):
    """-> function that makes one optimizer step"""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)

    def step():
        with torch.autocast('cpu', torch.bfloat16, enabled=BFLOAT16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step


def mae_peer(batch):
    """pretrain_mae and transformers' ViTMAEForPreTraining, ViT-B/8 with a decoder of 8 blocks of 512"""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    import models
    sizes = dict(img_size=64, patch_size=8, in_chans=32, embed_dim=768, depth=12, num_heads=12)
    ours = models.MaskedAutoencoder(**sizes, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
    theirs = ViTMAEForPreTraining(ViTMAEConfig(image_size=64, patch_size=8, num_channels=32))
    x = torch.randn(batch, 32, 64, 64)
    print('parameters:', *(sum(p.numel() for p in model.parameters()) for model in (ours, theirs)))
    compare_steps(f'masked autoencoder, batch {batch}', {
        'pretrain_mae': training_step(ours.parameters(), lambda: ours(x, 0.75)[0]),
        'transformers': training_step(theirs.parameters(), lambda: theirs(x).loss)})


def dino_peer(batch):
    """pretrain_dino and DINOv2 put together from lightly's parts and timm's ViT, as lightly's example is: the
    same crops, prototypes and masks, one head for both losses"""
    import copy
    import timm
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import update_momentum
    step, model, (big, small) = make_step('bfloat16' if BFLOAT16 else 'float32', batch)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, in_chans=32, num_classes=0, reg_tokens=4, init_values=1e-5,
        dynamic_img_size=True)
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    teacher_backbone = copy.deepcopy(backbone).requires_grad_(False)
    head, teacher_head = (DINOv2ProjectionHead(input_dim=768, output_dim=65_536) for _ in range(2))
    teacher_head.load_state_dict(head.state_dict())
    teacher_head.requires_grad_(False)
    dino, ibot, koleo = DINOLoss(), IBOTPatchLoss(), KoLeoLoss()
    masks = pretrain_dino.block_masks(2 * batch, 8, 8, np.random.default_rng(0)).reshape(-1, 8, 8)
    token_mask = torch.cat([torch.zeros(2 * batch, 5, dtype=torch.bool), masks.flatten(1)], 1)
    prefix = vit.num_prefix_tokens

    def loss_of():
        with torch.no_grad():
            taught = teacher_backbone.encode(big)
            taught_cls, taught_masked = teacher_head(taught[:, 0]), teacher_head(taught[:, prefix:][masks.flatten(1)])
        said = backbone.encode(big, mask=token_mask)
        said_cls, said_masked = head(said[:, 0]), head(said[:, prefix:][masks.flatten(1)])
        local = head(backbone.encode(small)[:, 0])
        return (dino(list(taught_cls.chunk(2)), [*said_cls.chunk(2), *local.chunk(8)], teacher_temp=0.05)
                + ibot(taught_masked, said_masked, masks, teacher_temp=0.05)
                + 0.1 * sum(koleo(half) for half in said[:, 0].chunk(2)))

    def move_teacher():
        update_momentum(backbone, teacher_backbone, m=0.99)
        update_momentum(head, teacher_head, m=0.99)
    theirs = training_step([*backbone.parameters(), *head.parameters()], loss_of, move_teacher)
    compare_steps(f'DINOv2, batch {batch}', {'pretrain_dino': step, 'lightly and timm': theirs})


def peers(batch):
    for compare in (mae_peer, dino_peer):
        try:
            compare(batch)
        except ImportError as error:
            print(f'{compare.__name__}: not measured ({error})')


if __name__ == '__main__':
    if sys.argv[1:2] == ['peers']:
        peers(int(sys.argv[2]) if len(sys.argv) > 2 else 8)
        sys.exit()
    augmentation()
    steps = steps_and_products(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
    _, model, crops = steps['bfloat16' if BFLOAT16 else 'float32', False]
    passes(model, *crops)
