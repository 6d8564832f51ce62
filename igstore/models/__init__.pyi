from igstore.models.adapters import adapted as adapted
from igstore.models.classifier import (
    Classifier as Classifier,
    check_preprocessing as check_preprocessing,
    classifier_from_module as classifier_from_module,
    fitted as fitted,
)
from igstore.models.loading import (
    as_shown as as_shown,
    load_classifier as load_classifier,
    recorded_classifier as recorded_classifier,
)
from igstore.models.networks import (
    copied as copied,
    frozen as frozen,
    input_sizes as input_sizes,
    is_plain as is_plain,
    readers as readers,
    replace as replace,
    scores_of as scores_of,
    timm_layers as timm_layers,
)
from igstore.models.normalisation import (
    look_up as look_up,
    normalisation_table as normalisation_table,
    normalise as normalise,
)
from igstore.models.weights import first_line as first_line
