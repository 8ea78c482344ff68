"""Stands in for ``detectron2.data.catalog``.

Left out: ``list`` and ``as_dict``, catalogues as dicts, warnings about metadata keys that were once
renamed.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

_Entry = TypeVar("_Entry")


class _Catalog(Generic[_Entry]):
    """One entry for each name of a data set; iterating gives the names."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def remove(self, name: str) -> None:
        self._entries.pop(name)


class _DatasetCatalog(_Catalog[Callable[[], list[dict]]]):
    """From the name of a data set to the function that loads its annotations."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Add a data set.

        Args:
            func: takes nothing, returns the records; the same ones whenever it is called.

        Raises:
            ValueError: if the name is taken.
            TypeError: if ``func`` is not callable.
        """
        if not callable(func):
            raise TypeError(f"Dataset {name!r} is registered with {func!r}, which is no function.")
        if name in self:
            raise ValueError(f"Dataset {name!r} is already registered; remove() the old one first.")
        self._entries[name] = func

    def get(self, name: str) -> list[dict]:
        """Load a data set.

        Raises:
            KeyError: if there is none of this name.
        """
        if name not in self:
            raise KeyError(f"Dataset {name!r} is not registered. Registered are: {', '.join(self)}")
        return self._entries[name]()


class Metadata(types.SimpleNamespace):
    """What is known of a data set, as attributes; each can be set once only.

    Attributes:
        name: of the data set.
        thing_classes: names of the classes, by the class index that models use.
        thing_dataset_id_to_contiguous_id: from the annotation file's class ids to those indices.
        json_file, image_root, evaluator_type: where it lies and how it is evaluated.
    """

    def __getattr__(self, key: str) -> Any:
        known = [name for name in self.__dict__ if name != "name"]
        raise AttributeError(
            f"The metadata of dataset {self.__dict__.get('name')!r} have no {key!r}; "
            f"they have {known or 'nothing'}."
        )

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.__dict__ and self.__dict__[key] != value:
            raise ValueError(
                f"The metadata {key!r} of dataset {self.name!r} are {self.__dict__[key]!r} and "
                f"cannot change to {value!r}."
            )
        super().__setattr__(key, value)

    def set(self, **kwargs: Any) -> "Metadata":
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return self.__dict__.get(key, default)


class _MetadataCatalog(_Catalog[Metadata]):
    """From the name of a data set to its :class:`Metadata`, which is created when first asked."""

    def get(self, name: str) -> Metadata:
        return self._entries.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
