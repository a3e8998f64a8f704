"""Decoders, baseline, scores of whole scenes, label shares, maps: what stands between a feature and a number one can trust."""
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import baseline_deeplab
import data
import segment
import why_it_failed
from conftest import SCENES, make_scene, run
from data import Tiles, append_row, confusion_matrix, label_to_class, read_scene, scores, sliding_window
from models import DeepLabV3Plus, MaskedAutoencoder, ViT

TINY = ['--size=tiny', '--img_size=16', '--patch_size=4', '--batch_size=8', '--eval_every=10']


def two_tiles():
    """Two tiles (2, 5, 16, 16) of noise and labels (2, 16, 16) that change from pixel block to pixel block; some ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = torch.randn(2, 5, 16, 16, generator=generator) + torch.nn.functional.one_hot(labels, 5).movedim(-1, 1)
    labels[:, 0] = 255
    return images, labels


@pytest.mark.parametrize('decoder, kind', [('linear', 'ce'), ('transformer', 'ce'), ('conv', 'ce'), ('conv', 'focal'), ('conv', 'dice')])
def test_every_decoder_and_loss_learns_two_tiles_by_heart(decoder, kind):
    torch.manual_seed(0)
    x, y = two_tiles()
    model = segment.build_segmenter(ViT(16, 2 if decoder == 'transformer' else 4, 5, 48, 4, 3), 3, decoder, freeze=False, window_stride=0, pixel=False)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for _ in range(150):
        loss = segment.segmentation_loss(model(x), y, torch.ones(3), kind) / segment.loss_count(y, torch.ones(3), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.parameters())  # skips and all take part
    centres = slice(1, None, 4) if decoder == 'linear' else slice(None)  # bilinear upsampling blurs the borders between patches
    assert scores(confusion_matrix(model(x).argmax(1)[:, centres, centres], y[:, centres, centres], 3))['miou'] > 0.95


@pytest.mark.parametrize('stem', ['three', pytest.param('seven', marks=pytest.mark.slow)])
def test_the_baseline_learns_two_tiles_by_heart_and_every_weight_takes_part(stem):
    torch.manual_seed(0)
    x, y = two_tiles()
    x, y = (torch.nn.functional.interpolate(v, scale_factor=4.0) for v in (x, y[:, None].float()))
    y = y[:, 0].long()
    model = DeepLabV3Plus(5, 3, output_stride=8, stem=stem, width=8, blocks=(1, 1, 1, 1), head_dim=32)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(120):
        loss = sum(baseline_deeplab.segmentation_loss(out, y, torch.ones(3), 'ce') for out in model(x)) / y.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert scores(confusion_matrix(model(x)[0].argmax(1), y, 3))['miou'] > 0.95
    model.train()(x[:1])  # a batch of 1 trains
    assert model.eval()(x[:, :, :50, :42]).shape == (2, 3, 50, 42)


@pytest.mark.parametrize('output_stride, side', [(16, 4), (8, 8)])
def test_the_baselines_last_stage_has_the_output_stride_it_says(output_stride, side):
    model = DeepLabV3Plus(4, 3, output_stride=output_stride, width=8, blocks=(1, 1, 1, 1), head_dim=16).eval()
    seen = []
    model.layer4.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    model(torch.randn(1, 4, 64, 64))
    assert seen == [side]


def test_resnet50_has_torchvisions_names_and_its_weights_load(tmp_path):
    model = DeepLabV3Plus(32, 24, stem='seven')
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith(('conv1', 'bn1', 'layer'))}
    assert sum(v.numel() for k, v in backbone.items() if 'running' not in k and 'num_batches' not in k) == 23_508_032 + 64 * 49 * (32 - 3)  # resnet50 without fc
    public = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in backbone.items()}
    public['conv1.weight'] = torch.randn(64, 3, 7, 7)
    torch.save({**public, 'fc.weight': torch.randn(1000, 2048), 'fc.bias': torch.randn(1000)}, tmp_path / 'resnet50.pth')
    assert 'widened' in model.load_imagenet(tmp_path / 'resnet50.pth')
    assert torch.equal(model.layer3[5].conv2.weight, public['layer3.5.conv2.weight'])
    grey = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(model.conv1(grey.expand(-1, 32, -1, -1)),
                               torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), public['conv1.weight'], stride=2, padding=3), rtol=1e-3, atol=1e-3)
    assert 'starts fresh' in DeepLabV3Plus(32, 24).load_imagenet(tmp_path / 'resnet50.pth')
    torch.save({'layer1.0.conv1.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='other.pth: not the weights of a torchvision resnet50'):
        model.load_imagenet(tmp_path / 'other.pth')


def test_dice_is_its_formula():
    logits, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 2, (2, 4, 4))
    target[0, :2], target[1] = 255, 1
    expected = 0
    for image, label in zip(logits.softmax(1), target):
        known = label != 255
        dice = [2 * image[k][known & (label == k)].sum() / (image[k][known].sum() + (known & (label == k)).sum()) for k in range(3) if (label == k).any()]
        expected += 1 - sum(dice) / len(dice)
    assert segment.segmentation_loss(logits, target, torch.ones(3), 'dice').item() == pytest.approx(expected.item(), abs=1e-5)
    assert segment.loss_count(target, torch.ones(3), 'dice') == 2
    target[0] = 255
    assert segment.loss_count(target, torch.ones(3), 'dice') == 1


# ============ features follow the image ============

def test_features_shift_with_the_image_when_positions_are_taken_away():
    vit = ViT(16, 4, 3, 24, 3, 2, num_register_tokens=2).eval()
    torch.nn.init.zeros_(vit.pos_embed)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for maps, moved in zip(vit.get_intermediate_layers(x), vit.get_intermediate_layers(x.roll((4, 8), (2, 3)))):
            torch.testing.assert_close(maps.roll((1, 2), (2, 3)), moved, rtol=1e-4, atol=1e-5)


def test_features_of_a_masked_autoencoder_come_in_image_order():
    encoder = MaskedAutoencoder(16, 4, 3, 24, 2, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).encoder.eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = encoder.get_intermediate_layers(x, 1)[0]
        for row, col in ((0, 0), (1, 3), (3, 2)):
            other = x.clone()
            other[..., 4 * row:4 * row + 4, 4 * col:4 * col + 4] += 3
            change = (encoder.get_intermediate_layers(other, 1)[0] - before).norm(dim=1)[0]
            assert divmod(int(change.argmax()), 4) == (row, col)


# ============ whole scenes ============

def whole(strips):
    strips = list(strips)
    assert [top for top, _ in strips] == np.cumsum([0] + [part.shape[1] for _, part in strips[:-1]]).tolist()
    return np.concatenate([part for _, part in strips], axis=1)


@pytest.mark.parametrize('H, W, window, stride', [(40, 48, 16, 8), (41, 37, 16, 5), (16, 16, 16, 8), (7, 30, 16, 8), (33, 9, 16, 16), (1, 1, 8, 4), (50, 20, 16, 3)])
def test_blended_windows_give_back_what_does_not_depend_on_the_window(H, W, window, stride):
    cube = np.random.default_rng(0).normal(size=(3, H, W)).astype(np.float32)
    got = whole(sliding_window(lambda x: torch.stack([x[:, 0], 2 * x[:, 1]], 1), cube, window, stride, 2, batch_size=3))
    assert got.shape == (2, H, W)
    np.testing.assert_allclose(got, np.stack([cube[0], 2 * cube[1]]), rtol=1e-4, atol=1e-5)


def test_windows_side_by_side_are_tile_wise_prediction():
    cube = np.random.default_rng(0).normal(size=(3, 32, 48)).astype(np.float32)
    place = torch.arange(16.0)[None, None, :, None] + torch.arange(16.0) / 100  # depends on the place in the window

    def predict(x):
        return torch.cat([x.mean((1, 2, 3), keepdim=True) + place, x[:, :1]], 1)
    got = whole(sliding_window(predict, cube, 16, 16, 2))
    for top in (0, 16):
        for left in (0, 16, 32):
            tile = torch.from_numpy(cube[None, :, top:top + 16, left:left + 16])
            np.testing.assert_allclose(got[:, top:top + 16, left:left + 16], predict(tile)[0], rtol=1e-5, atol=1e-6)


def test_blended_windows_leave_no_seam():
    cube = np.zeros((1, 64, 64), np.float32)
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)  # each window errs most at its border, to the left low, to the right high
    got = whole(sliding_window(lambda x: x + ramp, cube, 16, 8, 1))[0]
    plain = whole(sliding_window(lambda x: x + ramp, cube, 16, 16, 1))[0]
    jumps = [np.abs(np.diff(part[:, 8:-8], axis=1)).max() for part in (got, plain)]
    assert jumps[0] < 0.2 * jumps[1]


def test_memory_is_that_of_a_row_of_windows():
    class Cube:  # an image that counts what is read of it
        shape = (2, 10_000, 40)
        rows = []

        def __getitem__(self, index):
            self.rows.append(index[1])
            return np.zeros((2, min(index[1].stop, 10_000) - index[1].start, min(index[2].stop, 40) - index[2].start), np.float32)
    cube = Cube()
    sizes = [part.shape for _, part in sliding_window(lambda x: x, cube, 16, 8, 2)]
    assert max(rows for _, rows, _ in sizes) <= 16 and max(s.stop - s.start for s in cube.rows) == 16 and sum(rows for _, rows, _ in sizes) == 10_000


def test_crops_smaller_than_the_tile_train_and_the_whole_tile_is_scored(scene_data, tmp_path):
    for script, flags in (('segment.py', [*TINY, '--freeze=false', '--img_size=8']), ('baseline_deeplab.py', ['--width=8', '--batch_size=4'])):
        run(script, *flags, f'--data={scene_data}', '--crop_size=8', '--augment=true', '--steps=3', '--dtype=float32', f'--out_dir={tmp_path / script}', f'--results={tmp_path}/r.csv')
        report = json.load(open(tmp_path / script / 'report.json'))
        assert np.sum(report['confusion_matrix']) == np.count_nonzero(Tiles(scene_data, 'ts').labels)
        if script == 'segment.py':  # what is drawn is what is scored
            pred, raw, names = why_it_failed.predictions(str(tmp_path / script))
            assert confusion_matrix(pred, label_to_class(raw), len(names)).tolist() == report['confusion_matrix']
        run(script, f'--out_dir={tmp_path / script}', f'--predict={make_scene(tmp_path / "s.npz", height=20, width=30)}', f'--out={tmp_path / script}/map.tif')
        assert read_scene(f'{tmp_path / script}/map.tif').cube.shape == (1, 20, 30) and (tmp_path / script / 'map.png').exists()


@pytest.mark.parametrize('script', ['segment.py', pytest.param('baseline_deeplab.py', marks=pytest.mark.slow)])
def test_two_processes_score_a_finished_run_alike(script, scene_data, tmp_path):
    flags = ['--width=8', '--batch_size=4'] if script == 'baseline_deeplab.py' else TINY
    reports = []
    for n in (1, 2):
        run(script, *flags, f'--data={scene_data}', '--steps=2', f'--out_dir={tmp_path / "run"}', f'--results={tmp_path}/r.csv', '--dtype=float32', processes=n)
        reports.append(json.load(open(tmp_path / 'run' / 'report.json'))['confusion_matrix'])
    assert reports[0] == reports[1] and np.sum(reports[0])


# ============ few labels ============

def test_a_share_of_the_labels_is_kept_wherever_tiles_overlap(tmp_path):
    scene = make_scene(tmp_path / 's.npz', height=96, width=96)
    run('data.py', 'tile', f'--root={scene}', f'--out={tmp_path / "t"}', '--tile_size=32', '--stride=16')
    every, few, other = (Tiles(tmp_path / 't', 'tr', label_share=share, seed=seed) for share, seed in ((1.0, 0), (0.1, 0), (0.1, 1)))
    seen = {}
    for tiles in (every, few):
        seen[tiles] = np.zeros((96, 96), np.uint8)
        for labels, (_, row, col) in zip(tiles.labels, tiles.meta['tiles']['tr']):
            here = seen[tiles][row:row + 32, col:col + 32]
            if tiles is few:  # what one tile keeps, the overlapping one keeps as well
                known = here > 0
                assert (labels[known] == here[known]).all()
            np.copyto(here, labels, where=labels > 0)
    kept = (seen[few] > 0).sum() / (seen[every] > 0).sum()
    assert 0.07 < kept < 0.13 and (seen[few][seen[few] > 0] == seen[every][seen[few] > 0]).all()
    assert not np.array_equal(few.labels, other.labels)
    assert set(np.unique(Tiles(tmp_path / 't', 'tr', label_share=1e-6).labels)) == set(np.unique(every.labels))  # one pixel of each class is left


def test_label_share_reaches_training_floors_and_table(scene_data, tmp_path):
    for share in (1.0, 0.02):
        run('segment.py', *TINY, f'--data={scene_data}', '--steps=2', f'--label_share={share}', f'--out_dir={tmp_path / str(share)}', f'--results={tmp_path}/r.csv')
    reports = [json.load(open(tmp_path / share / 'report.json')) for share in ('1.0', '0.02')]
    assert [key for key in json.load(open(os.path.join(scene_data, 'floors.json'))) if '0.02 of the labels' in key]
    assert reports[0]['floors']['window']['oa'] >= reports[1]['floors']['window']['oa']
    assert np.sum(reports[0]['confusion_matrix']) == np.sum(reports[1]['confusion_matrix'])  # the test labels are all there
    table = run('segment.py', '--table', f'--results={tmp_path}/r.csv').stdout
    assert '100 % of the labels' in table and '2 % of the labels' in table and 'random ViT linear' in table and 'window floor' in table
    done = run('segment.py', '--table', f'--results={tmp_path}/none.csv', check=False)
    assert done.returncode == 1 and 'no results yet' in done.stderr


def test_the_table_averages_seeds_and_nothing_else(tmp_path):
    row = {'data': 'data/a_0', 'method': 'MAE', 'decoder': 'linear', 'encoder': 'runs/m_0/last.pt', 'label_share': 1.0, 'seed': 0, 'steps': 10, 'best_step': 10,
           **{k: 0.5 for k in ('oa', 'mean_acc', 'miou', 'miou_all', 'kappa', 'mean_f1', 'pixel_floor', 'window_floor')}, 'out_dir': 'runs/s_0'}
    path = str(tmp_path / 'r.csv')
    for change in ({}, {'seed': 1, 'data': 'data/a_1', 'encoder': 'runs/m_1/last.pt', 'miou': 0.7, 'out_dir': 'runs/s_1'}, {'steps': 99, 'out_dir': 'runs/t'},
                   {'data': 'data/scene_2013', 'out_dir': 'runs/u'}, {'data': 'data/scene_2018', 'out_dir': 'runs/v'}, {'miou': 0.6, 'out_dir': 'runs/v', 'data': 'data/scene_2018'}):
        append_row(path, {**row, **change})
    table = run('segment.py', '--table', f'--results={path}').stdout.splitlines()
    lines = {line[:44].strip(): line.split()[-1] for line in table if 'MAE' in line}
    assert lines == {'MAE linear steps 10': '2', 'MAE linear steps 99': '1', 'MAE linear': '1'} and sum('scene_' in line for line in table) == 2
    assert any('60.0 ± 14.1' in line for line in table) and any('60.0 ±  0.0' in line for line in table)  # of scene_2018 the last row counts
    for n in (0, 1, 2, 2):  # one encoder on three splits, one of them twice
        append_row(path, {**row, 'seed': n, 'data': f'data/b_{n}', 'out_dir': f'runs/b_{len(open(path).readlines())}'})
    table = run('segment.py', '--table', f'--results={path}').stdout
    assert [line.split()[-1] for line in table.split('data/b')[1].split('\n\n')[0].splitlines() if 'MAE' in line] == ['3']


def test_a_table_keeps_its_rows_when_a_column_is_new(tmp_path):
    path = str(tmp_path / 'r.csv')
    for row in ({'a': 1, 'b': 2}, {'a': 3, 'c': 4}, {'a': 3, 'c': 4}):
        append_row(path, row)
    assert open(path).read().split() == ['a,b,c', '1,2,', '3,,4']


def test_runs_are_drawn_side_by_side(scene_data, tmp_path):
    for n in ('1', '2'):
        run('segment.py', *TINY, f'--data={scene_data}', '--steps=2', f'--seed={n}', f'--out_dir={tmp_path / n}', f'--results={tmp_path}/r.csv')
    run('segment.py', f'--compare={tmp_path}/1,{tmp_path}/2', f'--out_dir={tmp_path}/both', pictures=True)
    assert sorted(os.listdir(tmp_path / 'both')) == ['comparison.png', 'comparison_curves.png']
    assert all((tmp_path / 'both' / name).stat().st_size > 5000 for name in os.listdir(tmp_path / 'both'))
    done = run('segment.py', f'--compare={tmp_path}/1,{tmp_path}/3', f'--out_dir={tmp_path}/both', check=False)
    assert done.returncode == 1 and f'{tmp_path}/3: holds no log.jsonl' in done.stderr and 'Traceback' not in done.stderr


# ============ maps ============

@pytest.fixture(scope='module')
def mapped(scene_data, tmp_path_factory):
    """A run of a few steps, and a georeferenced scene of odd size with missing pixels, written as GeoTIFF."""
    import tifffile
    folder = tmp_path_factory.mktemp('map')
    run('segment.py', *TINY, f'--data={scene_data}', '--steps=20', '--crop_size=16', f'--out_dir={folder / "run"}', f'--results={folder}/r.csv')
    cube = np.moveaxis(read_scene(make_scene(folder / 's.npz', height=45, width=61, seed=3)).cube, 0, 2)
    cube[:6, :9] = 65535
    tags = [(33550, 'd', 3, (30.0, 30.0, 0.0), True), (33922, 'd', 6, (0, 0, 0, 600000.0, 5000000.0, 0), True),
            (34735, 'H', 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632), True), (42113, 's', 0, '65535', True)]
    tifffile.imwrite(folder / 'scene.tif', cube, planarconfig='contig', photometric='minisblack', extratags=tags)
    np.savez(folder / 'plain.npz', cube=cube[..., :7])
    return folder


def test_a_map_lies_where_the_scene_lies(mapped):
    done = run('segment.py', f'--out_dir={mapped}/run', f'--predict={mapped}/scene.tif', f'--out={mapped}/map.tif', f'--probabilities={mapped}/p.tif',
               pictures=True)
    assert '45 x 61 pixels' in done.stdout and json.load(open(mapped / 'map.json')) == {'1': 'class 1', '2': 'class 2', '3': 'class 3'}
    assert (mapped / 'map.png').stat().st_size > 5000
    again = read_scene(str(mapped / 'map.tif'))
    assert again.cube.shape == (1, 45, 61) and again.cube.dtype == np.uint8 and again.nodata == 0
    assert (again.cube[0, :6, :9] == 0).all() and again.cube.max() <= 3 and (again.cube[0, 6:] > 0).all()
    rasterio = pytest.importorskip('rasterio')
    with rasterio.open(mapped / 'scene.tif') as scene, rasterio.open(mapped / 'map.tif') as written, rasterio.open(mapped / 'p.tif') as probabilities:
        assert written.crs == scene.crs == 'EPSG:32632' and written.transform == scene.transform == probabilities.transform
        assert (written.width, written.height, written.count, written.nodata) == (61, 45, 1, 0)
        assert written.colormap(1)[1][:3] == (230, 159, 0) and probabilities.count == 3
        best = probabilities.read().argmax(0) + 1
        known = written.read(1) > 0
        assert (best == written.read(1))[known].mean() > 0.97  # ties of rounded probabilities apart


@pytest.mark.parametrize('info, epsg', [(['UTM', 3, 2, 600000, 5000000, 30, 30, 32, 'North', 'WGS-84', 'units=Meters'], 32632),
                                        (['UTM', 1, 1, 300000, 8000000, 10, 20, 23, 'South', 'WGS-84', 'units=Meters'], 32723),
                                        (['Geographic Lat/Lon', 1.5, 1.5, 13.1, 52.4, 0.001, 0.002, 'WGS-84', 'units=Degrees'], 4326)])
def test_a_map_of_an_envi_scene_lies_where_the_scene_lies(info, epsg, tmp_path):
    rasterio, spectral = pytest.importorskip('rasterio'), pytest.importorskip('spectral')
    spectral.envi.save_image(str(tmp_path / 'a.hdr'), np.arange(60, dtype=np.int16).reshape(4, 5, 3), metadata={'map info': info}, interleave='bsq')
    meta = {'num_bands': 3, 'num_classes': 2, 'class_names': ['a', 'b'], 'wavelengths_nm': None, 'nodata': None}
    data.map_scene(lambda x: torch.full((len(x), 2, 4, 4), 0.5), str(tmp_path / 'a.hdr'), meta, 4, 0.5, str(tmp_path / 'map.tif'))
    with rasterio.open(tmp_path / 'a.img') as scene, rasterio.open(tmp_path / 'map.tif') as written:  # GDAL reads both formats on its own
        assert written.crs.to_epsg() == epsg and scene.crs.is_geographic == written.crs.is_geographic
        np.testing.assert_allclose(written.transform, scene.transform, rtol=1e-12)
    tags = lambda *words: [tag[0] for tag in data.envi_geotags([*info[:-1], *words])]
    keys = data.envi_geotags(info)[2][3]
    assert (keys[7], keys[12], keys[15]) == ((2, 2048, 4326) if epsg == 4326 else (1, 3072, epsg))  # readers forgive a wrong model
    assert len(tags()) == 3 and tags('rotation=0.0') == tags() and tags('rotation=12.5') == []
    assert [tag[0] for tag in data.envi_geotags(['Arbitrary', *info[1:]])] == [33550, 33922] and data.envi_geotags([]) == ()  # a place, no system


def test_the_picture_of_a_map_reads_few_pixels_of_a_large_scene(tmp_path):
    bands, H, W = 60, 3000, 2500  # 0.9 GB, on disk only
    cube = np.memmap(tmp_path / 'cube', np.int16, 'w+', shape=(bands, H, W))
    classes = np.memmap(tmp_path / 'classes', np.uint8, 'w+', shape=(H, W))
    classes[:, W // 2:] = 1
    tracemalloc.start()
    data.save_map(str(tmp_path / 'map.png'), data.Scene(cube, None, None, None, None), classes, ['a', 'b'])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6 and (tmp_path / 'map.png').exists()


def test_a_picture_of_many_classes_numbers_their_areas_rightly(tmp_path):
    classes, step = np.zeros((60, 80), np.uint8), 3
    classes[5:25, 5:30], classes[30:58, 2:50], classes[5:28, 40:78] = 1, 9, 16
    classes[50, 60:79] = 7  # too thin for a number
    figure = Figure()
    axis = figure.subplots()
    data.show_classes(axis, classes, [f'name {k}' for k in range(1, 17)], step)
    places = {text.get_text(): tuple(int(v // step) for v in text.get_position()[::-1]) for text in axis.texts}
    assert {int(number): classes[place] for number, place in places.items()} == {1: 1, 9: 9, 16: 16}
    data.class_legend(figure, [f'name {k}' for k in range(1, 17)], {0, 1, 9})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['1 name 1', '9 name 9', 'no label, no data']
    few = figure.add_subplot()
    data.show_classes(few, classes % 3, ['a', 'b', 'c'])
    assert not few.texts  # up to 8 the colours do


def test_a_map_without_overlap_is_tile_wise_prediction(mapped):
    model, checkpoint = segment.trained_segmenter(str(mapped / 'run' / 'best.pt'))
    from data import standardization, standardize
    mean, matrix = standardization(checkpoint['meta'], checkpoint['whiten'])
    run('segment.py', f'--out_dir={mapped}/run', f'--predict={mapped}/scene.tif', f'--out={mapped}/side.tif', '--overlap=0', '--dtype=float32')
    got, cube = read_scene(str(mapped / 'side.tif')).cube[0], read_scene(str(mapped / 'scene.tif')).cube
    for top, left in ((16, 0), (16, 32), (0, 16)):
        with torch.no_grad():
            pred = model(standardize(torch.from_numpy(cube[None, :, top:top + 16, left:left + 16].copy()), mean, matrix, 65535)).argmax(1)[0] + 1
        assert (pred.numpy() == got[top:top + 16, left:left + 16])[:13, :13].mean() > 0.99  # the last windows reach back into the ones before


def test_scenes_that_differ_from_the_training_data_work_or_are_refused_in_a_sentence(mapped, tmp_path):
    base = ['segment.py', f'--out_dir={mapped}/run', f'--out={tmp_path}/map.tif']
    assert 'no georeference' in run(*base, f'--predict={mapped}/plain.npz').stdout  # no wavelengths, the same number of bands
    make_scene(tmp_path / 'fine.npz', bands=21)  # other bands, with wavelengths: resampled
    assert '21 bands are resampled to the 7' in run(*base, f'--predict={tmp_path}/fine.npz').stdout
    np.save(tmp_path / 'float.npy', np.random.default_rng(0).normal(1000, 100, (9, 30, 7)))
    run(*base, f'--predict={tmp_path}/float.npy')
    np.save(tmp_path / 'five.npy', np.zeros((20, 20, 5), np.int16))
    before = open(mapped / 'scene.tif', 'rb').read()
    for flags, words in (([f'--predict={mapped}/scene.tif', f'--out={mapped}/scene.tif'], 'names of their own'), ([f'--predict={tmp_path}/five.npy'], 'has 5 bands'), ([f'--predict={tmp_path}/none.tif'], 'no such file'),
                         ([f'--predict={mapped}/plain.npz', '--overlap=1'], '--overlap=1'), ([f'--predict={mapped}/plain.npz', f'--out={tmp_path}/map.png'], '.tif'),
                         ([f'--predict={mapped}/plain.npz', f'--out_dir={tmp_path}'], 'no such checkpoint')):
        done = run(*base, *flags, check=False)
        assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert not [name for name in os.listdir(tmp_path) if name.endswith('.tmp')] and open(mapped / 'scene.tif', 'rb').read() == before


# ============ why the dissertation failed ============

def test_the_dissertations_two_faults_turn_a_good_model_into_chance(tmp_path):
    path = os.path.join(SCENES, 'indian_pines.npz')
    if not os.path.exists(path):
        pytest.skip('no real scene here')
    run('data.py', 'tile', f'--root={path}', f'--out={tmp_path / "t"}', '--tile_size=16', '--bands=ohs')
    run('segment.py', '--size=tiny', '--img_size=16', '--patch_size=2', f'--data={tmp_path / "t"}', '--steps=60', f'--out_dir={tmp_path / "run"}', f'--results={tmp_path}/r.csv')
    pred, raw, names = why_it_failed.predictions(str(tmp_path / 'run'))
    right = why_it_failed.score(pred, raw, len(names))
    assert right['miou'] == pytest.approx(json.load(open(tmp_path / 'run' / 'report.json'))['scores']['miou'], abs=0.02) and right['miou'] > 0.4
    for faults in (dict(shuffled=True), dict(off_by_one=True), dict(shuffled=True, off_by_one=True)):
        wrong = why_it_failed.score(pred, raw, len(names), **faults)
        assert wrong['miou'] < 0.12 and wrong['miou'] < 0.25 * right['miou']
    perfect = label_to_class(raw).clamp(max=len(names) - 1)  # even a perfect predictor
    assert why_it_failed.score(perfect, raw, len(names))['miou'] == 1
    assert why_it_failed.score(perfect, raw, len(names), shuffled=True, off_by_one=True)['miou'] < 0.1
