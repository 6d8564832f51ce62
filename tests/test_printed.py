"""What `print` and a notebook show of what igstore returns: it says what matters, and fits on a screen."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from stores import make_store
from torch import nn

import igstore
from igstore.images import as_image_list
from igstore.schema import Preprocessing

LINES, COLUMNS = 40, 120  # of an ordinary terminal


class Brightest(nn.Module):
    """The class is where an image is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, (1, 5)).mean(dim=1).flatten(1)


def network(name: str) -> igstore.Classifier:
    return igstore.classifier_from_module(Brightest().eval(), preprocessing=Preprocessing(crop=(23, 26)), name=name)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("printed") / "toy.zarr", 30, failed=range(8, 24))


@pytest.fixture(scope="module")
def found(store):
    return igstore.evaluate(store, models=[network("first"), network("second")], p=[90, 50])


def test_everything_fits_on_a_screen(store, found):
    deep = nn.Sequential(nn.Flatten(), *(nn.Linear(12, 12) for _ in range(100)))
    printed = [
        found,
        igstore.evaluate(store, models=network("x"), fill=["black", "mean", "blur", "noise"], select=["mass", "count"]),
        igstore.store_info(store),
        igstore.StoreReader(store),
        igstore.MaskedImageNet(store),
        igstore.MaskedBatches(store, [igstore.MaskOptions(p=50)]),
        igstore.classifier_from_module(deep, preprocessing=Preprocessing(crop=(2, 2)), name="deep"),
        as_image_list([(f"image_{index}", torch.zeros(2, 2, 3).byte().numpy(), 0) for index in range(300)]),
    ]
    for one in printed:
        lines = str(one).splitlines()
        assert len(lines) <= LINES
        assert max(map(len, lines)) <= COLUMNS
        assert str(one) == repr(one)  # a notebook shows the latter


def test_an_evaluation_shows_every_accuracy(found):
    printed = {}
    for line in str(found).splitlines():
        if match := re.fullmatch(r"(\S.*?)  +(top|bottom) +(\S+) +(\S+) +(\S+)", line):
            label, keep, *values = match.groups()
            printed[label, keep] = values
    for model, order, keep in itertools.product(("first", "second"), ("attribution", "random"), ("top", "bottom")):
        rows = [row for row in found.rows if (row.model, row.order, row.keep) == (model, order, keep)]
        by_p = {row.p: f"{row.top1:.1f}" for row in rows}
        label = model if order == "attribution" else f"{model}, random order"
        assert printed.pop((label, keep)) == [f"{rows[0].original_top1:.1f}", by_p[90], by_p[50]]
    assert not printed


def test_an_evaluation_says_how_much_it_leaves_out(store):
    many = igstore.evaluate(store, models=[network(f"m{index}") for index in range(10)], p=50)
    listed = [line for line in str(many).splitlines() if re.match(r"m\d", line)]
    (left_out,) = re.findall(r"(\d+) more\s+lines are left out", str(many))
    assert len(listed) + int(left_out) == 40


def test_a_notebook_shows_an_evaluation_as_a_table(found):
    table = found._repr_markdown_()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8
    assert len({row.count("|") for row in rows}) == 1


def test_a_store_is_described_as_the_command_describes_it(store, capsys):
    from igstore.info import main

    main([str(store)])
    assert f"{igstore.store_info(store)}\n" == capsys.readouterr().out


def test_a_classifier_says_what_it_is_and_what_it_wants(tmp_path):
    printed = str(igstore.load_classifier("squeezenet1_1", "random:0"))
    for words in ("squeezenet1_1", "SqueezeNet, 1,235,496 parameters", "random:0", "crop 224x224", "0.485, 0.456"):
        assert words in printed


def test_names_from_elsewhere_give_the_terminal_no_commands(tmp_path):
    store = make_store(tmp_path / "toy.zarr", 4, model="evil\x1b[2J")
    assert "\x1b" not in f"{igstore.store_info(store)}{igstore.StoreReader(store)}{igstore.MaskedImageNet(store)}"
