"""Bands: resampling against the integral it stands for, statistics that follow, several sensors in one run, encoders on other bands."""
import json
import os

import numpy as np
import pytest
import torch

import data
from conftest import MAE_TINY, make_scene, run
from data import OHS_NM, Tiles, UserError, band_matrix, parse_bands, resample_bands, standardization, standardize, valid_pixels
from models import SpatialSpectralViT, load_checkpoint, load_encoder


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


def test_bands_are_named_or_listed_with_their_widths():
    nm, fwhm = parse_bands('485:70,560')
    assert nm.tolist() == [485, 560] and fwhm.tolist() == [70, 15]
    assert parse_bands('ohs')[0].tolist() == list(OHS_NM) and len(parse_bands('landsat')[0]) == 6
    for text in ('red', '485:', '485:70:3', '485,,560', '485:0', 'nan', '-5', '485:nan'):
        with pytest.raises(UserError, match='--bands='):
            parse_bands(text)


def test_a_scene_with_bad_wavelengths_is_refused_and_micrometres_become_nm(tmp_path):
    for nm, words in ((np.arange(450, 510, 10.0), '6 wavelengths for 7 bands'), (np.array([np.nan] * 7), 'missing')):
        done = run('data.py', 'tile', f'--root={make_scene(tmp_path / "s.npz", wavelengths_nm=nm)}', f'--out={tmp_path / "t"}', '--tile_size=16', check=False)
        assert done.returncode == 1 and words in done.stderr and 's.npz' in done.stderr and 'Traceback' not in done.stderr
    scene = data.read_scene(make_scene(tmp_path / 's.npz', wavelengths_nm=np.linspace(0.45, 0.95, 7)))
    np.testing.assert_allclose(scene.wavelengths_nm, np.linspace(450, 950, 7))


# ============ tiles at other bands ============

@pytest.fixture(scope='module')
def sensors(tmp_path_factory):
    """Tile directories: a: 40 bands of 450 to 950 nm with nodata; b: 12 of the same range, larger tiles; c: b without wavelengths;
    d: b with 12 others"""
    folder = tmp_path_factory.mktemp('sensors')
    cube = np.load(make_scene(folder / 'a.npz', height=64, width=64, bands=40))['cube']
    cube[:20, :9] = 0
    make_scene(folder / 'a.npz', height=64, width=64, bands=40, cube=cube, nodata=0)
    make_scene(folder / 'b.npz', height=48, width=96, bands=12, seed=1)
    make_scene(folder / 'c.npz', height=48, width=96, bands=12, seed=1, wavelengths_nm=None)
    make_scene(folder / 'd.npz', height=48, width=96, bands=12, seed=1, wavelengths_nm=np.linspace(500, 1000, 12))
    for name, size in (('a', 16), ('b', 32), ('c', 32), ('d', 32)):
        run('data.py', 'tile', f'--root={folder / name}.npz', f'--out={folder / name}', f'--tile_size={size}', '--split_block=8')
    return folder


NARROW = '500:60,600:60,700:60,800:60,900:60'


def test_statistics_at_other_bands_are_those_of_the_resampled_pixels(sensors):
    stored, tiles = Tiles(str(sensors / 'a'), 'tr'), Tiles(str(sensors / 'a'), 'tr', bands=NARROW)
    images, labels = tiles.batch(range(len(tiles)))
    raw = torch.from_numpy(np.array(stored.images))
    assert images.shape == (len(raw), 5, 16, 16) and images.dtype == torch.float32 and torch.equal(labels, torch.from_numpy(np.array(stored.labels)))
    valid = valid_pixels(raw, stored.meta['nodata'])
    assert not valid.all() and torch.equal(valid_pixels(images, tiles.meta['nodata']), valid)
    i = int((~valid).flatten(1).sum(1).argmin())
    direct = resample_bands(raw[i].numpy(), stored.meta['wavelengths_nm'], *parse_bands(NARROW))
    np.testing.assert_allclose(images[i][:, valid[i]], direct[:, valid[i]], rtol=1e-5)
    x = images.movedim(1, 0)[:, valid].double()
    for key, value in (('mean', x.mean(1)), ('covariance', torch.cov(x)), ('std', x.std(1))):
        np.testing.assert_allclose(tiles.meta[key], value, rtol=1e-3)
    assert tiles.meta['num_bands'] == 5 and tiles.meta['wavelengths_nm'] == [500, 600, 700, 800, 900]
    for whiten in (0, 5):
        z = standardize(images, *standardization(tiles.meta, whiten), tiles.meta['nodata'])
        assert z.isfinite().all() and (z.movedim(1, 0)[:, ~valid] == 0).all()
        np.testing.assert_allclose(z.movedim(1, 0)[:, valid].var(1).mean(), 1, rtol=0.02)


def test_the_datas_own_bands_change_nothing(sensors):
    own = ','.join(map(str, Tiles(str(sensors / 'a'), 'tr').meta['wavelengths_nm']))
    tiles = Tiles(str(sensors / 'a'), 'tr', bands=own)
    assert tiles.weights is None and tiles.meta == Tiles(str(sensors / 'a'), 'tr').meta and tiles.batch([0])[0].dtype == torch.uint16


def test_several_sensors_are_drawn_in_proportion_and_each_step_anew():
    picks = [data.pick_source([100, 300, 600], step, 0) for step in range(3000)]
    np.testing.assert_allclose(np.bincount(picks) / 3000, [0.1, 0.3, 0.6], atol=0.03)
    assert picks[:50] == [data.pick_source([100, 300, 600], step, 0) for step in range(50)]
    assert picks[:50] != [data.pick_source([100, 300, 600], step, 1) for step in range(50)] and data.pick_source([7], 3, 0) == 0


def test_directories_of_other_bands_need_common_ones(sensors):
    with pytest.raises(UserError, match='12 bands are not the 40.*--bands='):
        data.open_sources(f'{sensors}/a,{sensors}/b', '', 16)
    with pytest.raises(UserError, match='12 bands are not the 12.*--bands='):
        data.open_sources(f'{sensors}/b,{sensors}/d', '', 16)
    with pytest.raises(UserError, match='needs the wavelengths'):
        data.open_sources(f'{sensors}/a,{sensors}/c', NARROW, 16)
    with pytest.raises(UserError, match='--img_size=32'):
        data.open_sources(f'{sensors}/b,{sensors}/a', NARROW, 32)
    sources, windows = data.open_sources(f'{sensors}/a,{sensors}/b', NARROW, 16)
    assert [source.meta['num_bands'] for source in sources] == [5, 5] and windows == [len(sources[0]), 4 * len(sources[1])]


# ============ runs ============

DINO_TINY = ['--size=tiny', '--img_size=16', '--local_crops_size=8', '--patch_size=4', '--batch_size=8', '--local_crops_number=1', '--out_dim=32',
             '--log_every=1', '--probe_tiles=2', '--eval_every=0']
JUDGE = ['--decoder=logistic', '--eval_every=0']
FLAGS = {'pretrain_mae.py': [*MAE_TINY, '--dropout=0', '--eval_every=0'], 'pretrain_dino.py': [*DINO_TINY, '--drop_path_rate=0'],
         'pretrain_dino_hsi.py': [*DINO_TINY, '--drop_path_rate=0']}
SLOW = [pytest.param(script, marks=pytest.mark.slow) for script in ('pretrain_dino.py', 'pretrain_dino_hsi.py')]


def losses(out):
    return [entry['loss'] for entry in map(json.loads, open(os.path.join(out, 'log.jsonl'))) if 'loss' in entry]


@pytest.mark.parametrize('script', ['pretrain_mae.py', *SLOW])
def test_two_sensors_in_one_run_resume_exactly_on_one_process_and_two(script, sensors, tmp_path):
    flags = [*FLAGS[script], f'--data={sensors}/a,{sensors}/b', f'--bands={NARROW}', '--whiten=3', '--dtype=float32']
    windows = data.open_sources(f'{sensors}/a,{sensors}/b', NARROW, 16)[1]
    assert {data.pick_source(windows, step, 0) for step in range(5)} == {0, 1}  # both are seen
    run(script, *flags, '--max_steps=5', f'--out_dir={tmp_path}/whole')
    for steps in (2, 5):
        run(script, *flags, f'--max_steps={steps}', f'--out_dir={tmp_path}/parts')
    whole, parts = (load_checkpoint(tmp_path / name / 'last.pt')['model'] for name in ('whole', 'parts'))
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and losses(tmp_path / 'whole') == losses(tmp_path / 'parts')
    run(script, *flags, '--max_steps=3', f'--out_dir={tmp_path}/two', processes=2)
    np.testing.assert_allclose(losses(tmp_path / 'two'), losses(tmp_path / 'whole')[:3], atol=2e-6)


def test_an_encoder_is_judged_on_the_bands_it_was_trained_on(sensors, tmp_path):
    run('pretrain_mae.py', *FLAGS['pretrain_mae.py'], f'--data={sensors}/a', f'--bands={NARROW}', '--max_steps=1', f'--out_dir={tmp_path}/mae')
    encoder = f'--encoder={tmp_path}/mae/last.pt'
    done = run('segment.py', *JUDGE, encoder, f'--data={sensors}/b', f'--out_dir={tmp_path}/judged', f'--results={tmp_path}/r.csv')
    assert 'its 12 bands are resampled to the 5 of the encoder' in done.stdout
    checkpoint = load_checkpoint(tmp_path / 'judged' / 'best.pt')
    assert checkpoint['meta']['num_bands'] == 5 and checkpoint['config']['bands'] == NARROW
    done = run('segment.py', f'--out_dir={tmp_path}/judged', f'--predict={sensors}/a.npz', f'--out={tmp_path}/map.tif')
    assert '40 bands are resampled to the 5' in done.stdout and os.path.exists(tmp_path / 'map.tif')
    run('segment.py', f'--compare={tmp_path}/judged', f'--out_dir={tmp_path}/compared')
    run('viz_attention.py', f'--encoders={tmp_path}/mae/last.pt', f'--data={sensors}/b', '--tiles=0', f'--out_dir={tmp_path}/attention')
    done = run('segment.py', *JUDGE, encoder, f'--data={sensors}/c', f'--out_dir={tmp_path}/no', check=False)
    assert done.returncode == 1 and 'trained on 5 bands, the data has 12' in done.stderr and 'Traceback' not in done.stderr


def test_principal_components_are_the_channels_and_come_back_to_bands(sensors, tmp_path):
    done = run('pretrain_mae.py', *FLAGS['pretrain_mae.py'], f'--data={sensors}/a', '--pca=3', '--max_steps=2', f'--out_dir={tmp_path}/pca')
    kept = json.load(open(tmp_path / 'pca' / 'pca.json'))
    meta = Tiles(str(sensors / 'a'), 'tr').meta
    variance = np.linalg.eigvalsh(np.array(meta['covariance']))[::-1]
    np.testing.assert_allclose(kept['explained_variance'], variance[:3] / variance.sum(), rtol=1e-6)
    assert f'{kept["explained_variance"][0]:.2%}' in done.stdout and os.path.exists(tmp_path / 'pca' / 'reconstruction.png')
    encoder = load_encoder(tmp_path / 'pca' / 'last.pt')
    assert encoder.in_chans == 3 and np.allclose(encoder.config['components'], kept['components'])
    mean, matrix = standardization(meta, 16, kept['components'])
    raw = torch.from_numpy(np.array(Tiles(str(sensors / 'a'), 'tr').images))
    valid = valid_pixels(raw, meta['nodata'])
    z = standardize(raw, mean, matrix, meta['nodata']).movedim(1, 0)[:, valid]
    np.testing.assert_allclose(torch.cov(z), np.eye(3), atol=0.02)
    x = raw.float().movedim(1, 0)[:, valid] - mean[:, None]
    lost = (torch.linalg.pinv(matrix) @ z - x).square().sum() / x.square().sum()  # what the picture shows lacks the other components only
    assert float(lost) == pytest.approx(1 - sum(kept['explained_variance']), rel=0.05)
    for name in 'ab':  # b is brought to the bands of a first, then projected on the components of a
        args = ['segment.py', *JUDGE, f'--encoder={tmp_path}/pca/last.pt', f'--data={sensors}/{name}']
        run(*args, f'--out_dir={tmp_path}/judged_{name}', f'--results={tmp_path}/r.csv')
    run('segment.py', f'--out_dir={tmp_path}/judged_a', f'--predict={sensors}/a.npz', f'--out={tmp_path}/map.tif')
    run('viz_attention.py', f'--encoders={tmp_path}/pca/last.pt', f'--data={sensors}/a', '--tiles=0', f'--out_dir={tmp_path}/attention')
    done = run('pretrain_mae.py', *FLAGS['pretrain_mae.py'], f'--data={sensors}/a', '--pca=41', f'--out_dir={tmp_path}/no', check=False)
    assert done.returncode == 1 and '--pca=41: choose from 1 to 40' in done.stderr


# ============ other bands by wavelength alone ============

@pytest.mark.parametrize('nm', [np.arange(460, 946, 7.0), np.arange(470, 940, 18.0), np.array(OHS_NM[::-1], float)])
def test_a_spatial_spectral_encoder_takes_other_bands_by_their_wavelengths(nm):
    torch.manual_seed(0)
    encoder = SpatialSpectralViT(16, 4, 32, 64, 3, 4, wavelengths_nm=list(OHS_NM), num_register_tokens=2).eval()
    for parameter in encoder.fuse.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ramp = torch.linspace(0.5, 1.5, 16)

    def images(nm):  # three smooth spectra, brighter to the right: (3, C, 16, 16)
        return torch.stack([torch.sin((torch.tensor(nm) - 400) / 150 + k)[:, None, None] * ramp.expand(16, 16) for k in range(3)]).float()
    other = encoder.at_wavelengths(nm.tolist())
    with torch.no_grad():
        expected, got = encoder(images(np.array(OHS_NM, float)))[0], other(images(nm))[0]
        same = encoder.at_wavelengths(list(OHS_NM))(images(np.array(OHS_NM, float)))
    error, spread = (got - expected).norm() / expected.norm(), (expected[0] - expected[2]).norm() / expected.norm()
    assert error < 0.05 < 0.3 < spread
    assert all(torch.equal(a, b) for a, b in zip(same, encoder(images(np.array(OHS_NM, float)))))
    assert other.num_groups == -(-len(nm) // 2) and encoder.in_chans == 32  # the encoder itself stays


def test_bands_by_wavelength_alone_are_judged_or_refused_in_a_sentence(sensors, tmp_path):
    flags = FLAGS['pretrain_dino_hsi.py']
    run('pretrain_dino_hsi.py', *flags, f'--data={sensors}/b', '--max_steps=1', f'--out_dir={tmp_path}/hsi')
    args = ['segment.py', *JUDGE, f'--data={sensors}/a', '--by_wavelength', f'--results={tmp_path}/r.csv']
    run(*args, f'--encoder={tmp_path}/hsi/last.pt', f'--out_dir={tmp_path}/judged')
    checkpoint = load_checkpoint(tmp_path / 'judged' / 'best.pt')
    assert checkpoint['encoder_args']['in_chans'] == 40 == checkpoint['meta']['num_bands']
    run('segment.py', f'--out_dir={tmp_path}/judged', f'--predict={sensors}/a.npz', f'--out={tmp_path}/map.tif')
    with pytest.raises(UserError, match='only for channel fusion'):
        SpatialSpectralViT(16, 4, 12, 24, 1, 2, fusion='token', wavelengths_nm=list(range(500, 620, 10))).at_wavelengths([500.0, 510])
    with pytest.raises(UserError, match='known wavelengths'):
        SpatialSpectralViT(16, 4, 12, 24, 1, 2).at_wavelengths([500.0, 510])
