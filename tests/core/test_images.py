"""Pictures of every kind, and every kind of bad one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from torchloupe_core import images
from torchloupe_core.errors import BadInput
from torchloupe_core.spec import Spec, resize_and_normalise

SPEC = Spec(input_size=(3, 6, 8))
CPU = torch.device("cpu")


def read(given: Any, spec: Spec = SPEC) -> Tensor:
    return images.read(given, spec, device=CPU, dtype=torch.float32)


def gradient() -> np.ndarray:
    """A picture `[6, 8, 3]` in which no two pixels are alike."""
    rows, columns = np.mgrid[:6, :8]
    return np.stack([rows * 40, columns * 30, rows * 8 + columns], 2).astype(np.uint8)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(gradient()).save(path)
    return path


EXPECTED = torch.from_numpy(gradient()).permute(2, 0, 1).float() / 255


# -- the same picture in every form -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: Image.open(path),
        lambda path: gradient(),
        lambda path: torch.from_numpy(gradient()).permute(2, 0, 1),
        lambda path: EXPECTED,
        lambda path: EXPECTED.double(),
        lambda path: EXPECTED.half().float(),
    ],
    ids=["path", "str", "PIL", "uint8 array", "uint8 tensor", "float tensor", "double tensor", "half tensor"],
)
def test_one_picture_in_every_form(form: Callable[[Path], Any], png: Path) -> None:
    given = form(png)
    for one in (given, [given], (given,)):
        found = read(one)
        assert found.shape == (1, 3, 6, 8)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0], EXPECTED, atol=1e-3, rtol=0)


def test_several_pictures(png: Path) -> None:
    several: list[Any] = [
        [png, Image.open(png), gradient()],
        [str(png)] * 3,
        np.stack([gradient()] * 3),
        torch.from_numpy(np.stack([gradient()] * 3)).permute(0, 3, 1, 2),
        EXPECTED.repeat(3, 1, 1, 1),
        (path for path in [png] * 3),
    ]
    for given in several:
        found = read(given)
        assert found.shape == (3, 3, 6, 8)
        for one in found:
            torch.testing.assert_close(one, EXPECTED)


def test_a_folder_is_its_pictures_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, level in (("b/2.PNG", 200), ("a.jpg", 100), ("c.webp", 50)):
        Image.new("RGB", (8, 6), (level,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in images.find(tmp_path)] == ["a.jpg", "2.PNG", "c.webp"]
    levels = (read(tmp_path).mean((1, 2, 3)) * 255).round().tolist()
    assert levels == [100, 200, 50]


def test_resizing_and_normalising_against_a_loop() -> None:
    prepare = resize_and_normalise((3, 6, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    found = prepare(Image.fromarray(gradient()))
    for channel, (mean, std) in enumerate(((0.5, 0.2), (0.4, 0.3), (0.3, 0.4))):
        torch.testing.assert_close(found[channel], (EXPECTED[channel] - mean) / std)
    assert prepare(Image.new("RGB", (100, 3))).shape == (3, 6, 8)


# -- modes ------------------------------------------------------------------------------------------------------------


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    alpha = np.full((6, 8, 4), 255, np.uint8)
    alpha[..., :3] = 0
    alpha[:, :4, 3] = 0  # the left half is transparent, the right half black
    rgba = Image.fromarray(alpha, "RGBA")
    grey = rgba.convert("LA")
    palette = Image.new("P", (8, 6), 1)
    palette.putpalette([255, 0, 255, 0, 0, 0])
    palette.paste(0, (0, 0, 4, 6))
    paths = [saved(rgba, tmp_path / "rgba.png"), saved(grey, tmp_path / "la.png")]
    palette.save(tmp_path / "p.png", transparency=0)
    for given in [*paths, tmp_path / "p.png", rgba, grey]:
        found = read(given)[0]
        assert torch.equal(found[:, :, :4], torch.ones(3, 6, 4)), given
        assert torch.equal(found[:, :, 4:], torch.zeros(3, 6, 4)), given
    half = np.full((6, 8, 4), 128, np.uint8)
    half[..., :3] = 0
    torch.testing.assert_close(read(half)[0], torch.full((3, 6, 8), 127 / 255), atol=0.005, rtol=0)


def test_colour_spaces_and_depths(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient())
    grey = np.asarray(picture.convert("L"))
    cases: dict[str, tuple[Image.Image, np.ndarray]] = {
        "cmyk.tif": (picture.convert("CMYK"), gradient()),
        "l.png": (Image.fromarray(grey), np.stack([grey] * 3, 2)),
        "1.png": (Image.fromarray(grey > 50), np.stack([(grey > 50) * 255] * 3, 2)),
        "16.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, 2)),
        "i.tif": (Image.fromarray(grey.astype(np.int32) * 257), np.stack([grey] * 3, 2)),
        "f.tif": (Image.fromarray(grey.astype(np.float32) / 255), np.stack([grey] * 3, 2)),
        "hsv": (picture.convert("HSV"), gradient()),
        "ycbcr": (picture.convert("YCbCr"), gradient()),
        "palette.png": (picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256), gradient()),
    }
    for name, (image, expected) in cases.items():
        wanted = torch.from_numpy(expected.astype(np.float32)).permute(2, 0, 1) / 255
        given: list[Any] = [image, saved(image, tmp_path / name)] if "." in name else [image]
        for one in given:
            torch.testing.assert_close(
                read(one)[0],
                wanted,
                atol=0.03 if name in ("hsv", "ycbcr") else 0.005,
                rtol=0,
                msg=lambda m, n=name: n + m,
            )


def test_sixteen_bit_pictures_keep_their_own_scale(tmp_path: Path) -> None:
    """A dim 16-bit picture stays dim; one that holds only 8-bit values is read as such."""
    dim = saved(Image.fromarray(np.full((6, 8), 32768, np.uint16)), tmp_path / "dim.png")
    torch.testing.assert_close(read(dim), torch.full((1, 3, 6, 8), 0.5), atol=0.005, rtol=0)
    low = Image.fromarray(np.full((6, 8), 255, np.int32))
    torch.testing.assert_close(read(low), torch.ones(1, 3, 6, 8))


def test_a_picture_of_one_pixel(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (1, 1), (255, 0, 51)), tmp_path / "dot.png")
    assert torch.equal(read(path)[0], torch.tensor([1.0, 0, 0.2])[:, None, None].expand(3, 6, 8))


def test_exif_turns_a_photo_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    picture = Image.fromarray(gradient())
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 270 degrees
    picture.save(path, exif=exif)
    upright = images.open_picture(path)
    assert upright.size == (6, 8)
    assert np.array_equal(np.asarray(upright), np.rot90(gradient(), 3))


def test_grayscale_models_get_one_channel() -> None:
    found = read(Image.fromarray(gradient()), Spec(input_size=(1, 6, 8)))
    assert found.shape == (1, 1, 6, 8)
    expected = np.asarray(Image.fromarray(gradient()).convert("L"), np.float32) / 255
    torch.testing.assert_close(found[0, 0], torch.from_numpy(expected))
    array = np.asarray(Image.fromarray(gradient()).convert("L")).copy()
    for given in (array, array[:, :, None], torch.from_numpy(array)[None]):
        assert torch.equal(read(given, Spec(input_size=(1, 6, 8))), found)


# -- bad ones ---------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(whole)
    png = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(png)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[:2000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture at all")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "bare").mkdir()
    return {
        "no such image file": (tmp_path / "nowhere.png", "nowhere.png"),
        "cannot be decoded": (tmp_path / "cut.jpg", "cut.jpg"),
        "cannot be decoded:": (tmp_path / "cut.png", "cut.png"),
        "is empty (0 bytes)": (tmp_path / "empty.png", "empty.png"),
        "is not an image": (tmp_path / "text.png", "text.png"),
        "is a folder": ([tmp_path / "folder.png"], "folder.png"),
        "no images in": (tmp_path / "bare", "bare"),
        "is not an image:"[:-1]: ([whole, tmp_path / "text.png"], "text.png"),
    }


def test_files_that_are_no_pictures_are_named_in_one_line(tmp_path: Path) -> None:
    for says, (given, name) in broken(tmp_path).items():
        with pytest.raises(BadInput) as caught:
            read(given)
        message = str(caught.value)
        assert says in message
        assert name in message
        assert "\n" not in message


def test_a_picture_decoded_late_is_refused_like_a_file(tmp_path: Path) -> None:
    broken(tmp_path)
    for spec in (SPEC, Spec(input_size=(1, 6, 8))):
        with pytest.raises(BadInput, match="image 1 cannot be decoded"):
            read([gradient(), Image.open(tmp_path / "cut.jpg")], spec)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no images were given"),
        (7, "got int"),
        ([7], "image 0 is int"),
        ([gradient(), None], "image 1 is NoneType"),
        (np.zeros((6, 8, 3)), "float64"),
        (np.zeros((6, 8, 3), np.int64), "int64"),
        (np.zeros((6, 8, 2), np.uint8), "[6, 8, 2]"),
        (np.zeros((0, 8, 3), np.uint8), "[0, 8, 3]"),
        (np.zeros((8,), np.uint8), "[8]"),
        (torch.zeros(6, 8, 3, dtype=torch.uint8), "[6, 8, 3]"),
        (torch.zeros(3, 6, 8, dtype=torch.long), "int64"),
        (torch.zeros(6, 8), "[6, 8]"),
        (torch.zeros(1, 2, 3, 6, 8), "got [1, 2, 3, 6, 8]"),
        (torch.zeros(0, 3, 6, 8), "at least one image"),
        (torch.zeros(4, 6, 8), "takes 3 channels; the images have 4"),
        (torch.full((3, 6, 8), torch.nan), "image 0"),
        ([torch.zeros(3, 6, 8), torch.full((3, 6, 8), torch.inf)], "NaN or infinity, in image 1"),
        (torch.cat([torch.zeros(1, 3, 6, 8), torch.full((7, 3, 6, 8), torch.nan)]), "images 1, 2, 3, 4, 5, ..."),
        ([torch.zeros(3, 6, 8), torch.zeros(3, 7, 8)], "different sizes"),
        ([torch.zeros(1, 3, 6, 8)], "[1, 1, 3, 6, 8]"),
    ],
)
def test_what_is_no_picture_says_what_was_given(given: Any, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(given)
    assert says in str(caught.value)


def test_a_model_of_fixed_size_says_so() -> None:
    fixed = Spec(input_size=(3, 6, 8), fixed_size=True)
    with pytest.raises(BadInput, match=r"\[3, 6, 8\] only; got \[3, 6, 9\]"):
        read(torch.zeros(3, 6, 9), fixed)
    assert read(torch.zeros(3, 6, 9)).shape == (1, 3, 6, 9)


def test_pictures_need_an_input_size_and_a_sane_preprocessing() -> None:
    with pytest.raises(BadInput, match=r"input_size=\(3, H, W\)"):
        read(gradient(), Spec())
    assert read(torch.zeros(5, 2, 2), Spec()).shape == (1, 5, 2, 2)
    for result in (torch.zeros(1, 3, 6, 8), torch.zeros(6, 8), "text"):
        with pytest.raises(BadInput, match=r"preprocess must turn a picture into a tensor \[C, H, W\]"):
            read(gradient(), Spec(preprocess=lambda image, result=result: result))  # type: ignore[misc]


# -- the caller's data ------------------------------------------------------------------------------------------------


def test_the_callers_tensor_is_never_aliased() -> None:
    mine = torch.rand(2, 3, 6, 8, requires_grad=True)
    array, pixels = gradient(), torch.from_numpy(gradient()).permute(2, 0, 1).clone()
    for given in (mine, mine[0], [mine[0], mine[1]], array, pixels):
        before = [part.detach().clone() if isinstance(part, Tensor) else part.copy() for part in (mine, array, pixels)]
        found = read(given)
        assert not found.requires_grad
        found.fill_(9)
        assert torch.equal(mine, before[0])
        assert np.array_equal(array, before[1])
        assert torch.equal(pixels, before[2])
    assert mine.requires_grad


def test_preprocessing_that_returns_a_kept_tensor_is_copied() -> None:
    kept = torch.rand(3, 6, 8)
    read(gradient(), Spec(preprocess=lambda image: kept)).fill_(9)
    assert kept.max() <= 1


# -- back to a picture ------------------------------------------------------------------------------------------------


def test_display_undoes_the_normalisation() -> None:
    spec = Spec(input_size=(3, 6, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    torch.testing.assert_close(spec.display(read(gradient(), spec)), EXPECTED[None])
    plain = Spec()
    torch.testing.assert_close(plain.display(EXPECTED[None]), EXPECTED[None])
    stretched = plain.display(torch.stack([EXPECTED * 4 - 2, EXPECTED * 100]))
    assert stretched.amin((1, 2, 3)).tolist() == [0, 0]
    assert stretched.amax((1, 2, 3)).tolist() == [1, 1]
    for channels in (1, 2, 5):
        assert plain.display(torch.rand(2, channels, 4, 4)).shape == (2, 3, 4, 4)
    assert plain.display(torch.full((1, 3, 4, 4), 7.0)).isfinite().all()
