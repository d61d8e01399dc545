# SPDX-License-Identifier: MIT
"""Locks by key: callers of several never wait for one another in a circle."""

import random
import threading

from blksnap_ublk.snapshot.keyed_locks import KeyedLocks


def test_one_at_a_time_for_each_key_and_nobody_for_ever() -> None:
    locks = KeyedLocks()
    seed = random.randrange(1 << 32)
    inside: set[str] = set()
    wrong: list[str] = []

    def work(generator: random.Random) -> None:
        for _ in range(300):
            keys = generator.sample("abcde", generator.randrange(1, 4))
            with locks.holding(keys):
                wrong.extend(key for key in keys if key in inside)
                inside.update(keys)
                inside.difference_update(keys)

    workers = [threading.Thread(target=work, args=(random.Random(seed + n),), daemon=True) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers), f"they wait for one another (seed {seed})"
    assert not wrong


def test_a_key_may_be_named_twice() -> None:
    locks = KeyedLocks()
    with locks.holding(["a", "a"]):
        pass
    with locks.holding(["a"]):
        pass


def test_nobody_is_waited_for() -> None:
    locks = KeyedLocks()
    with locks.trying(["a", "b"]) as held:
        assert held
        with locks.trying(["c", "b"]) as also:
            assert not also
        with locks.trying(["c"]) as other:
            assert other, "what was taken by an attempt that failed is free again"
    with locks.trying(["b"]) as again:
        assert again


def test_keys_are_independent() -> None:
    locks = KeyedLocks()
    with locks.holding(["a", "c"]), locks.holding(["b"]):
        pass
