"""Over HTTP: the state of sessions, and the settings of the group.

    PUT, GET, DELETE /v2/state/{session}/{key}     bytes; both names percent-encoded
    GET, PUT /v2/admin/settings                    JSON; for administrators

Every answer to a change has the header ``Paddle-Ft-Term: term.sequence``, which says where it
stands. A GET that sends it back is answered by a replica that has the change, or says that it has
not yet (503), or that the change is lost (409). A GET answers with it, too: with where the state
stands that it has read.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping

from paddle_ft.serve import wire
from paddle_ft.serve.http import Call, Reply, json_reply, timeout_s, while_connected
from paddle_ft.serve.ledger import name_of
from paddle_ft.serve.log import Position
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.settings import Settings
from paddle_ft.serve.tensors import BadRequest

TERM_HEADER = "paddle-ft-term"
READ_S = 1.0
"""How long a read waits for a change, unless it brings a limit of its own; then that, at most
READ_MAX_S."""
READ_MAX_S = 30.0
CHANGE_S = 5.0


def position(text: str) -> Position:
    """The one that ``token`` made ``text`` of; raises BadRequest."""
    found = re.fullmatch(r"(\d{1,19})\.(\d{1,19})", text, re.ASCII)
    if found is None:
        raise BadRequest("Paddle-Ft-Term is TERM.SEQUENCE, as an answer to a change had it")
    return Position(int(found[1]), int(found[2]))


def token(at: Position) -> str:
    return f"{at.term}.{at.sequence}"


class StateApi:
    """What HTTP answers of a group, once there is one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group: Replicated | None = None

    @property
    def operations(self) -> Mapping[str, Callable[[Call], Awaitable[Reply]]]:
        """By the name in ``http_paths``."""
        return {
            "state_get": self._get,
            "state_put": self._put,
            "state_delete": self._delete,
            "settings": self._tell_settings,
            "change_settings": self._change_settings,
        }

    def join(self, group: Replicated) -> None:
        """Before it starts."""
        self._group = group
        self._settings.join(group)

    def term(self) -> dict[str, str]:
        """The header of an answer to a change that the group has: it stands there or before."""
        return {} if self._group is None else {TERM_HEADER: token(self._group.at)}

    # ------------------------------------------------------------ operations

    async def _get(self, call: Call) -> Reply:
        group, name = self._there(), _name(call)
        given = call.headers.get(TERM_HEADER)
        limit_s = timeout_s(call.headers)
        held = await group.get(
            "state",
            name,
            None if given is None else position(given),
            READ_S if limit_s == math.inf else min(limit_s, READ_MAX_S),
        )
        if held is None:
            reply = json_reply({"error": f"the session has no key {call.names['key'][:60]!a}"}, 404)
        else:
            reply = Reply(200, [held.value], {"content-type": "application/octet-stream"})
        reply.headers |= self.term()
        return reply

    async def _put(self, call: Call) -> Reply:
        return await self._change(call, call.body)

    async def _delete(self, call: Call) -> Reply:
        return await self._change(call, None)

    async def _change(self, call: Call, value: bytes | None) -> Reply:
        limit_s = min(CHANGE_S, timeout_s(call.headers))
        put = self._there().put_anywhere("state", _name(call), value, limit_s)
        # Who has gone makes it again elsewhere, and others after it: it must not come after those.
        at = await while_connected(asyncio.ensure_future(put), call.connection)
        return Reply(200, [], {TERM_HEADER: token(at)})

    async def _tell_settings(self, call: Call) -> Reply:
        reply = json_reply(self._settings.values)
        reply.headers |= self.term()
        return reply

    async def _change_settings(self, call: Call) -> Reply:
        wanted = wire.parse_json(call.body)
        if not isinstance(wanted, dict):
            raise BadRequest("the request must be a JSON object: settings by name")
        at = await self._settings.change(wanted)
        reply = json_reply(self._settings.values)
        if at is not None:
            reply.headers[TERM_HEADER] = token(at)
        return reply

    def _there(self) -> Replicated:
        if self._group is None:
            raise BadRequest(
                "this replica is in no group, which would keep the state: start it with --etcd", 404
            )
        return self._group


def _name(call: Call) -> str:
    return name_of(call.names["session"], call.names["key"])
