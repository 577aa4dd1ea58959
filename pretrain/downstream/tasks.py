"""The tasks: lm-eval's by name, and those of a folder of one's own.

A task of one's own is a YAML file beside its data, found by `--task-dir DIR` (lm-eval's task guide has all keys):

    task: capitals
    dataset_path: json
    dataset_kwargs: {data_files: {test: capitals.jsonl}}      # relative to this file
    test_split: test
    output_type: multiple_choice                              # loglikelihood_rolling: perplexity of whole texts
    doc_to_text: "Question: {{question}}\\nAnswer:"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{label}}"
    metric_list: [{metric: acc}, {metric: acc_norm}]

Such a file may name Python functions (`!function`), which are run: use only folders whose code you trust. Code of
datasets on a hub is never run.
"""

import contextlib
import difflib
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from pretrain.evaluation.losses import EvaluationError

if TYPE_CHECKING:  # takes seconds
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict


@dataclass(frozen=True)
class Requested:
    """What one name stands for: a task, a group or a tag.

    `found` is lm-eval's dict of its tasks and groups. `digest` is of the tasks' configs, of their documents, and of
    those that may be put in front as solved examples.
    """

    name: str
    found: "TaskDict"
    digest: str


def load_tasks(names: Sequence[str], task_dir: Path | None = None) -> list[Requested]:
    """Find the tasks, and load their datasets: from `task_dir`, which goes before lm-eval's own, or from the hub.

    Raises EvaluationError for a name that is in neither, naming the nearest, and for a dataset that can't be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each default that a task doesn't repeat
    task_dir = task_dir and task_dir.resolve()
    manager = _task_manager(names, task_dir)
    known = manager.task_index
    for name in names:
        if name not in known:
            raise EvaluationError(_unknown(name, known, task_dir))
    return [_load(manager, name, task_dir) for name in names]


def _task_manager(names: Sequence[str], task_dir: Path | None) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    if task_dir is None:
        return TaskManager()
    if not task_dir.is_dir():
        raise EvaluationError(f"--task-dir {task_dir} is no folder")
    manager = TaskManager(include_path=task_dir, include_defaults=False)
    if all(name in manager.task_index for name in names):
        return manager  # without reading lm-eval's thousands of files
    return TaskManager(include_path=task_dir)


def _unknown(name: str, known: Mapping[str, Any], task_dir: Path | None) -> str:
    places = "lm-eval has no such task" if task_dir is None else f"neither {task_dir} nor lm-eval has such a task"
    nearest = difflib.get_close_matches(name, known, 3)
    return f"--tasks {name}: {places}" + (f"; near it are {', '.join(nearest)}" if nearest else "")


def _load(manager: "TaskManager", name: str, task_dir: Path | None) -> Requested:
    path = manager.task_index[name].yaml_path
    folder = path.resolve().parent if path else task_dir  # a tag has no file
    own = folder and task_dir and folder.is_relative_to(task_dir)
    try:
        # Data files of one's own tasks are beside them; lm-eval would look in the working directory.
        with contextlib.chdir(folder) if folder and own else contextlib.nullcontext():
            found = manager.load([name])
    except Exception as error:  # a task's code, or its dataset's, may raise anything
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise EvaluationError(
            f"--tasks {name}: can't be loaded: {reason}; where its dataset can't be reached, put a YAML file of "
            "that task with local data_files into a folder and name that with --task-dir"
        ) from error
    return Requested(name, found, _digest(found["tasks"]))


def _digest(tasks: "Mapping[str, Task]") -> str:
    digest = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        digest.update(orjson.dumps([name, task.dump_config()], default=str))
        for document in itertools.chain(task.eval_docs, task.fewshot_docs() or ()):
            digest.update(orjson.dumps(document, default=str))
    return digest.hexdigest()
