"""A graph in one file: whole or not there, checked, and without code. No pickle.

    0   magic, format version, length of the header, length of the file
    32  BLAKE2b of these and of the header
    64  header: canonical JSON (`header.py`); each tensor's name, dtype, shape, place and CRC-32
        sections: a tensor each, in the header's order, from a multiple of 64 on, zeros behind it up to the next

The checksums are against damage, not against forgery; a forged file is harmless because everything in it is checked
(`validate.py`) and the operators that it may name do nothing but compute.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from fused_resnet.inference.graph import Graph
from fused_resnet.inference.header import decode_graph, encode_graph
from fused_resnet.inference.mapped import MappedTensors
from fused_resnet.inference.validate import validate

FORMAT = 1
_MAGIC = b"\x89frn\r\n\x1a\n"  # as in PNG: a transfer as text, or one that loses the eighth bit, breaks it
_PREAMBLE = struct.Struct("<8sQQQ")
_DIGEST_BYTES = 32
_HEADER_AT = _PREAMBLE.size + _DIGEST_BYTES
_ALIGNMENT = 64
_LARGEST_HEADER = 64 << 20
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip

_Path = Union[str, "os.PathLike[str]"]


class InferenceFileError(ValueError):
    """A file is not a network that can be run, or a network cannot be saved; the message names the file."""


def write(path: _Path, graph: Graph, dtype: torch.dtype, metadata: Mapping[str, Any]) -> None:
    """Writes a graph beside `path` and puts it there when it is complete and on the disk.

    Args:
        path: of the file; one that is there is replaced, and whoever has loaded it keeps the old contents.
        graph: what to save.
        dtype: in which it is to be computed; the tensors keep their own.
        metadata: what JSON can hold.
    Raises:
        InferenceFileError: the graph has an operator that files may not hold, or does not make sense.
        TypeError: JSON cannot hold `metadata`.
        OSError: it cannot be written.
    """
    plain = _plain(metadata)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in graph.tensors.items()}
    entries, at = [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values() or tensor.numel() == 0:
            shape = tuple(tensor.shape)
            raise InferenceFileError(f"{path}: cannot hold the tensor {name!r} of {tensor.dtype} and shape {shape}")
        section = _section(tensor)
        entries.append(
            {
                "name": name, "dtype": _name(tensor.dtype), "shape": list(tensor.shape), "offset": at,
                "bytes": tensor.nbytes, "crc32": zlib.crc32(section),
            }
        )  # fmt: skip
        at += len(section)
    try:
        validate(graph)
    except ValueError as error:
        raise InferenceFileError(f"{path}: this network cannot be saved: {error}") from None
    content = {"dtype": _name(dtype), "graph": encode_graph(graph), "metadata": plain, "tensors": entries}
    header = _to_json(content)
    header += b" " * (-(_HEADER_AT + len(header)) % _ALIGNMENT)
    if len(header) > _LARGEST_HEADER:
        raise InferenceFileError(f"{path}: the header would have {len(header)} bytes, at most are {_LARGEST_HEADER}")
    preamble = _PREAMBLE.pack(_MAGIC, FORMAT, len(header), _HEADER_AT + len(header) + at)
    _replace(path, chain([preamble + _digest(preamble, header) + header], map(_section, tensors.values())))


def read(path: _Path) -> tuple[Graph, torch.dtype, dict[str, Any]]:
    """Reads what `write` wrote: the graph, the dtype to compute in, and the metadata.

    The tensors are the file's own pages, brought in at their first use; writing to them changes no file.

    Raises:
        InferenceFileError: it is damaged, cut short, of a later version, not such a file, or not a network.
        OSError: it is missing or cannot be read.
    """
    try:
        return _read(path)
    except InferenceFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise InferenceFileError(f"{path}: not a network that this version can run: {error}") from None


def is_inference_file(path: _Path) -> bool:
    """Whether a file begins as these do; False also where it cannot be read."""
    try:
        with open(path, "rb", opener=_open) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def _read(path: _Path) -> tuple[Graph, torch.dtype, dict[str, Any]]:
    with open(path, "rb", opener=_open) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InferenceFileError(f"{path}: expected a regular file")
        header = _read_header(path, file.read(_HEADER_AT), file, status.st_size)
        begin = file.tell()
        # Private, so that no write reaches the file. Of the size checked: touching a page beyond the end is fatal.
        pages = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_COPY)
    content = json.loads(header, object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(content, dict) or set(content) != {"dtype", "graph", "metadata", "tensors"}:
        raise ValueError("expected dtype, graph, metadata and tensors in the header")
    dtype = _dtype(content["dtype"], "dtype")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected one of floating-point numbers, got {content['dtype']}")
    if not isinstance(content["metadata"], dict):
        raise ValueError(f"metadata: expected an object, got {content['metadata']!r:.100}")
    graph = decode_graph(content["graph"], _tensors(path, content["tensors"], pages, begin))
    validate(graph)
    return graph, dtype, content["metadata"]


def _open(path: str, flags: int) -> int:
    # A pipe would otherwise wait for somebody to write.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_header(path: _Path, start: bytes, file: Any, size: int) -> bytes:
    """The header, once its own checksum and the file's length are as they should be."""
    if start[: len(_MAGIC)] != _MAGIC:
        raise InferenceFileError(f"{path}: not a file of fused_resnet.save_inference")
    if len(start) < _HEADER_AT:
        raise InferenceFileError(f"{path}: cut short, it has {size} bytes")
    _, version, length, total = _PREAMBLE.unpack_from(start)
    if version != FORMAT:
        raise InferenceFileError(f"{path}: of format {version}, this version of fused_resnet reads format {FORMAT}")
    if length > _LARGEST_HEADER or _HEADER_AT + length > total:
        raise InferenceFileError(f"{path}: damaged, it gives its header {length} bytes")
    if total != size:
        raise InferenceFileError(f"{path}: cut short or damaged, it should have {total} bytes and has {size}")
    header: bytes = file.read(length)
    if _digest(start[: _PREAMBLE.size], header) != start[_PREAMBLE.size :]:
        raise InferenceFileError(f"{path}: damaged, the checksum of its header is wrong")
    return header


def _tensors(path: _Path, entries: Any, pages: mmap.mmap, begin: int) -> MappedTensors:
    """The tensors in their sections, which must follow each other without a gap up to the end of the file."""
    if not isinstance(entries, list):
        raise ValueError(f"tensors: expected a list, got {entries!r:.100}")
    tensors = MappedTensors(pages)
    at, end = 0, len(pages) - begin
    with memoryview(pages) as view:
        for index, entry in enumerate(entries):
            fields = ("name", "dtype", "shape", "offset", "bytes", "crc32")
            if not isinstance(entry, dict) or set(entry) != set(fields) or not isinstance(entry["name"], str):
                raise ValueError(f"tensor {index}: expected an object of {', '.join(fields)}")
            name, shape = entry["name"], entry["shape"]
            what = f"tensor {name!r}"
            if name in tensors:
                raise ValueError(f"{what}: expected different names, got it twice")
            dtype = _dtype(entry["dtype"], what)
            if not isinstance(shape, list) or not all(type(n) is int and n >= 1 for n in shape) or len(shape) > 16:
                raise ValueError(f"{what}: expected a shape, got {shape!r:.100}")
            count, length = math.prod(shape), entry["bytes"]
            if type(length) is not int or length != count * dtype.itemsize or length > end - at:
                raise ValueError(
                    f"{what}: expected {count * dtype.itemsize} bytes within the file, got {length!r:.100}"
                )
            if entry["offset"] != at:
                raise ValueError(f"{what}: expected it at {at}, where no other is, got {entry['offset']!r:.100}")
            section = min(at + length + -length % _ALIGNMENT, end)
            with view[begin + at : begin + section] as data:
                if zlib.crc32(data) != entry["crc32"]:
                    raise InferenceFileError(f"{path}: damaged, the checksum of {name!r} is wrong")
            with torch.inference_mode(False):  # whose tensors would not say whether they were written to
                tensors[name] = torch.frombuffer(pages, dtype=dtype, count=count, offset=begin + at).view(shape)
            at = section
    if at != end:
        raise ValueError(f"expected tensors up to its end, got {end - at} bytes behind the last one")
    return tensors


def _section(tensor: Tensor) -> bytes:
    data: bytes = tensor.flatten().view(torch.uint8).numpy().tobytes()
    return data + bytes(-len(data) % _ALIGNMENT)


def _digest(preamble: bytes, header: bytes) -> bytes:
    return hashlib.blake2b(preamble + header, digest_size=_DIGEST_BYTES).digest()


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(_to_json(metadata))
        same = _same_keys(metadata, kept)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"save_inference: expected metadata that JSON can hold: {error}") from None
    if not same:
        raise TypeError("save_inference: expected strings as the keys of metadata")
    return kept


def _same_keys(given: Any, kept: Any) -> bool:
    """JSON would make strings of numbers that are keys."""
    if isinstance(kept, dict):
        return given.keys() == kept.keys() and all(_same_keys(given[key], item) for key, item in kept.items())
    return not isinstance(kept, list) or all(map(_same_keys, given, kept))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: Any, what: str) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{what}: expected a dtype of {', '.join(_DTYPES)}, got {name!r:.100}")
    return _DTYPES[name]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("expected every key of an object once")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"expected finite numbers, got {name}")


def _replace(path: _Path, parts: Iterable[bytes]) -> None:
    target = Path(os.fsdecode(os.path.realpath(path)))
    before = target.stat() if target.exists() else None
    if before is not None and not stat.S_ISREG(before.st_mode):  # a device would be gone for good
        raise OSError(errno.EISDIR if target.is_dir() else errno.EINVAL, "expected a regular file or none", str(path))
    temporary = target.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            if before is not None:
                with suppress(OSError):  # a file system that knows no permissions
                    os.chmod(temporary, stat.S_IMODE(before.st_mode))
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
