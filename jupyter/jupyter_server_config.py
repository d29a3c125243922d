"""Added to the reader's own Jupyter configuration by `make lab`; replaces nothing."""

c = get_config()  # noqa: F821 - Jupyter puts it there
c.LabApp.default_url = "/lab/tree/work/00_start_here.ipynb"
c.ServerApp.answer_yes = True  # Ctrl-C ends at once
