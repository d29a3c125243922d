"""The set-up cell and show_source, inside a real IPython."""

import html
import re

import matplotlib
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from dlhelpers.course import notebook, plots


@pytest.fixture
def shell():
    with matplotlib.rc_context():
        yield InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    InteractiveShell.clear_instance()


def displayed(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    return shown


def test_setup_seeds_sets_threads_and_says_the_machine_in_a_line(shell, monkeypatch):
    shown = displayed(monkeypatch)
    before = torch.get_num_threads()
    try:
        notebook.setup(seed=4, threads=1)
        first = torch.rand(2)
        assert torch.get_num_threads() == 1
        notebook.setup(seed=4)
        assert torch.equal(first, torch.rand(2))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert torch.__version__ in shown[0]["text/plain"]
    assert "1 thread · seed 4" in shown[0]["text/plain"]
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        notebook.setup(threads=0)


def test_figures_are_shown_as_one_picture_with_alt_text(shell, monkeypatch):
    displayed(monkeypatch)
    notebook.setup()
    figure = plots.dots([1.0, 1.1], title="t", xlabel="ratio", alt="two dots")
    data, _ = shell.display_formatter.format(figure)
    assert 'alt="two dots"' in data["text/html"]
    assert data["text/plain"] == "two dots"
    assert "image/png" not in data


def test_source_is_shown_as_it_is_written(shell, monkeypatch):
    shown = displayed(monkeypatch)
    notebook.show_source(plots.describe)
    assert "def describe(figure: Figure, alt: str)" in shown[0]["text/plain"]
    assert "highlight" in shown[0]["text/html"]
    with pytest.raises(TypeError, match="no Python source"):
        notebook.show_source(len)


def test_pyplots_own_figures_keep_the_formatter_and_the_style(shell, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr(pyplot, "switch_backend", lambda name: None)
    monkeypatch.setattr(shell, "enable_gui", lambda gui=None: None)  # as a kernel's is
    displayed(monkeypatch)
    notebook.setup()
    from matplotlib_inline.backend_inline import configure_inline_support

    configure_inline_support(shell, matplotlib.get_backend())  # what pyplot's first figure does
    figure = matplotlib.figure.Figure()
    figure.subplots().set(title="an answer", xlabel="time (s)")
    data, _ = shell.display_formatter.format(figure)
    assert 'alt="an answer; time (s)"' in data["text/html"]
    assert "image/png" not in data
    assert matplotlib.rcParams["axes.titlelocation"] == "left"


def test_setup_outside_ipython_seeds_and_shows_nothing(capsys):
    with matplotlib.rc_context():
        notebook.setup(seed=4)
    assert torch.initial_seed() == 4
    assert capsys.readouterr().out == ""


class Sample:
    """Text with <angles> & 'quotes'."""

    def method(self, n):  # a comment
        return f"{n:{len('ab')}} of {f'{n}'}" if n > 1.5 else "\u2028"


@pytest.mark.parametrize("thing", [Sample, Sample.method, notebook.setup])
def test_highlighting_loses_no_character_and_fixes_no_colour(shell, monkeypatch, thing):
    shown = displayed(monkeypatch)
    notebook.show_source(thing)
    markup = shown[0]["text/html"]
    text = html.unescape(re.sub(r"<[^>]+>", "", markup))
    assert text == shown[0]["text/plain"].rstrip("\n")
    assert all(colour.startswith("var(") for colour in re.findall(r"(?<!-)color:([^\";]+)", markup))


def test_keywords_strings_numbers_and_comments_are_told_apart():
    found = re.findall(
        r"editor-(\w+)-color,inherit\)\">([^<]+)<",
        notebook._highlighted("if x > 1:  # why\n    y = 'a'\n    z = f'{x} {y!r}'\n"),
    )
    assert [(kind, html.unescape(text)) for kind, text in found] == [
        ("keyword", "if"),
        ("number", "1"),
        ("comment", "# why"),
        ("string", "'a'"),
        ("string", "f'{x} {y!r}'"),  # one piece, from Python 3.12 on too
    ]


def test_source_that_is_no_whole_program_is_shown_too():
    assert "unfinished = (" in notebook._highlighted("    unfinished = (")


def test_the_pieces_of_an_f_string_make_one_string(monkeypatch):
    """Python 3.11 has no such tokens: those of 3.12 for ``x = f"a{f'{1}'}b"`` are given by hand."""
    import token
    import tokenize

    names = {1001: "FSTRING_START", 1002: "FSTRING_MIDDLE", 1003: "FSTRING_END"}
    monkeypatch.setattr(token, "tok_name", token.tok_name | names)
    source = """x = f"a{f'{1}'}b"\n"""
    kinds = [(1001, 4, 6), (1002, 6, 7), (1001, 8, 10), (token.NUMBER, 11, 12), (1003, 13, 14)]
    kinds += [(1002, 15, 16), (1003, 16, 17)]
    pieces = [tokenize.TokenInfo(kind, source[a:b], (1, a), (1, b), source) for kind, a, b in kinds]
    monkeypatch.setattr(tokenize, "generate_tokens", lambda readline: iter(pieces))
    assert notebook._coloured(source) == [("string", (1, 4), (1, 17))]
