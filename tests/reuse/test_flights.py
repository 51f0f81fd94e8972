"""Prompts that are being computed, as several threads see them."""

import threading

import numpy as np

from octavo.reuse.flights import Flight, Flights


def test_a_prompt_that_begins_while_another_lands_is_not_lost():
    flights, first, second = Flights(), *(Flight("", np.arange(3, dtype=np.int32), ()) for _ in range(2))
    flights.add(first)
    other = threading.Thread(target=flights.add, args=(second,))

    class Slow(list):
        def __iter__(self):
            seen = list(super().__iter__())
            other.start()
            other.join(0.1)
            return iter(seen)

    flights.all = Slow(flights.all)
    flights.land(first)
    other.join()
    assert flights.all == [second]
    assert first.landed.is_set()
