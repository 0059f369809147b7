"""A folder of image files by class: layouts, decoding, broken files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fused_resnet.train.data import folder, open_dataset
from fused_resnet.train.errors import DataError
from fused_resnet.train.transforms import draw
from tests.train import files
from tests.train.files import RED_AND_BLUE


def test_train_and_val(tmp_path: Path) -> None:
    files.write_photos(tmp_path / "train", RED_AND_BLUE, count=4)
    files.write_photos(tmp_path / "val", RED_AND_BLUE, count=2)
    data = open_dataset(str(tmp_path), size=16)
    assert (len(data.train), len(data.test), data.classes) == (8, 4, ("blue", "red"))
    images, kept = data.test.start(torch.tensor([3, 0]), None, None)()
    assert images.shape == (2, 3, 16, 16)
    assert kept.tolist() == [0, 1]
    for image, colour in zip(images, (RED_AND_BLUE["red"], RED_AND_BLUE["blue"]), strict=True):
        # JPEG moves a colour a little.
        assert (image.float().mean((1, 2)) - torch.tensor(colour)).abs().max() < 4


def test_classes_without_a_test_folder_are_split(tmp_path: Path) -> None:
    files.write_photos(tmp_path, RED_AND_BLUE, count=10)
    data = open_dataset(str(tmp_path), size=16, test_fraction=0.2)
    assert (len(data.train), len(data.test)) == (16, 4)
    assert isinstance(data.train, folder.ImageFolder)
    assert isinstance(data.test, folder.ImageFolder)
    assert not set(data.train.paths) & set(data.test.paths)
    assert data.test.labels.bincount().tolist() == [2, 2]


def test_hidden_files_and_debris_are_not_images(tmp_path: Path) -> None:
    files.write_photos(tmp_path, RED_AND_BLUE)
    (tmp_path / "red" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "red" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    data = open_dataset(str(tmp_path), size=16)
    assert len(data.train) + len(data.test) == 12
    assert data.classes == ("blue", "red")


def test_a_class_only_in_val(tmp_path: Path) -> None:
    files.write_photos(tmp_path / "train", RED_AND_BLUE)
    files.write_photos(tmp_path / "val", {"green": (0, 255, 0)})
    with pytest.raises(DataError, match=r"green.*no class of this name"):
        open_dataset(str(tmp_path), size=16)


BROKEN = {
    "notes.txt": lambda path: path.write_text("not an image"),
    "empty.png": lambda path: path.write_bytes(b""),
    "cut.jpg": lambda path: _cut(path, 0.6),
    "cut.png": lambda path: _cut(path, 0.6),
}


def _cut(path: Path, share: float) -> None:
    image = Image.frombytes("RGB", (64, 64), files.random_images(64 * 64 * 3).numpy().tobytes())
    image.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_or_skipped(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    files.write_photos(tmp_path / "train", RED_AND_BLUE)
    files.write_photos(tmp_path / "val", RED_AND_BLUE)
    BROKEN[name](tmp_path / "train" / "red" / name)

    def load(skip_broken: bool) -> tuple[int, list[int]]:
        data = open_dataset(str(tmp_path), size=16, skip_broken=skip_broken)
        images, kept = data.train.start(torch.arange(len(data.train)), None, None)()
        return images.shape[0], data.train.labels[kept].tolist()

    with pytest.raises(DataError, match=rf"{name}.*--skip-broken") as caught:
        load(skip_broken=False)
    assert "\n" not in str(caught.value)
    assert load(skip_broken=True) == (12, [0] * 6 + [1] * 6)
    assert f"{name}: a broken or non-image file" in capfd.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, IndexError, KeyError, ZeroDivisionError, EOFError])
def test_whatever_a_decoder_raises(error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error("Failed to decode")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=r"a\.avif: a broken or non-image file"):
        folder.decode(tmp_path / "a.avif", 16)


def test_only_broken_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match="2 files, none of them an image"):
        open_dataset(str(tmp_path), size=16, skip_broken=True)


def test_modes_are_converted(tmp_path: Path) -> None:
    grey16 = Image.new("I;16", (20, 20), 51400)
    grey16.save(tmp_path / "grey16.png")
    assert (folder.decode(tmp_path / "grey16.png", 8) == 200).all()
    Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
    assert (folder.decode(tmp_path / "grey.png", 8) == 90).all()
    Image.new("RGBA", (20, 20), (10, 20, 30, 40)).save(tmp_path / "alpha.png")
    assert folder.decode(tmp_path / "alpha.png", 8)[:, 0, 0].tolist() == [10, 20, 30]
    Image.new("RGB", (20, 20), (255, 0, 0)).quantize(4).save(tmp_path / "palette.png")
    assert folder.decode(tmp_path / "palette.png", 8)[:, 3, 3].tolist() == [255, 0, 0]
    assert folder.decode(tmp_path / "palette.png", 8, grayscale=True)[:, 3, 3].tolist() == [76, 76, 76]


def test_decode_is_resize_then_central_crop(tmp_path: Path) -> None:
    # A smooth picture: two resamplings of it may differ by little.
    x, y = torch.meshgrid(torch.arange(120), torch.arange(90), indexing="xy")
    picture = torch.stack([x * 2, y * 2, x + y], -1).to(torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "p.png")
    got = folder.decode(tmp_path / "p.png", 56)
    with Image.open(tmp_path / "p.png") as image:
        resized = image.resize((85, 64), Image.Resampling.BILINEAR).crop((14, 4, 70, 60))
    expected = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(56, 56, 3).permute(2, 0, 1)
    assert (got.float() - expected.float()).abs().max() <= 4


def test_a_large_jpeg_is_decoded_right_in_its_reduced_form(tmp_path: Path) -> None:
    x, y = torch.meshgrid(torch.arange(1600), torch.arange(1200), indexing="xy")
    picture = torch.stack([x // 8, y // 8, (x + y) // 12], -1).to(torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "p.jpg", quality=95)
    Image.fromarray(picture.numpy()).save(tmp_path / "p.png")
    difference = folder.decode(tmp_path / "p.jpg", 64).float() - folder.decode(tmp_path / "p.png", 64).float()
    assert difference.abs().mean() < 1.5


def test_random_crops_stay_inside_and_keep_their_share() -> None:
    for row in draw(500, "crops").tolist():
        left, top, right, bottom = folder._random_crop(300, 200, row, 0.25)
        assert -1e-6 <= left < right <= 300 + 1e-6
        assert -1e-6 <= top < bottom <= 200 + 1e-6
        assert (right - left) * (bottom - top) >= 0.2 * 300 * 200
        assert 0.5 < (right - left) / (bottom - top) < 2


def test_crops_follow_the_draws(tmp_path: Path) -> None:
    for i in range(4):
        image = Image.frombytes("RGB", (64, 64), files.random_images(64 * 64 * 3, seed=i).numpy().tobytes())
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    data = open_dataset(str(tmp_path), size=16, test_fraction=0.5)
    indices = torch.tensor([0, 1])
    once, again, other = (data.train.start(indices, draw(2, seed), 0.25)()[0] for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
