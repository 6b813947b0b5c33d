"""The rotary part of `config.json`: the old spelling (`rope_theta`, `rope_scaling`) and the new (`rope_parameters`)."""

from __future__ import annotations

from services.model.config_fields import Fields
from services.model.model_config import RopeConfig

FIELDS_OF_KIND: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
FIELDS_OF_ALL = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def rope(
    fields: Fields, head_dim: int, *, theta: float = 10000.0, partial_rotary_factor: float | None = None
) -> RopeConfig:
    """Check how positions rotate a head's `head_dim` columns.

    Args:
        fields: the whole `config.json`.
        head_dim: columns of a head, or of the part of it that is rotated.
        theta: default of `rope_theta`.
        partial_rotary_factor: its default, for a family that rotates only the first columns of a head; None = the
            family always rotates all.

    Raises:
        ConfigError: unknown kind or field, value out of range, contradiction.
    """
    section = fields.section("rope_parameters", "rope_scaling") or Fields({}, fields.source)
    kind = section.raw("rope_type", "type", default="default")
    if not isinstance(kind, str) or kind not in FIELDS_OF_KIND:
        section.fail("rope_type", kind, f"supported are {', '.join(FIELDS_OF_KIND)}")
    _refuse_unknown(section, kind)
    dim = _rotary_dim(fields, section, head_dim, partial_rotary_factor)
    theta = _agreed_number(fields, section, "rope_theta", theta, minimum=2.0)
    if kind == "default":
        return RopeConfig(dim=dim, theta=theta)
    factor = section.number("factor", minimum=1.0)
    if kind == "linear":
        return RopeConfig(dim=dim, theta=theta, kind="linear", factor=factor)
    window = fields.integer("max_position_embeddings")
    original = int(_agreed_number(fields, section, "original_max_position_embeddings", window, minimum=2.0))
    if kind == "llama3":
        return _llama3(section, dim, theta, factor, original)
    return _yarn(section, dim, theta, factor, original)


def _yarn(section: Fields, dim: int, theta: float, factor: float, original: int) -> RopeConfig:
    beta_fast = section.optional_number("beta_fast") or 32.0
    beta_slow = section.optional_number("beta_slow") or 1.0
    if beta_slow > beta_fast:
        section.fail("beta_slow", beta_slow, f"must be at most beta_fast = {beta_fast}")
    return RopeConfig(
        dim=dim,
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=section.optional_number("attention_factor"),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
        truncate=section.flag("truncate", default=True),
    )


def _llama3(section: Fields, dim: int, theta: float, factor: float, original: int) -> RopeConfig:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if not 0 < low < high:
        section.fail("low_freq_factor", low, f"must be above 0 and below high_freq_factor = {high}")
    return RopeConfig(
        dim=dim,
        theta=theta,
        kind="llama3",
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _refuse_unknown(section: Fields, kind: str) -> None:
    for name, value in section.values.items():
        if name in FIELDS_OF_ALL or name in FIELDS_OF_KIND[kind] or value is None:
            continue
        if any(name in known for known in FIELDS_OF_KIND.values()):
            section.fail(name, value, f"does not belong to rope_type {kind}")
        section.fail(name, value, "unknown field; it might change results")


def _rotary_dim(fields: Fields, section: Fields, head_dim: int, default: float | None) -> int:
    if default is None:
        for place in (fields, section):
            place.only("partial_rotary_factor", 1, 1.0, rule="only 1 is supported")
        return head_dim
    factor = _agreed_number(fields, section, "partial_rotary_factor", default, maximum=1.0)
    dim = int(head_dim * factor)
    if dim < 2 or dim % 2:
        rule = f"must leave an even number of a head's {head_dim} columns, got {dim}"
        fields.fail("partial_rotary_factor", factor, rule)
    return dim


def _agreed_number(
    outer: Fields,
    inner: Fields,
    name: str,
    default: float,
    *,
    minimum: float = 0.0,
    maximum: float | None = None,
) -> float:
    """A number that may stand at the top, in the rope section, or in both if they agree."""
    values = {
        section: section.values[name] for section in (inner, outer) if section.values.get(name) is not None
    }
    for section in values:
        value = section.number(name, minimum=minimum, maximum=maximum)
        if value != next(iter(values.values())):
            section.fail(
                name, value, f"contradicts {name} = {next(iter(values.values()))} of the rope section"
            )
    return float(next(iter(values.values()), default))
