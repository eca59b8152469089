"""From the examples of a file to what the model computes on, and what was left out on the way.

Nothing is sent from here: what there is to say stands in `notices`, so that the
order of events is the same wherever this runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_train import cache, conversation, data, render
from lora_train.conversation import Conversation
from lora_train.failure import Failure
from lora_train.plan import Plan
from lora_train.session import library_versions

MOST_DROPPED = 0.05  # share of examples that may be left out although nobody said so
MOST_NAMED = 10  # lines in a message
SAMPLES = 3


@dataclass(frozen=True)
class Notice:
    """Something to log."""

    level: str
    message: str
    code: str


@dataclass
class Prepared:
    """Both sides of the split, ready to be computed."""

    train: list[Conversation]
    held: list[Conversation]
    longest: int = 0
    shortened: list[int] = field(default_factory=list)  # lines, as are those below
    dropped: list[int] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    loses: str = "their oldest exchanges"
    tokens_apart: int = 0  # of the training examples, each by itself
    notices: list[Notice] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def say(self, level: str, message: str, code: str) -> None:
        """Note something to log."""
        self.notices.append(Notice(level, message, code))


def count(those: Sequence[Conversation]) -> int:
    """How many examples they are."""
    return sum(len(c.parts) for c in those)


def prepare(
    plan: Plan,
    examples: Sequence[data.Example],
    renderer: render.Renderer,
    longest: int,
    check: Callable[[], None] = lambda: None,
) -> Prepared:
    """Render, shorten, leave out, split and merge; Failure when too much is left out."""
    out = Prepared([], [], longest)
    rendered, empty = dict[int, render.Sequence](), list[int]()
    for line, s in _rendered(plan, out, examples, renderer, check).items():
        if s is not None and s.loss_tokens == 0:
            empty.append(line)
            continue
        if s is None or (s.shortened and plan.data.too_long == "drop"):
            out.dropped.append(line)
            continue
        if s.shortened:
            out.shortened.append(line)
        rendered[line] = s
    if examples[0].messages[0].role == "text":
        out.loses = "their end"
    _judge(plan, out, len(examples))
    if empty:
        said = f"{len(empty)} of {len(examples)} examples have no token to learn and are left out"
        out.say("warn", f"{said} ({_lines(empty)})", "dropped")
        out.dropped += empty
    _tell(out, renderer, examples)
    # Split before anything is left out, as the validation of data sets counts.
    sides = data.split(list(examples), plan.validation_fraction, plan.hyperparameters.seed)
    pairs = [[(e, rendered[e.line]) for e in side if e.line in rendered] for side in sides]
    if not pairs[0]:
        raise Failure("dataset_invalid", "no example for training is left", "Raise max_seq_length.")
    out.tokens_apart = sum(len(s.tokens) for _, s in pairs[0])
    out.train, out.held = (_conversations(plan, out, side) for side in pairs)
    if out.apart:
        out.say(
            "info",
            f"{len(out.apart)} examples go on with an earlier conversation, but the template "
            "renders them in another way: they are computed by themselves",
            "not_merged",
        )
    out.samples = [renderer.decode(c.whole()) for c in out.train[:SAMPLES]]
    for text in out.samples:
        out.say("info", text, "training_sample")
    return out


def _tell(out: Prepared, renderer: render.Renderer, examples: Sequence[data.Example]) -> None:
    """Say what the renderer had to do with the user's text."""
    if found := sum(renderer.control.values(), Counter[str]()):
        which = ", ".join(f"{t} {n} times" for t, n in found.most_common(MOST_NAMED))
        lines = _lines(sorted(renderer.control))
        out.say(
            "warn",
            f"{len(renderer.control)} examples have text that reads like a control token of the "
            f"model ({which}; {lines}): {renderer.guard.fate}",
            "control_tokens",
        )
    template = renderer.template
    system = sum(e.messages[0].role == "system" for e in examples)
    if template and not template.takes_system and system:
        out.say(
            "info",
            f"the base model's chat template has no place for a system prompt: {system} of them "
            "stand before the first question",
            "system_folded",
        )


def _rendered(
    plan: Plan,
    out: Prepared,
    examples: Sequence[data.Example],
    renderer: render.Renderer,
    check: Callable[[], None],
) -> cache.Rendered:
    """Every example as tokens, by line; from the host's cache if it has them."""
    name, where = "", plan.cache_dir
    if where is not None:
        name = cache.key(plan.data.sha256, plan.base_model.path, out.longest, library_versions())
        entry, why = cache.load(where, name, [e.line for e in examples])
        if why:
            out.say("warn", f"tokens of this host's cache are not used: {why}", "token_cache")
        if entry is not None:
            said = f"the tokens of {len(examples)} examples were on this host already"
            out.say("info", said, "token_cache")
            renderer.control = entry.control
            return entry.rendered
    rendered = cache.Rendered()
    for e in examples:
        check()
        rendered[e.line] = renderer.render(e, out.longest)
    if where is not None and (
        why := cache.store(where, name, cache.Entry(rendered, renderer.control))
    ):
        out.say("warn", f"the tokens are not kept for the next job: {why}", "token_cache")
    return rendered


def _conversations(
    plan: Plan, out: Prepared, pairs: list[tuple[data.Example, render.Sequence]]
) -> list[Conversation]:
    if not plan.data.merge:
        return conversation.apart(s for _, s in pairs)
    merged, odd = conversation.merge(pairs)
    # What lost its oldest exchanges cannot go on with what has them still.
    short = set(out.shortened)
    out.apart += [line for line in odd if line not in short]
    return merged


def _judge(plan: Plan, out: Prepared, total: int) -> None:
    """Say what is too long, and refuse what the policy does not allow."""
    hint = "Raise max_seq_length or shorten these examples."
    limit = f"of {total} examples are longer than {out.longest} tokens"
    long = sorted(out.shortened + out.dropped)
    if plan.data.too_long == "error" and long:
        raise Failure("dataset_invalid", f"{len(long)} {limit} ({_lines(long)})", hint)
    if out.shortened:
        said = f"{len(out.shortened)} {limit} and lose {out.loses}"
        out.say("warn", f"{said} ({_lines(out.shortened)})", "shortened")
    if out.dropped:
        said = f"{len(out.dropped)} {limit}"
        if plan.data.too_long != "drop" and len(out.dropped) > MOST_DROPPED * total:
            raise Failure("dataset_invalid", f"{said} ({_lines(out.dropped)})", hint)
        out.say("warn", f"{said} and are left out ({_lines(out.dropped)})", "dropped")


def _lines(those: list[int]) -> str:
    more = ", ..." if len(those) > MOST_NAMED else ""
    return "lines " + ", ".join(map(str, those[:MOST_NAMED])) + more
