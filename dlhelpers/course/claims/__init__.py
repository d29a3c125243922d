"""What becomes of a tip when it is measured?

A tip is a sentence that people repeat. A claim is that tip with a metric, a threshold and the
conditions it is tried in. Evidence of one condition meets the threshold (it holds), misses it (it
fails), or its interval straddles it, as it does where the control is off (unsettled). The verdict
of the claim is the sentence made from its conditions: where the tip holds, by how much, where not,
and whether that is as the mechanism says.

In a notebook::

    claim = claims.card("fusion.speeds-up-inference")     # tip, metric, conditions: predict them
    claim.judge({"batch 1": claim.compare(unfolded, folded), ...})

Source: tips.toml and lessons/ beside this package, which name the source of each.
"""

from dlhelpers.course.claims.cards import card
from dlhelpers.course.claims.catalog import all_claims, all_tips, lessons, load
from dlhelpers.course.claims.claim import Claim, Lesson, Tip
from dlhelpers.course.claims.course import standing
from dlhelpers.course.claims.judging import Verdict, not_measured
from dlhelpers.course.claims.lights import lights_up
from dlhelpers.course.claims.predictions import answer, guess
from dlhelpers.course.claims.said import score

__all__ = [
    "Claim",
    "Lesson",
    "Tip",
    "Verdict",
    "all_claims",
    "all_tips",
    "answer",
    "card",
    "guess",
    "lessons",
    "lights_up",
    "load",
    "not_measured",
    "score",
    "standing",
]
