"""A ResNet under the tools of the trade: every one must find torchvision's model, and work."""

import copy
import importlib
import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fused_resnet as fr
from fused_resnet.nn import guard
from tests.nn.twins import randomise
from tests.oracles import torchvision


def net(block: str = "BasicBlock") -> Any:
    """The smallest ResNet with torchvision's structure."""
    return randomise(fr.models.ResNet(getattr(fr.nn, block), [1, 1, 1, 1], num_classes=5))


def half_net(block: str = "BasicBlock") -> Any:
    """Its first two stages, for tools that take their time."""
    model = net(block)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * model.layer2[0].expansion, 5)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 33, 33)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(
            got[key], value, rtol=tolerance, atol=tolerance, msg=lambda message, key=key: f"{key}: {message}"
        )


# ---- torchvision's feature extraction


def feature_extraction() -> Any:
    return importlib.import_module(f"{torchvision.__name__}.models.feature_extraction")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_node_names(name: str, fused: None) -> None:
    names = feature_extraction().get_graph_node_names
    with torch.device("meta"):
        mine, other = getattr(fr.models, name)(), getattr(torchvision.models, name)()
    assert names(mine) == names(other)


def test_create_feature_extractor(x: Tensor, fused: None) -> None:
    model = net().eval()
    extractor = feature_extraction().create_feature_extractor(
        model, return_nodes={"relu": "stem", "layer1.0.add": "sum", "layer2.0.relu_1": "two", "flatten": "features"}
    )
    got = extractor(x)
    with fr.nn.stock():
        torch.testing.assert_close(got["two"], model.layer2(model.layer1(model._stem_stock(x))))
    assert got["stem"].shape == (2, 64, 17, 17)
    assert got["features"].shape == (2, 512)


def test_intermediate_layer_getter(x: Tensor, calls: Counter[str]) -> None:
    model = net().eval()
    body = torchvision.models._utils.IntermediateLayerGetter(model, {"layer1": "a", "layer3": "b"})
    got = body(x)
    assert list(got) == ["a", "b"]
    assert calls["batch_norm_act_conv"] == 3
    with fr.nn.stock():
        torch.testing.assert_close(body(x)["b"], got["b"], rtol=1e-4, atol=1e-4)


def test_a_detection_backbone_freezes_and_trains(x: Tensor, calls: Counter[str]) -> None:
    """What torchvision's FPN builder does to a backbone: frozen layers and FrozenBatchNorm2d."""
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    model = fr.models.ResNet(fr.nn.BasicBlock, [1, 1, 1, 1], norm_layer=frozen)
    assert "bn1 is FrozenBatchNorm2d" in str(guard.why_stock(model.layer1[0]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
    backbone = torchvision.models.detection.backbone_utils.BackboneWithFPN(
        model, {f"layer{i}": str(i) for i in (1, 2, 3, 4)}, [64, 128, 256, 512], 16
    )
    sum(out.sum() for out in backbone(x).values()).backward()
    assert model.layer1[0].conv1.weight.grad is None
    assert model.layer2[0].conv1.weight.grad is not None
    assert not calls


# ---- copies and files


def test_pickle(x: Tensor, fused: None) -> None:
    model = net().eval()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))


def test_save_and_load_weights_only(x: Tensor, fused: None) -> None:
    model, file = net().eval(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = net().eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), model(x))


def test_meta_device_and_to_empty(x: Tensor, fused: None) -> None:
    model = net().eval()
    with torch.device("meta"):
        twin = fr.models.ResNet(fr.nn.BasicBlock, [1, 1, 1, 1], num_classes=5)
        assert twin(x.to("meta")).shape == (2, 5)
    twin = twin.to_empty(device="cpu").eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


def test_channels_last_stays(x: Tensor, calls: Counter[str]) -> None:
    model = net().to(memory_format=torch.channels_last)
    out = model.layer1(model._stem_fused(x.contiguous(memory_format=torch.channels_last)))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert calls["batch_norm_act_max_pool"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_to(dtype: torch.dtype, x: Tensor, calls: Counter[str]) -> None:
    model = net().eval()
    want = model(x)
    with torch.autocast("cpu", dtype):
        cast = model(x)
    low = model.to(dtype)(x.to(dtype))
    for got in (cast, low):
        assert got.dtype == dtype
        assert (got.float() - want).norm() <= 0.1 * want.norm()
    assert calls["batch_norm_act_max_pool"] == 3


# ---- training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, x: Tensor, calls: Counter[str]) -> None:
    model, x = net().double(), x.double().requires_grad_()
    want = gradients(copy.deepcopy(model), x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(model._stem_fused, x, use_reentrant=reentrant)
            layers = nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4)
            x = checkpoint_sequential(layers, 2, x, use_reentrant=reentrant)
            return model.fc(torch.flatten(model.avgpool(x), 1))

    calls.clear()
    got = gradients(Checkpointed(), x)
    assert_same({name.removeprefix("model."): grad for name, grad in got.items()}, want)
    assert calls["batch_norm_act_max_pool"] == 2


def test_sync_batch_norm_conversion(x: Tensor, calls: Counter[str]) -> None:
    model = net().eval()
    want = model(x)
    calls.clear()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    assert "SyncBatchNorm" in str(guard.why_stock(converted.layer1[0]))
    torch.testing.assert_close(converted(x), want, rtol=1e-4, atol=1e-4)
    assert not calls, "the activation would have been applied by a fused operator"


def _data_parallel(rank: int, world: int, folder: str) -> None:
    guard._UNAVAILABLE = None
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = half_net().double()
    x = torch.randn(4, 3, 17, 17, dtype=torch.float64)
    mine = x[rank * 4 // world : (rank + 1) * 4 // world]
    got = gradients(DistributedDataParallel(copy.deepcopy(model)), mine)
    if rank == 0:
        torch.save(({k.removeprefix("module."): v for k, v in got.items()}, model.state_dict(), x), f"{folder}/out.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_distributed_data_parallel(world: int, tmp_path: Path, calls: Counter[str]) -> None:
    mp.spawn(_data_parallel, (world, str(tmp_path)), nprocs=world)
    got, state, x = torch.load(tmp_path / "out.pt", weights_only=True)
    total: dict[str, Tensor] = {}
    for part in x.chunk(world):
        model = half_net().double()
        model.load_state_dict(state)
        for name, grad in gradients(model, part).items():
            total[name] = total.get(name, torch.zeros(())) + grad / world
    assert_same(got, total)
    assert calls["batch_norm_act_max_pool"] == world


# ---- compilers and exporters


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(training: bool, x: Tensor, fused: None) -> None:
    model, x = half_net().double().train(training), x.double()
    want = gradients(copy.deepcopy(model), x)
    twin = copy.deepcopy(model)
    got = gradients(torch.compile(twin, backend="aot_eager", fullgraph=True), x)
    assert_same({name.removeprefix("_orig_mod."): grad for name, grad in got.items()}, want)
    assert int(twin.bn1.num_batches_tracked) == training


def test_compiled_model_stays_fused(x: Tensor, needs_extension: None) -> None:
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(half_net(), backend=backend, fullgraph=True)(x)
    assert sum("fused_resnet.residual_block" in target for target in targets) == 2
    assert sum("fused_resnet.batch_norm_act_max_pool" in target for target in targets) == 1


def test_export_to_aten(x: Tensor, calls: Counter[str]) -> None:
    model = net().eval()
    with fr.nn.stock():
        want = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=8)}})
    assert not any("fused_resnet" in str(node.target) for node in program.graph.nodes)
    assert not calls
    torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_jit(how: str, x: Tensor, fused: None) -> None:
    model = half_net("Bottleneck").eval()
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(made, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x), rtol=1e-4, atol=1e-4)


def test_functional_transforms(x: Tensor, fused: None) -> None:
    model = half_net().double().eval()
    x = x.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, (parameters, buffers), (x,))
        return out.square().sum()

    got = torch.func.grad(loss)(parameters, x)
    assert_same(got, gradients(model, x), 1e-8)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    assert_same({name: grad.sum(0) for name, grad in each.items()}, got, 1e-8)
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    (grad,) = torch.autograd.grad(loss(parameters, x.requires_grad_()), x)
    torch.testing.assert_close(tangent, grad.sum())


# ---- what other people's code does to models


def test_pruning(x: Tensor, calls: Counter[str]) -> None:
    model = net().eval()
    conv = model.layer1[0].conv1
    prune.random_unstructured(conv, "weight", 0.5)
    model(x)
    whole = "residual_block" if fr.is_available() else "batch_norm_act_conv"
    assert calls[whole] == 3
    prune.remove(conv, "weight")
    model(x)
    assert calls[whole] == 3 + 4
    assert (conv.weight == 0).float().mean() == 0.5


def test_optimiser_groups_by_child() -> None:
    model = net()
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert len(norms) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 2 * 12


def test_forward_hooks_see_every_convolution(x: Tensor, fused: None) -> None:
    model, seen = net(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(x)
    assert sorted(seen) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))


def test_inference_mode(x: Tensor, calls: Counter[str]) -> None:
    model = net().eval()
    with torch.inference_mode():
        got = model(x)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))
    assert calls["batch_norm_act_max_pool"] == 2
