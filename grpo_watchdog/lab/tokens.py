"""A tiny transformer that learns by GRPO to count on from its prompt and to stop, with a reward that is checked.

The prompt is one number a; the right answer is a+1, a+2, a+3, a+4 (modulo 8) and the end mark. Each right number is
worth a fifth, and so is the right length.

Shapes by suffix, beside those of `grpo`: L tokens of a completion, V vocabulary, E width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from grpo_watchdog.lab.grpo import GrpoTraining
from grpo_watchdog.lab.objective import GrpoConfig, Score
from grpo_watchdog.lab.sampling import Rollout, Sampler, Stream

NUMBERS = 8  # the numbers are the tokens 0 to 7
END = NUMBERS  # the token that ends a completion
ANSWER = 4  # numbers of the right answer, before the end mark
LONGEST = 8  # tokens that a completion has at most
_PRETRAINING_RATE, _PRETRAINING_BATCH = 1e-2, 64


@dataclass(kw_only=True)
class TokensConfig(GrpoConfig):
    """Settings of a token run."""

    learning_rate: float = 1e-3
    kl_coef: float = 0.02
    kl_gradient: Literal["k1", "k2", "k3"] = "k3"
    group_size: int = 8
    prompts: int = 6
    total_steps: int = 200
    final_lr_fraction: float = 0.5
    entropy_coef: float = 0.001
    width: int = 24
    pretraining_steps: int = 60
    pretrained_share: float = 0.4  # probability of the right token that pretraining aims at


class CountingTransformer(nn.Module):
    """One layer of causal attention and one perceptron; each position predicts the next token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.token = nn.Embedding(NUMBERS + 1, width)
        self.place = nn.Embedding(LONGEST, width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.think_in = nn.Linear(width, width)
        self.think_out = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, NUMBERS + 1, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(0.3)
        later = torch.full((LONGEST, LONGEST), -torch.inf).triu(diagonal=1)
        self.register_buffer("later", later, persistent=False)

    def forward(self, token_BL: Tensor) -> Tensor:
        """Return the logits of the token after each of these, [B, L, V]."""
        return self.extend(token_BL, 0, [])

    def extend(self, token_BL: Tensor, place: int, cache: list[Tensor]) -> Tensor:
        """Return the logits after each of these tokens, [B, L, V], the first of them at a place.

        Args:
            token_BL: the tokens.
            place: how many tokens come before them.
            cache: keys and values of those; theirs are put in.
        """
        length = token_BL.shape[1]
        x_BLE = self.token(token_BL) + self.place.weight[place : place + length]
        query, key, value = self.query_key_value(x_BLE).chunk(3, dim=2)
        if cache:
            key, value = torch.cat([cache[0], key], dim=1), torch.cat([cache[1], value], dim=1)
        cache[:] = key, value
        weight = query @ key.transpose(1, 2) * self.scale
        if length > 1:
            weight = weight + self.get_buffer("later")[:length, :length]
        x_BLE = x_BLE + self.mix(weight.softmax(dim=2) @ value)
        x_BLE = x_BLE + self.think_out(self.think_in(x_BLE).relu())
        logits: Tensor = self.head(x_BLE)
        return logits


class TokensTraining(GrpoTraining):
    """GRPO on counting."""

    def __init__(self, config: TokensConfig | None = None, *, seed: int, task: str = "tokens") -> None:
        self._tokens = TokensConfig() if config is None else config
        super().__init__(self._tokens, seed=seed, task=task)
        self.numeric = torch.float32  # log-probs of single tokens are small, unlike those of whole chains

    @property
    def config(self) -> TokensConfig:
        """The settings, read on every step."""
        return self._tokens

    def _network(self) -> nn.Module:
        config = self._tokens
        network = CountingTransformer(config.width)
        network.load_state_dict(_pretrained(self.seed, config.width, config.pretraining_steps, config.pretrained_share))
        return network

    def _mark(self, rollout: Rollout) -> Tensor:
        return count_reward(rollout)

    def _roll_out(self, stream: Stream, sampler: Sampler, prompts: int, group_size: int) -> Rollout:
        network = sampler.network
        assert isinstance(network, CountingTransformer)
        prompt_B = stream.below(NUMBERS, prompts).repeat_interleave(group_size)
        race_LBV = sampler.noise(stream.exponential(LONGEST, prompts * group_size, NUMBERS + 1), group_size).log()
        cache: list[Tensor] = []
        token_B, chosen, log_probs = prompt_B, [], []
        for place in range(LONGEST):
            logits_BV = network.extend(token_B.unsqueeze(1), place, cache).squeeze(1) / sampler.spread
            token_B = (logits_BV - race_LBV[place]).argmax(dim=1)  # the Gumbel trick, which NaN cannot stop
            chosen.append(token_B)
            log_probs.append(logits_BV)
        token_BL = torch.stack(chosen, dim=1)
        log_prob_BLV = torch.stack(log_probs, dim=1).log_softmax(dim=2)
        log_prob_BL = log_prob_BLV.gather(2, token_BL.unsqueeze(2)).squeeze(2).double()
        ended_BL = (token_BL == END).cumsum(dim=1)
        mask_BL = (ended_BL - (token_BL == END).long() == 0).double()
        longest = max(ANSWER + 1, int(mask_BL.sum(dim=1).max()))
        token_BL, log_prob_BL, mask_BL = token_BL[:, :longest], log_prob_BL[:, :longest], mask_BL[:, :longest]
        return Rollout(prompt_B, token_BL, log_prob_BL, mask_BL)

    def _score(self, network: nn.Module, rollout: Rollout) -> Score:
        before_BL = torch.cat([rollout.prompt.unsqueeze(1), rollout.sample[:, :-1]], dim=1)
        log_prob_BLV = network(before_BL).to(self.numeric).log_softmax(dim=2)
        log_prob_BL = log_prob_BLV.gather(2, rollout.sample.unsqueeze(2)).squeeze(2).double()
        mask_BL = rollout.mask_BK
        assert mask_BL is not None
        entropy = None
        if torch.is_grad_enabled():  # asked of the policy only, for its bonus
            surprise_BL = -(log_prob_BLV.exp() * log_prob_BLV).sum(dim=2).double()
            entropy = (surprise_BL * mask_BL).sum() / mask_BL.sum()
        return Score(log_prob_BL * mask_BL, entropy)

    def _per_unit(self, score: Score) -> Score:
        return score

    def _about(self, rollout: Rollout) -> dict[str, Tensor]:
        assert rollout.mask_BK is not None
        length_B = rollout.mask_BK.sum(dim=1)
        truncated_B = (rollout.sample != END).all(dim=1)
        return {"completion_length": length_B.mean(), "truncated_fraction": truncated_B.double().mean()}


def count_reward(rollout: Rollout) -> Tensor:
    """Return a fifth for each right number that comes before the end, and a fifth for the right length, [B]."""
    assert rollout.mask_BK is not None
    right_BA = (rollout.prompt.unsqueeze(1) + torch.arange(1, ANSWER + 1)) % NUMBERS
    hits_BA = (rollout.sample[:, :ANSWER] == right_BA) & (rollout.mask_BK[:, :ANSWER] > 0.0)
    ends_right_B = (rollout.sample[:, ANSWER] == END) & (rollout.mask_BK[:, ANSWER] > 0.0)
    return (hits_BA.sum(dim=1) + ends_right_B) / (ANSWER + 1.0)


@functools.lru_cache(maxsize=64)
def _pretrained(seed: int, width: int, steps: int, share: float) -> dict[str, Tensor]:
    """Return the weights of a network that was taught the answers half-way, so that GRPO has something to sharpen.

    Args:
        seed: of its weights and of what it is shown.
        width: of the network.
        steps: of the teaching [steps].
        share: the probability of the right token that is aimed at.
    """
    torch.manual_seed(seed)  # the caller keeps the global stream aside
    network = CountingTransformer(width)
    optimizer = torch.optim.Adam(network.parameters(), lr=_PRETRAINING_RATE, foreach=True)
    wrong = (1.0 - share) / NUMBERS
    for _ in range(steps):
        prompt_B1 = torch.randint(NUMBERS, (_PRETRAINING_BATCH, 1))
        right_BL = (prompt_B1 + torch.arange(1, LONGEST + 1)) % NUMBERS
        right_BL[:, ANSWER:] = END
        noisy_BL = torch.where(
            torch.rand(right_BL.shape) < wrong * NUMBERS, torch.randint(END, right_BL.shape), right_BL
        )
        log_prob_BLV = network(torch.cat([prompt_B1, noisy_BL[:, :-1]], dim=1)).log_softmax(dim=2)
        right = log_prob_BLV.gather(2, right_BL.unsqueeze(2)).mean()
        loss = -(share - wrong) * right - wrong * log_prob_BLV.sum(dim=2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


def tokens_task(seed: int) -> TokensTraining:
    """Return the language-model kind of trainer: a ratio per token to the old policy, k3 KL in the gradient."""
    return TokensTraining(seed=seed)
