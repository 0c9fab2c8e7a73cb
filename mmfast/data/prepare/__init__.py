"""``mmfast prepare``: from real input to shards.

Each source is a module with ``add_arguments(parser)`` and ``prepare(args) -> Path``, and a plain
function that does the same from Python.
"""

from types import ModuleType

from mmfast.data.prepare import digits, folder, index, stamps, table

SOURCES: dict[str, ModuleType] = {
    "stamps": stamps,
    "digits": digits,
    "folder": folder,
    "csv": table,
    "index": index,
}
