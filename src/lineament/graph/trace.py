"""A model's forward pass as one flat graph of ATen operators, with parameters and buffers as inputs."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lineament._base.backends import plain_autograd
from lineament._base.errors import InputError


@dataclass(frozen=True)
class Traced:
    """A traced forward pass.

    Attributes:
        module: the graph; its placeholders are the parameters, the buffers, then the tensors among the arguments. It
            returns the list of the tensors in the output. Composite operators (linear, layer_norm, ...) stay whole.
            `module_of(node)` names the module that a node comes from.
        parameters, buffers: their names, each tied tensor once.
        inputs: how many argument tensors there are.
        constants: the buffers as they were: tables that no state dict holds.
    """

    module: fx.GraphModule
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    inputs: int
    constants: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def run(self, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], interpreter: type = fx.Interpreter) -> Any:
        """Execute the graph on other weights and inputs of the traced shapes; buffers left out are as traced."""
        flat = [
            tensors[name] if name in tensors else self.constants[name] for name in (*self.parameters, *self.buffers)
        ]
        return interpreter(self.module).run(*flat, *inputs)


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Traced:
    """Trace a model in eval mode on example arguments; only shapes count, no arithmetic is done.

    The operators of this library are traced in their plain-autograd form.

    Args:
        model: any module; its mode is as before afterwards. Of an output with `logits` only these count.
        args, kwargs: of its forward pass. Shapes are fixed in the trace.

    Raises:
        InputError: the forward pass can't be traced (it depends on the values of tensors), with the reason and the
            place: module and line.

    Example:
        >>> traced = trace(nn.Linear(2, 3), torch.zeros(1, 2))
        >>> [str(node.target) for node in traced.module.graph.nodes if node.op == "call_function"]
        ['aten.linear.default']
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    names = [*parameters, *buffers]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(*flat: Tensor) -> list[Tensor]:
        given = list(leaves)
        for i, tensor in zip(at, flat[len(names) :], strict=True):
            given[i] = tensor
        a, k = pytree.tree_unflatten(given, spec)
        found = torch.func.functional_call(model, dict(zip(names, flat, strict=False)), a, k)
        found = found.logits if isinstance(getattr(found, "logits", None), Tensor) else found
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    flat = [tensor.detach() for tensor in (*parameters.values(), *buffers.values())] + [leaves[i] for i in at]
    modes = [(module, module.training) for module in model.modules()]
    places: list[str] = []
    try:
        model.eval()
        with _exporting(), plain_autograd(), torch.no_grad(), _naming(model, places):
            traced = make_fx(forward, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
            module = traced(*flat)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{type(model).__name__} can't be traced{_place(error, places)} ({what}); its forward pass must not depend "
            "on the values of tensors. Experts of transformers: model.set_experts_implementation('batched_mm')"
        ) from error
    finally:
        for each, training in modes:
            each.training = training
    constants = {name: tensor.detach() for name, tensor in buffers.items()}
    return Traced(module, tuple(parameters), tuple(buffers), len(at), constants)


def module_of(node: fx.Node) -> str:
    """Return the dotted name of the module in whose forward pass a node of a trace was made; "" is the model's own."""
    return node.meta.get("custom", {}).get("module", "")


@contextmanager
def _naming(model: nn.Module, places: list[str]) -> Iterator[None]:
    """Write the module's name into every node; `places` is the stack of the modules that run."""

    def enter(module: nn.Module, args: Any) -> None:
        places.append(names[module])
        fx_traceback.current_meta["custom"] = {"module": places[-1]}

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        places.pop()
        fx_traceback.current_meta["custom"] = {"module": places[-1] if places else ""}

    names = {module: name for name, module in model.named_modules()}
    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave) for module in names]
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _place(error: Exception, places: Sequence[str]) -> str:
    """Say in which module and line of the model's code tracing ended."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    line = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    name = next((name for name in reversed(places) if name), "")
    return f" at {name or 'its forward pass'}{line}" if name or line else ""


def _is_machinery(file: str) -> bool:
    return file == __file__ or file.startswith(str(Path(str(torch.__file__)).parent)) or file.startswith("<")


@contextmanager
def _exporting() -> Iterator[None]:
    """Let models take the branches they take under torch.export, and keep attention layers in single operators."""
    before = torch.compiler._is_exporting_flag
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.compiler._is_exporting_flag = True
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.compiler._is_exporting_flag = before
        torch.backends.mha.set_fastpath_enabled(fused)
