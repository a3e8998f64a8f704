"""How fast tiles come from the disk and what the host has to do for a step. One thread.

    python tests/bench_reading.py [FOLDER]

FOLDER (default: a temporary one) must lie on the disk that is to be measured. Four tables:
Tiles.batch beside opening and cropping a TIFF for each tile (warm cache); reading from a cold
cache, with and without Tiles.read_ahead; drawing a batch of few and of many windows; the host's
work for a step of each pre-training script.
"""
import json
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import tifffile
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import pretrain_dino
import pretrain_dino_hsi
import pretrain_mae

B, C, S = 64, 32, 64  # tiles of a batch, bands, side


def make_tiles(folder, count, bands, side):
    """A tile directory without scenes"""
    os.makedirs(folder)
    header = {'tile_size': side, 'num_bands': bands, 'mean': [0.0] * bands, 'std': [1.0] * bands, 'covariance': np.eye(bands).tolist(), 'nodata': None,
              'wavelengths_nm': None, 'num_classes': 1, 'class_names': ['1'], 'scenes': [''], 'tiles': {split: [[0, 0, 0]] * count for split in ('tr', 'val', 'ts')}}
    images = np.lib.format.open_memmap(f'{folder}/tr_images.npy', 'w+', 'int16', (count, bands, side, side))
    tile = np.random.default_rng(0).integers(0, 3000, (bands, side, side)).astype('int16')
    for i in range(count):
        images[i] = tile + i
    images.flush()
    with open(f'{folder}/meta.json', 'w') as file:
        json.dump(header, file)
    return folder


def fastest(function, rounds=30):
    """Least and median time of one call, ms: what others do on the machine only adds to it"""
    times = []
    for i in range(rounds):
        start = time.perf_counter()
        function(i)
        times.append(1000 * (time.perf_counter() - start))
    return min(times), statistics.median(times)


def forget(path):
    """The file leaves the system's cache"""
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def private_memory():
    """MiB that belong to this process alone; mapped files do not"""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('RssAnon')) / 1024


def against_tiff(folder):
    rng = np.random.default_rng(0)
    for compression in (None, 'zlib'):
        root = os.path.join(folder, str(compression))
        os.makedirs(os.path.join(root, 'tr', 'image'))
        for i in range(8):
            coarse = rng.normal(0, 8000, (64, 64, 32)).repeat(8, 0).repeat(8, 1)
            image = (coarse + rng.normal(0, 300, (512, 512, 32))).clip(-32767, 32767).astype(np.int16)
            tifffile.imwrite(os.path.join(root, 'tr', 'image', f'O1_{i:04d}.tif'), image, planarconfig='contig', photometric='minisblack',
                             compression=compression)
        data.tile(data.parse(['tile', f'--root={root}', f'--out={root}_tiles']))
        tiles = data.Tiles(f'{root}_tiles', 'tr')
        paths = [os.path.join(root, name) for name in tiles.meta['scenes']]
        paths = [os.path.join(root, 'tr', 'image', os.path.basename(path)) for path in paths]
        rates = {'Tiles.batch': [], 'tifffile + crop': []}
        for round_ in range(7):
            ids = rng.permutation(len(tiles))[:128]
            start = time.perf_counter()
            for _ in range(8):
                tiles.batch(ids, reuse=True)
            rates['Tiles.batch'].append(8 * 128 / (time.perf_counter() - start))
            start = time.perf_counter()
            for i in ids[:16]:
                scene, row, col = tiles.meta['tiles']['tr'][i]
                np.ascontiguousarray(np.moveaxis(tifffile.imread(paths[scene])[row:row + 64, col:col + 64], 2, 0))
            rates['tifffile + crop'].append(16 / (time.perf_counter() - start))
        fast, slow = (statistics.median(rates[name]) for name in rates)
        print(f'{compression or "plain":8s} Tiles.batch {fast:8.0f} tiles/s   tifffile + crop {slow:6.1f} tiles/s   ratio {fast / slow:6.0f}')


def cold(folder, compute_ms):
    """8,192 tiles of 256 KB, four batches of 64 in random order from a cold cache. Of more batches the map would find most in what the system
    read around the first ones, which data larger than memory cannot keep. `compute_ms`: sleep in each step, as the GPU's work would take it"""
    if not os.path.exists(folder):
        make_tiles(folder, 8192, C, S)
    rng = np.random.default_rng(0)
    tiles = data.Tiles(folder, 'tr')
    for ids in np.arange(B * 2).reshape(-1, B):
        tiles.batch(ids, reuse=True)
    buffers = tiles._buffers  # kept from here on: fresh memory has its own cost
    for repeat in range(5):
        for ahead in (False, True):
            tiles = data.Tiles(folder, 'tr')  # a fresh map: pages of the old one could not be forgotten
            tiles._buffers = buffers
            forget(f'{folder}/tr_images.npy')
            order = rng.permutation(len(tiles))[:B * 5].reshape(-1, B)
            waited = 0.0
            if ahead:
                tiles.read_ahead(order[0])
                time.sleep(compute_ms / 1000)
            for ids, next_ids in zip(order, order[1:]):
                start = time.perf_counter()
                if ahead:
                    tiles.read_ahead(next_ids)
                tiles.batch(ids, reuse=True)
                waited += time.perf_counter() - start
                time.sleep(compute_ms / 1000)
            print(f'cold, {compute_ms} ms of other work a step, {"read_ahead" if ahead else "map alone ":10s} {B * 4 / waited:8.0f} tiles/s', flush=True)
    everything = np.arange(B * 4).reshape(-1, B)
    for ids in everything:
        tiles.batch(ids, reuse=True)
    least, median = fastest(lambda i: (tiles.read_ahead(everything[(i + 1) % 4]), tiles.batch(everything[i % 4], reuse=True)))
    print(f'warm, with read_ahead: {least:.2f} ms a batch (median {median:.2f})')


def drawing(folder):
    """Windows of 32 px, four a tile. The same tile again and again, so that only the number of windows differs"""
    tiles = data.Tiles(make_tiles(folder, 1, C, S), 'tr')
    tile = np.array(tiles.images)
    for script in (pretrain_mae, pretrain_dino_hsi):
        script.img_size, script.batch_size, script.local_crops_size = 32, B, 16
        for count in (2_500, 250_000, 25_000_000):
            tiles.images = np.broadcast_to(tile[0], (count, C, S, S))
            windows = tiles.windows_per_epoch(32)
            ids = fastest(lambda i: data.epoch_ids(windows, B, i, 0))[0]
            least, median = fastest(lambda i: script.get_batch(tiles, i), 100)
            print(f'{script.__name__}, {windows:11,} windows: ids {ids:.2f} ms, a batch of {B} {least:.2f} ms (median {median:.2f}); '
                  f'private memory {private_memory():.0f} MiB')


def host_work(folder):
    """get_batch() of each script at --size=base, with a batch of 64; the files are in memory"""
    tiles = data.Tiles(make_tiles(folder, 256, C, S), 'tr')
    for script in (pretrain_mae, pretrain_dino, pretrain_dino_hsi):
        for name, value in {**script.PRESETS['base'], 'size': 'base', 'batch_size': B}.items():
            setattr(script, name, value)
        tiles.batch(range(256))
        least, median = fastest(lambda i: script.get_batch(tiles, i))
        print(f'{script.__name__}: a batch of {B} {least:.2f} ms (median {median:.2f})')


if __name__ == '__main__':
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        host_work(f'{place}/warm')
        drawing(f'{place}/one')
        for milliseconds in (0, 40):
            cold(f'{place}/cold', milliseconds)
        against_tiff(place)
