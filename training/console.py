"""What a person sees: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from tqdm import tqdm

_LINE_EVERY = 60.0


class Console:
    """Lines on stdout; within an epoch a bar on a terminal, elsewhere a line per minute.

    Args:
        active: Whether this process speaks.
        total: Steps of an epoch.
    """

    def __init__(self, active: bool, total: int) -> None:
        self.active = active
        self._total = total
        self._bar: tqdm | None = None
        self._told_at = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            self._told_at = time.monotonic()

    def advance(self, label: str, done: int, note: str) -> None:
        """Show that `done` steps of the epoch called `label` are taken, and how it goes."""
        if not self.active:
            return
        if not sys.stderr.isatty():
            if time.monotonic() - self._told_at >= _LINE_EVERY:
                self.say(f"{label}  step {done}/{self._total}  {note}")
            return
        if self._bar is None:
            self._bar = tqdm(total=self._total, desc=label, unit="step", leave=False)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag; a second signal ends the process at once."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        names = ("SIGTERM", "SIGINT", "SIGUSR1")
        self._numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        for number in self._numbers:
            signal.signal(number, self._ask)
        if hasattr(os, "register_at_fork"):
            self._listen()

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self._asked_at is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # launchers and terminals send the same signal twice within moments
        if self._asked_at is not None and time.monotonic() - self._asked_at > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked_at = self._asked_at or time.monotonic()

    def _listen(self) -> None:
        # while the main thread waits in a collective, no handler of Python's is called
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # what is sent to a loading process is not meant for this one
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._end, args=(reader,), daemon=True).start()

    def _end(self, reader: int) -> None:
        asked_at = None
        while True:
            number = os.read(reader, 1)[0]
            if number in self._numbers:
                asked_at = asked_at or time.monotonic()
                if time.monotonic() - asked_at > 1:
                    # the handler comes first if it can
                    time.sleep(0.5)
                    os._exit(128 + number)


def duration(seconds: float) -> str:
    """`h:mm:ss`, without leading hours when there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
