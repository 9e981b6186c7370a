"""What reaches a terminal cannot steer it, and what takes long says how long."""

import errno
import io
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.system.console import LOG_EVERY_SECONDS, Console, ProgressLine
from mlx_ft.text.safe import printable
from mlx_ft.text.sparklines import BARS, sparkline

ESCAPE = "\x1b"
MONOTONIC = "mlx_ft.system.console.time.monotonic"
# The escape sequences that set a colour; bold and cursor movement are not colours.
COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3\d|4\d|9\d|10\d)(?:;[\d;]*)?m")


class Clock:
    """Stands in for time.monotonic: time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(MONOTONIC, clock)
    return clock


@given(text=st.text())
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    """No control, format or surrogate character is left, and nothing else is touched."""
    shown = printable(text)
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        steers = unicodedata.category(before) in ("Cc", "Cf", "Cs") and before not in "\n\t"
        assert after == ("\N{REPLACEMENT CHARACTER}" if steers else before)


@pytest.mark.parametrize(
    "character", ["\x1b", "\x00", "\x07", "\r", "\x9b", "\u202e", "\u2066", "\u200f", "\ud800"]
)
def test_the_known_tricks_are_replaced(character: str) -> None:
    assert printable(f"a{character}b") == "a\N{REPLACEMENT CHARACTER}b"


@given(text=st.text(), limit=st.integers(1, 30))
def test_a_limit_is_a_limit_and_a_cut_is_shown(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert shown == printable(text) or shown.endswith("…")


def test_a_model_cannot_steer_through_say() -> None:
    stream = io.StringIO()
    Console(stream).say(f"{ESCAPE}[2J[bold]not markup[/bold] :smile: ‮")
    assert (
        stream.getvalue() == "\N{REPLACEMENT CHARACTER}[2J[bold]not markup[/bold] :smile: \ufffd\n"
    )


def test_long_lines_are_not_broken() -> None:
    stream = io.StringIO()
    Console(stream).say("word " * 100)
    assert stream.getvalue() == "word " * 100 + "\n"


@given(
    start=st.floats(0, 90),
    pace=st.floats(0.01, 5),
    steps=st.lists(st.floats(0.1, 3), min_size=1, max_size=5),
)
def test_the_estimate_is_right_however_much_was_done_before(
    start: float, pace: float, steps: list[float]
) -> None:
    """At a constant pace (seconds a unit), the time left is what is left times the pace."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MONOTONIC, clock)
        line = ProgressLine("training", 120.0, io.StringIO(), None)
        clock.now += 500.0  # loading, before the first update
        done = start
        line.update(done)
        assert line.seconds_left(done) is None, "nothing is known at the first update"
        for step in steps:
            done += step
            clock.now += step * pace
            line.update(done)
            expected = (120.0 - done) * pace
            assert line.seconds_left(done) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_work_that_begins_anew_is_estimated_anew(clock: Clock) -> None:
    """First the frozen layers go from 0 to 1, then a resumed run goes on at one half."""
    line = ProgressLine("training", 1.0, io.StringIO(), None)
    for row in range(1, 5):
        line.update(row / 4)
        clock.now += 1.0
    line.update(0.5)
    assert line.seconds_left(0.5) is None
    clock.now += 10.0
    line.update(0.6)
    assert line.seconds_left(0.6) == pytest.approx(40.0)


def test_a_log_gets_a_line_now_and_then_with_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(stream).progress("training", 100.0) as line:
        for done in range(101):
            line.update(float(done), f"iteration {done}")
            clock.now += 1.0
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 15 % iteration 15, 1 min 25 s left"
    assert len(lines) == 100 // int(LOG_EVERY_SECONDS)
    shares = [int(line.split()[1]) for line in lines]
    assert all(later - earlier == 15 for earlier, later in pairwise(shares))
    assert ESCAPE not in stream.getvalue()


SCRIPT = """
import sys, time
from mlx_ft.system.console import Console
console = Console()
console.heading("Training")
console.say("careful", "red")
with console.progress("training", 10.0) as line:
    for done in range(11):
        line.update(float(done), "iteration")
        time.sleep(0.02)
"""


def on_a_terminal(**variables: str) -> str:
    """Run the script with a pseudo-terminal as stderr; return what it wrote there."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color", **variables},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return written.decode()


def test_a_terminal_gets_a_bar_and_no_color_is_obeyed() -> None:
    coloured, plain = on_a_terminal(), on_a_terminal(NO_COLOR="1")
    for written in (coloured, plain):
        assert "Training" in written and "100 % iteration" in written and "left" in written
    assert COLOUR.search(coloured)
    assert not COLOUR.search(plain)
    dumb = on_a_terminal(NO_COLOR="1", TERM="dumb")
    assert ESCAPE not in dumb and "Training" in dumb


def test_a_pipe_gets_no_escape_codes_and_nothing_on_stdout() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0
    assert done.stderr == "Training\ncareful\n"
    assert done.stdout == ""


@pytest.mark.parametrize("opened", [os.pipe, pty.openpty])
def test_narration_goes_on_when_its_reader_is_gone(
    clock: Clock, opened: Callable[[], tuple[int, int]]
) -> None:
    """A pipe that is closed, and a terminal: lines, a bar, rare lines of a log, the last flush."""
    theirs, ours = opened()
    with os.fdopen(ours, "w", buffering=1) as stream:
        told = Console(stream)
        os.close(theirs)
        told.say("nobody hears this")
        with told.progress("training", 100.0) as line:
            for done in range(101):
                line.update(float(done), "iteration")
                clock.now += 1.0
        told.say("x" * 100_000)


def test_a_disk_that_is_full_is_no_reader_that_is_gone() -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Console(Full()).say("x")


def test_a_process_without_a_reader_ends_as_it_would_with_one() -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    done = subprocess.run([sys.executable, "-c", SCRIPT], stderr=ours, timeout=60, check=False)
    os.close(ours)
    assert done.returncode == 0


@given(st.lists(st.integers(0, 10**6), max_size=30))
def test_a_sparkline_has_a_bar_for_each_count_and_none_for_nothing(counts: list[int]) -> None:
    bars = sparkline(counts)
    assert len(bars) == len(counts)
    assert [bar == " " for bar in bars] == [count == 0 for count in counts]
    heights = [BARS.index(bar) for bar in bars]
    assert [heights[i] for i in sorted(range(len(counts)), key=counts.__getitem__)] == sorted(
        heights
    )
    assert not any(counts) or max(heights) == len(BARS) - 1
