from __future__ import annotations

import re

import pytest

from apps.main.args import TrainArgs
from lingua.config.base import Args, ConfigError, Part
from lingua.config.reference import all_sections, components, field_docs, json_schema, reference_page


def test_every_key_of_every_section_says_what_it_means() -> None:
    unsaid = [
        f"{section.__name__}.{name}"
        for section in all_sections(TrainArgs)
        if section.__module__.startswith(("lingua.", "apps."))  # not what other tests registered
        for name, info in section.model_fields.items()
        if name not in field_docs(section) and not isinstance(info.default, Args | Part) and name != "type"
    ]
    assert unsaid == []


def test_components_are_all_parts_with_their_keys() -> None:
    found = components(TrainArgs, None)
    assert {"adamw", "muon"} <= set(found["optim"])
    assert {"files", "gssm"} <= set(found["source"])
    assert {"mamba2", TrainArgs().model.type} <= set(found["model"])
    assert found["optim"]["muon"]["keys"]["lr"].startswith("float (> 0), default 0.")
    assert list(components(TrainArgs, "loss")) == ["loss"]
    with pytest.raises(ConfigError, match="no components of kind optimizer; choose one of loss, measure, model, optim"):
        components(TrainArgs, "optimizer")


def test_the_json_schema_knows_every_part_and_key() -> None:
    schema = json_schema(TrainArgs)
    definitions = schema["$defs"]
    models = [model["$ref"].rpartition("/")[2] for model in schema["properties"]["model"]["anyOf"]]
    assert {"Mamba2Args", "HybridArgs"} < set(models)
    (llama,) = (name for name in models if "LlamaArgs" in name or "LMTransformerArgs" in name)
    model_keys = definitions[llama]["properties"]
    assert {"dim", "n_heads", "attn_impl"} <= set(model_keys)
    assert model_keys["dim"]["description"] == "D."
    assert {"base", "data", "optim", "checkpoint"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_a_section_is_described_in_whole_sentences() -> None:
    page = reference_page(TrainArgs)
    for title, text in re.findall(r"^## (.+)\n\n(.*)\n", page, flags=re.MULTILINE):
        assert not text or text.endswith("."), title
    assert "save a checkpoint after the next step and go on" in page


def test_the_reference_page_has_every_section_with_type_default_and_meaning() -> None:
    page = reference_page(TrainArgs)
    for line in (
        "## model (type: llama)",
        "## checkpoint.dump",
        "## data.sources",
        "| `batch_size` | int (>= 1) | `2` | B: rows per micro step on each data-parallel rank. |",
        "| `device` | `auto`, `cpu`, `cuda` | `'auto'` | auto: a GPU if there is one. |",
        "| `path` | str | required | Folder with `*.chunk.*.jsonl` or `*.jsonl` files",
    ):
        assert line in page
