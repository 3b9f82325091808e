"""Configuration of the documentation site: `docs/build` builds it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import examples  # noqa: E402

project = "swiftkernels"
author = "The swiftkernels authors"
copyright = author
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
    ("py:.*", r"(torch|nn|numpy|np|coremltools|torchvision|collections|pathlib|typing)\..*"),
    ("py:class", r"Tensor|Module|Path|Self|Any|Sequence|Mapping|Callable|Iterable|Iterator|Dataset"),
    ("py:exc", "(.*Error)"),
]

# docs/_static is empty unless a page needs more than the theme.
html_theme = "pydata_sphinx_theme"
html_title = f"swiftkernels {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
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


def _write_math(translator: Any, node: nodes.Element, block: bool) -> None:
    mathml = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="math-block">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def inline_math(translator: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw themselves: no script and no network."""
    _write_math(translator, node, block=False)


def block_math(translator: Any, node: nodes.Element) -> None:
    """The same for a formula on lines of its own."""
    _write_math(translator, node, block=True)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None)
    )
    app.connect("source-read", add_outputs)
