"""Recipes of recipes/scale: accelerate reads their launch files, and the figures beside them are those of a plan."""

import json
import os
import re
from dataclasses import replace
from typing import Any, Final

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import Qwen3Config

from flexkd.costs import planning, skeletons
from flexkd.recipe import load_recipe
from tests.source_tree import ROOT

SCALE: Final = ROOT / "recipes" / "scale"
PAGE: Final = SCALE / "README.md"
PROCESSES: Final = {"one_node": 8, "two_nodes": 16}
QWEN3: Final[dict[str, dict[str, Any]]] = {
    "Qwen/Qwen3-4B": {
        "hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "tie_word_embeddings": True
    },
    "Qwen/Qwen3-8B": {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288},
    "Qwen/Qwen3-14B": {
        "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 17408, "num_attention_heads": 40
    },
}  # fmt: skip
"""Sizes in the config.json of each model on the hub; the rest is the same in all of them."""
_SAME: Final = {
    "vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def config_of(source: str, **_: Any) -> Qwen3Config:
    """What `flexkd plan` fetches from the hub, which tests do not reach."""
    return Qwen3Config(**{**_SAME, **QWEN3[source]}, architectures=["Qwen3ForCausalLM"])


def row(name: str) -> str:
    """A line of the page: what `flexkd plan RECIPE --device h100 --processes N` says, with `--fsdp` and without."""
    recipe = load_recipe(SCALE / f"{name}.yaml", [f"{place}.precision=bfloat16" for place in ("teacher", "training")])
    with pytest.MonkeyPatch.context() as patch:
        for module in (planning, skeletons):
            patch.setattr(module, "load_config", config_of)
        worker, _ = planning.draft(recipe, "h100", processes=PROCESSES[name])
    whole = planning.memory_of(worker)
    divided = replace(whole, is_divided=True)
    memory = {stage.name: stage.peak for stage in divided.stages()}
    bytes_of = [memory["teacher's answers"], whole.training().peak, memory["training"], divided.network]
    billions = [model.num_parameters() / 1e9 for model in (worker.models.teacher, worker.models.student)]
    sizes = [*(f"{number:.1f} B" for number in billions), *(f"{size / 1e9:.0f} GB" for size in bytes_of)]
    return f"| {' | '.join([f'[{name}]({name}.yaml)', str(PROCESSES[name]), *sizes])} |"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_the_figures_on_the_page_are_those_of_the_plan(name: str) -> None:
    """Rewritten by `python -m tests.test_scale`."""
    assert row(name) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_launches_the_recipes_as_the_files_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is read by accelerate's own loader, and by its launcher to what a process finds in its environment."""
    file = SCALE / f"{name}.json"
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == PROCESSES[name]
    script = ["--config_file", str(file), "-m", "flexkd", "distill", str(SCALE / f"{name}.yaml")]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(script))
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    assert set(json.loads(file.read_text("utf-8"))["fsdp_config"]) <= set(vars(arguments))


def write_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in PROCESSES:
        text = re.sub(rf"^\| \[{name}\].*$", row(name), text, flags=re.MULTILINE)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_page()
