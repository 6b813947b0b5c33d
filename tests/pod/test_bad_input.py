"""What is wrong is said in one line with the right code, at once, and nothing is left behind."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import GOLDENS
from tests.harness.pod import Pod
from tests.harness.refusal import Bench, bench, copy_checkpoint

QWEN = GOLDENS / "qwen3_moe"
SHARDED = GOLDENS / "qwen3_moe_bf16"
SECOND_SHARD = "model-00002-of-00002.safetensors"
CONFIG, RESOURCE, REFUSED = 2, 3, 4


@pytest.fixture
def place() -> Iterator[Bench]:
    """A pod's name and folder; whatever the test ran in it must have left nothing."""
    with bench() as one:
        yield one
        assert one.leftovers() == []


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        (["--set", "kv.size=1"], {}, "kv.size: no such setting (flag)"),
        (["--set", "scheduler.max_num_seq=8"], {}, "did you mean scheduler.max_num_seqs?"),
        (["--set", "kv"], {}, "--set kv: must be NAME=VALUE"),
        (["--port", "http"], {}, "gateway.port = 'http' (flag): Expected `int`"),
        (["--port", "70000"], {}, "gateway.port = 70000: must be 0..65535"),
        (["--dp-groups", "0"], {}, "topology.dp_groups = 0: must be 1..64"),
        (["--set", "kv.block_tokens=24"], {}, "kv.block_tokens = 24: must be a power of two"),
        ([], {"XDS_KV__SIZE": "1"}, "kv.size: no such setting (environment XDS_KV__SIZE)"),
        ([], {"XDS_LOG_LEVEL": "loud"}, "log_level = 'loud': must be one of debug, info, warning, error"),
        ([], {"XDS_KV__CACHE_TOKENS": "many"}, "kv.cache_tokens = 'many' (environment XDS_KV__CACHE_TOKENS)"),
        (["--pod", "Not/A-Name"], {}, "pod = 'Not/A-Name': must match"),
        ([], {"XDS_RUNTIME_DIR": "/tmp/" + "r" * 90}, "must be at most 78 bytes long"),
        (["--set", "attention.kv_cache_dtype=fp8"], {}, "kv_cache_dtype = 'fp8': must be one of auto, int8"),
        (["--set", "xccl.int8=2"], {}, "xccl.int8 = '2' (flag): Expected `bool`, got `str`"),
        (["--set", "attention.kv_cache_dtype=int8"], {}, "qwen3_moe has grouped-query attention"),
        (["--config", "/nonexistent.toml"], {}, "--config /nonexistent.toml: No such file or directory"),
    ],
)
def test_a_wrong_setting(place: Bench, flags: list[str], environ: dict[str, str], said: str) -> None:
    refusal = place.up(QWEN, *flags, environ=environ)
    assert said in refusal.line and refusal.exit_code == CONFIG


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[kv]\nsize = 1", "kv.size: no such setting"),
        ('[kv]\ncache_tokens = "1024"', "kv.cache_tokens = '1024'"),
        ("kv = 3", "kv: no such setting"),
        ("[kv", "not TOML"),
    ],
)
def test_a_wrong_file_of_settings(place: Bench, toml: str, said: str) -> None:
    path = place.base / "pod.toml"
    path.write_text(toml)
    refusal = place.up(QWEN, "--config", str(path))
    assert said in refusal.line and str(path) in refusal.line and refusal.exit_code == CONFIG


@pytest.mark.parametrize(("service", "index"), [("scheduler", 2), ("gateway", 1), ("expert", -1)])
def test_a_process_that_the_pod_does_not_have(place: Bench, service: str, index: int) -> None:
    refusal = place.xds("run", service, f"--index={index}", environ={"XDS_MODEL": str(QWEN)})
    assert f"--index = {index}: must be 0.." in refusal.line and refusal.exit_code == CONFIG


# --------------------------------------------------------------------------- runtime folder


def test_a_runtime_folder_of_somebody_else(place: Bench) -> None:
    folder = Path("/usr")
    if os.getuid() == 0:
        folder = place.runtime_dir
        folder.mkdir()
        os.chown(folder, 12345, -1)
    refusal = place.up(QWEN, environ={"XDS_RUNTIME_DIR": str(folder)})
    assert f"runtime_dir {folder}: belongs to user" in refusal.line and refusal.exit_code == RESOURCE
    if folder == place.runtime_dir:
        folder.rmdir()  # it is still there, and still empty


def test_a_runtime_folder_with_other_things_in_it_is_left_alone(place: Bench) -> None:
    logs = place.runtime_dir / "logs"
    logs.mkdir(parents=True)
    (logs / "mine.log").write_text("precious")
    place.runtime_dir.chmod(0o755)
    refusal = place.up(QWEN)
    assert f"runtime_dir {place.runtime_dir}: holds logs" in refusal.line and refusal.exit_code == RESOURCE
    assert (logs / "mine.log").read_text() == "precious"
    assert place.runtime_dir.stat().st_mode & 0o777 == 0o755
    (logs / "mine.log").unlink()
    logs.rmdir()
    place.runtime_dir.rmdir()


def test_a_runtime_folder_that_is_a_file(place: Bench) -> None:
    place.runtime_dir.touch()
    refusal = place.up(QWEN)
    assert str(place.runtime_dir) in refusal.line and refusal.exit_code == RESOURCE
    place.runtime_dir.unlink()


# --------------------------------------------------------------------------- checkpoints


def no_folder(folder: Path) -> str:
    folder.rename(folder.with_name("elsewhere"))
    return f"{folder} is not a folder"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "it has no config.json"


def no_weights(folder: Path) -> str:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return "it has no *.safetensors"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": ')
    return f"{folder / 'config.json'}: "


def unsupported_family(folder: Path) -> str:
    set_config(folder, model_type="gpt2")
    return 'config.json: model_type = "gpt2": supported are deepseek_v3, glm4_moe, '


def unsupported_rope(folder: Path) -> str:
    set_config(folder, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})
    return 'config.json: rope_parameters: rope_type = "longrope": supported are default, linear, yarn'


def unsupported_quantization(folder: Path) -> str:
    set_config(folder, quantization_config={"quant_method": "gptq"})
    return 'config.json: quantization_config: quant_method = "gptq": supported are fp8'


def layer_too_many(folder: Path) -> str:
    set_config(folder, num_hidden_layers=2)
    return "tensor model.layers.2.input_layernorm.weight and 36 more: not part of qwen3_moe"


def weight_that_is_no_number(folder: Path) -> str:
    path = folder / SECOND_SHARD
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xc0\x7f"  # NaN in bfloat16
    path.write_bytes(content)
    return f"{path}: tensor model.norm.weight holds NaN or infinity"


def missing_shard(folder: Path) -> str:
    (folder / SECOND_SHARD).unlink()
    return f"{folder / SECOND_SHARD}: shard is missing; model.safetensors.index.json names it for"


def truncated_shard(folder: Path) -> str:
    path = folder / SECOND_SHARD
    os.truncate(path, path.stat().st_size - 1000)
    return f"but the file has {path.stat().st_size}: truncated"


def corrupted_header(folder: Path) -> str:
    path = folder / SECOND_SHARD
    content = bytearray(path.read_bytes())
    content[20] = 0xFF
    path.write_bytes(content)
    return f"{path}: not readable as safetensors"


def header_without_end(folder: Path) -> str:
    path = folder / SECOND_SHARD
    path.write_bytes(b"\xff" * 4096)
    return f"{path}: truncated or not safetensors: its header does not fit in the file"


def other_shape(folder: Path) -> str:
    set_config(folder, moe_intermediate_size=24)
    return "config.json says [24, 36]"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return f"model = '{folder}': has no tokenizer.json"


def broken_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return f"{folder / 'tokenizer.json'}: not a tokenizer"


def set_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


Damage = Callable[[Path], str]


@pytest.mark.parametrize(
    "damage",
    [
        no_folder,
        no_config,
        no_weights,
        unsupported_family,
        layer_too_many,
        weight_that_is_no_number,
        missing_shard,
        truncated_shard,
        no_tokenizer,
    ],
)
def test_a_pod_of_a_damaged_checkpoint(place: Bench, damage: Damage) -> None:
    folder = copy_checkpoint(SHARDED, place.base / "model")
    said = damage(folder)
    refusal = place.up(folder)
    assert said in refusal.line and refusal.exit_code == CONFIG
    assert "READY" not in refusal.stdout


@pytest.mark.parametrize(
    ("service", "damage"),
    [
        ("expert", broken_config),
        ("expert", unsupported_rope),
        ("attention", unsupported_quantization),
        ("expert", corrupted_header),
        ("attention", header_without_end),
        ("expert", other_shape),
        ("gateway", broken_tokenizer),
    ],
)
def test_a_single_process_of_a_damaged_checkpoint(service: str, damage: Damage) -> None:
    with bench() as one:
        folder = copy_checkpoint(SHARDED, one.base / "model")
        said = damage(folder)
        refusal = one.xds("run", service, environ={"XDS_MODEL": str(folder), "XDS_GATEWAY__PORT": "0"})
        assert said in refusal.line and refusal.exit_code == CONFIG
        assert refusal.line.startswith(f"{service}-0: ")
        assert one.leftovers(keeps_locks=True) == []


def test_more_expert_workers_than_experts(place: Bench) -> None:
    folder = copy_checkpoint(SHARDED, place.base / "model")
    set_config(folder, num_local_experts=3)
    refusal = place.up(folder, "--expert-workers", "4")
    assert "topology.expert_workers = 4: must be at most the model's 3 experts" in refusal.line
    assert refusal.exit_code == CONFIG


def test_a_window_beyond_the_models(place: Bench) -> None:
    refusal = place.up(QWEN, "--set", "scheduler.max_model_len=4096")
    assert "scheduler.max_model_len = 4096: must" in refusal.line and "2048" in refusal.line
    assert refusal.exit_code == CONFIG


# --------------------------------------------------------------------------- what the machine lacks


@pytest.mark.parametrize("setting", ["kv.cache_tokens=100000000", "xccl.shared_bytes_max=1048576"])
def test_too_little_memory(place: Bench, setting: str) -> None:
    refusal = place.up(QWEN, "--set", setting)
    assert refusal.exit_code == RESOURCE
    for word in ("bytes needed", "xccl.shared_bytes_max", "MemAvailable", "must not exceed"):
        assert word in refusal.line


def test_a_port_in_use(place: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refusal = place.up(QWEN, "--port", str(port))
    assert f"gateway 127.0.0.1:{port}: address already in use" in refusal.line
    assert refusal.exit_code == RESOURCE


def test_a_host_that_is_not_ours(place: Bench) -> None:
    refusal = place.up(QWEN, "--host", "192.0.2.1", "--port", "80")
    assert "gateway 192.0.2.1:80: " in refusal.line and refusal.exit_code == RESOURCE


# --------------------------------------------------------------------------- beside a running pod


@pytest.fixture
def pod(deepseek_pod: Pod) -> Iterator[Pod]:
    """The shared pod, which must not lose a process over what is tried beside it."""
    before = [member["pid"] for member in deepseek_pod.status()["members"]]
    yield deepseek_pod
    status = deepseek_pod.status()
    assert status["healthy"] and [member["pid"] for member in status["members"]] == before


def beside(pod: Pod) -> Bench:
    return Bench(pod.name, pod.runtime_dir.parent)


def test_a_second_pod_of_the_same_name(pod: Pod) -> None:
    refusal = beside(pod).up(QWEN)
    assert f"pod {pod.name} is already running (launcher pid {pod.launcher.pid})" in refusal.line
    assert refusal.exit_code == RESOURCE


def test_a_second_process_in_the_same_role(pod: Pod) -> None:
    refusal = beside(pod).xds("run", "expert", "--index", "1", environ={"XDS_MODEL": str(QWEN)})
    assert "expert-1 is already running" in refusal.line and refusal.exit_code == RESOURCE


def test_a_process_with_other_settings_is_refused(pod: Pod) -> None:
    """A role of its own, so that no lock refuses it; but the pod has other settings."""
    environ = {"XDS_MODEL": str(QWEN), "XDS_TOPOLOGY__EXPERT_WORKERS": "8"}
    refusal = beside(pod).xds("run", "expert", "--index", "7", environ=environ)
    assert refusal.exit_code == REFUSED
    assert "refused by the manager" in refusal.stderr.splitlines()[-1]
    assert "Traceback" not in refusal.stderr
