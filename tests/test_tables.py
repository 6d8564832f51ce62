from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from igstore.reporting.results import Row
from igstore.reporting.tables import WIDTH, Table, article_tables

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
