"""Sphinx settings. ``make docs`` builds with ``-W -n``: every warning is an error."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.errors import ConfigError
from sphinx.util.nodes import make_refnode

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import aiordt  # noqa: E402  (found through the line above)
import aiordt.abc  # noqa: E402
import aiordt.collective  # noqa: E402
import aiordt.flow  # noqa: E402
import aiordt.weights  # noqa: E402

project = "aiordt"
author = "The aiordt developers"
project_copyright = author
version = release = aiordt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "aiordt"
html_static_path = ["_static"]
html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "py:obj"  # docstrings name things in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Cost", "Cancellation", "Ownership", "Source"]

# No intersphinx: the build must work without a network. Names of other projects are text.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"_?(abc|asyncio|collections|contextlib|numpy|pickle|ray|socket|torch|typing)(\..*)?",
    ),
    ("py:.*", r"(builtins\.)?(BaseException|Exception|TimeoutError|TypeError|ValueError)"),
    ("py:.*", r"(bool|bytes|dict|float|int|list|memoryview|object|str|tuple|type|None)"),
    # The same, as they stand in annotations that are not evaluated.
    ("py:class", r"(Any|Callable|ClassVar|Iterable|AsyncIterator|Mapping|Self|Sequence)"),
    ("py:class", r"(AbstractAsyncContextManager|Item|ObjectRef|TracebackType|np\.\w+|tuple\[str)"),
    ("py:class", r"Layout"),  # described where it is taken
    ("py:class", r"(aiordt\._\w+\.)?(_[A-Z]|Message)"),  # type variables; the wire's messages
]

_FLOW = {name: f"aiordt.flow.{name}" for name in aiordt.flow.__all__}
_PUBLIC = {
    **_FLOW,
    **{name: f"aiordt.{name}" for name in aiordt.__all__},
    **{name: f"aiordt.abc.{name}" for name in aiordt.abc.__all__},
    **{name: f"aiordt.weights.{name}" for name in aiordt.weights.__all__},
    "MemberGroup": "aiordt.collective.MemberGroup",
}


def _find_public(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Link names to where they are public, whatever private module they come from."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    head, _, last = target.rpartition(".")
    public = {**_PUBLIC, **_FLOW} if head.startswith("aiordt.flow") else _PUBLIC
    full = public.get(last)
    if full is None and (owner := _PUBLIC.get(head.rpartition(".")[2])):
        full = f"{owner}.{last}"  # a member: `TensorRef.release`
    elif full is not None and head and not head.startswith("aiordt"):
        return None  # torch.method is not ours
    found = env.domains.python_domain.objects.get(full or "")
    if found is None:
        return None
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode)


def _literal_invariants(_app: Sphinx, what: str, *rest: object) -> None:
    """Keep the columns of a module's list of invariants."""
    lines = rest[-1]
    if what == "module" and isinstance(lines, list):
        lines[:] = [re.sub(r"^(Invariants.*):$", r"\1::", line) for line in lines]


def _check_settings() -> None:
    """Hold the table of settings to `aiordt.Config`."""
    text = (HERE / "how-to" / "configure.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (?:`([^`]+)`|[^|]+) \|", text, re.MULTILINE)
    fields = []
    for field in dataclasses.fields(aiordt.Config):
        default = field.default
        if default is dataclasses.MISSING:
            shown = ""  # said in words
        else:
            shown = ",".join(default) if isinstance(default, tuple) else f"{default:_}"
        fields.append((field.name, f"AIORDT_{field.name.upper()}", shown))
    if rows != fields:
        raise ConfigError(f"how-to/configure.md has {rows}, but aiordt.Config has {fields}")


def _check_quickstart() -> None:
    """Hold the README's quickstart to the example that the tests run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- quickstart -->\n```python\n(.*?)```", readme, re.DOTALL)
    example = ast.parse((ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8"))
    for part in ast.walk(example):
        if isinstance(
            part, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(part):
            del part.body[0]
    if found is None or ast.dump(ast.parse(found[1])) != ast.dump(example):
        raise ConfigError("README.md's quickstart is not examples/quickstart.py without docstrings")


def setup(app: Sphinx) -> None:
    """Register the resolver, and check what is written by hand."""
    app.connect("missing-reference", _find_public)
    app.connect("autodoc-process-docstring", _literal_invariants, priority=400)
    _check_settings()
    _check_quickstart()
