"""Kernels: faster ways to the numbers that `formats.layer.decode` defines, each tested against it exactly."""
