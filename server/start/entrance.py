"""Where a server listens, and who gets in: nobody from the network without a key, unless the risk is named."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from peqa_server.access.browser_guard import is_loopback
from peqa_server.access.key_ring import KeyRing
from peqa_server.start.run import CannotBind, listen


@dataclass(frozen=True)
class Entrance:
    """`key_file` None: no key is asked for. `open_metrics`: none for /metrics.

    `insecure_open_to_network`: whoever reaches the address may do everything, without a key.
    `client_chat_templates`: requests may bring a chat template of their own.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    open_metrics: bool = False
    insecure_open_to_network: bool = False
    client_chat_templates: bool = False

    def listen(self) -> socket.socket:
        """The listening socket. Raises `CannotBind`, and `KeyFileError` for a key file that cannot be used."""
        if self.key_file is not None:
            KeyRing(self.key_file)
            if self.insecure_open_to_network:
                raise CannotBind(
                    "--insecure-open-to-network and --api-key-file contradict each other; give one of them"
                )
        listener = listen(self.host, self.port)
        if self.open_without_keys(listener) and not self.insecure_open_to_network:
            listener.close()
            raise CannotBind(
                f"{self.host} can be reached from other machines, and no API key is asked for: who reaches this port "
                "could generate, upload and delete tasks. Give --api-key-file FILE (peqa keys make makes one), or "
                "--host 127.0.0.1, or accept the risk with --insecure-open-to-network"
            )
        return listener

    def open_without_keys(self, listener: socket.socket) -> bool:
        """Whether other machines get in without a key."""
        return self.key_file is None and not is_loopback(listener.getsockname()[0])

    def own_host(self, listener: socket.socket) -> str | None:
        """The name that a server without keys answers to, beside loopback's; None: to any, by keys or by choice."""
        if self.key_file is not None or self.insecure_open_to_network:
            return None
        return self.host if is_loopback(listener.getsockname()[0]) else None

    def keys_said(self) -> str:
        """Which keys are asked for, for the report of a start."""
        if self.key_file is not None:
            return f"asked for, as {self.key_file} says"
        return "NONE, and open to the network" if self.insecure_open_to_network else "none asked for"
