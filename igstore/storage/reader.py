"""Reading a store: its settings, its records, and any images of any array, wherever it is.

A store may come from anywhere. Nothing in it is run, no path is taken from its contents, what it says of itself is held
against the files that are there before memory is set aside for it, and whatever is wrong is an error of igstore's own.
Nothing here writes or needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from igstore.errors import DamagedStoreError, StoreNotFoundError, UnfinishedShardError, UserError, option
from igstore.files import LocalFiles, open_source, parse_json, reading
from igstore.masks import block_grid, ranking_parts
from igstore.schema import BLOCK_X, BLOCK_Y, NOT_BUILT, BuildSpec, Compress
from igstore.storage import layout
from igstore.storage.arrays import ImageArray, Recording
from igstore.storage.hdf5_form import Hdf5Form
from igstore.storage.zarr_form import ZarrForm

Form = ZarrForm | Hdf5Form
Location = str | os.PathLike[str] | Form


class Sharded:
    """A group of arrays written shard by shard, and the records that say which shards are done.

    Attributes
    ----------
    form
        What holds them.
    where
        The store's path or URL, for messages.
    n_images, shard_size
        As the store says.
    variables, sizes
        What the arrays must be, by name, and the lengths of their dimensions apart from the images'.
    """

    def __init__(
        self,
        form: Form,
        *,
        ranking: str | None,
        n_images: int,
        shard_size: int,
        variables: Mapping[str, layout.Variable],
        sizes: Mapping[str, int],
    ) -> None:
        self.form = form
        self.where = form.where
        self._ranking = ranking
        self.n_images = n_images
        self.shard_size = shard_size
        self.variables = variables
        self.sizes = sizes
        self._arrays: dict[str, ImageArray] = {}

    @property
    def root(self) -> Path:
        """The store's folder, for what needs one.

        Raises
        ------
        UserError
            It is not in a folder of this machine.
        """
        if isinstance(self.form, ZarrForm) and isinstance(self.form.source, LocalFiles):
            return self.form.source.root
        raise UserError(
            f"{self.where} is not a folder of this machine, which this needs; `igstore export {self.where} FOLDER` "
            "makes one"
        )

    @property
    def n_shards(self) -> int:
        """Shards in all, finished or not."""
        return layout.shard_count(self.n_images, self.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and the one after its last."""
        return layout.shard_bounds(shard, self.n_images, self.shard_size)

    def array_path(self, name: str) -> str:
        """Where an array is, relative to the store's root."""
        return f"ranks/{self._ranking}/{name}" if self._ranking else name

    def record_file(self, shard: int) -> str:
        """Where the record of a shard is, relative to the store's root, if it is finished."""
        return layout.record_file(shard, self._ranking)

    def shard_files(self, shard: int) -> dict[str, str]:
        """The files that a shard consists of, relative to the store's root, by variable."""
        return {
            name: layout.shard_file(self.array_path(name), shard, len(variable.dims))
            for name, variable in self.variables.items()
        }

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of every finished shard, by its number."""
        shards = range(self.n_shards)
        found = zip(shards, self.form.records([self.record_file(shard) for shard in shards]), strict=True)
        return {shard: record for shard, content in found if (record := self._current(shard, content)) is not None}

    def record(self, shard: int) -> dict[str, Any] | None:
        """The record of one shard as it is now, or None if the shard is not finished.

        Raises
        ------
        DamagedStoreError
            The record is there and is not one.
        """
        (content,) = self.form.records([self.record_file(shard)])
        return self._current(shard, content)

    def any_record(self, shard: int) -> dict[str, Any] | None:
        """As `record`, but also where it is of fewer images than the shard has now, or of other maps."""
        (content,) = self.form.records([self.record_file(shard)])
        return self._parsed(shard, content)

    def _parsed(self, shard: int, content: bytes | None) -> dict[str, Any] | None:
        if content is None:
            return None
        path = f"{self.where}/{self.record_file(shard)}"
        try:
            record = parse_json(content)
        except ValueError as error:
            raise DamagedStoreError(f"{path} is not a record ({error}); run the build again to repair it") from error
        mistake = layout.record_mistake(record, shard, self.shard_files(shard).values())
        if mistake:
            raise DamagedStoreError(f"{path} is not a record ({mistake}); run the build again to repair it")
        return dict(record)

    def _current(self, shard: int, content: bytes | None) -> dict[str, Any] | None:
        record = self._parsed(shard, content)
        # a short last shard is finished only as long as it is the last
        return record if record and record["images"] == list(self.bounds(shard)) else None

    @property
    def missing_shards(self) -> list[int]:
        """Shards that are not finished."""
        return [shard for shard in range(self.n_shards) if shard not in self.records]

    def array(self, name: str) -> ImageArray:
        """An array of this group, refusing shards that are not done.

        Raises
        ------
        StoreNotFoundError
            There is no such array.
        """
        if name not in self._arrays:
            self._arrays[name] = self._opened(name, self._recorded)
        return self._arrays[name]

    def _opened(self, name: str, recorded: Recording) -> ImageArray:
        array = self.form.image_array(self.array_path(name), recorded)
        if name in self.variables:
            self._check(array, self.variables[name])
            array.shape = (self.n_images, *array.shape[1:])  # it is longer while the store is extended
        return array

    def _recorded(self, shard: int) -> dict[str, Any] | None:
        record = self.records.get(shard)
        said = self.form.said.get(self.record_file(shard))
        if record is None and said:
            raise UnfinishedShardError(
                f"shard {shard} of {self.where} is not finished, or kept back: the server says {said} to its record"
            )
        return record

    def values(self, name: str, shard: int, record: dict[str, Any]) -> NDArray[Any]:
        """All images of an array in one shard, (image, ...), whose record the caller has; not to be written to.

        Raises
        ------
        DamagedStoreError
            The shard's file contradicts its record or the layout.
        """
        variable = self.variables[name]
        if variable.is_sharded:
            return self._opened(name, lambda _: record).shard(shard)
        first, last = self.bounds(shard)
        ((_, found),) = self.form.scalars(
            name, variable, [shard], shard_size=self.shard_size, recorded=lambda _: record
        )
        return self._there(name, shard, found)[: last - first]

    def _there(self, name: str, shard: int, values: NDArray[Any] | None) -> NDArray[Any]:
        if values is None:
            file = self.shard_files(shard)[name]
            raise DamagedStoreError(f"{self.where}/{file} is missing; run the build again to repair it")
        return values

    def _check(self, array: ImageArray, variable: layout.Variable) -> None:
        inner = tuple(self.sizes[dim] for dim in variable.dims[1:])
        is_right = (
            array.dtype == variable.numpy_dtype and array.shape[1:] == inner and array.shard_size == self.shard_size
        )
        if not is_right or len(array) < self.n_images:
            raise DamagedStoreError(
                f"{array.where} is {array.dtype} {array.shape} in shards of {array.shard_size}; it must be "
                f"{variable.dtype} {(self.n_images, *inner)} in shards of {self.shard_size}"
            )


class RankingReader(Sharded):
    """One ranking of a store: arrays ``rank`` and ``share``, (image, block_y, block_x).

    Ranks of maps that have since been replaced are not finished ones.
    """

    def __init__(self, store: StoreReader, name: str) -> None:
        parts = ranking_parts(name)
        if parts is None:
            raise StoreNotFoundError(f"{name!r} is not the name of a ranking; it must be like positive-3")
        self.score, self.block = parts
        height, width = store.spec.preprocessing.crop
        n_y, n_x = block_grid(height, width, self.block)
        super().__init__(
            store.form,
            ranking=name,
            n_images=store.n_images,
            shard_size=store.shard_size,
            variables=layout.rank_variables(n_y * n_x),
            sizes={BLOCK_Y: n_y, BLOCK_X: n_x},
        )
        self.name = name
        self._store = store

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """As `Sharded.records`, of the maps that the store has."""
        built = self._store.records
        return {shard: record for shard, record in super().records.items() if self._is_of(record, built.get(shard))}

    def record(self, shard: int) -> dict[str, Any] | None:
        """As `Sharded.record`, of the maps that the store has now."""
        record = super().record(shard)
        return record if record and self._is_of(record, self._store.record(shard)) else None

    def _is_of(self, record: dict[str, Any], built: dict[str, Any] | None) -> bool:
        """Whether the ranks that `record` is of are those of the maps that `built` is of."""
        return built is not None and record.get("attribution_sha256") == self._store.attribution_sha256(built)


class StoreReader(Sharded):
    """A store opened for reading; picklable, safe to use after fork.

    Whatever takes the path or URL of a store also takes a reader of it, which says more about how to read it.

    Parameters
    ----------
    store
        The store's folder, its HDF5 file, or the URL of its folder: ``s3://``, ``http(s)://``, ``file://`` or any other
        of fsspec's protocols.
    cache
        Of a store behind a URL: keep every shard that is read, whole and checked against its record, in this folder,
        and read it from there, now and the next time. Default: the environment's ``IGSTORE_CACHE``; without either,
        only the images that are asked for are fetched, each time.
    storage_options
        Of a store behind a URL: as zarr and xarray take them, such as ``{"anon": True}``. A reader pickles with its
        URL and these, passwords and keys among them: whoever gets the pickle gets those.

    Attributes
    ----------
    attributes
        Everything that the store says of itself.
    spec
        What it was made with.
    omitted
        Arrays that an export left out.

    Raises
    ------
    StoreNotFoundError
        There is no Zarr group there.
    SettingsMismatchError
        It is not a store of this format version.
    DamagedStoreError
        Its metadata cannot be read, or it does not hold as many images as it says.
    UnreachableError
        It does not answer.
    AccessError
        The system does not let it be read.

    >>> store = StoreReader("toy.zarr")
    >>> store.array("attribution").read([3, 0]).shape
    (2, 24, 24)
    """

    def __init__(
        self,
        store: Location,
        *,
        cache: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(store, str | os.PathLike | Form):
            raise UserError(f"the store is a {type(store).__name__}; it must be a path, a URL or a StoreReader")
        if not isinstance(store, Form):
            source = open_source(store, cache=cache, options=storage_options)
            with reading(source.where):
                is_file = isinstance(source, LocalFiles) and source.root.is_file()
            store = Hdf5Form(source.root) if isinstance(source, LocalFiles) and is_file else ZarrForm(source)
        self.attributes = store.attributes()
        self.spec = BuildSpec.from_attributes(self.attributes)
        for name in ("class_names", "wnids"):
            names = self.attributes.get(name, [])
            if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
                raise DamagedStoreError(f"{store.where}: {name} is {names!r:.80}, no list of names")
        self.omitted = _omitted(store.where, self.attributes.get("omitted", []))
        compress = self.attributes.get("compress")
        if compress is not None and compress not in get_args(Compress):
            raise DamagedStoreError(f"{store.where} is compressed by {compress!r:.80}; it can be {get_args(Compress)}")
        super().__init__(
            store,
            ranking=None,
            n_images=_check_listed(store, self.attributes.get("n_images"), self.spec),
            shard_size=self.spec.shard_size,
            variables=layout.variables(self.spec, self.omitted),
            sizes=layout.sizes(self.spec),
        )
        self._scalars: dict[str, NDArray[Any]] = {}

    def __repr__(self) -> str:
        return f"<StoreReader: {self.where}, {self.n_images} images, maps of {self.spec.model!r}>"

    @classmethod
    def of(cls, store: str | os.PathLike[str] | StoreReader) -> StoreReader:
        """A reader of what a user named by its path, its URL or a reader."""
        return store if isinstance(store, StoreReader) else cls(store)

    @property
    def is_complete(self) -> bool:
        """Whether every shard is finished."""
        return not self.missing_shards

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """The id of every image, in order."""
        return tuple(self.scalars("image_id").tolist())

    def scalars(self, name: str) -> NDArray[Any]:
        """A per-image variable, (image,), whole; images of unfinished shards hold the "not built" values."""
        if name not in self._scalars:
            variable = self.variables[name]
            shards = range(self.n_shards) if name in layout.LISTED else sorted(self.records)
            values = np.full(self.n_images, variable.fill_value, variable.numpy_dtype)
            # labels and ids are there before their shard is, so a shard without a record is no error here
            found_of = self.form.scalars(
                name, variable, shards, shard_size=self.shard_size, recorded=lambda shard: self.records.get(shard)
            )
            for shard, found in found_of:
                first, last = self.bounds(shard)
                values[first:last] = self._there(name, shard, found)[: last - first]
            self._scalars[name] = values
        return self._scalars[name]

    def array(self, name: str) -> ImageArray:
        """As `Sharded.array`; what an export left out is named."""
        if name in self.omitted:
            raise StoreNotFoundError(
                f"{self.where} was exported without {' and '.join(self.omitted)}, so it has no {name}; give the whole "
                "store"
                + (f", or {option('images', 'PATH')}, the images that it was made from" if name == "pixels" else "")
            )
        return super().array(name)

    @property
    def status(self) -> NDArray[np.uint8]:
        """uint8 (image,): 0 not built, 1 built, 2 failed."""
        return self.scalars("status")

    @property
    def failed(self) -> dict[str, str]:
        """Why each failed image failed, by its id."""
        records = [self.records[shard] for shard in sorted(self.records)]
        return {name: why for record in records for name, why in record.get("failed", {}).items()}

    @property
    def zero_maps(self) -> int | None:
        """How many built images have a map that is 0 everywhere; None where records of older stores do not say it."""
        counts = [record.get("zero_maps") for record in self.records.values()]
        return None if None in counts else sum(count for count in counts if count)

    @property
    def not_built(self) -> NDArray[np.int64]:
        """Indices of the images that no finished shard holds."""
        return np.flatnonzero(self.status == NOT_BUILT)

    @property
    def rankings(self) -> list[str]:
        """Names of the rankings that the store has, finished or not."""
        return [name for name in self.form.rankings() if ranking_parts(name)]

    def attribution_sha256(self, record: dict[str, Any]) -> str:
        """The checksum of the maps of the shard that `record` is of."""
        if "attribution" in self.omitted:
            return str(record.get("attribution_sha256"))  # of the maps that were left out
        return str(record["files"][self.shard_files(record["shard"])["attribution"]]["sha256"])

    def ranking(self, name: str) -> RankingReader:
        """A ranking such as ``positive-3``.

        Raises
        ------
        StoreNotFoundError
            The store does not have it; the message says how to make it.
        """
        if name not in self.rankings:
            score, _, block = name.rpartition("-")
            raise StoreNotFoundError(
                f"{self.where} has no ranking {name} (it has {', '.join(self.rankings) or 'none'}); "
                f"make it with `igstore rank {self.where} --score {score} --block {block}`"
            )
        return RankingReader(self, name)


def _omitted(where: str, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(name in layout.OMISSIBLE for name in names):
        raise DamagedStoreError(f"{where} says that it leaves out {names!r:.80}; it can be {layout.OMISSIBLE}")
    return tuple(names)


def _check_listed(form: Form, n_images: object, spec: BuildSpec) -> int:
    """The number of images that a store says it lists, if it has as many labels.

    Memory for whatever there is one of an image is bounded by it, and so by what is there.
    """
    label = layout.variables(spec)["label"]
    if type(n_images) is int and n_images >= 1 and form.has_shards("label", label, n_images, spec.shard_size):
        return n_images
    raise DamagedStoreError(f"{form.where} says that it lists {n_images!r:.20} images, but it has not as many labels")
