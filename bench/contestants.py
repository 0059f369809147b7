"""The ways to run a network that bench/inference.py compares. Each writes the network to a file in its own format and
is loaded from that file, so what is timed is what a server would run.

A contestant's call takes no arguments and returns the logits of the setting's images. It gets the images in the form
that it likes best, before anything is timed: channels_last and in the dtype it computes in for PyTorch and for ours,
float32 NCHW for OpenVINO and ONNX Runtime, without a copy in the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import DTYPES
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing

Call = Callable[[], Tensor]

DISTINCT = 4  # images; a batch repeats them, so each is compared with the exact answer at little cost


@dataclass(frozen=True)
class Setting:
    """One network in one situation."""

    model: str
    batch: int
    size: int
    dtype: str
    threads: int

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch} {self.size}x{self.size} {self.dtype}"


@dataclass(frozen=True)
class Contestant:
    """
    Attributes:
        save: writes a network, which it may change, to a new file in a folder and returns the file.
        load: reads the file and returns the call.
        modules: what must be importable.
        settings: what was chosen for it, for the results.
        no_bf16: why it cannot compute in bfloat16; None: it can.
    """

    save: Callable[[nn.Module, Setting, Path], Path]
    load: Callable[[Path, Setting, Tensor], Call]
    modules: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    no_bf16: str | None = None

    def why_missing(self, dtype: str) -> str | None:
        """Why it cannot take part; None: it can."""
        for name in self.modules:
            try:
                importlib.import_module(name)
            except ImportError as error:
                return f"{name} cannot be imported: {error}"
        return self.no_bf16 if dtype == "bf16" else None


def images(setting: Setting) -> Tensor:
    """Standard normal images, the same for every process; float32, NCHW."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(DISTINCT, 3, setting.size, setting.size, generator=generator)
    return few[torch.arange(setting.batch) % DISTINCT].contiguous()


def network(name: str) -> nn.Module:
    """A network in eval mode, the same for every process, as `testing.with_statistics` leaves it."""
    torch.manual_seed(0)
    return testing.with_statistics(getattr(fr.models, name)())


def _save_state(model: nn.Module, setting: Setting, folder: Path) -> Path:
    path = folder / f"{setting.model}.pt"
    torch.save(model.state_dict(), path)
    return path


def _eager_model(path: Path, setting: Setting) -> nn.Module:
    with torch.device("meta"):  # random weights would be made to be thrown away
        model: nn.Module = getattr(fr.models, setting.model)()
    model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
    return model.eval().to(DTYPES[setting.dtype], memory_format=torch.channels_last)


def _channels_last(x: Tensor, setting: Setting) -> Tensor:
    return x.to(DTYPES[setting.dtype], memory_format=torch.channels_last)


def _load_eager(path: Path, setting: Setting, x: Tensor) -> Call:
    model, x = _eager_model(path, setting), _channels_last(x, setting)

    def call() -> Tensor:
        with fr.nn.stock(), torch.inference_mode():
            return model(x)  # type: ignore[no-any-return]

    return call


def _load_inductor(path: Path, setting: Setting, x: Tensor) -> Call:
    import torch._inductor.config

    torch._dynamo.reset()  # a compiled function of an earlier setting counts towards the limit of recompilations
    torch._inductor.config.freezing = True
    # A second shape in one process would otherwise get code for any shape, which is slower.
    model = torch.compile(_eager_model(path, setting), fullgraph=True, dynamic=False)
    x = _channels_last(x, setting)

    def call() -> Tensor:
        with fr.nn.stock(), torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    return call


def _save_ours(model: nn.Module, setting: Setting, folder: Path) -> Path:
    path = folder / f"{setting.model}-{setting.dtype}.frn"
    fr.save_inference(fr.optimize_for_inference(model, dtype=DTYPES[setting.dtype]), path)
    return path


def _load_ours(path: Path, setting: Setting, x: Tensor) -> Call:
    model, x = fr.load_inference(path), _channels_last(x, setting)
    return lambda: model(x)


def _save_openvino(model: nn.Module, setting: Setting, folder: Path) -> Path:
    import openvino

    path, shape = folder / f"{setting.model}-{setting.batch}-{setting.size}.xml", tuple(images(setting).shape)
    with fr.nn.stock(), torch.no_grad():
        converted = openvino.convert_model(model, example_input=images(setting), input=[shape])
    openvino.save_model(converted, path, compress_to_fp16=False)
    return path


_OPENVINO = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}


def _load_openvino(path: Path, setting: Setting, x: Tensor) -> Call:
    import openvino

    how = {
        **_OPENVINO,
        "INFERENCE_NUM_THREADS": setting.threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[setting.dtype],
    }
    compiled = openvino.Core().compile_model(path, "CPU", how)
    request = compiled.create_infer_request()
    shared = x.numpy()  # the request does not keep it alive, the call does
    request.set_input_tensor(openvino.Tensor(shared, shared_memory=True))

    def call(_kept: object = shared) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def _save_onnx(model: nn.Module, setting: Setting, folder: Path) -> Path:
    path = folder / f"{setting.model}-{setting.batch}-{setting.size}.onnx"
    with fr.nn.stock(), torch.no_grad():
        torch.onnx.export(model, (images(setting),), path, dynamo=False)
    return path


# Spinning inside a run stays as it is by default; its threads must not go on spinning in another contestant's turn.
_ONNX_RUNTIME = {"session.force_spinning_stop": "1"}


def _load_onnx_runtime(path: Path, setting: Setting, x: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for key, value in _ONNX_RUNTIME.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


CONTESTANTS = {
    "ours": Contestant(_save_ours, _load_ours),
    "eager": Contestant(_save_state, _load_eager, settings={"layout": "channels_last", "mode": "inference_mode"}),
    "inductor": Contestant(
        _save_state, _load_inductor, settings={"layout": "channels_last", "freezing": True, "dynamic": False}
    ),
    "openvino": Contestant(_save_openvino, _load_openvino, ("openvino",), _OPENVINO),
    "onnxruntime": Contestant(
        _save_onnx,
        _load_onnx_runtime,
        ("onnx", "onnxruntime"),
        {"graph_optimization_level": "ORT_ENABLE_ALL", **_ONNX_RUNTIME},
        no_bf16="its CPU convolution has no bfloat16",
    ),
}
