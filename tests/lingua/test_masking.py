"""Secrets do not reach a file that others may read, however they are spelled; what is no secret stays as it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from apps.main.args import TrainArgs
from lingua.config.base import all_keys
from lingua.masking import command_line, is_secret, public_text, public_tree, public_variables

S = "s3cr3t/x+Y="
VARIABLES = [
    "HF_TOKEN", "HF_PAT", "GITHUB_PAT", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MY_KEY", "APIKEY",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MYSQL_PWD", "DB_PWD", "PGPASSWORD", "DB_PASS",
    "UV_INDEX_CORP_PASSWORD", "SSH_PASSPHRASE", "GCP_CREDS", "MYCREDS_JSON", "AZURE_CREDENTIALS", "API_BEARER",
    "BEARER_HEADER", "HTTP_AUTHORIZATION", "NETRC_AUTH", "SESSION_COOKIE", "MY_JWT", "AZURE_STORAGE_SAS", "SENTRY_DSN",
    "SLACK_WEBHOOK_URL", "AZURE_STORAGE_CONNECTION_STRING", "URL_SIGNATURE", "VPN_OTP", "WIFI_PSK", "LDAP_LOGIN",
]  # fmt: skip
TEXTS = [
    f"s3://AKID:{S}@bucket/corpus", f"https://me:{S}@host.org/simple", "https://s3cr3t@pypi.corp.org/simple",
    f"https://user:p@{S}@host:8080/x", "redis://:s3cr3t@cache:6379/0", f"/work/s3:/me:{S}@host/data is not there",
    "proxy me:s3cr3t@proxy.corp.org:3128", "UV_INDEX=corp=https://dl.cloudsmith.io/s3cr3t/corp/python/simple/",
    "uv pip install --extra-index-url https://pypi.fury.io/s3cr3t/me/ torch", f"https://h/x?sig={S}&sv=2",
    f"export HF_TOKEN={S}", f"--export=ALL,HF_PAT={S}", f"curl --token {S} https://h", f"--password='my {S}'",
    f"Authorization: Bearer {S}", f"{{'DB_PWD': '{S}', 'n': 3}}", f'{{"clientSecret": "{S}"}}', f"api-key: {S}",
    f"launcher.env.set.HF_PAT is '{S}'; it must be a number", "push to hf_s3cr3tABCDEFGHIJKLMNOPQRS",
    "-----BEGIN OPENSSH PRIVATE KEY-----\ns3cr3t\n-----END OPENSSH PRIVATE KEY-----", f"db_password={S}",
    f'"setup=[\\"export DB_PASS=\\\\"{S}\\\\"\\"]"', f"curl -sSf -u me:{S} https://h", f"wget -q --user=me:{S} x",
    "wandb login --relogin s3cr3t", f"echo x | docker login -u me -p {S} ghcr.io", f"sshpass -p '{S}' ssh h",
]  # fmt: skip


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_with_a_secret_name_is_masked_wherever_it_stands(name: str):
    assert is_secret(f"launcher.env.set.{name}")
    tree = {"launcher": {"env": {"set": {name: S}}, "setup": [f"export {name}={S}"]}, "own": {name: S}}
    assert "s3cr3t" not in str([public_variables({name: S}), public_tree(tree), public_text(f"bad: {name}={S} x")])


@pytest.mark.parametrize("text", TEXTS)
def test_a_secret_within_text_is_masked(text: str):
    assert "s3cr3t" not in public_text(text)
    assert "s3cr3t" not in str(public_tree({"data": {"root_dir": text}}))
    assert "s3cr3t" not in str(public_variables({"EXTRA_ARGS": text}))


@pytest.mark.parametrize(
    "name", ["password", "hf_token", "apiKey", "db-creds", "credentials", "bearer", "client_secret"]
)
def test_a_key_of_an_own_app_is_masked_by_its_words(name: str):
    assert "s3cr3t" not in str(public_tree({"own": {name: S, "inner": {name: {"user": "me", "x": [S]}}}}))
    assert public_tree({name: 123456789}) == {name: "***"}


def test_what_a_variable_of_this_process_holds_is_masked_under_any_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CORP_PAT", "f00-bar-b4z")
    assert public_text("KeyError: 'f00-bar-b4z'") == "KeyError: '***'"
    assert public_tree({"own": {"greeting": "f00-bar-b4z"}, "name": "f00-bar-b4z"})["own"] == {"greeting": "***"}


def test_no_key_of_ours_counts_as_a_secret_and_a_whole_config_stays_as_it_is():
    assert [key for key in all_keys(TrainArgs) if is_secret(key)] == []
    config = TrainArgs().model_dump(mode="json")
    assert public_tree(config) == config


@pytest.mark.parametrize(
    "text",
    [
        "7,680 tokens in all", "TOKENIZERS_PARALLELISM=false", "data.text_key=content", "loss.chunk_tokens: 4096",
        "eos_token: </s>", "out//runs/llama@500", "https://host:8080/a@b", "HF_TOKEN is missing; set it",
        "PWD=/home/me", "write KEY=VALUE", "step 10: loss 3.1, 4096 tokens per step",
        "sbatch -p gpu", "docker login ghcr.io", "curl -fsSL https://h/x | sh -u", "wandb login", "login -p gpu",
        "unknown key data.sourcs; did you mean data.sources?", "state: lanes.3.token: 4096 -> 8192",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str):
    assert public_text(text) == text
    assert public_tree({"checkpoint": {"init_ckpt_path": text}}) == {"checkpoint": {"init_ckpt_path": text}}


def test_text_of_any_length_is_read_once_from_left_to_right():
    for text in ("a=b&" * 50_000, "abc" * 100_000, "x" * 100_000 + "=" + "y" * 100_000):
        assert public_text(text) == text


def test_a_stored_command_asks_for_its_secrets_and_then_runs(tmp_path: Path):
    argv = ["printf", "%s|", "data.root_dir=s3://me:s3cr3t@b", "launcher.env.set.HF_PAT=s3cr3t", "a b's"]
    script = command_line(argv)
    assert "s3cr3t" not in script
    refused = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "SECRET_ROOT_DIR: is not stored, as it holds a secret; export it" in refused.stderr
    env = {"SECRET_ROOT_DIR": "s3://me:s3cr3t@b", "SECRET_HF_PAT": "s3cr3t", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split("|")[:3] == argv[2:]
