"""The fixtures of tests/nn, for whole models."""

from tests.nn.conftest import calls, fused

__all__ = ["calls", "fused"]
