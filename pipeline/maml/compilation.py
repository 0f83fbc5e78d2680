"""Compiling a pure function of tensors, and deciding whether that pays.

`Compiler.compiled(function)` traces a function - however many `vmap`, `grad` and `jvp` are in it -
into a flat graph of tensor operations (`make_fx`; torch.compile's own frontend cannot trace a `jvp`
of a `grad`), removes what the graph computes twice, and has TorchInductor compile the rest. If any
of that fails, it logs one warning, and the eager function runs from then on.

Compiled and eager results differ in the last bits, so two workers that decided differently would
give different results. `worth_compiling` therefore decides from the computation and from the number
of calls that the configuration asks for, not from a clock or from the number of workers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_log = logging.getLogger(__name__)

# Loops below this many elements run on one thread: a sinusoid's are microseconds long, and waiting
# for a second thread costs as much, far more on a busy machine.
_OPTIONS = {"cpp.min_chunk_size": 16384}

_TENSOR = object()  # stands for a tensor in a list of constants


class Compiler:
    """Compiles functions that belong together: if one cannot be compiled, all run eagerly."""

    def __init__(self) -> None:
        self.failed = False

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that computes the same as `function`, compiled.

        Arguments and results are trees (tuples, dictionaries, named tuples) of tensors. The first
        call for each signature compiles a program: the signature is the structure of the arguments,
        the shape, precision and device of each tensor, and the value of each leaf that is no
        tensor. All tensors of a call must be on one device. `function` must be pure. Results carry
        no autograd graph.

        An error of the compiler, or of the first run of a program, is logged as a warning, and the
        eager function runs instead; an error of the eager function, or of a later run of a program
        (out of memory), is raised as it is.
        """
        programs: dict[Any, Callable[[list[Tensor]], Any]] = {}

        def call(*arguments: Any) -> Any:
            if self.failed:
                return function(*arguments)
            leaves, structure = pytree.tree_flatten(arguments)
            tensors = [x.detach().contiguous() for x in leaves if isinstance(x, Tensor)]
            constants = tuple(_TENSOR if isinstance(x, Tensor) else x for x in leaves)
            signature = (
                structure,
                constants,
                tuple((x.shape, x.dtype, x.device) for x in tensors),
                torch.get_num_threads(),  # the compiled loops contain it
            )
            program = programs.get(signature)
            if program is None:
                try:
                    program = _compile(function, structure, constants, tensors)
                    result = program(tensors)
                except Exception as error:
                    self._give_up(error)
                    return function(*arguments)
                programs[signature] = program
                return result
            return program(tensors)

        return call

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _log.warning("cannot compile, running eagerly from here on (%s)", reason)
        _log.debug("why compilation failed", exc_info=error)


def _compile(
    function: Callable[..., Any],
    structure: pytree.TreeSpec,
    constants: tuple[Any, ...],
    tensors: list[Tensor],
) -> Callable[[list[Tensor]], Any]:
    """Compile the program of one signature: a function of the tensors among the leaves."""
    results: list[pytree.TreeSpec] = []

    def flat(*values: Tensor) -> list[Tensor]:
        supply = iter(values)
        leaves = [next(supply) if constant is _TENSOR else constant for constant in constants]
        out, spec = pytree.tree_flatten(function(*pytree.tree_unflatten(leaves, structure)))
        results.append(spec)
        return out

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without a shape environment the compiler would not use its cache on disk.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    # A cached result of a view is no view, which forward differentiation insists on.
    mode.cache_enabled = False
    # One fake tensor per argument: a tensor passed twice would be traced as one argument.
    examples: list[Any] = [mode.from_tensor(x.detach()) for x in tensors]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about torch
        run = torch._inductor.compile(trace(flat, examples), examples, _OPTIONS)
    spec = results[0]

    def program(values: list[Tensor]) -> Any:
        with torch.no_grad():
            return pytree.tree_unflatten(list(run(*values)), spec)

    return program


def trace(function: Callable[..., Any], examples: list[Tensor]) -> fx.GraphModule:
    """Trace the function into a graph of elementary operations, each computed once.

    The backward pass through an inner step computes again what the forward pass has computed. Both
    are in one graph here, and common subexpression elimination removes a fifth of a meta-gradient's
    arithmetic. Elimination compares operations literally, so the trace first decomposes them all
    into the same elementary operations (some rules of differentiation do so, some do not) and
    removes operations that only change how a shape is written.

    `examples` give shapes, precisions and devices. Raises whatever the function or torch raises.
    """
    # These imports take seconds; processes that do not compile do without them.
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    # Writes in place must go first: elimination would merge two equal empty buffers into one.
    pure = functionalize(function, remove="mutations")
    module = make_fx(pure, decomposition_table=select_decomp_table())(*examples)
    _simplify(module.graph)
    graph = fx_graph_cse(module.graph)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _simplify(graph: fx.Graph) -> None:
    """Remove aliases, casts to the same type and chains of views from the graph, in place."""
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.op != "call_function" or "val" not in node.meta or not node.args:
            continue
        source = node.args[0]
        if node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(source)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            while source.target is aten.view.default:
                source = source.args[0]
            node.target = aten.view.default
            node.args = (source, list(node.meta["val"].shape))
        elif node.target is aten.expand.default:
            node.args = (source, list(node.meta["val"].shape))
        if node.target in (aten.view.default, aten.expand.default, aten._to_copy.default):
            before, after = source.meta["val"], node.meta["val"]
            if (before.shape, before.dtype, before.device) == (
                after.shape,
                after.dtype,
                after.device,
            ):
                node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


# What eager execution costs on the machine of benchmarks/README.md (2 threads): an operator call,
# dispatched through vmap and autograd, and arithmetic at the sizes of few-shot tasks.
_SECONDS_PER_CALL = 15e-6
_FLOPS_PER_SECOND = 35e9
# What compilation costs there: at least, and per operator call of the eager function.
_COMPILE_SECONDS = 5.0
_COMPILE_SECONDS_PER_CALL = 0.025
# Part of the eager time that compilation saves: 0.6 for conv4, 0.95 for small networks.
_SAVING = 0.5


class _CallCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operator_calls(function: Callable[..., Any], *arguments: Any) -> int:
    """The number of operators that an eager call of the function runs; calls it once."""
    with torch.no_grad(), _CallCounter() as counter:
        function(*arguments)
    return int(counter.count)


class Work(NamedTuple):
    """A function that a run calls many times with arguments of the same shapes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: int
    """The calls of the whole run (iterations x chunks), also where a run is resumed: a resumed run
    must decide as the whole run did."""


def worth_compiling(works: Sequence[Work]) -> bool:
    """Whether the time that compiled calls save exceeds the time that compilation takes.

    Calls each eager function twice and counts operators and floating-point operations, so
    that the answer is the same on every machine.
    """
    saved = spent = 0.0
    for function, arguments, calls in works:
        # The first call may try whether an operation can be differentiated; torch crashes where
        # that fails under a counter.
        function(*arguments)
        with FlopCounterMode(display=False) as flops:
            count = operator_calls(function, *arguments)
        arithmetic: int = flops.get_total_flops()
        eager = count * _SECONDS_PER_CALL + arithmetic / _FLOPS_PER_SECOND
        saved += calls * eager * _SAVING
        spent += _COMPILE_SECONDS + count * _COMPILE_SECONDS_PER_CALL
    return saved > spent
