from __future__ import annotations

import io
import json
import shlex

from bus import config as settings
from bus.control import messages
from services.manager.progress import ProgressPrinter, base_url, progress_line, ready_text

CONFIG = settings.load({"topology.dp_groups": "1", "topology.expert_workers": "1"}, None, {})


def member(service: str, state: str, detail: str = "", http: str = "") -> messages.Member:
    return messages.Member(
        service=service,  # type: ignore[arg-type]
        index=0,
        incarnation=1,
        pid=1,
        state=state,  # type: ignore[arg-type]
        detail=detail,
        http=http,
    )


def pod_map(*members: messages.Member) -> messages.PodMap:
    return messages.PodMap(pod="p", epoch=1, members=members)


def test_progress_names_who_is_awaited() -> None:
    line = progress_line(
        CONFIG,
        pod_map(
            member("manager", "ready"),
            member("expert", "starting", "loading weights 3/8"),
            member("scheduler", "dead"),
        ),
    )
    assert line == (
        "ready 1/5 | expert-0 loading weights 3/8, attention-0 not started, scheduler-0 dead, gateway-0 not started"
    )


def test_ready_tells_what_to_try() -> None:
    config = settings.load({"gateway.host": "0.0.0.0", "gateway.port": "81", "model": "/m/tiny"}, None, {})
    text = ready_text(config, pod_map(), 1.25)
    assert text.startswith("READY 10/10 processes in 1.2 s\n")
    words = shlex.split(next(line for line in text.splitlines() if "curl" in line))
    assert words[2] == "http://127.0.0.1:81/v1/completions"
    assert json.loads(words[-1])["model"] == "tiny"


def test_a_key_is_asked_for_but_not_shown() -> None:
    config = settings.load({"gateway.api_keys": "secret"}, None, {})
    text = ready_text(config, pod_map(), 1)
    assert "secret" not in text and "Authorization: Bearer" in text


def test_a_port_of_the_systems_choice_is_the_gateways_word() -> None:
    config = settings.load({"gateway.port": "0"}, None, {})
    assert base_url(config, pod_map(member("gateway", "ready", http="http://127.0.0.1:4711"))) == (
        "http://127.0.0.1:4711"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_elsewhere() -> None:
    out = io.StringIO()
    printer = ProgressPrinter(out)
    for line in ("a", "a", "b"):
        printer.show(line)
    printer.say("done")
    assert out.getvalue() == "a\nb\ndone\n"


def test_one_line_on_a_terminal() -> None:
    out = Terminal()
    printer = ProgressPrinter(out)
    printer.show("a")
    printer.show("x" * 200)
    printer.say("done\n")
    assert out.getvalue() == "\r\x1b[Ka" + "\r\x1b[K" + "x" * 97 + "..." + "\r\x1b[Kdone\n"
