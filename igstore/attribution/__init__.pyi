from igstore.attribution.attributor import Arrays as Arrays, Attributor as Attributor
from igstore.attribution.baselines import baseline_pixels as baseline_pixels
from igstore.attribution.engine import (
    Attributions as Attributions,
    check_precision as check_precision,
    completeness_error as completeness_error,
    integrated_gradients as integrated_gradients,
    logits as logits,
    numerics as numerics,
    reduce_channels as reduce_channels,
    select_output as select_output,
)
from igstore.attribution.learned_rules import (
    METHOD_CHOICES as METHOD_CHOICES,
    read_rules as read_rules,
    with_rule as with_rule,
    write_rules as write_rules,
)
from igstore.attribution.memory import available_memory as available_memory, gradient_bytes as gradient_bytes
from igstore.attribution.quadrature import METHODS as METHODS, Nodes as Nodes, rule as rule
