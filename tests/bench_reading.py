"""How fast Tiles.batch hands over raw tiles, against opening and cropping a TIFF for each (warm cache, interleaved, medians).

    python tests/bench_reading.py

A generated folder in the WHU-OHS layout: 512 x 512 x 32 int16, plain and deflate; batches of 128 tiles of 64 px.
"""
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import tifffile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data

with tempfile.TemporaryDirectory() as folder:
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
