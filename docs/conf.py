"""How the site is made; `python docs/build.py` makes it."""

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

import mrla  # noqa: E402

project = "mrla"
author = "the mrla authors"
copyright = "the mrla authors. Text and code: Apache-2.0"
version = release = mrla.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
    "reference_pages",
]
exclude_patterns = ["README.md", "_build"]
# A name in single backticks is a link where it is documented, else code.
default_role = "py:obj"
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# Notebooks run when the site is built, and again only when their cells have changed; `build.py` sets the variable.
nb_execution_mode = os.environ.get("MRLA_NOTEBOOKS", "cache")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
# The language of a cell is known when its kernel has run.
suppress_warnings = ["myst-nb.lexer"] if nb_execution_mode == "off" else []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "pydata_sphinx_theme"
html_title = "mrla"
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["mrla.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _language_of_page(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """A browser chooses the form of Chinese characters by the page's language."""
    if page.startswith("zh/"):
        context["language"] = "zh_CN"


def setup(app: Any) -> None:
    """Hooks of this site."""
    app.connect("html-page-context", _language_of_page)
