"""A constructor's signature is the schema of its part of the configuration.

Signatures are read from source files by `ast`, so that a wrong key is refused before torch is
imported. A parameter's annotation becomes a kind (`deepclust.config.values`) that reads values.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from deepclust import types as schema
from deepclust.config.sources import TargetError, definitions, imports, parse, siblings, source
from deepclust.config.targets import ANNOTATIONS, LAYERS, check_target, resolve
from deepclust.config.values import (
    Anything,
    Choice,
    Either,
    Flag,
    Items,
    Kind,
    Nothing,
    Number,
    Refused,
    Table,
    Text,
)
from deepclust.errors import UserError, near, show, unknown_key

INJECTED = ("dim", "num_clusters", "num_samples", "in_channels", "image_size", "group")
"""Names that the program fills in where a signature asks for them without a default."""
INHERITED = "inherited"
"""`**inherited` in a constructor stands for the arguments of its class's base."""


@dataclass(frozen=True)
class Node(Kind):
    """A nested object: a mapping with its own `_target_`, checked against that signature.

    section: what it may be, of `targets.SECTIONS`; with any other word, what the user trusts alone.
    """

    section: str = ""
    words = "a mapping with its own _target_"


@dataclass(frozen=True)
class Section(Kind):
    """A nested plain section, described by a dataclass."""

    signature: Signature
    words = "a mapping"


REQUIRED = object()
"""Default of an argument that must be given."""
COMPUTED = object()
"""Default of an argument that only running the code would tell; it may be left out."""


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor."""

    kind: Kind
    default: Any = REQUIRED
    """As it would stand in YAML; or REQUIRED, or COMPUTED."""

    @property
    def optional(self) -> bool:
        """Whether it may be left out."""
        return self.default is not REQUIRED


@dataclass(frozen=True)
class Signature:
    """What a class or function accepts, in order."""

    target: str
    parameters: Mapping[str, Parameter]


# --- reading ----------------------------------------------------------------------------------


def signature(target: str) -> Signature:
    """The signature of the class or function `module.name`, read from the file it is written in.

    Raises TargetError where the module or the name is missing, with the nearest name.
    """
    module, _, name = target.rpartition(".")
    path = source(module)
    if path is None:
        hint = _hint(near(module.rpartition(".")[2], siblings(module)))
        raise TargetError(
            "there is no module"
            f" {module}{hint or '; is its folder in PYTHONPATH, or is it installed?'}"
        )
    if name not in definitions(path):
        hint = _hint(imports(path).get(name) or near(name, definitions(path)))
        raise TargetError(f"no class or function {name} is written in {module}{hint}")
    return _signature(target, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _signature(target: str, path: Path, stamp: int) -> Signature:
    return Signature(target, _parameters(definitions(path)[target.rpartition(".")[2]], path))


def _hint(word: str | None) -> str:
    return f"; did you mean {word}?" if word else ""


def _parameters(node: ast.ClassDef | ast.FunctionDef, path: Path) -> dict[str, Parameter]:
    if isinstance(node, ast.FunctionDef):
        return _arguments(node.args, path)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = _arguments(item.args, path)
            arguments.pop(next(iter(arguments)))  # self
            if item.args.kwarg is not None and item.args.kwarg.arg == INHERITED:
                arguments = {**_inherited(node, path), **arguments}
            return arguments
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return {
            item.target.id: Parameter(_kind(item.annotation, path), _default(item.value, path))
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
    return _inherited(node, path)


def _inherited(node: ast.ClassDef, path: Path) -> dict[str, Parameter]:
    """Parameters of the first base class that is written in this file or imported into it by
    name."""
    for base in node.bases:
        name = ast.unparse(base)
        if name in definitions(path):
            return _parameters(definitions(path)[name], path)
        home = imports(path).get(name)
        file = source(home.rpartition(".")[0]) if home else None
        if home and file and home.rpartition(".")[2] in definitions(file):
            return _parameters(definitions(file)[home.rpartition(".")[2]], file)
    return {}


def _arguments(arguments: ast.arguments, path: Path) -> dict[str, Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    # `defaults` belong to the last positional arguments; the ones before them must be given.
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [
        *zip(positional, [*missing, *arguments.defaults]),
        *zip(arguments.kwonlyargs, arguments.kw_defaults),
    ]
    return {
        argument.arg: Parameter(_kind(argument.annotation, path), _default(default, path))
        for argument, default in pairs
    }


def _default(node: ast.expr | None, path: Path) -> Any:
    """A default as it would stand in YAML, read without running anything."""
    if node is None:
        return REQUIRED
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "field":
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default" in options:
            return _default(options["default"], path)
        factory = options.get("default_factory")
        return {"list": [], "dict": {}}.get(ast.unparse(factory), COMPUTED) if factory else REQUIRED
    if isinstance(node, ast.Name):
        return _named_default(node.id, path)
    try:
        value = _constant(node)
    except (ValueError, TypeError):
        return COMPUTED
    return list(value) if isinstance(value, tuple) else value


def _named_default(name: str, path: Path) -> Any:
    """The value of a constant of the file, or of one that it imports from another file of ours."""
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and name in [ast.unparse(each) for each in node.targets]:
            return _default(node.value, path)
    home, _, original = imports(path).get(name, "").rpartition(".")
    file = source(home) if home.startswith("deepclust.") else None
    return _named_default(original, file) if file and file != path else COMPUTED


# --- annotations to kinds ---------------------------------------------------------------------

_PLAIN: dict[str, Kind] = {
    "int": Number(whole=True),
    "float": Number(whole=False),
    "bool": Flag(),
    "str": Text(),
    "Path": Text(),
    "None": Nothing(),
    "Any": Anything(),
    "object": Anything(),
    "list": Items(Anything(), "list"),
    "tuple": Items(Anything(), "tuple"),
    "Sequence": Items(Anything(), "list"),
    "dict": Table(Anything()),
    "Mapping": Table(Anything()),
}


def _kind(node: ast.expr | None, path: Path) -> Kind:
    """The kind that an annotation stands for. A class that is not plain data stands for a nested
    `_target_`.
    """
    if node is None:
        return Anything()
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _kind(ast.parse(node.value, mode="eval").body, path)
        return Nothing() if node.value is None else Anything()
    if isinstance(node, ast.BinOp):
        return Either.of(_kind(node.left, path), _kind(node.right, path))
    if isinstance(node, ast.Subscript):
        return _subscript(node, path)
    return _named(ast.unparse(node).rpartition(".")[2], path)


def _named(name: str, path: Path) -> Kind:
    if name in _PLAIN:
        return _PLAIN[name]
    if name in schema.ALIASES:
        base, bounds = get_args(schema.ALIASES[name])
        return Number(whole=base is int, range=bounds)
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [
            name
        ]:
            return _kind(node.value, path)
    found = definitions(path).get(name)
    if isinstance(found, ast.ClassDef) and any(
        "dataclass" in ast.unparse(item) for item in found.decorator_list
    ):
        return Section(Signature(name, _parameters(found, path)))
    home = imports(path).get(name, "")
    file = source(home.rpartition(".")[0]) if home.startswith("deepclust.") else None
    return (
        _named(home.rpartition(".")[2], file)
        if file and file != path
        else Node(ANNOTATIONS.get(name, ""))
    )


def _subscript(node: ast.Subscript, path: Path) -> Kind:
    name = ast.unparse(node.value).rpartition(".")[2]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return Choice(tuple(ast.literal_eval(item) for item in inner))
    if name == "Optional":
        return Either.of(_kind(inner[0], path), Nothing())
    if name == "Union":
        return Either.of(*(_kind(item, path) for item in inner))
    if name == "Annotated":
        return _annotated(inner, path)
    if name in ("dict", "Mapping"):
        return Table(_kind(inner[1], path))
    if name in ("list", "Sequence", "set", "frozenset", "Iterable"):
        return Items(_kind(inner[0], path), "list")
    if name == "tuple":
        many = len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is Ellipsis
        return Items(
            _kind(inner[0], path),
            "tuple",
            None if many else tuple(_kind(item, path) for item in inner),
        )
    return Anything()


def _annotated(inner: list[ast.expr], path: Path) -> Kind:
    kind = _kind(inner[0], path)
    for extra in inner[1:]:
        if (
            isinstance(extra, ast.Call)
            and "Range" in ast.unparse(extra.func)
            and isinstance(kind, Number)
        ):
            bounds = {item.arg: _constant(item.value) for item in extra.keywords if item.arg}
            return Number(kind.whole, schema.Range(**bounds))
    return kind


def _constant(node: ast.expr) -> Any:
    """What is written as a literal, `float("inf")` and `2**32 - 1` included. Raises ValueError."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "float":
        return float(ast.literal_eval(node.args[0]))
    if isinstance(node, ast.BinOp):
        left, right = _constant(node.left), _constant(node.right)
        if isinstance(node.op, ast.Pow):
            return left**right
        if isinstance(node.op, ast.Sub):
            return left - right
        raise ValueError(f"no constant: {ast.unparse(node)}")
    return ast.literal_eval(node)


# --- checking ---------------------------------------------------------------------------------


def check_arguments(
    known: Signature,
    values: Mapping[str, Any],
    path: str,
    problems: list[str],
    trust: Sequence[str] = (),
    node: bool = False,
) -> dict[str, Any]:
    """Values converted to what the signature asks for; every wrong key, type and range is added to
    `problems`.

    node: `_target_` stands among the values and is taken over as it is.
    """
    settable = {
        name: item
        for name, item in known.parameters.items()
        if name not in INJECTED or item.optional
    }
    if node:
        settable = {"_target_": Parameter(Anything()), **settable}
    read: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key in settable:
            read[key] = check_value(settable[key].kind, value, where, problems, trust)
        elif key in known.parameters:
            problems.append(f"{where}={show(value)}: is filled in by the program; leave it out")
        else:
            problems.append(unknown_key(path, str(key), value, settable))
    for name, item in settable.items():
        if not item.optional and name not in values:
            where = f"{path}.{name}" if path else name
            problems.append(f"{where} has no value; give {where}=VALUE")
    return read


def check_value(
    kind: Kind, value: Any, where: str, problems: list[str], trust: Sequence[str] = ()
) -> Any:
    """One value as its kind reads it; what is wrong with it is added to `problems`."""
    if isinstance(value, str) and value == "???":
        problems.append(f"{where} has no value; give {where}=VALUE")
        return None
    if isinstance(kind, Either) and isinstance(value, Mapping):
        kind = next((option for option in kind.options if isinstance(option, Node | Section)), kind)
    if isinstance(kind, Section) and isinstance(value, Mapping):
        return check_arguments(kind.signature, value, where, problems, trust)
    if isinstance(kind, Node) and isinstance(value, Mapping):
        return check_node(value, where, problems, section=kind.section, trust=trust)
    for inner, target in _targets(value):
        what = f"{where}{inner}={show(target)}"
        problems.append(f"{what}: no nested object belongs there; must be {kind.words}")
        return None
    try:
        return kind.read(value)
    except Refused as refused:
        problems.append(f"{where}={show(value)}: must be {kind.words}{refused.hint}")
        return None


def check_node(
    node: Mapping[str, Any],
    path: str,
    problems: list[str],
    *,
    section: str | None = None,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """A `_target_` node checked against the signature of its target, nested nodes included.

    section: what the target must be, `head`, `backbone` or `data`, unless it is trusted by name.
    Nothing that the node names is imported.
    """
    target = node.get("_target_")
    try:
        known = checked_signature(target, section, trust)
    except UserError as error:
        problems.append(f"{f'{path}.' if path else ''}_target_={show(target)}: {error}")
        return dict(node)
    return check_arguments(known, node, path, problems, trust, node=True)


def checked_signature(target: Any, section: str | None, trust: Sequence[str]) -> Signature:
    """The signature of what `_target_` names, unless it may not be built: TargetError."""
    check_target(target, section, trust)
    return _library_signature(str(target)) if target in LAYERS else signature(str(target))


def _targets(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Places and values of every `_target_` inside a value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "_target_":
                yield f"{path}._target_", item
            else:
                yield from _targets(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _targets(item, f"{path}[{place}]")


def _library_signature(target: str) -> Signature:
    """The signature of one of `LAYERS`. This imports torch."""
    arguments = inspect.signature(resolve(target)).parameters.values()
    empty = inspect.Parameter.empty
    named = [item for item in arguments if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    return Signature(
        target,
        {
            item.name: Parameter(Anything(), REQUIRED if item.default is empty else COMPUTED)
            for item in named
        },
    )
