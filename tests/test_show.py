from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stores import CLASS_NAMES, image_ids, make_store

from igstore import cli
from igstore.datasets import keep_mask, masked_view, open_store
from igstore.errors import StoreNotFoundError, UserError
from igstore.masks import FILLS, expand
from igstore.masks.selection import SELECTIONS
from igstore.reporting import heat_map
from igstore.show import main, show_store

N = 10
SIZE = (23, 26)
ZOOM = 9  # the smallest whole number that makes 23 pixels at least 200


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images, of which number 3 failed."""
    return make_store(tmp_path_factory.mktemp("show") / "toy.zarr", N, failed=[3])


def places(picture: Image.Image, panel: np.ndarray) -> list[tuple[int, int]]:
    """Where in the picture (y, x) these pixels (channel, y, x) are, enlarged, from top to bottom and left to right."""
    pixels = packed(np.asarray(picture))
    wanted = packed(panel.transpose(1, 2, 0)).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    height, width = wanted.shape
    colours, counts = np.unique(wanted, return_counts=True)
    y, x = np.argwhere(wanted == colours[counts.argmin()])[0]  # a pixel that is easily found
    found = np.argwhere(pixels == wanted[y, x]) - (y, x)
    fits = (found >= 0).all(axis=1) & (found <= np.subtract(pixels.shape, wanted.shape)).all(axis=1)
    return [(y, x) for y, x in found[fits].tolist() if (pixels[y : y + height, x : x + width] == wanted).all()]


def packed(pixels: np.ndarray) -> np.ndarray:
    """Pixels (y, x, channel) as one number each."""
    return pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


@pytest.mark.parametrize(
    "options",
    [{}, {"fill": "noise", "seed": 3}, {"select": "count"}, {"order": "random"}],
    ids=["default", "noise", "count", "random"],
)
def test_panels_are_the_masked_views(store, options):
    every_p = (70, 30)
    shown = [image_ids(N)[7], image_ids(N)[4]]
    picture = show_store(store, shown, every_p, **options)
    assert picture.mode == "RGB"
    found = []
    for image in shown:
        top, bottom = (masked_view(store, every_p, keep, **options).sel(image=image) for keep in ("top", "bottom"))
        heat = heat_map(open_store(store).attribution.sel(image=image).values, 3).transpose(2, 0, 1)
        original = open_store(store).pixels.sel(image=image)
        for row in ([original, *top], [heat, *bottom]):
            (at,) = zip(*(places(picture, np.asarray(panel)) for panel in row), strict=True)  # each exactly once
            found.append(at)
    # images and sides from top to bottom, original and every p from left to right
    columns = [[x for _, x in row] for row in found]
    assert columns[0] == sorted(columns[0])
    assert all(row == columns[0] for row in columns)
    rows = [{y for y, _ in row} for row in found]
    assert [len(row) for row in rows] == [1, 1, 1, 1]
    assert sorted(map(min, rows)) == list(map(min, rows))


def test_one_p_and_one_image_is_a_small_picture(store):
    one = show_store(store, image_ids(N)[:1], 50)
    assert one.width == 2 * 24 + 2 * SIZE[1] * ZOOM + 8
    assert show_store(store, image_ids(N)[:2], 50).height > 2 * 2 * SIZE[0] * ZOOM > one.height


def test_large_images_are_not_enlarged(tmp_path):
    large = make_store(tmp_path / "large.zarr", 1, size=(210, 230), labels=[2])
    assert show_store(large, p=50).width == 2 * 24 + 2 * 230 + 8


def test_the_default_images_are_spread_over_those_that_are_built(store):
    picture = show_store(store, p=50)
    pixels = open_store(store).pixels
    shown = [index for index in range(N) if index != 3 and places(picture, pixels[index].values)]
    assert shown == [0, 4, 6, 9]  # of 0 1 2 4 5 6 7 8 9: places 0, 3, 5 and 8
    assert picture.tobytes() == show_store(store, p=50).tobytes()


def test_words(store, monkeypatch):
    """Id, class names, predictions and visible shares are written: what is drawn is recorded instead."""
    written = record_text(monkeypatch)
    show_store(store, [image_ids(N)[4]], 10)  # label 3, predicted 0
    visible = {keep: keep_mask(store, 10, keep).sel(image=image_ids(N)[4]).values.mean() for keep in ("top", "bottom")}
    assert visible["top"] < 0.1 < visible["bottom"]
    assert {"image_0004", "original", "attribution"} <= set(written)
    assert (
        f"label: {CLASS_NAMES[3]} · predicted, unmasked: {CLASS_NAMES[0]} (wrong) · attributed: the prediction"
        in written
    )
    assert f"top, p=10: {100 * visible['top']:.1f}% visible" in written
    assert f"bottom, p=10: {100 * visible['bottom']:.0f}% visible" in written
    assert any("toy, weights own" in line for line in written)


def test_classes_without_names_and_images_without_labels(tmp_path, monkeypatch):
    written = record_text(monkeypatch)
    path = make_store(tmp_path / "nameless.zarr", 2, labels=[-1, 4], class_names=(), wnids=())
    show_store(path, p=50)
    assert "no label · predicted, unmasked: class 0" in written
    assert "label: class 4 · predicted, unmasked: class 4 (right)" in written


def test_names_that_do_not_fit_or_print_are_drawn_all_the_same(tmp_path, monkeypatch):
    written = record_text(monkeypatch)
    names = ("a\nb\x00c", "x" * 500, "c", "d", "e")
    show_store(make_store(tmp_path / "names.zarr", 2, labels=[0, 1], class_names=names), p=50)
    assert "label: a b c · predicted, unmasked: a b c (right)" in written
    assert any(line.startswith("label: xxx") and line.endswith("x…") for line in written)


def record_text(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from PIL import ImageDraw

    written: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(self, place, words, *args, **kwargs):
        written.append(words)
        return draw(self, place, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


# Heat maps


def test_heat_maps_show_sign_and_strength():
    values = np.zeros((6, 9), np.float16)
    values[0, 0], values[3, 3], values[3, 6] = 2.0, -2.0, 1.0
    colours = heat_map(values, 3)
    assert colours.shape == (6, 9, 3)
    assert colours.dtype == np.uint8
    blocks = colours[::3, ::3]
    np.testing.assert_array_equal(colours, expand(blocks.transpose(2, 0, 1), 6, 9, 3).transpose(1, 2, 0))
    assert blocks[0, 0].tolist() == [213, 94, 0]
    assert blocks[1, 1].tolist() == [0, 114, 178]
    assert blocks[0, 1].tolist() == [255, 255, 255]
    red, green, blue = blocks[1, 2].astype(int)
    assert 213 < red < 255
    assert 94 < green < 255
    assert 0 < blue < 255


def test_heat_maps_do_not_depend_on_scale_or_on_a_few_large_values():
    values = np.random.default_rng(0).normal(size=(30, 30))
    colours = heat_map(values)
    np.testing.assert_array_equal(colours, heat_map(1e-6 * values))
    outlier = values.copy()
    outlier[0, 0] = 1e6
    assert np.abs(heat_map(outlier).astype(int) - colours)[1:].mean() < 2  # of 255


def test_heat_maps_of_channels_are_of_their_sum():
    values = np.random.default_rng(1).normal(size=(3, 8, 7))
    np.testing.assert_array_equal(heat_map(values, 3), heat_map(values.sum(axis=0), 3))


def test_a_heat_map_of_nothing_is_white():
    assert (heat_map(np.zeros((4, 4))) == 255).all()


def test_maps_kept_with_their_channels_are_shown(tmp_path):
    path = make_store(tmp_path / "none.zarr", 1, labels=[1], reduce="none")
    heat = heat_map(open_store(path).attribution[0].values, 3).transpose(2, 0, 1)
    assert len(places(show_store(path, p=50), heat)) == 1


# Mistakes


def test_an_unknown_image_is_an_error_with_its_neighbours(store):
    with pytest.raises(UserError, match=r"no image 'imege_0004'; is it image_0004, "):
        show_store(store, ["imege_0004"])
    with pytest.raises(UserError, match=r"no image '7'; is it image_0007\?"):
        show_store(store, ["7"])
    with pytest.raises(UserError, match=r"no image '###'; the first one is image_0000"):
        show_store(store, ["###"])


def test_images_that_failed_or_are_missing_say_so(store, tmp_path):
    with pytest.raises(UserError, match=r"image_0003 .* is not built: made to fail"):
        show_store(store, ["image_0003"])
    part = make_store(tmp_path / "part.zarr", N, shards={0})
    with pytest.raises(UserError, match=r"image_0009 .* is not built: run `igstore build`"):
        show_store(part, ["image_0009"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 101}, "p is 101"),
        ({"p": True}, "p is True"),
        ({"p": ()}, "p is empty"),
        ({"image": ()}, "image is empty"),
        ({"image": "image_0001"}, "give a list"),
        ({"fill": "pink"}, "fill is 'pink'"),
        ({"block": 5}, "positive-5"),
    ],
    ids=str,
)
def test_mistakes(store, options, message):
    with pytest.raises(UserError, match=message):
        show_store(store, **options)


def test_a_store_without_pixels_takes_them_from_another(store, tmp_path):
    bare = make_store(tmp_path / "bare.zarr", N, failed=[3], pixels=False)
    with pytest.raises(UserError, match="images=PATH"):
        show_store(bare)
    assert show_store(bare, p=50, images=store).tobytes() == show_store(store, p=50).tobytes()


# The command


def test_the_command_writes_a_picture(store, tmp_path, capsys):
    out = tmp_path / "new folder" / "masks.png"
    arguments = ["--image", "image_0001", "image_0005", "--p", "90", "10", "--fill", "mean", "--out", str(out)]
    assert main([str(store), *arguments]) == cli.DONE
    with Image.open(out) as written:
        expected = show_store(store, ["image_0001", "image_0005"], (90, 10), fill="mean")
        assert written.format == "PNG"
        assert written.tobytes() == expected.tobytes()
    assert capsys.readouterr().out == f"{out}: {expected.width}x{expected.height} pixels\n"
    assert [path.name for path in out.parent.iterdir()] == ["masks.png"]
    assert main([str(store), *arguments]) == cli.DONE
    assert capsys.readouterr().err == f"note: {out} is there, and is replaced\n"


@pytest.mark.parametrize("name", ["masks.jpg", "folder.png"])
def test_the_command_refuses_what_it_cannot_write(store, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=name):
        main([str(store), "--p", "50", "--out", str(tmp_path / name)])


def test_the_command_knows_every_fill_and_selection(store, tmp_path):
    pictures = set()
    for option, names in (("--fill", FILLS), ("--select", SELECTIONS)):
        for name in names:
            out = tmp_path / f"{name}.png"
            assert main([str(store), "--image", "image_0004", "--p", "60", option, name, "--out", str(out)]) == cli.DONE
            pictures.add(out.read_bytes())
    assert len(pictures) == len(FILLS) + len(SELECTIONS) - 1  # black and mass are both defaults


def test_no_torch_is_needed(store, tmp_path):
    code = f"""
import sys
from igstore.show import main
main([{str(store)!r}, "--p", "50", "--out", {str(tmp_path / "show.png")!r}])
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_store(tmp_path):
    with pytest.raises(StoreNotFoundError, match="there is no store"):
        show_store(tmp_path / "nothing.zarr")


@pytest.mark.parametrize("images", [[0, 1], ["image_0000", 1], 0], ids=repr)
def test_images_are_named_by_their_ids(tmp_path, images):
    with pytest.raises(UserError):
        show_store(make_store(tmp_path / "toy.zarr", 3), images, p=50)
