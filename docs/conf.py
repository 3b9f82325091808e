"""Configuration of the documentation site: `docs/build` builds it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import examples  # noqa: E402

ACCENTS = ("\u02c6", "\u02c9", "~", "\u02d9")
"""Hat, bar, tilde, dot."""

project = "swiftkernels"
author = "The swiftkernels authors"
pyproject = (ROOT / "pyproject.toml").read_text()
version = release = re.search(r'^version = "(.+)"', pyproject, re.M)[1]  # type: ignore[index]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
# `name` in a docstring is a link where it is documented, and code elsewhere.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # Types of other projects: their inventories would have to be fetched.
    ("py:.*", r"(torch|nn|coremltools|collections|pathlib|types|typing)\..*"),
    ("py:class", "Tensor|Module|Path|Self|Any|Sequence|Mapping|Callable|Iterable|Iterator|Dataset"),
    ("py:exc", ".*Error"),
    ("py:class", r"swiftkernels\.training\.trainer\.World"),
]

# The theme that PyTorch's own documentation is built on; NumPy and SciPy use it too.
html_theme = "pydata_sphinx_theme"
html_title = f"swiftkernels {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
# These pages have no section to navigate in.
html_sidebars = {page: [] for page in ("index", "get_started", "development", "changelog")}
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "logo": {"text": f"swiftkernels {version}"},
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_prev_next": True,
    "footer_start": [],
    "footer_end": [],
}

myst_enable_extensions = ["dollarmath", "deflist", "attrs_inline"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing_anchor"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    "Pooling": "swiftkernels.ops.types.Pooling",
    "Backend": "swiftkernels.ops.types.Backend",
    "Layout": "swiftkernels.ops.types.Layout",
    "Source": "swiftkernels.models.family.Source",
    "GlobalPool": "swiftkernels.models.network.GlobalPool",
    "Indices": "swiftkernels.models.feature_info.Indices",
    "ActLayer": "swiftkernels.models.swiftformer.network.ActLayer",
    "Distillation": "swiftkernels.training.losses.Distillation",
}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes"]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def add_outputs(app: Sphinx, page: str, source: list[str]) -> None:
    """Run the examples of a page that asks for it, and show what they print."""
    if source[0].startswith("---\nrun: true\n"):
        source[0] = examples.with_outputs(source[0])


def name_aliases(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: Any,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """Sphinx writes the aliases that are parts of other types as Python objects."""
    named = (
        text and re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", text)
        for text in (signature, returned)
    )
    return next(named), next(named)


def mark_description(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Napoleon takes what stands before a colon in the docstring of a value for its type."""
    if what in ("attribute", "data") and lines:
        lines[0] = f": {lines[0]}"


def _mathml(tex: str, block: bool) -> str:
    """A formula as MathML, with the subscripts of accented letters to their right, not below."""
    namespace = "http://www.w3.org/1998/Math/MathML"
    ElementTree.register_namespace("", namespace)
    text = tex2mathml(tex, as_block=block).replace("&ApplyFunction;", "\u2061")
    root = ElementTree.fromstring(text)
    for element in root.iter(f"{{{namespace}}}munderover"):
        base, _, accent = element
        if accent.text in ACCENTS:
            element.tag = f"{{{namespace}}}msub"
            element.remove(base)
            element.remove(accent)
            accented = ElementTree.Element(f"{{{namespace}}}mover", accent="true")
            accented.extend([base, accent])
            element.insert(0, accented)
    return ElementTree.tostring(root, encoding="unicode")


def _write_math(translator: Any, node: nodes.Element, block: bool) -> None:
    try:
        mathml = _mathml(node.astext(), block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s in %s", error, node.astext(), location=node)
        raise nodes.SkipNode from None
    translator.body.append(f'<div class="math-block">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def inline_math(translator: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw themselves: no script and no network."""
    _write_math(translator, node, block=False)


def block_math(translator: Any, node: nodes.Element) -> None:
    """The same for a formula on lines of its own."""
    _write_math(translator, node, block=True)


def add_mathematics(app: Sphinx) -> None:
    """A page for the README of each operator."""
    folder = DOCS / "mathematics"
    folder.mkdir(exist_ok=True)
    for readme in ROOT.glob("swiftkernels/ops/*/README.md"):
        page = folder / f"{readme.parent.name}.md"
        text = f"```{{include}} ../../{readme.relative_to(ROOT)}\n```\n"
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", add_mathematics)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None)
    )
    app.connect("source-read", add_outputs)
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("autodoc-process-docstring", mark_description, priority=400)
