"""Inference of trained networks as a fixed list of fused steps: see `docs/inference.md`."""
