"""Ctrl-C and a scheduler's SIGTERM: asked once, a job ends after its step; asked twice, at once."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """A job ended on request, with everything saved. Its text is one line for the user."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        """Keep the signal: a shell expects the exit status 128 + signum."""
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """In its ``with`` block the first SIGINT or SIGTERM sets ``signum``, the second interrupts."""

    def __init__(self) -> None:
        """Nothing asked yet."""
        self.signum = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Take over the signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
