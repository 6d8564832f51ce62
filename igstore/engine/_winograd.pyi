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
    padding: int,
    threads: int,
    /,
) -> None: ...
