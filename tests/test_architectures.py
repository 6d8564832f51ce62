"""The article's four architectures, and the one whose real weights can be had: our maps against captum's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from networks import Smooth

from igstore import Preprocessing, classifier_from_module
from igstore.attribution import Attributor
from igstore.errors import OutOfMemoryError, UserError
from igstore.masks import MaskOptions, block_ranks, block_shares, block_sums, expand, visible_blocks
from igstore.models import load_classifier, normalise
from igstore.schema import BuildSpec

N_STEPS = 4


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of the p=50 masks of two maps (y, x)."""
    masks = []
    for attribution in (one, other):
        scores = block_sums(attribution[None], 3, "positive")
        ranks = block_ranks(scores)
        visible = visible_blocks(ranks, block_shares(scores, ranks), MaskOptions(p=50, keep="top"))
        masks.append(expand(visible, *attribution.shape)[0])
    return float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())


def spec_for(classifier, **settings) -> BuildSpec:
    return BuildSpec(
        model=classifier.name,
        weights=classifier.weights,
        weights_sha256=classifier.weights_sha256,
        preprocessing=classifier.preprocessing,
        images_fingerprint="",
        n_steps=N_STEPS,
        **settings,
    )


def smooth_pixels(shape: tuple[int, int]) -> np.ndarray:
    """A colourful picture without noise, uint8 (1, 3, y, x)."""
    y, x = np.mgrid[: shape[0], : shape[1]] / 40
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y)])
    return np.round(127.5 * (1 + waves)).astype(np.uint8)[None]


@pytest.mark.parametrize("name", ["vgg16", "inception_v3", "resnet50", "densenet121", "efficientnet_lite0"])
def test_maps_are_captums(name, monkeypatch):
    weights = None if name == "efficientnet_lite0" else "random"
    classifier = load_classifier(name, weights)
    pixels = smooth_pixels(classifier.preprocessing.crop)
    x = normalise(torch.from_numpy(pixels), classifier.preprocessing)
    black = normalise(torch.zeros_like(x), classifier.preprocessing)
    with torch.no_grad():
        logits = classifier.network(x)[0]
    target = int(logits.argmax())
    captum = IntegratedGradients(classifier.network).attribute(
        x, black, target=target, n_steps=N_STEPS, method="riemann_right"
    )
    theirs = captum.sum(1)[0].numpy()
    for kernels in ("1", "0"):
        monkeypatch.setenv("IGSTORE_KERNELS", kernels)
        attributor = Attributor(classifier, spec_for(classifier), device=torch.device("cpu"), batch_size=N_STEPS)
        ours = attributor(pixels, np.array([-1], np.int16), ["picture"], [""])
        mine = ours["attribution"][0].astype(np.float32) * ours["scale"][0]
        assert ours["target"][0] == ours["prediction"][0] == target
        assert ours["output"][0] == pytest.approx(float(logits[target]), rel=1e-4)
        # folding and channels last reorder float32 sums, which moves a few activations across a ReLU's kink
        assert np.linalg.norm(mine - theirs) / np.linalg.norm(theirs) < 0.02
        assert mask_iou(mine, theirs) >= 0.99


def test_an_explicit_batch_size_is_kept_and_auto_backs_off(monkeypatch, caplog):
    """A device that runs out of memory above two pairs, as torch reports it."""

    classifier = classifier_from_module(Smooth(), preprocessing=Preprocessing(resize=None, crop=(16, 16)))
    pixels = smooth_pixels((16, 16))
    label = np.array([-1], np.int16)

    def attributor(batch_size: int | None) -> Attributor:
        made = Attributor(classifier, spec_for(classifier), device=torch.device("cpu"), batch_size=batch_size)

        def scarce(module, inputs):
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        made.network.register_forward_pre_hook(scarce)
        return made

    automatic = attributor(None)
    assert automatic.batch_size > 2
    arrays = automatic(pixels, label, ["picture"], [""])
    assert automatic.batch_size == 2
    assert arrays["batch_size"].tolist() == [2]
    assert "out of memory" in caplog.text
    expected = Attributor(classifier, spec_for(classifier), device=torch.device("cpu"), batch_size=2)
    np.testing.assert_array_equal(arrays["attribution"], expected(pixels, label, ["picture"], [""])["attribution"])
    with pytest.raises(OutOfMemoryError, match="batches of 4: give a smaller --batch-size"):
        attributor(4)(pixels, label, ["picture"], [""])


def test_a_label_beyond_the_networks_classes_names_the_image():

    classifier = classifier_from_module(Smooth(5), preprocessing=Preprocessing(resize=None, crop=(16, 16)))
    attributor = Attributor(classifier, spec_for(classifier), device=torch.device("cpu"))
    with pytest.raises(UserError, match="image picture has class index 5, but the network has 5 classes"):
        attributor(smooth_pixels((16, 16)), np.array([5], np.int16), ["picture"], [""])
