"""Every reason for the stock path: it is given, no fused operator runs, and the result is the stock one."""

import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from fused_resnet import _extension
from fused_resnet.nn import guard

Prepare = Callable[[Any], object]


def nothing(*_: object) -> None:
    """A hook."""


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Subclass(Tensor):
    """A tensor of another type."""


class MyConv(nn.Conv2d):
    """A convolution that somebody may have changed."""


class MyNorm(nn.BatchNorm2d):
    """A batch norm that somebody may have changed."""


class MyReLU(nn.ReLU):
    """A relu that somebody may have changed."""


def subclass_parameter(child: nn.Module, name: str) -> None:
    child._parameters[name] = nn.Parameter(child.get_parameter(name).detach().as_subclass(Subclass))


def compute(child: nn.Module, name: str) -> None:
    """What weight_norm and FSDP do: the parameter becomes a plain attribute."""
    value = child._parameters.pop(name)
    assert value is not None
    child.__dict__[name] = value.detach()


def own_forward(child: nn.Module) -> None:
    child.__dict__["forward"] = child.forward


def pad(child: nn.Module, *, mode: Any = "zeros", padding: str | tuple[int, int] = (1, 1)) -> nn.Module:
    assert isinstance(child, nn.Conv2d)
    twin = nn.Conv2d(child.in_channels, child.out_channels, 3, padding=padding, bias=False, padding_mode=mode)
    twin.load_state_dict(child.state_dict())
    return twin


def replace(block: fr.nn.BasicBlock, name: str, child: nn.Module | None) -> None:
    if child is not None and name != "relu":
        child.load_state_dict(block.get_submodule(name).state_dict(), strict=False)
    setattr(block, name, child)


CHILDREN: dict[str, tuple[Prepare, str]] = {
    "conv replaced": (lambda b: replace(b, "conv1", MyConv(8, 8, 3, padding=1, bias=False)), "conv1 is MyConv"),
    "last conv replaced": (lambda b: replace(b, "conv2", MyConv(8, 8, 3, padding=1, bias=False)), "conv2 is MyConv"),
    "conv parametrised": (
        lambda b: parametrize.register_parametrization(b.conv1, "weight", Doubled()),
        "conv1 is ParametrizedConv2d",
    ),
    "conv pruned": (lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5), "conv1 has a weight"),
    "conv weight computed": (lambda b: compute(b.conv2, "weight"), "conv2 has a weight"),
    "conv weight subclass": (lambda b: subclass_parameter(b.conv1, "weight"), "conv1 has a weight"),
    "conv padding mode": (lambda b: setattr(b, "conv1", pad(b.conv1, mode="reflect")), "mode 'reflect'"),
    "conv padding name": (lambda b: setattr(b, "conv1", pad(b.conv1, padding="same")), "padding 'same'"),
    "conv own _conv_forward": (
        lambda b: setattr(b.conv1, "_conv_forward", lambda x, *_: 2 * x),
        "conv1 has a _conv_forward of its own",
    ),
    "norm replaced": (lambda b: replace(b, "bn1", MyNorm(8)), "bn1 is MyNorm"),
    "last norm replaced": (lambda b: replace(b, "bn2", nn.GroupNorm(2, 8)), "bn2 is GroupNorm"),
    "norm parametrised": (
        lambda b: parametrize.register_parametrization(b.bn1, "weight", Doubled()),
        "bn1 is ParametrizedBatchNorm2d",
    ),
    "norm pruned": (lambda b: prune.l1_unstructured(b.bn1, "weight", 0.5), "bn1 has a parameter"),
    "norm bias computed": (lambda b: compute(b.bn2, "bias"), "bn2 has a parameter"),
    "norm weight subclass": (lambda b: subclass_parameter(b.bn1, "weight"), "bn1 has a parameter"),
    "norm bias subclass": (lambda b: subclass_parameter(b.bn1, "bias"), "bn1 has a parameter"),
    "norm mean subclass": (
        lambda b: b.bn1._buffers.update(running_mean=torch.zeros(8).as_subclass(Subclass)),
        "bn1 has a parameter or statistic",
    ),
    "norm variance subclass": (
        lambda b: b.bn1._buffers.update(running_var=torch.ones(8).as_subclass(Subclass)),
        "bn1 has a parameter or statistic",
    ),
    "norm counter subclass": (
        lambda b: b.bn1._buffers.update(num_batches_tracked=torch.tensor(0).as_subclass(Subclass)),
        "bn1 has a parameter or statistic",
    ),
    "norm eps": (lambda b: setattr(b.bn1, "eps", 0.0), "bn1 has eps 0.0"),
    "relu replaced": (lambda b: replace(b, "relu", MyReLU()), "relu is MyReLU"),
}
for child in ("conv1", "conv2", "bn1", "bn2", "relu"):
    for kind, why in (("forward", "forward"), ("forward_pre", "forward"), ("full_backward", "backward")):
        CHILDREN[f"{child} {kind} hook"] = (
            lambda b, child=child, kind=kind: getattr(b.get_submodule(child), f"register_{kind}_hook")(nothing),
            f"{child} has a {why} hook",
        )
    CHILDREN[f"{child} full_backward_pre hook"] = (
        lambda b, child=child: b.get_submodule(child).register_full_backward_pre_hook(nothing),
        f"{child} has a backward hook",
    )
    CHILDREN[f"{child} own forward"] = (
        lambda b, child=child: own_forward(b.get_submodule(child)),
        f"{child} has a forward of its own",
    )
    CHILDREN[f"{child} compiled"] = (
        lambda b, child=child: b.get_submodule(child).compile(backend="eager"),
        f"{child} has a forward of its own",
    )


@pytest.fixture
def block(fused: None) -> fr.nn.BasicBlock:
    return fr.nn.BasicBlock(8, 8)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 5, 5)


def test_no_reason(block: fr.nn.BasicBlock, x: Tensor, calls: Counter[str]) -> None:
    assert guard.why_stock(block) is None
    assert guard.why_stock(block, x) is None
    block(x)
    assert calls == {"conv2d": 1, "batch_norm_act_conv": 1, "batch_norm_act": 1}


@pytest.mark.parametrize("case", CHILDREN)
def test_children(case: str, block: fr.nn.BasicBlock, x: Tensor, calls: Counter[str]) -> None:
    prepare, why = CHILDREN[case]
    prepare(block)
    reason = guard.why_stock(block, x)
    assert reason is not None
    assert why in reason
    block.eval()
    with torch.no_grad():  # a backward hook before an in-place relu is an error of torch's own, in the stock path too
        with fr.nn.stock():
            want = block(x)
        assert torch.equal(block(x), want)
    assert not calls


def test_a_missing_child(block: fr.nn.BasicBlock, x: Tensor) -> None:
    setattr(block, "bn1", None)  # noqa: B010
    assert guard.why_stock(block, x) == "bn1 is missing, not BatchNorm2d"


class GlobalHook(AbstractContextManager[None]):
    """A hook on every module."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        self.handle = getattr(module_hooks, f"register_module_{self.kind}_hook")(nothing)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class DispatchMode(TorchDispatchMode):
    """Sees every operator and changes none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    """Sees every function and changes none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@contextmanager
def patched(cls: type[nn.Module], name: str) -> Iterator[None]:
    """A class of torch.nn that somebody has given another method."""
    own = getattr(cls, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, name, lambda *args: own(*args))
        yield


AROUND: dict[str, tuple[Callable[[], AbstractContextManager[object]], str]] = {
    "stock": (fr.nn.stock, "stock() is in force"),
    "global forward hook": (lambda: GlobalHook("forward"), "global module hook"),
    "global forward pre-hook": (lambda: GlobalHook("forward_pre"), "global module hook"),
    "global backward hook": (lambda: GlobalHook("full_backward"), "global module hook"),
    "global backward pre-hook": (lambda: GlobalHook("full_backward_pre"), "global module hook"),
    "forward-mode AD": (forward_ad.dual_level, "forward-mode AD"),
    "dispatch mode": (DispatchMode, "TorchDispatchMode"),
    "function mode": (FunctionMode, "TorchFunctionMode"),
    "patched convolution": (lambda: patched(nn.Conv2d, "forward"), "another forward"),
    "patched inner convolution": (lambda: patched(nn.Conv2d, "_conv_forward"), "another forward"),
    "patched batch norm": (lambda: patched(nn.BatchNorm2d, "forward"), "another forward"),
    "patched relu": (lambda: patched(nn.ReLU, "forward"), "another forward"),
}


@pytest.mark.parametrize("case", AROUND)
def test_surroundings(case: str, block: fr.nn.BasicBlock, x: Tensor, calls: Counter[str]) -> None:
    around, why = AROUND[case]
    with around(), torch.no_grad():
        reason = guard.why_stock(block, x)
        block(x)
    assert reason is not None
    assert why in reason
    assert not calls
    assert guard.why_stock(block, x) is None, "the reason outlived its cause"


def test_a_default_device_is_no_reason(block: fr.nn.BasicBlock, x: Tensor) -> None:
    with torch.device("cpu"):
        assert guard.why_stock(block, x) is None


def test_unavailable(block: fr.nn.BasicBlock, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_UNAVAILABLE", "there is no extension")
    assert guard.why_stock(block, x) == "there is no extension"


def test_flop_counter_sees_every_convolution(block: fr.nn.BasicBlock, x: Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() == 2 * 2 * (8 * 8 * 9) * 25 * 2


INPUTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "subclass": (lambda x: x.as_subclass(Subclass), "is a Subclass"),
    "proxy": (lambda _: torch.fx.Proxy(torch.fx.Graph().placeholder("x")), "is a Proxy"),
    "meta": (lambda x: x.to("meta"), "no kernel for device meta"),
    "integer": (lambda x: x.to(torch.int32), "no kernel for torch.int32"),
    "complex": (lambda x: x.to(torch.complex64), "no kernel for torch.complex64"),
    "one image": (lambda x: x[0], "not a dense (N, C, H, W) tensor"),
    "sparse": (lambda x: x.to_sparse(), "not a dense (N, C, H, W) tensor"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case: str, block: fr.nn.BasicBlock, x: Tensor) -> None:
    change, why = INPUTS[case]
    reason = guard.why_stock(block, change(x))  # type: ignore[arg-type]
    assert reason is not None
    assert why in reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_with_kernels(dtype: torch.dtype, block: fr.nn.BasicBlock, x: Tensor) -> None:
    assert guard.why_stock(block, x.to(dtype)) is None


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Tensor]:
    """Tensors that say they are on a GPU, where there is none."""
    monkeypatch.setattr(guard, "_PLAIN_TENSORS", (*guard._PLAIN_TENSORS, FakeTensor))
    monkeypatch.setattr(guard, "_cuda_refusal_said", False)

    def make(index: int) -> Tensor:
        with FakeTensorMode():
            return torch.empty(2, 8, 5, 5, device=f"cuda:{index}")

    return make


def test_a_gpu_with_kernels_runs_fused(on_gpu: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(_extension, "why_no_cuda", asked.append)
    x, y = on_gpu(0), on_gpu(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [guard.why_stock_tensors((t,)) for t in (x, y)] == [None] * 2
    assert asked == [0, 1]
    assert guard.why_stock_tensors((x.to(torch.int32),)) == "no kernel for torch.int32"


def test_a_gpu_without_kernels_is_said_once(on_gpu: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "why_no_cuda", lambda index: f"cuda:{index} is too old.")
    x, y = on_gpu(0), on_gpu(1)
    with pytest.warns(RuntimeWarning) as caught:
        assert [guard.why_stock_tensors((t,)) for t in (x, y, x)] == [f"cuda:{i} is too old." for i in (0, 1, 0)]
    assert [str(warning.message).split(". ")[0] for warning in caught] == ["cuda:0 is too old"]


def test_an_error_of_the_gpu_that_passes_is_not_remembered(
    on_gpu: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[str | None] = ["cuda:0 cannot be used: out of memory.", None]
    monkeypatch.setattr(_extension, "why_no_cuda", lambda _: answers.pop(0))
    x = on_gpu(0)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert guard.why_stock_tensors((x,)) == "cuda:0 cannot be used: out of memory."
    assert guard.why_stock_tensors((x,)) is None


def test_a_build_without_cuda_sends_gpu_tensors_to_stock(
    on_gpu: Callable[[int], Tensor], block: fr.nn.BasicBlock, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a torch with CUDA; the extension's own answers, and its own error for whoever calls the operator."""
    if not _extension.available() or _extension.extension().build_config()["cuda"]:
        pytest.skip("needs a build without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _extension._why_no_cuda.cache_clear()
    x = on_gpu(0)
    try:
        with pytest.warns(RuntimeWarning, match="built without CUDA.*run stock PyTorch"):
            reason = guard.why_stock(block, x)
    finally:
        _extension._why_no_cuda.cache_clear()
    assert reason is not None
    assert "built without CUDA" in reason


@pytest.mark.parametrize("reason", [None, "cuda:0 is too old."])
def test_the_answer_of_a_gpu_is_a_constant_of_compiled_code(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_cuda_refusal_said", False)
    monkeypatch.setattr(_extension, "why_no_cuda", lambda _: reason)

    def forward(x: Tensor) -> Tensor:
        return x + 1 if guard._why_stock_cuda(0) is None else x - 1

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(forward, backend="eager", fullgraph=True)(torch.zeros(2))
    assert got.tolist() == [1.0 if reason is None else -1.0] * 2


@pytest.mark.parametrize(
    ("transform", "levels"),
    [
        (lambda f: torch.func.vmap(f), 1),
        (lambda f: torch.func.grad(lambda x: f(x).sum()), 0),
        (lambda f: torch.func.functionalize(f), 0),
    ],
    ids=["vmap", "grad", "functionalize"],
)
def test_function_transforms(
    transform: Callable[[object], Callable[[Tensor], Tensor]],
    levels: int,
    block: fr.nn.BasicBlock,
    x: Tensor,
    calls: Counter[str],
) -> None:
    block.eval()
    reasons = []

    def forward(x: Tensor) -> Tensor:
        reasons.append(guard.why_stock(block, x))
        out: Tensor = block(x)
        return out

    transform(forward)(x.expand(3, *x.shape) if levels else x)
    assert reasons == ["a torch.func transform is active"]
    assert not calls


def test_functional_call_alone_stays_fused(block: fr.nn.BasicBlock, x: Tensor, calls: Counter[str]) -> None:
    doubled = {name: 2 * value for name, value in block.state_dict().items() if name.endswith("weight")}
    got = torch.func.functional_call(block, doubled, (x,))
    assert calls["batch_norm_act_conv"] == 1
    with fr.nn.stock():
        torch.testing.assert_close(got, torch.func.functional_call(block, doubled, (x,)))


@pytest.fixture
def replicated(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """What nn.DataParallel runs on one of its devices: torch's own function, but that the copies stay on the CPU."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    return lambda module: replicate.replicate(module, [0])[0]


def test_replicas_of_data_parallel_run_fused(
    replicated: Callable[[nn.Module], nn.Module], calls: Counter[str], x: Tensor
) -> None:
    x = x.double()
    shortcut = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    block = nn.Sequential(fr.nn.BasicBlock(8, 8, downsample=shortcut), fr.nn.BatchNormAct2d(8, act="prelu")).double()
    results = []
    for context in (nullcontext, fr.nn.stock):
        block.zero_grad()
        with context():
            replica = replicated(block)
            y = replica(x)
        y.square().sum().backward()
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        results.append([y.detach(), *gradients, *replica.buffers()])
        assert calls == {"conv2d": 2, "batch_norm_act_conv": 1, "dual_batch_norm_act": 1, "batch_norm_act": 1}
    assert len(results[0]) == 1 + 13 + 12
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_replica_of_what_must_be_called_runs_stock(
    replicated: Callable[[nn.Module], nn.Module], block: fr.nn.BasicBlock, calls: Counter[str], x: Tensor
) -> None:
    prune.l1_unstructured(block.conv1, "weight", 0.5)
    compute(block.bn2, "bias")
    replica = replicated(block)
    replica(x)
    assert guard.why_stock_conv(replica.conv1) == guard.why_stock_conv(block.conv1) is not None
    assert guard.why_stock_norm(replica.bn2) == guard.why_stock_norm(block.bn2) is not None
    assert not calls


def test_a_replica_of_a_converted_model_reads_its_slopes(
    replicated: Callable[[nn.Module], nn.Module], calls: Counter[str], x: Tensor
) -> None:
    model = fr.convert(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8)).eval())
    with fr.nn.stock():
        want = model(x)
    torch.testing.assert_close(replicated(model)(x), want)
    assert calls["batch_norm_act"] == 1


def test_jit_trace_and_script(block: fr.nn.BasicBlock, x: Tensor, calls: Counter[str]) -> None:
    block.eval()
    with fr.nn.stock():
        want = block(x)
    traced, scripted = torch.jit.trace(block, x, check_trace=False), torch.jit.script(block)
    assert not calls
    assert "fused_resnet::" not in str(traced.inlined_graph) + str(scripted.inlined_graph)
    torch.testing.assert_close(traced(x), want)
    torch.testing.assert_close(scripted(x), want)


def test_jit_trace_is_named_as_the_reason(block: fr.nn.BasicBlock, x: Tensor) -> None:
    reasons = []

    def forward(x: Tensor) -> Tensor:
        reasons.append(guard.why_stock(block, x))
        return x + 1

    torch.jit.trace(forward, x, check_trace=False)
    assert reasons == ["torch.jit or ONNX export is tracing"]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, block: fr.nn.BasicBlock, x: Tensor, calls: Counter[str]) -> None:
    program = torch.export.export(block.eval(), (x,), strict=strict)
    assert not any("fused_resnet" in str(node.target) for node in program.graph.nodes)
    assert not calls
    with fr.nn.stock():
        torch.testing.assert_close(program.module()(x), block(x))


def test_symbolic_trace(block: fr.nn.BasicBlock, x: Tensor, calls: Counter[str]) -> None:
    graph = torch.fx.symbolic_trace(block)
    names = [node.name for node in graph.graph.nodes]
    assert names == ["x", "conv1", "bn1", "relu", "conv2", "bn2", "add", "relu_1", "output"]
    assert not calls


def test_compiled_code_checks_the_reasons_again(block: fr.nn.BasicBlock, x: Tensor) -> None:
    compiled = torch.compile(block.eval(), backend="eager", fullgraph=True)
    compiled(x)
    block.conv1 = MyConv(8, 8, 3, padding=1, bias=False)
    torch.testing.assert_close(compiled(x), block(x))


class Sum(nn.Sequential):
    """Not a Sequential: it may do anything."""


@pytest.mark.parametrize(
    ("shortcut", "why"),
    [
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), None),
        (Sum(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), "is Sum, not Sequential"),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), "has 3 children"),
        (nn.Sequential(MyConv(8, 8, 1), nn.BatchNorm2d(8)), "downsample.0 is MyConv"),
        (nn.Sequential(nn.Conv2d(8, 8, 1), MyNorm(8)), "downsample.1 is MyNorm"),
        (nn.Identity(), "is Identity, not Sequential"),
    ],
    ids=["fused", "subclass", "children", "conv", "norm", "identity"],
)
def test_shortcuts(shortcut: nn.Module, why: str | None, calls: Counter[str], x: Tensor) -> None:
    reason = guard.why_stock_downsample(shortcut)
    assert reason is None if why is None else reason is not None and why in reason
    block = fr.nn.BasicBlock(8, 8, downsample=shortcut).double()
    with fr.nn.stock():
        want = copy.deepcopy(block)(x.double())
    torch.testing.assert_close(block(x.double()), want, rtol=1e-10, atol=1e-10)
    assert calls["dual_batch_norm_act"] == (why is None)


def test_a_hook_on_the_shortcut_itself(x: Tensor) -> None:
    shortcut = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    shortcut.register_forward_hook(nothing)
    assert guard.why_stock_downsample(shortcut) == "downsample has a forward hook"


@pytest.mark.parametrize(
    ("pool", "why"),
    [
        (nn.MaxPool2d(3, 2, 1), None),
        (nn.MaxPool2d((3, 3), (2, 2), (1, 1)), None),
        (nn.AvgPool2d(3, 2, 1), "is AvgPool2d"),
        (nn.MaxPool2d(2, 2, 1), "is not the 3x3"),
        (nn.MaxPool2d(3, 1, 1), "is not the 3x3"),
        (nn.MaxPool2d(3, 2, 0), "is not the 3x3"),
        (nn.MaxPool2d(3, 2, 1, 2), "is not the 3x3"),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), "is not the 3x3"),
        (nn.MaxPool2d(3, 2, 1, return_indices=True), "is not the 3x3"),
    ],
)
def test_max_pools(pool: nn.Module, why: str | None) -> None:
    reason = guard.why_stock_max_pool(pool)
    assert reason is None if why is None else reason is not None and why in reason
    if why is None:
        pool.register_forward_hook(nothing)
        assert guard.why_stock_max_pool(pool) == "has a forward hook"


@pytest.mark.parametrize(
    ("residual", "why"),
    [
        (torch.zeros(2, 8, 5, 5), None),
        (torch.zeros(2, 8, 5, 5, dtype=torch.float64), "torch.float64"),
        (torch.zeros(2, 1, 5, 5), "(2, 1, 5, 5)"),
        (torch.zeros(2, 8, 5, 5).as_subclass(Subclass), "Subclass"),
    ],
)
def test_residuals(residual: Tensor, why: str | None, x: Tensor) -> None:
    reason = guard.why_stock_residual(x, residual)
    assert reason is None if why is None else reason is not None and why in reason


def test_stock_nests(block: fr.nn.BasicBlock, x: Tensor) -> None:
    with fr.nn.stock(), fr.nn.stock(), nullcontext():
        pass
    assert guard.why_stock(block, x) is None


def test_the_guard_never_runs_a_child(block: fr.nn.BasicBlock, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("a child was called"))
    assert guard.why_stock(block, x) is None
