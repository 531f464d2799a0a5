"""Attributes of items, categories or genres, from a file beside the log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pinet_fast.data.ids import position_of
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from pinet_fast.data.store import SequenceStore

_NAMES = ("attributes", "categories", "category", "genres")
_SEPARATOR = "|"


def item_attributes(
    store: SequenceStore, path: str | Path, *, item: str = "item", attributes: str | None = None
) -> npt.NDArray[np.int64]:
    """Return the attributes of every item of a store.

    Args:
        store: The store; items of the file that it lacks are ignored.
        path: Parquet, or CSV: a row an item, with the item's id as in the log and its attributes: a
            list, one value, or a text such as ``Comedy|Drama``.
        item: Column of the item ids.
        attributes: Column of the attributes; None takes the one named attributes, categories,
            category or genres.

    Returns:
        int64 [V + 1, C]: by item code, the numbers of its attributes, 1 and up in ascending order
        of the original values, each once, then zeros. C is that of the item that has most.

    Raises:
        DataError: The file, or a column of it, is missing or of another kind, or no item of the
            log has an attribute.
        ConfigError: Another kind of file.
    """
    table = _read(Path(path))
    column = attributes or next((name for name in _NAMES if name in table.column_names), None)
    for name, what in ((item, "item ids"), (column, "attributes")):
        if name not in table.column_names:
            raise DataError(
                f"attributes {path}: no column {name!r} of {what}; it has "
                f"{', '.join(table.column_names)}"
            )
    rows = _by_code(store, table, item, str(column))
    values = sorted({value for row in rows.values() for value in row})
    if not values:
        raise DataError(
            f"attributes {path}: no item of {store.source} has an attribute there; are its item "
            "ids those of the log?"
        )
    number = {value: i for i, value in enumerate(values, start=1)}
    out = np.zeros((store.num_items + 1, max(map(len, rows.values()))), np.int64)
    for code, row in rows.items():
        out[code, : len(row)] = sorted(number[value] for value in row)
    return out


def _read(path: Path) -> pa.Table:
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise ConfigError(f"attributes {path}: expected a .parquet or .csv file, got {suffix!r}")
    if not path.is_file():
        raise DataError(f"attributes {path}: not found; name a Parquet or CSV file")
    try:
        if suffix == ".csv":
            import pyarrow.csv

            return pyarrow.csv.read_csv(path)
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"attributes {path}: cannot be read ({error})") from None


def _by_code(store: SequenceStore, table: pa.Table, item: str, column: str) -> dict[int, set[Any]]:
    rows: dict[int, set[Any]] = {}
    pairs = zip(table[item].to_pylist(), table[column].to_pylist(), strict=True)
    for original, value in pairs:
        code = None if original is None else position_of(store.item_ids, original, 1)
        if code is None or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if isinstance(value, str):
            values = [part.strip() for part in value.split(_SEPARATOR) if part.strip()]
        rows.setdefault(code, set()).update(v for v in values if v is not None)
    kinds = {type(value) for row in rows.values() for value in row}
    if len(kinds) > 1 or not kinds <= {int, str}:
        raise DataError(
            f"attributes: column {column!r} holds {', '.join(sorted(k.__name__ for k in kinds))}; "
            "expected integers or texts, alone or in lists"
        )
    return rows
