"""Compiling a pure function of tensors, and deciding whether that pays.

`Compiler.compiled(function)` traces a function - however many `vmap`, `grad` and `jvp` are in it -
into a flat graph of tensor operations (`make_fx`; torch.compile's own frontend cannot trace a `jvp`
of a `grad`), removes what the graph computes twice, and has TorchInductor compile the rest. Where
anything about that fails, the eager function goes on alone, and one warning says so.

Compiled and eager results differ in the last bits, and so would two workers that decided
differently. `worth_compiling` therefore looks at nothing but the computation and the number of
calls that the configuration asks for: never at a clock, never at the number of workers.
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


_TENSOR = object()  # stands for a tensor among constants


class Compiler:
    """Compiles functions that belong together: when one of them cannot be, all run eagerly."""

    def __init__(self) -> None:
        self.failed = False

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled at the first call for each signature of its arguments.

        Arguments and results are trees (tuples, dictionaries, named tuples) of tensors; leaves that
        are no tensors are constants of the program, so another value is another program. The
        function must be pure. The result carries no autograd graph.
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
                torch.get_num_threads(),  # is compiled into the loops
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
    """The program for one signature: a function of the tensors among the leaves."""
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
    """The function as a graph of elementary operations, each computed once.

    The walk back through an inner step computes again what the way forward has computed; both are
    in one graph here, and common subexpression elimination finds a fifth of a meta-gradient's
    arithmetic. It compares operations literally. So everything is first decomposed into the same
    elementary operations (differentiation rules decompose some of them, some not) and rid of
    operations that only change how a shape is written.
    """
    # These take seconds to import, which processes that do not compile need not wait for.
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    # Elimination must see no writes in place: two buffers to be filled are not one.
    pure = functionalize(function, remove="mutations")
    module = make_fx(pure, decomposition_table=select_decomp_table())(*examples)
    _simplify(module.graph)
    graph = fx_graph_cse(module.graph)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _simplify(graph: fx.Graph) -> None:
    """Rewrites the graph without aliases, casts to the same type and chains of views."""
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
    """How many operators an eager call of the function runs (it is called once to see)."""
    with torch.no_grad(), _CallCounter() as counter:
        function(*arguments)
    return int(counter.count)


class Work(NamedTuple):
    """What a run calls again and again."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: int
    """From the configuration (iterations x chunks), not what is left of them."""


def worth_compiling(works: Sequence[Work]) -> bool:
    """Whether the calls of these eager functions repay the compilation of all of them.

    Runs each twice and counts operators and arithmetic, so that the answer is the same everywhere.
    """
    saved = spent = 0.0
    for function, arguments, calls in works:
        # What the first call finds out by trying must not be tried under a counter: it would crash.
        function(*arguments)
        with FlopCounterMode(display=False) as flops:
            count = operator_calls(function, *arguments)
        arithmetic: int = flops.get_total_flops()
        eager = count * _SECONDS_PER_CALL + arithmetic / _FLOPS_PER_SECOND
        saved += calls * eager * _SAVING
        spent += _COMPILE_SECONDS + count * _COMPILE_SECONDS_PER_CALL
    return saved > spent
