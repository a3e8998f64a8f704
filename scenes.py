"""From the files of sensors and programs to a Scene; other bands; the place on the earth.

read_scene() reads GeoTIFF, NumPy, MATLAB and ENVI files. resample_bands() brings a cube from one
sensor's wavelengths to another's. Whatever a file does wrong becomes one sentence (UserError).
data.py and tools/ use this module; the experiments see tiles only.

Shapes: C bands, H rows, W columns; C' bands asked for.
"""
import logging
import math
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import torch

# band centres of the OHS satellites, nm
OHS_NM = (466, 480, 500, 520, 536, 550, 566, 580, 596, 610, 626, 640, 656, 670, 686, 700,
          716, 730, 746, 760, 776, 790, 806, 820, 836, 850, 866, 880, 896, 910, 926, 940)
# names for --bands; behind a centre its width (FWHM), where it is not 15 nm
BAND_SETS = {
    'ohs': ','.join(str(nm) for nm in OHS_NM),
    'landsat': '485:70,560:80,660:60,830:140,1650:200,2215:270',  # reflective bands, Landsat 5, 7
}
# GeoTIFF tags: pixel scale, tie points, transformation; keys, their numbers and their texts
GEOTAGS = (33550, 33922, 34264, 34735, 34736, 34737)
GDAL_NODATA = 42113
NO_CLASS = ('unlabelled', 'unlabeled', 'undefined', 'background')  # names that label 0 may have


class UserError(ValueError):
    """A user's mistake or a bad file, as one sentence: where, what, what to do.

    The scripts print it without a traceback.
    """


class Scene(NamedTuple):
    cube: np.ndarray  # (C, H, W) in the file's own type
    labels: np.ndarray  # (H, W) uint8, 0 = unlabelled; or None
    wavelengths_nm: list  # of length C; or None
    nodata: float  # value that marks missing pixels; or None. NaN always does
    class_names: list  # names of classes 1, 2, ...; or None
    geotags: tuple = ()  # GeoTIFF tags (code, type, count, value) of its place; () = none


def one_line(error):
    return ' '.join(str(error).split())[:160] or 'no further reason given'


def shape_text(array):
    return ' x '.join(str(side) for side in array.shape)


def valid_pixels(x, nodata, band_dim=-3):
    """True where a pixel is real: all bands finite and not all equal to `nodata`.

    x: numpy or torch, any leading dimensions; the dimension of the bands goes.
    """
    library = torch if isinstance(x, torch.Tensor) else np
    valid = library.isfinite(x).all(band_dim)
    if nodata is None:
        return valid
    return valid & ~(x == nodata).all(band_dim)


# ============ reading a scene ============

def read_scene(path, labels='', mmap=False):
    """Read a scene from a .tif, .npz, .npy, .mat or ENVI .hdr file.

    A .tif states its axes; arrays of the others are (H, W, C), the habit of the field. An .npz
    holds `cube` and, if known, `labels`, `wavelengths_nm`, `class_names`, `nodata`; a .mat its
    largest 3-d array, and labels as a 2-d array of the same H x W. `labels` names a second file,
    of labels. With `mmap`, .tif and .npy stay on disk (compressed .tif are unpacked into a
    temporary file) unless their type has to be converted. Raises UserError naming the file.
    """
    scene = read_file(path, mmap)
    if labels:
        raw = read_labels(labels)
        if raw.shape != scene.cube.shape[1:]:
            raise UserError(f'{labels}: labels of {shape_text(raw)} pixels for an image of '
                            f'{shape_text(scene.cube[0])} ({path}): give the label file of the '
                            'same scene')
        scene = scene._replace(labels=raw)
    if scene.labels is not None:
        scene = scene._replace(labels=checked_labels(scene.labels, labels or path))
    scene = scene._replace(cube=checked_cube(scene.cube, path))
    if scene.wavelengths_nm:
        nm = checked_wavelengths(scene.wavelengths_nm, path, len(scene.cube))
        scene = scene._replace(wavelengths_nm=nm.tolist())
    return scene


def read_file(path, mmap):
    """The file as its reader gives it -> Scene, not checked yet"""
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such file: check the path')
    if os.path.getsize(path) == 0:
        raise UserError(f'{path}: the file is empty: copy it again')
    ending = os.path.splitext(path)[1].lower()
    if ending not in READERS:
        raise UserError(f'{path}: files of type "{ending}" are not read: convert it to one of '
                        f'{", ".join(READERS)}')
    try:
        return READERS[ending](path, mmap)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f'{path}: reading it needs a package that is missing: '
                        f'pip install {error.name}') from None
    except Exception as error:  # whatever a damaged file makes a reader do
        raise UserError(f'{path}: cannot be read ({type(error).__name__}: {one_line(error)}): '
                        'copy or convert it again') from None


def read_labels(path):
    """A file of labels -> (H, W), not checked yet; its nodata value becomes 0"""
    scene = read_scene(path)
    if scene.labels is not None:
        return scene.labels
    first_band = scene.cube[0]
    return np.where(first_band == scene.nodata, 0, first_band)


def checked_cube(cube, path):
    """Refuses what is no image. Integers of up to 16 bits stay, wider ones become float32."""
    if cube.ndim != 3 or min(cube.shape) == 0:
        raise UserError(f'{path}: an image of shape {shape_text(cube)} is not bands x rows x '
                        'columns: give a 3-d array')
    if cube.dtype.kind not in 'iuf':
        raise UserError(f'{path}: values of type {cube.dtype} are not supported: save it as '
                        'integers or floats')
    small_integers = cube.dtype.kind in 'iu' and cube.dtype.itemsize <= 2
    dtype = cube.dtype.newbyteorder('=') if small_integers else np.float32
    return cube.astype(dtype, copy=False)


def checked_labels(labels, path):
    if labels.dtype.kind == 'f' and (labels == np.round(labels)).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in 'iub':
        raise UserError(f'{path}: labels of type {labels.dtype} are not class numbers: save them '
                        'as whole numbers')
    if labels.min() < 0 or labels.max() > 254:
        raise UserError(f'{path}: labels run from {labels.min()} to {labels.max()}: use 0 for '
                        'unlabelled and 1 to 254 for classes')
    return labels.astype(np.uint8)


# ============ GeoTIFF ============

def read_tiff(path, mmap):
    import tifffile
    logging.getLogger('tifffile').setLevel(logging.CRITICAL)  # we say it in our own sentences
    # a name inside the file opens no other file
    with tifffile.TiffFile(path, _multifile=False, is_mmstack=False, is_ndtiff=False) as tif:
        series = tif.series[0]
        check_tiff_sizes(path, series)
        try:
            image = series.asarray(out='memmap' if mmap else None)
        except ValueError as error:
            if 'imagecodecs' not in str(error):
                raise
            compression = one_line(error).split('>')[0].strip('<')
            raise UserError(f'{path}: its compression ({compression}) needs one more package: '
                            'pip install imagecodecs') from None
        tags = series.keyframe.tags
        nodata = float(tags[GDAL_NODATA].value) if GDAL_NODATA in tags else None
        found = [tags[code] for code in GEOTAGS if code in tags]
        geotags = tuple((tag.code, int(tag.dtype), tag.count, tag.value) for tag in found)
        axes = series.axes
    if nodata is not None and math.isnan(nodata):
        nodata = None
    if image.ndim == 2:  # one band
        axes = 'S' + axes
        image = image[None]
    if image.ndim != 3 or 'Y' not in axes or 'X' not in axes:
        raise UserError(f'{path}: its axes are {axes} {image.shape}: expected rows, columns and '
                        'bands only')
    cube = np.moveaxis(image, band_axis(axes, image.shape), 0)
    return Scene(cube, None, None, nodata, None, geotags)


def check_tiff_sizes(path, series):
    """Refuses a file that claims more pixels than it can hold, before memory is asked for"""
    size = os.path.getsize(path)
    if series.nbytes > 2000 * size:  # no lossless compression does better
        raise UserError(f'{path}: claims {series.nbytes / 1e9:.0f} GB of pixels in a file of '
                        f'{size} bytes: the file is damaged, copy it again')
    for page in series.pages:
        if page is None:
            continue
        for offset, count in zip(page.dataoffsets, page.databytecounts):
            if offset + count > size:
                raise UserError(f'{path}: the file is truncated: copy it again')


def band_axis(axes, shape):
    """Which of the three axes are the bands, by the letters of a TIFF's axes and their lengths"""
    letter = next(letter for letter in axes if letter not in 'YX')
    if letter != 'Q':
        return axes.index(letter)
    # written without a stated meaning, as numpy arrays are: of three sides the one that differs
    # from two equal ones, else the shortest
    if len(set(shape)) == 2:
        return next(axis for axis in range(3) if shape.count(shape[axis]) == 1)
    return int(np.argmin(shape))


# ============ NumPy, MATLAB, ENVI ============

def read_numpy(path, mmap):
    loaded = np.load(path, allow_pickle=False, mmap_mode='r' if mmap else None)
    if isinstance(loaded, np.ndarray):
        arrays = {'cube': loaded}
    else:
        known = ('cube', 'labels', 'wavelengths_nm', 'class_names', 'nodata')
        arrays = {name: loaded[name] for name in known if name in loaded}
    if 'cube' not in arrays and 'labels' in arrays:  # a file of labels only
        arrays = {'cube': arrays['labels']}
    if 'cube' not in arrays:
        raise UserError(f'{path}: holds {sorted(loaded)[:6]} but no array "cube": save the image '
                        'under that name')
    facts = {name: array.tolist() for name, array in arrays.items()
             if name not in ('cube', 'labels')}
    wavelengths = facts.get('wavelengths_nm')
    cube = arrays['cube']
    if cube.ndim == 2:
        cube = cube[..., None]  # one band, or labels
    if cube.ndim == 3:
        bands_first = wavelengths and len(wavelengths) == cube.shape[0] != cube.shape[2]
        cube = cube if bands_first else np.moveaxis(cube, 2, 0)
    names = facts.get('class_names')
    if names and names[0].lower() in NO_CLASS:
        names = names[1:]
    return Scene(cube, arrays.get('labels'), wavelengths, facts.get('nodata'), names)


READ_MAT = """
import sys, numpy, scipy.io
arrays = [a for a in scipy.io.loadmat(sys.argv[1]).values()
          if isinstance(a, numpy.ndarray) and a.dtype.kind in 'iuf' and a.ndim in (2, 3)]
numpy.savez(sys.argv[2], *arrays)
"""


def load_mat(path):
    """The numeric arrays of a .mat file, 2-d and 3-d. They are read in a process of its own:
    scipy's reader crashes the whole process on some damaged files."""
    import scipy.io  # noqa: F401  where it is missing, say so before a process is started
    with tempfile.TemporaryDirectory() as folder:
        kept = os.path.join(folder, 'arrays.npz')
        done = subprocess.run([sys.executable, '-c', READ_MAT, path, kept], capture_output=True,
                              text=True, errors='replace')
        if 'NotImplementedError' in done.stderr:
            raise UserError(f'{path}: MATLAB 7.3 files are not read: save it again with '
                            'save(..., "-v7")')
        if done.returncode or not os.path.exists(kept):
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f'the reader crashed, code {done.returncode}'
            raise UserError(f'{path}: cannot be read ({one_line(reason)}): copy or convert it '
                            'again')
        return list(np.load(kept).values())


def read_mat(path, mmap):
    arrays = load_mat(path)
    cubes = [array for array in arrays if array.ndim == 3]
    flat = [array for array in arrays if array.ndim == 2 and min(array.shape) > 1]
    if not cubes and len(flat) != 1:
        raise UserError(f'{path}: holds no 3-d array: give the file with the image as the root, '
                        'the labels with --labels')
    if not cubes:
        return Scene(flat[0][None], None, None, None, None)
    cubes.sort(key=np.size)
    cube = np.moveaxis(cubes[-1], 2, 0)
    fitting = [array for array in flat if array.shape == cube.shape[1:]]
    return Scene(cube, fitting[0] if fitting else None, None, None, None)


def read_envi(path, mmap):
    import spectral
    image = spectral.open_image(path)
    header = image.metadata
    nodata = float(header['data ignore value']) if 'data ignore value' in header else None
    cube = image.open_memmap() if image.using_memmap else image.load(dtype=image.dtype)
    cube = np.moveaxis(np.asarray(cube), 2, 0)
    geotags = envi_geotags(header.get('map info', []))
    return Scene(cube, None, image.bands.centers, nodata, None, geotags)


READERS = {'.tif': read_tiff, '.tiff': read_tiff, '.npz': read_numpy, '.npy': read_numpy,
           '.mat': read_mat, '.hdr': read_envi}


def envi_geotags(info):
    """ENVI's "map info" -> GeoTIFF tags; () where nothing or a rotation is stated.

    info: projection, column and row of a pixel (from 1), its x and y, width and height of a
    pixel, then for UTM zone and North or South, datum. The tags are pixel scale and tie point,
    and for UTM or longitude and latitude on WGS-84 the keys that hold their EPSG number.
    """
    info = [str(word).strip() for word in info]
    rotations = [word for word in info if word.lower().startswith('rotation')]
    if len(info) < 7 or any(float(word.split('=')[1]) for word in rotations):
        return ()
    column, row, x, y, width, height = (float(word) for word in info[1:7])
    scale = (33550, 12, 3, (width, height, 0.0))
    tie_point = (33922, 12, 6, (column - 1, row - 1, 0.0, x, y, 0.0))
    words = {word.lower() for word in info[7:]}
    if not words & {'wgs-84', 'wgs84', 'wgs 84'}:
        return scale, tie_point
    if info[0] == 'UTM':
        model, key = 1, 3072  # projected
        epsg = int(info[7]) + (32700 if info[8].lower() == 'south' else 32600)
    elif info[0] == 'Geographic Lat/Lon':
        model, key = 2, 2048  # geographic
        epsg = 4326
    else:
        return scale, tie_point
    keys = (1, 1, 0, 3, 1024, 0, 1, model, 1025, 0, 1, 1, key, 0, 1, epsg)  # 1025: of areas
    return scale, tie_point, (34735, 3, 16, keys)


# ============ bands: from one sensor's wavelengths to another's ============

FARTHEST_NM = 50.0  # a band so far from every band of the source would be invented


def checked_wavelengths(wavelengths, where, bands=None):
    """Wavelengths of `bands` bands -> (C,) float64 in nm.

    All below 100 are micrometres, as in many ENVI files: converted.
    """
    try:
        nm = np.asarray(wavelengths, float)
    except (TypeError, ValueError):
        raise UserError(f'{where}: its wavelengths are not numbers ({str(wavelengths)[:60]}): '
                        'correct them') from None
    if nm.ndim != 1 or (bands is not None and len(nm) != bands):
        raise UserError(f'{where}: has {nm.size} wavelengths for {bands or "its"} bands: give one '
                        'for each')
    wrong = ~(np.isfinite(nm) & (nm > 0))
    if wrong.any():
        raise UserError(f'{where}: {wrong.sum()} of its {len(nm)} wavelengths are missing (no '
                        'numbers above 0): correct them, or leave those bands out')
    return nm * 1000 if len(nm) and nm.max() < 100 else nm


def parse_bands(text):
    """--bands= -> wavelengths (C',) and widths (C',) in nm.

    text: a name of BAND_SETS, or '485:70,560', a width (FWHM) behind a centre that has not 15 nm
    """
    centres, widths = [], []
    try:
        for band in BAND_SETS.get(text, text).split(','):
            centre, width = band.split(':') if ':' in band else (band, 15)
            centres.append(float(centre))
            widths.append(float(width))
    except ValueError:
        raise UserError(f'--bands={text}: give wavelengths in nm separated by commas, as '
                        '485:70,560 (a width after a colon), or '
                        f'{" or ".join(BAND_SETS)}') from None
    fwhm = np.array(widths)
    if not (np.isfinite(fwhm) & (fwhm >= 1)).all():
        raise UserError(f'--bands={text}: a width of {fwhm.min():g} nm: give widths of 1 nm and '
                        'more')
    return checked_wavelengths(centres, f'--bands={text}'), fwhm


def same_bands(from_nm, to_nm):
    """Are these the same bands in the same order, to 1 nm?"""
    return len(from_nm) == len(to_nm) and np.allclose(from_nm, to_nm, rtol=0, atol=1)


def check_reach(source, to_nm, where):
    """Refuses bands that the sorted wavelengths `source` do not reach"""
    step = np.diff(source)
    before = min(FARTHEST_NM, step[0] / 2) if len(step) else 0.0
    behind = min(FARTHEST_NM, step[-1] / 2) if len(step) else 0.0
    distance = np.abs(to_nm[:, None] - source).min(1)
    far = distance > FARTHEST_NM  # in a hole of the source
    far |= to_nm < source[0] - before - 1
    far |= to_nm > source[-1] + behind + 1
    if far.any():
        named = ', '.join(f'{nm:.0f}' for nm in to_nm[far][:6])
        raise UserError(f'{where}: has {len(source)} bands from {source[0]:.0f} to '
                        f'{source[-1]:.0f} nm, none near {named} nm: choose bands inside its '
                        'range and not in a hole of it')


def band_matrix(from_nm, to_nm, fwhm=15.0, where='the scene'):
    """Weights (C', C) that bring bands at `from_nm` (C,) to `to_nm` (C',), nm or micrometres, in
    any order; rows add up to 1.

    A Gaussian response of `fwhm` nm, one for all or (C',), where the source's steps are finer
    than that all over the response. A source band counts with its share of the wavelengths: where
    detectors overlap, bands stand closer. Linear interpolation elsewhere: in a coarser source, in
    and beside a hole (dropped water bands), at the ends, and where both sets are the same, which
    gives the bands back. Source bands at one wavelength count as their mean. Refused: a band more
    than 50 nm from every source band, or beyond the last one by more than half a step. The
    source's own response is not taken out: the result has both.
    """
    from_nm = checked_wavelengths(from_nm, where)
    source, which = np.unique(from_nm, return_inverse=True)
    to_nm = checked_wavelengths(to_nm, 'the bands asked for')
    check_reach(source, to_nm, where)
    fwhm = np.broadcast_to(fwhm, to_nm.shape)[:, None]  # (C', 1)
    step = np.diff(source)

    # where is the source fine enough for a Gaussian?
    low = to_nm[:, None] - fwhm / 2  # ends of the response, (C', 1)
    high = to_nm[:, None] + fwhm / 2
    outside = (source[1:] <= low) | (source[:-1] >= high)  # steps it does not touch, (C', C - 1)
    fine = ((step <= fwhm) | outside).all(1)
    fine &= (low >= source[0])[:, 0] & (high <= source[-1])[:, 0]
    if same_bands(source, np.sort(to_nm)):
        fine[:] = False

    # half of each step counts for the band below it, half for the one above
    half = np.minimum(step, fwhm) / 2  # (C', C - 1)
    share = np.pad(half, ((0, 0), (0, 1))) + np.pad(half, ((0, 0), (1, 0)))
    gauss = share * np.exp(-4 * np.log(2) * ((to_nm[:, None] - source) / fwhm) ** 2)
    gauss = gauss / gauss.sum(1, keepdims=True).clip(1e-300)
    linear = np.stack([np.interp(to_nm, source, row) for row in np.eye(len(source))], 1)
    weights = np.where(fine[:, None], gauss, linear)

    # bands of one wavelength share its weight
    same = which == np.arange(len(source))[:, None]
    return weights @ (same / np.bincount(which)[:, None])


def resample_bands(x, from_nm, to_nm, fwhm=15.0):
    """x (C, H, W) at band centres `from_nm` -> (C', H, W) float32 at `to_nm`, as band_matrix().

    Raises UserError where the source does not reach, and for wavelengths that are missing or not
    as many as bands.
    """
    weights = band_matrix(checked_wavelengths(from_nm, 'the scene', len(x)), to_nm, fwhm)
    return np.tensordot(weights.astype(np.float32), x.astype(np.float32), 1)


def mix_bands(scene, weights, wavelengths_nm=None):
    """-> the Scene whose bands are weighted sums, weights (C', C), of those of `scene`, as float32;
    missing pixels NaN"""
    cube = scene.cube.astype(np.float32)
    cube[:, ~valid_pixels(scene.cube, scene.nodata)] = np.nan
    mixed = np.tensordot(weights.astype(np.float32), cube, 1)
    return scene._replace(cube=mixed, wavelengths_nm=wavelengths_nm, nodata=None)
