# SPDX-License-Identifier: Apache-2.0
"""Steps that wait for each other, and otherwise run side by side."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence


class StepError(Exception):
    """A step failed; the message says which and why."""


class CancelledError(Exception):
    """Another step failed, or the user interrupted."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A thing to do.

    :ivar run: does it; returns what to tell the user, empty: nothing.
    :ivar needs: names of steps that must be over before.
    """

    name: str
    run: Callable[['Clock'], str]
    needs: tuple[str, ...] = ()


class Clock:
    """Time since the beginning, waits, and the wish to stop."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begun

    def cancel(self) -> None:
        """End all waits, now."""
        self._cancelled.set()

    def say(self, text: str, took: float | None = None) -> None:
        """One line for the user."""
        suffix = f' ({took:.1f} s)' if took is not None else ''
        with self._lock:
            print(f'[{self.seconds:6.1f} s] {text}{suffix}', flush=True)

    def wait(self, check: Callable[[], object], seconds: float,
             interval: float = 0.1) -> bool:
        """Poll until `check` is true; whether it was, in time.

        :raises CancelledError: the whole run is to stop.
        """
        end = time.monotonic() + seconds
        while not check():
            if self._cancelled.wait(interval):
                raise CancelledError
            if time.monotonic() > end:
                return False
        return True


def run(steps: Iterable[Step], clock: Clock) -> None:
    """Run all steps, each as soon as what it needs is over.

    After a failure nothing new begins.

    :raises StepError: of the first that failed.
    :raises ValueError: a step needs one that does not exist, or itself.
    """
    waiting = {step.name: step for step in steps}
    _check(waiting)
    done: set[str] = set()
    running: dict[concurrent.futures.Future[None], str] = {}
    failure: BaseException | None = None
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        try:
            while waiting or running:
                for step in _startable(waiting, done):
                    del waiting[step.name]
                    running[pool.submit(_run_one, step, clock)] = step.name
                ended, _ = concurrent.futures.wait(
                    running, return_when='FIRST_COMPLETED')
                for future in ended:
                    done.add(running.pop(future))
                    error = future.exception()
                    if error:
                        waiting.clear()
                        clock.cancel()
                        if not isinstance(error, CancelledError):
                            failure = failure or error
        except BaseException:
            clock.cancel()
            raise
    if failure:
        raise failure


def _check(steps: dict[str, Step]) -> None:
    left = dict(steps)
    done: set[str] = set()
    while ready := _startable(left, done):
        for step in ready:
            done.add(left.pop(step.name).name)
    if left:
        raise ValueError(f'{", ".join(left)}: never startable')


def _startable(waiting: dict[str, Step], done: set[str]) -> Sequence[Step]:
    return [step for step in waiting.values() if done.issuperset(step.needs)]


def _run_one(step: Step, clock: Clock) -> None:
    begun = time.monotonic()
    try:
        text = step.run(clock)
    except (StepError, CancelledError):
        raise
    except Exception as error:
        raise StepError(f'{step.name}: {error}') from error
    if text:
        clock.say(text, time.monotonic() - begun)
