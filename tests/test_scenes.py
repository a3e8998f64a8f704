"""Files as sensors, programs and people write them -> the right values, and what was made of them is said."""
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch

import scenes
from conftest import make_scene
from scenes import (Lazy, Scene, UserError, band_matrix, settle_values, choose_bands, mix_bands, normalized, place, read_scene, resample_bands,
                    survey, to_nm, valid_pixels, when_read)

C, H, W = 8, 20, 24
NM = np.linspace(450, 900, C)
RNG = np.random.default_rng(0)
LABELS = (np.add.outer(np.arange(H) // 5, np.arange(W) // 6) % 4 + 1).astype(np.uint8)
LABELS[:2] = 0
CUBE = RNG.integers(500, 3000, (C, H, W)).astype(np.uint16)
REFLECTANCE = (CUBE / 1e4).astype(np.float32)
LEFT = np.zeros((H, W), bool)
LEFT[:, :3] = True  # 12.5 % of the pixels, missing in several files
UTM = [(33550, 'd', 3, (30.0, 30.0, 0.0), True), (33922, 'd', 6, (0.0, 0.0, 0.0, 350000.0, 5800000.0, 0.0), True),
       (34735, 'H', 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True)]


def keys_of(*keys):
    return 34735, 'H', 4 + 4 * len(keys), (1, 1, 0, len(keys), *(number for key, value in keys for number in (key, 0, 1, value))), True


def tag(code, text):
    return code, 's', 0, text, True


def write_tiff(path, array, *tags, **options):
    """(C, H, W) or (H, W), as GDAL writes it: the TIFF states which axis the bands are"""
    options = {'planarconfig': 'separate'} | options if array.ndim == 3 else options
    if options.get('planarconfig') == 'contig':
        array = np.moveaxis(array, 0, 2)
    tifffile.imwrite(path, array, photometric=options.pop('photometric', 'minisblack'), extratags=tags, metadata=None, **options)
    return str(path)


def gdal(items):
    """Tag 42112; items: (attributes, text)"""
    return tag(42112, '<GDALMetadata>' + ''.join(f'<Item {attributes}>{text}</Item>' for attributes, text in items) + '</GDALMetadata>')


def gdal_bands(name, values, attributes=''):
    return [(f'name="{name}" sample="{band}" {attributes}', value) for band, value in enumerate(values)]


def said(scene, words):
    assert any(words in note for note in scene.notes), (words, scene.notes)


def refused(words, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        read_scene(*map(str, args), **kwargs)
    text = str(caught.value)
    assert words in text and '\n' not in text, text
    return text


def missing_of(scene):
    return ~valid_pixels(np.asarray(scene.cube), scene.nodata)


def hidden(array, value, where=LEFT):
    array = array.copy()
    array[:, where] = value
    return array


# ============ missing pixels ============

@pytest.mark.parametrize('library', [np.array, torch.tensor])
@pytest.mark.parametrize('dtype, nodata, pixel, missing', [
    (np.int16, -9999, [5, -9999, 5], True), (np.int16, 0, [0, 3, 4], True), (np.uint8, 0, [0, 3, 4], False), (np.uint8, 0, [0, 0, 0], True),
    (np.uint8, 255, [255, 3, 4], True), (np.float32, None, [1, np.nan, 1], True), (np.float32, None, [1, np.inf, 1], True),
    (np.float32, 0, [0, 1, 1], True), (np.float32, -1, [2, 1, 1], False), (np.int16, None, [0, 0, 0], False)])
def test_a_pixel_is_missing_if_any_band_is(library, dtype, nodata, pixel, missing):
    x = library(np.array(pixel, dtype).reshape(3, 1, 1))
    assert bool(valid_pixels(x, nodata)[0, 0]) is not missing


@pytest.mark.parametrize('mmap', [False, True])
def test_labels_on_missing_pixels_become_0(tmp_path, mmap):
    footprint = np.add.outer(np.arange(H), np.arange(W)) < 15
    image = write_tiff(tmp_path / 'a.tif', hidden(CUBE.astype(np.int16), -9999, footprint), tag(42113, '-9999'))
    scene = read_scene(image, write_tiff(tmp_path / 'l.tif', LABELS), mmap=mmap)
    np.testing.assert_array_equal(scene.labels, np.where(footprint, 0, LABELS))
    lost = np.count_nonzero(LABELS[footprint])
    said(scene, f'{lost} labels lay on missing pixels: they are 0 now')
    said(scene, f'{footprint.mean():.1%} of the pixels are missing')
    np.testing.assert_array_equal(missing_of(scene), footprint)


def test_nodata_in_some_bands_makes_the_pixel_missing_and_is_said(tmp_path):
    some = hidden(CUBE.astype(np.int16), -9999)
    some[3, 5:15, 10:20] = -9999
    scene = read_scene(write_tiff(tmp_path / 'a.tif', some, tag(42113, '-9999')))
    expected = LEFT.copy()
    expected[5:15, 10:20] = True
    np.testing.assert_array_equal(missing_of(scene), expected)
    said(scene, f'{100 / H / W:.1%} of the pixels are missing in some bands only, most in band 4')
    assert scene.nodata == -9999 and scene.bands is None


def test_bands_without_a_value_are_left_out_and_numbers_and_wavelengths_stay_right(tmp_path):
    for name, array, nodata in (('nan', hidden(REFLECTANCE, np.nan), np.nan), ('number', hidden(CUBE.astype(np.int16), -9999), -9999)):
        array[[2, 3, 6]] = nodata
        path = make_scene(tmp_path / f'{name}.npz', cube=np.moveaxis(array, 0, 2), labels=LABELS, wavelengths_nm=NM, nodata=nodata, fwhm_nm=NM / 100)
        scene = read_scene(path)
        assert scene.bands == [0, 1, 4, 5, 7]
        np.testing.assert_allclose(scene.wavelengths_nm, NM[scene.bands])
        np.testing.assert_allclose(scene.fwhm_nm, NM[scene.bands] / 100)
        np.testing.assert_array_equal(scene.cube, array[scene.bands])
        np.testing.assert_array_equal(missing_of(scene), LEFT)
        said(scene, 'bands 3-4, 7 (579 to 836 nm) left out: without one value')
        assert not any('some bands only' in note for note in scene.notes)
    everywhere = read_scene(make_scene(tmp_path / 'none.npz', cube=np.full((H, W, C), np.nan, np.float32), labels=LABELS, wavelengths_nm=None))
    assert everywhere.cube.shape == (C, H, W) and not everywhere.labels.any()
    said(everywhere, '100.0% of the pixels are missing')


@pytest.mark.parametrize('text, stored', [
    ('nan', np.nan), ('NaN', np.nan), ('-nan', np.nan), ('-1.#QNAN', np.nan), ('1.#QNAN', np.nan), ('-1.#IND', np.nan), ('1.#QNAN00', np.nan),
    ('inf', np.inf), ('-3.4028234663852886e+38', -3.4028234663852886e+38), ('-3.40282e+38', np.float32(-3.40282e+38)),
    ('-9999', -9999), ('-9999,0', -9999), (' 1e20 ', 1e20)])
def test_nodata_as_programs_write_it(tmp_path, text, stored):
    scene = read_scene(write_tiff(tmp_path / 'a.tif', hidden(REFLECTANCE, stored), tag(42113, text)))
    np.testing.assert_array_equal(missing_of(scene), LEFT)
    assert scene.nodata is None or np.isfinite(scene.nodata)
    assert not any('is stated where a number belongs' in note for note in scene.notes)
    np.testing.assert_array_equal(np.asarray(scene.cube)[:, ~LEFT], REFLECTANCE[:, ~LEFT])


@pytest.mark.parametrize('text', ['nan', 'inf', '-1.#QNAN'])
def test_integers_with_a_nodata_that_is_no_number_are_all_valid(tmp_path, text):
    scene = read_scene(write_tiff(tmp_path / 'a.tif', CUBE, tag(42113, text)))
    assert scene.nodata is None and not missing_of(scene).any()
    np.testing.assert_array_equal(scene.cube, CUBE)


def test_nodata_that_no_pixel_can_have_and_words_for_it_are_said(tmp_path):
    path = write_tiff(tmp_path / 'a.tif', CUBE, tag(42113, '-9999'))
    scene = read_scene(path)
    assert scene.nodata is None
    said(scene, 'nodata -9999 is stated, which no uint16 pixel can have')
    scene = read_scene(write_tiff(tmp_path / 'b.tif', CUBE, tag(42113, 'none')))
    assert scene.nodata is None
    said(scene, '"none" is stated where a number belongs')


def test_nodata_of_the_command_line_wins(tmp_path):
    path = write_tiff(tmp_path / 'a.tif', hidden(CUBE, 7), tag(42113, '9'))
    assert missing_of(read_scene(path)).sum() == 0
    np.testing.assert_array_equal(missing_of(read_scene(path, nodata=7.0)), LEFT)


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('kind', [1, 2, 0, 'gdal'])
def test_an_alpha_band_is_a_mask(tmp_path, kind, planar, mmap):
    cube = np.concatenate([CUBE, np.where(LEFT, 0, 65535)[None].astype(np.uint16)])
    tags = [gdal([*gdal_bands('wavelength', NM), ('name="COLORINTERP" sample="8" role="colorinterp"', 'Alpha')])] if kind == 'gdal' else []
    extra = [0] * (C - 1) + [kind if kind in (1, 2) else 0]
    scene = read_scene(write_tiff(tmp_path / 'a.tif', cube, *tags, planarconfig=planar, extrasamples=extra), mmap=mmap)
    assert scene.cube.shape == (C, H, W) and scene.cube.dtype == np.float32 and scene.nodata is None
    np.testing.assert_array_equal(missing_of(scene), LEFT)
    np.testing.assert_array_equal(np.asarray(scene.cube)[:, ~LEFT], CUBE[:, ~LEFT])
    said(scene, 'band 9 is an alpha band')
    if kind == 'gdal':
        np.testing.assert_allclose(scene.wavelengths_nm, NM)


def test_masked_pixels_get_the_nodata_value_where_the_file_has_one(tmp_path):
    cube = np.concatenate([hidden(CUBE, 9, LEFT[:, ::-1]), np.where(LEFT, 0, 65535)[None].astype(np.uint16)])
    scene = read_scene(write_tiff(tmp_path / 'a.tif', cube, tag(42113, '9'), extrasamples=[0] * (C - 1) + [2]))
    assert scene.cube.dtype == np.uint16 and scene.nodata == 9
    np.testing.assert_array_equal(missing_of(scene), LEFT | LEFT[:, ::-1])
    assert (scene.cube[:, LEFT] == 9).all()


def test_a_fourth_band_that_programs_mark_as_alpha_may_be_an_image(tmp_path):
    rgbn = RNG.integers(0, 255, (H, W, 4)).astype(np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', rgbn)  # this makes it RGBA
    assert tifffile.TiffFile(tmp_path / 'a.tif').pages[0].extrasamples
    scene = read_scene(str(tmp_path / 'a.tif'))
    np.testing.assert_array_equal(scene.cube, np.moveaxis(rgbn, 2, 0))
    said(scene, 'band 4 is marked as alpha but has the values of an image')


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('where', ['page', '1-bit page', 'msk', 'msk of each band'])
def test_masks_inside_and_beside_the_file(tmp_path, where, mmap):
    mask = np.where(LEFT, 0, 255).astype(np.uint8)
    path = str(tmp_path / 'a.tif')
    with tifffile.TiffWriter(path) as file:
        file.write(CUBE, photometric='minisblack', planarconfig='separate', metadata=None)
        if 'page' in where:
            file.write(mask > 0 if '1-bit' in where else mask, subfiletype=2, photometric='minisblack', metadata=None)
            file.write(np.zeros((H // 2, W // 2), np.uint8), subfiletype=1, photometric='minisblack', metadata=None)
    if 'page' in where:
        with tifffile.TiffFile(path, mode='r+b') as tif:
            tif.pages[1].tags['NewSubfileType'].overwrite(4)
            tif.pages[2].tags['NewSubfileType'].overwrite(5)  # the mask of an overview
    if 'msk' in where:
        planes = np.full((C, H, W), 255, np.uint8)
        planes[4] = mask
        write_tiff(path + '.msk', planes if 'each' in where else mask)
    scene = read_scene(path, mmap=mmap)
    assert scene.cube.shape == (C, H, W)
    np.testing.assert_array_equal(missing_of(scene), LEFT)
    np.testing.assert_array_equal(np.asarray(scene.cube)[:, ~LEFT], CUBE[:, ~LEFT])
    said(scene, 'mask')


def test_nodata_beside_the_file_wins_and_may_differ_from_band_to_band(tmp_path):
    array = CUBE.astype(np.int16)
    array[0, LEFT] = -5
    array[3, 4:6] = -1
    array[0, 8:] = np.where(LEFT[8:], -5, -1)  # which is a value there
    lost = LEFT.copy()
    lost[4:6] = True
    path = write_tiff(tmp_path / 'a.tif', array, tag(42113, '-9999'))
    bands = ''.join(f'<PAMRasterBand band="{band + 1}"><NoDataValue>{-1 if band else -5}</NoDataValue></PAMRasterBand>' for band in range(C))
    open(path + '.aux.xml', 'w').write(f'<PAMDataset>{bands}</PAMDataset>')
    scene = read_scene(path)
    np.testing.assert_array_equal(missing_of(scene), lost)
    np.testing.assert_array_equal(scene.cube[:, ~lost], array[:, ~lost])
    open(path + '.aux.xml', 'w').write('<PAMDataset><PAMRasterBand band="1"><NoDataValue>')
    refused('a.tif.aux.xml: cannot be read', path)


@pytest.mark.parametrize('value, array', [(1e20, REFLECTANCE), (-9999, CUBE.astype(np.int16)), (65535, CUBE), (-3.4e38, REFLECTANCE)])
def test_a_filler_that_is_not_declared_is_named(tmp_path, value, array):
    path = make_scene(tmp_path / 'a.npz', cube=np.moveaxis(hidden(array, value), 0, 2), labels=LABELS, wavelengths_nm=None)
    said(read_scene(path), f'bands 1-8: values far outside the rest ({value:g}): a filler? pass --nodata={value:g}')
    scene = read_scene(path, nodata=value)
    np.testing.assert_array_equal(missing_of(scene), LEFT)
    assert not any('filler' in note for note in scene.notes)


@pytest.mark.parametrize('value, dtype', [(np.finfo(np.float32).min, np.float32), (2 ** 31 - 1, np.int32), (-1.23456789e34, np.float64)])
def test_the_nodata_value_that_is_advised_is_the_fillers(tmp_path, value, dtype):
    path = saved(tmp_path / 'a.npy', np.moveaxis(hidden(CUBE.astype(dtype), value), 0, 2))
    advised = next(note for note in read_scene(path).notes if 'filler' in note).split('--nodata=')[1]
    np.testing.assert_array_equal(missing_of(read_scene(path, nodata=float(advised))), LEFT)


def test_ordinary_values_are_no_fillers(tmp_path):
    bright = CUBE.copy()
    bright[:, 4, 4] = 20000  # one glint
    counts = RNG.poisson(3, (C, H, W)).astype(np.uint8)
    skewed = np.exp(RNG.normal(0, 1, (C, H, W))).astype(np.float32)
    zeros = hidden(CUBE, 0)  # dark, or nodata: nobody knows
    for array in (CUBE, bright, counts, skewed, zeros, np.ones_like(CUBE)):
        found = survey(array, None)
        assert not found.fillers, found.fillers


DENSE = RNG.integers(0, 1001, 30_000).astype(float)  # a band with every value from 0 to 1000


@pytest.mark.parametrize('band, value, times, is_filler', [
    (DENSE, 2500, 30, True), (DENSE, 1900, 30, False),  # farther off than the others from each other, or nearer
    (DENSE, 2500, 4, True), (DENSE, 2500, 2, False),  # how often it comes
    (DENSE, -100, 30, True), (DENSE, -30, 30, False), (DENSE, -100, 1, False),  # the only one below 0, or noise about it
    (DENSE - 500, -700, 30, False),  # others are below 0 too
    (DENSE, 2e6, 1, True), (DENSE, 9e5, 1, False),  # once only: a thousand times as far
    (np.append(np.full(500, 5.0), 4), 6, 1, False),  # all but equal
    (np.append(np.full(500, 1000.0), np.arange(5000.0, 5010)), 9000, 500, False)])  # too few others to judge by
def test_a_filler_lies_apart_comes_again_or_is_the_only_one_below_zero(band, value, times, is_filler):
    values = np.append(band, np.full(times, float(value)))
    sample = np.stack([values, np.append(DENSE[:1] + 1, np.resize(DENSE, len(values) - 1))])  # an ordinary band beside it
    found = scenes.find_fillers(sample, sample.min(1), sample.max(1))
    assert found == ({float(value): [0]} if is_filler else {})


def test_a_single_filler_is_found_that_no_sample_has(monkeypatch):
    monkeypatch.setattr(scenes, 'SAMPLE_PIXELS', 60)
    array = REFLECTANCE.copy()
    array[4, 1, 1] = 1e20
    assert survey(array, None).fillers == {float(np.float32(1e20)): [4]}


def test_one_pass_in_strips_finds_what_the_whole_array_shows(monkeypatch):
    array = hidden(REFLECTANCE, -1)
    array[2] = -1
    array[5, 7:9] = np.nan
    whole = survey(array, -1)
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 3 * C * W * 4)
    pieces = survey(Lazy(array.shape, array.dtype, lambda rows, cols: array[:, rows, cols]), -1)
    np.testing.assert_array_equal(whole.missing, pieces.missing)
    assert whole.empty == pieces.empty == [2] and whole.partly_missing == pieces.partly_missing == pytest.approx(2 * (W - 3) / H / W)
    np.testing.assert_allclose(whole.lacking, pieces.lacking)
    assert whole.lacking[0] == 0.125 and whole.missing.sum() == H * 3 + 2 * (W - 3)


# ============ bands ============

def scene_of(array, **fields):
    return Scene(array, None, list(NM), None, None)._replace(**fields)


def test_bands_marked_as_bad_are_left_out_unless_they_are_asked_for():
    bad = REFLECTANCE.copy()
    bad[2] = 1e6
    good = [0, 1, 3, 4, 5, 6, 7]
    scene, _ = choose_bands(scene_of(bad, bands=good), 'x')
    assert scene.bands == good and scene.wavelengths_nm == list(NM[good])
    np.testing.assert_array_equal(scene.cube, bad[good])
    said(scene, 'band 3 (579 nm) left out: marked as bad')
    bad[4] = np.nan
    scene, _ = choose_bands(scene_of(bad, bands=good), 'x', keep_bad_bands=True)
    assert scene.bands == [0, 1, 2, 3, 5, 6, 7]
    said(scene, 'band 3 (579 nm) marked as bad, kept as asked')
    said(scene, 'band 5 (707 nm) left out: without one value')


@pytest.mark.parametrize('text, kept', [('1,3-5', [1, 5, 6, 7]), ('8', [0, 1, 2, 3, 4, 5, 6]), ('570-710nm', [0, 1, 5, 6, 7]), ('450nm, 2', [2, 3, 4, 5, 6, 7])])
def test_bands_to_drop_are_named_by_number_or_wavelength(tmp_path, text, kept):
    path = make_scene(tmp_path / 'a.npz', cube=np.moveaxis(CUBE, 0, 2), labels=LABELS, wavelengths_nm=NM)
    for mmap in (False, True):
        scene = read_scene(path, drop_bands=text, mmap=mmap)
        assert scene.bands == kept and isinstance(scene.cube, Lazy) == mmap
        np.testing.assert_array_equal(scene.cube, CUBE[kept])
        said(scene, 'dropped as asked')
    for wrong in ('0', '9', '3-', 'x', '5-3', '1.5', '1-8'):
        if wrong != '3-':
            refused('drop' if wrong == '1-8' else f'--drop_bands={wrong}', path, drop_bands=wrong)


def test_resampling_takes_no_band_without_data_and_refuses_a_hole(tmp_path):
    fine = np.arange(400, 1000, 5.0)
    flat = np.full((len(fine), 6, 7), 0.3, np.float32)
    for low, high, wanted, words in ((755, 770, [740, 760, 780], ''), (700, 850, [690, 775], 'none near 775 nm')):
        array = flat.copy()
        array[(fine > low) & (fine < high)] = -9999
        scene = read_scene(make_scene(tmp_path / 'a.npz', cube=np.moveaxis(array, 0, 2), labels=None, wavelengths_nm=fine, nodata=-9999))
        if words:
            with pytest.raises(UserError, match=words):
                band_matrix(scene.wavelengths_nm, wanted)
        else:
            mixed = mix_bands(scene, band_matrix(scene.wavelengths_nm, wanted), wanted)
            np.testing.assert_allclose(mixed.cube, 0.3, rtol=1e-5)


@pytest.mark.parametrize('unit, values', [
    ('Nanometers', NM), ('nm', NM), ('', NM), (None, NM / 1000), ('Micrometers', NM / 1000), ('um', NM / 1000), ('\u00b5m', NM / 1000), ('\u03bcm', NM / 1000),
    ('microns', NM / 1000), ('Angstroms', NM * 10), ('\u00c5', NM * 10), ('Wavenumber', 1e7 / NM), ('cm-1', 1e7 / NM), ('nanometre', NM)])
def test_wavelengths_of_every_unit_become_nm(unit, values):
    nm, sentence = to_nm([f'{value:.12g}' for value in values], unit)
    np.testing.assert_allclose(nm, NM, rtol=1e-6)
    assert '450 to 900 nm' in sentence


@pytest.mark.parametrize('unit, values', [('Index', range(1, 9)), ('Unknown', NM), ('furlong', NM), ('nm', ['red', 'green'])])
def test_wavelengths_in_no_known_unit_are_not_used_and_that_is_said(unit, values):
    nm, sentence = to_nm(values, unit)
    assert nm is None and 'not used' in sentence


@pytest.mark.parametrize('items', [gdal_bands('bbl', [1, 1, 0, 1, 1, 1, 1, 1]), [('name="bbl" domain="ENVI"', '{1, 1, 0, 1, 1, 1, 1, 1}')]])
def test_bad_bands_marked_in_a_geotiff_are_left_out(tmp_path, items):
    scene = read_scene(write_tiff(tmp_path / 'a.tif', CUBE, gdal(items)))
    said(scene, 'band 3 left out: marked as bad')
    np.testing.assert_array_equal(scene.cube, np.delete(CUBE, 2, 0))


UM = [f'{nm / 1000:.6f}' for nm in NM]


@pytest.mark.parametrize('items, beside', [
    (gdal_bands('wavelength', NM) + gdal_bands('wavelength_units', ['Nanometers'] * C), False),
    (gdal_bands('WAVELENGTH', UM) + gdal_bands('WAVELENGTH_UNITS', ['Micrometers'] * C), False),
    (gdal_bands('CENTRAL_WAVELENGTH_UM', UM, 'domain="IMAGERY"') + gdal_bands('FWHM_UM', ['0.01'] * C, 'domain="IMAGERY"'), False),
    (gdal_bands('DESCRIPTION', [f'band {band} ({nm:.2f} Nanometers)' for band, nm in enumerate(NM)], 'role="description"'), False),
    (gdal_bands('DESCRIPTION', [f'{um} um' for um in UM], 'role="description"'), False),
    ([('name="wavelength"', '{' + ', '.join(map(str, NM)) + '}'), ('name="wavelength_units"', 'Nanometers')], False),
    ([], '<PAMRasterBand band="{}"><Metadata domain="IMAGERY"><MDI key="CENTRAL_WAVELENGTH_UM">{}</MDI></Metadata></PAMRasterBand>')])
def test_wavelengths_in_a_geotiff(tmp_path, items, beside):
    path = write_tiff(tmp_path / 'a.tif', CUBE, *([gdal(items)] if items else []))
    if beside:
        text = ''.join(beside.format(band + 1, um) for band, um in enumerate(UM))
        open(path + '.aux.xml', 'w', encoding='utf-8').write(f'<PAMDataset>{text}</PAMDataset>')
    scene = read_scene(path)
    np.testing.assert_allclose(scene.wavelengths_nm, NM, atol=5e-3)
    said(scene, 'wavelengths 450 to 900 nm')
    assert 'FWHM' not in str(items) or scene.fwhm_nm == pytest.approx([10] * C)
    resample_bands(np.asarray(scene.cube), scene.wavelengths_nm, [560, 660])


def test_names_with_numbers_are_no_wavelengths(tmp_path):
    for names in ([f'B{b}' for b in range(C)], [f'scan {b} of 20231105' for b in range(C)], ['550 nm'] + ['ndvi'] * (C - 1)):
        scene = read_scene(write_tiff(tmp_path / 'a.tif', CUBE, gdal(gdal_bands('DESCRIPTION', names, 'role="description"'))))
        assert scene.wavelengths_nm is None
        said(scene, 'no wavelengths are stated')


def test_a_scale_is_told_but_not_applied(tmp_path):
    def scaled(factors):
        items = gdal_bands('SCALE', factors, 'role="scale"') + gdal_bands('OFFSET', [0.5] * C, 'role="offset"')
        return read_scene(write_tiff(tmp_path / 'a.tif', CUBE, gdal(items)))
    scene = scaled([0.0001] * C)
    assert scene.scale == (0.0001, 0.5)
    np.testing.assert_array_equal(scene.cube, CUBE)
    said(scene, '0.0001 * value + 0.5')
    scene = scaled([0.0001] * 4 + [0.0002] * 4)
    assert scene.scale is None
    np.testing.assert_allclose(scene.cube, CUBE * np.repeat([0.0001, 0.0002], 4)[:, None, None] + 0.5, rtol=1e-6)
    said(scene, 'differ from band to band')


# ============ labels ============

@pytest.fixture
def image(tmp_path):
    return write_tiff(tmp_path / 'image.tif', CUBE, *UTM)


def saved(path, array):
    np.save(path, array)
    return str(path)


def test_labels_of_many_forms_are_class_numbers(image, tmp_path):
    none = np.where(LABELS == 0, np.nan, LABELS)
    forms = [('float', none.astype(np.float32)), ('double', none), ('1hw', LABELS[None]), ('hw1', LABELS[..., None]), ('wide', LABELS.astype(np.uint16)),
             ('long', LABELS.astype(np.int64)), ('big', LABELS.astype('>i4')), ('fortran', np.asfortranarray(LABELS))]
    paths = [saved(tmp_path / f'{name}.npy', array) for name, array in forms]
    paths += [write_tiff(tmp_path / 'nan.tif', none.astype(np.float32), tag(42113, 'nan')), write_tiff(tmp_path / 'dtype.tif', LABELS.astype(np.int32)),
              write_tiff(tmp_path / 'nodata.tif', np.where(LABELS == 0, 255, LABELS).astype(np.uint8), tag(42113, '255')),
              write_tiff(tmp_path / 'alpha.tif', np.stack([np.where(LABELS == 0, 7, LABELS), np.where(LABELS == 0, 0, 255)]).astype(np.uint8), extrasamples=[2])]
    np.savez(tmp_path / 'named.npz', gt=LABELS, other=LABELS)
    for path in [*paths, f'{tmp_path}/named.npz:gt']:
        scene = read_scene(image, path)
        assert scene.labels.dtype == np.uint8, path
        np.testing.assert_array_equal(scene.labels, LABELS, err_msg=path)
        said(scene, 'labels: pixels of 4 classes (1: ')


def test_labels_as_a_grey_or_paletted_png_keep_their_numbers(image, tmp_path):
    Image = pytest.importorskip('PIL.Image')
    palette = Image.new('P', (W, H))
    palette.putdata(LABELS.ravel().tolist())
    palette.putpalette([0, 0, 0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1])
    pictures = {'grey': Image.fromarray(LABELS), 'wide': Image.fromarray(LABELS.astype(np.uint16)), 'palette': palette}
    for name, picture in pictures.items():
        picture.save(tmp_path / f'{name}.png')
        scene = read_scene(image, f'{tmp_path}/{name}.png')
        np.testing.assert_array_equal(scene.labels, LABELS, err_msg=name)
    assert scene.class_colors == [[9, 8, 7], [6, 5, 4], [3, 2, 1], [1, 1, 1]]
    Image.fromarray(np.stack([LABELS] * 3, 2)).save(tmp_path / 'rgb.png')
    refused('rgb.png: a picture in colours', image, tmp_path / 'rgb.png')
    refused('type ".png"', tmp_path / 'grey.png')  # a picture is no scene
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'grey.png').read_bytes()[:60])
    refused('cut.png: cannot be read', image, tmp_path / 'cut.png')
    damaged = bytearray((tmp_path / 'wide.png').read_bytes())
    for at in range(41, len(damaged) - 12):  # the packed numbers and their checksum
        damaged[at] ^= 16
        (tmp_path / 'damaged.png').write_bytes(damaged)
        refused('damaged.png', image, tmp_path / 'damaged.png')
        damaged[at] ^= 16


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_labels_as_a_png_of_few_bits_keep_their_numbers(image, tmp_path, bits):
    """Which readers stretch to 0 to 255"""
    import struct
    import zlib
    numbers = LABELS % 2 ** bits
    places = np.arange(8 // bits)[::-1] * bits
    rows = (numbers.reshape(H, -1, 8 // bits) << places).sum(2).astype(np.uint8)
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', W, H, bits, 0, 0, 0, 0)), (b'IDAT', zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())), (b'IEND', b'')]
    (tmp_path / 'l.png').write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in chunks))
    np.testing.assert_array_equal(read_scene(image, f'{tmp_path}/l.png').labels, numbers)


ONE_HOT = (LABELS[None] == np.arange(1, 5)[:, None, None])


@pytest.mark.parametrize('layers, words', [
    (ONE_HOT.astype(np.uint8), 'one-hot'), (ONE_HOT.astype(np.float32), 'one-hot'), (ONE_HOT, 'one-hot'), (np.concatenate([LABELS[None] == 0, ONE_HOT]).astype(np.uint8), 'one-hot'),
    (RNG.integers(0, 9, (3, H, W)).astype(np.uint8) * 25, 'colours'), (CUBE, 'layers'), (np.stack([LABELS, LABELS]), 'layers')])
def test_layers_are_no_labels(image, tmp_path, layers, words):
    if layers.dtype != bool:
        text = refused(words, image, write_tiff(tmp_path / 'l.tif', layers))
        assert f'has {len(layers)} bands' in text
    refused(words, image, saved(tmp_path / 'l.npy', np.moveaxis(layers, 0, 2)))


@pytest.mark.parametrize('array, words', [
    (REFLECTANCE[0], 'heights are'), (CUBE[0], 'labels run from'), (LABELS.astype(int) - 2, 'labels run from -2'), (np.where(LABELS == 0, 255, LABELS), '255'),
    (LABELS + 1j, 'complex')])
def test_values_are_no_labels(image, tmp_path, array, words):
    assert 'l.npy' in refused(words, image, saved(tmp_path / 'l.npy', array))


def test_words_are_no_labels(image, tmp_path):
    words = np.array(['none', 'oak', 'pine', 'road', 'lake'])[LABELS]
    assert 'l.npy' in refused('are not class numbers', image, saved(tmp_path / 'l.npy', words))
    np.savez(tmp_path / 'l.npz', labels=words)
    refused('are not class numbers', image, tmp_path / 'l.npz')


def test_classes_from_0_beside_a_nodata_value_are_said(image, tmp_path):
    from_0 = np.where(LABELS == 0, -1, LABELS.astype(np.int16) - 1).astype(np.int16)
    said(read_scene(image, write_tiff(tmp_path / 'from_0.tif', from_0, tag(42113, '-1'))), 'if 0 is a class, number the classes from 1')
    from_1 = np.where(LABELS == 0, -1, LABELS.astype(np.int16))
    assert 'if 0 is a class' not in str(read_scene(image, write_tiff(tmp_path / 'from_1.tif', from_1, tag(42113, '-1'))).notes)
    assert 'if 0 is a class' not in str(read_scene(image, write_tiff(tmp_path / 'nodata_0.tif', LABELS, tag(42113, '0'))).notes)


def test_labels_of_another_place_are_refused_with_both_origins(image, tmp_path):
    shifted = [UTM[0], (33922, 'd', 6, (0.0, 0.0, 0.0, 353000.0, 5800000.0, 0.0), True), UTM[2]]
    text = refused('353000, 5800000', image, write_tiff(tmp_path / 'l.tif', LABELS, *shifted))
    assert '350000, 5800000' in text
    zone = [*UTM[:2], (34735, 'H', 16, UTM[2][3][:-1] + (32634,), True)]
    refused('UTM zone 34N', image, write_tiff(tmp_path / 'l.tif', LABELS, *zone))
    refused('EPSG:4326', image, write_tiff(tmp_path / 'l.tif', LABELS, *UTM[:2], keys_of((2048, 4326))))
    coarse = [(33550, 'd', 3, (60.0, 60.0, 0.0), True), *UTM[1:]]
    refused('pixels of 60 m', image, write_tiff(tmp_path / 'l.tif', LABELS, *coarse))


def test_the_same_place_in_other_words_is_accepted(image, tmp_path):
    matrix = (30.0, 0, 0, 350000, 0, -30.0, 0, 5800000, 0, 0, 0, 0, 0, 0, 0, 1.0)
    centre = [UTM[0], (33922, 'd', 6, (0.0, 0.0, 0.0, 350015.0, 5799985.0, 0.0), True), (34735, 'H', 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2, 3072, 0, 1, 32633), True)]
    other_tie = [UTM[0], (33922, 'd', 6, (10.0, 2.0, 0.0, 350300.0, 5799940.0, 0.0), True), UTM[2]]
    no_keys = UTM[:2]
    # the system that a projection rests on is named beside it, or instead of a number of its own
    both, own = [*UTM[:2], keys_of((2048, 4326), (3072, 32633))], [*UTM[:2], keys_of((2048, 4326), (3072, 32767))]
    for tags in ([(34264, 'd', 16, matrix, True), UTM[2]], both, own, centre, other_tie, no_keys, []):
        scene = read_scene(image, write_tiff(tmp_path / 'l.tif', LABELS, *tags))
        np.testing.assert_array_equal(scene.labels, LABELS)
    said(scene, 'place: UTM zone 33N, pixels of 30 m, upper left corner at 350000, 5800000')
    for tags in (centre, other_tie):
        said(read_scene(write_tiff(tmp_path / 'l.tif', LABELS, *tags)), 'upper left corner at 350000, 5800000')


@pytest.mark.parametrize('keys, words', [
    ([(1024, 1), (2048, 4269), (3072, 32767), (3076, 9003)], 'a system of its own, pixels of 30 US survey ft'),
    ([(1024, 1), (3072, 32661), (3076, 9001)], 'EPSG:32661, pixels of 30 m'), ([(1024, 1), (3072, 32760)], 'UTM zone 60S, pixels of 30 m')])
def test_a_system_that_is_no_utm_zone_is_not_called_one(keys, words, tmp_path):
    said(read_scene(write_tiff(tmp_path / 'a.tif', CUBE, *UTM[:2], keys_of(*keys))), f'place: {words}')


def test_names_of_classes_may_be_bytes(tmp_path):
    path = make_scene(tmp_path / 'a.npz', class_names=np.array([b'unlabelled', b'corn', b'soy', b'm\xc3\xbcll']))
    assert read_scene(path).class_names == ['corn', 'soy', 'm\u00fcll']


@pytest.mark.parametrize('form', ['B{0} ({1:.0f}-{2:.0f} nm)', '{1:.0f} - {2:.0f} nm'])
def test_the_end_of_a_range_is_no_wavelength(form, tmp_path):
    names = [form.format(band, nm - 10, nm + 10) for band, nm in enumerate(NM, 1)]
    assert read_scene(write_tiff(tmp_path / 'a.tif', CUBE, gdal(gdal_bands('DESCRIPTION', names, 'role="description"')))).wavelengths_nm is None


def test_a_rotated_place_is_kept(tmp_path):
    c, s = 30 * np.cos(np.radians(20)), 30 * np.sin(np.radians(20))
    matrix = (c, s, 0, 350000, s, -c, 0, 5800000, 0, 0, 0, 0, 0, 0, 0, 1.0)
    scene = read_scene(write_tiff(tmp_path / 'a.tif', CUBE, (34264, 'd', 16, matrix, True), UTM[2]))
    assert dict((code, value) for code, _, _, value in scene.geotags)[34264] == pytest.approx(matrix)
    said(scene, 'rotated by 20.0 degrees')
    np.testing.assert_allclose(place(scene.geotags)[0], [350000, c, s, 5800000, s, -c])


def test_labels_inside_a_file_are_compared_as_those_of_their_own_file(tmp_path):
    for labels in (np.pad(LABELS, ((8, 0), (8, 0))), LABELS.T, LABELS[:, :5]):
        path = make_scene(tmp_path / 'a.npz', cube=np.moveaxis(CUBE, 0, 2), labels=labels, wavelengths_nm=None)
        refused(f'labels of {labels.shape[0]} x {labels.shape[1]} pixels for an image of 20 x 24', path)
        if labels.shape != (20, 5):
            refused(f'labels of {labels.shape[0]} x {labels.shape[1]} pixels for an image of 20 x 24', write_tiff(tmp_path / 'b.tif', CUBE), saved(tmp_path / 'l.npy', labels))
    for labels in (LABELS[..., None], LABELS[None]):
        scene = read_scene(make_scene(tmp_path / 'a.npz', cube=np.moveaxis(CUBE, 0, 2), labels=labels, wavelengths_nm=None))
        np.testing.assert_array_equal(scene.labels, LABELS)


def test_names_and_colours_of_classes_are_kept(image, tmp_path):
    path = write_tiff(tmp_path / 'l.tif', LABELS)
    names = ['Unclassified', 'Asphalt', 'Meadows', 'Gravel', 'Trees', '']
    colors = [(0, 0, 0), (1, 2, 3), (4, 5, 6), (7, 8, 9), (9, 9, 9), (0, 0, 0)]
    text = ''.join(f'<Category>{name}</Category>' for name in names)
    table = ''.join(f'<Entry c1="{r}" c2="{g}" c3="{b}" c4="255"/>' for r, g, b in colors)
    open(path + '.aux.xml', 'w').write(f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{text}</CategoryNames><ColorTable>{table}</ColorTable></PAMRasterBand></PAMDataset>')
    scene = read_scene(image, path)
    assert scene.class_names == names[1:5] and [tuple(color) for color in scene.class_colors] == colors[1:5]
    said(scene, '1 Asphalt: ')
    open(path + '.aux.xml', 'w').write(f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{text.replace("Unclassified", "Water")}</CategoryNames></PAMRasterBand></PAMDataset>')
    said(read_scene(image, path), 'label 0 is named "Water" but means unlabelled')


def test_the_colours_of_a_palette_are_those_of_the_classes(image, tmp_path):
    palette = np.zeros((3, 256), np.uint16)
    palette[:, 1:5] = RNG.integers(0, 256, (3, 4)) * 257
    tifffile.imwrite(tmp_path / 'l.tif', LABELS, photometric='palette', colormap=palette)
    scene = read_scene(image, str(tmp_path / 'l.tif'))
    np.testing.assert_array_equal(scene.labels, LABELS)
    np.testing.assert_array_equal(scene.class_colors, palette[:, 1:5].T // 257)


def test_how_many_pixels_each_class_has_is_said(image, tmp_path):
    for mask in ((LABELS > 2).astype(np.uint8), LABELS > 2):
        scene = read_scene(image, saved(tmp_path / 'l.npy', mask))
        said(scene, f'labels: pixels of 1 class (1: {np.count_nonzero(mask):,}), {np.count_nonzero(~(LABELS > 2)):,} unlabelled')
    said(read_scene(image, saved(tmp_path / 'l.npy', LABELS * 0)), 'labels: all 0')


# ============ layouts ============

LAYOUTS = [dict(), dict(planarconfig='contig'), dict(tile=(16, 16)), dict(planarconfig='contig', tile=(16, 16), compression='zlib'), dict(rowsperstrip=3, compression='zlib'),
           dict(byteorder='>'), dict(byteorder='>', compression='zlib', predictor=2), dict(bigtiff=True, planarconfig='contig', rowsperstrip=7)]


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.float32, np.float64])
def test_a_tiff_on_disk_has_the_values_of_one_in_memory(tmp_path, layout, dtype, monkeypatch):
    if 'predictor' in layout and np.dtype(dtype).kind == 'f':
        pytest.importorskip('imagecodecs')
        layout = layout | {'predictor': 3}
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 2000)
    array = (CUBE % 251).astype(dtype)
    path = write_tiff(tmp_path / 'a.tif', array, **layout)
    memory, disk = read_scene(path), read_scene(path, mmap=True)
    assert isinstance(memory.cube, np.ndarray) and isinstance(disk.cube, Lazy)
    assert memory.cube.dtype == disk.cube.dtype == (np.float32 if dtype == np.float64 else dtype)
    np.testing.assert_array_equal(memory.cube, array)
    np.testing.assert_array_equal(disk.cube, array)
    np.testing.assert_array_equal(disk.cube[:, 3:17:4, 5:9], array[:, 3:17:4, 5:9])
    np.testing.assert_array_equal(disk.cube[2], array[2])
    np.testing.assert_array_equal(disk.cube[[5, 1], 4:6], array[[5, 1], 4:6])
    assert disk.cube.shape == (C, H, W) and len(disk.cube) == C and disk.cube.ndim == 3 and memory.notes == disk.notes


@pytest.mark.parametrize('mmap', [False, True])
def test_a_page_for_each_band(tmp_path, mmap):
    for number, options in enumerate((dict(contiguous=False), dict(metadata=None), dict(metadata=None, compression='zlib'))):
        path = str(tmp_path / f'{number}.tif')
        with tifffile.TiffWriter(path) as file:
            for band in CUBE:
                file.write(band, photometric='minisblack', **options)
            file.write(CUBE[0, ::2, ::2], subfiletype=1, photometric='minisblack', metadata=None)  # an overview is no band
        scene = read_scene(path, mmap=mmap)
        np.testing.assert_array_equal(scene.cube, CUBE)
        said(scene, 'a page for each band')
    with tifffile.TiffWriter(path) as file:
        for _ in range(2):
            file.write(np.moveaxis(CUBE, 0, 2), photometric='minisblack', planarconfig='contig', metadata=None)
    refused('holds 2 images', path)


@pytest.mark.parametrize('other', [LABELS, CUBE[0, ::2, ::2]])
def test_pages_of_another_size_or_type_are_refused(tmp_path, other):
    path = str(tmp_path / 'a.tif')
    with tifffile.TiffWriter(path) as file:
        for page in (*CUBE, other):
            file.write(page, photometric='minisblack', metadata=None)
    refused('holds 9 images, the first of 20 x 24', path)


def test_a_sparse_file_is_read(tmp_path):
    path = str(tmp_path / 'a.tif')
    tifffile.imwrite(path, np.zeros((1, 512, 512), np.uint8), tile=(64, 64), compression='zlib', photometric='minisblack')
    for scene_nodata, value in ((None, 0), ('7', 7)):
        tags = [tag(42113, scene_nodata)] if scene_nodata else []
        tifffile.imwrite(path, np.full((512, 512), 3, np.uint8), tile=(64, 64), compression='zlib', photometric='minisblack', extratags=tags)
        with tifffile.TiffFile(path, mode='r+b') as tif:
            page = tif.pages[0]
            for code in ('TileOffsets', 'TileByteCounts'):
                values = list(page.tags[code].value)
                values[1:] = [0] * (len(values) - 1)
                page.tags[code].overwrite(tuple(values))
        for mmap in (False, True):
            scene = read_scene(path, mmap=mmap)
            expected = np.full((512, 512), value)
            expected[:64, :64] = 3
            np.testing.assert_array_equal(np.asarray(scene.cube)[0], expected)


@pytest.mark.parametrize('shape, axes', [((20, 24, 5), 'hwc'), ((5, 20, 24), 'chw'), ((30, 30, 60), 'hwc'), ((60, 30, 30), 'chw'), ((50, 22, 20), 'hwc'),
                                         ((20, 24, 44), None), ((20, 24, 20), None), ((20, 20, 20), None), ((50, 20, 24), None), ((21, 50, 22), None)])
def test_axes_that_nothing_states_follow_from_the_sides_or_are_asked_for(tmp_path, shape, axes):
    array = np.arange(np.prod(shape)).reshape(shape).astype(np.uint16)
    tifffile.imwrite(tmp_path / 'a.tif', array, photometric='minisblack')
    for path in (saved(tmp_path / 'a.npy', array), str(tmp_path / 'a.tif')):
        if axes is None:
            assert '--axes=hwc' in refused(' x '.join(map(str, shape)), path)
        else:
            scene = read_scene(path)
            np.testing.assert_array_equal(scene.cube, array if axes == 'chw' else np.moveaxis(array, 2, 0))
            said(scene, {'chw': 'bands first', 'hwc': 'bands last'}[axes])
        for mmap in (False, True):
            np.testing.assert_array_equal(read_scene(path, axes='hwc', mmap=mmap).cube, np.moveaxis(array, 2, 0))
            np.testing.assert_array_equal(read_scene(path, axes='chw', mmap=mmap).cube, array)
            np.testing.assert_array_equal(read_scene(path, axes='HCW', mmap=mmap).cube, np.moveaxis(array, 1, 0))
        refused('--axes=hw', path, axes='hw')


def test_wavelengths_and_labels_tell_the_axes(tmp_path):
    for array in (CUBE, np.moveaxis(CUBE, 0, 2)):
        array = array.repeat(3, 0) if len(array) == C else array.repeat(3, 2)  # 24 bands of 20 x 24: no side tells
        nm = np.linspace(450, 900, 24)
        for facts in (dict(wavelengths_nm=np.linspace(450, 900, 24), cube=array[:, :, :23] if len(array) == 24 else array[:, :23]), dict(labels=LABELS, cube=array)):
            path = str(tmp_path / 'a.npz')
            np.savez(path, **facts)
            expected = facts['cube'] if len(array) == 24 else np.moveaxis(facts['cube'], 2, 0)
            scene = read_scene(path)
            np.testing.assert_array_equal(scene.cube, expected)
    assert len(nm) == 24


def test_an_array_of_an_npz_is_chosen_by_its_name(tmp_path):
    path = str(tmp_path / 'a.npz')
    np.savez(path, image=np.moveaxis(CUBE, 0, 2), dem=CUBE[0])
    refused("['dem', 'image'] but no array \"cube\"", path)
    np.testing.assert_array_equal(read_scene(path + ':image').cube, CUBE)
    np.testing.assert_array_equal(read_scene(path + ':dem', mmap=True).cube, CUBE[:1])
    refused('no array', path + ':nothing')
    refused('no such file', str(tmp_path / 'none.npz:cube'))


def test_what_an_npz_states_beside_its_cube(tmp_path):
    facts = dict(scale=[0.0001, 0], fwhm_nm=NM / 100, class_names=['unlabelled', 'a', 'b', 'c', 'd'], nodata=np.array([9]), class_colors=np.arange(12).reshape(4, 3))
    scene = read_scene(make_scene(tmp_path / 'a.npz', cube=np.moveaxis(hidden(CUBE, 9), 0, 2), labels=LABELS, wavelengths_nm=NM, **facts))
    assert scene.scale == (0.0001, 0) and scene.class_names == list('abcd') and scene.nodata == 9 and scene.class_colors[3] == [9, 10, 11]
    np.testing.assert_allclose(scene.fwhm_nm, NM / 100)
    np.testing.assert_array_equal(missing_of(scene), LEFT)


@pytest.mark.parametrize('facts, words', [(dict(scale=[1, 0, 2]), 'its "scale" has 3 numbers'), (dict(fwhm_nm=10.0), 'has 1 widths for 8 bands'),
                                          (dict(wavelengths_nm=450.0), 'has 1 wavelengths for 8 bands'), (dict(nodata=[0, 9]), 'states 2 nodata values')])
def test_wrong_facts_in_an_npz_are_refused(tmp_path, facts, words):
    refused(words, make_scene(tmp_path / 'a.npz', **dict(cube=np.moveaxis(CUBE, 0, 2), labels=LABELS, wavelengths_nm=NM) | facts))


def test_a_scale_may_be_one_number(tmp_path):
    for scale, expected in ((1e-4, (1e-4, 0)), ([1e-4], (1e-4, 0)), ([1e-4, 2], (1e-4, 2))):
        assert read_scene(make_scene(tmp_path / 'a.npz', scale=scale)).scale == expected


def test_arrays_of_an_npz_that_are_not_used_are_named(tmp_path):
    path = make_scene(tmp_path / 'a.npz', cube=np.moveaxis(CUBE, 0, 2), labels=LABELS, gt=LABELS, wavelengths=NM, wavelengths_nm=NM)
    said(read_scene(path), 'not used: gt, wavelengths (known are labels, wavelengths_nm')
    assert not any('not used' in note for note in read_scene(make_scene(tmp_path / 'b.npz')).notes)


def test_a_first_name_that_may_be_of_label_0_is_said(tmp_path):
    for names, words in ((['No Data', 'a', 'b', 'c', 'd'], 'the first, "No Data", is taken as that of label 0'), (['none', 'a', 'b', 'c', 'd'], 'label 0'),
                         (['bare', 'a', 'b', 'c', 'd'], 'WARNING: 5 class_names for labels up to 4: the first, "bare", is taken as that of class 1')):
        said(read_scene(make_scene(tmp_path / 'a.npz', cube=np.moveaxis(CUBE, 0, 2), labels=LABELS, wavelengths_nm=None, class_names=names)), words)
    scene = read_scene(make_scene(tmp_path / 'a.npz', cube=np.moveaxis(CUBE, 0, 2), labels=LABELS, wavelengths_nm=None, class_names=['bare', 'a', 'b', 'c']))
    assert not any('class_names' in note for note in scene.notes)


@pytest.mark.parametrize('names', [['background', 'a', 'b', 'c'], ['background', 'a', 'b', 'c', 'd'], ['oak', 'a', 'b', 'c']])
def test_a_class_named_background_is_not_taken_for_label_0(tmp_path, names):
    path = make_scene(tmp_path / 'a.npz', cube=np.moveaxis(CUBE, 0, 2), labels=LABELS, class_names=names, wavelengths_nm=NM)
    scene = read_scene(path)
    assert scene.class_names == names[-4:]
    said(scene, f'1 {names[-4]}: ')
    assert any('taken as that of label 0' in note for note in scene.notes) == (len(names) == 5)
    np.savez(tmp_path / 'labels.npz', labels=LABELS, class_names=names)
    assert read_scene(path, str(tmp_path / 'labels.npz')).class_names == names[-4:]


def test_labels_are_not_taken_for_the_image_beside_them(tmp_path):
    path = str(tmp_path / 'a.npz')
    np.savez(path, reflectance=np.moveaxis(CUBE, 0, 2), labels=LABELS)
    refused("['labels', 'reflectance'] but no array \"cube\"", path)
    scene = read_scene(path + ':reflectance')
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_array_equal(scene.labels, LABELS)


@pytest.mark.parametrize('compression', [5, 50000, 7, 34887])
def test_a_compression_that_needs_imagecodecs_names_it(tmp_path, monkeypatch, compression):
    path = str(tmp_path / 'a.tif')
    tifffile.imwrite(path, CUBE[0], compression='zlib', photometric='minisblack')
    with tifffile.TiffFile(path, mode='r+b') as tif:
        tif.pages[0].tags['Compression'].overwrite(compression)
    try:
        import imagecodecs  # noqa: F401
        pytest.skip('imagecodecs is installed')
    except ImportError:
        assert 'a.tif: its compression' in refused('pip install imagecodecs', path)
    predicted = write_tiff(tmp_path / 'p.tif', REFLECTANCE[0], compression='zlib')
    assert predicted


@pytest.mark.parametrize('compression', ['lzw', 'zstd', 'lzma', 'packbits', 'jpeg'])
def test_compressions_are_read_with_imagecodecs(tmp_path, compression):
    pytest.importorskip('imagecodecs')
    array = np.full((H, W), 90, np.uint8) if compression == 'jpeg' else CUBE
    path = write_tiff(tmp_path / 'a.tif', array, compression=compression)
    for mmap in (False, True):
        np.testing.assert_array_equal(read_scene(path, mmap=mmap).cube, np.broadcast_to(array, read_scene(path).cube.shape))


# ============ lazily ============

def test_mixed_and_normalised_cubes_stay_on_disk_and_have_the_same_values(tmp_path, monkeypatch):
    path = make_scene(tmp_path / 'a.npz', cube=np.moveaxis(hidden(CUBE, 9), 0, 2), labels=LABELS, wavelengths_nm=NM, nodata=9)
    weights = RNG.random((3, C))
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 3000)
    memory, disk = read_scene(path), read_scene(path, mmap=True)
    for change in (lambda scene: mix_bands(scene, weights, [1, 2, 3]), normalized, lambda scene: normalized(mix_bands(scene, weights))):
        mixed, lazy = change(memory), change(disk)
        assert isinstance(lazy.cube, Lazy) and isinstance(mixed.cube, np.ndarray) and mixed.cube.dtype == lazy.cube.dtype == np.float32
        np.testing.assert_allclose(lazy.cube, mixed.cube, rtol=1e-6)
        np.testing.assert_allclose(lazy.cube[:, 4:9, 3:5], mixed.cube[:, 4:9, 3:5], rtol=1e-6)
        np.testing.assert_array_equal(missing_of(lazy), LEFT)
        assert lazy.nodata is None
    valid = np.asarray(normalized(disk).cube)[:, ~LEFT]
    np.testing.assert_allclose(valid.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(valid.std(1), 1, rtol=1e-6)
    np.testing.assert_allclose(mix_bands(memory, weights).cube[:, 5, 9], weights @ CUBE[:, 5, 9], rtol=1e-5)


def test_a_file_that_breaks_while_it_is_gone_through_is_one_sentence(tmp_path, monkeypatch):
    def read(rows, cols):
        raise OSError('wrong checksum')
    monkeypatch.setitem(scenes.READERS, '.npy', lambda *args: scene_of(Lazy(CUBE.shape, CUBE.dtype, read)))
    path = saved(tmp_path / 'a.npy', CUBE)
    assert 'a.npy: cannot be read (OSError: wrong checksum)' in refused('copy or convert', path, mmap=True)


@pytest.mark.filterwarnings('error')
def test_values_beyond_float32_are_missing(tmp_path):
    wide = hidden(REFLECTANCE.astype(np.float64), -1.7976931348623157e308)
    for mmap in (False, True):
        for path in (saved(tmp_path / 'a.npy', wide), write_tiff(tmp_path / 'a.tif', wide, tag(42113, '-1.7976931348623157e+308'))):
            scene = read_scene(path, axes='chw', mmap=mmap)
            np.testing.assert_array_equal(missing_of(scene), LEFT)
            assert scene.nodata is None and not any('no float32 pixel can have' in note for note in scene.notes)


def test_only_what_is_sliced_is_read():
    asked = []

    def read(rows, cols):
        asked.append((rows, cols))
        return CUBE[:, rows, cols]
    scene = scene_of(Lazy(CUBE.shape, CUBE.dtype, read), nodata=None)
    mixed = mix_bands(scene, np.eye(C))
    assert not asked
    mixed.cube[:, 2:4, 5:6]
    assert asked == [(slice(2, 4, 1), slice(5, 6))]


def test_rows_and_columns_are_not_read_backwards():
    lazy = Lazy(CUBE.shape, CUBE.dtype, lambda rows, cols: CUBE[:, rows, cols])
    for key in (np.s_[:, ::-1], np.s_[:, :, ::-1], np.s_[2, 9:2:-1]):
        with pytest.raises(IndexError, match='forwards only'):
            lazy[key]


def test_what_is_made_of_a_cube_on_disk_is_made_strip_by_strip(monkeypatch):
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 5000)
    at_once = []

    def counted(x, rows, cols):
        at_once.append(x.nbytes * 2)
        return x.astype(np.float32) + np.arange(H)[rows, None] + np.arange(W)[cols]
    lazy = when_read(Lazy(CUBE.shape, CUBE.dtype, lambda rows, cols: CUBE[:, rows, cols]), counted, np.float32)
    made = CUBE + np.arange(H, dtype=np.float32)[:, None] + np.arange(W)
    for key in (slice(None), np.s_[:, 3:17], np.s_[:, 1::3, 4:20:5], np.s_[:, 5:5], np.s_[2, 2:9]):
        np.testing.assert_array_equal(lazy[key], made[key])
    assert max(at_once) <= 5000 < made.nbytes


@pytest.mark.parametrize('axes', ['chw', 'hwc', 'hcw', 'whc'])
def test_of_a_file_on_disk_no_more_than_a_strip_is_mapped_at_once(tmp_path, axes, monkeypatch):
    CUBE.transpose(['chw'.index(letter) for letter in axes]).tofile(tmp_path / 'a')
    mapped_bytes = []

    class Counted(np.ndarray):
        def __getitem__(self, key):
            found = np.asarray(self)[key]
            low, high = np.lib.array_utils.byte_bounds(found) if found.size else (0, 0)
            mapped_bytes.append(high - low)
            return found
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 5000)
    sides = [CUBE.shape['chw'.index(letter)] for letter in axes]
    stored = np.fromfile(tmp_path / 'a', CUBE.dtype).reshape(sides)
    lazy = scenes.mapped_cube(lambda: scenes.to_chw(stored, axes).view(Counted))
    for key in (slice(None), np.s_[:, 3:17], np.s_[:, 1::3, 4:20:5], np.s_[:, 5:5], np.s_[2, 2:9]):
        np.testing.assert_array_equal(lazy[key], CUBE[key])
    assert max(mapped_bytes) <= 5000 < CUBE.nbytes


def test_too_little_room_to_unpack_is_said_before(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / 'a.tif', CUBE, compression='zlib')
    monkeypatch.setattr(scenes.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=100))
    refused('unpacking takes', path, mmap=True)


def test_the_first_note_tells_shape_axes_and_type(tmp_path):
    scene = read_scene(write_tiff(tmp_path / 'a.tif', CUBE, *UTM))
    assert scene.notes[0] == '8 bands of 20 x 24 px, uint16 (bands first, as the file states)'
    assert scene.notes[-1].startswith('place: UTM zone 33N')
    assert read_scene(write_tiff(tmp_path / 'b.tif', CUBE[0])).notes[-1] == 'no georeference'
    assert all('\n' not in note for note in scene.notes)


def test_types_that_are_no_pixels_are_refused(tmp_path):
    with pytest.raises(UserError, match='not bands x rows x columns'):
        settle_values(scene_of(CUBE[0]), 'x', None)
    refused('complex', saved(tmp_path / 'c.npy', CUBE.astype(complex)))
    wide = settle_values(scene_of(CUBE.astype(np.int32), nodata=-9999), 'x', None)
    assert wide.cube.dtype == np.float32 and wide.nodata == -9999
    assert json.dumps(wide.nodata) and os.path.isdir(tmp_path) and re.match('a', 'a')


@pytest.mark.parametrize('kind, told', [(np.uint32, True), (np.int64, True), (np.uint16, False), (np.float64, False)])
def test_whole_numbers_that_float32_may_round_are_told(kind, told, tmp_path):
    np.savez(tmp_path / 's.npz', cube=np.arange(1, 4 * 5 * 3 + 1).reshape(4, 5, 3).astype(kind))
    notes = read_scene(str(tmp_path / 's.npz')).notes
    assert any('becomes float32, which is exact up to 16,777,216' in note for note in notes) == told
