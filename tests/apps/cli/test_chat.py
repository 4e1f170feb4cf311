"""`lingua chat`: what is typed, what is written, and which prompt the model gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apps.cli import chat
from apps.cli.chat import Talk, rendered, template_of
from lingua.config.base import ConfigError
from lingua.config.keys.generate import GeneratorArgs
from lingua.model.generate import Answer
from lingua.model.tokenizer_json import ANSWER_TEMPLATE
from tests.apps.cli.test_export import make_run
from tests.cli import Lingua

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


class Parrot:
    """Answers with what is next in `answers`, a letter at a time; `interrupts` after so many."""

    def __init__(self, *answers: str, interrupts: int | None = None) -> None:
        self.args, self.prompts, self._answers, self._interrupts = GeneratorArgs(), [], list(answers), interrupts
        self.on_text: Any = None
        self.seeds: list[int] = []

    def generate(self, prompts: list[str]) -> list[Answer]:
        self.prompts += prompts
        self.seeds.append(self.args.seed)
        text = self._answers.pop(0)
        for n in range(1, len(text)):
            if n == self._interrupts:
                raise KeyboardInterrupt
            self.on_text(text[:n] + "\ufffd")
        return [Answer(text, "length", len(text), 0)]


def talk(parrot: Parrot, template: str | None, *lines: str) -> str:
    written: list[str] = []
    conversation = Talk(parrot, template, written.append)  # pyright: ignore[reportArgumentType]
    for line in lines:
        assert conversation.take(line)
    return "".join(written)


def test_a_base_model_continues_what_was_typed_and_goes_on_when_asked() -> None:
    parrot = Parrot(" one", " two", " other")
    assert talk(parrot, None, "/more", "a", "/more", "/again") == "nothing was said yet\na one\n two\na other\n"
    assert parrot.prompts == ["a", "a one", "a"]
    assert parrot.seeds == [42, 43, 44]


def test_a_model_of_answers_gets_each_prompt_alone_or_by_the_template() -> None:
    parrot = Parrot("A", "B")
    assert talk(parrot, ANSWER_TEMPLATE, "q", "r") == "A\nB\n"
    assert parrot.prompts == ["q", "r"]
    parrot = Parrot("A", "B", "C", "D")
    talk(parrot, TURNS, "q", "r", "/again", "/new", "s")
    second = "<user>q<assistant>A<user>r<assistant>"
    assert parrot.prompts == ["<user>q<assistant>", second, second, "<user>s<assistant>"]


def test_keys_are_turned_while_one_talks() -> None:
    parrot = Parrot("A")
    lines = ["/temperature=0.5", "/temperature=cold", "/what", "/top_k = 3", "/temperature", "/temperture=1", "/mor"]
    said = talk(parrot, None, *lines, "/temperature 1", "/help")
    assert (parrot.args.temperature, parrot.args.top_k) == (0.5, 3)
    for part in ("cold", "/what is not known; /help lists", "top_k is 3\ntemperature is 0.5\n", "/quit, Ctrl-D"):
        assert part in said, said
    assert said.count("/temperature=VALUE?") == 2
    assert "/mor is not known; did you mean /more?" in said
    assert talk(parrot, None, " /usr/bin") == " /usr/binA\n"
    assert not Talk(parrot, None, print).take("/quit")  # pyright: ignore[reportArgumentType]


def test_ctrl_c_ends_an_answer_and_keeps_what_came() -> None:
    parrot = Parrot("abcdef", "x", interrupts=4)
    assert talk(parrot, None, "p") == "pabc ...\n"
    parrot = Parrot("abEND", "x")
    parrot.args = parrot.args.model_copy(update={"until": ["END"]})
    assert talk(parrot, None, "p").startswith("pab")


def test_templates_run_nothing_and_are_found_beside_the_weights(tmp_path: Path) -> None:
    assert template_of(tmp_path, None, answers=False) is None
    assert template_of(tmp_path, None, answers=True) == ANSWER_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text(TURNS)
    assert template_of(tmp_path, None, answers=False) == TURNS
    with pytest.raises(ConfigError, match="cannot be read"):
        template_of(tmp_path, tmp_path / "nowhere", answers=False)
    for evil in ("{{ messages.__class__.__mro__ }}", "{{ nothing"):
        with pytest.raises(ConfigError, match="--template"):
            rendered(evil, [])


def test_a_model_speaks_as_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    lines = iter(["def \\", "x", "/temperature=0", "/more"])

    def typed(prompt: str) -> str:
        return next(lines, None) or _end()

    def _end() -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    code, out, err = Lingua(capsys, "chat")(f"{tmp_path}/run@1", "said first", "max_gen_len=8", "device=cpu")
    assert code == 0, err
    assert out.startswith("said first")
    assert "\ndef \nx" in out
    assert out.count("temperature is 0.0\n") == 1


def test_lines_that_end_with_a_backslash_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> Iterator[str]:
        yield from ("a", "b\\", "c")

    typed = lines()

    def ask(prompt: str) -> str:
        found = next(typed, None)
        if found is None:
            raise EOFError
        return found

    monkeypatch.setattr("builtins.input", ask)
    assert list(chat.typed_lines()) == ["a", "b\nc"]
