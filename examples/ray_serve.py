"""Ray Serve: many tasks on one backbone:  cd examples; serve run ray_serve:app folder=TASKS"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from pgn_fast.images import UnreadableImage, read_image
from pgn_fast.serve import ApiError, load_served_tasks


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Tasks:
    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)  # as many as num_cpus
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tasks = load_served_tasks(folder, device=device, watch_s=0)
        self.tasks.warm_up(32)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def ask(self, images: list[Any], tasks: list[str | None]) -> list[Any]:
        # of all tasks in one batch, beside the loop that takes calls
        return await asyncio.to_thread(self.tasks.answer, images, tasks)

    async def __call__(self, request: Request) -> Any:
        task = request.query_params.get("task")
        try:
            labels = self.tasks.labels(task)
            image = read_image(await request.body())
        except (ApiError, UnreadableImage) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        logits = await self.ask(image, task)
        return {"label": labels[int(logits.argmax())], "logits": logits.tolist()}


def app(args: dict[str, str]) -> serve.Application:
    return Tasks.bind(args["folder"])
