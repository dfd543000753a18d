from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import grpo_watchdog as gw
from fake_training import Training, differences
from grpo_watchdog.cli import main
from grpo_watchdog.drill import DrillReport


class Loop(NamedTuple):
    """A real little training: a reference, a KL term, a clip, a schedule, and something else with state."""

    dog: gw.Watchdog
    loss: Callable[[], torch.Tensor]
    step: Callable[[], float]
    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    config: SimpleNamespace


def a_loop(folder: Path, *, optimizer: str = "adam", fault: str = "", scheduled: bool = True, **options: Any) -> Loop:
    torch.manual_seed(0)
    config = SimpleNamespace(beta=0.1, epsilon=0.2)
    taken = (config.beta, config.epsilon)
    policy = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 8))
    reference = copy.deepcopy(policy).requires_grad_(requires_grad=False).eval()
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(policy.parameters(), lr=1e-2),
        "sgd": lambda: torch.optim.SGD(policy.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        "rmsprop": lambda: torch.optim.RMSprop(policy.parameters(), lr=1e-3),
    }
    made = makers[optimizer]()
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda n: min(1.0, n / 10)) if scheduled else None
    prompts = torch.randn(32, 4)
    with torch.no_grad():
        old = torch.log_softmax(policy(prompts), dim=-1)
        chosen = torch.multinomial(old.exp(), 4, replacement=True)
        old = old.gather(1, chosen)
    advantage = torch.randn(32, 4)

    def loss() -> torch.Tensor:
        beta = taken[0] if fault == "beta" else config.beta
        epsilon = taken[1] if fault == "clip" else config.epsilon
        logp = torch.log_softmax(policy(prompts), dim=-1).gather(1, chosen)
        ratio = (logp - old).exp()
        behind = torch.log_softmax(reference(prompts), dim=-1).gather(1, chosen) - logp
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
        total: torch.Tensor = -surrogate.mean() + beta * (behind.exp() - behind - 1).mean()
        return total

    def step() -> float:
        made.zero_grad()
        now = loss()
        now.backward()
        made.step()
        if schedule is not None:
            schedule.step()
        return now.item()

    dog = gw.attach(
        model=policy,
        optimizer=made,
        scheduler=None if fault == "scheduler" else schedule,
        reference=reference,
        kl_coef=gw.attr(config, "beta"),
        clip_epsilon=gw.attr(config, "epsilon"),
        ratio_to="old",
        rules="guarded",
        run_dir=folder,
        checkpoint_every=5,
        **options,
    )
    if fault == "hook":

        def rewrite(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2

        made.register_step_pre_hook(rewrite)
    return Loop(dog, loss, step, policy, made, config)


def failed(report: DrillReport) -> list[str]:
    return [proof.what for proof in report.proofs if proof.result == "fail"]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("scheduled", [True, False])
def test_a_sound_loop_passes_every_proof(tmp_path: Path, optimizer: str, scheduled: bool) -> None:  # noqa: FBT001
    loop = a_loop(tmp_path, optimizer=optimizer, scheduled=scheduled)
    report = loop.dog.drill(loop.loss)
    assert report.passed, str(report)
    assert {p.result for p in report.proofs} == {"pass"}
    assert {p.what for p in report.proofs} >= {
        "learning_rate",
        "kl_coef",
        "clip_epsilon",
        "veto",
        "pause",
        "checkpoint",
    }
    assert str(report).splitlines()[-1] == "drill passed: 8 proven, 0 failed, 0 could not be proven"


@pytest.mark.parametrize(
    ("fault", "proof"),
    [("hook", "learning_rate"), ("beta", "kl_coef"), ("clip", "clip_epsilon"), ("scheduler", "scheduler")],
)
def test_what_is_broken_on_purpose_fails(tmp_path: Path, fault: str, proof: str) -> None:
    loop = a_loop(tmp_path, fault=fault)
    report = loop.dog.drill(loop.loss)
    assert not report.passed
    assert proof in failed(report)


def test_a_part_that_loses_something_fails_the_checkpoint(tmp_path: Path) -> None:
    kept = {"seen": 0}

    def get() -> dict[str, int]:
        kept["seen"] += 1  # reading it changes it: what is put back is never what was there
        return dict(kept)

    loop = a_loop(tmp_path, state={"counter": (get, lambda _: None)})
    assert "checkpoint" in failed(loop.dog.drill(loop.loss))


class Counter:
    """Something of a user's, with a state."""

    def __init__(self, *, forgets: bool = False, late: bool = False) -> None:
        self.rounds, self.seen, self.forgets, self.late = 3, [1.0, 2.0], forgets, late

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.late:
            return  # until it is asked for the next batch, say
        self.rounds = state["rounds"]
        if not self.forgets:
            self.seen = state["seen"]


def test_a_part_that_takes_half_of_its_state_fails_the_checkpoint(tmp_path: Path) -> None:
    report = a_loop(tmp_path, state={"counter": Counter(forgets=True)}).dog.drill()
    assert failed(report) == ["checkpoint"]
    assert "counter.seen.0" in str(report)


def test_a_part_that_takes_its_state_up_later_is_unproven(tmp_path: Path) -> None:
    report = a_loop(tmp_path, state={"counter": Counter(late=True)}).dog.drill()
    assert report.passed
    (row,) = [p for p in report.proofs if p.what == "what else is saved"]
    assert row.result == "unproven"
    assert "counter" in row.detail


def test_parts_that_keep_all_of_it_pass_whatever_they_are(tmp_path: Path) -> None:
    counter = Counter()
    sources = {
        "python": random.Random(0),
        "numpy": np.random.default_rng(0),
        "old": np.random.RandomState(0),
        "torch": torch.Generator(),
    }
    loop = a_loop(tmp_path, state={"counter": counter, **sources})
    report = loop.dog.drill(loop.loss)
    assert {p.result for p in report.proofs} == {"pass"}, str(report)
    assert (counter.rounds, counter.seen) == (3, [1.0, 2.0])


def test_trained_weights_that_nobody_handed_over_fail_the_checkpoint_and_are_left_alone(tmp_path: Path) -> None:
    model, head = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([*model.parameters(), head], lr=0.1)
    report = gw.attach(model=model, optimizer=optimizer, run_dir=tmp_path).drill()
    assert failed(report) == ["checkpoint"]
    assert head.tolist() == [1.0, 1.0, 1.0]


class Wide(torch.optim.Optimizer):
    """Keeps the moments of narrow weights in float32; torch's own loading narrows them."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("moment", torch.zeros(p.shape))
                    moment.mul_(0.9).add_(p.grad.float())
                    p.sub_(group["lr"] * moment.to(p))


def test_moments_that_come_back_rounded_fail_the_checkpoint_and_are_left_alone(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2).bfloat16()
    optimizer = Wide(model.parameters(), lr=0.1)
    model(torch.ones(1, 2).bfloat16()).sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["moment"] += 1e-4
    before = [state["moment"].clone() for state in optimizer.state.values()]
    report = gw.attach(model=model, optimizer=optimizer, run_dir=tmp_path).drill()
    assert failed(report) == ["checkpoint"]
    after = [state["moment"] for state in optimizer.state.values()]
    assert [m.dtype for m in after] == [torch.float32] * 2
    assert all(map(torch.equal, before, after))


def test_the_objects_of_the_training_are_the_same_after_it(tmp_path: Path) -> None:
    loop = a_loop(tmp_path)
    loop.step()

    def objects() -> list[object]:
        optimizer = loop.optimizer
        states = [x for p, state in optimizer.state.items() for x in (p, state, *state.values())]
        grads = [p.grad for p in loop.policy.parameters()]
        return [optimizer.param_groups, *optimizer.param_groups, optimizer.state, *states, *grads]

    before = objects()
    assert loop.dog.drill(loop.loss).passed
    assert all(one is other for one, other in zip(before, objects(), strict=True))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_training_amid_accumulation_passes_and_goes_on_as_it_would_have(tmp_path: Path, scaled: bool) -> None:  # noqa: FBT001
    ends = []
    for drilled in (False, True):
        training = Training(3, scaled=scaled, accumulate=3)
        dog = gw.attach(
            model=training.model,
            optimizer=training.optimizer,
            scheduler=training.scheduler,
            scaler=training.scaler,
            state=training.handed_over(),
            kl_coef=gw.attr(training.config, "beta"),
            run_dir=tmp_path / str(drilled),
        )
        for number in range(11):
            if drilled and number == 4:
                report = dog.drill()
                assert report.passed, str(report)
            training.step()
        ends.append(training.snapshot())
    assert differences(ends[0], ends[1]) == []


def test_a_drill_that_is_interrupted_leaves_no_trace_either(tmp_path: Path) -> None:
    loop = a_loop(tmp_path)
    loop.step()
    weights = [p.detach().clone() for p in loop.policy.parameters()]
    numbers, calls = torch.get_rng_state(), []

    def impatient() -> torch.Tensor:
        calls.append(1)
        loop.policy.eval()
        if len(calls) == 4:  # while the KL coefficient is held and the weights are moved
            raise KeyboardInterrupt
        return loop.loss()

    with pytest.raises(KeyboardInterrupt):
        loop.dog.drill(impatient)
    assert all(map(torch.equal, weights, loop.policy.parameters()))
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(module.training for module in loop.policy.modules())
    assert vars(loop.config) == {"beta": 0.1, "epsilon": 0.2}


def test_a_clip_that_has_nothing_to_clip_is_unproven_and_one_nobody_reads_fails(tmp_path: Path) -> None:
    loop = a_loop(tmp_path)
    inputs = torch.randn(16, 4)

    def of_its_own_policy(epsilon: Callable[[], float]) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            logp = torch.log_softmax(loop.policy(inputs), dim=-1)[:, 0]
            ratio = (logp - logp.detach()).exp()
            return -torch.min(ratio, ratio.clamp(1 - epsilon(), 1 + epsilon())).mean()

        return loss

    read = {p.what: p for p in loop.dog.drill(of_its_own_policy(lambda: loop.config.epsilon)).proofs}
    deaf = {p.what: p for p in loop.dog.drill(of_its_own_policy(lambda: 0.2)).proofs}
    assert (read["clip_epsilon"].result, deaf["clip_epsilon"].result) == ("unproven", "fail")
    assert "every ratio in it is 1" in read["clip_epsilon"].detail


def test_a_loss_may_draw_from_every_generator(tmp_path: Path) -> None:
    sampler = random.Random(0)
    loop = a_loop(tmp_path, data={"sampler": sampler})

    def noisy() -> torch.Tensor:
        noise = torch.randn(()).item() + random.random() + np.random.random() + sampler.random()  # noqa: NPY002
        return loop.loss() * (1 + noise)

    report = loop.dog.drill(noisy)
    assert {p.result for p in report.proofs} == {"pass"}, str(report)


class Stubborn:
    """Refuses other values without a word."""

    @property
    def beta(self) -> float:
        return 0.1

    @beta.setter
    def beta(self, value: float) -> None:
        pass


def test_a_setting_that_does_not_take_fails_without_any_loss(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = gw.attach(model=model, optimizer=optimizer, kl_coef=gw.attr(Stubborn(), "beta"), run_dir=tmp_path).drill()
    assert failed(report) == ["kl_coef"]


def test_a_norm_limit_is_turned_and_not_called_proven(tmp_path: Path) -> None:
    limits = {"norm": 1.0}
    report = a_loop(tmp_path, grad_norm_limit=gw.item(limits, "norm")).dog.drill()
    assert {p.what: p.result for p in report.proofs}["grad_norm_limit"] == "unproven"
    assert limits == {"norm": 1.0}


def test_groups_that_wandered_from_their_shares_all_shrink(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    dog = gw.attach(model=model, optimizer=optimizer, run_dir=tmp_path)
    optimizer.param_groups[0]["lr"] = 1e-3
    assert dog.drill().passed


def test_an_optimizer_that_takes_a_closure_is_unproven(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    report = gw.attach(model=model, optimizer=torch.optim.LBFGS(model.parameters()), run_dir=tmp_path).drill()
    assert failed(report) == []
    assert {p.what for p in report.proofs if p.result == "unproven"} >= {"learning_rate", "veto", "pause"}


def test_a_part_that_cannot_be_read_any_more_is_a_failure_and_not_an_error(tmp_path: Path) -> None:
    gone: list[int] = []

    def get() -> int:
        if gone:
            raise OSError("the file is gone")
        return 1

    loop = a_loop(tmp_path, state={"file": (get, lambda _: None)})
    gone.append(1)
    report = loop.dog.drill(loop.loss)
    assert not report.passed
    assert "OSError: the file is gone" in str(report)


def test_a_step_that_raises_is_a_failure_and_not_an_error(tmp_path: Path) -> None:
    loop = a_loop(tmp_path)

    def refuse(*_: object) -> None:
        raise RuntimeError("no step today")

    loop.optimizer.register_step_pre_hook(refuse)
    report = loop.dog.drill(loop.loss)
    assert "learning_rate" in failed(report)
    assert "no step today" in str(report)


def test_without_a_loss_what_needs_one_is_unproven(tmp_path: Path) -> None:
    report = a_loop(tmp_path).dog.drill()
    assert report.passed
    assert {p.what for p in report.proofs if p.result == "unproven"} == {"kl_coef", "clip_epsilon"}


def test_a_loss_that_is_never_the_same_proves_nothing(tmp_path: Path) -> None:
    loop = a_loop(tmp_path)
    source = random.Random(0)
    report = loop.dog.drill(lambda: loop.loss() * source.random())
    assert {p.what for p in report.proofs if p.result == "unproven"} == {"kl_coef", "clip_epsilon"}


def test_a_watchdog_that_only_watches_has_nothing_to_prove() -> None:
    report = gw.Watchdog("documented").drill()
    assert not report.passed
    assert [p.result for p in report.proofs] == ["unproven"]


def trace(folder: Path, drilled_at: int | None, **options: Any) -> list[Any]:
    """Return everything that one of 12 steps could show, of a run that was drilled at a step, or never."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global one is what must not move
    random.seed(1)
    loop = a_loop(folder, **options)
    seen: list[Any] = []
    for number in range(12):
        if number == drilled_at:
            loop.dog.drill(loop.loss)
        loss = loop.step()
        loop.dog.observe(number, {"loss": loss, "log_ratio": 0.0, "mean_reward": 0.5})
        seen.append(loss)
    moments = [v for state in loop.optimizer.state.values() for v in state.values()]
    rates = [group["lr"] for group in loop.optimizer.param_groups]
    numbers = [torch.rand(1).item(), random.random(), float(np.random.random())]  # noqa: NPY002
    journal = [
        {**json.loads(line), "time": 0} for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    modes = [module.training for module in loop.policy.modules()]
    loop.dog.close()
    weights = [p.tolist() for p in loop.policy.parameters()]
    return [seen, weights, [torch.as_tensor(m).tolist() for m in moments], rates, numbers, journal, modes,
            vars(loop.config)]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("when", [0, 7])
def test_a_drill_leaves_no_trace(tmp_path: Path, optimizer: str, when: int) -> None:
    never = trace(tmp_path / "never", None, optimizer=optimizer)
    drilled = trace(tmp_path / "drilled", when, optimizer=optimizer)
    for one, other in zip(never, drilled, strict=True):
        assert one == other


def test_a_dose_in_force_is_in_force_after_the_drill(tmp_path: Path) -> None:
    loop = a_loop(tmp_path)
    knobs = loop.dog._actuator.knobs  # noqa: SLF001 - a dose given by hand
    knobs["kl_coef"].hold(0.7)
    knobs["learning_rate"].hold(1e-5)
    assert loop.dog.drill(loop.loss).passed
    assert (loop.config.beta, knobs["kl_coef"].read()) == (0.7, 0.7)
    assert knobs["kl_coef"].check() is None
    for _ in range(15):
        loop.step()
    assert knobs["learning_rate"].read() == pytest.approx(1e-5)
    knobs["kl_coef"].release()
    assert loop.config.beta == 0.1


SCRIPT = """
    import sys, torch
    import grpo_watchdog as gw
    print("argument", sys.argv[1])
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    dog = gw.attach(model=model, optimizer=optimizer, {hand} run_dir=sys.argv[1])
    for step in range(3):
        {observe}
    print("the end")
"""


@pytest.mark.parametrize(
    ("hand", "observe", "code"),
    [
        ("scheduler=scheduler,", "dog.observe(step, dict(loss=0.1))", 0),
        ("", "dog.observe(step, dict(loss=0.1))", 1),
        ("", "pass", 2),
        ("", "raise ValueError('no data')", 2),
    ],
)
def test_the_command_drills_a_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hand: str, observe: str, code: int
) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(hand=hand, observe=observe), encoding="utf-8")
    assert main(["drill", str(script), str(tmp_path / "run")]) == code
    out, err = capsys.readouterr()
    assert f"argument {tmp_path / 'run'}" in out
    assert not (tmp_path / "run").exists()  # the real run's folder is left alone
    assert ("the end" in out) == (observe == "pass")
    assert ("no drill" in err) == (code == 2)
    again = gw.attach(model=(model := torch.nn.Linear(1, 1)), optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    assert again.observe(0, {"loss": 0.1}).level == "ok"  # the rehearsal is over


def test_the_command_says_where_there_is_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "nowhere.py"]) == 1
    assert "nowhere.py is no file" in capsys.readouterr().err


def test_the_command_prints_json(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    text = textwrap.dedent(SCRIPT).format(hand="scheduler=scheduler,", observe="dog.observe(step, dict(loss=0.1))")
    script.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "grpo_watchdog.cli", "drill", "--json", str(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {proof["result"] for proof in json.loads(done.stdout)} == {"pass", "unproven"}
