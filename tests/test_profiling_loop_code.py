"""The code that takes the place of a loop gives what the loop gives, or there is no code."""

import itertools
import linecache
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlhelpers.profiling.loop_code import loop_remedy

GENERAL = "torch.vmap(turn)(all)"


class Samples:
    """A data set that counts what is read, and a loss that counts its calls."""

    def __init__(self, rows):
        self.rows, self.read = rows, 0

    def __getitem__(self, index):
        self.read += 1
        return self.rows[index]


def names():
    torch.manual_seed(0)
    rows = torch.rand(14, 6)

    def own_loss(a, b):
        own_loss.calls += 1
        return (a - b).pow(2).mean()

    own_loss.calls = 0
    return {
        "torch": torch, "F": F, "itertools": itertools,
        "o": torch.randn(14, 6, requires_grad=True), "t": rows, "y": torch.arange(14) % 6,
        "w": torch.rand(6), "e": torch.randn(9, 5), "boxes": torch.randn(3, 8, 4),
        "wanted": torch.rand(3, 8, 4), "maps": torch.randn(9, 5, 3, 3),
        "labels": torch.arange(81).view(9, 3, 3) % 5, "scores": torch.randn(14),
        "crit": nn.MSELoss(), "weighted": nn.CrossEntropyLoss(weight=torch.rand(6)),
        "data": Samples(rows), "own_loss": own_loss, "mse_loss": F.mse_loss,
    }  # fmt: skip


def remedy_of(tmp_path, source, scope):
    """Return what is told of a loop whose line is marked, and the number that it adds up."""
    file = tmp_path / "program.py"
    body = source.replace("\n", "\n    ")
    file.write_text(f"def step():\n    l = 0\n    ls = []\n    {body}\n    return l, ls\n")
    linecache.checkcache(str(file))
    exec(compile(file.read_text(), str(file), "exec"), scope)
    lines = file.read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "#!" in line)
    return loop_remedy((str(file), number, "step"), "aten::sub", scope["step"])


def over(head, turn):
    return f"for {head}:\n    l = l + {turn}  #!"


WITH_CODE = {
    "a mean of a row": over("i in range(14)", "F.mse_loss(o[i], t[i])"),
    "by another name": over("i in range(len(o))", "mse_loss(o[i], t[i])"),
    "a class weight": over("i in range(14)", "F.cross_entropy(o[i:i+1], y[i:i+1], weight=w)"),
    "one sample": over("i in range(14)", "F.cross_entropy(o[i:i + 1], y[i:i + 1])"),
    "no batch": over("i in range(14)", "F.cross_entropy(o[i], y[i])"),
    "a factor": over("i in range(14)", "F.cross_entropy(o[i], y[i]) * w[y[i]]"),
    "a divisor": over("i in range(14)", "F.cross_entropy(o[i], y[i]) / 14"),
    "label smoothing": over("i in range(14)", "F.cross_entropy(o[i], y[i], label_smoothing=0.1)"),
    "a sum of a row": over("i in range(14)", "F.l1_loss(o[i], t[i], reduction='sum')"),
    "a map of labels": over("i in range(9)", "F.cross_entropy(maps[i:i+1], labels[i:i+1])"),
    "a module": over("a, b in zip(o, t)", "crit(a, b)"),
    "a module with a batch": over("a, b in zip(o, t)", "crit(a.unsqueeze(0), b.unsqueeze(0))"),
    "a weighted module": over("a, b in zip(o, y)", "weighted(a[None], b[None])"),
    "a target made on the way": over("a, b in zip(o, t)",
        "F.binary_cross_entropy_with_logits(a, b.sigmoid())"),
    "pos_weight": over("i in range(14)",
        "F.binary_cross_entropy_with_logits(o[i], t[i], pos_weight=w)"),
    "the last dimension": over("i in range(14)",
        "F.kl_div(F.log_softmax(o[i], -1), t[i].softmax(-1), reduction='sum')"),
    "numbers": over("i in range(14)", "F.mse_loss(scores[i], t[i, 0])"),
    "a square": over("i in range(14)", "((o[i] - t[i]) ** 2).mean()"),
    "the largest": over("i in range(14)", "(o[i] - t[i]).abs().max()"),
    "two losses": over("i in range(14)",
        "F.mse_loss(o[i], t[i]) + 0.1 * F.l1_loss(o[i], t[i])"),
    "columns": over("c in range(6)", "F.mse_loss(o[:, c], t[:, c])"),
    "the last axis": over("c in range(6)", "o[..., c].std()"),
    "a part of the rows": over("i in range(3, 12)", "F.mse_loss(o[i], t[i])"),
    "neighbours": over("i in range(13)", "F.mse_loss(o[i], o[i + 1])"),
    "an inner product": over("a, b in zip(o, t)", "F.cosine_similarity(a, b, dim=0)"),
    "enumerate": over("i, a in enumerate(o)", "F.mse_loss(a, t[i])"),
    "less": "for i in range(14):\n    l = l - F.logsigmoid(o[i] @ t[i])  #!",
    "in place": "for i in range(14):\n    l += F.huber_loss(o[i], t[i], delta=0.3)  #!",
    "a number": "for i in range(14):\n    l += F.mse_loss(o[i], t[i]).item()  #!",
    "names on the way": "for i in range(14):\n    a = o[i]\n    d = a - t[i]  #!\n"
        "    l = l + d.abs().mean()",
    "nested": "for b in range(3):\n    for k in range(8):\n"
        "        l = l + F.smooth_l1_loss(boxes[b, k], wanted[b, k])  #!",
    "nested, one index each": "for b in range(3):\n    for k in range(8):\n"
        "        l = l + F.smooth_l1_loss(boxes[b][k], wanted[b][k], beta=0.5)  #!",
    "pairs below": "for i in range(9):\n    for j in range(i):\n"
        "        l = l + (e[i] - e[j]).pow(2).sum()  #!",
    "pairs of one class or of two": "for i in range(9):\n    for j in range(i):\n"
        "        d = (e[i] - e[j]).pow(2).sum()  #!\n"
        "        l = l + (d if y[i] == y[j] else F.relu(9 - d))",
    "a norm in a formula": over("i in range(14)", "1 / (1 + (o[i] - t[i]).square().sum())"),
    "pairs above": "for i in range(9):\n    for j in range(i + 1, 9):\n"
        "        l = l + F.mse_loss(e[i], e[j])  #!",
    "pairs": "for i, j in itertools.combinations(range(9), 2):\n"
        "    l += F.relu(1 - e[i] @ e[j])  #!",
    "a generator": "l = sum(F.cross_entropy(o[i:i + 1], y[i:i + 1]) for i in range(14))  #!",
    "sums in a loop": "for i in range(9):\n"
        "    l = l + sum(F.mse_loss(e[i], e[j]) for j in range(9))  #!",
    "sums in a sum": "l = sum(sum(F.mse_loss(e[i], e[j]) for j in range(9))"
        " for i in range(9))  #!",
    "a list": "for i in range(14):\n    ls.append(F.mse_loss(o[i], t[i]))  #!",
    "a comprehension": "ls = [F.l1_loss(a, b) for a, b in zip(o, t)]  #!",
    "rows": "for a in boxes:\n    ls.append((a - a.mean()) / a.std())  #!",
}  # fmt: skip


@pytest.mark.parametrize("source", WITH_CODE.values(), ids=WITH_CODE)
def test_the_code_computes_what_the_loop_computes(tmp_path, source):
    scope = names()
    remedy = remedy_of(tmp_path, source, scope)
    assert GENERAL not in remedy
    code = remedy.partition("  # ")[0]
    before, _, last = code.rpartition("; ")
    exec(before, scope)
    given = eval(last, scope)
    total, rows = scope["step"]()
    torch.testing.assert_close(given, torch.stack(rows) if rows else torch.as_tensor(total))
    assert not re.search(r"(^|; )\w*(slice|range|len)\(", code)


WITHOUT_CODE = {
    "a loss that vmap goes through": over("i in range(14)",
        "F.kl_div(F.log_softmax(o[i], 0), t[i].softmax(0))"),
    "a draw": over("i in range(14)", "F.mse_loss(F.dropout(o[i]), t[i])"),
    "a loss of the program": over("i in range(14)", "own_loss(o[i], t[i])"),
    "a data set": over("i in range(14)", "F.mse_loss(o[i], data[i])"),
    "in place": over("i in range(9)", "F.relu(e[i], True).sum()"),
    "a branch": "for i in range(14):\n    if i % 2:\n        l = l + F.mse_loss(o[i], t[i])  #!",
    "turns left out": "for i in range(14):\n    if i == 3:\n        continue\n"
        "    l = l + F.mse_loss(o[i], t[i])  #!",
    "rows that grow": over("i in range(2, 9)", "e[:i].sum()"),
    "heads": "for h in range(3):\n    s = slice(2 * h, 2 * h + 2)\n"
        "    p = (o[..., s] @ t[..., s].T).softmax(-1)  #!\n    ls.append(p @ o[..., s])",
    "a recurrence": "h = e[0]\nfor i in range(9):\n    h = torch.tanh(h + e[i])  #!",
}  # fmt: skip


@pytest.mark.parametrize("source", WITHOUT_CODE.values(), ids=WITHOUT_CODE)
def test_where_no_code_is_known_to_be_the_same_none_is_shown(tmp_path, source):
    remedy = remedy_of(tmp_path, source, names())
    assert remedy.startswith("one torch.sub on a tensor")
    assert GENERAL in remedy


@pytest.mark.parametrize(
    "source",
    [
        "for i in range(9):\n    l = l + sum(F.mse_loss(e[i], e[j]) for j in range(9)) / 9  #!",
        "for i in range(9):\n    ls.append(sum(F.mse_loss(e[i], e[j]) for j in range(9)))  #!",
        "l = sum(sum(F.mse_loss(e[i], e[j]) for j in range(9)) / 9 for i in range(9))  #!",
        "for i in range(9):\n    s = 0\n    for j in range(9):\n"
        "        s = s + F.mse_loss(e[i], e[j])  #!\n    l = l + s / 9",
    ],
    ids=["a divisor", "a list", "a divisor in a sum", "a sum on the way"],
)
def test_of_loops_that_do_more_the_inner_one_alone_is_told(tmp_path, source):
    scope = names()
    code = remedy_of(tmp_path, source, scope).partition("  # ")[0]
    scope["i"] = 3
    wanted = sum(F.mse_loss(scope["e"][3], scope["e"][j]) for j in range(9))
    before, _, last = code.rpartition("; ")
    exec(before, scope)
    torch.testing.assert_close(eval(last, scope), wanted)


def test_nothing_of_the_program_is_called_but_by_its_own_step(tmp_path):
    scope = names()
    turn = "own_loss(o[i], data[i])"
    remedy_of(tmp_path, over("i in range(14)", turn), scope)
    assert scope["own_loss"].calls == scope["data"].read == 14
    rows = scope["rows"] = iter(scope["t"])
    remedy_of(tmp_path, over("a in itertools.islice(rows, 9)", "a.sum()"), scope)
    assert len(list(rows)) == 5
    before = scope["e"].clone()
    remedy_of(tmp_path, over("a in e", "a.sigmoid_().sum()"), scope)
    torch.testing.assert_close(scope["e"], before.sigmoid())


def test_the_step_runs_once_more_at_most(tmp_path):
    scope, runs = names(), []
    for source in (WITH_CODE["nested"], WITH_CODE["pairs"], WITHOUT_CODE["a draw"]):
        remedy_of(tmp_path, source, scope)
        own = scope["step"]
        line = str(tmp_path / "program.py"), own.__code__.co_firstlineno + 4, "step"
        runs.clear()
        loop_remedy(line, "aten::sub", lambda own=own: (runs.append(1), own()))
        assert len(runs) <= 1


@pytest.mark.parametrize("source", ["x = a + b  #!", "for :", ""])
def test_a_line_without_a_loop_is_told_the_general_form(tmp_path, source):
    file = tmp_path / "program.py"
    file.write_text(source)
    remedy = loop_remedy((str(file), 1, "step"), "aten::sub", lambda: None)
    assert "torch.sub" in remedy
    assert GENERAL in remedy
    assert "sub" not in loop_remedy(("<stdin>", 1, "step"), "aten::select")


def test_a_step_that_raises_is_told_the_general_form(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(over("i in range(14)", "F.mse_loss(o[i], t[i])"))
    assert GENERAL in loop_remedy((str(file), 2, "<module>"), "aten::sub", lambda: next(iter(())))
