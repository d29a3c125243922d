"""One slow script, as people write them: what does each lesson's change bring, and all together?

It trains a small network on photographs, validates, and scores a folder. Each field of
:class:`Settings` is one habit that costs time or memory. A lesson changes one field and measures it
alone with ``change``; ``changes`` shows what this machine has settled so far; only the ``Game`` of
notebook 08 combines them.
"""

from dlhelpers.course.story.board import Board
from dlhelpers.course.story.game import Game, Position
from dlhelpers.course.story.growing import Change, Changes, change, changes
from dlhelpers.course.story.parts import forever, network, score, train_batch, validate
from dlhelpers.course.story.photographs import Photos, write_parts
from dlhelpers.course.story.played import Played, Round, Score
from dlhelpers.course.story.players import best_known, diagnosing_player, in_order
from dlhelpers.course.story.runs import ScriptRun
from dlhelpers.course.story.script import Script
from dlhelpers.course.story.settings import MENU, STEPS, Settings, Step, after

__all__ = [
    "MENU",
    "STEPS",
    "Board",
    "Change",
    "Changes",
    "Game",
    "Photos",
    "Played",
    "Position",
    "Round",
    "Score",
    "Script",
    "ScriptRun",
    "Settings",
    "Step",
    "after",
    "best_known",
    "change",
    "changes",
    "diagnosing_player",
    "forever",
    "in_order",
    "network",
    "score",
    "train_batch",
    "validate",
    "write_parts",
]
