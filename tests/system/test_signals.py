"""Real signals to this very process: the first waits for a safe moment, the second does not."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from mlx_ft.system.console import Console
from mlx_ft.system.signals import SIGNALS, deferred, interruptible

AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # what ends work that was asked to stop already


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


def send(number: int) -> None:
    """Send a signal to this process and give Python the moment in which it is handled."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    """They are as before, but a hang-up that came once is ignored from then on."""
    own = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = handlers()
    yield
    hung_up = [*before[:-1], signal.SIG_IGN]
    assert handlers() in (before, hung_up)
    signal.signal(signal.SIGHUP, own)


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


def lines(said: io.StringIO) -> int:
    return len(said.getvalue().splitlines())


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_interrupts_at_once(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(number)
        pytest.fail("the signal was ignored")


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", AT_ONCE)
def test_the_first_is_held_back_and_the_second_is_not(
    said: io.StringIO, first: int, second: int
) -> None:
    with pytest.raises(KeyboardInterrupt), deferred(Console(said)) as requested:
        assert not requested()
        send(first)
        assert requested() and lines(said) == 1
        assert "again to stop at once" in said.getvalue()
        send(second)
        pytest.fail("the second signal was ignored")
    assert lines(said) == 1


@pytest.mark.parametrize("first", SIGNALS)
def test_a_terminal_that_closes_is_no_second_signal(said: io.StringIO, first: int) -> None:
    """Its shell says so, and then the system, while a checkpoint is written or the run recorded."""
    with deferred(Console(said)) as requested:
        send(first)
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        assert requested()
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(signal.SIGTERM)
    send(signal.SIGHUP)
    assert lines(said) == 1
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_hang_up_that_is_ignored_stays_ignored(said: io.StringIO) -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible(), deferred(Console(said)) as requested:
        send(signal.SIGHUP)
        assert not requested()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and lines(said) == 0


def test_without_a_signal_nothing_is_said(said: io.StringIO) -> None:
    with deferred(Console(said)) as requested:
        assert not requested()
    assert lines(said) == 0


def test_inside_and_outside_keep_their_own_ways(said: io.StringIO) -> None:
    """As in a run: training holds a signal back, the stages around it do not."""
    with pytest.raises(KeyboardInterrupt), interruptible():
        with deferred(Console(said)) as requested:
            send(signal.SIGTERM)
            assert requested()
        with deferred(Console(said)) as requested:
            assert not requested(), "a request does not outlive its work"
        send(signal.SIGTERM)
        pytest.fail("the signal was ignored")


def test_an_error_inside_restores_the_handlers(said: io.StringIO) -> None:
    before = handlers()
    with pytest.raises(ValueError, match="inside"), interruptible(), deferred(Console(said)):
        assert handlers() != before
        raise ValueError("inside")
    assert handlers() == before


def test_other_threads_change_no_handlers(said: io.StringIO) -> None:
    """An embedding program's signals are its own business."""
    before = handlers()
    seen: list[object] = []

    def work() -> None:
        with interruptible(), deferred(Console(said)) as requested:
            seen.extend([handlers() == before, requested()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, False]
