"""Gradients along straight lines: as exact as float32 on the way forward, in float16 on the way back.

Integrated Gradients evaluate a network at points of a straight line. Neighbouring points hardly differ. A few of them,
the references, are evaluated exactly, and the others as small differences from the lines between references. Only the
differences are rounded to float16 and multiplied on tensor cores.

`tracing` cuts a network into `steps`, which compute on `points`. What they compute is written twice: in torch, in
`reference`, and as Triton kernels, in `kernels` and `launches`. `integral` makes batches of points and sums gradients.
"""
