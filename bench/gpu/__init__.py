"""Benchmarks for a machine with an NVIDIA GPU; bench/gpu.sh runs them all."""
