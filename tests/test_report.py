from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from PIL import Image
from scipy.stats import binomtest
from stores import CLASS_NAMES, make_store

from igstore import cli
from igstore.datasets import MaskedImages
from igstore.errors import DamagedStoreError, StoreNotFoundError, UserError
from igstore.evaluate import Evaluation
from igstore.evaluation import (
    PAIRING_FIELDS,
    RESULTS,
    Findings,
    Row,
    measure,
    predictions,
    settings_sha256,
    write_report,
)
from igstore.evaluation.results import Pairing, Shown
from igstore.evaluation.results_folder import PREDICTIONS
from igstore.masks import MaskOptions
from igstore.report import make_report
from igstore.reporting import LOOKS
from igstore.reporting.charts import look_in_turn
from igstore.schema import BUILT
from igstore.show import show_store
from igstore.storage import StoreReader

pytest.importorskip("matplotlib")

N = 60
P = (80.0, 50.0, 20.0)
CELLS = [
    MaskOptions(p=p, keep=keep, order=order)
    for order in ("attribution", "random")
    for keep in ("top", "bottom")
    for p in P
]
HOSTILE = '<script>alert("1")</script>&amp;\n\'"><img src=http://example.org/x>$x^2$'


def shown(store: Path, cells: Sequence[MaskOptions] = CELLS, **pairing: Any) -> Shown:
    """Made-up predictions of a store's images under its real masks: the more is visible, the more are right."""
    reader, source = StoreReader(store), MaskedImages(store)
    images = np.flatnonzero(reader.status == BUILT)
    labels = reader.scalars("label")[images]
    visible = np.stack([np.ones(len(images)), *(source.masks(images, cell).mean(axis=(1, 2)) for cell in cells)])
    model = pairing.get("model", "toy")
    random = np.random.default_rng([*model.encode(errors="replace")])
    right = random.random(visible.shape) < 0.1 + 0.8 * visible
    wrong = (labels + random.integers(1, 5, visible.shape)) % 5
    prediction = np.where(right & (labels >= 0), labels, wrong).astype(np.int32)
    spec = reader.spec
    fields = {
        "store": store.name,
        "store_model": spec.model,
        "store_weights": spec.weights,
        "store_weights_sha256": spec.weights_sha256,
        "store_settings_sha256": settings_sha256(spec),
        **{name: getattr(spec, name) for name in ("baseline", "target", "output", "method", "n_steps", "reduce")},
        "model": model,
        "weights": spec.weights,
        "weights_sha256": spec.weights_sha256,
        "device": "cpu",
        "igstore_version": "0",
        "torch_version": "0",
    }
    return Shown(
        pairing=Pairing(**fields | pairing),
        image_ids=[reader.image_ids[image] for image in images],
        labels=labels,
        prediction=prediction,
        in_top5=prediction == labels,
        visible=visible,
        completeness_error=reader.scalars("completeness_error")[images],
        steps_spent=reader.scalars("n_steps")[images],
        class_names=reader.attributes["class_names"],
    )


def write(out: Path, every: Sequence[Shown], cells: Sequence[MaskOptions] = CELLS) -> Path:
    write_report(out, [row for one in every for row in measure(one, cells)], predictions(every, cells))
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "toy.zarr", N, shard_size=20, failed=[7])


@pytest.fixture(scope="module")
def results(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model on its own store."""
    return write(tmp_path_factory.mktemp("results") / "own", [shown(store)])


@pytest.fixture(scope="module")
def report(results: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, with pictures."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    make_report(results, out, stores=[store])
    return out


class Page(HTMLParser):
    """A page's elements, its text, and whether every element is closed in its turn."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(results: Path) -> list[Row]:
    return [Row(**record) for record in json.loads((results / RESULTS).read_text())]


# The page as a whole


def test_the_page_is_whole(report):
    page = Page(report.read_text("utf-8"))
    assert [attributes["id"] for attributes in page.all("section")] == [
        "at-a-glance",
        "accuracy",
        "tables",
        "what-is-visible",
        "completeness",
        "classes",
        "images",
        "provenance",
    ]
    assert len(page.all("svg")) == 4
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    # what is referred to within the page is there
    html = report.read_text("utf-8")
    for reference in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html):
        assert "".join(reference) in ids


def test_the_page_asks_for_nothing(report):
    html = report.read_text("utf-8")
    page = Page(html)
    assert "http://" not in html.replace("http-equiv", "")
    assert "https://" not in html
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in page.all("img"))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_links_lead_to_files_that_are_there(report):
    page = Page(report.read_text("utf-8"))
    linked = {attributes["href"] for attributes in page.all("a") if not attributes["href"].startswith("#")}
    files = {str(path.relative_to(report.parent)) for path in (report.parent / "report_files").iterdir()}
    assert linked == files
    assert {path.split("/")[1] for path in files} == {
        *(
            f"{name}.{kind}"
            for name in ("accuracy_by_p", "accuracy_by_visible", "visible_by_p", "completeness")
            for kind in ("png", "csv")
        ),
        "classes.csv",
        "images.csv",
        "images_top.png",
        "images_bottom.png",
    }


def test_figures_follow_the_page_into_the_dark(report):
    html = report.read_text("utf-8")
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    for drawing in drawings:
        colours = set(re.findall(r"#[0-9a-f]{6}\b", drawing))
        assert colours == set(), "colours that the page cannot set"
        assert "currentColor" in drawing
    # every series' colour is set by the page, for both
    used = set(re.findall(r"var\((--c-[0-9a-f]{6})\)", "".join(drawings)))
    assert used
    assert all(html.count(f"{name}:") >= 1 for name in used)


def test_series_differ_in_more_than_colour():
    assert len({(str(look.line), look.marker) for look in LOOKS.values()}) == len(LOOKS)
    assert len({str(look_in_turn(turn).line) for turn in range(4)}) == 4
    assert len({(look.colour, str(look.line)) for look in map(look_in_turn, range(16))}) == 16


def test_pictures_of_figures_are_pictures(report):
    for path in (report.parent / "report_files").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 300


def test_the_same_results_make_the_same_bytes(results, store, report, tmp_path):
    again = make_report(results, tmp_path / "report.html", stores=[store])
    assert [path.read_bytes() for path in again] == [
        (report.parent / path.relative_to(tmp_path)).read_bytes() for path in again
    ]


# Its numbers


def test_accuracies_are_those_of_the_results(results, report):
    files = report.parent / "report_files"
    series = {
        "top p%": ("top", "attribution"),
        "all but the top p%": ("bottom", "attribution"),
        "as many as top, at random": ("top", "random"),
        "as many as the rest, at random": ("bottom", "random"),
    }
    found = {
        (*series[line["series"]], float(line["p"])): [
            float(line[name]) for name in ("top-1 accuracy (%)", "low", "high")
        ]
        for line in read_csv(files / "accuracy_by_p.csv")
        if line["series"] != "unmasked"
    }
    rows = rows_of(results)
    assert found == {(row.keep, row.order, row.p): [row.top1, row.low, row.high] for row in rows}
    for row in rows:
        low, high = binomtest(row.correct, row.n).proportion_ci(method="wilson")
        assert found[row.keep, row.order, row.p][1:] == pytest.approx([100 * low, 100 * high])
    unmasked = [line for line in read_csv(files / "accuracy_by_p.csv") if line["series"] == "unmasked"]
    assert {float(line["top-1 accuracy (%)"]) for line in unmasked} == {rows[0].original_top1}


def test_accuracies_by_visible_pixels_are_those_of_the_results(results, report):
    found: dict[str, list[tuple[float, float]]] = {}
    for line in read_csv(report.parent / "report_files" / "accuracy_by_visible.csv"):
        found.setdefault(line["series"], []).append(
            (float(line["pixels visible (%)"]), float(line["top-1 accuracy (%)"]))
        )
    rows = rows_of(results)
    for name, wanted in (
        ("the most important", [row for row in rows if (row.keep, row.order) == ("top", "attribution")]),
        ("the least important", [row for row in rows if (row.keep, row.order) == ("bottom", "attribution")]),
        ("at random", [row for row in rows if row.order == "random"]),
    ):
        assert found[name] == sorted((row.visible, row.top1) for row in wanted)


def test_visible_pixels_are_those_of_the_masks(results, report, store):
    source = MaskedImages(store)
    labelled = np.flatnonzero((source.reader.status == BUILT) & (source.reader.scalars("label") >= 0))
    lines = {
        (line["series"], float(line["p"])): line
        for line in read_csv(report.parent / "report_files" / "visible_by_p.csv")
    }
    for name, keep in (("top p%", "top"), ("all but the top p%", "bottom")):
        for p in P:
            percents = 100 * source.masks(labelled, MaskOptions(p=p, keep=keep)).mean(axis=(1, 2))
            line = lines[name, p]
            found = [float(line[column]) for column in ("pixels visible (%)", "low", "high")]
            # float32 in the predictions
            assert found == pytest.approx([percents.mean(), *np.percentile(percents, (25, 75))], rel=1e-6)


def test_completeness_errors_are_those_of_the_store(report, store):
    reader = StoreReader(store)
    errors = reader.scalars("completeness_error")[reader.status == BUILT]
    lines = read_csv(report.parent / "report_files" / "completeness.csv")
    assert len(lines) > 100
    for line in lines[::20]:
        share = 100 * (errors <= np.float32(line["completeness error"])).mean()
        assert share >= float(line["images with at most this error (%)"])
    text = Page(report.read_text("utf-8")).text
    assert f"{np.sort(errors)[-(-len(errors) // 2) - 1]:.3f}" in text
    assert f"{50 * len(errors):,}" in text


def test_classes_are_counted(results, report):
    saved = xr.open_zarr(results / PREDICTIONS).load()
    labels = saved.label.values
    cells = list(zip(saved.keep.values, saved.p.values, saved.order.values, strict=True))
    lines = read_csv(report.parent / "report_files" / "classes.csv")
    assert len(lines) == 5 * 2 * len(P)
    for line in lines:
        cell = cells.index((line["keep"], float(line["p"]), "attribution"))
        mine = labels == int(line["class"])
        assert line["name"] == CLASS_NAMES[int(line["class"])]
        assert int(line["images"]) == mine.sum()
        assert int(line["correct"]) == (saved.prediction.values[0, cell] == labels)[mine].sum()
        assert int(line["correct_unmasked"]) == (saved.unmasked.values[0] == labels)[mine].sum()


def test_the_page_shows_the_best_and_the_worst_classes(results, report):
    lines = [line for line in read_csv(report.parent / "report_files" / "classes.csv") if line["keep"] == "bottom"]
    means = {
        name: np.mean([int(line["correct"]) / int(line["images"]) for line in lines if line["name"] == name])
        for name in CLASS_NAMES
    }
    words = Page(report.read_text("utf-8")).text
    after = words[words.index("the important pixels are hidden (keep bottom)") :]
    order = sorted(
        (after.index(f"\n{name}\n"), name)
        for name in CLASS_NAMES
        if f"\n{name}\n" in after[: after.index("Every class")]
    )
    shown = [means[name] for _, name in order]
    assert len(shown) == 4  # two at either end of five
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == max(means.values())
    assert shown[-1] == min(means.values())


def test_images_of_one_side_are_all_listed(results, report):
    saved = xr.open_zarr(results / PREDICTIONS).load()
    cells = list(zip(saved.keep.values, saved.p.values, saved.order.values, strict=True))
    right = (saved.prediction.values[0] == saved.label.values) & (saved.label.values >= 0)
    expected = {}
    for keep, other in (("top", "bottom"), ("bottom", "top")):
        for place, image in enumerate(saved.image.values):
            every_p = [
                p
                for p in sorted(P)
                if right[cells.index((keep, p, "attribution")), place]
                and not right[cells.index((other, p, "attribution")), place]
            ]
            if every_p:
                expected[keep, str(image)] = every_p
    lines = read_csv(report.parent / "report_files" / "images.csv")
    assert {
        (line["right_alone"], line["image"]): [float(p) for p in line["every_p"].split()] for line in lines
    } == expected
    for line in lines:
        every_p = expected[line["right_alone"], line["image"]]
        assert float(line["p"]) == (min if line["right_alone"] == "top" else max)(every_p)
        assert int(line[f"predicted_{line['right_alone']}"]) == int(line["class"])


def test_sides_add_up(results, report):
    """Both, one alone, and neither are all images; and what is alone is in McNemar's table."""
    findings = Findings.read(results)
    (((case,),)) = findings.cases.values()
    words = Page(report.read_text("utf-8")).words
    for p, rows in case.both_sides.items():
        start = words.index(f"p={p:g}", words.index("images right from"))
        both, top, bottom, neither = (int(word) for word in [word for word in words[start + 1 :] if word.strip()][:4])
        assert both + top + bottom + neither == rows["top"].n
        assert both + top == rows["top"].correct
        assert both + bottom == rows["bottom"].correct


def test_cards_show_the_store_s_pixels(results, report, store):
    page = Page(report.read_text("utf-8"))
    pictures = page.all("img")
    assert [picture["alt"].split(",")[0] for picture in pictures[:4]] == ["original", "attribution", "top", "bottom"]
    assert {(picture["width"], picture["height"]) for picture in pictures} == {("26", "23")}
    lines = [
        line for line in read_csv(report.parent / "report_files" / "images.csv") if line["right_alone"] == "bottom"
    ]
    few = [line["image"] for line in lines[:6]]
    assert len(few) == 6
    with Image.open(report.parent / "report_files" / "images_bottom.png") as written:
        assert written.tobytes() == show_store(store, few, P).tobytes()
    assert sorted(lines, key=lambda line: float(line["visible_bottom"])) == lines


def test_provenance_is_told(results, report):
    assert_told(Page(report.read_text("utf-8")), rows_of(results))


def assert_told(page: Page, rows: list[Row]) -> None:
    """Under the heading of each pair of a model and a store, the table of facts has every field."""
    told = page.text.rpartition("Provenance")[2]
    words = [word for word in told.split("\n") if word.strip()]
    pairs = {row.pairing: row for row in rows}
    for pairing, row in pairs.items():
        start = words.index(f"{row.model} on {row.store}") + 1
        names = [name.replace("_", " ") for name in PAIRING_FIELDS]
        expected = [word for fact in zip(names, map(str, pairing), strict=True) for word in fact]
        assert words[start : start + len(expected)] == expected


# Other results


def test_several_models_and_masks(store, tmp_path):
    """Two models on the same masks, and a second store: a panel for each, and charts for each kind of masks."""
    second = make_store(tmp_path / "second.zarr", N, shard_size=20, model="other", weights_sha256="1" * 64, seed=1)
    every = [shown(store), shown(store, model="guest", weights_sha256="2" * 64), shown(second, model="other")]
    results = write(tmp_path / "results", every)
    written = {path.name for path in make_report(results, tmp_path / "page.html")}
    assert {"accuracy_by_p.csv", "accuracy_by_p_2.csv", "completeness.png"} <= written
    assert not {name for name in written if name.startswith("images_")}
    files = tmp_path / "page_files"
    assert {line["panel"] for line in read_csv(files / "accuracy_by_p.csv")} == {"toy", "guest"}
    assert {line["panel"] for line in read_csv(files / "accuracy_by_p_2.csv")} == {"other"}
    assert {line["panel"] for line in read_csv(files / "visible_by_p.csv")} == {"toy"}  # the same masks
    assert {line["series"] for line in read_csv(files / "completeness.csv")} == {"toy", "other"}
    assert {line["model"] for line in read_csv(files / "images.csv")} == {"toy", "guest", "other"}
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert page.all("img") == []
    assert "--store" in page.text
    assert_told(page, rows_of(results))
    assert len(page.all("details")) == 6
    assert sum("open" in attributes for attributes in page.all("details")) == 2


@pytest.mark.parametrize(
    ("cells", "missing"),
    [
        ([MaskOptions(p=p, keep="top") for p in P], {"at-a-glance", "images"}),
        ([MaskOptions(p=50, keep=keep) for keep in ("top", "bottom")], set()),
    ],
    ids=["one side", "one p, no control"],
)
def test_sections_without_content_are_left_out(store, tmp_path, cells, missing):
    results = write(tmp_path / "results", [shown(store, cells)], cells)
    make_report(results, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    ids = {attributes["id"] for attributes in page.all("section")}
    assert (
        ids
        == {"at-a-glance", "accuracy", "tables", "what-is-visible", "completeness", "classes", "images", "provenance"}
        - missing
    )
    assert "random control" not in page.text
    assert not any("random" in line["series"] for line in read_csv(tmp_path / "report_files" / "accuracy_by_p.csv"))


@pytest.mark.parametrize("error", [0.0, np.inf], ids=["all 0", "all infinite"])
def test_completeness_errors_that_no_logarithm_has(store, tmp_path, error):
    one = shown(store)
    one.completeness_error[:] = error
    make_report(write(tmp_path / "results", [one]), tmp_path / "report.html")
    drawn = {float(line["completeness error"]) for line in read_csv(tmp_path / "report_files" / "completeness.csv")}
    assert drawn == ({0.0} if error == 0 else set())
    assert (tmp_path / "report_files" / "completeness.png").exists()


def test_errors_of_zero_and_infinity_and_varying_steps(store, tmp_path):
    one = shown(store)
    one.completeness_error[:] = np.resize(np.float32([0, np.inf, 0.02, 0.3]), len(one.labels))
    one.steps_spent[:] = np.resize(np.int16([50, 100]), len(one.labels))
    make_report(write(tmp_path / "results", [one]), tmp_path / "report.html")
    drawn = {float(line["completeness error"]) for line in read_csv(tmp_path / "report_files" / "completeness.csv")}
    assert drawn == {float(np.float32(0.02)), float(np.float32(0.3))}
    assert re.search(r"50 \(5\d\.\d%\), 100 \(4\d\.\d%\)", Page((tmp_path / "report.html").read_text("utf-8")).text)


def test_hostile_names_are_only_words(tmp_path):
    names = (HOSTILE, "bee", "cat", "dog", "</style><script>x</script>")
    path = make_store(tmp_path / "toy.zarr", 24, class_names=names, model=HOSTILE, weights="<b>")
    results = write(tmp_path / "results", [shown(path, model=HOSTILE, device="<i>")])
    make_report(results, tmp_path / "report.html", stores=[path])
    html = (tmp_path / "report.html").read_text("utf-8")
    page = Page(html)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.elements}
    assert "http://" not in html.replace("http://example.org/x", "")
    assert all(attributes["src"].startswith("data:") for attributes in page.all("img"))
    assert html.count("<style") == html.count("</style")
    assert HOSTILE in "".join(page.words)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_no_command_of_a_terminal_and_no_tag_gets_into_a_file(tmp_path):
    hostile = f"\x1b[2J\x9b31m\ud800\x07|{HOSTILE}[x](javascript:y)`"
    path = make_store(tmp_path / "toy.zarr", 24, class_names=(hostile, *"abcd"), model=hostile, weights=hostile)
    results = write(tmp_path / "results", [shown(path, model=hostile, device=hostile)])
    make_report(results, tmp_path / "report.html", stores=[path])
    texts = [file for file in tmp_path.rglob("*") if file.suffix in (".csv", ".md", ".html", ".htm")]
    assert {file.suffix for file in texts} == {".csv", ".md", ".html"}
    for file in texts:
        text = file.read_text("utf-8")
        assert cli.printable(text) == text, file
    tables = (results / "tables.md").read_text()
    assert not re.search(r"<\w|(?<!\\)[`\[\]]", tables)
    lines = [line for line in tables.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert columns <= {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("| model")}


# Mistakes


def test_a_folder_without_results(tmp_path):
    with pytest.raises(StoreNotFoundError, match="igstore evaluate STORE --out"):
        make_report(tmp_path, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_results_that_contradict_each_other(results, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / RESULTS).write_bytes((results / RESULTS).read_bytes())
    with pytest.raises(DamagedStoreError, match=r"predictions\.zarr"):
        make_report(broken, tmp_path / "report.html")
    saved = xr.open_zarr(results / PREDICTIONS).load()
    saved.isel(cell=slice(1, None)).to_zarr(broken / PREDICTIONS, zarr_format=3, consolidated=False)
    with pytest.raises(DamagedStoreError, match="run `igstore evaluate` again"):
        make_report(broken, tmp_path / "report.html")


def test_a_store_of_other_results(results, tmp_path):
    other = make_store(tmp_path / "other.zarr", 4, baseline="white")
    with pytest.raises(UserError, match=r"other\.zarr is not the store of these results, which are of toy\.zarr"):
        make_report(results, tmp_path / "report.html", stores=[other])


def test_a_store_without_pixels_takes_them_from_elsewhere(results, store, report, tmp_path):
    bare = make_store(tmp_path / "toy.zarr", N, shard_size=20, failed=[7], pixels=False)
    bare_results = write(tmp_path / "results", [shown(bare)])
    with pytest.raises(UserError, match="images=PATH"):
        make_report(bare_results, tmp_path / "report.html", stores=[bare])
    make_report(bare_results, tmp_path / "report.html", stores=[bare], images=store)
    pictures = [path / "report_files" / "images_top.png" for path in (tmp_path, report.parent)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_page_that_cannot_be_written(results, tmp_path):
    with pytest.raises(UserError, match="must be an HTML file"):
        make_report(results, tmp_path / "report.pdf")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        make_report(results, tmp_path / "folder.html")


def test_without_matplotlib_it_says_what_to_install(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"igstore\[report\]"):
        make_report(results, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_neither_torch_nor_a_window(results, store, tmp_path, report):
    out = tmp_path / "deep" / "report.html"
    code = f"""
import sys
from igstore.report import main
assert main([{str(results)!r}, "--store", {str(store)!r}, "--out", {str(out)!r}]) == 0
sys.exit(",".join({{"torch", "matplotlib.pyplot"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: open it in a browser; 12 figures and tables in {out.parent / 'report_files'}\n"
    assert out.read_bytes() == report.read_bytes()


# What is said of maps that were made elsewhere, and of evaluations that were not written


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of imported maps."""
    imported = {"method": "imported", "n_steps": 0, "maps_by": "captum Saliency", "maps_sha256": "d" * 64}
    return make_store(tmp_path_factory.mktemp("given") / "given.zarr", N, shard_size=20, **imported)


def of_imported(store: Path) -> Shown:
    return shown(store, method="captum Saliency", model="toy")


def test_imported_maps_are_not_called_integrated_gradients(given, tmp_path):
    results = write(tmp_path / "results", [of_imported(given)])
    make_report(results, tmp_path / "report.html", stores=[given])
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "captum Saliency says how much each block" in page.text
    assert "Integrated Gradients" not in page.text
    assert "Imported, and not scored: toy (captum Saliency)" in page.text
    assert "within 5%" not in page.text
    assert "gradient evaluation" not in page.text
    assert not (tmp_path / "report_files" / "completeness.png").exists()


def test_both_kinds_of_maps_beside_each_other(given, store, tmp_path):
    results = write(tmp_path / "results", [of_imported(given), shown(store, model="second")])
    make_report(results, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "captum Saliency and Integrated Gradients say how much each block" in page.text
    assert "Imported, and not scored: toy, given.zarr (captum Saliency)" in page.text
    [effort] = [
        table
        for table in re.findall(r"<table>.*?</table>", (tmp_path / "report.html").read_text(), re.DOTALL)
        if "within 5%" in table
    ]
    assert "toy, toy.zarr" in effort
    assert "given.zarr" not in effort


def test_an_evaluation_in_memory_makes_the_same_page(results, store, report, tmp_path):
    evaluation = Evaluation(measure(shown(store), CELLS), predictions([shown(store)], CELLS))
    make_report(evaluation, tmp_path / "report.html", stores=[store])
    assert (tmp_path / "report.html").read_bytes() == report.read_bytes()
    for wrong in (evaluation.rows, None, 3):
        with pytest.raises(UserError, match=r"results is a .*; it must be what evaluate returned, or the folder"):
            make_report(wrong, tmp_path / "other.html")
