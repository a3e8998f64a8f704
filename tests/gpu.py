"""What the scripts do on a GPU: are they right, and how fast? Do they learn?

    python tests/gpu.py --minutes=9 --out=gpu            # on a machine with a GPU
    python tests/gpu.py --rehearse --out=gpu             # the same on a CPU at toy sizes
    python tests/gpu.py --only=right,numbers --out=gpu   # some of its parts

Its parts are in order of worth. Each result is printed and written to OUT/gpu.json at once, beside
those of calls before, so that a run that is cut off has told what it could. A part that fails is
noted, and the next one begins. Most parts start the scripts as a user would; what each said is in
OUT/NAME.txt.
"""
import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
PRETRAINERS = ('pretrain_mae', 'pretrain_dino', 'pretrain_dino_hsi', 'pretrain_lejepa')
# at --size=base (ViT-B/8, 64 px, 32 bands): the dissertation's batches, and 10^9 FLOPs of a tile,
# forward and backward, by torch's FlopCounterMode
BATCH = {'pretrain_mae': 128, 'pretrain_dino': 128, 'pretrain_dino_hsi': 64,
         'pretrain_lejepa': 128}
GFLOP = {'pretrain_mae': 19.3, 'pretrain_dino': 186.7, 'pretrain_dino_hsi': 351.5,
         'pretrain_lejepa': 138.4}
# without what is drawn on the device: a GPU draws other numbers than a CPU
STILL = {'pretrain_mae': ['--dropout=0'],
         'pretrain_dino': ['--drop_path_rate=0', '--noise=0'],
         'pretrain_dino_hsi': ['--drop_path_rate=0', '--noise=0'],
         'pretrain_lejepa': ['--noise=0']}

# Runs a script in a process of its own. The environment says what is to be different: how many GB
# a small card would have, deterministic algorithms, steps that are profiled.
LAUNCH = '''
import atexit, functools, json, os, runpy, sys, time, torch
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
on_gpu = torch.cuda.is_available()
if on_gpu:
    atexit.register(lambda: print('peak memory, MiB:', torch.cuda.max_memory_allocated() >> 20))
    total = torch.cuda.get_device_properties(0).total_memory
    fraction = float(os.environ.get('CARD_GB', 0)) * 1e9 / total
    if fraction:
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))
if os.environ.get('DETERMINISTIC'):
    # positions are resized by a kernel whose gradient has no deterministic form on CUDA
    torch.use_deterministic_algorithms(True, warn_only=True)

wait = torch.cuda.synchronize if on_gpu else lambda: None
if os.environ.get('PROFILE'):
    first, last = 4, 9  # steps of the optimizer
    if on_gpu:
        first, last = 30, 40
    profiler, plain, count = torch.profiler.profile(), torch.optim.AdamW.step, 0

    @functools.wraps(plain)
    def step(*args, **kwargs):
        global count, begun
        result = plain(*args, **kwargs)
        count += 1
        if count == first:
            wait()
            profiler.start()
            begun = time.time()
        if count == last:
            wait()
            seconds = time.time() - begun
            profiler.stop()
            tell(profiler, seconds)
        return result

    def tell(profiler, seconds):
        kernels = [e for e in profiler.events() if e.device_type == torch.profiler.DeviceType.CUDA]
        busy, end = 0, 0
        for e in sorted(kernels, key=lambda e: e.time_range.start):
            busy += max(0, e.time_range.end - max(end, e.time_range.start))
            end = max(end, e.time_range.end)
        print('profiled seconds:', seconds, 'busy:', busy / 1e6, flush=True)
        by = 'self_cuda_time_total' if on_gpu else 'self_cpu_time_total'
        with open(os.environ['PROFILE'], 'w') as file:
            file.write(profiler.key_averages().table(sort_by=by, row_limit=40))
        profiler.export_chrome_trace(os.environ['PROFILE'] + '.json')
    torch.optim.AdamW.step = step
runpy.run_path(sys.argv[0], run_name='__main__')
'''


# ============ tools ============

def keep(name, value):
    results[name] = value
    print(f'{time.time() - started:6.0f} s  {name}: {json.dumps(value)}', flush=True)
    with open(os.path.join(out, 'gpu.json'), 'w', encoding='utf-8') as file:
        json.dump(results, file, indent=1)


def enough_time(seconds):
    return time.time() + seconds < deadline


def run(script, name, *flags, on_cpu=False, stop_after=0, **environment):
    """Run a script with out_dir OUT/name -> facts (exit code, ...), the entries of its log"""
    folder = os.path.join(out, name)
    if name not in begun:  # an older call's would be resumed at its end, and its log read
        shutil.rmtree(folder, ignore_errors=True)
        begun.add(name)
    path = os.path.join(ROOT, f'{script}.py')
    command = [sys.executable, '-c', LAUNCH, path, *flags, f'--out_dir={folder}']
    environment = {**os.environ, 'TORCH_LOGS': 'recompiles,perf_hints', 'PYTHONUNBUFFERED': '1',
                   'CUBLAS_WORKSPACE_CONFIG': ':4096:8', **environment}
    if on_cpu:
        environment |= {'CUDA_VISIBLE_DEVICES': ''}
        if not rehearse:
            environment |= {'OMP_NUM_THREADS': '4'}
    with open(f'{folder}.txt', 'w+', encoding='utf-8', errors='replace') as said:
        process = subprocess.Popen(command, cwd=out, env=environment, stdout=said,
                                   stderr=subprocess.STDOUT)
        try:
            if stop_after:  # entries of the log
                log_path = os.path.join(folder, 'log.jsonl')
                while (process.poll() is None and len(read_log(log_path)) < stop_after
                       and time.time() < deadline):
                    time.sleep(0.2)
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=max(20, min(240, deadline - time.time())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.seek(0)
        text = said.read()
    facts = {'exit code': process.returncode,
             'recompilations': text.count('Recompiling function'),
             'CUDA graphs skipped': text.count('skipping cudagraphs')}
    peak = re.search(r'peak memory, MiB: (\d+)', text)
    if peak:
        facts['peak memory, MiB'] = int(peak[1])
    profiled = re.search(r'profiled seconds: (\S+) busy: (\S+)', text)
    if profiled and float(profiled[2]):
        # the profiler slows the host: without it the GPU waits less
        facts['GPU waits, at most'] = round(1 - float(profiled[2]) / float(profiled[1]), 3)
    if process.returncode:
        facts['last words'] = text[-1200:]
    return facts, read_log(os.path.join(folder, 'log.jsonl'))


def read_log(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file if line.endswith('\n')]


def side_by_side(runs):
    """run(*args, **kwargs) of each of (args, kwargs), all at once: for what is not timed"""
    with ThreadPoolExecutor(2 if rehearse else len(runs)) as pool:
        waiting = [pool.submit(run, *args, **kwargs) for args, kwargs in runs]
        return [one.result() for one in waiting]


def losses(log):
    return [entry['loss'] for entry in log if 'loss' in entry]


def difference(log, other):
    """Largest relative difference of two logs' losses; None where one run was cut off"""
    if not losses(log) or len(losses(log)) != len(losses(other)):
        return None
    return max(abs(a - b) / abs(b) for a, b in zip(losses(log), losses(other)))


def seconds(function, rounds=5):
    """Median time of one call, the device's work included"""
    times = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def few_steps(*more):
    return [f'--data={demo}', '--log_every=1', '--eval_every=1000', '--probe_tiles=4',
            f'--batch_size={4 if rehearse else 16}', *more]


# ============ right? ============

def check_right():
    """Ten steps of each script: against the CPU, compiled, in bfloat16 and float16"""
    exact = {'NVIDIA_TF32_OVERRIDE': '0'}  # no TF32
    variants = {'cpu': (['--dtype=float32'], {'on_cpu': True}),
                'gpu': (['--dtype=float32', '--compile=false'], exact),
                'compiled': (['--dtype=float32'], exact),
                'bfloat16': (['--dtype=bfloat16', '--compile=false'], {}),
                'float16': (['--dtype=float16', '--compile=false'], {})}
    few = f'--max_steps={3 if rehearse else 10}'
    for script in PRETRAINERS:  # one at a time, or all wait for cores
        if not enough_time(60):
            return
        found = dict(zip(variants, side_by_side(
            [((script, f'{script}_{name}', *few_steps(few), *STILL[script], *flags), options)
             for name, (flags, options) in variants.items()])))
        for name, base in (('gpu', 'cpu'), ('compiled', 'gpu'), ('bfloat16', 'gpu'),
                           ('float16', 'gpu')):
            facts, log = found[name]
            facts['difference'] = difference(log, found[base][1])
            keep(f'{script}, ten losses: {name} against {base}', facts)


def check_numbers():
    """Whitening and the solved decoder are in full float32, also where TF32 is allowed"""
    generator = torch.Generator().manual_seed(0)
    C, n, K = 32, 2000, 5
    mixing = torch.randn(C, C, generator=generator) * torch.logspace(0, -3, C)
    pixels = 1000 + 300 * torch.randn(4096, C, generator=generator) @ mixing.T
    meta = {'mean': pixels.mean(0).tolist(), 'covariance': torch.cov(pixels.T.double()).tolist()}
    mean, matrix = data.standardization(meta, whiten=16)
    raw = pixels.T.reshape(1, C, 64, 64)
    exact = torch.einsum('kc,bchw->bkhw', matrix.double(),
                         (raw - mean[:, None, None]).double())
    torch.set_float32_matmul_precision('high')
    with torch.autocast(device.type, torch.bfloat16):
        white = data.standardize(raw.to(device), mean.to(device), matrix.to(device)).cpu()
    error = ((white - exact).abs().max() / exact.abs().max()).item()
    keep('whitening: error beside float64, relative', error)

    x = torch.randn(n, 64, generator=generator)
    y = (x @ torch.randn(64, K, generator=generator)
         + 2 * torch.randn(n, K, generator=generator)).argmax(1)
    on_cpu = data.fit_logistic(x, y, K)
    with torch.autocast(device.type, torch.bfloat16):
        here = data.fit_logistic(x.to(device), y.to(device), K).cpu()
    both = (x @ on_cpu[:-1] + on_cpu[-1]).argmax(1) == (x @ here[:-1] + here[-1]).argmax(1)
    keep('solved decoder, beside the CPU',
         {'pixels with the same class': both.float().mean().item(),
          'largest difference of weights': (on_cpu - here).abs().max().item()})


def check_resume():
    """12 steps = 7 + 5 steps, in the default precision; SIGTERM"""
    def a_run(script, steps, place, **environment):
        kind = f'--compile={script == PRETRAINERS[0]}'  # the first one with CUDA graphs
        flags = few_steps(f'--max_steps={steps}', kind)
        return (script, f'{script}_{place}', *flags), environment

    endless = few_steps('--steps=100000', '--compile=false')
    begun_runs = side_by_side([a_run(script, 12, '12') for script in PRETRAINERS]
                              + [a_run(script, 7, '7_5') for script in PRETRAINERS])
    resumed = side_by_side([a_run(script, 12, '7_5') for script in PRETRAINERS]
                           + [((PRETRAINERS[0], 'sigterm', *endless), {'stop_after': 3})])
    n = len(PRETRAINERS)
    for script, whole, first, rest in zip(PRETRAINERS, begun_runs[:n], begun_runs[n:], resumed):
        compared = compare_resumed(whole, first, rest)
        keep(f'{script}, 12 = 7 + 5 steps', compared)
        if not compared['equal'] and enough_time(60):
            strict = {'DETERMINISTIC': '1'}
            whole, first = side_by_side([a_run(script, 12, '12_strict', **strict),
                                         a_run(script, 7, '7_5_strict', **strict)])
            rest, = side_by_side([a_run(script, 12, '7_5_strict', **strict)])
            keep(f'{script}, 12 = 7 + 5 steps, deterministic algorithms',
                 compare_resumed(whole, first, rest))
    facts, log = resumed[-1]
    facts.pop('last words', None)  # it is meant to end with 143
    keep('SIGTERM', {**facts, 'steps in the log': len(log)})


def compare_resumed(whole, first, rest):
    """Facts and log of a run of 12 steps, of one of 7, and of the latter resumed -> facts"""
    failed = [facts for facts, _ in (whole, first, rest) if facts['exit code']]
    lengths = [len(losses(log)) for _, log in (whole, first, rest)]
    equal = lengths == [12, 7, 12] and losses(whole[1]) == losses(rest[1])
    return {**(failed or [rest[0]])[0], 'losses of the three': lengths,
            'equal': equal and not failed, 'difference': difference(rest[1], whole[1])}


def check_judges():
    """The other scripts on an encoder that was trained here"""
    data.floors(demo)  # once, or each of the judges would do it
    encoder = os.path.join(out, 'pretrain_dino_hsi_12', 'last.pt')
    if not os.path.exists(encoder):
        few = few_steps('--max_steps=12', '--compile=false')
        run('pretrain_dino_hsi', 'pretrain_dino_hsi_12', *few)
    few = ['--steps=20', '--eval_every=10', '--compile=false']
    if rehearse:
        few = ['--steps=2', '--eval_every=2', '--batch_size=2']
    runs = [('segment', 'logistic', f'--encoder={encoder}'),
            ('segment', 'conv', f'--encoder={encoder}', '--decoder=conv', *few),
            ('segment', 'tuned', f'--encoder={encoder}', '--decoder=linear', '--freeze=false',
             *few),
            ('baseline_deeplab', 'deeplab', f'--data={demo}', *few),
            ('viz_attention', 'attention', f'--encoders={encoder}', f'--data={demo}')]
    if rehearse:
        runs = runs[1:4:2]
    for (script, name, *_), (facts, _) in zip(runs, side_by_side([(args, {}) for args in runs])):
        report = os.path.join(out, name, 'report.json')
        if os.path.exists(report):
            with open(report, encoding='utf-8') as file:
                facts['mIoU'] = json.load(file)['scores']['miou']
        keep(f'{script}, {name}', facts)


# ============ fast? ============

def base(batch, *more):
    """Flags of a run at the dissertation's size, or of a toy"""
    if rehearse:
        more = [flag for flag in more if 'max_steps' not in flag]
        return [f'--data={demo}', '--max_steps=12', '--batch_size=2', '--log_every=2',
                '--eval_every=100000', '--probe_tiles=2', *more]
    return ['--size=base', f'--data={demo}', f'--batch_size={batch}', '--log_every=10',
            '--eval_every=100000', '--save_every=100000', '--probe_tiles=4', *more]


def speed(log, batch, script=''):
    """Time of a step, from the log's entries after the first third"""
    timed = [entry for entry in log if 'seconds' in entry]
    timed = timed[len(timed) // 3:]
    if len(timed) < 2:
        return {}
    step_s = ((timed[-1]['seconds'] - timed[0]['seconds'])
              / (timed[-1]['step'] - timed[0]['step']))
    facts = {'ms a step': round(1000 * step_s, 1), 'tiles/s': round(batch / step_s)}
    if script in GFLOP and not rehearse:
        rate = GFLOP[script] * batch / step_s / 1000
        facts |= {'TFLOP/s': round(rate, 1), 'share of the product': round(rate / product(), 3)}
    return facts


measured = []


def product():
    """TFLOP/s of a bfloat16 matrix product of 8192 cubed, measured once"""
    if not measured:
        n = 256 if rehearse else 8192
        a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
        measured.append(2 * n ** 3 / seconds(lambda: [a @ b for _ in range(10)]) * 10 / 1e12)
        keep('bfloat16 product, TFLOP/s', measured[0])
    return measured[0]


def check_fast():
    """ViT-B/8 at the dissertation's batches, compiled: first all compile, side by side, then each
    is timed alone"""
    product()
    short = ['--max_steps=3'] * (not rehearse)
    side_by_side([((script, f'warm_{script}', *base(BATCH[script], *short)), {})
                  for script in PRETRAINERS[-1 if rehearse else 0:]])
    for script in PRETRAINERS:
        timed(script, 'compiled', '--max_steps=90')
    for script in PRETRAINERS:
        profiled(script, 'compiled', '--max_steps=41')


def check_eager():
    for script in PRETRAINERS[:1 if rehearse else 4]:
        timed(script, 'eager', '--compile=false', '--max_steps=70')


def check_graphs():
    """The same without CUDA graphs, where a script has them"""
    for script in ('pretrain_mae', 'pretrain_lejepa')[rehearse:]:
        timed(script, 'compiled_without_graphs', '--cuda_graphs=false', '--max_steps=90')


def timed(script, kind, *flags):
    if not enough_time(60):
        return
    batch = 2 if rehearse else BATCH[script]
    facts, log = run(script, f'base_{script}_{kind}', *base(batch, *flags))
    keep(f'{script}, base, {kind}', {**facts, **speed(log, batch, script)})


def profiled(script, kind, *flags):
    """With the profiler, which slows the host: OUT/NAME_profile.txt and its trace"""
    if not enough_time(60):
        return
    path = os.path.join(out, f'base_{script}_{kind}_profile.txt')
    facts, _ = run(script, f'profile_{script}_{kind}', *base(BATCH[script], *flags), PROFILE=path)
    keep(f'{script}, base, {kind}, profiled', facts)


def check_paths():
    """Reading, drawing and augmentation alone; the solved decoder; a map of a large scene"""
    for name in PRETRAINERS:
        script = __import__(name)
        preset = {} if rehearse else {**script.PRESETS['base'], 'size': 'base'}
        batch = 4 if rehearse else BATCH[name]
        for constant, value in {**preset, 'batch_size': batch}.items():
            setattr(script, constant, value)
        tiles = data.Tiles(demo, 'tr', pin_memory=on_gpu)
        steps = iter(range(1000))
        keep(f'{name}: reading and drawing a batch of {batch}, ms',
             round(1000 * seconds(lambda: script.get_batch(tiles, next(steps)), 20), 2))
        if name == 'pretrain_mae':
            continue
        mean, matrix = (t.to(device) for t in data.standardization(tiles.meta, script.whiten))
        values = data.Statistics(mean, torch.tensor(tiles.meta['std'], device=device), matrix)
        batch_0 = script.get_batch(tiles, 0)
        here = type(batch_0)(*(part.to(device) for part in batch_0))
        crops = seconds(lambda: script.make_crops(here, values, tiles.meta['nodata'], 0), 10)
        keep(f'{name}: crops and light of a batch of {batch}, ms', round(1000 * crops, 2))

    n, width = (500, 32) if rehearse else (50_000, 4 * 768)
    x, y = torch.randn(n, width, device=device), torch.randint(0, 24, (n,), device=device)
    keep(f'solved decoder, {n} pixels of {width} features, s',
         round(seconds(lambda: data.fit_logistic(x, y, 24, 50), 1), 3))
    del x, y

    side, size = (64, 'tiny') if rehearse else (4000, 'base')
    encoder = models.ViT(64, 8, 32, **models.SIZES[size])
    segmenter = models.build_segmenter(encoder, 24, 'linear', True, True).to(device).eval()
    scene = np.zeros((32, side, side), np.int16)

    def classes(raw):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return segmenter(raw.to(device).float()).float().softmax(1)

    start = time.perf_counter()
    rows = sum(part.shape[1] for _, part in data.sliding_window(classes, scene, 64, 32, 24, 64))
    keep(f'map of {rows} x {side} px, ViT-{size}, windows at half a step, s',
         round(time.perf_counter() - start, 2))


def check_deeplab():
    """DeepLab at 512 px, batch 8"""
    side, batch = (16, 2) if rehearse else (512, 8)
    rng = np.random.default_rng(0)
    scene = os.path.join(out, 'large.npz')
    cube = rng.integers(0, 3000, (6 * side, 6 * side, 32), dtype=np.uint16)
    np.savez(scene, cube=cube, labels=rng.integers(1, 25, cube.shape[:2], dtype=np.uint8))
    del cube
    tiles = os.path.join(out, 'large')
    subprocess.run([sys.executable, os.path.join(ROOT, 'data.py'), 'tile', f'--root={scene}',
                    f'--out={tiles}', f'--tile_size={side}', '--split_block=1'], check=True,
                   stdout=subprocess.DEVNULL, timeout=120)
    os.remove(scene)
    for kind in ('true', 'false'):
        if enough_time(60):
            facts, log = run('baseline_deeplab', f'deeplab_{side}_{kind}', f'--data={tiles}',
                             f'--batch_size={batch}', '--steps=1000', '--log_every=5',
                             f'--max_steps={10 if rehearse else 40}', '--eval_every=1000',
                             '--width=8' if rehearse else '--width=64', f'--compile={kind}')
            keep(f'baseline_deeplab, {side} px, batch {batch}, compile={kind}',
                 {**facts, **speed(log, batch)})


def check_memory():
    """The largest batch at --size=base on cards of 16 and 24 GB, and on this one: the
    dissertation's batch, halved until it fits or doubled until it does not; eager"""
    def largest(script, card):
        """-> the largest batch that fits, or None where that was not found out; facts"""
        batch = BATCH[script]
        while batch and enough_time(60):
            name = f'memory_{script}_{card}_{batch}'
            flags = base(batch, '--compile=false', '--max_steps=3')
            facts, _ = run(script, name, *flags, CARD_GB=str(card))
            if not facts['exit code']:
                return batch, facts
            if 'out of memory' not in facts['last words']:  # cut off, or another error
                return None, facts
            batch //= 2
        return (None, {'cut off at batch': batch}) if batch else (0, {})
    cases = [(script, card) for card in (16, 24) for script in PRETRAINERS]
    cases = cases[:1] if rehearse else cases
    with ThreadPoolExecutor(3) as pool:
        for (script, card), (batch, facts) in zip(cases, pool.map(lambda c: largest(*c), cases)):
            keep(f'{script}, base, a card of {card} GB', {'batch that fits': batch, **facts})
    for script in PRETRAINERS[:0 if rehearse else 4]:
        for factor in (2, 4, 8):
            if not enough_time(60):
                return
            batch = factor * BATCH[script]
            facts, log = run(script, f'large_{script}_{batch}',
                             *base(batch, '--compile=false', '--log_every=5', '--max_steps=20'))
            keep(f'{script}, base, eager, batch {batch}', {**facts, **speed(log, batch, script)})
            if facts['exit code']:
                break


def check_peer():
    """transformers' ViTMAEForPreTraining at the same sizes, where it is installed"""
    with contextlib.suppress(ImportError):
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        sizes = dict(image_size=64, patch_size=8, num_channels=32)
        if rehearse:
            sizes |= dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                          intermediate_size=96, decoder_hidden_size=48,
                          decoder_num_hidden_layers=1, decoder_num_attention_heads=3)
        model = ViTMAEForPreTraining(ViTMAEConfig(**sizes)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        batch = 2 if rehearse else BATCH['pretrain_mae']
        x = torch.randn(batch, 32, 64, 64, device=device)

        def step():
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for kind in ('eager', 'compiled')[:1 if rehearse else 2]:
            if kind == 'compiled':
                model.compile()
            ms = 1000 * seconds(lambda: [step() for _ in range(5)], 5) / 5
            keep(f'peer: ViTMAEForPreTraining, batch {batch}, {kind}',
                 {'ms a step': round(ms, 1), 'tiles/s': round(1000 * batch / ms)})
        return
    keep('peer', 'transformers is not installed')


# ============ does it learn? ============

def check_learns():
    """pretrain_mae.py --size=small on the demo: the probe over the steps"""
    flags = ['--size=small', '--steps=2000', '--eval_every=500']
    if rehearse:
        flags = ['--steps=4', '--eval_every=2', '--batch_size=4', '--probe_tiles=4']
    facts, log = run('pretrain_mae', 'learns', f'--data={demo}', *flags)
    probes = {entry['step']: round(entry['probe_miou'], 4)
              for entry in log if 'probe_miou' in entry}
    keep('pretrain_mae, small, probe mIoU over steps', {**facts, 'probe': probes})


PARTS = {'right': check_right, 'numbers': check_numbers, 'resume': check_resume,
         'fast': check_fast, 'eager': check_eager, 'graphs': check_graphs, 'paths': check_paths,
         'learns': check_learns,
         'judges': check_judges, 'deeplab': check_deeplab, 'memory': check_memory,
         'peer': check_peer}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=9)
    parser.add_argument('--out', default='gpu')
    parser.add_argument('--rehearse', action='store_true', help='toy sizes, on the CPU')
    parser.add_argument('--only', default=','.join(PARTS), help='some of the parts')
    parser.add_argument('--scripts', default=','.join(PRETRAINERS), help='some of the pre-trainers')
    arguments = parser.parse_args()
    PRETRAINERS = tuple(arguments.scripts.split(','))
    out, rehearse = os.path.abspath(arguments.out), arguments.rehearse
    started = time.time()
    deadline = started + 60 * arguments.minutes
    os.makedirs(out, exist_ok=True)
    results, begun = {}, set()  # begun: the runs of this call
    earlier = os.path.join(out, 'gpu.json')
    if os.path.exists(earlier):
        with open(earlier, encoding='utf-8') as file:
            results = json.load(file)
    if rehearse:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    import torch

    import data
    import models
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not rehearse:
        sys.exit('no GPU here: python tests/gpu.py --rehearse runs the same on a CPU')
    device = torch.device('cuda' if on_gpu else 'cpu')
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    keep('torch', torch.__version__)
    if on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
        keep('card', f'{torch.cuda.get_device_name(0)}, {memory / 1e9:.0f} GB')
    demo = os.path.join(out, 'demo')
    data.demo(data.parse(['demo', f'--out={demo}']))
    for part in arguments.only.split(','):
        results.pop(f'part {part}', None)  # an earlier call's
        if not enough_time(60):
            keep(f'part {part}', 'not run: the time is up')
            continue
        try:
            PARTS[part]()
        except Exception:
            keep(f'part {part}', {'failed': traceback.format_exc()[-1200:]})
    keep('minutes left', round((deadline - time.time()) / 60, 1))
