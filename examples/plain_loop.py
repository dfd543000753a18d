"""A plain PyTorch GRPO loop with a watchdog: the hook is the attach call, observe, and the break.

A two-token bandit policy is trained with group-normalised advantages; at step 60 its learning rate is
multiplied by 3000, as a mistyped configuration would. Run it: python examples/plain_loop.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

import grpo_watchdog as gw

GROUPS, SAMPLES, ACTIONS, STEPS, SICK_AT = 16, 8, 32, 150, 60


def main(run_dir: Path) -> gw.Verdict:
    """Train, and return the last verdict."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = SimpleNamespace(beta=0.1, epsilon=0.2)
    rewards = torch.linspace(0, 1, ACTIONS)  # action a is worth a / 31
    policy = torch.nn.Linear(4, ACTIONS)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    dog = gw.attach(
        model=policy,
        optimizer=optimizer,
        scheduler=scheduler,
        kl_coef=gw.attr(config, "beta"),
        clip_epsilon=gw.attr(config, "epsilon"),
        ratio_to="old",
        rules="documented",
        targets="scaled",
        run_dir=run_dir,
        checkpoint_every=10,
    )
    verdict = gw.Verdict(-1, "ok")
    for step in range(STEPS):
        if step == SICK_AT:
            optimizer.param_groups[0]["lr"] *= 3000
            scheduler.base_lrs = [3000.0]
        prompts = torch.randn(GROUPS, 4)
        with torch.no_grad():
            old = torch.log_softmax(policy(prompts), dim=-1)
            chosen = torch.multinomial(old.exp(), SAMPLES, replacement=True)
            old_log_prob = old.gather(1, chosen)
            reward = rewards[chosen]
            advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
        for _ in range(2):  # two updates on one batch, so that the ratio to the old policy moves
            log_prob = torch.log_softmax(policy(prompts), dim=-1).gather(1, chosen)
            log_ratio = log_prob - old_log_prob
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
            policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
            kl = (torch.expm1(-log_ratio) + log_ratio).mean()
            loss = policy_loss + config.beta * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        metrics = {
            "loss": loss,
            "log_ratio": log_ratio.mean(),
            "mean_ratio": ratio.mean(),
            "mean_advantage": advantage.mean(),
            "std_advantage": advantage.std(),
            "mean_reward": reward.mean(),
            "std_reward": reward.std(),
        }
        verdict = dog.observe(step, metrics)
        for outcome in verdict.actions:
            if outcome.action != "checkpoint_now":
                print(f"step {step}: {outcome.action} {outcome.before} -> {outcome.after}")
        if verdict.halt:
            break
    dog.close()
    print(gw.report(run_dir))
    return verdict


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        last = main(options.run_dir or Path(folder) / "run")
    sys.exit(1 if last.halt else 0)
