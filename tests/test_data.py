import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from dlhelpers.course import data
from dlhelpers.course.data import digits, photos


def test_digits_are_scikit_learns_and_the_splits_share_none():
    images, labels = digits("all")
    bunch = load_digits()
    assert torch.equal((images[:, 0] * 16).double(), torch.tensor(bunch.images))
    assert torch.equal(labels, torch.tensor(bunch.target))
    (train, y_train), (test, y_test) = digits("train"), digits("test")
    assert len(train) + len(test) == 1797
    assert len(test) == 360

    def rows(x):
        return sorted(map(tuple, x.flatten(1).tolist()))

    assert sorted(rows(train) + rows(test)) == rows(images)
    shares = torch.stack([torch.bincount(y, minlength=10) / len(y) for y in (y_train, y_test)])
    assert (shares[0] - shares[1]).abs().max() < 0.005


def test_digits_are_the_same_each_time():
    assert torch.equal(digits("train")[0], digits("train")[0])
    assert digits()[0].dtype == torch.float32
    assert digits()[1].dtype == torch.int64
    assert 0 <= digits()[0].min() <= digits()[0].max() == 1
    with pytest.raises(ValueError, match='"train", "test" or "all", got \'val\''):
        digits("val")


def read(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_photos_are_crops_of_the_real_photographs(tmp_path):
    root = photos(tmp_path / "p", count=6, size=64, progress=False)
    bunch = load_sample_images()
    for name, pixels in zip(bunch.filenames, bunch.images, strict=True):
        stem = os.path.splitext(os.path.basename(name))[0]
        files = sorted((root / stem).glob("*.jpg"))
        assert len(files) == 3
        for file in files:
            crop = np.asarray(Image.open(file).convert("RGB")).astype(float)
            assert crop.shape == (64, 64, 3)
            # a crop's mean colour lies within what the photograph's blocks have
            low, high = np.percentile(pixels.reshape(-1, 3), [1, 99], axis=0)
            assert (crop.mean(axis=(0, 1)) >= low).all()
            assert (crop.mean(axis=(0, 1)) <= high).all()
            assert crop.std() > 5


def test_the_same_settings_give_the_same_bytes(tmp_path):
    settings = {"count": 5, "size": 32, "progress": False}
    first = read(photos(tmp_path / "a", **settings))
    assert read(photos(tmp_path / "b", **settings)) == first
    assert read(photos(tmp_path / "c", seed=1, **settings)) != first


def test_torchvision_reads_the_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(photos(tmp_path / "p", count=4, size=32, progress=False))
    assert folder.classes == ["china", "flower"]
    assert len(folder) == 4


def test_a_finished_folder_is_used_and_another_is_never_touched(tmp_path):
    root = photos(tmp_path / "p", count=3, size=32, progress=False)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    photos(root, count=3, size=32, progress=False)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    with pytest.raises(FileExistsError, match="holds photos made with"):
        photos(root, count=4, size=32, progress=False)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        photos(foreign, count=3, progress=False)
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr(data, "_crop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        photos(tmp_path / "p", count=5, size=32, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value"), [("count", 0), ("size", 428), ("quality", 101), ("size", 3.5)]
)
def test_a_setting_out_of_range_is_named(tmp_path, setting, value):
    with pytest.raises(ValueError, match=rf"{setting} must be a whole number .* got {value}"):
        photos(tmp_path / "p", progress=False, **{setting: value})


def test_data_is_found_from_any_working_directory(tmp_path, monkeypatch):
    here = data.data_dir()
    monkeypatch.chdir(tmp_path)
    assert data.data_dir() == here
    monkeypatch.setenv("DLHELPERS_DATA", str(tmp_path / "elsewhere"))
    assert data.data_dir() == tmp_path / "elsewhere"


def test_without_a_network_the_offline_data_are_named(tmp_path, monkeypatch):
    import torchvision

    class Unreachable:
        def __init__(self, root, *, download, **options):
            (root / "half").write_text("half a file")
            raise (OSError("no route to host") if download else RuntimeError("not found"))

    monkeypatch.setenv("DLHELPERS_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Unreachable)
    with pytest.raises(RuntimeError, match=r"no route to host.*data\.digits\(\)"):
        data.cifar10()
    assert not (tmp_path / "data" / "cifar10").exists()


def test_the_command_makes_the_folder(tmp_path):
    command = [sys.executable, "-m", "dlhelpers", "data", "photos", str(tmp_path / "p")]
    done = subprocess.run(
        [*command, "--count", "4", "--size", "32"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "p").rglob("*.jpg"))) == 4
    again = subprocess.run([*command, "--count", "5"], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "choose another folder" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_offending_thing_in_the_way_is_named(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds 'thesis\.txt', not made here"):
        photos(tmp_path, count=3, progress=False)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file"):
        photos(tmp_path / "thesis.txt", count=3, progress=False)


def test_a_folder_that_lost_photos_is_not_taken_for_whole(tmp_path):
    root = photos(tmp_path / "p", count=3, size=32, progress=False)
    next(root.glob("china/*.jpg")).unlink()
    with pytest.raises(FileExistsError, match="holds 2 of its 3 photos"):
        photos(root, count=3, size=32, progress=False)


def test_the_empty_working_directory_itself_can_be_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert photos("here/../p", count=2, size=32, progress=False) == tmp_path.resolve() / "p"


def test_a_seed_that_would_not_repeat_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed must be a whole number, got None"):
        photos(tmp_path / "p", count=2, seed=None, progress=False)


def test_a_download_that_fails_or_is_stopped_keeps_what_was_there(tmp_path, monkeypatch):
    import torchvision

    class Stopped:
        error = KeyboardInterrupt()

        def __init__(self, root, *, download, **options):
            if not download:
                raise RuntimeError("not found")
            (root / "archive.tar.gz").write_text("half an archive")
            (root / "unpacked").mkdir()
            raise self.error

    root = tmp_path / "cifar10"
    root.mkdir()
    (root / "earlier").write_text("mine")
    monkeypatch.setenv("DLHELPERS_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stopped)
    for error, told in [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(), RuntimeError)]:
        Stopped.error = error
        with pytest.raises(told):
            data.cifar10()
        assert [p.name for p in root.iterdir()] == ["earlier"]


def test_a_wrong_option_of_a_download_is_not_called_a_missing_network(tmp_path, monkeypatch):
    monkeypatch.setenv("DLHELPERS_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="split"):
        data.imagenette("validation")
    assert list(tmp_path.iterdir()) == []


def test_the_readme_names_the_licence_of_each_photograph():
    from pathlib import Path

    readme = (Path(__file__).parent.parent / "data" / "README.md").read_text()
    for name in load_sample_images().filenames:
        assert Path(name).name in readme
    for author in ("danielbuechele", "vultilion"):
        assert author in readme
    assert "creativecommons.org/licenses/by/2.0" in readme


def test_numpys_integers_make_the_same_folder(tmp_path):
    made = photos(tmp_path / "a", count=np.int64(3), size=np.uint8(32), quality=np.int32(80))
    assert photos(tmp_path / "a", count=3, size=32, quality=80) == made  # found as it is


def test_a_batch_of_photographs_has_the_pixels_of_the_files(tmp_path):
    batch = data.photo_batch(count=3, size=40)
    files = sorted(data.photos(tmp_path / "p", count=3, size=40, progress=False).rglob("*.jpg"))
    for pixels, file in zip(batch, files, strict=True):
        expected = np.asarray(Image.open(file), dtype=np.float32) / 255
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)
