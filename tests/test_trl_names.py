"""TRL's names: the real trainers write no key that the table lacks, and none that it says is missing."""

import inspect
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

pytest.importorskip("trl")

import tokenizers
import torch
import transformers

from grpo_watchdog.metrics import METRICS
from grpo_watchdog.names.trl_keys import FAMILIES, NOTES, as_markdown, canonical, known

trl: Any = pytest.importorskip("trl")  # neither says which names it exports, or their types
datasets: Any = pytest.importorskip("datasets")

# TRL 1.16 reads a property whose name transformers 5.24 has deprecated; no setting keeps it from that.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 2
WORDS = {word: index for index, word in enumerate(["<pad>", "<eos>", "is", *"abcdefghijklm"])}
PROMPTS = ["a b is", "c d is", "e f is", "g h is"] * 2
PAIRS = {"prompt": PROMPTS, "chosen": ["a b c", "d"] * 4, "rejected": ["e", "f g h"] * 4}
GENERATED = "rows in which nothing was generated"
SEEN = {"num_input_tokens_seen", "train_runtime", "train_tokens_per_second"}
CLIP = {f"clip_ratio/{what}" for what in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}

OURS = {"loss", "grad_norm", "entropy", "mean_reward", "std_reward", "completion_length", "truncated_fraction"}

Row = dict[str, Any]
progress: Any = transformers.utils.logging  # its functions carry no types
tokenizer_of: Any = transformers.PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Llama of a few thousand weights and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))  # noqa: S106 - a word
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = tokenizer_of(tokenizer_object=words, padding_side="left", model_max_length=32, **ends)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=None, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    progress.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    progress.enable_progress_bar()
    datasets.enable_progress_bars()


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def letter_reward(completions: list[str], **_: Any) -> list[float]:
    return [float("a" in completion) for completion in completions]


def rows_of(
    trainer: type[Any], config: type[Any], model: str, folder: Path, data: dict[str, Any], given: Row, **settings: Any
) -> list[Row]:
    """The train rows of a short run; the last of a run is a summary, and the trainer's table knows every other key."""
    args = {
        "output_dir": str(folder), "max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": 4,
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "seed": 0,
        "activation_checkpointing": False,
    }  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    run = trainer(
        model=given.pop("model", model), args=config(**args | settings), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(data), **given,
    )  # fmt: skip
    run.remove_callback(transformers.PrinterCallback)
    run.train()
    rows = [row for row in run.state.log_history if "train_loss" not in row]
    unknown = {key for row in rows for key in row if known(trainer.__name__, key) is None}
    assert not unknown
    return rows


def grpo(model: str, folder: Path, rewards: Any = length_reward, **settings: Any) -> list[Row]:  # noqa: ANN401
    settings = {"num_generations": 4, "max_completion_length": 4} | settings
    given = {"reward_funcs": rewards}
    return rows_of(trl.GRPOTrainer, trl.GRPOConfig, model, folder, {"prompt": PROMPTS}, given, **settings)


def rloo(model: str, folder: Path, rewards: Any = length_reward, **settings: Any) -> list[Row]:  # noqa: ANN401
    settings = {"num_generations": 4, "max_completion_length": 4} | settings
    given = {"reward_funcs": rewards}
    return rows_of(trl.RLOOTrainer, trl.RLOOConfig, model, folder, {"prompt": PROMPTS}, given, **settings)


def sft(model: str, folder: Path, callbacks: Any = (), **settings: Any) -> list[Row]:  # noqa: ANN401
    data = {"prompt": PROMPTS, "completion": PAIRS["chosen"]}
    return rows_of(trl.SFTTrainer, trl.SFTConfig, model, folder, data, {"callbacks": list(callbacks)}, **settings)


def always(trainer: str, *functions: str) -> set[str]:
    """What the table has in every row in which something was generated, reward functions in place of stars."""
    found = {
        key
        for key, row in FAMILIES[trainer].items()
        if row.when in {"", GENERATED, "DeepSpeed where its engine has none"}
    }
    stars = {key for key in found if "*" in key}
    return found - stars | {key.replace("*", name) for key in stars for name in functions}


@pytest.mark.parametrize(
    ("settings", "beyond"),
    [
        ({}, CLIP),
        ({"beta": 0.1}, CLIP | {"kl"}),
        ({"loss_type": "grpo", "beta": 0.1, "importance_sampling_level": "sequence"}, CLIP | {"kl"}),
        ({"loss_type": "bnpo"}, CLIP),
        ({"loss_type": "dr_grpo"}, CLIP),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, CLIP),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"cispo_clip_ratio"}),
        ({"loss_type": "sapo"}, set()),
        ({"loss_type": "vespo"}, {"vespo/phi_seq_mean"}),
        ({"entropy_coef": 0.1}, CLIP | {"policy_loss", "entropy_coef"}),
        ({"entropy_coef": 0.0, "use_adaptive_entropy": True}, CLIP | {"policy_loss", "entropy_coef"}),
    ],
    ids=["dapo", "beta", "sequence", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "bonus", "adaptive"],
)
def test_grpo_writes_the_keys_that_the_table_says_under_each_setting(
    model: str, tmp_path: Path, settings: Row, beyond: set[str]
) -> None:
    rows = grpo(model, tmp_path, **settings)

    assert len(rows) == STEPS
    for row in rows:
        assert set(row) == always("GRPOTrainer", "length_reward") | beyond
        assert set(canonical("GRPOTrainer", row)) == OURS | (beyond & {"kl"})


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Trainer"])
def test_every_key_in_a_trainers_source_is_in_its_table_and_the_other_way_round(name: str) -> None:
    # What no run here can have: an engine, tools, a mixture of experts.
    source = inspect.getsource(sys.modules[getattr(trl, name).__module__])
    found = re.findall(r"""_metrics\[(?:mode|"train")\]\[f?"([^"]+)"\]""", source)
    written = {str(key).replace("{reward_func_name}", "*") for key in found}

    assert written == set(FAMILIES[name]) - set(FAMILIES["Trainer"])


def test_two_reward_functions_have_a_mean_and_a_spread_each(model: str, tmp_path: Path) -> None:
    rows = grpo(model, tmp_path, rewards=[length_reward, letter_reward], reward_weights=[1.0, 2.0])

    assert set(rows[0]) == always("GRPOTrainer", "length_reward", "letter_reward") | CLIP
    for row in rows:
        assert row["reward"] == pytest.approx(row["rewards/length_reward/mean"] + 2 * row["rewards/letter_reward/mean"])
        assert canonical("GRPOTrainer", row)["mean_reward"] == row["reward"]


def test_rows_in_which_nothing_was_generated_lack_what_the_table_says(model: str, tmp_path: Path) -> None:
    first, second = grpo(model, tmp_path, num_iterations=2, beta=0.1)

    assert set(first) == always("GRPOTrainer", "length_reward") | CLIP | {"kl"}
    assert set(first) - set(second) == {
        key for key in first if (row := known("GRPOTrainer", key)) and row.when == GENERATED
    }


@pytest.mark.parametrize(("scale", "fraction", "ours"), [("group", 1.0, 1.0), ("none", 1.0, 1.0), ("batch", 0.0, None)])
def test_equal_groups_show_as_such_only_where_rewards_are_not_scaled_by_the_batch(
    model: str, tmp_path: Path, scale: str, fraction: float, ours: float | None
) -> None:
    def group_reward(prompts: list[str], **_: Any) -> list[float]:
        return [float(index // 4) for index in range(len(prompts))]  # one group's are equal, another's are others

    settings = {"scale_rewards": scale, "per_device_train_batch_size": 8}
    rows = grpo(model, tmp_path, rewards=group_reward, **settings)

    args = trl.GRPOConfig(str(tmp_path), scale_rewards=scale, use_cpu=True, bf16=False, activation_checkpointing=False)
    for row in rows:
        assert row["frac_reward_zero_std"] == fraction
        assert row["reward_std"] > 0
        assert canonical("GRPOTrainer", row, args).get("zero_std_fraction") == ours
        assert "zero_std_fraction" not in canonical("GRPOTrainer", row)


def test_what_grpo_calls_policy_loss_is_minimised_and_holds_the_kl_term(model: str, tmp_path: Path) -> None:
    def same_reward(prompts: list[str], **_: Any) -> list[float]:
        return [1.0] * len(prompts)  # advantages are 0, so nothing of the policy is in its loss

    settings = {"loss_type": "bnpo", "beta": 0.5, "entropy_coef": 0.25}
    row = grpo(model, tmp_path, rewards=same_reward, **settings)[-1]

    assert row["kl"] > 0
    assert row["policy_loss"] == pytest.approx(0.5 * row["kl"])
    assert row["loss"] == pytest.approx(row["policy_loss"] - 0.25 * row["entropy"], abs=1e-5)
    assert {"loss", "kl", "entropy"} <= set(canonical("GRPOTrainer", row))
    assert "policy_loss" not in canonical("GRPOTrainer", row)


def test_a_step_without_rewards_is_left_out_of_the_average(model: str, tmp_path: Path) -> None:
    calls: list[int] = []

    def failing_reward(completions: list[str], **_: Any) -> list[float | None]:
        calls.append(1)
        return [3.0 if len(calls) == STEPS else math.nan] * len(completions)

    (row,) = grpo(model, tmp_path, rewards=failing_reward, logging_steps=2)

    assert row["reward"] == 3.0
    assert math.isnan(canonical("GRPOTrainer", {"reward": None})["mean_reward"])


@pytest.mark.parametrize(("beta", "beyond"), [(0.1, {"kl"}), (0.0, set())])
def test_rloo_writes_the_keys_that_the_table_says(model: str, tmp_path: Path, beta: float, beyond: set[str]) -> None:
    rows = rloo(model, tmp_path, beta=beta)

    for row in rows:
        assert set(row) == always("RLOOTrainer", "length_reward") | beyond


def test_the_kl_of_rloo_is_in_the_rewards_that_it_compares(model: str, tmp_path: Path) -> None:
    calls: list[int] = []

    def soon_the_same(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        return [1.0] * len(completions) if len(calls) > 1 else [float(index % 4) for index in range(len(completions))]

    _, second = rloo(model, tmp_path, rewards=soon_the_same, beta=0.1)

    assert second["frac_reward_zero_std"] == 0.0
    assert (second["reward"], second["reward_std"]) == (1.0, 0.0), "as logged, the reward is the raw one"
    assert canonical("RLOOTrainer", second)["kl_k1"] == second["kl"] != 0.0
    assert "kl" not in canonical("RLOOTrainer", second)


def test_sft_writes_the_keys_that_the_table_says(model: str, tmp_path: Path) -> None:
    for row in sft(model, tmp_path):
        assert set(row) == always("SFTTrainer")
    for row in sft(model, tmp_path, include_num_input_tokens_seen="all"):
        assert set(row) == always("SFTTrainer") | SEEN


def test_dpo_kto_and_reward_write_the_keys_that_the_table_says(model: str, tmp_path: Path) -> None:
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    unpaired = {"prompt": PROMPTS, "completion": PAIRS["chosen"], "label": [True, False] * 4}
    paired = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}

    for row in rows_of(trl.DPOTrainer, trl.DPOConfig, model, tmp_path, PAIRS, {}):
        assert set(row) == always("DPOTrainer")
        assert set(canonical("DPOTrainer", row)) == {"loss", "grad_norm", "entropy"}
    for row in rows_of(trl.KTOTrainer, trl.KTOConfig, model, tmp_path, unpaired, {}):
        assert set(row) == always("KTOTrainer") | paired | {"logits/chosen", "logits/rejected"}
        assert set(canonical("KTOTrainer", row)) == {"loss", "grad_norm", "entropy"}
    for row in rows_of(trl.RewardTrainer, trl.RewardConfig, model, tmp_path, PAIRS, {"model": scorer}):
        assert set(row) == always("RewardTrainer")
        assert set(canonical("RewardTrainer", row)) == {"loss", "grad_norm"}, "its mean_reward is no policy's reward"


class Poison(transformers.TrainerCallback):
    """From the second step on, the weights are NaN."""

    def on_step_begin(self, *given: Any, **kwargs: Any) -> None:
        _, state, _ = given
        if state.global_step == 1:
            with torch.no_grad():
                next(kwargs["model"].parameters()).fill_(math.nan)


def test_a_nan_loss_is_hidden_by_default_and_the_other_keys_show_it(model: str, tmp_path: Path) -> None:
    _, hidden = sft(model, tmp_path, callbacks=[Poison()])
    _, shown = sft(model, tmp_path, callbacks=[Poison()], logging_nan_inf_filter=False)

    assert hidden["loss"] == 0.0
    assert math.isnan(shown["loss"])
    assert math.isnan(hidden["grad_norm"])
    assert math.isnan(hidden["entropy"])


def test_over_several_steps_the_loss_is_a_mean_and_the_gradient_norm_is_the_last(model: str, tmp_path: Path) -> None:
    first, second = sft(model, tmp_path)
    (both,) = sft(model, tmp_path, logging_steps=2)

    assert both["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert both["entropy"] == pytest.approx((first["entropy"] + second["entropy"]) / 2)
    assert first["grad_norm"] != pytest.approx(second["grad_norm"])
    assert both["grad_norm"] == pytest.approx(second["grad_norm"])
    assert both["num_tokens"] == second["num_tokens"]


class Slow(transformers.TrainerCallback):
    """The learning rate that is applied is 0."""

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = 0.0


def test_the_learning_rate_in_the_log_is_not_the_one_applied(model: str, tmp_path: Path) -> None:
    rows = sft(model, tmp_path, callbacks=[Slow()])

    assert [row["learning_rate"] for row in rows] == [0.1] * STEPS
    assert all("learning_rate" not in canonical("SFTTrainer", row) for row in rows)


def test_the_table_names_only_canonical_metrics_and_each_once_a_family() -> None:
    for rows in FAMILIES.values():
        ours = [row.canonical for row in rows.values() if row.canonical is not None]
        assert set(ours) <= set(METRICS)
        assert len(ours) == len(set(ours))
        assert all(key == row.key and row.means and row.reduction for key, row in rows.items())
        assert {row.pair for row in rows.values()} <= {"", "current/reference", "current/old", "trainer/sampler"}


def test_a_metric_that_depends_on_settings_is_given_where_they_hold_alone() -> None:
    class Args:
        def __init__(self, **settings: Any) -> None:
            vars(self).update(settings)

    grpo_row, rloo_row = {"frac_reward_zero_std": 0.5}, {"frac_reward_zero_std": 0.25}
    summed = {"multi_objective_aggregation": "sum_then_normalize"}
    apart = {"scale_rewards": "group", "multi_objective_aggregation": "normalize_then_sum"}

    assert canonical("GRPOTrainer", grpo_row, Args(scale_rewards="none", **summed)) == {"zero_std_fraction": 0.5}
    assert canonical("GRPOTrainer", grpo_row, Args(**apart)) == {}
    assert canonical("RLOOTrainer", rloo_row, Args(beta=0.0, reward_clip_range=None)) == {"zero_std_fraction": 0.25}
    assert canonical("RLOOTrainer", rloo_row, Args(beta=0.0, reward_clip_range=(0, 1))) == {}
    assert canonical("RLOOTrainer", rloo_row, Args(beta=0.1, reward_clip_range=None)) == {}
    for trainer, rows in FAMILIES.items():
        assert all(canonical(trainer, {key: 1.0}) == {} for key, row in rows.items() if row.only)


def test_names_from_the_user_are_known_by_their_pattern_and_strange_ones_are_not() -> None:
    mean = known("GRPOTrainer", "rewards/my[0]/org.model/mean")

    assert mean is FAMILIES["GRPOTrainer"]["rewards/*/mean"]
    assert known("GRPOTrainer", "rewards/length/median") is None
    assert known("GRPOTrainer", "eval_reward") is None
    assert canonical("GRPOTrainer", {"sampling/sampling_logp_difference/mean": 0.1}) == {"sampler_mismatch": 0.1}
    assert canonical("GRPOTrainer", {"eval_loss": 1.0, "train_loss": 1.0, "my_metric": 1.0}) == {}


def test_a_trainer_that_the_table_lacks_is_taken_as_a_plain_one() -> None:
    assert canonical("MyTrainer", {"loss": 1.0, "kl": 2.0, "learning_rate": 0.1}) == {"loss": 1.0}


def test_the_page_has_every_key_of_each_family_and_whole_rows() -> None:
    page = as_markdown()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    sections = page.split("\n### ")

    assert page.startswith(NOTES.rstrip())
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert len(sections) == 1 + len(FAMILIES)
    for section, rows in zip(sections[1:], FAMILIES.values(), strict=True):
        assert all(f"`{key}`" in section for key in rows)
