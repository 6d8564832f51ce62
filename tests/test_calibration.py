"""Learned quadrature rules: what is fitted, against closed forms; their files; and builds with them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import Linear, Quadratic, Smooth

from igstore import (
    BuildSpec,
    IgstoreError,
    Preprocessing,
    StoreReader,
    UserError,
    build_store,
    integrated_gradients,
    learn_rules,
    load_classifier,
    store_info,
    verify_store,
)
from igstore.attribution import read_rules, rule, write_rules
from igstore.build import main as build
from igstore.calibrate import main as calibrate
from igstore.calibration import dense_points, fit_rule, profile
from igstore.calibration.profiles import path_maps
from igstore.errors import SettingsMismatchError
from igstore.info import describe
from igstore.masks import block_sums, mask_overlaps
from igstore.schema import LearnedRule

N_POINTS = 256
# Of the reference: a midpoint rule of so many points in u misses the integrals below by (1/256)^2 / 24 times their
# second derivative in u at most, which is below 60.
REFERENCE_ERROR = 60 / 24 / N_POINTS**2

FITTED_ON = {
    "model": "toy",
    "model_weights": "own",
    "model_weights_sha256": "0" * 64,
    "baseline": "black",
    "target": "prediction",
    "output": "logit",
    "n_images": 8,
    "images_fingerprint": "f" * 64,
    "iou": 0.75,
    "iou_error": 0.125,
}
MIDDLE = LearnedRule((0.25, 0.75), (0.5, 0.5), **FITTED_ON)
THIRDS = LearnedRule((0.1, 0.4, 0.8), (0.2, 0.3, 0.5), **FITTED_ON)


def random_images(count: int, size: int, seed: int = 0) -> list[tuple[str, np.ndarray, int]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [(f"image{index:02d}", each, index % 3) for index, each in enumerate(pixels)]


# fitting


@pytest.mark.parametrize("degree", range(6))
def test_a_path_along_which_the_maps_are_a_polynomial_is_integrated_exactly(degree):
    terms = torch.randn(degree + 1, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(degree))

    def maps_at(alphas: np.ndarray) -> torch.Tensor:
        powers = torch.as_tensor(alphas)[:, None] ** torch.arange(degree + 1)
        return torch.einsum("pd,dyx->pyx", powers, terms)

    alphas, reference = dense_points(N_POINTS)
    places, weights = fit_rule(profile(maps_at, N_POINTS).gram, reference, degree + 1)
    found = torch.einsum("p,pyx->yx", torch.as_tensor(weights), maps_at(alphas[places]))
    exact = (terms / torch.arange(1, degree + 2)[:, None, None]).sum(dim=0)
    assert (found - exact).abs().max() <= REFERENCE_ERROR * terms.abs().max() * (degree + 1)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n_nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_nodes_are_nearly_the_best_of_all_and_the_weights_are_least_squares(n_nodes, seed):
    """Against every choice of nodes, each with the weights of `numpy.linalg.lstsq`."""
    generator = np.random.default_rng(seed)
    alphas, reference = dense_points(12)
    # smooth in alpha, with some noise; a row of ones is the path without change that every fit has
    maps = np.cos(np.outer(3 * alphas, generator.normal(size=40)) + generator.uniform(0, 6, 40))
    maps += 0.1 * generator.normal(size=maps.shape)
    system = np.column_stack([np.ones(12), maps])

    def error(places: tuple[int, ...]) -> float:
        rows = system[list(places)]
        free = np.linalg.lstsq(rows.T, reference @ system, rcond=None)[0]
        return float(((free @ rows - reference @ system) ** 2).sum())

    places, weights = fit_rule(maps @ maps.T, reference, n_nodes)
    best = min(error(some) for some in itertools.combinations(range(12), n_nodes))
    # exchanging one node at a time may end beside the very best
    assert error(tuple(places)) <= 1.05 * best
    free = np.linalg.lstsq(system[places].T, reference @ system, rcond=None)[0]
    np.testing.assert_allclose(weights, free / free.sum(), rtol=1e-5)
    assert (np.diff(places) > 0).all()


def test_points_with_equal_maps_are_no_obstacle():
    _, reference = dense_points(16)
    for gram in (np.zeros((16, 16)), np.ones((16, 16))):
        places, weights = fit_rule(gram, reference, 5)
        assert len(set(places.tolist())) == 5
        assert np.isfinite(weights).all()


# profiles


@pytest.mark.parametrize("size", [(9, 9), (11, 13)], ids=["whole blocks", "cut blocks"])
def test_a_profile_compares_block_sums_of_what_the_reference_calls_positive(size):
    maps = torch.randn(20, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = profile(lambda _alphas: maps, 20)
    reference = np.tensordot(dense_points(20)[1], maps.numpy(), 1)
    np.testing.assert_allclose(found.reference, reference, rtol=1e-6, atol=1e-7)  # float32
    sums = block_sums(maps.numpy() * (reference > 0), score="signed").reshape(20, -1)
    gram = sums @ sums.T
    weights = dense_points(20)[1]
    np.testing.assert_allclose(found.gram, gram / (weights @ gram @ weights), rtol=1e-12, atol=1e-12)


def test_a_profile_without_positive_attributions_weighs_nothing():
    assert not profile(lambda alphas: -torch.ones(len(alphas), 4, 4), 8).gram.any()


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_maps_along_a_path_add_up_to_integrated_gradients(batch):
    network, x = Smooth(), torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    network.eval()
    start, target = torch.zeros_like(x), torch.tensor([1, 4])
    alphas, weights = rule("quadratic_midpoint", 20)
    expected = integrated_gradients(network, x, start, target, method="quadratic_midpoint", n_steps=20).maps
    for image in range(2):
        select = lambda scores, image=image: scores[:, target[image]]  # noqa: E731
        maps = path_maps(network, start[image], x[image] - start[image], select, batch)(alphas)
        found = torch.einsum("p,pyx->yx", torch.as_tensor(weights, dtype=torch.float32), maps)
        # float32 sums of 60 terms
        torch.testing.assert_close(found, expected[image], rtol=1e-4, atol=1e-6)


def test_overlaps_are_those_of_sets_of_blocks():
    one, other = np.random.default_rng(0).normal(size=(2, 5, 10, 11)).astype(np.float16)
    one[4], other[4] = -1, -1  # nothing positive, so both sets are empty

    def top(map_: np.ndarray) -> set[int]:
        scores = block_sums(map_[None])[0].ravel()
        order, total, chosen = np.argsort(-scores, kind="stable"), 0.0, set()
        for block in order:
            if total < scores.sum() / 2:
                chosen.add(int(block))
            total += scores[block]
        return chosen

    expected = [len(top(a) & top(b)) / len(top(a) | top(b)) for a, b in zip(one[:4], other[:4], strict=True)]
    np.testing.assert_allclose(mask_overlaps(one, other), [*expected, 1.0])


# calibrations


@pytest.mark.parametrize(("network", "n_steps"), [(Linear(size=9), 1), (Quadratic(), 2)], ids=["linear", "quadratic"])
def test_rules_learned_on_a_network_whose_maps_are_known_integrate_it_exactly(network, n_steps, tmp_path):
    images = random_images(10, 9)
    found = learn_rules(network, images, tmp_path / "rules.json", n_steps=[n_steps], n_images=8)
    [learned] = found.rules
    assert learned.iou > 0.99  # by rounding, a block at the edge of a mask may change sides
    x = torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 1, 2])
    maps = integrated_gradients(network, x, torch.zeros_like(x), target, method=learned, n_steps=n_steps).maps
    weight = network.weight[target] if isinstance(network, Linear) else (target + 1)[:, None, None, None] * x
    torch.testing.assert_close(maps, (weight * x).sum(dim=1), rtol=4 * REFERENCE_ERROR, atol=1e-5)


def test_a_calibration_says_what_it_was_made_of_and_judges_rules_on_other_images(tmp_path):
    images = random_images(11, 12)
    network = Smooth().eval()
    path = tmp_path / "rules.json"
    found = learn_rules(
        network, images, path, n_steps=[3, 2, 3], n_images=8, baseline="white", output="probability", target="label"
    )
    assert [len(one.nodes) for one in found.rules] == [2, 3]
    assert read_rules(path) == found.rules
    settings = {"n_steps": 2, "baseline": "white", "output": "probability", "target": "label"}
    spec = build_store(network, images, tmp_path / "store", **settings).settings
    for learned in found.rules:
        assert (learned.model, learned.model_weights) == (spec["model"], spec["weights"])
        assert learned.model_weights_sha256 == spec["weights_sha256"]
        assert learned.images_fingerprint == spec["images_fingerprint"]
        assert (learned.baseline, learned.output, learned.target) == ("white", "probability", "label")
        assert (learned.n_images, learned.iou > 0.5) == (8, True)


def test_each_part_of_the_images_is_masked_with_rules_fitted_to_the_others(tmp_path, monkeypatch):
    import igstore.calibrate

    fitted, tried = [], []

    def fit(gram: np.ndarray, reference: np.ndarray, n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        fitted.append(gram)
        return fit_rule(gram, reference, n_nodes)

    def overlaps(maps: np.ndarray, references: np.ndarray) -> np.ndarray:
        tried.append(references)
        return mask_overlaps(maps, references)

    monkeypatch.setattr(igstore.calibrate, "fit_rule", fit)
    monkeypatch.setattr(igstore.calibrate, "mask_overlaps", overlaps)
    learn_rules(Smooth().eval(), random_images(8, 12), tmp_path / "rules.json", n_steps=[2], n_images=8)
    *folds, whole = fitted
    *parts, everything = tried
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    # a part's own profiles are what the whole has beside the rest: means over 8 images and over 6
    own = [8 * whole - 6 * fold for fold in folds]
    np.testing.assert_allclose(sum(own), 8 * whole, atol=1e-9)
    assert len({part.tobytes() for part in parts}) == 4
    assert {one.tobytes() for part in parts for one in part} == {one.tobytes() for one in everything}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_steps": [200]}, "at most 128"),
        ({"n_steps": [0]}, "at least 1"),
        ({"n_steps": []}, "empty"),
        ({"n_images": 7}, "at least 8"),
        ({"baseline": "grey"}, "baseline"),
        ({"out": "."}, "folder"),
    ],
)
def test_wrong_settings_of_a_calibration_are_refused(tmp_path, monkeypatch, wrong, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        learn_rules(Smooth().eval(), random_images(8, 12), **{"out": "rules.json", **wrong})
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_read_are_left_out_and_too_few_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    from PIL import Image

    for name, pixels, _ in random_images(10, 12):
        Image.fromarray(pixels).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "image03.png").write_bytes(b"no picture")
    network, shown = Smooth().eval(), Preprocessing(crop=12)
    learn = {"n_steps": [2], "preprocessing": shown}
    found = learn_rules(network, tmp_path / "data", tmp_path / "rules.json", n_images=10, **learn)
    assert found.rules[0].n_images == 9
    for index in (5, 6):
        (tmp_path / "data" / f"image{index:02d}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="7 images can be read"):
        learn_rules(network, tmp_path / "data", tmp_path / "rules.json", n_images=10, **learn)


def test_a_network_without_positive_attributions_has_no_masks_to_compare(tmp_path):
    class Falling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x.flatten(1).sum(dim=1, keepdim=True).expand(-1, 3)

    with pytest.raises(UserError, match="no pixel"):
        learn_rules(Falling().eval(), random_images(8, 9), tmp_path / "rules.json", n_steps=[2], n_images=8)


# files


def test_a_file_gives_back_the_rules_that_were_written(tmp_path):
    write_rules(tmp_path / "rules.json", [MIDDLE, THIRDS])
    assert read_rules(tmp_path / "rules.json") == [MIDDLE, THIRDS]


WRONG = {
    "unordered nodes": {"nodes": [0.75, 0.25]},
    "equal nodes": {"nodes": [0.25, 0.25]},
    "a node beyond the image": {"nodes": [0.25, 1.25]},
    "a node before the baseline": {"nodes": [-0.25, 0.25]},
    "no nodes": {"nodes": [], "weights": []},
    "nodes that are no list": {"nodes": 0.5},
    "nodes of another kind": {"nodes": ["0.25", "0.75"]},
    "a weight too many": {"weights": [0.5, 0.25, 0.25]},
    "weights that do not add up to 1": {"weights": [0.5, 0.4]},
    "an infinite weight": {"weights": [float("inf"), 0.5]},
    "a weight that is no number": {"weights": [float("nan"), 0.5]},
    "a model that is no name": {"model": 5},
    "an unknown baseline": {"baseline": "grey"},
    "no images": {"n_images": 0},
    "an overlap above 1": {"iou": 1.5},
    "an overlap that is no number": {"iou": "high"},
    "something more": {"version": 3},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_rule_that_is_none_is_refused_in_a_file_and_in_a_store(tmp_path, wrong):
    document = {**MIDDLE.to_json(), **wrong}
    (tmp_path / "rules.json").write_text(json.dumps({"igstore_learned_rules": [document]}))
    with pytest.raises(UserError, match=r"rules\.json"):
        read_rules(tmp_path / "rules.json")
    attributes = {**learned_spec(MIDDLE).to_attributes(), "learned_rule": document}
    with pytest.raises(SettingsMismatchError, match="not a valid build"):
        BuildSpec.from_attributes(attributes)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"3", b'{"igstore_learned_rules": 3}', b"\xff\xfe", b"[" * 9999]
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "rules.json").write_bytes(content)
    with pytest.raises(UserError, match="calibrate"):
        read_rules(tmp_path / "rules.json")


@pytest.mark.parametrize("name", ["absent.json", "store/absent.json", "."])
def test_a_missing_file_is_said_to_be_missing(tmp_path, name):
    with pytest.raises(UserError, match="calibrate"):
        build_store(Smooth(), random_images(2, 12), tmp_path / "new", method=f"learned:{tmp_path / name}", n_steps=2)
    assert not (tmp_path / "new").exists()


# builds


def learned_spec(learned: LearnedRule, **settings: object) -> BuildSpec:
    plain = Preprocessing(crop=12)
    n_steps = len(learned.nodes)
    return BuildSpec(
        "toy", "own", "0" * 64, plain, "f" * 64, method="learned", n_steps=n_steps, learned_rule=learned, **settings
    )


def test_a_spec_comes_back_from_its_attributes_with_its_rule():
    spec = learned_spec(THIRDS)
    again = BuildSpec.from_attributes(json.loads(json.dumps(spec.to_attributes())))
    assert again == spec
    assert not spec.differences(again)
    assert "learned_rule" not in dataclasses.replace(spec, method="gausslegendre", learned_rule=None).to_attributes()


@pytest.mark.parametrize(
    "wrong",
    [{"method": "gausslegendre"}, {"learned_rule": None}, {"n_steps": 2}, {"max_error": 0.1, "max_steps": 9}],
    ids=str,
)
def test_a_rule_goes_with_its_method_and_its_number_of_steps_alone(wrong):
    with pytest.raises(UserError):
        dataclasses.replace(learned_spec(THIRDS), **wrong)


def test_two_rules_are_called_differently_wherever_a_rule_is_named():
    other = dataclasses.replace(THIRDS, weights=(0.3, 0.3, 0.4))
    assert learned_spec(THIRDS).rule_name != learned_spec(other).rule_name
    assert "learned on toy" in learned_spec(THIRDS).made_by


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store that says nothing of times and machines."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: content for name, content in files.items() if "records" not in name and "zarr.json" not in name}


def test_a_resumed_build_with_rules_from_a_file_is_the_same_byte_for_byte(tmp_path):
    network, images = load_classifier("networks:Smooth", crop=12), random_images(8, 12)
    file = tmp_path / "rules.json"
    found = learn_rules(network, images, file, n_steps=[2, 3], n_images=8)
    settings = {"method": f"learned:{file}", "n_steps": 3, "shard_size": 3, "batch_size": 4}
    build_store(network, images, tmp_path / "whole", **settings)
    build_store(network, images, tmp_path / "resumed", **settings, limit=4)
    build_store(network, images, tmp_path / "resumed", **settings)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    # the rule is in the store, whole, and the file is needed no more
    file.unlink()
    spec = StoreReader(tmp_path / "whole").spec
    assert (spec.method, spec.learned_rule) == ("learned", found.rules[1])
    assert verify_store(tmp_path / "whole", recompute=4, model="networks:Smooth") == []
    assert "learned, 3 steps" in "\n".join(describe(store_info(tmp_path / "whole")))
    # against plain arithmetic
    mean, std = (torch.tensor(each)[:, None, None] for each in (spec.preprocessing.mean, spec.preprocessing.std))
    expected = np.zeros((8, 12, 12))
    store = xr.open_zarr(tmp_path / "whole")
    start, difference = -mean / std, torch.tensor(store["pixels"].values) / 255 / std
    for node, weight in zip(spec.learned_rule.nodes, spec.learned_rule.weights, strict=True):
        points = (start + node * difference).requires_grad_()
        scores = network.network(points)[torch.arange(8), torch.tensor(store["target"].values, dtype=torch.int64)]
        (gradient,) = torch.autograd.grad(scores.sum(), points)
        expected += weight * (gradient * difference).sum(dim=1).numpy()
    maps = store["attribution"].astype("float64") * store["scale"]
    # float16 keeps 11 bits of values up to the largest
    np.testing.assert_allclose(maps, expected, atol=2.0**-11 * np.abs(expected).max())


def test_a_build_is_not_resumed_with_another_rule(tmp_path):
    file, images, network = tmp_path / "rules.json", random_images(4, 12), Smooth().eval()
    settings = {"method": f"learned:{file}", "n_steps": 2}
    write_rules(file, [MIDDLE])
    build_store(network, images, tmp_path / "store", **settings, limit=2)
    write_rules(file, [dataclasses.replace(MIDDLE, weights=(0.25, 0.75))])
    with pytest.raises(SettingsMismatchError, match="learned_rule"):
        build_store(network, images, tmp_path / "store", **settings)


def test_steps_that_the_file_has_no_rule_for_are_refused_with_those_that_it_has(tmp_path):
    write_rules(tmp_path / "rules.json", [MIDDLE, THIRDS])
    with pytest.raises(UserError, match="have 2, 3 nodes"):
        build_store(Smooth(), random_images(2, 12), tmp_path / "new", method=f"learned:{tmp_path / 'rules.json'}")
    with pytest.raises(UserError, match="2 nodes"):
        rule(MIDDLE, 3)


def test_the_commands_hand_the_file_from_one_to_the_other(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name, pixels, _ in random_images(8, 12):
        Image.fromarray(pixels).save(f"data/{name}.png")
    shown = ["--model", "networks:Smooth", "--data", "data", "--crop", "12"]
    assert calibrate([*shown, "--n-steps", "2", "3", "--n-images", "8"]) == 0
    said = capsys.readouterr().out
    assert "learned:networks-Smooth.rules.json" in said
    assert build([*shown, "--method", "learned:networks-Smooth.rules.json", "--n-steps", "3", "--store", "store"]) == 0
    assert StoreReader("store").spec.learned_rule == read_rules("networks-Smooth.rules.json")[1]


def test_no_damage_to_a_stores_rule_raises_anything_but_igstores_own_errors(tmp_path):
    write_rules(tmp_path / "rules.json", [MIDDLE])
    images = random_images(2, 12)
    build_store(Smooth(), images, tmp_path / "store", method=f"learned:{tmp_path / 'rules.json'}", n_steps=2)
    root = json.loads((tmp_path / "store" / "zarr.json").read_text())
    for key, value in itertools.product(
        MIDDLE.to_json(), (None, [], {}, "x", 10**400, [10**400, 1], True, [True, False])
    ):
        root["attributes"]["learned_rule"] = {**MIDDLE.to_json(), key: value}
        (tmp_path / "store" / "zarr.json").write_text(json.dumps(root))
        try:
            describe(store_info(tmp_path / "store"))
        except IgstoreError:
            continue
