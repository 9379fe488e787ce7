"""The rules of plain English that a program can check: names, and phrases.

docs/CONTRIBUTING.md has all the rules.
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

SOURCE = sorted((ROOT / "src" / "dpokit").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LETTERS = 60  # of a test's name

# Words that say nothing of the value: a noun of the field says it.
VAGUE_NAMES = {
    *("asked", "found", "given", "here", "known", "one", "ours", "own", "said", "seen", "such", "theirs", "there"),
    *("told", "wanted", "what", "words"),
}
ODD_PHRASES = re.compile(
    r"\b(is none|are none|(is|are|was|were) told|given back|wanted back|go(es)? with|st(and|ands|ood) in|"
    r"st(and|ands|ood) (there|here|twice|nowhere|beside|behind)|so many of|in vain|of ours|of theirs|"
    r"be it|is begun|was begun|were begun|look(s|ed)? on|has no effect here)\b",
    re.IGNORECASE,
)
# Each is the same thing of its folder.
SHARED_NAMES = {"main"}
PROSE_TOKENS = {
    tokenize.COMMENT,
    tokenize.STRING,
    getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
}  # from Python 3.12


def read_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each comment and string of a Python file, and of each line of a page."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in PROSE_TOKENS:
            yield token.start[0], token.string


def show(path: Path, line: int, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {text}"


def test_a_variable_has_a_noun_for_its_name():
    hits = []
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            hits += [show(path, node.lineno, name)] if name in VAGUE_NAMES else []
    assert hits == []


def test_a_sentence_has_no_odd_phrase():
    hits = []
    for path in [*SOURCE, *PAGES]:
        for line, text in read_prose(path):
            hits += [show(path, line, match[0]) for match in ODD_PHRASES.finditer(text)]
    assert hits == []


def test_the_name_of_a_test_is_short():
    hits = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > MOST_LETTERS:
                hits.append(show(path, node.lineno, node.name))
    assert hits == []


def is_verb(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a function is a verb of `dpokit`: its name is the verb's."""
    return any(ast.unparse(decorator).startswith("app.command(") for decorator in node.decorator_list)


def test_no_two_public_functions_or_classes_share_a_name():
    places = defaultdict(list)
    for path in SOURCE:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_") or is_verb(node):
                continue
            places[node.name].append(show(path, node.lineno, node.name))
    assert [hits for name, hits in places.items() if len(hits) > 1 and name not in SHARED_NAMES] == []
