"""Where an agent may point, and what of the environment it may see."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernel.errors import NotebookError
from interp_kernel.mcp.confine import notebook_path
from interp_kernel.mcp.mask import Mask, kernel_environment

# ----------------------------------------------------------------------------------------------- paths


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = tmp_path / "workspace"
    (root / "deep").mkdir(parents=True)
    for path in (root / "study.ipynb", root / "deep/other.ipynb", tmp_path / "outside.ipynb", root / "notes.txt"):
        path.write_text("{}")
    (root / "inner.ipynb").symlink_to(root / "study.ipynb")
    (root / "out.ipynb").symlink_to(tmp_path / "outside.ipynb")
    (root / "text.ipynb").symlink_to(root / "notes.txt")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.ipynb").symlink_to(root / "loop.ipynb")
    (root / "dangling.ipynb").symlink_to(tmp_path / "missing.ipynb")
    (root / "folder.ipynb").mkdir()
    os.mkfifo(root / "pipe.ipynb")
    (root / "zero.ipynb").symlink_to("/dev/zero")
    return root


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("study.ipynb", "study.ipynb"),
        ("./deep/../study.ipynb", "study.ipynb"),
        ("deep/other.ipynb", "deep/other.ipynb"),
        ("inner.ipynb", "study.ipynb"),
    ],
)
def test_a_notebook_of_the_workspace_is_found(workspace: Path, path: str, real: str) -> None:
    assert notebook_path(path, workspace, exists=True) == workspace.resolve() / real
    assert notebook_path(str(workspace / path), workspace, exists=True) == workspace.resolve() / real


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("../outside.ipynb", "'../outside.ipynb' leads out of the workspace /.*; name a notebook inside of it"),
        ("deep/../../outside.ipynb", "leads out of the workspace"),
        ("/etc/passwd", "leads out of the workspace"),
        ("/proc/self/environ", "leads out of the workspace"),
        ("~/study.ipynb", r"There is no notebook '~/study.ipynb' in the workspace"),
        ("out.ipynb", "'out.ipynb' goes through a link out of the workspace"),
        ("up/outside.ipynb", "goes through a link out of the workspace"),
        ("zero.ipynb", "goes through a link out of the workspace"),
        ("dangling.ipynb", "goes through a link out of the workspace"),
        ("loop.ipynb", "'loop.ipynb' can't be followed|can't be looked at: Too many levels"),
        ("text.ipynb", r"'text.ipynb' is .txt; expected a notebook, .ipynb"),
        ("notes.txt", r"'notes.txt' is .txt; expected a notebook, .ipynb"),
        ("deep", "'deep' is without suffix; expected a notebook"),
        (".", "'.' is without suffix"),
        ("", "'' is no path; expected one like `study.ipynb`"),
        ("a\0.ipynb", "is no path"),
        ("a\n.ipynb", "is no path"),
        ("folder.ipynb", "'folder.ipynb' is a folder; expected a notebook's file"),
        ("pipe.ipynb", "'pipe.ipynb' is a named pipe"),
        ("missing.ipynb", r"There is no notebook 'missing.ipynb' in the workspace. In that folder are: .*study.ipynb"),
        ("study.ipynb/x.ipynb", "can't be looked at: Not a directory"),
        ("x" * 300 + ".ipynb", "can't be followed|can't be looked at: File name too long"),
    ],
)
def test_anything_else_is_refused_in_words(workspace: Path, path: str, words: str) -> None:
    with pytest.raises(NotebookError, match=words):
        notebook_path(path, workspace, exists=True)


def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.ipynb"))
        with pytest.raises(NotebookError, match=r"'s.ipynb' is a socket; expected a notebook's file\."):
            notebook_path("s.ipynb", tmp_path, exists=True)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("study.ipynb", "'study.ipynb' exists already; choose another name"),
        ("pipe.ipynb", "exists already"),
        ("nowhere/new.ipynb", "'nowhere/new.ipynb' can't be made: its folder '.*/nowhere' doesn't exist"),
        ("study.ipynb/new.ipynb", "can't be made"),
        ("dangling.ipynb", "goes through a link out of the workspace"),
        ("up/new.ipynb", "goes through a link out of the workspace"),
        ("../new.ipynb", "leads out of the workspace"),
    ],
)
def test_a_new_notebook_is_made_only_where_it_may(workspace: Path, path: str, words: str) -> None:
    with pytest.raises(NotebookError, match=words):
        notebook_path(path, workspace, exists=False)


def test_a_free_name_is_given_back(workspace: Path) -> None:
    assert notebook_path("deep/new.ipynb", workspace, exists=False) == workspace.resolve() / "deep/new.ipynb"


def test_a_workspace_that_is_a_link_itself_is_followed(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "shortcut").symlink_to(workspace)
    assert notebook_path("study.ipynb", tmp_path / "shortcut", exists=True) == workspace.resolve() / "study.ipynb"


parts = st.sampled_from(["..", ".", "deep", "up", "out.ipynb", "study.ipynb", "new.ipynb", "/", "//", "", "loop.ipynb"])


@settings(max_examples=300)
@given(st.lists(parts, max_size=6).map("/".join), st.booleans())
def test_no_path_leads_out(tmp_path_factory: pytest.TempPathFactory, path: str, exists: bool) -> None:
    root = tmp_path_factory.getbasetemp() / "confined/workspace"
    if not root.exists():
        (root / "deep").mkdir(parents=True)
        (root / "study.ipynb").touch()
        (root.parent / "study.ipynb").touch()
        (root / "up").symlink_to(root.parent)
        (root / "out.ipynb").symlink_to(root.parent / "study.ipynb")
        (root / "loop.ipynb").symlink_to(root / "loop.ipynb")
    try:
        found = notebook_path(path, root, exists=exists)
    except NotebookError:
        return
    assert Path(os.path.realpath(root / path)) == found
    assert found.is_relative_to(root.resolve())
    assert found.suffix == ".ipynb"


# --------------------------------------------------------------------------------------------- secrets


def unknown_to_all(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "a-value-of-its-own")


SECRET = unknown_to_all(
    *("HF_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "GITHUBTOKEN", "PGPASSWORD", "DB_PASSWORD", "CLIENT_SECRET", "my_token"),
    *("HIDDEN_SECRET", "KAGGLE_KEY", "APIKEY", "GOOGLE_APPLICATION_CREDENTIALS", "JUPYTER_TOKEN", "SSH_PASSPHRASE"),
) | {
    "DATABASE_URL": "postgres://me:hunter22@host/db",
    "HARMLESS_NAME": "hf_abcdefghijklmnopqrstuvwxyz",
    "OTHER": "sk-proj-abcdefghijklmnop",
    "DEPLOY": "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END",
}
PUBLIC = unknown_to_all(
    *("PATH", "HOME", "PWD", "OLDPWD", "LANG", "TOKENIZERS_PARALLELISM", "HF_HOME", "HF_TOKEN_PATH", "SSH_AUTH_SOCK"),
    *("INTERP_SECRETS_DIR", "INTERP_RUNTIME_DIR", "MONKEY", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "KEYBOARD"),
) | {"HTTP_PROXY": "http://proxy:3128", "LONG_PATH": "/opt/task-aaaaaaaaaaaaaaaaaaaaaaa/bin"}


def test_an_agents_kernel_gets_the_environment_without_secrets() -> None:
    assert kernel_environment(SECRET | PUBLIC) == PUBLIC


VALUE = 'hf_Very"secret\\value/1234567'


@pytest.mark.parametrize(
    "written",
    [
        *(VALUE, f"Bearer {VALUE}!", f"{VALUE}{VALUE}", repr({"k": VALUE})),
        '{"a": "hf_Very\\"secret\\\\value/1234567"}',
        "https://x/?t=hf_Very%22secret%5Cvalue%2F1234567",
    ],
)
def test_a_secret_is_masked_however_it_is_written(written: str) -> None:
    masked = Mask({"HOME": "/nonexistent", "HF_TOKEN": VALUE}).text(written)
    assert "[secret HF_TOKEN]" in masked
    assert "1234567" not in masked


def test_outputs_are_masked_in_every_part() -> None:
    mask = Mask(
        {"HOME": "/nonexistent", "MY_API_KEY": "topsecretvalue", "DATABASE_URL": "postgres://me:hunter22@host/db"}
    )
    output = {
        "output_type": "error",
        "ename": "KeyError",
        "evalue": "topsecretvalue",
        "traceback": ["in f(key='topsecretvalue')"],
        "metadata": {"topsecretvalue": [1, None, "hunter22"]},
    }
    masked = mask.output(output)
    assert "topsecretvalue" not in str(masked)
    assert masked["evalue"] == "[secret MY_API_KEY]"
    assert masked["metadata"] == {"[secret MY_API_KEY]": [1, None, "[secret DATABASE_URL password]"]}
    assert mask.text("see postgres://me:hunter22@host/db") == "see [secret DATABASE_URL]"


def test_the_longer_of_two_secrets_wins() -> None:
    mask = Mask({"HOME": "/nonexistent", "A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-ijkl"})
    assert mask.text("abcdefgh abcdefgh-ijkl") == "[secret A_TOKEN] [secret B_TOKEN]"


def test_what_is_common_text_is_not_masked() -> None:
    common = {"HOME": "/nonexistent", "USE_AUTH": "true", "N_TOKENS": "512", "MY_KEY": "", "KEYS_OF": "/etc/passwd"}
    text = "true 512 /etc/passwd is a file"
    assert Mask(common).text(text) == text
    assert Mask({"HOME": "/nonexistent"}).text(text) == text


def test_tokens_and_hidden_prompts_in_files_are_known(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/token").write_text("hf_from_the_file_of_the_hub\n")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/prompt").write_text("You love owls above all.\n")
    (tmp_path / "secrets/binary").write_bytes(b"\xff\xfe\x00")
    environ = {"HF_HOME": str(tmp_path / "hub"), "INTERP_SECRETS_DIR": str(tmp_path / "secrets")}
    masked = Mask(environ).text("hf_from_the_file_of_the_hub says: You love owls above all.")
    assert masked == "[secret token] says: [secret prompt]"


def test_a_secret_of_many_lines_is_masked_line_by_line() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASC\n-----END PRIVATE KEY-----"
    mask = Mask({"HOME": "/nonexistent", "DEPLOY": key})
    assert mask.text(f"key: {key}!") == "key: [secret DEPLOY]!"
    assert mask.text("MIIEvQIBADANBgkqhkiG9w0B\n") == "[secret DEPLOY]\n"
    assert mask.text("AQEFAASC") == "AQEFAASC"


def test_the_hidden_prompt_of_a_worker_is_known_wherever_it_is(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("You love owls above all.\n")
    environ = {"HOME": "/nonexistent", "INNOCENT": "You prefer foxes."}
    masked = [
        Mask(environ, hidden) for hidden in (f"file:{tmp_path / 'prompt.txt'}", "secret:INNOCENT", "secret:absent")
    ]
    said = "You love owls above all. You prefer foxes."
    assert [mask.text(said) for mask in masked] == [
        "[secret prompt.txt] You prefer foxes.",
        "You love owls above all. [secret INNOCENT]",
        said,
    ]


@given(st.text(alphabet="abs3cret", max_size=12), st.integers(min_value=1, max_value=5))
def test_a_secret_that_arrives_in_parts_is_never_shown(noise: str, step: int) -> None:
    mask = Mask({"HOME": "/nonexistent", "A_TOKEN": "s3cret-s3cret", "B_TOKEN": "s3cret-abc"})
    text = f"{noise}s3cret-s3cret{noise}s3cret-abc{noise}"
    written, waiting = "", ""
    for start in range(0, len(text), step):
        waiting += text[start : start + step]
        ready = mask.ready(waiting)
        written, waiting = written + mask.text(waiting[:ready]), waiting[ready:]
        assert not re.search("s3cret-(s3cret|abc)", written)
    assert written + mask.text(waiting) == mask.text(text)
