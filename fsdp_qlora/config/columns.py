"""The option --columns: which field of a row each named column is."""

from collections.abc import Sequence

# Fields of all forms of rows (data/forms.py), by which a user may name columns.
FIELDS = (
    "messages", "system", "tools", "functions", "chat_template_kwargs", "prompt", "completion", "instruction", "output",
    "input", "history", "question", "answer", "context", "text",
)  # fmt: skip


def read_columns(items: Sequence[str]) -> dict[str, str]:
    """Return {field: column} of --columns. Raises ValueError with what is wrong and what to do."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, column = item.partition("=")
        if not equals or not name or not column:
            raise ValueError(f"{item!r} is not FIELD=COLUMN")
        if name not in FIELDS:
            raise ValueError(f"{name!r} is no field of a form; fields are {', '.join(FIELDS)}")
        if name in found:
            raise ValueError(f"names {name} twice")
        if column in found.values():
            raise ValueError(f"names the column {column} for two fields")
        found[name] = column
    return found


def are_columns(items: Sequence[str]) -> bool:
    """Return whether `read_columns` takes them."""
    try:
        read_columns(items)
    except ValueError:
        return False
    return True
