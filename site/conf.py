"""Settings of Sphinx for the web pages. tools/pages.py puts their sources together and calls it: `make site`."""

project = "Quantized diffusion lessons"
html_title = project
language = "en"

extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"  # the pages show what is stored
nb_merge_streams = True  # a cell's printed lines in one block, whatever number of writes they came in
nb_ipywidgets_js = {}  # else a notebook with widgets fetches scripts from the network
myst_heading_anchors = 6
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]

html_theme = "furo"
pygments_dark_style = "github-dark"  # the usual one underlines the names of modules
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_use_index = False
html_domain_indices = False
html_extra_path = ["files"]  # beside the sources: what raw HTML links to

# What a reader copies is code: not the output under it, and no prompt.
copybutton_selector = "div:not(.output) > div.highlight pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ |In \[\d*\]: | {2,5}\.{3,}: "
copybutton_prompt_is_regexp = True
