"""What the scripts do on a GPU: are they right, and how fast?

    python tests/gpu.py --minutes=9 --out=gpu            # on a machine with a GPU
    python tests/gpu.py --rehearse --out=gpu             # the same on a CPU at toy sizes

Its checks are in order of worth. Each result is printed and written to OUT/gpu.json at once, so that
a run that is cut off has told what it could. All checks start the scripts as a user would.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRETRAINERS = ('pretrain_mae.py', 'pretrain_dino.py', 'pretrain_dino_hsi.py',
               'pretrain_lejepa.py')
# the dissertation's batches, and the FLOPs of a tile (forward and backward, ViT-B/8, 64 px, 32
# bands; DINOv2: 2 + 8 crops)
BATCH = {'pretrain_mae.py': 128, 'pretrain_dino.py': 128, 'pretrain_dino_hsi.py': 64,
         'pretrain_lejepa.py': 128}
FLOPS = {'pretrain_mae.py': 19.21e9, 'pretrain_dino.py': 189.2e9}
STILL = {'pretrain_mae.py': '--dropout=0', 'pretrain_dino.py': '--drop_path_rate=0',
         'pretrain_dino_hsi.py': '--drop_path_rate=0',
         'pretrain_lejepa.py': '--noise=0'}  # what draws other numbers on a GPU
PRODUCT = """
import torch
a = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16)
b = torch.randn_like(a)
for _ in range(3):
    a @ b
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record()
for _ in range(20):
    a @ b
end.record()
torch.cuda.synchronize()
print(20 * 2 * 8192 ** 3 / start.elapsed_time(end) / 1e9)
"""


def nvidia_smi(query):
    try:
        done = subprocess.run(['nvidia-smi', f'--query-gpu={query}',
                               '--format=csv,noheader,nounits'], capture_output=True, text=True)
    except OSError:
        return ''
    return done.stdout.strip().split('\n')[0]


def keep(name, value):
    results[name] = value
    print(f'{time.time() - started:6.0f} s  {name}: {json.dumps(value)}', flush=True)
    with open(os.path.join(out, 'gpu.json'), 'w', encoding='utf-8') as file:
        json.dump(results, file, indent=1)


def run(script, name, *flags, on_cpu=False, stop_after=0):
    """Run a script with out_dir OUT/name -> its exit code, what it said, log and peak memory"""
    folder = os.path.join(out, name)
    command = [sys.executable, os.path.join(ROOT, script), *flags, f'--out_dir={folder}']
    environment = {**os.environ, 'TORCH_LOGS': 'recompiles', 'PYTHONUNBUFFERED': '1',
                   'OMP_NUM_THREADS': '2', 'TORCHINDUCTOR_COMPILE_THREADS': '8'}
    if on_cpu:
        environment['CUDA_VISIBLE_DEVICES'] = ''
    process = subprocess.Popen(command, cwd=out, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors='replace')
    memory = [0]

    def watch():
        while process.poll() is None:
            memory[0] = max(memory[0], int(nvidia_smi('memory.used') or 0))
            time.sleep(0.5)
    threading.Thread(target=watch, daemon=True).start()
    try:
        if stop_after:
            time.sleep(stop_after)
            process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=max(20, min(200, deadline - time.time())))
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    with open(os.path.join(out, f'{name}.txt'), 'w', encoding='utf-8') as file:
        file.write(said)
    log = []
    if os.path.exists(os.path.join(folder, 'log.jsonl')):
        with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as file:
            log = [json.loads(line) for line in file]
    facts = {'exit code': process.returncode, 'recompilations': said.count('Recompiling function'),
             'peak memory MiB': memory[0]}
    if process.returncode:
        facts['last words'] = said[-1200:]
    return facts, log


def losses(log):
    return [entry['loss'] for entry in log if 'loss' in entry]


def difference(log, other):
    """Largest relative difference of two logs' losses; None where one has none"""
    pairs = list(zip(losses(log), losses(other)))
    return max(abs(a - b) / abs(b) for a, b in pairs) if pairs else None


def enough_time(seconds):
    return time.time() + seconds < deadline


def side_by_side(runs):
    """run(*args, **kwargs) of each of (args, kwargs), all at once: for what is not timed"""
    with ThreadPoolExecutor(len(runs)) as pool:
        waiting = [pool.submit(run, *args, **kwargs) for args, kwargs in runs]
        return [one.result() for one in waiting]


def check_right():
    """Ten steps of each script on the demo: against the CPU, compiled, in bfloat16 and float16"""
    tiny = [f'--data={data}', '--log_every=1', '--max_steps=10', '--eval_every=1000',
            '--batch_size=16', '--probe_tiles=4']
    variants = {'cpu': ['--dtype=float32'], 'gpu': ['--dtype=float32', '--compile=false'],
                'compiled': ['--dtype=float32'], 'bfloat16': ['--dtype=bfloat16', '--compile=false'],
                'float16': ['--dtype=float16', '--compile=false']}
    runs = [((script, f'{script[:-3]}_{name}', *tiny, STILL[script], *flags),
             {'on_cpu': name == 'cpu'})
            for script in PRETRAINERS for name, flags in variants.items()]
    done = side_by_side(runs)
    for i, script in enumerate(PRETRAINERS):
        found = dict(zip(variants, done[i * len(variants):]))
        for name, base in (('gpu', 'cpu'), ('compiled', 'gpu'), ('bfloat16', 'gpu'),
                           ('float16', 'gpu')):
            facts, log = found[name]
            facts['difference'] = difference(log, found[base][1])
            keep(f'{script}, ten losses: {name} against {base}', facts)


def check_resume():
    """12 steps = 7 + 5 steps, in default precision; SIGTERM"""
    flags = [f'--data={data}', '--log_every=1', '--eval_every=1000', '--batch_size=16',
             '--probe_tiles=4', '--compile=false']
    names = [script.removesuffix('.py') for script in PRETRAINERS]
    whole = side_by_side([((script, f'{name}_12', *flags, '--max_steps=12'), {})
                          for script, name in zip(PRETRAINERS, names)]
                         + [((script, f'{name}_7_5', *flags, '--max_steps=7'), {})
                            for script, name in zip(PRETRAINERS, names)])
    resumed = side_by_side([((script, f'{name}_7_5', *flags, '--max_steps=12'), {})
                            for script, name in zip(PRETRAINERS, names)]
                           + [((PRETRAINERS[0], 'sigterm', *flags, '--steps=100000'),
                               {'stop_after': 25})])
    for script, (_, log), (facts, other) in zip(PRETRAINERS, whole, resumed):
        keep(f'{script}, 12 = 7 + 5 steps', {**facts, 'equal': losses(log) == losses(other),
                                             'difference': difference(other, log)})
    facts, log = resumed[-1]
    facts.pop('last words', None)  # it is meant to end with 143
    keep('SIGTERM', {**facts, 'steps in the log': len(log)})


def check_judges():
    """The other scripts on what was trained above"""
    encoder = os.path.join(out, 'pretrain_dino_hsi_12', 'last.pt')
    few = ['--steps=20', '--eval_every=10']
    runs = [('segment.py', 'logistic', f'--encoder={encoder}'),
            ('segment.py', 'conv', f'--encoder={encoder}', '--decoder=conv', *few),
            ('segment.py', 'tuned', f'--encoder={encoder}', '--decoder=linear', '--freeze=false',
             *few),
            ('baseline_deeplab.py', 'deeplab', f'--data={data}', *few),
            ('viz_attention.py', 'attention', f'--encoders={encoder}', f'--data={data}')]
    for (script, name, *_), (facts, _) in zip(runs, side_by_side([(args, {}) for args in runs])):
        report = os.path.join(out, name, 'report.json')
        if os.path.exists(report):
            with open(report, encoding='utf-8') as file:
                facts['mIoU'] = json.load(file)['scores']['miou']
        keep(f'{script}, {name}', facts)


def check_fast(compiled):
    """ViT-B/8 at the dissertation's batches: ms a step, tiles/s, share of a product's rate"""
    for script in PRETRAINERS:
        if not enough_time(60):
            return
        batch = 4 if rehearse else BATCH[script]
        size = [] if rehearse else ['--size=base']
        facts, log = run(script, f'base_{script[:-3]}_{compiled}', *size,
                         f'--data={data}', f'--batch_size={batch}', '--max_steps=60',
                         '--log_every=10', '--eval_every=100000', '--save_every=100000',
                         f'--compile={compiled}', '--probe_tiles=4')
        timed = [entry for entry in log if 'seconds' in entry and entry['step'] >= 20]
        if len(timed) > 1:
            seconds = timed[-1]['seconds'] - timed[0]['seconds']
            step_s = seconds / (timed[-1]['step'] - timed[0]['step'])
            facts |= {'ms a step': round(1000 * step_s, 1), 'tiles/s': round(batch / step_s),
                      'losses': [round(loss, 4) for loss in losses(log)]}
            if script in FLOPS and product:
                rate = FLOPS[script] * batch / step_s / 1e12
                facts |= {'TFLOP/s': round(rate, 1), 'share of a product': round(rate / product, 3)}
        keep(f'{script}, base, {"compiled" if compiled else "eager"}', facts)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=9)
    parser.add_argument('--out', default='gpu')
    parser.add_argument('--rehearse', action='store_true')
    parser.add_argument('--only', default='right,fast,resume,judges,eager')
    arguments = parser.parse_args()
    out, rehearse = os.path.abspath(arguments.out), arguments.rehearse
    started = time.time()
    deadline = started + 60 * arguments.minutes
    os.makedirs(out, exist_ok=True)
    results = {}
    keep('card', nvidia_smi('name,memory.total,driver_version'))
    import torch
    keep('torch', torch.__version__)
    product = 0.0
    if not rehearse:
        done = subprocess.run([sys.executable, '-c', PRODUCT], capture_output=True, text=True)
        product = float(re.findall(r'[\d.]+', done.stdout or '0')[0])
        keep('bfloat16 product, TFLOP/s', product or done.stderr[-500:])
    data = os.path.join(out, 'demo')
    subprocess.run([sys.executable, os.path.join(ROOT, 'data.py'), 'demo', f'--out={data}'],
                   check=True, stdout=subprocess.DEVNULL)
    checks = {'right': check_right, 'fast': lambda: check_fast(True), 'resume': check_resume,
              'judges': check_judges, 'eager': lambda: check_fast(False)}
    for name in arguments.only.split(','):
        checks[name]()
    keep('minutes left', round((deadline - time.time()) / 60, 1))
