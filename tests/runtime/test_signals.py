"""Signals that stop a run: when they are obeyed, and that none is lost or passed on."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from patchssl.runtime.signals import SIGNALS, Stopped, StopSignals, ignore_sigchld, signals_kept_from_children


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75),
                                              (signal.SIGUSR2, 75)])
def test_a_signal_is_obeyed_at_once_and_handlers_come_back(number, code):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped) as caught, StopSignals():
        send(number)
        pytest.fail("not stopped")
    assert (caught.value.number, caught.value.exit_code, str(caught.value)) == (number, code, number.name)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_who_cannot_answer_yet_holds_signals_until_somebody_listens():
    done = []
    with pytest.raises(Stopped), StopSignals(held=True) as stops:
        send(signal.SIGUSR1)
        done.append(1)
        stops.listen()
        done.append(2)
    assert done == [1]


def test_a_held_stretch_is_done_whole():
    done = []
    with pytest.raises(Stopped), StopSignals() as stops:
        with stops.held():
            done.append(1)
        with stops.held():
            send(signal.SIGTERM)
            done.append(2)
        done.append(3)
    assert done == [1, 2]


def test_a_failure_in_a_held_stretch_is_not_hidden_by_the_signal():
    with StopSignals() as stops, pytest.raises(ZeroDivisionError), stops.held():
        send(signal.SIGTERM)
        raise ZeroDivisionError


def test_what_takes_it_for_a_failure_of_its_own_cannot_swallow_it():
    with pytest.raises(Stopped), StopSignals():
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("it is no Exception")
    with StopSignals() as stops:
        with pytest.raises(Stopped):
            send(signal.SIGUSR1)  # as if swallowed
        with pytest.raises(Stopped), stops.held():
            pytest.fail("nothing is begun any more")


def test_a_second_of_the_kind_acts_as_before_and_one_of_another_kind_is_left_at_that():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with StopSignals() as stops:
            with pytest.raises(Stopped), stops.held():
                send(signal.SIGUSR1)
                send(signal.SIGTERM)
                send(signal.SIGUSR2)
                assert heard == []
                send(signal.SIGUSR1)
                assert heard == [signal.SIGUSR1]
            assert stops.received == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread_signals_are_somebody_elses():
    failed, handler = [], signal.getsignal(signal.SIGTERM)

    def work():
        with StopSignals() as stops, stops.held():
            failed.append(signal.getsignal(signal.SIGTERM) is not handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == [False]


def test_children_never_get_them():
    """From their first moment on: no handler of the parent runs in them, and they live."""
    with signals_kept_from_children():
        code = "import time; print('up', flush=True); time.sleep(0.5); print(7)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "up\n"
    for number in SIGNALS:
        child.send_signal(number)
    assert child.communicate(timeout=30)[0] == "7\n"
    assert child.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)  # here they are heard again
    with pytest.raises(Stopped), StopSignals():
        send(signal.SIGTERM)
        time.sleep(1)


@contextmanager
def raising_for_children():
    """What torch does for the processes of a loader: raise, wherever this one is."""
    def handler(number, frame):
        raise RuntimeError("a worker was killed")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_child_that_ends_does_not_break_in_where_none_is_heard():
    with raising_for_children() as handler:
        with ignore_sigchld():
            subprocess.run([sys.executable, "-c", ""], check=True)
        assert signal.getsignal(signal.SIGCHLD) is handler
        with pytest.raises(RuntimeError, match="a worker was killed"):
            send(signal.SIGCHLD)


def test_children_are_unheard_by_a_thread_that_may_not_set_handlers():
    heard = []

    def listen():
        with ignore_sigchld():
            heard.append(signal.getsignal(signal.SIGCHLD))

    with raising_for_children() as handler:
        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
    assert heard == [handler]
