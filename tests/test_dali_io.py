"""DALI's pixels are torchvision's, its crops are RandomResizedCrop's, from every source."""

import importlib.util
import io
import random
import sys
from collections import namedtuple
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp, kstest
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dlhelpers import dali_io
from dlhelpers.course import data
from dlhelpers.dali_io import (
    CudaPrefetcher,
    DALILoader,
    has_dali,
    image_pipeline,
    sources,
    torchvision_transform,
    windows,
)
from dlhelpers.dali_io.formats import dali_size
from dlhelpers.lmdb_io import LMDBDataset, write_lmdb

needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI (extra dali) is for Linux only")
MEAN255 = 255 * torch.tensor(dali_io.transforms.MEAN).view(3, 1, 1)
STD255 = 255 * torch.tensor(dali_io.transforms.STD).view(3, 1, 1)
SIZES = [(256, 256), (427, 640), (640, 427), (300, 401), (257, 1000), (231, 230), (1003, 1201)]


def photographs():
    return [Image.fromarray(image) for image in data_images()]


def data_images():
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    """Real photographs in odd sizes as PNG: DALI and PIL decode the same pixels from them."""
    folder = tmp_path_factory.mktemp("lossless") / "photos"
    (folder / "one").mkdir(parents=True)
    for number, (height, width) in enumerate(SIZES):
        image = photographs()[number % 2].resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / "one" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return data.photos(tmp_path_factory.mktemp("jpeg") / "photos", count=24, size=200)


def pixels(images):
    """Normalised batches back to 0..255."""
    return images.cpu() * STD255 + MEAN255


def apart(ours, reference):
    off = (pixels(ours) - pixels(reference)).abs()
    return off.max().item(), off.mean().item()


def evaluated(source, size=224, **options):
    pipeline = image_pipeline(source, size=size, batch_size=4, train=False, device="cpu", **options)
    return torch.cat([images for images, _ in DALILoader(pipeline)])


# ---- the same images as torchvision ----


@needs_dali
@pytest.mark.parametrize(
    ("size", "resize"),
    [
        (224, None),
        (64, 71),
        (200, 200),
        (200, 201),
        (231, 231),
        (300, 300),
        (33, 230),
        (8, 8),
        (1, 1),
        (2, 2),
    ],
)
def test_the_eval_pipeline_gives_torchvisions_pixels(lossless, size, resize):
    ours = evaluated(lossless, size, resize=resize)
    transform = torchvision_transform(size, train=False, resize=resize)
    reference = torch.stack([image for image, _ in ImageFolder(lossless, transform)])
    largest, mean = apart(ours, reference)
    assert largest <= 2.001
    assert mean <= (0.3 if size > 4 else 1)  # in a few pixels rounding does not average out


@needs_dali
def test_dalis_own_resize_is_further_away_which_issues_422_4257_and_5260_ask_about(lossless):
    from nvidia.dali import fn, pipeline_def, types

    files = [path for path, _ in ImageFolder(lossless).samples]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def resized(subpixel_scale):
        encoded, _ = fn.readers.file(files=files)
        image = fn.decoders.image(encoded, output_type=types.RGB)
        # what torchvision calls Resize(256) of an image that is higher than wide
        return fn.resize(image, size=[300, 256], mode="not_smaller", subpixel_scale=subpixel_scale)

    def worst(subpixel_scale):
        pipeline, off = resized(subpixel_scale), []
        for path in files:
            (found,) = pipeline.run()
            ours = np.asarray(found.at(0), dtype=int)
            wanted = np.asarray(v2.Resize(ours.shape[:2])(Image.open(path)), dtype=int)
            off.append(np.abs(ours - wanted)[2:-2, 2:-2].max())  # edges: see edges.py
        return max(off)

    assert worst(True) > 10  # what those users saw
    assert worst(False) <= 2  # what image_pipeline asks for


@needs_dali
def test_decoding_the_needed_part_alone_changes_no_pixel(photos, lossless):
    for source in (photos, lossless):
        part = evaluated(source, 96, resize=150)
        whole = [np.asarray(Image.open(path)) for path, _ in ImageFolder(source).samples]
        largest = 0.0
        for ours, image in zip(part, whole, strict=True):
            wanted = F.center_crop(
                F.resize(torch.tensor(image).permute(2, 0, 1), [150], antialias=True), [96, 96]
            )
            largest = max(largest, (pixels(ours) - wanted.float()).abs().max().item())
        assert largest <= (2.001 if source is lossless else 6)  # JPEG decoders differ by a little


@needs_dali
def test_the_train_pipeline_is_its_window_resized_as_torchvision_does(lossless):
    pipeline = image_pipeline(lossless, size=64, batch_size=len(SIZES), train=True, device="cpu")
    images, _ = next(iter(DALILoader(pipeline, shuffle=False, seed=5)))
    rng = np.random.default_rng((5, 0, 0, 0))  # seed, epoch, rank, batch
    anchors, shapes, flips = pipeline.places(np.array(SIZES), rng).values()
    for number, (path, _) in enumerate(ImageFolder(lossless).samples):
        (top, left), (height, width) = anchors[number].astype(int), shapes[number].astype(int)
        wanted = F.resized_crop(
            F.pil_to_tensor(Image.open(path)), top, left, height, width, [64, 64], antialias=True
        )
        wanted = F.horizontal_flip(wanted) if flips[number] else wanted
        off = (pixels(images[number]) - wanted.float()).abs()
        assert off[:, 1:-1, 1:-1].max() <= 2.001
        assert off.mean() <= 0.3
        assert off.max() <= 30  # the outermost pixels: DALI repeats the edge, see edges.py


@needs_dali
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    (tmp_path / "one").mkdir()
    image = photographs()[0].resize((80, 60)).convert(mode)
    image.save(tmp_path / "one" / "0.png")
    ours = evaluated(tmp_path, 48, resize=48)
    wanted = F.pil_to_tensor(v2.Resize(48)(image.convert("RGB"))).float()
    wanted = F.center_crop(wanted, [48, 48])
    assert (pixels(ours[0]) - wanted).abs().max() <= 2.001


@needs_dali
def test_exif_rotation_is_left_alone_as_imagefolder_does(tmp_path):
    (tmp_path / "one").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    photographs()[0].resize((120, 80)).save(tmp_path / "one" / "0.jpg", exif=exif, quality=95)
    ours = evaluated(tmp_path, 64, resize=64)
    reference = ImageFolder(tmp_path, torchvision_transform(64, train=False, resize=64))[0][0]
    assert apart(ours[0], reference)[1] < 2


# ---- crops ----


def window_of(size, draws, scale, ratio):
    """torchvision's algorithm, one image and one attempt at a time, on given random numbers."""
    import math

    (height, width), (areas, logs, (down, right)) = size, draws
    for area, log in zip(areas, logs, strict=True):
        target, aspect = height * width * area, math.exp(log)
        columns, rows = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top = int(down * (height - rows + 1))
            return (top, int(right * (width - columns + 1))), (rows, columns)
    if width / height < min(ratio):
        columns, rows = width, round(width / min(ratio))
    elif width / height > max(ratio):
        columns, rows = round(height * max(ratio)), height
    else:
        columns, rows = width, height
    return ((height - rows) // 2, (width - columns) // 2), (rows, columns)


sides = st.integers(1, 3000)
ranges = st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(sorted).map(tuple)


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=6),
    scale=ranges,
    ratio=st.tuples(st.floats(0.2, 5.0), st.floats(0.2, 5.0)).map(sorted).map(tuple),
    seed=st.integers(0, 10_000),
)
def test_random_windows_follow_torchvisions_algorithm(sizes, scale, ratio, seed):
    anchors, shapes = windows.random_windows(
        np.array(sizes), np.random.default_rng(seed), scale, ratio
    )
    rng, count = np.random.default_rng(seed), len(sizes)
    areas = rng.uniform(*scale, (count, 10))
    logs = rng.uniform(*np.log(ratio), (count, 10))
    places = rng.random((count, 2))
    for i, size in enumerate(sizes):
        wanted = window_of(size, (areas[i], logs[i], places[i]), scale, ratio)
        assert (tuple(anchors[i]), tuple(shapes[i])) == wanted
        assert (anchors[i] >= 0).all()
        assert (anchors[i] + shapes[i] <= size).all()
        assert (shapes[i] >= 1).all() or ratio[0] > 1 or ratio[1] < 1


@pytest.mark.parametrize("size", [(400, 400), (300, 500), (640, 200)])
def test_windows_have_randomresizedcrops_distribution(size):
    count, scale, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
    anchors, shapes = windows.random_windows(
        np.tile(size, (count, 1)), np.random.default_rng(0), scale, ratio
    )
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    crop = v2.RandomResizedCrop(8, scale, ratio)
    drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    ours = np.concatenate([anchors, shapes], axis=1)
    for fact in (
        lambda w: w[:, 2] * w[:, 3],  # area
        lambda w: w[:, 3] / w[:, 2],  # aspect
        lambda w: w[:, 0],
        lambda w: w[:, 1],
    ):
        assert ks_2samp(fact(ours), fact(theirs)).pvalue > 0.001


@needs_dali
def test_crops_that_reach_the_network_have_randomresizedcrops_distribution(tmp_path):
    """End to end: red is the column, green the row, so that a result tells its window."""
    (tmp_path / "one").mkdir()
    rows, columns = np.mgrid[0:256, 0:256]
    ramp = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    for number in range(200):
        Image.fromarray(ramp).save(tmp_path / "one" / f"{number}.png", compress_level=1)
    pipeline = image_pipeline(tmp_path, size=32, batch_size=100, train=True, device="cpu")

    def facts(images):
        images = pixels(images)
        width = (images[:, 0, :, -1] - images[:, 0, :, 0]).mean(1).abs()
        height = (images[:, 1, -1] - images[:, 1, 0]).mean(1).abs()
        return (width * height).numpy(), (width / height).numpy(), images[:, 0].mean((1, 2)).numpy()

    loader = DALILoader(pipeline, seed=3)
    ours = facts(torch.cat([images for _ in range(4) for images, _ in loader]))
    torch.manual_seed(0)
    random.seed(0)
    transform = torchvision_transform(32, train=True)
    theirs = facts(torch.stack([transform(Image.fromarray(ramp)) for _ in range(800)]))
    for mine, reference in zip(ours, theirs, strict=True):
        assert ks_2samp(mine, reference).pvalue > 0.001


@needs_dali
def test_half_of_the_images_are_flipped(tmp_path):
    (tmp_path / "one").mkdir()
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    for number in range(200):
        Image.fromarray(ramp).save(tmp_path / "one" / f"{number}.png")
    for flip, low, high in ((0.5, 70, 130), (0.0, 0, 0), (1.0, 200, 200)):
        pipeline = image_pipeline(
            tmp_path, size=16, batch_size=64, train=True, device="cpu", flip=flip
        )
        images = torch.cat([images for images, _ in DALILoader(pipeline)])
        flipped = (images[:, 0, :, 0] > images[:, 0, :, -1]).all(1).sum().item()
        assert low <= flipped <= high


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 2000), width=st.integers(1, 2000), data=st.data())
def test_centre_windows_are_where_torchvision_resizes_and_crops(height, width, data):
    resize = data.draw(st.integers(1, 400))
    size = data.draw(st.integers(1, resize))
    starts, ends = windows.centre_windows(np.array([[height, width]]), size, resize)
    meta = torch.empty(1, height, width, device="meta")
    resized = F.resize(meta, [resize]).shape[-2:]
    for axis, (whole, scaled) in enumerate(zip((height, width), resized, strict=True)):
        corner = round((scaled - size) / 2.0)  # torchvision's center_crop
        assert starts[0, axis] == pytest.approx(corner * whole / scaled)
        assert ends[0, axis] == pytest.approx((corner + size) * whole / scaled)


def test_ratios_of_windows_are_log_uniform():
    _, shapes = windows.random_windows(
        np.tile((2000, 2000), (3000, 1)), np.random.default_rng(1), (0.05, 0.2), (0.5, 2.0)
    )
    logs = np.log(shapes[:, 1] / shapes[:, 0]) / np.log(2)
    assert kstest((logs + 1) / 2, "uniform").pvalue > 0.001


# ---- sources ----


@needs_dali
def test_every_source_gives_the_same_batches(photos, tmp_path):
    write_lmdb(photos, tmp_path / "photos.lmdb", progress=False)
    folder = ImageFolder(photos)
    wanted = list(DALILoader(image_pipeline(photos, size=64, batch_size=7, train=True)))
    for source in (str(photos), folder, folder.samples, LMDBDataset(tmp_path / "photos.lmdb")):
        found = list(DALILoader(image_pipeline(source, size=64, batch_size=7, train=True)))
        for (images, targets), (same, labels) in zip(found, wanted, strict=True):
            assert torch.equal(targets, labels)
            assert torch.equal(images, same)


@needs_dali
def test_a_database_of_pixels_needs_no_decoder(photos, tmp_path):
    # the order of the folder is that of the database
    images = [np.asarray(Image.open(path)) for path, _ in ImageFolder(photos).samples]
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    write_lmdb(
        TensorDataset(stack, torch.arange(len(stack))),
        tmp_path / "raw.lmdb",
        encode="raw",
        progress=False,
    )
    ours = evaluated(LMDBDataset(tmp_path / "raw.lmdb"), 64)
    transform = torchvision_transform(64, train=False)
    largest, mean = apart(ours, torch.stack([transform(image) for image in stack]))
    assert largest <= 2.001
    assert mean <= 0.3


def test_a_folder_is_read_as_imagefolder_reads_it(photos, tmp_path):
    source = sources.open_source(photos)
    folder = ImageFolder(photos)
    assert [source.name(i) for i in range(len(folder))] == [path for path, _ in folder.samples]
    assert source.targets.tolist() == folder.targets
    assert source.classes == folder.classes


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, 900), place=st.integers(2, 600), value=st.integers(0, 255))
def test_a_damaged_header_gives_a_size_or_none_but_no_crash(cut, place, value):
    buffer = io.BytesIO()
    Image.new("RGB", (37, 53)).save(buffer, "JPEG", comment=b"x" * 200)
    damaged = bytearray(buffer.getvalue())
    damaged[min(place, len(damaged) - 1)] = value
    size = dali_size(bytes(damaged[:cut]))
    assert size is None or len(size) == 2


@needs_dali
@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("/no/such/folder", FileNotFoundError, "not there"),
        (42, TypeError, "ImageFolder"),
        ([], ValueError, "empty"),
        (["a.jpg"], ValueError, r"source\[0\]"),
        ([("a.jpg", 1.5)], ValueError, "whole numbers"),
        ([("a.jpg", "cat")], ValueError, "'cat'"),
    ],
)
def test_what_is_no_source_is_told(source, error, says):
    with pytest.raises(error, match=says):
        image_pipeline(source, size=8, batch_size=2, train=True)


@needs_dali
def test_a_folder_without_images_is_told(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("none")
    with pytest.raises(FileNotFoundError, match=r"classes cat\..*one folder for each class"):
        image_pipeline(tmp_path, size=8, batch_size=2, train=True)


@needs_dali
def test_a_database_with_a_transform_is_refused_since_dali_would_not_run_it(photos, tmp_path):
    write_lmdb(photos, tmp_path / "photos.lmdb", progress=False)
    with pytest.raises(ValueError, match="transform"):
        image_pipeline(
            LMDBDataset(tmp_path / "photos.lmdb", v2.RandomHorizontalFlip()),
            size=8,
            batch_size=2,
            train=True,
        )


@needs_dali
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("size", 0, "size must be"),
        ("size", 2.5, "size must be"),
        ("batch_size", True, "batch_size must be"),
        ("resize", 20, "resize must be .* 32"),
        ("scale", (0.5, 0.1), "scale must be"),
        ("ratio", (0, 1), "ratio must be"),
        ("flip", 2, "flip must be"),
        ("std", (1, 1, 0), "std must be above 0"),
        ("std", (1, 1), "std must be 3 numbers"),
        ("mean", 0.5, "mean must be 3 numbers"),
        ("scale", 1, "scale must be 2 numbers"),
        ("threads", 0, "threads must be"),
        ("prefetch", 0, "prefetch must be"),
        ("device", "tpu", "device must be"),
        ("device", "mps", "device must be"),
    ],
)
def test_an_option_out_of_range_is_told(photos, option, value, says):
    options = {"size": 32, "batch_size": 4, "train": True} | {option: value}
    with pytest.raises(ValueError, match=says):
        image_pipeline(photos, **options)


@needs_dali
def test_whole_numbers_of_numpy_are_whole_numbers(photos):
    pipeline = image_pipeline(
        photos, size=np.int64(16), batch_size=np.int32(4), train=True, device="cpu"
    )
    images, _ = next(iter(DALILoader(pipeline, seed=np.int64(1), shard=(np.int64(0), 2))))
    assert images.shape == (4, 3, 16, 16)


@needs_dali
@pytest.mark.parametrize("name", ["transform", "target_transform"])
def test_an_imagefolder_with_a_transform_is_refused_since_dali_would_not_run_it(photos, name):
    folder = ImageFolder(photos, **{name: lambda x: x})
    with pytest.raises(ValueError, match=f"ImageFolder has {name}="):
        image_pipeline(folder, size=8, batch_size=2, train=True)


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_a_gpu_that_is_not_there_is_told(photos):
    with pytest.raises(ValueError, match="no CUDA device"):
        image_pipeline(photos, size=8, batch_size=2, train=True, device="cuda")
    assert image_pipeline(photos, size=8, batch_size=2, train=True).device.type == "cpu"


@needs_dali
def test_augment_adds_operators_before_normalisation(photos):
    from nvidia.dali import fn

    def darker(images):
        return fn.brightness_contrast(images, brightness=0.5)

    plain, dark = pixels(evaluated(photos, 64)), pixels(evaluated(photos, 64, augment=darker))
    assert (dark - 0.5 * plain).abs().max() <= 0.51


@needs_dali
def test_augment_sees_no_black_beyond_the_edge(photos):
    def negative(images):
        return 255 - images

    plain = pixels(evaluated(photos, 64, resize=64, augment=lambda images: images))
    turned = pixels(evaluated(photos, 64, resize=64, augment=negative))
    assert (255 - turned - plain).abs().max() <= 1.01


@needs_dali
def test_mean_and_std_are_those_given(photos):
    ours = evaluated(photos, 64, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.allclose(255 * ours, pixels(evaluated(photos, 64)), atol=1e-3)
    assert ours.min() >= 0
    assert ours.max() <= 1


# ---- without DALI ----


@pytest.mark.parametrize(
    ("platform", "says"),
    [("linux", "dlhelpers.dali."), ("darwin", "Linux only"), ("win32", "Linux only")],
)
def test_without_dali_the_message_says_what_to_do(monkeypatch, photos, platform, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", platform)
    assert not has_dali()
    with pytest.raises(ImportError, match=says) as told:
        image_pipeline(photos, size=8, batch_size=2, train=True)
    assert "torchvision_transform" in str(told.value)


# ---- CudaPrefetcher ----

Pair = namedtuple("Pair", "images targets")


def batches():
    return [
        torch.arange(3.0),
        (torch.ones(2), torch.zeros(2)),
        [torch.ones(1), "a string"],
        {"images": torch.ones(2, 2), "more": (torch.zeros(1), 7)},
        Pair(torch.ones(1), torch.zeros(1)),
    ]


def test_on_the_cpu_batches_pass_through_untouched():
    given = batches()
    prefetcher = CudaPrefetcher(given, device="cpu")
    assert len(prefetcher) == len(given)
    for _ in range(2):
        assert all(got is wanted for got, wanted in zip(prefetcher, given, strict=True))


def test_set_epoch_reaches_the_loader_or_its_sampler():
    class Sampler:
        def set_epoch(self, epoch):
            self.epoch = epoch

    loader = type("Loader", (list,), {})(batches())
    CudaPrefetcher(loader, device="cpu").set_epoch(3)  # nobody wants to know
    loader.sampler = Sampler()
    CudaPrefetcher(loader, device="cpu").set_epoch(4)
    assert loader.sampler.epoch == 4
    loader.set_epoch = Sampler().set_epoch  # its own comes first
    CudaPrefetcher(loader, device="cpu").set_epoch(5)
    assert (loader.set_epoch.__self__.epoch, loader.sampler.epoch) == (5, 4)


def test_the_tensors_of_a_batch_are_mapped_and_all_else_is_kept():
    doubled = [dali_io.prefetch._map(lambda t: 2 * t, batch) for batch in batches()]
    assert doubled[2][1] == "a string"
    assert doubled[3]["more"][1] == 7
    assert isinstance(doubled[4], Pair)
    assert doubled[4].images.item() == 2
    assert isinstance(doubled[1], tuple)


class Logged(torch.Tensor):
    """A tensor that notes where it is sent and who uses it."""

    log: ClassVar[list] = []

    def to(self, device, non_blocking=False):
        Logged.log.append(f"copy {int(self)} on {Stream.current} non_blocking={non_blocking}")
        return self

    def record_stream(self, stream):
        Logged.log.append(f"record {int(self)} on {stream}")


class Stream:
    current = "main"

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name

    def wait_stream(self, other):
        Logged.log.append(f"{self} waits for {other}")


def test_the_next_batch_is_copied_on_its_own_stream_before_the_present_one_is_given(monkeypatch):
    """The order of calls, on a CUDA that only notes them: what a GPU has to do is counted."""

    @contextmanager
    def stream(used):
        Stream.current = str(used)
        yield
        Stream.current = "main"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    Logged.log.clear()
    given = [torch.tensor(n).as_subclass(Logged) for n in range(3)]
    for batch in CudaPrefetcher(given, device="cuda"):
        Logged.log.append(f"work {int(batch)}")

    def breaks():
        yield given[0]
        raise OSError("the disk is gone")

    def arrival(n):
        return ["main waits for copies", f"record {n} on main"]

    copies = [f"copy {n} on copies non_blocking=True" for n in range(3)]
    assert Logged.log == [
        copies[0], *arrival(0), copies[1], "work 0", *arrival(1), copies[2], "work 1",
        *arrival(2), "work 2",
    ]  # fmt: skip
    batches = iter(CudaPrefetcher(breaks(), device="cuda"))
    assert next(batches) is not None  # what was there before the error is not lost
    with pytest.raises(OSError, match="disk"):
        next(batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_batch_arrives_whole_and_in_order():
    given = [(torch.full((1 << 20,), float(n)).pin_memory(), torch.tensor(n)) for n in range(20)]
    for number, (images, targets) in enumerate(CudaPrefetcher(given)):
        assert images.is_cuda
        assert targets.is_cuda
        assert (images == number).all()
        torch.rand(2000, 2000, device="cuda") @ torch.rand(2000, 2000, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_a_prefetcher_for_a_gpu_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="no CUDA device"):
        CudaPrefetcher([], device="cuda")
