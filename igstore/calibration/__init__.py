"""Fitting quadrature rules to a network's gradients: `igstore calibrate`."""
