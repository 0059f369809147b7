"""MNIST's and CIFAR's files and scikit-learn's digits: what is read, and what is said of broken ones."""

import pickle
from pathlib import Path

import pytest
import torch

from fused_resnet.train.data import InMemory, idx, open_dataset
from fused_resnet.train.data.split import resize, stratified
from fused_resnet.train.errors import DataError, OptionError
from tests.train import files


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_idx(tmp_path: Path, compress: bool, below: str) -> None:
    files.write_idx(tmp_path / below, compress=compress, side=10)
    data = open_dataset(str(tmp_path), size=10)
    assert (data.name, len(data.train), len(data.test), data.classes) == ("MNIST", 24, 10, tuple("0123456789"))
    assert data.grayscale
    assert data.train.labels.tolist() == [i % 10 for i in range(24)]
    assert isinstance(data.train, InMemory)
    expected = files.random_images(24, 10, 10, seed=1) // 4
    for i in range(24):
        expected[i, i % 10, :] = 255
    assert torch.equal(data.train.images, expected.unsqueeze(1))


def test_fashion_mnist_is_known_by_its_folder(tmp_path: Path) -> None:
    data = open_dataset(str(files.write_idx(tmp_path / "Fashion")), size=10)
    assert data.name == "Fashion-MNIST"
    assert data.classes[9] == "ankle boot"
    assert data.augment.flip


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = open_dataset("digits", size=32)
    assert len(data.train) + len(data.test) == 1797
    assert len(data.test) == pytest.approx(1797 / 5, abs=5)
    share = data.test.labels.bincount() / data.train.labels.bincount()
    assert ((share - 0.25).abs() < 0.03).all()
    assert isinstance(data.train, InMemory)
    assert data.train.images.shape[1:] == (1, 32, 32)
    assert torch.equal(open_dataset("digits", size=32).test.labels, data.test.labels)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("write", [files.write_cifar_binary, files.write_cifar_python], ids=["binary", "python"])
@pytest.mark.parametrize("below", ["", "cifar"])
def test_cifar(tmp_path: Path, classes: int, write, below: str) -> None:
    write(tmp_path / below, classes=classes)
    data = open_dataset(str(tmp_path), size=32)
    batches = 5 if classes == 10 else 1
    assert (data.name, len(data.train), len(data.test)) == (f"CIFAR-{classes}", 4 * batches, 4)
    assert len(data.classes) == classes
    assert data.train.labels.tolist() == [0, 1, 2, 3] * batches
    assert isinstance(data.test, InMemory)
    expected = files.random_images(4, 3072, seed=batches).reshape(4, 3, 32, 32)
    assert torch.equal(data.test.images, expected)
    if write is files.write_cifar_python:
        assert data.classes[1] == "name1"


def test_cifar_python_with_text_keys(tmp_path: Path) -> None:
    files.write_cifar_python(tmp_path)
    for path in tmp_path.glob("*_batch*"):
        content = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps({key.decode(): value for key, value in content.items()}))
    assert len(open_dataset(str(tmp_path), size=32).train) == 20


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code in a data file ran')",))


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


BROKEN = {
    "idx cut short": (files.write_idx, "train-images-idx3-ubyte", lambda p: _cut(p, 500), "found 484"),
    "idx header cut short": (files.write_idx, "train-images-idx3-ubyte", lambda p: _cut(p, 9), "header is cut off"),
    "idx empty": (files.write_idx, "t10k-labels-idx1-ubyte", lambda p: _cut(p, 0), "not an IDX file"),
    "idx of another type": (
        files.write_idx,
        "train-labels-idx1-ubyte",
        lambda p: p.write_bytes(b"GIF89a"),
        "not an IDX",
    ),
    "idx missing": (files.write_idx, "t10k-labels-idx1-ubyte", lambda p: p.unlink(), "is missing"),
    "idx labels of another set": (
        files.write_idx,
        "train-labels-idx1-ubyte",
        lambda p: p.write_bytes(files.idx_bytes(files.cycle(7, 10))),
        "24 images but 7 labels",
    ),
    "gz cut short": (
        lambda folder: files.write_idx(folder, compress=True),
        "train-images-idx3-ubyte.gz",
        lambda p: _cut(p, 200),
        "cannot be read",
    ),
    "binary cut short": (files.write_cifar_binary, "data_batch_3.bin", lambda p: _cut(p, 5000), "not a whole number"),
    "binary empty": (files.write_cifar_binary, "data_batch_3.bin", lambda p: _cut(p, 0), "not a whole number"),
    "binary test missing": (files.write_cifar_binary, "test_batch.bin", lambda p: p.unlink(), "is missing"),
    "binary label too large": (
        files.write_cifar_binary,
        "data_batch_1.bin",
        lambda p: p.write_bytes(b"\x0c" + p.read_bytes()[1:]),
        "training label 12",
    ),
    "pickle cut short": (files.write_cifar_python, "data_batch_2", lambda p: _cut(p, 3000), "not a readable CIFAR"),
    "pickle of a list": (
        files.write_cifar_python,
        "data_batch_2",
        lambda p: p.write_bytes(pickle.dumps([1])),
        "expected a dictionary",
    ),
    "pickle without labels": (
        files.write_cifar_python,
        "data_batch_2",
        lambda p: p.write_bytes(pickle.dumps({b"data": b""})),
        "no labels",
    ),
    "pickle with code": (
        files.write_cifar_python,
        "data_batch_2",
        lambda p: p.write_bytes(pickle.dumps(_RunsCode())),
        "does not belong",
    ),
}


@pytest.mark.parametrize("label", BROKEN)
def test_broken_files_are_named(tmp_path: Path, label: str) -> None:
    write, name, damage, words = BROKEN[label]
    write(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path), size=32)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    if "label" not in label or "missing" in label:
        assert name.removesuffix(".gz") in message


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such folder"):
        open_dataset(str(tmp_path / "nowhere"), size=32)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="not a folder"):
        open_dataset(str(tmp_path / "file"), size=32)
    with pytest.raises(DataError, match="nothing to train on"):
        open_dataset(str(tmp_path), size=32)


def test_read_idx_of_one_to_three_dimensions(tmp_path: Path) -> None:
    for values in (files.random_images(7), files.random_images(3, 5), files.random_images(2, 3, 4)):
        (tmp_path / "x").write_bytes(files.idx_bytes(values))
        assert torch.equal(idx.read_idx(tmp_path / "x"), values)


def test_mean_and_deviation(tmp_path: Path) -> None:
    data = open_dataset(str(files.write_cifar_binary(tmp_path)), size=32)
    assert isinstance(data.train, InMemory)
    pixels = data.train.images.double().div(255).transpose(0, 1).flatten(1)
    assert data.mean == pytest.approx(pixels.mean(1).tolist())
    assert data.std == pytest.approx(pixels.std(1, correction=0).tolist())


def test_resize_keeps_flat_images_flat_and_the_mean() -> None:
    flat = torch.full((2, 1, 8, 8), 77, dtype=torch.uint8)
    assert (resize(flat, 32) == 77).all()
    image = files.random_images(1, 3, 64, 64)
    assert resize(image, 16).float().mean() == pytest.approx(image.float().mean().item(), abs=1.5)


def test_stratified_keeps_every_class_on_both_sides() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    train, test = stratified(labels, 0.2, seed=3)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(63))
    assert labels[test].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert torch.equal(stratified(labels, 0.2, seed=3)[1], test)
    assert not torch.equal(stratified(labels, 0.2, seed=4)[1], test)
