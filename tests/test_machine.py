import multiprocessing
import signal
import subprocess
import sys
import threading
from threading import Event, Thread

import pytest
import torch

from mmrdpm import machine

_INTERRUPTED = """
import os, signal, time, torch
from mmrdpm import machine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
torch.set_num_threads(2)
begun, done = [], []
def work(thing):
    begun.append(thing)
    os.write(1, b"begun\\n")  # at once: lines of two threads stay apart
    time.sleep(0.5)
    done.append(thing)
try:
    machine.side_by_side(work, range(20))
except KeyboardInterrupt:
    print(len(begun) < 20, len(begun) == len(done), torch.get_num_threads())
"""


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def numbers_of_threads():
    """What a thread that is new to torch, and this one, compute with."""
    found = []
    fresh = Thread(target=lambda: found.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return [*found, torch.get_num_threads()]


def look(thing):
    return thing, torch.get_num_threads(), torch.is_inference_mode_enabled()


def test_things_are_done_in_order_on_one_core_each(four_threads):
    assert machine.side_by_side(look, range(50)) == [(i, 1, True) for i in range(50)]
    assert machine.side_by_side(look, [7]) == [(7, 1, True)]
    assert machine.side_by_side(look, []) == []
    assert numbers_of_threads() == [4, 4]


def test_as_many_at_once_as_torch_has_threads_and_with_one_in_the_callers():
    before, together = torch.get_num_threads(), threading.Barrier(3)
    try:
        torch.set_num_threads(3)
        met = machine.side_by_side(lambda _: sorted([together.wait(timeout=20)]), range(3))
        assert sorted(met) == [[0], [1], [2]]  # none could go on before all three had come
        torch.set_num_threads(1)
        assert set(machine.side_by_side(lambda _: threading.get_ident(), range(3))) == {
            threading.get_ident()
        }
    finally:
        torch.set_num_threads(before)


def test_workers_compute_in_the_callers_types(four_threads):
    a = torch.ones(4, 4)
    with torch.autocast("cpu", torch.float16):
        types = machine.side_by_side(lambda _: (a @ a).dtype, range(3))
    assert set(types) == {torch.float16}
    assert machine.side_by_side(lambda _: (a @ a).dtype, [0]) == [torch.float32]


def test_an_error_of_a_worker_is_the_callers_and_what_waits_is_not_begun(four_threads):
    begun, failed = [], Event()

    def fail(thing):
        begun.append(thing)
        if thing == 2:
            failed.set()
            raise ValueError("no such thing")
        assert failed.wait(timeout=20)
        return thing

    with pytest.raises(ValueError, match="no such thing"):
        machine.side_by_side(fail, range(1000))
    assert len(begun) < 1000
    assert numbers_of_threads() == [4, 4]


def test_threads_that_begin_while_others_work_have_the_common_number(four_threads):
    assert machine.side_by_side(lambda _: numbers_of_threads(), range(4)) == [[4, 1]] * 4
    found = []

    def call(caller):
        found.append((caller, machine.side_by_side(lambda i: (caller, i), range(20))))
        found.append((torch.get_num_threads(), []))

    callers = [Thread(target=call, args=(caller,)) for caller in "abc"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert sorted(found, key=str) == sorted(
        [(c, [(c, i) for i in range(20)]) for c in "abc"] + [(4, [])] * 3, key=str
    )


def test_workers_that_cannot_begin_are_an_error_and_the_next_call_makes_them(
    four_threads, monkeypatch
):
    machine._made.cache_clear()
    start, started = Thread.start, []

    def start_some(self):
        started.append(self)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", start_some)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            machine.side_by_side(look, range(3))
    assert numbers_of_threads() == [4, 4]
    assert machine.side_by_side(look, range(3)) == [(i, 1, True) for i in range(3)]


def test_a_forked_process_makes_workers_of_its_own(four_threads):
    machine.side_by_side(look, range(3))
    forked = multiprocessing.get_context("fork")
    child = forked.Process(target=machine.side_by_side, args=(look, range(3)))
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0


def test_ctrl_c_waits_for_what_is_at_work_and_begins_nothing_more():
    command = [sys.executable, "-c", _INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0].splitlines()
    assert said[-1] == "True True 2"


@pytest.mark.parametrize(
    ("dtype", "has", "side"),
    [(torch.bfloat16, False, 256), (torch.bfloat16, True, 2048), (torch.float32, False, 2048)],
)
def test_a_type_that_the_cpu_emulates_is_measured_by_small_products(dtype, has, side, monkeypatch):
    """Of 2048 by 2048 four would take two minutes."""
    monkeypatch.setattr(machine, "has_bfloat16", lambda _: has)
    monkeypatch.setattr(machine, "seconds", lambda *_: 2.0)
    assert machine.measured_rate(torch.device("cpu"), dtype, side=2048) == side**3
