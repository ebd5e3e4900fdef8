"""uvicorn's connections with the limits that it lacks: no client holds one without being served."""

import asyncio
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 512  # of one more, the slowest that is not being served is broken off
HEAD_SECONDS = 10.0  # from a connection's beginning, or from an answer, to the end of the next request's head


class Connection(H11Protocol):
    """Each head in `HEAD_SECONDS`, bytes that trickle in or not; as long for a client that reads nothing of an answer.

    The time for a body is the application's.
    """

    _timer: asyncio.TimerHandle | None = None
    _since = 0.0
    _received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin()
        self._arm()
        if len(self.connections) > CONNECTIONS:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._is_at_work():
            self._begin()
            self._disarm()

    def on_response_complete(self) -> None:
        self._begin()
        self._arm()
        super().on_response_complete()  # which may begin with the next request

    def pause_writing(self) -> None:
        self._arm()
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._is_at_work():
            self._disarm()
        super().resume_writing()

    def shutdown(self) -> None:
        super().shutdown()
        if self._is_at_work() and self.cycle.more_body:  # it may take as long as its sender likes
            self.transport.abort()

    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _begin(self) -> None:
        self._since, self._received = self.loop.time(), 0

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _disarm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _make_room(self) -> None:
        """Of the address with the most connections: the oldest without a request, else the slowest upload."""
        addresses = Counter(_address(other) for other in self.connections)
        others: list[Any] = [other for other in self.connections if other is not self]
        unserved = [other for other in others if other._is_unserved()]
        unserved.sort(key=lambda other: (-addresses[_address(other)], other._speed()))
        for slowest in unserved[: CONNECTIONS // 16 or 1]:  # some at once, as the search takes its time
            self.connections.discard(slowest)
            slowest.transport.abort()

    def _is_unserved(self) -> bool:
        return not self._is_at_work() or self.cycle.more_body

    def _speed(self) -> tuple[bool, float]:
        seconds = self.loop.time() - self._since
        return (True, self._received / (1 + seconds)) if self._is_at_work() else (False, -seconds)


def _address(connection: object) -> str:
    client = getattr(connection, "client", None)
    return client[0] if client else ""
