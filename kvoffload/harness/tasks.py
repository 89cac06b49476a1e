"""lm-eval's tasks, with errors in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from yaml import YAMLError

from kvoffload.errors import KvoffloadError, UsageError


class CheckedTasks(TaskManager):
    """Where tasks are looked up. Loads each list of names once: RULER's tasks make their samples when they load."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._known: dict[tuple[str, ...], Any] = {}

    def load(self, task_list: Sequence[str]) -> Any:
        """Raises UsageError for a task that is unknown, KvoffloadError where its data set cannot be had."""
        names = tuple(task_list)
        if names not in self._known:
            self._known[names] = self._load_checked(names)
        return self._known[names]

    def _load_checked(self, names: tuple[str, ...]) -> Any:
        for name in names:
            if name not in self.all_tasks and not Path(name).is_file():
                raise UsageError(f"task {name!r} is unknown to lm-eval; --include FOLDER adds tasks of your own")
        told = ", ".join(names)
        try:
            return super().load(list(names))
        except (ImportError, YAMLError, ValueError) as error:
            raise UsageError(f"tasks {told}: {_first_line(error)}") from error
        except OSError as error:  # what the hub's, requests' and datasets' errors have in common
            raise KvoffloadError(
                f"tasks {told}: a data set cannot be downloaded or read: {_first_line(error)}; --include FOLDER adds "
                "tasks with data of your own"
            ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
