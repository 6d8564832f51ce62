from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from igstore.errors import DamagedStoreError, UserError
from igstore.evaluation import Findings, Row, Table, article_tables, kinds, read_rows
from igstore.evaluation.tables import WIDTH, lines, store_names

ROW = Row(
    store="resnet50.zarr",
    store_model="resnet50",
    store_weights="IMAGENET1K_V1",
    store_weights_sha256="a" * 64,
    store_settings_sha256="b" * 64,
    baseline="black",
    target="prediction",
    output="logit",
    method="riemann_right",
    n_steps=50,
    reduce="sum",
    model="resnet50",
    weights="IMAGENET1K_V1",
    weights_sha256="a" * 64,
    device="cpu",
    igstore_version="0",
    torch_version="0",
    p=50.0,
    keep="top",
    select="mass",
    score="positive",
    block=3,
    fill="black",
    order="attribution",
    seed=0,
    n=300,
    correct=3,
    top1=1.0,
    low=0.34,
    high=2.9,
    top5=4.67,
    original_top1=76.15,
    original_low=71.0,
    original_high=80.6,
    original_top5=92.9,
    visible=15.25,
    only_this=2,
    only_opposite=79,
    mcnemar_p=1e-9,
)


def rows(**every: list[Any]) -> list[Row]:
    """`ROW` with each of these values in turn, as a cross product."""
    made = [ROW]
    for name, values in every.items():
        made = [dataclasses.replace(row, **{name: value}) for row in made for value in values]
    return made


def by_number(tables: list[Table]) -> dict[str, Table]:
    return {table.title.split(".")[0]: table for table in tables}


def test_tables_1_2_and_3_of_one_model() -> None:
    made = rows(keep=["top", "bottom"], p=[90.0, 70.0, 50.0, 30.0])
    made[0] = dataclasses.replace(made[0], top1=46.97, low=41.25, high=52.75, top5=60.0, visible=55.84)
    tables = by_number(article_tables(made))
    assert list(tables) == ["Table 1", "Table 2", "Table 3"]
    text = tables["Table 1"].text().splitlines()
    assert text[0] == "Table 1. Top-1 accuracy (%) where the unimportant pixels are masked (keep top), 300 images"
    assert [line.split() for line in text[-5:]] == [
        ["model", "unmasked", "p=90", "p=70", "p=50", "p=30"],
        ["resnet50", "76.2", "47.0", "1.0", "1.0", "1.0"],
        ["95%", "interval", "71.0-80.6", "41.2-52.8", *["0.3-2.9"] * 3],
        ["top-5", "92.9", "60.0", *["4.7"] * 3],
        ["pixels", "visible", "100.0", "55.8", *["15.2"] * 3],
    ]


def test_columns_are_aligned_right_and_names_left() -> None:
    *_, header, first, second, _, _ = article_tables(rows(p=[90.0, 70.0]))[0].text().splitlines()
    assert first.startswith("resnet50")
    assert second.startswith("  95% interval")
    for name, value in (("p=90", "1.0"), ("p=70", "1.0")):
        assert first[: header.index(name) + len(name)].endswith(value)


def test_markdown_says_the_same_as_the_text() -> None:
    table = by_number(article_tables(rows(keep=["top", "bottom"], p=[90.0, 50.0])))["Table 1"]
    _, rule, *lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert rule == "| --- | ---: | ---: | ---: |"
    words = [line.strip("| ").split(" | ") for line in lines]
    assert [" ".join(line).split() for line in words] == [line.split() for line in table.text().splitlines()[-4:]]


@pytest.mark.parametrize(
    ("every_p", "expected"),
    [([90.0, 70.0, 50.0, 30.0], 50), ([90.0, 60.0, 10.0], 60), ([20.0], 20), ([0.0, 50.0], 50)],
    ids=str,
)
def test_table_3_is_at_50_or_in_the_middle(every_p: list[float], expected: int) -> None:
    table = by_number(article_tables(rows(keep=["top", "bottom"], p=every_p)))["Table 3"]
    assert f"at p={expected}," in table.title
    assert table.header[1:3] == (f"top {expected}%", f"bottom {expected}%")


def test_table_3_shows_both_sides_and_the_test_between_them() -> None:
    top, bottom = rows(keep=["top", "bottom"])
    bottom = dataclasses.replace(bottom, top1=26.33, only_this=79, only_opposite=2)
    [(first, _)] = by_number(article_tables([bottom, top]))["Table 3"].groups
    assert first == ("resnet50", "1.0", "26.3", "2", "79", "<0.001")


def test_one_side_alone_has_no_table_3() -> None:
    alone = dataclasses.replace(ROW, only_this=None, only_opposite=None, mcnemar_p=None)
    assert list(by_number(article_tables([alone]))) == ["Table 1"]
    assert list(by_number(article_tables([dataclasses.replace(alone, keep="bottom")]))) == ["Table 2"]


def test_models_under_their_own_masks_share_a_table() -> None:
    other = dataclasses.replace(
        ROW, store="vgg16.zarr", store_model="vgg16", model="vgg16", store_weights_sha256="c", weights_sha256="c"
    )
    [table] = article_tables([ROW, other])
    assert table.note.startswith("Own masks")
    assert [group[0][0] for group in table.groups] == ["resnet50", "vgg16"]


def test_other_settings_are_in_tables_of_their_own() -> None:
    notes = [table.note for table in article_tables(rows(select=["mass", "count"], fill=["black", "mean"]))]
    assert [note.split(";", 1)[1] for note in notes] == [
        f" p by {select}, positive scores of 3x3 blocks; {fill} fill."
        for select in ("mass", "count")
        for fill in ("black", "mean")
    ]


def test_masks_that_are_shown_to_others_are_nobodys_own() -> None:
    other = dataclasses.replace(ROW, model="vgg16", weights_sha256="c")
    [table] = article_tables([ROW, other])
    assert table.note.startswith("Masks of resnet50 (black baseline, prediction as target, 50 steps)")
    assert [group[0][0] for group in table.groups] == ["resnet50", "vgg16"]


@pytest.mark.parametrize(
    ("field", "values", "labels"),
    [
        ("order", ["attribution", "random"], ["resnet50", "resnet50, random order"]),
        ("store", ["a.zarr", "b.zarr"], ["resnet50, a.zarr", "resnet50, b.zarr"]),
        ("weights", ["random:0", "random:1"], ["resnet50, random:0", "resnet50, random:1"]),
        ("seed", [0, 1], ["resnet50, 0", "resnet50, 1"]),
    ],
)
def test_every_line_has_a_name_of_its_own(field: str, values: list[Any], labels: list[str]) -> None:
    table = article_tables(rows(**{field: values}))[0]
    assert [group[0][0] for group in table.groups] == labels


def test_more_images_carry_more_decimals() -> None:
    (table, *_) = article_tables([dataclasses.replace(ROW, n=50_000, top1=0.91)])
    assert table.groups[0][0] == ("resnet50", "76.15", "0.91")
    assert "50000 images" in table.title


def test_the_articles_tables_fit_a_terminal() -> None:
    names = ["vgg16", "inception_v3", "resnet50", "densenet121", "efficientnet_lite0"]
    made = rows(
        model=names, order=["attribution", "random"], keep=["top", "bottom"], p=[90.0, 70.0, 50.0, 30.0], n=[50_000]
    )
    for table in article_tables(made):
        assert max(map(len, table.text().splitlines())) <= WIDTH


# --- Rows are told apart by what they are, whatever they are called

_FEW = {
    "store": ["a.zarr", "b.zarr"],
    "store_model": ["resnet50", "vgg16"],
    "store_weights": ["best.pth", "last.pth"],
    "baseline": ["black", "mean"],
    "target": ["prediction", "label"],
    "output": ["logit", "probability"],
    "method": ["riemann_right", "gausslegendre"],
    "n_steps": [0, 16, 50],
    "reduce": ["sum", "positive"],
    "model": ["resnet50", "vgg16"],
    "weights": ["best.pth", "last.pth"],
    "weights_sha256": [f"{index:08d}" * 8 for index in range(3)],
    "p": [90.0, 50.0],
    "keep": ["top", "bottom"],
    "select": ["mass", "count"],
    "block": [3, 5],
    "fill": ["black", "mean"],
    "order": ["attribution", "random"],
    "seed": [0, 1],
}


def of_settings(row: Row) -> str:
    """What an evaluation would say of settings like these."""
    names = ("store_model", "store_weights", "baseline", "target", "output", "method", "n_steps", "reduce")
    return hashlib.sha256(repr([getattr(row, name) for name in names]).encode()).hexdigest()


@st.composite
def different_rows(draw: st.DrawFn) -> list[Row]:
    """Rows of different identities, of all that may differ, each with an accuracy of its own."""
    chosen = draw(
        st.lists(st.fixed_dictionaries({name: st.sampled_from(few) for name, few in _FEW.items()}), min_size=1)
    )
    seen: dict[Any, Row] = {}
    for number, fields in enumerate(chosen):
        row = dataclasses.replace(ROW, **fields, top1=number / 10, correct=number)
        hidden = draw(st.sampled_from(["", "in a setting that rows do not say"]))
        sha256 = hashlib.sha256((of_settings(row) + hidden).encode()).hexdigest()
        owner = hashlib.sha256(draw(st.sampled_from([b"1", b"2"])) + row.store_weights.encode()).hexdigest()
        model = draw(st.sampled_from([owner, row.weights_sha256]))  # its own masks, or not
        row = dataclasses.replace(row, store_settings_sha256=sha256, store_weights_sha256=owner, weights_sha256=model)
        seen.setdefault(row.identity, row)
    return list(seen.values())


@settings(max_examples=150, deadline=None)
@given(different_rows())
def test_no_row_vanishes(made: list[Row]) -> None:
    cells: list[tuple[str, str, str, str]] = []
    for table in article_tables(made):
        if not table.title.startswith("Table 3"):
            assert len({group[0][0] for group in table.groups}) == len(table.groups)
            for (name, _, *values), *_ in table.groups:
                columns = zip(table.header[2:], values, strict=True)
                cells += [(table.title[:7] + table.note, name, p, value) for p, value in columns if value]
    assert sorted(value for *_, value in cells) == sorted(f"{row.top1:.1f}" for row in made)
    assert len({tuple(where) for *where, _ in cells}) == len(made)
    by_kind = {
        masks: [row for line in lines(rows_of).values() for row in line] for masks, rows_of in kinds(made).items()
    }
    assert sorted(row.top1 for of_kind in by_kind.values() for row in of_kind) == sorted(row.top1 for row in made)
    cases = Findings(made, None).cases  # type: ignore[arg-type]
    in_cases = [row for of_masks in cases.values() for case in of_masks for row in case.rows]
    assert sorted(row.top1 for row in in_cases) == sorted(row.top1 for row in made)
    for of_masks in cases.values():
        assert len({case.label for case in of_masks}) == len(of_masks)
        for case in of_masks:
            sides = [case.side(keep, order) for keep in ("top", "bottom") for order in ("attribution", "random")]
            assert sum(map(len, sides)) == len(case.rows)
    assert {row.store_settings_sha256 for row in store_names(made).values()} == {
        row.store_settings_sha256 for row in made
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output": "probability"}, "probability"),
        ({"method": "gausslegendre"}, "gausslegendre"),
        ({"reduce": "absolute"}, "absolute value of each channel"),
        ({"n_steps": 16}, "16 steps"),
        ({"baseline": "noise"}, "noise baseline"),
        ({"target": "label"}, "label as target"),
        ({"n_steps": 0, "method": "captum Saliency"}, "made by captum Saliency"),
    ],
    ids=str,
)
def test_what_differs_is_in_words(fields: dict[str, Any], said: str) -> None:
    other = dataclasses.replace(ROW, **fields, store_settings_sha256="c" * 64)
    one, two = article_tables([ROW, other])
    assert one.note.startswith("Own masks (black baseline, prediction as target, 50 steps); p by mass")
    assert said in two.note


def test_settings_and_weights_that_have_no_words_are_told_apart_by_their_sha256() -> None:
    stores = [dataclasses.replace(ROW, store_settings_sha256=letter * 64) for letter in "bcd"]
    [table] = article_tables(stores)
    assert [group[0][0] for group in table.groups] == [f"resnet50, settings {letter * 8}" for letter in "bcd"]
    models = [dataclasses.replace(ROW, weights="best.pth", weights_sha256=letter * 64) for letter in "ab"]
    [table] = article_tables(models)
    assert [group[0][0] for group in table.groups] == ["resnet50, aaaaaaaa", "resnet50, bbbbbbbb"]
    shown = [
        dataclasses.replace(ROW, store_weights_sha256=letter * 64, model="vgg16", weights_sha256="f") for letter in "ab"
    ]
    shown[1] = dataclasses.replace(shown[1], store_settings_sha256="c" * 64)
    notes = [table.note.split(" (")[0] for table in article_tables(shown)]
    assert notes == ["Masks of resnet50, aaaaaaaa", "Masks of resnet50, bbbbbbbb"]


def test_two_rows_of_one_identity_are_an_error(tmp_path: Path) -> None:
    twice = [ROW, dataclasses.replace(ROW, top1=2.0)]
    with pytest.raises(UserError, match=r"two rows of resnet50 on resnet50.zarr with keep top, p=50 by mass"):
        article_tables(twice)
    (tmp_path / "results.json").write_text(json.dumps([dataclasses.asdict(row) for row in twice]))
    with pytest.raises(DamagedStoreError, match="holds 2 rows of one store, model and mask"):
        read_rows(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([dataclasses.asdict(ROW)]))
    assert read_rows(str(tmp_path)) == [ROW]
