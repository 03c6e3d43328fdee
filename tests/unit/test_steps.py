"""What is due, and when what was refused is tried again."""

from __future__ import annotations

import pytest

from overlay.control.schedule import FIRST_RETRY_S, RETRY_S, Due, Steps

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


def test_what_is_refused_is_tried_again_soon_then_less_often():
    now, said = [100.0], []

    def act() -> None:
        raise OSError(16, "busy")

    class Told:
        def problem(self, subject: str, what: str) -> None:
            said.append((subject, what))

        def solved(self, subject: str) -> None:
            said.append((subject, ""))

    steps = Steps(Told(), lambda: now[0])  # type: ignore[arg-type]
    waits = []
    for _ in range(8):
        steps.due.nat = True
        steps.step("nat", act)
        assert steps.waits("nat")
        (at,) = steps.times()
        waits.append(round(at - now[0], 3))
        now[0] = at
        steps.begin()
        assert steps.due.nat, "due again"
    assert waits == [FIRST_RETRY_S, 0.2, 0.4, 0.8, 1.6, RETRY_S, RETRY_S, RETRY_S]
    steps.step("nat", lambda: None)
    assert said[-1] == ("nat", "")
    steps.due.nat = True
    steps.step("nat", act)
    assert next(iter(steps.times())) == now[0] + FIRST_RETRY_S, "it began anew"
