"""Sphinx configuration."""

import randbatch

project = "randbatch"
author = copyright = "the randbatch authors"  # noqa: A001
version = release = randbatch.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"randbatch {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes stand in the docstrings
autodoc_preserve_defaults = True
napoleon_google_docstring = True
nitpicky = False
