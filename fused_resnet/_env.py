"""The only reader of environment variables. docs/environment.md describes them."""

import os
from dataclasses import dataclass

_FALSE = ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Environment:
    disable: bool  # FUSED_RESNET_DISABLE=1: never load the extension
    verbose: bool  # FUSED_RESNET_VERBOSE=1: say which kernel runs, and why
    max_cpu_isa: str | None  # FUSED_RESNET_MAX_CPU_ISA: "scalar", "avx2", "avx512", "avx512_bf16" or "amx"


def read() -> Environment:
    return Environment(
        disable=_flag("FUSED_RESNET_DISABLE"),
        verbose=_flag("FUSED_RESNET_VERBOSE"),
        max_cpu_isa=os.environ.get("FUSED_RESNET_MAX_CPU_ISA") or None,
    )


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in _FALSE
