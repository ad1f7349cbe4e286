"""The processes below `serve`: each is started, watched, and started again when it dies."""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from services.processes import StartError

logger = logging.getLogger(__name__)

RESTARTS, RESTART_WINDOW_S = 10, 300.0
"""A child that dies more often than this within the window is given up; a job that kills its workers does it thrice."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Before a child is started again; the pause doubles from death to death."""


class Child:
    """One process: `python -m services ROLE NAME …`."""

    def __init__(
        self, role: str, name: str, arguments: Sequence[str], environment: dict[str, str], fd: int | None, *, label: str
    ) -> None:
        """Describe it; nothing is started yet.

        Args:
            role: `api` or `worker`.
            name: its reward.
            arguments: further ones.
            environment: its environment.
            fd: a descriptor that it inherits.
            label: what it is called in the log.
        """
        self.role = role
        self.name = name
        self.label = label
        self.is_ready = asyncio.Event()
        self._command = [sys.executable, "-m", "services", role, name, "--announce", "--parent", str(os.getpid())]
        self._command += arguments
        self._environment = environment
        self._fd = fd
        self._process: asyncio.subprocess.Process | None = None
        self.serves: str | None = None
        self._error: str | None = None
        self._deaths: list[float] = []

    async def start(self) -> None:
        """Start the process."""
        self._error = None
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=() if self._fd is None else (self._fd,),
            start_new_session=True,  # Ctrl-C is for the supervisor, which stops the children in order
        )

    async def keep(self) -> None:
        """Watch the process, and start it again whenever it dies; returns never.

        Raises:
            StartError: it died before it was ever ready, or too often.
        """
        assert self._process is not None
        while True:
            await self._listen()
            code = await self._process.wait()
            how = self._error or f"died with exit code {code}"
            if not self.is_ready.is_set():
                raise StartError(f"{self.label}: {how}{'' if self._error else ': see the log'}")
            await self._pause(how)
            await self.start()

    async def _listen(self) -> None:
        """Read what it announces until it says no more: that it is ready, or why it ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message: dict[str, Any] = json.loads(line) if line.strip() else {}
            if "error" in message:
                self._error = str(message["error"])
            elif message:
                self.serves = message.get("serves")
                self.is_ready.set()

    async def _pause(self, how: str) -> None:
        now_s = asyncio.get_running_loop().time()
        self._deaths = [death_s for death_s in self._deaths if now_s - death_s < RESTART_WINDOW_S] + [now_s]
        count = len(self._deaths)
        if count > RESTARTS:
            raise StartError(f"{self.label}: {how}, {count} times within {RESTART_WINDOW_S:g} s: see the log")
        logger.warning("%s: %s; it is started again", self.label, how)
        await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (count - 1), LONGEST_PAUSE_S))

    def terminate(self) -> None:
        """Ask it to stop."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """End it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait(self) -> None:
        """Wait until it has ended."""
        if self._process is not None:
            await self._process.wait()
