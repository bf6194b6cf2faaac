"""
Rendering of chat templates, which come with a model's folder and are programs of a stranger.

What a template computes is bounded, not how long it takes: each part of it that is run, and each character and item
that it makes, costs steps, and when these are used up rendering ends. Operations whose results may be much larger than
what goes in are paid for before they are done. What is not known here to be bounded in this way is not there at all.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_LENGTH = 100_000  # characters of a template; the longest of known models have about 30,000
MAX_NODES = 20_000  # parts of it
MAX_DEPTH = 32  # of lists in lists
MAX_NUMBER = 10**18
STEPS_OF_NODE = 10
STEPS = 1_000_000  # and for each character that goes in:
STEPS_OF_CHARACTER = 300
MAX_STEPS = 200_000_000

_FILTERS = "abs capitalize count d default dictsort e escape first float indent int items join last length list lower "
_FILTERS += "map max min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper"
# Take as long for a large value as for a small one, or give an iterator.
_CHEAP = set("count d default first items last length map reject rejectattr select selectattr".split())
_KINDS = set(
    "boolean callable defined false filter float integer iterable mapping none number sameas sequence string "
    "test true undefined".split()
)
_METHODS = {
    str: "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper",
    dict: "copy get items keys values",
    list: "copy count index",
    tuple: "count index",
}
_ENDS = {"startswith", "endswith", "removeprefix", "removesuffix"}
_ALLOWED = {kind: frozenset(names.split()) for kind, names in _METHODS.items()}
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.With, nodes.Scope),
    *(nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue, nodes.Name, nodes.NSRef, nodes.Const),
    *(nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test),
    *(nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.And, nodes.Or, nodes.Not),
    *(nodes.Neg, nodes.Pos),
)


class _Steps:
    left = 0


_steps: ContextVar[_Steps] = ContextVar("steps")


def check_chat_template(template: Any) -> None:
    """
    Compiles a chat template, or each of several by name; nothing is rendered.

    Raises:
        ValueError: if it is none, too long, or has what no chat template needs.
    """
    for name, text in template.items() if isinstance(template, dict) else [("", template)]:
        try:
            if not isinstance(text, str):
                raise ValueError(f"expected a text, got {type(text).__name__}")
            _compiled(text)
        except Exception as error:  # of Jinja's parser, of Python's, or ours
            raise ValueError(
                f"The chat template{f' {name!r:.40}' * bool(name)} cannot be used ({_reason(error)}): correct "
                "chat_template.jinja, or leave it out for the authors' form."
            ) from error


def render_chat(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """
    The text that a chat template makes of messages, as `apply_chat_template` of transformers, but within bounds.

    Args:
        template (`str`): in the language of Jinja.
        messages (`list[dict]`).
        variables: what else it may refer to.

    Raises:
        ValueError: if the template is none, fails, raises an exception of its own, or computes too much.
    """
    check_chat_template(template)
    steps = _Steps()
    steps.left = MAX_STEPS
    token = _steps.set(steps)
    try:
        variables = _plain({"messages": messages, "tools": None, "documents": None, **variables})
        size = _size(variables)
        steps.left = min(MAX_STEPS, STEPS + STEPS_OF_CHARACTER * size)
        prompt = _compiled(template).render(variables)
        prompt.encode()  # halves of characters are no text
        return prompt
    except Exception as error:  # of any kind: it is a program
        raise ValueError(f"The chat template failed on {len(messages)} messages: {_reason(error)}.") from error
    finally:
        _steps.reset(token)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _pay(steps: int) -> None:
    left = _steps.get()
    left.left -= steps
    if left.left < 0:
        raise TemplateError("it computes without end, or more than any chat template needs")


def _size(value: Any, depth: int = 0) -> int:
    """Characters and items of a value, those within it included; they are paid for while they are counted."""
    if isinstance(value, str):
        size = len(value)
    elif isinstance(value, (bool, float, type(None), Undefined)):
        size = 1
    elif isinstance(value, int):
        if abs(value) > MAX_NUMBER:
            raise TemplateError("it computes with numbers that are too large")
        size = 1
    elif isinstance(value, range):
        size = len(value)
    elif isinstance(value, (list, tuple, dict, type({}.items()), type({}.keys()), type({}.values()))):
        if depth == MAX_DEPTH:
            raise TemplateError(f"it has lists in lists, more than {MAX_DEPTH} deep")
        parts: Iterable = value.items() if isinstance(value, dict) else value
        _pay(STEPS_OF_NODE)
        return STEPS_OF_NODE + sum(_size(part, depth + 1) for part in parts)
    else:
        raise TemplateError(f"it uses {type(value).__name__} as a value")
    _pay(1 + size)
    return 1 + size


def _weighed(value: Any) -> Any:
    """The value itself, all of it paid for."""
    _size(value)
    return value


def _copied(value: Any) -> Any:
    """A new list or text, whose parts are old."""
    _pay(len(value) if isinstance(value, Sized) else 1)
    return value


def _key(value: Any) -> Any:
    if not isinstance(value, (str, int, float, type(None), Undefined)):
        raise TemplateError(f"it uses {type(value).__name__} as a key")
    return value


def _passes(value: Any, cost: int) -> Any:
    """What is looped over. Lists are paid for at once, what comes one after another when it comes."""
    if isinstance(value, Iterator):
        return _counted(value, cost)
    _pay(cost * (len(value) if isinstance(value, Sized) else 1))
    return value


def _counted(values: Iterator, cost: int) -> Iterator:
    for value in values:
        _pay(cost)
        yield value


def _price(name: str, value: Any, arguments: Sequence) -> int:
    """Of a filter or a method: an upper bound of how much it computes, and of the size of what it gives."""
    size = _size(value)
    if name == "replace" and isinstance(value, str) and len(arguments) > 1:
        old, new, *_ = map(str, map(_weighed, arguments))
        return size + value.count(old) * (1 + len(new))
    if name in _ENDS:
        return size + sum(map(_size, arguments))
    for argument in arguments:
        size *= 1 + (abs(argument) if isinstance(argument, int) else _size(argument))
    return size * (20 if name in ("dictsort", "sort") else 1)


def _paid_filter(name: str, function: Callable) -> Callable:
    hidden = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, the environment

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[hidden:]
        given = [*others, *kwargs.values()]
        if name not in _CHEAP:
            if isinstance(value, Iterator):
                value = list(_counted(value, STEPS_OF_NODE))
            _pay(_price(name, value, given))
        result = function(*args[:hidden], value, *others, **kwargs)
        if isinstance(result, Iterator):
            return _counted(result, STEPS_OF_NODE * (1 + sum(map(_size, given))))
        return result

    return paid


def _pay_for_method(method: BuiltinMethodType, arguments: Sequence) -> None:
    value = method.__self__
    if isinstance(value, str):
        _pay(_price(method.__name__, value, arguments))
    elif isinstance(value, dict):
        _pay(len(value) * (method.__name__ == "copy") + sum(map(_size, arguments)))
    else:
        _pay(_size(value) + sum(map(_size, arguments)))


def _paid_test(name: str, function: Callable) -> Callable:
    @wraps(function)
    def paid(*args: Any) -> Any:
        if name not in _KINDS:
            for argument in args[hasattr(function, "jinja_pass_arg") :]:
                _size(argument)
        return function(*args)

    return paid


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers has it: Jinja's own escapes for HTML."""
    _pay(_price("tojson", value, [separators]) * (1 + MAX_DEPTH * _price("", "", [indent])))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(_weighed(message)))


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise TemplateError("it asks for a date of more than 100 characters")
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*map(_weighed, args), **kwargs)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    values = _dict(*args, **kwargs)
    if any(str(name).startswith("_") for name in values):
        raise TemplateError("it uses names that begin with an underscore")
    return Namespace(values)


_GLOBALS: dict[str, Callable] = {"range": safe_range, "dict": _dict, "namespace": _namespace}
_GLOBALS |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant says, for losses that are taken elsewhere."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@pass_context  # so that Jinja computes nothing beforehand
def _written(context, value: Any) -> Any:
    return _weighed(value)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            optimized=False,
            finalize=_written,
        )
        self.globals = dict(_GLOBALS)
        self.filters = {name: _paid_filter(name, self.filters[name]) for name in _FILTERS.split()}
        self.filters["tojson"] = _to_json
        self.tests = {name: _paid_test(name, test) for name, test in self.tests.items()}
        for helper in (_weighed, _copied, _key, _passes, _pay):  # by names that no template can say
            self.filters[f"{helper.__name__}()"] = helper

    def wrap_str_format(self, value):
        return None  # `format` is a method like others, and not among those that are there

    def is_safe_attribute(self, obj, attr, value):
        if isinstance(obj, (Namespace, LoopContext)):
            return super().is_safe_attribute(obj, attr, value)
        return any(isinstance(obj, kind) and attr in names for kind, names in _ALLOWED.items())

    def getitem(self, obj, argument):
        return super().getitem(obj, _key(argument))

    def call_binop(self, context, operator, left, right):
        if operator == "+" and isinstance(left, (str, list, tuple)):
            _pay(len(left) + (len(right) if isinstance(right, Sized) else 1))
        elif operator == "*" and not isinstance(left, (int, float)):
            _pay(_price("", left, [right]))
        elif operator == "*" and not isinstance(right, (int, float)):
            _pay(_price("", right, [left]))
        elif operator == "%" and not isinstance(left, (int, float)):
            raise TemplateError("it formats text by '%': use '~'")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int):
            _size(result)
        return result

    def call(__self, __context, __obj, *args, **kwargs):  # as in the base class: names that no argument has
        if isinstance(__obj, BuiltinMethodType):
            _pay_for_method(__obj, [*args, *kwargs.values()])
        elif isinstance(__obj, MethodType) and isinstance(__obj.__self__, LoopContext):
            for argument in args:
                _size(argument)
        elif not isinstance(__obj, (Macro, Undefined)) and __obj not in _GLOBALS.values():
            raise TemplateError(f"it calls {type(__obj).__name__}")
        return super().call(__context, __obj, *args, **kwargs)


class _Metered(NodeTransformer):
    """Puts payment where values come into being that no method of the environment sees."""

    def visit_For(self, node):
        cost = STEPS_OF_NODE + (_cost(node.test) if node.test is not None else 0)
        node = self.visit_Macro(node)
        node.iter = _through(_passes, node.iter, cost)
        return node

    def visit_Macro(self, node):
        cost = _cost(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through(_pay, nodes.Const(cost)), lineno=node.lineno))
        return node

    def visit_Getitem(self, node):
        self.generic_visit(node)
        return _through(_copied, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node):
        self.generic_visit(node)
        node.key = _through(_key, node.key)
        return node

    def visit_made(self, node):
        self.generic_visit(node)
        return _through(_weighed, node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = visit_made

    def visit_Concat(self, node):
        self.generic_visit(node)
        node.nodes = [_through(_weighed, each) for each in node.nodes]
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        node.expr = _through(_weighed, node.expr)
        for operand in node.ops:
            operand.expr = _through(_weighed, operand.expr)
        return node


def _through(function: Callable, node: nodes.Expr, *constants: int) -> nodes.Expr:
    arguments = [nodes.Const(constant) for constant in constants]
    return nodes.Filter(node, f"{function.__name__}()", arguments, [], None, None, lineno=node.lineno)


def _cost(node: nodes.Node) -> int:
    """Of running once through all of a node."""
    texts = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
    return STEPS_OF_NODE * (1 + sum(1 for _ in node.find_all(nodes.Node))) + texts


@lru_cache(maxsize=32)
def _compiled(text: str):
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_LENGTH} are taken")
    tree = _ENVIRONMENT.parse(text)
    for count, node in enumerate(tree.find_all(nodes.Node)):
        given = type(node).__name__
        if count == MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} parts")
        if not isinstance(node, _NODES):
            raise ValueError(f"line {node.lineno} has {given}, which is not taken")
        if isinstance(node, nodes.For) and node.recursive:
            raise ValueError(f"line {node.lineno} has a recursive loop, which is not taken")
        if isinstance(node, (nodes.Call, nodes.Filter, nodes.Test)) and (node.dyn_args or node.dyn_kwargs):
            raise ValueError(f"line {node.lineno} has `*` or `**` in a call, which is not taken")
        if isinstance(node, nodes.Filter) and node.node is None:
            raise ValueError(f"line {node.lineno} has a filter of a block, which is not taken")
        if isinstance(node, nodes.NSRef) and node.attr.startswith("_"):
            raise ValueError(f"line {node.lineno} has a name that begins with an underscore")
    return _ENVIRONMENT.from_string(_Metered().visit(tree))


def _plain(value: Any) -> Any:
    """What a template may see of a value: text, numbers, lists and dicts, and of anything else its kind."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"<{type(value).__name__}>"


_ENVIRONMENT = _Environment()
