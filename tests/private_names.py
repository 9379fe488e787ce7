"""Finds where a source tree depends on internals of other libraries: private names, and methods that it overrides."""

import ast
import builtins
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

INNER_PACKAGE = "trl."  # names imported from TRL's subpackages have a row, too
ENDINGS = {"endswith", "startswith", "removesuffix", "removeprefix"}  # their arguments are parts of names
KINDS = ("read", "call", "override", "set")  # in the order of how much each depends on the library's internals


@dataclass(frozen=True)
class Use:
    """One place that depends on a private name, or that overrides or sets a public one.

    Attributes:
        file: relative to the source tree.
        line: counted from 1.
        name: as the source has it: `_evaluate`, or `torch.utils._pytree.tree_map` for an import.
        kind: one of KINDS.
        method: the source's method, if it overrides one of the library.
        upstream: the library's functions of that name that the source calls or overrides, one for each base class.
        call: the call, if the use is one.
    """

    file: str
    line: int
    name: str
    kind: str
    method: ast.FunctionDef | ast.AsyncFunctionDef | None = None
    upstream: tuple[Any, ...] = ()
    call: ast.Call | None = None


@dataclass(frozen=True)
class OwnClass:
    file: str
    node: ast.ClassDef
    bases: tuple[str, ...]  # dotted names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_of_python(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def find_object(name: str) -> Any:
    """The module, class, function or value of a dotted name. Raises: AttributeError if it does not exist."""
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(".".join(parts[:number]))
            except ImportError as error:
                raise AttributeError(f"{'.'.join(parts[:number])} cannot be imported") from error
    return value


@cache
def read_source(thing: Any) -> str:
    """The source of the file that defines a class or a function; empty if it is not written in Python."""
    try:
        return Path(str(inspect.getsourcefile(thing))).read_text()
    except (OSError, TypeError):
        return ""


class Tree:
    """The classes of a package, and the library classes that each of them extends or is mixed with.

    Args:
        root: the package's folder, whose name is the package's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules = {str(path.relative_to(root)): ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
        self.imports = {file: dict(list_imports(module)) for file, module in self.modules.items()}
        self.classes: dict[str, OwnClass] = {}
        for file, module in self.modules.items():
            for node in ast.walk(module):
                if isinstance(node, ast.ClassDef):
                    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
                    names = tuple(self.full_name(file, ast.unparse(base)) for base in bases)
                    self.classes[f"{self.module_name(file)}.{node.name}"] = OwnClass(file, node, names)

    def module_name(self, file: str) -> str:
        return ".".join([self.root.name, *Path(file).with_suffix("").parts]).removesuffix(".__init__")

    def full_name(self, file: str, name: str) -> str:
        """The dotted name that a name in a file refers to: an import, a builtin, or a name of the file itself."""
        first, *rest = name.split(".")
        if first in self.imports[file]:
            return ".".join([self.imports[file][first], *rest])
        return f"builtins.{name}" if hasattr(builtins, first) else f"{self.module_name(file)}.{name}"

    def ancestors(self, name: str) -> Iterator[str]:
        """A class of the package and its ancestors, up to the first ones that belong to other libraries."""
        yield name
        if name in self.classes:
            for base in self.classes[name].bases:
                yield from self.ancestors(base)

    def upstream_bases(self, name: str) -> list[type]:
        """The library classes among the ancestors of a class, and of the classes that inherit from it."""
        families = [list(self.ancestors(other)) for other in self.classes]
        names = dict.fromkeys(base for family in families if name in family for base in family)
        bases = [find_object(base) for base in names if base.split(".")[0] != self.root.name]
        kinds = [kind for kind in bases if isinstance(kind, type)]
        return [kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds)]

    def find_uses(self) -> list[Use]:
        uses = [use for file, module in self.modules.items() for use in FileSearch(self, file, module).uses]
        return sorted(uses, key=lambda use: (use.file, use.line, use.name))


def list_imports(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Each name that an import defines, anywhere in a file, with its dotted name."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


class FileSearch(ast.NodeVisitor):
    """Collects the uses of private names in one file.

    Attributes:
        uses: the uses so far.
    """

    def __init__(self, tree: Tree, file: str, module: ast.Module) -> None:
        self.tree, self.file = tree, file
        self.uses: list[Use] = []
        self.parents = {child: node for node in ast.walk(module) for child in ast.iter_child_nodes(node)}
        self.own = {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        self.own |= {node.attr for node in ast.walk(module) if _is_set_of_self(node)}
        self._bases: list[list[type]] = []  # library bases of each class around the node
        self.visit(module)

    def _note(self, node: ast.AST, name: str, kind: str, **more: Any) -> None:
        self.uses.append(Use(self.file, getattr(node, "lineno", 0), name, kind, **more))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = self.tree.upstream_bases(f"{self.tree.module_name(self.file)}.{node.name}")
        for method in node.body:
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("__"):
                upstream = find_functions(bases, method.name)
                if upstream and not any(is_hook(base, method.name) for base in bases):
                    self._note(method, method.name, "override", method=method, upstream=upstream)
        self._bases.append(bases)
        self.generic_visit(node)
        self._bases.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        receiver = ast.unparse(node.value)
        if not is_private(node.attr):
            if isinstance(node.ctx, ast.Store) and self._is_imported(node.value):
                self._note(node, node.attr, "set")
            return
        kind, call = self._read_kind(node)
        if receiver in ("self", "cls", "super()"):
            bases = self._bases[-1] if self._bases else []
            upstream = find_functions(bases, node.attr)
            if upstream or any(is_in_source(base, node.attr) for base in bases):
                self._note(node, node.attr, kind, upstream=upstream, call=call)
        elif self._is_imported(node.value) or not (self._is_of_python(node.value) or node.attr in self.own):
            self._note(node, node.attr, kind)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg and is_private(node.arg):
            self._note(node, node.arg, "call")
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._note_import(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._note_import(node, f"{node.module}.{alias.name}", of=str(node.module))

    def _note_import(self, node: ast.AST, name: str, of: str = "") -> None:
        if is_of_python(name) or name.split(".")[0] == self.tree.root.name:
            return
        if any(map(is_private, name.split("."))) or (of or name).startswith(INNER_PACKAGE):
            self._note(node, name, "call")

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in ENDINGS):
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.visit(part)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Notes a private name in quotes: an argument of `getattr`, a key, a logger, an entry of a list."""
        if not isinstance(node.value, str) or not re.fullmatch(r"\w+(\.\w+)*", node.value):
            return
        is_own = is_of_python(node.value) or node.value in self.own
        if any(map(is_private, node.value.split("."))) and not is_own:
            self._note(node, node.value, "read")

    def _read_kind(self, node: ast.AST) -> tuple[str, ast.Call | None]:
        parent, child = self.parents[node], node
        if isinstance(parent, ast.Call) and parent.func is node:
            return "call", parent
        while isinstance(parent, ast.Subscript | ast.Attribute) and parent.value is child:
            parent, child = self.parents[parent], parent
        is_set = isinstance(getattr(node, "ctx", None), ast.Store) or isinstance(getattr(child, "ctx", None), ast.Store)
        return ("set" if is_set else "read"), None

    def _find_root(self, node: ast.AST) -> str:
        """The dotted name of the import that an expression begins with; empty for other expressions."""
        while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        return self.tree.imports[self.file].get(node.id, "") if isinstance(node, ast.Name) else ""

    def _is_of_python(self, node: ast.AST) -> bool:
        return is_of_python(self._find_root(node))

    def _is_imported(self, node: ast.AST) -> bool:
        root = self._find_root(node)
        return bool(root) and not is_of_python(root) and root.split(".")[0] != self.tree.root.name


def find_functions(bases: list[type], name: str) -> tuple[Any, ...]:
    """The attributes of the classes under a name, each once."""
    return tuple(dict.fromkeys(getattr(base, name) for base in bases if hasattr(base, name)))


def is_in_source(kind: type, name: str) -> bool:
    """Whether the source of a class or of an ancestor reads or sets an attribute of its instances."""
    return any(re.search(rf"\bself\.{name}\b", read_source(cls)) for cls in inspect.getmro(kind))


def is_hook(kind: type, name: str) -> bool:
    """Whether the documentation of a library or of Python asks users to override a method."""
    owners = [cls for cls in inspect.getmro(kind) if name in vars(cls)]
    texts = [inspect.getdoc(vars(cls)[name]) or "" for cls in owners]
    is_named = any(is_of_python(cls.__module__) or cls.__name__ == "TrainerCallback" for cls in owners[:1])
    return is_named or any("overrid" in text.lower() for text in texts)


def _is_set_of_self(node: ast.AST) -> bool:
    is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return is_set and ast.unparse(node.value) == "self"
