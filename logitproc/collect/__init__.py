"""Collecting labelled texts that are diverse and on label: a job in rounds, resumable, with human correction.

`job` says what to make, `run` makes it with `draw` and keeps it with `store`, `report` judges it and `correct`
takes in what people say about it.
"""

from .job import Job
from .run import Collected, collect

__all__ = ["Collected", "Job", "collect"]
