GROUP: int

def convolve(
    inputs: int,
    filters: int,
    bias: int,
    outputs: int,
    images: int,
    height: int,
    width: int,
    channels: int,
    out_channels: int,
    taps_y: int,
    taps_x: int,
    padding_y: int,
    padding_x: int,
    threads: int,
    /,
) -> None: ...
