"""What the caller's key may do, so that a page or a program need not find out by being refused."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from peqa_server.access.api_key import Role
from peqa_server.access.caller import KeyHolder
from peqa_server.observe.access_log import note_of
from peqa_server.tasks.answer_shapes import Answer

router = APIRouter()


class AccessAnswer(Answer):
    """`keys`: whether the server asks for keys; where it does not, anybody is its admin and `name` is null.

    `tasks`: globs of the tasks that may be used. `base`: whether the base alone may be.
    """

    keys: bool
    name: str | None
    role: Literal["user", "uploader", "admin"]
    tasks: list[str]
    base: bool


@router.get("/v1/access", responses={200: {"model": AccessAnswer}})
async def access(request: Request) -> JSONResponse:
    """Who the caller is to this server: the name and the role of its key, and the tasks that it may use."""
    caller = note_of(request.scope).caller
    if not isinstance(caller, KeyHolder):
        return JSONResponse({"keys": False, "name": None, "role": "admin", "tasks": ["*"], "base": True})
    key = caller.key
    tasks = ["*"] if key.role is Role.ADMIN else list(key.tasks)
    base = key.role is Role.ADMIN or key.base
    return JSONResponse({"keys": True, "name": key.name, "role": key.role.word, "tasks": tasks, "base": base})
