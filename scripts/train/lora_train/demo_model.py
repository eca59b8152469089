"""The demo's base model: small, made on the spot, the same every time.

The demo and the tests need a base model without a download. This module makes
one: a Llama of about 3 M parameters, a byte-level BPE tokenizer and a chat
template that marks the assistant's tokens.

A purely random base barely answers to LoRA. So the base first reads the text of
the data file for a few seconds as plain text, without roles. Its loss then
starts well below ln(vocabulary), and LoRA lowers it further. The base has seen
the words it is later tuned on: its losses say that training works, and nothing
about quality.

The same text, seed, library versions and kind of CPU give the same bytes.

    python -m lora_train.demo_model --out DIR [--data FILE.jsonl] [--seed 7] [--force]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 4096
"""Rows of the embedding. A short text fills fewer; the rest stays unused."""

MAX_POSITIONS = 4096
"""Longest sequence in tokens."""

BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

# The markers stand around what the model itself must say: the content and the
# end-of-turn token, not the role before it and not the line break after it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token }}"
    "{% endgeneration %}"
    "{% else %}"
    "{{ (message['content'] or '') + eos_token }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

PARAGRAPH = (
    "Good morning, and welcome to the Riverside Bike Workshop. A chain that skips is "
    "seldom a mystery: first we measure how far it has stretched, then we look at the "
    "teeth of the cassette, and only then do we touch the cable. Turn the barrel "
    "adjuster a quarter at a time and pedal after each turn. If the bike shifts cleanly "
    "up and down, stop there; a good repair ends as soon as the fault is gone. Write down "
    "what you changed, because the next fault is easier to find when the last one is known."
)

COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# Pre-training: 60 steps of 6 windows of 160 tokens are about 10 s on two cores.
STEPS, WINDOWS, LENGTH = 60, 6, 160
PEAK_LR = 4e-3
THREADS = 2


@dataclass(frozen=True)
class Made:
    """What `make` left behind. `seconds` is 0.0 for a directory left alone."""

    parameters: int
    vocab: int
    seconds: float


def complete(out: Path) -> bool:
    """Tell whether `out` holds a whole base model. A rename made it whole at once."""
    return all((out / name).is_file() for name in COMPLETE)


def texts_of(data: Path | None) -> list[str]:
    """Return every string value of a JSON Lines file once, in order of appearance.

    Conversation histories repeat earlier turns, so each text counts once. Keys are
    left out. Without a file the built-in paragraph is the text. Raises ValueError
    for a line that is not JSON and for a file without text, OSError when reading
    fails.
    """
    if data is None:
        return [PARAGRAPH]
    seen: dict[str, None] = {}
    with data.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as err:
                raise ValueError(f"read {data.name} line {number}: not JSON: {err}") from err
            seen.update(dict.fromkeys(_strings(value)))
    if not seen:
        raise ValueError(f"read {data.name}: holds no text")
    return list(seen)


def make(out: Path, data: Path | None = None, seed: int = 7, force: bool = False) -> Made:
    """Make the base model in `out`, or leave a complete one alone unless `force`.

    The work happens in a directory beside `out` that is renamed at the end, so `out`
    is absent or whole. Raises FileExistsError when `out` holds something else,
    ValueError for bad data and OSError when writing fails.
    """
    if not force:
        if complete(out):
            return _describe(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"make {out}: exists and is no base model; --force replaces it")

    start = time.monotonic()
    texts = texts_of(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tokenizer = make_tokenizer(texts)
        model = make_model(tokenizer, texts, seed)
        model.save_pretrained(temp, safe_serialization=True)
        # One file less to forget: the template goes into tokenizer_config.json.
        tokenizer.save_pretrained(temp, save_jinja_files=False)
        temp.chmod(0o755)
        _put(temp, out, force)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return Made(model.num_parameters(), len(tokenizer), time.monotonic() - start)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most VOCAB tokens on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=2,
        special_tokens=[BOS, END, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> LlamaForCausalLM:
    """Return a Llama with weights drawn from `seed` that has read `texts` for a while."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    special: dict[str, Any] = {
        f"{role}_token_id": tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{role}_token"))
        for role in ("bos", "eos", "pad")
    }
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        **special,
    )
    with _repeatable(seed):
        model = LlamaForCausalLM(config)
        ids = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
        _read(model, torch.tensor(ids))
    return model.eval()


def _read(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Pre-train `model` on random windows of the token stream `ids`."""
    import torch

    if len(ids) <= LENGTH:
        ids = ids.repeat(LENGTH // len(ids) + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LR, total_steps=STEPS, pct_start=0.15
    )
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH + 1, (WINDOWS, 1))
        batch = ids[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Fix seed and thread count inside, restore the caller's after.

    A sum split over another number of threads rounds differently.
    """
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _put(temp: Path, out: Path, force: bool) -> None:
    """Rename `temp` to `out`. With `force`, what was there is removed."""
    old = Path(f"{temp}.old")
    if force and (out.exists() or out.is_symlink()):
        os.rename(out, old)
    try:
        os.rename(temp, out)
    except OSError:
        # Another process was faster with the same model: its copy serves as well.
        if not complete(out):
            raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _describe(out: Path) -> Made:
    """Count parameters and vocabulary of a complete directory without torch."""
    weights = out / "model.safetensors"
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    parameters = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        size = 1
        for length in tensor["shape"]:
            size *= length
        parameters += size
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    return Made(parameters, len(tokenizer["model"]["vocab"]), 0.0)


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401  any JSON value
    """Yield the non-empty string values of a JSON value, depth first."""
    match value:
        case str():
            if value.strip():
                yield value
        case list():
            for item in value:
                yield from _strings(item)
        case dict():
            for item in value.values():
                yield from _strings(item)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Exits 0, 65 for bad data, 66 for no data, 73 when writing fails."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_train.demo_model", description="Make the demo's base model."
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--data", type=Path, help="JSON Lines file whose text the base reads")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--force", action="store_true", help="replace what is at --out")
    args = parser.parse_args(argv)

    begun = time.monotonic()
    try:
        made = make(args.out, args.data, args.seed, args.force)
    except ValueError as err:
        print(err, file=sys.stderr)
        return 65
    except FileNotFoundError as err:
        print(err, file=sys.stderr)
        return 66
    except OSError as err:
        print(err, file=sys.stderr)
        return 73
    verb = "made" if made.seconds else "kept"
    print(
        f"{verb} {args.out}: {made.parameters} parameters, "
        f"vocab {made.vocab}, {time.monotonic() - begun:.1f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
