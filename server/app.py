"""The app: routes, layers and error shape put together. Nothing here is global; each call makes an app of its own."""

from __future__ import annotations

import itertools
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Match, Route

from peqa_runtime.errors import InvalidTaskName, PeqaError
from peqa_server.access import routes as access_routes
from peqa_server.access.door import Access, Door
from peqa_server.access.route_roles import RouteRoles
from peqa_server.http.api_document import DescribedApp
from peqa_server.http.body_rest import BodyRest
from peqa_server.http.errors import ApiError, to_api_error
from peqa_server.http.query import known_query
from peqa_server.observe import routes as observe_routes
from peqa_server.observe.access_log import Edge, Tracer, note_of, refused
from peqa_server.observe.metrics import Metrics
from peqa_server.openai import model_routes, tokenizer_routes
from peqa_server.openai import routes as openai_routes
from peqa_server.page import routes as page_routes
from peqa_server.services import EngineService, Gate, ServedModel, Services, TaskService
from peqa_server.settings import ServerSettings
from peqa_server.tasks import routes as task_routes

ROUTERS = tuple(
    part.router
    for part in (
        openai_routes,
        model_routes,
        tokenizer_routes,
        task_routes,
        access_routes,
        observe_routes,
        page_routes,
    )
)


def create_app(
    engine: EngineService,
    tasks: TaskService,
    model: ServedModel,
    settings: ServerSettings | None = None,
    *,
    spool_folder: Path,
    owners_folder: Path | None = None,
) -> FastAPI:
    """An app that serves at once. Uploads are written to `spool_folder` while they come: the store's volume, best."""
    app = create_loading_app(settings)
    app.state.gate.open(Services(engine, tasks, model, spool_folder, owners_folder))
    return app


def create_loading_app(settings: ServerSettings | None = None, tracer: Tracer | None = None) -> FastAPI:
    """An app that answers 503 until `app.state.gate.open(services)` is called (in the event loop's thread).

    `tracer` hears of each request that has ended. Raises `KeyFileError` for a key file that cannot be used.
    """
    settings = settings or ServerSettings()
    metrics = Metrics(settings.metric_tasks, settings.metrics_compat)
    app = DescribedApp(
        title="peqa",
        summary="One frozen low-bit model, many tasks",
        docs_url=None,  # FastAPI's page loads its scripts from outside hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gate = Gate(settings, metrics)
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(known_query)])
    for kind in (PeqaError, ApiError, HTTPException, ClientDisconnect, ValidationError):
        app.add_exception_handler(kind, _refuse)
    roles = RouteRoles(app, open_metrics=settings.open_metrics)
    access = Access(settings.key_file, roles, metrics.registry, own_host=settings.own_host)
    app.add_middleware(Door, access=access)
    app.add_middleware(Edge, metrics=metrics, tracer=tracer)
    app.add_middleware(BodyRest, settings=settings)  # added last: the outermost layer
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ClientDisconnect):
        note_of(request.scope).client_gone = True
        return JSONResponse(None, status_code=499)  # nobody reads it
    if isinstance(error, HTTPException) and error.status_code == 405:
        error = HTTPException(405, headers={"Allow": _methods(request)})
    refusal = to_api_error(error)
    if refusal.code == "route_not_found" and request.scope["path"].startswith("/v1/tasks/"):
        # A name with a line break in it matches no route's pattern, but it is a bad name like any other.
        refusal = to_api_error(InvalidTaskName("a task name is made of a-z, 0-9, '.', '_' and '-' only"))
    refused(request.scope, refusal)
    return refusal.response()


def _methods(request: Request) -> str:
    """Every method that the request's path takes; the router names those of the first route that matches."""
    found: set[str] = set()
    for route in itertools.chain.from_iterable(router.routes for router in ROUTERS):
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    found |= {"HEAD"} if "GET" in found else set()
    return ", ".join(sorted(found))
