"""Read values out of a `config.json` and refuse what is wrong, in one line: file, field, value, rule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from bus.errors import ConfigError

CONFIG_BYTES_MAX = 1024 * 1024
INTEGER_MAX = 2**31 - 1

REQUIRED: Any = object()


class Fields:
    """One JSON object of a configuration file. Several spellings of a field must not contradict."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def fail(self, name: str, value: object, rule: str) -> NoReturn:
        """Raise the one-line error."""
        raise ConfigError(f"{self.source}: {name} = {json.dumps(value, default=str)}: {rule}")

    def raw(self, name: str, *aliases: str, default: Any = REQUIRED) -> Any:
        """Return the value under any of the spellings; `null` counts as a value."""
        found = {key: self.values[key] for key in (name, *aliases) if key in self.values}
        if not found:
            if default is REQUIRED:
                spellings = " or ".join((name, *aliases))
                raise ConfigError(f"{self.source}: {spellings}: missing; this model family needs it")
            return default
        first = next(iter(found))
        for key, value in found.items():
            if value != found[first]:
                self.fail(key, value, f"contradicts {first} = {json.dumps(found[first])}")
        return found[first]

    def integer(
        self, name: str, *aliases: str, minimum: int = 1, maximum: int = INTEGER_MAX, default: Any = REQUIRED
    ) -> int:
        """Return a whole number from `minimum` to `maximum`."""
        value = self.raw(name, *aliases, default=default)
        present = next((key for key in (name, *aliases) if key in self.values), name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(present, value, f"must be a whole number of at least {minimum}")
        if value > maximum:
            self.fail(present, value, f"must be at most {maximum}")
        return value

    def optional_integer(
        self, name: str, *, minimum: int = 1, maximum: int = INTEGER_MAX, default: Any = REQUIRED
    ) -> int | None:
        """Return a whole number, or None for null."""
        if self.raw(name, default=default) is None:
            return None
        return self.integer(name, minimum=minimum, maximum=maximum, default=default)

    def number(
        self, name: str, *, minimum: float = 0.0, maximum: float | None = None, default: Any = REQUIRED
    ) -> float:
        """Return a finite number from `minimum` to `maximum`."""
        value = self.raw(name, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.fail(name, value, "must be a finite number")
        if value < minimum:
            self.fail(name, value, f"must be at least {minimum}")
        if maximum is not None and value > maximum:
            self.fail(name, value, f"must be at most {maximum}")
        return float(value)

    def optional_number(self, name: str, *, default: float | None = None) -> float | None:
        """Return a number, or the default when absent or null."""
        return default if self.values.get(name) is None else self.number(name)

    def flag(self, name: str, *, default: Any = REQUIRED) -> bool:
        """Return true or false."""
        value = self.raw(name, default=default)
        if not isinstance(value, bool):
            self.fail(name, value, "must be true or false")
        return value

    def only(self, name: str, *allowed: object, rule: str) -> None:
        """Accept the field only when absent, null, or one of `allowed`."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            self.fail(name, value, rule)

    def section(self, *names: str) -> Fields | None:
        """Return the nested object under any of the names, or None when absent or null."""
        present = [name for name in names if self.values.get(name) is not None]
        if not present:
            return None
        value = self.raw(*present)
        if not isinstance(value, dict):
            self.fail(present[0], value, "must be an object")
        return Fields(value, f"{self.source}: {present[0]}")


def read_json_object(path: Path, bytes_max: int = CONFIG_BYTES_MAX) -> dict[str, Any]:
    """Read one JSON object; refuse other content, repeated keys and files above `bytes_max`."""
    try:
        size = path.stat().st_size
        if size > bytes_max:
            raise ConfigError(f"{path}: {size} bytes: must be at most {bytes_max}")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold one JSON object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; refuse a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r} occurs twice")
    return result
