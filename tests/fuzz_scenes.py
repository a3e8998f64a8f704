"""Damaged scene files by the hundred: python tests/fuzz_scenes.py [count [seed]]

Makes small scenes of every format, damages them (bit flips, cut ends, zeroed and swapped stretches, damage in the header), and reads them.
Each must give a scene or one UserError that names the file: no other exception, no crash, no hang, and no more than 4 GB of memory. Where only
pixels are damaged, or what of an ENVI header nobody reads, so that the file says the same as before, a scene has the sound file's values everywhere
else; where a checksum or a cut end gives the damage away, there is no scene.
"""
import os
import resource
import signal
import sys
import tempfile
import warnings
import zipfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from scenes import UserError, read_scene


def make_cube():
    return np.random.default_rng(0).integers(1, 4000, (24, 20, 5)).astype(np.uint16)


def make_files(folder):
    """-> paths of small valid scenes, one of each format and kind"""
    import tifffile
    from scipy.io import savemat
    rng, cube = np.random.default_rng(1), make_cube()
    bands = np.moveaxis(cube, 2, 0)
    labels = rng.integers(0, 4, (24, 20)).astype(np.uint8)
    path = lambda name: os.path.join(folder, name)
    metadata = ''.join(f'<Item name="wavelength" sample="{b}">{400 + 100 * b}</Item><Item name="SCALE" sample="{b}" role="scale">0.1</Item>' for b in range(5))
    tags = [(42112, 's', 0, f'<GDALMetadata>{metadata}</GDALMetadata>', True), (42113, 's', 0, '0', True), (33550, 'd', 3, (30.0, 30.0, 0.0), True),
            (33922, 'd', 6, (0.0, 0.0, 0.0, 350000.0, 5800000.0, 0.0), True), (34735, 'H', 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True)]
    options = dict(photometric='minisblack', metadata=None)
    tifffile.imwrite(path('plain.tif'), cube, planarconfig='contig', photometric='minisblack')
    tifffile.imwrite(path('gdal.tif'), cube, planarconfig='contig', extratags=tags, rowsperstrip=5, **options)
    tifffile.imwrite(path('deflate.tif'), bands, planarconfig='separate', photometric='minisblack', compression='zlib', rowsperstrip=8)
    tifffile.imwrite(path('float.tif'), cube.astype(np.float32), planarconfig='contig', photometric='minisblack', tile=(16, 16), bigtiff=True)
    tifffile.imwrite(path('tiled.tif'), bands, planarconfig='separate', extratags=tags, tile=(16, 16), compression='zlib', predictor=2, byteorder='>', **options)
    tifffile.imwrite(path('array.tif'), cube, photometric='minisblack')
    alpha = np.where(np.arange(20) < 3, 0, 65535)[None].repeat(24, 0)[None].astype(np.uint16)
    tifffile.imwrite(path('alpha.tif'), np.concatenate([bands, alpha]), planarconfig='separate', extrasamples=[0, 0, 0, 0, 2], extratags=tags[:1], **options)
    palette = rng.integers(0, 65535, (3, 256)).astype(np.uint16)
    tifffile.imwrite(path('labels.tif'), labels, photometric='palette', colormap=palette, compression='zlib', metadata=None)
    with tifffile.TiffWriter(path('pages.tif')) as file:
        for band in bands:
            file.write(band, compression='zlib', **options)
        file.write(labels > 0, subfiletype=2, **options)
    with tifffile.TiffFile(path('pages.tif'), mode='r+b') as tif:
        tif.pages[5].tags['NewSubfileType'].overwrite(4)
    np.savez(path('a.npz'), cube=cube, labels=labels, wavelengths_nm=np.linspace(400, 900, 5), nodata=0, class_names=['a', 'b', 'c'], scale=[0.1, 0])
    np.savez_compressed(path('b.npz'), cube=cube.astype(np.float64), labels=labels)
    np.save(path('c.npy'), cube)
    np.save(path('fortran.npy'), np.asfortranarray(cube))
    savemat(path('d.mat'), {'cube': cube, 'gt': labels})
    savemat(path('e.mat'), {'cube': cube}, do_compression=True)
    cube.tofile(path('f.img'))
    open(path('f.hdr'), 'w').write('ENVI\nsamples = 20\nlines = 24\nbands = 5\nheader offset = 0\nfile type = ENVI Standard\ndata type = 12\n'
                                   'interleave = bip\nbyte order = 0\nwavelength = {400, 500, 600, 700, 800}\n')
    return sorted(path(name) for name in os.listdir(folder) if not name.endswith('.img'))


def pixel_ranges(path):
    """-> (start, end) of the stretches of a sound file that hold nothing but pixels, and whether a damaged pixel can be told from a sound one"""
    import tifffile
    if path.lower().endswith('.tif'):
        with tifffile.TiffFile(path) as tif:
            pages = [page for page in tif.pages if not page.keyframe.subfiletype & 4]
            packed = pages[0].keyframe.compression != 1
            return [(at, at + size) for page in pages for at, size in zip(page.dataoffsets, page.databytecounts)], packed
    if path.endswith('.npy'):
        return [(os.path.getsize(path) - 24 * 20 * 5 * 2, os.path.getsize(path))], False
    if path.endswith('.npz'):
        with zipfile.ZipFile(path) as file:
            member = file.getinfo('cube.npy')
            start = member.header_offset + 30 + len('cube.npy') + 20  # 20: the extra field
            return [(start + 128, start + member.compress_size)], True
    content = open(path, 'rb').read()
    if path.endswith('.bsq'):
        return [(0, len(content))], False
    if path.endswith('.mat') and b'MATLAB 5.0' in content[:128]:
        if path.endswith('e.mat'):
            return [(136, len(content))], True
        import test_formats
        ranges = [(content.find(cube.tobytes('F')), cube.nbytes) for cube in (make_cube(), test_formats.HWC)]
        return [(at, at + size) for at, size in ranges if at > 0], False
    if b'\x89HDF\r\n\x1a\n' in content[:1024]:
        return hdf5_ranges(path, content)
    return [], False


def hdf5_ranges(path, content):
    """-> as pixel_ranges(), of all arrays of three axes"""
    import h5py
    ranges, packed = [], False

    def collect(name, array):
        nonlocal packed
        if getattr(array, 'ndim', 0) != 3:
            return
        if array.chunks:
            packed = True
            infos = [array.id.get_chunk_info(number) for number in range(array.id.get_num_chunks())]
            ranges.extend((info.byte_offset, info.byte_offset + info.size) for info in infos)
        else:
            at = content.find(array[()].tobytes())
            assert at > 0, name
            ranges.append((at, at + array.nbytes))
    with h5py.File(path, 'r') as file:
        file.visititems(collect)
    assert ranges, path
    return ranges, packed


def same_header(before, after):
    """Says a damaged ENVI header the same as the sound one, by another program's reader?"""
    from spectral.io.envi import read_envi_header
    told = []
    for content in (before, after):
        with tempfile.NamedTemporaryFile(suffix='.hdr') as file:
            file.write(content)
            file.flush()
            try:
                warnings.simplefilter('ignore')
                told.append({name: value for name, value in read_envi_header(file.name).items() if name not in ('file type', 'class names', 'class lookup')})
            except Exception:
                return False
    return told[0] == told[1]


def check_values(source, sound, scene, before, after, ranges, packed):
    """Where only pixels were damaged, the scene has the sound one's values elsewhere"""
    size = max(len(before), len(after))
    old, new = (np.frombuffer(content.ljust(size, b'\0'), np.uint8) for content in (before, after))
    changed = np.flatnonzero(old != new)
    inside = np.zeros(size, bool)
    for start, end in ranges:
        inside[start:end] = True
    same = source.endswith('.hdr') and same_header(before, after)
    if not same and not (ranges and inside[changed].all()):
        return False
    if scene.bands != sound.bands and not (packed or same):  # a band that became 0 everywhere is left out
        return False
    differ = np.inf
    if scene.cube.shape == sound.cube.shape:
        pixels = ~np.isclose(np.asarray(sound.cube), np.asarray(scene.cube), rtol=0, atol=0, equal_nan=True).all(0)
        differ = np.count_nonzero(pixels)
    cut = len(before) != len(after) and not same
    assert not cut and differ <= (0 if packed or same else len(changed)), f'{differ} pixels differ after {len(changed)} bytes were damaged'
    return True


def more_files(folder):
    """-> [(file to damage, path to read)] of formats whose files test_formats.py writes; those of HDF5 where h5py is installed"""
    import test_formats as formats
    from pathlib import Path
    folder = Path(folder)
    header = dict(wavelength=formats.NM, bbl=[1, 1, 0, 1, 1, 1], map_info=[*formats.UTM, 'rotation=20'], data_ignore_value=-9999,
                  data_gain_values=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], class_names=['a', 'b', 'c'], class_lookup=[0, 0, 0, 1, 1, 1, 2, 2, 2])
    data = formats.write_envi(folder / 'envi.bsq', big_endian=True, offset=64, **header)
    struct = formats.savemat(folder / 'struct.mat', {'hsi': {'Data': formats.HWC, 'info': {'wavelength': formats.NM}, 'gt': formats.LABELS}})
    tif = formats.tiff(folder / 'ENMAP01-L2A-SPECTRAL_IMAGE.TIF', formats.CUBE, -32768)
    formats.enmap(folder / 'ENMAP01-L2A-METADATA.XML', formats.NM, [1e-4] * formats.C)
    pairs = [(str(folder / 'envi.hdr'), data), (data, data), (struct, struct), (str(folder / 'ENMAP01-L2A-METADATA.XML'), tif)]
    try:
        import h5py
    except ImportError:
        return pairs
    files = [formats.save73(folder / 'v73.mat', {'scene': {'data': formats.HWC, 'wavelengths': formats.NM[None]}, 'gt': formats.LABELS, 'list': [formats.NM]}),
             formats.prisma(folder / 'PRS_L2D.he5', 'L2D')[0], formats.prisma(folder / 'PRS_L1.he5', 'L1')[0], str(folder / 'chunks.h5'),
             formats.h5(folder / 'EMIT.nc', {'reflectance': (formats.HWC.astype(np.float32), {'_FillValue': np.float32([-9999])}),
                                             'sensor_band_parameters/wavelengths': formats.NM, 'sensor_band_parameters/good_wavelengths': np.uint8([1] * 6)})]
    with h5py.File(folder / 'chunks.h5', 'w') as file:
        file.create_dataset('x/cube', data=formats.HWC, chunks=(3, 4, 6), compression='gzip')
        file['wavelength'] = formats.NM
    return pairs + [(path, path) for path in files]


def damage(content, rng, ranges):
    """bytes -> damaged bytes: a third of the time anywhere, in the first 400 bytes, or in pixels"""
    data, kind = bytearray(content), rng.integers(6)
    if kind == 0:
        return bytes(data[:rng.integers(len(data))])
    areas = [[(0, len(data))], [(0, min(len(data), 400))], ranges or [(0, len(data))]][rng.integers(3)]
    for _ in range(int(rng.integers(1, 9))):
        start, stop = areas[rng.integers(len(areas))]
        at, other, length = int(rng.integers(start, stop)), int(rng.integers(start, stop)), int(rng.integers(1, 40))
        if kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at] = int(rng.integers(256))
        elif kind == 3:
            data[at:at + length] = bytes(len(data[at:at + length]))
        elif kind == 4:
            data[at:at + length] = b'\xff' * len(data[at:at + length])
        else:
            data[at:at + length], data[other:other + length] = data[other:other + length], data[at:at + length]
    return bytes(data)


def fuzz(folder, count, seed):
    """Read `count` damaged files -> ending -> how many were damaged, gave a scene, and were compared. Anything but a scene or a sentence is raised
    at the end."""
    rng, failures, numbers = np.random.default_rng(seed), [], {}
    files = [(path, path) for path in make_files(folder)] + more_files(folder)
    sound = {source: (open(source, 'rb').read(), read_scene(path), *pixel_ranges(source)) for source, path in files}
    for i in range(count):
        source, path = files[i % len(files)]
        row = numbers.setdefault(os.path.splitext(source)[1].lower(), [0, 0, 0])
        row[0] += 1
        before, sound_scene, ranges, packed = sound[source]
        content = damage(before, rng, ranges)
        open(source, 'wb').write(content)
        signal.alarm(20)  # a hang ends the process
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                scene = read_scene(path, mmap=bool(rng.integers(2)))
            np.asarray(scene.cube)  # what stays on disk can be read
            assert scene.cube.ndim == 3 and scene.cube.dtype.kind in 'iuf' and (scene.labels is None or scene.labels.dtype == np.uint8)
            assert scene.notes and all(isinstance(note, str) and '\n' not in note for note in scene.notes), scene.notes
            row[2] += check_values(source, sound_scene, scene, before, content, ranges, packed)
            row[1] += 1
        except Exception as error:
            text = str(error)
            told = isinstance(error, UserError) and '\n' not in text and any(os.path.splitext(name)[0] in text for name in (path, source))
            if not told:
                kept = os.path.join(tempfile.gettempdir(), f'fuzz_{seed}_{i}_{os.path.basename(source)}')
                open(kept, 'wb').write(content)
                failures.append(f'file {i} of seed {seed}, kept as {kept}: {type(error).__name__}: {text}')
                print(failures[-1], flush=True)
        finally:
            signal.alarm(0)
            open(source, 'wb').write(before)
    assert not failures, f'{len(failures)} failures: ' + '\n'.join(failures)
    return numbers


if __name__ == '__main__':
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    count, seed = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 300), (2, 0)))
    with tempfile.TemporaryDirectory() as folder:
        numbers = fuzz(folder, count, seed)
    for ending, (damaged, read, compared) in sorted(numbers.items()):
        print(f'{ending}: {damaged} damaged, {read} read ({compared} of them compared with the sound file), {damaged - read} refused in a sentence')
    print(f'{count} damaged files: none did anything else')
