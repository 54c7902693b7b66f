import io

import pytest
from rich.console import Console

from fedftg import progress
from fedftg.config import RunConfig

RECORD = {
    "round": 2,
    "clients": [1, 4],
    "seconds": {"local": 1.5, "refine": 0.5},
    "accuracy": {"selected": 0.5, "refined": 0.625},
    "rejected": [{"client": 4, "reason": "non-finite parameter w"}],
    "rolled_back": "fine-tuning was not finite",
}


def plain(monkeypatch: pytest.MonkeyPatch) -> str:
    out = io.StringIO()
    now = iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.for_console(Console(file=out, width=80))
    assert isinstance(shown, progress.PlainLines)
    shown.start(RunConfig(name="x", rounds=10), done=0, clients=7)
    shown.phase(1, "local", 1, 2)
    shown.round_done(RECORD)
    shown.finish()
    return out.getvalue()


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds took 10 seconds, so eight more take 40."""
    lines = plain(monkeypatch).splitlines()
    assert lines == [
        "x: fedavg + fedftg, digits, 7 clients, seed 0",
        "round 2/10  selected 50.00 %  refined 62.50 %  2.0 s  0:00:40 left",
        "  client 4 rejected: non-finite parameter w",
        "  fine-tuning was not finite",
    ]


def test_names_in_brackets_are_printed() -> None:
    out = io.StringIO()
    progress.for_console(Console(file=out)).note("not used: [old]")
    assert out.getvalue() == "not used: [old]\n"


def test_bar_on_a_terminal() -> None:
    out = io.StringIO()
    shown = progress.for_console(Console(file=out, width=100, force_terminal=True))
    assert isinstance(shown, progress.Live)
    shown.start(RunConfig(name="x", rounds=10), done=1, clients=7)
    for name in ("local", "aggregate", "refine", "evaluate"):
        shown.phase(2, name, 1, 2)
    shown.round_done({**RECORD, "accuracy": {}})
    shown.finish()
    text = out.getvalue()
    assert "resumed after round 1" in text
    assert "client 4 rejected" in text
    assert "round 2/10" in text


@pytest.mark.parametrize(
    ("wanted", "watched", "shown"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_a_bar_where_it_is_watched(wanted: bool | None, watched: bool, shown: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stream := Stream())
        patch.setenv("TERM", "xterm")
        with progress.iterations(wanted) as report:
            report(1, 2)
    assert bool(stream.getvalue()) == shown


def test_a_run_shows_itself_in_notebooks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is told to; a notebook has rich's bar only with ipywidgets."""
    assert type(progress.chosen(None)) is progress.Progress
    assert type(progress.chosen(False)) is progress.Progress
    assert type(progress.chosen(True)) is progress.PlainLines
    own = progress.Progress()
    assert progress.chosen(own) is own
    monkeypatch.setattr(progress, "Console", lambda **given: Console(**{"force_jupyter": True, **given}))
    for has, shown in ((True, progress.Live), (False, progress.PlainLines)):
        monkeypatch.setattr(progress, "HAS_WIDGETS", has)
        assert type(progress.chosen(None)) is shown
    assert type(progress.chosen(False)) is progress.Progress
