"""A device that is not there: it computes on the CPU, calls itself another device, and raises where a host would wait.

On a GPU the host runs ahead of the device and must not ask it for a value in the middle of a step. A tensor here
names another device, so code takes the way that it takes on a GPU; its values are real, so results can be compared;
and what would make the host wait is an error.

    with Device():                 tensors may be made there, and copied there
        x = torch.ones(3).to(DEVICE)
    with Device(strict=True):
        x.softmax(-1)              fine
        x.max().item()             Waits

Not seen: waiting inside of CUDA's own libraries. The tests marked `gpu` see that.
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")  # every build of torch knows this one, and its own kernels are never called
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class Waits(RuntimeError):
    """The host would wait for the device, or tensors of both would meet."""


class There(Tensor):
    """A tensor on the device, around one on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, here.shape, **layout, dtype=here.dtype, device=DEVICE)
        made.here = here
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Waits(f"{func}: use tensors of the device while it is on.")


class Device(TorchDispatchMode):
    """While it is on there is such a device; with `strict`, nothing may be copied to it or from it.

    `calls` are the operations that ran, with the shapes of the tensors they were given.
    """

    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict = strict
        self.calls: list[tuple[Any, list[torch.Size]]] = []
        self.factories = _FromData()

    def __enter__(self) -> Self:
        self.factories.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.factories.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        inner_args, inner_kwargs = _unwrapped(args, tensors), {k: _unwrapped(v, tensors) for k, v in kwargs.items()}
        there = [t for t in tensors if isinstance(t, There)]
        here = [t for t in tensors if not isinstance(t, There) and t.dim()]  # a number of the host needs no copy
        target = kwargs.get("device")
        arrives = target is not None and torch.device(target).type == DEVICE.type
        leaves = bool(there) and target is not None and not arrives
        self.calls.append((func, [t.shape for t in tensors]))
        if self.strict and there and _reads_values(func, args, kwargs):
            raise Waits(f"{func} needs a value that only the device knows.")
        if there and here and func.overloadpacket is not torch.ops.aten.copy_:
            raise Waits(f"{func} mixes tensors of the host and of the device.")
        if self.strict and (leaves or (here and (there or arrives))):
            raise Waits(f"{func} copies between the host and the device.")
        if arrives:
            inner_kwargs["device"] = "cpu"
        out = func(*inner_args, **inner_kwargs)
        if leaves or not (there or arrives):
            return out
        return _wrapped(out, {id(t.here): t for t in there})  # which come back from what works in place


class _FromData(TorchFunctionMode):
    """`torch.tensor([...], device=...)` and its like copy from the host without a trace; here they are seen to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _FROM_DATA:
            return func(*args, **kwargs)
        target = kwargs.pop("device", None)
        if func is Tensor.new_tensor:
            own, *args = args
            target, func = target or own.device, torch.tensor
            kwargs = {"dtype": own.dtype} | kwargs
        made = func(*args, **kwargs)
        return made if target is None else made.to(target)


def _unwrapped(value: Any, found: list[Tensor]) -> Any:
    """The same with tensors of the CPU for those of the device; all tensors met are added to `found`."""
    if isinstance(value, Tensor):
        found.append(value)
        return value.here if isinstance(value, There) else value
    return type(value)(_unwrapped(v, found) for v in value) if type(value) in (list, tuple) else value


def _wrapped(value: Any, known: dict[int, There]) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else There(value)
    return type(value)(_wrapped(v, known) for v in value) if isinstance(value, list | tuple) else value


def _reads_values(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host needs to know a value of the device before it can go on."""
    name = func.overloadpacket.__name__
    masks = lambda: [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if name in ("index", "index_put", "index_put_"):  # one number through a mask is a masked_fill
        return bool(masks()) and not (name != "index" and args[2].numel() == 1)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def moved(model: nn.Module) -> nn.Module:
    """A copy of a model with its tensors on the device."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(There(value.data), requires_grad=False)
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = There(value)
    return model
