"""What is due, and when what was refused is tried again."""

from __future__ import annotations

import pytest

from overlay.steps import Due

KINDS = sorted(name for name in (*Due.__annotations__, *vars(Due)) if not name.startswith("_") and name != "everything")
COSTLY = {"dump": ["dump", "guard_check", "pods"], "guard": ["guard"]}
"""What costs more with more peers, by what asks for it."""


def cleared() -> Due:
    due = Due()
    for name in KINDS:
        setattr(due, name, False)
    return due


def test_at_the_start_and_after_lost_events_all_is_due():
    start, later = Due(), cleared()
    later.everything()
    assert [name for name in KINDS if not getattr(start, name)] == []
    assert [name for name in KINDS if not getattr(later, name)] == []


@pytest.mark.parametrize("dump", [False, True])
@pytest.mark.parametrize("guard", [False, True])
def test_a_full_look_spares_what_it_is_told_to(dump, guard):
    due = cleared()
    due.everything(dump=dump, guard=guard)
    spared = {*([] if dump else COSTLY["dump"]), *([] if guard else COSTLY["guard"])}
    assert {name for name in KINDS if not getattr(due, name)} == spared


@pytest.mark.parametrize("name", sorted({*COSTLY["dump"], *COSTLY["guard"]}))
def test_what_was_due_stays_due_when_a_look_spares_it(name):
    due = cleared()
    setattr(due, name, True)
    due.everything(dump=False, guard=False)
    assert getattr(due, name)
