"""Config files, YAML or JSON: read as text with line numbers, so that a mistake is shown where it stands; and saved."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.config.option import NULL_WORDS, Raw
from fsdp_qlora.config.options import GROUPS, OPTIONS, Config
from fsdp_qlora.config.rules import without_effect

MERGE = "tag:yaml.org,2002:merge"  # the key << , which takes another mapping's keys
FLAT = "options are written flat, `name: value`; take the group's name away"


@dataclass(frozen=True)
class Given:
    """One option as the user gave it, in a file or as a flag, not looked at yet."""

    name: str  # as written, but with underscores
    raw: Raw
    written: str  # how it is shown in a message: "--lr 2" or "lr: 2 (run.yaml, line 3)"


def read_file(path: str) -> tuple[list[Given], list[str]]:
    """Return (the options in a YAML or JSON file, mistakes of its form); never raises for a bad file."""
    if not path:
        return [], ["--config: needs a value; give a YAML or JSON file"]
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        return [], [f"--config {path}: cannot be read ({error.strerror}); give a YAML or JSON file"]
    except UnicodeDecodeError as error:
        return [], [f"--config {path}: is not UTF-8 text (byte {error.start}); give a YAML or JSON file"]
    if path.endswith(".toml"):
        return [], [f"--config {path}: TOML is not read; give a YAML or JSON file"]
    try:
        return _read_json(path, text) if path.endswith(".json") else _read_yaml(path, text)
    except RecursionError:
        return [], [f"--config {path}: lists lie too deep in one another; write options flat, `name: value`"]
    except json.JSONDecodeError as error:
        return [], [f"--config {path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return [], [f"--config {path}: malformed YAML{where}: {error.problem or error.context}"]
    except yaml.YAMLError as error:
        return [], [f"--config {path}: malformed YAML: {' '.join(str(error).split())}"]


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML that `--config` reads back to the same Config: whole or not at all. Raises OSError.

    What has no effect in this run is written as a comment, since to ask for it is a mistake.
    """
    path, values, idle = Path(path), config.to_flat(), without_effect(config)
    lines = ["# The options of one run, all of them. To run it again: train.py --config with this file."]
    for group, kind in GROUPS.items():
        lines += ["", f"# {(kind.__doc__ or group).splitlines()[0]}"]
        for name, option in OPTIONS.items():
            if option.group == group:
                line = f"{name}: {_yaml_text(values[name])}"
                lines.append(f"# {line}  # no effect: to use it, {idle[name].remedy}" if name in idle else line)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _yaml_text(value: Any) -> str:
    """Return `value` on one line, quoted where it would be read as something else."""
    if isinstance(value, str) and value.lower() in NULL_WORDS:
        return json.dumps(value)
    return yaml.safe_dump([value], default_flow_style=True, width=2**20, allow_unicode=True).strip()[1:-1]


def _read_yaml(path: str, text: str) -> tuple[list[Given], list[str]]:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"--config {path}: must be a mapping of options to values, one `name: value` a line"]
    pairs = [(key, node, f"{path}, line {key.start_mark.line + 1}") for key, node in root.value]
    odd = [where for key, _, where in pairs if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE]
    given, mistakes = _collect([(str(key.value), _yaml_raw, node, at) for key, node, at in pairs if at not in odd])
    return given, [*(f"{where}: is no option's name; write one `name: value` a line" for where in odd), *mistakes]


def _read_json(path: str, text: str) -> tuple[list[Given], list[str]]:
    root = json.loads(text, object_pairs_hook=_Pairs)
    if not isinstance(root, _Pairs):
        return [], [f"--config {path}: must be an object of options and values"]
    return _collect([(key, _json_raw, value, path) for key, value in root])


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as (key, value) pairs, so that a key given twice is seen."""


def _collect(items: list[tuple[str, Any, Any, str]]) -> tuple[list[Given], list[str]]:
    given, mistakes = [], []
    for key, to_raw, value, where in items:
        try:
            raw = to_raw(value)
            shown = "null" if raw is None else f"[{', '.join(raw)}]" if isinstance(raw, list) else raw
            given.append(Given(key.replace("-", "_"), raw, f"{key}: {shown} ({where})"))
        except TypeError:
            known = OPTIONS.get(key.replace("-", "_"))
            wanted = f"takes no mapping and no list in a list; give {known.allowed()}" if known else FLAT
            mistakes.append(f"{key} ({where}): {wanted}")
    return given, mistakes


def _yaml_raw(node: yaml.Node) -> Raw:
    """Return text as it stands in the file, not as YAML 1.1 takes it: `3e-4` is a string there and `1_0` is ten.

    Python's None is null as well, where it is not quoted."""
    if isinstance(node, yaml.ScalarNode):
        is_null = node.tag == "tag:yaml.org,2002:null" or (node.style is None and node.value.lower() in NULL_WORDS)
        return None if is_null else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    raise TypeError


def _json_raw(value: Any) -> Raw:
    if isinstance(value, list) and not isinstance(value, _Pairs):
        return [_json_text(item) for item in value]
    return None if value is None else _json_text(value)


def _json_text(value: Any) -> str:
    if isinstance(value, list):
        raise TypeError
    return value if isinstance(value, str) else json.dumps(value)
