"""What a finished run leaves behind, as its readers read it."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, Run

from lora_train import checkpoint, curve
from lora_train.history import History


def loaded(run: Run, name: str) -> dict[str, Any]:
    return json.loads(run.output(name))


def test_the_result_names_every_file(reference: Run) -> None:
    result = reference.of("result")[0]
    there = sorted(p.name for p in Path(result["path"]).iterdir())
    assert sorted(f["name"] for f in result["files"]) == there
    assert {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "README.md", "training_args.json"),
        *("metrics.jsonl", "data_report.json", "loss.svg", "loss.png", "training_report.json"),
        "samples.txt",
        "manifest.json",
    } == set(there)
    assert checkpoint.verify(Path(result["path"])).step == result["steps"]


def test_servers_can_read_the_adapters_settings(reference: Run) -> None:
    """What vLLM, LoRAX and llama.cpp's converter ask of adapter_config.json and its tensors."""
    from safetensors import safe_open

    config = loaded(reference, "adapter_config.json")
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["r"] == 4 and config["lora_alpha"] == 8 and type(config["lora_alpha"]) is int
    assert config["bias"] == "none" and config["modules_to_save"] is None
    assert config["use_rslora"] is False and config["use_dora"] is False
    assert config["base_model_name_or_path"] == "lorayard/demo-llama"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "q_proj" in config["target_modules"] and "lm_head" not in config["target_modules"]
    path = Path(reference.of("result")[0]["path"]) / "adapter_model.safetensors"
    with safe_open(path, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            assert name.startswith("base_model.model.model.layers.")
            assert name.endswith((".lora_A.weight", ".lora_B.weight"))
            assert config["r"] in tensors.get_slice(name).get_shape()


def test_nothing_of_this_host_is_told(reference: Run, model: Path) -> None:
    for f in reference.of("result")[0]["files"]:
        content = reference.output(f["name"])
        for secret in (reference.dir, model, Path.home(), DEMO.parent):
            assert str(secret).encode() not in content, f["name"]


def test_the_data_report_adds_up(reference: Run) -> None:
    report, plan = loaded(reference, "data_report.json"), reference.of("plan")[0]
    assert report["training"]["examples"] == plan["examples"]
    merging = report["merging"]
    assert merging["tokens_an_epoch"] == plan["tokens_per_epoch"]
    epoch = [e["tokens"] for e in reference.of("sample") if e["epoch"] <= 1]
    assert sum(epoch) == plan["tokens_per_epoch"] < merging["tokens_an_epoch_without"]
    assert report["training"]["sequences"] == plan["sequences"] < plan["examples"]
    assert report["training"]["loss_tokens"] == plan["loss_tokens_per_epoch"]
    assert report["validation"]["examples"] == plan["validation_examples"]
    assert report["data_sha256"] == hashlib.sha256(DEMO.read_bytes()).hexdigest()
    assert len(report["samples"]["texts"]) == 3
    assert all("«" in t and "»" in t for t in report["samples"]["texts"])
    shown = reference.output("samples.txt").decode()
    assert all(text in shown for text in report["samples"]["texts"])
    settings = loaded(reference, "training_args.json")
    assert settings["learning_rate"] == 0.01 and settings["libraries"]["peft"]


def test_metrics_are_what_the_events_said(reference: Run) -> None:
    said = [(e["step"], e["loss"]) for e in reference.of("sample")]
    assert reference.history() == said
    assert reference.output("metrics.jsonl").count(b'"ev":"eval"') == len(reference.of("eval"))


def test_the_card_has_the_front_matter_of_hubs(reference: Run) -> None:
    yaml = pytest.importorskip("yaml")
    _, front, body = reference.output("README.md").decode().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "lorayard/demo-llama"
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert "| training loss |" in body and "None" not in body


def pixels(png: bytes) -> list[bytes]:
    """The rows of a PNG of one byte a pixel; every chunk's sum is checked."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at : at + 8])
        content = png[at + 8 : at + 8 + size]
        (crc,) = struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert crc == zlib.crc32(name + content)
        chunks[name], at = content, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    flat = zlib.decompress(chunks[b"IDAT"])
    assert len(flat) == height * (width + 1)
    return [flat[i * (width + 1) + 1 : (i + 1) * (width + 1)] for i in range(height)]


def test_the_curve_is_drawn_where_the_losses_are(reference: Run) -> None:
    svg = ET.fromstring(reference.output("loss.svg"))
    assert svg.tag.endswith("svg") and len(list(svg)) > 10
    rows = pixels(reference.output("loss.png"))
    assert all(any(colour in row for row in rows) for colour in (curve.BLUE, curve.ORANGE))
    falling = [(float(i), 3 - i / 50) for i in range(100)]
    rows = pixels(curve.draw(falling, [])[1])[curve.TOP :]
    heights = [[y for y, row in enumerate(rows) if row[x] == curve.BLUE] for x in (150, 500, 850)]
    assert heights[0][0] < heights[1][0] < heights[2][0]


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(i, 5.0) for i in range(3000)], [(7, 1e9)]])
def test_every_curve_can_be_drawn(points: list[tuple[float, float]]) -> None:
    svg, png = curve.draw(points, points[:1])
    assert ET.fromstring(svg) is not None and pixels(png)


def test_history_survives_what_json_cannot_hold() -> None:
    history = History()
    history.add("sample", {"step": 1, "loss": math.nan, "skipped": True})
    history.add("sample", {"step": 2, "loss": 0.5, "skipped": False})
    again = History(history.bytes().decode())
    assert again.points("sample", "loss") == [(2, 0.5)]
    assert again.bytes() == history.bytes()
