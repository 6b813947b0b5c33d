from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from bus import config as settings
from bus.errors import ConfigError


def test_defaults_stand_when_nothing_is_said() -> None:
    config = settings.load({}, None, {})
    assert (config.pod, config.model) == ("xds", "demo")
    assert config.topology.dp_groups == 2
    assert config.gateway.port == 8000


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "pod.toml"
    path.write_text('pod = "toml"\nlog_level = "debug"\n[gateway]\nport = 1\n[kv]\ncache_tokens = 1024\n')
    environ = {"XDS_GATEWAY__PORT": "2", "XDS_POD": "env", "HOME": "/root"}
    config = settings.load({"gateway.port": "3"}, path, environ)
    assert (config.kv.cache_tokens, config.log_level) == (1024, "debug")  # toml over defaults
    assert config.pod == "env"  # environment over toml
    assert config.gateway.port == 3  # flag over environment


def test_truth_is_said_in_words() -> None:
    for text, value in (("false", False), ("true", True)):
        config = settings.load({"scheduler.enable_prefix_caching": text}, None, {})
        assert config.scheduler.enable_prefix_caching is value


def test_lists_are_separated_by_commas() -> None:
    assert settings.load({"gateway.api_keys": "a,b"}, None, {}).gateway.api_keys == ("a", "b")
    assert settings.load({}, None, {"XDS_GATEWAY__API_KEYS": ""}).gateway.api_keys == ()


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("gateway.prt", "1", "no such setting (flag); did you mean gateway.port?"),
        ("gateway", "1", "no such setting"),
        ("gateway.port", "http", "Expected `int`"),
        ("gateway.port", "65536", "must be 0..65535"),
        ("gateway.host", "", "must be a host name or address"),
        ("topology.dp_groups", "0", "must be 1..64"),
        ("topology.expert_workers", "65", "must be 1..64"),
        ("kv.block_tokens", "12", "must be a power of two"),
        ("kv.cache_tokens", "1000", "must be a multiple of kv.block_tokens = 16"),
        ("scheduler.max_num_batched_tokens", "8", "must be at least scheduler.max_num_seqs = 32"),
        ("heartbeat.hang_timeout_ms", "700", "must be at least 3 x heartbeat.interval_ms = 1500"),
        ("launcher.restart_backoff_ms_max", "1", "must be at least launcher.restart_backoff_ms = 100"),
        ("pod", "Pod", "must match [a-z0-9][a-z0-9-]{0,23}"),
        ("pod", "a" * 25, "must match"),
        ("pod", "a\n", "must match"),
        ("pod", "", "must match"),
        ("model", "", "must be a folder, or demo"),
        ("attention.kv_cache_dtype", "fp8", "must be one of auto, int8"),
        ("xccl.route_costs_ns", "1,2,3,4,5", 'must be "" or six numbers'),
        ("xccl.route_costs_ns", "1,2,3,4,5,-6", 'must be "" or six numbers'),
        ("xccl.route_costs_ns", "1,2,3,4,5,6,", 'must be "" or six numbers'),
        ("log_level", "loud", "must be one of debug, info, warning, error"),
        ("log_format", "xml", "must be one of console, json"),
        ("runtime_dir", "/" + "r" * 90, "must be at most 78 bytes long"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(name: str, text: str, rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.load({name: text}, None, {})
    assert str(error.value).startswith(name.split("=")[0])
    assert rule in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (
            {"topology.long_dp_groups": "2"},
            "topology.long_dp_groups = 2: must be below topology.dp_groups = 2",
        ),
        ({"topology.long_dp_groups": "1", "gateway.long_tokens": "1"}, "must be at least 2"),
        ({"topology.long_dp_groups": "1", "kv.cache_tokens": "4096"}, "at most kv.cache_tokens = 4096"),
        (
            {"topology.long_dp_groups": "1", "scheduler.max_model_len": "99"},
            "at most scheduler.max_model_len",
        ),
    ],
)
def test_long_and_short_requests_must_both_be_possible(values: dict[str, str], rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.load(values, None, {})
    assert rule in str(error.value)
    settings.load({**values, "topology.long_dp_groups": "0"}, None, {})


def test_toml_values_are_not_coerced(tmp_path: Path) -> None:
    path = tmp_path / "pod.toml"
    path.write_text('[gateway]\nport = "8000"\n')
    with pytest.raises(ConfigError, match=r"gateway\.port"):
        settings.load({}, path, {})


@pytest.mark.parametrize("text", ["port = = 1", "[gateway]\nports = 1", "topology = 3"])
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pod.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        settings.load({}, path, {})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        settings.load({}, tmp_path / "none.toml", {})


def test_an_unknown_variable_is_refused_but_our_own_are_not() -> None:
    with pytest.raises(ConfigError, match="XDS_GATEWAY__PRT"):
        settings.load({}, None, {"XDS_GATEWAY__PRT": "1"})
    settings.load({}, None, dict.fromkeys(settings.RESERVED_VARIABLES, "x"))


def test_the_resolved_tree_comes_back_equal() -> None:
    config = settings.load({"pod": "p", "gateway.api_keys": "k", "model": "m"}, None, {})
    again = settings.from_resolved({"XDS_RESOLVED": settings.resolved_json(config), "XDS_POD": "ignored"})
    assert again == config
    assert settings.config_sha(again) == settings.config_sha(config)


def test_a_resolved_tree_is_checked() -> None:
    config = settings.load({}, None, {})
    wrong = msgspec.structs.replace(config, pod="Wrong")
    for text in ("{", '{"pods": 1}', settings.resolved_json(wrong)):
        with pytest.raises(ConfigError):
            settings.from_resolved({"XDS_RESOLVED": text})


def test_without_a_resolved_tree_the_sources_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "pod.toml"
    path.write_text('log_level = "error"\n')
    config = settings.from_resolved({"XDS_POD": "p", "XDS_CONFIG": str(path)})
    assert (config.pod, config.log_level) == ("p", "error")


def test_any_other_setting_gives_another_digest() -> None:
    one = settings.load({"kv.cache_tokens": "1024"}, None, {})
    other = settings.load({"kv.cache_tokens": "2048"}, None, {})
    assert settings.config_sha(one) != settings.config_sha(other)


def test_paths_mean_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings.load({"model": "models/../tiny/", "runtime_dir": "run"}, None, {})
    assert settings.model_path(config) == tmp_path / "tiny"
    assert settings.runtime_dir(config) == tmp_path / "run"
    assert settings.model_name(config) == "tiny"


def test_the_demo_model_ships_with_the_packages() -> None:
    config = settings.load({}, None, {})
    assert settings.model_path(config) == Path(settings.__file__).parents[1] / "services" / "demo"
    assert settings.model_name(config) == "demo"
    named = settings.load({"gateway.served_model_name": "tiny"}, None, {})
    assert settings.model_name(named) == "tiny"


def test_the_runtime_folder_follows_the_desktop_session(tmp_path: Path) -> None:
    config = settings.load({"pod": "p"}, None, {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert settings.runtime_dir(config) == tmp_path / "xds" / "p"
    config = settings.load({"pod": "p"}, None, {"XDG_RUNTIME_DIR": str(tmp_path / "gone")})
    assert str(settings.runtime_dir(config)).startswith("/tmp/xds-")


def test_every_setting_is_listed_once() -> None:
    listed = settings.settings()
    assert listed["gateway.port"] == 8000
    assert len(listed) == len(set(listed)) > 25


def settings_with_defaults(section: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in msgspec.structs.fields(section):
        if isinstance(field.default, msgspec.Struct):
            yield from settings_with_defaults(type(field.default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.default


def test_the_readme_lists_every_setting_with_its_default() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, default in settings_with_defaults(settings.PodConfig):
        shown = '""' if default == "" else str(default)
        shown = shown.lower() if isinstance(default, bool) else shown
        assert f"| `{name}` | `{shown}` |" in readme, name
