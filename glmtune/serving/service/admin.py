"""Adapters that come and go while the server runs: off by default, with keys of its own, from one folder.

Requests that run with an adapter finish with it, also when it is removed or replaced meanwhile: that is the
engine's promise.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from glmtune.inference.adapter_names import NAME
from glmtune.inference.requests.engine_state import AdapterInfo
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.state import ServingState


class AdapterRequest(BaseModel):
    """An adapter to add."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(description="how requests name it (`model`)")
    path: str = Field(description="a run folder, checkpoint or file, within `access.adapter_dir`")
    kind: Literal["prefix", "lora"] = Field("prefix", description="what it is")
    replace: bool = Field(False, description="take the place of one of that name")


def create_admin_router(state: ServingState, adapter_dir: Path) -> APIRouter:
    """Return the administrator's routes.

    Args:
        state: whose engine takes the adapters.
        adapter_dir: nothing outside it is read.
    """
    router, root = APIRouter(prefix="/admin"), adapter_dir.expanduser().resolve()
    changing = asyncio.Lock()  # of two that add the same name one is told so

    @router.post("/adapters", summary="Add a prefix or a LoRA")
    async def add(wanted: AdapterRequest) -> Response:
        if not NAME.fullmatch(wanted.name) or wanted.name in state.names:
            raise ApiError(
                f"`name` is `{wanted.name[:100]}`, but it must have 1 to 64 letters, digits, `_`, `-` and"
                " `.`, begin with a letter, a digit or `_`, and not be the base model's.",
                param="name",
                code="invalid_value",
            )
        engine: Any = state.ready().engine
        async with changing:
            if not wanted.replace and wanted.name in {info.name for info in engine.adapters}:
                raise ApiError(
                    f'`name` is `{wanted.name}`, but there is an adapter of that name. Send `"replace":'
                    " true`, or remove it first.",
                    status=409,
                    param="name",
                    code="name_taken",
                )
            path = await run_in_threadpool(within, root, wanted.path)
            info = await run_in_threadpool(
                engine.add_adapter, wanted.name, path, kind=wanted.kind, replace=wanted.replace
            )
        return JSONResponse(_described(info, root), 201)

    @router.get("/adapters", summary="List the adapters, with the hashes of their weights")
    async def every() -> Response:
        found = [_described(info, root) for info in state.engine.adapters]
        return JSONResponse({"object": "list", "data": found})

    @router.delete("/adapters/{name}", summary="Remove an adapter; what runs with it finishes")
    async def remove(name: str) -> Response:
        engine: Any = state.ready().engine
        async with changing:
            if name not in {info.name for info in engine.adapters}:
                raise ApiError(
                    f"There is no adapter `{name[:100]}`.", status=404, code="model_not_found", param="name"
                )
            await run_in_threadpool(engine.remove_adapter, name)
        return JSONResponse({"object": "adapter", "id": name, "deleted": True})

    return router


def within(root: Path, path: str) -> Path:
    """Return a place inside a folder, links followed.

    Args:
        root: the folder, resolved.
        path: relative to it.

    Raises:
        ApiError: it leads out of the folder, or there is nothing. Both are told alike: what lies outside is
            nobody's business.
    """
    try:
        found = (root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # nothing there; a zero byte; links in a circle
        found = None
    if found is None or not found.is_relative_to(root) or found == root:
        raise ApiError(
            f"`path` is `{path[:200]}`, but it must be a run folder, a checkpoint or a file inside the"
            " server's folder of adapters (`access.adapter_dir`), relative to it.",
            param="path",
            code="invalid_value",
        )
    return found


def _described(info: AdapterInfo, root: Path) -> dict[str, object]:
    path = Path(info.path)
    place = path.relative_to(root) if path.is_relative_to(root) else path
    return {
        "object": "adapter",
        "id": info.name,
        "kind": info.kind,
        "path": str(place),
        "content_hash": info.content_hash,
        "num_tokens": info.num_tokens,
    }
