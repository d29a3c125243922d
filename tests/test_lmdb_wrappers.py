"""Bytes, keys and classes arrive through Subset, ConcatDataset and LMDBDataset."""

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import Resize

from dlhelpers.course import data
from dlhelpers.lmdb_io import LMDBDataset, SourceError, verify_lmdb, write_lmdb
from dlhelpers.lmdb_io.wrappers import inner_datasets


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrappers") / "photos"
    return data.photos(root, count=20, size=48, progress=False)


@pytest.fixture(scope="module")
def database(photos):
    path = photos.parent / "photos.lmdb"
    write_lmdb(photos, path, progress=False)
    return path


def write(source, path, **options):
    return write_lmdb(source, path, **{"progress": False} | options)


def stored(path):
    dataset = LMDBDataset(path, decode=None)
    return [(key, target, dataset[i][0]) for i, (key, target) in enumerate(dataset.samples)]


def files(photos, order):
    """What a database of these files holds."""
    samples = ImageFolder(photos).samples
    return [
        (os.path.relpath(samples[i][0], photos), samples[i][1], Path(samples[i][0]).read_bytes())
        for i in order
    ]


ORDER = [11, 3, 0, 19, 7]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: Subset(d, ORDER),
        lambda d: Subset(d, torch.tensor(ORDER)),
        lambda d: Subset(Subset(d, [*range(19, -1, -1)]), [19 - i for i in ORDER]),
        lambda d: ConcatDataset([Subset(d, ORDER[:2]), Subset(d, ORDER[2:])]),
        lambda d: Subset(ConcatDataset([Subset(d, range(10)), Subset(d, range(10, 20))]), ORDER),
        lambda d: ConcatDataset([ConcatDataset([Subset(d, [i])]) for i in ORDER]),
    ],
)
@pytest.mark.parametrize("of_database", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_wrappers_are_looked_through(photos, database, tmp_path, wrap, of_database, workers):
    inner = LMDBDataset(database) if of_database else ImageFolder(photos)
    report = write(wrap(inner), tmp_path / "db", workers=workers)
    assert stored(tmp_path / "db") == files(photos, ORDER)
    assert LMDBDataset(tmp_path / "db").classes == ["china", "flower"]
    assert report.notes == ()


def test_the_parts_of_a_random_split_make_up_the_folder(photos, tmp_path):
    parts = random_split(ImageFolder(photos), [0.7, 0.3])
    found = []
    for number, part in enumerate(parts):
        write(part, tmp_path / f"{number}")
        found += stored(tmp_path / f"{number}")
    assert sorted(found) == sorted(files(photos, range(20)))


def test_a_database_is_copied_as_it_is(photos, database, tmp_path):
    write(LMDBDataset(database, decode="pil"), tmp_path / "copy")
    assert stored(tmp_path / "copy") == stored(database)
    for rank in range(3):
        write(LMDBDataset(tmp_path / "copy"), tmp_path / "shards", shard=(rank, 3))
    write(LMDBDataset(tmp_path / "shards"), tmp_path / "copy")  # in place of the first
    assert stored(tmp_path / "copy") == files(photos, range(20))
    assert verify_lmdb(tmp_path / "copy", progress=False).count == 20


def test_a_database_is_converted_as_its_images_would_be(photos, database, tmp_path):
    write(photos, tmp_path / "a", resize=24)
    write(LMDBDataset(database), tmp_path / "b", resize=24)
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


def test_keys_that_are_taken_get_an_ending_and_are_reported(photos, database, tmp_path):
    order = [4, 4, 5, 4]
    report = write(Subset(ImageFolder(photos), order), tmp_path / "db")
    expected = files(photos, order)
    key = expected[0][0]
    keys = [key, f"{key}#2", expected[2][0], f"{key}#3"]
    assert stored(tmp_path / "db") == [
        (name, *rest) for name, (_, *rest) in zip(keys, expected, strict=True)
    ]
    assert "2 keys are taken already" in str(report)
    report = write(ConcatDataset([LMDBDataset(database)] * 2), tmp_path / "db")
    assert (report.count, len(LMDBDataset(tmp_path / "db").classes)) == (40, 2)
    assert "20 keys are taken already" in str(report)


def test_parts_with_other_classes_have_no_common_names(photos, tmp_path):
    (tmp_path / "birds" / "bird").mkdir(parents=True)
    first = next(photos.glob("*/*.jpg"))
    (tmp_path / "birds" / "bird" / "a.jpg").write_bytes(first.read_bytes())
    report = write(
        ConcatDataset([ImageFolder(photos), ImageFolder(tmp_path / "birds")]), tmp_path / "db"
    )
    assert LMDBDataset(tmp_path / "db").classes is None
    assert "no class names are stored" in str(report)
    assert stored(tmp_path / "db")[-1][0] == "bird/a.jpg"


def test_datasets_that_give_pixels_stand_beside_files(photos, database, tmp_path):
    images = torch.arange(4 * 3 * 8 * 8).reshape(4, 3, 8, 8).to(torch.uint8)
    tensors = TensorDataset(images, torch.arange(4))
    source = ConcatDataset(
        [Subset(ImageFolder(photos), [2]), tensors, Subset(LMDBDataset(database), [9])]
    )
    write(source, tmp_path / "db", workers=1)
    found = stored(tmp_path / "db")
    assert [found[0], found[5]] == files(photos, [2, 9])
    assert [(key, target) for key, target, _ in found[1:5]] == [(str(i + 1), i) for i in range(4)]
    assert torch.equal(LMDBDataset(tmp_path / "db")[3][0], images[2])


class NoLength(Dataset):
    def __getitem__(self, key):
        return np.full((8, 8, 3), key, np.uint8), int(key)


class Named(NoLength):
    def __getitem__(self, key):
        return super().__getitem__({"one": 1, "two": 2}[key])

    def __len__(self):
        return 2


class Endless(NoLength):
    def __len__(self):
        return 10**12


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        (Subset(NoLength(), [3, 1]), [3, 1]),
        (Subset(Named(), ["two", "one"]), [2, 1]),
        (Subset(Endless(), [5, 6]), [5, 6]),
        (Subset(Named(), ["two"]), [2]),
        (ConcatDataset([Subset(NoLength(), [3]), Subset(Endless(), [7])]), [3, 7]),
        (Subset(Subset(Named(), ["two", "one"]), [1]), [1]),
    ],
)
def test_a_dataset_inside_a_wrapper_needs_what_the_wrapper_needs(tmp_path, source, targets):
    write(source, tmp_path / "db")
    assert LMDBDataset(tmp_path / "db").targets == targets


def test_a_dataset_without_length_may_stand_beside_a_folder(photos, tmp_path):
    folder = ImageFolder(photos)
    write(ConcatDataset([folder, Subset(NoLength(), [3, 4])]), tmp_path / "db")
    assert LMDBDataset(tmp_path / "db").targets == [*folder.targets, 3, 4]
    assert [image for *_, image in stored(tmp_path / "db")[:2]] == [
        image for *_, image in files(photos, [0, 1])
    ]


def test_many_small_datasets_are_looked_at_once_each(tmp_path):
    from dlhelpers.lmdb_io import wrappers

    looked = []
    with pytest.MonkeyPatch.context() as patch:
        wrapped = wrappers._wrapped
        patch.setattr(wrappers, "_wrapped", lambda found: looked.append(found) or wrapped(found))
        write(ConcatDataset([Subset(NoLength(), [n % 5]) for n in range(300)]), tmp_path / "db")
    assert len(looked) < 10 * 300


class Mirrored(ImageFolder):
    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image.transpose(0), target


class Relabelled(Subset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], 7

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Shifted(LMDBDataset):
    def __getitem__(self, index):
        return super().__getitem__((index + 1) % len(self))


@pytest.mark.parametrize(
    "make",
    [
        lambda photos, _: Subset(ImageFolder(photos, Resize(20)), ORDER),
        lambda photos, _: Subset(Mirrored(photos), ORDER),
        lambda photos, _: Subset(ImageFolder(photos, target_transform=lambda t: t + 3), ORDER),
        lambda _, database: Subset(LMDBDataset(database, Resize(20), decode="pil"), ORDER),
        lambda _, database: LMDBDataset(
            database, decode="pil", target_transform=lambda target: target + 3
        ),
        lambda _, database: Shifted(database, decode="pil"),
        lambda _, database: ConcatDataset([Shifted(database, decode="pil")]),
    ],
)
def test_what_reads_in_a_way_of_its_own_gives_what_it_gives(photos, database, tmp_path, make):
    source = make(photos, database)
    report = write(source, tmp_path / "db")
    found = LMDBDataset(tmp_path / "db", decode="pil")
    for index in range(len(source)):
        image, target = source[index]
        assert np.array_equal(np.asarray(found[index][0]), np.asarray(image))
        assert found[index][1] == target
    assert found.classes == ["china", "flower"]
    assert "keys are item numbers" in str(report)


class InShiftedBatches(LMDBDataset):
    def __getitems__(self, indices):
        return super().__getitems__([(index + 1) % len(self) for index in indices])


@pytest.mark.parametrize("kind", [Shifted, InShiftedBatches])
def test_a_subset_of_a_subclass_of_lmdbdataset_reads_as_the_subclass_does(database, tmp_path, kind):
    """In batches and in a conversion, which copies no record as it is."""
    source = Subset(kind(database, decode="pil"), ORDER)
    targets = [target for _, target in LMDBDataset(database).samples]
    batches = DataLoader(source, 2, collate_fn=lambda batch: [target for _, target in batch])
    read = list(itertools.chain(*batches))
    assert read == [targets[(n + 1) % 20] for n in ORDER]
    assert inner_datasets(source) == [source.dataset]
    write(source, tmp_path / "db")
    assert [key for key, _ in LMDBDataset(tmp_path / "db").samples] == [*map(str, range(5))]
    whole = DataLoader(Shifted(database, Resize((20, 20)), collate=True), 20, collate_fn=COLLATE)
    ((images, given),) = whole
    assert images.shape == (20, 3, 20, 20)
    assert given.tolist() == [*targets[1:], targets[0]]


COLLATE = LMDBDataset.collate_fn


class InBatches(Subset):
    """Reads in a way of its own only where a DataLoader asks for a batch."""

    def __getitems__(self, indices):
        return [(image, 7) for image, _ in super().__getitems__(indices)]


class Shorter(Subset):
    def __len__(self):
        return 2


class Named(Subset):
    name = "a Subset that reads as Subset does"


def test_a_wrapper_with_a_way_of_its_own_to_read_is_no_plain_one(photos):
    files = ImageFolder(photos)
    for kind in (Relabelled, InBatches, Shorter):
        source = kind(files, ORDER)
        assert inner_datasets(source) == [source]
        assert inner_datasets(ConcatDataset([source, files])) == [source, files]
    assert inner_datasets(Named(files, ORDER)) == [files]


def test_a_wrapper_that_changes_targets_is_no_plain_one(photos, tmp_path):
    write(Relabelled(ImageFolder(photos), ORDER), tmp_path / "db")
    found = LMDBDataset(tmp_path / "db")
    assert (found.targets, found.classes) == ([7] * len(ORDER), None)


def test_a_worker_gets_items_and_not_the_list_of_all(photos, database):
    from dlhelpers.lmdb_io.opening import open_source

    source = open_source(ConcatDataset([ImageFolder(photos), LMDBDataset(database)] * 40))
    sent = pickle.loads(pickle.dumps(source))
    for task in itertools.islice(source.tasks(), 18, 22):
        assert sent.load(task) == source.load(task)
        assert sent.stamp(task) == source.stamp(task)
    assert len(pickle.dumps(source)) < 3000


def test_a_damaged_record_of_a_source_is_named(database, tmp_path):
    copy = tmp_path / "copy"
    content = bytearray(database.read_bytes())
    image = stored(database)[4][2]
    content[content.find(image) + 50] ^= 1
    copy.write_bytes(content)
    report = write(LMDBDataset(copy, checksum=False), tmp_path / "db", on_error="skip")
    assert report.count == 19
    assert "record 4" in report.skipped[0][0]
    assert "checksum differs" in report.skipped[0][1]


@pytest.mark.parametrize(
    "indices", [[True, False], np.array([True, False]), torch.tensor([True]), [1.0], ["1"], [2**70]]
)
def test_a_mask_is_no_list_of_items(database, tmp_path, indices):
    with pytest.raises(SourceError, match=r"a Subset has the index .*expected whole numbers"):
        write(Subset(LMDBDataset(database), indices), tmp_path / "db")


def test_an_empty_subset_holds_no_image(tmp_path):
    source = TensorDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2))
    write_lmdb(source, tmp_path / "db", progress=False)
    with pytest.raises(SourceError, match="holds no image that could be stored"):
        write_lmdb(Subset(LMDBDataset(tmp_path / "db"), []), tmp_path / "new", progress=False)


class OwnRecord(LMDBDataset):
    def record(self, index):
        key, target, image = super().record(index)
        return key, target + 50, image


def test_a_subclass_with_records_of_its_own_is_stored_as_it_gives_them(database, tmp_path):
    source = Subset(OwnRecord(database, decode="pil"), [3, 1])
    write(source, tmp_path / "db")
    stored_targets = [target for _, target in LMDBDataset(tmp_path / "db").samples]
    assert stored_targets == [source[0][1], source[1][1]]
