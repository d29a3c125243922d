"""Whatever Pillow can write and read, DALI's pixels are those of ImageFolder, or it is refused."""

import functools
import io
import itertools
import struct
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.datasets import DatasetFolder, ImageFolder
from torchvision.datasets.folder import default_loader, pil_loader

from dlhelpers.dali_io import (
    DALILoader,
    ImageError,
    has_dali,
    image_pipeline,
    sources,
    torchvision_transform,
)
from dlhelpers.dali_io.formats import by_pillow, dali_size
from dlhelpers.dali_io.sources import open_source
from dlhelpers.lmdb_io import LMDBDataset, write_lmdb
from dlhelpers.lmdb_io.plain import is_plain_folder, own_reading

needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI (extra dali) is for Linux only")
WIDTH, HEIGHT, SIZE = 61, 43, 32
MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB"),
    *("HSV", "I", "I;16", "I;16B", "F"),
)
SAVED = {  # options beside the default
    "JPEG": [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}],
    "WEBP": [{"lossless": True}],
    "PNG": [{"bits": 4}, {"bits": 2}, {"bits": 1}, {"transparency": 0}],
    "TIFF": [
        {"compression": "tiff_lzw"},
        {"compression": "tiff_adobe_deflate"},
        {"compression": "packbits"},
        {"compression": "jpeg"},
        {"compression": "group4"},
        {"big_tiff": True},
        {"tiffinfo": {262: 0}},
    ],
    "GIF": [{"transparency": 0}],
    "JPEG2000": [{"irreversible": True}],
}
ORIENTATIONS = dict.fromkeys(("JPEG", "PNG", "TIFF", "WEBP"), range(1, 9))
ORIENTATIONS |= dict.fromkeys(("AVIF", "JPEG2000", "MPO"), (1, 6))  # slow to write


@functools.cache
def photo():
    """Colours that tell every corner from every other."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = 40 * np.sin(rows / 5) * np.cos(columns / 7)
    channels = [4 * columns, 5 * rows, 90 + waves + columns]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


@functools.cache
def in_mode(mode):
    grey = np.asarray(photo().convert("L"))
    if mode.startswith("I;16"):
        return Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2" if mode[4:] else "<u2"))
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 257)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = photo().convert("RGBA")
        alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
        image.putalpha(Image.fromarray(alpha))
        return image.convert("LA").convert(mode) if mode in ("La", "PA") else image.convert(mode)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(photo(), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    return photo().convert(mode)


def encoded(image, form, orientation=1, **options):
    """Return a file's bytes, None where Pillow cannot write it."""
    if orientation != 1 and form == "TIFF":
        options["tiffinfo"] = {**options.get("tiffinfo", {}), 274: orientation}
    elif orientation != 1:
        exif = Image.Exif()
        exif[274] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, **options)
    except Exception:  # Pillow raises a dozen kinds
        return None
    return buffer.getvalue()


def pillows_files():
    """Every format x mode x option x orientation that Pillow writes and ImageFolder reads."""
    Image.init()
    for form, mode in itertools.product(sorted(Image.SAVE), MODES):
        for options in [{}, *SAVED.get(form, [])]:
            turned = ORIENTATIONS.get(form, (1,))
            for orientation in turned[:6:5] if options else turned:
                data = encoded(in_mode(mode), form, orientation, **options)
                if data:
                    yield f"{form}, mode {mode}, {options}, orientation {orientation}", data


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(kind, depth, rows, before=b""):
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def jpeg_of(adobe=None, jfif=True, names=(1, 2, 3), mode="RGB"):
    """Return a JPEG whose headers say of its colours what they are told to."""
    data = encoded(photo().convert(mode), "JPEG", quality=92, subsampling=0)
    if (at := data.find(b"Adobe") - 4) > 0:
        data = data[:at] + data[at + 16 :]
    if not jfif and data[3] == 0xE0:
        data = data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]
    if adobe is not None:
        told = (
            b"\xff\xee" + struct.pack(">H", 14) + b"Adobe" + struct.pack(">HHHB", 100, 0, 0, adobe)
        )
        data = data[:2] + told + data[2:]
    data = bytearray(data)
    frame, scan = data.find(b"\xff\xc0"), data.find(b"\xff\xda")
    for number, name in enumerate(names if mode == "RGB" else ()):
        data[frame + 10 + 3 * number] = data[scan + 5 + 2 * number] = name
    return bytes(data)


def others_files():
    """What Pillow reads, but does not write, or only together with something else."""
    colours = np.asarray(photo())
    wide = colours.astype(np.uint16)
    red = Image.new("RGB", (30, 20), "red")
    several = {"save_all": True, "append_images": [red.resize((WIDTH, HEIGHT))]}
    for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"):
        yield f"{form} with frames", encoded(photo(), form, **several)
    yield "PNG with frames beside the image", encoded(photo(), "PNG", default_image=True, **several)
    yield "PNG, 16-bit RGB", png(2, 16, (wide * 257).astype(">u2"))
    yield "PNG, 16-bit RGB, low bytes", png(2, 16, (wide * 256 + 200).astype(">u2"))
    yield "PNG with gamma", png(2, 8, colours, chunk(b"gAMA", struct.pack(">I", 45_455)))
    yield "PNG with a transparent colour", png(2, 8, colours, chunk(b"tRNS", bytes(6)))
    for adobe, jfif, names in itertools.product(
        (None, 0, 1, 2), (True, False), ((1, 2, 3), b"RGB")
    ):
        yield f"JPEG, Adobe {adobe}, JFIF {jfif}, {names}", jpeg_of(adobe, jfif, names)
    for adobe in (None, 0, 1, 2):
        yield f"JPEG, CMYK, Adobe {adobe}", jpeg_of(adobe, mode="CMYK")
    yield "JPEG without an end", jpeg_of()[:-2]
    yield "JPEG with something behind", jpeg_of() + b"x" * 99
    flat = b"".join(row.tobytes().ljust(184, b"\0") for row in colours[..., ::-1])
    told = (54 + len(flat), 0, 0, 54, 40, WIDTH, -HEIGHT, 1, 24, 0, len(flat), 0, 0, 0, 0)
    yield "BMP from the top", b"BM" + struct.pack("<IHHIIiiHHIIiiII", *told) + flat
    size = b"%d %d\n" % (WIDTH, HEIGHT)
    text = " ".join(str(value) for value in colours.ravel()).encode()
    yield "PPM in ASCII", b"P3\n" + size + b"255\n" + text
    yield "PPM to 100", b"P6\n" + size + b"100\n" + (colours // 3).tobytes()
    yield "PPM, 16-bit", b"P6\n# says\n" + size + b"65535\n" + (wide * 257).astype(">u2").tobytes()


OPTIONS = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def both(folder, files):
    """Return name -> (ImageFolder's pixels, DALI's), None for what is refused."""
    transform = torchvision_transform(SIZE, train=False, resize=SIZE, **OPTIONS)
    wanted, paths = [], []
    for number, (_, data) in enumerate(files):
        paths.append(folder / f"{number}.jpg")  # the content counts, not the name
        paths[-1].write_bytes(data)
        try:
            wanted.append(255 * transform(default_loader(str(paths[-1]))))
        except Exception:  # Pillow raises a dozen kinds
            wanted.append(None)
    samples = [(path, number) for number, path in enumerate(paths)]
    pipeline = image_pipeline(
        samples, size=SIZE, resize=SIZE, batch_size=32, train=False, device="cpu", **OPTIONS
    )
    found = [None] * len(files)
    for images, numbers in DALILoader(pipeline, on_error="skip"):
        for image, number in zip(images, numbers.tolist(), strict=True):
            found[number] = 255 * image
    return {
        name: pair for (name, _), pair in zip(files, zip(wanted, found, strict=True), strict=True)
    }


def wrong(pairs):
    """Return the names of files whose pixels differ, and of those that only one side reads."""
    told = []
    for name, (wanted, found) in pairs.items():
        if (wanted is None) != (found is None):
            told.append(f"{name}: refused by {'ImageFolder' if wanted is None else 'DALI'} alone")
        elif wanted is not None and (off := (wanted - found).abs().max().item()) > 2.001:
            told.append(f"{name}: {off:.0f} of 255 apart")
    return told


@needs_dali
@pytest.mark.filterwarnings("ignore")
def test_every_format_mode_and_orientation_gives_imagefolders_pixels(tmp_path):
    files = list(pillows_files())
    assert {name.partition(",")[0] for name, _ in files} > {"JPEG", "PNG", "TIFF", "WEBP", "BMP"}
    pairs = both(tmp_path, files)
    assert wrong(pairs) == []
    assert sum(wanted is not None for wanted, _ in pairs.values()) > 600


@needs_dali
@pytest.mark.filterwarnings("ignore")
def test_files_that_pillow_only_reads_give_imagefolders_pixels(tmp_path):
    files = [(name, data) for name, data in others_files() if data]
    pairs = both(tmp_path, files)
    assert wrong(pairs) == []
    assert [name for name, (wanted, _) in pairs.items() if wanted is None] in (
        [],
        ["JPEG without an end"],  # as this Pillow sees it
    )


@needs_dali
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_cut_or_overwritten_is_refused_where_imagefolder_refuses_it(tmp_path):
    files = []
    for form, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("WEBP", {}),
        ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}), ("PPM", {}),
    ):  # fmt: skip
        data = encoded(photo(), form, **options)
        for share in (0.01, 0.1, 0.5, 0.9, 0.999):
            files.append((f"{form}, {options}, cut to {share}", data[: int(share * len(data))]))
        if form in ("PNG", "TIFF"):  # elsewhere a decoder may notice or not
            middle = len(data) // 2
            files.append((f"{form}, {options}, zeroed", data[:middle] + bytes(len(data) - middle)))
    assert wrong(both(tmp_path, files)) == []


@needs_dali
def test_the_training_pipeline_crops_what_pillow_decodes(tmp_path):
    """The same windows of the same picture, be it decoded by DALI or by Pillow."""
    batches = []
    for form, options in (("PNG", {}), ("TIFF", {"compression": "tiff_lzw"})):
        image = photo().transpose(Image.Transpose.ROTATE_90) if form == "TIFF" else photo()
        data = encoded(image, form, orientation=1 if form == "PNG" else 6, **options)
        assert (dali_size(data) is None) == (form == "TIFF")
        (tmp_path / form).write_bytes(data)
        pipeline = image_pipeline(
            [(tmp_path / form, 0)] * 8, size=SIZE, batch_size=8, train=True, device="cpu"
        )
        batches.append(next(iter(DALILoader(pipeline, seed=3)))[0])
    assert torch.equal(*batches)


@needs_dali
def test_a_database_of_such_files_gives_their_pixels_as_well(tmp_path):
    (tmp_path / "photos" / "c").mkdir(parents=True)
    images = {
        "a.png": encoded(in_mode("I;16"), "PNG"),
        "b.tif": encoded(photo(), "TIFF", orientation=6),
        "c.jpg": jpeg_of(mode="CMYK"),
        "d.jpg": jpeg_of(),
    }
    for name, data in images.items():
        (tmp_path / "photos" / "c" / name).write_bytes(data)
    write_lmdb(tmp_path / "photos", tmp_path / "photos.lmdb", progress=False)
    wanted, found = (
        torch.cat([images for images, _ in DALILoader(pipeline)])
        for pipeline in (
            image_pipeline(source, size=SIZE, batch_size=4, train=False, device="cpu")
            for source in (tmp_path / "photos", LMDBDataset(tmp_path / "photos.lmdb"))
        )
    )
    assert torch.equal(wanted, found)


@needs_dali
@pytest.mark.parametrize("first", ["raw", "png"])
def test_a_database_may_hold_encoded_images_beside_pixels(tmp_path, first):
    pixels = np.asarray(photo())
    raw = b"RAW\0" + struct.pack("<II", *pixels.shape[:2]) + pixels.tobytes()
    items = [("raw", raw, 0), ("png", encoded(photo(), "PNG"), 1)]
    write_lmdb(items if first == "raw" else items[::-1], tmp_path / "db", progress=False)
    pipeline = image_pipeline(
        LMDBDataset(tmp_path / "db"), size=SIZE, batch_size=2, train=False, device="cpu"
    )
    images, _ = next(iter(DALILoader(pipeline)))
    assert torch.equal(images[0], images[1])


# ---- what headers say ----


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ],
)
def test_common_files_are_left_to_dali_with_the_size_in_their_header(form, options):
    assert dali_size(encoded(photo(), form, **options)) == (HEIGHT, WIDTH)


def test_pixels_of_pillow_go_to_dali_as_a_file_that_it_decodes():
    data, size = by_pillow(encoded(photo(), "GIF"))
    assert size == dali_size(data) == (HEIGHT, WIDTH)
    wanted = Image.open(io.BytesIO(encoded(photo(), "GIF"))).convert("RGB")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(wanted))


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"II*\0"])
def test_what_is_no_image_is_told_with_its_first_bytes(data):
    assert dali_size(data) is None
    with pytest.raises(ValueError, match="no bytes at all" if not data else "starting with|Pillow"):
        by_pillow(data)


@needs_dali
def test_a_jpeg_without_pixels_is_told(tmp_path):
    data = bytearray(jpeg_of())
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 7] = bytes(2)
    (tmp_path / "a.jpg").write_bytes(data)
    pipeline = image_pipeline(
        [(tmp_path / "a.jpg", 0)], size=8, batch_size=1, train=False, device="cpu"
    )
    with pytest.raises(ImageError, match=r"1 image cannot be read: .*a\.jpg"):
        list(DALILoader(pipeline))


# ---- datasets that do more than read ----


def upright(path):
    return default_loader(path).rotate(180)


class Relabelled(ImageFolder):
    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        return image, 7


class Fetched(ImageFolder):
    def __getitems__(self, indices):
        return [(self[index][0], 7) for index in indices]


class Shortened(ImageFolder):
    def __len__(self):
        return 1


class Sorted(ImageFolder):
    """Only lists its files in another way: they are read as they are."""

    def find_classes(self, directory):
        classes, numbers = super().find_classes(directory)
        return classes, {name: 10 + number for name, number in numbers.items()}


class Own:
    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, index):
        return upright(self.samples[index][0]), 7


class OwnDatabase(LMDBDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], 7


def later(folder, name):
    setattr(folder, name, lambda value: value)  # which VisionDataset's .transforms says nothing of
    return folder


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.png").write_bytes(encoded(photo(), "PNG"))
    return tmp_path / "photos"


@needs_dali
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: ImageFolder(f, loader=upright), "ImageFolder has loader=.*upright"),
        (lambda f: ImageFolder(f, loader=lambda p: default_loader(p)), "has loader="),
        (lambda f: DatasetFolder(f, upright, (".png",)), "DatasetFolder has loader="),
        (Relabelled, r"Relabelled has its own __getitem__ \(Relabelled\.__getitem__\)"),
        (Fetched, "its own __getitems__"),
        (Shortened, "its own __len__"),
        (lambda f: type("Kin", (Relabelled,), {})(f), r"Kin has .*\(Relabelled\.__getitem__\)"),
        (lambda f: Own(ImageFolder(f).samples), "Own has its own __getitem__"),
        (lambda f: later(ImageFolder(f), "transform"), "has transform="),
        (lambda f: later(ImageFolder(f), "target_transform"), "has target_transform="),
    ],
)
def test_a_dataset_that_does_more_than_read_is_refused(folder, make, says):
    dataset = make(folder)
    assert not is_plain_folder(dataset)
    with pytest.raises(ValueError, match=says):
        image_pipeline(dataset, size=8, batch_size=1, train=False)


@needs_dali
def test_a_database_class_of_ones_own_is_refused(folder, tmp_path):
    write_lmdb(folder, tmp_path / "db", progress=False)
    with pytest.raises(ValueError, match="OwnDatabase has its own __getitem__"):
        image_pipeline(OwnDatabase(tmp_path / "db"), size=8, batch_size=1, train=False)


@pytest.mark.parametrize(
    "make",
    [
        ImageFolder,
        Sorted,
        lambda f: ImageFolder(f, loader=pil_loader),
        lambda f: DatasetFolder(f, default_loader, (".png",)),
        lambda f: ImageFolder(f, is_valid_file=lambda path: path.endswith("png")),
    ],
)
def test_a_dataset_that_only_lists_its_files_otherwise_is_read(folder, make):
    dataset = make(folder)
    assert is_plain_folder(dataset)
    source = sources.open_source(dataset)
    assert source.targets.tolist() == [target for _, target in dataset.samples]


def test_whatever_only_has_samples_is_read(folder):
    samples = ImageFolder(folder).samples
    dataset = types.SimpleNamespace(samples=samples)
    assert own_reading(dataset) == ""
    assert not is_plain_folder(dataset)  # it is none of torchvision's
    assert sources.open_source(dataset).targets.tolist() == [0, 1]


@pytest.mark.parametrize("make", [lambda f: ImageFolder(f, loader=upright), Relabelled])
def test_write_lmdb_stores_what_such_a_dataset_gives(folder, tmp_path, make):
    dataset = make(folder)
    write_lmdb(dataset, tmp_path / "db", progress=False)
    stored = LMDBDataset(tmp_path / "db", decode="pil")
    for (image, target), (wanted, number) in zip(stored, dataset, strict=True):
        assert target == number
        assert np.array_equal(np.asarray(image), np.asarray(wanted))


def test_write_lmdb_stores_what_a_transform_gives_that_was_set_later(folder, tmp_path):
    dataset = ImageFolder(folder)
    dataset.transform = lambda image: image.resize((5, 7))
    write_lmdb(dataset, tmp_path / "db", progress=False)
    assert LMDBDataset(tmp_path / "db")[0][0].shape == (3, 7, 5)


def test_a_tiff_whose_tags_are_out_of_order_is_left_to_pillow():
    data = bytearray(encoded(photo(), "TIFF"))
    assert dali_size(bytes(data)) is not None
    (at,) = struct.unpack_from("<I", data, 4)
    first, second = slice(at + 2, at + 14), slice(at + 14, at + 26)
    data[first], data[second] = data[second], data[first]
    assert dali_size(bytes(data)) is None


def test_a_name_forges_no_line_of_an_error(tmp_path):
    message = str(ImageError([("a\nall is well\t.jpg", "no\nimage")]))
    assert "\n" not in message
    assert "\t" not in message
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*a\\nb is not there: give a folder"):
        open_source(tmp_path / "a\nb")
