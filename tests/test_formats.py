"""Files of sensors and programs: each is written here, small, and read back with its values, wavelengths, gaps, labels and place."""
import os
import sys
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

import scenes
from conftest import Finished
from data import list_inputs
from scenes import UserError, band_matrix, read_scene

# ============ ENVI, MATLAB, HDF5 and agencies' products ============

C, H, W = 6, 9, 11
NM = np.linspace(450, 900, C)
CUBE = np.random.default_rng(0).integers(1, 4000, (C, H, W)).astype(np.int16)
LABELS = (np.add.outer(np.arange(H), np.arange(W)) % 4).astype(np.uint8)
TYPES = {'uint8': 1, 'int16': 2, 'int32': 3, 'float32': 4, 'float64': 5, 'uint16': 12}
ORDERS = {'bsq': (0, 1, 2), 'bil': (1, 0, 2), 'bip': (1, 2, 0)}


def write_envi(path, cube=CUBE, interleave='bsq', big_endian=False, offset=0, header=None, **fields):
    """An ENVI image: the data file `path` and its header, `path` + .hdr in place of its ending where `header` does not name it"""
    C, H, W = cube.shape
    dtype = cube.dtype.newbyteorder('>' if big_endian else '<')
    with open(path, 'wb') as file:
        file.write(b'\7' * offset + cube.transpose(ORDERS.get(interleave, (0, 1, 2))).astype(dtype).tobytes())
    fields = {'samples': W, 'lines': H, 'bands': C, 'header offset': offset, 'file type': 'ENVI Standard', 'data type': TYPES[cube.dtype.name],
              'interleave': interleave, 'byte order': int(big_endian)} | {name.replace('_', ' '): value for name, value in fields.items()}
    lines = [f'{name} = {{{", ".join(map(str, value))}}}' if isinstance(value, (list, tuple, np.ndarray)) else f'{name} = {value}'
             for name, value in fields.items() if value is not None]
    with open(header or os.path.splitext(path)[0] + '.hdr', 'wb') as file:
        file.write('\n'.join(['ENVI', *lines, '']).encode('latin-1'))
    return str(path)


def read(path, *args, **kwargs):
    """read_scene() twice, from memory and from disk, which must agree -> the Scene"""
    scene = read_scene(str(path), *args, **kwargs)
    lazy = read_scene(str(path), *args, **{**kwargs, 'mmap': True})
    assert lazy.cube.shape == scene.cube.shape and lazy.cube.dtype == scene.cube.dtype
    np.testing.assert_array_equal(np.asarray(lazy.cube), scene.cube)
    np.testing.assert_array_equal(lazy.cube[::-1, 2:5, ::2], scene.cube[::-1, 2:5, ::2])
    assert lazy.notes == scene.notes
    return scene


def refused(path, *words, **kwargs):
    with pytest.raises(UserError) as caught:
        read_scene(str(path), **kwargs)
    text = str(caught.value)
    assert all(word in text for word in words) and '\n' not in text, text


def told(scene, *words):
    """Does one of the scene's notes hold all these words?"""
    return any(all(word in note for word in words) for note in scene.notes)


@pytest.mark.parametrize('interleave', ORDERS)
@pytest.mark.parametrize('dtype, big_endian, offset', [('int16', False, 0), ('uint16', True, 128), ('float32', True, 0), ('uint8', False, 7)])
def test_envi_layouts_give_the_values_that_were_written(interleave, dtype, big_endian, offset, tmp_path):
    cube = CUBE.astype(dtype)
    path = write_envi(tmp_path / 'a.img', cube, interleave, big_endian, offset, wavelength=NM)
    for name in (path, tmp_path / 'a.hdr'):
        scene = read(name)
        np.testing.assert_array_equal(scene.cube, cube)
        assert scene.cube.dtype == dtype and scene.cube.dtype.isnative
        np.testing.assert_allclose(scene.wavelengths_nm, NM)
        assert told(scene, f'6 bands of 9 x 11 px, {dtype}', interleave) and told(scene, '450 to 900 nm', 'header')


@pytest.mark.parametrize('data, header', [
    ('a', 'a.hdr'), ('a.img', 'a.img.hdr'), ('a.dat', 'a.hdr'), ('a.bsq', 'a.bsq.hdr'), ('A.IMG', 'A.HDR'), ('f100517t01_rfl_img', 'f100517t01_rfl_img.hdr'),
    ('f1.c.rfl', 'f1.c.hdr'), ('a.raw', 'a.hdr'), ('a.b.c', 'a.b.c.hdr')])
def test_either_file_of_an_envi_image_is_enough(data, header, tmp_path):
    write_envi(tmp_path / data, header=tmp_path / header)
    np.testing.assert_array_equal(read(tmp_path / data).cube, CUBE)
    np.testing.assert_array_equal(read(tmp_path / header).cube, CUBE)


def test_a_folder_of_envi_images_is_listed_once(tmp_path):
    for split in ('tr', 'ts'):
        os.makedirs(tmp_path / split / 'image')
        write_envi(tmp_path / split / 'image' / 'a.img')
    assert [item.name for item in list_inputs(str(tmp_path), '')] == ['tr/a.hdr', 'ts/a.hdr']
    # a header beside a GeoTIFF belongs to it, one beside a picture of the same image does not
    for name, kind in (('b', 'TIFF'), ('c', 'ENVI Standard')):
        write_envi(tmp_path / 'tr' / 'image' / f'{name}.img', file_type=kind)
        tiff(tmp_path / 'tr' / 'image' / f'{name}.tif', CUBE)
    assert [item.name for item in list_inputs(str(tmp_path), '')] == ['tr/a.hdr', 'tr/b.tif', 'tr/c.hdr', 'tr/c.tif', 'ts/a.hdr']


def test_what_is_missing_of_an_envi_image_is_named(tmp_path):
    path = write_envi(tmp_path / 'a.img')
    os.remove(tmp_path / 'a.hdr')
    refused(path, 'a.hdr')
    write_envi(tmp_path / 'b')
    os.rename(tmp_path / 'b.hdr', tmp_path / 'c.hdr')
    refused(tmp_path / 'b', 'b.hdr')
    refused(tmp_path / 'c.hdr', 'c.img')
    write_envi(tmp_path / 'd.img')
    (tmp_path / 'd.dat').write_bytes((tmp_path / 'd.img').read_bytes())
    refused(tmp_path / 'd.hdr', 'd.img', 'd.dat', 'data file')  # which of the two?
    (tmp_path / 'd.dat').write_bytes(b'notes on the flight')
    np.testing.assert_array_equal(read(tmp_path / 'd.hdr').cube, CUBE)
    with open(tmp_path / 'd.img', 'r+b') as file:
        file.truncate(1000)
    refused(tmp_path / 'd.img', 'truncated', '1000 bytes', str(2 * C * H * W))


@pytest.mark.parametrize('fields, word', [
    (dict(bands=0), 'bands'), (dict(samples='eleven'), 'samples'), (dict(data_type=99), 'data type'), (dict(interleave='bsx'), 'interleave'),
    (dict(lines=None), 'lines'), (dict(wavelength=[450, 500]), 'wavelength'), (dict(bbl=[1, 0]), 'bbl'), (dict(byte_order=2), 'byte order'),
    (dict(file_compression=1), 'compression'), (dict(wavelength='{450, 500, 550'), 'ends within'), (dict(fwhm=['a'] * C), 'fwhm'),
    (dict(major_frame_offsets=[2, 0]), 'frame offsets'), (dict(data_type=6, lines=2), 'complex')])
def test_wrong_envi_headers_are_refused_by_the_name_of_the_field(fields, word, tmp_path):
    refused(write_envi(tmp_path / 'a.img', **fields), word, 'a.')


@pytest.mark.parametrize('unit, values', [('Micrometers', NM / 1000), ('nm', NM), ('Nanometers', NM), ('Angstroms', NM * 10), ('Wavenumber', 1e7 / NM), ('um', NM / 1000),
                                          ('', NM / 1000), ('Millimeters', NM / 1e6), ('Meters', NM / 1e9), ('Nanometers (nm)', NM), ('Index', None), ('Furlongs', None)])
def test_wavelengths_of_every_unit_become_nm(unit, values, tmp_path):
    fields = {'wavelength units': unit} if unit else {}
    scene = read(write_envi(tmp_path / 'a.img', wavelength=[*range(1, C + 1)] if values is None else values, **fields))
    if values is None:
        assert scene.wavelengths_nm is None and told(scene, unit, 'unknown unit')
    else:
        np.testing.assert_allclose(scene.wavelengths_nm, NM, rtol=1e-6)
        assert told(scene, '450 to 900 nm', unit)


def test_what_an_envi_header_says_of_bands_is_used(tmp_path):
    cube = CUBE.astype(np.float32)
    cube[2] = 1e6
    path = write_envi(tmp_path / 'a.img', cube, wavelength=NM / 1000, fwhm=[0.01] * C, wavelength_units='Micrometers', bbl=[1, 1, 0, 1, 1, 1])
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, np.delete(cube, 2, 0))
    assert scene.bands == [0, 1, 3, 4, 5] and told(scene, 'band 3', '630 nm', 'bad')
    np.testing.assert_allclose(scene.wavelengths_nm, np.delete(NM, 2))
    np.testing.assert_allclose(scene.fwhm_nm, [10] * 5)
    kept = read(path, keep_bad_bands=True)
    assert len(kept.cube) == C and told(kept, 'band 3', 'kept')
    scene = read(write_envi(tmp_path / 'b.img', bbl=[0] * C))
    assert len(scene.cube) == C and told(scene, 'every band is marked as bad')


@pytest.mark.parametrize('value', ['-9999', 'nan', '-1.5e34'])
def test_data_ignore_values_mark_missing_pixels(value, tmp_path):
    cube = CUBE.astype(np.float32)
    cube[:, :, :3] = float(value)
    scene = read(write_envi(tmp_path / 'a.img', cube, **{'data ignore value': value}))
    assert (scene.nodata is None) == (value == 'nan') and told(scene, '27.3% of the pixels are missing')


def test_scales_are_stated_where_they_are_the_same_for_all_bands_and_applied_where_not(tmp_path):
    scene = read(write_envi(tmp_path / 'a.img', reflectance_scale_factor=10000))
    assert scene.scale == (1e-4, 0) and told(scene, '0.0001 * value')
    np.testing.assert_array_equal(scene.cube, CUBE)
    scene = read(write_envi(tmp_path / 'b.img', data_gain_values=[0.5] * C, data_offset_values=[1] * C))
    assert scene.scale == (0.5, 1)
    cube = CUBE.copy()
    cube[:, 4, 4] = -1
    gains = np.arange(1, C + 1) / 10
    scene = read(write_envi(tmp_path / 'c.img', cube, data_gain_values=gains, data_offset_values=[2] * C, data_ignore_value=-1, bbl=[1, 0, 1, 1, 1, 1]))
    expected = np.delete(CUBE * gains[:, None, None] + 2, 1, 0)
    expected[:, 4, 4] = np.nan
    np.testing.assert_allclose(scene.cube, expected, rtol=1e-6)
    assert scene.scale is None and scene.nodata is None and told(scene, 'differ from band to band')


def test_names_and_colours_of_an_envi_classification_come_with_its_labels(tmp_path):
    image = write_envi(tmp_path / 'a.img')
    names = ['Unclassified', 'Asphalt', 'Meadows', 'Gravel']
    colors = [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    labels = write_envi(tmp_path / 'gt.img', LABELS[None], file_type='ENVI Classification', classes=4, class_names=names, class_lookup=colors)
    for path in (labels, labels.replace('.img', '.hdr')):
        scene = read(image, path)
        np.testing.assert_array_equal(scene.labels, LABELS)
        assert scene.class_names == names[1:] and scene.class_colors == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    labels = write_envi(tmp_path / 'gt.img', LABELS[None], class_names=['Water', *names[1:]])
    assert told(read(labels), 'Water', 'unlabelled')


def test_headers_of_other_languages_and_with_comments_are_read(tmp_path):
    path = write_envi(tmp_path / 'a.img', description='{Fläche = 3 m², Überflug}', band_names=['a = 1'] * C, wavelength=NM)
    text = (tmp_path / 'a.hdr').read_bytes().replace(b'wavelength = {', b'; bands = 99\n  Wavelength  = {\n; in nm, \xb5m elsewhere\n ').replace(b'samples', b'SAMPLES')
    (tmp_path / 'a.hdr').write_bytes(text.replace(b'\n', b'\r\n'))
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_allclose(scene.wavelengths_nm, NM)


UTM = ['UTM', 1, 1, 350000, 5800000, 30, 30, 33, 'North', 'WGS-84', 'units=Meters']


def tag(scene, code):
    return next((found[3] for found in scene.geotags if found[0] == code), None)


def test_a_rotated_envi_image_keeps_its_place(tmp_path):
    scene = read(write_envi(tmp_path / 'a.img', map_info=[*UTM, 'rotation=20']))
    cosine, sine = 30 * np.cos(np.radians(20)), 30 * np.sin(np.radians(20))
    np.testing.assert_allclose(tag(scene, 34264), [cosine, sine, 0, 350000, sine, -cosine, 0, 5800000, 0, 0, 0, 0, 0, 0, 0, 1])
    assert tag(scene, 33550) is None and tag(scene, 34735)[-1] == 32633
    # the stated point is the middle of the pixel in column 3, row 5
    scene = read(write_envi(tmp_path / 'b.img', map_info=['UTM', 3.5, 5.5, *UTM[3:], 'rotation=90']))
    a, b, _, x, d, e, _, y = tag(scene, 34264)[:8]
    np.testing.assert_allclose([x + a * 2.5 + b * 4.5, y + d * 2.5 + e * 4.5], [350000, 5800000])


def test_gdal_finds_a_rotated_envi_image_where_its_tags_are(tmp_path):
    rasterio = pytest.importorskip('rasterio')
    path = write_envi(tmp_path / 'a.img', map_info=[*UTM, 'rotation=-66'])
    with rasterio.open(path) as file:
        np.testing.assert_allclose(np.array(tag(read(path), 34264))[[0, 1, 3, 4, 5, 7]], list(file.transform)[:6])


@pytest.mark.parametrize('wkt, epsg', [
    ('PROJCS["Gauss",GEOGCS["x",AUTHORITY["EPSG","4314"]],AUTHORITY["EPSG","31467"]]', 31467),
    ('PROJCS["Gauss",GEOGCS["x",AUTHORITY["EPSG","4314"]]]', None)])
def test_the_coordinate_system_string_names_the_system(wkt, epsg, tmp_path):
    info = ['Projection', 1, 1, 350000, 5800000, 30, 30, 'European Datum']
    scene = read(write_envi(tmp_path / 'a.img', map_info=info, coordinate_system_string='{' + wkt + '}'))
    assert tag(scene, 33922)[3:5] == (350000, 5800000)
    assert (tag(scene, 34735) or [None])[-1] == epsg


@pytest.mark.parametrize('kind, epsg, key', [('PROJCS', 4547, 3072), ('PROJCRS', 4647, 3072), ('GEOGCS', 4490, 2048), ('GEOGCRS', 7844, 2048)])
def test_what_kind_of_system_it_is_does_not_follow_from_its_number(kind, epsg, key, tmp_path):
    info = ['Projection', 1, 1, 100, 50, 0.5, 0.5, 'China 2000']
    scene = read(write_envi(tmp_path / 'a.img', map_info=info, coordinate_system_string=f'{{{kind}["x",AUTHORITY["EPSG","{epsg}"]]}}'))
    assert tag(scene, 34735)[4:8] == (1024, 0, 1, 2 if key == 2048 else 1) and tag(scene, 34735)[12] == key and tag(scene, 34735)[15] == epsg
    assert told(scene, f'EPSG:{epsg}, pixels of 0.5 {"degrees" if key == 2048 else "(unit not known)"}')


@pytest.mark.parametrize('info, wkt, words', [
    ('Geographic Lat/Lon', '', 'a system of its own, pixels of 0.5 degrees'), ('Geographic Lat/Lon', 'GEOGCS["NAD27"]', 'pixels of 0.5 degrees'),
    ('State Plane', 'PROJCS["x",GEOGCS["y",UNIT["Degree",0.0174]],UNIT["Foot_US",0.304800609601219],AUTHORITY["EPSG","2263"]]', 'EPSG:2263, pixels of 0.5 US survey ft'),
    ('State Plane', 'PROJCRS["x",LENGTHUNIT["foot",0.3048],ID["EPSG",2222]]', 'EPSG:2222, pixels of 0.5 ft'),
    ('Projection', 'PROJCS["x",UNIT["metre",1.0],AUTHORITY["EPSG","3035"]]', 'EPSG:3035, pixels of 0.5 m'),
    ('State Plane', '', 'a system of its own, pixels of 0.5 (unit not known)'), ('Arbitrary', '', 'no georeference')])
def test_the_unit_of_a_place_is_that_of_its_system(info, wkt, words, tmp_path):
    path = write_envi(tmp_path / 'a.img', map_info=[info, 1, 1, 100, 50, 0.5, 0.5, 'x'], coordinate_system_string=f'{{{wkt}}}')
    scene = read(path)
    assert told(scene, words), scene.notes
    again = tiff(tmp_path / 'again.tif', CUBE, geotags=scene.geotags)  # as a map of it has them
    assert told(read(again), words)


def test_a_system_without_a_number_may_be_that_of_the_labels(tmp_path):
    geographic = ['Geographic Lat/Lon', 1, 1, 12, 50, 0.5, 0.5]
    image = write_envi(tmp_path / 'a.img', map_info=[*geographic, 'WGS-84'])
    labels = write_envi(tmp_path / 'b.img', LABELS[None], map_info=[*geographic, 'North America 1983'])
    np.testing.assert_array_equal(read(image, labels).labels, LABELS)


def test_bands_of_overlapping_detectors_are_put_in_order_and_resampled_rightly(tmp_path):
    """AVIRIS: four spectrometers one behind the other; the first bands of each lie below the last of the one before"""
    nm = np.concatenate([np.arange(400, 680, 10.0), np.arange(655, 1260, 10.0)])
    cube = (nm[:, None, None] + np.zeros((4, 5))).astype(np.float32)  # each band holds its wavelength
    cube[:, 0, 0] = -9999
    scene = read(write_envi(tmp_path / 'f1_rfl', cube, header=tmp_path / 'f1_rfl.hdr', wavelength=nm, data_ignore_value=-9999))
    assert (np.diff(scene.wavelengths_nm) > 0).all() and told(scene, '2 detectors overlap')
    np.testing.assert_allclose(scene.cube[:, 1, 1], scene.wavelengths_nm)
    np.testing.assert_array_equal(nm[scene.bands], scene.wavelengths_nm)
    for values in (scene.cube[:, 1, 1], ):
        np.testing.assert_allclose(band_matrix(scene.wavelengths_nm, [500, 667, 900], 30.0) @ values, [500, 667, 900], atol=0.5)
    np.testing.assert_allclose(band_matrix(nm, [500, 667, 900], 30.0) @ cube[:, 1, 1], [500, 667, 900], atol=0.5)  # in any order
    scene = read(tmp_path / 'f1_rfl', drop_bands='1')  # numbers stay those of the file
    np.testing.assert_array_equal(nm[scene.bands], scene.wavelengths_nm)
    assert 0 not in scene.bands and len(scene.bands) == len(nm) - 1
    chosen = [860, 650, 550, 450, 2200, 1600]  # an order that someone chose stays
    scene = read(write_envi(tmp_path / 'b.img', wavelength=chosen))
    assert scene.wavelengths_nm == chosen and scene.bands is None
    np.testing.assert_array_equal(scene.cube, CUBE)


def test_hyperions_bands_that_were_not_calibrated_are_left_out(tmp_path):
    cube = CUBE.copy()
    cube[[0, 3]] = 0
    scene = read(write_envi(tmp_path / 'EO1H_L1R.img', cube, wavelength=NM))
    np.testing.assert_array_equal(scene.cube, np.delete(cube, [0, 3], 0))
    assert scene.bands == [1, 2, 4, 5] and told(scene, 'bands 1, 4', '0')
    black = read(write_envi(tmp_path / 'black.img', 0 * cube, wavelength=NM))  # no band is 0 where others are not
    assert len(black.cube) == C and black.bands is None


# ------------ MATLAB ------------

@pytest.fixture(autouse=True)
def matlab_in_this_process(monkeypatch):
    """READ_MAT is executed here. The reader starts a process for it, a third of a second each time: test_numpy_mat_and_envi_scenes lets it."""
    def execute(command, capture_output, text, errors):
        python, flag, code, *arguments = command
        assert (python, flag, code) == (sys.executable, '-c', scenes.READ_MAT) and capture_output and text
        with monkeypatch.context() as changed:
            changed.setattr(sys, 'argv', [flag, *arguments])
            try:
                exec(compile(code, '<string>', 'exec'), {'__name__': '__main__'})
            except Exception:
                return Finished(1, '', traceback.format_exc())
        return Finished(0, '', '')
    monkeypatch.setattr(scenes, 'subprocess', SimpleNamespace(run=execute))


def savemat(path, arrays, **kwargs):
    pytest.importorskip('scipy.io').savemat(path, arrays, **kwargs)
    return str(path)


HWC = CUBE.transpose(1, 2, 0)


def test_names_decide_what_is_image_and_what_labels_in_a_mat(tmp_path):
    lidar, classes = (CUBE[0] % 90).astype(np.uint8), LABELS
    path = savemat(tmp_path / 'a.mat', {'HSI': HWC, 'LiDAR': lidar, 'gt': classes})
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_array_equal(scene.labels, classes)
    assert told(scene, 'HSI', 'array') and told(scene, 'labels from "gt"')
    scene = read(savemat(tmp_path / 'b.mat', {'HSI': HWC, 'LiDAR': lidar, 'DSM': lidar, 'abundances': HWC[..., :3] / 4000.0}))
    assert scene.labels is None
    heights = {'LiDAR_train': lidar, 'DSM_map': lidar, 'height_gt': lidar}  # heights, whatever else their names say
    scene = read(savemat(tmp_path / 'd.mat', {'HSI': HWC, **heights}))
    assert scene.labels is None and not told(scene, '--labels')
    np.testing.assert_array_equal(read(savemat(tmp_path / 'e.mat', {'HSI': HWC, **heights, 'gt': classes})).labels, classes)
    scene = read(savemat(tmp_path / 'c.mat', {'HSI': HWC, 'layer': classes}))
    assert scene.labels is None and told(scene, 'layer (9 x 11, uint8)', '--labels')


@pytest.mark.parametrize('form', ['turned', 'column', 'other', 'index'])
def test_labels_of_a_mat_that_do_not_fit_are_said(form, tmp_path):
    gt = {'turned': LABELS.T, 'column': LABELS.reshape(-1, 1), 'other': np.pad(LABELS, 1), 'index': np.arange(20)[None]}[form]
    scene = read(savemat(tmp_path / 'a.mat', {'img': HWC, 'train_gt': gt}))
    assert scene.labels is None
    assert told(scene, 'WARNING', f'train_gt ({gt.shape[0]} x {gt.shape[1]}', 'the image has 9 x 11 pixels') == (form != 'index')


@pytest.mark.parametrize('arrays', [{'wavenumber': 1e7 / NM}, {'wl': NM / 1000}, {'WaveNumbers_cm1': 1e7 / NM}])
def test_arrays_of_wavelengths_in_their_unit(arrays, tmp_path):
    scene = read(savemat(tmp_path / 'a.mat', {'img': HWC, **arrays}))
    np.testing.assert_allclose(scene.wavelengths_nm, NM)


def test_bad_bands_in_a_mat_are_left_out(tmp_path):
    scene = read(savemat(tmp_path / 'a.mat', {'img': HWC, 'bbl': [1, 1, 0, 1, 1, 1], 'wavelength': NM}))
    assert scene.bands == [0, 1, 3, 4, 5] and told(scene, 'band 3 (630 nm) left out: marked as bad')


def test_several_candidates_of_a_mat_are_refused_and_a_name_chooses(tmp_path):
    train, test = np.where(np.arange(W) < 5, LABELS, 0), np.where(np.arange(W) < 5, 0, LABELS)
    path = savemat(tmp_path / 'a.mat', {'HSI': HWC, 'LiDAR': CUBE[0], 'TRLabel': train, 'TSLabel': test})
    refused(path, 'TRLabel (9 x 11', 'TSLabel', 'a.mat:TRLabel')
    assert read(f'{path}:HSI').labels is None
    for root in (path, f'{path}:HSI'):
        np.testing.assert_array_equal(read(root, f'{path}:TSLabel').labels, test)
    refused(f'{path}:HSI', 'TRLabel', labels=path)
    refused(f'{path}:hsi2', 'HSI (9 x 11 x 6', 'hsi2')
    path = savemat(tmp_path / 'b.mat', {'before': HWC, 'after': HWC + 1})
    refused(path, 'before (9 x 11 x 6', 'after', 'b.mat:before')
    np.testing.assert_array_equal(read(f'{path}:after').cube, CUBE + 1)


@pytest.mark.parametrize('form', ['struct', 'cell', 'old'])
def test_images_inside_structs_and_cells_are_found(form, tmp_path):
    if form == 'old':
        scene = read(savemat(tmp_path / 'a.mat', {'gt': LABELS.astype(float)}, format='4'))
        np.testing.assert_array_equal(scene.cube[0], LABELS)
        return
    if form == 'struct':
        info = {'gains': np.arange(1.0, C + 1), 'fwhm': np.full(C, 0.01), 'wavelengths_of_the_lamp': np.arange(1.0, 21), 'wavelength': NM / 1000}
        arrays = {'hsi': {'Data': HWC, 'info': info, 'GT': LABELS, 'name': 'x'}}
    else:
        arrays = {'offsets': np.arange(1.0, C + 1), 'all': np.array([HWC, LABELS, 'text'], object), 'lambda': NM, 'gt': LABELS}
    scene = read(savemat(tmp_path / 'a.mat', arrays))
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_array_equal(scene.labels, LABELS)
    np.testing.assert_allclose(scene.wavelengths_nm, NM)
    assert form == 'cell' or np.allclose(scene.fwhm_nm, 10)


def test_bands_x_pixels_are_refused_with_the_way_out(tmp_path):
    flat = CUBE.transpose(0, 2, 1).reshape(C, -1)
    for number, arrays in enumerate(({'Y': flat, 'nRow': H, 'nCol': W}, {'Y': flat.T, 'nRow': H, 'nCol': W}, {'Y': CUBE.reshape(2, -1)})):
        words = ('pixels x bands', 'reshape(Y, nRow') if number == 1 else ('bands x pixels', "reshape(Y', nRow")
        refused(savemat(tmp_path / f'{number}.mat', arrays), 'Y', 'rows x columns x bands', *words)
    for name, array, words in (('a', np.resize(CUBE, (8, 400)), 'bands x pixels'), ('b', np.resize(CUBE, (400, 8)), 'pixels x bands')):
        np.save(tmp_path / f'{name}.npy', array)
        refused(tmp_path / f'{name}.npy', words)


def test_labels_of_a_long_flight_line_are_no_table(tmp_path):
    np.save(tmp_path / 'line.npy', np.ones((130, 3, 2), np.uint16))
    long = np.ones((130, 3), np.uint8)
    np.savez(tmp_path / 'l.npz', labels=long)
    for labels in (tmp_path / 'l.npz', savemat(tmp_path / 'l.mat', {'gt': long})):
        np.testing.assert_array_equal(read(tmp_path / 'line.npy', str(labels), axes='hwc').labels, long)
    np.save(tmp_path / 'l.npy', long)
    with pytest.raises(UserError, match='l.npy.*labels under the name "labels"'):
        read_scene(str(tmp_path / 'line.npy'), str(tmp_path / 'l.npy'), axes='hwc')


def save73(path, arrays):
    """MATLAB 7.3: HDF5 behind a block of text, axes reversed, structs as groups, cells as references"""
    h5py = pytest.importorskip('h5py')

    def put(group, name, value):
        if isinstance(value, dict):
            for key, item in value.items():
                put(group.require_group(name), key, item)
        elif isinstance(value, list):
            cells = group.create_dataset(name, (len(value), 1), h5py.ref_dtype)
            for number, item in enumerate(value):
                stored = group.file.create_dataset(f'#refs#/{name}{number}', data=np.asarray(item).T)
                cells[number, 0] = stored.ref
        else:
            group.create_dataset(name, data=np.asarray(value).T)
    with h5py.File(path, 'w', userblock_size=512) as file:
        for name, value in arrays.items():
            put(file, name, value)
    with open(path, 'r+b') as file:
        file.write(b'MATLAB 7.3 MAT-file, Platform: GLNXA64'.ljust(124) + b'\x00\x02IM')
    return str(path)


def test_matlab_73_is_read_with_its_axes_turned_round(tmp_path):
    path = save73(tmp_path / 'a.mat', {'scene': {'data': HWC, 'wavelengths': NM[None]}, 'paviaU_gt': LABELS, 'list': [LABELS + 1, HWC]})
    scene = read(path, mmap=True)
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_array_equal(scene.labels, LABELS)
    np.testing.assert_allclose(scene.wavelengths_nm, NM)


@pytest.mark.parametrize('kind', ['mat', 'h5'])
def test_of_a_cube_in_hdf5_only_what_is_sliced_is_read(kind, tmp_path, monkeypatch):
    h5py = pytest.importorskip('h5py')
    path = save73(tmp_path / 'a.mat', {'data': HWC}) if kind == 'mat' else h5(tmp_path / 'a.h5', {'data': HWC})
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 2 * C * W * CUBE.itemsize)
    sizes, whole = [], h5py.Dataset.__getitem__

    def counted(dataset, key):
        sizes.append(whole(dataset, key).size)
        return whole(dataset, key)
    monkeypatch.setattr(h5py.Dataset, '__getitem__', counted)
    scene = read_scene(path, mmap=True)
    assert sizes and max(sizes) == 2 * C * W  # two rows at once
    sizes.clear()
    np.testing.assert_array_equal(scene.cube[:, 2:5, 7:8], CUBE[:, 2:5, 7:8])
    assert sizes == [C * 3]


# ------------ HDF5 and NetCDF ------------

def h5(path, arrays, **attrs):
    """An HDF5 file of {'group/name': array or (array, attributes)}"""
    h5py = pytest.importorskip('h5py')
    with h5py.File(path, 'w') as file:
        file.attrs.update(attrs)
        for name, value in arrays.items():
            array, facts = value if isinstance(value, tuple) else (value, {})
            file.create_dataset(name, data=array).attrs.update(facts)
    return str(path)


def test_the_one_cube_of_an_hdf5_file_is_found_and_of_several_one_is_chosen(tmp_path):
    path = h5(tmp_path / 'a.h5', {'data/cube': CUBE, 'data/wavelength': (NM * 10, {'units': 'angstrom'}), 'data/gt': LABELS, 'time': np.arange(3)})
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_array_equal(scene.labels, LABELS)
    np.testing.assert_allclose(scene.wavelengths_nm, NM)
    path = h5(tmp_path / 'b.hdf5', {'x/one': HWC, 'x/two': HWC + 1})
    refused(path, 'x/one (9 x 11 x 6', 'x/two', 'b.hdf5:x/one')
    np.testing.assert_array_equal(read(f'{path}:x/two').cube, CUBE + 1)
    np.testing.assert_array_equal(read(f'{path}:two').cube, CUBE + 1)
    (tmp_path / 'c.nc').write_bytes(b'CDF\x01' + bytes(100))
    refused(tmp_path / 'c.nc', 'NetCDF-4')


def test_labels_beside_a_cube_miss_what_their_attributes_say(tmp_path):
    stored = np.where(LABELS == 0, 127, LABELS).astype(np.int8)
    path = h5(tmp_path / 'a.nc', {'cube': CUBE, 'labels': (stored, {'_FillValue': np.int8(127)})})
    for scene in (read(path), read(path, f'{path}:labels')):
        np.testing.assert_array_equal(scene.labels, LABELS)


def test_a_scale_for_each_band_of_an_hdf5_file_is_applied(tmp_path):
    factors = np.array([1e-4, 1e-4, 1e-2, 1e-4, 1e-4, 1e-4])
    scene = read(h5(tmp_path / 'a.h5', {'cube': (CUBE, {'scale_factor': factors, 'add_offset': 0.5})}), axes='chw')
    np.testing.assert_allclose(scene.cube, CUBE * factors[:, None, None] + 0.5, rtol=1e-6)
    assert scene.scale is None and told(scene, 'differ from band to band')
    refused(h5(tmp_path / 'b.h5', {'cube': (CUBE, {'scale_factor': factors[:4]})}), '4 nodata values, gains or offsets for 6 bands', axes='chw')


def test_a_list_of_good_bands_may_be_one_of_truth_values(tmp_path):
    assert read(h5(tmp_path / 'a.h5', {'cube': CUBE, 'bbl': np.arange(C) != 2}), axes='chw').bands == [0, 1, 3, 4, 5]


def test_values_that_are_no_whole_numbers_are_not_taken_for_labels(tmp_path):
    scene = read(savemat(tmp_path / 'a.mat', {'img': HWC, 'mean_map': HWC.mean(2)}))
    assert scene.labels is None and told(scene, 'WARNING', '"mean_map" is not taken for labels')
    scene = read(savemat(tmp_path / 'b.mat', {'img': HWC, 'mean_map': HWC.mean(2), 'gt': LABELS.astype(float)}))
    np.testing.assert_array_equal(scene.labels, LABELS)


def test_the_notes_name_the_labels_that_were_taken(tmp_path):
    path = savemat(tmp_path / 'a.mat', {'img': HWC, 'gt': LABELS})
    np.save(tmp_path / 'other.npy', LABELS[::-1])
    scene = read(path, str(tmp_path / 'other.npy'))
    assert told(scene, 'labels from', 'other.npy') and not told(scene, '"gt"') and told(read(path), 'labels from "gt"')


@pytest.mark.parametrize('chunks', [(1, 9, 11), (4, 4, 5), (6, 1, 11)])
def test_a_large_array_in_chunks_is_unpacked_once(tmp_path, chunks, monkeypatch):
    """Else each strip would unpack all chunks that it touches: hours, where a chunk is a band"""
    h5py = pytest.importorskip('h5py')
    monkeypatch.setattr(scenes, 'STRIP_BYTES', 250)
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        number = file.create_dataset('cube', data=CUBE, chunks=chunks, compression='gzip').id.get_num_chunks()
    reads = []
    original = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, '__getitem__', lambda self, key: reads.append(key) or original(self, key))
    scene = read_scene(str(tmp_path / 'a.h5'), mmap=True, axes='chw')
    np.testing.assert_array_equal(scene.cube, CUBE)
    np.testing.assert_array_equal(scene.cube[:, 2:5, 1::2], CUBE[:, 2:5, 1::2])
    assert len(reads) == number
    np.testing.assert_array_equal(read_scene(str(tmp_path / 'a.h5'), axes='chw').cube, CUBE)
    monkeypatch.setattr(scenes.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=100))
    refused(tmp_path / 'a.h5', 'unpacking takes', axes='chw', mmap=True)


def test_netcdf_names_of_axes_fill_value_scale_and_place_are_used(tmp_path):
    h5py = pytest.importorskip('h5py')
    turned = CUBE.transpose(2, 0, 1).copy()  # x, band, y
    turned[2, 1, 3] = -1
    path = h5(tmp_path / 'a.nc', {
        'refl': (turned, {'_FillValue': np.int16([-1]), 'scale_factor': 1e-4, 'add_offset': 0.5, 'grid_mapping': 'crs'}),
        'x': np.arange(W), 'y': np.arange(H), 'band': np.arange(C), 'wavelength': (NM, {'units': 'nm'}),
        'crs': (0, {'GeoTransform': '350000 30 0 5800000 0 -30', 'crs_wkt': 'PROJCS["x",AUTHORITY["EPSG","32633"]]'})})
    with h5py.File(path, 'r+') as file:
        for axis, name in enumerate(('x', 'band', 'y')):
            file[name].make_scale(name)
            file['refl'].dims[axis].attach_scale(file[name])
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, turned.transpose(1, 2, 0))
    assert scene.nodata == -1 and scene.scale == (1e-4, 0.5) and told(scene, '1.0% of the pixels are missing')
    assert tag(scene, 33922)[3:5] == (350000, 5800000) and tag(scene, 34735)[-1] == 32633


def test_wavelengths_of_a_netcdf_may_be_the_coordinate_of_its_bands(tmp_path):
    h5py = pytest.importorskip('h5py')
    for unit, factor in (('um', 1000), ('1', None)):
        path = h5(tmp_path / f'{unit}.nc', {'refl': CUBE, 'y': np.arange(H), 'x': np.arange(W), 'band': (NM / 1000, {'units': unit})})
        with h5py.File(path, 'r+') as file:
            for axis, name in enumerate(('band', 'y', 'x')):
                file[name].make_scale(name)
                file['refl'].dims[axis].attach_scale(file[name])
        scene = read(path)
        assert told(scene, '"refl", bands first')
        if factor:
            np.testing.assert_allclose(scene.wavelengths_nm, NM)
            assert told(scene, 'wavelengths 450 to 900 nm, from "band"') and not told(scene, 'no wavelengths')
        else:
            assert scene.wavelengths_nm is None and told(scene, 'no wavelengths')


def netcdf(path, array, axes, facts={}, **coordinates):
    h5py = pytest.importorskip('h5py')
    h5(path, {'refl': (array, facts), **coordinates})
    with h5py.File(path, 'r+') as file:
        for number, name in enumerate(axes):
            if name not in file:
                file[name] = np.arange(array.shape[number])
            file[name].make_scale(name)
            file['refl'].dims[number].attach_scale(file[name])
    return path


WKT = 'PROJCS["x",UNIT["metre",1],AUTHORITY["EPSG","32633"]]'


@pytest.mark.parametrize('kind, words', [
    ('metres', 'UTM zone 33N, pixels of 30 m, upper left corner at 350000, 5800000'), ('km', 'UTM zone 33N, pixels of 30 m, upper left corner at 350000, 5800000'),
    ('degrees', 'EPSG:4326, pixels of 0.5 degrees, upper left corner at 12, 50'), ('uneven', 'no georeference'), ('counted', 'no georeference')])
def test_evenly_spaced_coordinates_are_a_place(kind, words, tmp_path):
    names = ['wavelength', 'lat', 'lon'] if kind == 'degrees' else ['wavelength', 'y', 'x']
    x, y, unit, facts = 350015 + 30.0 * np.arange(W), 5799985 - 30.0 * np.arange(H), 'm', {'grid_mapping': 'crs'}
    if kind == 'degrees':
        x, y, unit, facts = (12.25 + 0.5 * np.arange(W)).astype(np.float32), (49.75 - 0.5 * np.arange(H)).astype(np.float32), 'degrees_north', {}
    elif kind == 'km':
        x, y, unit = x / 1000, y / 1000, 'km'
    elif kind == 'uneven':
        y[-1] -= 5
    elif kind == 'counted':
        x, y, unit, facts = np.arange(W), np.arange(H), '1', {}
    path = netcdf(tmp_path / 'a.nc', CUBE, names, facts, crs=(0, {'crs_wkt': WKT}), wavelength=NM,
                  **{names[1]: (y, {'units': unit}), names[2]: (x, {'units': unit})})
    scene = read(path)
    assert told(scene, words), scene.notes
    np.testing.assert_allclose(scene.wavelengths_nm, NM)


def test_a_counted_axis_is_no_axis_of_wavelengths(tmp_path):
    for start in (0, 1):
        scene = read(netcdf(tmp_path / 'a.nc', CUBE, ['wavelength', 'y', 'x'], wavelength=np.arange(start, start + C)))
        assert scene.wavelengths_nm is None and told(scene, 'counts the bands')
    scene = read(write_envi(tmp_path / 'b.img', wavelength=[1, 2, 3, 4, 5, 6]))
    assert scene.wavelengths_nm is None
    scene = read(write_envi(tmp_path / 'c.img', wavelength=[450, 451, 452, 453, 454, 455]))
    assert scene.wavelengths_nm[0] == 450
    scene = read(write_envi(tmp_path / 'd.img', wavelength=NM, wavelength_units='Micrometers'))
    assert scene.wavelengths_nm is None and told(scene, 'no sensor has these')


@pytest.mark.parametrize('facts, nodata', [({'no_data_value': -9}, -9), ({'filler': -9}, None), ({'NoData': -9}, -9), ({'Data Ignore Value': -9.0}, -9), ({'missing_value': np.int16(-9)}, -9),
                                           ({'_FillValue': np.int16(-9), 'missing_value': np.int16(-8)}, -9), ({'_FillValue': np.int16(-9), 'missing_value': np.int16(-9)}, -9)])
def test_nodata_in_the_spellings_of_hdf5(facts, nodata, tmp_path):
    scene = read(h5(tmp_path / 'a.h5', {'cube': (HWC, facts)}))
    assert scene.nodata == nodata
    assert told(scene, 'WARNING', '-9 and -8', '-9 is used') == (facts.get('missing_value') == -8)


def test_scales_in_the_spellings_of_hdf5_and_what_is_not_used(tmp_path):
    for facts, factor in (({'Scale_Factor': 10000.0}, 1e-4), ({'Scale Factor': 10000.0}, 1e-4), ({'Scale_Factor': 1e-4}, 1e-4), ({'scale_factor': 2.0}, 2)):
        assert read(h5(tmp_path / 'a.h5', {'cube': (HWC, facts)})).scale == (factor, 0)
    scene = read(h5(tmp_path / 'a.h5', {'cube': (HWC, {'valid_range': np.int16([0, 9])})}))
    assert told(scene, 'WARNING', 'validrange')


@pytest.mark.parametrize('kind', ['i1', '<i2', '>i2'])
def test_signed_numbers_that_are_meant_unsigned(kind, tmp_path):
    """NetCDF's _Unsigned, and the filler that is then unsigned as well"""
    signed = (np.arange(6 * 9 * 11) % 250 - 125).reshape(9, 11, 6).astype(kind)
    unsigned = signed.view(kind.replace('i', 'u'))
    for facts, expected in (({'_Unsigned': 'true', '_FillValue': np.array(-1, kind)}, unsigned), ({'_Unsigned': 'false', '_FillValue': np.array(-1, kind)}, signed)):
        scene = read(h5(tmp_path / 'a.h5', {'cube': (signed, facts)}))
        np.testing.assert_array_equal(np.asarray(scene.cube), expected.transpose(2, 0, 1))
        assert scene.nodata == (-1 if expected is signed else 256 ** signed.itemsize - 1)


def test_an_axis_of_one_time_is_taken_off_and_of_several_the_arrays_are_listed(tmp_path):
    scene = read(netcdf(tmp_path / 'a.nc', CUBE[None], ['time', 'band', 'y', 'x'], crs=(0, {})))
    np.testing.assert_array_equal(scene.cube, CUBE)
    assert told(scene, 'bands first, as the file states')
    refused(h5(tmp_path / 'b.h5', {'cube': np.stack([CUBE, CUBE])}), 'cube (2 x 6 x 9 x 11')
    labels = read(h5(tmp_path / 'c.h5', {'cube': HWC, 'gt': LABELS[..., None]})).labels
    np.testing.assert_array_equal(labels, LABELS)


def test_a_neon_reflectance_file(tmp_path):
    data = HWC.copy()
    data[0] = -9999
    site = 'SJER/Reflectance'
    path = h5(tmp_path / 'NEON_reflectance.h5', {
        f'{site}/Reflectance_Data': (data, {'Data_Ignore_Value': -9999.0, 'Scale_Factor': 10000.0}),
        f'{site}/Metadata/Spectral_Data/Wavelength': (NM, {'Units': 'nanometers'}), f'{site}/Metadata/Spectral_Data/FWHM': np.full(C, 5.0),
        f'{site}/Metadata/Coordinate_System/Map_Info': np.bytes_('UTM,  1.000, 1.000, 257000.0, 4112000.0, 1.0, 1.0, 11, North, WGS-84, units=Meters, 0'),
        f'{site}/Metadata/Ancillary_Imagery/Haze_Cloud_Water_Map': LABELS, f'{site}/Metadata/Ancillary_Imagery/Path_Length': CUBE[0]})
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, data.transpose(2, 0, 1))
    np.testing.assert_allclose(scene.wavelengths_nm, NM)
    assert scene.nodata == -9999 and scene.scale == (1e-4, 0) and scene.fwhm_nm == [5.0] * C and scene.labels is None
    assert tag(scene, 33922)[3:5] == (257000, 4112000) and tag(scene, 34735)[-1] == 32611


# ------------ agencies' products, in the layout that their descriptions state ------------

def prisma(path, level, rows=8, cols=7, **extra):
    """A PRISMA file: VNIR of 5 bands (the first of which was never recorded), SWIR of 4, both from long to short waves -> the file, its numbers by wavelength"""
    rng = np.random.default_rng(1)
    vnir_nm, swir_nm = np.array([0, 970, 850, 650, 410.]), np.array([2490, 1500, 1000, 940.])
    numbers = rng.integers(1, 60000, (rows, 9, cols)).astype(np.uint16)
    numbers[:, :, 0] = 0  # outside of the image
    numbers[3, 2, 3] = 0  # one failed value
    if level != 'L1':
        numbers[:, 6] = 0  # the band of water vapour, 1500 nm
    nm = np.concatenate([vnir_nm, swir_nm])
    attrs = {'List_Cw_Vnir': vnir_nm, 'List_Cw_Swir': swir_nm, 'List_Cw_Vnir_Flags': np.uint8([0, 1, 1, 1, 1]), 'List_Cw_Swir_Flags': np.uint8([1] * 4),
             'List_Fwhm_Vnir': np.arange(5.0), 'List_Fwhm_Swir': np.arange(5, 9.0), 'Epsg_Code': 32633,
             'Product_ULcorner_easting': 350015.0, 'Product_ULcorner_northing': 5800015.0,
             'Product_LRcorner_easting': 350015.0 + 30 * (cols - 1), 'Product_LRcorner_northing': 5800015.0 - 30 * (rows - 1)}
    if level == 'L1':
        attrs |= {'ScaleFactor_Vnir': 100.0, 'ScaleFactor_Swir': 200.0, 'Offset_Vnir': 0.0, 'Offset_Swir': 1.0}
    else:
        attrs |= {'L2ScaleVnirMin': 0.0, 'L2ScaleVnirMax': 1.2, 'L2ScaleSwirMin': 0.1, 'L2ScaleSwirMax': 0.9}
    fields = f'HDFEOS/SWATHS/PRS_{level}_HCO/Data Fields'
    h5(path, {f'{fields}/VNIR_Cube': numbers[:, :5], f'{fields}/SWIR_Cube': numbers[:, 5:], f'{fields}/VNIR_PIXEL_L2_ERR_MATRIX': numbers[:, :5].astype(np.uint8),
              f'HDFEOS/SWATHS/PRS_{level}_PCO/Data Fields/Cube': numbers[:, 0]}, **{**attrs, **extra})
    order = np.argsort(nm)[1:]
    return str(path), numbers[:, order].transpose(1, 0, 2).astype(np.float64), order


def test_prisma_l2d_is_one_cube_in_the_order_of_wavelengths_with_its_place(tmp_path):
    path, numbers, order = prisma(tmp_path / 'PRS_L2D_STD_1.he5', 'L2D')
    scene = read(path)
    swir = (order >= 5)[:, None, None]
    expected = np.where(swir, 0.1 + numbers * 0.8 / 65535, numbers * 1.2 / 65535)
    expected[:, :, 0] = np.nan
    kept = [0, 1, 2, 3, 4, 5, 7]  # without 1500 nm
    np.testing.assert_allclose(scene.cube, expected[kept], rtol=1e-5)
    assert scene.wavelengths_nm == [410, 650, 850, 940, 970, 1000, 2490] and scene.fwhm_nm == [4, 3, 2, 8, 1, 7, 5]
    assert scene.bands == kept and told(scene, 'band 7 (1500 nm)', 'bad') and told(scene, 'L2D', 'reflectance') and told(scene, 'physical') and told(scene, 'are 0', 'failed')
    assert told(scene, '14.3% of the pixels are missing')
    assert tag(scene, 33922) == (0, 0, 0, 350000, 5800030, 0) and tag(scene, 33550)[:2] == (30, 30) and tag(scene, 34735)[-1] == 32633
    assert len(read(path, keep_bad_bands=True).cube) == 8
    path, *_ = prisma(tmp_path / 'PRS_L2D_STD_2.he5', 'L2D', Product_LRcorner_easting=360000.0)
    assert read(path).geotags == ()  # corners of another image


def test_prisma_l1_is_radiance_in_the_geometry_of_the_sensor(tmp_path):
    path, numbers, order = prisma(tmp_path / 'PRS_L1_STD_1.he5', 'L1')
    scene = read(path)
    expected = np.where((order >= 5)[:, None, None], numbers / 200 - 1, numbers / 100)
    expected[:, :, 0] = np.nan
    np.testing.assert_allclose(scene.cube, expected, rtol=1e-5)
    assert scene.geotags == () and len(scene.cube) == 8 and told(scene, 'radiance')
    for level, quantity in (('L2B', 'radiance'), ('L2C', 'reflectance')):
        assert told(read(prisma(tmp_path / f'PRS_{level}_STD_1.he5', level)[0]), f'PRISMA {level}, {quantity}')


def test_emit_bands_fill_value_and_missing_map(tmp_path):
    data = (HWC / 4000).astype(np.float32)
    data[1] = -9999
    path = h5(tmp_path / 'EMIT_L2A_RFL_001.nc', {
        'reflectance': (data, {'_FillValue': np.float32([-9999])}), 'sensor_band_parameters/wavelengths': (NM.astype(np.float32), {'units': 'nm'}),
        'sensor_band_parameters/fwhm': np.full(C, 8.5), 'sensor_band_parameters/good_wavelengths': np.uint8([1, 1, 1, 0, 1, 1]),
        'location/glt_x': np.zeros((12, 13), np.int32), 'location/glt_y': np.zeros((12, 13), np.int32), 'location/lon': np.zeros((H, W))},
        geotransform=np.array([12.0, 0.0005, 0, 50, 0, -0.0005]), spatial_ref='GEOGCS["WGS 84"]')
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, np.delete(data.transpose(2, 0, 1), 3, 0))
    assert scene.bands == [0, 1, 2, 4, 5] and scene.nodata == -9999 and scene.fwhm_nm == [8.5] * 5
    np.testing.assert_allclose(scene.wavelengths_nm, np.delete(NM, 3), rtol=1e-6)
    assert scene.geotags == () and told(scene, 'glt', 'not applied') and told(scene, '11.1% of the pixels are missing')


def tiff(path, cube, nodata=None, geotags=()):
    tags = [(*found, True) for found in geotags] + ([(42113, 's', 0, str(nodata), True)] if nodata is not None else [])
    tifffile.imwrite(path, cube, photometric='minisblack', planarconfig='separate', extratags=tags)
    return str(path)


def enmap(path, nm, gains, offsets=None, vnir=3):
    bands = ''.join(f'<bandID number="{number}"><wavelengthCenterOfBand>{nm[number - 1]}</wavelengthCenterOfBand><FWHMOfBand>{number}.5</FWHMOfBand>'
                    f'<GainOfBand>{gains[number - 1]}</GainOfBand><OffsetOfBand>{(offsets or [0] * len(nm))[number - 1]}</OffsetOfBand></bandID>'
                    for number in range(len(nm), 0, -1))  # their number counts, not their order
    path.write_text(f'<?xml version="1.0" encoding="UTF-8"?><level_X xmlns="http://eoweb.dlr.de"><base/><product><image><vnir><channels>{vnir}</channels></vnir></image>'
                    f'</product><specific><backgroundValue>-32768</backgroundValue><bandCharacterisation>{bands}</bandCharacterisation></specific></level_X>')


def test_enmap_l2a_has_its_bands_from_metadata_xml(tmp_path):
    cube = CUBE.copy()
    cube[:, :2] = -32768
    cube[4] = -32768  # a band of water vapour
    path = tiff(tmp_path / 'ENMAP01-L2A-DT1-SPECTRAL_IMAGE.TIF', cube, -32768)
    assert read(path).wavelengths_nm is None and told(read(path), 'METADATA.XML', 'not there')
    enmap(tmp_path / 'ENMAP01-L2A-DT1-METADATA.XML', NM, [1e-4] * C)
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, np.delete(cube, 4, 0))
    np.testing.assert_allclose(scene.wavelengths_nm, np.delete(NM, 4))
    assert scene.fwhm_nm == [1.5, 2.5, 3.5, 4.5, 6.5] and scene.scale == (1e-4, 0) and scene.nodata == -32768
    assert told(scene, 'band 5 (810 nm)', 'without one value') and told(scene, '22.2% of the pixels are missing')
    enmap(tmp_path / 'ENMAP01-L2A-DT1-METADATA.XML', NM[:3], [1e-4] * 3)
    refused(path, '3 bands', 'METADATA.XML')


def test_enmap_l1_detectors_and_gains(tmp_path):
    nm, gains, offsets = [500, 700, 990, 920, 1010, 1100], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 0, 0, 1, 1, 1]
    enmap(tmp_path / 'ENMAP01-L1B-DT1-METADATA.XML', nm, gains, offsets)
    for name, own in (('VNIR', slice(0, 3)), ('SWIR', slice(3, 6))):
        scene = read(tiff(tmp_path / f'ENMAP01-L1B-DT1-SPECTRAL_IMAGE_{name}.TIF', CUBE[own]))
        assert scene.wavelengths_nm == nm[own]
        np.testing.assert_allclose(scene.cube, CUBE[own] * np.array(gains[own])[:, None, None] + offsets[own.start], rtol=1e-5)
    # both in one file: two detectors overlap
    enmap(tmp_path / 'ENMAP01-L1C-DT1-METADATA.XML', nm, gains)
    scene = read(tiff(tmp_path / 'ENMAP01-L1C-DT1-SPECTRAL_IMAGE.TIF', CUBE))
    assert scene.wavelengths_nm == sorted(nm) and scene.bands == [0, 1, 3, 2, 4, 5] and told(scene, '2 detectors overlap')
    np.testing.assert_allclose(scene.cube, (CUBE * np.array(gains)[:, None, None])[[0, 1, 3, 2, 4, 5]], rtol=1e-5)


def test_desis_has_its_bands_from_metadata_xml(tmp_path):
    bands = ''.join(f'<band><bandNumber>{number}</bandNumber><wavelengthCenterOfBand>{NM[number - 1]}</wavelengthCenterOfBand><wavelengthWidthOfBand>3.5'
                    f'</wavelengthWidthOfBand><response>0.1, 0.9</response><gainOfBand>0.0001</gainOfBand><offsetOfBand>0</offsetOfBand></band>' for number in range(1, C + 1))
    (tmp_path / 'DESIS-HSI-L2A-DT1-METADATA.xml').write_text(
        f'<hsi_doc><specific><bandCharacterisation>{bands}</bandCharacterisation><interiorOrientation><band/></interiorOrientation></specific></hsi_doc>')
    cube = CUBE.copy()
    cube[:, 0] = -32768
    path = tiff(tmp_path / 'DESIS-HSI-L2A-DT1-SPECTRAL_IMAGE.tif', cube)
    scene = read(path)
    np.testing.assert_array_equal(scene.cube, cube)
    np.testing.assert_allclose(scene.wavelengths_nm, NM)
    assert scene.fwhm_nm == [3.5] * C and scene.scale == (1e-4, 0) and scene.nodata == -32768 and told(scene, '11.1% of the pixels are missing')
    # its ENVI header, which belongs to the TIFF
    (tmp_path / 'DESIS-HSI-L2A-DT1-SPECTRAL_IMAGE.hdr').write_text(
        f'ENVI\nsamples = {W}\nlines = {H}\nbands = {C}\ndata type = 2\ninterleave = bip\nfile type = TIFF\nwavelength = {{{", ".join(map(str, NM))}}}\n')
    np.testing.assert_array_equal(read(path.replace('.tif', '.hdr')).cube, cube)


def test_what_envi_says_of_a_tiff_in_a_header_beside_it_is_used(tmp_path):
    path = tiff(tmp_path / 'a.tif', CUBE, -5, geotags=read(write_envi(tmp_path / 'place.img', map_info=UTM)).geotags)
    text = f'ENVI\nsamples = {W}\nlines = {H}\nbands = {C}\ndata type = 2\ninterleave = bsq\nbbl = {{1, 1, 0, 1, 1, 1}}\nwavelength = {{{", ".join(map(str, NM))}}}\n'
    for kind, kept in (('file type = TIFF\n', [0, 1, 3, 4, 5]), ('', None)):  # the header of another image of that name
        (tmp_path / 'a.hdr').write_text(text + kind)
        scene = read(path)
        assert scene.bands == kept and bool(scene.wavelengths_nm) == bool(kept) and scene.nodata == -5 and told(scene, 'UTM zone 33N')
    metadata = ''.join(f'<Item name="wavelength" sample="{band}">{nm}</Item>' for band, nm in enumerate(NM))
    tiff(tmp_path / 'a.tif', CUBE, -5, [(42112, 's', 0, f'<GDALMetadata>{metadata}</GDALMetadata>')])
    (tmp_path / 'a.hdr').write_text('ENVI\nfile type = TIFF\nbbl = {1, 1, 0, 1, 1, 1}\n')  # what it does not say is the TIFF's
    np.testing.assert_allclose(read(path).wavelengths_nm, np.delete(NM, 2))
    (tmp_path / 'a.hdr').write_text('NROWS 9\nNCOLS 11\n')  # of other programs
    np.testing.assert_array_equal(read(path).cube, CUBE)


def test_axes_that_the_file_states_otherwise_are_refused(tmp_path):
    tif = tiff(tmp_path / 'a.tif', CUBE)
    envi = write_envi(tmp_path / 'b.img', interleave='bil')
    for path, stated, other in ((tif, 'chw', 'hwc'), (envi, 'hcw', 'chw')):
        refused(path, f'--axes={other}', path, f'states that its axes are {stated}', axes=other)
        np.testing.assert_array_equal(read(path, axes=stated).cube, CUBE)


def test_a_missing_reader_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'h5py', None)
    (tmp_path / 'a.h5').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))
    refused(tmp_path / 'a.h5', 'pip install h5py')
    (tmp_path / 'a.mat').write_bytes(b'MATLAB 7.3 MAT-file'.ljust(512) + b'\x89HDF\r\n\x1a\n')
    refused(tmp_path / 'a.mat', 'pip install h5py')
    monkeypatch.setitem(sys.modules, 'scipy', None)
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    (tmp_path / 'b.mat').write_bytes(b'MATLAB 5.0')
    refused(tmp_path / 'b.mat', 'pip install scipy')
