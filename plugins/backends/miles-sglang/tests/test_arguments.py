"""From options to the words of a server's command line, from the command line of miles on."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from miles_sglang.arguments import router_arguments, server_arguments
from miles_sglang.flags import arguments_of, words
from miles_sglang.launch import homes, own_servers
from miles_sglang.options import SGLangOptions
from miles_sglang.plugin import miles_configure

from miles.api import ConfigError, EngineContext, EngineError
from miles.cli import main
from miles.config import Config
from miles.options import read_options


@pytest.fixture
def sglang(stand_ins):
    """A package of that name whose server has five arguments, and one for its router."""
    arguments_of.cache_clear()
    yield
    arguments_of.cache_clear()


@pytest.fixture
def no_sglang(monkeypatch):
    arguments_of.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    yield
    arguments_of.cache_clear()


def context(folder=Path("runs/a"), **changes):
    given = {
        "checkpoint": Path("models/tiny"), "hf_config": None, "tokenizer": object(), "bridge": None, "device": "cuda",
        "dtype": "bf16", "load_weights": False, "run_dir": folder,
    }  # fmt: skip
    return EngineContext(**{**given, **changes})


def command(options=None, tp_size=1, index=0, **changes):
    return words(server_arguments(SGLangOptions(**(options or {})), context(**changes), tp_size, index))


def test_values_as_words():
    said = words({"a_b": 0.5, "on": True, "off": False, "none": None, "many": [1, "x"], "map": {"k": [1]}, "n": 0})
    assert said == ["--a-b", "0.5", "--on", "--many", "1", "x", "--map", '{"k": [1]}', "--n", "0"]


def test_an_engine_of_its_own():
    assert command() == words({
        "model_path": "models/tiny", "dtype": "bfloat16", "load_format": "dummy", "tp_size": 1, "base_gpu_id": 0,
        "weight_version": 0, "log_level_http": "warning",
    })  # fmt: skip


def test_what_the_context_decides():
    said = command(device="cuda:2", load_weights=True, tokenizer=None, tp_size=2, index=1)
    assert said == words({
        "model_path": "models/tiny", "dtype": "bfloat16", "load_format": "auto", "skip_tokenizer_init": True,
        "tp_size": 2, "base_gpu_id": 4, "weight_version": 0, "log_level_http": "warning",
    })  # fmt: skip
    with pytest.raises(EngineError, match=r"bf16 or fp32, not in fp64 \(--train-dtype\)"):
        command(dtype="fp64")


def test_fp32_is_for_cpus_and_for_those_who_ask_for_it():
    with pytest.raises(EngineError, match="--train-dtype bf16.*--sglang-dtype bfloat16.*--weight-sync-tolerance"):
        command(device="cuda:0", dtype="fp32")
    types = [
        server_arguments(SGLangOptions(**given), context(device=device, dtype="fp32"), 1)["dtype"]
        for given, device in [({}, "cpu"), ({"dtype": "bfloat16"}, "cuda"), ({"dtype": "float32"}, "cuda")]
    ]
    assert types == ["float32", "bfloat16", "float32"]


SLEEPS = ["--enable-memory-saver", "--cuda-graph-backend-prefill", "disabled"]


@pytest.mark.parametrize(
    ("changes", "words_of_memory"),
    [
        ({"shares": True, "sleeps": True}, ["--mem-fraction-static", "0.7", *SLEEPS]),
        ({"shares": True}, ["--mem-fraction-static", "0.4"]),
        ({"sleeps": True}, SLEEPS),
        ({}, []),
    ],
)
def test_memory_goes_by_who_is_beside_it(changes, words_of_memory):
    said = command(**changes)
    start = said.index("--base-gpu-id") + 2
    assert said[start : said.index("--weight-version")] == words_of_memory


def test_expert_choices_are_returned_where_requests_ask_for_them():
    assert "--enable-return-routed-experts" in command(routed_experts=True)
    assert "--enable-return-routed-experts" not in command()


def test_the_user_has_the_last_word():
    said = server_arguments(
        SGLangOptions(mem_fraction_static=0.5, enable_memory_saver=False, dtype="half", stream=True),
        context(shares=True, sleeps=True),
        1,
    )
    assert (said["mem_fraction_static"], said["enable_memory_saver"], said["dtype"]) == (0.5, False, "half")
    assert said["incremental_streaming_output"] is True
    assert said["cuda_graph_backend_prefill"] is None
    awake = server_arguments(SGLangOptions(enable_memory_saver=True), context(), 1)
    assert awake["cuda_graph_backend_prefill"] == "disabled"
    options = SGLangOptions(cuda_graph_backend_prefill="tc_piecewise")
    assert server_arguments(options, context(sleeps=True), 1)["cuda_graph_backend_prefill"] == "tc_piecewise"


def test_servers_of_one_run_have_seeds_of_their_own():
    seeds = {
        server_arguments(SGLangOptions(random_seed=10), context(rank=rank, gpus=4), 2, index)["random_seed"]
        for rank in range(3)
        for index in range(2)
    }
    assert seeds == set(range(10, 16))


def test_arguments_of_the_router_are_its_own():
    options = SGLangOptions(router_policy="round_robin", attention_backend="fa3")
    assert router_arguments(options) == {"policy": "round_robin"}
    assert "router_policy" not in server_arguments(options, context(), 1)


# ------------------------------------------------------------------------------------------------------- what is wrong


def faults(**options):
    _, found = read_options(SGLangOptions, options)
    return " ".join(map(str, found))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model_path", "cannot be set: it is the run's own: --hf-checkpoint"),
        ("nccl_port", "cannot be set: a free one is found"),
        ("tensor_parallel_size", "write --sglang-tp-size"),
        ("router_port", "with --rollout-external it names a running router"),
        ("pp_size", "tensor-parallel ranks only"),
    ],
)
def test_what_is_ours_to_say_is_refused(no_sglang, name, why):
    said = faults(**{name: 1})
    assert f"--sglang-{name.replace('_', '-')} cannot be set" in said
    assert why in said


def test_ranks_that_share_requests_need_attention_that_does(no_sglang):
    assert "--sglang-dp-size cannot be set" in faults(dp_size=2)
    assert faults(dp_size=2, enable_dp_attention=True) == ""


def test_names_are_compared_with_the_installed_server(sglang):
    assert faults(mem_fraction_static=0.5, disable_cuda_graph=True, enable_torch_compile=True) == ""
    said = faults(mem_fraction=0.5, cuda_graphs=True)
    assert "--sglang-mem-fraction is no argument of the sglang that is installed" in said
    assert "did you mean --sglang-mem-fraction-static?" in said
    assert "--sglang-cuda-graphs is no argument" in said
    assert "did you mean --sglang-router-policy?" in faults(router_polic="x")
    assert faults(router_policy="round_robin") == ""


def test_without_sglang_any_name_passes(no_sglang):
    assert faults(mem_fraction=0.5, router_polic="x") == ""


# ---------------------------------------------------------------------------------------------------- many GPUs


def test_an_engine_of_four_gpus_can_be_two_servers_behind_a_router(tmp_path, monkeypatch):
    monkeypatch.setattr("miles_sglang.server.installed", lambda package: True)
    monkeypatch.setattr("miles_sglang.router.installed", lambda package: True)
    options = SGLangOptions(tp_size=2, router_policy="round_robin")
    servers, router = own_servers(options, context(tmp_path, gpus=4, rank=3))
    assert [server.process.log.name for server in servers] == ["sglang-3-0.log", "sglang-3-1.log"]
    assert router.process.log == tmp_path / "logs" / "sglang-3-router.log"
    assert [said(server, "--base-gpu-id") for server in servers] == ["0", "2"]
    assert said(router, "--policy") == "round_robin"
    assert router.process.command[-3:] == ["--worker-urls", servers[0].url, servers[1].url]
    ports = {port.number for one in (*servers, router) for port in one.ports}
    assert len(ports) == 6
    whole, none = own_servers(SGLangOptions(), context(tmp_path, gpus=4))
    assert (len(whole), none, said(whole[0], "--tp-size")) == (1, None, "4")
    with pytest.raises(EngineError, match="4 GPUs cannot be divided into servers of 3"):
        own_servers(SGLangOptions(tp_size=3), context(tmp_path, gpus=4))


def test_weights_go_to_the_gpus_that_servers_were_given():
    four = context(gpus=4)
    assert homes(replace(four, device="cuda"), 2) == [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]
    assert homes(replace(four, device="cuda:4"), 1) == [["cuda:4", "cuda:5", "cuda:6", "cuda:7"]]
    assert homes(replace(four, device="cpu"), 4) == [["cpu"]] * 4


def said(service, flag):
    return service.process.command[service.process.command.index(flag) + 1]


# ------------------------------------------------------------------------------------------- from the command line


def dry_run(capsys, *flags):
    status = main(["config", "--rollout-engine", "sglang", *flags])
    said = capsys.readouterr()
    return SimpleNamespace(status=status, out=said.out, err=said.err)


def test_every_argument_is_a_flag(no_sglang, capsys):
    shown = dry_run(
        capsys, "--sglang-mem-fraction-static", "0.7", "--sglang-disable-cuda-graph", "--sglang-tp-size", "2",
        "--sglang-cuda-graph-bs-decode", "1", "2", "4", "--sglang-json-model-override-args", '{"a": 1}',
        "--sglang-router-policy", "round_robin", "--sglang-enable-memory-saver", "false",
    )  # fmt: skip
    assert shown.status == 0, shown.err
    settings = dict(line.split("#")[0].strip().split(" = ", 1) for line in shown.out.splitlines() if " = " in line)
    assert settings["rollout.engine.mem_fraction_static"] == "0.7"
    assert settings["rollout.engine.disable_cuda_graph"] == "true"
    assert settings["rollout.engine.tp_size"] == "2"
    assert settings["rollout.engine.cuda_graph_bs_decode"] == "[1, 2, 4]"
    assert settings["rollout.engine.json_model_override_args"] == '{"a": 1}'
    assert settings["rollout.engine.router_policy"] == '"round_robin"'
    assert settings["rollout.engine.enable_memory_saver"] == "false"


def test_a_flag_that_is_not_ours_to_give_is_a_problem_of_the_configuration(no_sglang, capsys):
    shown = dry_run(capsys, "--sglang-port", "30000")
    assert shown.status == 2
    assert "--sglang-port cannot be set: a free one is found" in shown.err


def test_weights_under_frozen_requests_need_streams():
    def configure(engine, **rollout):
        rollout = {"mode": "fully_async", "pause_mode": "in_place", **rollout}
        miles_configure(Config.model_validate({"rollout": {"engine": engine, **rollout}}))

    configure({"name": "sglang", "stream": True})
    configure("sglang", pause_mode="retract")
    configure("sglang", mode="sync")
    configure("torch")
    for engine in ("sglang", "sglang_external", "miles-sglang/sglang"):
        with pytest.raises(ConfigError, match=r"--sglang-stream.*--pause-generation-mode retract"):
            configure(engine)
