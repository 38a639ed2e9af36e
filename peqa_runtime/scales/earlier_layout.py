"""Stores of the first layout, which had all sets in one folder, are turned into today's when they are opened.

before: <store>/blobs/<revision>.safetensors, <store>/tasks/<task>.json
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from peqa_runtime.core import check_task_name
from peqa_runtime.errors import InvalidTaskName
from peqa_runtime.scales.task_folder import HISTORY, TaskFolders
from peqa_runtime.scales.task_history import TaskHistory

logger = logging.getLogger(__name__)


def adopt(store: Path, folders: TaskFolders) -> None:
    """Move every task of the first layout into its own folder. Interrupted, the next call goes on. Raises `OSError`."""
    blobs = store / "blobs"
    if not blobs.is_dir():
        return
    logger.info("%s has the layout of an earlier version; its tasks are moved", store)
    for record in sorted(folders.root.glob("*.json")):
        task = record.name.removesuffix(".json")
        try:
            folder = folders.folder(check_task_name(task))
        except InvalidTaskName:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            revisions = TaskHistory.from_json(record.read_bytes(), task).revisions
        except ValueError:  # a damaged record is reported from its new place
            revisions = set()
        for revision in revisions:
            name = f"{revision}.safetensors"
            if (blobs / name).exists() and not (folder / name).exists():
                shutil.copyfile(blobs / name, folder / f"{name}.new")
                os.replace(folder / f"{name}.new", folder / name)
        os.sync()  # the sets before the record that needs them
        os.replace(record, folder / HISTORY)
    os.sync()
    shutil.rmtree(blobs)
