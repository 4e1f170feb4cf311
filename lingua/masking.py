"""Mask secrets in everything that a run writes: environment, config, commands, logs, errors. All rules are here.

A value is masked because of its name, its form (logins in addresses, tokens of known services), or because a variable
of this process with a secret name has it. When in doubt, values are masked, but no key of our own configs is.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

MASK = "***"

# Names of variables, and of keys in capitals.
_VARIABLE = re.compile(
    r"KEY|TOKEN(?!IZ)|SECRET|PASS|.PWD|CRED|AUTH(?!OR(?!I))|BEARER|COOKIE|JWT|SIGNATURE|WEBHOOK|CONN\w*_STR"
    r"|(^|_)(PATS?|PW|PWD|SAS|SIG|OTP|TOTP|PSK|DSN|PIN|LOGIN)(_|$)",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"(OLD)?PWD|XAUTHORITY|SSH_AUTH_SOCK")
# Names of other keys. `token` and `key` have other meanings too: text_key, eos_token, chunk_tokens.
_KEY = re.compile(
    r"secret|password|passwd|passphrase|creds|credential|bearer|jwt|api_?key|webhook|(^|_)cred(_|$)"
    r"|(^|_)(pwd|pw|pat|auth|authorization|cookies?|dsn|sas|sig|signature|otp|login)$"
    r"|(access|private|account|signing|encryption|client|master|ssh|storage|license)_?keys?(_id)?$"
    r"|(^|_)(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!stop_)(?<!start_)(?<!end_)token$"
)
_POSITION = re.compile(r"(^|\.)lanes\.\d+\.token$", re.ASCII)  # in the state of a checkpoint
_PLACE_KEY = re.compile(r"(^|_)(path|file|dir|folder|name|base)$")

_LOGIN = re.compile(
    r"(\w:/{1,2}|//)[^\s/@:'\"]+:(?!\d+/)[^\s'\"]*@(?=[\w.\[-]+(?:[:/?#&,;)\s'\"]|$))"  # the password may have / and @
    r"|(\w:/{1,2})[^\s/'\"]*@"
    r"|(?<![\w/.:@-])[\w.+-]++:[^\s@/'\"]+@(?=[\w-]+[.:])"  # of a proxy, say, without `http://`
)
# Addresses of package indexes may have a token as a folder; `simple` and `whl/cu128` are not tokens.
_INDEX = re.compile(r"(?<=index)[\w-]*[\"']?[=\s]+\S+", re.IGNORECASE)
_FOLDER = re.compile(r"(?<=[^/:]/)(?:[^\s/@'\"]{16,}|(?=[^\s/]*\d)[^\s/@'\"]{6,})")
_NAMED = re.compile(
    r"(?<![\w.-])(--)?(?P<name>[A-Za-z_][\w.-]*+)(?:[\"']?(?:=|:[ ]*)|[ ]+(?:=|is)[ ]+(?=[\"'])|(?(1)[ ]+|(?!)))"
)
_VALUE = re.compile(
    r"(?:Basic |Bearer )?(?:\\+\"[^\"\\]*\\+\"|\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^\s\"'][^\s\"]*)", re.IGNORECASE
)
# Options of well-known programs that hold a secret by their position.
_TYPED = re.compile(
    r"(\b(?:curl|wget)\s(?:[^\n;|&]{0,300}?\s)?(?:-u|--user)[ =]?[\"']?|\bwandb login (?:-\S+ )*"
    r"|\b(?:sshpass|(?:docker|podman) login)\s(?:[^\n;|&]{0,300}?\s)?-p ?[\"']?)[^\s\"'-][^\s\"']*"
)
_NOTHING = ("", "null", "none", "true", "false", "value", "...", MASK)
_FORMS = re.compile(
    r"(?<=bearer )[\w.~+/=-]{6,}|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END|\Z)"
    r"|\b(?:hf_[a-z0-9]{20,}|gh[pousr]_\w{16,}|github_pat_\w{10,}|glpat-[\w-]{10,}|pypi-[\w-]{16,}|sk-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]{8,}\.[\w.-]+)",
    re.IGNORECASE | re.DOTALL,
)


@lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Return whether the name of a variable or a (dotted) key means that it holds a secret."""
    *sections, last = name.split(".")
    if last.isupper() or "env" in sections:
        return not _NO_SECRET.fullmatch(last) and _VARIABLE.search(last) is not None
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|-", "_", last).lower()
    return _KEY.search(words) is not None and not _PLACE_KEY.search(words) and not _POSITION.search(name)


def public_text(text: str) -> str:
    """Mask possible secrets in any text: a message, a log line, a command."""
    for value in _values_of_this_process():
        text = text.replace(value, MASK)
    return _by_form(text)


def _by_form(text: str) -> str:
    text = _LOGIN.sub(lambda found: f"{found[1] or found[2] or ''}{MASK}@", text)
    text = _TYPED.sub(rf"\1{MASK}", text)
    parts, done = [], 0
    for found in _NAMED.finditer(text):
        value = _VALUE.match(text, found.end()) if found.start() >= done and is_secret(found["name"]) else None
        if value is not None and value[0].strip("\"'").lower() not in _NOTHING:
            quote = value[0][0] if value[0][0] in "\"'" else ""
            parts += [text[done : found.end()], quote, MASK, quote]
            done = value.end()
    return _FORMS.sub(MASK, _INDEX.sub(_without_folders, "".join([*parts, text[done:]])))


def _without_folders(index: re.Match[str]) -> str:
    return _FOLDER.sub(MASK, index[0])


def _values_of_this_process() -> list[str]:
    """Return the values that no text may contain, except short words and paths, which may occur in other text."""
    named = [value for name, value in os.environ.items() if is_secret(f"env.{name}")]
    telling = [value for value in named if len(value) >= 6 and not value.isalpha() and not value.isdecimal()]
    return sorted((value for value in telling if not value.startswith(("/", "~", "."))), key=len, reverse=True)


def public_word(word: str) -> str:
    """Mask a secret in a word of a command line, such as `launcher.env.set.HF_PAT=...`."""
    name, assigned, value = word.partition("=")
    if assigned and value and is_secret(name.lstrip("-")):
        return f"{name}={MASK}"
    return _FOLDER.sub(MASK, public_text(word)) if "index" in name.lower() else public_text(word)


def public_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return variables with their secrets masked."""
    return {name: public_word(f"{name}={value}").partition("=")[2] for name, value in env.items()}


def public_tree(value: Any, key: str = "") -> Any:
    """Return a config, or the value of its dotted `key`, with its secrets masked."""
    if isinstance(value, Mapping):
        return {name: public_tree(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public_tree(inner, key) for inner in value]
    parts = key.split(".")
    named = any(is_secret(".".join(parts[: n + 1])) for n in range(len(parts)))  # a section may be secret as a whole
    if isinstance(value, str):
        if value and ((named and not value.startswith("<")) or _is_copied(value, parts[-1])):  # `<s>` is not a secret
            return MASK
        return public_word(f"{parts[-1]}={value}").partition("=")[2] if "env" in parts else _by_form(value)
    return MASK if named and isinstance(value, int) and abs(value) >= 1000 else value


def _is_copied(value: str, name: str) -> bool:
    """Return whether a secret variable of this process has exactly this value, which must not be written."""
    return not _PLACE_KEY.search(name) and value in _values_of_this_process()


def command_line(argv: Sequence[str]) -> str:
    """Format a command for a shell. A variable replaces each word with a secret."""
    return " ".join(shlex.quote(word) if public_word(word) == word else _asked_for(word) for word in argv)


def _asked_for(word: str) -> str:
    name, assigned, _ = word.partition("=") if "=" in word else ("word", "", "")
    variable = "SECRET_" + re.sub(r"\W", "_", name.rpartition(".")[2]).upper()
    begin = f"{shlex.quote(name)}=" if assigned else ""
    return f'{begin}"${{{variable}:?is not stored, as it holds a secret; export it}}"'
