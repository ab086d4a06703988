"""Two hosts on one machine: network namespaces with a link between them, and names and process ids of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Refused(Exception):
    """The machine does not allow it; the reason."""


class Hosts:
    """``host-a`` and ``host-b``. As on many distributions, each one's own name is 127.0.1.1 on itself.

    Files in ``folder`` are common to both, but for those in ``own``, which are ``own-host-a`` and ``own-host-b``.

    Args:
        folder: for their files.

    Raises:
        Refused: no tools, or no permission.
    """

    NAMES = ("host-a", "host-b")

    def __init__(self, folder: Path) -> None:
        missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
        if missing:
            raise Refused(f"no {missing[0]} here")
        mark = secrets.token_hex(3)
        self._spaces = tuple(f"paci{mark}{letter}" for letter in "ab")
        self._folder, self._running = folder, list[subprocess.Popen[str]]()
        subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
        self.addresses = (f"{subnet}.1", f"{subnet}.2")
        try:
            for space in self._spaces:
                self._ip("netns", "add", space)
            self._ip(
                "link", "add", "wire", "netns", self._spaces[0], "type", "veth", "peer", "name", "wire", "netns",
                self._spaces[1],
            )  # fmt: skip
            for space, address in zip(self._spaces, self.addresses, strict=True):
                self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "wire")
                for link in ("lo", "wire"):
                    self._ip("-n", space, "link", "set", link, "up")
        except Refused:
            self.close()
            raise
        (folder / "own").mkdir()
        for at, name in enumerate(self.NAMES):
            (folder / f"own-{name}").mkdir()
            lines = [f"{'127.0.1.1' if other == at else self.addresses[other]} {self.NAMES[other]}" for other in (0, 1)]
            (folder / f"hosts-{name}").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")

    @staticmethod
    def _ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise Refused(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def command(self, at: int, command: Sequence[str]) -> list[str]:
        """``command`` on one of the hosts; it and all that it starts ends when the outer process is killed."""
        name = self.NAMES[at]
        binds = {f"{self._folder}/hosts-{name}": "/etc/hosts", f"{self._folder}/own-{name}": f"{self._folder}/own"}
        mounts = "".join(f'mount --bind "{there}" "{here}" && ' for there, here in binds.items())
        script = f'hostname {name} && {mounts} exec "$@"'
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self._spaces[at], *own, "bash", "-c", script, "bash", *command]

    def start(self, at: int, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start ``command`` on one of the hosts."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "MASTER_"))}
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environment}
        process = subprocess.Popen(
            self.command(at, command),
            cwd=self._folder,
            env={**kept, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def cut(self) -> None:
        """Take the link down: nothing gets through, and nobody is told."""
        self._ip("-n", self._spaces[1], "link", "set", "wire", "down")

    def close(self) -> None:
        """End what was started, and both hosts."""
        for process in self._running:
            if process.poll() is None:
                process.kill()  # unshare ends the rest
            process.wait(timeout=20)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
