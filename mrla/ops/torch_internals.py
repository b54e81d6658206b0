"""All of torch's private names that this package uses, in one place: what each gives, and what happens without it.

They were read in torch 2.11 to 2.14. Where a later torch has not one of a group, the group's fallback is taken: nothing
is deferred and every gradient is made where it belongs, or the operators go by torch's own. Without the fake tensors of
the dry run, operators' overloads and trees of values, which torch has had under these names since 2.1, there is no
fallback: the import fails.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_unflatten as tree_unflatten

_C: Any = torch._C
_DEFERRING = ("_will_engine_execute_node", "_current_graph_task_id", "_storage_Use_Count")
_DEFERRING_AUTOGRAD = ("_top_saved_tensors_default_hooks", "_get_current_graph_task_keep_graph")


@functools.cache
def can_defer_gradients() -> bool:
    """Whether this torch tells what is needed to leave a gradient at another node of the graph."""
    inside = getattr(_C, "_autograd", None)
    return all(hasattr(_C, name) for name in _DEFERRING) and all(hasattr(inside, name) for name in _DEFERRING_AUTOGRAD)


def will_run(node: Any) -> bool:
    """Whether the running backward pass will come to a node."""
    return _C._will_engine_execute_node(node)


def backward_pass() -> int:
    """A number of the running backward pass."""
    return _C._current_graph_task_id()


def graph_is_kept() -> bool:
    """Whether a second backward pass may follow the running one."""
    return _C._autograd._get_current_graph_task_keep_graph()


def has_saved_tensor_hooks() -> bool:
    """Whether somebody has put hooks on what is saved for backward, and so may hold it."""
    return _C._autograd._top_saved_tensors_default_hooks(False) is not None


def storage_users(tensor: Tensor) -> int:
    """How many tensors lie in the memory of one."""
    return _C._storage_Use_Count(tensor.untyped_storage()._cdata)


def own(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is a part of another: what an operator returns may share no memory."""
    return tensor.clone() if tensor._is_view() else tensor


@contextmanager
def compiling_often(limit: int) -> Iterator[None]:
    """Lets torch compile one function up to so many times in the body, for as many networks."""
    import torch._dynamo as dynamo  # takes a second

    with dynamo.config.patch(recompile_limit=max(limit, dynamo.config.recompile_limit)):
        yield


def is_watched() -> bool:
    """Whether something looks at each of torch's operators: a dispatch mode, torch.func, forward-mode derivatives."""
    try:
        return (
            _C._len_torch_dispatch_stack() > 0
            or (_C._len_torch_function_stack() > 0 and _is_overridden())
            or _C._functorch.peek_interpreter_stack() is not None
            or torch.autograd.forward_ad._current_level >= 0
        )
    except AttributeError:
        return True  # so that nothing is hidden from it


def _is_overridden() -> bool:
    """Whether a mode sees torch's functions; that of a default device sees only what makes tensors."""
    from torch.utils._device import DeviceContext

    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)


def unobserved(*modules: nn.Module) -> bool:
    """True if no hook observes these modules, so that their work may be done without calling them.

    A ``forward`` that was put on a module counts like a hook.

    Args:
        modules: The modules.

    Returns:
        Whether that is so.

    Example:
        >>> norm = torch.nn.BatchNorm2d(4)
        >>> unobserved(norm)
        True
        >>> handle = norm.register_forward_hook(lambda *_: None)
        >>> unobserved(norm)
        False
    """
    everywhere: Any = torch.nn.modules.module
    if (
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    ):
        return False
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if "forward" in module.__dict__:
            return False
    return True
