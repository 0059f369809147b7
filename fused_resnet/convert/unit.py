"""A converted module: its own class and children, with a forward that runs a plan when the guard allows it.

The instance's class becomes a subclass of the one it had, made on demand. `isinstance`, methods, attributes, children
and state_dict stay; pickle and deepcopy name the original class and make the subclass and the plan anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ClassVar

from torch import nn

from fused_resnet.convert.graph import Rewrite, is_chain, rewrite
from fused_resnet.convert.source import NotStraightError, count_inputs, read_forward, setting
from fused_resnet.nn import guard

_PLANS = "_fused_plans"  # in the instance's __dict__: (plan in evaluation, plan in training)

Path = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A fused forward, and everything that must still be as it was when the plan was made."""

    run: Callable[..., Any]  # run(module, *inputs)
    inputs: int
    settings: tuple[tuple[str, Any], ...]  # attributes that the forward's branches read, and their values
    containers: tuple[tuple[Path, Path], ...]  # Sequentials that were looked into, and their children's names
    convs: tuple[Path, ...]
    norms: tuple[Path, ...]
    acts: tuple[tuple[Path, type], ...]  # and identities
    pools: tuple[Path, ...]
    twins: tuple[tuple[Path, Path], ...]  # two names of one child, of which the trace knows the first
    fused: tuple[str, ...]
    left: tuple[tuple[str, str], ...]  # batch norms that stay calls, and why

    def why_stock(self, module: nn.Module) -> str | None:
        """Says what no longer is as it was, or must be called; None: the plan holds."""
        for name, value in self.settings:
            if setting(module, name) != value:
                return f"its {name} has changed since it was converted"
        for path, other in self.twins:
            if find(module, path) is not find(module, other):
                return f"{'.'.join(path)} and {'.'.join(other)} were one module"
        for path, names in self.containers:
            child = find(module, path)
            if child is None or not is_chain(type(child)):
                return f"{'.'.join(path)} was replaced"
            reason = guard.why_called(child.__dict__) if path else None
            if reason is not None:
                return f"{'.'.join(path)} {reason}"
            if tuple(child.__dict__["_modules"]) != names:
                return f"{'.'.join(path) or 'it'} has other children since it was converted"
        for path in self.convs:
            reason = guard.why_stock_conv(find(module, path))
            if reason is not None:
                return f"{'.'.join(path)} {reason}"
        for path in self.norms:
            reason = guard.why_stock_norm(find(module, path))
            if reason is not None:
                return f"{'.'.join(path)} {reason}"
        for path, cls in self.acts:
            child = find(module, path)
            if type(child) is not cls:
                return f"{'.'.join(path)} was replaced"
            reason = guard.why_called(child.__dict__)
            if reason is not None:
                return f"{'.'.join(path)} {reason}"
        for path in self.pools:
            reason = guard.why_stock_max_pool(find(module, path))
            if reason is not None:
                return f"{'.'.join(path)} {reason}"
        return None


def find(module: nn.Module, path: Path) -> Any:
    """The child at a path, None where there is none."""
    child: Any = module
    for name in path:
        if child is None:
            return None
        child = child.__dict__["_modules"].get(name)
    return child


class ConvertedUnit(guard.FusedUnit):
    """Stands before the original class in the method resolution order of every converted module."""

    converted_from: ClassVar[type[nn.Module]]
    _stock_forward: ClassVar[Callable[..., Any]]  # of converted_from, when plans were made

    def plan(self) -> Plan | None:
        """The plan for the mode the module is in."""
        state = self.__dict__
        plans = state.get(_PLANS)
        return None if plans is None else plans[1 if state["training"] else 0]

    def why_stock_children(self) -> str | None:
        plan, cls = self.plan(), type(self)
        if cls.converted_from.forward is not cls._stock_forward:
            return "its class has another forward since it was converted"
        return "it was changed so that it cannot be fused" if plan is None else plan.why_stock(self)

    def read_children(self) -> list[nn.Module]:
        """The children that a fused run reads."""
        plan = self.plan()
        if plan is None:
            return []
        paths = (*plan.convs, *plan.norms, *(path for path, _ in plan.acts), *plan.pools)
        return [find(self, path) for path in paths]

    def exceptions(self) -> str:
        """The batch norms that a fused run still calls."""
        plan = self.plan()
        return "" if plan is None or not plan.left else "but " + "; ".join(f"{path} {why}" for path, why in plan.left)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))  # (copyreg.__newobj__, (class, *arguments), state)
        _, arguments, state, *rest = reduced
        state = {key: value for key, value in state.items() if key != _PLANS}
        return (_remake, (self.converted_from, *arguments[1:]), state, *rest)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        try:
            self.__dict__[_PLANS] = make_plans(self, self.converted_from)
        except NotStraightError:  # it was changed after its conversion: runs stock, and says so
            self.__dict__.pop(_PLANS, None)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the same module without the conversion."""
        return unconverted(self)


_OWN_NAMES = sorted(
    name
    for cls in (ConvertedUnit, guard.FusedUnit)
    for name in {*cls.__dict__, *cls.__annotations__}
    if not name.startswith("_")
)


def converted_class(original: type) -> type:
    """The subclass of `original` whose instances run plans."""
    return _converted_class(original, original.forward)  # type: ignore[attr-defined]


@cache
def _converted_class(original: Any, stock: Any) -> type:
    @wraps(stock)  # tracers and exporters read its signature
    def forward(self: ConvertedUnit, *inputs: Any, **named: Any) -> Any:
        plan = self.plan()
        if plan is None or named or len(inputs) != plan.inputs or guard.why_stock(self, *inputs) is not None:
            return original.forward(self, *inputs, **named)
        return plan.run(self, *inputs)

    namespace = {
        "__module__": __name__,
        "__doc__": original.__doc__,
        "converted_from": original,
        "_stock_forward": staticmethod(stock),
        "forward": forward,
    }
    metaclass: Any = type(original)
    made: type = metaclass(f"Fused{original.__name__}", (ConvertedUnit, original), namespace)
    return made


def _remake(original: Any, *arguments: Any) -> nn.Module:
    cls = converted_class(original)
    made: nn.Module = cls.__new__(cls, *arguments)
    return made


def convert_module(module: nn.Module) -> None:
    """Give one module a fused forward, in place.

    Raises:
        NotStraightError: it cannot have one, or nothing in it fuses; it is unchanged then.
    """
    cls: Any = type(module)
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        raise NotStraightError(f"{cls.__name__} has its own way of being pickled")
    taken = next((name for name in _OWN_NAMES if hasattr(module, name)), None)
    if taken is not None:
        raise NotStraightError(f"it has a {taken} of its own, which the fused class would hide")
    plans = make_plans(module, cls)
    try:
        module.__class__ = converted_class(cls)
    except TypeError as error:
        raise NotStraightError(f"{cls.__name__} cannot be subclassed in place: {error}") from error
    module.__dict__[_PLANS] = plans


def make_plans(module: nn.Module, original: type[nn.Module]) -> tuple[Plan, Plan]:
    """The plans for evaluation and training: one and the same if the forward does not ask.

    Raises:
        NotStraightError: as `convert_module`.
    """
    current, mode = module.__class__, module.training
    try:
        module.__class__ = original
        plans = []
        for training in (False, True):
            module.training = training
            settings = frozenset() if is_chain(original) else read_forward(module)
            plans.append(_plan(module, settings))
            if "training" not in settings:
                return plans[0], plans[0]
        return plans[0], plans[1]
    finally:
        module.training = mode
        module.__class__ = current


def _plan(module: nn.Module, settings: frozenset[str]) -> Plan:
    inputs = 1 if is_chain(type(module)) else count_inputs(module)
    found: Rewrite = rewrite(module)
    return Plan(
        run=found.run,
        inputs=inputs,
        settings=tuple((name, setting(module, name)) for name in sorted(settings)),
        containers=tuple((_split(path), tuple(module.get_submodule(path)._modules)) for path in found.containers),
        convs=tuple(map(_split, found.convs)),
        norms=tuple(map(_split, found.norms)),
        acts=tuple((_split(path), type(module.get_submodule(path))) for path in found.acts),
        pools=tuple(map(_split, found.pools)),
        twins=_twins(module),
        fused=found.fused,
        left=tuple(found.left.items()),
    )


def _twins(module: nn.Module) -> tuple[tuple[Path, Path], ...]:
    """Children, and what is in Sequentials, that have two names: a forward may use either, and they may part later.

    Raises:
        NotStraightError: a parameter or buffer of the module's own has two.
    """
    own = [id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if len(set(own)) < len(own):
        raise NotStraightError("one of its tensors has two names")
    first: dict[int, str] = {}
    found: list[tuple[Path, Path]] = []
    for path, child in module.named_modules(remove_duplicate=False):
        if not path or path.count(".") > 1:
            continue
        if id(child) in first:
            found.append((_split(first[id(child)]), _split(path)))
        else:
            first[id(child)] = path
    return tuple(found)


def _split(path: str) -> Path:
    return tuple(path.split(".")) if path else ()


def unconverted(module: nn.Module) -> nn.Module:
    """A twin without converted parts that shares all parameters and buffers; the module itself if it has none."""
    if not any(isinstance(part, ConvertedUnit) for part in module.modules()):
        return module
    cls = module.converted_from if isinstance(module, ConvertedUnit) else type(module)
    twin: nn.Module = cls.__new__(cls)
    twin.__dict__.update({key: value for key, value in module.__dict__.items() if key != _PLANS})
    children = {name: child if child is None else unconverted(child) for name, child in module._modules.items()}
    twin.__dict__["_modules"] = children
    return twin
