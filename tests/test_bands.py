"""Bands: resampling against the integral it stands for; tiles at other bands, of several sensors, of principal components."""
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from conftest import MAE_TINY, make_scene, run, tiled
from data import Tiles, standardization, standardize
from models import load_checkpoint, load_encoder
from scenes import OHS_NM, UserError, band_matrix, parse_bands, read_scene, resample_bands, valid_pixels


def reflectance(nm):
    """A smooth spectrum: green peak, red edge, a broad absorption"""
    nm = np.asarray(nm, float)
    return 0.1 + 0.05 * np.exp(-((nm - 550) / 60) ** 2) + 0.4 / (1 + np.exp((720 - nm) / 40)) - 0.1 * np.exp(-((nm - 1000) / 150) ** 2)


def convolved(nm, fwhm):
    """The integral of reflectance() times a Gaussian of that FWHM around each nm, on a grid of 0.1 nm"""
    sigma = fwhm / (2 * np.sqrt(2 * np.log(2)))
    offsets = np.arange(-6 * sigma, 6 * sigma, 0.1)
    response = np.exp(-0.5 * (offsets / sigma) ** 2)
    return np.array([(reflectance(centre + offsets) * response).sum() / response.sum() for centre in nm])


def resampled(values, *args):
    return resample_bands(np.asarray(values)[:, None, None], *args)[:, 0, 0]


# ============ resample_bands ============

@pytest.mark.parametrize('step, fwhm', [(2, 15), (5, 15), (10, 15), (10, 60), (5, 200)])
def test_a_finer_source_is_a_gaussian_convolution(step, fwhm):
    source, target = np.arange(200, 1600.1, step), np.array([520, 560.3, 701, 719, 850, 1200])
    np.testing.assert_allclose(resampled(reflectance(source), source, target, fwhm), convolved(target, fwhm), rtol=2e-3)


def test_widths_may_differ_from_band_to_band_and_narrow_features_tell_them_apart():
    source = np.arange(400, 1000, 2.0)
    line = np.exp(-((source - 700) / 4) ** 2)
    narrow, wide = resampled(line, source, [700, 700], [15, 60])
    assert narrow > 3 * wide > 0.1


def test_where_detectors_overlap_no_band_counts_twice():
    source = np.concatenate([np.arange(400, 680, 10.0), np.arange(653, 1000, 10.0)])  # twice as dense at 650 to 680 nm, as AVIRIS is
    np.testing.assert_allclose(resampled(source, source, [650.0, 670, 680, 690]), [650, 670, 680, 690], atol=0.7)
    assert resampled(np.ones(len(source)), source, [670.0])[0] == pytest.approx(1, rel=1e-6)


def test_a_coarser_source_is_interpolated_and_the_same_bands_come_back_exactly():
    np.testing.assert_allclose(resampled([1.0, 2, 4], [500, 600, 700], [550, 650]), [1.5, 3])
    for source in (np.arange(400, 900, 3.0), np.array(OHS_NM)):
        x = np.random.default_rng(0).normal(size=len(source)).astype(np.float32)
        np.testing.assert_array_equal(resampled(x, source, source), x)
        np.testing.assert_array_equal(resampled(x, source, source[::-1]), x[::-1])  # the order asked for


def test_a_round_trip_of_smooth_spectra_stays_within_a_percent():
    fine, coarse = np.arange(420, 1000, 8.0), np.array(OHS_NM, float)
    inside = (fine > 466) & (fine < 940)
    back = resampled(resampled(reflectance(fine), fine, coarse), coarse, fine[inside])
    np.testing.assert_allclose(back, reflectance(fine[inside]), rtol=0.01)


def test_bands_in_any_order_twice_or_in_micrometres_are_handled():
    source, target = np.arange(400, 1000, 10.0), np.array([700.0, 500, 655])
    expected = resampled(reflectance(source), source, target)
    shuffled = np.random.default_rng(0).permutation(source)
    np.testing.assert_allclose(resampled(reflectance(shuffled), shuffled, target), expected, rtol=1e-6)
    np.testing.assert_allclose(resampled(reflectance(source), source / 1000, target), expected, rtol=1e-6)
    np.testing.assert_allclose(resampled(reflectance(source), source / 1000, target / 1000), expected, rtol=1e-6)
    twice = np.append(source, 500.0)  # 500 nm a second time with another value: their mean counts
    values, mean = np.append(reflectance(source), 0.3), reflectance(source).copy()
    mean[10] = (mean[10] + 0.3) / 2
    np.testing.assert_allclose(resampled(values, twice, target), resampled(mean, source, target), rtol=1e-6)


def test_a_hole_is_bridged_by_its_edges_and_refused_in_its_middle():
    source = np.concatenate([np.arange(1200, 1350, 10.0), np.arange(1480, 1700, 10.0)])  # a water band left out: 1340 to 1480
    weights = band_matrix(source, [1340, 1345, 1385, 1300])
    share = 45 / 140
    np.testing.assert_allclose(weights[2][[14, 15]], [1 - share, share])  # linear between the two edges, nothing else
    beside = band_matrix(source, [1331.0])[0] @ source  # the last band before the hole does not count for half of it
    assert beside == pytest.approx(1331, abs=1)
    assert (weights[:3] > 0).sum(1).max() == 2 and weights[0, 14] == 1 and (weights[3] > 0).sum() > 2
    with pytest.raises(UserError, match='1410 nm.*hole'):
        band_matrix(source, [1300, 1410])
    with pytest.raises(UserError, match='745'):  # a red edge made of red and near infrared would be invented
        band_matrix([485, 560, 660, 830, 1650, 2215], [745])


@pytest.mark.parametrize('from_nm, to_nm, bands, words', [
    (np.arange(400, 1000, 10.0), [2000], 60, 'none near 2000 nm'), (np.arange(400, 1000, 10.0), [380], 60, 'none near 380 nm'),
    ([500, np.nan, 700], [600], 3, '1 of its 3 wavelengths are missing'), ([500, None, 700], [600], 3, 'are missing'), ([0, 0, 0], [600], 3, '3 of its 3'),
    ([500, 600], [550], 3, '2 wavelengths for 3 bands'), (['red', 'green', 'blue'], [550], 3, 'not numbers'), ([500, 600, 700], [np.inf], 3, 'missing')])
def test_bad_wavelengths_are_one_sentence(from_nm, to_nm, bands, words):
    with pytest.raises(UserError, match=words) as caught:
        resample_bands(np.ones((bands, 2, 2)), from_nm, to_nm)
    assert '\n' not in str(caught.value) and ': ' in str(caught.value)


def test_resampled_bands_follow_the_gaussian_response():
    nm = np.arange(400, 1000, 4.0)
    spectrum = 1000 + 300 * np.sin(nm / 60)
    target = np.array([500.0, 660, 860])
    got = resample_bands(spectrum[::-1, None, None], nm[::-1], target, fwhm=20)[:, 0, 0]
    for value, centre in zip(got, target):
        response = np.exp(-0.5 * ((nm - centre) / (20 / 2.3548)) ** 2)
        assert value == pytest.approx((response * spectrum).sum() / response.sum(), rel=1e-4)
    coarse = resample_bands(np.array([1.0, 2.0, 4.0])[:, None, None], [500, 600, 700], [550, 650])[:, 0, 0]
    np.testing.assert_allclose(coarse, [1.5, 3.0])
    backwards = resample_bands(np.array([4.0, 2.0, 1.0])[:, None, None], [700, 600, 500], [550, 650])[:, 0, 0]
    np.testing.assert_allclose(backwards, [1.5, 3.0])
    with pytest.raises(UserError, match='inside its range'):
        resample_bands(spectrum[:, None, None], nm, [2000])


def test_bands_are_named_or_listed_with_their_widths():
    nm, fwhm = parse_bands('485:70,560')
    assert nm.tolist() == [485, 560] and fwhm.tolist() == [70, 15]
    assert parse_bands('ohs')[0].tolist() == list(OHS_NM) and len(parse_bands('landsat')[0]) == 6
    for text in ('red', '485:', '485:70:3', '485,,560', '485:0', 'nan', '-5', '485:nan'):
        with pytest.raises(UserError, match='--bands='):
            parse_bands(text)


def test_a_scene_with_bad_wavelengths_is_refused_and_micrometres_become_nm(tmp_path):
    for nm, words in ((np.arange(450, 510, 10.0), '6 wavelengths for 7 bands'), (np.array([np.nan] * 7), 'missing')):
        with pytest.raises(UserError, match=f's.npz.*{words}'):
            tiled(make_scene(tmp_path / 's.npz', wavelengths_nm=nm), tmp_path / 't', '--tile_size=16')
    scene = read_scene(make_scene(tmp_path / 's.npz', wavelengths_nm=np.linspace(0.45, 0.95, 7)))
    np.testing.assert_allclose(scene.wavelengths_nm, np.linspace(450, 950, 7))


# ============ tiles at other bands ============

NARROW = '500:60,600:60,700:60,800:60,900:60'


@pytest.fixture(scope='module')
def sensors(tmp_path_factory):
    """Scenes: a of 40 bands, 450 to 950 nm, with nodata; b of 12 of the same range in other units; c = b without wavelengths. Tile
    directories: a, b (their own bands), narrow (a at NARROW), both (a and b at NARROW, each scene normalised)"""
    folder = tmp_path_factory.mktemp('sensors')
    cube = np.load(make_scene(folder / 'a.npz', height=64, width=64, bands=40))['cube']
    cube[:20, :9] = 0
    make_scene(folder / 'a.npz', height=64, width=64, bands=40, cube=cube, nodata=0)
    cube = np.load(make_scene(folder / 'b.npz', height=48, width=96, bands=12, seed=1))['cube']
    make_scene(folder / 'b.npz', height=48, width=96, bands=12, seed=1, cube=(cube / 1e4).astype(np.float32))
    make_scene(folder / 'c.npz', height=48, width=96, bands=12, seed=1, wavelengths_nm=None)
    a, b = folder / 'a.npz', folder / 'b.npz'
    for name, root, flags in (('a', a, []), ('b', b, []), ('narrow', a, [f'--bands={NARROW}']),
                              ('both', f'{a},{b}', [f'--bands={NARROW}', '--normalize=scene'])):
        tiled(root, folder / name, '--tile_size=16', '--split_block=8', *flags)
    return folder


def training_tiles(folder):
    """-> images (N, C, S, S), their valid pixels (C, n) in float64, meta"""
    tiles = Tiles(str(folder), 'tr')
    images = tiles.batch(range(len(tiles)))[0]
    valid = valid_pixels(images, tiles.meta['nodata'])
    return images, images.movedim(1, 0)[:, valid].double(), tiles.meta


def test_statistics_at_other_bands_are_those_of_the_resampled_pixels(sensors):
    raw, _, stored = training_tiles(sensors / 'a')
    images, x, meta = training_tiles(sensors / 'narrow')
    assert images.shape == (len(raw), 5, 16, 16) and images.dtype == torch.float32
    assert np.array_equal(Tiles(str(sensors / 'a'), 'tr').labels, Tiles(str(sensors / 'narrow'), 'tr').labels)
    valid = valid_pixels(raw, stored['nodata'])
    assert not valid.all() and torch.equal(valid_pixels(images, meta['nodata']), valid)
    i = int((~valid).flatten(1).sum(1).argmin())
    direct = resample_bands(raw[i].numpy(), stored['wavelengths_nm'], *parse_bands(NARROW))
    np.testing.assert_allclose(images[i][:, valid[i]], direct[:, valid[i]], rtol=1e-5)
    for key, value in (('mean', x.mean(1)), ('covariance', torch.cov(x)), ('std', x.std(1))):
        np.testing.assert_allclose(meta[key], value, rtol=1e-6)
    weights = band_matrix(stored['wavelengths_nm'], *parse_bands(NARROW))  # it is linear
    np.testing.assert_allclose(meta['mean'], weights @ stored['mean'], rtol=1e-4)
    np.testing.assert_allclose(meta['covariance'], weights @ np.array(stored['covariance']) @ weights.T, rtol=1e-3)
    assert meta['num_bands'] == 5 and meta['wavelengths_nm'] == [500, 600, 700, 800, 900]
    for whiten in (0, 5):
        z = standardize(images, *standardization(meta, whiten), meta['nodata'])
        assert z.isfinite().all() and (z.movedim(1, 0)[:, ~valid] == 0).all()
        np.testing.assert_allclose(z.movedim(1, 0)[:, valid].var(1).mean(), 1, rtol=0.02)


def test_the_scenes_own_bands_change_no_value(sensors, tmp_path):
    own = ','.join(map(str, Tiles(str(sensors / 'b'), 'tr').meta['wavelengths_nm']))
    tiled(sensors / 'b.npz', tmp_path / 'own', f'--bands={own}', '--tile_size=16', '--split_block=8')
    np.testing.assert_array_equal(Tiles(str(tmp_path / 'own'), 'tr').images, Tiles(str(sensors / 'b'), 'tr').images)


def test_bands_need_wavelengths_and_sensors_need_common_bands(sensors, tmp_path):
    for root, flags, words in (('c', [f'--bands={NARROW}'], 'c.npz: --bands needs the wavelengths'), ('a,b', [], '--bands= with --normalize=scene'),
                               ('a,b', ['--normalize=scene'], 'b.npz: its bands'), ('a', ['--bands=2000'], 'none near 2000 nm')):
        roots = ','.join(f'{sensors}/{name}.npz' for name in root.split(','))
        with pytest.raises(UserError, match=re.escape(words)):
            tiled(roots, tmp_path / 'no', '--tile_size=16', *flags)
        assert not os.path.exists(tmp_path / 'no' / 'meta.json')
        shutil.rmtree(tmp_path / 'no', ignore_errors=True)


# ============ several sensors in one directory ============

def test_two_sensors_normalised_are_standard_in_each_scene(sensors):
    """--normalize=scene: each scene has mean 0 and std 1 by its own valid pixels, whatever its units and bands were"""
    images, x, meta = training_tiles(sensors / 'both')
    assert meta['num_bands'] == 5 and meta['dtype'] == 'float32' and meta['nodata'] is None and meta['settings']['normalize'] == 'scene'
    assert [os.path.basename(name) for name in meta['scenes']] == ['a.npz', 'b.npz'] and images.dtype == torch.float32
    scene_of = torch.tensor([scene for scene, _, _ in meta['tiles']['tr']])
    assert set(scene_of.tolist()) == {0, 1}
    for number, name in enumerate('ab'):
        scene = read_scene(str(sensors / f'{name}.npz'))
        resampled = resample_bands(scene.cube, scene.wavelengths_nm, *parse_bands(NARROW)).astype(float)
        valid = valid_pixels(scene.cube, scene.nodata)
        resampled = (resampled - resampled[:, valid].mean(1)[:, None, None]) / resampled[:, valid].std(1)[:, None, None]
        mine = images[scene_of == number]
        values = mine.movedim(1, 0)[:, valid_pixels(mine, None)]
        np.testing.assert_allclose(values.mean(1), 0, atol=1e-5)  # tiles of 16 px cover these scenes without overlap
        np.testing.assert_allclose(values.std(1, unbiased=False), 1, rtol=1e-5)
        for tile, (_, row, col) in zip(mine, [place for place in meta['tiles']['tr'] if place[0] == number]):
            inside = valid[row:row + 16, col:col + 16]
            np.testing.assert_allclose(tile[:, inside], resampled[:, row:row + 16, col:col + 16][:, inside], atol=2e-4)
            assert tile[:, ~inside].isnan().all()
    for key, value in (('mean', x.mean(1)), ('covariance', torch.cov(x)), ('std', x.std(1))):
        np.testing.assert_allclose(meta[key], value, rtol=1e-6, atol=1e-7)


def test_a_band_of_one_value_and_a_scene_without_pixels_when_normalised(tmp_path):
    cube = np.random.default_rng(0).integers(0, 99, (40, 48, 3)).astype(np.uint16)
    cube[..., 1] = 7
    tiled(make_scene(tmp_path / 's.npz', cube=cube, wavelengths_nm=None), tmp_path / 't', '--tile_size=16', '--normalize=scene')
    images, x, meta = training_tiles(tmp_path / 't')
    assert images.isfinite().all() and (images[:, 1] == 0).all() and meta['std'][1] == 0
    empty = make_scene(tmp_path / 'e.npz', cube=np.zeros_like(cube), nodata=0, wavelengths_nm=None)
    with pytest.raises(UserError, match='no valid pixel'):
        tiled(empty, tmp_path / 'u', '--tile_size=16', '--normalize=scene')


def losses(out):
    return [entry['loss'] for entry in map(json.loads, open(os.path.join(out, 'log.jsonl'))) if 'loss' in entry]


JUDGE = ['segment.py', '--decoder=linear', '--steps=1', '--label_share=0.1']


@pytest.mark.slow
def test_two_sensors_in_one_run_resume_exactly_on_one_process_and_two(sensors, tmp_path):
    flags = ['pretrain_mae.py', *MAE_TINY, f'--data={sensors}/both', '--whiten=3', '--dtype=float32']
    run(*flags, '--max_steps=5', f'--out_dir={tmp_path}/whole')
    for steps in (2, 5):
        run(*flags, f'--max_steps={steps}', f'--out_dir={tmp_path}/pieces')
    whole, pieces = (load_checkpoint(tmp_path / name / 'last.pt')['model'] for name in ('whole', 'pieces'))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole) and losses(tmp_path / 'whole') == losses(tmp_path / 'pieces')
    run(*flags, '--max_steps=3', f'--out_dir={tmp_path}/two', processes=2)
    np.testing.assert_allclose(losses(tmp_path / 'two'), losses(tmp_path / 'whole')[:3], atol=2e-6)


def test_an_encoder_is_judged_on_the_bands_it_was_trained_on(sensors, tmp_path):
    run('pretrain_mae.py', *MAE_TINY, f'--data={sensors}/narrow', '--max_steps=1', f'--out_dir={tmp_path}/mae')
    encoder = f'--encoder={tmp_path}/mae/last.pt'
    done = run(*JUDGE, encoder, f'--data={sensors}/b', f'--out_dir={tmp_path}/no', check=False)
    assert done.returncode == 1 and 'data.py tile --bands=' in done.stderr and 'Traceback' not in done.stderr
    assert '12' in done.stderr and '5 ' in done.stderr
    tiled(sensors / 'b.npz', tmp_path / 'b', f'--bands={NARROW}', '--tile_size=16', '--split_block=8')
    run(*JUDGE, encoder, f'--data={tmp_path}/b', f'--out_dir={tmp_path}/judged')
    checkpoint = load_checkpoint(tmp_path / 'judged' / 'best.pt')
    assert checkpoint['meta']['num_bands'] == 5 and checkpoint['meta']['wavelengths_nm'] == [500, 600, 700, 800, 900]


# ============ principal components ============

def test_principal_components_are_the_channels(sensors, tmp_path, capsys):
    tiled(sensors / 'a.npz', tmp_path / 'pca', '--pca=3', '--tile_size=16', '--split_block=8')
    raw, x, stored = training_tiles(sensors / 'a')
    images, y, meta = training_tiles(tmp_path / 'pca')
    variance = np.linalg.eigvalsh(np.array(stored['covariance']))[::-1]
    np.testing.assert_allclose(meta['explained_variance'], variance[:3] / variance.sum(), rtol=1e-6)
    assert f'{meta["explained_variance"][0]:.2%}' in capsys.readouterr().out
    components = np.array(meta['components'])
    assert components.shape == (3, 40) and meta['num_bands'] == 3 and meta['wavelengths_nm'] is None and meta['dtype'] == 'float32'
    np.testing.assert_allclose(components @ components.T, np.eye(3), atol=1e-12)
    assert (components.sum(1) > 0).all()
    valid = valid_pixels(raw, stored['nodata'])
    assert images.shape == (len(raw), 3, 16, 16) and images.dtype == torch.float32 and torch.equal(valid_pixels(images, meta['nodata']), valid)
    assert np.array_equal(Tiles(str(sensors / 'a'), 'ts').labels, Tiles(str(tmp_path / 'pca'), 'ts').labels)
    np.testing.assert_allclose(y, components @ x.numpy(), rtol=1e-5)
    for key, value in (('mean', y.mean(1)), ('covariance', torch.cov(y)), ('std', y.std(1))):
        np.testing.assert_allclose(meta[key], value, rtol=1e-4, atol=1e-3 * float(y.var(1).max()) if key == 'covariance' else 0)
    z = standardize(images, *standardization(meta, 3), meta['nodata']).movedim(1, 0)[:, valid]
    np.testing.assert_allclose(torch.cov(z), np.eye(3), atol=0.02)
    centred = x - x.mean(1, keepdim=True)
    back = torch.from_numpy(components).T @ (y - y.mean(1, keepdim=True))
    lost = (back - centred).square().sum() / centred.square().sum()  # what comes back lacks the other components only
    assert float(lost) == pytest.approx(1 - sum(meta['explained_variance']), rel=0.01)


def test_an_encoder_of_principal_components_is_trained_judged_and_maps(sensors, tmp_path):
    tiled(sensors / 'a.npz', tmp_path / 'pca', '--pca=3', '--tile_size=16', '--split_block=8')
    run('pretrain_mae.py', *MAE_TINY, f'--data={tmp_path}/pca', '--max_steps=2', f'--out_dir={tmp_path}/mae')
    encoder = load_encoder(tmp_path / 'mae' / 'last.pt')
    assert encoder.in_chans == 3 and np.array_equal(encoder.meta['components'], Tiles(f'{tmp_path}/pca', 'tr').meta['components'])
    assert os.path.exists(tmp_path / 'mae' / 'reconstruction.png')
    run(*JUDGE, f'--encoder={tmp_path}/mae/last.pt', f'--out_dir={tmp_path}/judged')
    run('tools/map_scene.py', f'--run={tmp_path}/judged', f'--scene={sensors}/a.npz', f'--out={tmp_path}/map.tif')
    assert read_scene(f'{tmp_path}/map.tif').cube.shape == (1, 64, 64)
    with pytest.raises(UserError, match='--pca=41: choose from 1 to 40'):
        tiled(sensors / 'a.npz', tmp_path / 'no', '--pca=41', '--tile_size=16')
