"""Watchdog: the door that a training loop uses. Nothing raises out of `observe`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo_watchdog import briefing, journal
from grpo_watchdog.actions import Order, Outcome
from grpo_watchdog.actuation import Actuation
from grpo_watchdog.approval import Asker, Desk
from grpo_watchdog.checkpoints import Vault
from grpo_watchdog.controls import Controls, DialKnob, NoControls
from grpo_watchdog.drill import DrillReport
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.findings import Blind
from grpo_watchdog.metrics import METRICS, Intake, RatioTo, Step
from grpo_watchdog.rule import no_such
from grpo_watchdog.rulebook import Rulebook, load
from grpo_watchdog.session import earlier_session, refuse_mode, refuse_nonsense, veto_of
from grpo_watchdog.verdict import Judge, Verdict

_log = logging.getLogger("grpo_watchdog")
_FOLLOW_THE_RATE = ("param_change", "step_kl")  # another learning rate gives them another level
Listener = Callable[[Step, Verdict], None]


class Watchdog:
    """Watches one run. `grpo_watchdog.attach` makes one for a trainer; this is the same under the hook.

    Args:
        rules: a rulebook: a name, a path or a loaded one.
        controls: what the trainer lets be turned, saved and restored; None only watches.
        run_dir: where the journal and the checkpoints go; None keeps neither, and then there is no rollback.
        ratio_to: the policy that the trainer's surrogate ratio is taken to, "reference" or "old".
        dims: dimensions or tokens that a trajectory's log-prob is summed over, where known.
        resume: go on in a run_dir that already holds a run: the newest proven checkpoint is restored and the doses
            that were in force are put back on top; `resumed_from` is then its step (None where there was none), and the
            loop goes on from `resumed_from` + 1.
        listeners: called after every observation with the step and the verdict.
        approve: in the mode "approve", asked before anything is done: given the question (a dict of number, step,
            within and orders), it returns True, False, or None for not yet. Files in run_dir/approve do the same.
        vault: where checkpoints are kept, where that is not run_dir/checkpoints.
        said: what the integration has to say at attach, beside the briefing.
        **policy: any field of the rulebook's policy: mode ("act", "shadow", "approve"), shadow, on_divergence,
            checkpoint_every, probation, recover_after, rollback_budget, targets ...

    Raises:
        ConfigurationError: an option is unknown or out of range, or run_dir already holds a run.
        RulebookError: the rulebook cannot be used.
    """

    def __init__(  # noqa: PLR0913 - one keyword for each thing that a loop or an integration hands over
        self,
        rules: str | Path | Rulebook = "documented",
        controls: Controls | None = None,
        run_dir: str | Path | None = None,
        *,
        ratio_to: RatioTo = "reference",
        dims: int | None = None,
        resume: bool = False,
        listeners: Sequence[Listener] = (),
        approve: Asker | None = None,
        vault: Vault | None = None,
        said: Sequence[str] = (),
        **policy: Any,
    ) -> None:
        """Read the rulebook, look at the model, write the journal's first entry."""
        refuse_nonsense(ratio_to, dims, run_dir, approve)
        self.book = (rules if isinstance(rules, Rulebook) else load(rules)).with_policy(policy)
        refuse_mode(self.book.policy.mode, resume=resume, answerable=run_dir is not None or approve is not None)
        self.run_dir = None if run_dir is None else Path(run_dir)
        earlier = earlier_session(self.run_dir, resume=resume)
        controls = NoControls() if controls is None else controls
        if vault is None and self.run_dir is not None:
            vault = Vault(self.run_dir / "checkpoints")
        manner, desk = self.book.policy, Desk(self.run_dir, approve)
        in_shadow = manner.mode == "shadow"
        self._actuator = Actuation(controls, vault, self._memory, desk=desk, shadow=manner.shadow, shadow_all=in_shadow)
        try:
            self._journal = journal.Journal(self.run_dir)
        except OSError as error:
            raise ConfigurationError(f"run_dir {self.run_dir} cannot be written: {error.strerror}") from error
        bases = {name: knob.base() for name, knob in controls.knobs.items()}
        restorable = vault is not None and controls.restorable
        controls.arm(veto_of(self.book.policy))
        intake = Intake(ratio_to, dims)
        self._judge = Judge(self.book, self._actuator, self._journal, intake=intake, bases=bases, restorable=restorable)
        self._judge.approvals.count_from(desk.clear())
        self._listeners = list(listeners)
        self._bases, self._restorable = bases, restorable
        self.resumed_from: int | None = None
        blank = isinstance(controls, NoControls) and not bases
        offers = {"restorable": restorable, "only_watches": blank, "by_hand": not said}
        caveats = briefing.caveats(self.book, bases, ratio_to=ratio_to, dims=dims, **offers)
        caveats += said
        if earlier is not None and vault is not None:
            caveats += self._take_over(earlier, vault)
        levels = briefing.settings(self.book, bases)
        self.briefing = [*levels, *caveats]
        self._note_start()
        for line in levels:
            _log.info("%s", line)
        for line in caveats:
            _log.warning("%s", line)
        self._judge.note(None, self._judge.inspect(None))
        if earlier is not None:
            self._put_back()

    def observe(self, step: int, metrics: Mapping[str, Any]) -> Verdict:
        """Look at one training step, act on it, and return the verdict.

        Args:
            step: the step's number; may start anywhere and should rise. After a rollback it may start again
                from `rolled_back_to` + 1, or simply go on.
            metrics: canonical names to floats, ints, numpy scalars or 0-d tensors of any device.

        Returns:
            The verdict. Never raises: an error inside the watchdog is logged and returned as a notice.
        """
        try:
            seen, notices = self._judge.intake.read(step, metrics)
            seen.values.update(self._actuator.read())
            verdict = self._judge.judge(seen, notices)
        except Exception as error:  # noqa: BLE001 - nothing inside the watchdog may break the training
            _log.exception("the watchdog failed inside observe; the run goes on")
            text = (
                f"the watchdog failed on this step; what it had begun may be in force: {type(error).__name__}: {error}"
            )
            number = step if isinstance(step, int) else -1
            return Verdict(number, "notice", halt=bool(self.halted), notices=(text,))
        if self._listeners:
            self._tell(seen, verdict)
        return verdict

    def checkpoint(self, step: int) -> Outcome:
        """Take a checkpoint now. It is a candidate until enough healthy observations have followed.

        Returns:
            The outcome; `ok` is False with the reason in `detail` where none was taken.
        """
        try:
            return self._judge.checkpoint(int(step))
        except Exception as error:  # noqa: BLE001 - nothing inside the watchdog may break the training
            _log.exception("the watchdog failed inside checkpoint; the run goes on")
            told = f"{type(error).__name__}: {error}"
            return Outcome(-1, "checkpoint_now", None, None, "call", "asked for by the loop", ok=False, detail=told)

    def expect(self, *metrics: str) -> None:
        """Say that these metrics change on purpose now, so that nobody takes it for trouble.

        What the rules that look at one of them know of this run's own level is forgotten, and a limit that is held on
        such a setting is let go. For a new data mix: `dog.expect("mean_reward", "zero_std_fraction")`; for a learning
        rate set by hand: `dog.expect("learning_rate")`; for weights that were written: `dog.expect("weights_touched")`.

        Raises:
            ConfigurationError: a name is not in the table of canonical metrics.
        """
        for name in metrics:
            if name not in METRICS:
                raise ConfigurationError(no_such("metric", name, METRICS))
        named = [*metrics, *(f"{name}_set" for name in metrics if f"{name}_set" in METRICS)]
        named += _FOLLOW_THE_RATE if "learning_rate" in metrics else ()
        try:
            self._judge.expect(named)
        except Exception:  # noqa: BLE001 - nothing inside the watchdog may break the training
            _log.exception("the watchdog failed inside expect; the run goes on")

    def drill(self, loss: Callable[[], Any] | None = None) -> DrillReport:
        """Prove on this training that every dose takes and lifts and a checkpoint restores; leave it as it was.

        `loss` computes one loss of one batch with its gradients, as the loop does, from samples drawn a few updates ago
        (at ratios of 1 no clip shows); a Trainer computes its own. The report prints as a table.
        """
        return self._actuator.drill(loss)

    def blind(self) -> tuple[Blind, ...]:
        """Return the rules that cannot see, what they miss, and why."""
        return self._judge.findings.blind()

    @property
    def wants_checkpoints(self) -> bool:
        """Return whether one that is taken now would be kept: not in shadow, nor while many wait for proof."""
        return self.book.policy.mode != "shadow" and self._judge.ledger.waiting() <= self.book.policy.keep

    @property
    def halted(self) -> str:
        """Return why the run was halted, or "" while it was not."""
        return self._judge.planner.halted

    def close(self) -> None:
        """Write what is still to be written, and close listeners that can be closed. Doses in force stay in force."""
        self._judge.note_blind(None)
        self._judge.note_state()
        self._journal.append({"kind": "end"})
        self._journal.close()
        for listener in self._listeners:
            try:
                getattr(listener, "close", lambda: None)()
            except Exception:  # noqa: BLE001
                _log.exception("a listener failed to close")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that it remembers, as JSON-able values."""
        return self._judge.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, and put the doses that it has in force onto the trainer."""
        paused = self._judge.planner.paused
        self._judge.load_state_dict(state)
        if paused and not self._judge.planner.paused:
            self._actuator.execute(Order("pause", None, paused, "not in the state that was loaded", release=True), -1)
        for order in self._judge.planner.resume_orders():
            self._actuator.execute(order, -1)
        self._note_start()

    def _tell(self, seen: Step, verdict: Verdict) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(seen, verdict)
            except Exception:  # noqa: BLE001
                _log.exception("a listener failed and is dropped; the run goes on")
                self._listeners.remove(listener)

    def _memory(self) -> dict[str, Any]:
        return self._judge.findings.state_dict()

    def _note_start(self) -> None:
        start = {
            "kind": "start",
            "schema": journal.SCHEMA,
            "time": time.time(),
            "ratio_to": self._judge.intake.ratio_to,
            "dims": self._judge.intake.dims,
            "bases": self._bases,
            "restorable": self._restorable,
            "briefing": self.briefing,
            "digest": self.book.digest,
            "rulebook": json.loads(self.book.as_json()),
            "state": self._judge.state_dict(),
        }
        self._journal.append(start)

    def _take_over(self, plan: Mapping[str, Any], vault: Vault) -> list[str]:
        """Take an earlier session's memory; return what has to be said about it.

        Raises:
            DamagedError: there are proven checkpoints, and none of them is whole.
        """
        said = self._judge.planner.take_over(plan)
        self._judge.ledger.entries = vault.proven()
        for newest in self._judge.ledger.choices()[:1]:
            self.resumed_from = newest.step
            self._judge.findings.load_state_dict(newest.memory)
        if self.resumed_from is None:
            said.append("resumed without a proven checkpoint: nothing is restored, training begins from these weights")
        return said

    def _put_back(self) -> None:
        """Restore the newest proven checkpoint and put the doses back in force on top.

        Raises:
            ConfigurationError: no checkpoint can be restored into these objects.
        """
        owns = {name: knob.own() for name, knob in self._actuator.knobs.items()}
        newest = tuple(c.id for c in self._judge.ledger.choices())
        orders = [Order("rollback", None, "resume", "the run was resumed", checkpoints=newest)] if newest else []
        step = -1 if self.resumed_from is None else self.resumed_from
        for order in [*orders, *self._judge.planner.resume_orders()]:
            outcome = self._actuator.execute(order, step)
            self._journal.append({"kind": "resumed", **outcome.as_json()})
            _log.warning("%s", briefing.sentence(outcome))
            if outcome.action == "rollback":
                if not outcome.ok:
                    raise ConfigurationError(f"the run cannot be resumed: {outcome.detail}")
                self.resumed_from = None if outcome.after is None else int(outcome.after)
                for name, knob in self._actuator.knobs.items():  # settings are those that the run was started with now
                    if isinstance(knob, DialKnob):
                        knob.put_back(owns[name])
