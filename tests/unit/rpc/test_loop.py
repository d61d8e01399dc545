# SPDX-License-Identifier: MIT
"""The event loop: timers in order, signals, callbacks that fail, descriptors that are closed within a round."""

import os
import signal

import pytest

from blksnap_ublk.rpc.loop import Loop


def test_timers_come_in_order_and_can_be_cancelled() -> None:
    loop = Loop()
    seen: list[str] = []
    loop.later(0.02, lambda: seen.append("second"))
    loop.later(0.01, lambda: seen.append("first"))
    loop.later(0.015, lambda: seen.append("never")).cancel()
    loop.later(0.03, loop.stop)
    loop.run()
    loop.close()
    assert seen == ["first", "second"]


def test_a_callback_that_fails_is_logged_and_the_loop_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.later(0, lambda: 1 // 0)  # type: ignore[arg-type]
    loop.later(0, loop.stop)
    loop.run()
    loop.close()
    assert "ZeroDivisionError" in caplog.text


def test_a_signal_calls_back() -> None:
    loop = Loop()
    seen: list[str] = []

    def on_signal() -> None:
        seen.append("signal")
        loop.stop()

    loop.on_signal(signal.SIGUSR1, on_signal)
    loop.later(0, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    loop.run()
    loop.close()
    assert seen == ["signal"]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_what_is_closed_by_a_callback_is_not_called_in_the_same_round() -> None:
    loop = Loop()
    pipes = [os.pipe() for _ in range(2)]
    called: list[int] = []

    def on_readable(index: int) -> None:
        called.append(index)
        loop.unwatch(pipes[1 - index][0])
        loop.stop()

    for index, (hear, say) in enumerate(pipes):
        loop.watch(hear, lambda index=index: on_readable(index))  # type: ignore[misc]
        os.write(say, b"x")
    loop.run()
    loop.close()
    assert len(called) == 1
    for pipe in pipes:
        for end in pipe:
            os.close(end)
