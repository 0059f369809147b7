"""What a bad-input case is. Cases live in ``cases_*.py``; :mod:`tests.bad_input.worker` runs them one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

State = Tensor | nn.Module


@dataclass
class Trial:
    """A call that must fail, and what it must leave as it was."""

    call: Callable[[], object]
    state: dict[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class BadCase:
    name: str
    build: Callable[[], Trial]
    raises: tuple[str, ...]  # names of classes in the exception's ancestry, one of which must be there
    words: tuple[str, ...]  # what the message must contain
    may_succeed: bool = False  # damaged internal data: any result is right as long as nothing crashes
    needs_extension: bool = True


CASES: dict[str, BadCase] = {}


def add(case: BadCase) -> None:
    assert case.name not in CASES, case.name
    CASES[case.name] = case


def load_all() -> dict[str, BadCase]:
    """Every case by name."""
    from tests.bad_input import cases_conv, cases_files, cases_models, cases_norm, cases_raw  # noqa: F401

    return CASES
