"""Reading images ahead of the work on them, in threads (Pillow decodes and resizes outside Python's lock)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from igstore.errors import ImageError
from igstore.images import ImageList, prepare, resized_size
from igstore.machine import usable_cores
from igstore.schema import Preprocessing

logger = logging.getLogger(__name__)

_JOBS_AHEAD = 3
_MOST_WORKERS = 16

_Result = NDArray[np.uint8] | str


@dataclass(frozen=True)
class Job:
    """A unit of work: images `first` to `last` (exclusive), all of one shard."""

    shard: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def most_workers() -> int:
    """Threads that are worth having: one a core, at most 16."""
    return min(_MOST_WORKERS, usable_cores())


class Decoder:
    """Reads and prepares the images of jobs, a few jobs ahead; a context manager.

    Parameters
    ----------
    images, preprocessing
        The list that jobs are about, and what becomes of an image.
    workers
        Threads; None is `most_workers`.
    """

    def __init__(self, images: ImageList, preprocessing: Preprocessing, workers: int | None = None) -> None:
        self._images = images
        self._preprocessing = preprocessing
        self._has_said_small = False
        self._threads = ThreadPoolExecutor(workers or most_workers(), "decode")

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def decode(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, NDArray[np.uint8], list[str]]]:
        """The jobs in order, each with its pixels and reasons.

        Pixels are uint8 (image, channel, y, x), zero where an image could not be read; its reason says why, and is ""
        where it could.
        """
        waiting: deque[tuple[Job, list[Future[_Result]]]] = deque()
        for job in jobs:
            waiting.append((job, [self._threads.submit(self._read, image) for image in range(job.first, job.last)]))
            if len(waiting) > _JOBS_AHEAD:
                yield self._gather(*waiting.popleft())
        while waiting:
            yield self._gather(*waiting.popleft())

    def _read(self, image: int) -> _Result:
        try:
            read = self._images.read(image)
            self._say_if_small(image, read.size)
            return prepare(read, self._preprocessing)
        except ImageError as error:
            return str(error)

    def _say_if_small(self, image: int, size: tuple[int, int]) -> None:
        """Say of the first image that does not fill the crop what happens to such images."""
        width, height = resized_size(size, self._preprocessing.resize)
        crop_height, crop_width = self._preprocessing.crop
        if (width < crop_width or height < crop_height) and not self._has_said_small:
            self._has_said_small = True
            logger.warning(
                "image %s is %dx%d pixels, resized as the preprocessing says, and the crop is %dx%d: it gets a black "
                "margin, and so does every other image that is too small",
                self._images.ids[image],
                *(height, width, crop_height, crop_width),
            )

    def _gather(self, job: Job, futures: list[Future[_Result]]) -> tuple[Job, NDArray[np.uint8], list[str]]:
        pixels = np.zeros((len(job), 3, *self._preprocessing.crop), np.uint8)
        reasons = [""] * len(job)
        for place, result in enumerate(future.result() for future in futures):
            if isinstance(result, str):
                reasons[place] = result
            else:
                pixels[place] = result
        return job, pixels, reasons
