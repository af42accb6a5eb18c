"""A world small enough to enumerate: the reference, the true reward, Z(x) and the optimum, exactly, in float64."""

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class WorldConfig:
    """What a world is drawn from.

    Raises:
        ValueError: where more prompts are asked for than there are.
    """

    symbols: int = field(default=8, metadata={"help": "Size of the vocabulary V."})
    prompt_length: int = field(default=1, metadata={"help": "Symbols in a prompt."})
    completion_length: int = field(default=2, metadata={"help": "Symbols in a completion: n, exactly."})
    prompts: int = field(default=4, metadata={"help": "Prompts, drawn without replacement."})
    reward_scale: float = field(default=1.0, metadata={"help": "Standard deviation of r* over a prompt's completions."})
    prompt_spread: float = field(default=0.0, metadata={"help": "Standard deviation of what all answers to x share."})
    width: int = field(default=32, metadata={"help": "Hidden size of the transformer."})
    layers: int = field(default=1, metadata={"help": "Its layers."})
    initializer_range: float = field(default=0.2, metadata={"help": "Larger makes the reference less uniform."})
    seed: int = field(default=0, metadata={"help": "Of the prompts, the reference and the reward."})

    def __post_init__(self):
        if self.prompts > self.symbols**self.prompt_length:
            raise ValueError(
                f"prompts={self.prompts}: of {self.symbols} symbols there are only {self.symbols**self.prompt_length} "
                f"prompts of length {self.prompt_length}. Ask for fewer, or set a greater prompt_length."
            )


class World:
    r"""A reference policy π_ref, a true reward r* and all that follows from them, over every completion in Vⁿ.

    π_ref is a small GPT-2 with random weights whose vocabulary is V. A completion is exactly n symbols without EOS, so
    that π(y|x) = Π π(yᵢ|x, y₁…yᵢ₋₁) sums to 1 over Vⁿ without renormalization. With a, b drawn from N(0, 1) and scaled,

        r*(x, y) = Σⱼ aⱼ[x₁, yⱼ] + b[x_last],

    so that prompts which share a symbol share their reward, as real ones do, and completions to a prompt differ by
    `reward_scale` and prompts by `prompt_spread` (standard deviations under the uniform distribution).

    Attributes:
        config: what it was drawn from.
        prompts: `(P, L)` symbols.
        completions: `(A, n)` symbols, all A = |V|ⁿ.
        reward: `(P, A)` r*(x, y).
        log_ref: `(P, A)` log π_ref(y|x) in nats.

    Tables of log-probabilities below are `(P, A)`, in nats; all means over prompts are uniform.
    """

    def __init__(self, config: WorldConfig):
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        symbols = range(config.symbols)
        every_prompt = torch.tensor(list(itertools.product(symbols, repeat=config.prompt_length)))
        self.prompts = every_prompt[torch.randperm(len(every_prompt), generator=generator)[: config.prompts]]
        self.completions = torch.tensor(list(itertools.product(symbols, repeat=config.completion_length)))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tables = normal(config.completion_length, config.symbols, config.symbols)
        parts = [table[self.prompts[:, :1], self.completions[:, j]] for j, table in enumerate(tables)]
        answers = _standardized(torch.stack(parts).sum(0), dim=1)
        shared = normal(config.symbols)[self.prompts[:, -1]] if config.prompt_spread else torch.zeros(1)
        shared = _standardized(shared, dim=0) if config.prompt_spread else shared
        self.reward = config.reward_scale * answers + config.prompt_spread * shared.reshape(-1, 1)
        self.log_ref = self.log_probs(self.policy())

    def policy(self) -> PreTrainedModel:
        """A new copy of the reference, in float64, to be trained."""
        config = self.config
        # GPT-2 has absolute positions: one with rotary positions and no BOS can not tell the context "x" from "x x"
        gpt2 = GPT2Config(
            vocab_size=config.symbols,
            n_positions=config.prompt_length + config.completion_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=2,
            activation_function="gelu",
            initializer_range=config.initializer_range,
            tie_word_embeddings=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            name_or_path="exact-world",
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return GPT2LMHeadModel(gpt2).double()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One symbol a token. Rows are given to trainers as token ids; this is what they take the pad token from."""
        names = {f"<{symbol}>": symbol for symbol in range(self.config.symbols)}
        backend = Tokenizer(models.WordLevel(names, unk_token="<0>"))
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<0>", eos_token="<0>")

    @torch.no_grad()
    def log_probs(self, model: PreTrainedModel) -> torch.Tensor:
        """`(P, A)` log π(y|x) of every completion under a model, by enumeration."""
        n, length = self.config.completion_length, self.config.prompt_length
        prompts = self.prompts.repeat_interleave(len(self.completions), 0)
        rows = torch.cat([prompts, self.completions.repeat(len(self.prompts), 1)], 1)
        # Whatever comes after it, a prefix is scored once
        prefixes, place = torch.unique(rows[:, :-1], dim=0, return_inverse=True)
        was_training = model.training
        logits = model.eval()(prefixes).logits[:, length - 1 :].double()
        model.train(was_training)
        scores = torch.log_softmax(logits, -1)[place]
        per_token = scores.gather(2, rows[:, length:, None]).reshape(len(self.prompts), -1, n)
        return per_token.sum(2)

    def log_z(self, beta: float, reward: torch.Tensor | None = None) -> torch.Tensor:
        """`(P,)` log Z(x) = log Σ_y π_ref(y|x)·exp(r(x, y)/β) in nats; r is r* unless given."""
        reward = self.reward if reward is None else reward
        return torch.logsumexp(self.log_ref + reward / beta, 1)

    def optimum(self, beta: float) -> torch.Tensor:
        """log π*(y|x), the policy with the greatest E[r*] − β·KL(π‖π_ref): π* = π_ref·exp(r*/β)/Z."""
        return self.log_ref + self.reward / beta - self.log_z(beta)[:, None]

    def expected_reward(self, log_probs: torch.Tensor) -> float:
        """E[r*] under a policy."""
        return float((log_probs.exp() * self.reward).sum(1).mean())

    def kl(self, log_probs: torch.Tensor) -> float:
        """KL(π‖π_ref) in nats."""
        return float((log_probs.exp() * (log_probs - self.log_ref)).sum(1).mean())

    def total_variation(self, log_probs: torch.Tensor, other: torch.Tensor) -> float:
        """½·Σ_y |π(y|x) − π'(y|x)|, in [0, 1]."""
        return float((log_probs.exp() - other.exp()).abs().sum(1).mean() / 2)

    def best_reward(self, kl: float) -> float:
        """The greatest E[r*] of any policy with this KL from the reference, in nats: π* at the β which has that KL."""
        low, high = 1e-4, 1e4
        for _ in range(100):
            beta = (low * high) ** 0.5
            low, high = (beta, high) if self.kl(self.optimum(beta)) > kl else (low, beta)
        return self.expected_reward(self.optimum(high))


def _standardized(values: torch.Tensor, dim: int) -> torch.Tensor:
    return (values - values.mean(dim, keepdim=True)) / values.std(dim, keepdim=True, correction=0)
