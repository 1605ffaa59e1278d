"""Sphinx configuration: MyST pages in the Diátaxis folders."""

from importlib.metadata import version as _version

project = "Warmcell"
author = "Warmcell contributors"
copyright = author
release = version = _version("warmcell")

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "Warmcell"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
