"""The file of a network: what goes in comes out, and whatever else is in a file ends in one clear error."""

import dataclasses
import hashlib
import json
import os
import pickle
import random
import stat
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.inference import file
from fused_resnet.inference.file import InferenceFileError
from fused_resnet.inference.graph import (
    Act,
    Activation,
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Reference,
    Stock,
)

RELU = Activation("relu")
HEADER_AT = 64


def some_graph(seed: int = 0) -> Graph:
    """Every kind of step, with odd sizes, and every kind of argument."""
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "conv1.weight": floats(7, 3, 3, 3), "conv1.bias": floats(7), "slope": floats(7),
        "conv2.weight": floats(7, 1, 3, 5), "bn.scale": floats(7), "bn.shift": floats(7),
        "pre.scale": floats(7), "pre.shift": floats(7), "fc.weight": floats(5, 14), "fc.bias": floats(5),
        "order": torch.tensor([6, 0, 5, 1, 4, 2, 3]), "half": floats(3, 1, dtype=torch.bfloat16),
        "mask": torch.tensor([True]), "scalar": torch.tensor(2.5),
    }  # fmt: skip
    steps = (
        Conv("conv1", (0,), 1, "conv1.weight", "conv1.bias", (2, 1), (1, 1), act=Activation("prelu", slope="slope")),
        Affine("bn", (1,), 2, "bn.scale", "bn.shift", Activation("leaky_relu", negative_slope=1 / 3)),
        Conv(
            "conv2", (2, 1), 3, "conv2.weight", None, (1, 1), (1, 2), groups=7, act=RELU, scale="pre.scale",
            shift="pre.shift", pre=RELU,
        ),
        Add("add", (3, 2), 4, RELU),
        MaxPool("pool", (4,), 5, (3, 2), (2, 1), (1, 0), (1, 2), True),
        AvgPool("mean", (5,), 6, (2, 2), (1, 1), (1, 1), False, False),
        Act("silu", (6,), 7, Activation("silu")),
        Stock("pick", (7,), 8, "aten.index_select.default", (Reference(7), 1, Reference("order"))),
        Stock("pad", (8,), 9, "aten.constant_pad_nd.default", (Reference(8), (0, 1, 2, 0), float("-inf"))),
        Stock("clip", (9,), 10, "aten.clamp.default", (Reference(9), -1.5), {"max": 1}),
        Stock("cat", (10,), 11, "aten.cat.default", ((Reference(10), Reference(10)), 1)),
        Stock("half", (11,), 12, "aten.split.Tensor", (Reference(11), 7, 1), index=1),
        Stock("type", (12,), 13, "aten.to.dtype", (Reference(12), "torch.float32", False, True, None)),
        Stock("both", (13,), 14, "aten.cat.default", ((Reference(13), Reference(13)), 1)),
        GlobalAvgPool("gap", (14,), 15),
        Flatten("flatten", (15,), 16),
        Linear("fc", (16,), 17, "fc.weight", "fc.bias", Activation("sigmoid")),
    )  # fmt: skip
    return Graph(steps, 0, (17, 14), ("logits", "features"), tensors, 3, (21, 18), 4)


METADATA = {"classes": ["blue", "röd"], "size": 21, "mean": [0.1, 1e-300], "nothing": None, "deep": {"": [True, {}]}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file.write(tmp_path / "a.frn", some_graph(), torch.bfloat16, METADATA)
    return tmp_path / "a.frn"


def assert_equal(graph: Graph, expected: Graph) -> None:
    assert dataclasses.replace(graph, tensors={}) == dataclasses.replace(expected, tensors={})
    assert list(graph.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        got = graph.tensors[name]
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert torch.equal(got, tensor)
        assert got.data_ptr() % 64 == 0


def test_what_goes_in_comes_out(path: Path) -> None:
    graph, dtype, metadata = file.read(path)
    assert_equal(graph, some_graph())
    assert dtype == torch.bfloat16
    assert metadata == METADATA
    assert os.listdir(path.parent) == ["a.frn"]


def test_writing_what_was_read_gives_the_same_file(path: Path) -> None:
    before = path.read_bytes()
    file.write(path, *file.read(path))
    assert path.read_bytes() == before


def test_writing_to_a_loaded_tensor_reaches_neither_the_file_nor_another_load(path: Path) -> None:
    before = path.read_bytes()
    graph, other = file.read(path)[0], file.read(path)[0]
    graph.tensors["fc.bias"].fill_(3)
    assert path.read_bytes() == before
    assert_equal(other, some_graph())


@pytest.mark.parametrize("structure", [None, "tuple", "list", ("x",)])
def test_structures(path: Path, structure: Any) -> None:
    graph = dataclasses.replace(some_graph(), structure=structure, outputs=(17,), extent=None, batch=None)
    file.write(path, graph, torch.float32, {})
    assert_equal(file.read(path)[0], graph)


def refused(path: Path, content: bytes, *words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InferenceFileError) as caught:
        file.read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_cut_short_anywhere(path: Path) -> None:
    whole = path.read_bytes()
    lengths = {*range(200), *range(200, len(whole), 61), *range(len(whole) - 130, len(whole))}
    for length in lengths:
        refused(path, whole[:length])
    refused(path, whole + bytes(64), "should have", "bytes")


def test_one_bit_wrong_anywhere(path: Path) -> None:
    whole = path.read_bytes()
    places = [*range(HEADER_AT), *random.Random(1).sample(range(HEADER_AT, len(whole)), 600), len(whole) - 1]
    for place in places:
        wrong = bytearray(whole)
        wrong[place] ^= 1 << (place % 8)
        refused(path, bytes(wrong))


def test_zeros_instead_of_a_page(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(0, len(whole) - 512, 512):
        refused(path, whole[:place] + bytes(512) + whole[place + 512 :])


def test_other_things(path: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, ("touch " + str(tmp_path / "ran"),)

    refused(path, b"", "not a file of")
    refused(path, b"<html>404</html>" * 20, "not a file of")
    refused(path, pickle.dumps(Bomb()) * 9, "not a file of")
    refused(path, random.Random(2).randbytes(5000), "not a file of")
    torch.save({"fc.weight": torch.zeros(9)}, path)
    refused(path, path.read_bytes(), "not a file of")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        file.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.frn"):
        file.read(tmp_path / "nowhere.frn")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InferenceFileError, match="regular file"):
        file.read(tmp_path / "pipe")


def test_preamble(path: Path) -> None:
    whole = path.read_bytes()

    def with_field(index: int, value: int) -> bytes:
        return whole[: 8 * index] + struct.pack("<Q", value) + whole[8 * index + 8 :]

    refused(path, with_field(1, 2), "format 2", "reads format 1")
    refused(path, with_field(1, 2**64 - 1), "format 18446744073709551615")
    refused(path, with_field(2, 2**63), "header")
    refused(path, with_field(2, 2**30), "header")
    refused(path, with_field(2, 0), "damaged")
    refused(path, with_field(3, 2**63), "should have")
    refused(path, with_field(3, 0), "damaged")


def forged(path: Path, change: Callable[[dict[str, Any]], object], *words: str, sections: bytes | None = None) -> None:
    """A file with valid checksums whose header says something else is refused."""
    whole = path.read_bytes()
    length = struct.unpack_from("<Q", whole, 16)[0]
    header = json.loads(whole[HEADER_AT : HEADER_AT + length])
    rest = whole[HEADER_AT + length :] if sections is None else sections
    change(header)
    refused(path, assembled(json.dumps(header).encode(), rest), *words)
    path.write_bytes(whole)


def assembled(header: bytes, rest: bytes) -> bytes:
    header += b" " * (-len(header) % 64)
    preamble = struct.pack("<8sQQQ", b"\x89frn\r\n\x1a\n", 1, len(header), HEADER_AT + len(header) + len(rest))
    return preamble + hashlib.blake2b(preamble + header, digest_size=32).digest() + header + rest


def put(*keys: Any) -> Callable[[dict[str, Any]], object]:
    """Puts the last of `keys` where the others lead."""

    def change(header: Any) -> None:
        *way, last, value = keys
        for key in way:
            header = header[key]
        header[last] = value

    return change


CONV, BN, ADD, POOL, STOCK, FC = 0, 1, 3, 4, 7, 16

FORGERIES: list[tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = [
    (lambda h: h.pop("graph"), ("expected dtype, graph",)),
    (put("more", 1), ("expected dtype, graph",)),
    (put("dtype", "object"), ("dtype",)),
    (put("dtype", "int64"), ("floating-point",)),
    (put("dtype", ["float32"]), ("dtype",)),
    (put("metadata", []), ("metadata",)),
    # Tensors.
    (put("tensors", {}), ("tensors", "list")),
    (put("tensors", 0, None), ("tensor 0",)),
    (put("tensors", 0, "dtype", "complex64"), ("conv1.weight", "dtype")),
    (put("tensors", 0, "shape", [7, 3, 3, 4]), ("conv1.weight", "1008 bytes")),
    (put("tensors", 0, "shape", [2**40, 2**40, 2**40]), ("conv1.weight", "bytes")),
    (put("tensors", 0, "shape", [-7, -3, 3, 3]), ("conv1.weight", "shape")),
    (put("tensors", 0, "shape", [0, 2**70]), ("conv1.weight", "shape")),
    (put("tensors", 0, "shape", [7.0, 3, 3, 3]), ("conv1.weight", "shape")),
    (put("tensors", 0, "shape", [True, 189]), ("conv1.weight", "shape")),
    (put("tensors", 0, "bytes", -756), ("conv1.weight", "bytes")),
    (put("tensors", 0, "bytes", 2**64 + 756), ("conv1.weight", "bytes")),
    (put("tensors", 1, "offset", 0), ("conv1.bias", "where no other is")),
    (put("tensors", 0, "offset", -64), ("conv1.weight", "where no other is")),
    (put("tensors", 0, "offset", 2**63), ("conv1.weight", "where no other is")),
    (put("tensors", 0, "crc32", "0"), ("checksum of 'conv1.weight'",)),
    (put("tensors", 1, "name", "conv1.weight"), ("conv1.weight", "twice")),
    (lambda h: h["tensors"].pop(), ("behind the last one",)),
    (lambda h: h["tensors"].append(dict(h["tensors"][0], name="again")), ("again", "within the file")),
    # The graph.
    (put("graph", []), ("the graph",)),
    (lambda h: h["graph"].pop("batch"), ("the graph", "batch")),
    (put("graph", "steps", {}), ("steps", "list")),
    (put("graph", "input", "0"), ("input", "whole number")),
    (put("graph", "input", 5), ("value",)),
    (put("graph", "outputs", [99, 14]), ("outputs", "99")),
    (put("graph", "outputs", []), ("outputs",)),
    (put("graph", "outputs", [17]), ("outputs", "2")),
    (put("graph", "structure", "dict"), ("structure",)),
    (put("graph", "structure", None), ("outputs", "1")),
    (put("graph", "structure", ["a", "a"]), ("outputs",)),
    (put("graph", "channels", 0), ("channels",)),
    (put("graph", "channels", 2**63), ("channels", "64 bits")),
    (put("graph", "channels", 4), ("conv1", "weight", "(7, 3, 3, 3)")),
    (put("graph", "extent", [0, 5]), ("extent",)),
    (put("graph", "extent", [5]), ("extent", "list of 2")),
    (put("graph", "batch", -1), ("batch",)),
    # Steps.
    (put("graph", "steps", 0, None), ("step 0", "one of Conv")),
    (put("graph", "steps", CONV, "step", "Exec"), ("step 0", "one of Conv", "Exec")),
    (put("graph", "steps", CONV, "step", ["Conv"]), ("step 0", "one of Conv")),
    (put("graph", "steps", CONV, "__class__", "x"), ("step 0", "object of")),
    (lambda h: h["graph"]["steps"][CONV].pop("weight"), ("step 0", "object of")),
    (put("graph", "steps", CONV, "name", None), ("step 0", "name", "string")),
    (put("graph", "steps", CONV, "output", 0), ("conv1", "output", "no other step writes")),
    (put("graph", "steps", CONV, "inputs", [3]), ("conv1", "written before")),
    (put("graph", "steps", CONV, "inputs", []), ("conv1", "inputs")),
    (put("graph", "steps", CONV, "inputs", [0, 0, 0]), ("conv1", "inputs")),
    (put("graph", "steps", CONV, "inputs", [0, 0]), ("conv1", "inputs", "another like")),
    (put("graph", "steps", CONV, "weight", "nowhere"), ("conv1", "weight", "nowhere")),
    (put("graph", "steps", CONV, "weight", "fc.weight"), ("conv1", "weight", "4 dimensions")),
    (put("graph", "steps", CONV, "weight", "order"), ("conv1", "weight", "floats")),
    (put("graph", "steps", CONV, "bias", "fc.bias"), ("conv1", "bias", "(7, ...)")),
    (put("graph", "steps", CONV, "bias", "order"), ("conv1", "bias", "floats")),
    (put("graph", "steps", CONV, "groups", 0), ("conv1", "groups")),
    (put("graph", "steps", CONV, "groups", 3), ("conv1", "weight", "3 groups")),
    (put("graph", "steps", CONV, "groups", True), ("groups", "whole number")),
    (put("graph", "steps", CONV, "stride", [0, 1]), ("conv1", "stride")),
    (put("graph", "steps", CONV, "stride", [1, 1, 1]), ("stride", "list of 2")),
    (put("graph", "steps", CONV, "padding", [-1, 0]), ("conv1", "padding")),
    (put("graph", "steps", CONV, "padding", [2**62, 0]), ("conv1", "padding")),
    (put("graph", "steps", CONV, "dilation", [1.0, 1]), ("dilation", "whole number")),
    (put("graph", "steps", CONV, "scale", "pre.scale"), ("conv1", "scale and shift")),
    (put("graph", "steps", CONV, "pre", "kind", "relu"), ("conv1", "pre")),
    (put("graph", "steps", CONV, "act", "kind", "explode"), ("conv1", "act", "explode")),
    (put("graph", "steps", CONV, "act", "slope", None), ("conv1", "act", "slope")),
    (put("graph", "steps", CONV, "act", "slope", "fc.bias"), ("conv1", "act.slope", "7 elements")),
    (put("graph", "steps", CONV, "act", "negative_slope", {"float": "nan"}), ("negative_slope", "whole number")),
    (put("graph", "steps", BN, "scale", "fc.bias"), ("bn", "scale")),
    (put("graph", "steps", BN, "shift", "fc.bias"), ("bn", "shift")),
    (put("graph", "steps", ADD, "inputs", [3]), ("add", "inputs")),
    (put("graph", "steps", ADD, "inputs", [3, 0]), ("add", "another like")),
    (put("graph", "steps", POOL, "kernel", [2**40, 1]), ("pool", "kernel")),
    (put("graph", "steps", POOL, "ceil_mode", 1), ("ceil_mode", "true or false")),
    (put("graph", "steps", FC, "weight", "conv1.weight"), ("fc", "weight", "2 dimensions")),
    (put("graph", "steps", FC, "inputs", [1]), ("fc", "weight")),
    # Stock operators.
    *[
        (put("graph", "steps", STOCK, "target", target), ("pick", target, "files may hold"))
        for target in (
            "aten.from_file.default", "aten.as_strided.default", "aten.set_.source_Storage", "aten.empty.memory_format",
            "aten.relu_.default", "aten.random.default", "os.system", "aten.__init__.default",
            "aten.grid_sampler.default", "prim.Print.default", "operator.pow", "aten.index_select", "torch.load",
            "operator.attrgetter",
        )
    ],
    (put("graph", "steps", STOCK, "target", "aten.index_select.out"), ("pick", "changes nothing")),
    (put("graph", "steps", STOCK, "target", "aten.index_select.__init__"), ("pick", "operator")),
    (put("graph", "steps", STOCK, "target", "operator.mul"), ("pick", "numbers")) ,
    (put("graph", "steps", STOCK, "target", "aten.batch_norm.default"), ("pick", "changes nothing")),
    (put("graph", "steps", STOCK, "args", [{"value": 3}]), ("pick", "references to the step's inputs")),
    (put("graph", "steps", STOCK, "args", [{"tensor": "nowhere"}]), ("pick", "nowhere")),
    (put("graph", "steps", STOCK, "args", [{"value": 7, "tensor": "order"}]), ("args", "a value, a tensor")),
    (put("graph", "steps", STOCK, "args", [{"float": "1"}]), ("args",)),
    (put("graph", "steps", STOCK, "args", [10**30]), ("args", "64 bits")),
    (put("graph", "steps", STOCK, "args", ["torch.load"]), ("pick", "torch.load")),
    (put("graph", "steps", STOCK, "kwargs", []), ("kwargs", "an object")),
    (put("graph", "steps", STOCK, "index", -1), ("pick", "index")),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FORGERIES)
def test_forged_headers(path: Path, change: Callable[[dict[str, Any]], object], words: tuple[str, ...]) -> None:
    if "numbers" in words:
        before = change
        change = lambda h: (before(h), put("graph", "steps", STOCK, "args", ["a", 2**40])(h))  # noqa: E731
    forged(path, change, *words)


def test_an_argument_of_many_lists(path: Path) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    forged(path, put("graph", "steps", STOCK, "args", deep), "lists in lists")


def test_headers_that_are_no_json(path: Path) -> None:
    for header, word in {
        b"": "", b"{": "", b"[]": "expected dtype", b"\xff\xfe": "", b'{"a":1,"a":2}': "once", b'{"a":NaN}': "finite",
        b"[" * 100_000: "", b"1" * 10_000: "", b'{"a":' * 50_000: "",
    }.items():  # fmt: skip
        refused(path, assembled(header, b""), word)


def test_no_file_is_larger_than_it_says(path: Path) -> None:
    """Sections that are not zeros behind a tensor are covered by its checksum."""
    whole = path.read_bytes()
    length = struct.unpack_from("<Q", whole, 16)[0]
    sections = bytearray(whole[HEADER_AT + length :])
    sections[756] = 1  # behind conv1.weight
    forged(path, lambda _: None, "checksum of 'conv1.weight'", sections=bytes(sections))
    assert zlib.crc32(sections[:768]) != zlib.crc32(whole[HEADER_AT + length :][:768])


def test_what_cannot_be_saved_leaves_the_old_file(path: Path) -> None:
    before, graph = path.read_bytes(), some_graph()
    stock = graph.steps[STOCK]
    assert isinstance(stock, Stock)
    steps = (
        *graph.steps[:STOCK],
        dataclasses.replace(stock, target="aten.bernoulli.default"),
        *graph.steps[STOCK + 1 :],
    )
    bad = dataclasses.replace(graph, steps=steps)
    with pytest.raises(InferenceFileError, match=r"a\.frn: .*step 7.*aten\.bernoulli\.default"):
        file.write(path, bad, torch.float32, {})
    strange = dataclasses.replace(graph, tensors={**graph.tensors, "z": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(InferenceFileError, match="complex64"):
        file.write(path, strange, torch.float32, {})
    deep: list[Any] = []
    for _ in range(700):
        deep = [deep]
    for metadata in ({"a": deep}, {"a": torch.zeros(1)}, {"a": float("nan")}, {1: 2}, {"a": [{None: 1}]}, {"a": b""}):
        with pytest.raises(TypeError, match="metadata"):
            file.write(path, graph, torch.float32, metadata)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.frn"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file.write(tmp_path / "no" / "a.frn", some_graph(), torch.float32, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        file.write(tmp_path / "folder", some_graph(), torch.float32, {})
    assert os.listdir(tmp_path) == ["folder"]
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "folder").chmod(0o500)
    with pytest.raises(PermissionError):
        file.write(tmp_path / "folder" / "a.frn", some_graph(), torch.float32, {})
    (tmp_path / "folder").chmod(0o700)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="regular file"):
        file.write(tmp_path / "pipe", some_graph(), torch.float32, {})
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_permissions_and_long_names_stay(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 250)
    file.write(os.fsencode(path), some_graph(), torch.float32, {})
    path.chmod(0o600)
    file.write(path, some_graph(1), torch.float32, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert_equal(file.read(path)[0], some_graph(1))


def test_loading_in_inference_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = fr.optimize_for_inference(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())
    fr.save_inference(module, tmp_path / "a.frn")
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        loaded = fr.load_inference(tmp_path / "a.frn", device="cpu:0")
        assert torch.equal(loaded(x), module(x))
    assert torch.equal(loaded(x), module(x))


def test_a_link_stays_a_link(path: Path) -> None:
    link = path.with_name("link.frn")
    link.symlink_to(path.name)
    file.write(link, some_graph(1), torch.float32, {})
    assert link.is_symlink()
    assert_equal(file.read(path)[0], some_graph(1))


def test_readers_see_the_old_file_or_the_new_one(path: Path) -> None:
    held = file.read(path)[0]
    stop, failures = threading.Event(), []

    def write() -> None:
        for seed in range(40):
            file.write(path, some_graph(seed % 2), torch.float32, {"seed": seed % 2})
        stop.set()

    file.write(path, some_graph(0), torch.float32, {"seed": 0})
    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        graph, _, metadata = file.read(path)
        if not torch.equal(graph.tensors["fc.weight"], some_graph(metadata["seed"]).tensors["fc.weight"]):
            failures.append(metadata)
    writer.join()
    assert not failures
    assert_equal(held, some_graph(0))
    assert os.listdir(path.parent) == ["a.frn"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [fr.models.cifar.resnet20, fr.models.preact.preresnet18, fr.models.resnext50_32x4d])
def test_a_saved_network_answers_the_same(tmp_path: Path, build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    module = fr.optimize_for_inference(build().eval(), dtype=dtype)
    fr.save_inference(module, tmp_path / "net.frn", metadata={"classes": ["a"]})
    loaded = fr.load_inference(tmp_path / "net.frn")
    assert loaded.metadata == {"classes": ["a"]}
    assert loaded.dtype == dtype
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), module(x))


def resident_kilobytes(path: Path) -> int:
    """Of all mappings of a file in this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            found += int(line.split()[1])
    return found


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux to tell what is in memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_not_in_memory_twice(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.frn"
    fr.save_inference(fr.optimize_for_inference(fr.models.resnet18().eval(), dtype=dtype), path)
    whole = path.stat().st_size // 1024
    loaded = fr.load_inference(path)
    assert resident_kilobytes(path) >= 0.9 * whole  # its checksums were compared
    x = torch.randn(1, 3, 64, 64)
    y = loaded(x)
    assert resident_kilobytes(path) <= 0.1 * whole
    other = loaded(torch.randn(2, 3, 96, 64))  # packs some weights in another way
    assert other.isfinite().all()
    assert torch.equal(loaded(x), y)
    assert resident_kilobytes(path) <= 0.2 * whole


@pytest.mark.usefixtures("needs_extension")
def test_what_was_written_to_a_loaded_tensor_holds(tmp_path: Path) -> None:
    path = tmp_path / "model.frn"
    fr.save_inference(fr.optimize_for_inference(fr.models.cifar.resnet20().eval()), path)
    x = torch.randn(2, 3, 32, 32)
    before, loaded = fr.load_inference(path)(x), fr.load_inference(path)
    loaded.graph.tensors["fc.bias"].add_(100)
    for _ in range(2):
        torch.testing.assert_close(loaded(x), before + 100)
    assert loaded.graph.tensors["fc.bias"].mean() > 50
