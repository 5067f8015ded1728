import threading

import pytest
import torch

from mmrdpm import machine


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def numbers_of_threads():
    """What a thread that is new to torch, and this one, compute with."""
    found = []
    fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return [*found, torch.get_num_threads()]


@pytest.mark.parametrize(("workers", "share"), [(2, 2), (3, 1), (8, 1)])
def test_things_are_done_in_order_by_workers_with_their_share_of_threads(
    four_threads, workers, share
):
    def look(thing):
        return thing, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert machine.side_by_side(look, range(5), workers) == [(i, share, True) for i in range(5)]
    assert machine.side_by_side(look, [7], workers) == [(7, share, True)]
    assert numbers_of_threads() == [4, 4]


def test_an_error_of_a_worker_is_the_callers_and_threads_stay(four_threads):
    def fail(thing):
        if thing == 1:
            raise ValueError("no such thing")
        return thing

    with pytest.raises(ValueError, match="no such thing"):
        machine.side_by_side(fail, range(4), 2)
    assert numbers_of_threads() == [4, 4]


def test_callers_take_turns_and_none_takes_anothers_share(four_threads):
    shares = []

    ready = threading.Barrier(3)

    def call():
        assert torch.get_num_threads() == 4
        ready.wait()
        for _ in range(10):
            shares.extend(machine.side_by_side(lambda _: torch.get_num_threads(), range(4), 2))
            shares.append(torch.get_num_threads() - 2)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert set(shares) == {2} and len(shares) == 150
    assert numbers_of_threads() == [4, 4]
