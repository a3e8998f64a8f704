"""Reading, tiling, labels, scores, augmentation and floors."""
import functools
import glob
import importlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import data
import scenes
from conftest import MAE_TINY, ROOT, SCENES, make_scene, run, tiled
from data import UserError, Tiles, chance_warning, confusion_matrix, label_to_class, read_scene, scores


# ============ labels and scores ============

def long_tailed(n=20_000, num_classes=24, seed=0):
    share = 0.8 ** np.arange(num_classes)
    return torch.from_numpy(np.random.default_rng(seed).choice(num_classes, n, p=share / share.sum()))


def judge(pred, target, num_classes=24):
    return scores(confusion_matrix(pred, target, num_classes))


def test_labels_map_once_zero_is_ignored():
    assert label_to_class(torch.tensor([0, 1, 24], dtype=torch.uint8)).tolist() == [255, 0, 23]


def test_perfect_predictor_gets_100_percent_whatever_is_ignored():
    target = long_tailed()
    shown = torch.where(torch.rand(len(target)) < 0.5, 255, target)
    result = judge(target, shown)
    assert result['oa'] == result['miou'] == result['mean_acc'] == result['kappa'] == result['mean_f1'] == 1
    assert chance_warning(result) == ''


def test_shifted_predictor_is_near_zero_and_shuffled_predictor_trips_the_warning():
    target = long_tailed()
    shifted = judge((target + 1) % 24, target)
    assert shifted['miou'] < 0.001 and 'not clearly above chance' in chance_warning(shifted)
    shuffled = judge(target[torch.randperm(len(target))], target)
    assert shuffled['miou'] < 0.05 and abs(shuffled['kappa']) < 0.02
    assert 'not clearly above chance' in chance_warning(shuffled)
    assert 'not clearly above chance' in chance_warning(judge(torch.zeros_like(target), target))


def test_the_dissertations_two_faults_turn_a_perfect_predictor_into_its_table():
    target = long_tailed()
    shuffled_and_off_by_one = judge((target[torch.randperm(len(target))] - 1) % 24, target)
    assert shuffled_and_off_by_one['miou'] < 0.03 and chance_warning(shuffled_and_off_by_one)


def test_scores_agree_with_a_naive_count():
    rng = np.random.default_rng(1)
    target, pred = rng.integers(0, 5, 500), rng.integers(0, 4, 500)
    target[target == 2] = 255  # class 2 is absent, class 4 never predicted
    result, known = judge(torch.tensor(pred), torch.tensor(target), 6), target != 255
    ious, f1s, recalls = [], [], []
    for k in (0, 1, 3, 4):
        tp = sum(p == t == k for p, t in zip(pred[known], target[known]))
        fp = sum(p == k != t for p, t in zip(pred[known], target[known]))
        fn = sum(t == k != p for p, t in zip(pred[known], target[known]))
        ious.append(tp / (tp + fp + fn)), f1s.append(2 * tp / (2 * tp + fp + fn)), recalls.append(tp / (tp + fn))
    assert result['miou'] == pytest.approx(np.mean(ious))
    assert result['miou_all'] == pytest.approx(sum(ious) / 6)
    assert result['mean_f1'] == pytest.approx(np.mean(f1s)) and result['mean_acc'] == pytest.approx(np.mean(recalls))
    assert result['oa'] == pytest.approx((pred == target)[known].mean()) and result['iou'][2] is None


# ============ reading ============

@pytest.mark.parametrize('options', [
    dict(planarconfig='contig'), dict(planarconfig='contig', compression='zlib', predictor=2), dict(compression='zlib', tile=(16, 16)),
    dict(planarconfig='separate'), dict(planarconfig='separate', compression='zlib'), dict(bigtiff=True), dict(byteorder='>'), dict(pages=True),
], ids=str)
@pytest.mark.parametrize('dtype', ['uint8', 'int16', 'uint16', 'float32'])
def test_tiff_axes_come_from_the_file(tmp_path, options, dtype):
    cube = (np.arange(5 * 20 * 24).reshape(5, 20, 24) % 251).astype(dtype)
    path, options = str(tmp_path / 'x.tif'), dict(options)
    if dtype == 'float32':
        options.pop('predictor', None)
    if options.pop('pages', False):
        tifffile.imwrite(path, cube, photometric='minisblack')
    elif options.get('planarconfig') == 'separate':
        tifffile.imwrite(path, cube, photometric='minisblack', **options)
    else:
        tifffile.imwrite(path, np.moveaxis(cube, 0, 2).astype(np.dtype(dtype)), photometric='minisblack', **{'planarconfig': 'contig', **options})
    scene = read_scene(path)
    assert scene.cube.shape == (5, 20, 24) and scene.cube.dtype == dtype
    np.testing.assert_array_equal(scene.cube, cube)


def test_numpy_mat_and_envi_scenes(tmp_path):
    cube, labels = np.arange(6 * 7 * 3).reshape(6, 7, 3).astype(np.int16), np.arange(42).reshape(6, 7) % 4
    np.savez(tmp_path / 'a.npz', cube=cube, labels=labels, wavelengths_nm=[500, 600, 700], class_names=['Unlabelled', 'a', 'b', 'c'])
    np.save(tmp_path / 'a.npy', cube)
    scene = read_scene(str(tmp_path / 'a.npz'))
    assert scene.cube.shape == (3, 6, 7) and scene.labels.dtype == np.uint8 and scene.class_names == ['a', 'b', 'c']
    np.testing.assert_array_equal(read_scene(str(tmp_path / 'a.npy')).cube, np.moveaxis(cube, 2, 0))
    np.save(tmp_path / 'gt.npy', labels)
    np.savez(tmp_path / 'gt.npz', labels=labels)
    for name in ('gt.npy', 'gt.npz'):
        np.testing.assert_array_equal(read_scene(str(tmp_path / 'a.npy'), str(tmp_path / name)).labels, labels)
    tifffile.imwrite(tmp_path / 'gt.tif', np.where(labels == 0, -9999, labels).astype(np.int16), extratags=[(42113, 's', 0, '-9999', True)])
    np.testing.assert_array_equal(read_scene(str(tmp_path / 'a.npy'), str(tmp_path / 'gt.tif')).labels, labels)
    scipy_io = pytest.importorskip('scipy.io')
    scipy_io.savemat(tmp_path / 'a.mat', {'cube': cube})
    scipy_io.savemat(tmp_path / 'gt.mat', {'gt': labels})
    scene = read_scene(str(tmp_path / 'a.mat'), str(tmp_path / 'gt.mat'))
    np.testing.assert_array_equal(scene.cube, np.moveaxis(cube, 2, 0))
    np.testing.assert_array_equal(scene.labels, labels)
    spectral = pytest.importorskip('spectral')
    spectral.envi.save_image(str(tmp_path / 'a.hdr'), cube, metadata={'wavelength': [0.5, 0.6, 0.7], 'data ignore value': -1})
    scene = read_scene(str(tmp_path / 'a.hdr'))
    np.testing.assert_array_equal(scene.cube, np.moveaxis(cube, 2, 0))
    assert scene.wavelengths_nm == [500, 600, 700] and scene.nodata == -1


def bad_files(folder):
    """name -> (path, words its error must hold)"""
    good = str(folder / 'good.tif')
    tifffile.imwrite(good, np.random.default_rng(0).integers(0, 999, (32, 32, 4)).astype(np.int16), planarconfig='contig',
                     photometric='minisblack', compression='zlib')
    raw = open(good, 'rb').read()
    with tifffile.TiffFile(good) as tif:
        offset = tif.pages[0].dataoffsets[0]

    def write(name, content):
        open(folder / name, 'wb').write(content)
        return str(folder / name)
    files = {'empty': (write('empty.tif', b''), 'empty'),
             'html': (write('page.tif', b'<html><body>404 not found</body></html>'), 'cannot be read'),
             'half': (write('half.tif', raw[:len(raw) // 2]), ''),
             'damaged zlib': (write('zlib.tif', raw[:offset + 4] + bytes(60) + raw[offset + 64:]), 'cannot be read'),
             'npz in name only': (write('fake.npz', b'PK\x03\x04 nothing'), 'cannot be read'),
             'truncated npy': (write('cut.npy', b'\x93NUMPY\x01\x00'), 'cannot be read'),
             'unknown type': (write('scene.jpg', b'x'), '.jpg'),
             'missing': (str(folder / 'none.tif'), 'no such file')}
    for name, array, words in [
            ('huge claim', None, 'damaged'), ('text', np.array([['a']]), 'not'), ('complex', np.zeros((4, 4, 2), complex), 'complex'),
            ('one-d', np.zeros(4), '3-d'), ('no pixels', np.zeros((0, 4, 3)), '3-d'), ('objects', np.array([{}], object), 'cannot')]:
        if array is not None:
            np.save(folder / f'{name}.npy', array, allow_pickle=True)
            files[name] = (str(folder / f'{name}.npy'), words)
    np.savez(folder / 'nocube.npz', image=np.zeros((3, 3, 3)))
    files['no cube'] = (str(folder / 'nocube.npz'), 'no array "cube"')
    files['bad labels'] = (make_scene(folder / 'labels.npz', labels=np.full((40, 48), 300)), '0 for unlabelled')
    files['half labels'] = (make_scene(folder / 'labels2.npz', labels=np.full((40, 48), 0.5)), 'whole numbers')
    tifffile.imwrite(folder / 'size.tif', np.zeros((32, 32, 4), np.int16), planarconfig='contig', photometric='minisblack', compression='zlib')
    with tifffile.TiffFile(folder / 'size.tif', mode='r+b') as tif:
        tif.pages[0].tags['ImageWidth'].overwrite(60000)
        tif.pages[0].tags['ImageLength'].overwrite(60000)
    files['huge claim'] = (str(folder / 'size.tif'), 'damaged')
    return files


def test_every_bad_file_gives_one_sentence_that_names_it(tmp_path):
    files = bad_files(tmp_path)
    assert len(files) >= 15
    for name, (path, words) in files.items():
        with pytest.raises(UserError) as caught:
            read_scene(path)
        text = str(caught.value)
        assert path in text and words in text and '\n' not in text and text.count(':') >= 2, (name, text)


def test_arrays_of_objects_run_no_code_and_a_tiff_opens_no_other_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)
    np.save(tmp_path / 'evil.npy', np.array([[[Evil()]]], object), allow_pickle=True)
    np.savez(tmp_path / 'evil.npz', cube=np.zeros((4, 4, 2), np.int16), class_names=np.array([Evil()], object))
    for name in ('evil.npy', 'evil.npz'):
        with pytest.raises(UserError, match='cannot be read'):
            read_scene(str(tmp_path / name))
    assert not (tmp_path / 'owned').exists()
    for name, value in (('own', 1), ('secret', 2)):
        tifffile.imwrite(tmp_path / f'{name}.ome.tif', np.full((2, 16, 16), value, np.uint8), ome=True, metadata={'axes': 'CYX'}, photometric='minisblack')
    text = tifffile.TiffFile(tmp_path / 'own.ome.tif').ome_metadata
    plane = '<TiffData IFD="0" FirstC="{0}" PlaneCount="1"><UUID FileName="secret.ome.tif">urn:uuid:1</UUID></TiffData>'
    text = re.sub(r'<TiffData.*?(/>|</TiffData>)', plane.format(0) + plane.format(1), text, flags=re.S)
    tifffile.imwrite(tmp_path / 'liar.ome.tif', np.ones((2, 16, 16), np.uint8), description=text.encode(), metadata=None, photometric='minisblack')
    assert tifffile.TiffFile(tmp_path / 'liar.ome.tif').series[0].asarray().max() == 2  # what it asks for
    try:
        assert read_scene(str(tmp_path / 'liar.ome.tif')).cube.max() < 2
    except UserError as error:
        assert 'liar' in str(error)


def test_lzw_without_imagecodecs_names_the_package(tmp_path):
    try:
        import imagecodecs  # noqa: F401
        pytest.skip('imagecodecs is installed')
    except ImportError:
        pass
    path = str(tmp_path / 'lzw.tif')
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8), compression='zlib')
    with tifffile.TiffFile(path, mode='r+b') as tif:
        tif.pages[0].tags['Compression'].overwrite(5)
    with pytest.raises(UserError, match='pip install imagecodecs'):
        read_scene(path)


# ============ tiling ============

def tile_args(**changes):
    return data.parse(['tile'] + [f'--{key}={value}' for key, value in changes.items()])


def contents(folder):
    return {name: open(os.path.join(folder, name), 'rb').read() for name in sorted(os.listdir(folder))}


def test_tiles_hold_the_scenes_own_values_and_labels(tmp_path):
    path = make_scene(tmp_path / 'scene.npz')
    data.tile(tile_args(root=path, out=tmp_path / 'out', tile_size=16, stride=8, split_block=8))
    scene, meta = read_scene(path), json.load(open(tmp_path / 'out' / 'meta.json'))
    seen = {}
    for split in data.SPLITS:
        tiles = Tiles(str(tmp_path / 'out'), split)
        images, labels = tiles.batch(range(len(tiles)))
        seen[split] = np.zeros(scene.labels.shape, int)
        for i, (_, row, col) in enumerate(meta['tiles'][split]):
            window = np.s_[row:row + 16, col:col + 16]
            np.testing.assert_array_equal(images[i], scene.cube[(slice(None), *window)])
            known = labels[i].numpy() > 0
            np.testing.assert_array_equal(labels[i].numpy()[known], scene.labels[window][known])
            seen[split][window] += known
    assert max(seen['val'].max(), seen['ts'].max()) == 1  # no test pixel counts twice, though tiles overlap at the border
    labelled = sum((count > 0).astype(int) for count in seen.values())
    assert (labelled[scene.labels > 0] == 1).all() and (labelled[scene.labels == 0] == 0).all()  # each label in exactly one split


def test_tiles_of_val_and_ts_have_labels_and_those_of_tr_need_none(tmp_path):
    labels = np.zeros((40, 64), np.uint8)
    labels[:, :32] = np.arange(32) // 4 % 3 + 1
    data.tile(tile_args(root=make_scene(tmp_path / 's.npz', width=64, labels=labels), out=tmp_path / 'out', tile_size=16, split_block=8))
    tr, val, ts = (Tiles(str(tmp_path / 'out'), split) for split in data.SPLITS)
    assert len(tr) == 12 and not all(x.any() for x in tr.labels)
    assert all(x.any() for x in [*val.labels, *ts.labels]) and max(col for _, _, col in ts.meta['tiles']['ts']) < 32


def test_split_puts_every_class_in_train_and_keeps_the_gap():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 5, (64, 64))
    labels[3:6, 3:6] = 5  # a class in one block only
    split = data.split_by_blocks(labels, [0.5, 0.1, 0.4], block=8, gap=2, seed=0)
    assert set(labels[split == 0]) == {1, 2, 3, 4, 5}
    assert abs((split == 0).sum() / (split < 3).sum() - 0.5) < 0.05
    for a in range(3):
        grown = F.max_pool2d(torch.from_numpy((split == a).astype(np.float32))[None, None], 3, 1, 1)[0, 0].numpy() > 0
        assert not (grown & (split != a) & (split != 3)).any()  # between two splits there is always unused ground


def test_halves_share_no_pixel(tmp_path):
    data.tile(tile_args(root=make_scene(tmp_path / 's.npz', width=128), out=tmp_path / 'out', tile_size=16, split='halves', shares='0.5,0.2,0.3'))
    columns = {s: {c + k for _, _, c in rows for k in range(16)} for s, rows in json.load(open(tmp_path / 'out' / 'meta.json'))['tiles'].items()}
    assert all(columns.values()) and not columns['tr'] & columns['val'] and not columns['tr'] & columns['ts'] and not columns['val'] & columns['ts']
    meta, labels = json.load(open(tmp_path / 'out' / 'meta.json')), np.load(tmp_path / 's.npz')['labels']
    for split, cols in (('tr', np.s_[:64]), ('val', np.s_[64:90]), ('ts', np.s_[90:])):
        assert meta['class_counts'][split] == np.bincount(labels[:, cols].ravel())[1:].tolist()


def test_statistics_are_those_of_valid_pixels(tmp_path):
    cube = np.random.default_rng(0).normal(100, 20, (40, 40, 3)).astype(np.float32)
    cube[:10] = np.nan
    cube[10:12] = -999
    path = make_scene(tmp_path / 's.npz', cube=cube, labels=None, wavelengths_nm=None, nodata=-999)
    data.tile(tile_args(root=path, out=tmp_path / 'out', tile_size=20))
    meta, valid = json.load(open(tmp_path / 'out' / 'meta.json')), cube[12:].reshape(-1, 3).astype(float)
    np.testing.assert_allclose(meta['mean'], valid.mean(0), rtol=1e-6)
    np.testing.assert_allclose(meta['covariance'], np.cov(valid.T), rtol=1e-6)
    assert meta['nodata_share'] == pytest.approx(12 / 40)
    raw = torch.from_numpy(np.moveaxis(cube, 2, 0)[None])
    for whiten in (0, 3):
        x = data.standardize(raw, *data.standardization(meta, whiten), meta['nodata'])
        assert torch.isfinite(x).all() and (x[:, :, :12] == 0).all()
        assert x[:, :, 12:].var(dim=(0, 2, 3)).mean() == pytest.approx(1, abs=0.01)
        if whiten:
            flat = x[0, :, 12:].flatten(1)
            np.testing.assert_allclose(torch.cov(flat), np.eye(3), atol=0.02)  # uncorrelated


def whu_layout(root, shape, axes, compression, n=1):
    rng = np.random.default_rng(0)
    for split in data.SPLITS:
        for folder in ('image', 'label'):
            os.makedirs(os.path.join(root, split, folder), exist_ok=True)
        for i in range(n):
            labels = np.kron(rng.integers(0, 25, (shape[0] // 16, shape[1] // 16)), np.ones((16, 16))).astype(np.uint8)
            image = (rng.normal(0, 9000, (25, 32))[labels] + 2000 * rng.standard_normal((*shape, 32), np.float32)).clip(-32767, 32767).astype(np.int16)
            if axes == 'CYX':
                tifffile.imwrite(f'{root}/{split}/image/O1_{i:04d}.tif', np.moveaxis(image, 2, 0), planarconfig='separate',
                                 photometric='minisblack', compression=compression)
            else:
                tifffile.imwrite(f'{root}/{split}/image/O1_{i:04d}.tif', image, planarconfig='contig', photometric='minisblack',
                                 compression=compression)
            tifffile.imwrite(f'{root}/{split}/label/O1_{i:04d}.tif', labels, compression=compression)


def test_whu_ohs_layout_tiles_trains_and_scores(tmp_path):
    for axes, compression, out in (('CYX', 'zlib', 'planar'), ('YXC', None, 'out')):
        whu_layout(str(tmp_path / 'whu'), (128, 128), axes, compression)
        data.tile(tile_args(root=tmp_path / 'whu', out=tmp_path / out, tile_size=64))
    planar, plain = contents(tmp_path / 'planar'), contents(tmp_path / 'out')
    assert all(planar[name] == plain[name] for name in plain if name.endswith('.npy'))  # both axis orders, plain and deflate
    meta = json.load(open(tmp_path / 'out' / 'meta.json'))
    assert meta['wavelengths_nm'] == list(data.OHS_NM) and meta['class_names'][23] == 'Ocean' and len(meta['tiles']['tr']) == 4
    data.tile(tile_args(root=tmp_path / 'whu', out=tmp_path / 'narrow', tile_size=64, bands='500,660,860'))  # its files do not say their wavelengths
    assert Tiles(str(tmp_path / 'narrow'), 'ts').meta['class_names'] == meta['class_names'] and Tiles(str(tmp_path / 'narrow'), 'ts').images.shape[1] == 3
    run('pretrain_mae.py', f'--data={tmp_path / "out"}', f'--out_dir={tmp_path / "mae"}', *MAE_TINY, '--img_size=64', '--patch_size=16',
        '--max_steps=2')
    run('segment.py', f'--data={tmp_path / "out"}', f'--encoder={tmp_path / "mae" / "last.pt"}', f'--out_dir={tmp_path / "seg"}',
        '--decoder=linear', '--steps=2', '--label_share=0.1')
    report = json.load(open(tmp_path / 'seg' / 'report.json'))
    assert len(report['scores']['iou']) == 24 and sum(map(sum, report['confusion_matrix'])) == sum(meta['class_counts']['ts'])


def arrays(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith('.npy')}


def facts(folder):
    return json.load(open(os.path.join(folder, 'meta.json')))


KILLED_TILER = """
import data, os, signal, sys
read, reads = data.open_input, []
def killed(*arguments):
    reads.append(arguments)
    if len(reads) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*arguments)
data.open_input = killed
data.tile(data.parse(sys.argv[2:]))
"""


def test_a_scene_that_changed_after_it_was_tiled_is_told(tmp_path):
    scene, out = make_scene(tmp_path / 's.npz'), tmp_path / 'tiles'
    labels = tmp_path / 'l.npy'
    np.save(labels, np.load(scene)['labels'])
    command = ['data.py', 'tile', f'--root={scene}', f'--labels={labels}', f'--out={out}', '--tile_size=16']
    run(*command)
    assert 'nothing to do' in run(*command).stdout
    for path in (scene, str(labels)):
        later = os.path.getmtime(out / 'meta.json') + 10
        os.utime(path, (later, later))
        done = run(*command, check=False)
        assert done.returncode == 1 and f'{path}: is newer than the tiles' in done.stderr and 'Traceback' not in done.stderr
        os.utime(out / 'meta.json', (later, later))  # as the sentence says, where the file is as it was
        assert 'nothing to do' in run(*command).stdout


@pytest.mark.parametrize('given', ['s.img', 's.hdr'])
def test_either_file_of_an_envi_scene_that_changed_is_told(given, tmp_path):
    np.random.default_rng(0).integers(1, 999, (4, 32, 32), dtype=np.uint16).tofile(tmp_path / 's.img')
    (tmp_path / 's.hdr').write_text('ENVI\nsamples = 32\nlines = 32\nbands = 4\ndata type = 12\ninterleave = bsq\nbyte order = 0\n')
    out = tmp_path / 'tiles'
    args = data.parse(['tile', f'--root={tmp_path / given}', f'--out={out}', '--tile_size=16'])
    data.tile(args)
    for changed in ('s.img', 's.hdr'):
        later = os.path.getmtime(out / 'meta.json') + 10
        os.utime(tmp_path / changed, (later, later))
        with pytest.raises(UserError, match=f'{changed}: is newer than the tiles'):
            data.tile(args)
        os.utime(out / 'meta.json', (later, later))


def test_killed_tiling_is_no_data_set_and_the_same_command_gives_the_same_bytes(tmp_path):
    root = tmp_path / 'whu'
    whu_layout(str(root), (64, 64), 'YXC', None, n=6)
    flags = [f'--root={root}', '--tile_size=32']
    run('data.py', 'tile', *flags, f'--out={tmp_path / "a"}')
    done = subprocess.run([sys.executable, '-c', KILLED_TILER, '8', 'tile', *flags, f'--out={tmp_path / "b"}'], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match='is half-made, .* run the same `python data.py tile`'):
        Tiles(str(tmp_path / 'b'), 'tr')
    run('data.py', 'tile', *flags, f'--out={tmp_path / "b"}')
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert 'nothing to do' in run('data.py', 'tile', *flags, f'--out={tmp_path / "b"}').stdout


def test_a_label_file_beside_a_folder_is_refused_and_not_overlooked(tmp_path):
    root = tmp_path / 'whu'
    whu_layout(str(root), (64, 64), 'YXC', None, n=2)
    with pytest.raises(UserError, match='--labels=l.npy: goes with scene files'):
        data.tile(data.parse(['tile', f'--root={root}', '--labels=l.npy', f'--out={tmp_path / "out"}', '--tile_size=32']))


def test_a_folder_with_bad_files_keeps_the_good_ones_and_can_be_finished(tmp_path):
    root, out = tmp_path / 'whu', tmp_path / 'out'
    whu_layout(str(root), (64, 64), 'YXC', 'zlib', n=6)
    image = root / 'tr' / 'image'
    open(image / 'O1_0001.tif', 'wb').close()
    (root / 'tr' / 'label' / 'O1_0002.tif').unlink()
    tifffile.imwrite(root / 'tr' / 'label' / 'O1_0003.tif', np.ones((32, 64), np.uint8))
    tifffile.imwrite(root / 'tr' / 'label' / 'O1_0004.tif', np.full((64, 64), 30, np.uint8))
    tifffile.imwrite(image / 'O1_0005.tif', np.zeros((64, 64, 5), np.int16), planarconfig='contig', photometric='minisblack')
    command = ['data.py', 'tile', f'--root={root}', f'--out={out}', '--tile_size=32']
    failed = run(*command, check=False)
    assert failed.returncode == 1 and 'Traceback' not in failed.stderr
    for i in range(1, 6):
        assert failed.stderr.count(f'O1_000{i}.tif: ') == 1, failed.stderr
    assert '5 of 18 inputs' in failed.stderr and 'go on without them with --skip_bad' in failed.stderr and not (out / 'meta.json').exists()
    (image / 'O1_0005.tif').unlink()
    assert '4 of 17 inputs' in run(*command, check=False).stderr
    run(*command, '--skip_bad=true')
    assert len(Tiles(str(out), 'tr')) == 4 and 'nothing to do' in run(*command).stdout
    np.savez(tmp_path / 'bad.npz', cube=np.zeros((4, 4, 4), 'complex64'))
    with pytest.raises(UserError, match='1 of 1 inputs could not be used.*the same command again$'):  # and nothing about going on without any
        data.tile(tile_args(root=tmp_path / 'bad.npz', out=tmp_path / 'none', skip_bad='true'))


def test_scenes_of_one_name_are_two_scenes_and_nodata_must_agree(tmp_path):
    for folder in 'ab':
        os.makedirs(tmp_path / folder)
        make_scene(tmp_path / folder / 's.npz', seed=ord(folder))
    data.tile(tile_args(root=f'{tmp_path}/a/s.npz,{tmp_path}/b/s.npz', out=tmp_path / 'out', tile_size=16, stride=16))
    both, tiles = [read_scene(str(tmp_path / folder / 's.npz')) for folder in 'ab'], Tiles(str(tmp_path / 'out'), 'tr')
    assert {where[0] for where in tiles.meta['tiles']['tr']} == {0, 1}
    for image, (scene, row, col) in zip(tiles.images, tiles.meta['tiles']['tr']):
        np.testing.assert_array_equal(image, both[scene].cube[:, row:row + 16, col:col + 16])
    make_scene(tmp_path / 'c.npz', nodata=7)
    with pytest.raises(UserError, match='nodata .7. and that of the scenes before it .None. differ'):
        data.tile(tile_args(root=f'{tmp_path}/a/s.npz,{tmp_path}/c.npz', out=tmp_path / 'out2', tile_size=16))


@pytest.mark.parametrize('where', ['read', 'tile', 'rename before', 'rename after'])
def test_killed_anywhere_loses_nothing(where, tmp_path, monkeypatch):
    """At every read of a scene, at every seventh tile, before and after every rename"""
    paths = [make_scene(tmp_path / f's{i}.npz', seed=i, nodata=0) for i in range(3)]
    args = dict(root=','.join(paths), tile_size=16, pca=2, normalize='scene')
    data.tile(tile_args(out=tmp_path / 'whole', **args))
    cut = data.cut
    owner, name = {'read': (data, 'open_input'), 'tile': (data, 'cut')}.get(where, (os, 'replace'))
    original = getattr(owner, name)

    def note(call):
        calls.append(call)
        if len(calls) == n + 1:
            raise KeyboardInterrupt

    def killed(*arguments):
        if where == 'rename after':
            original(*arguments)
            return note(arguments)
        note(arguments)
        return original(*arguments)

    def killed_cut(*arguments):
        for tile in cut(*arguments):
            note(tile)
            yield tile
    for n in range(0, 999, 7 if where == 'tile' else 1):
        out, calls = tmp_path / str(n), []
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed_cut if where == 'tile' else killed)
            try:
                data.tile(tile_args(out=out, **args))
                break  # fewer calls than n
            except KeyboardInterrupt:
                if where != 'rename after' or n < 3:  # the last rename makes meta.json
                    with pytest.raises(UserError, match='is half-made'):
                        Tiles(str(out), 'tr')
        data.tile(tile_args(out=out, **args))
        assert contents(tmp_path / 'whole') == contents(out), calls
        shutil.rmtree(out)
    assert n >= 3, n


def small_disk(limit):
    """From here on no file of this process grows beyond `limit` bytes: a write fails as on a full disk"""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_scenes_that_come_or_go_while_a_directory_is_complete_are_named(tmp_path):
    root, args = tmp_path / 'whu', dict(root=tmp_path / 'whu', out=tmp_path / 'out', tile_size=32)
    whu_layout(str(root), (64, 64), 'YXC', None, n=2)
    data.tile(tile_args(**args))
    os.rename(root / 'val', tmp_path / 'val')
    with pytest.raises(UserError, match='val/O1_0000.tif is gone'):
        data.tile(tile_args(**args))
    os.rename(tmp_path / 'val', root / 'val')
    shutil.copy(root / 'ts' / 'image' / 'O1_0000.tif', root / 'ts' / 'image' / 'new.tif')
    shutil.copy(root / 'ts' / 'label' / 'O1_0000.tif', root / 'ts' / 'label' / 'new.tif')
    with pytest.raises(UserError, match='ts/new.tif is new'):
        data.tile(tile_args(**args))


@pytest.mark.parametrize('limit', [3_000, 60_000, 150_000])  # for the first tile, for some, for all but the last
def test_a_full_disk_is_one_sentence_and_the_same_command_makes_it(limit, tmp_path):
    flags = ['data.py', 'tile', f'--root={make_scene(tmp_path / "s.npz", bands=40)}', '--tile_size=16', '--split_block=8']
    data.tile(data.parse([*flags[1:], f'--out={tmp_path / "whole"}']))
    full = run(*flags, f'--out={tmp_path / "out"}', check=False, prepare=functools.partial(small_disk, limit))
    assert full.returncode == 1 and 'Traceback' not in full.stderr and 'too large' in full.stderr, full.stderr
    with pytest.raises(UserError, match='tile'):
        Tiles(str(tmp_path / 'out'), 'tr')
    run(*flags, f'--out={tmp_path / "out"}')
    assert arrays(tmp_path / 'whole') == arrays(tmp_path / 'out') and facts(tmp_path / 'whole') == facts(tmp_path / 'out')


@pytest.mark.parametrize('flags', [{}, dict(stride=8), dict(split='halves', shares='0.4,0.2,0.4'), dict(normalize='scene', bands='500,620:40,860'), dict(pca=3)])
def test_scenes_that_stay_on_disk_give_the_same_tiles_and_are_read_row_of_tiles_by_row_of_tiles(flags, tmp_path, monkeypatch):
    cube = np.load(make_scene(tmp_path / 's.npz', height=96, width=160))['cube']
    cube[:5, :9] = 0
    path = make_scene(tmp_path / 's.npz', height=96, width=160, cube=cube, nodata=0)
    args = dict(root=path, tile_size=16, **flags)
    data.tile(tile_args(out=tmp_path / 'memory', **args))
    monkeypatch.setattr(data, 'IN_MEMORY', 0)
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 7 * 160 * 2 * 16)
    read, slices = scenes.Lazy.__getitem__, []

    def watched(lazy, key):
        values = read(lazy, key)
        slices.append(values.shape[1])
        return values
    monkeypatch.setattr(scenes.Lazy, '__getitem__', watched)
    data.tile(tile_args(out=tmp_path / 'disk', **args))
    assert len(slices) > 15 and max(slices) <= 16  # never the whole scene
    one, other = arrays(tmp_path / 'memory'), arrays(tmp_path / 'disk')
    assert one.keys() == other.keys()
    for name in one:
        a, b = (np.load(tmp_path / where / name) for where in ('memory', 'disk'))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * flags.get('pca', 0))  # sums of products in another order
    for key, value in facts(tmp_path / 'memory').items():
        if key in ('mean', 'std', 'covariance', 'components'):
            np.testing.assert_allclose(facts(tmp_path / 'disk')[key], value, rtol=1e-6, atol=1e-7)


def test_it_says_what_it_read_of_few_files_all_and_of_many_what_is_new(tmp_path, capsys):
    path = make_scene(tmp_path / 's.npz')
    data.tile(tile_args(root=path, out=tmp_path / 'one', tile_size=16))
    said = capsys.readouterr().out
    header, *notes = said.split('labelled pixels')[0].splitlines()
    assert header == f'{path}:' and [note.strip() for note in notes] == list(read_scene(path).notes) and all(note.startswith('  ') for note in notes)
    root = tmp_path / 'whu'
    whu_layout(str(root), (64, 64), 'YXC', None, n=6)
    odd = root / 'tr' / 'image' / 'O1_0004.tif'
    image = tifffile.imread(odd)
    image[:9] = -32768
    tifffile.imwrite(odd, image, planarconfig='contig', photometric='minisblack', extratags=[(42113, 's', 0, '-32768', True)])
    for other in glob.glob(f'{root}/*/image/*.tif'):
        if other != str(odd):  # all state it: only in one there are such pixels
            tifffile.imwrite(other, tifffile.imread(other), planarconfig='contig', photometric='minisblack', extratags=[(42113, 's', 0, '-32768', True)])
    data.tile(tile_args(root=root, out=tmp_path / 'many', tile_size=32))
    said = capsys.readouterr().out
    headers = [line for line in said.splitlines() if line.endswith('.tif:')]
    assert headers[0] == f'{root}/tr/image/O1_0000.tif:' and f'{odd}:' in headers and len(headers) < 5, said
    assert said[said.index(f'{odd}:'):].splitlines()[1].startswith('  14.1')  # 9 of 64 rows
    assert 'taken for WHU-OHS' in said and said.count('no georeference') == 1 and len(said.splitlines()) < 60


def test_pixels_of_the_classes_are_counted_and_odd_labels_told(tmp_path, capsys):
    def said(labels, **flags):
        root = make_scene(tmp_path / 's.npz', labels=labels.astype(np.uint8))
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        data.tile(tile_args(root=root, out=tmp_path / 'out', tile_size=16, **flags))
        return capsys.readouterr().out.split('labelled pixels', 1)[1]
    labels = np.arange(40 * 48).reshape(40, 48) % 4
    table = said(labels)
    counts = json.load(open(tmp_path / 'out' / 'meta.json'))['class_counts']
    for k in range(3):
        words = [f'{counts[split][k]}' for split in data.SPLITS]
        assert f'{k + 1} class {k + 1} ' + ' '.join(words) in re.sub(' +', ' ', table)
    assert 'WARNING' not in table
    assert 'only one class has labels' in said(labels > 1)
    assert 'only 3 of 94 class numbers' in said(np.where(labels == 3, 94, labels))
    assert 'WARNING' not in said(np.zeros((40, 48)))  # to pre-train


def test_a_scene_without_a_valid_pixel_is_named_and_no_measure_for_the_others(tmp_path):
    empty = make_scene(tmp_path / 'e.npz', cube=np.zeros((40, 48, 5), np.int16), nodata=0, wavelengths_nm=None)
    args = dict(root=f'{empty},{make_scene(tmp_path / "s.npz")}', out=tmp_path / 'out', tile_size=16)
    with pytest.raises(UserError, match='e.npz: no valid pixel') as caught:
        data.tile(tile_args(**args))
    assert 's.npz:' not in str(caught.value)
    data.tile(tile_args(skip_bad='true', **args))
    assert Tiles(str(tmp_path / 'out'), 'tr').meta['num_bands'] == 7


def test_labels_on_missing_pixels_are_no_labels(tmp_path):
    scene = np.load(make_scene(tmp_path / 's.npz'))
    cube = scene['cube'].copy()
    cube[:10] = 0
    cube[20, :, 3] = 0  # in one band only
    root = make_scene(tmp_path / 's.npz', cube=cube, nodata=0)
    data.tile(tile_args(root=root, out=tmp_path / 'out', tile_size=16))
    meta, seen = json.load(open(tmp_path / 'out' / 'meta.json')), 0
    for split in data.SPLITS:
        images, labels = Tiles(str(tmp_path / 'out'), split).batch(range(len(meta['tiles'][split])))
        missing = (images == 0).any(1)
        assert not labels[missing].any()
        seen += int(missing.sum())
    kept = np.delete(scene['labels'], [*range(10), 20], 0)
    assert seen > 500 and sum(map(sum, meta['class_counts'].values())) == np.count_nonzero(kept)


def test_flags_for_what_a_file_leaves_open_reach_the_reader_and_are_settings(tmp_path, capsys):
    cube = np.random.default_rng(0).integers(1, 999, (30, 40, 48)).astype(np.int16)  # which axis the bands are, no one could tell
    cube[:, :6] = -5
    np.save(tmp_path / 's.npy', cube)
    args = dict(root=tmp_path / 's.npy', out=tmp_path / 'out', tile_size=16)
    data.tile(tile_args(axes='chw', nodata=-5, drop_bands='2,7-8', **args))
    meta = json.load(open(tmp_path / 'out' / 'meta.json'))
    kept = [0, 2, 3, 4, 5, *range(8, 30)]
    assert meta['num_bands'] == 27 and meta['bands'] == kept and meta['nodata'] == -5 and meta['nodata_share'] == pytest.approx(6 / 40)
    np.testing.assert_array_equal(Tiles(str(tmp_path / 'out'), 'tr').images[0], cube[kept, :16, :16])
    assert data.kept_meta(meta)['bands'] == meta['bands'] and 'scale' in data.kept_meta(meta)
    for change in (dict(axes='chw', nodata=-5), dict(axes='chw', nodata=-5, drop_bands='2'), dict(axes='chw', drop_bands='2,7-8')):
        with pytest.raises(UserError, match=r'drop_bands \(2,7-8 there|nodata \(-5.0 there'):
            data.tile(tile_args(**change, **args))
    with pytest.raises(UserError, match='keep_bad_bands .False there, True now'):
        data.tile(tile_args(axes='chw', nodata=-5, drop_bands='2,7-8', keep_bad_bands='true', **args))
    plain = ['tile', '--root=a', '--out=b']
    assert data.parse([*plain, '--keep_bad_bands', '--nodata=nan']) == data.parse([*plain, '--keep_bad_bands=true'])
    with pytest.raises(SystemExit):
        data.parse([*plain, '--seed=-1'])
    assert '--seed start at 0' in capsys.readouterr().err


def test_an_array_in_a_file_is_named_for_scene_and_labels(tmp_path):
    scene = np.load(make_scene(tmp_path / 'plain.npz', wavelengths_nm=None))
    np.savez(tmp_path / 's.npz', hsi=scene['cube'], other=scene['cube'][::-1, ::-1] + 1, train=scene['labels'], test=scene['labels'][::-1])
    data.tile(tile_args(root=f'{tmp_path}/s.npz:hsi', labels=f'{tmp_path}/s.npz:train', out=tmp_path / 'named', tile_size=16))
    data.tile(tile_args(root=tmp_path / 'plain.npz', out=tmp_path / 'plain', tile_size=16))
    assert arrays(tmp_path / 'named') == arrays(tmp_path / 'plain')
    with pytest.raises(UserError, match='s.npz.*hsi.*other'):
        data.tile(tile_args(root=f'{tmp_path}/s.npz:none', out=tmp_path / 'no', tile_size=16))


@pytest.mark.parametrize('first, second, words', [
    (dict(scale=(1e-4, 0)), dict(scale=(1e-3, 0)), r'b.npz: its scale \(\(0.001, 0.*0.0001'), (dict(nodata=0), dict(nodata=7), r'b.npz: its nodata \(7.*\(0'),
    (dict(scale=(1e-4, 0)), {}, ''), (dict(wavelengths_nm=np.linspace(450.04, 950, 7)), {}, ''),
    (dict(wavelengths_nm=np.linspace(460, 950, 7)), {}, 'its wavelengths_nm'), ({}, dict(wavelengths_nm=None), ''),
    (dict(class_names=['a', 'b', 'c']), dict(class_names=['a', 'c', 'b']), 'its class_names .*same classes together')])
def test_scenes_of_other_units_nodata_or_wavelengths_are_refused_with_both_unless_normalised(first, second, words, tmp_path):
    paths = [make_scene(tmp_path / f'{name}.npz', seed=ord(name), **extra) for name, extra in (('a', first), ('b', second))]
    args = dict(root=','.join(paths), tile_size=16)
    if words:
        with pytest.raises(UserError, match=words):
            data.tile(tile_args(out=tmp_path / 'no', **args))
    if words and 'scale' not in words and 'nodata' not in words:
        return
    data.tile(tile_args(out=tmp_path / 'yes', normalize='scene' if words else 'none', **args))
    meta = Tiles(str(tmp_path / 'yes'), 'tr').meta
    assert len(meta['scenes']) == 2 and (words or meta['scale'] == ([1e-4, 0] if 'scale' in first else None))


def test_scenes_behind_a_first_one_that_states_nothing_still_have_to_agree(tmp_path):
    nothing = make_scene(tmp_path / 'a.npz', wavelengths_nm=None, labels=None)
    stated = dict(class_names=['a', 'b', 'c'], fwhm_nm=np.full(7, 9.0), scale=(1e-4, 0))
    states = make_scene(tmp_path / 'b.npz', seed=1, **stated)
    data.tile(tile_args(root=f'{nothing},{states}', out=tmp_path / 'two', tile_size=16))
    meta = Tiles(str(tmp_path / 'two'), 'tr').meta
    np.testing.assert_allclose(meta['wavelengths_nm'], np.linspace(450, 950, 7))
    assert meta['class_names'] == ['a', 'b', 'c'] and meta['fwhm_nm'] == [9] * 7 and meta['scale'] == [1e-4, 0]
    for change, words in ((dict(class_names=['c', 'b', 'a']), 'class_names'), (dict(wavelengths_nm=np.linspace(460, 950, 7)), 'wavelengths_nm'), (dict(scale=(1, 5)), 'scale')):
        other = make_scene(tmp_path / 'c.npz', seed=2, **{**stated, **change})
        with pytest.raises(UserError, match=f'c.npz: its {words}'):
            data.tile(tile_args(root=f'{nothing},{states},{other}', out=tmp_path / f'no_{words}', tile_size=16))


def test_scenes_of_one_sensor_that_lack_other_bands_are_told_the_flag(tmp_path, capsys):
    cube = np.load(make_scene(tmp_path / 'a.npz'))['cube']
    cube[..., 4] = 0  # left out, as it is empty
    args = dict(root=f'{tmp_path}/a.npz,' + make_scene(tmp_path / 'b.npz', cube=cube), tile_size=16)
    with pytest.raises(UserError, match='b.npz: of its 7 bands .*--drop_bands=5 '):
        data.tile(tile_args(out=tmp_path / 'no', **args))
    assert 'band 5 (783 nm) left out' in capsys.readouterr().out  # the refused one's notes
    data.tile(tile_args(out=tmp_path / 'yes', drop_bands='5', **args))
    assert Tiles(str(tmp_path / 'yes'), 'tr').meta['bands'] == [0, 1, 2, 3, 5, 6]
    make_scene(tmp_path / 'c.npz', bands=6, wavelengths_nm=None)
    make_scene(tmp_path / 'd.npz', cube=cube, wavelengths_nm=None)  # six bands are left of these seven, too
    with pytest.raises(UserError, match='d.npz: the file has 7 bands, those of the scenes before it 6'):
        data.tile(tile_args(root=f'{tmp_path}/c.npz,{tmp_path}/d.npz', out=tmp_path / 'no2', tile_size=16))


def test_a_mask_that_makes_one_scene_float32_is_mended_by_nodata(tmp_path):
    cube = np.load(make_scene(tmp_path / 'a.npz', bands=3))['cube']
    for name, hole in (('a', 0), ('b', 12)):
        alpha = np.full((*cube.shape[:2], 1), 65535, np.uint16)
        alpha[:, :hole] = 0
        tifffile.imwrite(tmp_path / f'{name}.tif', np.concatenate([cube, alpha], 2), photometric='minisblack', planarconfig='contig', extrasamples=[0, 0, 2])
    args = dict(root=f'{tmp_path}/a.tif,{tmp_path}/b.tif', tile_size=16)
    with pytest.raises(UserError, match='b.tif: its dtype .float32.*if a mask made the one float32, --nodata='):
        data.tile(tile_args(out=tmp_path / 'no', **args))
    data.tile(tile_args(out=tmp_path / 'yes', nodata=65535, **args))
    assert Tiles(str(tmp_path / 'yes'), 'tr').meta['dtype'] == 'uint16'


def test_meta_keeps_what_the_file_states(tmp_path):
    colors = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    root = make_scene(tmp_path / 's.npz', fwhm_nm=np.full(7, 12.0), class_colors=colors, class_names=['a', 'b', 'c'], scale=(1e-4, 0))
    data.tile(tile_args(root=root, out=tmp_path / 'out', tile_size=16))
    meta = json.load(open(tmp_path / 'out' / 'meta.json'))
    assert meta['fwhm_nm'] == [12] * 7 and meta['class_colors'] == colors and meta['scale'] == [1e-4, 0] and meta['bands'] is None
    assert data.kept_meta(meta)['class_colors'] == colors


@pytest.mark.parametrize('flags, words', [
    (['--root=nowhere'], 'nowhere: there is no such file'), (['--root={scene}', '--tile_size=64'], 'smaller tiles'),
    (['--root={scene}', '--bands=200,300'], 'inside its range'), (['--root={scene}', '--bands=red'], 'in nm'),
    (['--root={empty}'], 'expected tr|val|ts'), (['--root={scene},{other}'], 'sensor'), (['--root={scene}', '--labels=a,b'], '--labels names'),
    (['--root={scene}', '--pca=8'], 'choose from 1 to 7'),
])
def test_mistakes_on_the_command_line_of_tile(tmp_path, flags, words):
    os.makedirs(tmp_path / 'empty')
    places = dict(scene=make_scene(tmp_path / 's.npz'), other=make_scene(tmp_path / 'o.npz', bands=9), empty=tmp_path / 'empty')
    flags = [flag.format(**places) for flag in flags]
    args = data.parse(['tile', f'--out={tmp_path / "out"}', '--tile_size=16', *flags])
    with pytest.raises(UserError, match=words.replace('|', r'\|')):
        data.tile(args)
    assert not os.path.exists(tmp_path / 'out' / 'meta.json')


def test_a_tiling_that_fails_leaves_nothing_behind_but_what_was_there(tmp_path):
    flags = ['data.py', 'tile', f'--root={make_scene(tmp_path / "s.npz")}', '--tile_size=16', '--pca=8']
    assert 'choose from 1 to 7' in run(*flags, f'--out={tmp_path / "new"}', check=False).stderr
    assert not os.path.exists(tmp_path / 'new')
    os.makedirs(tmp_path / 'old')
    (tmp_path / 'old' / 'notes.txt').write_text('mine')
    run(*flags, f'--out={tmp_path / "old"}', check=False)
    assert (tmp_path / 'old' / 'notes.txt').read_text() == 'mine'


def test_too_many_components_are_refused_at_the_first_scene(tmp_path, monkeypatch):
    opened, original = [], data.open_input
    monkeypatch.setattr(data, 'open_input', lambda item, args: opened.append(item) or original(item, args))
    paths = [make_scene(tmp_path / f'{number}.npz', seed=number) for number in range(3)]
    with pytest.raises(UserError, match='choose from 1 to 7'):
        data.tile(tile_args(root=','.join(paths), out=tmp_path / 'out', tile_size=16, pca=8))
    assert len(opened) == 1


def test_other_settings_do_not_overwrite_finished_tiles(tmp_path):
    path = make_scene(tmp_path / 's.npz')
    data.tile(tile_args(root=path, out=tmp_path / 'out', tile_size=16))
    before = contents(tmp_path / 'out')
    with pytest.raises(UserError, match=r'tile_size \(16 there, 8 now\)'):
        data.tile(tile_args(root=path, out=tmp_path / 'out', tile_size=8))
    assert contents(tmp_path / 'out') == before


def test_an_array_that_is_not_of_its_meta_json_is_told(tmp_path):
    data.tile(tile_args(root=make_scene(tmp_path / 's.npz'), out=tmp_path / 'out', tile_size=16))
    for damage in (lambda path: np.save(path, np.load(path)[1:]), lambda path: os.truncate(path, 999)):
        damage(tmp_path / 'out' / 'tr_labels.npy')
        with pytest.raises(UserError, match='tr_labels.npy: cannot be read .*: delete .* and tile again'):
            Tiles(str(tmp_path / 'out'), 'tr')


def test_empty_split_is_told(tmp_path):
    data.tile(tile_args(root=make_scene(tmp_path / 's.npz', labels=None), out=tmp_path / 'out', tile_size=16))
    assert len(Tiles(str(tmp_path / 'out'), 'tr')) == 9
    with pytest.raises(UserError, match='split "ts" has no tiles: tile again .* --labels'):
        Tiles(str(tmp_path / 'out'), 'ts')


# ============ batches and augmentation ============

def test_batch_reads_the_tiles_asked_for_and_keeps_two_buffers(scene_data):
    tiles = Tiles(scene_data, 'tr')
    first, labels = tiles.batch([3, 0, 3], reuse=True)
    np.testing.assert_array_equal(first, tiles.images[[3, 0, 3]])
    np.testing.assert_array_equal(labels, tiles.labels[[3, 0, 3]])
    second, _ = tiles.batch([1, 2, 4], reuse=True)
    tiles.batch([5])  # a copy takes no turn
    np.testing.assert_array_equal(first, tiles.images[[3, 0, 3]])  # still valid
    third, _ = tiles.batch([0, 1, 2], reuse=True)
    assert third.data_ptr() == first.data_ptr() and second.data_ptr() != first.data_ptr() and first.dtype == torch.uint16
    for reuse in (False, True):
        window, labels = tiles.batch([2, 5], corners=[[1, 2], [4, 0]], side=8, reuse=reuse)
        np.testing.assert_array_equal(window[0], tiles.images[2][:, 1:9, 2:10])
        np.testing.assert_array_equal(window[1], tiles.images[5][:, 4:12, :8])
        np.testing.assert_array_equal(labels[1], tiles.labels[5][4:12, :8])


def test_batches_are_copies_that_nothing_overwrites(scene_data):
    tiles = Tiles(scene_data, 'tr')
    images = [tiles.batch([i])[0] for i in range(4)]  # what a notebook does
    tiles.batch([7]), tiles.batch([7], reuse=True)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(image[0], tiles.images[i])
    assert len({image.numpy().tobytes() for image in images}) == 4
    image, labels = tiles[2]
    image.zero_(), labels.zero_()  # a copy, not the file
    assert tiles.images[2].any() and torch.equal(tiles[-1][0], tiles[len(tiles) - 1][0])
    for ids in ([len(tiles)], [0, -1]):
        with pytest.raises(IndexError):
            tiles.batch(ids)
    with pytest.raises(IndexError):
        tiles[len(tiles)]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_data_loader_takes_tiles(workers, scene_data, tmp_path):
    tiles = Tiles(scene_data, 'tr', label_share=0.5, seed=3)
    loader = torch.utils.data.DataLoader(tiles, batch_size=4, num_workers=workers, multiprocessing_context='fork' if workers else None)
    images, labels = map(torch.cat, zip(*loader))
    np.testing.assert_array_equal(images, tiles.images)
    np.testing.assert_array_equal(labels, tiles.labels)
    sent = pickle.dumps(tiles)  # what a worker that was not forked gets
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).labels, tiles.labels)
    data.tile(tile_args(root=make_scene(tmp_path / 's.npz'), out=tmp_path / 't', tile_size=16))
    for name in os.listdir(tmp_path / 't'):
        if name.endswith('labels.npy'):
            os.remove(tmp_path / 't' / name)
    images = torch.cat(list(torch.utils.data.DataLoader(Tiles(str(tmp_path / 't'), 'tr'), batch_size=4)))
    np.testing.assert_array_equal(images, Tiles(str(tmp_path / 't'), 'tr').images)


@pytest.mark.parametrize('windows, batch', [(10, 4), (1, 3), (2, 2), (7, 20), (97, 10), (1000, 64)])
def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(windows, batch):
    steps = -(-3 * windows // batch)
    seen = np.concatenate([data.epoch_ids(windows, batch, step, seed=0) for step in range(steps)])
    epochs = seen[:3 * windows].reshape(3, windows)
    assert (np.sort(epochs) == np.arange(windows)).all()
    if windows > 5:
        other = np.concatenate([data.epoch_ids(windows, windows, step, seed=1) for step in range(3)]).reshape(3, windows)
        orders = {tuple(order) for order in (*epochs, *other, range(windows))}
        assert len(orders) == 7  # each epoch and each seed has its own, and none is the stored order


def test_windows_of_a_step_do_not_depend_on_the_steps_before():
    later = data.epoch_ids(1000, 64, 40, seed=3)
    stream = np.concatenate([data.epoch_ids(1000, 32, step, seed=3) for step in range(82)])
    np.testing.assert_array_equal(later, stream[40 * 64:41 * 64])


def test_the_order_of_windows_is_random():
    n, epochs = 30, 2000
    orders = np.stack([data.shuffled(np.arange(n), n, [0, epoch]) for epoch in range(epochs)])
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chance = np.sqrt(epochs / n * (1 - 1 / n))
    assert abs(counts - epochs / n).max() < 4.5 * chance  # each window is at each place equally often
    jumps = np.bincount((np.diff(orders) % n).ravel(), minlength=n)[1:]
    assert abs(jumps / jumps.mean() - 1).max() < 0.1  # and followed by each other one
    large = data.shuffled(np.arange(20_000), 20_000, [0, 0])
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.03 and abs(np.corrcoef(large, np.arange(20_000))[0, 1]) < 0.03


def test_billions_of_windows_are_drawn_without_a_list_of_them():
    tracemalloc.start()
    ids = data.epoch_ids(10 ** 10, 64, 123_456_789, seed=0)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert memory < 1e6 and len(set(ids.tolist())) == 64 and 0 <= ids.min() and 5e9 < ids.max() < 10 ** 10


def test_tiles_that_are_read_ahead_are_those_of_the_next_batch(scene_data, monkeypatch):
    tiles, asked = Tiles(scene_data, 'tr'), []
    monkeypatch.setattr(os, 'posix_fadvise', lambda fd, start, length, advice: asked.append((os.readlink(f'/proc/self/fd/{fd}'), start, length, advice)), raising=False)
    tiles.read_ahead(np.array([3, 0]))
    for (path, start, length, advice), (kind, stored, i) in zip(asked, [('images', tiles.images, 3), ('images', tiles.images, 0), ('labels', tiles.labels, 3),
                                                                          ('labels', tiles.labels, 0)], strict=True):
        with open(path, 'rb') as file:
            file.seek(start)
            assert file.read(length) == stored[i].tobytes() and kind in path and advice == os.POSIX_FADV_WILLNEED
    asked.clear()
    tiles.read_ahead([1], side=4)  # a small window of a tile of 16 px: most would be read for nothing
    assert not asked
    Tiles(scene_data, 'tr', label_share=0.5).read_ahead([1])  # its labels are in memory
    assert len(asked) == 1
    monkeypatch.delattr(os, 'posix_fadvise')
    tiles.read_ahead([0])  # a system that cannot


@pytest.mark.parametrize('script', ['pretrain_mae', 'pretrain_dino_hsi'])
def test_the_tiles_of_the_next_step_are_read_ahead(script, scene_data, monkeypatch):
    script = importlib.import_module(script)
    for name, value in dict(img_size=16, local_crops_size=8, patch_size=4, batch_size=6).items():
        monkeypatch.setattr(script, name, value, raising=False)
    tiles, read, ahead = Tiles(scene_data, 'tr'), [], []
    plain = tiles.batch
    tiles.batch = lambda ids, *args, **kwargs: (read.append(list(ids)), plain(ids, *args, **kwargs))[1]
    tiles.read_ahead = lambda ids, side: ahead.append(list(ids))
    for step in range(4):
        script.get_batch(tiles, step, rank=1, world=2)
    assert read[1:] == ahead[:-1] and len(read[0]) == 3


def test_resized_crop_is_torchs_bilinear_with_antialias_and_turns_labels_alike():
    x = torch.randn(32, 3, 20, 20)
    _, _, boxes, turns = data.draw_crops(32, 20, 16, 0.3, 1.5, torch.Generator().manual_seed(0))
    got = data.resized_crop(x, boxes, turns, 12)
    labels = data.resized_crop_labels((x[:, 0] > 0).long(), boxes, turns, 12)
    for i, ((top, left, h, w), (flip_rows, flip_cols, transpose)) in enumerate(zip(boxes.tolist(), turns.tolist())):
        crop = x[i:i + 1, :, top:top + h, left:left + w]
        for source, result, mode in ((crop, got[i], dict(mode='bilinear', antialias=True)), ((crop[:, :1] > 0).float(), labels[i][None], dict(mode='nearest-exact'))):
            expected = F.interpolate(source, size=(12, 12), **mode)[0]
            expected = expected.flip([1] * flip_rows) if flip_rows else expected
            expected = expected.flip([2]) if flip_cols else expected
            expected = expected.transpose(1, 2) if transpose else expected
            np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_crop_of_scale_one_is_an_exact_copy_from_anywhere_in_the_tile():
    x = torch.randn(200, 2, 24, 24)
    corners, side, boxes, turns = data.draw_crops(200, 24, 8, 1, 1, torch.Generator().manual_seed(0), turns=False)
    windows = torch.stack([t[:, r:r + side, c:c + side] for t, (r, c) in zip(x, corners)])
    for y, t, (row, col), (top, left, _, _) in zip(data.resized_crop(windows, boxes, turns, 8), x, corners, boxes):
        np.testing.assert_array_equal(y, t[:, row + top:row + top + 8, col + left:col + left + 8])
    where = corners + boxes[:, :2]
    assert where.min() == 0 and where.max() == 16


def light_on(x, light, bands, matrix=None):
    """x (B, C + 1, H, W) -> augment_spectra() with draws of seed 0"""
    generator = torch.Generator().manual_seed(0)
    draws, field = torch.rand(len(x), 11, generator=generator), torch.randn(bands, 64, x.shape[-1], generator=generator)
    ones = torch.ones(bands)
    statistics = data.Statistics(ones, ones, ones if matrix is None else matrix)
    return data.augment_spectra(x, draws, field, statistics, light)


@pytest.mark.parametrize('bands', [1, 2, 3, 8])
def test_band_dropout_removes_a_third_at_most_and_never_of_one_or_two_bands(bands):
    y = light_on(torch.ones(1000, bands + 1, 2, 2), data.Light(band_dropout=0.5), bands)[:, :, 0, 0]
    dropped = (y == 0).sum(1)
    if bands < 3:
        assert not dropped.any()
    else:
        assert dropped.max() == -(-bands // 3) and abs((dropped > 0).float().mean() - 0.5) < 0.05
        assert all((row == 0).nonzero().diff(dim=0).eq(1).all() for row in y)  # neighbours


def test_light_of_strength_0_changes_nothing_and_missing_pixels_stay_0():
    x = torch.randn(6, 5, 9, 9)
    x[:, 4] = (torch.rand(6, 9, 9) < 0.8).float()
    same = light_on(x, data.Light(), 4)
    torch.testing.assert_close(same, x[:, :4] * x[:, 4:], rtol=0, atol=0)
    strong = light_on(x, data.Light(gain=0.5, offset=2, noise=1, band_dropout=0.5, jitter=0.5, solarize=0.5), 4, torch.randn(4, 4))
    assert (strong[(x[:, 4:] == 0).expand_as(strong)] == 0).all() and not torch.allclose(strong, same)


# ============ judging ============

class Counted:
    """Tiles that hold raw values 0, 1, 2, ... by tile, and their labels"""
    directory, split, pin_memory = '', 'ts', False

    def __init__(self, count, side=8):
        labels = np.random.default_rng(0).integers(0, 4, (count, side, side)).astype(np.uint8)
        self.images, self.labels = labels[:, None].repeat(2, 1) + 10, labels
        names = ['a', 'b', 'c']
        self.meta = {'num_classes': 3, 'class_names': names, 'split': 'made up', 'wavelengths_nm': None, 'nodata': None, 'mean': [10, 10], 'std': [3, 3]}

    def __len__(self):
        return len(self.labels)

    def batch(self, ids):
        return torch.from_numpy(self.images[ids]), torch.from_numpy(self.labels[ids])


def right(raw):
    """The labels of Counted, as classes"""
    return (raw[:, 0].long() - 11).clamp(min=0)


def test_predictions_are_counted_beside_their_labels_over_all_ranks():
    tiles = Counted(7)
    whole = data.evaluate(right, tiles)
    assert scores(whole)['oa'] == 1 and whole.sum() == np.count_nonzero(tiles.labels) and torch.equal(whole, whole.T)
    cm = sum(confusion_matrix(right(tiles.batch(ids)[0]), label_to_class(tiles.batch(ids)[1]), 3) for ids in ([0, 2, 4, 6], [1, 3, 5]))
    assert torch.equal(whole, cm)
    shifted = data.evaluate(lambda raw: (right(raw) + 1) % 3, tiles)
    assert scores(shifted)['oa'] == 0


def test_a_tile_larger_than_the_window_is_predicted_in_blended_windows():
    raw, seen = torch.arange(2 * 24 * 24.0).reshape(1, 2, 24, 24), []

    def probabilities(x):
        seen.append(x.shape[-1])
        return torch.cat([x / 2000, 1 - x[:, :1] / 2000], 1)
    whole = data.predict_tile(probabilities, raw, 24, 3)
    windows = data.predict_tile(probabilities, raw, 8, 3)
    assert whole.shape == windows.shape == (1, 3, 24, 24) and set(seen) == {24, 8}
    torch.testing.assert_close(whole, windows, rtol=1e-5, atol=1e-5)  # of each pixel alone: no seam can show


def test_a_report_prints_the_name_beside_its_floors_and_keeps_all_numbers(tmp_path, capsys, scene_data):
    cm, meta = torch.tensor([[50, 0, 0], [10, 40, 0], [0, 0, 0]]), {'class_names': ['a', 'b', 'c'], 'split': 'made up'}
    floor = data.floors(scene_data, 'ts')
    result = data.report(str(tmp_path), 'my network', cm, floor, meta, {'best_step': 7})
    said, kept = capsys.readouterr().out, json.load(open(tmp_path / 'report.json'))
    assert result == scores(cm) == kept['scores'] and kept['best_step'] == 7 and kept['floors'] == floor and kept['confusion_matrix'] == cm.tolist()
    assert kept['class_names'] == meta['class_names'] and kept['how_split'] == 'made up' and kept['warning'] == '' and kept['split'] == 'ts'
    for words in ('my network', 'window', 'majority', '90.0', 'IoU absent  c (0 px)', '83.3  a (50 px)'):
        assert words in said, words
    assert ('below the window floor' in said) == (result['miou'] < floor['window']['miou'])
    data.report(str(tmp_path), 'chance', torch.full((3, 3), 9), floor, meta, {})
    poor = capsys.readouterr().out
    assert 'not clearly above chance' in poor and 'below the window floor' in poor


def test_pictures_of_a_judge_show_matrix_and_tiles(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(data, 'save_figure', lambda figure, path: figures.append(figure))
    tiles = Counted(6)
    data.save_examples('examples.png', right, tiles)
    axes = figures[0].axes
    assert len(axes) == 12 and len({axis.get_ylabel() for axis in axes[::3]}) == 4
    known = tiles.labels[int(axes[0].get_ylabel().split()[1][:-1])] > 0
    labels, predicted = (np.asarray(axis.images[0].get_array()) for axis in axes[1:3])
    np.testing.assert_array_equal(labels[known], predicted[known])
    data.save_confusion('confusion.png', torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]]), ['a', 'b', 'c'])
    texts = [text.get_text() for text in figures[1].axes[0].texts]
    assert texts == ['80', '20', '100'] and [t.get_text() for t in figures[1].axes[0].get_yticklabels()][0] == 'a (10)'


# ============ floors ============

def test_floors_see_what_there_is_to_see(scene_data):
    rows = data.floors(scene_data, 'ts')
    assert rows['pixel']['miou'] > 0.9  # the stripes differ by spectrum
    assert rows['majority']['mean_acc'] == pytest.approx(1 / 3) and rows['chance']['mean_acc'] == pytest.approx(1 / 3)
    assert data.floors(scene_data, 'ts') == rows  # from floors.json


def test_floors_are_those_of_the_labels_and_tiles_that_are_there(scene_data, tmp_path):
    shutil.copytree(scene_data, tmp_path / 'tiles')
    path = tmp_path / 'tiles' / 'floors.json'
    known = len(json.load(open(path)))
    before = data.floors(str(tmp_path / 'tiles'), 'ts')
    assert before == data.floors(scene_data, 'ts')
    labels = np.load(tmp_path / 'tiles' / 'ts_labels.npy')
    np.save(tmp_path / 'tiles' / 'ts_labels.npy', np.where(labels == 1, 2, labels).astype(np.uint8))  # the map of labels is corrected
    after = data.floors(str(tmp_path / 'tiles'), 'ts')
    assert after['majority'] != before['majority'] and after['pixel']['iou'][0] is None
    own_labels = np.load(os.path.join(os.path.dirname(scene_data), 'scene.npz'))['labels']
    scene = make_scene(tmp_path / 'other.npz', height=64, width=96, seed=3, labels=own_labels)  # other spectra alone
    os.remove(tmp_path / 'tiles' / 'meta.json')
    tiled(scene, tmp_path / 'tiles', '--tile_size=16', '--split_block=8')
    assert len(json.load(open(path))) == known + 1
    data.floors(str(tmp_path / 'tiles'), 'ts')
    assert len(json.load(open(path))) == known + 2


def test_tiles_that_a_run_has_open_outlive_tiling_anew(scene_data, tmp_path):
    shutil.copytree(scene_data, tmp_path / 'tiles')
    tiles = data.Tiles(str(tmp_path / 'tiles'), 'tr')
    before = np.array(tiles.images)
    os.remove(tmp_path / 'tiles' / 'meta.json')
    scene = make_scene(tmp_path / 'other.npz', height=32, width=32, seed=3)
    tiled(scene, tmp_path / 'tiles', '--tile_size=16', '--split_block=8')
    assert len(data.Tiles(str(tmp_path / 'tiles'), 'tr')) < len(tiles)
    np.testing.assert_array_equal(tiles.images, before)  # and no bus error


def test_the_demo_is_made_under_any_spelling_of_its_place(tmp_path, monkeypatch):
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'demo', lambda args: made.append(args.out))
    for place in ('data/demo', 'data/demo/', './data/demo', 'data/mine'):
        data.demo_if_missing(place)
    assert made == ['data/demo', 'data/demo/', './data/demo']


def test_demo_is_hard_enough_but_not_noise(demo, tmp_path):
    for folder in ('tr/image', 'tr/label', 'ts/image', 'ts/label'):  # of a few scenes and labels: all of them take ten times as long
        os.makedirs(tmp_path / 'scenes' / folder)
        for number in range(1, 7):
            shutil.copy(demo / 'demo' / 'scenes' / folder / f'D_000{number}.tif', tmp_path / 'scenes' / folder)
    rows = data.floors(str(tiled(tmp_path / 'scenes', tmp_path / 'tiles')), 'ts', 0.02)
    assert 0.05 < rows['pixel']['miou'] < 0.7 and rows['window']['miou'] > rows['pixel']['miou']
    image = tifffile.imread(demo / 'demo' / 'scenes' / 'tr' / 'image' / 'D_0001.tif')[44:].astype(float)  # below the corner without data
    values, vectors = np.linalg.eigh(np.corrcoef(image.reshape(-1, 32).T))
    parts = image @ vectors[:, -12:] / np.sqrt(values[-12:])  # whitening magnifies weak components: they must hold more than noise
    neighbours = [np.corrcoef(part[:, 1:].ravel(), part[:, :-1].ravel())[0, 1] for part in np.moveaxis(parts, 2, 0)]
    assert min(neighbours) > 0.3, neighbours  # as in real scenes: 0.3 to 1 in the first twelve of indian_pines at 32 bands


@pytest.mark.skipif(not os.path.isdir(SCENES), reason='the real scenes are not at hand')
def test_real_scenes_can_be_read():
    shapes = {os.path.basename(p): read_scene(p).cube.shape for p in glob.glob(os.path.join(SCENES, '*.npz'))}
    assert shapes['indian_pines.npz'] == (200, 145, 145) and shapes['gewata_landsat7.npz'] == (6, 1177, 1548) and len(shapes) == 8


def test_damaged_files_give_a_scene_or_a_sentence_and_nothing_else():
    """Bit flips, cut ends, zeroed stretches: fuzz_scenes.py tells how many; here a few of each format, in a process of their own."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'tests', 'fuzz_scenes.py'), '54'], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and '54 damaged files' in done.stdout, done.stdout + done.stderr[-2000:]


def test_the_probe_never_asks_a_pixels_own_place():
    generator = torch.Generator().manual_seed(0)
    y, blocks = torch.randint(4, (2000,), generator=generator), torch.arange(2000) // 50
    y = (blocks * 7 % 4 + (torch.rand(2000, generator=generator) < 0.1)) % 4  # classes go with places
    places = torch.nn.functional.one_hot(blocks).float()  # features that say where a pixel is, and nothing else
    kinds = torch.nn.functional.one_hot(y).float() + 0.1 * torch.randn(2000, 4, generator=generator)
    assert data.ridge_probe(kinds, y, blocks, 4)['oa'] > 0.99
    assert data.ridge_probe(places, y, torch.arange(2000), 4)['oa'] > 0.8  # what folds of single pixels would have believed
    assert data.ridge_probe(places, y, blocks, 4)['oa'] < 0.4


def test_the_probe_of_a_run_is_the_ridge_probe_over_its_splits(scene_data):
    splits = [Tiles(scene_data, split) for split in ('tr', 'val')]
    spectra = data.spectrum_features(splits[0].meta, (1,))
    x, y, blocks = map(torch.cat, zip(*(data.labelled_pixels(tiles, spectra, 10_000, 3) for tiles in splits)))
    miou = data.probe(spectra, splits, 3)
    assert miou == data.ridge_probe(x, y, blocks, 3)['miou'] > 0.9
    assert data.probe(lambda raw: torch.zeros_like(raw, dtype=torch.float32), splits, 3) < 0.4


def test_the_curve_of_the_probe_has_lines_for_what_it_must_beat():
    log = [{'step': 0, 'probe_miou': 0.1, 'pixel floor': 0.2, 'window floor': 0.3}, {'step': 5, 'loss': 1.0},
           {'step': 9, 'probe_miou': 0.4, 'pixel floor': 0.2, 'window floor': 0.3}]
    axis = Figure().subplots()
    data.draw_probe(axis, log[1:2])
    assert not axis.lines
    data.draw_probe(axis, log)
    curves = {line.get_label(): [round(float(y)) for y in line.get_ydata()] for line in axis.lines}
    assert curves == {'frozen encoder': [10, 40], 'random encoder': [10, 10], 'pixel floor': [20, 20], 'window floor': [30, 30]}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(curves) and axis.lines[0].get_xdata().tolist() == [0, 9]


def test_one_pixel_in_two_tiles_lies_in_one_block(scene_data):
    tiles = data.Tiles(scene_data, 'tr')
    x, y, blocks = data.labelled_pixels(tiles, lambda raw: raw.float())
    side, places = tiles.meta['settings']['split_block'], []
    for (_, top, left), labels in zip(tiles.meta['tiles']['tr'], tiles.labels):
        row, col = np.nonzero(labels)
        places += [((top + r) // side, (left + c) // side) for r, c in zip(row, col)]
    assert len(set(zip(map(tuple, places), blocks.tolist()))) == len(set(map(tuple, places))) == len(blocks.unique())


def test_pictures_show_numbers_and_names_never_the_source_of_a_formula(tmp_path, monkeypatch):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 10], [1, 1000])
    axes.set(yscale='log', title='price in $ or in $')
    monkeypatch.setattr(figure, 'clear', lambda: None)
    data.save_figure(figure, str(tmp_path / 'picture.png'))
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert '1,000' in shown and not any('$' in text for text in shown) and axes.get_title() == 'price in $ or in $'
