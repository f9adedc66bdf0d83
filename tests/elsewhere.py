"""A device that this machine need not have.

Its tensors are the processor's, and refuse to be mixed with those that are not on it, as a GPU's do.
"""

import copy

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("xpu")


class Elsewhere(torch.Tensor):
    """A tensor on the device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return DEVICE
        if func == torch.Tensor.grad.__get__:
            # torch wraps everything but this.
            return _there(super().__torch_function__(func, types, args, kwargs))
        if func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item):
            return func(_plain(args[0]), *args[1:], **kwargs)
        if func is torch.Tensor.to:
            return _moved(args, kwargs)
        _refuse_mixture(func, (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)


class OnTheDevice(TorchFunctionMode):
    """Makes tensors that are asked for on the device, and moves others to it, while the context lasts."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            return _moved(args, kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            return _there(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def pipeline_elsewhere(pipe):
    """A copy of a pipeline whose weights are on the device."""
    pipe = copy.deepcopy(pipe)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        for module in part.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = _there(tensor.detach())
    return pipe


def _there(value):
    return tree_map(lambda each: each.as_subclass(Elsewhere) if isinstance(each, torch.Tensor) else each, value)


def _plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def _moved(args, kwargs):
    """`Tensor.to` with any of its arguments."""
    tensor, *others = args
    target = kwargs.pop("device", None)
    for place, each in enumerate(others):
        if isinstance(each, torch.Tensor):
            others[place], target = each.dtype, each.device
        elif isinstance(each, str | torch.device):
            target = others[place] = torch.device(each)
    is_there = isinstance(tensor, Elsewhere) if target is None else torch.device(target) == DEVICE
    others = [each for each in others if not isinstance(each, torch.device)]
    moved = torch.Tensor.to(_plain(tensor), *others, **kwargs) if others or kwargs else _plain(tensor)
    return _there(moved) if is_there else moved


def _refuse_mixture(func, values):
    """Raise where tensors of both places meet; indices alone may be the processor's."""
    if getattr(func, "__name__", "") in ("__getitem__", "__setitem__"):
        (tensor, index, *assigned), _ = values
        is_there = isinstance(tensor, Elsewhere)
        indices = [each for each in tree_flatten(index)[0] if not is_there or isinstance(each, Elsewhere)]
        values = (tensor, indices, assigned)
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [each for each in tree_flatten(values)[0] if isinstance(each, torch.Tensor) and each.dim()]
    if any(isinstance(each, Elsewhere) for each in tensors) and any(type(each) is torch.Tensor for each in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found two in {func}.")
