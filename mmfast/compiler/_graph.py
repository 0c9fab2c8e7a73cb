"""Reading a graph as Dynamo captured it, and writing calls into it."""

import contextlib
import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols, statically_known_true
from torch.utils import _pytree as pytree

# What the patterns look for, under one name each however it is written. Methods are known by their names.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, torch.add),
    "addmm": (torch.addmm,),
    "arange": (torch.arange,),
    "cat": (torch.cat, torch.concat, torch.concatenate),
    "chunk": (torch.chunk,),
    "contiguous": (),
    "cross_entropy": (F.cross_entropy,),
    "div": (operator.truediv, torch.div, torch.divide, torch.true_divide),
    "dropout": (F.dropout, torch.dropout),
    "expand": (torch.broadcast_to,),
    "expand_as": (),
    "gelu": (F.gelu,),
    "getitem": (operator.getitem,),
    "hstack": (torch.hstack,),
    "invert": (operator.invert, torch.logical_not, torch.bitwise_not),
    "layer_norm": (F.layer_norm, torch.layer_norm),
    "linear": (F.linear,),
    "masked_fill": (torch.masked_fill,),
    "matmul": (operator.matmul, torch.matmul, torch.mm, torch.bmm),
    "mul": (operator.mul, torch.mul, torch.multiply),
    "multi_head_attention_forward": (F.multi_head_attention_forward,),
    "permute": (torch.permute,),
    "relu": (F.relu, torch.relu),
    "repeat": (),
    "repeat_interleave": (torch.repeat_interleave,),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention,),
    "silu": (F.silu,),
    "softmax": (F.softmax, torch.softmax),
    "split": (torch.split,),
    "tanh": (torch.tanh, F.tanh),
    "to": (),
    "transpose": (torch.transpose, torch.swapaxes, torch.swapdims, torch.t),
    "unflatten": (torch.unflatten,),
    "unsqueeze": (torch.unsqueeze,),
    "view": (torch.reshape,),
    "where": (torch.where,),
    "zeros_like": (torch.zeros_like,),
}
NAMES = {function: name for name, functions in FUNCTIONS.items() for function in functions}
METHODS = {name: name for name in FUNCTIONS} | {
    "bmm": "matmul", "broadcast_to": "expand", "divide": "div", "float": "to", "logical_not": "invert",
    "long": "to", "mm": "matmul", "multiply": "mul", "reshape": "view", "swapaxes": "transpose",
    "t": "transpose", "true_divide": "div",
}  # fmt: skip
NAMES |= {torch.ops.aten.numpy_T: "transpose", torch.ops.aten.mT: "transpose"}
IN_PLACE = (
    "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
    "isub", "itruediv", "ixor", "setitem", "delitem",
)  # fmt: skip
IN_PLACE_METHODS = {f"__{name}__" for name in IN_PLACE}
IN_PLACE_FUNCTIONS = {getattr(operator, name) for name in IN_PLACE}
# Functions that write to what they are given without a word of it in their names: to which, and when.
WRITES: dict[Any, tuple[tuple[tuple[int, str], ...], tuple[int, str] | None]] = {
    F.batch_norm: (((1, "running_mean"), (2, "running_var")), None),
    F.instance_norm: (((1, "running_mean"), (2, "running_var")), None),
    torch.batch_norm: (((3, "running_mean"), (4, "running_var")), None),
    torch.instance_norm: (((3, "running_mean"), (4, "running_var")), None),
    F.embedding: (((1, "weight"),), (3, "max_norm")),
    F.embedding_bag: (((1, "weight"),), (3, "max_norm")),
}
ASSERTIONS = {
    torch._check, torch._check_is_size, torch._assert, torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
}  # fmt: skip
# What a tensor is, but not what it holds, changes with these: the graph shows it as it is afterwards.
RECASTS = {
    "as_strided_", "detach_", "requires_grad_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_",
    "swapdims_", "t_", "transpose_", "unsqueeze_",
}  # fmt: skip
OTHERWISE = {"out", "rounding_mode"}  # with these a function is another one
OURS = ("mmfast.",)
FROM_TORCH = ("torch", "_operator", "math", "builtins")


def name(node: Any) -> str:
    """What ``node`` calls, by its name in ``FUNCTIONS``; empty for anything else."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return ""
    if node.kwargs.keys() & OTHERWISE:
        return ""
    known: dict[Any, str] = METHODS if node.op == "call_method" else NAMES
    return known.get(node.target, "")


def argument(node: Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument of a call, by position or by any of its names."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def sizes(node: Node) -> tuple[Any, ...]:
    """``x.expand(2, 3)``, ``x.expand((2, 3))``: what stands behind the tensor."""
    rest = node.args[1:] or tuple(node.kwargs.values())
    only = number(rest[0]) if len(rest) == 1 else None  # a whole size may be made elsewhere
    return tuple(only) if isinstance(only, tuple | list) else tuple(rest)


def value(node: Any) -> FakeTensor | None:
    """The tensor that stood there when the graph was captured; None for what is not a plain one."""
    known = node.meta.get("example_value") if isinstance(node, Node) else None
    return known if isinstance(known, FakeTensor) else None


def shape(node: Node) -> torch.Size:
    """The shape of a node that has a ``value``."""
    return node.meta["example_value"].shape


def same(a: Any, b: Any) -> bool:
    """Equal sizes, whatever the dynamic ones will be; of tuples, pairwise."""
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(statically_known_true(a == b))


def number(size: Any) -> Any:
    """A size, or several, among a call's arguments, where a dynamic one is a node."""
    return size.meta["example_value"] if isinstance(size, Node) else size


def hint(size: Any) -> int:
    """A size as it is now, which decides what pays; a dynamic one may change."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def transposed(node: Any) -> Node | None:
    """What ``node`` is with its last two dimensions exchanged, by any of the ways to write that."""
    if value(node) is None or name(node) not in ("transpose", "permute"):
        return None
    source, last = node.args[0], len(shape(node)) - 1
    if value(source) is None or last < 1:
        return None
    if name(node) == "permute":
        order = [d % (last + 1) for d in sizes(node)]
        return source if order == [*range(last - 1), last, last - 1] else None
    dims = [argument(node, i, f"dim{i - 1}", f"axis{i - 1}") for i in (1, 2)]
    if dims == [None, None]:  # .T, .mT, .t()
        return source if last == 1 or node.target == torch.ops.aten.mT else None
    return source if {d % (last + 1) for d in dims} == {last - 1, last} else None


def widens(node: Any, like: Any) -> bool:
    """Whether ``node`` is a cast to a floating type no narrower than that of ``like``."""
    cast, other = value(node), value(like)
    if name(node) != "to" or cast is None or other is None:
        return False
    return cast.dtype.is_floating_point and cast.dtype.itemsize >= other.dtype.itemsize


def off(node: Any) -> bool:
    """Whether ``node`` is a dropout that does nothing."""
    return name(node) == "dropout" and argument(node, 2, "training", "train", default=True) is False


@dataclass(frozen=True, eq=False)
class Make:
    """A call that will be written where it is needed. Arguments may be nodes and other calls."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def resolve(tree: Any, node: Callable[[Node], Any], make: Callable[[Make], Any]) -> Any:
    """``tree`` with its nodes and calls replaced; each call once."""
    made: dict[Make, Any] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, Make) and x not in made:
            args, kwargs = walk((x.args, x.kwargs))
            made[x] = make(Make(x.function, args, kwargs))
        return made[x] if isinstance(x, Make) else node(x) if isinstance(x, Node) else x

    def walk(tree: Any) -> Any:
        return pytree.tree_map(leaf, tree)

    return walk(tree)


class Body:
    """A graph with what is known of its nodes only together: order, modes, what is edited in place."""

    def __init__(self, graph: Graph, around: "Body | None" = None, at: Node | None = None) -> None:
        """Reads ``graph`` as it is now, which may be a region ``at`` a node of the one ``around``."""
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.modes: dict[Node, tuple[int, tuple[Any, ...]]] = {}
        self.edits = [(node, storages(edited(node))) for node in graph.nodes]
        self.edits = [(node, where) for node, where in self.edits if where]
        self.recast = storages(
            read
            for node in graph.nodes
            if getattr(node.target, "__name__", node.target) in RECASTS
            for read in node.all_input_nodes[:1]
        )
        self.given_back = storages(graph.output_node().all_input_nodes)
        self.differentiates = any(node.target is torch.autograd.grad for node in graph.nodes)
        # Of what is given; where a size is made of others, it is read from the data.
        inputs = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
        self.sizes = {size for known in inputs if known is not None for size in free_symbols(known)}
        entered: list[tuple[Any, ...]] = [()]
        if around is not None and at is not None:
            self.differentiates, self.sizes = around.differentiates, around.sizes
            self.recast |= around.recast
            entered = [around.modes[at][1]]
        mode = 0
        for node in graph.nodes:
            if node.target is torch.amp.autocast_mode._enter_autocast:
                entered.append(node.args)
            elif node.target is torch.amp.autocast_mode._exit_autocast:
                entered.pop()
            # What gives no value may change how the rest is computed: autocast, grad mode, tensor hooks.
            silent = node.op == "call_function" and "example_value" not in node.meta
            mode += silent and node.target not in IN_PLACE_FUNCTIONS and node.target not in ASSERTIONS
            self.modes[node] = mode, entered[-1]

    def one_mode(self, nodes: Iterable[Node]) -> bool:
        """Whether all of them are computed under the same autocast and grad mode."""
        return len({self.modes[node][0] for node in nodes}) == 1

    def edited_after(self, read: Node, since: Node, until: Node | None, fused: Collection[Node]) -> bool:
        """Whether memory of ``read`` is written to after ``since``, before ``until``, not by ``fused``."""
        memory, last = storages([read]), len(self.order) if until is None else self.order[until]
        return any(
            self.order[since] < self.order[node] < last and node not in fused and memory & where
            for node, where in self.edits
        )

    def evaluate(self, tree: Any, at: Node) -> Any:
        """What the calls in ``tree`` give for the captured tensors, in the mode of ``at``."""
        fakes = [v for node in pytree.tree_leaves(nodes_of(tree)) if (v := value(node)) is not None]
        mode = fakes[0].fake_mode
        quiet = mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()
        args = self.modes[at][1]
        autocast = torch.autocast(args[0], *args[1:]) if args else contextlib.nullcontext()
        with mode, quiet, autocast, torch.no_grad():
            return resolve(
                tree,
                lambda node: node.meta["example_value"],
                lambda call: call.function(*call.args, **call.kwargs),
            )


def nodes_of(tree: Any) -> list[Node]:
    """The nodes among the arguments of the calls in ``tree``."""
    found: list[Node] = []
    resolve(tree, found.append, lambda call: None)
    return found


def storages(nodes: Iterable[Any]) -> set[int]:
    """Identities of the memory behind the tensors of ``nodes``."""
    leaves = pytree.tree_leaves([n.meta.get("example_value") for n in nodes if isinstance(n, Node)])
    return {_plain(t).untyped_storage()._cdata for t in leaves if isinstance(t, Tensor)}


def _plain(t: Tensor) -> Tensor:
    """What ``vmap`` and ``grad`` have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def edited(node: Node) -> list[Any]:
    """The arguments that ``node`` may write to: none for what is known to be pure."""
    every = list(node.all_input_nodes)
    if node.op == "call_method":
        method = str(node.target)
        writes = method in IN_PLACE_METHODS or (method.endswith("_") and not method.endswith("__"))
        return every[:1] if writes else []
    if node.op != "call_function":
        return []
    target: Any = node.target
    if target in IN_PLACE_FUNCTIONS:
        return every[:1]
    if target in WRITES:
        written, when = WRITES[target]
        return [argument(node, *one) for one in written] if when is None or argument(node, *when) else []
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else [
            getattr(target, overload) for overload in target.overloads()
        ]  # fmt: skip
        return every if any(overload._schema.is_mutable for overload in overloads) else []
    if isinstance(target, torch._ops.HigherOrderOperator):
        inner = inner_graphs(node)  # none: a kernel of the user's
        return every if not inner or any(map(_edits_inputs, inner)) else []
    by_name = getattr(target, "__name__", "").endswith("_") and target.__module__ != "_operator"  # `and_`
    if "out" in node.kwargs or by_name or not _known(target):
        return every
    if _inplace_flag(node):
        return every[:1]
    return []


def inner_graphs(node: Node) -> list[Graph]:
    """The graphs that a higher-order operator is given."""
    owner = node.graph.owning_module
    modules = [getattr(owner, str(arg.target)) for arg in node.all_input_nodes if arg.op == "get_attr"]
    return [module.graph for module in modules if isinstance(module, GraphModule)]


def _edits_inputs(graph: Graph) -> bool:
    given = storages(node for node in graph.nodes if node.op == "placeholder")
    return any(storages(edited(node)) & given for node in graph.nodes)


def _known(target: Any) -> bool:
    module = getattr(target, "__module__", None) or "torch"  # PyTorch's built-in functions have none
    return module.startswith(FROM_TORCH + OURS)


def _inplace_flag(node: Node) -> bool:
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in
        return bool(node.kwargs.get("inplace"))
    at = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    return bool(argument(node, at, "inplace"))


def write(graph: Graph, tree: Any, before: Node, instead: dict[Node, Node]) -> Any:
    """Writes the calls in ``tree`` into ``graph``; nodes that were replaced are read ``instead``."""

    def make(call: Make) -> Node:
        with graph.inserting_before(before):
            node = graph.call_function(call.function, call.args, call.kwargs)
        node.meta = {k: v for k, v in before.meta.items() if k != "example_value"}
        return node

    return resolve(tree, lambda node: instead.get(node, node), make)


def where(node: Node) -> str:
    """The user's line, ``file.py:12``, or the module's name where the line is PyTorch's own."""
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    torch_itself = str(torch.__path__[0])
    for path, line in reversed(frames):
        if not path.startswith(torch_itself):
            return f"{path.rsplit('/', 1)[-1]}:{line}"
    modules: Iterator[Any] = reversed(list((node.meta.get("nn_module_stack") or {}).values()))
    return next((str(path) for path, _ in modules), str(node))
