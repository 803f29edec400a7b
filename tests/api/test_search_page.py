"""What the page of a search says: how far it is, what happened, which points there are."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.frontier import Frontier
from api.pages.journal import KINDS, journal
from api.pages.points import ALWAYS, PAGE_LENGTH, View, points_table, rejection
from api.pages.timeline import timeline
from db.candidates import candidates
from db.events import Event, events_after
from db.queue import claim, release
from db.searches import Search, get_search
from tests.api import examples

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def frontier(engine: Engine) -> Frontier:
    search_id = examples.finished_search(engine)
    return Frontier(get_search(engine, search_id), tuple(candidates(engine, search_id)))


def at_work(engine: Engine, **changes: Any) -> Search:
    search_id, _ = examples.claimed_search(engine)
    return replace(get_search(engine, search_id), **changes)


def event(kind: str, after: float = 0, **data: Any) -> Event:
    return Event(int(after), kind, data, BEGAN + timedelta(seconds=after))


def test_the_timeline_says_what_stages_took_and_how_long_the_present_one_may(engine: Engine) -> None:
    search = at_work(engine, stage="measure", done=10, total=40)
    ended = [
        event("stage_end", stage="profile", seconds=2.2),
        event("stage_end", stage="sensitivity", seconds=20),
        event("stage_end", stage="sensitivity", seconds=45),
    ]
    entered, step = event("stage", 100, stage="measure", total=40), event("progress", 120, done=10, total=40)
    told = timeline(search, [*ended, entered], step, BEGAN + timedelta(seconds=120))
    standings = {stage.name: (stage.standing, stage.took) for stage in told.stages}
    assert standings["profile"] == ("done", "2 s")
    assert standings["sensitivity"] == ("done", "65 s"), "of all metrics"
    assert standings["measure"] == ("now", "")
    assert list(standings)[-2:] == ["refine", "accept"]
    assert standings["accept"] == ("ahead", "")
    assert (told.title, told.done, told.total, told.elapsed) == ("Measure", 10, 40, "20 s")
    assert told.left == "about 60 s left at this pace"


def test_the_time_left_falls_while_a_step_runs_but_not_below_that_of_the_steps_after_it(engine: Engine) -> None:
    search = at_work(engine, stage="measure", done=8, total=10)
    entered = event("stage", 100, stage="measure", total=10)

    def left(step: Event | None, seconds: float) -> str:
        return timeline(search, [entered], step, BEGAN + timedelta(seconds=seconds)).left

    step = event("progress", 180, done=8, total=10)
    assert [left(step, seconds) for seconds in (180, 185, 190, 300)] == [
        "about 20 s left at this pace",
        "about 15 s left at this pace",
        "about 10 s left at this pace",
        "about 10 s left at this pace",
    ]
    assert left(event("progress", 190, done=9, total=10), 400) == "about 1 s left at this pace"
    assert left(event("progress", 200, done=10, total=10), 200) == ""
    assert left(event("progress", 90, done=8, total=10), 180) == "", "of the stage before"


def test_before_the_first_step_only_what_was_announced_is_told(engine: Engine) -> None:
    search = at_work(engine, stage="sensitivity", done=0, total=36)
    entered = event("stage", stage="sensitivity", metric="pqi", estimated_seconds=121.0, forward_passes=85.0)
    told = timeline(search, [entered], None, BEGAN + timedelta(seconds=21))
    assert told.left == "about 2 min left as announced"
    assert told.about == "pqi, about 2 min (85 forward passes)"
    late = timeline(search, [entered], None, BEGAN + timedelta(seconds=300))
    assert late.left == "", "nobody knows"
    quiet = timeline(search, [event("stage", stage="sensitivity", total=3)], None, BEGAN)
    assert (quiet.left, quiet.elapsed) == ("", "")


def test_nothing_is_under_way_before_a_worker_came_and_after_the_end(engine: Engine) -> None:
    queued = replace(at_work(engine), state="queued", stage=None)
    told = timeline(queued, [], None, BEGAN)
    assert {stage.standing for stage in told.stages} == {"ahead"}
    assert (told.title, told.left) == ("", "")
    ended = timeline(replace(queued, state="succeeded", stage="accept"), [], None, BEGAN)
    assert {stage.standing for stage in ended.stages} == {"done"}


def test_the_journal_tells_in_plain_words_the_newest_first(engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    release(engine, held)
    assert claim(engine, "another", examples.LEASE)
    texts = [entry.text for entry in journal(events_after(engine, search_id, 0, kinds=KINDS))]
    assert texts == [
        "A worker took it up again, attempt 2; it goes on from what was measured.",
        "Given back to the queue; what was measured is kept.",
        "A worker took it up.",
        "Queued.",
    ]
    told = [
        event("stage", stage="sensitivity", metric="kl", estimated_seconds=41.0, forward_passes=21.0),
        event("stage_end", stage="sensitivity", seconds=51.0),
        event("stage", stage="refine", total=40),
        event("stage_end", stage="measure", seconds=12.4, reused={"measurement": 2, "sensitivity": 1}),
        event("notice", message="the pooler is skipped"),
        event("state", state="failed"),
    ]
    assert [entry.text for entry in journal(told)] == [
        "Failed.",
        "the pooler is skipped",
        "Measure took 12 s, with 3 results of earlier searches.",
        "Refine began, 40 steps at most.",
        "Sensitivities by kl took 51 s.",
        "Sensitivities: kl, about 41 s (21 forward passes).",
    ]


def test_the_table_shows_what_fits_a_page_and_all_else_on_demand(frontier: Frontier) -> None:
    table = points_table(frontier, View())
    assert [row.point.number for row in table.rows] == [point.number for point in frontier.measured]
    counts = {group.name: group.count for group in table.groups}
    assert sum(counts.values()) == len(frontier.candidates)
    assert not table.explained
    searched = points_table(frontier, View(groups=("searched",)))
    assert {row.point.number for row in searched.rows} == {point.number for point in frontier.searched}
    assert searched.explained[0].startswith("Searched only")


def test_a_table_of_many_has_the_frontier_first_and_pages(frontier: Frontier) -> None:
    some = frontier.dominated[0]
    many = tuple(replace(some, number=1000 + index) for index in range(PAGE_LENGTH + 30))
    large = replace(frontier, candidates=(*frontier.candidates, *many))
    table = points_table(large, View())
    assert [group.name for group in table.groups if group.shown] == list(ALWAYS)
    first = points_table(large, View(groups=("over",), sort="number"))
    rest = points_table(large, View(groups=("over",), sort="number", after=first.next or 0))
    assert (len(first.rows), rest.next) == (PAGE_LENGTH, None)
    assert [row.point.number for row in first.rows + rest.rows] == sorted(
        point.number for point in large.dominated if not point.fits
    )


def test_points_are_sorted_by_any_column_and_those_without_a_value_stand_last(frontier: Frontier) -> None:
    groups = ("frontier", "over", "unmeasured")
    rows = points_table(frontier, View(groups, sort="loss", descending=True)).rows
    losses = [row.point.loss for row in rows if row.point.loss is not None]
    assert losses == sorted(losses, reverse=True)
    assert rows[-1].group == "unmeasured"
    by_nothing = points_table(frontier, View(sort="<script>"))
    assert next(column.name for column in by_nothing.columns if column.direction != "none") == "avg_bits"


def test_a_rejected_point_says_what_it_lost_to(frontier: Frontier, client: TestClient) -> None:
    rival = frontier.points[2]
    lost = replace(frontier.searched[0], costs=rival.costs, metrics={"calibration_loss": 0.01, "acceptance_loss": 0.5})
    group = points_table(replace(frontier, candidates=(*frontier.measured, lost)), View(groups=("rejected",)))
    assert f"of point {rival.number} at no more cost" in group.rows[0].reason
    assert "against" in group.rows[0].reason
    close = replace(lost, metrics={"calibration_loss": 0.01, "acceptance_loss": 1e-9})
    assert "not clearly less than" in rejection(close, frontier.measured)
    assert rejection(replace(lost, costs=dict.fromkeys(rival.costs, 0.0)), frontier.measured).endswith("unseen data.")


def test_the_address_holds_the_view_and_a_strange_one_is_refused(frontier: Frontier, client: TestClient) -> None:
    page = client.get("/searches/1?point=4&show=frontier&sort=loss&order=desc").text
    assert 'data-point="4"' in page
    assert 'aria-sort="descending"' in page
    best = frontier.best
    assert best
    assert f'id="selected" data-point="{best.number}"' in client.get("/searches/1?point=999").text
    for query in ("point=x", "order=up", "after=-1"):
        assert client.get(f"/searches/1?{query}").status_code == 422


def test_the_progress_of_a_search_that_has_ended_reloads_its_page(frontier: Frontier, client: TestClient) -> None:
    answer = client.get("/searches/1/progress")
    assert (answer.text, answer.headers["hx-refresh"]) == ("", "true")


def test_lists_keep_their_filter_from_page_to_page(client: TestClient, engine: Engine) -> None:
    for _ in range(27):
        examples.queued_search(engine, model="org/a")
    examples.queued_search(engine, model="org/b")
    page = client.get("/?model=org%2Fa&state=queued").text
    assert page.count('<tr id="search-') == 25
    assert "/?state=queued&amp;model=org%2Fa&amp;cursor=3" in page
    older = client.get("/?state=queued&model=org%2Fa&cursor=3").text
    assert older.count('<tr id="search-') == 2
    assert 'href="/?state=queued&amp;model=org%2Fa"' in older
    assert client.get("/?state=").status_code == 200
    assert client.get("/?state=asleep").status_code == 422
