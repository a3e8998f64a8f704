"""From the files of sensors and programs to a Scene; other bands; the place on the earth.

read_scene() reads GeoTIFF, NumPy, MATLAB, HDF5 and ENVI files. A reader for each family fetches
what a file states; what it means for values, bands and labels is settled behind them, in one place
and alike for all, and said in plain sentences, scene.notes. Whatever a file does wrong becomes one
sentence too (UserError). resample_bands() brings a cube from one sensor's wavelengths to another's.
data.py and tools/ use this module; the experiments see tiles only.

Shapes: C bands, H rows, W columns; C' bands asked for.
"""
import collections
import contextlib
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
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
# names that label 0 may have, which means unlabelled
NO_CLASS = ('unlabelled', 'unlabeled', 'undefined', 'background', 'unclassified', 'nodata',
            'no data', 'no_data', 'none', 'void', 'ignore', 'ignored', 'unknown', '')
SAMPLE_PIXELS = 20_000  # of a scene, that tell what values it has
STRIP_BYTES = 32e6  # as much of a cube is in memory at once where it is gone through


class UserError(ValueError):
    """A user's mistake or a bad file, as one sentence: where, what, what to do.

    The scripts print it without a traceback.
    """


class Scene(NamedTuple):
    """As read_scene() gives it. A reader leaves the fields as its file states them: wavelengths in
    `unit`; nodata and scale as numbers or texts, or lists of one for each band; raw labels; names
    and colours of labels 0, 1, 2, ...; and as `bands` those that are not marked as bad."""
    cube: object  # (C, H, W): a numpy array, or a Lazy of a file that stays on disk
    labels: np.ndarray = None  # (H, W) uint8, 0 = unlabelled
    wavelengths_nm: list = None  # of length C
    nodata: float = None  # value that marks missing pixels; NaN always does
    class_names: list = None  # names of classes 1, 2, ...
    geotags: tuple = ()  # GeoTIFF tags (code, type, count, value) of its place; () = none
    fwhm_nm: list = None  # widths of the bands, where the file states them
    class_colors: list = None  # (r, g, b), 0 to 255, of classes 1, 2, ..., where it states them
    scale: tuple = None  # (factor, offset), not applied: stored * factor + offset = physical units
    bands: list = None  # numbers (from 0) of the kept bands among the file's; None = all
    notes: tuple = ()  # plain sentences: what was read, how it was understood, what was left out
    file_bands: int = None  # how many bands the file has, before any was left out
    unit: tuple = ('', '')  # of the wavelengths a reader gives, and where they are stated
    mask: np.ndarray = None  # (H, W) False where a mask of the file says missing


class Lazy:
    """(C, H, W) of a file that stays on disk: what is sliced is read.

    read(rows, cols) gives (C, h, w) for two slices, with or without a step.
    """
    ndim = 3

    def __init__(self, shape, dtype, read, row_bytes=0):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.read = read
        # a row in memory, or, where that is more, what it is computed from
        self.row_bytes = max(row_bytes, shape[0] * shape[2] * self.dtype.itemsize)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        """[bands], [bands, rows] or [bands, rows, cols]; bands an int, a slice or a list"""
        key = key if isinstance(key, tuple) else (key,)
        bands, rows, cols = key + (slice(None),) * (3 - len(key))
        if (rows.step or 1) < 0 or (cols.step or 1) < 0:
            raise IndexError('rows and columns of a file are read forwards only')
        if isinstance(bands, slice) and bands == slice(None):
            return self.read(rows, cols)
        # a few bands of a large file: what is in memory at once stays small
        blocks = [self.read(strip, cols)[bands] for strip in strips(self, rows)]
        return np.concatenate(blocks, -2)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


def strips(cube, rows=slice(None)):
    """Slices that cut the rows of a cube into strips of STRIP_BYTES"""
    start, stop, step = rows.indices(cube.shape[1])
    row_bytes = cube.shape[0] * cube.shape[2] * cube.dtype.itemsize
    if isinstance(cube, Lazy):
        row_bytes = cube.row_bytes
    height = step * max(int(STRIP_BYTES / row_bytes), 1)
    for top in range(start, max(stop, start + 1), height):
        yield slice(top, min(top + height, stop), step)


def when_read(cube, function, dtype, num_bands=None):
    """-> the cube of what function(values, rows, cols) makes of `cube`: an array at once, a Lazy
    each time that it is read, strip by strip, so that no more than one is in memory on the way"""
    if not isinstance(cube, Lazy):
        return function(cube, slice(None), slice(None)).astype(dtype, copy=False)
    C, H, W = num_bands or len(cube), *cube.shape[1:]

    def read(rows, cols):
        made = np.empty((C, len(range(H)[rows]), len(range(W)[cols])), dtype)
        done = 0
        for strip in strips(result, rows):
            block = function(cube[:, strip, cols], strip, cols)
            made[:, done:done + block.shape[1]] = block
            done += block.shape[1]
        return made
    row_bytes = cube.row_bytes * np.dtype(dtype).itemsize // cube.dtype.itemsize
    result = Lazy((C, H, W), dtype, read, row_bytes)
    return result


def take_bands(cube, kept):
    if list(kept) == list(range(len(cube))):
        return cube
    return when_read(cube, lambda x, rows, cols: x[kept], cube.dtype, len(kept))


def mapped_cube(mapped):
    """-> a Lazy of a memory-mapped array (C, H, W); mapped() maps it"""
    cube = mapped()  # a file that is too short is found here

    def read(rows, cols):
        return read_mapped(mapped, (slice(None), rows, cols))
    return Lazy(cube.shape, cube.dtype, read)


def read_mapped(mapped, key):
    """mapped()[key], three slices, of an array that mapped() maps.

    The file is mapped anew for each block. Otherwise pages already read, and up to 2 MB that the
    system loads around each, would stay counted as this process's memory.
    """
    array = mapped()
    sides = [range(length)[along] for length, along in zip(array.shape, key)]
    made = np.empty([len(side) for side in sides], array.dtype)
    outer = int(np.argmax(array.strides))  # of bands one behind the other, the bands
    number = max(int(STRIP_BYTES / array.strides[outer] / sides[outer].step), 1)
    for start in range(0, len(sides[outer]), number):
        there, here = list(key), [slice(None)] * 3
        block = sides[outer][start:start + number]
        there[outer] = slice(block.start, block.stop, block.step)
        here[outer] = slice(start, start + number)
        made[tuple(here)] = mapped()[tuple(there)]
    return made


def file_cube(file, dtype, shape, axes, offset=0):
    """-> a Lazy of the numbers that lie one behind the other in a file, a path or an open one;
    axes: of `shape`, as 'hwc'"""
    return mapped_cube(lambda: to_chw(np.memmap(file, dtype, 'r', offset, shape), axes))


def to_chw(array, axes):
    return array.transpose([axes.index(letter) for letter in 'chw'])


def unpacked_file(path, dtype, shape, blocks):
    """The packed numbers of the file `path` -> a temporary file of them, one behind the other.

    blocks: (where in the array of this shape, block, of which what lies beyond the border is cut).
    """
    folder = tempfile.gettempdir()
    size, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f'{path}: unpacking takes {size / 1e9:.1f} GB in {folder}, where '
                        f'{free / 1e9:.1f} GB are free: make room, or set TMPDIR to another folder')
    file = tempfile.TemporaryFile()
    file.truncate(size)
    written = np.inf
    for where, block in blocks:
        if written > STRIP_BYTES:  # what is mapped anew needs no memory
            numbers = np.memmap(file, dtype, 'r+', 0, shape)
            written = 0
        area = numbers[where]
        area[...] = block[tuple(slice(side) for side in area.shape)]
        written += area.nbytes
    return file


def one_line(error):
    return ' '.join(str(error).split())[:160] or 'no further reason given'


def shape_text(array):
    return ' x '.join(str(side) for side in array.shape)


def valid_pixels(x, nodata):
    """True where a pixel is real: no band is NaN, infinite or `nodata`.

    Only in 8-bit images 0 is a value like others: with nodata 0 all their bands have to be 0.
    x: numpy or torch, (..., C, H, W) -> (..., H, W).
    """
    library = torch if isinstance(x, torch.Tensor) else np
    valid = library.isfinite(x).all(-3)
    if nodata is None:
        return valid
    if nodata == 0 and x.dtype in (np.uint8, torch.uint8):
        return valid & (x != 0).any(-3)
    return valid & (x != nodata).all(-3)


# ============ reading a scene ============

def read_scene(path, labels='', mmap=False, axes='', nodata=None, drop_bands='',
               keep_bad_bands=False):
    """Read a scene; its notes say what was read, how it was understood and what was left out.

    `path` names a file of one of READERS' types, or an array in it, as file.mat:name; `labels` a
    second one, of labels. With `mmap` the cube is a Lazy: it stays on disk. `axes` ('hwc', 'chw')
    and `nodata` settle what a file leaves open. Left out are bands that the file marks as bad
    (unless `keep_bad_bands`), those of `drop_bands` ('1,5,100-110', '1380-1410nm'), and those
    without values. Raises UserError naming the file.
    """
    if nodata is not None and math.isnan(nodata):
        nodata = None  # NaN is missing in any case: what the file states holds
    scene = read_file(path, mmap, axes)
    if labels:
        found = read_labels(labels)
        check_same_place(scene, found.geotags, path, labels)
        # what its reader said of labels in the scene's own file holds no more
        notes = [note for note in scene.notes if not note.startswith('labels from')]
        warnings = [note for note in found.notes if note.startswith('WARNING')]
        scene = scene._replace(labels=found.labels, class_names=found.class_names,
                               class_colors=found.class_colors,
                               notes=(*notes, f'labels from {labels}', *warnings))
    scene = settle_wavelengths(scene, path)
    scene = settle_values(scene, path, nodata)
    with one_sentence(path):  # what stays on disk is gone through here
        scene, missing = choose_bands(scene, path, drop_bands, keep_bad_bands)
    scene = in_order(scene)
    scene = settle_labels(scene, labels or path, missing)
    return say(scene, place_text(scene.geotags))


def say(scene, *sentences):
    return scene._replace(notes=(*scene.notes, *sentences))


def split_name(path):
    """'file.mat:name' -> 'file.mat', 'name'; the name is '' where none is given"""
    if os.path.exists(path) or ':' not in path:
        return path, ''
    file, _, name = path.rpartition(':')
    return (file, name) if os.path.isfile(file) else (path, '')


def read_file(path, mmap=False, axes=''):
    """What the reader of its type makes of a file -> Scene, of which nothing is settled yet"""
    file, name = split_name(path)
    if not os.path.isfile(file):
        raise UserError(f'{path}: there is no such file: check the path')
    if os.path.getsize(file) == 0:
        raise UserError(f'{path}: the file is empty: copy it again')
    ending = os.path.splitext(file)[1].lower()
    reader = READERS.get(ending)
    if reader is None and (ending in ENVI_ENDINGS or envi_header_of(file)):
        reader = read_envi  # the data file of an ENVI image may have any name
    if reader is None:
        raise UserError(f'{path}: files of type "{ending}" are not read: convert it to one of '
                        f'{", ".join(READERS)}')
    with one_sentence(path):
        scene = reader(file, mmap, name, axes)
        return scene if mmap else scene._replace(cube=np.asarray(scene.cube))


@contextlib.contextmanager
def one_sentence(path):
    """Makes a UserError of whatever a damaged file makes a reader do"""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        package = error.name if isinstance(error, ImportError) else ''
        if 'imagecodecs' in str(error):  # tifffile's word on most compressions
            package = 'imagecodecs'
        if package:
            raise UserError(f'{path}: reading it needs a package that is missing: '
                            f'pip install {package}') from None
        raise UserError(f'{path}: cannot be read ({type(error).__name__}: {one_line(error)}): '
                        'copy or convert it again') from None


# ============ what a file states: wavelengths ============

# nm in one of each unit that files state wavelengths in
UNITS_NM = {'nm': 1, 'nanometer': 1, 'nanometre': 1, 'um': 1e3, 'micrometer': 1e3,
            'micrometre': 1e3, 'micron': 1e3, 'angstrom': 0.1, 'a': 0.1, 'mm': 1e6,
            'millimeter': 1e6, 'millimetre': 1e6, 'm': 1e9, 'meter': 1e9, 'metre': 1e9}
WAVENUMBERS = ('cm-1', 'cm^-1', '1/cm', 'wavenumber')


def settle_wavelengths(scene, path):
    """A reader's wavelengths and widths, in the file's own unit -> in nm, and a sentence"""
    C, values, widths = len(scene.cube), scene.wavelengths_nm, scene.fwhm_nm
    for what, numbers in (('wavelengths', values), ('widths', widths)):
        if numbers and len(numbers) != C:
            raise UserError(f'{path}: has {len(numbers)} {what} for {C} bands: give one for each')
    nm, sentence = to_nm(values, *scene.unit)
    if nm and widths:
        try:
            widths = (np.array(widths, float) * nm / np.array(values, float)).round(6)
            widths = np.where(np.isfinite(nm), widths, 0).tolist()  # such a band is left out
        except ValueError:
            widths = None
    return say(scene._replace(wavelengths_nm=nm, fwhm_nm=nm and widths), sentence)


def to_nm(values, unit='', where='its header'):
    """Wavelengths in a file's own unit -> list in nm, NaN = missing, or None; and a sentence.

    unit: as the file names it; '' = not stated: all below 100 are micrometres. where: said.
    """
    if values is None or len(values) == 0:
        return None, 'no wavelengths are stated'
    try:
        numbers = np.array([float(value) for value in values])
    except (TypeError, ValueError):
        return None, f'wavelengths in {where} are not numbers ({str(values)[:40]}): not used'
    name = str(unit or '').split('(')[0].strip().lower()  # 'Nanometers (nm)'
    name = name.replace('\u00b5', 'u').replace('\u03bc', 'u')
    name = name.replace('\u00e5ngstr\u00f6m', 'angstrom').replace('\u00e5', 'a')
    name = name if name in UNITS_NM else name.removesuffix('s')
    counted = len(numbers) > 1 and numbers[0] in (0, 1) and (np.diff(numbers) == 1).all()
    numbers[~(np.isfinite(numbers) & (numbers > 0))] = np.nan
    how = f'in {unit} there'
    if name in WAVENUMBERS:
        nm = 1e7 / numbers
    elif name in UNITS_NM:
        nm = numbers * UNITS_NM[name]
    elif name:
        return None, (f'wavelengths in {where} are in "{unit}", an unknown unit: not used. Write '
                      'nm or um there')
    elif counted:
        return None, f'{where} counts the bands where wavelengths belong: not used'
    elif np.nanmax(numbers, initial=0) < 100:
        nm, how = numbers * 1000, 'their unit is not stated: below 100 they are micrometres'
    else:
        nm, how = numbers, 'their unit is not stated: taken as nm'
    nm = nm.round(6)
    low, high = np.nanmin(nm, initial=np.inf), np.nanmax(nm, initial=0)
    sentence = f'wavelengths {low:.0f} to {high:.0f} nm, from {where} ({how})'
    if high and not 100 <= low <= high <= 1e5:  # ultraviolet, far infrared
        return None, f'{sentence}: no sensor has these, so they are not used'
    return nm.tolist(), sentence


# ============ what a file states: type, nodata, scale, masks ============

def read_number(text, notes):
    """A number as programs write it ('-1.#QNAN' is NaN) -> float. None where nothing is stated,
    or no number: `notes` says so then."""
    if text is None:
        return None
    words = str(text).strip(' []\0\n').lower().replace(',', '.')
    if re.fullmatch(r'[+-]?1\.#(qnan|ind|snan)0*', words):
        return math.nan
    try:
        return float(words)
    except ValueError:
        notes.append(f'"{one_line(text)}" is stated where a number belongs: not used')
        return None


def of_bands(stated, usual, notes):
    """A number, or one for each band, as stated -> a number where all are the same, else an array
    (C, 1, 1); `usual` stands for what is not stated"""
    listed = stated if isinstance(stated, (list, tuple, np.ndarray)) else [stated]
    numbers = [read_number(value, notes) for value in listed]
    numbers = [usual if number is None else number for number in numbers]
    if len(set(map(str, numbers))) == 1:
        return numbers[0]
    return np.array(numbers, np.float32)[:, None, None]


def settle_values(scene, path, nodata=None):
    """Refuses what is no image. Integers of up to 16 bits stay, wider ones become float32.

    `nodata`, where it is given, wins over the file's. NaN is none, it is always missing; neither
    is a value that this type cannot have. One scale for all bands is told and not applied. Where
    scale or nodata differ from band to band, all become physical units, float32, NaN = missing.
    """
    cube, mask, notes = scene.cube, scene.mask, []
    if cube.ndim != 3 or min(cube.shape) == 0:
        raise UserError(f'{path}: an image of shape {shape_text(cube)} is not bands x rows x '
                        'columns: give a 3-d array')
    if cube.dtype.kind not in 'iuf':
        raise UserError(f'{path}: values of type {cube.dtype} are not supported: save it as '
                        'integers or floats')
    stated = of_bands(scene.nodata if nodata is None else nodata, None, notes)
    factor, offset = scene.scale or (1, 0)
    factor, offset = of_bands(factor, 1.0, notes), of_bands(offset, 0.0, notes)

    for numbers in (stated, factor, offset):
        if np.size(numbers) not in (1, len(cube)):
            raise UserError(f'{path}: states {np.size(numbers)} nodata values, gains or offsets '
                            f'for {len(cube)} bands: state one, or one for each')

    # the type, and the value of missing pixels in it
    small_integers = cube.dtype.kind in 'iu' and cube.dtype.itemsize <= 2
    dtype = cube.dtype.newbyteorder('=') if small_integers else np.dtype(np.float32)
    differ = any(isinstance(number, np.ndarray) for number in (stated, factor, offset))
    if cube.dtype.kind in 'iu' and not small_integers:
        notes.append(f'{cube.dtype} becomes float32, which is exact up to 16,777,216')
    scale, value = None, None
    if differ:
        dtype = np.dtype(np.float32)
        notes.append('nodata, gains or offsets differ from band to band: values brought to '
                     'physical units, float32')
    elif stated is not None:
        with np.errstate(over='ignore', invalid='ignore'):
            held = np.float64(stated).astype(dtype)  # as pixels of this type hold it
        if np.isfinite(held) and (dtype.kind == 'f' or held == stated):
            value = held.item()
        known = value is not None or not np.isfinite(held)  # infinite ones are missing anyhow
        notes.append(f'nodata {stated:g}'.replace('nan', 'NaN') if known else
                     f'nodata {stated:g} is stated, which no {dtype} pixel can have')
    if not differ and (factor, offset) != (1, 0):
        scale = (factor, offset)
        notes.append(f'the file states physical units = {factor:g} * value + {offset:g}: its '
                     'values are kept as stored')
    if mask is not None:
        if mask.shape != cube.shape[1:]:
            raise UserError(f'{path}: its mask has {shape_text(mask)} pixels, the image '
                            f'{shape_text(cube[0])}: repair or remove it')
        notes.append(f'by its mask {1 - mask.mean():.1%} of the pixels are missing')
        mask = None if mask.all() else mask
        dtype = dtype if mask is None or value is not None else np.dtype(np.float32)

    def settled(x, rows, cols):
        with np.errstate(over='ignore'):  # infinite, so missing
            made = x.astype(dtype)
        if differ:
            missing = made == (np.nan if stated is None else np.float32(stated))
            made = made * factor + offset
            made[missing] = np.nan
        if mask is not None:
            made[:, ~mask[rows, cols]] = np.nan if value is None else value
        return made
    if cube.dtype != dtype or differ or mask is not None:
        cube = when_read(cube, settled, dtype)
    return say(scene._replace(cube=cube, nodata=value, scale=scale, mask=None), *notes)


# ============ which bands, which pixels ============

class Survey(NamedTuple):
    """What one pass over a cube finds"""
    missing: np.ndarray  # (H, W) True where a pixel is missing; empty bands are not counted
    partly_missing: float  # share of the pixels that are missing in some of their bands only
    lacking: np.ndarray  # (C,) share of the pixels that have no value in this band; 0 in empty ones
    empty: list  # bands without one value, where others have some
    zeros: list  # bands that are 0 everywhere, where others are not
    fillers: dict  # value far outside the rest -> bands that have it


def survey(cube, nodata):
    """One pass over a cube, strip by strip -> Survey"""
    C, H, W = cube.shape
    lacking = np.zeros(C, np.int64)
    missing_bands = np.zeros((H, W), np.uint16)  # in how many of its bands a pixel has no value
    low, high = np.full(C, np.inf), np.full(C, -np.inf)
    step = math.ceil(math.sqrt(H * W / SAMPLE_PIXELS))
    samples = []
    for strip in strips(cube):
        x = cube[:, strip]
        sample = x[:, ::step, ::step].astype(np.float64)
        for band, values in enumerate(x):
            if x.dtype.kind == 'f' or nodata is not None:
                gone = ~valid_pixels(values[None], nodata)
                lacking[band] += np.count_nonzero(gone)
                missing_bands[strip] += gone
                sample[band][gone[::step, ::step]] = np.nan
                values = values[~gone]
            if values.size:
                low[band] = min(low[band], values.min())
                high[band] = max(high[band], values.max())
        samples.append(sample.reshape(C, -1))
    empty = np.flatnonzero(lacking == H * W).tolist()
    empty = empty if len(empty) < C else []  # nothing at all in this file
    lacking[empty] = 0
    missing = missing_bands > len(empty)
    if nodata == 0 and cube.dtype == np.uint8:  # there 0 is a value like others
        missing = missing_bands == C
    partly_missing = missing & (missing_bands < C)
    zeros = np.flatnonzero((low == 0) & (high == 0)).tolist()
    zeros = zeros if len(zeros) + len(empty) < C else []
    fillers = find_fillers(np.concatenate(samples, 1), low, high)
    return Survey(missing, partly_missing.mean(), lacking / (H * W), empty, zeros, fillers)


def find_fillers(sample, low, high):
    """Values that stand for "nothing here" although no one says so -> value -> numbers of bands.

    sample: (C, n) values, NaN = missing. low, high: (C,) of all pixels, not only of these. Such a
    value is the lowest or the highest of its band, and comes again and again. It is farther from
    the next value than the others from each other, or the only one below 0. A value that comes
    once may be a glint: it has to be a thousand times as far off.
    """
    fillers = {}
    for band, values in enumerate(sample):
        values = values[~np.isnan(values)]
        others = values[(values > low[band]) & (values < high[band])]
        if others.size < 20:
            continue
        bottom, top = np.percentile(others, (1, 99))
        span = np.ptp(others)
        for value in (low[band], high[band]):
            gap = np.abs(others - value).min()
            below = value < 0 <= others.min() and gap > 0.05 * span
            repeated = np.count_nonzero(values == value) >= max(3, values.size / 10_000)
            if (repeated and (gap > span or below)) or gap > 1000 * (top - bottom) > 0:
                fillers.setdefault(float(value), []).append(band)
    return fillers


def short_text(value):
    """The shortest text that is read as the same float32: -3.4028235e+38, where %g loses digits"""
    return str(np.float32(value)).removesuffix('.0')


def choose_bands(scene, path, drop_bands='', keep_bad_bands=False):
    """Leaves out bands, and says what is missing -> the Scene, (H, W) True where a pixel is
    missing"""
    C, nm = len(scene.cube), scene.wavelengths_nm
    if scene.bands == []:
        scene = say(scene._replace(bands=None), 'every band is marked as bad: that is not believed')
    marked = [] if scene.bands is None else sorted(set(range(C)) - set(scene.bands))
    dropped = numbers_of_bands(drop_bands, C, nm)
    if keep_bad_bands and marked:
        scene = say(scene, f'{name_bands(marked, nm)} marked as bad, kept as asked')
        marked = []
    kept = [band for band in range(C) if band not in {*marked, *dropped}]
    if not kept:
        raise UserError(f'{path}: of its {C} bands {len(marked)} are marked as bad and '
                        f'{len(dropped)} are dropped: none is left, drop fewer')
    found = survey(take_bands(scene.cube, kept), scene.nodata)

    def in_file(numbers):
        """Numbers of surveyed bands -> those that they have in the file"""
        return [kept[number] for number in numbers]
    empty, zeros = in_file(found.empty), in_file(found.zeros)
    for numbers, reason in ((marked, 'marked as bad'), (dropped, 'dropped as asked'),
                            (empty, 'without one value'), (zeros, '0 everywhere')):
        if numbers:
            scene = say(scene, f'{name_bands(numbers, nm)} left out: {reason}')
    if found.missing.any():
        scene = say(scene, f'{found.missing.mean():.1%} of the pixels are missing')
    if found.partly_missing:
        worst = name_bands(in_file([found.lacking.argmax()]), nm)
        scene = say(scene, f'{found.partly_missing:.1%} of the pixels are missing in some bands '
                    f'only, most in {worst}: --drop_bands= leaves bands out')
    for value, numbers in found.fillers.items():
        bands = name_bands(in_file(numbers), nm)
        scene = say(scene, f'{bands}: values far outside the rest ({value:g}): a filler? pass '
                    f'--nodata={short_text(value)}')
    remaining = [band for band in kept if band not in {*empty, *zeros}]
    scene = with_bands(scene._replace(file_bands=C, bands=list(range(C))), remaining)
    if nm:
        nm = checked_wavelengths(scene.wavelengths_nm, path).tolist()
    bands = remaining if len(remaining) < C else None
    return scene._replace(wavelengths_nm=nm, bands=bands), found.missing


def with_bands(scene, kept):
    """-> the Scene of these bands, in this order"""
    def of_kept(listed):
        return listed and [listed[band] for band in kept]
    return scene._replace(cube=take_bands(scene.cube, kept), bands=of_kept(scene.bands),
                          wavelengths_nm=of_kept(scene.wavelengths_nm),
                          fwhm_nm=of_kept(scene.fwhm_nm))


def in_order(scene):
    """Bands of detectors that overlap, one behind the other in the file -> sorted by wavelength"""
    nm = scene.wavelengths_nm
    starts = [0, *np.flatnonzero(np.diff(nm) <= 0) + 1, len(nm)] if nm else []
    lengths = np.diff(starts)  # of the detectors
    if not 1 < len(lengths) < 9 or lengths.min() < 3:
        return scene  # in order, or in one that someone chose
    scene = scene._replace(bands=scene.bands or list(range(len(nm))))
    scene = with_bands(scene, np.argsort(nm, kind='stable').tolist())
    return say(scene, f'the wavelengths of {len(lengths)} detectors overlap: the bands are put in '
               'the order of their wavelengths')


def name_bands(numbers, nm):
    """Numbers from 0 -> 'band 3 (550 nm)' or 'bands 3, 5-9 (550 to 640 nm)', counted from 1"""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ', '.join(f'{a + 1}' if a == b else f'{a + 1}-{b + 1}' for a, b in runs)
    words = f'band {words}' if len(numbers) == 1 else f'bands {words}'
    if not nm:
        return words
    low, high = nm[numbers[0]], nm[numbers[-1]]
    return f'{words} ({low:.0f} nm)' if low == high else f'{words} ({low:.0f} to {high:.0f} nm)'


def good_bands(flags):
    """What a file states of its bands, 1 = good and 0 = bad -> numbers of the good ones; None where
    it states nothing"""
    return [band for band, flag in enumerate(flags) if float(flag)] if flags else None


def numbers_of_bands(text, num_bands, nm):
    """--drop_bands= -> numbers of bands from 0; text: '1,5,100-110' from 1, or '1380-1410nm'"""
    numbers = set()
    for word in filter(None, text.replace(' ', '').split(',')):
        match = re.fullmatch(r'(\d+\.?\d*)(?:-(\d+\.?\d*))?(nm)?', word)
        low, high = (float(match[1]), float(match[2] or match[1])) if match else (0, 0)
        by_nm = match and match[3] and nm
        scale = nm if by_nm else range(1, num_bands + 1)
        chosen = {band for band in range(num_bands) if low <= scale[band] <= high}
        if not chosen or (match[3] and not nm) or not (by_nm or high <= num_bands):
            raise UserError(f'--drop_bands={text}: "{word}" is not within the {num_bands} bands of '
                            'the file: give numbers from 1, or wavelengths where it has some, as '
                            '1,5,100-110 or 1380-1410nm')
        numbers |= chosen
    return sorted(numbers)


# ============ labels ============

def read_labels(path):
    """A file of labels -> Scene with raw `labels` (H, W), names and colours of the classes and
    geotags; what is NaN or nodata there becomes 0"""
    scene = read_png(path) if path.lower().endswith('.png') else read_file(path)
    if scene.labels is not None:
        return scene._replace(labels=one_of(scene.labels, path))
    cube = scene.cube
    if len(cube) > 1:
        looks = 'an image or several layers'
        sample = cube[:, ::7, ::7]
        if ((sample == 0) | (sample == 1)).all() and sample.sum(0).max() <= 1:
            looks = 'one-hot classes (numpy.argmax gives their numbers)'
        elif len(cube) in (3, 4) and cube.dtype == np.uint8:
            looks = 'a picture in the colours of the classes'
        raise UserError(f'{path}: has {len(cube)} bands, which looks like {looks}: give one band '
                        'of class numbers, 0 = unlabelled')
    raw = cube[0]
    if raw.dtype.kind not in 'iubf':  # refused later
        return scene._replace(labels=raw)
    valid = valid_pixels(cube, of_bands(scene.nodata, None, []))
    if scene.mask is not None:
        valid &= scene.mask
    if not valid.all() and (raw[valid] == 0).any():
        scene = say(scene, 'WARNING: both 0 and what the label file marks as missing count as '
                    'unlabelled: if 0 is a class, number the classes from 1')
    return scene._replace(labels=np.where(valid, raw, 0))


def read_png(path):
    """Labels as an annotation tool writes them: the numbers of a grey or paletted picture"""
    from PIL import Image  # comes with matplotlib
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such file: check the path')
    with one_sentence(path), Image.open(path) as picture:
        with Image.open(path) as again:
            again.verify()  # its checksums, which are not looked at when it is read
        with open(path, 'rb') as file:
            depth, kind = file.read(26)[24:]  # bits of a value; 0: grey, 3: paletted
        if kind not in (0, 3):
            raise UserError(f'{path}: a picture in colours, which says nothing of classes: save '
                            'their numbers as a grey or paletted picture, 0 = unlabelled')
        numbers = np.array(picture)
        if kind == 0 and 1 < depth < 8:  # 2 or 4 bits were stretched to 0 to 255
            numbers //= 255 // (2 ** depth - 1)
        colors = np.reshape(picture.getpalette() or (), (-1, 3)).astype(int).tolist()
    return Scene(numbers[None], class_colors=colors or None)


def one_of(labels, path):
    """Raw labels; several, {name: labels}, are refused"""
    if not isinstance(labels, dict):
        return np.asarray(labels)
    raise UserError(f'{path}: any of {list_arrays(labels)} could be the labels: choose one, as '
                    f'--labels={split_name(path)[0]}:{next(iter(labels))}')


def settle_labels(scene, where, missing):
    """Raw labels -> checked ones, 0 = unlabelled, which they are where the pixel is missing; names
    and colours of labels 0, 1, 2, ... -> those of the classes, from 1"""
    names = [str(name).strip() for name in scene.class_names or []]
    while names and not names[-1]:
        names.pop()
    if names and names[0].lower() not in NO_CLASS:
        scene = say(scene, f'WARNING: label 0 is named "{names[0]}" but means unlabelled here: if '
                    'it is a class, number the classes from 1')
    colors = scene.class_colors and scene.class_colors[1:]
    scene = scene._replace(class_names=names[1:] or None, class_colors=colors)
    if scene.labels is None:
        return scene
    raw = one_of(scene.labels, where)
    raw = raw.squeeze() if raw.ndim == 3 and 1 in raw.shape else raw
    H, W = scene.cube.shape[1:]
    if raw.shape != (H, W):
        raise UserError(f'{where}: labels of {shape_text(raw)} pixels for an image of {H} x {W}: '
                        'give the label file of the same scene')
    labels = checked_labels(raw, where)
    on_missing = np.count_nonzero(labels[missing])
    labels[missing] = 0
    if on_missing:
        scene = say(scene, f'{on_missing:,} labels lay on missing pixels: they are 0 now')
    used = max(len(names) - 1, int(labels.max()))  # a colour table goes on behind the last class
    scene = scene._replace(labels=labels, class_colors=colors and colors[:used])

    # how many pixels each class has
    counts = np.bincount(labels.ravel(), minlength=1)
    classes = (np.flatnonzero(counts[1:]) + 1).tolist()
    if not classes:
        return say(scene, 'labels: all 0, which is unlabelled')
    named = [f'{k} {names[k]}' if k < len(names) else str(k) for k in classes[:30]]
    listed = ', '.join(f'{name}: {counts[k]:,}' for name, k in zip(named, classes))
    number = f'{len(classes)} classes' if len(classes) > 1 else '1 class'
    return say(scene, f'labels: pixels of {number} ({listed}), {counts[0]:,} unlabelled')


def fractions(array):
    """-> its values that are no whole numbers, nor missing"""
    return array[np.isfinite(array) & (array != np.round(array))]


def checked_labels(labels, path):
    """(H, W) of any type -> uint8; what are no class numbers is refused"""
    if labels.dtype.kind not in 'iubf':
        raise UserError(f'{path}: labels of type {labels.dtype} are not class numbers: save them '
                        'as whole numbers')
    if labels.dtype.kind == 'f':
        labels = np.where(np.isfinite(labels), labels, 0)
        found = fractions(labels)
        if found.size:
            raise UserError(f'{path}: labels such as {found[0]:g} are no class numbers but '
                            'values, as heights are: save whole numbers')
    lowest, highest = labels.min(), labels.max()
    if lowest < 0 or highest > 254:
        raise UserError(f'{path}: labels run from {lowest:g} to {highest:g}: use 0 for unlabelled '
                        '(instead of -1 or 255) and 1 to 254 for classes')
    return labels.astype(np.uint8)


# ============ place ============

def place(geotags):
    """GeoTIFF tags -> x and y of pixels: (x, dx/dcol, dx/drow, y, dy/dcol, dy/drow), x and y those
    of the outer corner of the first pixel; and the numbers of the keys. None where not stated."""
    tags = {code: value for code, _, _, value in geotags}
    try:
        words = np.array(tags.get(34735, ()), int)[4:].reshape(-1, 4)
        keys = {key: value for key, where, _, value in words.tolist() if where == 0}
        if 34264 in tags:
            matrix = np.array(tags[34264], float)
            dx, dx_row, x, dy, dy_row, y = matrix[[0, 1, 3, 4, 5, 7]].tolist()
        else:
            dx, dy_row, _ = np.array(tags[33550], float).tolist()
            col, row, _, x, y, _ = np.array(tags[33922], float).tolist()
            dx_row, dy, dy_row = 0.0, 0.0, -dy_row
            x, y = x - col * dx, y - row * dy_row
    except (KeyError, ValueError, IndexError, TypeError):
        return None, {}
    if keys.get(1025) == 2:  # the tags speak of a pixel's centre
        x, y = x - (dx + dx_row) / 2, y - (dy + dy_row) / 2
    return (x, dx, dx_row, y, dy, dy_row), keys


LENGTHS = {9001: 'm', 9002: 'ft', 9003: 'US survey ft', 9036: 'km'}  # key 3076


def place_text(geotags):
    affine, keys = place(geotags)
    if affine is None:
        return 'no georeference'
    x, dx, dx_row, y, dy, dy_row = affine
    epsg = keys.get(3072) or keys.get(2048)
    unit = LENGTHS.get(keys.get(3076), '(unit not known)')
    system = f'EPSG:{epsg}' if epsg and epsg < 32767 else 'a system of its own'
    if keys.get(1024) == 2:
        unit = 'degrees'
    elif epsg and epsg // 100 in (326, 327) and 1 <= epsg % 100 <= 60:
        system, unit = f'UTM zone {epsg % 100}{"N" if epsg // 100 == 326 else "S"}', 'm'
    angle = math.degrees(math.atan2(dy, dx))
    rotation = f', rotated by {angle:.1f} degrees' if angle or dx_row else ''
    return (f'place: {system}, pixels of {math.hypot(dx, dy):g} {unit}, upper left corner at '
            f'{x:.10g}, {y:.10g}{rotation}')


def check_same_place(scene, label_tags, path, labels):
    """Refuses labels of another place: half a pixel at a corner, or another projection"""
    H, W = scene.cube.shape[1:]
    affine, keys = place(scene.geotags)
    label_affine, label_keys = place(label_tags)
    if affine is None or label_affine is None:
        return
    pixel = math.hypot(affine[1], affine[4])
    corners = np.array([[1, 0, 0], [1, W, 0], [1, 0, H], [1, W, H]])
    apart = corners @ np.reshape(np.subtract(affine, label_affine), (2, 3)).T
    codes = {keys_of.get(3072) or keys_of.get(2048) for keys_of in (keys, label_keys)}
    other_system = len(codes - {None, 32767}) > 1  # 32767: a system without a number
    if np.abs(apart).max() > pixel / 2 or other_system:
        raise UserError(f'{labels}: the labels lie elsewhere ({place_text(label_tags)}) than '
                        f'{path} ({place_text(scene.geotags)}): give labels of the '
                        'same pixels')


def place_tags(matrix, wkt='', epsg=None, at=(0.0, 0.0)):
    """GeoTIFF tags of an image whose point `at` (column, row; 0, 0 = the upper left corner) lies at
    x, y.

    matrix: x, what x gains by a column and by a row, y, what y gains so. wkt: its coordinate
    system as a text; epsg: its number, where the text names none
    """
    x, a, b, y, d, e = matrix
    column, row = at
    if b == d == 0 and a > 0 > e:
        tags = ((33550, 12, 3, (a, -e, 0.0)), (33922, 12, 6, (column, row, 0.0, x, y, 0.0)))
    else:
        rows = (a, b, 0.0, x - a * column - b * row, d, e, 0.0, y - d * column - e * row)
        tags = ((34264, 12, 16, (*rows, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)),)
    number = re.search(r'(AUTHORITY|ID)\["EPSG",\s*"?(\d+)"?\]\s*\]\s*$', wkt)
    epsg = epsg or (int(number[2]) if number else None)
    # of longitude and latitude? The number does not tell: 4490 is so, 4547 is a projection
    degrees = wkt.lstrip().startswith('GEO') if wkt else epsg == 4326
    if epsg is None and not degrees:
        return tags
    model, key = (2, 2048) if degrees else (1, 3072)  # geographic, projected
    keys = [(1024, model), (1025, 1), (key, epsg or 32767)]  # 1025: of areas; 32767: no number
    # the last unit of a projection is that of its lengths
    metres = re.findall(r'UNIT\["[^"]*",\s*([\d.]+)', wkt)
    length = metres and {1: 9001, 0.3048: 9002, 0.3048006: 9003}.get(round(float(metres[-1]), 7))
    if length and not degrees:
        keys.append((3076, length))
    words = [1, 1, 0, len(keys)]
    for key, value in keys:
        words += [key, 0, 1, value]
    return (*tags, (34735, 3, len(words), tuple(words)))


def envi_geotags(info, wkt=''):
    """ENVI's "map info" -> GeoTIFF tags; () where nothing is stated.

    info: projection, column and row of a pixel (from 1), its x and y, width and height of a
    pixel, then for UTM zone and North or South, datum; rotation=degrees, counter-clockwise.
    wkt: its "coordinate system string"
    """
    info = [str(word).strip() for word in info]
    if len(info) < 7 or info[0].lower() == 'arbitrary':
        return ()
    column, row, x, y, width, height = (float(word) for word in info[1:7])
    angles = [float(word.split('=')[1]) for word in info if word.lower().startswith('rotation=')]
    angle = math.radians(sum(angles))
    epsg = None
    if {word.lower() for word in info[7:]} & {'wgs-84', 'wgs84', 'wgs 84'}:
        if info[0] == 'UTM':
            epsg = int(info[7]) + (32700 if info[8].lower() == 'south' else 32600)
        elif info[0] == 'Geographic Lat/Lon':
            epsg = 4326
    if info[0] == 'Geographic Lat/Lon':
        wkt = wkt or 'GEOGCS'  # of another datum, but degrees
    matrix = (x, math.cos(angle) * width, math.sin(angle) * height,
              y, math.sin(angle) * width, -math.cos(angle) * height)
    return place_tags(matrix, wkt, epsg, (column - 1, row - 1))


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


def mix_bands(scene, weights, wavelengths_nm=None, fwhm_nm=None):
    """-> the Scene whose bands are weighted sums, weights (C', C), of those of `scene`, as float32;
    missing pixels NaN. wavelengths_nm, fwhm_nm: lists of the new bands."""
    weights = np.asarray(weights, np.float32)

    def mixed(x, rows, cols):
        values = x.astype(np.float32)
        values[:, ~valid_pixels(x, scene.nodata)] = np.nan
        return np.tensordot(weights, values, 1)
    cube = when_read(scene.cube, mixed, np.float32, len(weights))
    return scene._replace(cube=cube, wavelengths_nm=wavelengths_nm, fwhm_nm=fwhm_nm, bands=None,
                          nodata=None)


def normalized(scene):
    """Each band to mean 0 and standard deviation 1 over the scene's own valid pixels, as float32;
    missing pixels NaN. So scenes of several sensors, or in several units, go together."""
    def mean_of(function):
        """(C, 1) mean of function(valid values (C, n)), in float64"""
        count, total = 0, 0.0
        for strip in strips(scene.cube):
            x = scene.cube[:, strip]
            values = x[:, valid_pixels(x, scene.nodata)].astype(np.float64)
            count += values.shape[1]
            total = total + function(values).sum(1, keepdims=True)
        return total / max(count, 1)
    mean = mean_of(lambda values: values)
    std = np.sqrt(mean_of(lambda values: np.square(values - mean)))
    std[std == 0] = 1

    def standard(x, rows, cols):
        z = (x - mean[..., None]) / std[..., None]
        z[:, ~valid_pixels(x, scene.nodata)] = np.nan
        return z
    cube = when_read(scene.cube, standard, np.float32)
    return scene._replace(cube=cube, nodata=None, scale=None)


# ============ what readers share ============

def shape_note(cube, words):
    """The first note of a scene; words: how it is known which axis the bands are"""
    C, H, W = cube.shape
    bands = '1 band' if C == 1 else f'{C} bands'
    return f'{bands} of {H} x {W} px, {cube.dtype.name} ({words})'


def choose_axes(shape, path, axes='', stated='', num_bands=None, pixels=None):
    """The axes of a 3-d array -> as 'hwc' or 'chw', and words that say why.

    axes: --axes=. stated: by the file. num_bands: of the wavelengths that are known. pixels: (H, W)
    of labels that are known. Refuses where all this leaves it open, or is at odds.
    """
    axes = axes.lower()
    if axes and sorted(axes) != ['c', 'h', 'w']:
        raise UserError(f'--axes={axes}: give h (rows), w (columns) and c (bands) in the order of '
                        'the array, as hwc or chw')
    if stated and axes not in ('', stated):
        raise UserError(f'--axes={axes}: {path} itself states that its axes are {stated}: leave '
                        '--axes out, or correct the file')
    order = axes or stated
    if order:
        where = ('first', 'in the middle', 'last')[order.index('c')]
        return order, f'bands {where}, {"by --axes=" + axes if axes else "as the file states"}'
    first, middle, last = shape
    lengths = 'by the lengths of its sides; else pass --axes='
    for hwc, chw, why in (
            (last == num_bands, first == num_bands, 'as many as wavelengths'),
            ((first, middle) == pixels, (middle, last) == pixels, 'as the labels fit'),
            # two equal sides are a square's; else bands are few, and mostly last
            (first == middle, middle == last, lengths),
            (False, 2 * first <= min(middle, last), lengths),
            (last < min(first, middle), False, lengths)):
        if hwc != chw:
            return ('hwc', f'bands last, {why}') if hwc else ('chw', f'bands first, {why}')
    raise UserError(f'{path}: an array of {first} x {middle} x {last}, and nothing says which '
                    'axis the bands are: pass --axes=hwc (bands last) or --axes=chw (first)')


def refuse_table(path, name, shape, folded=False):
    """Refuses an array of bands x pixels or pixels x bands; folded: the file says that it is so"""
    if not folded and (max(shape) <= 40 * min(shape) or LABEL_NAMES.search(last_name(name))):
        return  # labels of a long flight line, maybe
    first, turned = ('bands x pixels', "'") if shape[0] < shape[1] else ('pixels x bands', '')
    raise UserError(f'{path}: "{name}" of {shape[0]} x {shape[1]} looks like {first}: save it as '
                    'rows x columns x bands, which in MATLAB is '
                    f'reshape({last_name(name)}{turned}, nRow, nCol, []); labels under the name '
                    '"labels"')


# ============ GeoTIFF ============

GDAL_METADATA, GDAL_NODATA, COLOR_MAP = 42112, 42113, 320  # tags
REDUCED, MASK = 1, 4  # bits of a page's subfile type
ALPHA = (1, 2)  # values of ExtraSamples


def read_tiff(path, mmap, name, axes):
    import tifffile
    logging.getLogger('tifffile').setLevel(logging.CRITICAL)  # we say it in our own sentences
    if name:
        raise UserError(f'{path}:{name}: arrays in a TIFF have no names: give its path alone')
    # a name inside the file opens no other file
    closed = dict(_multifile=False, is_mmstack=False, is_ndtiff=False)
    with tifffile.TiffFile(path, **closed) as tif:
        cube, words = tiff_cube(tif, path, mmap, axes)
        masks = [page.asarray() for page in tif.pages
                 if page.keyframe.subfiletype & (REDUCED | MASK) == MASK]
        page = tif.series[0].keyframe
        tags = {tag.code: tag.value for tag in page.tags}
        geotags = tuple((tag.code, int(tag.dtype), tag.count, tag.value) for tag in page.tags
                        if tag.code in GEOTAGS)
        extra = [int(kind) for kind in page.extrasamples]
    if os.path.isfile(path + '.msk'):
        with tifffile.TiffFile(path + '.msk', **closed) as tif:
            masks += [*np.asarray(tiff_cube(tif, path + '.msk', False, '')[0])]
    facts = gdal_facts(path, tags.get(GDAL_METADATA, ''))
    notes = [shape_note(cube, words)]

    # alpha bands: as marked, but many programs mark the fourth band of an image so as well; and a
    # last one that holds nothing but 0 and the highest value
    C = len(cube)
    bands = list(range(C))
    marked = {C - len(extra) + number for number, kind in enumerate(extra) if kind in ALPHA}
    marked |= {band for band in bands if facts[band].get('colorinterp') == 'Alpha'}
    integers = cube.dtype.kind in 'iu'
    ends = 0, np.iinfo(cube.dtype).max if integers else 1
    suspects = marked | ({C - 1} if integers and np.isin(cube[-1, :1], ends).all() else set())
    for band in sorted(suspects) if C > 1 else ():
        plane = cube[band]
        at_ends = np.isin(plane, ends).mean()
        if at_ends == 1 and plane.any() and not plane.all() or band in marked and at_ends > 0.9:
            notes.append(f'band {band + 1} is an alpha band: taken out, and used as a mask')
            masks.append(plane)
            bands.remove(band)
        elif band in marked:
            notes.append(f'band {band + 1} is marked as alpha but has the values of an image: '
                         'kept as a band')

    def each_band(name, usual=None):
        return [facts[band].get(name, usual) for band in bands]
    nm, fwhm, unit = gdal_wavelengths(facts, bands)
    colors = facts[0].get('colors')
    if COLOR_MAP in tags and not colors:
        colors = (np.array(tags[COLOR_MAP]).reshape(3, -1) >> 8).T.tolist()
    scene = Scene(
        take_bands(cube, bands), wavelengths_nm=nm, fwhm_nm=fwhm, unit=unit,
        nodata=each_band('nodatavalue', tags.get(GDAL_NODATA)),
        class_names=facts[0].get('categories'), class_colors=colors, geotags=geotags,
        scale=(each_band('scale'), each_band('offset')),
        bands=good_bands(gdal_list(facts, bands, 'bbl')), notes=tuple(notes),
        mask=np.all([mask != 0 for mask in masks if mask.ndim == 2], 0) if masks else None)
    # ENVI writes what it is told of a TIFF into a header beside it
    header, beside = {}, envi_header_of(path)
    if beside:
        with contextlib.suppress(UserError):  # not one of ENVI's
            header = envi_header(beside)
    if 'tif' in header.get('file type', '').lower():
        scene = envi_facts(scene, header, beside)
    return product_metadata(path, scene)


def tiff_cube(tif, path, mmap, axes):
    """-> cube (C, H, W), on disk where that can be, and words on its axes"""
    series = tif.series[0]
    pages, shape, letters = series.pages, series.shape, series.axes
    added = ''
    by_pages = (series.kind in ('generic', 'uniform')
                or len(tif.series) > 1 and all(len(other.pages) == 1 for other in tif.series))
    if by_pages:  # a page for each band
        pages = [page for page in tif.pages if not page.keyframe.subfiletype & (REDUCED | MASK)]
        shape, letters = pages[0].shape, pages[0].axes
        kinds = {(page.shape, page.dtype) for page in pages}
        if len(kinds) > 1 or len(pages) > 1 and len(shape) > 2:
            raise UserError(f'{path}: holds {len(pages)} images, the first of '
                            f'{shape_text(pages[0])}: save the one that is meant alone')
        if len(pages) > 1:
            shape, letters, added = (len(pages), *shape), 'S' + letters, ', a page for each band'
    check_tiff_sizes(path, [page for page in pages if page is not None])
    if len(shape) == 2:
        shape, letters = (1, *shape), 'S' + letters
    if len(shape) != 3 or 'Y' not in letters or 'X' not in letters:
        raise UserError(f'{path}: its axes are {letters} {shape}: expected rows, columns and '
                        'bands only')
    # Q: written as an array, without a word on its axes
    letter = next(letter for letter in letters if letter not in 'YX')
    stated = letters.translate({ord(letter): 'c', ord('Y'): 'h', ord('X'): 'w'})
    axes, words = choose_axes(shape, path, axes, '' if letter == 'Q' else stated)

    first = pages[0].keyframe
    dtype = np.dtype(first.dtype)
    offset = series.dataoffset if len(pages) == len(series.pages) else None
    if offset:  # all numbers lie one behind the other
        dtype = dtype.newbyteorder(tif.byteorder)
        return file_cube(path, dtype, shape, axes, offset), words + added
    if mmap and None not in pages and len(pages) * first.size == math.prod(shape):
        file = unpacked_file(path, dtype, (len(pages), *first.shaped), tiff_blocks(pages))
        return file_cube(file, dtype, shape, axes), words + added
    array = np.stack([page.asarray() for page in pages]) if by_pages else series.asarray()
    return to_chw(array.reshape(shape), axes), words + added


def tiff_blocks(pages):
    """Yield where, block of all strips or tiles, for unpacked_file()"""
    for number, page in enumerate(pages):
        for block, (s, d, h, w, _), shape in page.segments(buffersize=int(STRIP_BYTES)):
            if block is None:  # not stored, as in a sparse file
                block = np.full(shape, page.keyframe.nodata)
            depth, length, width, _ = shape
            yield np.s_[number, s, d:d + depth, h:h + length, w:w + width], block


def check_tiff_sizes(path, pages):
    """Refuses a file that claims more pixels than it can hold, before memory is asked for"""
    size = os.path.getsize(path)
    first = pages[0].keyframe
    segment_bytes = math.prod(first.chunks) * np.dtype(first.dtype).itemsize
    claimed = 0
    for page in pages:
        stored = [(offset, count) for offset, count in zip(page.dataoffsets, page.databytecounts)
                  if count]
        missing = len(page.dataoffsets) != math.prod(first.chunked) and not page.is_contiguous
        if missing or any(offset + count > size for offset, count in stored):
            raise UserError(f'{path}: the file is truncated or damaged: copy it again')
        claimed += page.nbytes if page.is_contiguous else max(len(stored), 1) * segment_bytes
    # no lossless compression of the first group does better
    ratio = 2000 if first.compression in (1, 5, 8, 32773, 32946) else 100_000
    if claimed > ratio * size:
        raise UserError(f'{path}: claims {claimed / 1e9:.0f} GB of pixels in a file of '
                        f'{size} bytes: the file is damaged, copy it again')


def gdal_facts(path, text=''):
    """What GDAL notes on bands, in tag 42112 (`text`) and in x.aux.xml beside the file.

    -> {number of the band from 0, or -1 for all of them: {name in small letters: text}}
    """
    facts = collections.defaultdict(dict)
    if text:
        for item in ElementTree.fromstring(str(text)).iter('Item'):
            band = int(item.get('sample', -1))
            facts[band][(item.get('role') or item.get('name')).lower()] = item.text or ''
    beside = path + '.aux.xml'
    root = ElementTree.Element('none')
    if os.path.isfile(beside):
        with one_sentence(beside):
            root = ElementTree.parse(beside).getroot()
    for element in [root, *root.findall('PAMRasterBand')]:
        known = facts[int(element.get('band', 0)) - 1]
        known |= {child.tag.lower(): child.text or '' for child in element}
        known |= {item.get('key').lower(): item.text or ''
                  for item in element.iterfind('Metadata/MDI')}
        names = [item.text or '' for item in element.iterfind('CategoryNames/Category')]
        colors = [[int(item.get(c)) for c in ('c1', 'c2', 'c3')]
                  for item in element.iterfind('ColorTable/Entry')]
        known |= {'categories': names} if names else {}
        known |= {'colors': colors} if colors else {}
    return facts


def gdal_list(facts, bands, name):
    """What gdal_facts() knows by this name, a text for each of `bands`: each band's own, or of a
    list for all; [] where it does not"""
    values = [facts[band].get(name, '').split(' ')[0] for band in bands]
    if not all(values):
        values = re.findall(r'[^\s,{}]+', facts[-1].get(name, ''))
    return values if len(values) == len(bands) else []


def gdal_wavelengths(facts, bands):
    """What gdal_facts() knows of wavelengths -> for `bands` values, widths, (unit, where)"""
    where = "the file's metadata"
    both = facts[-1] | facts[bands[0]]
    unit = both.get('wavelength_units') or both.get('wavelength_unit', '')
    for name, width, own_unit in (
            ('central_wavelength_um', 'fwhm_um', 'um'), ('wavelength', 'fwhm', unit),
            ('wavelengths', 'fwhm', unit), ('central_wavelength', 'fwhm', unit),
            ('center_wavelength', 'fwhm', unit)):
        values = gdal_list(facts, bands, name)
        if values:
            return values, gdal_list(facts, bands, width), (own_unit, where)
    names = [facts[band].get('description', '') for band in bands]  # 'band 1 (450.5 Nanometers)'
    # '440-460 nm' is a range, whose end is no centre
    pattern = r'(?<![\d.])(?<!\d[-–])(?<!\d - )([\d.]+) ?(nm|nanomet\w+|um|micromet\w+)\b'
    found = [re.search(pattern, name, re.I) for name in names]
    if all(found) and len({match[2] for match in found}) == 1:
        return [match[1] for match in found], None, (found[0][2], 'the names of its bands')
    return None, None, ('', where)


# ============ GeoTIFF with METADATA.XML: EnMAP, DESIS ============

def product_metadata(path, scene):
    """-> the scene of NAME-SPECTRAL_IMAGE.TIF with what NAME-METADATA.XML states of its bands"""
    match = re.fullmatch(r'(.*)-SPECTRAL_IMAGE(_VNIR|_SWIR|)(_COG)?\.TIFF?', path, re.I | re.S)
    if not match:
        return scene
    found = files_beside(match[1], ['-metadata.xml'])
    if not found:
        return say(scene, f'{match[1]}-METADATA.XML is not there: nothing is known of the bands')
    with one_sentence(found[0]):
        root = ElementTree.parse(found[0]).getroot()

    # EnMAP: <bandID number="1"> with FWHMOfBand; DESIS: <band> with bandNumber
    bands = []
    for band in root.iterfind('.//{*}bandCharacterisation/*'):
        stated = {child.tag.rpartition('}')[2].lower(): child.text for child in band}
        stated |= {name.lower(): value for name, value in band.attrib.items()}
        bands.append([float(stated.get(name) or stated[other]) for name, other in (
            ('number', 'bandnumber'), ('wavelengthcenterofband', ''),
            ('fwhmofband', 'wavelengthwidthofband'), ('gainofband', ''), ('offsetofband', ''))])
    bands.sort()
    C = len(scene.cube)
    if match[2] and len(bands) > C:  # the detectors of EnMAP L1B have a file each
        bands = bands[:C] if match[2].upper() == '_VNIR' else bands[-C:]
    if len(bands) != C:
        raise UserError(f'{found[0]}: describes {len(bands)} bands, {path} has {C}: they do not '
                        'belong together')
    _, centres, fwhm, gains, offsets = (list(column) for column in zip(*bands))
    nodata = scene.nodata
    if not any(nodata) and scene.cube.dtype == np.int16:
        nodata = root.findtext('.//{*}backgroundValue') or -32768  # usual there
    return scene._replace(wavelengths_nm=centres, fwhm_nm=fwhm, scale=(gains, offsets),
                          nodata=nodata, unit=('nm', os.path.basename(found[0])))


# ============ NumPy ============

NPZ_FACTS = ('wavelengths_nm', 'fwhm_nm', 'class_names', 'class_colors', 'nodata', 'scale')


def read_numpy(path, mmap, name, axes):
    labels, facts, others = None, {}, []
    array_path, folder = path, None
    loaded = np.load(path, allow_pickle=False, mmap_mode='r')
    if not isinstance(loaded, np.ndarray):
        images = set(loaded) - {'labels', *NPZ_FACTS}
        name = name or ('cube' if images else 'labels')  # or a file of labels only
        if name not in loaded:
            raise UserError(f'{path}: holds {sorted(loaded)[:6]} but no array "cube": save the '
                            f'image under that name, or name one, as {path}:NAME')
        others = set(loaded) - {name, 'labels', *NPZ_FACTS}
        if 'labels' in loaded and name != 'labels':
            labels = loaded['labels']
        facts = {key: np.atleast_1d(loaded[key]).tolist() for key in NPZ_FACTS if key in loaded}
        if len(facts.get('scale', [])) > 2:
            raise UserError(f'{path}: its "scale" has {len(facts["scale"])} numbers: give factor '
                            'and offset')
        folder = tempfile.TemporaryDirectory()
        array_path = loaded.zip.extract(f'{name}.npy', folder.name)

    def stored(folder=folder):  # the folder is deleted when nothing refers to stored() any more
        return np.load(array_path, mmap_mode='r')

    # which axis is which
    shape = stored().shape
    nm = facts.get('wavelengths_nm')
    if len(shape) == 2:  # one band, or labels
        refuse_table(path, name or 'array', shape)
        shape, axes, words = (1, *shape), 'chw', 'rows and columns'
    elif len(shape) == 3:
        pixels = None if labels is None else labels.shape
        axes, words = choose_axes(shape, path, axes, '', len(nm or []), pixels)
    else:
        raise UserError(f'{path}: an array of shape {shape_text(stored())} is no image: give a '
                        '3-d array')
    cube = mapped_cube(lambda: to_chw(stored().reshape(shape), axes))
    notes = [shape_note(cube, words)]
    if others:
        notes.append(f'not used: {", ".join(sorted(others))} (known are labels, '
                     f'{", ".join(NPZ_FACTS)}; --labels={path}:NAME chooses labels)')

    # the first name may be that of label 0, but not where there are as many classes as names
    names, colors = facts.get('class_names'), facts.get('class_colors')
    if names:
        names = [text_of(name) for name in names]  # which may be bytes
        numbers = stored() if name == 'labels' else labels
        classes = len(names) if numbers is None else numbers.max()
        if classes == len(names) or str(names[0]).lower() not in NO_CLASS:
            if classes == len(names) - 1:
                notes.append(f'WARNING: {len(names)} class_names for labels up to {classes}: the '
                             f'first, "{names[0]}", is taken as that of class 1. If it is that of '
                             'label 0, call it "unlabelled"')
            names = ['', *names]
        else:
            notes.append(f'class_names: the first, "{names[0]}", is taken as that of label 0')
    scale = (*facts['scale'], 0)[:2] if 'scale' in facts else None  # an offset may be left out
    return Scene(cube, labels, nm, facts.get('nodata'), names, fwhm_nm=facts.get('fwhm_nm'),
                 class_colors=colors and [(0, 0, 0), *colors], scale=scale, notes=tuple(notes),
                 unit=('', 'wavelengths_nm'))


# ============ ENVI ============

ENVI_TYPES = {'1': 'u1', '2': 'i2', '3': 'i4', '4': 'f4', '5': 'f8', '6': 'c8', '9': 'c16',
              '12': 'u2', '13': 'u4', '14': 'i8', '15': 'u8'}
ENVI_AXES = {'bsq': 'chw', 'bil': 'hcw', 'bip': 'hwc'}
ENVI_ENDINGS = ('', '.img', '.dat', '.bsq', '.bil', '.bip', '.raw', '.bin', '.rfl', '.rdn',
                '.hyspex', '.tif', '.tiff')  # of the data file of x.hdr; AVIRIS has none


def files_beside(stem, endings):
    """-> the files stem + ending that exist, in small or in capital letters"""
    folder, start = os.path.split(stem)
    names = [name for name in sorted(os.listdir(folder or '.'))
             if name.startswith(start) and name[len(start):].lower() in endings]
    found = [os.path.join(folder, name) for name in names]
    return [path for path in found if os.path.isfile(path)]


def envi_header_of(path):
    """The ENVI header of a data file, x.img.hdr or x.hdr for x.img; None = there is none"""
    found = files_beside(path, ['.hdr']) + files_beside(os.path.splitext(path)[0], ['.hdr'])
    return found[0] if found else None


def is_header_of_tiff(path):
    """An ENVI header that belongs to a GeoTIFF beside it, which is the scene's file then"""
    if not path.lower().endswith('.hdr') or not files_beside(path[:-4], ['.tif', '.tiff']):
        return False
    with open(path, 'rb') as file:
        return bool(re.search(rb'(?i)\bfile type\s*=\s*tiff', file.read(1 << 20)))


def both_files(path):
    """-> the file, and what may belong to it: the header of ENVI data, the data of a header"""
    if path.lower().endswith('.hdr'):
        return [path, *files_beside(path[:-4], ENVI_ENDINGS)]
    header = envi_header_of(path)
    return [path, header] if header else [path]


def read_envi(path, mmap, name, axes):
    """An ENVI image, by its header or by its data file"""
    if path.lower().endswith('.hdr'):
        header_path, missing = path, f'{path[:-4]} or {path[:-4]}.img'
        candidates = files_beside(path[:-4], ENVI_ENDINGS)
    else:
        header_path, missing = envi_header_of(path), f'{os.path.splitext(path)[0]}.hdr'
        candidates = [path]
    if not header_path or not candidates:
        raise UserError(f'{path}: an ENVI image is two files, and {missing} is not there: copy it '
                        'beside this one')
    header = envi_header(header_path)
    dtype, offset, shape, stated = envi_layout(header_path, header)
    needed = offset + math.prod(shape) * dtype.itemsize

    # the data: of several files the one that has the size
    fitting = [found for found in candidates if os.path.getsize(found) == needed]
    if len(candidates) > 1 and len(fitting) != 1:
        raise UserError(f'{path}: {" and ".join(candidates)} could be its data: give the data file '
                        'instead of the header')
    data_path = (fitting or candidates)[0]
    if data_path.lower().endswith(('.tif', '.tiff')):
        return envi_facts(read_tiff(data_path, mmap, name, axes), header, header_path)
    size = os.path.getsize(data_path)
    if size < needed:
        raise UserError(f'{data_path}: the file is truncated: it has {size} bytes, its header '
                        f'speaks of {needed}: copy it again')
    axes, words = choose_axes(shape, path, axes, stated)
    cube = file_cube(data_path, dtype, shape, axes, offset)
    notes = [shape_note(cube, f'ENVI {header["interleave"].lower()}, {words}')]
    if size > needed:
        notes.append(f'{data_path} has {size - needed} bytes more than its header speaks of')
    return envi_facts(Scene(cube, notes=tuple(notes)), header, header_path)


def envi_header(path):
    """-> {field: text} of an ENVI header, names in small letters; a {list} may have many lines"""
    with open(path, 'rb') as file:
        content = file.read(1 << 24)
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError:
        text = content.decode('latin-1')
    if not text.lstrip().startswith('ENVI'):
        raise UserError(f'{path}: is no ENVI header, its first line is not "ENVI": give the '
                        'header or the data file of an ENVI image')
    text = re.sub(r'(?m)^[ \t]*;.*$', '', text)  # comments
    header = {}
    for field, value in re.findall(r'(?m)^([^={}\n]+?)=[ \t]*(\{[^}]*\}?|[^\r\n]*)', text):
        if value.startswith('{') and not value.endswith('}'):
            raise UserError(f'{path}: ends within its list "{field.strip()}": copy the header '
                            'again')
        header[' '.join(field.lower().split())] = value.strip()
    return header


def envi_list(header, field):
    """-> the words of a field {a, b, ...}, [] where it is missing or empty"""
    text = header.get(field, '').strip('{}').strip()
    return [word.strip() for word in text.split(',')] if text else []


def envi_layout(path, header):
    """-> numpy type, offset in bytes, shape as it lies in the file, its axes ('hwc')"""
    whole, zeros = '0*[1-9][0-9]{0,8}', r'\{?[0, ]*\}?'
    patterns = {'bands': whole, 'lines': whole, 'samples': whole, 'header offset': '[0-9]{0,12}',
                'interleave': 'bsq|bil|bip', 'data type': '|'.join(ENVI_TYPES),
                'byte order': '0|1|', 'file compression': '0|', 'major frame offsets': zeros,
                'minor frame offsets': zeros}
    for field, pattern in patterns.items():
        if not re.fullmatch(pattern, header.get(field, ''), re.IGNORECASE):
            raise UserError(f'{path}: its field "{field}" is '
                            f'{one_line(header.get(field, "missing"))}, which is not read: correct '
                            'the header, or save the image again as a plain ENVI file')
    axes = ENVI_AXES[header['interleave'].lower()]
    sides = {'c': 'bands', 'h': 'lines', 'w': 'samples'}
    shape = tuple(int(header[sides[letter]]) for letter in axes)
    order = '>' if header.get('byte order') == '1' else '<'
    dtype = np.dtype(order + ENVI_TYPES[header['data type']])
    return dtype, int(header.get('header offset') or 0), shape, axes


def envi_facts(scene, header, path):
    """-> the scene with what an ENVI header states about its bands, classes and place"""
    C = len(scene.cube)

    def numbers(field, *counts):
        """The numbers of a field, [] where it is missing; counts: how many it may have"""
        try:
            found = [float(word) for word in envi_list(header, field)]
        except ValueError:
            raise UserError(f'{path}: its field "{field}" holds no numbers '
                            f'({one_line(header[field])[:40]}): correct the header') from None
        if found and counts and len(found) not in counts:
            raise UserError(f'{path}: its field "{field}" has {len(found)} values for {C} bands: '
                            'correct the header')
        return found
    gains, offsets = numbers('data gain values', C, 1), numbers('data offset values', C, 1)
    scale = (gains or 1, offsets or 0) if gains or offsets else None
    divisor = numbers('reflectance scale factor')
    if any(divisor):
        scale = (1 / divisor[0], 0.0)
    ignored = numbers('data ignore value', C, 1)
    colors = numbers('class lookup')
    colors = np.reshape(colors[:len(colors) // 3 * 3], (-1, 3)).astype(int)
    nm = numbers('wavelength', C)
    stated = {
        'wavelengths_nm': nm or None, 'fwhm_nm': numbers('fwhm', C) or None,
        'unit': (header.get('wavelength units', ''), 'the header') if nm else None,
        'bands': good_bands(numbers('bbl', C)), 'scale': scale, 'nodata': ignored or None,
        'class_names': envi_list(header, 'class names') or None,
        'class_colors': [tuple(color) for color in colors.tolist()] or None,
        'geotags': envi_geotags(envi_list(header, 'map info'),
                                header.get('coordinate system string', '').strip('{}')) or None}
    stated = {name: value for name, value in stated.items() if value is not None}
    return scene._replace(**stated)


# ============ arrays with names: MATLAB, HDF5 ============

class Stored(NamedTuple):
    """An array in a file: read(...) gives all of it as numpy, read((slice, ...)) a block"""
    shape: tuple
    dtype: np.dtype
    read: object
    attrs: dict = {}  # of HDF5
    axes: tuple = ()  # names of its axes, of HDF5


# what the last name of a path says
LABEL_NAMES = re.compile(r'(\b|_)gt|gt(\b|_)|label|truth|class|map|gnd|train|test|(^|_)t[res]$',
                         re.IGNORECASE)
OTHER_LAYERS = re.compile(r'lidar|ds[mt]|dem$|dtm|height|elev|abund|endmem|conf'
                          r'|(\b|_)(lat|lon)', re.IGNORECASE)
WAVELENGTHS = re.compile(r'^(?!good).*(wave|lambda)|^wl$|centers?$|centres?$', re.IGNORECASE)
NODATA_NAMES = ('fillvalue', 'missingvalue', 'dataignorevalue', 'nodata', 'nodatavalue')
GOOD_BANDS = re.compile('^(good_wavelengths|bbl)$', re.IGNORECASE)  # 1 = good
ROWS = re.compile('^n_?(rows?|lines)$', re.IGNORECASE)
WIDTHS = re.compile('fwhm', re.IGNORECASE)


def last_name(name):
    """'hsi.info.1' -> 'info': numbers are those of cells"""
    parts = [part for part in re.split('[./]', name) if not part.isdigit()]
    return parts[-1] if parts else name


def list_arrays(arrays):
    """'HSI (80 x 96 x 8, uint16), ...'"""
    words = [f'{name} ({shape_text(stored)}, {stored.dtype})' for name, stored in arrays.items()]
    if len(words) > 8:
        words[8:] = ['...']
    return ', '.join(words)


def pick_array(path, arrays, name):
    """The image among the arrays of a file -> its name.

    The one that `name` asks for; else the only one of three axes whose name does not speak of
    labels, heights or abundances; else the only one of three axes, or of two.
    """
    usable = {key: stored for key, stored in arrays.items() if stored.dtype.kind in 'iufb'
              and len(stored.shape) in (2, 3) and sorted(stored.shape)[-2] > 1}
    if name in usable:
        return name
    cubes = {key: stored for key, stored in usable.items()
             if len(stored.shape) == 3 and min(stored.shape) > 1}
    images = {key: stored for key, stored in cubes.items() if not (
        OTHER_LAYERS.search(last_name(key)) or LABEL_NAMES.search(last_name(key)))}
    candidates = images or cubes or usable
    if name:
        candidates = {key: stored for key, stored in usable.items() if last_name(key) == name}
    if len(candidates) == 1:
        return next(iter(candidates))
    listed = candidates or usable or arrays
    what = 'any of them could be meant' if candidates else f'none is "{name or "an image"}"'
    raise UserError(f'{path}: holds {list_arrays(listed) or "other arrays"}, and {what}: choose '
                    f'one, as {os.path.basename(path)}:{next(iter(listed), "NAME")}')


def find_vector(arrays, pattern, counts):
    """The first array of numbers in a row that has such a name and one of these `counts` of values
    -> its name, the list of its numbers, their unit; '', [], '' where there is none"""
    for name, stored in arrays.items():
        size = math.prod(stored.shape)
        if (pattern.search(last_name(name)) and size == max(stored.shape, default=1)
                and size in counts and stored.dtype.kind in 'iufb'):
            unit = attribute(stored.attrs, 'units', 'unit')
            if not unit and 'wavenumber' in name.lower():
                unit = 'wavenumber'
            return name, np.ravel(stored.read(...)).tolist(), unit
    return '', [], ''


def named_scene(path, arrays, name, axes, order=''):
    """A Scene of the named arrays of a file.

    arrays: name -> Stored. name: of the image, '' = it is found, and labels beside it. order: the
    axes of the image where the file states them, as 'hwc'.
    """
    key = pick_array(path, arrays, name)
    image = arrays[key]
    if len(image.shape) == 2:  # labels, or an image of one band
        rows = find_vector(arrays, ROWS, [1])[1]
        refuse_table(path, key, image.shape, rows and int(rows[0]) not in image.shape)
        cube = image.read(...)[None]
        return Scene(cube, notes=(shape_note(cube, f'array "{key}"'),))
    wave_name, values, unit = find_vector(arrays, WAVELENGTHS, image.shape)
    layers = {other: stored for other, stored in arrays.items()
              if stored.dtype.kind in 'iufb' and not OTHER_LAYERS.search(other)}
    sizes = {squeezed(stored) for stored in layers.values()}
    sizes &= {image.shape[:2], image.shape[1:]}
    pixels = sizes.pop() if len(sizes) == 1 else None
    order, words = choose_axes(image.shape, path, axes, order, len(values), pixels)

    def read(rows, cols):
        sides = {'c': slice(None), 'h': rows, 'w': cols}
        return to_chw(image.read(tuple(sides[letter] for letter in order)), order)
    cube = Lazy([image.shape[order.index(letter)] for letter in 'chw'], image.dtype, read)
    C = len(cube)
    scene = Scene(cube, wavelengths_nm=values if len(values) == C else None,
                  fwhm_nm=find_vector(arrays, WIDTHS, [C])[1],
                  bands=good_bands(find_vector(arrays, GOOD_BANDS, [C])[1]),
                  unit=(unit, f'"{wave_name}"'),
                  notes=(shape_note(cube, f'array "{key}", {words}'),))
    return scene if name else named_labels(scene, layers)


def squeezed(stored):
    return tuple(side for side in stored.shape if side > 1)


def named_labels(scene, layers):
    """-> the scene with the one of the layers of its size that is named as labels are; where
    several are, all of them as {name: layer}, for the caller to refuse"""
    pixels = scene.cube.shape[1:]
    maps = {name: stored for name, stored in layers.items() if squeezed(stored) == pixels}
    labels = {name: filled_with_0(stored) for name, stored in maps.items()
              if LABEL_NAMES.search(name)}
    unfit = {name: stored for name, stored in layers.items() if name not in maps
             and LABEL_NAMES.search(last_name(name)) and squeezed(stored) != scene.cube.shape
             and 2 * math.prod(stored.shape) >= math.prod(pixels)}
    if unfit and not labels:
        scene = say(scene, f'WARNING: not used, as the image has {pixels[0]} x {pixels[1]} pixels: '
                    f'{list_arrays(unfit)}. Labels are rows x columns, as the image')
    for name in [name for name, layer in labels.items() if fractions(layer).size]:
        scene = say(scene, f'WARNING: "{name}" is not taken for labels, as its values are no whole '
                    'numbers')
        del labels[name], maps[name]
    if len(labels) == 1:
        name, layer = next(iter(labels.items()))
        return say(scene._replace(labels=layer), f'labels from "{name}"')
    if maps and not labels:
        scene = say(scene, f'{list_arrays(maps)} may be labels: if so, pass --labels=FILE:NAME')
    return scene._replace(labels=labels or None)


def filled_with_0(stored):
    """Labels as stored -> array in which what their attributes call missing is 0"""
    raw = stored.read(...)
    for text in attribute_list(stored.attrs, *NODATA_NAMES):
        raw = np.where(raw == read_number(text, []), 0, raw)
    return raw


def attribute(attrs, *names):
    """The first of these attributes of HDF5 -> its text, '' where none is; names: in small letters
    without spaces and underscores, however the file spells them"""
    return next(iter(attribute_list(attrs, *names)), '')


def attribute_list(attrs, *names):
    """All values of these attributes -> their texts"""
    spelt = {re.sub('[ _]', '', name).lower(): value for name, value in attrs.items()}
    return [text_of(value) for name in names for value in np.ravel(spelt.get(name, []))]


def text_of(value):
    """An attribute or a text of HDF5 -> str"""
    value = np.ravel(value)[0] if np.size(value) else ''
    return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


# ============ MATLAB ============

# names of arrays inside structs and cells are put together with dots
READ_MAT = """
import sys, numpy, scipy.io
found = {}
def collect(name, value, depth=0):
    if not isinstance(value, numpy.ndarray) or depth > 8 or len(found) > 1000:
        return
    for field in value.dtype.names or ():
        for item in value[field].ravel()[:50]:
            collect(name + '.' + field, item, depth + 1)
    if value.dtype.kind == 'O':
        for number, item in enumerate(value.ravel()[:200], 1):
            collect(f'{name}.{number}', item, depth + 1)
    if value.dtype.kind in 'iufbc' and value.size:
        found.setdefault(name, value)
for name, value in scipy.io.loadmat(sys.argv[1]).items():
    collect(name, value)
numpy.savez(sys.argv[2], *found.values(), names=numpy.array(list(found), str))
"""


def load_mat(path):
    """The numeric arrays of a .mat file -> {name: Stored}. They are read in a process of its own:
    scipy's reader crashes the whole process on some damaged files."""
    import scipy.io  # noqa: F401  where it is missing, say so before a process is started
    with tempfile.TemporaryDirectory() as folder:
        kept = os.path.join(folder, 'arrays.npz')
        done = subprocess.run([sys.executable, '-c', READ_MAT, path, kept], capture_output=True,
                              text=True, errors='replace')
        if done.returncode or not os.path.exists(kept):
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f'the reader crashed, code {done.returncode}'
            raise UserError(f'{path}: cannot be read ({one_line(reason)}): copy or convert it '
                            'again')
        with np.load(kept) as file:
            arrays = {name: file[f'arr_{number}'] for number, name in enumerate(file['names'])}
    return {str(name): Stored(array.shape, array.dtype, array.__getitem__)
            for name, array in arrays.items()}


def read_mat(path, mmap, name, axes):
    if not is_hdf5(path):
        return named_scene(path, load_mat(path), name, axes)
    def reversed_axes(stored):
        def read(key):
            return stored.read(key if key is ... else key[::-1]).transpose()
        return stored._replace(shape=stored.shape[::-1], read=read)
    # MATLAB 7.3 is HDF5 with the axes reversed
    arrays = {key.replace('/', '.'): reversed_axes(stored)
              for key, stored in h5_arrays(path).items()}
    return named_scene(path, arrays, name, axes)


# ============ HDF5 and NetCDF ============

def is_hdf5(path):
    with open(path, 'rb') as file:
        return b'\x89HDF\r\n\x1a\n' in file.read(1 << 13)


def h5_arrays(path):
    """The arrays of an HDF5 file -> {'group/name': Stored}. What lies in other files is left out,
    and so is what references refer to, as MATLAB's cells do."""
    import h5py
    found = {}

    def read_from(item, first):
        """A reader of item[first], for Stored"""
        name, shape, dtype = item.name, item.shape, item.dtype
        # HDF5 must decompress a whole chunk to read any part of it, so a large array is unpacked
        # once into a temporary file. No compression makes it 2000 times as small: such an array
        # is mostly empty, or damaged.
        packed = item.chunks and item.ndim == 3 and item.nbytes > 4 * STRIP_BYTES
        packed = packed and item.nbytes < 2000 * item.id.get_storage_size()
        unpacked = []

        def read(key):
            with one_sentence(f'{path}:{name}'), h5py.File(path, 'r') as file:
                if key is ...:
                    return file[name][first] if first else file[name][...]
                if not packed:
                    return file[name][(*first, *key)]
                if not unpacked:
                    item = file[name]
                    blocks = ((chunk, item[chunk]) for chunk in item.iter_chunks())
                    unpacked.append(unpacked_file(path, dtype, shape, blocks))
            return read_mapped(lambda: np.memmap(unpacked[0], dtype, 'r', 0, shape), key)
        return read

    def collect(name, item):
        if isinstance(item, h5py.Group) or name.startswith('#'):
            return
        if item.external or item.is_virtual or not item.size:
            return
        if item.nbytes > 100_000 * os.path.getsize(path):
            raise UserError(f'{path}: its array {name} claims {item.size / 1e9:.0f} billion '
                            'values: the file is damaged, copy it again')
        if text_of(item.attrs.get('MATLAB_class', '')) != 'char':
            axes = [([os.path.basename(scale.name) for scale in axis.values()] or [axis.label])[0]
                    for axis in item.dims]
            # axes of length 1 before the last three, as one of a single time
            extra = item.shape[:-3] if set(item.shape[:-3]) <= {1} else ()
            inner = slice(len(extra), None)
            dtype, read = item.dtype, read_from(item, (0,) * len(extra))
            if is_unsigned(item) and dtype.kind == 'i':
                dtype = np.dtype(dtype.str.replace('i', 'u'))
                read = viewed(read, dtype)
            found[name] = Stored(item.shape[inner], dtype, read, dict(item.attrs),
                                 tuple(axes[inner]))

    with h5py.File(path, 'r') as file:
        file.visititems(collect)
    return found


def is_unsigned(array):
    """NetCDF's `_Unsigned`: numbers stored as signed, since older versions had no others"""
    return array.dtype.kind in 'iu' and attribute(array.attrs, 'unsigned').lower() == 'true'


def viewed(read, dtype):
    """The same reader, its bytes taken for `dtype`"""
    return lambda key: read(key).view(dtype)


def read_h5(path, mmap, name, axes):
    """HDF5 or NetCDF-4: PRISMA, which is known by its names, or the one cube, or the named one"""
    if not is_hdf5(path):
        raise UserError(f'{path}: is no HDF5 or NetCDF-4 file (older NetCDF and HDF4 are not '
                        'read): convert it, as nccopy -k netCDF-4 does')
    arrays = h5_arrays(path)
    if not name and any(key.endswith('_HCO/Data Fields/VNIR_Cube') for key in arrays):
        return read_prisma(path, arrays)
    key = pick_array(path, arrays, name)
    image = arrays[key]

    # NetCDF names the axes
    order = ''
    for axis in image.axes:
        for letter, words in (('c', 'band|wave|channel|lambda|spectral'),
                              ('h', '^(y|lat|row|line|down|north)'),
                              ('w', '^(x|lon|col|sample|cross|east)')):
            order += letter if re.search(words, axis, re.IGNORECASE) else ''
    order = order if sorted(order) == ['c', 'h', 'w'] else ''
    # labels may lie beside the image, other layers of a product in other groups
    group = key[:key.rfind('/') + 1]
    beside = {other: stored for other, stored in arrays.items()
              if len(stored.shape) < 2 or other[:other.rfind('/') + 1] == group}
    scene = named_scene(path, beside, name, axes, order)

    # the axis of the bands may be numbered by their wavelengths, in a unit of these
    band_axis = image.axes[order.index('c')] if order else ''
    numbers = arrays.get(group + band_axis)
    unit = attribute(numbers.attrs, 'units') if numbers else ''
    if not scene.wavelengths_nm and unit.lower().removesuffix('s') in UNITS_NM:
        values = np.ravel(numbers.read(...)).tolist()
        scene = scene._replace(wavelengths_nm=values, unit=(unit, f'"{band_axis}"'))

    # attributes by the CF conventions, and NEON's, whose factor divides
    factors, offsets = (attribute_list(image.attrs, name) for name in ('scalefactor', 'addoffset'))
    if 'scale_factor' not in image.attrs:
        factors = [1 / float(text) if float(text) > 1 else text for text in factors]
    nodata = list(dict.fromkeys(filter(None, attribute_list(image.attrs, *NODATA_NAMES))))
    if is_unsigned(image):  # so is the filler: -1 is 255 in one byte
        numbers = 256 ** image.dtype.itemsize
        nodata = [str(int(float(value)) % numbers) for value in nodata]
    if len(nodata) > 1:
        scene = say(scene, f'WARNING: states {" and ".join(nodata)} for missing pixels, of which '
                    f'{nodata[0]} is used: --nodata= chooses another')
    for name in ('validrange', 'validmin', 'validmax'):
        if attribute(image.attrs, name):
            scene = say(scene, f'WARNING: its attribute "{name}" is not used')
    if any(other.endswith('glt_x') for other in arrays):
        scene = say(scene, 'in the geometry of the sensor: its look-up table to the map (glt) is '
                    'not applied')
    return scene._replace(scale=(factors or None, offsets or None), nodata=(nodata or [None])[0],
                          geotags=h5_place(arrays, key, order))


def h5_place(arrays, key, order):
    """GeoTIFF tags of an array: NEON's Map_Info, GeoTransform as GDAL writes it for CF, or evenly
    spaced coordinates of the centres of its rows and columns. order: its axes, as 'hwc', or ''"""
    group = key[:key.rfind('/') + 1]
    info, wkt = (arrays.get(f'{group}Metadata/Coordinate_System/{name}')
                 for name in ('Map_Info', 'Coordinate_System_String'))
    if info:
        wkt = text_of(wkt.read(...)) if wkt else ''
        return envi_geotags(text_of(info.read(...)).split(','), wkt)
    mapping = arrays.get(group + text_of(arrays[key].attrs.get('grid_mapping', '')))
    attrs = mapping.attrs if mapping else {}
    wkt = attribute(attrs, 'crswkt', 'spatialref')
    numbers = [float(word) for word in attribute(attrs, 'geotransform').split()]
    if len(numbers) == 6:
        return place_tags(numbers, wkt)
    axes = [arrays.get(group + arrays[key].axes[order.index(letter)]) for letter in 'wh' if order]
    if len(axes) < 2 or None in axes:
        return ()
    matrix = []
    for axis in axes:
        unit = attribute(axis.attrs, 'units').lower()
        centres = np.ravel(axis.read(...)) * (1e3 if unit in ('km', 'kilometers') else 1.0)
        even = np.linspace(centres[0], centres[-1], len(centres))
        step = (centres[-1] - centres[0]) / max(len(centres) - 1, 1)
        if not step or np.abs(centres - even).max() > abs(step) / 10:
            return ()
        if not wkt and not unit.startswith('degree'):  # they may count pixels
            return ()
        matrix.append((centres[0] - step / 2, step))
    (x, dx), (y, dy) = matrix
    return place_tags((x, dx, 0.0, y, 0.0, dy), wkt, None if wkt else 4326)


def read_prisma(path, arrays):
    """PRISMA L1 and L2: the cubes (rows, bands, columns) of two detectors, which are brought to the
    order of their wavelengths"""
    import h5py
    with h5py.File(path, 'r') as file:
        attrs = dict(file.attrs)
    fields = next(key for key in arrays if key.endswith('_HCO/Data Fields/VNIR_Cube'))[:-9]
    cubes = {name: arrays[f'{fields}{name.upper()}_Cube'] for name in ('Vnir', 'Swir')}
    H, _, W = cubes['Vnir'].shape
    level = fields.split('PRS_')[1].split('_')[0]

    def stated(pattern):
        """One value for each band of both detectors, of lists or of single numbers"""
        return np.concatenate([np.broadcast_to(np.ravel(attrs[pattern.format(name)]).astype(float),
                                               cube.shape[1]) for name, cube in cubes.items()])
    nm = stated('List_Cw_{}')
    recorded = (nm > 0) & (stated('List_Cw_{}_Flags') > 0)
    order = [band for band in np.argsort(nm, kind='stable') if recorded[band]]
    if level == 'L1':
        gains, offsets = 1 / stated('ScaleFactor_{}'), -stated('Offset_{}')
    else:
        offsets = stated('L2Scale{}Min')
        gains = (stated('L2Scale{}Max') - offsets) / 65535

    def read(rows, cols):
        blocks = [cube.read((rows, slice(None), cols)) for cube in cubes.values()]
        return np.concatenate(blocks, 1)[:, order].transpose(1, 0, 2)
    cube = Lazy((len(order), H, W), cubes['Vnir'].dtype, read)
    quantity = 'radiance' if level in ('L1', 'L2B') else 'reflectance'
    words = f'PRISMA {level}, {quantity} of two detectors'
    notes, bands = [shape_note(cube, words)], None

    # outside of the image all bands are 0; a 0 of level 2 inside is a retrieval that failed, and
    # a band where most did, as in those of water vapour, is bad
    mask, values = np.zeros((H, W), bool), 0
    for strip in strips(cube):
        stored = cube[:, strip] != 0
        mask[strip] = stored.any(0)
        values += stored.sum((1, 2))
    if level != 'L1':
        bands = np.flatnonzero(values >= mask.sum() / 2).tolist()
        share = 1 - values[bands].sum() / max(mask.sum() * len(bands), 1)
        notes.append(f'{share:.2%} of the values are 0, where the retrieval failed: kept as 0')

    # L2D states the centres of its corner pixels
    geotags = ()
    if level == 'L2D':
        left, top, right, bottom = (float(attrs[f'Product_{corner}']) for corner in (
            'ULcorner_easting', 'ULcorner_northing', 'LRcorner_easting', 'LRcorner_northing'))
        width, height = (right - left) / max(W - 1, 1), (top - bottom) / max(H - 1, 1)
        matrix = (left - width / 2, width, 0.0, top + height / 2, 0.0, -height)
        if 0.98 * height < width < 1.02 * height:  # else they are those of another image
            geotags = place_tags(matrix, epsg=int(attrs['Epsg_Code']))
    return Scene(cube, wavelengths_nm=nm[order].tolist(),
                 fwhm_nm=stated('List_Fwhm_{}')[order].tolist(),
                 unit=('nm', 'List_Cw_Vnir and List_Cw_Swir'), geotags=geotags,
                 scale=(gains[order], offsets[order]), bands=bands, notes=tuple(notes), mask=mask)


# ============ the readers by the ending of a name ============

# each: reader(path, mmap, name, axes) -> Scene; cube (C, H, W), mmap a Lazy, labels as they are
READERS = {'.tif': read_tiff, '.tiff': read_tiff, '.npz': read_numpy, '.npy': read_numpy,
           '.mat': read_mat, '.hdr': read_envi, '.h5': read_h5, '.hdf5': read_h5,
           '.he5': read_h5, '.nc': read_h5}
