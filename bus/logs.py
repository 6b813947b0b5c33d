"""Structured logs to stderr: every line says which pod, service, index and incarnation speaks."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from bus.config import PodConfig

_fields: dict[str, object] = {}


def configure(config: PodConfig, service: str, index: int) -> None:
    """Set structlog up for this process: level and format of `config`, lines to stderr."""
    _fields.update(pod=config.pod, service=service, index=index)
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if config.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_fields,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries that use `logging` (uvicorn, asyncio) speak to stderr as well, in one plain form.
    form = "%(levelname)s %(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format=form)


def bind(**fields: object) -> None:
    """Add fields to every line of this process, whichever thread writes it."""
    _fields.update(fields)


def _add_fields(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in _fields.items():
        event.setdefault(name, value)
    return event
