"""Checkpoints that are whole or not there: written beside, flushed to disk, then renamed into place."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from fused_resnet.train.errors import CheckpointError

FORMAT = 1
_REQUIRED = ("format", "options", "network", "classes", "preprocess", "model")


def save(state: dict[str, Any], *paths: Path) -> None:
    """Writes `state` once and puts it at each of `paths`, in their order.

    Killed at any instant, each path holds the old checkpoint or the new one; a later path never before an earlier one.
    Raises CheckpointError when the disk is full or may not be written.
    """
    first = paths[0]
    temporary = _beside(first)
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        # What a killed run left may be a second name of a good checkpoint: writing into it would destroy that.
        temporary.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        for path in paths[1:]:
            _duplicate(temporary, _beside(path))
        for path in paths:
            os.replace(_beside(path), path)
        _sync_folder(first.parent)
    except OSError as error:
        raise CheckpointError(f"{first}: the checkpoint cannot be written ({error.strerror or error})") from None


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; runs no code that is in it.

    Raises CheckpointError when the file is missing, damaged, or not one of ours.
    """
    try:
        # torch.load does not look at the checksums of its archive: a flipped bit would become a wrong weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: the checkpoint is corrupt (wrong checksum of {damaged})")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: a folder, not a checkpoint") from None
    except PermissionError:
        raise CheckpointError(f"{path}: may not be read") from None
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        NotImplementedError,
        pickle.UnpicklingError,
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: the checkpoint is corrupt or not a checkpoint ({reason})") from None
    missing = [key for key in _REQUIRED if key not in state] if isinstance(state, dict) else list(_REQUIRED)
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of fused-resnet train ({', '.join(missing)} missing)")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path}: of format {state['format']}, this version reads format {FORMAT}")
    return state


def _duplicate(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        # A second name for the same bytes: nothing is written twice. Checkpoints are only ever replaced, never changed.
        os.link(source, target)
    except OSError:  # file systems without links
        shutil.copyfile(source, target)


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system can (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
