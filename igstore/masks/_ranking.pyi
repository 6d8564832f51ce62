from typing import Any

import numpy as np
from numpy.typing import NDArray

def rank(
    maps: NDArray[np.uint16],
    scores: NDArray[np.int32],
    ranks: NDArray[np.unsignedinteger[Any]],
    shares: NDArray[np.float32],
    height: int,
    width: int,
    block: int,
    /,
) -> bool: ...
