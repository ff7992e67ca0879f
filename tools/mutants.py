"""Mutants of a source file: the same code with one thing of it computed otherwise."""

import ast
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass


OTHER_OPERATOR: dict[type, str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.Pow: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
OPPOSITE: dict[type, str] = {
    ast.Lt: ">=",
    ast.LtE: ">",
    ast.Gt: "<=",
    ast.GtE: "<",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
BOUNDARY: dict[type, str] = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
# Calls that an argument cannot replace without a crash, or without which nothing differs on a CPU in float32.
KEPT_CALLS = {
    "isinstance",
    "len",
    "range",
    "super",
    "float",
    "int",
    "max",
    "min",
    "zip",
    "list",
    "dict",
    "sorted",
    "getattr",
}
KEPT_CALLS |= {
    "to",
    "double",
    "contiguous",
    "view",
    "view_as",
    "expand_as",
    "items",
    "values",
    "get",
    "size",
    "check_choice",
}
KEPT_KEYWORDS = {"device", "dtype", "dim", "keepdim", "strict", "persistent"}
MODULES = {"torch", "F", "nn", "init", "math", "self", "cls"}


@dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Attributes:
        line: where the change is.
        before: the code that was changed.
        after: what it became.
        source: the whole file.
    """

    line: int
    before: str
    after: str
    source: str


def mutants_of(source: str, seed: str) -> Iterator[Mutant]:
    """Yield all mutants of a file in an order that `seed` decides; no line comes twice before every line came once."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    by_line: dict[int, list[tuple[ast.AST, str]]] = defaultdict(list)
    for node, after in _changes(ast.parse(source), source):
        by_line[node.lineno].append((node, after))
    draw = random.Random(seed)
    for changes in by_line.values():
        draw.shuffle(changes)
    seen = set()
    while by_line:
        for line in draw.sample(sorted(by_line), len(by_line)):
            node, after = by_line[line].pop()
            if not by_line[line]:
                del by_line[line]
            start, end = starts[line - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            text = source.encode()
            mutated = (text[:start] + after.encode() + text[end:]).decode()
            if mutated not in seen and ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source)):
                seen.add(mutated)
                yield Mutant(line, text[start:end].decode(), after, mutated)


def _changes(node: ast.AST, source: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield every node of code that computes with what may stand in its place."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return
        case ast.FunctionDef() | ast.ClassDef():
            below: list[ast.AST] = list(node.body)  # neither decorators nor types nor defaults
        case ast.If() if all(isinstance(statement, ast.Raise) for statement in node.body):
            below = list(node.orelse)
        case ast.AnnAssign():
            below = [node.value] if node.value else []
        case ast.comprehension():
            below = [node.iter, *node.ifs]
        case _:
            below = list(ast.iter_child_nodes(node))
            for after in _alternatives(node, lambda part: f"({ast.get_source_segment(source, part)})"):
                yield node, after
    if isinstance(node, ast.For | ast.comprehension):
        yield node.iter, f"list({ast.get_source_segment(source, node.iter)})[:1]"
    for child in below:
        yield from _changes(child, source)


def _alternatives(node: ast.AST, text) -> Iterator[str]:
    """Yield the source of what may stand in the place of a node; `text` returns that of one of its parts."""
    match node:
        case ast.BinOp(left, operator, right) if type(operator) in OTHER_OPERATOR:
            yield f"({text(left)} {OTHER_OPERATOR[type(operator)]} {text(right)})"
            yield text(left)
            if not isinstance(operator, ast.Sub | ast.Div | ast.Pow | ast.FloorDiv | ast.Mod):
                yield text(right)
        case ast.Compare(left, [operator], [right]):
            for table in (OPPOSITE, BOUNDARY):
                if type(operator) in table:
                    yield f"({text(left)} {table[type(operator)]} {text(right)})"
        case ast.BoolOp(operator, parts):
            yield "(" + (" or " if isinstance(operator, ast.And) else " and ").join(map(text, parts)) + ")"
            yield from map(text, parts)
        case ast.UnaryOp(ast.Not() | ast.Invert() | ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield text(operand)
        case ast.IfExp(_, body, orelse):
            yield text(body)
            yield text(orelse)
        case ast.Constant(bool(value)):
            yield str(not value)
        case ast.Constant(int(value)):
            yield str(value + 1)
        case ast.Constant(float(value)):
            yield str(2 * value or 1.0)
        case ast.Call():
            yield from _of_call(node, text)
        case ast.Return(ast.Call(ast.Name(name))) if name[:1].isupper():
            return
        case ast.Return(ast.Call() | ast.BinOp() as value):
            yield f"return {text(value)} * 0"
            yield f"return {text(value)} * 2"
        case ast.Subscript(value, ast.Name() as index):
            yield f"{text(value)}[{index.id} * 0]"
        case ast.Assign([ast.Name(name)], ast.Call() | ast.BinOp() | ast.Subscript() as value):
            yield f"{name} = {text(value)} * 0"
            yield f"{name} = {text(value)} * 0 + 1"
        case ast.Expr(ast.Call(ast.Attribute(ast.Call(ast.Name("super")))) | ast.Constant()):
            return
        case ast.Expr() | ast.AugAssign():
            yield "pass"
        case _:
            return


def _of_call(node: ast.Call, text) -> Iterator[str]:
    function, arguments = node.func, node.args
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    receiver = getattr(function, "value", None)
    plain = [part for part in arguments if not isinstance(part, ast.Starred)]
    called = ast.unparse(function)
    if name not in KEPT_CALLS and not name[:1].isupper():
        if receiver is not None and not (isinstance(receiver, ast.Name) and receiver.id in MODULES):
            yield text(receiver)
        elif plain:
            yield text(plain[0])
    rest = [ast.unparse(part) for part in [*arguments[2:], *node.keywords]]
    if len(plain) > 1 and plain == arguments and name not in KEPT_CALLS:
        if not any(isinstance(part, ast.Constant) for part in plain[:2]):
            yield f"{called}({', '.join([text(plain[1]), text(plain[0]), *rest])})"
    for dropped in node.keywords:
        if dropped.arg not in KEPT_KEYWORDS:
            kept = [ast.unparse(part) for part in [*arguments, *node.keywords] if part is not dropped]
            yield f"{called}({', '.join(kept)})"
