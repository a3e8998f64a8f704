"""The tools: maps of whole scenes, the data set doctor, runs side by side."""
import errno
import json
import os
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.figure import Figure

import data
import scenes
from conftest import MAE_TINY, make_scene, run, tiled
from data import Tiles
from models import load_segmenter
from scenes import Scene, UserError, envi_geotags, read_scene
from tools import check_data, compare, map_scene

TINY = ['--size=tiny', '--img_size=16', '--patch_size=4', '--whiten=3']
FEW_LABELS = '--label_share=0.1'  # a decoder is solved in less time


# ============ maps ============

@pytest.fixture(scope='module')
def mapped(scene_data, tmp_path_factory):
    """A run, and a georeferenced scene of odd size with missing pixels, written as GeoTIFF."""
    folder = tmp_path_factory.mktemp('map')
    run('segment.py', *TINY, FEW_LABELS, f'--data={scene_data}', f'--out_dir={folder / "run"}')
    scene = make_scene(folder / 's.npz', height=45, width=61, seed=3)
    cube = np.moveaxis(read_scene(scene).cube, 0, 2)
    np.savez(folder / 'plain.npz', cube=cube)
    cube[:6, :9] = 65535
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632)  # UTM, zone 32 north
    tags = [(33550, 'd', 3, (30.0, 30.0, 0.0), True),
            (33922, 'd', 6, (0, 0, 0, 600000.0, 5000000.0, 0), True),
            (34735, 'H', 16, keys, True), (42113, 's', 0, '65535', True)]
    tifffile.imwrite(folder / 'scene.tif', cube, planarconfig='contig', photometric='minisblack',
                     extratags=tags)
    return folder


def tags_of(path, codes=(33550, 33922, 34735)):
    with tifffile.TiffFile(path) as tif:
        found = tif.pages[0].tags
        return {code: found[code].value for code in codes if code in found}


def test_a_map_lies_where_the_scene_lies(mapped):
    done = run('tools/map_scene.py', f'--run={mapped}/run', f'--scene={mapped}/scene.tif',
               f'--out={mapped}/map.tif', f'--probabilities={mapped}/p.tif', pictures=True)
    assert '45 x 61 pixels' in done.stdout and 'no georeference' not in done.stdout
    assert json.load(open(mapped / 'map.json')) == {'1': 'class 1', '2': 'class 2', '3': 'class 3'}
    assert (mapped / 'map.png').stat().st_size > 5000
    again = read_scene(str(mapped / 'map.tif'))
    assert again.cube.shape == (1, 45, 61) and again.cube.dtype == np.uint8 and again.nodata == 0
    assert (again.cube[0, :6, :9] == 0).all() and again.cube.max() <= 3
    assert (again.cube[0, 6:] > 0).all()
    place = tags_of(mapped / 'scene.tif')
    assert len(place) == 3 and tags_of(mapped / 'map.tif') == tags_of(mapped / 'p.tif') == place
    shares = read_scene(str(mapped / 'p.tif')).cube
    known = again.cube[0] > 0
    assert shares.shape == (3, 45, 61)
    likeliest = shares.argmax(0) + 1
    assert (likeliest == again.cube[0])[known].mean() > 0.97  # rounded ones can tie


UTM_NORTH = ['UTM', 3, 2, 600000, 5000000, 30, 30, 32, 'North', 'WGS-84', 'units=Meters']
UTM_SOUTH = ['UTM', 1, 1, 300000, 8000000, 10, 20, 23, 'South', 'WGS-84', 'units=Meters']
DEGREES = ['Geographic Lat/Lon', 1.5, 1.5, 13.1, 52.4, 0.001, 0.002, 'WGS-84', 'units=Degrees']


def flags_of(scene, out='map.tif', *more):
    return map_scene.parse([f'--scene={scene}', f'--out={out}', *more])


def map_envi(info, folder):
    """a.hdr, a.img with this "map info", and map.tif of it"""
    spectral = pytest.importorskip('spectral')
    cube = np.arange(60, dtype=np.int16).reshape(4, 5, 3)
    spectral.envi.save_image(str(folder / 'a.hdr'), cube, metadata={'map info': info},
                             interleave='bsq')
    meta = {'num_bands': 3, 'num_classes': 2, 'class_names': ['a', 'b'], 'wavelengths_nm': None,
            'nodata': None, 'mean': [30.0] * 3, 'std': [20.0] * 3}
    map_scene.map_scene(lambda x: torch.full((len(x), 2, 4, 4), 0.5),
                        flags_of(folder / 'a.hdr', folder / 'map.tif'), meta, 4)


@pytest.mark.parametrize('info, epsg', [(UTM_NORTH, 32632), (UTM_SOUTH, 32723), (DEGREES, 4326)])
def test_a_map_of_an_envi_scene_lies_where_the_scene_lies(info, epsg, tmp_path):
    map_envi(info, tmp_path)
    place = tags_of(tmp_path / 'map.tif')
    column, row, x, y, width, height = info[1:7]
    assert place[33550] == (width, height, 0) and place[33922] == (column - 1, row - 1, 0, x, y, 0)
    keys = place[34735]  # readers forgive a wrong model
    expected = (2, 2048, 4326) if epsg == 4326 else (1, 3072, epsg)
    assert (keys[7], keys[12], keys[15]) == expected

    def codes(*words):
        return [tag[0] for tag in envi_geotags([*info[:-1], *words])]
    assert len(codes()) == 3 and codes('rotation=0.0') == codes()
    assert [tag[0] for tag in envi_geotags(['Projection', *info[1:]])] == [33550, 33922]
    assert envi_geotags(['Arbitrary', *info[1:]]) == ()
    assert envi_geotags([]) == ()  # a place without a system; nothing


def test_gdal_finds_a_map_where_it_finds_the_scene(mapped):
    rasterio = pytest.importorskip('rasterio')  # reads the formats on its own
    run('tools/map_scene.py', f'--run={mapped}/run', f'--scene={mapped}/scene.tif',
        f'--out={mapped}/gdal.tif', f'--probabilities={mapped}/gdal_p.tif')
    names = ('scene.tif', 'gdal.tif', 'gdal_p.tif')
    scene, written, probabilities = [rasterio.open(mapped / name) for name in names]
    assert written.crs == scene.crs == 'EPSG:32632'
    assert written.transform == scene.transform == probabilities.transform
    assert (written.width, written.height, written.count, written.nodata) == (61, 45, 1, 0)
    assert written.colormap(1)[1][:3] == (230, 159, 0) and probabilities.count == 3


@pytest.mark.parametrize('info, epsg', [(UTM_NORTH, 32632), (UTM_SOUTH, 32723), (DEGREES, 4326)])
def test_gdal_finds_the_map_of_an_envi_scene_where_it_finds_the_scene(info, epsg, tmp_path):
    rasterio = pytest.importorskip('rasterio')
    map_envi(info, tmp_path)
    with rasterio.open(tmp_path / 'a.img') as scene, rasterio.open(tmp_path / 'map.tif') as written:
        assert written.crs.to_epsg() == epsg
        assert scene.crs.is_geographic == written.crs.is_geographic
        np.testing.assert_allclose(written.transform, scene.transform, rtol=1e-12)


def test_the_picture_of_a_map_reads_few_pixels_of_a_large_scene(tmp_path):
    bands, H, W = 60, 3000, 2500  # 0.9 GB, on disk only
    cube = np.memmap(tmp_path / 'cube', np.int16, 'w+', shape=(bands, H, W))
    scene = Scene(cube, None, None, None, None)
    classes = np.zeros((H, W), np.uint8)[::5, ::5]
    classes[:, 250:] = 1
    meta = {'class_names': ['a', 'b'], 'wavelengths_nm': None, 'mean': [0.0] * bands,
            'std': [1.0] * bands}
    tracemalloc.start()
    map_scene.save_picture(str(tmp_path / 'map.png'), scene, classes, 5, meta)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6 and (tmp_path / 'map.png').exists()


def test_memory_does_not_grow_with_the_height_of_a_scene(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 1e6)
    meta = {'num_bands': 8, 'num_classes': 2, 'class_names': ['a', 'b'], 'wavelengths_nm': None,
            'nodata': None, 'mean': [0.0] * 8, 'std': [1.0] * 8}
    peaks = []
    for rows in (1500, 15_000):  # the larger one has 15 MB
        np.save(tmp_path / 'scene.npy', np.ones((rows, 64, 8), np.int16))
        tracemalloc.start()
        flags = flags_of(tmp_path / 'scene.npy', tmp_path / 'map.tif', '--overlap=0')
        map_scene.map_scene(lambda x: x[:, :2], flags, meta, 64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert read_scene(str(tmp_path / 'map.tif')).cube.shape == (1, 15_000, 64)
    assert peaks[1] < peaks[0] + 7e6, peaks  # a mask of its pixels does; its values are 31 MB


def test_a_map_of_many_bands_has_one_row_of_windows_in_memory(tmp_path, monkeypatch):
    """The picture and the look at units take thin samples of a scene: of all bands they were most of the memory"""
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 1e5)
    bands, side = 100, 160
    values = np.random.default_rng(0).integers(1, 9, (side, side, bands)).astype(np.int16)
    values[:, ::2] = -1  # so that little of the thin sample is valid
    np.savez(tmp_path / 'scene.npz', cube=values, nodata=-1)
    meta = {'num_bands': bands, 'num_classes': 2, 'class_names': ['a', 'b'], 'wavelengths_nm': None, 'nodata': None,
            'mean': [4.5] * bands, 'std': [2.3] * bands}
    asked = []
    original = scenes.Lazy.__getitem__

    def counted(self, key):
        made = original(self, key)
        asked.append(made.nbytes)
        return made
    monkeypatch.setattr(scenes.Lazy, '__getitem__', counted)
    flags = flags_of(tmp_path / 'scene.npz', tmp_path / 'map.tif', '--overlap=0')
    assert map_scene.map_scene(lambda x: x[:, :2].nan_to_num(), flags, meta, 64)
    window_row = 4 * bands * 64 * side
    assert max(asked) == window_row and asked.count(window_row) == 3


@pytest.mark.parametrize('stated', [None, [[k, 2 * k, 3] for k in range(1, 17)], [[1, 2, 3]] * 16])
def test_a_legend_names_the_classes_that_are_there_in_their_colours(stated):
    figure, meta = Figure(), {'class_names': [f'name {k}' for k in range(1, 17)], 'class_colors': stated}
    classes = np.array([[0, 1], [9, 9]])
    axis = figure.subplots()
    data.show_classes(axis, classes, meta, 3)
    data.class_legend(figure, meta, {0, 1, 9})
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ['1 name 1', '9 name 9', 'no label, no data']
    drawn = axis.images[0].get_array() / 255
    for patch, color in zip(legend.get_patches(), (drawn[0, 1], drawn[1, 0], drawn[0, 0])):
        np.testing.assert_allclose(patch.get_facecolor()[:3], color)
    assert axis.images[0].get_extent() == [0, 6, 6, 0]
    of_the_file = stated is not None and stated[0] != stated[1]  # colours that tell no classes apart are not used
    color = (drawn[1, 0] * 255).round().tolist()
    assert (color == [9, 18, 3]) == of_the_file and color != [1, 2, 3]


def test_a_map_without_overlap_is_tile_wise_prediction(mapped):
    network = load_segmenter(str(mapped / 'run' / 'best.pt'))

    @torch.no_grad()
    def predict(raw):
        return network(network.prepare(raw)).softmax(1)
    flags = flags_of(mapped / 'scene.tif', mapped / 'side.tif', '--overlap=0')
    map_scene.map_scene(predict, flags, network.meta, 16)
    got = read_scene(str(mapped / 'side.tif')).cube[0]
    cube = read_scene(str(mapped / 'scene.tif')).cube
    for top, left in ((16, 0), (16, 32), (0, 16)):
        tile = torch.from_numpy(cube[None, :, top:top + 16, left:left + 16].copy())
        same = predict(tile).argmax(1)[0].numpy() + 1 == got[top:top + 16, left:left + 16]
        assert same[:13, :13].mean() > 0.99  # the last windows reach back into the ones before


def test_scenes_unlike_the_training_data_work_or_are_refused_in_a_sentence(mapped, tmp_path):
    base = ['tools/map_scene.py', f'--run={mapped}/run', f'--out={tmp_path}/map.tif']
    done = run(*base, f'--scene={mapped}/plain.npz')  # no wavelengths, the same number of bands
    assert 'no georeference' in done.stdout and 'WARNING' not in done.stdout
    make_scene(tmp_path / 'fine.npz', bands=21)  # other bands, with wavelengths: resampled
    done = run(*base, f'--scene={tmp_path}/fine.npz')
    assert '21 bands are resampled to the 7' in done.stdout
    np.save(tmp_path / 'float.npy', np.random.default_rng(0).normal(0.2, 0.02, (9, 30, 7)))
    # reflectance, where the model knows 0..3000
    done = run(*base, f'--scene={tmp_path}/float.npy', check=False)
    assert re.search(r'WARNING: in 7 of 7 bands .* mean is 0\.(2|199)', done.stdout)
    assert 'every pixel became class' in done.stdout and done.returncode == 1
    np.save(tmp_path / 'five.npy', np.zeros((20, 20, 5), np.int16))
    make_scene(tmp_path / 'swir.npz', wavelengths_nm=np.linspace(2000, 2400, 7))
    before = open(mapped / 'scene.tif', 'rb').read()
    plain = f'{mapped}/plain.npz'
    for flags, words in (
            ([f'--scene={mapped}/scene.tif', f'--out={mapped}/scene.tif'], 'names of their own'),
            ([f'--scene={tmp_path}/five.npy'], 'has 5 bands'),
            ([f'--scene={plain}', f'--run={tmp_path}'], 'best.pt: is not there: segment.py and baseline_deeplab.py write it')):
        done = run(*base, *flags, check=False)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr
    network = load_segmenter(str(mapped / 'run' / 'best.pt'))
    for scene, flags, words in ((f'{tmp_path}/swir.npz', [], 'none near 450'),
                                (f'{tmp_path}/none.tif', [], 'no such file'),
                                (plain, ['--overlap=1'], '--overlap=1'),
                                (plain, [f'--out={tmp_path}/map.png'], '.tif')):
        with pytest.raises(UserError, match=words):
            map_scene.map_scene(None, flags_of(scene, tmp_path / 'map.tif', *flags), network.meta,
                                network.window)
    assert not [name for name in os.listdir(tmp_path) if name.endswith('.tmp')]
    assert open(mapped / 'scene.tif', 'rb').read() == before


def test_other_units_than_the_training_datas_are_told_and_no_more(tmp_path):
    rng = np.random.default_rng(0)
    cube = rng.normal(3000, 900, (5, 40, 50))
    nm = [500.0, 550, 600, 650, 700]
    meta = {'mean': [3000.0] * 5, 'std': [1000.0] * 5, 'num_bands': 5, 'nodata': -1,
            'wavelengths_nm': nm, 'dtype': 'float32'}

    def warning(cube, **more):
        np.savez(tmp_path / 's.npz', cube=np.moveaxis(cube, 0, 2).astype(np.float32), **more)
        scene = map_scene.open_scene(flags_of(tmp_path / 's.npz'), meta)
        return map_scene.units_warning(scene, meta)
    assert warning(cube) == warning(0.8 * cube + 500) == ''
    for factor in (10_000, 10, 0.1, 1e-4):
        words = warning(factor * cube)
        assert '5 of 5 bands' in words and f'{3000 * factor:.1g}'[:1] in words
        assert '3000 (deviation 1000)' in words
    assert '5 of 5 bands' in warning(cube + 15_000)
    missing = cube.copy()
    missing[:, :39] = -1  # 50 pixels are left, then 1
    assert warning(missing) == '' and '5 of 5' in warning(np.where(missing == -1, -1, 0.3))
    missing[:, :, 1:] = -1
    assert warning(missing) == ''
    missing[:, :39] = np.nan
    assert warning(missing) == ''
    meadow = 0.1 * (cube - 3000) + 2500  # even ground, and clouds
    assert warning(meadow) == '' and warning(np.where(np.arange(50) < 3, 9000, cube)) == ''
    one_band = cube.copy()
    one_band[2] *= 100  # a fault of that band, not of the units
    assert warning(one_band) == ''
    other_nm = np.linspace(480, 720, 9)  # resampled first
    assert warning(np.full((9, 30, 30), 0.3), wavelengths_nm=other_nm).count('5 of 5 bands') == 1


@pytest.mark.parametrize('flags', [[], ['--bands=landsat'], ['--normalize=scene'], ['--pca=3'],
                                   ['--bands=500:40,620:20,900', '--normalize=scene', '--pca=2'],
                                   ['--nodata=0'], ['--nodata=0', '--normalize=scene'],
                                   ['--nodata=0', '--pca=3']])
def test_a_scene_reaches_the_model_as_the_tiler_brought_it_to_training(flags, tmp_path):
    nm = np.concatenate([np.linspace(450, 900, 40), np.linspace(1600, 1700, 6), [2200, 2230]])
    stated = {} if '--nodata=0' in flags else {'nodata': 0}
    path = make_scene(tmp_path / 's.npz', bands=48, wavelengths_nm=nm, **stated)
    with np.load(path) as file:
        fields = dict(file)
    fields['cube'][3:9, :20] = 0
    np.savez(path, **fields)
    tiled(path, tmp_path / 'tiles', '--tile_size=16', *flags)
    tiles = Tiles(str(tmp_path / 'tiles'), 'tr')
    scene = map_scene.open_scene(flags_of(path), tiles.meta)
    for image, (_, row, col) in zip(tiles.images, tiles.meta['tiles']['tr']):
        got = scene.cube[:, row:row + 16, col:col + 16]
        missing = (fields['cube'][row:row + 16, col:col + 16] == 0).all(2)
        assert np.isnan(got[:, missing]).all() and np.isfinite(got[:, ~missing]).all()
        np.testing.assert_allclose(got[:, ~missing], image[:, ~missing], rtol=1e-4, atol=2e-4)
    assert map_scene.units_warning(scene, tiles.meta) == ''


NINE = np.linspace(450, 850, 9)  # nm


def meta_of(count, nm=None, **more):
    """meta of training data of so many bands that are like the scenes of numbered()"""
    return {'num_bands': count, 'num_classes': 2, 'class_names': ['a', 'b'], 'nodata': None,
            'wavelengths_nm': nm, 'mean': [50.0] * count, 'std': [30.0] * count,
            'dtype': 'uint16', **more}


def numbered(path, bands=9, **fields):
    """A scene whose band k (from 0) has the values 10 k + 1 and 10 k + 2"""
    cube = np.zeros((20, 30, bands), np.uint16) + 10 * np.arange(bands, dtype=np.uint16) + 1
    cube[::2] += 1
    cube = fields.pop('change', lambda cube: cube)(cube)
    np.savez(path, cube=cube, **fields)
    return path


def bands_used(scene, meta, *flags):
    """Numbers of the bands that reach the model"""
    cube = map_scene.open_scene(flags_of(scene, 'map.tif', *flags), meta).cube
    return (np.asarray(cube)[:, 1, 1] // 10).astype(int).tolist()


def test_another_nodata_value_than_that_asked_for_in_tiling_is_said(tmp_path, capsys):
    def said(nodata, asked, *more):
        np.savez(tmp_path / 'a.npz', cube=np.ones((20, 30, 7), np.int16), nodata=nodata)
        meta = meta_of(7) | {'dtype': 'int16', 'nodata': asked, 'settings': {'nodata': asked}}
        map_scene.open_scene(flags_of(tmp_path / 'a.npz', 'map.tif', *more), meta)
        return capsys.readouterr().out
    assert 'WARNING: it states nodata 0, the training data were tiled with --nodata=-9999: pass ' \
        'that here' in said(0, -9999)
    assert 'WARNING' not in said(-9999, -9999) + said(0, None) + said(0, -9999, '--nodata=-9999')


def test_of_a_scene_with_more_bands_those_of_the_model_are_used(tmp_path, capsys):
    with_nm = numbered(tmp_path / 'nm.npz', wavelengths_nm=NINE)
    assert bands_used(with_nm, meta_of(4, [850.4, 500, 600, 650])) == [8, 1, 3, 4]
    assert 'of its 9 bands the 4 of the training data' in capsys.readouterr().out
    assert bands_used(with_nm, meta_of(9, NINE[::-1].tolist())) == list(range(9))[::-1]
    capsys.readouterr()
    assert bands_used(with_nm, meta_of(9, NINE.tolist())) == list(range(9))
    assert 'of its' not in capsys.readouterr().out

    # by number, where the files have the same bands
    plain = numbered(tmp_path / 'plain.npz')
    left_out = meta_of(7, None, bands=[0, 1, 2, 4, 5, 6, 8], file_bands=9)
    assert bands_used(plain, left_out) == [0, 1, 2, 4, 5, 6, 8]
    assert bands_used(plain, left_out, '--drop_bands=4') == [0, 1, 2, 4, 5, 6, 8]
    assert bands_used(plain, meta_of(6), '--drop_bands=1,2,9') == [2, 3, 4, 5, 6, 7]
    with pytest.raises(UserError, match='needs band 9, left out here'):
        bands_used(plain, left_out, '--drop_bands=9')
    with pytest.raises(UserError, match='has 9 bands, the model was trained on 7'):
        bands_used(plain, left_out | {'file_bands': 10})  # which has lost another band?
    resampled = meta_of(6, None, settings={'bands': 'landsat'})
    with pytest.raises(UserError, match='states no wavelengths'):
        bands_used(numbered(tmp_path / 'six.npz', 6), resampled)


def test_a_band_without_data_that_the_model_needs_is_refused(tmp_path):
    def without_band_4(cube):
        cube = cube.astype(np.float32)
        cube[..., 3] = np.nan
        return cube
    with_nm = numbered(tmp_path / 'nm.npz', wavelengths_nm=NINE, change=without_band_4)
    with pytest.raises(UserError, match='no band with data near 600 nm'):
        bands_used(with_nm, meta_of(9, NINE.tolist()))
    assert bands_used(with_nm, meta_of(3, [500, 550, 650])) == [1, 2, 4]
    plain = numbered(tmp_path / 'plain.npz', change=without_band_4)
    with pytest.raises(UserError, match='needs band 4'):
        bands_used(plain, meta_of(9))


def test_flags_say_what_the_file_does_not(tmp_path):
    cube = np.load(numbered(tmp_path / 's.npz'))['cube']
    cube[5, 7] = 9999
    np.savez(tmp_path / 'two.npz', other=cube[:5], image=np.moveaxis(cube, 2, 1))
    scene = map_scene.open_scene(flags_of(f'{tmp_path}/two.npz:image', 'map.tif', '--axes=hcw',
                                          '--nodata=9999', '--drop_bands=2-3'), meta_of(7))
    got = np.asarray(scene.cube)
    assert got.shape == (7, 20, 30) and got[1, 1, 1] == 31
    assert np.isnan(got[:, 5, 7]).all() and np.isnan(got).sum() == 7
    with pytest.raises(UserError, match='names of their own'):
        flags_of(f'{tmp_path}/a.tif', f'{tmp_path}/a.tif')


@pytest.mark.parametrize('own, offset, factor, shift', [
    ((1e-4, 0), 0, 1, 0), ((1.0, 0), 0, 1e4, 0), ((1e-4, -0.1), 0, 1, -1000), (None, 0, 1, 0),
    ((1e-3, 0.25), 0.05, 10, 2000), ((1e-4, 0.05), 0.05, 1, 0)])
def test_a_scene_in_other_stated_units_is_converted(own, offset, factor, shift, monkeypatch,
                                                    capsys):
    values = np.random.default_rng(0).normal(3000, 900, (5, 30, 40)).astype(np.float32)
    stored = Scene((values - shift) / factor, None, None, None, None, scale=own)
    monkeypatch.setattr(map_scene, 'read_scene', lambda *args: stored)
    meta = meta_of(5, scale=[1e-4, offset], mean=[3000.0] * 5, std=[900.0] * 5)
    scene = map_scene.open_scene(flags_of('s.tif'), meta)
    np.testing.assert_allclose(scene.cube, values, rtol=1e-5)
    said = 'both state their scale' in capsys.readouterr().out
    assert said == ((factor, shift) != (1, 0))
    assert map_scene.units_warning(scene, meta) == ''
    far = scene._replace(cube=scene.cube / 1e4)
    one_states = 'Only the training data state a scale: 0.0001' in map_scene.units_warning(far, meta)
    assert one_states == (own is None)


def test_a_rotated_place_is_kept(tmp_path):
    turned = (34264, 12, 16, (28.2, -10.3, 0, 35e4, -10.3, -28.2, 0, 58e5, *[0.0] * 7, 1.0))
    scene = np.random.default_rng(0).integers(1, 99, (20, 30, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / 's.tif', scene, planarconfig='contig', photometric='minisblack',
                     extratags=[(*turned, True)])
    map_scene.map_scene(lambda x: x[:, :2], flags_of(tmp_path / 's.tif', tmp_path / 'm.tif'),
                        meta_of(3), 16)
    assert tags_of(tmp_path / 'm.tif', (34264,))[34264] == turned[3]


def test_a_map_replaces_nothing_but_an_earlier_map(tmp_path):
    scene = numbered(tmp_path / 's.npz')
    for name in ('labels.png', 'report.json', 'labels.tif', 'shares.tif'):
        (tmp_path / name).write_text('{"scores": 1}')
    (tmp_path / 'list.json').write_text('[1, 2]')
    for out, more, named in (('list', [], 'list.json'), ('labels', [], 'labels.png'), ('report', [], 'report.json'),
                             ('other', [f'--probabilities={tmp_path}/shares.tif'], 'shares.tif')):
        with pytest.raises(UserError, match=f'{named}: is there already'):
            flags_of(scene, tmp_path / f'{out}.tif', *more)
    for name in ('labels.png', 'report.json', 'labels.tif', 'shares.tif'):
        assert (tmp_path / name).read_text() == '{"scores": 1}'
    for _ in range(2):  # the second one over the first
        flags = flags_of(scene, tmp_path / 'm.tif', f'--probabilities={tmp_path}/p.tif')
        map_scene.map_scene(lambda x: torch.ones(len(x), 2, 16, 16) / 2, flags, meta_of(9), 16)


def test_labels_that_are_not_the_models_classes_are_not_drawn_as_such(capsys):
    def drawn(labels, names, model_names):
        scene = Scene(None, np.array([[0, labels]]), class_names=names)
        meta = {'class_names': model_names, 'num_classes': len(model_names)}
        return map_scene.labels_to_draw(scene, meta) is not None, capsys.readouterr().out
    assert drawn(2, ['a', 'b'], ['a', 'b', 'c']) == (True, '')
    assert drawn(2, None, ['a', 'b']) == (True, '') and drawn(2, ['a'], ['class 1', 'class 2']) == (True, '')
    for answer in (drawn(3, None, ['a', 'b']), drawn(2, ['b', 'a'], ['a', 'b'])):
        assert not answer[0] and 'leaves out the labels of the scene' in answer[1]


def test_a_map_without_room_is_told_before_the_work(tmp_path, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    flags = flags_of(numbered(tmp_path / 's.npz'), tmp_path / 'm.tif')
    with pytest.raises(UserError, match='m.tif: takes .* GB, and the disk has not so much left'):
        map_scene.map_scene(None, flags, meta_of(9), 16)
    assert sorted(os.listdir(tmp_path)) == ['s.npz']


def test_nan_as_nodata_leaves_the_files_own(tmp_path):
    cube = np.ones((8, 9, 7), np.int16)
    cube[:2] = -9999
    scene = make_scene(tmp_path / 's.npz', cube=cube, labels=None, nodata=-9999)
    for nodata in (None, float('nan')):
        assert read_scene(scene, nodata=nodata).nodata == -9999


def test_one_class_everywhere_is_said(tmp_path, capsys):
    def class_2(x):
        return torch.tensor([0.1, 0.9])[:, None, None].expand(len(x), 2, 16, 16)

    def both(x):
        return torch.stack([torch.eye(16), 1 - torch.eye(16)]).repeat(len(x), 1, 1, 1)
    scene = numbered(tmp_path / 's.npz')
    flags = flags_of(scene, tmp_path / 'm.tif')
    like_training = meta_of(9, mean=(10 * np.arange(9) + 1.5).tolist(), std=[0.5] * 9)
    assert map_scene.map_scene(class_2, flags, like_training, 16)
    assert 'every pixel became class 2, b' in capsys.readouterr().out
    assert not map_scene.map_scene(class_2, flags, meta_of(9, mean=[9e5] * 9), 16)  # other units
    capsys.readouterr()
    assert map_scene.map_scene(both, flags, meta_of(9, mean=[9e5] * 9), 16)
    assert 'every pixel' not in capsys.readouterr().out


def test_a_run_on_normalized_and_resampled_tiles_maps_the_raw_scene(tmp_path):
    scene = make_scene(tmp_path / 's.npz', bands=40)
    tiled(scene, tmp_path / 'tiles', '--tile_size=16', '--bands=460,520:30,640,700,900',
          '--normalize=scene', '--split_block=8')
    run('segment.py', *TINY, f'--data={tmp_path}/tiles', f'--out_dir={tmp_path}/run')
    done = run('tools/map_scene.py', f'--run={tmp_path}/run', f'--scene={scene}',
               f'--out={tmp_path}/map.tif')
    assert '40 bands are resampled to the 5' in done.stdout and 'WARNING' not in done.stdout
    labels = read_scene(scene).labels
    same = read_scene(f'{tmp_path}/map.tif').cube[0] == labels
    assert same[labels > 0].mean() > 0.95


def test_the_baseline_maps_too_in_windows_of_its_crops(scene_data, tmp_path):
    run('baseline_deeplab.py', f'--data={scene_data}', '--crop_size=8', '--width=8', '--steps=2',
        '--batch_size=4', '--clip_grad=0', f'--out_dir={tmp_path}/run')
    scene = make_scene(tmp_path / 's.npz', height=20, width=30)
    run('tools/map_scene.py', f'--run={tmp_path}/run', f'--scene={scene}',
        f'--out={tmp_path}/m.tif')
    assert read_scene(f'{tmp_path}/m.tif').cube.shape == (1, 20, 30)
    assert (tmp_path / 'm.png').exists() and load_segmenter(f'{tmp_path}/run/best.pt').window == 8


# ============ the doctor ============

def change_tiles(folder, name, change):
    """Apply change(array) to a file of tiles"""
    array = np.load(folder / name)
    change(array)
    np.save(folder / name, array)


def test_check_says_what_a_directory_holds_and_draws_it(scene_data, tmp_path):
    shutil.copytree(scene_data, tmp_path / 'tiles')
    done = run('tools/check_data.py', f'--data={tmp_path}/tiles', pictures=True)
    for words in ('7 bands of uint16', 'nothing wrong found', 'window', 'check.png'):
        assert words in done.stdout
    assert (tmp_path / 'tiles' / 'check.png').stat().st_size > 5000
    assert done.stdout.splitlines()[-1].startswith('picture: ')  # all is said before it is drawn
    assert 'floors.json' not in done.stdout


def test_check_finds_labels_shared_by_two_splits(scene_data, tmp_path):
    shutil.copytree(scene_data, tmp_path / 'out')
    folder = tmp_path / 'out'
    image = np.load(folder / 'tr_images.npy')[0]
    labels = np.load(folder / 'tr_labels.npy')[0]

    def repeat(array):
        array[0] = image if array.ndim == 4 else labels
    change_tiles(folder, 'ts_images.npy', repeat)
    change_tiles(folder, 'ts_labels.npy', repeat)
    os.makedirs(folder / 'check.png.tmp')  # nothing can be written there, as in a read-only folder
    done = run('tools/check_data.py', f'--data={folder}', check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert f'{np.count_nonzero(labels)} pixels are labelled in two splits' in done.stderr
    assert 'window' in done.stdout  # the floors, all the same
    assert done.stdout.splitlines()[-1].startswith('no picture')


def test_check_of_healthy_data_in_a_read_only_directory_succeeds(scene_data, tmp_path):
    shutil.copytree(scene_data, tmp_path / 'out')
    os.remove(tmp_path / 'out' / 'floors.json')
    os.makedirs(tmp_path / 'out' / 'check.png.tmp')
    os.makedirs(tmp_path / 'out' / 'floors.json.tmp')
    done = run('tools/check_data.py', f'--data={tmp_path}/out')
    assert 'nothing wrong found' in done.stdout and 'no picture' in done.stdout
    assert 'floors.json cannot be written there' in done.stdout and 'window' in done.stdout
    assert 'with blocks the splits share the image' in done.stdout


def test_check_names_every_fault(scene_data, tmp_path):
    folder = tmp_path / 'tiles'
    shutil.copytree(scene_data, folder)

    def without_class_2(labels):
        labels[labels == 2] = 0

    def with_label_9(labels):
        labels[tuple(np.argwhere(labels == 1)[0])] = 9

    def quantised(images):
        images[:, 4] = images[:, 4] // 1000
    change_tiles(folder, 'tr_labels.npy', without_class_2)
    change_tiles(folder, 'val_labels.npy', with_label_9)
    for split in data.SPLITS:
        change_tiles(folder, f'{split}_images.npy', quantised)
    meta = json.load(open(folder / 'meta.json'))
    meta['std'][2] = 0
    tiles = {split: Tiles(str(folder), split) for split in data.SPLITS}
    facts = check_data.read_facts(tiles)
    faults = [*check_data.faults_of_tiles(facts, meta), *check_data.faults_of_values(facts, meta),
              *check_data.faults_of_labels(facts, meta, tiles['tr'].labels)]
    for words in ('class 2 (class 2) has labels but none in tr',
                  'val: label values above 3 (up to 9)',
                  'band 3: one value only', 'quantised'):
        assert sum(words in fault for fault in faults) == 1, faults
    assert len(faults) == 4


@pytest.fixture
def sound(scene_data):
    """The facts and the meta of tiles without a fault"""
    tiles = Tiles(scene_data, 'tr')
    facts = check_data.read_facts({'tr': tiles})
    assert not [*check_data.faults_of_values(facts, tiles.meta)]
    return facts, tiles.meta


def test_check_names_zeros_and_fillers_once_and_no_units_because_of_them(sound):
    facts, meta = sound
    n = facts.sample.shape[1]
    dark = facts.sample - facts.sample.min(1, keepdims=True) + 50  # 0 is not far from these

    def say(share, raised=0, value=0):
        sample = dark + raised
        sample[:, :round(share * n)] = value
        extremes = np.stack([sample.min(1), sample.max(1)])
        scenes = np.arange(n) < n // 2  # the first half is of a scene of its own
        changed = facts._replace(sample=sample, extremes=extremes, sample_scene=scenes.astype(int))
        return [*check_data.faults_of_values(changed, {**meta, 'scenes': ['a', 'b']})]
    assert say(0.005) == []
    assert len(say(0.02)) == 1 and 'pixels that are 0 in all bands' in say(0.02)[0]
    assert len(say(0.02, 1e5)) == 1 and 'the rest (0)' in say(0.02, 1e5)[0]
    assert len(say(0.02, 0, 1e20)) == 1 and 'the rest (1e+20)' in say(0.02, 0, 1e20)[0]


def test_check_names_a_band_of_one_value_once(sound):
    facts, meta = sound
    sample = facts.sample.copy()
    sample[2] = 900
    std = np.where(np.arange(7) == 2, 0, meta['std'])
    fault, = check_data.faults_of_values(facts._replace(sample=sample), {**meta, 'std': std})
    assert fault.startswith('band 3: one value only')


def test_check_sees_a_filler_that_its_sample_has_not(sound, scene_data, monkeypatch):
    facts, meta = sound
    extremes = facts.extremes.copy()
    extremes[1, 2] = 1e20
    fault, = check_data.faults_of_values(facts._replace(extremes=extremes), meta)
    assert 'band 3: values far outside the rest (1e+20)' in fault
    monkeypatch.setattr(check_data, 'SAMPLE_PIXELS', 10)
    tiles = Tiles(scene_data, 'tr')
    images = np.moveaxis(tiles.images, 1, 0).reshape(7, -1)
    few = check_data.read_facts({'tr': tiles})
    assert few.sample.shape[1] < 100
    np.testing.assert_array_equal(few.extremes, [images.min(1), images.max(1)])


@pytest.mark.parametrize('num_bands, columns, told', [(1, 1920, True), (1, 100, False),
                                                      (7, 1920, False)])
def test_check_takes_a_long_scene_of_many_bands_for_no_table(num_bands, columns, told, sound):
    facts, meta = sound
    places = [[0, 0, 0], [0, 0, columns - 16]]
    meta = {**meta, 'num_bands': num_bands, 'tiles': {'tr': places}}
    faults = [*check_data.faults_of_tiles(facts, meta)]
    assert len(faults) == told and all('16 x 1920 px looks like a table' in x for x in faults)


STRIPES = (np.arange(40)[:, None] // 5 + np.arange(48) // 6) % 3 + 1  # labels of make_scene()


def say(tmp_path, flags=(), **fields):
    """What the doctor says of the tiles of a scene with these fields"""
    folder = tmp_path / str(len(os.listdir(tmp_path)))
    path = make_scene(f'{folder}.npz', **fields)
    return faults_of(tiled(path, folder, '--tile_size=16', *flags))


def faults_of(folder):
    done = run('tools/check_data.py', f'--data={folder}', check=False)
    assert 'Traceback' not in done.stderr
    start = f'{folder}: '
    faults = [line[len(start):] for line in done.stderr.splitlines() if line.startswith(start)]
    assert (done.returncode == 0) == ('nothing wrong found' in done.stdout) == (not faults)
    return '\n'.join(faults)


def spectra(dtype=np.float32, low=500):
    rng = np.random.default_rng(0)
    cube = rng.uniform(low, 3000, (4, 7))[STRIPES] + rng.normal(0, 100, (40, 48, 7))
    return cube.astype(dtype)


@pytest.mark.parametrize('value, text, pixels', [
    (1e20, '1e+20', 300), (-9999, '-9999', 300), (1e20, '1e+20', 1), (-1e30, '-1e+30', 1),
    (np.finfo(np.float32).min, '-3.4028235e+38', 300)])
def test_check_finds_fillers_that_nobody_declared(value, text, pixels, tmp_path):
    cube = spectra()
    cube.reshape(-1, 7)[:pixels, :3] = value
    said = say(tmp_path, cube=cube)
    assert f'bands 1-3: values far outside the rest ({value:g})' in said
    assert f'--nodata={text}' in said and '\n' not in said
    if pixels > 1:
        assert say(tmp_path, [f'--nodata={text}'], cube=cube).count('far outside') == 0


def test_check_finds_a_black_border_and_nothing_in_sound_data(tmp_path):
    cube = spectra(np.uint16)
    cube[:, 24:27] = 4095  # saturated: no filler
    cube[3, 3] = 9000  # a glint
    assert say(tmp_path, cube=cube) == ''
    assert say(tmp_path, cube=spectra() - 1500) == ''  # both sides of 0
    cube = spectra(np.uint16)
    cube[:, :5] = 0
    said = say(tmp_path, cube=cube)
    assert '--nodata=0' in said and '\n' not in said
    assert say(tmp_path, cube=cube, nodata=0) == ''


def test_check_finds_pixels_missing_in_some_bands(tmp_path):
    cube = spectra()
    cube[10:20, 10:20, 4] = np.nan
    said = say(tmp_path, cube=cube)
    assert re.search(r'\d\.\d % of the pixels are missing in some bands only, most in band 5', said)
    cube[10:20, 10:20] = np.nan
    assert say(tmp_path, cube=cube) == ''
    cube = spectra(np.uint8, 0) * (spectra() > 900)  # zeros in some bands of 8 bits are values
    assert 'missing' not in say(tmp_path, cube=cube.astype(np.uint8), nodata=0)


def test_check_finds_labels_on_missing_pixels(scene_data, tmp_path):
    folder = tmp_path / 'tiles'
    shutil.copytree(scene_data, folder)

    def lose_pixels(images):
        images[:, :, :4] = 7
    change_tiles(folder, 'tr_images.npy', lose_pixels)
    meta = json.load(open(folder / 'meta.json'))
    json.dump({**meta, 'nodata': 7}, open(folder / 'meta.json', 'w'))
    lost = np.count_nonzero(np.load(folder / 'tr_labels.npy')[:, :4])
    said = faults_of(folder)
    assert f'tr: {lost} labels lie on missing pixels' in said and 'ts:' not in said


def test_check_counts_labels_where_tiles_overlap_once(tmp_path):
    scene = make_scene(tmp_path / 's.npz')  # 40 x 48 px: tiles of 16 px overlap at the border
    for name, flags in (('border', []), ('stride', ['--stride=5'])):
        tiled(scene, tmp_path / name, '--tile_size=16', *flags)
        tiles = {split: Tiles(str(tmp_path / name), split) for split in data.SPLITS}
        facts = check_data.read_facts(tiles)
        assert len(tiles['tr']) * 16 * 16 > 40 * 48
        for split in data.SPLITS:
            expected = tiles['tr'].meta['class_counts'][split]
            assert facts.counts[split][1:4].tolist() == expected


def test_check_finds_labels_that_are_no_classes(scene_data, tmp_path):
    hill = np.add.outer(np.arange(64), np.arange(48)) % 90 + 1
    noisy = hill + np.random.default_rng(0).integers(0, 4, hill.shape)
    fields = np.random.default_rng(0).permutation(96) + 1  # 96 crops in fields of 4 x 8 px
    fields = fields.reshape(16, 6).repeat(4, 0).repeat(8, 1)
    ordered = np.sort(fields[::4, ::8].ravel()).reshape(16, 6).repeat(4, 0).repeat(8, 1)
    single = np.random.default_rng(0).integers(1, 90, hill.shape)  # a crop of its own in each pixel
    few = np.tile(np.arange(1, 21), (40, 1))  # 20 classes in stripes, in order
    for labels, measured in ((hill, True), (noisy, True), (hill % 9, False), (fields, False),
                             (ordered, False), (single, False), (few, False)):
        assert check_data.are_measured(labels[None].astype(np.uint8)) == measured
    folder = tmp_path / 'tiles'
    shutil.copytree(scene_data, folder)
    tiles = np.load(folder / 'tr_labels.npy')
    np.save(folder / 'tr_labels.npy', tiles * 0 + hill[:16, :16].astype(np.uint8))
    assert 'look like heights' in faults_of(folder)
    assert 'one class only' in say(tmp_path, labels=(STRIPES > 1).astype(np.uint8))
    assert 'only 3 of 30 classes' in say(tmp_path, labels=(10 * STRIPES).astype(np.uint8))
    names = [f'crop {k}' for k in range(30)]
    assert say(tmp_path, class_names=names) == ''  # an area where most of them do not grow


def test_check_finds_tables_odd_tiles_and_other_units(tmp_path):
    cube = spectra()
    table = cube.reshape(-1, 7).T[:, :, None].repeat(3, 0)[:16]
    assert 'one band of 16 x 1920 px looks like a table' in say(tmp_path, cube=table, labels=None,
                                                               wavelengths_nm=None)
    assert 'no usual patch divides tiles of 15 px' in say(tmp_path, ['--tile_size=15'])
    for name, factor in (('a', 1), ('b', 1e-4), ('c', 0.05)):
        np.savez(tmp_path / f'{name}.npz', cube=factor * cube, labels=STRIPES.astype(np.uint8))
    for second, words in (('b', 'if their units differ'), ('c', '')):
        roots = f'{tmp_path}/a.npz,{tmp_path}/{second}.npz'
        said = faults_of(tiled(roots, tmp_path / second, '--tile_size=16'))
        assert words in said and bool(words) == bool(said)


def test_the_doctors_spectra_are_those_of_the_classes(scene_data):
    tiles = Tiles(scene_data, 'tr')
    facts = check_data.read_facts({'tr': tiles})
    for k in (0, 2):
        x = np.moveaxis(tiles.images, 1, 3)[tiles.labels == k].astype(float)
        np.testing.assert_allclose(facts.sums[0, k], len(x))
        np.testing.assert_allclose(facts.sums[1, k] / len(x), x.mean(0))


def test_check_of_tiles_without_labels(tmp_path):
    scene = make_scene(tmp_path / 's.npz', labels=None)
    tiled(scene, tmp_path / 'tiles', '--tile_size=16')
    done = run('tools/check_data.py', f'--data={tmp_path}/tiles', pictures=True)
    assert 'nothing wrong found' in done.stdout and 'floors' not in done.stdout
    assert (tmp_path / 'tiles' / 'check.png').stat().st_size > 5000
    done = run('tools/check_data.py', f'--data={tmp_path}/none', check=False)
    assert done.returncode == 1 and 'no tiles here' in done.stderr


# ============ runs side by side ============

RESULT = {key: 0.5 for key in ('oa', 'mean_acc', 'miou', 'miou_all', 'kappa', 'mean_f1')}
CONFIG = {'data': 'data/a_0', 'encoder': 'runs/m_0/last.pt', 'decoder': 'logistic', 'pixel': True,
          'label_share': 1.0, 'seed': 0, 'steps': 10, 'log_every': 20, 'out_dir': 'runs/s_0'}


TILES = {'class_names': ['a', 'b'], 'how_split': 'in blocks', 'confusion_matrix': [[3, 1], [2, 2]]}


def write_report(folder, miou=0.5, name='MAE + logistic', tiles={}, **changes):
    """The report.json of a run of segment.py whose flags are CONFIG and these, on TILES and these"""
    os.makedirs(folder)
    floor = 0.3 + 0.1 * ('_1' in changes.get('data', ''))
    floors = {name: {**RESULT, 'miou': floor} for name in ('pixel', 'window')}
    content = {'name': name, 'config': {**CONFIG, **changes}, 'floors': floors, 'warning': '',
               'scores': {**RESULT, 'miou': miou}, **TILES, **tiles}
    json.dump(content, open(folder / 'report.json', 'w'))
    return str(folder)


def tables(runs, capsys):
    """The tables of these runs as compare.py prints them: dict title -> dict name of a row -> its
    cells OA, mean acc, mIoU, mIoU all, seeds"""
    read = [compare.read_run(run) for run in runs]
    for (where, label_share), table in compare.group_runs(read).items():
        compare.print_table(where, label_share, table)
    row = re.compile(r'(\S.*?)((?: +[\d.]+ ± +[\d.-]+){4}) +(\d+)')
    found = {}
    for block in capsys.readouterr().out.strip().split('\n\n'):
        title, _, *lines = block.splitlines()
        cells = [row.fullmatch(line) for line in lines]
        found[title] = {cell[1].strip(): [*re.findall(r'[\d.]+ ± +[\d.-]+', cell[2]), cell[3]]
                        for cell in cells}
    return found


def test_the_table_averages_seeds_and_nothing_else(tmp_path, capsys):
    second = dict(seed=1, data='data/a_1/', encoder='runs/m_1/last.pt', out_dir='b', log_every=99,
                  cuda_graphs=True)
    runs = [write_report(tmp_path / 's_0'), write_report(tmp_path / 's_1', 0.7, **second),
            write_report(tmp_path / 't', steps=99),
            write_report(tmp_path / 'u', data='data/scene_2013'),
            write_report(tmp_path / 'w', 0.6, data='data/scene_2018')]
    # one encoder on three splits, one run of them given twice
    runs += [write_report(tmp_path / f'b_{n}', seed=n, data=f'data/b_{n}') for n in (0, 1, 2)]
    runs += [f'{tmp_path}/../{tmp_path.name}/b_2/']
    # tiles whose number is no seed's
    runs += [write_report(tmp_path / f'c_{n}', seed=n, data='data/c_0/') for n in (0, 1, 2)]
    found = tables(runs, capsys)
    methods = {title: {name: (cells[2], cells[-1]) for name, cells in rows.items()
                       if 'floor' not in name} for title, rows in found.items()}
    share = ', 100 % of the labels'
    assert methods == {
        'data/a' + share: {'MAE + logistic steps=10': ('60.0 ± 14.1', '2'),
                           'MAE + logistic steps=99': ('50.0 ±    -', '1')},
        'data/scene_2013' + share: {'MAE + logistic': ('50.0 ±    -', '1')},
        'data/scene_2018' + share: {'MAE + logistic': ('60.0 ±    -', '1')},
        'data/b' + share: {'MAE + logistic': ('50.0 ±  0.0', '3')},
        'data/c_0' + share: {'MAE + logistic': ('50.0 ±  0.0', '3')}}
    # floors of two data sets: 0.3 and 0.4
    assert found['data/a' + share]['window floor'][2] == '35.0 ±  7.1'


def test_the_table_names_rows_by_what_differs_and_sorts_them(tmp_path, capsys):
    cnn = {'data': 'data/a_0', 'width': 64, 'label_share': 1.0, 'seed': 0, 'out_dir': 'runs/cnn'}
    runs = [write_report(tmp_path / 'untrained', 0.4, 'MAE untrained + logistic'),
            write_report(tmp_path / 'no_pixel', 0.45, pixel=False),
            write_report(tmp_path / 'best', 0.6), write_report(tmp_path / 'cnn', 0.5, 'DeepLabV3+'),
            write_report(tmp_path / 'few', label_share=0.02)]
    report = json.load(open(tmp_path / 'cnn' / 'report.json'))
    json.dump({**report, 'config': cnn}, open(tmp_path / 'cnn' / 'report.json', 'w'))
    found = tables(runs, capsys)
    assert list(found['data/a, 100 % of the labels']) == [
        'MAE + logistic pixel=True', 'DeepLabV3+', 'MAE + logistic pixel=False',
        'MAE untrained + logistic', 'window floor', 'pixel floor']
    few = found['data/a, 2 % of the labels']
    assert list(few) == ['MAE + logistic', 'window floor', 'pixel floor']


def test_runs_are_drawn_side_by_side(mapped, scene_data, tmp_path):
    for n in (1, 2):  # as of two seeds
        shutil.copytree(mapped / 'run', tmp_path / str(n))
        report = json.load(open(tmp_path / str(n) / 'report.json'))
        report['config']['seed'] = n
        json.dump(report, open(tmp_path / str(n) / 'report.json', 'w'))
    run('segment.py', *TINY, FEW_LABELS, f'--data={scene_data}', '--decoder=linear', '--steps=2',
        '--eval_every=1', f'--out_dir={tmp_path}/linear')
    run('pretrain_mae.py', *MAE_TINY, '--whiten=3', '--max_steps=1', f'--data={scene_data}',
        f'--out_dir={tmp_path}/mae')
    runs = [f'{tmp_path}/{name}' for name in ('1', '2', 'linear', 'mae')]
    done = run('tools/compare.py', *runs, f'--out_dir={tmp_path}/all', pictures=True)
    assert 'random ViT + logistic' in done.stdout and 'random ViT + linear' in done.stdout
    assert 'window floor' in done.stdout
    assert sorted(os.listdir(tmp_path / 'all')) == ['comparison.png', 'curves.png']
    for name in os.listdir(tmp_path / 'all'):
        assert (tmp_path / 'all' / name).stat().st_size > 5000
    done = run('tools/compare.py', runs[0], f'{tmp_path}/3', f'--out_dir={tmp_path}/all',
               check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert f'{tmp_path}/3: holds no report.json and no log.jsonl' in done.stderr


def test_what_is_drawn_side_by_side_is_what_was_scored(scene_data, tmp_path, monkeypatch):
    run('segment.py', *TINY, f'--data={scene_data}', '--crop_size=8', '--img_size=8',
        '--decoder=linear', '--steps=20', '--eval_every=20', f'--out_dir={tmp_path}/run')
    drawn = []
    monkeypatch.setattr(data, 'show_classes', lambda axis, classes, names: drawn.append(classes))
    judged = compare.read_run(f'{tmp_path}/run')
    compare.compare_maps(f'{tmp_path}/maps.png', [judged])
    labels, maps = drawn[:3], drawn[3:]
    network, tiles = load_segmenter(f'{tmp_path}/run/best.pt'), Tiles(scene_data, 'ts')

    @torch.no_grad()
    def predict(raw):
        return network(network.prepare(raw)).softmax(1)

    def classes(raw):
        return data.predict_tile(predict, raw, network.window, 3).argmax(1)
    cm = data.evaluate(classes, tiles)
    assert network.window == 8 and cm.tolist() == judged.report['confusion_matrix']
    assert (cm.sum(0) > 0).sum() > 1  # it says more than one class
    for label, classes_drawn in zip(labels, maps):
        i = next(i for i in range(len(tiles)) if (tiles.labels[i] == label).all())
        np.testing.assert_array_equal(classes(tiles.batch([i])[0])[0] + 1, classes_drawn)


FIRST = {'encoder': 'runs/m/last.pt', 'encoder_crc32': 7, 'data': 'data/c'}  # paths without the number of a seed
OTHER_SPLIT = {'confusion_matrix': [[5, 0], [0, 3]]}
OTHER_CLASSES = {'class_names': list('abcd'), 'confusion_matrix': np.eye(4).tolist()}


@pytest.mark.parametrize('changes, words', [
    (dict(tiles=OTHER_SPLIT), 'data/c changed between them (test labels of each class)'),
    (dict(tiles=OTHER_SPLIT, name='DeepLabV3+', data='./data/c/'), 'data/c changed between them (test labels of each class)'),
    (dict(tiles=OTHER_CLASSES, label_share=0.1), 'data/c changed between them (class_names, test labels of each class)'),
    (dict(tiles={'how_split': 'in halves'}), 'data/c changed between them (how_split)'),
    (dict(encoder_crc32=8), 'runs/m/last.pt changed between them (encoder_crc32)'),
    (dict(encoder_crc32=8, encoder='runs//m/last.pt', data='data/d'), 'runs/m/last.pt changed between them (encoder_crc32)')])
def test_runs_on_tiles_or_an_encoder_that_changed_in_between_are_refused(changes, words, tmp_path):
    runs = [write_report(tmp_path / 'c_0', **FIRST), write_report(tmp_path / 'c_1', **{**FIRST, 'seed': 1, **changes})]
    for order in (runs, runs[::-1]):
        with pytest.raises(UserError) as caught:
            compare.group_runs([compare.read_run(path) for path in order])
        assert f'{order[0]} and {order[1]}: {words}: ' in str(caught.value)


def test_seeds_and_label_shares_of_the_same_tiles_and_encoder_are_compared(tmp_path, capsys):
    other_scores = {'confusion_matrix': [[0, 4], [0, 4]]}  # of the same labels
    runs = [write_report(tmp_path / 'c_0', **FIRST), write_report(tmp_path / 'c_1', **FIRST, seed=1, tiles=other_scores),
            write_report(tmp_path / 'few', **FIRST, label_share=0.1)]
    runs.append(write_report(tmp_path / 'scratch', name='ViT from scratch', **{**FIRST, 'encoder': '', 'encoder_crc32': 0}))
    found = tables(runs, capsys)
    assert found['data/c, 100 % of the labels']['MAE + logistic'][-1] == '2' and len(found) == 2


def test_two_runs_of_one_method_and_seed_are_refused_and_one_run_given_twice_is_not(tmp_path, capsys):
    first = write_report(tmp_path / 'x', **FIRST, eval_every=100)
    twin = write_report(tmp_path / 'y', 0.9, **FIRST, eval_every=100, out_dir='runs/y', log_every=5)
    numbered = write_report(tmp_path / 'z', 0.9, **{**FIRST, 'data': 'data/c_0'}, eval_every=100)
    often = write_report(tmp_path / 'often', 0.9, **FIRST, eval_every=10)
    for other, differ in ((twin, 'log_every, out_dir'), (numbered, 'data')):
        with pytest.raises(UserError) as caught:
            tables([first, other], capsys)
        words = f'{first} and {other}: are the same method and seed (what differs: {differ}): give one of them'
        assert words == str(caught.value)
    shutil.copytree(first, tmp_path / 'copy')
    with pytest.raises(UserError, match='what differs: nothing'):
        tables([first, f'{tmp_path}/copy'], capsys)
    found = tables([first, often, os.path.relpath(first)], capsys)
    assert {name: cells[2:] for name, cells in found['data/c, 100 % of the labels'].items() if 'floor' not in name} == {
        'MAE + logistic eval_every=10': ['90.0 ±    -', '50.0 ±    -', '1'], 'MAE + logistic eval_every=100': ['50.0 ±    -', '50.0 ±    -', '1']}


@pytest.mark.parametrize('content', ['{"1": "class 1"}', '[{"name": 3}]', '3', '{"name": "MA', '{"name": "MAE", "config": {}}'])
def test_a_file_that_is_no_report_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / 'report.json').write_text(content)
    with pytest.raises(UserError, match='report.json: is no report of segment.py or baseline_deeplab.py: give directories'):
        compare.read_run(str(tmp_path))


@pytest.mark.parametrize('scene', [dict(labels=np.minimum(STRIPES, 2).astype(np.uint8)), dict(bands=5)])
def test_a_run_on_other_classes_or_bands_than_the_tiles_have_now_is_not_drawn(scene, mapped, scene_data, tmp_path):
    """The tiles were made anew after the runs: their reports agree, the tiles are others"""
    tiles = tiled(make_scene(tmp_path / 's.npz', **scene), tmp_path / 'tiles', '--tile_size=16')
    shutil.copytree(mapped / 'run', tmp_path / 'run')
    report = json.load(open(tmp_path / 'run' / 'report.json'))
    report['config']['data'] = str(tiles)
    json.dump(report, open(tmp_path / 'run' / 'report.json', 'w'))
    done = run('tools/compare.py', f'{tmp_path}/run', f'--out_dir={tmp_path}/all')
    assert f'{tmp_path}/run: not drawn, since {tiles} has other classes or bands now' in done.stdout
    assert 'random ViT + logistic' in done.stdout and os.path.exists(tmp_path / 'all' / 'comparison.png')
