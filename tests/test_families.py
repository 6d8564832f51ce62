"""Maps of one network of each of timm's families, with random weights, against float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_maps import assert_as_exact_as_float32, made_pictures

from igstore.models import Classifier, load_classifier, normalise

pytestmark = pytest.mark.slow

# The smallest of each family that takes any size, and networks that were once found inexact.
OF_ANY_SIZE = """
    convmixer_768_32 convnext_atto cpubone_nano cs3darknet_focus_s cspresnet50 cspnext_tiny davit_tiny densenet121
    dla46x_c dm_nfnet_f0 dpn48b edgenext_xx_small efficientnet_lite0 efficientvit_b0 ese_vovnet19b_dw fasternet_t0
    fastvit_t8 focalnet_tiny_srf gernet_s ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnetv2_small legacy_seresnet18
    legacy_xception lowformer_b0 mambaout_femto mixnet_s mobilenetv3_small_050 mobilevit_xxs nextvit_small nf_resnet26
    poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvgg_a0 repvit_m1 res2next50 resnest14d
    resnet18 resnetblur50 resnetv2_50 rexnet_100 selecsls42b seresnext26t_32x4d skresnet18 starnet_s1 tf_mixnet_s
    tresnet_m vgg11_bn xception41
""".split()
OF_THEIR_SIZE = """
    bat_resnext26ts cait_xxs24_224 coat_tiny convit_tiny crossvit_tiny_240 deit_tiny_patch16_224 efficientformer_l1
    efficientformerv2_s0 efficientvim_m1 efficientvit_m0 gcvit_xxtiny gmlp_ti16_224 halonet_h1 hiera_tiny_224
    levit_128s mvitv2_tiny nest_tiny pit_ti_224 sequencer2d_s shvit_s1 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_cr_tiny_ns_224 test_coatnet tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny
    vit_relpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
    xcit_nano_12_p16_224
""".split()
SMALL = 96  # pixels a side


def error_of_float32(classifier: Classifier, pixels: np.ndarray) -> float:
    """How far plain torch's outputs are from float64's, relative to their size: the largest of some images."""
    x = normalise(torch.from_numpy(pixels), classifier.preprocessing)
    with torch.no_grad():
        exact = copy.deepcopy(classifier.network).double()(x.double())
        found = classifier.network(x)
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*OF_ANY_SIZE, *OF_THEIR_SIZE])
def test_families(name):
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    classifier = load_classifier(f"timm:{name}", "random:0", crop=SMALL if name in OF_ANY_SIZE else None)
    pictures = made_pictures(classifier)
    del pictures["on white"]
    error = error_of_float32(classifier, np.stack(list(pictures.values())))
    if error > 0.05:  # of most of them it is 1e-5
        pytest.skip(f"with random weights {name} amplifies rounding: plain torch's outputs are off by {error:.2f}")
    assert_as_exact_as_float32(classifier, pictures, n_steps=2)
