from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGENET
from PIL import Image
from test_tables import ROW
from torch import Tensor, nn

from igstore import cli
from igstore.evaluation import read_rows
from igstore.models import Classifier, classifier_from_module
from igstore.schema import Preprocessing
from igstore.storage import StoreReader
from pipelines import article

SEED = IMAGENET.parent / "seed.txt"  # the article

WNIDS = ("n01440764", "n01443537", "n02123045")


class Thousand(nn.Module):
    """A thousand classes of a few pixels each, of which some win."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(1000, 3 * 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.weight.T


def _classifier(seed: int, side: int) -> Classifier:
    return classifier_from_module(Thousand(seed), preprocessing=Preprocessing(resize=side, crop=(side, side)))


def one() -> Classifier:
    """Loaded by the name ``test_article:one``."""
    return _classifier(1, 24)


def two() -> Classifier:
    """Loaded by the name ``test_article:two``; of another input size."""
    return _classifier(2, 31)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of three classes."""
    random = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("val")
    for index in range(9):
        folder = root / WNIDS[index % 3]
        folder.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image_{index}.png")
    return root


def run(data: Path, out: Path, *more: str) -> int:
    names = ("test_article:one", "test_article:two")
    return cli.run(article.main, ["--data", str(data), "--out", str(out), "--n-steps", "3", "--models", *names, *more])


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("article") / "out"
    assert run(data, out) == 0
    return out


def test_each_model_sees_its_own_masks_and_all_see_the_last_ones(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "evaluations").iterdir())
    first, second = "test_article:one", "test_article:two"
    assert names == [
        f"test_article-{model}-{settings}" for model in ("one", "two") for settings in sorted(article.SETTINGS)
    ]
    assert sorted(path.stem for path in (finished / "stores").iterdir()) == names
    seen = {}
    for name in names:
        rows = read_rows(finished / "evaluations" / name)
        seen[name] = [(row.store_model, row.model, row.is_own) for row in rows[::8]]
        assert len(rows) == 8 * len(seen[name])
        assert {row.cell for row in rows} == set(article.CELLS)
        assert {row.n for row in rows} == {9}
    own, both = [(first, first, True)], [(second, first, False), (second, second, True)]
    assert seen == {names[0]: own, names[1]: own, names[2]: both, names[3]: both}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("plain", ("black", "logit", "riemann_right", "sum")),
        ("article", ("noise", "probability", "riemann_left", "positive")),
    ],
)
def test_the_settings_are_recorded_and_named_in_the_tables(
    finished: Path, settings: str, expected: tuple[str, ...]
) -> None:
    for model in ("one", "two"):
        spec = StoreReader(finished / "stores" / f"test_article-{model}-{settings}.zarr").spec
        assert (spec.baseline, spec.output, spec.method, spec.reduce, spec.n_steps) == (*expected, 3)
    tables = (finished / "tables.md").read_text()
    section = tables.split(f"## {article.TITLES[settings]}")[1].split("\n## ")[0]
    notes = [line for line in section.splitlines() if "baseline" in line]
    assert len(notes) == 6
    made = "3 steps" if settings == "plain" else "3 steps, riemann_left, probability, positive part of each channel"
    assert all(f"({expected[0]} baseline, prediction as target, {made})" in note for note in notes)
    assert [note.startswith("Own masks") for note in notes] == [True] * 3 + [False] * 3


def test_one_of_the_settings_and_one_model(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--settings", "article", "--models", "test_article:one") == 0
    assert [path.stem for path in (tmp_path / "stores").iterdir()] == ["test_article-one-article"]
    tables = (tmp_path / "tables.md").read_text()
    assert tables.count("**Table") == 3
    assert article.TITLES["plain"] not in tables


def test_what_is_done_is_not_done_again(
    data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr(article, "evaluate", None)
    tables = (finished / "tables.md").read_text()
    assert run(data, finished) == 0
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"tables.md"}
    assert (finished / "tables.md").read_text() == tables
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Table")]
    assert len(printed) == tables.count("**Table") == 12  # of either settings' own masks and shared ones


def test_an_evaluation_of_other_settings_is_done_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(data, out, "--limit", "6") == 0
    results = out / "evaluations" / "test_article-one-plain" / "results.json"
    records = json.loads(results.read_text())
    results.write_text(json.dumps([*records[:-1], records[-1] | {"weights_sha256": "0" * 64}]))
    (out / "evaluations" / "test_article-two-article" / "results.json").unlink()
    assert run(data, out, "--limit", "6") == 0
    assert json.loads(results.read_text()) == records
    assert run(data, out, "--limit", "9") == 0  # a larger limit extends the stores
    for folder in (out / "evaluations").iterdir():
        assert {row.n for row in read_rows(folder)} == {9}
    assert run(data, out, "--limit", "4") == 0  # a smaller one leaves them, and evaluates the first
    assert {row.n for row in read_rows(results.parent)} == {4}


def published() -> dict[str, dict[str, tuple[float, ...]]]:
    """The numbers of Tables 1 and 2, from the article's text."""
    found: list[dict[str, tuple[float, ...]]] = []
    for line in SEED.read_text().splitlines():
        if line.startswith("Model Original"):
            found.append({})
        elif row := re.fullmatch(r"(VGG-16|Inception V3|ResNet-50|DenseNet-121)((?: \d+\.\d+){5})", line):
            name = {"VGG-16": "vgg16", "Inception V3": "inception_v3"}.get(row[1], row[1].replace("-", "").lower())
            found[-1][name] = tuple(map(float, row[2].split()))
    return dict(zip(("top", "bottom"), found, strict=False))


@pytest.mark.skipif(not SEED.exists(), reason="needs ../shared/seed.txt")
def test_the_published_numbers_are_the_articles() -> None:
    assert published() == article.ARTICLE


def of_the_article(model: str, **changes: Any) -> list[Any]:
    rows = [dataclasses.replace(ROW, model=model, p=cell.p, keep=cell.keep, **changes) for cell in article.CELLS]
    return [dataclasses.replace(row, top1=float(place)) for place, row in enumerate(rows)]


def test_ours_stand_beside_the_articles_with_the_difference() -> None:
    tables = article.beside_the_article(of_the_article("vgg16", n=50_000))
    assert [table.groups for table in tables] == [
        (
            (
                ("vgg16", "76.15", "0.00", "1.00", "2.00", "3.00"),
                ("article", "71.59", "31.79", "8.38", "0.91", "0.17"),
                ("difference", "+4.56", "-31.79", "-7.38", "+1.09", "+2.83"),
            ),
        ),
        (
            (
                ("vgg16", "76.15", "4.00", "5.00", "6.00", "7.00"),
                ("article", "71.59", "0.16", "2.53", "16.06", "30.30"),
                ("difference", "+4.56", "+3.84", "+2.47", "-10.06", "-23.30"),
            ),
        ),
    ]
    assert "keep bottom, 50000 images" in tables[1].title
    for table in tables:  # wherever the article's numbers stand, it says whose they are
        assert "Sean Saito" in table.note
        assert "https://seansaito.github.io/2019/12/03/masked-accuracy" in table.markdown()


@pytest.mark.parametrize(("model", "weights"), [("vgg16", "random:0"), ("efficientnet_lite0", "IMAGENET1K_V1")])
def test_other_models_and_weights_have_no_published_numbers(model: str, weights: str) -> None:
    assert article.beside_the_article(of_the_article(model, weights=weights)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "a", "b", "c"], "3 weights for 2 models"),
        (["--models", "no_such_model"], "no_such_model"),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_mistakes_are_one_line(
    data: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "out", *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_images_that_failed_are_in_the_exit_status(data: Path, tmp_path: Path) -> None:
    for path in data.rglob("*.png"):
        copy = tmp_path / "val" / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    copy.write_bytes(b"not an image")
    assert run(tmp_path / "val", tmp_path / "out") == cli.SOME_IMAGES_FAILED
    assert {row.n for row in read_rows(tmp_path / "out" / "evaluations" / "test_article-one-plain")} == {8}
